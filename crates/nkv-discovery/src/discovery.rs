//! The trait.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use async_trait::async_trait;

use crate::error::DiscoveryError;
use crate::found::Found;

/// Finds the addresses of a cluster's nodes.
///
/// A provider needs [`name`](Self::name) and [`find`](Self::find). One that must make this node known to others has
/// [`register`](Self::register) and [`deregister`](Self::deregister) too. The crate's first page has a whole one.
///
/// # Contract
///
/// - *Anew*: each call of `find` asks the source again. Nothing is kept from the call before.
/// - *Whole or said*: an error is never an empty answer. `Ok` with no addresses and nothing unusable means that the source says
///   that there are none. What of an answer cannot be used is named in [`Found::unusable`].
/// - *Bounded*: `find` ends by itself, with an error if the source is silent. [`Found`] bounds the memory of an answer.
/// - *Any number*: `find` may be called at any time and any number of times, also at once, and its future may be dropped.
/// - *Own address*: the answer may hold the address of this node, and addresses of nodes that are gone. The caller leaves them
///   out.
/// - *Passing errors*: any error may pass. The caller asks again later, for as long as it likes.
///
/// `own` is the address at which other nodes reach this one; it is the same in all calls.
#[async_trait]
pub trait Discovery: fmt::Debug + Send + Sync + 'static {
    /// Returns a short name for logs, such as `dns`.
    fn name(&self) -> &str;

    /// Finds the addresses of nodes.
    ///
    /// # Errors
    ///
    /// [`DiscoveryError`] if the source cannot be asked, does not answer in time, or answers with nothing that can be used.
    async fn find(&self, own: SocketAddr) -> Result<Found, DiscoveryError>;

    /// Makes this node known, before the first [`find`](Self::find). Does nothing if not given.
    ///
    /// # Errors
    ///
    /// [`DiscoveryError`] if that failed; it may be called again.
    async fn register(&self, _own: SocketAddr) -> Result<(), DiscoveryError> {
        Ok(())
    }

    /// Takes back [`register`](Self::register), as the node stops: the last call. Does nothing if not given.
    ///
    /// # Errors
    ///
    /// [`DiscoveryError`] if others may still be pointed to this node.
    async fn deregister(&self, _own: SocketAddr) -> Result<(), DiscoveryError> {
        Ok(())
    }
}

macro_rules! forward {
    ($($pointer:ident),*) => {$(
        #[async_trait]
        #[deny(clippy::missing_trait_methods)]
        impl<D: Discovery + ?Sized> Discovery for $pointer<D> {
            fn name(&self) -> &str {
                (**self).name()
            }

            async fn find(&self, own: SocketAddr) -> Result<Found, DiscoveryError> {
                (**self).find(own).await
            }

            async fn register(&self, own: SocketAddr) -> Result<(), DiscoveryError> {
                (**self).register(own).await
            }

            async fn deregister(&self, own: SocketAddr) -> Result<(), DiscoveryError> {
                (**self).deregister(own).await
            }
        }
    )*};
}

forward!(Box, Arc);
