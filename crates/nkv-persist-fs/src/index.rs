//! Where the value of each key stands, and how much of each segment is still needed.
//!
//! The one idea: a record is known by its revision, which no other has. Each change names the revision that it replaces,
//! also in the log, so keys are not needed to know what counts: 16 bytes for each value. The few for which that does not hold
//! are known by their keys: tombstones, which no change names, and all but the first of several changes of one revision.

use std::collections::{HashMap, VecDeque};

use hashbrown::HashTable;
use nkv_core::{PersistError, PersistErrorKind, Revision};

use crate::format::{Id, SEGMENT_HEADER_LEN, SegmentHeader};

/// How far apart the ends of a log may be: the index does not distinguish more positions.
pub(crate) const SPAN_MAX: u64 = 1 << POSITION_BITS;
const POSITION_BITS: u32 = 46;
const LEN_BITS: u32 = u64::BITS - POSITION_BITS;
/// Stands for every length that is not below it.
const LONG: u64 = (1 << LEN_BITS) - 1;

/// Where in the log the frame of a record starts, and how long the record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) position: u64,
    pub(crate) len: u32,
}

/// An index with one value for this number of bytes of a segment, or fewer, is looked through in a fraction of the time
/// that the segment takes to be read.
const FRAMES_SHARE: u64 = 256;
/// The log cannot be used while the index is looked through: with more values that would take more than a millisecond.
const FRAMES_MAX: u64 = 64 << 10;

/// What is known of a segment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    number: u64,
    base: u64,
    pub(crate) bytes: u64,
    /// How many of them are records that the index points to.
    pub(crate) live: u64,
}

/// The low bits of a position, and behind them a length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Packed(u64);

impl Packed {
    fn new(place: Place) -> Self {
        Packed(place.position << LEN_BITS | u64::from(place.len).min(LONG))
    }

    /// Whether it has the bits of this position, which must be in the log.
    fn is_at(self, position: u64) -> bool {
        self.0 >> LEN_BITS == position & SPAN_MAX.wrapping_sub(1)
    }

    /// The last position before the `end` of the log that has these bits.
    fn position(self, end: u64) -> u64 {
        let position = end & !(SPAN_MAX.wrapping_sub(1)) | self.0 >> LEN_BITS;
        if position > end { position.wrapping_sub(SPAN_MAX) } else { position }
    }
}

/// A record that is known by its key.
#[derive(Clone, Copy, Debug)]
struct Keyed {
    revision: Revision,
    place: Place,
    is_tombstone: bool,
}

/// The place of each value.
#[derive(Debug, Default)]
pub(crate) struct Index {
    places: HashTable<(Revision, Packed)>,
    /// The lengths of the few records that are too long to have theirs beside the position.
    long: HashMap<Revision, u32>,
    keyed: HashMap<Box<str>, Keyed>,
    /// How many of those are tombstones.
    tombstones: usize,
    /// In order, without gaps.
    segments: VecDeque<Usage>,
    live_bytes: u64,
    total_bytes: u64,
    /// The number of values that are expected in all: room for them is not given back.
    expected: usize,
    /// What it has found to be impossible, if it has: then none of its sums can be trusted.
    broken: Option<&'static str>,
}

impl Index {
    /// Makes room for `more` values at once, if there is that much memory. What was read so far may mislead, so it is
    /// room for a few times as many as there are at most.
    pub(crate) fn expect(&mut self, more: usize) {
        let more = more.min(self.places.len().saturating_mul(4));
        self.expected = self.places.len().saturating_add(more);
        if self.places.try_reserve(more, |(revision, _)| hash(*revision)).is_err() {
            tracing::debug!(more, "no room yet for all values of the log that are expected");
        }
    }

    /// Gives back the room that was expected to be needed and is not.
    pub(crate) fn fit(&mut self) {
        self.expected = 0;
        self.places.shrink_to_fit(|(revision, _)| hash(*revision));
    }

    /// Notes a record that has become the value of its key.
    pub(crate) fn insert(&mut self, revision: Revision, place: Place) {
        if u64::from(place.len) >= LONG {
            self.long.insert(revision, place.len);
        }
        let slot = (revision, Packed::new(place));
        self.places.insert_unique(hash(revision), slot, |(revision, _)| hash(*revision));
        self.count_live(place, true);
    }

