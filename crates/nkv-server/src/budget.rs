//! What connections and subscriptions hold, each and all together: requests that have not arrived whole, answers that were
//! not taken, changes that wait or are being written. Past the limit, the one that holds most for longest gives it up: if
//! that is changes, they are dropped in favour of a fresh snapshot, else its connection is closed.
//! Subscriptions to deep keys have a quarter of the limit for themselves, past which they are refused.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nkv_core::mailbox::Observer;
use nkv_notify_tcp::TcpNotifier;
use tokio::sync::{Mutex as Turns, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::clock::millis;

/// Turns that others are given when there is too much, before more is made. It may be one alone that holds it, rightly.
const RELIEF_TURNS: usize = 8;

/// How often whoever waits for room looks again.
const ROOM_PAUSE: Duration = Duration::from_millis(10);

/// Whoever was let through meanwhile has so long to read on before the next is closed for those who wait.
const EVICTION_PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(crate) struct Budget {
    limit: usize,
    /// Bytes of the changes that wait for any subscriber; the store keeps it up.
    event_bytes: Arc<AtomicUsize>,
    /// Bytes of answers that wait on all connections; the notifiers keep it up.
    waiting: Arc<AtomicUsize>,
    /// Bytes that the reading sides of all connections hold.
    read: AtomicUsize,
    /// Bytes of subscriptions to deep keys, on all connections.
    deep: AtomicUsize,
    holders: Mutex<Holders>,
    /// All connections are to end.
    is_stopping: AtomicBool,
    /// Whoever waits for room, in the order in which they came; and when somebody was last closed for them.
    queue: Turns<Option<Instant>>,
    /// For those that make a long answer while much waits: one at a time.
    leave: Arc<Semaphore>,
}

/// That a long answer may be made although much waits.
pub(crate) type Leave = OwnedSemaphorePermit;

#[derive(Debug, Default)]
struct Holders {
    next_id: u64,
    by_id: HashMap<u64, Arc<Holder>>,
}

#[derive(Debug)]
struct Holder {
    opened: Instant,
    read: AtomicUsize,
    /// When its reading side came to hold what it holds of a request, in ms after the opening.
    read_since_ms: AtomicU64,
    source: Source,
    /// It holds what it holds because the server keeps it waiting.
    is_kept_waiting: AtomicBool,
    /// It was told to give up what it holds, and will.
    is_leaving: AtomicBool,
    /// What it held when that was decided.
    evicted_with: AtomicUsize,
}

/// What one connection's subscriptions take, beyond what the limit of their number allows for.
#[derive(Debug)]
pub(crate) struct DeepShare {
    budget: Arc<Budget>,
    len: Arc<AtomicUsize>,
}

/// What one subscription takes of that, until it ends or is dropped.
#[derive(Debug)]
pub(crate) struct DeepHold {
    budget: Arc<Budget>,
    of_connection: Arc<AtomicUsize>,
    len: AtomicUsize,
}

/// What they may take on one connection; all together, a quarter of the limit.
const DEEP_LEN_MAX: usize = 4 << 20;

impl DeepShare {
    pub(crate) fn new(budget: Arc<Budget>) -> Self {
        DeepShare { budget, len: Arc::default() }
    }

    /// Whether so much more is too much, where as much `is_replaced` by it on another connection.
    pub(crate) fn is_full(&self, more: usize, is_replaced: bool) -> bool {
        let before = self.budget.deep.load(Relaxed);
        let all = if is_replaced { before } else { before.saturating_add(more) };
        let own = self.len.load(Relaxed).saturating_add(more);
        more > 0 && (own > DEEP_LEN_MAX || all > self.budget.limit / 4)
    }

    pub(crate) fn hold(&self, len: usize) -> DeepHold {
        self.len.fetch_add(len, Relaxed);
        self.budget.deep.fetch_add(len, Relaxed);
        let (budget, of_connection) = (Arc::clone(&self.budget), Arc::clone(&self.len));
        DeepHold { budget, of_connection, len: AtomicUsize::new(len) }
    }
}

impl DeepHold {
    pub(crate) fn release(&self) {
        let len = self.len.swap(0, Relaxed);
        self.of_connection.fetch_sub(len, Relaxed);
        self.budget.deep.fetch_sub(len, Relaxed);
    }
}

impl Drop for DeepHold {
    fn drop(&mut self) {
        self.release();
    }
}

/// One connection's share, for as long as anything of the connection is left.
#[derive(Debug)]
pub(crate) struct Share {
    budget: Arc<Budget>,
    id: u64,
    holder: Arc<Holder>,
}

/// What holds something: a connection, or a mailbox of this process.
#[derive(Debug)]
pub(crate) enum Source {
    Connection(TcpNotifier),
    Handle(Observer),
}

/// What one holds.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    /// That is its own alone.
    own: usize,
    /// That the mailbox takes for what waits.
    queue: usize,
    /// Of changes that wait; others may share them.
    changes: usize,
    /// An encoding that is being written (an address), and how many bytes; others may share it.
    gathered: (usize, usize),
}

