//! The keys and their values: a hash for one key, an order for branches, a second order for expiry.
//!
//! Each record lies packed in a slot of its own, and everything else knows it by the number of the slot. So a key is
//! in memory once, and a usual record costs little more than its bytes. Reading a key and overwriting it cost one hash
//! look-up, whatever the number of keys; only a key that comes or goes touches the orders. A wildcard walks just the
//! keys it returns.

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeSet, BinaryHeap, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::ops::Bound;

use bytes::Bytes;
use hashbrown::HashTable;

use crate::key::{Key, Pattern, compare, first_bytes};
use crate::order::Order;
use crate::packed::Unpacked;
use crate::record::{Action, Change, Expiry, Millis, RecordRef, VALUE_LEN_LONG, ValueRef};
use crate::revision::Revision;

#[derive(Debug, Default)]
pub(crate) struct Keyspace {
    slots: Slots,
    /// The slots by the hash of their keys, which are strangers' texts: the hash has a secret.
    table: HashTable<u32>,
    hasher: RandomState,
    order: Order,
    /// Only keys with a TTL are here.
    expiries: BTreeSet<(Millis, Key)>,
    value_bytes: usize,
    revision: Revision,
    /// Where a record is packed before it is known whether its slot has room for it.
    packed: Vec<u8>,
}

impl Keyspace {
    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    /// Bytes of all values together.
    pub(crate) fn value_bytes(&self) -> usize {
        self.value_bytes
    }

    /// The revision of the newest change applied.
    pub(crate) fn revision(&self) -> Revision {
        self.revision
    }

    pub(crate) fn hash(&self, key: &str) -> u64 {
        self.hasher.hash_one(key)
    }

    pub(crate) fn get<'a>(&'a self, key: &'a str) -> Option<RecordRef<'a>> {
        let slot = self.find(key, self.hash(key))?;
        Some(self.slots.lend(slot, |_| key))
    }

    /// The revision of a key whose hash is known; zero if it is absent.
    pub(crate) fn revision_of(&self, key: &str, hash: u64) -> Revision {
        self.find(key, hash).map_or(Revision::ZERO, |slot| self.slots.get(slot).revision)
    }

    fn find(&self, key: &str, hash: u64) -> Option<u32> {
        self.table.find(hash, |slot| self.slots.get(*slot).key == key.as_bytes()).copied()
    }

