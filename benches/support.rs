//! What the benches share: how long they measure, and keys in an order that is the same on every machine.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use criterion::Criterion;
use nkv_core::mailbox::{Item, Mailbox, mailbox};
use nkv_core::{Event, Key, NoPersist, NotifyKeyValue, Op, Pattern, PutOptions};

/// Measures for a second each, so that all benches together take minutes; the command line may say otherwise.
#[allow(dead_code, reason = "not every bench needs it")]
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

/// The events of `rounds` puts to each of the keys in turn, as a subscriber of a store gets them.
#[allow(dead_code, reason = "not every bench needs it")]
pub(crate) fn events(keys: &[Key], rounds: usize, value: &Bytes) -> Vec<Arc<Event>> {
    let store: NotifyKeyValue<NoPersist, Mailbox> =
        NotifyKeyValue::open(NoPersist::default()).expect("nothing is loaded");
    let (post, inbox) = mailbox();
    store.subscribe(Pattern::All, "bench".into(), post, false);
    assert!(inbox.try_take().is_some(), "a subscription begins");
    let event = |key| {
        store.put(key, value.clone(), PutOptions::default()).expect("nothing is stored");
        let Some(Item::Event { event, .. }) = inbox.try_take() else { panic!("a put is told") };
        event
    };
    (0..rounds).flat_map(|_| keys).map(event).collect()
}

/// An unconditional put.
#[allow(dead_code, reason = "not every bench needs it")]
pub(crate) fn put(key: &Key, value: &Bytes) -> Op {
    Op::Put { key: key.clone(), value: value.clone(), options: PutOptions::default() }
}
