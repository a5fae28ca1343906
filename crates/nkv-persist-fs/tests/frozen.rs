//! Data directories that programs of each format version have left are opened, or refused, for ever.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use common::*;
use nkv_core::{Epoch, Expiry, PersistErrorKind, PersistValue};
use nkv_persist_fs::{FsOptions, FsPersist, check, repair, restore};
use tempfile::TempDir;

/// A copy of a directory, for one test.
fn thaw(name: &str) -> TempDir {
    let dir = TempDir::new().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let frozen = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    for entry in fs::read_dir(frozen).unwrap().map(|entry| entry.unwrap()) {
        fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    dir
}

/// The bytes of all files.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

/// What is in each of them, up to version 2.
fn model() -> Model {
    let kept = |revision, value: &[u8], expiry| Kept { revision, value: Some(value.to_vec()), expiry, meta: None };
    let load = |at: u64, len: usize| (format!("host.db{at}.load"), kept(16 + at + 1, &vec![b'c'; len], None));
    let mut model: Model = [0, 1, 2, 4, 6, 7].map(|at| load(at, 200 * at as usize)).into();
    let expiry = Some(Expiry { at: nkv_core::Timestamp::from_millis(1_700_000_060_000), ttl_ms: 60_000 });
    for (key, revision, value, expiry) in [
        ("lock.door", 25, "held", expiry),
        ("grüße.🔔", 26, "ü", None),
        ("empty", 27, "", None),
        ("batch.b", 30, "2", None),
        ("batch.a", 31, "3", None),
    ] {
        model.insert(key.to_owned(), kept(revision, value.as_bytes(), expiry));
    }
    model
}

#[test]
fn version_1_is_refused_and_stays_as_it_is() {
    let dir = thaw("format-1");
    let before = files(dir.path());
    for error in [
        FsPersist::open(dir.path(), FsOptions::default()).unwrap_err(),
        check(dir.path()).unwrap_err(),
        repair(dir.path()).unwrap_err(),
        restore(dir.path()).unwrap_err(),
    ] {
        assert_eq!(error.kind(), PersistErrorKind::OtherVersion, "{error}");
        assert!(error.to_string().contains("format version 1"), "{error}");
    }
    assert_eq!(files(dir.path()), before);
}

#[test]
fn version_2_is_opened_with_all_that_is_in_it_and_goes_on() {
    for (name, epoch) in [
        ("format-2", 0xf5b5_a3e8_ee61_521e_267b_2ca3_66d6_24a0),
        ("format-2-killed", 0xea6e_752d_1bc8_91c5_5f88_8d33_7466_7d48),
    ] {
        let dir = thaw(name);
        let report = check(dir.path()).unwrap();
        assert_eq!((report.damage, report.torn_bytes, report.keys, report.segments), (None, 0, 11, 3), "{name}");
        let open = || Storage::from(FsPersist::open(dir.path(), FsOptions::default()).unwrap());
        let mut persist = open();
        let (state, loaded) = load(&mut persist).unwrap();
        assert_eq!((state, loaded.revision.get(), loaded.epoch), (model(), 32, Epoch::new(epoch)), "{name}");
        let batch = [put("empty", 33, "no more"), delete("batch.a", 34), put("new", 35, vec![1; 5_000])];
        persist.persist(&batch).unwrap();
        persist.close().unwrap();
        let mut expected = model();
        apply(&mut expected, &batch);
        let (state, loaded) = load(&mut open()).unwrap();
        assert_eq!((state, loaded.epoch), (expected, Epoch::new(epoch)), "{name}");
    }
}

/// What version 3 has besides.
fn model_3() -> Model {
    let kept = |revision, value: Option<&str>, meta: Option<&str>| Kept {
        revision,
        value: value.map(Into::into),
        expiry: None,
        meta: meta.map(Into::into),
    };
    let mut model = model();
    for (key, kept) in [
        ("stamped", kept(32, Some("s"), Some("stamp"))),
        ("at.once", kept(33, Some("3"), Some(""))),
        ("gone", kept(32, None, Some("g"))),
        ("..seen", kept(32, None, Some("4711"))),
    ] {
        model.insert(key.to_owned(), kept);
    }
    model
}

#[test]
fn version_3_is_opened_with_all_that_is_in_it_and_goes_on() {
    for name in ["format-3", "format-3-killed"] {
        let dir = thaw(name);
        let report = check(dir.path()).unwrap();
        assert_eq!((report.damage, report.torn_bytes, report.segments), (None, 0, 3), "{name}");
        assert_eq!((report.keys, report.tombstones), (13, 2), "{name}");
        let open = || Storage::from(FsPersist::open(dir.path(), FsOptions::default()).unwrap());
        let mut persist = open();
        let (state, loaded) = load(&mut persist).unwrap();
        let epoch = Epoch::new(0x8480_0a3f_9b2e_9d9e_5c10_f3a1_dd17_02be);
        assert_eq!((state, loaded.revision.get(), loaded.epoch), (model_3(), 33, epoch), "{name}");
        let batch = [put("gone", 34, "back"), delete("at.once", 34), put("new", 34, vec![1; 5_000])];
        persist.persist(&batch).unwrap();
        persist.close().unwrap();
        let mut expected = model_3();
        apply(&mut expected, &batch);
        let (state, loaded) = load(&mut open()).unwrap();
        assert_eq!((state, loaded.epoch), (expected, epoch), "{name}");
    }
}

// A program that knows versions up to 2 looks at nothing but the version of the newest header, as this one does at one that
// is newer than it knows.
#[test]
fn a_program_that_does_not_know_the_version_of_the_newest_segment_refuses_the_directory_and_changes_nothing() {
    for name in ["format-2", "format-3", "format-3-killed"] {
        let dir = thaw(name);
        let newest = dir.path().join("0000000000000006.log");
        let mut bytes = fs::read(&newest).unwrap();
        assert_eq!(bytes[8..12], u32::to_le_bytes(if name == "format-2" { 2 } else { 3 }), "{name}");
        bytes[8] = 4;
        let crc = crc32c::crc32c(&bytes[..64]);
        bytes[64..68].copy_from_slice(&crc.to_le_bytes());
        fs::write(&newest, bytes).unwrap();
        let before = files(dir.path());
        for error in [
            FsPersist::open(dir.path(), FsOptions::default()).unwrap_err(),
            check(dir.path()).unwrap_err(),
            repair(dir.path()).unwrap_err(),
            restore(dir.path()).unwrap_err(),
        ] {
            assert_eq!(error.kind(), PersistErrorKind::OtherVersion, "{error}");
            assert!(error.to_string().contains("has format version 4"), "{error}");
        }
        assert_eq!(files(dir.path()), before, "{name}");
    }
}
