//! Looks at a data directory that no process uses, and repairs one that refuses to open.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use nkv_core::{Epoch, PersistError, PersistErrorKind, Revision};

use crate::disk::{Disk, Lock, segment_name};
use crate::log::Log;
use crate::open::{create, cut, keep, open_log, renew, resume};
use crate::options::FsOptions;
use crate::reader::SegmentReader;
use crate::scan::{Damage, Scan, Tail};
use crate::vfs::{Open, RealFs, Vfs};

/// What a data directory holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// How many segments are there.
    pub segments: usize,
    /// How many batches could be read.
    pub batches: u64,
    /// How many records could be read.
    pub records: u64,
    /// How many keys are present.
    pub keys: usize,
    /// How many bytes their records have.
    pub live_bytes: u64,
    /// The highest revision that was read.
    pub revision: Revision,
    /// The epoch.
    pub epoch: Epoch,
    /// How many bytes a crash left torn at the end; the next opening keeps them aside and cuts them off.
    pub torn_bytes: u64,
    /// Where the data is damaged first, if it is; then everything else is about what stands before, and after a repair
    /// about what was kept.
    pub damage: Option<Damage>,
    /// What a repair drops, or has dropped: each file with the offset from which on it goes.
    pub drops: Vec<(String, u64)>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} segments, {} batches, {} records", self.segments, self.batches, self.records)?;
        writeln!(
            f,
            "{} keys, {} live bytes, revision {}, epoch {}",
            self.keys, self.live_bytes, self.revision, self.epoch
        )?;
        if self.torn_bytes > 0 {
            writeln!(f, "torn by a crash: {} bytes at the end", self.torn_bytes)?;
        }
        match &self.damage {
            None => writeln!(f, "no damage")?,
            Some(damage) => writeln!(f, "damaged: {damage}")?,
        }
        self.drops.iter().try_for_each(|(file, offset)| writeln!(f, "a repair drops {file} from offset {offset} on"))
    }
}

/// Reads all of a data directory and says what is in it. Changes nothing.
///
/// # Errors
///
/// [`PersistErrorKind::InUse`] while a process has it,
/// [`PersistErrorKind::Io`] when it cannot be read, [`PersistErrorKind::OtherVersion`] when another version of the program
/// wrote it. Damage is no error here.
pub fn check(dir: impl Into<PathBuf>) -> Result<Report, PersistError> {
    check_with(Arc::new(RealFs::default()), dir)
}

/// Like [`check`], on another file system.
///
/// # Errors
///
/// Those of [`check`].
pub fn check_with(vfs: Arc<dyn Vfs>, dir: impl Into<PathBuf>) -> Result<Report, PersistError> {
    let disk = Disk::new(vfs, dir.into());
    let lock = disk.lock(Open::Read)?;
    let promised = lock.promises_segments()?;
    let report = report(&Scan::run(&disk, promised)?);
    if report.damage.is_none() {
        return Ok(report);
    }
    Ok(Report { drops: drops(&Scan::salvage(&disk, promised)?), ..report })
}

/// Makes a damaged data directory usable: what stands at the damage and after it is kept aside in files named
/// `*.broken-*`, then dropped, and a new epoch begins. If it is the oldest segments that are missing, or have no header that
/// can be read, what stands behind them stays. Without damage this is an ordinary opening.
///
/// # Errors
///
/// Those of [`FsPersist::open`](crate::FsPersist::open), but for damage.
pub fn repair(dir: impl Into<PathBuf>) -> Result<Report, PersistError> {
    repair_with(Arc::new(RealFs::default()), dir)
}

/// Like [`repair`], on another file system.
///
/// # Errors
///
/// Those of [`repair`].
pub fn repair_with(vfs: Arc<dyn Vfs>, dir: impl Into<PathBuf>) -> Result<Report, PersistError> {
    let disk = Disk::new(vfs, dir.into());
    let lock = disk.lock(Open::Write)?;
    // One of another version, wherever it stands, is refused before anything is changed.
    disk.segments()?.into_iter().try_for_each(|number| SegmentReader::open(&disk, number).map(drop))?;
    let scan = Scan::run(&disk, lock.promises_segments()?)?;
    let options = FsOptions::default().with_reserve_bytes(0);
    let Some(damage) = &scan.damage else {
        let log = open_log(&disk, &lock, options)?;
        return Ok(Report { epoch: log.epoch, ..report(&scan) });
    };
    let (log, kept) = salvage(&disk, &lock, options)?;
    let (keys, live_bytes) = (log.index.key_count(), log.index.live_bytes());
    Ok(Report { epoch: log.epoch, keys, live_bytes, damage: Some(damage.clone()), ..kept })
}

