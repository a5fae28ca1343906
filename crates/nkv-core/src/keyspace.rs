//! The keys and their values: a hash for one key, an order for branches, a second order for expiry.
//!
//! Reading a key and overwriting it cost one hash look-up, whatever the number of keys; only a key that comes or goes
//! touches the orders. A wildcard walks just the keys it returns.

use std::collections::{BTreeSet, HashMap};
use std::ops::Bound;

use bytes::Bytes;

use crate::key::{Key, Pattern};
use crate::record::{Action, Change, Expiry, Millis, Record, RecordRef, ValueRef};
use crate::revision::Revision;

#[derive(Debug, Default)]
pub(crate) struct Keyspace {
    entries: HashMap<Key, Entry>,
    order: BTreeSet<Key>,
    /// Only keys with a TTL are here.
    expiries: BTreeSet<(Millis, Key)>,
    value_bytes: usize,
    revision: Revision,
}

#[derive(Debug)]
struct Entry {
    value: Bytes,
    revision: Revision,
    expiry: Option<Expiry>,
}

impl Entry {
    fn lend<'a>(&'a self, key: &'a Key) -> RecordRef<'a> {
        let value = ValueRef::Shared(&self.value);
        RecordRef { key: key.as_str(), value, revision: self.revision, expiry: self.expiry }
    }
}

impl Keyspace {
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Bytes of all values together.
    pub(crate) fn value_bytes(&self) -> usize {
        self.value_bytes
    }

    /// The revision of the newest change applied.
    pub(crate) fn revision(&self) -> Revision {
        self.revision
    }

    pub(crate) fn set_revision(&mut self, revision: Revision) {
        self.revision = revision;
    }

    pub(crate) fn get(&self, key: &str) -> Option<RecordRef<'_>> {
        self.entries.get_key_value(&Key::trusted(key)).map(|(key, entry)| entry.lend(key))
    }

    /// The keys that `pattern` selects, in key order, after `after`.
    pub(crate) fn select<'a>(
        &'a self,
        pattern: &'a Pattern,
        after: Option<&'a Key>,
    ) -> impl Iterator<Item = RecordRef<'a>> {
        let start = match (first(pattern), after) {
            (Bound::Included(key), Some(after)) if after < key => Bound::Included(key),
            (Bound::Excluded(key), Some(after)) => Bound::Excluded(key.max(after)),
            (start, None) => start,
            (_, Some(after)) => Bound::Excluded(after),
        };
        self.walk(start, move |key| pattern.selects(key))
    }

    /// Every key that a subscription to `pattern` covers, in key order.
    pub(crate) fn covered<'a>(&'a self, pattern: &'a Pattern) -> impl Iterator<Item = RecordRef<'a>> {
        self.walk(first(pattern), move |key| pattern.covers(key))
    }

    /// What lies below a key follows it at once, so a walk may start there and end at the first stranger.
    fn walk<'a>(
        &'a self,
        start: Bound<&'a Key>,
        belongs: impl Fn(&Key) -> bool + 'a,
    ) -> impl Iterator<Item = RecordRef<'a>> {
        let keys = self.order.range::<Key, _>((start, Bound::Unbounded)).take_while(move |key| belongs(key));
        keys.filter_map(|key| Some(self.entries.get(key)?.lend(key)))
    }

    /// Keys whose TTL has ended by `now`.
    pub(crate) fn due(&self, now: Millis) -> impl Iterator<Item = &Key> {
        self.expiries.iter().take_while(move |(at, _)| *at <= now).map(|(_, key)| key)
    }

    pub(crate) fn next_expiry(&self) -> Option<Millis> {
        self.expiries.first().map(|(at, _)| *at)
    }

    pub(crate) fn apply(&mut self, change: &Change) {
        match &change.action {
            Action::Put { value, expiry } => self.insert(Record {
                key: change.key.clone(),
                value: value.clone(),
                revision: change.revision,
                expiry: *expiry,
            }),
            Action::Delete { .. } => self.remove(&change.key),
        }
        self.revision = change.revision;
    }

    pub(crate) fn insert(&mut self, record: Record) {
        let Record { key, value, revision, expiry } = record;
        if let Some(expiry) = expiry {
            self.expiries.insert((expiry.at, key.clone()));
        }
        self.value_bytes += value.len();
        let entry = Entry { value, revision, expiry };
        match self.entries.get_mut(&key) {
            Some(known) => {
                let old = std::mem::replace(known, entry);
                self.value_bytes -= old.value.len();
                if let Some(at) = old.expiry.map(|e| e.at).filter(|at| Some(*at) != expiry.map(|e| e.at)) {
                    self.expiries.remove(&(at, key));
                }
            }
            None => {
                self.order.insert(key.clone());
                self.entries.insert(key, entry);
            }
        }
    }

    fn remove(&mut self, key: &Key) {
        if let Some(old) = self.entries.remove(key) {
            self.order.remove(key);
            self.value_bytes -= old.value.len();
            if let Some(expiry) = old.expiry {
                self.expiries.remove(&(expiry.at, key.clone()));
            }
        }
    }
}

/// Where the keys of a pattern start.
fn first(pattern: &Pattern) -> Bound<&Key> {
    match pattern {
        Pattern::Key(key) => Bound::Included(key),
        Pattern::Below(key) => Bound::Excluded(key),
        Pattern::All => Bound::Unbounded,
    }
}
