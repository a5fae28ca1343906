//! What handles share: the store, the way to its writer, and the limits.

use std::fmt;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use std::vec;

use nkv_core::mailbox::Backlog;
use nkv_core::{Epoch, Failed, Key, Notifier, Op, Outcome, Pattern, StorageFigures, SubscriberId, Write, WriteResult};
use nkv_types::{Error, ErrorKind};
use tokio::sync::{Notify, Semaphore, oneshot, watch};

use crate::budget::Budget;
use crate::clock::Clock;
use crate::deletes::RecentDeletes;
use crate::engine::{Seen, Truth};
use crate::failure::Failure;
use crate::figures::{Counters, Operation, ended};
use crate::job::{Job, Room};
use crate::limits::Limits;
use crate::peer::PeerInfo;
use crate::rate_log::RateLimitedLog;
use crate::rights::Rights;
use crate::subscriber::{Store, Subscriber};
use crate::wakeups::{SharedWaker, WakeUps};
use crate::writer::{Queue, Writer};

pub(crate) struct Shared {
    pub(crate) store: Arc<Store>,
    pub(crate) clock: Clock,
    /// As people write it, for `Stats`.
    pub(crate) durability: String,
    pub(crate) limits: Limits,
    pub(crate) rights: Option<Arc<dyn Rights>>,
    /// Learns when storage is poisoned.
    pub(crate) failure: Failure,
    truth: Option<Truth>,
    /// The number of the newest feed of the engine, locked while one gives something.
    pub(crate) feeds: Mutex<u64>,
    pub(crate) budget: Arc<Budget>,
    pub(crate) log: RateLimitedLog,
    pub(crate) wake_ups: Arc<WakeUps>,
    pub(crate) queue: Arc<Queue>,
    pub(crate) writer: Arc<Writer>,
    /// Notified when the time of the next expiry may have changed.
    pub(crate) expiry_changed: Arc<Notify>,
    /// That of the node.
    pub(crate) runtime: tokio::runtime::Handle,
    /// Whether the node is to stop.
    pub(crate) stop: watch::Sender<bool>,
    /// Whether the node has ended: what has no answer by then gets none.
    pub(crate) ended: watch::Sender<bool>,
    /// What is counted, once a door asks for that.
    pub(crate) counters: Arc<OnceLock<Counters>>,
    pub(crate) storage: Option<Arc<dyn StorageFigures>>,
    /// The most recent deletes, once a door asks for that.
    pub(crate) deletes: OnceLock<Arc<RecentDeletes>>,
    /// The number of names made up for subscribers that gave none, and what no other has in its names.
    names: AtomicU64,
    name: u64,
    /// Bytes of values that may still be taken.
    write_room: Arc<Semaphore>,
    /// Bytes of long requests that may still be read.
    arrival_room: Arc<Semaphore>,
    arrival_len: usize,
}

/// Bytes of values that wait to be stored; those for which there is no room wait in the buffers of their connections.
const WRITE_ROOM: usize = 64 << 20;

/// Bytes of long requests that are on their way, at most, and as a part of what all connections may hold. Those for which
/// there is no room wait in their sockets.
const ARRIVAL_ROOM_MAX: usize = 64 << 20;
const ARRIVAL_ROOM_PART: usize = 4;

/// A peer that waits this long to send a long request has the slowest of the senders closed, if that has taken longer.
const ARRIVAL_PATIENCE: Duration = Duration::from_secs(5);

/// The bytes that a job counts as at least, so that 1,024 of them wait at most.
pub(crate) const JOB_LEN_MIN: usize = WRITE_ROOM / 1_024;

/// The node stops, and takes no more writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopping;

impl fmt::Display for Stopping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the server is stopping")
    }
}

impl std::error::Error for Stopping {}

impl From<Stopping> for Error {
    fn from(stopping: Stopping) -> Self {
        Error::new(ErrorKind::Refused { status: 503 }, stopping.to_string())
    }
}

// Short: a node is part of what engines, streams and attached subscriptions show.
impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("durability", &self.durability).finish_non_exhaustive()
    }
}

