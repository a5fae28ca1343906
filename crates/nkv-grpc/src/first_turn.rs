//! The calls of a connection in their first turn: that of the connection's own task. Most are answered in it, and need no task.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Context;

use hyper::rt::Executor;

type Call = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Calls that are polled for the first time in one turn of their connection, at most: it has its socket to serve too.
const CALLS_MAX: usize = 64;

/// The queue of one connection's calls that were not polled yet.
#[derive(Default)]
pub(crate) struct FirstTurns(Arc<Mutex<VecDeque<Call>>>);

/// What HTTP/2 fills that queue by. Each call owns a clone of it.
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

    /// Polls calls that have come; what is not done then goes on as a task of its own.
    pub(crate) fn give(&self, cx: &mut Context<'_>) {
        for _ in 0..CALLS_MAX {
            let Some(mut call) = lock(&self.0).pop_front() else { return };
            if call.as_mut().poll(cx).is_pending() {
                drop(tokio::spawn(call));
            }
        }
        cx.waker().wake_by_ref();
    }
}

impl Drop for FirstTurns {
    /// A call in the queue owns the queue.
    fn drop(&mut self) {
        let calls = std::mem::take(&mut *lock(&self.0));
        drop(calls);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Weak;
    use std::task::Waker;

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn a_call_that_is_not_done_in_its_first_turn_goes_on_as_a_task() {
        let calls = FirstTurns::default();
        let (go, begun) = oneshot::channel();
        let (done, is_done) = oneshot::channel();
        calls.arrivals().execute(async move { drop(begun.await.map(|()| done.send(()))) });
        calls.give(&mut Context::from_waker(Waker::noop()));
        go.send(()).unwrap();
        is_done.await.unwrap();
    }

    #[tokio::test]
    async fn the_calls_that_one_turn_has_no_time_for_have_the_next() {
        let calls = FirstTurns::default();
        let done = Arc::new(Mutex::new(0));
        for _ in 0..=CALLS_MAX {
            let done = Arc::clone(&done);
            calls.arrivals().execute(async move { *done.lock().unwrap() += 1 });
        }
        let mut turns = 0;
        std::future::poll_fn(|cx| {
            turns += 1;
            calls.give(cx);
            if *done.lock().unwrap() > CALLS_MAX { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
        assert_eq!(turns, 2);
    }

    #[test]
    fn a_connection_that_ends_gives_back_the_calls_that_had_no_turn() {
        let calls = FirstTurns::default();
        let (held, arrivals) = (Arc::new(()), calls.arrivals());
        let seen: Weak<()> = Arc::downgrade(&held);
        // As each call of HTTP/2 does, it has where it came to.
        calls.arrivals().execute(async move { drop((held, arrivals)) });
        drop(calls);
        assert!(seen.upgrade().is_none());
    }
}
