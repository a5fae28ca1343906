//! The store from within the process.

#![allow(clippy::unwrap_used)]

use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Waker};
use std::thread::{self, ThreadId};
use std::time::Duration;

use nkv_core::{Change, Epoch, Loaded, Op, Outcome, PersistError, PersistValue, RoutePersist, StoredRef};
use nkv_node::{
    AttachOptions, ErrorKind, Event, GoneReason, Handle, Key, Limits, Node, Pattern, PutOptions, Result, Revision,
    Right, Rights, SubscribeOptions,
};
use nkv_persist_fs::{FsOptions, FsPersist};
use tokio::time::timeout;

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

async fn started() -> (Node, Handle) {
    let node = Node::builder().start().await.unwrap();
    let handle = node.handle();
    (node, handle)
}

fn kind<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.unwrap_err().kind().clone()
}

#[tokio::test]
async fn a_handle_does_everything_without_a_socket() {
    let (node, nkv) = started().await;
    let mut events = nkv.subscribe(&Pattern::new("a").unwrap()).await.unwrap();

    let first = nkv.put(&key("a.b"), "1").await.unwrap();
    let only = PutOptions::default().with_if_revision(Revision::ZERO);
    assert_eq!(kind(nkv.put_with(&key("a.b"), "2", only).await), ErrorKind::Conflict { revision: first });
    let elsewhere = Revision::in_epoch(nkv_core::Epoch::new(1), 1);
    assert_eq!(kind(nkv.delete_if(&key("a.b"), elsewhere).await), ErrorKind::OtherEpoch);
    assert_eq!(nkv.get(&key("a.b")).await.unwrap().unwrap().value, "1");
    assert_eq!(nkv.get_all(&Pattern::All).await.unwrap().len(), 1);
    assert_eq!(nkv.list(&Pattern::All).await.unwrap(), [(key("a.b"), first)]);
    assert!(nkv.exists(&Pattern::new("a.*").unwrap()).await.unwrap());
    assert_eq!(nkv.trace(&key("a.x")).unwrap().len(), 1);

    let ops = vec![
        Op::Put { key: key("a.c"), value: "3".into(), options: nkv_core::PutOptions::default() },
        Op::Delete { pattern: Pattern::new("a.*").unwrap(), if_revision: None },
    ];
    let outcomes = nkv.write(ops).await.unwrap();
    assert!(matches!(outcomes[..], [Outcome::Put { .. }, Outcome::Deleted { count: 2, .. }]));
    assert_eq!(nkv.delete(&Pattern::All).await.unwrap().count, 0);

    let short = PutOptions::default().with_ttl(Duration::from_millis(20));
    nkv.put_with(&key("a.t"), "gone soon", short).await.unwrap();
    loop {
        let event = timeout(Duration::from_secs(5), events.next()).await.unwrap().unwrap();
        if matches!(&event, Event::Gone { reason: GoneReason::Expired, .. }) {
            break;
        }
    }
    assert_eq!(nkv.stats().await.unwrap().keys, 0);

    node.shutdown().await.unwrap();
    assert_eq!(kind(nkv.get(&key("a")).await), ErrorKind::Closed);
    assert_eq!(kind(nkv.put(&key("a"), "x").await), ErrorKind::Closed);
    let ended = async {
        let mut last = None;
        while let Some(event) = events.next().await {
            last = Some(event);
        }
        last
    };
    let last = timeout(Duration::from_secs(5), ended).await.unwrap();
    assert_eq!(last, Some(Event::Ended(nkv_node::EndReason::Closed)));
}

#[tokio::test]
async fn a_dropped_subscription_is_forgotten() {
    let (_node, nkv) = started().await;
    let events = nkv.subscribe(&Pattern::All).await.unwrap();
    assert_eq!(nkv.stats().await.unwrap().subscriptions, 1);
    drop(events);
    assert_eq!(nkv.stats().await.unwrap().subscriptions, 0);
}

