//! Faults from outside the process: strace, small disks, writers that note what was acknowledged. What a test needs and
//! is not there makes it pass with a word, and fail instead where `NKV_FAULTS=1` says that it must run.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::process::Process;
use super::{Conn, PATIENCE};

pub fn skip(why: &str) {
    assert!(std::env::var_os("NKV_FAULTS").is_none(), "NKV_FAULTS is set, and this cannot run: {why}");
    println!("SKIPPED: {why}");
}

/// strace attached to a server, detached when dropped.
pub struct Strace(Child);

impl Strace {
    pub fn attach(server: &Process, arguments: &[&str]) -> Option<Strace> {
        let mut command = Command::new("strace");
        command.arg("-f").args(arguments).arg("-p").arg(server.child.id().to_string());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) => {
                skip(&format!("no strace: {error}"));
                return None;
            }
        };
        let mut said = String::new();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        while !said.contains("attached") {
            assert!(stderr.read_line(&mut said).unwrap() > 0, "strace did not attach: {said}");
        }
        // It goes on to say things, and must not wait for a reader.
        thread::spawn(move || stderr.lines().map_while(Result::ok).for_each(drop));
        Some(Strace(child))
    }

    pub fn detach(mut self) {
        let pid = self.0.id().to_string();
        assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
        // One that holds up a call of a process whose first thread has ended may not hear it: when it is dropped it is killed.
        let deadline = Instant::now() + PATIENCE;
        while self.0.try_wait().unwrap().is_none() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A file system of its own, gone when dropped.
pub struct SmallDisk {
    dir: tempfile::TempDir,
}

impl SmallDisk {
    /// In memory: 3 MB.
    pub fn tmpfs() -> Option<Self> {
        SmallDisk::mount(|_, at| {
            run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=3m,mode=0700", "nkv"]).arg(at))
        })
    }

    /// In a loop device: 16 MB.
    pub fn ext4() -> Option<Self> {
        SmallDisk::mount(|image, at| {
            std::fs::File::create(image).and_then(|file| file.set_len(16 << 20)).map_err(|error| error.to_string())?;
            run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(image))?;
            run(Command::new("mount").args(["-o", "loop"]).arg(image).arg(at))
        })
    }

    fn mount(make: impl FnOnce(&Path, &Path) -> Result<(), String>) -> Option<Self> {
        let disk = SmallDisk { dir: tempfile::tempdir().unwrap() };
        std::fs::create_dir(disk.root()).unwrap();
        match make(&disk.dir.path().join("image"), &disk.root()) {
            Ok(()) => Some(disk),
            Err(error) => {
                skip(&format!("no small disk: {error}"));
                None
            }
        }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    pub fn data(&self) -> PathBuf {
        self.root().join("data")
    }

    pub fn remount(&self, options: &str) {
        run(Command::new("mount").arg("-o").arg(format!("remount,{options}")).arg(self.root())).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(self.root()).stderr(Stdio::null()).status());
    }
}

pub fn run(command: &mut Command) -> Result<(), String> {
    match command.output() {
        Ok(Output { status, .. }) if status.success() => Ok(()),
        other => Err(format!("{command:?}: {other:?}")),
    }
}

/// An acknowledged put.
#[derive(Clone, Debug)]
pub struct Acknowledged {
    pub key: String,
    pub number: u64,
    pub revision: u64,
    /// When it was asked for.
    pub sent: Instant,
}

/// Eight clients that put increasing numbers as fast as they are answered, until they are refused or cut.
pub struct Load(Vec<JoinHandle<Vec<Acknowledged>>>);

impl Load {
    pub fn start(server: &Process) -> Self {
        Load(
            (0..8)
                .map(|writer| (writer, server.connect()))
                .map(|(w, conn)| thread::spawn(move || put_all(conn, w)))
                .collect(),
        )
    }

    /// What was acknowledged, once all clients have ended.
    pub fn join(self) -> Vec<Acknowledged> {
        self.0.into_iter().flat_map(|writer| writer.join().unwrap()).collect()
    }
}

fn put_all(mut conn: Conn, writer: u64) -> Vec<Acknowledged> {
    let mut acknowledged = Vec::new();
    for number in 1.. {
        let (key, sent) = (format!("w{writer}.{}", number % 5), Instant::now());
        let request = format!("{{\"type\":\"Put\",\"key\":\"{key}\",\"value\":\"{number}\"}}\n");
        if conn.stream().write_all(request.as_bytes()).is_err() {
            break;
        }
        // The process may be cut in the middle of a line.
        let Ok(answer) = serde_json::from_str::<serde_json::Value>(&conn.line()) else { break };
        if answer["Base"]["status"] != 200 {
            break;
        }
        let revision = answer["Base"]["revision"].as_u64().unwrap();
        acknowledged.push(Acknowledged { key, number, revision, sent });
    }
    acknowledged
}

/// Panics unless each key has the newest that was acknowledged, or something newer that was under way.
pub fn check_all_there(conn: &mut Conn, acknowledged: &[Acknowledged]) {
    let mut newest = BTreeMap::new();
    for put in acknowledged {
        let known = newest.entry(&put.key).or_insert(put);
        *known = if known.number < put.number { put } else { known };
    }
    conn.hello("checker", "text");
    for (key, put) in newest {
        conn.send(format!(r#"{{"type":"Get","key":"{key}"}}"#));
        let got = conn.json();
        let value = got["Get"]["data"][0].as_str().unwrap_or_else(|| panic!("{key} is lost: {got}"));
        let stored: u64 = value.parse().unwrap_or_else(|_| panic!("{key} is torn: {value}"));
        assert!(stored >= put.number, "{key}: {} was acknowledged, {stored} is stored", put.number);
        assert!(got["Get"]["revisions"][0].as_u64().unwrap() >= put.revision, "{key}: its revision went back");
    }
}
