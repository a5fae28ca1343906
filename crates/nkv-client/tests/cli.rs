//! The command line as a contract: the real binary against a server in this process.
#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::cli::{command, finish, lines, nkv};
use serde_json::{Value, json};

#[test]
fn a_value_stands_alone_on_stdout_and_all_else_on_stderr() {
    let nkv = nkv();
    assert_eq!(nkv.run(&["put", "lamp.hall", "on"]), (0, String::new(), "OK revision 1\n".into()));
    assert_eq!(nkv.run(&["GET", "lamp.hall"]), (0, "on".into(), String::new()));
    assert_eq!(nkv.run(&["get", "nope"]), (1, String::new(), "not found\n".into()));
    assert_eq!(nkv.run(&["delete", "lamp.hall"]), (0, String::new(), "OK deleted 1, revision 2\n".into()));
    assert_eq!(nkv.run(&["rm", "lamp.hall"]), (1, String::new(), "not found\n".into()));
}

#[test]
fn a_read_of_a_server_that_is_stale_says_so_and_since_when() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            for line in BufReader::new(stream.try_clone().unwrap()).lines() {
                let request: Value = serde_json::from_str(&line.unwrap()).unwrap();
                let id = &request["id"];
                let answer = match request["type"].as_str().unwrap() {
                    "Connect" => {
                        assert!(request["features"].to_string().contains("\"stale\""), "{request}");
                        let base = json!({"id": id, "status": 200, "message": "No Error", "features": ["stale"]});
                        json!({ "Base": base }).to_string() + "\n{\"Stale\":{\"since_ms\":90000}}\n"
                    }
                    _ => {
                        let fields = json!({"id": id, "status": 200, "message": "No Error", "keys": ["a"],
                            "revisions": [1], "lens": [2], "len": 2});
                        json!({ "Get": fields }).to_string() + "\non\n"
                    }
                };
                stream.write_all(answer.as_bytes()).unwrap();
            }
        }
    });
    let run = |words: &[&str]| {
        let output = finish(command(words).env("NKV_ADDR", &addr).spawn().unwrap());
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, stdout, stderr) = run(&["get", "a"]);
    assert_eq!((code, stdout.as_str()), (Some(0), "on"));
    assert!(stderr.starts_with("stale for 9") && stderr.lines().count() == 1, "{stderr}");
    let (_, _, stderr) = run(&["get", "a", "--json"]);
    let note = &lines(&stderr)[0];
    assert!(note["note"] == "stale" && note["since_ms"].as_u64().unwrap() >= 90_000, "{note}");
    assert_eq!(run(&["get", "a", "-q"]), (Some(0), "on".into(), String::new()));
}

#[test]
fn what_other_stores_say_is_understood() {
    let nkv = nkv();
    let ok = |stdout: &str| (0, stdout.to_owned(), String::new());
    // kv-store.
    assert_eq!(nkv.run(&["set", "-k", "Name", "-v", "-5"]), (0, String::new(), "OK revision 1\n".into()));
    assert_eq!(nkv.run(&["get", "-k", "Name"]), ok("-5"));
    assert_eq!(nkv.run(&["get", "--all"]), ok("Name = -5\n"));
    assert_eq!(nkv.run(&["set", "-k", "Name"]).0, 2, "without a value");
    // The replicated store.
    let (code, stdout, stderr) = nkv.run(&["set", "--pairs", "a=1", "b=2=3", "c="]);
    assert_eq!((code, stdout.as_str(), stderr.lines().count()), (0, "", 3), "{stderr}");
    assert_eq!(nkv.run(&["get", "a", "b"]), ok("a = 1\nb = 2=3\n"));
    assert_eq!(nkv.run(&["list", "--values"]), ok("Name = -5\na = 1\nb = 2=3\nc = \n"));
    assert_eq!(nkv.run(&["get", "a", "none"]), (1, "a = 1\n".into(), "none: not found\n".into()));
    let (code, _, stderr) = nkv.run(&["set", "--pairs", "x=1", "y"]);
    assert_eq!((code, stderr.contains("'y' is not KEY=VALUE")), (2, true), "{stderr}");
    assert_eq!(nkv.run(&["exists", "x"]).0, 1, "nothing was written");
    let (code, _, stderr) = nkv.run(&["set", "--pairs", "x=1", "y..z=2"]);
    assert_eq!((code, stderr.contains("y..z") || stderr.contains("empty segment")), (2, true), "{stderr}");
}

