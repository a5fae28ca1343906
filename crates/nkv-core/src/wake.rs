//! Wakers that are called once no lock is held.
//!
//! What a waker does is its owner's business: it may call the store, or drop what owns a subscription. So a store that
//! notifies under its locks notes the wakers of the thread and calls them afterwards.

use std::cell::RefCell;
use std::task::Waker;

use crate::sync::thread_local;

#[cfg(not(loom))]
thread_local! {
    static NOTED: RefCell<Noted> = const { RefCell::new(Noted::new()) };
}

// Loom's macro knows no `const`.
#[cfg(loom)]
thread_local! {
    static NOTED: RefCell<Noted> = RefCell::new(Noted::new());
}

struct Noted {
    /// How many stores of this thread hold a lock.
    depth: usize,
    wakers: Vec<Waker>,
}

impl Noted {
    const fn new() -> Self {
        Noted { depth: 0, wakers: Vec::new() }
    }
}

/// While one lives, [`wake`] only notes. To be made before a lock is taken and dropped after it is given back.
#[derive(Debug)]
pub(crate) struct Later(());

impl Later {
    pub(crate) fn begin() -> Self {
        NOTED.with(|noted| noted.borrow_mut().depth += 1);
        Later(())
    }

    /// Wakes all that were noted. No lock may be held.
    pub(crate) fn wake_all(&self) {
        let wakers = NOTED.with(|noted| {
            let mut noted = noted.borrow_mut();
            if noted.depth == 1 { std::mem::take(&mut noted.wakers) } else { Vec::new() }
        });
        wakers.into_iter().for_each(Waker::wake);
    }
}

impl Drop for Later {
    fn drop(&mut self) {
        let wakers = NOTED.with(|noted| {
            let mut noted = noted.borrow_mut();
            noted.depth -= 1;
            if noted.depth == 0 { std::mem::take(&mut noted.wakers) } else { Vec::new() }
        });
        wakers.into_iter().for_each(Waker::wake);
    }
}

/// Wakes, or has it done when the locks of this thread's stores are given back.
pub(crate) fn wake(waker: Waker) {
    let waker = NOTED.with(|noted| {
        let mut noted = noted.borrow_mut();
        if noted.depth == 0 {
            return Some(waker);
        }
        noted.wakers.push(waker);
        None
    });
    if let Some(waker) = waker {
        waker.wake();
    }
}
