//! `nkv-server [ADDR]`: the server as a program.
//!
//! Everything it says goes to stderr; its exit code shows what kind of thing went wrong.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

mod args;
#[cfg(feature = "cluster")]
mod cluster;
#[cfg(feature = "engines")]
mod engine;
#[cfg(feature = "engines")]
mod import;
mod log;
#[cfg(all(feature = "grpc", feature = "cluster"))]
mod mesh;
mod signals;

use std::error::Error;
use std::io::{self, ErrorKind, Write};
use std::net::IpAddr;
use std::pin::Pin;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use nkv_core::{Epoch, Key, NoPersist, PersistError, PersistErrorKind, PersistValue, RoutePersist};
use nkv_node::Chain;
use nkv_persist_fs::{FsOptions, FsPersist, check, repair, restore};
#[cfg(feature = "engines")]
use nkv_server::Options;
use nkv_server::{Address, Builder, Server, ServerError};
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::args::{Args, Command, Persist};
use crate::log::{FLUSH_LIMIT, Log};
use crate::signals::Asked;

/// The command line makes no sense, or asks for what must be asked for otherwise.
const USAGE: u8 = 2;
/// The stored data is damaged.
const DAMAGED: u8 = 65;
/// Another process has the data directory.
const IN_USE: u8 = 73;
/// Reading, writing or listening failed.
const IO: u8 = 74;

fn main() -> ExitCode {
    let args = Args::read();
    let log = match Log::start(args.log_level, args.log_format) {
        Ok(log) => log,
        Err(error) => {
            say(&format!("nkv-server: cannot start a thread: {error}\n"));
            return ExitCode::from(IO);
        }
    };
    let code = match args.command {
        Some(Command::Check { repair }) => check_data(&args, repair),
        Some(Command::Restore) => restore_data(&args),
        #[cfg(feature = "engines")]
        Some(Command::Import { ref dir, ref engine }) => import_data(dir, engine),
        None => serve(&args, &log),
    };
    log.flush(FLUSH_LIMIT);
    code
}

fn serve(args: &Args, log: &Log) -> ExitCode {
    match try_serve(args, log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = code_of(&error);
            let dir = args.data_dir().ok().filter(|_| code == DAMAGED);
            let hint = dir.map(|dir| format!("; see `nkv-server check --data-dir {}`", dir.display()));
            fail_with_hint(&error, &hint.unwrap_or_default(), code)
        }
    }
}

fn try_serve(args: &Args, log: &Log) -> Result<(), ServerError> {
    // Before anything is opened: a signal must find a listener.
    let asked = signals::listen(log.clone()).map_err(ServerError::System)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ServerError::System)?;
    let served = runtime.block_on(run(args, asked));
    // Storage that is still being read, because a signal came first, is not waited for.
    runtime.shutdown_background();
    served
}

async fn run(args: &Args, asked: Asked) -> Result<(), ServerError> {
    let Asked { mut stop, reread } = asked;
    info!(version = %env!("CARGO_PKG_VERSION"), "nkv-server");
    let (mut server, end) = tokio::select! {
        started = start(args, reread) => started?,
        _ = &mut stop => return Ok(()), // nothing was accepted yet
    };
    let ended = tokio::select! {
        ended = server.failed() => Some(ended),
        _ = stop => None,
    };
    if let Some(end) = end
        && tokio::time::timeout(END_LIMIT, end).await.is_err()
    {
        warn!("peers did not hear in time that this node ends");
    }
    if let Some(ended) = ended {
        return ended;
    }
    server.shutdown().await?;
    info!("stopped");
    Ok(())
}

/// What is to be done before the server stops.
type End = Option<Pin<Box<dyn Future<Output = ()>>>>;

/// How long that may take.
const END_LIMIT: Duration = Duration::from_secs(2);

