//! Reads that go ahead of writes: which answers may come early, and what keeps its order all the same.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

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

// A program that ended a subscription had all its reads wait for its writes.
#[test]
fn the_end_of_a_subscription_does_not_wait_for_storage_either() {
    let (server, script) = scripted();
    let mut conn = connect(&server);
    assert_eq!(conn.ask(r#"{"type":"Subscribe","id":1,"key":"k"}"#), "\"Hello\"");
    script.block();
    conn.send(put("other", "new", 2));
    assert!(script.wait_until_blocked(PATIENCE));
    conn.send(r#"{"type":"Unsubscribe","id":3,"key":"k","ahead":true}"#);
    assert_eq!(conn.json()["Close"]["reason"], "unsubscribed");
    assert_eq!(id(&conn.json()), 3);
    assert!(conn.ask(r#"{"type":"Exists","id":4,"key":"k","ahead":true}"#).contains("404"));
    script.release();
    assert_eq!(id(&conn.json()), 2);
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
        conn.stream().set_read_timeout(Some(Duration::from_millis(200))).unwrap();
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
        std::thread::sleep(Duration::from_millis(300));
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

/// What a request that has no answer yet must be answered with.
enum Expected {
    Put {
        key: usize,
    },
    /// The revision of the value, where it is known: that of the last write before it, or one from these on.
    Get {
        key: usize,
        writes_before: usize,
        at_least: u64,
        ahead: bool,
    },
}

/// One connection does at random what it may, over storage that stands still now and then: each request has one answer, writes
/// and their answers keep their order, a read sees all writes before it, or may go ahead and sees no less than what was known
/// when it was sent, and a change is notified before its write is answered.
#[test]
fn whatever_goes_ahead_each_request_has_its_answer_and_what_is_ordered_stays_so() {
    const REQUESTS: u64 = 8_000;
    const KEYS: usize = 8;
    for threads in [1, 3] {
        let (persist, script) = ScriptedPersist::new(NoPersist::default());
        let server = TestServer::on(threads, |builder| builder.persist("scripted", || Ok(persist)));
        let mut conn = connect(&server);
        assert_eq!(conn.ask(r#"{"type":"Subscribe","key":"k"}"#), "\"Hello\"");
        let is_over = Arc::new(AtomicBool::new(false));
        let stalls = std::thread::spawn({
            let is_over = Arc::clone(&is_over);
            move || {
                while !is_over.load(Relaxed) {
                    script.block();
                    _ = script.wait_until_blocked(Duration::from_millis(20));
                    std::thread::sleep(Duration::from_millis(2));
                    script.release();
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        });
        let mut random = Random(threads as u64);
        let mut open: HashMap<u64, Expected> = HashMap::new();
        let mut unanswered_puts = VecDeque::new();
        // Of each key: how many writes were sent, the revisions of those that were answered, and what was seen or notified.
        let (mut sent, mut revisions) = ([0; KEYS], vec![vec![0]; KEYS]);
        let (mut known, mut seen_ahead, mut notified) = ([0; KEYS], [0; KEYS], [0; KEYS]);
        let (mut early, mut next) = (0, 1);
        while next <= REQUESTS || !open.is_empty() {
            let mut batch = Vec::new();
            while next <= REQUESTS && open.len() < 300 && random.below(8) > 0 {
                let key = random.below(KEYS as u64) as usize;
                if random.below(2) == 0 {
                    batch.push(put(&format!("k.{key}"), &next.to_string(), next));
                    sent[key] += 1;
                    unanswered_puts.push_back(next);
                    open.insert(next, Expected::Put { key });
                } else {
                    let ahead = random.below(4) > 0;
                    batch.push(format!(r#"{{"type":"Get","id":{next},"key":"k.{key}","ahead":{ahead}}}"#));
                    let (writes_before, at_least) = (sent[key], known[key]);
                    open.insert(next, Expected::Get { key, writes_before, at_least, ahead });
                }
                next += 1;
            }
            if !batch.is_empty() {
                conn.send(batch.join("\n"));
            }
            for _ in 0..random.below(12) {
                if open.is_empty() {
                    break;
                }
                let message = conn.json();
                if let Some(update) = message.get("Update") {
                    let key: usize = update["key"].as_str().unwrap()[2..].parse().unwrap();
                    notified[key] = update["revision"].as_u64().unwrap();
                    continue;
                }
                let id = id(&message);
                match open.remove(&id).unwrap_or_else(|| panic!("answered twice: {message}")) {
                    Expected::Put { key } => {
                        assert_eq!(unanswered_puts.pop_front(), Some(id), "{message}");
                        let revision = message["Base"]["revision"].as_u64().unwrap();
                        assert!(notified[key] >= revision, "answered before it was notified: {message}");
                        assert!(revision > *revisions[key].last().unwrap());
                        revisions[key].push(revision);
                        known[key] = known[key].max(revision);
                    }
                    Expected::Get { key, writes_before, at_least, ahead } => {
                        let revision =
                            message["Get"]["revisions"].get(0).map_or(0, |revision| revision.as_u64().unwrap());
                        assert!(revision >= at_least, "older than what was known: {message}");
                        if ahead {
                            early += usize::from(unanswered_puts.front().is_some_and(|first| *first < id));
                            assert!(revision >= seen_ahead[key], "it goes back: {message}");
                            seen_ahead[key] = revision;
                            if let Some(limit) = revisions[key].get(writes_before) {
                                assert!(revision <= *limit, "of a later write: {message}");
                            }
                        } else {
                            assert_eq!(Some(&revision), revisions[key].get(writes_before), "{message}");
                        }
                        known[key] = known[key].max(revision);
                    }
                }
            }
        }
        is_over.store(true, Relaxed);
        stalls.join().unwrap();
        assert!(early > 100, "only {early} reads went ahead");
    }
}

/// Numbers that are as random as these tests need (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        (mixed ^ (mixed >> 27)) % limit
    }
}
