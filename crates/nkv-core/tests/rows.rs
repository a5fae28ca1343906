//! `RowPersist` over a table in memory, whose connections are lost in the middle of commits.
// Under Miri the suite takes minutes and does nothing that the tests of the store do not.
#![cfg(not(any(loom, miri)))]
#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code too")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use nkv_core::rows::{Committed, HEAD, RowChange, RowPersist, Rows};
use nkv_core::{
    Action, Change, Expiry, Key, Meta, PersistError, PersistErrorKind, PersistValue, Reason, Revision, StoredRef,
    Timestamp,
};

type Bytes = BTreeMap<String, Vec<u8>>;

/// What becomes of a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Done,
    /// The connection is lost when it is done.
    DoneUnheard,
    /// The connection is lost before it is done.
    Lost,
    /// As `Lost`, and the head cannot be read either.
    LostForGood,
    /// As `Lost`, and the one that was lost before comes through instead.
    LostAndOvertaken,
    Full,
}

#[derive(Debug, Default)]
struct Shared {
    rows: Bytes,
    /// Of the commits to come; then all are done.
    fates: Vec<Fate>,
    /// The last one that was lost.
    lost: Bytes,
    is_gone: bool,
    /// Another instance opens the table before each commit.
    is_crowded: bool,
    /// Another instance opens it before the rows are read.
    is_overtaken: bool,
    commits: u64,
}

#[derive(Clone, Debug, Default)]
struct Table(Arc<Mutex<Shared>>);

impl Table {
    fn open(&self, random: u128) -> RowPersist<Self> {
        RowPersist::new(self.clone(), random)
    }

    fn fates(&self, fates: &[Fate]) {
        self.0.lock().unwrap().fates = fates.iter().rev().copied().collect();
    }
}

impl Rows for Table {
    fn read(&mut self, visit: &mut dyn FnMut(&str, &[u8])) -> Result<(), PersistError> {
        if std::mem::take(&mut self.0.lock().unwrap().is_overtaken) {
            let mut other = self.open(77);
            other.load(&mut |_| {})?;
            other.persist(&[put("a", 1, "newer than what this one knows")])?;
        }
        self.0.lock().unwrap().rows.iter().for_each(|(name, bytes)| visit(name, bytes));
        Ok(())
    }

    fn head(&mut self) -> Result<Option<Vec<u8>>, PersistError> {
        let shared = self.0.lock().unwrap();
        if shared.is_gone {
            return Err(PersistError::new(PersistErrorKind::Io, "no connection"));
        }
        Ok(shared.rows.get(HEAD).cloned())
    }

    fn commit(&mut self, head: Option<&[u8]>, changes: &[RowChange<'_>]) -> Result<Committed, PersistError> {
        let mut shared = self.0.lock().unwrap();
        shared.commits += 1;
        if shared.is_crowded {
            let other = vec![shared.commits as u8; 48];
            shared.rows.insert(HEAD.to_owned(), other);
        }
        if shared.rows.get(HEAD).map(Vec::as_slice) != head {
            return Ok(Committed::Stale);
        }
        let fate = shared.fates.pop().unwrap_or(Fate::Done);
        if matches!(fate, Fate::Done | Fate::DoneUnheard) {
            let mut names = std::collections::HashSet::new();
            for RowChange { name, bytes } in changes {
                assert!(names.insert(name), "{name} twice");
                match bytes {
                    Some(bytes) => drop(shared.rows.insert((*name).to_owned(), bytes.clone())),
                    None => drop(shared.rows.remove(*name)),
                }
            }
            assert!(names.contains(&HEAD));
        }
        match fate {
            Fate::Lost => {
                let puts = changes.iter().filter_map(|c| Some((c.name.to_owned(), c.bytes.clone()?)));
                shared.lost = puts.collect();
            }
            Fate::LostAndOvertaken => {
                let late = std::mem::take(&mut shared.lost);
                shared.rows.extend(late);
            }
            _ => {}
        }
        shared.is_gone = fate == Fate::LostForGood;
        match fate {
            Fate::Done => Ok(Committed::Yes),
            Fate::Full => Err(PersistError::new(PersistErrorKind::NoSpace, "full")),
            _ => Ok(Committed::Unknown),
        }
    }
}

mod conformance {
    use std::cell::Cell;

    nkv_testkit::persist_conformance!({
        let (table, random) = (super::Table::default(), Cell::new(0));
        move || {
            random.set(random.get() + 1);
            table.open(random.get())
        }
    });
}

mod fencing {
    use std::cell::Cell;

    nkv_testkit::fencing_conformance!({
        let (table, random) = (super::Table::default(), Cell::new(0));
        move || {
            random.set(random.get() + 1);
            table.open(random.get())
        }
    });
}

fn put(key: &str, revision: u64, value: &str) -> Change {
    let action = Action::Put {
        value: value.to_owned().into(),
        expiry: Some(Expiry { at: Timestamp::from_millis(revision), ttl_ms: 5 }),
    };
    Change {
        key: Key::new(key).unwrap(),
        revision: Revision::new(revision),
        replaces: Revision::ZERO,
        action,
        meta: Meta::NONE,
    }
}

fn delete(key: &str, revision: u64) -> Change {
    Change { action: Action::Delete { reason: Reason::Deleted }, ..put(key, revision, "") }
}

fn contents(table: &Table) -> BTreeMap<String, (u64, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut persist = table.open(99);
    let mut visit = |stored: StoredRef<'_>| {
        let record = stored.record().unwrap().to_record();
        assert_eq!(record.expiry, Some(Expiry { at: Timestamp::from_millis(record.revision.get()), ttl_ms: 5 }));
        found.insert(record.key.to_string(), (record.revision.get(), record.value.to_vec()));
    };
    persist.load(&mut visit).unwrap();
    found
}

