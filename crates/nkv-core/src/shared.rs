//! What reading, writing and subscribing share: the keyspace, the subscribers, the time and the figures.
//!
//! Two locks, always taken in this order: the subscribers (so that a subscription sees a change either in its snapshot
//! or as an event), the keyspace (held only to look or to apply). Reads take the second alone.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, PoisonError, Weak};
use std::vec::IntoIter;

use crate::changes::{Changes, Feed, Gap};
use crate::event::{Began, EndReason, Event, EventKind, ReadSnapshot, Snapshot, SnapshotReader};
use crate::key::{Key, KeyRef, Pattern};
use crate::keyspace::{Keyspace, is_due};
use crate::notifier::{Delivery, Notifier};
use crate::plan::Hashed;
use crate::record::{Action, Change, Reason, Timestamp};
use crate::records::Records;
use crate::revision::{Epoch, Revision};
use crate::subscribers::{Progress, SubscriberId, Subscribers, Subscription};
use crate::sync::{MutexGuard, RwLock, RwLockReadGuard, TurnMutex};
use crate::wake::{Later, drop_later};

/// When no TTL ends.
pub(crate) const NEVER: Timestamp = Timestamp::MAX;

/// How many keys are read under one hold of a lock. A part of a snapshot has no more, and ends at the key that brings its
/// keys and values to `PART_LEN_MAX` bytes.
pub(crate) const PART_KEYS_MAX: usize = 1_024;
const PART_LEN_MAX: usize = 64 << 10;

/// The number of notifications after which threads that wait for the lock of the subscribers go first.
const TURN_NOTIFICATIONS: u64 = 1_024;

#[derive(Debug)]
pub(crate) struct Shared<N> {
    subscribers: TurnMutex<Subscribers<N>>,
    keyspace: RwLock<Keyspace>,
    /// How many subscriptions there are, for the asking.
    subscriptions: AtomicU64,
    /// That of the keyspace, for the asking after every batch.
    next_expiry: AtomicU64,
    /// Values whose TTL has ended by then are absent, also those that storage still has.
    now: AtomicU64,
    /// What the events that are not delivered yet take.
    event_bytes: Arc<AtomicUsize>,
    /// The revision up to which the subscribers are notified.
    notified_up_to: AtomicU64,
    feed: Feed,
    pub(crate) counters: Counters,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) puts: AtomicU64,
    pub(crate) deletes: AtomicU64,
    pub(crate) expired: AtomicU64,
    pub(crate) batches: AtomicU64,
    pub(crate) failed_batches: AtomicU64,
    pub(crate) notified: AtomicU64,
    pub(crate) conflated: AtomicU64,
}

impl<N: Notifier> Shared<N> {
    pub(crate) fn new(keyspace: Keyspace, now: Timestamp) -> Self {
        Shared {
            subscribers: TurnMutex::new(Subscribers::new()),
            subscriptions: AtomicU64::new(0),
            next_expiry: AtomicU64::new(keyspace.next_expiry().unwrap_or(NEVER).as_millis()),
            now: AtomicU64::new(now.as_millis()),
            event_bytes: Arc::default(),
            notified_up_to: AtomicU64::new(keyspace.revision().get()),
            keyspace: RwLock::new(keyspace),
            feed: Feed::default(),
            counters: Counters::default(),
        }
    }

