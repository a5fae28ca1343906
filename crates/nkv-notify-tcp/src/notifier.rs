//! The notifier: what the rest of a server holds of a connection's sending side.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize};
use std::time::{Duration, Instant};

use nkv_core::mailbox::{Backlog, Mailbox, Overflow, mailbox_with_slack};
use nkv_core::{BeginCause, Delivery, Event, EventKind, Notifier};
use nkv_protocol::{Chunks, Features, ValueForm};
use tokio::io::AsyncWrite;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::outbox::{Outbox, WriterEnd};

/// How a connection's sending side behaves.
#[derive(Clone, Debug)]
pub struct NotifierOptions {
    /// A peer that takes no byte for this long is cut. 30 s by default.
    pub stall_limit: Duration,
    /// The number of bytes of answers and snapshots that may wait before [`TcpNotifier::room`] makes the reading side
    /// wait. 256 KiB by default.
    pub waiting_max: usize,
    /// The number of bytes of changes that may wait without being conflated (see [`mailbox_with_slack`]): a peer that
    /// keeps up is sent every change. None by default: of the backlog, only the newest change of each key is sent.
    pub slack: usize,
    /// Bytes of answers that wait in all notifiers that share it, kept up by them: what a server bounds all its
    /// connections together by. Each has one of its own by default.
    pub waiting_total: Arc<AtomicUsize>,
}

impl Default for NotifierOptions {
    fn default() -> Self {
        NotifierOptions {
            stall_limit: Duration::from_secs(30),
            waiting_max: 256 << 10,
            slack: 0,
            waiting_total: Arc::default(),
        }
    }
}

/// Notifies one connection of events, in order with the answers to its requests.
///
/// Clones stand for the same connection. The beginning of a subscription is its `Hello`, which answers the request; with
/// a snapshot, its `Update`s and `Synced` follow in one go. They are read from the store as the peer takes them.
#[derive(Clone, Debug)]
pub struct TcpNotifier {
    mailbox: Mailbox<Box<Chunks>>,
    shared: Arc<Shared>,
}

/// What the notifier and its writer task both know.
#[derive(Debug)]
pub(crate) struct Shared {
    form: AtomicU8,
    /// The bits of what the client understands.
    features: AtomicU32,
    /// Bytes of answers, snapshots and what else is not conflated, that were not written yet.
    waiting: AtomicUsize,
    made: Instant,
    /// What is being written: which encoding most of it is (an address), how many bytes, and since when, in ms.
    gathered: (AtomicUsize, AtomicUsize, AtomicU64),
    /// The writer is gone.
    ended: AtomicBool,
    room: Notify,
    pub(crate) options: NotifierOptions,
}

impl TcpNotifier {
    /// A notifier, and the outbox that is to be polled with the connection's socket. The outbox ends when every clone
    /// of the notifier is dropped or it is closed, and all is written; or when the peer is gone or stalls.
    #[must_use]
    pub fn new(options: NotifierOptions) -> (Self, Outbox) {
        let (mailbox, inbox) = mailbox_with_slack(options.slack);
        mailbox.set_overflow(Overflow::Close);
        // A client learns the epoch when it connects, and compares revisions within it.
        mailbox.close_with_epoch();
        let shared = Arc::new(Shared {
            form: AtomicU8::new(0),
            features: AtomicU32::new(0),
            waiting: AtomicUsize::new(0),
            made: Instant::now(),
            gathered: Default::default(),
            ended: AtomicBool::new(false),
            room: Notify::new(),
            options,
        });
        (TcpNotifier { mailbox, shared: Arc::clone(&shared) }, Outbox::new(inbox, shared))
    }

    /// Like [`new`](Self::new), with a task on the current runtime that polls the outbox.
    pub fn spawn<W>(mut writer: W, options: NotifierOptions) -> (Self, JoinHandle<WriterEnd>)
    where
        W: AsyncWrite + Unpin + Send + 'static,
    {
        let (notifier, mut outbox) = TcpNotifier::new(options);
        let task = tokio::spawn(async move { poll_fn(|cx| outbox.poll(cx, cx.waker(), &mut writer)).await });
        (notifier, task)
    }

    /// Sends answers, after all that was sent before. When the connection is gone they go nowhere; its outbox says so.
    pub fn send(&self, answers: &mut Chunks) {
        if !answers.is_empty() {
            self.shared.wait_for(answers.len());
            drop(self.mailbox.post(Box::new(std::mem::take(answers))));
        }
    }

