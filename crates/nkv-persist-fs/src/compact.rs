//! Keeps the log short: what is still needed of the oldest segment is appended at the end, then the segment goes.
//!
//! A copy is the record as it was, with its revision, and is made only while the record is the value of its key.
//! Deletes are not copied: whatever they hide stands before them and is gone earlier. The segment is unlinked when
//! the copies, and the record that it is no longer needed, are durable.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::vec;

use nkv_core::{PersistError, PersistErrorKind, Revision};

use crate::disk::{Disk, segment_name};
use crate::error::damaged;
use crate::format::{FrameBuf, Records, SEAL_FRAME_LEN, SEGMENT_HEADER_LEN};
use crate::index::Place;
use crate::log::{Log, sync_unlocked};
use crate::reader::{Next, Opened, SegmentReader};

/// How long compaction rests after it failed.
const REST: Duration = Duration::from_secs(1);
/// How much of a segment one step reads at most, or a frame if that is longer: a sync may be waiting.
const READ_MAX: u64 = 256 << 10;
/// The length of the frame that names a new head.
const HEAD_FRAME_LEN: u64 = 72;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How much has to be done before `extra` more bytes are appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Need {
    /// Nothing.
    None,
    /// The background thread should compact.
    Soon,
    /// Who appends must wait, or the bound breaks: two times the live data and one segment.
    Now,
}

#[allow(clippy::arithmetic_side_effects, reason = "sums of the sizes of files; options and lengths are bounded")]
impl Log {
    pub(crate) fn need(&self, extra: u64) -> Need {
        let (live, slack) = (self.index.live_bytes(), self.options.segment_bytes);
        let total = self.index.total_bytes() + extra;
        if total + self.copies_len(self.head) > 2 * live + slack || self.is_tight(extra) {
            Need::Now
        } else if total > live + live / 2 + slack / 4 * 3 || self.is_pressed() {
            Need::Soon
        } else {
            Need::None
        }
    }

    /// Whether a full disk makes worth the while what would not be otherwise.
    fn is_pressed(&self) -> bool {
        let is_much = self.garbage() > self.index.live_bytes() / 8 + self.options.segment_bytes / 64;
        let is_urgent = self.head < self.urgent_below;
        is_urgent && is_much || self.is_eaten() && (is_urgent || self.is_near(0))
    }

    /// Whether `extra` more bytes may take the room that is needed to compact on a full disk.
    fn is_tight(&self, extra: u64) -> bool {
        self.is_eaten() && self.is_near(extra) && self.reserve_takes(self.head, 0)
    }

    /// Whether deletes eat the reserve, and compaction would give more back than it makes garbage anew.
    fn is_eaten(&self) -> bool {
        let reserve = self.options.reserve_bytes;
        reserve > 0 && !self.reserve_held() && self.garbage() > reserve / 8 + self.pass_cost()
    }

    /// The most that compaction makes garbage anew while it copies all that is live, once.
    pub(crate) fn pass_cost(&self) -> u64 {
        let live = self.index.live_bytes();
        live / self.options.chunk_bytes() * 96 + live / self.options.segment_bytes * 256
    }

    /// Whether the segment that holds most could not be copied any more, after all others have been: one that holds less
    /// may come before it.
    fn is_near(&self, extra: u64) -> bool {
        let spare = self.options.reserve_bytes / 16 + self.pass_cost() + extra;
        !self.reserve_takes(self.index.fullest_segment(), spare)
    }

    fn garbage(&self) -> u64 {
        self.index.total_bytes().saturating_sub(self.index.live_bytes())
    }

    /// The most that is appended until a segment is emptied and gone.
    pub(crate) fn copies_len(&self, segment: u64) -> u64 {
        // Copying comes with frames of its own, with a new segment or two, and with the record of the new head.
        let live = self.index.usage(segment).live;
        let frames = 2 + 2 * live / self.options.chunk_bytes();
        live + frames * 48 + 2 * (SEGMENT_HEADER_LEN + SEAL_FRAME_LEN) + HEAD_FRAME_LEN
    }

    /// Whether the background has something to compact.
    pub(crate) fn wants_compaction(&self) -> bool {
        (self.need(0) > Need::None || !self.leftovers.is_empty()) && self.may_compact()
    }

