//! Brings a data directory into a state that can be appended to, after a clean stop or a crash.
//!
//! Each step leaves a directory from which recovery can start again, since the power may fail here too.

use nkv_core::{PersistError, PersistErrorKind, Revision};

use crate::disk::{Disk, Lock, segment_name};
use crate::error::from_io;
use crate::format::{SEAL_FRAME_LEN, SEGMENT_HEADER_LEN, SegmentHeader, VERSION};
use crate::log::{Log, Restored, random_epoch, random_salt};
use crate::options::{Durability, FsOptions};
use crate::reader::{Next, Opened, SegmentReader};
use crate::scan::{Scan, Tail};
use crate::vfs::Open;

/// Recovers and gives the log.
pub(crate) fn open_log(disk: &Disk, lock: &Lock, options: FsOptions) -> Result<Log, PersistError> {
    let scan = Scan::run(disk, lock.promises_segments()?)?;
    open_scanned(disk, lock, options, scan)
}

/// As [`open_log`], of what was read under this lock.
pub(crate) fn open_scanned(disk: &Disk, lock: &Lock, options: FsOptions, scan: Scan) -> Result<Log, PersistError> {
    if let Some(damage) = &scan.damage {
        return Err(damage.to_error());
    }
    let mut log = match scan.tail {
        Some(tail) => {
            let is_copied = lock.is_copied()?;
            if is_copied {
                tracing::info!("the data directory is a copy");
            }
            reopen(disk, options, scan, tail, is_copied)?
        }
        None => {
            scan.stray.map_or(Ok(()), |number| disk.remove(&segment_name(number)))?;
            create(disk, options)?
        }
    };
    let version = log.version();
    match lock.promise_segments(version) {
        Err(error) if error.kind() == PersistErrorKind::NoSpace && log.give_up_reserve()? => {
            lock.promise_segments(version)?;
        }
        result => result?,
    }
    Ok(log)
}

/// In a copy a new epoch begins: the original may have gone further, or go on.
fn reopen(disk: &Disk, options: FsOptions, scan: Scan, tail: Tail, is_copied: bool) -> Result<Log, PersistError> {
    let needs_epoch = tail.is_torn() || scan.cut_before || scan.relaxed;
    let mut log = tidy(disk, options, scan, tail)?;
    log.fit_reserve()?;
    start(&mut log, needs_epoch || is_copied)?;
    Ok(log)
}

/// Removes what is not needed, cuts a torn tail off, and gives the log that ends there.
fn tidy(disk: &Disk, options: FsOptions, scan: Scan, tail: Tail) -> Result<Log, PersistError> {
    settle(disk, &scan, &tail)?;
    for number in scan.leftovers().chain(scan.stray) {
        disk.remove(&segment_name(number))?;
    }
    if tail.is_torn() {
        let kept = match keep(disk, &tail) {
            // Nothing in it was acknowledged, or the new epoch says so. Waiting for room would refuse what was.
            Err(error) if error.kind() == PersistErrorKind::NoSpace => {
                disk.keep_nothing(&segment_name(tail.header.number), tail.end)?
            }
            kept => kept?,
        };
        cut(disk, &tail, &kept, "a crash left a torn tail")?;
        disk.forget_old_broken()?;
    } else if tail.end < tail.written_to {
        cut(disk, &tail, "", "a crash interrupted the beginning of an epoch")?;
    }
    let Scan { index, head, epoch, revision, .. } = scan;
    Log::restore(disk.clone(), options, Restored { index, head, epoch, revision, tail })
}

