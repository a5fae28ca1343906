//! Peers that send too much, too slowly or nonsense, or take nothing: a clear end, bounded memory, and others are served.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::Bytes;
use common::{Server, code, put, timely, until, up_to_synced, watch};
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, Request};
use nkv_grpc::Options;
use nkv_grpc::v1::{GetRequest, Operation, WatchRequest, WriteRequest, operation};
use nkv_node::Node;
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::Code;

type Sender = SendRequest<Bytes>;

/// A client that does as a test says, with windows so large that they limit nothing.
async fn raw(server: &Server) -> (Sender, tokio::task::JoinHandle<Result<(), h2::Error>>) {
    let stream = TcpStream::connect(server.address).await.unwrap();
    let mut builder = h2::client::Builder::new();
    builder.initial_window_size(65_535).initial_connection_window_size(1 << 30);
    let (sender, connection) = builder.handshake(stream).await.unwrap();
    (sender, tokio::spawn(connection))
}

fn request(path: &str) -> http::request::Builder {
    let uri = format!("http://localhost{path}");
    Request::post(uri).header("content-type", "application/grpc").header("te", "trailers")
}

async fn open(sender: &mut Sender, path: &str) -> (ResponseFuture, SendStream<Bytes>) {
    let mut ready = timely(sender.clone().ready()).await.unwrap();
    ready.send_request(request(path).body(()).unwrap(), false).unwrap()
}

fn message(message: &impl Message) -> Bytes {
    announced(message.encoded_len(), &message.encode_to_vec())
}

/// A message that announces a length, and `bytes` of it.
fn announced(len: usize, bytes: &[u8]) -> Bytes {
    [&[0][..], &(len as u32).to_be_bytes(), bytes].concat().into()
}

/// The status of an answer, from its headers or its trailers.
async fn status(answer: ResponseFuture) -> Code {
    let answer = timely(answer).await.unwrap();
    assert_eq!(answer.headers()["content-type"], "application/grpc");
    let of = |headers: &HeaderMap| headers.get("grpc-status").map(|status| Code::from_bytes(status.as_bytes()));
    if let Some(code) = of(answer.headers()) {
        return code;
    }
    let mut body: RecvStream = answer.into_body();
    while let Some(data) = timely(body.data()).await {
        let len = data.unwrap().len();
        body.flow_control().release_capacity(len).unwrap();
    }
    of(&timely(body.trailers()).await.unwrap().unwrap()).unwrap()
}

async fn is_served(server: &Server) {
    let mut client = server.client().await;
    timely(client.put(put("served", "x"))).await.unwrap();
}

fn options(change: impl FnOnce(&mut Options)) -> Options {
    let mut options = Options::default();
    change(&mut options);
    options
}

#[tokio::test]
async fn a_message_that_is_too_long_is_refused_by_its_first_bytes() {
    let server = Server::start().await;
    let (mut sender, _connection) = raw(&server).await;
    for (path, len) in [("Put", (1 << 20) + (64 << 10) + 1), ("Write", (8 << 20) + 1), ("Get", 1 << 30)] {
        let (answer, mut body) = open(&mut sender, &format!("/nkv.v1.Kv/{path}")).await;
        body.send_data(announced(len, b"begun"), false).unwrap();
        assert_eq!(status(answer).await, Code::ResourceExhausted, "{path}");
    }
    // A value at the limit, and one past it.
    let mut client = server.client().await;
    client.put(put("a", vec![0; 1 << 20])).await.unwrap();
    assert_eq!(code(client.put(put("a", vec![0; (1 << 20) + 1])).await), Code::ResourceExhausted);
    let ops = |count| {
        (0..count).map(|n| Operation {
            operation: Some(operation::Operation::Put(put(&format!("k{n}"), vec![0; 1_000_000]))),
        })
    };
    assert_eq!(
        client.write(WriteRequest { operations: ops(8).collect() }).await.unwrap().into_inner().outcomes.len(),
        8
    );
    assert_eq!(code(client.write(WriteRequest { operations: ops(9).collect() }).await), Code::ResourceExhausted);
}

