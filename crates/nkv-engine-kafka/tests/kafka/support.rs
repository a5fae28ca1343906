//! A broker, a program with Kafka's own client beside it, and a proxy that can cut.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::{SocketAddr, TcpStream as StdStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};
use std::time::{Duration, Instant};

use nkv_core::Key;
use nkv_engine_kafka::{KafkaEngine, Options};
use nkv_node::{Handle, Node};
use nkv_testkit::port::free_port;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Where Kafka's libraries are; `None` with a line that says so, or a panic where all tests have to run.
pub(crate) fn kafka() -> Option<PathBuf> {
    // What the node says is part of what a failed test says.
    drop(tracing_subscriber::fmt().with_test_writer().try_init());
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/servers/kafka");
    let dir = std::env::var_os("NKV_KAFKA").map_or(target, PathBuf::from);
    if dir.join("libs").is_dir() {
        return Some(dir.join("libs/*"));
    }
    let hint = "no Kafka: set NKV_KAFKA, or run scripts/servers-kafka.sh target/servers/kafka";
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{hint}");
    println!("SKIPPED: {hint}");
    None
}

fn java(libs: &Path) -> Command {
    let mut command = Command::new("java");
    command.args(["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xmx384m", "-cp"]).arg(libs);
    command
}

/// How many proxies a broker can have at a time.
pub(crate) const PROXIES: usize = 3;

/// A broker in a process of its own, which ends with this one whatever happens.
pub(crate) struct Broker {
    libs: PathBuf,
    dir: TempDir,
    pub(crate) port: u16,
    /// Of the listeners that name a proxy as their address, and of these.
    proxied: [(u16, u16); PROXIES],
    /// Of the listener with TLS, that wants a certificate and a user.
    #[cfg_attr(not(feature = "tls"), expect(dead_code))]
    pub(crate) secure: u16,
    running: Option<Running>,
}

struct Running {
    shell: Child,
    pid: Pid,
    /// While it is open, the broker runs. At its end the directory is removed, unless `keep` was written before.
    life: ChildStdin,
}

impl Broker {
    /// The broker of the cluster with this identity, of 22 characters.
    pub(crate) fn start(libs: &Path, cluster: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (port, controller, secure) = (free_port(), free_port(), free_port());
        let proxied = [(); PROXIES].map(|()| (free_port(), free_port()));
        let of_proxies = |line: &dyn Fn(usize, (u16, u16)) -> String| -> String {
            proxied.iter().enumerate().map(|(number, ports)| line(number, *ports)).collect()
        };
        let listen = of_proxies(&|number, (listener, _)| format!("PROXIED{number}://127.0.0.1:{listener},"));
        let advertise = of_proxies(&|number, (_, proxy)| format!("PROXIED{number}://127.0.0.1:{proxy},"));
        let plain = of_proxies(&|number, _| format!("PROXIED{number}:PLAINTEXT,"));
        let path = dir.path().display();
        let certify = |name: &str| {
            let one = rcgen::generate_simple_self_signed(vec!["localhost".into(), "127.0.0.1".into()]).unwrap();
            let (chain, key) = (one.cert.pem(), one.signing_key.serialize_pem());
            fs::write(dir.path().join(format!("{name}.pem")), &chain).unwrap();
            fs::write(dir.path().join(format!("{name}.key")), &key).unwrap();
            fs::write(dir.path().join(format!("{name}.both")), key + &chain).unwrap();
        };
        ["broker", "client", "stranger"].into_iter().for_each(certify);
        let module = "org.apache.kafka.common.security";
        let properties = format!(
            "process.roles=broker,controller\nnode.id=1\ncontroller.quorum.voters=1@127.0.0.1:{controller}\n\
             listeners=PLAIN://127.0.0.1:{port},{listen}SECURE://127.0.0.1:{secure},\
             CONTROLLER://127.0.0.1:{controller}\n\
             advertised.listeners=PLAIN://127.0.0.1:{port},{advertise}SECURE://127.0.0.1:{secure}\n\
             listener.security.protocol.map=PLAIN:PLAINTEXT,{plain}SECURE:SASL_SSL,\
             CONTROLLER:PLAINTEXT\n\
             ssl.keystore.type=PEM\nssl.keystore.location={path}/broker.both\nssl.client.auth=required\n\
             ssl.truststore.type=PEM\nssl.truststore.location={path}/client.pem\n\
             listener.name.secure.ssl.client.auth=required\n\
             sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512\n\
             listener.name.secure.plain.sasl.jaas.config={module}.plain.PlainLoginModule required user_nkv=\"secret\";\n\
             listener.name.secure.scram-sha-256.sasl.jaas.config={module}.scram.ScramLoginModule required;\n\
             listener.name.secure.scram-sha-512.sasl.jaas.config={module}.scram.ScramLoginModule required;\n\
             inter.broker.listener.name=PLAIN\ncontroller.listener.names=CONTROLLER\nlog.dirs={path}/data\n\
             offsets.topic.replication.factor=1\noffsets.topic.num.partitions=1\n\
             transaction.state.log.replication.factor=1\ntransaction.state.log.min.isr=1\n\
             transaction.state.log.num.partitions=1\ngroup.initial.rebalance.delay.ms=0\n\
             broker.session.timeout.ms=2000\nbroker.heartbeat.interval.ms=500\n\
             auto.create.topics.enable=true\nnum.partitions=3\nlog.cleaner.backoff.ms=200\n\
             log.cleaner.dedupe.buffer.size=4194304\nlog.segment.delete.delay.ms=500\n"
        );
        fs::write(dir.path().join("server.properties"), properties).unwrap();
        let mut broker = Broker { libs: libs.to_owned(), dir, port, proxied, secure, running: None };
        let format = java(libs)
            .args(["kafka.tools.StorageTool", "format", "-t", cluster, "-c"])
            .arg(broker.path("server.properties"))
            .args(["--add-scram", "SCRAM-SHA-256=[name=nkv,password=secret]"])
            .args(["--add-scram", "SCRAM-SHA-512=[name=nkv,password=secret]"])
            .output();
        assert!(format.unwrap().status.success(), "the directory of the broker cannot be made");
        broker.run();
        broker
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Starts it, again if it ran before.
    pub(crate) fn run(&mut self) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("log")).unwrap();
        let script =
            r#"java "$@" & echo $! > "$PID_FILE"; read word; kill -9 $!; wait $!; [ "$word" = keep ] || rm -rf "$DIR""#;
        let pid_file = self.path("pid");
        drop(fs::remove_file(&pid_file));
        let mut shell = Command::new("sh")
            .args(["-c", script, "sh"])
            .args(java(&self.libs).get_args())
            .arg("kafka.Kafka")
            .arg(self.path("server.properties"))
            .env("PID_FILE", &pid_file)
            .env("DIR", self.dir.path())
            .stdin(Stdio::piped())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let life = shell.stdin.take().unwrap();
        let began = Instant::now();
        let address: SocketAddr = ([127, 0, 0, 1], self.port).into();
        // A port without a listener may be connected with itself.
        let listens = || StdStream::connect(address).is_ok_and(|stream| stream.local_addr().ok() != Some(address));
        while !listens() {
            assert!(began.elapsed() < PATIENCE, "the broker does not start: {}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
        let pid = fs::read_to_string(&pid_file).unwrap().trim().parse().ok().and_then(Pid::from_raw).unwrap();
        self.running = Some(Running { shell, pid, life });
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.running.as_ref().unwrap().pid, signal).unwrap();
    }

