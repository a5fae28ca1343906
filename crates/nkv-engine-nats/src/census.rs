//! Which names a bucket has something of, so that its own count shows whether anything was removed without a notice.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};

/// The names that a follower knows to be in the bucket, by a hash of each. Two names of one hash make a count that is never
/// right, and the state is fetched anew with another hasher.
#[derive(Debug, Default)]
pub(crate) struct Census {
    hasher: RandomState,
    /// With the sequence of the marker where the last message of a name is one; zero where it is a value.
    names: HashMap<u64, u64>,
    /// By sequence: deletes and ends of values.
    markers: BTreeMap<u64, Marker>,
}

#[derive(Clone, Copy, Debug)]
struct Marker {
    name: u64,
    /// From when on it may vanish, in milliseconds of the server's clock.
    until_ms: u64,
}

impl Census {
    /// Notes the latest message of a name; `until_ms`, where it is a marker.
    pub(crate) fn note(&mut self, name: &str, sequence: u64, until_ms: Option<u64>) {
        let name = self.hasher.hash_one(name);
        let marker = if until_ms.is_some() { sequence } else { 0 };
        if let Some(before) = self.names.insert(name, marker) {
            self.markers.remove(&before);
        }
        if let Some(until_ms) = until_ms {
            self.markers.insert(sequence, Marker { name, until_ms });
        }
    }

    /// Notes that a marker was removed.
    pub(crate) fn forget(&mut self, sequence: u64) {
        if let Some(marker) = self.markers.remove(&sequence) {
            self.names.remove(&marker.name);
        }
    }

    /// Whether there is something of a name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.names.contains_key(&self.hasher.hash_one(name))
    }

    /// How many names there are.
    pub(crate) fn len(&self) -> u64 {
        self.names.len() as u64
    }

    /// How many there are at least, as a marker may have vanished once it is old.
    pub(crate) fn len_min(&self, now_ms: u64) -> u64 {
        let old = self.markers.values().filter(|marker| marker.until_ms <= now_ms).count();
        self.len().saturating_sub(old as u64)
    }

    /// Whether a sequence is that of a marker.
    pub(crate) fn is_marker(&self, sequence: u64) -> bool {
        self.markers.contains_key(&sequence)
    }

    /// The sequence of the marker that is the last message of a name; zero if none is.
    pub(crate) fn marker_of(&self, name: &str) -> u64 {
        self.names.get(&self.hasher.hash_one(name)).copied().unwrap_or_default()
    }

    /// The first of the markers that are old.
    pub(crate) fn old(&self, now_ms: u64, limit: usize) -> Vec<u64> {
        let old = self.markers.iter().filter(|(_, marker)| marker.until_ms <= now_ms);
        old.map(|(sequence, _)| *sequence).take(limit).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_counts_until_it_may_have_vanished() {
        let mut census = Census::default();
        census.note("a", 1, None);
        census.note("b", 2, None);
        census.note("a", 3, Some(100));
        assert_eq!((census.len(), census.len_min(99), census.len_min(100)), (2, 2, 1));
        assert!(census.is_marker(3) && !census.is_marker(2));
        assert_eq!((census.marker_of("a"), census.marker_of("b"), census.marker_of("c")), (3, 0, 0));
        assert_eq!(census.old(100, 9), [3]);
        // Put again: the marker is gone.
        census.note("a", 4, None);
        assert_eq!((census.len(), census.len_min(100), census.old(100, 9).len()), (2, 2, 0));
        census.note("a", 5, Some(100));
        census.forget(5);
        assert_eq!((census.len(), census.marker_of("a")), (1, 0));
    }
}
