//! Reads that take many turns: whole, in order, and no other connection waits for them.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use nkv_core::{Key, Op, PutOptions};
use nkv_server::Options;
use support::{Conn, TestServer, status};

const KEYS: usize = 5_000;

fn key(n: usize) -> String {
    format!("k.{n:05}")
}

/// Puts from within the process, so that no connection has anything to do with it.
fn put_all(server: &TestServer, keys: usize, value: &[u8]) {
    let value = bytes::Bytes::copy_from_slice(value);
    for some in (0..keys).collect::<Vec<_>>().chunks(500) {
        let put = |n: &usize| Op::Put {
            key: Key::new(&key(*n)).unwrap(),
            value: value.clone(),
            options: PutOptions::default(),
        };
        let ops = some.iter().map(put).collect();
        server.runtime.block_on(server.handle.write(ops)).unwrap();
    }
}

/// How often another connection is answered before a long read is.
fn answered_meanwhile(server: &TestServer, reader: &mut Conn, request: &str) -> (usize, serde_json::Value) {
    let has_come = Arc::new(AtomicBool::new(false));
    let mut other = server.connect();
    other.put("other", "x");
    reader.send(request);
    let other = thread::spawn({
        let has_come = Arc::clone(&has_come);
        move || {
            let mut answered = 0;
            while !has_come.load(SeqCst) {
                assert_eq!(status(&other.ask(r#"{"type":"Get","key":"other"}"#)), 200);
                answered += 1;
            }
            answered
        }
    });
    reader.stream().peek(&mut [0]).unwrap();
    has_come.store(true, SeqCst);
    (other.join().unwrap(), reader.json())
}

#[test]
fn long_reads_come_whole_and_in_order_and_others_are_answered_meanwhile() {
    let server = TestServer::start();
    put_all(&server, KEYS, &[b'v'; 2_000]);
    let mut reader = server.connect();
    reader.hello("reader", "text");
    let keys = serde_json::Value::from((0..KEYS).map(key).collect::<Vec<_>>());
    let requests = [r#"{"type":"Get","key":"k.*"}"#, r#"{"type":"List","key":"k.*","limit":5000}"#];
    for request in requests {
        // A thread of the test that gets no processor sees nothing of the turns: then once more.
        let mut most = 0;
        for _ in 0..20 {
            let (answered, answer) = answered_meanwhile(&server, &mut reader, request);
            let fields = answer.as_object().unwrap().values().next().unwrap();
            assert_eq!(fields["keys"].as_array().unwrap().len(), KEYS);
            assert_eq!(fields["keys"], keys, "not whole, or not in order");
            assert!(fields.get("more").is_none_or(|more| *more == false), "{fields:.200}");
            most = most.max(answered);
            if most > 0 {
                break;
            }
        }
        assert!(most > 0, "no other was answered before {request}");
    }
    // What is pipelined behind it is answered behind it.
    reader.send(format!("{}\n{}", requests[0], r#"{"type":"Health"}"#));
    assert!(reader.line().starts_with(r#"{"Get""#));
    assert!(reader.line().starts_with(r#"{"Base""#));
}

#[test]
fn an_answer_that_would_be_too_long_is_refused_and_the_connection_goes_on() {
    let server = TestServer::start();
    put_all(&server, 80, &[b'v'; 1 << 20]);
    let mut reader = server.connect();
    reader.hello("reader", "payload");
    assert_eq!(status(&reader.ask(r#"{"type":"Get","key":"*"}"#)), 413);
    reader.hello("reader", "text");
    assert_eq!(status(&reader.ask(r#"{"type":"Get","key":"*"}"#)), 413);
    let page = reader.ask(r#"{"type":"Get","key":"*","limit":50}"#);
    assert_eq!(page.matches(r#""k."#).count(), 50, "{page:.200}");
}

// Each was let in while there was room, and all grew together.
#[test]
fn long_reads_that_come_at_the_same_time_close_none_of_those_who_read() {
    let mut options = Options::default();
    options.queued_max = 16 << 20;
    let server = TestServer::with(|builder| builder.options(options));
    put_all(&server, 6_000, &[b'v'; 1_000]);
    let readers: Vec<_> = (0..24)
        .map(|_| {
            let mut reader = server.connect();
            thread::spawn(move || {
                reader.stream().set_read_timeout(Some(Duration::from_secs(60))).unwrap();
                reader.hello("reader", "text");
                reader.ask(r#"{"type":"Get","key":"*"}"#).len()
            })
        })
        .collect();
    let lens: Vec<usize> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
    assert!(lens.iter().all(|len| *len > 6_000_000), "{lens:?}");
}
