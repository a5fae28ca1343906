//! The real binary without file descriptors, stopped under load, and under a clock that jumps.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used)]

mod support;

use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use support::faults::{Load, check_all_there, run};
use support::process::{Process, command};
use support::{Conn, eventually, status};

#[test]
fn without_descriptors_it_waits_quietly_and_serves_again_when_there_are_some() {
    let dir = tempfile::tempdir().unwrap();
    let server = Process::start(dir.path(), &[]);
    let mut conn = server.connect();
    conn.put("a", "x");
    // All that it may have are in use now.
    let pid = server.child.id();
    let set_limit = |limit: usize| {
        run(Command::new("prlimit").args(["--pid", &pid.to_string()]).arg(format!("--nofile={limit}:"))).unwrap();
    };
    set_limit(std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count());
    // No more than the kernel lets wait.
    let waiting: Vec<_> = (0..100).map(|_| TcpStream::connect(&server.addr).unwrap()).collect();

    let (ticks, began) = (cpu_ticks(pid), Instant::now());
    thread::sleep(Duration::from_secs(1)); // what is measured is how little it does meanwhile
    let percent = (cpu_ticks(pid) - ticks) * 1000 / began.elapsed().as_millis() as u64;
    conn.put("a", "y");
    drop(waiting);
    set_limit(1024);
    // It accepts those that have gone first.
    let began = Instant::now();
    server.connect().put("a", "z");
    println!("TEST no_descriptors connects=100 cpu_percent={percent} served_again_ms={}", began.elapsed().as_millis());
    assert!(percent < 20, "{percent} % of a core while there was nothing to do");
}

/// CPU time of a process so far, in ticks of 10 ms.
fn cpu_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // Behind the name, which may hold anything: the state and ten numbers, then user and system time.
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn a_crowd_that_takes_all_descriptors_leaves_the_log_enough_to_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let server = Process::spawn({
        let mut command = Command::new("prlimit");
        command.args(["--nofile=64:64", env!("CARGO_BIN_EXE_nkv-server"), "127.0.0.1:0", "--data-dir"]);
        command.arg(dir.path()).stderr(std::process::Stdio::piped());
        command
    });
    let mut conn = server.connect();
    let crowd: Vec<_> = (0..200).map(|_| TcpStream::connect(&server.addr).unwrap()).collect();
    let value = "x".repeat(1_000_000);
    for n in 0..30 {
        conn.put(&format!("big.{}", n % 4), &value);
    }
    let newest = newest_segment(dir.path());
    assert!(newest > 4, "the log is still in segment {newest}");
    drop(crowd);
    let began = Instant::now();
    eventually("a put from a new connection", || {
        let mut conn = server.connect();
        // A refused connection may be reset while we write.
        drop(std::io::Write::write_all(&mut conn.stream(), b"{\"type\":\"Put\",\"key\":\"a\",\"value\":\"x\"}\n"));
        conn.line().contains("\"status\":200")
    });
    println!(
        "TEST descriptor_crowd nofile=64 connects=200 segments={newest} put_after_ms={}",
        began.elapsed().as_millis()
    );
}

fn newest_segment(data: &Path) -> u64 {
    let names = std::fs::read_dir(data).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter_map(|name| u64::from_str_radix(name.strip_suffix(".log")?, 16).ok()).max().unwrap()
}

#[test]
fn sigterm_under_load_loses_nothing_in_any_durability_and_keeps_the_epoch() {
    for durability in ["sync", "interval:50ms", "os"] {
        let dir = tempfile::tempdir().unwrap();
        let mut server = Process::start(dir.path(), &["--durability", durability]);
        let epoch = epoch(&mut server.connect());
        let load = Load::start(&server);
        let mut conn = server.connect();
        (0..50).for_each(|n| assert!(conn.put("meanwhile", &n.to_string()) > 0));
        let began = Instant::now();
        server.signal("-TERM");
        assert_eq!(server.wait().code(), Some(0));
        let took = began.elapsed();
        let acknowledged = load.join();

        let server = Process::start(dir.path(), &["--durability", durability]);
        check_all_there(&mut server.connect(), &acknowledged);
        assert_eq!(self::epoch(&mut server.connect()), epoch, "a clean stop keeps the epoch");
        println!(
            "TEST sigterm_load durability={durability} acknowledged={} lost=0 stopped_ms={}",
            acknowledged.len(),
            took.as_millis()
        );
        // The promise is 5 s; the process has to be started to see the signal, on a machine that does other things.
        assert!(took < Duration::from_secs(7), "{took:?}");
    }
}

