//! The slots of keys by the hash of the key, in parts.
//!
//! A hash table that grows reads all its keys, and readers and writers wait until it is done. So there are many, and
//! when the keys are too many for them, one is split into two, by one more bit of the hash; when they are few, the last one
//! joins that which it was split from. (This is linear hashing.) The slot of a key, its hash: the table knows neither.

use std::mem;

use hashbrown::HashTable;

use crate::broken::broken;

/// Keys for each part. One that is to be split next has twice as many: with some chance they still fit in 8,192 buckets.
const PART_LEN: usize = 3_400;

/// From this bit on a hash says which part. The parts themselves use the lowest bits, and the highest of the pointer's width.
const PART_AT: u32 = 32;

#[derive(Debug, Default)]
pub(crate) struct Table {
    parts: Vec<HashTable<u32>>,
    /// Of the bits that say which part.
    mask: usize,
    len: usize,
}

impl Table {
    pub(crate) fn with_capacity(len: usize) -> Self {
        let count = len.div_ceil(PART_LEN).next_power_of_two();
        let part_len = if count == 1 { len } else { PART_LEN };
        let parts = (0..count).map(|_| HashTable::with_capacity(part_len)).collect();
        Table { parts, mask: count - 1, len: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn find(&self, hash: u64, is_same: impl Fn(u32) -> bool) -> Option<u32> {
        self.parts.get(self.part_of(hash))?.find(hash, |slot| is_same(*slot)).copied()
    }

    pub(crate) fn find_mut(&mut self, hash: u64, is_same: impl Fn(u32) -> bool) -> Option<&mut u32> {
        let at = self.part_of(hash);
        self.parts.get_mut(at)?.find_mut(hash, |slot| is_same(*slot))
    }

    /// Adds the slot of a key that has none. `hash_of` says the hash of the key of another.
    pub(crate) fn insert(&mut self, hash: u64, slot: u32, hash_of: &dyn Fn(u32) -> u64) {
        if self.len == self.parts.len() * PART_LEN {
            self.split(hash_of);
        }
        self.len += 1;
        self.add(hash, slot, hash_of);
    }

    pub(crate) fn remove(
        &mut self,
        hash: u64,
        is_same: impl Fn(u32) -> bool,
        hash_of: &dyn Fn(u32) -> u64,
    ) -> Option<u32> {
        let at = self.part_of(hash);
        let part = self.parts.get_mut(at)?;
        let (slot, _) = part.find_entry(hash, |slot| is_same(*slot)).ok()?.remove();
        if part.capacity() / 8 > part.len() {
            part.shrink_to(part.len() * 2, |slot| hash_of(*slot));
        }
        self.len -= 1;
        if self.len < self.parts.len().saturating_sub(1) * PART_LEN / 2 {
            let last = self.parts.pop().unwrap_or_default();
            self.mask = self.parts.len().next_power_of_two() - 1;
            last.into_iter().for_each(|slot| self.add(hash_of(slot), slot, hash_of));
        }
        Some(slot)
    }

    fn split(&mut self, hash_of: &dyn Fn(u32) -> u64) {
        let at = self.parts.len();
        self.parts.push(HashTable::new());
        self.mask = self.parts.len().next_power_of_two() - 1;
        // The one whose number lacks the new part's highest bit.
        let from = at.checked_ilog2().map_or(0, |bit| at ^ 1 << bit);
        let slots = self.parts.get_mut(from).map(mem::take).unwrap_or_default();
        for part in [from, at] {
            self.parts.get_mut(part).into_iter().for_each(|part| *part = HashTable::with_capacity(slots.len() / 2));
        }
        slots.into_iter().for_each(|slot| self.add(hash_of(slot), slot, hash_of));
    }

    fn add(&mut self, hash: u64, slot: u32, hash_of: &dyn Fn(u32) -> u64) {
        let at = self.part_of(hash);
        let part = self.parts.get_mut(at).unwrap_or_else(|| broken("a hash has no part"));
        part.insert_unique(hash, slot, |slot| hash_of(*slot));
    }

    fn part_of(&self, hash: u64) -> usize {
        let at = (hash >> PART_AT) as usize & self.mask;
        // This one was not split yet.
        if at < self.parts.len() { at } else { at & self.mask >> 1 }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    impl Table {
        pub(crate) fn capacity(&self) -> usize {
            self.parts.iter().map(HashTable::capacity).sum()
        }
    }

    /// As a good hash of a key would be.
    fn hash_of(slot: u32) -> u64 {
        let mixed = (u64::from(slot) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9)
    }

    fn assert_has(table: &Table, slots: std::ops::Range<u32>) {
        assert!(slots.clone().all(|slot| table.find(hash_of(slot), |known| known == slot) == Some(slot)));
        let (before, behind) = (slots.start.wrapping_sub(1), slots.end);
        assert!([before, behind].iter().all(|slot| table.find(hash_of(*slot), |known| known == *slot).is_none()));
        assert_eq!(table.len(), slots.len());
        assert!(table.capacity() <= 8 * (slots.len() + 1), "{} for {}", table.capacity(), slots.len());
    }

    #[test]
    fn all_are_found_however_many_come_and_go_and_no_one_waits_for_all_of_them() {
        let count = if cfg!(miri) { 8_000 } else { 100_000 };
        let (mut table, read) = (Table::default(), Cell::new(0));
        let hash_of_known = |slot| {
            read.set(read.get() + 1);
            hash_of(slot)
        };
        for slot in 0..count {
            table.insert(hash_of(slot), slot, &hash_of_known);
            assert!(read.replace(0) < 3 * PART_LEN, "at {slot}");
            if slot % 1_000 == 0 {
                assert_has(&table, 0..slot + 1);
            }
        }
        for slot in 0..count {
            assert_eq!(table.remove(hash_of(slot), |known| known == slot, &hash_of_known), Some(slot));
            assert!(read.replace(0) < 3 * PART_LEN, "at {slot}");
            if slot % 1_000 == 0 {
                assert_has(&table, slot + 1..count);
            }
        }
        assert_eq!(table.remove(hash_of(0), |_| true, &hash_of), None);
        assert!(table.capacity() < 8);
    }

    #[test]
    fn one_key_that_comes_and_goes_where_a_part_is_split_does_not_split_it_each_time() {
        let (mut table, read) = (Table::default(), Cell::new(0));
        let hash_of_known = |slot| {
            read.set(read.get() + 1);
            hash_of(slot)
        };
        let count = 2 * PART_LEN as u32;
        (0..count).for_each(|slot| table.insert(hash_of(slot), slot, &hash_of_known));
        read.set(0);
        for _ in 0..10 {
            table.insert(hash_of(count), count, &hash_of_known);
            for slot in [count, count - 1] {
                assert_eq!(table.remove(hash_of(slot), |known| known == slot, &hash_of_known), Some(slot));
            }
            table.insert(hash_of(count - 1), count - 1, &hash_of_known);
        }
        assert!(read.get() < 3 * PART_LEN, "{} in all", read.get());
    }

    #[test]
    fn one_that_is_made_in_its_size_does_not_grow() {
        for len in [0, 1, 100, PART_LEN, PART_LEN + 1, if cfg!(miri) { 0 } else { 100_000 }] {
            let mut table = Table::with_capacity(len);
            let before = table.capacity();
            (0..len as u32).for_each(|slot| table.insert(hash_of(slot), slot, &hash_of));
            assert_has(&table, 0..len as u32);
            assert_eq!((table.capacity(), before <= 5 * len), (before, true), "{len}");
        }
    }
}
