//! The reader's side of a subscription.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_core::Stream;
use nkv_core::Pattern;
use nkv_types::Event;

use crate::queue::Queue;
use crate::watcher::EndOnDrop;

/// A stream of what happens to the keys that a pattern, or several, cover.
///
/// First an [`Event::Update`] for each present key, then [`Event::Synced`], then changes as they happen. When the
/// connection is lost, [`Event::Reconnecting`]; once it is there again, [`Event::Connected`], then what was missed as if
/// it had just happened (of a key that has gone, [`GoneReason::Missed`](crate::GoneReason)), then [`Event::Synced`].
///
/// For one key, revisions only grow within an epoch, and nothing comes twice. What is of a new epoch comes behind the
/// [`Event::Connected`] that names it. A reader that falls behind gets the
/// newest state of each key and how many changes were skipped. What waits for it is bounded by the keys covered now, the keys
/// that it was given and that have gone, and 4,096 more: past that, the backlog is dropped, and it gets what has changed in the
/// present state, as after a lost connection, then another [`Event::Synced`]. Events of the connection and of being synced are conflated in the same way.
///
/// Of several patterns, those that another one includes are left out. `Synced` comes once all have had their snapshot; if one of
/// them ends, the subscription does.
///
/// Dropping it unsubscribes.
pub struct Subscription {
    queue: Arc<Queue>,
    /// The local subscriptions that feed the queue.
    parts: Vec<EndOnDrop>,
}

impl Subscription {
    pub(crate) fn new(parts: Vec<EndOnDrop>) -> Self {
        Subscription { queue: Arc::new(Queue::of_parts(parts.len())), parts }
    }

    pub(crate) fn parts(&self) -> &[EndOnDrop] {
        &self.parts
    }

    pub(crate) fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }

    /// What it covers: the patterns that were asked for, without those that another one includes.
    pub fn patterns(&self) -> impl Iterator<Item = &Pattern> {
        self.parts.iter().map(|part| &part.pattern)
    }

    /// The next event; `None` after [`Event::Ended`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Event> {
        poll_fn(|cx| self.queue.poll_take(cx)).await
    }
}

impl Stream for Subscription {
    type Item = Event;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        self.queue.poll_take(cx)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.queue.len(), None)
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let patterns: Vec<_> = self.patterns().collect();
        f.debug_struct("Subscription").field("patterns", &patterns).field("queued", &self.queue.len()).finish()
    }
}
