//! WebSockets: `/v1/ws`, where one frame is one message of the JSON-lines protocol, and the records of `/subscribe`.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_core::Stream as _;
use futures_sink::Sink as _;
use futures_util::task::AtomicWaker;
use http::header::{CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE};
use http::{HeaderName, HeaderValue, Method, Request, StatusCode, Version};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use memchr::{memchr, memmem};
use nkv_core::mailbox::Backlog;
use nkv_node::{Handle, Held, Holder, Peer, Room, SharedWaker, Stopping, Tail};
use nkv_protocol::{Decoder, Limits};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message, Utf8Bytes};

use crate::body::{Answer, full};
use crate::connection::Upgrade;
use crate::problem::Problem;
use crate::route::{Ctx, query};
use crate::seed;

/// What is read of a socket at a time, and gathered of small frames before it is written.
const BUFFER_LEN: usize = 4 << 10;

/// Past this, an unfinished frame needs room to arrive.
const LONG_LEN: u64 = 64 << 10;

/// What waits to be made a frame before no more is taken.
const GATHER_MAX: usize = 64 << 10;

/// How often the peer is pinged, and after what silence it is given up.
const PING_EVERY: Duration = Duration::from_secs(15);
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// How often a connection looks at its limits of time.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// `GET /v1/ws`.
pub(crate) fn upgrade(ctx: Ctx<'_>, mut request: Request<Incoming>) -> Result<Answer, Problem> {
    query(&request, &[])?;
    if ctx.door.messages.is_none() {
        return Err(Problem::new("no-websocket", "this door was made without the messages of the JSON-lines protocol"));
    }
    let Some(answer) = accept(&request) else {
        let problem = Problem::new("upgrade", "here is a WebSocket, version 13, by HTTP/1.1");
        return Err(problem.header(UPGRADE, HeaderValue::from_static("websocket")));
    };
    ctx.conn.upgrade_to(Upgrade::Messages(hyper::upgrade::on(&mut request)));
    Ok(answer)
}

/// The answer to a handshake; `None` where it is none.
pub(crate) fn accept<B>(request: &Request<B>) -> Option<Answer> {
    let has = |name: HeaderName, word: &str| {
        let lines = request.headers().get_all(name).iter().filter_map(|line| line.to_str().ok());
        lines.flat_map(|line| line.split(',')).any(|part| part.trim().eq_ignore_ascii_case(word))
    };
    let key = request.headers().get(SEC_WEBSOCKET_KEY)?;
    let is_handshake = *request.method() == Method::GET
        && request.version() == Version::HTTP_11
        && has(CONNECTION, "upgrade")
        && has(UPGRADE, "websocket")
        && has(SEC_WEBSOCKET_VERSION, "13");
    let accept = HeaderValue::from_str(&derive_accept_key(key.as_bytes())).ok().filter(|_| is_handshake)?;
    let mut answer = Answer::new(full(""));
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
    Some(answer)
}

/// What moves on a connection, seen below the WebSocket: bytes are life, also those of a frame that is not whole.
#[derive(Debug)]
struct Moved {
    began: Instant,
    /// When a byte moved last, in milliseconds after the beginning.
    last: AtomicU64,
    /// Bytes that came since the last whole message.
    unfinished: AtomicUsize,
    /// The task that reads, to be woken when it is to end.
    look_anew: AtomicWaker,
}

impl Moved {
    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn silence(&self) -> Duration {
        Duration::from_millis(self.now().saturating_sub(self.last.load(Relaxed)))
    }
}

/// What a WebSocket holds beside its connection's account, as the node looks at it.
#[derive(Debug)]
struct Aside(Arc<Moved>);

impl Holder for Aside {
    fn held(&self) -> Held {
        Held::default()
    }

    fn backlog(&self) -> Backlog {
        Backlog::default()
    }

    fn busy_for(&self) -> Duration {
        Duration::ZERO
    }

