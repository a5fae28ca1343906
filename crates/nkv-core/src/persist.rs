//! How a store keeps its values across restarts.

use std::collections::HashMap;
use std::error::Error as StdError;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::figures::StorageFigures;
use crate::key::{Key, KeyRef};
use crate::meta::Meta;
use crate::record::{Action, Change, Expiry, Record, RecordRef, ValueRef};
use crate::revision::{Epoch, Revision};

/// Keeps values across restarts.
///
/// # Contract
///
/// - *Whole*: after a crash, [`load`](Self::load) visits, for each key, a value that some batch stored; never a mixture.
/// - *Together*: a batch survives whole or not at all, and what survives is a prefix of the batches given.
/// - *Durable*: what was given before `persist` returned `Ok` survives, to the degree the backend promises.
/// - *Revisions*: the highest revision ever stored survives too, even when its key was deleted.
/// - *Keys*: what [`load`](Self::load) visits has a [`KeyRef`](crate::KeyRef), made by one of its constructors: of records
///   one that [`Key::check`] accepts, of tombstones one that [`Key::check_stored`] accepts. They are not checked again.
/// - *Epoch*: it stays the same over restarts, and changes whenever something acknowledged may have been lost, or when
///   [`begin_epoch`](Self::begin_epoch) says so.
/// - *Meta*: a backend that [keeps meta](Self::keeps_meta) gives back with each record the [meta](Change::meta) of the
///   put that stored it, byte for byte. A delete with meta leaves a *tombstone*: key, revision and meta, without a value,
///   until a later change of the key takes its place: a put, a delete with other meta, or a delete without any, after which
///   nothing is left. [Reserved](Key::reserved) keys have tombstones alone. Other backends are given no meta, and no
///   reserved keys.
/// - *Replaces*: [`Change::replaces`] names the revision of the record whose place a change takes, as the batches stored
///   so far and the changes before it in its own have left it; zero where there is none. A backend may rely on it. It names
///   no tombstone: where there is one, it is zero. A delete that replaces nothing counts as any change does: its revision is
///   kept. Several keys may have one revision, so a revision alone names no record.
/// - *Prepared*: [`prepare`](Self::prepare) stores nothing, and says no more than is known.
/// - *Closed*: what [`close`](Self::close) returns is the result of the last sync; everything stored before survives it.
/// - *One owner*: storage that is open cannot be opened again ([`PersistErrorKind::InUse`]); or the last instance to load it
///   owns it. In that case a batch is stored only if the stored revision and the stored owner, a random number that each
///   [`load`](Self::load) writes, are still this instance's: else nothing is stored, and the error is
///   [`PersistErrorKind::Poisoned`]. So two servers on one database do not diverge, and after a connection that was lost
///   during a commit the two numbers show whether it happened ([`RowPersist`](crate::rows::RowPersist) does so).
/// - *Alone*: methods may block; the caller owns a thread for them and never calls two at once. Where a backend says that it does not
///   [wait](Self::waits), they are called on many threads, still one at a time.
///
/// `nkv_testkit::persist` checks each line; a backend is finished when it passes.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot keep values",
    label = "this type does not implement `PersistValue`",
    note = "implement `nkv_core::PersistValue` (two of its methods are enough); examples/custom_persist.rs does so with one file per key",
    note = "or `nkv_core::rows::Rows`, for a database; examples/sqlite.rs does so",
    note = "or use `nkv_core::MemoryPersist`, or `nkv_persist_fs::FsPersist`"
)]
pub trait PersistValue: fmt::Debug + Send + 'static {
    /// Visits what survived, each key once, in no particular order, before anything else is asked. It is lent for the
    /// visit: what keeps it copies it. A backend that keeps no meta visits [records](RecordRef) alone.
    ///
    /// # Errors
    ///
    /// [`PersistErrorKind::Damaged`] when the data cannot be trusted, [`PersistErrorKind::Io`] when it cannot be read.
    fn load(&mut self, visit: &mut dyn FnMut(StoredRef<'_>)) -> Result<Loaded, PersistError>;

    /// Makes a batch durable: all of it, or none of it. A batch is never empty. Its revisions are above those of all batches
    /// before, and never fall within it; those of one key rise, and several keys may have the same one.
    ///
    /// # Errors
    ///
    /// After any kind but [`PersistErrorKind::Poisoned`] the batch was not stored, and another may follow.
    /// After `Poisoned` that is not known: it may or may not be there after a restart, and no other batch follows.
    fn persist(&mut self, batch: &[Change]) -> Result<(), PersistError>;

    /// Makes room for a batch before any part of it is stored, or refuses it: for callers that give one batch to several
    /// backends, such as [`RoutePersist`](crate::RoutePersist), and must know beforehand whether one of them is full.
    ///
    /// Nothing is stored, and nothing has to follow: the room is kept for the next call of [`persist`](Self::persist), if
    /// that has the same batch, and is the backend's again with any other call. A batch need not be prepared.
    ///
    /// # Errors
    ///
    /// Those of [`persist`](Self::persist), with the same meaning.
    fn prepare(&mut self, batch: &[Change]) -> Result<Prepared, PersistError> {
        let _ = batch;
        Ok(Prepared::Unknown)
    }

    /// Whether it keeps the [meta](Change::meta) of changes, and tombstones.
    fn keeps_meta(&self) -> bool {
        false
    }

    /// Whether [`persist`](Self::persist) may wait, for a disk or another process. What does not wait, and does no more than
    /// remember a batch, may be called on a thread that has other things to do. Asked once, before the store is opened.
    fn waits(&self) -> bool {
        true
    }

    /// Forgets everything, tombstones too, and begins `epoch` at revision zero: durably, and all or nothing. For data whose
    /// source has begun anew; its batches follow.
    ///
    /// # Errors
    ///
    /// Those of [`persist`](Self::persist), with the same meaning. [`PersistErrorKind::Rejected`] where a backend cannot do
    /// so, as one does that has not written this method.
    fn begin_epoch(&mut self, epoch: Epoch) -> Result<(), PersistError> {
        let context = format!("this storage cannot begin epoch {epoch}: it keeps the one that it has");
        Err(PersistError::new(PersistErrorKind::Rejected, context))
    }

    /// Takes a handler for failures that no call shows, before anything else is asked. A backend that works in the
    /// background, such as one that syncs from time to time, [reports](FailureHandler::report) to it once it finds that it
    /// can take no more: the next `persist`, which would say [`PersistErrorKind::Poisoned`], may be long in coming.
    ///
    /// A backend that fails only when it is called has nothing to do here.
    fn on_failure(&mut self, handler: FailureHandler) {
        drop(handler);
    }

    /// Looks at it from outside, after a store has taken it over; `None` for a backend that has no figures.
    fn figures(&self) -> Option<Arc<dyn StorageFigures>> {
        None
    }

    /// Ends the use of the storage: what was stored and not synced yet is synced now. Called once, as the last call. A
    /// backend that is dropped without it does the same as far as it can, and no caller learns of a failure.
    ///
    /// A backend that syncs each batch has nothing to do here.
    ///
    /// # Errors
    ///
    /// After any error the storage may lack something that `persist` has returned `Ok` for, to the degree that the backend
    /// promises, and the next opening reads what it holds.
    fn close(&mut self) -> Result<(), PersistError> {
        Ok(())
    }
}

/// What storage has of one key, lent for a moment. A backend that keeps no meta makes it of its records, with `into`.
#[derive(Clone, Copy, Debug)]
pub enum StoredRef<'a> {
    /// A record.
    Record {
        /// What readers see.
        record: RecordRef<'a>,
        /// The meta of its put, if it had some.
        meta: Option<&'a [u8]>,
    },
    /// What a delete with meta left.
    Tombstone {
        /// The key that is gone, or a [reserved](Key::reserved) one.
        key: KeyRef<'a>,
        /// That of the delete.
        revision: Revision,
        /// The meta of the delete.
        meta: &'a [u8],
    },
}

