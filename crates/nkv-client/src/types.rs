//! What only a connection has.

use std::time::Instant;

/// What becomes of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ConnectionState {
    /// Requests are answered.
    Connected,
    /// Requests are answered, reads from an old state: the server has not seen its engine since, by its own word. Subscriptions
    /// go on, and are sent what was missed once it does.
    #[non_exhaustive]
    Stale {
        /// Since when.
        since: Instant,
    },
    /// Lost, and being made again.
    Reconnecting,
    /// Closed for good.
    Closed,
}

/// What a server says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerVersion {
    /// The server's version.
    pub version: String,
    /// The protocol's version.
    pub protocol: u64,
}
