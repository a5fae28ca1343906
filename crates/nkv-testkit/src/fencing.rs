//! The line *One owner* of the contract of [`PersistValue`], for storage that several processes can have open: the one that
//! loaded it last owns it, and an instance that was replaced stores nothing.
//!
//! [`fencing_conformance!`](crate::fencing_conformance) makes a test of each part. Storage that refuses a second owner, as a
//! locked directory does, has no use for it.

use nkv_core::{Change, Loaded, PersistError, PersistErrorKind, PersistValue, Record, Revision};

use crate::persist::{Line, PersistHarness, delete, load, persist, put};

/// Makes a test of each part of the line *One owner* of the contract of [`PersistValue`].
///
/// The expression is a [`PersistHarness`], as for [`persist_conformance!`](crate::persist_conformance); this suite holds
/// several backends at once.
///
/// # Examples
///
/// ```
/// mod fencing {
///     use nkv_core::{Epoch, MemoryPersist};
///
///     nkv_testkit::fencing_conformance!({
///         let disk = MemoryPersist::new(Epoch::new(7));
///         move || disk.clone()
///     });
/// }
/// ```
#[macro_export]
macro_rules! fencing_conformance {
    (@ $what:ident $argument:tt) => {
        $crate::__conformance! { $what fencing $argument;
            an_instance_that_was_replaced_stores_nothing
            an_instance_that_was_replaced_before_its_first_batch_stores_nothing
            a_new_owner_goes_on_where_the_old_one_was
            preparing_and_closing_an_instance_that_was_replaced_harms_nothing
            owners_that_come_and_go_change_neither_epoch_nor_revision
        }
    };
    ($harness:expr) => {
        $crate::fencing_conformance! { @ tests $harness }
    };
}

/// All parts with their names; see [`persist::lines`](crate::persist::lines).
#[must_use]
pub fn lines<H: PersistHarness>() -> Vec<Line<H>> {
    crate::fencing_conformance! { @ table H }
}

/// What was loaded last owns the storage; what was loaded before is refused for good, and of its batch nothing is stored.
pub fn an_instance_that_was_replaced_stores_nothing<H: PersistHarness>(harness: &H) {
    let (mut old, _) = open(harness);
    persist(&mut old, &[put("a", 1, "old")]);
    let (mut new, _) = open(harness);
    for _ in 0..2 {
        assert_fenced(old.persist(&[put("b", 2, "lost"), replacing(put("a", 3, "lost"), 1)]));
    }
    persist(&mut new, &[replacing(put("a", 2, "new"), 1)]);
    assert_fenced(old.persist(&[put("b", 3, "lost")]));
    persist(&mut new, &[put("c", 3, "new")]);
    drop((old, new));
    assert_eq!(contents(harness), [("a", 2), ("c", 3)].map(|(key, revision)| (key.to_owned(), revision)));
}

/// To be the owner takes no batch: an instance is replaced by another that has only loaded.
pub fn an_instance_that_was_replaced_before_its_first_batch_stores_nothing<H: PersistHarness>(harness: &H) {
    let (mut old, _) = open(harness);
    let (new, _) = open(harness);
    assert_fenced(old.persist(&[put("a", 1, "lost")]));
    drop(new);
    assert_fenced(old.persist(&[put("a", 1, "lost")]));
    assert_eq!(contents(harness), []);
}

/// All that was stored before is loaded by the instance that takes over.
pub fn a_new_owner_goes_on_where_the_old_one_was<H: PersistHarness>(harness: &H) {
    let (mut instance, _) = open(harness);
    for revision in 1..=5 {
        persist(&mut instance, &[replacing(put("a", revision, "x"), revision - 1)]);
        let (next, (records, loaded)) = open(harness);
        assert_eq!(loaded.revision, Revision::new(revision));
        assert_eq!(records.iter().map(|record| record.revision).collect::<Vec<_>>(), [loaded.revision]);
        instance = next; // the one before is dropped after it was replaced
    }
    persist(&mut instance, &[replacing(delete("a", 6), 5)]);
    assert_eq!(contents(harness), []);
}

/// An instance that was replaced ends without a trace.
pub fn preparing_and_closing_an_instance_that_was_replaced_harms_nothing<H: PersistHarness>(harness: &H) {
    let (mut old, _) = open(harness);
    persist(&mut old, &[put("a", 1, "old")]);
    let (mut new, _) = open(harness);
    // Whether it learns of it is up to the backend.
    drop(old.prepare(&[put("b", 2, "lost")]));
    persist(&mut new, &[put("b", 2, "new")]);
    drop(old.close());
    drop(old);
    persist(&mut new, &[put("c", 3, "new")]);
    new.close().unwrap_or_else(|error| panic!("close failed: {error}"));
    drop(new);
    let expected = [("a", 1), ("b", 2), ("c", 3)];
    assert_eq!(contents(harness), expected.map(|(key, revision)| (key.to_owned(), revision)));
}

/// Another owner is no loss: revisions mean what they meant.
pub fn owners_that_come_and_go_change_neither_epoch_nor_revision<H: PersistHarness>(harness: &H) {
    let (mut first, (_, loaded)) = open(harness);
    persist(&mut first, &[put("a", 7, "x")]);
    let mut held = Vec::new();
    for _ in 0..4 {
        let (instance, (_, again)) = open(harness);
        assert_eq!(again, Loaded { revision: Revision::new(7), ..loaded });
        held.push(instance);
    }
}

fn open<H: PersistHarness>(harness: &H) -> (H::Backend, (Vec<Record>, Loaded)) {
    let mut backend = harness.open();
    let loaded = load(&mut backend);
    (backend, loaded)
}

/// The keys that there are, with their revisions.
fn contents<H: PersistHarness>(harness: &H) -> Vec<(String, u64)> {
    let (_, (records, _)) = open(harness);
    records.iter().map(|record| (record.key.to_string(), record.revision.get())).collect()
}

fn replacing(change: Change, revision: u64) -> Change {
    Change { replaces: Revision::new(revision), ..change }
}

fn assert_fenced(result: Result<(), PersistError>) {
    match result {
        Ok(()) => panic!("an instance that was replaced has stored a batch"),
        Err(error) => assert_eq!(error.kind(), PersistErrorKind::Poisoned, "{error}"),
    }
}
