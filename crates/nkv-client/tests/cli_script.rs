//! Commands from a pipe, as a contract: the real binary.
#![cfg(all(unix, feature = "cli"))]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use std::time::Duration;

use common::cli::{Nkv, command, finish, lines, nkv};
use common::{Scripted, within};
use nkv_protocol::Kind;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use serde_json::json;

#[test]
fn results_go_to_stdout_and_all_else_to_stderr_with_the_number_of_the_line() {
    let nkv = nkv();
    let script = b"PUT a.b 'two words'\nget a.b\nget nope\nset a.c 3\ndel a.b\n\nLIST\nunsub a\nlist --json # a comment\nquit\nget a.c\n";
    let (code, stdout, stderr) = nkv.feed(&[], script);
    assert_eq!(code, 1, "the first that failed: get nope");
    assert_eq!(stdout, "two words\na.c\n{\"key\":\"a.c\",\"op\":\"list\",\"revision\":2}\n");
    let said = [
        "line 1: OK revision 1",
        "line 3: not found",
        "line 4: OK revision 2",
        "line 5: OK deleted 1, revision 3",
        "line 8: not found",
    ];
    assert_eq!(stderr.lines().collect::<Vec<_>>(), said);

    let (code, stdout, stderr) = nkv.feed(&[], b"fly\nput a\nget a..b\nput x 'open\nget a.c");
    assert_eq!((code, stdout.as_str()), (2, "3\n"));
    for (line, part) in stderr.lines().zip(["1: unrecognized subcommand 'fly'", "2: the", "3: empty", "4: a quotation"])
    {
        assert!(line.starts_with(&format!("nkv-client: line {part}")), "{stderr}");
    }
    assert_eq!(stderr.lines().count(), 4);
}

#[test]
fn quiet_leaves_results_and_errors() {
    let nkv = nkv();
    let script = b"put a 1\nsubscribe a\nlist --limit 1\nput b 1\nlist --limit 1\nget c\n";
    let (code, _, stderr) = nkv.feed(&["-q"], script);
    assert_eq!((code, stderr.as_str()), (1, "line 6: not found\n"));
    assert_eq!(nkv.run(&["--quiet", "put", "a", "1"]), (0, String::new(), String::new()));
    assert_eq!(nkv.run(&["subscribe", "a", "--once", "-q"]), (0, "a = 1\n".into(), String::new()));
    let (code, _, stderr) = nkv.run(&["-q", "put", "a", "1", "--if-revision", "0"]);
    assert_eq!((code, stderr.is_empty()), (5, false));
}

#[test]
fn json_of_a_script_is_that_of_single_commands() {
    let (one_by_one, script) = (nkv(), nkv());
    let all = [
        "put a.b 1",
        "get a.b",
        "get *",
        "list",
        "tree",
        "exists a.b",
        "exists c",
        "get c",
        "put a.b 1 --if-revision 9",
        "put a 1 --if-revision 9",
        "put a* 1",
        "delete c",
        "delete a.*",
        "health",
        "version",
    ];
    let (mut stdout, mut stderr) = (String::new(), Vec::new());
    for (number, line) in all.iter().enumerate() {
        let words: Vec<_> = ["--json"].into_iter().chain(line.split(' ')).collect();
        let (_, out, err) = one_by_one.run(&words);
        stdout += &out;
        stderr.extend(lines(&err).into_iter().map(|mut object| {
            object["line"] = json!(number + 1);
            object
        }));
    }
    let (_, script_stdout, script_stderr) = script.feed(&["--json"], all.join("\n").as_bytes());
    assert_eq!(script_stdout, stdout);
    assert_eq!(lines(&script_stderr), stderr);
    assert_eq!(stderr.len(), 5, "{script_stderr}");
}

// A script ended with 0 although commands of it had failed.
#[test]
fn the_first_command_of_a_pipe_that_fails_gives_the_exit_code() {
    let nkv = nkv();
    for (script, code) in [
        (&b"put a 1\nget a\nhelp\n"[..], 0),
        (b"put a 1\nput a 2 --if-revision 0\nget nope\nput b 1\nquit\n", 5),
        (b"unsubscribe a\nfly\n", 1),
        (b"get \xff\n", 2),
        (b"put a -\nget nope\n", 2),
        (b"subscribe z --once --timeout 1h\nfly\nget nope\n", 2),
    ] {
        assert_eq!(nkv.feed(&[], script).0, code, "{}", String::from_utf8_lossy(script));
    }
    assert_eq!(nkv.stdout(&["get", "b"]), "1", "what follows a failure is run");
}

