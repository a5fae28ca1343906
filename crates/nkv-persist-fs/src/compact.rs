//! Keeps the log short: what is still needed of the oldest segment is appended at the end, then the segment goes.
//!
//! A copy is the record as it was, with its revision, and is made only while the record is the value of its key.
//! Deletes are not copied: whatever they hide stands before them and is gone earlier. The segment is unlinked when
//! the copies, and the record that it is no longer needed, are durable.

use std::sync::Mutex;
use std::time::Duration;
use std::vec;

use nkv_core::PersistError;

use crate::disk::{Disk, segment_name};
use crate::error::damaged;
use crate::format::{FrameBuf, RawRecord, Records};
use crate::log::{Log, sync_unlocked};
use crate::mutex::lock;
use crate::reader::{Next, Opened, SegmentReader};

/// How long compaction rests after it failed.
const REST: Duration = Duration::from_secs(1);
/// How much of a segment one step reads at most, or a frame if that is longer: a sync may be waiting.
const READ_MAX: u64 = 256 << 10;
/// A record that may have to be copied.
#[derive(Debug)]
struct Candidate {
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
            log.rest_compaction(REST);
            let error = log.poison_in_doubt(error);
            if log.check_usable().is_ok() {
                tracing::warn!(%error, "compaction rests for a second");
            }
            error
        })
    }

    fn try_step(&mut self, log: &Mutex<Log>, target: u64) -> Result<(), PersistError> {
        if lock(log).leftover().is_some() {
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

    /// Forgets what it was doing, as the segment is not needed any more.
    pub(crate) fn forget(&mut self) {
        self.job = None;
    }

    fn begin(&self, log: &Mutex<Log>) -> Result<Job, PersistError> {
        let is_active = |log: &Log| log.head() == log.active_number();
        let first = lock(log);
        let is_dirty = is_active(&first) && first.is_dirty();
        drop(first);
        if is_dirty {
            // Writers would wait for it when the next segment begins.
            sync_unlocked(log)?;
        }
        let mut log = lock(log);
        log.check_usable()?;
        let number = log.head();
        let is_empty = log.index().usage(number)?.live == 0;
        if !is_empty {
            // Room may have been made meanwhile; if not, the next line says so.
            drop(log.regain_reserve_in_time());
            log.check_room_to_copy(number)?;
        }
        if is_active(&log) {
            log.rotate_for_compaction(is_empty)?;
        }
        let frames = if is_empty { None } else { log.index().frames_of(number).map(Vec::into_iter) };
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
            if self.candidates.is_empty() && lock(log).index().usage(job.number)?.live == 0 {
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
                if record.id().is_some_and(|id| log.index().is_live(id, position)) {
                    let at = self.bytes.len();
                    self.bytes.extend_from_slice(record.bytes);
                    self.candidates.push(Candidate { position, bytes: at..self.bytes.len() });
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

    /// Appends what is needed even now, when no writer can append.
    fn copy_chunk(
        &mut self,
        log: &mut Log,
        number: u64,
        found: &mut impl Iterator<Item = Candidate>,
    ) -> Result<(), PersistError> {
        self.frame.clear();
        let mut copies = Vec::new();
        while self.frame.len() < log.options().chunk_bytes()
            && let Some(Candidate { position, bytes }) = found.next()
        {
            let Some(bytes) = self.bytes.get(bytes) else { continue };
            let record = RawRecord { bytes };
            // A copy that were left out would be missed when the segment is dropped.
            if record.id().is_some_and(|id| log.index().is_live(id, position)) {
                self.frame.push_copy(bytes);
                copies.push(record);
            }
        }
        if copies.is_empty() {
            return Ok(());
        }
        self.frame.finish();
        log.commit_copies(&mut self.frame, number, &copies)
    }

    /// Notes durably that the segment is no longer needed, and those after it that hold nothing, and only then
    /// unlinks them. From then on they count no more, even if a name cannot be taken away.
    fn drop_segment(&mut self, log: &Mutex<Log>, number: u64) -> Result<(), PersistError> {
        let mut guard = lock(log);
        if guard.index().usage(number)?.live > 0 {
            return Err(damaged(&segment_name(number), 0, "compaction did not find a value that must be there"));
        }
        let is_needed = |log: &Log, number| number == log.active_number() || log.index().live_in(number) > 0;
        let next = number.saturating_add(1);
        let head = (next..).find(|next| is_needed(&guard, *next)).unwrap_or(next);
        guard.append_head(&mut FrameBuf::new(), head)?;
        drop(guard);
        sync_unlocked(log)?;
        lock(log).drop_segments(number..head)?;
        self.unlink(log)
    }

    /// Takes away the names of segments that are not needed. One that fails is tried again by a later step, and
    /// nothing is copied before it succeeds.
    pub(crate) fn unlink(&self, log: &Mutex<Log>) -> Result<(), PersistError> {
        loop {
            let next = lock(log).leftover();
            let Some(number) = next else { break };
            self.disk.remove(&segment_name(number))?;
            lock(log).forget_leftover(number);
        }
        if let Err(error) = lock(log).regain_reserve() {
            tracing::debug!(%error, "no room for the reserve yet");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;

    use nkv_core::{Action, Change, Key, Meta, Reason, Revision};
    use proptest::prelude::*;

    use super::*;
    use crate::batch::Batch;
    use crate::format::Id;
    use crate::open::open_log;
    use crate::options::FsOptions;
    use crate::scan::Scan;
    use crate::sim::{Fault, SimFs};
    use crate::space::Need;
    use crate::vfs::Open;

    /// The revision of each key that is there, or of its tombstone, and whether it has a value.
    type Newest = HashMap<String, (Revision, bool)>;

    /// Stores a value of `value_len` bytes, or deletes the key.
    fn store(log: &mut Log, newest: &mut Newest, key: &str, value_len: Option<usize>) {
        store_at(log, newest, key, value_len, log.revision().next(), Meta::NONE);
    }

    fn store_at(
        log: &mut Log,
        newest: &mut Newest,
        key: &str,
        value_len: Option<usize>,
        revision: Revision,
        meta: Meta,
    ) {
        let action = match value_len {
            Some(len) => Action::Put { value: vec![1; len].into(), expiry: None },
            None => Action::Delete { reason: Reason::Deleted },
        };
        let before = newest.remove(key).filter(|(_, is_value)| *is_value);
        let replaces = before.map_or(Revision::ZERO, |(revision, _)| revision);
        let is_left = value_len.is_some() || !meta.is_none();
        let changes = [Change { key: Key::new(key).unwrap(), revision, replaces, action, meta }];
        let mut batch = Batch::new();
        log.plan(&changes, &mut batch).unwrap();
        batch.encode(&changes).unwrap();
        log.commit(&changes, &mut batch).unwrap();
        if is_left {
            newest.insert(key.to_owned(), (revision, value_len.is_some()));
        }
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
        let is_known = |(key, (revision, _)): (&String, &(Revision, bool))| {
            log_index.keyed_revision(key) == Some(*revision) || log_index.contains(*revision)
        };
        assert!(newest.iter().all(is_known));
        let usages = log_index.segments().map(|number| (number, log_index.live_in(number))).collect();
        (log_index.key_count(), log_index.live_bytes(), log_index.total_bytes(), usages)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Whatever order records, their copies and what replaces them have come to stand in, reading says what counts.
        #[test]
        fn what_is_read_anew_is_what_was_known(steps in prop::collection::vec((0_u8..12, 0_u8..6), 0..80)) {
            let fs = SimFs::new();
            let options = FsOptions::default().with_segment_bytes(4096).with_reserve_bytes(0);
            let (disk, log) = log_of(&fs, options, &[]);
            let (log, mut newest) = (Mutex::new(log), Newest::new());
            let (mut compactor, mut job, mut is_done, mut latest) = (Compactor::new(disk), None, false, None);
            for (what, key) in steps {
                let name = format!("k.{key}");
                match what {
                    0..4 => store(&mut lock(&log), &mut newest, &name, Some(300 * usize::from(what))),
                    4 => store(&mut lock(&log), &mut newest, &name, None),
                    // With meta, and at the revision of the change before if it was of another key.
                    8..12 => {
                        let log = &mut *lock(&log);
                        let is_first = log.revision() == Revision::ZERO || latest == Some(key);
                        let revision = if is_first { log.revision().next() } else { log.revision() };
                        let is_later = newest.get(&name).is_none_or(|(before, _)| *before < revision);
                        let revision = if is_later { revision } else { log.revision().next() };
                        let value_len = (what > 9).then_some(400);
                        store_at(log, &mut newest, &name, value_len, revision, Meta::new(b"meta"));
                    }
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
                latest = if (5..8).contains(&what) { latest } else { Some(key) };
                let scan = Scan::run(&Disk::new(Arc::new(fs.fork()), "/data".into()), true).unwrap();
                let log = lock(&log);
                prop_assert_eq!(account(&scan.index, &newest), account(log.index(), &newest));
                let values = newest.values().filter(|(_, is_value)| *is_value).count();
                prop_assert_eq!((scan.revision, values, scan.damage), (log.revision(), log.index().key_count(), None));
                prop_assert_eq!(newest.len() - values, log.index().tombstone_count());
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
            let copied = lock(&log).counters().copied_bytes;
            if disk.is_in_doubt() {
                // The name went, and it is not known whether durably.
                assert!(lock(&log).check_usable().is_err() && !lock(&log).wants_compaction());
                poisoned += 1;
            } else if lock(&log).leftover().is_some() {
                seen += 1;
                assert_eq!(lock(&log).need(0), Need::None, "call {call}");
                lock(&log).rest_compaction(Duration::ZERO);
                assert!(lock(&log).wants_compaction());
                compactor.step(&log, 4096).unwrap();
                assert!(!lock(&log).wants_compaction());
                assert_eq!(lock(&log).counters().copied_bytes, copied);
                assert_eq!(disk.segments().unwrap(), lock(&log).index().segments().collect::<Vec<_>>());
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
            let ids = compactor
                .candidates
                .iter()
                .map(|candidate| RawRecord { bytes: &compactor.bytes[candidate.bytes.clone()] }.id().unwrap());
            found.extend(ids.map(|id| if let Id::Revision(revision) = id { revision.get() } else { 0 }));
            compactor.copy(&log, job.number).unwrap();
            compactor.bytes.clear();
        }
        assert_eq!(found, [1_201, 2_501, 3_000]);
    }

    #[test]
    fn a_key_that_is_deleted_while_it_is_being_copied_stays_deleted() {
        let (disk, log) = log_of(&SimFs::new(), FsOptions::default(), &[("gone", 1), ("stays", 1)]);
        let mut newest = Newest::from([("gone".to_owned(), (Revision::new(1), true))]);
        let log = Mutex::new(log);
        let mut compactor = Compactor::new(disk);
        let mut job = compactor.begin(&log).unwrap();
        assert!(compactor.gather(&log, &mut job, 1 << 20).unwrap());
        store(&mut lock(&log), &mut newest, "gone", None);
        compactor.copy(&log, job.number).unwrap();
        compactor.drop_segment(&log, job.number).unwrap();
        let log = lock(&log);
        assert_eq!((log.index().key_count(), log.index().live_in(2)), (1, 26));
    }
}
