//! The calls of a connection in their first turn: that of the connection's own task. Most are answered in it, and need no task.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Context;

use hyper::rt::Executor;

type Call = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The calls of one connection that have come and had no turn.
#[derive(Default)]
pub(crate) struct FirstTurns(Arc<Mutex<VecDeque<Call>>>);

/// Where HTTP/2 puts them. A call has one itself.
#[derive(Clone)]
pub(crate) struct Arrivals(Arc<Mutex<VecDeque<Call>>>);

fn lock(calls: &Mutex<VecDeque<Call>>) -> MutexGuard<'_, VecDeque<Call>> {
    calls.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Arrivals {
    fn execute(&self, call: F) {
        lock(&self.0).push_back(Box::pin(call));
    }
}

impl FirstTurns {
    pub(crate) fn arrivals(&self) -> Arrivals {
        Arrivals(Arc::clone(&self.0))
    }

    /// Gives each its turn; what is not done then goes on as a task of its own.
    pub(crate) fn give(&self, cx: &mut Context<'_>) {
        loop {
            let Some(mut call) = lock(&self.0).pop_front() else { return };
            if call.as_mut().poll(cx).is_pending() {
                drop(tokio::spawn(call));
            }
        }
    }
}

impl Drop for FirstTurns {
    /// A call that waits holds what it waits in.
    fn drop(&mut self) {
        let calls = std::mem::take(&mut *lock(&self.0));
        drop(calls);
    }
}
