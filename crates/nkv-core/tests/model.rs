//! Random operations on a `NotifyKeyValue` and on a model of it that is slow and obvious: maps of owned segments, lists
//! searched from end to end. Everything that anyone can see has to be the same, after each step.
//!
//! `PROPTEST_CASES=100000 cargo test -p nkv-core --release --test model` runs it for longer.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code too")]

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use nkv_core::mailbox::{Inbox, Item, Mailbox, mailbox};
use nkv_core::{
    Action, EndReason, Epoch, EventKind, Expiry, Key, MemoryPersist, NotifyKeyValue, Op, Outcome, Pattern,
    PersistErrorKind, PutOptions, Reason, Record, RecordRef, Revision, Timestamp,
};
use nkv_testkit::script::{Crash, PersistScript, ScriptedPersist};
use proptest::prelude::*;

type Store = NotifyKeyValue<ScriptedPersist<MemoryPersist>, Mailbox>;

const SUBSCRIBERS: usize = 3;

/// A key of the model. Its order is that of segments, without any trick.
type Path = Vec<&'static str>;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Which {
    Key(Path),
    Below(Path),
    All,
}

impl Which {
    fn selects(&self, path: &Path) -> bool {
        match self {
            Which::Key(own) => own == path,
            Which::Below(branch) => path.len() > branch.len() && path[..branch.len()] == branch[..],
            Which::All => true,
        }
    }

    fn covers(&self, path: &Path) -> bool {
        match self {
            Which::Key(branch) => path.len() >= branch.len() && path[..branch.len()] == branch[..],
            other => other.selects(path),
        }
    }

    fn pattern(&self) -> Pattern {
        match self {
            Which::Key(path) => Pattern::new(&path.join(".")).unwrap(),
            Which::Below(path) => Pattern::new(&format!("{}.*", path.join("."))).unwrap(),
            Which::All => Pattern::All,
        }
    }
}

fn t(millis: u64) -> Timestamp {
    Timestamp::from_millis(millis)
}

fn key(path: &Path) -> Key {
    Key::new(&path.join(".")).unwrap()
}

/// What revision a condition names.
#[derive(Clone, Copy, Debug)]
enum Expected {
    Present,
    Absent,
    Wrong,
}

#[derive(Clone, Debug)]
enum Write {
    Put { path: Path, value: u8, condition: Option<Expected>, ttl_ms: Option<u64> },
    Delete { which: Which, condition: Option<Expected> },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    Kind(PersistErrorKind),
    Crash(Crash),
}

#[derive(Clone, Debug)]
enum Step {
    Write(Vec<Write>),
    Time(u64),
    /// The store learns what time it is; storage may not know of what has ended since.
    Advance,
    Expire,
    Fail(Failure),
    Query {
        which: Which,
        after: Option<Path>,
        limit: usize,
    },
    Subscribe {
        who: usize,
        to: Which,
        snapshot: bool,
    },
    Unsubscribe {
        who: usize,
        from: Which,
    },
    Read {
        who: usize,
        at_most: usize,
    },
    /// The subscriber goes without a word.
    Leave {
        who: usize,
    },
    /// It subscribes over another mailbox from now on; the old one is still there.
    Reconnect {
        who: usize,
    },
    Restart {
        set_clock_back: bool,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    value: Bytes,
    revision: u64,
    expiry: Option<Expiry>,
}

/// What a change made of a key: a value, or its end.
type State = Result<(Bytes, Option<Expiry>), Reason>;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Notice {
    Change { path: Path, revision: u64, state: State, skipped: u64 },
    Began { of: Pattern, has_snapshot: bool },
    Ended { of: Pattern, reason: EndReason },
}

/// What is to be read: for a change, whether the reader knows nothing of its key; for a beginning, of which subscription.
#[derive(Clone, Debug)]
struct Due {
    notice: Notice,
    is_new: bool,
    subscription: u64,
}

#[derive(Clone, Debug, Default)]
struct Data {
    entries: BTreeMap<Path, Entry>,
    revision: u64,
}

/// A mailbox, and what must come out of it.
struct Connection {
    post: Mailbox,
    inbox: Option<Inbox>,
    expected: Vec<Due>,
    /// The snapshot that comes next, and the subscription whose it is.
    reading: Option<(Pattern, u64)>,
    /// The highest revision read.
    read: u64,
}

impl Connection {
    fn new() -> Self {
        let (post, inbox) = mailbox();
        Connection { post, inbox: Some(inbox), expected: vec![], reading: None, read: 0 }
    }

