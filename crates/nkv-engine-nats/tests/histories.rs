//! Clients and subscribers of three nodes in front of one NATS server, and of three: everything that they are answered and sent is
//! checked.
//! `NKV_SEED` chooses another history, `NKV_HISTORY_SECONDS` a longer one.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use nkv_engine_nats::{NatsEngine, Options};
use nkv_testkit::histories::net::Net;
use nkv_testkit::histories::nodes::{Disturbance, NODES, Site, length, record, seed};
use rustix::process::Signal;
use serde_json::json;
use support::{Proxy, Server, Way};
use tokio::time::sleep;

struct Nats {
    members: Vec<Server>,
    /// Of each node, one to each member.
    proxies: Vec<Vec<Proxy>>,
    net: Option<Net>,
    /// The member that is disturbed.
    turn: usize,
    /// Markers of deletes may be purged.
    can_purge: bool,
}

impl Site for Nats {
    type Engine = NatsEngine;

    fn engine(&self, node: usize) -> NatsEngine {
        let list: Vec<String> = match self.proxies.get(node) {
            Some(proxies) => proxies.iter().map(|proxy| format!("127.0.0.1:{}", proxy.port)).collect(),
            None => self.members.iter().map(Server::address).collect(),
        };
        NatsEngine::new(Options::new(list, "test").unwrap().with_replicas(self.members.len()))
    }

    fn parts(&self) -> bool {
        self.net.is_some()
    }

    async fn disturb(&mut self, what: Disturbance) {
        match what {
            Disturbance::Cut(node) => self.set(node, Way::Cut),
            Disturbance::Deafen(node) => self.set(node, Way::Deaf),
            Disturbance::Heal => {
                (0..NODES).for_each(|node| self.set(node, Way::Open));
                self.net.iter().for_each(Net::heal);
            }
            Disturbance::Stop => self.next().signal(Signal::STOP),
            Disturbance::Continue => self.members[self.turn].signal(Signal::CONT),
            Disturbance::Restart => {
                self.next().kill();
                if self.members.len() > 1 {
                    sleep(Duration::from_millis(700)).await;
                }
                self.members[self.turn].run().await;
            }
            Disturbance::Forget if self.can_purge => self.purge_markers().await,
            Disturbance::Forget => {}
            Disturbance::Part => self.net.iter().for_each(|net| net.part(self.turn)),
        }
    }
}

impl Nats {
    async fn new(members: Vec<Server>, net: Option<Net>, can_purge: bool) -> Self {
        let mut proxies = Vec::new();
        for _ in 0..NODES {
            let mut of_node = Vec::new();
            for member in &members {
                of_node.push(Proxy::to(member.address()).await);
            }
            proxies.push(of_node);
        }
        Nats { members, proxies, net, turn: 0, can_purge }
    }

    fn set(&self, node: usize, way: Way) {
        self.proxies[node].iter().for_each(|proxy| proxy.set(way));
    }

    fn next(&mut self) -> &mut Server {
        self.turn = (self.turn + 1) % self.members.len();
        &mut self.members[self.turn]
    }

    /// Removes what is left of deleted keys, and nothing that was put meanwhile.
    async fn purge_markers(&self) {
        let other = self.members[0].other().await;
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
    record(Nats::new(vec![server], None, can_purge).await, seed(16), length(9)).await.judge(name);
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_three_nodes_in_front_of_three_members_agree_on_one_history() {
    let Some(members) = Server::start_three(None).await else { return };
    record(Nats::new(members, None, false).await, seed(16), length(6)).await.judge("nats of three members");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs root and a network namespace: scripts/engine-partition.sh"]
async fn clients_of_three_nodes_agree_although_members_are_parted() {
    let net = Net::make(3);
    let members = Server::start_three(Some(&net)).await.expect("nats-server is there");
    record(Nats::new(members, Some(net), false).await, seed(16), length(60)).await.judge("nats, parted");
}
