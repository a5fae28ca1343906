//! Each call fails once, or from then on, in each way: what was acknowledged survives, what was refused does not.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use common::*;
use nkv_core::{Change, FailureHandler, PersistErrorKind, PersistValue};
use nkv_persist_fs::sim::{Fault, SimFs};
use nkv_persist_fs::{Durability, FsOptions, FsPersist, Open, Vfs, VfsFile};

/// What the process believes: the state whose storing was acknowledged, and the one that may be stored.
struct Belief {
    sure: Model,
    maybe: Option<Model>,
    revision: u64,
}

/// Writes the history through the fault. A batch with a definite error is left out, as the trait says it may be.
fn run(fs: &SimFs, options: &FsOptions, history: &[Vec<Change>], call: u64, fault: Fault, forever: bool) -> Belief {
    run_with(fs, options, history, (call, fault, forever), false)
}

/// The same; batches may be prepared.
fn run_with(
    fs: &SimFs,
    options: &FsOptions,
    history: &[Vec<Change>],
    (call, fault, forever): (u64, Fault, bool),
    prepares: bool,
) -> Belief {
    let mut belief = Belief { sure: Model::new(), maybe: None, revision: 0 };
    fs.fail_at(call, fault, forever);
    let mut persist = match open(fs, options) {
        Ok(persist) => persist,
        Err(_) => return belief,
    };
    for batch in history {
        let mut next = belief.sure.clone();
        apply(&mut next, batch);
        let prepared = if prepares { persist.prepare(batch).map(|_| ()) } else { Ok(()) };
        match prepared.and_then(|()| persist.persist(batch)) {
            Ok(()) => {
                assert!(belief.maybe.is_none(), "acknowledged after it was poisoned");
                belief.sure = next;
                belief.revision = batch[batch.len() - 1].revision.get();
            }
            Err(error) if error.kind() == PersistErrorKind::Poisoned => {
                belief.maybe.get_or_insert(next);
            }
            Err(error) => assert!(matches!(error.kind(), PersistErrorKind::Io | PersistErrorKind::NoSpace), "{error}"),
        }
        // What it says is in the log or about the compaction of what is acknowledged.
        drop(persist.maintain());
    }
    if !forever {
        fs.heal();
        go_on(&mut persist, &mut belief);
    }
    belief
}

/// A fault that has passed hinders no caller, unless it has poisoned the log.
fn go_on(persist: &mut Storage, belief: &mut Belief) {
    for revision in 5_000..5_010 {
        let batch = [put("last", revision, vec![1; 900])];
        match persist.persist(&batch) {
            Ok(()) => apply(&mut belief.sure, &batch),
            Err(error) => {
                assert_eq!(error.kind(), PersistErrorKind::Poisoned, "{error}");
                return;
            }
        }
    }
}

fn explore(options: &FsOptions, history: &[Vec<Change>], fault: Fault, forever: bool) -> u64 {
    explore_with(options, history, fault, forever, false)
}

fn explore_with(options: &FsOptions, history: &[Vec<Change>], fault: Fault, forever: bool, prepares: bool) -> u64 {
    let is_sync = format!("{options:?}").contains("durability: Sync");
    let mut rng = Rng(5);
    for call in 0.. {
        let fs = SimFs::new();
        let belief = run_with(&fs, options, history, (call, fault, forever), prepares);
        let is_done = fs.calls() <= call;
        fs.heal();
        // After the death of the process, and, when writes are synced, after a power cut.
        let mut images = vec![fs.crash(&mut |_| 0), fs.crash(&mut |_| 1), fs.crash(&mut |n| rng.below(n))];
        if !is_sync {
            images.clear();
        }
        images.push(fs);
        for (number, image) in images.iter().enumerate() {
            let what = format!("{fault:?} at call {call}, forever {forever}, image {number}");
            let mut persist = open(image, options).unwrap_or_else(|e| panic!("{what}: {e}"));
            let (state, loaded) = load(&mut persist).unwrap_or_else(|e| panic!("{what}: {e}"));
            let fits = state == belief.sure || Some(&state) == belief.maybe.as_ref();
            assert!(fits, "{what}: {state:?} instead of {:?}", belief.sure);
            assert!(loaded.revision.get() >= belief.revision, "{what}: revision {}", loaded.revision);
        }
        if is_done {
            return call;
        }
    }
    unreachable!()
}

