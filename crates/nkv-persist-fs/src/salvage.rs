//! Collects what a damaged directory still says, and writes it as a new log.
//!
//! The one idea: behind damage, revisions do not show what counts, as a record may replace one that is lost. Keys do: of
//! each key the record with the highest revision counts, and is copied if it is a put or a tombstone. All that was to replace it stood
//! where nothing can be read.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;

use nkv_core::{PersistError, PersistErrorKind, Revision};

use crate::disk::{Disk, segment_name};
use crate::error::damaged;
use crate::format::{
    Entry, FrameBuf, FrameHeader, NUMBER_MAX, RawRecord, Records, SEGMENT_HEADER_LEN, SegmentHeader, VERSION,
};
use crate::log::{Log, random_epoch, random_salt};
use crate::open::create_with;
use crate::options::FsOptions;
use crate::reader::{Next, Opened, SegmentReader};
use crate::scan::Scan;

/// Bytes that cannot be read or used any more, and the revisions of the changes that stood there. Where several changes have
/// one revision, some of those at the bounds may have stood there too.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Lost {
    /// The file's name.
    pub file: String,
    /// Where in the file.
    pub offset: u64,
    /// How many bytes; zero if the file is missing, or ends too early.
    pub bytes: u64,
    /// The changes at revisions above this one are lost,
    pub after: Revision,
    /// up to the one before this; all later ones if nothing later can be read.
    pub before: Option<Revision>,
}

impl Lost {
    /// Whether the change of this revision may be among what is lost. A copy of an older one may be too.
    #[must_use]
    pub fn may_hold(&self, revision: Revision) -> bool {
        revision >= self.after && self.before.is_none_or(|before| revision <= before)
    }
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Lost { file, offset, bytes, after, before } = self;
        match bytes {
            0 => write!(f, "what followed in the log at offset {offset} of {file}, ")?,
            _ => write!(f, "{bytes} bytes of {file} at offset {offset}, ")?,
        }
        let first = after.get().saturating_add(1);
        match before.map(|before| before.get().saturating_sub(1)) {
            None => write!(f, "with all revisions from {first} on"),
            Some(last) if last < first => write!(f, "with copies of older values, if any"),
            Some(last) => write!(f, "with the revisions {first} to {last}"),
        }
    }
}

/// The newest record of a key.
#[derive(Clone, Copy, Debug)]
struct Newest {
    revision: Revision,
    kept: Option<Kept>,
}

/// A record that a repair copies: a put or a tombstone.
#[derive(Clone, Copy, Debug)]
struct Kept {
    /// The segment, and the offset of the frame.
    at: (u64, u64),
    is_tombstone: bool,
    is_keyed: bool,
}

impl Newest {
    /// Whether the key has a value.
    fn is_value(&self) -> bool {
        self.kept.is_some_and(|kept| !kept.is_tombstone)
    }
}

/// Frames that can be read, one behind the other.
#[derive(Clone, Copy, Debug)]
struct Span {
    number: u64,
    start: u64,
    end: u64,
}

/// What a damaged directory still says.
#[derive(Debug, Default)]
pub(crate) struct Salvage {
    numbers: Vec<u64>,
    head: u64,
    spans: Vec<Span>,
    newest: HashMap<Box<str>, Newest>,
    /// The keys of what can be read and must not be used.
    unused: HashSet<Box<str>>,
    revision: Revision,
    lost: Vec<Lost>,
    /// How many of them, from the first on, have their last revision.
    closed: usize,
    /// Where the last segment that fits in ends in the log, and whether that is known for sure.
    end: Option<(u64, u64, bool)>,
    /// Nothing behind this is used.
    is_over: bool,
    sealed: bool,
}

