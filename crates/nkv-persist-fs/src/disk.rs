//! The files of a data directory: their names, the lock, the reserve, and what is kept aside.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nkv_core::{PersistError, PersistErrorKind};

use crate::error::from_io;
use crate::format::{NUMBER_MAX, SegmentHeader};
use crate::mutex::lock;
use crate::vfs::{self, Open, Vfs, VfsFile};

const LOCK: &str = "LOCK";
const RESERVE: &str = "reserve";
/// What the lock file holds once there is a segment: from then on, a directory without one has lost it.
const LOCK_TEXT: &[u8] = b"nkv data directory, format ";
/// The time that storage dropped in this process may take to let go of its directory.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_PAUSE: Duration = Duration::from_millis(5);
/// No lock file is longer.
const LOCK_LEN_MAX: u64 = 64;
/// How many torn tails are kept aside; the oldest go first.
const BROKEN_FILES_MAX: usize = 16;
const COPY_CHUNK: usize = 64 << 10;

/// A data directory on some file system.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    vfs: Arc<dyn Vfs>,
    dir: PathBuf,
    /// Whether a sync of the directory has failed. Locked while one is done, for the reason that `LogFile` has.
    in_doubt: Arc<Mutex<bool>>,
}

/// Keeps other processes out for as long as it lives.
#[derive(Debug)]
pub(crate) struct Lock {
    file: Arc<dyn VfsFile>,
}

impl Disk {
    pub(crate) fn new(vfs: Arc<dyn Vfs>, dir: PathBuf) -> Self {
        Disk { vfs, dir, in_doubt: Arc::default() }
    }

    pub(crate) fn create_dir(&self) -> Result<(), PersistError> {
        self.vfs.create_dir(&self.dir).map_err(|e| from_io("use data directory", &self.dir.to_string_lossy(), e))
    }

    pub(crate) fn list(&self) -> Result<Vec<String>, PersistError> {
        self.vfs.list(&self.dir).map_err(|e| from_io("list", &self.dir.to_string_lossy(), e))
    }

