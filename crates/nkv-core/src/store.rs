//! The store: keys in memory, storage behind them, subscribers in front.
//!
//! Its locks, always taken in this order: the writer (held while storage works, so writers queue there and no other
//! caller does), then those of [`Shared`].

use std::convert::Infallible;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use bytes::Bytes;
use thiserror::Error;

use crate::changes::{Changes, Gap};
use crate::key::{Key, KeyRef, Pattern};
use crate::keyspace::{Keyspace, is_due};
use crate::notifier::Notifier;
use crate::persist::{PersistError, PersistErrorKind, PersistValue, StoredRef};
use crate::plan::{Extent, Plan};
use crate::queue::Queue;
use crate::record::{Record, RecordRef, Timestamp};
use crate::revision::{Epoch, Revision};
use crate::shared::{NEVER, PART_KEYS_MAX, Shared};
use crate::subscribers::{SubscriberId, Subscription};
use crate::sync::{Mutex, MutexGuard};
use crate::wake::Later;
use crate::write::{Op, Outcome, PutOptions, Write, WriteError};

/// A notify key-value store: values that survive, and subscribers that are notified of the latest.
///
/// `P` keeps the values, `N` reaches one subscriber. All methods take `&self` and may be called from any thread.
/// No change is visible to readers, notified to subscribers or acknowledged before `P` has stored it.
///
/// # Examples
///
/// ```
/// use nkv_core::mailbox::{Item, mailbox};
/// use nkv_core::{Key, NoPersist, NotifyKeyValue, Pattern, PutOptions};
///
/// let store = NotifyKeyValue::open(NoPersist::default())?;
/// let (post, inbox) = mailbox::<()>();
/// store.subscribe(Pattern::new("host")?, "screen".into(), post, false);
///
/// store.put(&Key::new("host.load")?, "0.7", PutOptions::default())?;
///
/// assert!(matches!(inbox.try_take(), Some(Item::Event { .. }))); // it began
/// assert!(matches!(inbox.try_take(), Some(Item::Event { .. }))); // the change
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct NotifyKeyValue<P, N> {
    /// Writes of callers that have no thread for writing: those that wait are done together.
    queue: Queue,
    writer: Mutex<Writer<P>>,
    pub(crate) shared: Arc<Shared<N>>,
}

#[derive(Debug)]
pub(crate) struct Writer<P> {
    pub(crate) persist: P,
    /// The newest revision stored.
    pub(crate) revision: Revision,
    /// Storage no longer knows what it holds; it is not asked again.
    pub(crate) poisoned: bool,
    /// Storage has begun an epoch, and does not have all of its first state. Readers are in the one before.
    pub(crate) is_between_epochs: bool,
    /// Storage was closed.
    closed: bool,
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
    /// Loads what `persist` kept. Expiries are taken as they were stored.
    ///
    /// # Errors
    ///
    /// What [`PersistValue::load`] says.
    pub fn open(persist: P) -> Result<Self, PersistError> {
        Self::load(persist, Timestamp::MIN, Timestamp::MAX, |_| {})
    }

    /// Loads what `persist` kept. `now` is the present, on the clock that expiries are counted on: values that have ended
    /// by then are absent, and none lives longer from then on than its TTL, so that a clock that was set back between two
    /// runs cannot keep values for years.
    ///
    /// # Errors
    ///
    /// What [`PersistValue::load`] says.
    pub fn open_at(persist: P, now: Timestamp) -> Result<Self, PersistError> {
        Self::load(persist, now, now, |_| {})
    }

