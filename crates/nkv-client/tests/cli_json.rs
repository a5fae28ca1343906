//! What docs/cli.md shows is what the real binary writes.
#![cfg(all(unix, feature = "cli"))]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use common::cli::{command, finish, lines, nkv};
use common::{Scripted, server, within};
use serde_json::{Value, json};

const PAGE: &str = include_str!("../../../docs/cli.md");

/// A command of the page, and what is to come of it.
#[derive(Debug)]
struct Example<'a> {
    command: &'a str,
    stdout: Vec<&'a str>,
    stderr: Vec<&'a str>,
    code: i32,
}

/// The examples of each block: a block has a server of its own.
fn blocks() -> Vec<Vec<Example<'static>>> {
    let blocks = PAGE.split("```console\n").skip(1).map(|block| block.split("```").next().unwrap());
    let examples = |block: &'static str| {
        let mut examples = Vec::<Example<'_>>::new();
        for line in block.lines() {
            if let Some(command) = line.strip_prefix("$ ") {
                examples.push(Example { command, stdout: Vec::new(), stderr: Vec::new(), code: 0 });
                continue;
            }
            let example = examples.last_mut().unwrap();
            if let Some(line) = line.strip_prefix("stderr: ") {
                example.stderr.push(line);
            } else if let Some(code) = line.strip_prefix("exit: ") {
                example.code = code.parse().unwrap();
            } else {
                example.stdout.push(line);
            }
        }
        examples
    };
    blocks.map(examples).collect()
}

