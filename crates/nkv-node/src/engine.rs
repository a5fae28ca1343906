//! Engines: where the truth lies elsewhere, and this node is a cache of it with notification in front.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use nkv_core::{Applied, Change, Epoch, Op, Outcome, Pattern, PersistError, RecordRef, Revision, StoredRef};
use nkv_types::{Error, ErrorKind, Result};
use thiserror::Error as ThisError;
use tokio::sync::watch;
use tokio::time::timeout;

/// How long an answer waits for the node to see what was written.
const FEED_LIMIT: Duration = Duration::from_secs(1);

/// How long a client that comes from another node waits for this one to see what it has seen.
const CATCH_UP_LIMIT: Duration = Duration::from_secs(5);

/// An engine decides writes and owns the truth that many nodes share. Each node follows it: reads and subscriptions are
/// served from what the node has applied, writes go to the engine.
///
/// # Contract
///
/// - *Definite*: what [`write`](Self::write) answers is so. Where that is not known it says
///   [`EngineError::OutcomeUnknown`]; the node never repeats a write by itself.
/// - *In order*: [`follow`](Self::follow) feeds every change, each with its revision, once and in order, all changes of one
///   revision in one batch; or the whole state, where changes were missed. Revisions never fall within an epoch; where they
///   begin anew, so does an epoch.
/// - *Complete*: a change whose write was answered comes with a revision not above that of the answer.
/// - *No imitation*: what the engine [cannot](Self::abilities) is refused, not done in another way.
///
/// `nkv_testkit::engine` checks each line. `ScriptedEngine` there is a whole engine in memory, to begin from and to test
/// with.
#[async_trait]
pub trait Engine: fmt::Debug + Send + Sync + 'static {
    /// What it can do: asked at each write that needs more than a plain put, so it may depend on what the engine turned out to
    /// be. [`meta`](Abilities::meta) is asked for at the start.
    fn abilities(&self) -> Abilities;

    /// The longest value that it takes, in bytes; the node's own limit holds too.
    fn value_len_max(&self) -> usize {
        usize::MAX
    }

    /// Takes a record or a tombstone that the node's storage has kept, with its meta, before anything is written or followed.
    fn restore(&self, stored: StoredRef<'_>) {
        let _ = stored;
    }

    /// Has operations done, and returns when the engine keeps them: in order, each for itself; with `together`, all of them in
    /// one step or none. Conditions are on revisions of `epoch`, that of the node's state: where the data are of another, they
    /// say nothing ([`EngineError::OtherEpoch`]).
    ///
    /// A caller may give up: then the future is dropped, and the operations may be done or not.
    ///
    /// # Errors
    ///
    /// [`EngineError`], for all of them.
    async fn write(&self, epoch: Epoch, ops: Vec<Op>, together: bool) -> Result<Decided, EngineError>;

    /// Feeds what comes after `seen`, or the whole state first where that cannot be or nothing was seen, for as long as it goes
    /// well; returns why it did not. Dropped when the node stops.
    async fn follow(&self, seen: Option<Seen>, feed: Feed) -> EngineError;

    /// Up to where the engine's data are by now, as it says itself.
    ///
    /// # Errors
    ///
    /// [`EngineError::Unavailable`], where it does not say so at once.
    async fn last(&self) -> Result<Seen, EngineError>;

    /// Its own numbers, which stand among those of [`Handle::numbers`](crate::Handle::numbers) and are metrics too. None by default.
    /// To be answered at once.
    fn numbers(&self) -> Vec<EngineNumber> {
        Vec::new()
    }

    /// Its own words by name, such as `member.NAME`, which stand among those of [`Handle::words`](crate::Handle::words). None by
    /// default. To be answered at once.
    fn words(&self) -> Vec<(String, String)> {
        Vec::new()
    }
}

/// A number of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineNumber {
    /// Its name, in lower case and with `_` between words.
    pub name: &'static str,
    /// What it is, as a sentence.
    pub help: &'static str,
    /// The number by now. It may rise and fall.
    pub value: u64,
}

/// What an engine made of operations.
#[derive(Clone, Debug)]
pub struct Decided {
    /// The epoch of the revisions in the results.
    pub epoch: Epoch,
    /// One for each operation.
    pub results: Vec<Result<Outcome, EngineError>>,
}

