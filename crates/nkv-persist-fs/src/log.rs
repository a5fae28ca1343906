//! The end of the log that is written: appends, syncs, new segments, and what happens when one of them fails.
//!
//! Two rules carry everything. An append that fails is cut back, durably, before anybody hears of it. A sync that
//! fails is never tried again: nobody knows what is on the disk, so the log is poisoned.

use std::sync::Arc;
use std::time::Instant;

use nkv_core::{Epoch, PersistError, PersistErrorKind, Revision};

use crate::disk::{Disk, segment_name};
use crate::error::{from_io, poisoned};
use crate::format::{FrameBuf, RELAXED, SEAL_FRAME_LEN, SEGMENT_HEADER_LEN, SegmentHeader};
use crate::index::Index;
use crate::options::{Durability, FsOptions};
use crate::scan::Tail;
use crate::vfs::{Open, VfsFile, write_all};

/// What has been done since the log was opened.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) syncs: u64,
    pub(crate) batches: u64,
    pub(crate) compacted_segments: u64,
    pub(crate) copied_bytes: u64,
}

/// The log and all that is known of it. Whoever has it locked may append.
#[derive(Debug)]
pub(crate) struct Log {
    pub(crate) disk: Disk,
    pub(crate) options: FsOptions,
    pub(crate) index: Index,
    pub(crate) head: u64,
    pub(crate) epoch: Epoch,
    pub(crate) revision: Revision,
    pub(crate) counters: Counters,
    /// Since when something acknowledged waits for a sync.
    pub(crate) dirty_since: Option<Instant>,
    /// A full disk asks for every segment below this number to be compacted.
    pub(crate) urgent_below: u64,
    /// No compaction before this time, as the last one failed.
    pub(crate) compact_after: Option<Instant>,
    pub(crate) stopping: bool,
    active: SegmentHeader,
    file: Arc<dyn VfsFile>,
    len: u64,
    synced_to: u64,
    poisoned: Option<String>,
    reserve_held: bool,
}

/// A sync that is done while the log is not locked.
#[derive(Debug)]
pub(crate) struct PendingSync {
    file: Arc<dyn VfsFile>,
    name: String,
    position: u64,
}

impl PendingSync {
    pub(crate) fn run(&self) -> Result<(), PersistError> {
        self.file.sync_data().map_err(|e| from_io("sync", &self.name, e))
    }
}

impl Log {
    /// The log that ends at `tail`, whose file ends there too.
    pub(crate) fn new(disk: Disk, options: FsOptions, index: Index, tail: Tail) -> Result<Self, PersistError> {
        let file = disk.open(&segment_name(tail.header.number), Open::Write)?;
        let mut log = Log {
            disk,
            options,
            index,
            head: tail.header.head,
            epoch: tail.header.epoch,
            revision: tail.header.revision,
            counters: Counters::default(),
            dirty_since: None,
            urgent_below: 0,
            compact_after: None,
            stopping: false,
            active: tail.header,
            file,
            len: tail.end,
            synced_to: tail.header.base,
            poisoned: None,
            reserve_held: false,
        };
        log.index.set_bytes(log.active.number, log.len);
        // What was read may not be durable yet: a process that died leaves it to the operating system.
        log.sync()?;
        Ok(log)
    }

    pub(crate) fn active_number(&self) -> u64 {
        self.active.number
    }

    fn position(&self) -> u64 {
        self.active.base + (self.len - SEGMENT_HEADER_LEN)
    }

    pub(crate) fn check_usable(&self) -> Result<(), PersistError> {
        self.poisoned.as_ref().map_or(Ok(()), |why| Err(poisoned(why)))
    }

    /// Gives up: nothing is written any more.
    pub(crate) fn poison(&mut self, cause: PersistError) -> PersistError {
        let why = format!("the log takes no more writes: {cause}");
        tracing::error!(error = %cause, "{why}");
        self.poisoned.get_or_insert(why.clone());
        poisoned(&why).with_source(cause)
    }

    /// Appends a finished frame; gives the offset in the active segment where it starts.
    pub(crate) fn append(&mut self, frame: &mut FrameBuf) -> Result<u64, PersistError> {
        let flags = if self.options.durability == Durability::Sync { 0 } else { RELAXED };
        self.check_usable()?;
        let needed = self.len.saturating_add(frame.len()).saturating_add(SEAL_FRAME_LEN);
        if needed > self.options.segment_bytes && self.len > SEGMENT_HEADER_LEN {
            self.rotate()?;
        }
        self.write(frame, flags)
    }