/// Opens and loads the data, listens, and says what an operator looks for. With `reread`, files are to be read again.
#[cfg_attr(not(feature = "cluster"), expect(unused_variables, reason = "no other part has a file that is read again"))]
async fn start(args: &Args, reread: watch::Receiver<()>) -> Result<(Server, End), ServerError> {
    let mut builder = Server::builder().options(args.options());
    for address in args.addresses() {
        builder = builder.listen(address);
    }
    #[cfg(feature = "http")]
    {
        let mut options = nkv_server::nkv_http::Options::default();
        options.hosts.clone_from(&args.http_host);
        options.allowed_origins.clone_from(&args.http_allow_origin);
        builder = builder.http_options(options);
        builder = args.http.iter().cloned().fold(builder, Builder::http);
        builder = args.metrics.iter().cloned().fold(builder, Builder::metrics);
    }
    #[cfg(feature = "grpc")]
    let builder = args.grpc.iter().cloned().fold(builder, Builder::grpc);
    let opened = Arc::new(OnceLock::new());
    #[cfg(feature = "engines")]
    let (builder, beside) = match args.engine.engine.as_deref() {
        Some(url) => args.engine.choose(url, args.options().value_len_max).await?.followed_by(builder),
        None => (with_persist(builder, args, Arc::clone(&opened))?, None),
    };
    #[cfg(not(feature = "engines"))]
    let builder = with_persist(builder, args, Arc::clone(&opened))?;
    #[cfg(not(feature = "cluster"))]
    let end: End = None;
    #[cfg(feature = "cluster")]
    let (builder, joined) = join(builder, args, reread).await?;
    let server = builder.bind().await?;
    #[cfg(all(feature = "grpc", feature = "cluster"))]
    if joined.is_some() && args.cluster.cluster.is_none() {
        mesh::wait_until_begun(&server.handle()).await;
    }
    #[cfg(feature = "cluster")]
    let end: End = joined.map(|joined| -> Pin<Box<dyn Future<Output = ()>>> { Box::pin(joined.leave()) });
    #[cfg(feature = "engines")]
    if let Some(beside) = beside {
        beside(server.handle());
    }
    if let (Some(opened), Ok(numbers)) = (opened.get(), server.handle().numbers()) {
        let load_ms = u64::try_from(opened.elapsed().as_millis()).unwrap_or(u64::MAX);
        let number = |name| numbers.iter().find(|(known, _)| *known == name).map_or(0, |(_, number)| *number);
        info!(keys = number("keys"), revision = number("revision"), load_ms, "loaded");
    }
    for address in server.addresses() {
        info!("listening at {address}");
        warn_if_open(address);
    }
    #[cfg(feature = "http")]
    {
        for address in server.http_addresses() {
            info!("serving HTTP at {address}");
            warn_if_open(address);
        }
        for address in server.metrics_addresses() {
            info!("serving figures at {address}");
            warn_if_open(address);
        }
    }
    #[cfg(feature = "grpc")]
    for address in server.grpc_addresses() {
        info!("serving gRPC at {address}");
        warn_if_open(address);
    }
    Ok((server, end))
}

/// Makes the server a node of a cluster, or of nkv in a mesh, if it is to be one.
#[cfg(feature = "cluster")]
async fn join(
    builder: Builder,
    args: &Args,
    reread: watch::Receiver<()>,
) -> Result<(Builder, Option<cluster::Joined>), ServerError> {
    let options = args.options();
    let (insecure, value_len_max) = (options.insecure, options.value_len_max);
    let clock_file = || -> Result<_, PersistError> {
        Ok(if args.persist == Persist::Log { Some(args.data_dir()?.join("cluster-clock")) } else { None })
    };
    if let Some(name) = args.cluster.cluster.as_deref() {
        let joined = args.cluster.join(name, insecure, value_len_max, clock_file()?, reread).await?;
        let cluster = joined.cluster.clone();
        return Ok((builder.node(|node| node.engine(cluster)), Some(joined)));
    }
    #[cfg(feature = "grpc")]
    if let Some(mesh) = args.mesh().map_err(usage)? {
        let (joined, sync) = args.cluster.join_mesh(&mesh.host, insecure, value_len_max, clock_file()?).await?;
        let cluster = joined.cluster.clone();
        let mut options = nkv_server::nkv_grpc::Options::default();
        (options.peers, options.own_address, options.mesh_sync) = (mesh.peers, Some(mesh.own), Some(sync));
        return Ok((builder.node(|node| node.engine(cluster)).grpc_options(options), Some(joined)));
    }
    Ok((builder, None))
}

