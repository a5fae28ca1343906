//! What asks the kernel: clock, processors, processes, sockets.

use std::fmt::Write as _;
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use rustix::process::{Pid, Signal};
use rustix::thread::CpuSet;
use rustix::time::{ClockId, Timespec};

use crate::Result;

/// A second, in the unit of [`now`].
pub(crate) const SECOND: u64 = 1_000_000_000;

/// Servers get this long to end by themselves.
const STOP_LIMIT: Duration = Duration::from_secs(20);

static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);

/// What a run leaves behind if it is cut short: processes, and the directory of their data.
static LEFT: Mutex<Left> = Mutex::new(Left { pids: Vec::new(), dir: None });

#[derive(Debug)]
struct Left {
    pids: Vec<u32>,
    dir: Option<PathBuf>,
}

/// Nanoseconds since the program began.
pub(crate) fn now() -> u64 {
    BEGIN.elapsed().as_nanos() as u64
}

/// Processor seconds of this process.
pub(crate) fn own_cpu_s() -> f64 {
    let time = rustix::time::clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Processor seconds of the threads that a process has, of those named `name` if one is given.
pub(crate) fn cpu_s(pid: u32, name: Option<&str>) -> f64 {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return 0.0 };
    let read = |path: &Path, file: &str| fs::read_to_string(path.join(file)).unwrap_or_default();
    tasks
        .flatten()
        .map(|task| task.path())
        .filter(|task| name.is_none_or(|name| read(task, "comm").trim_end() == name))
        .filter_map(|task| read(&task, "schedstat").split(' ').next()?.parse::<f64>().ok())
        .sum::<f64>()
        / 1e9
}

/// A number of `/proc/PID/status`: `VmRSS` (in KiB), `Threads`, ...
pub(crate) fn status(pid: u32, field: &str) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0.0)
}

/// Resident memory in MB (of 1,000,000 bytes).
pub(crate) fn rss_mb(pid: u32) -> f64 {
    status(pid, "VmRSS") * 1024.0 / 1e6
}

/// The processors that this thread may use.
pub(crate) fn affinity() -> Result<CpuSet> {
    Ok(rustix::thread::sched_getaffinity(None)?)
}

/// Keeps this thread, and processes it starts from now on, on some processors.
pub(crate) fn pin(cpus: &CpuSet) -> Result<()> {
    Ok(rustix::thread::sched_setaffinity(None, cpus)?)
}

/// The set of one processor.
pub(crate) fn only(cpu: usize) -> CpuSet {
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    cpus
}

/// The first two processors of a set: the server's and the load's.
pub(crate) fn first_two(cpus: &CpuSet) -> Option<(usize, usize)> {
    let mut all = (0..CpuSet::MAX_CPU).filter(|cpu| cpus.is_set(*cpu));
    Some((all.next()?, all.next()?))
}

/// Raises the limit of open files to what is allowed; the servers inherit it.
pub(crate) fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // What is too low shows itself when a connection cannot be made.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// A port of the loopback address that nobody listens at.
pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// True if files below are kept in memory.
pub(crate) fn is_in_memory(dir: &Path) -> Result<bool> {
    const TMPFS: i64 = 0x0102_1994;
    const RAMFS: i64 = 0x8584_58f6;
    let kind = rustix::fs::statfs(dir)?.f_type as i64;
    Ok(kind == TMPFS || kind == RAMFS)
}

