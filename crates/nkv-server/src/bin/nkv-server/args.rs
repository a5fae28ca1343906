//! The command line; each flag is also an environment variable `NKV_*`.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::Resettable;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::parser::ValueSource;
use clap::{Arg, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use nkv_core::{Key, PersistError, PersistErrorKind};
use nkv_persist_fs::Durability;
use nkv_server::{Address, Options};
use tracing::level_filters::LevelFilter;

#[cfg(feature = "cluster")]
use crate::cluster::ClusterArgs;
#[cfg(feature = "engines")]
use crate::engine::EngineArgs;

/// A notify key-value store: shared state that says when it changes.
///
/// Keeps values under dotted keys through crash and power loss, and brings each subscriber to their latest state.
#[derive(Debug, Parser)]
#[command(name = "nkv-server", version, args_conflicts_with_subcommands = true, after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Option<Command>,

    /// Where to listen: HOST:PORT or unix:PATH [default: 127.0.0.1:4222]
    #[arg(value_name = "ADDR")]
    address: Option<Address>,

    /// Listen here too; may be given more than once
    #[arg(long, alias = "addr", value_name = "ADDR", env = "NKV_LISTEN", value_delimiter = ',')]
    listen: Vec<Address>,

    /// Serve HTTP here: REST, server-sent events, WebSocket, a page; may be given more than once
    #[cfg(feature = "http")]
    #[arg(long, value_name = "ADDR", env = "NKV_HTTP", value_delimiter = ',')]
    pub(crate) http: Vec<Address>,

    /// A name that HTTP requests may give as their host, besides IP addresses and localhost; may be given more than once
    #[cfg(feature = "http")]
    #[arg(long, value_name = "NAME", env = "NKV_HTTP_HOST", value_delimiter = ',')]
    pub(crate) http_host: Vec<String>,

    /// An origin whose web pages may use the store, such as http://localhost:3000; may be given more than once
    #[cfg(feature = "http")]
    #[arg(long, value_name = "ORIGIN", env = "NKV_HTTP_ALLOW_ORIGIN", value_delimiter = ',')]
    pub(crate) http_allow_origin: Vec<String>,

    /// Serve health and figures alone here, by HTTP; may be given more than once
    #[cfg(feature = "http")]
    #[arg(long, value_name = "ADDR", env = "NKV_METRICS", value_delimiter = ',')]
    pub(crate) metrics: Vec<Address>,

    /// Serve gRPC here; at an ADDR of --http both share the port; may be given more than once
    #[cfg(feature = "grpc")]
    #[arg(long, value_name = "ADDR", env = "NKV_GRPC", value_delimiter = ',')]
    pub(crate) grpc: Vec<Address>,

    /// A server of the replicated gRPC store whose mesh this one joins: HOST:PORT; may be given more than once
    #[cfg(all(feature = "grpc", feature = "cluster"))]
    #[arg(long, value_name = "ADDR", env = "NKV_PEER", value_delimiter = ',', requires = "grpc", group = "nodes")]
    peer: Vec<String>,

    /// The address of --grpc as servers of that mesh see it, if that is another
    #[cfg(all(feature = "grpc", feature = "cluster"))]
    #[arg(long, value_name = "ADDR", env = "NKV_PEER_ADVERTISE", requires = "peer")]
    peer_advertise: Option<String>,

    #[cfg(feature = "engines")]
    #[command(flatten, next_help_heading = "Engines")]
    pub(crate) engine: EngineArgs,

    #[cfg(not(feature = "http"))]
    #[command(flatten)]
    without_http: WithoutHttp,

    #[cfg(feature = "cluster")]
    #[command(flatten, next_help_heading = "Cluster")]
    pub(crate) cluster: ClusterArgs,

    #[cfg(not(feature = "engines"))]
    #[command(flatten)]
    without_engines: WithoutEngines,

    #[cfg(not(feature = "cluster"))]
    #[command(flatten)]
    without_cluster: WithoutCluster,

    #[cfg(not(feature = "grpc"))]
    #[command(flatten)]
    without_grpc: WithoutGrpc,

    #[cfg(not(all(feature = "grpc", feature = "cluster")))]
    #[command(flatten)]
    without_mesh: WithoutMesh,

    /// Directory for the values [default: nkv in the user's data directory]
    #[arg(long, alias = "dir", value_name = "DIR", env = "NKV_DATA_DIR", global = true)]
    data_dir: Option<PathBuf>,

    /// Allow a data directory that its group may write to; files in it are made for the group too
    #[arg(long, env = "NKV_GROUP_ACCESS", value_parser = parse_flag)]
    pub(crate) group_access: bool,

    /// When a write is safe: sync (before it is answered), interval:DURATION (at most that long after), os (whenever
    /// the system likes; a crash of the server alone loses nothing)
    #[arg(long, value_name = "WHEN", env = "NKV_DURABILITY", default_value = "sync")]
    pub(crate) durability: Durability,

    /// Where values live
    #[arg(long, value_name = "KIND", env = "NKV_PERSIST", value_enum, default_value_t = Persist::Log)]
    pub(crate) persist: Persist,

    /// Where the values of a branch live, as --persist; the longest branch that covers a key counts; may be given more than once
    #[arg(long, value_name = "BRANCH=KIND", env = "NKV_BRANCH", value_delimiter = ',', value_parser = parse_branch)]
    pub(crate) branch: Vec<(Key, Persist)>,

    /// Connections at a time; others are refused
    #[arg(long, value_name = "N", env = "NKV_MAX_CONNECTIONS", default_value_t = Options::default().connections_max)]
    max_connections: usize,

    /// Connections at a time from one address; others are refused
    #[arg(long, value_name = "N", env = "NKV_MAX_CONNECTIONS_PER_ADDRESS",
          default_value_t = Options::default().connections_per_address_max)]
    max_connections_per_address: usize,

    /// Subscriptions of one connection
    #[arg(long, value_name = "N", env = "NKV_MAX_SUBSCRIPTIONS", default_value_t = Options::default().subscriptions_max)]
    max_subscriptions: usize,

    /// Subscriptions of all connections
    #[arg(long, value_name = "N", env = "NKV_MAX_SUBSCRIPTIONS_TOTAL",
          default_value_t = Options::default().subscriptions_total_max)]
    max_subscriptions_total: usize,

    /// What all connections may hold of incomplete requests, unread answers and changes that wait; past that,
    /// changes give way to fresh snapshots, or the one that holds most is closed: bytes, or with k, M
    #[arg(long, value_name = "SIZE", env = "NKV_MAX_QUEUED", default_value = "256M", value_parser = parse_size)]
    max_queued: usize,

    /// A connection that begins no request for this long is closed: with ms, s, m, h
    #[arg(long, value_name = "TIME", env = "NKV_FIRST_BYTE_LIMIT", default_value = "30s", value_parser = parse_time)]
    first_byte_limit: Duration,

    /// A request that is not whole after this time, and as long again for each MiB, ends its connection
    #[arg(long, value_name = "TIME", env = "NKV_REQUEST_LIMIT", default_value = "30s", value_parser = parse_time)]
    request_limit: Duration,

    /// A peer that takes no byte for this long is cut
    #[arg(long, value_name = "TIME", env = "NKV_STALL_LIMIT", default_value = "30s", value_parser = parse_time)]
    stall_limit: Duration,

    /// A connection without subscriptions that asks nothing for this long is closed [default: never]
    #[arg(long, value_name = "TIME", env = "NKV_IDLE_LIMIT", value_parser = parse_time)]
    idle_limit: Option<Duration>,

    /// Longest value, up to 8M: bytes, or with k, M
    #[arg(long, value_name = "SIZE", env = "NKV_MAX_VALUE_SIZE", default_value = "1M", value_parser = parse_value_size)]
    max_value_size: usize,

    /// Allow an address that other hosts reach; clients are not authenticated
    #[arg(long, env = "NKV_INSECURE", value_parser = parse_flag)]
    insecure: bool,

    /// The mode of a Unix socket, octal; the right to write is the right to connect [default: 600; with --socket-group, 660]
    #[arg(long, value_name = "MODE", env = "NKV_SOCKET_MODE", value_parser = parse_mode)]
    socket_mode: Option<u32>,

    /// The group of a Unix socket, as a name or a number
    #[arg(long, value_name = "GROUP", env = "NKV_SOCKET_GROUP", value_parser = parse_group)]
    socket_group: Option<u32>,

    /// How much to say on stderr: off, error, warn, info, debug, trace
    #[arg(long, alias = "level", value_name = "LEVEL", env = "NKV_LOG_LEVEL", default_value = "info",
          value_parser = parse_level)]
    pub(crate) log_level: LevelFilter,

    /// The first nkv wrote its log into a directory
    #[arg(long, hide = true, value_parser = |_: &str| Err::<(), _>("logs go to stderr: let the service manager keep them"))]
    logs: Option<()>,

    /// How to say it
    #[arg(long, value_name = "FORMAT", env = "NKV_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
}

