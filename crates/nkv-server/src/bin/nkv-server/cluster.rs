//! `--cluster NAME`: this server is a node of a cluster, whose nodes find each other and agree in the end.

use std::fs::File;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use nkv_cluster::{Cluster, Keys, KeysError, Membership, MembershipError, Options, StaticPeers};
use nkv_discovery::{Discovery, Spec};
use nkv_server::ServerError;
#[cfg(feature = "grpc")]
use nkv_server::nkv_grpc::MeshSync;
use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::args::{parse_flag, parse_time};
#[cfg(feature = "grpc")]
use crate::mesh;
use crate::usage;

/// The cluster, and how its nodes find each other.
#[derive(Debug, clap::Args)]
pub(crate) struct ClusterArgs {
    /// Be a node of the cluster of this name: each has all data and takes writes, and all agree in the end
    #[arg(long, value_name = "NAME", env = "NKV_CLUSTER", requires = "gossip", group = "nodes")]
    pub(crate) cluster: Option<String>,

    /// Where other nodes of the cluster, or of nkv in a mesh, reach this one: IP:PORT [default in a mesh: any port of --grpc's host]
    #[arg(long, value_name = "ADDR", env = "NKV_GOSSIP", requires = "nodes")]
    gossip: Option<SocketAddr>,

    /// The address of --gossip as other nodes see it, if that is another
    #[arg(long, value_name = "ADDR", env = "NKV_ADVERTISE", requires = "cluster")]
    advertise: Option<SocketAddr>,

    /// The keys that all nodes share, to authenticate each other and encrypt what they say: base64 of 16, 24 or 32 random bytes, one
    /// a line, the first for what this node opens. Read again on SIGHUP. Such a port may be open to other hosts
    #[arg(long, value_name = "FILE", env = "NKV_CLUSTER_KEY_FILE", requires = "cluster")]
    cluster_key_file: Option<PathBuf>,

    /// How nodes are found: static:HOST:PORT,…, dns:NAME[:PORT], srv:NAME, nats://HOST:PORT/SUBJECT or
    /// kubernetes:NAMESPACE/LABEL=VALUE/PORT-NAME [default: this node is the first]
    #[arg(long, value_name = "HOW", env = "NKV_DISCOVER", requires = "cluster")]
    discover: Option<Spec>,

    /// How often nodes compare what they have; each write is given on at once
    #[arg(long, value_name = "TIME", env = "NKV_SYNC_INTERVAL", default_value = "1s", value_parser = parse_time)]
    sync_interval: Duration,

    /// How long an empty node waits for the state of another
    #[arg(long, value_name = "TIME", env = "NKV_JOIN_TIMEOUT", default_value = "5s", value_parser = parse_time)]
    join_timeout: Duration,

    /// How long deletes are remembered, and so how long a node may be away
    #[arg(long, value_name = "TIME", env = "NKV_GC_GRACE", default_value = "24h", value_parser = parse_time)]
    gc_grace: Duration,

    /// How far a clock may be off from those of other nodes
    #[arg(long, value_name = "TIME", env = "NKV_MAX_CLOCK_OFFSET", default_value = "1s", value_parser = parse_time)]
    max_clock_offset: Duration,

    /// Take conditional writes, whose conditions hold on this node alone
    #[arg(long, env = "NKV_LOCAL_CONDITIONS", requires = "cluster", value_parser = parse_flag)]
    local_conditions: bool,
}

/// Nodes as discovery finds them.
#[derive(Debug)]
struct Found {
    discovery: Arc<dyn Discovery>,
    own: SocketAddr,
}

#[async_trait]
impl Membership for Found {
    async fn addresses(&self) -> Result<Vec<SocketAddr>, MembershipError> {
        let found = self.discovery.find(self.own).await.map_err(|error| {
            warn!("{}: {error}", self.discovery.name());
            MembershipError::new(error.to_string())
        })?;
        for what in found.unusable() {
            warn!("{}: {what}", self.discovery.name());
        }
        if found.left_out() > 0 {
            warn!("{}: {} addresses or remarks more than are kept", self.discovery.name(), found.left_out());
        }
        if found.addresses().is_empty() && !found.unusable().is_empty() {
            return Err(MembershipError::new("nothing of what was found can be used"));
        }
        Ok(found.addresses().to_vec())
    }
}

/// A node's part of the cluster, and what is to be undone when it stops.
pub(crate) struct Joined {
    pub(crate) cluster: Cluster,
    known: Option<(Arc<dyn Discovery>, SocketAddr)>,
}

impl Joined {
    /// Others know that this node left, and are not pointed to it any more.
    pub(crate) async fn leave(self) {
        self.cluster.leave().await;
        if let Some((discovery, own)) = self.known
            && let Err(error) = discovery.deregister(own).await
        {
            warn!("{}: {error}", discovery.name());
        }
    }
}

