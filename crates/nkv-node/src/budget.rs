//! What connections and subscriptions hold, each and all together: requests that have not arrived whole, answers that were
//! not taken, changes that wait or are being written. Past the limit, the one that holds most for longest gives it up: if
//! that is changes, they are dropped in favour of a fresh snapshot, else its connection is closed.
//! Subscriptions to deep keys have a quarter of the limit for themselves, past which they are refused.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nkv_core::SubscriberId;
use nkv_core::mailbox::{Backlog, Observer};
use tokio::sync::{Mutex as Turns, Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::clock::millis;

/// Turns that others are given when there is too much, before more is made. It may be one alone that holds it, rightly.
const RELIEF_TURNS: usize = 8;

/// How often callers that wait for room look again.
const ROOM_PAUSE: Duration = Duration::from_millis(10);

/// The time that peers which were let through have to read on before the next is closed for the callers that wait.
const EVICTION_PAUSE: Duration = Duration::from_millis(100);

/// What a door holds for a peer, in the budget of its node. The door implements it for its side of a connection and
/// gives it to [`Handle::peer`](crate::Handle::peer).
///
/// # Examples
///
/// ```
/// use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
/// use std::time::Duration;
///
/// use nkv_core::mailbox::Backlog;
/// use nkv_node::{Held, Holder};
/// use tokio::sync::Notify;
///
/// /// A connection without subscriptions: nothing but answers waits for its peer.
/// #[derive(Debug)]
/// struct Line {
///     unsent: AtomicUsize,
///     look_anew: Notify,
/// }
///
/// impl Holder for Line {
///     fn held(&self) -> Held {
///         Held { own: self.unsent.load(Relaxed), ..Held::default() }
///     }
///     fn backlog(&self) -> Backlog {
///         Backlog::default()
///     }
///     fn busy_for(&self) -> Duration {
///         Duration::ZERO // or since when the peer has taken nothing
///     }
///     fn give_up(&self) {}
///     fn wake(&self) {
///         self.look_anew.notify_one();
///     }
/// }
/// ```
pub trait Holder: fmt::Debug + Send + Sync + 'static {
    /// What is held now, beside what the door says by [`Peer::hold`](crate::Peer::hold).
    fn held(&self) -> Held;

    /// The items that wait for the peer, for people to look at.
    fn backlog(&self) -> Backlog;

    /// For how long the peer has not taken what is being written to it.
    fn busy_for(&self) -> Duration;

    /// Drops the changes that wait, in favour of a fresh snapshot; at once, and without a call of the node.
    fn give_up(&self);

    /// Has the door look anew whether its peer [is evicted](crate::Peer::is_evicted) or the node
    /// [stops](crate::Peer::is_stopping); at once, and without a call of the node.
    fn wake(&self);

    /// Whether the peer can be closed to make room. One in this process cannot.
    fn can_leave(&self) -> bool {
        true
    }
}

/// The backlog of a subscription of this process.
#[derive(Debug)]
pub(crate) struct InProcess(pub(crate) Observer);

impl Holder for InProcess {
    fn held(&self) -> Held {
        let Backlog { own_bytes: queue, event_bytes: changes, .. } = self.0.backlog();
        Held { queue, changes, ..Held::default() }
    }

    fn backlog(&self) -> Backlog {
        self.0.backlog()
    }

    fn busy_for(&self) -> Duration {
        Duration::ZERO
    }

    fn give_up(&self) {
        self.0.give_up();
    }

    fn wake(&self) {}

    fn can_leave(&self) -> bool {
        false
    }
}

/// What a peer said of itself.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Said {
    /// Its `client_uuid`, or what was made up for it when one was needed.
    pub client_uuid: Option<SubscriberId>,
    /// Its name for people.
    pub name: Option<Arc<str>>,
}

/// The budget of a node: see [`Handle::budget`](crate::Handle::budget).
pub struct Budget {
    limit: usize,
    /// Bytes of the changes that wait for any subscriber; the store keeps it up.
    event_bytes: Arc<AtomicUsize>,
    /// Bytes of answers that wait on all connections; the doors keep it up.
    waiting: Arc<AtomicUsize>,
    /// Bytes that the reading sides of all connections hold.
    read: AtomicUsize,
    /// Bytes of subscriptions to deep keys, on all connections.
    deep: AtomicUsize,
    holders: Mutex<Holders>,
    /// All connections are to end.
    is_stopping: AtomicBool,
    /// The last of them has ended.
    all_gone: Notify,
    /// Callers that wait for room, in the order in which they came; and when a connection was last closed for them.
    queue: Turns<Option<Instant>>,
    /// For those that make a long answer while the backlog is long: one at a time.
    leave: Arc<Semaphore>,
}

