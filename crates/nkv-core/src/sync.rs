//! The locks of store, events and mailbox: std's, or loom's when interleavings are explored (`--cfg loom`).

#[cfg(loom)]
pub(crate) use loom::sync::atomic::AtomicBool;
#[cfg(loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::AtomicBool;
#[cfg(not(loom))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard};

/// A value that is set once, and read without a lock. Loom has none: there it is one under a lock, so that each reading
/// and the setting are steps between which others may come.
#[cfg(not(loom))]
pub(crate) struct Once<T>(std::sync::OnceLock<T>);
#[cfg(loom)]
pub(crate) struct Once<T>(Mutex<Option<T>>);

#[cfg(not(loom))]
impl<T: Clone> Once<T> {
    pub(crate) fn new() -> Self {
        Once(std::sync::OnceLock::new())
    }

    pub(crate) fn get(&self) -> Option<T> {
        self.0.get().cloned()
    }

    /// Gives the value back if another was set before.
    pub(crate) fn set(&self, value: T) -> Result<(), T> {
        self.0.set(value)
    }
}

#[cfg(loom)]
impl<T: Clone> Once<T> {
    pub(crate) fn new() -> Self {
        Once(Mutex::new(None))
    }

    pub(crate) fn get(&self) -> Option<T> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    pub(crate) fn set(&self, value: T) -> Result<(), T> {
        let mut own = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if own.is_some() {
            return Err(value);
        }
        *own = Some(value);
        Ok(())
    }
}
