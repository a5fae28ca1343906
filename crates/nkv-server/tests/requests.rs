//! Requests over one connection: order, framing, large values, what happens at the end of the stream.

#![allow(clippy::unwrap_used)]

mod support;

use nkv_server::Options;
use support::{Conn, TestServer, status};

#[test]
fn pipelined_requests_take_effect_and_are_answered_in_order() {
    let server = TestServer::start();
    let mut conn = server.connect();
    conn.hello("c", "text");
    let mut input = String::new();
    for n in 0..2_000 {
        input += &format!("{{\"type\":\"Put\",\"id\":{n},\"key\":\"k\",\"value\":\"{n}\"}}\n");
        input += &format!("{{\"type\":\"Get\",\"id\":\"g{n}\",\"key\":\"k\"}}\n");
    }
    let sender = std::thread::spawn({
        let mut stream = conn.stream().try_clone().unwrap();
        move || std::io::Write::write_all(&mut stream, input.as_bytes()).unwrap()
    });
    for n in 0..2_000 {
        let put = conn.json();
        assert_eq!((&put["Base"]["id"], &put["Base"]["revision"]), (&n.into(), &(n + 1).into()));
        let get = conn.json();
        assert_eq!(get["Get"]["id"], format!("g{n}"));
        assert_eq!(get["Get"]["data"][0], n.to_string());
    }
    sender.join().unwrap();
}

