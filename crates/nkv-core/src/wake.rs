//! Wakers that are called, and notifiers that are dropped, once no lock is held.
//!
//! What these do is their owners' business: they may call the store, or drop what owns a subscription. So a store that
//! notifies under its locks notes them for the thread and lets them go afterwards.

use std::any::Any;
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
    dropped: Vec<Box<dyn Any>>,
}

impl Noted {
    const fn new() -> Self {
        Noted { depth: 0, wakers: Vec::new(), dropped: Vec::new() }
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
}

impl Drop for Later {
    fn drop(&mut self) {
        let (wakers, dropped) = NOTED.with(|noted| {
            let mut noted = noted.borrow_mut();
            noted.depth -= 1;
            if noted.depth > 0 {
                return Default::default();
            }
            (std::mem::take(&mut noted.wakers), std::mem::take(&mut noted.dropped))
        });
        wakers.into_iter().for_each(Waker::wake);
        drop(dropped);
    }
}

/// Drops, or has it done when the locks of this thread's stores are given back.
pub(crate) fn drop_later<T: 'static>(all: Vec<T>) {
    if all.is_empty() {
        return;
    }
    let all: Box<dyn Any> = Box::new(all);
    let all = NOTED.with(|noted| {
        let mut noted = noted.borrow_mut();
        if noted.depth == 0 {
            return Some(all);
        }
        noted.dropped.push(all);
        None
    });
    drop(all);
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
