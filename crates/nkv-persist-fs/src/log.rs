//! The end of the log that is written: appends, syncs, new segments, and what happens when one of them fails.
//!
//! Two rules carry everything. An append that fails is cut back, durably, before any caller hears of it. A sync that
//! fails is never tried again: it is not known what is on the disk, so the log is poisoned.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nkv_core::{
    Action, Change, Epoch, FailureHandler, Histogram, HistogramReading, PersistError, PersistErrorKind, Revision,
};

use crate::batch::{Batch, has_puts};
use crate::disk::{Disk, segment_name, write_zeros};
use crate::error::{from_io, poisoned};
use crate::format::{FrameBuf, Id, RELAXED, RawRecord, SEAL_FRAME_LEN, SEGMENT_HEADER_LEN, SegmentHeader, VERSION};
use crate::index::{Index, Place, SPAN_MAX};
use crate::mutex::lock;
use crate::options::{Durability, FsOptions};
use crate::scan::Tail;
use crate::space::{Need, Space};
use crate::vfs::{Open, VfsFile, write_all};

/// How long puts are refused without another try to fill the reserve.
const REFILL_REST: Duration = Duration::from_secs(1);

/// A reserve smaller than this is none.
const RESERVE_MIN: u64 = 64 << 10;

/// The highest number of zeros that are written behind a frame: the put waits for them.
const ZEROS_MAX: u64 = 256 << 10;

/// What has been done since the log was opened.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) syncs: u64,
    pub(crate) batches: u64,
    pub(crate) compacted_segments: u64,
    pub(crate) copied_bytes: u64,
}

/// The log and all that is known of it. A thread that has it locked may append.
///
/// It is made by [`restore`](Self::restore), from what was read, and changed by [`commit`](Self::commit), a batch at a time;
/// compaction moves what stands in it, and drops what is behind the head.
#[derive(Debug)]
pub(crate) struct Log {
    disk: Disk,
    options: FsOptions,
    index: Index,
    head: u64,
    epoch: Epoch,
    revision: Revision,
    counters: Counters,
    /// How long each sync took.
    sync_times: Arc<Histogram>,
    /// Since when something acknowledged waits for a sync.
    dirty_since: Option<Instant>,
    /// A full disk asks for every segment below this number to be compacted.
    urgent_below: u64,
    /// No compaction before this time, as the last one failed.
    compact_after: Option<Instant>,
    stopping: bool,
    /// Whether the thread waits to be notified that there is something to do.
    is_waited_for: bool,
    /// Segments that are not needed, and whose names may be there still.
    leftovers: BTreeSet<u64>,
    active: SegmentHeader,
    file: Arc<LogFile>,
    len: u64,
    /// How long the file is: from `len` on it holds zeros.
    file_len: u64,
    /// Whether there was no room for zeros, in this segment.
    without_zeros: bool,
    /// Whether room was made that is not durable: behind a seal a power cut could leave anything in its place.
    has_loose_zeros: bool,
    /// Bytes that a prepared batch will take: other appends leave room for them.
    held_back: u64,
    synced_to: u64,
    /// Whether the last frame says that all before it is durable.
    last_proves: bool,
    poisoned: Option<String>,
    /// Learns at once when the log is poisoned.
    failure_handler: Option<FailureHandler>,
    reserve_held: bool,
    /// How much of the reserve is left; once it was given up, appends eat it.
    reserve_left: u64,
    /// No try to fill the reserve for a put before this time, unless something was freed.
    refill_after: Option<Instant>,
}

/// What was read of a log, and where it goes on.
#[derive(Debug)]
pub(crate) struct Restored {
    pub(crate) index: Index,
    pub(crate) head: u64,
    pub(crate) epoch: Epoch,
    pub(crate) revision: Revision,
    pub(crate) tail: Tail,
}

impl Restored {
    /// An empty log, which this segment begins.
    pub(crate) fn empty(header: SegmentHeader) -> Self {
        let SegmentHeader { head, epoch, revision, .. } = header;
        let tail = Tail { header, end: SEGMENT_HEADER_LEN, written_to: SEGMENT_HEADER_LEN };
        Restored { index: Index::default(), head, epoch, revision, tail }
    }
}

/// A file whose syncs never overlap, and all fail after one has failed: the kernel reports to one of them that it could
/// not write, and success to the others.
#[derive(Debug)]
struct LogFile {
    file: Arc<dyn VfsFile>,
    path: String,
    has_failed: Mutex<bool>,
    /// Whether nothing in it is needed any more: it may have no name.
    is_retired: AtomicBool,
}

impl LogFile {
    fn new(file: Arc<dyn VfsFile>, path: String) -> Arc<Self> {
        Arc::new(LogFile { file, path, has_failed: Mutex::new(false), is_retired: AtomicBool::new(false) })
    }

    /// Lets syncs to come do nothing, once none is under way: nothing in the file is needed any more.
    fn retire(&self) {
        let _none = lock(&self.has_failed);
        self.is_retired.store(true, Ordering::SeqCst);
    }

    fn sync(&self) -> io::Result<()> {
        let mut has_failed = lock(&self.has_failed);
        if *has_failed {
            return Err(io::Error::other("an earlier sync of the file has failed"));
        }
        if self.is_retired.load(Ordering::SeqCst) {
            return Ok(());
        }
        self.file.sync_data().inspect_err(|_| *has_failed = true)
    }
}

