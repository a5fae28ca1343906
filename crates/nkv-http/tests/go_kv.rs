//! The calls of Go-KV's client, as it sends them: Connect's unary form, with protobuf and JSON, by HTTP/2 and HTTP/1.1.

#![allow(clippy::unwrap_used, reason = "a helper of a test fails like a test")]

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use http::Request;
use nkv_http::Options;
use nkv_node::Limits;
use support::{PATIENCE, TestDoor};
use tokio::time::{Instant, sleep, timeout};

const SERVICE: &str = "/internalpb.KVService/";
const PROTO: &str = "application/proto";
const JSON: &str = "application/json";

#[derive(Clone, Copy, Debug)]
enum By {
    Http1,
    Http2,
}

/// Calls as the client does: status, content type, body.
async fn call_as(door: &TestDoor, by: By, kind: &str, method: &str, body: &[u8]) -> (u16, String, Vec<u8>) {
    let path = format!("{SERVICE}{method}");
    let headers = [("content-type", kind), ("connect-protocol-version", "1"), ("accept-encoding", "gzip")];
    if let By::Http1 = by {
        let reply = door.send("POST", &path, &headers, body).await;
        assert!(reply.is_whole, "{reply:?}");
        return (reply.status, reply.header("content-type").unwrap_or_default(), reply.body);
    }
    let calling = async {
        let (client, connection) = h2::client::handshake(door.connect().await).await.unwrap();
        let connection = tokio::spawn(connection);
        let mut request = Request::post(format!("http://{}{path}", door.address)).header("content-length", body.len());
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let mut client = client.ready().await.unwrap();
        let (answer, mut sending) = client.send_request(request.body(()).unwrap(), false).unwrap();
        sending.send_data(Bytes::copy_from_slice(body), true).unwrap();
        let (head, mut receiving) = answer.await.unwrap().into_parts();
        let mut body = Vec::new();
        while let Some(data) = receiving.data().await {
            let data = data.unwrap();
            receiving.flow_control().release_capacity(data.len()).unwrap();
            body.extend_from_slice(&data);
        }
        assert!(head.headers.get("content-length").is_none_or(|len| *len == body.len().to_string()));
        connection.abort();
        (head.status.as_u16(), head.headers["content-type"].to_str().unwrap().to_owned(), body)
    };
    timeout(PATIENCE, calling).await.expect("an answer")
}

async fn call(door: &TestDoor, method: &str, body: &[u8]) -> (u16, String, Vec<u8>) {
    call_as(door, By::Http2, PROTO, method, body).await
}

/// What a call fails with.
async fn failure(door: &TestDoor, kind: &str, method: &str, body: &[u8]) -> (u16, String) {
    let (status, kind, body) = call_as(door, By::Http1, kind, method, body).await;
    assert_eq!(kind, JSON, "an error is JSON, whatever the messages are");
    let error: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert!(!error["message"].as_str().unwrap().is_empty());
    (status, error["code"].as_str().unwrap().to_owned())
}

fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    let mut len = bytes.len();
    while len > 0x7f {
        out.push(0x80 | (len & 0x7f) as u8);
        len >>= 7;
    }
    out.push(len as u8);
    out.extend_from_slice(bytes);
    out
}

/// The fields of a message that are bytes.
fn fields(mut bytes: &[u8]) -> Vec<(u8, &[u8])> {
    let mut all = Vec::new();
    while let [tag, rest @ ..] = bytes {
        assert_eq!(tag & 7, 2, "bytes alone");
        let (mut len, mut used) = (0, 0);
        loop {
            len |= usize::from(rest[used] & 0x7f) << (7 * used);
            used += 1;
            if rest[used - 1] & 0x80 == 0 {
                break;
            }
        }
        all.push((tag >> 3, &rest[used..used + len]));
        bytes = &rest[used + len..];
    }
    all
}

fn ok(body: &[u8]) -> (u16, String, Vec<u8>) {
    (200, PROTO.to_owned(), body.to_vec())
}

