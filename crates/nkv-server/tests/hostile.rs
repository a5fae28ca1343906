//! Clients that are hostile or broken, against the real binary: whatever they do, others are served, memory stays
//! within its bounds, and nothing of them is left when they are gone.
//!
//! Each test prints its figures in one line that begins with `TEST`; memory is that of the server's process.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use support::process::Process;
use support::{Conn, PATIENCE, eventually, status};

/// A server for one test, with its data in a directory that goes with it.
struct Victim {
    process: Process,
    _dir: tempfile::TempDir,
}

impl Victim {
    fn start(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let process = Process::start(&dir.path().join("data"), &[&["--durability", "os"], arguments].concat());
        Victim { process, _dir: dir }
    }

    fn connect(&self) -> Conn {
        self.process.connect()
    }

    fn raw(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.process.addr).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Does `attack` while a normal client puts and gets; how many puts it had answered, and the slowest.
    fn serves_during<T>(&self, attack: impl FnOnce() -> T) -> (T, u64, Duration) {
        let (over, puts, addr) = (AtomicBool::new(false), AtomicU64::new(0), &self.process.addr);
        thread::scope(|scope| {
            let normal = scope.spawn(|| {
                let mut conn = Conn::to(addr);
                conn.hello("normal", "text");
                let mut slowest = Duration::ZERO;
                while !over.load(Relaxed) || puts.load(Relaxed) == 0 {
                    let start = Instant::now();
                    let number = puts.load(Relaxed).to_string();
                    conn.put("normal", &number);
                    assert!(conn.ask(r#"{"type":"Get","key":"normal"}"#).contains(&format!("[\"{number}\"]")));
                    slowest = slowest.max(start.elapsed());
                    puts.fetch_add(1, Relaxed);
                }
                slowest
            });
            // Whether it succeeds or not: the normal client would go on for ever.
            let result = catch_unwind(AssertUnwindSafe(attack));
            over.store(true, Relaxed);
            let slowest = normal.join().unwrap();
            (result.unwrap_or_else(|panic| resume_unwind(panic)), puts.load(Relaxed), slowest)
        })
    }

    /// Nothing of the clients that were there is left.
    fn is_as_before(&self, before: support::process::Gauge, rss_slack_kib: usize) {
        let mut conn = self.connect();
        eventually("connections, subscriptions and descriptors are given back", || {
            let stats = conn.ask(r#"{"type":"Stats"}"#);
            let gauge = self.process.gauge();
            stats.contains("\"subscriptions\":0,\"connections\":1,") && gauge.descriptors <= before.descriptors + 1
        });
        let after = self.process.gauge();
        assert!(after.threads <= before.threads + 1, "{before:?} {after:?}");
        assert!(after.rss_kib <= before.rss_kib + rss_slack_kib, "{before:?} {after:?}");
    }
}

/// Reads until the server closes; what it said before.
fn until_closed(stream: &mut TcpStream) -> String {
    let mut said = Vec::new();
    match stream.read_to_end(&mut said) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(error) => panic!("not closed: {error}; it said {:?}", String::from_utf8_lossy(&said)),
    }
    String::from_utf8_lossy(&said).into_owned()
}

/// Writes until the server no longer takes it; how much it took.
fn write_all_it_takes(stream: &mut TcpStream, piece: &[u8], len_max: usize) -> usize {
    let mut written = 0;
    while written < len_max {
        match stream.write(piece) {
            Ok(len) => written += len,
            Err(_) => break,
        }
    }
    written
}

#[test]
fn an_endless_line_costs_a_line_at_most_and_half_lines_what_the_limit_says() {
    let victim = Victim::start(&["--max-queued", "16M"]);
    let before = victim.process.gauge();
    let ((endless, half_lines), puts, slowest) = victim.serves_during(|| {
        let mut stream = victim.raw();
        let taken = write_all_it_takes(&mut stream, &[b'a'; 1 << 16], 150 << 20);
        assert!(taken < 150 << 20, "all of it was taken");
        drop(stream);
        let endless = victim.process.gauge().rss_kib;

        // 500 lines of 64 KiB would be 32 MiB; the limit is 16. What is given back is used again.
        let half_lines: Vec<usize> = (0..3).map(|_| half_lines(&victim)).collect();
        (endless, half_lines)
    });
    println!(
        "TEST endless_line rss_kib={} endless_kib=+{} half_lines_kib={half_lines:?} puts={puts} slowest_ms={}",
        before.rss_kib,
        endless.saturating_sub(before.rss_kib),
        slowest.as_millis()
    );
    // A line is 6 MiB and 32 KiB at most, in a buffer that may be twice as large as what it holds.
    assert!(endless < before.rss_kib + (14 << 10), "{before:?} {endless}");
    // The allocator keeps holes where buffers have grown: some two times what is held.
    assert!(half_lines.iter().all(|rss| *rss < before.rss_kib + 4 * (16 << 10)), "{before:?} {half_lines:?}");
    victim.is_as_before(before, 4 * (16 << 10));
}

/// Has 500 connections send 64 KiB without a newline; what the server takes then. They are closed in the end.
fn half_lines(victim: &Victim) -> usize {
    let mut held: Vec<TcpStream> = (0..500).map(|_| victim.raw()).collect();
    for stream in &mut held {
        write_all_it_takes(stream, &[b'a'; 1 << 16], 1 << 16);
    }
    let mut watcher = victim.connect();
    let mut connections = || {
        let stats: serde_json::Value = serde_json::from_str(&watcher.ask(r#"{"type":"Stats"}"#)).unwrap();
        stats["Stats"]["connections"].as_u64().unwrap()
    };
    eventually("those that hold most are closed", || connections() < 270);
    let rss = victim.process.gauge().rss_kib;
    drop(held);
    eventually("all are gone", || connections() <= 2);
    rss
}

#[test]
fn a_client_that_sends_too_slowly_is_closed_and_the_answer_says_why() {
    let limits = ["--first-byte-limit", "400ms", "--request-limit", "600ms"];
    let victim = Victim::start(&limits);
    let before = victim.process.gauge();
    let (refused, puts, slowest) = victim.serves_during(|| {
        // A subscriber asks nothing for longer than any of this takes.
        let mut subscriber = victim.connect();
        assert_eq!(subscriber.ask(r#"{"type":"Subscribe","key":"silent"}"#), "\"Hello\"");

        let mut silent: Vec<_> = (0..300).map(|_| victim.raw()).collect();
        let mut dripping: Vec<_> = (0..100).map(|_| victim.raw()).collect();
        let start = Instant::now();
        // One byte at a time, of more bytes than can be sent in minutes.
        for byte in br#"{"type":"Get","key":"a"#.iter().chain(std::iter::repeat(&b'x')) {
            dripping.retain_mut(|stream| stream.write_all(&[*byte]).is_ok());
            if dripping.is_empty() {
                break;
            }
            assert!(start.elapsed() < PATIENCE, "{} still drip", dripping.len());
            thread::sleep(Duration::from_millis(20)); // the attack, not a wait for something
        }
        let refused = silent.iter_mut().map(until_closed).filter(|said| said.contains("408")).count();
        let mut blank = victim.raw();
        let start = Instant::now();
        while blank.write(&[b'\n'; 1_000]).is_ok() {
            assert!(start.elapsed() < PATIENCE, "blank lines are no request, however many they are");
        }
        assert!(subscriber.ask(r#"{"type":"Health"}"#).contains("200"), "a subscriber is not idle");
        refused
    });
    assert_eq!(refused, 300, "silent connections were closed without a word");
    println!("TEST slowloris silent=300 dripping=100 puts={puts} slowest_ms={}", slowest.as_millis());
    victim.is_as_before(before, 6 << 10);
}

#[test]
fn a_large_value_may_take_its_time_and_an_idle_connection_may_not() {
    let victim = Victim::start(&["--request-limit", "400ms", "--idle-limit", "500ms", "--max-value-size", "8M"]);
    let mut slow = victim.connect();
    slow.send(format!(r#"{{"type":"Put","key":"large","len":{}}}"#, 6 << 20));
    // Half a MiB at a time: each is well within the limit, all together are not.
    let start = Instant::now();
    for _ in 0..12 {
        slow.stream().write_all(&[b'x'; 1 << 19]).unwrap();
        thread::sleep(Duration::from_millis(80)); // the slowness that is tested
    }
    assert!(start.elapsed() > Duration::from_millis(800));
    assert_eq!(status(&slow.send("").line()), 200);
    // From here on it asks nothing.
    let answer = slow.line();
    assert_eq!(status(&answer), 408, "{answer}");
    assert!(answer.contains("500ms"), "the limit is not named: {answer}");
    assert_eq!(slow.line(), "(closed)");
}

#[test]
fn one_address_takes_no_more_places_than_it_is_allowed() {
    let victim = Victim::start(&["--max-connections-per-address", "5"]);
    let addr: SocketAddr = victim.process.addr.parse().unwrap();
    let from = |host: &str| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::new(host.parse().unwrap(), 0).into()).unwrap();
        socket.connect(&addr.into()).unwrap();
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    let held: Vec<_> = (0..5).map(|_| victim.connect()).collect();
    let said = until_closed(&mut from("127.0.0.1"));
    assert!(said.contains("503") && said.contains("from 127.0.0.1: 5 is the limit"), "{said}");
    victim.process.wait_for_log("a connection was refused");
    let mut other = from("127.0.0.2");
    other.write_all(b"{\"type\":\"Health\"}\n").unwrap();
    assert!(other.read(&mut [0; 100]).unwrap() > 10);
    drop(held);
    eventually("places are free again", || {
        let mut conn = victim.connect();
        drop(conn.stream().write_all(b"{\"type\":\"Health\"}\n"));
        conn.line().contains("200")
    });
}

#[test]
fn whatever_bytes_come_the_next_client_is_served() {
    let victim = Victim::start(&[]);
    let before = victim.process.gauge();
    let numbers = ["1e308", "1e999", "-1", "18446744073709551616", "0.5", "9".repeat(5_000).as_str()].map(String::from);
    let mut inputs: Vec<Vec<u8>> = vec![
        "[".repeat(200_000).into_bytes(),
        "{\"a\":".repeat(100_000).into_bytes(),
        b"{\"type\":\"Get\",\"key\":\"\xff\xfe\xc3\x28\"}".to_vec(),
        b"{\"type\":\"Get\",\"key\":\"a\xed\xa0\x80b\"}".to_vec(),
        b"\0\0\0\0{\"type\":\"Health\"}\0".to_vec(),
        b"\r\r\r{\"type\":\"Health\"}\r".to_vec(),
        b"{\"type\":\"Get\",\"key\":\"a\",\"key\":\"b\"}".to_vec(),
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(), // the beginning of a TLS handshake
        b"\n".repeat(1_000_000),
    ];
    for field in ["len", "limit", "ttl_ms", "if_revision"] {
        for number in &numbers {
            inputs.push(format!("{{\"type\":\"Put\",\"key\":\"a\",\"value\":\"\",\"{field}\":{number}}}").into_bytes());
        }
    }
    let count = inputs.len();
    for mut input in inputs {
        let conn = victim.connect();
        input.push(b'\n');
        // Some are refused and closed while we still write.
        drop(conn.stream().write_all(&input));
        drop(conn.stream().shutdown(std::net::Shutdown::Write));
        let said = until_closed(&mut conn.stream().try_clone().unwrap());
        for line in said.lines() {
            let known = [200, 400, 404, 413].contains(&status(line));
            assert!(known, "{:.100?}: {line:.200}", String::from_utf8_lossy(&input));
        }
        assert!(victim.connect().put("alive", "yes") > 0);
    }

    // Two requests in one packet are two requests, one in two hundred packets is one.
    let mut conn = victim.connect();
    conn.send("{\"type\":\"Health\",\"id\":1}\n{\"type\":\"Health\",\"id\":2}");
    assert!(conn.line().contains("\"id\":1") && conn.line().contains("\"id\":2"));
    let request = format!("{{\"type\":\"Put\",\"id\":3,\"key\":\"a\",\"value\":\"{}\"}}\n", "x".repeat(160));
    assert!(request.len() >= 200);
    for byte in request.as_bytes() {
        conn.stream().write_all(&[*byte]).unwrap();
    }
    assert!(conn.line().contains("\"id\":3,\"status\":200"));
    drop(conn);
    println!("TEST hostile_bytes inputs={count} served=all");
    victim.is_as_before(before, 12 << 10);
}

#[test]
fn keys_that_were_made_to_escape_are_stored_as_they_are_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let mut process = Process::start(&data, &[]);
    let outside = dir.path().join("pwned");
    let long = |len: usize| "k".repeat(len);
    let mut keys =
        ["..", ".", "", "a..b", ".a", "a.", "/etc/passwd", "../../pwned", "a/b", "a b", "a\tb", "a\nb", "\0"]
            .map(String::from)
            .to_vec();
    keys.extend(
        ["\u{1b}[2J", "\u{202e}x", "e\u{301}", "\u{e9}", "A", "a", "a.b", "*", "a.*", "a*b", "CON"].map(String::from),
    );
    keys.extend(
        ["-rf", "LOCK", "reserve", "0000000000000001.log", "k", "k.json", "'; DROP TABLE", "%s%n"].map(String::from),
    );
    keys.extend([outside.display().to_string(), long(255), long(256), long(1_024), long(1_025), "s.".repeat(10_000)]);
    let mut stored = Vec::new();
    for (number, key) in keys.iter().enumerate() {
        let mut conn = process.connect();
        let request = serde_json::json!({ "type": "Put", "key": key, "value": number.to_string() });
        match status(&conn.ask(&request.to_string())) {
            200 => stored.push((number, key)),
            400 | 413 => {}
            other => panic!("{key:?}: {other}"),
        }
    }
    process.signal("-KILL");
    process.wait();
    let process = Process::start(&data, &[]);
    let mut conn = process.connect();
    conn.hello("reader", "text");
    for (number, key) in &stored {
        conn.send(serde_json::json!({ "type": "Get", "key": key }).to_string());
        let got = conn.json();
        assert_eq!(got["Get"]["data"][0], number.to_string());
        assert_eq!(got["Get"]["keys"][0], **key);
    }
    assert!(!outside.exists());
    let mut names: Vec<_> = std::fs::read_dir(&data).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.retain(|name| name != "LOCK" && name != "reserve" && !name.to_string_lossy().ends_with(".log"));
    assert!(names.is_empty(), "{names:?}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    println!("TEST key_attacks keys={} stored={} refused={}", keys.len(), stored.len(), keys.len() - stored.len());
}

#[test]
fn a_hundred_thousand_subscriptions_come_and_go_and_leave_nothing() {
    let victim = Victim::start(&[]);
    let before = victim.process.gauge();
    let (connections, puts, _) = victim.serves_during(|| {
        // 90,000 on connections that stay, and 10,000 that end with theirs.
        let mut conn = victim.connect();
        conn.hello("churn", "bytes");
        for round in 0..90 {
            let mut input = String::new();
            for n in 0..1_000 {
                input += &format!("{{\"type\":\"Subscribe\",\"key\":\"c.{round}.{n}\"}}\n");
                input += &format!("{{\"type\":\"Unsubscribe\",\"key\":\"c.{round}.{n}\"}}\n");
            }
            let mut sender = conn.stream().try_clone().unwrap();
            thread::scope(|scope| {
                scope.spawn(move || sender.write_all(input.as_bytes()).unwrap());
                for _ in 0..3_000 {
                    assert!(!conn.line().contains("(closed)"));
                }
            });
        }
        let connections = 2_000;
        for n in 0..connections {
            let mut conn = victim.connect();
            let input = (0..5).map(|k| format!("{{\"type\":\"Subscribe\",\"key\":\"d.{n}.{k}\",\"snapshot\":true}}"));
            conn.send(input.collect::<Vec<_>>().join("\n"));
            if n % 2 == 0 {
                assert_eq!(conn.line(), "\"Hello\""); // the others do not wait for it
            }
        }
        connections
    });
    let peak = victim.process.gauge();
    victim.is_as_before(before, 8 << 10);
    let after = victim.process.gauge();
    println!(
        "TEST churn subscriptions=100000 connections={connections} puts={puts} rss_kib_before={} peak={} after={}",
        before.rss_kib, peak.rss_kib, after.rss_kib
    );
}

#[test]
fn storms_of_wildcards_keep_no_client_from_being_served() {
    let victim = Victim::start(&["--max-subscriptions-total", "5000"]);
    let mut writer = victim.connect();
    for n in 0..2_000 {
        writer.put(&format!("storm.{}.{n}", n % 50), "value");
    }
    let before = victim.process.gauge();
    let (refused, puts, slowest) = victim.serves_during(|| {
        let mut stormers: Vec<Conn> = Vec::new();
        let mut refused = 0;
        for s in 0..8 {
            let mut conn = victim.connect();
            conn.hello("storm", "bytes");
            for n in 0..1_000 {
                let pattern = ["*", "storm", "storm.*", "normal"][n % 4];
                let name = format!("{s}-{n}");
                let answer = conn.ask(&format!(r#"{{"type":"Subscribe","key":"{pattern}","client_uuid":"{name}"}}"#));
                match answer.as_str() {
                    "\"Hello\"" => {}
                    text if text.contains("429") => refused += 1,
                    text if text.contains("Update") => {}
                    text => panic!("{text}"),
                }
            }
            stormers.push(conn);
        }
        // All of them ask for everything, over and over, and read what they are sent.
        thread::scope(|scope| {
            for conn in &mut stormers {
                scope.spawn(move || {
                    for id in 0..20 {
                        conn.send(format!(r#"{{"type":"Get","id":"g{id}","key":"*"}}"#));
                        while !conn.line().contains(&format!("\"g{id}\"")) {}
                    }
                });
            }
        });
        refused
    });
    let peak = victim.process.gauge();
    println!(
        "TEST wildcard_storm subscriptions=5000 refused={refused} puts={puts} slowest_ms={} rss_kib=+{}",
        slowest.as_millis(),
        peak.rss_kib.saturating_sub(before.rss_kib)
    );
    assert!(refused > 0, "the limit of all subscriptions was not reported");
}

#[test]
fn unread_answers_are_bounded_and_small_ones_go_on() {
    let victim = Victim::start(&["--max-queued", "1M", "--stall-limit", "20s"]);
    let mut writer = victim.connect();
    let value = "v".repeat(32 << 10);
    for n in 0..8 {
        assert_eq!(status(&writer.ask(&format!(r#"{{"type":"Put","key":"big.{n}","value":"{value}"}}"#))), 200);
    }
    drop(writer);
    let before = victim.process.gauge();
    let (peak, puts, slowest) = victim.serves_during(|| {
        // Each answer takes 1 MiB in the form of byte arrays; those that are not read would be 60 MiB.
        let greedy: Vec<TcpStream> = (0..40)
            .map(|n| {
                let mut stream = victim.raw();
                // Half of them ask for what is never paged or refused for its size: one key at a time, again and again.
                let request = if n % 2 == 0 {
                    "{\"type\":\"Get\",\"key\":\"big.*\"}\n".to_owned()
                } else {
                    "{\"type\":\"Get\",\"key\":\"big.1\"}\n".repeat(20)
                };
                stream.write_all(request.as_bytes()).unwrap();
                stream
            })
            .collect();
        let mut peak = 0;
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(2) {
            peak = peak.max(victim.process.gauge().rss_kib);
            thread::yield_now();
        }
        // A client that reads gets what it asked for, although the others do not.
        let mut reader = victim.connect();
        reader.hello("reader", "payload").send(r#"{"type":"Get","key":"big.3"}"#);
        assert!(reader.line().contains("\"len\":32768"));
        drop(greedy);
        peak
    });
    println!(
        "TEST unread_answers limit_mib=1 rss_kib=+{} puts={puts} slowest_ms={}",
        peak.saturating_sub(before.rss_kib),
        slowest.as_millis()
    );
    // The limit, one answer that was let through, and one that is being made.
    assert!(peak < before.rss_kib + (10 << 10), "{before:?} {peak}");
    victim.is_as_before(before, 10 << 10);
}

#[test]
fn unread_answers_are_bounded_although_no_other_client_asks() {
    let victim = Victim::start(&["--max-queued", "2M", "--stall-limit", "20s"]);
    let value = "v".repeat(100_000);
    assert_eq!(status(&victim.connect().ask(&format!(r#"{{"type":"Put","key":"big","value":"{value}"}}"#))), 200);
    let before = victim.process.gauge();
    // 400 kB each, in the form of byte arrays: 24 MB.
    let greedy: Vec<TcpStream> = (0..60)
        .map(|_| {
            let mut stream = victim.raw();
            stream.write_all(b"{\"type\":\"Get\",\"key\":\"big\"}\n").unwrap();
            stream
        })
        .collect();
    victim.process.wait_for_log("all hold too much");
    let mut rss = Vec::new();
    eventually("it has settled", || {
        rss.push(victim.process.gauge().rss_kib);
        rss.len() > 20 && rss[rss.len() - 20..].iter().all(|kib| *kib == rss[rss.len() - 1])
    });
    let peak = rss.iter().max().unwrap();
    println!("TEST unread_alone limit_kib=2048 rss_kib=+{}", peak.saturating_sub(before.rss_kib));
    assert!(*peak < before.rss_kib + (12 << 10), "{before:?} {peak}");
    drop(greedy);
}

#[test]
fn a_process_that_stood_still_closes_no_connection_whose_request_waits() {
    let victim = Victim::start(&["--request-limit", "500ms"]);
    let mut conn = victim.connect();
    let value = "x".repeat(900_000);
    conn.stream()
        .write_all(
            format!("{{\"type\":\"Put\",\"key\":\"a\",\"len\":{}}}\n{}", value.len(), &value[..20_000]).as_bytes(),
        )
        .unwrap();
    // What it has read of that by now is held; the rest comes while it stands still, for longer than the limit.
    eventually("some was read", || victim.connect().put("alive", "yes") > 2);
    victim.process.signal("-STOP");
    let mut rest = conn.stream().try_clone().unwrap();
    let sender = thread::spawn(move || rest.write_all(format!("{}\n", &"x".repeat(880_000)).as_bytes()));
    thread::sleep(Duration::from_millis(900)); // how long it stands still
    victim.process.signal("-CONT");
    assert_eq!(status(&conn.line()), 200);
    sender.join().unwrap().unwrap();
}

#[test]
fn subscriptions_to_deep_keys_have_a_limit_of_their_own() {
    let victim = Victim::start(&[]);
    let before = victim.process.gauge();
    let mut conn = victim.connect();
    let (mut taken, mut refused) = (0, 0);
    for n in 0..200 {
        let key = format!("{n}{}", ".s".repeat(500));
        match conn.ask(&format!(r#"{{"type":"Subscribe","key":"{key}"}}"#)).as_str() {
            "\"Hello\"" => taken += 1,
            text if text.contains("429") => refused += 1,
            text => panic!("{text}"),
        }
    }
    let rss_kib = victim.process.gauge().rss_kib.saturating_sub(before.rss_kib);
    println!("TEST deep_subscriptions taken={taken} refused={refused} rss_kib=+{rss_kib}");
    assert!(taken > 8 && refused > 100);
    assert!(rss_kib < 10 << 10, "{rss_kib}");
}

/// The later wires of the first nkv: what comes takes bounded memory, and so does what is not read.
#[cfg(feature = "text-wire")]
#[test]
fn the_later_wires_hold_no_more_than_the_limit_says_and_others_are_served() {
    let victim = Victim::start(&["--max-queued", "16M"]);
    let mut conn = victim.connect();
    for number in 0..64 {
        conn.put(&format!("big.{number}"), &"x".repeat(64 << 10));
    }
    drop(conn);
    let frame = |len: u32, text: &str| [&len.to_le_bytes(), text.as_bytes()].concat();
    let before = victim.process.gauge();
    let (peak, puts, slowest) = victim.serves_during(|| {
        // Lengths that lie, texts that are none, and requests that are not whole.
        for bytes in [
            frame(0, "GET 1 me a\n"),
            frame((8 << 20) + 1, "GET 1 me a\n"),
            frame(2, "GET 1 me a\n"),
            frame(100, "GET 1 me a\n"),
            frame(11, "GET 1 me \u{fffd}\n"),
            [&frame(10, "PUT 1 me ")[..], b"\xff\xfe\n"].concat(),
            frame(9, "SUB 1 me\n"),
            frame(15, "SUB 1 me a..b \n"),
            b"SUB 1 me a b c\n".to_vec(),
            b"TRACE 1 me\n".to_vec(),
            b"PUT 1 me \0 \0\n".to_vec(),
            [&b"SUB "[..], &[b'x'; 100_000]].concat(),
        ] {
            let mut stream = victim.raw();
            drop(stream.write_all(&bytes));
            drop(stream.shutdown(std::net::Shutdown::Write));
            let said = until_closed(&mut stream);
            assert!(said.is_empty() || said.contains("FAILED") || said.contains("\"status\":400"), "{said:.200}");
        }
        let quickly = |request: &[u8]| {
            let mut stream = victim.raw();
            stream.set_write_timeout(Some(Duration::from_millis(20))).unwrap();
            stream.write_all(request).unwrap();
            stream
        };
        let mut peak = 0;
        for _ in 0..2 {
            // Values whose last byte does not come, answers and changes that are not read.
            let mut halves: Vec<_> = (0..32).map(|_| quickly(&frame(8 << 20, "PUT 1 me half "))).collect();
            for half in &mut halves {
                write_all_it_takes(half, &[b'A'; 1 << 16], (8 << 20) - 1_000);
            }
            let unread: Vec<_> = (0..64).map(|_| quickly(b"GET 1 me big.*\n")).collect();
            let deaf: Vec<_> = (0..64).map(|number| quickly(format!("SUB 1 me{number} big\n").as_bytes())).collect();
            let mut conn = victim.connect();
            for number in 0..64 {
                conn.put(&format!("big.{number}"), &"y".repeat(64 << 10));
                peak = peak.max(victim.process.gauge().rss_kib);
            }
            drop((halves, unread, deaf));
        }
        peak
    });
    println!(
        "TEST later_wires rss_kib={} peak_kib=+{} puts={puts} slowest_ms={}",
        before.rss_kib,
        peak.saturating_sub(before.rss_kib),
        slowest.as_millis()
    );
    assert!(peak < before.rss_kib + 4 * (16 << 10), "{before:?} {peak}");
    assert_eq!(status(&victim.connect().ask(r#"{"type":"Get","key":"half"}"#)), 404, "half a value was put");
    victim.is_as_before(before, 4 * (16 << 10));
}
