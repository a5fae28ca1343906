//! What goes in and comes out, besides keys and bytes.

use std::time::Duration;

use bytes::Bytes;
use nkv_core::{Key, Revision};
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

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
        epoch: String,
    },
    /// The connection is lost and being made again; what is known may be old.
    Reconnecting,
    /// The connection is there again; what was missed is told next, then [`Event::Synced`].
    Connected,
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
    /// Write only if the key is at this revision; [`Revision::ZERO`] for "only if absent".
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