    /// Forgets a record that is not the value of its key any more; says whether it was. Zero is none.
    pub(crate) fn remove(&mut self, revision: Revision) -> bool {
        if revision == Revision::ZERO {
            return false;
        }
        let found = self.places.find_entry(hash(revision), |slot| slot.0 == revision);
        let Ok(entry) = found else { return false };
        let ((_, packed), _) = entry.remove();
        let (position, len) = (packed.position(self.end()), packed.0 & LONG);
        let len = if len == LONG { self.long.remove(&revision) } else { Some(len as u32) };
        match len {
            Some(len) => self.count_live(Place { position, len }, false),
            None => self.give_up("the length of a long record is not known"),
        }
        if self.places.capacity() / 8 > self.places.len().max(self.expected) {
            self.places.shrink_to(self.places.len().saturating_mul(2), |(revision, _)| hash(*revision));
        }
        true
    }

    /// Notes a record that has become what counts of its key, and is known by that.
    pub(crate) fn insert_keyed(&mut self, key: &str, revision: Revision, place: Place, is_tombstone: bool) {
        self.remove_keyed(key);
        self.keyed.insert(key.into(), Keyed { revision, place, is_tombstone });
        self.tombstones = self.tombstones.saturating_add(usize::from(is_tombstone));
        self.count_live(place, true);
    }

    /// Forgets the record that is known by this key, if there is one.
    pub(crate) fn remove_keyed(&mut self, key: &str) {
        if self.keyed.is_empty() {
            return;
        }
        let Some(Keyed { place, is_tombstone, .. }) = self.keyed.remove(key) else { return };
        self.tombstones = self.tombstones.saturating_sub(usize::from(is_tombstone));
        self.count_live(place, false);
        if self.keyed.capacity() / 8 > self.keyed.len() {
            self.keyed.shrink_to(self.keyed.len().saturating_mul(2));
        }
    }

    /// The revision of the record that is known by this key.
    pub(crate) fn keyed_revision(&self, key: &str) -> Option<Revision> {
        self.keyed.get(key).map(|keyed| keyed.revision)
    }

    /// Notes that a record stands elsewhere now.
    pub(crate) fn move_to(&mut self, id: Id<'_>, place: Place) {
        match id {
            Id::Revision(revision) if self.remove(revision) => self.insert(revision, place),
            Id::Key(key, revision) if self.keyed_revision(key) == Some(revision) => {
                let is_tombstone = self.keyed.get(key).is_some_and(|keyed| keyed.is_tombstone);
                self.insert_keyed(key, revision, place, is_tombstone);
            }
            _ => self.give_up("a copy was made of what does not count"),
        }
    }

    /// Whether some value is known by this revision.
    pub(crate) fn contains(&self, revision: Revision) -> bool {
        self.find(revision).is_some()
    }

    /// Whether this record, in the frame at this position, is what counts of its key.
    pub(crate) fn is_live(&self, id: Id<'_>, position: u64) -> bool {
        match id {
            Id::Revision(revision) => self.find(revision).is_some_and(|packed| packed.is_at(position)),
            Id::Key(key, revision) => {
                let is_it = |keyed: &Keyed| keyed.revision == revision && keyed.place.position == position;
                self.keyed.get(key).is_some_and(is_it)
            }
        }
    }

    fn find(&self, revision: Revision) -> Option<Packed> {
        self.places.find(hash(revision), |slot| slot.0 == revision).map(|slot| slot.1)
    }

    /// Where the frames of a segment start that hold values, in order. None if the index is so large that to look through
    /// it is no less work than to read the segment.
    pub(crate) fn frames_of(&self, segment: u64) -> Option<Vec<u64>> {
        let (usage, end) = (self.find_usage(segment)?, self.end());
        if self.places.len().saturating_add(self.keyed.len()) as u64 > (usage.bytes / FRAMES_SHARE).min(FRAMES_MAX) {
            return None;
        }
        let positions = self.places.iter().map(|(_, packed)| packed.position(end));
        let positions = positions.chain(self.keyed.values().map(|keyed| keyed.place.position));
        let next = usage.base.saturating_add(usage.bytes.saturating_sub(SEGMENT_HEADER_LEN));
        let is_here = |position: &u64| *position >= usage.base && *position < next;
        let mut frames: Vec<u64> = positions.filter(is_here).collect();
        frames.sort_unstable();
        frames.dedup();
        Some(frames)
    }

    /// Where the newest segment ends: no position is beyond.
    fn end(&self) -> u64 {
        self.segments.back().map_or(0, |last| last.base.saturating_add(last.bytes))
    }