    // A panic under one of the two locks comes from a notifier that broke its contract. The data under them is whole
    // between two steps of this module, so reads and subscriptions go on; the writer, whose lock was held too, stops.

    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Keyspace> {
        self.keyspace.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.now.load(Acquire))
    }

    pub(crate) fn advance(&self, now: Timestamp) {
        self.now.fetch_max(now.as_millis(), Release);
    }

    pub(crate) fn next_expiry(&self) -> Timestamp {
        Timestamp::from_millis(self.next_expiry.load(Acquire))
    }

    pub(crate) fn subscriptions(&self) -> u64 {
        self.subscriptions.load(Relaxed)
    }

    pub(crate) fn notified_up_to(&self) -> Revision {
        Revision::new(self.notified_up_to.load(Acquire))
    }

    pub(crate) fn event_bytes(&self) -> &Arc<AtomicUsize> {
        &self.event_bytes
    }

    /// Makes stored changes visible, all at once, and notifies the subscribers. With them every change up to `complete` is
    /// visible. The caller has begun a [`Later`].
    pub(crate) fn publish(&self, mut changes: Vec<Change>, hashes: &[Hashed], complete: Revision) {
        let subscribers = self.subscribers.lock();
        let mut keyspace = self.keyspace.write().unwrap_or_else(PoisonError::into_inner);
        changes.iter().zip(hashes).for_each(|(change, hashed)| keyspace.apply(change, hashed.hash));
        keyspace.complete(complete);
        let applied = keyspace.applied();
        self.next_expiry.store(keyspace.next_expiry().unwrap_or(NEVER).as_millis(), Release);
        drop(keyspace);
        let seen = self.count(&changes);
        if self.feed.is_read() {
            self.feed.push(&changes, hashes, complete);
        }
        let next = applied + 1 - changes.len() as u64;
        if seen < changes.len() as u64 {
            changes.retain(Change::has_effect);
        }
        self.notify_all(subscribers, Numbered { changes: changes.into_iter(), next, complete }, applied);
        self.notified_up_to.store(complete.get(), Release);
    }

    /// Puts another keyspace, of another epoch, in the place of the present one: for readers at once, and for each
    /// subscription with a fresh beginning. Returns the one before, to be dropped without a lock. The caller has begun a
    /// [`Later`].
    pub(crate) fn begin_epoch(&self, mut keyspace: Keyspace) -> Keyspace {
        let mut subscribers = self.subscribers.lock();
        let mut present = self.keyspace.write().unwrap_or_else(PoisonError::into_inner);
        keyspace.follow(&present);
        let (revision, epoch) = (keyspace.revision(), keyspace.epoch());
        let before = std::mem::replace(&mut *present, keyspace);
        self.next_expiry.store(present.next_expiry().unwrap_or(NEVER).as_millis(), Release);
        drop(present);
        self.feed.begin(revision, epoch);
        let mut gone = Vec::new();
        for subscription in subscribers.all() {
            let (pattern, reader) = (subscription.pattern().clone(), subscription.reader.clone());
            subscription.progress.begin_anew();
            let began = EventKind::Began(Began::new(pattern, revision, epoch, reader).as_reset());
            if subscription.notifier().notify(&Event::new(began)) == Delivery::Closed {
                gone.extend(
                    self.remove(&mut subscribers, subscription.pattern(), |known| Arc::ptr_eq(known, &subscription)),
                );
            }
        }
        self.notified_up_to.store(revision.get(), Release);
        drop(subscribers);
        drop_later(gone);
        before
    }

    /// Has the changes from now on kept for a reader; `since` is to be the present revision, or one that is held for
    /// another reader.
    pub(crate) fn follow(&self, since: Option<(Epoch, Revision)>, len_max: usize) -> Result<Changes, Gap> {
        let subscribers = self.subscribers.lock();
        let keyspace = self.read();
        let (present, is_between) = ((keyspace.epoch(), keyspace.revision()), keyspace.is_between());
        drop(keyspace);
        if is_between && since.is_some() {
            return Err(Gap { epoch: present.0, revision: present.1 });
        }
        let changes = self.feed.follow(since, present, len_max);
        drop(subscribers);
        changes
    }

    /// After some changes the threads that wait to subscribe, to unsubscribe, or to read part of a snapshot go first: they
    /// see which changes the others have been notified of.
    fn notify_all<'a>(&'a self, mut subscribers: MutexGuard<'a, Subscribers<N>>, mut changes: Numbered, applied: u64) {
        let mut tally = Tally { notified: 0, conflated: 0, gone: Vec::new() };
        while subscribers.len() > 0 && self.notify_some(&mut subscribers, &mut changes, &mut tally) {
            drop(subscribers);
            self.subscribers.give_turns();
            subscribers = self.subscribers.lock();
        }
        subscribers.notified_up_to = applied;
        drop(subscribers);
        self.counters.notified.fetch_add(tally.notified, Relaxed);
        self.counters.conflated.fetch_add(tally.conflated, Relaxed);
        drop_later(tally.gone);
    }

    /// False once all are notified of all changes.
    fn notify_some(&self, subscribers: &mut Subscribers<N>, changes: &mut Numbered, tally: &mut Tally<N>) -> bool {
        let gone_before = tally.gone.len();
        let mut covering = Vec::new();
        // Each subscription that was looked at counts, also one that does not want the change.
        let (mut looks, mut is_done) = (0, true);
        for (change, sequence, ends_revision) in changes.by_ref() {
            subscribers.for_each(&change.key, |subscription| {
                looks += 1;
                if subscription.progress.wants(&change.key, sequence) {
                    covering.push(subscription);
                }
            });
            if !covering.is_empty() {
                tally.notified += covering.len() as u64;
                let event = Event::counted(change, sequence, ends_revision, &self.event_bytes);
                for subscription in covering.drain(..) {
                    match subscription.notifier().notify(&event) {
                        Delivery::Queued => {}
                        Delivery::Conflated => tally.conflated += 1,
                        // It is notified of the rest of the turn all the same.
                        Delivery::Closed if subscription.has_ended() => {}
                        Delivery::Closed => {
                            subscription.progress.end();
                            tally.gone.push(Arc::clone(subscription));
                        }
                    }
                }
            }
            if looks >= TURN_NOTIFICATIONS && self.subscribers.is_wanted() {
                is_done = false;
                break;
            }
        }
        for gone in tally.gone.iter().skip(gone_before) {
            self.remove(subscribers, gone.pattern(), |known| Arc::ptr_eq(known, gone));
        }
        !is_done
    }

    /// Says how many of them readers see.
    fn count(&self, changes: &[Change]) -> u64 {
        let (mut puts, mut deletes, mut expired) = (0, 0, 0);
        for change in changes.iter().filter(|change| change.has_effect()) {
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
        puts + deletes + expired
    }

    /// See [`NotifyKeyValue::subscribe`](crate::NotifyKeyValue::subscribe).
    pub(crate) fn subscribe(
        self: &Arc<Self>,
        pattern: Pattern,
        id: SubscriberId,
        notifier: N,
        has_snapshot: bool,
    ) -> Arc<Subscription<N>> {
        let later = Later::begin();
        let progress = Arc::<Progress>::default();
        let reader = Reader { shared: Arc::downgrade(self), pattern: pattern.clone(), progress: Arc::clone(&progress) };
        let reader = SnapshotReader::new(Arc::new(reader));
        let subscription = Arc::new(Subscription::new(id, pattern, notifier, progress, reader.clone()));
        let (pattern, progress) = (subscription.pattern(), &subscription.progress);
        let mut subscribers = self.subscribers.lock();
        let replaced = self.remove(&mut subscribers, pattern, |known| known.id() == subscription.id());
        replaced.iter().for_each(|old| end(old, EndReason::Replaced));
        let keyspace = self.read();
        let (applied, revision, epoch) = (keyspace.applied(), keyspace.revision(), keyspace.epoch());
        drop(keyspace);
        let mut began = Began::new(pattern.clone(), revision, epoch, reader);
        if has_snapshot {
            began = began.with_snapshot();
        } else {
            progress.go_live(subscribers.notified_up_to, applied);
        }
        if subscription.notifier().notify(&Event::new(EventKind::Began(began))) == Delivery::Closed {
            progress.end();
        } else {
            subscribers.insert(Arc::clone(&subscription));
            self.subscriptions.store(subscribers.len() as u64, Relaxed);
        }
        drop(subscribers);
        drop((later, replaced));
        subscription
    }

    /// See [`NotifyKeyValue::unsubscribe`](crate::NotifyKeyValue::unsubscribe).
    pub(crate) fn unsubscribe(&self, pattern: &Pattern, is_it: impl Fn(&Arc<Subscription<N>>) -> bool) -> bool {
        let later = Later::begin();
        let mut subscribers = self.subscribers.lock();
        let removed = self.remove(&mut subscribers, pattern, is_it);
        removed.iter().for_each(|old| end(old, EndReason::Unsubscribed));
        drop(subscribers);
        drop(later);
        removed.is_some()
    }

    /// See [`NotifyKeyValue::subscription`](crate::NotifyKeyValue::subscription).
    pub(crate) fn subscription(&self, pattern: &Pattern, id: &SubscriberId) -> Option<Arc<Subscription<N>>> {
        self.subscribers.lock().find(pattern, |known| known.id() == id).cloned()
    }

    /// See [`NotifyKeyValue::forget`](crate::NotifyKeyValue::forget).
    pub(crate) fn forget(&self, gone: &[Arc<Subscription<N>>]) {
        for some in gone.chunks(TURN_SUBSCRIPTIONS) {
            let mut subscribers = self.subscribers.lock();
            let removed: Vec<_> = some
                .iter()
                .map(|gone| self.remove(&mut subscribers, gone.pattern(), |known| Arc::ptr_eq(known, gone)))
                .collect();
            drop(subscribers);
            drop(removed);
        }
    }

    /// See [`NotifyKeyValue::forget_all`](crate::NotifyKeyValue::forget_all).
    pub(crate) fn forget_all(&self) {
        let mut subscribers = self.subscribers.lock();
        let removed = subscribers.take_all();
        removed.iter().for_each(|removed| removed.progress.end());
        self.subscriptions.store(0, Relaxed);
        drop(subscribers);
        drop(removed);
        self.feed.close();
    }

    /// What is removed is to be dropped without the lock.
    fn remove(
        &self,
        subscribers: &mut Subscribers<N>,
        pattern: &Pattern,
        is_it: impl Fn(&Arc<Subscription<N>>) -> bool,
    ) -> Option<Arc<Subscription<N>>> {
        let removed = subscribers.remove(pattern, is_it);
        removed.iter().for_each(|removed| removed.progress.end());
        self.subscriptions.store(subscribers.len() as u64, Relaxed);
        removed
    }

    /// See [`NotifyKeyValue::subscribers_of`](crate::NotifyKeyValue::subscribers_of).
    pub(crate) fn subscribers_of(&self, key: &Key) -> Vec<Arc<Subscription<N>>> {
        let mut found = Vec::new();
        self.subscribers.lock().for_each(key, |subscription| found.push(Arc::clone(subscription)));
        found
    }
}