#[test]
fn after_a_lost_connection_the_head_says_whether_the_batch_is_stored() {
    let table = Table::default();
    let mut persist = table.open(1);
    persist.load(&mut |_| {}).unwrap();
    table.fates(&[Fate::DoneUnheard, Fate::Lost, Fate::Lost, Fate::Done]);
    persist.persist(&[put("a", 1, "heard of later")]).unwrap();
    for _ in 0..2 {
        let error = persist.persist(&[put("b", 2, "lost")]).unwrap_err();
        assert_eq!((error.kind(), error.is_retryable()), (PersistErrorKind::Io, true), "{error}");
    }
    persist.persist(&[put("c", 2, "stored"), delete("a", 3)]).unwrap();
    assert_eq!(contents(&table), BTreeMap::from([("c".to_owned(), (2, b"stored".to_vec()))]));
}

#[test]
fn where_the_head_cannot_be_read_the_outcome_is_unknown() {
    let table = Table::default();
    let mut persist = table.open(1);
    persist.load(&mut |_| {}).unwrap();
    table.fates(&[Fate::LostForGood]);
    assert_eq!(persist.persist(&[put("a", 1, "x")]).unwrap_err().kind(), PersistErrorKind::Poisoned);
}

// Both batches end at the same revision, and their owner is the same: one was taken for the other.
#[test]
fn a_commit_that_was_lost_and_comes_through_late_is_not_taken_for_the_next() {
    let table = Table::default();
    let mut persist = table.open(1);
    persist.load(&mut |_| {}).unwrap();
    table.fates(&[Fate::Lost, Fate::LostAndOvertaken]);
    assert_eq!(persist.persist(&[put("a", 1, "late")]).unwrap_err().kind(), PersistErrorKind::Io);
    assert_eq!(persist.persist(&[put("b", 1, "lost")]).unwrap_err().kind(), PersistErrorKind::Poisoned);
    assert_eq!(contents(&table).into_keys().collect::<Vec<_>>(), ["a"]);
}

#[test]
fn whatever_becomes_of_connections_what_is_stored_is_what_was_acknowledged() {
    let (table, mut seed) = (Table::default(), 7_u64);
    let mut random = |limit: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % limit
    };
    let mut model = BTreeMap::new();
    let (mut revision, mut owner) = (0, 100);
    for _ in 0..60 {
        owner += 1;
        let mut persist = table.open(owner);
        table.fates(&[Fate::DoneUnheard, Fate::Lost][..random(3) as usize]);
        assert_eq!(persist.load(&mut |_| {}).unwrap().revision.get(), revision);
        for _ in 0..random(20) {
            let fates = [Fate::Done, Fate::DoneUnheard, Fate::Lost, Fate::Full];
            table.fates(&[fates[random(4) as usize]]);
            let key = format!("k{}", random(5));
            let batch = match random(3) {
                0 => vec![delete(&key, revision + 1)],
                1 => vec![put(&key, revision + 1, "first"), put(&key, revision + 2, "second")],
                _ => vec![put(&key, revision + 1, &revision.to_string())],
            };
            match persist.persist(&batch) {
                Ok(()) => {}
                Err(error) if error.is_retryable() => continue,
                Err(error) => panic!("{error}"),
            }
            for change in batch {
                revision = change.revision.get();
                match change.action {
                    Action::Put { value, .. } => model.insert(change.key.to_string(), (revision, value.to_vec())),
                    Action::Delete { .. } => model.remove(change.key.as_str()),
                };
            }
        }
        assert_eq!(contents(&table), model);
    }
    assert!(revision > 200, "{revision}");
}

#[test]
fn a_row_that_is_no_record_of_a_key_is_damage_that_is_named() {
    for (name, bytes) in
        [("a b", vec![0; 40]), ("a.", vec![0; 40]), ("a", vec![0; 24]), ("a", vec![]), (HEAD, vec![1; 47])]
    {
        let table = Table::default();
        table.open(1).load(&mut |_| {}).unwrap();
        table.0.lock().unwrap().rows.insert(name.to_owned(), bytes);
        let error = table.open(2).load(&mut |_| {}).unwrap_err();
        assert_eq!(error.kind(), PersistErrorKind::Damaged, "{name}");
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn an_opening_that_never_becomes_the_owner_gives_up() {
    let table = Table::default();
    table.0.lock().unwrap().is_crowded = true;
    let error = table.open(1).load(&mut |_| {}).unwrap_err();
    assert_eq!(error.kind(), PersistErrorKind::InUse);
    assert!(table.0.lock().unwrap().commits < 100);
}

#[test]
fn an_opening_that_reads_what_another_instance_has_written_since_fails() {
    let table = Table::default();
    table.0.lock().unwrap().is_overtaken = true;
    assert_eq!(table.open(1).load(&mut |_| {}).unwrap_err().kind(), PersistErrorKind::InUse);
    assert_eq!(contents(&table).into_keys().collect::<Vec<_>>(), ["a"]);
}

#[test]
fn nothing_is_stored_by_an_instance_that_has_not_loaded() {
    let table = Table::default();
    assert_eq!(table.open(1).persist(&[put("a", 1, "x")]).unwrap_err().kind(), PersistErrorKind::Rejected);
    assert!(table.0.lock().unwrap().rows.is_empty());
}
