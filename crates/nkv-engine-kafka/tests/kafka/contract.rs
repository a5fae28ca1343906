//! What any engine promises, and what is particular to a log.

use nkv_core::{Op, Outcome, Pattern, PutOptions};
use nkv_node::{Engine, ErrorKind, Event, GoneReason};
use tokio::time::timeout;

use crate::support::{PATIENCE, healthy, key, ready, shared, shows, until, value};

#[tokio::test(flavor = "multi_thread")]
async fn the_engine_keeps_the_contract() {
    let Some(shared) = shared() else { return };
    let topic = shared.topic();
    nkv_testkit::engine::check(|| shared.engine(&topic)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_other_programs_write_is_seen_and_they_see_what_nkv_writes() {
    let Some(shared) = shared() else { return };
    let (topic, foreign) = (shared.topic(), &shared.foreign);
    let (_node, nkv) = shared.node(&topic).await;
    let mut events = nkv.subscribe("*").await.unwrap();
    nkv.put("lamp.hall", "on").await.unwrap();
    nkv.put("empty", "").await.unwrap();
    for (number, compression) in ["none", "gzip", "snappy", "lz4", "zstd"].iter().enumerate() {
        let (name, long) = (format!("foreign.{number}"), "x".repeat(1_000));
        foreign.done(&["put", &topic, &name, &long, compression]);
        shows(&nkv, &name, Some(&long)).await;
    }
    foreign.done(&["put", &topic, "lamp.hall", "off"]);
    let mut next = async |what: &str, is_it: &dyn Fn(&Event) -> bool| {
        let wait = async { while !is_it(&events.next().await.unwrap()) {} };
        assert!(timeout(PATIENCE, wait).await.is_ok(), "no event: {what}");
    };
    next("off", &|event| matches!(event, Event::Update { entry, .. } if entry.value == "off")).await;
    foreign.done(&["put", &topic, "lamp.hall", "~"]);
    next("gone", &|event| matches!(event, Event::Gone { reason: GoneReason::Deleted, .. })).await;
    assert_eq!(value(&nkv, "lamp.hall").await, None);
    let read = foreign.done(&["read", &topic]);
    assert!(read.starts_with("0:lamp.hall=on 1:empty= 2:foreign.0="), "{read}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nkv_cannot_hold_is_absent_and_counted_and_never_fatal() {
    let Some(shared) = shared() else { return };
    let (topic, foreign) = (shared.topic(), &shared.foreign);
    let engine = nkv_engine_kafka::KafkaEngine::new(shared.options(&topic).with_value_len_max(1_000));
    let (_node, nkv) = ready(engine.clone()).await;
    foreign.done(&["alter", &topic, "max.message.bytes=1000000"]);
    for (key, value) in [
        ("a b", "1"),
        ("", "1"),
        ("a..b", "1"),
        ("..nkv.other", "1"),
        ("hex:ff00", "1"),
        (&*"k".repeat(1_025), "1"),
        ("plain", "len:1000"),
        ("shown", "short"),
        ("shown", "len:1001"),
        ("end", "1"),
    ] {
        foreign.done(&["put", &topic, key, value]);
    }
    shows(&nkv, "end", Some("1")).await;
    let keys: Vec<String> = nkv.list("*").await.unwrap().iter().map(|(key, _)| key.to_string()).collect();
    assert_eq!((keys, engine.unreadable()), (vec!["end".to_owned(), "plain".to_owned()], 7));
    // Another node that reads it whole has the same, at the same revision.
    let other = nkv_engine_kafka::KafkaEngine::new(shared.options(&topic).with_value_len_max(1_000));
    let (_other, fresh) = ready(other).await;
    assert_eq!((fresh.list("*").await, fresh.revision()), (nkv.list("*").await, nkv.revision()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_one_batch_of_records_or_refused_whole() {
    let Some(shared) = shared() else { return };
    let topic = shared.topic();
    let (_node, nkv) = shared.node(&topic).await;
    let put = |name: &str, value: &str| Op::Put {
        key: key(name),
        value: value.to_owned().into(),
        options: PutOptions::default(),
    };
    let delete = |pattern: &str| Op::Delete { pattern: pattern.parse().unwrap(), if_revision: None };
    nkv.put("b.old", "1").await.unwrap();
    let ops = vec![put("a", "1"), put("b.new", "2"), delete("b.*"), put("b.newest", "3"), delete("none")];
    let outcomes = nkv.write(ops).await.unwrap();
    let revision = |outcome: &Outcome| match outcome {
        Outcome::Put { revision } | Outcome::Deleted { revision, .. } => revision.get(),
        _ => 0,
    };
    assert_eq!(outcomes.iter().map(revision).collect::<Vec<_>>(), [2, 3, 5, 6, 0]);
    assert!(matches!(outcomes[2], Outcome::Deleted { count: 2, .. }) && outcomes[4] == Outcome::NotFound);
    assert_eq!(nkv.get_all("*").await.unwrap().len(), 2);
    let long = "x".repeat(600_000);
    let refused = nkv.write(vec![put("long.a", &long), put("long.b", &long)]).await.unwrap_err();
    assert_eq!(*refused.kind(), ErrorKind::Refused { status: 413 });
    assert!(refused.to_string().contains("max.message.bytes"), "{refused}");
    assert!(!nkv.exists("long.*").await.unwrap());
    nkv.put("long.a", "x".repeat(nkv.limits().value_len_max)).await.unwrap();
    // One by one they fit.
    let many: Vec<_> = (0..8)
        .map(|number| {
            tokio::spawn({
                let (nkv, long) = (nkv.clone(), long.clone());
                async move { nkv.put(format!("many.{number}"), long).await }
            })
        })
        .collect();
    for one in many {
        one.await.unwrap().unwrap();
    }
    assert_eq!(nkv.list("many.*").await.unwrap().len(), 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_deletes_at_once_one_says_that_it_deleted_something() {
    let Some(shared) = shared() else { return };
    let topic = shared.topic();
    let (_first, a) = shared.node(&topic).await;
    let (_second, b) = shared.node(&topic).await;
    for round in 0..20 {
        let name = format!("race.{round}");
        a.put(&*name, "1").await.unwrap();
        let deletes: Vec<_> = [&a, &b, &a, &b]
            .into_iter()
            .map(|nkv| {
                let (nkv, name) = (nkv.clone(), name.clone());
                tokio::spawn(async move { nkv.delete(&*name).await.unwrap().count })
            })
            .collect();
        let mut count = 0;
        for one in deletes {
            count += one.await.unwrap();
        }
        assert_eq!(count, 1, "round {round}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wildcard_deletes_what_was_acknowledged_to_any_client_and_says_how_much() {
    let Some(shared) = shared() else { return };
    let (topic, foreign) = (shared.topic(), &shared.foreign);
    let (_first, a) = shared.node(&topic).await;
    let (_second, b) = shared.node(&topic).await;
    foreign.done(&["put", &topic, "not a key", "stays"]);
    foreign.done(&["fill", &topic, "2500", "1", "10"]);
    a.put("k.last", "1").await.unwrap();
    a.put("kept", "1").await.unwrap();
    let deleted = b.delete("k.*").await.unwrap();
    assert_eq!((deleted.count, b.exists("k.*").await.unwrap()), (2_501, false));
    until("the other node has the delete", async || !a.exists("k.*").await.unwrap()).await;
    assert_eq!(value(&a, "kept").await.as_deref(), Some("1"));
    assert_eq!(b.delete("k.*").await.unwrap().count, 0);
    assert!(foreign.done(&["read", &topic]).contains("not a key=stays"));
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_that_follow_each_other_without_waiting_take_effect_in_order() {
    let Some(shared) = shared() else { return };
    let topic = shared.topic();
    let (_node, nkv) = shared.node(&topic).await;
    let put = |name: &str| Op::Put { key: key(name), value: "1".into(), options: PutOptions::default() };
    let all = Op::Delete { pattern: Pattern::All, if_revision: None };
    let ops: Vec<_> = [put("a"), put("b"), all, put("c")].into_iter().map(|op| nkv.admit(op).unwrap()).collect();
    let room = nkv.room(1).await.unwrap();
    let results = nkv.submit(ops, room).await.unwrap();
    let deleted = results.filter(|result| matches!(result, Ok(Outcome::Deleted { count: 2, .. })));
    assert_eq!(deleted.count(), 1);
    assert_eq!(nkv.list("*").await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn values_of_transactions_are_seen_once_they_are_committed_and_never_if_aborted() {
    let Some(shared) = shared() else { return };
    let (topic, foreign) = (shared.topic(), &shared.foreign);
    let (_node, nkv) = shared.node(&topic).await;
    let step = |words: &[&str]| foreign.done(&[&["transaction", &topic], words].concat());
    foreign.done(&["put", &topic, "a", "old"]);
    step(&["begin"]);
    step(&["put", &topic, "a", "aborted"]);
    step(&["put", &topic, "b", "aborted"]);
    step(&["abort"]);
    step(&["begin"]);
    step(&["put", &topic, "c", "committed"]);
    step(&["commit"]);
    shows(&nkv, "c", Some("committed")).await;
    assert_eq!((value(&nkv, "a").await.as_deref(), value(&nkv, "b").await), (Some("old"), None));
    // The last record is the end of a transaction: a node that followed and one that reads the whole are level there.
    let engine = shared.engine(&topic);
    let (_other, fresh) = ready(engine.clone()).await;
    until("both nodes are at one revision", async || fresh.revision() == nkv.revision()).await;
    assert_eq!(engine.last().await.unwrap().revision.get(), nkv.revision().get());
    assert_eq!(nkv.revision().get(), 6);
    // While one is open, what comes behind it is not seen: the node says so, and a new one is not ready.
    step(&["begin"]);
    step(&["put", &topic, "d", "open"]);
    let late = nkv_node::Node::builder().engine(shared.engine(&topic)).start().await.unwrap();
    until("the node is stale", async || nkv.health().await.is_err()).await;
    assert!(late.handle().get("a").await.is_err(), "it is ready on half a state");
    step(&["commit"]);
    healthy(&late.handle()).await;
    healthy(&nkv).await;
    assert_eq!(value(&late.handle(), "d").await.as_deref(), Some("open"));
    shows(&nkv, "d", Some("open")).await;
}