/// That a long answer may be made although the backlog is long, for as long as it is kept.
#[derive(Debug)]
pub struct Leave {
    _permit: OwnedSemaphorePermit,
}

#[derive(Default)]
struct Holders {
    next_id: u64,
    by_id: HashMap<u64, Arc<Account>>,
    /// How many of them are peers of doors.
    peers: u64,
}

/// What one holder has in the budget, and which it is.
pub(crate) struct Account {
    id: u64,
    pub(crate) opened: Instant,
    /// Its address, if it is the peer of a door.
    pub(crate) address: Option<Box<str>>,
    pub(crate) said: Mutex<Said>,
    pub(crate) subscriptions: AtomicU64,
    /// Bytes of its subscriptions to deep keys.
    deep: AtomicUsize,
    read: AtomicUsize,
    /// When its reading side came to hold what it holds of a request, in ms after the opening.
    read_since_ms: AtomicU64,
    pub(crate) source: Box<dyn Holder>,
    /// It holds what it holds because the server keeps it waiting.
    is_kept_waiting: AtomicBool,
    /// It was asked to give up what it holds, and will.
    is_leaving: AtomicBool,
    /// What it held when that was decided.
    evicted_with: AtomicUsize,
}

/// What one subscription takes of the room for deep keys, until it ends or is dropped.
#[derive(Debug)]
pub(crate) struct DeepHold {
    budget: Arc<Budget>,
    account: Option<Arc<Account>>,
    len: AtomicUsize,
}

/// What they may take on one connection; all together, a quarter of the limit.
const DEEP_LEN_MAX: usize = 4 << 20;

impl DeepHold {
    pub(crate) fn release(&self) {
        let len = self.len.swap(0, Relaxed);
        if let Some(account) = &self.account {
            account.deep.fetch_sub(len, Relaxed);
        }
        self.budget.deep.fetch_sub(len, Relaxed);
    }
}

impl Drop for DeepHold {
    fn drop(&mut self) {
        self.release();
    }
}

/// An account, open for as long as this is kept.
#[derive(Debug)]
pub(crate) struct Share {
    pub(crate) budget: Arc<Budget>,
    pub(crate) account: Arc<Account>,
}

/// What one holds, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// That is its own alone, such as answers.
    pub own: usize,
    /// That the mailbox takes for the backlog.
    pub queue: usize,
    /// Of changes that wait; others may share them.
    pub changes: usize,
    /// An encoding that is being written (its address), and its length; others may share it.
    pub gathered: (usize, usize),
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
fn weight(bytes: usize, holder: &Account) -> u128 {
    (bytes as u128).saturating_mul(holder.held_for().as_millis().saturating_add(1))
}

impl fmt::Debug for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Account").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Account {
    fn new(id: u64, address: Option<Box<str>>, source: Box<dyn Holder>) -> Self {
        let (opened, read_since_ms) = (Instant::now(), AtomicU64::new(0));
        let (said, subscriptions, deep, read, is_leaving, is_kept_waiting, evicted_with) = Default::default();
        Account {
            id,
            opened,
            address,
            said,
            subscriptions,
            deep,
            read,
            read_since_ms,
            source,
            is_leaving,
            is_kept_waiting,
            evicted_with,
        }
    }

    fn held(&self) -> Held {
        let held = self.source.held();
        Held { own: self.read.load(Relaxed).saturating_add(held.own), ..held }
    }

    /// For how long it has held what it holds without anything coming of it.
    fn held_for(&self) -> Duration {
        let busy_for = self.source.busy_for();
        if self.read.load(Relaxed) == 0 {
            return busy_for;
        }
        let since = Duration::from_millis(self.read_since_ms.load(Relaxed));
        busy_for.max(self.opened.elapsed().saturating_sub(since))
    }

    fn evict(&self) {
        if self.source.can_leave() {
            self.evicted_with.fetch_max(self.held().all(), Relaxed);
            self.is_leaving.store(true, Relaxed);
            self.source.wake();
        }
    }
}

