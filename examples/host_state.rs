//! The figures of this machine (Linux: from `/proc`), published by one process and followed by others, through the
//! death of the server between them.
//!
//! ```text
//! cargo run -p nkv-examples --example host_state                        # the check described below
//! cargo run -p nkv-examples --example host_state -- publish [ADDR]
//! cargo run -p nkv-examples --example host_state -- follow [ADDR]
//! ```
//!
//! ADDR is `127.0.0.1:4222` if not given: start `nkv-server` first. The figures are `host.NAME.load`, `.uptime_s` and
//! `.memory_free_kib`; they are put with a TTL, so a machine that is gone takes its figures with it.
//!
//! Without a role it checks itself: a server, a publisher and a follower, each a process; the server is killed as by
//! `kill -9` and started again, and the follower, without a word from outside, must see figures that are newer.

use std::error::Error;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use nkv_client::{Client, Event, PutOptions};
use nkv_persist_fs::{FsOptions, FsPersist};
use nkv_server::Server;

const ADDR: &str = "127.0.0.1:4222";
/// How often figures are published.
const PERIOD: Duration = Duration::from_millis(200);
/// How long figures are good for.
const TTL: Duration = Duration::from_secs(10);
/// How long the check waits for anything.
const PATIENCE: Duration = Duration::from_secs(15);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => check(),
        ["publish"] => publish(ADDR).await,
        ["publish", addr] => publish(addr).await,
        ["follow"] => follow(ADDR).await,
        ["follow", addr] => follow(addr).await,
        ["serve", addr, dir] => serve(addr, dir.to_owned()).await,
        _ => Err("usage: host_state [publish [ADDR] | follow [ADDR] | serve ADDR DIR]".into()),
    }
}

/// Puts the figures again and again. One that could not be put is no loss: the next is newer.
async fn publish(addr: &str) -> Result<(), Box<dyn Error>> {
    let client = Client::connect(addr).await?;
    let host = fs::read_to_string("/proc/sys/kernel/hostname")?.trim().replace('.', "-");
    let options = PutOptions::default().with_ttl(TTL);
    let mut ticks = tokio::time::interval(PERIOD);
    loop {
        ticks.tick().await;
        for (name, figure) in figures()? {
            if let Err(error) = client.put_with(&format!("host.{host}.{name}"), figure, options).await {
                eprintln!("publisher: {error:#}");
            }
        }
    }
}

fn figures() -> Result<[(&'static str, String); 3], Box<dyn Error>> {
    let first_word = |path: &str| -> Result<String, Box<dyn Error>> {
        Ok(fs::read_to_string(path)?.split_whitespace().next().ok_or("an empty file")?.to_owned())
    };
    let memory = fs::read_to_string("/proc/meminfo")?;
    let free = memory.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next());
    Ok([
        ("load", first_word("/proc/loadavg")?),
        ("memory_free_kib", free.ok_or("no MemAvailable in /proc/meminfo")?.to_owned()),
        ("uptime_s", first_word("/proc/uptime")?),
    ])
}

/// Prints each event in a line: the figures of all hosts, and the state of the connection.
async fn follow(addr: &str) -> Result<(), Box<dyn Error>> {
    let client = Client::connect(addr).await?;
    let mut hosts = client.subscribe("host.*").await?;
    while let Some(event) = hosts.next().await {
        match event {
            Event::Update { entry, .. } => {
                println!("{} {} {}", entry.revision, entry.key, String::from_utf8_lossy(&entry.value));
            }
            Event::Gone { key, reason, .. } => println!("gone {key} {}", reason.as_str()),
            Event::Synced { epoch, .. } => println!("synced {epoch}"),
            Event::Reconnecting => println!("reconnecting"),
            Event::Connected { .. } => println!("connected"),
            other => println!("{other:?}"),
        }
    }
    Ok(())
}

async fn serve(addr: &str, dir: String) -> Result<(), Box<dyn Error>> {
    let open = || FsPersist::open(dir, FsOptions::default());
    let server = Server::builder().listen(addr.parse()?).persist("sync", open).bind().await?;
    println!("listening at {}", server.addresses()[0]);
    Ok(server.wait().await?)
}