/// What an engine can do beyond plain puts, gets and deletes of one key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Abilities {
    /// Writes with `if_revision`.
    pub conditions: bool,
    /// Several operations in one step.
    pub batches: bool,
    /// Wildcard deletes, in one step or key by key.
    pub wildcards: bool,
    /// Values with a TTL.
    pub ttl: bool,
    /// It feeds [meta](Change::meta): a node that has storage needs one that keeps it.
    pub meta: bool,
}

impl Abilities {
    /// All of them.
    pub const ALL: Abilities = Abilities { conditions: true, batches: true, wildcards: true, ttl: true, meta: true };
}

/// Up to where a node has seen changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The epoch of the data.
    pub epoch: Epoch,
    /// Every change up to this one.
    pub revision: Revision,
}

/// Why an engine did not do something.
#[derive(Clone, Debug, ThisError)]
#[non_exhaustive]
pub enum EngineError {
    /// It is out of reach; nothing was changed.
    #[error("the engine is out of reach: {0}")]
    Unavailable(String),
    /// It refuses; nothing was changed.
    #[error("{message}")]
    Refused {
        /// As in HTTP.
        status: u16,
        /// In words.
        message: String,
    },
    /// The data are of another epoch than the condition; nothing was changed.
    #[error("the data are of another epoch than the condition")]
    OtherEpoch,
    /// It is not known whether the write was done.
    #[error("the engine did not say what became of the write: {0}")]
    OutcomeUnknown(String),
    /// The node did not take what was fed.
    #[error("the node did not keep what was fed: {0}")]
    Feed(#[source] PersistError),
}

impl From<EngineError> for Error {
    fn from(error: EngineError) -> Self {
        let kind = match &error {
            EngineError::Unavailable(_) | EngineError::Feed(_) => ErrorKind::Refused { status: 503 },
            EngineError::Refused { status, .. } => ErrorKind::Refused { status: *status },
            EngineError::OtherEpoch => ErrorKind::OtherEpoch,
            EngineError::OutcomeUnknown(_) => ErrorKind::OutcomeUnknown,
        };
        Error::new(kind, error.to_string())
    }
}

/// Where an engine gives its changes to a node. Each call returns when what was given is kept and visible. It is good for the
/// `follow` that it was made for: what comes by it after the next one has begun is refused.
#[derive(Clone, Debug)]
pub struct Feed {
    to: Arc<dyn Follower>,
    /// What a later one has a higher number of: this one gives nothing any more then.
    number: u64,
}

/// A node that follows an engine. Its methods may block.
pub(crate) trait Follower: fmt::Debug + Send + Sync {
    fn apply(&self, feed: u64, changes: Vec<Change>) -> Result<Applied, PersistError>;

    fn replace(&self, feed: u64, state: Vec<Change>, revision: Revision, epoch: Epoch) -> Result<u64, PersistError>;

    fn pass(&self, feed: u64, revision: Revision) -> Result<(), PersistError>;

