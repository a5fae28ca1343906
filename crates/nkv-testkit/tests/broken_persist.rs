//! Negative controls: storage that breaks one line of its contract, which the suite has to see.
#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code too")]

use std::collections::{BTreeMap, HashMap};
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Mutex};

use nkv_core::{
    Action, Change, Epoch, Key, KeyRef, Loaded, MemoryPersist, Meta, PersistError, PersistErrorKind, PersistValue,
    Prepared, Record, RecordRef, Revision, StoredRef,
};
use nkv_testkit::persist::{self, PersistHarness};

/// What is wrong with a [`Broken`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    None,
    ForgetsDeletes,
    ForgetsPutsAfterDeletes,
    LosesRevisionOfDeletes,
    SplitsBatches,
    AppliesBatchesBackwards,
    KeepsTheFirstValue,
    VisitsTwice,
    ForgetsExpiry,
    KeepsOldExpiry,
    TakesEmptyForDeleted,
    FoldsCase,
    TrimsValues,
    CutsLargeValues,
    CutsLongKeys,
    DeletesTheBranch,
    ChangesEpoch,
    LosesTheLastBatch,
    LoadForgets,
    CountsRevisionsItself,
    IsNeverEmpty,
    PadsKeys,
    StoresWhatIsPrepared,
    StoresWhatWasPrepared,
    ClosesInANewEpoch,
    ForgetsOnClose,
}

#[derive(Debug)]
struct Disk {
    flaw: Flaw,
    records: BTreeMap<Key, Record>,
    old: Vec<Record>,
    revision: Revision,
    opened: u128,
    closed: u128,
}

#[derive(Debug)]
struct Broken {
    disk: Arc<Mutex<Disk>>,
    prepared: Option<Vec<Change>>,
    held_back: Option<Vec<Change>>,
}

fn broken(flaw: Flaw) -> impl PersistHarness {
    let disk = Disk { flaw, records: BTreeMap::new(), old: vec![], revision: Revision::ZERO, opened: 0, closed: 0 };
    let disk = Arc::new(Mutex::new(disk));
    move || {
        disk.lock().unwrap().opened += 1;
        Broken { disk: Arc::clone(&disk), prepared: None, held_back: None }
    }
}

impl Disk {
    fn put(&mut self, mut record: Record) {
        let known = self.records.get(&record.key).cloned();
        match self.flaw {
            Flaw::KeepsTheFirstValue if known.is_some() => return,
            Flaw::ForgetsExpiry => record.expiry = None,
            Flaw::KeepsOldExpiry => record.expiry = record.expiry.or(known.as_ref().and_then(|known| known.expiry)),
            Flaw::TakesEmptyForDeleted if record.value.is_empty() => {
                self.records.remove(&record.key);
                return;
            }
            Flaw::FoldsCase => record.key = Key::new(&record.key.as_str().to_lowercase()).unwrap(),
            Flaw::TrimsValues => record.value = record.value.trim_ascii().to_vec().into(),
            Flaw::CutsLargeValues => record.value.truncate(65_535),
            Flaw::CutsLongKeys => {
                record.key = Key::new(record.key.as_str().get(..255).unwrap_or(record.key.as_str())).unwrap()
            }
            _ => {}
        }
        self.old.extend(known);
        self.records.insert(record.key.clone(), record);
    }

    fn delete(&mut self, key: &Key) {
        match self.flaw {
            Flaw::ForgetsDeletes => {}
            Flaw::DeletesTheBranch => self.records.retain(|known, _| known != key && !known.is_below(key)),
            _ => _ = self.records.remove(key),
        }
    }

    fn apply(&mut self, change: &Change) {
        let Change { key, revision, action, .. } = change.clone();
        match action {
            Action::Put { .. } if self.flaw == Flaw::ForgetsPutsAfterDeletes && self.revision > Revision::new(3) => {}
            Action::Put { value, expiry } => self.put(Record { key, value, revision, expiry }),
            Action::Delete { .. } => self.delete(&key),
        }
        let is_delete = matches!(change.action, Action::Delete { .. });
        self.revision = match self.flaw {
            Flaw::LosesRevisionOfDeletes if is_delete => self.revision,
            Flaw::CountsRevisionsItself => self.revision.next(),
            _ => revision,
        };
    }
}

