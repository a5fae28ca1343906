//! Bytes flip, sectors vanish, files are cut, swapped or lost. Each time the state is right, or a tail that nothing
//! proved durable is cut, or opening is refused with file and offset. Never is it silently wrong.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::*;
use nkv_core::{Change, Epoch, PersistErrorKind, PersistValue};
use nkv_persist_fs::sim::{Fault, SimFs};
use nkv_persist_fs::{Durability, Report, Vfs, check_with, repair_with};

/// What came of a damaged directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Same,
    /// This many batches are missing at the end.
    Cut(usize),
    Refused,
}

struct Subject {
    fs: SimFs,
    models: Vec<(Model, u64)>,
    epoch: Epoch,
}

/// A directory of some segments, written and compacted in sync mode by a process that was killed.
fn subject(seed: u64, batches: usize) -> Subject {
    let fs = SimFs::new();
    let history: Vec<Vec<Change>> = history_of(24, seed, batches, 900);
    let mut persist = open(&fs, &options()).unwrap();
    for batch in &history {
        persist.persist(batch).unwrap();
    }
    Subject::new(kill(&fs, persist), &history)
}

fn path(name: &str) -> PathBuf {
    Path::new(DIR).join(name)
}

fn check(fs: &SimFs) -> Report {
    check_with(Arc::new(fs.clone()), DIR).unwrap()
}

impl Subject {
    fn new(fs: SimFs, history: &[Vec<Change>]) -> Self {
        let epoch = check(&fs).epoch;
        Subject { fs, models: models(history), epoch }
    }

    fn outcome(&self, fs: &SimFs, what: &str) -> Outcome {
        let outcome = self.opened(fs, what);
        if outcome == Outcome::Refused {
            self.repair(fs, what);
        }
        outcome
    }

    fn opened(&self, fs: &SimFs, what: &str) -> Outcome {
        let report = check(fs);
        let mut persist = match open(fs, &options()) {
            Ok(persist) => persist,
            Err(error) => {
                assert_eq!(error.kind(), PersistErrorKind::Damaged, "{what}: {error}");
                let damage = report.damage.unwrap_or_else(|| panic!("{what}: check finds nothing, open {error}"));
                let text = error.to_string();
                assert!(text.contains(&damage.file) && text.contains(&damage.offset.to_string()), "{what}: {text}");
                return Outcome::Refused;
            }
        };
        assert_eq!(report.damage, None, "{what}");
        let (state, loaded) = load(&mut persist).unwrap();
        let newest = self.models.len() - 1;
        let fits = |p: &usize| self.models[*p].0 == state && self.models[*p].1 == loaded.revision.get();
        let found = (0..=newest).rev().find(fits).unwrap_or_else(|| panic!("{what}: silently wrong: {state:?}"));
        if report.torn_bytes > 0 {
            assert_ne!(loaded.epoch, self.epoch, "{what}: cut, and the same epoch");
        }
        if found == newest { Outcome::Same } else { Outcome::Cut(newest - found) }
    }

    /// A repair makes it open again, with some prefix in a new epoch.
    fn repair(&self, fs: &SimFs, what: &str) {
        let epoch = check(fs).epoch;
        let report = repair_with(Arc::new(fs.clone()), DIR).unwrap_or_else(|e| panic!("{what}: {e}"));
        let mut persist = open(fs, &options()).unwrap_or_else(|e| panic!("{what}: after the repair: {e}"));
        let (_, loaded) = load(&mut persist).unwrap();
        assert_ne!(loaded.epoch, epoch, "{what}: {report}");
        persist.persist(&[put("after", 100_000, "repair")]).unwrap();
        drop(persist);
        assert_eq!(load(&mut open(fs, &options()).unwrap()).unwrap().0["after"].revision, 100_000);
    }

