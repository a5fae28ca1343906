//! [`FsPersist`]: the trait's methods on top of the log, and the thread that syncs and compacts.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nkv_core::{
    Change, Epoch, FailureHandler, KeyRef, Loaded, PersistError, PersistErrorKind, PersistValue, Prepared, RecordRef,
    StorageFigures, StorageReading, StoredRef, ValueRef,
};

use crate::batch::{Batch, has_puts};
use crate::compact::Compactor;
use crate::disk::{Disk, Lock, segment_name};
use crate::error::damaged;
use crate::format::{Entry, Records};
use crate::index::Index;
use crate::log::{Log, sync_unlocked};
use crate::mutex::lock;
use crate::open::open_log;
use crate::options::{Durability, FsOptions};
use crate::reader::{Next, Opened, SegmentReader};
use crate::space::Need;
use crate::vfs::{Open, RealFs, Vfs};

/// Keeps values in a directory, in a checksummed log.
///
/// It owns the directory until it is closed or dropped. [`close`](PersistValue::close) ends the log cleanly and says whether
/// that succeeded; dropping it without does the same, and only logs a failure.
#[derive(Debug)]
pub struct FsPersist {
    shared: Arc<Shared>,
    batch: Batch,
    thread: Option<JoinHandle<()>>,
    closed: bool,
    /// Held until the end; nothing is written without it.
    lock: Option<Lock>,
}

#[derive(Debug)]
struct Shared {
    disk: Disk,
    log: Mutex<Log>,
    compactor: Mutex<Compactor>,
    /// Signalled when the thread has something to do; waited for with the log locked.
    work: Condvar,
}

/// Watches a [`FsPersist`] that another thread owns.
#[derive(Clone, Debug)]
pub struct FsMonitor {
    shared: Arc<Shared>,
}

/// What a data directory holds and what has been done to it since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FsStats {
    /// How many keys there are.
    pub keys: usize,
    /// How many deletes are kept, as they had [meta](nkv_core::Meta).
    pub tombstones: usize,
    /// How many bytes their records have.
    pub live_bytes: u64,
    /// How many bytes the segments have, without the zeros ahead; the reserve and what was kept aside are not counted.
    pub disk_bytes: u64,
    /// How many segments there are.
    pub segments: usize,
    /// How many batches were stored.
    pub batches: u64,
    /// How many times the log was synced.
    pub syncs: u64,
    /// How many segments were emptied and removed.
    pub compacted_segments: u64,
    /// How many bytes compaction has written.
    pub copied_bytes: u64,
    /// Whether deletes have room on a full disk.
    pub reserve_held: bool,
}

impl FsMonitor {
    /// The state right now.
    #[must_use]
    pub fn stats(&self) -> FsStats {
        let log = lock(&self.shared.log);
        let (index, counters) = (log.index(), log.counters());
        FsStats {
            keys: index.key_count(),
            tombstones: index.tombstone_count(),
            live_bytes: index.live_bytes(),
            disk_bytes: index.total_bytes(),
            segments: index.segment_count(),
            batches: counters.batches,
            syncs: counters.syncs,
            compacted_segments: counters.compacted_segments,
            copied_bytes: counters.copied_bytes,
            reserve_held: log.reserve_held(),
        }
    }
}

impl StorageFigures for FsMonitor {
    fn read(&self) -> StorageReading {
        let stats = self.stats();
        let mut reading = StorageReading::default();
        (reading.disk_bytes, reading.live_bytes) = (stats.disk_bytes, stats.live_bytes);
        (reading.compactions, reading.compacted_bytes) = (stats.compacted_segments, stats.copied_bytes);
        reading.sync_times = lock(&self.shared.log).sync_times();
        reading
    }
}

