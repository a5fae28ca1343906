//! Clients and subscribers of three nodes in front of one etcd, alone and of three members: everything that they are answered and
//! sent is checked. `NKV_SEED` chooses another history, `NKV_HISTORY_SECONDS` a longer one.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::time::Duration;

use common::{Passing, Proxy, Server};
use nkv_engine_etcd::{EtcdEngine, Options};
use nkv_testkit::histories::net::Net;
use nkv_testkit::histories::nodes::{Disturbance, NODES, Site, length, record, seed};
use tokio::time::sleep;

struct Etcd {
    members: Vec<Server>,
    /// Of each node, one to each member.
    proxies: Vec<Vec<Proxy>>,
    net: Option<Net>,
    /// The member that is disturbed.
    turn: usize,
}

impl Etcd {
    async fn new(members: Vec<Server>, net: Option<Net>) -> Self {
        let mut proxies = Vec::new();
        for _ in 0..NODES {
            let mut of_node = Vec::new();
            for member in &members {
                of_node.push(Proxy::start(member.server()).await);
            }
            proxies.push(of_node);
        }
        Etcd { members, proxies, net, turn: 0 }
    }

    fn set(&self, node: usize, passing: Passing) {
        self.proxies[node].iter().for_each(|proxy| proxy.set(passing));
    }

    fn next(&mut self) -> &mut Server {
        self.turn = (self.turn + 1) % self.members.len();
        &mut self.members[self.turn]
    }
}

impl Site for Etcd {
    type Engine = EtcdEngine;

    fn engine(&self, node: usize) -> EtcdEngine {
        let list: Vec<String> = match self.proxies.get(node) {
            Some(proxies) => proxies.iter().map(Proxy::server).collect(),
            None => self.members.iter().map(Server::server).collect(),
        };
        EtcdEngine::new(Options::new(list, "app").unwrap())
    }

    fn parts(&self) -> bool {
        self.net.is_some()
    }

    fn gathers(&self) -> bool {
        true
    }

    async fn disturb(&mut self, what: Disturbance) {
        match what {
            Disturbance::Cut(node) => self.set(node, Passing::None),
            Disturbance::Deafen(node) => self.set(node, Passing::OneWay),
            Disturbance::Heal => {
                (0..NODES).for_each(|node| self.set(node, Passing::Both));
                self.net.iter().for_each(Net::heal);
            }
            Disturbance::Stop => self.next().signal("STOP"),
            Disturbance::Continue => self.members[self.turn].signal("CONT"),
            Disturbance::Restart if self.members.len() == 1 => self.members[0].restart().await,
            Disturbance::Restart => {
                // The others may have no majority until they are healed: it is not waited for.
                self.next().kill();
                sleep(Duration::from_millis(700)).await;
                self.members[self.turn].run();
            }
            Disturbance::Forget => {
                if let Some(revision) = self.members[self.turn].revision_now() {
                    drop(self.members[self.turn].ctl(&["compact", &revision.to_string()]));
                }
            }
            Disturbance::Part => self.net.iter().for_each(|net| net.part(self.turn)),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_three_nodes_agree_on_one_history() {
    let Some(server) = Server::start().await else { return };
    record(Etcd::new(vec![server], None).await, seed(16), length(9)).await.judge("etcd");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_three_nodes_in_front_of_three_members_agree_on_one_history() {
    let Some(members) = Server::start_three(None).await else { return };
    record(Etcd::new(members, None).await, seed(16), length(6)).await.judge("etcd of three members");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs root and a network namespace: scripts/engine-partition.sh"]
async fn clients_of_three_nodes_agree_although_members_are_parted() {
    let net = Net::make(3);
    let members = Server::start_three(Some(&net)).await.expect("etcd is there");
    record(Etcd::new(members, Some(net)).await, seed(16), length(60)).await.judge("etcd, parted");
}
