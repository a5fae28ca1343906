//! The conflating mailbox: between a store that never waits and a reader that may be slow.
//!
//! One slot per key: a newer change of a key takes the place of an older one that was not read yet and moves to the
//! end of the queue, so that revisions come out in increasing order; how many changes were passed over is counted. A key
//! that came and went unread takes no place at all. What is not a change of a key (the beginning and the end of a
//! subscription, an item of the owner's own) is never conflated and keeps its place.
//!
//! Memory is bounded by the keys that the subscriptions cover now, [`DELETES_MAX`] and the slack, whatever comes and goes:
//! past that, all changes that wait are dropped, and each subscription begins anew with a fresh snapshot. A snapshot takes
//! no memory before it is read: it comes out in parts, of which one at a time exists.
//!
//! A mailbox may have some slack: a number of bytes of changes that wait as they came, each to be read; only what comes
//! on top of them is conflated. A reader that keeps up then reads every change, and many with each wake-up.
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

use crate::event::{Began, BeginCause, Event, EventKind, Snapshot, SnapshotReader};
use crate::key::Key;
use crate::notifier::{Delivery, Notifier};
use crate::record::{Action, Change};
use crate::revision::{Epoch, Revision};
use crate::sync::{AtomicBool, Condvar, Mutex, MutexGuard};
use crate::wake::wake;

/// Makes a mailbox; `T` is what its owner wants to send along the same queue, such as answers to requests.
///
/// # Examples
///
/// ```
/// use nkv_core::mailbox::{Item, mailbox};
/// use nkv_core::{EventKind, Key, NoPersist, NotifyKeyValue, Pattern, PutOptions};
///
/// let store = NotifyKeyValue::open(NoPersist::default())?;
/// let (post, inbox) = mailbox::<()>();
/// store.subscribe(Pattern::new("lamp")?, "me".into(), post, false);
///
/// let key = Key::new("lamp.kitchen")?;
/// for value in ["on", "off", "on"] {
///     store.put(&key, value, PutOptions::default())?;
/// }
/// let Some(Item::Event { event, .. }) = inbox.try_take() else { panic!("nothing came") };
/// assert!(matches!(event.kind(), EventKind::Began(_)));
/// let Some(Item::Event { skipped, .. }) = inbox.try_take() else { panic!("nothing came") };
/// assert_eq!(skipped, 2); // only the latest state, and how many were passed over
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use]
pub fn mailbox<T>() -> (Mailbox<T>, Inbox<T>) {
    mailbox_with_slack(0)
}

/// Makes a mailbox in which changes of up to `slack` bytes (see [`ITEM_LEN`]) may wait without being conflated.
#[must_use]
pub fn mailbox_with_slack<T>(slack: usize) -> (Mailbox<T>, Inbox<T>) {
    let (state, arrived) = (Mutex::new(State::new(slack)), Condvar::new());
    let (is_waited_for, posters) = (AtomicBool::new(false), AtomicUsize::new(1));
    let shared = Arc::new(Shared { state, arrived, is_waited_for, posters });
    (Mailbox { shared: Arc::clone(&shared) }, Inbox { shared })
}

/// What an item counts, in bytes; a change counts its key and its value besides.
pub const ITEM_LEN: usize = 64;

/// How many deletes may wait beside the changes of keys that there are.
pub const DELETES_MAX: usize = 4_096;

/// What becomes of a subscriber whose backlog is too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overflow {
    /// All changes that wait are dropped; each subscription [begins anew](crate::BeginCause::Reset).
    #[default]
    Reset,
    /// The mailbox closes: its reader cannot understand that a subscription begins anew. It closes too when the data begins
    /// another epoch.
    Close,
}

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

    fn change(&self) -> Option<&Change> {
        match self {
            Item::Event { event, .. } => change_of(event),
            Item::Own(_) => None,
        }
    }
}

fn change_of(event: &Event) -> Option<&Change> {
    match event.kind() {
        EventKind::Change(change) => Some(change),
        _ => None,
    }
}

fn is_delete(change: &Change) -> bool {
    matches!(change.action, Action::Delete { .. })
}

fn change_len(change: &Change) -> usize {
    ITEM_LEN + change.key.as_str().len() + change.action.value_len()
}

/// The backlog of a mailbox, for people to look at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Items not yet taken.
    pub queued: usize,
    /// Changes passed over or dropped since the mailbox was made.
    pub skipped: u64,
    /// What the mailbox takes for the backlog, in bytes, without the events themselves.
    pub own_bytes: usize,
    /// What the changes that wait take, in bytes; others may share them.
    pub event_bytes: usize,
    /// How much of the slack is taken, in bytes.
    pub slack: usize,
}

