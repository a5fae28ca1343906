//! The few file calls that the log needs, so that a simulated disk can take the place of a real one.

use std::collections::BTreeSet;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::SystemTime;
use std::{fmt, fs};

use rustix::fs::OFlags;

/// A file system.
pub trait Vfs: fmt::Debug + Send + Sync + 'static {
    /// Makes sure that `dir` exists durably, and that only permitted users can write to it.
    fn create_dir(&self, dir: &Path) -> io::Result<()>;
    /// The names of what is in `dir`.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;
    /// Opens a file; never through a symbolic link.
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn VfsFile>>;
    /// Takes the name of a file away.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Returns when the names in `dir` are durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Open {
    /// To read what exists.
    Read,
    /// To read and write what exists.
    Write,
    /// To read and write what exists or is made now, empty.
    Create,
    /// To read and write what must not exist yet.
    CreateNew,
}

/// An open file.
pub trait VfsFile: fmt::Debug + Send + Sync {
    /// How many bytes it has.
    fn size(&self) -> io::Result<u64>;
    /// Reads some bytes, zero of them only at the end.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes some of the bytes and says how many.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize>;
    /// Cuts or extends it.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Returns when its bytes and its length are durable; its name may not be. Fails if it has no name any more.
    fn sync_data(&self) -> io::Result<()>;
    /// Takes the lock on it until it is dropped; false if another process has it.
    fn try_lock(&self) -> io::Result<bool>;
    /// Gives up the lock on it.
    fn unlock(&self) {}
    /// Whether it is this process that has the lock on it.
    fn is_locked_here(&self) -> bool {
        false
    }
    /// When it was made, in nanoseconds since 1970, where the file system knows that. A copy was made later.
    fn born_ns(&self) -> Option<u64> {
        None
    }
}

/// Writes all of `bytes`.
pub(crate) fn write_all(file: &dyn VfsFile, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write_at(bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                bytes = bytes.get(written..).unwrap_or_default();
                offset = offset.saturating_add(written as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Fills `buf`, or fails if the file ends before.
pub(crate) fn read_exact(file: &dyn VfsFile, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buf.is_empty() {
        match file.read_at(buf, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => {
                buf = buf.get_mut(read..).unwrap_or_default();
                offset = offset.saturating_add(read as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The file system of the operating system.
#[derive(Clone, Debug, Default)]
pub struct RealFs {
    /// The directory that was made or found first, kept open: a process that has no descriptor left can still make
    /// its names durable, and a rotation does not fail half-way for want of one.
    dir: Arc<OnceLock<(PathBuf, File)>>,
    group_access: bool,
}

impl RealFs {
    /// Accepts a directory that its group may write to as well, if `allowed`.
    #[must_use]
    pub fn with_group_access(self, allowed: bool) -> Self {
        RealFs { group_access: allowed, ..self }
    }

    fn check_mode(&self, dir: &Path, mode: u32) -> io::Result<()> {
        let (who, way_out) = match mode & 0o022 {
            0 => return Ok(()),
            0o020 if self.group_access => return Ok(()),
            0o020 => ("its group", ", or allow the group (--group-access)"),
            _ => ("every user", ""),
        };
        let inner = dir.join("nkv");
        let text = format!("{who} may write to it: use a directory in it, such as {}{way_out}", inner.display());
        Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
    }
}

/// Whether the group of a directory may write to it: then it may write to what is in it, too.
fn is_for_group(dir: &Path) -> bool {
    fs::metadata(dir).is_ok_and(|meta| meta.permissions().mode() & 0o020 != 0)
}

impl Vfs for RealFs {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        make_dir(dir)?;
        let meta = fs::metadata(dir)?;
        if !meta.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        self.check_mode(dir, meta.permissions().mode())?;
        let opened = (dir.to_owned(), File::open(dir)?);
        self.dir.get_or_init(|| opened);
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        // A name that is not UTF-8 is not one of ours.
        let names = fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().into_string().ok()));
        names.filter_map(Result::transpose).collect()
    }

    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn VfsFile>> {
        let makes = matches!(how, Open::Create | Open::CreateNew);
        let file = OpenOptions::new()
            .read(true)
            .write(how != Open::Read)
            .create(how == Open::Create)
            .create_new(how == Open::CreateNew)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(path)?;
        if makes && path.parent().is_some_and(is_for_group) {
            // Whatever the umask takes away. Of a file that another user of the group has made this fails, and need not be.
            drop(file.set_permissions(fs::Permissions::from_mode(0o660)));
        }
        Ok(Arc::new(file))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        match self.dir.get() {
            Some((kept, file)) if kept == dir => file.sync_all(),
            _ => sync_dir(dir),
        }
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Makes `dir` and what is missing above it, each with its name made durable; also that of a `dir` that exists, as the
/// process that made it may have died before.
fn make_dir(dir: &Path) -> io::Result<()> {
    let Some(parent) = dir.parent() else { return Ok(()) };
    let above = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    if dir.exists() {
        // A process that may not read the directory above has not made this one.
        return match sync_dir(above) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
            result => result,
        };
    }
    make_dir(parent)?;
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    sync_dir(above)
}

/// How many names a file has. A program that asks for its times as well makes the kernel keep them finer from then on,
/// and the next sync has to write them too: half as long again.
#[cfg(target_os = "linux")]
fn link_count(file: &File) -> io::Result<u64> {
    use rustix::fs::{AtFlags, StatxFlags, statx};
    match statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::NLINK) {
        Ok(stat) => Ok(u64::from(stat.stx_nlink)),
        // Some sandboxes know nothing of this call.
        Err(_) => Ok(file.metadata()?.nlink()),
    }
}

#[cfg(not(target_os = "linux"))]
fn link_count(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.nlink())
}

/// The locked files of this process, by device and number; locked while a lock is taken or given up.
static HELD: Mutex<BTreeSet<(u64, u64)>> = Mutex::new(BTreeSet::new());

fn identity(file: &File) -> io::Result<(u64, u64)> {
    let meta = file.metadata()?;
    Ok((meta.dev(), meta.ino()))
}

impl VfsFile for File {
    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buf, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        FileExt::write_at(self, bytes, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        File::set_len(self, len)
    }

    fn sync_data(&self) -> io::Result<()> {
        File::sync_data(self)?;
        // What is in a file that was removed will not be found.
        match link_count(self)? {
            0 => Err(io::Error::new(io::ErrorKind::NotFound, "the file was removed")),
            _ => Ok(()),
        }
    }

    fn try_lock(&self) -> io::Result<bool> {
        let identity = identity(self)?;
        let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        match File::try_lock(self) {
            Ok(()) => {
                held.insert(identity);
                Ok(true)
            }
            Err(fs::TryLockError::WouldBlock) => Ok(false),
            Err(fs::TryLockError::Error(error)) => Err(error),
        }
    }

    fn unlock(&self) {
        let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(identity) = identity(self) {
            held.remove(&identity);
        }
        drop(File::unlock(self));
    }

    fn is_locked_here(&self) -> bool {
        let held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        identity(self).is_ok_and(|identity| held.contains(&identity))
    }

    fn born_ns(&self) -> Option<u64> {
        let born = self.metadata().ok()?.created().ok()?.duration_since(SystemTime::UNIX_EPOCH).ok()?;
        u64::try_from(born.as_nanos()).ok()
    }
}
