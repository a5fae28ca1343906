//! What writes change, decided before anything is stored. Reads memory only.

use std::collections::BTreeSet;

use bytes::Bytes;
use hashbrown::HashTable;

use crate::key::{Key, KeyRef, Pattern};
use crate::keyspace::{Keyspace, Stored};
use crate::meta::Meta;
use crate::persist::{PersistError, PersistErrorKind};
use crate::record::{Action, Change, Reason, Timestamp};
use crate::revision::Revision;
use crate::write::{Failed, Op, Outcome, Sweep, Write, WriteResult};

/// A batch with this number of changes, or of bytes of values, takes no more writes.
const GROUP_CHANGES_MAX: usize = 4_096;
const GROUP_LEN_MAX: usize = 4 << 20;

/// What one caller wants stored together has no more changes: they become visible under one hold of a lock.
pub(crate) const TOGETHER_CHANGES_MAX: usize = 16_384;

/// How many keys a wildcard delete or an expiry takes at a time, and how many it looks at.
const SLICE_KEYS_MAX: usize = 1_024;
const SLICE_LOOKS_MAX: usize = 8_192;

/// How much of a group goes into one batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// As much as a batch takes.
    Group,
    /// The next operation of the first write that is not done, or all of it if it is to be stored together.
    Unit,
}

/// The changes of one batch, in the order of their revisions.
pub(crate) struct Plan<'a> {
    keyspace: &'a Keyspace,
    now: Timestamp,
    revision: Revision,
    pub(crate) changes: Vec<Change>,
    /// Of the key of each change: a key is hashed once for each operation.
    pub(crate) hashes: Vec<Hashed>,
    /// The latest change of each key that has one, by the hash of the key: what later operations of the batch see.
    /// None is looked for if there is only one operation.
    latest: Option<HashTable<usize>>,
    /// Bytes of values.
    len: usize,
}

/// What is known of a change beside it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hashed {
    /// That of its key.
    pub(crate) hash: u64,
    /// It is the last of those that its caller gave as one.
    pub(crate) ends_group: bool,
}

/// What is known of the key of one operation before the batch.
#[derive(Clone, Copy, Debug, Default)]
struct Lookup {
    hash: u64,
    stored: Stored,
}

/// Why an operation, or all that is to be stored together with it, is refused before anything is stored.
#[derive(Clone, Copy, Debug)]
enum Refusal {
    /// It has too many changes.
    TooLarge,
    /// It puts a reserved key.
    Reserved,
}

impl<'a> Plan<'a> {
    /// Plans what comes next of `writes`, notes in each of them what becomes of its operations if the batch is stored, and
    /// refuses those that are too large.
    pub(crate) fn of(
        keyspace: &'a Keyspace,
        now: Timestamp,
        revision: Revision,
        writes: &mut [&mut Write],
        extent: Extent,
    ) -> Self {
        loop {
            let mut plan = Plan::new(keyspace, now, revision);
            match plan.add_all(writes, extent) {
                Ok(()) => return plan,
                // Very rare: all others are planned once more.
                Err((at, refusal)) => {
                    for (other, write) in writes.iter_mut().enumerate() {
                        write.undo();
                        if other == at {
                            write.fail(&refusal.error());
                        }
                    }
                }
            }
        }
    }

    fn new(keyspace: &'a Keyspace, now: Timestamp, revision: Revision) -> Self {
        Plan { keyspace, now, revision, changes: Vec::new(), hashes: Vec::new(), latest: None, len: 0 }
    }

    fn add_all(&mut self, writes: &mut [&mut Write], extent: Extent) -> Result<(), (usize, Refusal)> {
        let lookups = self.look_up(writes, extent);
        self.changes.reserve(lookups.len());
        self.hashes.reserve(lookups.len());
        let is_alone = lookups.len() <= 1 && writes.iter().filter(|write| !write.is_done()).nth(1).is_none();
        self.latest = (!is_alone).then(|| HashTable::with_capacity(lookups.len()));
        let mut lookups = lookups.as_slice();
        for (at, write) in writes.iter_mut().enumerate() {
            if write.is_done() {
                continue;
            }
            if self.is_full() || (write.is_together && lookups.len() < write.ops.len()) {
                break;
            }
            let (own, others) = lookups.split_at_checked(write.rest().len()).unwrap_or((lookups, &[]));
            lookups = others;
            self.add(write, own, extent).map_err(|error| (at, error))?;
            if extent == Extent::Unit {
                break;
            }
        }
        Ok(())
    }