impl<'a> StoredRef<'a> {
    /// Whose it is.
    #[must_use]
    pub fn key(&self) -> KeyRef<'a> {
        match self {
            StoredRef::Record { record, .. } => record.key,
            StoredRef::Tombstone { key, .. } => *key,
        }
    }

    /// That of the change that left it.
    #[must_use]
    pub fn revision(&self) -> Revision {
        match self {
            StoredRef::Record { record, .. } => record.revision,
            StoredRef::Tombstone { revision, .. } => *revision,
        }
    }

    /// The meta of the change that left it, if it had some.
    #[must_use]
    pub fn meta(&self) -> Option<&'a [u8]> {
        match self {
            StoredRef::Record { meta, .. } => *meta,
            StoredRef::Tombstone { meta, .. } => Some(meta),
        }
    }

    /// The record, if it is one.
    #[must_use]
    pub fn record(&self) -> Option<RecordRef<'a>> {
        match self {
            StoredRef::Record { record, .. } => Some(*record),
            StoredRef::Tombstone { .. } => None,
        }
    }
}

impl<'a> From<RecordRef<'a>> for StoredRef<'a> {
    fn from(record: RecordRef<'a>) -> Self {
        StoredRef::Record { record, meta: None }
    }
}

impl<'a> From<&'a Record> for StoredRef<'a> {
    fn from(record: &'a Record) -> Self {
        record.lend().into()
    }
}

