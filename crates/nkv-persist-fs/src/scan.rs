//! Reads a whole data directory and says what it holds, what is torn and what is damaged, changing nothing.
//!
//! The one idea: what the log says after a place proves whether that place had been durable. A bad frame that nothing
//! after it contradicts is a tail torn by a crash; a bad frame that had been durable is damage.

use std::fmt;

use nkv_core::{Epoch, PersistError, Revision};

use crate::disk::{Disk, broken_name, segment_name};
use crate::error::damaged;
use crate::format::{Entry, FRAME_HEADER_LEN, FrameHeader, Records, SEAL_FRAME_LEN, SEGMENT_HEADER_LEN, SegmentHeader};
use crate::index::{Index, Place};
use crate::reader::{Next, Opened, SegmentReader};

/// A place that had been durable and cannot be trusted now.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Damage {
    /// The file's name.
    pub file: String,
    /// Where in the file.
    pub offset: u64,
    /// What is wrong there.
    pub reason: &'static str,
    /// The highest revision stored before that place.
    pub last_good: Revision,
}

impl Damage {
    pub(crate) fn to_error(&self) -> PersistError {
        damaged(&self.file, self.offset, &format!("{} (last good revision: {})", self.reason, self.last_good))
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at offset {}: {}; last good revision: {}", self.file, self.offset, self.reason, self.last_good)
    }
}

/// The place behind the last good frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tail {
    pub(crate) header: SegmentHeader,
    pub(crate) end: u64,
    /// Where the last byte ends that is not zero: what a crash left torn, if it left something.
    pub(crate) written_to: u64,
}

impl Tail {
    /// Whether something was torn off that may have been acknowledged.
    pub(crate) fn is_torn(&self) -> bool {
        self.end < self.written_to && !self.is_beginning()
    }

    /// Whether nothing was written but what begins an epoch that forgets all before: a header and a part of the first frame, which
    /// is empty. Before that is durable nothing is acknowledged.
    fn is_beginning(&self) -> bool {
        let SegmentHeader { number, head, .. } = self.header;
        let first_end = SEGMENT_HEADER_LEN.saturating_add(FRAME_HEADER_LEN as u64);
        self.end == SEGMENT_HEADER_LEN && self.written_to <= first_end && head == number && number > 1
    }
}

/// What a data directory holds.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    /// All segments, needed or not.
    pub(crate) numbers: Vec<u64>,
    pub(crate) head: u64,
    pub(crate) index: Index,
    pub(crate) epoch: Epoch,
    pub(crate) revision: Revision,
    pub(crate) frames: u64,
    pub(crate) records: u64,
    pub(crate) tail: Option<Tail>,
    /// A segment whose making was interrupted.
    pub(crate) stray: Option<u64>,
    /// What was acknowledged last may be gone without a trace.
    pub(crate) relaxed: bool,
    /// The tail was cut before, and the log does not say so yet.
    pub(crate) cut_before: bool,
    pub(crate) damage: Option<Damage>,
    /// All of the log before this position is durable, as some frame says.
    pub(crate) synced_to: u64,
    /// The size of the segment before the last one that was read.
    pub(crate) sealed_before: Option<u64>,
    sealed: bool,
    /// The newest segment is damaged before the place that says which segment is the oldest.
    head_is_behind_damage: bool,
    /// How many bytes the newest segment has, up to its first bad frame.
    newest_bytes: u64,
    /// Where the newest segment has its first bad frame: it may have said which segment is the oldest.
    bad_in_newest: Option<(u64, u64)>,
}

impl Scan {
    /// Reads everything. `promised`: the directory had a segment once.
    pub(crate) fn run(disk: &Disk, promised: bool) -> Result<Self, PersistError> {
        let mut scan = Scan { numbers: disk.segments()?, ..Scan::default() };
        let Some(&last) = scan.numbers.last() else {
            if promised {
                scan.damage(1, 0, "there is no segment any more");
            }
            return Ok(scan);
        };
        if !promised && last == 1 && scan.numbers.len() == 1 && is_frameless(disk, 1)? == Some(None) {
            scan.stray = Some(1);
            return Ok(scan);
        }
        scan.find_head(disk)?;
        let mut number = scan.head;
        while scan.read_segment(disk, number, last)? {
            number = number.saturating_add(1);
            scan.expect(number);
        }
        scan.index.fit();
        scan.index.check()?;
        if let Some(tail) = scan.tail {
            let broken = broken_name(&segment_name(tail.header.number), tail.end);
            scan.cut_before = disk.list()?.contains(&broken);
        }
        Ok(scan)
    }

    /// The segments that the log no longer needs.
    pub(crate) fn leftovers(&self) -> impl Iterator<Item = u64> {
        self.numbers.iter().copied().filter(|number| *number < self.head)
    }

    /// How many bytes a crash left behind the last good frame.
    pub(crate) fn torn_bytes(&self) -> u64 {
        self.tail.map_or(0, |tail| tail.written_to.saturating_sub(tail.end))
    }

