//! Which subjects a bucket has something of, so that its own count shows whether anything was removed without a notice.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};

/// The subjects that a follower knows to be in the bucket, its names, by a hash of each. Two names of one hash make a count that
/// is never right, and the state is fetched anew with another hasher.
#[derive(Debug, Default)]
pub(crate) struct Census {
    hasher: RandomState,
    names: HashMap<u64, Last>,
    /// By sequence: deletes and ends of values.
    markers: BTreeMap<u64, Marker>,
}

/// The last message of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Last {
    /// A value that nkv shows, put at this sequence.
    Value(u64),
    /// A delete, or the end of a value.
    Marker(u64),
    /// What nkv cannot hold.
    Foreign,
}

#[derive(Clone, Copy, Debug)]
struct Marker {
    name: u64,
    /// From when on it may vanish, in milliseconds of the server's clock.
    until_ms: u64,
}

impl Census {
    /// Notes the last message of a name, and for a marker, from when on it may vanish.
    pub(crate) fn note(&mut self, name: &str, last: Last, until_ms: u64) {
        let name = self.hasher.hash_one(name);
        if let Some(Last::Marker(before)) = self.names.insert(name, last) {
            self.markers.remove(&before);
        }
        if let Last::Marker(sequence) = last {
            self.markers.insert(sequence, Marker { name, until_ms });
        }
    }

    /// Notes that a marker was removed.
    pub(crate) fn forget(&mut self, sequence: u64) {
        if let Some(marker) = self.markers.remove(&sequence) {
            self.names.remove(&marker.name);
        }
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

    /// The last message of a name, if there is one.
    pub(crate) fn last_of(&self, name: &str) -> Option<Last> {
        self.names.get(&self.hasher.hash_one(name)).copied()
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
        census.note("a", Last::Value(1), 0);
        census.note("b", Last::Foreign, 0);
        census.note("a", Last::Marker(3), 100);
        assert_eq!((census.len(), census.len_min(99), census.len_min(100)), (2, 2, 1));
        assert!(census.is_marker(3) && !census.is_marker(2));
        assert_eq!([census.last_of("a"), census.last_of("c")], [Some(Last::Marker(3)), None]);
        assert_eq!(census.old(100, 9), [3]);
        // Put again: the marker is gone.
        census.note("a", Last::Value(4), 0);
        assert_eq!((census.len(), census.len_min(100), census.old(100, 9).len()), (2, 2, 0));
        census.note("a", Last::Marker(5), 100);
        census.forget(5);
        assert_eq!((census.len(), census.last_of("a")), (1, None));
    }
}
