//! The topic's settings, and what becomes of a topic.

use std::time::Duration;

use nkv_engine_kafka::{ErrorKind, KafkaEngine, Options};
use nkv_node::Node;

use crate::support::{healthy, ready, shared, until, value};

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_is_not_there_is_created_once_or_not_at_all() {
    let Some(shared) = shared() else { return };
    let (topic, foreign) = (shared.topic(), &shared.foreign);
    let refusing = KafkaEngine::new(shared.options(&topic).with_create(false));
    let error = refusing.check().await.unwrap_err();
    assert!(error.kind() == ErrorKind::Refused && error.to_string().contains(&topic), "{error}");
    assert!(!foreign.done(&["topics"]).contains(&topic), "the broker made it, with settings of its own");
    let starting: Vec<_> = (0..5)
        .map(|_| {
            let engine = shared.engine(&topic);
            tokio::spawn(async move { engine.check().await })
        })
        .collect();
    for one in starting {
        one.await.unwrap().unwrap();
    }
    assert_eq!(foreign.done(&["partitions", &topic]), "1");
    for (setting, expected) in [
        ("cleanup.policy", "compact"),
        ("segment.bytes", "16777216"),
        ("max.compaction.lag.ms", "3600000"),
        ("max.message.bytes", "1049693"),
    ] {
        assert_eq!(foreign.done(&["config", &topic, setting]), expected, "{setting}");
    }
    refusing.check().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_break_a_promise_are_refused_by_name() {
    let Some(shared) = shared() else { return };
    for (partitions, settings, says) in [
        ("3", vec!["cleanup.policy=compact"], "3 partitions"),
        ("1", vec!["cleanup.policy=delete"], "cleanup.policy=delete"),
        ("1", vec!["cleanup.policy=compact,delete"], "cleanup.policy=compact,delete"),
        ("1", vec!["cleanup.policy=compact", "unclean.leader.election.enable=true"], "unclean.leader.election"),
        ("1", vec!["cleanup.policy=compact", "max.message.bytes=1000"], "max.message.bytes=1000"),
        ("1", vec!["cleanup.policy=compact", "delete.retention.ms=3999"], "delete.retention.ms=3999"),
    ] {
        let topic = shared.topic();
        shared.foreign.done(&[&["create", &topic, partitions], &settings[..]].concat());
        let error = shared.engine(&topic).check().await.unwrap_err();
        assert!(error.kind() == ErrorKind::Refused && error.to_string().contains(says), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_is_changed_later_ends_the_following() {
    let Some(shared) = shared() else { return };
    let topic = shared.topic();
    let (_node, nkv) = shared.node(&topic).await;
    nkv.put("a", "1").await.unwrap();
    shared.foreign.done(&["alter", &topic, "cleanup.policy=delete"]);
    until("the node is not followed", async || nkv.health().await.is_err()).await;
    assert_eq!(value(&nkv, "a").await.as_deref(), Some("1"));
    shared.foreign.done(&["alter", &topic, "cleanup.policy=compact"]);
    healthy(&nkv).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_is_created_anew_is_another_epoch() {
    let Some(shared) = shared() else { return };
    let (topic, foreign) = (shared.topic(), &shared.foreign);
    let (_node, nkv) = shared.node(&topic).await;
    nkv.put("a", "1").await.unwrap();
    let before = nkv.epoch();
    foreign.done(&["drop", &topic]);
    until("there is another epoch", async || nkv.health().await.is_ok() && nkv.epoch() != before).await;
    assert_eq!(value(&nkv, "a").await, None);
    nkv.put("a", "2").await.unwrap();
    let (_other, fresh) = shared.node(&topic).await;
    assert_eq!((fresh.epoch(), value(&fresh, "a").await.as_deref()), (nkv.epoch(), Some("2")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_starts_without_a_broker_and_waits_for_one() {
    let engine = KafkaEngine::new(Options::from_url("kafka://127.0.0.1:1/lamps").unwrap());
    assert_eq!(engine.check().await.unwrap_err().kind(), ErrorKind::Unavailable);
    let node = Node::builder().engine(engine).start().await.unwrap();
    assert!(node.handle().get("a").await.is_err());
    node.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_are_silent_or_refuse_delay_no_caller() {
    let Some(shared) = shared() else { return };
    let topic = shared.topic();
    // One that accepts and says nothing, one that refuses, one that no packet comes back from.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let servers = [
        silent.local_addr().unwrap().to_string(),
        "127.0.0.1:1".into(),
        "192.0.2.1:9092".into(),
        shared.broker.address(),
    ];
    for first in 0..servers.len() {
        let mut servers = servers.to_vec();
        servers.rotate_left(first);
        let engine = KafkaEngine::new(Options::new(servers, &topic).unwrap());
        tokio::time::timeout(Duration::from_secs(10), ready(engine)).await.unwrap();
    }
}
