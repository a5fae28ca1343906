//! WebSockets before a server of JSON lines, strict about what a frame is: one message, in both directions.

use bytes::{Buf, Bytes, BytesMut};
use futures_util::stream::SplitStream;
use futures_util::{SinkExt, StreamExt};
use nkv_protocol::{Decoder, Limits, MessageDecoder};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::OwnedReadHalf;
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::{WebSocketStream, accept_async};

/// A bridge to a server; it lives as long as the test's runtime.
pub(crate) async fn to(target: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = format!("ws://{}", listener.local_addr().unwrap());
    let target = target.to_owned();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            near.set_nodelay(true).unwrap();
            tokio::spawn(pass_on(near, target.clone()));
        }
    });
    addr
}

async fn pass_on(near: TcpStream, target: String) {
    // A connection may be cut at any byte.
    let Ok(near) = accept_async(near).await else { return };
    let (mut to_client, from_client) = near.split();
    let Ok(far) = TcpStream::connect(target).await else {
        _ = to_client.send(close(CloseCode::Again)).await;
        return;
    };
    far.set_nodelay(true).unwrap();
    let (from_server, mut to_server) = far.into_split();
    let mut from_client = from_client;
    let up = async {
        while let Some(message) = request(&mut from_client).await {
            if to_server.write_all(&message).await.is_err() {
                break;
            }
        }
    };
    let down = async {
        let mut server = Answers { stream: from_server, input: BytesMut::new(), decoder: MessageDecoder::new() };
        loop {
            while let Some(message) = server.next() {
                if to_client.feed(frame(&message)).await.is_err() {
                    return;
                }
            }
            if to_client.flush().await.is_err() {
                return;
            }
            if !server.read().await {
                break;
            }
        }
        _ = to_client.send(close(CloseCode::Away)).await;
        // Until the client has answered that.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = up => {}
        () = down => {}
    }
}

fn close(code: CloseCode) -> Message {
    Message::Close(Some(CloseFrame { code, reason: "".into() }))
}

/// The next message of a client, as its bytes are on TCP.
async fn request(client: &mut SplitStream<WebSocketStream<TcpStream>>) -> Option<Bytes> {
    loop {
        match client.next().await?.ok()? {
            Message::Text(text) => return Some(one_message([text.as_bytes(), b"\n"].concat().into(), false)),
            Message::Binary(bytes) => return Some(one_message(bytes, true)),
            Message::Close(_) => return None,
            _ => {}
        }
    }
}

/// Ends the test if these are not the bytes of one message, with or without a payload.
fn one_message(bytes: Bytes, has_payload: bool) -> Bytes {
    let mut decoder = Decoder::new(Limits { value_len_max: 8 << 20, ..Limits::default() });
    let decoded = decoder.decode(&bytes);
    let lines = bytes.iter().filter(|byte| **byte == b'\n').count();
    let is_one = decoded.item.is_some() && decoded.consumed == bytes.len() && has_payload == (lines > 1);
    if !is_one {
        let start = String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned();
        eprintln!("a frame is not one message: {start:?}, of {} bytes", bytes.len());
        // A panic of this task would not fail the test.
        std::process::exit(101);
    }
    bytes
}

struct Answers {
    stream: OwnedReadHalf,
    input: BytesMut,
    decoder: MessageDecoder,
}

impl Answers {
    /// The bytes of the server's next message, if it is there.
    fn next(&mut self) -> Option<Bytes> {
        let (consumed, message) = self.decoder.decode(&self.input).expect("a good message");
        if message.is_some() {
            return Some(self.input.split_to(consumed).freeze());
        }
        self.input.advance(consumed);
        None
    }

    /// Reads more; false at the end.
    async fn read(&mut self) -> bool {
        self.input.reserve(64 << 10);
        matches!(self.stream.read_buf(&mut self.input).await, Ok(1..))
    }
}

/// A line as text, without its newline; a line with a payload as bytes.
fn frame(message: &Bytes) -> Message {
    match message.strip_suffix(b"\n").filter(|line| !line.contains(&b'\n')) {
        Some(line) => Message::text(std::str::from_utf8(line).unwrap()),
        None => Message::Binary(message.clone()),
    }
}
