//! The real binary as a process.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use super::{Conn, PATIENCE, eventually};

/// `nkv-server`, with no `NKV_*` of ours.
pub fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nkv-server"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("NKV_")) {
        command.env_remove(name);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A running `nkv-server`, killed when dropped.
pub struct Process {
    pub child: Child,
    pub addr: String,
    /// What it said on stderr after it listened, line by line.
    pub log: Receiver<String>,
}

impl Process {
    pub fn start(data_dir: &Path, arguments: &[&str]) -> Self {
        let mut command = command();
        command.arg("127.0.0.1:0").arg("--data-dir").arg(data_dir).args(arguments);
        Process::spawn(command)
    }

    #[expect(clippy::zombie_processes, reason = "waited for on drop, or the test fails before")]
    pub fn spawn(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (said, log) = channel();
        thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| said.send(line)));
        let mut before = Vec::new();
        loop {
            let line = log.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("did not start: {before:?}"));
            if let Some((_, addr)) = line.split_once("listening at ") {
                let addr = addr.trim_matches(['"', '}']).split('"').next().unwrap().to_owned();
                return Process { child, addr, log };
            }
            before.push(line);
        }
    }

    pub fn connect(&self) -> Conn {
        Conn::to(&self.addr)
    }

    pub fn signal(&self, signal: &str) {
        let sent = Command::new("kill").arg(signal).arg(self.child.id().to_string()).status().unwrap();
        assert!(sent.success());
    }

    pub fn wait(&mut self) -> ExitStatus {
        let mut ended = None;
        eventually("the process ends", || {
            ended = self.child.try_wait().unwrap();
            ended.is_some()
        });
        ended.unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// What a process takes of the system.
#[derive(Clone, Copy, Debug)]
pub struct Gauge {
    pub rss_kib: usize,
    pub descriptors: usize,
    pub threads: usize,
}

impl Process {
    pub fn gauge(&self) -> Gauge {
        let proc = Path::new("/proc").join(self.child.id().to_string());
        let status = std::fs::read_to_string(proc.join("status")).unwrap();
        let field = |name: &str| -> usize {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().next().unwrap().parse().unwrap()
        };
        let descriptors = std::fs::read_dir(proc.join("fd")).unwrap().count();
        Gauge { rss_kib: field("VmRSS:"), descriptors, threads: field("Threads:") }
    }

    /// Waits for a line of the log that contains `text`.
    pub fn wait_for_log(&self, text: &str) -> String {
        let mut seen = Vec::new();
        loop {
            let Ok(line) = self.log.recv_timeout(PATIENCE) else { panic!("no {text:?} in the log: {seen:#?}") };
            if line.contains(text) {
                return line;
            }
            seen.push(line);
        }
    }
}