#[tokio::test]
async fn the_five_calls_are_answered_as_the_client_needs_them() {
    for by in [By::Http2, By::Http1] {
        let door = TestDoor::start().await;
        let call = async |method: &str, body: &[u8]| call_as(&door, by, PROTO, method, body).await;
        assert_eq!(call("KeyExists", b"\x0a\x01k").await, ok(b""), "{by:?}");
        assert_eq!(call("List", b"").await, ok(b""));
        assert_eq!(call("Put", b"\x0a\x01k\x12\x02v\xff").await, ok(b""));
        assert_eq!(call("Put", b"\x0a\x05empty").await, ok(b""));
        assert_eq!(call("KeyExists", b"\x0a\x01k").await, ok(b"\x08\x01"));
        assert_eq!(call("Get", b"\x0a\x01k").await, ok(b"\x0a\x07\x0a\x01k\x12\x02v\xff"));
        assert_eq!(call("List", b"").await, ok(b"\x0a\x07\x0a\x05empty\x0a\x07\x0a\x01k\x12\x02v\xff"));
        assert_eq!(door.nkv.get("k").await.unwrap().unwrap().value, b"v\xff".as_slice());
        assert_eq!(call("Delete", b"\x0a\x01k").await, ok(b""));
        assert_eq!(call("Delete", b"\x0a\x01k").await, ok(b""), "it is absent, and that is no error");
        assert_eq!(door.nkv.get("k").await.unwrap(), None);
        // At once, and in the words that the client takes for 'key not found'.
        let (status, kind, body) = call("Get", b"\x0a\x01k").await;
        assert_eq!((status, kind.as_str()), (404, JSON));
        assert_eq!(body, br#"{"code":"not_found","message":"there is no key 'k'"}"#);
    }
}

#[tokio::test]
async fn the_same_as_json() {
    for by in [By::Http2, By::Http1] {
        let door = TestDoor::start().await;
        let call = async |method: &str, body: &str| {
            let (status, kind, body) =
                call_as(&door, by, "application/json; charset=utf-8", method, body.as_bytes()).await;
            assert_eq!((status, kind.as_str()), (200, JSON), "{method}: {}", String::from_utf8_lossy(&body));
            String::from_utf8(body).unwrap()
        };
        assert_eq!(call("Put", r#"{"key":"a.\"b","value":"dv8=","other":[1]}"#).await, "{}");
        assert_eq!(call("Put", r#"{"key":"c","value":"","expiry":"3600s"}"#).await, "{}");
        assert_eq!(call("KeyExists", r#"{"key":"c"}"#).await, r#"{"exists":true}"#);
        assert_eq!(call("KeyExists", r#"{"key":"d"}"#).await, "{}");
        assert_eq!(call("Get", r#"{"key":"a.\"b"}"#).await, r#"{"entry":{"key":"a.\"b","value":"dv8="}}"#);
        let list: serde_json::Value = serde_json::from_str(&call("List", "{}").await).unwrap();
        assert_eq!(list["entries"][0], serde_json::json!({"key": "a.\"b", "value": "dv8="}));
        let left = list["entries"][1]["expiry"].as_str().unwrap().strip_suffix('s').unwrap().parse::<f64>().unwrap();
        assert!(left > 3_000.0 && left <= 3_600.0, "{left}");
        assert_eq!(call("Delete", r#"{"key":"c"}"#).await, "{}");
        assert_eq!(call("Delete", r#"{"key":"a.\"b"}"#).await, "{}");
        assert_eq!(call("List", "{}").await, r#"{"entries":[]}"#);
    }
}

/// There, any expiry ended an entry after a second or two, and a janitor took those that had not expired.
#[tokio::test]
async fn an_expiry_ends_an_entry_then_and_nothing_else_does() {
    let door = TestDoor::start().await;
    let start = Instant::now();
    // 2.5 s; an hour; none, in the three ways that say so.
    let soon = [field(1, b"soon"), field(3, b"\x08\x02\x10\x80\xca\xb5\xee\x01")].concat();
    let late = [field(1, b"late"), field(2, b"v"), field(3, b"\x08\x90\x1c")].concat();
    let minus_one = field(3, b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01");
    for put in
        [soon, late, field(1, b"a"), [field(1, b"b"), field(3, b"")].concat(), [field(1, b"c"), minus_one].concat()]
    {
        assert_eq!(call(&door, "Put", &put).await, ok(b""));
    }
    let (_, _, body) = call(&door, "Get", &field(1, b"late")).await;
    let entry = fields(&body)[0].1;
    let [(1, b"late"), (2, b"v"), (5, [0x08, seconds @ ..])] = fields(entry)[..] else { panic!("{entry:?}") };
    let seconds = usize::from(seconds[0] & 0x7f) | usize::from(seconds[1]) << 7;
    assert!((3_500..=3_600).contains(&seconds), "{seconds}");
    let (_, _, forever) = call(&door, "Get", &field(1, b"c")).await;
    assert_eq!(forever, field(1, &field(1, b"c")), "no end");
    timeout(PATIENCE, async {
        while call(&door, "KeyExists", &field(1, b"soon")).await.2 == b"\x08\x01" {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("it ends");
    assert!(start.elapsed() >= Duration::from_millis(2_500), "not before its time");
    assert_eq!(failure(&door, PROTO, "Get", &field(1, b"soon")).await, (404, "not_found".into()));
    sleep(Duration::from_secs(1)).await;
    let (_, _, body) = call(&door, "List", b"").await;
    let keys: Vec<_> = fields(&body).iter().map(|(_, entry)| fields(entry)[0].1).collect();
    assert_eq!(keys, [b"a".as_slice(), b"b", b"c", b"late"], "nothing else has ended");
}

/// There, a key that two nodes had put was two entries, and a delete that met another node did nothing.
#[tokio::test]
async fn a_key_has_one_entry_and_a_delete_works_wherever_it_was_put() {
    let door = TestDoor::start().await;
    for value in [b"1", b"2"] {
        assert_eq!(call(&door, "Put", &[field(1, b"k"), field(2, value)].concat()).await, ok(b""));
    }
    door.put("k", "3").await;
    assert_eq!(call(&door, "List", b"").await, ok(b"\x0a\x06\x0a\x01k\x12\x013"));
    assert_eq!(call(&door, "Delete", &field(1, b"k")).await, ok(b""));
    assert_eq!(door.get("/v1/kv/k").await.status, 404);
}

#[tokio::test]
async fn a_long_list_has_each_key_once_and_is_bounded() {
    let mut limits = Limits::default();
    limits.value_len_max = 8 << 20;
    let door = TestDoor::with(Options::default(), limits).await;
    let mut all = BTreeMap::new();
    for n in 0..3_000_usize {
        // Longer than a part now and then, and than the first part at the beginning.
        let len = match n % 500 {
            0 => 300_000,
            _ => n % 90,
        };
        let (key, value) = (format!("k{n:05}"), vec![b'x'; len]);
        door.nkv.put(&*key, value.clone()).await.unwrap();
        all.insert(key, value);
    }
    for by in [By::Http2, By::Http1] {
        let (status, _, body) = call_as(&door, by, PROTO, "List", b"").await;
        assert_eq!(status, 200);
        let mut expected = Vec::new();
        for (key, value) in &all {
            let value = if value.is_empty() { Vec::new() } else { field(2, value) };
            expected.extend(field(1, &[field(1, key.as_bytes()), value].concat()));
        }
        assert!(body == expected, "{by:?}: {} bytes, and {} expected", body.len(), expected.len());
        let (_, _, body) = call_as(&door, by, JSON, "List", b"{}").await;
        let list: serde_json::Value = serde_json::from_slice(&body).unwrap();
        let keys: Vec<_> =
            list["entries"].as_array().unwrap().iter().map(|entry| entry["key"].as_str().unwrap()).collect();
        assert!(keys.iter().eq(all.keys()), "{by:?}: {} keys", keys.len());
    }
    for n in 0..8 {
        door.nkv.put(format!("big.{n}"), vec![b'x'; 8 << 20]).await.unwrap();
    }
    assert_eq!(failure(&door, PROTO, "List", b"").await, (429, "resource_exhausted".into()));
    door.nothing_is_held().await;
}

#[tokio::test]
async fn what_cannot_be_done_is_said_in_connects_words() {
    let door = TestDoor::start().await;
    let value_len_max = Limits::default().value_len_max;
    let fits = [field(1, b"big"), field(2, &vec![b'x'; value_len_max])].concat();
    assert_eq!(call(&door, "Put", &fits).await, ok(b""));
    let (_, _, body) = call(&door, "Get", &field(1, b"big")).await;
    assert!(body == field(1, &fits), "as it went");
    let too_long = [field(1, b"big"), field(2, &vec![b'x'; value_len_max + 1])].concat();
    for (kind, method, body, status, code) in [
        (PROTO, "Put", b"".as_slice(), 400, "invalid_argument"),
        (PROTO, "Get", b"\x0a\x03a.*", 400, "invalid_argument"),
        (PROTO, "Delete", b"\x0a\x01*", 400, "invalid_argument"),
        (PROTO, "Put", b"\x0a\x02k", 400, "invalid_argument"),
        (PROTO, "Put", b"\x0a\x01k\x1a\x06\x10\x80\x94\xeb\xdc\x03", 400, "invalid_argument"),
        (PROTO, "Put", &too_long, 429, "resource_exhausted"),
        (PROTO, "Put", &[0; 2 << 20], 429, "resource_exhausted"),
        (JSON, "Get", b"", 400, "invalid_argument"),
        (JSON, "List", b"rubbish", 400, "invalid_argument"),
        (JSON, "Put", br#"{"key":"k","value":"*"}"#, 400, "invalid_argument"),
        (PROTO, "Watch", b"", 501, "unimplemented"),
        (JSON, "put", b"{}", 501, "unimplemented"),
    ] {
        assert_eq!(failure(&door, kind, method, body).await, (status, code.to_owned()), "{kind} {method}");
    }
    let path = format!("{SERVICE}Put");
    let put = field(1, b"k");
    for (name, value, status, code) in [
        ("connect-protocol-version", "2", 400, "invalid_argument"),
        ("connect-timeout-ms", "x", 400, "invalid_argument"),
        ("connect-timeout-ms", "12345678901", 400, "invalid_argument"),
        ("content-encoding", "gzip", 501, "unimplemented"),
    ] {
        let reply = door.send("POST", &path, &[("content-type", PROTO), (name, value)], &put).await;
        assert_eq!((reply.status, reply.json()["code"].as_str()), (status, Some(code)), "{name}: {value}");
    }
    // What is not Connect has the door's words.
    let get = door.send("GET", &path, &[("content-type", PROTO)], b"").await;
    assert_eq!((get.status, get.header("allow")), (405, Some("POST".into())));
    for kind in ["", "text/plain", "application/connect+proto"] {
        let reply = door.send("POST", &path, &[("content-type", kind)], &put).await;
        assert_eq!((reply.status, reply.header("accept-post").is_some()), (415, true), "{kind}");
    }
    let foreign = door.send("POST", &path, &[("content-type", PROTO), ("origin", "http://evil.example")], &put).await;
    assert_eq!(foreign.status, 403);
    assert_eq!(door.nkv.list("*").await.unwrap().len(), 1, "nothing of this was done");
    let headers = [("content-type", PROTO), ("content-encoding", "identity"), ("connect-timeout-ms", "60000")];
    assert_eq!(door.send("POST", &path, &headers, &put).await.status, 200);
    let figures = door.get("/metrics").await.text();
    assert!(!figures.contains("nkv_http_request_duration_seconds_count{route=\"go_kv\"} 0\n"), "{figures}");
    door.nothing_is_held().await;
}

#[tokio::test]
async fn a_caller_that_waits_for_a_time_is_answered_then() {
    let door = TestDoor::start().await;
    let mut stream = door.connect().await;
    let head = format!(
        "POST {SERVICE}Put HTTP/1.1\r\nHost: localhost\r\nContent-Type: {PROTO}\r\nConnect-Timeout-Ms: 200\r\nContent-Length: 3\r\n\r\n"
    );
    // The body does not come.
    tokio::io::AsyncWriteExt::write_all(&mut stream, head.as_bytes()).await.unwrap();
    let reply = support::Reply::read_to_end(&mut stream).await;
    assert_eq!((reply.status, reply.json()["code"].as_str()), (504, Some("deadline_exceeded")));
}
