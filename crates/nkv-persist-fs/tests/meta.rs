//! What format 3 is for: meta, tombstones, several changes of one revision, an epoch that begins without a restart, and the
//! way there from a directory of version 2. On the simulated disk, with the power cut at any call.
#![allow(clippy::unwrap_used, reason = "a test may fail")]

mod common;

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use common::*;
use nkv_core::mailbox::Mailbox;
use nkv_core::{Action, Change, Epoch, Key, Meta, NotifyKeyValue, PersistErrorKind, PersistValue, Revision, Timestamp};
use nkv_persist_fs::sim::SimFs;
use nkv_persist_fs::{Durability, FsOptions, check_with, repair_with};

fn with_meta(change: Change, meta: &[u8]) -> Change {
    Change { meta: Meta::new(meta), ..change }
}

/// The tombstone of a reserved key.
fn reserved(name: &str, revision: u64, meta: &[u8]) -> Change {
    Change { key: Key::reserved(name).unwrap(), ..with_meta(delete("k", revision), meta) }
}

/// A store and what it must hold.
struct Subject {
    fs: SimFs,
    persist: Option<Storage>,
    model: Model,
    revision: u64,
}

impl Subject {
    fn new() -> Self {
        let fs = SimFs::new();
        let persist = Some(open(&fs, &options()).unwrap());
        Subject { fs, persist, model: Model::new(), revision: 0 }
    }

    fn persist(&mut self) -> &mut Storage {
        self.persist.as_mut().unwrap()
    }

    fn store(&mut self, batch: &[Change]) {
        self.persist().persist(batch).unwrap_or_else(|e| panic!("{batch:?}: {e}"));
        apply(&mut self.model, batch);
        self.revision = batch.last().unwrap().revision.get();
    }

    /// Overwrites a key until nothing is left of the segments that are there now.
    fn churn(&mut self) {
        let (before, last) = (segments(&self.fs), self.revision + 500);
        while segments(&self.fs).iter().any(|name| before.contains(name)) {
            assert!(self.revision < last, "{before:?} do not go");
            self.store(&[put("churn", self.revision + 1, vec![1; 900])]);
            self.persist().maintain().unwrap();
        }
    }

    /// Opens it again, after a clean end or a kill, and compares what it holds, and what it counts.
    fn reopen(&mut self, is_clean: bool, what: &str) {
        let persist = self.persist.take().unwrap();
        let before = persist.monitor().stats();
        if is_clean {
            persist.close().unwrap();
        } else {
            self.fs = kill(&self.fs, persist);
        }
        let mut persist = open(&self.fs, &options()).unwrap_or_else(|e| panic!("{what}: {e}"));
        let (state, loaded) = load(&mut persist).unwrap();
        assert_eq!((&state, loaded.revision.get()), (&self.model, self.revision), "{what}");
        let tombstones = self.model.values().filter(|kept| kept.value.is_none()).count();
        let stats = persist.monitor().stats();
        assert_eq!((stats.keys, stats.tombstones), (self.model.len() - tombstones, tombstones), "{what}");
        let counts = |stats: nkv_persist_fs::FsStats| (stats.keys, stats.tombstones, stats.live_bytes);
        assert_eq!(counts(stats), counts(before), "{what}");
        self.persist = Some(persist);
    }
}