    fn expect(&mut self, notice: Notice) {
        self.expected.push(Due { notice, is_new: false, subscription: 0 });
    }

    fn begin(&mut self, of: Pattern, has_snapshot: bool, subscription: u64) {
        if has_snapshot {
            for due in &mut self.expected {
                let covered = |path: &Path| of.covers(&key(path));
                due.is_new &= !matches!(&due.notice, Notice::Change { path, .. } if covered(path));
            }
        }
        self.expected.push(Due { notice: Notice::Began { of, has_snapshot }, is_new: false, subscription });
    }

    /// Conflation, as one would explain it. `replaced`: the key was there before.
    fn change(&mut self, path: &Path, revision: u64, state: &State, replaced: bool) {
        let waits = |due: &Due| matches!(due.notice, Notice::Began { has_snapshot: true, .. });
        let is_snapshot_to_come = self.reading.is_some() || self.expected.iter().any(waits);
        let same = |due: &Due| matches!(&due.notice, Notice::Change { path: other, .. } if other == path);
        let old = self.expected.iter().position(same).map(|at| self.expected.remove(at));
        let (skipped, is_new) = match old {
            Some(Due { notice: Notice::Change { skipped, .. }, is_new, .. }) if is_new && state.is_err() => {
                let _ = skipped;
                return; // it came and went
            }
            Some(Due { notice: Notice::Change { skipped, .. }, is_new, .. }) => (skipped + 1, is_new),
            _ => (0, !replaced && !is_snapshot_to_come),
        };
        let notice = Notice::Change { path: path.clone(), revision, state: state.clone(), skipped };
        self.expected.push(Due { notice, is_new, subscription: 0 });
    }