/// What a build without this door says of its flags.
#[cfg(not(feature = "http"))]
#[derive(Debug, clap::Args)]
struct WithoutHttp {
    #[arg(long, hide = true, env = "NKV_HTTP", value_parser = |_: &str| Err::<(), _>("this build has no HTTP: build it with --features http"))]
    http: Option<()>,
    #[arg(long, hide = true, env = "NKV_METRICS", value_parser = |_: &str| Err::<(), _>("this build has no HTTP: build it with --features http"))]
    metrics: Option<()>,
}

#[cfg(not(feature = "grpc"))]
#[derive(Debug, clap::Args)]
struct WithoutGrpc {
    #[arg(long, hide = true, env = "NKV_GRPC", value_parser = |_: &str| Err::<(), _>("this build has no gRPC: build it with --features grpc"))]
    grpc: Option<()>,
}

#[cfg(not(all(feature = "grpc", feature = "cluster")))]
#[derive(Debug, clap::Args)]
struct WithoutMesh {
    #[arg(long, hide = true, env = "NKV_PEER", value_parser = |_: &str| Err::<(), _>("this build joins no mesh: build it with --features grpc,cluster"))]
    peer: Option<()>,
}

#[cfg(not(feature = "cluster"))]
#[derive(Debug, clap::Args)]
struct WithoutCluster {
    #[arg(long, hide = true, env = "NKV_CLUSTER", value_parser = |_: &str| Err::<(), _>("this build has no cluster: build it with --features cluster"))]
    cluster: Option<()>,
}