    /// A copy in which one file has other bytes.
    fn with(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> SimFs {
        let fs = self.fs.fork();
        let mut bytes = fs.read(&path(name)).unwrap();
        change(&mut bytes);
        fs.place(&path(name), Some(bytes));
        fs
    }
}

#[test]
fn a_flipped_bit_is_never_silently_wrong() {
    let (mut rng, mut counts) = (Rng(21), [0; 3]);
    let subject = subject(1, 60);
    let names = segments(&subject.fs);
    for n in 0..2_000 {
        let name = &names[rng.below(names.len())];
        let mut what = String::new();
        let fs = subject.with(name, |bytes| {
            let (at, bit) = (rng.below(bytes.len()), rng.below(8));
            bytes[at] ^= 1 << bit;
            what = format!("{n}: bit {bit} of byte {at} in {name}");
        });
        match subject.outcome(&fs, &what) {
            Outcome::Same => counts[0] += 1,
            Outcome::Cut(lost) => {
                assert!(lost <= 1 && Some(name) == names.last(), "{what}: {lost} batches are missing");
                counts[1] += 1;
            }
            Outcome::Refused => counts[2] += 1,
        }
    }
    println!("same {}, cut {}, refused {}", counts[0], counts[1], counts[2]);
    assert!(counts[1] > 0 && counts[2] > 0);
}

#[test]
fn damage_before_the_last_batch_is_refused_and_in_the_last_batch_it_is_a_torn_tail() {
    let fs = SimFs::new();
    let history: Vec<_> = (1..=5).map(|n| vec![put("k", n, vec![n as u8; 100])]).collect();
    let mut persist = open(&fs, &options()).unwrap();
    history.iter().for_each(|batch| persist.persist(batch).unwrap());
    let subject = Subject::new(kill(&fs, persist), &history);
    let name = segments(&subject.fs).pop().unwrap();
    let file = subject.fs.read(&path(&name)).unwrap();
    let len = log_end(&file);
    for at in len..file.len() {
        // What is not zero there may be the rest of a frame that a crash has torn.
        let fs = subject.with(&name, |bytes| bytes[at] ^= 0x10);
        assert_eq!(check(&fs).torn_bytes, (at + 1 - len) as u64);
        assert_eq!(subject.outcome(&fs, &format!("byte {at}")), Outcome::Same);
    }
    for at in 0..len {
        let fs = subject.with(&name, |bytes| bytes[at] ^= 0x10);
        let is_last = at >= len - (len - 72) / 5;
        let expected = if is_last { Outcome::Cut(1) } else { Outcome::Refused };
        // The put at revision 5 has an expiry: its frame is longer than its fifth.
        let outcome = subject.outcome(&fs, &format!("byte {at}"));
        assert!(outcome == expected || (at + 200 > len && outcome == Outcome::Cut(1)), "byte {at}: {outcome:?}");
    }
}

// After a clean stop nothing proved the last batch: a flipped bit in it was taken for a torn tail, and the batch was
// cut.
#[test]
fn after_a_clean_end_damage_in_the_last_batch_is_refused_too() {
    let fs = SimFs::new();
    let history = [vec![put("k", 1, vec![1; 50])], vec![put("k", 2, vec![2; 50])]];
    let mut persist = open(&fs, &options()).unwrap();
    history.iter().for_each(|batch| persist.persist(batch).unwrap());
    persist.close().unwrap();
    let subject = Subject::new(fs, &history);
    let name = segments(&subject.fs).pop().unwrap();
    let len = subject.fs.read(&path(&name)).unwrap().len();
    for at in 72..len {
        let fs = subject.with(&name, |bytes| bytes[at] ^= 0x10);
        let expected = if at < len - 40 { Outcome::Refused } else { Outcome::Same };
        let outcome = subject.outcome(&fs, &format!("byte {at}"));
        // A bit of the padding, or of what a reader ignores, may do no harm.
        assert!(outcome == expected || outcome == Outcome::Same, "byte {at}: {outcome:?}");
        assert!(at >= len - 40 || outcome == Outcome::Refused, "byte {at} of a batch: {outcome:?}");
    }
}

#[test]
fn a_zeroed_sector_is_never_silently_wrong() {
    let subject = subject(2, 60);
    let names = segments(&subject.fs);
    for name in &names {
        let len = subject.fs.read(&path(name)).unwrap().len();
        for start in (0..len).step_by(512) {
            let range = start..len.min(start + 512);
            if subject.fs.read(&path(name)).unwrap()[range.clone()].iter().all(|byte| *byte == 0) {
                continue;
            }
            let fs = subject.with(name, |bytes| bytes[range].fill(0));
            let outcome = subject.outcome(&fs, &format!("sector at {start} of {name}"));
            assert!(
                outcome == Outcome::Refused || (Some(name) == names.last() && start + 512 >= len.saturating_sub(3_500))
            );
        }
    }
}

#[test]
fn a_cut_file_is_refused_unless_the_end_of_the_log_was_cut_off() {
    let subject = subject(3, 60);
    let names = segments(&subject.fs);
    for name in &names {
        let file = subject.fs.read(&path(name)).unwrap();
        for cut in (0..file.len()).step_by(61) {
            let fs = subject.with(name, |bytes| bytes.truncate(cut));
            let outcome = subject.outcome(&fs, &format!("{name} cut to {cut}"));
            if cut >= log_end(&file) {
                assert_eq!(outcome, Outcome::Same, "{name}, {cut}");
                continue;
            }
            let is_end = Some(name) == names.last() && cut >= 72;
            assert!(outcome == Outcome::Refused || (is_end && matches!(outcome, Outcome::Cut(_))), "{name}, {cut}");
        }
    }
}

#[test]
fn a_repair_that_a_power_cut_interrupts_can_be_done_again() {
    let subject = subject(7, 60);
    let names = segments(&subject.fs);
    let images = interrupted(&subject, || subject.with(&names[names.len() / 2], |bytes| bytes[700] ^= 1));
    println!("{images} images");
}

// What was left when the later segments were gone looked like the end of a log, in the old epoch.
#[test]
fn a_repair_of_a_segment_that_ends_between_two_frames_can_be_interrupted_too() {
    let fs = SimFs::new();
    let mut persist = open(&fs, &options()).unwrap();
    let history: Vec<_> = (1..=40).map(|at| vec![put(&format!("k.{at}"), at, [1; 600])]).collect();
    history.iter().for_each(|batch| persist.persist(batch).unwrap());
    let subject = Subject::new(kill(&fs, persist), &history);
    let names = segments(&subject.fs);
    let name = &names[names.len() / 2];
    let at = frame_ends(&subject.fs.read(&path(name)).unwrap())[2];
    let images = interrupted(&subject, || subject.with(name, |bytes| bytes.truncate(at)))
        + interrupted(&subject, || subject.with(name, |bytes| bytes[at..].fill(0)));
    println!("{images} images");
}

/// Where the frames of a segment end, the header first.
fn frame_ends(bytes: &[u8]) -> Vec<usize> {
    let mut ends = vec![72];
    while let Some(frame) = bytes[ends[ends.len() - 1]..].strip_prefix(b"nkvF") {
        let body_len = u32::from_le_bytes(frame[4..8].try_into().unwrap()) as usize;
        ends.push(ends[ends.len() - 1] + (40 + body_len).next_multiple_of(8));
    }
    ends
}

/// Cuts the power at each step of a repair: what is left is refused, and repaired as it would have been, or is repaired.
/// Gives the number of images.
fn interrupted(subject: &Subject, damaged: impl Fn() -> SimFs) -> usize {
    let (mut rng, mut images) = (Rng(3), 0);
    let repaired = |fs: &SimFs| {
        repair_with(Arc::new(fs.clone()), DIR).unwrap();
        load(&mut open(fs, &options()).unwrap()).unwrap()
    };
    let (saved, at) = repaired(&damaged());
    for cut in 0.. {
        let fs = damaged();
        fs.cut_power_at(cut);
        let is_done = repair_with(Arc::new(fs.clone()), DIR).is_ok();
        for _ in 0..20 {
            let image = fs.crash(&mut |n| rng.below(n));
            let (state, loaded) = match open(&image, &options()) {
                Ok(mut persist) => load(&mut persist).unwrap(),
                Err(error) => {
                    assert_eq!(error.kind(), PersistErrorKind::Damaged, "cut {cut}: {error}");
                    repaired(&image)
                }
            };
            assert_eq!((state, loaded.revision), (saved.clone(), at.revision), "cut {cut}");
            assert_ne!(loaded.epoch, subject.epoch, "cut {cut}");
            images += 1;
        }
        if is_done {
            break;
        }
    }
    images
}

/// All changes of a history, by their keys.
fn changes_of(history: &[Vec<Change>]) -> BTreeMap<String, Vec<Change>> {
    let mut changes: BTreeMap<String, Vec<Change>> = BTreeMap::new();
    for change in history.iter().flatten() {
        changes.entry(change.key.to_string()).or_default().push(change.clone());
    }
    changes
}

// One flipped bit in an early segment dropped 12,062 of 12,236 keys, and what a repair would drop was not said.
#[test]
fn a_repair_loses_what_stood_in_the_damaged_frame_and_nothing_else() {
    let fs = SimFs::new();
    let mut persist = open(&fs, &options()).unwrap();
    let history: Vec<_> = (1..=400).map(|at| vec![put(&format!("k.{at}"), at, [1; 60])]).collect();
    history.iter().for_each(|batch| persist.persist(batch).unwrap());
    let subject = Subject::new(kill(&fs, persist), &history);
    let name = &segments(&subject.fs)[1];
    let at = frame_ends(&subject.fs.read(&path(name)).unwrap())[3];
    let fs = subject.with(name, |bytes| bytes[at + 50] ^= 1);
    let report = check(&fs);
    let [lost] = &report.lost[..] else { panic!("{report}") };
    assert_eq!((&lost.file, lost.offset, report.kept_keys, report.dropped_keys), (name, at as u64, 399, 0));
    assert_eq!(lost.before.unwrap().get() - lost.after.get(), 2, "{report}");
    let text = report.to_string();
    let revision = lost.after.get() + 1;
    assert!(
        text.contains("a repair keeps 399 keys") && text.contains(&format!("the revisions {revision} to ")),
        "{text}"
    );
    let kept = repair_with(Arc::new(fs.clone()), DIR).unwrap();
    assert_eq!((&kept.lost, kept.kept_keys), (&report.lost, 399));
    let mut expected = subject.models.last().unwrap().0.clone();
    expected.remove(&format!("k.{revision}")).unwrap();
    assert_eq!(load(&mut open(&fs, &options()).unwrap()).unwrap().0, expected);
    assert!(fs.read(&path(&format!("{name}.broken-0000000000000000"))).is_some());
}

/// Damages a store in some places.
fn damage_somewhere(fs: &SimFs, rng: &mut Rng) -> String {
    let mut what = String::new();
    for _ in 0..1 + rng.below(3) {
        let names = segments(fs);
        let name = &names[rng.below(names.len())];
        let mut bytes = fs.read(&path(name)).unwrap();
        let (at, mut kind) = (rng.below(bytes.len().max(1)), rng.below(8));
        if Some(name) == names.last() && (kind > 0 || names.len() == 1) {
            // A log that ends early looks like one of which less was written.
            kind = 7;
        }
        match kind {
            0 => fs.place(&path(name), None),
            1 => bytes.truncate(at),
            2 => bytes.iter_mut().skip(at / 512 * 512).take(512).for_each(|byte| *byte = 0),
            _ => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << rng.below(8)),
        }
        if kind > 0 {
            fs.place(&path(name), Some(bytes));
        }
        what.push_str(&format!("{name}: {kind} at {at}; "));
    }
    what
}