    /// Reads on, and says which subscriptions have read their snapshots, given what a snapshot has now.
    fn read(&mut self, at_most: usize, snapshot: impl Fn(&Pattern) -> (Vec<Record>, u64)) -> Vec<u64> {
        let mut synced = vec![];
        let Some(inbox) = &self.inbox else { return synced };
        for _ in 0..at_most {
            let Some(item) = inbox.try_take() else {
                assert!(self.expected.is_empty() && self.reading.is_none(), "these never came: {:?}", self.expected);
                break;
            };
            if let Some((of, subscription)) = self.reading.take() {
                read_snapshot(inbox, &item, &of, snapshot(&of));
                synced.push(subscription);
                continue;
            }
            assert!(!self.expected.is_empty(), "{item:?} came, and nothing was to come");
            let due = self.expected.remove(0);
            let notice = notice_of(&item);
            assert_eq!(notice, due.notice);
            match notice {
                Notice::Change { revision, .. } => {
                    assert!(revision > self.read, "revisions increase");
                    self.read = revision;
                }
                Notice::Began { of, has_snapshot: true } => self.reading = Some((of, due.subscription)),
                Notice::Began { .. } | Notice::Ended { .. } => {}
            }
        }
        synced
    }
}

/// Reads all parts; the store stands still meanwhile, so they are of one moment.
fn read_snapshot(inbox: &Inbox, first: &Item, of: &Pattern, (expected, at): (Vec<Record>, u64)) {
    let mut records = vec![];
    let mut item = first.clone();
    loop {
        let Item::Event { event, .. } = &item else { panic!("{item:?}") };
        let EventKind::Snapshot(part) = event.kind() else { panic!("{event:?} came before the snapshot's end") };
        assert_eq!((&part.pattern, part.revision.get()), (of, at));
        records.extend(part.records.iter().map(RecordRef::to_record));
        if part.is_last {
            break;
        }
        item = inbox.try_take().expect("a snapshot has an end");
    }
    assert_eq!(records, expected);
}

fn notice_of(item: &Item) -> Notice {
    let Item::Event { event, skipped } = item else { panic!("no items of an owner are posted") };
    match event.kind() {
        EventKind::Change(change) => Notice::Change {
            path: change.key.segments().map(|segment| if segment == "a" { "a" } else { "b" }).collect(),
            revision: change.revision.get(),
            state: match &change.action {
                Action::Put { value, expiry } => Ok((value.clone(), *expiry)),
                Action::Delete { reason } => Err(*reason),
            },
            skipped: *skipped,
        },
        EventKind::Began(began) => Notice::Began { of: began.pattern.clone(), has_snapshot: began.has_snapshot },
        EventKind::Ended { pattern, reason } => Notice::Ended { of: pattern.clone(), reason: *reason },
        other => panic!("{other:?}"),
    }
}

/// A subscription: over which connection, and whether changes are for it, which they are once its snapshot is read.
#[derive(Clone, Copy)]
struct Subscribed {
    number: u64,
    connection: usize,
    is_live: bool,
}

struct World {
    store: Store,
    script: PersistScript,
    disk: MemoryPersist,
    memory: Data,
    stored: Data,
    now: u64,
    /// What the store was last given as the time.
    advanced: u64,
    failure: Option<Failure>,
    poisoned: bool,
    connections: Vec<Connection>,
    /// Over which connection each subscriber subscribes at present.
    current: [usize; SUBSCRIBERS],
    subscriptions: BTreeMap<(usize, Which), Subscribed>,
    numbers: u64,
}

fn open(disk: &MemoryPersist, now: u64) -> (Store, PersistScript) {
    let (persist, script) = ScriptedPersist::new(disk.clone());
    (NotifyKeyValue::open_at(persist, t(now)).unwrap(), script)
}

fn record(path: &Path, entry: &Entry) -> Record {
    let Entry { value, revision, expiry } = entry.clone();
    Record { key: key(path), value, revision: Revision::new(revision), expiry }
}

fn id(who: usize) -> nkv_core::SubscriberId {
    ["x", "y", "z"][who].into()
}

impl World {
    fn new() -> Self {
        let disk = MemoryPersist::new(Epoch::new(1));
        let (store, script) = open(&disk, 1_000);
        World {
            store,
            script,
            disk,
            memory: Data::default(),
            stored: Data::default(),
            now: 1_000,
            advanced: 1_000,
            failure: None,
            poisoned: false,
            connections: (0..SUBSCRIBERS).map(|_| Connection::new()).collect(),
            current: std::array::from_fn(|who| who),
            subscriptions: BTreeMap::new(),
            numbers: 0,
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Write(writes) => self.write(&writes),
            Step::Time(ms) => self.now += ms,
            Step::Advance => {
                self.advanced = self.advanced.max(self.now);
                self.store.advance(t(self.now));
            }
            Step::Expire => self.expire(),
            Step::Fail(failure) => self.fail(failure),
            Step::Query { which, after, limit } => self.query(&which, after.as_ref(), limit),
            Step::Subscribe { who, to, snapshot } => self.subscribe(who, to, snapshot),
            Step::Unsubscribe { who, from } => self.unsubscribe(who, from),
            Step::Read { who, at_most } => self.read(self.current[who], at_most),
            Step::Leave { who } => self.connections[self.current[who]].inbox = None,
            Step::Reconnect { who } => {
                self.current[who] = self.connections.len();
                self.connections.push(Connection::new());
            }
            Step::Restart { set_clock_back } => self.restart(set_clock_back),
        }
        self.compare();
    }

    fn fail(&mut self, failure: Failure) {
        self.failure = Some(failure);
        match failure {
            Failure::Kind(kind) => self.script.fail_next(kind),
            Failure::Crash(crash) => self.script.crash_next(crash),
        }
    }

    fn write(&mut self, writes: &[Write]) {
        let ops: Vec<Op> = writes.iter().map(|write| self.op(write)).collect();
        let result = self.store.write(&ops);
        if self.poisoned && !ops.is_empty() {
            assert_eq!(result.unwrap_err().kind(), PersistErrorKind::Poisoned);
            return;
        }
        let mut planned = self.memory.clone();
        let (changes, outcomes) = plan(&mut planned, &ops, self.advanced);
        self.conclude(changes, result, |result| assert_eq!(result, outcomes));
    }

