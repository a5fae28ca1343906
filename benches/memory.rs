//! Memory that the store takes. Resource: memory, counted in the allocator: bytes that were allocated and not yet freed, without
//! what the allocator itself adds. Two runs find the same, also on a noisy machine.
//!
//! Each figure is for one key, or one change; the bytes of the key and of its value are in it, except where the name says
//! `beyond`. The arguments filter figures by what is in their names. `--test` counts fewer.

mod support;

use std::hint::black_box;
use std::time::Duration;

use bytes::Bytes;
use nkv_core::mailbox::{Mailbox, mailbox};
use nkv_core::{Expiry, Key, NoPersist, NotifyKeyValue, Pattern, PutOptions, Timestamp};
use peak_alloc::PeakAlloc;

use crate::support::keys;

/// Live bytes of the whole process, those of all threads.
#[global_allocator]
static ALLOCATED: PeakAlloc = PeakAlloc;

/// Keys in a store.
const KEYS: usize = 100_000;
const VALUE_LEN: usize = 100;
const LARGE_LEN: usize = 4_000;
const TTL: Duration = Duration::from_secs(3_600);

type Store = NotifyKeyValue<NoPersist, Mailbox>;

/// Counts bytes for one of the keys.
type Count = fn(&[Key]) -> f64;

/// By names, which are stable: figures are compared by them.
const FIGURES: [(&str, Count); 4] = [
    ("memory/key_beyond_itself_and_value", |keys| key(keys, None)),
    ("memory/key_with_ttl_beyond_itself_and_value", |keys| key(keys, Some(Expiry::after(Timestamp::MIN, TTL)))),
    ("memory/pending_change", |keys| pending(keys, VALUE_LEN)),
    ("memory/pending_change_of_4000", |keys| pending(keys, LARGE_LEN)),
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let filters: Vec<_> = arguments.iter().filter(|word| !word.starts_with("--")).collect();
    let is_test = arguments.iter().any(|word| word == "--test");
    let keys = keys(if is_test { KEYS / 100 } else { KEYS });
    for (name, count) in FIGURES {
        if filters.is_empty() || filters.iter().any(|filter| name.contains(*filter)) {
            println!("{name:<50} {:>8.0} bytes", count(&keys));
        }
    }
}

/// Bytes that `work` leaves allocated for as long as what it returns lives.
fn held<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = ALLOCATED.current_usage();
    let kept = work();
    (kept, ALLOCATED.current_usage().saturating_sub(before))
}

fn key(keys: &[Key], expiry: Option<Expiry>) -> f64 {
    let (store, bytes) = held(|| filled(keys, expiry, VALUE_LEN));
    black_box(store);
    let own: usize = keys.iter().map(|key| key.as_str().len() + VALUE_LEN).sum();
    (bytes as f64 - own as f64) / keys.len() as f64
}

/// A change of each key waits for one subscriber, who had none before.
fn pending(keys: &[Key], len: usize) -> f64 {
    let store = filled(keys, None, len);
    let (post, inbox) = mailbox();
    store.subscribe(Pattern::All, "bench".into(), post, false);
    let ((), bytes) = held(|| put_all(&store, keys, None, len));
    drop(inbox);
    bytes as f64 / keys.len() as f64
}

fn filled(keys: &[Key], expiry: Option<Expiry>, len: usize) -> Store {
    let store = Store::open(NoPersist::default()).expect("nothing is loaded");
    put_all(&store, keys, expiry, len);
    store
}

/// Each value has bytes of its own, as if it had come over a socket.
fn put_all(store: &Store, keys: &[Key], expiry: Option<Expiry>, len: usize) {
    let options = PutOptions { expiry, ..PutOptions::default() };
    for key in keys {
        store.put(key, Bytes::from(vec![b'v'; len]), options).expect("nothing is stored");
    }
}
