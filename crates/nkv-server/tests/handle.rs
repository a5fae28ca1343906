//! The store from within the process.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use nkv_core::{Action, EventKind, Key, Op, Outcome, Pattern, PutOptions, Reason, Revision, WriteError};
use nkv_persist_fs::{FsOptions, FsPersist};
use nkv_server::{HandleError, Server, WriteOptions};
use tokio::time::timeout;

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

#[tokio::test]
async fn a_handle_does_everything_without_a_socket() {
    let server = Server::builder().bind().await.unwrap();
    assert!(server.addresses().is_empty());
    let nkv = server.handle();
    let mut events = nkv.subscribe(Pattern::new("a").unwrap(), "me", true).await.unwrap();

    let first = nkv.put(&key("a.b"), "1", WriteOptions::default()).await.unwrap();
    let only = WriteOptions::default().with_if_revision(Revision::ZERO);
    let conflict = nkv.put(&key("a.b"), "2", only).await.unwrap_err();
    assert!(matches!(conflict, HandleError::Write(WriteError::Conflict { revision }) if revision == first));
    assert_eq!(nkv.get(&key("a.b")).await.unwrap().unwrap().value, "1");
    assert_eq!(nkv.get_all(&Pattern::All).await.unwrap().len(), 1);
    assert_eq!(nkv.list(&Pattern::All, None, 10).await.unwrap().entries, [(key("a.b"), first)]);
    assert!(nkv.exists(&Pattern::new("a.*").unwrap()).await.unwrap());
    assert_eq!(nkv.trace(&key("a.x")).await.unwrap(), [("me".into(), "a".to_owned())]);

    let ops = vec![
        Op::Put { key: key("a.c"), value: "3".into(), options: PutOptions::default() },
        Op::Delete { pattern: Pattern::new("a.*").unwrap(), if_revision: None },
    ];
    let outcomes = nkv.write(ops).await.unwrap();
    assert!(matches!(outcomes[..], [Outcome::Put { .. }, Outcome::Deleted { count: 2, .. }]));
    assert!(matches!(nkv.delete(&Pattern::All, None).await, Err(HandleError::Write(WriteError::NotFound))));

    let short = WriteOptions::default().with_ttl(Duration::from_millis(20));
    nkv.put(&key("a.t"), "gone soon", short).await.unwrap();
    let mut expired = false;
    while !expired {
        let notice = timeout(Duration::from_secs(5), events.next()).await.unwrap().unwrap();
        if let EventKind::Change(change) = notice.event.kind() {
            expired = change.action == Action::Delete { reason: Reason::Expired };
        }
    }
    assert_eq!(nkv.stats().await.unwrap().keys, 0);

    server.shutdown().await.unwrap();
    assert!(matches!(nkv.get(&key("a")).await, Err(HandleError::Stopped)));
    assert!(matches!(nkv.put(&key("a"), "x", WriteOptions::default()).await, Err(HandleError::Stopped)));
    assert!(timeout(Duration::from_secs(5), async { while events.next().await.is_some() {} }).await.is_ok());
}

#[tokio::test]
async fn a_dropped_subscription_is_forgotten() {
    let server = Server::builder().bind().await.unwrap();
    let nkv = server.handle();
    let events = nkv.subscribe(Pattern::All, "me", false).await.unwrap();
    assert_eq!(nkv.stats().await.unwrap().subscriptions, 1);
    drop(events);
    assert_eq!(nkv.stats().await.unwrap().subscriptions, 0);
}

// 32 of 40 were refused: "another process" had the directory.
#[tokio::test]
async fn a_server_that_was_dropped_is_opened_again_at_once() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..40 {
        let path = dir.path().join("data");
        let open = move || FsPersist::open(path, FsOptions::default());
        let server = Server::builder().persist("sync", open).bind().await.unwrap_or_else(|e| panic!("{round}: {e:?}"));
        server.handle().put(&key("a"), "1", WriteOptions::default()).await.unwrap();
    }
}

#[tokio::test]
async fn a_dropped_server_stops() {
    let server = Server::builder().listen("127.0.0.1:0".parse().unwrap()).bind().await.unwrap();
    let address = server.addresses()[0].to_string();
    let nkv = server.handle();
    drop(server);
    let stopped = async {
        while nkv.stats().await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(5), stopped).await.unwrap();
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

// The writer thread waited for a task of the server's runtime to wake it, and so did whoever wrote from elsewhere.
#[test]
fn a_handle_writes_while_the_servers_runtime_stands_still() {
    let servers = runtime();
    let server = servers.block_on(Server::builder().bind()).unwrap();
    let nkv = server.handle();
    let writes = std::thread::spawn(move || {
        runtime().block_on(async {
            for number in 1..=3 {
                let a = key("a");
                let put = nkv.put(&a, "x", WriteOptions::default());
                let revision = timeout(Duration::from_secs(5), put).await.expect("nobody wakes the writer").unwrap();
                assert_eq!(revision, Revision::new(number));
            }
        });
    });
    writes.join().unwrap();
    servers.block_on(server.shutdown()).unwrap();
}

// The writer thread, and with it the directory's lock, outlived a runtime that was dropped with its server.
#[test]
fn a_server_whose_runtime_is_dropped_lets_go_of_its_directory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let servers = runtime();
    let opened = path.clone();
    let open = move || nkv_persist_fs::FsPersist::open(opened, nkv_persist_fs::FsOptions::default());
    let server = servers.block_on(Server::builder().persist("sync", open).bind()).unwrap();
    let put = async { server.handle().put(&key("a"), "x", WriteOptions::default()).await };
    servers.block_on(put).unwrap();
    drop(servers);
    let start = std::time::Instant::now();
    while let Err(error) = nkv_persist_fs::FsPersist::open(&path, nkv_persist_fs::FsOptions::default()) {
        assert!(start.elapsed() < Duration::from_secs(5), "{error}");
        std::thread::yield_now();
    }
    drop(server);
}