// A record behind damage may replace one that is lost: then the one before that came back, at once or with a restart.
#[test]
fn a_repair_brings_nothing_back_that_a_record_which_can_be_read_has_replaced() {
    let (mut repaired, mut lost_nothing, mut later) = (0, 0, 0);
    for round in 0..150 * scale() as u64 {
        let mut rng = Rng(seed() + round);
        let history = match round % 3 {
            0 => mixed_history(seed() + round, 80, 400),
            _ => history_of(4 + rng.below(40), seed() + round, 80, 400),
        };
        let fs = SimFs::new();
        let mut persist = open(&fs, &options()).unwrap();
        history.iter().for_each(|batch| persist.persist(batch).unwrap());
        let subject = Subject::new(kill(&fs, persist), &history);
        let what = format!("round {round}: {}", damage_somewhere(&subject.fs, &mut rng));
        if open(&subject.fs.fork(), &options()).is_ok() {
            continue;
        }
        let fs = subject.fs.fork();
        let report = repair_with(Arc::new(fs.clone()), DIR).unwrap_or_else(|e| panic!("{what}: {e}"));
        repaired += 1;
        let may_be_lost = |change: &Change| report.lost.iter().any(|lost| lost.may_hold(change.revision));
        let (state, loaded) = load(&mut open(&fs, &options()).unwrap()).unwrap();
        let values = state.values().filter(|kept| kept.value.is_some()).count();
        assert_eq!(values, report.kept_keys, "{what}");
        let newest = history.iter().flatten().filter(|change| !may_be_lost(change)).map(|change| change.revision).max();
        assert!(newest.is_none_or(|newest| newest <= loaded.revision), "{what}: {newest:?}, {loaded:?}");
        let model = &subject.models.last().unwrap().0;
        lost_nothing += usize::from(state == *model);
        for (key, kept) in &state {
            let changes = &changes_of(&history)[key];
            let at = changes.iter().position(|change| change.revision.get() == kept.revision).unwrap();
            let mut left = Model::new();
            apply(&mut left, &changes[at..=at]);
            assert_eq!(left.get(key), Some(kept), "{what}");
            let unlost = changes[at + 1..].iter().find(|change| !may_be_lost(change));
            // A change is not there although it stood behind what is lost: its copy is lost. What it replaced is older.
            assert!(unlost.is_none(), "{what}: {key}: {kept:?}, and later {unlost:?}; {report}");
        }
        // Later writes and compactions, and a restart, bring nothing back either.
        let mut persist = open(&fs, &options()).unwrap();
        let mut expected = state;
        for revision in 1_001..=1_120 {
            let key = format!("k.{}", rng.below(40));
            let batch =
                [if rng.below(3) == 0 { delete(&key, revision) } else { put(&key, revision, vec![9; rng.below(400)]) }];
            persist.persist(&batch).unwrap();
            apply(&mut expected, &batch);
        }
        later += usize::from(persist.monitor().stats().compacted_segments > 0);
        drop(persist);
        assert_eq!(load(&mut open(&fs, &options()).unwrap()).unwrap().0, expected, "{what}");
        assert_eq!(check(&fs).damage, None, "{what}");
    }
    println!("TEST repairs_of_random_damage repaired={repaired} lost_nothing={lost_nothing} brought_back=0");
    assert!(repaired > 50 && later > 50);
}

