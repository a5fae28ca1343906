//! One connection: reads the available bytes, has every whole request in it served, in order, writes the answers and the
//! notifications, and reads on. It is one task, polled by hand: nothing is handed from one task to another on the way.
//!
//! What is read goes through a buffer that all connections of a thread share; only a part of a request that has not come
//! whole is kept in one of the connection's own.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use nkv_node::{Place, Room, SharedWaker};
use nkv_notify_tcp::{NotifierOptions, Outbox, TcpNotifier, WriterEnd, spare};
use nkv_protocol::{Answer, BaseFields, Chunks, Decoder, Kind, Request, alive, status};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use tracing::debug;

use crate::dispatch::{Hold, Session};
use crate::inner::Inner;
use crate::oldest;
use crate::options::{Options, millis};
use crate::socket::Socket;
#[cfg(feature = "text-wire")]
use crate::text_wire::{self, Framing, Speaks};

/// The number of bytes that are asked of the system at a time.
const READ_LEN: usize = 64 << 10;

/// The same when there is no room for values.
const SHORT_READ_LEN: usize = 4 << 10;

/// A peer that sends this much at a time gives others their turn. A buffer that had this much is not kept for what is
/// left in it.
const TURN_LEN: usize = 16 << 10;

/// The number of bytes of changes that may wait for a peer that keeps up, each to be sent, before they are conflated.
const SLACK: usize = 64 << 10;

/// Answers are written once there are this many bytes of them.
const SEND_LEN: usize = 64 << 10;

/// The time for which a deadline that has passed is not held against the peer.
const GRACE: Duration = Duration::from_millis(500);

/// How long a refused peer has to take the answer that says so.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(2);

