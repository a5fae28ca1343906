//! A store that follows another one: fed with its changes and with whole states, with gaps, duplicates, failures and
//! restarts of both, and epochs that begin. It is to become the same, and to notify its subscribers of nothing twice and of
//! nothing old.
//!
//! `PROPTEST_CASES=100000 cargo test -p nkv-core --release --test follower` runs it for longer.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code too")]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use nkv_core::mailbox::{Inbox, Item, Mailbox, mailbox_with_slack};
use nkv_core::{
    Action, BeginCause, Change, ChangeGroup, Changes, Epoch, Event, EventKind, Expiry, Key, MemoryPersist, Meta,
    NotifyKeyValue, Op, Pattern, PersistErrorKind, PutOptions, Reason, Record, Revision, Timestamp, Write,
};
use nkv_testkit::script::{PersistScript, ScriptedPersist};
use proptest::prelude::*;

type Source = NotifyKeyValue<MemoryPersist, Mailbox>;
type Follower = NotifyKeyValue<ScriptedPersist<MemoryPersist>, Mailbox>;

const KEYS: [&str; 6] = ["a", "a.b", "a.c", "d", "d.e", "f"];

/// Of a stream: some changes, not all.
const LEN_MAX: usize = 1_500;

#[derive(Clone, Debug)]
enum Step {
    /// At the source: keys to put, or to delete; together or each for itself.
    Write {
        ops: Vec<(usize, bool)>,
        is_together: bool,
    },
    DeleteBranch,
    PutWithTtl {
        key: usize,
    },
    Expire,
    /// At the source, which has them from elsewhere: some of one revision, those of the next, and so on.
    Apply {
        revisions: Vec<Vec<(usize, bool)>>,
    },
    /// What was fetched from the source is given to the follower.
    Feed {
        groups: usize,
    },
    /// Once more.
    FeedAgain {
        groups: usize,
    },
    Fetch,
    FailNext,
    Reconnect,
    RestartFollower,
    RestartSource,
    BeginEpoch {
        keep: usize,
    },
    Read {
        who: usize,
        events: usize,
    },
    Resubscribe {
        who: usize,
        snapshot: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let key = 0..KEYS.len();
    let ops = prop::collection::vec((key.clone(), prop::bool::weighted(0.3)), 1..5);
    let revisions = prop::collection::vec(prop::collection::vec((key.clone(), any::<bool>()), 1..4), 1..3);
    prop_oneof![
        10 => (ops, any::<bool>()).prop_map(|(ops, is_together)| Step::Write { ops, is_together }),
        2 => Just(Step::DeleteBranch),
        2 => key.prop_map(|key| Step::PutWithTtl { key }),
        2 => Just(Step::Expire),
        6 => revisions.prop_map(|revisions| Step::Apply { revisions }),
        10 => (0_usize..4).prop_map(|groups| Step::Feed { groups }),
        3 => (1_usize..4).prop_map(|groups| Step::FeedAgain { groups }),
        2 => Just(Step::Fetch),
        2 => Just(Step::FailNext),
        2 => Just(Step::Reconnect),
        2 => Just(Step::RestartFollower),
        1 => Just(Step::RestartSource),
        1 => (0..KEYS.len()).prop_map(|keep| Step::BeginEpoch { keep }),
        12 => (0_usize..3, 0_usize..5).prop_map(|(who, events)| Step::Read { who, events }),
        2 => (0_usize..3, any::<bool>()).prop_map(|(who, snapshot)| Step::Resubscribe { who, snapshot }),
    ]
}

fn key(number: usize) -> Key {
    Key::new(KEYS[number]).unwrap()
}

/// Whether each key was there behind each of its changes, by epoch.
type History = HashMap<Epoch, BTreeMap<String, BTreeMap<Revision, bool>>>;

struct Run {
    source: Source,
    source_disk: MemoryPersist,
    /// Sees all that happens there.
    recorder: Changes,
    /// Has the source hold much of it.
    holder: Changes,
    history: History,
    follower: Follower,
    follower_disk: MemoryPersist,
    script: PersistScript,
    stream: Option<Changes>,
    /// What the follower was given last.
    given: Vec<ChangeGroup>,
    now: u64,
    epochs: u128,
    clients: Vec<Client>,
}

impl Run {
    fn new() -> Self {
        let (source_disk, follower_disk) = (MemoryPersist::new(Epoch::new(1)), MemoryPersist::new(Epoch::new(99)));
        let source = Source::open(source_disk.clone()).unwrap();
        let [recorder, holder] = [usize::MAX, 4 * LEN_MAX].map(|len_max| source.changes(None, len_max).unwrap());
        let (persist, script) = ScriptedPersist::new(follower_disk.clone());
        let follower = Follower::open(persist).unwrap();
        let clients = [0, 300, usize::MAX].map(|slack| Client::new(&follower, slack)).into();
        let history = HashMap::from([(Epoch::new(1), BTreeMap::new())]);
        let (stream, given, now, epochs) = (None, Vec::new(), 0, 1);
        Run {
            source,
            source_disk,
            recorder,
            holder,
            history,
            follower,
            follower_disk,
            script,
            stream,
            given,
            now,
            epochs,
            clients,
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Write { ops, is_together } => {
                let ops = ops.into_iter().map(|(number, is_delete)| {
                    let key = key(number);
                    let options = PutOptions::default();
                    let put = || Op::Put { key: key.clone(), value: format!("{}", self.now).into(), options };
                    if is_delete { Op::Delete { pattern: Pattern::Key(key), if_revision: None } } else { put() }
                });
                let ops = ops.collect();
                self.write(if is_together { Write::together(ops) } else { Write::apart(ops) });
            }
            Step::DeleteBranch => {
                let pattern = Pattern::new("a.*").unwrap();
                self.write(Write::apart(vec![Op::Delete { pattern, if_revision: None }]));
            }
            Step::PutWithTtl { key: number } => {
                let expiry = Some(Expiry { at: Timestamp::from_millis(self.now + 2), ttl_ms: 2 });
                let options = PutOptions { expiry, if_revision: None };
                self.write(Write::apart(vec![Op::Put { key: key(number), value: "t".into(), options }]));
            }
            Step::Expire => _ = self.source.expire(Timestamp::from_millis(self.now)).unwrap(),
            Step::Apply { revisions } => self.apply(revisions),
            Step::Feed { groups } => self.feed(groups),
            Step::FeedAgain { groups } => {
                for group in self.given.iter().rev().take(groups).rev() {
                    if let Ok(applied) = self.follower.apply(group.changes.to_vec()) {
                        assert_eq!(applied.stored, 0, "it was given before");
                    }
                }
            }
            Step::Fetch => self.fetch(),
            Step::FailNext => self.script.fail_next(PersistErrorKind::NoSpace),
            Step::Reconnect => self.stream = None,
            Step::RestartFollower => {
                let (persist, script) = ScriptedPersist::new(self.follower_disk.clone());
                (self.follower, self.script) = (Follower::open(persist).unwrap(), script);
                self.clients.iter_mut().for_each(|client| client.subscribe(&self.follower, true));
            }
            Step::RestartSource => {
                self.record();
                self.source = Source::open(self.source_disk.clone()).unwrap();
                self.recorder = self.source.changes(None, usize::MAX).unwrap();
                self.holder = self.source.changes(None, 4 * LEN_MAX).unwrap();
            }
            Step::BeginEpoch { keep } => self.begin_epoch(keep),
            Step::Read { who, events } => self.read(who, events),
            Step::Resubscribe { who, snapshot } => self.clients[who].subscribe(&self.follower, snapshot),
        }
        self.now += 1;
        self.record();
    }

