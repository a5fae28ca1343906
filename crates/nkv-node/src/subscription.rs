//! Subscriptions from within the process: as a stream of events, or by a notifier of any kind.

use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};

use futures_core::Stream;
use nkv_core::mailbox::{Inbox, Item, mailbox_with_slack};
use nkv_core::{
    Action, Began, BeginCause, Change, Delivery, Epoch, EventKind, Key, Notifier, Pattern, Reason, Snapshot,
    SubscriberId,
};
use nkv_types::{EndReason, Entry, Error, ErrorKind, Event, GoneReason, Result, Revision};

use crate::budget::{InProcess, Share};
use crate::figures::{Ended, Operation};
use crate::peer::{Counted, Peer};
use crate::shared::Shared;
use crate::subscriber::Subscriber;

/// Segments of a subscription's pattern that are not counted, and what each further one takes.
const FREE_SEGMENTS: usize = 8;
const NODE_LEN: usize = 512;

/// How a subscriber in this process is notified.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AttachOptions<'a> {
    /// Its name: a second subscription of the same name and pattern replaces the first. Without one it replaces none.
    pub client_uuid: Option<SubscriberId>,
    /// Whether the present state is delivered first. It is, if not given.
    pub snapshot: bool,
    /// The bytes of changes that may wait, each to be delivered, before those of one key are conflated; 0 if not given.
    pub slack: usize,
    /// Whether a key stands for itself alone, and not for all below it too. Not, if not given.
    pub exact: bool,
    /// Whether the node conflates in front of a notifier: it is then called by a task of the node's runtime, under no lock of
    /// the store, with how many changes were [passed over](Notifier::notify_conflated), and with snapshots as
    /// [`EventKind::Snapshot`]. As a task it returns soon, too. Not, if not given.
    pub mailbox: bool,
    /// The peer of a door whose subscription it is.
    pub peer: Option<&'a Peer>,
}

impl Default for AttachOptions<'_> {
    fn default() -> Self {
        AttachOptions { client_uuid: None, snapshot: true, slack: 0, exact: false, mailbox: false, peer: None }
    }
}

impl<'a> AttachOptions<'a> {
    /// Sets the subscriber's name.
    #[must_use]
    pub fn with_client_uuid(self, client_uuid: impl Into<SubscriberId>) -> Self {
        AttachOptions { client_uuid: Some(client_uuid.into()), ..self }
    }

    /// Sets whether the present state is delivered first.
    #[must_use]
    pub fn with_snapshot(self, snapshot: bool) -> Self {
        AttachOptions { snapshot, ..self }
    }

    /// Sets how many bytes of changes may wait without being conflated.
    #[must_use]
    pub fn with_slack(self, slack: usize) -> Self {
        AttachOptions { slack, ..self }
    }

    /// Sets whether a key stands for itself alone.
    #[must_use]
    pub fn with_exact(self, exact: bool) -> Self {
        AttachOptions { exact, ..self }
    }

    /// Has the node conflate in front of the notifier.
    #[must_use]
    pub fn with_mailbox(self) -> Self {
        AttachOptions { mailbox: true, ..self }
    }

    /// Sets the peer whose subscription it is.
    #[must_use]
    pub fn with_peer(self, peer: &'a Peer) -> Self {
        AttachOptions { peer: Some(peer), ..self }
    }
}

/// A notifier's subscription, to one pattern or several, which the node holds. Dropping it ends it, without a last event.
#[derive(Debug)]
pub struct Attached {
    shared: Arc<Shared>,
    entry: Weak<nkv_core::Subscription<Subscriber>>,
    /// Those of further patterns.
    more: Vec<Attached>,
}

