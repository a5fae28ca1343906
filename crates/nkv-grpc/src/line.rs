//! What one connection holds: bytes of requests that arrive, of answers and events that the peer has not taken, and the
//! mailboxes of its watches. All of it counts in the budget of the node.

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nkv_core::mailbox::{Backlog, Observer};
use nkv_node::{Handle, Held, Holder, Peer, Place};
use tokio::sync::{Mutex as Turns, Notify};
use tokio::time::Instant;

use crate::connection::STREAM_WINDOW;
use crate::door::Inner;
use crate::node_kv::millis;

/// Bytes of answers that a peer may leave untaken before its calls that read are answered no further.
const ANSWERS_LEN_MAX: usize = 4 << 20;

/// Long requests of one connection that may wait for room. Each holds a window of its stream meanwhile, which counts.
const ARRIVALS_WAITING_MAX: usize = 48;

/// One connection.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) handle: Handle,
    pub(crate) peer: Peer,
    pub(crate) sending: Arc<Sending>,
    /// Held while a long answer is made: one at a time.
    pub(crate) long_answers: Turns<()>,
    pub(crate) door: Arc<Inner>,
    arriving: Mutex<Requests>,
    /// Calls that are open, but for streams; and streams.
    unary: AtomicUsize,
    streams: AtomicUsize,
    /// When the last call ended, in ms after the opening, if that is asked for.
    idle_since_ms: AtomicU64,
    address: Box<str>,
    _place: Option<Place>,
}

/// The requests that are not whole.
#[derive(Debug, Default)]
struct Requests {
    bytes: usize,
    /// Those that wait for room, and those that have it.
    waiting: usize,
    with_room: usize,
    /// Since when the node keeps the peer waiting: it does while no long request has room.
    kept_since: Option<Instant>,
}

impl Requests {
    fn hold(&self, peer: &Peer, served: bool) {
        let windows = self.waiting.saturating_mul(STREAM_WINDOW as usize);
        peer.hold(self.bytes.saturating_add(windows), served);
    }

    fn note_waiting(&mut self, peer: &Peer) {
        match self.kept_since {
            None if self.waiting > 0 && self.with_room == 0 => {
                self.kept_since = Some(Instant::now());
                peer.begin_waiting();
            }
            Some(since) if self.waiting == 0 || self.with_room > 0 => {
                self.kept_since = None;
                peer.end_waiting(since.elapsed());
            }
            _ => {}
        }
    }
}

/// The sending side of a connection.
#[derive(Debug)]
pub(crate) struct Sending {
    pub(crate) answers: Untaken,
    pub(crate) events: Untaken,
    /// When a write to the socket came to wait, in ms after the opening and 1; 0 if none does.
    blocked_since_ms: AtomicU64,
    opened: Instant,
    watches: Mutex<Watches>,
    /// Whether the peer is to leave or the node stops is to be looked at.
    look_anew: Notify,
}

#[derive(Default)]
struct Watches {
    next_id: u64,
    by_id: HashMap<u64, Arc<Observer>>,
}

impl std::fmt::Debug for Watches {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watches").field("len", &self.by_id.len()).finish()
    }
}

/// Bytes that the peer has not taken.
#[derive(Debug)]
pub(crate) struct Untaken {
    bytes: AtomicUsize,
    /// When it took some last, or there came to be any, in ms after the opening.
    since_ms: AtomicU64,
    opened: Instant,
    /// The same of all connections, of answers.
    total: Option<Arc<AtomicUsize>>,
    taken: Notify,
}

impl Untaken {
    fn new(opened: Instant, total: Option<Arc<AtomicUsize>>) -> Self {
        let (bytes, since_ms, taken) = Default::default();
        Untaken { bytes, since_ms, opened, total, taken }
    }

    fn add(&self, len: usize) {
        if self.bytes.fetch_add(len, Relaxed) == 0 {
            self.since_ms.store(millis(self.opened.elapsed()), Relaxed);
        }
        self.total.iter().for_each(|total| _ = total.fetch_add(len, Relaxed));
    }

    fn take(&self, len: usize) {
        let had = self.bytes.fetch_sub(len, Relaxed);
        self.total.iter().for_each(|total| _ = total.fetch_sub(len, Relaxed));
        if had > len {
            self.since_ms.store(millis(self.opened.elapsed()), Relaxed);
        }
        self.taken.notify_waiters();
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.load(Relaxed)
    }

    /// For how long the peer has taken nothing of it.
    pub(crate) fn stalled_for(&self) -> Duration {
        if self.len() == 0 {
            return Duration::ZERO;
        }
        self.opened.elapsed().saturating_sub(Duration::from_millis(self.since_ms.load(Relaxed)))
    }