#[test]
fn each_end_has_its_exit_code() {
    let nkv = nkv();
    assert_eq!(nkv.run(&["put", "a", "1", "--if-revision", "0"]).0, 0);
    let (code, _, stderr) = nkv.run(&["put", "a", "2", "--if-revision", "7"]);
    assert_eq!((code, stderr.contains("revision 1")), (5, true), "{stderr}");
    assert_eq!(nkv.run(&["delete", "a", "--if-revision", "7"]).0, 5);
    for words in [
        &["bogus"][..],
        &["put", "a"],
        &["get"],
        &["get", "a..b"],
        &["--timeout", "x", "get", "a"],
        &["host:port", "get", "a"],
        &["put", "a", "@/no/such/file"],
        &["unsubscribe", "a"],
    ] {
        let (code, stdout, stderr) = nkv.run(words);
        assert_eq!((code, stdout.as_str(), stderr.is_empty()), (2, "", false), "{words:?}");
    }
    assert_eq!(nkv.run(&["exists", "a"]).0, 0);
    assert_eq!(nkv.run(&["exists", "b"]).0, 1);
    let big = vec![b'x'; (1 << 20) + 1];
    let (code, _, stderr) = nkv.feed(&["put", "big", "-"], &big);
    assert_eq!((code, stderr.contains("takes 1048576 at most")), (7, true), "{stderr}");

    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let started = Instant::now();
    let output = finish(command(&[&free, "get", "a"]).spawn().unwrap());
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stderr).contains(&free));
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_server_that_greets_and_then_sleeps_is_a_timeout_and_one_of_nats_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let sleeper = std::thread::spawn(move || {
        let (mut peer, _) = listener.accept().unwrap();
        BufReader::new(peer.try_clone().unwrap()).read_line(&mut String::new()).unwrap();
        peer.write_all(b"{\"Base\":{\"id\":0,\"status\":200,\"message\":\"No Error\"}}\n").unwrap();
        let (mut nats, _) = listener.accept().unwrap();
        nats.write_all(b"INFO {\"server_id\":\"x\"}\r\n").unwrap();
        std::io::copy(&mut nats, &mut std::io::sink()).unwrap();
        drop(peer);
    });
    let output = finish(command(&[&addr, "--timeout", "100ms", "get", "a"]).spawn().unwrap());
    assert_eq!(output.status.code(), Some(6), "{}", String::from_utf8_lossy(&output.stderr));
    let output = finish(command(&[&format!("nkv://{addr}"), "get", "a"]).spawn().unwrap());
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stderr).contains("NATS"));
    sleeper.join().unwrap();
}

// It was reported as a failure to connect.
#[test]
fn a_server_that_takes_connections_and_says_nothing_is_a_timeout() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
    for addr in [&addr, path.to_str().unwrap()] {
        let output = finish(command(&[addr, "--timeout", "100ms", "--json", "get", "a"]).spawn().unwrap());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), &lines(&stderr)[0]["code"]), (Some(6), &json!(6)), "{stderr}");
        assert!(stderr.contains("no answer within 100ms"), "{stderr}");
    }
    drop((listener, socket));
    let output = finish(command(&[&addr, "--timeout", "100ms", "get", "a"]).spawn().unwrap());
    assert_eq!(output.status.code(), Some(3));
}

