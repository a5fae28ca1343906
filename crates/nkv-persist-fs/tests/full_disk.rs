//! A full disk refuses puts, takes deletes, and takes puts again when there is space.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use nkv_core::{Change, KEY_LEN_MAX, Key, PersistErrorKind, PersistValue, Prepared, Revision};
use nkv_persist_fs::sim::{Fault, SimFs};
use nkv_persist_fs::{Durability, FsOptions, FsPersist};

const CAPACITY: u64 = 200 << 10;

fn options() -> FsOptions {
    FsOptions::default().with_segment_bytes(64 << 10).with_reserve_bytes(16 << 10).with_background(false)
}

/// Puts new keys until there is no space left.
fn fill(persist: &mut Storage, model: &mut Model) -> u64 {
    for revision in 1.. {
        let batch = [put(&format!("k.{revision}"), revision, vec![3; 500])];
        match persist.persist(&batch) {
            Ok(()) => apply(model, &batch),
            Err(error) => {
                assert_eq!(error.kind(), PersistErrorKind::NoSpace);
                return revision;
            }
        }
    }
    unreachable!()
}

#[test]
fn a_put_on_a_full_disk_is_refused_and_the_old_value_stays() {
    let fs = SimFs::new();
    fs.set_capacity(Some(CAPACITY));
    let mut persist = open(&fs, &options()).unwrap();
    let mut model = Model::new();
    let revision = fill(&mut persist, &mut model);
    let error = persist.persist(&[put("k.1", revision, vec![9; 40_000])]).unwrap_err();
    assert!(error.is_retryable());
    assert_eq!(load(&mut persist).unwrap().0, model);
    drop(persist);
    assert_eq!(load(&mut open(&fs, &options()).unwrap()).unwrap().0, model);
}

#[test]
fn deletes_on_a_full_disk_work_and_make_room_for_puts_without_a_restart() {
    let fs = SimFs::new();
    fs.set_capacity(Some(CAPACITY));
    let mut persist = open(&fs, &options()).unwrap();
    let mut model = Model::new();
    let mut revision = fill(&mut persist, &mut model);
    while persist.persist(&[put("k.2", revision, "")]).is_ok() {
        apply(&mut model, &[put("k.2", revision, "")]);
        revision += 1;
    }
    let mut seen_released = false;
    for n in 1..=150 {
        let batch = [delete(&format!("k.{n}"), revision)];
        persist.persist(&batch).unwrap_or_else(|e| panic!("delete {n}: {e}"));
        apply(&mut model, &batch);
        revision += 1;
        if !seen_released && !persist.monitor().stats().reserve_held {
            seen_released = true;
            let error = persist.persist(&[put("k.1", revision, "1")]).unwrap_err();
            assert_eq!(error.kind(), PersistErrorKind::NoSpace, "the room of deletes is not for puts");
        }
    }
    assert!(seen_released, "this test is about the reserve");
    persist.maintain().unwrap();
    let batch = [put("k.1", revision, vec![1; 5_000])];
    persist.persist(&batch).unwrap();
    apply(&mut model, &batch);
    assert!(persist.monitor().stats().reserve_held);
    drop(persist);
    assert_eq!(load(&mut open(&fs, &options()).unwrap()).unwrap().0, model);
}

#[test]
fn puts_work_again_when_another_program_frees_space_and_a_full_disk_can_be_opened() {
    let fs = SimFs::new();
    fs.set_capacity(Some(CAPACITY));
    let mut persist = open(&fs, &options()).unwrap();
    let mut model = Model::new();
    let revision = fill(&mut persist, &mut model);
    drop(persist);
    let mut persist = open(&fs, &options()).unwrap();
    assert_eq!(persist.persist(&[put("big", revision, vec![1; 5_000])]).unwrap_err().kind(), PersistErrorKind::NoSpace);
    fs.set_capacity(Some(2 * CAPACITY));
    // It does not look at once.
    let deadline = Instant::now() + Duration::from_secs(10);
    while persist.persist(&[put("big", revision, vec![1; 5_000])]).is_err() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(10));
    }
}

