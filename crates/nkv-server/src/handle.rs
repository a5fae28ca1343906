//! The server's operations for the process that it runs in: no socket, no encoding.

use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_core::Stream;
use nkv_core::mailbox::{Inbox, Item, mailbox};
use nkv_core::{
    Event, Expiry, Failed, Key, Op, Outcome, Page, Pattern, PutOptions, Record, Revision, Stats, SubscriberId, Write,
    WriteError,
};
use thiserror::Error;

use crate::budget::{Share, Source};
use crate::core::{Core, Subscriber};
use crate::reading::PART_KEYS;

/// The store of a running server, from within its process. Clones are cheap and stand for the same store.
///
/// Reads answer at once; writes wait until they are as durable as the server promises, sharing a flush with others.
/// A handle does not keep its server running: once that has stopped, every call is [`HandleError::Stopped`].
///
/// # Cancel safety
///
/// A write whose future is dropped may or may not be done.
#[derive(Clone, Debug)]
pub struct Handle {
    core: Weak<Core>,
}

/// Condition and lifetime of a write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct WriteOptions {
    /// Write only if the key is at this revision; [`Revision::ZERO`]: only if it is absent.
    pub if_revision: Option<Revision>,
    /// How long the value lives, at least a millisecond.
    pub ttl: Option<Duration>,
}

impl WriteOptions {
    /// Sets the revision that the key must have; [`Revision::ZERO`]: it must be absent.
    #[must_use]
    pub fn with_if_revision(self, revision: Revision) -> Self {
        WriteOptions { if_revision: Some(revision), ..self }
    }

    /// Sets how long the value lives, at least a millisecond.
    #[must_use]
    pub fn with_ttl(self, ttl: Duration) -> Self {
        WriteOptions { ttl: Some(ttl), ..self }
    }
}

/// Why a handle's call was not done.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum HandleError {
    /// The write was not done.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The server has stopped. A write that was under way may or may not be done.
    #[error("the server has stopped")]
    Stopped,
}

impl Handle {
    pub(crate) fn new(core: &Arc<Core>) -> Self {
        Handle { core: Arc::downgrade(core) }
    }

    /// The value of a key.
    ///
    /// # Errors
    ///
    /// [`HandleError::Stopped`].
    pub async fn get(&self, key: &Key) -> Result<Option<Record>, HandleError> {
        Ok(self.core()?.store.get(key))
    }

    /// The keys and values that `pattern` selects, in key order. Up to 1,024 are of one moment; of more, the next are of a
    /// later one, and other tasks have their turn in between.
    ///
    /// # Errors
    ///
    /// [`HandleError::Stopped`].
    pub async fn get_all(&self, pattern: &Pattern) -> Result<Vec<Record>, HandleError> {
        let mut all: Vec<Record> = Vec::new();
        loop {
            let after = all.last().map(|record| record.key.clone());
            let page = self.core()?.store.get_page(pattern, after.as_ref(), PART_KEYS, usize::MAX);
            // No page is larger than the largest number.
            let mut page = page.map_err(|_| HandleError::Stopped)?;
            all.append(&mut page.entries);
            if !page.more {
                return Ok(all);
            }
            tokio::task::yield_now().await;
        }
    }

