//! A node whose truth lies in an engine.

#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use nkv_core::{Action, Change, Epoch, Key, MemoryPersist, Meta, NoPersist, Op, PutOptions};
use nkv_node::{
    Abilities, Decided, Engine, EngineError, ErrorKind, Event, Feed, GoneReason, Handle, Node, Result, Revision, Seen,
};
use nkv_testkit::engine::{ScriptedEngine, check};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(20);

/// How long an answer waits for its node.
const FEED_LIMIT: Duration = Duration::from_secs(1);

async fn started(engine: &ScriptedEngine) -> (Node, Handle) {
    let node = Node::builder().engine(engine.clone()).start().await.unwrap();
    let handle = node.handle();
    healthy(&handle).await;
    (node, handle)
}

async fn healthy(nkv: &Handle) {
    until(async || nkv.health().await.is_ok()).await;
}

async fn until(mut is_so: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, wait).await.expect("it does not come to that");
}

fn kind<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.unwrap_err().kind().clone()
}

const UNAVAILABLE: ErrorKind = ErrorKind::Refused { status: 503 };

#[tokio::test(flavor = "multi_thread")]
async fn the_scripted_engine_keeps_the_contract() {
    let engine = ScriptedEngine::default();
    check(|| engine.clone()).await;
}

#[tokio::test]
async fn while_the_engine_is_out_of_reach_reads_go_on_and_say_so_and_writes_are_refused_at_once() {
    let engine = ScriptedEngine::default();
    let (_node, nkv) = started(&engine).await;
    nkv.put("a", "1").await.unwrap();
    engine.cut(true);
    until(async || nkv.health().await.is_err()).await;
    assert_eq!(kind(nkv.health().await), UNAVAILABLE);
    assert_eq!(nkv.get("a").await.unwrap().unwrap().value, "1");
    assert_eq!(kind(nkv.put("a", "2").await), UNAVAILABLE);
    engine.cut(false);
    healthy(&nkv).await;
    // It was not sent later.
    assert_eq!(nkv.get("a").await.unwrap().unwrap().value, "1");
    nkv.put("a", "3").await.unwrap();
}

#[tokio::test]
async fn a_node_without_a_state_yet_answers_503_rather_than_that_there_is_nothing() {
    let engine = ScriptedEngine::default();
    engine.cut(true);
    let node = Node::builder().engine(engine.clone()).start().await.unwrap();
    let nkv = node.handle();
    assert_eq!(kind(nkv.get("a").await), UNAVAILABLE);
    assert_eq!(kind(nkv.get_all("*").await), UNAVAILABLE);
    assert_eq!(kind(nkv.subscribe("*").await), UNAVAILABLE);
    assert_eq!(kind(nkv.put("a", "1").await), UNAVAILABLE);
    engine.cut(false);
    healthy(&nkv).await;
    assert_eq!(nkv.get("a").await.unwrap(), None);
}

#[tokio::test]
async fn a_write_is_answered_once_its_node_has_seen_it() {
    let engine = ScriptedEngine::default();
    let (_node, nkv) = started(&engine).await;
    engine.hold(true);
    let (writer, began) = (nkv.clone(), Instant::now());
    let put = tokio::spawn(async move { writer.put("a", "1").await });
    let other = started_without_waiting(&engine).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    // After a second it is answered all the same, which a busy machine may take.
    assert!(!put.is_finished() || began.elapsed() >= FEED_LIMIT, "it was answered before its writer can see it");
    engine.hold(false);
    timeout(PATIENCE, put).await.unwrap().unwrap().unwrap();
    assert_eq!(nkv.get("a").await.unwrap().unwrap().value, "1");
    drop(other);
}