// After a failed sync the next process read what was not on the disk, and its syncs did not write it either. A power
// cut took it, under what had been acknowledged since.
#[test]
fn after_a_failed_sync_and_a_restart_nothing_is_built_on_what_is_not_on_the_disk() {
    let (history, mut rng, mut poisoned) = (history(3, 16, 900), Rng(seed()), 0);
    for durability in [Durability::Sync, Durability::Os] {
        let options = options().with_durability(durability);
        for call in 0.. {
            let fs = SimFs::new();
            let belief = run(&fs, &options, &history, call, Fault::Eio, false);
            if fs.calls() <= call {
                break;
            }
            if fs.has_doubtful_dir() {
                // A file system that cannot write its names stops by itself.
                continue;
            }
            fs.heal();
            poisoned += usize::from(belief.maybe.is_some());
            let what = format!("{durability}, call {call}");
            let mut persist = open(&fs, &options).unwrap_or_else(|e| panic!("{what}: {e}"));
            let (mut state, loaded) = load(&mut persist).unwrap();
            let batch = [put("acked", loaded.revision.get() + 1, "x")];
            persist.persist(&batch).unwrap();
            apply(&mut state, &batch);
            persist.close().unwrap();
            for image in 0..6 * scale() {
                let image = fs.crash(&mut |n| if image < 2 { image } else { rng.below(n) });
                let mut persist = open(&image, &options).unwrap_or_else(|e| panic!("{what}: {e}"));
                assert_eq!(load(&mut persist).unwrap().0, state, "{what}");
            }
        }
    }
    assert!(poisoned > 10, "{poisoned} syncs have failed");
}

/// One life of a process: it opens the log and stores two values. `possible` is what a power cut may leave.
fn live(fs: &SimFs, possible: &mut Vec<Model>, what: &str) {
    let Ok(mut persist) = open(fs, &options()) else { return };
    let Ok((state, loaded)) = load(&mut persist) else { return };
    assert!(possible.contains(&state), "{what}: {state:?} instead of {possible:?}");
    *possible = vec![state];
    for revision in loaded.revision.get() + 1..loaded.revision.get() + 3 {
        let batch = [put(&format!("k.{revision}"), revision, vec![1; 1_500])];
        let mut next = possible[0].clone();
        apply(&mut next, &batch);
        match persist.persist(&batch) {
            Ok(()) => *possible = vec![next],
            Err(error) if error.kind() == PersistErrorKind::Poisoned => return possible.push(next),
            Err(error) => assert!(matches!(error.kind(), PersistErrorKind::Io | PersistErrorKind::NoSpace), "{error}"),
        }
    }
}

/// A first life in which a call fails once, for each of its calls; and what it may have left.
fn first_lives() -> impl Iterator<Item = (u64, SimFs, Vec<Model>)> {
    let lives = (0..).map(|call| {
        let (fs, mut possible) = (SimFs::new(), vec![Model::new()]);
        fs.fail_at(call, Fault::Eio, false);
        live(&fs, &mut possible, &format!("call {call}"));
        (call, fs, possible)
    });
    // A file system that cannot write its names stops by itself.
    lives.take_while(|(call, fs, _)| fs.calls() > *call).filter(|(_, fs, _)| !fs.has_doubtful_dir())
}

/// Looks at what power cuts leave after the second life.
fn check_images(fs: &SimFs, possible: &[Model], images: usize, rng: &mut Rng, what: &str) -> usize {
    let images = images * scale();
    for image in 0..images {
        let image = fs.crash(&mut |n| if image < 2 { image } else { rng.below(n) });
        let mut persist = open(&image, &options()).unwrap_or_else(|e| panic!("{what}: {e}"));
        let state = load(&mut persist).unwrap().0;
        assert!(possible.contains(&state), "{what}: {state:?} instead of {possible:?}");
    }
    images
}

// The header of the first segment was not written again after its sync had failed. A power cut took it, and opening was
// refused.
#[test]
fn after_a_failed_sync_and_a_restart_a_power_cut_at_any_call_loses_nothing() {
    let (mut images, mut rng) = (0, Rng(seed()));
    for (call, fs, possible) in first_lives() {
        for cut in 0.. {
            let (fs, mut possible, what) = (fs.fork(), possible.clone(), format!("call {call}, cut {cut}"));
            fs.cut_power_at(cut);
            live(&fs, &mut possible, &what);
            images += check_images(&fs, &possible, 10, &mut rng, &what);
            if fs.mutations() < cut {
                break;
            }
        }
    }
    println!("TEST sim_failed_sync_then_power_cut images={images} violations=0 seed={}", seed());
}

