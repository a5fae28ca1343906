//! The directory on a real file system: which processes may use it, which users may read it, and what a stop leaves.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::error::Error;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use nkv_core::{Epoch, PersistError, PersistErrorKind, PersistValue};
use nkv_persist_fs::sim::SimFs;
use nkv_persist_fs::{Durability, FsOptions, FsPersist, check, check_with, repair, restore};
use tempfile::TempDir;

fn open_dir(dir: &Path, durability: Durability) -> Storage {
    FsPersist::open(dir, FsOptions::default().with_durability(durability)).unwrap().into()
}

#[test]
fn a_second_owner_is_turned_away_before_it_touches_anything() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("data");
    let mut first = open_dir(&path, Durability::Sync);
    let before = listing(&path);
    let began = Instant::now();
    for error in [
        FsPersist::open(&path, FsOptions::default()).unwrap_err(),
        check(&path).unwrap_err(),
        repair(&path).unwrap_err(),
    ] {
        assert_eq!(error.kind(), PersistErrorKind::InUse, "{error}");
        assert!(error.to_string().contains("this process"), "{error}");
    }
    assert!(began.elapsed() >= Duration::from_secs(3), "each waits a little");
    assert_eq!(listing(&path), before);
    first.persist(&[put("a", 1, "1")]).unwrap();
    drop(first);
    open_dir(&path, Durability::Sync);
}

// What was dropped on another thread a moment ago was "another process".
#[test]
fn a_directory_that_this_process_lets_go_of_is_waited_for() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("data");
    for _ in 0..20 {
        let first = open_dir(&path, Durability::Sync);
        let dropped = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            drop(first);
        });
        open_dir(&path, Durability::Sync);
        dropped.join().unwrap();
    }
}

// A server's storage was closed, and a caller still held a handle to it: a new one waited for the directory, in vain.
#[test]
fn a_closed_directory_can_be_opened_again_although_a_caller_holds_what_was_closed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    let mut first = open_dir(&path, Durability::Sync);
    first.persist(&[put("a", 1, "1")]).unwrap();
    let monitor = first.monitor();
    PersistValue::close(&mut first).unwrap();
    let mut second = open_dir(&path, Durability::Sync);
    second.persist(&[put("a", 2, "2")]).unwrap();
    let poisoned = |result: Result<(), PersistError>| result.unwrap_err().kind() == PersistErrorKind::Poisoned;
    assert!(poisoned(first.persist(&[put("a", 2, "other")])) && poisoned(first.begin_epoch(Epoch::new(1))));
    assert!(poisoned(first.prepare(&[put("a", 2, "other")]).map(drop)));
    assert_eq!(monitor.stats().batches, 1);
    drop(first);
    second.persist(&[put("a", 3, "3")]).unwrap();
    assert!(FsPersist::open(&path, FsOptions::default()).is_err_and(|error| error.kind() == PersistErrorKind::InUse));
    second.close().unwrap();
    assert_eq!(load(&mut open_dir(&path, Durability::Sync)).unwrap().0["a"].text(), "3");
}

fn listing(path: &Path) -> Vec<(String, u64)> {
    let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap());
    let mut names: Vec<_> =
        entries.map(|e| (e.file_name().into_string().unwrap(), e.metadata().unwrap().len())).collect();
    names.sort();
    names
}

#[test]
fn the_directory_and_its_files_are_for_their_owner_alone() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("some/where/data");
    open_dir(&path, Durability::Sync).persist(&[put("/etc/passwd", 1, "1")]).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o700);
    for (name, _) in listing(&path) {
        assert_eq!(mode(&path.join(name)), 0o600);
    }
    let names: Vec<_> = listing(&path).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["0000000000000001.log", "LOCK", "reserve"]);
}

