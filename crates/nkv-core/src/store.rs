//! The store: keys in memory, storage behind them, subscribers in front.
//!
//! Three locks, always taken in this order: the writer (held while storage works, so writers queue there and nobody
//! else does), the subscribers (so that a subscription sees a change either in its snapshot or as an event), the
//! keyspace (held only to look or to apply). Reads take the last alone.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::{Arc, PoisonError};

use bytes::Bytes;
use hashbrown::HashTable;
use thiserror::Error;

use crate::key::{Key, Pattern};
use crate::keyspace::Keyspace;
use crate::notifier::{Delivery, Notifier};
use crate::persist::{PersistError, PersistErrorKind, PersistValue};
use crate::record::{Action, Change, EndReason, Event, EventKind, Expiry, Millis, Reason, Record, RecordRef, Snapshot};
use crate::revision::{Epoch, Revision};
use crate::subscribers::{SubscriberId, Subscribers, Subscription};
use crate::sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard};

/// A notify key-value store: values that survive, and subscribers that are told the latest of them.
///
/// `P` keeps the values, `N` reaches one subscriber. All methods take `&self` and may be called from any thread.
/// Nothing is visible to readers, told to subscribers or acknowledged before `P` has stored it.
///
/// # Examples
///
/// ```
/// use nkv_core::mailbox::{Item, mailbox};
/// use nkv_core::{Key, NoPersist, NotifyKeyValue, Pattern, PutOptions};
///
/// let store = NotifyKeyValue::open(NoPersist::default(), 0)?;
/// let (post, inbox) = mailbox::<()>();
/// store.subscribe(Pattern::new("host")?, "screen".into(), post, false);
///
/// store.put(&Key::new("host.load")?, "0.7", PutOptions::default())?;
///
/// assert!(matches!(inbox.try_take(), Some(Item::Event { .. })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct NotifyKeyValue<P, N> {
    writer: Mutex<Writer<P>>,
    subscribers: Mutex<Subscribers<N>>,
    keyspace: RwLock<Keyspace>,
    /// That of the keyspace, for whoever asks after every batch.
    next_expiry: AtomicU64,
    epoch: Epoch,
    counters: Counters,
}

/// When no TTL ends.
const NEVER: Millis = Millis::MAX;

#[derive(Debug)]
struct Writer<P> {
    persist: P,
    /// The newest revision stored.
    revision: Revision,
    /// Storage no longer knows what it holds; it is not asked again.
    poisoned: bool,
}

#[derive(Debug, Default)]
struct Counters {
    puts: AtomicU64,
    deletes: AtomicU64,
    expired: AtomicU64,
    batches: AtomicU64,
    failed_batches: AtomicU64,
    notified: AtomicU64,
    conflated: AtomicU64,
}

/// So many keys expire in one batch.
const EXPIRE_MAX: usize = 10_000;

/// One operation of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Writes a value.
    Put {
        /// The key.
        key: Key,
        /// The value.
        value: Bytes,
        /// On what condition, and for how long.
        options: PutOptions,
    },
    /// Removes the keys that a pattern selects.
    Delete {
        /// Which keys.
        pattern: Pattern,
        /// Only if the key is at this revision. A pattern that is no key has no revision: the condition does not hold.
        if_revision: Option<Revision>,
    },
    /// Removes the keys whose TTL has ended, the earliest first: at most 10,000, so that a great many at once hold up
    /// nobody for long.
    Expire {
        /// The present.
        now: Millis,
    },
}

/// Condition and lifetime of a put.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PutOptions {
    /// Write only if the key is at this revision; [`Revision::ZERO`]: only if it is absent.
    pub if_revision: Option<Revision>,
    /// When the value ends by itself. A later put without expiry ends that.
    pub expiry: Option<Expiry>,
}

/// What became of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The value is stored.
    Put {
        /// Its revision.
        revision: Revision,
    },
    /// So many keys are gone; an [`Op::Expire`] may remove none.
    Deleted {
        /// How many.
        count: u64,
        /// The highest revision given, one to each key; zero if none was.
        revision: Revision,
    },
    /// There was nothing to delete.
    NotFound,
    /// The condition did not hold; nothing was changed.
    Conflict {
        /// The key's present revision; zero if it is absent.
        revision: Revision,
    },
}

