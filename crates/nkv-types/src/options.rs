//! How a write, a read of many keys or a subscription is to be done.

use std::time::Duration;

use nkv_core::Key;

use crate::revision::Revision;

/// How a put is to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PutOptions {
    /// Write only if the key is at this revision; [`Revision::ZERO`] for "only if absent". One of another epoch than that of
    /// the data is refused as [`ErrorKind::OtherEpoch`](crate::ErrorKind::OtherEpoch).
    pub if_revision: Option<Revision>,
    /// How long the value lives, at least a millisecond; forever if not given.
    pub ttl: Option<Duration>,
}

impl PutOptions {
    /// Sets the revision that the key must have; [`Revision::ZERO`] for "only if absent".
    #[must_use]
    pub fn with_if_revision(self, revision: Revision) -> Self {
        PutOptions { if_revision: Some(revision), ..self }
    }

    /// Sets how long the value lives, at least a millisecond.
    #[must_use]
    pub fn with_ttl(self, ttl: Duration) -> Self {
        PutOptions { ttl: Some(ttl), ..self }
    }
}

/// How a subscription is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SubscribeOptions {
    /// Whether the present state is delivered first. It is, if not given.
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
    /// Sets whether the present state is delivered first.
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
    /// How many keys at most; the store's default if not given.
    pub limit: Option<u64>,
    /// Only keys after this one, in key order.
    pub after: Option<Key>,
}

impl PageOptions {
    /// Sets how many keys are asked for at most.
    #[must_use]
    pub fn with_limit(self, limit: u64) -> Self {
        PageOptions { limit: Some(limit), ..self }
    }

    /// Sets the key after which the part begins: the last one of the page before.
    #[must_use]
    pub fn with_after(self, key: Key) -> Self {
        PageOptions { after: Some(key), ..self }
    }
}