// Zeros ahead of the log would have taken the last room of a disk, and a put would have been refused for them.
#[test]
fn where_there_is_no_room_for_zeros_puts_go_on_without() {
    let fs = SimFs::new();
    let mut persist = open(&fs, &options()).unwrap();
    persist.persist(&[put("a", 1, vec![1; 5_000])]).unwrap();
    fs.set_capacity(Some(fs.used() + 7_000));
    let before = fs.mutations();
    for revision in 2..=23 {
        persist.persist(&[put("b", revision, vec![2; 400])]).unwrap_or_else(|e| panic!("put {revision}: {e}"));
    }
    assert!(fs.mutations() - before < 60, "it does not try again and again");
    drop(persist);
    assert_eq!(load(&mut open(&fs, &options()).unwrap()).unwrap().1.revision.get(), 23);
}

// What was read could not be written again, for want of space, and was taken for durable although a sync had failed.
#[test]
fn where_each_write_takes_new_space_the_reserve_lets_a_full_disk_be_opened() {
    for reserve in [16 << 10, 0] {
        let (fs, options) = (SimFs::new(), options().with_reserve_bytes(reserve));
        let mut persist = open(&fs, &options).unwrap();
        persist.persist(&[put("a", 1, vec![1; 5_000])]).unwrap();
        // The sync, after the write: the disk has the name of the file and not what is in it.
        fs.fail_at(fs.calls() + 1, Fault::Eio, false);
        assert_eq!(persist.persist(&[put("b", 2, vec![2; 5_000])]).unwrap_err().kind(), PersistErrorKind::Poisoned);
        let fs = kill(&fs, persist);
        fs.set_copies_on_write(true);
        fs.set_capacity(Some(fs.used()));
        if reserve == 0 {
            assert_eq!(open(&fs, &options).unwrap_err().kind(), PersistErrorKind::NoSpace, "nothing to write it with");
            fs.set_capacity(None);
        }
        let mut persist = open(&fs, &options).unwrap();
        let state = load(&mut persist).unwrap().0;
        assert_eq!(state.len(), 2);
        persist.persist(&[delete("a", 3)]).unwrap();
        let image = fs.crash(&mut |_| 0);
        let after = load(&mut open(&image, &options).unwrap()).unwrap().0;
        assert_eq!(after.keys().collect::<Vec<_>>(), ["b"]);
    }
}

// Copies of compaction ate the reserve and freed nothing, and from then on deletes were refused for ever.
#[test]
fn scattered_deletes_on_a_full_disk_do_not_come_to_an_end() {
    for value_len in [60, 500, 3_000] {
        let fs = SimFs::new();
        fs.set_capacity(Some(1 << 20));
        let options = FsOptions::default().with_segment_bytes(64 << 10).with_reserve_bytes(96 << 10);
        let mut persist = open(&fs, &options.with_background(false)).unwrap();
        let mut model = Model::new();
        let mut revision = 0;
        loop {
            revision += 1;
            // Some of it is garbage, as it is in life.
            let key = if revision % 8 == 0 { "hot".to_owned() } else { format!("k.{revision}") };
            let batch = [put(&key, revision, vec![3; value_len])];
            match persist.persist(&batch) {
                Ok(()) => apply(&mut model, &batch),
                Err(_) => break,
            }
        }
        drop(persist.maintain());
        // Another program takes a little, so that the reserve does not come back before much is gone.
        fs.set_capacity(Some((1 << 20) - (4 << 10)));
        for offset in 0..7 {
            let keys: Vec<String> = (offset..revision).step_by(7).map(|n| format!("k.{n}")).collect();
            for key in keys.iter().filter(|key| model.remove(*key).is_some()) {
                revision += 1;
                let deleted = persist.persist(&[delete(key, revision)]);
                deleted
                    .unwrap_or_else(|e| panic!("values of {value_len}, {key}: {e}, {:?}", persist.monitor().stats()));
            }
        }
        println!("{:?}", persist.monitor().stats());
        assert_eq!(load(&mut persist).unwrap().0, model);
        persist.maintain().unwrap();
        persist.persist(&[put("again", revision + 1, vec![1; 5_000])]).unwrap();
    }
}

// Each refused put filled the reserve up to the last byte of the disk, and emptied it again.
#[test]
fn puts_that_are_refused_write_next_to_nothing() {
    let fs = SimFs::new();
    fs.set_capacity(Some(10 << 10));
    let mut persist = open(&fs, &options()).unwrap();
    let before = fs.mutations();
    let start = Instant::now();
    for revision in 1..=100 {
        assert_eq!(persist.persist(&[put("a", revision, "1")]).unwrap_err().kind(), PersistErrorKind::NoSpace);
    }
    let tries = 1 + start.elapsed().as_secs();
    let calls = fs.mutations() - before;
    assert!(calls <= 5 * tries, "{calls} calls in {tries} tries");
}