    fn expire(&mut self) {
        let result = self.store.expire(t(self.now));
        self.advanced = self.advanced.max(self.now);
        if self.poisoned {
            assert_eq!(result.unwrap_err().kind(), PersistErrorKind::Poisoned);
            return;
        }
        let due = |(path, entry): (&Path, &Entry)| Some((entry.expiry?.at, path.clone()));
        let mut due: Vec<_> =
            self.memory.entries.iter().filter_map(due).filter(|(at, _)| *at <= t(self.advanced)).collect();
        due.sort();
        if result.is_ok() && !due.is_empty() {
            // In which order those go that end at the same time is the store's affair.
            let order: Vec<Path> =
                self.script.batches().pop().unwrap().iter().map(|change| path_of(&change.key)).collect();
            due.sort_by_key(|(at, path)| (*at, order.iter().position(|other| other == path)));
        }
        let revisions = self.memory.revision + 1..;
        let changes: Vec<_> =
            revisions.zip(due).map(|(revision, (_, path))| (path, revision, Err(Reason::Expired))).collect();
        let count = changes.len() as u64;
        self.conclude(changes, result, |result| assert_eq!(result, count));
    }

    fn conclude<T: std::fmt::Debug>(
        &mut self,
        changes: Vec<(Path, u64, State)>,
        result: Result<T, nkv_core::PersistError>,
        compare: impl FnOnce(T),
    ) {
        if changes.is_empty() {
            return compare(result.unwrap());
        }
        match self.failure.take() {
            None => {
                compare(result.unwrap());
                self.compare_what_is_replaced(&changes);
                changes.iter().for_each(|change| self.publish(change));
                store_changes(&mut self.stored, &changes);
            }
            Some(Failure::Kind(kind)) => assert_eq!(result.unwrap_err().kind(), kind),
            Some(Failure::Crash(crash)) => {
                assert_eq!(result.unwrap_err().kind(), PersistErrorKind::Poisoned);
                self.poisoned = true;
                if crash == Crash::AfterStoring {
                    store_changes(&mut self.stored, &changes);
                }
            }
        }
    }

    /// Storage received of each change what it replaces, which is what was there just before it.
    fn compare_what_is_replaced(&self, changes: &[(Path, u64, State)]) {
        let stored = self.script.batches().pop().unwrap();
        assert_eq!(stored.len(), changes.len());
        let mut before = self.memory.clone();
        for (change, expected) in stored.iter().zip(changes) {
            let replaces = before.entries.get(&expected.0).map_or(0, |entry| entry.revision);
            assert_eq!((change.revision.get(), change.replaces.get()), (expected.1, replaces));
            store_changes(&mut before, std::slice::from_ref(expected));
        }
    }

    fn op(&self, write: &Write) -> Op {
        let condition = |path: &Path, condition: Option<Expected>| {
            let present = present(&self.memory, path, self.advanced);
            condition.map(|expected| match expected {
                Expected::Present => Revision::new(present),
                Expected::Absent => Revision::ZERO,
                Expected::Wrong => Revision::new(present + 1),
            })
        };
        match write {
            Write::Put { path, value, condition: expected, ttl_ms } => {
                let expiry = ttl_ms.map(|ttl_ms| Expiry { at: t(self.now + ttl_ms), ttl_ms });
                let options = PutOptions { if_revision: condition(path, *expected), expiry };
                // The longest lies in the store by itself, the others beside their keys.
                let len = [0, 1, 40, 100, 5_000][usize::from(*value)];
                Op::Put { key: key(path), value: vec![*value; len].into(), options }
            }
            Write::Delete { which, condition: expected } => {
                let if_revision = match which {
                    Which::Key(path) => condition(path, *expected),
                    _ => None,
                };
                Op::Delete { pattern: which.pattern(), if_revision }
            }
        }
    }