    /// How far apart the ends of the log are.
    pub(crate) fn span(&self) -> u64 {
        self.end().saturating_sub(self.segments.front().map_or(0, |first| first.base))
    }

    fn count_live(&mut self, place: Place, live: bool) {
        let behind = self.segments.partition_point(|segment| segment.base <= place.position);
        let Some(usage) = behind.checked_sub(1).and_then(|at| self.segments.get_mut(at)) else {
            return self.give_up("a record stands before the first segment");
        };
        let count = if live { u64::checked_add } else { u64::checked_sub };
        let sums = [usage.live, self.live_bytes].map(|sum| count(sum, u64::from(place.len)));
        let [Some(in_segment), Some(in_all)] = sums else {
            return self.give_up("a segment holds less than what is taken from it");
        };
        (usage.live, self.live_bytes) = (in_segment, in_all);
    }

    /// Notes that what it holds contradicts itself, which only a fault of this program can bring about.
    fn give_up(&mut self, why: &'static str) {
        self.broken.get_or_insert(why);
    }

    /// Fails for ever once the index has contradicted itself.
    pub(crate) fn check(&self) -> Result<(), PersistError> {
        self.broken.map_or(Ok(()), |why| Err(broken(why)))
    }

    /// Notes that the newest segment, which may be a new one, has this many bytes.
    pub(crate) fn set_bytes(&mut self, header: &SegmentHeader, bytes: u64) {
        let SegmentHeader { number, base, .. } = *header;
        match self.segments.back_mut() {
            Some(last) if last.number == number => {
                self.total_bytes = self.total_bytes.saturating_sub(last.bytes).saturating_add(bytes);
                last.bytes = bytes;
            }
            _ => {
                self.total_bytes = self.total_bytes.saturating_add(bytes);
                self.segments.push_back(Usage { number, base, bytes, live: 0 });
            }
        }
    }

    /// Forgets the oldest segment, which holds no value any more.
    pub(crate) fn drop_oldest_segment(&mut self) {
        match self.segments.pop_front() {
            Some(Usage { bytes, live: 0, .. }) => self.total_bytes = self.total_bytes.saturating_sub(bytes),
            Some(_) => self.give_up("a segment goes that holds values"),
            None => self.give_up("a segment goes that is not there"),
        }
    }

    /// What is known of a segment, which must be one of the log.
    pub(crate) fn usage(&self, segment: u64) -> Result<Usage, PersistError> {
        self.find_usage(segment).ok_or_else(|| broken("a segment of the log is not known"))
    }

    /// How many bytes of a segment are needed; none of one that is not there any more.
    pub(crate) fn live_in(&self, segment: u64) -> u64 {
        self.find_usage(segment).map_or(0, |usage| usage.live)
    }

    fn find_usage(&self, segment: u64) -> Option<Usage> {
        let at = segment.checked_sub(self.segments.front()?.number)?;
        self.segments.get(usize::try_from(at).ok()?).copied()
    }

    /// The segment that holds most of what is needed.
    pub(crate) fn fullest_segment(&self) -> u64 {
        self.segments.iter().max_by_key(|segment| segment.live).map_or(0, |segment| segment.number)
    }

    pub(crate) fn segments(&self) -> impl Iterator<Item = u64> {
        self.segments.iter().map(|segment| segment.number)
    }

    pub(crate) fn segment_count(&self) -> usize {
        self.segments.len()
    }

    /// How many keys have a value.
    pub(crate) fn key_count(&self) -> usize {
        self.places.len().saturating_add(self.keyed.len()).saturating_sub(self.tombstones)
    }

    pub(crate) fn tombstone_count(&self) -> usize {
        self.tombstones
    }

    /// The sum of the records that the index points to.
    pub(crate) fn live_bytes(&self) -> u64 {
        self.live_bytes
    }

    /// The sum of the segments, without the zeros ahead.
    pub(crate) fn total_bytes(&self) -> u64 {
        self.total_bytes
    }
}

fn broken(why: &str) -> PersistError {
    let context = format!("the index of the log contradicts itself: {why}");
    PersistError::new(PersistErrorKind::Poisoned, context)
}

/// Revisions are not chosen so that they collide: the store counts. Sixteen that follow each other stay together, as in
/// the log: a reader of one after the other finds most of their slots in the cache.
fn hash(revision: Revision) -> u64 {
    let revision = revision.get();
    let slot = spread(revision >> 4) << 4 | revision & 0xf;
    // A table takes the slot from the low bits, and from the highest what distinguishes its neighbours.
    slot & (u64::MAX >> 7) | spread(revision) & !(u64::MAX >> 7)
}

