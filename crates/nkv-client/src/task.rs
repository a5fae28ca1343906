//! The task that owns the connection: it makes it again when it is lost, matches answers with requests and decides
//! what may be asked again.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use nkv_core::{Epoch, Key, Pattern};
use nkv_protocol::{Body, Features, Kind, Message, Reason, Request, status};
use nkv_types::{Entry, Error, ErrorKind, GoneReason, Result, Revision};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep};

use crate::error::WireError as _;
use crate::hub::{Hub, Local, Send};
use crate::link::{Link, LinkOptions};
use crate::types::ConnectionState;

/// At most this number of requests are taken at a time. Their callers can take them back until they are encoded.
const BATCH: usize = 64;
/// At most this number of requests are in flight; more wait with their callers.
const PENDING_MAX: usize = 4_096;
/// At most this number have been answered behind one that is still in flight.
const ANSWERED_MAX: usize = 64 * PENDING_MAX;
/// A connection that lasted this long ends a row of failures.
const HEALTHY: Duration = Duration::from_secs(10);
/// A connection that was asked for a sign of life counts as lost after as many times the time for an attempt to connect.
const PROBE_FACTOR: u32 = 2;
/// After this number of bytes of messages other tasks have their turn.
const TURN_LEN: usize = 128 << 10;

/// What the task and the callers both know.
#[derive(Debug)]
pub(crate) struct Shared {
    /// Why the connection is not there, for callers whose patience ends meanwhile.
    trouble: Mutex<Option<String>>,
    /// The longest value that the server takes, as far as is known.
    value_len_max: AtomicU64,
}

impl Shared {
    pub(crate) fn new(value_len_max: u64) -> Self {
        Shared { trouble: Mutex::new(None), value_len_max: AtomicU64::new(value_len_max) }
    }

    pub(crate) fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_trouble(&self, trouble: Option<String>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }

    pub(crate) fn value_len_max(&self) -> u64 {
        self.value_len_max.load(Relaxed)
    }
}

/// An answer, and the epoch of the server's data within which its revisions count.
pub(crate) type Answer = (Box<Body>, Epoch);

/// A request and the caller that waits for its answer.
#[derive(Debug)]
pub(crate) struct Ask {
    pub(crate) slot: Arc<Slot>,
    /// The epoch of the revision in its condition.
    pub(crate) epoch: Option<Epoch>,
    pub(crate) reply: oneshot::Sender<Result<Answer>>,
}

/// A request as its caller and the task share it: the caller takes it back when it gives up, and learns whether the socket
/// had it by then.
#[derive(Debug)]
pub(crate) struct Slot(Mutex<Stage>);

#[derive(Debug)]
enum Stage {
    /// For the task to take.
    Waiting(Box<Request<'static>>),
    /// Encoded; the socket has taken none of it.
    Encoded,
    /// The socket may have taken some of it.
    Sent,
    GivenUp,
}

impl Slot {
    pub(crate) fn new(request: Request<'static>) -> Self {
        Slot(Mutex::new(Stage::Waiting(Box::new(request))))
    }

    /// The caller waits no longer. True if it was sent: what becomes of it is not known.
    pub(crate) fn give_up(&self) -> bool {
        matches!(std::mem::replace(&mut *self.lock(), Stage::GivenUp), Stage::Sent)
    }

    /// The request, to be sent now, unless it was given up.
    fn take(&self) -> Option<Box<Request<'static>>> {
        let mut stage = self.lock();
        match std::mem::replace(&mut *stage, Stage::Sent) {
            Stage::Waiting(request) => Some(request),
            other => {
                *stage = other;
                None
            }
        }
    }

    /// It was not sent on this connection, and is to be sent on the next.
    fn put_back(&self, request: Box<Request<'static>>) -> bool {
        let mut stage = self.lock();
        let is_wanted = !matches!(*stage, Stage::GivenUp);
        if is_wanted {
            *stage = Stage::Waiting(request);
        }
        is_wanted
    }

    /// The socket took nothing of it.
    fn unsend(&self) {
        let mut stage = self.lock();
        if matches!(*stage, Stage::Sent) {
            *stage = Stage::Encoded;
        }
    }

    /// It is to be given to the socket once more; false if it was given up meanwhile.
    fn send_again(&self) -> bool {
        let mut stage = self.lock();
        if matches!(*stage, Stage::Encoded) {
            *stage = Stage::Sent;
        }
        matches!(*stage, Stage::Sent)
    }

    fn lock(&self) -> MutexGuard<'_, Stage> {
        // Nothing in this module panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is asked of the task besides requests.
pub(crate) enum Control {
    Subscribe(Local),
    Unsubscribe(Pattern, u64),
    /// To connect at once, or to find out whether the connection is still there.
    Nudge,
    Close,
}

#[derive(Debug)]
struct Pending {
    /// The numbers of its first byte on the connection, and of the one behind the last.
    start: u64,
    end: u64,
    what: What,
}

#[derive(Debug)]
enum What {
    /// A request; the value of a write is kept until the socket has it, or until it is answered if the key is watched.
    Ask(Ask, Box<Request<'static>>),
    /// To a pattern, for a wire subscription, and whether to its key alone.
    Subscribe(String, u64, bool),
    /// Its answer is passed over.
    Other,
}

/// The requests under way, by id: ids are given one after another.
#[derive(Debug, Default)]
struct AllPending {
    /// Those that were answered or taken back are `None`.
    places: VecDeque<Option<Pending>>,
    /// The id of the first.
    first: u64,
    /// The first id of which the socket has taken nothing.
    unsent: u64,
    /// Those of the `Subscribe`s, which are answered in their order, without id.
    subscribes: VecDeque<u64>,
    /// How many are under way.
    count: usize,
}

impl AllPending {
    fn push(&mut self, id: u64, pending: Pending) {
        if self.places.is_empty() {
            (self.first, self.unsent) = (id, id);
        }
        if matches!(pending.what, What::Subscribe(..)) {
            self.subscribes.push_back(id);
        }
        self.places.push_back(Some(pending));
        self.count += 1;
    }

