//! An etcd for a test: a process of its own on free ports, with a directory of its own.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used, reason = "a helper of tests")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use nkv_engine_etcd::{EtcdEngine, Options};
use nkv_node::{Event, Handle, Node, Subscription};
use nkv_testkit::histories::net::Net;
pub use nkv_testkit::port::free_port;
use rpc::kv_client::KvClient;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tonic::transport::{Channel, Endpoint};

#[allow(clippy::all, missing_docs, rustdoc::all, reason = "generated")]
pub mod rpc {
    include!("../../src/generated/etcdserverpb.rs");
}

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The program of etcd; `None`, and a line that says so, where there is none.
pub fn program() -> Option<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"), PathBuf::from);
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let known = std::env::var_os("NKV_ETCD").map(PathBuf::from);
    let found = known
        .into_iter()
        .chain([target.join("servers/etcd/etcd")])
        .chain(std::env::split_paths(&paths).map(|dir| dir.join("etcd")))
        .find(|path| path.is_file());
    if found.is_none() {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "no etcd: scripts/servers-etcd.sh target/servers/etcd");
        println!("skipped: there is no etcd (scripts/servers-etcd.sh target/servers/etcd)");
    }
    found
}

fn tool(name: &str) -> Option<PathBuf> {
    let beside = program()?.with_file_name(name);
    if beside.is_file() { Some(beside) } else { Some(PathBuf::from(name)) }
}

#[derive(Debug)]
pub struct Server {
    program: PathBuf,
    args: Vec<String>,
    pub dir: TempDir,
    pub port: u16,
    pub peer_port: u16,
    host: String,
    /// The network namespace that it runs in, if that is not the one of the test.
    namespace: Option<String>,
    child: Option<Child>,
}

impl Server {
    /// One, alone, that answers; `None` where there is no program.
    pub async fn start() -> Option<Server> {
        Server::start_with(&[]).await
    }

    pub async fn start_with(args: &[&str]) -> Option<Server> {
        let mut server = Server::new(args)?;
        server.run();
        server.ready().await;
        Some(server)
    }

    pub fn new(args: &[&str]) -> Option<Server> {
        Some(Server {
            program: program()?,
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            dir: tempfile::tempdir().unwrap(),
            port: free_port(),
            peer_port: free_port(),
            host: "127.0.0.1".to_owned(),
            namespace: None,
            child: None,
        })
    }

    /// Three members of one etcd; with a network, each in its own part of it.
    pub async fn start_three(net: Option<&Net>) -> Option<Vec<Server>> {
        let mut members: Vec<Server> = (0..3).map(|_| Server::new(&[])).collect::<Option<_>>()?;
        for (n, member) in members.iter_mut().enumerate() {
            if let Some(net) = net {
                (member.host, member.namespace) = (net.address(n), Some(net.namespace(n)));
            }
        }
        let names: Vec<String> =
            members.iter().enumerate().map(|(n, member)| format!("m{n}={}", member.peer_url())).collect();
        for (n, member) in members.iter_mut().enumerate() {
            member.add_args(&["--name", &format!("m{n}"), "--initial-cluster", &names.join(",")]);
            member.run();
        }
        for member in &members {
            member.ready().await;
        }
        Some(members)
    }

    pub fn add_args(&mut self, args: &[&str]) {
        self.args.extend(args.iter().map(|arg| (*arg).to_owned()));
    }

    pub fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn server(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    pub fn peer_url(&self) -> String {
        format!("http://{}:{}", self.host, self.peer_port)
    }

    pub fn run(&mut self) {
        let (own, peer) = (format!("http://{}", self.server()), self.peer_url());
        let mut command = match &self.namespace {
            None => Command::new(&self.program),
            Some(name) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", name]).arg(&self.program);
                command
            }
        };
        command.arg("--data-dir").arg(self.data_dir()).args(["--log-level", "error"]);
        if !self.args.iter().any(|arg| arg == "--name") {
            command.args(["--initial-cluster", &format!("default={peer}")]);
        }
        if !self.args.iter().any(|arg| arg == "--listen-client-urls") {
            command.args(["--listen-client-urls", &own, "--advertise-client-urls", &own]);
        }
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(&self.args).stdout(Stdio::null());
        if std::env::var_os("NKV_ETCD_LOG").is_none() {
            command.stderr(Stdio::null());
        }
        self.child = Some(command.spawn().unwrap());
    }

