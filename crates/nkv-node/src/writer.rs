//! The writer thread: takes everything that waits, stores it as one batch, answers. Group commit by nature.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nkv_core::{PersistError, PersistErrorKind, Write, WriteResult};
use tokio::sync::{Notify, oneshot};

use crate::budget::Budget;
use crate::clock::Clock;
use crate::failure::{Chain, Failure};
use crate::figures::Counters;
use crate::job::Job;
use crate::rate_log::RateLimitedLog;
use crate::subscriber::Store;
use crate::wakeups::WakeUps;

/// The number of events given to subscribers after which their backlogs are looked at. They are looked at too when as
/// much was written as [`Budget::check_every`] says.
const CHECK_EVERY: u64 = 4_096;

/// The keys that are written on the thread of a caller, at most.
const KEYS_AT_ONCE: usize = 16;

/// The subscribers that are notified on the thread of a caller, at most: it has others to serve.
const NOTIFICATIONS_AT_ONCE: u64 = 1_024;

/// The jobs that wait to be done. Their number is limited by the callers that let them in.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    waiting: Mutex<Waiting>,
    arrived: Condvar,
    /// For the asking: as in `waiting`.
    is_closed: AtomicBool,
}

#[derive(Debug, Default)]
struct Waiting {
    jobs: Vec<Job>,
    /// The writer sleeps until it is woken.
    is_asleep: bool,
    /// Some job is not to wait for the turn of the runtime to end.
    is_urgent: bool,
    /// The writes that [callers](Writer::write_now) do meanwhile: the writer waits for their end.
    done_by_callers: usize,
    is_closed: bool,
}

/// The queue takes no more jobs.
#[derive(Debug)]
pub(crate) struct Closed;

impl Queue {
    /// Adds a job; says whether the writer is to be [woken](Self::wake). While it works it is not: it will ask for that
    /// itself, unless some job is urgent.
    pub(crate) fn push(&self, job: Job, is_urgent: bool) -> Result<bool, Closed> {
        let mut waiting = self.lock();
        if waiting.is_closed {
            return Err(Closed);
        }
        waiting.jobs.push(job);
        waiting.is_urgent |= is_urgent;
        Ok(waiting.is_asleep)
    }

    /// Wakes the writer if it sleeps and there is something to do.
    pub(crate) fn wake(&self) {
        let mut waiting = self.lock();
        if waiting.is_asleep && (waiting.is_closed || !waiting.jobs.is_empty()) {
            waiting.is_asleep = false;
            drop(waiting);
            self.arrived.notify_one();
        }
    }

    /// Takes no more jobs: the writer ends after those it has.
    pub(crate) fn close(&self) {
        self.lock().is_closed = true;
        self.is_closed.store(true, Release);
        self.wake();
    }

    /// Whether it takes no more jobs.
    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed.load(Acquire)
    }

    /// Has the writer wait while a caller does its own write, if it has nothing to do now.
    fn hold_up(&self) -> Option<HeldUp<'_>> {
        let mut waiting = self.lock();
        let is_idle = waiting.is_asleep && waiting.jobs.is_empty() && !waiting.is_closed;
        is_idle.then(|| {
            waiting.done_by_callers = waiting.done_by_callers.saturating_add(1);
            HeldUp(self)
        })
    }

    /// Adds all jobs that wait to those under way. If there are none it sleeps until it is woken for some; there are none
    /// once the queue is closed. If some wait already, the pump wakes it when those that were just answered have had their
    /// turn.
    fn take(&self, wake_ups: &WakeUps, jobs: &mut Vec<Job>) {
        let mut waiting = self.lock();
        if !jobs.is_empty() {
            waiting.is_urgent = false;
            jobs.append(&mut waiting.jobs);
            return;
        }
        waiting.is_asleep = !waiting.is_urgent;
        if waiting.is_asleep && !waiting.jobs.is_empty() {
            wake_ups.request();
        }
        while waiting.is_asleep && !waiting.is_closed || waiting.done_by_callers > 0 {
            waiting = self.arrived.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        (waiting.is_asleep, waiting.is_urgent) = (false, false);
        std::mem::swap(&mut waiting.jobs, jobs);
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The writer waits for the end of a caller's write, until this is dropped.
struct HeldUp<'a>(&'a Queue);

impl Drop for HeldUp<'_> {
    fn drop(&mut self) {
        let mut waiting = self.0.lock();
        waiting.done_by_callers = waiting.done_by_callers.saturating_sub(1);
        let is_waited_for = !waiting.is_asleep || waiting.is_closed;
        drop(waiting);
        if is_waited_for {
            self.0.arrived.notify_one();
        }
    }
}