    fn has_room(&self) -> bool {
        self.count < PENDING_MAX && self.places.len() < ANSWERED_MAX
    }

    fn remove(&mut self, id: u64) -> Option<Pending> {
        let place = usize::try_from(id.checked_sub(self.first)?).ok()?;
        let pending = self.places.get_mut(place)?.take()?;
        self.count -= 1;
        if matches!(pending.what, What::Subscribe(..)) {
            self.subscribes.retain(|known| *known != id);
        }
        self.tidy();
        Some(pending)
    }

    /// Begins with the first that is still under way.
    fn tidy(&mut self) {
        while let Some(None) = self.places.front() {
            self.places.pop_front();
            self.first += 1;
        }
        self.unsent = self.unsent.max(self.first);
    }

    fn iter(&self) -> impl Iterator<Item = &Pending> {
        self.places.iter().flatten()
    }
}

/// Which keys have writes under way: counted by a hash, so that two keys may seem one, but a key never seems free that is
/// not.
#[derive(Debug)]
struct Writes {
    counts: Box<[u16; 1_024]>,
    wildcards: usize,
    total: usize,
    hasher: RandomState,
}

impl Writes {
    fn place(&mut self, key: &str) -> Option<&mut u16> {
        let place = self.hasher.hash_one(key) % self.counts.len() as u64;
        self.counts.get_mut(usize::try_from(place).unwrap_or(0))
    }

    fn add(&mut self, request: &Request<'_>) {
        self.total += 1;
        match is_wildcard(&request.key) {
            true => self.wildcards += 1,
            false => self.place(&request.key).into_iter().for_each(|count| *count += 1),
        }
    }

    fn remove(&mut self, request: &Request<'_>) {
        self.total = self.total.saturating_sub(1);
        match is_wildcard(&request.key) {
            true => self.wildcards = self.wildcards.saturating_sub(1),
            false => self.place(&request.key).into_iter().for_each(|count| *count = count.saturating_sub(1)),
        }
    }

    fn clear(&mut self) {
        (self.total, self.wildcards) = (0, 0);
        self.counts.fill(0);
    }
}

impl Default for Writes {
    fn default() -> Self {
        Writes { counts: Box::new([0; 1_024]), wildcards: 0, total: 0, hasher: RandomState::new() }
    }
}

fn is_wildcard(pattern: &str) -> bool {
    pattern.ends_with('*')
}

pub(crate) fn is_write(request: &Request<'_>) -> bool {
    matches!(request.kind, Kind::Put | Kind::Delete)
}

/// Times of a connection's life.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    pub(crate) heartbeat: Duration,
    pub(crate) backoff_min: Duration,
    pub(crate) backoff_max: Duration,
}

pub(crate) struct Task {
    pub(crate) link_options: LinkOptions,
    pub(crate) pace: Pace,
    pub(crate) asks: mpsc::Receiver<Ask>,
    pub(crate) control: mpsc::UnboundedReceiver<Control>,
    pub(crate) state: watch::Sender<ConnectionState>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) hub: Hub,
    pending: AllPending,
    writes: Writes,
    /// To be sent next: requests of a connection that was lost, or such as have just been taken from the channel.
    again: VecDeque<Ask>,
    batch: Vec<Ask>,
    /// Bytes of messages since others had their turn.
    turn_len: usize,
    /// Since when the server is asked for a sign of life because the program wants one, or the next attempt to connect is due at
    /// once.
    nudged: Option<Instant>,
    /// It ended in order, and not because its runtime has gone.
    has_ended: bool,
}

/// Why the task stops serving a connection.
enum Stop {
    /// No handle is left, or the client was closed.
    Done,
    Lost(Error),
}

impl Drop for Task {
    fn drop(&mut self) {
        if !self.has_ended {
            self.shared.set_trouble(Some("the runtime that it was made on has shut down".into()));
        }
        self.state.send_replace(ConnectionState::Closed);
    }
}

impl Task {
    pub(crate) fn new(
        (link_options, pace): (LinkOptions, Pace),
        asks: mpsc::Receiver<Ask>,
        control: mpsc::UnboundedReceiver<Control>,
        state: watch::Sender<ConnectionState>,
        shared: Arc<Shared>,
    ) -> Self {
        Task {
            link_options,
            pace,
            asks,
            control,
            state,
            shared,
            hub: Hub::default(),
            pending: AllPending::default(),
            writes: Writes::default(),
            again: VecDeque::new(),
            batch: Vec::new(),
            turn_len: 0,
            nudged: None,
            has_ended: false,
        }
    }

    /// Serves, with a connection that is there already or without.
    pub(crate) async fn run(mut self, link: Option<Link>) {
        let mut failures = 0;
        let mut link = match link {
            None => self.reconnect(&mut failures).await,
            link => link,
        };
        while let Some(mut present) = link {
            let since = Instant::now();
            self.attach(&mut present);
            match self.serve(&mut present).await {
                Stop::Done => {
                    self.has_ended = true;
                    #[cfg(feature = "ws")]
                    present.say_goodbye();
                    // No caller waits for the server's answer to that.
                    drop(self);
                    #[cfg(feature = "ws")]
                    present.closed().await;
                    return;
                }
                Stop::Lost(error) => self.detach(&present, &error),
            }
            drop(present);
            if since.elapsed() >= HEALTHY {
                failures = 0;
            }
            link = self.reconnect(&mut failures).await;
        }
        self.has_ended = true;
    }

    fn attach(&mut self, link: &mut Link) {
        self.nudged = None;
        self.shared.set_trouble(None);
        self.shared.value_len_max.store(link.value_len_max, Relaxed);
        tracing::debug!(addr = %self.link_options.addr, features = ?link.features, "connected");
        let seen = &mut self.link_options.seen;
        *seen = seen.filter(|(epoch, _)| !link.begins_anew && *epoch == link.epoch);
        if link.begins_anew {
            self.hub.begin_anew();
        }
        for send in self.hub.attach(link.epoch) {
            self.send(link, send);
        }
        let connected = ConnectionState::Connected;
        self.state.send_if_modified(|state| std::mem::replace(state, connected) != connected);
    }

