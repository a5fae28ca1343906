//! Slow readers beside fast ones, against the real binary: no client waits for them, what is kept for them is bounded by
//! the keys that they cover, and they have the last state when they read on.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use support::process::Process;
use support::{Conn, PATIENCE, eventually, status};

const KEYS: usize = 10_000;
const VALUE_LEN: usize = 200;

/// The revision of each key as a subscriber received it last, and of all keys the newest.
#[derive(Default)]
struct Known {
    revisions: BTreeMap<String, u64>,
    newest: u64,
    events: u64,
}

impl Known {
    fn hear(&mut self, line: &str) {
        // By hand: half a million lines of it, unoptimised.
        let field = |name: &str, end: char| -> Option<&str> { line.split_once(name)?.1.split_once(end).map(|f| f.0) };
        let (key, revision) = (field("{\"Update\":{\"key\":\"", '"'), field("\"revision\":", ','));
        let (Some(key), Some(revision)) = (key, revision) else { panic!("no update: {line:.200}") };
        let revision = revision.parse().unwrap();
        assert!(revision > self.newest, "went back from {} to {line:.100}", self.newest);
        self.newest = revision;
        self.events += 1;
        self.revisions.insert(key.to_owned(), revision);
    }
}

fn subscriber(process: &Process, pattern: &str) -> TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(8 << 10).unwrap(); // so that little of what waits is in the kernel
    socket.connect(&process.addr.parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let request = "{\"type\":\"Connect\",\"values\":\"text\"}\n{\"type\":\"Subscribe\",\"key\":\"PATTERN\"}\n";
    (&stream).write_all(request.replace("PATTERN", pattern).as_bytes()).unwrap();
    let mut said = Vec::new();
    while !said.ends_with(b"\"Hello\"\n") {
        let mut byte = [0];
        (&stream).read_exact(&mut byte).unwrap();
        said.extend_from_slice(&byte);
    }
    stream
}

/// Reads on until the end of all writing is received.
fn catch_up(stream: impl Read, known: &mut Known) {
    let mut lines = BufReader::with_capacity(64 << 10, stream).lines();
    while !known.revisions.contains_key("slow.end") {
        known.hear(&lines.next().unwrap().unwrap());
    }
}

/// Puts everything twice and one key over and over; the slowest put.
fn write_a_lot(conn: &mut Conn) -> Duration {
    let mut slowest = Duration::ZERO;
    let value = "x".repeat(VALUE_LEN);
    for n in 0..2 * KEYS {
        let key = if n % 2 == 0 { "slow.hot".to_owned() } else { format!("slow.{}", n / 2) };
        let start = Instant::now();
        conn.put(&key, &value);
        slowest = slowest.max(start.elapsed());
    }
    slowest
}

