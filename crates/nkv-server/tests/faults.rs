//! The real binary while its syncs fail or take their time, and while its disk is full, read-only or gone. Needs
//! `strace`, and root for a small disk; see [`support::faults`].

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use support::faults::{Load, SmallDisk, Strace, check_all_there};
use support::process::{Process, command};
use support::{Conn, eventually, status};

const SYNCS: &str = "trace=fsync,fdatasync";

#[test]
fn a_put_is_answered_after_a_flush_of_its_own_and_a_crowd_shares_one() {
    let dir = tempfile::tempdir().unwrap();
    let server = Process::start(dir.path(), &[]);
    let trace = dir.path().join("trace");
    let trace_arg = trace.to_str().unwrap();
    let Some(strace) = Strace::attach(&server, &["-e", SYNCS, "-o", trace_arg]) else { return };
    let mut conn = server.connect();
    for n in 0..100 {
        conn.put("a", &n.to_string());
    }
    strace.detach();
    let alone = flushes(&trace);
    assert!(alone >= 100, "{alone} flushes for 100 puts, one after another");

    let Some(strace) = Strace::attach(&server, &["-e", SYNCS, "-o", trace_arg]) else { return };
    // What arrives together shares a flush, however the clients' threads come to run.
    let puts = vec![r#"{"type":"Put","key":"a","value":"x"}"#; 20].join("\n");
    let mut crowd: Vec<_> = (0..32).map(|_| server.connect()).collect();
    for conn in &mut crowd {
        conn.send(&puts);
    }
    for conn in &mut crowd {
        (0..20).for_each(|_| assert_eq!(status(&conn.line()), 200));
    }
    strace.detach();
    let shared = flushes(&trace);
    println!("TEST group_commit puts=640 flushes={shared}");
    assert!(shared < 320, "{shared} flushes for 640 puts that came twenty at a time");
}

fn flushes(trace: &Path) -> usize {
    let trace = std::fs::read_to_string(trace).unwrap();
    // A call that another thread interrupts takes two lines.
    trace.lines().filter(|line| line.contains("sync(") && !line.contains("resumed")).count()
}

#[test]
fn an_answer_is_written_after_a_flush_that_began_after_its_record_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let server = Process::start(dir.path(), &[]);
    let trace = dir.path().join("trace");
    let calls = "trace=pwrite64,fdatasync,fsync,write,writev,sendto,sendmsg";
    let arguments = ["-y", "-s", "200", "-e", calls, "-o", trace.to_str().unwrap()];
    let Some(strace) = Strace::attach(&server, &arguments) else { return };
    let mut conn = server.connect();
    for n in 0..100 {
        conn.put("a", &n.to_string());
    }
    strace.detach();

    // A call that others interrupt takes two lines: where it began, and where it ended.
    let mut unfinished = BTreeMap::new();
    let (mut answers, mut flushes, mut flushed) = (0, 0, false);
    // Threads with a flush under way that began after the last record was written.
    let mut flushing = Vec::new();
    for line in std::fs::read_to_string(&trace).unwrap().lines() {
        let (thread, rest) = line.split_once(' ').unwrap();
        let rest = rest.trim_start();
        let begins = !rest.starts_with("<...");
        let call = if begins { rest } else { unfinished.remove(thread).unwrap_or("") };
        let ends = !rest.ends_with("<unfinished ...>");
        let is_flush = call.starts_with("fdatasync(") && call.contains(".log>");
        if begins && is_flush {
            flushing.push(thread);
        }
        if begins && call.contains(r#"\"status\":200"#) {
            assert!(flushed, "answer {answers} was written before its record was flushed: {line}");
            answers += 1;
        }
        if !ends {
            unfinished.insert(thread, rest);
        } else if is_flush && flushing.contains(&thread) {
            assert!(rest.ends_with("= 0"), "{rest}");
            flushes += 1;
            flushed = true;
        } else if call.starts_with("pwrite64(") && call.contains(".log>") {
            flushing.clear();
            flushed = false;
        }
    }
    println!("TEST strace_order puts=100 answers={answers} flushes={flushes}");
    assert_eq!(answers, 100, "some answers are not in the trace");
}