/// Whether a line is as shown, where `<word>` stands for anything.
fn is_as_shown(line: &str, shown: &str) -> bool {
    let mut parts = shown.split('<').enumerate().map(|(n, part)| match n {
        0 => part,
        _ => part.split_once('>').unwrap().1,
    });
    let Some(mut rest) = line.strip_prefix(parts.next().unwrap()) else { return false };
    for part in parts {
        let end = if part.is_empty() { Some(rest.len()) } else { rest.find(part) };
        let Some(at) = end else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.is_empty()
}

#[test]
fn every_example_is_what_the_program_writes() {
    let blocks = blocks();
    assert!(blocks.len() >= 5 && blocks.iter().all(|block| !block.is_empty()), "{blocks:?}");
    for block in blocks {
        let nkv = nkv();
        let bin = std::path::Path::new(env!("CARGO_BIN_EXE_nkv-client")).parent().unwrap();
        let path = std::env::join_paths(
            [bin.to_path_buf()].into_iter().chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
        );
        for example in block {
            let mut shell = Command::new("bash");
            shell.args(["-c", example.command]).env("PATH", path.as_ref().unwrap()).env("NKV_ADDR", &nkv.addr);
            shell.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let output = finish(shell.spawn().unwrap());
            assert_eq!(output.status.code(), Some(example.code), "{example:?}: {output:?}");
            for (written, shown) in [(output.stdout, example.stdout), (output.stderr, example.stderr)] {
                let written = String::from_utf8(written).unwrap();
                let is_same = written.lines().count() == shown.len()
                    && written.lines().zip(&shown).all(|(line, shown)| is_as_shown(line, shown));
                assert!(is_same, "{}\nwrote {written:?}\nand not {shown:?}", example.command);
            }
        }
    }
}

#[test]
fn each_command_and_event_is_described() {
    let commands = [
        "get",
        "put",
        "delete",
        "list",
        "tree",
        "exists",
        "health",
        "version",
        "stats",
        "cluster",
        "trace",
        "subscribe",
    ];
    let events =
        ["update", "deleted", "expired", "missed", "synced", "reconnecting", "connected", "ended", "unsubscribe"];
    for op in commands.into_iter().chain(events) {
        assert!(PAGE.contains(&format!("`{op}`")), "{op}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_event_has_its_object() {
    let (scripted, epoch) = (Scripted::new().await, format!("{:032x}", 0xe1));
    let mut child = command(&[&scripted.addr, "--json", "subscribe", "a"]).spawn().unwrap();
    let mut written = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || serde_json::from_str::<Value>(&written.next().unwrap().unwrap()).unwrap();
    let mut peer = scripted.accept().await;
    peer.request().await.unwrap();
    peer.snapshot("a", &[("a", "1", 1), ("a.x", "\u{e9}\n", 2)], 2).await;
    assert_eq!(next(), json!({"op": "update", "key": "a", "value": "1", "revision": 1, "skipped": 0}));
    assert_eq!(next(), json!({"op": "update", "key": "a.x", "value": "\u{e9}\n", "revision": 2, "skipped": 0}));
    assert_eq!(next(), json!({"op": "synced", "key": "a", "revision": 2, "epoch": epoch}));
    peer.send("{\"Update\":{\"key\":\"a\",\"revision\":3,\"skipped\":4,\"value\":[255,0]}}\n").await;
    assert_eq!(next(), json!({"op": "update", "key": "a", "value": [255, 0], "revision": 3, "skipped": 4}));
    peer.send("{\"Close\":{\"key\":\"a\",\"revision\":4,\"skipped\":0,\"reason\":\"deleted\"}}\n").await;
    assert_eq!(next(), json!({"op": "deleted", "key": "a", "revision": 4, "skipped": 0}));
    drop(peer);
    assert_eq!(next(), json!({"op": "reconnecting", "key": "a"}));
    let mut peer = scripted.accept().await;
    assert_eq!(next(), json!({"op": "connected", "key": "a"}));
    peer.request().await.unwrap();
    peer.snapshot("a", &[], 5).await;
    assert_eq!(next(), json!({"op": "missed", "key": "a.x", "revision": 5, "skipped": 0}));
    assert_eq!(next(), json!({"op": "synced", "key": "a", "revision": 5, "epoch": epoch}));
    peer.send("{\"Close\":{\"key\":\"a\",\"reason\":\"replaced\"}}\n").await;
    let reason = "replaced by another client of the same name";
    assert_eq!(next(), json!({"op": "ended", "key": "a", "reason": reason}));
    let output = within(tokio::task::spawn_blocking(|| finish(child))).await.unwrap();
    let error = format!("the subscription ended: {reason}");
    let errors = lines(&String::from_utf8(output.stderr).unwrap());
    assert_eq!(errors, [json!({"code": 7, "error": error, "op": "subscribe", "key": "a"})]);
    assert_eq!(output.status.code(), Some(7));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_server_refuses_has_its_status_and_its_figures_their_names() {
    let (_server, addr) = server().await;
    let run = |words: &[&str]| finish(command(&[&[addr.as_str(), "--json"], words].concat()).spawn().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("big");
    std::fs::write(&path, vec![b'x'; (1 << 20) + 1]).unwrap();
    let output = run(&["put", "big", &format!("@{}", path.display())]);
    let [error] = &lines(&String::from_utf8(output.stderr).unwrap())[..] else { panic!("one line was expected") };
    assert_eq!((&error["code"], &error["op"], &error["key"]), (&json!(7), &json!("put"), &json!("big")));
    assert_eq!((output.status.code(), &error["status"]), (Some(7), &json!(413)));

    // One server is no cluster.
    let output = run(&["cluster"]);
    let [error] = &lines(&String::from_utf8(output.stderr).unwrap())[..] else { panic!("one line was expected") };
    let what = error["error"].as_str().unwrap();
    assert!(what.contains("--cluster") && error["op"] == "cluster" && output.status.code() == Some(2), "{error}");

    let output = run(&["stats"]);
    let [stats] = &lines(&String::from_utf8(output.stdout).unwrap())[..] else { panic!("one line was expected") };
    assert_eq!((&stats["op"], &stats["durability"]), (&json!("stats"), &json!("memory")));
    for figure in ["keys", "subscriptions", "connections", "revision", "uptime_ms", "puts", "conflated"] {
        assert!(stats[figure].is_u64(), "{figure}: {stats}");
    }
}

#[test]
fn a_trace_names_each_subscription() {
    let nkv = nkv();
    let (code, stdout, stderr) = nkv.feed(&["--json"], b"subscribe lamp\ntrace lamp.hall\nunsubscribe lamp\n");
    assert_eq!((code, stderr.as_str()), (0, ""));
    let written = lines(&stdout);
    assert!(written.contains(&json!({"op": "subscribe", "key": "lamp"})), "{stdout}");
    assert!(written.contains(&json!({"op": "unsubscribe", "key": "lamp"})), "{stdout}");
    let trace = written.iter().find(|object| object["op"] == "trace").unwrap();
    assert_eq!((&trace["key"], &trace["pattern"]), (&json!("lamp.hall"), &json!("lamp")));
    assert!(trace["client_uuid"].is_string(), "{trace}");
    for figure in ["since_ms", "queued", "skipped"] {
        assert!(trace[figure].is_u64(), "{figure}: {trace}");
    }
    assert_eq!((&trace["exact"], &trace["name"]), (&json!(false), &json!(null)));
}