impl Salvage {
    /// Reads all that can be read of the segments that a scan has found to be needed.
    pub(crate) fn collect(disk: &Disk, scan: &Scan) -> Result<Self, PersistError> {
        let (numbers, head) = (scan.numbers.clone(), scan.head);
        let needed: Vec<u64> = numbers.iter().copied().filter(|number| *number >= head).collect();
        let mut salvage = Salvage { numbers, head, ..Salvage::default() };
        let last = salvage.numbers.last().copied().unwrap_or(0);
        let mut expected = salvage.head.max(1);
        for number in needed {
            if number > expected {
                // However many are missing here.
                salvage.lose(expected, 0, 0);
            }
            salvage.read_segment(disk, number, last)?;
            expected = number.saturating_add(1);
        }
        if salvage.numbers.is_empty() {
            salvage.lose(expected, 0, 0);
        }
        if salvage.sealed && salvage.end.is_some_and(|(number, ..)| number == last) {
            salvage.lose(last.saturating_add(1), 0, 0);
        }
        salvage.drop_doubles();
        Ok(salvage)
    }

    fn lose(&mut self, number: u64, offset: u64, bytes: u64) {
        let (file, after) = (segment_name(number), self.revision);
        self.lost.push(Lost { file, offset, bytes, after, before: None });
    }

    /// What was lost so far stood before the change of this revision.
    fn close(&mut self, revision: Revision) {
        let open = self.lost.get_mut(self.closed..).unwrap_or_default();
        open.iter_mut().for_each(|lost| lost.before = Some(revision));
        self.closed = self.lost.len();
        self.revision = revision;
    }

    fn read_segment(&mut self, disk: &Disk, number: u64, last: u64) -> Result<(), PersistError> {
        let mut reader = match SegmentReader::open(disk, number)? {
            Opened::Good(reader) => reader,
            Opened::Bad { size, .. } => {
                self.lose(number, 0, size);
                return Ok(());
            }
        };
        if self.is_over || !self.fits(&reader.header) {
            self.lose(number, 0, reader.size());
            return self.note_unused(&mut reader);
        }
        if reader.header.revision > self.revision {
            // The next change has the next one.
            let revision = reader.header.revision;
            self.close(revision.next());
            self.revision = revision;
        }
        self.sealed = false;
        let is_whole = self.read_frames(&mut reader)?;
        let size = reader.size().saturating_sub(SEGMENT_HEADER_LEN);
        let is_exact = is_whole && self.sealed;
        let end = if is_exact { reader.position() } else { reader.header.base.saturating_add(size) };
        self.end = Some((number, end, is_exact));
        if is_whole && !self.sealed && number < last {
            self.lose(number, reader.offset(), 0);
        }
        Ok(())
    }

    /// Whether a segment can be a part of this log. One of another past would bring back what was deleted in this one.
    fn fits(&self, header: &SegmentHeader) -> bool {
        match self.end {
            None => header.head <= header.number,
            Some((before, end, true)) if before.checked_add(1) == Some(header.number) => header.base == end,
            // A file that was cut has ended further on.
            Some(_) => header.revision >= self.revision,
        }
    }

    /// Reads the frames of a segment, over what is none; says whether there was nothing else.
    fn read_frames(&mut self, reader: &mut SegmentReader) -> Result<bool, PersistError> {
        let number = reader.header.number;
        let (mut start, mut is_whole) = (reader.offset(), true);
        loop {
            let end = reader.offset();
            let bad = match reader.next()? {
                Next::Frame(header, at, body) => match understood(&header, body) {
                    Some(records) => {
                        records.iter().for_each(|record| self.apply(record, (number, at)));
                        continue;
                    }
                    None => true,
                },
                Next::End => false,
                Next::Bad(_) => true,
            };
            self.spans.push(Span { number, start, end });
            if !bad {
                return Ok(is_whole);
            }
            is_whole = false;
            if reader.offset() > end {
                // A whole frame that this program does not understand: what it does to others is not known here.
                self.is_over = true;
                reader.skip_to(end);
                let written_to = reader.written_to()?;
                self.lose(number, end, written_to.saturating_sub(end));
                self.note_unused(reader)?;
                return Ok(false);
            }
            let written_to = reader.written_to()?;
            let is_more = reader.skip_bad()?;
            start = if is_more { reader.offset() } else { written_to };
            self.lose(number, end, start.saturating_sub(end));
            if !is_more {
                return Ok(false);
            }
        }
    }

