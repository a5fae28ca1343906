//! The conflating mailbox: between a store that never waits and a reader that may be slow.
//!
//! One slot per key: a newer change of a key takes the place of an older one that was not read yet and moves to the
//! end of the queue, so that revisions come out in increasing order; how many changes were passed over is counted.
//! What is not a change of a key (a snapshot, the end of a subscription, an item of the owner's own) is never conflated
//! and keeps its place. Memory is bounded by the number of keys and the slack, whatever the number of changes.
//!
//! A mailbox may have some slack: so many bytes of changes wait as they came, each to be told, and only what comes on top
//! of them is conflated. A reader that keeps up is then told every change, and many with each wake-up.
//!
//! No runtime: the reader polls with a waker, or blocks its thread. Explored with loom: see `tests/loom_mailbox.rs`.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::key::Key;
use crate::notifier::{Delivery, Notifier};
use crate::record::{Action, Change, Event, EventKind};
use crate::revision::Revision;
use crate::sync::{AtomicBool, Condvar, Mutex, MutexGuard};

/// Makes a mailbox; `T` is what its owner wants to send along the same queue, such as answers to requests.
///
/// # Examples
///
/// ```
/// use nkv_core::mailbox::{Item, mailbox};
/// use nkv_core::{Key, NoPersist, NotifyKeyValue, Pattern, PutOptions};
///
/// let store = NotifyKeyValue::open(NoPersist::default(), 0)?;
/// let (post, inbox) = mailbox::<()>();
/// store.subscribe(Pattern::new("lamp")?, "me".into(), post, false);
///
/// let key = Key::new("lamp.kitchen")?;
/// for value in ["on", "off", "on"] {
///     store.put(&key, value, PutOptions::default())?;
/// }
/// let Some(Item::Event { skipped, .. }) = inbox.try_take() else { panic!("nothing was told") };
/// assert_eq!(skipped, 2); // only the latest state, and how many were passed over
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use]
pub fn mailbox<T>() -> (Mailbox<T>, Inbox<T>) {
    mailbox_with_slack(0)
}

/// Makes a mailbox in which changes of so many bytes (see [`ITEM_LEN`]) may wait without being conflated.
#[must_use]
pub fn mailbox_with_slack<T>(slack: usize) -> (Mailbox<T>, Inbox<T>) {
    let (state, arrived) = (Mutex::new(State::new(slack)), Condvar::new());
    let (is_waited_for, posters) = (AtomicBool::new(false), AtomicUsize::new(1));
    let shared = Arc::new(Shared { state, arrived, is_waited_for, posters });
    (Mailbox { shared: Arc::clone(&shared) }, Inbox { shared })
}

/// What an item counts, in bytes; a change counts its key and its value besides.
pub const ITEM_LEN: usize = 64;

/// What comes out of a mailbox.
#[derive(Clone, Debug)]
pub enum Item<T = Infallible> {
    /// An event.
    Event {
        /// The event.
        event: Arc<Event>,
        /// How many changes of its key, since the last one taken, were passed over in its favour.
        skipped: u64,
    },
    /// An item of the owner's own.
    Own(T),
}

impl<T> Item<T> {
    fn len(&self) -> usize {
        match self {
            Item::Event { event, .. } => match event.kind() {
                EventKind::Change(change) => change_len(change),
                _ => ITEM_LEN,
            },
            Item::Own(_) => ITEM_LEN,
        }
    }

    fn is_snapshot(&self) -> bool {
        matches!(self, Item::Event { event, .. } if matches!(event.kind(), EventKind::Snapshot(_)))
    }
}

fn change_len(change: &Change) -> usize {
    let value_len = match &change.action {
        Action::Put { value, .. } => value.len(),
        Action::Delete { .. } => 0,
    };
    ITEM_LEN + change.key.as_str().len() + value_len
}

/// What waits in a mailbox, for people to look at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Items not yet taken.
    pub queued: usize,
    /// Changes passed over since the mailbox was made.
    pub skipped: u64,
    /// How much of the slack is taken, in bytes.
    pub slack: usize,
    /// By how many of the items.
    pub slack_items: usize,
}

/// The side that posts. Clones post to the same mailbox; when the last is dropped, the mailbox closes.
pub struct Mailbox<T = Infallible> {
    shared: Arc<Shared<T>>,
}

/// The side that takes. Dropping it closes the mailbox.
pub struct Inbox<T = Infallible> {
    shared: Arc<Shared<T>>,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    arrived: Condvar,
    /// The mailbox is empty and has a waker: whatever comes next will wake the reader. Changed under the lock, and read
    /// without it by the reader alone, who need not look again while it holds.
    is_waited_for: AtomicBool,
    /// How many post to it. Not explored with loom: the last to go closes the mailbox, which is.
    posters: AtomicUsize,
}