/// A sync that is done while the log is not locked.
#[derive(Debug)]
pub(crate) struct PendingSync {
    file: Arc<LogFile>,
    position: u64,
    times: Arc<Histogram>,
}

impl PendingSync {
    pub(crate) fn run(&self) -> Result<(), PersistError> {
        let start = Instant::now();
        let result = self.file.sync().map_err(|e| from_io("sync", &self.file.path, e));
        self.times.observe_time(start.elapsed());
        result
    }
}

/// Makes durable all that was appended so far, while others append.
pub(crate) fn sync_unlocked(log: &Mutex<Log>) -> Result<(), PersistError> {
    let pending = lock(log).start_sync()?;
    let result = pending.run();
    lock(log).end_sync(&pending, result)
}

impl Log {
    /// The log that ends at the tail, where its file ends too, or zeros begin. All of it is durable.
    pub(crate) fn restore(disk: Disk, options: FsOptions, restored: Restored) -> Result<Self, PersistError> {
        let Restored { index, head, epoch, revision, tail } = restored;
        let name = segment_name(tail.header.number);
        let file = LogFile::new(disk.open(&name, Open::Write)?, disk.path(&name));
        let file_len = file.file.size().map_err(|e| from_io("read", &file.path, e))?;
        let mut log = Log {
            disk,
            options,
            index,
            head,
            epoch,
            revision,
            counters: Counters::default(),
            sync_times: Arc::new(Histogram::new(Histogram::TIMES)),
            dirty_since: None,
            urgent_below: 0,
            compact_after: None,
            stopping: false,
            is_waited_for: false,
            leftovers: BTreeSet::new(),
            active: tail.header,
            file,
            len: tail.end,
            file_len,
            without_zeros: false,
            has_loose_zeros: false,
            held_back: 0,
            synced_to: tail.header.base,
            last_proves: true,
            poisoned: None,
            failure_handler: None,
            reserve_held: false,
            reserve_left: 0,
            refill_after: None,
        };
        log.index.set_bytes(&log.active, log.len);
        log.index.check()?;
        log.synced_to = log.position();
        Ok(log)
    }

    /// Appends a batch that was [planned](Self::plan) and encoded, and notes what it changes, while no other thread has the log: a copy
    /// of what a batch deletes must not come to stand behind the delete. Gives the sync that the batch waits for, if it does.
    pub(crate) fn commit(
        &mut self,
        changes: &[Change],
        batch: &mut Batch,
    ) -> Result<Option<PendingSync>, PersistError> {
        let position = if has_puts(changes) {
            self.append(&mut batch.frame)?
        } else {
            self.append_at_any_price(&mut batch.frame)?
        };
        for (change, step) in changes.iter().zip(&batch.steps) {
            let place = Place { position, len: step.len };
            self.revision = change.revision;
            self.index.remove(step.replaces);
            self.index.remove_keyed(change.key.as_str());
            match step.id(change) {
                Some(Id::Revision(revision)) => self.index.insert(revision, place),
                Some(Id::Key(key, revision)) => {
                    let is_tombstone = matches!(change.action, Action::Delete { .. });
                    self.index.insert_keyed(key, revision, place, is_tombstone);
                }
                None => {}
            }
        }
        self.check_index()?;
        if self.options.durability == Durability::Sync { self.start_sync().map(Some) } else { Ok(None) }
    }

    /// Plans a batch, or refuses one that does not go on where the log has ended. What a plan says is not changed by
    /// compaction.
    pub(crate) fn plan(&self, changes: &[Change], batch: &mut Batch) -> Result<(), PersistError> {
        self.check_usable()?;
        batch.plan(changes, self.revision, &self.index)
    }

    /// Notes that a batch is stored, as far as its durability asks; says whether it has to be synced in time.
    pub(crate) fn count_batch(&mut self) -> bool {
        self.counters.batches = self.counters.batches.saturating_add(1);
        let begins = self.options.durability != Durability::Sync && self.dirty_since.is_none();
        if begins {
            self.dirty_since = Some(Instant::now());
        }
        begins
    }

    /// Gives up if the index has contradicted itself: live records could not be distinguished from those that are gone.
    fn check_index(&mut self) -> Result<(), PersistError> {
        self.index.check().map_err(|error| self.poison(error))
    }

    pub(crate) fn index(&self) -> &Index {
        &self.index
    }

    pub(crate) fn options(&self) -> &FsOptions {
        &self.options
    }

    pub(crate) fn counters(&self) -> Counters {
        self.counters
    }

    /// The oldest segment that is needed.
    pub(crate) fn head(&self) -> u64 {
        self.head
    }

    pub(crate) fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// The highest revision ever stored.
    pub(crate) fn revision(&self) -> Revision {
        self.revision
    }