#[test]
fn meta_and_tombstones_come_back_after_restarts_and_compaction_until_a_change_takes_their_place() {
    let mut subject = Subject::new();
    assert!(subject.persist().keeps_meta());
    subject.store(&[
        with_meta(put("a", 1, "1"), b"stamp"),
        with_meta(put("b", 2, "2"), b""),
        put("c", 3, "3"),
        put("d", 4, "4"),
        with_meta(delete("c", 5), b"gone"),
        with_meta(delete("never", 6), &[b'm'; 2_000]),
        reserved("seen", 7, b"4711"),
        with_meta(delete("d", 8), b""),
    ]);
    for what in ["as it was stored", "compacted", "compacted again"] {
        subject.reopen(what != "compacted", what);
        subject.churn();
    }
    let at = subject.revision;
    subject.store(&[
        put("c", at + 1, "back"),
        delete("never", at + 2),
        reserved("seen", at + 3, b"4712"),
        with_meta(delete("d", at + 4), b"again"),
        put("a", at + 5, "without"),
        with_meta(delete("b", at + 6), b"b"),
    ]);
    for what in ["replaced", "replaced and compacted"] {
        subject.reopen(what == "replaced", what);
        subject.churn();
    }
    // All of it goes, and its space too.
    let keys: Vec<_> = subject.model.keys().filter(|key| *key != "churn").cloned().collect();
    for key in &keys {
        let stored = key.strip_prefix("..").map_or_else(|| Key::new(key), Key::reserved).unwrap();
        subject.store(&[Change { key: stored, ..delete("k", subject.revision + 1) }]);
    }
    assert_eq!((keys.len(), subject.model.len()), (5, 1));
    subject.churn();
    subject.reopen(true, "dropped");
    let live = subject.persist().monitor().stats().live_bytes;
    assert!(live < 1_000, "{live} bytes");
}

#[test]
fn many_keys_of_one_revision_are_replaced_and_deleted_one_by_one() {
    for seed in 0..4 * scale() as u64 {
        let (mut subject, mut rng) = (Subject::new(), Rng(seed));
        let at_once = |revision, from: usize, to: usize, len| -> Vec<Change> {
            (from..to).map(|at| put(&format!("k.{at}"), revision, vec![at as u8; len])).collect()
        };
        subject.store(&[put("k.0", 1, "old"), put("k.7", 2, "old")]);
        // What shares a revision may come in several batches.
        subject.store(&at_once(5, 0, 20, 100));
        subject.store(&at_once(5, 20, 30, 100));
        subject.store(&[with_meta(delete("k.30", 5), b"gone"), put("k.31", 5, "last")]);
        subject.reopen(true, "all of one revision");
        let mut keys: Vec<usize> = (0..32).collect();
        while !keys.is_empty() {
            let key = format!("k.{}", keys.swap_remove(rng.below(keys.len())));
            let revision = subject.revision + 1;
            match rng.below(4) {
                0 => subject.store(&[put(&key, revision, "alone")]),
                1 => subject.store(&[delete(&key, revision)]),
                2 => subject.store(&[with_meta(delete(&key, revision), b"meta")]),
                // Twice in a batch, beside others of the same revisions.
                _ => subject.store(&[
                    put("beside", revision, "1"),
                    put(&key, revision, "1"),
                    put(&key, revision + 1, "2"),
                    put("beside", revision + 1, "2"),
                    put("and", revision + 1, "2"),
                ]),
            }
            match rng.below(5) {
                0 => subject.churn(),
                1 => subject.reopen(true, &format!("seed {seed}, closed")),
                2 => subject.reopen(false, &format!("seed {seed}, killed")),
                _ => {}
            }
        }
        subject.churn();
        subject.reopen(true, &format!("seed {seed}, at the end"));
    }
}

/// What the store would receive of a state: its puts.
fn state_of(model: &Model) -> Vec<Change> {
    let put = |(key, kept): (&String, &Kept)| {
        let action = Action::Put { value: kept.value.clone()?.into(), expiry: kept.expiry };
        let (key, revision) = (Key::new(key).unwrap(), Revision::new(kept.revision));
        Some(Change { key, revision, replaces: Revision::ZERO, action, meta: Meta::from(kept.meta.as_deref()) })
    };
    model.iter().filter_map(put).collect()
}