/// How many subscriptions are forgotten under one hold of the lock.
const TURN_SUBSCRIPTIONS: usize = 64;

/// Changes that subscribers are to be notified of.
struct Numbered {
    changes: IntoIter<Change>,
    /// The sequence number of the next.
    next: u64,
    /// Every change up to this revision is among these, or came before.
    complete: Revision,
}

impl Iterator for Numbered {
    /// With its sequence number, and whether no other of its revision follows.
    type Item = (Change, u64, bool);

    fn next(&mut self) -> Option<Self::Item> {
        let change = self.changes.next()?;
        let ends_revision = match self.changes.as_slice().first() {
            Some(next) => next.revision != change.revision,
            None => self.complete >= change.revision,
        };
        self.next += 1;
        Some((change, self.next - 1, ends_revision))
    }
}

/// What became of notifications.
struct Tally<N> {
    notified: u64,
    conflated: u64,
    /// Subscriptions whose notifiers have closed; to be dropped without the lock.
    gone: Vec<Arc<Subscription<N>>>,
}

/// Notifies a subscriber that its subscription has ended; one that is gone already need not know.
fn end<N: Notifier>(subscription: &Subscription<N>, reason: EndReason) {
    let ended = EventKind::Ended { pattern: subscription.pattern().clone(), reason };
    let (Delivery::Queued | Delivery::Conflated | Delivery::Closed) =
        subscription.notifier().notify(&Event::new(ended));
}

