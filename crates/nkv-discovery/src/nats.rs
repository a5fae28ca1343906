//! NATS: each node answers requests on a subject. The messages are those of Go-KV.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use async_nats::connection::State;
use async_nats::{Client, ConnectErrorKind, ConnectOptions, Event, Message as NatsMessage, ServerAddr, Subscriber};
use async_trait::async_trait;
use futures_util::StreamExt;
use percent_encoding::percent_decode_str;
use prost::Message as _;
use tokio::sync::OnceCell;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::discovery::Discovery;
use crate::error::{ConfigError, DiscoveryError, DiscoveryErrorKind};
use crate::found::{ADDRESSES_MAX, Found};
use crate::host::{HostPort, resolve};
use crate::spec::NatsSpec;

/// No message of the exchange is longer: two texts of a host, a port and a type.
const MESSAGE_LEN_MAX: usize = 1_024;

/// How many messages wait to be read; of what comes faster, some is lost.
const CAPACITY: usize = 256;

/// A message of the exchange.
#[derive(Clone, PartialEq, prost::Message)]
struct PeerMessage {
    /// Of the node that sends it.
    #[prost(string, tag = "1")]
    host: String,
    #[prost(int32, tag = "2")]
    port: i32,
    /// `HOST:PORT`.
    #[prost(string, tag = "3")]
    name: String,
    #[prost(enumeration = "Kind", tag = "4")]
    kind: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
enum Kind {
    Register = 0,
    Deregister = 1,
    Request = 2,
    Response = 3,
}

impl PeerMessage {
    fn new(own: SocketAddr, kind: Kind) -> Self {
        let (host, port) = (own.ip().to_string(), i32::from(own.port()));
        PeerMessage { host, port, name: own.to_string(), kind: kind.into() }
    }

    /// Reads what a peer sent.
    fn read(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() > MESSAGE_LEN_MAX {
            return Err(format!("a message of {} bytes", bytes.len()));
        }
        Self::decode(bytes).map_err(|error| error.to_string())
    }

    fn host_port(&self) -> Result<HostPort, String> {
        let port = u16::try_from(self.port).map_err(|_| format!("{} is no port", self.port))?;
        HostPort::new(&self.host, port).map_err(|error| error.to_string())
    }

    fn to_bytes(&self) -> prost::bytes::Bytes {
        self.encode_to_vec().into()
    }
}

/// Asks the other nodes on a subject of NATS, and answers them. Needs neither JetStream nor a stream.
///
/// [`find`](Discovery::find) collects answers for the time-out. This node answers itself too: if that is the only answer, there is
/// no other node; if there is none at all, the exchange has failed. The connection is made with the first call, in at most
/// `max_join_attempts` attempts, and made again by itself for as long as this lives.
///
/// # Examples
///
/// ```
/// use nkv_discovery::{Discovery, Nats, NatsSpec};
///
/// let nats = Nats::new(NatsSpec::new("127.0.0.1:4222", "nkv.cluster"))?;
/// assert_eq!(nats.name(), "nats");
/// # Ok::<(), nkv_discovery::ConfigError>(())
/// ```
pub struct Nats {
    spec: NatsSpec,
    server: ServerAddr,
    session: OnceCell<Session>,
    /// How often a message was lost.
    lost: Arc<AtomicU64>,
}

/// A connection, on which requests are answered.
struct Session {
    client: Client,
    _answering: JoinSet<()>,
}

impl Nats {
    /// A provider that is not connected yet.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] if the server is none.
    pub fn new(spec: NatsSpec) -> Result<Self, ConfigError> {
        let server = format!("nats://{}", spec.server);
        let server = server.parse().map_err(|error| ConfigError(format!("nats: {}: {error}", spec.place())))?;
        Ok(Nats { spec, server, session: OnceCell::new(), lost: Arc::default() })
    }

    async fn session(&self, own: SocketAddr) -> Result<&Session, DiscoveryError> {
        self.session.get_or_try_init(|| self.open(own)).await
    }

    async fn open(&self, own: SocketAddr) -> Result<Session, DiscoveryError> {
        let mut attempt = 1_u32;
        let client = loop {
            match self.connect(own).await {
                Ok(client) => break client,
                Err(error) if error.kind() == DiscoveryErrorKind::Refused || attempt >= self.spec.max_join_attempts => {
                    return Err(error);
                }
                Err(error) => tracing::debug!(%error, attempt, "no connection to NATS"),
            }
            attempt = attempt.saturating_add(1);
            sleep(self.spec.reconnect_wait).await;
        };
        let requests = self.subscribe(&client, self.spec.subject.clone()).await?;
        self.round_trip(&client).await?;
        let mut answering = JoinSet::new();
        answering.spawn(answer(client.clone(), requests, own));
        Ok(Session { client, _answering: answering })
    }

