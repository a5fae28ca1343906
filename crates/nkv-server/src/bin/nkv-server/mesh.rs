//! `--peer HOST:PORT`: this server joins a mesh of the replicated gRPC store. Those of nkv in it are the nodes of a cluster, which find
//! each other by their registrations there.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use nkv_cluster::{Cluster, Membership, MembershipError, NodeId, Options};
use nkv_core::Key;
use nkv_server::nkv_grpc::MeshSync;
use nkv_server::{Handle, ServerError};
use tokio::net::lookup_host;
use tokio::sync::watch;
use tracing::info;

/// The name of the cluster, of each mesh: registrations say who belongs to it.
pub(crate) const NAME: &str = "servers of a mesh";

/// How long one that connects has until it has registered: it may do both at a time.
const REGISTERED_LIMIT: Duration = Duration::from_secs(1);

/// How long a server that begins is waited for.
const BEGIN_LIMIT: Duration = Duration::from_secs(2);

/// Servers of nkv in the mesh, by their numbers, and where they are reached.
#[derive(Debug, Default)]
struct Found(watch::Sender<BTreeMap<u64, BTreeSet<SocketAddr>>>);

#[async_trait]
impl Membership for Found {
    async fn addresses(&self) -> Result<Vec<SocketAddr>, MembershipError> {
        Ok(self.0.borrow().values().flatten().copied().collect())
    }

    /// A port that one had may be that of a server of another mesh by now.
    async fn admits(&self, node: NodeId) -> bool {
        let mut found = self.0.subscribe();
        let is_found = found.wait_for(|found| found.contains_key(&node.get()));
        tokio::time::timeout(REGISTERED_LIMIT, is_found).await.is_ok_and(|found| found.is_ok())
    }
}

/// What the door needs of the cluster.
#[derive(Debug)]
struct Sync {
    cluster: Cluster,
    found: Arc<Found>,
}

#[async_trait]
impl MeshSync for Sync {
    fn own(&self) -> Option<(u16, u64)> {
        Some((self.cluster.address().port(), self.cluster.id()?.get()))
    }

    fn set_found(&self, found: BTreeMap<u64, BTreeSet<SocketAddr>>) {
        self.found.0.send_replace(found);
        self.cluster.ask_again();
    }

    fn wrote(&self, key: &Key) -> bool {
        self.cluster.wrote(key)
    }

    async fn take_older(&self, values: Vec<(Key, Bytes)>) -> io::Result<()> {
        self.cluster.take_older(values).await
    }
}

/// Listens for other servers of nkv, at an address or at any port of a host.
pub(crate) async fn join(
    at: Option<SocketAddr>,
    host: &str,
    mut options: Options,
) -> Result<(Cluster, Arc<dyn MeshSync>), ServerError> {
    let bind = |source| ServerError::Bind { address: at.map_or_else(|| host.to_owned(), |at| at.to_string()), source };
    let at = match at {
        Some(at) => at,
        None => {
            let found = lookup_host((host, 0)).await.map_err(bind)?.next();
            found.ok_or_else(|| bind(io::ErrorKind::AddrNotAvailable.into()))?
        }
    };
    (options.local_conditions, options.named_only) = (true, true);
    let found = Arc::<Found>::default();
    let cluster = Cluster::bind(at, options, Arc::clone(&found)).await.map_err(bind)?;
    info!("other servers of nkv in the mesh reach this one at {}", cluster.address());
    Ok((cluster.clone(), Arc::new(Sync { cluster, found })))
}

/// Waits until a server of a mesh takes requests, before it says where it listens: it waits for no peer, and that is soon.
pub(crate) async fn wait_until_begun(handle: &Handle) {
    let begun = async {
        while handle.check_healthy().is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    drop(tokio::time::timeout(BEGIN_LIMIT, begun).await);
}