#[tokio::test]
async fn a_node_that_has_answered_what_it_has_not_seen_says_that_it_is_stale_until_it_has() {
    let engine = ScriptedEngine::default();
    let (_node, nkv) = started(&engine).await;
    let mut stale = nkv.stale().unwrap();
    engine.hold(true);
    for value in ["1", "2"] {
        timeout(PATIENCE, nkv.put("a", value)).await.unwrap().unwrap();
        assert_eq!(nkv.get("a").await.unwrap(), None, "the node was to see nothing");
        assert!(nkv.stale_for().is_some_and(|stale| stale >= FEED_LIMIT), "{:?}", nkv.stale_for());
    }
    assert!(stale.borrow_and_update().is_some());
    assert_eq!(kind(nkv.health().await), UNAVAILABLE);
    // The engine is in reach, and decides conditions as before.
    let absent = nkv_node::PutOptions::default().with_if_revision(Revision::ZERO);
    assert!(matches!(kind(nkv.put_with("a", "3", absent).await), ErrorKind::Conflict { .. }));
    engine.hold(false);
    assert_eq!(timeout(PATIENCE, stale.wait_for(Option::is_none)).await.map(|seen| seen.is_ok()), Ok(true));
    assert_eq!((nkv.get("a").await.unwrap().unwrap().value, nkv.health().await), ("2".into(), Ok(())));
}

async fn started_without_waiting(engine: &ScriptedEngine) -> Node {
    Node::builder().engine(engine.clone()).start().await.unwrap()
}

#[tokio::test]
async fn a_lost_answer_is_an_unknown_outcome_and_the_write_is_not_repeated() {
    let engine = ScriptedEngine::default();
    let (_node, nkv) = started(&engine).await;
    engine.lose_answers(true);
    assert_eq!(kind(nkv.put("a", "1").await), ErrorKind::OutcomeUnknown);
    engine.lose_answers(false);
    until(async || nkv.exists("a").await.unwrap()).await;
    assert_eq!(nkv.put("b", "1").await.unwrap().get(), 2, "the write was done again");
}

