//! Where the value of each key stands, and how much of each segment is still needed.

use std::collections::{BTreeMap, HashMap};

use nkv_core::Key;

/// The place of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) segment: u64,
    /// Within the file.
    pub(crate) offset: u64,
    pub(crate) len: u32,
}

/// What is known of a segment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub(crate) bytes: u64,
    /// How many of them are records that the index points to.
    pub(crate) live: u64,
}

/// The place of each present key.
#[derive(Debug, Default)]
pub(crate) struct Index {
    places: HashMap<Key, Place>,
    segments: BTreeMap<u64, Usage>,
    live_bytes: u64,
    total_bytes: u64,
}

impl Index {
    pub(crate) fn put(&mut self, key: Key, place: Place) {
        let old = self.places.insert(key, place);
        self.count_live(place, true);
        old.into_iter().for_each(|old| self.count_live(old, false));
    }

    pub(crate) fn delete(&mut self, key: &Key) {
        let old = self.places.remove(key);
        old.into_iter().for_each(|old| self.count_live(old, false));
    }

    fn count_live(&mut self, place: Place, live: bool) {
        let usage = self.segments.entry(place.segment).or_default();
        for sum in [&mut usage.live, &mut self.live_bytes] {
            let count = if live { u64::saturating_add } else { u64::saturating_sub };
            *sum = count(*sum, u64::from(place.len));
        }
    }

    /// Whether the record at this place is the value of its key.
    pub(crate) fn is_live(&self, key: &Key, segment: u64, offset: u64) -> bool {
        self.places.get(key).is_some_and(|place| (place.segment, place.offset) == (segment, offset))
    }

    /// Notes that a segment has this many bytes.
    pub(crate) fn set_bytes(&mut self, segment: u64, bytes: u64) {
        let usage = self.segments.entry(segment).or_default();
        self.total_bytes = self.total_bytes.saturating_sub(usage.bytes).saturating_add(bytes);
        usage.bytes = bytes;
    }

    pub(crate) fn drop_segment(&mut self, segment: u64) {
        let bytes = self.segments.remove(&segment).unwrap_or_default().bytes;
        self.total_bytes = self.total_bytes.saturating_sub(bytes);
    }

    pub(crate) fn usage(&self, segment: u64) -> Usage {
        self.segments.get(&segment).copied().unwrap_or_default()
    }

    pub(crate) fn segments(&self) -> impl Iterator<Item = u64> {
        self.segments.keys().copied()
    }

    pub(crate) fn segment_count(&self) -> usize {
        self.segments.len()
    }

    pub(crate) fn key_count(&self) -> usize {
        self.places.len()
    }

    /// The sum of the records that the index points to.
    pub(crate) fn live_bytes(&self) -> u64 {
        self.live_bytes
    }

    /// The sum of the segments.
    pub(crate) fn total_bytes(&self) -> u64 {
        self.total_bytes
    }
}