#[tokio::test]
async fn nonsense_has_a_status_and_the_connection_lives() {
    let server = Server::start().await;
    let (mut sender, _connection) = raw(&server).await;
    // No message; half of one; one that is none; one that is compressed; two.
    let one = message(&GetRequest { key: "a".into() });
    for (bytes, is_ok) in [
        (Bytes::new(), false),
        (one.slice(..7), false),
        (announced(3, b"\xff\xff\xff"), false),
        (Bytes::from([&[1][..], &one[1..]].concat()), false),
        (one.clone(), true),
    ] {
        let (answer, mut body) = open(&mut sender, "/nkv.v1.Kv/Get").await;
        body.send_data(bytes.clone(), true).unwrap();
        let code = status(answer).await;
        assert_eq!(code == Code::NotFound, is_ok, "{code:?} {bytes:?}");
    }
    for path in ["/nkv.v1.Kv/Nothing", "/nkv.v2.Kv/Get", "/"] {
        let (answer, mut body) = open(&mut sender, path).await;
        body.send_data(one.clone(), true).unwrap();
        assert_eq!(status(answer).await, Code::Unimplemented, "{path}");
    }
    for (content_type, expected) in [
        ("application/grpc+proto", 200),
        ("application/grpc;charset=utf-8", 200),
        ("application/grpc-web", 415),
        ("text/html", 415),
    ] {
        let request = Request::post("http://localhost/nkv.v1.Kv/Get").header("content-type", content_type);
        let mut ready = timely(sender.clone().ready()).await.unwrap();
        let (answer, mut body) = ready.send_request(request.body(()).unwrap(), false).unwrap();
        drop(body.send_data(one.clone(), true));
        assert_eq!(timely(answer).await.unwrap().status(), expected, "{content_type}");
    }
}

#[tokio::test]
async fn a_request_that_does_not_become_whole_ends_in_time() {
    let server = Server::with(options(|options| options.request_limit = Duration::from_millis(200))).await;
    let (mut sender, _connection) = raw(&server).await;
    let one = message(&GetRequest { key: "a".into() });
    let mut bodies = Vec::new();
    // Nothing; a part; the whole, without an end.
    for bytes in [Bytes::new(), one.slice(..6), one.clone()] {
        let (answer, mut body) = open(&mut sender, "/nkv.v1.Kv/Get").await;
        body.send_data(bytes, false).unwrap();
        assert_eq!(status(answer).await, Code::DeadlineExceeded);
        bodies.push(body);
    }
    let (answer, mut body) = open(&mut sender, "/nkv.v1.Kv/Get").await;
    body.send_data(one, true).unwrap();
    assert_eq!(status(answer).await, Code::NotFound);
}