// Where writing again what was read found no space, it was left out. A power cut took it, under what had been
// acknowledged since.
#[test]
fn after_a_failed_sync_a_restart_in_which_a_call_fails_too_loses_nothing() {
    let (mut images, mut rng) = (0, Rng(seed()));
    for (first, fs, possible) in first_lives() {
        for second in 0.. {
            let mut calls = 0;
            for fault in [Fault::Eio, Fault::NoSpace, Fault::Quota, Fault::Short] {
                let (fs, mut possible) = (fs.fork(), possible.clone());
                let what = format!("call {first}, then {fault:?} at call {second}");
                fs.fail_at(second, fault, false);
                live(&fs, &mut possible, &what);
                calls = calls.max(fs.calls());
                images += check_images(&fs, &possible, 3, &mut rng, &what);
            }
            if calls <= second {
                break;
            }
        }
    }
    println!("TEST sim_failed_sync_then_fault images={images} violations=0 seed={}", seed());
}

// What an opening had read was gone from memory when it was to be written again: zeros were, and the index pointed there.
#[test]
fn what_is_read_and_then_forgotten_by_the_system_is_not_taken_for_written() {
    let (mut refused, mut rng) = (0, Rng(seed()));
    for (first, fs, possible) in first_lives() {
        for call in 0.. {
            let fs = fs.fork();
            fs.evict_at(call);
            let what = format!("call {first}, forgotten at call {call}");
            if let Ok(mut persist) = open(&fs, &options()) {
                let mut state = load(&mut persist).unwrap_or_else(|e| panic!("{what}: {e}")).0;
                assert!(possible.contains(&state), "{what}: {state:?}");
                let batch = [put("acked", 9_000, "x")];
                persist.persist(&batch).unwrap_or_else(|e| panic!("{what}: {e}"));
                apply(&mut state, &batch);
                check_images(&fs, &[state], 2, &mut rng, &what);
            } else {
                refused += 1;
                drop(open(&fs, &options()).unwrap_or_else(|e| panic!("{what}: {e}")));
            }
            if fs.calls() <= call {
                break;
            }
        }
    }
    assert!(refused > 0, "nothing was forgotten");
}

// At the next start it has its text, and the system wrote none of it.
#[test]
fn a_lock_file_whose_sync_failed_is_written_again() {
    for (call, fs, _) in first_lives() {
        drop(open(&fs, &options()).unwrap());
        let lock = fs.crash(&mut |_| 0).read(&Path::new(DIR).join("LOCK"));
        assert_eq!(lock.as_deref(), Some(&b"nkv data directory, format 3\n"[..]), "call {call}");
    }
}

// The sync of the directory failed after the reserve was filled: it opened, and took nothing.
#[test]
fn what_could_be_opened_takes_puts_after_a_fault_that_has_passed() {
    for call in 0.. {
        let fs = SimFs::new();
        fs.fail_at(call, Fault::Eio, false);
        let opened = open(&fs, &options());
        if fs.calls() <= call {
            break;
        }
        if let Ok(mut persist) = opened {
            let stored = persist.persist(&[put("a", 1, "1")]);
            assert!(stored.is_ok(), "call {call}: {stored:?}");
        }
    }
}

// A quota that was used up hindered openings that a full disk did not.
#[test]
fn a_quota_that_is_used_up_is_met_as_a_full_disk_is() {
    let fs = SimFs::new();
    let mut persist = open(&fs, &options()).unwrap();
    persist.persist(&[put("a", 1, "1")]).unwrap();
    let fs = kill(&fs, persist);
    let calls = fs.fork();
    drop(open(&calls, &options()).unwrap());
    let is_opened = |call, fault| {
        let fs = fs.fork();
        fs.fail_at(call, fault, false);
        open(&fs, &options()).is_ok()
    };
    for call in 0..calls.calls() {
        assert_eq!(is_opened(call, Fault::Quota), is_opened(call, Fault::NoSpace), "call {call}");
    }
}

#[test]
fn whatever_call_fails_the_disk_holds_what_was_acknowledged_and_nothing_that_was_refused() {
    let history = history(3, 24, 900);
    let mut calls = 0;
    for fault in [Fault::Eio, Fault::NoSpace, Fault::Short, Fault::Late, Fault::Interrupted] {
        for forever in [false, true] {
            calls += explore(&options(), &history, fault, forever);
        }
    }
    for fault in [Fault::Eio, Fault::NoSpace, Fault::Short] {
        calls += explore(&options(), &mixed_history(3, 16, 900), fault, false);
    }
    println!("TEST sim_io_errors calls={calls} violations=0");
}