impl Holders {
    /// What all that stay hold together, but for the changes that wait; and each of them with what it holds. An encoding
    /// that several write counts once.
    fn total_and_staying(&self) -> (usize, Vec<(Held, &Account)>) {
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

impl fmt::Debug for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Budget").field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl Budget {
    /// `event_bytes` is what the store counts the changes in that wait.
    pub(crate) fn new(limit: usize, event_bytes: Arc<AtomicUsize>) -> Arc<Self> {
        let (waiting, read, deep, holders, is_stopping, all_gone, queue) = Default::default();
        let leave = Arc::new(Semaphore::new(1));
        Arc::new(Budget { limit, event_bytes, waiting, read, deep, holders, is_stopping, all_gone, queue, leave })
    }

    /// What doors count the bytes of answers in that their peers have not taken.
    pub fn waiting(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.waiting)
    }

    /// The number of bytes of values that may be written before the backlogs of subscribers are to be looked at.
    pub(crate) fn check_every(&self) -> usize {
        self.limit / 64
    }

    /// Opens an account; one with an address is a peer's.
    pub(crate) fn share(self: &Arc<Self>, address: Option<Box<str>>, source: Box<dyn Holder>) -> Share {
        let mut holders = self.lock();
        let id = holders.next_id;
        holders.next_id = id.wrapping_add(1);
        holders.peers = holders.peers.saturating_add(u64::from(address.is_some()));
        let account = Arc::new(Account::new(id, address, source));
        holders.by_id.insert(id, Arc::clone(&account));
        drop(holders);
        Share { budget: Arc::clone(self), account }
    }

    /// The accounts of peers, in the order in which they came.
    pub(crate) fn peers(&self) -> Vec<Arc<Account>> {
        let mut peers: Vec<_> = self.lock().by_id.values().filter(|one| one.address.is_some()).cloned().collect();
        peers.sort_by_key(|one| one.id);
        peers
    }

    /// Whether `more` bytes of subscriptions to deep keys are too much, where as much `is_replaced` on another connection.
    pub(crate) fn is_deep_full(&self, account: Option<&Account>, more: usize, is_replaced: bool) -> bool {
        let before = self.deep.load(Relaxed);
        let all = if is_replaced { before } else { before.saturating_add(more) };
        let own = account.map_or(0, |account| account.deep.load(Relaxed).saturating_add(more));
        more > 0 && (own > DEEP_LEN_MAX || all > self.limit / 4)
    }