    /// The numbers of the segments that are there, in order.
    pub(crate) fn segments(&self) -> Result<Vec<u64>, PersistError> {
        let mut numbers: Vec<u64> = self.list()?.iter().filter_map(|name| parse_segment_name(name)).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    pub(crate) fn open(&self, name: &str, how: Open) -> Result<Arc<dyn VfsFile>, PersistError> {
        self.vfs.open(&self.dir.join(name), how).map_err(|e| from_io("open", &self.path(name), e))
    }

    /// The path of a file, for messages.
    pub(crate) fn path(&self, name: &str) -> String {
        self.dir.join(name).to_string_lossy().into_owned()
    }

    /// Returns when the names are durable. After it has failed once it always fails: a later sync that succeeds says
    /// nothing about the names before it.
    pub(crate) fn sync_dir(&self) -> Result<(), PersistError> {
        let mut in_doubt = lock(&self.in_doubt);
        let result = match *in_doubt {
            true => Err(io::Error::other("an earlier sync of the directory has failed")),
            false => self.vfs.sync_dir(&self.dir),
        };
        *in_doubt = result.is_err();
        result.map_err(|e| from_io("sync", &self.dir.to_string_lossy(), e))
    }

    /// Whether it is not known which names are durable.
    pub(crate) fn is_in_doubt(&self) -> bool {
        *lock(&self.in_doubt)
    }

    /// Removes a file, durably; one that is not there is no error.
    pub(crate) fn remove(&self, name: &str) -> Result<(), PersistError> {
        match self.vfs.remove(&self.dir.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(from_io("remove", &self.path(name), error)),
            _ => self.sync_dir(),
        }
    }

    /// Writes what a file holds between two offsets once more, and returns when all of it is durable.
    pub(crate) fn write_again(&self, name: &str, start: u64, end: u64) -> Result<(), PersistError> {
        let file = self.open(name, Open::Write)?;
        // Where each write takes new space, a full disk has none.
        let again = || copy(&*file, &*file, start, end, start).map_err(|e| from_io("write again", name, e));
        self.at_any_price(again)?;
        file.sync_data().map_err(|e| from_io("sync", name, e))
    }

    pub(crate) fn lock(&self, how: Open) -> Result<Lock, PersistError> {
        let file = self.open(LOCK, how)?;
        let try_lock = || file.try_lock().map_err(|e| from_io("lock", &self.dir.to_string_lossy(), e));
        let began = Instant::now();
        while !try_lock()? {
            if !file.is_locked_here() {
                if try_lock()? {
                    break; // it was given up in between
                }
                let context = format!("another process uses the data directory {}", self.dir.display());
                return Err(PersistError::new(PersistErrorKind::InUse, context));
            }
            if began.elapsed() >= LOCK_PATIENCE {
                let why = "uses it already: close that before, or wait until a server that was dropped has stopped";
                let context = format!("cannot use the data directory {}: this process {why}", self.dir.display());
                return Err(PersistError::new(PersistErrorKind::InUse, context));
            }
            std::thread::sleep(LOCK_PAUSE);
        }
        Ok(Lock { file })
    }

    /// Makes the new and empty `file` a segment that survives a power cut, with no frame in it.
    pub(crate) fn begin_segment(&self, file: &dyn VfsFile, header: &SegmentHeader) -> Result<(), PersistError> {
        let name = self.path(&segment_name(header.number));
        vfs::write_all(file, &header.encode(), 0).map_err(|e| from_io("write", &name, e))?;
        file.sync_data().map_err(|e| from_io("sync", &name, e))?;
        self.sync_dir()
    }

    /// Copies what stands between `offset` and `end` into a file beside it, durably. The copy also shows the next opening,
    /// should this one not live to say so, that something was cut there.
    pub(crate) fn keep_aside(&self, name: &str, offset: u64, end: u64) -> Result<String, PersistError> {
        let from = self.open(name, Open::Read)?;
        let end = from.size().map_err(|e| from_io("read", name, e))?.min(end);
        let len = end.saturating_sub(offset);
        let first = broken_name(name, offset);
        let mut broken = first.clone();
        for number in 1_u32.. {
            let to = self.open(&broken, Open::Create)?;
            let size = to.size().map_err(|e| from_io("read", &broken, e))?;
            let is_ours = are_same(&*from, offset, &*to, size.min(len)).map_err(|e| from_io("read", &broken, e))?;
            if is_ours {
                // One that is as long may not be on the disk, although the system shows it. A longer copy is of an earlier
                // cut at the same place, which was not made before the copy was durable.
                if size <= len {
                    let copied = to.set_len(0).and_then(|()| copy(&*from, &*to, offset, end, 0));
                    copied.map_err(|e| from_io("copy a torn tail to", &broken, e))?;
                }
                to.sync_data().map_err(|e| from_io("sync", &broken, e))?;
                break;
            }
            // Something else was kept under that name: numbers of segments are given again after a repair.
            broken = format!("{first}-{number}");
        }
        self.sync_dir()?;
        Ok(broken)
    }

    /// Like [`keep_aside`](Self::keep_aside), where there is no room: only shows the next opening that there was a cut.
    pub(crate) fn keep_nothing(&self, name: &str, offset: u64) -> Result<String, PersistError> {
        let broken = broken_name(name, offset);
        let file = self.open(&broken, Open::Create)?;
        file.set_len(0).and_then(|()| file.sync_data()).map_err(|e| from_io("empty", &broken, e))?;
        self.sync_dir()?;
        Ok(broken)
    }

    /// Removes the oldest torn tails. Whole segments, which a repair put aside, stay.
    pub(crate) fn forget_old_broken(&self) -> Result<(), PersistError> {
        let mut names: Vec<String> = self.list()?.into_iter().filter(|name| is_torn_tail(name)).collect();
        names.sort_unstable();
        let surplus = names.len().saturating_sub(BROKEN_FILES_MAX);
        names.iter().take(surplus).try_for_each(|name| self.remove(name))
    }

    /// Fills the reserve, or leaves it empty if there is no room for it. Says how much there is, up to `bytes`.
    pub(crate) fn fill_reserve(&self, bytes: u64) -> Result<u64, PersistError> {
        let file = self.open(RESERVE, Open::Create)?;
        let Err(error) = fill(&*file, bytes) else {
            self.sync_dir()?;
            return Ok(bytes);
        };
        // What could be written may still be too much to be synced.
        let room = file.size().map_or(0, |size| size.min(bytes.saturating_sub(1)));
        file.set_len(0).map_err(|e| from_io("empty", RESERVE, e))?;
        let error = from_io("fill", RESERVE, error);
        if error.kind() == PersistErrorKind::NoSpace { Ok(room) } else { Err(error) }
    }

    /// Makes the reserve longer, or leaves it as it is if there is no room for that.
    pub(crate) fn grow_reserve(&self, from: u64, to: u64) -> Result<(), PersistError> {
        let file = self.open(RESERVE, Open::Create)?;
        let grown = fill(&*file, to).map_err(|e| from_io("fill", RESERVE, e));
        grown.inspect_err(|_| drop(file.set_len(from)))
    }

    /// Does it again, in the room of the reserve, if there is no other.
    pub(crate) fn at_any_price<T>(&self, does: impl Fn() -> Result<T, PersistError>) -> Result<T, PersistError> {
        match does() {
            Err(error) if error.kind() == PersistErrorKind::NoSpace => {
                self.release_reserve()?;
                does()
            }
            result => result,
        }
    }

    /// Gives the space of the reserve back to the file system.
    pub(crate) fn release_reserve(&self) -> Result<(), PersistError> {
        let file = self.open(RESERVE, Open::Create)?;
        file.set_len(0).and_then(|()| file.sync_data()).map_err(|e| from_io("empty", RESERVE, e))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        self.file.unlock();
    }
}

impl Lock {
    /// Whether the directory was copied since it was used: the lock file says when it was made, and was made at another time.
    pub(crate) fn is_copied(&self) -> Result<bool, PersistError> {
        let size = self.file.size().map_err(|e| from_io("read", LOCK, e))?;
        let mut text = vec![0; usize::try_from(size.min(LOCK_LEN_MAX)).unwrap_or(0)];
        vfs::read_exact(&*self.file, &mut text, 0).map_err(|e| from_io("read", LOCK, e))?;
        let said = text.strip_prefix(LOCK_TEXT).and_then(parse_born);
        Ok(said.zip(self.file.born_ns()).is_some_and(|(said, born)| said != born))
    }