    /// At most `limit` keys that `pattern` selects, after `after`, with their revisions.
    ///
    /// # Errors
    ///
    /// [`HandleError::Stopped`].
    pub async fn list(
        &self,
        pattern: &Pattern,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page<(Key, Revision)>, HandleError> {
        Ok(self.core()?.store.list(pattern, after, limit))
    }

    /// Whether `pattern` selects any key.
    ///
    /// # Errors
    ///
    /// [`HandleError::Stopped`].
    pub async fn exists(&self, pattern: &Pattern) -> Result<bool, HandleError> {
        Ok(self.core()?.store.exists(pattern))
    }

    /// Writes a value and returns its revision.
    ///
    /// # Errors
    ///
    /// Any of [`HandleError`] but [`WriteError::NotFound`].
    pub async fn put(
        &self,
        key: &Key,
        value: impl Into<Bytes>,
        options: WriteOptions,
    ) -> Result<Revision, HandleError> {
        let core = self.core()?;
        let expiry = options.ttl.map(|ttl| Expiry::after(core.clock.now(), ttl));
        let options = PutOptions { if_revision: options.if_revision, expiry };
        match write_one(&core, Op::Put { key: key.clone(), value: value.into(), options }).await? {
            Outcome::Put { revision } => Ok(revision),
            other => Err(WriteError::from(other).into()),
        }
    }

    /// Removes the keys that `pattern` selects and returns how many, with the highest revision given. What of a wildcard
    /// delete is one step, [`NotifyKeyValue::delete`](nkv_core::NotifyKeyValue::delete) says.
    ///
    /// # Errors
    ///
    /// Any of [`HandleError`].
    pub async fn delete(
        &self,
        pattern: &Pattern,
        if_revision: Option<Revision>,
    ) -> Result<(u64, Revision), HandleError> {
        let core = self.core()?;
        match write_one(&core, Op::Delete { pattern: pattern.clone(), if_revision }).await? {
            Outcome::Deleted { count, revision } => Ok((count, revision)),
            other => Err(WriteError::from(other).into()),
        }
    }

    /// Does all of `ops`, stored together or not at all; one outcome for each. An operation whose condition does not
    /// hold does not keep the others from being done. Expiries are counted on [`now`](Self::now).
    ///
    /// # Errors
    ///
    /// [`WriteError::Persist`], [`HandleError::Stopped`].
    pub async fn write(&self, ops: Vec<Op>) -> Result<Vec<Outcome>, HandleError> {
        let results = self.core()?.write_urgently(Write::together(ops)).await.map_err(|_| HandleError::Stopped)?;
        results.into_iter().map(|result| result.map_err(HandleError::from)).collect()
    }

    /// The present, on the clock that expiries are counted on.
    ///
    /// # Errors
    ///
    /// [`HandleError::Stopped`].
    pub fn now(&self) -> Result<nkv_core::Timestamp, HandleError> {
        Ok(self.core()?.clock.now())
    }

    /// Tells of every change that `pattern` covers, from now on; with `snapshot`, of the present state first.
    /// Dropping the subscription ends it.
    ///
    /// `id` names the subscriber: a second subscription of the same name and pattern replaces the first.
    ///
    /// # Errors
    ///
    /// [`HandleError::Stopped`].
    pub async fn subscribe(
        &self,
        pattern: Pattern,
        id: impl Into<SubscriberId>,
        snapshot: bool,
    ) -> Result<Subscription, HandleError> {
        let (core, (post, inbox)) = (self.core()?, mailbox());
        let share = core.budget.share(Source::Handle(post.observer()));
        let subscriber = Subscriber::handle(post);
        let entry = core.store.subscribe(pattern, id.into(), subscriber, snapshot);
        Ok(Subscription { core: self.core.clone(), entry: Arc::downgrade(&entry), inbox, _share: share })
    }

    /// Who would be told of a change of `key`: names and patterns.
    ///
    /// # Errors
    ///
    /// [`HandleError::Stopped`].
    pub async fn trace(&self, key: &Key) -> Result<Vec<(SubscriberId, String)>, HandleError> {
        Ok(self.core()?.trace(key).into_iter().map(|traced| (traced.id, traced.pattern)).collect())
    }

    /// Figures of the store.
    ///
    /// # Errors
    ///
    /// [`HandleError::Stopped`].
    pub async fn stats(&self) -> Result<Stats, HandleError> {
        Ok(self.core()?.store.stats())
    }

    fn core(&self) -> Result<Arc<Core>, HandleError> {
        self.core.upgrade().ok_or(HandleError::Stopped)
    }
}

async fn write_one(core: &Core, op: Op) -> Result<Outcome, HandleError> {
    let mut results = core.write_urgently(Write::apart(vec![op])).await.map_err(|_| HandleError::Stopped)?;
    results.pop().ok_or(HandleError::Stopped)?.map_err(HandleError::from)
}

impl From<Failed> for HandleError {
    fn from(failed: Failed) -> Self {
        HandleError::Write(failed.into())
    }
}

/// What a subscription brings.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Notice {
    /// The event: the beginning, a part of the snapshot, a change, or the end. Where too much waited the subscription
    /// [begins anew](nkv_core::BeginCause::Reset).
    pub event: Arc<Event>,
    /// How many changes of its key, since the last one told, were passed over in its favour.
    pub skipped: u64,
}

/// A subscription within the process: a stream of [`Notice`]s, the latest for each key. It ends with the server.
#[derive(Debug)]
pub struct Subscription {
    core: Weak<Core>,
    entry: Weak<nkv_core::Subscription<Subscriber>>,
    inbox: Inbox,
    /// What waits for it counts with what connections hold.
    _share: Share,
}

impl Subscription {
    /// The next notice; `None` once the server has stopped.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Notice> {
        self.inbox.take().await.map(notice)
    }

    /// The next notice, blocking the thread until there is one; `None` once the server has stopped.
    pub fn next_blocking(&mut self) -> Option<Notice> {
        self.inbox.take_blocking().map(notice)
    }
}

impl Stream for Subscription {
    type Item = Notice;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Notice>> {
        self.inbox.poll_take(cx).map(|item| item.map(notice))
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        if let (Some(core), Some(entry)) = (self.core.upgrade(), self.entry.upgrade()) {
            core.store.forget(&[entry]);
        }
    }
}

fn notice(item: Item) -> Notice {
    match item {
        Item::Event { event, skipped } => Notice { event, skipped },
        Item::Own(never) => match never {},
    }
}