    fn publish(&mut self, change: &(Path, u64, State)) {
        let (path, revision, state) = change;
        let replaced = self.memory.entries.contains_key(path);
        store_changes(&mut self.memory, std::slice::from_ref(change));
        let covering: Vec<_> = self.subscriptions.keys().filter(|(_, to)| to.covers(path)).cloned().collect();
        let mut notified = BTreeSet::new();
        for subscription in covering {
            let Subscribed { connection, is_live, .. } = self.subscriptions[&subscription];
            if !is_live {
                continue;
            }
            if self.connections[connection].inbox.is_none() {
                self.subscriptions.remove(&subscription); // the store learns of it, and forgets it
            } else if notified.insert(connection) {
                self.connections[connection].change(path, *revision, state, replaced);
            }
        }
    }

    fn subscribe(&mut self, who: usize, to: Which, snapshot: bool) {
        let over = self.current[who];
        self.store.subscribe(to.pattern(), id(who), self.connections[over].post.clone(), snapshot);
        let of = to.pattern();
        if let Some(old) = self.subscriptions.remove(&(who, to.clone())) {
            self.connections[old.connection].expect(Notice::Ended { of: of.clone(), reason: EndReason::Replaced });
        }
        if self.connections[over].inbox.is_some() {
            self.numbers += 1;
            self.connections[over].begin(of, snapshot, self.numbers);
            let subscribed = Subscribed { number: self.numbers, connection: over, is_live: !snapshot };
            self.subscriptions.insert((who, to), subscribed);
        }
    }

    fn read(&mut self, connection: usize, at_most: usize) {
        let World { memory, advanced, connections, subscriptions, .. } = self;
        let snapshot = |of: &Pattern| {
            let covered =
                memory.entries.iter().filter(|(path, entry)| of.covers(&key(path)) && !is_due(entry, *advanced));
            (covered.map(|(path, entry)| record(path, entry)).collect(), memory.revision)
        };
        let synced = connections[connection].read(at_most, snapshot);
        let read = subscriptions.values_mut().filter(|subscribed| synced.contains(&subscribed.number));
        read.for_each(|subscribed| subscribed.is_live = true);
    }

    fn unsubscribe(&mut self, who: usize, from: Which) {
        let of = from.pattern();
        let known = self.subscriptions.remove(&(who, from));
        assert_eq!(self.store.unsubscribe(&of, &id(who)), known.is_some());
        if let Some(known) = known {
            self.connections[known.connection].expect(Notice::Ended { of, reason: EndReason::Unsubscribed });
        }
    }

    fn restart(&mut self, set_clock_back: bool) {
        self.read_everything();
        self.now = if set_clock_back { self.now / 2 } else { self.now };
        self.advanced = self.now;
        (self.store, self.script) = open(&self.disk, self.now);
        self.memory = self.stored.clone();
        for expiry in self.memory.entries.values_mut().filter_map(|entry| entry.expiry.as_mut()) {
            expiry.at = expiry.at.min(t(self.now + expiry.ttl_ms));
        }
        (self.failure, self.poisoned) = (None, false);
        self.connections = (0..SUBSCRIBERS).map(|_| Connection::new()).collect();
        self.current = std::array::from_fn(|who| who);
        self.subscriptions.clear();
    }

    /// Slow readers catch up: each ends with what is true.
    fn read_everything(&mut self) {
        (0..self.connections.len()).for_each(|connection| self.read(connection, usize::MAX));
    }

