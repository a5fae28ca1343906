//! The sending side of a connection: collects pending output and writes it with as few system calls as possible.
//!
//! The owner of the socket polls the outbox. Output is collected in a buffer that all outboxes of a thread lend each
//! other, so that one that is idle, or whose peer keeps up, has none.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use nkv_core::mailbox::{Inbox, Item};
use nkv_protocol::{Chunks, ValueForm};
use tokio::io::AsyncWrite;
use tokio::time::{Sleep, sleep};

use crate::encode;
use crate::notifier::{Shared, waiting_len};

use self::pace::{Next, Pace};

mod pace;

/// How many bytes of events are gathered for one write, and after how many that were written others have their turn. What
/// is still in the mailbox can be conflated, what is gathered cannot; and with hundreds of peers that are notified of all
/// that a large delete deletes, a request waits for a turn of each of them.
const TURN_LEN: usize = 16 << 10;

/// The number of pieces that go into one vectored write.
const SLICES_MAX: usize = 64;

/// The number of buffers that are kept for the next outbox of the thread, and of bytes of each.
const SPARE_MAX: usize = 4;
const SPARE_LEN_MAX: usize = 256 << 10;

/// How a connection's sending side ended.
#[derive(Debug)]
pub enum WriterEnd {
    /// All that was to be sent is written.
    Finished,
    /// The peer took no byte for the stall limit.
    Stalled,
    /// Writing failed.
    Failed(io::Error),
}

/// What a connection is to send, answers and events alike, and how far that is. To be [polled](Self::poll).
#[derive(Debug)]
pub struct Outbox {
    inbox: Inbox<Box<Chunks>>,
    shared: Arc<Shared>,
    /// Gathered for the next write.
    out: Chunks,
    /// Answers that come before all that is in the mailbox.
    ahead: Option<Box<Chunks>>,
    /// Which encoding was most of it (an address), and how many bytes it had, before any of it was written: a long
    /// encoding is kept until the last of it is.
    gathered: (usize, usize),
    /// How many bytes of it [`Shared::wait_for`] has not counted: answers that the next write may well take at once.
    fresh: usize,
    /// The bytes to pass to [`Shared::flushed`] when all that was gathered is written.
    counted: usize,
    /// The peer has not taken all of it, and may take its time until then.
    stall: Option<Pin<Box<Sleep>>>,
    /// It has taken something since that was set.
    has_moved: bool,
    /// How many bytes were written.
    written: u64,
    /// Of them, what the writer was asked to send.
    flushed: u64,
    /// What the mailbox wakes.
    change_waker: Option<Waker>,
    /// Messages go out one at a time.
    pace: Option<Box<Pace>>,
}

thread_local! {
    static SPARE: RefCell<Vec<Chunks>> = const { RefCell::new(Vec::new()) };
    static ITEMS: RefCell<Vec<Item<Box<Chunks>>>> = const { RefCell::new(Vec::new()) };
}

/// An empty buffer for answers, with the room that another one left on this thread; [`Outbox::send`] gives it back.
#[must_use]
pub fn spare() -> Chunks {
    SPARE.with_borrow_mut(Vec::pop).unwrap_or_default()
}

fn give_back(chunks: Chunks) {
    if (1..=SPARE_LEN_MAX).contains(&chunks.capacity()) {
        SPARE.with_borrow_mut(|spares| {
            if spares.len() < SPARE_MAX {
                spares.push(chunks);
            }
        });
    }
}

impl Outbox {
    pub(crate) fn new(inbox: Inbox<Box<Chunks>>, shared: Arc<Shared>) -> Self {
        let (out, ahead, gathered, fresh, counted, stall, has_moved, written, flushed, change_waker) =
            Default::default();
        Outbox {
            inbox,
            shared,
            out,
            ahead,
            gathered,
            fresh,
            counted,
            stall,
            has_moved,
            written,
            flushed,
            change_waker,
            pace: None,
        }
    }

    /// Sends answers, after all answers and notifications before.
    pub fn send(&mut self, mut answers: Chunks) {
        let len = answers.len();
        let is_next = self.out.is_empty() && self.pace.is_none();
        if len > 0 && is_next && self.inbox.is_empty() {
            self.fresh = len;
            self.out.append(&mut answers);
        } else if len > 0 {
            self.shared.wait_for(len);
            self.inbox.post(Box::new(std::mem::take(&mut answers)));
        }
        give_back(answers);
    }

