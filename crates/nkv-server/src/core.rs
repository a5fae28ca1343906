//! What connections and handles share: the store, the way to its writer, and figures.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use nkv_core::mailbox::{Backlog, Mailbox};
use nkv_core::{
    Delivery, Event, EventKind, Key, Notifier, NotifyKeyValue, Pattern, PersistValue, SubscriberId, Write, WriteResult,
};
use nkv_notify_tcp::TcpNotifier;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::bell::Bell;
use crate::budget::{Budget, DeepHold};
use crate::clients::{Client, Clients, Counted};
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
    pub(crate) clients: Arc<Clients>,
    pub(crate) budget: Arc<Budget>,
    pub(crate) complaints: Complaints,
    pub(crate) bell: Arc<Bell>,
    pub(crate) queue: Arc<Queue>,
    /// Bytes of values that may still be taken.
    write_room: Arc<Semaphore>,
    /// Bytes of long requests that may still be read.
    arrival_room: Arc<Semaphore>,
    arrival_len: usize,
}

/// Writes to be done, and where to say what became of them.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) write: Write,
    pub(crate) results: oneshot::Sender<Vec<WriteResult>>,
    /// Its share of what may wait to be stored, given back when it is done.
    _room: Room,
}

impl AsMut<Write> for Job {
    fn as_mut(&mut self) -> &mut Write {
        &mut self.write
    }
}

/// A share of the bytes of values that may wait to be stored: to be had before the value is.
pub(crate) type Room = OwnedSemaphorePermit;

/// Bytes of values that wait to be stored; those for which there is no room wait in the buffers of their connections.
const WRITE_ROOM: usize = 64 << 20;

/// Bytes of long requests that are on their way, at most, and as a part of what all connections may hold. Those for which
/// there is no room wait in their sockets.
const ARRIVAL_ROOM_MAX: usize = 64 << 20;
const ARRIVAL_ROOM_PART: usize = 4;

/// One that waits so long to send a long request has the slowest of those that send theirs closed, if that has taken longer.
const ARRIVAL_PATIENCE: Duration = Duration::from_secs(5);

/// The bytes that a job counts as at least, so that 1,024 of them wait at most.
pub(crate) const JOB_LEN_MIN: usize = WRITE_ROOM / 1_024;

/// The server is stopping and takes no more writes.
#[derive(Debug)]
pub(crate) struct Stopping;

#[cfg(test)]
impl Job {
    pub(crate) fn for_tests(ops: Vec<nkv_core::Op>) -> (Self, oneshot::Receiver<Vec<WriteResult>>) {
        let (results, done) = oneshot::channel();
        let room = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        (Job { write: Write::together(ops), results, _room: room }, done)
    }
}

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
        let line_len_max = options.limits().line_len_max();
        let arrival_len =
            (options.queued_max / ARRIVAL_ROOM_PART).clamp(line_len_max, ARRIVAL_ROOM_MAX.max(line_len_max));
        Core {
            store,
            clock,
            durability,
            options,
            clients: Arc::default(),
            slots: Slots::new(options.connections_max, options.connections_per_address_max),
            budget,
            complaints: Complaints::default(),
            bell,
            queue,
            write_room: Arc::new(Semaphore::new(WRITE_ROOM)),
            arrival_room: Arc::new(Semaphore::new(arrival_len)),
            arrival_len,
        }
    }

    /// Room for `len` bytes, if there is any now. What is more than there ever is counts as all of it.
    pub(crate) fn try_room(&self, len: usize) -> Option<Room> {
        Arc::clone(&self.write_room).try_acquire_many_owned(room_len(len)).ok()
    }

    /// Waits for room for `len` bytes; those that came first go first.
    pub(crate) fn room(&self, len: usize) -> impl Future<Output = Result<Room, Stopping>> + Send + use<> {
        let room = Arc::clone(&self.write_room).acquire_many_owned(room_len(len));
        async move { room.await.map_err(|_| Stopping) }
    }

    /// Room for a request of `len` bytes to be read, if there is any now.
    pub(crate) fn try_arrival(&self, len: usize) -> Option<Room> {
        Arc::clone(&self.arrival_room).try_acquire_many_owned(self.arrival_len(len)).ok()
    }

    /// Waits for room for a request of `len` bytes to be read.
    pub(crate) fn arrival(&self, len: usize) -> impl Future<Output = Result<Room, Stopping>> + Send + use<> {
        let (room, budget) = (Arc::clone(&self.arrival_room), Arc::clone(&self.budget));
        let room = room.acquire_many_owned(self.arrival_len(len));
        async move {
            let mut room = std::pin::pin!(room);
            loop {
                match tokio::time::timeout(ARRIVAL_PATIENCE, room.as_mut()).await {
                    Ok(room) => return room.map_err(|_| Stopping),
                    Err(_) => budget.evict_slowest(ARRIVAL_PATIENCE),
                }
            }
        }
    }

    /// What is more than there ever is counts as all of it.
    fn arrival_len(&self, len: usize) -> u32 {
        len.min(self.arrival_len) as u32
    }

    /// Whether long requests have to wait.
    pub(crate) fn is_short_of_room(&self) -> bool {
        self.arrival_room.available_permits() < JOB_LEN_MIN
    }

    /// Has the writer do `write`, with all others that wait. Those of a connection wait until the turn of the runtime has
    /// ended. A caller from elsewhere cannot count on its turning: theirs are `urgent`.
    pub(crate) fn write(&self, write: Write, room: Room, urgent: bool) -> Written {
        Written(hand_over(&self.bell, &self.queue, write, urgent, room).ok())
    }

    /// As [`write`](Self::write), once there is room.
    pub(crate) async fn write_urgently(&self, write: Write) -> Result<Vec<WriteResult>, Stopping> {
        let room = self.room(write.value_len().max(JOB_LEN_MIN)).await?;
        self.write(write, room, true).await
    }

    /// Who would be told of a change of `key`.
    pub(crate) fn trace(&self, key: &Key) -> Vec<Traced> {
        let subscriptions = self.store.subscribers_of(key);
        let traced = |subscription: Arc<nkv_core::Subscription<Subscriber>>| Traced {
            id: subscription.id().clone(),
            pattern: subscription.pattern().to_string(),
            is_exact: matches!(subscription.pattern(), Pattern::Exact(_)),
            since_ms: crate::clock::millis(subscription.notifier().since.elapsed()),
            client: subscription.notifier().held.as_ref().map(|(_, counted)| Arc::clone(&counted.client)),
            backlog: match &subscription.notifier().reach {
                Reach::Connection(notifier) => notifier.backlog(),
                Reach::Handle(mailbox) => mailbox.backlog(),
            },
        };
        subscriptions.into_iter().map(traced).collect()
    }
}

