//! A watch: a mailbox of the store, read as messages. It is read when the peer has room for more: until then changes are
//! conflated there.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use futures_core::Stream;
use nkv_core::mailbox::{Inbox, Item, mailbox_with_slack};
use nkv_core::{Action, Began, BeginCause, Change, Event, EventKind, Reason, Snapshot};
use nkv_node::{AttachOptions, Attached, Epoch, Handle, Pattern};
use tonic::Status;

use crate::line::{Counted, Kind, Line, Observed};
use crate::v1::watch_response::Event as Sent;
use crate::v1::{Began as SentBegan, Delete, DeleteReason, Put, Reset, ResetCause, Synced};
use crate::v1::{WatchRequest, WatchResponse};

/// The stream of one watch. Dropping it ends the subscription.
#[derive(Debug)]
pub(crate) struct Watch {
    inbox: Inbox,
    state: State,
    part: Option<Part>,
    has_ended: bool,
    /// This task's waker, and one that wakes it with all others that a batch notifies.
    wakers: Option<(Waker, Waker)>,
    handle: Handle,
    line: Arc<Line>,
    /// In this order: what ends the watch comes before what counts what waits.
    _attached: Attached,
    _observed: Observed,
}

/// A part of a snapshot that is being sent.
#[derive(Debug)]
struct Part {
    event: Arc<Event>,
    at: usize,
    _counted: Counted,
}

/// What the reader knows.
#[derive(Debug)]
struct State {
    epoch: Epoch,
    changes_only: bool,
    /// The patterns that have begun, with the epoch of each, and how many there are.
    begun: Vec<(Pattern, Epoch)>,
    patterns: usize,
    /// Patterns whose snapshot is not sent whole.
    unread: usize,
    /// A snapshot has begun and is not sent whole.
    is_reading: bool,
    /// The lowest revision of the snapshots that were sent since the last `synced`.
    synced: Option<u64>,
    /// The state was sent whole. Other patterns may be about to begin anew: that it is whole is said when none is.
    is_whole: bool,
    ready: std::collections::VecDeque<Sent>,
}

impl Watch {
    pub(crate) fn begin(line: &Arc<Line>, request: WatchRequest) -> Result<Self, Status> {
        let patterns_max = line.handle.limits().subscriptions_max;
        if request.patterns.len() > patterns_max {
            let message = format!("{} patterns, and {patterns_max} is the limit", request.patterns.len());
            return Err(Status::resource_exhausted(message));
        }
        let patterns = nkv_types::disjoint(&request.patterns, request.exact).map_err(|error| line.status(&error))?;
        let (post, inbox) = mailbox_with_slack(line.door.options.slack);
        let observed = line.sending.observe(post.observer());
        let options = AttachOptions::default().with_snapshot(!request.changes_only).with_exact(request.exact);
        let mut options = options.with_peer(&line.peer);
        if let Some(name) = &request.client_uuid {
            options = options.with_client_uuid(name.as_str());
        }
        let attached = line.handle.attach(&patterns, Box::new(post), &options);
        let attached = attached.map_err(|error| line.status(&error))?;
        let state = State::new(line.handle.epoch(), patterns.len(), request.changes_only);
        let (part, has_ended, wakers) = Default::default();
        let (handle, line) = (line.handle.clone(), Arc::clone(line));
        Ok(Watch { inbox, state, part, has_ended, wakers, handle, line, _attached: attached, _observed: observed })
    }

    /// The next message of the part that is being sent.
    fn next_of_part(&mut self) -> Option<Sent> {
        let part = self.part.as_mut()?;
        let EventKind::Snapshot(snapshot) = part.event.kind() else { return None };
        // One of an earlier epoch is not sent: that the next one begins is still to come, and all of it with that.
        let record = snapshot.records.get(part.at).filter(|_| snapshot.epoch == self.state.epoch);
        if let Some(record) = record {
            part.at = part.at.saturating_add(1);
            let (key, value) = (record.key.as_str().to_owned(), record.value.to_bytes());
            return Some(Sent::Put(Put { key, value, revision: record.revision.get(), skipped: 0 }));
        }
        self.state.end_part(snapshot);
        self.part = None;
        None
    }

    fn take(&mut self, item: Option<Item>) -> Option<Status> {
        let (event, skipped) = match item {
            Some(Item::Event { event, skipped }) => (event, skipped),
            Some(Item::Own(never)) => match never {},
            None => return Some(Status::unavailable("the node has stopped")),
        };
        match event.kind() {
            EventKind::Began(began) => self.state.begin(began),
            EventKind::Snapshot(snapshot) => {
                let counted = Counted::new(&self.line.sending, Kind::Event, snapshot.records.size());
                self.part = Some(Part { event: Arc::clone(&event), at: 0, _counted: counted });
            }
            EventKind::Change(change) => {
                self.state.sync();
                self.state.ready.push_back(sent(change, skipped));
            }
            EventKind::Ended { reason, pattern } => {
                let message = format!("the subscription to '{pattern}' was {}", reason.as_str());
                return Some(Status::aborted(message));
            }
            _ => {}
        }
        None
    }
}

