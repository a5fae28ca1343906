//! The log of the first kv-store beside the topic of the state.

use std::sync::Arc;

use nkv_engine_kafka::KafkaLog;
use nkv_node::Handle;

use crate::support::{Shared, shared, shows, until, value};

const CLIENT: &str = "Client address=10.0.0.1:5000";

fn start(shared: &Shared, topic: &str, log: &str, nkv: &Handle) -> Arc<KafkaLog> {
    let bridge = Arc::new(KafkaLog::new(&shared.options(topic), log).unwrap());
    let (running, nkv) = (Arc::clone(&bridge), nkv.clone());
    tokio::spawn(async move { running.run(nkv).await });
    bridge
}

/// How often the log has a value.
fn count(shared: &Shared, log: &str, text: &str) -> usize {
    shared.foreign.done(&["read", log]).matches(text).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn puts_are_written_to_the_log_once_and_sets_of_others_are_done_once_and_nothing_echoes() {
    let Some(shared) = shared() else { return };
    let (topic, log, foreign) = (shared.topic(), shared.topic(), &shared.foreign);
    assert!(KafkaLog::new(&shared.options(&topic), &topic).is_err(), "it is the topic of the state");
    foreign.done(&["create", &log, "1"]);
    foreign.done(&["put", &log, CLIENT, "history: 1"]);
    let (first, a) = shared.node(&topic).await;
    let (_second, b) = shared.node(&topic).await;
    a.put("before", "1").await.unwrap();
    let bridges = [start(shared, &topic, &log, &a), start(shared, &topic, &log, &b)];
    let position = format!("kafka-log.{log}");
    until("a node has the log", async || a.exists(&*position).await.unwrap()).await;

    a.put("a", "1").await.unwrap();
    b.put("b", "2").await.unwrap();
    until("both are in the log", async || {
        count(shared, &log, "=a: 1#nkv") == 1 && count(shared, &log, "=b: 2#nkv") == 1
    })
    .await;
    for text in ["c: 3", "no set", "a key: 1", ": 1", "long: ", "c: 4"] {
        foreign.done(&["put", &log, CLIENT, text]);
    }
    for nkv in [&a, &b] {
        shows(nkv, "c", Some("4")).await;
        assert_eq!((value(nkv, "long").await.as_deref(), value(nkv, "history").await), (Some(""), None));
    }
    assert_eq!(bridges.iter().map(|bridge| bridge.passed_over()).sum::<u64>(), 3);
    b.delete("a").await.unwrap();
    a.put("c", "newer").await.unwrap();
    until("it is in the log", async || count(shared, &log, "=c: newer#nkv") == 1).await;
    assert_eq!(count(shared, &log, "=c: 4#nkv") + count(shared, &log, "=c: 3#nkv"), 0, "a set of another came back");
    assert_eq!(count(shared, &log, "before") + count(shared, &log, "kafka-log"), 0);

    // The one that may have the log ends; what comes meanwhile is not lost, and nothing old is done again.
    first.shutdown().await.unwrap();
    foreign.done(&["put", &log, CLIENT, "d: 5"]);
    b.put("e", "6").await.unwrap();
    shows(&b, "d", Some("5")).await;
    until("it is in the log", async || count(shared, &log, "=e: 6#nkv") == 1).await;
    assert_eq!((value(&b, "c").await.as_deref(), value(&b, "a").await), (Some("newer"), None));
    // A node that is new to all of it goes on as well.
    let (_third, c) = shared.node(&topic).await;
    let _bridge = start(shared, &topic, &log, &c);
    foreign.done(&["put", &log, CLIENT, "f: 7"]);
    c.put("g", "8").await.unwrap();
    shows(&c, "f", Some("7")).await;
    until("it is in the log", async || count(shared, &log, "=g: 8#nkv") == 1).await;
    for once in ["=a: 1#nkv", "=b: 2#nkv", "=c: newer#nkv", "=e: 6#nkv"] {
        assert_eq!(count(shared, &log, once), 1, "{once}");
    }
    assert_eq!(count(shared, &log, "=d: 5#nkv") + count(shared, &log, "=f: 7#nkv"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_put_while_no_node_had_the_log_is_written_in_order_in_as_many_batches_as_it_takes() {
    let Some(shared) = shared() else { return };
    let (topic, log) = (shared.topic(), shared.topic());
    shared.foreign.done(&["create", &log, "1"]);
    let (first, a) = shared.node(&topic).await;
    let _bridge = start(shared, &topic, &log, &a);
    let position = format!("kafka-log.{log}");
    until("a node has the log", async || a.exists(&*position).await.unwrap()).await;
    first.shutdown().await.unwrap();
    let (_second, b) = shared.node(&topic).await;
    // A batch of this log has two of them.
    for name in ["put.e", "put.d", "put.c", "put.b", "put.a"] {
        b.put(name, "x".repeat(400_000)).await.unwrap();
    }
    b.put("put.c", "newer").await.unwrap();
    // A node that has the state alone, and not the changes.
    let (_third, c) = shared.node(&topic).await;
    let _bridge = start(shared, &topic, &log, &c);
    until("the last one is in the log", async || count(shared, &log, "=put.c: newer#nkv") == 1).await;
    let read = shared.foreign.done(&["read", &log]);
    let written: Vec<&str> = read.split("=put.").skip(1).map(|rest| &rest[..1]).collect();
    assert_eq!(written, ["e", "d", "b", "a", "c"]);
}
