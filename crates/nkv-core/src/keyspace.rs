//! The keys and their values: a hash for one key, an order for branches, a second order for expiry.
//!
//! Each record lies packed in a slot of its own, and everything else knows it by the number of the slot. So a key is
//! in memory once, and a usual record costs little more than its bytes. Reading a key and overwriting it cost one hash
//! look-up, whatever the number of keys; only a key that comes or goes touches the orders. A wildcard walks just the
//! keys it returns.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::ops::Bound;

use bytes::Bytes;

use crate::broken::{broken, text};
use crate::key::{Key, KeyRef, Pattern, first_bytes};
use crate::order::Order;
use crate::packed::Unpacked;
use crate::persist::Loaded;
use crate::record::{Action, Change, Expiry, RecordRef, Timestamp, ValueRef};
use crate::revision::{Epoch, Revision};
use crate::slots::Slots;
use crate::table::Table;

#[derive(Debug, Default)]
pub(crate) struct Keyspace {
    slots: Slots,
    /// The slots by the hash of their keys, which are strangers' texts: the hash has a secret.
    table: Table,
    hasher: RandomState,
    order: Order,
    /// When each value with a TTL ends, and the slot of its key.
    expiries: BTreeSet<(Timestamp, u32)>,
    value_bytes: usize,
    /// Every change up to this one is applied. While several of one revision are, it is the one before.
    revision: Revision,
    epoch: Epoch,
    /// That of the newest change applied.
    newest: Revision,
    /// How many changes were applied since the store was opened: the sequence number of the newest.
    applied: u64,
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

    /// Every change up to this revision is applied.
    pub(crate) fn revision(&self) -> Revision {
        self.revision
    }

    /// Within which revisions may be compared.
    pub(crate) fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The sequence number of the newest change applied.
    pub(crate) fn applied(&self) -> u64 {
        self.applied
    }

    /// Whether changes of a revision are applied of which others are still to come.
    pub(crate) fn is_between(&self) -> bool {
        self.newest > self.revision
    }

    /// Notes that every change up to `revision` is applied.
    pub(crate) fn complete(&mut self, revision: Revision) {
        self.revision = revision;
    }

    /// Takes the place of another keyspace: the changes go on to be counted where that one was.
    pub(crate) fn follow(&mut self, before: &Keyspace) {
        self.applied = before.applied;
    }

    pub(crate) fn hash(&self, key: &str) -> u64 {
        self.hasher.hash_one(key)
    }

    /// The record of a key; a value whose TTL has ended by `now` is absent, whether it was removed already or not.
    pub(crate) fn get<'a>(&'a self, key: &'a str, now: Timestamp) -> Option<RecordRef<'a>> {
        let slot = self.find(key, self.hash(key))?;
        Some(self.slots.lend(slot, |_| key)).filter(|record| !is_due(record.expiry, now))
    }

    /// What is stored of a key whose hash is known.
    pub(crate) fn stored(&self, key: &str, hash: u64, now: Timestamp) -> Stored {
        let Some(slot) = self.find(key, hash) else { return Stored::default() };
        let Unpacked { revision, expiry, .. } = self.slots.get(slot);
        Stored { revision, is_due: is_due(expiry, now) }
    }

    fn find(&self, key: &str, hash: u64) -> Option<u32> {
        self.table.find(hash, |slot| self.slots.get(slot).key == key.as_bytes())
    }