#[test]
fn when_a_flush_fails_nothing_is_acknowledged_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Process::start(dir.path(), &[]);
    let load = Load::start(&server);
    let mut conn = server.connect();
    (0..100).for_each(|n| assert!(conn.put("before", &n.to_string()) > 0));
    let inject = ["-e", SYNCS, "-e", "inject=fsync,fdatasync:error=EIO", "-o", "/dev/null"];
    let Some(_strace) = Strace::attach(&server, &inject) else { return };
    let attached = Instant::now();
    assert_eq!(server.wait().code(), Some(74));
    let acknowledged = load.join();
    let after = acknowledged.iter().filter(|put| put.sent > attached).count();

    let server = Process::start(dir.path(), &[]);
    check_all_there(&mut server.connect(), &acknowledged);
    let before = server.connect().ask(r#"{"type":"Get","key":"before"}"#);
    assert!(before.contains("[57,57]"), "{before}"); // 99
    println!("TEST strace_eio acknowledged={} after={after} lost=0 code=74", acknowledged.len());
    assert_eq!(after, 0, "acknowledged although every flush failed");
}

// Their connections were cut before the answers were written: 95 of 96 saw the end of the stream.
#[test]
fn every_writer_that_waits_for_a_flush_that_fails_is_answered_500() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Process::start(dir.path(), &[]);
    let mut conns: Vec<_> = (0..96).map(|_| server.connect()).collect();
    let inject = ["-e", SYNCS, "-e", "inject=fsync,fdatasync:error=EIO:delay_enter=500000", "-o", "/dev/null"];
    let Some(_strace) = Strace::attach(&server, &inject) else { return };
    for conn in &mut conns {
        // The put came with what is answered at once, so it waits for storage by then.
        conn.send("{\"type\":\"Health\"}\n{\"type\":\"Put\",\"key\":\"a\",\"value\":\"x\"}");
    }
    let mut answers = BTreeMap::new();
    for conn in &mut conns {
        assert_eq!(status(&conn.line()), 200);
        let answer = conn.line();
        *answers.entry(if answer == "(closed)" { 0 } else { status(&answer) }).or_insert(0) += 1;
    }
    assert_eq!(server.wait().code(), Some(74));
    println!("TEST strace_eio_answers {answers:?}");
    assert_eq!(answers, BTreeMap::from([(500, 96)]));
}

// It went on to serve what was acknowledged and not durable, until the next write came.
#[test]
fn a_flush_of_the_interval_that_fails_ends_the_server_although_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Process::start(dir.path(), &["--durability", "interval:500ms"]);
    let inject = ["-e", SYNCS, "-e", "inject=fsync,fdatasync:error=EIO", "-o", "/dev/null"];
    let Some(_strace) = Strace::attach(&server, &inject) else { return };
    assert!(server.connect().put("a", "acknowledged") > 0);
    assert_eq!(server.wait().code(), Some(74));
    println!("TEST strace_eio_interval writes_after=0 code=74");
}

// It waited for the disk, however long that took.
#[test]
fn sigterm_on_a_disk_that_stalls_ends_the_server_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Process::start(dir.path(), &[]);
    let mut conn = server.connect();
    let inject = ["-e", SYNCS, "-e", "inject=fsync,fdatasync:delay_enter=60000000", "-o", "/dev/null"];
    let Some(strace) = Strace::attach(&server, &inject) else { return };
    conn.send("{\"type\":\"Health\"}\n{\"type\":\"Put\",\"key\":\"a\",\"value\":\"x\"}");
    assert_eq!(status(&conn.line()), 200);
    let began = Instant::now();
    server.signal("-TERM");
    // The promise is 5 s; here the process is traced, on a machine that does other things.
    server.wait_for_log("storage did not answer");
    println!("TEST strace_stall stopped_ms={}", began.elapsed().as_millis());
    // What is traced ends only when the tracer lets it; and that does not hear of signals while its tracee is ending.
    drop(strace);
    assert_eq!(server.wait().code(), Some(74));
}

#[test]
fn a_last_flush_that_fails_is_what_the_exit_code_says() {
    for durability in ["sync", "interval:60m", "os"] {
        let dir = tempfile::tempdir().unwrap();
        let mut server = Process::start(dir.path(), &["--durability", durability]);
        server.connect().put("a", "x");
        let inject = ["-e", SYNCS, "-e", "inject=fsync,fdatasync:error=EIO", "-o", "/dev/null"];
        let Some(_strace) = Strace::attach(&server, &inject) else { return };
        server.signal("-TERM");
        assert_eq!(server.wait().code(), Some(74), "{durability}");
    }
    println!("TEST strace_eio_at_the_end durabilities=3 code=74");
}

