//! WebSockets: one frame is one message, whatever is sent and however slowly.

mod support;

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use nkv_http::Options;
use nkv_node::Limits;
use serde_json::{Value, json};
use support::{PATIENCE, Reply, TestDoor};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{CloseCode, Data, OpCode};
use tokio_tungstenite::{WebSocketStream, client_async};

type Socket = WebSocketStream<TcpStream>;

async fn open(door: &TestDoor, path: &str) -> Socket {
    let url = format!("ws://{}{path}", door.address);
    client_async(url, door.connect().await).await.expect("a WebSocket").0
}

async fn next(socket: &mut Socket) -> Message {
    loop {
        let message = timeout(PATIENCE, socket.next()).await.expect("a message").expect("it goes on").expect("a frame");
        if !message.is_ping() && !message.is_pong() {
            return message;
        }
    }
}

async fn text(socket: &mut Socket) -> Value {
    let message = next(socket).await;
    let text = message.to_text().expect("text");
    assert!(!text.contains('\n'), "one message: {text}");
    serde_json::from_str(text).expect("one JSON value")
}

async fn ask(socket: &mut Socket, request: Value) -> Value {
    socket.send(Message::text(request.to_string())).await.expect("sent");
    text(socket).await
}

async fn closed_with(socket: &mut Socket) -> Option<CloseCode> {
    loop {
        match timeout(PATIENCE, socket.next()).await.expect("an end") {
            Some(Ok(Message::Close(frame))) => return frame.map(|frame| frame.code),
            Some(Ok(_)) => {}
            Some(Err(_)) | None => return None,
        }
    }
}

