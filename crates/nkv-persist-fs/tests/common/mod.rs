//! What the tests of this crate share: changes, the model of what must survive, and randomness with a seed.
#![allow(clippy::unwrap_used, reason = "a test may fail")]
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::{BTreeMap, HashMap};
use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use nkv_core::{
    Action, Change, Epoch, Expiry, FailureHandler, Key, Loaded, Meta, PersistError, PersistValue, Prepared, Reason,
    Revision, StorageFigures, StoredRef,
};
use nkv_persist_fs::sim::SimFs;
use nkv_persist_fs::{FsOptions, FsPersist};

pub(crate) const DIR: &str = "/data";

/// Key to revision, value and expiry.
pub(crate) type Model = BTreeMap<String, Kept>;

/// What storage has of a key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) revision: u64,
    /// None in a tombstone.
    pub(crate) value: Option<Vec<u8>>,
    pub(crate) expiry: Option<Expiry>,
    pub(crate) meta: Option<Vec<u8>>,
}

impl Kept {
    pub(crate) fn text(&self) -> &str {
        str::from_utf8(self.value.as_ref().unwrap()).unwrap()
    }
}

pub(crate) fn put(key: &str, revision: u64, value: impl Into<Vec<u8>>) -> Change {
    let expiry =
        revision.is_multiple_of(5).then_some(Expiry { at: nkv_core::Timestamp::from_millis(revision), ttl_ms: 7 });
    let action = Action::Put { value: value.into().into(), expiry };
    Change {
        key: Key::new(key).unwrap(),
        revision: Revision::new(revision),
        replaces: Revision::ZERO,
        action,
        meta: Meta::NONE,
    }
}

pub(crate) fn delete(key: &str, revision: u64) -> Change {
    let reason = if revision.is_multiple_of(2) { Reason::Deleted } else { Reason::Expired };
    Change {
        key: Key::new(key).unwrap(),
        revision: Revision::new(revision),
        replaces: Revision::ZERO,
        action: Action::Delete { reason },
        meta: Meta::NONE,
    }
}

pub(crate) fn apply(model: &mut Model, batch: &[Change]) {
    for change in batch {
        let key = change.key.to_string();
        let meta = change.meta.as_bytes().map(<[u8]>::to_vec);
        let kept = Kept { revision: change.revision.get(), meta, ..Kept::default() };
        match &change.action {
            Action::Put { value, expiry } => {
                model.insert(key, Kept { value: Some(value.to_vec()), expiry: *expiry, ..kept })
            }
            Action::Delete { .. } if kept.meta.is_some() => model.insert(key, kept),
            Action::Delete { .. } => model.remove(&key),
        };
    }
}

/// The models after 0, 1, ... batches, each with the highest revision so far.
pub(crate) fn models(history: &[Vec<Change>]) -> Vec<(Model, u64)> {
    let mut all = vec![(Model::new(), 0)];
    for batch in history {
        let (mut model, _) = all[all.len() - 1].clone();
        apply(&mut model, batch);
        all.push((model, batch.iter().map(|c| c.revision.get()).max().unwrap()));
    }
    all
}

pub(crate) fn options() -> FsOptions {
    FsOptions::default().with_background(false).with_segment_bytes(4096).with_reserve_bytes(1024)
}

pub(crate) fn open(fs: &SimFs, options: &FsOptions) -> Result<Storage, PersistError> {
    FsPersist::open_with(Arc::new(fs.clone()), DIR, options.clone()).map(Storage::from)
}

/// Storage that gives each change the revision that it replaces, as a store does, so that no test has to say it.
#[derive(Debug)]
pub(crate) struct Storage {
    persist: FsPersist,
    /// The revision of each key, once something was loaded or is to be stored.
    present: Option<HashMap<Key, Revision>>,
}

impl Storage {
    pub(crate) fn close(mut self) -> Result<(), PersistError> {
        self.persist.close()
    }

    /// Stores a batch that says itself what it replaces.
    pub(crate) fn persist_as_it_is(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        self.present = None;
        self.persist.persist(batch)
    }

