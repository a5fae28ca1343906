//! How a store reaches one subscriber.

use std::fmt;
use std::sync::Arc;

use crate::event::Event;
use crate::mailbox::Backlog;

/// Reaches one subscriber.
///
/// # Contract
///
/// - *At once*: `notify` returns without waiting for the subscriber. Callers hold locks; a notifier must not call
///   back into the store.
/// - *In order*: events are given in the order of their [sequence numbers](Event::sequence), in which revisions never fall,
///   and must be delivered in that order. Several keys may have one revision: it does not identify an event. What cannot
///   be delivered yet may be conflated: a newer change of a key may take the place of an older change of the *same*
///   key, never of another.
/// - *Latest, always*: when events stop, a live subscriber has received the last change of each key, or a snapshot that
///   contains it.
/// - *Whole*: a [`Began`](crate::EventKind::Began) and an [`Ended`](crate::EventKind::Ended) are delivered, never conflated
///   away, and keep their place in the order. Behind a `Began` that has a snapshot, the notifier reads all parts of it with
///   its [reader](crate::SnapshotReader), and delivers them before anything later.
/// - *Honest*: after the subscriber is gone, `notify` says [`Delivery::Closed`], and the store forgets it.
///
/// Where a store drops a notifier or calls the waker of a mailbox, it holds no lock and keeps no write waiting: a `Drop`
/// or a waker may read and write the store, subscribe and unsubscribe.
///
/// `nkv_testkit::notifier` checks each line. [`Mailbox`](crate::mailbox::Mailbox) does all of it; most notifiers are
/// a mailbox and something that empties it.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot notify a subscriber",
    label = "this type does not implement `Notifier`",
    note = "implement `nkv_core::Notifier` (one method); examples/custom_notifier.rs shows how",
    note = "or use `nkv_core::mailbox::mailbox()`, which conflates and can be read from threads and tasks"
)]
pub trait Notifier: fmt::Debug + Send + Sync + 'static {
    /// Takes an event for the subscriber and says what became of it.
    fn notify(&self, event: &Arc<Event>) -> Delivery;

    /// Takes an event from a mailbox in front of this notifier, where `skipped` changes of its key, since the last one, were
    /// conflated into it: see [`Item::Event`](crate::mailbox::Item::Event). A notifier that counts them reports the count.
    fn notify_conflated(&self, event: &Arc<Event>, skipped: u64) -> Delivery {
        let _ = skipped;
        self.notify(event)
    }

    /// The backlog of the subscriber, for people to look at; empty, if it is not known.
    fn backlog(&self) -> Backlog {
        Backlog::default()
    }
}

/// What became of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Delivery {
    /// It will be delivered, was delivered before, or is in a snapshot that is still to be read.
    Queued,
    /// It, or an older change, is not delivered by itself: a newer change of the key or a fresh snapshot stands for it, or
    /// the key came and went unread.
    Conflated,
    /// The subscriber is gone.
    Closed,
}

#[deny(clippy::missing_trait_methods)]
impl<N: Notifier + ?Sized> Notifier for Box<N> {
    fn notify(&self, event: &Arc<Event>) -> Delivery {
        (**self).notify(event)
    }

    fn notify_conflated(&self, event: &Arc<Event>, skipped: u64) -> Delivery {
        (**self).notify_conflated(event, skipped)
    }

    fn backlog(&self) -> Backlog {
        (**self).backlog()
    }
}

#[deny(clippy::missing_trait_methods)]
impl<N: Notifier + ?Sized> Notifier for Arc<N> {
    fn notify(&self, event: &Arc<Event>) -> Delivery {
        (**self).notify(event)
    }

    fn notify_conflated(&self, event: &Arc<Event>, skipped: u64) -> Delivery {
        (**self).notify_conflated(event, skipped)
    }

    fn backlog(&self) -> Backlog {
        (**self).backlog()
    }
}
