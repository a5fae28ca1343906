//! Records by number, in cells.
//!
//! A cell holds one packed record and is a little longer than it. Cells of one length lie side by side in pages, all of
//! them full but the last: when a record goes, the last one of its kind takes its place. So there are no holes, and
//! what is free is given back. The number of a slot says where its cell is, and nothing lies between the two; a record
//! that moves has another number from then on. Records with a long value have pages of their own, with the values beside
//! the cells.

use std::cmp::Ordering;
use std::collections::btree_map::{BTreeMap, Entry};

use bytes::Bytes;

use crate::broken::broken;
use crate::key::{KeyRef, compare};
use crate::packed::Unpacked;
use crate::record::{RecordRef, ValueRef};

/// With what an allocator adds to it, a whole number of the system's pages.
const PAGE_LEN_MAX: usize = (256 << 10) - 16;

/// The number of bits of a slot's number that say which cell of the page it is; the others say which page.
const CELL_BITS: u32 = 12;
const CELLS_MAX: usize = 1 << CELL_BITS;
const PAGES_MAX: usize = 1 << (u32::BITS - CELL_BITS);

/// What is wrong where a slot is looked for in vain.
const NO_RECORD: &str = "a slot has no record";

#[derive(Debug, Default)]
pub(crate) struct Slots {
    pages: Vec<Page>,
    /// The numbers of the pages that were given back. They are empty.
    free: Vec<usize>,
    /// The numbers of the others, by what is in them.
    by_kind: BTreeMap<Kind, Vec<usize>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    cell_len: usize,
    is_long: bool,
}

#[derive(Debug, Default)]
struct Page {
    kind: Kind,
    cells: Vec<u8>,
    /// One for each cell if they are long, none otherwise.
    long: Vec<Bytes>,
}

impl Slots {
    pub(crate) fn len(&self) -> usize {
        self.pages.iter().map(Page::len).sum()
    }

    /// In the order of their numbers. That is the order of adding for those of one kind, if none was removed.
    pub(crate) fn iter(&self) -> impl Iterator<Item = u32> {
        self.pages.iter().enumerate().flat_map(|(number, page)| (0..page.len()).map(move |at| slot_at(number, at)))
    }

    // Of most records a caller wants the key alone: what is not wanted is not read where this is inlined.
    #[inline(always)]
    pub(crate) fn get(&self, slot: u32) -> Unpacked<'_> {
        let (number, at) = place_of(slot);
        let cell = self.pages.get(number).and_then(|page| page.from(at));
        cell.map(Unpacked::of).unwrap_or_else(|| broken(NO_RECORD))
    }

    /// How a slot's key stands to another.
    pub(crate) fn compare(&self, slot: u32, key: &[u8]) -> Ordering {
        compare(self.get(slot).key, key)
    }

    pub(crate) fn lend<'a>(&'a self, slot: u32, key: impl FnOnce(&'a [u8]) -> &'a str) -> RecordRef<'a> {
        let record = self.get(slot);
        let (number, at) = place_of(slot);
        let long = || self.pages.get(number).and_then(|page| page.long.get(at)).map(ValueRef::Shared);
        let value = if record.is_long {
            long().unwrap_or_else(|| broken("a long value is missing"))
        } else {
            ValueRef::Lent(record.value)
        };
        RecordRef { key: KeyRef::in_memory(key(record.key)), value, revision: record.revision, expiry: record.expiry }
    }

    pub(crate) fn add(&mut self, packed: &[u8], long: Option<Bytes>) -> u32 {
        let number = self.page_for(Kind { cell_len: cell_len(packed.len()), is_long: long.is_some() });
        let at = self.pages.get_mut(number).unwrap_or_else(|| broken(NO_RECORD)).push(packed, long);
        slot_at(number, at)
    }

    /// One that has room for another cell.
    fn page_for(&mut self, kind: Kind) -> usize {
        let numbers = self.by_kind.entry(kind).or_default();
        let last = numbers.last().and_then(|last| Some((*last, self.pages.get(*last)?)));
        if let Some((number, _)) = last.filter(|(_, page)| page.has_room()) {
            return number;
        }
        let page = Page::after(last.map(|(_, page)| page), kind);
        let number = self.free.pop().unwrap_or(self.pages.len());
        match self.pages.get_mut(number) {
            Some(free) => *free = page,
            None => self.pages.push(page),
        }
        assert!(number < PAGES_MAX, "short records of more than 200 GiB");
        numbers.push(number);
        number
    }

    /// Whether a record may take the place of another. The cell must be neither too short nor much too long for it: a
    /// value that is now longer, now shorter, stays where it fits when it is longest.
    pub(crate) fn has_room(&self, slot: u32, packed_len: usize, is_long: bool) -> bool {
        let Page { kind, .. } = self.pages.get(place_of(slot).0).unwrap_or_else(|| broken(NO_RECORD));
        let fits = kind.cell_len >= packed_len && kind.cell_len <= cell_len(packed_len + packed_len / 4);
        fits && kind.is_long == is_long
    }

    /// Puts a record in the place of another, which [has room](Self::has_room) for it.
    pub(crate) fn set(&mut self, slot: u32, packed: &[u8], long: Option<Bytes>) {
        let (number, at) = place_of(slot);
        self.pages.get_mut(number).unwrap_or_else(|| broken(NO_RECORD)).set(at, packed, long);
    }

    /// The last record of one kind: that which moves when this one is removed.
    pub(crate) fn last_like(&self, slot: u32) -> u32 {
        let page = self.pages.get(place_of(slot).0);
        let last = page.and_then(|page| self.by_kind.get(&page.kind)?.last());
        let slot = last.and_then(|number| Some(slot_at(*number, self.pages.get(*number)?.len().checked_sub(1)?)));
        slot.unwrap_or_else(|| broken(NO_RECORD))
    }

    /// Removes a record. The one that [`last_like`](Self::last_like) returned has this slot from then on.
    pub(crate) fn remove(&mut self, slot: u32) {
        let last = self.last_like(slot);
        let ((number, at), (last_number, _)) = (place_of(slot), place_of(last));
        let page = self.pages.get_mut(last_number).unwrap_or_else(|| broken(NO_RECORD));
        let (moved, long) = page.pop();
        if page.cells.is_empty() {
            self.give_back(last_number);
        }
        if last != slot
            && let Some(page) = self.pages.get_mut(number)
        {
            page.set(at, &moved, long);
        }
    }

    /// The last page of its kind.
    fn give_back(&mut self, number: usize) {
        let Some(page) = self.pages.get_mut(number) else { return };
        let Page { kind, .. } = std::mem::take(page);
        if let Entry::Occupied(mut numbers) = self.by_kind.entry(kind) {
            numbers.get_mut().pop();
            if numbers.get().is_empty() {
                numbers.remove();
            }
        }
        self.free.push(number);
        if self.by_kind.is_empty() {
            *self = Slots::default();
        }
    }
}