    fn apply(&mut self, record: &RawRecord<'_>, frame: (u64, u64)) {
        let kept = |is_tombstone, is_keyed| Some(Kept { at: frame, is_tombstone, is_keyed });
        let (key, revision, kept) = match record.entry() {
            Ok(Entry::Put { key, revision, is_keyed, .. }) => (key, revision, kept(false, is_keyed)),
            Ok(Entry::Tombstone { key, revision, .. }) => (key, revision, kept(true, true)),
            Ok(Entry::Delete { key, revision, .. }) => (key, revision, None),
            Ok(Entry::Seal) => return self.sealed = true,
            _ => return,
        };
        if revision > self.revision {
            self.close(revision);
        }
        match self.newest.get_mut(key) {
            Some(newest) if newest.revision >= revision => {}
            Some(newest) => *newest = Newest { revision, kept },
            None => drop(self.newest.insert(key.into(), Newest { revision, kept })),
        }
    }

    /// Notes the keys of what is not used, for the report.
    fn note_unused(&mut self, reader: &mut SegmentReader) -> Result<(), PersistError> {
        loop {
            let Next::Frame(_, _, body) = reader.next()? else {
                if reader.skip_bad()? {
                    continue;
                }
                return Ok(());
            };
            for record in Records::new(body).flatten() {
                match record.entry() {
                    Ok(Entry::Put { key, .. }) => drop(self.unused.insert(key.into())),
                    Ok(Entry::Delete { key, .. } | Entry::Tombstone { key, .. }) => drop(self.unused.remove(key)),
                    _ => {}
                }
            }
        }
    }

    /// The index of a log knows most records by their revisions: of two with the same, which no log has, one stays.
    fn drop_doubles(&mut self) {
        let mut first: HashMap<Revision, (u64, u64)> = HashMap::new();
        for Newest { revision, kept } in self.newest.values() {
            let Some(Kept { at, is_keyed: false, .. }) = *kept else { continue };
            first.entry(*revision).and_modify(|known| *known = at.min(*known)).or_insert(at);
        }
        for Newest { revision, kept } in self.newest.values_mut() {
            *kept = kept.filter(|kept| kept.is_keyed || first.get(revision) == Some(&kept.at));
        }
    }

    /// How many keys a repair keeps.
    pub(crate) fn kept_count(&self) -> usize {
        self.newest.values().filter(|newest| newest.is_value()).count()
    }

    /// How many keys a repair drops that can be read.
    pub(crate) fn dropped_count(&self) -> usize {
        let is_kept = |key: &str| self.newest.get(key).is_some_and(Newest::is_value);
        self.unused.iter().filter(|key| !is_kept(key)).count()
    }

    /// What cannot be read or used.
    pub(crate) fn lost(&self) -> &[Lost] {
        &self.lost
    }

    /// Keeps aside each file of which something is lost, writes what is left as a new log behind all others, in a new
    /// epoch, and removes the others. Until the new log is whole, what is there is as damaged as before.
    pub(crate) fn rewrite(&self, disk: &Disk, options: &FsOptions) -> Result<Log, PersistError> {
        let files: BTreeSet<&str> = self.lost.iter().filter(|lost| lost.bytes > 0).map(|lost| &*lost.file).collect();
        for file in files {
            disk.at_any_price(|| disk.keep_aside(file, 0, u64::MAX))?;
        }
        let log = disk.at_any_price(|| self.write(disk, options.clone()).inspect_err(|_| self.abandon(disk)))?;
        for number in &self.numbers {
            disk.remove(&segment_name(*number))?;
        }
        Ok(log)
    }

