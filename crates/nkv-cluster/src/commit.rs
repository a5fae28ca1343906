//! The one task that changes what a node has: it plans what came, stores it, commits it, and only then says so to anyone.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use nkv_core::{Epoch, Key, Op, Outcome, Pattern, PersistErrorKind, Revision};
use nkv_node::{Decided, EngineError, RateLimitedLog};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::clock::Now;
use crate::cluster::{Inner, NamedKeys, Sink, millis};
use crate::register::Record;
use crate::replica::{Contact, Identity, Merged, Plan, Replica, Values};
use crate::stamp::{Hlc, Millis, NodeId, Stamp};

/// Jobs, and bytes of values, that share a batch of storage, about.
const GROUP_JOBS: usize = 64;
const GROUP_LEN: usize = 4 << 20;

/// Keys that a pattern deletes, values that end, tombstones that are forgotten, or values that are stamped for the first time, in
/// one batch.
const TICK_KEYS: usize = 1_024;

/// How long the clock is not looked at, at most, while something is to end.
const TICK_MAX: Duration = Duration::from_secs(1);

/// What is to be committed.
#[derive(Debug)]
pub(crate) enum Job {
    Write {
        epoch: Epoch,
        ops: Vec<Op>,
        together: bool,
        answer: oneshot::Sender<Result<Decided, EngineError>>,
    },
    /// Answered with how many are stamped ahead; with nothing if they were not stored.
    Merge {
        records: Vec<Record>,
        answer: Option<oneshot::Sender<Option<u32>>>,
    },
    /// What a peer deleted so long ago that it has forgotten it. Answered with whether it was stored.
    Gone {
        gone: Vec<(Key, Stamp)>,
        answer: oneshot::Sender<bool>,
    },
    Contact {
        peer: NodeId,
        contact: Contact,
    },
    /// After a clock was found to have been off. Answered with whether it was stored.
    Mend {
        answer: oneshot::Sender<bool>,
    },
    /// The time has come for something.
    Tick,
    Name(Identity),
    StampOld,
}

impl Job {
    fn len(&self) -> usize {
        match self {
            Job::Write { ops, .. } => ops.iter().map(op_len).sum(),
            Job::Merge { records, .. } => records.iter().map(Record::len).sum(),
            _ => 0,
        }
    }
}

fn op_len(op: &Op) -> usize {
    match op {
        Op::Put { value, .. } => value.len(),
        Op::Delete { .. } => 0,
    }
}

/// What a job's answer is, once it is stored.
#[derive(Debug)]
enum Done {
    Written(Result<Decided, EngineError>),
    Merged {
        refused: u32,
    },
    /// What was deleted.
    Gone(Vec<Key>),
    /// How many values were stamped anew.
    Mended(usize),
    Other,
}

/// Why a batch was not stored.
#[derive(Debug)]
enum Failed {
    /// Another may be.
    Now(EngineError),
    /// The node cannot go on.
    ForGood(EngineError),
}

#[derive(Debug)]
pub(crate) struct Committer {
    inner: Arc<Inner>,
    queue: mpsc::Receiver<Job>,
    /// Readings of the clock are not above it.
    bound: Hlc,
    /// The next one, while it is stored.
    next_bound: JoinSet<io::Result<Hlc>>,
    /// No tick comes before this, by the steady clock: one was not stored.
    tick_from: Millis,
}

impl Committer {
    pub(crate) fn new(inner: Arc<Inner>, queue: mpsc::Receiver<Job>, bound: Hlc) -> Self {
        Committer { inner, queue, bound, next_bound: JoinSet::new(), tick_from: 0 }
    }

    /// Gives the node an id if it has none, and stamps to what was there before it was in a cluster.
    pub(crate) async fn name(&mut self, sink: &dyn Sink) -> Result<(), EngineError> {
        if self.inner.id().is_none() {
            let random = self.inner.parts.random.next();
            let id = NodeId(random.map_err(|error| EngineError::Unavailable(error.to_string()))?);
            let identity = Identity { id, cluster: self.inner.options.cluster.clone() };
            self.store_or_end(sink, Job::Name(identity)).await?;
        }
        while self.inner.replica().unstamped_len() > 0 {
            self.store_or_end(sink, Job::StampOld).await?;
        }
        Ok(())
    }