// A put of a script from another system stored 'one\r'.
#[test]
fn scripts_of_other_systems_are_understood_or_refused_by_the_number_of_the_line() {
    let nkv = nkv();
    let script = b"\xef\xbb\xbfput a one\r\nput b \"two words\"\r\n\r\nget a\r\nget b";
    assert_eq!(nkv.feed(&["-q"], script), (0, "one\ntwo words\n".into(), String::new()));

    let (code, stdout, stderr) = nkv.feed(&["-q"], b"get a\nput a caf\xe9\nput a 1\rput a 2\r\nget a\n");
    assert_eq!((code, stdout.as_str()), (2, "one\none\n"));
    let said: Vec<_> = stderr.lines().collect();
    assert!(said.len() == 2 && said[0].contains("line 2: not UTF-8") && said[1].contains("line 3: a carriage return"));

    let utf16 = |bytes: fn(u16) -> [u8; 2]| "\u{feff}put a 1\nget a\n".encode_utf16().flat_map(bytes).collect();
    let scripts: [Vec<u8>; 2] = [utf16(u16::to_le_bytes), utf16(u16::to_be_bytes)];
    for script in scripts {
        let (code, stdout, stderr) = nkv.feed(&[], &script);
        assert_eq!((code, stdout.as_str()), (2, ""));
        assert!(stderr.starts_with("nkv-client: line 1: UTF-16") && stderr.lines().count() == 1, "{stderr}");
    }
    let (code, _, stderr) = nkv.feed(&["--json"], b"get \xff\n");
    assert_eq!((code, lines(&stderr)), (2, vec![json!({"code": 2, "error": "not UTF-8", "line": 1})]));
}

#[test]
fn a_file_may_have_any_name_that_the_system_knows() {
    use std::os::unix::ffi::OsStrExt;
    let nkv = nkv();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(std::ffi::OsStr::from_bytes(b"caf\xe9 @ ' x"));
    std::fs::write(&path, "a value").unwrap();
    let mut put = command(&[&nkv.addr, "-q", "put", "a"]);
    let output =
        finish(put.arg(std::ffi::OsStr::from_bytes(&[b"@", path.as_os_str().as_bytes()].concat())).spawn().unwrap());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(nkv.stdout(&["get", "a"]), "a value");

    let script = [b"put b \"@", path.as_os_str().as_bytes(), b"\"\nget b\n"].concat();
    assert_eq!(nkv.feed(&["-q"], &script), (0, "a value\n".into(), String::new()));
}

// A value with a line end passed for another key.
#[test]
fn a_value_cannot_pass_for_another_key() {
    let nkv = nkv();
    nkv.stdout(&["put", "a", "1\nb = 2\n\\"]);
    let line = "a = 1\\nb = 2\\n\\\\\n";
    assert_eq!(nkv.stdout(&["get", "*"]), line);
    assert_eq!(nkv.stdout(&["subscribe", "a", "--once"]), line);
    let (_, stdout, _) = nkv.feed(&[], b"get *\nget a\n");
    assert_eq!(stdout, format!("{line}{}", line.strip_prefix("a = ").unwrap()));
    assert_eq!(nkv.stdout(&["get", "a"]), "1\nb = 2\n\\", "alone it is as it is");
}