    /// Waits until at most `len` bytes are held.
    async fn at_most(&self, len: usize) {
        loop {
            let mut taken = std::pin::pin!(self.taken.notified());
            taken.as_mut().enable();
            if self.len() <= len {
                return;
            }
            taken.await;
        }
    }
}

/// Which of the two counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Answer,
    Event,
}

/// A number of bytes, counted until this is dropped.
#[derive(Debug)]
pub(crate) struct Counted {
    sending: Arc<Sending>,
    kind: Kind,
    len: usize,
}

impl Counted {
    pub(crate) fn new(sending: &Arc<Sending>, kind: Kind, len: usize) -> Self {
        let mut counted = Counted { sending: Arc::clone(sending), kind, len: 0 };
        counted.grow(len);
        counted
    }

    pub(crate) fn grow(&mut self, len: usize) {
        if len > 0 {
            self.sending.of(self.kind).add(len);
            self.len = self.len.saturating_add(len);
        }
    }

    /// Counts a part of it by itself.
    pub(crate) fn split(&mut self, len: usize) -> Counted {
        let len = len.min(self.len);
        self.len = self.len.saturating_sub(len);
        Counted { sending: Arc::clone(&self.sending), kind: self.kind, len }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if self.len > 0 {
            self.sending.of(self.kind).take(self.len);
        }
    }
}

impl Sending {
    pub(crate) fn new(handle: &Handle) -> Arc<Self> {
        let opened = Instant::now();
        let (blocked_since_ms, watches, look_anew) = Default::default();
        let answers = Untaken::new(opened, Some(handle.budget().waiting()));
        let events = Untaken::new(opened, None);
        Arc::new(Sending { answers, events, blocked_since_ms, opened, watches, look_anew })
    }

    fn of(&self, kind: Kind) -> &Untaken {
        match kind {
            Kind::Answer => &self.answers,
            Kind::Event => &self.events,
        }
    }

    /// Notes whether a write to the socket waits.
    pub(crate) fn note_write(&self, waits: bool) {
        let before = self.blocked_since_ms.load(Relaxed);
        if !waits && before != 0 {
            self.blocked_since_ms.store(0, Relaxed);
        } else if waits && before == 0 {
            self.blocked_since_ms.store(millis(self.opened.elapsed()).saturating_add(1), Relaxed);
        }
    }

    /// For how long a write to the socket has waited.
    pub(crate) fn blocked_for(&self) -> Duration {
        match self.blocked_since_ms.load(Relaxed) {
            0 => Duration::ZERO,
            since => self.opened.elapsed().saturating_sub(Duration::from_millis(since)),
        }
    }

    /// Waits until the node wants the connection to look whether it is to end.
    pub(crate) async fn look_anew(&self) {
        self.look_anew.notified().await;
    }

    fn watches(&self) -> MutexGuard<'_, Watches> {
        self.watches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the backlog in the mailbox of a watch, until this is dropped.
    pub(crate) fn observe(self: &Arc<Self>, observer: Arc<Observer>) -> Observed {
        let mut watches = self.watches();
        let id = watches.next_id;
        watches.next_id = id.wrapping_add(1);
        watches.by_id.insert(id, observer);
        Observed { sending: Arc::clone(self), id }
    }
}

/// The mailbox of a watch is counted.
#[derive(Debug)]
pub(crate) struct Observed {
    sending: Arc<Sending>,
    id: u64,
}

impl Drop for Observed {
    fn drop(&mut self) {
        let observer = self.sending.watches().by_id.remove(&self.id);
        drop(observer);
    }
}

/// What the node sees of a connection.
#[derive(Debug)]
pub(crate) struct Seen(pub(crate) Arc<Sending>);

impl Seen {
    /// A copy: what is done with them takes locks of the store.
    fn watches(&self) -> Vec<Arc<Observer>> {
        self.0.watches().by_id.values().cloned().collect()
    }
}

impl Holder for Seen {
    fn held(&self) -> Held {
        let Backlog { own_bytes: queue, event_bytes: changes, .. } = self.backlog();
        let own = self.0.answers.len().saturating_add(self.0.events.len());
        Held { own, queue, changes, ..Held::default() }
    }

    fn backlog(&self) -> Backlog {
        let mut all = Backlog::default();
        for one in self.watches().iter().map(|watch| watch.backlog()) {
            all.queued = all.queued.saturating_add(one.queued);
            all.skipped = all.skipped.saturating_add(one.skipped);
            all.own_bytes = all.own_bytes.saturating_add(one.own_bytes);
            all.event_bytes = all.event_bytes.saturating_add(one.event_bytes);
            all.slack = all.slack.saturating_add(one.slack);
        }
        all
    }