    pub(crate) fn hold_deep(self: &Arc<Self>, account: Option<Arc<Account>>, len: usize) -> DeepHold {
        if let Some(account) = &account {
            account.deep.fetch_add(len, Relaxed);
        }
        self.deep.fetch_add(len, Relaxed);
        DeepHold { budget: Arc::clone(self), account, len: AtomicUsize::new(len) }
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
                holder.source.give_up();
                others = others.saturating_sub(held.queue);
            }
            return;
        }
        let can_leave = |(_, holder): &&(Held, &Account)| holder.source.can_leave();
        let worst = staying.iter().filter(can_leave).max_by_key(|(held, holder)| weight(held.rest(), holder));
        if let Some((_, worst)) = worst.filter(|(held, _)| total.saturating_sub(held.rest()) > self.limit / 2) {
            worst.evict();
        }
    }

    /// If there is too much, gives those that are to leave some turns to do so.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub async fn relief(&self) {
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
            holder.source.wake();
        }
    }

    /// Waits until there is no peer any more, once [stopping](Self::stop).
    pub(crate) async fn peers_gone(&self) {
        while self.peer_count() > 0 {
            self.all_gone.notified().await;
        }
    }

    /// How many peers there are.
    pub(crate) fn peer_count(&self) -> u64 {
        self.lock().peers
    }

    /// Closes the connection that has been sending a request for longest, if that is longer than `patience`.
    pub(crate) fn evict_slowest(&self, patience: Duration) {
        let holders = self.lock();
        let sends = |holder: &&Arc<Account>| {
            let is_idle = holder.read.load(Relaxed) == 0 || holder.is_kept_waiting.load(Relaxed);
            !is_idle && !holder.is_leaving.load(Relaxed) && holder.held_for() > patience
        };
        if let Some(slowest) = holders.by_id.values().filter(sends).max_by_key(|holder| holder.held_for()) {
            slowest.evict();
        }
    }

    /// To be called when a peer may have come to hold much more.
    pub fn check_if_over(&self) {
        if self.is_over() {
            self.check();
        }
    }

    /// Whether all connections hold too much.
    pub fn is_over(&self) -> bool {
        self.queued() > self.limit
    }

    /// Waits until there is room for an answer or a snapshot of any size. Callers get it in the
    /// order in which they came, and the largest holder does not keep one waiting for longer than `patience`.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the place in the queue.
    pub async fn room(&self, patience: Duration) {
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

    /// Whether the backlog is so long that answers which take many turns are made one after another. Those that were
    /// [let in](Self::room) together would come to hold too much together.
    pub fn is_crowded(&self) -> bool {
        self.queued() > self.limit / 4
    }

    /// Waits for the others that are made, and until their peers have taken most of the answers, but for that no longer than
    /// `patience`.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the place in the queue.
    pub async fn leave(&self, patience: Duration) -> Option<Leave> {
        let leave = Arc::clone(&self.leave).acquire_owned().await.ok().map(|_permit| Leave { _permit });
        let start = Instant::now();
        while self.waiting.load(Relaxed) > self.limit / 4 && start.elapsed() < patience {
            tokio::time::sleep(ROOM_PAUSE).await;
        }
        leave
    }

    /// Closes the connection that holds most for longest, if all hold more than half of the limit. Changes that wait take
    /// no room of answers.
    fn evict_for_room(&self) -> bool {
        let holders = self.lock();
        let (total, staying) = holders.total_and_staying();
        let bytes = |held: &Held| held.rest();
        let connections = staying.iter().filter(|(_, holder)| holder.source.can_leave());
        let worst = connections.max_by_key(|(held, holder)| weight(bytes(held), holder));
        let worst = worst.filter(|(held, _)| total > self.limit / 2 && bytes(held) > 0);
        worst.inspect(|(_, worst)| worst.evict()).is_some()
    }

    /// All but the changes that wait, which are counted only when it matters.
    fn queued(&self) -> usize {
        self.waiting.load(Relaxed).saturating_add(self.read.load(Relaxed))
    }

    /// With the changes that wait.
    pub(crate) fn queued_bytes(&self) -> usize {
        self.queued().saturating_add(self.event_bytes.load(Relaxed))
    }

    fn lock(&self) -> MutexGuard<'_, Holders> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Share {
    /// Notes how many bytes this connection's reading side holds, and whether it has served a request meanwhile.
    pub(crate) fn hold(&self, bytes: usize, served: bool) {
        let before = self.account.read.swap(bytes, Relaxed);
        if bytes > 0 && (served || before == 0) {
            self.account.read_since_ms.store(millis(self.account.opened.elapsed()), Relaxed);
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
        self.account.is_kept_waiting.store(true, Relaxed);
    }

    /// It does so no more. The time that it did is not held against the connection.
    pub(crate) fn end_waiting(&self, waited: Duration) {
        let since = self.account.read_since_ms.load(Relaxed).saturating_add(millis(waited));
        self.account.read_since_ms.store(since.min(millis(self.account.opened.elapsed())), Relaxed);
        self.account.is_kept_waiting.store(false, Relaxed);
    }

    /// What this connection holds.
    pub(crate) fn held(&self) -> usize {
        self.account.held().all()
    }

    /// Whether this connection is to give up what it holds. Its outbox is polled anew when it is.
    pub(crate) fn is_evicted(&self) -> bool {
        self.account.is_leaving.load(Relaxed)
    }

    /// What this connection held when its eviction was decided: for the log, as it may have given it up since.
    pub(crate) fn evicted_with(&self) -> usize {
        self.account.evicted_with.load(Relaxed)
    }

    /// Whether all connections are to end. Its outbox is polled anew when they are.
    pub(crate) fn is_stopping(&self) -> bool {
        self.budget.is_stopping.load(Relaxed)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut holders = self.budget.lock();
        holders.by_id.remove(&self.account.id);
        if self.account.address.is_some() {
            holders.peers = holders.peers.saturating_sub(1);
        }
        let was_last = holders.peers == 0 && self.is_stopping();
        drop(holders);
        if was_last {
            self.budget.all_gone.notify_one();
        }
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
    use nkv_notify_tcp::{NotifierOptions, TcpNotifier};
    use nkv_protocol::Chunks;

    use super::*;

    /// The sending side of a connection.
    #[derive(Debug)]
    struct Connection(TcpNotifier);

    impl Holder for Connection {
        fn held(&self) -> Held {
            let Backlog { own_bytes: queue, event_bytes: changes, .. } = self.0.backlog();
            Held { own: self.0.waiting(), queue, changes, gathered: self.0.gathered() }
        }

        fn backlog(&self) -> Backlog {
            self.0.backlog()
        }

        fn busy_for(&self) -> Duration {
            self.0.busy_for()
        }

        fn give_up(&self) {
            self.0.give_up();
        }

        fn wake(&self) {
            self.0.wake();
        }
    }

    #[derive(Default)]
    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Relaxed);
        }
    }

    #[test]
    fn past_the_limit_only_the_one_with_the_largest_backlog_gives_its_changes_up() {
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
            let (share, backlog) = (budget.share(None, Box::new(InProcess(post.observer()))), post.backlog());
            assert!(backlog.own_bytes > 0);
            assert_eq!(share.held(), backlog.own_bytes + backlog.event_bytes);
        }
        let _shares: Vec<Share> =
            boxes.iter().map(|(post, _)| budget.share(None, Box::new(InProcess(post.observer())))).collect();
        budget.check();
        assert_eq!(queued(), [100, 10]);
        put("much", 100);
        budget.check();
        // That it begins anew.
        assert_eq!(queued(), [1, 10]);
    }

    #[tokio::test]
    async fn changes_that_wait_as_they_came_for_a_peer_that_takes_nothing_are_held_until_it_is_asked_to_close() {
        let (notifier, mut outbox) = TcpNotifier::new(NotifierOptions { slack: 20_000, ..NotifierOptions::default() });
        let (mut ours, _theirs) = tokio::io::duplex(1);
        let woken = Arc::new(Woken::default());
        let change_waker = Waker::from(Arc::clone(&woken));
        let mut answer = Chunks::default();
        answer.tail().extend(b"an answer");
        outbox.send(answer);
        poll_fn(|cx| Poll::Ready(outbox.poll(cx, &change_waker, &mut ours).is_pending())).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
        let share = Budget::new(1, Arc::default()).share(None, Box::new(Connection(notifier.clone())));
        for revision in 1..=2 {
            let (key, revision) = (Key::new("a").unwrap(), Revision::new(revision));
            let action = Action::Put { value: vec![0; 9_000].into(), expiry: None };
            let change = Change { key, revision, replaces: Revision::ZERO, action, meta: Meta::NONE };
            assert_eq!(notifier.notify(&Event::new(EventKind::Change(change))), Delivery::Queued);
        }
        assert!(share.held() > 18_000, "{}", share.held());
        woken.0.store(false, Relaxed);
        share.account.evict();
        assert!(share.is_evicted() && woken.0.load(Relaxed));
    }

    // The log said that connections were closed because of 0 bytes.
    #[tokio::test]
    async fn what_a_connection_is_closed_for_is_what_it_held_then() {
        let (notifier, _outbox) = TcpNotifier::new(NotifierOptions::default());
        let share = Budget::new(1 << 20, Arc::default()).share(None, Box::new(Connection(notifier)));
        share.hold(50_000, false);
        share.account.evict();
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
        let shares: Vec<Share> =
            boxes.iter().map(|(post, _)| budget.share(None, Box::new(InProcess(post.observer())))).collect();
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
        let share = budget.share(None, Box::new(Connection(waits.0)));
        let since = Instant::now();
        share.hold(1_000, true);
        share.begin_waiting();
        tokio::time::sleep(patience * 4).await;
        share.end_waiting(since.elapsed());
        budget.evict_slowest(patience);
        assert!(!share.is_evicted());
        let slow_share = budget.share(None, Box::new(Connection(slow.0)));
        slow_share.hold(1_000, true);
        tokio::time::sleep(patience * 4).await;
        budget.evict_slowest(patience);
        assert!(share.is_evicted() || slow_share.is_evicted());
    }

    #[tokio::test]
    async fn a_caller_that_waits_for_room_closes_no_connection_for_its_backlog_of_changes() {
        let budget = Budget::new(1 << 20, Arc::default());
        let (subscriber, _outbox) = TcpNotifier::new(NotifierOptions::default());
        let (reader, _other) = TcpNotifier::new(NotifierOptions::default());
        for revision in 1..=1_000 {
            assert_eq!(subscriber.notify(&change(revision, 4_000)), Delivery::Queued);
        }
        let subscriber = budget.share(None, Box::new(Connection(subscriber)));
        let reader = budget.share(None, Box::new(Connection(reader)));
        reader.hold((1 << 20) - 1, true);
        drop(tokio::time::timeout(Duration::from_secs(1), budget.room(Duration::ZERO)).await);
        assert_eq!((subscriber.is_evicted(), reader.is_evicted()), (false, true));
    }
}