    fn damage(&mut self, number: u64, offset: u64, reason: &'static str) {
        let last_good = self.revision;
        self.damage = Some(Damage { file: segment_name(number), offset, reason, last_good });
    }

    /// The newest segment knows which is the oldest one needed: by its header, or by a later record in it.
    fn find_head(&mut self, disk: &Disk) -> Result<(), PersistError> {
        self.head = self.numbers.first().copied().unwrap_or(1);
        for number in self.numbers.iter().rev() {
            let Opened::Good(mut reader) = SegmentReader::open(disk, *number)? else { continue };
            self.head = newest_head(&mut reader)?.max(reader.header.head).min(*number);
            self.newest_bytes = reader.offset();
            self.bad_in_newest = (reader.offset() < reader.written_to()?).then_some((*number, reader.offset()));
            // What stands behind a bad frame counts only if it was acted upon, which is after it was durable.
            while self.numbers.binary_search(&self.head).is_err() && reader.skip_bad()? {
                let later = newest_head(&mut reader)?;
                self.head_is_behind_damage |= later > self.head;
                self.head = self.head.max(later).min(*number);
            }
            return Ok(());
        }
        Ok(())
    }

    /// Reads one segment; says whether to go on with the next.
    fn read_segment(&mut self, disk: &Disk, number: u64, last: u64) -> Result<bool, PersistError> {
        if self.numbers.binary_search(&number).is_err() {
            match self.bad_in_newest.filter(|_| self.tail.is_none()) {
                Some((newest, at)) => {
                    self.damage(newest, at, "a bad frame, and segments that it may have ended are gone")
                }
                None => self.damage(number, 0, "the segment is missing"),
            }
            return Ok(false);
        }
        let mut reader = match SegmentReader::open(disk, number)? {
            Opened::Good(reader) => reader,
            Opened::Bad { reason, .. } => {
                self.damage(number, 0, reason);
                return Ok(false);
            }
        };
        if let Some(reason) = self.misfit(&reader.header) {
            self.damage(number, 0, reason);
            return Ok(false);
        }
        self.enter(&reader);
        let bad = self.read_frames(&mut reader)?;
        let end = self.damage.as_ref().map_or(reader.offset(), |damage| damage.offset);
        let is_clean = bad.is_none() && self.damage.is_none();
        let written_to = if is_clean { end } else { reader.written_to()?.max(end) };
        self.tail = Some(Tail { header: reader.header, end, written_to });
        self.index.set_bytes(&reader.header, end);
        if self.damage.is_some() {
            return Ok(false);
        }
        self.judge_end(disk, &mut reader, bad, last)
    }

    /// Expects of the segments from `next` on as many values for their bytes as those before have held. An index that
    /// grows by and by moves all that is in it again and again; one that has been too large leaves a hole in the heap, so
    /// a little less is expected.
    fn expect(&mut self, next: u64) {
        let between = self.numbers.iter().filter(|number| **number >= next).count().saturating_sub(1) as u64;
        let (read, segments) = (self.index.total_bytes(), self.index.segment_count() as u64);
        let left = read.checked_div(segments).unwrap_or(0).saturating_mul(between).saturating_add(self.newest_bytes);
        let more = (self.index.key_count() as u64).saturating_mul(left).checked_div(read).unwrap_or(0);
        self.index.expect(usize::try_from(more.saturating_sub(more / 16)).unwrap_or(0));
    }

