//! The oldest clients: a reader that takes each read for one message ends with the last state of every key; what is
//! written to it and how its connection ends; and that other connections see none of it.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::{Conn, PATIENCE, TestServer, in_time};

const SUBSCRIBE: &str = "{\"type\":\"Subscribe\",\"id\":\"1\",\"key\":\"load\",\"client_uuid\":\"c\"}\n";

/// The least time between two writes to such a client.
const PAUSE: Duration = Duration::from_millis(2);

/// Reads as the oldest clients do: 1,024 bytes a read, of which the first JSON value counts.
struct OldReader {
    stream: TcpStream,
    /// When it called `read` last, and the longest that passed between two calls.
    called: Instant,
    held_up: Duration,
}

impl OldReader {
    fn subscribe(addr: &str) -> Self {
        let mut stream = TcpStream::connect(addr).unwrap();
        stream.write_all(SUBSCRIBE.as_bytes()).unwrap();
        stream.set_nonblocking(true).unwrap();
        let mut reader = OldReader { stream, called: Instant::now(), held_up: Duration::ZERO };
        let deadline = Instant::now() + PATIENCE;
        while reader.read() != Some("Hello".into()) {
            assert!(Instant::now() < deadline);
        }
        reader.held_up = Duration::ZERO;
        reader
    }