// A client that was started a little before its server failed at once.
#[test]
fn a_server_that_is_coming_up_is_waited_for_if_asked() {
    let dir = tempfile::tempdir().unwrap();
    let addr = format!("unix:{}", dir.path().join("socket").display());
    let begun = Instant::now();
    assert_eq!(finish(command(&[&addr, "put", "a", "1"]).spawn().unwrap()).status.code(), Some(3));
    let output = finish(command(&[&addr, "--wait", "100ms", "put", "a", "1"]).spawn().unwrap());
    assert_eq!(output.status.code(), Some(3));
    assert!(begun.elapsed() < Duration::from_secs(20));
    let child = command(&[&addr, "put", "a", "1", "--wait", "60s"]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let server = runtime.block_on(nkv_server::Server::builder().listen(addr.parse().unwrap()).bind()).unwrap();
    let output = finish(child);
    assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &b"OK revision 1\n"[..]));
    drop(server);
}

#[test]
fn a_client_has_a_name_for_people_and_all_that_are_connected_are_listed() {
    let nkv = nkv();
    let mut child = command(&[&nkv.addr, "--name", "the hall", "subscribe", "lamp"]).spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    said.read_line(&mut String::new()).unwrap();
    let mut other = command(&["subscribe", "attic", "--exact"]);
    let mut other = other.env("NKV_ADDR", &nkv.addr).env("NKV_NAME", "the hall").spawn().unwrap();
    let mut said_too = BufReader::new(other.stderr.take().unwrap());
    said_too.read_line(&mut String::new()).unwrap();

    let subscribers = lines(&nkv.stdout(&["trace", "lamp.hall", "--json"]));
    let [subscriber] = &subscribers[..] else { panic!("{subscribers:?}") };
    assert_eq!((&subscriber["name"], &subscriber["pattern"]), (&json!("the hall"), &json!("lamp")));
    assert_eq!(subscriber["exact"], json!(false));
    let peer = subscriber["peer"].as_str().unwrap();
    assert!(peer.starts_with("127.0.0.1:"), "{subscriber}");
    let text = nkv.stdout(&["trace", "lamp.hall"]);
    assert!(text.ends_with(&format!(" peer {peer} name the hall\n")), "{text}");
    assert!(nkv.stdout(&["trace", "attic"]).contains(" attic exact since "));
    assert_eq!(nkv.stdout(&["trace", "attic.box"]), "", "it covers no branch");

    let clients = lines(&nkv.stdout(&["trace", "--json"]));
    let named: Vec<_> = clients.iter().filter(|client| client["name"] == "the hall").collect();
    assert_eq!((clients.len(), named.len()), (3, 2), "{clients:?}");
    assert!(clients.iter().all(|client| client["op"] == "trace" && client["client_uuid"].is_string()));
    assert!(named.iter().any(|client| client["peer"] == peer && client["subscriptions"] == 1), "{clients:?}");
    assert_eq!(nkv.stdout(&["trace"]).lines().filter(|line| line.ends_with(" name the hall")).count(), 2);
    for child in [&mut child, &mut other] {
        child.kill().unwrap();
        child.wait().unwrap();
    }

    let output = finish(command(&[&nkv.addr, "health"]).env("NKV_NAME", "a\nb").spawn().unwrap());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && stderr.contains("NKV_NAME"), "{stderr}");
    assert_eq!(nkv.run(&["--name", &"x".repeat(257), "health"]).0, 2);
    assert_eq!(nkv.run(&["--name", &"x".repeat(256), "health"]).0, 0);
}

#[test]
fn a_subscription_may_be_to_one_key_alone_and_without_what_is_there() {
    let nkv = nkv();
    for key in ["a", "a.b", "c"] {
        nkv.stdout(&["put", key, "1"]);
    }
    let (code, stdout, _) = nkv.run(&["subscribe", "a", "--exact", "--count", "2", "--timeout", "1500ms"]);
    assert_eq!((code, stdout.as_str()), (6, "a = 1\n"));
    let (code, _, stderr) = nkv.run(&["subscribe", "a.*", "--exact"]);
    assert!(code == 2 && stderr.contains("a key is needed here"), "{stderr}");

    let mut child = command(&[&nkv.addr, "subscribe", "*", "--no-snapshot", "--once"]).spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert!(line.contains("synced"), "{line}");
    nkv.stdout(&["put", "c", "2"]);
    assert_eq!(String::from_utf8(finish(child).stdout).unwrap(), "c = 2\n");
}