#[test]
fn slow_readers_delay_no_other_client_and_have_the_last_state_when_they_read_on() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(&dir.path().join("data"), &["--durability", "os", "--stall-limit", "10m"]);
    let mut writer = process.connect();
    let undisturbed = write_a_lot(&mut writer);
    let before = process.gauge();

    let stalled = subscriber(&process, "*");
    let slow: Vec<TcpStream> = (0..50).map(|n| subscriber(&process, ["*", "slow", "slow.*"][n % 3])).collect();
    let fast: Vec<TcpStream> = (0..3).map(|_| subscriber(&process, "slow")).collect();
    // What the slow ones have read in halves of lines is kept for when they read on.
    let mut slow: Vec<(TcpStream, Vec<u8>)> = slow.into_iter().map(|stream| (stream, Vec::new())).collect();
    let written = AtomicBool::new(false);
    let (slowest, peak) = thread::scope(|scope| {
        for stream in fast {
            scope.spawn(|| {
                let mut known = Known::default();
                catch_up(stream, &mut known);
                assert_eq!(known.revisions.len(), KEYS + 2);
            });
        }
        let slow_reader = scope.spawn(|| {
            while !written.load(Relaxed) {
                for (stream, heard) in &mut slow {
                    stream.set_nonblocking(true).unwrap();
                    let mut piece = [0; 200];
                    match stream.read(&mut piece) {
                        Ok(len) => heard.extend_from_slice(&piece[..len]),
                        Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
                    }
                }
                thread::sleep(Duration::from_millis(20)); // the slowness
            }
        });
        let slowest = write_a_lot(&mut writer);
        let peak = process.gauge();
        written.store(true, Relaxed);
        slow_reader.join().unwrap();
        writer.put("slow.end", "");
        (slowest, peak)
    });

    // Those that were fast have the end; now the others read on.
    let mut expected = BTreeMap::new();
    writer.send(r#"{"type":"List","key":"*","limit":10000}"#);
    let mut page = writer.json();
    loop {
        let keys = page["List"]["keys"].as_array().unwrap();
        for (key, revision) in keys.iter().zip(page["List"]["revisions"].as_array().unwrap()) {
            expected.insert(key.as_str().unwrap().to_owned(), revision.as_u64().unwrap());
        }
        if page["List"]["more"] != true {
            break;
        }
        let after = expected.keys().next_back().unwrap();
        writer.send(format!(r#"{{"type":"List","key":"*","limit":10000,"after":"{after}"}}"#));
        page = writer.json();
    }
    let mut events = Vec::new();
    slow.push((stalled, Vec::new()));
    for (stream, heard) in slow {
        stream.set_nonblocking(false).unwrap();
        let mut known = Known::default();
        let mut half = heard.split(|byte| *byte == b'\n').collect::<Vec<_>>();
        let rest = half.pop().unwrap_or_default().to_vec();
        half.into_iter().for_each(|line| known.hear(std::str::from_utf8(line).unwrap()));
        catch_up(rest.chain(stream), &mut known);
        assert_eq!(known.revisions, expected);
        events.push(known.events);
    }
    let waiting_kib = 51 * KEYS * 200 / 1_024;
    println!(
        "TEST slow_readers slow=50 stalled=1 fast=3 keys={KEYS} puts={} events_min={} rss_kib=+{} slowest_put_ms={} \
         undisturbed_ms={}",
        2 * KEYS,
        events.iter().min().unwrap(),
        peak.rss_kib.saturating_sub(before.rss_kib),
        slowest.as_millis(),
        undisturbed.as_millis()
    );
    // What a slow one received is what it covers and what fitted its buffers, not all that happened.
    assert!(events.iter().all(|events| (*events as usize) < 2 * KEYS), "{events:?}");
    // A place in a queue and one in a map for each key that waits, and each value twice: stored, and encoded once.
    assert!(
        peak.rss_kib < before.rss_kib + waiting_kib + 2 * KEYS * VALUE_LEN / 1_024 + (8 << 10),
        "{before:?} {peak:?}"
    );
}

#[test]
fn a_client_that_stalls_past_the_limit_is_cut_and_the_log_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(&dir.path().join("data"), &["--durability", "os", "--stall-limit", "500ms"]);
    let stalled = subscriber(&process, "*");
    let mut writer = process.connect();
    let value = "x".repeat(100_000);
    let start = Instant::now();
    let line = loop {
        writer.put("big", &value);
        match process.log.try_recv() {
            Ok(line) if line.contains("cut") => break line,
            _ => assert!(start.elapsed() < PATIENCE, "not cut"),
        }
    };
    assert!(line.contains("took nothing for 500ms") && line.contains("127.0.0.1:"), "{line}");
    eventually("its subscription is gone", || writer.ask(r#"{"type":"Stats"}"#).contains("\"subscriptions\":0,"));
    // It comes back and has the latest.
    drop(stalled);
    let last = writer.put("big", "last");
    let mut back = process.connect();
    back.send(r#"{"type":"Subscribe","key":"*","snapshot":true}"#);
    assert_eq!(back.line(), "\"Hello\"");
    let mut known = Known::default();
    known.hear(&back.line());
    assert_eq!(known.newest, last);
    println!("TEST stall limit_ms=500 cut=1");
}

#[test]
fn only_a_client_that_reads_drop_by_drop_is_closed_for_those_that_wait() {
    let dir = tempfile::tempdir().unwrap();
    let limits = ["--durability", "os", "--stall-limit", "1s", "--max-queued", "2M"];
    let process = Process::start(&dir.path().join("data"), &limits);
    let mut writer = process.connect();
    let value = "x".repeat(200_000);
    for n in 0..40 {
        assert_eq!(status(&writer.ask(&format!(r#"{{"type":"Put","key":"big.{n}","value":"{value}"}}"#))), 200);
    }
    let idle: Vec<TcpStream> = (0..10).map(|_| subscriber(&process, "idle")).collect();
    let mut dripping = process.connect();
    dripping.hello("dripping", "payload").send(r#"{"type":"Get","key":"big.*"}"#);
    // It has its header, so the rest waits; it takes far more than the stall limit asks for, and eight seconds.
    assert!(dripping.line().contains("\"len\":8000000"));
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Relaxed) && dripping.stream().read(&mut [0; 20_000]).is_ok_and(|len| len > 0) {
                thread::sleep(Duration::from_millis(20)); // the slowness
            }
        });
        let waiting: Vec<_> = (0..5)
            .map(|_| {
                let mut other = process.connect();
                scope.spawn(move || {
                    other.hello("other", "payload").send(r#"{"type":"Get","key":"big.*","limit":3}"#);
                    let header = other.line();
                    assert!(header.contains("\"len\":600000"), "{header:.200}");
                    other.bytes(600_001);
                    other
                })
            })
            .collect();
        let others: Vec<Conn> = waiting.into_iter().map(|other| other.join().unwrap()).collect();
        over.store(true, Relaxed);
        let stats = writer.ask(r#"{"type":"Stats"}"#);
        assert!(stats.contains("\"connections\":16,"), "more than the one were closed: {stats}");
        drop(others);
    });
    let line = process.wait_for_log("all hold too much");
    assert!(!line.contains(", 0 bytes"), "{line}");
    drop(idle);
}

#[test]
fn versions_that_stalled_readers_are_stuck_in_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let limits = ["--durability", "os", "--stall-limit", "1m", "--max-queued", "4M"];
    let process = Process::start(&dir.path().join("data"), &limits);
    let mut writer = process.connect();
    let value = "x".repeat(400_000);
    let before = process.gauge();
    let mut stalled = Vec::new();
    // Each is stuck in the middle of a version of its own; all of them would be 100 times 400 kB. Every other one says
    // that it has nothing more to ask.
    for n in 0..100 {
        let stream = subscriber(&process, "big");
        writer.put("big", &value);
        if n % 2 == 0 {
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        }
        stalled.push(stream);
    }
    let peak = process.gauge();
    println!("TEST stuck_versions limit_kib=4096 rss_kib=+{}", peak.rss_kib.saturating_sub(before.rss_kib));
    let line = process.wait_for_log("all hold too much");
    assert!(!line.contains(", 0 bytes"), "{line}");
    assert!(peak.rss_kib < before.rss_kib + (20 << 10), "{before:?} {peak:?}");
}

#[test]
fn large_snapshots_wait_for_each_other_so_that_no_client_that_reads_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let process = Process::start(&dir.path().join("data"), &["--durability", "os", "--max-queued", "4M"]);
    let mut writer = process.connect();
    let value = "x".repeat(100_000);
    for n in 0..20 {
        assert_eq!(status(&writer.ask(&format!(r#"{{"type":"Put","key":"big.{n}","value":"{value}"}}"#))), 200);
    }
    // 2 MB for each of them, 32 MB for all at once.
    let mut readers: Vec<Conn> = (0..16).map(|_| process.connect()).collect();
    for reader in &mut readers {
        reader.hello("", "text").send(r#"{"type":"Subscribe","key":"*","snapshot":true}"#);
    }
    // No client reads before the server had time to come to each of them, and to make too much.
    (0..200).for_each(|_| assert_eq!(status(&writer.ask(r#"{"type":"Health"}"#)), 200));
    thread::scope(|scope| {
        for reader in &mut readers {
            scope.spawn(|| {
                assert_eq!(reader.line(), "\"Hello\"");
                (0..20).for_each(|_| assert!(reader.line().starts_with("{\"Update\"")));
                assert!(reader.line().starts_with("{\"Synced\""));
            });
        }
    });
    println!("TEST snapshots_at_once readers=16 closed=0");
}