impl PersistValue for Broken {
    fn load(&mut self, visit: &mut dyn FnMut(StoredRef<'_>)) -> Result<Loaded, PersistError> {
        let mut disk = self.disk.lock().unwrap();
        if disk.flaw == Flaw::VisitsTwice {
            disk.old.drain(..).for_each(|record| visit(record.lend().into()));
        }
        for record in disk.records.values() {
            let padded = format!("{} ", record.key);
            let key = if disk.flaw == Flaw::PadsKeys { &padded } else { record.key.as_str() };
            visit(RecordRef { key: KeyRef::checked_before(key), ..record.lend() }.into());
        }
        let loaded = Loaded {
            epoch: Epoch::new(if disk.flaw == Flaw::ChangesEpoch { disk.opened } else { 1 + disk.closed }),
            revision: if disk.flaw == Flaw::IsNeverEmpty { disk.revision.max(Revision::new(1)) } else { disk.revision },
        };
        if disk.flaw == Flaw::LoadForgets {
            disk.records.clear();
        }
        Ok(loaded)
    }

    fn persist(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        let mut disk = self.disk.lock().unwrap();
        match disk.flaw {
            Flaw::LosesTheLastBatch => {
                let due = self.held_back.replace(batch.to_vec());
                due.iter().flatten().for_each(|change| disk.apply(change));
            }
            Flaw::SplitsBatches => batch.iter().take(3).for_each(|change| disk.apply(change)),
            Flaw::AppliesBatchesBackwards => {
                batch.iter().rev().for_each(|change| disk.apply(change));
                disk.revision = batch.last().unwrap().revision;
            }
            Flaw::StoresWhatWasPrepared => {
                let prepared = self.prepared.take();
                prepared.as_deref().unwrap_or(batch).iter().for_each(|change| disk.apply(change));
            }
            _ => batch.iter().for_each(|change| disk.apply(change)),
        }
        Ok(())
    }

    fn prepare(&mut self, batch: &[Change]) -> Result<Prepared, PersistError> {
        let mut disk = self.disk.lock().unwrap();
        if disk.flaw == Flaw::StoresWhatIsPrepared {
            batch.iter().for_each(|change| disk.apply(change));
        }
        self.prepared = Some(batch.to_vec());
        Ok(Prepared::Room)
    }

    fn close(&mut self) -> Result<(), PersistError> {
        let mut disk = self.disk.lock().unwrap();
        match disk.flaw {
            Flaw::ClosesInANewEpoch => disk.closed += 1,
            Flaw::ForgetsOnClose => disk.records.clear(),
            _ => {}
        }
        Ok(())
    }
}

/// The lines that `flaw` fails.
fn failing(flaw: Flaw) -> Vec<&'static str> {
    fn check<H: PersistHarness>(open: impl Fn() -> H) -> Vec<&'static str> {
        let lines = persist::lines::<H>().into_iter();
        let failing = lines.filter(|(_, line)| panic::catch_unwind(AssertUnwindSafe(|| line(&open()))).is_err());
        failing.map(|(name, _)| name).collect()
    }
    check(|| broken(flaw))
}

#[test]
fn storage_without_a_flaw_passes_every_line() {
    assert_eq!(failing(Flaw::None), Vec::<&str>::new());
}

macro_rules! each_flaw_is_caught_by_its_line {
    ($($test:ident: $flaw:ident, $line:ident;)*) => {$(
        #[test]
        fn $test() {
            let failing = failing(Flaw::$flaw);
            assert!(failing.contains(&stringify!($line)), "{failing:?}");
        }
    )*};
}

each_flaw_is_caught_by_its_line! {
    forgotten_deletes_are_caught: ForgetsDeletes, a_delete_removes_its_key_and_no_other;
    forgotten_puts_after_deletes_are_caught: ForgetsPutsAfterDeletes, a_deleted_key_can_be_put_again;
    a_lost_revision_is_caught: LosesRevisionOfDeletes, the_highest_revision_survives_even_when_its_key_was_deleted;
    own_revisions_are_caught: CountsRevisionsItself, revisions_may_have_gaps;
    a_split_batch_is_caught: SplitsBatches, a_batch_survives_together;
    a_reordered_batch_is_caught: AppliesBatchesBackwards, a_batch_is_applied_in_its_order;
    a_stale_value_is_caught: KeepsTheFirstValue, an_overwrite_leaves_only_the_newest;
    a_second_visit_is_caught: VisitsTwice, load_visits_each_key_once;
    a_forgotten_expiry_is_caught: ForgetsExpiry, expiry_survives;
    an_expiry_that_stays_is_caught: KeepsOldExpiry, an_overwrite_replaces_the_expiry;
    an_empty_value_taken_for_none_is_caught: TakesEmptyForDeleted, an_empty_value_is_a_value;
    folded_case_is_caught: FoldsCase, keys_that_differ_in_case_are_different;
    trimmed_values_are_caught: TrimsValues, values_are_any_bytes;
    cut_values_are_caught: CutsLargeValues, a_large_value_survives;
    cut_keys_are_caught: CutsLongKeys, the_longest_keys_survive;
    a_deleted_branch_is_caught: DeletesTheBranch, a_key_is_independent_of_the_keys_below_it;
    a_changing_epoch_is_caught: ChangesEpoch, the_epoch_stays_the_same_over_restarts;
    a_lost_batch_is_caught: LosesTheLastBatch, what_was_stored_survives_a_restart;
    a_load_that_forgets_is_caught: LoadForgets, loading_changes_nothing;
    a_text_that_is_no_key_is_caught: PadsKeys, what_was_stored_survives_a_restart;
    a_batch_stored_when_it_is_prepared_is_caught: StoresWhatIsPrepared, preparing_a_batch_stores_nothing;
    a_prepared_batch_in_place_of_another_is_caught: StoresWhatWasPrepared, a_batch_may_be_prepared_and_another_stored;
    a_new_epoch_with_each_close_is_caught: ClosesInANewEpoch, closing_loses_nothing;
    a_close_that_forgets_is_caught: ForgetsOnClose, closing_loses_nothing;
    storage_that_is_never_empty_is_caught: IsNeverEmpty, new_storage_is_empty;
}