    /// Sends answers before all that is in the mailbox: the peer understands that, as it said with
    /// [`Features::AHEAD`](nkv_protocol::Features::AHEAD). They come behind others that were sent this way.
    pub fn send_ahead(&mut self, mut answers: Chunks) {
        let len = answers.len();
        if len == 0 || self.pace.is_some() {
            return self.send(answers);
        }
        if self.gathered.1 == 0 && self.ahead.is_none() {
            self.fresh = self.fresh.saturating_add(len);
            self.out.append(&mut answers);
        } else {
            self.shared.wait_for(len);
            self.ahead.get_or_insert_default().append(&mut answers);
        }
        give_back(answers);
    }

    /// Whether the backlog is so long that no more is to be made for now. [`poll`](Self::poll) goes on with it.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.shared.is_full()
    }

    /// Returns whether nothing waits to be written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.out.is_empty() && self.ahead.is_none() && self.inbox.is_empty()
    }

    /// Returns how many bytes were written so far.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Writes what there is. Ready when the connection's sending side has ended: all that was to be sent is written, and
    /// the notifier closed; or the peer is gone or stalls. Until then it has `cx` woken when the peer takes more, and
    /// `change_waker` when there is more to write, which may be another way to the same task.
    ///
    /// Once ready, it is not to be polled again.
    pub fn poll<W>(&mut self, cx: &mut Context<'_>, change_waker: &Waker, writer: &mut W) -> Poll<WriterEnd>
    where
        W: AsyncWrite + Unpin,
    {
        let mut turn_len = 0_usize;
        loop {
            if turn_len >= TURN_LEN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            // What the peer does not take yet is nothing to be added to: in the mailbox it can still be conflated.
            let is_closed = self.gathered.1 == 0 && self.gather(cx, change_waker);
            turn_len = turn_len.saturating_add(self.out.len());
            if !self.out.is_empty() {
                match self.poll_write(cx, writer) {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(end)) => return Poll::Ready(end),
                    Poll::Pending => {
                        self.inbox.poll_called(&mut Context::from_waker(change_waker));
                        return Poll::Pending;
                    }
                }
            } else if is_closed {
                return self.poll_shutdown(cx, writer);
            } else {
                give_back(std::mem::take(&mut self.out));
                return match self.poll_flush(cx, writer) {
                    Poll::Ready(Err(error)) => Poll::Ready(WriterEnd::Failed(error)),
                    _ => Poll::Pending,
                };
            }
        }
    }

    /// Has a writer that keeps what it is given for a while, as one of TLS does, send it now.
    fn poll_flush<W>(&mut self, cx: &mut Context<'_>, writer: &mut W) -> Poll<io::Result<()>>
    where
        W: AsyncWrite + Unpin,
    {
        if self.flushed != self.written {
            ready!(Pin::new(writer).poll_flush(cx))?;
            self.flushed = self.written;
        }
        Poll::Ready(Ok(()))
    }

    /// Takes out of the mailbox what the next write may take; says whether the mailbox is closed and empty.
    fn gather(&mut self, cx: &mut Context<'_>, change_waker: &Waker) -> bool {
        let mut len = TURN_LEN;
        if self.pace.is_some() {
            match self.next_line(cx, change_waker) {
                Next::Wait => return false,
                Next::Item => len = 1,
                Next::GoOn => {}
            }
        }
        let is_closed = self.take(len, change_waker);
        if len == 1 {
            self.keep_rest();
        }
        is_closed
    }

    /// Takes `len` bytes out of the mailbox, or one item more, to come behind what is gathered already and what goes ahead.
    #[inline(always)]
    fn take(&mut self, len: usize, change_waker: &Waker) -> bool {
        if let Some(mut ahead) = self.ahead.take() {
            self.counted = self.counted.saturating_add(ahead.len());
            self.out.append(&mut ahead);
        }
        let is_known = self.change_waker.as_ref().is_some_and(|known| known.will_wake(change_waker));
        if is_known && self.inbox.is_waited_for() {
            return false;
        }
        let mut cx = Context::from_waker(change_waker);
        // A byte takes up to four as a number.
        let take_len = if self.shared.form() == ValueForm::Bytes { len.div_ceil(4) } else { len };
        let before = self.out.len();
        while self.out.len().saturating_sub(before) < len {
            let mut items = ITEMS.take();
            let taken = self.inbox.poll_take_many(&mut cx, take_len, &mut items);
            if taken == Poll::Ready(true) && self.out.is_empty() && self.out.capacity() == 0 {
                self.out = spare();
            }
            for item in items.drain(..) {
                self.encode(item);
            }
            ITEMS.set(items);
            if taken == Poll::Ready(false) {
                return true;
            }
            if !is_known {
                self.change_waker = Some(change_waker.clone());
            }
            if self.inbox.is_waited_for() {
                return false;
            }
        }
        false
    }

    fn encode(&mut self, item: Item<Box<Chunks>>) {
        match item {
            Item::Own(mut answers) => {
                self.counted = self.counted.saturating_add(answers.len());
                self.out.append(&mut answers);
            }
            Item::Event { event, skipped } => {
                self.counted = self.counted.saturating_add(waiting_len(&event));
                encode::event(&event, skipped, self.shared.form(), &mut self.out);
            }
        }
    }

    /// Writes what was gathered, all of it or until the peer takes no more for now.
    fn poll_write<W>(&mut self, cx: &mut Context<'_>, writer: &mut W) -> Poll<Result<(), WriterEnd>>
    where
        W: AsyncWrite + Unpin,
    {
        if self.gathered.1 == 0 {
            let longest = self.out.slices().max_by_key(|slice| slice.len());
            self.gathered = (longest.map_or(0, |slice| slice.as_ptr().addr()), self.out.len());
        }
        while !self.out.is_empty() {
            match write_once(cx, writer, &self.out) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(WriterEnd::Failed(io::ErrorKind::WriteZero.into()))),
                Poll::Ready(Ok(written)) => {
                    self.out.advance(written);
                    self.has_moved = true;
                    self.written = self.written.wrapping_add(written as u64);
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(WriterEnd::Failed(error))),
                Poll::Pending => return self.poll_stall(cx).map(|()| Err(WriterEnd::Stalled)),
            }
        }
        (self.fresh, self.gathered, self.stall) = (0, (0, 0), None);
        self.shared.flushed(std::mem::take(&mut self.counted));
        Poll::Ready(Ok(()))
    }

    /// The peer takes no more: notes its backlog, and since when.
    fn poll_stall(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let fresh = std::mem::take(&mut self.fresh);
        self.shared.wait_for(fresh);
        self.counted = self.counted.saturating_add(fresh);
        let (encoding, len) = self.gathered;
        self.shared.gather(encoding, len.saturating_sub(self.counted));
        let limit = self.shared.options.stall_limit;
        let stall = self.stall.get_or_insert_with(|| Box::pin(sleep(limit)));
        if std::mem::take(&mut self.has_moved) {
            stall.set(sleep(limit));
        }
        stall.as_mut().poll(cx)
    }

    fn poll_shutdown<W>(&mut self, cx: &mut Context<'_>, writer: &mut W) -> Poll<WriterEnd>
    where
        W: AsyncWrite + Unpin,
    {
        if self.is_paced() {
            return Poll::Ready(WriterEnd::Finished);
        }
        match Pin::new(writer).poll_shutdown(cx) {
            Poll::Ready(Ok(())) => Poll::Ready(WriterEnd::Finished),
            Poll::Ready(Err(error)) => Poll::Ready(WriterEnd::Failed(error)),
            Poll::Pending => self.poll_stall(cx).map(|()| WriterEnd::Stalled),
        }
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.shared.end();
    }
}

