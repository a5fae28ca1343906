//! A watch: a subscription that can be resumed, as messages. It is read when the peer has room for more: until then changes are
//! conflated in its mailbox.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures_core::Stream;
use nkv_node::{Cursor, EndReason, GoneReason, Handle, Seen, SharedWaker, Tail, TailEvent, TailOptions};
use tonic::Status;

use crate::line::{Line, Observed};
use crate::node_kv::millis;
use crate::v1::watch_response::Event;
use crate::v1::{Began, Delete, DeleteReason, Put, Reset, Synced, WatchRequest, WatchResponse};

/// The longest name of a connection, in bytes.
const NAME_LEN_MAX: usize = 256;

/// The stream of one watch. Dropping it ends the subscription.
#[derive(Debug)]
pub(crate) struct Watch {
    /// The first message.
    began: Option<WatchResponse>,
    tail: Tail,
    has_ended: bool,
    /// Wakes this task with all others that a batch notifies.
    waker: SharedWaker,
    handle: Handle,
    /// After the tail: what ends the watch comes before what counts its backlog.
    _observed: Observed,
}

impl Watch {
    pub(crate) async fn begin(line: &Arc<Line>, request: WatchRequest) -> Result<Self, Status> {
        let WatchRequest { patterns, exact, changes_only, after, name } = request;
        let patterns_max = line.handle.limits().subscriptions_max;
        if patterns.len() > patterns_max {
            let message = format!("{} patterns, and {patterns_max} is the limit", patterns.len());
            return Err(Status::resource_exhausted(message));
        }
        let mut options = TailOptions::default().with_exact(exact).with_snapshot(!changes_only).with_peer(&line.peer);
        if let Some(after) = &after {
            let mut cursor: Cursor = after.parse().map_err(|error| line.status(&error))?;
            if line.handle.follows_engine() {
                // It may come from another node of the engine.
                let seen = Seen { epoch: cursor.epoch, revision: cursor.revision };
                if !line.handle.catch_up(seen).await.map_err(|error| line.status(&error))? {
                    cursor.revision = nkv_core::Revision::new(u64::MAX);
                }
            }
            options = options.with_after(cursor);
        }
        if let Some(name) = &name {
            if name.len() > NAME_LEN_MAX || name.chars().any(char::is_control) {
                let message = format!("'name' has at most {NAME_LEN_MAX} bytes, and no control characters");
                return Err(Status::invalid_argument(message));
            }
            line.peer.says(|said| said.name = Some(name.as_str().into()));
        }
        let tail = line.handle.tail(&patterns, options).map_err(|error| line.status(&error))?;
        let observed = line.sending.observe(tail.observer());
        let start = tail.start();
        // One that is cut off inside the snapshot comes back as one that knows nothing.
        let cursor = if after.is_none() && !changes_only { start.to_string() } else { String::new() };
        let event = Some(Event::Began(Began { epoch: start.epoch.to_string() }));
        let began = Some(WatchResponse { event, cursor });
        Ok(Watch {
            began,
            tail,
            has_ended: false,
            waker: SharedWaker::default(),
            handle: line.handle.clone(),
            _observed: observed,
        })
    }
}

impl Stream for Watch {
    type Item = Result<WatchResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if let Some(began) = this.began.take() {
            return Poll::Ready(Some(Ok(began)));
        }
        if this.has_ended {
            return Poll::Ready(None);
        }
        // A peer with a large window would otherwise keep others from having their turn.
        let turn = ready!(tokio::task::coop::poll_proceed(cx));
        let waker = this.handle.waker(&mut this.waker, cx.waker());
        let next = loop {
            match this.tail.poll_next(&mut Context::from_waker(waker)) {
                Poll::Pending => break Poll::Pending,
                Poll::Ready(None) => break Poll::Ready(Err(ended(&EndReason::Closed))),
                Poll::Ready(Some((event, cursor))) => match sent(event, cursor) {
                    Ok(None) => {}
                    Ok(Some(message)) => break Poll::Ready(Ok(message)),
                    Err(status) => break Poll::Ready(Err(status)),
                },
            }
        };
        let next = ready!(next);
        turn.made_progress();
        this.has_ended = next.is_err();
        Poll::Ready(Some(next))
    }
}

/// An event as a message; how the watch ends is an error.
fn sent(event: TailEvent, cursor: Option<Cursor>) -> Result<Option<WatchResponse>, Status> {
    let event = match event {
        TailEvent::Put { entry, ttl, skipped, .. } => {
            let (key, revision) = (entry.key.as_str().to_owned(), entry.revision.get());
            Event::Put(Put { key, value: entry.value, revision, skipped, ttl_ms: ttl.map(millis) })
        }
        TailEvent::Delete { key, revision, reason, skipped, .. } => {
            let reason = match reason {
                GoneReason::Deleted => DeleteReason::Deleted,
                GoneReason::Expired => DeleteReason::Expired,
                GoneReason::Missed => DeleteReason::Missed,
                _ => DeleteReason::Unspecified,
            };
            let (key, revision) = (key.as_str().to_owned(), revision.get());
            Event::Delete(Delete { key, revision, reason: reason.into(), skipped })
        }
        TailEvent::Synced { revision, .. } => {
            let epoch = cursor.map_or_else(String::new, |cursor| cursor.epoch.to_string());
            Event::Synced(Synced { revision: revision.get(), epoch })
        }
        TailEvent::Reset => {
            let epoch = cursor.map_or_else(String::new, |cursor| cursor.epoch.to_string());
            Event::Reset(Reset { epoch })
        }
        TailEvent::Ended(reason) => return Err(ended(&reason)),
        _ => return Ok(None),
    };
    let cursor = cursor.map_or_else(String::new, |cursor| cursor.to_string());
    Ok(Some(WatchResponse { event: Some(event), cursor }))
}

fn ended(reason: &EndReason) -> Status {
    match reason {
        EndReason::Unsubscribed => Status::aborted("the subscription was ended by another client"),
        EndReason::Replaced => Status::aborted("the subscription was replaced by another client"),
        EndReason::Refused { message, .. } => Status::aborted(message),
        EndReason::TooMuch { len_max } => {
            Status::resource_exhausted(format!("the watch would have held more than {len_max} bytes"))
        }
        EndReason::Closed => Status::unavailable("the node has stopped"),
        _ => Status::aborted("the subscription has ended"),
    }
}
