//! Peers that announce, begin, or ask, and then stand still: what is held for them is bounded, and others are served.

mod support;

use std::time::Duration;

use http::Request;
use nkv_http::Options;
use nkv_node::Limits;
use support::{PATIENCE, TestDoor};
use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, sleep, timeout};

fn stall_soon() -> Options {
    let mut options = Options::default();
    options.stall_limit = Duration::from_millis(500);
    options
}

#[tokio::test]
async fn streams_of_http2_that_are_never_read_end_and_their_connection_lives() {
    let door = TestDoor::with(stall_soon(), Limits::default()).await;
    for n in 0..300 {
        door.nkv.put(format!("k.{n}"), vec![b'x'; 10_000]).await.unwrap();
    }
    let (client, connection) = h2::client::Builder::new()
        .initial_window_size(0)
        .handshake::<_, bytes::Bytes>(door.connect().await)
        .await
        .unwrap();
    tokio::spawn(async move { drop(connection.await) });
    let get = |path: &str| {
        let request = Request::get(format!("http://{}{path}", door.address)).body(()).expect("a request");
        let mut client = client.clone();
        async move {
            client = client.ready().await.expect("a stream");
            client.send_request(request, true).expect("sent").0.await.expect("an answer")
        }
    };
    let mut unread = Vec::new();
    for path in ["/v1/kv", "/v1/kv/k.1", "/v1/watch?pattern=*", "/getall", "/v1/stats", "/v1/kv?format=ndjson"] {
        unread.push(timeout(PATIENCE, get(path)).await.expect("a head"));
    }
    door.nkv.keep_figures();
    assert!(door.nkv.figures().unwrap().unwrap().queued_bytes > 3_000_000, "the list waits");
    door.nothing_is_held().await;
    timeout(PATIENCE, async {
        while door.nkv.stats().await.unwrap().subscriptions > 0 {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("the watch is gone too");
    // The connection lives.
    let head = Request::head(format!("http://{}/v1/kv/k.1", door.address)).body(()).unwrap();
    let mut ready = client.clone().ready().await.unwrap();
    assert_eq!(ready.send_request(head, true).unwrap().0.await.unwrap().status(), 200);
    drop(unread);
}

/// Room is for what comes, not for what is announced.
#[tokio::test]
async fn a_client_that_announces_and_sends_nothing_keeps_no_other_waiting() {
    let mut limits = Limits::default();
    limits.queued_max = 16 << 20;
    let door = TestDoor::with(Options::default(), limits).await;
    let mut silent = Vec::new();
    for _ in 0..40 {
        let mut stream = door.connect().await;
        let head = format!("PUT /v1/kv/k HTTP/1.1\r\nHost: {}\r\nContent-Length: 1000000\r\n\r\n", door.address);
        stream.write_all(head.as_bytes()).await.unwrap();
        silent.push(stream);
    }
    sleep(Duration::from_millis(100)).await;
    let start = Instant::now();
    let put = door.send("PUT", "/v1/kv/other", &[], &vec![b'x'; 500_000]).await;
    assert_eq!(put.status, 200);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

/// What is made for many is counted while it is made.
#[tokio::test]
async fn many_long_answers_that_are_not_read_are_bounded_together() {
    let mut limits = Limits::default();
    limits.queued_max = 32 << 20;
    let door = TestDoor::with(stall_soon(), limits).await;
    for n in 0..1_000 {
        door.nkv.put(format!("k.{n}"), vec![b'x'; 10_000]).await.unwrap();
    }
    door.nkv.keep_figures();
    let mut unread = Vec::new();
    for n in 0..12 {
        let path = ["/v1/kv?limit=10000", "/getall", "/v1/watch?pattern=*&wait=1s"][n % 3];
        let mut stream = door.connect().await;
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: {}\r\n\r\n", door.address).as_bytes()).await.unwrap();
        unread.push(stream);
    }
    let mut most = 0;
    for _ in 0..100 {
        most = most.max(door.nkv.figures().unwrap().unwrap().queued_bytes);
        sleep(Duration::from_millis(20)).await;
    }
    assert!(most > 5 << 20, "some wait: {most}");
    assert!(most < 64 << 20, "{} MiB for unread answers", most >> 20);
    drop(unread);
    door.nothing_is_held().await;
}

/// Clients that read at once do not keep each other waiting.
#[tokio::test]
async fn many_who_read_at_once_are_served_soon() {
    let mut limits = Limits::default();
    limits.queued_max = 8 << 20;
    let door = std::sync::Arc::new(TestDoor::with(Options::default(), limits).await);
    for n in 0..10 {
        door.nkv.put(format!("k.{n}"), vec![b'x'; 100_000]).await.unwrap();
    }
    let readers: Vec<_> = (0..40)
        .map(|n| {
            let (door, path) = (std::sync::Arc::clone(&door), ["/v1/kv", "/getall"][n % 2]);
            tokio::spawn(async move { door.get(path).await })
        })
        .collect();
    let all = async {
        for reader in readers {
            let reply = reader.await.unwrap();
            assert!(reply.status == 200 && reply.is_whole && reply.body.len() > 1_000_000, "{}", reply.head);
        }
    };
    timeout(PATIENCE, all).await.expect("all are served");
}

#[tokio::test]
async fn what_becomes_too_long_by_escaping_is_refused_and_delays_no_other_client() {
    let mut limits = Limits::default();
    limits.value_len_max = 8 << 20;
    let door = TestDoor::with(Options::default(), limits).await;
    for n in 0..2 {
        door.nkv.put(format!("k.{n}"), vec![b'<'; 7 << 20]).await.unwrap();
    }
    assert_eq!(door.get("/getall").await.status, 413);
    let many = format!("[{}]", "{},".repeat(100_000).trim_end_matches(','));
    assert_eq!(door.send("POST", "/v1/batch", &[], many.as_bytes()).await.status, 413);
    let many = format!("[{}]", "{\"delete\":{\"key\":\"a\"}},".repeat(10_001).trim_end_matches(','));
    assert_eq!(door.send("POST", "/v1/batch", &[], many.as_bytes()).await.status, 413);
}

/// HTTP/2 lets a peer take a request back at once and ask again, past any limit of streams that are open.
#[tokio::test]
async fn requests_that_are_taken_back_as_fast_as_they_come_keep_no_other_client_from_being_served() {
    let door = TestDoor::start().await;
    door.put("k", &"x".repeat(100_000)).await;
    let (client, connection) = h2::client::handshake(door.connect().await).await.unwrap();
    let connection = tokio::spawn(connection);
    for n in 0..5_000 {
        let Ok(Ok(mut client)) = timeout(PATIENCE, client.clone().ready()).await else { break };
        let path = ["/v1/kv/k", "/v1/kv", "/v1/watch?pattern=*"][n % 3];
        let request = Request::get(format!("http://{}{path}", door.address)).body(()).unwrap();
        let Ok((_, mut stream)) = client.send_request(request, false) else { break };
        stream.send_data(bytes::Bytes::new(), true).ok();
        stream.send_reset(h2::Reason::CANCEL);
        if n % 500 == 0 {
            assert_eq!(door.get("/v1/kv/k").await.status, 200);
        }
    }
    assert_eq!(door.get("/v1/kv/k").await.status, 200);
    connection.abort();
    door.nkv.keep_figures();
    door.nothing_is_held().await;
}

#[tokio::test]
async fn a_flood_of_header_fields_is_refused_and_others_are_served() {
    let door = TestDoor::start().await;
    door.put("k", "x").await;
    let (client, connection) = h2::client::handshake(door.connect().await).await.unwrap();
    let connection = tokio::spawn(connection);
    for _ in 0..20 {
        let Ok(Ok(mut client)) = timeout(PATIENCE, client.clone().ready()).await else { break };
        let flood = (0..40).fold(Request::get(format!("http://{}/v1/kv/k", door.address)), |request, n| {
            request.header(format!("x-flood-{n}"), "x".repeat(1_000))
        });
        let Ok((answer, _)) = client.send_request(flood.body(()).unwrap(), true) else { break };
        // A status, or the end of the stream or of all.
        assert!(timeout(PATIENCE, answer).await.unwrap().map_or(true, |answer| answer.status() == 431));
        assert_eq!(door.get("/v1/kv/k").await.status, 200);
    }
    connection.abort();
}
