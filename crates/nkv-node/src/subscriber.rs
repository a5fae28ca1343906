//! How a node reaches a subscriber.

use std::sync::Arc;
use std::time::Instant;

use nkv_core::mailbox::Backlog;
use nkv_core::{Delivery, Event, EventKind, Notifier, NotifyKeyValue, PersistValue};

use crate::budget::{Account, DeepHold};
use crate::peer::Counted;

pub(crate) type Store = NotifyKeyValue<Box<dyn PersistValue>, Subscriber>;

/// How a subscriber of a node is reached.
#[derive(Debug)]
pub(crate) struct Subscriber {
    pub(crate) since: Instant,
    pub(crate) notifier: Box<dyn Notifier>,
    /// What its pattern takes.
    deep: DeepHold,
    /// Whose it is, if it is a peer's.
    pub(crate) peer: Option<Counted>,
}

impl Subscriber {
    pub(crate) fn new(notifier: Box<dyn Notifier>, deep: DeepHold, peer: Option<Counted>) -> Self {
        Subscriber { since: Instant::now(), notifier, deep, peer }
    }

    /// Whether it is this peer's.
    pub(crate) fn is_of(&self, account: &Arc<Account>) -> bool {
        self.peer.as_ref().is_some_and(|counted| Arc::ptr_eq(&counted.account, account))
    }
}

impl Notifier for Subscriber {
    fn notify(&self, event: &Arc<Event>) -> Delivery {
        if let EventKind::Ended { .. } = event.kind() {
            self.deep.release();
            self.peer.iter().for_each(|counted| counted.end());
        }
        self.notifier.notify(event)
    }

    fn backlog(&self) -> Backlog {
        self.notifier.backlog()
    }
}