#[test]
fn values_may_come_from_stdin_or_a_file_and_may_be_anything() {
    let nkv = nkv();
    let binary: Vec<u8> = (0..=255).chain(*b"\n").collect();
    assert_eq!(nkv.raw(&["put", "in", "-"], &binary).status.code(), Some(0));
    assert_eq!(nkv.raw(&["get", "in"], b"").stdout, binary);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("value");
    std::fs::write(&path, &binary).unwrap();
    nkv.stdout(&["put", "file", &format!("@{}", path.display())]);
    assert_eq!(nkv.raw(&["get", "file"], b"").stdout, binary);
    let [object] = &lines(&nkv.stdout(&["get", "file", "--json"]))[..] else { panic!("one line was expected") };
    assert_eq!(object["value"], json!(binary));

    nkv.stdout(&["put", "dash", "--", "--json"]);
    assert_eq!(nkv.stdout(&["get", "dash"]), "--json");
    nkv.stdout(&["put", "number", "-5"]);
    assert_eq!(nkv.stdout(&["get", "number"]), "-5");
    nkv.stdout(&["put", "at", "--raw", "@home"]);
    assert_eq!(nkv.stdout(&["get", "at"]), "@home");
    nkv.stdout(&["put", "empty", ""]);
    assert_eq!(nkv.stdout(&["get", "empty"]), "");
}

#[test]
fn json_may_be_asked_for_anywhere_on_the_line() {
    let nkv = nkv();
    assert_eq!(lines(&nkv.stdout(&["--json", "put", "a.b", "1"])), [json!({"op": "put", "key": "a.b", "revision": 1})]);
    let got = json!({"op": "get", "key": "a.b", "value": "1", "revision": 1});
    for words in [["--json", "get", "a.b"], ["get", "--json", "a.b"], ["get", "a.b", "--json"]] {
        assert_eq!(lines(&nkv.stdout(&words)), std::slice::from_ref(&got));
    }
    assert_eq!(lines(&nkv.stdout(&["list", "--json"])), [json!({"op": "list", "key": "a.b", "revision": 1})]);
    let deleted = json!({"op": "delete", "key": "a.*", "count": 1, "revision": 2});
    assert_eq!(lines(&nkv.stdout(&["delete", "a.*", "--json"])), [deleted]);
    let (code, stdout, stderr) = nkv.run(&["get", "a.b", "--json"]);
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert_eq!(lines(&stderr)[0]["error"], "not found");
    for words in [["stats", "--json"], ["version", "--json"], ["health", "--json"]] {
        assert_eq!(lines(&nkv.stdout(&words))[0]["op"], words[0]);
    }
}

#[test]
fn lists_pages_and_trees() {
    let nkv = nkv();
    for key in ["a", "a.b", "a.b.c", "d.e", "d.f"] {
        nkv.stdout(&["put", key, "1"]);
    }
    assert_eq!(nkv.stdout(&["ls"]), "a\na.b\na.b.c\nd.e\nd.f\n");
    assert_eq!(nkv.stdout(&["list", "a.*"]), "a.b\na.b.c\n");
    let (code, stdout, stderr) = nkv.run(&["list", "--limit", "2", "--after", "a"]);
    assert_eq!((code, stdout.as_str(), stderr.contains("--after a.b.c")), (0, "a.b\na.b.c\n", true), "{stderr}");
    assert_eq!(nkv.stdout(&["get", "d.*", "--limit", "1"]), "d.e = 1\n");
    assert_eq!(nkv.stdout(&["get", "d.*"]), "d.e = 1\nd.f = 1\n");
    assert_eq!(nkv.stdout(&["tree"]), "a\n  b\n    c\nd\n  e\n  f\n");
}

