//! The locks of store, events and mailbox: std's, or loom's when interleavings are explored (`--cfg loom`).

#[cfg(loom)]
pub(crate) use loom::sync::atomic::AtomicBool;
#[cfg(loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard};
#[cfg(loom)]
pub(crate) use loom::{thread::yield_now, thread_local};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::AtomicBool;
#[cfg(not(loom))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard};
#[cfg(not(loom))]
pub(crate) use std::{thread::yield_now, thread_local};

use std::sync::PoisonError;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;

/// A mutex whose owner, if it works for long, can let those who wait for it go first.
#[derive(Debug)]
pub(crate) struct TurnMutex<T> {
    waiting: AtomicUsize,
    /// How often it was locked.
    locked: AtomicUsize,
    mutex: Mutex<T>,
}

impl<T> TurnMutex<T> {
    pub(crate) fn new(value: T) -> Self {
        TurnMutex { waiting: AtomicUsize::new(0), locked: AtomicUsize::new(0), mutex: Mutex::new(value) }
    }

    /// Also after a panic of another owner: what is under it must be whole between two steps.
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.waiting.fetch_add(1, SeqCst);
        let guard = self.mutex.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiting.fetch_sub(1, SeqCst);
        self.locked.fetch_add(1, SeqCst);
        guard
    }

    /// Whether another waits.
    pub(crate) fn is_wanted(&self) -> bool {
        self.waiting.load(SeqCst) > 0
    }

    /// Waits until as many as wait now have had their turn, to be called without the lock.
    pub(crate) fn give_turns(&self) {
        let (before, waiting) = (self.locked.load(SeqCst), self.waiting.load(SeqCst));
        while self.is_wanted() && self.locked.load(SeqCst).wrapping_sub(before) < waiting {
            yield_now();
        }
    }
}
