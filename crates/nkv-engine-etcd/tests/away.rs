//! etcd out of reach, back again, made anew, or put back.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use common::{
    PATIENCE, Passing, Proxy, Server, eventually, next, node, nothing_else, raw_put, raw_puts, restore, value,
};
use nkv_core::Pattern;
use nkv_engine_etcd::{EtcdEngine, Options};
use nkv_node::{Engine, ErrorKind, Event, Handle, Node, Result};
use tokio::time::{Instant, sleep, timeout};

fn kind<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.unwrap_err().kind().clone()
}

const AWAY: ErrorKind = ErrorKind::Refused { status: 503 };

async fn is_away(nkv: &Handle) {
    eventually("it is noticed", async || nkv.health().await.is_err()).await;
}

async fn is_back(nkv: &Handle) {
    eventually("it is back", async || nkv.health().await.is_ok()).await;
}

/// Whatever keeps answers from coming: a write under way has an unknown outcome, later ones are refused and never done.
async fn is_noticed(nkv: &Handle, server: &Server, stop: impl FnOnce(), go_on: impl FnOnce()) {
    nkv.put("k", "before").await.unwrap();
    let mut stream = nkv.subscribe("*").await.unwrap();
    assert_eq!(next(&mut stream).await, "k=before");
    stop();
    let began = Instant::now();
    let unknown = async {
        loop {
            // What stands still takes its time to.
            if let Err(error) = nkv.put("unknown", "1").await {
                break error;
            }
        }
    };
    let unknown = timeout(PATIENCE, unknown).await.expect("answers stop");
    assert_eq!(*unknown.kind(), ErrorKind::OutcomeUnknown);
    is_away(nkv).await;
    println!("TEST away noticed = {} ms", began.elapsed().as_millis());
    assert_eq!(kind(nkv.put("k", "refused").await), AWAY);
    assert_eq!(kind(nkv.delete("*").await), AWAY);
    assert_eq!(value(nkv, "k").await.as_deref(), Some("before"), "reads go on");
    go_on();
    is_back(nkv).await;
    nkv.put("k", "after").await.unwrap();
    // What was unknown may be done, and nothing else.
    loop {
        match next(&mut stream).await.as_str() {
            "unknown=1" => {}
            event => break assert_eq!(event, "k=after"),
        }
    }
    assert!(!server.must(&["get", "", "--from-key"]).contains("refused"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_stands_still_is_away_and_no_write_is_done_later() {
    let Some(server) = Server::start().await else { return };
    let (_node, nkv) = node(server.engine("app")).await;
    is_noticed(&nkv, &server, || server.signal("STOP"), || server.signal("CONT")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_is_one_from_which_nothing_comes() {
    let Some(server) = Server::start().await else { return };
    let proxy = Proxy::start(server.server()).await;
    let (_node, nkv) = node(proxy.engine("app")).await;
    is_noticed(&nkv, &server, || proxy.set(Passing::OneWay), || proxy.set(Passing::Both)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_starts_without_etcd_and_says_so() {
    let Some(mut server) = Server::new(&[]) else { return };
    let node = Node::builder().engine(server.engine("app")).start().await.unwrap();
    let nkv = node.handle();
    assert_eq!(kind(nkv.get("k").await), AWAY, "no state is no empty state");
    assert_eq!(kind(nkv.put("k", "1").await), AWAY);
    assert!(server.engine("app").check().await.is_err());
    server.run();
    is_back(&nkv).await;
    assert_eq!(value(&nkv, "k").await, None);
    nkv.put("k", "1").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_changed_meanwhile_is_delivered_once() {
    let Some(mut server) = Server::start().await else { return };
    let proxy = Proxy::start(server.server()).await;
    let (_node, nkv) = node(proxy.engine("app")).await;
    let mut stream = nkv.subscribe("*").await.unwrap();
    for name in ["kept", "gone", "changed", "twice"] {
        nkv.put(name, "1").await.unwrap();
        assert_eq!(next(&mut stream).await, format!("{name}=1"));
    }
    let epoch = nkv.epoch();
    for round in 0..3 {
        proxy.set(Passing::None);
        is_away(&nkv).await;
        server.must(&["put", "app/changed", &round.to_string()]);
        server.must(&["put", "app/gone", "again"]);
        server.must(&["del", "app/gone"]);
        if round == 1 {
            server.restart().await;
        }
        if round == 2 {
            // Of what was missed nothing is left to be delivered, and least of all the delete, which is the last.
            server.must(&["compact", &server.revision().to_string()]);
        }
        proxy.set(Passing::Both);
        is_back(&nkv).await;
        let (mut seen, mut states) = (Vec::new(), BTreeMap::new());
        nkv.put("mark", round.to_string()).await.unwrap();
        loop {
            let event = next(&mut stream).await;
            if event == format!("mark={round}") {
                break;
            }
            let name = event.split(['=', ' ']).next().unwrap().to_owned();
            states.insert(name, event.clone());
            seen.push(event);
        }
        assert_eq!(states.get("changed"), Some(&format!("changed={round}")), "{seen:?}");
        assert!(!states.contains_key("kept") && !states.contains_key("twice"), "{seen:?}");
        assert!(states.get("gone").is_none_or(|gone| gone == "gone Deleted"), "{seen:?}");
        assert_eq!(value(&nkv, "gone").await, None);
    }
    assert_eq!(nkv.epoch(), epoch);
}

/// The bug of etcd#18089: a delete at the very revision to which is compacted is not delivered to a watch from there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delete_at_the_next_revision_is_delivered_although_etcd_has_compacted_to_it() {
    let Some(server) = Server::start().await else { return };
    let proxy = Proxy::start(server.server()).await;
    let (_node, nkv) = node(proxy.engine("app")).await;
    let mut stream = nkv.subscribe("*").await.unwrap();
    nkv.put("k", "1").await.unwrap();
    assert_eq!(next(&mut stream).await, "k=1");
    proxy.set(Passing::None);
    is_away(&nkv).await;
    server.must(&["del", "app/k"]);
    let deleted = server.revision();
    server.must(&["compact", &deleted.to_string()]);
    proxy.set(Passing::Both);
    assert_eq!(next(&mut stream).await, "k Deleted");
    is_back(&nkv).await;
    nothing_else(&nkv, &mut stream, "mark").await;
    // The same where a lease ends, whose event has no value.
    nkv.put_with("leased", "1", nkv_node::PutOptions::default().with_ttl(Duration::from_secs(2))).await.unwrap();
    assert_eq!(next(&mut stream).await, "leased=1");
    let put = server.revision();
    proxy.set(Passing::None);
    is_away(&nkv).await;
    eventually("the lease ends", async || server.revision() > put).await;
    server.must(&["compact", &server.revision().to_string()]);
    proxy.set(Passing::Both);
    let ended = next(&mut stream).await;
    assert!(ended.starts_with("leased ") && ended != "leased Missed", "{ended}");
    is_back(&nkv).await;
    nothing_else(&nkv, &mut stream, "mark").await;
}

/// What was missed is more than one message has, and the connection ends within it again and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_missed_comes_whole_and_in_order_although_it_is_cut_in_the_middle() {
    const KEYS: usize = 8;
    let Some(server) = Server::start().await else { return };
    let proxy = Proxy::start(server.server()).await;
    let (_node, nkv) = node(proxy.engine("app")).await;
    let mut stream = nkv.subscribe("*").await.unwrap();
    nkv.put("k0", "before").await.unwrap();
    assert_eq!(next(&mut stream).await, "k0=before");
    let epoch = nkv.epoch();
    proxy.set(Passing::None);
    is_away(&nkv).await;
    let mut client = server.client().await;
    // 9 MB in revisions of several keys each, more than a message of 4 MiB may have.
    for turn in 0..12_u8 {
        let value = |n: usize| [vec![turn; 100_000 - n], vec![b'x'; n]].concat();
        client.txn(raw_puts((0..KEYS).map(|n| (format!("app/k{n}"), value(n))))).await.unwrap();
    }
    for limit in [300_000, 1_000_000, 3_000_000] {
        proxy.set(Passing::First(limit));
        sleep(Duration::from_millis(1_500)).await;
        // All of one revision, or nothing of it; and it is level with the last alone.
        let is_level = nkv.health().await.is_ok();
        let shown = nkv.get_all(Pattern::All).await.unwrap();
        let turns: BTreeSet<u8> = shown.iter().map(|entry| entry.value[0]).collect();
        assert!(turns.len() == 1 && [1, KEYS].contains(&shown.len()), "{turns:?} of {} keys", shown.len());
        assert!(!is_level || turns == BTreeSet::from([11]), "it is level at {turns:?}");
    }
    proxy.set(Passing::Both);
    is_back(&nkv).await;
    let last = nkv.get_all(Pattern::All).await.unwrap();
    assert!(last.len() == KEYS && last.iter().all(|entry| entry.value[0] == 11), "{} keys", last.len());
    nkv.put("mark", "1").await.unwrap();
    let mut seen = BTreeMap::<String, u64>::new();
    loop {
        match timeout(PATIENCE, stream.next()).await.unwrap().unwrap() {
            Event::Update { entry, .. } if entry.key.as_str() == "mark" => break,
            Event::Update { entry, .. } => {
                let before = seen.insert(entry.key.to_string(), entry.revision.get());
                assert!(before.is_none_or(|before| before < entry.revision.get()), "{} twice", entry.key);
            }
            Event::Synced { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((seen.len(), nkv.epoch()), (KEYS, epoch));
}

/// A quiet prefix in a busy etcd whose connection hangs: no full read is needed to go on, and no ping of ours ends a connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_hung_is_gone_on_from_without_the_whole_state() {
    const SENT: &str = "etcd_network_client_grpc_sent_bytes_total";
    let Some(server) = Server::start().await else { return };
    let proxy = Proxy::start(server.server()).await;
    let mut client = server.client().await;
    for n in 0..40 {
        client.txn(raw_put(&format!("app/large.{n}"), vec![b'x'; 100_000])).await.unwrap();
    }
    let (_node, nkv) = node(proxy.engine("app")).await;
    // Quiet, for longer than three pings take.
    let mut stale = nkv.stale().unwrap();
    stale.mark_unchanged();
    assert!(timeout(Duration::from_secs(7), stale.changed()).await.is_err(), "a quiet connection was given up");
    let sent = server.metric(SENT).await;
    for round in 0..2 {
        proxy.set(Passing::OneWay);
        is_away(&nkv).await;
        for n in 0..20 {
            server.txn(&(0..50).map(|k| format!("put other/{round}.{n}.{k} x\n")).collect::<String>());
        }
        proxy.set(Passing::Both);
        is_back(&nkv).await;
        assert!(nkv.revision().get() >= server.revision(), "it does not know how far etcd is");
    }
    let sent = server.metric(SENT).await - sent;
    assert!(sent < 2_000_000, "{sent} bytes: the whole state was read anew");
    assert_eq!(nkv.list(Pattern::All).await.unwrap().len(), 40);
}

/// A server of the list that was away when the node began, and is of another etcd.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_of_another_etcd_that_comes_later_is_given_no_write() {
    let Some(mut one) = Server::start().await else { return };
    let Some(mut other) = Server::start_with(&["--initial-cluster-token", "other"]).await else { return };
    other.kill();
    let engine = EtcdEngine::new(Options::new([one.server(), other.server()], "app").unwrap());
    let (_node, nkv) = node(engine).await;
    nkv.put("k", "1").await.unwrap();
    let epoch = nkv.epoch();
    other.run();
    other.ready().await;
    one.kill();
    is_away(&nkv).await;
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        assert!(nkv.put("k", "2").await.is_err(), "another etcd has taken it");
        sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(other.must(&["get", "", "--from-key"]), "", "something was written to another etcd");
    assert_eq!((value(&nkv, "k").await.as_deref(), nkv.epoch()), (Some("1"), epoch));
    other.kill();
    one.run();
    is_back(&nkv).await;
    nkv.put("k", "3").await.unwrap();
    assert_eq!(nkv.epoch(), epoch);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_was_made_anew_is_another_epoch() {
    let Some(mut server) = Server::start().await else { return };
    let (_a, a) = node(server.engine("app")).await;
    let (_b, b) = node(server.engine("app")).await;
    for n in 0..20 {
        a.put("old", n.to_string()).await.unwrap();
    }
    let before = a.epoch();
    assert_eq!(b.epoch(), before);
    let condition = a.get("old").await.unwrap().unwrap().revision;
    server.wipe().await;
    eventually("a new epoch", async || a.epoch() != before && a.epoch() == b.epoch()).await;
    is_back(&a).await;
    assert_eq!(value(&a, "old").await, None);
    let refused = a.put_with("old", "1", nkv_node::PutOptions::default().with_if_revision(condition)).await;
    assert_eq!(kind(refused), ErrorKind::OtherEpoch);
    a.put("new", "1").await.unwrap();
    eventually("both go on", async || value(&b, "new").await.is_some()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_generation_is_another_epoch_and_takes_no_write_of_the_one_before() {
    let Some(server) = Server::start().await else { return };
    let ((_a, a), (_b, b)) = (node(server.engine("app")).await, node(server.engine("app")).await);
    a.put("k", "1").await.unwrap();
    for turn in 0..3 {
        let (before, revision) = (a.epoch(), a.get("k").await.unwrap().unwrap().revision);
        let mut raw = server.client().await;
        raw.txn(raw_put("app/..nkv/generation", vec![b'0' + turn])).await.unwrap();
        // As it has not heard of it yet, or has, or hears of it meanwhile.
        let refused = a.put_with("k", "2", nkv_node::PutOptions::default().with_if_revision(revision)).await;
        let refused = kind(refused);
        assert!([AWAY, ErrorKind::OtherEpoch, ErrorKind::OutcomeUnknown].contains(&refused), "{refused:?}");
        eventually("a new epoch", async || a.epoch() != before && a.epoch() == b.epoch()).await;
        is_back(&a).await;
        assert_eq!(value(&a, "k").await.as_deref(), Some("1"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_was_put_back_and_has_overtaken_is_another_epoch() {
    let Some(mut server) = Server::start().await else { return };
    let proxy = Proxy::start(server.server()).await;
    let (_a, a) = node(proxy.engine("app")).await;
    a.put("k", "1").await.unwrap();
    let snapshot = server.dir.path().join("snapshot");
    server.must(&["snapshot", "save", snapshot.to_str().unwrap()]);
    a.put("k", "2").await.unwrap();
    a.put("lost", "2").await.unwrap();
    let before = a.epoch();
    proxy.set(Passing::None);
    is_away(&a).await;
    server.kill();
    restore(&snapshot, &server);
    server.run();
    server.ready().await;
    // As far as the node had seen and further, the key that changed last among them.
    for _ in 0..10 {
        server.must(&["put", "app/lost", "2"]);
    }
    // One that has seen nothing of what is lost has nothing to recognise, and follows.
    let (_b, b) = node(server.engine("app")).await;
    assert_eq!(b.epoch(), before);
    proxy.set(Passing::Both);
    eventually("a new epoch", async || a.epoch() != before && a.epoch() == b.epoch()).await;
    is_back(&a).await;
    is_back(&b).await;
    assert_eq!((value(&a, "k").await.as_deref(), value(&b, "k").await.as_deref()), (Some("1"), Some("1")));
    let (epoch, _) = (a.epoch(), sleep(Duration::from_millis(500)).await);
    assert_eq!((a.epoch(), b.epoch()), (epoch, epoch), "it begins once");
}

/// A quiet prefix in a busy etcd: the node comes to revisions at which nothing of its own changed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revision_that_others_made_is_reached_soon() {
    let Some(server) = Server::start().await else { return };
    let engine = server.engine("app");
    let (_a, a) = node(engine.clone()).await;
    a.put("k", "1").await.unwrap();
    for n in 0..3 {
        server.txn(&(0..100).map(|k| format!("put other/{n}.{k} x\n")).collect::<String>());
        for _ in 0..20 {
            server.must(&["put", "other", "x"]);
        }
        let (began, present) = (Instant::now(), server.revision());
        let last = engine.last().await.unwrap();
        assert!(last.revision.get() >= present && last.epoch == a.epoch(), "{last:?} {present}");
        eventually("the node is there", async || a.revision().get() >= last.revision.get()).await;
        println!("TEST reached a revision of others in = {} ms", began.elapsed().as_millis());
    }
    assert_eq!(value(&a, "k").await.as_deref(), Some("1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_the_servers_of_a_list_do_a_good_one_is_found() {
    let Some(server) = Server::start().await else { return };
    let Some(stopped) = Server::start().await else { return };
    stopped.signal("STOP");
    let refusing = format!("127.0.0.1:{}", common::free_port());
    // Packets to it vanish.
    let dropping = "10.255.255.1:2379".to_owned();
    for turn in 0..4 {
        let mut servers = vec![server.server(), stopped.server(), refusing.clone(), dropping.clone()];
        servers.rotate_left(turn);
        let began = Instant::now();
        let (_node, nkv) = node(EtcdEngine::new(Options::new(servers, "app").unwrap())).await;
        println!("TEST ready with one of four servers = {} ms", began.elapsed().as_millis());
        for n in 0..20 {
            nkv.put("k", n.to_string()).await.unwrap();
        }
    }
    stopped.signal("CONT");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn however_many_subscribe_a_node_is_one_watch() {
    let Some(server) = Server::start().await else { return };
    let ((_a, a), (_b, b)) = (node(server.engine("app")).await, node(server.engine("app")).await);
    let mut streams = Vec::new();
    for n in 0..1_000 {
        let nkv = if n % 2 == 0 { &a } else { &b };
        streams.push(nkv.subscribe(format!("k.{}", n % 10).as_str()).await.unwrap());
    }
    a.put("k.3", "1").await.unwrap();
    for stream in streams.iter_mut().skip(3).step_by(10) {
        assert_eq!(next(stream).await, "k.3=1");
    }
    assert_eq!(server.metric("etcd_debugging_mvcc_watcher_total").await, 2);
    assert_eq!(server.metric("etcd_debugging_mvcc_watch_stream_total").await, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_many_cuts_there_is_one_watch() {
    let Some(server) = Server::start().await else { return };
    let proxy = Proxy::start(server.server()).await;
    let (_node, nkv) = node(proxy.engine("app")).await;
    for n in 0..20 {
        proxy.set(Passing::None);
        is_away(&nkv).await;
        proxy.set(Passing::Both);
        is_back(&nkv).await;
        nkv.put("k", n.to_string()).await.unwrap();
    }
    let watches = async || server.metric("etcd_debugging_mvcc_watcher_total").await;
    eventually("one watch", async || watches().await == 1).await;
    assert_eq!(server.metric("etcd_debugging_mvcc_watch_stream_total").await, 1);
    assert_eq!(nkv.get_all(Pattern::All).await.unwrap().len(), 1);
}