    /// Like [`append`](Self::append), and gives up the reserve if nothing else helps.
    pub(crate) fn append_at_any_price(&mut self, frame: &mut FrameBuf) -> Result<u64, PersistError> {
        match self.append(frame) {
            Err(error) if error.kind() == PersistErrorKind::NoSpace && self.give_up_reserve()? => self.append(frame),
            result => result,
        }
    }

    /// Frees the space of the reserve; says whether there was any.
    pub(crate) fn give_up_reserve(&mut self) -> Result<bool, PersistError> {
        if !self.reserve_held {
            return Ok(false);
        }
        tracing::warn!("the disk is full: giving up the reserve, so that deletes and compaction go on");
        self.reserve_held = false;
        self.disk.release_reserve()?;
        Ok(true)
    }

    /// Says that nothing acknowledged is missing from the log: the last frame of a clean end.
    pub(crate) fn append_strict(&mut self, frame: &mut FrameBuf) -> Result<u64, PersistError> {
        self.check_usable()?;
        self.write(frame, 0)
    }

    fn write(&mut self, frame: &mut FrameBuf, flags: u16) -> Result<u64, PersistError> {
        let (position, offset) = (self.position(), self.len);
        let bytes = frame.stamp(position, self.synced_to, flags, self.active.salt);
        if let Err(error) = write_all(&*self.file, bytes, offset) {
            let name = segment_name(self.active.number);
            self.cut_back()?;
            return Err(from_io("append to", &name, error));
        }
        self.len += bytes.len() as u64;
        self.index.set_bytes(self.active.number, self.len);
        Ok(offset)
    }

    /// Takes away what a failed append left, so durably that it cannot come back after the caller was told.
    fn cut_back(&mut self) -> Result<(), PersistError> {
        let name = segment_name(self.active.number);
        let cut = self.file.set_len(self.len).map_err(|e| from_io("cut back", &name, e));
        cut.map_err(|e| self.poison(e))?;
        self.sync()
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
        self.dirty_since = None;
        let (file, name) = (Arc::clone(&self.file), segment_name(self.active.number));
        Ok(PendingSync { file, name, position: self.position() })
    }

    pub(crate) fn end_sync(
        &mut self,
        pending: &PendingSync,
        result: Result<(), PersistError>,
    ) -> Result<(), PersistError> {
        result.map_err(|e| self.poison(e))?;
        self.counters.syncs += 1;
        self.synced_to = self.synced_to.max(pending.position);
        Ok(())
    }

    /// Goes on in a new segment. The old one is durable before the new one exists, and says last that it goes on.
    pub(crate) fn rotate(&mut self) -> Result<(), PersistError> {
        self.sync()?;
        let header = SegmentHeader {
            number: self.active.number + 1,
            head: self.head,
            base: self.position() + SEAL_FRAME_LEN,
            revision: self.revision,
            epoch: self.epoch,
            salt: random_salt()?,
        };
        let made = self.disk.create_segment(&header);
        let file = made.map_err(|e| self.abandon(header.number, e))?;
        let mut seal = FrameBuf::of(FrameBuf::push_seal);
        let flags = if self.options.durability == Durability::Sync { 0 } else { RELAXED };
        if let Err(error) = self.write(&mut seal, flags) {
            return Err(self.abandon(header.number, error));
        }
        self.sync()?;
        (self.active, self.file, self.len) = (header, file, SEGMENT_HEADER_LEN);
        self.index.set_bytes(header.number, self.len);
        Ok(())
    }

    /// Takes a segment away that could not be made. Were it to stay, it would contradict what is appended next.
    fn abandon(&mut self, number: u64, cause: PersistError) -> PersistError {
        match self.disk.remove(&segment_name(number)) {
            Ok(()) => cause,
            Err(error) => self.poison(error),
        }
    }

    /// Tries to have the reserve, unless it is there already. While it is not, there is no room for puts.
    pub(crate) fn regain_reserve(&mut self) -> Result<(), PersistError> {
        if !self.reserve_held && self.options.reserve_bytes > 0 {
            self.disk.fill_reserve(self.options.reserve_bytes)?;
            self.reserve_held = true;
        }
        Ok(())
    }

    pub(crate) fn reserve_held(&self) -> bool {
        self.reserve_held
    }
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