    async fn store_or_end(&mut self, sink: &dyn Sink, job: Job) -> Result<(), EngineError> {
        match self.store(sink, &[job]).await {
            Ok(_) => Ok(()),
            Err(Failed::Now(error) | Failed::ForGood(error)) => Err(error),
        }
    }

    /// Commits what comes, until it cannot go on.
    pub(crate) async fn run(&mut self, sink: &dyn Sink) -> EngineError {
        loop {
            let Some(first) = self.next().await else {
                return EngineError::Unavailable("this node stops".into());
            };
            let mut jobs = vec![first];
            let mut len: usize = jobs.iter().map(Job::len).sum();
            while jobs.len() < GROUP_JOBS
                && len < GROUP_LEN
                && let Ok(job) = self.queue.try_recv()
            {
                len += job.len();
                jobs.push(job);
            }
            // What ends does so also while jobs keep coming.
            if self.is_due() && !jobs.iter().any(|job| matches!(job, Job::Tick)) {
                jobs.push(Job::Tick);
            }
            if let Err(error) = self.commit_in_order(sink, jobs).await {
                return error;
            }
        }
    }

    /// The next job; or a tick, when something ends.
    async fn next(&mut self) -> Option<Job> {
        loop {
            // What may be forgotten then is looked for again.
            let pause = self.until_tick().map_or(TICK_MAX, |pause| Duration::from_millis(pause).min(TICK_MAX));
            match timeout(pause, self.queue.recv()).await {
                Ok(job) => return job,
                Err(_) if self.is_due() => return Some(Job::Tick),
                Err(_) => {}
            }
        }
    }

    /// How long it is until a tick has something to do, if it is known.
    fn until_tick(&self) -> Option<Millis> {
        let may_purge = self.inner.may_purge();
        let due = self.inner.replica().next_due(may_purge)?;
        let now = self.inner.now();
        Some(due.saturating_sub(now.wall).max(self.tick_from.saturating_sub(now.steady)))
    }

    fn is_due(&self) -> bool {
        self.until_tick() == Some(0)
    }

    /// Commits jobs in their order; one that may change any number of keys is not part of a group.
    async fn commit_in_order(&mut self, sink: &dyn Sink, jobs: Vec<Job>) -> Result<(), EngineError> {
        let mut group = Vec::new();
        for job in jobs {
            match job {
                Job::Write { ops, together: false, answer, epoch } if ops.iter().any(selects_many) => {
                    self.commit(sink, std::mem::take(&mut group)).await?;
                    let written = self.write_apart(sink, epoch, &ops).await;
                    let failed = written.as_ref().err().cloned();
                    drop(answer.send(written.map_err(|error| EngineError::OutcomeUnknown(error.to_string()))));
                    failed.map_or(Ok(()), Err)?;
                }
                job => group.push(job),
            }
        }
        self.commit(sink, group).await
    }

    /// Does operations one by one; an error is one that the node cannot go on with.
    async fn write_apart(&mut self, sink: &dyn Sink, epoch: Epoch, ops: &[Op]) -> Result<Decided, EngineError> {
        let mut results = Vec::with_capacity(ops.len());
        for op in ops {
            let done = match op {
                Op::Delete { pattern, .. } if selects_many(op) => self.delete_in_parts(sink, pattern).await,
                op => self.write_one(sink, epoch, op).await,
            };
            match done {
                Ok(outcome) => results.push(Ok(outcome)),
                Err(Failed::Now(error)) => results.push(Err(error)),
                Err(Failed::ForGood(error)) => return Err(error),
            }
        }
        Ok(Decided { epoch: self.inner.replica().epoch(), results })
    }

    async fn write_one(&mut self, sink: &dyn Sink, epoch: Epoch, op: &Op) -> Result<Outcome, Failed> {
        self.inner.check_writes().map_err(Failed::Now)?;
        let plan = |replica: &mut Replica, plan: &mut Plan, now| replica.write_alone(plan, epoch, op, now);
        self.store_planned(sink, plan).await?.map_err(Failed::Now)
    }

