//! What is stored with a batch, and what compaction does beside it.

use std::io;
use std::path::Path;

use nkv_core::{Action, Key, Meta, Reason, Revision};

use super::*;
use crate::check_with;
use crate::format::{FRAME_HEADER_LEN, FrameBuf, RECORD_HEADER_LEN, SEGMENT_HEADER_LEN};
use crate::sim::SimFs;
use crate::vfs::VfsFile;

fn options() -> FsOptions {
    FsOptions::default().with_background(false).with_segment_bytes(4096).with_reserve_bytes(0)
}

fn put(key: &str, revision: u64, replaces: u64) -> Change {
    let action = Action::Put { value: vec![1; 10].into(), expiry: None };
    change(key, revision, replaces, action)
}

fn delete(key: &str, revision: u64, replaces: u64) -> Change {
    change(key, revision, replaces, Action::Delete { reason: Reason::Deleted })
}

fn change(key: &str, revision: u64, replaces: u64, action: Action) -> Change {
    let (revision, replaces) = (Revision::new(revision), Revision::new(replaces));
    Change { key: Key::new(key).unwrap(), revision, replaces, action, meta: Meta::NONE }
}

fn revisions(persist: &mut FsPersist) -> Vec<(String, u64)> {
    let mut all = Vec::new();
    persist.load(&mut |stored| all.push((stored.key().to_string(), stored.revision().get()))).unwrap();
    all.sort();
    all
}

#[test]
fn a_batch_that_does_not_follow_from_what_is_stored_is_rejected_and_nothing_of_it_is_stored() {
    let fs = SimFs::new();
    let mut persist = FsPersist::open_with(Arc::new(fs.clone()), "/data", options()).unwrap();
    persist.persist(&[put("a", 3, 0), put("b", 4, 0)]).unwrap();
    let (before, stats) = (fs.digest(), persist.monitor().stats());
    for (batch, why) in [
        (vec![put("c", 5, 0), put("a", 6, 2)], "not there"),
        (vec![put("c", 5, 0), delete("a", 6, 9)], "not there"),
        (vec![put("a", 5, 6), put("a", 6, 3)], "not there"),
        (vec![delete("a", 5, 3), put("a", 6, 5)], "not there"),
        (vec![put("a", 5, 3), put("a", 6, 3)], "two changes"),
        (vec![put("c", 5, 0), put("c", 6, 5), delete("c", 7, 5)], "two changes"),
        (vec![put("c", 3, 0)], "increase"),
        (vec![put("c", 6, 0), put("d", 5, 0)], "increase"),
    ] {
        let error = persist.persist(&batch).unwrap_err();
        assert!(error.kind() == PersistErrorKind::Rejected && error.to_string().contains(why), "{batch:?}: {error}");
        assert_eq!((fs.digest(), persist.monitor().stats()), (before, stats), "{batch:?}");
    }
    persist.persist(&[put("a", 5, 3), put("c", 6, 0), put("a", 7, 5), delete("b", 8, 4), put("b", 9, 0)]).unwrap();
    let expected = [("a".to_owned(), 7), ("b".to_owned(), 9), ("c".to_owned(), 6)];
    assert_eq!(revisions(&mut persist), expected);
    let stats = persist.monitor().stats();
    drop(persist);
    let mut persist = FsPersist::open_with(Arc::new(fs), "/data", options()).unwrap();
    assert_eq!(revisions(&mut persist), expected);
    let again = persist.monitor().stats();
    assert_eq!((again.keys, again.live_bytes), (stats.keys, stats.live_bytes));
}

/// What a test does while a file is synced.
type Hook = Arc<Mutex<Option<Box<dyn Fn() + Send>>>>;

struct HookedFile(Arc<dyn VfsFile>, Hook);

impl std::fmt::Debug for HookedFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl VfsFile for HookedFile {
    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        self.0.write_at(bytes, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        if let Some(hook) = &*lock(&self.1) {
            hook();
        }
        self.0.sync_data()
    }

    fn try_lock(&self) -> io::Result<bool> {
        self.0.try_lock()
    }
}

struct Hooked(SimFs, Hook);

impl std::fmt::Debug for Hooked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl Vfs for Hooked {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        self.0.create_dir(dir)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.0.list(dir)
    }

    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn VfsFile>> {
        Ok(Arc::new(HookedFile(self.0.open(path, how)?, Arc::clone(&self.1))))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.0.sync_dir(dir)
    }
}

