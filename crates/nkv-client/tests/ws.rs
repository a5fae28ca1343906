//! The client over WebSockets, against servers that do what a test says; `ws_suites.rs` has what all connections share.
#![cfg(feature = "ws")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{eager, next, short, within};
use futures_util::{SinkExt, StreamExt};
use nkv_client::{Client, ConnectionState, ErrorKind};
use nkv_server::Server;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{CloseCode, Data, OpCode};
use tokio_tungstenite::tungstenite::{Bytes, Message};
use tokio_tungstenite::{WebSocketStream, accept_async, accept_hdr_async};

const GREETED: &str = r#"{"Base":{"id":0,"status":200,"message":"No Error","epoch":"e1"}}"#;

struct Door {
    listener: TcpListener,
    addr: String,
}

struct Peer(WebSocketStream<TcpStream>);

impl Door {
    async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = format!("ws://{}", listener.local_addr().unwrap());
        Door { listener, addr }
    }

    async fn accept_stream(&self) -> TcpStream {
        within(self.listener.accept()).await.unwrap().0
    }

    /// The next WebSocket, whose greeting was answered.
    async fn accept(&self) -> Peer {
        let mut peer = Peer(within(accept_async(self.accept_stream().await)).await.unwrap());
        assert_eq!(peer.request().await["type"], "Connect");
        peer.send(Message::text(GREETED)).await;
        peer
    }
}

impl Peer {
    async fn frame(&mut self) -> Option<Message> {
        within(self.0.next()).await?.ok()
    }

    /// The next request that is a line alone.
    async fn request(&mut self) -> Value {
        loop {
            match self.frame().await.expect("the client has left") {
                Message::Text(line) => return serde_json::from_str(&line).unwrap(),
                Message::Binary(_) | Message::Close(_) => panic!("a line is a text frame"),
                _ => {}
            }
        }
    }

    async fn send(&mut self, message: Message) {
        within(self.0.send(message)).await.unwrap();
    }

    async fn close(&mut self, code: CloseCode, reason: &'static str) {
        self.send(Message::Close(Some(CloseFrame { code, reason: reason.into() }))).await;
    }

    /// Reads until the client closes, and says with which code.
    async fn close_code(&mut self) -> Option<CloseCode> {
        loop {
            if let Message::Close(frame) = self.frame().await? {
                return frame.map(|frame| frame.code);
            }
        }
    }
}

async fn plain() -> Server {
    Server::builder().listen("127.0.0.1:0".parse().unwrap()).bind().await.unwrap()
}

/// A server, and a bridge before it.
async fn bridged() -> (Server, String) {
    let server = plain().await;
    let addr = common::bridge::to(&server.addresses()[0].to_string()).await;
    (server, addr)
}

