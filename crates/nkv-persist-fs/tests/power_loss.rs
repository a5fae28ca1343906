//! Power cuts at every call, in every way the simulated disk knows; what comes back is a prefix that has all that was
//! acknowledged, and it can be written on.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use common::*;
use nkv_core::{Change, Epoch, PersistValue};
use nkv_persist_fs::sim::SimFs;
use nkv_persist_fs::{Durability, FsOptions, restore_with};

/// What a process knew when the power went.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    acked: usize,
    issued: usize,
    epoch: Option<Epoch>,
    closed: bool,
}

/// Writes the history until something fails.
fn run(fs: &SimFs, options: &FsOptions, history: &[Vec<Change>]) -> Known {
    run_with(fs, options, history, false)
}

/// The same; batches may be prepared, and now and then another is that does not follow.
fn run_with(fs: &SimFs, options: &FsOptions, history: &[Vec<Change>], prepares: bool) -> Known {
    let mut known = Known::default();
    let Ok(mut persist) = open(fs, options) else { return known };
    let Ok((_, loaded)) = load(&mut persist) else { return known };
    known.epoch = Some(loaded.epoch);
    for batch in history {
        if prepares {
            let other = [put("never.stored", batch[0].revision.get(), vec![7; 1_300])];
            let both = [&other[..], batch];
            if both[known.acked % 2..].iter().any(|batch| persist.prepare(batch).is_err()) {
                return known;
            }
        }
        known.issued += 1;
        if persist.persist(batch).is_err() {
            return known;
        }
        known.acked += 1;
        if known.acked.is_multiple_of(2) && persist.maintain().is_err() {
            return known;
        }
    }
    known.closed = persist.close().is_ok();
    known
}

/// Recovers the image and compares it with the models; gives how many batches survived.
fn check(image: &SimFs, options: &FsOptions, history: &[Vec<Change>], known: Known, what: &str) -> usize {
    let models = models(history);
    let mut persist = open(image, options).unwrap_or_else(|e| panic!("{what}: {e}"));
    let (state, loaded) = load(&mut persist).unwrap_or_else(|e| panic!("{what}: {e}"));
    let is_sync = options_are_sync(options);
    let oldest = if is_sync || known.closed { known.acked } else { 0 };
    // The newest that fits: a batch may change nothing.
    let fits = |p: &usize| models[*p].0 == state && models[*p].1 == loaded.revision.get();
    let survived = (oldest..=known.issued).rev().find(fits);
    let Some(survived) = survived else {
        panic!("{what}: acked {} issued {}: {state:?} at {}", known.acked, known.issued, loaded.revision)
    };
    if let Some(epoch) = known.epoch.filter(|_| survived < known.acked) {
        assert_ne!(loaded.epoch, epoch, "{what}: {survived} of {} and the same epoch", known.acked);
    }
    if known.closed {
        assert_eq!(Some(loaded.epoch), known.epoch, "{what}: a clean end keeps the epoch");
    }
    write_on(image, options, persist, state, what);
    survived
}

/// What was recovered takes more batches, and they survive as well.
fn write_on(image: &SimFs, options: &FsOptions, mut persist: Storage, mut state: Model, what: &str) {
    for batch in [vec![put("k.0", 9_001, vec![1; 700]), put("new", 9_002, "x")], vec![delete("k.1", 9_003)]] {
        persist.persist(&batch).unwrap_or_else(|e| panic!("{what}: {e}"));
        apply(&mut state, &batch);
    }
    let epoch = load(&mut persist).unwrap().1.epoch;
    persist.close().unwrap_or_else(|e| panic!("{what}: {e}"));
    let durable = image.crash(&mut |_| 0);
    let (after, loaded) = load(&mut open(&durable, options).unwrap_or_else(|e| panic!("{what}: {e}"))).unwrap();
    assert_eq!((after, loaded.revision.get(), loaded.epoch), (state, 9_003, epoch), "{what}: after writing on");
}

/// Cuts the power at each call of a history, and tries up to `images_max` different images of each, all if there are
/// fewer.
fn explore(options: &FsOptions, history: &[Vec<Change>], images_max: usize) -> usize {
    explore_with(options, history, images_max, false)
}