/// A place in the queue.
struct Place<T> {
    /// `None` where a newer change of the same key took the item's place.
    item: Option<Item<T>>,
    /// How much of the slack it takes; an item that does keeps its place.
    slack: usize,
}

struct State<T> {
    queue: VecDeque<Place<T>>,
    /// Number of the item at the front; items are numbered in the order of their arrival.
    front: u64,
    /// Where the pending change of a key is, by item number.
    slots: HashMap<Key, u64>,
    /// How many `None`s the queue holds.
    vacant: usize,
    /// The newest revision told or pending: a change up to it is a duplicate.
    newest: Revision,
    skipped: u64,
    /// How much slack there is, and how much of it is taken.
    slack: usize,
    slack_taken: usize,
    slack_items: usize,
    /// Items taken since the queue was empty last.
    taken: usize,
    closed: bool,
    waker: Option<Waker>,
    /// Woken by [`Mailbox::wake`] alone: the reader wants no items for now.
    called: Option<Waker>,
    /// How many threads block until something comes.
    blocked: usize,
}

/// Below this many, vacant places are not worth tidying and capacity is not worth giving back.
const TIDY_MIN: usize = 64;

/// A reader that keeps up needs about as much room again and again: so much of it is kept, and given back when it is not
/// used any more.
const KEEP_MAX: usize = 1_024;

impl<T> State<T> {
    fn new(slack: usize) -> Self {
        State {
            queue: VecDeque::new(),
            front: 0,
            slots: HashMap::new(),
            vacant: 0,
            newest: Revision::ZERO,
            skipped: 0,
            slack,
            slack_taken: 0,
            slack_items: 0,
            taken: 0,
            closed: false,
            waker: None,
            called: None,
            blocked: 0,
        }
    }

    fn back(&self) -> u64 {
        self.front + self.queue.len() as u64
    }

    fn post_own(&mut self, item: T) {
        self.queue.push_back(Place { item: Some(Item::Own(item)), slack: 0 });
    }

    /// How much of the slack a change takes; none if it is to be conflated, as all are while one is that was not read.
    fn slack_for(&mut self, change: &Change) -> usize {
        let len = change_len(change);
        if self.slack_taken + len > self.slack || !self.slots.is_empty() {
            return 0;
        }
        self.slack_taken += len;
        self.slack_items += 1;
        len
    }

    fn post_event(&mut self, event: &Arc<Event>) -> Delivery {
        let (mut item_skipped, mut slack) = (0, 0);
        match event.kind() {
            EventKind::Change(change) => {
                if change.revision <= self.newest {
                    return Delivery::Queued; // a second subscription of this reader covers the key too
                }
                self.newest = change.revision;
                slack = self.slack_for(change);
                if slack == 0 {
                    item_skipped = self.take_place(&change.key);
                }
            }
            EventKind::Snapshot(snapshot) => {
                self.newest = self.newest.max(snapshot.revision);
                // What waits of its keys is told before it, and nothing after it counts from there.
                self.slots.retain(|key, _| !snapshot.pattern.covers(key));
            }
            EventKind::Ended { .. } => {}
        }
        let item = Item::Event { event: Arc::clone(event), skipped: item_skipped };
        self.queue.push_back(Place { item: Some(item), slack });
        if self.vacant > TIDY_MIN && self.vacant > self.queue.len() / 2 {
            self.tidy();
        }
        if item_skipped > 0 { Delivery::Conflated } else { Delivery::Queued }
    }

    /// Gives the next item to come the slot of its key, and says how many changes it is told in place of.
    fn take_place(&mut self, key: &Key) -> u64 {
        let back = self.back();
        let Some(slot) = self.slots.get_mut(key) else {
            self.slots.insert(key.clone(), back);
            return 0;
        };
        let at = (std::mem::replace(slot, back) - self.front) as usize;
        self.vacant += 1;
        self.skipped += 1;
        match self.queue.get_mut(at).and_then(|place| place.item.take()) {
            Some(Item::Event { skipped, .. }) => skipped + 1,
            _ => 0,
        }
    }

    /// Drops the vacant places: a reader that stands still while one key changes must not cost memory.
    fn tidy(&mut self) {
        self.queue.retain(|place| place.item.is_some());
        self.vacant = 0;
        for (number, place) in (self.front..).zip(&self.queue) {
            if let Some(Item::Event { event, .. }) = &place.item
                && place.slack == 0
                && let EventKind::Change(change) = event.kind()
                && let Some(slot) = self.slots.get_mut(&change.key)
            {
                // Of two items of a key, one stands before a snapshot; the slot is the later one's, and ends up so.
                *slot = number;
            }
        }
    }