// What another program has written may replace or delete what stands before it. To leave it out would bring that back.
#[test]
fn a_repair_uses_nothing_behind_a_whole_frame_that_it_does_not_understand() {
    let subject = subject(7, 60);
    let names = segments(&subject.fs);
    let name = &names[1];
    let bytes = subject.fs.read(&path(name)).unwrap();
    let (salt, at) = (u32::from_le_bytes(bytes[12..16].try_into().unwrap()), frame_ends(&bytes)[1]);
    let fs = subject.with(name, |bytes| {
        bytes[at + 33] |= 1;
        let crc = crc32c::crc32c_append(salt, &bytes[at + 8..at + 40]);
        bytes[at + 4..at + 8].copy_from_slice(&crc.to_le_bytes());
    });
    let report = check(&fs);
    assert!(report.dropped_keys > 5, "{report}");
    assert!(report.lost.iter().all(|lost| lost.before.is_none()));
    repair_with(Arc::new(fs.clone()), DIR).unwrap();
    let (state, _) = load(&mut open(&fs, &options()).unwrap()).unwrap();
    assert_eq!(state.len(), report.kept_keys);
    assert!(state.values().all(|kept| kept.revision <= report.damage.as_ref().unwrap().last_good.get()));
    assert_eq!(kept_aside(&fs).len(), names.len() - 1);
}

#[test]
fn a_repair_for_which_there_is_no_room_changes_nothing() {
    let subject = subject(7, 60);
    let fs = subject.with(&segments(&subject.fs)[2], |bytes| bytes[700] ^= 1);
    let full = fs.fork();
    full.set_capacity(Some(fs.used() + 5_000));
    let before = (segments(&full), check(&full));
    assert_eq!(repair_with(Arc::new(full.clone()), DIR).unwrap_err().kind(), PersistErrorKind::NoSpace);
    assert_eq!((segments(&full), check(&full)), before);
    full.set_capacity(None);
    assert_eq!(repair_with(Arc::new(full), DIR).unwrap().lost, before.1.lost);
}

#[test]
fn data_of_another_version_is_refused_and_a_repair_leaves_it_as_it_is() {
    let subject = subject(1, 40);
    let names = segments(&subject.fs);
    let of_version = |version: u8| {
        move |bytes: &mut Vec<u8>| {
            bytes[8] = version;
            let crc = crc32c::crc32c(&bytes[..64]);
            bytes[64..68].copy_from_slice(&crc.to_le_bytes());
        }
    };
    let last = &names[names.len() - 1];
    for fs in [
        subject.with(last, of_version(1)),
        subject.with(last, of_version(4)),
        subject.with(&names[0], of_version(4)),
        // As if its making had been interrupted.
        subject.with(last, |bytes| {
            of_version(4)(bytes);
            bytes.truncate(72);
        }),
    ] {
        let before = fs.digest();
        let refused = [
            open(&fs, &options()).map(drop).unwrap_err(),
            check_with(Arc::new(fs.clone()), DIR).map(drop).unwrap_err(),
            repair_with(Arc::new(fs.clone()), DIR).map(drop).unwrap_err(),
        ];
        for error in refused {
            assert_eq!(error.kind(), PersistErrorKind::OtherVersion, "{error}");
            assert!(error.to_string().contains("reads versions 2 to 3:"), "{error}");
        }
        assert_eq!(fs.digest(), before);
    }
}

