//! Changes that were decided elsewhere: they come with their revisions, and are stored and made visible as they are.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering::Relaxed;

use crate::key::{Key, KeyRef, Pattern};
use crate::keyspace::Keyspace;
use crate::meta::{META_LEN_MAX, Meta};
use crate::notifier::Notifier;
use crate::persist::{Loaded, PersistError, PersistErrorKind, PersistValue};
use crate::plan::Hashed;
use crate::record::{Action, Change, Reason, RecordRef, Timestamp, ValueRef};
use crate::revision::{Epoch, Revision};
use crate::shared::PART_KEYS_MAX;
use crate::store::{NotifyKeyValue, Writer};
use crate::wake::Later;

/// What became of changes that were [applied](NotifyKeyValue::apply).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// How many were stored.
    pub stored: usize,
    /// How many were passed over, as the store was at their revision already.
    pub passed_over: usize,
}

/// A batch of a state that is stored has about this many changes, or bytes of values, and ends behind a revision.
const SLICE_CHANGES: usize = 1_024;
const SLICE_LEN: usize = 4 << 20;

impl<P: PersistValue, N: Notifier> NotifyKeyValue<P, N> {
    /// Does changes that were decided elsewhere, with the revisions that they have there: has storage keep all of them as one
    /// batch, makes them visible at once, and notifies the subscribers in their order.
    ///
    /// Revisions never fall within the batch, and those of one key rise; several keys may have the same one. What is not
    /// above the store's own revision was applied before, and is passed over: so all changes of one revision belong into one
    /// batch. [`Change::replaces`] is found out here, whatever it says. A delete of an absent key is nothing to subscribers;
    /// storage keeps it as a tombstone if it has [meta](Change::meta), and drops the one it has if it has none. Local writes
    /// go on above the highest revision.
    ///
    /// Readers wait until all of the batch is visible, however large it is. That a TTL has ended is decided elsewhere too: do not
    /// [`expire`](Self::expire) what another store will delete.
    ///
    /// # Errors
    ///
    /// [`PersistError`]: none of it was done. [`PersistErrorKind::Rejected`] for revisions that fall, a value of a
    /// [reserved](Key::reserved) key, meta of more than [`META_LEN_MAX`] bytes, and for meta and reserved keys where storage
    /// [keeps none](PersistValue::keeps_meta).
    pub fn apply(&self, mut changes: Vec<Change>) -> Result<Applied, PersistError> {
        // Ends after the lock of the writer: what is woken then may write, and so may what is dropped.
        let _later = Later::begin();
        let mut writer = self.lock_writer()?;
        check_order(&changes)?;
        check_each(&changes, writer.persist.keeps_meta())?;
        let passed_over = changes.partition_point(|change| change.revision <= writer.revision);
        changes.drain(..passed_over);
        self.note_replaced(&mut changes);
        let stored = changes.len();
        self.keep(&mut writer, changes, usize::MAX)?;
        Ok(Applied { stored, passed_over })
    }

    /// Has the store be at a state that was fetched anew, that of `revision` in `epoch`: the puts that left each key as it
    /// is, and deletes whose [meta](Change::meta) tombstones have. Returns how many changes that took.
    ///
    /// Within the present epoch, what differs is done as changes, in the order of their revisions. Keys that the state lacks
    /// are deleted first, at the revision of the first other change. Nothing happens to a key whose value and revision are
    /// the same. Storage and readers take it in slices, so that neither is kept busy for long. Each slice is of whole
    /// revisions, and behind it the store is at the last of them: it has every change up to there, or a newer one of the
    /// same key. So changes from there on, or another state, may follow when it fails half-way or the process ends. The first
    /// slice has all the deletes: it is one batch of storage, but visible in slices too, and
    /// [`Stats::revision`](crate::Stats::revision) rises with the last of them.
    ///
    /// In another epoch, storage [begins it](PersistValue::begin_epoch) and takes the state in slices, in the order of
    /// revisions; readers go on with the state before, until all is stored. Then they have all of the new one at once, and
    /// each subscription [begins anew](crate::BeginCause::Reset), with a snapshot. It takes the memory of both states for a
    /// moment. When it fails half-way, the store takes no writes until a state is stored. After a crash half-way, storage
    /// has what is up to its revision, and changes from there on complete it.
    ///
    /// # Errors
    ///
    /// Those of [`apply`](Self::apply); [`PersistErrorKind::Rejected`] also when the state contradicts what the store has of
    /// the same epoch (it is older, or has something else at a revision that the store is at): then its source has begun
    /// anew, which takes another epoch.
    pub fn replace(&self, mut state: Vec<Change>, revision: Revision, epoch: Epoch) -> Result<u64, PersistError> {
        let _later = Later::begin();
        let mut writer = self.lock_storage()?;
        state.retain(|change| matches!(change.action, Action::Put { .. }) || !change.meta.is_none());
        state.sort_by_key(|change| change.revision);
        check_each(&state, writer.persist.keeps_meta())?;
        check_state(&state, revision)?;
        if epoch == self.epoch() && !writer.is_between_epochs {
            return self.mend(&mut writer, state, revision);
        }
        let count = state.len() as u64;
        let before = self.begin(&mut writer, state, Loaded { epoch, revision })?;
        drop(writer);
        drop(before);
        Ok(count)
    }