pub(crate) struct Writer {
    pub(crate) store: Arc<Store>,
    pub(crate) queue: Arc<Queue>,
    pub(crate) wake_ups: Arc<WakeUps>,
    /// Notified when the time of the next expiry may have changed.
    pub(crate) expiry_changed: Arc<Notify>,
    /// Learns when storage is poisoned.
    pub(crate) failure: Failure,
    pub(crate) log: RateLimitedLog,
    pub(crate) budget: Arc<Budget>,
    pub(crate) clock: Clock,
    pub(crate) counters: Arc<OnceLock<Counters>>,
    /// Whether [storage waits](nkv_core::PersistValue::waits).
    pub(crate) storage_waits: bool,
    pub(crate) since_check: Mutex<SinceCheck>,
}

/// What was done since the backlogs of subscribers were looked at.
#[derive(Debug, Default)]
pub(crate) struct SinceCheck {
    /// The number of events by then.
    notified: u64,
    /// Bytes of values that were written since.
    written: usize,
}

/// Closes the queue when it is dropped.
#[derive(Debug)]
pub(crate) struct CloseOnDrop(pub(crate) Arc<Queue>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A caller of a writer that is gone, for whatever reason, waits in vain.
struct Gone(Arc<Queue>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.close();
        let jobs = std::mem::take(&mut self.0.lock().jobs);
        drop(jobs);
    }
}

impl Writer {
    /// Starts the thread. It closes storage when the queue is closed and empty, sends what came of that, and ends. It is not
    /// joined: storage may never return.
    pub(crate) fn spawn(self: &Arc<Self>) -> std::io::Result<oneshot::Receiver<Result<(), PersistError>>> {
        let (ended, end) = oneshot::channel();
        let (writer, thread) = (Arc::clone(self), thread::Builder::new().name("nkv-writer".into()));
        // The server may have given up waiting for it.
        thread.spawn(move || drop(ended.send(writer.run())))?;
        Ok(end)
    }

    fn run(&self) -> Result<(), PersistError> {
        let _gone = Gone(Arc::clone(&self.queue));
        let mut jobs: Vec<Job> = Vec::new();
        loop {
            let under_way = jobs.len();
            self.queue.take(&self.wake_ups, &mut jobs);
            if jobs.is_empty() {
                let closed = self.store.close();
                // Also where the runtime is gone: a caller that waits for events sees that there will be none.
                self.store.forget_all();
                return closed;
            }
            let more = jobs.get(under_way..).unwrap_or_default();
            let written = more.iter().map(|job| job.write.value_len()).fold(0, usize::saturating_add);
            if more.iter().any(|job| job.write.has_ttl()) && self.clock.is_unkept() && self.clock.is_due() {
                // Before the first value with a TTL is stored: from then on it is known how far the clock had come.
                self.clock.keep();
            }
            self.noting_expiry(|| self.wake_ups.gathered(|| self.do_jobs(&mut jobs)));
            if !self.may_put_off_check(written) {
                let notified = self.store.notified();
                *self.since_check.lock().unwrap_or_else(PoisonError::into_inner) = SinceCheck { notified, written: 0 };
                self.budget.check();
            }
        }
    }

    /// Does a write on the thread of its caller, if that takes no longer than to hand it over: where storage does not wait,
    /// nothing waits to be done before it, and it is short. Says whether it is done; else it is to be handed over.
    pub(crate) fn write_now(&self, write: &mut Write) -> bool {
        let keys = write.keys_max().filter(|keys| *keys <= KEYS_AT_ONCE);
        let notifications = keys.map(|keys| self.store.subscriptions().saturating_mul(keys as u64));
        let is_short = notifications.is_some_and(|notifications| notifications <= NOTIFICATIONS_AT_ONCE);
        if self.storage_waits || !is_short || write.has_ttl() && self.clock.is_unkept() {
            return false;
        }
        let Some(held_up) = self.queue.hold_up() else { return false };
        if !self.may_put_off_check(write.value_len()) {
            return false;
        }
        let took = self.noting_expiry(|| self.wake_ups.gathered(|| self.commit(std::slice::from_mut(write))));
        drop(held_up);
        if write.is_done() {
            self.count(write, took);
            self.report(worst(None, write.outcomes().map(|(_, result)| result)));
        }
        write.is_done()
    }

