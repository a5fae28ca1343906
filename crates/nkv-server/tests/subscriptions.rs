//! Subscriptions over sockets: nothing lost, nothing old, no client held up.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use nkv_core::NoPersist;
use nkv_server::Options;
use nkv_testkit::script::ScriptedPersist;
use support::{Conn, PATIENCE, TestServer, eventually, status};

/// Reads notifications until `revision` was received; what is known then, and the revisions in the order received.
fn follow(conn: &mut Conn, revision: u64) -> (BTreeMap<String, String>, Vec<u64>) {
    let (mut known, mut revisions) = (BTreeMap::new(), Vec::new());
    while revisions.last().is_none_or(|last| *last < revision) {
        let message = conn.json();
        let (kind, fields) = message.as_object().unwrap().iter().next().unwrap();
        let key = fields["key"].as_str().unwrap().to_owned();
        match kind.as_str() {
            "Update" => known.insert(key, fields["value"].as_str().unwrap().to_owned()),
            "Close" => known.remove(&key),
            other => panic!("{other}: {fields}"),
        };
        revisions.push(fields["revision"].as_u64().unwrap());
    }
    (known, revisions)
}

#[test]
fn nothing_is_notified_or_shown_or_answered_before_it_is_stored() {
    let (persist, script) = ScriptedPersist::new(NoPersist::default());
    let server = TestServer::with(|builder| builder.persist("scripted", || Ok(persist)));
    let (mut watcher, mut reader, mut writer) = (server.connect(), server.connect(), server.connect());
    assert_eq!(watcher.ask(r#"{"type":"Subscribe","key":"a"}"#), "\"Hello\"");
    script.block();
    writer.send(r#"{"type":"Put","key":"a","value":"new"}"#);
    assert!(script.wait_until_blocked(PATIENCE));
    // Reads go on while storage works, and see what is stored.
    assert_eq!(status(&reader.ask(r#"{"type":"Get","key":"a"}"#)), 404);
    for conn in [&watcher, &writer] {
        conn.stream().set_nonblocking(true).unwrap();
        let peeked = conn.stream().peek(&mut [0]);
        assert_eq!(peeked.unwrap_err().kind(), std::io::ErrorKind::WouldBlock, "something came too early");
        conn.stream().set_nonblocking(false).unwrap();
    }
    script.release();
    assert_eq!(status(&writer.line()), 200);
    assert!(watcher.line().starts_with(r#"{"Update":{"key":"a""#));
    assert_eq!(status(&reader.ask(r#"{"type":"Get","key":"a"}"#)), 200);
}

#[test]
fn snapshot_and_changes_meet_without_gap_or_repetition() {
    let server = TestServer::start();
    let newest = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let writer = thread::spawn({
        let (newest, stop, mut conn) = (Arc::clone(&newest), Arc::clone(&stop), server.connect());
        move || {
            while !stop.load(Ordering::Relaxed) {
                newest.store(conn.put("race.key", "x"), Ordering::SeqCst);
            }
        }
    });
    eventually("a first put", || newest.load(Ordering::SeqCst) > 0);
    let mut conn = server.connect();
    conn.hello("racer", "text");
    let mut last = 0;
    for _ in 0..300 {
        let before = newest.load(Ordering::SeqCst);
        conn.send(r#"{"type":"Subscribe","key":"race","snapshot":true}"#);
        // Left over from the subscription before: still in order.
        let mut line = conn.line();
        while line != "\"Hello\"" {
            line = conn.line();
        }
        let update = conn.json();
        let snapshot = update["Update"]["revision"].as_u64().unwrap();
        assert!(snapshot >= before && snapshot >= last, "went back from {before} or {last} to {snapshot}");
        let synced = conn.json();
        assert_eq!(synced["Synced"]["revision"], snapshot);
        let change = conn.json();
        let next = change["Update"]["revision"].as_u64().unwrap();
        assert_eq!(next, snapshot + 1 + change["Update"]["skipped"].as_u64().unwrap(), "a gap or a repetition");
        conn.send(r#"{"type":"Unsubscribe","id":"u","key":"race"}"#);
        let mut line = conn.line();
        while !line.contains("\"id\":\"u\"") {
            line = conn.line();
        }
        last = next;
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
}

#[test]
fn a_subscriber_that_stands_still_delays_no_other_and_has_the_latest_when_it_reads_on() {
    let server = TestServer::start();
    let mut stalled = server.connect();
    stalled.hello("stalled", "text");
    assert_eq!(stalled.ask(r#"{"type":"Subscribe","key":"big"}"#), "\"Hello\"");
    let mut healthy = server.connect();
    healthy.hello("healthy", "text");
    assert_eq!(healthy.ask(r#"{"type":"Subscribe","key":"big"}"#), "\"Hello\"");
    let mut writer = server.connect();
    let filler = "x".repeat(20_000);
    let mut last = 0;
    for n in 0..2_000 {
        last = writer.put(&format!("big.{}", n % 10), &format!("{n} {filler}"));
    }
    let expected: BTreeMap<_, _> =
        (1_990..2_000).map(|n| (format!("big.{}", n % 10), format!("{n} {filler}"))).collect();
    for conn in [&mut healthy, &mut stalled] {
        let (known, revisions) = follow(conn, last);
        assert_eq!(known, expected);
        assert!(revisions.is_sorted_by(|a, b| a < b), "revisions went back");
    }
    // The stalled one received what fits its buffers, and of the last state of each key.
    let stats = writer.ask(r#"{"type":"Stats"}"#);
    let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
    assert!(stats["Stats"]["conflated"].as_u64().unwrap() > 500, "{stats}");
}

#[test]
fn writers_on_many_keys_and_subscribers_agree_in_the_end() {
    let server = TestServer::start();
    let patterns = ["*", "w", "w.*", "w.3", "w.3.x"];
    let mut subscribers: Vec<Conn> = patterns
        .iter()
        .map(|pattern| {
            let mut conn = server.connect();
            conn.hello(pattern, "text");
            assert_eq!(conn.ask(&format!(r#"{{"type":"Subscribe","key":"{pattern}"}}"#)), "\"Hello\"");
            conn
        })
        .collect();
    let writers: Vec<_> = (0..8)
        .map(|writer| {
            let mut conn = server.connect();
            thread::spawn(move || {
                for n in 0..200 {
                    conn.put(&format!("w.{writer}"), &n.to_string());
                    conn.put(&format!("w.{writer}.x"), &n.to_string());
                    if n % 7 == 0 {
                        conn.ask(&format!(r#"{{"type":"Delete","key":"w.{writer}.x"}}"#));
                    }
                }
            })
        })
        .collect();
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    // A last change that every pattern covers.
    let last = server.connect().put("w.3.x", "end");
    for (pattern, conn) in patterns.iter().zip(&mut subscribers) {
        let (known, revisions) = follow(conn, last);
        assert!(revisions.is_sorted_by(|a, b| a < b), "{pattern}: revisions went back");
        let covered = nkv_core::Pattern::new(pattern).unwrap();
        let mut expected = BTreeMap::new();
        for writer in 0..8 {
            expected.insert(format!("w.{writer}"), "199".to_owned());
            expected.insert(format!("w.{writer}.x"), if writer == 3 { "end".into() } else { "199".to_owned() });
        }
        expected.retain(|key, _| covered.covers(&nkv_core::Key::new(key).unwrap()));
        assert_eq!(known, expected, "{pattern}");
    }
}

#[test]
fn a_client_that_comes_back_takes_its_subscription_over() {
    let server = TestServer::start();
    let mut first = server.connect();
    first.hello("same", "text");
    first.ask(r#"{"type":"Subscribe","key":"a"}"#);
    let mut second = server.connect();
    second.hello("same", "text");
    second.ask(r#"{"type":"Subscribe","key":"a"}"#);
    assert_eq!(first.line(), r#"{"Close":{"key":"a","reason":"replaced"}}"#);
    drop(first);
    // The end of the first connection must not take the second's subscription along.
    let mut other = server.connect();
    eventually("the first connection is gone", || {
        let stats: serde_json::Value = serde_json::from_str(&other.ask(r#"{"type":"Stats"}"#)).unwrap();
        stats["Stats"]["connections"] == 2
    });
    other.put("a", "received");
    assert!(second.line().contains("received"));
}

#[test]
fn two_that_take_each_others_place_are_each_answered_on_many_threads() {
    const ROUNDS: usize = 2_000;
    let server = TestServer::on(4, |builder| builder);
    let conns: Vec<_> = (0..2)
        .map(|_| {
            let mut conn = server.connect();
            thread::spawn(move || {
                let mut closes = 0;
                for round in 0..ROUNDS {
                    conn.send(r#"{"type":"Subscribe","client_uuid":"me","key":"a"}"#);
                    loop {
                        match conn.line() {
                            line if line == "\"Hello\"" => break,
                            line => assert_eq!(line, REPLACED, "in round {round}"),
                        }
                        closes += 1;
                    }
                }
                (conn, closes)
            })
        })
        .collect();
    let conns: Vec<_> = conns.into_iter().map(|conn| conn.join().unwrap()).collect();
    let mut all_closes = 0;
    for (mut conn, closes) in conns {
        conn.send(r#"{"type":"Health"}"#);
        let late = std::iter::from_fn(|| Some(conn.line()).filter(|line| line == REPLACED)).count();
        all_closes += closes + late;
    }
    assert_eq!(all_closes, 2 * ROUNDS - 1, "all but the last were replaced, and notified of it");
}

const REPLACED: &str = r#"{"Close":{"key":"a","reason":"replaced"}}"#;

#[test]
fn subscriptions_end_with_their_connection() {
    let server = TestServer::start();
    let mut watcher = server.connect();
    for n in 0..100 {
        let mut conn = server.connect();
        assert_eq!(conn.ask(&format!(r#"{{"type":"Subscribe","key":"k{n}"}}"#)), "\"Hello\"");
    }
    eventually("no subscription is left", || {
        watcher.ask(r#"{"type":"Stats"}"#).contains("\"subscriptions\":0,\"connections\":1,")
    });
}

#[test]
fn limits_of_connections_and_subscriptions_are_reported() {
    let mut options = Options::default();
    options.connections_max = 3;
    options.subscriptions_max = 2;
    let server = TestServer::with(|builder| builder.options(options));
    let mut kept: Vec<Conn> = (0..3).map(|_| server.connect()).collect();
    kept.iter_mut().for_each(|conn| assert_eq!(status(&conn.ask(r#"{"type":"Health"}"#)), 200));
    let mut refused = server.connect();
    assert_eq!(status(&refused.line()), 503);
    assert_eq!(refused.line(), "(closed)");
    drop(kept.pop());
    eventually("a place is free again", || {
        let mut conn = server.connect();
        // A refused connection may be reset while we write.
        drop(std::io::Write::write_all(&mut conn.stream(), b"{\"type\":\"Health\"}\n"));
        conn.line().contains("200")
    });
    let conn = &mut kept[0];
    assert_eq!(conn.ask(r#"{"type":"Subscribe","key":"a"}"#), "\"Hello\"");
    assert_eq!(conn.ask(r#"{"type":"Subscribe","key":"b"}"#), "\"Hello\"");
    assert_eq!(status(&conn.ask(r#"{"type":"Subscribe","key":"c"}"#)), 429);
    assert_eq!(conn.ask(r#"{"type":"Unsubscribe","key":"a"}"#), r#"{"Close":{"key":"a","reason":"unsubscribed"}}"#);
    assert_eq!(status(&conn.line()), 200);
    assert_eq!(conn.ask(r#"{"type":"Subscribe","key":"c"}"#), "\"Hello\"");
}

#[test]
fn the_largest_holder_of_incomplete_messages_is_closed_when_all_hold_too_much() {
    let mut options = Options::default();
    options.queued_max = 220 << 10;
    let server = TestServer::with(|builder| builder.options(options));
    let part =
        |whole: usize, len: usize| format!("{{\"type\":\"Put\",\"key\":\"a\",\"len\":{whole}}}\n{}", "x".repeat(len));
    // Buffers count as they are: 60 kB for each of these two, at least 192 KiB for the third.
    let mut small = [server.connect(), server.connect()];
    for conn in &small {
        std::io::Write::write_all(&mut conn.stream(), part(70_000, 60_000).as_bytes()).unwrap();
    }
    let mut large = server.connect();
    std::io::Write::write_all(&mut large.stream(), part(1_000_000, 140_000).as_bytes()).unwrap();
    assert_eq!(status(&large.line()), 503);
    assert_eq!(large.line(), "(closed)");
    for conn in &mut small {
        std::io::Write::write_all(&mut conn.stream(), "x".repeat(10_000).as_bytes()).unwrap();
        assert_eq!(status(&conn.send("").line()), 200);
    }
}

#[test]
fn a_subscription_that_is_made_again_is_answered_before_it_is_notified_of_anything() {
    let server = TestServer::start();
    let mut conn = server.connect();
    conn.hello("c", "text");
    let subscribe = r#"{"type":"Subscribe","key":"a"}"#;
    conn.send([subscribe, subscribe, r#"{"type":"Put","key":"a","value":"x"}"#].join("\n"));
    let ended = r#"{"Close":{"key":"a","reason":"replaced"}}"#;
    assert_eq!([conn.line(), conn.line(), conn.line()], ["\"Hello\"", ended, "\"Hello\""]);
    let mut rest = [conn.line(), conn.line()];
    rest.sort();
    assert!(rest[0].starts_with("{\"Base\"") && rest[1].starts_with("{\"Update\""), "{rest:?}");

    // One that another client has ended meanwhile is made anew.
    let mut other = server.connect();
    assert_eq!(status(&other.ask(r#"{"type":"Unsubscribe","key":"a","client_uuid":"c"}"#)), 200);
    assert!(conn.line().contains("unsubscribed"));
    conn.send([subscribe, r#"{"type":"Put","key":"a","value":"y"}"#].join("\n"));
    assert_eq!(conn.line(), "\"Hello\"");
}

#[test]
fn subscriptions_that_others_have_ended_do_not_count() {
    let mut options = Options::default();
    options.subscriptions_max = 3;
    let server = TestServer::with(|builder| builder.options(options));
    let (mut conn, mut other) = (server.connect(), server.connect());
    conn.hello("c", "text");
    for n in 0..10 {
        assert_eq!(conn.ask(&format!(r#"{{"type":"Subscribe","key":"k{n}"}}"#)), "\"Hello\"");
        let unsubscribe = format!(r#"{{"type":"Unsubscribe","key":"k{n}","client_uuid":"c"}}"#);
        assert_eq!(status(&other.ask(&unsubscribe)), 200);
        assert!(conn.line().contains("unsubscribed"));
    }
}

/// A flow died silently, and the client that came back was refused because of its own dead subscription.
#[test]
fn a_subscription_that_is_about_to_be_replaced_counts_against_no_limit() {
    let mut options = Options::default();
    (options.subscriptions_total_max, options.subscriptions_max) = (3, 2);
    let server = TestServer::with(|builder| builder.options(options));
    let named = |name: &str| {
        let mut conn = server.connect();
        conn.hello(name, "text");
        conn
    };
    let subscribe = |conn: &mut Conn, key: &str| conn.ask(&format!(r#"{{"type":"Subscribe","key":"{key}"}}"#));
    let (mut dead, mut back, mut other) = (named("same"), named("same"), named("other"));
    assert_eq!(subscribe(&mut dead, "a"), "\"Hello\"");
    assert_eq!(subscribe(&mut dead, "b"), "\"Hello\"");
    assert_eq!(subscribe(&mut other, "a"), "\"Hello\"");
    assert_eq!(status(&subscribe(&mut other, "b")), 429, "it would replace nothing: the name is another");
    assert_eq!(subscribe(&mut back, "b"), "\"Hello\"");
    assert_eq!(dead.line(), r#"{"Close":{"key":"b","reason":"replaced"}}"#);
    assert_eq!(status(&subscribe(&mut back, "c")), 429, "the new one counts");
    assert_eq!(subscribe(&mut back, "a"), "\"Hello\"");
    assert_eq!(status(&subscribe(&mut other, "b")), 429);
    // One of a connection's own that is replaced there does not count either; one of another's does as far as its own go.
    assert_eq!(subscribe(&mut back, "a"), r#"{"Close":{"key":"a","reason":"replaced"}}"#);
    assert_eq!(back.line(), "\"Hello\"");
    let mut full = named("other");
    assert_eq!(subscribe(&mut full, "a"), "\"Hello\"");
    back.send(r#"{"type":"Unsubscribe","key":"a"}"#);
    assert!(back.line().contains("unsubscribed") && status(&back.line()) == 200);
    assert_eq!(subscribe(&mut full, "b"), "\"Hello\"");
    full.send(r#"{"type":"Subscribe","key":"b","client_uuid":"same"}"#);
    assert_eq!(status(&full.line()), 429, "a third on this connection");
}

#[test]
fn a_deep_subscription_that_is_replaced_counts_no_more() {
    let mut options = Options::default();
    // A quarter of it is for deep subscriptions: one of sixty segments beyond the free ones takes 30 KiB.
    options.queued_max = 220 << 10;
    let server = TestServer::with(|builder| builder.options(options));
    let subscribe = |conn: &mut Conn, segments: usize| {
        let key = vec!["s"; segments].join(".");
        conn.ask(&format!(r#"{{"type":"Subscribe","key":"{key}"}}"#))
    };
    let mut conns = Vec::new();
    for n in 0..5 {
        let mut conn = server.connect();
        conn.hello("same", "text");
        assert_eq!(subscribe(&mut conn, 68), "\"Hello\"", "the connection {n}");
        conns.push(conn);
    }
    let mut other = server.connect();
    other.hello("other", "text");
    assert_eq!(subscribe(&mut other, 48), "\"Hello\"", "those that were replaced count no more");
    assert_eq!(status(&subscribe(&mut other, 47)), 429, "those that live do");
    // One that another connection ends counts no more either.
    let unsubscribe = format!(r#"{{"type":"Unsubscribe","key":"{}"}}"#, vec!["s"; 68].join("."));
    let mut ends = server.connect();
    ends.hello("same", "text");
    assert_eq!(status(&ends.ask(&unsubscribe)), 200);
    assert_eq!(subscribe(&mut other, 47), "\"Hello\"");
}

#[test]
fn a_client_that_asks_without_reading_is_read_no_further() {
    let server = TestServer::start();
    let conn = server.connect();
    conn.stream().set_write_timeout(Some(std::time::Duration::from_secs(1))).unwrap();
    // Answers to these are short, and what they start is not conflated.
    let requests = "{\"type\":\"Subscribe\",\"key\":\"z\",\"snapshot\":true}\n".repeat(1_000);
    let mut written = 0;
    while written < 60 << 20 && std::io::Write::write_all(&mut conn.stream(), requests.as_bytes()).is_ok() {
        written += requests.len();
    }
    assert!(written < 60 << 20, "all of it was taken");
    assert!(server.connect().put("alive", "yes") > 0);
}