/// Reads the snapshots of one subscription.
struct Reader<N> {
    shared: Weak<Shared<N>>,
    pattern: Pattern,
    progress: Arc<Progress>,
}

impl<N: Notifier> ReadSnapshot for Reader<N> {
    fn next_part(&self) -> Option<Snapshot> {
        let shared = self.shared.upgrade()?;
        let subscribers = shared.subscribers.lock();
        let keyspace = shared.read();
        let (applied, epoch) = (keyspace.applied(), keyspace.epoch());
        let (after, revision) = self.progress.resume(keyspace.revision())?;
        let (mut records, mut len) = (Records::default(), 0);
        let (now, mut looks, mut last) = (shared.now(), 0, None);
        let mut covered = keyspace.covered(&self.pattern, after.as_ref());
        while looks < PART_KEYS_MAX && len < PART_LEN_MAX {
            let Some(record) = covered.next() else { break };
            (looks, last) = (looks + 1, Some(record.key));
            if !is_due(record.expiry, now) {
                len += record.key.len() + record.value.len();
                records.push(record);
            }
        }
        let up_to = last.filter(|_| covered.next().is_some()).map(KeyRef::to_key);
        let is_last = up_to.is_none();
        self.progress.has_read(up_to, subscribers.notified_up_to, applied);
        drop(covered);
        drop(keyspace);
        drop(subscribers);
        Some(Snapshot { pattern: self.pattern.clone(), records, revision, epoch, is_last })
    }

    fn reset(&self) -> bool {
        self.progress.reset()
    }

    fn has_ended(&self) -> bool {
        self.progress.has_ended()
    }

    fn wants(&self, key: &Key, sequence: u64) -> bool {
        self.progress.wants(key, sequence)
    }
}
