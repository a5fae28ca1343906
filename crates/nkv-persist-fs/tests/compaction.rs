//! The log stays short, at any speed, and forgets nothing that counts.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::*;
use nkv_core::PersistValue;
use nkv_persist_fs::sim::SimFs;
use nkv_persist_fs::{FsMonitor, FsOptions, FsPersist};

const SEGMENT: u64 = 64 << 10;

/// Two times the live data and one segment; what is stored has been counted already.
fn assert_bounded(monitor: &FsMonitor, frame_bytes: u64) {
    let stats = monitor.stats();
    assert!(stats.disk_bytes <= 2 * stats.live_bytes + SEGMENT + frame_bytes, "{stats:?}");
}

fn small(background: bool) -> FsOptions {
    FsOptions::default().with_segment_bytes(SEGMENT).with_reserve_bytes(0).with_background(background)
}

/// Overwrites random keys as fast as it can, looking at the space after each.
fn overwrite(persist: &mut Storage, keys: usize, writes: u64, value_len_max: usize) -> Model {
    let (monitor, mut rng, mut model) = (persist.monitor(), Rng(9), Model::new());
    for revision in 1..=writes {
        let cold = rng.below(10) > 0;
        let key = if cold { rng.below(keys / 10 + 1) } else { rng.below(keys) };
        let batch = [put(&format!("k.{key}"), revision, vec![revision as u8; rng.below(value_len_max)])];
        persist.persist(&batch).unwrap();
        apply(&mut model, &batch);
        assert_bounded(&monitor, 0);
    }
    model
}

#[test]
fn the_space_is_bounded_at_full_speed_without_any_background_help() {
    for (keys, value_len_max) in [(1, 100), (20, 3_000), (1_000, 400), (5_000, 60)] {
        let fs = SimFs::new();
        let mut persist = open(&fs, &small(false)).unwrap();
        let model = overwrite(&mut persist, keys, 20_000, value_len_max);
        println!("{keys} keys: {:?}", persist.monitor().stats());
        assert!(persist.monitor().stats().compacted_segments > 10);
        drop(persist);
        assert_eq!(load(&mut open(&fs, &small(false)).unwrap()).unwrap().0, model);
    }
}

#[test]
fn the_space_is_bounded_on_a_real_file_system_with_the_thread_and_files_agree() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let mut persist = Storage::from(FsPersist::open(&path, small(true)).unwrap());
    let model = overwrite(&mut persist, 500, 6_000, 700);
    let monitor = persist.monitor();
    persist.close().unwrap();
    let names = std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap());
    let logs = names.filter(|entry| entry.file_name().to_str().unwrap().ends_with(".log"));
    assert_eq!(logs.map(|entry| entry.metadata().unwrap().len()).sum::<u64>(), monitor.stats().disk_bytes);
    println!("{:?}", monitor.stats());
    let mut persist = Storage::from(FsPersist::open(&path, small(true)).unwrap());
    assert_eq!(load(&mut persist).unwrap().0, model);
}

#[test]
fn a_cold_half_is_copied_and_the_bound_holds() {
    let fs = SimFs::new();
    let mut persist = open(&fs, &small(false)).unwrap();
    let monitor = persist.monitor();
    let mut model = Model::new();
    for revision in 1..=6_000 {
        let key = if revision <= 1_000 { format!("cold.{revision}") } else { "hot".to_owned() };
        let batch = [put(&key, revision, vec![7; 1_000])];
        persist.persist(&batch).unwrap();
        apply(&mut model, &batch);
        assert_bounded(&monitor, 0);
    }
    println!("{:?}", monitor.stats());
    assert_eq!(load(&mut persist).unwrap().0, model);
    drop(persist);
    assert_eq!(load(&mut open(&fs, &small(false)).unwrap()).unwrap().0, model);
}

#[test]
fn after_everything_is_deleted_the_space_is_free_and_the_revision_is_kept() {
    let fs = SimFs::new();
    let mut persist = open(&fs, &small(false)).unwrap();
    let monitor = persist.monitor();
    let puts: Vec<_> = (1..=2_000).map(|n| put(&format!("k.{n}"), n, vec![1; 500])).collect();
    puts.chunks(50).for_each(|batch| persist.persist(batch).unwrap());
    let deletes: Vec<_> = (1..=2_000).map(|n| delete(&format!("k.{n}"), 2_000 + n)).collect();
    persist.persist(&deletes).unwrap();
    assert_bounded(&monitor, 0);
    persist.maintain().unwrap();
    assert_bounded(&monitor, 0);
    let stats = monitor.stats();
    assert_eq!((stats.keys, stats.live_bytes, stats.segments), (0, 0, 1), "{stats:?}");
    drop(persist);
    let (state, loaded) = load(&mut open(&fs, &small(false)).unwrap()).unwrap();
    assert_eq!((state.len(), loaded.revision.get()), (0, 4_000));
}

#[test]
fn a_delete_stays_when_the_put_that_it_hides_was_copied_before() {
    let fs = SimFs::new();
    let options = options();
    let mut persist = open(&fs, &options).unwrap();
    persist.persist(&[put("victim", 1, vec![1; 100])]).unwrap();
    let mut revision = 1;
    let mut churn = |persist: &mut Storage, writes: u64| {
        for _ in 0..writes {
            revision += 1;
            persist.persist(&[put("hot", revision, vec![2; 600])]).unwrap();
            persist.maintain().unwrap();
        }
        revision
    };
    let deleted_at = churn(&mut persist, 20) + 1;
    persist.persist(&[delete("victim", deleted_at)]).unwrap();
    for _ in 0..40 {
        let (state, _) = load(&mut open(&fs.crash(&mut |_| 1), &options).unwrap()).unwrap();
        assert!(!state.contains_key("victim"));
        revision = revision.max(deleted_at);
        persist.persist(&[put("hot", revision + 1, vec![2; 600])]).unwrap();
        revision += 1;
        persist.maintain().unwrap();
    }
    assert!(persist.monitor().stats().compacted_segments > 5);
}

#[test]
fn values_of_a_quarter_mebibyte_and_more_are_counted_copied_deleted_and_found_again() {
    let (fs, options) = (SimFs::new(), small(false));
    let mut persist = open(&fs, &options).unwrap();
    let (mut model, mut revision) = (Model::new(), 0);
    let lens = [(256 << 10) - 30, (256 << 10) - 20, 256 << 10, 300_000, 1 << 20];
    let sum = lens.iter().sum::<usize>() as u64;
    for round in 0..3 {
        for (at, len) in lens.into_iter().enumerate() {
            revision += 1;
            let batch = [put(&format!("k.{at}"), revision, vec![round; len])];
            persist.persist(&batch).unwrap();
            apply(&mut model, &batch);
        }
        persist.maintain().unwrap();
        let live = persist.monitor().stats().live_bytes;
        assert!((sum..sum + 300).contains(&live), "{live} of {sum}");
    }
    assert!(persist.monitor().stats().compacted_segments > 5, "{:?}", persist.monitor().stats());
    let batch = [delete("k.2", revision + 1)];
    persist.persist(&batch).unwrap();
    apply(&mut model, &batch);
    let rest = sum - lens[2] as u64;
    for _ in 0..2 {
        let live = persist.monitor().stats().live_bytes;
        assert!((rest..rest + 300).contains(&live), "{live} of {rest}");
        assert_eq!(load(&mut persist).unwrap().0, model);
        drop(persist);
        persist = open(&fs, &options).unwrap();
    }
}
