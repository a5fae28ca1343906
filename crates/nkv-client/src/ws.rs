//! A connection over a WebSocket. To the rest of the client it is a stream of bytes like any other, but for two things: what is
//! written to it at a time is one message, and a frame of the server holds one message.
//!
//! The library buffers little and reads a frame whole before it gives it; so what counts as a sign of life is measured below it,
//! by the bytes that move.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_core::Stream as _;
use futures_sink::Sink as _;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};
use tokio_tungstenite::tungstenite::error::ProtocolError;
use tokio_tungstenite::tungstenite::handshake::client::{Request, Response, generate_key};
use tokio_tungstenite::tungstenite::http::{StatusCode, Uri, Version};
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message, Utf8Bytes};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

use crate::link::Io;

/// How many bytes one read of the socket asks for, and how many of small messages wait for one write.
const BUFFER_LEN: usize = 8 << 10;
/// How many bytes are read until the server has answered the greeting: the head of its HTTP answer, then the message.
const GREETING_LEN_MAX: usize = 128 << 10;
/// Longest message, whatever limit the program sets: room for a frame is made when its length is known.
const MESSAGE_LEN_MAX: usize = 512 << 20;
/// After this number of pings whose pongs cannot be sent nothing more is read.
const UNANSWERED_MAX: u32 = 16;
/// How many characters of the reason that a server closes with are shown.
const REASON_CHARS_MAX: usize = 128;

/// Where the WebSocket is, as an HTTP request names it.
pub(crate) struct Target<'a> {
    pub(crate) host: &'a str,
    pub(crate) port: u16,
    pub(crate) path: &'a str,
}

/// A WebSocket, as a stream of messages.
pub(crate) struct WebSocket {
    socket: WebSocketStream<Measured>,
    /// What of a frame has not been read.
    rest: Bytes,
    /// Whether the frame is a line that came without the newline that ends it.
    lacks_newline: bool,
    /// Pings of the server since what is written last left.
    unanswered: u32,
    heartbeat: Duration,
    next_ping: Instant,
    timer: Pin<Box<Sleep>>,
    /// What a server that is left is given as the reason; `None` once it was given.
    goodbye: Option<CloseCode>,
}

impl WebSocket {
    /// Asks for a WebSocket over a connection. `len_max` is the longest message that is taken from the server.
    pub(crate) async fn open(
        io: Box<dyn Io>,
        target: &Target<'_>,
        (heartbeat, len_max): (Duration, usize),
    ) -> io::Result<Self> {
        let len_max = len_max.min(MESSAGE_LEN_MAX);
        let config = WebSocketConfig::default()
            .read_buffer_size(BUFFER_LEN)
            .write_buffer_size(BUFFER_LEN)
            .max_message_size(Some(len_max))
            .max_frame_size(Some(len_max));
        let handshake = client_async_with_config(target.request()?, Measured::new(io), Some(config));
        let (socket, _) = handshake.await.map_err(|error| match error {
            Error::Http(response) => io::Error::new(io::ErrorKind::ConnectionRefused, refusal(&response)),
            Error::Protocol(ProtocolError::HttparseError(_)) => io::Error::other(
                "what answers does not speak HTTP/1.1; nkv's own port is written host:port, without ws://",
            ),
            Error::Protocol(ProtocolError::HandshakeIncomplete) => {
                io::Error::new(io::ErrorKind::UnexpectedEof, "closed by the server before it answered")
            }
            Error::Io(error) => error,
            error => io::Error::other(format!("the answer is not that of a WebSocket: {error}")),
        })?;
        Ok(WebSocket {
            socket,
            rest: Bytes::new(),
            lacks_newline: false,
            unanswered: 0,
            heartbeat,
            next_ping: Instant::now() + heartbeat,
            timer: Box::pin(sleep(heartbeat)),
            goodbye: Some(CloseCode::Normal),
        })
    }

    /// The greeting was answered: from now on messages have the limit that the program set.
    pub(crate) fn greeted(&mut self) {
        self.socket.get_mut().left = u64::MAX;
    }

