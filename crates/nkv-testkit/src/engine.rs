//! A checklist for engines, and an engine in memory that does what a test asks for.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use nkv_core::{Action, Change, Epoch, Key, MemoryPersist, Meta, Op, Outcome, Pattern, PutOptions, Reason, Revision};
use nkv_node::{Abilities, Decided, Engine, EngineError, ErrorKind, Event, Feed, GoneReason, Handle, Node, Seen};
use tokio::sync::watch;
use tokio::time::timeout;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// An engine in memory. Clones share its truth, as the engines of several nodes do.
#[derive(Clone, Debug)]
pub struct ScriptedEngine {
    world: Arc<Mutex<World>>,
    /// Counts what happens.
    ticks: watch::Sender<u64>,
}

#[derive(Debug)]
struct World {
    epoch: Epoch,
    revision: Revision,
    records: BTreeMap<Key, Record>,
    /// The batches of the latest revisions, one for each.
    log: VecDeque<Vec<Change>>,
    is_cut: bool,
    is_held: bool,
    loses_answers: bool,
    abilities: Abilities,
}

#[derive(Clone, Debug)]
struct Record {
    value: Bytes,
    revision: Revision,
}

impl World {
    fn commit(&mut self, changes: Vec<Change>) {
        for change in &changes {
            match &change.action {
                Action::Put { value, .. } => {
                    let record = Record { value: value.clone(), revision: change.revision };
                    self.records.insert(change.key.clone(), record);
                }
                Action::Delete { .. } => drop(self.records.remove(&change.key)),
            }
        }
        if let Some(last) = changes.last() {
            self.revision = last.revision;
            self.log.push_back(changes);
        }
    }

    /// What an operation does at a revision.
    fn plan(&self, op: &Op, revision: Revision, changes: &mut Vec<Change>) -> Outcome {
        let present = |key: &Key| self.records.get(key).map_or(Revision::ZERO, |record| record.revision);
        let change = |key: &Key, action| Change {
            key: key.clone(),
            revision,
            replaces: Revision::ZERO,
            action,
            meta: Meta::NONE,
        };
        match op {
            Op::Put { key, value, options } => {
                if options.if_revision.is_some_and(|expected| expected != present(key)) {
                    return Outcome::Conflict { revision: present(key) };
                }
                changes.retain(|before| before.key != *key);
                changes.push(change(key, Action::Put { value: value.clone(), expiry: None }));
                Outcome::Put { revision }
            }
            Op::Delete { pattern, if_revision } => {
                let keys: Vec<&Key> = self.records.keys().filter(|key| pattern.selects(key)).collect();
                if let (Some(expected), [key]) = (if_revision, &keys[..])
                    && *expected != present(key)
                {
                    return Outcome::Conflict { revision: present(key) };
                }
                for key in &keys {
                    changes.retain(|before| before.key != **key);
                    changes.push(change(key, Action::Delete { reason: Reason::Deleted }));
                }
                match keys.len() {
                    0 => Outcome::NotFound,
                    count => Outcome::Deleted { count: count as u64, revision },
                }
            }
        }
    }
}

impl Default for ScriptedEngine {
    fn default() -> Self {
        let world = World {
            epoch: Epoch::new(1),
            revision: Revision::ZERO,
            records: BTreeMap::new(),
            log: VecDeque::new(),
            is_cut: false,
            is_held: false,
            loses_answers: false,
            abilities: Abilities::ALL,
        };
        ScriptedEngine { world: Arc::new(Mutex::new(world)), ticks: watch::Sender::new(0) }
    }
}

impl ScriptedEngine {
    fn with<R>(&self, change: impl FnOnce(&mut World) -> R) -> R {
        let result = change(&mut self.lock());
        self.ticks.send_modify(|ticks| *ticks += 1);
        result
    }