/// Fibonacci hashing.
fn spread(number: u64) -> u64 {
    let hash = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    hash ^ hash >> 32
}

#[cfg(test)]
mod tests {
    use nkv_core::Epoch;

    use super::*;

    /// An index of one segment, which starts at `base`.
    fn index_at(base: u64) -> Index {
        let mut index = Index::default();
        let header = SegmentHeader {
            version: 3,
            number: 7,
            head: 7,
            base,
            revision: Revision::ZERO,
            epoch: Epoch::new(1),
            salt: 0,
        };
        index.set_bytes(&header, SEGMENT_HEADER_LEN + (1 << 30));
        index
    }

    #[test]
    fn a_place_comes_back_from_wherever_in_a_long_log_and_whatever_its_length() {
        let lens = [20, 21, LONG as u32 - 1, LONG as u32, LONG as u32 + 1, u32::MAX];
        for base in [0, 40, SPAN_MAX - 100, SPAN_MAX, (1 << 62) + 12_345] {
            for (offset, len) in [40, 99, 1 << 20, (1 << 30) - 1].into_iter().flat_map(|at| lens.map(|len| (at, len))) {
                let mut index = index_at(base);
                let (revision, place) = (Revision::new(9), Place { position: base + offset, len });
                index.insert(revision, place);
                assert!(
                    index.is_live(Id::Revision(revision), place.position)
                        && !index.is_live(Id::Revision(revision), place.position + 1)
                );
                assert_eq!((index.live_bytes(), index.live_in(7)), (u64::from(len), u64::from(len)));
                let copy = Place { position: base + offset + 1, ..place };
                index.move_to(Id::Revision(revision), copy);
                assert!(index.is_live(Id::Revision(revision), copy.position) && index.live_bytes() == u64::from(len));
                assert!(index.remove(revision) && !index.remove(revision) && !index.contains(revision));
                assert_eq!((index.live_bytes(), index.live_in(7), index.long.len()), (0, 0, 0));
            }
        }
    }

    #[test]
    fn the_frames_that_hold_values_are_known_where_they_are_few() {
        let mut index = index_at(1 << 40);
        let mut next = index_at(1 << 40).segments[0];
        (next.number, next.base) = (8, next.base + next.bytes - SEGMENT_HEADER_LEN);
        index.segments.push_back(next);
        let base = 1 << 40;
        for (revision, position) in [(1, base + 900), (2, base + 40), (3, base + 40), (4, next.base), (5, base)] {
            index.insert(Revision::new(revision), Place { position, len: 30 });
        }
        assert_eq!(index.frames_of(7), Some(vec![base, base + 40, base + 900]));
        assert_eq!(index.frames_of(8), Some(vec![next.base]));
        assert!(index.remove(Revision::new(5)));
        index.segments[0].bytes = 4 * FRAMES_SHARE;
        assert_eq!(index.frames_of(7), Some(vec![base + 40, base + 900]));
        index.segments[0].bytes -= 1;
        assert_eq!(index.frames_of(7), None);
    }

    #[test]
    fn when_most_values_are_gone_so_is_their_room() {
        let mut index = index_at(0);
        for at in 1..=10_000 {
            index.insert(Revision::new(at), Place { position: at * 32, len: 30 });
        }
        for at in 1..=9_900 {
            assert!(index.remove(Revision::new(at)));
        }
        assert!(index.places.capacity() <= 1_000, "room for {}", index.places.capacity());
        assert!((9_901..=10_000).all(|at| index.is_live(Id::Revision(Revision::new(at)), at * 32)));
    }

    #[test]
    fn values_that_were_expected_and_did_not_come_keep_no_room_and_too_many_are_not_expected() {
        let mut index = index_at(0);
        (1..=1_000).for_each(|at| index.insert(Revision::new(at), Place { position: at * 32, len: 30 }));
        index.expect(usize::MAX);
        assert!((5_000..10_000).contains(&index.places.capacity()));
        (11..=1_000).for_each(|at| _ = index.remove(Revision::new(at)));
        assert!(index.places.capacity() >= 5_000, "it is expected to be needed");
        index.fit();
        assert!(
            index.places.capacity() < 100 && (1..=10).all(|at| index.is_live(Id::Revision(Revision::new(at)), at * 32))
        );
    }

    #[test]
    fn a_value_costs_sixteen_bytes() {
        assert_eq!(size_of::<(Revision, Packed)>(), 16);
    }
}
