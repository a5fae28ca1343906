//! What goes in and comes out, besides keys and bytes.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use nkv_core::{Epoch, Key};
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::revision::Revision;

/// A key with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Entry {
    /// The key.
    pub key: Key,
    /// Its value: opaque bytes.
    pub value: Bytes,
    /// The revision of the put that stored it.
    pub revision: Revision,
}

impl Entry {
    /// Reads the value as JSON.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Json`](crate::ErrorKind::Json) when it is not the JSON of a `T`.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.value)
            .map_err(|error| Error::json(format!("the value of '{}' is not as expected", self.key), error))
    }
}

/// What a subscription tells.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A key has a new value, or had it when the subscription began.
    #[non_exhaustive]
    Update {
        /// The key, its value and revision.
        entry: Entry,
        /// How many changes of the key, since the last one told, were passed over in favour of this one.
        skipped: u64,
    },
    /// A key is gone.
    #[non_exhaustive]
    Gone {
        /// The key.
        key: Key,
        /// The revision of its end; for [`GoneReason::Missed`] one by which it was gone.
        revision: Revision,
        /// Why.
        reason: GoneReason,
        /// How many changes of the key, since the last one told, were passed over in favour of this one.
        skipped: u64,
    },
    /// Everything up to this revision has been told: first after the present state, again after each reconnect.
    #[non_exhaustive]
    Synced {
        /// The revision.
        revision: Revision,
        /// The life of the server's data within which revisions may be compared.
        epoch: Epoch,
    },
    /// The connection is lost and being made again; what is known may be old.
    Reconnecting,
    /// The connection is there again; what was missed is told next, then [`Event::Synced`].
    #[non_exhaustive]
    Connected {
        /// The life of the server's data. If it is another than before, the server has lost some of them: every key is
        /// told anew, and its revisions may begin again.
        epoch: Epoch,
    },
    /// The subscription has ended; nothing follows.
    Ended(EndReason),
}

/// Why a key is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GoneReason {
    /// Somebody deleted it.
    Deleted,
    /// Its time to live ended.
    Expired,
    /// It went while the connection was lost; how is not known.
    Missed,
}

impl GoneReason {
    /// The word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            GoneReason::Deleted => "deleted",
            GoneReason::Expired => "expired",
            GoneReason::Missed => "missed",
        }
    }
}

/// Why a subscription has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EndReason {
    /// Somebody with this client's name unsubscribed it.
    Unsubscribed,
    /// Another connection with this client's name subscribed to the same pattern.
    Replaced,
    /// The server would not have it again after a reconnect.
    Refused {
        /// As in HTTP.
        status: u16,
        /// In words.
        message: String,
    },
    /// It would have held more than
    /// [`ClientBuilder::subscription_len_max`](crate::ClientBuilder::subscription_len_max).
    TooMuch {
        /// In bytes.
        len_max: usize,
    },
    /// The client was closed, or its runtime shut down.
    Closed,
}

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

/// How a put is to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PutOptions {
    /// Write only if the key is at this revision; [`Revision::ZERO`] for "only if absent". One of another epoch than that of
    /// the server's data is refused as [`ErrorKind::OtherEpoch`](crate::ErrorKind::OtherEpoch).
    pub if_revision: Option<Revision>,
    /// How long the value lives; forever if not given.
    pub ttl: Option<Duration>,
}

impl PutOptions {
    /// Sets the revision that the key must have; [`Revision::ZERO`] for "only if absent".
    #[must_use]
    pub fn with_if_revision(self, revision: Revision) -> Self {
        PutOptions { if_revision: Some(revision), ..self }
    }

    /// Sets how long the value lives.
    #[must_use]
    pub fn with_ttl(self, ttl: Duration) -> Self {
        PutOptions { ttl: Some(ttl), ..self }
    }
}