    pub async fn ready(&self) {
        let until = Instant::now() + PATIENCE;
        while self.ctl(&["get", "ready"]).is_err() {
            assert!(Instant::now() < until, "etcd does not start");
            sleep(Duration::from_millis(50)).await;
        }
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub async fn restart(&mut self) {
        self.kill();
        self.run();
        self.ready().await;
    }

    /// Forgets all.
    pub async fn wipe(&mut self) {
        self.kill();
        std::fs::remove_dir_all(self.data_dir()).unwrap();
        self.run();
        self.ready().await;
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    pub fn signal(&self, name: &str) {
        let pid = self.pid().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    /// What `etcdctl` prints.
    pub fn ctl(&self, args: &[&str]) -> Result<String, String> {
        let mut command = Command::new(tool("etcdctl").unwrap());
        command.args(["--endpoints", &self.server(), "--dial-timeout", "1s", "--command-timeout", "5s"]);
        output(command.args(args).env("ETCDCTL_API", "3"))
    }

    /// Has `etcdctl` do something that has to succeed.
    pub fn must(&self, args: &[&str]) -> String {
        self.ctl(args).unwrap_or_else(|error| panic!("etcdctl {args:?}: {error}"))
    }

    /// Has `etcdctl` do puts and deletes, a line for each, in one transaction.
    pub fn txn(&self, lines: &str) {
        let mut command = Command::new(tool("etcdctl").unwrap());
        command.args(["--endpoints", &self.server(), "txn"]).env("ETCDCTL_API", "3");
        feed(command, format!("\n{lines}\n\n").as_bytes());
    }

    /// etcd's revision.
    pub fn revision(&self) -> u64 {
        self.revision_now().expect("etcd answers")
    }

    /// The same, if etcd answers.
    pub fn revision_now(&self) -> Option<u64> {
        let text = self.ctl(&["get", "-w", "json", "x"]).ok()?;
        let (_, rest) = text.split_once("\"revision\":").unwrap();
        Some(rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap())
    }

    /// A figure of etcd.
    pub async fn metric(&self, name: &str) -> u64 {
        let mut stream = tokio::net::TcpStream::connect(self.server()).await.unwrap();
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        let value = text.lines().find_map(|line| line.strip_prefix(name)).expect("there is no such figure");
        value.trim().parse::<f64>().unwrap() as u64
    }

    pub fn version(&self) -> String {
        let text = self.must(&["endpoint", "status", "-w", "fields"]);
        let line = text.lines().find_map(|line| line.strip_prefix("\"Version\" : ")).unwrap();
        line.trim_matches('"').to_owned()
    }

    /// etcd's own API, as any client has it.
    pub async fn client(&self) -> KvClient<Channel> {
        let channel = Endpoint::from_shared(format!("http://{}", self.server())).unwrap().tcp_nodelay(true);
        KvClient::new(channel.connect().await.unwrap())
    }

    pub fn options(&self, prefix: &str) -> Options {
        Options::new([self.server()], prefix).unwrap()
    }

    pub fn engine(&self, prefix: &str) -> EtcdEngine {
        EtcdEngine::new(self.options(prefix))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn feed(mut command: Command, input: &[u8]) {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

pub fn output(command: &mut Command) -> Result<String, String> {
    let Output { status, stdout, stderr } = command.output().map_err(|error| error.to_string())?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).trim().to_owned();
    if status.success() { Ok(text(stdout)) } else { Err(text(stderr)) }
}

/// Restores a snapshot into a new directory, as the same member.
pub fn restore(snapshot: &Path, server: &Server) {
    std::fs::remove_dir_all(server.data_dir()).unwrap();
    let cluster = format!("default={}", server.peer_url());
    let mut command = Command::new(tool("etcdutl").unwrap());
    command.args(["snapshot", "restore"]).arg(snapshot).arg("--data-dir").arg(server.data_dir());
    command.args(["--initial-cluster", &cluster, "--initial-advertise-peer-urls", &server.peer_url()]);
    output(&mut command).unwrap_or_else(|error| panic!("etcdutl: {error}"));
}

pub async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !is_so().await {
        assert!(Instant::now() < until, "not in {PATIENCE:?}: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// A put, as etcd has it.
pub fn raw_put(key: &str, value: Vec<u8>) -> rpc::TxnRequest {
    raw_puts([(key.to_owned(), value)])
}

/// Puts in one transaction.
pub fn raw_puts(puts: impl IntoIterator<Item = (String, Vec<u8>)>) -> rpc::TxnRequest {
    let op = |(key, value): (String, Vec<u8>)| {
        let put = rpc::PutRequest { key: key.into(), value: value.into(), lease: 0 };
        rpc::RequestOp { request: Some(rpc::request_op::Request::RequestPut(put)) }
    };
    rpc::TxnRequest { success: puts.into_iter().map(op).collect(), ..Default::default() }
}

/// A node of this engine, once it has a state.
pub async fn node(engine: EtcdEngine) -> (Node, Handle) {
    if std::env::var_os("NKV_TEST_LOG").is_some() {
        drop(tracing_subscriber::fmt().with_max_level(tracing_subscriber::filter::LevelFilter::DEBUG).try_init());
    }
    let node = Node::builder().engine(engine).start().await.unwrap();
    let handle = node.handle();
    eventually("the engine is in reach", async || handle.health().await.is_ok()).await;
    (node, handle)
}

pub async fn value(nkv: &Handle, key: &str) -> Option<String> {
    nkv.get(key).await.unwrap().map(|entry| String::from_utf8_lossy(&entry.value).into_owned())
}

/// What a proxy does with what passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passing {
    Both,
    /// Nothing from the server.
    OneWay,
    /// This many bytes of the server on each connection, which then ends.
    First(usize),
    /// Connections end, and none is taken.
    None,
}

/// Stands between a node and its etcd.
#[derive(Debug)]
pub struct Proxy {
    pub port: u16,
    passing: watch::Sender<Passing>,
    task: tokio::task::JoinHandle<()>,
}

impl Proxy {
    pub async fn start(server: String) -> Proxy {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let passing = watch::Sender::new(Passing::Both);
        let sender = passing.clone();
        let task = tokio::spawn(async move {
            loop {
                let Ok((near, _)) = listener.accept().await else { continue };
                if *sender.borrow() == Passing::None {
                    continue;
                }
                let (server, passing) = (server.clone(), sender.subscribe());
                tokio::spawn(async move {
                    let Ok(far) = tokio::net::TcpStream::connect(server).await else { return };
                    let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
                    let mut ended = passing.clone();
                    tokio::select! {
                        () = pass(near_read, far_write, None) => {}
                        () = pass(far_read, near_write, Some(passing)) => {}
                        _ = ended.wait_for(|passing| *passing == Passing::None) => {}
                    }
                });
            }
        });
        Proxy { port, passing, task }
    }

    pub fn set(&self, passing: Passing) {
        self.passing.send_replace(passing);
    }

    pub fn server(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn engine(&self, prefix: &str) -> EtcdEngine {
        EtcdEngine::new(Options::new([self.server()], prefix).unwrap())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut held: Option<watch::Receiver<Passing>>) {
    let (mut buffer, mut passed) = (vec![0; 64 << 10], 0);
    loop {
        let Ok(mut len) = from.read(&mut buffer).await else { return };
        let mut is_last = len == 0;
        if let Some(held) = &mut held {
            let passing = held.wait_for(|passing| *passing != Passing::OneWay).await.map(|passing| *passing);
            if let Ok(Passing::First(limit)) = passing {
                len = len.min(limit.saturating_sub(passed));
                is_last |= passed + len >= limit;
            }
        }
        passed += len;
        if to.write_all(&buffer[..len]).await.is_err() || is_last {
            return;
        }
    }
}

/// Events of a stream, in words.
pub async fn next(stream: &mut Subscription) -> String {
    loop {
        match timeout(PATIENCE, stream.next()).await.expect("no event").expect("it ended") {
            Event::Update { entry, .. } => break format!("{}={}", entry.key, String::from_utf8_lossy(&entry.value)),
            Event::Gone { key, reason, .. } => break format!("{key} {reason:?}"),
            Event::Synced { .. } => {}
            other => break format!("{other:?}").split(['{', ' ']).next().unwrap_or_default().to_owned(),
        }
    }
}

/// That nothing came by this stream since: `mark` is a key below it.
pub async fn nothing_else(nkv: &Handle, stream: &mut Subscription, mark: &str) {
    nkv.put(mark, "mark").await.unwrap();
    assert_eq!(next(stream).await, format!("{mark}=mark"), "something was delivered twice, or that had not happened");
}