/// Each put waited for the answer to the one before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_of_a_script_leave_together_and_what_follows_sees_them() {
    let server = Scripted::new().await;
    let mut child = command(&[&server.addr]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let keys: Vec<_> = (0..20).map(|n| format!("key.{}", n % 7)).collect();
    let mut script: String = keys.iter().map(|key| format!("put {key} 1\n")).collect();
    script += "delete z\nget a\nput b 1\nput c 1\n";
    std::thread::spawn(move || stdin.write_all(script.as_bytes()).unwrap());

    let mut peer = server.accept().await;
    let mut asked = Vec::new();
    for _ in 0..21 {
        let (kind, id, key) = peer.request().await.unwrap();
        assert_ne!(kind, Kind::Get, "nothing is answered yet");
        asked.push((id, key));
    }
    assert!(asked.iter().map(|(_, key)| key.as_str()).eq(keys.iter().map(String::as_str).chain(["z"])), "in order");
    let nothing = tokio::time::timeout(Duration::from_millis(100), peer.request()).await;
    assert!(nothing.is_err(), "the get waits until all are done: {nothing:?}");
    for (n, (id, _)) in asked.iter().enumerate() {
        match n {
            7 => {
                let refused = format!(r#"{{"Base":{{"id":{id},"status":507,"message":"the disk is full"}}}}"#);
                peer.send(&(refused + "\n")).await;
            }
            _ => peer.ok(id, Some(n as u64 + 1)).await,
        }
    }
    let (kind, id, _) = peer.request().await.unwrap();
    assert_eq!(kind, Kind::Get);
    let nothing = tokio::time::timeout(Duration::from_millis(100), peer.request()).await;
    assert!(nothing.is_err(), "what follows a get waits for its answer: {nothing:?}");
    peer.send(&format!(r#"{{"Base":{{"id":{id},"status":404,"message":"Not Found"}}}}"#)).await;
    peer.send("\n").await;
    for _ in 0..2 {
        let (kind, id, _) = peer.request().await.unwrap();
        assert_eq!(kind, Kind::Put);
        peer.ok(&id, Some(30)).await;
    }
    let output = within(tokio::task::spawn_blocking(|| finish(child))).await.unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(7), "that of the first that failed: {said}");
    let said: Vec<_> = said.lines().collect();
    assert_eq!(said.len(), 24, "{said:?}");
    for (n, line) in said.iter().enumerate() {
        assert!(
            line.trim_start_matches("nkv-client: ").starts_with(&format!("line {}: ", n + 1)),
            "in order: {said:?}"
        );
    }
}

#[test]
fn a_script_of_thousands_of_puts_is_done_whole_and_in_order() {
    let nkv = nkv();
    let mut script: String = (0..3_000).map(|n| format!("put key.{} {n}\n", n % 1_000)).collect();
    script += "get key.999\ndelete key.*\nlist\nput a 1\nget a\n";
    let (code, stdout, stderr) = nkv.feed(&[], script.as_bytes());
    assert_eq!((code, stdout.as_str()), (0, "2999\n1\n"), "{stderr}");
    assert_eq!(stderr.lines().count(), 3_002);
    for (n, line) in stderr.lines().take(3_000).enumerate() {
        assert_eq!(line, format!("line {0}: OK revision {0}", n + 1));
    }
}

/// A script that runs, and what it says.
fn running(nkv: &Nkv, script: &str) -> Child {
    let mut child = command(&[&nkv.addr]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.as_mut().unwrap().write_all(script.as_bytes()).unwrap();
    child
}

#[test]
fn a_subscription_of_a_script_that_gets_too_little_in_its_time_is_a_failure_of_its_line() {
    let nkv = nkv();
    let mut child = running(&nkv, "\nsubscribe z --count 3 --timeout 2s\nget nope\n");
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let late = said.find(|line| line.starts_with("nkv-client: "));
    assert_eq!(late.unwrap(), "nkv-client: line 2: fewer than 3 values and changes came within 2s");
    drop(child.stdin.take());
    assert_eq!(finish(child).status.code(), Some(6), "that of line 2, although line 3 failed before it");
}

#[test]
fn a_subscription_of_a_script_ends_it_with_the_reader_of_stdout() {
    let nkv = nkv();
    nkv.stdout(&["put", "a", "1"]);
    let mut child = running(&nkv, "subscribe a\n");
    let stdin = child.stdin.take();
    let mut reader = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert_eq!(line, "a = 1\n");
    drop(reader);
    assert_eq!(finish(child).status.code(), Some(0));
    drop(stdin);
}

#[test]
fn a_subscription_ends_with_its_reader_also_when_stdout_is_a_socket() {
    let nkv = nkv();
    nkv.stdout(&["put", "a", "1"]);
    let (near, far) = UnixStream::pair().unwrap();
    let child = command(&[&nkv.addr, "subscribe", "a"]).stdout(OwnedFd::from(far)).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(near).read_line(&mut line).unwrap();
    assert_eq!(line, "a = 1\n");
    assert_eq!(finish(child).status.code(), Some(0));
}

/// Another program's event loop leaves its pipes so.
fn does_not_block<F: std::os::fd::AsFd>(pipe: F) -> F {
    fcntl_setfl(&pipe, fcntl_getfl(&pipe).unwrap() | OFlags::NONBLOCK).unwrap();
    pipe
}

// One that had nothing yet, or was full, was an error.
#[test]
fn pipes_that_do_not_block_are_waited_for() {
    let nkv = nkv();
    let (stdin, mut commands) = std::io::pipe().unwrap();
    let (mut results, stdout) = std::io::pipe().unwrap();
    let (mut said, stderr) = std::io::pipe().unwrap();
    let child = {
        let mut command = command(&[&nkv.addr]);
        command.stdin(does_not_block(stdin)).stdout(does_not_block(stdout)).stderr(does_not_block(stderr));
        command.spawn().unwrap()
    };
    let value = "x".repeat(300_000);
    let script = format!("put a {value}\nget a\n") + &"get b\n".repeat(5_000);
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        commands.write_all(script.as_bytes()).unwrap();
    });
    // The other end is in no hurry.
    std::thread::sleep(Duration::from_millis(200));
    let all_said = std::thread::spawn(move || {
        let mut all = String::new();
        said.read_to_string(&mut all).unwrap();
        all
    });
    let mut all = String::new();
    results.read_to_string(&mut all).unwrap();
    assert_eq!(finish(child).status.code(), Some(1));
    assert_eq!(all.trim_end(), value);
    assert_eq!(all_said.join().unwrap().lines().count(), 5_001);

    let (stdin, mut given) = std::io::pipe().unwrap();
    let child = command(&[&nkv.addr, "-q", "put", "c", "-"]).stdin(does_not_block(stdin)).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(50));
    given.write_all(b"a value").unwrap();
    drop(given);
    assert_eq!(finish(child).status.code(), Some(0));
    assert_eq!(nkv.stdout(&["get", "c"]), "a value");
}
