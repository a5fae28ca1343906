//! REST as HTTP means it, with what goes wrong on the way.

mod support;

use std::time::Duration;

use nkv_http::Options;
use nkv_node::{ConnectionLimit, Limits, Pattern};
use support::{Reply, TestDoor};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep, timeout};

#[tokio::test]
async fn a_value_comes_back_as_it_went_and_is_never_a_page() {
    let door = TestDoor::start().await;
    let value = b"<script>\0\xff</script>";
    let put = door.send("PUT", "/v1/kv/a.b?ttl=30s", &[("Content-Type", "text/html")], value).await;
    assert_eq!((put.status, put.header("nkv-revision")), (200, Some("1".into())));
    assert_eq!(put.text(), "{\"key\":\"a.b\",\"revision\":1,\"ttl_ms\":30000}\n");
    let get = door.get("/v1/kv/a.b").await;
    assert_eq!((get.status, &get.body[..]), (200, &value[..]));
    assert_eq!(get.header("content-type").as_deref(), Some("application/octet-stream"));
    assert_eq!(get.header("x-content-type-options").as_deref(), Some("nosniff"));
    assert_eq!(get.header("content-security-policy").as_deref(), Some("default-src 'none'; sandbox"));
    assert_eq!(get.header("cache-control").as_deref(), Some("no-cache"));
    assert_eq!(get.header("etag"), put.header("etag"));
    let left: u64 = get.header("nkv-ttl-ms").unwrap().parse().unwrap();
    assert!(left > 10_000 && left <= 30_000, "{left}");
    let head = door.send("HEAD", "/v1/kv/a.b", &[], b"").await;
    assert_eq!((head.status, head.body.len(), head.header("content-length")), (200, 0, Some("19".into())));
    let gone = door.get("/v1/kv/a.c").await;
    assert_eq!((gone.status, gone.problem()), (404, "not-found".into()));
    let deleted = door.send("DELETE", "/v1/kv/a.b", &[], b"").await;
    assert_eq!((deleted.status, deleted.text()), (200, "{\"count\":1,\"revision\":2}\n".into()));
    assert_eq!(door.send("DELETE", "/v1/kv/a.b", &[], b"").await.status, 404);
}

#[tokio::test]
async fn only_the_strong_present_tag_writes() {
    let door = TestDoor::start().await;
    door.put("k", "1").await;
    let stale = door.get("/v1/kv/k").await.header("etag").unwrap();
    door.put("k", "2").await;
    let present = door.get("/v1/kv/k").await.header("etag").unwrap();
    let weak = format!("W/{present}");
    let list = format!("\"x\", {stale}");
    let both = [("If-Match", present.as_str()), ("If-None-Match", "*")];
    let twice = [("If-Match", stale.as_str()), ("If-Match", "\"y\"")];
    for (headers, key, status) in [
        (&[("If-Match", stale.as_str())][..], "k", 412),
        (&[("If-Match", "2")], "k", 400),
        (&[("If-Match", present.trim_matches('"'))], "k", 400),
        (&[("If-Match", weak.as_str())], "k", 412),
        (&[("If-Match", "")], "k", 400),
        (&[("If-Match", list.as_str())], "k", 412),
        (&[("If-Match", "*")], "absent", 412),
        (&both, "k", 412),
        (&twice, "k", 412),
        (&[("If-None-Match", "*")], "k", 412),
        (&[("If-None-Match", present.as_str())], "k", 412),
        (&[("If-Unmodified-Since", "Tue, 01 Dec 2026 00:00:00 GMT")], "k", 400),
        (&[("if-match", "\"2\"")], "k", 412),
    ] {
        for method in ["PUT", "DELETE"] {
            let reply = door.send(method, &format!("/v1/kv/{key}"), headers, b"9").await;
            assert_eq!(reply.status, status, "{method} {headers:?}: {reply:?}");
            if status == 412 && key == "k" {
                assert_eq!(reply.header("etag").as_deref(), Some(present.as_str()), "the present tag");
            }
        }
    }
    let weak = door.send("PUT", "/v1/kv/k", &[("If-Match", &weak)], b"9").await;
    assert!(weak.text().contains("weak"), "{}", weak.text());
    assert_eq!(door.get("/v1/kv/k").await.text(), "2");
    assert_eq!(door.nkv.revision().get(), 2);

    // What holds, writes.
    let list = format!("\"x\", {present}");
    assert_eq!(door.send("PUT", "/v1/kv/k", &[("If-Match", &list)], b"3").await.status, 200);
    assert_eq!(door.send("PUT", "/v1/kv/new", &[("If-None-Match", "*")], b"1").await.status, 200);
    assert_eq!(door.send("PUT", "/v1/kv/new", &[("If-Match", "*")], b"2").await.status, 200);
    assert_eq!(door.send("DELETE", "/v1/kv/new", &[("If-None-Match", "\"x\"")], b"").await.status, 200);

    // A read that has it already gets nothing.
    let present = door.get("/v1/kv/k").await.header("etag").unwrap();
    let cached = door.send("GET", "/v1/kv/k", &[("If-None-Match", &format!("W/{present}"))], b"").await;
    assert_eq!((cached.status, cached.body.len(), cached.header("etag")), (304, 0, Some(present)));
    assert_eq!(door.send("GET", "/v1/kv/k", &[("If-Match", "\"x\"")], b"").await.status, 412);
}