    fn write(&self, write: Write) {
        let mut writes = [write];
        while !writes[0].is_done() {
            self.source.commit(&mut writes);
        }
    }

    fn apply(&self, revisions: Vec<Vec<(usize, bool)>>) {
        let mut changes: Vec<Change> = Vec::new();
        let mut revision = self.source.stats().revision;
        for of_one in revisions {
            revision = revision.next();
            for (number, is_delete) in of_one {
                let key = key(number);
                if changes.iter().any(|change| change.revision == revision && change.key == key) {
                    continue;
                }
                let put = Action::Put { value: format!("{revision}").into(), expiry: None };
                let action = if is_delete { Action::Delete { reason: Reason::Deleted } } else { put };
                changes.push(Change { key, revision, replaces: Revision::ZERO, action, meta: Meta::NONE });
            }
        }
        self.source.apply(changes).unwrap();
    }

    /// Notes what happened at the source.
    fn record(&mut self) {
        loop {
            match self.recorder.try_next() {
                Ok(None) => return,
                Ok(Some(group)) => {
                    let history = self.history.get_mut(&self.recorder.epoch()).unwrap();
                    for change in &*group.changes {
                        let of_key = history.entry(change.key.to_string()).or_default();
                        of_key.insert(change.revision, matches!(change.action, Action::Put { .. }));
                    }
                }
                Err(_) => self.recorder = self.source.changes(None, usize::MAX).unwrap(),
            }
        }
    }

