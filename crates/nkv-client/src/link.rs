//! One connection: bytes in both directions, the greeting, and nothing about what they mean.

#[cfg(feature = "ws")]
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use nkv_core::Epoch;
use nkv_protocol::{Body, Features, Kind, Message, MessageDecoder, Request, ValueForm, status};
use nkv_types::{Address, Error, ErrorKind, Result};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::error::WireError as _;
#[cfg(feature = "ws")]
use crate::ws::{Target, WebSocket};

/// What this client understands beyond the first version of the protocol.
const FEATURES: Features = Features::RESET
    .with(Features::AHEAD)
    .with(Features::EXACT)
    .with(Features::NAMES)
    .with(Features::ALIVE)
    .with(Features::STALE);
/// How many bytes the kernel may hold that were not read.
const RECEIVE_LEN: u32 = 256 << 10;
/// How many bytes one read asks for at least.
const READ_LEN: usize = 64 << 10;
/// An empty buffer that grew beyond this is given back.
const KEEP_LEN_MAX: usize = 1 << 20;
/// While this number of bytes waits to be sent, no more requests are encoded.
const OUT_LEN_MAX: usize = 64 << 10;
/// Longest answer to the greeting: until then it is not known what answers.
const GREETING_LEN_MAX: usize = 64 << 10;
/// The time that one address of a name has before the next is tried beside it (RFC 8305).
const ADDRESS_PAUSE: Duration = Duration::from_millis(250);

/// How long a server may take to answer that a WebSocket ends.
#[cfg(feature = "ws")]
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {
    /// The WebSocket, if it is one: then what is written to it at a time is one message.
    #[cfg(feature = "ws")]
    fn web_socket(&mut self) -> Option<&mut WebSocket> {
        None
    }
}

impl Io for TcpStream {}

#[cfg(unix)]
impl Io for tokio::net::UnixStream {}

/// What a connection needs to know to be made.
#[derive(Clone, Debug)]
pub(crate) struct LinkOptions {
    pub(crate) addr: Address,
    pub(crate) client_uuid: String,
    pub(crate) name: Option<String>,
    pub(crate) token: Option<String>,
    /// What was seen of the data so far: the next server is not to be behind it.
    pub(crate) seen: Option<(Epoch, u64)>,
    pub(crate) connect_timeout: Duration,
    #[cfg_attr(not(feature = "ws"), expect(dead_code, reason = "a WebSocket alone has a heartbeat of its own"))]
    pub(crate) heartbeat: Duration,
    pub(crate) message_len_max: usize,
}

pub(crate) struct Link {
    io: Box<dyn Io>,
    input: BytesMut,
    decoder: MessageDecoder,
    out: BytesMut,
    /// On a WebSocket, the numbers of the bytes behind each message that waits to be sent.
    #[cfg(feature = "ws")]
    ends: Option<VecDeque<u64>>,
    /// Bytes ever given to be sent, less those taken back, and bytes ever sent.
    encoded: u64,
    written: u64,
    next_id: u64,
    message_len_max: usize,
    /// Whether the peer must take some bytes before more can be sent.
    blocked: bool,
    /// Why nothing can be sent any more. What the server had sent before is read to its end all the same.
    broken: Option<io::Error>,
    /// When the peer last gave a sign of life: sent something, or took something that had to wait for it.
    pub(crate) heard: Instant,
    /// The epoch of the server's data.
    pub(crate) epoch: Epoch,
    /// The longest value that the server takes.
    pub(crate) value_len_max: u64,
    /// The engine behind the server lacks some of what was [seen](LinkOptions::seen).
    pub(crate) begins_anew: bool,
    /// What the server offers beyond the first version of the protocol.
    pub(crate) features: Features,
    /// The longest silence of a server that gives signs of life, while a request waits.
    pub(crate) patience: Option<Duration>,
}

impl Link {
    /// Connects and greets.
    pub(crate) async fn open(options: &LinkOptions) -> Result<Self> {
        let LinkOptions { addr, connect_timeout, .. } = options;
        let cannot = |why: String| Error::new(ErrorKind::CannotConnect, format!("cannot connect to {addr}: {why}"));
        match tokio::time::timeout(*connect_timeout, Link::greeted(options)).await {
            Ok(Ok(link)) => Ok(link),
            Ok(Err(error)) => Err(cannot(error.to_string())),
            Err(_) => Err(cannot(format!("no answer within {connect_timeout:?}"))),
        }
    }