    /// When bytes moved last: some came, or the peer took some that had to wait.
    pub(crate) fn heard(&self) -> Instant {
        self.socket.get_ref().heard
    }

    /// How many bytes of the present frame have not been read.
    pub(crate) fn frame_len_left(&self) -> usize {
        self.rest.len() + usize::from(self.lacks_newline)
    }

    /// Says that the connection ends, as far as that can be said without waiting.
    pub(crate) fn say_goodbye(&mut self) {
        let Some(code) = self.goodbye.take() else { return };
        let mut cx = Context::from_waker(Waker::noop());
        let close = Message::Close(Some(CloseFrame { code, reason: Utf8Bytes::default() }));
        // To a connection that is lost nothing can be sent.
        if Pin::new(&mut self.socket).start_send(close).is_ok() {
            _ = Pin::new(&mut self.socket).poll_flush(&mut cx);
        }
    }

    /// Waits until the server has said that the connection ends, too, and has closed it.
    pub(crate) fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        _ = Pin::new(&mut self.socket).poll_flush(cx);
        while let Some(Ok(_)) = ready!(Pin::new(&mut self.socket).poll_next(cx)) {}
        Poll::Ready(())
    }

    /// Hands on what is left of a frame; false if nothing is.
    fn give(&mut self, buf: &mut ReadBuf<'_>) -> bool {
        let given = self.rest.split_to(self.rest.len().min(buf.remaining()));
        buf.put_slice(&given);
        if self.rest.is_empty() {
            // The frame's memory need not wait for the next.
            self.rest = Bytes::new();
            if self.lacks_newline && buf.remaining() > 0 {
                buf.put_slice(b"\n");
                self.lacks_newline = false;
                return true;
            }
        }
        !given.is_empty()
    }

    /// Pings when that is due, and judges the silence of the server. What it has sent was read before.
    fn poll_beat(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        while self.timer.as_mut().poll(cx).is_ready() {
            let (now, limit) = (Instant::now(), 2 * self.heartbeat);
            let silence = now.saturating_duration_since(self.heard());
            if silence >= limit {
                return Err(io::Error::new(io::ErrorKind::TimedOut, format!("nothing heard for {silence:?}")));
            }
            if now >= self.next_ping {
                self.next_ping = now + self.heartbeat;
                // Where something waits to be sent, a ping would only wait behind it.
                if Pin::new(&mut self.socket).poll_ready(cx).map_err(io_error)?.is_ready() {
                    Pin::new(&mut self.socket).start_send(Message::Ping(Bytes::new())).map_err(io_error)?;
                    _ = Pin::new(&mut self.socket).poll_flush(cx).map_err(io_error)?;
                }
            }
            let next = self.next_ping.min(self.heard() + limit);
            self.timer.as_mut().reset(next);
        }
        Ok(())
    }

    /// Waits for the next frame with a message.
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        loop {
            if self.unanswered > 0 && Pin::new(&mut self.socket).poll_flush(cx).map_err(io_error)?.is_ready() {
                self.unanswered = 0;
            }
            if self.unanswered > UNANSWERED_MAX {
                return Poll::Pending;
            }
            match ready!(Pin::new(&mut self.socket).poll_next(cx)) {
                Some(Ok(Message::Text(text))) => {
                    self.lacks_newline = !text.ends_with('\n');
                    self.rest = text.into();
                    return Poll::Ready(Ok(true));
                }
                Some(Ok(Message::Binary(bytes))) => {
                    self.rest = bytes;
                    return Poll::Ready(Ok(true));
                }
                // The library has the pong ready, and the next flush sends it.
                Some(Ok(Message::Ping(_))) => self.unanswered += 1,
                Some(Ok(Message::Close(frame))) => {
                    self.goodbye = None;
                    // The library has the answer ready.
                    _ = Pin::new(&mut self.socket).poll_flush(cx);
                    return Poll::Ready(Err(closed(frame.as_ref())));
                }
                Some(Ok(Message::Pong(_) | Message::Frame(_))) => {}
                Some(Err(error)) => return Poll::Ready(Err(self.failed(error))),
                None => return Poll::Ready(Ok(false)),
            }
        }
    }

    fn failed(&mut self, error: Error) -> io::Error {
        self.goodbye = self.goodbye.and(match error {
            Error::Capacity(_) => Some(CloseCode::Size),
            Error::Utf8(_) => Some(CloseCode::Invalid),
            Error::Protocol(_) => Some(CloseCode::Protocol),
            _ => None,
        });
        io_error(error)
    }
}

