//! The door: what a program makes and gives its connections to.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use nkv_node::{ConnectionLimit, Handle};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use crate::body::CallsBody;
use crate::connection::{self, MakesCalls, Messages};
use crate::figures::Counted;
use crate::guard::{Guard, Origin, host_name};
use crate::timed::TimeLimits;

/// A stream of bytes.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

pub(crate) type ServeMessages =
    dyn Fn(Box<dyn Stream>, Box<str>) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync;

/// What answers the calls of another protocol on the port of a door: see [`Door::with_calls`]. One for each connection.
pub trait Calls: fmt::Debug + Send + Sync {
    /// Answers a request.
    fn call(&self, request: Request<Incoming>) -> CallsFuture;

    /// Waits until the connection is to be cut, as the node is short of memory.
    fn evicted(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

/// The answer of [`Calls`] to a request.
pub type CallsFuture = Pin<Box<dyn Future<Output = Response<CallsBody>> + Send>>;

pub(crate) type MakeCalls = dyn Fn(&str) -> Box<dyn Calls> + Send + Sync;

/// How an HTTP door is to be.
///
/// # Examples
///
/// ```
/// let mut options = nkv_http::Options::default();
/// options.hosts = vec!["nkv.example".into()];
/// options.allowed_origins = vec!["http://localhost:3000".into()];
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// How many connections there may be; shared with other doors. 1,024, all of which may come from one address, by default.
    pub connections: ConnectionLimit,
    /// Names that `Host` may be besides an IP address and `localhost`.
    pub hosts: Vec<String>,
    /// Origins whose web pages may use the store, as `http://localhost:3000`.
    pub allowed_origins: Vec<String>,
    /// Figures and health alone, under any `Host`.
    pub only_figures: bool,
    /// How long the head of a request may take to come. 10 s by default.
    pub head_limit: Duration,
    /// For how long a connection may do nothing. 75 s by default: longer than proxies keep theirs.
    pub idle_limit: Duration,
    /// How long the body of a request may take to come, and as long again for each MiB of the longest. 30 s by default.
    pub request_limit: Duration,
    /// For how long a peer may take nothing of its backlog. 30 s by default.
    pub stall_limit: Duration,
    /// How many of the most recent deletes are remembered, for watches that are resumed. 65,536 by default.
    pub deletes_max: usize,
    /// How often a watch gives a sign of life. 15 s by default.
    pub heartbeat: Duration,
    /// What a door counts: one with a clone of these options shows it too.
    pub(crate) counted: SharedCounted,
}

/// Clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct SharedCounted(Arc<Counted>);

impl Default for Options {
    fn default() -> Self {
        Options {
            connections: ConnectionLimit::new(1_024, 1_024),
            hosts: Vec::new(),
            allowed_origins: Vec::new(),
            only_figures: false,
            head_limit: Duration::from_secs(10),
            idle_limit: Duration::from_secs(75),
            request_limit: Duration::from_secs(30),
            stall_limit: Duration::from_secs(30),
            deletes_max: 65_536,
            heartbeat: Duration::from_secs(15),
            counted: SharedCounted::default(),
        }
    }
}

impl Options {
    /// Whether a door can be made of them.
    ///
    /// # Errors
    ///
    /// [`OptionError`] for a host that is no name, and an origin that is none.
    pub fn check(&self) -> Result<(), OptionError> {
        self.guard().map(drop)
    }

    fn guard(&self) -> Result<Guard, OptionError> {
        let host = |text: &String| {
            let wrong = || OptionError(format!("'{text}' is not the name of a host; an address needs no mention"));
            host_name(text).ok_or_else(wrong)
        };
        let origin = |text: &String| {
            let wrong = || OptionError(format!("'{text}' is not an origin, such as http://localhost:3000"));
            Origin::read(text).ok_or_else(wrong)
        };
        Ok(Guard {
            hosts: self.hosts.iter().map(host).collect::<Result<_, _>>()?,
            origins: self.allowed_origins.iter().map(origin).collect::<Result<_, _>>()?,
            any_host: self.only_figures,
        })
    }