    fn begin_epoch(&mut self, keep: usize) {
        self.record();
        self.epochs += 1;
        let epoch = Epoch::new(self.epochs);
        let mut state = self.state();
        state.truncate(keep);
        (1..).zip(&mut state).for_each(|(revision, change)| change.revision = Revision::new(revision));
        let history = state.iter().map(|c| (c.key.to_string(), BTreeMap::from([(c.revision, true)]))).collect();
        self.history.insert(epoch, history);
        self.source.replace(state, Revision::new(keep as u64 + 1), epoch).unwrap();
    }

    /// All that the source has, of one moment: nothing is written meanwhile.
    fn state(&self) -> Vec<Change> {
        let put = |Record { key, value, revision, expiry }| {
            let action = Action::Put { value, expiry };
            Change { key, revision, replaces: Revision::ZERO, action, meta: Meta::NONE }
        };
        self.source.get_all(&Pattern::All).into_iter().map(put).collect()
    }

    fn feed(&mut self, groups: usize) {
        for _ in 0..groups {
            let since = (self.follower.epoch(), self.follower.stats().revision);
            if self.stream.is_none() {
                self.stream = self.source.changes(Some(since), LEN_MAX).ok();
            }
            match self.stream.as_mut().map(Changes::try_next) {
                Some(Ok(Some(group))) => {
                    let is_stored = self.follower.apply(group.changes.to_vec()).is_ok();
                    if is_stored {
                        self.given.push(group);
                    } else {
                        // The stream does not give it again; the state does, or a stream from there.
                        self.stream = None;
                    }
                }
                Some(Ok(None)) => {
                    // Nothing new, or the end: another stream shows which.
                    self.stream = self.source.changes(Some(since), LEN_MAX).ok();
                    return;
                }
                Some(Err(_)) | None => self.fetch(),
            }
        }
    }

    /// Fetches the whole state, and what follows it.
    fn fetch(&mut self) {
        let stream = self.source.changes(None, LEN_MAX).unwrap();
        let result = self.follower.replace(self.state(), stream.since(), stream.epoch());
        self.stream = result.is_ok().then_some(stream);
        // What was given of an epoch before is no duplicate in this one.
        self.given.clear();
    }

    fn read(&mut self, who: usize, events: usize) {
        for _ in 0..events {
            let Some(event) = self.clients[who].take() else { return };
            self.clients[who].see(&event, &self.history);
        }
    }

    fn finish(mut self) {
        self.script.work();
        // What was to fail may fail now.
        self.script.fail_next(PersistErrorKind::NoSpace);
        _ = self.follower.put(
            &key(0),
            "refused",
            PutOptions { if_revision: Some(Revision::new(u64::MAX)), expiry: None },
        );
        self.script.work();
        for _ in 0..1_000 {
            let is_same = self.follower.epoch() == self.source.epoch()
                && self.follower.stats().revision == self.source.stats().revision;
            if is_same {
                break;
            }
            self.feed(1);
        }
        let all = |store: &Follower| store.get_all(&Pattern::All);
        assert_eq!(all(&self.follower), self.source.get_all(&Pattern::All));
        for who in 0..self.clients.len() {
            self.read(who, usize::MAX);
            let known: Vec<_> = self.clients[who].known.clone().into_iter().collect();
            let state: Vec<_> =
                all(&self.follower).into_iter().map(|record| (record.key.to_string(), record.revision)).collect();
            if self.clients[who].has_state {
                assert_eq!(known, state, "client {who}");
            }
        }
        let reopened = Source::open(self.follower_disk.clone()).unwrap();
        assert_eq!(reopened.get_all(&Pattern::All), self.source.get_all(&Pattern::All));
    }
}

/// What a subscriber of the follower knows, also over restarts.
struct Client {
    slack: usize,
    inbox: Inbox,
    epoch: Epoch,
    known: BTreeMap<String, Revision>,
    /// Of each key, what it was notified of last, a delete too, in this epoch.
    last: BTreeMap<String, Revision>,
    newest: Revision,
    /// Of the last snapshot.
    snapshot: Revision,
    fresh: Option<(Epoch, BTreeMap<String, Revision>)>,
    /// It had a snapshot, or began with all of it.
    has_state: bool,
    began: Vec<BeginCause>,
}

impl Client {
    fn new(store: &Follower, slack: usize) -> Self {
        let (_, inbox) = mailbox_with_slack(0);
        let mut client = Client {
            slack,
            inbox,
            epoch: store.epoch(),
            known: BTreeMap::new(),
            last: BTreeMap::new(),
            newest: Revision::ZERO,
            snapshot: Revision::ZERO,
            fresh: None,
            has_state: false,
            began: Vec::new(),
        };
        client.subscribe(store, true);
        client
    }