/// What is wrong with a [`Forgetful`], which says that it keeps meta.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MetaFlaw {
    None,
    ForgetsMeta,
    CutsMeta,
    KeepsMetaOfBefore,
    ForgetsTombstones,
    DropsNoTombstone,
    TakesReservedForKeys,
    KeepsTheEpoch,
    KeepsRecords,
    BeginsNoEpoch,
}

#[derive(Debug)]
struct Forgetful {
    disk: MemoryPersist,
    flaw: MetaFlaw,
    known: Arc<Mutex<HashMap<Key, Meta>>>,
}

impl PersistValue for Forgetful {
    fn load(&mut self, visit: &mut dyn FnMut(StoredRef<'_>)) -> Result<Loaded, PersistError> {
        self.disk.load(visit)
    }

    fn persist(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        let mut batch = batch.to_vec();
        for change in &mut batch {
            let is_delete = matches!(change.action, Action::Delete { .. });
            let meta = std::mem::take(&mut change.meta);
            let bytes = meta.as_bytes();
            change.meta = match self.flaw {
                MetaFlaw::ForgetsMeta if !is_delete => Meta::NONE,
                MetaFlaw::ForgetsTombstones if is_delete => Meta::NONE,
                MetaFlaw::CutsMeta => Meta::from(bytes.map(|bytes| &bytes[..bytes.len().min(255)])),
                MetaFlaw::KeepsMetaOfBefore if !is_delete && bytes.is_none() => {
                    self.known.lock().unwrap().get(&change.key).cloned().unwrap_or_default()
                }
                MetaFlaw::DropsNoTombstone if is_delete && bytes.is_none() => Meta::new(b"still"),
                _ => meta.clone(),
            };
            self.known.lock().unwrap().insert(change.key.clone(), meta);
            if self.flaw == MetaFlaw::TakesReservedForKeys && change.key.is_reserved() {
                change.key = Key::new(change.key.as_str().trim_start_matches('.')).unwrap();
            }
        }
        self.disk.persist(&batch)
    }

    fn keeps_meta(&self) -> bool {
        true
    }

    fn begin_epoch(&mut self, epoch: Epoch) -> Result<(), PersistError> {
        match self.flaw {
            MetaFlaw::KeepsTheEpoch => self.disk.begin_epoch(Epoch::new(3)),
            MetaFlaw::KeepsRecords => Ok(()),
            MetaFlaw::BeginsNoEpoch => Err(PersistError::new(PersistErrorKind::Rejected, "never")),
            _ => self.disk.begin_epoch(epoch),
        }
    }
}

/// The lines that `flaw` fails.
fn failing_with_meta(flaw: MetaFlaw) -> Vec<&'static str> {
    fn check<H: PersistHarness>(open: impl Fn() -> H) -> Vec<&'static str> {
        let lines = persist::lines::<H>().into_iter();
        let failing = lines.filter(|(_, line)| panic::catch_unwind(AssertUnwindSafe(|| line(&open()))).is_err());
        failing.map(|(name, _)| name).collect()
    }
    check(|| {
        let (disk, known) = (MemoryPersist::new(Epoch::new(3)), Arc::default());
        move || Forgetful { disk: disk.clone(), flaw, known: Arc::clone(&known) }
    })
}

#[test]
fn what_is_wrong_with_meta_tombstones_and_epochs_is_caught() {
    assert_eq!(failing_with_meta(MetaFlaw::None), Vec::<&str>::new());
    for (flaw, line) in [
        (MetaFlaw::ForgetsMeta, "meta_survives_byte_for_byte"),
        (MetaFlaw::CutsMeta, "meta_survives_byte_for_byte"),
        (MetaFlaw::KeepsMetaOfBefore, "meta_survives_byte_for_byte"),
        (MetaFlaw::ForgetsTombstones, "a_tombstone_stays_until_a_change_takes_its_place"),
        (MetaFlaw::DropsNoTombstone, "a_tombstone_stays_until_a_change_takes_its_place"),
        (MetaFlaw::TakesReservedForKeys, "reserved_records_survive_beside_keys_of_the_same_name"),
        (MetaFlaw::KeepsTheEpoch, "an_epoch_begins_with_nothing"),
        (MetaFlaw::KeepsRecords, "an_epoch_begins_with_nothing"),
        (MetaFlaw::BeginsNoEpoch, "an_epoch_begins_with_nothing"),
    ] {
        let failing = failing_with_meta(flaw);
        assert!(failing.contains(&line), "{flaw:?}: {failing:?}");
    }
}
