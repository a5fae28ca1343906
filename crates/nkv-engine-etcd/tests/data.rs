//! Values, conditions, batches, wildcards and TTLs, beside programs that use etcd without nkv.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::time::Duration;

use common::{PATIENCE, Server, eventually, next, node, raw_put, value};
use nkv_core::{Op, Outcome, Pattern};
use nkv_engine_etcd::EtcdEngine;
use nkv_node::{Engine, EngineError, ErrorKind, Handle, Key, PutOptions, Revision};
use tokio::time::{Instant, timeout};

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

fn put(name: &str, value: &str) -> Op {
    Op::Put { key: key(name), value: value.to_owned().into(), options: nkv_core::PutOptions::default() }
}

fn put_if(name: &str, revision: u64) -> Op {
    let options = nkv_core::PutOptions { if_revision: Some(nkv_core::Revision::new(revision)), expiry: None };
    Op::Put { key: key(name), value: "1".into(), options }
}

fn delete(pattern: &str) -> Op {
    Op::Delete { pattern: Pattern::new(pattern).unwrap(), if_revision: None }
}

fn status<T: std::fmt::Debug>(result: Result<T, nkv_node::Error>) -> (u16, String) {
    let error = result.unwrap_err();
    match error.kind() {
        ErrorKind::Refused { status } => (*status, error.to_string()),
        other => panic!("{other:?}: {error}"),
    }
}

