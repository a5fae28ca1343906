//! Brings a data directory into a state that can be appended to, after a clean stop or a crash.
//!
//! Each step leaves a directory from which recovery can start again, since the power may fail here too.

use nkv_core::{PersistError, PersistErrorKind, Revision};

use crate::disk::{Disk, Lock, segment_name};
use crate::error::from_io;
use crate::format::{FrameBuf, SEGMENT_HEADER_LEN, SegmentHeader};
use crate::log::{Log, random_epoch, random_salt};
use crate::options::{Durability, FsOptions};
use crate::scan::{Scan, Tail};
use crate::vfs::Open;

/// Recovers and gives the log.
pub(crate) fn open_log(disk: &Disk, lock: &Lock, options: FsOptions) -> Result<Log, PersistError> {
    let scan = Scan::run(disk, lock.promises_segments()?)?;
    if let Some(damage) = &scan.damage {
        return Err(damage.to_error());
    }
    let log = match scan.tail {
        Some(tail) => reopen(disk, options, scan, tail)?,
        None => {
            scan.stray.map_or(Ok(()), |number| disk.remove(&segment_name(number)))?;
            create(disk, options, 1)?
        }
    };
    lock.promise_segments()?;
    Ok(log)
}

fn reopen(disk: &Disk, options: FsOptions, scan: Scan, tail: Tail) -> Result<Log, PersistError> {
    let needs_epoch = tail.end < tail.size || scan.cut_before || scan.relaxed;
    let mut log = tidy(disk, options, scan, tail)?;
    regain_reserve(&mut log);
    start(&mut log, needs_epoch)?;
    Ok(log)
}

/// Removes what is not needed, cuts a torn tail off, and gives the log that ends there.
fn tidy(disk: &Disk, options: FsOptions, scan: Scan, tail: Tail) -> Result<Log, PersistError> {
    for number in scan.leftovers().chain(scan.stray) {
        disk.remove(&segment_name(number))?;
    }
    if tail.end < tail.size {
        cut(disk, &tail, "a crash left a torn tail")?;
        disk.forget_old_broken()?;
    }
    let mut log = Log::new(disk.clone(), options, scan.index, tail)?;
    (log.head, log.epoch, log.revision) = (scan.head, scan.epoch, scan.revision);
    Ok(log)
}

/// Notes what the frames to come need: an epoch of their own, if something acknowledged may be missing, and in a
/// relaxed mode that something may be missing next time.
fn start(log: &mut Log, needs_epoch: bool) -> Result<(), PersistError> {
    let mut frame = FrameBuf::new();
    let epoch = if needs_epoch { random_epoch()? } else { log.epoch };
    if needs_epoch {
        tracing::info!(old = %log.epoch, new = %epoch, "something acknowledged may be missing: a new epoch begins");
        frame.push_epoch(epoch);
    }
    if needs_epoch || log.options.durability != Durability::Sync {
        frame.finish();
        log.append_at_any_price(&mut frame)?;
        log.sync()?;
    }
    // Not before: the append may begin a segment, whose header has the epoch before this record.
    log.epoch = epoch;
    Ok(())
}

/// Makes the first segment of a new log, in a new epoch.
pub(crate) fn create(disk: &Disk, options: FsOptions, number: u64) -> Result<Log, PersistError> {
    let (epoch, salt) = (random_epoch()?, random_salt()?);
    let header = SegmentHeader { number, head: number, base: 0, revision: Revision::ZERO, epoch, salt };
    disk.create_segment(&header)?;
    let tail = Tail { header, end: SEGMENT_HEADER_LEN, size: SEGMENT_HEADER_LEN };
    let mut log = Log::new(disk.clone(), options, Default::default(), tail)?;
    regain_reserve(&mut log);
    start(&mut log, false)?;
    Ok(log)
}

/// Keeps aside what stands behind the tail, and cuts it off.
pub(crate) fn cut(disk: &Disk, tail: &Tail, why: &str) -> Result<(), PersistError> {
    let name = segment_name(tail.header.number);
    let kept = match disk.keep_aside(&name, tail.end) {
        Err(error) if error.kind() == PersistErrorKind::NoSpace => {
            disk.release_reserve()?;
            disk.keep_aside(&name, tail.end)?
        }
        kept => kept?,
    };
    tracing::warn!(file = name, offset = tail.end, bytes = tail.size - tail.end, kept, "{why}: cut");
    let file = disk.open(&name, Open::Write)?;
    file.set_len(tail.end).and_then(|()| file.sync_data()).map_err(|e| from_io("cut", &name, e))
}

fn regain_reserve(log: &mut Log) {
    if let Err(error) = log.regain_reserve() {
        tracing::warn!(%error, "no room for the reserve: puts are refused until there is");
    }
}

/// Goes on behind what a repair has left: notes the new epoch, and where the log begins now.
pub(crate) fn resume(disk: &Disk, options: FsOptions, scan: Scan, tail: Tail) -> Result<Log, PersistError> {
    let mut log = tidy(disk, options, scan, tail)?;
    renew(&mut log)?;
    Ok(log)
}

/// Begins a new epoch, and says that the log begins at its head, whatever stood before.
pub(crate) fn renew(log: &mut Log) -> Result<(), PersistError> {
    let epoch = random_epoch()?;
    let mut frame = FrameBuf::of(|frame| {
        frame.push_head(log.head);
        frame.push_epoch(epoch);
    });
    log.append_at_any_price(&mut frame)?;
    log.sync()?;
    log.epoch = epoch;
    Ok(())
}
