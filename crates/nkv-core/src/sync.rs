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

/// A mutex whose owner, if it works for long, can let waiting threads go first.
#[derive(Debug)]
pub(crate) struct TurnMutex<T> {
    /// How often the lock was asked for, and had.
    asked: AtomicUsize,
    had: AtomicUsize,
    mutex: Mutex<T>,
}

impl<T> TurnMutex<T> {
    pub(crate) fn new(value: T) -> Self {
        TurnMutex { asked: AtomicUsize::new(0), had: AtomicUsize::new(0), mutex: Mutex::new(value) }
    }

    /// Also after a panic of another owner: what is under it must be whole between two steps.
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.asked.fetch_add(1, SeqCst);
        let guard = self.mutex.lock().unwrap_or_else(PoisonError::into_inner);
        self.had.fetch_add(1, SeqCst);
        guard
    }

    /// Whether another waits.
    pub(crate) fn is_wanted(&self) -> bool {
        self.had.load(SeqCst) != self.asked.load(SeqCst)
    }

    /// Waits for as many turns of others as others wait now, to be called without the lock. Some may be of threads that
    /// come meanwhile: to wait for all of them might never end.
    pub(crate) fn give_turns(&self) {
        let (had, asked) = (self.had.load(SeqCst), self.asked.load(SeqCst));
        let waiting = asked.wrapping_sub(had);
        while self.had.load(SeqCst).wrapping_sub(had) < waiting {
            yield_now();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

    use super::*;

    // It once went on until none waited: beside several that always ask again, for ever.
    #[test]
    fn turns_are_given_to_those_who_wait_and_not_to_all_who_come() {
        let (mutex, is_over) = (Arc::new(TurnMutex::new(())), Arc::new(AtomicBool::new(false)));
        let others: Vec<_> = (0..4)
            .map(|_| {
                let (mutex, is_over) = (Arc::clone(&mutex), Arc::clone(&is_over));
                std::thread::spawn(move || {
                    while !is_over.load(SeqCst) {
                        let guard = mutex.lock();
                        std::thread::sleep(Duration::from_millis(1));
                        drop(guard);
                    }
                })
            })
            .collect();
        let (done, is_done) = std::sync::mpsc::channel();
        let giving = std::thread::spawn({
            let mutex = Arc::clone(&mutex);
            move || {
                (0..20).for_each(|_| mutex.give_turns());
                _ = done.send(());
            }
        });
        let ended = is_done.recv_timeout(Duration::from_secs(20));
        is_over.store(true, SeqCst);
        others.into_iter().chain([giving]).for_each(|thread| thread.join().unwrap());
        ended.unwrap();
    }
}
