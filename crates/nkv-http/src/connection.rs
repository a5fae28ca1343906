//! A connection: served until either side ends it, counted for as long.

use std::convert::Infallible;
use std::fmt;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use http::{Request, Version};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use nkv_core::mailbox::{Backlog, Observer};
use nkv_node::{Held, Holder, Peer, Place, Tail};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio::time::MissedTickBehavior;

use crate::body::{Long, STREAM_PIECE_LEN, Unsent};
use crate::door::{Calls, Inner};
use crate::route::answer;
use crate::timed::{TimeLimits, Timed, Timer, Times};
use crate::ws::{Frames, send_records};

/// How often a connection looks for streams that stand still.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What the library holds of a stream that was ended stays until the connection ends: with one more it does.
const STALLED_MAX: usize = 64;

/// The longest head of a request, in bytes.
const STREAM_HEAD_LEN_MAX: u32 = 16 << 10;
const HEAD_LEN_MAX: usize = 32 << 10;

/// Streams of an HTTP/2 connection at a time: as many as there may be watches on one, and some for requests beside them.
const STREAMS_MAX: u32 = 1_100;

/// A connection, as the tasks see it that serve its requests.
#[derive(Debug)]
pub(crate) struct Conn {
    peer: Peer,
    pub(crate) address: Box<str>,
    pub(crate) load: Arc<Load>,
    arriving: Mutex<Arriving>,
    times: Arc<Times>,
    limits: TimeLimits,
    /// That of the last body that came.
    body_timer: Mutex<Timer>,
    /// What answers its calls of gRPC, once there is one.
    calls: OnceLock<Box<dyn Calls>>,
    has_calls: Notify,
    /// What the connection becomes when HTTP has ended.
    upgrade: Mutex<Option<Upgrade>>,
}

/// Requests that are not served yet. Those of HTTP/2 are tasks of their own: what is noted of them is noted under the lock, so
/// that the newest is the last.
#[derive(Debug, Default)]
struct Arriving {
    held: usize,
    /// How many wait for the node, and since when there is one.
    waiting: usize,
    since: Option<Instant>,
}

/// A request that waits for the node, until this is dropped.
struct Waits<'a>(&'a Conn);

impl<'a> Waits<'a> {
    fn begin(conn: &'a Conn) -> Self {
        let mut arriving = lock(&conn.arriving);
        arriving.waiting = arriving.waiting.saturating_add(1);
        if arriving.since.is_none() {
            arriving.since = Some(Instant::now());
            conn.peer.begin_waiting();
        }
        Waits(conn)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        let mut arriving = lock(&self.0.arriving);
        arriving.waiting = arriving.waiting.saturating_sub(1);
        if arriving.waiting == 0
            && let Some(since) = arriving.since.take()
        {
            self.0.peer.end_waiting(since.elapsed());
        }
    }
}

/// What a connection becomes.
#[derive(Debug)]
pub(crate) enum Upgrade {
    /// One of the JSON-lines protocol.
    Messages(OnUpgrade),
    /// One that gets records.
    Records(OnUpgrade, Box<Tail>),
}

/// What is held for a connection, as the node looks at it.
#[derive(Debug)]
pub(crate) struct Load {
    unsent: AtomicUsize,
    /// That of all connections.
    waiting: Arc<AtomicUsize>,
    watches: Mutex<Vec<Weak<Observer>>>,
    bodies: Mutex<Vec<Weak<Long>>>,
    look_anew: Notify,
    is_http2: AtomicBool,
    /// Streams that were ended as their peer took none of them.
    ended: AtomicUsize,
}

/// That a request is not answered whole.
#[derive(Debug)]
pub(crate) struct Busy(Arc<Times>);

impl Busy {
    fn begin(times: &Arc<Times>) -> Self {
        times.begun.fetch_add(1, Relaxed);
        times.busy.fetch_add(1, Relaxed);
        Busy(Arc::clone(times))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Relaxed);
    }
}

impl Conn {
    pub(crate) fn limits(&self) -> &TimeLimits {
        &self.limits
    }

