//! What a subscriber is given: that its subscription begins and ends, its snapshot, and each change.

use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};

use crate::key::{Key, Pattern};
use crate::record::Change;
use crate::records::Records;
use crate::revision::{Epoch, Revision};
use crate::sync::Mutex;

/// Why a subscription has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EndReason {
    /// Another task unsubscribed it.
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

/// The beginning of a subscription, or of a fresh snapshot of it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Began {
    /// The subscription's pattern.
    pub pattern: Pattern,
    /// Why.
    pub cause: BeginCause,
    /// Without a snapshot, changes after this revision follow, and none up to it.
    pub revision: Revision,
    /// Within which this revision may be compared.
    pub epoch: Epoch,
    /// Whether the present state follows, as a snapshot.
    pub has_snapshot: bool,
    /// Reads the snapshot that follows, or one that becomes necessary later.
    pub reader: SnapshotReader,
}

impl Began {
    /// The beginning of a subscription that was asked for, without a snapshot.
    #[must_use]
    pub fn new(pattern: Pattern, revision: Revision, epoch: Epoch, reader: SnapshotReader) -> Self {
        Began { pattern, cause: BeginCause::Subscribed, revision, epoch, has_snapshot: false, reader }
    }

    /// With a snapshot.
    #[must_use]
    pub fn with_snapshot(self) -> Self {
        Began { has_snapshot: true, ..self }
    }

    /// As [`BeginCause::Reset`], with a snapshot.
    #[must_use]
    pub fn as_reset(self) -> Self {
        Began { cause: BeginCause::Reset, has_snapshot: true, ..self }
    }
}

/// Why a subscription begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BeginCause {
    /// It was asked for.
    Subscribed,
    /// It lives on, but too much waited for its subscriber, and all that was not delivered is dropped; or the data began
    /// another epoch. The whole present state follows as a snapshot: a key that is not in it is gone.
    Reset,
}

/// One part of a snapshot: some of the keys that a subscription covers, all of one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The subscription's pattern.
    pub pattern: Pattern,
    /// The present keys behind those of the parts before, in key order; none if nothing more matches.
    pub records: Records,
    /// That of the whole snapshot, the same in all its parts: every change up to and including this revision is
    /// contained. One after it is either contained or follows behind the last part.
    pub revision: Revision,
    /// Within which this revision may be compared.
    pub epoch: Epoch,
    /// Whether this part ends the snapshot.
    pub is_last: bool,
}

/// Reads a snapshot, part by part, when its subscriber is ready for it. Until then nothing is copied and nothing waits:
/// no change of a key that is not read yet is given to the notifier.
///
/// [`Inbox`](crate::mailbox::Inbox) does the reading for a subscriber that has a mailbox.
#[derive(Clone)]
pub struct SnapshotReader(Arc<dyn ReadSnapshot>);

/// What a store does for a [`SnapshotReader`].
pub(crate) trait ReadSnapshot: Send + Sync {
    fn next_part(&self) -> Option<Snapshot>;

    fn reset(&self) -> bool;

    fn has_ended(&self) -> bool;

    fn wants(&self, key: &Key, sequence: u64) -> bool;
}

impl SnapshotReader {
    pub(crate) fn new(of: Arc<dyn ReadSnapshot>) -> Self {
        SnapshotReader(of)
    }

    /// A reader of these parts, once, without a store: for tests of notifiers.
    pub fn of(parts: impl IntoIterator<Item = Snapshot>) -> Self {
        SnapshotReader(Arc::new(Mutex::new(parts.into_iter().collect::<VecDeque<_>>())))
    }

    /// Reads the next part; after the last one the snapshot begins anew. `None` once the store is gone; and once where the
    /// data began a new epoch before the snapshot was read to its end: it ends there, and one that belongs to the next
    /// [`Began`] takes its place.
    ///
    /// Takes locks of the store: [`Notifier::notify`](crate::Notifier::notify) must not call it.
    #[must_use]
    pub fn next_part(&self) -> Option<Snapshot> {
        self.0.next_part()
    }

    /// Has the store give no more changes of this subscription to its notifier until a fresh snapshot is read: the
    /// notifier is about to drop all that waits for it. True if the notifier is to note that a snapshot
    /// [begins](Began::as_reset); false if an unread one waits already, or the subscription has ended.
    #[must_use]
    pub fn reset(&self) -> bool {
        self.0.reset()
    }

    /// Whether the subscription has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.0.has_ended()
    }

    /// Whether a change is for the notifier, or for a snapshot that is to be read.
    pub(crate) fn wants(&self, key: &Key, sequence: u64) -> bool {
        self.0.wants(key, sequence)
    }
}

impl ReadSnapshot for Mutex<VecDeque<Snapshot>> {
    fn next_part(&self) -> Option<Snapshot> {
        self.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    fn reset(&self) -> bool {
        true
    }

    fn has_ended(&self) -> bool {
        false
    }

    fn wants(&self, _key: &Key, _sequence: u64) -> bool {
        true
    }
}

impl PartialEq for SnapshotReader {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for SnapshotReader {}

impl fmt::Debug for SnapshotReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnapshotReader").finish_non_exhaustive()
    }
}