#[tokio::test]
async fn what_was_missed_behind_a_compaction_is_delivered_as_the_difference() {
    let engine = ScriptedEngine::default();
    let (_node, nkv) = started(&engine).await;
    let (_other, elsewhere) = started(&engine).await;
    for name in ["kept", "gone", "changed"] {
        elsewhere.put(name, "1").await.unwrap();
    }
    until(async || nkv.exists("changed").await.unwrap()).await;
    let mut events = nkv.subscribe("*").await.unwrap();
    while !matches!(events.next().await.unwrap(), Event::Synced { .. }) {}
    engine.hold(true);
    // Not seen here: what is written there is answered when that node goes on.
    let put = |name: &str| Op::Put { key: Key::new(name).unwrap(), value: "2".into(), options: PutOptions::default() };
    let delete = Op::Delete { pattern: nkv_core::Pattern::new("gone").unwrap(), if_revision: None };
    let writing = tokio::spawn(async move { elsewhere.write(vec![put("changed"), delete]).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    engine.compact();
    engine.hold(false);
    writing.await.unwrap().unwrap();
    let mut seen = Vec::new();
    while seen.len() < 2 {
        match timeout(PATIENCE, events.next()).await.unwrap().unwrap() {
            Event::Update { entry, .. } => seen.push(format!("{} {:?}", entry.key, entry.value)),
            Event::Gone { key, reason, .. } => {
                assert_eq!(reason, GoneReason::Deleted);
                seen.push(format!("{key} gone"));
            }
            Event::Synced { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    seen.sort();
    assert_eq!(seen, ["changed b\"2\"", "gone gone"]);
}

#[tokio::test]
async fn an_engine_that_begins_anew_begins_an_epoch_and_subscribers_have_its_state() {
    let engine = ScriptedEngine::default();
    let (_node, nkv) = started(&engine).await;
    let before = nkv.put("old", "1").await.unwrap();
    let mut events = nkv.subscribe("*").await.unwrap();
    while !matches!(events.next().await.unwrap(), Event::Synced { .. }) {}
    engine.begin_anew(Epoch::new(2));
    until(async || nkv.epoch() == Epoch::new(2)).await;
    let stale = nkv_node::PutOptions::default().with_if_revision(before);
    assert_eq!(kind(nkv.put_with("old", "2", stale).await), ErrorKind::OtherEpoch);
    nkv.put("new", "1").await.unwrap();
    let (mut connected, mut gone, mut new) = (false, false, None::<Revision>);
    while new.is_none() || !gone {
        match timeout(PATIENCE, events.next()).await.unwrap().unwrap() {
            Event::Connected { epoch, .. } => connected = epoch == Epoch::new(2),
            Event::Gone { key, .. } => gone = key.as_str() == "old" && connected,
            Event::Update { entry, .. } => new = Some(entry.revision),
            Event::Synced { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(connected && new.is_some_and(|new| new.epoch() == Some(Epoch::new(2)) && new.get() == 1));
}

/// Storage that keeps no meta.
#[derive(Debug, Default)]
struct Plain(NoPersist);

impl nkv_core::PersistValue for Plain {
    fn load(
        &mut self,
        visit: &mut dyn FnMut(nkv_core::StoredRef<'_>),
    ) -> std::result::Result<nkv_core::Loaded, nkv_core::PersistError> {
        self.0.load(visit)
    }

    fn persist(&mut self, batch: &[nkv_core::Change]) -> std::result::Result<(), nkv_core::PersistError> {
        self.0.persist(batch)
    }
}

#[tokio::test]
async fn an_engine_that_needs_meta_is_not_given_storage_that_keeps_none() {
    let builder = Node::builder().persist("sync", || Ok(Plain::default())).engine(ScriptedEngine::default());
    let refused = builder.start().await.unwrap_err();
    assert!(refused.to_string().contains("meta"), "{refused}");
    let builder = Node::builder().persist("sync", || Ok(MemoryPersist::default())).engine(ScriptedEngine::default());
    builder.start().await.unwrap().shutdown().await.unwrap();
}

// It hung: the write did not learn that its node follows no more.
#[tokio::test]
async fn a_node_stops_although_a_write_waits_for_its_feed() {
    let engine = ScriptedEngine::default();
    let (node, nkv) = started(&engine).await;
    engine.hold(true);
    let put = tokio::spawn(async move { nkv.put("a", "1").await });
    tokio::task::yield_now().await;
    timeout(PATIENCE, node.shutdown()).await.expect("it does not stop").unwrap();
    // The engine has it, or the node stopped before it was asked.
    let done = timeout(PATIENCE, put).await.expect("the put has no answer").unwrap();
    assert!(
        done.is_ok() || matches!(kind(done), ErrorKind::OutcomeUnknown | ErrorKind::Closed | ErrorKind::Refused { .. })
    );
}

#[tokio::test]
async fn a_snapshot_that_an_epoch_breaks_off_is_followed_by_a_whole_one() {
    let engine = ScriptedEngine::default();
    let (_node, nkv) = started(&engine).await;
    // More than one part.
    for n in 0..3_000 {
        nkv.put(format!("k.{n:04}"), "1").await.unwrap();
    }
    let mut events = nkv.subscribe("*").await.unwrap();
    assert!(matches!(events.next().await, Some(Event::Update { .. })));
    engine.begin_anew(Epoch::new(2));
    until(async || nkv.epoch() == Epoch::new(2)).await;
    nkv.put("new", "1").await.unwrap();
    let synced = async {
        loop {
            match events.next().await.unwrap() {
                Event::Synced { epoch, .. } if epoch == Epoch::new(2) => return,
                Event::Ended(reason) => panic!("{reason:?}"),
                _ => {}
            }
        }
    };
    timeout(PATIENCE, synced).await.expect("it is never synced again");
}

/// Feeds one value, passes a revision, and gives what the feed shows of the node.
#[derive(Debug)]
struct Passing(tokio::sync::mpsc::UnboundedSender<Vec<(Key, u64)>>);

#[async_trait::async_trait]
impl Engine for Passing {
    fn abilities(&self) -> Abilities {
        Abilities::default()
    }

    async fn write(&self, _: Epoch, _: Vec<Op>, _: bool) -> std::result::Result<Decided, EngineError> {
        Err(EngineError::Unavailable("it takes nothing".into()))
    }

    async fn follow(&self, _: Option<Seen>, feed: Feed) -> EngineError {
        let put = |name: &str, revision| Change {
            key: Key::new(name).unwrap(),
            revision: nkv_core::Revision::new(revision),
            replaces: nkv_core::Revision::ZERO,
            action: Action::Put { value: "1".into(), expiry: None },
            meta: Meta::NONE,
        };
        let state = vec![put("a", 1), put("a.b", 2), put("c", 3)];
        feed.replace(state, nkv_core::Revision::new(3), Epoch::new(1)).await.unwrap();
        feed.pass(nkv_core::Revision::new(9)).await.unwrap();
        feed.reached();
        let mut shown = Vec::new();
        feed.walk(&"a.*".parse().unwrap(), |record| shown.push((record.key.to_key(), record.revision.get())));
        self.0.send(shown).unwrap();
        std::future::pending().await
    }

    async fn last(&self) -> std::result::Result<Seen, EngineError> {
        Ok(Seen { epoch: Epoch::new(1), revision: nkv_core::Revision::new(9) })
    }
}

#[tokio::test]
async fn an_engine_passes_revisions_at_which_nothing_changed_and_looks_at_what_the_node_shows() {
    let (shown, mut keys) = tokio::sync::mpsc::unbounded_channel();
    let node = Node::builder().engine(Passing(shown)).start().await.unwrap();
    let nkv = node.handle();
    healthy(&nkv).await;
    assert_eq!(nkv.revision().get(), 9);
    assert_eq!(timeout(PATIENCE, keys.recv()).await.unwrap().unwrap(), [(Key::new("a.b").unwrap(), 2)]);
}

#[tokio::test]
async fn a_client_that_has_seen_more_elsewhere_waits_for_its_node_or_begins_anew() {
    let engine = ScriptedEngine::default();
    let (_node, nkv) = started(&engine).await;
    nkv.put("a", "1").await.unwrap();
    engine.hold(true);
    // Another node writes, and this one is held back.
    let elsewhere = ScriptedEngine::clone(&engine);
    let op = Op::Put { key: Key::new("a").unwrap(), value: "2".into(), options: PutOptions::default() };
    elsewhere.write(Epoch::new(1), vec![op], false).await.unwrap();
    let seen = |revision| Seen { epoch: nkv.epoch(), revision: nkv_core::Revision::new(revision) };
    assert_eq!(nkv.catch_up(seen(1)).await, Ok(true));
    let (waiting, wanted) = (nkv.clone(), seen(2));
    let waiting = tokio::spawn(async move { waiting.catch_up(wanted).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!waiting.is_finished(), "the node has not seen it");
    engine.hold(false);
    assert_eq!(timeout(PATIENCE, waiting).await.unwrap().unwrap(), Ok(true));
    assert_eq!(nkv.get("a").await.unwrap().unwrap().value, "2");
    // The engine has it not: at once.
    assert_eq!(nkv.catch_up(seen(3)).await, Ok(false));
    assert_eq!(nkv.catch_up(Seen { epoch: Epoch::new(7), ..seen(1) }).await, Ok(false));
    engine.cut(true);
    assert_eq!(kind(nkv.catch_up(seen(3)).await), UNAVAILABLE);
    until(async || nkv.stale_for().is_some()).await;
    assert!(nkv.health().await.unwrap_err().to_string().contains("stale for "));
    assert_eq!(nkv.check_readable(), Ok(()));
    engine.cut(false);
    healthy(&nkv).await;
    assert_eq!(nkv.stale_for(), None);
}

/// Feeds what a test gives it.
#[derive(Debug)]
struct Fed(tokio::sync::Mutex<tokio::sync::mpsc::Receiver<Vec<Change>>>);

const FED: Seen = Seen { epoch: Epoch::new(5), revision: nkv_core::Revision::new(1) };

#[async_trait::async_trait]
impl Engine for Fed {
    fn abilities(&self) -> Abilities {
        Abilities::default()
    }

    async fn write(&self, _: Epoch, _: Vec<Op>, _: bool) -> std::result::Result<Decided, EngineError> {
        let revision = FED.revision.next();
        Ok(Decided { epoch: FED.epoch, results: vec![Ok(nkv_core::Outcome::Put { revision })] })
    }

    async fn follow(&self, _: Option<Seen>, feed: Feed) -> EngineError {
        let mut changes = self.0.lock().await;
        feed.replace(Vec::new(), FED.revision, FED.epoch).await.unwrap();
        feed.reached();
        while let Some(changes) = changes.recv().await {
            feed.apply(changes).await.unwrap();
            feed.pass(nkv_core::Revision::new(9)).await.unwrap();
        }
        EngineError::Unavailable("it ends".into())
    }

    async fn last(&self) -> std::result::Result<Seen, EngineError> {
        Ok(FED)
    }
}

#[tokio::test]
async fn a_node_is_not_stale_any_more_once_it_is_fed_what_it_has_answered() {
    let (changes, fed) = tokio::sync::mpsc::channel(1);
    let node = Node::builder().engine(Fed(tokio::sync::Mutex::new(fed))).start().await.unwrap();
    let nkv = node.handle();
    healthy(&nkv).await;
    assert_eq!(timeout(PATIENCE, nkv.put("a", "1")).await.unwrap().unwrap().get(), 2);
    assert!(nkv.health().await.unwrap_err().to_string().contains("feeds too late"));
    let action = Action::Put { value: "1".into(), expiry: None };
    let revision = nkv_core::Revision::new(2);
    let (key, replaces, meta) = (Key::new("a").unwrap(), nkv_core::Revision::ZERO, nkv_core::Meta::NONE);
    changes.send(vec![Change { key, revision, replaces, action, meta }]).await.unwrap();
    healthy(&nkv).await;
    assert_eq!(nkv.get("a").await.unwrap().unwrap().value, "1");
}

/// Counts how often it is looked at.
#[derive(Debug)]
struct Counted(std::sync::Arc<std::sync::atomic::AtomicU64>);

impl nkv_node::Time for Counted {
    fn elapsed(&self) -> Duration {
        self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        nkv_node::SinceBoot.elapsed()
    }
}

#[tokio::test]
async fn a_value_that_is_due_waits_for_its_engine_without_work_and_others_are_hidden_in_time() {
    let (changes, fed) = tokio::sync::mpsc::channel(1);
    let looks = std::sync::Arc::<std::sync::atomic::AtomicU64>::default();
    let engine = Fed(tokio::sync::Mutex::new(fed));
    let node = Node::builder().time(Counted(looks.clone())).engine(engine).start().await.unwrap();
    let nkv = node.handle();
    healthy(&nkv).await;
    let put = |revision: u64, key: &str, ms: u64| Change {
        key: Key::new(key).unwrap(),
        revision: nkv_core::Revision::new(revision),
        replaces: nkv_core::Revision::ZERO,
        action: Action::Put { value: "1".into(), expiry: Some(nkv.expiry(Duration::from_millis(ms))) },
        meta: nkv_core::Meta::NONE,
    };
    changes.send(vec![put(2, "due", 20), put(3, "later", 300), put(4, "last", 3_600_000)]).await.unwrap();
    until(async || nkv.revision().get() == 9).await;
    until(async || !nkv.exists("due").await.unwrap()).await;
    let before = looks.load(std::sync::atomic::Ordering::Relaxed);
    until(async || !nkv.exists("later").await.unwrap()).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let count = looks.load(std::sync::atomic::Ordering::Relaxed) - before;
    assert!(count < 20, "the clock was looked at {count} times");
    assert!(nkv.exists("last").await.unwrap());
}

#[tokio::test]
async fn a_value_whose_end_the_node_knows_is_hidden_then_and_notified_when_the_engine_says_so() {
    let (changes, fed) = tokio::sync::mpsc::channel(1);
    let node = Node::builder().engine(Fed(tokio::sync::Mutex::new(fed))).start().await.unwrap();
    let nkv = node.handle();
    healthy(&nkv).await;
    let mut events = nkv.subscribe("a").await.unwrap();
    assert!(matches!(events.next().await, Some(Event::Synced { .. })));
    let change = |revision: u64, action| Change {
        key: Key::new("a").unwrap(),
        revision: nkv_core::Revision::new(revision),
        replaces: nkv_core::Revision::ZERO,
        action,
        meta: nkv_core::Meta::NONE,
    };
    let expiry = Some(nkv.expiry(Duration::from_millis(50)));
    changes.send(vec![change(2, Action::Put { value: "1".into(), expiry })]).await.unwrap();
    assert!(matches!(timeout(PATIENCE, events.next()).await.unwrap(), Some(Event::Update { .. })));
    until(async || nkv.revision().get() == 9).await;
    until(async || nkv.get("a").await.unwrap().is_none()).await;
    assert!(
        timeout(Duration::from_millis(50), events.next()).await.is_err(),
        "it is notified before the engine says so"
    );
    changes.send(vec![change(10, Action::Delete { reason: nkv_core::Reason::Expired })]).await.unwrap();
    let event = timeout(PATIENCE, events.next()).await.unwrap();
    assert!(matches!(event, Some(Event::Gone { reason: GoneReason::Expired, .. })), "{event:?}");
}