impl Held {
    /// What is given up with the changes that wait.
    fn waiting_changes(&self) -> usize {
        self.queue.saturating_add(self.changes)
    }

    fn rest(&self) -> usize {
        self.own.saturating_add(self.gathered.1)
    }

    fn all(&self) -> usize {
        self.waiting_changes().saturating_add(self.rest())
    }
}

/// Bytes times milliseconds: one that is in the middle of a large request is no worse than one that stalls.
fn weight(bytes: usize, holder: &Holder) -> u128 {
    (bytes as u128).saturating_mul(holder.held_for().as_millis().saturating_add(1))
}

impl Holder {
    fn new(source: Source) -> Arc<Self> {
        let (opened, read_since_ms) = (Instant::now(), AtomicU64::new(0));
        let (read, is_leaving, is_kept_waiting, evicted_with) = Default::default();
        Arc::new(Holder { opened, read, read_since_ms, source, is_leaving, is_kept_waiting, evicted_with })
    }

    fn held(&self) -> Held {
        let (backlog, waiting, gathered) = match &self.source {
            Source::Connection(notifier) => (notifier.backlog(), notifier.waiting(), notifier.gathered()),
            Source::Handle(mailbox) => (mailbox.backlog(), 0, (0, 0)),
        };
        let own = self.read.load(Relaxed).saturating_add(waiting);
        Held { own, queue: backlog.own_bytes, changes: backlog.event_bytes, gathered }
    }

    fn busy_for(&self) -> Duration {
        match &self.source {
            Source::Connection(notifier) => notifier.busy_for(),
            Source::Handle(_) => Duration::ZERO,
        }
    }

    /// For how long it has held what it holds without anything coming of it.
    fn held_for(&self) -> Duration {
        let busy_for = self.busy_for();
        if self.read.load(Relaxed) == 0 {
            return busy_for;
        }
        let since = Duration::from_millis(self.read_since_ms.load(Relaxed));
        busy_for.max(self.opened.elapsed().saturating_sub(since))
    }

    /// Drops the changes that wait.
    fn give_up(&self) {
        match &self.source {
            Source::Connection(notifier) => notifier.give_up(),
            Source::Handle(mailbox) => mailbox.give_up(),
        }
    }

    fn evict(&self) {
        if let Source::Connection(notifier) = &self.source {
            self.evicted_with.fetch_max(self.held().all(), Relaxed);
            self.is_leaving.store(true, Relaxed);
            notifier.wake();
        }
    }
}

impl Holders {
    /// What those hold together that stay, but for the changes that wait, and who they are with what each holds. An
    /// encoding that several write counts once.
    fn total_and_staying(&self) -> (usize, Vec<(Held, &Holder)>) {
        let mut encodings = HashSet::new();
        let (mut total, mut staying) = (0_usize, Vec::new());
        for holder in self.by_id.values().filter(|holder| !holder.is_leaving.load(Relaxed)) {
            let held = holder.held();
            let (encoding, gathered) = held.gathered;
            let shared = if gathered == 0 || encodings.insert(encoding) { gathered } else { 0 };
            total = total.saturating_add(held.own).saturating_add(held.queue).saturating_add(shared);
            staying.push((held, &**holder));
        }
        (total, staying)
    }
}

