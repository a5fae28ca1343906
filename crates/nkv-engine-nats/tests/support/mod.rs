//! Servers of NATS for tests: each with a port and a directory of its own, ended with the test.

#![allow(dead_code, clippy::unwrap_used)]

use std::env;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nkv_engine_nats::{NatsEngine, Options};
use nkv_node::{Event, Handle, Node, Subscription};
use nkv_testkit::histories::net::Net;
pub(crate) use nkv_testkit::port::free_port;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::timeout;

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The program, if there is one: 2.15, or 2.9.
pub(crate) fn program(is_old: bool) -> Option<PathBuf> {
    let (variable, name) =
        if is_old { ("NKV_NATS_SERVER_OLD", "nats-server-old") } else { ("NKV_NATS_SERVER", "nats-server") };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let target = env::var_os("CARGO_TARGET_DIR").map_or(root.join("target"), PathBuf::from);
    let paths = env::var_os("PATH").map(|paths| env::split_paths(&paths).collect::<Vec<_>>()).unwrap_or_default();
    let mut places = vec![target.join("servers/nats")];
    places.extend(paths);
    let found = env::var_os(variable).map(PathBuf::from);
    let found = found.or_else(|| places.into_iter().map(|place| place.join(name)).find(|path| path.is_file()));
    if found.is_none() {
        assert!(env::var("CI").as_deref() != Ok("true"), "there is no {name}: see scripts/servers-nats.sh");
        eprintln!("skipped: there is no {name}: scripts/servers-nats.sh target/servers/nats gets it");
    }
    found
}

/// A server of NATS with JetStream.
#[derive(Debug)]
pub(crate) struct Server {
    program: PathBuf,
    pub(crate) port: u16,
    pub(crate) dir: TempDir,
    config: String,
    host: String,
    /// The network namespace that it runs in, if that is not the one of the test.
    namespace: Option<String>,
    child: Option<Child>,
}

impl Server {
    /// A new one; `None` where the program is missing.
    pub(crate) async fn start() -> Option<Self> {
        Self::start_with(false, "").await
    }

    pub(crate) async fn start_old() -> Option<Self> {
        Self::start_with(true, "").await
    }

    pub(crate) async fn start_with(is_old: bool, config: &str) -> Option<Self> {
        let mut server = Self::new(is_old, config)?;
        server.run().await;
        Some(server)
    }

    /// Three members of one cluster; with a network, each in its own part of it.
    pub(crate) async fn start_three(net: Option<&Net>) -> Option<Vec<Self>> {
        let address = |number| net.map_or_else(|| "127.0.0.1".to_owned(), |net| net.address(number));
        let routes: Vec<String> = (0..3).map(|number| format!("{}:{}", address(number), free_port())).collect();
        let urls: Vec<String> = routes.iter().map(|route| format!("nats://{route}")).collect();
        let mut members = Vec::new();
        for (number, route) in routes.iter().enumerate() {
            let config = format!(
                "server_name: n{number}\ncluster {{ name: c, listen: \"{route}\", routes: [{}] }}",
                urls.join(", ")
            );
            let mut member = Self::new(false, &config)?;
            (member.host, member.namespace) = (address(number), net.map(|net| net.namespace(number)));
            member.run().await;
            members.push(member);
        }
        Some(members)
    }

    fn new(is_old: bool, config: &str) -> Option<Self> {
        if env::var_os("NKV_TEST_LOG").is_some() {
            drop(tracing_subscriber::fmt().try_init());
        }
        let program = program(is_old)?;
        let dir = match env::var_os("NKV_TEST_DIR") {
            Some(base) => TempDir::new_in(base).unwrap(),
            None => TempDir::new().unwrap(),
        };
        let (host, config) = ("127.0.0.1".to_owned(), config.to_owned());
        Some(Server { program, port: free_port(), dir, config, host, namespace: None, child: None })
    }

