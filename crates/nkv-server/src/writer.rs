//! The writer thread: takes everything that waits, stores it as one batch, answers. Group commit by nature.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use nkv_core::{PersistError, PersistErrorKind};
use tokio::sync::{Notify, watch};

use crate::bell::Bell;
use crate::budget::Budget;
use crate::core::{Job, Store};

/// What waits for subscribers is looked at each time so many more events were given to them, or as much was written
/// as [`Budget::check_every`] says.
const CHECK_EVERY: u64 = 4_096;

/// The jobs that wait to be done. How many that may be is up to those who let them in.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    waiting: Mutex<Waiting>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    jobs: Vec<Job>,
    /// The writer sleeps until somebody wakes it.
    is_asleep: bool,
    /// Some job is not to wait for the turn of the runtime to end.
    is_urgent: bool,
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
        self.wake();
    }

    /// Adds all jobs that wait to those under way. If there are none it sleeps until it is woken for some; there are none
    /// once the queue is closed. If some wait already, the pump wakes it when those that were just answered have had their
    /// turn.
    fn take(&self, bell: &Bell, jobs: &mut Vec<Job>) {
        let mut waiting = self.lock();
        if !jobs.is_empty() {
            waiting.is_urgent = false;
            jobs.append(&mut waiting.jobs);
            return;
        }
        waiting.is_asleep = !waiting.is_urgent;
        if waiting.is_asleep && !waiting.jobs.is_empty() {
            bell.ring();
        }
        while waiting.is_asleep && !waiting.is_closed {
            waiting = self.arrived.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        (waiting.is_asleep, waiting.is_urgent) = (false, false);
        std::mem::swap(&mut waiting.jobs, jobs);
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) struct Writer {
    pub(crate) store: Arc<Store>,
    pub(crate) queue: Arc<Queue>,
    pub(crate) bell: Arc<Bell>,
    /// Told when the time of the next expiry may have changed.
    pub(crate) expiry_changed: Arc<Notify>,
    /// Told when storage is poisoned.
    pub(crate) failure: watch::Sender<Option<Arc<PersistError>>>,
    pub(crate) budget: Arc<Budget>,
}

/// Closes the queue when it is dropped.
#[derive(Debug)]
pub(crate) struct CloseOnDrop(pub(crate) Arc<Queue>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Whoever waits for a writer that is gone, for whatever reason, waits in vain.
struct Gone(Arc<Queue>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.close();
        let jobs = std::mem::take(&mut self.0.lock().jobs);
        drop(jobs);
    }
}

impl Writer {
    pub(crate) fn spawn(self) -> std::io::Result<JoinHandle<()>> {
        thread::Builder::new().name("nkv-writer".into()).spawn(move || self.run())
    }

    fn run(self) {
        let _gone = Gone(Arc::clone(&self.queue));
        let mut jobs: Vec<Job> = Vec::new();
        let (mut checked_at, mut written) = (0, 0_usize);
        loop {
            let under_way = jobs.len();
            self.queue.take(&self.bell, &mut jobs);
            if jobs.is_empty() {
                return;
            }
            let more = jobs.get(under_way..).unwrap_or_default();
            written = more.iter().map(|job| job.write.value_len()).fold(written, usize::saturating_add);
            let expiry = self.store.next_expiry();
            self.bell.quietly(|| self.commit(&mut jobs));
            if self.store.next_expiry() != expiry {
                self.expiry_changed.notify_one();
            }
            let notified = self.store.notified();
            if notified.saturating_sub(checked_at) >= CHECK_EVERY || written >= self.budget.check_every() {
                (checked_at, written) = (notified, 0);
                self.budget.check();
            }
        }
    }

    /// Does as much as one batch takes, and answers the jobs that are done then.
    fn commit(&self, jobs: &mut Vec<Job>) {
        self.store.commit(jobs);
        let mut failed = None;
        for Job { write, results, .. } in jobs.extract_if(.., |job| job.write.is_done()) {
            let done = write.into_results();
            failed = failed.or_else(|| done.iter().find_map(|result| result.as_ref().err()).map(|f| f.error.clone()));
            // The peer may have gone away meanwhile, its connection cut; the write stands all the same.
            drop(results.send(done));
        }
        if let Some(error) = failed {
            self.failed(error);
        }
    }

    fn failed(&self, error: PersistError) {
        tracing::error!(error = &error as &dyn std::error::Error, "a batch was not stored");
        if error.kind() == PersistErrorKind::Poisoned {
            self.failure.send_replace(Some(Arc::new(error)));
        }
    }
}
