//! Reads that go ahead of writes: which answers may come early, and what keeps its order all the same.

#![allow(clippy::unwrap_used)]

mod support;

use nkv_core::NoPersist;
use nkv_testkit::script::{PersistScript, ScriptedPersist};
use serde_json::Value;
use support::{Conn, PATIENCE, TestServer, status};

fn scripted() -> (TestServer, PersistScript) {
    let (persist, script) = ScriptedPersist::new(NoPersist::default());
    (TestServer::with(|builder| builder.persist("scripted", || Ok(persist))), script)
}

/// A connection whose client understands answers that come early.
fn connect(server: &TestServer) -> Conn {
    let mut conn = server.connect();
    let answer = conn.ask(r#"{"type":"Connect","values":"text","features":["ahead","reset"]}"#);
    assert!(answer.contains("\"ahead\""), "{answer}");
    conn
}

fn put(key: &str, value: &str, id: impl std::fmt::Display) -> String {
    format!(r#"{{"type":"Put","id":{id},"key":"{key}","value":"{value}"}}"#)
}

fn id(message: &Value) -> u64 {
    message.as_object().unwrap().values().next().unwrap()["id"].as_u64().unwrap_or_else(|| panic!("{message}"))
}

// A get waited for the sync of a put before it, which was another task's.
#[test]
fn reads_that_may_go_ahead_do_not_wait_for_storage_and_others_keep_their_place() {
    let (server, script) = scripted();
    let mut conn = connect(&server);
    conn.put("k", "old");
    script.block();
    conn.send(put("k", "new", 1));
    assert!(script.wait_until_blocked(PATIENCE));
    for (request, part) in [
        (r#"{"type":"Get","id":2,"ahead":true,"key":"k"}"#, r#""data":["old"]"#),
        (r#"{"type":"Get","id":2,"ahead":true,"key":"*"}"#, r#""data":["old"]"#),
        (r#"{"type":"List","id":2,"ahead":true,"key":"*"}"#, r#""keys":["k"]"#),
        (r#"{"type":"Exists","id":2,"ahead":true,"key":"other"}"#, "404"),
        (r#"{"type":"Trace","id":2,"ahead":true,"key":"k"}"#, "\"subscribers\":[]"),
        (r#"{"type":"Health","id":2,"ahead":true}"#, "200"),
        (r#"{"type":"Version","id":2,"ahead":true}"#, "\"protocol\":1"),
        (r#"{"type":"Stats","id":2,"ahead":true}"#, "\"keys\":1"),
        (r#"{"type":"Get","id":2,"ahead":true,"key":"a..b"}"#, "400"),
        (r#"{"type":"Subscribe","id":2,"ahead":true,"key":"k"}"#, "\"Hello\""),
    ] {
        let answer = conn.ask(request);
        assert!(answer.contains(part), "{request}: {answer}");
        // Also ahead of a write that waits for the one under way.
        conn.send(put("other", "x", 3));
    }
    // What does not ask for it waits, and whatever comes behind that.
    conn.send(r#"{"type":"Get","id":4,"key":"k"}"#).send(r#"{"type":"Get","id":5,"ahead":true,"key":"k"}"#);
    conn.send(r#"{"type":"Unsubscribe","id":6,"key":"k","ahead":true}"#).send(put("k", "newest", 7));
    script.release();
    let mut seen = Vec::new();
    while seen.last() != Some(&7) {
        let message = conn.json();
        match message.get("Update").or(message.get("Close")) {
            Some(_) => seen.push(0),
            None => {
                assert!(message["Get"]["data"].get(0).is_none_or(|value| value == "new"), "{message}");
                seen.push(id(&message));
            }
        }
    }
    let expected = [vec![0, 1], vec![3; 10], vec![4, 5, 0, 6, 7]].concat();
    assert_eq!(seen, expected);
}

#[test]
fn without_the_feature_nothing_goes_ahead() {
    let (server, script) = scripted();
    let mut conn = server.connect();
    script.block();
    conn.send(put("k", "new", 1)).send(r#"{"type":"Get","id":2,"ahead":true,"key":"k"}"#);
    assert!(script.wait_until_blocked(PATIENCE));
    script.release();
    let (first, second) = (conn.json(), conn.json());
    assert_eq!((id(&first), id(&second)), (1, 2));
    assert_eq!(second["Get"]["status"], 200, "{second}");
}

#[test]
fn more_writes_than_may_be_gathered_are_done_and_answered_in_order() {
    let (server, script) = scripted();
    let mut conn = connect(&server);
    script.block();
    conn.send(put("first", "x", 0));
    assert!(script.wait_until_blocked(PATIENCE));
    let batch: Vec<String> = (1..=5_000).map(|n| put(&format!("k.{}", n % 7), &n.to_string(), n)).collect();
    let (some, rest) = batch.split_at(500);
    conn.send(some.join("\n")).send(r#"{"type":"Health","id":9999,"ahead":true}"#);
    assert_eq!(id(&conn.json()), 9_999);
    conn.send(rest.join("\n")).send(r#"{"type":"Get","id":5001,"key":"k.2"}"#);
    script.release();
    let mut revision = 0;
    for n in 0..=5_000 {
        let answer = conn.json();
        let next = answer["Base"]["revision"].as_u64().unwrap();
        assert!(id(&answer) == n && next > revision, "{n}: {answer}");
        revision = next;
    }
    assert_eq!(conn.json()["Get"]["data"][0], "5000");
}

#[test]
fn what_was_sent_before_the_end_is_answered_although_writes_are_under_way() {
    for stops in [false, true] {
        let (server, script) = scripted();
        let mut conn = connect(&server);
        script.block();
        conn.send(put("k", "x", 1));
        assert!(script.wait_until_blocked(PATIENCE));
        conn.send(put("k", "y", 2)).send(r#"{"type":"Health","id":3,"ahead":true}"#);
        assert_eq!(id(&conn.json()), 3);
        let ending = if stops {
            Some(std::thread::spawn(move || server.shutdown()))
        } else {
            conn.finish();
            None
        };
        conn.stream().set_read_timeout(Some(std::time::Duration::from_millis(200))).unwrap();
        let early = conn.stream().peek(&mut [0]);
        assert!(early.is_err(), "it ended before its writes did: {early:?}");
        conn.stream().set_read_timeout(Some(PATIENCE)).unwrap();
        script.release();
        assert_eq!((status(&conn.line()), status(&conn.line()), conn.line().as_str()), (200, 200, "(closed)"));
        if let Some(ending) = ending {
            ending.join().unwrap().unwrap();
        }
    }
}

#[test]
fn a_large_snapshot_does_not_hold_up_an_answer_that_may_go_ahead() {
    const KEYS: usize = 20_000;
    let server = TestServer::start();
    let mut writer = connect(&server);
    let value = "v".repeat(1_000);
    for n in (0..KEYS).step_by(500) {
        let puts: Vec<_> = (n..n + 500).map(|n| put(&format!("s.{n:05}"), &value, n)).collect();
        writer.send(puts.join("\n"));
        (0..500).for_each(|_| assert_eq!(status(&writer.line()), 200));
    }
    // In front of the rest of the snapshot where it may, behind all of it where it may not.
    for (ahead, is_early) in [(true, true), (false, false)] {
        let mut conn = connect(&server);
        conn.send(r#"{"type":"Subscribe","id":1,"key":"s","snapshot":true}"#);
        assert_eq!(conn.line(), "\"Hello\"");
        conn.send(format!(r#"{{"type":"Get","id":2,"key":"s.19999","ahead":{ahead}}}"#));
        // The sockets do not take all of it, and the rest is not read before this is answered.
        std::thread::sleep(std::time::Duration::from_millis(300));
        let (mut updates, mut answered_at) = (0, None);
        let mut synced = false;
        while answered_at.is_none() || !synced {
            let message = conn.json();
            synced |= message.get("Synced").is_some();
            updates += usize::from(message.get("Update").is_some());
            if message.get("Get").is_some() {
                assert_eq!(message["Get"]["keys"][0], "s.19999", "{message:.200}");
                answered_at = Some((updates, synced));
            }
        }
        let (before, was_synced) = answered_at.unwrap();
        assert_eq!((updates, was_synced), (KEYS, !is_early));
        assert_eq!(before < KEYS, is_early, "answered after {before} of the snapshot");
    }
}