impl ClusterArgs {
    /// What a node of the cluster is to be. `clock_file` is beside the data, if they are kept.
    fn options(
        &self,
        name: &str,
        is_insecure: bool,
        value_len_max: usize,
        clock_file: Option<PathBuf>,
    ) -> Result<Options, ServerError> {
        let keys = self.cluster_key_file.as_deref().map(read_keys).transpose().map_err(ServerError::System)?;
        if let Some(gossip) = self.gossip
            && keys.is_none()
            && !is_insecure
            && !gossip.ip().to_canonical().is_loopback()
        {
            return Err(ServerError::Insecure { address: gossip.to_string() });
        }
        let mut options = Options::new(name);
        options.advertise = self.advertise;
        options.sync_interval = self.sync_interval;
        options.join_timeout = self.join_timeout;
        options.gc_grace = self.gc_grace;
        options.max_clock_offset = self.max_clock_offset;
        options.local_conditions = self.local_conditions;
        options.value_len_max = value_len_max;
        options.clock_file = clock_file;
        options.keys = keys;
        Ok(options)
    }

    /// Listens for other servers of nkv in a mesh, with what a door needs to find them.
    #[cfg(feature = "grpc")]
    pub(crate) async fn join_mesh(
        &self,
        host: &str,
        is_insecure: bool,
        value_len_max: usize,
        clock_file: Option<PathBuf>,
    ) -> Result<(Joined, Arc<dyn MeshSync>), ServerError> {
        let options = self.options(mesh::NAME, is_insecure, value_len_max, clock_file)?;
        let (cluster, sync) = mesh::join(self.gossip, host, options).await?;
        Ok((Joined { cluster, known: None }, sync))
    }

    /// Listens for other nodes, and makes this one known to them. Keys are read again with each change of `reread`.
    pub(crate) async fn join(
        &self,
        name: &str,
        is_insecure: bool,
        value_len_max: usize,
        clock_file: Option<PathBuf>,
        reread: watch::Receiver<()>,
    ) -> Result<Joined, ServerError> {
        let gossip = self.gossip.ok_or_else(|| usage("--cluster needs --gossip ADDR"))?;
        let own = self.advertise.unwrap_or(gossip);
        let is_said = self.advertise.is_some() || self.discover.is_some();
        if is_said && (own.port() == 0 || own.ip().is_unspecified()) {
            return Err(usage(
                "others find this node by its address: give --gossip or --advertise with an IP and a port",
            ));
        }
        let options = self.options(name, is_insecure, value_len_max, clock_file)?;
        let bind = |source| ServerError::Bind { address: gossip.to_string(), source };
        let Some(spec) = &self.discover else {
            let cluster = Cluster::bind(gossip, options, StaticPeers::default()).await.map_err(bind)?;
            self.keep_keys(&cluster, reread);
            info!("the cluster '{name}' reaches this node at {}", cluster.address());
            return Ok(Joined { cluster, known: None });
        };
        let discovery = spec.provider().map_err(|error| usage(format!("--discover: {error}")))?;
        let discovery: Arc<dyn Discovery> = discovery.into();
        if let Err(error) = discovery.register(own).await {
            warn!("{}: {error}", discovery.name());
        }
        let found = Found { discovery: Arc::clone(&discovery), own };
        let cluster = Cluster::bind(gossip, options, found).await.map_err(bind)?;
        self.keep_keys(&cluster, reread);
        info!("the cluster '{name}' reaches this node at {own}, and finds others by {}", discovery.name());
        Ok(Joined { cluster, known: Some((discovery, own)) })
    }

    /// Reads the keys again when that is asked for, for as long as the program runs.
    fn keep_keys(&self, cluster: &Cluster, mut reread: watch::Receiver<()>) {
        let Some(path) = self.cluster_key_file.clone() else { return };
        let cluster = cluster.clone();
        tokio::spawn(async move {
            while reread.changed().await.is_ok() {
                let path = path.clone();
                let keys = tokio::task::spawn_blocking(move || read_keys(&path))
                    .await
                    .unwrap_or_else(|error| Err(error.into()));
                match keys.and_then(|keys| Ok((keys.count(), cluster.set_keys(keys)?))) {
                    Ok((count, ())) => info!("SIGHUP: the keys of the cluster were read again, and are {count}"),
                    Err(error) => error!("SIGHUP: the keys of the cluster stay as they were: {error}"),
                }
            }
        });
    }
}

/// A file of keys is shorter than this.
const KEY_FILE_LEN_MAX: u64 = 64 << 10;

/// Rights that a file of keys may not give: others may do nothing with it, and its group may read it alone. So it is with the key of a
/// server of PostgreSQL, and so a secret of Kubernetes can be had, which is owned by root, and read by the group of the pod.
const OPEN_MODE: u32 = 0o027;

fn read_keys(path: &Path) -> io::Result<Keys> {
    let of_file = |kind, what: &dyn std::fmt::Display| io::Error::new(kind, format!("{}: {what}", path.display()));
    let failed = |error: io::Error| of_file(error.kind(), &error);
    let wrong = |what: &dyn std::fmt::Display| of_file(io::ErrorKind::InvalidInput, what);
    // Opening something else might wait.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(wrong(&"it is not a file"));
    }
    let file = File::open(path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.permissions().mode();
    if mode & OPEN_MODE != 0 {
        return Err(wrong(&format_args!(
            "others have rights to this file of keys (its mode is {:03o}): chmod 600, or 640 for its group",
            mode & 0o777
        )));
    }
    let mut text = String::new();
    file.take(KEY_FILE_LEN_MAX).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 >= KEY_FILE_LEN_MAX {
        return Err(wrong(&format_args!("a file of keys is shorter than {KEY_FILE_LEN_MAX} bytes")));
    }
    text.parse().map_err(|error: KeysError| wrong(&error))
}
