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
    /// How often somebody has had it.
    turns: AtomicUsize,
    mutex: Mutex<T>,
}

impl<T> TurnMutex<T> {
    pub(crate) fn new(value: T) -> Self {
        TurnMutex { waiting: AtomicUsize::new(0), turns: AtomicUsize::new(0), mutex: Mutex::new(value) }
    }

    /// Also after a panic of another owner: what is under it must be whole between two steps.
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.waiting.fetch_add(1, SeqCst);
        let guard = self.mutex.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiting.fetch_sub(1, SeqCst);
        self.turns.fetch_add(1, SeqCst);
        guard
    }

    /// Whether another waits.
    pub(crate) fn is_wanted(&self) -> bool {
        self.waiting.load(SeqCst) > 0
    }

    /// Waits until as many as wait now have had their turn, or none waits, to be called without the lock.
    pub(crate) fn give_turns(&self) {
        let (before, count) = (self.turns.load(SeqCst), self.waiting.load(SeqCst));
        while self.is_wanted() && self.turns.load(SeqCst).wrapping_sub(before) < count {
            yield_now();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::sync::{Arc, mpsc};
    use std::thread;
    use std::time::Duration;

    use super::*;

    // It was until nobody waited, which may never be.
    #[test]
    fn who_gives_turns_goes_on_although_others_come_again_and_again() {
        let (mutex, is_over) = (Arc::new(TurnMutex::new(())), Arc::new(AtomicBool::new(false)));
        let others: Vec<_> = (0..4)
            .map(|_| {
                let (mutex, is_over) = (Arc::clone(&mutex), Arc::clone(&is_over));
                thread::spawn(move || {
                    while !is_over.load(SeqCst) {
                        let _guard = mutex.lock();
                        thread::sleep(Duration::from_millis(1));
                    }
                })
            })
            .collect();
        let (done, waits) = mpsc::channel();
        thread::spawn(move || {
            while !mutex.is_wanted() {
                yield_now();
            }
            mutex.give_turns();
            done.send(()).unwrap();
        });
        let is_done = waits.recv_timeout(Duration::from_secs(10)).is_ok();
        is_over.store(true, SeqCst);
        others.into_iter().for_each(|other| other.join().unwrap());
        assert!(is_done);
    }
}