#[test]
fn what_a_store_is_fed_from_elsewhere_is_there_after_restarts_and_compaction() {
    for seed in 0..6 * scale() as u64 {
        let (fs, mut rng, mut model, mut at, mut epoch) = (SimFs::new(), Rng(seed), Model::new(), 0, 1);
        let open_store = || {
            let persist = nkv_persist_fs::FsPersist::open_with(Arc::new(fs.clone()), DIR, options()).unwrap();
            NotifyKeyValue::<_, Mailbox>::open_at(persist, Timestamp::from_millis(0)).unwrap()
        };
        let mut store = open_store();
        for batch in mixed_history(seed, 160, 500) {
            let what = format!("seed {seed}, revision {at}");
            match rng.below(16) {
                0 => {
                    // The source has begun anew, with a part of what there was.
                    epoch += 1;
                    model.retain(|_, kept| kept.value.is_some() && rng.below(2) == 0);
                    let newest = model.values().map(|kept| kept.revision).max().unwrap_or(0);
                    at = newest + rng.below(2) as u64;
                    store.replace(state_of(&model), Revision::new(at), Epoch::new(epoch)).unwrap();
                }
                1 => {
                    // A delete was missed.
                    at += 1;
                    let gone = model.iter().find(|(_, kept)| kept.value.is_some()).map(|(key, _)| key.clone());
                    gone.iter().for_each(|key| _ = model.remove(key));
                    store.replace(state_of(&model), Revision::new(at), store.epoch()).unwrap();
                }
                2..5 => {
                    store.close().unwrap();
                    let mut persist = open(&fs, &options()).unwrap();
                    let (state, loaded) = load(&mut persist).unwrap();
                    assert_eq!((&state, loaded.revision.get()), (&model, at), "{what}");
                    assert!(epoch == 1 || loaded.epoch == Epoch::new(epoch), "{what}: {}", loaded.epoch);
                    persist.maintain().unwrap();
                    persist.close().unwrap();
                    store = open_store();
                }
                _ => {}
            }
            let is_new = |change: &&Change| change.revision.get() > at;
            let batch: Vec<Change> = batch.iter().filter(is_new).cloned().collect();
            store.apply(batch.clone()).unwrap_or_else(|e| panic!("{what}: {batch:?}: {e}"));
            apply(&mut model, &batch);
            at = batch.last().map_or(at, |last| last.revision.get());
        }
    }
}

#[test]
fn what_does_not_follow_among_changes_of_one_revision_is_rejected() {
    let fs = SimFs::new();
    let mut persist = open(&fs, &options()).unwrap();
    persist.persist(&[put("a", 5, "1"), put("b", 5, "1"), with_meta(delete("c", 5), b"")]).unwrap();
    let replaces = |change: Change, revision| Change { replaces: Revision::new(revision), ..change };
    let before = fs.digest();
    for (batch, why) in [
        (vec![put("d", 4, "")], "a revision that has gone by"),
        (vec![put("b", 5, "")], "the revision that the key has"),
        (vec![put("c", 5, "")], "the revision that its tombstone has"),
        (vec![replaces(put("b", 6, ""), 4)], "what b never had"),
        (vec![replaces(put("b", 6, ""), 5), replaces(put("b", 7, ""), 5)], "b twice"),
        (vec![replaces(put("a", 6, ""), 5), replaces(delete("a", 7), 5)], "a twice"),
        (vec![replaces(delete("b", 6), 5), replaces(put("b", 7, ""), 6)], "what is deleted"),
        (vec![put("d", 6, ""), put("e", 6, ""), replaces(put("e", 6, ""), 6)], "itself"),
        (vec![put("d", 6, ""), put("e", 6, ""), replaces(put("e", 7, ""), 5)], "what e never had"),
        (vec![Change { meta: Meta::new(&[0; 65_536]), ..put("d", 6, "") }], "too long a meta"),
    ] {
        let error = persist.persist_as_it_is(&batch).expect_err(why);
        assert_eq!(error.kind(), PersistErrorKind::Rejected, "{why}: {error}");
        assert_eq!(fs.digest(), before, "{why}");
    }
    let batch =
        [put("d", 5, "1"), replaces(put("b", 6, "2"), 5), replaces(put("a", 6, "2"), 5), replaces(put("d", 7, "2"), 5)];
    persist.persist_as_it_is(&batch).unwrap();
    let longest = Change { meta: Meta::new(&[7; 65_535]), ..put("e", 7, "") };
    persist.persist_as_it_is(&[longest]).unwrap();
    assert_eq!(load(&mut persist).unwrap().0.values().map(|kept| kept.revision).collect::<Vec<_>>(), [6, 6, 5, 7, 7]);
}

