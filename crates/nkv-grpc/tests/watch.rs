//! Watches: what comes in which order, and what a reader that lags is spared.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::time::Duration;

use common::{Server, code, next, put, text, timely, try_next, until, up_to_synced, watch};
use nkv_core::Pattern;
use nkv_grpc::Options;
use nkv_grpc::v1::watch_response::Event;
use nkv_grpc::v1::{GetRequest, WatchRequest};
use nkv_node::{Epoch, Node, PutOptions};
use nkv_testkit::engine::ScriptedEngine;
use tonic::Code;

#[tokio::test]
async fn the_present_state_comes_first_then_each_change() {
    let server = Server::start().await;
    let (mut client, nkv) = (server.client().await, server.handle());
    nkv.put("a.b", "1").await.unwrap();
    nkv.put("a", "").await.unwrap();
    nkv.put("c", "3").await.unwrap();
    let mut watched = client.watch(watch(&["a"])).await.unwrap().into_inner();
    assert_eq!(up_to_synced(&mut watched).await, ["began 3", "put a  2 0", "put a.b 1 1 0", "synced 3"]);

    client.put(put("a.b", "2")).await.unwrap();
    assert_eq!(text(&next(&mut watched).await), "put a.b 2 4 0");
    nkv.delete("a.*").await.unwrap();
    assert_eq!(text(&next(&mut watched).await), "delete a.b 5 Deleted 0");
    nkv.put_with("a.t", "x", PutOptions::default().with_ttl(Duration::from_millis(1))).await.unwrap();
    let (mut texts, mut last) = (Vec::new(), String::new());
    while !last.starts_with("delete") {
        last = text(&next(&mut watched).await);
        texts.push(last.clone());
    }
    assert_eq!(texts, ["put a.t x 6 0", "delete a.t 7 Expired 0"]);
}

#[tokio::test]
async fn a_watch_has_several_patterns_and_one_synced() {
    let server = Server::start().await;
    let (mut client, nkv) = (server.client().await, server.handle());
    for key in ["a.x", "b.x", "c.x", "d"] {
        nkv.put(key, "1").await.unwrap();
    }
    // One that another includes is left out.
    let mut watched = client.watch(watch(&["a.*", "c", "a.x"])).await.unwrap().into_inner();
    assert_eq!(up_to_synced(&mut watched).await, ["began 4", "put a.x 1 1 0", "put c.x 1 3 0", "synced 4"]);
    nkv.put("b.x", "2").await.unwrap();
    nkv.put("c.y", "2").await.unwrap();
    assert_eq!(text(&next(&mut watched).await), "put c.y 2 6 0");
}

#[tokio::test]
async fn an_exact_watch_covers_its_key_alone() {
    let server = Server::start().await;
    let (mut client, nkv) = (server.client().await, server.handle());
    nkv.put("a.b", "1").await.unwrap();
    let mut watched = client.watch(WatchRequest { exact: true, ..watch(&["a", "z"]) }).await.unwrap().into_inner();
    assert_eq!(up_to_synced(&mut watched).await, ["began 1", "synced 1"]);
    nkv.put("a.b", "2").await.unwrap();
    nkv.put("z", "3").await.unwrap();
    assert_eq!(text(&next(&mut watched).await), "put z 3 3 0");
}

#[tokio::test]
async fn a_watch_for_changes_only_is_synced_at_once() {
    let server = Server::start().await;
    let (mut client, nkv) = (server.client().await, server.handle());
    nkv.put("a", "1").await.unwrap();
    let request = WatchRequest { changes_only: true, ..watch(&["a", "b"]) };
    let mut watched = client.watch(request).await.unwrap().into_inner();
    assert_eq!(up_to_synced(&mut watched).await, ["began 1", "synced 1"]);
    nkv.put("b", "2").await.unwrap();
    assert_eq!(text(&next(&mut watched).await), "put b 2 2 0");
}