    /// Deletes what a pattern selects. Neither the lock nor a batch of storage is for all of it.
    async fn delete_in_parts(&mut self, sink: &dyn Sink, pattern: &Pattern) -> Result<Outcome, Failed> {
        self.inner.check_writes().map_err(Failed::Now)?;
        let slots = self.inner.replica().all_live(pattern);
        let (mut count, mut outcome) = (0, Outcome::NotFound);
        for part in slots.chunks(TICK_KEYS) {
            let plan = |replica: &mut Replica, plan: &mut Plan, now| replica.delete(plan, part, now);
            let revision = match self.store_planned(sink, plan).await {
                Ok(revision) => Revision::new(revision),
                Err(Failed::Now(error)) if count > 0 => {
                    let message = format!("{count} of {} keys are deleted, the others not: {error}", slots.len());
                    return Err(Failed::Now(EngineError::OutcomeUnknown(message)));
                }
                Err(failed) => return Err(failed),
            };
            count += part.len() as u64;
            outcome = Outcome::Deleted { count, revision };
        }
        Ok(outcome)
    }

    async fn commit(&mut self, sink: &dyn Sink, jobs: Vec<Job>) -> Result<(), EngineError> {
        if jobs.is_empty() {
            return Ok(());
        }
        match self.store(sink, &jobs).await {
            Ok(done) => {
                jobs.into_iter().zip(done).for_each(|(job, done)| answer(&self.inner.log, job, done));
                Ok(())
            }
            // One that cannot be stored is not to keep others back.
            Err(Failed::Now(_)) if jobs.len() > 1 => {
                for job in jobs {
                    Box::pin(self.commit(sink, vec![job])).await?;
                }
                Ok(())
            }
            Err(Failed::Now(error)) => {
                if jobs.iter().any(|job| matches!(job, Job::Tick)) {
                    // It would come again at once.
                    self.tick_from = self.inner.steady().saturating_add(millis(TICK_MAX));
                }
                jobs.into_iter().for_each(|job| fail(&self.inner.log, job, &error));
                Ok(())
            }
            Err(Failed::ForGood(error)) => {
                let unknown = EngineError::OutcomeUnknown(error.to_string());
                jobs.into_iter().for_each(|job| fail(&self.inner.log, job, &unknown));
                Err(error)
            }
        }
    }

    async fn store(&mut self, sink: &dyn Sink, jobs: &[Job]) -> Result<Vec<Done>, Failed> {
        let checked = self.inner.check_writes();
        let may_purge = self.inner.may_purge();
        let plan = |replica: &mut Replica, plan: &mut Plan, now| {
            let values: Values<'_> = &|key, revision| sink.value(key, revision);
            let plan_one = |job| plan_one(replica, plan, job, now, checked.as_ref(), may_purge, values);
            jobs.iter().map(plan_one).collect()
        };
        self.store_planned(sink, plan).await
    }

    /// Stores what is planned, and then has the replica be like that.
    async fn store_planned<T>(
        &mut self,
        sink: &dyn Sink,
        work: impl FnOnce(&mut Replica, &mut Plan, Now) -> T,
    ) -> Result<T, Failed> {
        let now = self.inner.now();
        let (mut plan, done) = {
            let mut replica = self.inner.replica();
            let mut plan = replica.plan();
            let done = work(&mut replica, &mut plan, now);
            (plan, done)
        };
        self.keep_bound().await?;
        if !plan.changes.is_empty() {
            sink.apply(std::mem::take(&mut plan.changes)).await.map_err(|error| match &error {
                EngineError::Feed(cause) if cause.kind() != PersistErrorKind::Poisoned => Failed::Now(error),
                _ => Failed::ForGood(error),
            })?;
        }
        self.inner.replica().commit(&mut plan);
        self.inner.push(std::mem::take(&mut plan.fresh));
        Ok(done)
    }

    /// The clock's upper bound is kept before anything that it gave is.
    async fn keep_bound(&mut self) -> Result<(), Failed> {
        if let Some(Ok(Ok(bound))) = self.next_bound.try_join_next() {
            self.bound = bound;
        }
        let last = self.inner.replica().last_time();
        let ahead = millis(self.inner.options.max_clock_offset) / 2;
        // It is far below where the clock was off before.
        let is_far_below = last.millis().saturating_add(2 * ahead.max(1)) < self.bound.millis();
        if last <= self.bound && !is_far_below {
            // While there is room below it, so that no write waits. If it fails, the next commit tries again: the error is returned
            // only where there is no room left.
            // Before the first reading of a run nothing is near: each restart would lead further ahead.
            let is_near = last < self.bound && self.bound.millis().saturating_sub(last.millis()) < ahead / 2;
            if is_near && self.next_bound.is_empty() {
                self.move_bound(last, ahead);
            }
            return Ok(());
        }
        // One that is on its way is not to take the place of a later one.
        if let Some(Ok(Ok(bound))) = self.next_bound.join_next().await {
            self.bound = bound;
            if last <= bound && !is_far_below {
                return Ok(());
            }
        }
        self.move_bound(last, ahead);
        let unavailable =
            |error: io::Error| EngineError::Unavailable(format!("the bound of the clock cannot be kept: {error}"));
        if let Some(stored) = self.next_bound.join_next().await {
            let stored = stored.map_err(io::Error::from).and_then(|stored| stored);
            self.bound = stored.map_err(|error| Failed::Now(unavailable(error)))?;
        }
        Ok(())
    }

