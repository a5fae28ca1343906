//! Signals: SIGTERM and SIGINT end the server, and SIGHUP, SIGUSR1 and SIGUSR2 end nothing; nor does SIGXFSZ.
//!
//! They are listened to on a thread of their own: a second one takes effect whatever the rest of the program does.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::Builder;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tracing::{info, warn};

use crate::log::{FLUSH_LIMIT, Log};

/// Some programs send SIGTERM twice in a row, to a process and to its group. One that comes within this time of the first
/// signal is not counted.
const REPEAT_LIMIT: Duration = Duration::from_secs(1);

/// How a program ends by a second signal, before all was done.
const INTERRUPTED: i32 = 130;

/// Listens from now on. What is returned completes with the signal that asks the server to end.
pub(crate) fn listen(log: Log) -> io::Result<oneshot::Receiver<()>> {
    let runtime = Builder::new_current_thread().enable_io().build()?;
    let signals = runtime.block_on(async { Signals::new() })?;
    let (stop, stopped) = oneshot::channel();
    let thread = thread::Builder::new().name("nkv-signals".into());
    thread.spawn(move || runtime.block_on(signals.serve(stop, &log)))?;
    Ok(stopped)
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// On the current runtime.
    fn new() -> io::Result<Self> {
        for (name, kind) in [
            ("SIGHUP", SignalKind::hangup()),
            ("SIGUSR1", SignalKind::user_defined1()),
            ("SIGUSR2", SignalKind::user_defined2()),
        ] {
            let mut signals = signal(kind)?;
            tokio::spawn(async move {
                while signals.recv().await.is_some() {
                    info!("{name}: nothing to do");
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