fn ok(request: &Value) -> String {
    format!(r#"{{"Base":{{"id":{},"status":200,"message":"No Error","revision":1}}}}"#, request["id"])
}

/// A client of a door, and the door's side of it.
async fn pair(door: &Door) -> (Client, Peer) {
    let (client, peer) = tokio::join!(eager(&door.addr).connect(), door.accept());
    (client.unwrap(), peer)
}

#[tokio::test]
async fn requests_are_text_frames_and_values_are_binary_ones() {
    let door = Door::new().await;
    let (client, mut peer) = pair(&door).await;
    let putting = client.clone();
    let put = tokio::spawn(async move { putting.put("a", "line\nline").await });
    let Some(Message::Binary(bytes)) = peer.frame().await else { panic!("a value is in a binary frame") };
    assert!(bytes.ends_with(b"\nline\nline\n"), "{bytes:?}");
    peer.send(Message::text(r#"{"Base":{"id":1,"status":200,"message":"No Error","revision":7}}"#)).await;
    assert_eq!(within(put).await.unwrap().unwrap().get(), 7);

    let mut subscription = {
        let subscribing = client.clone();
        let subscribing = tokio::spawn(async move { subscribing.subscribe("a").await });
        assert_eq!(peer.request().await["type"], "Subscribe");
        peer.send(Message::text("\"Hello\"")).await;
        peer.send(Message::binary(&b"{\"Update\":{\"key\":\"a\",\"revision\":7,\"len\":4}}\nx\ny\n\n"[..])).await;
        peer.send(Message::text("{\"Synced\":{\"key\":\"a\",\"revision\":7,\"epoch\":\"e1\"}}\n")).await;
        within(subscribing).await.unwrap().unwrap()
    };
    assert_eq!(short(&next(&mut subscription).await), "a=x\ny\n");
    assert_eq!(short(&next(&mut subscription).await), "synced");
}

#[tokio::test]
async fn a_message_in_fragments_with_a_ping_between_is_one_message() {
    let door = Door::new().await;
    let (client, mut peer) = pair(&door).await;
    let asking = tokio::spawn(async move { client.exists("a").await });
    let answer = ok(&peer.request().await);
    let (first, rest) = answer.split_at(10);
    let (second, third) = rest.split_at(10);
    let part = |text: &str, opcode, is_final| {
        Message::Frame(Frame::message(Bytes::copy_from_slice(text.as_bytes()), OpCode::Data(opcode), is_final))
    };
    peer.send(part(first, Data::Text, false)).await;
    peer.send(Message::Ping("there?".into())).await;
    peer.send(part(second, Data::Continue, false)).await;
    assert_eq!(peer.frame().await.unwrap(), Message::Pong("there?".into()));
    peer.send(part(third, Data::Continue, true)).await;
    assert!(within(asking).await.unwrap().unwrap());
}

#[tokio::test]
async fn a_frame_that_is_not_one_message_ends_the_connection() {
    for (frames, part) in [
        (vec![Message::text("{\"Base\":{\"id\":1,")], "not an nkv message"),
        (vec![Message::binary("{\"Base\":{\"id\":1,")], "ends within a message"),
        (
            vec![
                Message::text("{\"Get\":{\"id\":1,\"status\":200,\"message\":\"\",\"len\":2}}"),
                Message::binary("hi\n"),
            ],
            "ends within",
        ),
        (vec![Message::text(format!("{GREETED}\n\"Alive\""))], "more than one message"),
    ] {
        let door = Door::new().await;
        let (client, mut peer) = pair(&door).await;
        let asking = tokio::spawn(async move { client.exists("a").await });
        peer.request().await;
        for frame in frames {
            // It may have left at the first.
            _ = peer.0.send(frame).await;
        }
        let error = within(asking).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Protocol);
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[tokio::test]
async fn a_client_that_is_closed_or_dropped_says_so() {
    let door = Door::new().await;
    let (client, mut peer) = pair(&door).await;
    client.close();
    assert_eq!(peer.close_code().await, Some(CloseCode::Normal));
    let (client, mut peer) = pair(&door).await;
    drop(client);
    assert_eq!(peer.close_code().await, Some(CloseCode::Normal));
    // One whose runtime goes away can only try.
    let addr = door.addr.clone();
    let program = std::thread::spawn(move || {
        let client = nkv_client::blocking::Client::connect(&addr).unwrap();
        client.close();
    });
    let mut peer = door.accept().await;
    assert_eq!(peer.close_code().await, Some(CloseCode::Normal));
    program.join().unwrap();
}

#[tokio::test]
async fn an_idle_client_pings() {
    let door = Door::new().await;
    let builder = eager(&door.addr).heartbeat(Duration::from_millis(100));
    let (client, mut peer) = tokio::join!(builder.connect(), door.accept());
    for _ in 0..3 {
        let frame = peer.frame().await.unwrap();
        assert!(matches!(frame, Message::Ping(_)), "{frame:?}");
    }
    assert_eq!(*client.unwrap().state().borrow(), ConnectionState::Connected);
}

#[tokio::test]
async fn a_server_that_falls_silent_is_given_up() {
    let door = Door::new().await;
    let builder = eager(&door.addr).heartbeat(Duration::from_millis(100));
    // It is not read from any more, so that no pong is sent.
    let (client, _silent) = tokio::join!(builder.connect(), door.accept());
    let client = client.unwrap();
    let mut again = door.accept().await;
    let asking = tokio::spawn(async move { client.exists("a").await });
    let answer = ok(&again.request().await);
    again.send(Message::text(answer)).await;
    assert!(within(asking).await.unwrap().unwrap());
}

#[tokio::test]
async fn a_close_by_the_server_is_a_lost_connection() {
    let door = Door::new().await;
    let (client, mut peer) = pair(&door).await;
    for (code, reason) in [(CloseCode::Away, ""), (CloseCode::Again, "later"), (CloseCode::Normal, "")] {
        let asking = client.clone();
        let asking = tokio::spawn(async move { asking.put("a", "1").await });
        assert!(matches!(peer.frame().await, Some(Message::Binary(_))));
        peer.close(code, reason).await;
        let error = within(asking).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::OutcomeUnknown);
        let shown = format!("closed by the server with code {}", u16::from(code));
        assert!(error.to_string().contains(&shown) && error.to_string().ends_with(reason), "{error}");
        // The close is answered.
        assert_eq!(peer.close_code().await, Some(code));
        peer = door.accept().await;
    }
}

/// What a door that answers with these bytes makes of an attempt to connect.
async fn refused(answer: &str) -> nkv_client::Error {
    let door = Door::new().await;
    let (client, ()) = tokio::join!(Client::connect(&door.addr), async {
        let mut stream = door.accept_stream().await;
        stream.read_buf(&mut Vec::with_capacity(4_096)).await.unwrap();
        stream.write_all(answer.as_bytes()).await.unwrap();
    });
    let error = client.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::CannotConnect);
    assert!(error.to_string().contains(&format!("{}/v1/ws", door.addr)), "{error}");
    error
}

#[tokio::test]
async fn an_http_answer_is_named_with_what_to_do() {
    for (status, part) in [
        ("401 Unauthorized", "credentials"),
        ("403 Forbidden", "--http-host"),
        ("404 Not Found", "/v1/ws"),
        ("503 Service Unavailable", "try again later"),
        ("429 Too Many Requests", "try again later"),
        ("502 Bad Gateway", "does not reach the server"),
        ("500 Internal Server Error", "log"),
        ("302 Found", "redirects"),
        ("200 OK", "passes upgrades on"),
        ("400 Bad Request", "passes upgrades on"),
        ("426 Upgrade Required", "passes upgrades on"),
    ] {
        let error = refused(&format!("HTTP/1.1 {status}\r\nContent-Length: 2\r\n\r\nno")).await;
        assert!(error.to_string().contains(&format!("HTTP status {status}: ")), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
    let error = refused(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\
                         Sec-WebSocket-Accept: bm9uc2Vuc2U=\r\n\r\n",
    )
    .await;
    assert!(error.to_string().contains("not that of a WebSocket"), "{error}");
    assert!(refused("").await.to_string().contains("before it answered"));
}

#[tokio::test]
async fn a_refusal_is_tried_again_like_a_refused_connection() {
    let door = Door::new().await;
    let client = eager(&door.addr).start().unwrap();
    let asking = tokio::spawn({
        let client = client.clone();
        async move { client.exists("a").await }
    });
    for _ in 0..3 {
        let mut stream = door.accept_stream().await;
        stream.read_buf(&mut Vec::with_capacity(4_096)).await.unwrap();
        stream.write_all(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    }
    let mut peer = door.accept().await;
    let answer = ok(&peer.request().await);
    peer.send(Message::text(answer)).await;
    assert!(within(asking).await.unwrap().unwrap());
}

#[tokio::test]
async fn the_wrong_port_is_named() {
    // The port of nkv's own protocol, as HTTP.
    let server = plain().await;
    let addr = server.addresses()[0].to_string();
    let error = Client::connect(&format!("ws://{addr}")).await.unwrap_err();
    assert!(error.to_string().contains("without ws://"), "{error}");
    // A port of HTTP or gRPC, as nkv's own.
    for (answer, part) in [
        (&b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n"[..], "this is an HTTP server; "),
        (b"\0\0\x06\x04\0\0\0\0\0\0\x03\0\0\0\x64", "this is an HTTP/2 server"),
    ] {
        let door = Door::new().await;
        let (client, ()) = tokio::join!(Client::connect(door.addr.trim_start_matches("ws://")), async {
            let mut stream = door.accept_stream().await;
            stream.read_buf(&mut Vec::with_capacity(4_096)).await.unwrap();
            stream.write_all(answer).await.unwrap();
        });
        let error = client.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::CannotConnect);
        assert!(error.to_string().contains(part) && error.to_string().contains("ws://host:port"), "{error}");
    }
}

#[tokio::test]
async fn a_frame_that_is_announced_too_long_is_refused_before_it_comes() {
    const LEN_MAX: usize = 1 << 20;
    for (len, len_max) in
        [(1_u64 << 62, LEN_MAX), (1 << 62, usize::MAX), (u64::MAX >> 1, LEN_MAX), (LEN_MAX as u64 + 1, LEN_MAX)]
    {
        let door = Door::new().await;
        let builder = eager(&door.addr).message_len_max(len_max);
        let (client, mut peer) = tokio::join!(builder.connect(), door.accept());
        let client = client.unwrap();
        let asking = tokio::spawn(async move { client.exists("a").await });
        peer.request().await;
        let header = [&[0x82, 127][..], &len.to_be_bytes()].concat();
        peer.0.get_mut().write_all(&header).await.unwrap();
        let error = within(asking).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Protocol, "it is not asked again: {error}");
        assert!(error.to_string().contains("over the limit"), "{error}");
        assert_eq!(peer.close_code().await, Some(CloseCode::Size));
    }
}

#[tokio::test]
async fn fragments_without_end_are_refused_at_the_limit() {
    let door = Door::new().await;
    let builder = eager(&door.addr).message_len_max(1 << 20);
    let (client, mut peer) = tokio::join!(builder.connect(), door.accept());
    let client = client.unwrap();
    let asking = tokio::spawn(async move { client.exists("a").await });
    peer.request().await;
    let sending = async {
        let part = Bytes::from(vec![b' '; 1 << 16]);
        for number in 0..64 {
            let opcode = if number == 0 { Data::Binary } else { Data::Continue };
            let frame = Frame::message(part.clone(), OpCode::Data(opcode), false);
            if peer.0.send(Message::Frame(frame)).await.is_err() {
                break;
            }
        }
    };
    let (error, ()) = tokio::join!(within(asking), sending);
    let error = error.unwrap().unwrap_err();
    assert!(error.to_string().contains("over the limit"), "{error}");
}

#[tokio::test]
async fn the_request_names_host_and_path_and_no_origin() {
    for (suffix, expected) in [("", "/v1/ws"), ("/", "/v1/ws"), ("/nkv/ws?a=b", "/nkv/ws?a=b")] {
        let door = Door::new().await;
        let addr = format!("{}{suffix}", door.addr);
        let seen = Arc::new(Mutex::new(None));
        let note = Arc::clone(&seen);
        #[expect(clippy::result_large_err, reason = "the callback's own type")]
        let callback = move |request: &Request, response: Response| -> Result<Response, ErrorResponse> {
            let headers = request.headers();
            let host = headers["host"].to_str().unwrap().to_owned();
            *note.lock().unwrap() = Some((host, request.uri().to_string(), headers.contains_key("origin")));
            Ok(response)
        };
        let connecting = tokio::spawn(async move { Client::connect(&addr).await });
        let peer = accept_hdr_async(door.accept_stream().await, callback).await.unwrap();
        let host = door.addr.trim_start_matches("ws://").to_owned();
        assert_eq!(seen.lock().unwrap().take(), Some((host, expected.to_owned(), false)));
        drop(peer);
        within(connecting).await.unwrap().unwrap_err();
    }
}

/// How many times a client connects within a while to a proxy that accepts every upgrade and closes at once; with
/// `greets`, after the greeting.
async fn attempts(greets: bool) -> usize {
    let door = Door::new().await;
    let count = Arc::new(AtomicUsize::new(0));
    let client =
        Client::builder(&door.addr).backoff(Duration::from_millis(50), Duration::from_secs(60)).start().unwrap();
    let proxy = tokio::spawn({
        let count = Arc::clone(&count);
        async move {
            loop {
                let mut peer = Peer(accept_async(door.accept_stream().await).await.unwrap());
                count.fetch_add(1, SeqCst);
                if greets {
                    peer.request().await;
                    peer.send(Message::text(GREETED)).await;
                }
                peer.close(CloseCode::Again, "").await;
                while peer.0.next().await.is_some_and(|frame| frame.is_ok()) {}
            }
        }
    });
    tokio::time::sleep(Duration::from_secs(3)).await;
    proxy.abort();
    drop(client);
    count.load(SeqCst)
}

// A pause that began anew with each WebSocket would never grow: some 120 attempts.
#[tokio::test]
async fn the_pause_grows_while_each_websocket_is_closed_at_once() {
    let (before, after) = tokio::join!(attempts(false), attempts(true));
    assert!((1..40).contains(&before), "{before} attempts, closed before the greeting");
    assert!((1..40).contains(&after), "{after} attempts, closed after it");
}

#[tokio::test]
async fn a_value_of_many_megabytes_and_many_keys_pass_through() {
    let (_server, addr) = bridged().await;
    let client = Client::connect(&addr).await.unwrap();
    let value = vec![b'\n'; 1 << 20];
    for number in 0..20 {
        client.put(&format!("big.k{number}"), value.clone()).await.unwrap();
    }
    let all = client.get_all("big.*").await.unwrap();
    assert_eq!((all.len(), all.iter().all(|entry| entry.value == value)), (20, true));
    let puts = (0..1_000).map(|number| {
        let client = client.clone();
        tokio::spawn(async move { client.put(&format!("k{number}"), number.to_string()).await })
    });
    for put in puts.collect::<Vec<_>>() {
        within(put).await.unwrap().unwrap();
    }
    assert_eq!(client.list("*").await.unwrap().len(), 1_020);
}

#[cfg(feature = "cli")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_line_takes_such_an_address_and_closes_in_order() {
    let (_server, addr) = bridged().await;
    let run = async |words: &[&str]| {
        let child = common::cli::command(words).spawn().unwrap();
        tokio::task::spawn_blocking(|| common::cli::finish(child)).await.unwrap()
    };
    assert_eq!(run(&[&addr, "put", "a", "1"]).await.status.code(), Some(0));
    assert_eq!(run(&[&addr, "get", "a"]).await.stdout, b"1");
    let output = run(&["wss://127.0.0.1:1", "get", "a"]).await;
    assert!(String::from_utf8_lossy(&output.stderr).contains("TLS is not there yet"), "{output:?}");

    let door = Door::new().await;
    let words = [door.addr.as_str(), "exists", "a"];
    let (output, code) = tokio::join!(run(&words), async {
        let mut peer = door.accept().await;
        let answer = ok(&peer.request().await);
        peer.send(Message::text(answer)).await;
        peer.close_code().await
    });
    assert_eq!((output.status.code(), code), (Some(0), Some(CloseCode::Normal)));
}
