//! Figures of storage and of times, for monitoring from outside.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// How often something took how long, or was how large: counted without a lock.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [u64],
    /// One for each bound, and one for what is above all of them.
    counts: Box<[AtomicU64]>,
    sum: AtomicU64,
}

impl Histogram {
    /// Bounds for times, in microseconds: 100 us to 10 s.
    pub const TIMES: &'static [u64] = &[
        100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000,
        10_000_000,
    ];
    /// Bounds for numbers of things.
    pub const SIZES: &'static [u64] = &[1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024, 4_096];

    /// An empty one; the bounds rise.
    #[must_use]
    pub fn new(bounds: &'static [u64]) -> Self {
        let counts = std::iter::repeat_with(AtomicU64::default).take(bounds.len() + 1).collect();
        Histogram { bounds, counts, sum: AtomicU64::new(0) }
    }

    /// Counts a value.
    pub fn observe(&self, value: u64) {
        let at = self.bounds.partition_point(|bound| *bound < value);
        if let Some(count) = self.counts.get(at) {
            count.fetch_add(1, Relaxed);
        }
        self.sum.fetch_add(value, Relaxed);
    }

    /// Counts a time, in microseconds.
    pub fn observe_time(&self, time: Duration) {
        self.observe(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    /// What was counted.
    #[must_use]
    pub fn read(&self) -> HistogramReading {
        let counts = self.bounds.iter().copied().chain([u64::MAX]).zip(&self.counts);
        let counts: Vec<_> = counts.map(|(bound, count)| (bound, count.load(Relaxed))).collect();
        HistogramReading { counts, sum: self.sum.load(Relaxed) }
    }
}

/// What a [`Histogram`] has counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HistogramReading {
    /// By the highest value that counts there, how many; the last is `u64::MAX`.
    pub counts: Vec<(u64, u64)>,
    /// All values together.
    pub sum: u64,
}

impl HistogramReading {
    /// How many there were.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().map(|(_, count)| count).sum()
    }
}

/// Looks at storage that a store has taken over.
pub trait StorageFigures: fmt::Debug + Send + Sync {
    /// The figures right now. It may wait for a moment, but not for a sync.
    fn read(&self) -> StorageReading;
}

/// Figures of storage since it was opened; 0 where a backend has none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StorageReading {
    /// Bytes that it takes of the disk.
    pub disk_bytes: u64,
    /// Bytes of those that are needed.
    pub live_bytes: u64,
    /// Parts that were compacted.
    pub compactions: u64,
    /// Bytes that compaction has written.
    pub compacted_bytes: u64,
    /// How long each sync took, in microseconds.
    pub sync_times: HistogramReading,
}

impl StorageReading {
    /// With those of another backend.
    pub(crate) fn add(&mut self, other: StorageReading) {
        let StorageReading { disk_bytes, live_bytes, compactions, compacted_bytes, sync_times } = other;
        self.disk_bytes += disk_bytes;
        self.live_bytes += live_bytes;
        self.compactions += compactions;
        self.compacted_bytes += compacted_bytes;
        self.sync_times.sum = self.sync_times.sum.saturating_add(sync_times.sum);
        for (bound, count) in sync_times.counts {
            match self.sync_times.counts.iter_mut().find(|(known, _)| *known == bound) {
                Some((_, known)) => *known += count,
                None => self.sync_times.counts.push((bound, count)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_counts_at_the_lowest_bound_that_is_not_below_it() {
        let histogram = Histogram::new(&[1, 10]);
        [0, 1, 2, 10, 11].into_iter().for_each(|value| histogram.observe(value));
        let reading = histogram.read();
        assert_eq!((reading.counts.clone(), reading.sum), (vec![(1, 2), (10, 2), (u64::MAX, 1)], 24));
        assert_eq!(reading.count(), 5);
    }
}
