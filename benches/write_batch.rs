//! What a batch costs besides its storage. Resource: processor; storage forgets at once, there is no subscription.
//!
//! The time is that of the whole batch; the throughput counts its writes.

mod support;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput};
use nkv_core::mailbox::Mailbox;
use nkv_core::{NoPersist, NotifyKeyValue, Op};

use crate::support::{Random, criterion, keys, put};

/// Writes in a batch.
const BATCHES: [usize; 3] = [1, 16, 256];
/// Keys in the store, of which each write overwrites a random one.
const KEYS: usize = 10_000;
/// Batches that are written in turn.
const PREPARED: usize = 64;
const VALUE: &[u8] = &[b'v'; 100];
const SEED: u64 = 13;

fn main() {
    let mut criterion = criterion();
    write_batch(&mut criterion);
    criterion.final_summary();
}

fn write_batch(criterion: &mut Criterion) {
    let keys = keys(KEYS);
    let value = Bytes::from_static(VALUE);
    let store: NotifyKeyValue<NoPersist, Mailbox> =
        NotifyKeyValue::open(NoPersist::default()).expect("nothing is loaded");
    store.write(&keys.iter().map(|key| put(key, &value)).collect::<Vec<_>>()).expect("nothing is stored");
    let mut random = Random(SEED);
    let mut group = criterion.benchmark_group("write_batch");
    for len in BATCHES {
        let mut batch = || -> Vec<Op> { (0..len).map(|_| put(&keys[random.below(KEYS)], &value)).collect() };
        let batches: Vec<_> = (0..PREPARED).map(|_| batch()).collect();
        let mut turn = batches.iter().cycle();
        group.throughput(Throughput::Elements(len as u64));
        group.bench_function(BenchmarkId::from_parameter(len), |bencher| {
            bencher.iter(|| store.write(turn.next().expect("it goes round")));
        });
    }
    group.finish();
}
