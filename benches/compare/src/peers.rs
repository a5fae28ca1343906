//! The servers: how each is started, and how durable its answers are.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::thread;
use std::time::Duration;

use rustix::thread::CpuSet;

use crate::Result;
use crate::drivers::Protocol;
use crate::load;
use crate::pool::{Keys, Target};
use crate::sys::{self, SECOND, Server};

/// Bytes of the value that is asked for after a restart.
const VALUE: usize = 100;

/// A server that has not answered by then does not come up.
const START_LIMIT: u64 = 60 * SECOND;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Peer {
    NkvSync,
    NkvOs,
    NkvMemory,
    RedisAlways,
    RedisEverysec,
    RedisNone,
    Nats,
    Etcd,
    EtcdGateway,
    Echo,
    NkvHttp,
    NkvHttpSync,
    NkvWs,
    HttpEcho,
    NkvGrpc,
    NkvGrpcSync,
    GrpcEcho,
    NkvEtcd,
    NkvNats,
}

impl Peer {
    pub(crate) const ALL: [Peer; 19] = [
        Peer::NkvSync,
        Peer::NkvOs,
        Peer::NkvMemory,
        Peer::RedisAlways,
        Peer::RedisEverysec,
        Peer::RedisNone,
        Peer::Nats,
        Peer::Etcd,
        Peer::EtcdGateway,
        Peer::Echo,
        Peer::NkvHttp,
        Peer::NkvHttpSync,
        Peer::NkvWs,
        Peer::HttpEcho,
        Peer::NkvGrpc,
        Peer::NkvGrpcSync,
        Peer::GrpcEcho,
        Peer::NkvEtcd,
        Peer::NkvNats,
    ];

