//! [`FsPersist`]: the trait's methods on top of the log, and the thread that syncs and compacts.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nkv_core::{
    Action, Change, FailureHandler, Loaded, PersistError, PersistErrorKind, PersistValue, Prepared, RecordRef,
    Revision, StoredRef, ValueRef,
};

use crate::compact::{Compactor, Need, lock};
use crate::disk::{Disk, Lock, segment_name};
use crate::error::damaged;
use crate::format::{Entry, FrameBuf, Records};
use crate::index::{Index, Place};
use crate::log::{Log, sync_unlocked};
use crate::open::open_log;
use crate::options::{Durability, FsOptions};
use crate::reader::{Next, Opened, SegmentReader};
use crate::vfs::{Open, RealFs, Vfs};

/// So much is kept for the records of a batch; the room that a longer one took is given back.
const BATCH_KEPT: usize = 1 << 12;

/// Keeps values in a directory, in a checksummed log.
///
/// It owns the directory until it is closed or dropped. [`close`](PersistValue::close) ends the log cleanly and says whether
/// that succeeded; dropping it without does the same, and only logs a failure.
#[derive(Debug)]
pub struct FsPersist {
    shared: Arc<Shared>,
    frame: FrameBuf,
    /// How long the record of each change of the batch is.
    lens: Vec<u32>,
    /// What the batch replaces.
    replaced: Vec<Revision>,
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

/// Watches a [`FsPersist`] that somebody else owns.
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
        FsStats {
            keys: log.index.key_count(),
            live_bytes: log.index.live_bytes(),
            disk_bytes: log.index.total_bytes(),
            segments: log.index.segment_count(),
            batches: log.counters.batches,
            syncs: log.counters.syncs,
            compacted_segments: log.counters.compacted_segments,
            copied_bytes: log.counters.copied_bytes,
            reserve_held: log.reserve_held(),
        }
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
    pub fn open(dir: impl Into<PathBuf>, options: FsOptions) -> Result<Self, PersistError> {
        let fs = RealFs::default().with_group_access(options.group_access);
        Self::open_with(Arc::new(fs), dir, options)
    }

    /// Like [`open`](Self::open), on another file system.
    ///
    /// # Errors
    ///
    /// Those of [`open`](Self::open).
    pub fn open_with(vfs: Arc<dyn Vfs>, dir: impl Into<PathBuf>, options: FsOptions) -> Result<Self, PersistError> {
        let disk = Disk::new(vfs, dir.into());
        disk.create_dir()?;
        let dir_lock = disk.lock(Open::Create)?;
        let background = options.background;
        let log = Mutex::new(open_log(&disk, &dir_lock, options)?);
        let compactor = Mutex::new(Compactor::new(disk.clone()));
        let shared = Arc::new(Shared { disk, log, compactor, work: Condvar::new() });
        let thread = if background { Some(spawn(&shared)?) } else { None };
        let (frame, lens, replaced) = (FrameBuf::new(), Vec::new(), Vec::new());
        Ok(FsPersist { shared, frame, lens, replaced, thread, closed: false, lock: Some(dir_lock) })
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
            log.urgent_below = log.active_number().saturating_add(1);
            self.shared.wake(&mut log);
        }
    }

    fn end(&mut self) -> Result<(), PersistError> {
        self.closed = true;
        lock(&self.shared.log).stopping = true;
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

    fn encode(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        if !FrameBuf::would_fit(batch) {
            return Err(PersistError::new(PersistErrorKind::Rejected, "the batch has more than 256 MiB"));
        }
        self.frame.clear();
        self.lens.clear();
        self.lens.shrink_to(BATCH_KEPT);
        self.lens.extend(batch.iter().map(|change| self.frame.push_change(change)));
        self.frame.finish();
        Ok(())
    }

    fn hold_back(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        let mut log = self.shared.lock_for(batch, self.frame.len(), &mut self.replaced)?;
        log.hold_back(self.frame.len(), !has_puts(batch))
    }

    fn store(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        let mut log = self.shared.lock_for(batch, self.frame.len(), &mut self.replaced)?;
        let appended =
            if has_puts(batch) { log.append(&mut self.frame) } else { log.append_at_any_price(&mut self.frame) };
        let position = appended?;
        // While the log is locked: a copy of what a batch deletes must not come to stand behind the delete.
        for (change, len) in batch.iter().zip(&self.lens) {
            log.revision = change.revision;
            log.index.remove(change.replaces);
            if let Action::Put { .. } = change.action {
                log.index.insert(change.revision, Place { position, len: *len });
            }
        }
        if log.options.durability == Durability::Sync {
            let pending = log.start_sync()?;
            drop(log);
            let result = pending.run();
            log = lock(&self.shared.log);
            log.end_sync(&pending, result)?;
            log.prove();
        } else if log.dirty_since.is_none() {
            log.dirty_since = Some(Instant::now());
            self.shared.wake(&mut log);
        }
        log.counters.batches = log.counters.batches.saturating_add(1);
        // What was deleted counts no longer as live: the bound may have come down.
        let mut log = self.shared.make_room(log, 0);
        if log.need(0) > Need::None {
            self.shared.wake(&mut log);
        }
        Ok(())
    }
}

fn has_puts(batch: &[Change]) -> bool {
    batch.iter().any(|change| matches!(change.action, Action::Put { .. }))
}