/// Where a backend reports that it takes no more, from whatever thread finds out. Clones report to the same place.
#[derive(Clone)]
pub struct FailureHandler {
    handle: Arc<dyn Fn(PersistError) + Send + Sync>,
}

impl FailureHandler {
    /// Has `handle` called for each failure that is reported: under locks of the backend, so it returns at once and does
    /// not call the backend.
    pub fn new(handle: impl Fn(PersistError) + Send + Sync + 'static) -> Self {
        FailureHandler { handle: Arc::new(handle) }
    }

    /// Reports a failure.
    pub fn report(&self, error: PersistError) {
        (self.handle)(error);
    }
}

impl fmt::Debug for FailureHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FailureHandler").finish_non_exhaustive()
    }
}

/// What a backend knows about a batch before it stores it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prepared {
    /// There is room for it: to store it fails only as any device may fail.
    Room,
    /// Only an attempt to store it can show whether there is room.
    Unknown,
}

/// What a backend knows besides its records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// The epoch of the data.
    pub epoch: Epoch,
    /// The highest revision ever stored; zero for an empty store.
    pub revision: Revision,
}

/// Why something could not be stored or loaded.
#[derive(Clone, Debug)]
pub struct PersistError {
    kind: PersistErrorKind,
    context: String,
    source: Option<Arc<dyn StdError + Send + Sync>>,
    refused: Option<Arc<[usize]>>,
}

/// What a caller can act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PersistErrorKind {
    /// No space is left. Nothing was stored; the same batch may succeed once there is space.
    NoSpace,
    /// The batch is one that this backend can never store. Nothing was stored.
    Rejected,
    /// Reading or writing failed. Nothing was stored; trying again may help.
    Io,
    /// It is not known what the storage holds now. The store takes no more writes until it is opened again.
    Poisoned,
    /// The stored data is damaged. Nothing was changed.
    Damaged,
    /// Another process owns the data. Nothing was changed.
    InUse,
    /// Another version of the program wrote the data, in a format that this one does not know. Nothing was changed.
    OtherVersion,
}

impl PersistError {
    /// An error of `kind`; `context` says what was being done, to what.
    pub fn new(kind: PersistErrorKind, context: impl Into<String>) -> Self {
        PersistError { kind, context: context.into(), source: None, refused: None }
    }

    /// With the error that caused it.
    #[must_use]
    pub fn with_source(self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        PersistError { source: Some(Arc::from(source.into())), ..self }
    }

    /// With the positions of those changes of the batch that it is about: all others may be stored without them.
    #[must_use]
    pub fn with_refused(self, changes: impl Into<Arc<[usize]>>) -> Self {
        PersistError { refused: Some(changes.into()), ..self }
    }

    /// Which changes of the batch were refused, in order, if it is known that others may be stored without them.
    #[must_use]
    pub fn refused(&self) -> Option<&[usize]> {
        self.refused.as_deref()
    }

    /// What a caller can act on.
    #[must_use]
    pub fn kind(&self) -> PersistErrorKind {
        self.kind
    }