    fn lock(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Is out of reach, or not any more.
    pub fn cut(&self, is_cut: bool) {
        self.with(|world| world.is_cut = is_cut);
    }

    /// Feeds nothing for now, although it takes writes; or goes on.
    pub fn hold(&self, is_held: bool) {
        self.with(|world| world.is_held = is_held);
    }

    /// Does what it is asked for, and its answers are lost.
    pub fn lose_answers(&self, loses: bool) {
        self.with(|world| world.loses_answers = loses);
    }

    /// Has these abilities from now on.
    pub fn set_abilities(&self, abilities: Abilities) {
        self.with(|world| world.abilities = abilities);
    }

    /// Forgets the changes so far: a node that has not seen them is fed the whole state.
    pub fn compact(&self) {
        self.with(|world| world.log.clear());
    }

    /// Begins anew, with nothing.
    pub fn begin_anew(&self, epoch: Epoch) {
        self.with(|world| {
            (world.epoch, world.revision) = (epoch, Revision::ZERO);
            world.records.clear();
            world.log.clear();
        });
    }

    fn expire(&self, key: &Key, revision: Revision) {
        self.with(|world| {
            if world.records.get(key).is_some_and(|record| record.revision == revision) {
                let action = Action::Delete { reason: Reason::Expired };
                let (key, revision) = (key.clone(), world.revision.next());
                world.commit(vec![Change { key, revision, replaces: Revision::ZERO, action, meta: Meta::NONE }]);
            }
        });
    }

    async fn feed(&self, mut seen: Option<Seen>, feed: &Feed) -> Result<(), EngineError> {
        enum Next {
            State(Vec<Change>, Seen),
            Changes(Vec<Change>),
            Nothing,
        }
        let mut ticks = self.ticks.subscribe();
        loop {
            ticks.mark_unchanged();
            let next = {
                let world = self.lock();
                if world.is_cut {
                    return Err(EngineError::Unavailable("it is cut off".into()));
                }
                let present = Seen { epoch: world.epoch, revision: world.revision };
                let first = world.log.front().and_then(|batch| batch.first()).map(|change| change.revision);
                match seen {
                    _ if world.is_held => Next::Nothing,
                    Some(seen) if seen == present => {
                        feed.reached();
                        Next::Nothing
                    }
                    Some(seen)
                        if seen.epoch == present.epoch && first.is_some_and(|first| first <= seen.revision.next()) =>
                    {
                        let batch = world.log.iter().find(|batch| batch[0].revision > seen.revision);
                        Next::Changes(batch.cloned().unwrap_or_default())
                    }
                    _ => {
                        let put = |(key, record): (&Key, &Record)| Change {
                            key: key.clone(),
                            revision: record.revision,
                            replaces: Revision::ZERO,
                            action: Action::Put { value: record.value.clone(), expiry: None },
                            meta: Meta::NONE,
                        };
                        Next::State(world.records.iter().map(put).collect(), present)
                    }
                }
            };
            match next {
                Next::Changes(batch) => {
                    let revision = batch[0].revision;
                    feed.apply(batch).await?;
                    seen = seen.map(|seen| Seen { revision, ..seen });
                }
                Next::State(state, present) => {
                    feed.replace(state, present.revision, present.epoch).await?;
                    seen = Some(present);
                }
                Next::Nothing => drop(ticks.changed().await),
            }
        }
    }
}

#[async_trait]
impl Engine for ScriptedEngine {
    fn abilities(&self) -> Abilities {
        self.lock().abilities
    }