    /// Why a segment cannot follow what was read so far.
    fn misfit(&self, header: &SegmentHeader) -> Option<&'static str> {
        let Some(before) = self.tail else {
            return (header.head > header.number).then_some("its head is a later segment");
        };
        if header.base != position_of(&before) {
            return Some("it does not start where the segment before it ends");
        }
        (header.epoch != self.epoch).then_some("it belongs to another epoch than the segment before it")
    }

    fn enter(&mut self, reader: &SegmentReader) {
        self.epoch = reader.header.epoch;
        self.revision = self.revision.max(reader.header.revision);
        self.sealed = false;
        self.sealed_before = self.tail.map(|before| before.end);
        // Until it is known where its frames end, the index is to know that they are of this segment.
        self.index.set_bytes(&reader.header, reader.size());
    }

    /// Replays frames until something else comes; says what, unless it is the end.
    fn read_frames(&mut self, reader: &mut SegmentReader) -> Result<Option<&'static str>, PersistError> {
        let number = reader.header.number;
        loop {
            let (header, at, body) = match reader.next()? {
                Next::Frame(header, at, body) => (header, at, body),
                Next::End => return Ok(None),
                Next::Bad(reason) => return Ok(Some(reason)),
            };
            let last_good = self.revision;
            if let Err(reason) = self.replay(&header, body) {
                self.revision = last_good;
                self.damage(number, at, reason);
                return Ok(None);
            }
        }
    }

    fn replay(&mut self, header: &FrameHeader, body: &[u8]) -> Result<(), &'static str> {
        if self.sealed {
            return Err("a frame follows the end of its segment");
        }
        if !header.is_understood() {
            return Err("the frame has a flag that this program does not know");
        }
        for record in Records::new(body) {
            let record = record?;
            let entry = record.entry()?;
            entry.check_key()?;
            self.check_revisions(&entry, header.position)?;
            self.apply(entry, Place { position: header.position, len: record.bytes.len() as u32 });
        }
        // An empty frame is no batch.
        self.frames = self.frames.saturating_add(u64::from(!body.is_empty()));
        self.relaxed = header.is_relaxed();
        self.synced_to = self.synced_to.max(header.synced_to);
        Ok(())
    }

    /// Records are known by their revisions: a put that has none, or that of another put of its frame, would be counted
    /// wrongly ever after.
    fn check_revisions(&self, entry: &Entry<'_>, position: u64) -> Result<(), &'static str> {
        let (&Entry::Put { revision, replaces, .. }
        | &Entry::Delete { revision, replaces, .. }
        | &Entry::Tombstone { revision, replaces, .. }) = entry
        else {
            return Ok(());
        };
        if revision <= replaces {
            return Err("a record replaces what is no older");
        }
        let is_twice = entry.id().is_some_and(|id| self.index.is_live(id, position));
        if is_twice { Err("two records of a frame have one revision") } else { Ok(()) }
    }

    fn apply(&mut self, entry: Entry<'_>, place: Place) {
        self.records = self.records.saturating_add(1);
        let is_tombstone = matches!(entry, Entry::Tombstone { .. });
        match entry {
            Entry::Put { key, revision, replaces, is_keyed: false, .. } => {
                // A copy stands behind what it is a copy of, and before the record that replaces both.
                let is_copy = revision <= self.revision;
                self.index.remove(if is_copy { revision } else { replaces });
                self.index.remove_keyed(key);
                self.index.insert(revision, place);
                self.revision = self.revision.max(revision);
            }
            // Of these a copy may be taken for a change: what that replaces is gone.
            Entry::Put { key, revision, replaces, .. } | Entry::Tombstone { key, revision, replaces, .. } => {
                self.index.remove(replaces);
                self.index.insert_keyed(key, revision, place, is_tombstone);
                self.revision = self.revision.max(revision);
            }
            Entry::Delete { key, revision, replaces } => {
                self.index.remove(replaces);
                self.index.remove_keyed(key);
                self.revision = self.revision.max(revision);
            }
            Entry::Epoch(epoch) => self.epoch = epoch,
            Entry::Seal => self.sealed = true,
            Entry::Head(_) | Entry::Unknown => {}
        }
    }

    /// Decides what it means that the frames of this segment end here.
    fn judge_end(
        &mut self,
        disk: &Disk,
        reader: &mut SegmentReader,
        bad: Option<&'static str>,
        last: u64,
    ) -> Result<bool, PersistError> {
        let (number, end) = (reader.header.number, reader.offset());
        if self.sealed && bad.is_none() {
            if number == last {
                self.damage(number.saturating_add(1), 0, "the segment is missing");
            }
            return Ok(number < last);
        }
        let mut proven = 0;
        if number < last {
            let Some(next) = self.interrupted(disk, number, last)? else {
                self.damage(number, end, bad.unwrap_or("the segment ends too early"));
                return Ok(false);
            };
            proven = next.map_or(0, |header| header.base.saturating_sub(SEAL_FRAME_LEN));
            self.stray = Some(last);
        }
        let position = reader.position();
        if self.sealed
            || proven > position
            || (bad.is_some() && (self.head_is_behind_damage || reader.later_frame_proves()?))
        {
            self.damage(number, end, bad.unwrap_or("the segment ends too early"));
        }
        Ok(false)
    }

    /// Whether the next segment is the last, and one whose making a crash interrupted: it has no frame.
    fn interrupted(&self, disk: &Disk, number: u64, last: u64) -> Result<Option<Option<SegmentHeader>>, PersistError> {
        if number.checked_add(1) == Some(last) && self.numbers.binary_search(&last).is_ok() && !self.sealed {
            return is_frameless(disk, last);
        }
        Ok(None)
    }
}

/// The newest head that the frames from here on name, up to the first bad one; zero if none does.
fn newest_head(reader: &mut SegmentReader) -> Result<u64, PersistError> {
    let mut head = 0;
    while let Next::Frame(_, _, body) = reader.next()? {
        let newest = Records::new(body).flatten().filter_map(|record| record.head()).max();
        head = head.max(newest.unwrap_or(0));
    }
    Ok(head)
}

/// The log position of the end of what was read.
fn position_of(tail: &Tail) -> u64 {
    tail.header.base.saturating_add(tail.end.saturating_sub(SEGMENT_HEADER_LEN))
}

/// The header, if it is whole, of a segment that holds no frame.
fn is_frameless(disk: &Disk, number: u64) -> Result<Option<Option<SegmentHeader>>, PersistError> {
    Ok(match SegmentReader::open(disk, number)? {
        Opened::Good(reader) => (reader.size() == SEGMENT_HEADER_LEN).then_some(Some(reader.header)),
        Opened::Bad { size, .. } => (size <= SEGMENT_HEADER_LEN).then_some(None),
    })
}
