//! Subscriptions that can be resumed: each event says up to where its reader then knows the state, and a reader that comes back
//! with that is given what it missed and nothing else.

use std::collections::VecDeque;
use std::collections::hash_map::DefaultHasher;
use std::fmt;
use std::future::poll_fn;
use std::hash::{Hash, Hasher};
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use nkv_core::mailbox::{Inbox, Item, Observer, mailbox};
use nkv_core::{
    Action, BeginCause, Change, Epoch, EventKind, Expiry, Key, Pattern, Reason, Revision as Number, Snapshot,
};
use nkv_types::{EndReason, Entry, Error, ErrorKind, GoneReason, Result, Revision};

use crate::deletes::Next;
use crate::shared::Shared;
use crate::subscription::{AttachOptions, Attached};

/// How many deletes are looked at in one turn.
const TURN_DELETES: usize = 256;

/// Up to where a reader of a [`Tail`] knows the state of what it selected. Its text is `EPOCH-REVISION-SELECTION`; one
/// without a selection is taken to be of the same as the one that it resumes.
///
/// # Examples
///
/// ```
/// use nkv_node::Cursor;
///
/// let cursor: Cursor = "000000000000000000000000000000ab-17".parse()?;
/// assert_eq!(cursor.revision.get(), 17);
/// assert!("17".parse::<Cursor>().is_err());
/// # Ok::<(), nkv_node::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Cursor {
    /// The life of the data within which the revision says something.
    pub epoch: Epoch,
    /// Every change up to this one is known.
    pub revision: Number,
    /// Of which patterns: a number made of them.
    pub selection: Option<u32>,
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cursor { epoch, revision, selection } = self;
        write!(f, "{epoch}-{revision}")?;
        selection.map_or(Ok(()), |selection| write!(f, "-{selection:08x}"))
    }
}

impl FromStr for Cursor {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split('-');
        let epoch = parts.next().and_then(|epoch| epoch.parse().ok());
        let revision = parts.next().and_then(|revision| revision.parse().ok()).map(Number::new);
        let selection = parts.next().map(|selection| u32::from_str_radix(selection, 16));
        let cursor = match (epoch, revision, selection.transpose()) {
            (Some(epoch), Some(revision), Ok(selection)) => Some(Cursor { epoch, revision, selection }),
            _ => None,
        };
        // One way to write each: no signs, no zeros in front, nothing behind.
        cursor.filter(|cursor| cursor.to_string() == text).ok_or_else(|| {
            Error::new(ErrorKind::InvalidKey, "a cursor is EPOCH-REVISION or EPOCH-REVISION-SELECTION, as it was given")
        })
    }
}

/// How a [`Tail`] is to be.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct TailOptions<'a> {
    /// Up to where its reader knows the state already: what is not newer is not given. Without it, see `snapshot`.
    pub after: Option<Cursor>,
    /// Whether a reader that knows nothing is given the present state first. It is, if not said.
    pub snapshot: bool,
    /// Whether a key stands for itself alone, and not for all below it too. Not, if not said.
    pub exact: bool,
    /// The peer of a door whose subscription it is.
    pub peer: Option<&'a super::Peer>,
}

impl Default for TailOptions<'_> {
    fn default() -> Self {
        TailOptions { after: None, snapshot: true, exact: false, peer: None }
    }
}

impl<'a> TailOptions<'a> {
    /// Sets up to where its reader knows the state.
    #[must_use]
    pub fn with_after(self, after: Cursor) -> Self {
        TailOptions { after: Some(after), ..self }
    }

    /// Sets whether a reader that knows nothing is given the present state first.
    #[must_use]
    pub fn with_snapshot(self, snapshot: bool) -> Self {
        TailOptions { snapshot, ..self }
    }

    /// Sets whether a key stands for itself alone.
    #[must_use]
    pub fn with_exact(self, exact: bool) -> Self {
        TailOptions { exact, ..self }
    }

    /// Sets the peer whose subscription it is.
    #[must_use]
    pub fn with_peer(self, peer: &'a super::Peer) -> Self {
        TailOptions { peer: Some(peer), ..self }
    }
}