#[cfg(not(feature = "engines"))]
#[derive(Debug, clap::Args)]
struct WithoutEngines {
    #[arg(long, hide = true, env = "NKV_ENGINE", value_parser = |_: &str| Err::<(), _>("this build has no engines: build it with --features etcd, nats or kafka"))]
    engine: Option<()>,
}

/// A mesh of the replicated gRPC store.
#[cfg(all(feature = "grpc", feature = "cluster"))]
#[derive(Debug)]
pub(crate) struct Mesh {
    pub(crate) peers: Vec<String>,
    /// Where its servers reach this one.
    pub(crate) own: String,
    /// Where this one listens.
    pub(crate) host: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Say what is in the data directory, and whether it is damaged; changes nothing without --repair
    Check {
        /// Keep what can be read, and damaged parts aside, so that the server starts
        #[arg(long)]
        repair: bool,
    },
    /// Begin a new epoch in a data directory that was put back to an earlier state, so that clients notice
    Restore,
    /// Put what a data directory holds into an engine that is empty; what the directory holds stays there
    #[cfg(feature = "engines")]
    Import {
        /// The data directory of a server that does not run
        dir: PathBuf,
        #[command(flatten)]
        engine: Box<EngineArgs>,
    },
}

const EXAMPLES: &str = "\
Examples:
  nkv-server
  nkv-server localhost:4222 --data-dir /var/lib/nkv --durability interval:50ms
  nkv-server unix:/run/user/1000/nkv.sock --persist memory
  nkv-server unix:/run/nkv/nkv.sock --socket-group nkv
  nkv-server --http 127.0.0.1:8080
  nkv-server check --data-dir /var/lib/nkv
  nkv-server restore --data-dir /var/lib/nkv

A variable that is empty counts as not set; NKV_INSECURE and NKV_GROUP_ACCESS are true, false, 1 or 0.

Exit codes: 0 stopped on request, 2 usage, 65 damaged data, 73 data directory in use, 74 input or output failed";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Persist {
    /// In a log on disk
    Log,
    /// In memory only
    Memory,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// Lines for people
    Text,
    /// One JSON object a line
    Json,
}