    async fn greeted(options: &LinkOptions) -> Result<Self> {
        let io = connect(options).await;
        let io = io.map_err(|error| Error::new(ErrorKind::CannotConnect, error.to_string()))?;
        let mut link = Link::over(io, GREETING_LEN_MAX.min(options.message_len_max));
        let mut greeting = Request::new(Kind::Connect, "");
        greeting.client_uuid = Some(options.client_uuid.as_str().into());
        greeting.values = Some(ValueForm::Payload);
        greeting.features = FEATURES;
        greeting.name = options.name.as_deref().map(Into::into);
        greeting.token = options.token.as_deref().map(Into::into);
        // A server without an epoch has nothing to compare with.
        let seen = options.seen.filter(|(epoch, _)| *epoch != Epoch::default());
        greeting.seen = seen.map(|(epoch, revision)| format!("{epoch}-{revision}").into());
        link.push(&greeting);
        let body = link.answer().await?;
        if body.status != status::OK {
            return Err(Error::from_answer(&body, Epoch::default()));
        }
        #[cfg(feature = "ws")]
        if let Some(socket) = link.io.web_socket() {
            socket.greeted();
        }
        link.features = body.features;
        link.begins_anew = body.begins_anew;
        link.patience = body.patience_ms.map(Duration::from_millis).filter(|_| body.features.contains(Features::ALIVE));
        link.value_len_max = body.max_value.unwrap_or(u64::MAX);
        if let Some(epoch) = body.epoch {
            let error = || Error::protocol(format!("the server's epoch '{epoch}' is no hexadecimal number"));
            link.epoch = epoch.parse().map_err(|_| error())?;
        }
        link.message_len_max = options.message_len_max;
        Ok(link)
    }

    /// A connection that has not been greeted.
    pub(crate) fn over(io: Box<dyn Io>, message_len_max: usize) -> Self {
        #[cfg(feature = "ws")]
        let mut io = io;
        Link {
            #[cfg(feature = "ws")]
            ends: io.web_socket().map(|_| VecDeque::new()),
            io,
            input: BytesMut::new(),
            decoder: MessageDecoder::new(),
            out: BytesMut::new(),
            encoded: 0,
            written: 0,
            next_id: 0,
            message_len_max,
            blocked: false,
            broken: None,
            heard: Instant::now(),
            epoch: Epoch::default(),
            value_len_max: u64::MAX,
            begins_anew: false,
            features: Features::NONE,
            patience: None,
        }
    }

    /// Waits for the first message, which must be an answer.
    async fn answer(&mut self) -> Result<Box<Body>> {
        loop {
            match self.next_message()? {
                Some(Message::Answer(body)) => return Ok(body),
                Some(_) => return Err(Error::protocol("not an nkv server: a notification came before any answer")),
                None => std::future::poll_fn(|cx| self.poll_io(cx)).await.map_err(Error::lost)?,
            }
        }
    }

    /// Encodes a request to be sent; returns its id and the number of its first byte.
    pub(crate) fn push(&mut self, request: &Request<'_>) -> (u64, u64) {
        let (id, start, len) = (self.next_id, self.encoded, self.out.len());
        self.next_id += 1;
        request.encode(id, &mut self.out);
        self.encoded += (self.out.len() - len) as u64;
        #[cfg(feature = "ws")]
        if let Some(ends) = &mut self.ends {
            ends.push_back(self.encoded);
        }
        (id, start)
    }

    /// Takes back a request, of which no byte was sent, from its first byte to the last.
    pub(crate) fn take_back(&mut self, start: u64, end: u64) {
        #[cfg(feature = "ws")]
        if let Some(ends) = &mut self.ends {
            ends.retain(|known| *known != end);
            ends.iter_mut().filter(|known| **known > end).for_each(|known| *known -= end - start);
        }
        let at = |place: u64| usize::try_from(place.saturating_sub(self.written)).unwrap_or(usize::MAX);
        let (start, end) = (at(start).min(self.out.len()), at(end).min(self.out.len()));
        let behind = self.out.split_off(end);
        self.out.truncate(start);
        self.out.extend_from_slice(&behind);
        self.encoded = self.written + self.out.len() as u64;
    }

    /// Whether any byte from this one on was sent.
    pub(crate) fn has_sent(&self, start: u64) -> bool {
        start < self.written
    }

    /// The number of the next byte to be encoded.
    pub(crate) fn encoded(&self) -> u64 {
        self.encoded
    }

    /// Whether more requests may be pushed.
    pub(crate) fn has_room(&self) -> bool {
        self.out.len() < OUT_LEN_MAX && self.broken.is_none()
    }