impl Attached {
    pub(crate) fn begin(
        shared: &Arc<Shared>,
        patterns: Vec<Pattern>,
        notifier: Box<dyn Notifier>,
        options: &AttachOptions<'_>,
    ) -> Result<Self> {
        let client_uuid = options.client_uuid.clone().unwrap_or_else(|| shared.new_name());
        let notifier = if options.mailbox { behind_mailbox(shared, notifier, options.slack) } else { notifier };
        let add = |pattern, notifier| Attached::add(shared, pattern, client_uuid.clone(), notifier, options);
        if let [pattern] = &patterns[..] {
            return add(pattern.clone(), notifier);
        }
        let notifier: Arc<dyn Notifier> = Arc::from(notifier);
        let mut all = Vec::new();
        for pattern in patterns {
            all.push(add(pattern, Box::new(Arc::clone(&notifier)))?);
        }
        Ok(Attached { shared: Arc::clone(shared), entry: Weak::new(), more: all })
    }

    fn add(
        shared: &Arc<Shared>,
        pattern: Pattern,
        client_uuid: SubscriberId,
        notifier: Box<dyn Notifier>,
        options: &AttachOptions<'_>,
    ) -> Result<Self> {
        let added = Self::try_add(shared, pattern, client_uuid, notifier, options);
        if let Some(counters) = shared.counters.get() {
            counters.count(Operation::Subscribe, if added.is_ok() { Ended::Ok } else { Ended::Refused });
        }
        added
    }

    fn try_add(
        shared: &Arc<Shared>,
        pattern: Pattern,
        client_uuid: SubscriberId,
        notifier: Box<dyn Notifier>,
        options: &AttachOptions<'_>,
    ) -> Result<Self> {
        let (account, limits) = (options.peer.map(Peer::account), &shared.limits);
        // What this one replaces, wherever that is, counts no more: a peer that comes back is not to fail for its own
        // subscription on a connection that died.
        let replaced = shared.store.subscription(&pattern, &client_uuid);
        let replaces = replaced.is_some();
        let again = account.is_some_and(|account| replaced.is_some_and(|replaced| replaced.notifier().is_of(account)));
        let of_peer = account.map_or(0, |account| account.subscriptions.load(Relaxed));
        if !again && of_peer >= limits.subscriptions_max as u64 {
            return Err(too_many(format!("more than {} subscriptions on one connection", limits.subscriptions_max)));
        }
        if !replaces && shared.store.subscriptions() >= limits.subscriptions_total_max as u64 {
            let max = limits.subscriptions_total_max;
            return Err(too_many(format!("more than {max} subscriptions on all connections")));
        }
        let deep_len = deep_len(&pattern);
        if !again && shared.budget.is_deep_full(account.map(|account| &**account), deep_len, replaces) {
            return Err(too_many("too many subscriptions to keys with many segments".into()));
        }
        let deep = shared.budget.hold_deep(account.cloned(), deep_len);
        let subscriber = Subscriber::new(notifier, deep, account.map(Counted::new));
        let entry = shared.store.subscribe(pattern, client_uuid, subscriber, options.snapshot);
        let attached = Attached { shared: Arc::clone(shared), entry: Arc::downgrade(&entry), more: Vec::new() };
        drop(entry);
        if shared.queue.is_closed() {
            // The node may have forgotten all others by now.
            return Err(Error::new(ErrorKind::Closed, "the node has stopped"));
        }
        Ok(attached)
    }

    /// Whether it has ended: unsubscribed, replaced, or its notifier has closed; of several patterns, for each of them.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.entry.upgrade().is_none_or(|entry| entry.has_ended()) && self.more.iter().all(Attached::has_ended)
    }

    /// Ends many at once.
    pub fn end_all(all: impl IntoIterator<Item = Attached>) {
        let (mut shared, mut entries) = (None, Vec::new());
        for mut one in all {
            entries.extend(std::mem::take(&mut one.entry).upgrade());
            shared.get_or_insert_with(|| Arc::clone(&one.shared));
        }
        if let Some(shared) = shared {
            shared.store.forget(&entries);
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if let Some(entry) = self.entry.upgrade() {
            self.shared.store.forget(&[entry]);
        }
    }
}

fn too_many(message: String) -> Error {
    Error::new(ErrorKind::Refused { status: 429 }, message)
}

/// What a subscription costs beyond what the limit of their number allows for: a node for each segment of its pattern.
fn deep_len(pattern: &Pattern) -> usize {
    let segments = match pattern {
        Pattern::Key(key) | Pattern::Exact(key) | Pattern::Below(key) => key.segments().count(),
        Pattern::All => 0,
    };
    segments.saturating_sub(FREE_SEGMENTS).saturating_mul(NODE_LEN)
}

