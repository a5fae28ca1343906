//! What an operator sees of the real binary: its log, its messages, signals, and variables of the environment.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::process::{Process, command};
use support::{PATIENCE, eventually, status};

/// Runs to the end: exit code and what it said on stderr.
fn run(command: &mut Command) -> (i32, String) {
    let mut child = Guarded::spawn(command);
    let code = child.wait();
    let mut said = String::new();
    child.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (code, said)
}

/// A process whose log the test reads itself; killed when dropped.
struct Guarded(Child);

impl Guarded {
    fn spawn(command: &mut Command) -> Self {
        Guarded(command.spawn().unwrap())
    }

    fn signal(&self, signal: &str) {
        assert!(Command::new("kill").args([signal, &self.0.id().to_string()]).status().unwrap().success());
    }

    fn wait(&mut self) -> i32 {
        let mut ended = None;
        eventually("the process ends", || {
            ended = self.0.try_wait().unwrap();
            ended.is_some()
        });
        ended.unwrap().code().unwrap()
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn ask(socket: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(format!("{request}\n").as_bytes()).unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    answer
}

/// The next line of the log panicked, and a client causes one whenever it likes.
#[test]
fn a_log_that_cannot_be_written_neither_ends_nor_holds_up_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
    for name in ["full", "reader has gone", "reader does not read"] {
        let data = dir.path().join(name);
        let socket = dir.path().join("socket");
        let mut command = command();
        command.arg(format!("unix:{}", socket.display())).arg("--data-dir").arg(&data);
        command.args(["--log-level", "trace", "--stall-limit", "60s"]);
        command.stderr(if name == "full" { full() } else { Stdio::piped() });
        let mut child = Guarded::spawn(&mut command);
        let mut reader = child.0.stderr.take();
        if name == "reader has gone" {
            // As `| head -1` does.
            BufReader::new(reader.take().unwrap()).read_line(&mut String::new()).unwrap();
        }
        eventually("it listens", || UnixStream::connect(&socket).is_ok());
        // Each connection is a line or more; a pipe takes 64 KiB of them.
        for n in 0..2_000 {
            let put = format!(r#"{{"type":"Put","key":"a","value":"{n}","ttl_ms":60000}}"#);
            let request = if n % 100 == 0 { &put } else { r#"{"type":"Health"}"# };
            assert_eq!(status(&ask(&socket, request)), 200, "{name}");
        }
        child.signal("-HUP");
        child.signal("-TERM");
        assert_eq!(child.wait(), 0, "{name}");
    }
}

#[test]
fn lines_of_the_log_for_which_there_is_no_room_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let mut command = command();
    command.arg(format!("unix:{}", socket.display())).args(["--persist", "memory", "--log-level", "debug"]);
    let mut child = Guarded::spawn(&mut command);
    eventually("it listens", || UnixStream::connect(&socket).is_ok());
    for _ in 0..4_000 {
        assert_eq!(status(&ask(&socket, r#"{"type":"Health"}"#)), 200);
    }
    let log = BufReader::new(child.0.stderr.take().unwrap());
    let (said, heard) = channel();
    thread::spawn(move || log.lines().map_while(Result::ok).try_for_each(|line| said.send(line)));
    let mut lines = 0;
    let lost = loop {
        lines += 1;
        let line = heard.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("not said after {lines} lines"));
        if let Some((said, lost)) = line.split_once("lost=") {
            assert!(said.contains("WARN"), "{line}");
            break lost.trim().parse::<u64>().unwrap();
        }
    };
    println!("TEST log_without_reader connections=4000 lines={lines} lost={lost}");
    assert!(lost > 500, "{lost} lines");
    child.signal("-TERM");
    assert_eq!(child.wait(), 0);
    assert!(lines > 1_000 && lines < 4_000, "{lines} lines");
}

#[test]
fn sighup_and_the_signals_of_users_end_nothing_and_cut_no_connection() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Process::start(dir.path(), &["--durability", "interval:10s"]);
    let mut conn = server.connect();
    for signal in ["-HUP", "-USR1", "-USR2"] {
        server.signal(signal);
        server.wait_for_log(&format!("SIG{}", &signal[1..]));
        assert!(conn.put("a", signal) > 0);
    }
    server.signal("-TERM");
    assert_eq!(server.wait().code(), Some(0));
}

/// It ended the process, with a core dump, at the first write past the limit.
#[test]
fn a_limit_of_the_size_of_files_is_as_a_full_disk() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Process::spawn({
        let mut command = Command::new("prlimit");
        command.args(["--fsize=700000", env!("CARGO_BIN_EXE_nkv-server"), "127.0.0.1:0", "--data-dir"]);
        command.arg(dir.path().join("data")).stderr(Stdio::piped());
        command
    });
    let mut conn = server.connect();
    conn.put("k0", "short");
    let put = format!(r#"{{"type":"Put","key":"long","value":"{}"}}"#, "x".repeat(900_000));
    assert_eq!(status(&conn.ask(&put)), 507);
    assert_eq!(status(&conn.ask(r#"{"type":"Delete","key":"k0"}"#)), 200);
    server.signal("-TERM");
    assert_eq!(server.wait().code(), Some(0));
}

/// A server that a connection keeps from ending for some seconds, after SIGTERM.
fn stopping() -> (Process, support::Conn, Instant) {
    let server = Process::spawn({
        let mut command = command();
        command.args(["127.0.0.1:0", "--persist", "memory"]);
        command
    });
    let mut slow = server.connect();
    slow.hello("slow", "text");
    for n in 0..40 {
        slow.put(&format!("big.{n}"), &"x".repeat(500_000));
    }
    slow.send(r#"{"type":"Get","key":"big.*"}"#);
    assert_eq!(status(&server.connect().ask(r#"{"type":"Health"}"#)), 200);
    server.signal("-TERM");
    server.wait_for_log("stopping: SIGTERM");
    (server, slow, Instant::now())
}

/// `timeout` sends SIGTERM to the process and then to its group.
#[test]
fn a_second_sigterm_counts_a_second_after_the_first_and_a_second_sigint_at_once() {
    let (mut server, _slow, since) = stopping();
    server.signal("-TERM");
    while since.elapsed() < Duration::from_millis(1_050) {
        // Slow as this machine may be, it has seen the second signal within a second of the first.
        assert!(server.child.try_wait().unwrap().is_none(), "ended by a signal that was sent twice");
        thread::sleep(Duration::from_millis(10));
    }
    server.signal("-TERM");
    assert_eq!(server.wait().code(), Some(130));

    let (mut server, _slow, _) = stopping();
    server.signal("-INT");
    assert_eq!(server.wait().code(), Some(130));
}

/// All of the log, as JSON, of a server that is stopped as soon as it listens.
fn json_log(command: &mut Command) -> Vec<Value> {
    let mut child = Guarded::spawn(command.args(["--log-format", "json"]));
    let mut said = Vec::new();
    for line in BufReader::new(child.0.stderr.take().unwrap()).lines() {
        let line = line.unwrap();
        if line.contains("listening at ") {
            child.signal("-TERM");
        }
        said.push(serde_json::from_str(&line).unwrap_or_else(|_| panic!("no JSON: {line}")));
    }
    child.wait();
    said
}

#[test]
fn the_first_lines_of_the_log_are_what_an_operator_looks_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Process::start(&dir.path().join("data"), &[]);
    let mut conn = server.connect();
    conn.put("a", "1");
    conn.put("b", "2");
    conn.put("a", "3");
    server.signal("-TERM");
    server.wait();

    let start = |arguments: &[&str]| {
        let mut command = command();
        command.current_dir(dir.path()).arg("127.0.0.1:0").args(arguments);
        json_log(&mut command)
    };
    let said = start(&["--data-dir", "data", "--durability", "os"]);
    let field = |name: &str| said.iter().map(|line| &line["fields"][name]).find(|value| !value.is_null()).cloned();
    assert_eq!(field("version").unwrap(), env!("CARGO_PKG_VERSION"));
    let absolute = dir.path().join("data");
    assert_eq!(field("data_dir").unwrap(), absolute.to_str().unwrap());
    assert_eq!(field("durability").unwrap(), "os");
    assert_eq!((field("keys").unwrap(), field("revision").unwrap()), (2.into(), 3.into()));
    assert!(field("load_ms").unwrap().is_u64());
    assert!(said.iter().any(|line| line["fields"]["message"].as_str().unwrap().starts_with("listening at 127.0.0.1:")));
    assert!(!said.iter().any(|line| line["level"] == "WARN"), "{said:?}");

    // A directory that it did not get is not said to be its own.
    let owner = Process::start(&absolute, &[]);
    let said = start(&["--data-dir", "data"]);
    assert!(!said.iter().any(|line| line["fields"]["data_dir"].is_string()), "{said:?}");
    assert_eq!(said.last().unwrap()["level"], "ERROR");
    drop(owner);

    let mut open = command();
    open.args(["0.0.0.0:0", "--insecure", "--persist", "memory"]);
    let said = json_log(&mut open);
    let warned = said.iter().find(|line| line["level"] == "WARN").unwrap_or_else(|| panic!("no warning: {said:?}"));
    assert!(warned.to_string().contains("--insecure"), "{warned}");
}

#[test]
fn what_keeps_it_from_starting_is_said_in_the_format_of_the_log_and_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let busy = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = busy.local_addr().unwrap().to_string();
    let said = |arguments: &[&str]| {
        let mut command = command();
        let (code, said) = run(command.args(arguments).args(["--log-format", "json", "--log-level", "off"]));
        let line: Value = serde_json::from_str(&said).unwrap_or_else(|_| panic!("not one line of JSON: {said}"));
        assert_eq!(line["level"], "ERROR");
        (code, line["fields"]["message"].as_str().unwrap().to_owned())
    };
    let (code, message) = said(&[&addr, "--persist", "memory"]);
    assert!(code == 74 && message.contains("os error 98"), "{message}");
    let port = addr.rsplit_once(':').unwrap().1;
    assert!(message.contains(&format!("NATS server, may have port {port}")) && !message.contains("4222"), "{message}");
    assert_eq!(said(&["0.0.0.0:0", "--persist", "memory"]).0, 2);
    let socket = format!("unix:{}", dir.path().join("s".repeat(120)).display());
    let (code, message) = said(&[&socket, "--persist", "memory"]);
    assert!(code == 2 && message.contains(&socket), "{message}");

    let data = dir.path().join("data");
    let mut server = Process::start(&data, &[]);
    (0..20).for_each(|n| assert!(server.connect().put(&n.to_string(), "x") > 0));
    server.signal("-TERM");
    server.wait();
    let segment = data.join("0000000000000001.log");
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[300] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    let (code, message) = said(&["127.0.0.1:0", "--data-dir", data.to_str().unwrap()]);
    assert_eq!(code, 65, "{message}");
    let check = format!("nkv-server check --data-dir {}", data.display());
    assert!(message.contains("0000000000000001.log") && message.contains(&check), "{message}");
}

#[test]
fn an_empty_variable_is_as_if_not_set_and_one_that_is_wrong_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut with_empty = command();
    with_empty.args(["127.0.0.1:0", "--data-dir"]).arg(dir.path().join("data"));
    for name in [
        "LISTEN",
        "DATA_DIR",
        "DURABILITY",
        "PERSIST",
        "MAX_CONNECTIONS",
        "MAX_QUEUED",
        "STALL_LIMIT",
        "IDLE_LIMIT",
        "MAX_VALUE_SIZE",
        "INSECURE",
        "GROUP_ACCESS",
        "LOG_LEVEL",
        "LOG_FORMAT",
        "SOCKET_MODE",
        "SOCKET_GROUP",
    ] {
        with_empty.env(format!("NKV_{name}"), "");
    }
    let server = Process::spawn(with_empty);
    assert!(server.connect().ask(r#"{"type":"Stats"}"#).contains("\"durability\":\"sync\""));
    drop(server);

    for (name, value) in [
        ("NKV_LISTEN", "nowhere:"),
        ("NKV_DURABILITY", "sometimes"),
        ("NKV_PERSIST", "paper"),
        ("NKV_MAX_CONNECTIONS", "many"),
        ("NKV_MAX_QUEUED", "1T"),
        ("NKV_IDLE_LIMIT", "0s"),
        ("NKV_LOG_LEVEL", "loud"),
        ("NKV_INSECURE", "yes"),
        ("NKV_GROUP_ACCESS", "yes"),
        ("NKV_SOCKET_MODE", "888"),
        ("NKV_SOCKET_GROUP", "no such group"),
    ] {
        let (code, said) = run(command().env(name, value));
        assert!(code == 2 && said.contains(name), "{name}: {said}");
        // One that is given on the command line is not to blame on the variable.
        let (code, said) = run(command().env(name, value).args(["--request-limit", "soon"]));
        assert!(code == 2 && said.contains("--request-limit") && !said.contains(name), "{name}: {said}");
    }

    for (value, code) in [("false", 2), ("0", 2), ("", 2)] {
        let refused = run(command().args(["0.0.0.0:0", "--persist", "memory"]).env("NKV_INSECURE", value));
        assert!(refused.0 == code && refused.1.contains("open to other hosts"), "{value}: {}", refused.1);
    }
    for value in ["true", "1"] {
        let mut open = command();
        open.args(["0.0.0.0:0", "--persist", "memory"]).env("NKV_INSECURE", value);
        drop(Process::spawn(open));
    }
}

#[test]
fn a_unix_socket_is_opened_to_a_group_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let group = String::from_utf8(Command::new("id").arg("-gn").output().unwrap().stdout).unwrap();
    let gid = std::fs::metadata("/proc/self").unwrap().gid();
    for (arguments, mode) in
        [(&["--socket-group", group.trim()][..], 0o660), (&["--socket-mode", "0666"], 0o666), (&[], 0o600)]
    {
        let socket = dir.path().join("socket");
        let server = Process::spawn({
            let mut command = command();
            command.arg(format!("unix:{}", socket.display())).args(["--persist", "memory"]).args(arguments);
            command
        });
        let found = std::fs::metadata(&socket).unwrap();
        assert_eq!((found.permissions().mode() & 0o777, found.gid()), (mode, gid), "{arguments:?}");
        drop(server);
        std::fs::remove_file(&socket).unwrap();
    }
}