#[test]
fn a_repair_keeps_meta_tombstones_and_all_keys_of_a_revision() {
    let fs = SimFs::new();
    let mut persist = open(&fs, &options()).unwrap();
    let lost = [put("lost", 1, vec![1; 300])];
    let batches = [
        vec![put("gone", 2, "1"), put("new", 2, "1"), with_meta(delete("never", 2), b"n")],
        vec![with_meta(put("new", 3, vec![2; 3_000]), b"stamp"), with_meta(delete("gone", 3), b"g")],
        vec![reserved("seen", 3, b"4711"), put("one", 3, "1"), put("other", 3, "1")],
        vec![delete("other", 4), put("never", 4, "back")],
    ];
    let mut model = Model::new();
    persist.persist(&lost).unwrap();
    for batch in &batches {
        persist.persist(batch).unwrap();
        apply(&mut model, batch);
    }
    persist.close().unwrap();
    let first = Path::new(DIR).join("0000000000000001.log");
    let mut bytes = fs.read(&first).unwrap();
    bytes[200] ^= 1;
    fs.place(&first, Some(bytes));
    let report = check_with(Arc::new(fs.clone()), DIR).unwrap();
    assert!(report.damage.is_some() && report.kept_keys == 3, "{report}");
    repair_with(Arc::new(fs.clone()), DIR).unwrap();
    let report = check_with(Arc::new(fs.clone()), DIR).unwrap();
    assert_eq!((report.damage.as_ref(), report.keys, report.tombstones), (None, 3, 2), "{report}");
    assert!(report.to_string().contains("2 tombstones"), "{report}");
    let mut persist = open(&fs, &options()).unwrap();
    assert_eq!(load(&mut persist).unwrap().0, model);
    let next = [put("gone", 5, "2"), put("one", 5, "2"), delete("new", 6)];
    persist.persist(&next).unwrap();
    apply(&mut model, &next);
    persist.close().unwrap();
    assert_eq!(load(&mut open(&fs, &options()).unwrap()).unwrap().0, model);
}

const NEW: Epoch = Epoch::new(77);

/// What was stored before a new epoch and in it, and what of that was acknowledged.
#[derive(Debug, Default)]
struct Begun {
    old: usize,
    old_issued: usize,
    is_issued: bool,
    is_done: bool,
    new: usize,
    new_issued: usize,
    is_closed: bool,
}

fn begin(fs: &SimFs, options: &FsOptions, old: &[Vec<Change>], new: &[Vec<Change>]) -> Begun {
    let mut begun = Begun::default();
    let Ok(mut persist) = open(fs, options) else { return begun };
    for batch in old {
        begun.old_issued += 1;
        if persist.persist(batch).is_err() {
            return begun;
        }
        begun.old += 1;
    }
    begun.is_issued = true;
    if persist.begin_epoch(NEW).is_err() {
        return begun;
    }
    begun.is_done = true;
    for batch in new {
        begun.new_issued += 1;
        if persist.persist(batch).is_err() {
            return begun;
        }
        begun.new += 1;
        // In a relaxed durability a power cut may take all that comes before this.
        if begun.new.is_multiple_of(3) && persist.maintain().is_err() {
            return begun;
        }
    }
    begun.is_closed = persist.close().is_ok();
    begun
}