    async fn write(&self, epoch: Epoch, ops: Vec<Op>, together: bool) -> Result<Decided, EngineError> {
        let mut expiring = Vec::new();
        let (decided, loses_answers) = self.with(|world| {
            if world.is_cut {
                return Err(EngineError::Unavailable("it is cut off".into()));
            }
            let (mut outcomes, mut changes) = (Vec::new(), Vec::new());
            for op in &ops {
                let has_condition = match op {
                    Op::Put { options, .. } => options.if_revision.is_some(),
                    Op::Delete { if_revision, .. } => if_revision.is_some(),
                };
                if has_condition && epoch != world.epoch {
                    outcomes.push(Err(EngineError::OtherEpoch));
                    continue;
                }
                let outcome = world.plan(op, world.revision.next(), &mut changes);
                if let (
                    Op::Put { key, options: PutOptions { expiry: Some(expiry), .. }, .. },
                    Outcome::Put { revision },
                ) = (op, outcome)
                {
                    expiring.push((key.clone(), revision, Duration::from_millis(expiry.ttl_ms)));
                }
                outcomes.push(Ok(outcome));
                if !together {
                    world.commit(std::mem::take(&mut changes));
                }
            }
            world.commit(changes);
            Ok((Decided { epoch: world.epoch, results: outcomes }, world.loses_answers))
        })?;
        for (key, revision, ttl) in expiring {
            let engine = self.clone();
            tokio::spawn(async move {
                tokio::time::sleep(ttl).await;
                engine.expire(&key, revision);
            });
        }
        if loses_answers { Err(EngineError::OutcomeUnknown("its answer was lost".into())) } else { Ok(decided) }
    }

    async fn follow(&self, seen: Option<Seen>, feed: Feed) -> EngineError {
        match self.feed(seen, &feed).await {
            Err(error) => error,
            Ok(()) => EngineError::Unavailable("it ended".into()),
        }
    }

    async fn last(&self) -> Result<Seen, EngineError> {
        let world = self.lock();
        match world.is_cut {
            true => Err(EngineError::Unavailable("it is cut off".into())),
            false => Ok(Seen { epoch: world.epoch, revision: world.revision }),
        }
    }
}

/// Checks an engine: `make` gives engines of one truth, which is empty at the beginning, as several nodes have them. Panics
/// where one does not keep the contract.
pub async fn check<E: Engine>(make: impl Fn() -> E) {
    let start =
        async || ready(Node::builder().engine(make()).start().await.unwrap_or_else(|error| panic!("{error}"))).await;
    let (first, second) = (start().await, start().await);
    let (a, b) = (first.handle(), second.handle());
    let abilities = a.abilities();
    writes_are_seen_by_their_writer_at_once_and_everywhere_in_the_end(&a, &b).await;
    all_nodes_have_one_order_of_changes(&a, &b).await;
    a_condition_holds_everywhere(&a, &b, abilities).await;
    a_batch_is_one_step(&a, &b, abilities).await;
    a_wildcard_deletes_what_it_selects(&a, &b, abilities).await;
    a_value_with_a_ttl_ends_everywhere(&a, &b, abilities).await;
    for node in [first, second] {
        node.shutdown().await.unwrap_or_else(|error| panic!("{error}"));
    }
    what_was_missed_comes_after_a_restart(make).await;
}

/// Once it has a state.
async fn ready(node: Node) -> Node {
    let handle = node.handle();
    eventually("the engine is in reach", async || handle.health().await.is_ok()).await;
    node
}

async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(timeout(PATIENCE, wait).await.is_ok(), "not in {PATIENCE:?}: {what}");
}

async fn value(nkv: &Handle, key: &str) -> Option<Bytes> {
    nkv.get(key).await.unwrap_or_else(|error| panic!("get of {key}: {error}")).map(|entry| entry.value)
}

async fn writes_are_seen_by_their_writer_at_once_and_everywhere_in_the_end(a: &Handle, b: &Handle) {
    for number in 0..20 {
        let text = number.to_string();
        a.put("seen", text.as_str()).await.unwrap_or_else(|error| panic!("put: {error}"));
        assert_eq!(value(a, "seen").await.as_deref(), Some(text.as_bytes()), "a client does not see its own write");
    }
    eventually("the other node has the last value", async || value(b, "seen").await.as_deref() == Some(b"19")).await;
    let deleted = b.delete("seen").await.unwrap_or_else(|error| panic!("delete: {error}"));
    assert_eq!((deleted.count, value(b, "seen").await), (1, None), "a client does not see its own delete");
    eventually("the other node has the delete", async || value(a, "seen").await.is_none()).await;
    assert_eq!(a.delete("seen").await.map(|deleted| deleted.count).ok(), Some(0));
}

