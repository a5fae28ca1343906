//! What is stored (a record) and what happened (a change).

use std::fmt;
use std::ops::Deref;
use std::time::Duration;

use bytes::Bytes;

use crate::key::{Key, KeyRef};
use crate::meta::Meta;
use crate::revision::Revision;

/// A point in time, on a clock that the caller chooses and keeps across restarts: milliseconds since an origin of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(u64);

impl Timestamp {
    /// The origin.
    pub const MIN: Timestamp = Timestamp(0);
    /// The end of time, which never comes.
    pub const MAX: Timestamp = Timestamp(u64::MAX);

    /// The time `millis` milliseconds after the origin.
    #[must_use]
    pub const fn from_millis(millis: u64) -> Self {
        Timestamp(millis)
    }

    /// How many milliseconds after the origin it is.
    #[must_use]
    pub const fn as_millis(self) -> u64 {
        self.0
    }

    /// The time `millis` milliseconds later; at most the end of time.
    #[must_use]
    pub const fn saturating_add(self, millis: u64) -> Self {
        Timestamp(self.0.saturating_add(millis))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ms", self.0)
    }
}

/// When a value ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expiry {
    /// When.
    pub at: Timestamp,
    /// How long it was to live when it was put. A reopened store lets no value live longer than this from then on,
    /// so that a clock that was set back between two runs cannot keep values for years.
    pub ttl_ms: u64,
}

impl Expiry {
    /// `ttl` from `now`; at least one millisecond.
    #[must_use]
    pub fn after(now: Timestamp, ttl: Duration) -> Self {
        let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1);
        Expiry { at: now.saturating_add(ttl_ms), ttl_ms }
    }
}

/// A key as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The key.
    pub key: Key,
    /// Its value: opaque bytes.
    pub value: Bytes,
    /// The revision of the put that stored it.
    pub revision: Revision,
    /// When it ends by itself, if it does.
    pub expiry: Option<Expiry>,
}

impl Record {
    /// The record, lent for a moment.
    #[must_use]
    pub fn lend(&self) -> RecordRef<'_> {
        let value = ValueRef::of(&self.value);
        RecordRef { key: self.key.lend(), value, revision: self.revision, expiry: self.expiry }
    }
}

/// A key as it is stored, lent for a moment: nothing is copied.
#[derive(Clone, Copy, Debug)]
pub struct RecordRef<'a> {
    /// The key.
    pub key: KeyRef<'a>,
    /// Its value.
    pub value: ValueRef<'a>,
    /// The revision of the put that stored it.
    pub revision: Revision,
    /// When it ends by itself, if it does.
    pub expiry: Option<Expiry>,
}

/// A value, lent for a moment.
#[derive(Clone, Copy, Debug)]
pub enum ValueRef<'a> {
    /// In the memory of its lender, as every short one: a caller that keeps it copies it.
    Lent(&'a [u8]),
    /// By itself: a clone shares it.
    Shared(&'a Bytes),
}

impl RecordRef<'_> {
    /// A record of its own.
    #[must_use]
    pub fn to_record(self) -> Record {
        let RecordRef { key, value, revision, expiry } = self;
        Record { key: key.to_key(), value: value.to_bytes(), revision, expiry }
    }
}

/// From this length on a value lies by itself, as it came, and is shared with its readers. A shorter one is copied: that
/// costs less than counting its readers, and it does not keep in memory what else it came with.
pub(crate) const VALUE_LEN_LONG: usize = 4_096;

impl<'a> ValueRef<'a> {
    /// Lent or shared, by its length.
    pub(crate) fn of(value: &'a Bytes) -> Self {
        if value.len() < VALUE_LEN_LONG { ValueRef::Lent(value) } else { ValueRef::Shared(value) }
    }

    /// The value, to be kept by itself, if it is long.
    pub(crate) fn long(self) -> Option<Bytes> {
        (self.len() >= VALUE_LEN_LONG).then(|| self.to_bytes())
    }

    /// The value, to be kept: a copy of a lent one, a share of a shared one.
    #[must_use]
    pub fn to_bytes(self) -> Bytes {
        match self {
            ValueRef::Lent(bytes) => Bytes::copy_from_slice(bytes),
            ValueRef::Shared(bytes) => bytes.clone(),
        }
    }
}

impl Deref for ValueRef<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            ValueRef::Lent(bytes) => bytes,
            ValueRef::Shared(bytes) => bytes,
        }
    }
}

/// One change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The key.
    pub key: Key,
    /// The change's place in the order of all changes.
    pub revision: Revision,
    /// The revision of the value whose place it takes, or that it deletes; zero if there was none.
    pub replaces: Revision,
    /// What happened.
    pub action: Action,
    /// What storage keeps beside it. A delete with some leaves a tombstone: see [`PersistValue`](crate::PersistValue).
    pub meta: Meta,
}

impl Change {
    /// Whether readers see it: a delete of a key that was absent has none for them.
    pub(crate) fn has_effect(&self) -> bool {
        matches!(self.action, Action::Put { .. }) || self.replaces != Revision::ZERO
    }
}

/// What a change did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// The key has this value now.
    Put {
        /// The value.
        value: Bytes,
        /// When it ends by itself, if it does.
        expiry: Option<Expiry>,
    },
    /// The key is gone.
    Delete {
        /// Why.
        reason: Reason,
    },
}

impl Action {
    pub(crate) fn value_len(&self) -> usize {
        match self {
            Action::Put { value, .. } => value.len(),
            Action::Delete { .. } => 0,
        }
    }
}

/// Why a key is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// A client deleted it.
    Deleted,
    /// Its TTL ended.
    Expired,
}

impl Reason {
    /// The word for it, on the wire and elsewhere.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::Deleted => "deleted",
            Reason::Expired => "expired",
        }
    }
}