impl Stream for Watch {
    type Item = Result<WatchResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if this.has_ended {
            return Poll::Ready(None);
        }
        // A peer with a large window would otherwise keep others from having their turn.
        let turn = ready!(tokio::task::coop::poll_proceed(cx));
        let known = this.wakers.take().filter(|(task, _)| task.will_wake(cx.waker()));
        let wakers = known.unwrap_or_else(|| (cx.waker().clone(), this.handle.waker(cx.waker())));
        let result = loop {
            if let Some(event) = this.state.ready.pop_front().or_else(|| this.next_of_part()) {
                break Poll::Ready(Some(Ok(WatchResponse { event: Some(event) })));
            }
            match this.inbox.poll_take(&mut Context::from_waker(&wakers.1)) {
                Poll::Pending if this.state.is_whole => this.state.sync(),
                Poll::Pending => break Poll::Pending,
                Poll::Ready(item) => {
                    if let Some(status) = this.take(item) {
                        this.has_ended = true;
                        break Poll::Ready(Some(Err(status)));
                    }
                }
            }
        };
        this.wakers = Some(wakers);
        if result.is_ready() {
            turn.made_progress();
        }
        result
    }
}

impl State {
    fn new(epoch: Epoch, patterns: usize, changes_only: bool) -> Self {
        let unread = if changes_only { 0 } else { patterns };
        let (begun, is_reading, synced, is_whole, ready) = Default::default();
        State { epoch, changes_only, begun, patterns, unread, is_reading, synced, is_whole, ready }
    }

    fn begin(&mut self, began: &Began) {
        if began.cause == BeginCause::Reset {
            return self.begin_anew(began);
        }
        if self.begun.is_empty() {
            self.epoch = began.epoch;
            let (revision, epoch) = (began.revision.get(), began.epoch.to_string());
            // The patterns begin one after another: every change after the revision of the first follows or is sent with the
            // present state.
            self.synced = self.changes_only.then_some(revision);
            self.ready.push_back(Sent::Began(SentBegan { revision, epoch }));
        }
        self.begun.push((began.pattern.clone(), began.epoch));
        if self.changes_only {
            self.is_whole = self.begun.len() == self.patterns;
        } else {
            self.is_reading = true;
        }
    }

    fn begin_anew(&mut self, began: &Began) {
        if std::mem::replace(&mut self.is_reading, true) {
            // An epoch began, and broke it off.
            self.unread = self.unread.saturating_sub(1);
        }
        self.unread = self.unread.saturating_add(1);
        self.is_whole = false;
        let known = self.begun.iter_mut().find(|(pattern, _)| *pattern == began.pattern);
        let before = known.map_or(self.epoch, |(_, epoch)| std::mem::replace(epoch, began.epoch));
        if began.epoch != self.epoch {
            self.epoch = began.epoch;
            self.synced = None;
        }
        let cause = if before == began.epoch { ResetCause::Backlog } else { ResetCause::Epoch };
        let (pattern, epoch) = (began.pattern.to_string(), began.epoch.to_string());
        self.ready.push_back(Sent::Reset(Reset { pattern, cause: cause.into(), epoch }));
    }

    /// A part of a snapshot was sent whole.
    fn end_part(&mut self, part: &Snapshot) {
        if !part.is_last {
            return;
        }
        self.is_reading = false;
        self.unread = self.unread.saturating_sub(1);
        if part.epoch != self.epoch {
            return;
        }
        let revision = part.revision.get();
        self.synced = Some(self.synced.map_or(revision, |known| known.min(revision)));
        self.is_whole = self.unread == 0 && self.begun.iter().all(|(_, epoch)| *epoch == self.epoch);
    }

    /// Says that the state is whole, if it is.
    fn sync(&mut self) {
        if !std::mem::take(&mut self.is_whole) {
            return;
        }
        let revision = self.synced.take().unwrap_or_default();
        self.ready.push_back(Sent::Synced(Synced { revision, epoch: self.epoch.to_string() }));
    }
}

fn sent(change: &Change, skipped: u64) -> Sent {
    let (key, revision) = (change.key.as_str().to_owned(), change.revision.get());
    match &change.action {
        Action::Put { value, .. } => Sent::Put(Put { key, value: value.clone(), revision, skipped }),
        Action::Delete { reason } => {
            let reason = match reason {
                Reason::Deleted => DeleteReason::Deleted,
                Reason::Expired => DeleteReason::Expired,
            };
            Sent::Delete(Delete { key, revision, reason: reason.into(), skipped })
        }
    }
}