    /// What answers its calls of gRPC, if this port does.
    pub(crate) fn calls(&self, door: &Inner) -> Option<&dyn Calls> {
        let make = door.calls.as_ref()?;
        let mut is_new = false;
        let calls = self.calls.get_or_init(|| {
            is_new = true;
            (make.0)(&self.address)
        });
        // Once it can be found.
        if is_new {
            self.has_calls.notify_one();
        }
        Some(&**calls)
    }

    /// Waits until it is to be cut for what its calls hold.
    async fn calls_evicted(&self) {
        loop {
            if let Some(calls) = self.calls.get() {
                return calls.evicted().await;
            }
            self.has_calls.notified().await;
        }
    }

    /// A timer for a body: the one that the last body has left here.
    pub(crate) fn take_body_timer(&self) -> Timer {
        lock(&self.body_timer).take()
    }

    pub(crate) fn leave_body_timer(&self, timer: Timer) {
        *lock(&self.body_timer) = timer;
    }

    pub(crate) fn upgrade_to(&self, upgrade: Upgrade) {
        *lock(&self.upgrade) = Some(upgrade);
    }

    pub(crate) fn peer(&self) -> &Peer {
        &self.peer
    }

    pub(crate) fn hold_more(&self, len: usize) {
        let mut arriving = lock(&self.arriving);
        arriving.held = arriving.held.saturating_add(len);
        self.peer.hold(arriving.held, false);
    }

    pub(crate) fn hold_less(&self, len: usize) {
        let mut arriving = lock(&self.arriving);
        arriving.held = arriving.held.saturating_sub(len);
        self.peer.hold(arriving.held, true);
    }

    /// Waits for the node: that is not held against the peer.
    pub(crate) async fn waiting<T>(&self, wait: impl Future<Output = T>) -> T {
        let _waits = Waits::begin(self);
        wait.await
    }
}

impl Load {
    fn new(waiting: Arc<AtomicUsize>) -> Arc<Self> {
        let (unsent, watches, bodies, look_anew, is_http2, ended) = Default::default();
        Arc::new(Load { unsent, waiting, watches, bodies, look_anew, is_http2, ended })
    }

    /// Counts `len` bytes that wait to be taken by the peer.
    pub(crate) fn hold(self: &Arc<Self>, len: usize) -> Unsent {
        Unsent::new(Arc::clone(self), len)
    }

    pub(crate) fn add_unsent(&self, len: usize) {
        self.unsent.fetch_add(len, Relaxed);
        self.waiting.fetch_add(len, Relaxed);
    }

    pub(crate) fn take_unsent(&self, len: usize) {
        self.unsent.fetch_sub(len, Relaxed);
        self.waiting.fetch_sub(len, Relaxed);
    }

    pub(crate) fn is_http2(&self) -> bool {
        self.is_http2.load(Relaxed)
    }

    /// Its requests come by HTTP/2.
    pub(crate) fn note_http2(&self) {
        if !self.is_http2.swap(true, Relaxed) {
            self.look_anew.notify_one();
        }
    }

    /// A body that ends if the peer takes none of it.
    pub(crate) fn watch(&self, body: &Arc<Long>) {
        let mut bodies = lock(&self.bodies);
        bodies.retain(|body| body.strong_count() > 0);
        bodies.push(Arc::downgrade(body));
        if bodies.len() == 1 {
            // From now on there is something to look at.
            self.look_anew.notify_one();
        }
    }

    /// A subscription whose backlog counts.
    pub(crate) fn observe(&self, watch: &Arc<Observer>) {
        let mut watches = lock(&self.watches);
        watches.retain(|watch| watch.strong_count() > 0);
        watches.push(Arc::downgrade(watch));
    }

    /// Ends the bodies that stand still for longer than `limit`.
    fn end_stalled(&self, limit: Duration) {
        let stalled = |body: &Arc<Long>| body.stalled_for() > limit;
        let stalled: Vec<_> = lock(&self.bodies).iter().filter_map(Weak::upgrade).filter(stalled).collect();
        let ended = stalled.iter().filter(|body| body.end()).count();
        self.ended.fetch_add(ended, Relaxed);
    }

