//! One wake-up of the runtime for many tasks: a thread that stores and notifies a batch wakes hundreds of connections,
//! and a system call for each would cost more than the batch.
//!
//! A task that is to be woken this way lends its waker to a [`Sleeper`]. Waking that only notes it; the pump, a task of the
//! runtime, then wakes all noted tasks from within the runtime, which is cheap. A thread that wakes many does
//! so [`gathered`](WakeUps::gathered): the pump is woken once at the end.

use std::cell::Cell;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Wake, Waker};

use tokio::sync::Notify;

#[derive(Debug, Default)]
pub(crate) struct WakeUps {
    woken: Mutex<Vec<Arc<Sleeper>>>,
    requested: Notify,
    /// There is no pump any more.
    is_closed: AtomicBool,
}

/// Stands for the waker of one task.
#[derive(Debug)]
pub(crate) struct Sleeper {
    wake_ups: Arc<WakeUps>,
    task: Waker,
    is_noted: AtomicBool,
}

/// What [`Handle::waker`](crate::Handle::waker) gave to one task, kept from one poll to the next.
#[derive(Debug, Default)]
pub struct SharedWaker(Option<(Waker, Waker)>);

thread_local! {
    static IS_GATHERING: Cell<bool> = const { Cell::new(false) };
}

impl WakeUps {
    /// A waker that stands for `task`: the one that is `known`, if that is of the same task.
    pub(crate) fn waker<'a>(self: &Arc<Self>, known: &'a mut SharedWaker, task: &Waker) -> &'a Waker {
        let known = &mut known.0;
        if known.as_ref().is_none_or(|(of, _)| !of.will_wake(task)) {
            *known = None;
        }
        &known.get_or_insert_with(|| (task.clone(), self.new_waker(task))).1
    }

    fn new_waker(self: &Arc<Self>, task: &Waker) -> Waker {
        let sleeper = Sleeper { wake_ups: Arc::clone(self), task: task.clone(), is_noted: AtomicBool::new(false) };
        Waker::from(Arc::new(sleeper))
    }

    /// Has the pump woken once for all whom `wakes` wakes on this thread.
    pub(crate) fn gathered<R>(&self, wakes: impl FnOnce() -> R) -> R {
        IS_GATHERING.set(true);
        let _gathered = Gathered(self);
        wakes()
    }

    /// Wakes the pump.
    pub(crate) fn request(&self) {
        self.requested.notify_one();
    }

    /// Wakes the noted tasks and calls `each_time`, for ever. The last to be noted is the first to be woken: those are the
    /// tasks that wait for an answer. Subscribers, which are only notified, come after them.
    pub(crate) async fn pump(&self, each_time: impl Fn()) {
        let mut woken = Vec::new();
        loop {
            self.requested.notified().await;
            std::mem::swap(&mut *self.lock(), &mut woken);
            let any = !woken.is_empty();
            while let Some(sleeper) = woken.pop() {
                // What comes from here on is to wake it again.
                sleeper.is_noted.swap(false, AcqRel);
                sleeper.task.wake_by_ref();
            }
            if any {
                tokio::task::yield_now().await;
            }
            each_time();
        }
    }

    /// Wakes all that are noted, and from now on each at once: the pump has ended.
    pub(crate) fn close(&self) {
        self.is_closed.store(true, Release);
        let noted = std::mem::take(&mut *self.lock());
        noted.iter().for_each(|sleeper| sleeper.task.wake_by_ref());
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Sleeper>>> {
        self.woken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The end of a quiet time, also by a panic.
struct Gathered<'a>(&'a WakeUps);

impl Drop for Gathered<'_> {
    fn drop(&mut self) {
        IS_GATHERING.set(false);
        if !self.0.lock().is_empty() {
            self.0.request();
        }
    }
}

impl Wake for Sleeper {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.wake_ups.is_closed.load(Acquire) {
            return self.task.wake_by_ref();
        }
        if !self.is_noted.swap(true, AcqRel) {
            self.wake_ups.lock().push(Arc::clone(self));
            if self.wake_ups.is_closed.load(Acquire) {
                self.wake_ups.close();
            } else if !IS_GATHERING.get() {
                self.wake_ups.request();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use super::*;

    /// Counts how often it is woken. The first time more comes for it, as if it had run at once and found nothing more.
    #[derive(Default)]
    struct Task {
        woken: AtomicUsize,
        more: OnceLock<Waker>,
    }

    impl Wake for Task {
        fn wake(self: Arc<Self>) {
            if self.woken.fetch_add(1, SeqCst) == 0
                && let Some(waker) = self.more.get()
            {
                waker.wake_by_ref();
            }
        }
    }

    impl Task {
        /// How often it has been woken once the pump has had its turns.
        async fn woken(&self, wake_ups: &WakeUps) -> usize {
            let turns = async {
                for _ in 0..10 {
                    tokio::task::yield_now().await;
                }
            };
            tokio::select! {
                () = wake_ups.pump(|| {}) => {}
                () = turns => {}
            }
            self.woken.load(SeqCst)
        }
    }

    fn task_and_waker(wake_ups: &Arc<WakeUps>) -> (Arc<Task>, Waker) {
        let task = Arc::new(Task::default());
        (Arc::clone(&task), wake_ups.new_waker(&Waker::from(task)))
    }

    #[tokio::test]
    async fn a_task_for_which_more_comes_while_it_is_woken_is_woken_again() {
        let wake_ups = Arc::new(WakeUps::default());
        let (task, waker) = task_and_waker(&wake_ups);
        task.more.set(waker.clone()).unwrap();
        waker.wake();
        assert_eq!(task.woken(&wake_ups).await, 2);
    }

    #[tokio::test]
    async fn what_is_gathered_is_woken_afterwards_and_what_comes_then_at_once() {
        let wake_ups = Arc::new(WakeUps::default());
        let (task, waker) = task_and_waker(&wake_ups);
        wake_ups.gathered(|| waker.wake_by_ref());
        assert_eq!(task.woken(&wake_ups).await, 1);
        waker.wake();
        assert_eq!(task.woken(&wake_ups).await, 2);
    }
}
