//! The limits of a node.

/// Limits of a node, for all its doors and handles together where nothing else is said.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Limits {
    /// Longest value, in bytes. 1 MiB by default.
    pub value_len_max: usize,
    /// Longest request of any door, in bytes: there is always room for one to arrive. 8 MiB by default.
    pub request_len_max: usize,
    /// Subscriptions of one peer of a door. 1,024 by default.
    pub subscriptions_max: usize,
    /// Subscriptions in all. 65,536 by default.
    pub subscriptions_total_max: usize,
    /// Bytes that all peers and subscriptions may hold together: of requests that have not arrived whole, of answers that
    /// were not taken, and of changes that wait. Past that, if most of it is changes, those are dropped in favour of fresh
    /// snapshots; else the peer that holds most for longest is closed, unless the others hold less than half. Subscriptions
    /// to deep keys may take a quarter as much. 256 MiB by default.
    pub queued_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            value_len_max: 1 << 20,
            request_len_max: 8 << 20,
            subscriptions_max: 1_024,
            subscriptions_total_max: 65_536,
            queued_max: 256 << 20,
        }
    }
}