    /// Whether nothing can be sent any more.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken.is_some()
    }

    /// Takes the next whole message of what was read.
    pub(crate) fn next_message(&mut self) -> Result<Option<Message>> {
        let (consumed, message) = self.decoder.decode(&self.input).map_err(Error::message)?;
        self.input.advance(consumed);
        if message.is_none() && self.input.len() > self.message_len_max {
            let limit = self.message_len_max;
            return Err(Error::protocol(format!("the server's message is over the limit of {limit} bytes")));
        }
        #[cfg(feature = "ws")]
        self.check_frame(message.is_some())?;
        if self.input.is_empty() && self.input.capacity() > KEEP_LEN_MAX {
            self.input = BytesMut::new();
        }
        Ok(message)
    }

    /// One frame of a WebSocket is one message: bytes of two frames are never taken for one.
    #[cfg(feature = "ws")]
    fn check_frame(&mut self, has_message: bool) -> Result<()> {
        let Some(socket) = self.io.web_socket() else { return Ok(()) };
        let is_over = socket.frame_len_left() == 0;
        match has_message {
            true if !is_over || !self.input.trim_ascii().is_empty() => {
                Err(Error::protocol("a frame of the server holds more than one message"))
            }
            false if is_over && !self.input.is_empty() => {
                Err(Error::protocol("a frame of the server ends within a message"))
            }
            _ => Ok(()),
        }
    }

    /// How many bytes that were read are not decoded yet.
    pub(crate) fn undecoded(&self) -> usize {
        self.input.len()
    }

    /// Sends what can be sent, and reads: ready when something was read, or when the connection is lost. That nothing can be
    /// sent any more does not end it: answers may have come before, and are to be read.
    pub(crate) fn poll_io(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_send(cx);
        self.input.reserve(READ_LEN);
        // Reading keeps no state between two polls, so the future may be made anew each time.
        let read = pin!(self.io.read_buf(&mut self.input)).poll(cx);
        #[cfg(feature = "ws")]
        if let Some(socket) = self.io.web_socket() {
            // Parts of a long message are a sign of life, and so is what the peer took of one.
            self.heard = socket.heard();
        }
        let end = match ready!(read) {
            Ok(0) => io::Error::new(io::ErrorKind::UnexpectedEof, "closed by the server"),
            Ok(_) => {
                self.heard = Instant::now();
                return Poll::Ready(Ok(()));
            }
            Err(error) => error,
        };
        Poll::Ready(Err(self.broken.take().unwrap_or(end)))
    }

    /// Sends what can be sent.
    pub(crate) fn poll_send(&mut self, cx: &mut Context<'_>) {
        if self.broken.is_none()
            && let Poll::Ready(Err(error)) = self.poll_write(cx)
        {
            self.broken = Some(error);
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.out.is_empty() {
            #[cfg(feature = "ws")]
            let out = self.ends.as_ref().and_then(|ends| self.out.get(..message_len(ends, self.written)));
            #[cfg(feature = "ws")]
            let out = out.unwrap_or(&self.out);
            #[cfg(not(feature = "ws"))]
            let out = &self.out;
            let Poll::Ready(sent) = Pin::new(&mut self.io).poll_write(cx, out)? else {
                self.blocked = true;
                return Poll::Pending;
            };
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            // What this side's buffer takes at once says nothing about the other.
            if std::mem::take(&mut self.blocked) {
                self.heard = Instant::now();
            }
            self.out.advance(sent);
            self.written += sent as u64;
            #[cfg(feature = "ws")]
            if let Some(ends) = &mut self.ends {
                ends.pop_front();
            }
        }
        if self.out.capacity() > KEEP_LEN_MAX {
            self.out = BytesMut::new();
        }
        Pin::new(&mut self.io).poll_flush(cx)
    }

    #[cfg(feature = "ws")]
    pub(crate) fn is_web_socket(&self) -> bool {
        self.ends.is_some()
    }

    /// Says that the connection ends, where its protocol has words for that.
    #[cfg(feature = "ws")]
    pub(crate) fn say_goodbye(&mut self) {
        if let Some(socket) = self.io.web_socket() {
            socket.say_goodbye();
        }
    }

    /// Waits for the answer to the goodbye, for a while.
    #[cfg(feature = "ws")]
    pub(crate) async fn closed(mut self) {
        if let Some(socket) = self.io.web_socket() {
            // One that does not answer is left all the same.
            _ = tokio::time::timeout(CLOSE_LIMIT, std::future::poll_fn(|cx| socket.poll_closed(cx))).await;
        }
    }
}

