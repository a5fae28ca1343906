//! The contract of engines, with a real etcd.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::Server;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_keeps_the_contract() {
    let Some(server) = Server::start().await else { return };
    nkv_testkit::engine::check(|| server.engine("conform")).await;
}