    fn walk(&self, pattern: &Pattern, visit: &mut dyn FnMut(RecordRef<'_>));

    fn reached(&self, feed: u64);
}

impl Feed {
    pub(crate) fn new(to: Arc<dyn Follower>, number: u64) -> Self {
        Feed { to, number }
    }

    /// Applies a batch of changes: see [`NotifyKeyValue::apply`](nkv_core::NotifyKeyValue::apply).
    ///
    /// # Errors
    ///
    /// [`EngineError::Feed`]: none of it was applied.
    ///
    /// # Cancel safety
    ///
    /// A batch whose future is dropped may or may not be applied.
    pub async fn apply(&self, changes: Vec<Change>) -> Result<Applied, EngineError> {
        self.run(move |to, number| to.apply(number, changes)).await
    }

    /// Has the node be at a whole state: see [`NotifyKeyValue::replace`](nkv_core::NotifyKeyValue::replace). Returns how many
    /// changes that took.
    ///
    /// # Errors
    ///
    /// As [`apply`](Self::apply).
    ///
    /// # Cancel safety
    ///
    /// As [`apply`](Self::apply).
    pub async fn replace(&self, state: Vec<Change>, revision: Revision, epoch: Epoch) -> Result<u64, EngineError> {
        self.run(move |to, number| to.replace(number, state, revision, epoch)).await
    }

    /// Notes that nothing else changed up to a revision: see [`NotifyKeyValue::pass`](nkv_core::NotifyKeyValue::pass).
    ///
    /// # Errors
    ///
    /// As [`apply`](Self::apply).
    ///
    /// # Cancel safety
    ///
    /// As [`apply`](Self::apply).
    pub async fn pass(&self, revision: Revision) -> Result<(), EngineError> {
        self.run(move |to, number| to.pass(number, revision)).await
    }

    /// Lends each record that the node shows and `pattern` selects to `visit`, in the order of keys: up to 1,024 are of one
    /// moment. No write becomes visible meanwhile, so `visit` is to be quick.
    pub fn walk(&self, pattern: &Pattern, mut visit: impl FnMut(RecordRef<'_>)) {
        self.to.walk(pattern, &mut visit);
    }

    /// Notes that the engine is in reach, and that the node has seen all that there was when it was asked: reads are of the
    /// present from here on, and writes are taken.
    pub fn reached(&self) {
        self.to.reached(self.number);
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Follower, u64) -> Result<T, PersistError> + Send + 'static,
    ) -> Result<T, EngineError> {
        let (to, number) = (Arc::clone(&self.to), self.number);
        let done = tokio::task::spawn_blocking(move || work(&*to, number)).await;
        done.map_err(|error| EngineError::Unavailable(error.to_string()))?.map_err(EngineError::Feed)
    }
}

/// The engine of a node, and how far the node is behind it.
#[derive(Debug)]
pub(crate) struct Truth {
    pub(crate) engine: Arc<dyn Engine>,
    status: watch::Sender<Status>,
    /// [Since when](Status::stale_since) reads may be old: it changes rarely, so every connection may wait for that.
    stale: watch::Sender<Option<Instant>>,
}

/// How a node is with its engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Status {
    /// There is a state to be read.
    pub(crate) has_state: bool,
    /// Since when it is not followed; `None` while it is.
    pub(crate) away_since: Option<Instant>,
    /// A write was answered that the node has not seen in time.
    pub(crate) lag: Option<Lag>,
    pub(crate) seen: Seen,
}

/// How far a node is behind what it has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lag {
    since: Instant,
    wanted: Seen,
}

impl Status {
    pub(crate) fn is_in_reach(&self) -> bool {
        self.away_since.is_none()
    }

    /// Since when reads may be of an old state.
    pub(crate) fn stale_since(&self) -> Option<Instant> {
        self.away_since.or(self.lag.map(|lag| lag.since))
    }

    fn has(&self, wanted: Seen) -> bool {
        self.seen.epoch == wanted.epoch && self.seen.revision >= wanted.revision
    }
}

impl Truth {
    pub(crate) fn new(engine: Arc<dyn Engine>, seen: Seen) -> Self {
        let has_state = seen.revision > Revision::ZERO;
        let away_since = Some(Instant::now());
        let status = watch::Sender::new(Status { has_state, away_since, lag: None, seen });
        Truth { engine, status, stale: watch::Sender::new(away_since) }
    }

    pub(crate) fn status(&self) -> Status {
        *self.status.borrow()
    }

    pub(crate) fn note(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_modify(|status| {
            change(status);
            status.lag = status.lag.filter(|lag| !status.has(lag.wanted));
            let since = status.stale_since();
            self.stale.send_if_modified(|stale| std::mem::replace(stale, since) != since);
        });
    }

    pub(crate) fn stale(&self) -> watch::Receiver<Option<Instant>> {
        self.stale.subscribe()
    }

