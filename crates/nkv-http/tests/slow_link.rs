//! A long state over a slow link: it arrives on the first connection, as bytes that move are life.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use nkv_http::Options;
use nkv_node::Limits;
use support::TestDoor;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, Sleep, sleep, timeout};
use tokio_tungstenite::tungstenite::Message;

const VALUE_LEN: usize = 50_000;

/// A link of this number of bytes a second, in parts of a fiftieth of that.
struct Link {
    stream: TcpStream,
    part: usize,
    pause: Pin<Box<Sleep>>,
    received: usize,
}

impl Link {
    async fn open(door: &TestDoor, rate: usize) -> Link {
        let socket = TcpSocket::new_v4().unwrap();
        // What is on its way lies at the server, and not here.
        socket.set_recv_buffer_size(64 << 10).unwrap();
        let stream = socket.connect(door.address).await.unwrap();
        Link { stream, part: rate / 50, pause: Box::pin(sleep(Duration::ZERO)), received: 0 }
    }
}

impl AsyncRead for Link {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        ready!(self.pause.as_mut().poll(cx));
        let mut bytes = vec![0; self.part.min(buf.remaining())];
        let mut part = ReadBuf::new(&mut bytes);
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut part))?;
        buf.put_slice(part.filled());
        let len = part.filled().len();
        self.received += len;
        self.pause.as_mut().reset(Instant::now() + Duration::from_millis(20));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Link {
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

/// Values of this many bytes together.
async fn fill(door: &TestDoor, len: usize) -> usize {
    let count = len / VALUE_LEN;
    for n in 0..count {
        door.nkv.put(format!("k.{n:03}"), "v".repeat(VALUE_LEN)).await.unwrap();
    }
    count
}

/// Reads a state of `len` bytes by `rate` bytes a second: as server-sent events, and by a WebSocket.
async fn arrives(len: usize, rate: usize, options: Options) {
    let door = TestDoor::with(options, Limits::default()).await;
    let count = fill(&door, len).await;
    let patience = Duration::from_secs(120 + 3 * (len / rate) as u64);
    let both = async { tokio::join!(by_events(&door, rate, count), by_websocket(&door, rate, count)) };
    let received = timeout(patience, both).await.expect("it goes on");
    assert!(received.0.min(received.1) > len, "{received:?}");
}

async fn by_events(door: &TestDoor, rate: usize, count: usize) -> usize {
    let mut link = Link::open(door, rate).await;
    let head = format!("GET /v1/watch?pattern=k.* HTTP/1.1\r\nHost: {}\r\n\r\n", door.address);
    link.write_all(head.as_bytes()).await.unwrap();
    let (mut puts, mut tail, mut bytes) = (0, Vec::new(), vec![0; 64 << 10]);
    loop {
        let len = link.read(&mut bytes).await.expect("it is not cut");
        assert!(len > 0, "it was ended after {puts} of {count}");
        tail.extend_from_slice(&bytes[..len]);
        let is_synced = tail.windows(13).any(|part| part == b"event: synced");
        puts += take_all(&mut tail, b"event: put\n");
        if is_synced {
            assert_eq!(puts, count);
            return link.received;
        }
    }
}

/// How often `text` is in the bytes, of which as many are kept as may be the beginning of another.
fn take_all(bytes: &mut Vec<u8>, text: &[u8]) -> usize {
    let found = bytes.windows(text.len()).filter(|part| part == &text).count();
    let keep = if bytes.ends_with(text) { 0 } else { 32.min(bytes.len()) };
    let last = bytes.windows(text.len()).rposition(|part| part == text).map_or(0, |at| at + text.len());
    bytes.drain(..last.max(bytes.len() - keep));
    found
}

async fn by_websocket(door: &TestDoor, rate: usize, count: usize) -> usize {
    let link = Link::open(door, rate).await;
    let url = format!("ws://{}/v1/ws", door.address);
    let mut socket = tokio_tungstenite::client_async(url, link).await.unwrap().0;
    for request in [r#"{"type":"Connect","values":"payload"}"#, r#"{"type":"Subscribe","key":"k.*","snapshot":true}"#] {
        socket.send(Message::text(request)).await.unwrap();
    }
    let mut updates = 0;
    loop {
        // A pong is sent as the next message is read: it comes late, as on such a link.
        match socket.next().await.expect("it is not ended").expect("it is not cut") {
            Message::Binary(bytes) if bytes.starts_with(b"{\"Update\":") => updates += 1,
            Message::Text(text) if text.starts_with("{\"Synced\":") => {
                assert_eq!(updates, count);
                return socket.get_ref().received;
            }
            _ => {}
        }
    }
}

/// It takes longer than a peer may take nothing.
#[tokio::test]
async fn a_long_state_over_a_slow_link_arrives_on_the_first_connection() {
    let mut options = Options::default();
    options.stall_limit = Duration::from_secs(4);
    arrives(6_000_000, 800_000, options).await;
}

#[tokio::test]
#[ignore = "takes three and a half minutes"]
async fn twenty_megabytes_over_a_hundred_kilobytes_a_second_arrive_on_the_first_connection() {
    arrives(20_000_000, 100_000, Options::default()).await;
}