#[test]
fn a_request_may_arrive_byte_by_byte() {
    let server = TestServer::start();
    let mut conn = server.connect();
    for byte in b"{\"type\":\"Put\",\"key\":\"a\",\"len\":3}\nx\ny\n" {
        std::io::Write::write_all(&mut conn.stream(), &[*byte]).unwrap();
    }
    assert_eq!(status(&conn.line()), 200);
    conn.hello("c", "payload").send(r#"{"type":"Get","key":"a"}"#);
    assert!(conn.line().contains("\"lens\":[3],\"len\":3"));
    assert_eq!(conn.bytes(4), b"x\ny\n");
}

#[test]
fn the_largest_value_travels_in_every_form_and_one_byte_more_is_refused() {
    let mut options = Options::default();
    options.value_len_max = 100_000;
    let server = TestServer::with(|builder| builder.options(options));
    let value: Vec<u8> = (0..100_000).map(|n| (n * 7 % 256) as u8).collect();
    let mut conn = server.connect();
    conn.send(r#"{"type":"Put","key":"payload","len":100000}"#).send(&value);
    assert_eq!(status(&conn.line()), 200);
    conn.send(format!(r#"{{"type":"Put","key":"array","value":{value:?}}}"#));
    assert_eq!(status(&conn.line()), 200);
    let escapes = "\\u0041".repeat(100_000);
    conn.send(format!(r#"{{"type":"Put","key":"escapes","value":"{escapes}"}}"#));
    assert_eq!(status(&conn.line()), 200);

    conn.send(r#"{"type":"Put","key":"payload","len":100001}"#).send([&value[..], b"!"].concat());
    let refused = conn.line();
    assert_eq!(status(&refused), 413);
    assert!(refused.contains("100000"), "the limit is not named: {refused}");

    for key in ["payload", "array"] {
        conn.hello("c", "payload").send(format!(r#"{{"type":"Get","key":"{key}"}}"#));
        assert!(conn.line().contains("\"len\":100000"));
        assert_eq!(conn.bytes(100_001)[..100_000], value);
    }
    conn.hello("c", "bytes").send(r#"{"type":"Get","key":"array"}"#);
    let data: Vec<u8> = serde_json::from_value(conn.json()["Get"]["data"][0].clone()).unwrap();
    assert_eq!(data, value);
}

#[test]
fn what_was_sent_before_the_end_of_the_stream_is_answered() {
    let server = TestServer::start();
    let mut conn = server.connect();
    conn.send(r#"{"type":"Put","id":"1","key":"a","value":"1"}"#);
    // The last line has no newline; its sender meant it.
    std::io::Write::write_all(&mut conn.stream(), br#"{"type":"Exists","id":"2","key":"a"}"#).unwrap();
    conn.finish();
    assert_eq!(status(&conn.line()), 200);
    assert_eq!(status(&conn.line()), 200);
    assert_eq!(conn.line(), "(closed)");
}

#[test]
fn a_large_answer_comes_whole_and_one_past_the_limit_is_refused() {
    let server = TestServer::start();
    let mut conn = server.connect();
    let value = vec![b'x'; 1 << 20];
    for n in 0..65 {
        conn.send(format!(r#"{{"type":"Put","key":"big.{n:03}","len":{}}}"#, value.len())).send(&value);
        assert_eq!(status(&conn.line()), 200);
    }
    conn.hello("c", "payload").send(r#"{"type":"Get","key":"big.*"}"#);
    assert_eq!(status(&conn.line()), 413);
    conn.send("{\"type\":\"Get\",\"key\":\"big.*\",\"after\":\"big.032\"}\n{\"type\":\"Health\"}");
    let header = conn.json();
    assert_eq!(header["Get"]["keys"].as_array().unwrap().len(), 32);
    let all = conn.bytes(32 * value.len() + 1);
    assert!(all.strip_suffix(b"\n").unwrap().iter().all(|byte| *byte == b'x'));
    assert_eq!(status(&conn.line()), 200, "what came with it is served after it");
    // One value is answered at once, and fills what is written in a turn.
    conn.send("{\"type\":\"Get\",\"key\":\"big.000\"}\n{\"type\":\"Health\"}");
    assert_eq!(conn.json()["Get"]["len"], 1 << 20);
    conn.bytes(value.len() + 1);
    assert_eq!(status(&conn.line()), 200, "what came with it is served after it");
}

#[test]
fn a_unix_socket_serves_its_owner_alone() {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nkv.sock");
    let address = format!("unix:{}", path.display());
    let server = TestServer::with(|builder| builder.listen(address.parse().unwrap()));
    let found = std::fs::symlink_metadata(&path).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o600);
    let mut stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
    std::io::Write::write_all(&mut stream, b"{\"type\":\"Health\",\"id\":5}\n").unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stream), &mut line).unwrap();
    assert_eq!(line, "{\"Base\":{\"id\":5,\"status\":200,\"message\":\"No Error\"}}\n");
    server.shutdown().unwrap();
    assert!(!path.exists(), "the socket's name outlived the server");
}

#[test]
fn a_request_that_waits_for_the_writes_before_it_is_read_again_with_its_payload() {
    let server = TestServer::start();
    let mut conn = server.connect();
    let get = r#"{"type":"Get","id":"in a payload","key":"a"}"#;
    let refused = format!("{{\"type\":\"Put\",\"key\":\"b..c\",\"len\":{}}}\n{get}", get.len());
    let unreadable = format!("{{\"type\":\"No\",\"len\":{}}}\n{get}", get.len());
    let put = r#"{"type":"Put","key":"a","value":"x"}"#;
    conn.send([put, &refused, put, &unreadable, put, r#"{"type":"Exists","id":"last","key":"a"}"#].join("\n"));
    let answers = [(); 6].map(|()| conn.line());
    assert_eq!(answers.each_ref().map(|answer| status(answer)), [200, 400, 200, 400, 200, 200]);
    assert!(answers[5].contains("last"));
}

#[test]
fn hostile_input_harms_no_client() {
    let server = TestServer::start();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..40 {
        let conn = server.connect();
        let junk: Vec<u8> = (0..4_000)
            .map(|_| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                // Enough newlines and braces that some of it looks like lines.
                b"\n{}\"[]:,0a\\\0\xff"[(seed >> 33) as usize % 13]
            })
            .collect();
        // A connection that was refused may be closed while we still write.
        drop(std::io::Write::write_all(&mut conn.stream(), &junk));
        assert!(server.connect().put("alive", &round.to_string()) > 0);
    }
    for line in
        ["[".repeat(200_000), format!("{{\"type\":\"Get\",\"key\":{}", "[".repeat(200_000)), "\n".repeat(100_000)]
    {
        let mut conn = server.connect();
        conn.send(line);
        let mut answer = conn.ask(r#"{"type":"Health","id":"last"}"#);
        while !answer.contains("last") {
            assert_eq!(status(&answer), 400);
            answer = conn.line();
        }
    }
}

/// The head was answered line by line and the body was done.
#[test]
fn a_browser_that_posts_to_the_port_has_one_answer_and_changes_nothing() {
    let server = TestServer::start();
    let mut conn = server.connect();
    let put = r#"{"type":"Put","key":"a","value":"from a web page"}"#;
    let head = format!("POST / HTTP/1.1\r\nHost: {}\r\nContent-Length: {}\r\n\r\n", server.addr, put.len());
    let answer = conn.ask(&format!("{head}{put}"));
    assert!(status(&answer) == 400 && answer.contains("HTTP"), "{answer}");
    assert_eq!(conn.line(), "(closed)");
    assert_eq!(status(&server.connect().ask(r#"{"type":"Get","key":"a"}"#)), 404);
}

#[test]
fn a_line_without_end_costs_a_line_at_most() {
    let mut options = Options::default();
    options.value_len_max = 1_000;
    let server = TestServer::with(|builder| builder.options(options));
    let conn = Conn::to(&server.addr);
    // Far more than a line may measure; the server closes before all of it is written.
    let mut written = 0;
    while written < 50 << 20 {
        match std::io::Write::write(&mut conn.stream(), &[b'a'; 65_536]) {
            Ok(len) => written += len,
            Err(_) => break,
        }
    }
    assert!(written < 50 << 20, "all of it was taken");
    assert!(server.connect().put("alive", "yes") > 0);
}
