//! Every call of `nkv.v1.Kv`, and every status that it can give.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::time::Duration;

use common::{Server, code, put, timely, until};
use nkv_grpc::v1::outcome::Outcome as Done;
use nkv_grpc::v1::{
    Conflict, DeleteRequest, ExistsRequest, GetRequest, ListRequest, Operation, PutRequest, StatsRequest, TraceRequest,
    WriteRequest, operation,
};
use nkv_grpc::{Door, Options, conflict_of};
use nkv_node::{Abilities, Node, Pattern, Right, Rights};
use tonic::Code;

fn get(key: &str) -> GetRequest {
    GetRequest { key: key.into() }
}

fn delete(pattern: &str) -> DeleteRequest {
    DeleteRequest { pattern: pattern.into(), ..DeleteRequest::default() }
}

fn list(pattern: &str) -> ListRequest {
    ListRequest { pattern: pattern.into(), ..ListRequest::default() }
}

fn exists(pattern: &str) -> ExistsRequest {
    ExistsRequest { pattern: pattern.into() }
}

#[tokio::test]
async fn what_is_put_is_got_listed_and_deleted() {
    let server = Server::start().await;
    let (mut client, epoch) = (server.client().await, server.handle().epoch().to_string());
    let bytes: Vec<u8> = (0..=255).collect();
    for (key, value) in [("a", &b""[..]), ("a.b", b"x"), ("a.c", &bytes), ("d", b"\xff\0")] {
        let done = client.put(put(key, value)).await.unwrap().into_inner();
        assert_eq!(done.epoch, epoch);
        let got = client.get(get(key)).await.unwrap().into_inner();
        assert_eq!((&got.value[..], got.revision, &got.epoch), (value, done.revision, &epoch));
    }
    assert_eq!(code(client.get(get("a.x")).await), Code::NotFound);

    let listed = client.list(list("a.*")).await.unwrap().into_inner();
    let entries: Vec<_> = listed.entries.iter().map(|entry| (&*entry.key, &entry.value[..], entry.revision)).collect();
    assert_eq!(entries, [("a.b", &b"x"[..], 2), ("a.c", &bytes[..], 3)]);
    assert_eq!((listed.more, listed.epoch), (false, epoch.clone()));
    let keys = client.list(ListRequest { keys_only: true, ..list("*") }).await.unwrap().into_inner();
    assert!(keys.entries.iter().all(|entry| entry.value.is_empty()) && keys.entries.len() == 4);

    for (pattern, is_there) in [("a.*", true), ("a.x", false), ("a", true), ("x.*", false)] {
        assert_eq!(client.exists(exists(pattern)).await.unwrap().into_inner().exists, is_there, "{pattern}");
    }
    let gone = client.delete(delete("a.*")).await.unwrap().into_inner();
    assert_eq!((gone.count, gone.revision), (2, 6));
    let gone = client.delete(delete("a.*")).await.unwrap().into_inner();
    assert_eq!((gone.count, gone.revision, gone.epoch), (0, 0, epoch));
}

#[tokio::test]
async fn pages_follow_one_another_and_end_before_they_are_too_long_for_a_client() {
    let server = Server::start().await;
    let mut client = server.client().await;
    for n in 0..30 {
        server.handle().put(format!("k.{n:02}"), vec![n; 200_000]).await.unwrap();
    }
    let (mut keys, mut after, mut pages) = (Vec::new(), None, 0);
    loop {
        let page = client.list(ListRequest { after: after.clone(), ..list("*") }).await.unwrap().into_inner();
        assert!(prost::Message::encoded_len(&page) < 3 << 20);
        pages += 1;
        keys.extend(page.entries.iter().map(|entry| entry.key.clone()));
        after = keys.last().cloned();
        if !page.more {
            break;
        }
    }
    assert_eq!((keys.len(), keys.is_sorted(), pages), (30, true, 3));

    let two = client.list(ListRequest { limit: Some(2), after: Some("k.05".into()), ..list("k.*") }).await;
    let two = two.unwrap().into_inner();
    let keys: Vec<_> = two.entries.iter().map(|entry| &*entry.key).collect();
    assert_eq!((keys, two.more), (vec!["k.06", "k.07"], true));
    // A limit of none is a limit.
    let none = client.list(ListRequest { limit: Some(0), ..list("k.*") }).await.unwrap().into_inner();
    assert_eq!((none.entries.len(), none.more), (0, true));
}

