//! A door of a node whose truth lies in an engine: stale is said, and clients that come from another node miss nothing.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::time::Duration;

use nkv_core::{Epoch, Key, Op, PutOptions};
use nkv_http::Options;
use nkv_node::{Engine, Node};
use nkv_testkit::engine::ScriptedEngine;
use support::{PATIENCE, TestDoor};
use tokio::time::{sleep, timeout};

async fn started(engine: &ScriptedEngine) -> TestDoor {
    TestDoor::of(Node::builder().engine(engine.clone()).start().await.unwrap(), Options::default()).await
}

async fn body(door: &TestDoor, path: &str) -> (u16, String) {
    let reply = door.get(path).await;
    (reply.status, String::from_utf8_lossy(&reply.body).into_owned())
}

async fn until(door: &TestDoor, path: &str, is_so: impl Fn(u16, &str) -> bool) -> String {
    let reached = async {
        loop {
            let (status, text) = body(door, path).await;
            if is_so(status, &text) {
                return text;
            }
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, reached).await.expect("in time")
}

/// As another node of the engine does.
async fn put(engine: &ScriptedEngine, value: &'static str) {
    let op = Op::Put { key: Key::new("a").unwrap(), value: value.into(), options: PutOptions::default() };
    engine.write(Epoch::new(1), vec![op], false).await.unwrap();
}

#[tokio::test]
async fn a_node_is_ready_once_it_has_a_state_and_says_when_it_is_stale() {
    let engine = ScriptedEngine::default();
    engine.cut(true);
    let door = started(&engine).await;
    assert_eq!(door.get("/livez").await.status, 200);
    assert_eq!((door.get("/readyz").await.status, door.get("/v1/kv").await.status), (503, 503));
    engine.cut(false);
    assert_eq!(until(&door, "/readyz", |status, _| status == 200).await, "ok\n");
    engine.cut(true);
    let stale = until(&door, "/readyz", |status, text| status == 200 && text != "ok\n").await;
    assert!(stale.starts_with("stale for "), "{stale}");
    assert!(body(&door, "/readyz?verbose").await.1.contains("[!]engine stale for"));
    assert_eq!(door.get("/v1/kv").await.status, 200, "reads go on");
    assert_eq!(door.send("PUT", "/v1/kv/a", &[], b"1").await.status, 503);
}

#[tokio::test]
async fn a_reader_that_has_seen_more_elsewhere_is_given_nothing_older() {
    let engine = ScriptedEngine::default();
    put(&engine, "1").await;
    let door = started(&engine).await;
    until(&door, "/v1/kv/a", |status, _| status == 200).await;
    engine.hold(true);
    put(&engine, "2").await;
    put(&engine, "3").await;
    let after = |revision| format!("/v1/watch?pattern=a&wait=5s&after={}-{revision}", Epoch::new(1));
    // It has seen revision 2 elsewhere, and this node is held back.
    let waiting = {
        let (nkv, address) = (door.nkv.clone(), door.address);
        let (door, path) = (TestDoor { node: None, nkv, address }, after(2));
        tokio::spawn(async move { body(&door, &path).await })
    };
    sleep(Duration::from_millis(100)).await;
    assert!(!waiting.is_finished(), "it is answered from the past");
    engine.hold(false);
    let (status, text) = timeout(PATIENCE, waiting).await.unwrap().unwrap();
    assert!(status == 200 && text.contains("\"value\":\"3\"") && text.contains("\"reset\":false"), "{text}");
    // The engine has not what it has seen: it begins anew.
    let (status, text) = body(&door, &after(9)).await;
    assert!(status == 200 && text.contains("\"value\":\"3\"") && text.contains("\"reset\":true"), "{text}");
    engine.cut(true);
    until(&door, "/readyz", |_, text| text.starts_with("stale")).await;
    assert_eq!(body(&door, &after(9)).await.0, 503);
    // A status that is no success would end a browser's source for good.
    let (status, text) = body(&door, &format!("/v1/watch?pattern=a&after={}-9", Epoch::new(1))).await;
    assert!(status == 200 && text.contains("retry: ") && !text.contains("event:"), "{text}");
}
