//! Clients and subscribers of three nodes in front of one broker: everything that they are answered and sent is checked. The log is
//! compacted all the time, and what is left of deletes is removed after some seconds. `NKV_SEED` chooses another history,
//! `NKV_HISTORY_SECONDS` a longer one.

use nkv_engine_kafka::{KafkaEngine, Options};
use nkv_testkit::histories::nodes::{Disturbance, NODES, Site, length, record, seed};
use rustix::process::Signal;
use tokio::task::block_in_place;

use crate::away::{OWN, OWN_BROKER};
use crate::support::{Broker, Foreign, PROXIES, Proxy, Way, kafka};

const TOPIC: &str = "history";

struct Kafka {
    broker: Broker,
    proxies: Vec<Proxy>,
}

impl Site for Kafka {
    type Engine = KafkaEngine;

    fn engine(&self, node: usize) -> KafkaEngine {
        let direct = || Options::new([self.broker.address()], TOPIC).unwrap();
        KafkaEngine::new(self.proxies.get(node).map_or_else(direct, |proxy| proxy.options(TOPIC)))
    }

    async fn disturb(&mut self, what: Disturbance) {
        let set = |node: usize, way| _ = self.proxies[node].way.send_replace(way);
        match what {
            Disturbance::Cut(node) => set(node, Way::Cut),
            Disturbance::Deafen(node) => set(node, Way::Deaf),
            Disturbance::Heal => (0..NODES).for_each(|node| set(node, Way::Open)),
            Disturbance::Stop => self.broker.signal(Signal::STOP),
            Disturbance::Continue => self.broker.signal(Signal::CONT),
            Disturbance::Restart => block_in_place(|| {
                self.broker.kill();
                self.broker.run();
            }),
            // It does so by itself, and has no other members.
            Disturbance::Forget | Disturbance::Part => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_three_nodes_agree_on_one_history() {
    const { assert!(PROXIES >= NODES) };
    let Some(libs) = kafka() else { return };
    let _alone = OWN_BROKER.lock().await;
    let broker = Broker::start(&libs, OWN);
    let foreign = Foreign::start(&libs, &broker.address());
    let settings = [
        "create",
        TOPIC,
        "1",
        "cleanup.policy=compact",
        "delete.retention.ms=6000",
        "segment.ms=1000",
        "min.cleanable.dirty.ratio=0.001",
        "max.compaction.lag.ms=1000",
        "min.compaction.lag.ms=0",
    ];
    foreign.done(&settings);
    drop(foreign);
    let mut proxies = Vec::new();
    for number in 0..NODES {
        proxies.push(Proxy::start(&broker, number).await);
    }
    record(Kafka { broker, proxies }, seed(16), length(6)).await.judge("kafka");
}