// A condition of 0 was no condition, and an empty value none: they are sent as such.
#[tokio::test]
async fn conditions_hold_or_fail_with_the_present_revision() {
    let server = Server::start().await;
    let (mut client, epoch) = (server.client().await, server.handle().epoch().to_string());
    let on = |key: &str, if_revision| PutRequest { if_revision: Some(if_revision), ..put(key, "") };
    let present = |revision| Some(Conflict { revision: Some(revision), epoch: epoch.clone() });

    assert_eq!(client.put(on("a", 0)).await.unwrap().into_inner().revision, 1);
    let refused = client.put(on("a", 0)).await.unwrap_err();
    assert_eq!((refused.code(), conflict_of(&refused)), (Code::FailedPrecondition, present(1)));
    let refused = client.put(on("b", 7)).await.unwrap_err();
    assert_eq!((refused.code(), conflict_of(&refused)), (Code::FailedPrecondition, present(0)));
    assert_eq!(client.put(on("a", 1)).await.unwrap().into_inner().revision, 2);
    assert_eq!(client.get(get("a")).await.unwrap().into_inner().value.len(), 0);

    // With its epoch, and with another.
    let of = |epoch: &str| PutRequest { if_epoch: Some(epoch.into()), ..on("a", 2) };
    assert_eq!(client.put(of(&epoch)).await.unwrap().into_inner().revision, 3);
    let refused = client.put(of(&"1".repeat(32))).await.unwrap_err();
    let other = Some(Conflict { revision: None, epoch: epoch.clone() });
    assert_eq!((refused.code(), conflict_of(&refused)), (Code::FailedPrecondition, other));
    assert_eq!(code(client.put(of("no epoch")).await), Code::InvalidArgument);
    let alone = PutRequest { if_epoch: Some(epoch.clone()), ..put("a", "") };
    assert_eq!(code(client.put(alone).await), Code::InvalidArgument);

    let delete_at = |pattern: &str, revision| DeleteRequest { if_revision: Some(revision), ..delete(pattern) };
    let refused = client.delete(delete_at("a", 1)).await.unwrap_err();
    assert_eq!((refused.code(), conflict_of(&refused)), (Code::FailedPrecondition, present(3)));
    assert_eq!(code(client.delete(delete_at("a.*", 3)).await), Code::InvalidArgument);
    assert_eq!(client.delete(delete_at("a", 3)).await.unwrap().into_inner().count, 1);
}

#[tokio::test]
async fn a_value_with_a_ttl_ends() {
    let server = Server::start().await;
    let mut client = server.client().await;
    client.put(PutRequest { ttl_ms: Some(60_000), ..put("a", "x") }).await.unwrap();
    let left = client.get(get("a")).await.unwrap().into_inner().ttl_ms.unwrap();
    let listed = client.list(list("a")).await.unwrap().into_inner().entries[0].ttl_ms.unwrap();
    assert!(listed <= left && (1..=60_000).contains(&listed));
    client.put(PutRequest { ttl_ms: Some(1), ..put("a", "x") }).await.unwrap();
    timely(async { while client.get(get("a")).await.is_ok() {} }).await;
    assert_eq!(code(client.put(PutRequest { ttl_ms: Some(0), ..put("a", "x") }).await), Code::InvalidArgument);
}

fn batch(operations: Vec<operation::Operation>) -> WriteRequest {
    let operations = operations.into_iter().map(|operation| Operation { operation: Some(operation) });
    WriteRequest { operations: operations.collect() }
}

