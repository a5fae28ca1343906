//! A server of your own in thirty lines: an address, a directory, and until ctrl-c.
//!
//! ```text
//! cargo run -p nkv-examples --example server -- 127.0.0.1:4222 /tmp/nkv
//! cargo run -p nkv-examples --example server -- --self-check
//! ```
//!
//! The address may also be `unix:PATH`. `--self-check` runs the program as a process of its own, on a free port and in
//! a new directory, stops it, starts it again and asserts that what was put is still there. The binary `nkv-server` has
//! what a program for daily use needs besides: options, logs, exit codes.

use std::error::Error;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nkv_client::blocking::Client;
use nkv_persist_fs::{FsOptions, FsPersist};
use nkv_server::{Address, Server};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--self-check"] => self_check(),
        [addr, dir] => serve(addr.parse()?, dir.to_owned()),
        _ => Err("usage: server ADDR DIR | server --self-check".into()),
    }
}

#[tokio::main(flavor = "current_thread")]
async fn serve(addr: Address, dir: String) -> Result<(), Box<dyn Error>> {
    let open = || FsPersist::open(dir, FsOptions::default());
    let mut server = Server::builder().listen(addr).persist("sync", open).bind().await?;
    println!("listening at {}", server.addresses()[0]);
    tokio::select! {
        ended = server.failed() => return Ok(ended?), // the disk failed
        interrupted = tokio::signal::ctrl_c() => interrupted?,
    }
    server.shutdown().await?;
    println!("stopped");
    Ok(())
}

/// Two runs of this program over one directory.
fn self_check() -> Result<(), Box<dyn Error>> {
    let temporary = tempfile::tempdir()?;
    let dir = temporary.path().join("data");

    let first = Run::start(&dir)?;
    let revision = Client::connect(&first.addr)?.put("lamp.hall", "on")?;
    first.stop()?;

    let second = Run::start(&dir)?;
    let client = Client::connect(&second.addr)?;
    let entry = client.get("lamp.hall")?.ok_or("the lamp was forgotten")?;
    println!("after a restart: {} is {:?}, revision {}", entry.key, entry.value, entry.revision);
    assert_eq!((entry.value.as_ref(), entry.revision), (&b"on"[..], revision));
    drop(client);
    second.stop()
}

/// The program as a process, killed if it is still there in the end.
struct Run {
    child: Child,
    addr: String,
}

impl Run {
    fn start(dir: &Path) -> Result<Self, Box<dyn Error>> {
        let mut command = Command::new(std::env::current_exe()?);
        let child = command.arg("127.0.0.1:0").arg(dir).stdout(Stdio::piped()).spawn()?;
        let mut run = Run { child, addr: String::new() };
        let stdout = run.child.stdout.as_mut().ok_or("its output is not ours")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        run.addr = line.trim().strip_prefix("listening at ").ok_or("it did not start")?.to_owned();
        println!("process {} is {}", run.child.id(), line.trim());
        Ok(run)
    }

    /// Does what ctrl-c does, and expects the program to end well.
    fn stop(mut self) -> Result<(), Box<dyn Error>> {
        let kill = format!("kill -INT {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &kill]).status()?.success());
        let status = self.child.wait()?;
        println!("process {} has ended: {status}", self.child.id());
        assert!(status.success());
        Ok(())
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // It has ended already, unless something went wrong.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