/// How a subscription is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SubscribeOptions {
    /// Whether the present state is told first. It is, if not given. Without it the server sends it all the same: it is how
    /// the client knows, when it has to connect again, what was missed.
    pub snapshot: bool,
    /// Whether a key stands for itself alone, and not for all below it too. Not, if not given.
    pub exact: bool,
}

impl Default for SubscribeOptions {
    fn default() -> Self {
        SubscribeOptions { snapshot: true, exact: false }
    }
}

impl SubscribeOptions {
    /// Sets whether the present state is told first.
    #[must_use]
    pub fn with_snapshot(self, snapshot: bool) -> Self {
        SubscribeOptions { snapshot, ..self }
    }

    /// Sets whether a key stands for itself alone.
    #[must_use]
    pub fn with_exact(self, exact: bool) -> Self {
        SubscribeOptions { exact, ..self }
    }
}

/// Which part of many keys is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PageOptions {
    /// How many keys at most; the server's default if not given.
    pub limit: Option<u64>,
    /// Only keys after this one, in key order.
    pub after: Option<String>,
}

impl PageOptions {
    /// Sets how many keys are asked for at most.
    #[must_use]
    pub fn with_limit(self, limit: u64) -> Self {
        PageOptions { limit: Some(limit), ..self }
    }

    /// Sets the key after which the part begins.
    #[must_use]
    pub fn with_after(self, key: impl Into<String>) -> Self {
        PageOptions { after: Some(key.into()), ..self }
    }
}

/// A part of many keys.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Page<T> {
    /// What was found, in key order.
    pub items: Vec<T>,
    /// Whether there is more after the last one.
    pub more: bool,
}

/// What a delete did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Deleted {
    /// How many keys are gone; 0 when there was nothing.
    pub count: u64,
    /// The highest revision given to them.
    pub revision: Option<Revision>,
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

/// A server's figures; those that it does not give are 0, or empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// The life of the server's data within which revisions may be compared.
    pub epoch: String,
    /// What an acknowledged write has reached: `sync`, `interval:50ms`, `os` or `memory`.
    pub durability: String,
    /// Keys.
    pub keys: u64,
    /// Bytes of all values.
    pub value_bytes: u64,
    /// Subscriptions.
    pub subscriptions: u64,
    /// Connections.
    pub connections: u64,
    /// The number of the newest change.
    pub revision: u64,
    /// For how long the server runs.
    pub uptime: Duration,
    /// Puts since it started, and so on with all that follow.
    pub puts: u64,
    /// Keys deleted.
    pub deletes: u64,
    /// Keys whose time to live ended.
    pub expired: u64,
    /// Batches stored.
    pub batches: u64,
    /// Batches that could not be stored.
    pub failed_batches: u64,
    /// Notifications given to subscribers.
    pub notified: u64,
    /// Changes passed over in favour of newer ones.
    pub conflated: u64,
    /// All that are numbers, by name: also those that this version of the client does not know.
    pub numbers: BTreeMap<String, u64>,
    /// All that are words, by name.
    pub words: BTreeMap<String, String>,
}

impl From<nkv_protocol::Stats> for Stats {
    fn from(stats: nkv_protocol::Stats) -> Self {
        let nkv_protocol::Stats { numbers, words, .. } = stats;
        let word = |name: &str| words.get(name).cloned().unwrap_or_default();
        let number = |name: &str| numbers.get(name).copied().unwrap_or(0);
        Stats {
            epoch: word("epoch"),
            durability: word("durability"),
            keys: number("keys"),
            value_bytes: number("value_bytes"),
            subscriptions: number("subscriptions"),
            connections: number("connections"),
            revision: number("revision"),
            uptime: Duration::from_millis(number("uptime_ms")),
            puts: number("puts"),
            deletes: number("deletes"),
            expired: number("expired"),
            batches: number("batches"),
            failed_batches: number("failed_batches"),
            notified: number("notified"),
            conflated: number("conflated"),
            numbers,
            words,
        }
    }
}