// A value of 100 MB put in the process made every remote subscriber connect anew in a loop.
#[tokio::test]
async fn the_limits_of_the_node_hold_in_the_process() {
    let mut limits = Limits::default();
    (limits.value_len_max, limits.subscriptions_total_max) = (1_000, 2);
    let node = Node::builder().limits(limits).start().await.unwrap();
    let nkv = node.handle();
    nkv.put(&key("a"), vec![0; 1_000]).await.unwrap();
    assert_eq!(kind(nkv.put(&key("a"), vec![0; 1_001]).await), ErrorKind::Refused { status: 413 });
    let op = Op::Put { key: key("a"), value: vec![0; 1_001].into(), options: nkv_core::PutOptions::default() };
    assert_eq!(kind(nkv.write(vec![op.clone()]).await), ErrorKind::Refused { status: 413 });
    assert_eq!(kind(nkv.admit(op)), ErrorKind::Refused { status: 413 });

    let _two = (nkv.subscribe(&Pattern::All).await.unwrap(), nkv.subscribe(&Pattern::All).await.unwrap());
    assert_eq!(kind(nkv.subscribe(&Pattern::All).await), ErrorKind::Refused { status: 429 });
}

/// Lets each have the branch of its own name.
#[derive(Debug)]
struct OwnBranch;

impl Rights for OwnBranch {
    fn allows(&self, principal: &str, right: Right, pattern: &Pattern) -> bool {
        right != Right::Admin && Pattern::new(principal).is_ok_and(|own| own.includes(pattern))
    }
}

#[tokio::test]
async fn what_a_principal_may_not_do_is_refused_and_changes_nothing() {
    let node = Node::builder().rights(OwnBranch).start().await.unwrap();
    let (all, me) = (node.handle(), node.handle().as_principal("me"));
    all.put(&key("other"), "1").await.unwrap();
    me.put(&key("me.a"), "1").await.unwrap();
    assert_eq!(me.get_all(&Pattern::new("me.*").unwrap()).await.unwrap().len(), 1);
    let refused = ErrorKind::Refused { status: 403 };
    assert_eq!(kind(me.get(&key("other")).await), refused);
    assert_eq!(kind(me.get_all(&Pattern::All).await), refused);
    assert_eq!(kind(me.list(&Pattern::All).await), refused);
    assert_eq!(kind(me.exists(&Pattern::All).await), refused);
    assert_eq!(kind(me.put(&key("other"), "2").await), refused);
    assert_eq!(kind(me.delete(&Pattern::All).await), refused);
    assert_eq!(kind(me.subscribe(&Pattern::All).await), refused);
    assert_eq!(kind(me.unsubscribe(&Pattern::All, &"x".into())), refused);
    assert_eq!(kind(me.trace(&key("me"))), refused);
    assert_eq!(kind(me.peers()), refused);
    assert_eq!(kind(me.stats().await), refused);
    assert_eq!(kind(me.numbers()), refused);
    assert_eq!(kind(me.words()), refused);
    assert_eq!(kind(me.look_up("other", |_| ())), refused);
    assert_eq!(
        kind(me.changes(None).map_err(|error| match error {
            nkv_node::ChangesError::Refused(error) => error,
            other => panic!("{other}"),
        })),
        refused
    );
    let op = Op::Delete { pattern: Pattern::All, if_revision: None };
    assert_eq!(kind(me.write(vec![op.clone()]).await), refused);
    assert_eq!(kind(me.admit(op)), refused);
    assert_eq!(all.get_all(&Pattern::All).await.unwrap().len(), 2);
}

#[tokio::test]
async fn pages_follow_one_another_without_gap() {
    let (_node, nkv) = started().await;
    for n in 0..5 {
        nkv.put(&key(&format!("k.{n}")), "x").await.unwrap();
    }
    let (mut found, mut after) = (Vec::new(), None);
    loop {
        let mut options = nkv_node::PageOptions::default().with_limit(2);
        options.after = after;
        let page = nkv.list_page(&Pattern::All, options).await.unwrap();
        found.extend(page.items.into_iter().map(|(key, _)| key.as_str().to_owned()));
        if !page.more {
            break;
        }
        after = found.last().map(|last| key(last));
    }
    assert_eq!(found, ["k.0", "k.1", "k.2", "k.3", "k.4"]);
    let none = nkv.get_page(&Pattern::All, nkv_node::PageOptions::default().with_limit(0)).await.unwrap();
    assert!(none.items.is_empty() && none.more);
}