    fn take(&mut self) -> Option<Item<T>> {
        while let Some(Place { item, slack }) = self.queue.pop_front() {
            self.front += 1;
            self.taken += 1;
            self.slack_taken -= slack;
            self.slack_items -= usize::from(slack > 0);
            let Some(item) = item else {
                self.vacant -= 1;
                continue;
            };
            if let Item::Event { event, .. } = &item
                && slack == 0
                && let EventKind::Change(change) = event.kind()
                && self.slots.get(&change.key) == Some(&(self.front - 1))
            {
                self.slots.remove(&change.key);
            }
            return Some(item);
        }
        let was_full = std::mem::take(&mut self.taken) > self.queue.capacity() / 4;
        if self.queue.capacity() > if was_full { KEEP_MAX } else { TIDY_MIN } {
            self.queue = VecDeque::new();
            self.slots = HashMap::new();
        }
        None
    }
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Nothing in this module panics while it holds the lock.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Changes the state, then wakes the reader outside the lock.
    fn post<R>(&self, change: impl FnOnce(&mut State<T>) -> R) -> R {
        let mut state = self.lock();
        let result = change(&mut state);
        let (waker, blocked) = (state.waker.take(), state.blocked > 0);
        if waker.is_some() {
            self.is_waited_for.store(false, Release);
        }
        drop(state);
        if blocked {
            self.arrived.notify_one(); // a system call
        }
        if let Some(waker) = waker {
            waker.wake();
        }
        result
    }

    fn close(&self) {
        self.post(|state| state.closed = true);
        self.arrived.notify_all();
    }
}

impl<T> Mailbox<T> {
    /// Posts an item of the owner's own, in order with the events. Returns it if the mailbox is closed.
    ///
    /// # Errors
    ///
    /// The item, if nobody will take it.
    pub fn post(&self, item: T) -> Result<(), T> {
        self.shared.post(|state| {
            if state.closed {
                return Err(item);
            }
            state.post_own(item);
            Ok(())
        })
    }

    /// Closes the mailbox: nothing more is posted, and the reader ends after what is already there.
    pub fn close(&self) {
        self.shared.close();
    }

    /// Whether the mailbox is closed, from either side.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.shared.lock().closed
    }

    /// Wakes the reader although nothing has come: somebody has something to tell it by other means.
    pub fn wake(&self) {
        let called = self.shared.post(|state| state.called.take());
        if let Some(waker) = called {
            waker.wake();
        }
    }

    /// What waits to be taken.
    #[must_use]
    pub fn backlog(&self) -> Backlog {
        let state = self.shared.lock();
        let (slack, slack_items) = (state.slack_taken, state.slack_items);
        Backlog { queued: state.queue.len() - state.vacant, skipped: state.skipped, slack, slack_items }
    }

    /// Whether both post to the same mailbox.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }
}

impl<T: Send + 'static> Notifier for Mailbox<T> {
    fn notify(&self, event: &Arc<Event>) -> Delivery {
        self.shared.post(|state| if state.closed { Delivery::Closed } else { state.post_event(event) })
    }
}

impl<T> Inbox<T> {
    /// Posts an item of the owner's own from the reader's side, behind what waits.
    pub fn post(&self, item: T) {
        let mut state = self.shared.lock();
        state.post_own(item);
        self.shared.is_waited_for.store(false, Release);
    }

    /// Sets how many bytes of changes may wait without being conflated from now on; returns how many could before. What
    /// waits already stays as it is.
    pub fn set_slack(&self, slack: usize) -> usize {
        std::mem::replace(&mut self.shared.lock().slack, slack)
    }

    /// Takes the next item if one is there.
    pub fn try_take(&self) -> Option<Item<T>> {
        self.shared.lock().take()
    }

    /// Takes the next item, or has `cx` woken when there is one; `None` once the mailbox is closed and empty.
    ///
    /// One reader at a time: a later call's waker replaces an earlier one's.
    pub fn poll_take(&self, cx: &mut Context<'_>) -> Poll<Option<Item<T>>> {
        self.poll_with(cx, State::take)
    }

    /// As [`poll_take`](Self::poll_take), for many at once: moves items to the end of `items` until none is left, or they
    /// have `len` bytes (see [`ITEM_LEN`]), or the last one is a snapshot, which may be large. False once the mailbox is
    /// closed and empty. If none is left, `cx` is woken for the next as well: see [`is_waited_for`](Self::is_waited_for).
    /// `len` is not to be zero: that takes nothing, and waits for nothing.
    pub fn poll_take_many(&self, cx: &mut Context<'_>, len: usize, items: &mut Vec<Item<T>>) -> Poll<bool> {
        let mut state = self.shared.lock();
        let mut taken = 0;
        while taken < len {
            let Some(item) = state.take() else {
                let is_closed = state.closed;
                if !is_closed {
                    self.wait(state, cx);
                }
                return if taken > 0 || is_closed { Poll::Ready(taken > 0) } else { Poll::Pending };
            };
            taken += if item.is_snapshot() { len } else { item.len() };
            items.push(item);
        }
        Poll::Ready(true)
    }