    /// Starts it, again.
    pub(crate) async fn run(&mut self) {
        self.spawn();
        let wait = async {
            while tokio::net::TcpStream::connect((&*self.host, self.port)).await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let log =
            |_| panic!("the server does not start: {}", std::fs::read_to_string(self.dir.path().join("log")).unwrap());
        timeout(PATIENCE, wait).await.unwrap_or_else(log);
    }

    pub(crate) fn spawn(&mut self) {
        let store = self.dir.path().join("store");
        let config = format!("jetstream {{ store_dir: {store:?} }}\n{}", self.config);
        let file = self.dir.path().join("server.conf");
        std::fs::write(&file, config).unwrap();
        let log = std::fs::File::options().create(true).append(true).open(self.dir.path().join("log")).unwrap();
        let mut command = match &self.namespace {
            None => Command::new(&self.program),
            Some(name) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", name]).arg(&self.program);
                command
            }
        };
        let child = command
            .args(["-a", &self.host, "-p", &self.port.to_string(), "-c"])
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        self.child = Some(child.unwrap());
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        if let Some(child) = &self.child {
            let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
            kill_process(pid, signal).unwrap();
        }
    }

    /// Ends it at once.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("nats://{}", self.address())
    }

    pub(crate) fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    pub(crate) fn options(&self) -> Options {
        Options::new([self.url()], "test").unwrap()
    }

    pub(crate) fn engine(&self) -> NatsEngine {
        NatsEngine::new(self.options())
    }

    /// A node on the bucket `test`, once it has a state.
    pub(crate) async fn node(&self) -> (Node, Handle) {
        node(self.engine()).await
    }

    /// Another program beside nkv.
    pub(crate) async fn other(&self) -> Other {
        Other { client: async_nats::connect(self.url()).await.unwrap(), bucket: "test".to_owned() }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.signal(Signal::CONT);
        self.kill();
    }
}

pub(crate) async fn node(engine: NatsEngine) -> (Node, Handle) {
    let node = Node::builder().engine(engine).start().await.unwrap();
    let handle = node.handle();
    healthy(&handle).await;
    (node, handle)
}

pub(crate) async fn healthy(nkv: &Handle) {
    until("the engine is in reach", async || nkv.health().await.is_ok()).await;
}

pub(crate) async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(timeout(PATIENCE, wait).await.is_ok(), "not in {PATIENCE:?}: {what}");
}

pub(crate) async fn value(nkv: &Handle, key: &str) -> Option<String> {
    let entry = nkv.get(key).await.unwrap()?;
    Some(String::from_utf8_lossy(&entry.value).into_owned())
}

/// The next event that says anything of a key.
pub(crate) async fn event(events: &mut Subscription) -> Event {
    loop {
        let event = timeout(PATIENCE, events.next()).await.expect("no event comes").expect("the subscription ended");
        if matches!(event, Event::Update { .. } | Event::Gone { .. }) {
            return event;
        }
    }
}

/// A program that uses the bucket without nkv.
#[derive(Debug)]
pub(crate) struct Other {
    pub(crate) client: async_nats::Client,
    bucket: String,
}

impl Other {
    pub(crate) async fn api(&self, verb: &str, body: Value) -> Value {
        let subject = format!("$JS.API.{verb}").replace("BUCKET", &format!("KV_{}", self.bucket));
        let answer = self.client.request(subject, body.to_string().into()).await.unwrap();
        serde_json::from_slice(&answer.payload).unwrap()
    }

    /// Makes the bucket as `nats kv add` does, with other settings here and there.
    pub(crate) async fn create(&self, settings: Value) {
        let mut config = json!({
            "name": format!("KV_{}", self.bucket), "subjects": [format!("$KV.{}.>", self.bucket)],
            "max_msgs_per_subject": 1, "discard": "new", "retention": "limits", "storage": "file", "num_replicas": 1,
            "max_msgs": -1, "max_bytes": -1, "max_msg_size": -1, "max_consumers": -1, "max_age": 0,
            "allow_rollup_hdrs": true, "deny_delete": true, "allow_direct": true, "duplicate_window": 120_000_000_000_u64,
        });
        for (name, value) in settings.as_object().unwrap() {
            config[name] = value.clone();
        }
        let answer = self.api("STREAM.CREATE.BUCKET", config).await;
        assert!(answer.get("error").is_none(), "{answer}");
    }

