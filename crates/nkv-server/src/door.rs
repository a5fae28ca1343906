//! The door: serves the JSON-lines protocol on any stream, by calls of a node's handle.

use std::fmt;
use std::sync::Arc;

use nkv_node::{ConnectionLimit, Handle};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::connection;
use crate::inner::Inner;
use crate::options::Options;
use crate::socket::Socket;

/// The JSON-lines door of a node, for programs that accept connections themselves: of TLS, of a WebSocket, of a test.
/// Clones are the same door; its limits hold for all connections together.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use nkv_node::Node;
/// use nkv_server::{Door, Options};
/// use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
///
/// let node = Node::builder().start().await?;
/// let door = Door::new(node.handle(), Options::default());
/// let (ours, theirs) = tokio::io::duplex(4_096);
/// tokio::spawn(async move { door.serve(theirs, "a test").await });
///
/// let mut ours = BufReader::new(ours);
/// ours.write_all(b"{\"type\":\"Health\"}\n").await?;
/// let mut line = String::new();
/// ours.read_line(&mut line).await?;
/// assert!(line.contains("200"), "{line}");
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Door(pub(crate) Arc<Inner>);

impl Door {
    /// A door to the store of `handle`. Of `options`, those of connections count; those of the store are its node's, and values
    /// have 8 MiB at most.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use nkv_node::Node;
    /// use nkv_server::{Door, Options};
    ///
    /// let node = Node::builder().start().await?;
    /// let mut options = Options::default();
    /// options.connections_max = 16;
    /// let door = Door::new(node.handle(), options);
    /// # drop(door);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn new(handle: Handle, options: Options) -> Self {
        let options = Options { value_len_max: handle.limits().value_len_max, ..options };
        let places = ConnectionLimit::new(options.connections_max, options.connections_per_address_max);
        Door(Arc::new(Inner { handle, options, places }))
    }

    /// The connection limit, for other doors that are to share it.
    #[must_use]
    pub fn connection_limit(&self) -> ConnectionLimit {
        self.0.places.clone()
    }

    /// Serves one connection until either side ends it or the node stops. `peer` is shown to people; where it is an IP
    /// address with a port, the limit for one address counts it.
    pub async fn serve<S>(&self, stream: S, peer: impl fmt::Display)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        if let Some(served) = self.serve_socket(Socket::Other(Box::new(stream)), &peer.to_string()) {
            served.await;
        }
    }

    /// Serves a connection, or refuses it at once where there is no place for it.
    pub(crate) fn serve_socket(&self, socket: Socket, peer: &str) -> Option<impl Future<Output = ()> + Send + use<>> {
        match self.0.places.take(peer) {
            Ok(place) => Some(connection::serve(socket, Arc::clone(&self.0), place)),
            Err(full) => {
                self.0.handle.log().warn("refused", format_args!("a connection was refused: {full}"));
                socket.refuse(&full.to_string());
                None
            }
        }
    }
}

/// Serves the JSON-lines protocol on a stream, with the default limits of connections: see [`Door::serve`].
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use nkv_node::Node;
///
/// let node = Node::builder().start().await?;
/// let (ours, theirs) = tokio::io::duplex(4_096);
/// let served = tokio::spawn(nkv_server::serve(theirs, "a test", node.handle()));
/// drop(ours); // the peer hangs up
/// served.await?;
/// # Ok(()) }
/// ```
pub async fn serve<S>(stream: S, peer: impl fmt::Display, handle: Handle)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    Door::new(handle, Options::default()).serve(stream, peer).await;
}
