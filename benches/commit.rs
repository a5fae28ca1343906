//! What it costs to keep values with `nkv-persist-fs`. Resource: the disk below `TMPDIR`, or `/var/tmp`.
//!
//! A commit is one batch, as durable as it was asked to be: under `sync` it is one write and one `fdatasync`, so the
//! figure is the disk's; under `os` it is the write alone. Recovery is opening and loading, from a warm page cache.

mod support;

use bytes::Bytes;
use criterion::{BatchSize, BenchmarkId, Criterion, SamplingMode, Throughput};
use nkv_core::{Action, Change, Key, Meta, PersistValue, Revision};
use nkv_persist_fs::{Durability, FsOptions, FsPersist};
use tempfile::TempDir;

use crate::support::{criterion, keys};

/// Changes in a batch.
const BATCHES: [usize; 3] = [1, 10, 50];
/// Keys that are overwritten in turn, so that the log stays small by compaction, as in a running server.
const KEYS: usize = 1_000;
/// Records in the store that is recovered.
const RECOVERED: usize = 100_000;
const VALUE: &[u8] = &[b'v'; 100];

fn main() {
    let mut criterion = criterion();
    commit(&mut criterion);
    recover(&mut criterion);
    criterion.final_summary();
}

fn commit(criterion: &mut Criterion) {
    let keys = keys(KEYS);
    let mut group = criterion.benchmark_group("commit");
    for durability in [Durability::Sync, Durability::Os] {
        for len in BATCHES {
            let dir = directory();
            let mut store = FsPersist::open(dir.path(), options(durability)).expect("the directory is new");
            let mut changes = Changes::new(&keys);
            group.throughput(Throughput::Elements(len as u64));
            group.bench_function(BenchmarkId::new(durability.to_string(), len), |bencher| {
                let batch = || changes.by_ref().take(len).collect::<Vec<_>>();
                bencher.iter_batched(
                    batch,
                    |batch| store.persist(&batch).expect("it is stored"),
                    BatchSize::SmallInput,
                );
            });
        }
    }
    group.finish();
}

fn recover(criterion: &mut Criterion) {
    let dir = directory();
    let mut store = FsPersist::open(dir.path(), options(Durability::Os)).expect("the directory is new");
    let batch: Vec<Change> = Changes::new(&keys(RECOVERED)).take(RECOVERED).collect();
    batch.chunks(1_000).for_each(|batch| store.persist(batch).expect("it is stored"));
    store.close().expect("it is stored");

    let mut group = criterion.benchmark_group("recover");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    group.throughput(Throughput::Elements(RECOVERED as u64));
    group.bench_function(BenchmarkId::from_parameter(RECOVERED), |bencher| {
        bencher.iter(|| {
            let mut count = 0;
            let mut store = FsPersist::open(dir.path(), options(Durability::Os)).expect("it was closed");
            store.load(&mut |_| count += 1).expect("it is whole");
            assert_eq!(count, RECOVERED);
        });
    });
    group.finish();
}

/// Puts to one key after another, without end.
struct Changes<'a> {
    keys: std::iter::Cycle<std::slice::Iter<'a, Key>>,
    keys_len: u64,
    revision: Revision,
}

impl<'a> Changes<'a> {
    fn new(keys: &'a [Key]) -> Self {
        Changes { keys: keys.iter().cycle(), keys_len: keys.len() as u64, revision: Revision::ZERO }
    }
}

impl Iterator for Changes<'_> {
    type Item = Change;

    fn next(&mut self) -> Option<Change> {
        let key = self.keys.next()?.clone();
        self.revision = self.revision.next();
        let action = Action::Put { value: Bytes::from_static(VALUE), expiry: None };
        let replaces = Revision::new(self.revision.get().saturating_sub(self.keys_len));
        Some(Change { key, revision: self.revision, replaces, action, meta: Meta::NONE })
    }
}

fn options(durability: Durability) -> FsOptions {
    FsOptions::default().with_durability(durability)
}

/// A directory of our own on a disk: `/tmp` is memory on many machines.
fn directory() -> TempDir {
    let parent = std::env::var_os("TMPDIR").unwrap_or_else(|| "/var/tmp".into());
    tempfile::tempdir_in(parent).expect("a directory can be made")
}
