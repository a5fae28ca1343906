//! The broker or the way to it is away for a while, or what comes back is another log.

use std::process::Command;
use std::time::{Duration, Instant};

use nkv_core::{Epoch, MemoryPersist};
use nkv_engine_kafka::{KafkaEngine, Options};
use nkv_node::{ErrorKind, Event, GoneReason, Handle, Node, Subscription};
use rustix::process::Signal;
use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::support::{Broker, Foreign, PATIENCE, Proxy, Way, healthy, kafka, ready, shared, shows, until, value};

async fn stale(nkv: &Handle) {
    until("the node is stale", async || nkv.health().await.is_err()).await;
}

/// The events up to the one in which a key has a value.
async fn events_until(events: &mut Subscription, key: &str, last: &str) -> Vec<String> {
    let mut delivered = Vec::new();
    let wait = async {
        loop {
            match events.next().await.unwrap() {
                Event::Update { entry, .. } => {
                    delivered.push(format!("{}={}", entry.key, str::from_utf8(&entry.value).unwrap()));
                    if entry.key.as_str() == key && entry.value == last {
                        return;
                    }
                }
                Event::Gone { key, reason, .. } => {
                    assert_eq!(reason, GoneReason::Deleted);
                    delivered.push(format!("-{key}"));
                }
                Event::Synced { .. } => delivered.push("synced".into()),
                other => panic!("{other:?}"),
            }
        }
    };
    assert!(timeout(PATIENCE, wait).await.is_ok(), "{key}={last} does not come: {delivered:?}");
    delivered
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_cut_a_node_is_stale_and_sends_nothing_later_and_delivers_what_it_missed() {
    let Some(shared) = shared() else { return };
    let _alone = shared.proxy.lock().await;
    let topic = shared.topic();
    let proxy = Proxy::start(&shared.broker, 0).await;
    let (_other, other) = shared.node(&topic).await;
    let (_node, nkv) = ready(KafkaEngine::new(proxy.options(&topic))).await;
    for (way, number) in [(Way::Silent, "1"), (Way::Deaf, "2")] {
        for name in ["kept", "changed", "gone"] {
            other.put(format!("{name}.{number}"), "before").await.unwrap();
        }
        shows(&nkv, &format!("gone.{number}"), Some("before")).await;
        let (epoch, mut events) = (nkv.epoch(), nkv.subscribe("*").await.unwrap());
        events_until(&mut events, &format!("kept.{number}"), "before").await;
        proxy.way.send_replace(way);
        // Under way when the engine is lost: its outcome is unknown. Behind a silent way it was not done; with answers lost it
        // was.
        let under_way = nkv.put(format!("under.way.{number}"), "x").await.unwrap_err();
        assert_eq!(*under_way.kind(), ErrorKind::OutcomeUnknown, "{under_way}");
        stale(&nkv).await;
        let refused = nkv.put(format!("refused.{number}"), "x").await.unwrap_err();
        assert_eq!(*refused.kind(), ErrorKind::Refused { status: 503 }, "{refused}");
        assert_eq!(value(&nkv, &format!("kept.{number}")).await.as_deref(), Some("before"));
        other.delete(format!("gone.{number}")).await.unwrap();
        other.put(format!("changed.{number}"), "after").await.unwrap();
        other.put(format!("last.{number}"), "after").await.unwrap();
        proxy.way.send_replace(Way::Open);
        let delivered = events_until(&mut events, &format!("last.{number}"), "after").await;
        let delivered: Vec<&str> =
            delivered.iter().map(String::as_str).filter(|delivered| !delivered.starts_with("under.way")).collect();
        let expected = [
            "synced".to_owned(),
            format!("changed.{number}=before"),
            format!("gone.{number}=before"),
            format!("-gone.{number}"),
            format!("changed.{number}=after"),
            format!("last.{number}=after"),
        ];
        let missed: Vec<&str> =
            delivered.iter().copied().skip_while(|delivered| !delivered.starts_with("-gone")).collect();
        assert_eq!(missed, expected[3..].iter().map(String::as_str).collect::<Vec<_>>(), "{delivered:?}");
        healthy(&nkv).await;
        assert_eq!((nkv.epoch(), other.exists(format!("refused.{number}")).await), (epoch, Ok(false)));
        let is_done = other.exists(format!("under.way.{number}")).await.unwrap();
        assert_eq!(is_done, way == Way::Deaf, "{way:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_whose_tombstone_is_gone_is_not_missed_by_a_node_that_was_away_longer() {
    let Some(shared) = shared() else { return };
    let _alone = shared.proxy.lock().await;
    let (topic, foreign) = (shared.topic(), &shared.foreign);
    let settings = [
        "create",
        &topic,
        "1",
        "cleanup.policy=compact",
        "delete.retention.ms=6000",
        "segment.ms=100",
        "min.cleanable.dirty.ratio=0.001",
        "max.compaction.lag.ms=100",
        "min.compaction.lag.ms=0",
    ];
    foreign.done(&settings);
    let proxy = Proxy::start(&shared.broker, 0).await;
    let (_other, other) = shared.node(&topic).await;
    let (_node, nkv) = ready(KafkaEngine::new(proxy.options(&topic))).await;
    let epoch = nkv.epoch();
    other.put("gone", "1").await.unwrap();
    other.put("kept", "1").await.unwrap();
    shows(&nkv, "kept", Some("1")).await;
    let mut events = nkv.subscribe("gone").await.unwrap();
    events_until(&mut events, "gone", "1").await;
    proxy.way.send_replace(Way::Silent);
    stale(&nkv).await;
    other.delete("gone").await.unwrap();
    // Each one rolls a segment, which has the cleaner work.
    until("the tombstone is removed", async || {
        drop(other.put("turn", "x").await);
        tokio::time::sleep(Duration::from_millis(300)).await;
        !foreign.done(&["read", &topic]).contains(":gone=")
    })
    .await;
    proxy.way.send_replace(Way::Open);
    let gone = async {
        loop {
            if let Event::Gone { reason, .. } = events.next().await.unwrap() {
                break reason;
            }
        }
    };
    assert_eq!(timeout(PATIENCE, gone).await.unwrap(), GoneReason::Deleted);
    healthy(&nkv).await;
    assert_eq!((nkv.epoch(), value(&nkv, "kept").await.as_deref()), (epoch, Some("1")));
}

/// What is left of deletes may go while a log is read for the first time, and the node would show a value that is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_first_read_that_takes_longer_than_tombstones_are_kept_is_repeated() {
    let Some(shared) = shared() else { return };
    let (topic, foreign) = (shared.topic(), &shared.foreign);
    foreign.done(&["create", &topic, "1", "cleanup.policy=compact", "delete.retention.ms=4000"]);
    let (_other, other) = shared.node(&topic).await;
    for number in 0..25 {
        other.put(format!("large.{number}"), "x".repeat(60_000)).await.unwrap();
    }
    other.put("gone", "1").await.unwrap();
    // No other test has this one.
    let proxy = Proxy::start(&shared.broker, 1).await;
    proxy.way.send_replace(Way::Slow);
    let node = Node::builder().engine(KafkaEngine::new(proxy.options(&topic))).start().await.unwrap();
    let nkv = node.handle();
    other.delete("gone").await.unwrap();
    // 1.5 MB take some 5 s: more than half of the 4 s.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(9) {
        assert!(nkv.get("gone").await.is_err(), "it has a state, which took too long to be read");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    proxy.way.send_replace(Way::Open);
    healthy(&nkv).await;
    assert_eq!((nkv.list("*").await.unwrap().len(), value(&nkv, "gone").await), (25, None));
}

/// Held by the test that has a broker of its own.
pub(crate) static OWN_BROKER: Mutex<()> = Mutex::const_new(());

/// The identity of its cluster.
pub(crate) const OWN: &str = "BAAAAAAAAAAAAAAAAAAAAA";

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_stands_still_or_dies_is_away_and_nothing_is_sent_later() {
    let Some(libs) = kafka() else { return };
    let _alone = OWN_BROKER.lock().await;
    let mut broker = Broker::start(&libs, OWN);
    let (_node, nkv) = ready(KafkaEngine::new(Options::new([broker.address()], "lamps").unwrap())).await;
    nkv.put("a", "1").await.unwrap();

    let unrelated = [shared().unwrap().broker.address(), broker.address()];
    let error = KafkaEngine::new(Options::new(unrelated, "lamps").unwrap()).check().await.unwrap_err();
    assert!(error.to_string().contains(OWN) && error.to_string().contains("AAAAAAAAAAAAAAAAAAAAAA"), "{error}");

    broker.signal(Signal::STOP);
    let under_way = nkv.put("under.way", "x").await.unwrap_err();
    assert_eq!(*under_way.kind(), ErrorKind::OutcomeUnknown, "{under_way}");
    stale(&nkv).await;
    let refused = nkv.put("refused", "x").await.unwrap_err();
    assert_eq!(*refused.kind(), ErrorKind::Refused { status: 503 });
    broker.signal(Signal::CONT);
    healthy(&nkv).await;
    nkv.put("b", "2").await.unwrap();

    broker.kill();
    stale(&nkv).await;
    let refused = nkv.put("refused", "x").await.unwrap_err();
    assert_eq!(*refused.kind(), ErrorKind::Refused { status: 503 });
    let before = nkv.epoch();
    broker.run();
    healthy(&nkv).await;
    nkv.put("c", "3").await.unwrap();
    assert_eq!((nkv.epoch(), value(&nkv, "b").await.as_deref()), (before, Some("2")), "what was acknowledged is there");
    assert!(!nkv.exists("refused").await.unwrap(), "it was sent later");
}

/// A node that is stopped and started again with what it has kept.
struct Stopping {
    disk: MemoryPersist,
    engine: KafkaEngine,
    node: Option<Node>,
}

impl Stopping {
    async fn start(&mut self) -> Handle {
        let (disk, engine) = (self.disk.clone(), self.engine.clone());
        let node = Node::builder().persist("sync", move || Ok(disk)).engine(engine).start().await.unwrap();
        let nkv = self.node.insert(node).handle();
        healthy(&nkv).await;
        nkv
    }

    async fn stop(&mut self) {
        self.node.take().unwrap().shutdown().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_was_put_back_is_another_epoch_although_it_has_overtaken_the_node() {
    let Some(libs) = kafka() else { return };
    let _alone = OWN_BROKER.lock().await;
    let mut broker = Broker::start(&libs, OWN);
    let options = Options::new([broker.address()], "lamps").unwrap();
    let engine = || KafkaEngine::new(options.clone());
    let stopping = |epoch| Stopping { disk: MemoryPersist::new(Epoch::new(epoch)), engine: engine(), node: None };
    let (mut first, mut second) = (stopping(7), stopping(8));
    first.start().await.put("kept", "1").await.unwrap();
    // The one that is first to come back knows where it was, or has its state alone.
    for knows_where in [true, false] {
        let (a, b) = match (&first.node, &second.node) {
            (Some(a), Some(b)) => (a.handle(), b.handle()),
            (Some(a), None) => (a.handle(), second.start().await),
            _ => panic!("the first does not run"),
        };
        // As if it was copied when the power went.
        broker.signal(Signal::STOP);
        let copied = Command::new("cp").arg("-a").arg(broker.path("data")).arg(broker.path("copy")).status().unwrap();
        assert!(copied.success());
        broker.signal(Signal::CONT);
        healthy(&a).await;
        healthy(&b).await;
        for number in 0..5 {
            a.put(format!("lost.{number}"), "1").await.unwrap();
        }
        shows(&b, "lost.4", Some("1")).await;
        let before = a.epoch();
        first.stop().await;
        second.stop().await;
        broker.kill();
        std::fs::remove_dir_all(broker.path("data")).unwrap();
        std::fs::rename(broker.path("copy"), broker.path("data")).unwrap();
        broker.run();
        let foreign = Foreign::start(&libs, &broker.address());
        for number in 0..9 {
            foreign.done(&["put", "lamps", "overtaken", &number.to_string()]);
        }
        if !knows_where {
            (first.engine, second.engine) = (engine(), engine());
        }
        let (a, b) = (first.start().await, second.start().await);
        assert_ne!(a.epoch(), before);
        until("both are of one epoch", async || a.health().await.is_ok() && a.epoch() == b.epoch()).await;
        for nkv in [&a, &b] {
            shows(nkv, "overtaken", Some("8")).await;
            assert_eq!(nkv.list("lost.*").await.unwrap().len(), 0);
            assert_eq!(value(nkv, "kept").await.as_deref(), Some("1"));
        }
    }
}