/// A mailbox, and a task that empties it into the notifier.
fn behind_mailbox(shared: &Arc<Shared>, notifier: Box<dyn Notifier>, slack: usize) -> Box<dyn Notifier> {
    let (post, inbox) = mailbox_with_slack(slack);
    let share = shared.budget.share(None, Box::new(InProcess(post.observer())));
    shared.runtime.spawn(async move {
        while let Some(Item::Event { event, skipped }) = inbox.take().await {
            if notifier.notify_conflated(&event, skipped) == Delivery::Closed {
                break;
            }
            tokio::task::consume_budget().await;
        }
        drop(share);
    });
    Box::new(post)
}

/// A subscription within the process: a stream of [`Event`]s. It ends with [`Event::Ended`], at the latest with its node.
///
/// It keeps the keys that it has delivered, with their revisions, so that where too much waited, and the present state is
/// read anew, nothing is delivered twice and no end of a key is missed: some 100 bytes for each key.
#[derive(Debug)]
pub struct Subscription {
    inbox: Inbox,
    ready: VecDeque<Event>,
    delivered: Delivered,
    has_ended: bool,
    /// In this order: what ends it comes before what counts its backlog.
    _attached: Attached,
    _share: Share,
}

/// What a reader knows.
#[derive(Debug, Default)]
struct Delivered {
    keys: BTreeMap<Key, Known>,
    epoch: Epoch,
    /// Patterns whose snapshot is not read whole.
    unread: usize,
    /// The lowest revision up to which all patterns are read.
    synced: Option<u64>,
    /// The snapshots so far, each with a number.
    snapshot: u32,
    /// The first snapshots are read to know what there is, and not delivered.
    is_silent: bool,
    /// A snapshot has begun and is not read whole.
    is_reading: bool,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    /// 0 if it is of an earlier epoch.
    revision: u64,
    /// The snapshot that had it last.
    snapshot: u32,
}

impl Subscription {
    pub(crate) fn begin(shared: &Arc<Shared>, patterns: Vec<Pattern>, options: AttachOptions<'_>) -> Result<Self> {
        let (post, inbox) = mailbox_with_slack(options.slack);
        let share = shared.budget.share(None, Box::new(InProcess(post.observer())));
        let delivered = Delivered {
            epoch: shared.store.epoch(),
            unread: patterns.len(),
            is_silent: !options.snapshot,
            ..Delivered::default()
        };
        // The present state is read in any case: it is how the end of a key is known that was not delivered by itself.
        let options = AttachOptions { snapshot: true, mailbox: false, ..options };
        let attached = Attached::begin(shared, patterns, Box::new(post), &options)?;
        let (ready, has_ended) = Default::default();
        Ok(Subscription { inbox, ready, delivered, has_ended, _attached: attached, _share: share })
    }

    /// Reads the state that is not to be delivered, so that what changes from here on is.
    pub(crate) async fn settle(&mut self) {
        while self.delivered.is_silent
            && let Some(item) = self.inbox.try_take()
        {
            self.take(Some(item));
            tokio::task::yield_now().await;
        }
    }