    /// Waits until answers may be sent without keeping too much in memory. Ends at once when the connection is gone.
    /// One waits at a time.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub async fn room(&self) {
        while self.shared.is_full() && !self.shared.ended.load(SeqCst) {
            self.shared.room.notified().await;
        }
    }

    /// Drops the changes that wait, as where the backlog is too long.
    pub fn give_up(&self) {
        self.mailbox.observer().give_up();
    }

    /// Whether too much waited for a peer that does not understand [`Features::RESET`]: the sending side ends.
    pub fn has_overflowed(&self) -> bool {
        self.mailbox.has_overflowed()
    }

    /// Chooses the form of values in notifications from now on.
    pub fn set_form(&self, form: ValueForm) {
        self.shared.form.store(form as u8, Relaxed);
    }

    /// The form of values in notifications.
    pub fn form(&self) -> ValueForm {
        self.shared.form()
    }

    /// Says what the client understands beyond the first version of the protocol: nothing, unless this is called.
    pub fn set_features(&self, features: Features) {
        self.shared.features.store(features.bits(), Relaxed);
        let can_begin_anew = features.contains(Features::RESET);
        self.mailbox.set_overflow(if can_begin_anew { Overflow::Reset } else { Overflow::Close });
    }

    /// Returns what the client understands beyond the first version of the protocol.
    pub fn features(&self) -> Features {
        Features::from_bits(self.shared.features.load(Relaxed))
    }

    /// Bytes of answers and snapshots that wait to be written.
    pub fn waiting(&self) -> usize {
        self.shared.waiting.load(Relaxed)
    }

    /// What the peer does not take of changes at the moment, in bytes, and what shows whether two connections share them: the
    /// encoding of a change is made once, and kept for as long as a connection still writes it.
    pub fn gathered(&self) -> (usize, usize) {
        let (encoding, len, _) = &self.shared.gathered;
        (encoding.load(Relaxed), len.load(Relaxed))
    }

    /// For how long the peer has not taken what is being written (16 KiB or a little more, as a rule).
    pub fn busy_for(&self) -> Duration {
        match self.shared.gathered.2.load(Relaxed) {
            0 => Duration::ZERO,
            since => self.shared.made.elapsed().saturating_sub(Duration::from_millis(since)),
        }
    }

    /// The backlog: what waits to be written, by the piece.
    pub fn backlog(&self) -> Backlog {
        self.mailbox.backlog()
    }

    /// Wakes the task that polls the outbox, although there is nothing more to write.
    pub fn wake(&self) {
        self.mailbox.wake();
    }

    /// Ends the connection's sending side once all that was sent is written.
    pub fn close(&self) {
        self.mailbox.close();
    }
}

impl Shared {
    pub(crate) fn form(&self) -> ValueForm {
        let forms = [ValueForm::Bytes, ValueForm::Text, ValueForm::Payload];
        let form = self.form.load(Relaxed);
        forms.into_iter().find(|known| *known as u8 == form).unwrap_or_default()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.waiting.load(Relaxed) > self.options.waiting_max
    }

    pub(crate) fn wait_for(&self, len: usize) {
        self.waiting.fetch_add(len, Relaxed);
        self.options.waiting_total.fetch_add(len, Relaxed);
    }

    /// Notes that `len` bytes are being written; the encoding at this address is most of them.
    pub(crate) fn gather(&self, encoding: usize, len: usize) {
        self.gathered.0.store(encoding, Relaxed);
        self.gathered.1.store(len, Relaxed);
        if self.gathered.2.load(Relaxed) == 0 {
            let since = u64::try_from(self.made.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
            self.gathered.2.store(since, Relaxed);
        }
    }

    /// Notes that all in flight is written, `len` bytes of the backlog among it.
    pub(crate) fn flushed(&self, len: usize) {
        if self.gathered.2.load(Relaxed) > 0 {
            self.gathered.1.store(0, Relaxed);
            self.gathered.2.store(0, Relaxed);
        }
        if len > 0 {
            self.waiting.fetch_sub(len, Relaxed);
            self.options.waiting_total.fetch_sub(len, Relaxed);
            self.room.notify_one();
        }
    }

    /// Nothing more is written: a caller that waits for room must see that there will be none.
    pub(crate) fn end(&self) {
        self.ended.store(true, SeqCst);
        self.room.notify_one();
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.options.waiting_total.fetch_sub(*self.waiting.get_mut(), Relaxed);
    }
}

/// Roughly what an event takes while it waits, if it is none that a newer one takes the place of.
pub(crate) fn waiting_len(event: &Event) -> usize {
    match event.kind() {
        EventKind::Change(_) => 0,
        // It was read to be written.
        EventKind::Snapshot(_) => 0,
        // The mailbox made it, of what it has anyway.
        EventKind::Began(began) if began.cause == BeginCause::Reset => 0,
        _ => 256,
    }
}

impl Notifier for TcpNotifier {
    fn notify(&self, event: &Arc<Event>) -> Delivery {
        match waiting_len(event) {
            0 => {} // a change, most likely
            len => self.shared.wait_for(len),
        }
        self.mailbox.notify(event)
    }

    fn backlog(&self) -> Backlog {
        self.mailbox.backlog()
    }
}