#[tokio::test]
async fn several_patterns_are_one_subscription_that_is_synced_once() {
    let (_node, nkv) = started().await;
    for name in ["a.1", "b", "c"] {
        nkv.put(&key(name), "x").await.unwrap();
    }
    let patterns = ["a", "a.1", "b"].map(|pattern| Pattern::new(pattern).unwrap());
    let mut events = nkv.subscribe_with(patterns, SubscribeOptions::default()).await.unwrap();
    let mut seen = Vec::new();
    while let Some(event) = events.next().await {
        match event {
            Event::Update { entry, .. } => seen.push(entry.key.as_str().to_owned()),
            Event::Synced { .. } => break,
            other => panic!("{other:?}"),
        }
    }
    seen.sort();
    assert_eq!(seen, ["a.1", "b"]);
    nkv.put(&key("c"), "y").await.unwrap();
    nkv.put(&key("b"), "y").await.unwrap();
    assert!(matches!(events.next().await, Some(Event::Update { entry, .. }) if entry.key == key("b")));
}

#[tokio::test]
async fn where_too_much_waited_the_difference_is_delivered_once() {
    let mut limits = Limits::default();
    limits.queued_max = 64 << 10;
    let node = Node::builder().limits(limits).start().await.unwrap();
    let nkv = node.handle();
    for n in 0..10 {
        nkv.put(&key(&format!("k.{n}")), "old").await.unwrap();
    }
    // What does not change is not to come again.
    nkv.put("same", "old").await.unwrap();
    let mut events = nkv.subscribe(&Pattern::All).await.unwrap();
    let mut known = std::collections::BTreeMap::new();
    let mut synced = 0;
    let mut take = |event, known: &mut std::collections::BTreeMap<Key, u64>| match event {
        Event::Update { entry, .. } => {
            let before = known.insert(entry.key, entry.revision.get());
            assert!(before.is_none_or(|before| before < entry.revision.get()), "delivered twice");
        }
        Event::Gone { key, .. } => assert!(known.remove(&key).is_some(), "{key} was not there"),
        Event::Synced { .. } => synced += 1,
        other => panic!("{other:?}"),
    };
    while known.len() < 11 {
        take(events.next().await.unwrap(), &mut known);
    }
    // More than the budget has: what waits is dropped, and the present state is read anew.
    for n in 0..500 {
        nkv.put(&key(&format!("k.{n}")), vec![b'x'; 1_000]).await.unwrap();
    }
    nkv.delete(&Pattern::new("k.3").unwrap()).await.unwrap();
    nkv.put(&key("end"), "1").await.unwrap();
    loop {
        let event = timeout(Duration::from_secs(5), events.next()).await.unwrap().unwrap();
        let is_synced = matches!(event, Event::Synced { .. });
        take(event, &mut known);
        if is_synced && known.contains_key(&key("end")) {
            break;
        }
    }
    let all = nkv.list(&Pattern::All).await.unwrap();
    assert_eq!(known, all.into_iter().map(|(key, revision)| (key, revision.get())).collect());
    assert!(synced > 1, "it was not read anew");
}

/// Takes its time for each event.
#[derive(Debug)]
struct Slow(std::sync::mpsc::SyncSender<(u64, u64)>);

impl nkv_core::Notifier for Slow {
    fn notify(&self, event: &std::sync::Arc<nkv_core::Event>) -> nkv_core::Delivery {
        self.notify_conflated(event, 0)
    }