fn warn_if_open(address: &Address) {
    if let Address::Tcp { host, .. } = address
        && host.parse().is_ok_and(|ip: IpAddr| !ip.to_canonical().is_loopback())
    {
        warn!("{address} is open to other hosts (--insecure), and clients are not asked who they are");
    }
}

/// `opened` becomes when the opening began.
fn with_persist(builder: Builder, args: &Args, opened: Arc<OnceLock<Instant>>) -> Result<Builder, ServerError> {
    let default = args.persist;
    let (kept, elsewhere): (Vec<_>, Vec<_>) = args.branch.iter().cloned().partition(|(_, kind)| *kind == default);
    let branches = |of: Vec<(Key, Persist)>| of.into_iter().map(|(branch, _)| branch).collect::<Vec<_>>();
    let (kept, elsewhere) = (branches(kept), branches(elsewhere));
    if default == Persist::Memory && elsewhere.is_empty() {
        info!(durability = "memory", "values live in memory only and are gone at the end");
        return Ok(builder);
    }
    let (dir, durability) = (args.data_dir()?, args.durability);
    let options = FsOptions::default().with_durability(durability).with_group_access(args.group_access);
    let builder = builder.clock_file(dir.join("clock"));
    let (log, memory) = (durability.to_string(), "memory".to_owned());
    let (first, other) = if default == Persist::Log { (log, memory) } else { (memory, log) };
    let list = |branches: &[Key]| branches.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let words = if elsewhere.is_empty() { first } else { format!("{first}; {}: {other}", list(&elsewhere)) };
    let words =
        if kept.is_empty() || elsewhere.is_empty() { words } else { format!("{words}; {}: as the rest", list(&kept)) };
    Ok(builder.persist(words.clone(), move || {
        opened.get_or_init(Instant::now);
        let log = FsPersist::open(&dir, options)?;
        info!(data_dir = %dir.display(), durability = words, "data directory opened");
        if elsewhere.is_empty() {
            return Ok(Box::new(log) as Box<dyn PersistValue>);
        }
        // What is forgotten begins anew each time.
        let memory = NoPersist::new(Epoch::new(random()?));
        let routes = match default {
            Persist::Log => RoutePersist::new(log).route_all(elsewhere, memory),
            Persist::Memory => RoutePersist::new(memory).route_all(elsewhere, log),
        };
        Ok(Box::new(kept.into_iter().fold(routes, RoutePersist::keep)))
    }))
}

fn random() -> Result<u128, PersistError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| {
        PersistError::new(PersistErrorKind::Io, "the system gives no random numbers")
            .with_source(io::Error::other(error.to_string()))
    })?;
    Ok(u128::from_ne_bytes(bytes))
}

fn check_data(args: &Args, with_repair: bool) -> ExitCode {
    let report = args.data_dir().and_then(|dir| if with_repair { repair(dir) } else { check(dir) });
    match report {
        Ok(report) => {
            say(&report.to_string());
            if report.damage.is_some() && !with_repair { ExitCode::from(DAMAGED) } else { ExitCode::SUCCESS }
        }
        Err(error) => fail(&error, persist_code(&error)),
    }
}

fn restore_data(args: &Args) -> ExitCode {
    match args.data_dir().and_then(restore) {
        Ok(report) => {
            info!(epoch = %report.epoch, keys = report.keys, revision = report.revision.get(), "a new epoch begins");
            ExitCode::SUCCESS
        }
        Err(error) => fail(&error, persist_code(&error)),
    }
}