    /// Whether the directory has ever had a segment.
    pub(crate) fn promises_segments(&self) -> Result<bool, PersistError> {
        Ok(self.file.size().map_err(|e| from_io("read", LOCK, e))? > 0)
    }

    /// Notes durably that the directory has a segment now, of which version, and when its lock file was made.
    pub(crate) fn promise_segments(&self, version: u32) -> Result<(), PersistError> {
        let born = self.file.born_ns().map_or_else(String::new, |born| format!("made {born:016x}\n"));
        let rest = format!("{version}\n{born}");
        // Also if it was there: it may not be on the disk, although the system shows it.
        vfs::write_all(&*self.file, &[LOCK_TEXT, rest.as_bytes()].concat(), 0)
            .map_err(|e| from_io("write", LOCK, e))?;
        self.file.sync_data().map_err(|e| from_io("sync", LOCK, e))
    }
}

/// Copies the bytes between `offset` and `end` to where `to_offset` says.
fn copy(from: &dyn VfsFile, to: &dyn VfsFile, mut offset: u64, end: u64, mut to_offset: u64) -> io::Result<()> {
    let mut buf = vec![0; COPY_CHUNK];
    while offset < end {
        buf.truncate(usize::try_from(end.saturating_sub(offset)).unwrap_or(COPY_CHUNK));
        vfs::read_exact(from, &mut buf, offset)?;
        vfs::write_all(to, &buf, to_offset)?;
        offset = offset.saturating_add(buf.len() as u64);
        to_offset = to_offset.saturating_add(buf.len() as u64);
    }
    Ok(())
}

/// Whether the first `len` bytes of `other` are those of `one` from `offset` on.
fn are_same(one: &dyn VfsFile, offset: u64, other: &dyn VfsFile, len: u64) -> io::Result<bool> {
    let (mut left, mut right) = (vec![0; COPY_CHUNK], vec![0; COPY_CHUNK]);
    let mut at = 0_u64;
    while at < len {
        let step = usize::try_from(len.saturating_sub(at)).unwrap_or(COPY_CHUNK).min(COPY_CHUNK);
        left.truncate(step);
        right.truncate(step);
        vfs::read_exact(one, &mut left, offset.saturating_add(at))?;
        vfs::read_exact(other, &mut right, at)?;
        if left != right {
            return Ok(false);
        }
        at = at.saturating_add(step as u64);
    }
    Ok(true)
}

fn fill(file: &dyn VfsFile, bytes: u64) -> io::Result<()> {
    let size = file.size()?;
    if size > bytes {
        file.set_len(bytes)?;
    }
    write_zeros(file, size.min(bytes), bytes)?;
    file.sync_data()
}

pub(crate) fn write_zeros(file: &dyn VfsFile, mut offset: u64, end: u64) -> io::Result<()> {
    let mut zeros = vec![0; COPY_CHUNK];
    while offset < end {
        zeros.truncate(usize::try_from(end.saturating_sub(offset)).unwrap_or(COPY_CHUNK));
        vfs::write_all(file, &zeros, offset)?;
        offset = offset.saturating_add(zeros.len() as u64);
    }
    Ok(())
}

/// When a lock file was made, as it says behind its version.
fn parse_born(text: &[u8]) -> Option<u64> {
    let (_, text) = str::from_utf8(text).ok()?.split_once('\n')?;
    let digits = text.strip_prefix("made ")?.strip_suffix('\n')?;
    u64::from_str_radix(digits, 16).ok()
}

pub(crate) fn segment_name(number: u64) -> String {
    format!("{number:016x}.log")
}

pub(crate) fn broken_name(name: &str, offset: u64) -> String {
    format!("{name}.broken-{offset:016x}")
}

fn is_torn_tail(name: &str) -> bool {
    name.contains(".log.broken-") && !name.contains(".broken-0000000000000000")
}

fn parse_segment_name(name: &str) -> Option<u64> {
    let number = u64::from_str_radix(name.strip_suffix(".log")?, 16).ok()?;
    ((1..=NUMBER_MAX).contains(&number) && segment_name(number) == name).then_some(number)
}