#[test]
fn a_subscription_is_printed_line_by_line_and_may_end_by_itself() {
    let nkv = nkv();
    nkv.stdout(&["put", "a.x", "1"]);
    assert_eq!(nkv.stdout(&["subscribe", "a", "--once"]), "a.x = 1\n");
    let mut child = command(&[&nkv.addr, "sub", "a", "--count", "3", "--json"]).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || serde_json::from_str::<Value>(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(next()["op"], "update");
    assert_eq!(next()["op"], "synced");
    nkv.stdout(&["put", "a.y", "2", "--ttl", "500ms"]);
    assert_eq!(next()["value"], "2");
    assert_eq!(next()["op"], "expired");
    assert_eq!(finish(child).status.code(), Some(0));
}

#[cfg(unix)]
#[test]
fn an_interrupt_ends_with_130_and_a_closed_pipe_quietly() {
    let nkv = nkv();
    let mut child = command(&[&nkv.addr, "subscribe", "a"]).spawn().unwrap();
    let mut synced = [0; 1];
    child.stderr.as_mut().unwrap().read_exact(&mut synced).unwrap();
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = finish(child);
    assert_eq!(output.status.code(), Some(130), "{output:?}");

    let mut child = command(&[&nkv.addr]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.as_mut().unwrap().write_all(b"health\n").unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut synced).unwrap();
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(finish(child).status.code(), Some(130), "also while it waits for commands");

    for n in 0..50 {
        nkv.stdout(&["put", &format!("key.{n}"), &"x".repeat(10_000)]);
    }
    let mut child = command(&[&nkv.addr, "get", "*"]).spawn().unwrap();
    drop(child.stdout.take());
    let output = finish(child);
    assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0));
}

// It went on waiting for a reader that does not read.
#[cfg(unix)]
#[test]
fn an_interrupt_ends_it_also_while_its_stdout_is_not_read() {
    let nkv = nkv();
    let value = "x".repeat(1 << 20);
    assert_eq!(nkv.feed(&["-q", "put", "a", "-"], value.as_bytes()).0, 0);
    for words in [&["get", "a"][..], &[]] {
        let mut child = command(&[&[nkv.addr.as_str()], words].concat()).stdin(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(b"get a\n").unwrap();
        let mut stdout = child.stdout.take().unwrap();
        stdout.read_exact(&mut [0; 1]).unwrap();
        assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
        assert_eq!(finish(child).status.code(), Some(130), "{words:?}");
        drop((stdin, stdout));
    }
}

/// A subscription to what never changes lived on when `head -1` had all it wanted.
#[cfg(unix)]
#[test]
fn a_subscription_ends_with_the_reader_of_its_stdout_although_nothing_changes() {
    let nkv = nkv();
    nkv.stdout(&["put", "a", "1"]);
    let mut child = command(&[&nkv.addr, "subscribe", "a"]).spawn().unwrap();
    let mut reader = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert_eq!(line, "a = 1\n");
    // It has said what there is to say.
    let mut synced = BufReader::new(child.stderr.take().unwrap());
    synced.read_line(&mut line).unwrap();
    drop(reader);
    let output = finish(child);
    assert_eq!(output.status.code(), Some(0));
    let mut rest = String::new();
    synced.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "", "it ends quietly");
}

#[cfg(target_os = "linux")]
#[test]
fn without_a_stderr_it_goes_on() {
    let nkv = nkv();
    nkv.stdout(&["put", "a", "1"]);
    let cases = [(&["put", "a", "2"][..], 0), (&["get", "b"], 1), (&["fly"], 2), (&["subscribe", "a", "--once"], 0)];
    for (words, code) in cases {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let output = finish(command(words).env("NKV_ADDR", &nkv.addr).stderr(full).spawn().unwrap());
        assert_eq!(output.status.code(), Some(code), "{words:?}");
        let (reader, gone) = std::io::pipe().unwrap();
        drop(reader);
        let output = finish(command(words).env("NKV_ADDR", &nkv.addr).stderr(gone).spawn().unwrap());
        assert_eq!(output.status.code(), Some(code), "{words:?}");
    }
}