/// What a [`Tail`] gives.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TailEvent {
    /// A key has a new value, or had it when this began.
    #[non_exhaustive]
    Put {
        /// The key, its value and revision.
        entry: Entry,
        /// How long the value lives yet, if it ends by itself.
        ttl: Option<Duration>,
        /// How many changes of the key, since the last one given, were passed over in favour of this one.
        skipped: u64,
    },
    /// A key is gone.
    #[non_exhaustive]
    Delete {
        /// The key.
        key: Key,
        /// The revision of its end.
        revision: Revision,
        /// Why. [`GoneReason::Missed`]: it was deleted while its reader was away, which may not have known it.
        reason: GoneReason,
        /// As in [`TailEvent::Put`].
        skipped: u64,
    },
    /// The present state was given, or what was missed: what follows are changes as they come.
    #[non_exhaustive]
    Synced {
        /// Every change up to this revision was given.
        revision: Revision,
    },
    /// What is known so far says nothing any more: the whole present state follows, and a key that is not in it is gone. Its
    /// cursor is that of a reader that knows nothing.
    Reset,
    /// Nothing follows.
    Ended(EndReason),
}

/// A subscription that can be resumed. Made by [`Handle::tail`](crate::Handle::tail).
///
/// It keeps nothing for the keys that it gave: the backlog of its reader is bounded as for any subscriber.
#[derive(Debug)]
pub struct Tail {
    shared: Arc<Shared>,
    patterns: Vec<Pattern>,
    selection: u32,
    inbox: Inbox,
    observer: Arc<Observer>,
    ready: VecDeque<(TailEvent, Option<Cursor>)>,
    epoch: Epoch,
    phase: Phase,
    /// How far the snapshot of each pattern is read.
    read: Vec<Read>,
    /// Every change up to this revision was given, once all are read.
    base: Number,
    /// The newest revision at which one of several subscriptions began.
    newest: Number,
    _attached: Attached,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Read {
    #[default]
    Nothing,
    Part,
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Snapshots are not read whole; what is not newer than `since` is known.
    Snapshots {
        since: Option<Number>,
    },
    /// The snapshots are read: deletes that were missed are looked for, those after `at` yet.
    Missed {
        since: Number,
        at: Number,
    },
    Live,
    Ended,
}

impl Tail {
    pub(crate) fn begin(shared: &Arc<Shared>, patterns: Vec<Pattern>, options: TailOptions<'_>) -> Result<Self> {
        let selection = selection(&patterns, options.exact);
        let (mut since, mut is_reset) = (None, false);
        let is_known = |after: &Cursor| {
            after.selection.is_none_or(|of| of == selection)
                && after.revision <= shared.store.stats().revision
                && shared.deletes.get().is_some_and(|deletes| deletes.reaches(shared, after.epoch, after.revision))
        };
        // What is to be notified from now on comes after the present revision: several subscriptions do not begin at once.
        let stats = shared.store.stats();
        let now = Cursor { epoch: stats.epoch, revision: stats.revision, selection: None };
        let after = options.after.or((!options.snapshot && patterns.len() > 1).then_some(now).filter(is_known));
        match after {
            Some(after) if is_known(&after) => {
                // Where nothing has changed, as usual, nothing is read.
                let tail = Tail::attach(shared, &patterns, selection, false, options.peer)?;
                if tail.epoch == after.epoch && (tail.base, tail.newest) == (after.revision, after.revision) {
                    return Ok(tail.synced());
                }
                since = Some(after.revision);
            }
            Some(_) => is_reset = true,
            None if !options.snapshot => {
                return Ok(Tail::attach(shared, &patterns, selection, false, options.peer)?.synced());
            }
            None => {}
        }
        let mut tail = Tail::attach(shared, &patterns, selection, true, options.peer)?;
        tail.observer.keep_ends(since.is_some());
        if since.is_some() && after.is_none_or(|after| after.epoch != tail.epoch) {
            // A new epoch began meanwhile.
            (since, is_reset) = (None, true);
        }
        tail.phase = Phase::Snapshots { since };
        if is_reset {
            tail.say_reset();
        }
        Ok(tail)
    }

    fn attach(
        shared: &Arc<Shared>,
        patterns: &[Pattern],
        selection: u32,
        snapshot: bool,
        peer: Option<&super::Peer>,
    ) -> Result<Self> {
        let (post, inbox) = mailbox();
        let observer = Arc::new(post.observer());
        let options = AttachOptions { snapshot, peer, ..AttachOptions::default() };
        let attached = Attached::begin(shared, patterns.to_vec(), Box::new(post), &options)?;
        let mut tail = Tail {
            shared: Arc::clone(shared),
            patterns: patterns.to_vec(),
            selection,
            inbox,
            observer,
            ready: VecDeque::new(),
            epoch: shared.store.epoch(),
            phase: Phase::Live,
            read: vec![Read::Nothing; patterns.len()],
            base: Number::new(u64::MAX),
            newest: Number::ZERO,
            _attached: attached,
        };
        if !snapshot {
            // That each began is there already; what comes next are changes.
            tail.read.fill(Read::All);
            for _ in patterns {
                let item = tail.inbox.try_take();
                let change = tail.take(item);
                tail.ready.extend(change);
            }
        }
        Ok(tail)
    }