impl Args {
    /// Reads the command line and the environment; an address on the former wins over `NKV_LISTEN`. A variable that is
    /// empty counts as not set.
    pub(crate) fn read() -> Self {
        let matches = without_empty_variables().try_get_matches();
        let matches = matches.unwrap_or_else(|error| with_variable(error, &without_empty_variables()).exit());
        let mut args = Args::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
        let twice = args
            .branch
            .iter()
            .enumerate()
            .find(|(at, (branch, _))| args.branch.iter().take(*at).any(|(known, _)| known == branch));
        if let Some((_, (branch, _))) = twice {
            let what = format!("--branch says of '{branch}' twice where it lives");
            without_empty_variables().error(ErrorKind::ArgumentConflict, what).exit();
        }
        #[cfg(feature = "engines")]
        if args.engine.engine.is_some() {
            let is_given = |id: &&str| matches.value_source(id) == Some(ValueSource::CommandLine);
            #[cfg(feature = "cluster")]
            if args.cluster.cluster.is_some() {
                let what = "--engine and --cluster: the truth is in the one or in the other";
                without_empty_variables().error(ErrorKind::ArgumentConflict, what).exit();
            }
            if let Some(id) = ["data_dir", "durability", "persist", "branch", "group_access"].into_iter().find(is_given)
            {
                let flag = id.replace('_', "-");
                let what = format!("--engine keeps all data in the engine: --{flag} says nothing beside it");
                without_empty_variables().error(ErrorKind::ArgumentConflict, what).exit();
            }
        }
        if args.address.is_some() && matches.value_source("listen") == Some(ValueSource::EnvVariable) {
            args.listen.clear();
        }
        args
    }

    pub(crate) fn addresses(&self) -> Vec<Address> {
        let mut addresses: Vec<_> = self.address.iter().chain(&self.listen).cloned().collect();
        if addresses.is_empty() {
            addresses.push(Address::default());
        }
        addresses
    }

    /// The mesh that this server joins, if it does.
    #[cfg(all(feature = "grpc", feature = "cluster"))]
    pub(crate) fn mesh(&self) -> Result<Option<Mesh>, String> {
        if self.peer.is_empty() {
            return Ok(None);
        }
        for peer in self.peer.iter().chain(&self.peer_advertise) {
            // An address of nkv has a port if it names none.
            let has_port = peer.rsplit_once(':').is_some_and(|(_, port)| port.parse().is_ok_and(|port: u16| port > 0));
            if !has_port || !matches!(peer.parse(), Ok(Address::Tcp { .. })) {
                return Err(format!("--peer and --peer-advertise are HOST:PORT, and '{peer}' is not"));
            }
        }
        #[cfg(feature = "engines")]
        if self.engine.engine.is_some() {
            return Err("--peer is for a server that keeps its data itself, and not for --engine".into());
        }
        let own = self.peer_advertise.clone().or_else(|| {
            self.grpc.iter().find_map(|address| match address {
                Address::Tcp { host, port } if *port > 0 && !["0.0.0.0", "::", "[::]"].contains(&host.as_str()) => {
                    Some(address.to_string())
                }
                _ => None,
            })
        });
        let own =
            own.ok_or("--peer needs an address of this server that others reach: give --peer-advertise HOST:PORT")?;
        let tcp = self.grpc.iter().find_map(|address| match address {
            Address::Tcp { host, .. } => Some(host.clone()),
            _ => None,
        });
        let host = tcp.ok_or("--peer needs a --grpc HOST:PORT")?;
        Ok(Some(Mesh { peers: self.peer.clone(), own, host }))
    }

    pub(crate) fn options(&self) -> Options {
        let mut options = Options::default();
        options.connections_max = self.max_connections.min(descriptors().saturating_sub(DESCRIPTOR_RESERVE).max(1));
        options.connections_per_address_max = self.max_connections_per_address;
        options.subscriptions_max = self.max_subscriptions;
        options.subscriptions_total_max = self.max_subscriptions_total;
        options.value_len_max = self.max_value_size;
        options.queued_max = self.max_queued;
        options.first_byte_limit = self.first_byte_limit;
        options.request_limit = self.request_limit;
        options.stall_limit = self.stall_limit;
        options.idle_limit = self.idle_limit;
        options.insecure = self.insecure;
        options.socket_group = self.socket_group;
        options.socket_mode = self.socket_mode.unwrap_or(if self.socket_group.is_some() { 0o660 } else { 0o600 });
        options
    }

    /// As given, or `nkv` where the XDG base directory specification puts a user's data; absolute.
    pub(crate) fn data_dir(&self) -> Result<PathBuf, PersistError> {
        if let Some(dir) = &self.data_dir {
            return std::path::absolute(dir).map_err(|error| {
                PersistError::new(PersistErrorKind::Rejected, format!("no absolute path for {}", dir.display()))
                    .with_source(error)
            });
        }
        let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let home = || absolute("HOME").map(|home| home.join(".local/share"));
        let base = absolute("XDG_DATA_HOME").or_else(home).ok_or_else(|| {
            PersistError::new(PersistErrorKind::Rejected, "neither XDG_DATA_HOME nor HOME is set: give --data-dir DIR")
        })?;
        Ok(base.join("nkv"))
    }
}