thread_local! {
    static INPUT: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Why a connection reads no more.
enum End {
    /// The peer's sending half ended, or the server stops.
    Quiet,
    /// The message in hand is not to be had.
    Refused,
    /// What was awaited of the peer did not come in time.
    Overdue,
    /// All connections hold too much, and this one the most.
    Evicted,
    /// The sending side has ended.
    Writer(WriterEnd),
    /// The peer speaks a later wire of the first nkv.
    #[cfg(feature = "text-wire")]
    Text(Framing),
}

/// Serves a connection until either side ends it.
pub(crate) async fn serve(socket: Socket, door: Arc<Inner>, place: Place) {
    if let Err(error) = socket.prepare() {
        return debug!(%error, "a connection ended before it began");
    }
    let mut connection = Connection::new(socket, door, place.peer());
    let end = poll_fn(|cx| connection.poll(cx)).await.unwrap_or_else(|error| End::Writer(WriterEnd::Failed(error)));
    // In memory of its own: a connection that goes on takes none for its end.
    #[cfg(feature = "text-wire")]
    if let End::Text(framing) = end {
        let Connection { socket, buffer, door, session, .. } = connection;
        // It is a peer of its own kind from now on.
        drop(session);
        return Box::pin(text_wire::serve(socket, buffer, framing, door, place)).await;
    }
    Box::pin(finish(connection, end, place)).await;
}

/// Writes what is left to be written, and says how the connection ended.
async fn finish(mut connection: Connection, end: End, place: Place) {
    connection.let_go();
    let is_reset = connection.is_to_be_reset();
    let end = match end {
        End::Writer(end) => end,
        end => {
            let was_evicted = matches!(end, End::Evicted);
            if was_evicted {
                connection.log_eviction(&place);
                if connection.session.peer.held() > NotifierOptions::default().waiting_max {
                    return; // of one that has read nothing of what it holds, no reading is to be expected
                }
            }
            // At a quiet end the peer may take its time, as long as it takes something.
            let patience = if matches!(end, End::Quiet) { Duration::MAX } else { LAST_WORDS_LIMIT };
            let rest = async {
                let end = poll_fn(|cx| connection.poll_rest(cx, was_evicted)).await;
                if is_reset && matches!(end, Some(WriterEnd::Finished)) {
                    oldest::arrived(connection.socket.tcp()).await;
                }
                end
            };
            match tokio::time::timeout(patience, rest).await {
                Ok(Some(end)) => end,
                Ok(None) => return connection.log_eviction(&place),
                Err(_) => return debug!(peer = %place, "connection closed; its last answer was not taken"),
            }
        }
    };
    match end {
        WriterEnd::Finished if connection.session.has_overflowed() => {
            let what = format_args!("connection closed: more deletes waited for {place} than it may lag behind");
            connection.door.handle.log().warn("lag", what);
        }
        WriterEnd::Finished => debug!(peer = %place, "connection closed"),
        WriterEnd::Stalled => {
            let limit = connection.door.options.stall_limit;
            let what = format_args!("connection cut: {place} took nothing for {limit:?}");
            connection.door.handle.log().warn("stalled", what);
        }
        WriterEnd::Failed(error) => debug!(peer = %place, %error, "connection lost"),
    }
}

/// What deadlines count from.
struct Since {
    opened: Instant,
    /// When a request was served last; without a limit for idle connections, whether one was.
    served: Option<Instant>,
    /// When the request that is on its way began to come.
    begun: Option<Instant>,
    /// Bytes that have come since a request was served.
    unserved_len: usize,
    /// The end of the grace after a deadline that has passed.
    grace: Option<Instant>,
}

/// What a peer was sent last of how stale the node is.
struct Stale {
    seen: watch::Receiver<Option<std::time::Instant>>,
    since: Option<std::time::Instant>,
}

/// Waits until there is something else to say.
async fn changed(mut sent: Stale) -> Stale {
    match sent.seen.wait_for(|since| *since != sent.since).await.map(|since| *since) {
        Ok(since) => Stale { since, ..sent },
        // The node has ended, and this connection with it.
        Err(_) => std::future::pending().await,
    }
}

struct Connection {
    socket: Socket,
    outbox: Outbox,
    decoder: Decoder,
    /// The part of a request that has not come whole, or requests that are held up.
    buffer: BytesMut,
    /// How much memory it takes.
    room: usize,
    /// The buffer may hold a whole request.
    has_request: bool,
    /// The peer sends no more.
    is_at_end: bool,
    /// It began as one of the oldest clients does.
    is_oldest: bool,
    /// What holds up the requests, and since when.
    hold: Option<Hold>,
    held_since: Instant,
    /// Room for the long request that is on its way.
    arrival: Option<Room>,
    /// What others were to be given was given: whatever comes next is not held up for that.
    is_admitted: bool,
    session: Session,
    since: Since,
    timer: Option<Pin<Box<Sleep>>>,
    /// When the next sign of life may be due, and how many bytes had been written when that was set.
    sign: Option<(Pin<Box<Sleep>>, u64)>,
    /// Waits until there is something to say of how stale the node is.
    stale: Option<Pin<Box<dyn Future<Output = Stale> + Send>>>,
    door: Arc<Inner>,
    /// Wakes this task with all others that are notified of the same batch: see
    /// [`Handle::waker`](nkv_node::Handle::waker).
    change_waker: SharedWaker,
    /// Bytes that were served since this connection last gave others their turn.
    turn_len: usize,
}

impl Connection {
    fn new(socket: Socket, door: Arc<Inner>, peer: &str) -> Self {
        let (notifier, outbox) = TcpNotifier::new(NotifierOptions {
            stall_limit: door.options.stall_limit,
            waiting_total: door.handle.budget().waiting(),
            slack: SLACK,
            ..NotifierOptions::default()
        });
        Connection {
            socket,
            outbox,
            decoder: Decoder::new(door.options.limits()),
            buffer: BytesMut::new(),
            room: 0,
            has_request: false,
            is_at_end: false,
            is_oldest: false,
            hold: None,
            held_since: Instant::now(),
            arrival: None,
            is_admitted: false,
            session: Session::new(Arc::clone(&door), notifier, peer),
            since: Since { opened: Instant::now(), served: None, begun: None, unserved_len: 0, grace: None },
            timer: None,
            sign: None,
            stale: None,
            door,
            change_waker: SharedWaker::default(),
            turn_len: 0,
        }
    }

    /// Reads no more: lets go of what was read and not served, and of the subscriptions, before the answers are waited for.
    fn let_go(&mut self) {
        (self.buffer, self.hold, self.timer, self.sign, self.arrival) = (BytesMut::new(), None, None, None, None);
        self.stale = None;
        self.session.end();
        self.session.peer.hold(0, true);
        self.session.close();
    }

    /// Whether the connection ends with a reset: one of the oldest clients that did not end it, nor greet in between.
    fn is_to_be_reset(&self) -> bool {
        let is_reset = self.is_oldest && self.outbox.is_paced() && !self.is_at_end;
        if self.is_oldest && !is_reset {
            oldest::end_in_order(&self.socket);
        }
        is_reset
    }

    /// Writes what is left; `None` if it is to give that up.
    fn poll_rest(&mut self, cx: &mut Context<'_>, was_evicted: bool) -> Poll<Option<WriterEnd>> {
        let change_waker = cx.waker().clone();
        let end = self.outbox.poll(cx, &change_waker, &mut self.socket).map(Some);
        if end.is_pending() && self.session.peer.is_evicted() && !was_evicted {
            return Poll::Ready(None);
        }
        end
    }

    fn log_eviction(&self, place: &Place) {
        let held = self.session.peer.evicted_with();
        let what = format_args!("connection closed: all hold too much, and {place} the most, {held} bytes");
        self.door.handle.log().warn("evicted", what);
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<End>> {
        let mut shared = std::mem::take(&mut self.change_waker);
        let waker = self.door.handle.waker(&mut shared, cx.waker());
        let mut end = self.poll_with(cx, waker);
        while end.is_pending() && self.session.wants_signs() && self.poll_sign(cx).is_ready() {
            end = self.poll_with(cx, waker);
        }
        while end.is_pending() && self.poll_stale(cx).is_ready() {
            end = self.poll_with(cx, waker);
        }
        self.change_waker = shared;
        end
    }

    /// Gives a sign of life when one is due: requests are kept waiting, and nothing was written for a while. The timer is not
    /// set anew for each request: what was written shows whether one came and went meanwhile.
    fn poll_sign(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.hold.is_none() && !self.session.has_writes() {
            self.sign = self.sign.take().filter(|(timer, _)| !timer.is_elapsed());
            return Poll::Pending;
        }
        let (interval, written) = (self.door.options.alive_interval(), self.outbox.written());
        let (timer, before) = self.sign.get_or_insert_with(|| (Box::pin(sleep(interval)), written));
        while timer.as_mut().poll(cx).is_ready() {
            timer.set(sleep(interval));
            if std::mem::replace(before, written) == written && self.outbox.is_empty() {
                let mut out = spare();
                alive(&mut out);
                self.outbox.send(out);
                return Poll::Ready(());
            }
        }
        Poll::Pending
    }

    /// Says that the node is stale, or is so no more. A peer that does not read is sent it once it does.
    fn poll_stale(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.session.wants_stale() {
            self.stale = None;
            return Poll::Pending;
        }
        if !self.outbox.is_empty() {
            return Poll::Pending;
        }
        if self.stale.is_none() {
            self.stale = self.door.handle.stale().map(|seen| Box::pin(changed(Stale { seen, since: None })) as _);
        }
        let Some(waiting) = &mut self.stale else { return Poll::Pending };
        let stale = ready!(waiting.as_mut().poll(cx));
        let mut out = spare();
        nkv_protocol::stale(stale.since.map(|since| millis(since.elapsed())), &mut out);
        self.outbox.send(out);
        self.stale = Some(Box::pin(changed(stale)));
        Poll::Ready(())
    }

    fn poll_with(&mut self, cx: &mut Context<'_>, change_waker: &Waker) -> Poll<io::Result<End>> {
        loop {
            if let Poll::Ready(end) = self.outbox.poll(cx, change_waker, &mut self.socket) {
                return Poll::Ready(Ok(End::Writer(end)));
            }
            if self.session.peer.is_evicted() {
                return Poll::Ready(Ok(self.evict()));
            }
            if self.poll_writes(change_waker) {
                continue;
            }
            if self.hold.is_some() {
                ready!(self.poll_hold(cx));
                continue;
            }
            if self.outbox.is_full() {
                return Poll::Pending;
            }
            if self.has_request {
                if let Some(end) = self.serve_buffer() {
                    return Poll::Ready(Ok(end));
                }
                continue;
            }
            if self.is_at_end || self.session.peer.is_stopping() {
                // What was sent before is answered first.
                return if self.session.has_writes() { Poll::Pending } else { Poll::Ready(Ok(End::Quiet)) };
            }
            if self.turn_len >= TURN_LEN {
                self.turn_len = 0;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if let Some(len) = self.needs_room() {
                match self.door.handle.try_arrival(len) {
                    Some(room) => self.arrival = Some(room),
                    None => {
                        let arrival = self.door.handle.arrival(len);
                        self.hold_up(Hold::Arrival(Box::pin(arrival)));
                        continue;
                    }
                }
            }
            let had_relief = std::mem::take(&mut self.is_admitted);
            let end =
                if self.door.handle.budget().is_over() && !had_relief && self.socket.poll_read_ready(cx).is_ready() {
                    let relief = self.session.relief();
                    self.hold_up(relief);
                    None
                } else {
                    match self.poll_read(cx) {
                        Poll::Ready(end) => end?,
                        Poll::Pending => ready!(self.poll_deadline(cx)),
                    }
                };
            if let Some(end) = end {
                return Poll::Ready(Ok(end));
            }
        }
    }

    /// Whether writes that were under way are done, and were answered.
    fn poll_writes(&mut self, change_waker: &Waker) -> bool {
        let Poll::Ready(out) = self.session.poll_writes(&mut Context::from_waker(change_waker)) else { return false };
        self.outbox.send(out);
        if matches!(self.hold, Some(Hold::Writes)) {
            self.hold = None;
            self.end_waiting();
        }
        true
    }

    /// Until nothing holds up the requests any more.
    fn poll_hold(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self.hold.take() {
            None => {}
            hold @ Some(Hold::Writes) => {
                self.hold = hold;
                return Poll::Pending;
            }
            Some(Hold::Reading(reading)) if reading.needs_leave() && self.door.handle.budget().is_crowded() => {
                self.hold = Some(self.session.wait_for_leave(reading));
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Some(Hold::Leave(mut reading, mut leave)) => {
                let Poll::Ready(leave) = leave.as_mut().poll(cx) else {
                    self.hold = Some(Hold::Leave(reading, leave));
                    return Poll::Pending;
                };
                reading.give_leave(leave);
                self.hold = Some(Hold::Reading(reading));
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Some(Hold::Reading(reading)) => {
                let (mut out, is_ahead) = (spare(), reading.is_ahead);
                let left = self.session.read_on(reading, &mut out);
                self.send(out, is_ahead);
                if let Some(reading) = left {
                    self.session.peer.hold(self.room.saturating_add(reading.len()), true);
                    self.hold = Some(Hold::Reading(reading));
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                self.session.peer.hold(self.room, true);
            }
            Some(Hold::Room(mut room)) => {
                let Poll::Ready(room) = room.as_mut().poll(cx) else {
                    self.hold = Some(Hold::Room(room));
                    return Poll::Pending;
                };
                // Where the server stops there is none any more: the write is refused as others are.
                room.into_iter().for_each(|room| self.session.add_room(room));
            }
            Some(Hold::Arrival(mut room)) => {
                let Poll::Ready(room) = room.as_mut().poll(cx) else {
                    self.hold = Some(Hold::Arrival(room));
                    return Poll::Pending;
                };
                self.arrival = room.ok();
            }
            Some(Hold::Turns(mut turns)) => {
                if turns.as_mut().poll(cx).is_pending() {
                    self.hold = Some(Hold::Turns(turns));
                    return Poll::Pending;
                }
                // One that must wait once more, for room in its own outbox, asks again then.
                self.is_admitted = !self.outbox.is_full();
            }
        }
        self.end_waiting();
        Poll::Ready(())
    }

    fn hold_up(&mut self, hold: Hold) {
        self.session.peer.begin_waiting();
        (self.hold, self.held_since) = (Some(hold), Instant::now());
    }

    /// Until now it was the server that kept the peer waiting.
    fn end_waiting(&mut self) {
        let waited = self.held_since.elapsed();
        self.session.peer.end_waiting(waited);
        self.since.begun = self.since.begun.and_then(|begun| begun.checked_add(waited));
    }

    /// For how much there must be room before more of a long request is read. One whose length is not known yet counts as
    /// the longest.
    fn needs_room(&self) -> Option<usize> {
        if self.arrival.is_some() || !self.decoder.is_within_message() {
            return None;
        }
        match self.decoder.expected_len() {
            Some(len) => (len > READ_LEN).then_some(len),
            None => (self.buffer.len() >= READ_LEN).then(|| self.door.options.limits().line_len_max()),
        }
    }

    /// Reads the available bytes, once, and serves them.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<End>>> {
        let mut input = INPUT.take();
        input.resize(READ_LEN, 0);
        // What may have to wait for room is not to wait here.
        let is_short = self.arrival.is_none() && self.door.handle.is_short_of_room();
        let len = if is_short { SHORT_READ_LEN } else { READ_LEN };
        let mut read = ReadBuf::new(input.get_mut(..len).unwrap_or_default());
        let result = Pin::new(&mut self.socket).poll_read(cx, &mut read);
        let result = result.map_ok(|()| self.take_input(read.filled()));
        INPUT.set(input);
        result
    }

    fn take_input(&mut self, input: &[u8]) -> Option<End> {
        if input.is_empty() {
            // A last line without a newline is a line all the same: its sender meant it.
            self.is_at_end = true;
            self.buffer.extend_from_slice(b"\n");
            self.has_request = true;
            return None;
        }
        let deadline = self.deadline();
        self.since.unserved_len = self.since.unserved_len.saturating_add(input.len());
        let end = if self.buffer.is_empty() {
            let (len, end) = self.serve(input);
            self.keep(input.get(len..).unwrap_or_default());
            end
        } else {
            self.keep(input);
            self.serve_buffer()
        };
        end.or_else(|| {
            // Bytes that come and come and make no request hold no deadline off.
            self.is_overdue(deadline).then(|| self.overdue())
        })
    }

    /// Keeps bytes that are to be served with what comes next.
    fn keep(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            // Room for what is known to come, but never for much more than has come: an announcement costs nothing, nor does
            // a request that is held up. What comes in several pieces gets much more at once: buffers that grow in many
            // steps leave many holes.
            let missing = self.decoder.expected_len().unwrap_or(0).saturating_sub(self.buffer.len());
            let least = match self.buffer.len() {
                0 => 0,
                1..TURN_LEN => TURN_LEN,
                _ => READ_LEN.saturating_mul(2),
            };
            let least = least.max(bytes.len());
            self.buffer.reserve(missing.clamp(least, self.buffer.len().max(least)));
            self.room = self.buffer.capacity();
            self.buffer.extend_from_slice(bytes);
        }
        let served = self.since.begun.is_none();
        self.session.peer.hold(self.room, served);
    }

    fn serve_buffer(&mut self) -> Option<End> {
        let buffer = std::mem::take(&mut self.buffer);
        let (len, end) = self.serve(&buffer);
        self.buffer = buffer;
        self.buffer.advance(len);
        if !self.has_request && len > 0 {
            // What is left may be little, and would keep all the room that the rest took.
            self.buffer = BytesMut::from(&*self.buffer);
            self.room = self.buffer.capacity();
        }
        self.keep(&[]);
        end
    }

    /// Serves the whole requests at the start of `input`, until one has to wait; says how many bytes are done with.
    fn serve(&mut self, input: &[u8]) -> (usize, Option<End>) {
        #[cfg(feature = "text-wire")]
        if self.since.served.is_none() && !self.is_at_end {
            match text_wire::recognise(input) {
                Speaks::This(framing) => return (0, Some(End::Text(framing))),
                Speaks::Unknown => return (0, None),
                Speaks::Other => {}
            }
        }
        if self.since.served.is_none() && !self.is_oldest && oldest::is_one(&self.decoder, input) {
            self.is_oldest = true;
            oldest::begin(&self.socket, &mut self.outbox);
        }
        let (mut out, mut is_ahead) = (spare(), false);
        let (mut start, mut served) = (0, false);
        let mut end = None;
        self.has_request = false;
        while end.is_none() {
            if self.session.is_of_another_epoch() {
                end = Some(self.begin_anew());
                break;
            }
            let before = self.decoder.clone();
            let decoded = self.decoder.decode(input.get(start..).unwrap_or_default());
            let Some(item) = decoded.item else {
                start = start.saturating_add(decoded.consumed);
                break;
            };
            let close = item.as_ref().is_err_and(|refusal| refusal.close);
            let goes_ahead = item.as_ref().is_ok_and(|request| self.goes_ahead(request));
            if goes_ahead != std::mem::replace(&mut is_ahead, goes_ahead) && !out.is_empty() {
                self.send(std::mem::replace(&mut out, spare()), !goes_ahead);
            }
            if let Err(hold) =
                self.session.serve(item, std::mem::take(&mut self.is_admitted), &mut self.outbox, &mut out)
            {
                // It is read again when its time has come.
                (self.decoder, self.has_request) = (before, true);
                self.hold_up(hold);
                break;
            }
            self.session.give_room_back();
            self.arrival = None;
            start = start.saturating_add(decoded.consumed);
            served = true;
            if let Some(reading) = self.session.start_reading() {
                self.has_request = true;
                self.hold_up(reading);
                break;
            }
            end = close.then_some(End::Refused);
            if out.len() >= SEND_LEN {
                self.has_request = true;
                break;
            }
        }
        self.send(out, is_ahead);
        if self.session.start_writes() && self.hold.is_none() && !self.session.goes_ahead() {
            self.hold_up(Hold::Writes);
        }
        self.turn_len = self.turn_len.saturating_add(start);
        if served {
            let now = self.door.options.idle_limit.map(|_| Instant::now());
            let opened = self.since.opened;
            let unserved_len = input.len().saturating_sub(start);
            self.since = Since { opened, served: now.or(Some(opened)), begun: None, unserved_len, grace: None };
        }
        (start, end)
    }

    /// Whether the answer to a request may come before what waits to be written.
    fn goes_ahead(&self, request: &Request<'_>) -> bool {
        !matches!(request.kind, Kind::Subscribe | Kind::Unsubscribe) && self.session.is_ahead(request)
    }

    fn send(&mut self, answers: Chunks, is_ahead: bool) {
        if is_ahead {
            self.outbox.send_ahead(answers);
        } else {
            self.outbox.send(answers);
        }
    }

    /// When something must have come: the whole of a request that has begun, the first request, or any.
    fn deadline(&mut self) -> Option<Instant> {
        let Options { request_limit, first_byte_limit, idle_limit, .. } = self.door.options;
        if self.session.has_writes() {
            return None;
        }
        let deadline = if self.decoder.is_within_message() {
            let begun = *self.since.begun.get_or_insert_with(Instant::now);
            let parts = u32::try_from(self.since.unserved_len >> 20).unwrap_or(u32::MAX).saturating_add(1);
            begun.checked_add(request_limit.saturating_mul(parts))
        } else if let Some(served) = self.since.served {
            served.checked_add(idle_limit.filter(|_| !self.session.is_subscribed())?)
        } else {
            self.since.opened.checked_add(first_byte_limit)
        };
        deadline.max(self.since.grace)
    }

    /// Whether this deadline has passed, and some grace: if this process stood still, what came in time may wait yet.
    fn is_overdue(&mut self, deadline: Option<Instant>) -> bool {
        let now = Instant::now();
        if deadline.is_none_or(|deadline| deadline > now) || self.deadline() != deadline {
            return false;
        }
        if self.since.grace.is_none() {
            self.since.grace = now.checked_add(GRACE);
            return false;
        }
        true
    }

    fn overdue(&mut self) -> End {
        let message = if self.decoder.is_within_message() {
            format!("a request must be whole within {:?} for each MiB of it", self.door.options.request_limit)
        } else if self.since.served.is_none() {
            format!("no request came within {:?}", self.door.options.first_byte_limit)
        } else {
            format!("no request came for {:?}", self.door.options.idle_limit.unwrap_or_default())
        };
        self.refuse(status::TIMEOUT, &message);
        End::Overdue
    }

    /// Waits for the deadline.
    fn poll_deadline(&mut self, cx: &mut Context<'_>) -> Poll<Option<End>> {
        loop {
            let Some(deadline) = self.deadline() else {
                self.timer = None;
                return Poll::Pending;
            };
            if self.is_overdue(Some(deadline)) {
                return Poll::Ready(Some(self.overdue()));
            }
            match &mut self.timer {
                Some(timer) if timer.deadline() == deadline => ready!(timer.as_mut().poll(cx)),
                Some(timer) => timer.as_mut().reset(deadline),
                none => *none = Some(Box::pin(sleep_until(deadline))),
            }
        }
    }

    /// The client is to connect again: revisions that it knows are of an epoch that has ended.
    fn begin_anew(&mut self) -> End {
        self.refuse(status::UNAVAILABLE, "the data are of another epoch now: connect again");
        End::Refused
    }

    fn evict(&mut self) -> End {
        let message = "connections hold too much, and this one the most: send requests whole, read answers sooner";
        self.refuse(status::UNAVAILABLE, message);
        End::Evicted
    }

    fn refuse(&mut self, status: u16, message: &str) {
        let mut out = spare();
        Answer::to(Default::default(), &mut out).base(status, message, &BaseFields::default());
        self.outbox.send(out);
    }
}