    fn query(&self, which: &Which, after: Option<&Path>, limit: usize) {
        let pattern = which.pattern();
        let is_there = |path: &Path, entry: &Entry| which.selects(path) && !is_due(entry, self.advanced);
        let selected = || self.memory.entries.iter().filter(|(path, entry)| is_there(path, entry));
        let all: Vec<Record> = selected().map(|(path, entry)| record(path, entry)).collect();
        assert_eq!(self.store.exists(&pattern), !all.is_empty());
        assert_eq!(self.store.get_all(&pattern), all);
        let following = selected().filter(|(path, _)| after.is_none_or(|after| *path > after));
        let rest: Vec<Record> = following.map(|(path, entry)| record(path, entry)).collect();
        let (page, more) = (&rest[..limit.min(rest.len())], rest.len() > limit);
        let after = after.map(key);
        let list = self.store.list(&pattern, after.as_ref(), limit);
        let expected: Vec<_> = page.iter().map(|record| (record.key.clone(), record.revision)).collect();
        assert_eq!((list.entries, list.more), (expected, more));
        let bytes = page.iter().map(|record| record.key.as_str().len() + record.value.len()).sum();
        let got = self.store.get_page(&pattern, after.as_ref(), limit, bytes).unwrap();
        assert_eq!((&got.entries[..], got.more), (page, more));
        assert_eq!(self.store.get_page(&pattern, after.as_ref(), limit, bytes.wrapping_sub(1)).is_err(), bytes > 0);
        if let Which::Key(path) = which {
            assert_eq!(self.store.get(&key(path)).as_ref(), all.first());
            let value = self.store.look_up(&path.join("."), |record| (record.value.to_vec(), record.revision));
            assert_eq!(value, all.first().map(|record| (record.value.to_vec(), record.revision)));
            let mut named: Vec<_> = self
                .store
                .subscribers_of(&key(path))
                .iter()
                .map(|s| (s.id().to_string(), s.pattern().to_string()))
                .collect();
            named.sort();
            let covering = self.subscriptions.keys().filter(|(_, to)| to.covers(path));
            let mut expected: Vec<_> =
                covering.map(|(who, to)| (id(*who).to_string(), to.pattern().to_string())).collect();
            expected.sort();
            assert_eq!(named, expected);
        }
    }