#[tokio::test]
async fn of_many_who_write_by_tag_one_is_the_first_each_time() {
    let door = std::sync::Arc::new(TestDoor::start().await);
    door.put("n", "0").await;
    let tasks: Vec<_> = (0..4)
        .map(|_| {
            let door = std::sync::Arc::clone(&door);
            tokio::spawn(async move {
                for _ in 0..25 {
                    loop {
                        let read = door.get("/v1/kv/n").await;
                        let next = (read.text().parse::<u64>().unwrap() + 1).to_string();
                        let tag = read.header("etag").unwrap();
                        let written = door.send("PUT", "/v1/kv/n", &[("If-Match", &tag)], next.as_bytes()).await;
                        if written.status == 200 {
                            break;
                        }
                        assert_eq!(written.status, 412);
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(door.get("/v1/kv/n").await.text(), "100");
}

#[tokio::test]
async fn what_is_misspelt_or_given_twice_is_named_and_nothing_is_done() {
    let door = TestDoor::start().await;
    door.put("a", "1").await;
    for (method, path, named) in [
        ("PUT", "/v1/kv/a?if_revision=1", "if_revision"),
        ("PUT", "/v1/kv/a?tll=1s", "tll"),
        ("PUT", "/v1/kv/a?ttl=1s&ttl=2s", "ttl"),
        ("PUT", "/v1/kv/a?ttl=30", "ttl"),
        ("PUT", "/v1/kv/a?ttl=0s", "ttl"),
        ("DELETE", "/v1/kv?pattern=a&pattern=b", "pattern"),
        ("DELETE", "/v1/kv", "pattern"),
        ("DELETE", "/v1/kv?pattern=a&limit=1", "limit"),
        ("GET", "/v1/kv?limit=0", "limit"),
        ("GET", "/v1/kv?limit=-1", "limit"),
        ("GET", "/v1/kv?limit=10001", "limit"),
        ("GET", "/v1/kv?values=no", "values"),
        ("GET", "/v1/kv/a?x=1", "x"),
        ("GET", "/v1/watch", "pattern"),
        ("GET", "/v1/stats?x", "x"),
    ] {
        let reply = door.send(method, path, &[], b"").await;
        assert_eq!(reply.status, 400, "{path}: {reply:?}");
        assert!(reply.json()["detail"].as_str().unwrap().contains(named), "{path}: {}", reply.text());
    }
    for (batch, named) in [
        (r#"[{"put":{"key":"a","value":"x","if_revison":1}}]"#, "if_revison"),
        (r#"[{"put":{"key":"a","value":"x","if_revision":1,"if_revision":2}}]"#, "if_revision"),
        (r#"[{"put":{"key":"a","value":"x","if_revision":null}}]"#, "null"),
        (r#"[{"put":{"key":"a","value":"x","revision":1}}]"#, "revision"),
        (r#"[{"put":{"key":"a"}}]"#, "value"),
        (r#"[{"put":{"key":"a","value":"x","value_base64":""}}]"#, "value"),
        (r#"[{"put":{"key":"a","value":"x"},"delete":{"key":"a"}}]"#, "one of"),
        (r#"[{"put":{"key":"a","value":"x"}},{"delet":{"key":"a"}}]"#, "delet"),
        (r#"[{"put":{"key":"b","value":"x"}},{"put":{"key":"a..b","value":"x"}}]"#, "write 1"),
        (r#"[{"delete":{"key":"a.*","if_revision":1}}]"#, "wildcard"),
        (r#"{"put":{"key":"a","value":"x"}}"#, "array"),
        ("", "array"),
    ] {
        let reply = door.send("POST", "/v1/batch", &[], batch.as_bytes()).await;
        assert_eq!(reply.status, 400, "{batch}: {reply:?}");
        assert!(reply.json()["detail"].as_str().unwrap().contains(named), "{batch}: {}", reply.text());
    }
    assert_eq!((door.nkv.revision().get(), door.get("/v1/kv/a").await.text()), (1, "1".into()));
}

#[tokio::test]
async fn each_key_is_reached_and_no_neighbour_of_it() {
    let door = TestDoor::start().await;
    for (path, key) in [
        ("a//b", "a//b"),
        ("a/./b", "a/./b"),
        ("x/", "x/"),
        ("..", ""),
        ("a%2Fb", "a/b"),
        ("a%252Fb", "a%2Fb"),
        ("a+b", "a+b"),
        ("%C3%BC", "\u{fc}"),
        ("a..b", ""),
        ("", ""),
        ("a.*", ""),
        ("*", ""),
        ("%ff", ""),
        ("a%2", ""),
    ] {
        let reply = door.send("PUT", &format!("/v1/kv/{path}"), &[], key.as_bytes()).await;
        if key.is_empty() {
            assert_eq!(reply.status, 400, "{path}: {reply:?}");
            continue;
        }
        assert_eq!(reply.status, 200, "{path}: {reply:?}");
        assert_eq!(reply.json()["key"], key, "{path}");
        assert_eq!(door.get(&format!("/v1/kv/{path}")).await.text(), key, "{path}");
    }
    assert_eq!(door.nkv.list(Pattern::All).await.unwrap().len(), 7);
}

#[tokio::test]
async fn many_entries_come_in_pages_and_as_lines() {
    let door = TestDoor::start().await;
    for n in 0..2_500 {
        door.nkv.put(format!("a.{n:04}"), format!("{n}")).await.unwrap();
    }
    door.nkv.put("b", vec![0xff]).await.unwrap();
    let (mut keys, mut after) = (Vec::new(), String::new());
    loop {
        let page = door.get(&format!("/v1/kv?pattern=a.*&after={after}")).await.json();
        let entries = page["entries"].as_array().unwrap().clone();
        assert!(entries.len() <= 1_000);
        keys.extend(entries.iter().map(|entry| entry["key"].as_str().unwrap().to_owned()));
        assert_eq!(page["revision"], 2_501);
        if page["more"] == false {
            break;
        }
        after = keys.last().unwrap().clone();
    }
    assert_eq!((keys.len(), keys[2_499].as_str()), (2_500, "a.2499"));
    let all = door.get("/v1/kv?limit=10000&values=false").await.json();
    assert_eq!((all["entries"].as_array().unwrap().len(), &all["more"]), (2_501, &false.into()));
    assert_eq!(all["entries"][0], serde_json::json!({"key": "a.0000", "revision": 1}));
    let lines = door.send("GET", "/v1/kv", &[("Accept", "application/x-ndjson")], b"").await;
    assert!(lines.is_whole);
    let lines: Vec<serde_json::Value> = lines.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2_501);
    assert_eq!(lines[2_500], serde_json::json!({"key": "b", "value_base64": "/w==", "revision": 2_501}));
    assert_eq!(door.get("/v1/kv?format=ndjson&limit=3").await.text().lines().count(), 3);
    let coded = door.send("GET", "/v1/kv?limit=10000", &[("Accept-Encoding", "br, gzip")], b"").await;
    assert_eq!(coded.header("content-encoding").as_deref(), Some("gzip"));
    let mut text = String::new();
    std::io::Read::read_to_string(&mut flate2::read::GzDecoder::new(&coded.body[..]), &mut text).unwrap();
    assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap()["entries"][0]["value"], "0");
    let refused = door.send("GET", "/v1/kv?limit=1", &[("Accept-Encoding", "gzip;q=0")], b"").await;
    assert_eq!(refused.header("content-encoding"), None);
    let value = door.send("GET", "/v1/kv/b", &[("Accept-Encoding", "gzip")], b"").await;
    assert_eq!((value.header("content-encoding"), &value.body[..]), (None, &[0xff][..]));
}

#[tokio::test]
async fn a_batch_is_one_and_says_what_became_of_each() {
    let door = TestDoor::start().await;
    door.put("old", "1").await;
    let batch = r#"[{"put":{"key":"a","value":"x","ttl_ms":60000}},{"put":{"key":"b","value_base64":"/w=="}},
        {"put":{"key":"old","value":"2","if_revision":0}},{"delete":{"key":"none"}},{"delete":{"key":"old","if_revision":1}}]"#;
    let reply = door.send("POST", "/v1/batch", &[], batch.as_bytes()).await;
    let outcomes = &reply.json()["outcomes"];
    assert_eq!(outcomes[0], serde_json::json!({"status": 200, "revision": 2}));
    assert_eq!(outcomes[1], serde_json::json!({"status": 200, "revision": 3}));
    assert_eq!(outcomes[2], serde_json::json!({"status": 412, "revision": 1}));
    assert_eq!(outcomes[3], serde_json::json!({"status": 404}));
    assert_eq!(outcomes[4], serde_json::json!({"status": 200, "count": 1, "revision": 4}));
    assert_eq!(door.get("/v1/kv/b").await.body, [0xff]);
    let wildcard = door.send("DELETE", "/v1/kv?pattern=*", &[], b"").await;
    assert_eq!(wildcard.json(), serde_json::json!({"count": 2, "revision": 6}));
    assert_eq!(door.send("DELETE", "/v1/kv?pattern=*", &[], b"").await.json(), serde_json::json!({"count": 0}));
}

/// A request that is cut anywhere leaves everything as it was.
#[tokio::test]
async fn a_body_that_does_not_arrive_whole_changes_nothing() {
    let door = TestDoor::start().await;
    door.put("k", "old").await;
    let mut events = door.nkv.subscribe(Pattern::All).await.unwrap();
    while !matches!(timeout(support::PATIENCE, events.next()).await.unwrap(), Some(nkv_node::Event::Synced { .. })) {}
    let host = format!("Host: {}\r\n", door.address);
    let half = "x".repeat(500);
    let cut = [
        format!("PUT /v1/kv/k HTTP/1.1\r\n{host}Content-Length: 1000\r\n\r\n{half}"),
        format!("PUT /v1/kv/k HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\n1f4\r\n{half}\r\n"),
        format!("PUT /v1/kv/k HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\n3e8\r\n{half}"),
        format!(
            "POST /v1/batch HTTP/1.1\r\n{host}Content-Length: 1000\r\n\r\n[{{\"put\":{{\"key\":\"k\",\"value\":\"new\"}}}},"
        ),
    ];
    for (request, is_reset) in cut.iter().flat_map(|request| [(request, false), (request, true)]) {
        let mut stream = door.connect().await;
        stream.write_all(request.as_bytes()).await.unwrap();
        sleep(Duration::from_millis(20)).await;
        if is_reset {
            stream.set_zero_linger().unwrap();
            drop(stream);
            continue;
        }
        stream.shutdown().await.unwrap();
        let reply = Reply::read_to_end(&mut stream).await;
        assert!(reply.status == 400 || reply.status == 0, "{reply:?}");
    }
    // By HTTP/2, one that ends short of its length.
    let (client, connection) = h2::client::handshake(door.connect().await).await.unwrap();
    let connection = tokio::spawn(connection);
    let put = http::Request::put(format!("http://{}/v1/kv/k", door.address)).header("content-length", "1000");
    let (answer, mut body) = client.ready().await.unwrap().send_request(put.body(()).unwrap(), false).unwrap();
    body.send_data(half.into_bytes().into(), true).unwrap();
    let answer = timeout(support::PATIENCE, answer).await.expect("an end");
    assert!(answer.is_err() || answer.is_ok_and(|answer| answer.status() == 400));
    connection.abort();
    door.nothing_is_held().await;
    assert_eq!(door.get("/v1/kv/k").await.text(), "old");
    assert!(timeout(Duration::from_millis(100), events.next()).await.is_err(), "an event of a write that was none");
}

#[tokio::test]
async fn a_part_or_a_coded_form_is_never_stored_as_the_whole() {
    let door = TestDoor::start().await;
    for (name, value, status) in [
        ("Content-Range", "bytes 0-4/10", 400),
        ("Content-Encoding", "gzip", 415),
        ("Content-Encoding", "identity", 415),
    ] {
        let reply = door.send("PUT", "/v1/kv/k", &[(name, value)], b"hello").await;
        assert_eq!(reply.status, status, "{name}: {reply:?}");
    }
    let coded = format!(
        "PUT /v1/kv/k HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nTransfer-Encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        door.address
    );
    assert!(door.say(coded.as_bytes()).await.status >= 400);
    assert_eq!(door.get("/v1/kv/k").await.status, 404);
}

#[tokio::test]
async fn each_limit_has_its_status() {
    let mut limits = Limits::default();
    (limits.value_len_max, limits.request_len_max, limits.subscriptions_max) = (1_000, 10_000, 2);
    let mut options = Options::default();
    options.connections = ConnectionLimit::new(4, 4);
    let door = TestDoor::with(options, limits).await;
    let large = door.send("PUT", "/v1/kv/k", &[], &[b'x'; 1_001]).await;
    assert_eq!((large.status, large.problem()), (413, "too-large".into()));
    assert_eq!(door.send("PUT", "/v1/kv/k", &[], &[b'x'; 1_000]).await.status, 200);
    // Before it is read: nothing of it is sent.
    let announced = format!("PUT /v1/kv/k HTTP/1.1\r\nHost: {}\r\nContent-Length: 1000000000000\r\n\r\n", door.address);
    assert_eq!(door.say(announced.as_bytes()).await.status, 413);
    let chunked = format!(
        "PUT /v1/kv/k HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n7d0\r\n{}\r\n0\r\n\r\n",
        door.address,
        "x".repeat(2_000)
    );
    assert_eq!(door.say(chunked.as_bytes()).await.status, 413);
    let heads = door.send("GET", "/v1/kv/k", &[("X-Long", &"x".repeat(40_000))], b"").await;
    assert_eq!(heads.status, 431);
    let wrong = door.send("PATCH", "/v1/kv/k", &[], b"").await;
    assert_eq!((wrong.status, wrong.header("allow")), (405, Some("GET, HEAD, PUT, DELETE".into())));
    assert_eq!(door.send("GET", "/v1/batch", &[], b"").await.header("allow").as_deref(), Some("POST"));
    assert_eq!(door.get("/v2/kv/k").await.problem(), "no-such-path");

    // One connection more than there may be.
    let mut held = Vec::new();
    for _ in 0..4 {
        let mut stream = door.connect().await;
        stream.write_all(format!("GET /livez HTTP/1.1\r\nHost: {}\r\n\r\n", door.address).as_bytes()).await.unwrap();
        let mut bytes = [0; 512];
        assert!(timeout(support::PATIENCE, stream.read(&mut bytes)).await.unwrap().unwrap() > 0);
        held.push(stream);
    }
    let refused = door.get("/livez").await;
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1".into())));
}

#[tokio::test]
async fn a_head_that_does_not_end_ends_its_connection_and_an_idle_one_stays() {
    let mut options = Options::default();
    (options.head_limit, options.idle_limit) = (Duration::from_millis(300), Duration::from_secs(3));
    let door = TestDoor::with(options, Limits::default()).await;
    // A byte now and then, for ever.
    let mut slow = door.connect().await;
    let start = Instant::now();
    let dripping = async {
        for byte in std::iter::repeat(b"X") {
            if slow.write_all(byte).await.is_err() {
                return;
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(support::PATIENCE, dripping).await.expect("it is cut");
    assert!(start.elapsed() >= Duration::from_millis(300));
    // One that is idle before its first request, and between two, is answered. Proxies keep theirs for a minute.
    assert!(Options::default().idle_limit > Duration::from_secs(65));
    let mut idle = door.connect().await;
    let request = format!("GET /livez HTTP/1.1\r\nHost: {}\r\n\r\n", door.address);
    for _ in 0..3 {
        sleep(Duration::from_millis(700)).await;
        idle.write_all(request.as_bytes()).await.unwrap();
        let mut bytes = [0; 1_024];
        let len = timeout(support::PATIENCE, idle.read(&mut bytes)).await.unwrap().unwrap();
        assert!(bytes[..len].starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&bytes[..len]));
    }
    // But not for ever.
    let mut bytes = [0; 64];
    assert!(matches!(timeout(support::PATIENCE, idle.read(&mut bytes)).await, Ok(Ok(0) | Err(_))));
    door.nothing_is_held().await;
}

#[tokio::test]
async fn a_head_that_does_not_end_ends_a_connection_that_was_idle_before() {
    let mut options = Options::default();
    (options.head_limit, options.idle_limit) = (Duration::from_millis(300), Duration::from_secs(3_600));
    let door = TestDoor::with(options, Limits::default()).await;
    let mut stream = door.connect().await;
    let request = format!("GET /livez HTTP/1.1\r\nHost: {}\r\n\r\n", door.address);
    let mut bytes = [0; 1_024];
    for _ in 0..2 {
        // Idle: before the first request, and before the second.
        sleep(Duration::from_millis(100)).await;
        stream.write_all(request.as_bytes()).await.unwrap();
        let len = timeout(support::PATIENCE, stream.read(&mut bytes)).await.unwrap().unwrap();
        assert!(bytes[..len].starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&bytes[..len]));
    }
    sleep(Duration::from_millis(100)).await;
    stream.write_all(b"GET /liv").await.unwrap();
    let ended = timeout(support::PATIENCE, stream.read(&mut bytes)).await.expect("it is cut");
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
}

#[tokio::test]
async fn a_body_has_its_whole_time_after_others_of_its_connection() {
    let mut options = Options::default();
    options.request_limit = Duration::from_millis(500);
    let door = TestDoor::with(options, Limits::default()).await;
    let mut stream = door.connect().await;
    let head = format!("PUT /v1/kv/k HTTP/1.1\r\nHost: {}\r\nContent-Length: 10\r\n\r\nabc", door.address);
    let mut bytes = [0; 1_024];
    for _ in 0..2 {
        stream.write_all(head.as_bytes()).await.unwrap();
        sleep(Duration::from_millis(250)).await;
        stream.write_all(b"defghij").await.unwrap();
        let len = timeout(support::PATIENCE, stream.read(&mut bytes)).await.unwrap().unwrap();
        assert!(bytes[..len].starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&bytes[..len]));
    }
    let start = Instant::now();
    stream.write_all(head.as_bytes()).await.unwrap();
    let len = timeout(support::PATIENCE, stream.read(&mut bytes)).await.unwrap().unwrap();
    assert!(bytes[..len].starts_with(b"HTTP/1.1 408"), "{}", String::from_utf8_lossy(&bytes[..len]));
    assert!(start.elapsed() >= Duration::from_millis(500), "the whole of its time");
}

#[tokio::test]
async fn a_body_that_does_not_come_ends_with_408() {
    let mut options = Options::default();
    options.request_limit = Duration::from_millis(200);
    let door = TestDoor::with(options, Limits::default()).await;
    let mut stream = door.connect().await;
    let head = format!(
        "PUT /v1/kv/k HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Length: 10\r\n\r\nabc",
        door.address
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let reply = Reply::read_to_end(&mut stream).await;
    assert_eq!((reply.status, reply.problem()), (408, "too-slow".into()));
}

#[tokio::test]
async fn a_client_that_sends_no_more_gets_its_whole_answer() {
    let door = TestDoor::start().await;
    door.nkv.put("k", vec![b'x'; 1_000_000]).await.unwrap();
    let mut stream = door.connect().await;
    stream.write_all(format!("GET /v1/kv/k HTTP/1.1\r\nHost: {}\r\n\r\n", door.address).as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    let reply = Reply::read_to_end(&mut stream).await;
    assert!(reply.status == 200 && reply.is_whole && reply.body.len() == 1_000_000, "{}", reply.head);
    let mut stream = door.connect().await;
    let put = format!("PUT /v1/kv/p HTTP/1.1\r\nHost: {}\r\nContent-Length: 1\r\n\r\nx", door.address);
    stream.write_all(put.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(Reply::read_to_end(&mut stream).await.status, 200);
}

#[tokio::test]
async fn a_load_balancer_without_a_host_is_answered_and_a_page_is_not() {
    let door = TestDoor::start().await;
    assert_eq!(door.say(b"GET /readyz HTTP/1.0\r\n\r\n").await.status, 200);
    assert_eq!(door.say(b"GET /readyz HTTP/1.0\r\nOrigin: http://evil.com\r\n\r\n").await.status, 400);
    assert_eq!(door.say(b"GET /readyz HTTP/1.1\r\nConnection: close\r\n\r\n").await.status, 400);
    let verbose = door.get("/readyz?verbose").await;
    assert!(verbose.text().contains("[+]storage ok (memory)"), "{}", verbose.text());
    for path in ["/v1/kv/k", "/v1/watch?pattern=*", "/set", "/v1/ws"] {
        let reply = door.send("GET", path, &[("Origin", "http://evil.com")], b"").await;
        assert_eq!((reply.status, reply.problem()), (403, "foreign-origin".into()), "{path}");
        assert!(reply.text().contains("--http-allow-origin"));
    }
    let rebound = format!(
        "PUT /v1/kv/k HTTP/1.1\r\nHost: evil.com:{}\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx",
        door.address.port()
    );
    let reply = door.say(rebound.as_bytes()).await;
    assert_eq!((reply.status, reply.problem()), (403, "foreign-host".into()));
    assert!(reply.text().contains("--http-host"));
    let form = [("Origin", "http://evil.com"), ("Content-Type", "application/x-www-form-urlencoded")];
    assert_eq!(door.send("POST", "/set", &form, br#"{"Key":"k","Value":"v"}"#).await.status, 403);
    assert_eq!(door.nkv.revision().get(), 0);
}

#[tokio::test]
async fn a_page_of_an_allowed_origin_reads_every_answer() {
    let mut options = Options::default();
    options.allowed_origins = vec!["http://app.example:3000".into()];
    let door = TestDoor::with(options, Limits::default()).await;
    let origin = ("Origin", "http://app.example:3000");
    let preflight = [origin, ("Access-Control-Request-Method", "PUT"), ("Access-Control-Request-Headers", "if-match")];
    let reply = door.send("OPTIONS", "/v1/kv/k", &preflight, b"").await;
    assert_eq!(reply.status, 204);
    assert!(reply.header("access-control-allow-headers").unwrap().contains("last-event-id"));
    assert!(reply.header("access-control-allow-methods").unwrap().contains("DELETE"));
    for (method, path, status) in [
        ("PUT", "/v1/kv/k", 200),
        ("GET", "/v1/kv/none", 404),
        ("GET", "/v1/kv/a..b", 400),
        ("PATCH", "/v1/kv/k", 405),
        ("GET", "/nowhere", 404),
        ("GET", "/v1/ws", 426),
    ] {
        let reply = door.send(method, path, &[origin, ("Sec-Fetch-Site", "cross-site")], b"").await;
        assert_eq!(reply.status, status, "{path}");
        assert_eq!(reply.header("access-control-allow-origin").as_deref(), Some(origin.1), "{path}");
        assert!(reply.head.to_lowercase().contains("vary: origin"), "{path}: {}", reply.head);
    }
    let foreign = [("Origin", "http://evil.com"), ("Access-Control-Request-Method", "PUT")];
    let reply = door.send("OPTIONS", "/v1/kv/k", &foreign, b"").await;
    assert_eq!((reply.status, reply.header("access-control-allow-origin")), (403, None));
    // Without the flag no page gets a CORS header.
    let plain = TestDoor::start().await;
    assert!(!plain.get("/livez").await.head.to_lowercase().contains("access-control"));
}

/// 16 MiB to a reader that takes its time, with the end of the connection announced.
#[tokio::test]
async fn a_slow_reader_gets_the_whole_or_sees_that_it_is_not() {
    let mut limits = Limits::default();
    (limits.value_len_max, limits.request_len_max) = (8 << 20, 64 << 20);
    let mut options = Options::default();
    options.stall_limit = Duration::from_secs(2);
    let door = TestDoor::with(options, limits).await;
    for key in ["a", "b"] {
        door.nkv.put(key, vec![b'x'; 8 << 20]).await.unwrap();
    }
    let mut stream = door.connect().await;
    let request = format!("GET /v1/kv HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", door.address);
    stream.write_all(request.as_bytes()).await.unwrap();
    let (mut bytes, mut part, mut reads) = (Vec::new(), vec![0; 256 << 10], 0);
    loop {
        let len = timeout(support::PATIENCE, stream.read(&mut part)).await.unwrap().unwrap();
        if len == 0 {
            break;
        }
        bytes.extend_from_slice(&part[..len]);
        reads += 1;
        if reads < 40 {
            sleep(Duration::from_millis(75)).await;
        }
    }
    let reply = Reply::parse(&bytes);
    assert!(reply.is_whole && reply.body.len() > 16 << 20, "{} of {}", reply.body.len(), reply.head);
    // One that stands still is cut, and what it held is given back.
    let mut stream = door.connect().await;
    stream.write_all(request.as_bytes()).await.unwrap();
    sleep(Duration::from_millis(100)).await;
    door.nothing_is_held().await;
    drop(stream);
}
