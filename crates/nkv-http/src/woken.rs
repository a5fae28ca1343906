//! Wakers that know whether they were used: a task waits for several things, and looks only at those that woke it.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};
use std::task::{Wake, Waker};

/// The waker of a task for one thing that it waits for.
#[derive(Debug, Default)]
pub(crate) struct Woken(Option<(Arc<Noted>, Waker)>);

#[derive(Debug)]
struct Noted {
    task: Waker,
    is_noted: AtomicBool,
}

impl Woken {
    /// Whether the thing is to be polled, with the [`waker`](Self::waker): it has woken the task since the last time, or has not been
    /// polled by this task. What wakes it from here on is seen the next time.
    pub(crate) fn take(&mut self, task: &Waker) -> bool {
        match &self.0 {
            Some((noted, _)) if noted.task.will_wake(task) => {
                noted.is_noted.load(Acquire) && noted.is_noted.swap(false, AcqRel)
            }
            _ => {
                let noted = Arc::new(Noted { task: task.clone(), is_noted: AtomicBool::new(false) });
                self.0 = Some((Arc::clone(&noted), Waker::from(noted)));
                true
            }
        }
    }

    /// Has the thing polled the next time too, as it may have more. The task is not woken.
    pub(crate) fn note(&self) {
        if let Some((noted, _)) = &self.0 {
            noted.is_noted.store(true, Release);
        }
    }

    pub(crate) fn waker(&self) -> &Waker {
        self.0.as_ref().map_or(Waker::noop(), |(_, waker)| waker)
    }
}

impl Wake for Noted {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.is_noted.store(true, Release);
        self.task.wake_by_ref();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::atomic::Ordering::SeqCst;

    use super::*;

    #[derive(Default)]
    struct Task(AtomicUsize);

    impl Wake for Task {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, SeqCst);
        }
    }

    #[test]
    fn a_thing_is_polled_once_for_each_time_that_it_wakes_the_task() {
        let (task, other) = (Arc::new(Task::default()), Waker::from(Arc::new(Task::default())));
        let waker = Waker::from(Arc::clone(&task));
        let mut woken = Woken::default();
        assert!(woken.take(&waker) && !woken.take(&waker));
        woken.waker().wake_by_ref();
        assert_eq!(task.0.load(SeqCst), 1);
        assert!(woken.take(&waker) && !woken.take(&waker));
        woken.note();
        assert!(woken.take(&waker) && !woken.take(&waker));
        assert_eq!(task.0.load(SeqCst), 1);
        // Another task has not polled it.
        assert!(woken.take(&other) && !woken.take(&other));
    }
}
