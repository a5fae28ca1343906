//! Clients and subscribers of three nodes in front of one etcd: everything that they are answered and sent is checked.
//! `NKV_SEED` chooses another history, `NKV_HISTORY_SECONDS` a longer one.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{Passing, Proxy, Server};
use nkv_engine_etcd::EtcdEngine;
use nkv_testkit::histories::nodes::{Disturbance, NODES, Site, length, record, seed};

struct Etcd {
    server: Server,
    proxies: Vec<Proxy>,
}

impl Site for Etcd {
    type Engine = EtcdEngine;

    fn engine(&self, node: usize) -> EtcdEngine {
        self.proxies.get(node).map_or_else(|| self.server.engine("app"), |proxy| proxy.engine("app"))
    }

    async fn disturb(&mut self, what: Disturbance) {
        match what {
            Disturbance::Cut(node) => self.proxies[node].set(Passing::None),
            Disturbance::Deafen(node) => self.proxies[node].set(Passing::OneWay),
            Disturbance::Heal => self.proxies.iter().for_each(|proxy| proxy.set(Passing::Both)),
            Disturbance::Stop => self.server.signal("STOP"),
            Disturbance::Continue => self.server.signal("CONT"),
            Disturbance::Restart => self.server.restart().await,
            Disturbance::Forget => drop(self.server.must(&["compact", &self.server.revision().to_string()])),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_three_nodes_agree_on_one_history() {
    let Some(server) = Server::start().await else { return };
    let mut proxies = Vec::new();
    for _ in 0..NODES {
        proxies.push(Proxy::start(server.server()).await);
    }
    record(Etcd { server, proxies }, seed(16), length(9)).await.judge("etcd");
}
