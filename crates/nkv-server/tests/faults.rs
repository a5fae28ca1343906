//! The real binary under faults of its system calls and its disk. Needs `strace`, and root for a small disk; what
//! cannot run says so, and fails instead where `NKV_FAULTS=1` says that it must run.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use support::process::Process;
use support::{eventually, status};

/// strace attached to a server, detached when dropped.
struct Strace(Child);

impl Strace {
    fn attach(server: &Process, arguments: &[&str]) -> Option<Strace> {
        let mut command = Command::new("strace");
        command.arg("-f").args(arguments).arg("-p").arg(server.child.id().to_string());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => {
                skip(&format!("no strace: {error}"));
                return None;
            }
        };
        let mut said = String::new();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        while !said.contains("attached") {
            assert!(stderr.read_line(&mut said).unwrap() > 0, "strace did not attach: {said}");
        }
        // It goes on to say things, and must not be held up by nobody reading them.
        std::thread::spawn(move || stderr.lines().map_while(Result::ok).for_each(drop));
        Some(Strace(child))
    }

    fn detach(mut self) {
        let pid = self.0.id().to_string();
        assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
        self.0.wait().unwrap();
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn skip(why: &str) {
    assert!(std::env::var_os("NKV_FAULTS").is_none(), "NKV_FAULTS is set, and this cannot run: {why}");
    println!("SKIPPED: {why}");
}

#[test]
fn a_put_is_answered_after_a_flush_of_its_own_and_a_crowd_shares_one() {
    let dir = tempfile::tempdir().unwrap();
    let server = Process::start(dir.path(), &[]);
    let trace = dir.path().join("trace");
    let trace_arg = trace.to_str().unwrap();
    let Some(strace) = Strace::attach(&server, &["-e", "trace=fsync,fdatasync", "-o", trace_arg]) else { return };
    let mut conn = server.connect();
    for n in 0..100 {
        conn.put("a", &n.to_string());
    }
    strace.detach();
    let alone = flushes(&trace);
    assert!(alone >= 100, "{alone} flushes for 100 puts, one after another");

    let Some(strace) = Strace::attach(&server, &["-e", "trace=fsync,fdatasync", "-o", trace_arg]) else { return };
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
fn when_a_flush_fails_nothing_is_acknowledged_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Process::start(dir.path(), &[]);
    server.connect().put("before", "x");
    let inject = ["-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:error=EIO", "-o", "/dev/null"];
    let Some(_strace) = Strace::attach(&server, &inject) else { return };
    let mut conn = server.connect();
    let answer = conn.ask(r#"{"type":"Put","key":"after","value":"x"}"#);
    assert!(answer == "(closed)" || status(&answer) == 500, "{answer}");
    assert_eq!(server.wait().code(), Some(74));

    let server = Process::start(dir.path(), &[]);
    assert_eq!(status(&server.connect().ask(r#"{"type":"Get","key":"before"}"#)), 200);
}

/// A file system of three megabytes, gone when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=3m,mode=0700", "nkv"]).arg(dir.path()).output();
        match mount {
            Ok(output) if output.status.success() => Some(SmallDisk(dir)),
            other => {
                skip(&format!("no small disk: {other:?}"));
                None
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(self.0.path()).status());
    }
}

#[test]
fn a_full_disk_keeps_what_it_has_takes_deletes_and_then_puts_again() {
    let Some(disk) = SmallDisk::mount() else { return };
    let data = disk.0.path().join("data");
    let mut server = Process::start(&data, &[]);
    let mut conn = server.connect();
    conn.hello("c", "text");
    let value = "x".repeat(50_000);
    let request = |key: &str| format!(r#"{{"type":"Put","key":"{key}","value":"{value}"}}"#);
    let mut stored = 0;
    let mut answer = conn.ask(&request("k.0"));
    while status(&answer) == 200 {
        stored += 1;
        assert!(stored < 100, "the disk does not fill");
        answer = conn.ask(&request(&format!("k.{stored}")));
    }
    assert_eq!(status(&answer), 507, "{answer}");
    assert_eq!(status(&conn.ask(&request("k.0"))), 507);
    assert_eq!(conn.ask(r#"{"type":"List","key":"*"}"#).matches("\"k.").count(), stored);

    // One of the keys must be left over, to be kept safe while space is made.
    for n in 1..stored {
        let answer = conn.ask(&format!(r#"{{"type":"Delete","key":"k.{n}"}}"#));
        assert_eq!(status(&answer), 200, "delete {n} of {stored}: {answer}");
    }
    eventually("a put fits again", || status(&conn.ask(&request("again"))) == 200);

    server.signal("-KILL");
    server.wait();
    let server = Process::start(&data, &[]);
    let mut conn = server.connect();
    let listed = conn.ask(r#"{"type":"List","key":"*"}"#);
    assert!(listed.contains(r#""keys":["again","k.0"]"#), "{listed}");
    println!("TEST enospc stored={stored}");
}