    /// Whether compaction has not failed just now.
    pub(crate) fn may_compact(&self) -> bool {
        self.check_usable().is_ok() && self.compact_after.is_none_or(|time| time <= Instant::now())
    }
}

/// A record that may have to be copied.
#[derive(Debug)]
struct Candidate {
    revision: Revision,
    position: u64,
    bytes: std::ops::Range<usize>,
}

/// The segment that is being emptied, and how far that is.
#[derive(Debug)]
struct Job {
    number: u64,
    reader: Option<SegmentReader>,
    /// Where the frames start that hold what is needed, if that is known.
    frames: Option<vec::IntoIter<u64>>,
}

/// Does the work, one step at a time. Lock order: this one first, then the log.
#[derive(Debug)]
pub(crate) struct Compactor {
    disk: Disk,
    job: Option<Job>,
    bytes: Vec<u8>,
    candidates: Vec<Candidate>,
    frame: FrameBuf,
}

impl Compactor {
    pub(crate) fn new(disk: Disk) -> Self {
        Compactor { disk, job: None, bytes: Vec::new(), candidates: Vec::new(), frame: FrameBuf::new() }
    }

    /// Copies about `target` bytes, or drops the oldest segment if nothing in it is needed any more, or takes away the
    /// names of segments that were dropped before.
    pub(crate) fn step(&mut self, log: &Mutex<Log>, target: u64) -> Result<(), PersistError> {
        let result = self.try_step(log, target);
        self.bytes.clear();
        self.bytes.shrink_to(1 << 20);
        self.candidates.clear();
        result.map_err(|error| {
            // What was copied stays copied; the segment is read anew from its start.
            self.job = None;
            let mut log = lock(log);
            log.compact_after = Instant::now().checked_add(REST);
            let error = log.poison_in_doubt(error);
            if log.check_usable().is_ok() {
                tracing::warn!(%error, "compaction rests for a second");
            }
            error
        })
    }

    fn try_step(&mut self, log: &Mutex<Log>, target: u64) -> Result<(), PersistError> {
        if !lock(log).leftovers.is_empty() {
            return self.unlink(log);
        }
        let mut job = match self.job.take() {
            Some(job) => job,
            None => self.begin(log)?,
        };
        let is_done = self.gather(log, &mut job, target)?;
        self.copy(log, job.number)?;
        if is_done {
            let number = job.number;
            // An open file keeps its space when its name is gone.
            drop(job);
            return self.drop_segment(log, number);
        }
        self.job = Some(job);
        Ok(())
    }

    fn begin(&self, log: &Mutex<Log>) -> Result<Job, PersistError> {
        let is_active = |log: &Log| log.head == log.active_number();
        let first = lock(log);
        let is_dirty = is_active(&first) && first.is_dirty();
        drop(first);
        if is_dirty {
            // Whoever appends would wait for it when the next segment begins.
            sync_unlocked(log)?;
        }
        let mut log = lock(log);
        log.check_usable()?;
        let number = log.head;
        let is_empty = log.index.usage(number).live == 0;
        if !is_empty {
            // Somebody may have made room; if not, the next line says so.
            drop(log.regain_reserve_in_time());
            log.check_room_to_copy(number)?;
        }
        if is_active(&log) {
            let may_spend = is_empty || log.reserve_takes(number, 0);
            log.rotate_for_compaction(may_spend)?;
        }
        let frames = if is_empty { None } else { log.index.frames_of(number).map(Vec::into_iter) };
        drop(log);
        let reader = if is_empty { None } else { Some(self.open(number)?) };
        Ok(Job { number, reader, frames })
    }

    fn open(&self, number: u64) -> Result<SegmentReader, PersistError> {
        match SegmentReader::open(&self.disk, number)? {
            Opened::Good(reader) => Ok(reader),
            Opened::Bad { reason, .. } => Err(damaged(&segment_name(number), 0, reason)),
        }
    }

