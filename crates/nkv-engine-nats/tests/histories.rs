//! Clients and subscribers of three nodes in front of one NATS server: everything that they are answered and sent is checked.
//! `NKV_SEED` chooses another history, `NKV_HISTORY_SECONDS` a longer one.

#![allow(clippy::unwrap_used)]

mod support;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use nkv_engine_nats::NatsEngine;
use nkv_testkit::histories::nodes::{Disturbance, NODES, Site, length, record, seed};
use rustix::process::Signal;
use serde_json::json;
use support::{Proxy, Server, Way};

struct Nats {
    server: Server,
    proxies: Vec<Proxy>,
    /// Markers of deletes may be purged.
    can_purge: bool,
}

impl Site for Nats {
    type Engine = NatsEngine;

    fn engine(&self, node: usize) -> NatsEngine {
        self.proxies.get(node).map_or_else(|| self.server.engine(), Proxy::engine)
    }

    async fn disturb(&mut self, what: Disturbance) {
        match what {
            Disturbance::Cut(node) => self.proxies[node].set(Way::Cut),
            Disturbance::Deafen(node) => self.proxies[node].set(Way::Deaf),
            Disturbance::Heal => self.proxies.iter().for_each(|proxy| proxy.set(Way::Open)),
            Disturbance::Stop => self.server.signal(Signal::STOP),
            Disturbance::Continue => self.server.signal(Signal::CONT),
            Disturbance::Restart => {
                self.server.kill();
                self.server.run().await;
            }
            Disturbance::Forget if self.can_purge => self.purge_markers().await,
            Disturbance::Forget => {}
        }
    }
}

impl Nats {
    /// Removes what is left of deleted keys, and nothing that was put meanwhile.
    async fn purge_markers(&self) {
        let other = self.server.other().await;
        let info = other.api("STREAM.INFO.BUCKET", json!({ "subjects_filter": ">" })).await;
        let subjects = info["state"]["subjects"].as_object().cloned().unwrap_or_default();
        for subject in subjects.keys().filter(|subject| subject.starts_with("$KV.test.")) {
            let last = other.api("STREAM.MSG.GET.BUCKET", json!({ "last_by_subj": subject })).await;
            let headers = STANDARD.decode(last["message"]["hdrs"].as_str().unwrap_or_default()).unwrap();
            if String::from_utf8(headers).unwrap().contains("KV-Operation") {
                let seq = last["message"]["seq"].as_u64().unwrap() + 1;
                other.api("STREAM.PURGE.BUCKET", json!({ "filter": subject, "seq": seq })).await;
            }
        }
    }
}

async fn judge(server: Option<Server>, can_purge: bool, name: &str) {
    let Some(server) = server else { return };
    let mut proxies = Vec::new();
    for _ in 0..NODES {
        proxies.push(Proxy::start(server.port).await);
    }
    record(Nats { server, proxies, can_purge }, seed(16), length(9)).await.judge(name);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_three_nodes_agree_on_one_history() {
    judge(Server::start().await, true, "nats").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_three_nodes_in_front_of_an_old_server_agree_on_one_history() {
    // While this one purges by subject, it keeps messages from consumers: nodes have it keep its markers.
    judge(Server::start_old().await, false, "nats 2.9").await;
}