    /// Kills it without a warning.
    pub(crate) fn kill(&mut self) {
        if let Some(Running { mut shell, pid, mut life }) = self.running.take() {
            let _ = kill_process(pid, Signal::KILL);
            life.write_all(b"keep\n").unwrap();
            drop(life);
            shell.wait().unwrap();
        }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The broker that tests share, and the program beside it.
pub(crate) struct Shared {
    pub(crate) broker: Broker,
    pub(crate) foreign: Foreign,
    /// Held by the test that uses the proxy.
    pub(crate) proxy: tokio::sync::Mutex<()>,
}

pub(crate) fn shared() -> Option<&'static Shared> {
    static SHARED: OnceLock<Shared> = OnceLock::new();
    let libs = kafka()?;
    let start = || {
        let broker = Broker::start(&libs, "AAAAAAAAAAAAAAAAAAAAAA");
        let foreign = Foreign::start(&libs, &broker.address());
        Shared { broker, foreign, proxy: tokio::sync::Mutex::default() }
    };
    Some(SHARED.get_or_init(start))
}

impl Shared {
    /// A topic that no other test uses.
    pub(crate) fn topic(&self) -> String {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        format!("topic-{}", COUNT.fetch_add(1, Ordering::Relaxed))
    }

    pub(crate) fn options(&self, topic: &str) -> Options {
        Options::new([self.broker.address()], topic).unwrap()
    }

    pub(crate) fn engine(&self, topic: &str) -> KafkaEngine {
        KafkaEngine::new(self.options(topic))
    }

