//! Limits of the door.

use std::time::Duration;

use nkv_protocol::Limits;

/// The longest time between two signs of life.
const ALIVE_INTERVAL_MAX: Duration = Duration::from_secs(5);

/// Limits of a server.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
///
/// let mut options = nkv_server::Options::default();
/// options.connections_max = 16;
/// options.idle_limit = Some(Duration::from_secs(600));
/// ```
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Options {
    /// Connections at a time; others are refused. 1,024 by default.
    pub connections_max: usize,
    /// Connections at a time from one address, which is an IPv4 address or an IPv6 network /64. 1,024 by default: behind
    /// one address there may be many programs.
    pub connections_per_address_max: usize,
    /// Subscriptions of one connection. 1,024 by default.
    pub subscriptions_max: usize,
    /// Subscriptions of all connections. 65,536 by default.
    pub subscriptions_total_max: usize,
    /// Longest value, in bytes. 1 MiB by default; 8 MiB at most, so that it fits a message in every form.
    pub value_len_max: usize,
    /// Bytes that all connections may hold together: of requests that have not arrived whole, of answers that were not
    /// taken, and of changes that wait. Past that, if most of it is changes, those are dropped in favour of fresh snapshots (a
    /// client that does not know `Reset` is closed); else the connection that holds most for longest is closed, unless the
    /// others hold less than half. Subscriptions to deep keys may take a quarter as much. 256 MiB by default.
    pub queued_max: usize,
    /// A connection that begins no request within this time is closed. 30 s by default.
    pub first_byte_limit: Duration,
    /// A request that is not whole this long after its first byte, and as long again for each MiB of it, ends its
    /// connection. 30 s by default.
    pub request_limit: Duration,
    /// A peer is cut if for this long it takes nothing, or so little that the system makes no room in its send buffer
    /// (some 80 KiB). 30 s by default.
    pub stall_limit: Duration,
    /// A connection without subscriptions that asks nothing for this long is closed. Never by default.
    pub idle_limit: Option<Duration>,
    /// Whether an address other than loopback may be listened at: clients are not authenticated here. No by default.
    pub insecure: bool,
    /// The mode of a Unix socket; a user that may write to it may connect. 0600 by default: its owner alone.
    pub socket_mode: u32,
    /// The group of a Unix socket. That of the process, or of the directory, by default.
    pub socket_group: Option<u32>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            connections_max: 1_024,
            connections_per_address_max: 1_024,
            subscriptions_max: 1_024,
            subscriptions_total_max: 65_536,
            value_len_max: 1 << 20,
            queued_max: 256 << 20,
            first_byte_limit: Duration::from_secs(30),
            request_limit: Duration::from_secs(30),
            stall_limit: Duration::from_secs(30),
            idle_limit: None,
            insecure: false,
            socket_mode: 0o600,
            socket_group: None,
        }
    }
}

impl Options {
    /// The highest [`value_len_max`](Self::value_len_max) that counts: 8 MiB.
    pub const VALUE_LEN_MAX: usize = 8 << 20;

    /// How often a connection whose requests are kept waiting gets a sign of life: while it gets none, and nothing else, for
    /// the stall limit, the server is not there.
    pub(crate) fn alive_interval(&self) -> Duration {
        let third = self.stall_limit.checked_div(3).unwrap_or_default();
        third.clamp(Duration::from_millis(1), ALIVE_INTERVAL_MAX)
    }

    pub(crate) fn limits(&self) -> Limits {
        Limits { value_len_max: self.value_len_max.min(Self::VALUE_LEN_MAX), ..Limits::default() }
    }

    /// Those of the node.
    pub(crate) fn node_limits(&self) -> nkv_node::Limits {
        let mut limits = nkv_node::Limits::default();
        limits.value_len_max = self.limits().value_len_max;
        limits.request_len_max = self.limits().line_len_max();
        limits.subscriptions_max = self.subscriptions_max;
        limits.subscriptions_total_max = self.subscriptions_total_max;
        limits.queued_max = self.queued_max;
        limits
    }
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
