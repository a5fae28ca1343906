//! What an operation costs in memory. Resource: processor and cache; no disk, no socket.
//!
//! `get` and `put` at growing numbers of keys: of the same number of `hot` keys, to show what does not grow with the
//! store, and of `any` keys, where the processor's caches are part of it. `wildcard` reads a branch, to show that it
//! grows with what it returns. `put_subscribed` has growing numbers of subscribers, none of whom reads, so that each
//! put but the first takes the place of another in each mailbox. `put_deep` has keys of one and of many segments, and
//! none or many subscriptions beside them, which get no event. A get looks a value up where it lies.

mod support;

use std::hint::black_box;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput};
use nkv_core::mailbox::{Mailbox, mailbox};
use nkv_core::{Key, NoPersist, NotifyKeyValue, Pattern, PutOptions};

use crate::support::{Random, criterion, key, keys, put};

/// Numbers of keys in the store.
const KEYS: [usize; 3] = [1_000, 100_000, 1_000_000];
/// Keys that are asked for again and again, spread over the store.
const HOT: usize = 1_000;
/// Numbers of keys that a wildcard selects, in a store with `WILDCARD_OTHERS` others.
const WILDCARD: [usize; 3] = [10, 100, 1_000];
const WILDCARD_OTHERS: usize = 100_000;
/// Numbers of subscribers to the key that is put.
const SUBSCRIBERS: [usize; 3] = [0, 1, 100];
/// Segments of the key that is put, and numbers of subscriptions to keys beside its branch.
const DEPTHS: [usize; 2] = [1, 8];
const UNRELATED: [usize; 2] = [0, 10_000];
const VALUE: &[u8] = &[b'v'; 100];
const SEED: u64 = 11;

type Store = NotifyKeyValue<NoPersist, Mailbox>;

fn main() {
    let mut criterion = criterion();
    by_keys(&mut criterion);
    wildcard(&mut criterion);
    by_subscribers(&mut criterion);
    by_depth(&mut criterion);
    criterion.final_summary();
}

fn by_keys(criterion: &mut Criterion) {
    for count in KEYS {
        let all = keys(count);
        let store = store_of(&all);
        let mut random = Random(SEED);
        let hot: Vec<Key> = (0..HOT).map(|_| all[random.below(count)].clone()).collect();
        for (name, keys) in [("hot", &hot), ("any", &all)] {
            let mut group = criterion.benchmark_group(format!("keyspace/get_{name}"));
            group.bench_function(BenchmarkId::from_parameter(count), |bencher| {
                let get = |key: &Key| store.look_up(key.as_str(), |record| black_box(record.value.len()));
                bencher.iter(|| black_box(get(&keys[random.below(keys.len())])));
            });
            group.finish();
            let mut group = criterion.benchmark_group(format!("keyspace/put_{name}"));
            let value = Bytes::from_static(VALUE);
            group.bench_function(BenchmarkId::from_parameter(count), |bencher| {
                let put = |key: &Key| store.put(key, value.clone(), PutOptions::default());
                bencher.iter(|| put(&keys[random.below(keys.len())]));
            });
            group.finish();
        }
    }
}

fn wildcard(criterion: &mut Criterion) {
    let mut all = keys(WILDCARD_OTHERS);
    for count in WILDCARD {
        all.extend((0..count).map(|n| key(&format!("wild.w{count}.k{n}"))));
    }
    let store = store_of(&all);
    let mut group = criterion.benchmark_group("keyspace/wildcard");
    for count in WILDCARD {
        let pattern = Pattern::Below(key(&format!("wild.w{count}")));
        assert_eq!(store.get_all(&pattern).len(), count);
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(BenchmarkId::from_parameter(count), |bencher| {
            bencher.iter(|| black_box(store.get_all(&pattern)));
        });
    }
    group.finish();
}

fn by_subscribers(criterion: &mut Criterion) {
    let key = key("host.h1.figure1");
    let value = Bytes::from_static(VALUE);
    let mut group = criterion.benchmark_group("keyspace/put_subscribed");
    for count in SUBSCRIBERS {
        let store = store_of(std::slice::from_ref(&key));
        let subscribe = |n: usize| {
            let (post, inbox) = mailbox();
            store.subscribe(Pattern::from(&key), n.to_string().as_str().into(), post, false);
            inbox
        };
        let _inboxes: Vec<_> = (0..count).map(subscribe).collect();
        group.bench_function(BenchmarkId::from_parameter(count), |bencher| {
            bencher.iter(|| store.put(&key, value.clone(), PutOptions::default()));
        });
    }
    group.finish();
}

fn by_depth(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("keyspace/put_deep");
    for subscriptions in UNRELATED {
        for depth in DEPTHS {
            let key = key(&["segment"; 8][..depth].join("."));
            let store = store_of(std::slice::from_ref(&key));
            let subscribe = |n: usize| {
                let (post, inbox) = mailbox();
                let beside = Pattern::Key(self::key(&format!("segment.other{n}")));
                store.subscribe(beside, n.to_string().as_str().into(), post, false);
                inbox
            };
            let _inboxes: Vec<_> = (0..subscriptions).map(subscribe).collect();
            let value = Bytes::from_static(VALUE);
            group.bench_function(BenchmarkId::new(format!("beside_{subscriptions}"), depth), |bencher| {
                bencher.iter(|| store.put(&key, value.clone(), PutOptions::default()));
            });
        }
    }
    group.finish();
}

fn store_of(keys: &[Key]) -> Store {
    let store = NotifyKeyValue::open(NoPersist::default()).expect("nothing is loaded");
    let value = Bytes::from_static(VALUE);
    for keys in keys.chunks(10_000) {
        let ops: Vec<_> = keys.iter().map(|key| put(key, &value)).collect();
        store.write(&ops).expect("nothing is stored");
    }
    store
}
