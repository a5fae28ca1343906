//! What connections hold, each and all together: requests that have not arrived whole, answers and snapshots that were
//! not taken yet, changes that wait to be told. Past the limit, whoever holds most is closed.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nkv_notify_tcp::TcpNotifier;
use tokio::sync::Notify;
use tokio::time::Instant;

/// What a pending change costs its connection, roughly; the value is shared with the store.
const PENDING_LEN: usize = 128;

/// How often whoever waits for room looks again.
const ROOM_PAUSE: Duration = Duration::from_millis(10);

#[derive(Debug)]
pub(crate) struct Budget {
    limit: usize,
    /// Bytes of answers and snapshots that wait on all connections; the notifiers keep it up.
    waiting: Arc<AtomicUsize>,
    /// Bytes of requests that have not arrived whole, on all connections.
    incomplete: AtomicUsize,
    holders: Mutex<Holders>,
}

#[derive(Debug, Default)]
struct Holders {
    next_id: u64,
    by_id: HashMap<u64, Arc<Holder>>,
}

#[derive(Debug)]
struct Holder {
    incomplete: AtomicUsize,
    notifier: TcpNotifier,
    evicted: Notify,
    /// It was told to give up what it holds, and will.
    is_leaving: AtomicBool,
}

/// One connection's share.
#[derive(Debug)]
pub(crate) struct Share {
    budget: Arc<Budget>,
    id: u64,
    holder: Arc<Holder>,
}

impl Holder {
    fn new(notifier: TcpNotifier) -> Arc<Self> {
        let (incomplete, evicted, is_leaving) = Default::default();
        Arc::new(Holder { incomplete, notifier, evicted, is_leaving })
    }

    fn held(&self) -> usize {
        let pending = self.notifier.backlog().queued.saturating_mul(PENDING_LEN);
        self.incomplete.load(Relaxed).saturating_add(self.notifier.waiting()).saturating_add(pending)
    }

    fn evict(&self) {
        self.is_leaving.store(true, Relaxed);
        self.evicted.notify_one();
    }
}

impl Budget {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        let (waiting, incomplete, holders) = Default::default();
        Arc::new(Budget { limit, waiting, incomplete, holders })
    }

    /// What notifiers count answers and snapshots in.
    pub(crate) fn waiting(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.waiting)
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

    /// Waits until there is room for an answer or a snapshot of any size. Whoever holds most does not keep others
    /// waiting for longer than `patience`.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub(crate) async fn room(&self, patience: Duration) {
        let mut start = Instant::now();
        while self.queued() > self.limit / 2 {
            tokio::time::sleep(ROOM_PAUSE).await;
            if start.elapsed() >= patience {
                if let (_, Some((_, largest))) = self.lock().total_and_largest() {
                    largest.evict();
                }
                start = Instant::now();
            }
        }
    }

    /// All but the changes that wait, which are counted only when it matters.
    fn queued(&self) -> usize {
        self.waiting.load(Relaxed).saturating_add(self.incomplete.load(Relaxed))
    }

    fn lock(&self) -> MutexGuard<'_, Holders> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Holders {
    /// What those hold together that stay, and which of them holds most.
    fn total_and_largest(&self) -> (usize, Option<(usize, &Holder)>) {
        let staying = self.by_id.values().filter(|holder| !holder.is_leaving.load(Relaxed));
        staying.fold((0, None), |(total, largest), holder| {
            let held = holder.held();
            let largest = largest.filter(|(most, _)| *most >= held).or(Some((held, &**holder)));
            (total.saturating_add(held), largest)
        })
    }
}

impl Share {
    /// Notes how many bytes this connection holds of a request that is not whole.
    pub(crate) fn hold(&self, bytes: usize) {
        let before = self.holder.incomplete.swap(bytes, Relaxed);
        if bytes > before {
            self.budget.incomplete.fetch_add(bytes.saturating_sub(before), Relaxed);
        } else if bytes < before {
            self.budget.incomplete.fetch_sub(before.saturating_sub(bytes), Relaxed);
        }
        if self.is_over() {
            self.budget.check();
        }
    }

    /// Whether all connections hold too much.
    pub(crate) fn is_over(&self) -> bool {
        self.budget.queued() > self.budget.limit
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