    fn give_up(&self) {}

    fn wake(&self) {
        self.0.look_anew.wake();
    }
}

/// For room.
type Waiting = Pin<Box<dyn Future<Output = Result<Room, Stopping>> + Send>>;

/// A stream whose bytes are seen, and where a long message has room before anything is held for it: the library makes room for a
/// frame as soon as it is announced.
struct Seen {
    stream: TokioIo<Upgraded>,
    moved: Arc<Moved>,
    handle: Handle,
    is_blocked: bool,
    /// What was read and not given on.
    buffer: BytesMut,
    /// What of the present frame is still to be given on.
    left: u64,
    /// What the present message has announced so far.
    message_len: u64,
    len_max: u64,
    /// What of a long message is held, for the node to count: its peer is another one's.
    held: Peer,
    room: Option<Room>,
    waiting: Option<Waiting>,
}

impl Seen {
    /// Reads some more into the buffer; nothing comes at the end.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut bytes = [0; BUFFER_LEN];
        let mut part = ReadBuf::new(&mut bytes);
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut part))?;
        self.buffer.extend_from_slice(part.filled());
        let len = part.filled().len();
        self.came(len);
        Poll::Ready(Ok(len))
    }

    fn came(&self, len: usize) {
        if len > 0 {
            self.moved.last.store(self.moved.now(), Relaxed);
            let unfinished = self.moved.unfinished.fetch_add(len, Relaxed).saturating_add(len);
            if self.room.is_some() {
                self.held.hold(unfinished, false);
            }
        }
    }

    /// Waits until the next frame may be given on: its head is there, and room for it. False at the end of the stream.
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        if self.moved.unfinished.load(Relaxed) == 0 {
            self.message_len = 0;
            if self.room.take().is_some() {
                self.held.hold(0, true);
            }
        }
        if self.held.is_evicted() {
            // Others wait for room, and this one takes its time.
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let (head_len, len, is_control) = loop {
            match head(&self.buffer) {
                Some(head) => break head,
                None if ready!(self.poll_fill(cx))? == 0 => return Poll::Ready(Ok(false)),
                None => {}
            }
        };
        let message_len = if is_control { 0 } else { self.message_len.saturating_add(len) };
        // One that is too long is refused by the library as soon as it sees its head.
        let needs_room = message_len > LONG_LEN && message_len <= self.len_max;
        if needs_room && self.room.is_none() {
            let arrival = || self.handle.arrival(usize::try_from(message_len).unwrap_or(usize::MAX));
            let waiting = self.waiting.get_or_insert_with(|| Box::pin(arrival()));
            let room = ready!(waiting.as_mut().poll(cx));
            self.waiting = None;
            self.room = Some(room.map_err(io::Error::other)?);
            // Also one that sends nothing more holds it.
            self.held.hold(self.moved.unfinished.load(Relaxed).max(1), false);
        }
        self.message_len = message_len.max(self.message_len);
        self.left = len.saturating_add(head_len);
        Poll::Ready(Ok(true))
    }
}

/// How long the head of a frame is, what length it announces, and whether the frame is one of control; `None` until the head has
/// come.
fn head(bytes: &[u8]) -> Option<(u64, u64, bool)> {
    let (first, second) = (*bytes.first()?, *bytes.get(1)?);
    let mask_len = if second & 0x80 == 0 { 0 } else { 4 };
    let (head_len, len) = match second & 0x7f {
        126 => (4, u64::from(u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?))),
        127 => (10, u64::from_be_bytes(bytes.get(2..10)?.try_into().ok()?)),
        len => (2, u64::from(len)),
    };
    Some((u64::saturating_add(head_len, mask_len), len, first & 0x08 != 0))
}

