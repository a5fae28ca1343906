//! How a store keeps its values across restarts.

use std::collections::HashMap;
use std::error::Error as StdError;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::key::Key;
use crate::record::{Action, Change, Record, RecordRef};
use crate::revision::{Epoch, Revision};

/// Keeps values across restarts.
///
/// # Contract
///
/// - *Whole*: after a crash, [`load`](Self::load) visits, for each key, a value that some batch stored; never a mixture.
/// - *Together*: a batch survives whole or not at all, and what survives is a prefix of the batches given.
/// - *Durable*: what was given before `persist` returned `Ok` survives, to the degree the backend promises.
/// - *Revisions*: the highest revision ever stored survives too, even when its key was deleted.
/// - *Keys*: what [`load`](Self::load) visits has a key that [`Key::check`] accepts. The backend sees to that, because it
///   knows what it has read: nobody checks it again.
/// - *Epoch*: it stays the same over restarts, and changes whenever something acknowledged may have been lost.
/// - *Replaces*: [`Change::replaces`] names the revision of the record whose place a change takes, as the batches stored
///   so far and the changes before it in its own have left it; zero where there is none. A backend may rely on it: one
///   that knows its records by their revisions need not know them by their keys.
/// - *Prepared*: [`prepare`](Self::prepare) stores nothing, and says no more than is known.
/// - *Closed*: what [`close`](Self::close) returns is the result of the last sync; everything stored before survives it.
/// - *One owner*: storage that is open cannot be opened again ([`PersistErrorKind::InUse`]); or the last instance to load it
///   owns it. In that case a batch is stored only if the stored revision and the stored owner, a random number that each
///   [`load`](Self::load) writes, are still this instance's: else nothing is stored, and the error is
///   [`PersistErrorKind::Poisoned`]. So two servers on one database do not diverge, and after a connection that was lost
///   during a commit the two numbers tell whether it happened ([`RowPersist`](crate::rows::RowPersist) does so).
/// - *Alone*: methods may block; the caller owns a thread for them and never calls two at once.
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
    /// Visits what survived, each key once, in no particular order, before anything else is asked. A record is lent for
    /// the visit: what keeps it copies it.
    ///
    /// # Errors
    ///
    /// [`PersistErrorKind::Damaged`] when the data cannot be trusted, [`PersistErrorKind::Io`] when it cannot be read.
    fn load(&mut self, visit: &mut dyn FnMut(RecordRef<'_>)) -> Result<Loaded, PersistError>;

    /// Makes a batch durable: all of it, or none of it. A batch is never empty, its revisions increase.
    ///
    /// # Errors
    ///
    /// After any kind but [`PersistErrorKind::Poisoned`] the batch was not stored, and another may follow.
    /// After `Poisoned` nobody knows: it may or may not be there after a restart, and no other batch follows.
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

    /// Takes a handler for failures that no call shows, before anything else is asked. A backend that works in the
    /// background, such as one that syncs from time to time, [reports](FailureHandler::report) to it once it finds that it
    /// can take no more: the next `persist`, which would say [`PersistErrorKind::Poisoned`], may be long in coming.
    ///
    /// A backend that fails only when it is called has nothing to do here.
    fn on_failure(&mut self, handler: FailureHandler) {
        drop(handler);
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
    /// Nobody knows what the storage holds now. The store takes no more writes until it is opened again.
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
    fn load(&mut self, visit: &mut dyn FnMut(RecordRef<'_>)) -> Result<Loaded, PersistError> {
        (**self).load(visit)
    }

    fn persist(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        (**self).persist(batch)
    }

    fn prepare(&mut self, batch: &[Change]) -> Result<Prepared, PersistError> {
        (**self).prepare(batch)
    }

    fn on_failure(&mut self, handler: FailureHandler) {
        (**self).on_failure(handler);
    }

    fn close(&mut self) -> Result<(), PersistError> {
        (**self).close()
    }
}

/// A shared backend: whoever else holds it can look at it between two calls.
#[deny(clippy::missing_trait_methods)]
impl<P: PersistValue + ?Sized> PersistValue for Arc<Mutex<P>> {
    fn load(&mut self, visit: &mut dyn FnMut(RecordRef<'_>)) -> Result<Loaded, PersistError> {
        self.lock().unwrap_or_else(PoisonError::into_inner).load(visit)
    }

    fn persist(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        self.lock().unwrap_or_else(PoisonError::into_inner).persist(batch)
    }

    fn prepare(&mut self, batch: &[Change]) -> Result<Prepared, PersistError> {
        self.lock().unwrap_or_else(PoisonError::into_inner).prepare(batch)
    }

    fn on_failure(&mut self, handler: FailureHandler) {
        self.lock().unwrap_or_else(PoisonError::into_inner).on_failure(handler);
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
    fn load(&mut self, _visit: &mut dyn FnMut(RecordRef<'_>)) -> Result<Loaded, PersistError> {
        Ok(Loaded { epoch: self.epoch, revision: Revision::ZERO })
    }

    fn persist(&mut self, _batch: &[Change]) -> Result<(), PersistError> {
        Ok(())
    }

    fn prepare(&mut self, _batch: &[Change]) -> Result<Prepared, PersistError> {
        Ok(Prepared::Room)
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
    records: HashMap<Key, Record>,
    loaded: Loaded,
    /// How many have opened it; the last one owns it.
    owner: u64,
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
}

impl Clone for MemoryPersist {
    /// The same disk, not opened yet.
    fn clone(&self) -> Self {
        MemoryPersist { disk: Arc::clone(&self.disk), owner: None }
    }
}

impl PersistValue for MemoryPersist {
    fn load(&mut self, visit: &mut dyn FnMut(RecordRef<'_>)) -> Result<Loaded, PersistError> {
        let mut disk = self.disk.lock().unwrap_or_else(PoisonError::into_inner);
        self.owner = Some(disk.take_over());
        disk.records.values().map(Record::lend).for_each(visit);
        Ok(disk.loaded)
    }

    fn persist(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        let mut disk = self.disk.lock().unwrap_or_else(PoisonError::into_inner);
        if *self.owner.get_or_insert_with(|| disk.take_over()) != disk.owner {
            return Err(PersistError::new(PersistErrorKind::Poisoned, "another instance owns the storage now"));
        }
        for Change { key, revision, action, .. } in batch {
            match action {
                Action::Put { value, expiry } => {
                    let record =
                        Record { key: key.clone(), value: value.clone(), revision: *revision, expiry: *expiry };
                    disk.records.insert(key.clone(), record);
                }
                Action::Delete { .. } => {
                    disk.records.remove(key);
                }
            }
            disk.loaded.revision = *revision;
        }
        Ok(())
    }

    fn prepare(&mut self, _batch: &[Change]) -> Result<Prepared, PersistError> {
        Ok(Prepared::Room)
    }
}
