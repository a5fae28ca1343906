//! The backend of `custom_persist.rs` keeps the contract of `PersistValue`, also when a batch was interrupted.

#![allow(clippy::unwrap_used, reason = "a test may panic, also in its helpers")]

#[path = "../custom_persist.rs"]
#[expect(dead_code, reason = "the example's main")]
mod custom_persist;

use std::fs;
use std::path::{Path, PathBuf};

use custom_persist::JsonFiles;
use nkv_core::{Action, Change, Key, Meta, PersistErrorKind, PersistValue, Reason, Revision};

nkv_testkit::persist_conformance!({
    let dir = tempfile::tempdir().unwrap();
    move || JsonFiles::open(dir.path().join("state")).unwrap()
});

/// What the interrupted batches begin with, and what they make of it.
const OLD: [(&str, &str); 3] = [("a", "old"), ("b", "old"), ("c", "old")];
const NEW: [(&str, &str); 3] = [("a", "new"), ("c", "old"), ("d", "new")];

#[test]
fn a_batch_is_whole_wherever_it_was_interrupted_after_its_journal() {
    let (old, new) = (stored(false), stored(true));
    let names: Vec<String> = files(new.path()).into_iter().filter(|name| name != "journal.json").collect();
    for done in 0..=names.len() {
        let crashed = copy(old.path());
        fs::copy(new.path().join("journal.json"), crashed.path().join("journal.json")).unwrap();
        for name in &names[..done] {
            fs::copy(new.path().join(name), crashed.path().join(name)).unwrap();
        }
        for _ in 0..2 {
            assert_eq!(load(crashed.path()), (NEW.map(owned).into(), Revision::new(6)), "{done} files were done");
        }
    }
}

#[test]
fn a_batch_whose_journal_was_not_in_place_never_happened() {
    let (old, new) = (stored(false), stored(true));
    let journal = fs::read(new.path().join("journal.json")).unwrap();
    for len in [0, journal.len() / 2, journal.len()] {
        let crashed = copy(old.path());
        fs::write(crashed.path().join("next"), &journal[..len]).unwrap();
        assert_eq!(load(crashed.path()), (OLD.map(owned).into(), Revision::new(3)), "{len} bytes were written");
    }
}

#[test]
fn a_directory_that_lost_its_journal_or_holds_half_a_file_is_refused() {
    let dir = stored(true);
    fs::remove_file(dir.path().join("journal.json")).unwrap();
    assert!(JsonFiles::open(dir.path()).is_err());

    let dir = stored(true);
    fs::write(dir.path().join("0.json"), "{\"key\":\"a\",").unwrap();
    assert_eq!(JsonFiles::open(dir.path()).unwrap_err().kind(), PersistErrorKind::Damaged);
}

#[test]
fn an_error_says_whether_the_batch_may_be_there() {
    let dir = stored(false);
    let mut backend = JsonFiles::open(dir.path()).unwrap();
    let put = |value: &'static str| Change {
        key: Key::new("a").unwrap(),
        revision: Revision::new(4),
        replaces: Revision::new(1),
        action: Action::Put { value: value.into(), expiry: None },
        meta: Meta::NONE,
    };
    let key_file = || fs::read_to_string(dir.path().join("0.json")).unwrap();

    // A directory where a file should be: the journal cannot be written.
    fs::create_dir(dir.path().join("next")).unwrap();
    assert_eq!(backend.persist(&[put("refused")]).unwrap_err().kind(), PersistErrorKind::Io);
    fs::remove_dir(dir.path().join("next")).unwrap();
    backend.persist(&[put("taken")]).unwrap();
    assert!(key_file().contains("taken"));

    // Now it can be written, but not be put in place; until it is, no key's file may change.
    fs::remove_file(dir.path().join("journal.json")).unwrap();
    fs::create_dir(dir.path().join("journal.json")).unwrap();
    assert_eq!(backend.persist(&[put("unknown")]).unwrap_err().kind(), PersistErrorKind::Poisoned);
    assert!(key_file().contains("taken"));
}

/// A directory after one batch, or after a second that writes, deletes and adds.
fn stored(second: bool) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut backend = JsonFiles::open(dir.path()).unwrap();
    let put = |key: &str, revision, value: &'static str| Change {
        key: Key::new(key).unwrap(),
        revision: Revision::new(revision),
        replaces: Revision::ZERO,
        action: Action::Put { value: value.into(), expiry: None },
        meta: Meta::NONE,
    };
    backend
        .persist(&(1..).zip(OLD).map(|(revision, (key, value))| put(key, revision, value)).collect::<Vec<_>>())
        .unwrap();
    if second {
        let gone = Action::Delete { reason: Reason::Deleted };
        let gone = Change {
            key: Key::new("b").unwrap(),
            revision: Revision::new(5),
            replaces: Revision::new(2),
            action: gone,
            meta: Meta::NONE,
        };
        let over = Change { replaces: Revision::new(1), ..put("a", 4, "new") };
        backend.persist(&[over, gone, put("d", 6, "new")]).unwrap();
    }
    dir
}

fn copy(from: &Path) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    for name in files(from) {
        fs::copy(from.join(&name), to.path().join(&name)).unwrap();
    }
    to
}

fn files(dir: &Path) -> Vec<String> {
    let paths = fs::read_dir(dir).unwrap().map(|found| found.unwrap().path());
    let mut paths: Vec<PathBuf> = paths.filter(|path| path.extension().is_some()).collect();
    paths.sort();
    paths.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect()
}

fn load(dir: &Path) -> (Vec<(String, String)>, Revision) {
    let mut found = Vec::new();
    let mut backend = JsonFiles::open(dir).unwrap();
    let loaded = backend
        .load(&mut |stored| {
            found.push((stored.key().to_string(), String::from_utf8(stored.record().unwrap().value.to_vec()).unwrap()))
        })
        .unwrap();
    found.sort();
    (found, loaded.revision)
}

fn owned((key, value): (&str, &str)) -> (String, String) {
    (key.to_owned(), value.to_owned())
}
