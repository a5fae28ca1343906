//! The door: accepts connections, and serves the services on them.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use nkv_node::{Full, Handle};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};
use tracing::{debug, error};

use crate::connection::Connection;
use crate::line::Line;
use crate::mesh::Mesh;
use crate::options::Options;
use crate::services::{Named, service};
use crate::socket::read_preface;
use crate::{FILE_DESCRIPTOR_SET, kv, v1};

/// The time between a failed accept (no file descriptors, most often) and the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How often it is looked whether the engine of a node is in reach.
const HEALTH_PAUSE: Duration = Duration::from_secs(1);

/// How long a refused peer has to take the frame that says so.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(2);

/// The gRPC door of a node: the services `nkv.v1.Kv` and `kv.Client`, `grpc.health.v1.Health` and reflection. Clones are the
/// same door; its limits hold for all connections together.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use nkv_grpc::v1::kv_client::KvClient;
/// use nkv_grpc::v1::{GetRequest, PutRequest};
/// use nkv_grpc::{Door, Options};
/// use nkv_node::Node;
///
/// let node = Node::builder().start().await?;
/// let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
/// let address = format!("http://{}", listener.local_addr()?);
/// let door = tokio::spawn(Door::new(node.handle(), Options::default()).listen(listener));
///
/// let mut client = KvClient::new(tonic::transport::Channel::from_shared(address)?.connect().await?);
/// client.put(PutRequest { key: "lamp.hall".into(), value: "on".into(), ..Default::default() }).await?;
/// let answer = client.get(GetRequest { key: "lamp.hall".into() }).await?.into_inner();
/// assert_eq!((&answer.value[..], answer.revision), (&b"on"[..], 1));
///
/// node.shutdown().await?; // the door ends with it
/// door.await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Door(Arc<Inner>);

/// What the connections of a door share.
pub(crate) struct Inner {
    pub(crate) handle: Handle,
    pub(crate) options: Options,
    /// The services that are the same for all connections.
    pub(crate) services: Arc<[Named]>,
    /// Whether connections are to end.
    going_away: watch::Sender<bool>,
    /// What reports the health of the node, and what sends to the mesh.
    reporting: AbortHandle,
    sending: AbortHandle,
    pub(crate) mesh: Arc<Mesh>,
}

impl Inner {
    /// Waits until connections are to end.
    pub(crate) fn going_away(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut going_away = self.going_away.subscribe();
        async move { drop(going_away.wait_for(|going_away| *going_away).await) }
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.reporting.abort();
        self.sending.abort();
    }
}