// A copy of the deleted value that is made now would stand behind the delete, and outlive it.
#[test]
fn while_a_delete_is_synced_the_log_is_free_for_compaction_and_the_deleted_value_is_not_copied() {
    let hook = Hook::default();
    let vfs = Hooked(SimFs::new(), Arc::clone(&hook));
    let mut persist = FsPersist::open_with(Arc::new(vfs), "/data", options()).unwrap();
    persist.persist(&[put("a", 1, 0)]).unwrap();
    let (shared, seen) = (Arc::clone(&persist.shared), Arc::new(Mutex::new(Vec::new())));
    let looks = Arc::clone(&seen);
    *lock(&hook) = Some(Box::new(move || {
        let is_live = shared.log.try_lock().ok().map(|log| log.index().contains(Revision::new(1)));
        lock(&looks).push(is_live);
    }));
    persist.persist(&[delete("a", 2, 1)]).unwrap();
    *lock(&hook) = None;
    assert_eq!(*lock(&seen), [Some(false)]);
}

/// A store on a disk with this hook. Its first segment holds the values of revisions 1 to 3, its second that of 4.
fn two_segments(fs: &SimFs, hook: &Hook) -> Result<FsPersist, PersistError> {
    let vfs = Hooked(fs.clone(), Arc::clone(hook));
    let mut persist = FsPersist::open_with(Arc::new(vfs), "/data", options())?;
    for revision in 1..=4 {
        persist.persist(&[long_put(&format!("a{revision}"), revision)])?;
    }
    Ok(persist)
}

fn long_put(key: &str, revision: u64) -> Change {
    change(key, revision, 0, Action::Put { value: vec![1; 1_000].into(), expiry: None })
}

/// Copies one value.
fn copy_one(shared: &Shared) -> Result<(), PersistError> {
    lock(&shared.compactor).step(&shared.log, 1)
}

/// Puts 5 at the end of the log, with a copy that is made before it, or during its sync; says whether that was
/// acknowledged.
fn put_beside_a_copy(fs: &SimFs, is_before: bool) -> Result<FsPersist, PersistError> {
    let hook = Hook::default();
    let mut persist = two_segments(fs, &hook)?;
    if is_before {
        copy_one(&persist.shared)?;
    } else {
        let shared = Arc::clone(&persist.shared);
        *lock(&hook) = Some(Box::new(move || drop(copy_one(&shared))));
    }
    let result = persist.persist(&[put("acked", 5, 0)]);
    *lock(&hook) = None;
    result.map(|()| persist)
}

// The copy did not say that the put was durable, nor the put that the copy was: damage to either was cut, and the
// put with it, as if a crash had torn it.
#[test]
fn damage_to_a_put_or_a_copy_beside_it_is_refused_after_a_kill() {
    let path = Path::new("/data/0000000000000002.log");
    for is_before in [true, false] {
        let fs = SimFs::new();
        let persist = put_beside_a_copy(&fs, is_before).unwrap();
        assert!(persist.monitor().stats().copied_bytes > 0, "this test is about copies");
        let bytes = fs.read(path).unwrap();
        let starts: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at..].starts_with(b"nkvF")).collect();
        assert_eq!(starts.len(), 4, "a put, a copy and a put, and what proves them");
        // A copy behind the put is not needed: its original is there still.
        for start in &starts[..if is_before { 3 } else { 2 }] {
            let (killed, mut damaged) = (fs.fork(), bytes.clone());
            damaged[start + 45] ^= 1;
            killed.place(path, Some(damaged));
            let opened = FsPersist::open_with(Arc::new(killed), "/data", options());
            let kind = opened.err().map(|error| error.kind());
            assert_eq!(kind, Some(PersistErrorKind::Damaged), "{is_before}, {start}");
        }
        drop(persist);
    }
}

#[test]
fn while_copies_are_made_beside_puts_what_is_acknowledged_survives_any_power_cut() {
    let mut images = 0;
    for is_before in [true, false] {
        for cut in 0.. {
            let fs = SimFs::new();
            fs.cut_power_at(cut);
            let persist = put_beside_a_copy(&fs, is_before);
            let mut seed = cut + 1;
            for image in 0..40 {
                let image = fs.crash(&mut |n| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    if image < 2 { image } else { (seed >> 33) as usize % n }
                });
                let mut again = FsPersist::open_with(Arc::new(image), "/data", options()).unwrap();
                let found = revisions(&mut again);
                let expected: Vec<_> = (1..=4).map(|n| (format!("a{n}"), n)).chain([("acked".into(), 5)]).collect();
                if persist.is_ok() {
                    assert_eq!(found, expected, "{is_before}, cut {cut}");
                }
                assert_eq!(found, expected[..found.len()], "{is_before}, cut {cut}");
                images += 1;
            }
            if persist.is_ok_and(|mut persist| persist.close().is_ok()) {
                break;
            }
        }
    }
    assert!(images > 500, "{images}");
}

