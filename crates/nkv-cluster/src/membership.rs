//! Where peers are.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use async_trait::async_trait;
use thiserror::Error;

use crate::stamp::NodeId;

/// Says where the cluster's nodes may be reached. It is asked again and again, as long as the node runs.
#[async_trait]
pub trait Membership: fmt::Debug + Send + Sync + 'static {
    /// The addresses of nodes, with or without this one's own: those that are known now. None is an answer: it is the first node
    /// of its cluster. It has its own attempts and
    /// time-outs; what takes longer than four times [`Options::peer_timeout`](crate::Options::peer_timeout) counts as an error.
    ///
    /// # Errors
    ///
    /// [`MembershipError`] where it cannot be known now: that is no empty list, and an empty node goes on asking.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time.
    async fn addresses(&self) -> Result<Vec<SocketAddr>, MembershipError>;

    /// Whether a node may be a peer. Each may, by default: the cluster's name, and its keys, say who belongs to it.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time.
    async fn admits(&self, node: NodeId) -> bool {
        let _ = node;
        true
    }
}

#[async_trait]
impl<M: Membership + ?Sized> Membership for Arc<M> {
    async fn addresses(&self) -> Result<Vec<SocketAddr>, MembershipError> {
        (**self).addresses().await
    }

    async fn admits(&self, node: NodeId) -> bool {
        (**self).admits(node).await
    }
}

/// Why it is not known where peers are.
#[derive(Clone, Debug, Error)]
#[error("{0}")]
pub struct MembershipError(String);

impl MembershipError {
    /// In words.
    pub fn new(message: impl Into<String>) -> Self {
        MembershipError(message.into())
    }
}

/// A list that does not change.
#[derive(Clone, Debug, Default)]
pub struct StaticPeers(pub Vec<SocketAddr>);

#[async_trait]
impl Membership for StaticPeers {
    async fn addresses(&self) -> Result<Vec<SocketAddr>, MembershipError> {
        Ok(self.0.clone())
    }
}