    /// Whether the engine is in reach and can do an operation.
    pub(crate) fn check(&self, op: &Op) -> Result<()> {
        self.check_in_reach()?;
        let of = |is_needed: bool, can: fn(&Abilities) -> bool, what| {
            (is_needed && !can(&self.engine.abilities())).then_some(what)
        };
        let conditions = |is_needed| of(is_needed, |can| can.conditions, "conditions");
        let lacks = match op {
            Op::Put { options, .. } => conditions(options.if_revision.is_some())
                .or_else(|| of(options.expiry.is_some(), |can| can.ttl, "values with a TTL")),
            Op::Delete { pattern, if_revision } => conditions(if_revision.is_some()).or_else(|| {
                let is_wildcard = matches!(pattern, Pattern::Below(_) | Pattern::All);
                of(is_wildcard, |can| can.wildcards, "deletes by wildcard")
            }),
        };
        lacks.map_or(Ok(()), |what| Err(cannot(what)))
    }

    fn check_in_reach(&self) -> Result<()> {
        match self.status().away_since {
            None => Ok(()),
            Some(since) => {
                let away = since.elapsed().as_secs();
                let message = format!("the engine is out of reach for {away} s; nothing was changed");
                Err(Error::new(ErrorKind::Refused { status: 503 }, message))
            }
        }
    }

    /// Waits until the node has seen as much as a client that comes from another one; `false` where the engine has not.
    pub(crate) async fn catch_up(&self, wanted: Seen) -> Result<bool> {
        let has_it = |status: &Status| status.has(wanted);
        if has_it(&self.status()) {
            return Ok(true);
        }
        let behind = |cause: &dyn fmt::Display| {
            let message = format!("this node is behind what the client has seen elsewhere: {cause}");
            Error::new(ErrorKind::Refused { status: 503 }, message)
        };
        let caught_up = async {
            let last = self.engine.last().await.map_err(|error| behind(&error))?;
            if last.epoch != wanted.epoch || last.revision < wanted.revision {
                return Ok(false);
            }
            let is_there = self.status.subscribe().wait_for(has_it).await.is_ok();
            Ok(is_there)
        };
        let late = |_| Err(behind(&format_args!("not level after {} s", CATCH_UP_LIMIT.as_secs())));
        timeout(CATCH_UP_LIMIT, caught_up).await.unwrap_or_else(late)
    }

    /// Has the engine do operations, and waits until the node has seen what they changed.
    pub(crate) async fn write(&self, ops: Vec<Op>, together: bool) -> Result<(Epoch, Vec<Result<Outcome>>)> {
        self.check_in_reach()?;
        if together && ops.len() > 1 && !self.engine.abilities().batches {
            return Err(cannot("batches"));
        }
        let before = self.status().seen.epoch;
        let Decided { epoch, results } = self.engine.write(before, ops, together).await.map_err(Error::from)?;
        let revision = |result: &Result<Outcome, EngineError>| match result {
            Ok(Outcome::Put { revision } | Outcome::Deleted { revision, .. } | Outcome::Conflict { revision }) => {
                *revision
            }
            _ => Revision::ZERO,
        };
        let revision = results.iter().map(revision).max().unwrap_or_default();
        self.caught_up(before, Seen { epoch, revision }).await;
        Ok((epoch, results.into_iter().map(|result| result.map_err(Error::from)).collect()))
    }

    /// Waits until the node, which was in the epoch `before`, has seen this much, or will not: the engine is out of reach, or
    /// began yet another epoch, or feeds nothing for too long. What was decided is answered all the same; in the last case the
    /// node is stale until it has seen it.
    async fn caught_up(&self, before: Epoch, wanted: Seen) {
        let is_it = |status: &Status| {
            let seen = status.seen;
            let is_elsewhere = seen.epoch != before && seen.epoch != wanted.epoch;
            !status.is_in_reach() || is_elsewhere || status.has(wanted)
        };
        let since = Instant::now();
        if timeout(FEED_LIMIT, self.status.subscribe().wait_for(is_it)).await.is_err() {
            self.note(|status| {
                if !is_it(status) {
                    let since = status.lag.map_or(since, |lag| lag.since);
                    let known =
                        status.lag.filter(|lag| lag.wanted.epoch == wanted.epoch).map(|lag| lag.wanted.revision);
                    let revision = known.unwrap_or_default().max(wanted.revision);
                    status.lag = Some(Lag { since, wanted: Seen { revision, ..wanted } });
                }
            });
        }
    }
}

fn cannot(what: &str) -> Error {
    Error::new(ErrorKind::Refused { status: 501 }, format!("the engine of this server has no {what}"))
}