impl Budget {
    /// `event_bytes` is what the store counts the changes in that wait.
    pub(crate) fn new(limit: usize, event_bytes: Arc<AtomicUsize>) -> Arc<Self> {
        let (waiting, read, deep, holders, is_stopping, queue) = Default::default();
        let leave = Arc::new(Semaphore::new(1));
        Arc::new(Budget { limit, event_bytes, waiting, read, deep, holders, is_stopping, queue, leave })
    }

    /// What notifiers count answers in.
    pub(crate) fn waiting(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.waiting)
    }

    /// So many bytes of values may be written before what waits for subscribers is to be looked at.
    pub(crate) fn check_every(&self) -> usize {
        self.limit / 64
    }

    pub(crate) fn share(self: &Arc<Self>, source: Source) -> Share {
        let holder = Holder::new(source);
        let mut holders = self.lock();
        let id = holders.next_id;
        holders.next_id = id.wrapping_add(1);
        holders.by_id.insert(id, Arc::clone(&holder));
        drop(holders);
        Share { budget: Arc::clone(self), id, holder }
    }

    /// If all together hold too much: where that is mostly changes, they are given up, by the worst holder and on until it
    /// is not too much any more, for several may share them. Else the worst holder of the rest is closed, but one that alone
    /// is over the limit is let through: what it asked for was admitted by [`room`](Self::room).
    pub(crate) fn check(&self) {
        let holders = self.lock();
        let (mut others, mut staying) = holders.total_and_staying();
        let changes = || self.event_bytes.load(Relaxed);
        let total = others.saturating_add(changes());
        if total <= self.limit {
            return;
        }
        let queues = staying.iter().map(|(held, _)| held.queue).fold(0, usize::saturating_add);
        if changes().saturating_add(queues) > total / 2 {
            staying.sort_by_cached_key(|(held, holder)| Reverse(weight(held.waiting_changes(), holder)));
            for (held, holder) in staying.iter().filter(|(held, _)| held.changes > 0) {
                if others.saturating_add(changes()) <= self.limit {
                    break;
                }
                holder.give_up();
                others = others.saturating_sub(held.queue);
            }
            return;
        }
        let worst = staying.iter().max_by_key(|(held, holder)| weight(held.rest(), holder));
        if let Some((_, worst)) = worst.filter(|(held, _)| total.saturating_sub(held.rest()) > self.limit / 2) {
            worst.evict();
        }
    }

    /// If there is too much, gives those who were told to leave some turns to do so.
    pub(crate) async fn relief(&self) {
        for _ in 0..RELIEF_TURNS {
            if !self.is_over() {
                return;
            }
            self.check();
            tokio::task::yield_now().await;
        }
    }

    /// Has all connections end.
    pub(crate) fn stop(&self) {
        self.is_stopping.store(true, Relaxed);
        for holder in self.lock().by_id.values() {
            if let Source::Connection(notifier) = &holder.source {
                notifier.wake();
            }
        }
    }

    /// Closes the connection that has been sending a request for longest, if that is longer than `patience`.
    pub(crate) fn evict_slowest(&self, patience: Duration) {
        let holders = self.lock();
        let sends = |holder: &&Arc<Holder>| {
            let is_idle = holder.read.load(Relaxed) == 0 || holder.is_kept_waiting.load(Relaxed);
            !is_idle && !holder.is_leaving.load(Relaxed) && holder.held_for() > patience
        };
        if let Some(slowest) = holders.by_id.values().filter(sends).max_by_key(|holder| holder.held_for()) {
            slowest.evict();
        }
    }

    /// To be called when somebody may have come to hold much more.
    pub(crate) fn check_if_over(&self) {
        if self.is_over() {
            self.check();
        }
    }

    /// Whether all connections hold too much.
    pub(crate) fn is_over(&self) -> bool {
        self.queued() > self.limit
    }

    /// Waits until there is room for an answer or a snapshot of any size. Whoever came first goes
    /// first, and whoever holds most for longest does not keep it waiting for longer than `patience`.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the place in the queue.
    pub(crate) async fn room(&self, patience: Duration) {
        if self.queued() <= self.limit / 2 {
            return;
        }
        let start = Instant::now();
        let mut last_eviction = self.queue.lock().await;
        while self.queued() > self.limit / 2 {
            if start.elapsed() >= patience
                && last_eviction.is_none_or(|last| last.elapsed() >= EVICTION_PAUSE)
                && self.evict_for_room()
            {
                *last_eviction = Some(Instant::now());
            }
            tokio::time::sleep(ROOM_PAUSE).await;
        }
    }

    /// Whether so much waits that answers which take many turns are made one after another. Those that were
    /// [let in](Self::room) together would come to hold too much together.
    pub(crate) fn is_crowded(&self) -> bool {
        self.queued() > self.limit / 4
    }

    /// Waits for the others that are made, and until their peers have taken most of the answers, but for that no longer than
    /// `patience`.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the place in the queue.
    pub(crate) async fn leave(&self, patience: Duration) -> Option<Leave> {
        let leave = Arc::clone(&self.leave).acquire_owned().await.ok();
        let start = Instant::now();
        while self.waiting.load(Relaxed) > self.limit / 4 && start.elapsed() < patience {
            tokio::time::sleep(ROOM_PAUSE).await;
        }
        leave
    }

    /// Closes the connection that holds most for longest, if they hold so much. Changes that wait take no room of answers.
    fn evict_for_room(&self) -> bool {
        let holders = self.lock();
        let (total, staying) = holders.total_and_staying();
        let bytes = |held: &Held| held.rest();
        let connections = staying.iter().filter(|(_, holder)| matches!(holder.source, Source::Connection(_)));
        let worst = connections.max_by_key(|(held, holder)| weight(bytes(held), holder));
        let worst = worst.filter(|(held, _)| total > self.limit / 2 && bytes(held) > 0);
        worst.inspect(|(_, worst)| worst.evict()).is_some()
    }

    /// All but the changes that wait, which are counted only when it matters.
    fn queued(&self) -> usize {
        self.waiting.load(Relaxed).saturating_add(self.read.load(Relaxed))
    }

    fn lock(&self) -> MutexGuard<'_, Holders> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Share {
    /// Notes how many bytes this connection's reading side holds, and whether it has served a request meanwhile.
    pub(crate) fn hold(&self, bytes: usize, served: bool) {
        let before = self.holder.read.swap(bytes, Relaxed);
        if bytes > 0 && (served || before == 0) {
            self.holder.read_since_ms.store(millis(self.holder.opened.elapsed()), Relaxed);
        }
        if bytes > before {
            self.budget.read.fetch_add(bytes.saturating_sub(before), Relaxed);
            self.budget.check_if_over();
        } else if bytes < before {
            self.budget.read.fetch_sub(before.saturating_sub(bytes), Relaxed);
        }
    }

    /// The server keeps the connection waiting with what it has sent.
    pub(crate) fn begin_waiting(&self) {
        self.holder.is_kept_waiting.store(true, Relaxed);
    }

    /// It does so no more. The time that it did is not held against the connection.
    pub(crate) fn end_waiting(&self, waited: Duration) {
        let since = self.holder.read_since_ms.load(Relaxed).saturating_add(millis(waited));
        self.holder.read_since_ms.store(since.min(millis(self.holder.opened.elapsed())), Relaxed);
        self.holder.is_kept_waiting.store(false, Relaxed);
    }

    /// What this connection holds.
    pub(crate) fn held(&self) -> usize {
        self.holder.held().all()
    }

    /// Ends the connection's sending side once all that was sent is written.
    pub(crate) fn close(&self) {
        if let Source::Connection(notifier) = &self.holder.source {
            notifier.close();
        }
    }

    /// Whether this connection is to give up what it holds. Its outbox is polled anew when it is.
    pub(crate) fn is_evicted(&self) -> bool {
        self.holder.is_leaving.load(Relaxed)
    }

    /// What this connection held when it was told so: for the log, as it may have given it up since.
    pub(crate) fn evicted_with(&self) -> usize {
        self.holder.evicted_with.load(Relaxed)
    }

    /// Whether all connections are to end. Its outbox is polled anew when they are.
    pub(crate) fn is_stopping(&self) -> bool {
        self.budget.is_stopping.load(Relaxed)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.lock().by_id.remove(&self.id);
        self.hold(0, true);
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::task::{Poll, Wake, Waker};

    use nkv_core::mailbox::{Mailbox, mailbox};
    use nkv_core::{
        Action, Change, Delivery, Event, EventKind, Key, Meta, NoPersist, Notifier, NotifyKeyValue, Pattern,
        PutOptions, Revision,
    };
    use nkv_notify_tcp::NotifierOptions;
    use nkv_protocol::{Chunks, Features};

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Relaxed);
        }
    }

    #[test]
    fn past_the_limit_the_one_for_which_most_changes_wait_gives_them_up_and_nobody_else() {
        let store = NotifyKeyValue::open(NoPersist::default()).unwrap();
        let put = |branch: &str, n: usize| {
            store.put(&Key::new(&format!("{branch}.{n}")).unwrap(), vec![0; 4_000], PutOptions::default()).unwrap();
        };
        let boxes: Vec<(Mailbox, _)> = ["much", "little"]
            .into_iter()
            .map(|branch| {
                let (post, inbox) = mailbox();
                store.subscribe(Pattern::new(branch).unwrap(), "me".into(), post.clone(), false);
                assert!(inbox.try_take().is_some());
                (0..if branch == "much" { 100 } else { 10 }).for_each(|n| put(branch, n));
                (post, inbox)
            })
            .collect();
        let backlogs = || boxes.iter().map(|(post, _)| post.backlog());
        let queued = || backlogs().map(|backlog| backlog.queued).collect::<Vec<_>>();
        let own: usize = backlogs().map(|backlog| backlog.own_bytes).sum();
        let event_bytes = Arc::clone(store.event_bytes());
        let budget = Budget::new(own + event_bytes.load(Relaxed), event_bytes);
        for (post, _) in &boxes {
            let (share, backlog) = (budget.share(Source::Handle(post.observer())), post.backlog());
            assert!(backlog.own_bytes > 0);
            assert_eq!(share.held(), backlog.own_bytes + backlog.event_bytes);
        }
        let _shares: Vec<Share> = boxes.iter().map(|(post, _)| budget.share(Source::Handle(post.observer()))).collect();
        budget.check();
        assert_eq!(queued(), [100, 10]);
        put("much", 100);
        budget.check();
        // That it begins anew.
        assert_eq!(queued(), [1, 10]);
    }

    #[tokio::test]
    async fn a_connection_that_can_begin_anew_gives_up_the_changes_that_wait_for_it() {
        let store = NotifyKeyValue::open(NoPersist::default()).unwrap();
        let (notifier, _outbox) = TcpNotifier::new(NotifierOptions::default());
        notifier.set_features(Features::RESET);
        store.subscribe(Pattern::All, "me".into(), notifier.clone(), false);
        for n in 0..100 {
            store.put(&Key::new(&format!("k.{n}")).unwrap(), vec![0; 4_000], PutOptions::default()).unwrap();
        }
        assert_eq!(notifier.backlog().queued, 101);
        let budget = Budget::new(1, Arc::clone(store.event_bytes()));
        let share = budget.share(Source::Connection(notifier.clone()));
        budget.check();
        // That it began, and that it begins anew.
        assert_eq!((notifier.backlog().queued, share.is_evicted()), (2, false));
    }

    #[tokio::test]
    async fn changes_that_wait_as_they_came_for_a_peer_that_takes_nothing_are_held_until_it_is_told_to_leave() {
        let (notifier, mut outbox) = TcpNotifier::new(NotifierOptions { slack: 20_000, ..NotifierOptions::default() });
        let (mut ours, _theirs) = tokio::io::duplex(1);
        let woken = Arc::new(Woken::default());
        let told = Waker::from(Arc::clone(&woken));
        let mut answer = Chunks::default();
        answer.tail().extend(b"an answer");
        outbox.send(answer);
        poll_fn(|cx| Poll::Ready(outbox.poll(cx, &told, &mut ours).is_pending())).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
        let share = Budget::new(1, Arc::default()).share(Source::Connection(notifier.clone()));
        for revision in 1..=2 {
            let (key, revision) = (Key::new("a").unwrap(), Revision::new(revision));
            let action = Action::Put { value: vec![0; 9_000].into(), expiry: None };
            let change = Change { key, revision, replaces: Revision::ZERO, action, meta: Meta::NONE };
            assert_eq!(notifier.notify(&Event::new(EventKind::Change(change))), Delivery::Queued);
        }
        assert!(share.held() > 18_000, "{}", share.held());
        woken.0.store(false, Relaxed);
        share.holder.evict();
        assert!(share.is_evicted() && woken.0.load(Relaxed));
    }

    // The log said that connections were closed because of 0 bytes.
    #[tokio::test]
    async fn what_a_connection_is_closed_for_is_what_it_held_then() {
        let (notifier, _outbox) = TcpNotifier::new(NotifierOptions::default());
        let share = Budget::new(1 << 20, Arc::default()).share(Source::Connection(notifier));
        share.hold(50_000, false);
        share.holder.evict();
        share.hold(0, true);
        assert_eq!((share.held(), share.evicted_with()), (0, 50_000));
    }

    fn change(revision: u64, len: usize) -> Arc<Event> {
        let (key, revision) = (Key::new(&format!("k.{revision}")).unwrap(), Revision::new(revision));
        let action = Action::Put { value: vec![0; len].into(), expiry: None };
        let change = Change { key, revision, replaces: Revision::ZERO, action, meta: Meta::NONE };
        Event::new(EventKind::Change(change))
    }

    // One of them gave up, and the others kept all that it had.
    #[test]
    fn changes_that_many_share_are_given_up_by_as_many_as_it_takes() {
        let store = NotifyKeyValue::open(NoPersist::default()).unwrap();
        let event_bytes = store.event_bytes();
        let budget = Budget::new(1 << 20, Arc::clone(event_bytes));
        let boxes: Vec<(Mailbox, _)> = (0..100).map(|_| mailbox()).collect();
        let shares: Vec<Share> = boxes.iter().map(|(post, _)| budget.share(Source::Handle(post.observer()))).collect();
        for (n, (post, _)) in boxes.iter().enumerate() {
            store.subscribe(Pattern::All, n.to_string().as_str().into(), post.clone(), false);
        }
        for n in 0..300 {
            store.put(&Key::new(&format!("k.{n}")).unwrap(), vec![0; 4_000], PutOptions::default()).unwrap();
        }
        assert!(event_bytes.load(Relaxed) > 1 << 20);
        budget.check();
        assert!(event_bytes.load(Relaxed) <= 1 << 20, "{}", event_bytes.load(Relaxed));
        assert!(!shares.iter().any(Share::is_evicted));
    }

    #[tokio::test]
    async fn one_that_was_kept_waiting_is_not_the_slowest() {
        let budget = Budget::new(1 << 20, Arc::default());
        let patience = Duration::from_millis(50);
        let (waits, slow) =
            (TcpNotifier::new(NotifierOptions::default()), TcpNotifier::new(NotifierOptions::default()));
        let share = budget.share(Source::Connection(waits.0));
        let since = Instant::now();
        share.hold(1_000, true);
        share.begin_waiting();
        tokio::time::sleep(patience * 4).await;
        share.end_waiting(since.elapsed());
        budget.evict_slowest(patience);
        assert!(!share.is_evicted());
        let slow_share = budget.share(Source::Connection(slow.0));
        slow_share.hold(1_000, true);
        tokio::time::sleep(patience * 4).await;
        budget.evict_slowest(patience);
        assert!(share.is_evicted() || slow_share.is_evicted());
    }

    #[tokio::test]
    async fn whoever_waits_for_room_has_nobody_closed_for_changes_that_wait() {
        let budget = Budget::new(1 << 20, Arc::default());
        let (subscriber, _outbox) = TcpNotifier::new(NotifierOptions::default());
        let (reader, _other) = TcpNotifier::new(NotifierOptions::default());
        for revision in 1..=1_000 {
            assert_eq!(subscriber.notify(&change(revision, 4_000)), Delivery::Queued);
        }
        let subscriber = budget.share(Source::Connection(subscriber));
        let reader = budget.share(Source::Connection(reader));
        reader.hold((1 << 20) - 1, true);
        drop(tokio::time::timeout(Duration::from_secs(1), budget.room(Duration::ZERO)).await);
        assert_eq!((subscriber.is_evicted(), reader.is_evicted()), (false, true));
    }
}