impl AsyncRead for Seen {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.moved.look_anew.register(cx.waker());
        if this.held.is_evicted() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        if this.left == 0 && !ready!(this.poll_frame(cx))? {
            return Poll::Ready(Ok(()));
        }
        // Of frames that are here whole, all but those that need room are given on together.
        loop {
            let left = usize::try_from(this.left).unwrap_or(usize::MAX);
            let some = this.buffer.split_to(this.buffer.len().min(left).min(buf.remaining()));
            buf.put_slice(&some);
            this.left = this.left.saturating_sub(some.len() as u64);
            let may_go_on = this.left == 0 && buf.remaining() > 0 && head(&this.buffer).is_some();
            if !may_go_on || this.poll_frame(cx)?.is_pending() {
                break;
            }
        }
        if buf.filled().is_empty() {
            // The rest of a long frame.
            let left = usize::try_from(this.left).unwrap_or(usize::MAX);
            let space = buf.initialize_unfilled_to(left.min(buf.remaining()));
            let mut part = ReadBuf::new(space);
            ready!(Pin::new(&mut this.stream).poll_read(cx, &mut part))?;
            let len = part.filled().len();
            buf.advance(len);
            this.left = this.left.saturating_sub(len as u64);
            this.came(len);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Seen {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.stream).poll_write(cx, bytes);
        // What the system's buffer takes at once says nothing of the peer.
        if std::mem::replace(&mut this.is_blocked, written.is_pending()) && written.is_ready() {
            this.moved.last.store(this.moved.now(), Relaxed);
        }
        written
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

/// A WebSocket with its limits of time.
struct Socket {
    socket: WebSocketStream<Seen>,
    handle: Handle,
    moved: Arc<Moved>,
    look: Pin<Box<Sleep>>,
    pinged: Instant,
    /// Since when a frame is coming.
    coming_since: Option<Instant>,
    request_limit: Duration,
    has_closed: bool,
}

impl Socket {
    async fn new(stream: Upgraded, handle: &Handle, request_limit: Duration) -> Self {
        let limits = handle.limits();
        let len_max = limits.request_len_max.saturating_add(limits.value_len_max);
        let (last, unfinished, look_anew) = Default::default();
        let moved = Arc::new(Moved { began: Instant::now(), last, unfinished, look_anew });
        let seen = Seen {
            stream: TokioIo::new(stream),
            moved: Arc::clone(&moved),
            handle: handle.clone(),
            is_blocked: false,
            buffer: BytesMut::new(),
            left: 0,
            message_len: 0,
            len_max: len_max as u64,
            held: handle.aside(Box::new(Aside(Arc::clone(&moved)))),
            room: None,
            waiting: None,
        };
        let config = WebSocketConfig::default()
            .read_buffer_size(BUFFER_LEN)
            .write_buffer_size(BUFFER_LEN)
            .max_message_size(Some(len_max))
            .max_frame_size(Some(len_max));
        let socket = WebSocketStream::from_raw_socket(seen, Role::Server, Some(config)).await;
        Socket {
            socket,
            handle: handle.clone(),
            moved,
            look: Box::pin(sleep(LOOK_EVERY)),
            pinged: Instant::now(),
            coming_since: None,
            // A long message may take longer than a short one, and no message for ever.
            request_limit: request_limit.saturating_mul(2),
            has_closed: false,
        }
    }

    /// The next message; `None` once the peer has closed.
    fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Message>>> {
        loop {
            let next = Pin::new(&mut self.socket).poll_next(cx);
            let Poll::Ready(next) = next else {
                self.poll_look(cx)?;
                return Poll::Pending;
            };
            match next {
                Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => {
                    self.moved.unfinished.store(0, Relaxed);
                    self.coming_since = None;
                    return Poll::Ready(Ok(Some(message)));
                }
                Some(Ok(Message::Close(_))) | None => {
                    self.has_closed = true;
                    // The library has the answer ready.
                    _ = Pin::new(&mut self.socket).poll_flush(cx);
                    return Poll::Ready(Ok(None));
                }
                // The library has the pong ready.
                Some(Ok(_)) => _ = Pin::new(&mut self.socket).poll_flush(cx),
                Some(Err(error)) => {
                    let code = match error {
                        Error::Capacity(_) => CloseCode::Size,
                        Error::Utf8(_) => CloseCode::Invalid,
                        Error::Protocol(_) => CloseCode::Protocol,
                        _ => return Poll::Ready(Err(io::Error::other(error))),
                    };
                    self.close(code, "");
                    return Poll::Ready(Err(io::Error::other(error)));
                }
            }
        }
    }

    /// Pings when that is due, and gives up a peer that is silent, or does not end a message.
    fn poll_look(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        while self.look.as_mut().poll(cx).is_ready() {
            if let Some(at) = tokio::time::Instant::now().checked_add(LOOK_EVERY) {
                self.look.as_mut().reset(at);
            }
            if self.moved.silence() >= SILENCE_MAX {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let is_coming = self.moved.unfinished.load(Relaxed) > 0;
            let since = is_coming.then(|| self.coming_since.unwrap_or_else(Instant::now));
            self.coming_since = since;
            if since.is_some_and(|since| since.elapsed() > self.request_limit) {
                self.close(CloseCode::Policy, "the message did not arrive in time");
                return Err(io::ErrorKind::TimedOut.into());
            }
            let is_due = self.pinged.elapsed() >= PING_EVERY;
            // Where something waits to be sent, a ping would only wait behind it.
            if is_due && Pin::new(&mut self.socket).poll_ready(cx).map_err(io::Error::other)?.is_ready() {
                self.pinged = Instant::now();
                Pin::new(&mut self.socket).start_send(Message::Ping(Bytes::new())).map_err(io::Error::other)?;
                _ = Pin::new(&mut self.socket).poll_flush(cx).map_err(io::Error::other)?;
            }
        }
        Ok(())
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, make: impl FnOnce() -> Message) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.socket).poll_ready(cx)).map_err(io::Error::other)?;
        Poll::Ready(Pin::new(&mut self.socket).start_send(make()).map_err(io::Error::other))
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx).map_err(io::Error::other)
    }

    /// Says that the connection ends, as far as that can be said without waiting.
    fn close(&mut self, code: CloseCode, reason: &'static str) {
        if !std::mem::replace(&mut self.has_closed, true) {
            let mut cx = Context::from_waker(Waker::noop());
            let frame = CloseFrame { code, reason: Utf8Bytes::from_static(reason) };
            if Pin::new(&mut self.socket).start_send(Message::Close(Some(frame))).is_ok() {
                _ = Pin::new(&mut self.socket).poll_flush(&mut cx);
            }
        }
    }

    /// The server has no more to say.
    fn end(&mut self) {
        let mut cx = Context::from_waker(Waker::noop());
        let is_stopping = pin!(self.handle.stopping()).poll(&mut cx).is_ready();
        self.close(if is_stopping { CloseCode::Away } else { CloseCode::Normal }, "");
    }
}

