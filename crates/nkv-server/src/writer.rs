//! The writer thread: takes everything that waits, stores it as one batch, answers. Group commit by nature.

use std::sync::Arc;
use std::thread::{self, JoinHandle};

use nkv_core::{Op, PersistError, PersistErrorKind};
use tokio::sync::{Notify, mpsc, watch};

use crate::budget::Budget;
use crate::core::{Job, Store, WriteResult, value_len};

/// So many jobs wait at most; whoever brings another waits with it.
pub(crate) const QUEUE_LEN: usize = 1_024;

/// What waits for subscribers is looked at each time so many more events were given to them, or as much was written
/// as [`Budget::check_every`] says.
const CHECK_EVERY: u64 = 4_096;

/// A batch takes no more jobs once it has so many operations, or bytes of values.
const GROUP_OPS_MAX: usize = 4_096;
const GROUP_BYTES_MAX: usize = 4 << 20;

pub(crate) struct Writer {
    pub(crate) store: Arc<Store>,
    pub(crate) jobs: mpsc::Receiver<Job>,
    /// Told when the time of the next expiry may have changed.
    pub(crate) expiry_changed: Arc<Notify>,
    /// Told when storage is poisoned.
    pub(crate) failure: watch::Sender<Option<Arc<PersistError>>>,
    pub(crate) budget: Arc<Budget>,
}

impl Writer {
    pub(crate) fn spawn(self) -> std::io::Result<JoinHandle<()>> {
        thread::Builder::new().name("nkv-writer".into()).spawn(move || self.run())
    }

    fn run(mut self) {
        let mut ops = Vec::new();
        let mut group = Vec::new();
        let (mut checked_at, mut written) = (0, 0_usize);
        while let Some(first) = self.jobs.blocking_recv() {
            let mut bytes = 0;
            let mut next = Some(first);
            while let Some(mut job) = next {
                bytes = job.ops.iter().map(value_len).fold(bytes, usize::saturating_add);
                let count = job.ops.len();
                ops.append(&mut job.ops);
                group.push((job, count));
                let full = ops.len() >= GROUP_OPS_MAX || bytes >= GROUP_BYTES_MAX;
                next = if full { None } else { self.jobs.try_recv().ok() };
            }
            let expiry = self.store.next_expiry();
            self.write(&ops, group.drain(..));
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

fn splits(error: &PersistError) -> bool {
    matches!(error.kind(), PersistErrorKind::NoSpace | PersistErrorKind::Rejected)
}

/// Whoever asked may have gone away meanwhile, its connection cut; the write stands all the same.
fn answer(job: Job, results: Vec<WriteResult>) {
    drop(job.results.send(results));
}