#[test]
fn whatever_call_fails_while_batches_are_prepared_nothing_is_lost_and_nothing_comes_back() {
    let mut calls = 0;
    for (durability, seed) in [(Durability::Sync, 8), (Durability::Os, 9)] {
        let options = options().with_durability(durability);
        for (fault, forever) in
            [(Fault::Eio, false), (Fault::NoSpace, false), (Fault::NoSpace, true), (Fault::Short, false)]
        {
            calls += explore_with(&options, &history(seed, 16, 900), fault, forever, true);
        }
    }
    println!("TEST sim_io_errors_prepared calls={calls} violations=0");
}

#[test]
fn in_a_relaxed_mode_a_failed_call_loses_nothing_while_the_machine_lives() {
    let options = options().with_durability(Durability::Os);
    for fault in [Fault::Eio, Fault::NoSpace, Fault::Short] {
        println!("{fault:?}: {} calls", explore(&options, &history(4, 16, 900), fault, false));
    }
}

#[test]
fn after_a_failed_sync_nothing_is_acknowledged_and_no_sync_is_tried_again() {
    let fs = SimFs::new();
    let mut persist = open(&fs, &options()).unwrap();
    persist.persist(&[put("a", 1, "1")]).unwrap();
    // One write, then the sync that fails; the file system forgets the failure at once, as Linux does.
    fs.fail_at(fs.calls() + 1, Fault::Eio, false);
    let error = persist.persist(&[put("a", 2, "2")]).unwrap_err();
    assert_eq!(error.kind(), PersistErrorKind::Poisoned);
    let syncs = fs.syncs();
    assert_eq!(persist.persist(&[put("a", 3, "3")]).unwrap_err().kind(), PersistErrorKind::Poisoned);
    assert_eq!(persist.maintain().unwrap_err().kind(), PersistErrorKind::Poisoned);
    drop(persist);
    assert_eq!(fs.syncs(), syncs);
}

#[test]
fn what_was_refused_does_not_come_back_after_a_power_cut() {
    let fs = SimFs::new();
    let mut persist = open(&fs, &options()).unwrap();
    persist.persist(&[put("a", 1, "1")]).unwrap();
    fs.fail_at(fs.calls(), Fault::Late, false);
    assert_eq!(persist.persist(&[put("a", 2, "2")]).unwrap_err().kind(), PersistErrorKind::Io);
    let mut choices = Choices::new(400, 1);
    loop {
        let (state, _) = load(&mut open(&fs.crash(&mut |n| choices.choose(n)), &options()).unwrap()).unwrap();
        assert_eq!(state["a"].revision, 1);
        if !choices.advance() {
            break;
        }
    }
}

#[test]
fn a_failed_sync_of_the_interval_stops_the_log_too() {
    let fs = SimFs::new();
    let period = Duration::from_millis(1);
    let mut persist = open(&fs, &options().with_durability(Durability::Interval(period))).unwrap();
    persist.persist(&[put("a", 1, "1")]).unwrap();
    fs.fail_at(fs.calls(), Fault::Eio, false);
    assert_eq!(persist.maintain().unwrap_err().kind(), PersistErrorKind::Poisoned);
    assert_eq!(persist.persist(&[put("a", 2, "2")]).unwrap_err().kind(), PersistErrorKind::Poisoned);
}

/// A disk on which, on demand, nothing can be opened and no name be made durable, and which panics.
#[derive(Clone, Debug)]
struct Moody {
    fs: SimFs,
    has_descriptors: Arc<AtomicBool>,
    panics: Arc<AtomicBool>,
}

impl Moody {
    fn new() -> Self {
        let (has_descriptors, panics) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
        Moody { fs: SimFs::new(), has_descriptors, panics }
    }

    fn enter(&self) -> io::Result<()> {
        let in_background = std::thread::current().name() == Some("nkv-compact");
        assert!(!in_background || !self.panics.load(Ordering::SeqCst), "on demand");
        let out = || io::Error::other("too many open files");
        if self.has_descriptors.load(Ordering::SeqCst) { Ok(()) } else { Err(out()) }
    }
}

impl Vfs for Moody {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.fs.create_dir(dir)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.fs.list(dir)
    }

    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn VfsFile>> {
        self.enter()?;
        self.fs.open(path, how)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.fs.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.enter()?;
        self.fs.sync_dir(dir)
    }
}