    /// Serves a connection until it is lost or not needed any more.
    async fn serve(&mut self, link: &mut Link) -> Stop {
        let mut next_beat = Instant::now() + self.pace.heartbeat;
        let mut timer = pin!(sleep(self.pace.heartbeat));
        loop {
            if let Err(error) = self.receive_all(link).await {
                return Stop::Lost(error);
            }
            for send in self.hub.take_sends() {
                self.send(link, send);
            }
            let probe_end = self.probe_end(link);
            let wanted = [self.hub.next_retry(), probe_end].into_iter().flatten().fold(next_beat, Instant::min);
            if timer.deadline() != wanted {
                timer.as_mut().reset(wanted);
            }
            let (mut ticked, mut nudged) = (false, false);
            let woken = poll_fn(|cx| {
                while let Poll::Ready(control) = self.control.poll_recv(cx) {
                    match control {
                        None | Some(Control::Close) => return Poll::Ready(Err(Stop::Done)),
                        Some(Control::Nudge) => nudged |= self.probe(link),
                        // At once: what is only remembered here is forgotten if the connection is found lost below.
                        Some(control) => {
                            if let Some(send) = self.control(control) {
                                self.send(link, send);
                            }
                        }
                    }
                }
                self.poll_requests(link, cx);
                let read = match link.poll_io(cx) {
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(Stop::Lost(Error::lost(error)))),
                    Poll::Ready(Ok(())) => true,
                    Poll::Pending => false,
                };
                self.settle(link);
                ticked = timer.as_mut().poll(cx).is_ready();
                if read || ticked || nudged { Poll::Ready(Ok(())) } else { Poll::Pending }
            });
            if let Err(stop) = woken.await {
                return stop;
            }
            let now = Instant::now();
            if ticked && now >= next_beat {
                match self.beat(link) {
                    Ok(next) => next_beat = next,
                    Err(error) => return Stop::Lost(Error::lost(error)),
                }
            }
            if ticked && self.probe_end(link).is_some_and(|end| now >= end) {
                let what = "no sign of life since one was asked for";
                return Stop::Lost(Error::lost(io::Error::new(io::ErrorKind::TimedOut, what)));
            }
            if ticked {
                for send in self.hub.retries(now) {
                    self.send(link, send);
                }
            }
        }
    }

    /// Encodes and sends the requests that wait, as long as the socket takes them.
    fn poll_requests(&mut self, link: &mut Link, cx: &mut Context<'_>) {
        self.unsettle(link);
        loop {
            let mut any = false;
            while link.has_room() && self.pending.has_room() {
                if self.again.is_empty() {
                    // Closed means that no handle is left, which the other channel shows too.
                    _ = self.asks.poll_recv_many(cx, &mut self.batch, BATCH);
                    self.again.extend(self.batch.drain(..));
                }
                let Some(ask) = self.again.pop_front() else { break };
                self.ask(link, ask);
                any = true;
            }
            link.poll_send(cx);
            if !any || !link.has_room() || !self.pending.has_room() {
                return;
            }
        }
    }

    /// Notes what the socket has taken, and what not.
    fn settle(&mut self, link: &Link) {
        let AllPending { places, first, unsent, .. } = &mut self.pending;
        let skip = usize::try_from(unsent.saturating_sub(*first)).unwrap_or(usize::MAX);
        let mut is_sent = true;
        for pending in places.iter_mut().skip(skip) {
            let sent = pending.as_ref().is_none_or(|pending| link.has_sent(pending.start));
            is_sent &= sent;
            *unsent += u64::from(is_sent);
            if let Some(Pending { what: What::Ask(ask, request), .. }) = pending {
                if !sent {
                    ask.slot.unsend();
                } else if request.value.is_some() && !self.hub.is_watched(&request.key) {
                    request.value = None;
                }
            }
        }
    }

    /// Takes back what its caller gave up before the socket had any of it; the rest is to be sent now.
    fn unsettle(&mut self, link: &mut Link) {
        let AllPending { places, first, unsent, count, .. } = &mut self.pending;
        let skip = usize::try_from(unsent.saturating_sub(*first)).unwrap_or(usize::MAX);
        let mut gone = 0;
        for place in places.iter_mut().skip(skip) {
            let Some(pending) = place else { continue };
            (pending.start, pending.end) = (pending.start - gone, pending.end - gone);
            let What::Ask(ask, request) = &pending.what else { continue };
            if !ask.slot.send_again() {
                if is_write(request) {
                    self.writes.remove(request);
                }
                link.take_back(pending.start, pending.end);
                gone += pending.end - pending.start;
                *place = None;
                *count -= 1;
            }
        }
        self.pending.tidy();
    }

    /// Judges the silence of the server; says when to do so again.
    fn beat(&mut self, link: &mut Link) -> io::Result<Instant> {
        let (now, heartbeat) = (Instant::now(), self.pace.heartbeat);
        let silence = now - link.heard;
        if silence < heartbeat {
            return Ok(link.heard + heartbeat);
        }
        if link.is_broken() {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "nothing can be sent, and nothing comes"));
        }
        // A WebSocket pings and judges by itself.
        #[cfg(feature = "ws")]
        if link.is_web_socket() {
            return Ok(now + heartbeat);
        }
        let has_signs = link.patience.is_some();
        let limit = (2 * heartbeat).max(link.patience.unwrap_or_default());
        // A server without signs of life may be busy with the first request that is due. Its caller may have more patience
        // than we; that of the next one does not count, or a program that keeps asking would never learn that no server is
        // there.
        let first = self.pending.iter().next();
        let is_patient =
            !has_signs && matches!(first, Some(Pending { what: What::Ask(ask, _), .. }) if !ask.reply.is_closed());
        if first.is_none() {
            self.push(link, &Request::new(Kind::Health, ""), What::Other);
        } else if silence >= limit && !is_patient {
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("nothing heard for {silence:?}")));
        }
        Ok(now + heartbeat)
    }

    /// Asks for a sign of life, unless that is under way.
    fn probe(&mut self, link: &mut Link) -> bool {
        let is_first = self.probe_end(link).is_none();
        if is_first {
            self.nudged = Some(Instant::now());
            let mut request = Request::new(Kind::Version, "");
            request.ahead = link.features.contains(Features::AHEAD);
            self.push(link, &request, What::Other);
        }
        is_first
    }

    /// When a connection without a sign of life since it was asked for one counts as lost.
    fn probe_end(&self, link: &Link) -> Option<Instant> {
        let asked = self.nudged.filter(|asked| link.heard <= *asked)?;
        Some(asked + PROBE_FACTOR * self.link_options.connect_timeout)
    }

    /// Handles what is not a request; what is to be sent for it is returned.
    fn control(&mut self, control: Control) -> Option<Send> {
        match control {
            Control::Subscribe(local) => self.hub.add(local),
            Control::Unsubscribe(pattern, id) => self.hub.remove(&pattern, id),
            Control::Nudge => {
                self.nudged = Some(Instant::now());
                None
            }
            Control::Close => None,
        }
    }

    fn push(&mut self, link: &mut Link, request: &Request<'_>, what: What) {
        let (id, start) = link.push(request);
        self.pending.push(id, Pending { start, end: link.encoded(), what });
    }

    fn send(&mut self, link: &mut Link, send: Send) {
        match send {
            Send::Subscribe { pattern, wire, exact } => {
                let mut request = Request::new(Kind::Subscribe, pattern.clone());
                request.snapshot = true;
                request.ahead = link.features.contains(Features::AHEAD) && !self.overlaps(&request);
                request.exact = exact && link.features.contains(Features::EXACT);
                let exact = request.exact;
                self.push(link, &request, What::Subscribe(pattern, wire, exact));
            }
            Send::Unsubscribe(pattern) => {
                let mut request = Request::new(Kind::Unsubscribe, pattern);
                request.ahead = link.features.contains(Features::AHEAD);
                self.push(link, &request, What::Other);
            }
        }
    }

    fn ask(&mut self, link: &mut Link, ask: Ask) {
        // A caller that dropped its future must not find its put done later.
        let Some(mut request) = ask.slot.take() else { return };
        if ask.epoch.is_some_and(|epoch| epoch != link.epoch) {
            let what = "the condition's revision is of another epoch than the server's data: read the key anew";
            // The caller may have gone.
            return drop(ask.reply.send(Err(Error::new(ErrorKind::OtherEpoch, what))));
        }
        if is_write(&request) {
            self.writes.add(&request);
        } else {
            request.ahead = link.features.contains(Features::AHEAD) && !self.overlaps(&request);
        }
        let (id, start) = link.push(&request);
        self.pending.push(id, Pending { start, end: link.encoded(), what: What::Ask(ask, request) });
    }

    /// Whether a read or subscription may see what a write under way does: then it is to be served after that, in order.
    fn overlaps(&mut self, read: &Request<'_>) -> bool {
        let writes = &mut self.writes;
        if writes.total == 0 || !matches!(read.kind, Kind::Get | Kind::List | Kind::Exists | Kind::Subscribe) {
            return false;
        }
        if writes.wildcards > 0 {
            return true;
        }
        if !is_wildcard(&read.key) && read.after.is_none() && read.kind != Kind::Subscribe {
            return writes.place(&read.key).is_some_and(|count| *count > 0);
        }
        let Ok(pattern) = Pattern::new(&read.key) else { return true };
        let mut keys = self.pending.iter().filter_map(|pending| match &pending.what {
            What::Ask(_, request) if is_write(request) => Key::new(&request.key).ok(),
            _ => None,
        });
        keys.any(|key| pattern.covers(&key))
    }

    async fn receive_all(&mut self, link: &mut Link) -> Result<()> {
        loop {
            let before = link.undecoded();
            let Some(message) = link.next_message()? else { return Ok(()) };
            self.receive(message, link.epoch)?;
            self.turn_len += before.saturating_sub(link.undecoded());
            if self.turn_len >= TURN_LEN {
                self.turn_len = 0;
                tokio::task::yield_now().await;
            }
        }
    }

    fn receive(&mut self, message: Message, epoch: Epoch) -> Result<()> {
        self.note_seen(&message, epoch);
        match message {
            Message::Hello => {
                let asked = self.pending.subscribes.front().copied().and_then(|id| self.pending.remove(id));
                match asked {
                    Some(Pending { what: What::Subscribe(pattern, wire, exact), .. }) => {
                        self.hub.hello(pattern, wire, exact)?;
                    }
                    _ => return Err(Error::protocol("a 'Hello' that no subscription asked for")),
                }
            }
            Message::Answer(body) => self.answer(body, epoch)?,
            Message::Update { key, value, revision, skipped, .. } => {
                let entry = Entry::new(peer_key(&key)?, value, Revision::in_epoch(epoch, revision));
                self.hub.update(&entry, skipped);
            }
            Message::Close { key, reason: reason @ (Reason::Deleted | Reason::Expired), revision, skipped, .. } => {
                let reason = if reason == Reason::Deleted { GoneReason::Deleted } else { GoneReason::Expired };
                self.hub.gone(&peer_key(&key)?, Revision::in_epoch(epoch, revision), reason, skipped);
            }
            Message::Close { key, reason, .. } => self.hub.ended(&key, reason),
            Message::Reset { key, .. } => self.hub.reset(key)?,
            Message::Synced { revision, .. } => self.hub.synced(Revision::in_epoch(epoch, revision))?,
            Message::Stale { since_ms, .. } => {
                self.state.send_replace(since_ms.map_or(ConnectionState::Connected, stale));
            }
            // A sign of life has done its work by coming. What a later version of the protocol says is passed over.
            _ => {}
        }
        Ok(())
    }

    /// Notes the highest revision that a message of the epoch had: the next server must have it too.
    fn note_seen(&mut self, message: &Message, epoch: Epoch) {
        let revision = match message {
            Message::Answer(body) => body.revisions.iter().copied().chain(body.revision).max(),
            Message::Update { revision, .. } | Message::Close { revision, .. } | Message::Synced { revision, .. } => {
                Some(*revision)
            }
            _ => None,
        };
        if let Some(revision) = revision {
            let seen = &mut self.link_options.seen;
            *seen = Some((epoch, seen.map_or(0, |(_, known)| known).max(revision)));
        }
    }

    fn answer(&mut self, body: Box<Body>, epoch: Epoch) -> Result<()> {
        let pending = body.id.parse().ok().and_then(|id| self.pending.remove(id));
        match pending.map(|pending| pending.what) {
            // What a server says before it closes a connection that it is tired of.
            None => {
                return Err(match body.status {
                    status::OK => Error::protocol("an answer to no request"),
                    _ => Error::from_answer(&body, epoch),
                });
            }
            Some(What::Ask(ask, mut request)) => {
                if is_write(&request) {
                    self.writes.remove(&request);
                    self.own_write(&mut request, &body, epoch);
                }
                // The caller may have gone.
                drop(ask.reply.send(Ok((body, epoch))));
            }
            Some(What::Subscribe(pattern, wire, _)) => match body.status {
                status::OK => return Err(Error::protocol("an answer other than 'Hello' to a subscription")),
                status => self.hub.refused(&pattern, wire, status, &body.message),
            },
            Some(What::Other) => {}
        }
        Ok(())
    }

    /// A put or delete is done: a watch of the key is to know before its caller does.
    fn own_write(&mut self, request: &mut Request<'static>, body: &Body, epoch: Epoch) {
        let (status::OK, Some(revision)) = (body.status, body.revision) else { return };
        if is_wildcard(&request.key) {
            if let (Ok(pattern), Some(count)) = (Pattern::new(&request.key), body.count) {
                self.hub.own_delete(&pattern, Revision::in_epoch(epoch, revision), count);
            }
            return;
        }
        if !self.hub.is_watched(&request.key) {
            return;
        }
        let Ok(key) = Key::new(&request.key) else { return };
        let revision = Revision::in_epoch(epoch, revision);
        match (request.kind, request.value.take()) {
            (Kind::Delete, _) => self.hub.own_write(&key, None, revision),
            (_, Some(value)) => {
                let entry = Entry::new(key.clone(), value.into_owned(), revision);
                self.hub.own_write(&key, Some(&entry), revision);
            }
            // It began to be watched after it was sent: its snapshot was asked for behind it, and has it.
            (_, None) => {}
        }
    }

    /// Decides what becomes of requests under way on a connection that is lost.
    fn detach(&mut self, link: &Link, error: &Error) {
        tracing::info!(addr = %self.link_options.addr, %error, "connection lost");
        let pending = std::mem::take(&mut self.pending);
        let mut again = VecDeque::new();
        for Pending { start, what, .. } in pending.places.into_iter().flatten() {
            let What::Ask(ask, request) = what else { continue };
            let sent = link.has_sent(start);
            let failure = if sent && is_write(&request) {
                let message = "the connection was lost before the answer came: it may or may not have been done";
                Error::new(ErrorKind::OutcomeUnknown, message).because(error)
            } else if sent && *error.kind() == ErrorKind::Protocol {
                // Asked again, it would end the next connection too.
                Error::protocol(error.to_string())
            } else {
                if ask.slot.put_back(request) {
                    again.push_back(ask);
                }
                continue;
            };
            // The caller may have gone.
            drop(ask.reply.send(Err(failure)));
        }
        // They came before those that have waited since the connection before.
        again.append(&mut self.again);
        self.again = again;
        self.writes.clear();
        self.shared.set_trouble(Some(error.to_string()));
        self.hub.detach();
        self.state.send_replace(ConnectionState::Reconnecting);
    }

    /// Tries until a connection is there; `None` when it is not needed any more.
    async fn reconnect(&mut self, failures: &mut u32) -> Option<Link> {
        loop {
            let pause = self.pace.pause(*failures);
            *failures = failures.saturating_add(1);
            self.pause(pause).await?;
            if self.nudged.take().is_some() {
                *failures = 0;
            }
            let options = self.link_options.clone();
            match self.meanwhile(Link::open(&options)).await? {
                Ok(link) => return Some(link),
                Err(error) => {
                    tracing::debug!(%error, "reconnect failed");
                    self.shared.set_trouble(Some(error.to_string()));
                }
            }
            self.again.retain(|ask| !ask.reply.is_closed());
        }
    }

    /// Waits until the next attempt to connect is due; `None` when it is not needed any more.
    async fn pause(&mut self, pause: Duration) -> Option<()> {
        let mut pause = pin!(sleep(pause));
        while self.nudged.is_none() {
            tokio::select! {
                () = &mut pause => break,
                control = self.control.recv() => self.control_meanwhile(control)?,
            }
        }
        Some(())
    }

    /// Awaits while subscriptions come and go; `None` when the connection is not needed any more.
    async fn meanwhile<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        let mut work = pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Some(done),
                control = self.control.recv() => self.control_meanwhile(control)?,
            }
        }
    }

    fn control_meanwhile(&mut self, control: Option<Control>) -> Option<()> {
        match control {
            None | Some(Control::Close) => None,
            Some(control) => {
                drop(self.control(control));
                Some(())
            }
        }
    }
}

