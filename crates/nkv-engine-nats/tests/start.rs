//! Many keys at the start, or busy ones.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Instant;

use bytes::Bytes;
use serde_json::json;
use support::{Other, Server, healthy, until};

const SOME: usize = 10_000;

/// As fast as the server takes them.
async fn fill(other: &Other, branch: &str, keys: usize, value: &str) {
    let (value, inbox) = (Bytes::from(value.to_owned()), other.client.new_inbox());
    for part in 0..keys.div_ceil(1_000) {
        for number in part * 1_000..(part + 1) * 1_000 {
            let subject = format!("$KV.test.{branch}.{number:06}");
            other.client.publish_with_reply(subject, inbox.clone(), value.clone()).await.unwrap();
        }
        // So that no queue of the server overflows.
        other.put(&format!("{branch}.{:06}", part * 1_000), std::str::from_utf8(&value).unwrap()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_keys_are_all_there_at_the_start() {
    for (server, keys) in [(Server::start().await, 100_000), (Server::start_old().await, 20_000)] {
        let Some(server) = server else { continue };
        let other = server.other().await;
        other.create(json!({})).await;
        fill(&other, "key", keys, &"x".repeat(100)).await;
        fill(&other, "some", SOME, &"x".repeat(100)).await;
        let began = Instant::now();
        let node = nkv_node::Node::builder().engine(server.engine()).start().await.unwrap();
        let nkv = node.handle();
        healthy(&nkv).await;
        println!("TEST ready_with_{keys}_keys_ms = {}", began.elapsed().as_millis());
        assert_eq!(nkv.list("*").await.unwrap().len(), keys + SOME);
        let began = Instant::now();
        let deleted = nkv.delete("some.*").await.unwrap();
        println!("TEST deleted_{SOME}_keys_ms = {}", began.elapsed().as_millis());
        assert_eq!(deleted.count, SOME as u64);
        let (_later, later) = server.node().await;
        assert_eq!(later.list("*").await.unwrap().len(), keys);
    }
}

/// Each key is overwritten again and again while the state is fetched: what is sent of it comes behind all that was counted.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_starts_while_all_keys_are_written_without_end() {
    for server in [Server::start().await, Server::start_old().await] {
        let Some(server) = server else { continue };
        server.other().await.create(json!({})).await;
        let mut writers = Vec::new();
        for writer in 0..4 {
            let other = server.other().await;
            writers.push(tokio::spawn(async move {
                loop {
                    for number in 0..100 {
                        let subject = format!("$KV.test.key.{}", (number * 7 + writer) % 20);
                        other.client.publish(subject, "x".into()).await.unwrap();
                    }
                    other.put(&format!("key.{writer}"), "x").await;
                }
            }));
        }
        until("all keys are there", async || server.other().await.state().await["num_subjects"] == 20).await;
        for _ in 0..5 {
            let (node, nkv) = server.node().await;
            assert_eq!(nkv.list("*").await.unwrap().len(), 20);
            node.shutdown().await.unwrap();
        }
        writers.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

/// A consumer that has nothing more says up to where there was nothing: else a node could not tell removed messages from those that
/// are yet to come, from a server that is behind its leader.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_level_although_the_last_messages_were_removed() {
    for (server, settings) in [
        (Server::start().await, json!({})),
        (Server::start().await, json!({ "max_msgs_per_subject": 5 })),
        (Server::start_old().await, json!({})),
        (Server::start_old().await, json!({ "max_msgs_per_subject": 5 })),
    ] {
        let Some(server) = server else { continue };
        let other = server.other().await;
        other.create(settings).await;
        for key in ["a", "b", "c", "c"] {
            other.put(key, "x").await;
        }
        other.api("STREAM.PURGE.BUCKET", json!({ "filter": "$KV.test.c" })).await;
        let last = other.state().await["last_seq"].as_u64().unwrap();
        let (_node, nkv) = server.node().await;
        assert_eq!((nkv.list("*").await.unwrap().len(), nkv.revision().get()), (2, last));
    }
}