#[test]
fn an_empty_variable_is_as_if_not_set_and_one_that_is_wrong_is_named() {
    let nkv = nkv();
    let output = finish(command(&[&nkv.addr, "health"]).env("NKV_ADDR", "").env("NKV_TOKEN", "").spawn().unwrap());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let output = finish(command(&["health"]).env("NKV_ADDR", "http://a").spawn().unwrap());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && stderr.contains("NKV_ADDR"), "{stderr}");
}

// A full disk was the user's mistake.
#[cfg(target_os = "linux")]
#[test]
fn a_stdout_that_takes_nothing_is_a_failure_and_no_usage_error() {
    let nkv = nkv();
    nkv.stdout(&["put", "a", "1"]);
    for words in [&["get", "a"][..], &["ls"], &["stats", "--json"]] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let output = finish(command(&[&[nkv.addr.as_str()], words].concat()).stdout(full).spawn().unwrap());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), stderr.contains("cannot write to stdout")), (Some(7), true), "{stderr}");
    }
}

// A wildcard was called malformed, and an absent key one at revision 0.
#[test]
fn what_is_wrong_is_said_of_what_it_is() {
    let nkv = nkv();
    for words in [
        &["put", "a.*", "1"][..],
        &["trace", "*"],
        &["delete", "a.*", "--if-revision", "1"],
        &["list", "--after", "a.*"],
        &["get", "*", "--after", "*"],
    ] {
        let (code, _, stderr) = nkv.run(words);
        assert!(code == 2 && stderr.contains("a key is needed here"), "{words:?}: {stderr}");
    }
    let absent = "nkv-client: conflict: the key does not exist\n";
    assert_eq!(nkv.run(&["put", "a", "1", "--if-revision", "7"]), (5, String::new(), absent.into()));
}

// It waited for ever.
#[test]
fn a_subscription_that_is_to_end_by_itself_has_a_time_to_do_so() {
    let nkv = nkv();
    nkv.stdout(&["put", "a", "1"]);
    for words in
        [&["subscribe", "b", "--once", "--timeout", "100ms"][..], &["sub", "a", "--count", "2", "--timeout", "0.1s"]]
    {
        let (code, _, stderr) = nkv.run(words);
        assert!(code == 6 && stderr.contains("within 100ms"), "{words:?}: {stderr}");
    }
    assert_eq!(nkv.run(&["subscribe", "a", "--once", "--timeout", "1h"]), (0, "a = 1\n".into(), String::new()));
}

#[test]
fn a_host_without_a_port_is_an_address_wherever_one_may_be() {
    let free = "unix:/no/such/socket";
    for (words, addr, shown) in [
        (&["127.0.0.4", "get", "a"][..], "", "127.0.0.4:4222"),
        (&["nkv://127.0.0.4", "get", "a"], "", "127.0.0.4:4222"),
        (&["host.invalid", "--timeout", "10s", "get", "a"], "", "host.invalid:4222"),
        (&["no-such-host", "get", "a"], "", "no-such-host:4222"),
        (&["get", "a"], "127.0.0.4", "127.0.0.4:4222"),
        (&["get", "get"], free, "/no/such/socket"),
    ] {
        let output = finish(command(words).env("NKV_ADDR", addr).spawn().unwrap());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(matches!(output.status.code(), Some(3 | 6)) && stderr.contains(shown), "{words:?}: {stderr}");
    }
    for words in [&["db1"][..], &["db1", "gte", "a"], &["gte", "a"]] {
        let output = finish(command(words).env("NKV_ADDR", free).spawn().unwrap());
        let tip = format!("a host of this name is nkv://{}", words[0]);
        assert_eq!(output.status.code(), Some(2), "{words:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(&tip), "{output:?}");
    }
}

#[test]
fn help_and_version_need_no_server() {
    for (words, part) in [
        (&["--help"][..], "Examples:"),
        (&["put", "--help"], "--if-revision"),
        (&["rm", "-h"], "delete 'lamp.*'"),
        (&["--version"], "nkv-client "),
    ] {
        let output = finish(command(words).spawn().unwrap());
        assert_eq!(output.status.code(), Some(0));
        assert!(String::from_utf8_lossy(&output.stdout).contains(part), "{words:?}");
    }
}