/// How long an engine may take to be in reach.
#[cfg(feature = "engines")]
const ENGINE_LIMIT: Duration = Duration::from_secs(30);

#[cfg(feature = "engines")]
fn import_data(dir: &std::path::Path, engine: &engine::EngineArgs) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ServerError::System);
    match runtime.and_then(|runtime| runtime.block_on(try_import(dir, engine))) {
        Ok(keys) => {
            info!(keys, "imported; the directory holds them as before");
            ExitCode::SUCCESS
        }
        Err(error) => fail(&error, code_of(&error)),
    }
}

#[cfg(feature = "engines")]
async fn try_import(dir: &std::path::Path, engine: &engine::EngineArgs) -> Result<u64, ServerError> {
    let url = engine.engine.as_deref().ok_or_else(|| usage("import needs --engine URL"))?;
    if engine.kafka_log.is_some() {
        return Err(usage("--kafka-log is for a server: import writes the topic of the state alone"));
    }
    // Opening would make one that is missing, and would not say what a repair loses.
    if let Some(damage) = check(dir)?.damage {
        let context = format!("{}: {damage}; see `nkv-server check --data-dir {0}`", dir.display());
        return Err(PersistError::new(PersistErrorKind::Damaged, context).into());
    }
    let mut options = Options::default();
    options.value_len_max = Options::VALUE_LEN_MAX;
    let (builder, _) =
        engine.choose(url, Options::VALUE_LEN_MAX).await?.followed_by(Server::builder().options(options));
    let to = builder.bind().await?;
    let (kept, clock) = (dir.to_owned(), dir.join("clock"));
    let from = Server::builder().options(options).clock_file(clock);
    let from =
        from.persist("sync", move || FsPersist::open(&kept, FsOptions::default()).map(import::Kept)).bind().await?;
    let (from, nkv) = (from.handle(), to.handle());
    let failed = |error: &dyn Error| ServerError::System(io::Error::other(Chain(error).to_string()));
    let reached = async {
        while nkv.health().await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    if tokio::time::timeout(ENGINE_LIMIT, reached).await.is_err() {
        let state = nkv.health().await.err().map_or_else(String::new, |error| format!(": {error}"));
        let what = format!("the engine is not in reach after {ENGINE_LIMIT:?}{state}");
        return Err(ServerError::System(io::Error::new(ErrorKind::TimedOut, what)));
    }
    import::import(&from, &nkv).await.map_err(|error| failed(&error))
}

/// Writes to stderr, if that takes it.
fn say(text: &str) {
    drop(std::io::stderr().lock().write_all(text.as_bytes()));
}

fn fail(error: &dyn Error, code: u8) -> ExitCode {
    fail_with_hint(error, "", code)
}

/// One line of the log, whatever its level, from the outermost cause to the innermost.
fn fail_with_hint(error: &dyn Error, hint: &str, code: u8) -> ExitCode {
    error!(target: log::FATAL, "{}{hint}", Chain(error));
    ExitCode::from(code)
}

/// Flags that do not go together, or a value that none can have.
#[cfg(any(feature = "engines", feature = "cluster"))]
fn usage(what: impl Into<String>) -> ServerError {
    ServerError::System(io::Error::new(ErrorKind::InvalidInput, what.into()))
}

fn code_of(error: &ServerError) -> u8 {
    match error {
        ServerError::Insecure { .. } => USAGE,
        // Such as a path that no socket can have.
        ServerError::Bind { source, .. } if source.kind() == ErrorKind::InvalidInput => USAGE,
        // Such as a name for `--http-host` that is none.
        ServerError::System(source) if source.kind() == ErrorKind::InvalidInput => USAGE,
        ServerError::Persist(error) => persist_code(error),
        _ => IO,
    }
}

fn persist_code(error: &PersistError) -> u8 {
    match error.kind() {
        PersistErrorKind::Damaged => DAMAGED,
        PersistErrorKind::InUse => IN_USE,
        PersistErrorKind::Rejected => USAGE,
        _ => IO,
    }
}