    /// The records that `pattern` selects, in key order, after `after`.
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
        self.walk(start, move |key| pattern.selects_text(key))
    }

    /// Every record that a subscription to `pattern` covers, in key order.
    pub(crate) fn covered<'a>(&'a self, pattern: &'a Pattern) -> impl Iterator<Item = RecordRef<'a>> {
        self.walk(first(pattern), move |key| pattern.covers_text(key))
    }

    /// What lies below a key follows it at once, so a walk may start there and end at the first stranger.
    fn walk<'a>(
        &'a self,
        start: Bound<&'a Key>,
        belongs: impl Fn(&str) -> bool + 'a,
    ) -> impl Iterator<Item = RecordRef<'a>> {
        let slots = self.order.iter_from(&|slot| match start {
            Bound::Included(key) => self.slots.compare(slot, key.as_str()).is_lt(),
            Bound::Excluded(key) => self.slots.compare(slot, key.as_str()).is_le(),
            Bound::Unbounded => false,
        });
        // What is packed as a key was a text.
        let records = slots.map(|slot| self.slots.lend(slot, |key| str::from_utf8(key).unwrap_or_default()));
        records.take_while(move |record| belongs(record.key))
    }

    /// Keys whose TTL has ended by `now`.
    pub(crate) fn due(&self, now: Millis) -> impl Iterator<Item = &Key> {
        self.expiries.iter().take_while(move |(at, _)| *at <= now).map(|(_, key)| key)
    }

    pub(crate) fn next_expiry(&self) -> Option<Millis> {
        self.expiries.first().map(|(at, _)| *at)
    }

    /// Takes a record from storage. Nothing has an order until [`end_loading`](Self::end_loading).
    pub(crate) fn load(&mut self, record: RecordRef<'_>) {
        let RecordRef { key, value, revision, expiry } = record;
        let long = (value.len() >= VALUE_LEN_LONG).then(|| value.to_bytes());
        let value = long.as_ref().map_or(ValueRef::Lent(&value), ValueRef::Shared);
        self.put(key, self.hash(key), value, revision, expiry);
    }

    /// Sorting all keys at once takes a fraction of the time that it would take to put each in its place, above all if
    /// few comparisons look at the keys themselves. Slots are filled in the order of loading, which may be that of keys.
    pub(crate) fn end_loading(&mut self, revision: Revision) {
        let slots = 0..self.table.len() as u32;
        let mut sorted: Vec<_> = slots.map(|slot| (first_bytes(self.slots.get(slot).key), slot)).collect();
        let key = |slot| self.slots.get(slot).key;
        sorted.sort_by(|(a, slot_a), (b, slot_b)| a.cmp(b).then_with(|| compare(key(*slot_a), key(*slot_b))));
        self.order = Order::of(sorted.into_iter().map(|(_, slot)| slot));
        self.revision = revision;
    }

    /// Does a change of a key whose hash is known.
    pub(crate) fn apply(&mut self, change: &Change, hash: u64) {
        let Change { key, revision, action, .. } = change;
        match action {
            Action::Put { value, expiry } => {
                if let Some(slot) = self.put(key.as_str(), hash, ValueRef::of(value), *revision, *expiry) {
                    let slots = &self.slots;
                    self.order.insert(slot, |known| slots.compare(known, key.as_str()).is_lt());
                }
            }
            Action::Delete { .. } => self.remove(key.as_str(), hash),
        }
        self.revision = *revision;
    }

    /// Gives the slot if the key is new, and so has no place in the order yet.
    fn put(
        &mut self,
        key: &str,
        hash: u64,
        value: ValueRef<'_>,
        revision: Revision,
        expiry: Option<Expiry>,
    ) -> Option<u32> {
        let (short, long) = match value {
            ValueRef::Lent(bytes) => (bytes, None),
            ValueRef::Shared(value) => (&[][..], Some(value)),
        };
        self.packed.clear();
        Unpacked { key: key.as_bytes(), value: short, is_long: long.is_some(), revision, expiry }
            .pack(&mut self.packed);
        self.value_bytes += value.len();
        if let Some(expiry) = expiry {
            self.expiries.insert((expiry.at, Key::trusted(key)));
        }
        match self.find(key, hash) {
            Some(slot) => {
                self.forget_value(slot, key, expiry);
                self.slots.set(slot, &self.packed, long);
                None
            }
            None => {
                let slot = self.slots.add(&self.packed, long);
                let (slots, hasher) = (&self.slots, &self.hasher);
                self.table.insert_unique(hash, slot, |slot| hash_of(hasher, slots.get(*slot).key));
                Some(slot)
            }
        }
    }

    fn remove(&mut self, key: &str, hash: u64) {
        let slots = &self.slots;
        let Ok(entry) = self.table.find_entry(hash, |slot| slots.get(*slot).key == key.as_bytes()) else {
            return;
        };
        let (slot, _) = entry.remove();
        self.order.remove(|known| slots.compare(known, key).is_lt());
        self.forget_value(slot, key, None);
        self.slots.remove(slot);
        if self.table.capacity() / 8 > self.table.len() {
            let (slots, hasher, len) = (&self.slots, &self.hasher, self.table.len());
            self.table.shrink_to(len * 2, |slot| hash_of(hasher, slots.get(*slot).key));
        }
    }

    /// Before a slot has another value, or none.
    fn forget_value(&mut self, slot: u32, key: &str, next: Option<Expiry>) {
        let old = self.slots.lend(slot, |_| "");
        self.value_bytes -= old.value.len();
        if let Some(at) = old.expiry.map(|e| e.at).filter(|at| Some(*at) != next.map(|e| e.at)) {
            self.expiries.remove(&(at, Key::trusted(key)));
        }
    }
}

/// The same for a packed key as `Keyspace::hash` for its text.
fn hash_of(hasher: &RandomState, key: &[u8]) -> u64 {
    hasher.hash_one(str::from_utf8(key).unwrap_or_default())
}

/// Where the keys of a pattern start.
fn first(pattern: &Pattern) -> Bound<&Key> {
    match pattern {
        Pattern::Key(key) => Bound::Included(key),
        Pattern::Below(key) => Bound::Excluded(key),
        Pattern::All => Bound::Unbounded,
    }
}