    /// Has `cx` woken by [`Mailbox::wake`] alone, for a reader that has its hands full.
    pub fn poll_called(&self, cx: &mut Context<'_>) {
        let mut state = self.shared.lock();
        let old = match &state.called {
            Some(waker) if waker.will_wake(cx.waker()) => None,
            _ => state.called.replace(cx.waker().clone()),
        };
        drop(state);
        drop(old);
    }

    /// Whether the mailbox is empty, and will wake whoever polled it last when it is no more: no need to poll it again
    /// with the same waker. Takes no lock.
    #[must_use]
    pub fn is_waited_for(&self) -> bool {
        self.shared.is_waited_for.load(Acquire)
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        if self.is_waited_for() {
            return true;
        }
        let state = self.shared.lock();
        state.queue.len() == state.vacant
    }

    fn poll_with<R>(&self, cx: &mut Context<'_>, take: impl FnOnce(&mut State<T>) -> Option<R>) -> Poll<Option<R>> {
        let mut state = self.shared.lock();
        if let Some(taken) = take(&mut state) {
            return Poll::Ready(Some(taken));
        }
        if state.closed {
            return Poll::Ready(None);
        }
        self.wait(state, cx);
        Poll::Pending
    }

    /// Has `cx` woken when something comes.
    fn wait(&self, mut state: MutexGuard<'_, State<T>>, cx: &mut Context<'_>) {
        let old = match &state.waker {
            Some(waker) if waker.will_wake(cx.waker()) => None,
            _ => state.waker.replace(cx.waker().clone()),
        };
        self.shared.is_waited_for.store(true, Release);
        // A waker may own what owns a mailbox: it must not be dropped under the lock.
        drop(state);
        drop(old);
    }

    /// Takes the next item; `None` once the mailbox is closed and empty.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub async fn take(&self) -> Option<Item<T>> {
        poll_fn(|cx| self.poll_take(cx)).await
    }

    /// Takes the next item, blocking the thread until there is one; `None` once the mailbox is closed and empty.
    pub fn take_blocking(&self) -> Option<Item<T>> {
        let mut state = self.shared.lock();
        loop {
            if let Some(item) = state.take() {
                return Some(item);
            }
            if state.closed {
                return None;
            }
            state.blocked += 1;
            state = self.shared.arrived.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
            state.blocked -= 1;
        }
    }

    /// Like [`take_blocking`](Self::take_blocking), for at most `patience`; `None` also when that has passed.
    pub fn take_timeout(&self, patience: Duration) -> Option<Item<T>> {
        let deadline = Instant::now().checked_add(patience);
        let mut state = self.shared.lock();
        loop {
            if let Some(item) = state.take() {
                return Some(item);
            }
            let left = deadline.map_or(patience, |deadline| deadline.saturating_duration_since(Instant::now()));
            if state.closed || left.is_zero() {
                return None;
            }
            state.blocked += 1;
            let waited = self.shared.arrived.wait_timeout(state, left);
            state = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
            state.blocked -= 1;
        }
    }
}

impl<T> Clone for Mailbox<T> {
    fn clone(&self) -> Self {
        self.shared.posters.fetch_add(1, Relaxed);
        Mailbox { shared: Arc::clone(&self.shared) }
    }
}

impl<T> Drop for Mailbox<T> {
    fn drop(&mut self) {
        if self.shared.posters.fetch_sub(1, AcqRel) == 1 {
            self.shared.close();
        }
    }
}

impl<T> Drop for Inbox<T> {
    fn drop(&mut self) {
        // What was not taken will not be: give its memory back now, not when the last poster is gone.
        let left = self.shared.post(|state| {
            state.closed = true;
            (state.vacant, state.slack_taken, state.slack_items) = (0, 0, 0);
            (std::mem::take(&mut state.queue), std::mem::take(&mut state.slots))
        });
        drop(left);
    }
}

impl<T> fmt::Debug for Mailbox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Backlog { queued, skipped, .. } = self.backlog();
        f.debug_struct("Mailbox").field("queued", &queued).field("skipped", &skipped).finish()
    }
}

impl<T> fmt::Debug for Inbox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbox").finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
#[path = "mailbox_tests.rs"]
mod tests;