    /// As [`open_at`](Self::open_at), and lends each record and each tombstone that is loaded to `visit`, also those of
    /// [reserved](Key::reserved) keys, with the meta that the store itself does not keep, in no particular order.
    ///
    /// # Errors
    ///
    /// What [`PersistValue::load`] says.
    pub fn open_visiting(persist: P, now: Timestamp, visit: impl FnMut(StoredRef<'_>)) -> Result<Self, PersistError> {
        Self::load(persist, now, now, visit)
    }

    fn load(
        mut persist: P,
        now: Timestamp,
        clamp_at: Timestamp,
        mut visit: impl FnMut(StoredRef<'_>),
    ) -> Result<Self, PersistError> {
        let mut keyspace = Keyspace::default();
        let loaded = persist.load(&mut |mut stored| {
            if let StoredRef::Record { record, .. } = &mut stored {
                debug_assert_eq!(Key::check(&record.key), Ok(()), "storage visits nothing else");
                if let Some(expiry) = &mut record.expiry {
                    expiry.at = expiry.at.min(clamp_at.saturating_add(expiry.ttl_ms));
                }
                keyspace.load(*record);
            }
            visit(stored);
        })?;
        keyspace.end_loading(loaded);
        Ok(NotifyKeyValue {
            queue: Queue::default(),
            writer: Mutex::new(Writer {
                persist,
                revision: loaded.revision,
                poisoned: false,
                is_between_epochs: false,
                closed: false,
            }),
            shared: Arc::new(Shared::new(keyspace, now)),
        })
    }

    /// The value of a key.
    pub fn get(&self, key: &Key) -> Option<Record> {
        self.look_up(key.as_str(), |record| record.to_record())
    }

    /// Lends a key's record to `look`; `None` if there is none, as for a text that is no key. Nothing is allocated or
    /// copied here: this is the way to read for a caller that writes the record somewhere else.
    ///
    /// No write becomes visible while `look` looks, so it is to be quick, and must not call back into the store.
    pub fn look_up<R>(&self, key: &str, look: impl FnOnce(RecordRef<'_>) -> R) -> Option<R> {
        self.shared.read().get(key, self.shared.now()).map(look)
    }

    /// Lends each record that `pattern` selects, after `after`, to `visit`, in key order, until it breaks off. What
    /// [`look_up`](Self::look_up) says of the lock holds here too.
    ///
    /// Up to 1,024 keys are of one moment. Then others have the lock in between, and the next keys are of a later one.
    pub fn walk<B>(
        &self,
        pattern: &Pattern,
        after: Option<&Key>,
        mut visit: impl FnMut(RecordRef<'_>) -> ControlFlow<B>,
    ) -> ControlFlow<B> {
        if let Pattern::Key(key) | Pattern::Exact(key) = pattern {
            // Found by its hash. Its place in the order takes a look at some twenty keys, which lie far from each other.
            let is_after = after.is_none_or(|after| after < key);
            let visited = is_after.then(|| self.look_up(key.as_str(), visit)).flatten();
            return visited.unwrap_or(ControlFlow::Continue(()));
        }
        let mut after = after.cloned();
        loop {
            let (keyspace, now) = (self.shared.read(), self.shared.now());
            let mut selected = keyspace.select_stored(pattern, after.as_ref());
            let mut last = None;
            for record in selected.by_ref().take(PART_KEYS_MAX) {
                last = Some(record.key);
                if !is_due(record.expiry, now) {
                    visit(record)?;
                }
            }
            let Some(last) = last.filter(|_| selected.next().is_some()).map(KeyRef::to_key) else {
                return ControlFlow::Continue(());
            };
            drop(selected);
            drop(keyspace);
            after = Some(last);
        }
    }

    /// The keys and values that `pattern` selects, in key order, of one moment as [`walk`](Self::walk) has it.
    pub fn get_all(&self, pattern: &Pattern) -> Vec<Record> {
        let mut all = Vec::new();
        let _: ControlFlow<()> = self.walk(pattern, None, |record| {
            all.push(record.to_record());
            ControlFlow::Continue(())
        });
        all
    }

    /// At most `limit` keys and values that `pattern` selects, after `after`, in key order, of one moment as
    /// [`walk`](Self::walk) has it.
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
        let mut bytes = 0;
        self.page(pattern, after, limit, |record| {
            bytes += record.key.len() + record.value.len();
            if bytes > bytes_max { Err(PageTooLarge { bytes_max }) } else { Ok(record.to_record()) }
        })
    }

    /// At most `limit` keys that `pattern` selects, after `after`, with their revisions, in key order, of one moment as
    /// [`walk`](Self::walk) has it.
    pub fn list(&self, pattern: &Pattern, after: Option<&Key>, limit: usize) -> Page<(Key, Revision)> {
        let listed = |record: RecordRef<'_>| Ok::<_, Infallible>((record.key.to_key(), record.revision));
        match self.page(pattern, after, limit, listed) {
            Ok(page) => page,
            Err(never) => match never {},
        }
    }

    fn page<T, E>(
        &self,
        pattern: &Pattern,
        after: Option<&Key>,
        limit: usize,
        mut entry: impl FnMut(RecordRef<'_>) -> Result<T, E>,
    ) -> Result<Page<T>, E> {
        let mut page = Page { entries: Vec::new(), more: false };
        let ended = self.walk(pattern, after, |record| {
            if page.entries.len() == limit {
                page.more = true;
                return ControlFlow::Break(None);
            }
            match entry(record) {
                Ok(entry) => page.entries.push(entry),
                Err(error) => return ControlFlow::Break(Some(error)),
            }
            ControlFlow::Continue(())
        });
        match ended {
            ControlFlow::Break(Some(error)) => Err(error),
            _ => Ok(page),
        }
    }

    /// Whether `pattern` selects any key.
    pub fn exists(&self, pattern: &Pattern) -> bool {
        match pattern.one_key() {
            Some(key) => self.shared.read().get(key.as_str(), self.shared.now()).is_some(),
            None => self.walk(pattern, None, |_| ControlFlow::Break(())).is_break(),
        }
    }

    /// Writes a value and returns its revision. Threads that write at the same time share what storage does for it.
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
    /// Up to 1,024 keys go in one step. More go in slices, in key order: what was there when it began and was not written
    /// since is deleted, and readers may see that some keys are gone while others are not yet.
    ///
    /// # Errors
    ///
    /// [`WriteError::NotFound`] when there is none, [`WriteError::Conflict`] when the condition does not hold,
    /// [`WriteError::Persist`] when storage fails, [`WriteError::Partial`] when it fails after some slices.
    pub fn delete(&self, pattern: &Pattern, if_revision: Option<Revision>) -> Result<(u64, Revision), WriteError> {
        match self.write_one(Op::Delete { pattern: pattern.clone(), if_revision })? {
            Outcome::Deleted { count, revision } => Ok((count, revision)),
            other => Err(other.into()),
        }
    }

    fn write_one(&self, op: Op) -> Result<Outcome, WriteError> {
        Ok(self.run(Write::apart(vec![op])).into_results().pop().unwrap_or(Ok(Outcome::NotFound))?)
    }

    /// Lets the time go on to `now`, on the clock that expiries are counted on: from here on, values that have ended by
    /// then are absent for reads, snapshots, conditions and deletes, whether storage has removed them or not. That, and
    /// the notification, is what [`expire`](Self::expire) does. The time does not go back. No lock is taken.
    pub fn advance(&self, now: Timestamp) {
        self.shared.advance(now);
    }

    /// [Advances](Self::advance) the time, removes the keys whose TTL has ended, notifies their subscribers, and returns
    /// how many they were. They go in slices, the earliest first.
    ///
    /// # Errors
    ///
    /// [`PersistError`] when storage fails: what is left is removed by a later call.
    pub fn expire(&self, now: Timestamp) -> Result<u64, PersistError> {
        self.advance(now);
        match self.run(Write::expiry()).into_results().pop() {
            Some(Ok(Outcome::Deleted { count, .. })) => Ok(count),
            Some(Err(failed)) => Err(failed.error),
            _ => Ok(0),
        }
    }

    /// When the next key's TTL ends: when [`expire`](Self::expire) is to be called. The end of time, [`Timestamp::MAX`],
    /// never comes. No lock is taken.
    pub fn next_expiry(&self) -> Option<Timestamp> {
        Some(self.shared.next_expiry()).filter(|at| *at != NEVER)
    }

    /// When the next key's TTL ends of those that end after `now`: for a caller that has [advanced](Self::advance) the time to
    /// `now` and leaves the removal to others.
    pub fn next_expiry_after(&self, now: Timestamp) -> Option<Timestamp> {
        let first = self.next_expiry()?;
        if first > now { Some(first) } else { self.shared.read().next_expiry_after(now).filter(|at| *at != NEVER) }
    }

    /// Does `ops` as one batch: checks the conditions in order, each operation seeing the ones before it, has storage keep
    /// what results together, makes it visible at once, notifies the subscribers, and says for each operation what became
    /// of it. Threads that write at the same time share what storage does for it.
    ///
    /// An operation whose condition does not hold does not keep the others from being done.
    ///
    /// # Errors
    ///
    /// [`PersistError`]: none of it was done, no subscriber was notified. [`PersistErrorKind::Rejected`] if it changes more than 16,384
    /// keys. After [`PersistErrorKind::Poisoned`] all later writes fail in the same way, and a restart shows what was
    /// kept.
    pub fn write(&self, ops: &[Op]) -> Result<Vec<Outcome>, PersistError> {
        let results = self.run(Write::together(ops.to_vec())).into_results();
        results.into_iter().collect::<Result<_, _>>().map_err(|failed| failed.error)
    }

    fn run(&self, write: Write) -> Write {
        self.queue.run(write, |writes| self.commit(writes))
    }

    /// For callers that gather the writes of many: does as much of `writes` as one batch of storage takes, in order, makes
    /// it visible and notifies the subscribers. To be called until all [are done](Write::is_done); others may be added
    /// behind them meanwhile.
    ///
    /// If storage has no space for a batch or rejects it, each operation of it, and each group that is to be stored
    /// together, is tried by itself: one that does not fit does not take others along. Of a wildcard delete and of an
    /// expiry all is removed that storage does not refuse, if it [says](PersistError::refused) what it refuses.
    pub fn commit(&self, writes: &mut [impl AsMut<Write>]) {
        let mut writes: Vec<&mut Write> = writes.iter_mut().map(AsMut::as_mut).collect();
        let writes = writes.as_mut_slice();
        // Only after a panic of storage is something planned and neither stored nor refused.
        writes.iter_mut().for_each(|write| _ = write.undo());
        // Ends after the lock of the writer: what is woken then may write, and so may what is dropped.
        let _later = Later::begin();
        let mut writer = match self.lock_writer() {
            Ok(writer) => writer,
            Err(error) => return fail_all(writes, &error),
        };
        let Err(error) = self.store(&mut writer, writes, Extent::Group) else { return };
        let planned: Vec<Option<usize>> = writes.iter_mut().map(|write| write.undo()).collect();
        if writer.poisoned {
            return fail_all(writes, &error);
        }
        let may_fit_alone = matches!(error.kind(), PersistErrorKind::NoSpace | PersistErrorKind::Rejected);
        let is_alone = planned.iter().flatten().count() == 1;
        for (write, planned) in writes.iter_mut().zip(planned) {
            let Some(planned) = planned.filter(|_| !writer.poisoned) else { continue };
            if !may_fit_alone || is_alone && (write.is_together || planned <= write.results.len() + 1) {
                while write.results.len() < planned && !write.is_done() {
                    write.fail(&error);
                }
                continue;
            }
            loop {
                if let Err(error) = self.store(&mut writer, std::slice::from_mut(write), Extent::Unit) {
                    write.undo();
                    write.fail(&error);
                }
                if writer.poisoned
                    || write.is_done()
                    || write.results.len() + usize::from(write.sweep.is_some()) >= planned
                {
                    break;
                }
            }
        }
        if writer.poisoned {
            fail_all(writes, &poisoned(FAILED_EARLIER));
        }
    }

    /// Has storage keep what comes next of `writes`, and publishes it. What one of several backends refuses of a slice is left
    /// out of it.
    fn store(&self, writer: &mut Writer<P>, writes: &mut [&mut Write], extent: Extent) -> Result<(), PersistError> {
        let keyspace = self.shared.read();
        let plan = Plan::of(&keyspace, self.shared.now(), writer.revision, writes, extent);
        let (mut changes, mut hashes) = (plan.changes, plan.hashes);
        drop(keyspace);
        while let Some(last) = changes.last() {
            let revision = last.revision;
            let Err(error) = writer.persist.persist(&changes) else {
                writer.revision = revision;
                self.shared.publish(changes, &hashes, revision);
                break;
            };
            writer.poisoned = error.kind() == PersistErrorKind::Poisoned;
            self.shared.counters.failed_batches.fetch_add(1, Relaxed);
            let refused = error.refused().filter(|refused| !refused.is_empty() && !writer.poisoned);
            let (Some(refused), Some(write)) = (refused, only_slice(writes)) else { return Err(error) };
            let before = changes.len();
            leave_out(&mut changes, refused);
            leave_out(&mut hashes, refused);
            hashes.last_mut().into_iter().for_each(|last| last.ends_group = true);
            if changes.len() == before {
                return Err(error);
            }
            write.leave_out(before - changes.len(), &error);
        }
        writes.iter_mut().for_each(|write| write.keep());
        Ok(())
    }

    /// Closes storage, with its last sync, and says what became of that. Later writes are refused as
    /// [`PersistErrorKind::Rejected`]; reads go on. A store that is dropped without it closes storage too, and no caller
    /// learns whether that failed.
    ///
    /// # Errors
    ///
    /// What [`PersistValue::close`] says, once; another call does nothing.
    pub fn close(&self) -> Result<(), PersistError> {
        // After a panic it is not known in what state storage is, so it is not asked.
        let mut writer = self.writer.lock().map_err(|_| poisoned("storage panicked earlier and was not closed"))?;
        if std::mem::replace(&mut writer.closed, true) { Ok(()) } else { writer.persist.close() }
    }

    pub(crate) fn lock_writer(&self) -> Result<MutexGuard<'_, Writer<P>>, PersistError> {
        let writer = self.lock_storage()?;
        if writer.is_between_epochs {
            let context = "storage began an epoch whose first state was not stored whole: it is to be replaced again";
            return Err(PersistError::new(PersistErrorKind::Io, context));
        }
        Ok(writer)
    }

    /// The writer, if storage can be asked.
    pub(crate) fn lock_storage(&self) -> Result<MutexGuard<'_, Writer<P>>, PersistError> {
        match self.writer.lock() {
            Ok(writer) if writer.closed => {
                Err(PersistError::new(PersistErrorKind::Rejected, "the store is closed and takes no more writes"))
            }
            Ok(writer) if writer.poisoned => Err(poisoned(FAILED_EARLIER)),
            Ok(writer) => Ok(writer),
            Err(_) => Err(poisoned("storage panicked earlier and takes no more writes; restart to recover")),
        }
    }

    /// Has `notifier` notified of every change that `pattern` covers, from now on.
    ///
    /// The first event, given before this returns, says that it [began](crate::EventKind::Began). With `snapshot`, the
    /// notifier then reads the present state of all covered keys when it is ready for it, and is given the changes of what
    /// it has read: none is missing between the two, none comes twice. A subscription of the same `id` and `pattern`, or to
    /// the same key with its branch or without, is replaced, and notified of it first.
    pub fn subscribe(&self, pattern: Pattern, id: SubscriberId, notifier: N, snapshot: bool) -> Arc<Subscription<N>> {
        self.shared.subscribe(pattern, id, notifier, snapshot)
    }

    /// Reads every change from now on as it is committed, in order, with the boundaries of what one caller gave as one; or
    /// every change after `since`, an epoch and a revision that another reader was [to resume from](crate::ChangeGroup::resume).
    /// At most `len_max` bytes of changes wait for it, [`CHANGES_LEN_MAX`](crate::CHANGES_LEN_MAX) usually. While no reader
    /// is there, nothing is kept.
    ///
    /// To copy a store: begin to read, then read the state ([`walk`](Self::walk)), then take the changes up to the revision
    /// that the store was at when the state had been read, each of which the state has already if it has the key at that
    /// revision or a higher one.
    ///
    /// # Errors
    ///
    /// [`Gap`] if `since` is neither the present revision nor one from which on all is still held for another reader.
    pub fn changes(&self, since: Option<(Epoch, Revision)>, len_max: usize) -> Result<Changes, Gap> {
        self.shared.follow(since, len_max)
    }

    /// Ends a subscription and notifies its subscriber; false if there is none.
    pub fn unsubscribe(&self, pattern: &Pattern, id: &SubscriberId) -> bool {
        self.shared.unsubscribe(pattern, |known| known.id() == id)
    }

    /// The subscription that another one of this name and pattern would replace.
    pub fn subscription(&self, pattern: &Pattern, id: &SubscriberId) -> Option<Arc<Subscription<N>>> {
        self.shared.subscription(pattern, id)
    }

    /// Forgets subscriptions whose subscriber has gone, without a last event. One that replaced another meanwhile stays.
    pub fn forget(&self, gone: &[Arc<Subscription<N>>]) {
        self.shared.forget(gone);
    }

    /// Forgets all subscriptions, without a last event: their notifiers are dropped. Readers of
    /// [`changes`](Self::changes) end once they have taken what there is.
    pub fn forget_all(&self) {
        self.shared.forget_all();
    }

    /// The subscriptions that cover `key`.
    pub fn subscribers_of(&self, key: &Key) -> Vec<Arc<Subscription<N>>> {
        self.shared.subscribers_of(key)
    }

    /// How many subscriptions there are: [`Stats::subscriptions`], for the asking.
    pub fn subscriptions(&self) -> u64 {
        self.shared.subscriptions()
    }

    /// How many events were given to subscribers since the store was opened: [`Stats::notified`], for the asking.
    pub fn notified(&self) -> u64 {
        self.shared.counters.notified.load(Relaxed)
    }

    /// The revision up to which the subscribers have been given every change that they cover. What is visible may be newer for a
    /// moment: of many changes they are notified in turns.
    pub fn notified_up_to(&self) -> Revision {
        self.shared.notified_up_to()
    }

    /// How many bytes the changes take that some notifier still has; one that many have counts once. The store keeps the
    /// counter up to date.
    pub fn event_bytes(&self) -> &Arc<AtomicUsize> {
        self.shared.event_bytes()
    }

    /// The epoch of the data.
    pub fn epoch(&self) -> Epoch {
        self.shared.read().epoch()
    }

    /// Figures, roughly of one moment.
    pub fn stats(&self) -> Stats {
        let keyspace = self.shared.read();
        let counters = &self.shared.counters;
        Stats {
            keys: keyspace.len() as u64,
            value_bytes: keyspace.value_bytes() as u64,
            subscriptions: self.subscriptions(),
            revision: keyspace.revision(),
            epoch: keyspace.epoch(),
            puts: counters.puts.load(Relaxed),
            deletes: counters.deletes.load(Relaxed),
            expired: counters.expired.load(Relaxed),
            batches: counters.batches.load(Relaxed),
            failed_batches: counters.failed_batches.load(Relaxed),
            notified: counters.notified.load(Relaxed),
            conflated: counters.conflated.load(Relaxed),
        }
    }
}

fn fail_all(writes: &mut [&mut Write], error: &PersistError) {
    for write in writes {
        while !write.is_done() {
            write.fail(error);
        }
    }
}

/// The write that a plan is for, if it is for a slice of one and nothing else.
fn only_slice<'a>(writes: &'a mut [&mut Write]) -> Option<&'a mut Write> {
    let mut planned = writes.iter_mut().filter(|write| write.is_planned());
    let write = planned.next().filter(|write| write.is_slice())?;
    planned.next().is_none().then_some(write)
}

/// Removes what stands at these positions, which are in order.
fn leave_out<T>(list: &mut Vec<T>, positions: &[usize]) {
    let mut at = 0..;
    list.retain(|_| at.next().is_some_and(|at| positions.binary_search(&at).is_err()));
}

const FAILED_EARLIER: &str = "storage failed earlier and takes no more writes; restart to recover";

fn poisoned(context: &str) -> PersistError {
    PersistError::new(PersistErrorKind::Poisoned, context)
}
