//! A full disk refuses puts, takes deletes, and takes puts again when there is space.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use common::*;
use nkv_core::{PersistErrorKind, PersistValue};
use nkv_persist_fs::sim::SimFs;
use nkv_persist_fs::{FsOptions, FsPersist};

const CAPACITY: u64 = 200 << 10;

fn options() -> FsOptions {
    FsOptions::default().with_segment_bytes(64 << 10).with_reserve_bytes(16 << 10).with_background(false)
}

/// Puts new keys until there is no space left.
fn fill(persist: &mut FsPersist, model: &mut Model) -> u64 {
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
fn puts_work_again_when_somebody_else_frees_space_and_a_full_disk_can_be_opened() {
    let fs = SimFs::new();
    fs.set_capacity(Some(CAPACITY));
    let mut persist = open(&fs, &options()).unwrap();
    let mut model = Model::new();
    let revision = fill(&mut persist, &mut model);
    drop(persist);
    let mut persist = open(&fs, &options()).unwrap();
    assert_eq!(persist.persist(&[put("big", revision, vec![1; 5_000])]).unwrap_err().kind(), PersistErrorKind::NoSpace);
    fs.set_capacity(Some(2 * CAPACITY));
    persist.persist(&[put("big", revision, vec![1; 5_000])]).unwrap();
}
