//! WebSockets: `/v1/ws`, where one frame is one message of the JSON-lines protocol, and the records of `/subscribe`.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes, BytesMut};
use futures_core::Stream as _;
use futures_sink::Sink as _;
use futures_util::task::AtomicWaker;
use http::header::{CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE};
use http::{HeaderName, HeaderValue, Method, Request, StatusCode, Version};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use memchr::{memchr, memchr2, memmem};
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
use crate::woken::Woken;

/// What is read of a socket at a time.
const BUFFER_LEN: usize = 4 << 10;

/// What the library keeps for each connection, to read into. It reads what was read already.
const LIBRARY_BUFFER_LEN: usize = 512;

/// Past this, an unfinished frame needs room to arrive.
const LONG_LEN: u64 = 64 << 10;

/// Frames that wait to be sent, in bytes, before no more are made; and what is made of frames in one turn.
const OUT_MAX: usize = 64 << 10;

/// The first byte of a frame that is a whole message.
const TEXT: u8 = 0x81;
const BINARY: u8 = 0x82;

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
    /// Frames that are made here, and go out before what the library writes. It has to have written all that it began before one is
    /// added.
    out: BytesMut,
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
        if this.buffer.is_empty() && this.left > 0 {
            // The rest of a long frame.
            ready!(this.poll_fill(cx))?;
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
        if this.buffer.is_empty() {
            // One from which nothing comes holds nothing.
            this.buffer = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl Seen {
    fn write_some(&mut self, cx: &mut Context<'_>, bytes: Option<&[u8]>) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes.unwrap_or(&self.out));
        // What the system's buffer takes at once says nothing of the peer.
        if std::mem::replace(&mut self.is_blocked, written.is_pending()) && written.is_ready() {
            self.moved.last.store(self.moved.now(), Relaxed);
        }
        written
    }

    /// Writes the frames that wait.
    fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.out.is_empty() {
            let written = ready!(self.write_some(cx, None))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.out.advance(written);
        }
        // A connection that sends nothing holds nothing.
        self.out = BytesMut::new();
        Poll::Ready(Ok(()))
    }

    /// Adds a frame.
    fn frame(&mut self, kind: u8, bytes: &[u8]) {
        let len = bytes.len();
        let mut head = [kind, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let [_, short, long @ ..] = &mut head;
        let head_len = match (u8::try_from(len), u16::try_from(len)) {
            (Ok(len @ ..126), _) => {
                *short = len;
                2
            }
            (_, Ok(len)) => {
                *short = 126;
                long.iter_mut().zip(len.to_be_bytes()).for_each(|(place, byte)| *place = byte);
                4
            }
            _ => {
                *short = 127;
                long.iter_mut().zip((len as u64).to_be_bytes()).for_each(|(place, byte)| *place = byte);
                10
            }
        };
        self.out.reserve(len.saturating_add(head_len));
        self.out.extend_from_slice(head.get(..head_len).unwrap_or_default());
        self.out.extend_from_slice(bytes);
    }
}

impl AsyncWrite for Seen {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_out(cx))?;
        this.write_some(cx, Some(bytes))
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
    /// The library may have something to write.
    is_unflushed: bool,
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
            out: BytesMut::new(),
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
            .read_buffer_size(LIBRARY_BUFFER_LEN)
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
            is_unflushed: true,
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
            self.is_unflushed = true;
            match next {
                Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => {
                    self.moved.unfinished.store(0, Relaxed);
                    self.coming_since = None;
                    return Poll::Ready(Ok(Some(message)));
                }
                Some(Ok(Message::Close(_))) | None => {
                    self.has_closed = true;
                    // The library has the answer ready.
                    _ = self.poll_flush(cx);
                    return Poll::Ready(Ok(None));
                }
                // The library has the pong ready.
                Some(Ok(_)) => _ = self.poll_flush(cx),
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
            if is_due && self.poll_flush(cx)?.is_ready() {
                self.pinged = Instant::now();
                Pin::new(&mut self.socket).start_send(Message::Ping(Bytes::new())).map_err(io::Error::other)?;
                self.is_unflushed = true;
                _ = self.poll_flush(cx)?;
            }
        }
        Ok(())
    }

    /// Where the frames of messages are made, once there is room for more.
    ///
    /// They are not given to the library, whose every message is an allocation, a check, and two copies: a change goes to hundreds.
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<&mut Seen>> {
        // What the library has begun to write has its end before another frame.
        if self.is_unflushed || self.socket.get_ref().out.len() >= OUT_MAX {
            ready!(self.poll_flush(cx))?;
        }
        if self.has_closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        Poll::Ready(Ok(self.socket.get_mut()))
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_unflushed {
            ready!(Pin::new(&mut self.socket).poll_flush(cx)).map_err(io::Error::other)?;
            self.is_unflushed = false;
        }
        let seen = self.socket.get_mut();
        ready!(seen.poll_out(cx))?;
        Pin::new(seen).poll_flush(cx)
    }

    /// Says that the connection ends, as far as that can be said without waiting.
    fn close(&mut self, code: CloseCode, reason: &'static str) {
        if !std::mem::replace(&mut self.has_closed, true) {
            let mut cx = Context::from_waker(Waker::noop());
            let frame = CloseFrame { code, reason: Utf8Bytes::from_static(reason) };
            if Pin::new(&mut self.socket).start_send(Message::Close(Some(frame))).is_ok() {
                self.is_unflushed = true;
                _ = self.poll_flush(&mut cx);
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
    /// What of the server's messages is not in a frame yet.
    framer: Framer,
    /// There may be something to read, or a limit of time: a task that was woken to write does not ask the library.
    readable: Woken,
}

impl Frames {
    pub(crate) async fn new(stream: Upgraded, handle: &Handle, request_limit: Duration) -> Self {
        let limits = Limits { value_len_max: handle.limits().value_len_max, ..Limits::default() };
        let socket = Socket::new(stream, handle, request_limit).await;
        let (rest, lacks_newline, framer, readable) = Default::default();
        Frames { socket, limits, rest, lacks_newline, framer, readable }
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
}

/// Whether a request may have a `len`, also one whose name is escaped.
fn may_announce(line: &[u8]) -> bool {
    memmem::find(line, b"\"len\"").is_some() || memmem::find(line, b"\\u").is_some()
}

/// Makes frames of the server's messages, which come in any pieces.
#[derive(Debug, Default)]
pub(crate) struct Framer {
    /// What is not a whole message yet.
    gathered: Vec<u8>,
    splitter: Splitter,
}

impl Framer {
    /// Calls `give` with kind and bytes of each frame that is whole with these bytes. A line without a payload is a text frame, without
    /// its end; a line and its payload are a binary frame as they are.
    pub(crate) fn frame(&mut self, bytes: &[u8], mut give: impl FnMut(u8, &[u8])) {
        // What one long message took is not kept.
        let mut gathered = std::mem::take(&mut self.gathered);
        let mut rest = bytes;
        if !gathered.is_empty() {
            gathered.extend_from_slice(bytes);
            rest = &gathered;
        }
        while let Some((line_len, len)) = self.splitter.next(rest) {
            let (message, behind) = rest.split_at(len);
            let text = message.strip_suffix(b"\n").unwrap_or(message);
            // A line of the server is UTF-8.
            let is_text = line_len == len && std::str::from_utf8(text).is_ok();
            if is_text {
                give(TEXT, text)
            } else {
                give(BINARY, message)
            }
            (self.splitter, rest) = (Splitter::default(), behind);
        }
        self.gathered = match rest.len() {
            0 => Vec::new(),
            len if len == gathered.len() => gathered,
            _ => rest.to_vec(),
        };
    }
}

/// Finds where the messages of the server end.
#[derive(Debug, Default)]
struct Splitter {
    scanned: usize,
    /// Of the line, and of the whole message.
    known: Option<(usize, usize)>,
}

impl Splitter {
    /// How long the first message's line is, and the message, if it is whole.
    fn next(&mut self, bytes: &[u8]) -> Option<(usize, usize)> {
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
    // Most have none, and in a text each quote is behind a backslash.
    memmem::find(line, NAME)?;
    let (mut depth, mut rest) = (0_u32, line);
    while let Some((first, behind)) = rest.split_first() {
        rest = match first {
            b'"' if depth == 2 && rest.starts_with(NAME) => {
                let digits = rest.get(NAME.len()..)?;
                let count = digits.iter().take_while(|byte| byte.is_ascii_digit()).count();
                return std::str::from_utf8(digits.get(..count)?).ok()?.parse().ok();
            }
            b'"' => behind_text(behind)?,
            b'{' | b'[' => {
                depth = depth.saturating_add(1);
                behind
            }
            b'}' | b']' => {
                depth = depth.saturating_sub(1);
                behind
            }
            _ => behind,
        };
    }
    None
}

/// What comes behind a text whose first quote is gone.
fn behind_text(mut text: &[u8]) -> Option<&[u8]> {
    loop {
        let at = memchr2(b'"', b'\\', text)?;
        let is_end = text.get(at) == Some(&b'"');
        text = text.get(at.saturating_add(if is_end { 1 } else { 2 })..)?;
        if is_end {
            return Some(text);
        }
    }
}

impl Frames {
    fn poll_some(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let given = self.rest.split_to(self.rest.len().min(buf.remaining()));
            buf.put_slice(&given);
            if self.rest.is_empty() {
                self.rest = Bytes::new();
                if buf.remaining() > 0 && std::mem::take(&mut self.lacks_newline) {
                    buf.put_slice(b"\n");
                    return Poll::Ready(Ok(()));
                }
            }
            if !given.is_empty() || buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            match ready!(self.socket.poll_message(cx))? {
                Some(message) => self.take(message)?,
                None => return Poll::Ready(Ok(())),
            }
        }
    }
}

impl AsyncRead for Frames {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.readable.take(cx.waker()) {
            return Poll::Pending;
        }
        let readable = std::mem::take(&mut this.readable);
        let read = this.poll_some(&mut Context::from_waker(readable.waker()), buf);
        if read.is_ready() {
            readable.note();
        }
        this.readable = readable;
        read
    }
}

impl AsyncWrite for Frames {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let seen = ready!(this.socket.poll_ready(cx))?;
        let bytes = bytes.get(..bytes.len().min(OUT_MAX)).unwrap_or_default();
        this.framer.frame(bytes, |kind, bytes| seen.frame(kind, bytes));
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().socket.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
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
            if let Some(text) = &record {
                match socket.poll_ready(cx) {
                    Poll::Ready(Ok(seen)) => {
                        seen.frame(TEXT, text.as_bytes());
                        record = None;
                    }
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

    /// The frames that are made of bytes that come in these pieces.
    fn frames(pieces: &[&[u8]]) -> Vec<(u8, Vec<u8>)> {
        let (mut framer, mut frames) = (Framer::default(), Vec::new());
        pieces.iter().for_each(|piece| framer.frame(piece, |kind, bytes| frames.push((kind, bytes.to_vec()))));
        frames
    }

    #[test]
    fn a_message_of_the_server_is_one_frame_however_it_comes() {
        let quoted = br#"{"Get":{"value":"\"len\":3","x\"len":4,"of":{"len":5}}}"#;
        let payload = b"{\"Get\":{\"key\":\"a\\\\\",\"len\":3}}\na\nb\n";
        let bytes = [&b"{\"Base\":{}}\n"[..], payload, quoted, b"\n"].concat();
        let whole = [(TEXT, b"{\"Base\":{}}".to_vec()), (BINARY, payload.to_vec()), (TEXT, quoted.to_vec())];
        assert_eq!(frames(&[&bytes]), whole);
        for cut in 1..bytes.len() {
            assert_eq!(frames(&[&bytes[..cut], &bytes[cut..]]), whole, "{cut}");
        }
        let single: Vec<_> = bytes.chunks(1).collect();
        assert_eq!(frames(&single), whole);
        assert_eq!(frames(&[b"{\"Base\":{}}"]), []);
        assert_eq!(frames(&[b"\xff\n"]), [(BINARY, b"\xff\n".to_vec())]);
    }
}