fn without_empty_variables() -> clap::Command {
    let is_empty = |arg: &Arg| arg.get_env().and_then(std::env::var_os).is_some_and(|value| value.is_empty());
    Args::command().mut_args(|arg| if is_empty(&arg) { arg.env(Resettable::Reset) } else { arg })
}

/// An error in a value from the environment, with the variable in the place of the flag.
fn with_variable(mut error: clap::Error, command: &clap::Command) -> clap::Error {
    let with_variables = |is_kept: &dyn Fn(&Arg) -> bool| {
        let command = command.clone().mut_args(|arg| if is_kept(&arg) { arg } else { arg.env(Resettable::Reset) });
        command.try_get_matches()
    };
    if let Err(error) = with_variables(&|_| false) {
        return error; // it is in the command line
    }
    let is_wrong = |arg: &&Arg| with_variables(&|other| other.get_id() == arg.get_id()).is_err();
    let Some(variable) = command.get_arguments().find(is_wrong).and_then(Arg::get_env) else { return error };
    let variable = variable.to_string_lossy().into_owned();
    if error.kind() == ErrorKind::InvalidUtf8 {
        return command.clone().error(error.kind(), format!("{variable} is not UTF-8"));
    }
    error.insert(ContextKind::InvalidArg, ContextValue::String(variable));
    error
}

/// Descriptors that are not for connections: the log and its next segments, listeners, the runtime.
const DESCRIPTOR_RESERVE: usize = 48;

/// How many files and sockets this process may have open, after asking for as many as it is allowed.
fn descriptors() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    let allowed = if raised.is_ok() { limit.maximum } else { limit.current };
    allowed.map_or(usize::MAX, |allowed| usize::try_from(allowed).unwrap_or(usize::MAX))
}

/// A number and what stands behind it.
fn number(text: &str) -> Option<(u64, &str)> {
    let (digits, unit) = text.split_at_checked(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))?;
    Some((digits.parse().ok()?, unit))
}

fn parse_size(text: &str) -> Result<usize, String> {
    let size = number(text).and_then(|(number, unit)| {
        let unit = match unit {
            "" => 1,
            "k" | "K" | "KiB" => 1 << 10,
            "m" | "M" | "MiB" => 1 << 20,
            _ => return None,
        };
        usize::try_from(number.checked_mul(unit)?).ok()
    });
    size.ok_or_else(|| "expected a number of bytes, or one with k or M".into())
}

pub(crate) fn parse_flag(text: &str) -> Result<bool, String> {
    match text {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => Err("expected true, false, 1 or 0".into()),
    }
}

fn parse_level(text: &str) -> Result<LevelFilter, String> {
    let levels = "off, error, warn, info, debug or trace";
    let level = if text.is_empty() { None } else { text.parse().ok() };
    level.ok_or_else(|| format!("expected {levels}"))
}

fn parse_branch(text: &str) -> Result<(Key, Persist), String> {
    let (branch, kind) = text.split_once('=').ok_or("expected BRANCH=log or BRANCH=memory")?;
    let kind = Persist::from_str(kind, false).map_err(|_| "a branch is kept by log or memory")?;
    Ok((Key::new(branch).map_err(|error| error.to_string())?, kind))
}

fn parse_mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777 && !text.starts_with('+'));
    mode.ok_or_else(|| "expected an octal mode, such as 660".into())
}

fn parse_group(text: &str) -> Result<u32, String> {
    match nix::unistd::Group::from_name(text) {
        Ok(Some(group)) => Ok(group.gid.as_raw()),
        Ok(None) => text.parse().map_err(|_| "there is no such group".into()),
        Err(error) => Err(format!("cannot look for the group: {error}")),
    }
}

fn parse_value_size(text: &str) -> Result<usize, String> {
    let size = parse_size(text)?;
    if (1..=Options::VALUE_LEN_MAX).contains(&size) { Ok(size) } else { Err("expected a size from 1 to 8M".into()) }
}

pub(crate) fn parse_time(text: &str) -> Result<Duration, String> {
    let time = number(text).filter(|(number, _)| *number > 0).and_then(|(number, unit)| match unit {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs),
        "h" => number.checked_mul(3_600).map(Duration::from_secs),
        _ => None,
    });
    time.ok_or_else(|| "expected a time such as 500ms, 30s, 5m or 1h".into())
}