    /// One read, if anything is there.
    fn read(&mut self) -> Option<Value> {
        let mut buffer = [0; 1_024];
        let now = Instant::now();
        self.held_up = self.held_up.max(now - std::mem::replace(&mut self.called, now));
        match self.stream.read(&mut buffer) {
            Ok(0) => panic!("closed"),
            Ok(len) => serde_json::Deserializer::from_slice(&buffer[..len]).into_iter().next()?.ok(),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                thread::sleep(Duration::from_micros(100));
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// What it knows of each key when its subscription has ended; or, if it has lost the end, when nothing comes any more
    /// after the writers are done.
    fn read_all(mut self, is_done: &AtomicBool) -> (BTreeMap<String, Vec<u8>>, Duration) {
        let mut known = BTreeMap::new();
        let mut quiet_since = Instant::now();
        while !is_done.load(Relaxed) || quiet_since.elapsed() < Duration::from_secs(3) {
            let Some(message) = self.read() else { continue };
            quiet_since = Instant::now();
            if message["Close"]["reason"] == "unsubscribed" {
                break;
            }
            let key = message["Update"]["key"].as_str().unwrap().to_owned();
            let value = message["Update"]["value"].as_array().unwrap();
            known.insert(key, value.iter().map(|byte| byte.as_u64().unwrap() as u8).collect());
        }
        (known, self.held_up)
    }
}

/// Has this thread run before all others, where that is allowed.
fn run_first() {
    let thread = std::fs::read_link("/proc/thread-self").unwrap();
    let id = thread.file_name().unwrap().to_owned();
    let chrt = Command::new("chrt").args(["-f", "-p", "50"]).arg(id).stderr(Stdio::null()).status();
    if !chrt.is_ok_and(|status| status.success()) {
        eprintln!("the reader runs at the usual priority");
    }
}

/// Each of eight writers puts its key so often, so long apart. Rounds in which the reader itself was held up are repeated.
fn every_key_ends_up_known(puts: u8, apart: Duration) {
    const ROUNDS: usize = 20;
    const WRITERS: usize = 8;
    let server = TestServer::start();
    let last: BTreeMap<_, _> = (0..WRITERS).map(|n| (format!("load.k{n}"), vec![puts])).collect();
    let (mut rounds, deadline) = (0, Instant::now() + Duration::from_secs(30));
    while rounds < ROUNDS && Instant::now() < deadline {
        let (addr, start, is_done) = (server.addr.clone(), Arc::new(Barrier::new(WRITERS + 1)), Arc::default());
        let (ready, writers_done) = (Arc::clone(&start), Arc::clone(&is_done));
        let reader = thread::spawn(move || {
            run_first();
            let mut reader = OldReader::subscribe(&addr);
            ready.wait();
            reader.called = Instant::now();
            reader.read_all(&writers_done)
        });
        let writers: Vec<_> = (0..WRITERS)
            .map(|n| {
                let (mut conn, start) = (server.connect(), Arc::clone(&start));
                thread::spawn(move || {
                    start.wait();
                    for value in 1..=puts {
                        conn.ask(&format!(r#"{{"type":"Put","key":"load.k{n}","value":[{value}]}}"#));
                        thread::sleep(apart);
                    }
                })
            })
            .collect();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        server.connect().ask(r#"{"type":"Unsubscribe","key":"load","client_uuid":"c"}"#);
        is_done.store(true, Relaxed);
        let (known, held_up) = reader.join().unwrap();
        if held_up < PAUSE {
            assert_eq!(known, last, "in round {rounds}");
            rounds += 1;
        }
    }
    if rounds < ROUNDS {
        eprintln!("SKIPPED: the reader was held up in all rounds but {rounds}");
    }
}

#[test]
fn after_eight_puts_at_once_a_reader_of_the_oldest_kind_knows_all_keys() {
    every_key_ends_up_known(1, Duration::ZERO);
}

#[test]
fn after_eight_busy_writers_a_reader_of_the_oldest_kind_knows_all_keys() {
    every_key_ends_up_known(20, Duration::from_millis(5));
}

fn put(conn: &mut Conn, key: &str, value: &[u8]) {
    let answer = conn.ask(&format!(r#"{{"type":"Put","key":"{key}","value":{value:?}}}"#));
    assert!(answer.contains("\"status\":200"), "{answer}");
}

/// How many changes a subscriber gets of 100 puts of one key that are stored together, if it begins like this: with
/// each line answered before the next is sent, or all of them at once.
fn received_of_a_hundred(lines: &[&str], in_turn: bool) -> usize {
    let server = TestServer::start();
    let mut subscriber = server.connect();
    if in_turn {
        lines.iter().for_each(|line| drop(subscriber.ask(line)));
    } else {
        subscriber.send(lines.join("\n"));
        lines.iter().for_each(|_| drop(subscriber.line()));
    }
    let puts: Vec<_> =
        (0..100).map(|n| format!("{{\"type\":\"Put\",\"key\":\"load\",\"value\":\"{n:02}\"}}")).collect();
    server.connect().ask(&puts.join("\n"));
    let mut received = 0;
    loop {
        let line = subscriber.line();
        received += usize::from(line.contains("Update"));
        if line.contains("[57,57]") {
            return received;
        }
    }
}

#[test]
fn others_are_written_to_as_before() {
    let subscribe = SUBSCRIBE.trim();
    assert!(received_of_a_hundred(&[subscribe], true) < 100, "what waits for one of the oldest is conflated");
    let snapshot = subscribe.replace("\"id\"", "\"snapshot\":true,\"id\"");
    let beginnings: [&[&str]; 5] = [
        &["{\"type\":\"Connect\"}", subscribe],
        &["{\"type\":\"Health\"}", subscribe],
        &["no request", subscribe],
        &[&snapshot],
        &[subscribe, "{\"type\":\"Connect\"}"],
    ];
    for lines in beginnings {
        for in_turn in [false, true] {
            assert_eq!(received_of_a_hundred(lines, in_turn), 100, "{lines:?}");
        }
    }
}

/// Reads until the end: the lines, and whether it was a reset.
fn rest(mut stream: impl Read) -> (Vec<String>, bool) {
    let (mut bytes, mut part) = (Vec::new(), [0; 4_096]);
    let is_reset = loop {
        match stream.read(&mut part) {
            Ok(0) => break false,
            Ok(len) => bytes.extend_from_slice(&part[..len]),
            Err(error) => break error.kind() == ErrorKind::ConnectionReset,
        }
    };
    (String::from_utf8(bytes).unwrap().lines().map(str::to_owned).collect(), is_reset)
}

#[test]
fn what_waits_when_the_server_stops_is_read_before_the_reset() {
    let server = TestServer::start();
    let mut stream = TcpStream::connect(&server.addr).unwrap();
    // So that much waits in the server's send buffer.
    socket2::SockRef::from(&stream).set_recv_buffer_size(4_096).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(SUBSCRIBE.as_bytes()).unwrap();
    let mut hello = [0; 8];
    stream.read_exact(&mut hello).unwrap();
    let (mut conn, value) = (server.connect(), vec![255; 500]);
    for n in 0..8 {
        put(&mut conn, &format!("load.{n}"), &value);
    }
    drop(conn);
    let reader = in_the_background(move || {
        // The server has stopped meanwhile, as far as it can.
        thread::sleep(Duration::from_millis(500));
        rest(stream)
    });
    server.shutdown().unwrap();
    let (lines, is_reset) = reader();
    let whole = lines.iter().filter(|line| line.ends_with("\"skipped\":0}}")).count();
    assert_eq!((whole, lines.len(), is_reset), (8, 8, true));
}

fn in_the_background<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> impl FnOnce() -> T {
    let (done, result) = std::sync::mpsc::channel();
    thread::spawn(move || done.send(work()));
    move || result.recv_timeout(PATIENCE).unwrap()
}

#[test]
fn a_connection_of_the_oldest_kind_ends_with_a_reset_unless_the_client_ends_it() {
    let server = TestServer::start();
    let names = std::cell::Cell::new(0);
    let subscribed = |first: &str| {
        let mut conn = server.connect();
        names.set(names.get() + 1);
        conn.send(first.replace("\"c\"", &format!("\"c{}\"", names.get())));
        while conn.line() != "\"Hello\"" {}
        conn
    };
    let subscribe = SUBSCRIBE.trim();
    let mut finished = subscribed(subscribe);
    finished.send("{\"type\":\"Health\",\"id\":\"9\"}").finish();
    assert!(finished.line().contains("\"id\":\"9\""));
    let (lines, is_reset) = in_time(move || rest(finished.stream()));
    assert_eq!((lines.len(), is_reset), (0, false));

    let others = [format!("{subscribe}\n{{\"type\":\"Connect\"}}"), format!("{{\"type\":\"Connect\"}}\n{subscribe}")];
    let mut conns: Vec<_> = others.iter().map(|first| (subscribed(first), false)).collect();
    conns.push((subscribed(subscribe), true));
    assert!(conns[0].0.line().contains("max_value"));
    // A request over its limit is answered before that.
    let mut refused = subscribed(subscribe);
    refused.send("{\"type\":\"Put\",\"id\":\"8\",\"key\":\"k\",\"len\":99999999}");
    assert!(refused.line().contains("\"status\":413"));
    assert!(in_time(move || rest(refused.stream())).1);

    server.shutdown().unwrap();
    for (conn, is_reset) in conns {
        assert_eq!(in_time(move || rest(conn.stream())), (Vec::new(), is_reset));
    }
}

#[test]
fn a_server_that_goes_without_a_word_resets_them_too() {
    let server = TestServer::start();
    let mut conn = server.connect();
    conn.send(SUBSCRIBE.trim());
    assert_eq!(conn.line(), "\"Hello\"");
    server.die();
    assert_eq!(in_time(move || rest(conn.stream())), (Vec::new(), true));
}

#[test]
fn a_unix_socket_is_paced_and_closed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let server = TestServer::with(|builder| builder.listen(format!("unix:{}", path.display()).parse().unwrap()));
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(SUBSCRIBE.as_bytes()).unwrap();
    let mut hello = [0; 8];
    stream.read_exact(&mut hello).unwrap();
    let puts: Vec<_> = (0..100).map(|n| format!("{{\"type\":\"Put\",\"key\":\"load\",\"value\":[{n}]}}")).collect();
    server.connect().ask(&puts.join("\n"));
    let reader = in_the_background(move || rest(stream));
    server.shutdown().unwrap();
    let (lines, is_reset) = reader();
    assert!(lines.len() < 100 && lines.last().unwrap().contains("[99]") && !is_reset, "{lines:?}");
}
