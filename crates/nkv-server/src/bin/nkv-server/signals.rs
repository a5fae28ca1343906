//! Signals: SIGTERM and SIGINT end the server, SIGHUP has files read again, and SIGUSR1 and SIGUSR2 do nothing; nor does SIGXFSZ.
//!
//! They are listened to on a thread of their own: a second one takes effect whatever the rest of the program does.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::Builder;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tracing::{info, warn};

use crate::log::{FLUSH_LIMIT, Log};

/// Some programs send SIGTERM twice in a row, to a process and to its group. One that comes within this time of the first
/// signal is not counted.
const REPEAT_LIMIT: Duration = Duration::from_secs(1);

/// How a program ends by a second signal, before all was done.
const INTERRUPTED: i32 = 130;

/// What signals ask for.
pub(crate) struct Asked {
    /// Completes with the signal that asks the server to end.
    pub(crate) stop: oneshot::Receiver<()>,
    /// Changes with each SIGHUP.
    pub(crate) reread: watch::Receiver<()>,
}

/// Listens from now on.
pub(crate) fn listen(log: Log) -> io::Result<Asked> {
    let runtime = Builder::new_current_thread().enable_io().build()?;
    let (asks, reread) = watch::channel(());
    let signals = runtime.block_on(async { Signals::new(asks) })?;
    let (stop, stopped) = oneshot::channel();
    let thread = thread::Builder::new().name("nkv-signals".into());
    thread.spawn(move || runtime.block_on(signals.serve(stop, &log)))?;
    Ok(Asked { stop: stopped, reread })
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// On the current runtime. `reread` is notified of each SIGHUP.
    fn new(reread: watch::Sender<()>) -> io::Result<Self> {
        for (name, kind, asks) in [
            ("SIGHUP", SignalKind::hangup(), Some(reread)),
            ("SIGUSR1", SignalKind::user_defined1(), None),
            ("SIGUSR2", SignalKind::user_defined2(), None),
        ] {
            let mut signals = signal(kind)?;
            tokio::spawn(async move {
                while signals.recv().await.is_some() {
                    // Unless there is no file that could be read again.
                    if asks.as_ref().is_none_or(|asks| asks.send(()).is_err()) {
                        info!("{name}: nothing to do");
                    }
                }
            });
        }
        // Listened to once, it ends nothing any more: a write past the limit of a file's size fails, as on a full disk.
        drop(signal(SignalKind::from_raw(nix::libc::SIGXFSZ))?);
        Ok(Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn serve(mut self, stop: oneshot::Sender<()>, log: &Log) {
        tokio::select! {
            _ = self.terminate.recv() => info!("stopping: SIGTERM"),
            _ = self.interrupt.recv() => info!("stopping: SIGINT"),
        }
        let first = Instant::now();
        // If the receiver has gone, the program is ending already.
        _ = stop.send(());
        loop {
            tokio::select! {
                // A person sends it.
                _ = self.interrupt.recv() => break,
                _ = self.terminate.recv() => {}
            }
            if first.elapsed() >= REPEAT_LIMIT {
                break;
            }
        }
        warn!("ended by a second signal");
        log.flush(FLUSH_LIMIT);
        std::process::exit(INTERRUPTED);
    }
}