    /// Notes that nothing else changed up to a revision: the store is at it from here on, and so is its storage. Readers and
    /// subscribers see nothing of it. A revision that the store is at already is passed over.
    ///
    /// # Errors
    ///
    /// Those of [`apply`](Self::apply).
    pub fn pass(&self, revision: Revision) -> Result<(), PersistError> {
        let _later = Later::begin();
        let mut writer = self.lock_writer()?;
        if revision <= writer.revision {
            return Ok(());
        }
        check_last(revision)?;
        let is_taken = |key: &Key| self.get_stored(key, |_| ()).is_some();
        let mark = mark(revision, writer.persist.keeps_meta(), is_taken);
        self.keep(&mut writer, vec![mark], usize::MAX)
    }

    /// Does what differs between the store and a state of its epoch.
    fn mend(&self, writer: &mut Writer<P>, state: Vec<Change>, revision: Revision) -> Result<u64, PersistError> {
        if revision < writer.revision {
            let context = format!("the state of revision {revision} is older than the store at {}", writer.revision);
            return Err(rejected(context));
        }
        let gone = self.gone(&state);
        let different = self.different(state, writer.revision)?;
        if let Some(key) = gone.first().filter(|_| revision == writer.revision) {
            return Err(contradiction(key, revision));
        }
        // With the first of all: a reader that goes on from any revision behind that has none of these keys.
        let first = different.first().map_or(revision, |change| change.revision);
        let mut changes: Vec<Change> = gone.into_iter().map(|key| delete(key, first)).collect();
        changes.extend(different);
        let count = changes.len() as u64;
        if revision > writer.revision && changes.last().is_none_or(|last| last.revision < revision) {
            let is_taken =
                |key: &Key| self.get_stored(key, |_| ()).is_some() || changes.iter().any(|change| change.key == *key);
            let mark = mark(revision, writer.persist.keeps_meta(), is_taken);
            changes.push(mark);
        }
        self.note_replaced(&mut changes);
        let ends = slice_ends(&changes);
        let mut changes = changes.into_iter();
        for len in ends {
            self.keep(writer, changes.by_ref().take(len).collect(), PART_KEYS_MAX)?;
        }
        Ok(count)
    }

    /// The keys that a state lacks. The caller holds the writer, so that no key comes or goes.
    fn gone(&self, state: &[Change]) -> Vec<Key> {
        let known: HashSet<&str> = state.iter().map(|change| change.key.as_str()).collect();
        let (mut gone, mut after) = (Vec::new(), None::<Key>);
        loop {
            let keyspace = self.shared.read();
            let (mut looks, mut last) = (0, None);
            for record in keyspace.select_stored(&Pattern::All, after.as_ref()).take(PART_KEYS_MAX) {
                (looks, last) = (looks + 1, Some(record.key));
                if !known.contains(&*record.key) {
                    gone.push(record.key.to_key());
                }
            }
            let last = last.map(KeyRef::to_key);
            drop(keyspace);
            if looks < PART_KEYS_MAX {
                return gone;
            }
            after = last;
        }
    }

    /// What of a state the store, which is at `present`, does not have.
    fn different(&self, state: Vec<Change>, present: Revision) -> Result<Vec<Change>, PersistError> {
        let mut different = Vec::new();
        for change in state {
            let Action::Put { value, .. } = &change.action else {
                // What its revision shows to be known is not looked for.
                if change.revision > present {
                    different.push(change);
                } else if self.get_stored(&change.key, |_| ()).is_some() {
                    return Err(contradiction(&change.key, change.revision));
                }
                continue;
            };
            let stored = self.get_stored(&change.key, |record| (record.revision, *record.value == **value));
            match stored {
                Some((revision, true)) if revision == change.revision => {}
                _ if change.revision > present => different.push(change),
                _ => return Err(contradiction(&change.key, change.revision)),
            }
        }
        Ok(different)
    }