    /// All keys are looked up before anything else is done: in so short a loop the processor waits for the memory of
    /// several at a time.
    fn look_up(&self, writes: &[&mut Write], extent: Extent) -> Vec<Lookup> {
        let (mut lookups, mut without_key) = (Vec::new(), 0);
        for write in writes.iter().filter(|write| !write.is_done()) {
            let rest = write.rest();
            // A delete of many keys that comes first must not keep a large batch waiting for its end.
            let with_key = lookups.len() - without_key;
            if with_key > 0 && write.is_together && with_key + rest.len() > GROUP_CHANGES_MAX {
                break;
            }
            let max = match extent {
                _ if write.is_together => usize::MAX,
                Extent::Group => GROUP_CHANGES_MAX - lookups.len(),
                Extent::Unit => 1,
            };
            let hash =
                |op| Lookup { hash: key_of(op).map_or(0, |key| self.keyspace.hash(key.as_str())), ..Lookup::default() };
            lookups.extend(rest.iter().take(max).map(hash));
            without_key += rest.iter().take(max).filter(|op| key_of(op).is_none()).count();
            if extent == Extent::Unit || lookups.len() >= GROUP_CHANGES_MAX {
                break;
            }
        }
        let ops = writes.iter().filter(|write| !write.is_done()).flat_map(|write| write.rest());
        for (op, lookup) in ops.zip(&mut lookups) {
            if let Some(key) = key_of(op) {
                lookup.stored = self.keyspace.stored(key.as_str(), lookup.hash, self.now);
            }
        }
        lookups
    }

    /// What was planned up to here is what one caller gave as one.
    fn end_group(&mut self) {
        self.hashes.last_mut().into_iter().for_each(|last| last.ends_group = true);
    }

    fn is_full(&self) -> bool {
        self.changes.len() >= GROUP_CHANGES_MAX || self.len >= GROUP_LEN_MAX
    }

    fn add(&mut self, write: &mut Write, lookups: &[Lookup], extent: Extent) -> Result<(), Refusal> {
        write.note();
        if write.is_expiry {
            self.expire(write);
            self.end_group();
            return Ok(());
        }
        if write.is_together {
            let room = self.changes.len() + TOGETHER_CHANGES_MAX;
            for (op, lookup) in write.ops.iter().zip(lookups) {
                write.results.push(Ok(self.step(op, lookup, room)?));
            }
            self.end_group();
            return if self.changes.len() > room { Err(Refusal::TooLarge) } else { Ok(()) };
        }
        for lookup in lookups {
            let Some(op) = write.ops.get(write.results.len()) else { break };
            match op {
                Op::Delete { pattern, if_revision: None } if pattern.one_key().is_none() => {
                    let Some(result) = self.sweep(pattern, &mut write.sweep) else { break };
                    write.results.push(result);
                }
                op => {
                    let result = self.step(op, lookup, usize::MAX);
                    write.results.push(result.map_err(|refusal| Failed { error: refusal.error(), deleted: 0 }));
                }
            }
            self.end_group();
            if self.is_full() || extent == Extent::Unit {
                break;
            }
        }
        self.end_group();
        Ok(())
    }

