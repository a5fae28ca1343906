//! The real binary: flags, signals, exit codes, `kill -9`.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::io::Read;
use std::process::Command;
use std::thread;
use std::time::Duration;

use serde_json::json;
use support::process::{Process, command};
use support::{Conn, eventually, status};

/// Runs to the end: exit code and what it said on stderr.
fn run(arguments: &[&str]) -> (i32, String) {
    let mut child = command().args(arguments).spawn().unwrap();
    let mut ended = None;
    eventually("the process ends", || {
        ended = child.try_wait().unwrap();
        ended.is_some()
    });
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    (ended.unwrap().code().unwrap(), said)
}

#[test]
fn sigterm_ends_it_cleanly_and_what_was_acknowledged_is_there_again() {
    let dir = tempfile::tempdir().unwrap();
    for (round, signal) in ["-TERM", "-INT"].into_iter().enumerate() {
        let mut server = Process::start(dir.path(), &[]);
        let mut conn = server.connect();
        conn.put(&format!("round.{round}"), "x");
        let listed = conn.ask(r#"{"type":"List","key":"*"}"#);
        assert_eq!(listed.matches("round.").count(), round + 1, "{listed}");
        server.signal(signal);
        assert_eq!(conn.line(), "(closed)");
        assert_eq!(server.wait().code(), Some(0));
    }
}

/// What is below `runtime` is gone after a restart, but for the branch that is kept within it; and the other way round.
#[test]
fn a_branch_lives_where_it_is_said_to() {
    for (flags, kept, forgotten, durability) in [
        (
            &["--branch", "runtime=memory", "--branch", "runtime.kept=log"][..],
            ["other", "runtime.kept.x", "runtimes"],
            ["runtime", "runtime.x"],
            "sync; runtime: memory; runtime.kept: as the rest",
        ),
        (
            &["--persist", "memory", "--branch", "config=log"],
            ["config", "config.x", "config.y"],
            ["other", "configs"],
            "memory; config: sync",
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        for round in 0..2 {
            let mut server = Process::start(dir.path(), flags);
            let mut conn = server.connect();
            let has =
                |conn: &mut Conn, key: &str| status(&conn.ask(&format!(r#"{{"type":"Exists","key":"{key}"}}"#))) == 200;
            for key in kept {
                assert_eq!(has(&mut conn, key), round > 0, "{key}, round {round}");
                conn.put(key, "1");
            }
            for key in forgotten {
                assert!(!has(&mut conn, key), "{key}, round {round}");
                conn.put(key, "1");
            }
            let stats = conn.ask(r#"{"type":"Stats"}"#);
            assert!(stats.contains(durability), "{stats}");
            server.signal("-TERM");
            assert_eq!(server.wait().code(), Some(0));
        }
    }
    for (wrong, named) in [
        ("runtime", "BRANCH=log"),
        ("a..b=log", "empty segment"),
        ("a=disk", "log or memory"),
        ("a=log,a=memory", "twice"),
    ] {
        let (code, said) = run(&["--branch", wrong]);
        assert_eq!((code, said.contains(named)), (2, true), "{said}");
    }
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Process::start(dir.path(), &[]);
    // A peer that takes nothing of what it asked for holds up the end.
    let mut slow = server.connect();
    slow.hello("slow", "text");
    for n in 0..40 {
        slow.put(&format!("big.{n}"), &"x".repeat(500_000));
    }
    slow.send(r#"{"type":"Get","key":"big.*"}"#);
    let mut other = server.connect();
    assert_eq!(status(&other.ask(r#"{"type":"Health"}"#)), 200);
    server.signal("-TERM");
    assert_eq!(other.line(), "(closed)");
    assert!(server.child.try_wait().unwrap().is_none(), "ended although a connection was not done");
    server.signal("-INT");
    assert_eq!(server.wait().code(), Some(130));
}

#[test]
fn a_connection_that_does_not_end_is_cut_when_it_stops() {
    let mut server = Process::spawn({
        let mut command = command();
        command.args(["127.0.0.1:0", "--persist", "memory"]);
        command
    });
    let mut slow = server.connect();
    for n in 0..40 {
        slow.put(&format!("big.{n}"), &"x".repeat(500_000));
    }
    slow.send(r#"{"type":"Get","key":"big.*"}"#);
    assert_eq!(status(&server.connect().ask(r#"{"type":"Health"}"#)), 200);
    server.signal("-TERM");
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn what_keeps_it_from_running_is_one_clear_line_and_an_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let data_arg = data.to_str().unwrap();
    let mut server = Process::start(&data, &[]);

    let (code, said) = run(&["127.0.0.1:0", "--data-dir", data_arg, "--log-level", "off"]);
    assert_eq!(code, 73, "{said}");
    assert!(said.contains(data_arg) && said.lines().count() == 1, "{said}");

    let other = dir.path().join("other");
    let (code, said) = run(&[&server.addr, "--data-dir", other.to_str().unwrap(), "--log-level", "off"]);
    assert_eq!(code, 74, "{said}");
    assert!(said.contains(&server.addr) && said.lines().count() == 1, "{said}");
    assert!(!other.exists(), "a directory was made in vain");

    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let (code, said) = run(&["127.0.0.1:0", "--data-dir", file.to_str().unwrap(), "--log-level", "off"]);
    assert_eq!(code, 74, "{said}");
    assert!(said.contains("file"), "{said}");

    for arguments in [
        ["--durability", "sometimes"],
        ["--persist", "paper"],
        ["--max-value-size", "0"],
        ["--listen", "nowhere:"],
        ["0.0.0.0:0", "--persist=memory"],
    ] {
        let (code, said) = run(&arguments);
        assert_eq!(code, 2, "{arguments:?}: {said}");
    }
    let (_, said) = run(&["0.0.0.0:0", "--persist=memory"]);
    assert!(said.contains("--insecure"), "{said}");

    server.signal("-TERM");
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn damaged_data_is_refused_with_its_place_until_it_is_repaired() {
    let dir = tempfile::tempdir().unwrap();
    let data_arg = dir.path().to_str().unwrap();
    let mut server = Process::start(dir.path(), &[]);
    let mut conn = server.connect();
    for n in 0..50 {
        conn.put(&format!("k{n}"), "some value");
    }
    server.signal("-TERM");
    assert_eq!(server.wait().code(), Some(0));

    let segment = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|extension| extension == "log"))
        .unwrap();
    let mut bytes = std::fs::read(&segment).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&segment, bytes).unwrap();

    let (code, said) = run(&["127.0.0.1:0", "--data-dir", data_arg, "--log-level", "off"]);
    assert_eq!(code, 65, "{said}");
    let name = segment.file_name().unwrap().to_str().unwrap();
    assert!(said.contains(name), "{name} is not named: {said}");
    let (code, said) = run(&["check", "--data-dir", data_arg]);
    assert_eq!(code, 65, "{said}");
    if cfg!(feature = "engines") {
        let (code, said) = run(&["import", data_arg, "--engine", "etcd://127.0.0.1:1/x"]);
        assert!(code == 65 && said.contains("nkv-server check"), "{code} {said}");
    }
    let (code, said) = run(&["check", "--repair", "--data-dir", data_arg]);
    assert_eq!(code, 0, "{said}");

    let server = Process::start(dir.path(), &[]);
    let listed = server.connect().ask(r#"{"type":"List","key":"*"}"#);
    let left = listed.matches("\"k").count() - 1; // less the field `keys`
    assert!((10..50).contains(&left), "{left} keys are left");
}

/// The epoch of a server.
fn epoch_of(server: &Process) -> String {
    let stats = server.connect().ask(r#"{"type":"Stats"}"#);
    let (_, rest) = stats.split_once("\"epoch\":\"").unwrap();
    rest.split_once('"').unwrap().0.to_owned()
}

// A backup that was put back went on in its epoch: clients that had seen more took its revisions for old ones.
#[test]
fn data_that_was_put_back_is_in_a_new_epoch() {
    let dir = tempfile::tempdir().unwrap();
    let [data, backup] = ["data", "backup"].map(|name| dir.path().join(name));
    let stop = |mut server: Process| {
        let epoch = epoch_of(&server);
        server.signal("-TERM");
        assert_eq!(server.wait().code(), Some(0));
        epoch
    };
    let server = Process::start(&data, &[]);
    server.connect().put("a", "1");
    let first = stop(server);
    assert!(Command::new("cp").arg("-a").args([&data, &backup]).status().unwrap().success());
    assert_eq!(stop(Process::start(&data, &[])), first);

    // Put back with a copy.
    std::fs::remove_dir_all(&data).unwrap();
    assert!(Command::new("cp").arg("-a").args([&backup, &data]).status().unwrap().success());
    let copied = std::fs::metadata(data.join("LOCK")).unwrap().created().is_ok();
    let second = stop(Process::start(&data, &[]));
    assert!(second != first || !copied);
    assert_eq!(stop(Process::start(&data, &[])), second, "it is no copy any more");

    // Put back in a way that nothing shows.
    let (code, said) = run(&["restore", "--data-dir", data.to_str().unwrap()]);
    assert_eq!(code, 0, "{said}");
    let third = stop(Process::start(&data, &[]));
    assert!(third != second && said.contains(&third), "{said}");
    let kept = Process::start(&data, &[]).connect().ask(r#"{"type":"Get","key":"a"}"#);
    assert!(kept.contains(r#""data":[[49]]"#), "{kept}");
}

#[test]
fn flags_are_environment_variables_too_and_flags_win() {
    let dir = tempfile::tempdir().unwrap();
    let socket = format!("unix:{}", dir.path().join("nkv.sock").display());
    let mut with_env = command();
    with_env.arg("127.0.0.1:0").env("NKV_LISTEN", &socket).env("NKV_DATA_DIR", dir.path().join("data"));
    with_env.env("NKV_DURABILITY", "os").env("NKV_LOG_FORMAT", "json").env("NKV_MAX_VALUE_SIZE", "1k");
    let server = Process::spawn(with_env);
    let mut conn = server.connect();
    assert!(conn.ask(r#"{"type":"Stats"}"#).contains("\"durability\":\"os\""));
    assert!(conn.ask(r#"{"type":"Connect"}"#).contains("\"max_value\":1024"));
    assert!(!dir.path().join("nkv.sock").exists(), "the address on the command line did not win");
    drop(server);

    let mut without_address = command();
    without_address.env("NKV_LISTEN", "127.0.0.1:0").env("NKV_PERSIST", "memory").args(["--durability", "sync"]);
    let server = Process::spawn(without_address);
    assert!(server.connect().ask(r#"{"type":"Stats"}"#).contains("\"durability\":\"memory\""));
}

#[test]
fn values_are_not_logged() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = Process::start(dir.path(), &["--log-level", "trace"]);
    let mut conn = server.connect();
    conn.put("a", "secret-value");
    conn.ask(r#"{"type":"Put","key":"a b","value":"secret-value"}"#);
    conn.ask(r#"{"type":"Put","key":"a","value":["secret-value"]}"#);
    conn.finish();
    assert_eq!(conn.line(), "(closed)");
    server.signal("-TERM");
    server.wait();
    let said: Vec<_> = server.log.iter().collect();
    assert!(said.iter().any(|line| line.contains("stopped")), "{said:?}");
    assert!(!said.iter().any(|line| line.contains("secret")), "{said:?}");
}

#[test]
fn connections_leave_descriptors_for_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let server = Process::spawn({
        let mut command = std::process::Command::new("sh");
        let server = env!("CARGO_BIN_EXE_nkv-server");
        command.args(["-c", "ulimit -n 100 && exec \"$0\" 127.0.0.1:0 --data-dir \"$1\"", server]).arg(dir.path());
        command.stderr(std::process::Stdio::piped());
        command
    });
    let mut conn = server.connect();
    conn.put("a", "x");
    let mut crowd: Vec<_> = (0..150).map(|_| server.connect()).collect();
    // Enough for a new segment or two.
    let value = "x".repeat(1_000_000);
    for n in 0..40 {
        assert!(conn.put(&format!("big.{}", n % 10), &value) > 0);
    }
    assert!(crowd.iter_mut().rev().take(10).all(|conn| conn.line().contains("too many connections")));
    drop(crowd);
    eventually("a place is free again", || {
        let mut conn = server.connect();
        // A refused connection may be reset while we write.
        drop(std::io::Write::write_all(&mut conn.stream(), b"{\"type\":\"Health\"}\n"));
        conn.line().contains("200")
    });
}

/// Eight writers put as fast as they are answered; the server is killed at a random moment and started again. Cycles:
/// `NKV_KILL_CYCLES`, or a few.
#[test]
fn what_was_acknowledged_survives_kill_9() {
    let cycles: u64 = std::env::var("NKV_KILL_CYCLES").map_or(8, |cycles| cycles.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged = BTreeMap::<String, (u64, u64)>::new();
    let mut writes = 0;
    for cycle in 0..cycles {
        let server = Process::start(dir.path(), &[]);
        let mut conn = server.connect();
        conn.hello("checker", "text");
        check(&mut conn, &acknowledged);

        let writers: Vec<_> = (0..8)
            .map(|writer| {
                let conn = server.connect();
                thread::spawn(move || write_until_cut(conn, writer, cycle))
            })
            .collect();
        let pause = getrandom::u64().unwrap() % 100;
        thread::sleep(Duration::from_millis(20 + pause));
        server.signal("-KILL");
        for writer in writers {
            let (count, newest) = writer.join().unwrap();
            writes += count;
            acknowledged.extend(newest);
        }
    }
    let server = Process::start(dir.path(), &[]);
    let mut conn = server.connect();
    conn.hello("checker", "text");
    check(&mut conn, &acknowledged);
    println!("TEST kill9_cycles cycles={cycles} acknowledged={writes} lost=0");
    assert!(writes > 100, "only {writes} writes were acknowledged");
}

/// Puts increasing numbers until the connection is cut: how many were acknowledged, and for each key the last of them
/// with its revision.
fn write_until_cut(mut conn: Conn, writer: u64, cycle: u64) -> (u64, BTreeMap<String, (u64, u64)>) {
    let mut newest = BTreeMap::new();
    let mut n = 0;
    loop {
        let (key, number) = (format!("w{writer}.{}", n % 5), cycle * 1_000_000 + n);
        let request = format!("{{\"type\":\"Put\",\"key\":\"{key}\",\"value\":\"{number}\"}}\n");
        if std::io::Write::write_all(&mut conn.stream(), request.as_bytes()).is_err() {
            return (n, newest);
        }
        let answer = conn.line();
        // The process may be cut in the middle of a line.
        let Ok(answer) = serde_json::from_str::<serde_json::Value>(&answer) else { return (n, newest) };
        assert_eq!(answer["Base"]["status"], 200, "{answer}");
        newest.insert(key, (number, answer["Base"]["revision"].as_u64().unwrap()));
        n += 1;
    }
}

/// Each key has what was acknowledged, or something newer that was under way.
fn check(conn: &mut Conn, acknowledged: &BTreeMap<String, (u64, u64)>) {
    for (key, (number, revision)) in acknowledged {
        conn.send(format!(r#"{{"type":"Get","key":"{key}"}}"#));
        let got = conn.json();
        let value = got["Get"]["data"][0].as_str().unwrap_or_else(|| panic!("{key} is lost: {got}"));
        let stored: u64 = value.parse().unwrap_or_else(|_| panic!("{key} is torn: {value}"));
        assert!(stored >= *number, "{key}: {number} was acknowledged, {stored} is stored");
        assert!(got["Get"]["revisions"][0].as_u64().unwrap() >= *revision, "{key}: its revision went back");
    }
}

/// What is wrong with an engine is said before anything is opened.
#[cfg(feature = "engines")]
#[test]
fn an_engine_that_cannot_be_meant_is_refused() {
    for (flags, said) in [
        (&["--engine", "redis://h/x"][..], "etcd://HOST:PORT/PREFIX"),
        (&["--engine", "etcd"], "etcd://HOST:PORT/PREFIX"),
        #[cfg(feature = "etcd")]
        (&["--engine", "etcd://127.0.0.1:1/"], "an empty prefix"),
        #[cfg(feature = "etcd")]
        (&["--engine", "etcd://me:secret@127.0.0.1:1/x"], "--engine-password-file"),
        #[cfg(feature = "etcd")]
        (&["--engine", "etcd://127.0.0.1:1/x", "--kafka-log", "command-log"], "--kafka-log is for kafka:// alone"),
        #[cfg(feature = "nats")]
        (&["--engine", "nats://127.0.0.1:1/"], "bucket"),
        #[cfg(feature = "kafka")]
        (&["--engine", "kafka://127.0.0.1:1/x", "--engine-creds", "/dev/null"], "--engine-creds is for nats:// alone"),
        (&["--engine", "etcd://127.0.0.1:1/x", "--data-dir", "/tmp"], "--data-dir"),
        (&["--engine", "etcd://127.0.0.1:1/x", "--branch", "a=memory"], "--branch"),
        (&["import", "/nowhere"], "import needs --engine URL"),
        (
            &["import", "/nowhere", "--engine", "kafka://127.0.0.1:1/x", "--kafka-log", "y"],
            "--kafka-log is for a server",
        ),
    ] {
        let (code, text) = run(flags);
        assert!(code == 2 && text.contains(said) && !text.contains("secret"), "{flags:?}: {code} {text}");
    }
}

#[cfg(feature = "engines")]
#[test]
fn a_directory_that_is_missing_is_not_made_to_import_it() {
    let temp = tempfile::tempdir().unwrap();
    let missing = temp.path().join("missing");
    let (code, text) = run(&["import", missing.to_str().unwrap(), "--engine", "etcd://127.0.0.1:1/x"]);
    assert!(code == 74 && text.contains("missing") && !missing.exists(), "{code} {text}");
}

#[cfg(feature = "cluster")]
#[test]
fn a_cluster_that_cannot_be_meant_is_refused() {
    for (flags, said) in [
        (&["--cluster", "home"][..], "--gossip"),
        (&["--gossip", "127.0.0.1:0"], "--cluster"),
        (&["--cluster", "home", "--gossip", "127.0.0.1:0", "--discover", "radio:x"], "radio"),
        (&["--persist", "memory", "--cluster", "home", "--gossip", "192.0.2.1:7000"], "--insecure"),
        (
            &["--persist", "memory", "--cluster", "home", "--gossip", "127.0.0.1:0", "--discover", "static:h:1"],
            "--advertise",
        ),
        (&["--insecure", "--cluster", "home", "--gossip", "0.0.0.0:7000", "--discover", "static:h:1"], "--advertise"),
        (&["--insecure", "--cluster", "home", "--gossip", "[::]:7000", "--discover", "static:h:1"], "--advertise"),
        (
            &["--persist", "memory", "--cluster", "home", "--gossip", "127.0.0.1:0", "--advertise", "0.0.0.0:7000"],
            "--advertise",
        ),
        #[cfg(feature = "engines")]
        (
            &["--cluster", "home", "--gossip", "127.0.0.1:0", "--engine", "etcd://127.0.0.1:1/x"],
            "--engine and --cluster",
        ),
    ] {
        let (code, text) = run(flags);
        assert!(code == 2 && text.contains(said), "{flags:?}: {code} {text}");
    }
}

/// Three servers of one cluster, by their addresses: each takes writes, and one that was away is level again.
#[cfg(all(feature = "cluster", feature = "http"))]
#[test]
fn servers_of_a_cluster_agree() {
    let dirs = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let ports = [(); 3].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    let list = format!("static:{}", ports.map(|port| port.to_string()).join(","));
    let start = |at: usize| {
        Process::start(dirs[at].path(), &["--cluster", "home", "--gossip", &ports[at].to_string(), "--discover", &list])
    };
    let has = |server: &Process, key: &str| {
        status(&server.connect().ask(&format!(r#"{{"type":"Get","key":"{key}"}}"#))) == 200
    };
    let is_ready = |server: &Process| status(&server.connect().ask(r#"{"type":"Health"}"#)) == 200;
    let mut servers = [start(0), start(1), start(2)];
    eventually("all are ready", || servers.iter().all(is_ready));
    for (at, server) in servers.iter().enumerate() {
        server.connect().put(&format!("k.{at}"), "x");
    }
    eventually("all have all", || servers.iter().all(|server| (0..3).all(|at| has(server, &format!("k.{at}")))));
    servers[1].signal("-KILL");
    servers[1].wait();
    assert_eq!(status(&servers[2].connect().ask(r#"{"type":"Delete","key":"k.0"}"#)), 200);
    servers[0].connect().put("new", "x");
    servers[1] = start(1);
    eventually("it is level", || is_ready(&servers[1]) && has(&servers[1], "new") && !has(&servers[1], "k.0"));
    let stats = || servers[0].connect().ask(r#"{"type":"Stats"}"#);
    assert!(stats().contains(r#""cluster":"home""#));
    eventually("it knows both others", || stats().matches("state=joined").count() == 2);
    for mut server in servers {
        server.signal("-TERM");
        assert_eq!(server.wait().code(), Some(0));
    }
}

/// A file of keys: base64 of 16 times the same byte, one a line.
#[cfg(feature = "cluster")]
fn write_keys(path: &std::path::Path, keys: &[&str]) {
    use std::os::unix::fs::PermissionsExt;

    std::fs::write(path, keys.iter().map(|key| format!("# a key\n\n{key}\n")).collect::<String>()).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

#[cfg(feature = "cluster")]
const KEYS: [&str; 2] = ["AQEBAQEBAQEBAQEBAQEBAQ==", "AgICAgICAgICAgICAgICAg=="];

#[cfg(feature = "cluster")]
#[test]
fn a_file_of_keys_that_cannot_be_meant_is_refused_by_its_line() {
    use std::os::unix::fs::PermissionsExt;

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys");
    let path = file.to_str().unwrap();
    let flags = ["--persist", "memory", "--cluster", "home", "--gossip", "192.0.2.1:7000", "--cluster-key-file", path];
    let refused = |code: i32, said: &str| {
        let (ended, text) = run(&flags);
        assert!(ended == code && text.contains(said) && text.contains(path), "{ended}, not {code} {said}: {text}");
        assert!(!text.contains("AQEB"), "a key is in the log: {text}");
    };
    refused(74, "No such file");
    write_keys(&file, &[]);
    refused(2, "no key");
    write_keys(&file, &[KEYS[0], "AQEBAQ!"]);
    refused(2, "line 6: it is not base64");
    write_keys(&file, &[KEYS[0], "AQEBAQ=="]);
    refused(2, "line 6: a key has 16, 24 or 32 bytes, and this one has 4");
    write_keys(&file, &[KEYS[0]; 17]);
    refused(2, "more than 16 keys");
    write_keys(&file, &KEYS);
    for mode in [0o644, 0o620, 0o601] {
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        refused(2, "others have rights");
    }
    // One that is in order opens the port to other hosts: what is wrong then is that the address is no one of this host.
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
    let (code, text) = run(&flags);
    assert!(code == 74 && text.contains("192.0.2.1:7000") && !text.contains("--insecure"), "{code} {text}");
    let (code, text) = run(&["--cluster-key-file", path]);
    assert!(code == 2 && text.contains("--cluster"), "{code} {text}");
}

/// Of three nodes that name each other, the one with another key stays out, until SIGHUP has the first one take that too.
#[cfg(all(feature = "cluster", feature = "http"))]
#[test]
fn keys_are_read_again_and_a_node_with_another_one_stays_out() {
    let dirs = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let ports = [(); 3].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap());
    let list = format!("static:{}", ports.map(|port| port.to_string()).join(","));
    let file = |at: usize| dirs[at].path().join("keys");
    let start = |at: usize, with_keys: bool| {
        let (gossip, file) = (ports[at].to_string(), file(at));
        let mut flags = vec!["--cluster", "home", "--gossip", &gossip, "--discover", &list, "--join-timeout", "300ms"];
        if with_keys {
            flags.extend(["--cluster-key-file", file.to_str().unwrap()]);
        }
        Process::start(&dirs[at].path().join("data"), &flags)
    };
    let has = |server: &Process, key: &str| {
        status(&server.connect().ask(&format!(r#"{{"type":"Get","key":"{key}"}}"#))) == 200
    };
    let is_ready = |server: &Process| status(&server.connect().ask(r#"{"type":"Health"}"#)) == 200;
    write_keys(&file(0), &[KEYS[0]]);
    write_keys(&file(1), &[KEYS[1]]);
    let mut first = start(0, true);
    eventually("it begins", || is_ready(&first));
    first.connect().put("first", "x");

    let mut other = start(1, true);
    let said = first.wait_for_log("is refused: it has none of the keys, or another cluster's name");
    assert!(said.contains("the peer at 127.0.0.1:") && said.contains("need a key in common"), "{said}");
    other.wait_for_log(&format!("no session with the peer at {}", ports[0]));
    eventually("it begins alone", || is_ready(&other));
    other.connect().put("other", "x");
    let mut plain = start(2, false);
    first.wait_for_log("is refused: it speaks in plain text");
    eventually("it begins alone", || is_ready(&plain));
    assert!(!has(&first, "other") && !has(&other, "first") && !has(&plain, "first"));
    plain.signal("-HUP");
    plain.wait_for_log("SIGHUP: nothing to do");

    // A file that is in the making takes nothing away.
    std::fs::write(file(0), "half a li").unwrap();
    first.signal("-HUP");
    let said = first.wait_for_log("SIGHUP: the keys of the cluster stay as they were");
    assert!(said.contains("line 1"), "{said}");
    write_keys(&file(0), &KEYS);
    first.signal("-HUP");
    first.wait_for_log("SIGHUP: the keys of the cluster were read again, and are 2");
    eventually("they meet", || has(&first, "other") && has(&other, "first"));
    for (at, keys) in [(1, &[KEYS[1], KEYS[0]][..]), (0, &[KEYS[1]]), (1, &[KEYS[1]])] {
        write_keys(&file(at), keys);
        let server = [&first, &other][at];
        server.signal("-HUP");
        server.wait_for_log(&format!("were read again, and are {}", keys.len()));
    }
    first.connect().put("rotated", "x");
    eventually("they are still one cluster", || has(&other, "rotated"));
    assert!(!has(&plain, "rotated"));
    for server in [&mut first, &mut other, &mut plain] {
        server.signal("-TERM");
        assert_eq!(server.wait().code(), Some(0));
    }
}

#[cfg(all(feature = "grpc", feature = "cluster"))]
#[test]
fn servers_of_a_mesh_agree_deletes_and_ttls_included_also_after_restarts() {
    let dirs: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let ports: Vec<_> = (0..3).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let ports: Vec<_> = ports.into_iter().map(|port| port.local_addr().unwrap().to_string()).collect();
    // The first is named by the others, and names none but the second.
    let peers = [&ports[1], &ports[0], &ports[0]];
    let start = |at: usize| Process::start(&dirs[at].path().join("data"), &["--grpc", &ports[at], "--peer", peers[at]]);
    let get = |server: &Process, key: &str| server.connect().ask(&format!(r#"{{"type":"Get","key":"{key}"}}"#));
    let has = |server: &Process, key: &str, value: &str| {
        get(server, key).contains(&format!(r#""data":{}"#, json!([value.as_bytes()])))
    };
    let is_gone = |server: &Process, key: &str| status(&get(server, key)) == 404;

    // It was a server of its own, and takes requests from the first on, although no peer is there.
    let mut alone = Process::start(&dirs[0].path().join("data"), &[]);
    alone.connect().put("alone", "1");
    alone.signal("-TERM");
    assert_eq!(alone.wait().code(), Some(0));
    let mut first = start(0);
    assert!(has(&first, "alone", "1"));
    first.connect().put("both", "first");
    let mut second = start(1);
    second.connect().put("both", "second");
    let third = start(2);
    for server in [&first, &second, &third] {
        eventually("the later one is everywhere", || has(server, "both", "second") && has(server, "alone", "1"));
    }
    assert_eq!(status(&third.connect().ask(r#"{"type":"Delete","key":"alone"}"#)), 200);
    third.connect().ask(r#"{"type":"Put","key":"short","value":"x","ttl_ms":4000}"#);
    for server in [&first, &second] {
        eventually("it is there", || has(server, "short", "x"));
        eventually("it is deleted", || is_gone(server, "alone"));
    }
    // Each is away for a time, comes back at another port of the cluster, and does not know what happened.
    first.signal("-KILL");
    first.wait();
    assert_eq!(status(&second.connect().ask(r#"{"type":"Delete","key":"both"}"#)), 200);
    second.signal("-TERM");
    assert_eq!(second.wait().code(), Some(0));
    third.connect().put("third", "1");
    let (first, second) = (start(0), start(1));
    for server in [&first, &second, &third] {
        eventually("the delete is everywhere", || is_gone(server, "both") && has(server, "third", "1"));
        eventually("it has ended", || is_gone(server, "short"));
    }
    assert!(is_gone(&first, "alone"));
    // A condition holds on its server.
    let put = |condition: &str| format!(r#"{{"type":"Put","key":"lock","value":"1",{condition}}}"#);
    assert_eq!(status(&first.connect().ask(&put(r#""if_revision":0"#))), 200);
    assert_eq!(status(&first.connect().ask(&put(r#""if_revision":0"#))), 409);
}

#[cfg(all(feature = "grpc", not(feature = "cluster")))]
#[test]
fn a_build_that_joins_no_mesh_says_which_would() {
    let (code, text) = run(&["--grpc", "127.0.0.1:0", "--peer", "127.0.0.1:4001"]);
    assert!(code == 2 && text.contains("--features grpc,cluster"), "{code} {text}");
}

#[cfg(all(feature = "grpc", feature = "cluster"))]
#[test]
fn a_mesh_that_cannot_be_meant_is_refused() {
    for (flags, said) in [
        (&["--peer", "127.0.0.1:4001"][..], "--grpc"),
        (&["--grpc", "127.0.0.1:0", "--peer", "127.0.0.1:4001"], "--peer-advertise"),
        (&["--grpc", "0.0.0.0:4000", "--insecure", "--peer", "127.0.0.1:4001"], "--peer-advertise"),
        (&["--grpc", "127.0.0.1:4000", "--peer", "nowhere"], "HOST:PORT"),
        (
            &["--grpc", "127.0.0.1:4000", "--peer", "h:1", "--cluster", "home", "--gossip", "127.0.0.1:0"],
            "cannot be used with",
        ),
        (&["--gossip", "127.0.0.1:0"], "--peer"),
        (&["--grpc", "127.0.0.1:0", "--peer", "h:1", "--gossip", "0.0.0.0:0"], "--peer-advertise"),
        (&["--grpc", "127.0.0.1:4000", "--peer", "h:1", "--gossip", "0.0.0.0:0"], "--insecure"),
    ] {
        let (code, text) = run(flags);
        assert!(code == 2 && text.contains(said), "{flags:?}: {code} {text}");
    }
}