#[tokio::test]
async fn of_those_that_fill_the_budget_with_requests_that_never_end_one_is_closed_and_others_are_served() {
    let server = Server::with_limits(|limits| limits.queued_max = 32 << 20).await;
    let part = Bytes::from([&announced(16_000, b"")[..], &[0; 15_000]].concat());
    let mut kept = Vec::new();
    for _ in 0..4 {
        let (sender, connection) = raw(&server).await;
        for _ in 0..1_000 {
            let Ok(mut ready) = timely(sender.clone().ready()).await else { break };
            let put = request("/nkv.v1.Kv/Put").body(()).unwrap();
            let Ok((answer, mut body)) = ready.send_request(put, false) else { break };
            drop(body.send_data(part.clone(), false));
            kept.push((answer, body));
            tokio::task::yield_now().await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(sender);
        tokio::spawn(connection);
    }
    until(|| server.handle().peers().unwrap().len() < 4).await;
    is_served(&server).await;
}

// Long requests have room before they are read: a peer that never ends them holds no more than that.
#[tokio::test]
async fn long_requests_that_never_end_hold_the_room_of_long_requests_at_most() {
    let server = Server::with_limits(|limits| limits.queued_max = 32 << 20).await;
    let (sender, _connection) = raw(&server).await;
    let part = Bytes::from([&announced(1_000_000, b"")[..], &vec![0; 900_000]].concat());
    let mut kept = Vec::new();
    for _ in 0..60 {
        let mut ready = timely(sender.clone().ready()).await.unwrap();
        let put = request("/nkv.v1.Kv/Put").body(()).unwrap();
        let (answer, mut body) = ready.send_request(put, false).unwrap();
        body.send_data(part.clone(), false).unwrap();
        kept.push((answer, body));
    }
    // Eight have room, 48 wait, and the others are refused.
    let mut refused = 0;
    for (answer, body) in kept.drain(56..) {
        assert_eq!(status(answer).await, Code::ResourceExhausted);
        refused += 1;
        drop(body);
    }
    assert_eq!(refused, 4);
    // Short ones need none.
    is_served(&server).await;
    // A long one of another waits until the slowest is closed, which is soon.
    let mut client = server.client().await;
    timely(client.put(put("a", vec![0; 1_000_000]))).await.unwrap();
}

#[tokio::test]
async fn many_long_requests_wait_for_room_and_all_are_done() {
    // Room for eight of a MiB at a time.
    let server = Server::with_limits(|limits| limits.queued_max = 32 << 20).await;
    let mut calls = tokio::task::JoinSet::new();
    let client = server.client().await;
    for n in 0..20 {
        let mut client = client.clone();
        calls.spawn(async move { client.put(put(&format!("k.{n}"), vec![0; 1_000_000])).await });
    }
    while let Some(done) = timely(calls.join_next()).await {
        done.unwrap().unwrap();
    }
    assert_eq!(server.handle().list("k.*").await.unwrap().len(), 20);
}

#[tokio::test]
async fn answers_that_the_peer_does_not_take_are_bounded_and_cut_in_the_end() {
    let server = Server::with(options(|options| options.stall_limit = Duration::from_secs(2))).await;
    server.handle().put("a", vec![0; 1_000_000]).await.unwrap();
    let (mut sender, connection) = raw(&server).await;
    let one = message(&GetRequest { key: "a".into() });
    let mut answers = Vec::new();
    for _ in 0..100 {
        let (answer, mut body) = open(&mut sender, "/nkv.v1.Kv/Get").await;
        body.send_data(one.clone(), true).unwrap();
        answers.push((answer, body));
    }
    let waiting = server.handle().budget().waiting();
    until(|| waiting.load(Relaxed) > 1_000_000).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let held = waiting.load(Relaxed);
    assert!(held < 8 << 20, "{held} bytes of answers are held");
    is_served(&server).await;
    timely(connection).await.unwrap().ok();
    until(|| waiting.load(Relaxed) == 0).await;
    drop(answers);
}

// A batch whose stream is reset may be stored or not; whatever it is, it is seen, and nothing stays taken.
#[tokio::test]
async fn a_reset_in_the_middle_of_a_batch_loses_nothing_and_leaves_nothing_taken() {
    let server = Server::start().await;
    let (mut client, nkv) = (server.client().await, server.handle());
    let mut watched = client.watch(watch(&["batch"])).await.unwrap().into_inner();
    up_to_synced(&mut watched).await;
    let (mut sender, _connection) = raw(&server).await;
    for round in 0..200_u64 {
        let op =
            |n| Operation { operation: Some(operation::Operation::Put(put(&format!("batch.{n}"), round.to_string()))) };
        let bytes = message(&WriteRequest { operations: (0..20).map(op).collect() });
        let (answer, mut body) = open(&mut sender, "/nkv.v1.Kv/Write").await;
        body.send_data(bytes, true).unwrap();
        tokio::time::sleep(Duration::from_micros(round % 6 * 200)).await;
        body.send_reset(Reason::CANCEL);
        drop(answer);
    }
    // The connection serves on, and the subscriber knows what there is.
    let (answer, mut body) = open(&mut sender, "/nkv.v1.Kv/Put").await;
    body.send_data(message(&put("batch.end", "")), true).unwrap();
    assert_eq!(status(answer).await, Code::Ok);
    let mut known = std::collections::BTreeMap::new();
    loop {
        let nkv_grpc::v1::watch_response::Event::Put(put) = common::next(&mut watched).await else { panic!("no put") };
        if put.key == "batch.end" {
            break;
        }
        known.insert(put.key, put.value);
    }
    let stored = nkv.get_all("batch.*").await.unwrap().into_iter();
    let stored: std::collections::BTreeMap<_, _> = stored
        .filter(|entry| entry.key.as_str() != "batch.end")
        .map(|entry| (entry.key.to_string(), entry.value))
        .collect();
    assert_eq!(known, stored);
    // Batches are whole.
    assert_eq!(stored.values().collect::<std::collections::BTreeSet<_>>().len().max(1), 1, "{stored:?}");
    assert_eq!(nkv.budget().waiting().load(Relaxed), 0);
    assert!(nkv.try_room(64 << 20).is_some() && nkv.try_arrival(64 << 20).is_some());
}

#[tokio::test]
async fn streams_that_are_reset_as_fast_as_they_come_keep_no_other_client_from_being_served() {
    let server = Server::start().await;
    let (sender, connection) = raw(&server).await;
    let mut others = server.client().await;
    let one = message(&GetRequest { key: "a".into() });
    for n in 0..5_000 {
        let Ok(mut ready) = timely(sender.clone().ready()).await else { break };
        let Ok((_, mut body)) = ready.send_request(request("/nkv.v1.Kv/Get").body(()).unwrap(), false) else { break };
        drop(body.send_data(one.clone(), true));
        body.send_reset(Reason::CANCEL);
        if n % 500 == 0 {
            timely(others.put(put("b", "x"))).await.unwrap();
        }
    }
    timely(others.put(put("b", "x"))).await.unwrap();
    drop((sender, connection));
}

#[tokio::test]
async fn a_flood_of_metadata_is_refused_and_others_are_served() {
    let server = Server::start().await;
    let (sender, _connection) = raw(&server).await;
    let mut others = server.client().await;
    for _ in 0..20 {
        let Ok(mut ready) = timely(sender.clone().ready()).await else { break };
        let flood = request("/nkv.v1.Kv/Get").header("x-flood", "x".repeat(20_000)).body(()).unwrap();
        let Ok((answer, _body)) = ready.send_request(flood, true) else { break };
        // A status of HTTP, or the end of the stream or of all.
        assert!(timely(answer).await.map_or(true, |answer| answer.status() == 431));
        timely(others.put(put("b", "x"))).await.unwrap();
    }
}

#[tokio::test]
async fn connections_beyond_the_limit_are_refused_and_a_free_place_is_given_again() {
    let server = Server::with(options(|options| options.connections = nkv_node::ConnectionLimit::new(1, 1))).await;
    let mut client = server.client().await;
    client.put(put("a", "x")).await.unwrap();
    let mut refused = TcpStream::connect(server.address).await.unwrap();
    let mut bytes = Vec::new();
    timely(refused.read_to_end(&mut bytes)).await.unwrap();
    assert_eq!(bytes[..9], [0, 0, 0, 4, 0, 0, 0, 0, 0]);
    assert_eq!((bytes[12], &bytes[22..26]), (7, &[0, 0, 0, 11][..]));
    assert_eq!(&bytes[26..], b"too many connections: 1 is the limit");
    drop(client);
    timely(async {
        loop {
            let mut client = server.client().await;
            if client.put(put("a", "y")).await.is_ok() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn what_is_not_http2_is_closed_and_so_is_one_that_says_nothing_or_idles() {
    let server = Server::with(options(|options| {
        options.first_byte_limit = Duration::from_millis(200);
        options.stall_limit = Duration::from_millis(800);
        options.idle_limit = Some(Duration::from_millis(300));
    }))
    .await;
    for begin in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\x16\x03\x01", b"PRI * HTTP/2.0\r\n\r\nXX", b"PRI", b""] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(begin).await.unwrap();
        let mut bytes = Vec::new();
        // Closed, or reset as something was not read.
        drop(timely(stream.read_to_end(&mut bytes)).await);
        assert!(bytes.is_empty());
    }
    let (mut sender, connection) = raw(&server).await;
    let (answer, mut body) = open(&mut sender, "/nkv.v1.Kv/Get").await;
    body.send_data(message(&GetRequest { key: "a".into() }), true).unwrap();
    assert_eq!(status(answer).await, Code::NotFound);
    timely(connection).await.unwrap().unwrap();
}

// A socket that is full is no sign that a peer is dead, but one that stays full is.
#[tokio::test]
async fn a_peer_that_reads_nothing_from_its_socket_is_sent_nothing_ahead_and_cut_in_the_end() {
    let server = Server::with(options(|options| options.stall_limit = Duration::from_secs(4))).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    // Settings with a window of 2^31 - 1 for each stream, and the same for the connection.
    stream.write_all(&[0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 4, 0x7f, 0xff, 0xff, 0xff]).await.unwrap();
    stream.write_all(&[0, 0, 4, 8, 0, 0, 0, 0, 0, 0x7f, 0xff, 0, 0]).await.unwrap();
    // A watch: headers without compression, then the message.
    let mut block = Vec::new();
    let headers = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/nkv.v1.Kv/Watch"),
        (":authority", "x"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    for (name, value) in headers {
        block.extend_from_slice(&[0, name.len() as u8]);
        block.extend_from_slice(name.as_bytes());
        block.push(value.len() as u8);
        block.extend_from_slice(value.as_bytes());
    }
    let data = message(&WatchRequest { changes_only: true, ..watch(&["*"]) });
    for (kind, flags, payload) in [(1, 4, &block[..]), (0, 1, &data[..])] {
        stream.write_all(&[0, 0, payload.len() as u8, kind, flags, 0, 0, 0, 1]).await.unwrap();
        stream.write_all(payload).await.unwrap();
    }
    let nkv = server.handle();
    until(|| nkv.numbers().unwrap().contains(&("subscriptions", 1))).await;
    let value = Bytes::from(vec![0; 1_000_000]);
    for n in 0..100 {
        nkv.put(format!("k.{n}"), &value).await.unwrap();
    }
    // The windows are open, but the sockets hold some megabytes only: the rest waits in the mailbox.
    let queued = nkv.peers().unwrap()[0].backlog.queued;
    assert!(queued > 70, "{queued} of 100 changes wait");
    until(|| nkv.peers().unwrap().is_empty() && nkv.numbers().unwrap().contains(&("subscriptions", 0))).await;
    is_served(&server).await;
}

#[tokio::test]
async fn a_node_of_one_thread_serves_others_while_a_large_state_is_sent() {
    let server = Server::of(Node::builder().start().await.unwrap(), Options::default()).await;
    let (mut client, nkv) = (server.client().await, server.handle());
    for n in 0..50 {
        nkv.put(format!("k.{n}"), vec![0; 1_000_000]).await.unwrap();
    }
    let mut watched = client.watch(watch(&["k"])).await.unwrap().into_inner();
    let reading = tokio::spawn(async move { up_to_synced(&mut watched).await.len() });
    let mut other = server.client().await;
    for _ in 0..20 {
        timely(other.get(GetRequest { key: "k.1".into() })).await.unwrap();
    }
    assert_eq!(timely(reading).await.unwrap(), 52);
}
