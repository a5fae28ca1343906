//! The one clock: the time of the store, which goes on over restarts and follows no clock that is set.
//!
//! While a server runs it counts as the machine does since it was booted, also while that is suspended. A file says how far it
//! had come, with the wall clock beside it. The next run goes on from there, and counts what passed in between, if both
//! readings of the wall clock can be believed.

use std::fmt;
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use nkv_core::Timestamp;

/// Milliseconds.
type Millis = u64;

/// A wall clock that shows less was never set: 2026-01-01.
const BELIEVED_FROM: Millis = 1_767_225_600_000;

/// How far the clock may get without that being kept.
const KEEP_EVERY: Millis = 5_000;

/// A wall clock that moves so far against the time since boot was set. One that is adjusted, or a thread that waits between two
/// readings, moves it less.
const SET_MIN: Millis = 1_000;

/// The file is no longer than this.
const FILE_LEN_MAX: u64 = 256;

/// A clock of the program's own, for tests: see [`Builder::time`](crate::Builder::time).
pub trait Time: fmt::Debug + Send + Sync + 'static {
    /// How long ago some moment was that it chose once; it does not go back.
    fn elapsed(&self) -> Duration;
}

/// The time since the machine was booted, in whole milliseconds. On Linux it goes on while the machine is suspended.
#[derive(Clone, Copy, Debug)]
pub struct SinceBoot;

impl Time for SinceBoot {
    fn elapsed(&self) -> Duration {
        Duration::from_millis(since_boot())
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Clock {
    time: Arc<dyn Time>,
    started: Instant,
    /// Of the time, at the start.
    start: Millis,
    /// How far the store had come at the start.
    origin: Millis,
    keeper: Option<Arc<Keeper>>,
}

/// The file, and what was written to it last.
#[derive(Debug)]
struct Keeper {
    path: PathBuf,
    last: Mutex<Last>,
    /// Locked while the file is written: there is one name for the next one.
    writing: Mutex<()>,
}

/// What was written last.
#[derive(Clone, Copy, Debug, Default)]
struct Last {
    /// Whether or not that succeeded.
    tried: Option<Reading>,
    is_kept: bool,
    /// It could not be written, and that was said.
    has_failed: bool,
}

/// How far the store has come, and what the wall clock shows then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Reading {
    store: Millis,
    wall: Millis,
}

impl Clock {
    /// A clock that goes on from what `file` says; without one, or if it says nothing, from the wall clock.
    pub(crate) fn start(file: Option<PathBuf>, time: Arc<dyn Time>) -> Self {
        let kept = file.as_deref().and_then(|path| match read(path) {
            Ok(kept) => kept,
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(%error, "{} cannot be read: TTLs go on as the wall clock has it", path.display());
                None
            }
        });
        let keeper = file.map(|path| Arc::new(Keeper { path, last: Mutex::default(), writing: Mutex::default() }));
        let start = millis(time.elapsed());
        Clock { time, started: Instant::now(), start, origin: origin(kept, wall()), keeper }
    }

    pub(crate) fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.now_ms())
    }

    fn now_ms(&self) -> Millis {
        self.origin.saturating_add(millis(self.time.elapsed()).saturating_sub(self.start))
    }

    pub(crate) fn uptime_ms(&self) -> u64 {
        millis(self.started.elapsed())
    }

    /// How long it is until `at`.
    pub(crate) fn until(&self, at: Timestamp) -> Duration {
        Duration::from_millis(at.as_millis().saturating_sub(self.now_ms()))
    }

    /// Whether a file is to say how far the clock has come, and does not since the start.
    pub(crate) fn is_unkept(&self) -> bool {
        self.keeper.as_ref().is_some_and(|keeper| !keeper.last().is_kept)
    }

    /// Whether what the file says is old, or the wall clock was set since.
    pub(crate) fn is_due(&self) -> bool {
        self.keeper.as_ref().is_some_and(|keeper| keeper.last().tried.is_none_or(|last| last.is_old(self.read())))
    }

    /// Writes down how far the clock has come, while there are values with a TTL. Blocks; a failure is logged once.
    pub(crate) fn keep(&self) {
        let Some(keeper) = &self.keeper else { return };
        let _alone = keeper.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.read();
        let written = write(&keeper.path, now);
        let mut last = keeper.last();
        last.tried = Some(now);
        last.is_kept |= written.is_ok();
        if let Err(error) = &written
            && !last.has_failed
        {
            tracing::warn!(%error, "cannot write {}: TTLs may last longer after a restart", keeper.path.display());
        }
        last.has_failed = written.is_err();
    }

    fn read(&self) -> Reading {
        Reading { store: self.now_ms(), wall: wall() }
    }
}

impl Keeper {
    fn last(&self) -> MutexGuard<'_, Last> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reading {
    /// Whether `now` is to be kept in the place of this.
    fn is_old(self, now: Reading) -> bool {
        let passed = now.store.saturating_sub(self.store);
        passed >= KEEP_EVERY || self.wall.saturating_add(passed).abs_diff(now.wall) >= SET_MIN
    }
}

/// How far the store has come when a run begins. Time while nothing ran counts as the wall clock has it, unless one of the
/// readings is from a clock that was never set, or the clock was set back.
fn origin(kept: Option<Reading>, wall: Millis) -> Millis {
    let Some(kept) = kept else { return wall };
    let is_believed = kept.wall.min(wall) >= BELIEVED_FROM;
    kept.store.saturating_add(if is_believed { wall.saturating_sub(kept.wall) } else { 0 })
}