fn explore_with(options: &FsOptions, history: &[Vec<Change>], images_max: usize, prepares: bool) -> usize {
    let (mut images, images_max) = (0, images_max * scale());
    for cut in 0.. {
        let fs = SimFs::new();
        fs.cut_power_at(cut);
        let known = run_with(&fs, options, history, prepares);
        let mut choices = Choices::new(images_max, seed() ^ cut);
        let mut seen = HashSet::new();
        loop {
            let image = fs.crash(&mut |n| choices.choose(n));
            if seen.insert(image.digest()) {
                check(&image, options, history, known, &format!("cut {cut}, image {}", choices.count));
            }
            if !choices.advance() {
                break;
            }
        }
        images += seen.len();
        if known.closed {
            return images;
        }
    }
    unreachable!()
}

/// Eight batches at most that begin new segments, and compact if they overwrite: a put of each size that matters,
/// a batch, a delete.
fn workload(seed: u64) -> Vec<Vec<Change>> {
    let (mut rng, mut revision) = (Rng(seed), 0);
    let mut one = |rng: &mut Rng| {
        revision += 1;
        let key = format!("k.{}", rng.below(3));
        match rng.below(6) {
            0 => delete(&key, revision),
            n => put(&key, revision, vec![revision as u8; [0, 40, 500, 1_100, 1_500, 2_100][n]]),
        }
    };
    (0..4 + rng.below(5)).map(|_| (0..1 + rng.below(8) / 6).map(|_| one(&mut rng)).collect()).collect()
}

#[test]
fn in_sync_mode_every_acknowledged_batch_survives_any_power_cut() {
    let (mut images, mut compacted) = (0, 0);
    for history in (0..5).map(|n| workload(seed() + n)) {
        let fs = SimFs::new();
        run(&fs, &options(), &history);
        compacted += usize::from(segments(&fs)[0] != "0000000000000001.log");
        // All if there are 256 or fewer, else 256 in order and 256 at random.
        images += explore(&options(), &history, 512);
    }
    assert!(compacted > 0 || seed() != 1, "no workload compacts");
    println!("TEST sim_power_loss images={images} violations=0 seed={}", seed());
}

#[test]
fn meta_tombstones_and_shared_revisions_survive_any_power_cut() {
    let mut images = 0;
    for (durability, count) in [(Durability::Sync, 40), (Durability::Os, 16)] {
        for prepares in [false, true] {
            let (fs, options) = (SimFs::new(), options().with_durability(durability));
            let history = mixed_history(seed() - 1 + u64::from(prepares), count, 900);
            run(&fs, &options, &history);
            let compacts = *segments(&fs)[0] > *"0000000000000002.log";
            assert!(compacts || durability == Durability::Os || seed() > 1, "this history compacts");
            images += explore_with(&options, &history, 24, prepares);
        }
    }
    println!("TEST sim_power_loss_meta images={images} violations=0 seed={}", seed());
}

#[test]
fn room_that_was_made_for_a_batch_is_no_loss_and_no_damage_after_any_power_cut() {
    let mut images = 0;
    for durability in [Durability::Sync, Durability::Os] {
        for history in (20..23).map(|n| workload(seed() + n)) {
            images += explore_with(&options().with_durability(durability), &history, 64, true);
        }
    }
    println!("TEST sim_power_loss_prepared images={images} violations=0 seed={}", seed());
}

// The room that was made for a batch, which then did not come, was zeros that were not durable. The next batch began a segment:
// a power cut left garbage behind the seal of the one before, and opening was refused.
#[test]
fn room_that_was_made_and_not_used_does_no_harm_when_the_next_segment_begins() {
    let mut images = 0;
    for cut in 0.. {
        let fs = SimFs::new();
        fs.cut_power_at(cut);
        let history = [vec![put("a", 1, vec![1; 1_000])], vec![put("b", 2, vec![2; 3_300])]];
        let mut known = Known::default();
        if let Ok(mut persist) = open(&fs, &options()) {
            known.epoch = load(&mut persist).ok().map(|(_, loaded)| loaded.epoch);
            for batch in &history {
                drop(persist.prepare(&[put("never.stored", 9, vec![7; 1_500])]));
                known.issued += 1;
                known.acked += usize::from(persist.persist(batch).is_ok());
                if known.acked < known.issued {
                    break;
                }
            }
            known.closed = known.acked == history.len() && persist.close().is_ok();
        }
        let mut choices = Choices::new(200 * scale(), seed() ^ cut);
        loop {
            let image = fs.crash(&mut |n| choices.choose(n));
            check(&image, &options(), &history, known, &format!("cut {cut}, image {}", choices.count));
            images += 1;
            if !choices.advance() {
                break;
            }
        }
        if known.closed {
            break;
        }
    }
    println!("{images} images");
}

/// What was issued in the lives so far, and how much of it was acknowledged or seen.
#[derive(Clone, Debug)]
struct Past {
    issued: Vec<Vec<Change>>,
    acked: usize,
}

