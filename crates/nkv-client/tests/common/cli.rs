//! The real binary, against a server in this process.

use std::io::{Read, Write};
use std::process::{Child, Command, Output, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nkv_server::Server;
use serde_json::Value;
use tokio::runtime::Runtime;

/// A server, for as long as it lives.
pub(crate) struct Nkv {
    pub(crate) addr: String,
    _server: Server,
    _runtime: Runtime,
}

pub(crate) fn nkv() -> Nkv {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (server, addr) = runtime.block_on(super::server());
    Nkv { addr, _server: server, _runtime: runtime }
}

pub(crate) fn command(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nkv-client"));
    command.args(words).env_remove("NKV_ADDR").env_remove("NKV_TOKEN").env_remove("NKV_NAME");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Waits for the end, but not for ever.
pub(crate) fn finish(mut child: Child) -> Output {
    let (stdout, stderr) = (read_all(child.stdout.take()), read_all(child.stderr.take()));
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if started.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            panic!("nkv-client does not end");
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    Output { status, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

fn read_all(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        if let Some(mut pipe) = pipe {
            pipe.read_to_end(&mut all).unwrap();
        }
        all
    })
}

impl Nkv {
    pub(crate) fn run(&self, words: &[&str]) -> (i32, String, String) {
        self.feed(words, b"")
    }

    pub(crate) fn feed(&self, words: &[&str], stdin: &[u8]) -> (i32, String, String) {
        let output = self.raw(words, stdin);
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    }

    pub(crate) fn raw(&self, words: &[&str], stdin: &[u8]) -> Output {
        let mut child = command(words).env("NKV_ADDR", &self.addr).stdin(Stdio::piped()).spawn().unwrap();
        let (mut pipe, stdin) = (child.stdin.take().unwrap(), stdin.to_vec());
        // It need not read all of it.
        let writer = std::thread::spawn(move || drop(pipe.write_all(&stdin)));
        let output = finish(child);
        writer.join().unwrap();
        output
    }

    pub(crate) fn stdout(&self, words: &[&str]) -> String {
        let (code, stdout, stderr) = self.run(words);
        assert_eq!(code, 0, "{words:?}: {stderr}");
        stdout
    }
}

pub(crate) fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}