/// Why a single write was not done.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The condition did not hold; nothing was changed.
    #[error("the key is at revision {revision}")]
    Conflict {
        /// The key's present revision; zero if it is absent.
        revision: Revision,
    },
    /// There was nothing to delete.
    #[error("no such key")]
    NotFound,
    /// Storage failed; see [`PersistError::kind`] for what that means.
    #[error("the write was not stored")]
    Persist(#[from] PersistError),
}

/// Part of a keyspace, in key order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page<T> {
    /// The entries.
    pub entries: Vec<T>,
    /// Whether there are others after the last.
    pub more: bool,
}

/// The bytes of a page exceed what the caller allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("more than {bytes_max} bytes: ask for fewer keys at a time")]
pub struct PageTooLarge {
    /// What the caller allowed.
    pub bytes_max: usize,
}

/// Figures of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Keys present.
    pub keys: u64,
    /// Bytes of all values together.
    pub value_bytes: u64,
    /// Subscriptions present.
    pub subscriptions: u64,
    /// The newest revision that readers can see.
    pub revision: Revision,
    /// The epoch of the data.
    pub epoch: Epoch,
    /// Values written since the store was opened.
    pub puts: u64,
    /// Keys deleted since the store was opened.
    pub deletes: u64,
    /// Keys expired since the store was opened.
    pub expired: u64,
    /// Batches stored since the store was opened.
    pub batches: u64,
    /// Batches that storage refused since the store was opened.
    pub failed_batches: u64,
    /// Events given to subscribers since the store was opened.
    pub notified: u64,
    /// Those among them that took the place of an older one.
    pub conflated: u64,
}

impl<P: PersistValue, N: Notifier> NotifyKeyValue<P, N> {
    /// Loads what `persist` kept. `now` is the present, on the clock that expiries are counted on.
    ///
    /// # Errors
    ///
    /// What [`PersistValue::load`] says.
    pub fn open(mut persist: P, now: Millis) -> Result<Self, PersistError> {
        let mut keyspace = Keyspace::default();
        let loaded = persist.load(&mut |mut record| {
            debug_assert_eq!(Key::check(record.key), Ok(()), "storage visits nothing else");
            if let Some(expiry) = &mut record.expiry {
                expiry.at = expiry.at.min(now.saturating_add(expiry.ttl_ms));
            }
            keyspace.load(record);
        })?;
        keyspace.end_loading(loaded.revision);
        Ok(NotifyKeyValue {
            writer: Mutex::new(Writer { persist, revision: loaded.revision, poisoned: false }),
            subscribers: Mutex::new(Subscribers::new()),
            next_expiry: AtomicU64::new(keyspace.next_expiry().unwrap_or(NEVER)),
            keyspace: RwLock::new(keyspace),
            epoch: loaded.epoch,
            counters: Counters::default(),
        })
    }

    /// The value of a key.
    pub fn get(&self, key: &Key) -> Option<Record> {
        self.look_up(key.as_str(), |record| record.to_record())
    }