fn check() -> Result<(), Box<dyn Error>> {
    let temporary = tempfile::tempdir()?;
    let (addr, dir) = (format!("unix:{}", temporary.path().join("nkv.sock").display()), temporary.path().join("data"));

    let server = start_server(&addr, &dir)?;
    let _publisher = Process::start("publisher", &["publish", &addr])?;
    let follower = Process::start("follower", &["follow", &addr])?;
    let epoch = follower.wait_for(|line| line.strip_prefix("synced ").map(str::to_owned))?;
    let mut newest = follower.wait_for(Figure::uptime)?;
    for _ in 0..3 {
        newest = follower.wait_for(Figure::uptime)?;
    }

    server.kill()?;
    let newest = follower.until_reconnecting(newest)?;
    let _server = start_server(&addr, &dir)?;
    // Older figures may come first: the server has kept them.
    let [.., (_, restarted_at)] = figures()?;
    let restarted_at: f64 = restarted_at.parse()?;

    let again = follower.wait_for(|line| line.strip_prefix("synced ").map(str::to_owned))?;
    let after = follower.wait_for(|line| Figure::uptime(line).filter(|figure| figure.value > restarted_at))?;
    println!("before the kill: {newest:?}");
    println!("after it:        {after:?}");
    assert_eq!(again, epoch, "nothing was lost, so the epoch is the same");
    assert!(after.revision > newest.revision, "revisions go on where they were");
    assert!(after.key == newest.key);
    Ok(())
}

/// A server that has started.
fn start_server(addr: &str, dir: &Path) -> Result<Process, Box<dyn Error>> {
    let dir = dir.to_str().ok_or("the directory for temporary files has a name that is no text")?;
    let server = Process::start("server", &["serve", addr, dir])?;
    server.wait_for(|line| line.starts_with("listening").then_some(()))?;
    Ok(server)
}

/// A figure that the follower received.
#[derive(Debug)]
struct Figure {
    revision: u64,
    key: String,
    value: f64,
}

impl Figure {
    /// The uptime, if this line of the follower is about one.
    fn uptime(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let (revision, key, value) = (words.next()?, words.next()?, words.next()?);
        let figure = Figure { revision: revision.parse().ok()?, key: key.to_owned(), value: value.parse().ok()? };
        key.ends_with(".uptime_s").then_some(figure)
    }
}

/// This program in a role, as a process that is killed when it is dropped.
struct Process {
    name: &'static str,
    child: Child,
    lines: Receiver<String>,
}

impl Process {
    fn start(name: &'static str, args: &[&str]) -> Result<Self, Box<dyn Error>> {
        let mut child = Command::new(std::env::current_exe()?).args(args).stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().ok_or("its output is not ours")?;
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                println!("{name}: {line}");
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Process { name, child, lines })
    }

    fn next_line(&self, deadline: Instant) -> Result<String, Box<dyn Error>> {
        let left = deadline.saturating_duration_since(Instant::now());
        Ok(self.lines.recv_timeout(left).map_err(|_| format!("the {} did not print what was expected", self.name))?)
    }

    /// The first thing that `find` finds in a line.
    fn wait_for<T>(&self, find: impl Fn(&str) -> Option<T>) -> Result<T, Box<dyn Error>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = find(&self.next_line(deadline)?) {
                return Ok(found);
            }
        }
    }

    /// The last uptime received before the connection was lost.
    fn until_reconnecting(&self, mut newest: Figure) -> Result<Figure, Box<dyn Error>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.next_line(deadline)?.as_str() {
                "reconnecting" => return Ok(newest),
                line => newest = Figure::uptime(line).unwrap_or(newest),
            }
        }
    }

    /// Kills the process with SIGKILL, which a process cannot handle.
    fn kill(mut self) -> Result<(), Box<dyn Error>> {
        self.child.kill()?;
        println!("killed the {}: {}", self.name, self.child.wait()?);
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It has ended already, if this fails.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