// After a repair numbers of segments are given again. What the next one dropped was not kept, or took the place of what
// the first had kept.
#[test]
fn what_an_earlier_repair_kept_under_the_same_name_stays() {
    let subject = subject(7, 60);
    let names = segments(&subject.fs);
    let damaged = &names[names.len() - 2];
    let name = format!("{damaged}.broken-0000000000000000");
    for earlier in [b"short".to_vec(), vec![7; 100_000]] {
        let fs = subject.with(damaged, |bytes| bytes[700] ^= 1);
        let dropped = fs.read(&path(damaged));
        fs.place(&path(&name), Some(earlier.clone()));
        repair_with(Arc::new(fs.clone()), DIR).unwrap();
        assert!(fs.read(&path(&name)) == Some(earlier), "it was written over");
        assert!(fs.read(&path(&format!("{name}-1"))) == dropped, "it was not kept");
    }
}

// The newest segment knew where the log begins, and went first. Then the log seemed to begin with a segment that was no
// longer needed, and what the repair was to save was dropped.
#[test]
fn a_repair_is_not_misled_by_a_segment_that_is_no_longer_needed() {
    let fs = SimFs::new();
    let history = history_of(24, 7, 60, 900);
    let mut persist = open(&fs, &options()).unwrap();
    let mut files = BTreeMap::new();
    for batch in &history {
        persist.persist(batch).unwrap();
        files.extend(segments(&fs).into_iter().map(|name| (name.clone(), fs.read(&path(&name)))));
    }
    let subject = Subject::new(kill(&fs, persist), &history);
    let names = segments(&subject.fs);
    let (leftover, bytes) = files.range(..names[0].clone()).next_back().unwrap();
    let damaged = |has_leftover: bool| {
        let fs = subject.with(&names[0], |bytes| bytes[20] ^= 1);
        let later = &names[names.len() - 2];
        let mut bytes_of_later = fs.read(&path(later)).unwrap();
        bytes_of_later[700] ^= 1;
        fs.place(&path(later), Some(bytes_of_later));
        if has_leftover {
            fs.place(&path(leftover), bytes.clone());
        }
        fs
    };
    let repaired = |fs: &SimFs| {
        repair_with(Arc::new(fs.clone()), DIR).unwrap();
        load(&mut open(fs, &options()).unwrap()).unwrap().0
    };
    let saved = repaired(&damaged(false));
    assert!(saved.len() > 5, "this test is about a store of which something is saved: {}", saved.len());
    let mut rng = Rng(3);
    for cut in 0.. {
        let fs = damaged(true);
        fs.cut_power_at(cut);
        let is_done = repair_with(Arc::new(fs.clone()), DIR).is_ok();
        for _ in 0..10 {
            let image = fs.crash(&mut |n| rng.below(n));
            let state = open(&image, &options()).map(|mut persist| load(&mut persist).unwrap().0);
            assert_eq!(state.unwrap_or_else(|_| repaired(&image)), saved, "cut {cut}");
        }
        if is_done {
            break;
        }
    }
}

// All was lost, but for what was kept aside, where a missing file would have cost next to nothing.
#[test]
fn a_repair_without_the_header_of_the_oldest_segment_keeps_what_stands_behind() {
    let subject = subject(7, 60);
    let oldest = &segments(&subject.fs)[0];
    let flipped = subject.with(oldest, |bytes| bytes[20] ^= 1);
    let gone = subject.fs.fork();
    gone.place(&path(oldest), None);
    let bytes = subject.fs.read(&path(oldest)).unwrap().len() as u64;
    for (fs, bytes) in [(&flipped, bytes), (&gone, 0)] {
        let lost = &check(fs).lost;
        assert_eq!((lost.len(), &lost[0].file, lost[0].offset, lost[0].bytes), (1, oldest, 0, bytes));
    }
    let [of_flipped, of_gone] = [&flipped, &gone].map(|fs| {
        repair_with(Arc::new(fs.clone()), DIR).unwrap();
        load(&mut open(fs, &options()).unwrap()).unwrap().0
    });
    assert!(of_gone.len() > 10, "this test is about a store that has more segments");
    assert_eq!(of_flipped, of_gone);
    assert_eq!(kept_aside(&flipped).len(), 1);
}

#[test]
fn missing_and_swapped_segments_are_refused() {
    let subject = subject(4, 60);
    let names = segments(&subject.fs);
    assert!(names.len() > 2);
    for (n, name) in names.iter().enumerate() {
        let fs = subject.fs.fork();
        fs.place(&path(name), None);
        assert!(check(&fs).to_string().contains("the segment is missing"));
        assert_eq!(subject.outcome(&fs, &format!("{name} is missing")), Outcome::Refused);
        for other in &names[n + 1..] {
            let fs = subject.fs.fork();
            fs.place(&path(name), subject.fs.read(&path(other)));
            fs.place(&path(other), subject.fs.read(&path(name)));
            assert_eq!(subject.outcome(&fs, &format!("{name} and {other} are swapped")), Outcome::Refused);
        }
    }
    let fs = subject.fs.fork();
    names.iter().for_each(|name| fs.place(&path(name), None));
    assert_eq!(subject.outcome(&fs, "no segment at all"), Outcome::Refused);
}

