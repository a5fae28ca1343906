//! Many keys at the start.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Instant;

use bytes::Bytes;
use serde_json::json;
use support::{Other, Server, healthy};

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