#[test]
fn whenever_the_power_goes_a_new_epoch_has_begun_with_nothing_in_it_or_all_is_as_it_was() {
    let (old, new) = (mixed_history(1, 12, 900), mixed_history(2, 6, 900));
    let (old_models, new_models) = (models(&old), models(&new));
    let (mut rng, mut images) = (Rng(seed()), 0);
    for options in [options(), options().with_durability(Durability::Os), options().with_reserve_bytes(0)] {
        let is_sync = options_are_sync(&options);
        for cut in 0.. {
            let fs = SimFs::new();
            fs.cut_power_at(cut);
            let begun = begin(&fs, &options, &old, &new);
            let mut seen = HashSet::new();
            for image in 0..24 * scale() {
                let image = fs.crash(&mut |n| if image < 2 { image } else { rng.below(n) });
                if !seen.insert(image.digest()) {
                    continue;
                }
                let what = format!("{options:?}, cut {cut}: {begun:?}");
                let mut persist = open(&image, &options).unwrap_or_else(|e| panic!("{what}: {e}"));
                let (state, loaded) = load(&mut persist).unwrap();
                let fits = |models: &[(Model, u64)], from: usize, to: usize| {
                    models[from..=to].iter().any(|(model, at)| *model == state && *at == loaded.revision.get())
                };
                let oldest = |acked: usize| if is_sync { acked } else { 0 };
                let is_old = !begun.is_done && fits(&old_models, oldest(begun.old), begun.old_issued);
                let is_new = begun.is_issued && fits(&new_models, oldest(begun.new), begun.new_issued);
                // A tail that was torn later begins an epoch of its own.
                let is_whole = if begun.is_done || loaded.epoch == NEW { is_new } else { is_old };
                assert!(is_whole, "{what}: {state:?} in {}", loaded.epoch);
                if loaded.epoch == NEW && !is_sync {
                    assert!(fits(&new_models, begun.new, begun.new_issued), "{what}: a loss in the same epoch");
                }
                // It goes on, with revisions that were given before.
                let next = [put("next", loaded.revision.get() + 1, "x")];
                persist.persist(&next).unwrap();
                persist.begin_epoch(Epoch::new(78)).unwrap();
                persist.persist(&[put("k.1", 1, "x")]).unwrap();
                persist.maintain().unwrap();
                persist.close().unwrap();
                let (state, loaded) = load(&mut open(&image, &options).unwrap()).unwrap();
                assert_eq!((state.len(), loaded.revision.get(), loaded.epoch), (1, 1, Epoch::new(78)), "{what}");
                assert_eq!(segments(&image).len(), 1, "{what}: {:?}", segments(&image));
                images += 1;
            }
            if begun.is_closed {
                break;
            }
        }
    }
    println!("TEST sim_begin_epoch images={images} violations=0 seed={}", seed());
}

#[test]
fn damage_to_an_epoch_that_began_is_never_silently_wrong() {
    let fs = SimFs::new();
    let mut persist = open(&fs, &options()).unwrap();
    persist.persist(&[put("old", 1, "1"), put("older", 2, "2")]).unwrap();
    persist.begin_epoch(NEW).unwrap();
    let batches = [vec![put("a", 1, "1")], vec![put("b", 2, "2"), with_meta(delete("c", 2), b"gone")]];
    let models = models(&batches);
    batches.iter().for_each(|batch| persist.persist(batch).unwrap());
    let fs = kill(&fs, persist);
    let [name] = &segments(&fs)[..] else { panic!("{:?}", segments(&fs)) };
    let path = Path::new(DIR).join(name);
    let bytes = fs.read(&path).unwrap();
    let (mut refused, mut cut) = (0, 0);
    let end = log_end(&bytes);
    for (at, len) in (0..end).flat_map(|at| [1, 60, 200].map(|len| (at, len))) {
        let (damaged, mut bytes) = (fs.fork(), bytes.clone());
        bytes[at..end.min(at + len)].iter_mut().for_each(|byte| *byte ^= 0x21);
        damaged.place(&path, Some(bytes));
        match open(&damaged, &options()) {
            Err(error) => {
                assert_eq!(error.kind(), PersistErrorKind::Damaged, "{at}: {error}");
                refused += 1;
            }
            Ok(mut persist) => {
                let (state, loaded) = load(&mut persist).unwrap();
                let known = models.iter().position(|(model, _)| *model == state);
                assert!(known == Some(2) || known.is_some() && loaded.epoch != NEW, "{at}, {len}: {state:?}");
                cut += usize::from(known != Some(2));
            }
        }
    }
    assert!(refused > 300 && cut > 100, "{refused} refused, {cut} cut");
}

