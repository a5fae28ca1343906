//! The way in: every operation of the store, for programs in its process and for doors.

use std::borrow::Cow;
use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use nkv_core::{
    Changes, Epoch, Expiry, Failed, Gap, Key, Notifier, Op, Outcome, Pattern, PersistErrorKind, Record, RecordRef,
    SubscriberId, ValueRef, Write, WriteResult,
};
use nkv_types::{
    AsKey, AsPattern, AsPatterns, Branch, BranchWatch, Current, Deleted, Edit, Entry, Error, ErrorKind, Event,
    IntoEdit, IntoValue, Page, PageOptions, PutOptions, Result, Revision, Stats, SubscribeOptions, UpdateStore, Watch,
    Watched, disjoint, to_json, update, update_as,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error as ThisError;
use tokio::sync::watch;

use crate::budget::{Budget, Holder};
use crate::deletes::RecentDeletes;
use crate::engine::{Abilities, EngineNumber, Seen};
use crate::failure::Chain;
use crate::figures::{Counters, Ended, Figures, Operation};
use crate::job::Room;
use crate::limits::Limits;
use crate::peer::{Peer, PeerInfo};
use crate::rate_log::RateLimitedLog;
use crate::rights::Right;
use crate::shared::{JOB_LEN_MIN, Shared, Stopping, Traced, Written, stopped};
use crate::subscription::{AttachOptions, Attached, Subscription};
use crate::tail::{Tail, TailOptions};
use crate::wakeups::SharedWaker;

/// How many keys are taken from the store at a time: they are of one moment.
const PART_KEYS: usize = 1_024;

/// How many events of a watch are one change of its state, at most.
const TURN_EVENTS: usize = 256;

/// Patterns of one subscription that can be resumed: each change and each delete is compared with all of them.
const PATTERNS_MAX: usize = 256;

/// Keys of a page when its options do not say, and at most.
const PAGE_LIMIT: u64 = 1_000;
const PAGE_LIMIT_MAX: u64 = 10_000;

/// The store of a running node, from within its process. Clones are cheap and stand for the same store.
///
/// Reads answer at once; writes wait until they are as durable as the node promises, sharing a sync with others. All limits
/// of the node hold here. A handle does not keep its node running: once that has stopped, every call is
/// [`ErrorKind::Closed`].
///
/// # Cancel safety
///
/// A write whose future is dropped may or may not be done. All else loses nothing.
#[derive(Clone)]
pub struct Handle {
    shared: Arc<Shared>,
    /// For whom it acts, if not all is allowed.
    principal: Option<Arc<str>>,
    /// Its writes are done with those of other tasks of the node's runtime.
    gathers: bool,
}

/// An operation that the limits and rights allow: see [`Handle::admit`].
#[derive(Clone, Debug)]
pub struct Admitted(Op);

impl Handle {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Handle { shared, principal: None, gathers: false }
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The same store, for one that is not allowed everything: each request is checked against the node's
    /// [`Rights`](crate::Rights). A door makes one for each connection. Code that has a handle can make one for any principal:
    /// rights are for peers, not for code of the process.
    #[must_use]
    pub fn as_principal(&self, principal: impl Into<Arc<str>>) -> Self {
        Handle { principal: Some(principal.into()), ..self.clone() }
    }

    // Reading.

    /// The entry of a key; `None` if there is none.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidKey`]; [`ErrorKind::Closed`]; [`ErrorKind::Refused`] with 403.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let node = nkv_node::Node::builder().start().await?;
    /// # let nkv = node.handle();
    /// nkv.put("lamp.hall", "on").await?;
    /// assert_eq!(nkv.get("lamp.hall").await?.ok_or("no such key")?.value, "on");
    /// assert_eq!(nkv.get("lamp.attic").await?, None);
    /// # Ok(()) }
    /// ```
    pub async fn get(&self, key: impl AsKey) -> Result<Option<Entry>> {
        let epoch = self.epoch();
        self.look_up(key.key_text()?, |record| entry(epoch, record.to_record()))
    }

    /// The value of a key, as JSON.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get), and [`ErrorKind::Json`].
    pub async fn get_as<T: DeserializeOwned>(&self, key: impl AsKey) -> Result<Option<T>> {
        self.get(key).await?.map(|entry| entry.json()).transpose()
    }

    /// The entries that `pattern` selects, in key order. Up to 1,024 are of one moment; of more, the next are of a
    /// later one, and other tasks have their turn in between.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let node = nkv_node::Node::builder().start().await?;
    /// # let nkv = node.handle();
    /// nkv.put("lamp.hall", "on").await?;
    /// let lamps = nkv.get_all("lamp.*").await?;
    /// assert_eq!(lamps[0].key.as_str(), "lamp.hall");
    /// # Ok(()) }
    /// ```
    pub async fn get_all(&self, pattern: impl AsPattern) -> Result<Vec<Entry>> {
        let epoch = self.epoch();
        self.all(&*pattern.as_pattern()?, |record| entry(epoch, record.to_record())).await
    }

    /// Part of the entries that `pattern` selects, in key order: 1,000 unless `options` say, and 10,000 at most.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub async fn get_page(&self, pattern: impl AsPattern, options: PageOptions) -> Result<Page<Entry>> {
        let epoch = self.epoch();
        self.page(&*pattern.as_pattern()?, &options, |record| entry(epoch, record.to_record()))
    }

    /// The keys that `pattern` selects, with their revisions, in key order, as [`get_all`](Self::get_all).
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub async fn list(&self, pattern: impl AsPattern) -> Result<Vec<(Key, Revision)>> {
        let epoch = self.epoch();
        self.all(&*pattern.as_pattern()?, |record| listed(epoch, record)).await
    }

    /// Part of the keys that `pattern` selects, as [`get_page`](Self::get_page).
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub async fn list_page(&self, pattern: impl AsPattern, options: PageOptions) -> Result<Page<(Key, Revision)>> {
        let epoch = self.epoch();
        self.page(&*pattern.as_pattern()?, &options, |record| listed(epoch, record))
    }

    /// Whether `pattern` selects any key.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub async fn exists(&self, pattern: impl AsPattern) -> Result<bool> {
        self.has(&*pattern.as_pattern()?)
    }

    // Writing.

    /// Writes a value and returns its revision.
    ///
    /// # Errors
    ///
    /// Those of [`put_with`](Self::put_with), but for a conflict.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let node = nkv_node::Node::builder().start().await?;
    /// # let nkv = node.handle();
    /// let revision = nkv.put("lamp.hall", "on").await?;
    /// assert_eq!(revision.get(), 1);
    /// # Ok(()) }
    /// ```
    pub async fn put(&self, key: impl AsKey, value: impl IntoValue) -> Result<Revision> {
        self.put_with(key, value, PutOptions::default()).await
    }

    /// Writes a value and returns its revision.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Conflict`], [`ErrorKind::OtherEpoch`] if the condition does not hold. [`ErrorKind::Refused`] with 413
    /// for a value over the limit, 507 if the disk is full, 500 if storage fails, 403. [`ErrorKind::InvalidKey`];
    /// [`ErrorKind::Closed`]; [`ErrorKind::OutcomeUnknown`] if the node stops meanwhile.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let node = nkv_node::Node::builder().start().await?;
    /// # let nkv = node.handle();
    /// use nkv_node::{ErrorKind, PutOptions, Revision};
    ///
    /// let only_if_absent = PutOptions::default().with_if_revision(Revision::ZERO);
    /// nkv.put_with("lock", "me", only_if_absent).await?;
    /// let refused = nkv.put_with("lock", "you", only_if_absent).await;
    /// assert!(matches!(refused, Err(error) if matches!(error.kind(), ErrorKind::Conflict { .. })));
    /// # Ok(()) }
    /// ```
    pub async fn put_with(&self, key: impl AsKey, value: impl IntoValue, options: PutOptions) -> Result<Revision> {
        let options = nkv_core::PutOptions {
            if_revision: options.if_revision.map(|revision| self.condition(revision)).transpose()?,
            expiry: options.ttl.map(|ttl| self.expiry(ttl)),
        };
        let (key, value) = (key.as_key()?.into_owned(), value.into_value());
        match self.write_one(Op::Put { key, value, options }).await? {
            (epoch, Outcome::Put { revision }) => Ok(Revision::in_epoch(epoch, revision.get())),
            (epoch, other) => Err(conflict(epoch, other)),
        }
    }

    /// Writes a value as JSON.
    ///
    /// # Errors
    ///
    /// Those of [`put`](Self::put), and [`ErrorKind::Json`].
    pub async fn put_as<T: Serialize + ?Sized>(&self, key: impl AsKey, value: &T) -> Result<Revision> {
        let json = to_json(key.key_text()?, value)?;
        self.put(key, json).await
    }

    /// Changes a value that others may change too: `edit` is given what the key holds, and its result is written if the key
    /// is still as it was, else it is asked again after a random pause. Gives what the key holds then. It goes on until it
    /// succeeds: bound it with a time-out where others write all the time.
    ///
    /// # Errors
    ///
    /// Those of [`put`](Self::put).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let node = nkv_node::Node::builder().start().await?;
    /// let nkv = node.handle();
    /// let visits = nkv.update_as("visits", |old: Option<u64>| old.unwrap_or(0) + 1).await?;
    /// assert_eq!(visits, Some(1));
    /// # Ok(()) }
    /// ```
    pub async fn update<E: IntoEdit>(
        &self,
        key: impl AsKey,
        mut edit: impl FnMut(Option<&Entry>) -> E,
    ) -> Result<Option<Entry>> {
        update(self, &*key.as_key()?, |old| Ok(edit(old).into_edit())).await
    }

    /// The same with values that are JSON.
    ///
    /// # Errors
    ///
    /// Those of [`update`](Self::update), and [`ErrorKind::Json`] if the value is not the JSON of a `T`.
    pub async fn update_as<T: Serialize + DeserializeOwned, E: Into<Edit<T>>>(
        &self,
        key: impl AsKey,
        edit: impl FnMut(Option<T>) -> E,
    ) -> Result<Option<T>> {
        update_as(self, &*key.as_key()?, edit).await
    }

    /// Deletes the keys that `pattern` selects, and says how many they were; none is no error. What of a wildcard
    /// delete is one step, [`NotifyKeyValue::delete`](nkv_core::NotifyKeyValue::delete) says.
    ///
    /// # Errors
    ///
    /// Those of [`put`](Self::put).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let node = nkv_node::Node::builder().start().await?;
    /// # let nkv = node.handle();
    /// nkv.put("lamp.hall", "on").await?;
    /// assert_eq!(nkv.delete("lamp.*").await?.count, 1);
    /// assert_eq!(nkv.delete("lamp.*").await?.count, 0);
    /// # Ok(()) }
    /// ```
    pub async fn delete(&self, pattern: impl AsPattern) -> Result<Deleted> {
        self.delete_op(pattern.as_pattern()?.into_owned(), None).await
    }

    /// Deletes a key if it is at this revision.
    ///
    /// # Errors
    ///
    /// Those of [`put_with`](Self::put_with).
    pub async fn delete_if(&self, key: impl AsKey, if_revision: Revision) -> Result<Deleted> {
        let if_revision = self.condition(if_revision)?;
        self.delete_op(Pattern::Key(key.as_key()?.into_owned()), Some(if_revision)).await
    }

    async fn delete_op(&self, pattern: Pattern, if_revision: Option<nkv_core::Revision>) -> Result<Deleted> {
        match self.write_one(Op::Delete { pattern, if_revision }).await? {
            (epoch, Outcome::Deleted { count, revision }) => {
                Ok(Deleted::new(count, Revision::in_epoch(epoch, revision.get())))
            }
            (_, Outcome::NotFound) => Ok(Deleted::default()),
            (epoch, other) => Err(conflict(epoch, other)),
        }
    }

    /// Does all of `ops`, stored together or not at all; one outcome for each. An operation whose condition does not
    /// hold does not keep the others from being done.
    ///
    /// # Errors
    ///
    /// Those of [`put`](Self::put): none of it was done then, unless the outcome is unknown.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let node = nkv_node::Node::builder().start().await?;
    /// # let nkv = node.handle();
    /// use nkv_core::{Op, PutOptions};
    /// use nkv_node::Key;
    ///
    /// let put = |key: &str| -> Result<Op, nkv_core::KeyError> {
    ///     Ok(Op::Put { key: Key::new(key)?, value: "on".into(), options: PutOptions::default() })
    /// };
    /// let outcomes = nkv.write(vec![put("lamp.hall")?, put("lamp.attic")?]).await?;
    /// assert_eq!(outcomes.len(), 2);
    /// # Ok(()) }
    /// ```
    pub async fn write(&self, ops: Vec<Op>) -> Result<Vec<Outcome>> {
        for op in &ops {
            self.check_op(op)?;
        }
        self.run(ops, true).await?.1.into_iter().collect()
    }

    /// What became of one operation, and the epoch of its revision.
    async fn write_one(&self, op: Op) -> Result<(Epoch, Outcome)> {
        self.check_op(&op)?;
        let (epoch, mut results) = self.run(vec![op], false).await?;
        Ok((epoch, results.pop().unwrap_or(Ok(Outcome::NotFound))?))
    }

    async fn run(&self, ops: Vec<Op>, together: bool) -> Result<(Epoch, Vec<Result<Outcome>>)> {
        self.check_open()?;
        let mut write = if together { Write::together(ops) } else { Write::apart(ops) };
        if self.shared.truth().is_none() && self.shared.writer.write_now(&mut write) {
            // A caller that writes all the time leaves other tasks their turns.
            tokio::task::coop::consume_budget().await;
            return Ok((self.epoch(), of_store(write.into_results())));
        }
        // Its future is large, and not needed where storage does not wait.
        Box::pin(self.hand_over(write, together)).await
    }

    async fn hand_over(&self, write: Write, together: bool) -> Result<(Epoch, Vec<Result<Outcome>>)> {
        let (epoch, mut ended) = (self.epoch(), self.shared.ended.subscribe());
        let done = async {
            match self.shared.truth() {
                Some(truth) => {
                    let _room = self.shared.room(write.value_len().max(JOB_LEN_MIN)).await.map_err(unknown)?;
                    self.shared.write_to(truth, write.into_ops(), together).await
                }
                None => {
                    let results = self.shared.write_in_turn(write, self.gathers).await.map_err(unknown)?;
                    Ok((epoch, of_store(results)))
                }
            }
        };
        tokio::select! {
            biased;
            done = done => done,
            // Storage may never answer.
            _ = ended.wait_for(|ended| *ended) => Err(unknown(Stopping)),
        }
    }

    // Subscribing.

    /// Delivers the present state of all that a pattern covers, or several, then every change; of a backlog that is too
    /// long, the latest state of each key. Dropping the subscription ends it.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get); [`ErrorKind::Refused`] with 429 if there are too many subscriptions.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use nkv_node::{Event, Node};
    ///
    /// let node = Node::builder().start().await?;
    /// let nkv = node.handle();
    /// let mut lamps = nkv.subscribe("lamp").await?;
    /// assert!(matches!(lamps.next().await, Some(Event::Synced { .. }))); // there is none yet
    /// nkv.put("lamp.hall", "on").await?;
    /// let Some(Event::Update { entry, .. }) = lamps.next().await else { panic!("no update") };
    /// assert_eq!(entry.value, "on");
    /// # Ok(()) }
    /// ```
    pub async fn subscribe(&self, patterns: impl AsPatterns) -> Result<Subscription> {
        self.subscribe_with(patterns, SubscribeOptions::default()).await
    }

    /// The same, with options.
    ///
    /// # Errors
    ///
    /// Those of [`subscribe`](Self::subscribe), and [`ErrorKind::InvalidKey`] for a wildcard that is to stand for itself
    /// alone.
    pub async fn subscribe_with(&self, patterns: impl AsPatterns, options: SubscribeOptions) -> Result<Subscription> {
        let attach = AttachOptions::default().with_snapshot(options.snapshot);
        self.begin(disjoint(patterns, options.exact)?, attach).await
    }

    async fn begin(&self, patterns: Vec<Pattern>, options: AttachOptions<'_>) -> Result<Subscription> {
        patterns.iter().try_for_each(|pattern| self.check(Right::Subscribe, pattern))?;
        let mut subscription = Subscription::begin(&self.shared, patterns, options)?;
        subscription.settle().await;
        Ok(subscription)
    }

    /// The value of a key, as it changes; waits until the present value is known. A task of the runtime keeps it up to
    /// date: what was just written may take it a moment.
    ///
    /// # Errors
    ///
    /// Those of [`subscribe`](Self::subscribe).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let node = nkv_node::Node::builder().start().await?;
    /// # let nkv = node.handle();
    /// let mut hall = nkv.watch("lamp.hall").await?;
    /// nkv.put("lamp.hall", "on").await?;
    /// let hall = hall.wait_for(|hall| hall.value.is_some()).await?;
    /// assert!(hall.is_live);
    /// # Ok(()) }
    /// ```
    pub async fn watch(&self, key: impl AsKey) -> Result<Watch<Entry>> {
        self.watch_with(key, |entry| Ok(entry.clone())).await
    }

    /// The same with the value as JSON. Where a value is not the JSON of a `T`, the last one that was stays beside the
    /// [`error`](Watched::error).
    ///
    /// # Errors
    ///
    /// Those of [`subscribe`](Self::subscribe).
    pub async fn watch_as<T: DeserializeOwned + Send + Sync + 'static>(&self, key: impl AsKey) -> Result<Watch<T>> {
        self.watch_with(key, Entry::json).await
    }

    async fn watch_with<T: Send + Sync + 'static>(
        &self,
        key: impl AsKey,
        read: impl Fn(&Entry) -> Result<T> + Send + 'static,
    ) -> Result<Watch<T>> {
        let pattern = Pattern::Exact(key.as_key()?.into_owned());
        let take = move |watched: &mut Watched<T>, event: Event| watched.apply(&event, &read);
        self.current(pattern, take, |watched| watched.is_live || watched.ended.is_some()).await
    }

    /// All keys that `pattern` covers with their values, as they change, in a map that is borrowed; waits until the present
    /// state is known. It is kept up to date as a [`watch`](Self::watch) is.
    ///
    /// # Errors
    ///
    /// Those of [`subscribe`](Self::subscribe).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let node = nkv_node::Node::builder().start().await?;
    /// let nkv = node.handle();
    /// nkv.put("lamp.hall", "on").await?;
    /// let lamps = nkv.watch_branch("lamp").await?;
    /// assert_eq!(lamps.borrow().entries.len(), 1);
    /// # Ok(()) }
    /// ```
    pub async fn watch_branch(&self, pattern: impl AsPattern) -> Result<BranchWatch<Entry>> {
        self.watch_branch_with(pattern, |entry| Ok(entry.clone())).await
    }

    /// The same with values as JSON. One that is not the JSON of a `T` is among those that are
    /// [`unreadable`](Branch::unreadable), and its key not among the entries.
    ///
    /// # Errors
    ///
    /// Those of [`subscribe`](Self::subscribe).
    pub async fn watch_branch_as<T>(&self, pattern: impl AsPattern) -> Result<BranchWatch<T>>
    where
        T: DeserializeOwned + Send + Sync + 'static,
    {
        self.watch_branch_with(pattern, Entry::json).await
    }

    async fn watch_branch_with<T: Send + Sync + 'static>(
        &self,
        pattern: impl AsPattern,
        read: impl Fn(&Entry) -> Result<T> + Send + 'static,
    ) -> Result<BranchWatch<T>> {
        let take = move |branch: &mut Branch<T>, event: Event| branch.apply(&event, &read);
        self.current(pattern.as_pattern()?.into_owned(), take, |branch| branch.is_live || branch.ended.is_some()).await
    }

    /// A state that a task brings up to date with what a subscription delivers, until no copy of it is left.
    async fn current<S: Default + Send + Sync + 'static>(
        &self,
        pattern: Pattern,
        mut take: impl FnMut(&mut S, Event) + Send + 'static,
        is_known: impl Fn(&S) -> bool,
    ) -> Result<Current<S>> {
        let mut subscription = self.begin(vec![pattern], AttachOptions::default()).await?;
        let (sender, mut receiver) = watch::channel(S::default());
        self.shared.runtime.spawn(async move {
            loop {
                let event = tokio::select! {
                    () = sender.closed() => return,
                    event = subscription.next() => event,
                };
                let Some(event) = event else { return };
                // What is there is one change of the state.
                sender.send_modify(|state| {
                    take(state, event);
                    std::iter::from_fn(|| subscription.try_next())
                        .take(TURN_EVENTS)
                        .for_each(|event| take(state, event));
                });
                tokio::task::yield_now().await;
            }
        });
        let known = receiver.wait_for(|state| is_known(state)).await.map(drop);
        known.map_err(|_| Error::new(ErrorKind::Closed, "the node has stopped"))?;
        Ok(Current::new(receiver, ()))
    }

    /// Every change of every key, in order, as it was committed, from `since` on, or from now on without it: for replication,
    /// queues and audits. `since` is the present revision, or one that another reader has not left behind yet.
    ///
    /// The backlog of a reader is bounded by [`CHANGES_LEN_MAX`](nkv_core::CHANGES_LEN_MAX), 8 MiB, or the node's
    /// [`queued_max`](Limits::queued_max) if that is less; see [`Changes`].
    ///
    /// # Errors
    ///
    /// [`ChangesError::Gap`] where changes after `since` are not there any more: the whole state is to be read, and then the
    /// changes from its revision on. [`ChangesError::Refused`] as in [`get`](Self::get).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let node = nkv_node::Node::builder().start().await?;
    /// # let nkv = node.handle();
    /// let mut changes = nkv.changes(None)?;
    /// nkv.put("lamp.hall", "on").await?;
    /// let group = changes.next().await?.ok_or("the node has stopped")?;
    /// assert_eq!(group.changes[0].key.as_str(), "lamp.hall");
    /// # Ok(()) }
    /// ```
    pub fn changes(&self, since: Option<Revision>) -> Result<Changes, ChangesError> {
        self.check(Right::Subscribe, &Pattern::All)?;
        let epoch = self.epoch();
        let since = since.map(|since| (since.epoch().unwrap_or(epoch), nkv_core::Revision::new(since.get())));
        let len_max = nkv_core::CHANGES_LEN_MAX.min(self.shared.limits.queued_max);
        Ok(self.shared.store.changes(since, len_max)?)
    }

    /// The same, with the options of subscribers in this process: a name, slack, or a peer whose subscription it is.
    ///
    /// # Errors
    ///
    /// Those of [`subscribe`](Self::subscribe).
    pub async fn subscribe_attached(
        &self,
        patterns: impl AsPatterns,
        options: AttachOptions<'_>,
    ) -> Result<Subscription> {
        self.begin(disjoint(patterns, options.exact)?, options).await
    }

    /// Has a notifier, of any kind, notified of every change that a pattern covers, or several, for as long as what this returns
    /// is kept. The first event for each pattern, given before this returns, says that it began, whether or not a snapshot is to
    /// follow.
    ///
    /// # Errors
    ///
    /// Those of [`subscribe`](Self::subscribe).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use std::sync::Arc;
    /// use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
    ///
    /// use nkv_core::{Delivery, Event, EventKind};
    /// use nkv_node::{AttachOptions, Node, Notifier};
    ///
    /// /// Counts changes.
    /// #[derive(Clone, Debug, Default)]
    /// struct Counter(Arc<AtomicU64>);
    ///
    /// impl Notifier for Counter {
    ///     fn notify(&self, event: &Arc<Event>) -> Delivery {
    ///         self.0.fetch_add(u64::from(matches!(event.kind(), EventKind::Change(_))), Relaxed);
    ///         Delivery::Queued
    ///     }
    /// }
    ///
    /// let node = Node::builder().start().await?;
    /// let (nkv, counter) = (node.handle(), Counter::default());
    /// let options = AttachOptions::default().with_snapshot(false);
    /// let _attached = nkv.attach(["lamp", "door"], Box::new(counter.clone()), &options)?;
    /// nkv.put("lamp.hall", "on").await?;
    /// assert_eq!(counter.0.load(Relaxed), 1);
    /// # Ok(()) }
    /// ```
    pub fn attach(
        &self,
        patterns: impl AsPatterns,
        notifier: Box<dyn Notifier>,
        options: &AttachOptions<'_>,
    ) -> Result<Attached> {
        let patterns = disjoint(patterns, options.exact)?;
        patterns.iter().try_for_each(|pattern| self.check(Right::Subscribe, pattern))?;
        Attached::begin(&self.shared, patterns, notifier, options)
    }

    /// A subscription that its reader can resume later: by a [`Cursor`](crate::Cursor) that came with an event, it is given what
    /// it missed, and nothing else. What was deleted meanwhile is given where the node
    /// [remembers](Self::remember_deletes) it; else, and where the cursor is of another epoch or of other patterns, it begins with
    /// [`TailEvent::Reset`](crate::TailEvent::Reset) and the whole state.
    ///
    /// # Errors
    ///
    /// Those of [`subscribe`](Self::subscribe).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use nkv_node::{Node, TailEvent, TailOptions};
    ///
    /// let node = Node::builder().start().await?;
    /// let nkv = node.handle();
    /// nkv.remember_deletes(1_000);
    /// nkv.put("lamp.hall", "on").await?;
    /// let mut lamps = nkv.tail("lamp", TailOptions::default())?;
    /// let known = loop {
    ///     let Some((event, cursor)) = lamps.next().await else { return Err("the node has stopped".into()) };
    ///     if let (TailEvent::Synced { .. }, Some(cursor)) = (event, cursor) {
    ///         break cursor;
    ///     }
    /// };
    /// drop(lamps);
    /// nkv.delete("lamp.hall").await?; // while no task reads the tail
    /// let mut lamps = nkv.tail("lamp", TailOptions::default().with_after(known))?;
    /// assert!(matches!(lamps.next().await, Some((TailEvent::Delete { .. }, _))));
    /// # Ok(()) }
    /// ```
    pub fn tail(&self, patterns: impl AsPatterns, options: TailOptions<'_>) -> Result<Tail> {
        let patterns = disjoint(patterns, options.exact)?;
        patterns.iter().try_for_each(|pattern| self.check(Right::Subscribe, pattern))?;
        if patterns.len() > PATTERNS_MAX {
            let message = format!("{} patterns in one subscription, and {PATTERNS_MAX} is the limit", patterns.len());
            return Err(Error::new(ErrorKind::Refused { status: 413 }, message));
        }
        Tail::begin(&self.shared, patterns, options)
    }

    /// Has the node remember this many of the most recent deletes, from now on, so that a [`tail`](Self::tail) can be resumed
    /// behind them. They count in the budget. A door that resumes asks for it at its start; the first that asks decides the
    /// number. Until then it costs nothing.
    pub fn remember_deletes(&self, max: usize) {
        self.shared.deletes.get_or_init(|| RecentDeletes::begin(&self.shared, max));
    }

    /// Has the node count what [`figures`](Self::figures) gives, from now on. Until then that costs nothing.
    pub fn keep_figures(&self) {
        self.shared.counters.get_or_init(Counters::new);
    }

    /// What was counted since the node began to [keep](Self::keep_figures) figures; `None` before.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let node = nkv_node::Node::builder().start().await?;
    /// # let nkv = node.handle();
    /// nkv.keep_figures();
    /// nkv.put("lamp.hall", "on").await?;
    /// let figures = nkv.figures()?.ok_or("no figures")?;
    /// assert_eq!(figures.batch_sizes.count(), 1);
    /// # Ok(()) }
    /// ```
    pub fn figures(&self) -> Result<Option<Figures>> {
        self.check(Right::Admin, &Pattern::All)?;
        let Some(counters) = self.shared.counters.get() else { return Ok(None) };
        let mut figures = Figures::of(counters);
        figures.queued_bytes = self.shared.budget.queued_bytes() as u64;
        figures.storage = self.shared.storage.as_ref().map(|storage| storage.read());
        Ok(Some(figures))
    }

    pub(crate) fn count(&self, operation: Operation, ended: Ended) {
        if let Some(counters) = self.shared.counters.get() {
            counters.count(operation, ended);
        }
    }

    /// How long a value lives yet.
    #[must_use]
    pub fn time_left(&self, expiry: Expiry) -> Duration {
        self.shared.clock.until(expiry.at)
    }

    /// Ends the subscription of this name and pattern, and notifies its subscriber; false if there is none.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub fn unsubscribe(&self, pattern: &Pattern, client_uuid: &SubscriberId) -> Result<bool> {
        self.check(Right::Subscribe, pattern)?;
        Ok(self.shared.store.unsubscribe(pattern, client_uuid))
    }

    // Looking at the node.

    /// The subscribers that a change of `key` notifies, and the backlog of each.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub fn trace(&self, key: &Key) -> Result<Vec<Traced>> {
        self.check(Right::Admin, &Pattern::Key(key.clone()))?;
        Ok(self.shared.trace(key))
    }

    /// The peers of all doors, in the order in which they came.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub fn peers(&self) -> Result<Vec<PeerInfo>> {
        self.check(Right::Admin, &Pattern::All)?;
        Ok(self.shared.budget.peers().iter().map(|account| account.info()).collect())
    }

    /// Figures of the store.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub async fn stats(&self) -> Result<Stats> {
        let numbers = self.numbers()?.into_iter().map(|(name, number)| (name.to_owned(), number)).collect();
        Ok(Stats::new(numbers, self.words()?.into_iter().map(|(name, word)| (name.into_owned(), word)).collect()))
    }

    /// The figures of [`stats`](Self::stats) by name, as doors show them.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub fn numbers(&self) -> Result<Vec<(&'static str, u64)>> {
        self.check(Right::Admin, &Pattern::All)?;
        let stats = self.shared.store.stats();
        let mut numbers = vec![
            ("keys", stats.keys),
            ("value_bytes", stats.value_bytes),
            ("subscriptions", stats.subscriptions),
            ("connections", self.shared.budget.peer_count()),
            ("revision", stats.revision.get()),
            ("uptime_ms", self.shared.clock.uptime_ms()),
            ("puts", stats.puts),
            ("deletes", stats.deletes),
            ("expired", stats.expired),
            ("batches", stats.batches),
            ("failed_batches", stats.failed_batches),
            ("notified", stats.notified),
            ("conflated", stats.conflated),
        ];
        numbers.extend(self.engine_numbers()?.iter().map(|number| (number.name, number.value)));
        Ok(numbers)
    }

    /// The numbers of the node's engine among these; none where there is no engine.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub fn engine_numbers(&self) -> Result<Vec<EngineNumber>> {
        self.check(Right::Admin, &Pattern::All)?;
        Ok(self.shared.truth().map(|truth| truth.engine.numbers()).unwrap_or_default())
    }

    /// The words among the figures of [`stats`](Self::stats). `engine` says whether the node follows its engine, if it has one.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub fn words(&self) -> Result<Vec<(Cow<'static, str>, String)>> {
        self.check(Right::Admin, &Pattern::All)?;
        let mut words =
            vec![("epoch".into(), self.epoch().to_string()), ("durability".into(), self.shared.durability.clone())];
        if let Some(truth) = self.shared.truth() {
            let stale = self.stale_for().map(|stale| format!("stale for {} s", stale.as_secs()));
            words.push(("engine".into(), stale.unwrap_or_else(|| "in reach".to_owned())));
            words.extend(truth.engine.words().into_iter().map(|(name, word)| (name.into(), word)));
        }
        Ok(words)
    }

    /// Whether the node serves requests, reads of the present and writes.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Closed`] when it has stopped; [`ErrorKind::Refused`] with 503 while it is [stale](Self::stale_for): reads
    /// are of the last state then.
    pub async fn health(&self) -> Result<()> {
        self.check_healthy()
    }

    /// As [`health`](Self::health).
    ///
    /// # Errors
    ///
    /// Those of [`health`](Self::health).
    pub fn check_healthy(&self) -> Result<()> {
        self.check_open()?;
        let Some(stale) = self.stale_text() else { return Ok(()) };
        Err(Error::new(ErrorKind::Refused { status: 503 }, format!("{stale}, reads are of the last state")))
    }

    /// Whether there is a state to be read: also where it may be [stale](Self::stale_for).
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub fn check_readable(&self) -> Result<()> {
        self.check_open()
    }

    /// For how long the node has had no sign of life of its engine, or has not seen what it has answered a write with: its
    /// state may lag by this time. `None` where it follows its engine, or has none.
    #[must_use]
    pub fn stale_for(&self) -> Option<Duration> {
        self.shared.truth()?.status().stale_since().map(|since| since.elapsed())
    }

    /// For how long and why the node is [stale](Self::stale_for), in words.
    #[must_use]
    pub fn stale_text(&self) -> Option<String> {
        let status = self.shared.truth()?.status();
        let seconds = status.stale_since()?.elapsed().as_secs();
        let why = match status.away_since {
            Some(_) => "the engine is out of reach, writes are refused",
            None => "the engine feeds too late what it has taken",
        };
        Some(format!("stale for {seconds} s: {why}"))
    }

    /// Since when the node is [stale](Self::stale_for), as it changes; `None` where it has no engine.
    #[must_use]
    pub fn stale(&self) -> Option<watch::Receiver<Option<Instant>>> {
        Some(self.shared.truth()?.stale())
    }

    /// For a client that has been at another node of the same engine, and has seen this much there: waits until this node has
    /// it too, for 5 s at most. `false` where the data have it not: they are of another epoch, or went back, and what the client
    /// holds says nothing any more. A node without an engine answers at once.
    ///
    /// # Errors
    ///
    /// 503 where the node is not level in time, or the engine is out of reach; and those of [`get`](Self::get).
    pub async fn catch_up(&self, seen: Seen) -> Result<bool> {
        self.check_open()?;
        let Some(truth) = self.shared.truth() else {
            let present = self.shared.seen();
            return Ok(present.epoch == seen.epoch && present.revision >= seen.revision);
        };
        let has_it = truth.catch_up(seen).await?;
        if !has_it {
            let Seen { epoch, revision } = seen;
            let what = format_args!(
                "a client that has seen revision {revision} of {epoch}, which the engine has not, begins anew"
            );
            self.shared.log.warn("begins anew", what);
        }
        Ok(has_it)
    }

    /// The limits that hold: the node's, and those of its engine.
    #[must_use]
    pub fn limits(&self) -> Limits {
        let mut limits = self.shared.limits;
        if let Some(truth) = self.shared.truth() {
            limits.value_len_max = limits.value_len_max.min(truth.engine.value_len_max());
        }
        limits
    }

    /// The life of the data within which revisions may be compared.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.shared.store.epoch()
    }

    /// The newest revision that readers see.
    #[must_use]
    pub fn revision(&self) -> Revision {
        let stats = self.shared.store.stats();
        Revision::in_epoch(stats.epoch, stats.revision.get())
    }

    /// What can be done beyond plain puts, gets and deletes: all, unless the node's engine lacks some of it.
    #[must_use]
    pub fn abilities(&self) -> Abilities {
        self.shared.truth().map_or(Abilities::ALL, |truth| truth.engine.abilities())
    }

    /// Whether the truth lies in an engine: its data may begin another epoch at any time.
    #[must_use]
    pub fn follows_engine(&self) -> bool {
        self.shared.truth().is_some()
    }

    /// Has the node stop, without waiting: see [`Node::shutdown`](crate::Node::shutdown).
    pub(crate) fn stop(&self) {
        self.shared.stop.send_replace(true);
    }

    /// Waits until the node is asked to stop: a door accepts no more then.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub async fn stopping(&self) {
        stopped(&mut self.shared.stop.subscribe()).await;
    }

    // For doors.

    /// Registers a peer of a door: it is listed under `address`, what `holder` holds counts in the budget, and it may have to
    /// leave. The node stops once all peers have ended, or after 4 s.
    #[must_use]
    pub fn peer(&self, address: impl Into<Box<str>>, holder: Box<dyn Holder>) -> Peer {
        Peer::new(self.shared.budget.share(Some(address.into()), holder))
    }

    /// An account for what a door holds beside that of a peer, such as for one whose connection another door serves. It is not
    /// listed, nor waited for when the node stops.
    #[must_use]
    pub fn aside(&self, holder: Box<dyn Holder>) -> Peer {
        Peer::new(self.shared.budget.share(None, holder))
    }

    /// What all peers may hold together, and the ways to wait for room in it.
    #[must_use]
    pub fn budget(&self) -> &Budget {
        &self.shared.budget
    }

    /// A log for lines that peers can provoke: one of a kind a second is written.
    #[must_use]
    pub fn log(&self) -> &RateLimitedLog {
        &self.shared.log
    }

    /// The same for a door, whose tasks run in the node's runtime: writes of a turn are handed over together, and their answers
    /// share one wake-up. A single write takes a turn of the runtime longer.
    #[must_use]
    pub fn for_door(&self) -> Handle {
        Handle { gathers: true, ..self.clone() }
    }

    /// A waker that stands for `task`: tasks that a batch wakes by such wakers share one wake-up of the node's runtime, and
    /// those that wait for an answer have their turn before those that are only notified. `known` is what the task got before.
    pub fn waker<'a>(&self, known: &'a mut SharedWaker, task: &std::task::Waker) -> &'a std::task::Waker {
        self.shared.wake_ups.waker(known, task)
    }

    /// Lends a key's record to `look`; `None` if there is none, as for a text that is no key. Nothing is allocated or
    /// copied: this is the way to read for a door that writes what it finds somewhere else.
    ///
    /// No write becomes visible while `look` looks, so it is to be quick, and must not call the node.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let node = nkv_node::Node::builder().start().await?;
    /// # let nkv = node.handle();
    /// nkv.put("lamp.hall", "on").await?;
    /// let len = nkv.look_up("lamp.hall", |record| record.value.len())?;
    /// assert_eq!(len, Some(2));
    /// # Ok(()) }
    /// ```
    pub fn look_up<R>(&self, key: &str, look: impl FnOnce(RecordRef<'_>) -> R) -> Result<Option<R>> {
        self.check_text(Right::Get, key)?;
        let found = self.shared.store.look_up(key, look);
        self.count(Operation::Get, if found.is_some() { Ended::Ok } else { Ended::NotFound });
        Ok(found)
    }

    /// Lends each record that `pattern` selects, after `after`, to `visit`, in key order, until it breaks off; see
    /// [`look_up`](Self::look_up).
    ///
    /// Up to 1,024 keys are of one moment. Then others have the lock in between, and the next keys are of a later one.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub fn walk<B>(
        &self,
        pattern: &Pattern,
        after: Option<&Key>,
        visit: impl FnMut(RecordRef<'_>) -> ControlFlow<B>,
    ) -> Result<ControlFlow<B>> {
        self.check(Right::Get, pattern)?;
        self.count(Operation::List, Ended::Ok);
        Ok(self.shared.store.walk(pattern, after, visit))
    }

    /// Whether `pattern` selects any key.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub fn has(&self, pattern: &Pattern) -> Result<bool> {
        self.check(Right::Get, pattern)?;
        Ok(self.shared.store.exists(pattern))
    }

    /// Checks an operation against limits and rights, before it is [submitted](Self::submit) with others.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Refused`] with 413 or 403.
    pub fn admit(&self, op: Op) -> Result<Admitted> {
        self.check_op(&op)?;
        Ok(Admitted(op))
    }

    /// Room for `len` bytes of values to be written, if there is any now: to be had before they are copied. What is more
    /// than there ever is counts as all of it.
    #[must_use]
    pub fn try_room(&self, len: usize) -> Option<Room> {
        self.shared.try_room(len)
    }

    /// Waits for room for `len` bytes of values; those that came first go first.
    pub fn room(&self, len: usize) -> impl Future<Output = Result<Room, Stopping>> + Send + use<> {
        self.shared.room(len)
    }

    /// How many bytes a [`Room`] is for at least: so that only a certain number of writes waits.
    pub const ROOM_LEN_MIN: usize = JOB_LEN_MIN;

    /// Room for a long request of `len` bytes to be read, if there is any now.
    #[must_use]
    pub fn try_arrival(&self, len: usize) -> Option<Room> {
        self.shared.try_arrival(len)
    }

    /// Waits for room for a long request of `len` bytes to be read.
    pub fn arrival(&self, len: usize) -> impl Future<Output = Result<Room, Stopping>> + Send + use<> {
        self.shared.arrival(len)
    }

    /// Whether long requests have to wait.
    #[must_use]
    pub fn is_short_of_room(&self) -> bool {
        self.shared.is_short_of_room()
    }

    /// Has `ops` done, each for itself, in order, with all others that wait, once the tasks of the runtime have had their turn:
    /// for doors that gather what their peers send. The room is given back when they are done.
    pub fn submit(&self, ops: Vec<Admitted>, room: Room) -> Written {
        let ops = ops.into_iter().map(|Admitted(op)| op).collect();
        match self.shared.truth() {
            None => self.shared.write(Write::apart(ops), room),
            Some(_) => self.shared.write_to_engine(ops, room),
        }
    }

    /// When a value ends that lives for `ttl` from now on.
    #[must_use]
    pub fn expiry(&self, ttl: Duration) -> Expiry {
        Expiry::after(self.shared.clock.now(), ttl)
    }

    // What the operations share.

    fn check_open(&self) -> Result<()> {
        if self.shared.queue.is_closed() {
            return Err(Error::new(ErrorKind::Closed, "the node has stopped"));
        }
        match self.shared.truth() {
            Some(truth) if !truth.status().has_state => {
                let message = "the node has no state of its engine yet";
                Err(Error::new(ErrorKind::Refused { status: 503 }, message))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn check(&self, right: Right, pattern: &Pattern) -> Result<()> {
        self.check_open()?;
        let Some(principal) = &self.principal else { return Ok(()) };
        match &self.shared.rights {
            Some(rights) if !rights.allows(principal, right, pattern) => {
                let message = format!("'{principal}' may not {} '{pattern}'", right.as_str());
                Err(Error::new(ErrorKind::Refused { status: 403 }, message))
            }
            _ => Ok(()),
        }
    }

    fn check_text(&self, right: Right, key: &str) -> Result<()> {
        if self.principal.is_none() {
            return self.check_open();
        }
        // A text that is no key selects nothing.
        Key::new(key).map_or(Ok(()), |key| self.check(right, &Pattern::Exact(key)))
    }

    fn check_op(&self, op: &Op) -> Result<()> {
        self.check_op_uncounted(op).inspect_err(|_| {
            let is_put = matches!(op, Op::Put { .. });
            self.count(if is_put { Operation::Put } else { Operation::Delete }, Ended::Refused);
        })
    }

    fn check_op_uncounted(&self, op: &Op) -> Result<()> {
        match op {
            Op::Put { .. } if self.principal.is_none() => self.check_open()?,
            Op::Put { key, .. } => self.check(Right::Put, &Pattern::Exact(key.clone()))?,
            Op::Delete { pattern, .. } => self.check(Right::Delete, pattern)?,
        }
        let key = match op {
            Op::Put { key, .. } | Op::Delete { pattern: Pattern::Key(key) | Pattern::Exact(key), .. } => Some(key),
            Op::Delete { .. } => None,
        };
        if let Some(key) = key.filter(|key| key.is_reserved()) {
            return Err(Error::new(ErrorKind::InvalidKey, format!("'{key}' is a reserved key")));
        }
        if let Op::Put { key, value, .. } = op {
            let (len, len_max) = (value.len(), self.limits().value_len_max);
            if len > len_max {
                let message = format!("the value of '{key}' has {len} bytes, and {len_max} is the limit");
                return Err(Error::new(ErrorKind::Refused { status: 413 }, message));
            }
        }
        self.shared.truth().map_or(Ok(()), |truth| truth.check(op))
    }

    async fn all<T>(&self, pattern: &Pattern, mut take: impl FnMut(RecordRef<'_>) -> T) -> Result<Vec<T>> {
        let (mut all, mut after) = (Vec::new(), None);
        loop {
            let (part, last) = self.take_some(pattern, after.as_ref(), PART_KEYS, &mut take)?;
            all.extend(part.items);
            if !part.more {
                return Ok(all);
            }
            after = last;
            tokio::task::yield_now().await;
        }
    }

    fn page<T>(
        &self,
        pattern: &Pattern,
        options: &PageOptions,
        take: impl FnMut(RecordRef<'_>) -> T,
    ) -> Result<Page<T>> {
        let limit = usize::try_from(options.limit.unwrap_or(PAGE_LIMIT).min(PAGE_LIMIT_MAX)).unwrap_or(usize::MAX);
        Ok(self.take_some(pattern, options.after.as_ref(), limit, take)?.0)
    }

    /// At most `limit` of what `pattern` selects after `after`, the last key of it, and whether there is more.
    fn take_some<T>(
        &self,
        pattern: &Pattern,
        after: Option<&Key>,
        limit: usize,
        mut take: impl FnMut(RecordRef<'_>) -> T,
    ) -> Result<(Page<T>, Option<Key>)> {
        let (mut items, mut last) = (Vec::new(), None);
        let ended = self.walk(pattern, after, |record| {
            if items.len() == limit {
                return ControlFlow::Break(());
            }
            items.push(take(record));
            if items.len() == limit {
                last = Some(key_of(record));
            }
            ControlFlow::Continue(())
        })?;
        Ok((Page::new(items, ended.is_break()), last))
    }

    /// What a condition on this revision is for the store.
    fn condition(&self, revision: Revision) -> Result<nkv_core::Revision> {
        if revision.epoch().is_some_and(|epoch| epoch != self.epoch()) {
            let message = format!("the condition names revision {revision} of another epoch than that of the data");
            return Err(Error::new(ErrorKind::OtherEpoch, message));
        }
        Ok(nkv_core::Revision::new(revision.get()))
    }
}

impl UpdateStore for Handle {
    async fn read(&self, key: &Key) -> Result<Option<Entry>> {
        self.get(key).await
    }

    async fn write(&self, key: &Key, value: Bytes, options: PutOptions) -> Result<Revision> {
        self.put_with(key, value, options).await
    }

    async fn delete(&self, key: &Key, if_revision: Revision) -> Result<Deleted> {
        self.delete_if(key, if_revision).await
    }

    async fn pause(&self, pause: Duration) -> bool {
        // Also for a thread that is no task: the sleep is one.
        drop(self.shared.runtime.spawn(tokio::time::sleep(pause)).await);
        self.check_open().is_ok()
    }
}

/// Why there are no changes to be read.
#[derive(Clone, Debug, ThisError)]
#[non_exhaustive]
pub enum ChangesError {
    /// Changes are missing.
    #[error(transparent)]
    Gap(#[from] Gap),
    /// They may not be read, or the node has stopped.
    #[error(transparent)]
    Refused(#[from] Error),
}

fn conflict(epoch: Epoch, outcome: Outcome) -> Error {
    let revision = match outcome {
        Outcome::Conflict { revision } => Revision::in_epoch(epoch, revision.get()),
        _ => Revision::ZERO,
    };
    let message = match revision.get() {
        0 => "conflict: the key does not exist".to_owned(),
        number => format!("conflict: the key is at revision {number}"),
    };
    Error::new(ErrorKind::Conflict { revision }, message)
}

fn unknown(_: Stopping) -> Error {
    Error::new(ErrorKind::OutcomeUnknown, "the node stopped; what became of the write is not known")
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("principal", &self.principal).finish_non_exhaustive()
    }
}

pub(crate) fn entry(epoch: Epoch, record: Record) -> Entry {
    Entry::new(record.key, record.value, Revision::in_epoch(epoch, record.revision.get()))
}

fn listed(epoch: Epoch, record: RecordRef<'_>) -> (Key, Revision) {
    let revision = Revision::in_epoch(epoch, record.revision.get());
    (key_of(record), revision)
}

fn key_of(record: RecordRef<'_>) -> Key {
    RecordRef { value: ValueRef::Lent(&[]), ..record }.to_record().key
}

fn of_store(results: Vec<WriteResult>) -> Vec<Result<Outcome>> {
    results.into_iter().map(|result| result.map_err(failed)).collect()
}

fn failed(Failed { error, deleted }: Failed) -> Error {
    let cause = Chain(&error);
    let (status, message) = match error.kind() {
        _ if deleted > 0 => (500, format!("storage failed: only {deleted} keys are gone: {cause}")),
        PersistErrorKind::NoSpace => (507, format!("the disk is full; nothing was changed: {cause}")),
        PersistErrorKind::Rejected => (413, format!("storage cannot take it; nothing was changed: {cause}")),
        PersistErrorKind::Poisoned => {
            (500, format!("storage failed; whether the change was stored shows after a restart: {cause}"))
        }
        _ => (500, format!("storage failed; nothing was changed: {cause}")),
    };
    Error::new(ErrorKind::Refused { status }, message)
}
