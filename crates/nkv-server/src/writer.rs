//! The writer thread: takes everything that waits, stores it as one batch, answers. Group commit by nature.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use nkv_core::{Op, PersistError, PersistErrorKind};
use tokio::sync::{Notify, watch};

use crate::bell::Bell;
use crate::budget::Budget;
use crate::clock::Clock;
use crate::core::{Job, Store, WriteResult, value_len};

/// What waits for subscribers is looked at each time so many more events were given to them, or as much was written
/// as [`Budget::check_every`] says.
const CHECK_EVERY: u64 = 4_096;

/// A batch takes no more jobs once it has so many operations, or bytes of values.
const GROUP_OPS_MAX: usize = 4_096;
const GROUP_BYTES_MAX: usize = 4 << 20;

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

    /// Sleeps until it is woken for jobs, and takes them all out; there are none once the queue is closed. If some wait
    /// already, the pump wakes it when those who were just answered have had their turn.
    fn take(&self, bell: &Bell, jobs: &mut Vec<Job>) {
        let mut waiting = self.lock();
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
    pub(crate) clock: Clock,
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
        let (mut jobs, mut ops, mut group) = (Vec::new(), Vec::new(), Vec::new());
        let (mut checked_at, mut written) = (0, 0_usize);
        loop {
            self.queue.take(&self.bell, &mut jobs);
            if jobs.is_empty() {
                return;
            }
            let mut jobs = jobs.drain(..).peekable();
            while jobs.peek().is_some() {
                let mut bytes = 0;
                while ops.len() < GROUP_OPS_MAX
                    && bytes < GROUP_BYTES_MAX
                    && let Some(mut job) = jobs.next()
                {
                    bytes = job.ops.iter().map(value_len).fold(bytes, usize::saturating_add);
                    let count = job.ops.len();
                    ops.append(&mut job.ops);
                    group.push((job, count));
                }
                let expiry = self.store.next_expiry();
                if ops.iter().any(has_ttl) && self.clock.is_unkept() {
                    // Before the first value with a TTL is stored: from then on it is known how far the clock had come.
                    self.clock.keep();
                }
                self.bell.quietly(|| self.write(&ops, group.drain(..)));
                ops.clear();
                if self.store.next_expiry() != expiry {
                    self.expiry_changed.notify_one();
                }
                let notified = self.store.notified();
                written = written.saturating_add(bytes);
                if notified.saturating_sub(checked_at) >= CHECK_EVERY || written >= self.budget.check_every() {
                    (checked_at, written) = (notified, 0);
                    self.budget.check();
                }
            }
        }
    }

    /// Stores the operations of a group of jobs, of which each has brought so many.
    fn write(&self, mut ops: &[Op], group: impl Iterator<Item = (Job, usize)>) {
        match self.store.write(ops) {
            Ok(outcomes) => {
                let mut outcomes = outcomes.into_iter().map(Ok);
                for (job, count) in group {
                    answer(job, outcomes.by_ref().take(count).collect());
                }
            }
            // One value too many for the disk must not take along what would fit, nor the deletes that make space.
            Err(error) if splits(&error) && ops.len() > 1 => {
                for (job, count) in group {
                    let own = ops.split_off(..count).unwrap_or_default();
                    let results = if job.atomic {
                        self.write_together(own)
                    } else {
                        own.chunks(1).flat_map(|op| self.write_together(op)).collect()
                    };
                    answer(job, results);
                    self.bell.ring(); // each has been synced by itself, and waits no longer for the others
                }
            }
            Err(error) => {
                let error = self.failed(error);
                for (job, count) in group {
                    answer(job, std::iter::repeat_n(Err(Arc::clone(&error)), count).collect());
                }
            }
        }
    }

    fn write_together(&self, ops: &[Op]) -> Vec<WriteResult> {
        match self.store.write(ops) {
            Ok(outcomes) => outcomes.into_iter().map(Ok).collect(),
            Err(error) => {
                let error = self.failed(error);
                ops.iter().map(|_| Err(Arc::clone(&error))).collect()
            }
        }
    }

    fn failed(&self, error: PersistError) -> Arc<PersistError> {
        let error = Arc::new(error);
        tracing::error!(error = &*error as &dyn std::error::Error, "a batch was not stored");
        if error.kind() == PersistErrorKind::Poisoned {
            self.failure.send_replace(Some(Arc::clone(&error)));
        }
        error
    }
}

fn has_ttl(op: &Op) -> bool {
    matches!(op, Op::Put { options, .. } if options.expiry.is_some())
}

fn splits(error: &PersistError) -> bool {
    matches!(error.kind(), PersistErrorKind::NoSpace | PersistErrorKind::Rejected)
}

/// Whoever asked may have gone away meanwhile, its connection cut; the write stands all the same.
fn answer(job: Job, results: Vec<WriteResult>) {
    drop(job.results.send(results));
}