    fn busy_for(&self) -> Duration {
        self.0.answers.stalled_for().max(self.0.events.stalled_for()).max(self.0.blocked_for())
    }

    fn give_up(&self) {
        self.watches().iter().for_each(|watch| watch.give_up());
    }

    fn wake(&self) {
        self.0.look_anew.notify_one();
    }
}

impl Line {
    pub(crate) fn new(door: Arc<Inner>, handle: Handle, address: &str, place: Option<Place>) -> Arc<Self> {
        let sending = Sending::new(&handle);
        let peer = handle.peer(address, Box::new(Seen(Arc::clone(&sending))));
        let (long_answers, arriving, unary, streams, idle_since_ms) = Default::default();
        Arc::new(Line {
            handle,
            peer,
            sending,
            long_answers,
            door,
            arriving,
            unary,
            streams,
            idle_since_ms,
            address: address.into(),
            _place: place,
        })
    }

    /// The peer, as people are shown it.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Waits until the peer has taken most of its answers, and until there is room for more in the budget: before an answer
    /// is made. There must be no other wait between this and [`answer`](Self::answer).
    pub(crate) async fn room_for_answer(&self) {
        self.handle.budget().room(self.door.options.stall_limit).await;
        self.sending.answers.at_most(ANSWERS_LEN_MAX).await;
    }

    /// Counts an answer of `len` bytes.
    pub(crate) fn answer(&self, len: usize) -> Counted {
        Counted::new(&self.sending, Kind::Answer, len)
    }

    fn requests(&self) -> MutexGuard<'_, Requests> {
        self.arriving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `more` bytes of a request have arrived.
    pub(crate) fn arrived(&self, more: usize) {
        let mut requests = self.requests();
        requests.bytes = requests.bytes.saturating_add(more);
        requests.hold(&self.peer, false);
    }

    /// A request of `len` bytes is served, or given up.
    pub(crate) fn served(&self, len: usize) {
        let mut requests = self.requests();
        requests.bytes = requests.bytes.saturating_sub(len);
        requests.hold(&self.peer, true);
    }

    /// One more long request is to wait for room; false if too many do.
    pub(crate) fn begin_waiting(&self) -> bool {
        let mut requests = self.requests();
        if requests.waiting >= ARRIVALS_WAITING_MAX {
            return false;
        }
        requests.waiting = requests.waiting.saturating_add(1);
        requests.note_waiting(&self.peer);
        requests.hold(&self.peer, false);
        true
    }

    /// It waits no more.
    pub(crate) fn end_waiting(&self) {
        let mut requests = self.requests();
        requests.waiting = requests.waiting.saturating_sub(1);
        requests.note_waiting(&self.peer);
        requests.hold(&self.peer, false);
    }

    /// A long request has room, or gives it back.
    pub(crate) fn note_room(&self, has_room: bool) {
        let mut requests = self.requests();
        requests.with_room =
            if has_room { requests.with_room.saturating_add(1) } else { requests.with_room.saturating_sub(1) };
        requests.note_waiting(&self.peer);
    }

    /// A call begins.
    pub(crate) fn begin_call(self: &Arc<Self>, is_stream: bool) -> Call {
        let open = if is_stream { &self.streams } else { &self.unary };
        open.fetch_add(1, Relaxed);
        Call { line: Arc::clone(self), is_stream }
    }

    /// Whether calls are open that are not streams.
    pub(crate) fn has_unary_calls(&self) -> bool {
        self.unary.load(Relaxed) > 0
    }

    /// For how long there has been no call.
    pub(crate) fn idle_for(&self) -> Duration {
        if self.has_unary_calls() || self.streams.load(Relaxed) > 0 {
            return Duration::ZERO;
        }
        let since = Duration::from_millis(self.idle_since_ms.load(Relaxed));
        self.sending.opened.elapsed().saturating_sub(since)
    }
}

/// A call that is open until this is dropped.
#[derive(Debug)]
pub(crate) struct Call {
    line: Arc<Line>,
    is_stream: bool,
}

impl Drop for Call {
    fn drop(&mut self) {
        let open = if self.is_stream { &self.line.streams } else { &self.line.unary };
        open.fetch_sub(1, Relaxed);
        if self.line.door.options.idle_limit.is_some() {
            self.line.idle_since_ms.store(millis(self.line.sending.opened.elapsed()), Relaxed);
        }
    }
}
