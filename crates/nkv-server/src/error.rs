//! Why a server does not run.

use std::sync::Arc;

use nkv_core::PersistError;
use nkv_node::NodeError;
use thiserror::Error;

/// Why a server does not run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServerError {
    /// An address cannot be listened at.
    #[error("cannot listen at {address}{}", in_use_hint(address, source))]
    Bind {
        /// The address.
        address: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// An address is open to other hosts, and that was not asked for.
    #[error(
        "{address} is open to other hosts, and nkv does not ask who they are: listen at a loopback address, or say --insecure"
    )]
    Insecure {
        /// The address.
        address: String,
    },
    /// Storage cannot be opened, or has failed. The message is that of the error.
    #[error(transparent)]
    Persist(Arc<PersistError>),
    /// A thread cannot be started, or a task broke.
    #[error("the server cannot run: {0}")]
    System(std::io::Error),
}

fn in_use_hint(address: &str, source: &std::io::Error) -> String {
    let port = address.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
    match (source.kind(), port) {
        (std::io::ErrorKind::AddrInUse, Some(port)) => {
            format!(" (another nkv-server, or a NATS server, may have port {port})")
        }
        (std::io::ErrorKind::AddrInUse, None) => " (another nkv-server listens there)".into(),
        _ => String::new(),
    }
}

impl From<PersistError> for ServerError {
    fn from(error: PersistError) -> Self {
        ServerError::Persist(Arc::new(error))
    }
}

impl From<NodeError> for ServerError {
    fn from(error: NodeError) -> Self {
        match error {
            NodeError::Persist(error) => ServerError::Persist(error),
            NodeError::System(error) => ServerError::System(error),
            other => ServerError::System(std::io::Error::other(other)),
        }
    }
}