    fn write(&self, disk: &Disk, options: FsOptions) -> Result<Log, PersistError> {
        let number = self.numbers.last().map_or(Some(1), |last| last.checked_add(1)).filter(|next| *next <= NUMBER_MAX);
        let number = number.ok_or_else(|| {
            PersistError::new(
                PersistErrorKind::Rejected,
                "no segment can have a greater number than the newest one has",
            )
        })?;
        let header = SegmentHeader {
            version: VERSION,
            number,
            head: if self.numbers.is_empty() { number } else { self.head },
            base: 0,
            // It may be that of a delete, which is not copied. What is copied is known for a copy then, which replaces nothing.
            revision: self.revision,
            epoch: random_epoch()?,
            salt: random_salt()?,
        };
        let mut log = create_with(disk, options, header)?;
        let mut frame = FrameBuf::new();
        for span in &self.spans {
            self.copy(disk, span, &mut log, &mut frame)?;
        }
        // No header may name the new head before all stands behind it.
        log.append_head(&mut frame, number)?;
        log.sync()?;
        log.close()?;
        Ok(log)
    }

    /// Copies the records of some frames that are the newest of their keys.
    fn copy(&self, disk: &Disk, span: &Span, log: &mut Log, frame: &mut FrameBuf) -> Result<(), PersistError> {
        let name = segment_name(span.number);
        let changed = |at| damaged(&name, at, "it is not any more what it was when it was read first");
        let Opened::Good(mut reader) = SegmentReader::open(disk, span.number)? else { return Err(changed(0)) };
        reader.skip_to(span.start);
        while reader.offset() < span.end {
            let at = reader.offset();
            let Next::Frame(_, at, body) = reader.next()? else { return Err(changed(at)) };
            for record in Records::new(body).flatten() {
                let Ok(Entry::Put { key, revision, .. } | Entry::Tombstone { key, revision, .. }) = record.entry()
                else {
                    continue;
                };
                let is_newest = |newest: &&Newest| {
                    newest.revision == revision && newest.kept.is_some_and(|kept| kept.at == (span.number, at))
                };
                if self.newest.get(key).filter(is_newest).is_some() {
                    frame.push_copy(record.bytes);
                }
                if frame.len() >= log.options().chunk_bytes() {
                    frame.finish();
                    log.append(frame)?;
                    frame.clear();
                }
            }
        }
        Ok(())
    }

    /// Takes away what could not be written to its end.
    fn abandon(&self, disk: &Disk) {
        let last = self.numbers.last().copied().unwrap_or(0);
        let Ok(numbers) = disk.segments() else { return };
        for number in numbers.into_iter().rev().filter(|number| *number > last) {
            let name = segment_name(number);
            if let Err(error) = disk.remove(&name) {
                tracing::warn!(segment = name, %error, "what could not be written to its end could not be removed either");
            }
        }
    }
}

/// The records of a frame, if this program understands all of it.
fn understood<'a>(header: &FrameHeader, body: &'a [u8]) -> Option<Vec<RawRecord<'a>>> {
    if !header.is_understood() {
        return None;
    }
    let is_good = |record: &RawRecord<'_>| match record.entry() {
        Ok(
            entry @ (Entry::Put { revision, replaces, .. }
            | Entry::Delete { revision, replaces, .. }
            | Entry::Tombstone { revision, replaces, .. }),
        ) => revision > replaces && entry.check_key().is_ok(),
        entry => entry.is_ok(),
    };
    let records: Vec<_> = Records::new(body).map(|record| record.ok().filter(is_good)).collect::<Option<_>>()?;
    let mut ids: Vec<_> = records.iter().filter_map(RawRecord::id).collect();
    ids.sort_unstable();
    ids.is_sorted_by(|one, next| one < next).then_some(records)
}