impl Door {
    /// A door to the store of `handle`, on the current Tokio runtime. The node remembers recent deletes from now on.
    ///
    /// # Panics
    ///
    /// Outside of a Tokio runtime.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let node = nkv_node::Node::builder().start().await?;
    /// let mut options = nkv_grpc::Options::default();
    /// options.connections = nkv_node::ConnectionLimit::new(16, 16);
    /// let door = nkv_grpc::Door::new(node.handle(), options);
    /// # drop(door);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn new(handle: Handle, options: Options) -> Self {
        handle.remember_deletes(options.deletes_max);
        let handle = handle.for_door();
        let reporter = HealthReporter::new();
        let health = HealthServer::new(HealthService::from_health_reporter(reporter.clone()));
        let going_away = watch::Sender::new(false);
        let reporting = tokio::spawn(report(handle.clone(), reporter, going_away.clone())).abort_handle();
        let services = std::iter::once(service(health)).chain(reflection()).collect();
        let mesh = Mesh::new(handle.clone(), &options);
        let sending = tokio::spawn(Arc::clone(&mesh).run()).abort_handle();
        Door(Arc::new(Inner { handle, options, services, going_away, reporting, sending, mesh }))
    }

    /// Accepts connections and serves them until the node stops; ends when they have ended. Dropping the future cuts them.
    pub async fn listen(self, listener: TcpListener) {
        let (mut connections, handle) = (JoinSet::new(), self.0.handle.clone());
        let mut stopping = std::pin::pin!(handle.stopping());
        loop {
            tokio::select! {
                biased;
                () = &mut stopping => break,
                Some(ended) = connections.join_next() => log_panic(&ended),
                accepted = listener.accept() => match accepted {
                    Ok((stream, from)) => {
                        if let Err(error) = stream.set_nodelay(true) {
                            debug!(%error, "small packets of a connection may wait");
                        }
                        let door = self.clone();
                        connections.spawn(async move { door.serve(stream, from).await });
                    }
                    Err(error) => {
                        handle.log().warn("accept", format_args!("cannot accept a connection: {error}"));
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
        drop(listener);
        while let Some(ended) = connections.join_next().await {
            log_panic(&ended);
        }
    }

    /// Serves one connection, of any kind, until either side ends it or the node stops. `peer` is shown to people; where it is
    /// an IP address with a port, the limit for one address counts it.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let node = nkv_node::Node::builder().start().await?;
    /// let door = nkv_grpc::Door::new(node.handle(), nkv_grpc::Options::default());
    /// let (ours, theirs) = tokio::io::duplex(4_096);
    /// let served = tokio::spawn(async move { door.serve(theirs, "a test").await });
    /// drop(ours); // the peer hangs up
    /// served.await?;
    /// # Ok(()) }
    /// ```
    pub async fn serve<S>(&self, mut stream: S, peer: impl fmt::Display)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let peer = peer.to_string();
        let place = match self.0.options.connections.take(&peer) {
            Ok(place) => place,
            Err(full) => {
                self.0.handle.log().warn("refused", format_args!("a connection was refused: {full}"));
                return drop(timeout(LAST_WORDS_LIMIT, refuse(&mut stream, full)).await);
            }
        };
        // In memory of its own: one that is refused takes none for what it is not.
        let line = Line::new(Arc::clone(&self.0), self.0.handle.clone(), &peer, Some(place));
        let began = tokio::select! {
            biased;
            began = timeout(self.0.options.first_byte_limit, read_preface(&mut stream)) => began,
            () = self.0.going_away() => return,
        };
        match began {
            Ok(Ok(true)) => Box::pin(Connection::new(line).serve(stream)).await,
            Ok(Ok(false)) => debug!(peer, "connection closed: it does not begin as HTTP/2"),
            Ok(Err(error)) => debug!(peer, %error, "connection lost"),
            Err(_) => debug!(peer, "connection closed: it did not begin in time"),
        }
    }

    /// The calls of one connection as a service, for a server that accepts and speaks HTTP/2 itself, such as one that shares
    /// its port with other protocols. One for each connection: what it holds counts in the budget of the node under `peer`, until
    /// all clones and answers are dropped. Connections that are served in this way have their limits from that server.
    ///
    /// Requests that are not gRPC are answered with 415. Streams end when the node stops.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use tower_service::Service;
    ///
    /// # let node = nkv_node::Node::builder().start().await?;
    /// let door = nkv_grpc::Door::new(node.handle(), nkv_grpc::Options::default());
    /// let mut connection = door.connection("192.0.2.1:5000");
    /// let request = http::Request::get("/").body(tonic::body::Body::empty())?;
    /// assert_eq!(connection.call(request).await?.status(), 415); // it is not gRPC
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn connection(&self, peer: &str) -> Connection {
        let line = Line::new(Arc::clone(&self.0), self.0.handle.clone(), peer, None);
        Connection::new(line)
    }

    /// The same for a peer that has authenticated: the node checks what it may do.
    #[must_use]
    pub fn connection_of(&self, peer: &str, principal: impl Into<Arc<str>>) -> Connection {
        let line = Line::new(Arc::clone(&self.0), self.0.handle.as_principal(principal), peer, None);
        Connection::new(line)
    }
}

/// Both versions of the reflection service.
fn reflection() -> Vec<Named> {
    let builder = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    match (builder().build_v1(), builder().build_v1alpha()) {
        (Ok(v1), Ok(v1alpha)) => vec![service(v1), service(v1alpha)],
        // A test sees that this does not happen.
        (Err(error), _) | (_, Err(error)) => {
            error!(%error, "there is no reflection");
            Vec::new()
        }
    }
}

/// Reports the health of the node, then has connections end.
async fn report(handle: Handle, reporter: HealthReporter, going_away: watch::Sender<bool>) {
    let set = async |status: ServingStatus| {
        for name in ["", v1::kv_server::SERVICE_NAME, kv::client_server::SERVICE_NAME] {
            reporter.set_service_status(name, status).await;
        }
    };
    let mut stopping = std::pin::pin!(handle.stopping());
    loop {
        let is_healthy = handle.check_healthy().is_ok();
        set(if is_healthy { ServingStatus::Serving } else { ServingStatus::NotServing }).await;
        tokio::select! {
            biased;
            () = &mut stopping => break,
            () = tokio::time::sleep(HEALTH_PAUSE), if handle.follows_engine() => {}
        }
    }
    set(ServingStatus::NotServing).await;
    going_away.send_replace(true);
}

/// Says in HTTP/2 that there are too many connections: empty settings, then GOAWAY with ENHANCE_YOUR_CALM.
async fn refuse(stream: &mut (impl AsyncWrite + Unpin), full: Full) -> std::io::Result<()> {
    let text = full.to_string();
    let len = u8::try_from(text.len().saturating_add(8)).unwrap_or(8);
    let mut frames = vec![0, 0, 0, 4, 0, 0, 0, 0, 0];
    frames.extend_from_slice(&[0, 0, len, 7, 0, 0, 0, 0, 0]);
    frames.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 11]);
    frames.extend_from_slice(text.as_bytes().get(..usize::from(len).saturating_sub(8)).unwrap_or_default());
    stream.write_all(&frames).await?;
    stream.shutdown().await
}

fn log_panic(ended: &Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection's task broke");
    }
}
