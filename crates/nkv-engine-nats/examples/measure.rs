//! Measures a node in front of NATS beside async-nats' own key-value client. Needs a server, as the tests do:
//!
//! ```text
//! scripts/servers-nats.sh target/servers/nats
//! NKV_TEST_DIR=/var/tmp cargo run --release -p nkv-engine-nats --example measure
//! ```

#![allow(clippy::unwrap_used)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use async_nats::jetstream::kv::Store;
use nkv_node::{Handle, Node};
use serde_json::json;
use support::{Server, healthy};

const VALUE: &[u8] = &[b'x'; 100];
const ROUNDS: usize = 10;
const PUTS_OF_ROUND: usize = 400;
const WRITERS: usize = 50;
const SPAN: Duration = Duration::from_secs(2);
const KEYS: usize = 100_000;

#[tokio::main]
async fn main() {
    for server in [Server::start().await, Server::start_old().await] {
        let Some(server) = server else { continue };
        server.other().await.create(json!({})).await;
        let jetstream = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
        let own = jetstream.get_key_value("test").await.unwrap();
        // A program that uses NATS alone has no consumer in its bucket.
        let alone = latency_of_own(&own).await;
        let writer = own.clone();
        let alone_rate = rate(move |number| {
            let own = writer.clone();
            async move { _ = own.put(format!("rate.{number}"), VALUE.into()).await.unwrap() }
        })
        .await;
        let (node, nkv) = server.node().await;
        println!("puts_of_50_own_per_s = {alone_rate}");
        latency(&own, &nkv, alone).await;
        let writer = nkv.clone();
        let through = rate(move |number| {
            let nkv = writer.clone();
            async move { _ = nkv.put(format!("rate.{number}"), VALUE).await.unwrap() }
        })
        .await;
        println!("puts_of_50_nkv_per_s = {through}");
        println!("puts_of_50_ratio = {:.2}", through as f64 / alone_rate as f64);
        node.shutdown().await.unwrap();
        for part in 0..KEYS / 500 {
            let puts = (0..500).map(|number| own.put(format!("key.{:06}", part * 500 + number), VALUE.into()));
            futures_util::future::join_all(puts).await;
        }
        for _ in 0..3 {
            let began = Instant::now();
            let node = Node::builder().engine(server.engine()).start().await.unwrap();
            healthy(&node.handle()).await;
            println!("ready_with_{KEYS}_keys_ms = {}", began.elapsed().as_millis());
            node.shutdown().await.unwrap();
        }
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

async fn latency_of_own(own: &Store) -> Duration {
    let mut times = Vec::new();
    for number in 0..ROUNDS * PUTS_OF_ROUND {
        let began = Instant::now();
        own.put(format!("lat.{}", number % 100), VALUE.into()).await.unwrap();
        times.push(began.elapsed());
    }
    median(times)
}

async fn latency(own: &Store, nkv: &Handle, alone: Duration) {
    let (mut of_own, mut of_nkv) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        for number in 0..PUTS_OF_ROUND {
            let began = Instant::now();
            own.put(format!("lat.{}", number % 100), VALUE.into()).await.unwrap();
            of_own.push(began.elapsed());
        }
        for number in 0..PUTS_OF_ROUND {
            let began = Instant::now();
            nkv.put(format!("lat.{}", number % 100), VALUE).await.unwrap();
            of_nkv.push(began.elapsed());
        }
    }
    let (beside, through) = (median(of_own), median(of_nkv));
    println!(
        "put_p50_us = own alone {}, own beside a node {}, nkv {}",
        alone.as_micros(),
        beside.as_micros(),
        through.as_micros()
    );
    println!("added_p50_us = {}", through.saturating_sub(alone).as_micros());
}

async fn rate<F: Future<Output = ()> + Send + 'static>(
    put: impl Fn(usize) -> F + Clone + Send + Sync + 'static,
) -> u64 {
    let (count, end) = (Arc::new(AtomicU64::new(0)), Instant::now() + SPAN);
    let writers: Vec<_> = (0..WRITERS)
        .map(|number| {
            let (put, count) = (put.clone(), Arc::clone(&count));
            tokio::spawn(async move {
                while Instant::now() < end {
                    put(number).await;
                    count.fetch_add(1, Relaxed);
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    count.load(Relaxed) / SPAN.as_secs()
}
