//! Looks at a data directory that no process uses, and repairs one that refuses to open.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use nkv_core::{Epoch, PersistError, Revision};

use crate::disk::Disk;
use crate::open::{open_scanned, renew};
use crate::options::FsOptions;
use crate::reader::SegmentReader;
use crate::salvage::{Lost, Salvage};
use crate::scan::{Damage, Scan};
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
    /// How many deletes are kept, as they had [meta](nkv_core::Meta).
    pub tombstones: usize,
    /// How many bytes their records have.
    pub live_bytes: u64,
    /// The highest revision that was read.
    pub revision: Revision,
    /// The epoch.
    pub epoch: Epoch,
    /// How many bytes a crash left torn at the end; the next opening keeps them aside and cuts them off.
    pub torn_bytes: u64,
    /// Whether the directory was copied since it was used: the next opening begins a new epoch.
    pub is_copied: bool,
    /// Where the data is damaged first, if it is; then all that is said above is about what stands before.
    pub damage: Option<Damage>,
    /// If the data is damaged, how many keys a repair keeps, or has kept.
    pub kept_keys: usize,
    /// How many keys a repair drops that can be read: they stand behind what another program has written, or where this log
    /// has nothing. The keys of what cannot be read are not known.
    pub dropped_keys: usize,
    /// What cannot be read or used, and which revisions it had.
    pub lost: Vec<Lost>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} segments, {} batches, {} records", self.segments, self.batches, self.records)?;
        writeln!(
            f,
            "{} keys, {} live bytes, revision {}, epoch {}",
            self.keys, self.live_bytes, self.revision, self.epoch
        )?;
        if self.tombstones > 0 {
            writeln!(f, "{} tombstones", self.tombstones)?;
        }
        if self.torn_bytes > 0 {
            writeln!(f, "torn by a crash: {} bytes at the end", self.torn_bytes)?;
        }
        if self.is_copied {
            writeln!(f, "a copy: the next start begins a new epoch")?;
        }
        match &self.damage {
            None => writeln!(f, "no damage")?,
            Some(damage) => writeln!(f, "damaged: {damage}")?,
        }
        if self.damage.is_none() {
            return Ok(());
        }
        self.lost.iter().try_for_each(|lost| writeln!(f, "lost: {lost}"))?;
        writeln!(f, "a repair keeps {} keys, and drops {} that can be read", self.kept_keys, self.dropped_keys)?;
        let lost = "what is lost is undone: a key may be gone, have an older value, or be back though it was deleted";
        if self.lost.is_empty() { Ok(()) } else { writeln!(f, "{lost}") }
    }
}

/// Reads all of a data directory and says what is in it. Changes nothing.
///
/// # Errors
///
/// [`InUse`](nkv_core::PersistErrorKind::InUse) while a process has it, [`Io`](nkv_core::PersistErrorKind::Io) when it
/// cannot be read, [`OtherVersion`](nkv_core::PersistErrorKind::OtherVersion) when another version of the program wrote
/// it. Damage is no error here.
///
/// # Examples
///
/// ```
/// # use nkv_persist_fs::{FsOptions, FsPersist};
/// # let temp = tempfile::tempdir()?;
/// # let dir = temp.path().join("data");
/// # drop(FsPersist::open(&dir, FsOptions::default())?);
/// let report = nkv_persist_fs::check(&dir)?;
/// assert!(report.damage.is_none());
/// println!("{report}");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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
    let scan = Scan::run(&disk, promised)?;
    let mut report = Report { is_copied: lock.is_copied()?, ..report(&scan) };
    if scan.damage.is_some() {
        report = with_salvage(report, &Salvage::collect(&disk, &scan)?);
    }
    Ok(report)
}

/// Makes a damaged data directory usable, with what can be read of it: of each key the value that is the newest, unless a
/// delete that can be read is newer. A new epoch begins. Each segment of which something is lost is kept aside in a file
/// named `*.broken-*`. Needs room for all that is kept. Without damage this is an ordinary opening.
///
/// # Errors
///
/// Those of [`FsPersist::open`](crate::FsPersist::open), but for damage.
///
/// # Examples
///
/// ```
/// # use nkv_persist_fs::{FsOptions, FsPersist};
/// # let temp = tempfile::tempdir()?;
/// # let dir = temp.path().join("data");
/// # drop(FsPersist::open(&dir, FsOptions::default())?);
/// if nkv_persist_fs::check(&dir)?.damage.is_some() {
///     let report = nkv_persist_fs::repair(&dir)?;
///     println!("{} keys were kept, {} dropped", report.kept_keys, report.dropped_keys);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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
    let mut report = report(&scan);
    if scan.damage.is_none() {
        report.epoch = open_scanned(&disk, &lock, options, scan)?.epoch();
        return Ok(report);
    }
    let salvage = Salvage::collect(&disk, &scan)?;
    report = with_salvage(report, &salvage);
    let log = salvage.rewrite(&disk, &options)?;
    report.epoch = log.epoch();
    lock.promise_segments(log.version())?;
    Ok(report)
}

/// Begins a new epoch in a data directory that is not damaged: for one that was put back to an earlier state, so that
/// clients which have seen a later one notice. A copy is noticed without that, where the file system knows when a file was
/// made; a snapshot that was rolled back, or files that were written over, are not.
///
/// # Errors
///
/// Those of [`FsPersist::open`](crate::FsPersist::open).
///
/// # Examples
///
/// ```
/// # use nkv_persist_fs::{FsOptions, FsPersist};
/// # let temp = tempfile::tempdir()?;
/// # let dir = temp.path().join("data");
/// # drop(FsPersist::open(&dir, FsOptions::default())?);
/// let before = nkv_persist_fs::check(&dir)?;
/// let after = nkv_persist_fs::restore(&dir)?; // once the files of a backup are in place
/// assert_ne!(after.epoch, before.epoch);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn restore(dir: impl Into<PathBuf>) -> Result<Report, PersistError> {
    restore_with(Arc::new(RealFs::default()), dir)
}

/// Like [`restore`], on another file system.
///
/// # Errors
///
/// Those of [`restore`].
pub fn restore_with(vfs: Arc<dyn Vfs>, dir: impl Into<PathBuf>) -> Result<Report, PersistError> {
    let disk = Disk::new(vfs, dir.into());
    let lock = disk.lock(Open::Write)?;
    let scan = Scan::run(&disk, lock.promises_segments()?)?;
    let found = report(&scan);
    let mut log = open_scanned(&disk, &lock, FsOptions::default().with_reserve_bytes(0), scan)?;
    renew(&mut log)?;
    log.close()?;
    Ok(Report { epoch: log.epoch(), torn_bytes: 0, ..found })
}

/// The report with what a repair keeps, and what is lost.
fn with_salvage(report: Report, salvage: &Salvage) -> Report {
    Report {
        kept_keys: salvage.kept_count(),
        dropped_keys: salvage.dropped_count(),
        lost: salvage.lost().to_vec(),
        ..report
    }
}

fn report(scan: &Scan) -> Report {
    Report {
        segments: scan.numbers.len(),
        batches: scan.frames,
        records: scan.records,
        keys: scan.index.key_count(),
        tombstones: scan.index.tombstone_count(),
        live_bytes: scan.index.live_bytes(),
        revision: scan.revision,
        epoch: scan.epoch,
        torn_bytes: scan.torn_bytes(),
        damage: scan.damage.clone(),
        ..Report::default()
    }
}