async fn all_nodes_have_one_order_of_changes(a: &Handle, b: &Handle) {
    const KEYS: usize = 4;
    let mut streams = Vec::new();
    for nkv in [a, b] {
        streams.push(nkv.subscribe("order").await.unwrap_or_else(|error| panic!("subscribe: {error}")));
    }
    let write = |nkv: Handle, name: &'static str| async move {
        for number in 0..40 {
            let put = nkv.put(format!("order.k{}", number % KEYS), format!("{name}{number}"));
            put.await.unwrap_or_else(|error| panic!("put: {error}"));
        }
    };
    let writing = [tokio::spawn(write(a.clone(), "a")), tokio::spawn(write(b.clone(), "b"))];
    for one in writing {
        one.await.unwrap_or_else(|error| panic!("{error}"));
    }
    a.put("order.z", "1").await.unwrap_or_else(|error| panic!("put: {error}"));
    let mut states = Vec::new();
    for stream in &mut streams {
        let mut state = BTreeMap::new();
        while !state.contains_key("order.z") {
            match timeout(PATIENCE, stream.next()).await {
                Ok(Some(Event::Update { entry, .. })) => {
                    let before = state.insert(entry.key.as_str().to_owned(), (entry.revision.get(), entry.value));
                    assert!(
                        before.is_none_or(|before| before.0 < entry.revision.get()),
                        "revisions of a key do not rise"
                    );
                }
                Ok(Some(Event::Synced { .. })) => {}
                other => panic!("the last change does not come: {other:?}"),
            }
        }
        states.push(state);
    }
    assert_eq!(states[0], states[1], "two nodes end with different states");
}

async fn a_condition_holds_everywhere(a: &Handle, b: &Handle, abilities: Abilities) {
    let absent = nkv_node::PutOptions::default().with_if_revision(nkv_node::Revision::ZERO);
    if !abilities.conditions {
        let refused = a.put_with("lock", "a", absent).await.map_err(|error| error.kind().clone());
        assert_eq!(refused, Err(ErrorKind::Refused { status: 501 }), "a condition is imitated");
        return;
    }
    let take = |nkv: Handle, number: usize| async move { nkv.put_with("lock", number.to_string(), absent).await };
    let taking = (0..8).map(|number| tokio::spawn(take(if number % 2 == 0 { a.clone() } else { b.clone() }, number)));
    let mut won = BTreeSet::new();
    for (number, one) in taking.collect::<Vec<_>>().into_iter().enumerate() {
        match one.await.unwrap_or_else(|error| panic!("{error}")) {
            Ok(_) => drop(won.insert(number)),
            Err(error) => assert!(matches!(error.kind(), ErrorKind::Conflict { .. }), "{error}"),
        }
    }
    assert_eq!(won.len(), 1, "a lock was taken by {won:?}");
}

async fn a_batch_is_one_step(a: &Handle, b: &Handle, abilities: Abilities) {
    let put = |name: &str| Op::Put {
        key: Key::new(name).unwrap_or_else(|error| panic!("{error}")),
        value: "1".into(),
        options: PutOptions::default(),
    };
    if !abilities.batches {
        let refused =
            a.write(vec![put("batch.a"), put("batch.b")]).await.map(drop).map_err(|error| error.kind().clone());
        assert_eq!(refused, Err(ErrorKind::Refused { status: 501 }), "a batch is imitated");
        return;
    }
    let mut changes = b.changes(None).unwrap_or_else(|error| panic!("changes: {error}"));
    a.write(vec![put("batch.a"), put("batch.b")]).await.unwrap_or_else(|error| panic!("batch: {error}"));
    loop {
        let group = timeout(PATIENCE, changes.next()).await.ok().and_then(Result::ok).flatten();
        let group = group.unwrap_or_else(|| panic!("the batch does not come"));
        let of_batch = |change: &&Change| change.key.as_str().starts_with("batch.");
        match group.changes.iter().filter(of_batch).count() {
            0 => {}
            count => break assert_eq!(count, 2, "a batch came in parts"),
        }
    }
}

