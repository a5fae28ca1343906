//! A connection to another server of a mesh.

use std::fmt;
use std::future::{Ready, ready};
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::Uri;
use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tonic::client::Grpc;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;
use tower_service::Service;

use crate::kv::StoreReply;
use crate::kv::client_client::ClientClient;
use crate::mesh::{CONNECT_LIMIT, Failed};
use crate::node_kv::ANSWER_LEN_MAX;

/// What a peer may send of an answer before it is read.
const WINDOW: u32 = 1 << 20;

/// A peer that is connected. The connection is not made anew by itself: one that was away is to be joined, and not to be sent the next
/// value as if nothing had been.
pub(crate) struct Peer {
    pub(crate) client: ClientClient<Channel>,
    channel: Channel,
    pub(crate) ip: IpAddr,
    /// Ready when the connection has ended.
    pub(crate) ended: oneshot::Receiver<()>,
}

impl Peer {
    /// Connects to one; its name is looked up each time. There are no pings of HTTP/2: servers of the original close connections that
    /// send them.
    pub(crate) async fn connect(address: &str) -> Result<Self, Failed> {
        let stream = timeout(CONNECT_LIMIT, TcpStream::connect(address)).await??;
        stream.set_nodelay(true)?;
        let ip = stream.peer_addr()?.ip().to_canonical();
        let (ending, ended) = oneshot::channel();
        let once = Once(Some(Connection { stream, _ending: ending }));
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?.initial_stream_window_size(WINDOW);
        let channel = timeout(CONNECT_LIMIT, endpoint.connect_with_connector(once)).await??;
        let client = ClientClient::new(channel.clone()).max_decoding_message_size(ANSWER_LEN_MAX);
        Ok(Peer { client, channel, ip, ended })
    }

    /// Calls a method that answers all that the peer has. Returns once the answer has begun: the rest is received while it is read.
    pub(crate) async fn begin_store<M: prost::Message + 'static>(
        &self,
        method: &'static str,
        request: Request<M>,
        len_max: usize,
    ) -> Result<Response<Streaming<StoreReply>>, Status> {
        let mut client = Grpc::new(self.channel.clone()).max_decoding_message_size(len_max);
        client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        client.server_streaming(request, PathAndQuery::from_static(method), ProstCodec::<M, _>::default()).await
    }
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peer").field("ip", &self.ip).finish_non_exhaustive()
    }
}

/// Gives a connection that there is, and no other.
struct Once(Option<Connection>);

impl Service<Uri> for Once {
    type Response = TokioIo<Connection>;
    type Error = io::Error;
    type Future = Ready<io::Result<Self::Response>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        ready(self.0.take().map(TokioIo::new).ok_or_else(|| io::ErrorKind::ConnectionAborted.into()))
    }
}

/// A stream whose end is noticed.
struct Connection {
    stream: TcpStream,
    /// Dropped with it.
    _ending: oneshot::Sender<()>,
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, to)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