    /// Stands in the raw figures: stable.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Peer::NkvSync => "nkv sync",
            Peer::NkvOs => "nkv os",
            Peer::NkvMemory => "nkv memory",
            Peer::RedisAlways => "Redis always",
            Peer::RedisEverysec => "Redis everysec",
            Peer::RedisNone => "Redis no AOF",
            Peer::Nats => "NATS KV",
            Peer::Etcd => "etcd",
            Peer::EtcdGateway => "etcd JSON",
            Peer::Echo => "echo",
            Peer::NkvHttp => "nkv HTTP memory",
            Peer::NkvHttpSync => "nkv HTTP sync",
            Peer::NkvWs => "nkv WebSocket",
            Peer::HttpEcho => "HTTP echo",
            Peer::NkvGrpc => "nkv gRPC memory",
            Peer::NkvGrpcSync => "nkv gRPC sync",
            Peer::GrpcEcho => "gRPC echo",
            Peer::NkvEtcd => "nkv over etcd",
            Peer::NkvNats => "nkv over NATS",
        }
    }

    pub(crate) fn is_nkv(self) -> bool {
        matches!(self.name().split(' ').next(), Some("nkv"))
    }

    /// What must run behind it.
    pub(crate) fn engine(self) -> Option<Peer> {
        match self {
            Peer::NkvEtcd => Some(Peer::Etcd),
            Peer::NkvNats => Some(Peer::Nats),
            _ => None,
        }
    }

    /// What an answer to a put says.
    fn durability(self) -> &'static str {
        match self {
            Peer::NkvSync | Peer::NkvHttpSync | Peer::NkvGrpcSync => "on the disk (fdatasync)",
            Peer::RedisAlways | Peer::Etcd | Peer::EtcdGateway => "on the disk (fdatasync)",
            Peer::NkvEtcd | Peer::NkvNats => "as the engine says",
            Peer::NkvOs => "given to the system; on the disk when the system likes",
            Peer::RedisEverysec => "given to the system; on the disk within a second or two",
            Peer::Nats => "given to the system; on the disk within two minutes (the default)",
            Peer::NkvMemory | Peer::RedisNone | Peer::Echo => "nothing is stored",
            Peer::NkvHttp | Peer::NkvWs | Peer::HttpEcho | Peer::NkvGrpc | Peer::GrpcEcho => "nothing is stored",
        }
    }

    fn protocol(self) -> Protocol {
        match self {
            Peer::NkvSync | Peer::NkvOs | Peer::NkvMemory | Peer::NkvEtcd | Peer::NkvNats => Protocol::Nkv,
            Peer::RedisAlways | Peer::RedisEverysec | Peer::RedisNone => Protocol::Redis,
            Peer::Nats => Protocol::Nats,
            Peer::Etcd => Protocol::Etcd,
            Peer::EtcdGateway => Protocol::Gateway,
            Peer::Echo => Protocol::Echo,
            Peer::NkvHttp | Peer::NkvHttpSync | Peer::HttpEcho => Protocol::Http,
            Peer::NkvWs => Protocol::Ws,
            Peer::NkvGrpc | Peer::NkvGrpcSync | Peer::GrpcEcho => Protocol::Grpc,
        }
    }

    fn program(self, nkv: &Path) -> Option<PathBuf> {
        if matches!(self, Peer::HttpEcho | Peer::GrpcEcho) {
            return std::env::current_exe().ok();
        }
        match self.protocol() {
            Protocol::Nkv | Protocol::Http | Protocol::Ws | Protocol::Grpc => Some(nkv.to_owned()),
            Protocol::Redis => installed("redis-server"),
            Protocol::Nats => installed("nats-server"),
            Protocol::Etcd | Protocol::Gateway => installed("etcd"),
            Protocol::Echo => std::env::current_exe().ok(),
        }
    }

    /// The arguments, separated by spaces; `{addr}`, `{port}`, `{port2}`, `{dir}` and `{engine}` are filled in, `''` is an empty one.
    fn arguments(self) -> String {
        const REDIS: &str =
            "--bind 127.0.0.1 --port {port} --dir {dir} --daemonize no --loglevel warning --save '' --appendonly";
        match self {
            Peer::NkvSync => "{addr} --data-dir {dir} --log-level warn --durability sync".to_owned(),
            Peer::NkvOs => "{addr} --data-dir {dir} --log-level warn --durability os".to_owned(),
            Peer::NkvMemory => "{addr} --log-level warn --persist memory".to_owned(),
            Peer::RedisAlways => format!("{REDIS} yes --appendfsync always"),
            Peer::RedisEverysec => format!("{REDIS} yes --appendfsync everysec"),
            Peer::RedisNone => format!("{REDIS} no"),
            Peer::Nats => "-a 127.0.0.1 -p {port} -js -sd {dir}".to_owned(),
            Peer::Etcd | Peer::EtcdGateway => "--name default --data-dir {dir} --logger zap --log-level error \
                --listen-client-urls http://{addr} --advertise-client-urls http://{addr} \
                --listen-peer-urls http://127.0.0.1:{port2} --initial-advertise-peer-urls http://127.0.0.1:{port2} \
                --initial-cluster default=http://127.0.0.1:{port2} --quota-backend-bytes 8000000000"
                .to_owned(),
            Peer::Echo => "echo-server {addr}".to_owned(),
            Peer::NkvHttp | Peer::NkvWs => {
                "127.0.0.1:{port2} --http {addr} --log-level warn --persist memory".to_owned()
            }
            Peer::NkvHttpSync => {
                "127.0.0.1:{port2} --http {addr} --data-dir {dir} --log-level warn --durability sync".to_owned()
            }
            Peer::HttpEcho => "http-echo-server {addr}".to_owned(),
            Peer::NkvGrpc => "127.0.0.1:{port2} --grpc {addr} --log-level warn --persist memory".to_owned(),
            Peer::NkvGrpcSync => {
                "127.0.0.1:{port2} --grpc {addr} --data-dir {dir} --log-level warn --durability sync".to_owned()
            }
            Peer::GrpcEcho => "grpc-echo-server {addr}".to_owned(),
            Peer::NkvEtcd => "{addr} --log-level warn --engine etcd://{engine}/nkv".to_owned(),
            Peer::NkvNats => "{addr} --log-level warn --engine nats://{engine}/nkv".to_owned(),
        }
    }

    /// Program and version, arguments, durability: what a reader needs to judge the comparison. None if not installed.
    pub(crate) fn settings(self, nkv: &Path) -> Option<[String; 3]> {
        self.engine().map_or(Some(()), |engine| engine.program(nkv).map(drop))?;
        let program = self.program(nkv)?;
        let version = match self {
            Peer::Echo => "compare echo-server, one tokio thread".to_owned(),
            Peer::HttpEcho => "compare http-echo-server: axum, one tokio thread".to_owned(),
            Peer::GrpcEcho => "compare grpc-echo-server: tonic, one tokio thread".to_owned(),
            _ => {
                let output = Command::new(&program).arg("--version").output().ok()?.stdout;
                String::from_utf8_lossy(&output).lines().next().unwrap_or_default().to_owned()
            }
        };
        Some([version, self.arguments(), self.durability().to_owned()])
    }
}

fn installed(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/usr/local/bin", "/usr/local/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(usual).map(|dir| dir.join(program)).find(|program| program.is_file())
}

/// Where a server runs, and where its data is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Site<'a> {
    pub(crate) nkv: &'a Path,
    pub(crate) dir: &'a Path,
    pub(crate) cpus: &'a CpuSet,
}