impl Past {
    /// One more life: recovers, stores a batch that needs a new segment, and compacts, until the power goes. False if
    /// it did not.
    fn live(&mut self, image: &SimFs, what: &str) -> bool {
        let Ok(mut persist) = open(image, &options()) else { return true };
        let Ok((state, loaded)) = load(&mut persist) else { return true };
        let models = models(&self.issued);
        let fits = |p: &usize| models[*p].0 == state && models[*p].1 == loaded.revision.get();
        let found = (self.acked..=self.issued.len()).rev().find(fits);
        let found = found.unwrap_or_else(|| panic!("{what}: {state:?} at {}", loaded.revision));
        self.issued.truncate(found);
        // What was read may have been shown to a client.
        self.acked = found;
        for _ in 0..2 {
            self.issued.push(vec![put("k.9", loaded.revision.get() + 1 + self.issued.len() as u64, vec![9; 2_500])]);
            if persist.persist(&self.issued[self.issued.len() - 1]).is_err() {
                return true;
            }
            self.acked += 1;
        }
        persist.maintain().is_err() || persist.close().is_err()
    }

    /// Cuts the power at each call of another life, and of another after that.
    fn again(&self, image: &SimFs, depth: usize, rng: &mut Rng, what: &str) -> usize {
        let known = Known { acked: self.acked, issued: self.issued.len(), ..Known::default() };
        if depth == 0 {
            check(image, &options(), &self.issued, known, what);
            return 1;
        }
        let mut images = 0;
        for cut in 0.. {
            // Of the third cut a sample.
            if depth == 1 && rng.below(12) >= scale() {
                continue;
            }
            let (fs, mut past, what) = (image.fork(), self.clone(), format!("{what}, then {cut}"));
            fs.cut_power_at(cut);
            let was_cut = past.live(&fs, &what);
            images += past.again(&fs.crash(&mut |n| rng.below(n)), depth - 1, rng, &what);
            if !was_cut {
                return images;
            }
        }
        unreachable!()
    }
}

#[test]
fn a_second_and_a_third_power_cut_in_recovery_or_compaction_lose_nothing_more() {
    let (mut images, mut rng) = (0, Rng(seed()));
    let history = workload(seed());
    for cut in 0.. {
        let fs = SimFs::new();
        fs.cut_power_at(cut);
        let known = run(&fs, &options(), &history);
        let past = Past { issued: history[..known.issued].to_vec(), acked: known.acked };
        images += past.again(&fs.crash(&mut |n| rng.below(n)), 2, &mut rng, &format!("seed {}, cut {cut}", seed()));
        if known.closed {
            break;
        }
    }
    println!("TEST sim_double_crash images={images} violations=0 seed={}", seed());
}

#[test]
fn through_compaction_every_acknowledged_batch_survives_any_power_cut() {
    let fs = SimFs::new();
    let history = history(7, 40, 900);
    run(&fs, &options(), &history);
    assert!(*segments(&fs)[0] > *"0000000000000003.log", "this history compacts: {:?}", segments(&fs));
    println!("{} images", explore(&options(), &history, 24));
}

#[test]
fn in_the_relaxed_modes_a_prefix_survives_and_a_loss_changes_the_epoch() {
    let mut images = 0;
    for durability in [Durability::Os, Durability::Interval(Duration::from_millis(1))] {
        for seed in 0..2 {
            let options = options().with_durability(durability);
            images += explore(&options, &history(seed, 10, 700), 64);
        }
    }
    // Nothing was synced before the new segment is begun.
    let grown: Vec<_> = (1..=2).map(|n| vec![put(&format!("k.{n}"), n, vec![n as u8; 2_500])]).collect();
    images += explore(&options().with_durability(Durability::Os), &grown, 64);
    println!("{images} images");
}

#[test]
fn a_second_and_a_third_power_cut_during_recovery_lose_nothing_more() {
    let history = history(11, 24, 900);
    let mut images = 0;
    let mut rng = Rng(1);
    for durability in [Durability::Sync, Durability::Os] {
        let options = options().with_durability(durability);
        for cut in 0.. {
            let fs = SimFs::new();
            fs.cut_power_at(cut);
            let mut known = run(&fs, &options, &history);
            for _ in 0..10 * scale() {
                let mut image = fs.crash(&mut |n| rng.below(n));
                for _ in 0..2 {
                    image.cut_power_at(rng.below(14) as u64);
                    drop(open(&image, &options));
                    image = image.crash(&mut |n| rng.below(n));
                }
                let closed = std::mem::replace(&mut known.closed, false);
                check(&image, &options, &history, known, &format!("{durability}, cut {cut}"));
                known.closed = closed;
                images += 1;
            }
            if known.closed {
                break;
            }
        }
    }
    println!("{images} images");
}