/// How long the first message is that waits to be sent.
#[cfg(feature = "ws")]
fn message_len(ends: &VecDeque<u64>, written: u64) -> usize {
    let len = ends.front().map_or(0, |end| end.saturating_sub(written));
    usize::try_from(len).unwrap_or(usize::MAX)
}

async fn connect(options: &LinkOptions) -> io::Result<Box<dyn Io>> {
    match &options.addr {
        Address::Tcp { host, port } => Ok(Box::new(connect_tcp(host, *port).await?)),
        #[cfg(unix)]
        Address::Unix { path } => Ok(Box::new(tokio::net::UnixStream::connect(path).await?)),
        #[cfg(feature = "ws")]
        Address::Ws { host, port, path } => {
            let stream = connect_tcp(host, *port).await?;
            let target = Target { host, port: *port, path };
            let limits = (options.heartbeat, options.message_len_max);
            Ok(Box::new(WebSocket::open(Box::new(stream), &target, limits).await?))
        }
        _ => Err(io::Error::new(io::ErrorKind::Unsupported, "an address of a kind that this client cannot connect to")),
    }
}

async fn connect_tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let stream = connect_to_any(tokio::net::lookup_host((host, port)).await?.collect()).await?;
    stream.set_nodelay(true)?;
    keep_alive(&stream);
    Ok(stream)
}

/// Has the kernel find out within a minute or so that the host of an idle server has vanished. No limit for what it does not
/// take (`TCP_USER_TIMEOUT`): a server that is busy takes nothing, and says by signs of life that it is there.
fn keep_alive(stream: &TcpStream) {
    let (idle, interval) = (Duration::from_secs(30), Duration::from_secs(10));
    let probes = socket2::TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(3);
    if let Err(error) = socket2::SockRef::from(stream).set_tcp_keepalive(&probes) {
        tracing::debug!(%error, "the system looks after no idle connection");
    }
}

/// Connects to an address. The kernel holds back no more than [`RECEIVE_LEN`] of what this side has not read: an answer that
/// goes ahead of a long snapshot stands behind all that.
async fn connect_to(addr: SocketAddr) -> io::Result<TcpStream> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_recv_buffer_size(RECEIVE_LEN)?;
    socket.connect(addr).await
}

/// Connects to the first of some addresses that answers: they are tried in turn, the two families alternating, the next when
/// one has failed or has had its time.
async fn connect_to_any(addrs: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let is_first_v6 = addrs.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<_>, Vec<_>) = addrs.into_iter().partition(|addr| addr.is_ipv6() == is_first_v6);
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    let mut addrs = std::iter::from_fn(|| {
        std::mem::swap(&mut first, &mut second);
        second.next().or_else(|| first.next())
    });
    // What is not awaited to its end is given up when this is dropped.
    let mut attempts = JoinSet::new();
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    loop {
        let next = addrs.next();
        let is_last = next.is_none();
        if let Some(addr) = next {
            attempts.spawn(connect_to(addr));
        }
        let attempt = async {
            match attempts.join_next().await {
                Some(Ok(connected)) => Some(connected),
                Some(Err(error)) => Some(Err(io::Error::other(error))),
                None => None,
            }
        };
        let attempt = if is_last { Ok(attempt.await) } else { tokio::time::timeout(ADDRESS_PAUSE, attempt).await };
        match attempt {
            Ok(Some(Ok(stream))) => return Ok(stream),
            Ok(Some(Err(error))) => failure = error,
            Ok(None) => return Err(failure),
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn the_next_address_is_tried_when_one_refuses_or_says_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let there = listener.local_addr().unwrap();
        let refuses = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        // A backlog that is full says nothing.
        let silent = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        silent.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
        silent.listen(0).unwrap();
        let silent_addr = silent.local_addr().unwrap().as_socket().unwrap();
        let _fill: Vec<_> = (0..4)
            .map(|_| {
                let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
                socket.set_nonblocking(true).unwrap();
                drop(socket.connect(&silent_addr.into()));
                socket
            })
            .collect();
        for addrs in [vec![refuses, there], vec![silent_addr, there], vec![silent_addr, refuses, there]] {
            let stream = connect_to_any(addrs).await.unwrap();
            assert_eq!(stream.peer_addr().unwrap(), there);
        }
        assert_eq!(connect_to_any(vec![refuses]).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(connect_to_any(vec![]).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