    /// Whether the same call may succeed later, with no restart.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(self.kind, PersistErrorKind::NoSpace | PersistErrorKind::Io)
    }
}

impl fmt::Display for PersistError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl StdError for PersistError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_ref().map(|source| &**source as &(dyn StdError + 'static))
    }
}

#[deny(clippy::missing_trait_methods)]
impl<P: PersistValue + ?Sized> PersistValue for Box<P> {
    fn load(&mut self, visit: &mut dyn FnMut(StoredRef<'_>)) -> Result<Loaded, PersistError> {
        (**self).load(visit)
    }

    fn persist(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        (**self).persist(batch)
    }

    fn prepare(&mut self, batch: &[Change]) -> Result<Prepared, PersistError> {
        (**self).prepare(batch)
    }

    fn keeps_meta(&self) -> bool {
        (**self).keeps_meta()
    }

    fn waits(&self) -> bool {
        (**self).waits()
    }

    fn begin_epoch(&mut self, epoch: Epoch) -> Result<(), PersistError> {
        (**self).begin_epoch(epoch)
    }

    fn on_failure(&mut self, handler: FailureHandler) {
        (**self).on_failure(handler);
    }

    fn figures(&self) -> Option<Arc<dyn StorageFigures>> {
        (**self).figures()
    }

    fn close(&mut self) -> Result<(), PersistError> {
        (**self).close()
    }
}

/// A shared backend: another holder can look at it between two calls.
#[deny(clippy::missing_trait_methods)]
impl<P: PersistValue + ?Sized> PersistValue for Arc<Mutex<P>> {
    fn load(&mut self, visit: &mut dyn FnMut(StoredRef<'_>)) -> Result<Loaded, PersistError> {
        self.lock().unwrap_or_else(PoisonError::into_inner).load(visit)
    }

    fn persist(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        self.lock().unwrap_or_else(PoisonError::into_inner).persist(batch)
    }

    fn prepare(&mut self, batch: &[Change]) -> Result<Prepared, PersistError> {
        self.lock().unwrap_or_else(PoisonError::into_inner).prepare(batch)
    }

    fn keeps_meta(&self) -> bool {
        self.lock().unwrap_or_else(PoisonError::into_inner).keeps_meta()
    }

    /// As the other holder may have it for as long as it likes.
    fn waits(&self) -> bool {
        true
    }

    fn begin_epoch(&mut self, epoch: Epoch) -> Result<(), PersistError> {
        self.lock().unwrap_or_else(PoisonError::into_inner).begin_epoch(epoch)
    }

    fn on_failure(&mut self, handler: FailureHandler) {
        self.lock().unwrap_or_else(PoisonError::into_inner).on_failure(handler);
    }

    fn figures(&self) -> Option<Arc<dyn StorageFigures>> {
        self.lock().unwrap_or_else(PoisonError::into_inner).figures()
    }

    fn close(&mut self) -> Result<(), PersistError> {
        self.lock().unwrap_or_else(PoisonError::into_inner).close()
    }
}

/// Keeps nothing: values live as long as the process.
///
/// Each instance is a new life of its data, so give each a new random epoch when clients may outlive it.
#[derive(Debug, Default)]
pub struct NoPersist {
    epoch: Epoch,
}

impl NoPersist {
    /// Storage that forgets, in the given epoch.
    #[must_use]
    pub fn new(epoch: Epoch) -> Self {
        NoPersist { epoch }
    }
}

impl PersistValue for NoPersist {
    fn load(&mut self, _visit: &mut dyn FnMut(StoredRef<'_>)) -> Result<Loaded, PersistError> {
        Ok(Loaded { epoch: self.epoch, revision: Revision::ZERO })
    }

    fn persist(&mut self, _batch: &[Change]) -> Result<(), PersistError> {
        Ok(())
    }

    fn prepare(&mut self, _batch: &[Change]) -> Result<Prepared, PersistError> {
        Ok(Prepared::Room)
    }

    /// It loses what it is given like everything else.
    fn keeps_meta(&self) -> bool {
        true
    }

    fn waits(&self) -> bool {
        false
    }

    fn begin_epoch(&mut self, epoch: Epoch) -> Result<(), PersistError> {
        self.epoch = epoch;
        Ok(())
    }
}

/// Keeps values in memory that clones share: the model of a disk, for tests and examples.
///
/// A clone that is opened later finds what was stored, as after a restart, and owns it from then on: what was opened before
/// stores nothing more.
#[derive(Debug, Default)]
pub struct MemoryPersist {
    disk: Arc<Mutex<Disk>>,
    /// Its number among those that have opened the disk, once it has.
    owner: Option<u64>,
}

#[derive(Debug, Default)]
struct Disk {
    stored: HashMap<Key, Kept>,
    loaded: Loaded,
    /// How many have opened it; the last one owns it.
    owner: u64,
}

/// What is kept of one key.
#[derive(Debug)]
struct Kept {
    revision: Revision,
    /// Nothing in a tombstone.
    value: Option<(Bytes, Option<Expiry>)>,
    meta: Meta,
}

impl Kept {
    /// `None` if the change leaves nothing.
    fn by(Change { revision, action, meta, .. }: &Change) -> Option<Kept> {
        let value = match action {
            Action::Put { value, expiry } => Some((value.clone(), *expiry)),
            Action::Delete { .. } if meta.is_none() => return None,
            Action::Delete { .. } => None,
        };
        Some(Kept { revision: *revision, value, meta: meta.clone() })
    }