    fn subscribe(&mut self, store: &Follower, snapshot: bool) {
        let (post, inbox) = mailbox_with_slack(self.slack);
        let id = format!("{}", self.slack);
        store.subscribe(Pattern::All, id.as_str().into(), post.clone(), snapshot);
        if self.has_two() {
            store.subscribe(Pattern::new("a").unwrap(), id.as_str().into(), post, false);
        }
        (self.inbox, self.fresh, self.has_state) = (inbox, None, false);
    }

    /// It has two subscriptions: what both cover comes once.
    fn has_two(&self) -> bool {
        self.slack == 300
    }

    fn take(&self) -> Option<Arc<Event>> {
        match self.inbox.try_take()? {
            Item::Event { event, .. } => Some(event),
            Item::Own(never) => match never {},
        }
    }

    fn see(&mut self, event: &Event, history: &History) {
        match event.kind() {
            EventKind::Began(began) if began.pattern == Pattern::All => {
                self.began.push(began.cause);
                self.fresh = began.has_snapshot.then(|| (began.epoch, BTreeMap::new()));
                self.enter(began.epoch);
            }
            EventKind::Snapshot(part) if part.pattern == Pattern::All => {
                self.enter(part.epoch);
                let (_, fresh) = self.fresh.as_mut().expect("a snapshot has a beginning");
                fresh.extend(part.records.iter().map(|record| (record.key.to_string(), record.revision)));
                if part.is_last {
                    let (_, fresh) = self.fresh.take().unwrap();
                    for (key, revision) in &fresh {
                        let last = self.last.entry(key.clone()).or_default();
                        assert!(*last <= *revision, "a snapshot has {key} at {revision}, and {last} was received");
                        *last = *revision;
                    }
                    (self.known, self.has_state) = (fresh, true);
                    (self.newest, self.snapshot) = (self.newest.max(part.revision), part.revision);
                }
            }
            // The second subscription was notified of it before the first one's snapshot was read.
            EventKind::Change(change) if self.has_two() && change.revision <= self.snapshot => {}
            EventKind::Change(change) => {
                let last = self.last.insert(change.key.to_string(), change.revision).unwrap_or_default();
                assert!(last < change.revision, "{} at {} was received after {last}", change.key, change.revision);
                assert!(self.newest <= change.revision, "{} was received after {}", change.revision, self.newest);
                self.newest = change.revision;
                match change.action {
                    Action::Put { .. } => _ = self.known.insert(change.key.to_string(), change.revision),
                    Action::Delete { .. } => _ = self.known.remove(change.key.as_str()),
                }
                if event.ends_revision() && self.has_state && self.fresh.is_none() {
                    self.can_resume_from(change.revision, history);
                }
            }
            _ => {}
        }
    }

    fn enter(&mut self, epoch: Epoch) {
        if epoch != self.epoch {
            (self.epoch, self.last) = (epoch, BTreeMap::new());
            (self.newest, self.snapshot) = (Revision::ZERO, Revision::ZERO);
        }
    }

    /// What it does not have as of this revision has changed since: to resume from here misses nothing.
    fn can_resume_from(&self, revision: Revision, history: &History) {
        let Some(history) = history.get(&self.epoch) else { return };
        for (key, changes) in history {
            let there = changes.range(..=revision).next_back().filter(|(_, is_there)| **is_there).map(|(at, _)| *at);
            let has_changed = changes.range(revision.next()..).next().is_some();
            assert!(
                self.known.get(key).copied() == there || has_changed,
                "behind {revision}, {key} is at {:?} here and was at {there:?}",
                self.known.get(key)
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases()) })]

    #[test]
    fn a_follower_becomes_the_same_and_notifies_of_nothing_twice_and_of_nothing_old(
        steps in prop::collection::vec(step(), 1..60)
    ) {
        let mut run = Run::new();
        for step in steps {
            run.step(step);
        }
        run.finish();
    }
}

fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(400)
}
