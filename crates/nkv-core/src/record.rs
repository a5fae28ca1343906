//! What is stored (a record), what happened (a change) and what a subscriber is told (an event).

use std::any::Any;
use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;

use crate::key::{Key, Pattern};
use crate::records::Records;
use crate::revision::{Epoch, Revision};
use crate::sync::{Mutex, Once};

/// A point in time: milliseconds since an origin that the caller chooses and keeps across restarts,
/// the Unix epoch for instance.
pub type Millis = u64;

/// When a value ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expiry {
    /// When.
    pub at: Millis,
    /// How long it was to live when it was put. A reopened store lets no value live longer than this from then on,
    /// so that a clock that was set back between two runs cannot keep values for years.
    pub ttl_ms: u64,
}

impl Expiry {
    /// `ttl` from `now`; at least one millisecond.
    #[must_use]
    pub fn after(now: Millis, ttl: Duration) -> Self {
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
        RecordRef { key: self.key.as_str(), value, revision: self.revision, expiry: self.expiry }
    }
}

/// A key as it is stored, lent for a moment: nothing is copied.
#[derive(Clone, Copy, Debug)]
pub struct RecordRef<'a> {
    /// The key.
    pub key: &'a str,
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
    /// In the memory of whoever lends it, as every short one: whoever keeps it copies it.
    Lent(&'a [u8]),
    /// By itself: a clone shares it.
    Shared(&'a Bytes),
}

impl RecordRef<'_> {
    /// A record of its own.
    #[must_use]
    pub fn to_record(self) -> Record {
        let RecordRef { key, value, revision, expiry } = self;
        Record { key: Key::trusted(key), value: value.to_bytes(), revision, expiry }
    }
}

/// From this length on a value lies by itself, as it came, and is shared with whoever reads it. A shorter one is copied:
/// that costs less than counting who shares it, and it does not keep in memory what else it came with.
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

/// Why a key is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Somebody deleted it.
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

/// Why a subscription has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EndReason {
    /// Somebody unsubscribed it.
    Unsubscribed,
    /// The same subscriber subscribed to the same pattern again.
    Replaced,
}

impl EndReason {
    /// The word for it, on the wire and elsewhere.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            EndReason::Unsubscribed => "unsubscribed",
            EndReason::Replaced => "replaced",
        }
    }
}

/// The state of all keys that a subscription covers, at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The subscription's pattern.
    pub pattern: Pattern,
    /// The present keys, in key order; none if nothing matches.
    pub records: Records,
    /// Every change up to and including this revision is contained, none after it.
    pub revision: Revision,
    /// Within which this revision may be compared.
    pub epoch: Epoch,
}

/// What an event says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EventKind {
    /// A key changed.
    Change(Change),
    /// The current state, first thing after a subscribe that asked for it.
    Snapshot(Snapshot),
    /// The subscription has ended; nothing follows for it.
    Ended {
        /// The subscription's pattern.
        pattern: Pattern,
        /// Why.
        reason: EndReason,
    },
}

/// What subscribers are told, shared by all of them.
pub struct Event {
    kind: EventKind,
    /// The memo that was made first; most events never have another. Set under the lock of the others.
    first: Once<Memo>,
    others: Mutex<Vec<Memo>>,
}

type Memo = Arc<dyn Any + Send + Sync>;

impl Event {
    /// An event that says `kind`.
    #[must_use]
    pub fn new(kind: EventKind) -> Arc<Self> {
        Arc::new(Event { kind, first: Once::new(), others: Mutex::new(Vec::new()) })
    }

    /// What it says.
    #[must_use]
    pub fn kind(&self) -> &EventKind {
        &self.kind
    }

    /// What a family of notifiers derived from this event, made by whoever asks first and shared by all who ask
    /// for the same type. An event that goes to hundreds of connections is encoded once this way.
    pub fn memo<T: Any + Send + Sync>(&self, make: impl FnOnce(&EventKind) -> T) -> Arc<T> {
        let first = || self.first.get().and_then(|memo| memo.downcast::<T>().ok());
        // The hundreds that come after the first take no lock.
        if let Some(memo) = first() {
            return memo;
        }
        let mut others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
        let other = || others.iter().find_map(|memo| Arc::clone(memo).downcast::<T>().ok());
        if let Some(memo) = first().or_else(other) {
            return memo;
        }
        let memo = Arc::new(make(&self.kind));
        if let Err(memo) = self.first.set(Arc::clone(&memo) as Memo) {
            others.push(memo);
        }
        memo
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.kind, f)
    }
}