    /// The records that `pattern` selects, in key order, after `after`, without those whose TTL has ended by `now`.
    pub(crate) fn select<'a>(
        &'a self,
        pattern: &'a Pattern,
        after: Option<&'a Key>,
        now: Timestamp,
    ) -> impl Iterator<Item = RecordRef<'a>> {
        self.select_stored(pattern, after).filter(move |record| !is_due(record.expiry, now))
    }

    /// As [`select`](Self::select), also what is only waiting to be removed.
    pub(crate) fn select_stored<'a>(
        &'a self,
        pattern: &'a Pattern,
        after: Option<&'a Key>,
    ) -> impl Iterator<Item = RecordRef<'a>> {
        self.walk(start(pattern, after), move |key| pattern.selects_text(key))
    }

    /// Every record that a subscription to `pattern` covers, in key order, after `after`, also what is only waiting to be
    /// removed.
    pub(crate) fn covered<'a>(
        &'a self,
        pattern: &'a Pattern,
        after: Option<&'a Key>,
    ) -> impl Iterator<Item = RecordRef<'a>> {
        self.walk(start(pattern, after), move |key| pattern.covers_text(key))
    }

    /// What lies below a key follows it at once, so a walk may start there and end at the first stranger.
    fn walk<'a>(
        &'a self,
        start: Bound<&'a Key>,
        belongs: impl Fn(&str) -> bool + 'a,
    ) -> impl Iterator<Item = RecordRef<'a>> {
        let slots = self.order.iter_from(&|slot| match start {
            Bound::Included(key) => self.slots.compare(slot, key.as_str().as_bytes()).is_lt(),
            Bound::Excluded(key) => self.slots.compare(slot, key.as_str().as_bytes()).is_le(),
            Bound::Unbounded => false,
        });
        let records = slots.map(|slot| self.slots.lend(slot, text));
        records.take_while(move |record| belongs(&record.key))
    }

    /// Keys whose TTL has ended by `now`, the earliest first.
    pub(crate) fn due(&self, now: Timestamp) -> impl Iterator<Item = KeyRef<'_>> {
        let slots = self.expiries.iter().take_while(move |(at, _)| *at <= now).map(|(_, slot)| *slot);
        slots.map(|slot| KeyRef::in_memory(text(self.slots.get(slot).key)))
    }

    pub(crate) fn next_expiry(&self) -> Option<Timestamp> {
        self.expiries.first().map(|(at, _)| *at)
    }

    /// The first end of a TTL that comes after `now`.
    pub(crate) fn next_expiry_after(&self, now: Timestamp) -> Option<Timestamp> {
        self.expiries.range((Bound::Excluded((now, u32::MAX)), Bound::Unbounded)).next().map(|(at, _)| *at)
    }

    /// Takes a record from storage. No reader finds it before [`end_loading`](Self::end_loading).
    pub(crate) fn load(&mut self, record: RecordRef<'_>) {
        let long = self.pack(record);
        let slot = self.slots.add(&self.packed, long);
        self.note_expiry(slot, record.expiry);
    }

    /// Now that it is known how many they are, the table is made in its size, and the order by sorting once.
    pub(crate) fn end_loading(&mut self, Loaded { epoch, revision }: Loaded) {
        self.table = Table::with_capacity(self.slots.len());
        let (slots, hasher) = (&self.slots, &self.hasher);
        let mut superseded = Vec::new();
        for slot in slots.iter() {
            let record = slots.get(slot);
            let hash = hash_of(hasher, record.key);
            match self.table.find_mut(hash, |known| slots.get(known).key == record.key) {
                None => self.table.insert(hash, slot, &|slot| hash_of(hasher, slots.get(slot).key)),
                Some(known) if slots.get(*known).revision <= record.revision => {
                    superseded.push(std::mem::replace(known, slot));
                }
                Some(_) => superseded.push(slot),
            }
        }
        // The last first, so that what takes its place is not one of them.
        superseded.sort_unstable();
        superseded.into_iter().rev().for_each(|slot| self.supersede(slot));

        // Few comparisons look at the keys themselves, which lie far from each other.
        let first = |slot| (first_bytes(self.slots.get(slot).key), slot);
        let mut sorted: Vec<_> = self.slots.iter().map(first).collect();
        sorted.sort_by(|(a, slot_a), (b, slot_b)| {
            a.cmp(b).then_with(|| self.slots.compare(*slot_a, self.slots.get(*slot_b).key))
        });
        self.order = Order::of(sorted.into_iter().map(|(_, slot)| slot));
        (self.epoch, self.revision, self.newest) = (epoch, revision, revision);
    }

    /// Removes what storage visited of a key beside the newest.
    fn supersede(&mut self, slot: u32) {
        let key = text(self.slots.get(slot).key);
        debug_assert_ne!(self.find(key, self.hash(key)), Some(slot), "the newest is found");
        self.forget_value(slot);
        self.vacate(slot);
    }

    /// Does a change of a key whose hash is known.
    pub(crate) fn apply(&mut self, change: &Change, hash: u64) {
        let Change { key, revision, action, .. } = change;
        match action {
            Action::Put { value, expiry } => {
                let (key, value, revision, expiry) = (key.lend(), ValueRef::of(value), *revision, *expiry);
                self.put(RecordRef { key, value, revision, expiry }, hash);
            }
            Action::Delete { .. } => self.remove(key.as_str(), hash),
        }
        self.newest = *revision;
        self.applied += 1;
    }

    fn put(&mut self, record: RecordRef<'_>, hash: u64) {
        let key = record.key;
        let long = self.pack(record);
        let Some(slot) = self.find(&key, hash) else {
            let slot = self.slots.add(&self.packed, long);
            let (slots, hasher) = (&self.slots, &self.hasher);
            self.table.insert(hash, slot, &|slot| hash_of(hasher, slots.get(slot).key));
            self.order.insert(slot, |known| slots.compare(known, key.as_bytes()).is_lt());
            self.note_expiry(slot, record.expiry);
            return;
        };
        self.forget_value(slot);
        if self.slots.has_room(slot, self.packed.len(), long.is_some()) {
            self.slots.set(slot, &self.packed, long);
            self.note_expiry(slot, record.expiry);
        } else {
            let other = self.slots.add(&self.packed, long);
            self.renumber(slot, other);
            self.note_expiry(other, record.expiry);
            self.vacate(slot);
        }
    }

    fn note_expiry(&mut self, slot: u32, expiry: Option<Expiry>) {
        if let Some(Expiry { at, .. }) = expiry {
            self.expiries.insert((at, slot));
        }
    }

    /// Packs a record that is to be kept, and counts it. What it gives is a value that lies by itself.
    fn pack(&mut self, record: RecordRef<'_>) -> Option<Bytes> {
        let RecordRef { key, value, revision, expiry } = record;
        self.value_bytes += value.len();
        let long = value.long();
        let value = if long.is_some() { &[][..] } else { &value };
        self.packed.clear();
        Unpacked { key: key.as_bytes(), value, is_long: long.is_some(), revision, expiry }.pack(&mut self.packed);
        long
    }

    fn remove(&mut self, key: &str, hash: u64) {
        let (slots, hasher) = (&self.slots, &self.hasher);
        let is_same = |slot| slots.get(slot).key == key.as_bytes();
        let Some(slot) = self.table.remove(hash, is_same, &|slot| hash_of(hasher, slots.get(slot).key)) else { return };
        self.order.remove(|known| slots.compare(known, key.as_bytes()).is_lt());
        self.forget_value(slot);
        self.vacate(slot);
    }

    /// Frees a slot that is no key's any more.
    fn vacate(&mut self, slot: u32) {
        let last = self.slots.last_like(slot);
        if last != slot {
            self.renumber(last, slot);
            if let Some(Expiry { at, .. }) = self.slots.get(last).expiry
                && self.expiries.remove(&(at, last))
            {
                self.expiries.insert((at, slot));
            }
        }
        self.slots.remove(slot);
    }

    /// The table and the order know a record by another number from now on.
    fn renumber(&mut self, slot: u32, other: u32) {
        let slots = &self.slots;
        let key = slots.get(slot).key;
        let hash = hash_of(&self.hasher, key);
        let known = self.table.find_mut(hash, |known| known == slot);
        *known.unwrap_or_else(|| broken("a key is not in the table")) = other;
        // While records are loaded there is no order yet.
        if !self.order.is_empty() {
            self.order.replace(other, |known| slots.compare(known, key).is_lt());
        }
    }

    /// Before a slot has another value, or none.
    fn forget_value(&mut self, slot: u32) {
        let old = self.slots.lend(slot, |_| "");
        self.value_bytes -= old.value.len();
        if let Some(Expiry { at, .. }) = old.expiry {
            self.expiries.remove(&(at, slot));
        }
    }
}