/// A store whose last frames are the copies of a compaction and the record of the new head, which was acted upon.
fn just_compacted() -> (Subject, String, usize) {
    let fs = SimFs::new();
    let mut history = vec![vec![put("cold", 1, vec![1; 300])]];
    let mut persist = open(&fs, &options()).unwrap();
    persist.persist(&history[0]).unwrap();
    let copied = |persist: &Storage| persist.monitor().stats().copied_bytes;
    for revision in 2.. {
        let batch = vec![put("hot", revision, vec![2; 700])];
        persist.persist(&batch).unwrap();
        history.push(batch);
        let before = copied(&persist);
        persist.maintain().unwrap();
        if copied(&persist) > before {
            break;
        }
    }
    let subject = Subject::new(kill(&fs, persist), &history);
    let name = segments(&subject.fs).pop().unwrap();
    let end = log_end(&subject.fs.read(&path(&name)).unwrap());
    (subject, name, end)
}

/// The length of a frame with the record *head* alone.
const HEAD_FRAME: usize = 72;

// The head is in the frame behind the damage, and neither proves that the one before had been durable. Without a look
// at it the copies were cut off as a torn tail, and what they are copies of is gone.
#[test]
fn a_head_behind_damage_that_was_acted_upon_is_not_overlooked() {
    let (subject, name, len) = just_compacted();
    let copies =
        (0..len - HEAD_FRAME).rev().find(|at| subject.fs.read(&path(&name)).unwrap()[*at..].starts_with(b"nkvF"));
    let copies = copies.unwrap();
    for at in copies..len - HEAD_FRAME {
        let fs = subject.with(&name, |bytes| bytes[at] ^= 0x10);
        let damage = check(&fs).damage.unwrap_or_else(|| panic!("byte {at} of the copies: no damage"));
        assert_eq!((damage.file.as_str(), damage.offset), (name.as_str(), copies as u64), "byte {at}");
        assert_eq!(subject.outcome(&fs, &format!("byte {at} of the copies")), Outcome::Refused);
    }
}

// It was durable before a segment was taken away: that is damage, with its place, and a repair loses nothing.
#[test]
fn a_damaged_last_head_is_refused_with_its_place_and_a_repair_keeps_everything() {
    let (subject, name, len) = just_compacted();
    for at in len - HEAD_FRAME..len {
        let fs = subject.with(&name, |bytes| bytes[at] ^= 0x10);
        let damage = check(&fs).damage.unwrap_or_else(|| panic!("byte {at} of the head: no damage"));
        assert_eq!((damage.file.as_str(), damage.offset), (name.as_str(), (len - HEAD_FRAME) as u64), "byte {at}");
        assert_eq!(subject.outcome(&fs, &format!("byte {at} of the head")), Outcome::Refused);
        let (mut state, _) = load(&mut open(&fs, &options()).unwrap()).unwrap();
        state.remove("after");
        assert_eq!(state, subject.models.last().unwrap().0, "byte {at}");
    }
}

#[test]
fn a_lost_lock_file_and_a_lost_reserve_change_nothing() {
    for name in ["LOCK", "reserve"] {
        let subject = subject(5, 20);
        let fs = subject.fs.fork();
        fs.place(&path(name), None);
        drop(open(&fs, &options()).unwrap());
        assert_eq!(subject.outcome(&fs, name), Outcome::Same);
    }
}

// The header of a segment whose making was interrupted says how far the log had been durable.
#[test]
fn damage_before_a_segment_whose_making_was_interrupted_is_refused() {
    let history: Vec<_> = (1..=2).map(|n| vec![put(&format!("k.{n}"), n, vec![n as u8; 2_500])]).collect();
    let mut unsealed = 0;
    for cut in 0..30 {
        let fs = SimFs::new();
        fs.cut_power_at(cut);
        let run = |mut persist: Storage| history.iter().try_for_each(|batch| persist.persist(batch));
        drop(open(&fs, &options()).and_then(run));
        let killed = fs.fork();
        let names = segments(&killed);
        let len = |name: &str| killed.read(&path(name)).unwrap().len();
        if names.len() == 2 && len(&names[1]) == 72 {
            unsealed += usize::from(check(&killed).torn_bytes == 0 && open(&killed.fork(), &options()).is_ok());
            let subject = Subject::new(killed.fork(), &history[..1]);
            let fs = subject.with(&names[0], |bytes| bytes[1_000] ^= 1);
            assert_eq!(subject.outcome(&fs, &format!("cut {cut}")), Outcome::Refused);
        }
    }
    assert!(unsealed > 0);
}

