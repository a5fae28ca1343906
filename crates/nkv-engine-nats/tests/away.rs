//! Servers that are away, come back, begin anew or go back.

#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nkv_engine_nats::{NatsEngine, Options};
use nkv_node::{Engine, EngineError, ErrorKind, Event, Handle, PutOptions, Result, Subscription};
use rustix::process::Signal;
use serde_json::json;
use support::{Other, PATIENCE, Proxy, Server, Way, event, healthy, node, until, value};
use tokio::time::timeout;

const UNAVAILABLE: ErrorKind = ErrorKind::Refused { status: 503 };

fn kind<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.unwrap_err().kind().clone()
}

async fn stale(nkv: &Handle) {
    until("the node is stale", async || nkv.health().await.is_err()).await;
}

/// How the newest consumer of the bucket began.
async fn consumers(other: &Other) -> Vec<String> {
    let answer = other.api("CONSUMER.LIST.BUCKET", json!({ "offset": 0 })).await;
    let mut consumers = answer["consumers"].as_array().cloned().unwrap_or_default();
    consumers.sort_by_key(|consumer| consumer["created"].as_str().unwrap().to_owned());
    consumers.iter().map(|consumer| consumer["config"]["deliver_policy"].as_str().unwrap().to_owned()).collect()
}

async fn synced(nkv: &Handle) -> Subscription {
    let mut events = nkv.subscribe("*").await.unwrap();
    while !matches!(timeout(PATIENCE, events.next()).await.unwrap(), Some(Event::Synced { .. })) {}
    events
}