/// Connects to a server; the socket does not block.
pub(crate) fn connect(addr: SocketAddr) -> io::Result<OwnedFd> {
    assert!(addr.ip().is_loopback(), "this tool talks to the loopback addresses only");
    let socket = TcpStream::connect(addr)?;
    socket.set_nodelay(true)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// What a read or a write came to.
#[derive(Debug)]
pub(crate) enum Io {
    Done(usize),
    Again,
    Closed,
}

pub(crate) fn read(socket: &OwnedFd, buf: &mut [u8]) -> Io {
    match rustix::net::recv(socket, buf, RecvFlags::empty()) {
        Ok((0, _)) => Io::Closed,
        Ok((len, _)) => Io::Done(len),
        Err(error) => Io::of(error),
    }
}

/// Reads as much as `read` would, without a copy of it: the kernel drops what was received.
pub(crate) fn discard(socket: &OwnedFd, buf: &mut [u8]) -> Io {
    match rustix::net::recv(socket, buf, RecvFlags::TRUNC) {
        Ok((_, 0)) => Io::Closed,
        Ok((_, len)) => Io::Done(len),
        Err(error) => Io::of(error),
    }
}

pub(crate) fn write(socket: &OwnedFd, bytes: &[u8]) -> Io {
    match rustix::net::send(socket, bytes, SendFlags::NOSIGNAL) {
        Ok(len) => Io::Done(len),
        Err(error) => Io::of(error),
    }
}

impl Io {
    fn of(error: Errno) -> Io {
        if matches!(error, Errno::AGAIN | Errno::INTR) { Io::Again } else { Io::Closed }
    }
}

/// Sockets that are ready.
pub(crate) struct Epoll {
    fd: OwnedFd,
    pub(crate) events: Vec<Event>,
}

impl Epoll {
    pub(crate) fn new() -> Result<Self> {
        Ok(Epoll { fd: epoll::create(CreateFlags::CLOEXEC)?, events: Vec::with_capacity(1024) })
    }

    pub(crate) fn add(&self, socket: &OwnedFd, id: usize) -> Result<()> {
        Ok(epoll::add(&self.fd, socket, EventData::new_u64(id as u64), EventFlags::IN)?)
    }

    /// Whether to tell, besides what can be read, that there is room to write.
    pub(crate) fn watch_room(&self, socket: &OwnedFd, id: usize, room: bool) {
        let flags = if room { EventFlags::IN | EventFlags::OUT } else { EventFlags::IN };
        epoll::modify(&self.fd, socket, EventData::new_u64(id as u64), flags).expect("it was added");
    }

    pub(crate) fn remove(&self, socket: &OwnedFd) {
        epoll::delete(&self.fd, socket).expect("it was added");
    }

    /// Waits so many milliseconds at most; what is ready is in `events`.
    pub(crate) fn wait(&mut self, ms: u64) -> Result<()> {
        self.wait_ns(ms * 1_000_000)
    }

    /// The same, in nanoseconds.
    pub(crate) fn wait_ns(&mut self, ns: u64) -> Result<()> {
        let limit = Timespec { tv_sec: 0, tv_nsec: ns.min(SECOND - 1) as _ };
        self.events.clear();
        match epoll::wait(&self.fd, spare_capacity(&mut self.events), Some(&limit)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// A server that this tool started, and stops.
#[derive(Debug)]
pub(crate) struct Server {
    child: Child,
    /// When it was started.
    pub(crate) since: u64,
}

impl Server {
    /// Starts a program on some processors. What it says goes to `log`.
    pub(crate) fn start(command: &[String], cpus: &CpuSet, log: &Path) -> Result<Server> {
        let log = File::options().create(true).append(true).open(log)?;
        let own = affinity()?;
        pin(cpus)?;
        let mut left = left();
        let since = now();
        let child = Command::new(&command[0])
            .args(&command[1..])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .map_err(|error| format!("cannot start {}: {error}", command[0]));
        pin(&own)?;
        let child = child?;
        left.pids.push(child.id());
        Ok(Server { child, since })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The exit status, if it has ended by itself.
    pub(crate) fn ended(&mut self) -> Option<String> {
        Some(self.child.try_wait().ok()??.to_string())
    }

    /// Asks the server to end, and ends it if it does not; says how long that took, in seconds.
    pub(crate) fn stop(mut self) -> f64 {
        self.end()
    }

    fn end(&mut self) -> f64 {
        let begin = Instant::now();
        signal(self.pid(), Signal::TERM);
        while begin.elapsed() < STOP_LIMIT && matches!(self.child.try_wait(), Ok(None)) {
            thread::sleep(Duration::from_millis(2));
        }
        // The number is forgotten before the process is: it could be given to another one.
        let mut left = left();
        left.pids.retain(|pid| *pid != self.child.id());
        let _ = self.child.kill();
        let _ = self.child.wait();
        begin.elapsed().as_secs_f64()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if left().pids.contains(&self.pid()) {
            self.end();
        }
    }
}

/// A directory for the servers' data, on a disk. It goes when this does.
#[derive(Debug)]
pub(crate) struct WorkDir(PathBuf);

impl WorkDir {
    /// Below `TMPDIR`, or `/var/tmp`: `/tmp` is memory on many machines.
    pub(crate) fn make() -> Result<WorkDir> {
        let parent = std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from);
        if is_in_memory(&parent)? {
            return Err(format!("{} is memory: set TMPDIR to a directory on a disk", parent.display()).into());
        }
        let dir = parent.join(format!("nkv-compare-{}", std::process::id()));
        fs::create_dir(&dir)?;
        left().dir = Some(dir.clone());
        Ok(WorkDir(dir))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        left().dir = None;
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// From now on, Ctrl-C and SIGTERM end the servers and remove their data first.
pub(crate) fn clean_up_on_signal() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let listen = |kind| signal(kind).expect("signals can be listened to");
            let (mut interrupt, mut terminate) = (listen(SignalKind::interrupt()), listen(SignalKind::terminate()));
            let mut hang_up = listen(SignalKind::hangup());
            tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {}, _ = hang_up.recv() => {} }
        });
        let left = left();
        left.pids.iter().for_each(|pid| signal(*pid, Signal::KILL));
        if let Some(dir) = &left.dir {
            // They may take a moment to die, and write until then.
            for _ in 0..50 {
                if fs::remove_dir_all(dir).is_ok() {
                    break;
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
        // With the lock held: nobody starts another one.
        std::process::exit(130)
    })?;
    Ok(())
}

fn left() -> MutexGuard<'static, Left> {
    LEFT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends a server at once.
pub(crate) fn kill(pid: u32) {
    // No other process can have this number before this one has waited for the server.
    signal(pid, Signal::KILL);
}

fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid as i32) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// What the figures depend on, one line each: name and value. No name of a host is among them.
pub(crate) fn machine(dir: &Path) -> Vec<(&'static str, String)> {
    let file = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let cpu_info = file("/proc/cpuinfo");
    let cpu = cpu_info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, name)| name);
    let memory = file("/proc/meminfo").split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok());
    vec![
        ("processors", thread::available_parallelism().map_or(0, usize::from).to_string()),
        ("processor", cpu.unwrap_or("unknown").to_owned()),
        ("memory", format!("{:.0} GB", memory.unwrap_or(0.0) * 1024.0 / 1e9)),
        ("kernel", file("/proc/sys/kernel/osrelease")),
        ("tcp congestion control", file("/proc/sys/net/ipv4/tcp_congestion_control")),
        ("file system", file_system(dir).unwrap_or_else(|| "unknown".to_owned())),
    ]
}

/// Type and device of the file system that a directory is on.
fn file_system(dir: &Path) -> Option<String> {
    let dir = fs::canonicalize(dir).ok()?;
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let mount =
        mounts.filter(|mount| mount.len() > 2 && dir.starts_with(mount[1])).max_by_key(|mount| mount[1].len())?;
    let device = mount[0].strip_prefix("/dev/").unwrap_or(mount[0]);
    let mut text = format!("{} on {device}", mount[2]);
    if let Ok(cache) = fs::read_to_string(format!("/sys/block/{device}/queue/write_cache")) {
        let _ = write!(text, ", write cache \"{}\"", cache.trim());
    }
    Some(text)
}