#[tokio::test]
async fn a_large_state_comes_whole() {
    let server = Server::start().await;
    let (mut client, nkv) = (server.client().await, server.handle());
    for n in 0..3_000 {
        nkv.put(format!("k.{n:04}"), vec![b'x'; 1_000]).await.unwrap();
    }
    let mut watched = client.watch(watch(&["*"])).await.unwrap().into_inner();
    let texts = up_to_synced(&mut watched).await;
    assert_eq!(texts.len(), 3_002);
    assert!(texts[1..3_001].is_sorted() && texts.last().unwrap() == "synced 3000");
}

/// What has no slack keeps one change of each key.
fn without_slack() -> Options {
    let mut options = Options::default();
    options.slack = 0;
    options
}

// A queue per watch grew by every change that its reader had not taken.
#[tokio::test]
async fn a_stalled_reader_gets_the_newest_of_each_key_and_how_many_were_left_out() {
    let server = Server::with(without_slack()).await;
    let (mut client, nkv) = (server.slow_client().await, server.handle());
    let mut watched = client.watch(watch(&["k"])).await.unwrap().into_inner();
    up_to_synced(&mut watched).await;
    const KEYS: u64 = 100;
    const ROUNDS: u64 = 60;
    for round in 0..ROUNDS {
        for key in 0..KEYS {
            nkv.put(format!("k.{key}"), format!("{round:04}{}", "x".repeat(2_000))).await.unwrap();
        }
    }
    let backlog = nkv.trace(&nkv_core::Key::new("k.1").unwrap()).unwrap()[0].backlog;
    assert!(backlog.queued as u64 <= KEYS, "{backlog:?}");
    // What lies on the way: windows of HTTP/2, and a piece or two of the server's.
    let held = nkv.peers().unwrap()[0].backlog;
    assert_eq!(held.queued, backlog.queued);
    assert!(client.get(GetRequest { key: "k.1".into() }).await.is_ok());

    let (mut seen, mut last) = (0, vec![0; KEYS as usize]);
    while last.iter().any(|revision| *revision <= (ROUNDS - 1) * KEYS) {
        let Event::Put(put) = next(&mut watched).await else { panic!("no put") };
        let key: usize = put.key[2..].parse().unwrap();
        seen += 1 + put.skipped;
        assert!(put.revision > last[key]);
        last[key] = put.revision;
    }
    assert_eq!(seen, KEYS * ROUNDS);
    drop(watched);
}