    /// The next event; `None` after [`Event::Ended`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Event> {
        poll_fn(|cx| self.poll_event(cx)).await
    }

    /// The next event if there is one already.
    pub(crate) fn try_next(&mut self) -> Option<Event> {
        while self.ready.is_empty() && !self.has_ended {
            let item = self.inbox.try_take()?;
            self.take(Some(item));
        }
        self.ready.pop_front()
    }

    /// The next event, blocking the thread until there is one; `None` after [`Event::Ended`].
    pub fn next_blocking(&mut self) -> Option<Event> {
        loop {
            if self.ready.is_empty() && !self.has_ended {
                let item = self.inbox.take_blocking();
                self.take(item);
            } else {
                return self.ready.pop_front();
            }
        }
    }

    fn poll_event(&mut self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        while self.ready.is_empty() && !self.has_ended {
            let Poll::Ready(item) = self.inbox.poll_take(cx) else { return Poll::Pending };
            self.take(item);
        }
        Poll::Ready(self.ready.pop_front())
    }

    fn take(&mut self, item: Option<Item>) {
        let (event, skipped) = match item {
            Some(Item::Event { event, skipped }) => (event, skipped),
            Some(Item::Own(never)) => match never {},
            None => return self.end(EndReason::Closed),
        };
        match event.kind() {
            EventKind::Began(began) => self.delivered.begin(began, &mut self.ready),
            EventKind::Snapshot(snapshot) => self.delivered.read(snapshot, &mut self.ready),
            EventKind::Change(change) => self.ready.push_back(self.delivered.change(change, skipped)),
            EventKind::Ended { reason: nkv_core::EndReason::Unsubscribed, .. } => self.end(EndReason::Unsubscribed),
            EventKind::Ended { .. } => self.end(EndReason::Replaced),
            _ => {}
        }
    }

    fn end(&mut self, reason: EndReason) {
        self.has_ended = true;
        self.ready.push_back(Event::Ended(reason));
    }
}

impl Stream for Subscription {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        self.poll_event(cx)
    }
}

impl Delivered {
    fn begin(&mut self, began: &Began, ready: &mut VecDeque<Event>) {
        self.snapshot = self.snapshot.wrapping_add(1);
        if std::mem::replace(&mut self.is_reading, true) {
            // An epoch began, and broke it off.
            self.unread = self.unread.saturating_sub(1);
        }
        if began.cause == BeginCause::Reset {
            self.unread = self.unread.saturating_add(1);
        }
        if began.epoch != self.epoch {
            self.epoch = began.epoch;
            self.synced = None;
            self.keys.values_mut().for_each(|known| known.revision = 0);
            ready.push_back(Event::connected(began.epoch));
        }
    }

    fn read(&mut self, part: &Snapshot, ready: &mut VecDeque<Event>) {
        if part.is_last {
            self.is_reading = false;
            self.unread = self.unread.saturating_sub(1);
        }
        if part.epoch != self.epoch {
            // That it began is still to come, and all of it with that.
            return;
        }
        for record in part.records.iter() {
            let entry = Entry::new(record.to_record().key, record.value.to_bytes(), self.revision(record.revision));
            let known = Known { revision: record.revision.get(), snapshot: self.snapshot };
            let before = self.keys.insert(entry.key.clone(), known);
            if !self.is_silent && before.is_none_or(|before| before.revision != known.revision) {
                ready.push_back(Event::update(entry, 0));
            }
        }
        if !part.is_last {
            return;
        }
        let (snapshot, revision) = (self.snapshot, self.revision(part.revision));
        self.keys.retain(|key, known| {
            let is_there = known.snapshot == snapshot || !part.pattern.covers(key);
            if !is_there {
                ready.push_back(Event::gone(key.clone(), revision, GoneReason::Missed, 0));
            }
            is_there
        });
        let synced = part.revision.get();
        self.synced = Some(self.synced.map_or(synced, |known| known.min(synced)));
        if self.unread == 0 {
            self.is_silent = false;
            let synced = self.synced.take().unwrap_or_default();
            ready.push_back(Event::synced(Revision::in_epoch(self.epoch, synced), self.epoch));
        }
    }

    fn change(&mut self, change: &Change, skipped: u64) -> Event {
        let (key, revision) = (change.key.clone(), self.revision(change.revision));
        match &change.action {
            Action::Put { value, .. } => {
                let known = Known { revision: revision.get(), snapshot: self.snapshot };
                self.keys.insert(key.clone(), known);
                Event::update(Entry::new(key, value.clone(), revision), skipped)
            }
            Action::Delete { reason } => {
                self.keys.remove(&key);
                let reason = match reason {
                    Reason::Deleted => GoneReason::Deleted,
                    Reason::Expired => GoneReason::Expired,
                };
                Event::gone(key, revision, reason, skipped)
            }
        }
    }

    fn revision(&self, revision: nkv_core::Revision) -> Revision {
        Revision::in_epoch(self.epoch, revision.get())
    }
}
