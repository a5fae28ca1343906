//! What a subscription delivers.

use nkv_core::{Epoch, Key};

use crate::entry::Entry;
use crate::revision::Revision;

/// What a subscription delivers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A key has a new value, or had it when the subscription began.
    #[non_exhaustive]
    Update {
        /// The key, its value and revision.
        entry: Entry,
        /// How many changes of the key, since the last one delivered, were passed over in favour of this one.
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
        /// How many changes of the key, since the last one delivered, were passed over in favour of this one.
        skipped: u64,
    },
    /// Everything up to this revision has been delivered: first after the present state, again after each reconnect, and where
    /// too much waited.
    #[non_exhaustive]
    Synced {
        /// The revision.
        revision: Revision,
        /// The life of the data within which revisions may be compared.
        epoch: Epoch,
    },
    /// The connection is lost and being made again; what is known may be old.
    Reconnecting,
    /// The connection is there again; what was missed comes next, then [`Event::Synced`].
    #[non_exhaustive]
    Connected {
        /// The life of the server's data. If it is another than before, the server has lost some of them: every key is
        /// delivered anew, and its revisions may begin again.
        epoch: Epoch,
    },
    /// The subscription has ended; nothing follows.
    Ended(EndReason),
}

/// Constructors, for code that delivers events.
impl Event {
    /// An [`Event::Update`].
    #[must_use]
    pub fn update(entry: Entry, skipped: u64) -> Self {
        Event::Update { entry, skipped }
    }

    /// An [`Event::Gone`].
    #[must_use]
    pub fn gone(key: Key, revision: Revision, reason: GoneReason, skipped: u64) -> Self {
        Event::Gone { key, revision, reason, skipped }
    }

    /// An [`Event::Synced`].
    #[must_use]
    pub fn synced(revision: Revision, epoch: Epoch) -> Self {
        Event::Synced { revision, epoch }
    }

    /// An [`Event::Connected`].
    #[must_use]
    pub fn connected(epoch: Epoch) -> Self {
        Event::Connected { epoch }
    }
}

/// Why a key is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GoneReason {
    /// It was deleted.
    Deleted,
    /// Its time to live ended.
    Expired,
    /// It went while the subscription was interrupted; how is not known.
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
    /// A request with this subscriber's name unsubscribed it.
    Unsubscribed,
    /// Another subscriber with this one's name subscribed to the same pattern.
    Replaced,
    /// The server refused it after a reconnect.
    Refused {
        /// As in HTTP.
        status: u16,
        /// In words.
        message: String,
    },
    /// It would have held more than its limit.
    TooMuch {
        /// The limit, in bytes.
        len_max: usize,
    },
    /// The client was closed, its runtime has shut down, or the node has stopped.
    Closed,
}
