//! What the benches share: how long they measure, and keys in an order that is the same on every machine.

use std::time::Duration;

use criterion::Criterion;
use nkv_core::{Key, Op, PutOptions};

/// Measures for a second each, so that all benches together take minutes; the command line may say otherwise.
pub(crate) fn criterion() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args()
}

/// Numbers from a seed. (Marsaglia's xorshift.)
#[allow(dead_code, reason = "not every bench needs it")]
pub(crate) struct Random(pub(crate) u64);

#[allow(dead_code, reason = "not every bench needs it")]
impl Random {
    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit
    }
}

/// `count` keys of three segments, a hundred to a branch.
#[allow(dead_code, reason = "not every bench needs it")]
pub(crate) fn keys(count: usize) -> Vec<Key> {
    (0..count).map(|n| key(&format!("host.h{}.figure{}", n / 100, n % 100))).collect()
}

/// A key from a text that is known to be one.
pub(crate) fn key(text: &str) -> Key {
    Key::new(text).expect("the benches write good keys")
}

/// An unconditional put.
#[allow(dead_code, reason = "not every bench needs it")]
pub(crate) fn put(key: &Key, value: &bytes::Bytes) -> Op {
    Op::Put { key: key.clone(), value: value.clone(), options: PutOptions::default() }
}