/// One system call.
fn write_once<W>(cx: &mut Context<'_>, writer: &mut W, out: &Chunks) -> Poll<io::Result<usize>>
where
    W: AsyncWrite + Unpin,
{
    let mut slices = out.slices();
    let first = slices.next().unwrap_or_default();
    let Some(second) = slices.next() else { return Pin::new(writer).poll_write(cx, first) };
    let mut vector = [IoSlice::new(&[]); SLICES_MAX];
    let places = vector.iter_mut().zip([first, second].into_iter().chain(slices));
    let count = places.map(|(place, slice)| *place = IoSlice::new(slice)).count();
    Pin::new(writer).poll_write_vectored(cx, vector.get(..count).unwrap_or_default())
}

/// Has the kernel find out within a minute or so that a peer's host has vanished, whether the connection is idle or
/// something is on its way to it.
///
/// # Errors
///
/// What the system says.
pub fn keep_alive(socket: &impl AsFd) -> io::Result<()> {
    let socket = socket2::SockRef::from(socket);
    let (idle, interval) = (Duration::from_secs(30), Duration::from_secs(10));
    socket.set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(3))?;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    socket.set_tcp_user_timeout(Some(Duration::from_secs(60)))?;
    Ok(())
}

/// Bounds what the kernel holds for a peer that does not read: several megabytes a connection otherwise.
///
/// # Errors
///
/// What the system says.
pub fn limit_send_buffer(socket: &impl AsFd, bytes: usize) -> io::Result<()> {
    socket2::SockRef::from(socket).set_send_buffer_size(bytes)
}