// The advice was to change the mode, which a process that does not own the volume cannot.
#[test]
fn a_directory_that_others_may_write_to_is_refused_and_one_in_it_works() {
    let dir = TempDir::new().unwrap();
    for (mode, who) in [(0o770, "its group"), (0o702, "every user"), (0o777, "every user")] {
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
        for group_access in [false, mode == 0o777] {
            let options = FsOptions::default().with_group_access(group_access);
            let error = FsPersist::open(dir.path(), options).unwrap_err();
            let text = error.source().unwrap().to_string();
            assert_eq!(error.kind(), PersistErrorKind::Io);
            assert!(
                text.contains(who) && text.contains("/nkv") && error.to_string().contains("data directory"),
                "{text}"
            );
        }
    }
    assert_eq!(listing(dir.path()), []);
    let inner = dir.path().join("nkv");
    FsPersist::open(&inner, FsOptions::default()).unwrap();
    assert_eq!(fs::metadata(&inner).unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn a_group_may_share_a_directory_if_it_is_allowed_to() {
    let dir = TempDir::new().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o770)).unwrap();
    let options = FsOptions::default().with_group_access(true);
    drop(FsPersist::open(dir.path(), options).unwrap());
    let names = listing(dir.path());
    assert_eq!(names.len(), 3);
    for (name, _) in names {
        let mode = fs::metadata(dir.path().join(&name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o660, "{name}");
    }
}

#[test]
fn a_symbolic_link_in_the_place_of_a_file_is_not_followed() {
    let dir = TempDir::new().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let target = dir.path().join("precious");
    fs::write(&target, "text").unwrap();
    std::os::unix::fs::symlink(&target, dir.path().join("LOCK")).unwrap();
    let error = FsPersist::open(dir.path(), FsOptions::default()).unwrap_err();
    assert_eq!(error.kind(), PersistErrorKind::Io, "{error}");
    assert_eq!(fs::read(&target).unwrap(), b"text");
}

/// How long the only segment is, in each state of a log that is appended to.
fn lens_while_puts_come(durability: Durability, puts: u64) -> (Vec<u64>, u64) {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("data");
    let mut persist = open_dir(&path, durability);
    let len = || fs::metadata(path.join("0000000000000001.log")).unwrap().len();
    let mut lens = vec![len()];
    for revision in 1..=puts {
        persist.persist(&[put(&format!("k.{revision}"), revision, vec![1; 100])]).unwrap();
        lens.push(len());
    }
    let used = persist.monitor().stats().disk_bytes;
    persist.close().unwrap();
    lens.push(len());
    (lens, used)
}

// To sync a file that has grown is to write its length and its place on the disk too, which takes half as long again.
#[test]
fn in_sync_mode_most_appends_do_not_make_the_file_longer_and_a_clean_end_leaves_no_zeros() {
    let (lens, used) = lens_while_puts_come(Durability::Sync, 2_000);
    let grown = lens.windows(2).filter(|pair| pair[0] < pair[1]).count();
    assert!(grown < 10, "{grown} appends made the file longer");
    let longest = *lens.iter().max().unwrap();
    assert!(longest <= 2 * used + (16 << 10), "{longest} bytes for {used}");
    assert!(lens[..100].iter().all(|len| *len < 64 << 10), "a small store stays small: {:?}", &lens[..100]);
    assert!(*lens.last().unwrap() <= used + 100);
    // Without syncs there is nothing to gain.
    let (lens, used) = lens_while_puts_come(Durability::Os, 20);
    assert_eq!(lens[20], used);
}

#[test]
fn a_clean_stop_keeps_the_epoch_and_a_sudden_one_in_a_relaxed_mode_does_not() {
    for durability in [Durability::Sync, Durability::Os, Durability::Interval(Duration::from_millis(5))] {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("data");
        let mut persist = open_dir(&path, durability);
        let epoch = load(&mut persist).unwrap().1.epoch;
        persist.persist(&[put("a", 1, "1")]).unwrap();
        persist.close().unwrap();
        let mut persist = open_dir(&path, durability);
        let (state, loaded) = load(&mut persist).unwrap();
        assert_eq!((state["a"].text(), loaded.epoch), ("1", epoch), "{durability}");
        persist.persist(&[put("a", 2, "2")]).unwrap();
        // What a killed process leaves.
        let killed = dir.path().join("killed");
        fs::create_dir(&killed).unwrap();
        fs::set_permissions(&killed, fs::Permissions::from_mode(0o700)).unwrap();
        // Without the file that marks a copy.
        for (name, _) in listing(&path).into_iter().filter(|(name, _)| name != "LOCK") {
            fs::copy(path.join(&name), killed.join(&name)).unwrap();
        }
        let (state, loaded) = load(&mut open_dir(&killed, durability)).unwrap();
        assert_eq!(state["a"].text(), "2", "{durability}");
        assert_eq!(loaded.epoch == epoch, durability == Durability::Sync, "{durability}");
    }
}

fn epoch_in(path: &Path) -> Epoch {
    load(&mut open_dir(path, Durability::Sync)).unwrap().1.epoch
}

// A copy had the epoch of its original: of two that went on, or of one that was put back, the same revisions meant
// different things.
#[test]
fn a_copy_is_in_an_epoch_of_its_own_and_a_directory_that_was_moved_is_not() {
    let dir = TempDir::new().unwrap();
    let [path, copy, moved] = ["data", "copy", "moved"].map(|name| dir.path().join(name));
    open_dir(&path, Durability::Sync).persist(&[put("a", 1, "1")]).unwrap();
    let epoch = epoch_in(&path);
    let copied = Command::new("cp").arg("-a").args([&path, &copy]).status().unwrap();
    assert!(copied.success());
    if fs::metadata(copy.join("LOCK")).unwrap().created().is_err() {
        return; // nothing shows a copy here
    }
    assert!(check(&copy).unwrap().to_string().contains("a copy"));
    let of_copy = epoch_in(&copy);
    assert_ne!(of_copy, epoch);
    assert_eq!(epoch_in(&copy), of_copy);
    assert!(!check(&copy).unwrap().is_copied);
    fs::rename(&path, &moved).unwrap();
    assert_eq!(epoch_in(&moved), epoch);
    let renewed = restore(&moved).unwrap().epoch;
    assert_ne!(renewed, epoch);
    assert_eq!(epoch_in(&moved), renewed);
    assert_eq!(load(&mut open_dir(&moved, Durability::Sync)).unwrap().0["a"].text(), "1");
}

#[test]
fn the_interval_passes_and_what_was_acknowledged_is_synced() {
    let dir = TempDir::new().unwrap();
    let mut persist = open_dir(&dir.path().join("data"), Durability::Interval(Duration::from_millis(20)));
    let monitor = persist.monitor();
    let before = monitor.stats().syncs;
    persist.persist(&[put("a", 1, "1")]).unwrap();
    assert_eq!(monitor.stats().syncs, before, "not yet");
    let deadline = Instant::now() + Duration::from_secs(10);
    while monitor.stats().syncs == before {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn only_the_newest_torn_tails_are_kept() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("data");
    for revision in 1..=20 {
        open_dir(&path, Durability::Sync).persist(&[put("a", revision, "x")]).unwrap();
        let log = path.join("0000000000000001.log");
        let torn = [fs::read(&log).unwrap(), vec![7; 11]].concat();
        fs::write(&log, torn).unwrap();
    }
    let mut persist = open_dir(&path, Durability::Sync);
    assert_eq!(load(&mut persist).unwrap().1.revision.get(), 20);
    let broken: Vec<_> = listing(&path).into_iter().filter(|(name, _)| name.contains("broken")).collect();
    assert_eq!((broken.len(), broken[0].1), (16, 11));
}

#[test]
fn check_reports_what_there_is_and_changes_nothing() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("data");
    let mut persist = open_dir(&path, Durability::Sync);
    persist.persist(&[put("a", 1, "1"), put("b", 2, "2")]).unwrap();
    persist.persist(&[delete("a", 3)]).unwrap();
    drop(persist);
    let before = listing(&path);
    let report = check(&path).unwrap();
    assert_eq!((report.keys, report.records, report.batches, report.revision.get()), (1, 3, 2, 3));
    assert!(report.damage.is_none() && report.to_string().contains("no damage"), "{report}");
    assert_eq!(listing(&path), before);
    assert!(check(dir.path().join("nowhere")).is_err());
}

#[test]
fn a_read_only_file_system_is_refused_by_name_and_can_be_checked() {
    let sim = SimFs::new();
    let mut persist = open(&sim, &options()).unwrap();
    persist.persist(&[put("a", 1, "1")]).unwrap();
    sim.set_read_only(true);
    // What an append may have left cannot be taken back: it says so.
    let error = persist.persist(&[put("a", 2, "2")]).unwrap_err();
    assert_eq!(error.kind(), PersistErrorKind::Poisoned);
    assert!(error.to_string().contains(DIR), "{error}");
    assert_eq!(load(&mut persist).unwrap().0["a"].revision, 1);
    drop(persist);
    let error = open(&sim, &options()).unwrap_err();
    assert!(error.kind() == PersistErrorKind::Io && error.to_string().contains(DIR), "{error}");
    assert_eq!(check_with(Arc::new(sim.clone()), DIR).unwrap().keys, 1);
    sim.set_read_only(false);
    assert_eq!(load(&mut open(&sim, &options()).unwrap()).unwrap().0["a"].revision, 1);
}

/// A directory that is mounted on itself for reading only, until it is dropped.
struct ReadOnlyMount(PathBuf);

impl ReadOnlyMount {
    fn new(path: &Path) -> Option<Self> {
        let run = |args: &[&str]| Command::new("mount").args(args).arg(path).status().is_ok_and(|s| s.success());
        let text = path.to_str().unwrap();
        let is_bound = run(&["--bind", text]);
        let mount = is_bound.then(|| ReadOnlyMount(path.to_owned()))?;
        run(&["-o", "remount,ro,bind"]).then_some(mount)
    }
}

impl Drop for ReadOnlyMount {
    fn drop(&mut self) {
        assert!(Command::new("umount").arg(&self.0).status().unwrap().success());
    }
}

#[test]
fn a_directory_that_is_mounted_read_only_is_refused_by_name() {
    if std::env::var("NKV_FAULTS").is_err() {
        println!("skipped: it mounts, as root; NKV_FAULTS=1 runs it");
        return;
    }
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("data");
    open_dir(&path, Durability::Sync).persist(&[put("a", 1, "1")]).unwrap();
    let before = listing(&path);
    let mount = ReadOnlyMount::new(&path).expect("mount --bind, as root");
    for path in [path.clone(), path.join("new")] {
        let error = FsPersist::open(&path, FsOptions::default()).unwrap_err();
        assert_eq!(error.kind(), PersistErrorKind::Io);
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
    assert_eq!((check(&path).unwrap().keys, listing(&path)), (1, before));
    drop(mount);
    assert_eq!(load(&mut open_dir(&path, Durability::Sync)).unwrap().0["a"].revision, 1);
}

// A segment without a name takes writes and syncs as ever: puts were acknowledged that no reader would ever find.
#[test]
fn when_the_directory_is_removed_nothing_is_acknowledged_any_more() {
    for durability in [Durability::Sync, Durability::Interval(Duration::from_millis(1))] {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("data");
        let mut persist = open_dir(&path, durability);
        persist.persist(&[put("a", 1, "1")]).unwrap();
        fs::remove_dir_all(&path).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut revisions = 2..;
        let error = loop {
            match persist.persist(&[put("a", revisions.next().unwrap(), "2")]) {
                Err(error) => break error,
                Ok(()) => assert!(durability != Durability::Sync && Instant::now() < deadline, "acknowledged"),
            }
        };
        assert_eq!(error.kind(), PersistErrorKind::Poisoned);
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        assert!(persist.close().is_err());
        assert_eq!(load(&mut open_dir(&path, durability)).unwrap().0, Model::new());
    }
}

#[test]
fn a_directory_in_the_place_of_a_file_is_an_error_that_names_it() {
    for name in ["LOCK", "0000000000000001.log", "reserve"] {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("data");
        open_dir(&path, Durability::Sync).persist(&[put("a", 1, "1")]).unwrap();
        fs::remove_file(path.join(name)).unwrap();
        fs::create_dir(path.join(name)).unwrap();
        let opened = FsPersist::open(&path, FsOptions::default()).map(Storage::from);
        // Without its reserve a log can be read, and takes no puts.
        let error = opened.and_then(|mut persist| persist.persist(&[put("a", 2, "2")])).unwrap_err();
        assert!(error.to_string().contains(path.join(name).to_str().unwrap()), "{name}: {error}");
    }
}
