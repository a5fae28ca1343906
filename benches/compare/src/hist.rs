//! Latencies, counted in steps of under one percent.

/// Steps for each power of two.
const STEPS: usize = 128;
/// Powers of two: a century of nanoseconds is below.
const POWERS: usize = 58;

/// How often each latency occurred.
#[derive(Debug)]
pub(crate) struct Hist {
    counts: Vec<u64>,
    pub(crate) count: u64,
}

impl Hist {
    pub(crate) fn new() -> Self {
        Hist { counts: vec![0; STEPS * POWERS], count: 0 }
    }

    pub(crate) fn add(&mut self, ns: u64) {
        let step = if ns < STEPS as u64 {
            ns as usize
        } else {
            let power = 63 - ns.leading_zeros() as usize;
            (power - 6) * STEPS + ((ns >> (power - 7)) as usize - STEPS)
        };
        self.counts[step.min(STEPS * POWERS - 1)] += 1;
        self.count += 1;
    }

    /// The latency that a share of `quantile` does not pass, in microseconds; 0 if nothing was added.
    pub(crate) fn us(&self, quantile: f64) -> f64 {
        let wanted = ((self.count as f64 * quantile).ceil() as u64).max(1);
        let mut seen = 0;
        let reached = |count: &u64| {
            seen += count;
            seen >= wanted
        };
        self.counts.iter().position(reached).map_or(0.0, |step| middle(step) / 1_000.0)
    }
}

/// The middle of a step, in nanoseconds.
fn middle(step: usize) -> f64 {
    if step < STEPS {
        return step as f64;
    }
    let shift = step / STEPS - 1;
    let first = ((step % STEPS + STEPS) as u64) << shift;
    first as f64 + (1u64 << shift) as f64 / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_within_a_percent() {
        let mut hist = Hist::new();
        assert_eq!(hist.us(0.5), 0.0);
        (1..=100_000).for_each(|ns| hist.add(ns));
        for quantile in [0.001, 0.5, 0.99, 1.0] {
            let error = hist.us(quantile) / (100.0 * quantile) - 1.0;
            assert!(error.abs() < 0.01, "{quantile}: {error}");
        }
    }
}