impl FsPersist {
    /// Opens a data directory, or makes one, and recovers what it holds.
    ///
    /// # Errors
    ///
    /// [`PersistErrorKind::InUse`] when another process has it, [`PersistErrorKind::Damaged`] with file and offset
    /// when something that had been durable cannot be read, [`PersistErrorKind::OtherVersion`] when another version of the
    /// program wrote it; nothing was changed then. [`PersistErrorKind::Io`] and
    /// [`PersistErrorKind::NoSpace`] when the file system fails.
    ///
    /// # Examples
    ///
    /// ```
    /// use nkv_core::mailbox::Mailbox;
    /// use nkv_core::{Key, NotifyKeyValue, PutOptions};
    /// use nkv_persist_fs::{FsOptions, FsPersist};
    ///
    /// # let temp = tempfile::tempdir()?;
    /// # let dir = temp.path().join("data");
    /// let store = NotifyKeyValue::<_, Mailbox>::open(FsPersist::open(&dir, FsOptions::default())?)?;
    /// store.put(&Key::new("lamp.hall")?, "on", PutOptions::default())?;
    /// store.close()?;
    ///
    /// let store = NotifyKeyValue::<_, Mailbox>::open(FsPersist::open(&dir, FsOptions::default())?)?;
    /// assert!(store.get(&Key::new("lamp.hall")?).is_some());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open(dir: impl Into<PathBuf>, options: FsOptions) -> Result<Self, PersistError> {
        let fs = RealFs::default().with_group_access(options.group_access);
        Self::open_with(Arc::new(fs), dir, options)
    }

    /// Like [`open`](Self::open), on another file system.
    ///
    /// # Errors
    ///
    /// Those of [`open`](Self::open).
    ///
    /// # Examples
    ///
    /// ```
    /// use std::sync::Arc;
    ///
    /// use nkv_persist_fs::sim::SimFs;
    /// use nkv_persist_fs::{FsOptions, FsPersist};
    ///
    /// let disk = SimFs::new(); // in memory, for tests
    /// let persist = FsPersist::open_with(Arc::new(disk.clone()), "/data", FsOptions::default())?;
    /// assert!(disk.used() > 0);
    /// # drop(persist);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open_with(vfs: Arc<dyn Vfs>, dir: impl Into<PathBuf>, options: FsOptions) -> Result<Self, PersistError> {
        let disk = Disk::new(vfs, dir.into());
        disk.create_dir()?;
        let dir_lock = disk.lock(Open::Create)?;
        let background = options.background;
        let log = Mutex::new(open_log(&disk, &dir_lock, options)?);
        let compactor = Mutex::new(Compactor::new(disk.clone()));
        let shared = Arc::new(Shared { disk, log, compactor, work: Condvar::new() });
        let thread = if background { Some(spawn(&shared)?) } else { None };
        Ok(FsPersist { shared, batch: Batch::new(), thread, closed: false, lock: Some(dir_lock) })
    }

    /// A handle to watch it with, after a store has taken it over.
    #[must_use]
    pub fn monitor(&self) -> FsMonitor {
        FsMonitor { shared: Arc::clone(&self.shared) }
    }

    /// Does now what the background thread does in time: syncs what waits for it, and compacts.
    ///
    /// # Errors
    ///
    /// [`PersistErrorKind::Poisoned`] after a failed sync; otherwise whatever stopped compaction.
    pub fn maintain(&self) -> Result<(), PersistError> {
        self.shared.sync_waiting()?;
        while lock(&self.shared.log).wants_compaction() {
            self.shared.compact(0)?;
        }
        lock(&self.shared.log).check_usable()
    }

    /// Lets the thread compact with urgency when there was no space for a batch.
    fn wake_if_full(&self, result: &Result<(), PersistError>) {
        if result.as_ref().is_err_and(|error| error.kind() == PersistErrorKind::NoSpace) {
            let mut log = lock(&self.shared.log);
            log.press();
            self.shared.wake(&mut log);
        }
    }

    fn end(&mut self) -> Result<(), PersistError> {
        self.closed = true;
        lock(&self.shared.log).stop();
        self.shared.work.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the maintenance thread has panicked");
        }
        let mut log = lock(&self.shared.log);
        log.sync()?;
        log.close()
    }

    /// Makes the frame of a batch, unless something that is known speaks against it.
    fn encode(&mut self, changes: &[Change]) -> Result<(), PersistError> {
        lock(&self.shared.log).plan(changes, &mut self.batch)?;
        self.batch.encode(changes)
    }

    fn hold_back(&mut self, changes: &[Change]) -> Result<(), PersistError> {
        let mut log = self.shared.lock_for(changes, &self.batch)?;
        log.hold_back(&self.batch.frame, !has_puts(changes))
    }

    fn store(&mut self, changes: &[Change]) -> Result<(), PersistError> {
        let mut log = self.shared.lock_for(changes, &self.batch)?;
        if let Some(pending) = log.commit(changes, &mut self.batch)? {
            drop(log);
            let result = pending.run();
            log = lock(&self.shared.log);
            log.end_sync(&pending, result)?;
            log.prove();
        }
        if log.count_batch() {
            self.shared.wake(&mut log);
        }
        // What was deleted counts no longer as live: the bound may have come down.
        let mut log = self.shared.make_room(log, 0);
        if log.need(0) > Need::None {
            self.shared.wake(&mut log);
        }
        Ok(())
    }
}

