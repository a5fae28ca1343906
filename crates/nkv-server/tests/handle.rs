//! The store from within the process.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use nkv_core::{Action, EventKind, Key, Op, Outcome, Pattern, PutOptions, Reason, Revision};
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
    let only = WriteOptions { if_revision: Some(Revision::ZERO), ttl: None };
    let conflict = nkv.put(&key("a.b"), "2", only).await.unwrap_err();
    assert!(matches!(conflict, HandleError::Conflict { revision } if revision == first));
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
    assert!(matches!(nkv.delete(&Pattern::All, None).await, Err(HandleError::NotFound)));

    let short = WriteOptions { ttl: Some(Duration::from_millis(20)), ..WriteOptions::default() };
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
