//! How a connection is encrypted, and how it says who it is.

use std::fmt;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::error::Result;
use crate::wire::Connection;

/// What the bytes of a connection go through.
pub(crate) type Stream = Box<dyn Duplex>;

pub(crate) trait Duplex: AsyncRead + AsyncWrite + Send + Sync + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Duplex for T {}

/// How connections are made safe.
#[derive(Clone, Default)]
pub(crate) struct Security {}

impl Security {
    pub(crate) async fn secure(&self, stream: TcpStream, _address: &str) -> Result<Stream> {
        Ok(Box::new(stream))
    }

    pub(crate) async fn authenticate(&self, _connection: &mut Connection) -> Result<()> {
        Ok(())
    }
}

impl fmt::Debug for Security {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Security").finish_non_exhaustive()
    }
}
