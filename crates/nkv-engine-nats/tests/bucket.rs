//! What a bucket holds, and what nkv makes of it: other programs, keys, limits, settings, markers, TTL.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use async_trait::async_trait;
use nkv_core::Epoch;
use nkv_engine_nats::{NatsEngine, Options};
use nkv_node::{
    Abilities, Decided, Engine, EngineError, ErrorKind, Event, Feed, GoneReason, Handle, Key, Node, Op, Outcome,
    PutOptions, Result, Revision, Seen, Subscription,
};
use serde_json::json;
use support::{PATIENCE, Server, event, node, until, value};
use tokio::sync::mpsc;
use tokio::time::timeout;

fn status<T: std::fmt::Debug>(result: Result<T>) -> u16 {
    match result.unwrap_err().kind() {
        ErrorKind::Refused { status } => *status,
        other => panic!("{other:?}"),
    }
}

fn if_revision(revision: Revision) -> PutOptions {
    PutOptions::default().with_if_revision(revision)
}

async fn synced(nkv: &Handle) -> Subscription {
    let mut events = nkv.subscribe("*").await.unwrap();
    while !matches!(timeout(PATIENCE, events.next()).await.unwrap(), Some(Event::Synced { .. })) {}
    events
}

fn shown(event: &Event) -> String {
    match event {
        Event::Update { entry, .. } => format!("{}={}", entry.key, String::from_utf8_lossy(&entry.value)),
        Event::Gone { key, reason, .. } => format!("{key} {reason:?}"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn writes_of_other_programs_are_seen_and_the_other_way_round() {
    for server in [Server::start().await, Server::start_old().await] {
        let Some(server) = server else { continue };
        let other = server.other().await;
        other.create(json!({})).await;
        other.put("lamp.hall", "on").await;
        let (_node, nkv) = server.node().await;
        assert_eq!(value(&nkv, "lamp.hall").await.as_deref(), Some("on"));
        let mut events = synced(&nkv).await;
        let revision = other.put("lamp.attic", "off").await;
        assert_eq!(shown(&event(&mut events).await), "lamp.attic=off");
        assert_eq!(nkv.get("lamp.attic").await.unwrap().unwrap().revision.get(), revision);
        other.delete("lamp.hall").await;
        assert_eq!(shown(&event(&mut events).await), "lamp.hall Deleted");
        // As `nats kv purge` does.
        other.publish("lamp.attic", &[("KV-Operation", "PURGE"), ("Nats-Rollup", "sub")], "").await;
        assert_eq!(shown(&event(&mut events).await), "lamp.attic Deleted");
        nkv.put("lamp.cellar", "on").await.unwrap();
        assert_eq!(other.get("lamp.cellar").await.as_deref(), Some("on"));
        nkv.delete("lamp.cellar").await.unwrap();
        assert_eq!(other.get("lamp.cellar").await, None);
    }
}

#[tokio::test]
async fn only_the_one_spelling_of_an_escaped_key_is_the_key() {
    let Some(server) = Server::start().await else { return };
    let (_node, nkv) = server.node().await;
    let other = server.other().await;
    nkv.put("lämpchen.a=b", "nkv").await.unwrap();
    assert_eq!(other.get("l=C3=A4mpchen.a=b").await.as_deref(), Some("nkv"));
    // Another spelling of it, and what is no key at all.
    other.put("l=C3=A4mpchen.a=3Db", "second").await;
    other.put("=00", "none").await;
    other.put("lamp", "plain").await;
    until("the other's value", async || value(&nkv, "lamp").await.is_some()).await;
    assert_eq!(value(&nkv, "lämpchen.a=b").await.as_deref(), Some("nkv"));
    assert_eq!(nkv.list("*").await.unwrap().len(), 2);
    assert_eq!(nkv.delete("*").await.unwrap().count, 2);
    // Neither then nor for a node that comes later it is the key; and nothing was deleted that nkv does not show.
    let (_later, later) = server.node().await;
    assert_eq!(later.list("*").await.unwrap().len(), 0);
    assert_eq!(other.get("l=C3=A4mpchen.a=3Db").await.as_deref(), Some("second"));
    assert_eq!(other.get("=00").await.as_deref(), Some("none"));
}

#[tokio::test]
async fn what_nkv_cannot_hold_is_absent_and_takes_the_older_value_with_it() {
    let Some(server) = Server::start().await else { return };
    let engine = NatsEngine::new(server.options().with_value_len_max(100));
    let (_node, nkv) = node(engine).await;
    let other = server.other().await;
    let mut events = synced(&nkv).await;
    other.put("a", "short").await;
    assert_eq!(shown(&event(&mut events).await), "a=short");
    let long = "x".repeat(101);
    other.put("a", &long).await;
    assert_eq!(shown(&event(&mut events).await), "a Deleted");
    other.put("b", &long).await;
    let last = other.put("=00", "no key").await;
    // The node's revision comes that far, so that one who knows it is not kept waiting.
    until("the node is as far as the bucket", async || nkv.revision().get() == last).await;
    assert_eq!(nkv.list("*").await.unwrap().len(), 0);
    // It is absent for conditions too, and not deleted by a wildcard.
    assert_eq!(nkv.delete("*").await.unwrap().count, 0);
    assert_eq!(other.get("b").await.as_deref(), Some(long.as_str()));
    nkv.put_with("b", "now", if_revision(Revision::ZERO)).await.unwrap();
    assert_eq!(value(&nkv, "b").await.as_deref(), Some("now"));
    // Also for a node that comes later.
    other.put("c", &long).await;
    let later = NatsEngine::new(server.options().with_value_len_max(100));
    let (_later, later) = node(later).await;
    assert_eq!(later.list("*").await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_foreign_value_of_six_megabytes_stops_nothing() {
    let Some(server) = Server::start_with(false, "max_payload: 8000000").await else { return };
    let (_node, nkv) = server.node().await;
    let other = server.other().await;
    nkv.put("a", "1").await.unwrap();
    other.put("a", &"x".repeat(6_000_000)).await;
    other.put("b", "1").await;
    until("what comes behind it", async || nkv.exists("b").await.unwrap()).await;
    let (_later, later) = server.node().await;
    for nkv in [&nkv, &later] {
        assert_eq!((nkv.list("*").await.unwrap().len(), nkv.exists("a").await.unwrap()), (1, false));
        assert!(nkv.health().await.is_ok());
    }
}

#[tokio::test]
async fn what_comes_from_another_bucket_by_sources_is_no_key() {
    let Some(server) = Server::start().await else { return };
    let other = server.other().await;
    let source = json!({
        "name": "SOURCE", "subjects": ["source.>"], "retention": "limits", "discard": "old", "storage": "file",
        "num_replicas": 1, "max_msgs": -1, "max_bytes": -1, "max_consumers": -1, "max_age": 0,
    });
    assert!(other.api("STREAM.CREATE.SOURCE", source).await.get("error").is_none());
    other.create(json!({ "sources": [{ "name": "SOURCE" }] })).await;
    for number in 0..3 {
        other.client.publish(format!("source.{number}"), "1".into()).await.unwrap();
    }
    other.put("a", "1").await;
    until("all of it is there", async || other.state().await["num_subjects"] == 4).await;
    let (_node, nkv) = server.node().await;
    assert_eq!(nkv.list("*").await.unwrap().len(), 1);
    nkv.put("b", "1").await.unwrap();
}

#[tokio::test]
async fn conditions_see_through_markers() {
    for server in [Server::start().await, Server::start_old().await] {
        let Some(server) = server else { continue };
        let (_node, nkv) = server.node().await;
        let first = nkv.put_with("a", "1", if_revision(Revision::ZERO)).await.unwrap();
        let conflict = nkv.put_with("a", "2", if_revision(Revision::ZERO)).await.unwrap_err();
        assert_eq!(*conflict.kind(), ErrorKind::Conflict { revision: first });
        let second = nkv.put_with("a", "2", if_revision(first)).await.unwrap();
        assert!(nkv.put_with("a", "3", if_revision(first)).await.is_err());
        assert!(nkv.delete_if("a", first).await.is_err());
        let deleted = nkv.delete_if("a", second).await.unwrap();
        // Once the marker is known, no look at the server is taken.
        tokio::time::sleep(Duration::from_millis(100)).await;
        // A marker is no value: neither is the key at its revision, nor is there anything to delete.
        let conflict = nkv.put_with("a", "3", if_revision(deleted.revision.unwrap())).await.unwrap_err();
        assert!(matches!(conflict.kind(), ErrorKind::Conflict { revision } if revision.get() == 0), "{conflict}");
        assert_eq!(nkv.delete("a").await.unwrap().count, 0);
        nkv.put_with("a", "4", if_revision(Revision::ZERO)).await.unwrap();
        assert_eq!(value(&nkv, "a").await.as_deref(), Some("4"));
        // Nor for a node that has not seen the marker come.
        nkv.delete("a").await.unwrap();
        let (_later, later) = server.node().await;
        later.put_with("a", "5", if_revision(Revision::ZERO)).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn puts_of_one_call_take_effect_in_their_order() {
    let Some(server) = Server::start().await else { return };
    let (_node, nkv) = server.node().await;
    let other = server.other().await;
    for round in 0..20 {
        let put = |number: u32| Op::Put {
            key: Key::new("a").unwrap(),
            value: format!("{round}.{number}").into(),
            options: nkv_core::PutOptions::default(),
        };
        let engine = &nkv;
        let ops: Vec<_> = (0..1_000).map(|number| engine.admit(put(number)).unwrap()).collect();
        let room = engine.room(100_000).await.unwrap();
        let results = engine.submit(ops, room).await.unwrap();
        let revisions: Vec<u64> = results
            .into_iter()
            .map(|result| match result.unwrap() {
                Outcome::Put { revision } => revision.get(),
                outcome => panic!("{outcome:?}"),
            })
            .collect();
        assert!(revisions.is_sorted(), "{revisions:?}");
        assert_eq!(other.get("a").await, Some(format!("{round}.999")));
    }
}

#[tokio::test]
async fn a_batch_is_whole_or_not_at_all_and_what_it_cannot_do_is_refused() {
    let Some(server) = Server::start().await else { return };
    let (_node, nkv) = server.node().await;
    let put = |key: &str, expected: Option<u64>| Op::Put {
        key: Key::new(key).unwrap(),
        value: "1".into(),
        options: nkv_core::PutOptions { if_revision: expected.map(nkv_core::Revision::new), expiry: None },
    };
    let delete = |pattern: &str| Op::Delete { pattern: nkv_core::Pattern::new(pattern).unwrap(), if_revision: None };
    let first = nkv.put("a", "0").await.unwrap().get();
    nkv.put("old.a", "0").await.unwrap();
    let last = nkv.put("old.b", "0").await.unwrap().get();
    let ops = vec![put("a", Some(first)), put("b", Some(7)), delete("old.*"), put("c", None), delete("none")];
    let outcomes = nkv.write(ops).await.unwrap();
    let at = |number| nkv_core::Revision::new(last + number);
    let expected = [
        Outcome::Put { revision: at(1) },
        Outcome::Conflict { revision: nkv_core::Revision::ZERO },
        Outcome::Deleted { count: 2, revision: at(3) },
        Outcome::Put { revision: at(4) },
        Outcome::NotFound,
    ];
    assert_eq!(outcomes, expected);
    assert_eq!((nkv.exists("b").await.unwrap(), nkv.exists("old.*").await.unwrap()), (false, false));
    assert_eq!(nkv.get("c").await.unwrap().unwrap().revision.get(), last + 4);
    assert_eq!(status(nkv.write(vec![put("x", None), put("x", None)]).await), 413);
    let many = (0..1_001).map(|number| put(&format!("many.{number}"), None)).collect();
    assert_eq!(status(nkv.write(many).await), 413);
    let most = (0..1_000).map(|number| put(&format!("most.{number}"), None)).collect();
    nkv.write(most).await.unwrap();
    assert_eq!(status(nkv.write(vec![put("x", None), delete("*")]).await), 413, "it would delete 1,002 keys");
    assert_eq!(nkv.list("*").await.unwrap().len(), 1_002);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_given_in_one_however_large_it_is() {
    let Some(server) = Server::start().await else { return };
    let (_node, nkv) = server.node().await;
    let (_other, other) = server.node().await;
    let mut changes = other.changes(None).unwrap();
    let put = |number: u32| Op::Put {
        key: Key::new(&format!("batch.{number}")).unwrap(),
        value: vec![7; 60_000].into(),
        options: nkv_core::PutOptions::default(),
    };
    nkv.write((0..100).map(put).collect()).await.unwrap();
    let group = timeout(PATIENCE, changes.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(group.changes.len(), 100, "a batch came in parts");
}

/// A bucket without batches takes their headers and ignores them.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_is_none_does_not_stall_the_feed() {
    let Some(server) = Server::start_old().await else { return };
    let (_node, nkv) = server.node().await;
    let other = server.other().await;
    let publishing = tokio::spawn(async move {
        for number in 1_u64.. {
            let sequence = number.to_string();
            other.publish("a", &[("Nats-Batch-Id", "x"), ("Nats-Batch-Sequence", &sequence)], "1").await;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    until("what comes is seen while more comes", async || nkv.exists("a").await.unwrap()).await;
    publishing.abort();
    assert!(nkv.health().await.is_ok());
}

#[tokio::test]
async fn the_longest_value_fits_with_all_headers_and_a_longer_one_is_refused() {
    for settings in [json!({}), json!({ "max_msg_size": 5_000 })] {
        let Some(server) = Server::start_with(false, "max_payload: 20000").await else { return };
        let mut settings = settings;
        settings["allow_msg_ttl"] = json!(true);
        settings["subject_delete_marker_ttl"] = json!(1_000_000_000_u64);
        server.other().await.create(settings.clone()).await;
        let engine = server.engine();
        engine.check().await.unwrap();
        let len = engine.value_len_max();
        let bound = settings.get("max_msg_size").map_or(20_000, |_| 5_000);
        assert!(len < bound && len > bound - 1_000, "{len}");
        let (_node, nkv) = node(engine).await;
        let options = if_revision(Revision::ZERO).with_ttl(Duration::from_secs(1_000_000));
        nkv.put_with("a", vec![7; len], options).await.unwrap();
        assert_eq!(nkv.get("a").await.unwrap().unwrap().value.len(), len);
        assert_eq!(status(nkv.put("a", vec![7; len + 1]).await), 413);
        nkv.put("a", "still connected").await.unwrap();
    }
}

#[tokio::test]
async fn a_full_bucket_is_507_and_loses_nothing() {
    for server in [Server::start().await, Server::start_old().await] {
        let Some(server) = server else { continue };
        server.other().await.create(json!({ "max_bytes": 10_000 })).await;
        let (_node, nkv) = server.node().await;
        let mut stored = 0;
        let refused = loop {
            match nkv.put(format!("k{stored}"), vec![7; 1_000]).await {
                Ok(_) => stored += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(*refused.kind(), ErrorKind::Refused { status: 507 }, "{refused}");
        assert!(stored > 3 && nkv.list("*").await.unwrap().len() == stored);
        assert_eq!(nkv.delete("k0").await.unwrap().count, 1, "a delete makes room");
        nkv.put("k0", vec![7; 1_000]).await.unwrap();
    }
}

/// Sends why it is not followed any more, each time.
#[derive(Debug)]
struct Observed(NatsEngine, mpsc::UnboundedSender<EngineError>);

#[async_trait]
impl Engine for Observed {
    fn abilities(&self) -> Abilities {
        self.0.abilities()
    }

    async fn write(&self, epoch: Epoch, ops: Vec<Op>, together: bool) -> std::result::Result<Decided, EngineError> {
        self.0.write(epoch, ops, together).await
    }

    async fn follow(&self, seen: Option<Seen>, feed: Feed) -> EngineError {
        let error = self.0.follow(seen, feed).await;
        drop(self.1.send(error.clone()));
        error
    }

    async fn last(&self) -> std::result::Result<Seen, EngineError> {
        self.0.last().await
    }
}

#[tokio::test]
async fn settings_that_break_a_promise_are_refused_by_name() {
    for (settings, name) in [
        (json!({ "max_age": 3_600_000_000_000_u64 }), "max_age"),
        (json!({ "max_bytes": 10_000, "discard": "old" }), "discard old"),
        (json!({ "max_msgs_per_subject": -1 }), "max_msgs_per_subject"),
        (json!({ "discard_new_per_subject": true }), "discard_new_per_subject"),
    ] {
        let Some(server) = Server::start().await else { return };
        server.other().await.create(settings).await;
        match server.engine().check().await {
            Err(EngineError::Refused { message, .. }) => assert!(message.contains(name), "{message}"),
            other => panic!("{name}: {other:?}"),
        }
        let (sender, mut errors) = mpsc::unbounded_channel();
        let node = Node::builder().engine(Observed(server.engine(), sender)).start().await.unwrap();
        match timeout(PATIENCE, errors.recv()).await.expect("the engine is followed") {
            Some(EngineError::Refused { message, .. }) => assert!(message.contains(name), "{message}"),
            other => panic!("{name}: {other:?}"),
        }
        assert!(node.handle().health().await.is_err(), "a bucket with {name} is followed");
    }
}

#[tokio::test]
async fn a_setting_that_is_changed_later_stops_the_node_from_writing() {
    let Some(server) = Server::start().await else { return };
    let (_node, nkv) = server.node().await;
    nkv.put("a", "1").await.unwrap();
    let other = server.other().await;
    let mut config = other.api("STREAM.INFO.BUCKET", json!({})).await["config"].clone();
    config["max_age"] = json!(3_600_000_000_000_u64);
    let answer = other.api("STREAM.UPDATE.BUCKET", config).await;
    assert!(answer.get("error").is_none(), "{answer}");
    until("the node is stale", async || nkv.health().await.is_err()).await;
    assert_eq!(status(nkv.put("a", "2").await), 503);
    assert_eq!(value(&nkv, "a").await.as_deref(), Some("1"));
}

#[tokio::test]
async fn a_missing_bucket_is_created_once_or_refused() {
    let Some(server) = Server::start().await else { return };
    let refused = NatsEngine::new(server.options().with_create(false)).check().await;
    assert!(
        matches!(&refused, Err(EngineError::Refused { message, .. }) if message.contains("not exist")),
        "{refused:?}"
    );
    let engines: Vec<_> = (0..5).map(|_| server.engine()).collect();
    for checked in futures_util::future::join_all(engines.iter().map(NatsEngine::check)).await {
        checked.unwrap();
    }
    let unreachable = Options::new(["127.0.0.1:1"], "test").unwrap();
    let away = NatsEngine::new(unreachable).check().await;
    assert!(matches!(away, Err(EngineError::Unavailable(_))), "{away:?}");
}

#[tokio::test]
async fn markers_of_deletes_are_purged_and_a_value_put_again_stays() {
    for (server, is_created) in
        [(Server::start().await, true), (Server::start().await, false), (Server::start_old().await, true)]
    {
        let Some(server) = server else { continue };
        let other = server.other().await;
        if !is_created {
            other.create(json!({})).await;
        }
        let engine = || NatsEngine::new(server.options().with_marker_age(Duration::from_secs(1)));
        let (_node, nkv) = node(engine()).await;
        let (_second, second) = node(engine()).await;
        let mut events = synced(&second).await;
        for number in 0..50 {
            nkv.put(format!("gone.{number}"), "1").await.unwrap();
            nkv.put(format!("again.{number}"), "1").await.unwrap();
        }
        assert_eq!(nkv.delete("*").await.unwrap().count, 100);
        // Put again, some of them just when their markers are old.
        let began = Instant::now();
        for number in 0..50_u64 {
            let at = Duration::from_millis(700 + 20 * number);
            tokio::time::sleep(at.saturating_sub(began.elapsed())).await;
            nkv.put(format!("again.{number}"), "2").await.unwrap();
        }
        until("no marker is left", async || other.state().await["num_subjects"] == 50).await;
        for number in 0..50 {
            assert_eq!(other.get(&format!("again.{number}")).await.as_deref(), Some("2"), "a value was purged");
        }
        // No subscriber was notified of what was no change, and no node began anew over it.
        let mut seen = Vec::new();
        while let Ok(Some(event)) = timeout(Duration::from_millis(1_200), events.next()).await {
            match event {
                Event::Update { .. } | Event::Gone { .. } => seen.push(shown(&event)),
                other => panic!("{other:?}"),
            }
        }
        assert!(seen.iter().filter(|text| text.ends_with("=2")).count() == 50, "{seen:?}");
        assert_eq!(second.list("*").await.unwrap().len(), 50);
        assert!(nkv.health().await.is_ok() && second.health().await.is_ok());
    }
}

#[tokio::test]
async fn a_value_that_was_overwritten_does_not_end_with_the_ttl_before() {
    let Some(server) = Server::start().await else { return };
    let (_node, nkv) = server.node().await;
    let other = server.other().await;
    let short = PutOptions::default().with_ttl(Duration::from_secs(1));
    nkv.put_with("over", "1", short).await.unwrap();
    nkv.put_with("ends", "1", short).await.unwrap();
    let mut events = synced(&nkv).await;
    other.put("over", "2").await;
    assert_eq!(shown(&event(&mut events).await), "over=2");
    assert_eq!(shown(&event(&mut events).await), "ends Expired");
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(value(&nkv, "over").await.as_deref(), Some("2"));
    // After its end it is absent for conditions.
    nkv.put_with("ends", "2", if_revision(Revision::ZERO)).await.unwrap();
    assert!(nkv.health().await.is_ok());
}

#[tokio::test]
async fn the_node_that_has_put_a_value_hides_it_at_its_time() {
    let Some(server) = Server::start().await else { return };
    let (_node, nkv) = server.node().await;
    let (_other, other) = server.node().await;
    let mut is_later = false;
    for _ in 0..10 {
        // NATS counts in whole seconds: it has the value for two.
        let ttl = PutOptions::default().with_ttl(Duration::from_millis(1_100));
        let revision = nkv.put_with("a", "1", ttl).await.unwrap();
        until("the other node has seen it", async || other.revision() >= revision).await;
        until("its own node hides it", async || !nkv.exists("a").await.unwrap()).await;
        is_later = other.exists("a").await.unwrap();
        // A test that stalls looks too late: once more.
        if is_later {
            break;
        }
    }
    assert!(is_later, "it ended for the other node as early");
    until("it ended everywhere", async || !other.exists("a").await.unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wildcard_deletes_many_keys_and_none_beside() {
    let Some(server) = Server::start().await else { return };
    let (_node, nkv) = server.node().await;
    for part in 0..10 {
        let put = |number: u32| Op::Put {
            key: Key::new(&format!("many.{part}.{number}")).unwrap(),
            value: "1".into(),
            options: nkv_core::PutOptions::default(),
        };
        nkv.write((0..500).map(put).collect()).await.unwrap();
    }
    for name in ["many", "manyx", "man.y"] {
        nkv.put(name, "1").await.unwrap();
    }
    let deleted = nkv.delete("many.*").await.unwrap();
    assert_eq!(deleted.count, 5_000);
    let left = nkv.list("*").await.unwrap();
    assert_eq!(left.len(), 3, "{left:?}");
    let (_later, later) = server.node().await;
    assert_eq!(later.list("*").await.unwrap().len(), 3);
    // The reason is that of a delete.
    let mut events = synced(&later).await;
    nkv.delete("manyx").await.unwrap();
    match event(&mut events).await {
        Event::Gone { reason, .. } => assert_eq!(reason, GoneReason::Deleted),
        other => panic!("{other:?}"),
    }
}