/// What a node is made of.
pub(crate) struct Parts {
    pub(crate) store: Arc<Store>,
    pub(crate) clock: Clock,
    pub(crate) durability: String,
    pub(crate) limits: Limits,
    pub(crate) rights: Option<Arc<dyn Rights>>,
    pub(crate) failure: Failure,
    pub(crate) truth: Option<Truth>,
    pub(crate) budget: Arc<Budget>,
    pub(crate) wake_ups: Arc<WakeUps>,
    pub(crate) queue: Arc<Queue>,
    pub(crate) writer: Arc<Writer>,
    pub(crate) expiry_changed: Arc<Notify>,
    /// What no other node has in the names of its subscribers.
    pub(crate) name: u64,
    pub(crate) counters: Arc<OnceLock<Counters>>,
    pub(crate) storage: Option<Arc<dyn StorageFigures>>,
}

impl Shared {
    pub(crate) fn new(parts: Parts) -> Self {
        let Parts {
            store,
            clock,
            durability,
            limits,
            rights,
            failure,
            truth,
            budget,
            wake_ups,
            queue,
            writer,
            expiry_changed,
            name,
            counters,
            storage,
        } = parts;
        let request_len_max = limits.request_len_max;
        let arrival_len =
            (limits.queued_max / ARRIVAL_ROOM_PART).clamp(request_len_max, ARRIVAL_ROOM_MAX.max(request_len_max));
        Shared {
            store,
            clock,
            durability,
            limits,
            rights,
            failure,
            truth,
            feeds: Mutex::default(),
            budget,
            log: RateLimitedLog::default(),
            wake_ups,
            queue,
            writer,
            expiry_changed,
            runtime: tokio::runtime::Handle::current(),
            stop: watch::Sender::new(false),
            ended: watch::Sender::new(false),
            counters,
            storage,
            deletes: OnceLock::new(),
            names: AtomicU64::new(0),
            name,
            write_room: Arc::new(Semaphore::new(WRITE_ROOM)),
            arrival_room: Arc::new(Semaphore::new(arrival_len)),
            arrival_len,
        }
    }

    /// Room for `len` bytes, if there is any now. What is more than there ever is counts as all of it.
    pub(crate) fn try_room(&self, len: usize) -> Option<Room> {
        Arc::clone(&self.write_room).try_acquire_many_owned(room_len(len)).ok().map(Room)
    }

    /// Waits for room for `len` bytes; those that came first go first.
    pub(crate) fn room(&self, len: usize) -> impl Future<Output = Result<Room, Stopping>> + Send + use<> {
        let room = Arc::clone(&self.write_room).acquire_many_owned(room_len(len));
        async move { room.await.map(Room).map_err(|_| Stopping) }
    }

    /// Room for a request of `len` bytes to be read, if there is any now.
    pub(crate) fn try_arrival(&self, len: usize) -> Option<Room> {
        Arc::clone(&self.arrival_room).try_acquire_many_owned(self.arrival_len(len)).ok().map(Room)
    }