    async fn connect(&self, own: SocketAddr) -> Result<Client, DiscoveryError> {
        let (wait, lost) = (self.spec.reconnect_wait, Arc::clone(&self.lost));
        let mut options = ConnectOptions::new()
            .name(own)
            .connection_timeout(self.spec.timeout)
            .subscription_capacity(CAPACITY)
            .client_capacity(CAPACITY)
            .max_reconnects(None)
            .event_callback(move |event| {
                if matches!(event, Event::SlowConsumer(_)) {
                    lost.fetch_add(1, Relaxed);
                }
                std::future::ready(())
            })
            .reconnect_delay_callback(move |attempt| if attempt <= 1 { Duration::ZERO } else { wait });
        let decode = |text| percent_decode_str(text).decode_utf8_lossy().into_owned();
        options = match (self.server.username().map(decode), self.server.password().map(decode)) {
            (Some(user), Some(password)) => options.user_and_password(user, password),
            (Some(token), None) => options.token(token),
            (None, _) => options,
        };
        let limit = self.spec.timeout.saturating_mul(2);
        let place = self.spec.place();
        match timeout(limit, options.connect(self.server.clone())).await {
            Ok(Ok(client)) => Ok(client),
            Ok(Err(error)) => Err(DiscoveryError::new(
                match error.kind() {
                    ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
                        DiscoveryErrorKind::Refused
                    }
                    _ => DiscoveryErrorKind::Unreachable,
                },
                format!("nats: {place}: {error}"),
            )),
            Err(_) => Err(DiscoveryError::unreachable(format!("nats: {place}: no connection within {limit:?}"))),
        }
    }

    async fn subscribe(&self, client: &Client, subject: String) -> Result<Subscriber, DiscoveryError> {
        let limit = self.spec.timeout;
        self.within(limit, async { client.subscribe(subject).await.map_err(|error| error.to_string()) }).await
    }

    /// Waits until the server has done all that it was sent. Flushing says only that it was sent.
    async fn round_trip(&self, client: &Client) -> Result<(), DiscoveryError> {
        let inbox = client.new_inbox();
        let mut back = self.subscribe(client, inbox.clone()).await?;
        let trip = async {
            client.publish(inbox, Default::default()).await.map_err(|error| error.to_string())?;
            back.next().await.map(drop).ok_or_else(|| "the connection is closed".to_owned())
        };
        self.within(self.spec.timeout, trip).await
    }

    async fn publish(
        &self,
        client: &Client,
        reply: Option<String>,
        message: PeerMessage,
    ) -> Result<(), DiscoveryError> {
        let (subject, bytes) = (self.spec.subject.clone(), message.to_bytes());
        let publish = async {
            let published = match reply {
                Some(reply) => client.publish_with_reply(subject, reply, bytes).await,
                None => client.publish(subject, bytes).await,
            };
            published.map_err(|error| error.to_string())?;
            client.flush().await.map_err(|error| error.to_string())
        };
        self.within(self.spec.timeout, publish).await
    }

    async fn within<T>(
        &self,
        limit: Duration,
        work: impl Future<Output = Result<T, String>>,
    ) -> Result<T, DiscoveryError> {
        let failed = |error: String| DiscoveryError::unreachable(format!("nats: {}: {error}", self.spec.place()));
        timeout(limit, work).await.unwrap_or_else(|_| Err(format!("nothing done within {limit:?}"))).map_err(failed)
    }

    /// The nodes that answer, and whether this one did.
    async fn collect(&self, answers: &mut Subscriber, own: &PeerMessage) -> (Vec<HostPort>, Found, bool) {
        let deadline = Instant::now().checked_add(self.spec.timeout).unwrap_or_else(Instant::now);
        let (mut hosts, mut found, mut heard_own) = (Vec::<HostPort>::new(), Found::new(), false);
        while let Ok(Some(answer)) = timeout_at(deadline, answers.next()).await {
            let message = match PeerMessage::read(&answer.payload) {
                Ok(message) if message.kind() == Kind::Response => message,
                Ok(message) => {
                    found.add_unusable(format!("not an answer, but of type {}", message.kind));
                    continue;
                }
                Err(error) => {
                    found.add_unusable(format!("an answer that cannot be read: {error}"));
                    continue;
                }
            };
            if message.host == own.host && message.port == own.port {
                heard_own = true;
                continue;
            }
            match message.host_port() {
                Ok(host) if hosts.contains(&host) => {}
                Ok(host) if hosts.len() < ADDRESSES_MAX => hosts.push(host),
                Ok(host) => found.add_unusable(format!("{host} is one too many")),
                Err(error) => found.add_unusable(error),
            }
        }
        (hosts, found, heard_own)
    }
}