impl Pace {
    /// How long to wait before the next attempt: a random part of a span that doubles, so that the clients of a server
    /// that comes back do not come all at once.
    pub(crate) fn pause(&self, failures: u32) -> Duration {
        let span = self.backoff_min.saturating_mul(1 << failures.min(16)).min(self.backoff_max);
        // Without randomness they do come at once, which is no reason not to come.
        let part = getrandom::u32().unwrap_or(u32::MAX);
        span.mul_f64(f64::from(part) / f64::from(u32::MAX))
    }
}

fn stale(since_ms: u64) -> ConnectionState {
    let now = std::time::Instant::now();
    let since = now.checked_sub(Duration::from_millis(since_ms)).unwrap_or(now);
    ConnectionState::Stale { since }
}

fn peer_key(text: &str) -> Result<Key> {
    Key::new(text).map_err(|error| Error::protocol(format!("the server names an impossible key: {error}")))
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind::BrokenPipe;
    use std::pin::Pin;
    use std::sync::atomic::AtomicBool;

    use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex};

    use super::*;
    use crate::hub::Sink;
    use crate::link::Io;
    use nkv_types::Address;

    const HEARTBEAT: Duration = Duration::from_secs(10);

    struct Rig {
        task: Task,
        link: Link,
        far: DuplexStream,
        control: mpsc::UnboundedSender<Control>,
        _asks: mpsc::Sender<Ask>,
    }

    /// A task with a connection that holds this number of bytes before the far end must take some.
    fn rig(buffer_len: usize) -> Rig {
        let (near, far) = duplex(buffer_len);
        let (asks, asks_rx) = mpsc::channel(1);
        let (control, control_rx) = mpsc::unbounded_channel();
        let state = watch::Sender::new(ConnectionState::Connected);
        let link_options = LinkOptions {
            addr: Address::default(),
            client_uuid: "test".into(),
            name: None,
            token: None,
            seen: None,
            connect_timeout: HEARTBEAT,
            heartbeat: HEARTBEAT,
            message_len_max: 1 << 20,
        };
        let pace = Pace { heartbeat: HEARTBEAT, backoff_min: HEARTBEAT, backoff_max: HEARTBEAT };
        let task = Task::new((link_options, pace), asks_rx, control_rx, state, Arc::new(Shared::new(u64::MAX)));
        Rig { task, link: Link::over(Box::new(near), 1 << 20), far, control, _asks: asks }
    }

    /// A stream that can be read and, from some time on, not written any more.
    struct HalfDead(DuplexStream, Arc<AtomicBool>);

    impl Io for DuplexStream {}

    impl Io for HalfDead {}

    impl AsyncRead for HalfDead {
        fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_read(cx, buf)
        }
    }

    impl AsyncWrite for HalfDead {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            match self.1.load(Relaxed) {
                true => Poll::Ready(Err(BrokenPipe.into())),
                false => Pin::new(&mut self.0).poll_write(cx, bytes),
            }
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_shutdown(cx)
        }
    }

    fn local(id: u64) -> Local {
        Local::new(id, Pattern::new("a").unwrap(), Sink::Queue(Arc::default()), usize::MAX)
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_is_asked_for_a_sign_of_life_and_gives_none_is_lost() {
        let mut rig = rig(4_096);
        rig.link.features = Features::NONE;
        for _ in 0..3 {
            rig.control.send(Control::Nudge).unwrap();
        }
        let began = Instant::now();
        rig.task.pace.heartbeat = Duration::from_secs(3_600);
        lost(&mut rig).await;
        assert_eq!(began.elapsed(), PROBE_FACTOR * HEARTBEAT);
        let mut asked = vec![0; 4_096];
        let len = rig.far.read(&mut asked).await.unwrap();
        assert_eq!(String::from_utf8_lossy(&asked[..len]).matches("Version").count(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_gives_a_sign_of_life_stays() {
        let mut rig = rig(4_096);
        rig.task.pace.heartbeat = Duration::from_secs(3_600);
        rig.control.send(Control::Nudge).unwrap();
        let Rig { mut task, mut link, mut far, control, _asks } = rig;
        let server = async move {
            tokio::time::sleep(HEARTBEAT).await;
            far.write_all(b"{\"Base\":{\"id\":0,\"status\":200,\"message\":\"\"}}\n").await.unwrap();
            tokio::time::sleep(HEARTBEAT * 10).await;
            control.send(Control::Close).unwrap();
            far
        };
        let (stop, _far) = tokio::join!(task.serve(&mut link), server);
        assert!(matches!(stop, Stop::Done));
    }

    /// A put under way, and where its answer comes.
    fn put(rig: &mut Rig, len: usize) -> oneshot::Receiver<Result<Answer>> {
        let mut request = Request::new(Kind::Put, "a");
        request.value = Some(vec![b'x'; len].into());
        let (reply, answer) = oneshot::channel();
        rig.task.ask(&mut rig.link, Ask { slot: Arc::new(Slot::new(request)), epoch: None, reply });
        answer
    }

    /// Sends what the stream takes.
    async fn send(task: &mut Task, link: &mut Link) {
        poll_fn(|cx| {
            task.poll_requests(link, cx);
            Poll::Ready(())
        })
        .await;
    }

    async fn lost(rig: &mut Rig) {
        assert!(matches!(rig.task.serve(&mut rig.link).await, Stop::Lost(_)));
    }

    // Commands that were received in the poll that found the connection lost were dropped: a subscribe failed as
    // 'closed', and what was unsubscribed came back with each connection.
    #[tokio::test]
    async fn what_is_subscribed_or_unsubscribed_as_the_connection_breaks_is_not_forgotten() {
        for (command, after) in [
            (Control::Subscribe(local(1)), vec![Send::Subscribe { pattern: "a".into(), wire: 1, exact: false }]),
            (Control::Unsubscribe(Pattern::new("a").unwrap(), 0), vec![]),
        ] {
            let mut rig = rig(1 << 16);
            if matches!(command, Control::Unsubscribe(..)) {
                rig.task.hub.add(local(0));
            }
            rig.control.send(command).unwrap();
            drop(std::mem::replace(&mut rig.far, duplex(1).0));
            lost(&mut rig).await;
            assert_eq!(rig.task.hub.attach(Epoch::default()), after);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_server_is_given_up_after_two_heartbeats() {
        let mut rig = rig(1 << 16);
        let started = Instant::now();
        lost(&mut rig).await;
        assert_eq!(started.elapsed(), 2 * HEARTBEAT);
    }

    // Only what was read counted as life: a request that took longer to send than two heartbeats was cut.
    #[tokio::test(start_paused = true)]
    async fn a_server_that_takes_a_long_request_bit_by_bit_is_alive() {
        let mut rig = rig(1_000);
        let answer = put(&mut rig, 10_000);
        drop(answer);
        let (mut far, started) = (std::mem::replace(&mut rig.far, duplex(1).0), Instant::now());
        let taken = async {
            for _ in 0..9 {
                sleep(HEARTBEAT).await;
                far.read_exact(&mut [0; 1_000]).await.unwrap();
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = lost(&mut rig) => assert_eq!(started.elapsed(), 11 * HEARTBEAT, "two after the last bytes were taken"),
            () = taken => {}
        }
    }

    // A flush that took longer than two heartbeats was cut, whatever the request's own limit.
    #[tokio::test(start_paused = true)]
    async fn the_caller_of_the_request_that_is_due_has_its_own_patience() {
        let mut rig = rig(1 << 16);
        let (first, _second) = (put(&mut rig, 1), put(&mut rig, 1));
        tokio::select! {
            () = lost(&mut rig) => panic!("given up while its caller waits"),
            () = sleep(5 * HEARTBEAT) => {}
        }
        drop(first);
        let started = Instant::now();
        lost(&mut rig).await;
        assert!(started.elapsed() <= HEARTBEAT, "the second is not due: it excuses nothing");
    }

    // The first write that failed ended the connection, with answers unread.
    #[tokio::test]
    async fn what_was_answered_before_nothing_could_be_sent_any_more_is_answered() {
        let (mut rig, is_dead) = (rig(1 << 16), Arc::<AtomicBool>::default());
        let (near, mut far) = duplex(1 << 16);
        rig.link = Link::over(Box::new(HalfDead(near, Arc::clone(&is_dead))), 1 << 20);
        let answered = put(&mut rig, 1);
        send(&mut rig.task, &mut rig.link).await;
        rig.task.settle(&rig.link);
        is_dead.store(true, Relaxed);
        let unsent = put(&mut rig, 1);
        far.write_all(b"{\"Base\":{\"id\":0,\"status\":200,\"message\":\"\",\"revision\":1}}\n").await.unwrap();
        drop(far);
        let Stop::Lost(error) = rig.task.serve(&mut rig.link).await else { panic!("it is lost") };
        rig.task.detach(&rig.link, &error);
        assert_eq!(answered.await.unwrap().unwrap().0.revision, Some(1));
        assert_eq!(rig.task.again.len(), 1, "of the other nothing was sent: it is sent on the next connection");
        drop(unsent);
    }

    // 256 requests were encoded at a time, however long they were.
    #[tokio::test]
    async fn what_waits_to_be_sent_is_encoded_when_there_is_room() {
        let mut rig = rig(1_000);
        let (asks, asks_rx) = mpsc::channel(100);
        rig.task.asks = asks_rx;
        let mut answers = Vec::new();
        for _ in 0..100 {
            let mut request = Request::new(Kind::Put, "a");
            request.value = Some(vec![b'x'; 100_000].into());
            let (reply, answer) = oneshot::channel();
            asks.try_send(Ask { slot: Arc::new(Slot::new(request)), epoch: None, reply }).unwrap();
            answers.push(answer);
        }
        send(&mut rig.task, &mut rig.link).await;
        assert!(rig.link.encoded() < 200_000, "{} bytes encoded", rig.link.encoded());
        assert_eq!(rig.task.pending.places.len(), 1);
        // It keeps no value of which the socket has some.
        let (mut far, mut taken) = (rig.far, vec![0; 1_000]);
        for _ in 0..150 {
            far.read_exact(&mut taken).await.unwrap();
            tokio::task::yield_now().await; // for streams have a budget for each turn
            send(&mut rig.task, &mut rig.link).await;
            rig.task.settle(&rig.link);
        }
        let kept = rig.task.pending.iter().filter(|pending| match &pending.what {
            What::Ask(_, request) => request.value.is_some(),
            _ => false,
        });
        assert_eq!((rig.task.pending.places.len(), kept.count()), (3, 1), "the third is encoded, and not begun");
    }

    // It was sent after its caller had received the error that says it never would be.
    #[tokio::test]
    async fn what_is_given_up_is_cut_out_of_what_waits_to_be_sent() {
        let mut rig = rig(10);
        let mut asks = Vec::new();
        for key in ["first", "given.up", "last"] {
            let (slot, (reply, answer)) = (Arc::new(Slot::new(Request::new(Kind::Delete, key))), oneshot::channel());
            rig.task.ask(&mut rig.link, Ask { slot: Arc::clone(&slot), epoch: None, reply });
            asks.push((slot, answer));
        }
        send(&mut rig.task, &mut rig.link).await;
        rig.task.settle(&rig.link);
        assert!(asks[0].0.give_up(), "some of it is on its way");
        assert!(!asks[1].0.give_up(), "nothing of it is");
        let (mut sent, mut part) = (Vec::new(), [0; 10]);
        while !sent.ends_with(b"\"last\"}\n") {
            send(&mut rig.task, &mut rig.link).await;
            rig.task.settle(&rig.link);
            let len = rig.far.read(&mut part).await.unwrap();
            sent.extend_from_slice(&part[..len]);
        }
        let sent = String::from_utf8(sent).unwrap();
        assert_eq!((sent.lines().count(), sent.contains("given")), (2, false), "{sent}");
        // The answer to the last finds its caller.
        let mut body = Body::default();
        (body.id, body.status) = ("2".into(), status::OK);
        rig.task.answer(Box::new(body), Epoch::default()).unwrap();
        assert!(asks.pop().unwrap().1.await.unwrap().is_ok());
        assert_eq!(rig.task.writes.total, 1);
    }

    // Values of requests that were given up stayed for as long as the server was away: 400 of 1 MiB.
    #[test]
    fn a_request_that_is_given_up_takes_its_value_with_it() {
        let mut request = Request::new(Kind::Put, "a");
        request.value = Some(vec![b'x'; 1_000].into());
        let slot = Slot::new(request.clone());
        assert!(!slot.give_up());
        assert!(slot.take().is_none());
        let slot = Slot::new(request.clone());
        assert!(slot.take().is_some() && slot.give_up(), "it is on its way");
        let slot = Slot::new(request.clone());
        let taken = slot.take().unwrap();
        slot.unsend();
        assert!(slot.send_again());
        slot.unsend();
        assert!(!slot.give_up() && !slot.send_again(), "the socket had nothing of it");
        assert!(!slot.put_back(taken));
        let slot = Slot::new(request);
        let taken = slot.take().unwrap();
        assert!(slot.put_back(taken) && slot.take().is_some());
    }

    // The silence of a dead server was hidden by one patient request.
    #[tokio::test(start_paused = true)]
    async fn a_server_that_promised_signs_of_life_and_gives_none_is_given_up() {
        let mut rig = rig(1 << 16);
        rig.link.patience = Some(Duration::from_secs(60));
        let (_patient, started) = (put(&mut rig, 1), Instant::now());
        lost(&mut rig).await;
        assert_eq!(started.elapsed(), Duration::from_secs(60));
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_gives_signs_of_life_may_take_its_time() {
        let mut rig = rig(1 << 16);
        rig.link.patience = Some(Duration::from_secs(60));
        let (_patient, started) = (put(&mut rig, 1), Instant::now());
        let mut far = std::mem::replace(&mut rig.far, duplex(1).0);
        let signs = async {
            for _ in 0..20 {
                sleep(Duration::from_secs(5)).await;
                far.write_all(b"\"Alive\"\n").await.unwrap();
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = lost(&mut rig) => assert!(started.elapsed() >= Duration::from_secs(160)),
            () = signs => {}
        }
    }

    #[tokio::test]
    async fn a_read_goes_ahead_of_the_writes_that_it_does_not_overlap() {
        let mut rig = rig(1 << 16);
        rig.link.features = Features::AHEAD;
        let _put = put(&mut rig, 1);
        let mut ahead = |kind: Kind, key: &'static str| rig.task.overlaps(&Request::new(kind, key));
        assert!(ahead(Kind::Get, "a") && ahead(Kind::Exists, "a") && ahead(Kind::List, "*"));
        assert!(!ahead(Kind::Get, "b.*") && !ahead(Kind::Get, "a.*") && !ahead(Kind::Health, ""));
        let mut after = Request::new(Kind::Get, "*");
        after.after = Some("b".into());
        assert!(rig.task.overlaps(&after));
        let (reply, _answer) = oneshot::channel();
        let delete = Request::new(Kind::Delete, "z.*");
        rig.task.ask(&mut rig.link, Ask { slot: Arc::new(Slot::new(delete)), epoch: None, reply });
        assert!(rig.task.overlaps(&Request::new(Kind::Get, "b")));
        for id in 0..2 {
            let mut body = Body::default();
            (body.id, body.status) = (id.to_string(), status::OK);
            rig.task.answer(Box::new(body), Epoch::default()).unwrap();
        }
        assert!(!rig.task.overlaps(&Request::new(Kind::Get, "a")) && rig.task.writes.total == 0);
    }

    // A server that sent without end kept a runtime of one thread from all other tasks.
    #[tokio::test]
    async fn others_have_their_turn_while_a_server_sends_without_end() {
        let mut rig = rig(1 << 22);
        let mut far = std::mem::replace(&mut rig.far, duplex(1).0);
        let update = b"{\"Update\":{\"key\":\"a\",\"revision\":1,\"skipped\":0,\"value\":[1]}}\n";
        far.write_all(&update.repeat((4 << 20) / update.len())).await.unwrap();
        drop(far);
        let turns = async {
            let mut turns = 0;
            loop {
                tokio::task::yield_now().await;
                turns += 1;
                if turns > 20 {
                    return;
                }
            }
        };
        tokio::select! {
            biased;
            () = turns => {}
            () = lost(&mut rig) => panic!("no other task had a turn"),
        }
    }

    // Of two puts of one key the older could end as the newer, when the connection was lost twice.
    #[tokio::test]
    async fn what_is_sent_again_keeps_its_order_over_two_losses() {
        let mut rig = rig(1 << 20);
        let (asks, asks_rx) = mpsc::channel(100);
        rig.task.asks = asks_rx;
        let mut answers = Vec::new();
        for n in 0..3 {
            let mut request = Request::new(Kind::Put, "a");
            request.value = Some(vec![n; 100_000].into());
            let (reply, answer) = oneshot::channel();
            asks.try_send(Ask { slot: Arc::new(Slot::new(request)), epoch: None, reply }).unwrap();
            answers.push(answer);
        }
        let lost = Error::lost(BrokenPipe.into());
        for _ in 0..2 {
            // Each connection ends before its socket takes anything.
            let (near, _far) = duplex(1 << 20);
            let mut link = Link::over(Box::new(HalfDead(near, Arc::new(true.into()))), 1 << 20);
            send(&mut rig.task, &mut link).await;
            rig.task.settle(&link);
            rig.task.detach(&link, &lost);
            while let Ok(ask) = rig.task.asks.try_recv() {
                rig.task.again.push_back(ask);
            }
        }
        let values = rig.task.again.iter().map(|ask| ask.slot.take().unwrap().value.unwrap()[0]);
        assert_eq!(values.collect::<Vec<_>>(), [0, 1, 2]);
    }

    // Answered reads behind a write that was held counted as under way.
    #[tokio::test]
    async fn reads_go_on_while_a_write_is_held() {
        let mut rig = rig(1 << 20);
        rig.link.features = Features::AHEAD;
        let (asks, asks_rx) = mpsc::channel(10);
        rig.task.asks = asks_rx;
        let _held = put(&mut rig, 1);
        for id in 1..=PENDING_MAX as u64 + 100 {
            let (reply, mut answer) = oneshot::channel();
            let slot = Arc::new(Slot::new(Request::new(Kind::Get, "b")));
            asks.try_send(Ask { slot, epoch: None, reply }).unwrap();
            tokio::task::yield_now().await;
            send(&mut rig.task, &mut rig.link).await;
            rig.task.settle(&rig.link);
            let mut body = Body::default();
            (body.id, body.status) = (id.to_string(), status::OK);
            rig.task.answer(Box::new(body), Epoch::default()).unwrap();
            answer.try_recv().unwrap().unwrap();
        }
    }
}
