//! What connections and handles share: the store, the way to its writer, and figures.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use nkv_core::mailbox::{Backlog, Mailbox};
use nkv_core::{
    Delivery, EndReason, Event, EventKind, Key, Notifier, NotifyKeyValue, Op, Outcome, PersistError, PersistValue,
    SubscriberId,
};
use nkv_notify_tcp::TcpNotifier;
use nkv_protocol::{Chunks, hello};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::bell::Bell;
use crate::budget::Budget;
use crate::clock::Clock;
use crate::complaints::Complaints;
use crate::server::Options;
use crate::slots::Slots;
use crate::writer::Queue;

pub(crate) type Store = NotifyKeyValue<Box<dyn PersistValue>, Subscriber>;

#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) store: Arc<Store>,
    pub(crate) clock: Clock,
    /// As people write it, for `Stats`.
    pub(crate) durability: String,
    pub(crate) options: Options,
    pub(crate) slots: Slots,
    pub(crate) budget: Arc<Budget>,
    pub(crate) complaints: Complaints,
    pub(crate) bell: Arc<Bell>,
    pub(crate) queue: Arc<Queue>,
    /// Bytes of values that may still be handed to the writer.
    write_room: Arc<Semaphore>,
}

/// Writes to be done, and where to say what became of them.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) ops: Vec<Op>,
    /// Whether the operations are stored together or not at all.
    pub(crate) atomic: bool,
    pub(crate) results: oneshot::Sender<Vec<WriteResult>>,
    /// Its share of what may be handed to the writer, given back when it is done.
    _room: OwnedSemaphorePermit,
}

/// Bytes of values that wait to be stored, on all connections; whoever brings more waits with them.
const WRITE_ROOM: usize = 64 << 20;

/// A job counts as so many bytes at least, so that 1,024 of them wait at most.
const JOB_LEN_MIN: usize = WRITE_ROOM / 1_024;

/// What became of one operation.
pub(crate) type WriteResult = Result<Outcome, Arc<PersistError>>;

/// The server is stopping and takes no more writes.
#[derive(Debug)]
pub(crate) struct Stopping;

impl Core {
    pub(crate) fn new(
        store: Arc<Store>,
        clock: Clock,
        durability: String,
        options: Options,
        budget: Arc<Budget>,
        bell: Arc<Bell>,
        queue: Arc<Queue>,
    ) -> Self {
        Core {
            store,
            clock,
            durability,
            options,
            slots: Slots::new(options.connections_max, options.connections_per_address_max),
            budget,
            complaints: Complaints::default(),
            bell,
            queue,
            write_room: Arc::new(Semaphore::new(WRITE_ROOM)),
        }
    }

    /// Has the writer do `ops`, with whatever else waits; one result for each. Those of a connection wait until the turn
    /// of the runtime has ended. Whoever calls from elsewhere cannot count on its turning: theirs are `urgent`.
    pub(crate) fn write(&self, ops: Vec<Op>, atomic: bool, urgent: bool) -> Written {
        // What is more than there is room for goes alone.
        let bytes = ops.iter().map(value_len).sum::<usize>().clamp(JOB_LEN_MIN, WRITE_ROOM) as u32;
        let (bell, queue) = (Arc::clone(&self.bell), Arc::clone(&self.queue));
        match Arc::clone(&self.write_room).try_acquire_many_owned(bytes) {
            Ok(room) => {
                Written(hand_over(&bell, &queue, ops, atomic, urgent, room).map_or(Write::Refused, Write::Queued))
            }
            Err(_) => {
                let room = Arc::clone(&self.write_room).acquire_many_owned(bytes);
                Written(Write::Waiting(Box::pin(async move {
                    let room = room.await.map_err(|_| Stopping)?;
                    hand_over(&bell, &queue, ops, atomic, urgent, room)?.await.map_err(|_| Stopping)
                })))
            }
        }
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
}

/// Gives the writer a job. If it sleeps, and the job is not urgent, the pump wakes it, once all who have something for it
/// now have said so.
fn hand_over(
    bell: &Bell,
    queue: &Queue,
    ops: Vec<Op>,
    atomic: bool,
    urgent: bool,
    room: OwnedSemaphorePermit,
) -> Result<oneshot::Receiver<Vec<WriteResult>>, Stopping> {
    let (results, done) = oneshot::channel();
    let is_asleep = queue.push(Job { ops, atomic, results, _room: room }, urgent).map_err(|_| Stopping)?;
    if is_asleep && urgent {
        queue.wake();
    } else if is_asleep {
        bell.ring();
    }
    Ok(done)
}

/// What becomes of some writes: a future. Dropping it leaves them as they are, done or not.
#[must_use]
pub(crate) struct Written(Write);

enum Write {
    Queued(oneshot::Receiver<Vec<WriteResult>>),
    /// There is no room for them yet.
    Waiting(Pin<Box<dyn Future<Output = Result<Vec<WriteResult>, Stopping>> + Send>>),
    Refused,
}

impl Future for Written {
    type Output = Result<Vec<WriteResult>, Stopping>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Poll::Ready(match &mut self.0 {
            Write::Queued(done) => ready!(Pin::new(done).poll(cx)).map_err(|_| Stopping),
            Write::Waiting(done) => ready!(done.as_mut().poll(cx)),
            Write::Refused => Err(Stopping),
        })
    }
}

