//! What only a connection has.

/// What becomes of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ConnectionState {
    /// Requests are answered.
    Connected,
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