    fn each_watch(&self, look: impl FnMut(Arc<Observer>)) {
        // A copy: what it does may take time.
        let watches: Vec<_> = lock(&self.watches).iter().filter_map(Weak::upgrade).collect();
        watches.into_iter().for_each(look);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The node's view of a connection.
#[derive(Debug)]
struct Line(Arc<Load>);

impl Holder for Line {
    fn held(&self) -> Held {
        let backlog = self.backlog();
        let own = self.0.unsent.load(Relaxed);
        Held { own, queue: backlog.own_bytes, changes: backlog.event_bytes, ..Held::default() }
    }

    fn backlog(&self) -> Backlog {
        let mut all = Backlog::default();
        self.0.each_watch(|watch| {
            let Backlog { queued, skipped, own_bytes, event_bytes, slack } = watch.backlog();
            all.queued = all.queued.saturating_add(queued);
            all.skipped = all.skipped.saturating_add(skipped);
            all.own_bytes = all.own_bytes.saturating_add(own_bytes);
            all.event_bytes = all.event_bytes.saturating_add(event_bytes);
            all.slack = all.slack.saturating_add(slack);
        });
        all
    }

    fn busy_for(&self) -> Duration {
        let bodies = lock(&self.0.bodies);
        bodies.iter().filter_map(Weak::upgrade).map(|body| body.stalled_for()).max().unwrap_or_default()
    }

    fn give_up(&self) {
        self.0.each_watch(|watch| watch.give_up());
    }

    fn wake(&self) {
        self.0.look_anew.notify_one();
    }
}

/// Serves a connection.
pub(crate) async fn serve<S>(door: Arc<Inner>, stream: S, place: Option<Place>, address: Box<str>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let load = Load::new(door.handle.budget().waiting());
    let times = Arc::<Times>::default();
    let limits = door.options.time_limits();
    let conn = Arc::new(Conn {
        peer: door.handle.peer(address.clone(), Box::new(Line(Arc::clone(&load)))),
        address,
        load,
        arriving: Mutex::default(),
        times: Arc::clone(&times),
        limits,
        body_timer: Mutex::default(),
        calls: OnceLock::new(),
        has_calls: Notify::new(),
        upgrade: Mutex::default(),
    });
    let stream = TokioIo::new(Timed::new(stream, times, limits));
    let open = Open::new(&door);
    // In memory of its own, as all that follows: a connection that becomes a WebSocket gives it back.
    Box::pin(http(&door, &conn, stream)).await;
    let upgrade = lock(&conn.upgrade).take();
    // No request is on its way, and the connection is not idle.
    let _busy = Busy::begin(&conn.times);
    match (upgrade, &door.messages) {
        (Some(Upgrade::Messages(upgrade)), Some(messages)) => {
            let Ok(stream) = upgrade.await else { return };
            let frames = Box::pin(Frames::new(stream, &door.handle, limits.request_limit)).await;
            let address = conn.address.clone();
            // What the connection becomes is a peer of its own, and takes a place.
            drop((conn, place, open));
            (messages.0)(Box::new(frames), address).await;
        }
        (Some(Upgrade::Records(upgrade, changes)), _) => {
            let Ok(stream) = upgrade.await else { return };
            let sent = Box::pin(send_records(stream, &door.handle, limits.request_limit, *changes));
            tokio::select! {
                () = sent => {}
                () = evicted(&conn) => door.log_eviction(&conn),
            }
        }
        _ => {}
    }
}

/// Lets the tasks that are ready have their turn. That of Tokio asks the system for more that are, each time.
async fn turn() {
    let mut is_over = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut is_over, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// A connection that figures count.
struct Open(Arc<Inner>);

impl Open {
    fn new(door: &Arc<Inner>) -> Self {
        door.counted.connections.fetch_add(1, Relaxed);
        Open(Arc::clone(door))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.counted.connections.fetch_sub(1, Relaxed);
    }
}

/// Waits until the peer is to leave.
async fn evicted(conn: &Conn) {
    while !conn.peer.is_evicted() {
        conn.load.look_anew.notified().await;
    }
}

async fn http<S>(door: &Arc<Inner>, conn: &Arc<Conn>, stream: TokioIo<Timed<S>>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().half_close(true).keep_alive(true).max_buf_size(HEAD_LEN_MAX).timer(TokioTimer::new());
    // Limits of time are those of the stream: they distinguish an idle connection from a slow head.
    builder.http1().header_read_timeout(None);
    let http2 = &mut builder.http2();
    http2.max_concurrent_streams(STREAMS_MAX).max_header_list_size(STREAM_HEAD_LEN_MAX).timer(TokioTimer::new());
    http2.max_send_buf_size(STREAM_PIECE_LEN).keep_alive_interval(None);
    let service = service_fn(|request: Request<Incoming>| {
        let (door, conn) = (Arc::clone(door), Arc::clone(conn));
        async move {
            let busy = Busy::begin(&conn.times);
            let gathers = request.version() < Version::HTTP_2 && !request.method().is_safe();
            let (mut answering, mut has_waited) = (std::pin::pin!(answer(&door, &conn, request)), false);
            let mut answer = poll_fn(|cx| {
                let answer = answering.as_mut().poll(cx);
                has_waited |= answer.is_pending();
                answer
            })
            .await;
            answer.body_mut().busy = Some(busy);
            if gathers && !has_waited {
                // A client process with many connections is woken once for the answers to all writes that have come.
                turn().await;
            }
            Ok::<_, Infallible>(answer)
        }
    });
    let mut serving = std::pin::pin!(builder.serve_connection_with_upgrades(stream, service));
    let mut calls_evicted = std::pin::pin!(conn.calls_evicted());
    let mut look_anew = std::pin::pin!(conn.load.look_anew.notified());
    let mut look = tokio::time::interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut is_stopping = false;
    loop {
        tokio::select! {
            served = serving.as_mut() => {
                if let Err(error) = served {
                    tracing::debug!(%error, peer = %conn.address, "a connection has ended");
                }
                return;
            }
            () = &mut look_anew => look_anew.set(conn.load.look_anew.notified()),
            () = &mut calls_evicted => return,
            // By HTTP/1 the stream itself sees a peer that takes nothing.
            _ = look.tick(), if conn.load.is_http2() && conn.load.has_bodies() => {
                conn.load.end_stalled(conn.limits.stall);
                if conn.load.ended.load(Relaxed) > STALLED_MAX {
                    let what = format_args!("connection cut: {} takes nothing of its streams", conn.address);
                    return door.handle.log().warn("stalled", what);
                }
            }
        }
        if conn.peer.is_evicted() {
            return door.log_eviction(conn);
        }
        if conn.peer.is_stopping() && !std::mem::replace(&mut is_stopping, true) {
            serving.as_mut().graceful_shutdown();
        }
    }
}

impl Load {
    fn has_bodies(&self) -> bool {
        let mut bodies = lock(&self.bodies);
        bodies.retain(|body| body.strong_count() > 0);
        !bodies.is_empty()
    }
}

/// What serves the messages of a WebSocket.
#[derive(Clone)]
pub(crate) struct Messages(pub(crate) Arc<crate::door::ServeMessages>);

/// What makes that which answers the calls of a connection.
#[derive(Clone)]
pub(crate) struct MakesCalls(pub(crate) Arc<crate::door::MakeCalls>);

impl fmt::Debug for MakesCalls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MakesCalls")
    }
}

impl Inner {
    fn log_eviction(&self, conn: &Conn) {
        let held = conn.peer.evicted_with();
        self.handle.log().warn("evicted", format_args!("{} was closed: it held {held} bytes", conn.address));
    }
}

impl fmt::Debug for Messages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Messages")
    }
}