    fn compare(&self) {
        let entries = &self.memory.entries;
        let all: Vec<Record> = entries.iter().map(|(path, entry)| record(path, entry)).collect();
        let is_there = |record: &&Record| record.expiry.is_none_or(|expiry| expiry.at > t(self.advanced));
        assert_eq!(self.store.get_all(&Pattern::All), all.iter().filter(is_there).cloned().collect::<Vec<_>>());
        let stats = self.store.stats();
        assert_eq!((stats.revision.get(), stats.keys), (self.memory.revision, entries.len() as u64));
        assert_eq!(stats.value_bytes, all.iter().map(|record| record.value.len() as u64).sum::<u64>());
        assert_eq!(stats.subscriptions, self.subscriptions.len() as u64);
        let next = entries.values().filter_map(|entry| entry.expiry).map(|expiry| expiry.at).min();
        assert_eq!(self.store.next_expiry(), next);
    }
}

fn is_due(entry: &Entry, now: u64) -> bool {
    entry.expiry.is_some_and(|expiry| expiry.at <= t(now))
}

fn present(data: &Data, path: &Path, now: u64) -> u64 {
    data.entries.get(path).filter(|entry| !is_due(entry, now)).map_or(0, |entry| entry.revision)
}

/// Does the operations one after the other, for real, and notes what changed.
fn plan(data: &mut Data, ops: &[Op], now: u64) -> (Vec<(Path, u64, State)>, Vec<Outcome>) {
    let mut changes: Vec<(Path, u64, State)> = vec![];
    let mut outcomes = vec![];
    // What is put in this batch is there, even if its time has come.
    let mut put = BTreeSet::new();
    for op in ops {
        let present = |data: &Data, path: &Path| present(data, path, if put.contains(path) { 0 } else { now });
        let doomed: Vec<Path> = match op {
            Op::Put { key, value, options } => {
                let path = path_of(key);
                let at = Revision::new(present(data, &path));
                if options.if_revision.is_some_and(|expected| expected != at) {
                    outcomes.push(Outcome::Conflict { revision: at });
                    continue;
                }
                put.insert(path.clone());
                let change = (path, data.revision + 1, Ok((value.clone(), options.expiry)));
                store_changes(data, std::slice::from_ref(&change));
                outcomes.push(Outcome::Put { revision: Revision::new(change.1) });
                changes.push(change);
                continue;
            }
            Op::Delete { pattern: Pattern::Key(key), if_revision } => {
                let path = path_of(key);
                let at = Revision::new(present(data, &path));
                if at != Revision::ZERO && if_revision.is_some_and(|expected| expected != at) {
                    outcomes.push(Outcome::Conflict { revision: at });
                    continue;
                }
                Vec::from_iter((at != Revision::ZERO).then_some(path))
            }
            Op::Delete { pattern, .. } => {
                let selected = data.entries.keys().filter(|path| pattern.selects(&key(path)));
                selected.filter(|path| present(data, path) > 0).cloned().collect()
            }
        };
        let count = doomed.len() as u64;
        for path in doomed {
            let change = (path, data.revision + 1, Err(Reason::Deleted));
            store_changes(data, std::slice::from_ref(&change));
            changes.push(change);
        }
        let revision = Revision::new(data.revision);
        outcomes.push(if count == 0 { Outcome::NotFound } else { Outcome::Deleted { count, revision } });
    }
    (changes, outcomes)
}

fn path_of(key: &Key) -> Path {
    key.segments().map(|segment| if segment == "a" { "a" } else { "b" }).collect()
}

fn store_changes(data: &mut Data, changes: &[(Path, u64, State)]) {
    for (path, revision, state) in changes {
        data.revision = *revision;
        match state.clone() {
            Ok((value, expiry)) => {
                data.entries.insert(path.clone(), Entry { value, revision: *revision, expiry });
            }
            Err(_) => _ = data.entries.remove(path),
        }
    }
}

fn path() -> impl Strategy<Value = Path> {
    prop::collection::vec(prop::sample::select(vec!["a", "b"]), 1..=3)
}

fn which() -> impl Strategy<Value = Which> {
    prop_oneof![5 => path().prop_map(Which::Key), 3 => path().prop_map(Which::Below), 1 => Just(Which::All)]
}

fn condition() -> impl Strategy<Value = Option<Expected>> {
    let expected = prop::sample::select(vec![Expected::Present, Expected::Absent, Expected::Wrong]);
    prop_oneof![2 => Just(None), 1 => expected.prop_map(Some)]
}

fn write() -> impl Strategy<Value = Write> {
    let ttl = prop_oneof![2 => Just(None), 1 => (1_u64..100).prop_map(Some)];
    let put = (path(), 0_u8..5, condition(), ttl);
    prop_oneof![
        6 => put.prop_map(|(path, value, condition, ttl_ms)| Write::Put { path, value, condition, ttl_ms }),
        3 => (which(), condition()).prop_map(|(which, condition)| Write::Delete { which, condition }),
    ]
}

fn failure() -> impl Strategy<Value = Failure> {
    use PersistErrorKind::{Io, NoSpace, Rejected};
    prop_oneof![
        4 => prop::sample::select(vec![Io, NoSpace, Rejected]).prop_map(Failure::Kind),
        1 => prop::sample::select(vec![Crash::AfterStoring, Crash::BeforeStoring]).prop_map(Failure::Crash),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let who = 0..SUBSCRIBERS;
    prop_oneof![
        16 => write().prop_map(|write| Step::Write(vec![write])),
        6 => prop::collection::vec(write(), 0..6).prop_map(Step::Write),
        3 => (0_u64..60).prop_map(Step::Time),
        1 => Just(Step::Advance),
        2 => Just(Step::Expire),
        2 => failure().prop_map(Step::Fail),
        5 => (which(), prop::option::of(path()), 0_usize..6)
            .prop_map(|(which, after, limit)| Step::Query { which, after, limit }),
        6 => (who.clone(), which(), any::<bool>())
            .prop_map(|(who, to, snapshot)| Step::Subscribe { who, to, snapshot }),
        2 => (who.clone(), which()).prop_map(|(who, from)| Step::Unsubscribe { who, from }),
        6 => (who.clone(), 0_usize..8).prop_map(|(who, at_most)| Step::Read { who, at_most }),
        1 => who.clone().prop_map(|who| Step::Leave { who }),
        2 => who.prop_map(|who| Step::Reconnect { who }),
        2 => any::<bool>().prop_map(|set_clock_back| Step::Restart { set_clock_back }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 4_000, ..ProptestConfig::with_cases(cases()) })]

    #[test]
    #[cfg_attr(miri, ignore = "a single case takes minutes")]
    fn whatever_is_done_the_store_and_its_subscribers_agree_with_the_model(
        steps in prop::collection::vec(step(), 1..80)
    ) {
        let mut world = World::new();
        steps.into_iter().for_each(|step| world.step(step));
        world.read_everything();
    }
}

fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(1_000)
}
