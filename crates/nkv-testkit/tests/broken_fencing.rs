//! Negative controls: storage that several instances can open and that breaks a part of *One owner*, which the suite has
//! to see.
#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code too")]

use std::collections::BTreeMap;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Mutex};

use nkv_core::{
    Action, Change, Epoch, Key, Loaded, PersistError, PersistErrorKind, PersistValue, Record, Revision, StoredRef,
};
use nkv_testkit::fencing;
use nkv_testkit::persist::PersistHarness;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    None,
    AsksNobody,
    ComparesRevisionsAlone,
    IsOwnedByTheFirst,
    IsTakenBack,
    StoresWhatItRefuses,
    RefusesAsIfItMayBeTriedAgain,
    BeginsAnEpochForEachOwner,
    IsGivenUpByAClose,
}

#[derive(Debug, Default)]
struct Disk {
    records: BTreeMap<Key, Record>,
    revision: Revision,
    owner: u64,
    opened: u64,
}

#[derive(Debug)]
struct Shared {
    flaw: Flaw,
    disk: Arc<Mutex<Disk>>,
    owner: u64,
    revision: Revision,
}

impl PersistValue for Shared {
    fn load(&mut self, visit: &mut dyn FnMut(StoredRef<'_>)) -> Result<Loaded, PersistError> {
        let mut disk = self.disk.lock().unwrap();
        disk.opened += 1;
        self.owner = disk.opened;
        if self.flaw != Flaw::IsOwnedByTheFirst || disk.owner == 0 {
            disk.owner = self.owner;
        }
        self.revision = disk.revision;
        disk.records.values().map(StoredRef::from).for_each(visit);
        let epoch = if self.flaw == Flaw::BeginsAnEpochForEachOwner { disk.opened } else { 1 };
        Ok(Loaded { epoch: Epoch::new(epoch.into()), revision: disk.revision })
    }

    fn persist(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        let mut disk = self.disk.lock().unwrap();
        let is_owner = match self.flaw {
            Flaw::AsksNobody => true,
            Flaw::ComparesRevisionsAlone => disk.revision == self.revision,
            Flaw::IsGivenUpByAClose if disk.owner == 0 => false,
            _ => disk.owner == self.owner,
        };
        if is_owner || self.flaw == Flaw::StoresWhatItRefuses {
            for Change { key, revision, action, .. } in batch.iter().cloned() {
                self.revision = revision;
                disk.revision = revision;
                match action {
                    Action::Put { value, expiry } => {
                        disk.records.insert(key.clone(), Record { key, value, revision, expiry });
                    }
                    Action::Delete { .. } => drop(disk.records.remove(&key)),
                }
            }
        }
        if is_owner {
            return Ok(());
        }
        if self.flaw == Flaw::IsTakenBack {
            disk.owner = self.owner;
        }
        let may_retry = self.flaw == Flaw::RefusesAsIfItMayBeTriedAgain;
        let kind = if may_retry { PersistErrorKind::Io } else { PersistErrorKind::Poisoned };
        Err(PersistError::new(kind, "another owns it"))
    }

    fn close(&mut self) -> Result<(), PersistError> {
        if self.flaw == Flaw::IsGivenUpByAClose {
            self.disk.lock().unwrap().owner = 0;
        }
        Ok(())
    }
}

fn shared(flaw: Flaw) -> impl PersistHarness {
    let disk = Arc::new(Mutex::new(Disk::default()));
    move || Shared { flaw, disk: Arc::clone(&disk), owner: 0, revision: Revision::ZERO }
}

/// The parts that `flaw` fails.
fn failing(flaw: Flaw) -> Vec<&'static str> {
    fn check<H: PersistHarness>(open: impl Fn() -> H) -> Vec<&'static str> {
        let lines = fencing::lines::<H>().into_iter();
        let failing = lines.filter(|(_, line)| panic::catch_unwind(AssertUnwindSafe(|| line(&open()))).is_err());
        failing.map(|(name, _)| name).collect()
    }
    check(|| shared(flaw))
}

#[test]
fn storage_without_a_flaw_passes_every_part() {
    assert_eq!(failing(Flaw::None), Vec::<&str>::new());
}

#[test]
fn each_flaw_is_caught_by_its_part() {
    for (flaw, part) in [
        (Flaw::AsksNobody, "an_instance_that_was_replaced_stores_nothing"),
        (Flaw::ComparesRevisionsAlone, "an_instance_that_was_replaced_before_its_first_batch_stores_nothing"),
        (Flaw::IsOwnedByTheFirst, "a_new_owner_goes_on_where_the_old_one_was"),
        (Flaw::IsTakenBack, "an_instance_that_was_replaced_stores_nothing"),
        (Flaw::StoresWhatItRefuses, "an_instance_that_was_replaced_before_its_first_batch_stores_nothing"),
        (Flaw::RefusesAsIfItMayBeTriedAgain, "an_instance_that_was_replaced_stores_nothing"),
        (Flaw::BeginsAnEpochForEachOwner, "owners_that_come_and_go_change_neither_epoch_nor_revision"),
        (Flaw::IsGivenUpByAClose, "preparing_and_closing_an_instance_that_was_replaced_harms_nothing"),
    ] {
        let failing = failing(flaw);
        assert!(failing.contains(&part), "{flaw:?}: {failing:?}");
    }
}