    /// Looks at a record, also one whose TTL has ended.
    fn get_stored<R>(&self, key: &Key, look: impl FnOnce(RecordRef<'_>) -> R) -> Option<R> {
        self.shared.read().get(key.as_str(), Timestamp::MIN).map(look)
    }

    /// Has storage begin an epoch and keep a state in it, and makes that visible. Returns the keyspace before.
    fn begin(&self, writer: &mut Writer<P>, mut state: Vec<Change>, whole: Loaded) -> Result<Keyspace, PersistError> {
        let begun = writer.persist.begin_epoch(whole.epoch);
        self.note_failure(writer, begun)?;
        writer.is_between_epochs = true;
        if state.last().map_or(Revision::ZERO, |last| last.revision) < whole.revision {
            let keys: HashSet<&str> = state.iter().map(|change| change.key.as_str()).collect();
            let mark = mark(whole.revision, writer.persist.keeps_meta(), |key| keys.contains(key.as_str()));
            state.push(mark);
        }
        state.iter_mut().for_each(|change| change.replaces = Revision::ZERO);
        let mut keyspace = Keyspace::default();
        let mut rest = state.as_slice();
        for len in slice_ends(&state) {
            let (slice, others) = rest.split_at_checked(len).unwrap_or((rest, &[]));
            rest = others;
            let stored = writer.persist.persist(slice);
            self.note_failure(writer, stored)?;
            for change in slice {
                if let Action::Put { value, expiry } = &change.action {
                    let (key, value) = (change.key.lend(), ValueRef::of(value));
                    keyspace.load(RecordRef { key, value, revision: change.revision, expiry: *expiry });
                }
            }
        }
        keyspace.end_loading(whole);
        writer.is_between_epochs = false;
        writer.revision = whole.revision;
        Ok(self.shared.begin_epoch(keyspace))
    }

    /// Notes in each change which stored revision it replaces.
    fn note_replaced(&self, changes: &mut [Change]) {
        let mut latest: HashMap<Key, Revision> = HashMap::new();
        let is_alone = changes.len() <= 1;
        for part in changes.chunks_mut(PART_KEYS_MAX) {
            let keyspace = self.shared.read();
            for change in part {
                let stored =
                    || keyspace.get(change.key.as_str(), Timestamp::MIN).map_or(Revision::ZERO, |r| r.revision);
                change.replaces = latest.get(&change.key).copied().unwrap_or_else(stored);
                if !is_alone {
                    let left =
                        if matches!(change.action, Action::Put { .. }) { change.revision } else { Revision::ZERO };
                    latest.insert(change.key.clone(), left);
                }
            }
        }
    }

    /// Has storage keep changes as one batch, and publishes them, this many at once.
    fn keep(&self, writer: &mut Writer<P>, changes: Vec<Change>, at_once: usize) -> Result<(), PersistError> {
        let Some(last) = changes.last() else { return Ok(()) };
        let (mut complete, revision) = (writer.revision, last.revision);
        let stored = writer.persist.persist(&changes);
        self.note_failure(writer, stored)?;
        writer.revision = revision;
        let mut changes = changes.into_iter();
        while changes.len() > 0 {
            let some: Vec<Change> = changes.by_ref().take(at_once).collect();
            let keyspace = self.shared.read();
            let hash = |change: &Change| Hashed { hash: keyspace.hash(change.key.as_str()), ends_group: false };
            let mut hashes: Vec<Hashed> = some.iter().map(hash).collect();
            drop(keyspace);
            hashes.last_mut().into_iter().for_each(|last| last.ends_group = true);
            let next = changes.as_slice().first().map_or(revision.next(), |next| next.revision);
            let last = some.iter().rev().map(|change| change.revision).find(|revision| *revision < next);
            complete = last.unwrap_or(complete);
            self.shared.publish(some, &hashes, complete);
        }
        Ok(())
    }

    fn note_failure(&self, writer: &mut Writer<P>, result: Result<(), PersistError>) -> Result<(), PersistError> {
        if let Err(error) = &result {
            writer.poisoned = error.kind() == PersistErrorKind::Poisoned;
            self.shared.counters.failed_batches.fetch_add(1, Relaxed);
        }
        result
    }
}

/// A change of no key, which has storage keep a revision at which nothing else changed.
fn mark(revision: Revision, keeps_meta: bool, is_taken: impl Fn(&Key) -> bool) -> Change {
    let names = (0_u64..).map(|number| format!("revision.{number}"));
    let key = if keeps_meta {
        Some(KeyRef::checked_before(MARK).to_key())
    } else {
        names.map(|name| KeyRef::checked_before(&name).to_key()).find(|key| !is_taken(key))
    };
    delete(key.unwrap_or_else(|| KeyRef::checked_before(MARK).to_key()), revision)
}

fn delete(key: Key, revision: Revision) -> Change {
    let action = Action::Delete { reason: Reason::Deleted };
    Change { key, revision, replaces: Revision::ZERO, action, meta: Meta::NONE }
}

/// A reserved key, of which nothing is ever kept.
const MARK: &str = "..nkv.revision";

/// How many changes each slice has: whole revisions.
fn slice_ends(changes: &[Change]) -> Vec<usize> {
    let (mut slices, mut count, mut len) = (Vec::new(), 0, 0);
    for of_one_revision in changes.chunk_by(|a, b| a.revision == b.revision) {
        count += of_one_revision.len();
        len += of_one_revision.iter().map(|change| change.action.value_len()).sum::<usize>();
        if count >= SLICE_CHANGES || len >= SLICE_LEN {
            slices.push(count);
            (count, len) = (0, 0);
        }
    }
    slices.extend((count > 0).then_some(count));
    slices
}

/// Whether revisions never fall, and rise for each key.
fn check_order(changes: &[Change]) -> Result<(), PersistError> {
    if !changes.is_sorted_by_key(|change| change.revision) {
        return Err(rejected("the revisions of a batch fall"));
    }
    check_last(changes.last().map_or(Revision::ZERO, |last| last.revision))?;
    for of_one_revision in changes.chunk_by(|a, b| a.revision == b.revision).filter(|changes| changes.len() > 1) {
        check_once(of_one_revision)?;
    }
    Ok(())
}

/// A revision behind which there is none would be the last change of the store.
fn check_last(revision: Revision) -> Result<(), PersistError> {
    if revision.next() == Revision::ZERO { Err(rejected("no revision may follow this one")) } else { Ok(()) }
}

fn check_once(changes: &[Change]) -> Result<(), PersistError> {
    let mut known = HashSet::with_capacity(changes.len());
    match changes.iter().find(|change| !known.insert(&change.key)) {
        Some(twice) => Err(rejected(format!("{:?} comes twice at revision {}", twice.key, twice.revision))),
        None => Ok(()),
    }
}

fn check_state(state: &[Change], revision: Revision) -> Result<(), PersistError> {
    check_once(state)?;
    check_last(revision)?;
    let is_outside = |change: &&Change| change.revision == Revision::ZERO || change.revision > revision;
    match state.iter().find(is_outside) {
        Some(change) => {
            let Change { key, revision: own, .. } = change;
            Err(rejected(format!("a state of revision {revision} has {key:?} at {own}")))
        }
        None => Ok(()),
    }
}

/// Whether storage can be given these changes.
fn check_each(changes: &[Change], keeps_meta: bool) -> Result<(), PersistError> {
    for Change { key, action, meta, .. } in changes {
        let is_reserved = key.is_reserved();
        let problem = if is_reserved && matches!(action, Action::Put { .. }) {
            "a reserved key has no value"
        } else if !keeps_meta && (is_reserved || !meta.is_none()) {
            "this storage keeps no meta and no reserved keys"
        } else if meta.as_bytes().is_some_and(|bytes| bytes.len() > META_LEN_MAX) {
            "the meta is too long"
        } else {
            continue;
        };
        return Err(rejected(format!("{key:?}: {problem}")));
    }
    Ok(())
}

fn contradiction(key: &Key, revision: Revision) -> PersistError {
    let context = format!(
        "the state contradicts what the store has of this epoch up to revision {revision}: {key:?}; its source has begun \
         anew, which takes another epoch"
    );
    rejected(context)
}

fn rejected(context: impl Into<String>) -> PersistError {
    PersistError::new(PersistErrorKind::Rejected, context)
}