    /// Lends a key's record to `look`; `None` if there is none, as for a text that is no key. Nothing is allocated or
    /// copied here: this is the way to read for whoever writes what it finds somewhere else.
    ///
    /// No write becomes visible while `look` looks, so it is to be quick, and must not call back into the store.
    pub fn look_up<R>(&self, key: &str, look: impl FnOnce(RecordRef<'_>) -> R) -> Option<R> {
        self.read().get(key).map(look)
    }

    /// Lends each record that `pattern` selects, after `after`, to `visit`, in key order and all of one moment, until
    /// it breaks off. What [`look_up`](Self::look_up) says of the lock holds here too.
    pub fn walk<B>(
        &self,
        pattern: &Pattern,
        after: Option<&Key>,
        visit: impl FnMut(RecordRef<'_>) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        self.read().select(pattern, after).try_for_each(visit)
    }

    /// The keys and values that `pattern` selects, in key order, all of one moment.
    pub fn get_all(&self, pattern: &Pattern) -> Vec<Record> {
        self.read().select(pattern, None).map(RecordRef::to_record).collect()
    }

    /// At most `limit` keys and values that `pattern` selects, after `after`, in key order, all of one moment.
    ///
    /// # Errors
    ///
    /// [`PageTooLarge`] when keys and values would pass `bytes_max`.
    pub fn get_page(
        &self,
        pattern: &Pattern,
        after: Option<&Key>,
        limit: usize,
        bytes_max: usize,
    ) -> Result<Page<Record>, PageTooLarge> {
        let mut page = Page { entries: Vec::new(), more: false };
        let mut bytes = 0;
        for record in self.read().select(pattern, after) {
            if page.entries.len() == limit {
                page.more = true;
                break;
            }
            bytes += record.key.len() + record.value.len();
            if bytes > bytes_max {
                return Err(PageTooLarge { bytes_max });
            }
            page.entries.push(record.to_record());
        }
        Ok(page)
    }

    /// At most `limit` keys that `pattern` selects, after `after`, with their revisions, in key order.
    pub fn list(&self, pattern: &Pattern, after: Option<&Key>, limit: usize) -> Page<(Key, Revision)> {
        let keyspace = self.read();
        let mut selected = keyspace.select(pattern, after).map(|record| (Key::trusted(record.key), record.revision));
        let entries = selected.by_ref().take(limit).collect();
        Page { entries, more: selected.next().is_some() }
    }

    /// Whether `pattern` selects any key.
    pub fn exists(&self, pattern: &Pattern) -> bool {
        match pattern {
            Pattern::Key(key) => self.read().get(key.as_str()).is_some(),
            _ => self.read().select(pattern, None).next().is_some(),
        }
    }

    /// Writes a value and returns its revision.
    ///
    /// # Errors
    ///
    /// [`WriteError::Conflict`] when the condition does not hold, [`WriteError::Persist`] when storage fails.
    pub fn put(&self, key: &Key, value: impl Into<Bytes>, options: PutOptions) -> Result<Revision, WriteError> {
        match self.write_one(Op::Put { key: key.clone(), value: value.into(), options })? {
            Outcome::Put { revision } => Ok(revision),
            other => Err(other.into()),
        }
    }

    /// Removes the keys that `pattern` selects and returns how many, with the highest revision given. A wildcard has no
    /// revision: with `if_revision` it is a conflict.
    ///
    /// # Errors
    ///
    /// [`WriteError::NotFound`] when there is none, [`WriteError::Conflict`] when the condition does not hold,
    /// [`WriteError::Persist`] when storage fails.
    pub fn delete(&self, pattern: &Pattern, if_revision: Option<Revision>) -> Result<(u64, Revision), WriteError> {
        match self.write_one(Op::Delete { pattern: pattern.clone(), if_revision })? {
            Outcome::Deleted { count, revision } => Ok((count, revision)),
            other => Err(other.into()),
        }
    }

    /// Removes the keys whose TTL has ended by `now`, tells their subscribers, and returns how many they were: at most
    /// 10,000, the earliest first. [`next_expiry`](Self::next_expiry) tells whether there are more.
    ///
    /// # Errors
    ///
    /// [`PersistError`] when storage fails; the keys stay until a later call.
    pub fn expire(&self, now: Millis) -> Result<u64, PersistError> {
        match self.write_one(Op::Expire { now })? {
            Outcome::Deleted { count, .. } => Ok(count),
            _ => Ok(0),
        }
    }

    /// When the next key's TTL ends: when [`expire`](Self::expire) is to be called. The end of time, `u64::MAX`, never
    /// comes. No lock is taken.
    pub fn next_expiry(&self) -> Option<Millis> {
        Some(self.next_expiry.load(Acquire)).filter(|at| *at != NEVER)
    }

    /// The one way in: checks the conditions in order, each operation seeing the ones before it, has storage keep what
    /// results as one batch, makes it visible, tells the subscribers, and says for each operation what became of it.
    ///
    /// An operation whose condition does not hold does not keep the others from being done.
    ///
    /// # Errors
    ///
    /// [`PersistError`]: none of it was done, nobody was told. After [`PersistErrorKind::Poisoned`] all later writes
    /// fail in the same way, and a restart tells what was kept.
    pub fn write(&self, ops: &[Op]) -> Result<Vec<Outcome>, PersistError> {
        let mut writer = self.lock_writer()?;
        let (Plan { changes, hashes, .. }, outcomes) = plan(&self.read(), writer.revision, ops);
        let Some(last) = changes.last() else { return Ok(outcomes) };
        if let Err(error) = writer.persist.persist(&changes) {
            writer.poisoned = error.kind() == PersistErrorKind::Poisoned;
            self.counters.failed_batches.fetch_add(1, Relaxed);
            return Err(error);
        }
        writer.revision = last.revision;
        self.publish(changes, &hashes);
        Ok(outcomes)
    }

    fn write_one(&self, op: Op) -> Result<Outcome, PersistError> {
        Ok(self.write(std::slice::from_ref(&op))?.pop().unwrap_or(Outcome::NotFound))
    }

    fn lock_writer(&self) -> Result<MutexGuard<'_, Writer<P>>, PersistError> {
        let refused = |context| Err(PersistError::new(PersistErrorKind::Poisoned, context));
        match self.writer.lock() {
            Ok(writer) if writer.poisoned => {
                refused("storage failed earlier and takes no more writes; restart to recover")
            }
            Ok(writer) => Ok(writer),
            Err(_) => refused("storage panicked earlier and takes no more writes; restart to recover"),
        }
    }

    /// Makes stored changes visible and tells the subscribers, as one step for whoever subscribes meanwhile.
    fn publish(&self, changes: Vec<Change>, hashes: &[u64]) {
        let mut subscribers = self.lock_subscribers();
        let mut keyspace = self.keyspace.write().unwrap_or_else(PoisonError::into_inner);
        changes.iter().zip(hashes).for_each(|(change, hash)| keyspace.apply(change, *hash));
        self.next_expiry.store(keyspace.next_expiry().unwrap_or(NEVER), Release);
        drop(keyspace);
        self.count(&changes);
        if subscribers.len() > 0 {
            self.tell(&mut subscribers, changes);
        }
    }

    fn tell(&self, subscribers: &mut Subscribers<N>, changes: Vec<Change>) {
        let (mut notified, mut conflated) = (0, 0);
        let mut gone: Vec<Arc<Subscription<N>>> = Vec::new();
        let mut covering = Vec::new();
        for change in changes {
            subscribers.for_each(&change.key, |subscription| covering.push(subscription));
            if covering.is_empty() {
                continue;
            }
            notified += covering.len() as u64;
            let event = Event::new(EventKind::Change(change));
            for subscription in covering.drain(..) {
                match subscription.notifier.notify(&event) {
                    Delivery::Queued => {}
                    Delivery::Conflated => conflated += 1,
                    Delivery::Closed => gone.push(Arc::clone(subscription)),
                }
            }
        }
        self.counters.notified.fetch_add(notified, Relaxed);
        self.counters.conflated.fetch_add(conflated, Relaxed);
        for subscription in gone {
            subscribers.remove(&subscription.pattern, |known| Arc::ptr_eq(known, &subscription));
        }
    }

    fn count(&self, changes: &[Change]) {
        let (mut puts, mut deletes, mut expired) = (0, 0, 0);
        for change in changes {
            match change.action {
                Action::Put { .. } => puts += 1,
                Action::Delete { reason: Reason::Deleted } => deletes += 1,
                Action::Delete { reason: Reason::Expired } => expired += 1,
            }
        }
        let counters = &self.counters;
        counters.batches.fetch_add(1, Relaxed);
        for (counter, count) in [(&counters.puts, puts), (&counters.deletes, deletes), (&counters.expired, expired)] {
            counter.fetch_add(count, Relaxed);
        }
    }

    /// Has `notifier` told of every change that `pattern` covers, from now on.
    ///
    /// With `snapshot`, the first event is the present state of all covered keys; it and the registration are one
    /// step: no change falls between them, none comes twice. A subscription of the same `id` and `pattern` is replaced,
    /// and told so.
    pub fn subscribe(&self, pattern: Pattern, id: SubscriberId, notifier: N, snapshot: bool) -> Arc<Subscription<N>> {
        let subscription = Arc::new(Subscription { id, pattern, notifier });
        let mut subscribers = self.lock_subscribers();
        if let Some(old) = subscribers.remove(&subscription.pattern, |known| known.id == subscription.id) {
            end(&old, EndReason::Replaced);
        }
        if snapshot {
            let event = Event::new(EventKind::Snapshot(self.snapshot(&subscription.pattern)));
            if subscription.notifier.notify(&event) == Delivery::Closed {
                return subscription;
            }
        }
        subscribers.insert(Arc::clone(&subscription));
        subscription
    }

    fn snapshot(&self, pattern: &Pattern) -> Snapshot {
        let keyspace = self.read();
        Snapshot {
            pattern: pattern.clone(),
            records: keyspace.covered(pattern).collect(),
            revision: keyspace.revision(),
            epoch: self.epoch,
        }
    }

    /// Ends a subscription, whoever asks, and tells its subscriber; false if there is none.
    pub fn unsubscribe(&self, pattern: &Pattern, id: &SubscriberId) -> bool {
        let removed = self.lock_subscribers().remove(pattern, |known| known.id == *id);
        removed.inspect(|old| end(old, EndReason::Unsubscribed)).is_some()
    }

    /// Returns whether there is a subscription of this name and pattern: another one would replace it.
    pub fn is_subscribed(&self, pattern: &Pattern, id: &SubscriberId) -> bool {
        self.lock_subscribers().has(pattern, |known| known.id == *id)
    }

    /// Forgets a subscription whose subscriber has gone; nobody is told. One that replaced it meanwhile stays.
    pub fn forget(&self, subscription: &Arc<Subscription<N>>) {
        self.lock_subscribers().remove(&subscription.pattern, |known| Arc::ptr_eq(known, subscription));
    }

    /// Who would be told of a change of `key`.
    pub fn subscribers_of(&self, key: &Key) -> Vec<Arc<Subscription<N>>> {
        let mut found = Vec::new();
        self.lock_subscribers().for_each(key, |subscription| found.push(Arc::clone(subscription)));
        found
    }

    /// How many events were given to subscribers since the store was opened: [`Stats::notified`], for the asking.
    pub fn notified(&self) -> u64 {
        self.counters.notified.load(Relaxed)
    }

    /// The epoch of the data.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Figures, roughly of one moment.
    pub fn stats(&self) -> Stats {
        let subscriptions = self.lock_subscribers().len() as u64;
        let keyspace = self.read();
        let counters = &self.counters;
        Stats {
            keys: keyspace.len() as u64,
            value_bytes: keyspace.value_bytes() as u64,
            subscriptions,
            revision: keyspace.revision(),
            epoch: self.epoch,
            puts: counters.puts.load(Relaxed),
            deletes: counters.deletes.load(Relaxed),
            expired: counters.expired.load(Relaxed),
            batches: counters.batches.load(Relaxed),
            failed_batches: counters.failed_batches.load(Relaxed),
            notified: counters.notified.load(Relaxed),
            conflated: counters.conflated.load(Relaxed),
        }
    }

    // A panic under one of these two locks comes from a notifier that broke its contract. The data under them is whole
    // between two steps of this module, so reads and subscriptions go on; the writer, whose lock was held too, stops.

    fn read(&self) -> RwLockReadGuard<'_, Keyspace> {
        self.keyspace.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_subscribers(&self) -> MutexGuard<'_, Subscribers<N>> {
        self.subscribers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells a subscriber that its subscription has ended; that it is gone already is no news to anyone.
fn end<N: Notifier>(subscription: &Subscription<N>, reason: EndReason) {
    let ended = EventKind::Ended { pattern: subscription.pattern.clone(), reason };
    let (Delivery::Queued | Delivery::Conflated | Delivery::Closed) = subscription.notifier.notify(&Event::new(ended));
}

impl From<Outcome> for WriteError {
    /// An outcome that is not the one hoped for.
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Conflict { revision } => WriteError::Conflict { revision },
            _ => WriteError::NotFound,
        }
    }
}