impl Page {
    fn len(&self) -> usize {
        self.cells.len().checked_div(self.kind.cell_len).unwrap_or(0)
    }

    /// A page is somewhat longer than the one before it, so that few records take little and many are in few pages.
    fn after(last: Option<&Page>, kind: Kind) -> Self {
        let cells = last.map_or(0, |page| page.len() + page.len() / 4) + 1;
        let cells_max = CELLS_MAX.min(PAGE_LEN_MAX / kind.cell_len);
        Page { kind, cells: Vec::with_capacity(cells.min(cells_max) * kind.cell_len), long: Vec::new() }
    }

    fn has_room(&self) -> bool {
        let end = self.cells.len() + self.kind.cell_len;
        end <= self.cells.capacity() && end <= CELLS_MAX * self.kind.cell_len
    }

    /// A cell and what follows it: a record knows its length.
    fn from(&self, at: usize) -> Option<&[u8]> {
        self.cells.get(at * self.kind.cell_len..)
    }

    #[inline]
    fn set(&mut self, at: usize, packed: &[u8], long: Option<Bytes>) {
        let cell = self.cells.get_mut(at * self.kind.cell_len..).and_then(|cells| cells.get_mut(..packed.len()));
        cell.unwrap_or_else(|| broken(NO_RECORD)).copy_from_slice(packed);
        self.long.get_mut(at).into_iter().zip(long).for_each(|(known, long)| *known = long);
    }

    /// Says which cell it is.
    fn push(&mut self, packed: &[u8], long: Option<Bytes>) -> usize {
        let at = self.len();
        self.cells.extend_from_slice(packed);
        self.cells.resize((at + 1) * self.kind.cell_len, 0);
        self.long.extend(long);
        at
    }

    fn pop(&mut self) -> (Vec<u8>, Option<Bytes>) {
        (self.cells.split_off(self.cells.len() - self.kind.cell_len), self.long.pop())
    }
}

fn slot_at(number: usize, at: usize) -> u32 {
    (number as u32) << CELL_BITS | at as u32
}

/// The number of its page, and which cell it is there.
fn place_of(slot: u32) -> (usize, usize) {
    ((slot >> CELL_BITS) as usize, slot as usize % CELLS_MAX)
}