/// What is stored of a key.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Stored {
    /// Zero if it is absent.
    pub(crate) revision: Revision,
    /// Its TTL has ended: it is absent for everyone, and only waits to be removed.
    pub(crate) is_due: bool,
}

/// Whether a value has ended by `now`.
pub(crate) fn is_due(expiry: Option<Expiry>, now: Timestamp) -> bool {
    expiry.is_some_and(|expiry| expiry.at <= now)
}

/// The same for a packed key as `Keyspace::hash` for its text.
fn hash_of(hasher: &RandomState, key: &[u8]) -> u64 {
    hasher.hash_one(text(key))
}

/// Where the keys of a pattern start, of those after `after`.
fn start<'a>(pattern: &'a Pattern, after: Option<&'a Key>) -> Bound<&'a Key> {
    match (first(pattern), after) {
        (Bound::Included(key), Some(after)) if after < key => Bound::Included(key),
        (Bound::Excluded(key), Some(after)) => Bound::Excluded(key.max(after)),
        (start, None) => start,
        (_, Some(after)) => Bound::Excluded(after),
    }
}

/// Where the keys of a pattern start.
fn first(pattern: &Pattern) -> Bound<&Key> {
    match pattern {
        Pattern::Key(key) | Pattern::Exact(key) => Bound::Included(key),
        Pattern::Below(key) => Bound::Excluded(key),
        Pattern::All => Bound::Unbounded,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::Meta;
    use crate::record::{Record, VALUE_LEN_LONG};

    fn t(millis: u64) -> Timestamp {
        Timestamp::from_millis(millis)
    }

    fn key(number: u64) -> Key {
        Key::new(&format!("some.branch.of.the.keyspace.k{number:05}")).unwrap()
    }

    fn change(keyspace: &mut Keyspace, key: Key, action: Action) {
        let hash = keyspace.hash(key.as_str());
        let revision = keyspace.revision().next();
        keyspace.apply(&Change { key, revision, replaces: Revision::ZERO, action, meta: Meta::NONE }, hash);
        keyspace.complete(revision);
    }

    fn put(keyspace: &mut Keyspace, key: Key, value: Bytes) {
        change(keyspace, key, Action::Put { value, expiry: None });
    }

    fn delete(keyspace: &mut Keyspace, key: Key) {
        change(keyspace, key, Action::Delete { reason: crate::Reason::Deleted });
    }

    fn numbers(keyspace: &Keyspace) -> Vec<u64> {
        let records = keyspace.select(&Pattern::All, None, t(0));
        records.map(|record| record.key.rsplit('k').next().unwrap().parse().unwrap()).collect()
    }

    #[test]
    fn a_value_may_become_long_and_short_again_and_a_long_one_is_shared() {
        let mut keyspace = Keyspace::default();
        for len in [10, VALUE_LEN_LONG - 1, VALUE_LEN_LONG, 3 * VALUE_LEN_LONG, 0, VALUE_LEN_LONG, 7] {
            let value = Bytes::from(vec![len as u8; len]);
            put(&mut keyspace, key(1), value.clone());
            let key = key(1);
            let found = keyspace.get(key.as_str(), t(0)).unwrap().value;
            assert_eq!((found.to_bytes(), keyspace.value_bytes()), (value.clone(), len));
            let is_shared = matches!(found, ValueRef::Shared(bytes) if bytes.as_ptr() == value.as_ptr());
            assert_eq!(is_shared, len >= VALUE_LEN_LONG, "{len}");
        }
        put(&mut keyspace, key(1), Bytes::from(vec![0; VALUE_LEN_LONG]));
        delete(&mut keyspace, key(1));
        assert_eq!((keyspace.value_bytes(), keyspace.slots.long_len(), keyspace.len()), (0, 0, 0));
    }

    #[test]
    fn what_is_loaded_is_kept_and_a_long_value_that_is_shared_stays_so() {
        let mut keyspace = Keyspace::default();
        let (long, short) = (Bytes::from(vec![7; VALUE_LEN_LONG]), Bytes::from_static(b"short"));
        let values = [ValueRef::Shared(&long), ValueRef::Lent(&long), ValueRef::Shared(&short), ValueRef::Lent(&short)];
        let expiry = |number| Some(Expiry { at: t(number), ttl_ms: 9 });
        for (number, value) in (1..).zip(values) {
            let (key, revision) = (key(number), Revision::new(number));
            keyspace.load(RecordRef { key: key.lend(), value, revision, expiry: expiry(number) });
        }
        keyspace.end_loading(Loaded { revision: Revision::new(4), ..Loaded::default() });
        for (number, value) in (1..).zip(values) {
            let key = key(number);
            let found = keyspace.get(key.as_str(), t(0)).unwrap();
            assert_eq!((&*found.value, found.revision, found.expiry), (&*value, Revision::new(number), expiry(number)));
            let shares = matches!(found.value, ValueRef::Shared(bytes) if bytes.as_ptr() == value.as_ptr());
            assert_eq!(shares, number == 1, "{number}");
        }
        assert_eq!(keyspace.slots.long_len(), 2);
        assert_eq!((keyspace.next_expiry(), keyspace.due(t(4)).count()), (Some(t(1)), 4));
        let after = [0, 1, 3, 4].map(|now| keyspace.next_expiry_after(t(now)));
        assert_eq!(after, [Some(t(1)), Some(t(2)), Some(t(4)), None]);
    }

    #[test]
    fn what_deleted_keys_took_is_given_back_and_their_places_are_used_again() {
        let count = if cfg!(miri) { 200 } else { 5_000 };
        let mut keyspace = Keyspace::default();
        (0..count).for_each(|n| put(&mut keyspace, key(n), "x".into()));
        let room = keyspace.slots.room();
        // Every second one goes and comes again, in the places of those that went.
        (0..count).step_by(2).for_each(|n| delete(&mut keyspace, key(n)));
        assert_eq!(numbers(&keyspace), (1..count).step_by(2).collect::<Vec<_>>());
        (0..count).step_by(2).for_each(|n| put(&mut keyspace, key(n), "y".into()));
        assert_eq!(numbers(&keyspace), (0..count).collect::<Vec<_>>());
        assert_eq!(keyspace.slots.room(), room);

        (0..count - 10).for_each(|n| delete(&mut keyspace, key(n)));
        assert_eq!(numbers(&keyspace), (count - 10..count).collect::<Vec<_>>());
        let left = [keyspace.slots.room() / (room / count as usize), keyspace.table.capacity()];
        assert!(left.iter().all(|room| *room < count as usize / 10), "{left:?}");
        (count - 10..count).for_each(|n| delete(&mut keyspace, key(n)));
        assert_eq!((keyspace.slots.room(), keyspace.order.iter_from(&|_| false).count()), (0, 0));
    }

    #[test]
    fn a_value_that_varies_somewhat_stays_where_it_is() {
        let mut keyspace = Keyspace::default();
        (0..9).for_each(|n| put(&mut keyspace, key(n), vec![0; 100].into()));
        let places = |keyspace: &Keyspace| keyspace.order.iter_from(&|_| false).collect::<Vec<_>>();
        let before = places(&keyspace);
        for len in [90, 81, 97, 100] {
            put(&mut keyspace, key(4), vec![1; len].into());
            assert_eq!(places(&keyspace), before, "{len}");
        }
        for len in [50, 110] {
            put(&mut keyspace, key(4), vec![1; len].into());
            assert_ne!(places(&keyspace), before, "{len}");
            assert_eq!(numbers(&keyspace), (0..9).collect::<Vec<_>>());
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
        keyspace.end_loading(Loaded { revision: Revision::new(count), ..Loaded::default() });
        put(&mut keyspace, key(count), "x".into());
        assert_eq!(numbers(&keyspace), (0..=count).collect::<Vec<_>>());
    }

    /// Lengths of values on both sides of whatever decides where they lie.
    const LENS: [usize; 9] = [0, 3, 60, 70, 75, 300, 1_000, VALUE_LEN_LONG - 1, VALUE_LEN_LONG];

    #[derive(Clone, Debug)]
    enum Step {
        Put {
            number: u64,
            len: usize,
            ttl: Option<u64>,
        },
        Delete {
            number: u64,
        },
        /// With this many older records of each key, before or behind the newest.
        Reload {
            older: u64,
            newest_first: bool,
        },
    }

    fn step() -> impl Strategy<Value = Step> {
        let (number, len) = (0_u64..24, prop::sample::select(LENS.to_vec()));
        prop_oneof![
            20 => (number.clone(), len, prop::option::weighted(0.2, 1_u64..9))
                .prop_map(|(number, len, ttl)| Step::Put { number, len, ttl }),
            10 => number.prop_map(|number| Step::Delete { number }),
            1 => (0_u64..4, any::<bool>()).prop_map(|(older, newest_first)| Step::Reload { older, newest_first }),
        ]
    }

    fn reloaded(model: &BTreeMap<Key, Record>, revision: Revision, older: u64, newest_first: bool) -> Keyspace {
        let of_key = |record: &Record| {
            let older = (1..=older.min(record.revision.get() - 1)).map(|age| Record {
                revision: Revision::new(record.revision.get() - age),
                value: vec![age as u8; LENS[age as usize]].into(),
                expiry: (age % 2 == 0).then_some(Expiry { at: t(age), ttl_ms: 1 }),
                ..record.clone()
            });
            let mut all: Vec<Record> = [record.clone()].into_iter().chain(older).collect();
            if !newest_first {
                all.reverse();
            }
            all
        };
        let mut keyspace = Keyspace::default();
        let records: Vec<Vec<Record>> = model.values().map(of_key).collect();
        // Those of one key do not come one after the other.
        for at in 0..=older as usize {
            records.iter().filter_map(|all| all.get(at)).for_each(|record| keyspace.load(record.lend()));
        }
        keyspace.end_loading(Loaded { revision, ..Loaded::default() });
        keyspace
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases()) })]

        #[test]
        fn whatever_comes_goes_and_changes_its_length_is_found_and_takes_no_more_than_it_needs(
            steps in prop::collection::vec(step(), 1..150)
        ) {
            let mut keyspace = Keyspace::default();
            let mut model = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Put { number, len, ttl } => {
                        let (key, value) = (key(number), Bytes::from(vec![number as u8; len]));
                        let expiry = ttl.map(|ttl| Expiry { at: t(ttl), ttl_ms: ttl });
                        change(&mut keyspace, key.clone(), Action::Put { value: value.clone(), expiry });
                        model.insert(key.clone(), Record { key, value, revision: keyspace.revision(), expiry });
                    }
                    Step::Delete { number } => {
                        delete(&mut keyspace, key(number));
                        model.remove(&key(number));
                    }
                    Step::Reload { older, newest_first } => {
                        keyspace = reloaded(&model, keyspace.revision(), older, newest_first);
                    }
                }
                let all: Vec<Record> = model.values().cloned().collect();
                let found: Vec<Record> = keyspace.select(&Pattern::All, None, t(0)).map(RecordRef::to_record).collect();
                prop_assert_eq!(&found, &all);
                prop_assert!(all.iter().all(|r| keyspace.get(r.key.as_str(), t(0)).map(RecordRef::to_record).as_ref() == Some(r)));
                let is_long = |record: &&Record| record.value.len() >= VALUE_LEN_LONG;
                let expected = (all.len(), all.len(), all.iter().filter(is_long).count());
                prop_assert_eq!((keyspace.len(), keyspace.slots.len(), keyspace.slots.long_len()), expected);
                prop_assert_eq!(keyspace.value_bytes(), all.iter().map(|record| record.value.len()).sum::<usize>());
                let next = all.iter().filter_map(|record| record.expiry).map(|expiry| expiry.at).min();
                prop_assert_eq!(keyspace.next_expiry(), next);
                prop_assert_eq!(keyspace.expiries.len(), all.iter().filter(|record| record.expiry.is_some()).count());
            }
        }
    }

    fn cases() -> u32 {
        std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(200)
    }
}
