//! Stamps: the order of all writes of a cluster, by a hybrid logical clock and the id of the node.

use std::fmt;

/// Bits of an [`Hlc`] that count within a millisecond.
const COUNT_BITS: u32 = 16;

/// Milliseconds since the Unix epoch.
pub(crate) type Millis = u64;

/// A reading of a hybrid logical clock: milliseconds since the Unix epoch, and a count of what came within one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Hlc(pub(crate) u64);

impl Hlc {
    pub(crate) fn at(millis: Millis) -> Self {
        Hlc(millis.min(u64::MAX >> COUNT_BITS) << COUNT_BITS)
    }

    pub(crate) fn millis(self) -> Millis {
        self.0 >> COUNT_BITS
    }

    pub(crate) fn next(self) -> Self {
        Hlc(self.0.saturating_add(1))
    }
}

/// Names a node for as long as its data live.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub(crate) u64);

impl NodeId {
    /// The number.
    #[must_use]
    pub fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// When a write was done, and by whom: the larger one wins, everywhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Stamp {
    pub(crate) time: Hlc,
    pub(crate) node: NodeId,
}

/// Gives stamps that rise, whatever the wall clock does.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct HybridClock {
    last: Hlc,
}

impl HybridClock {
    /// The next reading, at this time: above all that were given or seen.
    pub(crate) fn tick(&mut self, now: Millis) -> Hlc {
        self.last = self.last.next().max(Hlc::at(now));
        self.last
    }

    /// Takes in a reading of another node: what is written after it was seen is newer.
    pub(crate) fn see(&mut self, other: Hlc) {
        self.last = self.last.max(other);
    }

    pub(crate) fn last(self) -> Hlc {
        self.last
    }

    /// Goes back: only where no other node has seen what was given.
    pub(crate) fn reset(&mut self, to: Hlc) {
        self.last = to;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readings_rise_whatever_the_wall_clock_does() {
        let mut clock = HybridClock::default();
        let mut last = Hlc::default();
        for now in [5, 5, 9, 2, 0, 9, 10] {
            let next = clock.tick(now);
            assert!(next > last && next.millis() >= now, "{next:?} after {last:?}");
            last = next;
        }
        clock.see(Hlc::at(1_000));
        assert!(clock.tick(11) > Hlc::at(1_000));
    }
}