async fn a_wildcard_deletes_what_it_selects(a: &Handle, b: &Handle, abilities: Abilities) {
    for name in ["branch", "branch.a", "branch.b.c", "branches"] {
        a.put(name, "1").await.unwrap_or_else(|error| panic!("put: {error}"));
    }
    eventually("the other node has the values", async || b.exists("branches").await == Ok(true)).await;
    let deleted = b.delete("branch.*").await.map_err(|error| error.kind().clone());
    if !abilities.wildcards {
        assert_eq!(deleted, Err(ErrorKind::Refused { status: 501 }), "a wildcard delete is imitated");
        return;
    }
    assert_eq!(deleted.map(|deleted| deleted.count), Ok(2));
    assert_eq!(b.exists("branch.*").await, Ok(false), "a client does not see all of its own delete");
    assert_eq!((b.exists("branch").await, b.exists("branches").await), (Ok(true), Ok(true)), "it deletes too much");
    eventually("the other node has the delete", async || a.exists("branch.*").await == Ok(false)).await;
}

async fn a_value_with_a_ttl_ends_everywhere(a: &Handle, b: &Handle, abilities: Abilities) {
    let short = nkv_node::PutOptions::default().with_ttl(Duration::from_secs(2));
    if !abilities.ttl {
        let refused = a.put_with("ttl", "1", short).await.map_err(|error| error.kind().clone());
        assert_eq!(refused, Err(ErrorKind::Refused { status: 501 }), "a TTL is imitated");
        return;
    }
    let mut events = b.subscribe("ttl").await.unwrap_or_else(|error| panic!("subscribe: {error}"));
    a.put_with("ttl", "1", short).await.unwrap_or_else(|error| panic!("put: {error}"));
    loop {
        match timeout(PATIENCE, events.next()).await {
            Ok(Some(Event::Gone { reason: GoneReason::Expired, .. })) => break,
            Ok(Some(Event::Update { .. } | Event::Synced { .. })) => {}
            other => panic!("the value does not expire: {other:?}"),
        }
    }
    eventually("it has ended everywhere", async || value(a, "ttl").await.is_none()).await;
}

async fn what_was_missed_comes_after_a_restart<E: Engine>(make: impl Fn() -> E) {
    let disk = MemoryPersist::new(Epoch::new(9));
    let start = async |disk: &MemoryPersist| {
        let disk = disk.clone();
        let builder = Node::builder().persist("sync", move || Ok(disk)).engine(make());
        builder.start().await.unwrap_or_else(|error| panic!("{error}"))
    };
    let node = ready(start(&disk).await).await;
    for name in ["kept", "gone", "changed"] {
        node.handle().put(format!("restart.{name}"), "1").await.unwrap_or_else(|error| panic!("put: {error}"));
    }
    node.shutdown().await.unwrap_or_else(|error| panic!("{error}"));

    let other = ready(Node::builder().engine(make()).start().await.unwrap_or_else(|error| panic!("{error}"))).await;
    let nkv = other.handle();
    nkv.delete("restart.gone").await.unwrap_or_else(|error| panic!("delete: {error}"));
    nkv.put("restart.changed", "2").await.unwrap_or_else(|error| panic!("put: {error}"));

    let node = start(&disk).await;
    let restarted = node.handle();
    // From storage, before the engine is asked.
    assert!(restarted.exists("restart.kept").await.unwrap_or(false), "a node with storage has no state at its start");
    let expected = nkv.get_all(Pattern::All).await.unwrap_or_else(|error| panic!("{error}"));
    let of = |entries: &[nkv_node::Entry]| -> Vec<_> {
        entries.iter().map(|entry| (entry.key.clone(), entry.value.clone(), entry.revision.get())).collect()
    };
    eventually("the node has what it missed", async || {
        restarted.get_all(Pattern::All).await.is_ok_and(|all| of(&all) == of(&expected))
    })
    .await;
    for node in [node, other] {
        node.shutdown().await.unwrap_or_else(|error| panic!("{error}"));
    }
}