// Two lives of one store, of the same epoch: a segment of the one does not fit into the other.
#[test]
fn a_segment_of_another_past_is_refused() {
    let fs = SimFs::new();
    open(&fs, &options()).unwrap().persist(&[put("a", 1, "1")]).unwrap();
    let other = fs.fork();
    for (fs, len) in [(&fs, 2_000), (&other, 1_900)] {
        let mut persist = open(fs, &options()).unwrap();
        (2..5).for_each(|n| persist.persist(&[put(&format!("k.{n}"), n, vec![1; len])]).unwrap());
    }
    let name = &segments(&fs)[1];
    fs.place(&path(name), other.read(&path(name)));
    let damage = check(&fs).damage.unwrap();
    assert_eq!((&damage.file, damage.offset), (name, 0), "{damage}");
    assert_eq!(open(&fs, &options()).unwrap_err().kind(), PersistErrorKind::Damaged);
    // What it holds is no part of this log.
    let foreign = fs.read(&path(name));
    repair_with(Arc::new(fs.clone()), DIR).unwrap();
    let (state, _) = load(&mut open(&fs, &options()).unwrap()).unwrap();
    assert!(
        state.contains_key("a") && state.values().all(|kept| kept.value.as_ref().unwrap().len() != 1_900),
        "{:?}",
        state.keys()
    );
    assert_eq!(fs.read(&path(&format!("{name}.broken-0000000000000000"))), foreign);
}

// A file with a number that no segment has was taken for the newest segment, and a repair could not make one behind it.
#[test]
fn a_name_with_a_number_that_cannot_be_is_a_foreign_file() {
    let subject = subject(5, 20);
    for number in [0, u64::MAX / 2 + 1, u64::MAX] {
        let fs = subject.fs.fork();
        fs.place(&path(&format!("{number:016x}.log")), Some(b"text".to_vec()));
        assert_eq!(subject.outcome(&fs, "not ours"), Outcome::Same);
    }
}

#[test]
fn a_torn_tail_is_kept_aside_byte_by_byte() {
    let subject = subject(6, 10);
    let name = segments(&subject.fs).pop().unwrap();
    let torn = b"half a frame".to_vec();
    let end = log_end(&subject.fs.read(&path(&name)).unwrap());
    // With zeros behind it, which are not kept, and without.
    for zeros in [0, 1, 3_000] {
        let fs = subject.with(&name, |bytes| {
            bytes.truncate(end);
            bytes.extend_from_slice(&torn);
            bytes.resize(end + torn.len() + zeros, 0);
        });
        assert_eq!(check(&fs).torn_bytes, torn.len() as u64);
        assert_eq!(subject.outcome(&fs, "torn"), Outcome::Same);
        assert_eq!(fs.read(&path(&format!("{name}.broken-{end:016x}"))).as_ref(), Some(&torn));
    }
}

/// What is kept aside.
fn kept_aside(fs: &SimFs) -> Vec<(String, Option<Vec<u8>>)> {
    let names = fs.list(Path::new(DIR)).unwrap().into_iter().filter(|name| name.contains(".broken-"));
    names.map(|name| (name.clone(), fs.read(&path(&name)))).collect()
}

// A copy whose sync had failed was long enough at the next opening, which did not write it again: a power cut took the
// copy after the original.
#[test]
fn what_is_cut_is_kept_aside_although_a_call_failed_before_and_the_power_went_after() {
    let subject = subject(6, 30);
    let names = segments(&subject.fs);
    let torn = subject.with(&names[names.len() - 1], |bytes| bytes.extend_from_slice(&[7; 700]));
    let damaged = subject.with(&names[names.len() / 2], |bytes| bytes[700] ^= 1);
    for (fs, is_damaged) in [(torn, false), (damaged, true)] {
        let mend = |fs: &SimFs| match is_damaged {
            true => repair_with(Arc::new(fs.clone()), DIR).map(drop),
            false => open(fs, &options()).map(drop),
        };
        let whole = fs.fork();
        mend(&whole).unwrap();
        assert!(!kept_aside(&whole).is_empty());
        for call in 0.. {
            let fs = fs.fork();
            fs.fail_at(call, Fault::Eio, false);
            let first = mend(&fs);
            if fs.calls() <= call {
                break;
            }
            if !fs.has_doubtful_dir() {
                mend(&fs).unwrap();
                let is_kept = kept_aside(&fs.crash(&mut |_| 0)) == kept_aside(&whole);
                assert!(is_kept, "call {call}, damaged {is_damaged}, {first:?}");
            }
        }
    }
}

/// A small store of thirty keys over several segments; what a clean end proves, if there is one.
fn small_store(ends_cleanly: bool) -> Subject {
    let fs = SimFs::new();
    let mut rng = Rng(seed());
    let mut history = Vec::new();
    for revision in 1..=36 {
        // The last of them are overwritten, and there is a delete.
        let key = format!("k.{:02}", revision.min(31) % 30);
        let change =
            if revision == 20 { delete("k.03", 20) } else { put(&key, revision, vec![7; 40 + rng.below(300)]) };
        history.push(vec![change]);
    }
    let mut persist = open(&fs, &options()).unwrap();
    history.iter().for_each(|batch| persist.persist(batch).unwrap());
    if ends_cleanly {
        persist.close().unwrap();
        return Subject::new(fs.fork(), &history);
    }
    Subject::new(kill(&fs, persist), &history)
}

/// No frame with a record is shorter.
const FRAME_MIN: usize = 64;

/// What came of many damaged directories.
#[derive(Default)]
struct Tally {
    images: usize,
    same: usize,
    cut: usize,
    refused: usize,
}

impl Tally {
    /// Opens a damaged store. `may_lose`: how many batches nothing proves any more, the last frame being harmed.
    fn add(&mut self, subject: &Subject, fs: &SimFs, may_lose: usize, what: &str) {
        self.images += 1;
        // A repair takes longer than all else: one in sixteen is tried.
        let is_repaired = self.images.is_multiple_of(16) || scale() > 1;
        match if is_repaired { subject.outcome(fs, what) } else { subject.opened(fs, what) } {
            Outcome::Same => self.same += 1,
            Outcome::Refused => self.refused += 1,
            Outcome::Cut(lost) => {
                assert!(lost <= may_lose, "{what}: {lost} acknowledged batches are missing");
                self.cut += 1;
            }
        }
    }
}