#[test]
fn on_a_full_disk_a_new_epoch_begins_in_the_room_of_the_reserve() {
    let fs = SimFs::new();
    let mut persist = open(&fs, &options()).unwrap();
    persist.persist(&[put("a", 1, vec![1; 2_000])]).unwrap();
    fs.set_capacity(Some(fs.used()));
    persist.begin_epoch(NEW).unwrap();
    persist.persist(&[put("b", 1, vec![2; 1_000])]).unwrap();
    persist.close().unwrap();
    let (state, loaded) = load(&mut open(&fs, &options()).unwrap()).unwrap();
    assert_eq!((state.into_keys().collect::<Vec<_>>(), loaded.epoch), (vec!["b".to_owned()], NEW));
}

/// A directory that a program of version 2 has left when it was killed.
fn version_2() -> SimFs {
    let sim = SimFs::new();
    drop(open(&sim, &options()).unwrap());
    segments(&sim).iter().for_each(|name| sim.place(&Path::new(DIR).join(name), None));
    let frozen = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/format-2-killed");
    for entry in fs::read_dir(frozen).unwrap().map(|entry| entry.unwrap()) {
        let name = Path::new(DIR).join(entry.file_name());
        sim.place(&name, Some(fs::read(entry.path()).unwrap()));
    }
    sim
}

/// The version in the header of each segment, from the oldest on.
fn versions(fs: &SimFs) -> Vec<u8> {
    let header = |name: &String| fs.read(&Path::new(DIR).join(name)).unwrap().get(8).copied().unwrap_or(0);
    segments(fs).iter().map(header).collect()
}

/// Fails if a segment of version 2 says what that version does not have.
fn assert_version_2_is_pure(fs: &SimFs, what: &str) {
    for name in segments(fs) {
        let bytes = fs.read(&Path::new(DIR).join(&name)).unwrap();
        let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        let is_version_2 = bytes.get(8) == Some(&2);
        let (mut frame, end) = (72, if is_version_2 { log_end(&bytes) } else { 0 });
        while frame < end {
            let (mut at, body_end) = (frame + 40, frame + 40 + number(frame + 8));
            while at < body_end {
                let (kind, detail) = (bytes[at + 4], bytes[at + 5]);
                assert!(kind < 6 && detail & 0x40 == 0, "{what}: {name} at {at}");
                let key_len = usize::from(u16::from_le_bytes([bytes[at + 6], bytes[at + 7]]));
                let fields = at + 20 + 8 * usize::from(detail >> 7) + key_len + number(at + 16);
                assert!(fields == at + number(at) || bytes[fields] == 1, "{what}: {name} has a field at {fields}");
                at += number(at);
            }
            frame = body_end.next_multiple_of(8);
        }
    }
}

#[test]
fn a_version_2_directory_is_gone_on_with_and_becomes_one_of_version_3() {
    let fs = version_2();
    assert_eq!(versions(&fs), [2, 2, 2]);
    let mut persist = open(&fs, &options()).unwrap();
    let (mut model, loaded) = load(&mut persist).unwrap();
    assert_eq!((model.len(), loaded.revision.get()), (11, 32));
    let mut store = |batch: &[Change], persist: &mut Storage| {
        persist.persist(batch).unwrap();
        apply(&mut model, batch);
    };
    // What version 2 can say is written as it would: an older program can still go on with it.
    store(&[put("empty", 33, "no more"), delete("batch.a", 34)], &mut persist);
    assert_eq!(versions(&fs), [2, 2, 2]);
    assert_version_2_is_pure(&fs, "as long as nothing new is said");
    store(&[put("one", 35, "1"), put("other", 35, "1")], &mut persist);
    assert_eq!(versions(&fs), [2, 2, 2, 3]);
    store(&[with_meta(delete("one", 36), b"gone")], &mut persist);
    assert_version_2_is_pure(&fs, "beside a segment of version 3");
    for revision in 37..80 {
        store(&[put("churn", revision, vec![1; 900])], &mut persist);
        persist.maintain().unwrap();
    }
    assert!(versions(&fs).iter().all(|version| *version == 3), "{:?}", versions(&fs));
    persist.close().unwrap();
    let mut persist = open(&fs, &options()).unwrap();
    let (state, again) = load(&mut persist).unwrap();
    assert_eq!((state, again.epoch), (model, loaded.epoch));
    let lock = String::from_utf8(fs.read(&Path::new(DIR).join("LOCK")).unwrap()).unwrap();
    assert!(lock.starts_with("nkv data directory, format 3\n"), "{lock}");
}