impl Io for WebSocket {
    fn web_socket(&mut self) -> Option<&mut WebSocket> {
        Some(self)
    }
}

impl AsyncRead for WebSocket {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while !self.give(buf) {
            match self.poll_frame(cx)? {
                Poll::Ready(true) => {}
                Poll::Ready(false) => break,
                Poll::Pending => {
                    self.poll_beat(cx)?;
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for WebSocket {
    /// Sends a whole message, or nothing: a line as text, a line with a payload as bytes.
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, message: &[u8]) -> Poll<io::Result<usize>> {
        ready!(Pin::new(&mut self.socket).poll_ready(cx)).map_err(io_error)?;
        let line = message.strip_suffix(b"\n").filter(|line| !line.contains(&b'\n'));
        let text = line.and_then(|line| std::str::from_utf8(line).ok());
        let frame = text.map_or_else(|| Message::Binary(Bytes::copy_from_slice(message)), Message::text);
        Pin::new(&mut self.socket).start_send(frame).map_err(io_error)?;
        Poll::Ready(Ok(message.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx).map_err(io_error)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.say_goodbye();
        self.poll_closed(cx).map(Ok)
    }
}

impl Drop for WebSocket {
    fn drop(&mut self) {
        self.say_goodbye();
    }
}

impl Target<'_> {
    fn request(&self) -> io::Result<Request> {
        // A zone of an IPv6 address is of this host alone.
        let host = self.host.split_once('%').map_or(self.host, |(host, _)| host);
        let authority = match host.contains(':') {
            true => format!("[{host}]:{}", self.port),
            false => format!("{host}:{}", self.port),
        };
        let uri = Uri::builder().scheme("ws").authority(authority.as_str()).path_and_query(self.path).build();
        let request = Request::builder().method("GET").version(Version::HTTP_11).uri(uri.map_err(io::Error::other)?);
        let request = request
            .header("Host", authority)
            .header("Connection", "Upgrade")
            .header("Upgrade", "websocket")
            .header("Sec-WebSocket-Version", "13")
            .header("Sec-WebSocket-Key", generate_key());
        request.body(()).map_err(io::Error::other)
    }
}

/// What an answer other than a WebSocket means, and what to do about it.
fn refusal(response: &Response) -> String {
    let status = response.status();
    let what = match status {
        StatusCode::UNAUTHORIZED => "a proxy in front of the server asks for credentials",
        StatusCode::FORBIDDEN => {
            "the server, or a proxy in front of it, does not serve this host name: use its IP address, or have it \
             started with --http-host NAME"
        }
        StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => {
            "no WebSocket at this path: nkv has it at /v1/ws, unless a proxy in front has another path"
        }
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
            "the server has no room or is not ready: try again later"
        }
        StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT => {
            "a proxy answers and does not reach the server: see whether that runs"
        }
        status if status.is_redirection() => "redirects are not followed: give the address that this one leads to",
        status if status.is_server_error() => "the server, or a proxy in front of it, failed: its log says why",
        _ => "no WebSocket here: see whether the path is right, and whether a proxy in front passes upgrades on",
    };
    format!("HTTP status {status}: {what}")
}

/// The server ended the connection in order.
fn closed(frame: Option<&CloseFrame>) -> io::Error {
    let why = match frame {
        Some(CloseFrame { code, reason }) if reason.is_empty() => format!(" with code {}", u16::from(*code)),
        Some(CloseFrame { code, reason }) => {
            let reason: String = reason.chars().take(REASON_CHARS_MAX).flat_map(char::escape_debug).collect();
            format!(" with code {}: {reason}", u16::from(*code))
        }
        None => String::new(),
    };
    io::Error::new(io::ErrorKind::ConnectionAborted, format!("closed by the server{why}"))
}

/// What a WebSocket brings that is wrong in itself is invalid data; the rest is a connection that is lost.
fn io_error(error: Error) -> io::Error {
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    match error {
        Error::Io(error) => error,
        Error::ConnectionClosed
        | Error::AlreadyClosed
        | Error::Protocol(ProtocolError::ResetWithoutClosingHandshake | ProtocolError::SendAfterClosing) => {
            io::Error::new(io::ErrorKind::UnexpectedEof, "closed by the server")
        }
        Error::Capacity(error) => invalid(format!("the server's message is over the limit: {error}")),
        error => invalid(format!("not a good WebSocket: {error}")),
    }
}

/// The stream below a WebSocket, which notes when bytes move.
struct Measured {
    io: Box<dyn Io>,
    heard: Instant,
    /// Whether the peer must take some bytes before more can be sent.
    is_blocked: bool,
    /// How many bytes may still be read.
    left: u64,
}

impl Measured {
    fn new(io: Box<dyn Io>) -> Self {
        Measured { io, heard: Instant::now(), is_blocked: false, left: GREETING_LEN_MAX as u64 }
    }
}

impl AsyncRead for Measured {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        let len = buf.filled().len().saturating_sub(before) as u64;
        if len > 0 {
            self.heard = Instant::now();
        }
        if len > self.left {
            let what = format!("the server's answer to the greeting is over the limit of {GREETING_LEN_MAX} bytes");
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, what)));
        }
        self.left = self.left.saturating_sub(len);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Measured {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.io).poll_write(cx, bytes);
        // What this side's buffer takes at once says nothing about the other.
        if std::mem::replace(&mut self.is_blocked, polled.is_pending()) && polled.is_ready() {
            self.heard = Instant::now();
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use futures_util::{SinkExt, StreamExt};
    use nkv_protocol::Kind;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio_tungstenite::tungstenite::protocol::Role;

    use super::*;
    use crate::link::Link;

    const HEARTBEAT: Duration = Duration::from_secs(15);

    /// A WebSocket over a stream that holds this number of bytes, past its greeting, and the stream's far end.
    async fn opened(buffer_len: usize) -> (WebSocket, DuplexStream) {
        let (near, mut far) = duplex(buffer_len);
        let (mut socket, ()) = tokio::join!(
            async {
                let target = Target { host: "::1%lo", port: 80, path: "/v1/ws?a=b" };
                WebSocket::open(Box::new(near), &target, (HEARTBEAT, 1 << 20)).await.unwrap()
            },
            async {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(far.read_u8().await.unwrap());
                }
                let head = String::from_utf8(head).unwrap();
                assert!(head.starts_with("GET /v1/ws?a=b HTTP/1.1\r\nHost: [::1]:80\r\n"), "{head}");
                let key = head.split_once("Sec-WebSocket-Key: ").unwrap().1.split_once("\r\n").unwrap().0;
                let accept = tokio_tungstenite::tungstenite::handshake::derive_accept_key(key.as_bytes());
                let head = format!(
                    "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                     Sec-WebSocket-Accept: {accept}\r\n\r\n"
                );
                far.write_all(head.as_bytes()).await.unwrap();
            }
        );
        socket.greeted();
        (socket, far)
    }

    /// Sends what the stream takes.
    async fn send(link: &mut Link) {
        poll_fn(|cx| {
            link.poll_send(cx);
            Poll::Ready(())
        })
        .await;
    }

    async fn server(far: DuplexStream) -> WebSocketStream<DuplexStream> {
        WebSocketStream::from_raw_socket(far, Role::Server, None).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_server_is_pinged_and_then_given_up() {
        let (mut socket, far) = opened(1 << 16).await;
        let started = Instant::now();
        let read = tokio::time::timeout(10 * HEARTBEAT, socket.read_u8()).await;
        let error = read.expect("it is not given up").unwrap_err();
        assert_eq!((error.kind(), started.elapsed()), (io::ErrorKind::TimedOut, 2 * HEARTBEAT));
        drop(socket);
        let mut far = server(far).await;
        assert!(matches!(far.next().await, Some(Ok(Message::Ping(_)))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_answers_pings_and_says_nothing_else_is_alive() {
        let (mut socket, far) = opened(1 << 16).await;
        let mut far = server(far).await;
        let mut pings = 0;
        let answering = async {
            while let Some(Ok(frame)) = far.next().await {
                pings += usize::from(matches!(frame, Message::Ping(_)));
                // The library answers when it is asked for the next frame.
            }
        };
        tokio::select! {
            read = socket.read_u8() => panic!("{read:?}"),
            () = answering => panic!("it was closed"),
            () = sleep(10 * HEARTBEAT + HEARTBEAT / 2) => {}
        }
        assert_eq!(pings, 10);
    }

    // A pong behind megabytes of a snapshot comes late.
    #[tokio::test(start_paused = true)]
    async fn a_long_frame_that_comes_bit_by_bit_is_life() {
        let (mut socket, mut far) = opened(1 << 16).await;
        let sending = async {
            far.write_all(&[0x82, 127, 0, 0, 0, 0, 0, 0, 0, 20]).await.unwrap();
            for _ in 0..20 {
                sleep(HEARTBEAT).await;
                far.write_all(b"x").await.unwrap();
            }
        };
        let (read, ()) = tokio::join!(socket.read_u8(), sending);
        assert_eq!(read.unwrap(), b'x');
    }

    // What a server takes of a long value is life too, though it sends nothing.
    #[tokio::test(start_paused = true)]
    async fn a_long_message_that_is_taken_bit_by_bit_is_life() {
        let (mut socket, mut far) = opened(1_000).await;
        socket.write_all(&[&b"{}\n"[..], &[b'x'; 20_000], b"\n"].concat()).await.unwrap();
        let taking = async {
            for _ in 0..18 {
                sleep(HEARTBEAT).await;
                far.read_exact(&mut [0; 1_000]).await.unwrap();
            }
        };
        let mut buf = [0; 1];
        let using = poll_fn(|cx| {
            _ = Pin::new(&mut socket).poll_flush(cx);
            Pin::new(&mut socket).poll_read(cx, &mut ReadBuf::new(&mut buf))
        });
        tokio::select! {
            read = using => panic!("{read:?}"),
            () = taking => {}
        }
        // From then on it is as silent as any.
        let error = socket.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test(start_paused = true)]
    async fn the_link_knows_of_parts_of_a_message() {
        let (socket, mut far) = opened(1 << 16).await;
        let mut link = Link::over(Box::new(socket), 1 << 20);
        let opened = link.heard;
        far.write_all(&[0x82, 127, 0, 0, 0, 0, 0, 0, 0, 20, b'x']).await.unwrap();
        sleep(HEARTBEAT).await;
        let polled = poll_fn(|cx| Poll::Ready(link.poll_io(cx).is_pending())).await;
        assert!(polled && link.heard >= opened + HEARTBEAT);
    }

    // What is given up is cut out of what waits to be sent, and the rest are whole frames still.
    #[tokio::test]
    async fn frames_are_whole_behind_one_that_was_taken_back() {
        let (socket, far) = opened(1_000).await;
        let mut far = server(far).await;
        let mut link = Link::over(Box::new(socket), 1 << 20);
        let mut put = nkv_protocol::Request::new(Kind::Put, "a");
        put.value = Some(vec![b'x'; 20_000].into());
        link.push(&put);
        send(&mut link).await;
        let (_, first) = link.push(&nkv_protocol::Request::new(Kind::Get, "first"));
        let (_, second) = link.push(&nkv_protocol::Request::new(Kind::Get, "given.up"));
        let end = link.encoded();
        let (_, third) = link.push(&nkv_protocol::Request::new(Kind::Get, "third"));
        link.push(&nkv_protocol::Request::new(Kind::Get, "fourth"));
        send(&mut link).await;
        assert!(!link.has_sent(first) && !link.has_sent(third));
        link.take_back(second, end);
        let reading = async {
            assert!(matches!(far.next().await, Some(Ok(Message::Binary(bytes))) if bytes.len() > 20_000));
            for key in ["first", "third", "fourth"] {
                let Some(Ok(Message::Text(line))) = far.next().await else { panic!("no text") };
                assert!(line.ends_with(&format!("\"{key}\"}}")), "{line}");
            }
        };
        tokio::select! {
            _ = poll_fn(|cx| link.poll_io(cx)) => panic!("nothing was sent"),
            () = reading => {}
        }
    }

    #[tokio::test]
    async fn a_line_is_a_text_frame_and_a_payload_comes_in_a_binary_one() {
        let (mut socket, far) = opened(1 << 16).await;
        let mut far = server(far).await;
        for message in [&b"{\"a\":1}\n"[..], b"{\"len\":0}\n\n", b"{\"len\":2}\n\n\n\n"] {
            assert_eq!(socket.write(message).await.unwrap(), message.len());
        }
        socket.flush().await.unwrap();
        assert_eq!(far.next().await.unwrap().unwrap(), Message::text("{\"a\":1}"));
        assert_eq!(far.next().await.unwrap().unwrap(), Message::binary(&b"{\"len\":0}\n\n"[..]));
        assert_eq!(far.next().await.unwrap().unwrap(), Message::binary(&b"{\"len\":2}\n\n\n\n"[..]));

        // The newline of a text frame may be missing, that of a payload not.
        for frame in [Message::text("one"), Message::text("two\n"), Message::binary(&b"three\n3\n"[..])] {
            far.send(frame).await.unwrap();
        }
        let mut read = [0; 15];
        socket.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"one\ntwo\nthree\n3");
        assert_eq!(socket.frame_len_left(), 1);
    }

    // Each ping left a pong in a buffer without end.
    #[tokio::test]
    async fn a_server_that_pings_and_takes_no_pong_is_not_read_any_more() {
        let (mut socket, mut far) = opened(1_000).await;
        let flood = async {
            for _ in 0..10_000 {
                let mut ping = vec![0x89, 125];
                ping.extend([b'x'; 125]);
                far.write_all(&ping).await.unwrap();
            }
        };
        tokio::select! {
            read = socket.read_u8() => panic!("{read:?}"),
            () = flood => panic!("all pings were read"),
            () = sleep(Duration::from_millis(200)) => {}
        }
        assert!(socket.unanswered > UNANSWERED_MAX);
    }

    #[tokio::test]
    async fn the_far_end_of_a_connection_that_is_left_is_sent_a_close_frame() {
        let (socket, far) = opened(1 << 16).await;
        let mut far = server(far).await;
        drop(socket);
        let Some(Ok(Message::Close(Some(close)))) = far.next().await else { panic!("no close frame") };
        assert_eq!(close.code, CloseCode::Normal);

        let (mut socket, mut far) = opened(1 << 16).await;
        // A frame of 2^62 bytes.
        far.write_all(&[0x82, 127, 0x40, 0, 0, 0, 0, 0, 0, 0]).await.unwrap();
        assert_eq!(socket.read_u8().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(socket);
        let Some(Ok(Message::Close(Some(close)))) = server(far).await.next().await else { panic!("no close frame") };
        assert_eq!(close.code, CloseCode::Size);
    }

    #[tokio::test]
    async fn the_reason_of_a_close_is_shown_and_cannot_do_harm() {
        let reason = format!("\u{1b}[2J{}", "x".repeat(110));
        let frame = CloseFrame { code: CloseCode::Again, reason: reason.into() };
        let shown = closed(Some(&frame)).to_string();
        assert!(shown.starts_with("closed by the server with code 1013: \\u{1b}[2Jxx"), "{shown}");
    }

    #[tokio::test]
    async fn the_answer_to_the_greeting_has_a_limit_of_its_own() {
        let (mut socket, mut far) = opened(1 << 20).await;
        socket.socket.get_mut().left = GREETING_LEN_MAX as u64;
        far.write_all(&[0x82, 127, 0, 0, 0, 0, 0, 8, 0, 0]).await.unwrap();
        far.write_all(&vec![b'x'; GREETING_LEN_MAX]).await.unwrap();
        let error = socket.read_u8().await.unwrap_err();
        assert!(error.to_string().contains("greeting"), "{error}");
    }
}