/// What is notified until the key `end` is put.
async fn until_end(events: &mut Subscription) -> Vec<String> {
    let mut seen = Vec::new();
    loop {
        match event(events).await {
            Event::Update { entry, .. } if entry.key.as_str() == "end" => return seen,
            Event::Update { entry, .. } => {
                seen.push(format!("{}={}", entry.key, String::from_utf8_lossy(&entry.value)));
            }
            Event::Gone { key, .. } => seen.push(format!("{key} gone")),
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_a_server_stands_still_reads_go_on_and_writes_are_refused_and_never_sent() {
    for server in [Server::start().await, Server::start_old().await] {
        let Some(server) = server else { continue };
        let (_node, nkv) = server.node().await;
        nkv.put("a", "1").await.unwrap();
        server.signal(Signal::STOP);
        let stopped = Instant::now();
        // Under way: its outcome is unknown.
        let under_way = async {
            loop {
                // It takes its time to stand still.
                if let Err(error) = nkv.put("under.way", "1").await {
                    break error;
                }
            }
        };
        let under_way = timeout(PATIENCE, under_way).await.expect("the server stands still");
        assert_eq!(*under_way.kind(), ErrorKind::OutcomeUnknown);
        stale(&nkv).await;
        println!("TEST stale_after_ms = {}", stopped.elapsed().as_millis());
        for number in 0..100 {
            let began = Instant::now();
            assert_eq!(kind(nkv.put(format!("refused.{number}"), "1").await), UNAVAILABLE);
            assert!(began.elapsed() < PATIENCE, "a refusal waits for the engine");
        }
        assert_eq!(value(&nkv, "a").await.as_deref(), Some("1"));
        server.signal(Signal::CONT);
        healthy(&nkv).await;
        nkv.put("b", "1").await.unwrap();
        assert!(!nkv.exists("refused.*").await.unwrap(), "a refused write was sent later");
        assert_eq!(value(&nkv, "a").await.as_deref(), Some("1"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_sent_before_a_cut_is_never_sent() {
    let Some(server) = Server::start().await else { return };
    let other = server.other().await;
    let proxy = Proxy::start(server.port).await;
    let (_node, nkv) = node(proxy.engine()).await;
    nkv.put("a", "1").await.unwrap();
    proxy.set(Way::Cut);
    until("its connections have gone", async || proxy.connections() == 0).await;
    let put = |number: u32| {
        let nkv = nkv.clone();
        async move { nkv.put(format!("cut.{number}"), "1").await }
    };
    let puts = (0..20).map(put);
    let puts = tokio::spawn(futures_util::future::join_all(puts.collect::<Vec<_>>()));
    tokio::time::sleep(Duration::from_millis(300)).await;
    proxy.set(Way::Open);
    for put in timeout(PATIENCE, puts).await.unwrap().unwrap() {
        let kind = kind(put);
        assert!(kind == UNAVAILABLE || kind == ErrorKind::OutcomeUnknown, "{kind:?}");
    }
    healthy(&nkv).await;
    nkv.put("a", "2").await.unwrap();
    for number in 0..20 {
        assert_eq!(other.get(&format!("cut.{number}")).await, None, "it was sent later");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_one_way_partition_is_noticed_and_a_killed_server_too() {
    let Some(mut server) = Server::start().await else { return };
    let proxy = Proxy::start(server.port).await;
    let (_node, nkv) = node(proxy.engine()).await;
    proxy.set(Way::Deaf);
    let under_way = kind(nkv.put("under.way", "1").await);
    assert_eq!(under_way, ErrorKind::OutcomeUnknown);
    stale(&nkv).await;
    assert_eq!(kind(nkv.put("refused", "1").await), UNAVAILABLE);
    proxy.set(Way::Open);
    healthy(&nkv).await;
    // It was done, and its node sees that.
    assert_eq!(value(&nkv, "under.way").await.as_deref(), Some("1"));
    assert_eq!(value(&nkv, "refused").await, None);
    server.kill();
    stale(&nkv).await;
    assert_eq!(kind(nkv.put("refused", "1").await), UNAVAILABLE);
    server.run().await;
    healthy(&nkv).await;
    nkv.put("a", "1").await.unwrap();
    assert_eq!(value(&nkv, "refused").await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_starts_without_a_server_and_answers_503_until_there_is_a_state() {
    let Some(mut server) = Server::start().await else { return };
    server.kill();
    let node = nkv_node::Node::builder().engine(server.engine()).start().await.unwrap();
    let nkv = node.handle();
    assert_eq!(kind(nkv.get("a").await), UNAVAILABLE);
    assert_eq!(kind(nkv.subscribe("*").await), UNAVAILABLE);
    assert_eq!(kind(nkv.put("a", "1").await), UNAVAILABLE);
    server.run().await;
    healthy(&nkv).await;
    assert_eq!(value(&nkv, "a").await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_missed_comes_once_and_without_the_whole_state() {
    for server in [Server::start().await, Server::start_old().await] {
        let Some(server) = server else { continue };
        let other = server.other().await;
        let proxy = Proxy::start(server.port).await;
        let (_node, nkv) = node(proxy.engine()).await;
        for name in ["kept", "gone", "changed", "last"] {
            nkv.put(name, "1").await.unwrap();
        }
        let mut events = synced(&nkv).await;
        proxy.set(Way::Cut);
        stale(&nkv).await;
        other.delete("gone").await;
        other.put("changed", "2").await;
        other.put("changed", "3").await;
        proxy.set(Way::Open);
        healthy(&nkv).await;
        assert_eq!(consumers(&other).await.last().map(String::as_str), Some("by_start_sequence"), "it did not resume");
        nkv.put("end", "").await.unwrap();
        let mut seen = until_end(&mut events).await;
        seen.sort();
        assert_eq!(seen, ["changed=3", "gone gone"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_whose_marker_was_purged_meanwhile_is_not_missed() {
    for (server, is_quiet) in
        [(Server::start().await, false), (Server::start().await, true), (Server::start_old().await, false)]
    {
        let Some(server) = server else { continue };
        let other = server.other().await;
        let proxy = Proxy::start(server.port).await;
        let (_node, nkv) = node(proxy.engine()).await;
        for name in ["kept", "gone", "last"] {
            nkv.put(name, "1").await.unwrap();
        }
        let mut events = synced(&nkv).await;
        proxy.set(Way::Cut);
        stale(&nkv).await;
        let epoch = nkv.epoch();
        if !is_quiet {
            other.delete("gone").await;
            other.put("new", "1").await;
        }
        other.api("STREAM.PURGE.BUCKET", json!({ "filter": "$KV.test.gone" })).await;
        proxy.set(Way::Open);
        healthy(&nkv).await;
        assert_eq!(consumers(&other).await.last().map(String::as_str), Some("all"), "it resumed over a gap");
        assert_eq!(value(&nkv, "gone").await, None);
        nkv.put("end", "").await.unwrap();
        let mut seen = until_end(&mut events).await;
        seen.sort();
        assert_eq!(seen, if is_quiet { vec!["gone gone"] } else { vec!["gone gone", "new=1"] });
        assert_eq!(nkv.epoch(), epoch);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_program_purges_is_noticed_and_the_node_stays_in_reach() {
    let Some(server) = Server::start().await else { return };
    let other = server.other().await;
    let (_node, nkv) = server.node().await;
    for number in 0..10 {
        nkv.put(format!("branch.{number}"), "1").await.unwrap();
    }
    nkv.put("kept", "1").await.unwrap();
    let (epoch, mut events) = (nkv.epoch(), synced(&nkv).await);
    other.api("STREAM.PURGE.BUCKET", json!({ "filter": "$KV.test.branch.>" })).await;
    until("the purge is noticed", async || !nkv.exists("branch.*").await.unwrap()).await;
    let mut gone = 0;
    while gone < 10 {
        if let Event::Gone { .. } = event(&mut events).await {
            gone += 1;
        }
    }
    nkv.put("kept", "3").await.unwrap();
    assert_eq!(nkv.epoch(), epoch, "an epoch began over it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_is_created_anew_is_a_new_epoch() {
    let Some(server) = Server::start().await else { return };
    let other = server.other().await;
    let (_node, nkv) = server.node().await;
    let (_second, second) = server.node().await;
    let before = nkv.put("old", "1").await.unwrap();
    let (epoch, mut events) = (nkv.epoch(), synced(&nkv).await);
    assert_eq!(epoch, second.epoch(), "two nodes of one bucket have two epochs");
    other.api("STREAM.DELETE.BUCKET", json!({})).await;
    other.create(json!({})).await;
    other.put("new", "1").await;
    until("a new epoch", async || nkv.epoch() != epoch && second.epoch() != epoch).await;
    assert_eq!(nkv.epoch(), second.epoch());
    healthy(&nkv).await;
    assert_eq!((value(&nkv, "old").await, value(&nkv, "new").await.as_deref()), (None, Some("1")));
    let stale = PutOptions::default().with_if_revision(before);
    assert_eq!(kind(nkv.put_with("old", "2", stale).await), ErrorKind::OtherEpoch);
    let (mut connected, mut gone, mut new) = (false, false, false);
    while !(connected && gone && new) {
        match timeout(PATIENCE, events.next()).await.unwrap().unwrap() {
            Event::Connected { epoch, .. } => connected = epoch == nkv.epoch(),
            Event::Gone { key, .. } => gone |= key.as_str() == "old",
            Event::Update { entry, .. } => new |= entry.key.as_str() == "new",
            _ => {}
        }
    }
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(copied.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_goes_back_is_a_new_epoch_for_all_nodes() {
    // With what is written after it went back: less than before, as much, more.
    for after in [0, 3, 10] {
        let Some(mut server) = Server::start().await else { return };
        let proxy = Proxy::start(server.port).await;
        let (_node, nkv) = node(proxy.engine()).await;
        let (_second, second) = node(proxy.engine()).await;
        nkv.put("kept", "1").await.unwrap();
        let copied = server.dir.path().join("copy");
        let store = server.dir.path().join("store");
        server.kill();
        copy(&store, &copied);
        server.run().await;
        healthy(&nkv).await;
        healthy(&second).await;
        for number in 0..3 {
            nkv.put(format!("lost.{number}"), "1").await.unwrap();
        }
        until("the second node has it", async || second.exists("lost.2").await.unwrap()).await;
        let epoch = nkv.epoch();
        proxy.set(Way::Cut);
        server.kill();
        std::fs::remove_dir_all(&store).unwrap();
        copy(&copied, &store);
        server.run().await;
        let other = server.other().await;
        for number in 0..after {
            other.put(&format!("after.{number}"), "1").await;
        }
        proxy.set(Way::Open);
        until("a new epoch", async || nkv.epoch() != epoch && second.epoch() == nkv.epoch()).await;
        healthy(&nkv).await;
        healthy(&second).await;
        for nkv in [&nkv, &second] {
            let keys = nkv.list("*").await.unwrap().len();
            assert_eq!((keys, nkv.exists("lost.*").await.unwrap()), (after + 1, false));
        }
        assert_eq!(nkv.epoch(), second.epoch());
        // One that comes later has it too.
        let (_later, later) = server.node().await;
        assert_eq!(later.epoch(), nkv.epoch());
        nkv.put("a", "1").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn however_many_subscribe_a_node_is_one_consumer() {
    let Some(server) = Server::start().await else { return };
    let other = server.other().await;
    let ((_a, a), (_b, b)) = (server.node().await, server.node().await);
    let mut streams = Vec::new();
    for number in 0..1_000 {
        let nkv = if number % 2 == 0 { &a } else { &b };
        streams.push(nkv.subscribe(format!("k.{}", number % 10).as_str()).await.unwrap());
    }
    a.put("k.3", "1").await.unwrap();
    for stream in streams.iter_mut().skip(3).step_by(10) {
        assert!(matches!(event(stream).await, Event::Update { entry, .. } if entry.value == "1"));
    }
    until("two consumers", async || consumers(&other).await.len() == 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_cuts_leave_one_consumer_and_one_connection() {
    let Some(server) = Server::start().await else { return };
    let other = server.other().await;
    let proxy = Proxy::start(server.port).await;
    let (_node, nkv) = node(proxy.engine()).await;
    for number in 0..30 {
        proxy.set(Way::Cut);
        stale(&nkv).await;
        proxy.set(Way::Open);
        healthy(&nkv).await;
        nkv.put("a", number.to_string()).await.unwrap();
    }
    until("one consumer is left", async || consumers(&other).await.len() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_several_servers_one_that_answers_is_enough() {
    let Some(server) = Server::start().await else { return };
    let Some(still) = Server::start().await else { return };
    still.signal(Signal::STOP);
    // One refuses, one stands still.
    let good = format!("127.0.0.1:{}", server.port);
    let hosts = ["127.0.0.1:1".to_owned(), format!("127.0.0.1:{}", still.port), good.clone()];
    for turn in 0..3 {
        let mut hosts = hosts.clone();
        hosts.rotate_left(turn);
        let began = Instant::now();
        let (_node, nkv) = node(NatsEngine::new(Options::new(hosts, "test").unwrap())).await;
        println!("TEST ready_among_bad_servers_ms = {}", began.elapsed().as_millis());
        nkv.put("a", "1").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_of_two_systems_are_refused() {
    let (Some(first), Some(mut second)) = (Server::start().await, Server::start().await) else { return };
    first.engine().check().await.unwrap();
    second.engine().check().await.unwrap();
    let both = Options::new([first.url(), second.url()], "test").unwrap();
    let refused = NatsEngine::new(both.clone()).check().await;
    let Err(EngineError::Refused { message, .. }) = refused else { panic!("{refused:?}") };
    assert!(message.contains(&first.url()) && message.contains(&second.url()), "{message}");
    // Where only one was in reach at the start: the other is not taken for the same one begun anew.
    second.kill();
    let (_node, nkv) = node(NatsEngine::new(both)).await;
    nkv.put("a", "1").await.unwrap();
    second.run().await;
    let epoch = nkv.epoch();
    first.signal(Signal::STOP);
    stale(&nkv).await;
    first.signal(Signal::CONT);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!((nkv.epoch(), value(&nkv, "a").await.as_deref()), (epoch, Some("1")));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_revision_is_that_of_the_bucket_and_every_node_comes_as_far() {
    let Some(server) = Server::start().await else { return };
    let (_node, nkv) = server.node().await;
    let other = server.other().await;
    nkv.put("a", "1").await.unwrap();
    // What is no key of nkv's, and a marker that was purged at once: the last message does not exist any more.
    other.put("=00", "1").await;
    let last = other.delete("a").await;
    other.api("STREAM.PURGE.BUCKET", json!({ "filter": "$KV.test.a" })).await;
    let (_later, later) = server.node().await;
    assert_eq!(later.revision().get(), last);
    until("the first node is as far", async || nkv.revision().get() == last).await;
    let engine = server.engine();
    assert!(matches!(engine.last().await, Err(EngineError::Unavailable(_))), "it is not followed");
}