/// Saves what stands before the damage. If the oldest segments are missing, or have no header that can be read, what
/// stands behind those.
fn salvage(disk: &Disk, lock: &Lock, options: FsOptions) -> Result<(Log, Report), PersistError> {
    let scan = Scan::salvage(disk, lock.promises_segments()?)?;
    let kept = report(&scan);
    for number in &scan.skipped {
        keep_all(disk, *number)?;
    }
    let log = match scan.cut() {
        Some(tail) => {
            // The newest segment, which knows where the log begins, may go now: nobody is to begin before that.
            for number in scan.leftovers() {
                disk.remove(&segment_name(number))?;
            }
            if scan.damage.is_some() {
                drop_after(disk, &scan, &tail)?;
            }
            let scan = Scan::salvage(disk, true)?;
            match (scan.tail, &scan.damage) {
                (Some(tail), None) => resume(disk, options, scan, tail)?,
                (_, damage) => return Err(damage.as_ref().map_or_else(nothing_left, Damage::to_error)),
            }
        }
        None => start_over(disk, &scan, options)?,
    };
    lock.promise_segments()?;
    Ok((log, kept))
}

/// Keeps a whole segment aside, in the room of the reserve if there is no other.
fn keep_all(disk: &Disk, number: u64) -> Result<(), PersistError> {
    disk.at_any_price(|| disk.keep_aside(&segment_name(number), 0, u64::MAX)).map(drop)
}

fn nothing_left() -> PersistError {
    PersistError::new(PersistErrorKind::Damaged, "the repair has left no segment")
}

/// Keeps aside and drops everything at and after the damage; the newest segment goes first. A crash in between leaves a
/// directory that still refuses to open, or one that ends where it was to be cut: what was kept aside there first tells the
/// next opening that a new epoch is to begin.
fn drop_after(disk: &Disk, scan: &Scan, tail: &Tail) -> Result<(), PersistError> {
    let kept = keep(disk, tail)?;
    let later = scan.numbers.iter().rev().filter(|number| **number > tail.header.number);
    for number in later {
        keep_all(disk, *number)?;
        disk.remove(&segment_name(*number))?;
    }
    cut(disk, tail, &kept, "repair")
}

/// Nothing can be saved: a new log behind all that is there, which makes the rest leftovers.
fn start_over(disk: &Disk, scan: &Scan, options: FsOptions) -> Result<Log, PersistError> {
    for number in &scan.numbers {
        keep_all(disk, *number)?;
    }
    let mut log = create(disk, options, scan.numbers.last().map_or(1, |last| last.saturating_add(1)))?;
    for number in &scan.numbers {
        disk.remove(&segment_name(*number))?;
    }
    renew(&mut log)?;
    Ok(log)
}

fn report(scan: &Scan) -> Report {
    Report {
        segments: scan.numbers.len(),
        batches: scan.frames,
        records: scan.records,
        keys: scan.index.key_count(),
        live_bytes: scan.index.live_bytes(),
        revision: scan.revision,
        epoch: scan.epoch,
        torn_bytes: scan.torn_bytes(),
        damage: scan.damage.clone(),
        drops: drops(scan),
    }
}

fn drops(scan: &Scan) -> Vec<(String, u64)> {
    let skipped = scan.skipped.iter().map(|number| (segment_name(*number), 0));
    if scan.damage.is_none() {
        return skipped.collect();
    }
    let cut = scan.cut().map(|tail| (tail.header.number, tail.end));
    let here = cut.map(|(number, end)| (segment_name(number), end));
    let later = scan.numbers.iter().filter(|later| cut.is_none_or(|(number, _)| **later > number));
    skipped.chain(here).chain(later.map(|later| (segment_name(*later), 0))).collect()
}