pub(crate) fn value_len(op: &Op) -> usize {
    match op {
        Op::Put { value, .. } => value.len(),
        Op::Delete { .. } | Op::Expire { .. } => 0,
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
    /// Whether another subscription of the same connection takes this one's place, and is to be answered.
    hello_when_replaced: AtomicBool,
}

#[derive(Debug)]
enum Reach {
    Connection(TcpNotifier),
    Handle(Mailbox),
}

impl From<TcpNotifier> for Subscriber {
    fn from(notifier: TcpNotifier) -> Self {
        Subscriber::new(Reach::Connection(notifier))
    }
}

impl From<Mailbox> for Subscriber {
    fn from(mailbox: Mailbox) -> Self {
        Subscriber::new(Reach::Handle(mailbox))
    }
}

impl Subscriber {
    fn new(reach: Reach) -> Self {
        Subscriber { since: Instant::now(), reach, hello_when_replaced: AtomicBool::new(false) }
    }

    /// Has the connection told `Hello` right behind the end of this subscription, before anything of the next.
    pub(crate) fn hello_when_replaced(&self) -> bool {
        self.hello_when_replaced.store(true, Relaxed);
        true
    }

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
            Reach::Connection(notifier) => {
                let delivery = notifier.notify(event);
                let replaced = matches!(event.kind(), EventKind::Ended { reason: EndReason::Replaced, .. });
                if replaced && self.hello_when_replaced.load(Relaxed) {
                    let mut out = Chunks::default();
                    hello(&mut out);
                    notifier.send(&mut out);
                }
                delivery
            }
            Reach::Handle(mailbox) => mailbox.notify(event),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nkv_core::{NoPersist, Pattern};
    use tokio::sync::watch;
    use tokio::time::timeout;

    use super::*;
    use crate::writer::Writer;

    #[tokio::test]
    async fn what_comes_while_the_writer_is_busy_is_done_when_it_is_not() {
        let persist: Box<dyn PersistValue> = Box::new(NoPersist::default());
        let store = Arc::new(NotifyKeyValue::open(persist, 0).unwrap());
        let (bell, queue, expiry_changed) = <(Arc<Bell>, Arc<Queue>, _)>::default();
        let room = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let ops = vec![Op::Delete { pattern: Pattern::All, if_revision: None }];
        let done = hand_over(&bell, &queue, ops, false, false, room).unwrap();
        // It could not be more busy than before it begins.
        let (failure, budget, clock) = (watch::Sender::new(None), Budget::new(1), Clock::start(None));
        let writer = Writer {
            store,
            queue: Arc::clone(&queue),
            bell: Arc::clone(&bell),
            expiry_changed,
            failure,
            budget,
            clock,
        };
        let writer = writer.spawn().unwrap();
        tokio::select! {
            () = bell.pump(|| queue.wake()) => {}
            done = timeout(Duration::from_secs(10), done) => assert_eq!(done.unwrap().unwrap().len(), 1),
        }
        queue.close();
        writer.join().unwrap();
    }
}
