//! How much all connections together may hold of messages that have not arrived whole.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

#[derive(Debug)]
pub(crate) struct Budget {
    limit: usize,
    holders: Mutex<Holders>,
}

#[derive(Debug, Default)]
struct Holders {
    total: usize,
    next_id: u64,
    /// Only connections that hold something are here.
    held: HashMap<u64, (usize, Arc<Notify>)>,
}

/// One connection's share.
#[derive(Debug)]
pub(crate) struct Share {
    budget: Arc<Budget>,
    id: u64,
    held: usize,
    evicted: Arc<Notify>,
}

impl Budget {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Budget { limit, holders: Mutex::default() })
    }

    pub(crate) fn share(self: &Arc<Self>) -> Share {
        let mut holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        holders.next_id += 1;
        Share { budget: Arc::clone(self), id: holders.next_id, held: 0, evicted: Arc::default() }
    }
}

impl Share {
    /// Notes how much this connection holds now. If that is too much for all together, the largest is evicted.
    pub(crate) fn hold(&mut self, bytes: usize) {
        if bytes == self.held {
            return; // the common case: nothing, before and after
        }
        let mut guard = self.budget.holders.lock().unwrap_or_else(PoisonError::into_inner);
        let holders = &mut *guard;
        holders.total = holders.total - self.held + bytes;
        self.held = bytes;
        if bytes == 0 {
            holders.held.remove(&self.id);
        } else {
            holders.held.insert(self.id, (bytes, Arc::clone(&self.evicted)));
        }
        if holders.total > self.budget.limit
            && let Some((_, evicted)) = holders.held.values().max_by_key(|(held, _)| *held)
        {
            evicted.notify_one();
        }
    }

    /// Waits until this connection is to give up what it holds.
    pub(crate) async fn evicted(&self) {
        loop {
            self.evicted.notified().await;
            let holders = self.budget.holders.lock().unwrap_or_else(PoisonError::into_inner);
            // The message may have become whole, or others may have let go, since that was said.
            if self.held > 0 && holders.total > self.budget.limit {
                return;
            }
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.hold(0);
    }
}
