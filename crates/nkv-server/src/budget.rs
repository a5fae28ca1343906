//! What connections hold, each and all together: requests that have not arrived whole, answers and snapshots that were
//! not taken, changes that wait to be told or are being told, deep subscriptions. Past the limit, whoever holds most is
//! closed.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nkv_notify_tcp::TcpNotifier;
use tokio::sync::{Mutex as Queue, Notify};
use tokio::time::Instant;

/// What a pending change costs its connection, roughly; the value is shared with the store.
const PENDING_LEN: usize = 256;

/// How often whoever waits for room looks again.
const ROOM_PAUSE: Duration = Duration::from_millis(10);

#[derive(Debug)]
pub(crate) struct Budget {
    limit: usize,
    /// Bytes of answers and snapshots that wait on all connections; the notifiers keep it up.
    waiting: Arc<AtomicUsize>,
    /// Bytes that the reading sides of all connections hold.
    read: AtomicUsize,
    holders: Mutex<Holders>,
    /// Whoever waits for room, in the order in which they came.
    queue: Queue<()>,
}

#[derive(Debug, Default)]
struct Holders {
    next_id: u64,
    by_id: HashMap<u64, Arc<Holder>>,
}

#[derive(Debug)]
struct Holder {
    read: AtomicUsize,
    notifier: TcpNotifier,
    evicted: Notify,
    /// It was told to give up what it holds, and will.
    is_leaving: AtomicBool,
}

/// One connection's share, for as long as anything of the connection is left.
#[derive(Debug)]
pub(crate) struct Share {
    budget: Arc<Budget>,
    id: u64,
    holder: Arc<Holder>,
}

impl Holder {
    fn new(notifier: TcpNotifier) -> Arc<Self> {
        let (read, evicted, is_leaving) = Default::default();
        Arc::new(Holder { read, notifier, evicted, is_leaving })
    }

    /// All but what is being told of changes, which others may share.
    fn held_alone(&self) -> usize {
        let pending = self.notifier.backlog().queued.saturating_mul(PENDING_LEN);
        self.read.load(Relaxed).saturating_add(self.notifier.waiting()).saturating_add(pending)
    }

    fn held(&self) -> usize {
        self.held_alone().saturating_add(self.notifier.gathered().1)
    }

    fn evict(&self) {
        self.is_leaving.store(true, Relaxed);
        self.evicted.notify_one();
    }
}

impl Holders {
    /// What those hold together that stay, and which of them holds most. An encoding that several write counts once.
    fn total_and_largest(&self) -> (usize, Option<(usize, &Holder)>) {
        let mut encodings = HashSet::new();
        let (mut total, mut largest) = (0_usize, None);
        for holder in self.by_id.values().filter(|holder| !holder.is_leaving.load(Relaxed)) {
            let (alone, (encoding, gathered)) = (holder.held_alone(), holder.notifier.gathered());
            let shared = if gathered == 0 || encodings.insert(encoding) { gathered } else { 0 };
            total = total.saturating_add(alone).saturating_add(shared);
            let held = alone.saturating_add(gathered);
            if largest.is_none_or(|(most, _)| held > most) {
                largest = Some((held, &**holder));
            }
        }
        (total, largest)
    }
}

impl Budget {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        let (waiting, read, holders, queue) = Default::default();
        Arc::new(Budget { limit, waiting, read, holders, queue })
    }

    /// What notifiers count answers and snapshots in.
    pub(crate) fn waiting(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.waiting)
    }

    /// So many bytes of values may be written before what waits for subscribers is to be looked at.
    pub(crate) fn check_every(&self) -> usize {
        self.limit / 64
    }

    pub(crate) fn share(self: &Arc<Self>, notifier: TcpNotifier) -> Share {
        let holder = Holder::new(notifier);
        let mut holders = self.lock();
        let id = holders.next_id;
        holders.next_id = id.wrapping_add(1);
        holders.by_id.insert(id, Arc::clone(&holder));
        drop(holders);
        Share { budget: Arc::clone(self), id, holder }
    }

    /// Closes the largest holder if all together hold too much. One that alone is the reason is let through: what it
    /// asked for was admitted by [`room`](Self::room).
    pub(crate) fn check(&self) {
        let holders = self.lock();
        let (total, largest) = holders.total_and_largest();
        if let Some((held, largest)) = largest
            && total > self.limit
            && total.saturating_sub(held) > self.limit / 2
        {
            largest.evict();
        }
    }

    /// To be called when somebody may have come to hold much more.
    pub(crate) fn check_if_over(&self) {
        if self.is_over() {
            self.check();
        }
    }

    fn is_over(&self) -> bool {
        self.queued() > self.limit
    }

    /// Waits until there is room for an answer or a snapshot of any size, or until `gone`. Whoever came first goes
    /// first, and whoever holds most does not keep it waiting for longer than `patience`.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the place in the queue.
    pub(crate) async fn room(&self, patience: Duration, gone: impl Fn() -> bool) {
        if self.queued() <= self.limit / 2 {
            return;
        }
        let _first = self.queue.lock().await;
        let start = Instant::now();
        while self.queued() > self.limit / 2 && !gone() {
            if start.elapsed() >= patience
                && let (total, Some((_, largest))) = self.lock().total_and_largest()
                && total > self.limit / 2
            {
                largest.evict();
            }
            tokio::time::sleep(ROOM_PAUSE).await;
        }
    }

    /// All but the changes that wait, which are counted only when it matters.
    fn queued(&self) -> usize {
        self.waiting.load(Relaxed).saturating_add(self.read.load(Relaxed))
    }

    fn lock(&self) -> MutexGuard<'_, Holders> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Share {
    /// Notes how many bytes this connection's reading side holds.
    pub(crate) fn hold(&self, bytes: usize) {
        let before = self.holder.read.swap(bytes, Relaxed);
        if bytes > before {
            self.budget.read.fetch_add(bytes.saturating_sub(before), Relaxed);
            self.budget.check_if_over();
        } else if bytes < before {
            self.budget.read.fetch_sub(before.saturating_sub(bytes), Relaxed);
        }
    }

    /// Whether all connections hold too much.
    pub(crate) fn is_over(&self) -> bool {
        self.budget.is_over()
    }

    /// What this connection holds.
    pub(crate) fn held(&self) -> usize {
        self.holder.held()
    }

    /// Waits until this connection is to give up what it holds.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub(crate) fn evicted(&self) -> impl Future<Output = ()> + use<> {
        let holder = Arc::clone(&self.holder);
        async move { holder.evicted.notified().await }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.lock().by_id.remove(&self.id);
        self.hold(0);
    }
}
