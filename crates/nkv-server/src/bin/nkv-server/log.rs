//! The log on stderr: written by a thread of its own, so that a stderr that takes nothing does not hold up the server and
//! one that is broken does not end it. Lines for which there is no room are lost, counted, and mentioned in the next.

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tracing::level_filters::LevelFilter;
use tracing::warn;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{fmt, registry};

use crate::args::LogFormat;

/// The target of what is said at every level, `off` included: why the program ends.
pub(crate) const FATAL: &str = "fatal";

/// How long the end of the program waits for a stderr that takes nothing.
pub(crate) const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// Lines that may wait.
const LINES_MAX: usize = 1_024;

/// The time after which a stderr that would make us wait is asked again.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// Clones share the lines.
#[derive(Clone, Debug, Default)]
pub(crate) struct Log(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: VecDeque<Vec<u8>>,
    is_writing: bool,
    lost: u64,
}

impl Log {
    /// Sends all events of `level` and above to stderr, from now on.
    pub(crate) fn start(level: LevelFilter, format: LogFormat) -> io::Result<Self> {
        let log = Log::default();
        thread::Builder::new().name("nkv-log".into()).spawn({
            let log = log.clone();
            move || log.write_all()
        })?;
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let lines = fmt::layer()
            .with_writer(log.clone())
            .with_target(false)
            .with_ansi(io::stderr().is_terminal() && !no_color)
            .log_internal_errors(false);
        let targets = Targets::new().with_default(level).with_target(FATAL, LevelFilter::ERROR);
        // It calls each loss of a connection an error, which the engine says by itself.
        let registry = registry().with(targets.with_target("async_nats", LevelFilter::OFF));
        match format {
            LogFormat::Text => registry.with(lines).init(),
            LogFormat::Json => registry.with(lines.json()).init(),
        }
        Ok(log)
    }

    /// Waits until all lines are written, for at most `limit`.
    pub(crate) fn flush(&self, limit: Duration) {
        let is_busy = |state: &mut State| state.is_writing || !state.lines.is_empty();
        drop(self.0.changed.wait_timeout_while(self.lock(), limit, is_busy));
    }

    /// Writes lines for as long as the program runs.
    fn write_all(&self) {
        let mut state = self.lock();
        loop {
            let Some(line) = state.lines.pop_front() else {
                state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.is_writing = true;
            drop(state);
            write_line(&line);
            let lost = self.take_lost();
            if lost > 0 {
                warn!(lost, "lines of the log are lost: there was no room for them");
            }
            state = self.lock();
            state.is_writing = false;
            self.0.changed.notify_all();
        }
    }

    /// How many lines were lost, once there is room to say so, about where they would stand.
    fn take_lost(&self) -> u64 {
        let mut state = self.lock();
        if state.lines.len() > LINES_MAX / 2 { 0 } else { std::mem::take(&mut state.lost) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

impl Write for Log {
    /// Takes a whole line.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut state = self.lock();
        if state.lines.len() < LINES_MAX {
            state.lines.push_back(line.to_vec());
            self.0.changed.notify_all();
        } else {
            state.lost = state.lost.saturating_add(1);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes a line to stderr. An error has no place where it could be said.
fn write_line(mut line: &[u8]) {
    while !line.is_empty() {
        match io::stderr().write(line) {
            Ok(0) => return,
            Ok(len) => line = line.get(len..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Another process that shares the pipe or the terminal has set it so.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(RETRY_PAUSE),
            Err(_) => return,
        }
    }
}