#[test]
fn damage_in_every_byte_of_a_small_store_is_never_silently_wrong() {
    let mut tally = Tally::default();
    // The fast run takes each second byte with one of the masks (which the figures say), the long one each with all.
    let step = if scale() > 1 { 1 } else { 8 };
    for ends_cleanly in [true, false] {
        let subject = small_store(ends_cleanly);
        let names = segments(&subject.fs);
        assert!(names.len() > 2, "{names:?}");
        for (file, name) in names.iter().enumerate() {
            let bytes = subject.fs.read(&path(name)).unwrap();
            let last_frame = (0..bytes.len()).rev().find(|at| bytes[*at..].starts_with(b"nkvF")).unwrap();
            // Nothing proves what stands before the last frame but the last frame.
            let harms_last = |damage_end: usize| file + 1 == names.len() && damage_end > last_frame;
            for (n, mask) in [0x01, 0x80, 0x10, 0xff].into_iter().enumerate() {
                for at in ((file + 2 * n) % step..bytes.len()).step_by(step) {
                    let fs = subject.with(name, |bytes| bytes[at] ^= mask);
                    let may_lose = usize::from(harms_last(at + 1));
                    tally.add(&subject, &fs, may_lose, &format!("byte {at} of {name} with {mask:02x}"));
                }
            }
            for start in (0..bytes.len()).step_by(512) {
                let fs = subject.with(name, |bytes| bytes.iter_mut().skip(start).take(512).for_each(|byte| *byte = 0));
                // As many as had a byte in the sector.
                let may_lose = if harms_last(start + 512) { 1 + 512 / FRAME_MIN } else { 0 };
                tally.add(&subject, &fs, may_lose, &format!("sector at {start} of {name}"));
            }
            for len in (file % step..bytes.len()).step_by(step) {
                // A cut between frames looks like a crash that took what came later.
                let fs = subject.with(name, |bytes| bytes.truncate(len));
                let is_last = file + 1 == names.len();
                let may_lose = if is_last && len >= 72 { (bytes.len() - len).div_ceil(FRAME_MIN) } else { 0 };
                tally.add(&subject, &fs, may_lose, &format!("{name} cut to {len}"));
            }
        }
        files_gone_astray(&subject, &names, &mut tally);
    }
    let Tally { images, same, cut, refused } = tally;
    assert!(same > 0 && cut > 0 && refused > 0);
    let stride = if step == 1 { 1 } else { 2 };
    println!(
        "TEST damage_every_byte stride={stride} images={images} same={same} cut={cut} refused={refused} silently_wrong=0"
    );
}

/// Segments swapped, removed, and there twice; other files gone.
fn files_gone_astray(subject: &Subject, names: &[String], tally: &mut Tally) {
    let last = u64::from_str_radix(names[names.len() - 1].trim_end_matches(".log"), 16).unwrap();
    for name in names {
        let gone = subject.fs.fork();
        gone.place(&path(name), None);
        tally.add(subject, &gone, 0, &format!("{name} is gone"));
        for other in names.iter().filter(|other| *other != name) {
            let swapped = subject.fs.fork();
            swapped.place(&path(name), subject.fs.read(&path(other)));
            swapped.place(&path(other), subject.fs.read(&path(name)));
            tally.add(subject, &swapped, 0, &format!("{name} and {other} are swapped"));
            let copied = subject.fs.fork();
            copied.place(&path(name), subject.fs.read(&path(other)));
            tally.add(subject, &copied, 0, &format!("{name} is a copy of {other}"));
        }
        for number in [last + 1, last + 2, u64::MAX] {
            let twice = subject.fs.fork();
            twice.place(&path(&format!("{number:016x}.log")), subject.fs.read(&path(name)));
            tally.add(subject, &twice, 0, &format!("{name} is there as {number:016x} too"));
        }
    }
    for name in ["LOCK", "reserve"] {
        let gone = subject.fs.fork();
        gone.place(&path(name), None);
        drop(open(&gone, &options()).unwrap());
        tally.add(subject, &gone, 0, &format!("{name} is gone"));
    }
}

// Each hole was read up to the end of the segment: a torn log of many holes took minutes to open.
#[test]
fn a_torn_segment_of_many_holes_is_read_a_few_times() {
    let (fs, path) = (SimFs::new(), Path::new("/data/0000000000000001.log"));
    let options = options().with_segment_bytes(4 << 20).with_durability(Durability::Os);
    let mut persist = open(&fs, &options).unwrap();
    for revision in 1..=2_000 {
        persist.persist(&[put(&format!("k.{revision}"), revision, vec![1; 1_000])]).unwrap();
    }
    let torn = fs.fork();
    let mut bytes = fs.read(path).unwrap();
    let starts: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(b"nkvF")).collect();
    starts.iter().skip(10).step_by(20).for_each(|at| bytes[at + 10] ^= 1);
    let windows = bytes.len() as u64 / (64 << 10);
    torn.place(path, Some(bytes));
    let before = torn.calls();
    assert_eq!(load(&mut open(&torn, &options).unwrap()).unwrap().0.len(), 9);
    let calls = torn.calls() - before;
    assert!(calls < 12 * windows + 300, "{calls} calls for {windows} windows");
}