    /// What becomes of an operation, whose changes must not bring the plan past `room`.
    fn step(&mut self, op: &Op, lookup: &Lookup, room: usize) -> Result<Outcome, Refusal> {
        let Lookup { hash, stored } = *lookup;
        Ok(match op {
            Op::Put { key, .. } if key.is_reserved() => return Err(Refusal::Reserved),
            Op::Put { key, value, options } => {
                let (present, replaces) = self.present(key, hash, stored);
                if options.if_revision.is_some_and(|expected| expected != present) {
                    return Ok(Outcome::Conflict { revision: present });
                }
                self.len += value.len();
                let action = Action::Put { value: Bytes::clone(value), expiry: options.expiry };
                Outcome::Put { revision: self.change(key.clone(), hash, replaces, action) }
            }
            Op::Delete { pattern: Pattern::Key(key) | Pattern::Exact(key), if_revision } => {
                let (present, replaces) = self.present(key, hash, stored);
                if present == Revision::ZERO {
                    return Ok(Outcome::NotFound);
                }
                if if_revision.is_some_and(|expected| expected != present) {
                    return Ok(Outcome::Conflict { revision: present });
                }
                let action = Action::Delete { reason: Reason::Deleted };
                Outcome::Deleted { count: 1, revision: self.change(key.clone(), hash, replaces, action) }
            }
            Op::Delete { if_revision: Some(_), .. } => Outcome::Conflict { revision: Revision::ZERO },
            Op::Delete { pattern, if_revision: None } => {
                let keys = self.selected(pattern, room.saturating_sub(self.changes.len()))?;
                match self.delete(keys, Reason::Deleted) {
                    (0, _) => Outcome::NotFound,
                    (count, revision) => Outcome::Deleted { count, revision },
                }
            }
        })
    }

    /// At which revision a key is for everyone (zero: absent), and which stored record a change of it replaces. The two
    /// differ where a TTL has ended and storage does not know yet.
    fn present(&self, key: &Key, hash: u64, stored: Stored) -> (Revision, Revision) {
        match self.latest(key, hash) {
            Some(change) => (left_by(change), left_by(change)),
            None if stored.is_due => (Revision::ZERO, stored.revision),
            None => (stored.revision, stored.revision),
        }
    }

    fn latest(&self, key: &Key, hash: u64) -> Option<&Change> {
        let is_of_key = |at: &usize| self.changes.get(*at).is_some_and(|change| change.key == *key);
        self.latest.as_ref()?.find(hash, is_of_key).and_then(|at| self.changes.get(*at))
    }

    /// The keys that a pattern selects, as the operations so far leave them.
    fn selected(&self, pattern: &Pattern, keys_max: usize) -> Result<BTreeSet<Key>, Refusal> {
        let selected = self.keyspace.select(pattern, None, self.now);
        // Each change before it may have removed one of them.
        let looks_max = keys_max.saturating_add(self.changes.len()).saturating_add(1);
        let mut keys: BTreeSet<Key> = selected.take(looks_max).map(|record| record.key.to_key()).collect();
        let latest = self.latest.iter().flatten().filter_map(|at| self.changes.get(*at));
        for change in latest.filter(|change| pattern.selects(&change.key)) {
            if left_by(change) == Revision::ZERO {
                keys.remove(&change.key);
            } else {
                keys.insert(change.key.clone());
            }
        }
        if keys.len() > keys_max { Err(Refusal::TooLarge) } else { Ok(keys) }
    }

    /// The next slice of a wildcard delete, in key order. It deletes what was there when it began and was not written
    /// since. `None` if more is to be done, in another batch.
    fn sweep(&mut self, pattern: &Pattern, progress: &mut Option<Sweep>) -> Option<WriteResult> {
        let has_begun = progress.is_some();
        // What the operations before it left is selected once it is visible.
        if !has_begun && self.changes.iter().any(|change| pattern.selects(&change.key)) {
            return None;
        }
        let keys_max = self.slice_keys_max();
        if keys_max == 0 {
            return None;
        }
        let epoch = self.keyspace.epoch();
        let sweep = progress.get_or_insert_with(|| Sweep::new(self.revision, epoch));
        if sweep.epoch != epoch {
            // What was there when it began is gone.
            return progress.take().map(|sweep| sweep.result());
        }
        let (mut keys, mut looks) = (Vec::new(), 0);
        let mut selected = self.keyspace.select(pattern, sweep.after.as_ref(), self.now);
        let mut last = None;
        let is_done = loop {
            if keys.len() == keys_max || looks == SLICE_LOOKS_MAX {
                break false;
            }
            let Some(record) = selected.next() else { break true };
            looks += 1;
            let key = record.key.to_key();
            let hash = self.keyspace.hash(&record.key);
            if record.revision <= sweep.until && self.latest(&key, hash).is_none() {
                keys.push((key.clone(), hash, record.revision));
            }
            last = Some(key);
        };
        drop(selected);
        sweep.after = last.or(sweep.after.take());
        sweep.count += keys.len() as u64;
        for (key, hash, replaces) in keys {
            sweep.revision = self.change(key, hash, replaces, Action::Delete { reason: Reason::Deleted });
        }
        is_done.then(|| match progress.take() {
            Some(sweep) if sweep.count > 0 || sweep.refusal.is_some() => sweep.result(),
            _ => Ok(Outcome::NotFound),
        })
    }