/// Refuses a batch that does not go on where the log has ended: the index knows records by their revisions.
fn check_batch(log: &Log, batch: &[Change], replaced: &mut Vec<Revision>) -> Result<(), PersistError> {
    let rejected = |why: &str| Err(PersistError::new(PersistErrorKind::Rejected, why));
    let mut newest = log.revision;
    replaced.clear();
    replaced.shrink_to(BATCH_KEPT);
    for change in batch {
        if change.revision <= newest {
            return rejected("the revisions of a batch do not increase");
        }
        newest = change.revision;
        if change.replaces != Revision::ZERO {
            let before = batch.binary_search_by_key(&change.replaces, |change| change.revision);
            let before = before.ok().and_then(|at| batch.get(at)).filter(|before| before.revision < change.revision);
            let is_there = before.is_some_and(|before| matches!(before.action, Action::Put { .. }));
            if !is_there && !log.index.contains(change.replaces) {
                return rejected("a change replaces a value that is not there");
            }
            replaced.push(change.replaces);
        }
    }
    replaced.sort_unstable();
    if replaced.is_sorted_by(|one, next| one < next) { Ok(()) } else { rejected("two changes replace one value") }
}

impl PersistValue for FsPersist {
    fn load(&mut self, visit: &mut dyn FnMut(StoredRef<'_>)) -> Result<Loaded, PersistError> {
        // Compaction must not move anything meanwhile.
        let _still = lock(&self.shared.compactor);
        let log = lock(&self.shared.log);
        for number in log.index.segments() {
            let visited = visit_segment(&self.shared.disk, &log.index, number, visit)?;
            // Zeros look like the end of a segment, also where there was something when the log was opened.
            if visited != log.index.usage(number).live {
                return Err(damaged(&segment_name(number), 0, "the segment does not hold all that it held"));
            }
        }
        Ok(Loaded { epoch: log.epoch, revision: log.revision })
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

    fn on_failure(&mut self, handler: FailureHandler) {
        lock(&self.shared.log).failure_handler = Some(handler);
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
            if record.put_revision().is_some_and(|revision| index.is_live(revision, position))
                && let Entry::Put { key, value, revision, expiry, .. } =
                    record.entry().map_err(|reason| damaged(&name, offset, reason))?
            {
                visited = visited.saturating_add(record.bytes.len() as u64);
                visit(RecordRef { key, value: ValueRef::Lent(value), revision, expiry }.into());
            }
        }
    }
}

impl Shared {
    /// Compacts one step, in proportion to the `extra` bytes that somebody wants to append.
    fn compact(&self, extra: u64) -> Result<(), PersistError> {
        let mut compactor = lock(&self.compactor);
        let chunk = lock(&self.log).options.chunk_bytes();
        compactor.step(&self.log, chunk.max(extra.saturating_mul(4)))
    }

    /// Locks the log for a batch that takes `len` bytes, once nothing that is known speaks against it.
    fn lock_for(
        &self,
        batch: &[Change],
        len: u64,
        replaced: &mut Vec<Revision>,
    ) -> Result<MutexGuard<'_, Log>, PersistError> {
        let mut log = lock(&self.log);
        // For a batch that was prepared all that needs room was done then.
        let is_prepared = std::mem::take(&mut log.held_back) == len;
        if !is_prepared {
            log = self.make_room(log, len);
        }
        log.check_usable()?;
        check_batch(&log, batch, replaced)?;
        if has_puts(batch) && !is_prepared {
            // The room that deletes need is not for puts.
            log.regain_reserve_in_time()?;
        }
        Ok(log)
    }

    /// Keeps the space bounded before `extra` bytes are appended. If compaction fails, the append shall say why.
    fn make_room<'a>(&'a self, mut log: MutexGuard<'a, Log>, extra: u64) -> MutexGuard<'a, Log> {
        let last = log.active_number();
        while log.need(extra) == Need::Now && log.may_compact() && log.head <= last {
            drop(log);
            let result = self.compact(extra);
            log = lock(&self.log);
            if result.is_err() {
                break;
            }
        }
        log
    }

    /// Tells the thread, if it waits, that there is something to do. To tell it without need is a system call, too.
    fn wake(&self, log: &mut Log) {
        if std::mem::take(&mut log.is_waited_for) {
            self.work.notify_one();
        }
    }

    fn sync_waiting(&self) -> Result<(), PersistError> {
        if lock(&self.log).dirty_since.is_none() {
            return Ok(());
        }
        sync_unlocked(&self.log)
    }

    /// The thread: waits for work, does a piece of it, looks again.
    fn run(&self) {
        let _guard = PoisonOnPanic(self);
        let mut log = lock(&self.log);
        while !log.stopping {
            let until_sync = until_sync(&log);
            let result = if until_sync == Some(Duration::ZERO) {
                drop(log);
                self.sync_waiting()
            } else if log.wants_compaction() {
                drop(log);
                self.compact(0)
            } else {
                log.is_waited_for = true;
                match until_sync.or_else(|| until_compaction(&log)) {
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

/// Poisons the log when the thread that syncs it is no more: nobody would keep the interval.
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
    match (log.options.durability, log.dirty_since) {
        (Durability::Interval(period), Some(since)) if log.check_usable().is_ok() => {
            Some(period.saturating_sub(since.elapsed()))
        }
        _ => None,
    }
}

/// How long compaction rests, if it rests.
fn until_compaction(log: &Log) -> Option<Duration> {
    log.compact_after.map(|time| time.saturating_duration_since(Instant::now())).filter(|rest| !rest.is_zero())
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