impl PersistValue for FsPersist {
    fn load(&mut self, visit: &mut dyn FnMut(StoredRef<'_>)) -> Result<Loaded, PersistError> {
        // Compaction must not move anything meanwhile.
        let _still = lock(&self.shared.compactor);
        let log = lock(&self.shared.log);
        for number in log.index().segments() {
            let visited = visit_segment(&self.shared.disk, log.index(), number, visit)?;
            // Zeros look like the end of a segment, also where there was something when the log was opened.
            if visited != log.index().usage(number)?.live {
                return Err(damaged(&segment_name(number), 0, "the segment does not hold all that it held"));
            }
        }
        Ok(Loaded { epoch: log.epoch(), revision: log.revision() })
    }

    fn persist(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        let result = self.encode(batch).and_then(|()| self.store(batch));
        self.wake_if_full(&result);
        result
    }

    /// Zeros are written where the batch will stand, and compaction leaves them to it.
    fn prepare(&mut self, batch: &[Change]) -> Result<Prepared, PersistError> {
        let result = self.encode(batch).and_then(|()| self.hold_back(batch));
        self.wake_if_full(&result);
        result.map(|()| Prepared::Room)
    }

    fn keeps_meta(&self) -> bool {
        true
    }

    fn figures(&self) -> Option<Arc<dyn StorageFigures>> {
        Some(Arc::new(self.monitor()))
    }

    /// The new epoch is written where everything else is, into the log: the header of a new segment.
    fn begin_epoch(&mut self, epoch: Epoch) -> Result<(), PersistError> {
        let mut compactor = lock(&self.shared.compactor);
        compactor.forget();
        lock(&self.shared.log).begin_anew_at_any_price(epoch)?;
        if let Err(error) = compactor.unlink(&self.shared.log) {
            let mut log = lock(&self.shared.log);
            let error = log.poison_in_doubt(error);
            log.check_usable()?;
            tracing::warn!(%error, "segments of the epoch before are removed later");
            self.shared.wake(&mut log);
        }
        Ok(())
    }

    fn on_failure(&mut self, handler: FailureHandler) {
        lock(&self.shared.log).on_failure(handler);
    }

    /// Syncs and ends the log cleanly, and lets go of the directory; the next opening continues the epoch. After an error
    /// other than [`PersistErrorKind::Poisoned`] the end was not written, everything before it was.
    fn close(&mut self) -> Result<(), PersistError> {
        let ended = self.end();
        lock(&self.shared.log).shut();
        self.lock = None;
        ended
    }
}

impl Drop for FsPersist {
    fn drop(&mut self) {
        if !self.closed
            && let Err(error) = self.end()
        {
            tracing::error!(%error, "the log could not be ended cleanly");
        }
    }
}

/// Visits the records of one segment that the index points to; gives the sum of their lengths.
fn visit_segment(
    disk: &Disk,
    index: &Index,
    number: u64,
    visit: &mut dyn FnMut(StoredRef<'_>),
) -> Result<u64, PersistError> {
    let mut visited = 0_u64;
    let name = segment_name(number);
    let mut reader = match SegmentReader::open(disk, number)? {
        Opened::Good(reader) => reader,
        Opened::Bad { reason, .. } => return Err(damaged(&name, 0, reason)),
    };
    loop {
        let offset = reader.offset();
        let (position, body) = match reader.next()? {
            Next::Frame(header, _, body) => (header.position, body),
            Next::End => return Ok(visited),
            Next::Bad(reason) => return Err(damaged(&name, offset, reason)),
        };
        for record in Records::new(body) {
            let record = record.map_err(|reason| damaged(&name, offset, reason))?;
            if !record.id().is_some_and(|id| index.is_live(id, position)) {
                continue;
            }
            let stored = match record.entry().map_err(|reason| damaged(&name, offset, reason))? {
                Entry::Put { key, value, revision, expiry, meta, .. } => StoredRef::Record {
                    record: RecordRef {
                        key: KeyRef::checked_before(key),
                        value: ValueRef::Lent(value),
                        revision,
                        expiry,
                    },
                    meta,
                },
                Entry::Tombstone { key, revision, meta, .. } => {
                    StoredRef::Tombstone { key: KeyRef::checked_before(key), revision, meta }
                }
                _ => continue,
            };
            visited = visited.saturating_add(record.bytes.len() as u64);
            visit(stored);
        }
    }
}

impl Shared {
    /// Compacts one step, in proportion to the `extra` bytes that are to be appended.
    fn compact(&self, extra: u64) -> Result<(), PersistError> {
        let mut compactor = lock(&self.compactor);
        let chunk = lock(&self.log).options().chunk_bytes();
        compactor.step(&self.log, chunk.max(extra.saturating_mul(4)))
    }

    /// Locks the log for a batch, once nothing that is known speaks against it.
    fn lock_for(&self, changes: &[Change], batch: &Batch) -> Result<MutexGuard<'_, Log>, PersistError> {
        let (mut log, len) = (lock(&self.log), batch.frame.len());
        // For a batch that was prepared all that needs room was done then.
        let is_prepared = log.take_held_back() == len;
        if !is_prepared {
            log = self.make_room(log, len);
        }
        log.check_usable()?;
        if has_puts(changes) && !is_prepared {
            // The room that deletes need is not for puts.
            log.regain_reserve_in_time()?;
        }
        Ok(log)
    }

    /// Keeps the space bounded before `extra` bytes are appended. If compaction fails, the append shall say why.
    fn make_room<'a>(&'a self, mut log: MutexGuard<'a, Log>, extra: u64) -> MutexGuard<'a, Log> {
        let last = log.active_number();
        while log.need(extra) == Need::Now && log.may_compact() && log.head() <= last {
            drop(log);
            let result = self.compact(extra);
            log = lock(&self.log);
            if result.is_err() {
                break;
            }
        }
        log
    }

    /// Wakes the thread, if it waits, as there is something to do. A needless wake-up is a system call, too.
    fn wake(&self, log: &mut Log) {
        if log.take_waiting() {
            self.work.notify_one();
        }
    }

    fn sync_waiting(&self) -> Result<(), PersistError> {
        if lock(&self.log).dirty_since().is_none() {
            return Ok(());
        }
        sync_unlocked(&self.log)
    }

    /// The thread: waits for work, does a piece of it, looks again.
    fn run(&self) {
        let _guard = PoisonOnPanic(self);
        let mut log = lock(&self.log);
        while !log.is_stopping() {
            let until_sync = until_sync(&log);
            let result = if until_sync == Some(Duration::ZERO) {
                drop(log);
                self.sync_waiting()
            } else if log.wants_compaction() {
                drop(log);
                self.compact(0)
            } else {
                log.wait_for_work();
                match until_sync.or_else(|| log.compaction_rest()) {
                    Some(patience) => {
                        drop(self.work.wait_timeout(log, patience).unwrap_or_else(PoisonError::into_inner))
                    }
                    None => drop(self.work.wait(log).unwrap_or_else(PoisonError::into_inner)),
                }
                Ok(())
            };
            if let Err(error) = result {
                tracing::debug!(%error, "maintenance failed");
            }
            log = lock(&self.log);
        }
    }
}

/// Poisons the log when the thread that syncs it is no more: no other thread would keep the interval.
struct PoisonOnPanic<'a>(&'a Shared);

impl Drop for PoisonOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let cause = PersistError::new(PersistErrorKind::Io, "the maintenance thread has panicked");
            lock(&self.0.log).poison(cause);
        }
    }
}

/// How long the thread may wait before it must sync.
fn until_sync(log: &Log) -> Option<Duration> {
    match (log.options().durability, log.dirty_since()) {
        (Durability::Interval(period), Some(since)) if log.check_usable().is_ok() => {
            Some(period.saturating_sub(since.elapsed()))
        }
        _ => None,
    }
}

fn spawn(shared: &Arc<Shared>) -> Result<JoinHandle<()>, PersistError> {
    let shared = Arc::clone(shared);
    let builder = std::thread::Builder::new().name("nkv-compact".to_owned());
    let spawned = builder.spawn(move || shared.run());
    spawned.map_err(|e| PersistError::new(PersistErrorKind::Io, "cannot start the maintenance thread").with_source(e))
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