/// A WebSocket as a stream of bytes: one frame is one message, in both directions.
pub(crate) struct Frames {
    socket: Socket,
    limits: Limits,
    /// What of a frame has not been read.
    rest: Bytes,
    lacks_newline: bool,
    /// What is not a whole message yet.
    gathered: BytesMut,
    splitter: Splitter,
}

impl Frames {
    pub(crate) async fn new(stream: Upgraded, handle: &Handle, request_limit: Duration) -> Self {
        let limits = Limits { value_len_max: handle.limits().value_len_max, ..Limits::default() };
        let socket = Socket::new(stream, handle, request_limit).await;
        let (rest, lacks_newline, gathered, splitter) = Default::default();
        Frames { socket, limits, rest, lacks_newline, gathered, splitter }
    }

    fn take(&mut self, message: Message) -> io::Result<()> {
        match message {
            Message::Text(text) => {
                let mut bytes = Bytes::from(text);
                let inner = bytes.len().saturating_sub(1);
                if memchr(b'\n', bytes.get(..inner).unwrap_or_default()).is_some() {
                    // White space between the parts of one JSON value.
                    let line = bytes.iter().map(|byte| if *byte == b'\n' { b' ' } else { *byte });
                    bytes = line.collect::<Vec<_>>().into();
                }
                if may_announce(&bytes) && self.announces(&bytes) {
                    return Err(self.refuse("a message with a payload is a binary frame"));
                }
                self.lacks_newline = !bytes.ends_with(b"\n");
                self.rest = bytes;
            }
            Message::Binary(bytes) => {
                let mut decoder = Decoder::new(self.limits);
                let whole: Bytes;
                let bytes = if bytes.ends_with(b"\n") {
                    bytes
                } else {
                    whole = [&bytes[..], b"\n"].concat().into();
                    whole
                };
                let decoded = decoder.decode(&bytes);
                let is_one = decoded.item.is_some() && decoded.consumed == bytes.len() && !decoder.is_within_message();
                if !is_one {
                    return Err(self.refuse("a frame is one message, with its payload if it announces one"));
                }
                self.rest = bytes;
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether a line is followed by a payload.
    fn announces(&self, line: &[u8]) -> bool {
        let mut decoder = Decoder::new(self.limits);
        let line = [line.strip_suffix(b"\n").unwrap_or(line), b"\n"].concat();
        _ = decoder.decode(&line);
        decoder.is_within_message()
    }

    fn refuse(&mut self, why: &'static str) -> io::Error {
        self.socket.close(CloseCode::Policy, why);
        io::Error::new(io::ErrorKind::InvalidData, why)
    }

    /// Makes frames of the messages that are whole.
    fn poll_frames(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some((line_len, len)) = self.splitter.next(&self.gathered) {
            let gathered = &mut self.gathered;
            ready!(self.socket.poll_send(cx, || {
                let whole = gathered.split_to(len);
                if line_len == len {
                    // A line of the server is UTF-8.
                    let line = whole.freeze();
                    return match Utf8Bytes::try_from(line.slice(..len.saturating_sub(1))) {
                        Ok(line) => Message::Text(line),
                        Err(_) => Message::binary(line),
                    };
                }
                Message::binary(whole.freeze())
            }))?;
            self.splitter = Splitter::default();
        }
        if self.gathered.is_empty() {
            // What one long message took is not kept.
            self.gathered = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

/// Whether a request may have a `len`, also one whose name is escaped.
fn may_announce(line: &[u8]) -> bool {
    memmem::find(line, b"\"len\"").is_some() || memmem::find(line, b"\\u").is_some()
}

/// Finds where the messages of the server end.
#[derive(Debug, Default)]
pub(crate) struct Splitter {
    scanned: usize,
    /// Of the line, and of the whole message.
    known: Option<(usize, usize)>,
}

impl Splitter {
    /// How long the first message's line is, and the message, if it is whole.
    pub(crate) fn next(&mut self, bytes: &[u8]) -> Option<(usize, usize)> {
        let (line_len, len) = match self.known {
            Some(known) => known,
            None => {
                let rest = bytes.get(self.scanned..).unwrap_or_default();
                let Some(at) = memchr(b'\n', rest) else {
                    self.scanned = bytes.len();
                    return None;
                };
                let line_len = self.scanned.saturating_add(at).saturating_add(1);
                let payload = payload_len(bytes.get(..line_len).unwrap_or_default());
                let len = payload.map_or(line_len, |len| line_len.saturating_add(len).saturating_add(1));
                *self.known.insert((line_len, len))
            }
        };
        (bytes.len() >= len).then_some((line_len, len))
    }
}

/// How long the payload is that a line of the server announces: `len` in its inner object.
fn payload_len(line: &[u8]) -> Option<usize> {
    const NAME: &[u8] = b"\"len\":";
    memmem::find(line, NAME)?;
    let message: serde_json::Value = serde_json::from_slice(line).ok()?;
    let inner = message.as_object()?.values().next()?;
    inner.get("len")?.as_u64().and_then(|len| usize::try_from(len).ok())
}

impl AsyncRead for Frames {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            let given = this.rest.split_to(this.rest.len().min(buf.remaining()));
            buf.put_slice(&given);
            if this.rest.is_empty() {
                this.rest = Bytes::new();
                if buf.remaining() > 0 && std::mem::take(&mut this.lacks_newline) {
                    buf.put_slice(b"\n");
                    return Poll::Ready(Ok(()));
                }
            }
            if !given.is_empty() || buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            match ready!(this.socket.poll_message(cx))? {
                Some(message) => this.take(message)?,
                None => return Poll::Ready(Ok(())),
            }
        }
    }
}

impl AsyncWrite for Frames {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let is_full = this.gathered.len() >= GATHER_MAX && this.splitter.next(&this.gathered).is_some();
        if is_full {
            ready!(this.poll_frames(cx))?;
        }
        this.gathered.extend_from_slice(bytes);
        // What cannot be sent now is at the next call.
        if let Poll::Ready(Err(error)) = this.poll_frames(cx) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_frames(cx))?;
        this.socket.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        _ = ready!(this.poll_frames(cx));
        this.socket.end();
        this.socket.poll_flush(cx)
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        self.socket.end();
    }
}

/// Sends a subscriber of `/subscribe` each change, until either side ends it.
pub(crate) async fn send_records(stream: Upgraded, handle: &Handle, request_limit: Duration, mut changes: Tail) {
    let mut socket = Socket::new(stream, handle, request_limit).await;
    let mut record: Option<String> = None;
    let mut waker = SharedWaker::default();
    let sent = poll_fn(|cx| {
        let waker = handle.waker(&mut waker, cx.waker());
        loop {
            // What it sends says nothing but that it is there.
            match socket.poll_message(cx) {
                Poll::Ready(Ok(Some(_))) => continue,
                Poll::Ready(Ok(None) | Err(_)) => return Poll::Ready(()),
                Poll::Pending => {}
            }
            if record.is_none() {
                match changes.poll_next(&mut Context::from_waker(waker)) {
                    Poll::Ready(Some((event, _))) => record = seed::record(&event),
                    Poll::Ready(None) => return Poll::Ready(()),
                    Poll::Pending => {
                        return match socket.poll_flush(cx) {
                            Poll::Ready(Err(_)) => Poll::Ready(()),
                            _ => Poll::Pending,
                        };
                    }
                }
            }
            if record.is_some() {
                match socket.poll_send(cx, || Message::text(record.take().unwrap_or_default())) {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(_)) => return Poll::Ready(()),
                    Poll::Pending => return Poll::Pending,
                }
            }
        }
    });
    tokio::select! {
        () = sent => {}
        () = handle.stopping() => {}
    }
    socket.end();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_of_the_server_ends_with_its_line_or_its_payload() {
        let split = |bytes: &[u8]| Splitter::default().next(bytes);
        assert_eq!(split(b"{\"Base\":{}}\nnext"), Some((12, 12)));
        assert_eq!(split(b"{\"Base\":{}}"), None);
        assert_eq!(split(b"{\"Get\":{\"len\":3}}\na\nb\nnext"), Some((18, 22)));
        assert_eq!(split(b"{\"Get\":{\"len\":3}}\na\nb"), None);
        // In a value it is no field.
        let quoted = b"{\"Get\":{\"value\":\"\\\"len\\\":3\"}}\n";
        assert_eq!(split(quoted), Some((quoted.len(), quoted.len())));
        let mut splitter = Splitter::default();
        assert_eq!(splitter.next(b"{\"Hel"), None);
        assert_eq!(splitter.next(b"{\"Hello\":1}\n"), Some((12, 12)));
    }
}