#[tokio::test]
async fn a_batch_has_one_outcome_for_each_operation_in_order() {
    let server = Server::start().await;
    let (mut client, epoch) = (server.client().await, server.handle().epoch().to_string());
    let done = client
        .write(batch(vec![
            operation::Operation::Put(put("a.1", "x")),
            operation::Operation::Put(PutRequest { if_revision: Some(5), ..put("a.2", "y") }),
            operation::Operation::Put(PutRequest { if_revision: Some(0), ..put("a.3", "") }),
            operation::Operation::Delete(delete("b.*")),
            operation::Operation::Delete(delete("a.*")),
            operation::Operation::Delete(DeleteRequest { if_revision: Some(9), ..delete("a.1") }),
            operation::Operation::Put(PutRequest { if_revision: Some(1), ..put("a.1", "z") }),
        ]))
        .await
        .unwrap()
        .into_inner();
    let outcomes: Vec<_> = done.outcomes.into_iter().map(|outcome| outcome.outcome.unwrap()).collect();
    let [
        Done::Put(first),
        Done::Conflict(second),
        Done::Put(third),
        Done::Delete(none),
        Done::Delete(both),
        gone,
        last,
    ] = &outcomes[..]
    else {
        panic!("{outcomes:?}")
    };
    assert_eq!((first.revision, third.revision, &third.epoch), (1, 2, &epoch));
    assert_eq!(second, &Conflict { revision: Some(0), epoch: epoch.clone() });
    assert_eq!(((none.count, none.revision), (both.count, both.revision)), ((0, 0), (2, 4)));
    // What is gone is gone, at whatever revision it was to be deleted.
    assert!(matches!(gone, Done::Delete(gone) if gone.count == 0), "{gone:?}");
    assert_eq!(last, &Done::Conflict(Conflict { revision: Some(0), epoch }));

    // One that cannot be understood leaves the others undone.
    let of_other = PutRequest { if_revision: Some(1), if_epoch: Some("1".repeat(32)), ..put("c", "x") };
    let wrong = [
        (Some(operation::Operation::Put(put("c..d", "x"))), Code::InvalidArgument),
        (
            Some(operation::Operation::Delete(DeleteRequest { if_revision: Some(1), ..delete("c.*") })),
            Code::InvalidArgument,
        ),
        (Some(operation::Operation::Put(of_other)), Code::FailedPrecondition),
        (None, Code::InvalidArgument),
    ];
    for (operation, expected) in wrong {
        let good = Operation { operation: Some(operation::Operation::Put(put("c", "x"))) };
        let operations = vec![good, Operation { operation }];
        assert_eq!(code(client.write(WriteRequest { operations }).await), expected);
        assert_eq!(code(client.get(get("c")).await), Code::NotFound);
    }
    assert_eq!(client.write(batch(Vec::new())).await.unwrap().into_inner().outcomes.len(), 0);
}

#[tokio::test]
async fn keys_and_patterns_that_are_none_are_invalid_arguments() {
    let server = Server::start().await;
    let mut client = server.client().await;
    for key in ["", "a..b", ".a", "a b", "a.*.b", &"k".repeat(1_025)] {
        assert_eq!(code(client.get(get(key)).await), Code::InvalidArgument, "{key}");
        assert_eq!(code(client.put(put(key, "x")).await), Code::InvalidArgument, "{key}");
        assert_eq!(code(client.delete(delete(key)).await), Code::InvalidArgument, "{key}");
        assert_eq!(code(client.list(list(key)).await), Code::InvalidArgument, "{key}");
        assert_eq!(code(client.exists(exists(key)).await), Code::InvalidArgument, "{key}");
        assert_eq!(code(client.trace(TraceRequest { key: key.into() }).await), Code::InvalidArgument, "{key}");
        assert_eq!(code(client.watch(common::watch(&[key])).await), Code::InvalidArgument, "{key}");
        let after = ListRequest { after: Some(key.into()), ..list("*") };
        assert_eq!(code(client.list(after).await), Code::InvalidArgument, "{key}");
    }
    assert_eq!(code(client.put(put("a.*", "x")).await), Code::InvalidArgument);
    assert_eq!(code(client.watch(common::watch(&[])).await), Code::InvalidArgument);
    let wildcard = nkv_grpc::v1::WatchRequest { exact: true, ..common::watch(&["a.*"]) };
    assert_eq!(code(client.watch(wildcard).await), Code::InvalidArgument);
    assert_eq!(server.handle().stats().await.unwrap().subscriptions, 0);
}

#[tokio::test]
async fn trace_and_stats_show_what_the_node_knows() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let request = nkv_grpc::v1::WatchRequest { name: Some("me".into()), ..common::watch(&["a"]) };
    let mut watched = client.watch(request).await.unwrap().into_inner();
    common::up_to_synced(&mut watched).await;
    let subscribers = client.trace(TraceRequest { key: "a.b".into() }).await.unwrap().into_inner().subscribers;
    let [subscriber] = &subscribers[..] else { panic!("{subscribers:?}") };
    assert_eq!((&*subscriber.name, &*subscriber.pattern, subscriber.exact), ("me", "a", false));
    assert!(subscriber.peer.starts_with("127.0.0.1:"), "{subscriber:?}");
    let stats = client.stats(StatsRequest {}).await.unwrap().into_inner();
    assert_eq!((stats.numbers["subscriptions"], stats.numbers["connections"]), (1, 1));
    assert_eq!(
        (&*stats.words["durability"], &*stats.words["epoch"]),
        ("memory", &*server.handle().epoch().to_string())
    );
    // Dropping the stream ends the subscription.
    drop(watched);
    until(|| server.handle().numbers().unwrap().contains(&("subscriptions", 0))).await;
}