// More deletes than a backlog may have: it is given up, and the state comes anew.
#[tokio::test]
async fn after_too_long_a_lag_the_stream_says_reset_and_gives_the_whole_state() {
    let server = Server::with(without_slack()).await;
    let (mut client, nkv) = (server.slow_client().await, server.handle());
    let keys: Vec<String> = (0..6_000).map(|n| format!("a.k{n}")).collect();
    for key in &keys {
        nkv.put(key, vec![b'x'; 100]).await.unwrap();
    }
    nkv.put("b.stays", "1").await.unwrap();
    let mut watched = client.watch(watch(&["a", "b"])).await.unwrap().into_inner();
    up_to_synced(&mut watched).await;
    // So much that the stream stands still.
    for n in 0..100 {
        nkv.put(format!("b.{n}"), vec![b'x'; 20_000]).await.unwrap();
    }
    until(|| nkv.peers().unwrap()[0].backlog.queued > 10).await;
    for key in &keys[..5_999] {
        nkv.delete(key).await.unwrap();
    }
    let (mut resets, mut known) = (Vec::new(), std::collections::BTreeSet::new());
    loop {
        match next(&mut watched).await {
            Event::Reset(reset) => {
                let prefix = format!("{}.", reset.pattern);
                known.retain(|key: &String| !key.starts_with(&prefix));
                resets.push(text(&Event::Reset(reset)));
            }
            Event::Put(put) => _ = known.insert(put.key),
            Event::Delete(gone) => _ = known.remove(&gone.key),
            Event::Synced(synced) => {
                assert_eq!(synced.revision, nkv.stats().await.unwrap().revision);
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    resets.sort();
    resets.dedup();
    assert_eq!(resets, ["reset a Backlog", "reset b Backlog"]);
    let expected: Vec<_> = nkv.get_all("*").await.unwrap().into_iter().map(|entry| entry.key.to_string()).collect();
    let mut known: Vec<_> = known.into_iter().collect();
    known.sort();
    let mut expected = expected;
    expected.sort();
    assert_eq!(known, expected);
    nkv.put("a.new", "1").await.unwrap();
    assert!(matches!(next(&mut watched).await, Event::Put(put) if put.key == "a.new"));
}

#[tokio::test]
async fn where_an_epoch_begins_the_stream_says_reset_and_gives_the_whole_state() {
    let engine = ScriptedEngine::default();
    let node = Node::builder().engine(engine.clone()).start().await.unwrap();
    let server = Server::of(node, Options::default()).await;
    let (mut client, nkv) = (server.client().await, server.handle());
    timely(async {
        while nkv.put("a", "1").await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    let mut watched = client.watch(watch(&["a", "b"])).await.unwrap().into_inner();
    up_to_synced(&mut watched).await;
    engine.begin_anew(Epoch::new(77));
    let (mut resets, epoch) = (Vec::new(), Epoch::new(77).to_string());
    loop {
        match next(&mut watched).await {
            Event::Reset(reset) => {
                assert_eq!(reset.epoch, epoch);
                resets.push(text(&Event::Reset(reset)));
            }
            Event::Synced(synced) => {
                assert_eq!(synced.epoch, epoch);
                break;
            }
            _ => {}
        }
    }
    resets.sort();
    assert_eq!(resets, ["reset a Epoch", "reset b Epoch"]);
}

#[tokio::test]
async fn a_second_watch_of_a_name_and_pattern_replaces_the_first() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let request = WatchRequest { client_uuid: Some("me".into()), ..watch(&["a"]) };
    let mut first = client.watch(request.clone()).await.unwrap().into_inner();
    up_to_synced(&mut first).await;
    let mut second = client.watch(request).await.unwrap().into_inner();
    up_to_synced(&mut second).await;
    assert_eq!(try_next(&mut first).await.unwrap_err().code(), Code::Aborted);
    let ended = server.handle().unsubscribe(&Pattern::new("a").unwrap(), &"me".into()).unwrap();
    assert!(ended);
    assert_eq!(try_next(&mut second).await.unwrap_err().code(), Code::Aborted);
}

// Above HTTP/2's limit of streams, a call waited for ever behind watches that do not end.
#[tokio::test]
async fn a_call_finds_a_stream_beside_as_many_watches_as_there_may_be() {
    let server = Server::with_limits(|limits| limits.subscriptions_max = 250).await;
    let mut client = server.client().await;
    let mut watches = Vec::new();
    for n in 0..250 {
        watches.push(client.watch(watch(&[&format!("k.{n}")])).await.unwrap().into_inner());
    }
    assert_eq!(code(client.watch(watch(&["k.250"])).await), Code::ResourceExhausted);
    timely(client.put(put("k.7", "x"))).await.unwrap();
    up_to_synced(&mut watches[7]).await;
    assert_eq!(server.handle().peers().unwrap()[0].subscriptions, 250);
    drop(watches);
    until(|| server.handle().peers().unwrap()[0].subscriptions == 0).await;
}

// Stalled watches hold what is in their mailboxes and little more, in the budget of the node, which has them begin anew.
#[tokio::test]
async fn past_the_budget_of_the_node_a_stalled_watch_gives_up_its_backlog() {
    let server = Server::with_limits(|limits| limits.queued_max = 4 << 20).await;
    let (mut client, nkv) = (server.slow_client().await, server.handle());
    let mut watched = client.watch(watch(&["k"])).await.unwrap().into_inner();
    up_to_synced(&mut watched).await;
    let value = bytes::Bytes::from(vec![b'x'; 100_000]);
    for n in 0..200 {
        nkv.put(format!("k.{n}"), &value).await.unwrap();
    }
    let held = nkv.peers().unwrap()[0].backlog;
    assert!(held.event_bytes < 6 << 20, "{held:?}");
    let mut keys = std::collections::BTreeSet::new();
    let mut was_reset = false;
    while keys.len() < 200 {
        match next(&mut watched).await {
            Event::Put(put) => _ = keys.insert(put.key),
            Event::Reset(_) => was_reset = true,
            Event::Synced(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(was_reset);
}