/// A server that answers.
#[derive(Debug)]
pub(crate) struct Running {
    server: Server,
    /// It goes with the last of those in front of it.
    pub(crate) engine: Option<Rc<Running>>,
    pub(crate) target: Target,
    pub(crate) program: String,
    /// Seconds from its start to its first answer.
    pub(crate) first_answer_s: f64,
    data: PathBuf,
}

impl Running {
    /// Starts a server without data.
    pub(crate) fn start(peer: Peer, site: Site<'_>) -> Result<Running> {
        let engine = peer.engine().map(|engine| Running::start(engine, site)).transpose()?.map(Rc::new);
        let data = fresh(site.dir.join(peer.name().replace(' ', "-")))?;
        Running::start_in(data, peer, site, engine, None)
    }

    /// Starts another server in front of the same engine; it must have the key with this number.
    pub(crate) fn second(&self, peer: Peer, site: Site<'_>, key: usize) -> Result<Running> {
        Running::start_in(fresh(site.dir.join("second"))?, peer, site, self.engine.clone(), Some(key))
    }

    /// Starts the server again, on the data it has, its engine going on meanwhile; it must then have the key with this number.
    pub(crate) fn restart(self, peer: Peer, site: Site<'_>, key: usize) -> Result<Running> {
        let data = self.data.clone();
        self.server.stop();
        thread::sleep(Duration::from_millis(100));
        Running::start_in(data, peer, site, self.engine, Some(key))
    }

    fn start_in(
        data: PathBuf,
        peer: Peer,
        site: Site<'_>,
        engine: Option<Rc<Running>>,
        key: Option<usize>,
    ) -> Result<Running> {
        let program = peer.program(site.nkv).ok_or("not installed")?.to_string_lossy().into_owned();
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, sys::free_port()?));
        let (port, port2) = (addr.port().to_string(), sys::free_port()?.to_string());
        // A subdirectory: nkv wants to make its own.
        let dir = data.join("data");
        if !peer.is_nkv() {
            fs::create_dir_all(&dir)?;
        }
        let behind = engine.as_ref().map(|engine| engine.target);
        let fill = |argument: &str| {
            let engine = behind.map_or(String::new(), |engine| engine.addr.to_string());
            let argument = argument.replace("{engine}", &engine);
            let argument = argument.replace("{addr}", &addr.to_string()).replace("{dir}", &dir.to_string_lossy());
            argument.replace("{port2}", &port2).replace("{port}", &port).replace("''", "")
        };
        let command: Vec<String> =
            [program.clone()].into_iter().chain(peer.arguments().split_whitespace().map(fill)).collect();
        let log = site.dir.join(format!("{}.log", peer.name()));
        let mut server = Server::start(&command, site.cpus, &log)?;
        let target =
            Target { protocol: peer.protocol(), addr, pid: server.pid(), engine: behind.map(|engine| engine.pid) };
        loop {
            // Refused until it listens, and some answer late.
            let asked = match key {
                // Until it has the engine's state it answers, and takes nothing.
                None if engine.is_some() => load::fill(target, VALUE, Keys::plain(1)).map(|_| true),
                _ => load::ask(target, VALUE, key.is_none(), key.unwrap_or(0)),
            };
            match asked {
                Ok(found) if found || key.is_none() => break,
                _ if sys::now() > server.since + START_LIMIT => {
                    return Err(format!("{} does not answer", peer.name()).into());
                }
                _ => {}
            }
            if let Some(status) = server.ended() {
                let log = fs::read_to_string(&log).unwrap_or_default();
                return Err(format!("{} ended: {status}: {}", peer.name(), log.trim_end()).into());
            }
            thread::sleep(Duration::from_millis(1));
        }
        let first_answer_s = (sys::now() - server.since) as f64 / 1e9;
        Ok(Running { server, engine, target, program, first_answer_s, data })
    }

    /// Stops the server, and the engine if no other is in front of it, and removes their data.
    pub(crate) fn stop(self) -> Result<()> {
        self.server.stop();
        fs::remove_dir_all(&self.data)?;
        self.engine.and_then(Rc::into_inner).map_or(Ok(()), Running::stop)
    }
}

/// An empty directory.
fn fresh(dir: PathBuf) -> Result<PathBuf> {
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    fs::create_dir(&dir)?;
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readme_tells_how_each_server_is_started() {
        let readme = include_str!("../README.md");
        for peer in Peer::ALL.into_iter().filter(|peer| !matches!(peer, Peer::Echo | Peer::HttpEcho | Peer::GrpcEcho)) {
            let line = format!("\n{:<15} {}\n", peer.name(), peer.arguments());
            assert!(readme.contains(&line), "{line}");
        }
    }
}