fn open_moody(moody: &Moody, options: FsOptions) -> Storage {
    FsPersist::open_with(Arc::new(moody.clone()), DIR, options).unwrap().into()
}

// A rotation that could not even make the file took it away again, could not, and poisoned the log.
#[test]
fn without_a_descriptor_for_a_new_segment_a_put_is_refused_and_later_taken() {
    let moody = Moody::new();
    let mut persist = open_moody(&moody, options());
    persist.persist(&[put("a", 1, vec![1; 3_000])]).unwrap();
    moody.has_descriptors.store(false, Ordering::SeqCst);
    let error = persist.persist(&[put("a", 2, vec![2; 3_000])]).unwrap_err();
    assert_eq!(error.kind(), PersistErrorKind::Io, "{error}");
    moody.has_descriptors.store(true, Ordering::SeqCst);
    persist.persist(&[put("a", 3, vec![3; 3_000])]).unwrap();
    persist.close().unwrap();
    assert_eq!(load(&mut open(&moody.fs.crash(&mut |_| 0), &options()).unwrap()).unwrap().0["a"].revision, 3);
}

// The thread that keeps the interval died, and acknowledgements went on, with nothing ever synced.
#[test]
fn when_the_thread_that_syncs_has_panicked_nothing_is_acknowledged_any_more() {
    let moody = Moody::new();
    let period = Durability::Interval(Duration::from_millis(1));
    let mut persist = open_moody(&moody, options().with_background(true).with_durability(period));
    moody.panics.store(true, Ordering::SeqCst);
    let deadline = Instant::now() + Duration::from_secs(10);
    for revision in 1.. {
        assert!(Instant::now() < deadline);
        if let Err(error) = persist.persist(&[put("a", revision, vec![1; 900])]) {
            assert_eq!(error.kind(), PersistErrorKind::Poisoned, "{error}");
            break;
        }
    }
}

// The caller learned of it with its next batch, however long that took.
#[test]
fn a_failed_sync_of_the_interval_is_reported_although_nothing_is_written() {
    let fs = SimFs::new();
    let period = Durability::Interval(Duration::from_millis(1));
    let mut persist = open(&fs, &options().with_background(true).with_durability(period)).unwrap();
    let (reports, reported) = mpsc::channel();
    persist.on_failure(FailureHandler::new(move |error| drop(reports.send(error))));
    load(&mut persist).unwrap();
    // The call after the one that writes is the sync.
    fs.fail_at(fs.calls() + 1, Fault::Eio, true);
    persist.persist(&[put("a", 1, "1")]).unwrap();
    let error = reported.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!(error.kind(), PersistErrorKind::Poisoned, "{error}");
    assert!(persist.persist(&[put("a", 2, "2")]).is_err());
    drop(persist);
    assert!(reported.try_recv().is_err(), "it is reported once");
}

// A last sync that failed was logged, and the caller took the end for a clean one.
#[test]
fn a_last_sync_that_fails_is_the_result_of_the_close() {
    for durability in [Durability::Sync, Durability::Interval(Duration::from_secs(3_600)), Durability::Os] {
        let (fs, options) = (SimFs::new(), options().with_durability(durability));
        let mut persist = open(&fs, &options).unwrap();
        persist.persist(&[put("a", 1, "1")]).unwrap();
        fs.fail_at(fs.calls(), Fault::Eio, true);
        let error = PersistValue::close(&mut persist).unwrap_err();
        assert_eq!(error.kind(), PersistErrorKind::Poisoned, "{durability}");
        fs.heal();
        drop(persist); // nothing is tried again
        assert_eq!(load(&mut open(&fs, &options).unwrap()).unwrap().1.revision.get(), 1);
    }
}

#[test]
fn what_was_closed_takes_no_writes_and_lets_go_of_the_directory() {
    let fs = SimFs::new();
    let mut persist = open(&fs, &options()).unwrap();
    persist.persist(&[put("a", 1, "1")]).unwrap();
    PersistValue::close(&mut persist).unwrap();
    let mut next = open(&fs, &options()).unwrap();
    next.persist(&[put("a", 2, "2")]).unwrap();
    assert_eq!(persist.persist(&[put("a", 2, "other")]).unwrap_err().kind(), PersistErrorKind::Poisoned);
    assert!(persist.prepare(&[put("a", 2, "other")]).is_err());
    drop(persist);
    next.close().unwrap();
    assert_eq!(load(&mut open(&fs, &options()).unwrap()).unwrap().0["a"].value.as_ref().unwrap(), b"2");
}