/// At most some bytes more than its record, or a sixteenth of it. So there are not many lengths.
fn cell_len(packed_len: usize) -> usize {
    packed_len.next_multiple_of((packed_len.next_power_of_two() / 32).max(4))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::revision::Revision;

    impl Slots {
        /// What its pages take.
        pub(crate) fn room(&self) -> usize {
            self.pages.iter().map(|page| page.cells.capacity()).sum()
        }

        pub(crate) fn long_len(&self) -> usize {
            self.pages.iter().map(|page| page.long.len()).sum()
        }
    }

    fn packed(number: usize, value_len: usize) -> Vec<u8> {
        record(number, value_len, false)
    }

    /// A record with a long value has as many bytes here: they are not read.
    fn record(number: usize, value_len: usize, is_long: bool) -> Vec<u8> {
        let (key, value, revision) = (number.to_string(), vec![number as u8; value_len], Revision::new(1));
        let mut packed = Vec::new();
        Unpacked { key: key.as_bytes(), value: &value, is_long, revision, expiry: None }.pack(&mut packed);
        packed
    }

    fn key(slots: &Slots, slot: u32) -> usize {
        str::from_utf8(slots.get(slot).key).unwrap().parse().unwrap()
    }

    #[test]
    fn a_cell_is_hardly_longer_than_its_record_and_there_are_few_lengths() {
        let lens: std::collections::BTreeSet<usize> = (1..6_000).map(cell_len).collect();
        assert!(lens.len() < 128, "{}", lens.len());
        for len in 1..6_000_usize {
            assert!((len..len + 4.max(len.div_ceil(16))).contains(&cell_len(len)), "{len}: {}", cell_len(len));
        }
    }

    #[test]
    fn few_records_take_little_and_many_little_more_than_their_bytes() {
        for (count, slack) in [(1, 1.0), (10, 1.3), (100, 1.3), (if cfg!(miri) { 300 } else { 40_000 }, 1.25)] {
            let mut slots = Slots::default();
            let record = packed(100_000, 100);
            let all: Vec<u32> = (0..count).map(|_| slots.add(&record, None)).collect();
            let bytes = count * cell_len(record.len());
            assert!(slots.room() as f64 <= bytes as f64 * slack, "{count}: {} for {bytes}", slots.room());
            assert!(slots.iter().eq(all));
        }
    }

    #[test]
    fn a_page_has_no_more_cells_than_there_are_numbers_for_them() {
        let mut slots = Slots::default();
        let count = if cfg!(miri) { 100 } else { 10 * CELLS_MAX };
        let all: Vec<u32> = (0..count).map(|number| slots.add(&packed(number, 0), None)).collect();
        assert!(all.iter().enumerate().all(|(number, slot)| key(&slots, *slot) == number));
        assert!(slots.pages.iter().all(|page| page.len() <= CELLS_MAX));
    }

    #[test]
    fn the_last_record_of_its_kind_takes_the_place_of_one_that_goes() {
        for is_long in [false, true] {
            let mut slots = Slots::default();
            let long = |number: usize| is_long.then(|| Bytes::from(vec![number as u8; 5_000]));
            let add = |slots: &mut Slots, number| slots.add(&record(number, 10, is_long), long(number));
            let all: Vec<u32> = (0..20).map(|number| add(&mut slots, number)).collect();
            let other = slots.add(&packed(20, 100), None);
            assert_eq!(slots.last_like(all[3]), all[19]);
            slots.remove(all[3]);
            assert_eq!((key(&slots, all[3]), key(&slots, other), slots.len()), (19, 20, 20));
            assert_eq!(slots.lend(all[3], |_| "").value.first(), Some(&19));
            assert_eq!(slots.last_like(all[3]), all[18]);
            slots.remove(all[18]);
            slots.remove(all[3]);
            assert_eq!((key(&slots, all[3]), slots.len()), (17, 18));
            assert_eq!(
                (slots.lend(all[3], |_| "").value.first(), slots.long_len()),
                (Some(&17), 17 * usize::from(is_long))
            );
            // A page that was given back is another's.
            slots.remove(other);
            assert_eq!(slots.add(&packed(21, 200), None), other);
        }
    }

    #[test]
    fn long_and_short_records_have_cells_of_their_own() {
        let mut slots = Slots::default();
        let (short, long) = (record(1, 10, false), record(2, 10, true));
        assert_eq!(short.len(), long.len());
        let slot = slots.add(&short, None);
        assert!(slots.has_room(slot, short.len(), false) && !slots.has_room(slot, long.len(), true));
        let other = slots.add(&long, Some(Bytes::from(vec![0; 5_000])));
        assert_ne!(place_of(slot).0, place_of(other).0);
        assert!(slots.has_room(other, long.len(), true) && !slots.has_room(other, short.len(), false));
    }
}