    /// Nothing is to be read first.
    fn synced(mut self) -> Self {
        self.say_synced();
        self
    }

    fn say_synced(&mut self) {
        self.phase = Phase::Live;
        // Its reader knows no others than those that there are.
        self.observer.keep_ends(false);
        let revision = Revision::in_epoch(self.epoch, self.base.get());
        let cursor = self.cursor(self.base);
        self.ready.push_back((TailEvent::Synced { revision }, Some(cursor)));
    }

    fn say_reset(&mut self) {
        self.ready.push_back((TailEvent::Reset, Some(self.start())));
    }

    /// The cursor of a reader that knows nothing, or some of a state that was not given whole: resumed there, it is given all, and
    /// all that is gone.
    #[must_use]
    pub fn start(&self) -> Cursor {
        self.cursor(Number::ZERO)
    }

    fn cursor(&self, revision: Number) -> Cursor {
        Cursor { epoch: self.epoch, revision, selection: Some(self.selection) }
    }

    /// The next event, and up to where its reader then knows the state: `None` while the present state is being given, and
    /// where more of a revision follows. Nothing comes after [`TailEvent::Ended`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<(TailEvent, Option<Cursor>)> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// As [`next`](Self::next).
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<(TailEvent, Option<Cursor>)>> {
        loop {
            if let Some(next) = self.ready.pop_front() {
                return Poll::Ready(Some(next));
            }
            match self.phase {
                Phase::Ended => return Poll::Ready(None),
                Phase::Missed { since, at } => self.look_for_missed(since, at),
                Phase::Snapshots { .. } | Phase::Live => match self.inbox.poll_take(cx) {
                    Poll::Ready(item) => {
                        if let Some(change) = self.take(item) {
                            return Poll::Ready(Some(change));
                        }
                    }
                    Poll::Pending => return Poll::Pending,
                },
            }
            if self.ready.is_empty() && !matches!(self.phase, Phase::Live | Phase::Ended) {
                // Much was looked at, and nothing found: others have their turn.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
    }

    /// Up to where a reader that has taken all that there is knows the state; `None` while something waits for it.
    pub fn position(&mut self) -> Option<Cursor> {
        let (epoch, revision) = (self.shared.store.epoch(), self.shared.store.notified_up_to());
        if self.phase != Phase::Live || !self.ready.is_empty() {
            return None;
        }
        if let Some(item) = self.inbox.try_take() {
            let change = self.take(Some(item));
            self.ready.extend(change);
            return None;
        }
        (epoch == self.epoch && self.shared.store.epoch() == epoch && revision >= self.base)
            .then(|| self.cursor(revision))
    }

    /// Looks at the backlog, for a door's [`Holder`](crate::Holder).
    #[must_use]
    pub fn observer(&self) -> Arc<Observer> {
        Arc::clone(&self.observer)
    }

    /// Takes what comes next: a change is returned, to be given at once; anything else is made ready.
    fn take(&mut self, item: Option<Item>) -> Option<(TailEvent, Option<Cursor>)> {
        let (event, skipped) = match item {
            Some(Item::Event { event, skipped }) => (event, skipped),
            Some(Item::Own(never)) => match never {},
            None => {
                self.end(EndReason::Closed);
                return None;
            }
        };
        match event.kind() {
            EventKind::Began(began) if began.cause == BeginCause::Reset => {
                let is_same = std::mem::replace(&mut self.epoch, began.epoch) == began.epoch;
                // One of which nothing is read yet is read anyway.
                if !is_same || self.read_of(&began.pattern).is_none_or(|read| *read != Read::Nothing) {
                    self.begin_anew();
                }
            }
            EventKind::Began(began) => {
                self.epoch = began.epoch;
                if !began.has_snapshot {
                    self.base = self.base.min(began.revision);
                    self.newest = self.newest.max(began.revision);
                }
            }
            EventKind::Snapshot(snapshot) => self.read(snapshot),
            EventKind::Change(change) => {
                let is_point = self.phase == Phase::Live && event.ends_revision();
                let cursor = is_point.then(|| self.cursor(change.revision));
                return Some((self.changed(change, skipped), cursor));
            }
            EventKind::Ended { reason: nkv_core::EndReason::Unsubscribed, .. } => self.end(EndReason::Unsubscribed),
            EventKind::Ended { .. } => self.end(EndReason::Replaced),
            _ => {}
        }
        None
    }

    /// Too much waited, or the data began another epoch. All subscriptions begin anew, also those that need not: the reader
    /// forgets what it knows of them.
    fn begin_anew(&mut self) {
        self.say_reset();
        (self.phase, self.base) = (Phase::Snapshots { since: None }, Number::new(u64::MAX));
        let has_more = self.read.contains(&Read::All);
        self.read.fill(Read::Nothing);
        if has_more {
            self.observer.give_up();
        }
    }

    fn read_of(&mut self, pattern: &Pattern) -> Option<&mut Read> {
        self.patterns.iter().position(|known| known == pattern).and_then(|at| self.read.get_mut(at))
    }

    fn read(&mut self, part: &Snapshot) {
        let Phase::Snapshots { since } = self.phase else { return };
        if part.epoch != self.epoch {
            // That another epoch began is still to come.
            return;
        }
        for record in part.records.iter() {
            if since.is_none_or(|since| record.revision > since) {
                let revision = Revision::in_epoch(self.epoch, record.revision.get());
                let entry = Entry::new(record.key.to_key(), record.value.to_bytes(), revision);
                let ttl = self.ttl(record.expiry);
                self.ready.push_back((TailEvent::Put { entry, ttl, skipped: 0 }, None));
            }
        }
        if let Some(read) = self.read_of(&part.pattern) {
            *read = if part.is_last { Read::All } else { Read::Part };
        }
        if part.is_last {
            self.base = self.base.min(part.revision);
        }
        if self.read.iter().all(|read| *read == Read::All) {
            match since {
                Some(since) => self.phase = Phase::Missed { since, at: since },
                None => self.say_synced(),
            }
        }
    }

    /// A key that was deleted and is absent is gone for the reader, which may have known it. One that is there again was in a
    /// snapshot, or its put follows, or its [end](Observer::keep_ends).
    fn look_for_missed(&mut self, since: Number, at: Number) {
        let Some(deletes) = self.shared.deletes.get() else { return self.begin_anew() };
        let mut missed = Vec::new();
        let next = deletes.next(&self.shared, (self.epoch, since, at), TURN_DELETES, |key, revision| {
            if self.patterns.iter().any(|pattern| pattern.covers(key)) {
                missed.push((key.clone(), revision));
            }
        });
        for (key, revision) in missed {
            if self.shared.store.look_up(key.as_str(), |_| ()).is_none() {
                let revision = Revision::in_epoch(self.epoch, revision.get());
                let gone = TailEvent::Delete { key, revision, reason: GoneReason::Missed, skipped: 0 };
                self.ready.push_back((gone, None));
            }
        }
        match next {
            Next::UpTo(at) => self.phase = Phase::Missed { since, at },
            Next::NoMore => self.say_synced(),
            // The snapshots are read once more, for the keys that were left out.
            Next::Forgotten => self.begin_anew(),
        }
    }

    fn changed(&self, change: &Change, skipped: u64) -> TailEvent {
        let (key, revision) = (change.key.clone(), Revision::in_epoch(self.epoch, change.revision.get()));
        match &change.action {
            Action::Put { value, expiry } => {
                let entry = Entry::new(key, value.clone(), revision);
                TailEvent::Put { entry, ttl: self.ttl(*expiry), skipped }
            }
            Action::Delete { reason } => {
                let reason = match reason {
                    Reason::Deleted => GoneReason::Deleted,
                    Reason::Expired => GoneReason::Expired,
                };
                TailEvent::Delete { key, revision, reason, skipped }
            }
        }
    }

    fn ttl(&self, expiry: Option<Expiry>) -> Option<Duration> {
        expiry.map(|expiry| self.shared.clock.until(expiry.at))
    }

    fn end(&mut self, reason: EndReason) {
        self.phase = Phase::Ended;
        self.ready.push_back((TailEvent::Ended(reason), None));
    }
}

/// A number that other patterns do not have, in all likelihood.
fn selection(patterns: &[Pattern], exact: bool) -> u32 {
    let mut texts: Vec<String> = patterns.iter().map(ToString::to_string).collect();
    texts.sort_unstable();
    let mut hasher = DefaultHasher::new();
    (texts, exact).hash(&mut hasher);
    (hasher.finish() >> 32) as u32
}
