//! What a server takes while it does nothing, and how soon it is back.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::Result;
use crate::load;
use crate::peers::Running;
use crate::pool::{Keys, Pool};
use crate::report::Figures;
use crate::sys;

/// How long a server is left alone before it is looked at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settle(pub(crate) Duration);

/// Memory at rest, with idle connections, and with data; processor time at rest; threads; the size of the program.
pub(crate) fn run(running: &Running, value: usize, keys: usize, idle: usize, settle: Settle) -> Result<Figures> {
    let settle = || thread::sleep(settle.0);
    let pid = running.target.pid;
    settle();
    let (rss, threads) = (sys::rss_mb(pid), sys::status(pid, "Threads"));
    let connections = Pool::open(running.target, value, idle, 1)?;
    settle();
    let rss_idle = sys::rss_mb(pid);
    let (cpu, begin) = (sys::cpu_s(pid, None), sys::now());
    settle();
    let idle_cpu = (sys::cpu_s(pid, None) - cpu) / (sys::now() - begin) as f64 * 1e9;
    drop(connections);
    thread::sleep(Duration::from_millis(300));
    let fill = load::fill(running.target, value, Keys::plain(keys))?;
    settle();
    settle();
    let program = fs::metadata(Path::new(&running.program))?.len();
    Ok(Figures::from([
        ("program_mb", program as f64 / 1e6),
        ("threads", threads),
        ("rss_mb", rss),
        ("idle_connections_mb", rss_idle - rss),
        ("idle_cpu_percent", idle_cpu * 100.0),
        ("keys_mb", sys::rss_mb(pid) - rss),
        ("fill_per_s", fill),
    ]))
}