/// What a batch changes, and what becomes of each operation. Reads memory only.
fn plan<'a>(keyspace: &'a Keyspace, revision: Revision, ops: &[Op]) -> (Plan<'a>, Vec<Outcome>) {
    let (changes, hashes) = (Vec::with_capacity(ops.len()), Vec::with_capacity(ops.len()));
    let latest = (ops.len() > 1).then(|| HashTable::with_capacity(ops.len()));
    let mut plan = Plan { keyspace, revision, changes, hashes, latest };
    // All keys are looked up before anything else is done: in so short a loop the processor waits for the memory of
    // several at a time.
    let hash = |op| (key_of(op).map_or(0, |key| keyspace.hash(key.as_str())), Revision::ZERO);
    let mut found: Vec<(u64, Revision)> = ops.iter().map(hash).collect();
    for (op, (hash, stored)) in ops.iter().zip(&mut found) {
        *stored = key_of(op).map_or(Revision::ZERO, |key| keyspace.revision_of(key.as_str(), *hash));
    }
    let outcomes = ops.iter().zip(found).map(|(op, (hash, stored))| plan.step(op, hash, stored)).collect();
    (plan, outcomes)
}

/// The one key that an operation is about, if it is about one.
fn key_of(op: &Op) -> Option<&Key> {
    match op {
        Op::Put { key, .. } | Op::Delete { pattern: Pattern::Key(key), .. } => Some(key),
        Op::Delete { .. } | Op::Expire { .. } => None,
    }
}