    pub(crate) async fn node(&self, topic: &str) -> (Node, Handle) {
        ready(self.engine(topic)).await
    }
}

/// A node with an engine, once it is level.
pub(crate) async fn ready(engine: KafkaEngine) -> (Node, Handle) {
    let node = Node::builder().engine(engine).start().await.unwrap();
    let nkv = node.handle();
    healthy(&nkv).await;
    (node, nkv)
}

pub(crate) async fn healthy(nkv: &Handle) {
    until("the node is level", async || nkv.health().await.is_ok()).await;
}

pub(crate) async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !is_so().await {
            sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(timeout(PATIENCE, wait).await.is_ok(), "it does not come to that: {what}");
}

pub(crate) async fn value(nkv: &Handle, key: &str) -> Option<String> {
    nkv.get(key).await.unwrap().map(|entry| String::from_utf8(entry.value.to_vec()).unwrap())
}

pub(crate) async fn shows(nkv: &Handle, key: &str, expected: Option<&str>) {
    until(&format!("{key} is {expected:?}"), async || value(nkv, key).await.as_deref() == expected).await;
}

pub(crate) fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

/// The program beside nkv: Foreign.java.
pub(crate) struct Foreign(Mutex<Program>);

struct Program {
    child: Child,
    input: ChildStdin,
    answers: mpsc::Receiver<String>,
}

impl Foreign {
    pub(crate) fn start(libs: &Path, address: &str) -> Self {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kafka/Foreign.java");
        let mut child =
            java(libs).arg(source).arg(address).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (answer, answers) = mpsc::channel();
        std::thread::spawn(move || {
            let lines = BufReader::new(output).lines().map_while(Result::ok);
            lines.take_while(|line| answer.send(line.clone()).is_ok()).for_each(drop);
        });
        let ready = answers.recv_timeout(PATIENCE);
        assert_eq!(ready.as_deref(), Ok("ready"));
        Foreign(Mutex::new(Program { child, input, answers }))
    }

    /// Does a command, and gives what it printed.
    pub(crate) fn run(&self, words: &[&str]) -> String {
        let mut program = self.0.lock().unwrap();
        writeln!(program.input, "{}", words.join("\t")).unwrap();
        let answer = program.answers.recv_timeout(PATIENCE);
        answer.unwrap_or_else(|error| panic!("{words:?}: {error}")).trim_end().to_owned()
    }

    /// The same, for what has to succeed.
    pub(crate) fn done(&self, words: &[&str]) -> String {
        let answer = self.run(words);
        assert!(!answer.starts_with("error"), "{words:?}: {answer}");
        answer
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let Program { child, .. } = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        drop(child.kill());
        drop(child.wait());
    }
}

/// What a proxy does with what comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Open,
    /// Nothing passes, and connections stay open.
    Silent,
    /// What is written arrives, and no answer comes back.
    Deaf,
    /// Connections end, and none is taken.
    Cut,
    /// What the broker sends comes slowly: some 300 kB a second.
    Slow,
}

/// Stands between a node and the shared broker.
pub(crate) struct Proxy {
    pub(crate) way: watch::Sender<Way>,
    port: u16,
    task: tokio::task::JoinHandle<()>,
}

impl Proxy {
    /// The one of this number.
    pub(crate) async fn start(broker: &Broker, number: usize) -> Self {
        let (to, port) = broker.proxied[number];
        let way = watch::Sender::new(Way::Open);
        let bound = async {
            // The task of the proxy before may have it for a moment yet.
            loop {
                match TcpListener::bind(("127.0.0.1", port)).await {
                    Err(error) if error.kind() == ErrorKind::AddrInUse => sleep(Duration::from_millis(5)).await,
                    bound => break bound.unwrap(),
                }
            }
        };
        let listener = timeout(PATIENCE, bound).await.expect("the port of the proxy is free");
        let ways = way.clone();
        let task = tokio::spawn(async move {
            while let Ok((inner, _)) = listener.accept().await {
                let ways = ways.clone();
                if *ways.borrow() == Way::Cut {
                    continue;
                }
                tokio::spawn(async move {
                    // Where no broker listens, there is no connection.
                    let Ok(outer) = TcpStream::connect(("127.0.0.1", to)).await else { return };
                    let (from_inner, to_inner) = inner.into_split();
                    let (from_outer, to_outer) = outer.into_split();
                    let mut cut = ways.subscribe();
                    let both = async {
                        tokio::join!(
                            pass(from_inner, to_outer, &ways, |way| way != Way::Silent),
                            pass(from_outer, to_inner, &ways, |way| matches!(way, Way::Open | Way::Slow)),
                        )
                    };
                    tokio::select! {
                        _ = both => {}
                        _ = cut.wait_for(|way| *way == Way::Cut) => {}
                    }
                });
            }
        });
        Proxy { way, port, task }
    }

    pub(crate) fn options(&self, topic: &str) -> Options {
        Options::new([format!("127.0.0.1:{}", self.port)], topic).unwrap()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Copies; what may not pass now is lost, as the connection is when it may again.
async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    ways: &watch::Sender<Way>,
    passes: fn(Way) -> bool,
) {
    let mut way = ways.subscribe();
    let mut buffer = vec![0; 64 << 10];
    while let Ok(len @ 1..) = from.read(&mut buffer).await {
        if !passes(*way.borrow()) {
            drop(way.wait_for(|way| passes(*way)).await);
            return;
        }
        // Short enough that the connection is not taken for dead.
        for part in buffer[..len].chunks(if *way.borrow() == Way::Slow { 15_000 } else { len }) {
            if *way.borrow() == Way::Slow {
                sleep(Duration::from_millis(50)).await;
            }
            if to.write_all(part).await.is_err() {
                return;
            }
        }
    }
}