fn room_len(len: usize) -> u32 {
    len.min(WRITE_ROOM) as u32
}

/// Gives the writer a job. If it sleeps, and the job is not urgent, the pump wakes it, once all that have something for it
/// now have said so.
fn hand_over(
    bell: &Bell,
    queue: &Queue,
    write: Write,
    urgent: bool,
    room: Room,
) -> Result<oneshot::Receiver<Vec<WriteResult>>, Stopping> {
    let (results, done) = oneshot::channel();
    let is_asleep = queue.push(Job { write, results, _room: room }, urgent).map_err(|_| Stopping)?;
    if is_asleep && urgent {
        queue.wake();
    } else if is_asleep {
        bell.ring();
    }
    Ok(done)
}

/// What becomes of some writes: a future. Dropping it leaves them as they are, done or not.
#[must_use]
pub(crate) struct Written(Option<oneshot::Receiver<Vec<WriteResult>>>);

impl Future for Written {
    type Output = Result<Vec<WriteResult>, Stopping>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Some(done) => Pin::new(done).poll(cx).map_err(|_| Stopping),
            None => Poll::Ready(Err(Stopping)),
        }
    }
}

/// A subscriber as `Trace` shows it.
#[derive(Debug)]
pub(crate) struct Traced {
    pub(crate) id: SubscriberId,
    pub(crate) pattern: String,
    pub(crate) is_exact: bool,
    pub(crate) since_ms: u64,
    /// Whose it is, if it is a connection's.
    pub(crate) client: Option<Arc<Client>>,
    pub(crate) backlog: Backlog,
}

/// How a subscriber of a server is reached.
#[derive(Debug)]
pub(crate) struct Subscriber {
    since: Instant,
    reach: Reach,
    /// What its pattern takes, and its client, if it is a connection's.
    held: Option<(DeepHold, Counted)>,
}

/// A connection, or a mailbox of this process.
#[derive(Debug)]
enum Reach {
    Connection(TcpNotifier),
    Handle(Mailbox),
}

impl Subscriber {
    pub(crate) fn handle(mailbox: Mailbox) -> Self {
        Subscriber { since: Instant::now(), reach: Reach::Handle(mailbox), held: None }
    }

    /// A connection, what the subscription's pattern takes, and its client.
    pub(crate) fn connection(notifier: TcpNotifier, deep: DeepHold, counted: Counted) -> Self {
        Subscriber { since: Instant::now(), reach: Reach::Connection(notifier), held: Some((deep, counted)) }
    }
}

impl Notifier for Subscriber {
    fn notify(&self, event: &Arc<Event>) -> Delivery {
        if let (EventKind::Ended { .. }, Some((deep, counted))) = (event.kind(), &self.held) {
            deep.release();
            counted.end();
        }
        match &self.reach {
            Reach::Connection(notifier) => notifier.notify(event),
            Reach::Handle(mailbox) => mailbox.notify(event),
        }
    }
}

#[cfg(test)]
mod tests {
    use nkv_core::{NoPersist, Op};
    use tokio::time::timeout;

    use super::*;
    use crate::failure::Failure;
    use crate::writer::Writer;

    #[tokio::test]
    async fn what_comes_while_the_writer_is_busy_is_done_when_it_is_not() {
        let persist: Box<dyn PersistValue> = Box::new(NoPersist::default());
        let store = Arc::new(NotifyKeyValue::open(persist).unwrap());
        let (bell, queue, expiry_changed) = <(Arc<Bell>, Arc<Queue>, _)>::default();
        let room = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let ops = vec![Op::Delete { pattern: Pattern::All, if_revision: None }];
        let done = hand_over(&bell, &queue, Write::apart(ops), false, room).unwrap();
        // It could not be more busy than before it begins.
        let (failure, complaints, budget) = (Failure::new(), Complaints::default(), Budget::new(1, Arc::default()));
        let (queue, bell) = (&queue, &bell);
        let writer = Writer {
            store,
            queue: Arc::clone(queue),
            bell: Arc::clone(bell),
            expiry_changed,
            failure,
            complaints,
            budget,
            clock: Clock::start(None),
        };
        let writer = writer.spawn().unwrap();
        tokio::select! {
            () = bell.pump(|| queue.wake()) => {}
            done = timeout(Duration::from_secs(10), done) => assert_eq!(done.unwrap().unwrap().len(), 1),
        }
        queue.close();
        timeout(Duration::from_secs(10), writer).await.unwrap().unwrap().unwrap();
    }
}
