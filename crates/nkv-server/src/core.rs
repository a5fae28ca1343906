//! What connections and handles share: the store, the way to its writer, and figures.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use nkv_core::mailbox::{Backlog, Mailbox};
use nkv_core::{Delivery, Event, Key, Notifier, NotifyKeyValue, Op, Outcome, PersistError, PersistValue, SubscriberId};
use nkv_notify_tcp::TcpNotifier;
use tokio::sync::{mpsc, oneshot};

use crate::clock::Clock;

pub(crate) type Store = NotifyKeyValue<Box<dyn PersistValue>, Subscriber>;

#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) store: Arc<Store>,
    pub(crate) clock: Clock,
    /// As people write it, for `Stats`.
    pub(crate) durability: String,
    pub(crate) connections: AtomicUsize,
    writer: Mutex<Option<mpsc::Sender<Job>>>,
}

/// Writes to be done, and where to say what became of them.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) ops: Vec<Op>,
    /// Whether the operations are stored together or not at all.
    pub(crate) atomic: bool,
    pub(crate) results: oneshot::Sender<Vec<WriteResult>>,
}

/// What became of one operation.
pub(crate) type WriteResult = Result<Outcome, Arc<PersistError>>;

/// The server is stopping and takes no more writes.
#[derive(Debug)]
pub(crate) struct Stopping;

impl Core {
    pub(crate) fn new(store: Arc<Store>, clock: Clock, durability: String, writer: mpsc::Sender<Job>) -> Self {
        Core { store, clock, durability, connections: AtomicUsize::new(0), writer: Mutex::new(Some(writer)) }
    }

    /// Has the writer do `ops`, with whatever else waits; one result for each.
    pub(crate) async fn write(&self, ops: Vec<Op>, atomic: bool) -> Result<Vec<WriteResult>, Stopping> {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (results, done) = oneshot::channel();
        writer.ok_or(Stopping)?.send(Job { ops, atomic, results }).await.map_err(|_| Stopping)?;
        done.await.map_err(|_| Stopping)
    }

    /// No more writes: the writer ends after those it has.
    pub(crate) fn stop_writes(&self) {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Who would be told of a change of `key`.
    pub(crate) fn trace(&self, key: &Key) -> Vec<Traced> {
        let subscriptions = self.store.subscribers_of(key);
        let traced = |subscription: Arc<nkv_core::Subscription<Subscriber>>| Traced {
            id: subscription.id().clone(),
            pattern: subscription.pattern().to_string(),
            since_ms: crate::clock::millis(subscription.notifier().since.elapsed()),
            backlog: subscription.notifier().backlog(),
        };
        subscriptions.into_iter().map(traced).collect()
    }

    pub(crate) fn connection_count(&self) -> usize {
        self.connections.load(Relaxed)
    }
}

/// A subscriber as `Trace` shows it.
#[derive(Debug)]
pub(crate) struct Traced {
    pub(crate) id: SubscriberId,
    pub(crate) pattern: String,
    pub(crate) since_ms: u64,
    pub(crate) backlog: Backlog,
}

/// How a subscriber of a server is reached.
#[derive(Debug)]
pub(crate) struct Subscriber {
    since: Instant,
    reach: Reach,
}

#[derive(Debug)]
enum Reach {
    Connection(TcpNotifier),
    Handle(Mailbox),
}

impl From<TcpNotifier> for Subscriber {
    fn from(notifier: TcpNotifier) -> Self {
        Subscriber { since: Instant::now(), reach: Reach::Connection(notifier) }
    }
}

impl From<Mailbox> for Subscriber {
    fn from(mailbox: Mailbox) -> Self {
        Subscriber { since: Instant::now(), reach: Reach::Handle(mailbox) }
    }
}

impl Subscriber {
    fn backlog(&self) -> Backlog {
        match &self.reach {
            Reach::Connection(notifier) => notifier.backlog(),
            Reach::Handle(mailbox) => mailbox.backlog(),
        }
    }
}

impl Notifier for Subscriber {
    fn notify(&self, event: &Arc<Event>) -> Delivery {
        match &self.reach {
            Reach::Connection(notifier) => notifier.notify(event),
            Reach::Handle(mailbox) => mailbox.notify(event),
        }
    }
}