    /// How many keys a slice has now. Slices take half of a batch at most: other writes are not to wait for them.
    fn slice_keys_max(&self) -> usize {
        SLICE_KEYS_MAX.min((GROUP_CHANGES_MAX / 2).saturating_sub(self.changes.len()))
    }

    /// The next slice of what is due, the earliest first.
    fn expire(&mut self, write: &mut Write) {
        let keys_max = self.slice_keys_max();
        if keys_max == 0 {
            return;
        }
        let sweep = write.sweep.get_or_insert_with(|| Sweep::new(self.revision, self.keyspace.epoch()));
        // What an earlier operation of the batch wrote or removed is not due: its expiry is another.
        let is_untouched = |key: &Key| self.latest(key, self.keyspace.hash(key.as_str())).is_none();
        let due =
            self.keyspace.due(self.now).take(SLICE_LOOKS_MAX + sweep.refused).map(KeyRef::to_key).filter(is_untouched);
        // What was refused is due still, and comes first again.
        let due: Vec<Key> = due.skip(sweep.refused).take(keys_max).collect();
        let is_done = due.len() < keys_max;
        let (count, revision) = self.delete(due, Reason::Expired);
        (sweep.count, sweep.revision) = (sweep.count + count, sweep.revision.max(revision));
        if is_done {
            let result = sweep.result();
            write.results.push(result);
            write.sweep = None;
        }
    }

    fn delete(&mut self, keys: impl IntoIterator<Item = Key>, reason: Reason) -> (u64, Revision) {
        let (mut count, mut revision) = (0, Revision::ZERO);
        for key in keys {
            let hash = self.keyspace.hash(key.as_str());
            let stored = self.keyspace.stored(key.as_str(), hash, self.now);
            let (_, replaces) = self.present(&key, hash, stored);
            revision = self.change(key, hash, replaces, Action::Delete { reason });
            count += 1;
        }
        (count, revision)
    }

    fn change(&mut self, key: Key, hash: u64, replaces: Revision, action: Action) -> Revision {
        self.revision = self.revision.next();
        let (at, changes, hashes) = (self.changes.len(), &self.changes, &self.hashes);
        let is_of_key = |known: &usize| changes.get(*known).is_some_and(|change: &Change| change.key == key);
        let hash_of = |known: &usize| hashes.get(*known).map_or(0, |hashed: &Hashed| hashed.hash);
        if let Some(latest) = &mut self.latest {
            *latest.entry(hash, is_of_key, hash_of).or_insert(at).get_mut() = at;
        }
        self.hashes.push(Hashed { hash, ends_group: false });
        self.changes.push(Change { key, revision: self.revision, replaces, action, meta: Meta::NONE });
        self.revision
    }
}

impl Refusal {
    fn error(self) -> PersistError {
        let context = match self {
            Refusal::TooLarge => {
                format!("a batch that is stored together changes at most {TOGETHER_CHANGES_MAX} keys")
            }
            Refusal::Reserved => "a reserved key has no value".to_owned(),
        };
        PersistError::new(PersistErrorKind::Rejected, context)
    }
}

/// The one key that an operation is about, if it is about one.
fn key_of(op: &Op) -> Option<&Key> {
    match op {
        Op::Put { key, .. } => Some(key),
        Op::Delete { pattern, .. } => pattern.one_key(),
    }
}

/// At which revision a change leaves its key; zero if it is gone.
fn left_by(change: &Change) -> Revision {
    match change.action {
        Action::Put { .. } => change.revision,
        Action::Delete { .. } => Revision::ZERO,
    }
}