// A tail that was longer than the reserve could not be kept aside, and nothing opened any more.
#[test]
fn a_torn_tail_for_which_there_is_no_room_is_cut_and_the_epoch_changes() {
    let fs = SimFs::new();
    let mut persist = open(&fs, &options()).unwrap();
    let epoch = load(&mut persist).unwrap().1.epoch;
    persist.persist(&[put("a", 1, vec![1; 1_000])]).unwrap();
    let killed = kill(&fs, persist);
    let log = Path::new(DIR).join(&segments(&killed)[0]);
    let torn = [killed.read(&log).unwrap(), vec![7; 40 << 10]].concat();
    killed.place(&log, Some(torn));
    killed.set_capacity(Some(killed.used() + 100));
    for cut in (0..30).chain([u64::MAX]) {
        let image = killed.fork();
        image.set_capacity(Some(killed.used() + 100));
        image.cut_power_at(cut);
        drop(open(&image, &options()));
        let image = image.crash(&mut |_| 1);
        image.set_capacity(Some(killed.used() + 100));
        let (state, loaded) = load(&mut open(&image, &options()).unwrap()).unwrap();
        assert_eq!(state.len(), 1);
        assert_ne!(loaded.epoch, epoch, "cut {cut}");
    }
}

// The same with a reserve that is smaller than a segment: it cannot take the copies, so they must not begin.
#[test]
fn copies_leave_the_reserve_to_deletes_when_it_does_not_take_a_segment() {
    let fs = SimFs::new();
    fs.set_capacity(Some(1 << 20));
    let options = FsOptions::default().with_segment_bytes(64 << 10).with_reserve_bytes(16 << 10);
    let mut persist = open(&fs, &options.with_background(false)).unwrap();
    let mut model = Model::new();
    let mut revision = 0;
    loop {
        revision += 1;
        let key = if revision % 4 == 0 { "hot".to_owned() } else { format!("k.{revision}") };
        let batch = [put(&key, revision, vec![3; 500])];
        match persist.persist(&batch) {
            Ok(()) => apply(&mut model, &batch),
            Err(_) => break,
        }
    }
    drop(persist.maintain());
    assert!(persist.monitor().stats().reserve_held);
    let keys: Vec<String> =
        (0..100).map(|n| format!("k.{}", 16 * n + 1)).filter(|key| model.contains_key(key)).collect();
    for (n, key) in keys.iter().enumerate() {
        revision += 1;
        let deleted = persist.persist(&[delete(key, revision)]);
        deleted.unwrap_or_else(|e| panic!("delete {n}: {e}, {:?}", persist.monitor().stats()));
        model.remove(key);
    }
    assert!(keys.len() > 50);
    assert_eq!(load(&mut persist).unwrap().0, model);
}

/// Fills a small disk, of which one write in `garbage` is of one key, takes a little of it away, and deletes each
/// `stride`th key until all are gone. Says how far the deletes came.
fn delete_scattered(value_len: usize, garbage: u64, stride: usize, taken: u64) -> Result<(), String> {
    let (fs, mut model, mut revision) = (SimFs::new(), Model::new(), 0);
    let capacity = 160 << 10;
    fs.set_capacity(Some(capacity));
    let options = FsOptions::default().with_segment_bytes(16 << 10).with_reserve_bytes(24 << 10);
    let mut persist = open(&fs, &options.with_background(false)).unwrap();
    loop {
        revision += 1;
        let key = if revision % garbage == 0 { "hot".to_owned() } else { format!("k.{revision:06}") };
        let batch = [put(&key, revision, vec![3; value_len])];
        match persist.persist(&batch) {
            Ok(()) => apply(&mut model, &batch),
            Err(_) => break,
        }
    }
    drop(persist.maintain());
    fs.set_capacity(Some(capacity - taken));
    let keys: Vec<String> = model.keys().cloned().collect();
    for (n, key) in (0..stride).flat_map(|first| keys.iter().skip(first).step_by(stride)).enumerate() {
        revision += 1;
        let deleted = persist.persist(&[delete(key, revision)]);
        deleted.map_err(|e| format!("delete {n} of {}: {e}", keys.len()))?;
        model.remove(key);
    }
    assert_eq!(load(&mut persist).unwrap().0, model);
    Ok(())
}

