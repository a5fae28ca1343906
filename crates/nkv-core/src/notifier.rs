//! How a store reaches one subscriber.

use std::fmt;
use std::sync::Arc;

use crate::record::Event;

/// Reaches one subscriber.
///
/// # Contract
///
/// - *At once*: `notify` returns without waiting for the subscriber. Callers hold locks; a notifier must not call
///   back into the store.
/// - *In order*: events are given in the order of their revisions and must be told in that order. What cannot be
///   told yet may be conflated: a newer change of a key may take the place of an older change of the *same* key,
///   never of another.
/// - *Latest, always*: when events stop, a live subscriber is told the last change of each key.
/// - *Whole*: a [`Snapshot`](crate::EventKind::Snapshot) and an [`Ended`](crate::EventKind::Ended) are told, never
///   conflated away, and keep their place in the order.
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
}

/// What became of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Delivery {
    /// It will be told, or was told before.
    Queued,
    /// It will be told in place of an older change of the same key.
    Conflated,
    /// The subscriber is gone.
    Closed,
}

#[deny(clippy::missing_trait_methods)]
impl<N: Notifier + ?Sized> Notifier for Box<N> {
    fn notify(&self, event: &Arc<Event>) -> Delivery {
        (**self).notify(event)
    }
}

#[deny(clippy::missing_trait_methods)]
impl<N: Notifier + ?Sized> Notifier for Arc<N> {
    fn notify(&self, event: &Arc<Event>) -> Delivery {
        (**self).notify(event)
    }
}