#[test]
fn while_a_flush_takes_its_time_reads_are_served_and_what_is_durable_is_notified() {
    let dir = tempfile::tempdir().unwrap();
    let server = Process::start(dir.path(), &[]);
    server.connect().put("old", "x");
    let mut subscriber = server.connect();
    assert_eq!(subscriber.ask(r#"{"type":"Subscribe","key":"first"}"#), r#""Hello""#);
    let inject = ["-e", SYNCS, "-e", "inject=fdatasync:delay_enter=1000000", "-o", "/dev/null"];
    let Some(_strace) = Strace::attach(&server, &inject) else { return };

    let done = AtomicBool::new(false);
    let (mut reader, mut writer) = (server.connect(), server.connect());
    let gets = thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let mut gets = 0;
            while !done.load(Ordering::SeqCst) {
                assert_eq!(status(&reader.ask(r#"{"type":"Get","key":"old"}"#)), 200);
                gets += 1;
            }
            gets
        });
        writer.put("slow", "x");
        done.store(true, Ordering::SeqCst);
        reading.join().unwrap()
    });
    assert!(gets >= 100, "{gets} gets were answered while a put waited for its flush");

    // Two puts in two batches: the first is notified while the second waits.
    let mut rounds = 0;
    loop {
        rounds += 1;
        let before = batches(&mut reader);
        let (notified, order) = mpsc::channel();
        let answered = notified.clone();
        writer.send(r#"{"type":"Put","key":"first","value":"x"}"#);
        reader.ask(r#"{"type":"Health"}"#);
        let mut other = server.connect();
        let second = thread::spawn(move || {
            other.put("second", "x");
            answered.send("second answered").unwrap();
        });
        assert!(subscriber.line().contains("Update"));
        notified.send("first notified").unwrap();
        assert_eq!(status(&writer.line()), 200);
        second.join().unwrap();
        if batches(&mut reader) == before + 2 {
            assert_eq!(order.try_iter().collect::<Vec<_>>(), ["first notified", "second answered"]);
            break;
        }
        assert!(rounds < 5, "both puts were in one batch each time");
    }
    println!("TEST slow_fsync gets_meanwhile={gets} rounds={rounds}");
}

fn batches(conn: &mut Conn) -> u64 {
    conn.send(r#"{"type":"Stats"}"#);
    let answer = conn.json();
    answer["Stats"]["batches"].as_u64().unwrap_or_else(|| panic!("{answer}"))
}

#[test]
fn a_full_disk_keeps_what_it_has_takes_deletes_and_then_puts_again() {
    for (name, disk) in [("tmpfs", SmallDisk::tmpfs()), ("ext4", SmallDisk::ext4())] {
        if let Some(disk) = disk {
            fill_and_empty(name, &disk);
        }
    }
}

#[test]
fn on_a_full_disk_everything_can_be_deleted_at_once() {
    for (name, disk) in [("tmpfs", SmallDisk::tmpfs()), ("ext4", SmallDisk::ext4())] {
        let Some(disk) = disk else { continue };
        let server = Process::start(&disk.data(), &[]);
        let mut conn = server.connect();
        let put = |n: usize| format!(r#"{{"type":"Put","key":"k.{n}","value":"{}"}}"#, "x".repeat(500));
        let (mut stored, mut sent) = (0, 0);
        loop {
            // The last ones to fit are short, and come alone.
            let some: Vec<String> = (sent..sent + 256).map(put).collect();
            sent += some.len();
            conn.send(some.join("\n"));
            let done: Vec<u64> = some.iter().map(|_| status(&conn.line())).collect();
            stored += done.iter().filter(|status| **status == 200).count();
            assert!(done.iter().all(|status| matches!(status, 200 | 507)), "{done:?}");
            assert!(sent < 100_000, "the disk does not fill");
            if done.iter().all(|status| *status == 507) {
                break;
            }
        }
        conn.send(r#"{"type":"Delete","key":"*"}"#);
        let answer = conn.json();
        assert_eq!((&answer["Base"]["status"], &answer["Base"]["count"]), (&200.into(), &stored.into()), "{answer}");
        eventually("puts fit again", || status(&conn.ask(&put(0))) == 200);
        println!("TEST enospc_wildcard disk={name} deleted={stored}");
    }
}

fn fill_and_empty(name: &str, disk: &SmallDisk) {
    let mut server = Process::start(&disk.data(), &[]);
    let mut conn = server.connect();
    let stored = fill(&mut conn, 0);
    let began = Instant::now();
    (0..500).for_each(|_| assert_eq!(status(&conn.ask(&big_put(0))), 507));
    let seconds = began.elapsed().as_secs();
    let refusals = server.log.try_iter().filter(|line| line.contains("was not stored")).count() as u64;
    // One a second, also for what was refused while the disk filled.
    assert!((1..=seconds + 3).contains(&refusals), "{refusals} lines in {seconds} s for 500 refused puts");
    check_keys(&mut conn, stored);

    server.signal("-KILL");
    server.wait();
    let mut server = Process::start(&disk.data(), &[]);
    let mut conn = server.connect();
    check_keys(&mut conn, stored);
    // Recovery may have made a little room.
    let stored = fill(&mut conn, stored);

    // One of the keys must be left over, to be kept safe while space is made.
    for n in 1..stored {
        let answer = conn.ask(&format!(r#"{{"type":"Delete","key":"k.{n:03}"}}"#));
        assert_eq!(status(&answer), 200, "delete {n} of {stored}: {answer}");
    }
    eventually("a put fits again", || status(&conn.ask(&big_put(999))) == 200);

    server.signal("-KILL");
    server.wait();
    let server = Process::start(&disk.data(), &[]);
    let listed = server.connect().ask(r#"{"type":"List","key":"*"}"#);
    assert!(listed.contains(r#""keys":["k.000","k.999"]"#), "{listed}");
    println!("TEST enospc disk={name} stored={stored} lost=0 restarts_needed=0");
}

fn big_put(n: usize) -> String {
    format!(r#"{{"type":"Put","key":"k.{n:03}","value":"{}"}}"#, "x".repeat(50_000))
}

/// Puts until the disk is full; gives how many keys there are.
fn fill(conn: &mut Conn, from: usize) -> usize {
    for n in from..990 {
        let answer = conn.ask(&big_put(n));
        if status(&answer) != 200 {
            assert_eq!(status(&answer), 507, "{answer}");
            return n;
        }
    }
    panic!("the disk does not fill");
}

fn check_keys(conn: &mut Conn, stored: usize) {
    conn.hello("c", "text");
    assert_eq!(conn.ask(r#"{"type":"List","key":"*"}"#).matches("\"k.").count(), stored);
    let value = "x".repeat(50_000);
    for n in 0..stored {
        let got = conn.ask(&format!(r#"{{"type":"Get","key":"k.{n:03}"}}"#));
        assert!(got.contains(&value), "k.{n:03} is not whole");
    }
}

#[test]
fn on_a_disk_that_turns_read_only_it_stops_and_acknowledges_nothing_more() {
    let Some(disk) = SmallDisk::ext4() else { return };
    let mut server = Process::start(&disk.data(), &[]);
    let mut conn = server.connect();
    conn.put("a", "x");
    let load = Load::start(&server);
    conn.put("a", "y");
    // What the kernel does to a file system in which it finds a fault.
    disk.remount("abort");
    let turned = Instant::now();
    let acknowledged = load.join();
    let after = acknowledged.iter().filter(|put| put.sent > turned).count();
    // What was refused cannot be cut off either: it is not known what the disk holds.
    assert_eq!(server.wait().code(), Some(74));

    // And to start on such a disk is refused, in one line.
    let (code, said) = run_to_end(&disk.data());
    assert_eq!((code, said.lines().count()), (74, 1), "{said}");
    assert!(said.contains("data") && !said.contains("panicked"), "{said}");
    println!("TEST read_only acknowledged={} after={after} code=74 start_code={code}", acknowledged.len());
    assert_eq!(after, 0, "acknowledged on a read-only disk");
}

fn run_to_end(data: &Path) -> (i32, String) {
    let mut command = command();
    let output = command.args(["127.0.0.1:0", "--log-level", "off", "--data-dir"]).arg(data).output().unwrap();
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn without_its_directory_a_server_answers_and_stops() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let mut server = Process::start(&data, &[]);
    let mut conn = server.connect();
    conn.put("a", "x");
    std::fs::remove_dir_all(&data).unwrap();
    // Enough for a new segment, which has no directory to be in.
    let value = "x".repeat(500_000);
    let (mut refused, mut goes_on) = (None, true);
    for n in 0..40 {
        let answer = conn.ask(&format!(r#"{{"type":"Put","key":"big.{}","value":"{value}"}}"#, n % 4));
        if answer == "(closed)" || status(&answer) != 200 {
            refused.get_or_insert(n);
        }
        if answer == "(closed)" {
            goes_on = false;
            break;
        }
        assert!(matches!(status(&answer), 200 | 500), "{answer}");
    }
    let refused = refused.expect("puts into a directory that is gone are acknowledged for ever");
    if goes_on {
        assert_eq!(status(&server.connect().ask(r#"{"type":"Get","key":"a"}"#)), 200);
        server.signal("-TERM");
    }
    let code = server.wait().code().unwrap();
    println!("TEST directory_gone refused_after={refused} goes_on={goes_on} code={code}");
    assert!(code == 74 || goes_on && code == 0, "{code}");
}
