//! A server on port 0 in the test's process, and a client that speaks lines. Every wait has a limit.

#![allow(clippy::unwrap_used, dead_code, unreachable_pub, missing_docs)]

#[cfg(feature = "cli")]
pub mod faults;
#[cfg(feature = "cli")]
pub mod process;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nkv_server::{Builder, Handle, Server, ServerError};
use tokio::runtime::Runtime;

pub const PATIENCE: Duration = Duration::from_secs(10);

/// A running server; it stops when dropped.
pub struct TestServer {
    pub addr: String,
    pub handle: Handle,
    pub runtime: Runtime,
    server: Option<Server>,
}

impl TestServer {
    pub fn start() -> Self {
        TestServer::with(|builder| builder)
    }

    pub fn with(describe: impl FnOnce(Builder) -> Builder) -> Self {
        TestServer::on(threads(), describe)
    }

    /// On a runtime with `threads` threads.
    pub fn on(threads: usize, describe: impl FnOnce(Builder) -> Builder) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build().unwrap();
        let builder = describe(Server::builder().listen("127.0.0.1:0".parse().unwrap()));
        let server = runtime.block_on(builder.bind()).unwrap();
        let addr = server.addresses()[0].to_string();
        TestServer { addr, handle: server.handle(), runtime, server: Some(server) }
    }

    pub fn connect(&self) -> Conn {
        Conn::to(&self.addr)
    }

    /// Waits for the server to end by itself.
    pub fn ended(&mut self) -> Result<(), ServerError> {
        let server = self.server.take().unwrap();
        self.runtime.block_on(async { tokio::time::timeout(PATIENCE, server.wait()).await }).unwrap()
    }

    /// Ends as a process does that dies: nothing that was begun is ended.
    pub fn die(mut self) {
        let server = self.server.take().unwrap();
        let runtime =
            std::mem::replace(&mut self.runtime, tokio::runtime::Builder::new_current_thread().build().unwrap());
        runtime.shutdown_background();
        drop(server);
    }

    pub fn shutdown(mut self) -> Result<(), ServerError> {
        let server = self.server.take().unwrap();
        self.runtime.block_on(async { tokio::time::timeout(PATIENCE, server.shutdown()).await }).unwrap()
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            let stopped = self.runtime.block_on(async { tokio::time::timeout(PATIENCE, server.shutdown()).await });
            if !thread::panicking() {
                stopped.unwrap().unwrap();
            }
        }
    }
}

/// How many threads the runtime of a server has: what `NKV_TEST_THREADS` says, or one.
fn threads() -> usize {
    std::env::var("NKV_TEST_THREADS").map_or(1, |threads| threads.parse().unwrap())
}

/// A connection that speaks lines.
pub struct Conn {
    reader: BufReader<TcpStream>,
}

impl Conn {
    pub fn to(addr: &str) -> Self {
        Conn::over(TcpStream::connect(addr).unwrap())
    }

    pub fn over(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Conn { reader: BufReader::new(stream) }
    }

    pub fn stream(&self) -> &TcpStream {
        self.reader.get_ref()
    }

    pub fn send(&mut self, text: impl AsRef<[u8]>) -> &mut Self {
        // In one piece: what is sent together is to arrive together.
        self.reader.get_mut().write_all(&[text.as_ref(), b"\n"].concat()).unwrap();
        self
    }

    /// The next line, without its end; `(closed)` at the end of the stream.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        match self.reader.read_line(&mut line) {
            Ok(0) => "(closed)".into(),
            Ok(_) => line.trim_end_matches('\n').into(),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => "(closed)".into(),
            Err(error) => panic!("no line came: {error}"),
        }
    }

    pub fn ask(&mut self, request: &str) -> String {
        self.send(request).line()
    }

    pub fn json(&mut self) -> serde_json::Value {
        let line = self.line();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:.200}"))
    }

    /// Reads `len` raw bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.reader.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Ends the sending half.
    pub fn finish(&mut self) -> &mut Self {
        self.stream().shutdown(Shutdown::Write).unwrap();
        self
    }

    /// Has `Connect` answered, with a name and a form of values.
    pub fn hello(&mut self, name: &str, values: &str) -> &mut Self {
        let connect = format!(r#"{{"type":"Connect","client_uuid":"{name}","values":"{values}"}}"#);
        assert!(self.ask(&connect).contains("\"status\":200"));
        self
    }

    pub fn put(&mut self, key: &str, value: &str) -> u64 {
        let answer = self.ask(&format!(r#"{{"type":"Put","key":"{key}","value":"{value}"}}"#));
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(answer["Base"]["status"], 200, "{answer}");
        answer["Base"]["revision"].as_u64().unwrap()
    }
}

/// Asks until it is so.
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        thread::yield_now();
    }
}

/// Runs `work` on a thread and panics if it takes too long.
pub fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = mpsc::channel();
    thread::spawn(move || done.send(work()));
    result.recv_timeout(PATIENCE).unwrap()
}

pub fn status(answer: &str) -> u64 {
    let answer: serde_json::Value = serde_json::from_str(answer).unwrap_or_else(|_| panic!("no answer: {answer}"));
    answer.as_object().unwrap().values().next().unwrap()["status"].as_u64().unwrap()
}