#[derive(Debug)]
struct ReadOnly;

impl Rights for ReadOnly {
    fn allows(&self, _: &str, right: Right, pattern: &Pattern) -> bool {
        right == Right::Get && *pattern != Pattern::All
    }
}

#[tokio::test]
async fn what_the_node_refuses_has_its_status() {
    // 403, by a connection that acts for a principal.
    let node = Node::builder().rights(ReadOnly).start().await.unwrap();
    let door = Door::new(node.handle(), Options::default());
    let mut client = nkv_grpc::v1::kv_client::KvClient::new(door.connection_of("a test", "guest"));
    assert_eq!(code(client.put(put("a", "x")).await), Code::PermissionDenied);
    assert_eq!(code(client.delete(delete("a")).await), Code::PermissionDenied);
    assert_eq!(code(client.list(list("*")).await), Code::PermissionDenied);
    assert_eq!(code(client.stats(StatsRequest {}).await), Code::PermissionDenied);
    assert_eq!(code(client.watch(common::watch(&["a"])).await), Code::PermissionDenied);
    assert_eq!(code(client.write(batch(vec![operation::Operation::Put(put("a", ""))])).await), Code::PermissionDenied);
    assert_eq!(code(client.get(get("a")).await), Code::NotFound);
    // The node has stopped.
    drop(client);
    node.shutdown().await.unwrap();
    let mut client = nkv_grpc::v1::kv_client::KvClient::new(door.connection("a test"));
    assert_eq!(code(client.get(get("a")).await), Code::Unavailable);

    // 413, 429.
    let server = Server::with_limits(|limits| (limits.value_len_max, limits.subscriptions_max) = (1_000, 2)).await;
    let mut client = server.client().await;
    assert_eq!(code(client.put(put("a", vec![0; 1_001])).await), Code::ResourceExhausted);
    client.put(put("a", vec![0; 1_000])).await.unwrap();
    let _both = client.watch(common::watch(&["a", "b"])).await.unwrap();
    assert_eq!(code(client.watch(common::watch(&["c"])).await), Code::ResourceExhausted);
    assert_eq!(code(client.watch(common::watch(&["c", "d", "e"])).await), Code::ResourceExhausted);
}

#[tokio::test]
async fn an_engine_that_lacks_an_ability_or_is_out_of_reach_has_its_status() {
    let (server, engine) = Server::scripted().await;
    let mut client = server.client().await;
    engine.set_abilities(Abilities::default());
    assert_eq!(code(client.put(PutRequest { if_revision: Some(0), ..put("b", "x") }).await), Code::Unimplemented);
    assert_eq!(code(client.put(PutRequest { ttl_ms: Some(1_000), ..put("b", "x") }).await), Code::Unimplemented);
    client.put(put("a", "x")).await.unwrap();
    // Done or not: the answer was lost.
    engine.lose_answers(true);
    assert_eq!(code(client.put(put("a", "z")).await), Code::Unknown);
    engine.lose_answers(false);
    engine.cut(true);
    timely(async { while !client.put(put("a", "y")).await.is_err_and(|status| status.code() == Code::Unavailable) {} })
        .await;
    assert!(client.get(get("a")).await.is_ok());
}

#[tokio::test]
async fn a_deadline_is_obeyed() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let mut request = tonic::Request::new(common::watch(&["a"]));
    request.set_timeout(Duration::from_millis(300));
    let mut watched = client.watch(request).await.unwrap().into_inner();
    let ended = timely(async {
        loop {
            if let Err(status) = watched.message().await {
                return status;
            }
        }
    })
    .await;
    assert_eq!(ended.code(), Code::DeadlineExceeded);
    until(|| server.handle().numbers().unwrap().contains(&("subscriptions", 0))).await;

    let mut request = tonic::Request::new(get("a"));
    request.metadata_mut().insert("grpc-timeout", "soon".parse().unwrap());
    assert_eq!(code(client.get(request).await), Code::InvalidArgument);
}