struct Plan<'a> {
    keyspace: &'a Keyspace,
    revision: Revision,
    changes: Vec<Change>,
    /// Of the key of each change: a key is hashed once for each operation.
    hashes: Vec<u64>,
    /// The latest change of each key that has one, by the hash of the key: what later operations of the batch see.
    /// Nobody asks if there is only one operation.
    latest: Option<HashTable<usize>>,
}

impl Plan<'_> {
    /// `hash` and `stored`, the revision before the batch, are those of the key that it is about.
    fn step(&mut self, op: &Op, hash: u64, stored: Revision) -> Outcome {
        match op {
            Op::Put { key, value, options } => {
                let present = self.latest(key, hash).map_or(stored, left_by);
                if options.if_revision.is_some_and(|expected| expected != present) {
                    return Outcome::Conflict { revision: present };
                }
                let action = Action::Put { value: value.clone(), expiry: options.expiry };
                Outcome::Put { revision: self.change(key.clone(), hash, present, action) }
            }
            Op::Delete { pattern: Pattern::Key(key), if_revision } => {
                let present = self.latest(key, hash).map_or(stored, left_by);
                if present == Revision::ZERO {
                    return Outcome::NotFound;
                }
                if if_revision.is_some_and(|expected| expected != present) {
                    return Outcome::Conflict { revision: present };
                }
                let revision = self.change(key.clone(), hash, present, Action::Delete { reason: Reason::Deleted });
                Outcome::Deleted { count: 1, revision }
            }
            Op::Delete { if_revision: Some(_), .. } => Outcome::Conflict { revision: Revision::ZERO },
            Op::Delete { pattern, if_revision: None } => match self.delete(self.selected(pattern), Reason::Deleted) {
                Outcome::Deleted { count: 0, .. } => Outcome::NotFound,
                deleted => deleted,
            },
            Op::Expire { now } => {
                // What an earlier operation of the batch wrote or removed is not due: its expiry is another.
                let is_untouched = |key: &&Key| self.latest(key, self.keyspace.hash(key.as_str())).is_none();
                let due = self.keyspace.due(*now).filter(is_untouched);
                let due: Vec<Key> = due.take(EXPIRE_MAX).cloned().collect();
                self.delete(due, Reason::Expired)
            }
        }
    }

    fn latest(&self, key: &Key, hash: u64) -> Option<&Change> {
        let is_of_key = |at: &usize| self.changes.get(*at).is_some_and(|change| change.key == *key);
        self.latest.as_ref()?.find(hash, is_of_key).and_then(|at| self.changes.get(*at))
    }

    fn selected(&self, pattern: &Pattern) -> BTreeSet<Key> {
        let selected = self.keyspace.select(pattern, None);
        let mut keys: BTreeSet<Key> = selected.map(|record| Key::trusted(record.key)).collect();
        let latest = self.latest.iter().flatten().filter_map(|at| self.changes.get(*at));
        for change in latest.filter(|change| pattern.selects(&change.key)) {
            if left_by(change) == Revision::ZERO {
                keys.remove(&change.key);
            } else {
                keys.insert(change.key.clone());
            }
        }
        keys
    }

    fn delete(&mut self, keys: impl IntoIterator<Item = Key>, reason: Reason) -> Outcome {
        let mut count = 0;
        let mut revision = Revision::ZERO;
        for key in keys {
            let hash = self.keyspace.hash(key.as_str());
            let stored = || self.keyspace.revision_of(key.as_str(), hash);
            let present = self.latest(&key, hash).map_or_else(stored, left_by);
            revision = self.change(key, hash, present, Action::Delete { reason });
            count += 1;
        }
        Outcome::Deleted { count, revision }
    }

    fn change(&mut self, key: Key, hash: u64, replaces: Revision, action: Action) -> Revision {
        self.revision = self.revision.next();
        let (at, changes, hashes) = (self.changes.len(), &self.changes, &self.hashes);
        let is_of_key = |known: &usize| changes.get(*known).is_some_and(|change: &Change| change.key == key);
        let hash_of = |known: &usize| hashes.get(*known).copied().unwrap_or_default();
        if let Some(latest) = &mut self.latest {
            *latest.entry(hash, is_of_key, hash_of).or_insert(at).get_mut() = at;
        }
        self.hashes.push(hash);
        self.changes.push(Change { key, revision: self.revision, replaces, action });
        self.revision
    }
}

/// At which revision a change leaves its key; zero if it is gone.
fn left_by(change: &Change) -> Revision {
    match change.action {
        Action::Put { .. } => change.revision,
        Action::Delete { .. } => Revision::ZERO,
    }
}
