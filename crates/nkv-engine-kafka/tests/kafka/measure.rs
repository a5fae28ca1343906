//! Figures, beside those of Kafka's own client on the same broker:
//! `cargo test --release -p nkv-engine-kafka --test kafka measure -- --ignored --nocapture --test-threads 1`

use std::time::{Duration, Instant};

use nkv_node::Handle;

use crate::support::{ready, shared};

const LEN: usize = 100;
const ROUNDS: usize = 3;

async fn put(nkv: &Handle, number: usize) -> Duration {
    let began = Instant::now();
    nkv.put(format!("b.{}", number % 100), "v".repeat(LEN)).await.unwrap();
    began.elapsed()
}

fn median(mut took: Vec<Duration>) -> Duration {
    took.sort_unstable();
    took[took.len() / 2]
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes"]
async fn measure_puts() {
    let Some(shared) = shared() else { return };
    let (own, theirs) = (shared.topic(), shared.topic());
    let (_node, nkv) = shared.node(&own).await;
    shared.engine(&theirs).check().await.unwrap();
    for round in 0..=ROUNDS {
        let len = LEN.to_string();
        let client = shared.foreign.done(&["bench", &theirs, "3000", "1", &len]);
        let mut took = Vec::new();
        for number in 0..3_000 {
            took.push(put(&nkv, number).await);
        }
        let client_at_once = shared.foreign.done(&["bench", &theirs, "30000", "50", &len]);
        let began = Instant::now();
        let writing: Vec<_> = (0..50)
            .map(|_| {
                let nkv = nkv.clone();
                tokio::spawn(async move {
                    for number in 0..600 {
                        put(&nkv, number).await;
                    }
                })
            })
            .collect();
        for one in writing {
            one.await.unwrap();
        }
        let rate = 30_000.0 / began.elapsed().as_secs_f64();
        if round > 0 {
            println!(
                "TEST put p50: nkv = {:?}, client = {} us; 50 x 1: nkv = {rate:.0}/s, client = {}/s",
                median(took),
                client.split(' ').next().unwrap(),
                client_at_once.split(' ').next_back().unwrap(),
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes"]
async fn measure_starts() {
    let Some(shared) = shared() else { return };
    let (topic, uncompacted) = (shared.topic(), shared.topic());
    shared.engine(&topic).check().await.unwrap();
    shared.foreign.done(&["create", &uncompacted, "1", "cleanup.policy=compact", "min.compaction.lag.ms=3600000"]);
    for (topic, rounds) in [(&topic, 1), (&topic, 49), (&uncompacted, 1), (&uncompacted, 49)] {
        for _ in 0..rounds {
            shared.foreign.done(&["fill", topic, "100000", "1", "100"]);
        }
        for _ in 0..ROUNDS {
            let began = Instant::now();
            let (node, nkv) = ready(shared.engine(topic)).await;
            let took = began.elapsed();
            println!("TEST ready with 100000 keys of {topic} after {rounds} more rounds = {took:?}");
            assert_eq!(nkv.list("*").await.unwrap().len(), 100_000);
            node.shutdown().await.unwrap();
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
    }
}