/// The side that posts. Clones post to the same mailbox; when the last is dropped, the mailbox closes.
pub struct Mailbox<T = Infallible> {
    shared: Arc<Shared<T>>,
}

/// Looks at a mailbox without keeping it open.
pub struct Observer<T = Infallible> {
    shared: Arc<Shared<T>>,
}

/// The side that takes: one reader at a time. Dropping it closes the mailbox.
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

/// Where the pending change of a key is.
struct Slot {
    number: u64,
    /// When the first change that is passed over for it came, the key was absent, and no snapshot that is still to be
    /// read has it: of a key that is gone again the reader need not know.
    is_new: bool,
}

/// What comes next.
enum Next<T> {
    Item(Item<T>),
    Part(SnapshotReader),
}

struct State<T> {
    queue: VecDeque<Place<T>>,
    /// Number of the item at the front; items are numbered in the order of their arrival.
    front: u64,
    slots: HashMap<Key, Slot>,
    /// How many of the slots have a delete.
    deletes: usize,
    /// What the changes in the queue take.
    event_bytes: usize,
    /// In which they are.
    epoch: Option<Epoch>,
    /// The subscriptions that post here.
    subscriptions: Vec<Began>,
    /// How many snapshots wait to be read, with the one that is being read.
    snapshots: usize,
    reading: Option<SnapshotReader>,
    /// A part of it is being read: nothing else is to be had until it is there.
    is_part_on_its_way: bool,
    overflow: Overflow,
    has_overflowed: bool,
    knows_one_epoch: bool,
    /// How many `None`s the queue holds.
    vacant: usize,
    /// The sequence number of the newest change that came: one up to it is a duplicate.
    newest: u64,
    /// The reader may know keys that are absent: the end of one that came and went unread is not left out.
    keeps_ends: bool,
    skipped: u64,
    /// How much slack there is, and how much of it is taken.
    slack: usize,
    slack_taken: usize,
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

/// The room that is kept, as a reader that keeps up needs about as much again and again. It is given back when it is not
/// used any more.
const KEEP_MAX: usize = 1_024;

impl<T> State<T> {
    fn new(slack: usize) -> Self {
        State {
            queue: VecDeque::new(),
            front: 0,
            slots: HashMap::new(),
            deletes: 0,
            event_bytes: 0,
            epoch: None,
            subscriptions: Vec::new(),
            snapshots: 0,
            reading: None,
            is_part_on_its_way: false,
            overflow: Overflow::default(),
            has_overflowed: false,
            knows_one_epoch: false,
            vacant: 0,
            newest: 0,
            keeps_ends: false,
            skipped: 0,
            slack,
            slack_taken: 0,
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
        self.push(Item::Own(item), 0);
    }

    /// How much of the slack a change takes; none if it is to be conflated, as all are while one is that was not read.
    fn slack_for(&mut self, change: &Change) -> usize {
        let len = change_len(change);
        if self.slack_taken + len > self.slack || !self.slots.is_empty() || self.snapshots > 0 {
            return 0;
        }
        self.slack_taken += len;
        len
    }

    fn post_event(&mut self, event: &Arc<Event>) -> Delivery {
        match event.kind() {
            EventKind::Change(change) => return self.post_change(event, change),
            EventKind::Began(began) if began.cause == BeginCause::Reset && self.ends_with_epoch() => {
                self.closed = true;
                self.drop_changes();
                return Delivery::Closed;
            }
            EventKind::Began(began) => {
                // Those that were forgotten leave without an event: before the list grows for them.
                if self.subscriptions.len() == self.subscriptions.capacity() {
                    self.subscriptions.retain(|known| !known.reader.has_ended());
                }
                self.note_subscription(began);
                if self.epoch.replace(began.epoch).is_some_and(|epoch| epoch != began.epoch) {
                    // All subscriptions begin anew: what came before has no place behind their snapshots.
                    self.drop_changes();
                }
                if began.has_snapshot {
                    self.snapshots += 1;
                    // The snapshot may have what was passed over until now.
                    let covered = self.slots.iter_mut().filter(|(key, _)| began.pattern.covers(key));
                    covered.for_each(|(_, slot)| slot.is_new = false);
                }
            }
            EventKind::Ended { .. } => self.subscriptions.retain(|known| !known.reader.has_ended()),
            EventKind::Snapshot(_) => {}
        }
        self.push(Item::Event { event: Arc::clone(event), skipped: 0 }, 0);
        Delivery::Queued
    }

    /// Whether its reader is to come anew where the data begins another epoch.
    fn ends_with_epoch(&self) -> bool {
        self.knows_one_epoch || self.overflow == Overflow::Close
    }

    fn note_subscription(&mut self, began: &Began) {
        if began.cause == BeginCause::Reset
            && let Some(known) = self.subscriptions.iter_mut().find(|known| known.reader == began.reader)
        {
            *known = began.clone();
        } else {
            self.subscriptions.push(began.clone());
        }
    }

    fn post_change(&mut self, event: &Arc<Event>, change: &Change) -> Delivery {
        let sequence = event.sequence();
        if sequence <= self.newest {
            return Delivery::Queued; // a second subscription of this reader covers the key too
        }
        if self.snapshots > 0 && self.is_for_a_snapshot(&change.key, sequence) {
            return Delivery::Queued;
        }
        self.newest = sequence;
        let slack = self.slack_for(change);
        let mut item_skipped = 0;
        if slack == 0 {
            match self.take_place(change) {
                Some(skipped) => item_skipped = skipped,
                None => return Delivery::Conflated,
            }
        }
        self.event_bytes += event.size();
        self.push(Item::Event { event: Arc::clone(event), skipped: item_skipped }, slack);
        if self.vacant > TIDY_MIN && self.vacant > self.queue.len() / 2 {
            self.tidy();
        }
        if self.deletes > DELETES_MAX {
            self.overflow();
            return if self.closed { Delivery::Closed } else { Delivery::Conflated };
        }
        if item_skipped > 0 { Delivery::Conflated } else { Delivery::Queued }
    }

    /// Whether the backlog was given up after the store had decided to give this change: a snapshot that waits will have it.
    fn is_for_a_snapshot(&self, key: &Key, sequence: u64) -> bool {
        let mut covering = self.subscriptions.iter().filter(|began| began.pattern.covers(key)).peekable();
        covering.peek().is_some() && !covering.any(|began| began.reader.wants(key, sequence))
    }

    fn push(&mut self, item: Item<T>, slack: usize) {
        self.queue.push_back(Place { item: Some(item), slack });
    }

    /// Gives the next item to come the slot of its key, and says how many changes are passed over for it; `None` if the
    /// reader knows nothing of the key and is to know nothing.
    fn take_place(&mut self, change: &Change) -> Option<u64> {
        let (back, is_delete) = (self.back(), is_delete(change));
        let Some(slot) = self.slots.get_mut(&change.key) else {
            let is_new = change.replaces == Revision::ZERO && self.snapshots == 0 && !self.keeps_ends;
            self.slots.insert(change.key.clone(), Slot { number: back, is_new });
            self.deletes += usize::from(is_delete);
            return Some(0);
        };
        let (at, is_new) = ((std::mem::replace(&mut slot.number, back) - self.front) as usize, slot.is_new);
        let old = self.queue.get_mut(at).and_then(|place| place.item.take());
        self.vacant += 1;
        self.skipped += 1;
        let mut passed_over = 0;
        if let Some(Item::Event { event, skipped }) = &old {
            passed_over = skipped + 1;
            self.event_bytes -= event.size();
            self.deletes -= usize::from(change_of(event).is_some_and(self::is_delete));
        }
        if is_delete && is_new {
            self.slots.remove(&change.key);
            self.skipped += 1;
            return None;
        }
        self.deletes += usize::from(is_delete);
        Some(passed_over)
    }

    fn overflow(&mut self) {
        match self.overflow {
            Overflow::Reset => self.begin_anew(),
            Overflow::Close => {
                (self.closed, self.has_overflowed) = (true, true);
                self.drop_changes();
            }
        }
    }

    /// Drops all changes, in favour of fresh snapshots of what the subscriptions cover.
    fn begin_anew(&mut self) {
        self.drop_changes();
        self.subscriptions.retain(|known| !known.reader.has_ended());
        for at in 0..self.subscriptions.len() {
            let Some(began) = self.subscriptions.get(at).filter(|began| began.reader.reset()) else { continue };
            let event = Event::new(EventKind::Began(began.clone().as_reset()));
            self.snapshots += 1;
            self.push(Item::Event { event, skipped: 0 }, 0);
        }
    }

    fn drop_changes(&mut self) {
        let before = self.queue.len() - self.vacant;
        self.queue.retain(|place| place.item.as_ref().is_some_and(|item| item.change().is_none()));
        self.queue.shrink_to(TIDY_MIN.max(self.queue.len() * 2));
        self.skipped += (before - self.queue.len()) as u64;
        self.slots = HashMap::new();
        (self.vacant, self.deletes, self.event_bytes) = (0, 0, 0);
        self.slack_taken = 0;
    }

    /// Drops the vacant places: a reader that stands still while one key changes must not cost memory.
    fn tidy(&mut self) {
        self.queue.retain(|place| place.item.is_some());
        self.vacant = 0;
        for (number, place) in (self.front..).zip(&self.queue) {
            if place.slack == 0
                && let Some(change) = place.item.as_ref().and_then(Item::change)
                && let Some(slot) = self.slots.get_mut(&change.key)
            {
                slot.number = number;
            }
        }
    }

    fn next(&mut self) -> Option<Next<T>> {
        if let Some(reader) = &self.reading {
            let is_free = !std::mem::replace(&mut self.is_part_on_its_way, true);
            return is_free.then(|| Next::Part(reader.clone()));
        }
        while let Some(Place { item, slack }) = self.queue.pop_front() {
            self.front += 1;
            self.taken += 1;
            self.slack_taken -= slack;
            let Some(item) = item else {
                self.vacant -= 1;
                continue;
            };
            if let Item::Event { event, .. } = &item {
                match event.kind() {
                    EventKind::Change(change) => {
                        self.event_bytes -= event.size();
                        if slack == 0 {
                            self.slots.remove(&change.key);
                            self.deletes -= usize::from(is_delete(change));
                        }
                    }
                    EventKind::Began(began) if began.has_snapshot => self.reading = Some(began.reader.clone()),
                    _ => {}
                }
            }
            return Some(Next::Item(item));
        }
        let was_full = std::mem::take(&mut self.taken) > self.queue.capacity() / 4;
        if self.queue.capacity() > if was_full { KEEP_MAX } else { TIDY_MIN } {
            self.queue = VecDeque::new();
            self.slots = HashMap::new();
        }
        None
    }

    /// A part of the snapshot was read; `None` if there will be no more.
    fn take_part(&mut self, part: Option<Snapshot>) -> Option<Item<T>> {
        self.is_part_on_its_way = false;
        if part.as_ref().is_none_or(|part| part.is_last) {
            self.reading = None;
            self.snapshots = self.snapshots.saturating_sub(1);
        }
        part.map(|part| Item::Event { event: Event::new(EventKind::Snapshot(part)), skipped: 0 })
    }

    fn is_empty(&self) -> bool {
        self.reading.is_none() && self.queue.len() == self.vacant
    }

    /// What queue and slots take.
    fn own_bytes(&self) -> usize {
        // A hash table keeps an eighth of its places free, and a byte beside each.
        let slots = self.slots.capacity() * (size_of::<(Key, Slot)>() + 1) * 8 / 7;
        self.queue.capacity() * size_of::<Place<T>>() + slots
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
            wake(waker);
        }
        result
    }