#[tokio::test]
async fn a_frame_is_a_message_in_both_directions() {
    let door = TestDoor::start().await;
    let mut socket = open(&door, "/v1/ws").await;
    let put = ask(&mut socket, json!({"type": "Put", "id": 1, "key": "a", "value": "x\ny"})).await;
    assert_eq!(put["Base"]["revision"], 1);
    // White space between the parts is no end of a message, nor is a newline behind it a second one.
    socket.send(Message::text("{\"type\":\n\"Get\",\n\"id\":2,\"key\":\"a\"}\n")).await.unwrap();
    assert_eq!(text(&mut socket).await["Get"]["id"], 2);
    // The bytes as on TCP, with a payload.
    socket.send(Message::binary(&b"{\"type\":\"Put\",\"id\":3,\"key\":\"b\",\"len\":5}\na\nb\nc\n"[..])).await.unwrap();
    assert_eq!(text(&mut socket).await["Base"]["revision"], 2);
    socket.send(Message::binary(&b"{\"type\":\"Put\",\"id\":4,\"key\":\"c\",\"len\":3}\nabc"[..])).await.unwrap();
    assert_eq!(text(&mut socket).await["Base"]["revision"], 3);
    ask(&mut socket, json!({"type": "Connect", "id": 5, "values": "payload"})).await;
    socket.send(Message::text(json!({"type": "Get", "id": 6, "key": "b"}).to_string())).await.unwrap();
    let Message::Binary(bytes) = next(&mut socket).await else { panic!("no payload") };
    assert!(bytes.ends_with(b"\na\nb\nc\n") && bytes.starts_with(b"{\"Get\":"), "{bytes:?}");
    // Many at once, and events between them.
    ask(&mut socket, json!({"type": "Subscribe", "key": "*", "client_uuid": "me"})).await;
    for n in 0..500 {
        let request = json!({"type": "Put", "id": n, "key": format!("k.{n}"), "value": "\"len\":3"});
        socket.feed(Message::text(request.to_string())).await.unwrap();
    }
    socket.flush().await.unwrap();
    let (mut answers, mut events) = (0, 0);
    while answers < 500 || events < 500 {
        match next(&mut socket).await {
            Message::Text(text) => {
                let message: Value = serde_json::from_str(&text).expect("one JSON value");
                assert_eq!(message["Base"]["status"], 200, "{message}");
                answers += 1;
            }
            Message::Binary(bytes) => {
                assert!(bytes.starts_with(b"{\"Update\":") && bytes.ends_with(b"\n\"len\":3\n"), "{bytes:?}");
                events += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(door.nkv.get("b").await.unwrap().unwrap().value, "a\nb\nc");
}

#[tokio::test]
async fn a_frame_that_is_not_one_message_ends_its_connection_and_does_nothing() {
    let door = TestDoor::start().await;
    for (frame, code) in [
        (Message::text(r#"{"type":"Put","key":"a","len":3}"#), CloseCode::Policy),
        (Message::text(r#"{"type":"Put","key":"a","l\u0065n":3}"#), CloseCode::Policy),
        (Message::binary(&b"{\"type\":\"Put\",\"key\":\"a\",\"len\":3}\nab"[..]), CloseCode::Policy),
        (Message::binary(&b"{\"type\":\"Put\",\"key\":\"a\",\"len\":3}\nabcd"[..]), CloseCode::Policy),
        (Message::binary(&b"{\"type\":\"Put\",\"key\":\"a\",\"value\":\"1\"}\n{\"type\":\"Put\",\"key\":\"b\",\"value\":\"1\"}\n"[..]), CloseCode::Policy),
        (Message::binary(&b"{\"type\":\"Put\",\"key\":\"a\",\"len\":100000000}\nx"[..]), CloseCode::Policy),
    ] {
        let mut socket = open(&door, "/v1/ws").await;
        socket.send(frame.clone()).await.unwrap();
        assert_eq!(closed_with(&mut socket).await, Some(code), "{frame:?}");
    }
    // Two values in a text frame are one message that is wrong.
    let mut socket = open(&door, "/v1/ws").await;
    socket.send(Message::text("{\"type\":\"Health\"}\n{\"type\":\"Health\"}")).await.unwrap();
    assert_eq!(text(&mut socket).await["Base"]["status"], 400);
    assert_eq!(ask(&mut socket, json!({"type": "Health", "id": 1})).await["Base"]["status"], 200, "it goes on");
    assert_eq!(door.nkv.revision().get(), 0);
}

#[tokio::test]
async fn fragments_are_one_message_and_pings_come_between() {
    let door = TestDoor::start().await;
    let mut socket = open(&door, "/v1/ws").await;
    let part = |bytes: &'static [u8], op, is_last| Message::Frame(Frame::message(bytes, OpCode::Data(op), is_last));
    socket.send(part(b"{\"type\":\"He", Data::Text, false)).await.unwrap();
    socket.send(part(b"alth\",", Data::Continue, false)).await.unwrap();
    socket.send(Message::Ping("between".into())).await.unwrap();
    socket.send(part(b"\"id\":7}", Data::Continue, true)).await.unwrap();
    let pong = timeout(PATIENCE, socket.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(pong, Message::Pong("between".into()));
    assert_eq!(text(&mut socket).await["Base"]["id"], 7);
    assert!(timeout(Duration::from_millis(100), socket.next()).await.is_err(), "answered once");
}

/// What answers a ping waits for the end of the frame that is on its way.
#[tokio::test]
async fn pings_of_a_client_that_reads_late_cut_no_frame_in_two() {
    const COUNT: u8 = 100;
    let door = TestDoor::start().await;
    door.nkv.put("long", "v".repeat(40_000)).await.unwrap();
    let link = TcpSocket::new_v4().unwrap();
    link.set_recv_buffer_size(4_096).unwrap();
    let link = link.connect(door.address).await.unwrap();
    let mut socket = client_async(format!("ws://{}/v1/ws", door.address), link).await.unwrap().0;
    ask(&mut socket, json!({"type": "Connect", "values": "payload"})).await;
    let (mut sink, mut stream) = socket.split();
    let send = async {
        for n in 0..COUNT {
            sink.send(Message::text(json!({"type": "Get", "key": "long"}).to_string())).await.unwrap();
            sink.send(Message::Ping(vec![n; 100].into())).await.unwrap();
        }
    };
    let read = async {
        sleep(Duration::from_millis(300)).await;
        let (mut answers, mut pongs) = (0, 0);
        while answers < COUNT {
            match timeout(PATIENCE, stream.next()).await.expect("it goes on").expect("no end").expect("a frame") {
                Message::Binary(bytes) => {
                    let payload = bytes.splitn(2, |byte| *byte == b'\n').nth(1).unwrap();
                    assert!(payload.len() == 40_001 && payload[..40_000].iter().all(|byte| *byte == b'v'));
                    answers += 1;
                }
                Message::Pong(bytes) => {
                    assert!(bytes.len() == 100 && bytes.iter().all(|byte| *byte == bytes[0]), "{bytes:?}");
                    pongs += 1;
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(pongs > 0);
    };
    tokio::join!(send, read);
}

/// What is announced takes no memory, and what has come is counted.
#[tokio::test]
async fn announced_frames_cost_nothing_before_they_come() {
    let mut limits = Limits::default();
    limits.queued_max = 8 << 20;
    let door = TestDoor::with(Options::default(), limits).await;
    let mut socket = open(&door, "/v1/ws").await;
    let stream = socket.get_mut();
    // 2^62 bytes, masked.
    let head = [&[0x81, 0xff][..], &(1_u64 << 62).to_be_bytes(), &[1, 2, 3, 4]].concat();
    stream.write_all(&head).await.unwrap();
    assert_eq!(closed_with(&mut socket).await, Some(CloseCode::Size));

    let before = resident();
    let mut sockets = Vec::new();
    for _ in 0..100 {
        let mut socket = open(&door, "/v1/ws").await;
        let head = [&[0x81, 0xff][..], &1_000_000_u64.to_be_bytes(), &[0, 0, 0, 0]].concat();
        // All but one byte: as far as there is room for it.
        let bytes = [head, vec![b' '; 999_999]].concat();
        drop(timeout(Duration::from_millis(20), socket.get_mut().write_all(&bytes)).await);
        sockets.push(socket);
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 64 << 20, "{} MiB for frames that are not whole", grown >> 20);
    // Others are served meanwhile.
    let mut other = open(&door, "/v1/ws").await;
    assert_eq!(ask(&mut other, json!({"type": "Health", "id": 1})).await["Base"]["status"], 200);
}

fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("a process");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
    line.split_whitespace().next().and_then(|text| text.parse::<usize>().ok()).expect("kB") << 10
}

#[tokio::test]
async fn the_end_of_the_server_is_said() {
    let mut door = TestDoor::start().await;
    let mut socket = open(&door, "/v1/ws").await;
    ask(&mut socket, json!({"type": "Health", "id": 1})).await;
    let mut records = open(&door, "/subscribe").await;
    let node = door.node.take().unwrap();
    let stop = tokio::spawn(async move { timeout(Duration::from_secs(10), node.shutdown()).await.expect("it stops") });
    assert_eq!(closed_with(&mut socket).await, Some(CloseCode::Away));
    assert_eq!(closed_with(&mut records).await, Some(CloseCode::Away));
    stop.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_subscriptions_with_it() {
    let door = TestDoor::start().await;
    let mut socket = open(&door, "/v1/ws").await;
    ask(&mut socket, json!({"type": "Subscribe", "key": "*"})).await;
    assert_eq!(door.nkv.stats().await.unwrap().subscriptions, 1);
    socket.close(None).await.unwrap();
    timeout(PATIENCE, async {
        while door.nkv.stats().await.unwrap().connections > 0 {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("it is gone");
    assert_eq!(door.nkv.stats().await.unwrap().subscriptions, 0);
}

#[tokio::test]
async fn what_is_no_handshake_is_refused_as_such() {
    let door = TestDoor::start().await;
    let plain = door.get("/v1/ws").await;
    assert_eq!(
        (plain.status, plain.problem(), plain.header("upgrade")),
        (426, "upgrade".into(), Some("websocket".into()))
    );
    let head = format!(
        "GET /v1/ws HTTP/1.1\r\nHost: {}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x\r\nOrigin: http://evil.com\r\n\r\n",
        door.address
    );
    let mut stream = door.connect().await;
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(Reply::read_to_end(&mut stream).await.status, 403);
}

/// Each subscriber hears each change from now on, without history, pings or not.
#[tokio::test]
async fn every_subscriber_of_kv_store_hears_every_change() {
    let door = TestDoor::start().await;
    door.nkv.put("before", "x").await.unwrap();
    let (mut one, mut two) = (open(&door, "/subscribe").await, open(&door, "/subscribe").await);
    one.send(Message::text("Keepalive ping")).await.unwrap();
    door.nkv.put("bytes", vec![0xff]).await.unwrap();
    door.nkv.put("k", "<v>").await.unwrap();
    door.nkv.delete("before").await.unwrap();
    let set = door.send("POST", "/set", &[], br#"{"Key":"n","Value":"1"}"#).await;
    assert_eq!(set.status, 200);
    for socket in [&mut one, &mut two] {
        for (offset, value) in [(3, "k: \\u003cv\\u003e"), (5, "n: 1")] {
            let record = next(socket).await;
            let expected = format!(
                "{{\"Topic\":\"command-log\",\"Partition\":0,\"Offset\":{offset},\
                 \"Key\":\"Client address=unknown\",\"Value\":\"{value}\"}}\n"
            );
            assert_eq!(record.to_text().unwrap(), expected);
        }
    }
}