    /// Does something that may change when the next value ends.
    fn noting_expiry<R>(&self, work: impl FnOnce() -> R) -> R {
        let expiry = self.store.next_expiry();
        let result = work();
        if self.store.next_expiry() != expiry {
            self.expiry_changed.notify_one();
        }
        result
    }

    /// Notes that values of `written` bytes are written. Says whether the backlogs of subscribers need not be looked at by then.
    fn may_put_off_check(&self, written: usize) -> bool {
        let mut since = self.since_check.lock().unwrap_or_else(PoisonError::into_inner);
        since.written = since.written.saturating_add(written);
        self.store.notified().saturating_sub(since.notified) < CHECK_EVERY && since.written < self.budget.check_every()
    }

    /// Does as much as one batch takes. Says how long it took, if that is counted.
    fn commit(&self, writes: &mut [impl AsMut<Write>]) -> Option<Duration> {
        let start = self.counters.get().map(|_| Instant::now());
        // It is not known what storage that panicked has done, and the store takes no more writes after it.
        if catch_unwind(AssertUnwindSafe(|| self.store.commit(writes))).is_err() {
            self.store.commit(writes);
        }
        let (counters, took) = (self.counters.get()?, start?.elapsed());
        counters.commit_times.observe_time(took);
        let done = writes.iter_mut().map(AsMut::as_mut).filter(|write| write.is_done());
        counters.batch_sizes.observe(done.map(|write| write.outcomes().count() as u64).sum());
        Some(took)
    }

    /// Counts a write that is done.
    fn count(&self, write: &Write, took: Option<Duration>) {
        if let Some(counters) = self.counters.get() {
            took.into_iter().for_each(|took| counters.write_times.observe_time(took));
            write.outcomes().for_each(|(op, result)| counters.count_write(op, result));
        }
    }

    /// Does as much as one batch takes, and answers the jobs that are done then.
    fn do_jobs(&self, jobs: &mut Vec<Job>) {
        self.commit(jobs);
        let mut failed: Option<PersistError> = None;
        for Job { write, results, began, .. } in jobs.extract_if(.., |job| job.write.is_done()) {
            // First, so that a caller that has an answer finds it counted.
            self.count(&write, began.map(|began| began.elapsed()));
            let done = write.into_results();
            failed = worst(failed, done.iter());
            // The peer may have gone away meanwhile, its connection cut; the write stands all the same.
            drop(results.send(done));
        }
        self.report(failed);
    }

    /// A full disk refuses every put: one line a second says so.
    fn report(&self, error: Option<PersistError>) {
        let Some(error) = error else { return };
        let kind = match error.kind() {
            PersistErrorKind::NoSpace => "no space",
            PersistErrorKind::Rejected => "rejected",
            PersistErrorKind::Poisoned => "poisoned",
            _ => "not stored",
        };
        self.log.error(kind, format_args!("a write was not stored: {}", Chain(&error)));
        if error.kind() == PersistErrorKind::Poisoned {
            self.failure.report(Arc::new(error));
        }
    }
}

/// What ends the server counts before what does not.
fn worst<'a>(known: Option<PersistError>, results: impl Iterator<Item = &'a WriteResult>) -> Option<PersistError> {
    let failed = results.filter_map(|result| result.as_ref().err()).map(|failed| &failed.error);
    failed.fold(known, |known, error| match known {
        Some(known) if known.kind() == PersistErrorKind::Poisoned => Some(known),
        _ => Some(error.clone()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_caller_waits_for_a_writer_that_is_gone() {
        let queue = Arc::new(Queue::default());
        let (job, mut done) = Job::for_tests(vec![]);
        queue.push(job, true).unwrap();
        drop(Gone(Arc::clone(&queue)));
        assert!(matches!(done.try_recv(), Err(oneshot::error::TryRecvError::Closed)));
        assert!(queue.push(Job::for_tests(vec![]).0, true).is_err());
    }
}