fn read(path: &Path) -> io::Result<Option<Reading>> {
    let mut text = String::new();
    File::open(path)?.take(FILE_LEN_MAX).read_to_string(&mut text)?;
    let reading = parse(&text);
    if reading.is_none() {
        tracing::warn!("{} is not understood: TTLs go on as the wall clock has it", path.display());
    }
    Ok(reading)
}

fn parse(text: &str) -> Option<Reading> {
    let (store, wall) = text.strip_suffix('\n')?.split_once('\n')?;
    let number = |line: &str, name| line.strip_prefix(name)?.parse().ok();
    Some(Reading { store: number(store, "store_ms ")?, wall: number(wall, "wall_ms ")? })
}

fn write(path: &Path, Reading { store, wall }: Reading) -> io::Result<()> {
    replace_file(path, format!("store_ms {store}\nwall_ms {wall}\n").as_bytes())
}

/// Puts a new file in the place of the old one, durably: there is always one of the two. It is the user's alone; in a directory that
/// the group may write to it is the group's too. Blocks. What is written first has the name of the file with the extension `new`:
/// one caller at a time.
///
/// # Errors
///
/// Those of the file system. The old file is there still, or the new one is and may not outlast a power cut.
pub fn replace_file(path: &Path, content: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if std::fs::metadata(dir)?.permissions().mode() & 0o020 != 0 {
        // Another user of the group may be the next to run a server here.
        file.set_permissions(Permissions::from_mode(0o660))?;
    }
    file.write_all(content)?;
    file.sync_data()?;
    std::fs::rename(&new, path)?;
    File::open(dir)?.sync_all()
}

fn wall() -> Millis {
    millis(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
}

/// How long ago the machine was booted, suspended or not.
#[cfg(target_os = "linux")]
fn since_boot() -> Millis {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let (seconds, nanos) = (u64::try_from(time.tv_sec).unwrap_or(0), u64::try_from(time.tv_nsec).unwrap_or(0));
    seconds.saturating_mul(1_000).saturating_add(nanos / 1_000_000)
}

/// How long ago this was asked first: elsewhere there may be no clock that counts while the machine is suspended.
#[cfg(not(target_os = "linux"))]
fn since_boot() -> Millis {
    static FIRST: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    millis(FIRST.get_or_init(Instant::now).elapsed())
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Millis = 3_600_000;
    const TODAY: Millis = BELIEVED_FROM + 1_000 * HOUR;

    #[test]
    fn time_while_nothing_ran_counts_if_both_readings_of_the_wall_clock_can_be_believed() {
        let kept = |store, wall| Some(Reading { store, wall });
        for (kept, wall, expected) in [
            (None, TODAY, TODAY),
            (kept(TODAY, TODAY), TODAY + 2 * HOUR, TODAY + 2 * HOUR),
            // The store need not show what the wall does.
            (kept(5_000, TODAY), TODAY + 2 * HOUR, 5_000 + 2 * HOUR),
            // A board without a clock: it was set since, it is not set yet, it never was.
            (kept(5_000, 5_000), TODAY, 5_000),
            (kept(TODAY, TODAY), 5_000, TODAY),
            (kept(9_000, 9_000), 5_000, 9_000),
            (kept(TODAY, TODAY), TODAY - HOUR, TODAY),
            (kept(7, BELIEVED_FROM), BELIEVED_FROM + 1, 8),
            (kept(7, BELIEVED_FROM - 1), BELIEVED_FROM, 7),
        ] {
            assert_eq!(origin(kept, wall), expected, "{kept:?}, then {wall}");
        }
    }

    #[test]
    fn the_clock_is_kept_now_and_then_and_at_once_when_the_wall_clock_is_set() {
        let kept = Reading { store: 500, wall: TODAY };
        let later = |passed: u64, set: i64| {
            kept.is_old(Reading { store: 500 + passed, wall: (TODAY + passed).saturating_add_signed(set) })
        };
        assert!(!later(0, 0) && !later(KEEP_EVERY - 1, 0) && later(KEEP_EVERY, 0));
        assert!(!later(1, 999) && later(1, 1_000) && later(1, -1_000) && later(1, -(TODAY as i64)));
    }

    #[test]
    fn what_is_kept_is_read_again_and_what_is_no_reading_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("clock");
        for reading in [Reading { store: 5, wall: TODAY }, Reading { store: u64::MAX, wall: 0 }] {
            write(&path, reading).unwrap();
            assert_eq!(read(&path).unwrap(), Some(reading));
        }
        for text in ["", "store_ms 1\n", "store_ms 1\nwall_ms 2", "store_ms 1\nwall_ms -2\n", "wall_ms 1\nstore_ms 2\n"]
        {
            std::fs::write(&path, text).unwrap();
            assert_eq!(read(&path).unwrap(), None, "{text:?}");
        }
    }

    #[test]
    fn a_clock_goes_on_from_where_it_was_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("clock");
        write(&path, Reading { store: 70 * HOUR, wall: 5_000 }).unwrap();
        let clock = Clock::start(Some(path.clone()), Arc::new(SinceBoot));
        assert!((70 * HOUR..71 * HOUR).contains(&clock.now_ms()) && clock.is_unkept() && clock.is_due());
        clock.keep();
        assert!(!clock.is_unkept());
        let kept = read(&path).unwrap().unwrap();
        assert!(kept.wall >= BELIEVED_FROM && (70 * HOUR..71 * HOUR).contains(&kept.store), "{kept:?}");
        let without = Clock::start(None, Arc::new(SinceBoot));
        assert!(!without.is_unkept() && !without.is_due() && without.now_ms() >= BELIEVED_FROM);
    }
}
