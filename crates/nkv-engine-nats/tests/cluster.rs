//! Three servers, of which one may go.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use nkv_engine_nats::{NatsEngine, Options};
use nkv_node::{ErrorKind, Node};
use serde_json::json;
use support::{PATIENCE, Server, healthy, until};

#[tokio::test(flavor = "multi_thread")]
async fn the_death_of_a_leader_loses_nothing_that_was_acknowledged() {
    let Some(mut servers) = Server::start_three(None).await else { return };
    let options = Options::new(servers.iter().map(Server::url), "test").unwrap().with_replicas(3);
    let mut nodes = Vec::new();
    for _ in 0..2 {
        nodes.push(Node::builder().engine(NatsEngine::new(options.clone())).start().await.unwrap());
    }
    let (a, b) = (nodes[0].handle(), nodes[1].handle());
    healthy(&a).await;
    healthy(&b).await;
    let epoch = a.epoch();
    let writer = {
        let (a, b) = (a.clone(), b.clone());
        tokio::spawn(async move {
            // The last value of each key that was acknowledged, and the last one after it whose outcome is unknown.
            let mut known = BTreeMap::<String, (u32, u32)>::new();
            let (mut refused, mut unknown, began) = (0, 0, Instant::now());
            for number in 1.. {
                let key = format!("k{}", number % 20);
                let nkv = if number % 2 == 0 { &a } else { &b };
                match nkv.put(key.as_str(), number.to_string()).await {
                    Ok(_) => drop(known.insert(key, (number, number))),
                    Err(error) if *error.kind() == ErrorKind::OutcomeUnknown => {
                        known.entry(key).or_insert((0, 0)).1 = number;
                        unknown += 1;
                    }
                    Err(error) => {
                        assert_eq!(*error.kind(), ErrorKind::Refused { status: 503 }, "{error}");
                        refused += 1;
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
                if began.elapsed() > Duration::from_secs(9) {
                    println!("TEST of_{number}_writes = {refused} refused, {unknown} unknown");
                    break;
                }
            }
            known
        })
    };
    tokio::time::sleep(Duration::from_secs(1)).await;
    let info = servers[0].other().await.api("STREAM.INFO.BUCKET", json!({})).await;
    let leader = info["cluster"]["leader"].as_str().expect("the bucket has a leader");
    let leader: usize = leader[1..].parse().unwrap();
    servers[leader].kill();
    let killed = Instant::now();
    until("a node is stale", async || {
        a.health().await.is_err() || b.health().await.is_err() || killed.elapsed() > Duration::from_secs(3)
    })
    .await;
    healthy(&a).await;
    healthy(&b).await;
    println!("TEST in_reach_after_the_death_of_the_leader_ms = {}", killed.elapsed().as_millis());
    servers[leader].run().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let known = tokio::time::timeout(PATIENCE, writer).await.unwrap().unwrap();
    healthy(&a).await;
    healthy(&b).await;
    assert_eq!((a.epoch(), b.epoch()), (epoch, epoch), "an epoch began though nothing went back");
    a.put("end", "1").await.unwrap();
    until("both are as far", async || b.exists("end").await.unwrap()).await;
    for (key, (acknowledged, possible)) in known {
        for nkv in [&a, &b] {
            let value = nkv.get(key.as_str()).await.unwrap().map(|entry| entry.value.to_vec()).unwrap_or_default();
            let value: u32 = String::from_utf8(value).unwrap().parse().unwrap_or(0);
            assert!((acknowledged..=possible).contains(&value), "{key}: {value} is not in {acknowledged}..={possible}");
        }
    }
}