/// Answers requests for as long as there is a connection. A node that registers or leaves is known by gossip soon enough.
async fn answer(client: Client, mut requests: Subscriber, own: SocketAddr) {
    let response = PeerMessage::new(own, Kind::Response).to_bytes();
    while let Some(NatsMessage { reply, payload, .. }) = requests.next().await {
        match (PeerMessage::read(&payload), reply) {
            (Ok(message), Some(reply)) if message.kind() == Kind::Request => {
                if let Err(error) = client.publish(reply, response.clone()).await {
                    tracing::debug!(%error, "a request for peers was not answered");
                }
            }
            (Ok(message), _) => tracing::debug!(name = %message.name, kind = message.kind, "a node on the subject"),
            (Err(error), _) => tracing::debug!(%error, "a message on the subject cannot be read"),
        }
    }
}

/// Without who logs in.
impl fmt::Debug for Nats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Nats").field(&self.spec).finish()
    }
}

#[async_trait]
impl Discovery for Nats {
    fn name(&self) -> &str {
        "nats"
    }

    async fn find(&self, own: SocketAddr) -> Result<Found, DiscoveryError> {
        let client = &self.session(own).await?.client;
        let cut = || DiscoveryError::unreachable(format!("nats: {}: the connection is lost", self.spec.place()));
        if client.connection_state() != State::Connected {
            return Err(cut());
        }
        let lost_before = self.lost.load(Relaxed);
        let inbox = client.new_inbox();
        let mut answers = self.subscribe(client, inbox.clone()).await?;
        let request = PeerMessage::new(own, Kind::Request);
        self.publish(client, Some(inbox), request.clone()).await?;
        let (hosts, mut found, heard_own) = self.collect(&mut answers, &request).await;
        found.merge(resolve(&hosts, self.spec.timeout).await);
        match self.lost.load(Relaxed).wrapping_sub(lost_before) {
            0 => {}
            lost => found.add_unusable(format!("{lost} messages came faster than they were read")),
        }
        if found.addresses().is_empty() && !heard_own {
            // Not even this node's own answer came back: that says nothing of others.
            return Err(match client.connection_state() {
                State::Connected => DiscoveryError::unreachable(format!(
                    "nats: no answer on '{}' within {:?}, not even the own one",
                    self.spec.subject, self.spec.timeout
                )),
                _ => cut(),
            });
        }
        found.checked()
    }

    async fn register(&self, own: SocketAddr) -> Result<(), DiscoveryError> {
        self.session(own).await.map(drop)
    }

    async fn deregister(&self, own: SocketAddr) -> Result<(), DiscoveryError> {
        let Some(Session { client, .. }) = self.session.get() else { return Ok(()) };
        let said = self.publish(client, None, PeerMessage::new(own, Kind::Deregister)).await;
        // No request is answered any more, whatever became of the message.
        let drained = self.within(self.spec.timeout, async { client.drain().await.map_err(|error| error.to_string()) });
        drained.await.and(said)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Go-KV encodes them: fields in order, absent where they are the default.
    #[test]
    fn messages_are_those_of_go_kv_to_the_byte() {
        let own = "10.0.0.1:3322".parse().unwrap();
        let wire = |kind: &[u8]| [b"\x0a\x0810.0.0.1\x10\xfa\x19\x1a\x0d10.0.0.1:3322".as_slice(), kind].concat();
        for (kind, bytes) in [
            (Kind::Register, wire(b"")),
            (Kind::Deregister, wire(b"\x20\x01")),
            (Kind::Request, wire(b"\x20\x02")),
            (Kind::Response, wire(b"\x20\x03")),
        ] {
            let message = PeerMessage::new(own, kind);
            assert_eq!(message.to_bytes(), bytes, "{kind:?}");
            assert_eq!(PeerMessage::read(&bytes), Ok(message));
        }
    }

    #[test]
    fn what_is_no_message_is_refused() {
        assert!(PeerMessage::read(b"\xff\xff").is_err());
        assert!(PeerMessage::read(&[0; MESSAGE_LEN_MAX + 1]).is_err());
        let of = |host: &str, port| PeerMessage { host: host.into(), port, ..PeerMessage::default() }.host_port();
        assert!(of("node-1", 7).is_ok());
        for (host, port) in [("", 7), ("a b", 7), ("h", 0), ("h", -1), ("h", 65_536)] {
            assert!(of(host, port).is_err(), "{host}:{port}");
        }
    }
}