/// Makes durable what was read. A process that died leaves it to the operating system: all of the last segment, the
/// seal of the one before, and names. Nothing may be built on it before, nor anything removed.
///
/// If its last sync failed, the system takes for written what it still shows and the disk does not hold. So what
/// nothing proves durable is written again.
fn settle(disk: &Disk, scan: &Scan, tail: &Tail) -> Result<(), PersistError> {
    let before = tail.header.number.saturating_sub(1);
    if let Some(end) = scan.sealed_before {
        write_again(disk, before, end.saturating_sub(SEAL_FRAME_LEN), end)?;
    }
    // Nothing that stands first in the log proves that its first header is durable.
    let proven = scan.synced_to.checked_sub(tail.header.base).filter(|bytes| *bytes > 0);
    let start = proven.map_or(0, |bytes| bytes.saturating_add(SEGMENT_HEADER_LEN));
    write_again(disk, tail.header.number, start, tail.end)?;
    disk.sync_dir()
}

/// Writes frames again, and reads them again: the system may have forgotten, since they were read first, what it could
/// not write.
fn write_again(disk: &Disk, number: u64, start: u64, end: u64) -> Result<(), PersistError> {
    let name = segment_name(number);
    disk.write_again(&name, start, end)?;
    if let Opened::Good(mut reader) = SegmentReader::open(disk, number)? {
        // From the start of the segment if some frame, not one of ours, names a place where none begins.
        for from in [start, 0] {
            reader.skip_to(from);
            while reader.offset() < end && matches!(reader.next()?, Next::Frame(..)) {}
            if reader.offset() == end {
                return Ok(());
            }
        }
    }
    let context = format!("what was read of {} is not there any more", disk.path(&name));
    Err(PersistError::new(PersistErrorKind::Io, context))
}

/// Notes what the frames to come need: an epoch of their own, if something acknowledged may be missing, and in a
/// relaxed mode that something may be missing next time.
fn start(log: &mut Log, needs_epoch: bool) -> Result<(), PersistError> {
    let epoch = if needs_epoch { Some(random_epoch()?) } else { None };
    if let Some(epoch) = epoch {
        tracing::info!(old = %log.epoch(), new = %epoch, "something acknowledged may be missing: a new epoch begins");
    }
    if epoch.is_some() || log.options().durability != Durability::Sync {
        log.begin(epoch)?;
        log.sync()?;
    }
    Ok(())
}

/// Makes the first segment of a new log, in a new epoch.
fn create(disk: &Disk, options: FsOptions) -> Result<Log, PersistError> {
    let (epoch, salt) = (random_epoch()?, random_salt()?);
    create_with(
        disk,
        options,
        SegmentHeader { version: VERSION, number: 1, head: 1, base: 0, revision: Revision::ZERO, epoch, salt },
    )
}

/// Makes a segment with this header, with which a log begins.
pub(crate) fn create_with(disk: &Disk, options: FsOptions, header: SegmentHeader) -> Result<Log, PersistError> {
    let file = disk.open(&segment_name(header.number), Open::CreateNew)?;
    disk.begin_segment(&*file, &header)?;
    let mut log = Log::restore(disk.clone(), options, Restored::empty(header))?;
    log.fit_reserve()?;
    start(&mut log, false)?;
    Ok(log)
}

/// Keeps aside what stands behind the tail, in the room of the reserve if there is no other; gives the name.
fn keep(disk: &Disk, tail: &Tail) -> Result<String, PersistError> {
    disk.at_any_price(|| disk.keep_aside(&segment_name(tail.header.number), tail.end, tail.written_to))
}

/// Cuts off what stands behind the tail.
fn cut(disk: &Disk, tail: &Tail, kept: &str, why: &str) -> Result<(), PersistError> {
    let name = segment_name(tail.header.number);
    tracing::warn!(
        file = name,
        offset = tail.end,
        bytes = tail.written_to.saturating_sub(tail.end),
        kept,
        "{why}: cut"
    );
    let file = disk.open(&name, Open::Write)?;
    file.set_len(tail.end).and_then(|()| file.sync_data()).map_err(|e| from_io("cut", &name, e))
}

/// Begins a new epoch.
pub(crate) fn renew(log: &mut Log) -> Result<(), PersistError> {
    start(log, true)
}