    pub(crate) fn time_limits(&self) -> TimeLimits {
        TimeLimits {
            head: self.head_limit,
            idle: self.idle_limit,
            request_limit: self.request_limit,
            stall: self.stall_limit,
        }
    }
}

/// An option that cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionError(String);

impl fmt::Display for OptionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for OptionError {}

/// The HTTP door of a node. Clones are the same door; its limits hold for all connections together.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use nkv_http::{Door, Options};
/// use nkv_node::Node;
/// use tokio::io::{AsyncReadExt, AsyncWriteExt};
///
/// let node = Node::builder().start().await?;
/// node.handle().put("lamp.hall", "on").await?;
/// let door = Door::new(node.handle(), Options::default())?;
/// let (mut ours, theirs) = tokio::io::duplex(4_096);
/// tokio::spawn(async move { door.serve(theirs, "a test").await });
///
/// ours.write_all(b"GET /v1/kv/lamp.hall HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
/// let mut answer = String::new();
/// ours.read_to_string(&mut answer).await?;
/// assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("on"), "{answer}");
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Door(Arc<Inner>);

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) handle: Handle,
    pub(crate) options: Options,
    pub(crate) guard: Guard,
    pub(crate) messages: Option<Messages>,
    pub(crate) calls: Option<MakesCalls>,
    /// Shared with a door that shows it.
    pub(crate) counted: Arc<Counted>,
}

impl Door {
    /// A door to the store of `handle`. The node remembers recent deletes from now on.
    ///
    /// # Errors
    ///
    /// [`OptionError`] for a host that is no name, and an origin that is none.
    pub fn new(handle: Handle, options: Options) -> Result<Self, OptionError> {
        let guard = options.guard()?;
        if !options.only_figures {
            handle.remember_deletes(options.deletes_max);
        }
        handle.keep_figures();
        let handle = handle.for_door();
        let counted = Arc::clone(&options.counted.0);
        Ok(Door(Arc::new(Inner { handle, options, guard, messages: None, calls: None, counted })))
    }
    /// Serves WebSockets at `/v1/ws` too: `serve` is given a stream whose bytes are those of the JSON-lines protocol, and the
    /// name of the peer, as `nkv_server::Door::serve` takes them.
    #[must_use]
    pub fn with_messages<F>(self, serve: impl Fn(Box<dyn Stream>, Box<str>) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let serve: Arc<ServeMessages> = Arc::new(move |stream, peer| Box::pin(serve(stream, peer)));
        self.with(|inner| inner.messages = Some(Messages(serve)))
    }

    /// Has gRPC answered on the same port: requests of HTTP/2 whose content type is one of gRPC are given to what `make` makes for
    /// their connection. Rights are checked before, as for every request.
    #[must_use]
    pub fn with_calls(self, make: impl Fn(&str) -> Box<dyn Calls> + Send + Sync + 'static) -> Self {
        self.with(|inner| inner.calls = Some(MakesCalls(Arc::new(make))))
    }

    fn with(self, change: impl FnOnce(&mut Inner)) -> Self {
        let Inner { handle, options, guard, messages, calls, counted } = &*self.0;
        let mut inner = Inner {
            handle: handle.clone(),
            options: options.clone(),
            guard: guard.clone(),
            messages: messages.clone(),
            calls: calls.clone(),
            counted: Arc::clone(counted),
        };
        change(&mut inner);
        Door(Arc::new(inner))
    }

    /// Serves one connection until either side ends it or the node stops. `peer` is shown to people; where it is an IP
    /// address with a port, the limit for one address counts it. A socket of TCP is best given without delay (`TCP_NODELAY`).
    pub async fn serve<S>(&self, mut stream: S, peer: impl fmt::Display)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let peer = peer.to_string();
        match self.0.options.connections.take(&peer) {
            Ok(place) => connection::serve(Arc::clone(&self.0), stream, Some(place), peer.into()).await,
            Err(full) => {
                self.0.handle.log().warn("refused", format_args!("a connection was refused: {full}"));
                drop(stream.write_all(REFUSAL).await);
                drop(stream.shutdown().await);
            }
        }
    }
}

/// There is no place for another connection.
const REFUSAL: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 1\r\nConnection: close\r\n\r\n";