/// What an event says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EventKind {
    /// A subscription begins, or begins anew: the first event of each.
    Began(Began),
    /// Part of the snapshot that began last. A store gives none to a notifier: they are [read](SnapshotReader).
    Snapshot(Snapshot),
    /// A key changed.
    Change(Change),
    /// The subscription has ended; nothing follows for it.
    Ended {
        /// The subscription's pattern.
        pattern: Pattern,
        /// Why.
        reason: EndReason,
    },
}

/// What subscribers are given, shared by all of them.
pub struct Event {
    kind: EventKind,
    sequence: u64,
    ends_revision: bool,
    memos: Mutex<Vec<Memo>>,
    /// Where its bytes are counted.
    counter: Option<Arc<AtomicUsize>>,
}

type Memo = Arc<dyn Any + Send + Sync>;

impl Event {
    /// An event that says `kind`. A change is alone at its revision, which is its [sequence](Self::sequence) number too.
    #[must_use]
    pub fn new(kind: EventKind) -> Arc<Self> {
        let sequence = match &kind {
            EventKind::Change(change) => change.revision.get(),
            _ => 0,
        };
        Event::in_sequence(kind, sequence, true)
    }

    /// An event with this [sequence](Self::sequence) number, which [ends its revision](Self::ends_revision) or does not:
    /// for tests of notifiers.
    #[must_use]
    pub fn in_sequence(kind: EventKind, sequence: u64, ends_revision: bool) -> Arc<Self> {
        Arc::new(Event { kind, sequence, ends_revision, memos: Mutex::new(Vec::new()), counter: None })
    }

    /// An event for a change, whose bytes are counted for as long as it lives.
    pub(crate) fn counted(change: Change, sequence: u64, ends_revision: bool, counter: &Arc<AtomicUsize>) -> Arc<Self> {
        let (kind, counter) = (EventKind::Change(change), Some(Arc::clone(counter)));
        let event = Event { kind, sequence, ends_revision, memos: Mutex::new(Vec::new()), counter };
        event.counter.iter().for_each(|counter| _ = counter.fetch_add(event.size(), Relaxed));
        Arc::new(event)
    }

    /// The number of the change among all changes that the store made visible since it was opened; zero for other events.
    /// It rises from one change to the next, also where several have one revision, or an epoch begins. So a notifier that
    /// is given an event twice, as two of its subscriptions cover it, knows it by this number.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Whether no other change of its revision follows, of whatever key. Only behind such a one is the revision a point to
    /// resume from.
    #[must_use]
    pub fn ends_revision(&self) -> bool {
        self.ends_revision
    }

    /// What it says.
    #[must_use]
    pub fn kind(&self) -> &EventKind {
        &self.kind
    }

    /// Roughly how many bytes of memory it takes, without what was derived from it. A long value counts in full,
    /// although the store may hold it too.
    #[must_use]
    pub fn size(&self) -> usize {
        let data = match &self.kind {
            EventKind::Change(change) => change_size(change),
            EventKind::Snapshot(snapshot) => snapshot.records.size(),
            _ => 0,
        };
        size_of::<Self>() + ALLOC_LEN + data
    }

    /// What a family of notifiers derived from this event, made by the first that asks and shared by all that ask
    /// for the same type, until [`forget_memos`](Self::forget_memos). An event that goes to hundreds of connections is
    /// encoded once this way.
    pub fn memo<T: Any + Send + Sync>(&self, make: impl FnOnce(&EventKind) -> T) -> Arc<T> {
        let mut memos = self.memos.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(memo) = memos.iter().find_map(|memo| Arc::clone(memo).downcast::<T>().ok()) {
            return memo;
        }
        let memo = Arc::new(make(&self.kind));
        memos.push(Arc::clone(&memo) as Memo);
        memo
    }

    /// Forgets what was derived: an event that only waits holds its own bytes and no others. Its holders keep it.
    pub fn forget_memos(&self) {
        let memos = std::mem::take(&mut *self.memos.lock().unwrap_or_else(PoisonError::into_inner));
        drop(memos);
    }
}

/// What an allocation takes besides its bytes, and a counter of references: a rough mean.
pub(crate) const ALLOC_LEN: usize = 24;

/// What a change takes besides its own size.
fn change_size(change: &Change) -> usize {
    let value_len = match change.action.value_len() {
        0 => 0,
        // A value that came by itself has an allocation of its own.
        len => len + 2 * ALLOC_LEN,
    };
    let meta_len = change.meta.as_bytes().map_or(0, |bytes| bytes.len() + ALLOC_LEN);
    change.key.as_str().len() + ALLOC_LEN + value_len + meta_len
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Some(counter) = &self.counter {
            counter.fetch_sub(self.size(), Relaxed);
        }
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.kind, f)
    }
}