// Zeros are the end of a segment, and a store without some of its values went into service.
#[test]
fn values_that_turn_into_zeros_between_the_opening_and_the_loading_are_missed() {
    let fs = SimFs::new();
    let mut persist = two_segments(&fs, &Hook::default()).unwrap();
    let path = Path::new("/data/0000000000000001.log");
    let mut bytes = fs.read(path).unwrap();
    let second = (100..).find(|at| bytes[*at..].starts_with(b"nkvF")).unwrap();
    bytes[second..].fill(0);
    fs.place(path, Some(bytes));
    let error = persist.load(&mut |_| ()).unwrap_err();
    assert!(error.kind() == PersistErrorKind::Damaged && error.to_string().contains("0001.log"), "{error}");
}

#[test]
fn a_whole_frame_with_a_text_that_is_no_key_is_damage() {
    let action = Action::Put { value: "x".into(), expiry: None };
    for (change, text) in [(delete("a.b", 1, 0), "a b"), (change("a.b", 1, 0, action), "a..")] {
        let fs = SimFs::new();
        let persist = FsPersist::open_with(Arc::new(fs.clone()), "/data", options()).unwrap();
        let mut len = 0;
        let mut frame = FrameBuf::of(|frame| len = frame.push_change(&change, change.replaces, false) as usize);
        let mut record = frame.stamp(0, 0, 0, 0)[FRAME_HEADER_LEN..][..len].to_vec();
        record[RECORD_HEADER_LEN..][..3].copy_from_slice(text.as_bytes());
        let append = |frame: &mut FrameBuf| lock(&persist.shared.log).append(frame);
        append(&mut FrameBuf::of(|frame| frame.push_copy(&record))).unwrap();
        drop(persist);
        let damage = check_with(Arc::new(fs.clone()), "/data").unwrap().damage.unwrap();
        assert_eq!((damage.reason, damage.offset), ("a key is not valid", SEGMENT_HEADER_LEN), "{text}");
        let error = FsPersist::open_with(Arc::new(fs), "/data", options()).unwrap_err();
        assert_eq!(error.kind(), PersistErrorKind::Damaged, "{error}");
    }
}

// Such a log was opened, and never loaded.
#[test]
fn a_revision_that_is_none_or_stands_twice_in_a_frame_is_damage() {
    for (frames, reason) in [
        (vec![vec![put("a", 1, 0)], vec![put("b", 0, 0)]], "a record replaces what is no older"),
        (vec![vec![put("a", 1, 0)], vec![delete("a", 0, 0)]], "a record replaces what is no older"),
        (vec![vec![put("a", 1, 0)], vec![put("a", 2, 2)]], "a record replaces what is no older"),
        (vec![vec![put("a", 1, 0)], vec![put("a", 5, 1), put("b", 5, 0)]], "two records of a frame have one revision"),
    ] {
        let fs = SimFs::new();
        let persist = FsPersist::open_with(Arc::new(fs.clone()), "/data", options()).unwrap();
        for batch in frames {
            let mut frame = FrameBuf::of(|frame| {
                batch.iter().for_each(|change| _ = frame.push_change(change, change.replaces, false))
            });
            lock(&persist.shared.log).append(&mut frame).unwrap();
        }
        drop(persist);
        assert_eq!(check_with(Arc::new(fs.clone()), "/data").unwrap().damage.unwrap().reason, reason);
        crate::repair_with(Arc::new(fs.clone()), "/data").unwrap();
        let mut persist = FsPersist::open_with(Arc::new(fs), "/data", options()).unwrap();
        assert_eq!(revisions(&mut persist), [("a".to_owned(), 1)]);
    }
}

#[test]
fn nothing_says_what_is_durable_in_a_log_whose_sync_has_failed() {
    let fs = SimFs::new();
    let persist = FsPersist::open_with(Arc::new(fs.clone()), "/data", options()).unwrap();
    let mut log = lock(&persist.shared.log);
    let append = |log: &mut Log, change| {
        log.append(&mut FrameBuf::of(|frame| _ = frame.push_change(&change, Revision::ZERO, false)))
    };
    append(&mut log, put("a", 1, 0)).unwrap();
    let pending = log.start_sync().unwrap();
    let result = pending.run();
    // Compaction, meanwhile.
    append(&mut log, put("b", 2, 0)).unwrap();
    let _ = log.poison(PersistError::new(PersistErrorKind::Io, "its sync has failed"));
    log.end_sync(&pending, result).unwrap();
    let before = fs.mutations();
    log.prove();
    assert_eq!(fs.mutations(), before);
}