    /// Reads frames until enough is found that is still needed; says whether the segment holds no more of it.
    fn gather(&mut self, log: &Mutex<Log>, job: &mut Job, target: u64) -> Result<bool, PersistError> {
        let Some(reader) = &mut job.reader else { return Ok(true) };
        let read_to = reader.offset().saturating_add(READ_MAX.max(target));
        while (self.bytes.len() as u64) < target && reader.offset() < read_to {
            if self.candidates.is_empty() && lock(log).index.usage(job.number).live == 0 {
                return Ok(true);
            }
            if let Some(frames) = &mut job.frames {
                let Some(position) = frames.next() else { return Ok(true) };
                reader.skip_to_position(position);
            }
            let at = reader.offset();
            let (position, body) = match reader.next()? {
                Next::Frame(header, _, body) => (header.position, body),
                Next::End => return Ok(true),
                Next::Bad(reason) => return Err(damaged(&segment_name(job.number), at, reason)),
            };
            let log = lock(log);
            for record in Records::new(body) {
                let record = record.map_err(|reason| damaged(&segment_name(job.number), at, reason))?;
                if let Some(revision) = record.put_revision()
                    && log.index.is_live(revision, position)
                {
                    let at = self.bytes.len();
                    self.bytes.extend_from_slice(record.bytes);
                    self.candidates.push(Candidate { revision, position, bytes: at..self.bytes.len() });
                }
            }
        }
        Ok(false)
    }

    /// Appends what was found, in frames of a bounded size.
    fn copy(&mut self, log: &Mutex<Log>, number: u64) -> Result<(), PersistError> {
        let mut found = std::mem::take(&mut self.candidates).into_iter();
        while found.len() > 0 {
            self.copy_chunk(&mut lock(log), number, &mut found)?;
        }
        Ok(())
    }

    /// Appends what is needed even now, when nobody else can append.
    fn copy_chunk(
        &mut self,
        log: &mut Log,
        number: u64,
        found: &mut impl Iterator<Item = Candidate>,
    ) -> Result<(), PersistError> {
        self.frame.clear();
        let mut copies = Vec::new();
        while self.frame.len() < log.options.chunk_bytes()
            && let Some(Candidate { revision, position, bytes }) = found.next()
        {
            // A copy that were left out would be missed when the segment is dropped.
            if log.index.is_live(revision, position)
                && let Some(record) = self.bytes.get(bytes)
            {
                self.frame.push_copy(record);
                copies.push((revision, record.len() as u32));
            }
        }
        if copies.is_empty() {
            return Ok(());
        }
        self.frame.finish();
        let position = log.append_copy(&mut self.frame, number)?;
        log.counters.copied_bytes = log.counters.copied_bytes.saturating_add(self.frame.len());
        for (revision, len) in copies {
            log.index.move_to(revision, Place { position, len });
        }
        Ok(())
    }

    /// Notes durably that the segment is no longer needed, and those after it that hold nothing, and only then
    /// unlinks them. From then on they count no more, even if a name cannot be taken away.
    fn drop_segment(&mut self, log: &Mutex<Log>, number: u64) -> Result<(), PersistError> {
        let mut guard = lock(log);
        if guard.index.usage(number).live > 0 {
            return Err(damaged(&segment_name(number), 0, "compaction did not find a value that must be there"));
        }
        let is_needed = |log: &Log, number| number == log.active_number() || log.index.usage(number).live > 0;
        let next = number.saturating_add(1);
        let head = (next..).find(|next| is_needed(&guard, *next)).unwrap_or(next);
        guard.append_at_any_price(&mut FrameBuf::of(|frame| frame.push_head(head)))?;
        guard.head = head;
        drop(guard);
        sync_unlocked(log)?;
        let mut guard = lock(log);
        for number in number..head {
            guard.index.drop_oldest_segment();
            guard.counters.compacted_segments = guard.counters.compacted_segments.saturating_add(1);
            guard.leftovers.insert(number);
        }
        drop(guard);
        self.unlink(log)
    }

    /// Takes away the names of segments that are not needed. One that fails is tried again by a later step, and
    /// nothing is copied before it succeeds.
    fn unlink(&self, log: &Mutex<Log>) -> Result<(), PersistError> {
        loop {
            let next = lock(log).leftovers.first().copied();
            let Some(number) = next else { break };
            self.disk.remove(&segment_name(number))?;
            lock(log).leftovers.remove(&number);
        }
        if let Err(error) = lock(log).regain_reserve() {
            tracing::debug!(%error, "no room for the reserve yet");
        }
        Ok(())
    }
}

