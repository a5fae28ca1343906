//! An etcd of three members, of which one after the other is killed or stands still while clients of two nodes write.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{Server, eventually, node};
use nkv_core::Pattern;
use nkv_engine_etcd::{EtcdEngine, Options};
use nkv_node::{ErrorKind, Handle};
use tokio::time::sleep;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Done,
    NotDone,
    Unknown,
}

/// Each write has a key of its own, so that nothing hides what became of it.
async fn write(nkv: Handle, name: usize, stop: Arc<AtomicBool>) -> BTreeMap<String, Said> {
    let mut said = BTreeMap::new();
    while !stop.load(Ordering::Relaxed) {
        let key = format!("w{name}.{}", said.len());
        let answer = match nkv.put(key.as_str(), "1").await {
            Ok(_) => Said::Done,
            Err(error) if *error.kind() == ErrorKind::OutcomeUnknown => Said::Unknown,
            Err(error) => {
                assert_eq!(*error.kind(), ErrorKind::Refused { status: 503 }, "{error}");
                sleep(Duration::from_millis(20)).await;
                Said::NotDone
            }
        };
        said.insert(key, answer);
    }
    said
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whichever_member_fails_nothing_acknowledged_is_lost_and_nothing_refused_is_done() {
    let Some(mut servers) = Server::start_three(None).await else { return };
    let list: Vec<String> = servers.iter().map(Server::server).collect();
    let engine = || EtcdEngine::new(Options::new(list.clone(), "app").unwrap());
    let ((_a, a), (_b, b)) = (node(engine()).await, node(engine()).await);
    let (epoch, stop) = (a.epoch(), Arc::new(AtomicBool::new(false)));
    let clients = [&a, &b, &a, &b].into_iter().enumerate();
    let writing: Vec<_> = clients.map(|(n, nkv)| tokio::spawn(write(nkv.clone(), n, Arc::clone(&stop)))).collect();
    for turn in 0..4 {
        sleep(Duration::from_millis(500)).await;
        let one = &mut servers[turn % 3];
        if turn < 3 {
            one.kill();
            sleep(Duration::from_millis(1_500)).await;
            one.run();
        } else {
            one.signal("STOP");
            sleep(Duration::from_millis(2_500)).await;
            one.signal("CONT");
        }
        one.ready().await;
    }
    for nkv in [&a, &b] {
        eventually("it is back", async || nkv.health().await.is_ok()).await;
    }
    sleep(Duration::from_millis(500)).await;
    stop.store(true, Ordering::Relaxed);
    let mut said = BTreeMap::new();
    for one in writing {
        said.extend(one.await.unwrap());
    }
    let count = |wanted| said.values().filter(|said| **said == wanted).count();
    let (done, not_done, unknown) = (count(Said::Done), count(Said::NotDone), count(Said::Unknown));
    println!("TEST members: acknowledged = {done}, refused = {not_done}, unknown = {unknown}");
    assert!(done > 100, "it hardly wrote");

    let text = servers[0].must(&["get", "app/w", "--prefix", "--keys-only"]);
    let present: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("app/")).collect();
    for (key, said) in &said {
        let is_there = present.binary_search(&key.as_str()).is_ok();
        assert!(
            *said == Said::Unknown || is_there == (*said == Said::Done),
            "{key}: {said:?}, and present: {is_there}"
        );
    }
    for nkv in [&a, &b] {
        eventually("the nodes have the same", async || {
            nkv.get_all(Pattern::All).await.is_ok_and(|all| all.len() == present.len())
        })
        .await;
        assert_eq!(nkv.epoch(), epoch);
    }
}