    /// Waits for room for a request of `len` bytes to be read.
    pub(crate) fn arrival(&self, len: usize) -> impl Future<Output = Result<Room, Stopping>> + Send + use<> {
        let (room, budget) = (Arc::clone(&self.arrival_room), Arc::clone(&self.budget));
        let room = room.acquire_many_owned(self.arrival_len(len));
        async move {
            let mut room = std::pin::pin!(room);
            loop {
                match tokio::time::timeout(ARRIVAL_PATIENCE, room.as_mut()).await {
                    Ok(room) => return room.map(Room).map_err(|_| Stopping),
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

    /// Has the writer do `write`, with all others that wait, once the turn of the runtime has ended.
    pub(crate) fn write(&self, write: Write, room: Room) -> Written {
        let handed_over = hand_over(&self.wake_ups, &self.queue, write, false, self.began(), room);
        Written(handed_over.map_or(Doing::Stopped, Doing::Here))
    }

    /// Has the engine do `ops`, each for itself. What is to be changed holds the room until then.
    pub(crate) fn write_to_engine(self: &Arc<Self>, ops: Vec<Op>, room: Room) -> Written {
        if self.queue.is_closed() {
            return Written(Doing::Stopped);
        }
        let (results, done) = oneshot::channel();
        let shared = Arc::clone(self);
        self.runtime.spawn(async move {
            if let Some(truth) = shared.truth() {
                drop(results.send(shared.write_to(truth, ops, false).await.map(|(_, results)| results)));
            }
            drop(room);
        });
        Written(Doing::Engine(done))
    }

    /// When something begins, if that is counted.
    fn began(&self) -> Option<Instant> {
        self.counters.get().map(|_| Instant::now())
    }

    /// Has the engine do `ops`.
    pub(crate) async fn write_to(
        &self,
        truth: &Truth,
        ops: Vec<Op>,
        together: bool,
    ) -> nkv_types::Result<(Epoch, EngineResults)> {
        let Some(counters) = self.counters.get() else { return truth.write(ops, together).await };
        let (began, operations) = (Instant::now(), ops.iter().map(Operation::of).collect::<Vec<_>>());
        let written = truth.write(ops, together).await;
        counters.write_times.observe_time(began.elapsed());
        for (at, operation) in operations.into_iter().enumerate() {
            let outcome = written.as_ref().ok().and_then(|(_, results)| results.get(at)?.as_ref().ok());
            counters.count(operation, ended(outcome));
        }
        written
    }

    /// The node has ended: nothing more is waited for.
    pub(crate) fn end(&self) {
        self.write_room.close();
        self.arrival_room.close();
        self.ended.send_replace(true);
    }

    /// Where the truth lies, if that is not here.
    pub(crate) fn truth(&self) -> Option<&Truth> {
        self.truth.as_ref()
    }

    /// A name for a subscriber that gave none: it replaces no other.
    pub(crate) fn new_name(&self) -> SubscriberId {
        let number = self.names.fetch_add(1, Relaxed);
        SubscriberId::from(format!("in-process-{:016x}-{number}", self.name).as_str())
    }

    /// Up to where this node has seen changes.
    pub(crate) fn seen(&self) -> Seen {
        let stats = self.store.stats();
        Seen { epoch: stats.epoch, revision: stats.revision }
    }

    /// As [`write`](Self::write), once there is room; at once unless it is to be `gathered` with others: a caller from elsewhere
    /// cannot count on the runtime's turning.
    pub(crate) async fn write_in_turn(&self, write: Write, gathered: bool) -> Result<Vec<WriteResult>, Stopping> {
        let room = self.room(write.value_len().max(JOB_LEN_MIN)).await?;
        let mut done = hand_over(&self.wake_ups, &self.queue, write, !gathered, self.began(), room)?;
        if !gathered {
            return done.await.map_err(|_| Stopping);
        }
        let mut waker = SharedWaker::default();
        let done = poll_fn(|cx| {
            let waker = self.wake_ups.waker(&mut waker, cx.waker());
            Pin::new(&mut done).poll(&mut Context::from_waker(waker))
        });
        done.await.map_err(|_| Stopping)
    }

    /// The subscribers that a change of `key` notifies.
    pub(crate) fn trace(&self, key: &Key) -> Vec<Traced> {
        let subscriptions = self.store.subscribers_of(key);
        let traced = |subscription: Arc<nkv_core::Subscription<Subscriber>>| {
            let notifier = subscription.notifier();
            Traced {
                client_uuid: subscription.id().clone(),
                pattern: subscription.pattern().clone(),
                age: notifier.since.elapsed(),
                peer: notifier.peer.as_ref().map(|counted| counted.account.info()),
                backlog: notifier.notifier.backlog(),
            }
        };
        subscriptions.into_iter().map(traced).collect()
    }
}

/// Waits until the node is asked to stop, or is gone.
pub(crate) async fn stopped(stop: &mut watch::Receiver<bool>) {
    drop(stop.wait_for(|stop| *stop).await);
}

fn room_len(len: usize) -> u32 {
    len.min(WRITE_ROOM) as u32
}

/// Gives the writer a job. If it sleeps, and the job is not `urgent`, the pump wakes it, once all that have something for it
/// now have said so.
fn hand_over(
    wake_ups: &WakeUps,
    queue: &Queue,
    write: Write,
    urgent: bool,
    began: Option<Instant>,
    room: Room,
) -> Result<oneshot::Receiver<Vec<WriteResult>>, Stopping> {
    let (results, done) = oneshot::channel();
    let is_asleep = queue.push(Job { write, results, began, _room: room }, urgent).map_err(|_| Stopping)?;
    if is_asleep && urgent {
        queue.wake();
    } else if is_asleep {
        wake_ups.request();
    }
    Ok(done)
}

/// What becomes of some writes: a future. Dropping it leaves them as they are, done or not.
#[derive(Debug)]
#[must_use]
pub struct Written(Doing);

#[derive(Debug)]
enum Doing {
    Here(oneshot::Receiver<Vec<WriteResult>>),
    Engine(oneshot::Receiver<nkv_types::Result<EngineResults>>),
    Stopped,
}

type EngineResults = Vec<nkv_types::Result<Outcome>>;

/// What became of some writes, one result for each.
#[derive(Debug)]
pub struct Results(Done);

#[derive(Debug)]
enum Done {
    Here(vec::IntoIter<WriteResult>),
    Engine(vec::IntoIter<nkv_types::Result<Outcome>>),
}

/// Why a write was not done.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum NotDone {
    /// Storage did not keep it.
    Storage(Failed),
    /// The engine did not do it.
    Engine(Error),
}

impl Iterator for Results {
    type Item = Result<Outcome, NotDone>;

    fn next(&mut self) -> Option<Self::Item> {
        match &mut self.0 {
            Done::Here(results) => results.next().map(|result| result.map_err(NotDone::Storage)),
            Done::Engine(results) => results.next().map(|result| result.map_err(NotDone::Engine)),
        }
    }
}

impl Future for Written {
    type Output = Result<Results, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Doing::Here(done) => Pin::new(done).poll(cx).map(|done| match done {
                Ok(results) => Ok(Results(Done::Here(results.into_iter()))),
                Err(_) => Err(Stopping.into()),
            }),
            Doing::Engine(done) => {
                let done = Pin::new(done).poll(cx).map_err(|_| Stopping.into());
                done.map(|done| done.flatten().map(|results| Results(Done::Engine(results.into_iter()))))
            }
            Doing::Stopped => Poll::Ready(Err(Stopping.into())),
        }
    }
}

/// A subscriber, for people to look at.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Traced {
    /// Its name.
    pub client_uuid: SubscriberId,
    /// What it subscribed to.
    pub pattern: Pattern,
    /// How long ago.
    pub age: Duration,
    /// Whose it is, if it is that of a door's peer.
    pub peer: Option<PeerInfo>,
    /// Its backlog.
    pub backlog: Backlog,
}