    fn space(&self) -> Space<'_> {
        Space {
            index: &self.index,
            options: &self.options,
            head: self.head,
            urgent_below: self.urgent_below,
            reserve_held: self.reserve_held,
            reserve_left: self.reserve_left,
        }
    }

    /// How much has to be done before `extra` more bytes are appended.
    pub(crate) fn need(&self, extra: u64) -> Need {
        self.space().need(extra)
    }

    /// Whether the background has something to compact.
    pub(crate) fn wants_compaction(&self) -> bool {
        (self.need(0) > Need::None || !self.leftovers.is_empty()) && self.may_compact()
    }

    /// Whether compaction has not failed just now.
    pub(crate) fn may_compact(&self) -> bool {
        self.check_usable().is_ok() && self.compaction_rest().is_none()
    }

    /// How long compaction rests, if it rests.
    pub(crate) fn compaction_rest(&self) -> Option<Duration> {
        let rest = self.compact_after?.saturating_duration_since(Instant::now());
        (!rest.is_zero()).then_some(rest)
    }

    /// Lets compaction rest, as it has failed.
    pub(crate) fn rest_compaction(&mut self, rest: Duration) {
        self.compact_after = Instant::now().checked_add(rest);
    }

    /// Has all that is there compacted with urgency, as there was no space for a batch.
    pub(crate) fn press(&mut self) {
        self.urgent_below = self.active.number.saturating_add(1);
    }

    /// Since when something acknowledged waits for a sync, if something does.
    pub(crate) fn dirty_since(&self) -> Option<Instant> {
        self.dirty_since
    }

    /// How many bytes were held back for a batch that was prepared; no longer.
    pub(crate) fn take_held_back(&mut self) -> u64 {
        std::mem::take(&mut self.held_back)
    }

    pub(crate) fn on_failure(&mut self, handler: FailureHandler) {
        self.failure_handler = Some(handler);
    }

    /// Asks the thread to end.
    pub(crate) fn stop(&mut self) {
        self.stopping = true;
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping
    }

    /// Notes that the thread waits for something to do.
    pub(crate) fn wait_for_work(&mut self) {
        self.is_waited_for = true;
    }

    /// Whether the thread waits for something to do; it does no longer.
    pub(crate) fn take_waiting(&mut self) -> bool {
        std::mem::take(&mut self.is_waited_for)
    }

    pub(crate) fn active_number(&self) -> u64 {
        self.active.number
    }

    fn position(&self) -> u64 {
        self.active.base.saturating_add(self.len.saturating_sub(SEGMENT_HEADER_LEN))
    }

    pub(crate) fn check_usable(&self) -> Result<(), PersistError> {
        self.poisoned.as_ref().map_or(Ok(()), |why| Err(poisoned(why)))
    }

    /// Gives up: nothing is written any more.
    pub(crate) fn poison(&mut self, cause: PersistError) -> PersistError {
        let why = format!("the log takes no more writes: {cause}");
        tracing::error!(error = %cause, "{why}");
        self.poisoned.get_or_insert(why.clone());
        if let Some(handler) = self.failure_handler.take() {
            handler.report(poisoned(&why));
        }
        poisoned(&why).with_source(cause)
    }

    /// Takes nothing more: the directory may have another owner.
    pub(crate) fn shut(&mut self) {
        self.poisoned.get_or_insert_with(|| "the log was closed".to_owned());
    }

    /// Gives up if a sync of the directory has failed; other errors pass.
    pub(crate) fn poison_in_doubt(&mut self, error: PersistError) -> PersistError {
        if self.disk.is_in_doubt() { self.poison(error) } else { error }
    }

    /// The flags of a frame in this durability.
    fn flags(&self) -> u16 {
        if self.options.durability == Durability::Sync { 0 } else { RELAXED }
    }

    /// Appends a finished frame; gives its position.
    pub(crate) fn append(&mut self, frame: &mut FrameBuf) -> Result<u64, PersistError> {
        self.check_usable()?;
        if self.held_back > 0 {
            self.make_room(frame.len().saturating_add(self.held_back), frame.version())?;
        }
        self.rotate_if_needed(frame.len(), frame.version())?;
        let position = self.write(frame, self.flags())?;
        self.zero_ahead();
        Ok(position)
    }

    /// Goes on in a new segment if a frame does not fit into this one, or says what this one's version does not have.
    fn rotate_if_needed(&mut self, frame_len: u64, version: u32) -> Result<(), PersistError> {
        let needed = self.len.saturating_add(frame_len).saturating_add(SEAL_FRAME_LEN);
        let is_full = needed > self.options.segment_bytes && self.len > SEGMENT_HEADER_LEN;
        if is_full || version > self.active.version { self.rotate() } else { Ok(()) }
    }

    /// Makes the room that an append of `len` bytes takes, where it will stand: what is written over zeros needs no more of
    /// the disk, unless the file system copies on write.
    fn make_room(&mut self, len: u64, version: u32) -> Result<(), PersistError> {
        self.check_usable()?;
        self.rotate_if_needed(len, version)?;
        let end = self.len.saturating_add(len);
        if end <= self.file_len {
            return Ok(());
        }
        self.has_loose_zeros = true;
        if let Err(error) = write_zeros(&*self.file.file, self.file_len, end) {
            self.take_back_zeros();
            return Err(from_io("make room in", &self.file.path, error));
        }
        self.grow_to(end);
        Ok(())
    }

    /// Like [`make_room`](Self::make_room), and gives up the reserve if nothing else helps and `at_any_price` says so.
    pub(crate) fn hold_back(&mut self, frame: &FrameBuf, at_any_price: bool) -> Result<(), PersistError> {
        let (len, version) = (frame.len(), frame.version());
        match self.make_room(len, version) {
            Err(error) if error.kind() == PersistErrorKind::NoSpace && at_any_price && self.give_up_reserve()? => {
                self.make_room(len, version)?;
            }
            result => result?,
        }
        self.held_back = len;
        Ok(())
    }

    /// Like [`append`](Self::append), and gives up the reserve if nothing else helps.
    fn append_at_any_price(&mut self, frame: &mut FrameBuf) -> Result<u64, PersistError> {
        match self.append(frame) {
            Err(error) if error.kind() == PersistErrorKind::NoSpace && self.give_up_reserve()? => self.append(frame),
            result => result,
        }
    }

    /// Appends a frame to this very segment, however long that is, and gives up the reserve if nothing else helps.
    pub(crate) fn append_here(&mut self, frame: &mut FrameBuf, flags: u16) -> Result<u64, PersistError> {
        self.check_usable()?;
        match self.write(frame, flags) {
            Err(error) if error.kind() == PersistErrorKind::NoSpace && self.give_up_reserve()? => {
                self.write(frame, flags)
            }
            result => result,
        }
    }

    /// Appends a frame of copies of what is needed of a segment, which count from now on. They may use the reserve only if it
    /// takes all of them: else they would eat what deletes need, and free nothing.
    pub(crate) fn commit_copies(
        &mut self,
        frame: &mut FrameBuf,
        segment: u64,
        copies: &[RawRecord<'_>],
    ) -> Result<(), PersistError> {
        self.check_room_to_copy(segment)?;
        let is_worth_it = self.reserve_takes(segment, 0);
        let appended = match self.append(frame) {
            Err(error) if error.kind() == PersistErrorKind::NoSpace && is_worth_it && self.give_up_reserve()? => {
                self.append(frame)
            }
            result => result,
        };
        let position = appended?;
        self.counters.copied_bytes = self.counters.copied_bytes.saturating_add(frame.len());
        for copy in copies {
            if let Some(id) = copy.id() {
                self.index.move_to(id, Place { position, len: copy.bytes.len() as u32 });
            }
        }
        self.check_index()
    }

    /// Whether copies of what is needed of this segment can be made, as far as is known.
    pub(crate) fn check_room_to_copy(&self, segment: u64) -> Result<(), PersistError> {
        self.space().check_room_to_copy(segment)
    }

    fn reserve_takes(&self, segment: u64, spare: u64) -> bool {
        self.space().reserve_takes(segment, spare)
    }

    /// Appends, behind what the frame holds, that no segment below this one is needed.
    pub(crate) fn append_head(&mut self, frame: &mut FrameBuf, head: u64) -> Result<(), PersistError> {
        frame.push_head(head);
        frame.finish();
        self.append_at_any_price(frame)?;
        self.head = head;
        Ok(())
    }

    /// Forgets segments, the oldest ones, which are not needed: from now on they are leftovers.
    pub(crate) fn drop_segments(&mut self, numbers: std::ops::Range<u64>) -> Result<(), PersistError> {
        for number in numbers {
            self.index.drop_oldest_segment();
            self.counters.compacted_segments = self.counters.compacted_segments.saturating_add(1);
            self.leftovers.insert(number);
        }
        self.check_index()
    }

    /// A segment that is not needed, and whose name may be there still.
    pub(crate) fn leftover(&self) -> Option<u64> {
        self.leftovers.first().copied()
    }

    /// Notes that the name of a segment is gone.
    pub(crate) fn forget_leftover(&mut self, number: u64) {
        self.leftovers.remove(&number);
    }

    /// Goes on in a new epoch, if one is given, once it is synced; in a relaxed durability also says that something may be
    /// missing next time. Never in a new segment: a power cut could leave that without the frame, and the old epoch would
    /// go on.
    pub(crate) fn begin(&mut self, epoch: Option<Epoch>) -> Result<(), PersistError> {
        let mut frame = FrameBuf::of(|frame| epoch.iter().for_each(|epoch| frame.push_epoch(*epoch)));
        self.append_here(&mut frame, self.flags())?;
        self.epoch = epoch.unwrap_or(self.epoch);
        Ok(())
    }

    /// Frees the space of the reserve; says whether there was any.
    pub(crate) fn give_up_reserve(&mut self) -> Result<bool, PersistError> {
        if !self.reserve_held {
            return Ok(false);
        }
        tracing::warn!("the disk is full: giving up the reserve, so that deletes and compaction go on");
        self.reserve_held = false;
        self.press();
        self.disk.release_reserve()?;
        Ok(true)
    }

    fn write(&mut self, frame: &mut FrameBuf, flags: u16) -> Result<u64, PersistError> {
        let position = self.position();
        let bytes = frame.stamp(position, self.synced_to, flags, self.active.salt);
        if let Err(error) = write_all(&*self.file.file, bytes, self.len) {
            self.cut_back()?;
            return Err(from_io("append to", &self.file.path, error));
        }
        self.last_proves = self.synced_to == position;
        self.len = self.len.saturating_add(bytes.len() as u64);
        self.grow_to(self.len);
        self.index.set_bytes(&self.active, self.len);
        Ok(position)
    }

    /// Notes that the file has `len` bytes at least; what it grows by may come out of the reserve.
    fn grow_to(&mut self, len: u64) {
        let growth = len.saturating_sub(self.file_len);
        self.file_len = self.file_len.saturating_add(growth);
        if !self.reserve_held {
            self.reserve_left = self.reserve_left.saturating_sub(growth);
        }
    }

    /// Takes away what a failed append left, so durably that it cannot come back after the caller has the error.
    fn cut_back(&mut self) -> Result<(), PersistError> {
        let cut = self.trim().map_err(|e| from_io("cut back", &self.file.path, e));
        cut.map_err(|e| self.poison(e))?;
        self.sync()
    }

    /// Lets the file end where the log does.
    fn trim(&mut self) -> io::Result<()> {
        self.file.file.set_len(self.len)?;
        self.file_len = self.len;
        Ok(())
    }

    /// Takes the zeros behind the last frame away, if that is possible: they do no harm.
    pub(crate) fn trim_zeros(&mut self) {
        if self.file_len > self.len
            && let Err(error) = self.trim()
        {
            tracing::debug!(file = %self.file.path, %error, "zeros stay behind the log");
        }
    }

    /// Writes zeros behind the last frame, which become durable with it. To sync a frame that is then written over them
    /// costs a third less than to sync a file that grows. There are as many as there are bytes in the segment, within
    /// bounds: a small store stays small, and a large one seldom waits for them.
    fn zero_ahead(&mut self) {
        let segment = self.options.segment_bytes;
        let step = self.len.clamp(segment / 256, segment / 4).min(ZEROS_MAX);
        let end = self.len.saturating_add(step).min(segment);
        let is_wanted = self.options.durability == Durability::Sync && !self.without_zeros;
        // What is left of the reserve is not for them.
        let has_room = self.reserve_held || self.options.reserve_bytes == 0;
        if !is_wanted || !has_room || self.file_len > self.len || end <= self.len {
            return;
        }
        match write_zeros(&*self.file.file, self.len, end) {
            Ok(()) => self.file_len = end,
            Err(error) => {
                tracing::debug!(%error, "no zeros behind the log: its syncs cost more");
                self.without_zeros = true;
                self.take_back_zeros();
            }
        }
    }

    /// Gives back what was written of zeros that do not fit. If that fails they are still zeros, and room for frames.
    fn take_back_zeros(&mut self) {
        if self.trim().is_err() {
            self.file_len = self.file.file.size().unwrap_or(self.len);
        }
    }

    /// Returns when everything appended is durable.
    pub(crate) fn sync(&mut self) -> Result<(), PersistError> {
        let pending = self.start_sync()?;
        let result = pending.run();
        self.end_sync(&pending, result)
    }

    /// First half of a sync; between the two the log need not be locked.
    pub(crate) fn start_sync(&mut self) -> Result<PendingSync, PersistError> {
        self.check_usable()?;
        (self.dirty_since, self.has_loose_zeros) = (None, false);
        let times = Arc::clone(&self.sync_times);
        Ok(PendingSync { file: Arc::clone(&self.file), position: self.position(), times })
    }

    /// A new segment, so that all before it can be compacted, in the room of the reserve if there is no other. Unless the
    /// segment `is_empty`, only if the reserve takes the copies too.
    pub(crate) fn rotate_for_compaction(&mut self, is_empty: bool) -> Result<(), PersistError> {
        let may_spend = is_empty || self.reserve_takes(self.active.number, 0);
        match self.rotate() {
            Err(error) if error.kind() == PersistErrorKind::NoSpace && may_spend && self.give_up_reserve()? => {
                self.rotate()
            }
            result => result,
        }
    }

    /// How long each sync took.
    pub(crate) fn sync_times(&self) -> HistogramReading {
        self.sync_times.read()
    }

    /// Whether something was appended that is not durable, as far as is known.
    pub(crate) fn is_dirty(&self) -> bool {
        self.synced_to < self.position()
    }

    pub(crate) fn end_sync(
        &mut self,
        pending: &PendingSync,
        result: Result<(), PersistError>,
    ) -> Result<(), PersistError> {
        result.map_err(|e| self.poison(e))?;
        self.counters.syncs = self.counters.syncs.saturating_add(1);
        self.synced_to = self.synced_to.max(pending.position);
        Ok(())
    }

    /// Lets an empty frame say what is durable after a put was synced, if the last one does not: compaction has appended
    /// something before the put, or during its sync. A process that is killed leaves that frame to the system, and damage
    /// to the put, or to what stands before it, is not taken for a torn tail.
    pub(crate) fn prove(&mut self) {
        if !self.last_proves
            && self.check_usable().is_ok()
            && let Err(error) = self.write(&mut FrameBuf::of(|_| {}), self.flags())
        {
            tracing::debug!(%error, "no frame says what is durable");
        }
    }

    /// Goes on in a new segment. The old one is durable before the new one exists, and says last that it goes on.
    fn rotate(&mut self) -> Result<(), PersistError> {
        if self.index.span() >= SPAN_MAX / 2 {
            return Err(PersistError::new(PersistErrorKind::NoSpace, "the log is as long as a log can be"));
        }
        if self.is_dirty() || self.has_loose_zeros {
            self.sync()?;
        }
        let header = SegmentHeader {
            version: VERSION,
            number: self.active.number.saturating_add(1),
            head: self.head,
            base: self.position().saturating_add(SEAL_FRAME_LEN),
            revision: self.revision,
            epoch: self.epoch,
            salt: random_salt()?,
        };
        let name = segment_name(header.number);
        let file = self.disk.open(&name, Open::CreateNew)?;
        let mut seal = FrameBuf::of(FrameBuf::push_seal);
        let begun = self.disk.begin_segment(&*file, &header).and_then(|()| self.write(&mut seal, self.flags()));
        begun.map_err(|e| self.abandon(header.number, e))?;
        self.trim_zeros();
        self.sync()?;
        self.file = LogFile::new(file, self.disk.path(&name));
        self.enter(header);
        self.grow_reserve();
        Ok(())
    }

    /// Goes on in the segment of this header, which holds no frame.
    fn enter(&mut self, header: SegmentHeader) {
        (self.active, self.len, self.file_len) = (header, SEGMENT_HEADER_LEN, SEGMENT_HEADER_LEN);
        (self.without_zeros, self.has_loose_zeros) = (false, false);
        self.index.set_bytes(&self.active, self.len);
    }

    /// Forgets everything, and goes on in a new epoch at revision zero. The header of the new segment says all of it, as it is
    /// the oldest one that is needed itself: until that is durable, nothing has changed. The segments before are leftovers.
    pub(crate) fn begin_anew(&mut self, epoch: Epoch) -> Result<(), PersistError> {
        self.check_usable()?;
        let number = self.active.number.saturating_add(1);
        let header = SegmentHeader {
            version: VERSION,
            number,
            head: number,
            base: self.position(),
            revision: Revision::ZERO,
            epoch,
            salt: random_salt()?,
        };
        let name = segment_name(number);
        let file = self.disk.open(&name, Open::CreateNew)?;
        let begun = self.disk.begin_segment(&*file, &header);
        begun.map_err(|e| self.abandon(number, e))?;
        self.file.retire();
        self.file = LogFile::new(file, self.disk.path(&name));
        let old = std::mem::take(&mut self.index);
        self.leftovers.extend(old.segments());
        (self.head, self.epoch, self.revision) = (number, epoch, Revision::ZERO);
        (self.dirty_since, self.held_back, self.urgent_below) = (None, 0, 0);
        self.enter(header);
        (self.synced_to, self.last_proves) = (self.position(), true);
        // In a relaxed durability it says that something may be missing next time. It is too late to take anything back.
        let begun = self.begin(None).and_then(|()| self.sync());
        begun.map_err(|e| self.poison(e))
    }

    /// Like [`begin_anew`](Self::begin_anew), and gives up the reserve if nothing else helps.
    pub(crate) fn begin_anew_at_any_price(&mut self, epoch: Epoch) -> Result<(), PersistError> {
        match self.begin_anew(epoch) {
            Err(error) if error.kind() == PersistErrorKind::NoSpace && self.give_up_reserve()? => {
                self.begin_anew(epoch)
            }
            result => result,
        }
    }

    /// The format version of the newest segment.
    pub(crate) fn version(&self) -> u32 {
        self.active.version
    }

    /// Takes a segment away that could not be made. Were it to stay, it would contradict what is appended next.
    fn abandon(&mut self, number: u64, cause: PersistError) -> PersistError {
        match self.disk.remove(&segment_name(number)) {
            Ok(()) => cause,
            Err(error) => self.poison(error),
        }
    }

    /// Ends the log cleanly, once all is synced: an empty frame proves the one before it, and says that nothing acknowledged is
    /// missing.
    pub(crate) fn close(&mut self) -> Result<(), PersistError> {
        self.append_here(&mut FrameBuf::of(|_| {}), 0)?;
        self.trim_zeros();
        self.sync()
    }

    /// Tries to have the reserve, unless it is there already. While it is not, there is no room for puts.
    pub(crate) fn regain_reserve(&mut self) -> Result<(), PersistError> {
        if !self.reserve_held && self.options.reserve_bytes > 0 {
            let wanted = self.space().reserve_wanted();
            let filled = self.disk.fill_reserve(wanted);
            self.reserve_left = filled.map_err(|e| self.poison_in_doubt(e))?;
            self.reserve_held = self.reserve_left == wanted;
        }
        if self.reserve_held || self.options.reserve_bytes == 0 { Ok(()) } else { Err(no_room_for_puts()) }
    }

    /// Lets the reserve grow with the log. Where there is no room for that it stays as it is: puts will find none either.
    fn grow_reserve(&mut self) {
        let wanted = self.space().reserve_wanted();
        if self.reserve_held && self.options.reserve_bytes > 0 && wanted > self.reserve_left {
            match self.disk.grow_reserve(self.reserve_left, wanted) {
                Ok(()) => self.reserve_left = wanted,
                Err(error) => tracing::debug!(%error, "the reserve does not grow"),
            }
        }
    }

    /// Like [`regain_reserve`](Self::regain_reserve), but not again and again: each try writes all the space there is.
    pub(crate) fn regain_reserve_in_time(&mut self) -> Result<(), PersistError> {
        if !self.reserve_held && self.refill_after.is_some_and(|time| Instant::now() < time) {
            return Err(no_room_for_puts());
        }
        let result = self.regain_reserve();
        self.refill_after = if result.is_err() { Instant::now().checked_add(REFILL_REST) } else { None };
        result
    }

    pub(crate) fn reserve_held(&self) -> bool {
        self.reserve_held
    }

    /// Fills the reserve when the log is opened. On a disk so small that the log and the reserve would have less than twice
    /// as much, half of that has to do, with segments that such a reserve can take. Half of the room alone would be less at
    /// each opening of a full disk, until deletes have none. Where it does not fit, puts are refused until it does.
    pub(crate) fn fit_reserve(&mut self) -> Result<(), PersistError> {
        let mut result = self.regain_reserve();
        let half = self.index.total_bytes().saturating_add(self.reserve_left) / 2;
        if result.is_err() && half >= RESERVE_MIN && half < self.options.reserve_bytes {
            self.options.reserve_bytes = half;
            self.options.segment_bytes = self.options.segment_bytes.min(half.saturating_sub(half / 3));
            result = self.regain_reserve();
        }
        if let Err(error) = result {
            // Unless a sync of the directory has failed: that is not for want of room.
            self.check_usable()?;
            tracing::warn!(%error, "no room for the reserve: puts are refused until there is");
        }
        Ok(())
    }
}