    fn move_bound(&mut self, last: Hlc, ahead: Millis) {
        let inner = Arc::clone(&self.inner);
        let bound = Hlc::at(last.millis().saturating_add(ahead));
        self.next_bound.spawn(async move { inner.parts.bound.store(bound).await.map(|()| bound) });
    }
}

/// Whether it may change any number of keys.
fn selects_many(op: &Op) -> bool {
    matches!(op, Op::Delete { pattern: Pattern::Below(_) | Pattern::All, if_revision: None })
}

fn plan_one(
    replica: &mut Replica,
    plan: &mut Plan,
    job: &Job,
    now: Now,
    checked: Result<&(), &EngineError>,
    may_purge: bool,
    values: Values<'_>,
) -> Done {
    match job {
        Job::Write { epoch, ops, together, .. } => {
            if let Err(error) = checked {
                return Done::Written(Err(error.clone()));
            }
            let results: Vec<Result<Outcome, EngineError>> = replica.write(plan, *epoch, ops, *together, now);
            Done::Written(Ok(Decided { epoch: replica.epoch(), results }))
        }
        Job::Merge { records, .. } => {
            let merged = records.iter().map(|record| replica.merge(plan, record, now));
            let refused = merged.filter(|merged| *merged == Merged::Refused).count();
            Done::Merged { refused: u32::try_from(refused).unwrap_or(u32::MAX) }
        }
        Job::Gone { gone, .. } => {
            let deleted = gone.iter().filter(|(key, stamp)| replica.infer_delete(plan, key, *stamp, now));
            Done::Gone(deleted.map(|(key, _)| key.clone()).collect())
        }
        Job::Contact { peer, contact } => {
            replica.note_contact(plan, *peer, *contact);
            Done::Other
        }
        Job::Mend { .. } => {
            let count = replica.restamp(plan, now, values);
            replica.give_up_ended_early(plan, now);
            Done::Mended(count)
        }
        Job::Tick => {
            replica.expire(plan, now, may_purge, TICK_KEYS);
            Done::Other
        }
        Job::Name(identity) => {
            replica.name(plan, identity.clone());
            Done::Other
        }
        Job::StampOld => {
            replica.stamp_old(plan, now, TICK_KEYS);
            Done::Other
        }
    }
}

/// A caller that gave up gets no answer.
fn answer(log: &RateLimitedLog, job: Job, done: Done) {
    match (job, done) {
        (Job::Write { answer, .. }, Done::Written(written)) => drop(answer.send(written)),
        (Job::Merge { answer: Some(answer), .. }, Done::Merged { refused }) => _ = answer.send(Some(refused)),
        (Job::Gone { answer, .. }, Done::Gone(deleted)) => {
            if !deleted.is_empty() {
                let keys = NamedKeys(&deleted);
                log.warn("gone", format_args!("deleted, as a peer deleted them during a long absence: {keys}"));
            }
            _ = answer.send(true);
        }
        (Job::Mend { answer }, Done::Mended(count)) => {
            if count > 0 {
                log.warn(
                    "clock",
                    format_args!("the clock was off: {count} values that were written with it are stamped anew"),
                );
            }
            _ = answer.send(true);
        }
        _ => {}
    }
}

fn fail(log: &RateLimitedLog, job: Job, error: &EngineError) {
    match job {
        Job::Write { answer, .. } => drop(answer.send(Err(error.clone()))),
        Job::Merge { answer, .. } => {
            log.warn("merge", format_args!("records of a peer were not stored: {error}"));
            if let Some(answer) = answer {
                _ = answer.send(None);
            }
        }
        Job::Gone { answer, .. } | Job::Mend { answer } => _ = answer.send(false),
        Job::Contact { .. } | Job::Tick | Job::Name(_) | Job::StampOld => {
            log.warn("other", format_args!("not stored: {error}"));
        }
    }
}