    pub(crate) async fn state(&self) -> Value {
        self.api("STREAM.INFO.BUCKET", json!({})).await["state"].clone()
    }

    pub(crate) async fn publish(&self, key: &str, headers: &[(&str, &str)], value: &str) -> Value {
        let mut map = async_nats::HeaderMap::new();
        headers.iter().for_each(|(name, value)| map.insert(*name, *value));
        let subject = format!("$KV.{}.{key}", self.bucket);
        let answer = self.client.request_with_headers(subject, map, value.to_owned().into()).await.unwrap();
        serde_json::from_slice(&answer.payload).unwrap()
    }

    /// As `nats kv put` does.
    pub(crate) async fn put(&self, key: &str, value: &str) -> u64 {
        self.publish(key, &[], value).await["seq"].as_u64().unwrap()
    }

    /// As `nats kv del` does.
    pub(crate) async fn delete(&self, key: &str) -> u64 {
        self.publish(key, &[("KV-Operation", "DEL")], "").await["seq"].as_u64().unwrap()
    }

    /// As `nats kv get` does.
    pub(crate) async fn get(&self, key: &str) -> Option<String> {
        let body = json!({ "last_by_subj": format!("$KV.{}.{key}", self.bucket) });
        let answer = self.api("STREAM.MSG.GET.BUCKET", body).await;
        let message = answer.get("message")?;
        if message.get("hdrs").is_some() {
            return None;
        }
        use base64::Engine as _;
        let data = message.get("data").and_then(Value::as_str).unwrap_or_default();
        Some(String::from_utf8(base64::engine::general_purpose::STANDARD.decode(data).unwrap()).unwrap())
    }
}

/// What lies between a node and a server.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) port: u16,
    way: tokio::sync::watch::Sender<Way>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Open,
    /// What the server sends does not arrive; the other way round all does.
    Deaf,
    /// Connections end, and others are not taken.
    Cut,
}

impl Proxy {
    pub(crate) async fn start(to: u16) -> Self {
        Self::to(format!("127.0.0.1:{to}")).await
    }

    pub(crate) async fn to(server: String) -> Self {
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let way = tokio::sync::watch::Sender::new(Way::Open);
        let of_task = way.clone();
        let task = tokio::spawn(async move {
            loop {
                let Ok((client, _)) = listener.accept().await else { continue };
                if *of_task.borrow() == Way::Cut {
                    continue;
                }
                let Ok(server) = tokio::net::TcpStream::connect(&*server).await else { continue };
                tokio::spawn(pass(client, server, of_task.subscribe()));
            }
        });
        Proxy { port, way, task }
    }

    pub(crate) fn set(&self, way: Way) {
        self.way.send_replace(way);
    }

    /// How many connections pass through it.
    pub(crate) fn connections(&self) -> usize {
        self.way.receiver_count()
    }

    pub(crate) fn options(&self) -> Options {
        Options::new([format!("127.0.0.1:{}", self.port)], "test").unwrap()
    }

    pub(crate) fn engine(&self) -> NatsEngine {
        NatsEngine::new(self.options())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(
    mut client: tokio::net::TcpStream,
    mut server: tokio::net::TcpStream,
    mut way: tokio::sync::watch::Receiver<Way>,
) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    let (mut up, mut down) = (vec![0; 65_536], vec![0; 65_536]);
    loop {
        let now = *way.borrow_and_update();
        if now == Way::Cut {
            return;
        }
        tokio::select! {
            _ = way.changed() => {}
            read = from_client.read(&mut up) => match read {
                Ok(len @ 1..) if to_server.write_all(&up[..len]).await.is_ok() => {}
                _ => return,
            },
            read = from_server.read(&mut down), if now == Way::Open => match read {
                Ok(len @ 1..) if to_client.write_all(&down[..len]).await.is_ok() => {}
                _ => return,
            },
        }
    }
}