/// The history behind what a directory of version 2 holds.
fn history_behind(revision: u64, seed: u64) -> Vec<Vec<Change>> {
    let at = |change: Change| Change { revision: Revision::new(revision + change.revision.get()), ..change };
    let mut history: Vec<Vec<Change>> =
        mixed_history(seed, 10, 700).into_iter().map(|batch| batch.into_iter().map(at).collect()).collect();
    // First something that version 2 has, then something that it has not.
    history[0] = vec![put("host.db1.load", revision + 1, vec![7; 100])];
    history[1].insert(0, with_meta(delete("empty", revision + 1), b"gone"));
    history
}

#[test]
fn whenever_the_power_goes_a_version_2_directory_is_whole_in_its_version_or_in_the_next() {
    let base = version_2();
    let (start, loaded) = load(&mut open(&base.fork(), &options()).unwrap()).unwrap();
    let (mut rng, mut images, mut old) = (Rng(seed()), 0, 0);
    for history in (0..2).map(|seed| history_behind(loaded.revision.get(), seed)) {
        let models: Vec<_> = (0..=history.len())
            .map(|stored| {
                let mut model = start.clone();
                history[..stored].iter().for_each(|batch| apply(&mut model, batch));
                model
            })
            .collect();
        for cut in 0.. {
            let fs = base.fork();
            fs.cut_power_at(cut);
            let (mut acked, mut issued, mut is_closed) = (0, 0, false);
            if let Ok(mut persist) = open(&fs, &options()) {
                while issued < history.len() && acked == issued {
                    issued += 1;
                    let is_stored = persist.persist(&history[issued - 1]).is_ok() && persist.maintain().is_ok();
                    acked += usize::from(is_stored);
                }
                is_closed = acked == history.len() && persist.close().is_ok();
            }
            let mut seen = HashSet::new();
            for image in 0..24 * scale() {
                let image = fs.crash(&mut |n| if image < 2 { image } else { rng.below(n) });
                if !seen.insert(image.digest()) {
                    continue;
                }
                let what = format!("cut {cut}, {acked} of {issued}, {:?}", versions(&image));
                assert_version_2_is_pure(&image, &what);
                old += usize::from(!versions(&image).contains(&3));
                let mut persist = open(&image, &options()).unwrap_or_else(|e| panic!("{what}: {e}"));
                let (state, loaded) = load(&mut persist).unwrap();
                assert!(models[acked..=issued].contains(&state), "{what}: {state:?}");
                let next =
                    [put("next", loaded.revision.get() + 1, "x"), reserved("next", loaded.revision.get() + 1, b"")];
                persist.persist(&next).unwrap();
                persist.close().unwrap();
                let mut expected = state;
                apply(&mut expected, &next);
                assert_eq!(load(&mut open(&image, &options()).unwrap()).unwrap().0, expected, "{what}");
                images += 1;
            }
            if is_closed {
                break;
            }
        }
    }
    assert!(old > 20 && images > 10 * old / 9, "{old} of {images} images are of version 2");
    println!("TEST sim_migration images={images} violations=0 seed={}", seed());
}