/// Records by number. A number that is free is given again, the lowest first, so that the end can be given back.
#[derive(Debug, Default)]
struct Slots {
    /// An empty one is free.
    records: Vec<Box<[u8]>>,
    /// Every free number, and some past the end, which were given back; before the end grows, these are gone from here.
    free: BinaryHeap<Reverse<u32>>,
    long: HashMap<u32, Bytes>,
}

impl Slots {
    fn get(&self, slot: u32) -> Unpacked<'_> {
        self.records.get(slot as usize).map(|record| Unpacked::of(record)).unwrap_or_default()
    }

    /// How a slot's key stands to another.
    fn compare(&self, slot: u32, key: &str) -> Ordering {
        compare(self.get(slot).key, key.as_bytes())
    }

    fn lend<'a>(&'a self, slot: u32, key: impl FnOnce(&'a [u8]) -> &'a str) -> RecordRef<'a> {
        let record = self.get(slot);
        let short = ValueRef::Lent(record.value);
        let value = if record.is_long { self.long.get(&slot).map_or(short, ValueRef::Shared) } else { short };
        RecordRef { key: key(record.key), value, revision: record.revision, expiry: record.expiry }
    }

    fn set(&mut self, slot: u32, packed: &[u8], long: Option<&Bytes>) {
        if let Some(record) = self.records.get_mut(slot as usize) {
            if record.len() == packed.len() {
                record.copy_from_slice(packed);
            } else {
                *record = packed.into();
            }
        }
        match long {
            Some(value) => _ = self.long.insert(slot, value.clone()),
            None if self.long.is_empty() => {}
            None => _ = self.long.remove(&slot),
        }
    }

    fn add(&mut self, packed: &[u8], long: Option<&Bytes>) -> u32 {
        let len = self.records.len();
        let is_there = |slot: &u32| (*slot as usize) < len;
        let lowest = std::iter::from_fn(|| self.free.pop()).map(|Reverse(slot)| slot).find(is_there);
        let slot = lowest.unwrap_or_else(|| {
            self.records.push(Box::default());
            self.records.len() as u32 - 1
        });
        self.set(slot, packed, long);
        slot
    }

    fn remove(&mut self, slot: u32) {
        self.set(slot, &[], None);
        self.free.push(Reverse(slot));
        while self.records.pop_if(|record| record.is_empty()).is_some() {}
        if self.records.capacity() / 4 > self.records.len() {
            self.records.shrink_to(self.records.len() * 2);
            self.free.retain(|Reverse(slot)| (*slot as usize) < self.records.len());
            self.free.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Record;

    fn key(number: u64) -> Key {
        Key::new(&format!("some.branch.of.the.keyspace.k{number:05}")).unwrap()
    }

    fn change(keyspace: &mut Keyspace, key: Key, action: Action) {
        let hash = keyspace.hash(key.as_str());
        let revision = keyspace.revision().next();
        keyspace.apply(&Change { key, revision, replaces: Revision::ZERO, action }, hash);
    }

    fn put(keyspace: &mut Keyspace, key: Key, value: Bytes) {
        change(keyspace, key, Action::Put { value, expiry: None });
    }

    fn delete(keyspace: &mut Keyspace, key: Key) {
        change(keyspace, key, Action::Delete { reason: crate::Reason::Deleted });
    }

    fn numbers(keyspace: &Keyspace) -> Vec<u64> {
        let records = keyspace.select(&Pattern::All, None);
        records.map(|record| record.key.rsplit('k').next().unwrap().parse().unwrap()).collect()
    }

    #[test]
    fn a_value_may_become_long_and_short_again_and_a_long_one_is_shared() {
        let mut keyspace = Keyspace::default();
        for len in [10, VALUE_LEN_LONG - 1, VALUE_LEN_LONG, 3 * VALUE_LEN_LONG, 0, VALUE_LEN_LONG, 7] {
            let value = Bytes::from(vec![len as u8; len]);
            put(&mut keyspace, key(1), value.clone());
            let key = key(1);
            let found = keyspace.get(key.as_str()).unwrap().value;
            assert_eq!((found.to_bytes(), keyspace.value_bytes()), (value.clone(), len));
            let is_shared = matches!(found, ValueRef::Shared(bytes) if bytes.as_ptr() == value.as_ptr());
            assert_eq!(is_shared, len >= VALUE_LEN_LONG, "{len}");
        }
        put(&mut keyspace, key(1), Bytes::from(vec![0; VALUE_LEN_LONG]));
        delete(&mut keyspace, key(1));
        assert_eq!((keyspace.value_bytes(), keyspace.slots.long.len(), keyspace.len()), (0, 0, 0));
    }

    #[test]
    fn what_is_loaded_is_kept_and_a_long_value_that_is_shared_stays_so() {
        let mut keyspace = Keyspace::default();
        let (long, short) = (Bytes::from(vec![7; VALUE_LEN_LONG]), Bytes::from_static(b"short"));
        let values = [ValueRef::Shared(&long), ValueRef::Lent(&long), ValueRef::Shared(&short), ValueRef::Lent(&short)];
        for (number, value) in (1..).zip(values) {
            let (key, expiry) = (key(number), Some(Expiry { at: number, ttl_ms: 9 }));
            keyspace.load(RecordRef { key: key.as_str(), value, revision: Revision::new(number), expiry });
            let found = keyspace.get(key.as_str()).unwrap();
            assert_eq!((&*found.value, found.revision, found.expiry), (&*value, Revision::new(number), expiry));
            let shares = matches!(found.value, ValueRef::Shared(bytes) if bytes.as_ptr() == value.as_ptr());
            assert_eq!((shares, keyspace.slots.long.len()), (number == 1, number.min(2) as usize), "{number}");
        }
        assert_eq!((keyspace.next_expiry(), keyspace.due(4).count()), (Some(1), 4));
    }

    #[test]
    fn what_deleted_keys_took_is_given_back_and_their_slots_are_used_again() {
        let count = if cfg!(miri) { 200 } else { 5_000 };
        let mut keyspace = Keyspace::default();
        (0..count).for_each(|n| put(&mut keyspace, key(n), "x".into()));
        // Every second one goes and comes again, in the places of those that went.
        (0..count).step_by(2).for_each(|n| delete(&mut keyspace, key(n)));
        assert_eq!(numbers(&keyspace), (1..count).step_by(2).collect::<Vec<_>>());
        (0..count).step_by(2).for_each(|n| put(&mut keyspace, key(n), "y".into()));
        assert_eq!(numbers(&keyspace), (0..count).collect::<Vec<_>>());
        assert_eq!(keyspace.slots.records.len() as u64, count);

        (10..count).for_each(|n| delete(&mut keyspace, key(n)));
        assert_eq!(numbers(&keyspace), (0..10).collect::<Vec<_>>());
        let slots = &keyspace.slots;
        let capacities = [slots.records.capacity(), slots.free.capacity(), keyspace.table.capacity()];
        assert!(capacities.iter().all(|capacity| *capacity < count as usize / 10), "{capacities:?}");
        (0..10).for_each(|n| delete(&mut keyspace, key(n)));
        assert_eq!((keyspace.slots.records.len(), keyspace.order.iter_from(&|_| false).count()), (0, 0));
    }

    // The number of a slot that was at the end when it became free is still among the free ones, and is no slot's.
    #[test]
    fn a_slot_is_given_to_one_key_at_a_time() {
        let mut keyspace = Keyspace::default();
        (0..4).for_each(|n| put(&mut keyspace, key(n), "x".into()));
        for _ in 0..2 {
            // The slots of 1, 2 and 3 are free, those of 2 and 3 at the end; then 1 and 2 are taken.
            (1..4).for_each(|n| delete(&mut keyspace, key(n)));
            (1..3).for_each(|n| put(&mut keyspace, key(n), "x".into()));
            delete(&mut keyspace, key(2));
            (2..4).for_each(|n| put(&mut keyspace, key(n), "x".into()));
            assert_eq!(numbers(&keyspace), [0, 1, 2, 3]);
            assert!((0..4).all(|n| keyspace.get(key(n).as_str()).is_some()));
        }
    }

    #[test]
    fn keys_are_in_order_however_they_were_loaded() {
        let mut keyspace = Keyspace::default();
        let count = 2_000;
        for n in (0..count).map(|n| n * 7 % count) {
            let record = Record { key: key(n), value: "x".into(), revision: Revision::new(n + 1), expiry: None };
            keyspace.load(record.lend());
        }
        keyspace.end_loading(Revision::new(count));
        put(&mut keyspace, key(count), "x".into());
        assert_eq!(numbers(&keyspace), (0..=count).collect::<Vec<_>>());
    }
}
