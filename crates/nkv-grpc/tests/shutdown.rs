//! The end: what was accepted is answered, streams get a status, and nothing keeps the node from stopping.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::time::{Duration, Instant};

use common::{Server, code, put, timely, try_next, until, up_to_synced, watch};
use nkv_grpc::v1::GetRequest;
use tonic::Code;

#[tokio::test]
async fn a_stalled_watch_does_not_keep_the_node_from_stopping_and_others_are_notified() {
    let server = Server::start().await;
    let (mut slow, mut client, nkv) = (server.slow_client().await, server.client().await, server.handle());
    let mut stalled = slow.watch(watch(&["k"])).await.unwrap().into_inner();
    up_to_synced(&mut stalled).await;
    for n in 0..300 {
        nkv.put(format!("k.{n}"), vec![b'x'; 10_000]).await.unwrap();
    }
    until(|| nkv.peers().unwrap().iter().any(|peer| peer.backlog.queued > 10)).await;
    let mut watched = client.watch(watch(&["other"])).await.unwrap().into_inner();
    up_to_synced(&mut watched).await;

    let began = Instant::now();
    let stopped = tokio::spawn(server.node.shutdown());
    let ended = try_next(&mut watched).await.unwrap_err();
    assert_eq!((ended.code(), ended.message()), (Code::Unavailable, "the server is stopping"));
    timely(stopped).await.unwrap().unwrap();
    timely(server.door).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    // What it had taken, and then that the connection is gone.
    while try_next(&mut stalled).await.is_ok() {}
    assert_eq!(code(client.get(GetRequest { key: "k.1".into() }).await), Code::Unavailable);
}

#[tokio::test]
async fn a_put_that_was_accepted_is_answered() {
    let (server, engine) = Server::scripted().await;
    let mut client = server.client().await;
    // The engine keeps it, and the node has not seen it when it is asked to stop.
    engine.hold(true);
    let began = Instant::now();
    let pending = tokio::spawn(async move { client.put(put("a", "y")).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let stopped = tokio::spawn(server.node.shutdown());
    tokio::time::sleep(Duration::from_millis(100)).await;
    // After a second it is answered all the same, which a busy machine may take.
    assert!(!pending.is_finished() || began.elapsed() >= Duration::from_secs(1));
    engine.hold(false);
    assert_eq!(timely(pending).await.unwrap().unwrap().into_inner().revision, 1);
    timely(stopped).await.unwrap().unwrap();
    timely(server.door).await.unwrap();
}

#[tokio::test]
async fn a_door_that_is_dropped_cuts_its_connections_and_the_node_goes_on() {
    let server = Server::start().await;
    let (mut client, nkv) = (server.client().await, server.handle());
    let mut watched = client.watch(watch(&["a"])).await.unwrap().into_inner();
    up_to_synced(&mut watched).await;
    server.door.abort();
    assert!(try_next(&mut watched).await.is_err());
    until(|| nkv.peers().unwrap().is_empty() && nkv.numbers().unwrap().contains(&("subscriptions", 0))).await;
    nkv.put("a", "x").await.unwrap();
}