fn leases(server: &Server) -> usize {
    server.must(&["lease", "list"]).lines().skip(1).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_keys_are_shared_with_others_both_ways() {
    let Some(server) = Server::start().await else { return };
    let (_node, nkv) = node(server.engine("app")).await;
    let mut all = nkv.subscribe("*").await.unwrap();
    nkv.put("lamp.hall", "on").await.unwrap();
    assert_eq!(server.must(&["get", "app/lamp.hall", "--print-value-only"]), "on");
    assert_eq!(next(&mut all).await, "lamp.hall=on");
    server.must(&["put", "app/é/a~b", "1"]);
    assert_eq!(next(&mut all).await, "é/a~b=1");
    server.must(&["put", "app2/x", "1"]);
    server.must(&["put", "app/with space", "1"]);
    server.must(&["put", "/app/x", "1"]);
    server.must(&["del", "app/lamp.hall"]);
    assert_eq!(next(&mut all).await, "lamp.hall Deleted");
    assert_eq!(nkv.get_all(Pattern::All).await.unwrap().len(), 1);
    let entry = nkv.get("é/a~b").await.unwrap().unwrap();
    let of_etcd = server.must(&["get", "app/é/a~b", "-w", "fields"]);
    assert!(of_etcd.contains(&format!("\"ModRevision\" : {}", entry.revision.get())), "{of_etcd}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wildcard_deletes_what_nkv_shows_and_nothing_else() {
    let Some(server) = Server::start().await else { return };
    let (_node, nkv) = node(EtcdEngine::new(server.options("app").with_value_len_max(1_000))).await;
    for name in ["app", "app-old", "app2/x", "app/a b", "app/b.", "app/..x", "/app/x", "app/k.has space"] {
        server.must(&["put", name, "foreign"]);
    }
    server.must(&["put", "app/k.large", &"x".repeat(1_001)]);
    for name in ["a", "a.b", "b", "k.a", "k.z", "k", "z/z"] {
        nkv.put(name, "1").await.unwrap();
    }
    let long = PutOptions::default().with_ttl(Duration::from_secs(600));
    nkv.put_with("k.ttl", "1", long).await.unwrap();
    assert_eq!(nkv.delete("k.*").await.unwrap().count, 3);
    assert_eq!(value(&nkv, "k").await.as_deref(), Some("1"));
    assert_eq!(nkv.delete("*").await.unwrap().count, 5);
    assert_eq!(nkv.delete("*").await.unwrap().count, 0);
    let left = server.must(&["get", "", "--from-key", "--keys-only"]);
    let mut left: Vec<&str> = left.lines().filter(|line| !line.is_empty()).collect();
    left.retain(|name| !name.starts_with("app/..nkv/lease/"));
    let expected = [
        "/app/x",
        "app",
        "app-old",
        "app/..nkv/generation",
        "app/..x",
        "app/a b",
        "app/b.",
        "app/k.has space",
        "app/k.large",
        "app2/x",
    ];
    assert_eq!(
        left.iter().filter(|name| !name.ends_with("fence")).collect::<Vec<_>>(),
        expected.iter().collect::<Vec<_>>()
    );
    eventually("the lease of a deleted value is revoked", async || leases(&server) == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wildcard_goes_key_by_key_around_too_many_foreign_keys() {
    let Some(server) = Server::start().await else { return };
    let (_node, nkv) = node(server.engine("app")).await;
    for part in 0..2 {
        let names: String = (0..100).map(|n| format!("put \"app/k.{part}{n:02} x\" foreign\n")).collect();
        server.txn(&names);
    }
    for n in 0..200 {
        nkv.put(format!("k.{n:03}").as_str(), "1").await.unwrap();
    }
    let mut stream = nkv.subscribe("k").await.unwrap();
    for _ in 0..200 {
        next(&mut stream).await;
    }
    assert_eq!(nkv.delete("k.*").await.unwrap().count, 200);
    assert_eq!(nkv.exists("k.*").await, Ok(false));
    assert_eq!(
        server.must(&["get", "app/k.", "--prefix", "--count-only", "-w", "fields"]).lines().last(),
        Some("\"Count\" : 200")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_branch_is_deleted_in_one_step() {
    const KEYS: usize = 100_000;
    let Some(server) = Server::start().await else { return };
    let (first, nkv) = node(server.engine("app")).await;
    fill(&nkv, KEYS).await;
    first.shutdown().await.unwrap();
    let began = Instant::now();
    let (_node, nkv) = node(server.engine("app")).await;
    println!("TEST ready with {KEYS} keys = {} ms", began.elapsed().as_millis());
    assert_eq!(nkv.get_all(Pattern::All).await.unwrap().len(), KEYS);
    nkv.put("kept", "1").await.unwrap();
    let mut changes = nkv.changes(None).unwrap();
    let before = server.revision();
    let deleted = nkv.delete("many.*").await.unwrap();
    assert_eq!(
        (deleted.count, deleted.revision.map(Revision::get)),
        (KEYS as u64, Some(before + 1)),
        "it is one step of etcd"
    );
    // Its own delete is waited for, for a second.
    eventually("all are gone", async || nkv.get_all(Pattern::All).await.unwrap().len() == 1).await;
    let group = timeout(PATIENCE, changes.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(group.changes.len(), KEYS, "and one of the node");
}

async fn fill(nkv: &Handle, keys: usize) {
    let value = "v".repeat(100);
    let put = |n: usize| put(&format!("many.{:03}.{n:06}", n / 100), &value);
    let mut batches: Vec<Vec<Op>> = Vec::new();
    for start in (0..keys).step_by(100) {
        batches.push((start..start + 100).map(put).collect());
    }
    for some in batches.chunks(8) {
        let writing: Vec<_> = some
            .iter()
            .map(|ops| {
                let (nkv, ops) = (nkv.clone(), ops.clone());
                tokio::spawn(async move { nkv.write(ops).await.unwrap() })
            })
            .collect();
        for one in writing {
            one.await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_is_one_step_and_its_limits_are_named() {
    let Some(server) = Server::start().await else { return };
    let (_node, nkv) = node(server.engine("app")).await;
    let many = |count: usize| (0..count).map(|n| put(&format!("k{n}"), "1")).collect::<Vec<_>>();
    let before = server.revision();
    assert_eq!(nkv.write(many(128)).await.unwrap().len(), 128);
    assert_eq!(server.revision(), before + 1);
    let (code, message) = status(nkv.write(many(129)).await);
    assert!(code == 413 && message.contains("128"), "{code} {message}");
    let (code, message) = status(nkv.write(vec![put("a", "1"), put("a", "2")]).await);
    assert!(code == 413 && message.contains("once"), "{code} {message}");
    assert_eq!(server.revision(), before + 1, "what is refused changes nothing");
    // Each condition is for its own operation.
    let k0 = nkv.get("k0").await.unwrap().unwrap().revision.get();
    let batch = vec![
        put_if("k0", k0),
        put_if("k1", 1),
        put_if("new", 0),
        delete("k2"),
        delete("none"),
        delete("k3.*"),
        put("b", "1"),
    ];
    let outcomes = nkv.write(batch).await.unwrap();
    let now = nkv_core::Revision::new(before + 2);
    let expected = [
        Outcome::Put { revision: now },
        Outcome::Conflict { revision: nkv_core::Revision::new(k0) },
        Outcome::Put { revision: now },
        Outcome::Deleted { count: 1, revision: now },
        Outcome::NotFound,
        Outcome::NotFound,
        Outcome::Put { revision: now },
    ];
    assert_eq!(outcomes, expected);
    let (code, message) = status(nkv.put("long", vec![0; 1_560_000]).await);
    assert!(code == 413, "{code} {message}");
    let two = |len: usize| vec![put("x", &"v".repeat(len)), put("y", &"v".repeat(len))];
    let (code, message) = status(nkv.write(two(900_000)).await);
    assert!(code == 413 && message.contains("1.5 MiB"), "{code} {message}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conditions_are_on_the_revisions_of_etcd() {
    let Some(server) = Server::start().await else { return };
    let (_a, a) = node(server.engine("app")).await;
    let (_b, b) = node(server.engine("app")).await;
    let at = |revision: Revision| PutOptions::default().with_if_revision(revision);
    let first = a.put_with("k", "1", at(Revision::ZERO)).await.unwrap();
    let conflict = b.put_with("k", "2", at(Revision::ZERO)).await.unwrap_err();
    assert!(matches!(conflict.kind(), ErrorKind::Conflict { revision } if revision.get() == first.get()), "{conflict}");
    // After a conflict the node has seen what was in the way.
    assert_eq!(value(&b, "k").await.as_deref(), Some("1"));
    server.must(&["put", "app/k", "foreign"]);
    assert!(a.put_with("k", "2", at(first)).await.is_err());
    let now = a.get("k").await.unwrap().unwrap();
    assert_eq!(now.value, "foreign");
    assert!(b.delete_if("k", first).await.is_err());
    assert_eq!(b.delete_if("k", now.revision).await.unwrap().count, 1);
    assert_eq!(b.delete_if("k", now.revision).await.unwrap().count, 0, "an absent key is no conflict");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ttl_is_a_lease_that_ends_with_its_value() {
    let Some(server) = Server::start().await else { return };
    let (_a, a) = node(server.engine("app")).await;
    let (_b, b) = node(server.engine("app")).await;
    let ttl = |ms| PutOptions::default().with_ttl(Duration::from_millis(ms));
    let mut stream = b.subscribe("*").await.unwrap();
    a.put_with("short", "1", ttl(1)).await.unwrap();
    assert_eq!(next(&mut stream).await, "short=1");
    // The node that wrote it hides it at its time, although etcd has it for whole seconds.
    eventually("its writer hides it", async || value(&a, "short").await.is_none()).await;
    let lease = server.must(&["lease", "list"]);
    let id = lease.lines().nth(1).expect("it has a lease").to_owned();
    let granted = server.must(&["lease", "timetolive", &id]);
    assert!(granted.contains("granted with TTL(2s)"), "{granted}");
    assert_eq!(next(&mut stream).await, "short Expired");

    // Deleted, or overwritten: no lease is left.
    a.put_with("k", "1", ttl(60_500)).await.unwrap();
    assert_eq!(next(&mut stream).await, "k=1");
    let id = server.must(&["lease", "list"]).lines().nth(1).unwrap().to_owned();
    assert!(server.must(&["lease", "timetolive", &id]).contains("granted with TTL(61s)"));
    b.delete("k").await.unwrap();
    assert_eq!(next(&mut stream).await, "k Deleted");
    eventually("no lease is left", async || leases(&server) == 0).await;
    for _ in 0..5 {
        a.put_with("k", "1", ttl(60_000)).await.unwrap();
        b.put_with("k", "2", ttl(60_000)).await.unwrap();
    }
    eventually("one value has one lease", async || leases(&server) == 1).await;
    a.put("k", "3").await.unwrap();
    eventually("a value without a TTL has none", async || leases(&server) == 0).await;
    assert_eq!(value(&b, "k").await.as_deref(), Some("3"));
    // Refused: no lease either.
    let options = ttl(60_000).with_if_revision(Revision::ZERO);
    for _ in 0..5 {
        assert!(a.put_with("k", "4", options).await.is_err());
    }
    eventually("what was refused has no lease", async || leases(&server) == 0).await;
    // Revoked by others, then put anew.
    a.put_with("k", "5", ttl(60_000)).await.unwrap();
    let id = server.must(&["lease", "list"]).lines().nth(1).unwrap().to_owned();
    server.must(&["lease", "revoke", &id]);
    eventually("it is gone", async || value(&a, "k").await.is_none()).await;
    a.put_with("k", "6", ttl(60_000)).await.unwrap();
    assert_eq!((value(&a, "k").await.as_deref(), leases(&server)), (Some("6"), 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_timer_belongs_to_the_old_value() {
    let Some(server) = Server::start().await else { return };
    let (_a, a) = node(server.engine("app")).await;
    let mut stream = a.subscribe("*").await.unwrap();
    a.put_with("k", "1", PutOptions::default().with_ttl(Duration::from_secs(2))).await.unwrap();
    assert_eq!(next(&mut stream).await, "k=1");
    server.must(&["put", "app/k", "foreign"]);
    assert_eq!(next(&mut stream).await, "k=foreign");
    eventually("the lease ends", async || leases(&server) == 0).await;
    assert_eq!(value(&a, "k").await.as_deref(), Some("foreign"));
    // One that others delete before its time was deleted, by itself or with all.
    for args in [&["del", "app/k"][..], &["del", "app/", "--prefix"]] {
        eventually("writes are taken", async || {
            a.put_with("k", "2", PutOptions::default().with_ttl(Duration::from_secs(60))).await.is_ok()
        })
        .await;
        assert_eq!(next(&mut stream).await, "k=2");
        server.must(args);
        assert_eq!(next(&mut stream).await, "k Deleted");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn foreign_values_that_are_too_long_are_absent() {
    let Some(server) = Server::start_with(&["--max-request-bytes", "8000000"]).await else { return };
    let (_a, a) = node(server.engine("app")).await;
    let mut stream = a.subscribe("*").await.unwrap();
    a.put("k", "1").await.unwrap();
    assert_eq!(next(&mut stream).await, "k=1");
    let mut client = server.client().await;
    client.txn(raw_put("app/k", vec![b'x'; 6_000_000])).await.unwrap();
    assert_eq!(next(&mut stream).await, "k Deleted");
    client.txn(raw_put("app/many.long", vec![b'x'; 6_000_000])).await.unwrap();
    a.put("z", "1").await.unwrap();
    assert_eq!(next(&mut stream).await, "z=1");
    // And where the state is read anew.
    let (_b, b) = node(server.engine("app")).await;
    assert_eq!(b.get_all(Pattern::All).await.unwrap().len(), 1);
    server.must(&["put", "app/k", "short"]);
    assert_eq!(next(&mut stream).await, "k=short");
    // The lease of the value that it takes the place of ends as with any other.
    a.put_with("leased", "1", PutOptions::default().with_ttl(Duration::from_secs(600))).await.unwrap();
    assert_eq!(next(&mut stream).await, "leased=1");
    assert_eq!(leases(&server), 1);
    client.txn(raw_put("app/leased", vec![b'x'; 6_000_000])).await.unwrap();
    assert_eq!(next(&mut stream).await, "leased Deleted");
    eventually("the lease is revoked", async || leases(&server) == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_etcd_is_507_and_deletes_go_on() {
    let Some(server) = Server::start_with(&["--quota-backend-bytes", "4000000"]).await else { return };
    let (_a, a) = node(server.engine("app")).await;
    let mut full = None;
    for n in 0..200 {
        match a.put(format!("k{n}").as_str(), vec![b'x'; 200_000]).await {
            Ok(_) => {}
            // The first that does not fit: etcd refuses it, and does it all the same.
            Err(error) if *error.kind() == ErrorKind::OutcomeUnknown => {}
            refused => {
                full = Some((n, status(refused)));
                break;
            }
        }
    }
    let (n, (code, message)) = full.expect("it is never full");
    assert_eq!(code, 507, "{message}");
    assert_eq!(server.must(&["get", &format!("app/k{n}")]), "", "what was refused was done");
    // etcd before 3.5.2 takes no transaction at all then.
    match a.delete("k0").await {
        Ok(deleted) => assert_eq!(deleted.count, 1),
        Err(error) => assert!(server.version().as_str() < "3.5.2", "{error}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_of_one_caller_take_effect_in_order() {
    let Some(server) = Server::start().await else { return };
    let engine = server.engine("app");
    let (_node, nkv) = node(engine.clone()).await;
    let before = server.revision();
    let mut writes: Vec<Op> = (0..300).map(|n| put(&format!("k{}", n % 70), &n.to_string())).collect();
    writes.insert(150, put_if("k0", 1));
    writes.insert(200, delete("k1"));
    writes.insert(250, put("long", &"x".repeat(1_580_000)));
    let results = engine.write(nkv_core::Epoch::new(7), writes.clone(), false).await.unwrap().results;
    assert_eq!(results.len(), writes.len());
    assert!(matches!(results[150], Err(EngineError::OtherEpoch)), "{:?}", results[150]);
    assert!(matches!(results[250], Err(EngineError::Refused { status: 413, .. })), "{:?}", results[250]);
    let revisions: Vec<u64> = results
        .iter()
        .filter_map(|result| match result {
            Ok(Outcome::Put { revision } | Outcome::Deleted { revision, .. }) => Some(revision.get()),
            _ => None,
        })
        .collect();
    assert!(revisions.len() == 301 && revisions.is_sorted(), "{revisions:?}");
    assert!(server.revision() - before < 100, "plain writes share transactions");
    let last = engine.last().await.unwrap().revision;
    eventually("the node has them", async || nkv.revision().get() >= last.get()).await;
    for n in 230..300 {
        assert_eq!(value(&nkv, &format!("k{}", n % 70)).await, Some(n.to_string()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_writes_of_many_callers_share_transactions_and_each_has_its_own_outcome() {
    let Some(server) = Server::start().await else { return };
    let engine = server.engine("app");
    let (_node, nkv) = node(engine.clone()).await;
    nkv.put("old7", "x").await.unwrap();
    let before = server.revision();
    let callers = (0..60).map(|n| {
        let mut writes = vec![put(&format!("k{n}"), &n.to_string()), delete(&format!("old{n}"))];
        // One key of all: no two of these fit into one transaction.
        writes.extend((n % 10 == 0).then(|| put("hot", &n.to_string())));
        engine.write(nkv_core::Epoch::new(7), writes, false)
    });
    for (n, decided) in futures_util::future::join_all(callers).await.into_iter().enumerate() {
        let results = decided.unwrap().results;
        assert_eq!(results.len(), if n % 10 == 0 { 3 } else { 2 });
        assert!(matches!(results[0], Ok(Outcome::Put { .. })), "{n}: {results:?}");
        let is_deleted = matches!(results[1], Ok(Outcome::Deleted { count: 1, .. }));
        let is_absent = matches!(results[1], Ok(Outcome::NotFound));
        assert!(if n == 7 { is_deleted } else { is_absent }, "{n}: {results:?}");
    }
    let count = server.revision() - before;
    assert!(count < 40, "{count} transactions for 60 callers");
    let last = engine.last().await.unwrap().revision;
    eventually("the node has them", async || nkv.revision().get() >= last.get()).await;
    for n in 0..60 {
        assert_eq!(value(&nkv, &format!("k{n}")).await, Some(n.to_string()));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_refused_of_one_caller_is_refused_to_no_other_and_what_is_given_up_is_not_sent() {
    let Some(server) = Server::start_with(&["--max-request-bytes", "65536"]).await else { return };
    let engine = server.engine("app");
    let (_node, nkv) = node(engine.clone()).await;
    let long = "x".repeat(100_000);
    let callers = (0..40).map(|n| {
        let value = if n % 8 == 7 { &long } else { "x" };
        engine.write(nkv_core::Epoch::new(7), vec![put(&format!("k{n}"), value)], false)
    });
    for (n, decided) in futures_util::future::join_all(callers).await.into_iter().enumerate() {
        let result = decided.unwrap().results.pop().unwrap();
        assert_eq!(result.is_ok(), n % 8 != 7, "{n}: {result:?}");
    }
    let write = |n: usize| engine.write(nkv_core::Epoch::new(7), vec![put(&format!("given{n}"), "x")], false);
    let mut writes: Vec<_> = (0..20).map(write).collect();
    for write in &mut writes {
        assert!(write.as_mut().poll(&mut std::task::Context::from_waker(std::task::Waker::noop())).is_pending());
    }
    writes.truncate(10);
    futures_util::future::join_all(writes).await.into_iter().for_each(|decided| drop(decided.unwrap()));
    write(20).await.unwrap();
    eventually("the node has them", async || value(&nkv, "given20").await.is_some()).await;
    for n in 0..20 {
        assert_eq!(value(&nkv, &format!("given{n}")).await.is_some(), n < 10, "{n}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_a_transaction_that_is_refused_writes_share_transactions_again() {
    let Some(server) = Server::start_with(&["--max-request-bytes", "65536"]).await else { return };
    let engine = server.engine("app");
    let (_node, _nkv) = node(engine.clone()).await;
    let before = server.revision();
    // Each fits, and 64 of them do not.
    let large = (0..64).map(|n| put(&format!("large{n}"), &"x".repeat(2_000)));
    let small = (0..640).map(|n| put(&format!("small{n}"), "x"));
    let writes: Vec<Op> = large.chain(small).collect();
    let results = engine.write(nkv_core::Epoch::new(7), writes, false).await.unwrap().results;
    assert!(results.len() == 704 && results.iter().all(Result::is_ok), "{results:?}");
    let count = server.revision() - before;
    assert!((64..100).contains(&count), "{count} transactions");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_that_is_given_up_leaves_no_lease() {
    let Some(server) = Server::start().await else { return };
    let (_node, nkv) = node(server.engine("app")).await;
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let before = tasks();
    for n in 0..40 {
        let ttl = PutOptions::default().with_ttl(Duration::from_secs(600));
        drop(timeout(Duration::from_micros(100 * n), nkv.put_with("k", "1", ttl)).await);
    }
    eventually("those under way are done", async || tasks() <= before).await;
    eventually("one value has one lease", async || leases(&server) <= 1).await;
}
