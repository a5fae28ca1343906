//! The engine keeps the contract, on a new server and on an old one.

#![allow(clippy::unwrap_used)]

mod support;

use nkv_node::Engine;
use nkv_testkit::engine::check;
use serde_json::json;
use support::Server;

#[tokio::test(flavor = "multi_thread")]
async fn the_engine_keeps_the_contract_on_a_new_server() {
    let Some(server) = Server::start().await else { return };
    check(|| server.engine()).await;
    let engine = server.engine();
    engine.check().await.unwrap();
    let can = engine.abilities();
    assert!(can.conditions && can.batches && can.wildcards && can.ttl && !can.meta, "{can:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_engine_keeps_the_contract_on_an_old_server_and_imitates_nothing() {
    let Some(server) = Server::start_old().await else { return };
    check(|| server.engine()).await;
    let engine = server.engine();
    engine.check().await.unwrap();
    let can = engine.abilities();
    assert!(can.conditions && !can.batches && can.wildcards && !can.ttl && !can.meta, "{can:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_engine_keeps_the_contract_on_a_plain_bucket_with_a_history() {
    let Some(server) = Server::start().await else { return };
    server.other().await.create(json!({ "max_msgs_per_subject": 5 })).await;
    check(|| server.engine()).await;
    let engine = server.engine();
    engine.check().await.unwrap();
    let can = engine.abilities();
    assert!(
        can.conditions && !can.batches && can.wildcards && !can.ttl,
        "the server could, the bucket cannot: {can:?}"
    );
}