    fn lend<'a>(&'a self, key: &'a Key) -> StoredRef<'a> {
        let (key, revision, meta) = (key.lend(), self.revision, self.meta.as_bytes());
        match &self.value {
            Some((value, expiry)) => {
                let record = RecordRef { key, value: ValueRef::of(value), revision, expiry: *expiry };
                StoredRef::Record { record, meta }
            }
            None => StoredRef::Tombstone { key, revision, meta: meta.unwrap_or_default() },
        }
    }
}

impl Disk {
    fn take_over(&mut self) -> u64 {
        self.owner = self.owner.saturating_add(1);
        self.owner
    }
}

impl MemoryPersist {
    /// Empty storage, in the given epoch.
    #[must_use]
    pub fn new(epoch: Epoch) -> Self {
        let loaded = Loaded { epoch, revision: Revision::ZERO };
        MemoryPersist { disk: Arc::new(Mutex::new(Disk { loaded, ..Disk::default() })), owner: None }
    }

    /// The disk, if it is still this instance's.
    fn own(&mut self) -> Result<MutexGuard<'_, Disk>, PersistError> {
        let mut disk = self.disk.lock().unwrap_or_else(PoisonError::into_inner);
        if *self.owner.get_or_insert_with(|| disk.take_over()) == disk.owner {
            return Ok(disk);
        }
        Err(PersistError::new(PersistErrorKind::Poisoned, "another instance owns the storage now"))
    }
}

impl Clone for MemoryPersist {
    /// The same disk, not opened yet.
    fn clone(&self) -> Self {
        MemoryPersist { disk: Arc::clone(&self.disk), owner: None }
    }
}

impl PersistValue for MemoryPersist {
    fn load(&mut self, visit: &mut dyn FnMut(StoredRef<'_>)) -> Result<Loaded, PersistError> {
        let mut disk = self.disk.lock().unwrap_or_else(PoisonError::into_inner);
        self.owner = Some(disk.take_over());
        disk.stored.iter().map(|(key, kept)| kept.lend(key)).for_each(visit);
        Ok(disk.loaded)
    }

    fn persist(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        let mut disk = self.own()?;
        for change in batch {
            match Kept::by(change) {
                Some(kept) => _ = disk.stored.insert(change.key.clone(), kept),
                None => _ = disk.stored.remove(&change.key),
            }
            disk.loaded.revision = change.revision;
        }
        Ok(())
    }

    fn prepare(&mut self, _batch: &[Change]) -> Result<Prepared, PersistError> {
        Ok(Prepared::Room)
    }

    fn keeps_meta(&self) -> bool {
        true
    }

    fn begin_epoch(&mut self, epoch: Epoch) -> Result<(), PersistError> {
        let mut disk = self.own()?;
        disk.stored.clear();
        disk.loaded = Loaded { epoch, revision: Revision::ZERO };
        Ok(())
    }
}