    /// Takes the next item; the lock is given back while part of a snapshot is read, since that takes locks of the store.
    fn take<'a>(&'a self, mut state: MutexGuard<'a, State<T>>) -> Result<Item<T>, MutexGuard<'a, State<T>>> {
        loop {
            match state.next() {
                None => return Err(state),
                Some(Next::Item(item)) => return Ok(item),
                Some(Next::Part(reader)) => {
                    let item;
                    (state, item) = self.read_part(state, &reader);
                    if let Some(item) = item {
                        return Ok(item);
                    }
                }
            }
        }
    }

    fn read_part<'a>(
        &'a self,
        state: MutexGuard<'a, State<T>>,
        reader: &SnapshotReader,
    ) -> (MutexGuard<'a, State<T>>, Option<Item<T>>) {
        drop(state);
        let part = reader.next_part();
        let mut state = self.lock();
        let item = state.take_part(part);
        if state.blocked > 0 {
            self.arrived.notify_all();
        }
        (state, item)
    }

    fn backlog(&self) -> Backlog {
        let state = self.lock();
        Backlog {
            queued: state.queue.len() - state.vacant,
            skipped: state.skipped,
            own_bytes: state.own_bytes(),
            event_bytes: state.event_bytes,
            slack: state.slack_taken,
        }
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
    /// The item, if the mailbox is closed.
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

    /// Wakes the reader although nothing has come: the caller has something for it by other means.
    pub fn wake(&self) {
        let called = self.shared.post(|state| state.called.take());
        if let Some(waker) = called {
            wake(waker);
        }
    }

    /// Chooses what becomes of the subscriber if its backlog is too long. [`Overflow::Reset`] at first.
    pub fn set_overflow(&self, overflow: Overflow) {
        self.shared.lock().overflow = overflow;
    }

    /// Has it close when the data begins another epoch: its reader learns of the epoch where it begins to read, and compares
    /// revisions within that one.
    pub fn close_with_epoch(&self) {
        self.shared.lock().knows_one_epoch = true;
    }

    /// Whether it closed because too much waited.
    #[must_use]
    pub fn has_overflowed(&self) -> bool {
        self.shared.lock().has_overflowed
    }

    /// The backlog: what waits to be taken.
    #[must_use]
    pub fn backlog(&self) -> Backlog {
        self.shared.backlog()
    }

    /// One that looks at the mailbox without keeping it open.
    #[must_use]
    pub fn observer(&self) -> Observer<T> {
        Observer { shared: Arc::clone(&self.shared) }
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

    fn backlog(&self) -> Backlog {
        self.shared.backlog()
    }
}

impl<T> Inbox<T> {
    /// Posts an item of the owner's own from the reader's side, behind the backlog.
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
        self.shared.take(self.shared.lock()).ok()
    }

    /// Takes the next item, or has `cx` woken when there is one; `None` once the mailbox is closed and empty.
    ///
    /// One reader at a time: a later call's waker replaces an earlier one's.
    pub fn poll_take(&self, cx: &mut Context<'_>) -> Poll<Option<Item<T>>> {
        match self.shared.take(self.shared.lock()) {
            Ok(item) => Poll::Ready(Some(item)),
            Err(state) if state.closed => Poll::Ready(None),
            Err(state) => {
                self.wait(state, cx);
                Poll::Pending
            }
        }
    }

    /// As [`poll_take`](Self::poll_take), for many at once: moves items to the end of `items` until none is left, or they
    /// have `len` bytes (see [`ITEM_LEN`]); a part of a snapshot comes alone. False once the mailbox is
    /// closed and empty. If none is left, `cx` is woken for the next as well: see [`is_waited_for`](Self::is_waited_for).
    /// `len` is not to be zero: that takes nothing, and waits for nothing.
    pub fn poll_take_many(&self, cx: &mut Context<'_>, len: usize, items: &mut Vec<Item<T>>) -> Poll<bool> {
        let mut state = self.shared.lock();
        let mut taken = 0;
        while taken < len {
            if taken > 0 && state.reading.is_some() {
                break;
            }
            match state.next() {
                Some(Next::Item(item)) => {
                    taken += item.len();
                    items.push(item);
                }
                Some(Next::Part(reader)) => {
                    let item;
                    (state, item) = self.shared.read_part(state, &reader);
                    if let Some(item) = item {
                        items.push(item);
                        break;
                    }
                }
                None => {
                    let is_closed = state.closed;
                    if !is_closed {
                        self.wait(state, cx);
                    }
                    return if taken > 0 || is_closed { Poll::Ready(taken > 0) } else { Poll::Pending };
                }
            }
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

    /// Whether the mailbox is empty, and will wake the task that polled it last when it no longer is: no need to poll it
    /// again with the same waker. Takes no lock.
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
        self.shared.lock().is_empty()
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
            state = match self.shared.take(state) {
                Ok(item) => return Some(item),
                Err(state) => state,
            };
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
            state = match self.shared.take(state) {
                Ok(item) => return Some(item),
                Err(state) => state,
            };
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

impl<T> Observer<T> {
    /// The backlog: what waits to be taken.
    #[must_use]
    pub fn backlog(&self) -> Backlog {
        self.shared.backlog()
    }

    /// Says whether the reader may know keys that are absent now, from an earlier subscription: then the end of a key that came and
    /// went unread is given too, as it may be the end of what the reader knows. It may not, if nothing is said.
    pub fn keep_ends(&self, keeps: bool) {
        self.shared.post(|state| state.keeps_ends = keeps);
    }

    /// Gives up the backlog, as if it were too long: see [`Overflow`].
    pub fn give_up(&self) {
        self.shared.post(State::overflow);
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
            (state.vacant, state.slack_taken, state.snapshots) = (0, 0, 0);
            (state.deletes, state.event_bytes) = (0, 0);
            let subscriptions = (std::mem::take(&mut state.subscriptions), state.reading.take());
            (std::mem::take(&mut state.queue), std::mem::take(&mut state.slots), subscriptions)
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

impl<T> fmt::Debug for Observer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observer").finish_non_exhaustive()
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