fn epoch(conn: &mut Conn) -> String {
    conn.send(r#"{"type":"Connect"}"#);
    let answer = conn.json();
    answer["Base"]["epoch"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned()
}

#[test]
fn a_second_server_is_turned_away_while_the_first_is_under_load() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Process::start(dir.path(), &[]);
    let load = Load::start(&server);
    let began = Instant::now();
    for _ in 0..5 {
        // Were it let in, it would not end by itself.
        let mut second = Command::new("timeout");
        second.args(["10", env!("CARGO_BIN_EXE_nkv-server"), "127.0.0.1:0", "--data-dir"]);
        let output = second.arg(dir.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(73), "{output:?}");
    }
    let took = began.elapsed();
    server.connect().put("after", "x");
    server.signal("-KILL");
    server.wait();
    let acknowledged = load.join();
    let server = Process::start(dir.path(), &[]);
    check_all_there(&mut server.connect(), &acknowledged);
    assert_eq!(status(&server.connect().ask(r#"{"type":"Get","key":"after"}"#)), 200);
    println!("TEST two_servers refused=5 ms={} acknowledged={} lost=0", took.as_millis(), acknowledged.len());
}

/// A server whose wall clock is ours to set, if there is a library that does so.
fn with_clock(data: &Path, clock: &Path) -> Option<Process> {
    let library = ["x86_64", "aarch64"].map(|arch| format!("/usr/lib/{arch}-linux-gnu/faketime/libfaketime.so.1"));
    let Some(library) = library.into_iter().find(|library| Path::new(library).exists()) else {
        println!("SKIPPED: no libfaketime");
        return None;
    };
    let mut command = command();
    command.args(["127.0.0.1:0", "--data-dir"]).arg(data);
    command.env("LD_PRELOAD", library).env("FAKETIME_TIMESTAMP_FILE", clock);
    command.env("FAKETIME_NO_CACHE", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    Some(Process::spawn(command))
}

#[test]
fn a_wall_clock_that_jumps_ends_no_value_early_and_keeps_none() {
    let dir = tempfile::tempdir().unwrap();
    let (data, clock) = (dir.path().join("data"), dir.path().join("clock"));
    std::fs::write(&clock, "+0").unwrap();
    let Some(mut server) = with_clock(&data, &clock) else { return };
    let mut conn = server.connect();
    assert_eq!(conn.ask(r#"{"type":"Subscribe","key":"short"}"#), r#""Hello""#);
    let mut writer = server.connect();
    let put = |key: &str, ttl_ms: u64| format!(r#"{{"type":"Put","key":"{key}","value":"x","ttl_ms":{ttl_ms}}}"#);
    assert_eq!(status(&writer.ask(&put("long", 3_600_000))), 200);
    for jump in ["-3600", "+7200"] {
        std::fs::write(&clock, jump).unwrap();
        let began = Instant::now();
        assert_eq!(status(&writer.ask(&put("short", 700))), 200);
        assert!(conn.line().contains("Update"));
        let end = conn.line();
        assert!(end.contains("Close") && end.contains("expired"), "{end}");
        assert!(began.elapsed() >= Duration::from_millis(699), "it ended after {:?}", began.elapsed());
        assert_eq!(status(&writer.ask(r#"{"type":"Get","key":"long"}"#)), 200, "{jump}");
    }

    // Over a restart the wall clock counts: one that was set back prolongs nothing, one far ahead ends it.
    assert_eq!(status(&writer.ask(&put("short", 700))), 200);
    server.signal("-KILL");
    server.wait();
    std::fs::write(&clock, "-3600").unwrap();
    let mut server = with_clock(&data, &clock).unwrap();
    let mut conn = server.connect();
    eventually("what had a short time has ended", || status(&conn.ask(r#"{"type":"Get","key":"short"}"#)) == 404);
    assert_eq!(status(&conn.ask(r#"{"type":"Get","key":"long"}"#)), 200);
    server.signal("-KILL");
    server.wait();
    std::fs::write(&clock, "+86400").unwrap();
    let server = with_clock(&data, &clock).unwrap();
    let mut conn = server.connect();
    eventually("what had a long time has ended", || status(&conn.ask(r#"{"type":"Get","key":"long"}"#)) == 404);
    println!("TEST clock_jumps jumps=4 early=0 kept=0");
}

// Its wall clock was set after the value was put, and the next start took the TTL for over.
#[test]
fn on_a_board_without_a_clock_a_ttl_outlives_the_setting_of_the_clock() {
    let dir = tempfile::tempdir().unwrap();
    let (data, clock) = (dir.path().join("data"), dir.path().join("wall"));
    std::fs::write(&clock, "-1764000000").unwrap();
    let Some(mut server) = with_clock(&data, &clock) else { return };
    let put = r#"{"type":"Put","key":"lock","value":"x","ttl_ms":3600000}"#;
    assert_eq!(status(&server.connect().ask(put)), 200);
    let kept = || std::fs::read_to_string(data.join("clock")).unwrap();
    let before = kept();
    for set in [false, true] {
        if set {
            std::fs::write(&clock, "+0").unwrap();
            eventually("the clock is kept when it is set", || kept() != before);
        }
        server.signal("-KILL");
        server.wait();
        std::fs::write(&clock, "+0").unwrap();
        server = with_clock(&data, &clock).unwrap();
        assert_eq!(status(&server.connect().ask(r#"{"type":"Get","key":"lock"}"#)), 200);
    }
    // From then on time while nothing runs counts.
    server.signal("-KILL");
    server.wait();
    std::fs::write(&clock, "+3700").unwrap();
    let server = with_clock(&data, &clock).unwrap();
    let mut conn = server.connect();
    eventually("it has ended", || status(&conn.ask(r#"{"type":"Get","key":"lock"}"#)) == 404);
}