    /// The batch with what each change replaces, and the revisions that it leaves.
    fn with_replaced(&mut self, batch: &[Change]) -> Result<(Vec<Change>, HashMap<Key, Revision>), PersistError> {
        if self.present.is_none() {
            self.load(&mut |_| {})?;
        }
        let present = self.present.as_ref().unwrap();
        let mut next = HashMap::new();
        let mut batch = batch.to_vec();
        for change in &mut batch {
            let stored = || present.get(&change.key).copied().unwrap_or_default();
            change.replaces = next.get(&change.key).copied().unwrap_or_else(stored);
            let is_put = matches!(change.action, Action::Put { .. });
            next.insert(change.key.clone(), if is_put { change.revision } else { Revision::ZERO });
        }
        Ok((batch, next))
    }
}

impl From<FsPersist> for Storage {
    fn from(persist: FsPersist) -> Self {
        Storage { persist, present: None }
    }
}

impl Deref for Storage {
    type Target = FsPersist;

    fn deref(&self) -> &FsPersist {
        &self.persist
    }
}

#[deny(clippy::missing_trait_methods)]
impl PersistValue for Storage {
    fn load(&mut self, visit: &mut dyn FnMut(StoredRef<'_>)) -> Result<Loaded, PersistError> {
        let mut present = HashMap::new();
        let loaded = self.persist.load(&mut |stored| {
            // No change names a tombstone.
            if let Some(record) = stored.record() {
                present.insert(record.to_record().key, record.revision);
            }
            visit(stored);
        })?;
        self.present = Some(present);
        Ok(loaded)
    }

    fn persist(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        let (batch, next) = self.with_replaced(batch)?;
        self.persist.persist(&batch)?;
        self.present.as_mut().unwrap().extend(next);
        Ok(())
    }

    fn prepare(&mut self, batch: &[Change]) -> Result<Prepared, PersistError> {
        let (batch, _) = self.with_replaced(batch)?;
        self.persist.prepare(&batch)
    }

    fn keeps_meta(&self) -> bool {
        self.persist.keeps_meta()
    }

    fn waits(&self) -> bool {
        self.persist.waits()
    }

    fn begin_epoch(&mut self, epoch: Epoch) -> Result<(), PersistError> {
        self.persist.begin_epoch(epoch)?;
        self.present = Some(HashMap::new());
        Ok(())
    }

    fn on_failure(&mut self, handler: FailureHandler) {
        self.persist.on_failure(handler);
    }

    fn figures(&self) -> Option<Arc<dyn StorageFigures>> {
        self.persist.figures()
    }

    fn close(&mut self) -> Result<(), PersistError> {
        self.persist.close()
    }
}

/// What a process leaves that is killed now: no clean end, and what the operating system knows stays.
pub(crate) fn kill(fs: &SimFs, persist: Storage) -> SimFs {
    fs.cut_power_at(fs.mutations());
    drop(persist);
    fs.fork()
}

pub(crate) fn load(persist: &mut impl PersistValue) -> Result<(Model, Loaded), PersistError> {
    let mut model = Model::new();
    let loaded = persist.load(&mut |stored| {
        let (record, meta) = (stored.record(), stored.meta().map(<[u8]>::to_vec));
        let (value, expiry) = (record.map(|record| record.value.to_vec()), record.and_then(|record| record.expiry));
        let kept = Kept { revision: stored.revision().get(), value, expiry, meta };
        assert!(model.insert(stored.key().to_string(), kept).is_none(), "{} visited twice", stored.key());
    })?;
    Ok((model, loaded))
}

pub(crate) fn segments(fs: &SimFs) -> Vec<String> {
    use nkv_persist_fs::Vfs;
    let mut names = fs.list(Path::new(DIR)).unwrap();
    names.retain(|name| name.ends_with(".log"));
    names
}

/// Where the frames of a segment end: what follows are zeros, or nothing.
pub(crate) fn log_end(segment: &[u8]) -> usize {
    let mut end = 72;
    while segment[end..].starts_with(b"nkvF") {
        let body_len = u32::from_le_bytes(segment[end + 8..end + 12].try_into().unwrap());
        end += (40 + body_len as usize).next_multiple_of(8);
    }
    end
}

pub(crate) fn options_are_sync(options: &FsOptions) -> bool {
    format!("{options:?}").contains("durability: Sync")
}

/// A small generator of numbers: the same seed, the same numbers.
#[derive(Clone, Debug)]
pub(crate) struct Rng(pub u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// The seed of the random tests: `NKV_SEED`, or always the same.
pub(crate) fn seed() -> u64 {
    std::env::var("NKV_SEED").map_or(1, |text| text.parse().unwrap())
}

/// How many times as many images as usual are wanted: `NKV_IMAGES=100` for a night.
pub(crate) fn scale() -> usize {
    std::env::var("NKV_IMAGES").map_or(1, |text| text.parse().unwrap())
}

/// A history of batches over few keys: overwrites, deletes, batches of several, values of many sizes.
pub(crate) fn history(seed: u64, batches: usize, value_len_max: usize) -> Vec<Vec<Change>> {
    history_of(6, seed, batches, value_len_max)
}

pub(crate) fn history_of(keys: usize, seed: u64, batches: usize, value_len_max: usize) -> Vec<Vec<Change>> {
    let mut rng = Rng(seed);
    let mut revision = 0;
    let mut one = |rng: &mut Rng| {
        revision += 1 + rng.below(2) as u64;
        let key = format!("k.{}", rng.below(keys));
        match rng.below(5) {
            0 => delete(&key, revision),
            _ => put(&key, revision, vec![revision as u8; rng.below(value_len_max)]),
        }
    };
    (0..batches).map(|_| (0..1 + rng.below(3)).map(|_| one(&mut rng)).collect()).collect()
}

/// The same with what format 3 is for: meta, tombstones, reserved keys, and several changes of one revision, also from one
/// batch to the next.
pub(crate) fn mixed_history(seed: u64, batches: usize, value_len_max: usize) -> Vec<Vec<Change>> {
    let mut rng = Rng(seed);
    let (mut revision, mut last) = (1, HashMap::new());
    let mut one = |rng: &mut Rng| {
        let key = match rng.below(8) {
            0 => Key::reserved("seen").unwrap(),
            n => Key::new(&format!("k.{}", n % 5)).unwrap(),
        };
        // The revisions of one key rise.
        let is_free = last.get(&key).is_none_or(|last| *last < revision);
        revision += if is_free && rng.below(2) == 0 { 0 } else { 1 + rng.below(2) as u64 };
        last.insert(key.clone(), revision);
        let meta = match rng.below(3) {
            0 => Meta::NONE,
            1 => Meta::new(b""),
            _ => Meta::new(&vec![b'm'; rng.below(40)]),
        };
        let change = match rng.below(3) {
            0 => delete("k", revision),
            _ if key.is_reserved() => delete("k", revision),
            _ => put("k", revision, vec![revision as u8; rng.below(value_len_max)]),
        };
        Change { key, meta, ..change }
    };
    (0..batches).map(|_| (0..1 + rng.below(4)).map(|_| one(&mut rng)).collect()).collect()
}

/// Walks through all sequences of choices, as far as `max` allows, and then through random ones.
#[derive(Debug)]
pub(crate) struct Choices {
    taken: Vec<(usize, usize)>,
    at: usize,
    pub(crate) count: usize,
    max: usize,
    random: Option<Rng>,
}

impl Choices {
    pub(crate) fn new(max: usize, seed: u64) -> Self {
        Choices { taken: Vec::new(), at: 0, count: 0, max, random: Some(Rng(seed)) }
    }

    pub(crate) fn choose(&mut self, n: usize) -> usize {
        if self.count >= self.max / 2 {
            return self.random.as_mut().unwrap().below(n);
        }
        if self.at == self.taken.len() {
            self.taken.push((0, n));
        }
        self.at += 1;
        self.taken[self.at - 1].0
    }

    /// Goes to the next sequence; false when there is none.
    pub(crate) fn advance(&mut self) -> bool {
        self.at = 0;
        self.count += 1;
        if self.count >= self.max {
            return false;
        }
        if self.count >= self.max / 2 {
            return true;
        }
        while let Some((choice, n)) = self.taken.pop() {
            if choice + 1 < n {
                self.taken.push((choice + 1, n));
                return true;
            }
        }
        false
    }
}