#[test]
fn on_a_small_full_disk_every_key_can_be_deleted_in_any_order() {
    let (mut runs, mut failed) = (0, Vec::new());
    for value_len in [60, 200, 500, 3_000] {
        for garbage in [8, 1_000_000] {
            for stride in [1, 2, 7, 60] {
                for taken in [2 << 10, 5 << 10] {
                    runs += 1;
                    if let Err(error) = delete_scattered(value_len, garbage, stride, taken) {
                        failed.push(format!("{value_len} {garbage} {stride} {taken}: {error}"));
                    }
                }
            }
        }
    }
    println!("TEST scattered_deletes runs={runs} refused={}", failed.len());
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

// What a disk had no room for was found out when another backend had stored its part of the batch.
#[test]
fn a_batch_for_which_there_is_no_room_is_refused_before_it_is_stored_and_room_once_made_is_kept() {
    for durability in [Durability::Sync, Durability::Os] {
        let fs = SimFs::new();
        fs.set_capacity(Some(CAPACITY));
        let mut persist = open(&fs, &options().with_durability(durability)).unwrap();
        let mut model = Model::new();
        let mut revision = 1;
        let mut stored = 0;
        loop {
            let batch = [put(&format!("k.{revision}"), revision, vec![3; 3_000])];
            match persist.prepare(&batch) {
                Ok(prepared) => assert_eq!(prepared, Prepared::Room),
                Err(error) => {
                    assert_eq!(error.kind(), PersistErrorKind::NoSpace);
                    break;
                }
            }
            // Others take all that is left.
            let left = CAPACITY - fs.used();
            fs.place(Path::new("/data/other"), Some(vec![1; usize::try_from(left).unwrap()]));
            persist.persist(&batch).unwrap_or_else(|error| panic!("{durability}, put {revision}: {error}"));
            fs.place(Path::new("/data/other"), None);
            apply(&mut model, &batch);
            (revision, stored) = (revision + 1, stored + 1);
        }
        assert!(stored > 30, "{stored} fit");
        assert_eq!(load(&mut persist).unwrap().0, model);
        let batch = [delete("k.1", revision)];
        assert_eq!(persist.prepare(&batch).unwrap(), Prepared::Room, "deletes have room on a full disk");
        persist.persist(&batch).unwrap();
        apply(&mut model, &batch);
        persist.close().unwrap();
        assert_eq!(load(&mut open(&fs, &options()).unwrap()).unwrap().0, model);
    }
}

/// A disk that is as full as puts can make it, and what is on it.
struct Full {
    persist: FsPersist,
    fs: SimFs,
    options: FsOptions,
    present: BTreeMap<Key, Revision>,
    revision: u64,
}

impl Full {
    fn new(capacity: u64, options: FsOptions) -> Self {
        let (fs, options) = (SimFs::new(), options.with_background(false));
        fs.set_capacity(Some(capacity));
        let persist = FsPersist::open_with(Arc::new(fs.clone()), DIR, options.clone()).unwrap();
        Full { persist, fs, options, present: BTreeMap::new(), revision: 0 }
    }

    /// Puts new keys, `some` at a time, until they are refused.
    fn fill(&mut self, some: u64, key: impl Fn(u64) -> String, value_len: usize) {
        loop {
            let revisions = self.revision + 1..=self.revision + some;
            let batch: Vec<_> = revisions.map(|at| put(&key(at), at, vec![3; value_len])).collect();
            if let Err(error) = self.persist.persist(&batch) {
                assert_eq!(error.kind(), PersistErrorKind::NoSpace, "{error}");
                return;
            }
            self.revision += some;
            self.present.extend(batch.into_iter().map(|change| (change.key, change.revision)));
        }
    }

    /// Deletes this many of the first keys, a slice at a time. Gives how many bytes the records had that say so.
    fn delete(&mut self, count: usize, slice: usize) -> u64 {
        let (keys, mut bytes): (Vec<_>, u64) = (self.present.iter().take(count).collect(), 0);
        for (at, some) in keys.chunks(slice).enumerate() {
            let batch = some.iter().map(|(key, replaces)| {
                self.revision += 1;
                bytes += 28 + key.as_str().len() as u64;
                Change { replaces: **replaces, ..delete(key.as_str(), self.revision) }
            });
            let deleted = self.persist.persist(&batch.collect::<Vec<_>>());
            let stats = self.persist.monitor().stats();
            deleted.unwrap_or_else(|e| panic!("slice {at} of {}: {e}, {stats:?}", keys.len() / slice));
        }
        self.present = self.present.split_off(&keys.last().map_or(Key::new("k").unwrap(), |last| last.0.clone()));
        self.present.pop_first();
        bytes
    }

    /// Nothing is left, and puts find room again.
    fn end(mut self) {
        assert_eq!((self.persist.monitor().stats().keys, self.present.len()), (0, 0));
        self.persist.maintain().unwrap();
        self.persist.persist(&[put("again", self.revision + 1, vec![1; 5_000])]).unwrap();
    }
}

/// Keys of this length, whose order is that of the puts, or none.
fn key_of(len: usize, is_in_order: bool) -> impl Fn(u64) -> String {
    move |at| {
        let number = if is_in_order { at } else { at.wrapping_mul(0x9e37_79b9) & 0xffff_ffff };
        format!("{number:0len$x}")
    }
}

/// How many deletes a slice of a wildcard delete has.
const SLICE: usize = 1_024;

// A wildcard delete was one batch, which found no room on a full disk. On a small disk the only segment could not be
// copied out of the reserve, and slices came to an end too.
#[test]
fn a_branch_of_any_size_can_be_deleted_in_slices_on_a_full_disk() {
    let mut all = vec![(64, 12, 300), (14, KEY_LEN_MAX, 0), (9, KEY_LEN_MAX, 500), (3, KEY_LEN_MAX, 10), (2, 8, 0)];
    if scale() > 1 {
        // More than the longest batch.
        all.push((380, KEY_LEN_MAX, 300));
    }
    for (megabytes, key_len, value_len) in all {
        for is_in_order in [false, true].into_iter().take(if megabytes < 10 { 2 } else { 1 }) {
            let mut full = Full::new(megabytes << 20, FsOptions::default());
            full.fill(64, key_of(key_len, is_in_order), value_len);
            let keys = full.present.len();
            let bytes = full.delete(keys, SLICE);
            full.end();
            println!("TEST branch_on_a_full_disk mib={megabytes} keys={keys} bytes_of_deletes={bytes} refused=0");
        }
    }
}

// What compaction may cost grows with the log, and the reserve did not: deletes ate it up, little by little, and were
// then refused for ever.
#[test]
fn however_large_a_log_is_beside_its_reserve_all_of_it_can_be_deleted() {
    for (segment, megabytes, some, is_in_order) in [(64, 8, 400, true), (16, 2, 100, true), (16, 2, 100, false)] {
        let options = FsOptions::default().with_segment_bytes(segment << 10);
        let mut full = Full::new(megabytes << 20, options.with_reserve_bytes((segment << 10) * 3 / 2));
        full.fill(some, key_of(12, is_in_order), 1);
        full.delete(usize::MAX, 16);
        full.end();
    }
}

// The reserve had half of the room at each opening, and puts the other half, until deletes had none.
#[test]
fn restarts_on_a_full_disk_do_not_use_up_the_room_for_deletes() {
    let mut full = Full::new(8 << 20, FsOptions::default());
    full.fill(64, key_of(KEY_LEN_MAX, false), 0);
    for _ in 0..6 {
        // Few enough that the reserve is eaten and does not come back.
        full.delete(100, 100);
        drop(full.persist);
        full.persist = FsPersist::open_with(Arc::new(full.fs.clone()), DIR, full.options.clone()).unwrap();
        full.fill(64, key_of(KEY_LEN_MAX, false), 0);
    }
    full.delete(usize::MAX, SLICE);
    full.end();
}

// One value that did not fit into the reserve stood first in the log, and none of it could be compacted.
#[test]
fn behind_the_longest_value_all_can_be_deleted() {
    let mut full = Full::new(24 << 20, FsOptions::default());
    full.revision = 1;
    full.persist.persist(&[put("z", 1, vec![1; 8 << 20])]).unwrap();
    full.fill(64, key_of(900, false), 0);
    full.delete(usize::MAX, SLICE);
    assert_eq!(full.persist.monitor().stats().keys, 1);
}