impl Log {
    /// A new segment, with the room of the reserve if there is no other and it may be spent.
    fn rotate_for_compaction(&mut self, may_spend: bool) -> Result<(), PersistError> {
        match self.rotate() {
            Err(error) if error.kind() == PersistErrorKind::NoSpace && may_spend && self.give_up_reserve()? => {
                self.rotate()
            }
            result => result,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;

    use nkv_core::{Action, Change, Key, Meta, Reason};
    use proptest::prelude::*;

    use super::*;
    use crate::open::open_log;
    use crate::options::FsOptions;
    use crate::scan::Scan;
    use crate::sim::{Fault, SimFs};
    use crate::vfs::Open;

    /// The revision of each key that is there.
    type Newest = HashMap<String, Revision>;

    /// Stores a value of so many bytes, or deletes the key.
    fn store(log: &mut Log, newest: &mut Newest, key: &str, value_len: Option<usize>) {
        let action = match value_len {
            Some(len) => Action::Put { value: vec![1; len].into(), expiry: None },
            None => Action::Delete { reason: Reason::Deleted },
        };
        let revision = log.revision.next();
        let replaces = newest.remove(key).unwrap_or_default();
        let change = Change { key: Key::new(key).unwrap(), revision, replaces, action, meta: Meta::NONE };
        let mut len = 0;
        let mut frame = FrameBuf::of(|frame| len = frame.push_change(&change));
        let position = log.append(&mut frame).unwrap();
        log.index.remove(replaces);
        if value_len.is_some() {
            log.index.insert(revision, Place { position, len });
            newest.insert(key.to_owned(), revision);
        }
        log.revision = revision;
    }

    /// A log with these puts in it, each in a frame of its own.
    fn log_of(fs: &SimFs, options: FsOptions, puts: &[(&str, usize)]) -> (Disk, Log) {
        let disk = Disk::new(Arc::new(fs.clone()), "/data".into());
        disk.create_dir().unwrap();
        let dir_lock = disk.lock(Open::Create).unwrap();
        let mut log = open_log(&disk, &dir_lock, options.with_background(false)).unwrap();
        let mut newest = Newest::new();
        puts.iter().for_each(|(key, value_len)| store(&mut log, &mut newest, key, Some(*value_len)));
        (disk, log)
    }

    /// What the index says, when `newest` are the keys.
    fn account(log_index: &crate::index::Index, newest: &Newest) -> (usize, u64, u64, Vec<(u64, u64)>) {
        assert!(newest.values().all(|revision| log_index.contains(*revision)));
        let usages = log_index.segments().map(|number| (number, log_index.usage(number).live)).collect();
        (log_index.key_count(), log_index.live_bytes(), log_index.total_bytes(), usages)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Whatever order records, their copies and what replaces them have come to stand in, reading says what counts.
        #[test]
        fn what_is_read_anew_is_what_was_known(steps in prop::collection::vec((0_u8..8, 0_u8..6), 0..80)) {
            let fs = SimFs::new();
            let options = FsOptions::default().with_segment_bytes(4096).with_reserve_bytes(0);
            let (disk, log) = log_of(&fs, options, &[]);
            let (log, mut newest) = (Mutex::new(log), Newest::new());
            let (mut compactor, mut job, mut is_done) = (Compactor::new(disk), None, false);
            for (what, key) in steps {
                let name = format!("k.{key}");
                match what {
                    0..4 => store(&mut lock(&log), &mut newest, &name, Some(300 * usize::from(what))),
                    4 => store(&mut lock(&log), &mut newest, &name, None),
                    // What is found now is copied later, or not at all.
                    5 => {
                        let job = job.get_or_insert_with(|| compactor.begin(&log).unwrap());
                        is_done = compactor.gather(&log, job, 500).unwrap();
                    }
                    _ => {
                        if let Some(Job { number, .. }) = job {
                            compactor.copy(&log, number).unwrap();
                            compactor.bytes.clear();
                            if is_done {
                                job = None;
                                is_done = false;
                                compactor.drop_segment(&log, number).unwrap();
                            }
                        }
                    }
                }
                let scan = Scan::run(&Disk::new(Arc::new(fs.fork()), "/data".into()), true).unwrap();
                let log = lock(&log);
                prop_assert_eq!(account(&scan.index, &newest), account(&log.index, &newest));
                prop_assert_eq!((scan.revision, newest.len(), scan.damage), (log.revision, log.index.key_count(), None));
            }
        }
    }

    // The index counted a segment whose name could not be taken away, and compaction ran for ever to get rid of it.
    #[test]
    fn a_segment_that_cannot_be_unlinked_counts_no_more_and_goes_later() {
        let (mut seen, mut poisoned) = (0, 0);
        for call in 0.. {
            let fs = SimFs::new();
            let options = FsOptions::default().with_segment_bytes(4096).with_reserve_bytes(0);
            let (disk, log) = log_of(&fs, options, &[("a", 1_000); 8]);
            let log = Mutex::new(log);
            let mut compactor = Compactor::new(disk.clone());
            let start = fs.calls();
            fs.fail_at(start + call, Fault::Eio, false);
            while lock(&log).need(0) > Need::None && compactor.step(&log, 4096).is_ok() {}
            if fs.calls() <= start + call {
                break;
            }
            let copied = lock(&log).counters.copied_bytes;
            if disk.is_in_doubt() {
                // The name went, and nobody knows whether durably.
                assert!(lock(&log).check_usable().is_err() && !lock(&log).wants_compaction());
                poisoned += 1;
            } else if !lock(&log).leftovers.is_empty() {
                seen += 1;
                assert_eq!(lock(&log).need(0), Need::None, "call {call}");
                lock(&log).compact_after = None;
                assert!(lock(&log).wants_compaction());
                compactor.step(&log, 4096).unwrap();
                assert!(!lock(&log).wants_compaction());
                assert_eq!(lock(&log).counters.copied_bytes, copied);
                assert_eq!(disk.segments().unwrap(), lock(&log).index.segments().collect::<Vec<_>>());
            }
        }
        assert!(seen > 0 && poisoned > 0, "an unlink and a directory sync must fail");
    }

    // One step read a whole segment in which nearly everything was dead, while an interval passed.
    #[test]
    fn a_step_reads_a_bounded_part_of_a_segment_that_holds_little() {
        let mut puts = vec![("dead", 1_000); 3_000];
        puts[2_500] = ("live", 10);
        let (disk, log) = log_of(&SimFs::new(), FsOptions::default(), &puts);
        let log = Mutex::new(log);
        let mut compactor = Compactor::new(disk);
        let mut job = compactor.begin(&log).unwrap();
        job.frames = None;
        let mut steps = 1;
        while !compactor.gather(&log, &mut job, 1 << 10).unwrap() {
            compactor.copy(&log, job.number).unwrap();
            compactor.bytes.clear();
            steps += 1;
            let read = job.reader.as_ref().unwrap().offset();
            assert!(read <= steps * (READ_MAX + 2_000), "{read} bytes in {steps} steps");
        }
        assert!(steps > 5);
    }

    #[test]
    fn of_a_segment_that_holds_little_only_that_is_read() {
        let mut puts = vec![("dead", 1_000); 3_000];
        (puts[1_200], puts[2_500]) = (("one", 10), ("other", 10));
        let (disk, log) = log_of(&SimFs::new(), FsOptions::default(), &puts);
        let log = Mutex::new(log);
        let mut compactor = Compactor::new(disk);
        let mut job = compactor.begin(&log).unwrap();
        let frames = job.frames.clone().unwrap().count();
        assert_eq!(frames, 3, "the two, and the last of the others");
        let mut found = Vec::new();
        while !compactor.gather(&log, &mut job, 1 << 10).unwrap() {
            found.extend(compactor.candidates.iter().map(|candidate| candidate.revision.get()));
            compactor.copy(&log, job.number).unwrap();
            compactor.bytes.clear();
        }
        assert_eq!(found, [1_201, 2_501, 3_000]);
    }

    #[test]
    fn a_key_that_is_deleted_while_it_is_being_copied_stays_deleted() {
        let (disk, log) = log_of(&SimFs::new(), FsOptions::default(), &[("gone", 1), ("stays", 1)]);
        let log = Mutex::new(log);
        let mut compactor = Compactor::new(disk);
        let mut job = compactor.begin(&log).unwrap();
        assert!(compactor.gather(&log, &mut job, 1 << 20).unwrap());
        lock(&log).index.remove(Revision::new(1));
        compactor.copy(&log, job.number).unwrap();
        compactor.drop_segment(&log, job.number).unwrap();
        let log = lock(&log);
        assert_eq!((log.index.key_count(), log.index.usage(2).live), (1, 26));
    }
}