#[cfg(test)]
mod tests {
    use nkv_core::{NoPersist, NotifyKeyValue, Op, PersistValue};
    use tokio::time::timeout;

    use super::*;
    use crate::failure::Failure;

    #[tokio::test]
    async fn what_comes_while_the_writer_is_busy_is_done_when_it_is_not() {
        let persist: Box<dyn PersistValue> = Box::new(NoPersist::default());
        let store = Arc::new(NotifyKeyValue::open(persist).unwrap());
        let (wake_ups, queue, expiry_changed) = <(Arc<WakeUps>, Arc<Queue>, _)>::default();
        let room = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let room = Room(room);
        let ops = vec![Op::Delete { pattern: Pattern::All, if_revision: None }];
        let done = hand_over(&wake_ups, &queue, Write::apart(ops), false, None, room).unwrap();
        // It could not be more busy than before it begins.
        let (failure, log, budget) = (Failure::new(), RateLimitedLog::default(), Budget::new(1, Arc::default()));
        let (queue, wake_ups) = (&queue, &wake_ups);
        let writer = Arc::new(Writer {
            store,
            queue: Arc::clone(queue),
            wake_ups: Arc::clone(wake_ups),
            expiry_changed,
            failure,
            log,
            budget,
            clock: Clock::start(None, Arc::new(crate::clock::SinceBoot)),
            counters: Arc::default(),
            storage_waits: true,
            since_check: Mutex::default(),
        });
        let writer = writer.spawn().unwrap();
        tokio::select! {
            () = wake_ups.pump(|| queue.wake()) => {}
            done = timeout(Duration::from_secs(10), done) => assert_eq!(done.unwrap().unwrap().len(), 1),
        }
        queue.close();
        timeout(Duration::from_secs(10), writer).await.unwrap().unwrap().unwrap();
    }
}
