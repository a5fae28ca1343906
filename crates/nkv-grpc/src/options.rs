//! Limits of the door.

use std::sync::Arc;
use std::time::Duration;

use nkv_node::ConnectionLimit;

use crate::mesh::MeshSync;

/// Limits of a [`Door`](crate::Door). Those of values, messages, subscriptions and memory are the node's.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
///
/// let mut options = nkv_grpc::Options::default();
/// options.connections = nkv_node::ConnectionLimit::new(16, 16);
/// options.idle_limit = Some(Duration::from_secs(600));
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// How many connections there may be; shared with other doors. 1,024, all of which may come from one address, by default.
    pub connections: ConnectionLimit,
    /// How many of the most recent deletes are remembered, for watches that are resumed. 65,536 by default.
    pub deletes_max: usize,
    /// A connection that does not begin as HTTP/2 within this time is closed. 30 s by default.
    pub first_byte_limit: Duration,
    /// A request that is not whole this long after its beginning, and as long again for each MiB of it, ends with
    /// DEADLINE_EXCEEDED. 30 s by default.
    pub request_limit: Duration,
    /// A peer is cut if for this long it takes nothing of an answer or of what is written to its socket, or does not answer a
    /// ping. A watch may stand still for ever. 30 s by default.
    pub stall_limit: Duration,
    /// How often a ping is sent. 30 s by default.
    pub keep_alive_interval: Duration,
    /// A connection without calls is closed after this time. Never by default.
    pub idle_limit: Option<Duration>,
    /// Servers of a mesh of the replicated gRPC store that this one joins, as HOST:PORT. None by default; others may join this one.
    pub peers: Vec<String>,
    /// Where servers of that mesh reach this one, as HOST:PORT: without it this one registers nowhere, and sends to `peers`
    /// alone what it is given.
    pub own_address: Option<String>,
    /// What keeps this server and those of nkv in that mesh alike. Without it, which is the default, this one is to each of them as
    /// an original.
    pub mesh_sync: Option<Arc<dyn MeshSync>>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            connections: ConnectionLimit::new(1_024, 1_024),
            deletes_max: 65_536,
            first_byte_limit: Duration::from_secs(30),
            request_limit: Duration::from_secs(30),
            stall_limit: Duration::from_secs(30),
            keep_alive_interval: Duration::from_secs(30),
            idle_limit: None,
            peers: Vec::new(),
            own_address: None,
            mesh_sync: None,
        }
    }
}
