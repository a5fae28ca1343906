//! What is counted for monitoring from outside, once a door asks for that.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use nkv_core::{Histogram, HistogramReading, Op, Outcome, StorageReading, WriteResult};

/// What is asked of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Operation {
    /// A key is read.
    Get,
    /// Many keys are read, up to 1,024 at a time.
    List,
    /// A key is written.
    Put,
    /// Keys are deleted.
    Delete,
    /// A subscription begins.
    Subscribe,
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Ended {
    /// It is done.
    Ok,
    /// There is no such key.
    NotFound,
    /// Its condition does not hold.
    Conflict,
    /// A limit or a right forbids it.
    Refused,
    /// Storage or an engine failed.
    Failed,
}

impl Operation {
    const ALL: [Operation; 5] =
        [Operation::Get, Operation::List, Operation::Put, Operation::Delete, Operation::Subscribe];

    pub(crate) fn of(op: &Op) -> Self {
        match op {
            Op::Put { .. } => Operation::Put,
            Op::Delete { .. } => Operation::Delete,
        }
    }

    /// The word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Operation::Get => "get",
            Operation::List => "list",
            Operation::Put => "put",
            Operation::Delete => "delete",
            Operation::Subscribe => "subscribe",
        }
    }
}

impl Ended {
    const ALL: [Ended; 5] = [Ended::Ok, Ended::NotFound, Ended::Conflict, Ended::Refused, Ended::Failed];

    /// The word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Ended::Ok => "ok",
            Ended::NotFound => "not_found",
            Ended::Conflict => "conflict",
            Ended::Refused => "refused",
            Ended::Failed => "failed",
        }
    }
}

/// Counters that are there only once they are asked for.
#[derive(Debug)]
pub(crate) struct Counters {
    requests: [[AtomicU64; Ended::ALL.len()]; Operation::ALL.len()],
    /// How long it took from the handing over of a write until its answer.
    pub(crate) write_times: Histogram,
    /// How long it took until a batch was stored and its subscribers were notified.
    pub(crate) commit_times: Histogram,
    /// How many writes one batch had.
    pub(crate) batch_sizes: Histogram,
}

impl Counters {
    pub(crate) fn new() -> Self {
        let [write_times, commit_times] = [(); 2].map(|()| Histogram::new(Histogram::TIMES));
        let batch_sizes = Histogram::new(Histogram::SIZES);
        Counters { requests: Default::default(), write_times, commit_times, batch_sizes }
    }

    pub(crate) fn count(&self, operation: Operation, ended: Ended) {
        let of = self.requests.get(operation as usize).and_then(|of| of.get(ended as usize));
        of.into_iter().for_each(|count| _ = count.fetch_add(1, Relaxed));
    }

    pub(crate) fn count_write(&self, op: &Op, result: &WriteResult) {
        self.count(Operation::of(op), ended(result.as_ref().ok()));
    }
}

/// `None` for one that failed.
pub(crate) fn ended(outcome: Option<&Outcome>) -> Ended {
    match outcome {
        Some(Outcome::Put { .. } | Outcome::Deleted { .. }) => Ended::Ok,
        Some(Outcome::NotFound) => Ended::NotFound,
        Some(Outcome::Conflict { .. }) => Ended::Conflict,
        None => Ended::Failed,
    }
}

/// Figures of a node since it began to [keep](crate::Handle::keep_figures) them.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Figures {
    /// How many requests there were, by what was asked and what became of it, through all doors.
    pub requests: Vec<(Operation, Ended, u64)>,
    /// How long it took from the handing over of writes, one or several of a door, until they were answered, in microseconds:
    /// what they waited for their turn, and the commit, or the engine.
    pub write_times: HistogramReading,
    /// How long it took until a batch was stored and its subscribers were notified, in microseconds.
    pub commit_times: HistogramReading,
    /// How many writes one batch had.
    pub batch_sizes: HistogramReading,
    /// What all peers and subscriptions hold, in bytes: of requests, answers and changes that wait.
    pub queued_bytes: u64,
    /// Those of storage, if it has any.
    pub storage: Option<StorageReading>,
}

impl Figures {
    pub(crate) fn of(counters: &Counters) -> Self {
        let mut requests = Vec::new();
        for operation in Operation::ALL {
            for ended in Ended::ALL {
                let count = counters.requests.get(operation as usize).and_then(|of| of.get(ended as usize));
                requests.extend(count.map(|count| (operation, ended, count.load(Relaxed))));
            }
        }
        let [write_times, commit_times, batch_sizes] =
            [&counters.write_times, &counters.commit_times, &counters.batch_sizes].map(Histogram::read);
        Figures { requests, write_times, commit_times, batch_sizes, queued_bytes: 0, storage: None }
    }
}