    fn notify_conflated(&self, event: &std::sync::Arc<nkv_core::Event>, skipped: u64) -> nkv_core::Delivery {
        if let nkv_core::EventKind::Change(change) = event.kind()
            && self.0.send((change.revision.get(), skipped)).is_err()
        {
            return nkv_core::Delivery::Closed;
        }
        nkv_core::Delivery::Queued
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_node_conflates_in_front_of_a_notifier_that_asks_for_it() {
    let (_node, nkv) = started().await;
    let (sender, receiver) = std::sync::mpsc::sync_channel(0);
    let options = AttachOptions::default().with_snapshot(false).with_mailbox();
    let attached = nkv.attach(Pattern::All, Box::new(Slow(sender)), &options).unwrap();
    // The notifier waits for its reader, and no put does.
    for _ in 0..100 {
        timeout(Duration::from_secs(5), nkv.put(&key("a"), "x")).await.unwrap().unwrap();
    }
    let accounted = tokio::task::spawn_blocking(move || {
        let mut accounted = (0, 0);
        while accounted.0 < 100 {
            let (revision, skipped) = receiver.recv_timeout(Duration::from_secs(5)).unwrap();
            accounted = (revision, accounted.1 + skipped + 1);
        }
        accounted
    });
    assert_eq!(accounted.await.unwrap(), (100, 100));
    assert!(!attached.has_ended());
}

// 32 of 40 were refused: "another process" had the directory.
#[tokio::test]
async fn a_node_that_was_dropped_is_opened_again_at_once() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..40 {
        let path = dir.path().join("data");
        let open = move || FsPersist::open(path, FsOptions::default());
        let node = Node::builder().persist("sync", open).start().await.unwrap_or_else(|e| panic!("{round}: {e:?}"));
        node.handle().put(&key("a"), "1").await.unwrap();
    }
}

#[tokio::test]
async fn a_dropped_node_stops() {
    let (node, nkv) = started().await;
    drop(node);
    let stopped = async {
        while nkv.stats().await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(5), stopped).await.unwrap();
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

// The writer thread waited for a task of the node's runtime to wake it, and so did callers of other runtimes.
#[test]
fn a_handle_writes_while_the_nodes_runtime_stands_still() {
    let nodes = runtime();
    let node = nodes.block_on(Node::builder().start()).unwrap();
    let nkv = node.handle();
    let writes = std::thread::spawn(move || {
        runtime().block_on(async {
            for number in 1..=3 {
                let a = key("a");
                let put = nkv.put(&a, "x");
                let revision = timeout(Duration::from_secs(5), put).await.expect("the writer is not woken").unwrap();
                assert_eq!(revision.get(), number);
            }
        });
    });
    writes.join().unwrap();
    nodes.block_on(node.shutdown()).unwrap();
}

// The writer thread, and with it the directory's lock, outlived a runtime that was dropped with its node.
#[test]
fn a_node_whose_runtime_is_dropped_lets_go_of_its_directory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let nodes = runtime();
    let opened = path.clone();
    let open = move || nkv_persist_fs::FsPersist::open(opened, nkv_persist_fs::FsOptions::default());
    let node = nodes.block_on(Node::builder().persist("sync", open).start()).unwrap();
    let put = async { node.handle().put(&key("a"), "x").await };
    nodes.block_on(put).unwrap();
    drop(nodes);
    let start = std::time::Instant::now();
    while let Err(error) = nkv_persist_fs::FsPersist::open(&path, nkv_persist_fs::FsOptions::default()) {
        assert!(start.elapsed() < Duration::from_secs(5), "{error}");
        std::thread::yield_now();
    }
    drop(node);
}

#[tokio::test(flavor = "multi_thread")]
async fn updates_of_many_are_all_done() {
    let (_node, nkv) = started().await;
    let add = |nkv: Handle| async move {
        for _ in 0..25 {
            nkv.update_as("total", |old: Option<u32>| old.unwrap_or(0) + 1).await.unwrap();
        }
    };
    let adding: Vec<_> = (0..4).map(|_| tokio::spawn(add(nkv.clone()))).collect();
    for one in adding {
        one.await.unwrap();
    }
    assert_eq!(nkv.get_as::<u32>("total").await.unwrap(), Some(100));
    nkv.update("total", |_| nkv_node::Edit::<&str>::Delete).await.unwrap();
    assert!(!nkv.exists("total").await.unwrap());
}

#[tokio::test]
async fn a_watch_and_a_branch_follow_the_store_and_say_when_they_end() {
    let (node, nkv) = started().await;
    nkv.put("lamp.hall", "1").await.unwrap();
    let mut hall = nkv.watch_as::<u32>("lamp.hall").await.unwrap();
    let mut lamps = nkv.watch_branch_as::<u32>("lamp").await.unwrap();
    assert_eq!((hall.borrow().value, hall.borrow().is_live), (Some(1), true));
    assert_eq!(lamps.borrow().entries[&key("lamp.hall")], 1);

    nkv.put("lamp.hall", "2").await.unwrap();
    nkv.put("lamp.attic", "dark").await.unwrap();
    let wait = Duration::from_secs(5);
    drop(timeout(wait, hall.wait_for(|hall| hall.value == Some(2))).await.unwrap().unwrap());
    drop(timeout(wait, lamps.wait_for(|lamps| lamps.unreadable.len() == 1)).await.unwrap().unwrap());
    nkv.delete("lamp.*").await.unwrap();
    drop(timeout(wait, lamps.wait_for(|lamps| lamps.unreadable.is_empty() && lamps.entries.is_empty())).await.unwrap());
    drop(timeout(wait, hall.wait_for(|hall| hall.value.is_none())).await.unwrap().unwrap());

    drop(lamps);
    let forgotten = async {
        while nkv.stats().await.unwrap().subscriptions > 1 {
            tokio::task::yield_now().await;
        }
    };
    timeout(wait, forgotten).await.expect("a branch without a holder is followed");
    node.shutdown().await.unwrap();
    drop(timeout(wait, hall.wait_for(|hall| hall.ended.is_some() && !hall.is_live)).await.unwrap());
}

#[tokio::test]
async fn every_change_comes_in_order_with_the_batch_of_its_caller() {
    let (node, nkv) = started().await;
    nkv.put("before", "x").await.unwrap();
    let mut changes = nkv.changes(None).unwrap();
    let since = nkv.stats().await.unwrap().revision;
    nkv.put("a", "1").await.unwrap();
    let put = |name: &str| Op::Put { key: key(name), value: "2".into(), options: nkv_core::PutOptions::default() };
    nkv.write(vec![put("b"), put("c")]).await.unwrap();
    nkv.delete("a").await.unwrap();
    // From where the first reader began.
    let mut again = nkv.changes(Some(Revision::new(since))).unwrap();
    for reader in [&mut changes, &mut again] {
        let mut groups = Vec::new();
        for _ in 0..3 {
            let group = reader.next().await.unwrap().unwrap();
            groups.push(group.changes.iter().map(|change| change.key.as_str().to_owned()).collect::<Vec<_>>());
        }
        assert_eq!(groups, [vec!["a"], vec!["b", "c"], vec!["a"]]);
    }
    assert!(
        matches!(nkv.changes(Some(Revision::new(1))), Err(nkv_node::ChangesError::Gap(gap)) if gap.revision.get() == 5)
    );
    node.shutdown().await.unwrap();
    let ended = timeout(Duration::from_secs(5), changes.next()).await;
    assert_eq!(ended.expect("it does not end with its node").unwrap(), None);
}

/// Written once, for a store here or far away.
async fn count(store: impl nkv_node::Store) -> Result<usize> {
    store.put("counted.a", "x").await?;
    Ok(store.get_all("counted").await?.len() + store.list("counted.*").await?.len())
}

#[test]
fn plain_threads_and_programs_for_any_store_use_a_handle() {
    let servers = runtime();
    let (node, nkv) = servers.block_on(started());
    assert_eq!(servers.block_on(count(nkv.clone())).unwrap(), 1);
    let running = std::thread::spawn(move || servers.block_on(async { node.handle().stopping().await }));
    let blocking = nkv.blocking();
    let mut events = blocking.subscribe("b").unwrap();
    blocking.put("b", "1").unwrap();
    assert_eq!(blocking.get("b").unwrap().unwrap().value, "1");
    blocking.update("b", |old| [old.map_or(&b""[..], |old| &old.value), b"2"].concat()).unwrap();
    while !matches!(events.next_blocking(), Some(Event::Update { entry, .. }) if entry.value == "12") {}
    assert_eq!(blocking.delete("*").unwrap().count, 2);
    drop(running);
}

#[tokio::test]
async fn without_a_snapshot_every_change_after_the_subscription_is_delivered() {
    let (_node, nkv) = started().await;
    nkv.put("a", "old").await.unwrap();
    nkv.put("gone", "old").await.unwrap();
    let options = SubscribeOptions::default().with_snapshot(false);
    let mut events = nkv.subscribe_with("*", options).await.unwrap();
    nkv.put("b", "new").await.unwrap();
    nkv.delete("gone").await.unwrap();
    let mut seen = Vec::new();
    while seen.len() < 3 {
        match timeout(Duration::from_secs(5), events.next()).await.unwrap().unwrap() {
            Event::Synced { revision, .. } => seen.push(format!("synced {revision}")),
            Event::Update { entry, .. } => seen.push(format!("{} {:?}", entry.key, entry.value)),
            Event::Gone { key, .. } => seen.push(format!("{key} gone")),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seen, ["synced 2", "b b\"new\"", "gone gone"]);
}

#[tokio::test]
async fn a_reserved_key_can_be_written_by_no_client() {
    let (_node, nkv) = started().await;
    let reserved = Key::reserved("engine").unwrap();
    assert_eq!(kind(nkv.put(&reserved, "x").await), ErrorKind::InvalidKey);
    assert_eq!(kind(nkv.delete(&reserved).await), ErrorKind::InvalidKey);
}

/// Goes on when the test says so.
#[derive(Clone, Debug, Default)]
struct ByHand(std::sync::Arc<std::sync::atomic::AtomicU64>);

impl nkv_node::Time for ByHand {
    fn elapsed(&self) -> Duration {
        Duration::from_secs(self.0.load(std::sync::atomic::Ordering::SeqCst))
    }
}

#[tokio::test]
async fn hours_pass_at_once_on_a_clock_of_the_programs_own() {
    let time = ByHand::default();
    let node = Node::builder().time(time.clone()).start().await.unwrap();
    let nkv = node.handle();
    for (name, hours) in [("short", 1), ("long", 3)] {
        let options = PutOptions::default().with_ttl(Duration::from_secs(3_600 * hours));
        nkv.put_with(name, "x", options).await.unwrap();
    }
    time.0.store(2 * 3_600, std::sync::atomic::Ordering::SeqCst);
    let gone = async {
        while nkv.exists("short").await.unwrap() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(20), gone).await.expect("it does not end");
    assert!(nkv.exists("long").await.unwrap());
}

/// Remembers on which threads it was called. It forgets what it is given.
#[derive(Debug)]
struct Called {
    threads: Arc<Mutex<Vec<ThreadId>>>,
    waits: bool,
}

impl PersistValue for Called {
    fn load(&mut self, _visit: &mut dyn FnMut(StoredRef<'_>)) -> std::result::Result<Loaded, PersistError> {
        Ok(Loaded { epoch: Epoch::new(1), revision: nkv_core::Revision::ZERO })
    }

    fn persist(&mut self, _batch: &[Change]) -> std::result::Result<(), PersistError> {
        self.threads.lock().unwrap().push(thread::current().id());
        Ok(())
    }

    fn waits(&self) -> bool {
        self.waits
    }
}

#[tokio::test]
async fn storage_that_may_wait_is_called_on_a_thread_of_its_own_and_other_storage_at_once() {
    let branch = Key::new("kept").unwrap();
    // Storage, and whether it may wait.
    let cases = |threads: &Arc<Mutex<_>>| -> [(Box<dyn PersistValue>, bool); 4] {
        let called = |waits| Called { threads: Arc::clone(threads), waits };
        let route = |waits| RoutePersist::new(called(waits)).route(branch.clone(), called(false));
        [
            (Box::new(called(true)), true),
            (Box::new(called(false)), false),
            (Box::new(route(true)), true),
            (Box::new(route(false)), false),
        ]
    };
    let threads = Arc::default();
    for (storage, waits) in cases(&threads) {
        threads.lock().unwrap().clear();
        let node = Node::builder().persist("a test", move || Ok(storage)).start().await.unwrap();
        let nkv = node.handle();
        // The writer may not have begun to wait for something to do.
        let is_done_at_once = || pin!(nkv.put("lamp", "on")).poll(&mut Context::from_waker(Waker::noop())).is_ready();
        let mut tries = 0;
        while !is_done_at_once() && (!waits || tries < 50) {
            tokio::time::sleep(Duration::from_millis(1)).await;
            tries += 1;
        }
        let is_here = |threads: &Vec<ThreadId>| threads.last() == Some(&thread::current().id());
        assert_eq!(is_here(&threads.lock().unwrap()), !waits, "{waits}");
        // What takes long is done elsewhere in any case.
        nkv.delete(&Pattern::All).await.unwrap();
        assert!(!is_here(&threads.lock().unwrap()));
        node.shutdown().await.unwrap();
    }
}

#[tokio::test]
async fn what_is_written_at_once_comes_after_what_was_submitted_before() {
    let (_node, nkv) = started().await;
    for round in 0..1_000_u32 {
        let value = format!("submitted {round}").into();
        let op = Op::Put { key: key("a"), value, options: nkv_core::PutOptions::default() };
        let submitted = nkv.submit(vec![nkv.admit(op).unwrap()], nkv.try_room(1).unwrap());
        let revision = nkv.put("a", "put").await.unwrap();
        let mut results = submitted.await.unwrap();
        let Some(Ok(Outcome::Put { revision: before })) = results.next() else { panic!("{results:?}") };
        assert!(before.get() < revision.get());
        assert_eq!(nkv.get("a").await.unwrap().unwrap().value, "put");
        if round % 2 == 0 {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn a_task_that_writes_all_the_time_leaves_others_their_turns() {
    let (_node, nkv) = started().await;
    nkv.put("a", "first").await.unwrap();
    let writing = tokio::spawn(async move {
        for _ in 0..10_000 {
            nkv.put("a", "next").await.unwrap();
        }
    });
    let mut turns = 0;
    while !writing.is_finished() {
        tokio::task::yield_now().await;
        turns += 1;
    }
    writing.await.unwrap();
    assert!(turns > 10, "{turns} turns beside 10,000 writes");
}

#[tokio::test]
async fn a_write_that_notifies_many_is_not_done_on_the_thread_of_its_caller() {
    let threads = Arc::<Mutex<Vec<ThreadId>>>::default();
    let storage = Called { threads: Arc::clone(&threads), waits: false };
    let node = Node::builder().persist("a test", move || Ok(storage)).start().await.unwrap();
    let nkv = node.handle();
    let put_here = async || {
        nkv.put("lamp", "on").await.unwrap();
        // The writer may not wait for something to do again yet.
        tokio::time::sleep(Duration::from_millis(1)).await;
        threads.lock().unwrap().last() == Some(&thread::current().id())
    };
    while !put_here().await {}
    let mut subscriptions = Vec::new();
    while subscriptions.len() <= 1_024 {
        subscriptions.push(nkv.subscribe("lamp").await.unwrap());
    }
    for _ in 0..50 {
        assert!(!put_here().await);
    }
    subscriptions.truncate(1_000);
    while !put_here().await {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_write_beside_a_shutdown_is_done_or_says_that_the_node_has_stopped() {
    for round in 0..50 {
        let (node, nkv) = started().await;
        let put_until_it_fails = |n: u32| {
            let nkv = nkv.clone();
            tokio::spawn(async move {
                loop {
                    if let Err(error) = nkv.put(format!("k{n}"), "x").await {
                        return error;
                    }
                }
            })
        };
        let writing: Vec<_> = (0..8).map(put_until_it_fails).collect();
        tokio::time::sleep(Duration::from_micros(500)).await;
        node.shutdown().await.unwrap();
        for task in writing {
            let error = timeout(Duration::from_secs(10), task).await.unwrap().unwrap();
            assert!(matches!(error.kind(), ErrorKind::Closed | ErrorKind::OutcomeUnknown), "{round}: {error:?}");
        }
    }
}

/// Storage that does not wait, and panics.
#[derive(Debug)]
struct Panics;

impl PersistValue for Panics {
    fn load(&mut self, _visit: &mut dyn FnMut(StoredRef<'_>)) -> std::result::Result<Loaded, PersistError> {
        Ok(Loaded { epoch: Epoch::new(1), revision: nkv_core::Revision::ZERO })
    }

    fn persist(&mut self, batch: &[Change]) -> std::result::Result<(), PersistError> {
        assert!(batch.iter().all(|change| change.key.as_str() != "panic"), "as it was asked to");
        Ok(())
    }

    fn waits(&self) -> bool {
        false
    }
}

#[tokio::test]
async fn storage_that_panics_on_the_thread_of_a_caller_ends_the_node_with_an_error() {
    let mut node = Node::builder().persist("a test", || Ok(Panics)).start().await.unwrap();
    let nkv = node.handle();
    let is_done_at_once = || pin!(nkv.put("lamp", "on")).poll(&mut Context::from_waker(Waker::noop())).is_ready();
    while !is_done_at_once() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(kind(nkv.put("panic", "now").await), ErrorKind::Refused { status: 500 });
    let failed = timeout(Duration::from_secs(10), node.failed()).await.unwrap();
    assert!(matches!(failed, Err(nkv_node::NodeError::Persist(_))), "{failed:?}");
}