fn no_room_for_puts() -> PersistError {
    let context = "the disk is full: the little room that is left is for deletes";
    PersistError::new(PersistErrorKind::NoSpace, context)
}

pub(crate) fn random_salt() -> Result<u32, PersistError> {
    getrandom::u32().map_err(|e| no_randomness(&e))
}

pub(crate) fn random_epoch() -> Result<Epoch, PersistError> {
    let (high, low) = (getrandom::u64(), getrandom::u64());
    let (high, low) = (high.map_err(|e| no_randomness(&e))?, low.map_err(|e| no_randomness(&e))?);
    Ok(Epoch::new(u128::from(high) << 64 | u128::from(low)))
}

fn no_randomness(error: &getrandom::Error) -> PersistError {
    PersistError::new(PersistErrorKind::Io, format!("the operating system gives no random numbers: {error}"))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use nkv_core::{Key, Meta};

    use super::*;
    use crate::open::create_with;
    use crate::scan::Scan;
    use crate::sim::SimFs;
    use crate::vfs::Vfs;

    const SMALL: u64 = 64 << 10;

    /// An empty log without a reserve, that writes zeros ahead.
    fn log_on(fs: &SimFs, segment_bytes: u64) -> Log {
        let disk = Disk::new(Arc::new(fs.clone()), "/data".into());
        disk.create_dir().unwrap();
        let options = FsOptions::default().with_segment_bytes(segment_bytes).with_reserve_bytes(0);
        let (revision, epoch) = (Revision::ZERO, Epoch::new(1));
        create_with(
            &disk,
            options,
            SegmentHeader { version: VERSION, number: 1, head: 1, base: 0, revision, epoch, salt: 7 },
        )
        .unwrap()
    }

    fn frame(log: &mut Log, len: usize) -> FrameBuf {
        log.revision = log.revision.next();
        let action = Action::Put { value: vec![1; len].into(), expiry: None };
        let change = Change {
            key: Key::new("k").unwrap(),
            revision: log.revision,
            replaces: Revision::ZERO,
            action,
            meta: Meta::NONE,
        };
        FrameBuf::of(|frame| _ = frame.push_change(&change, Revision::ZERO, false))
    }

    fn append(log: &mut Log, len: usize) {
        let mut frame = frame(log, len);
        log.append(&mut frame).unwrap();
        log.sync().unwrap();
    }

    fn size(log: &Log) -> u64 {
        log.file.file.size().unwrap()
    }

    // A log that was healthy took nothing more, as the zeros behind the end of a segment could not be cut off.
    #[test]
    fn zeros_that_cannot_be_cut_off_end_neither_the_log_nor_a_segment() {
        let fs = SimFs::new();
        let mut log = log_on(&fs, SMALL);
        append(&mut log, 1_000);
        let old = Arc::clone(&log.file);
        fs.set_len_fails(true);
        log.rotate().unwrap();
        append(&mut log, 1_000);
        log.trim_zeros();
        assert!(log.check_usable().is_ok() && size(&log) > log.len);
        assert!(old.file.size().unwrap() > 2_000, "this test is about zeros behind a seal");
        let disk = log.disk.clone();
        let scan = Scan::run(&disk, true).unwrap();
        assert!(scan.damage.is_none() && scan.torn_bytes() == 0 && scan.tail.unwrap().end == log.len, "{scan:?}");
    }

    // The log took the zeros that it could not write for written, and the reserve for larger than it was.
    #[test]
    fn zeros_that_were_written_in_part_and_stay_are_counted_as_they_are() {
        let fs = SimFs::new();
        let mut log = log_on(&fs, 4 << 20);
        fs.set_capacity(Some(fs.used() + 11_000));
        fs.set_len_fails(true);
        append(&mut log, 1_000);
        assert_eq!((log.without_zeros, log.file_len), (true, size(&log)));
        assert!((log.len..log.len + 16_384).contains(&log.file_len), "{} of {}", log.file_len, log.len);
    }

    // Compaction took the room that had been made for a batch.
    #[test]
    fn what_is_appended_in_between_leaves_a_prepared_batch_its_room() {
        for len in [30_000, 45_000, 60_000] {
            let fs = SimFs::new();
            let mut log = log_on(&fs, SMALL);
            append(&mut log, 20_000);
            let (mut prepared, mut copy) = (frame(&mut log, len), frame(&mut log, 90));
            log.hold_back(&prepared, false).unwrap();
            fs.set_capacity(Some(fs.used()));
            // In this segment, or in the next.
            let error = log.append(&mut copy).map(|_| ()).unwrap_err();
            assert_eq!(error.kind(), PersistErrorKind::NoSpace, "{error}");
            log.held_back = 0;
            log.append(&mut prepared).unwrap_or_else(|error| panic!("{len}: {error}"));
        }
    }

    // The background synced a file whose segment a new epoch had unlinked, and gave up.
    #[test]
    fn a_sync_that_is_under_way_when_a_new_epoch_begins_does_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::new(Arc::new(crate::vfs::RealFs::default()), dir.path().join("data"));
        disk.create_dir().unwrap();
        let lock = disk.lock(Open::Create).unwrap();
        let mut log = crate::open::open_log(&disk, &lock, FsOptions::default().with_background(false)).unwrap();
        append(&mut log, 100);
        let pending = log.start_sync().unwrap();
        log.begin_anew(Epoch::new(2)).unwrap();
        disk.remove(&segment_name(log.leftover().unwrap())).unwrap();
        let result = pending.run();
        log.end_sync(&pending, result).unwrap();
        assert_eq!((log.revision(), log.epoch(), log.is_dirty()), (Revision::ZERO, Epoch::new(2), false));
    }

    // What was not known of a segment counted as an empty one, which holds nothing that is needed.
    #[test]
    fn an_index_that_contradicts_itself_ends_the_log_with_its_reason() {
        let mut log = log_on(&SimFs::new(), SMALL);
        let revision = log.revision.next();
        let action = Action::Put { value: "v".into(), expiry: None };
        let put =
            [Change { key: Key::new("k").unwrap(), revision, replaces: Revision::ZERO, action, meta: Meta::NONE }];
        let mut batch = Batch::new();
        log.plan(&put, &mut batch).unwrap();
        batch.encode(&put).unwrap();
        log.commit(&put, &mut batch).unwrap();
        assert_eq!(log.index.usage(9).unwrap_err().kind(), PersistErrorKind::Poisoned);
        let reported = Arc::new(Mutex::new(None));
        let keeps = Arc::clone(&reported);
        log.on_failure(FailureHandler::new(move |error| *lock(&keeps) = Some(error)));
        let error = log.drop_segments(1..2).unwrap_err();
        let why = "the index of the log contradicts itself: a segment goes that holds values";
        assert!(error.kind() == PersistErrorKind::Poisoned && error.to_string().contains(why), "{error}");
        assert!(lock(&reported).as_ref().is_some_and(|error| error.to_string().contains(why)));
        assert!(log.commit(&put, &mut batch).is_err_and(|error| error.to_string().contains(why)));
    }

    #[test]
    fn a_put_to_a_large_segment_waits_for_few_zeros() {
        let mut log = log_on(&SimFs::new(), 1 << 30);
        append(&mut log, 9 << 20);
        assert_eq!(size(&log), log.len + ZEROS_MAX);
    }

    #[test]
    fn a_log_whose_ends_are_too_far_apart_begins_no_segment() {
        let mut log = log_on(&SimFs::new(), SMALL);
        let mut header = log.active;
        for (base, is_refused) in [(SPAN_MAX / 2 - SMALL, false), (SPAN_MAX / 2, true)] {
            (header.number, header.base) = (header.number + 1, base);
            log.index.set_bytes(&header, SEGMENT_HEADER_LEN);
            log.active.number = header.number;
            let result = log.rotate();
            assert_eq!(result.as_ref().is_err_and(|e| e.kind() == PersistErrorKind::NoSpace), is_refused, "{result:?}");
            header.number = log.active.number;
        }
        assert!(log.check_usable().is_ok());
    }

    /// The first sync takes its time and fails; others say that all is well, as Linux does.
    #[derive(Debug)]
    struct FailsOnce {
        inner: Arc<dyn VfsFile>,
        syncs: AtomicU64,
    }

    impl VfsFile for FailsOnce {
        fn size(&self) -> io::Result<u64> {
            self.inner.size()
        }

        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
            self.inner.read_at(buf, offset)
        }

        fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
            self.inner.write_at(bytes, offset)
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            self.inner.set_len(len)
        }

        fn sync_data(&self) -> io::Result<()> {
            if self.syncs.fetch_add(1, Ordering::SeqCst) > 0 {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
            Err(io::Error::other("EIO"))
        }

        fn try_lock(&self) -> io::Result<bool> {
            self.inner.try_lock()
        }
    }

    // The compaction and a put synced the same file at the same time. The kernel reported the failure to one of them,
    // and the other acknowledged what was not on the disk.
    #[test]
    fn a_sync_that_begins_during_one_that_fails_does_not_succeed() {
        let inner = SimFs::new().open("f".as_ref(), Open::Create).unwrap();
        let slow = Arc::new(FailsOnce { inner, syncs: AtomicU64::new(0) });
        let file = LogFile::new(slow.clone(), "f".to_owned());
        std::thread::scope(|scope| {
            let first = scope.spawn(|| file.sync());
            let deadline = Instant::now() + Duration::from_secs(10);
            while slow.syncs.load(Ordering::SeqCst) == 0 {
                assert!(Instant::now() < deadline);
                std::thread::yield_now();
            }
            assert!(file.sync().is_err(), "it is not known what the disk holds");
            assert!(first.join().unwrap().is_err());
        });
        assert!(file.sync().is_err());
    }
}