// A process was killed inside a rotation, when the seal was written and not synced. The next one acknowledged puts in
// the new segment, and a power cut took the seal: opening was refused.
#[test]
fn a_kill_and_then_a_power_cut_lose_nothing_that_was_acknowledged_after_the_kill() {
    let history = history(7, 40, 900);
    let (mut images, mut rng) = (0, Rng(2));
    for (first, second) in
        [(Durability::Sync, Durability::Sync), (Durability::Os, Durability::Sync), (Durability::Sync, Durability::Os)]
    {
        for cut in 0.. {
            let fs = SimFs::new();
            fs.cut_power_at(cut);
            let known = run(&fs, &options().with_durability(first), &history);
            let killed = fs.fork();
            // To fill a reserve is to sync the directory: half of them have none.
            let options = options().with_durability(second).with_reserve_bytes(1024 * (cut % 2));
            let what = format!("{first} killed at {cut}, then {second}");
            let mut persist = open(&killed, &options).unwrap_or_else(|e| panic!("{what}: {e}"));
            let (mut state, loaded) = load(&mut persist).unwrap();
            let batch = [put("acked", loaded.revision.get() + 1, "x")];
            persist.persist(&batch).unwrap();
            persist.maintain().unwrap();
            apply(&mut state, &batch);
            for image in 0..12 * scale() {
                let image = killed.crash(&mut |n| if image < 2 { image } else { rng.below(n) });
                let mut persist = open(&image, &options).unwrap_or_else(|e| panic!("{what}: {e}"));
                assert_eq!(load(&mut persist).unwrap().0, state, "{what}");
                images += 1;
            }
            if known.closed {
                break;
            }
        }
    }
    println!("{images} images");
}

// The frame with the new epoch began a new segment, whose header has the old one. A power cut before the frame was
// durable left a sealed log without a relaxed frame at its end: the old epoch went on, without what it had promised.
#[test]
fn a_loss_in_a_relaxed_mode_changes_the_epoch_though_the_segment_is_full_and_the_power_goes_again() {
    let (os, sync) = (options().with_durability(Durability::Os), options());
    let mut images = 0;
    for last in (3_400..3_990).step_by(8) {
        let fs = SimFs::new();
        let mut persist = open(&fs, &os).unwrap();
        let epoch = load(&mut persist).unwrap().1.epoch;
        persist.persist(&[put("a", 1, vec![1; last])]).unwrap();
        persist.maintain().unwrap();
        persist.persist(&[put("b", 2, "lost")]).unwrap();
        let lost = fs.crash(&mut |_| 0);
        for cut in 0..16 {
            let again = lost.fork();
            again.cut_power_at(cut);
            drop(open(&again, &sync));
            for pick in 0..2 {
                let mut persist = open(&again.crash(&mut |_| pick), &sync).unwrap();
                let (state, loaded) = load(&mut persist).unwrap();
                assert!(!state.contains_key("b"), "this test is about a loss");
                assert_ne!(loaded.epoch, epoch, "value of {last}, cut {cut}, image {pick}");
                images += 1;
            }
        }
    }
    println!("{images} images");
}

#[test]
fn whenever_the_power_goes_a_restored_directory_is_in_the_old_epoch_or_in_a_new_one_with_all_its_values() {
    let fs = SimFs::new();
    let history = history(seed(), 30, 400);
    let mut persist = open(&fs, &options()).unwrap();
    history.iter().for_each(|batch| persist.persist(batch).unwrap());
    let (state, loaded) = load(&mut persist).unwrap();
    persist.close().unwrap();
    let mut rng = Rng(seed());
    for cut in 0.. {
        let fs = fs.fork();
        fs.cut_power_at(cut);
        let is_done = restore_with(Arc::new(fs.clone()), DIR).is_ok();
        for _ in 0..10 {
            let image = fs.crash(&mut |n| rng.below(n));
            let mut persist = open(&image, &options()).unwrap_or_else(|e| panic!("cut {cut}: {e}"));
            let (after, now) = load(&mut persist).unwrap();
            assert_eq!((&after, now.revision), (&state, loaded.revision), "cut {cut}");
            assert!(!is_done || now.epoch != loaded.epoch, "cut {cut}");
        }
        if is_done {
            break;
        }
    }
}
