//! The queue of one subscription: one place for each key that there is, or that its reader knows, and
//! for [`DELETES_MAX`] more.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use nkv_core::mailbox::DELETES_MAX;
use nkv_core::{Epoch, Key};
use nkv_types::{Event, Revision};

/// Events between the connection's task and one reader. A newer event of a key replaces a pending one and moves to the
/// end, but not past [`Event::Synced`]: after that the reader knows some state of every key. A key that comes and goes
/// unread takes no place, except where `Synced` stands between, or is still to come: it says that the reader knew the key.
/// With more than [`DELETES_MAX`] ends of keys that the reader does not know, the backlog is over its bound, and is
/// [dropped](Self::drop_backlog).
///
/// When the connection is lost, a pending `Synced` is dropped, since another will come. So whatever is posted on a new
/// connection stands behind its [`Event::Connected`], which names the epoch, and a `Connected` stays where it is for as
/// long as an event stands between it and the next.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By the order of their arrival.
    events: BTreeMap<u64, Waiting>,
    slots: HashMap<Slot, u64>,
    /// Where events of the connection stand, but for the newest.
    connections: Vec<u64>,
    /// Of all events.
    len: usize,
    /// How many ends of keys wait that the reader does not know.
    ends_of_new: usize,
    next: u64,
    closed: bool,
    waker: Option<Waker>,
    parts: Parts,
}

/// The local subscriptions that feed the queue.
#[derive(Debug, Default)]
struct Parts {
    /// How many there are besides the first.
    others: usize,
    /// How many are synced, and the lowest revision of these.
    synced: usize,
    revision: Option<Revision>,
    /// How many bytes they take besides the backlog here.
    len: usize,
    /// Whether the newest event of the connection is its loss.
    is_lost: bool,
}

impl Parts {
    fn are_synced(&self) -> bool {
        self.others == 0 || self.synced > self.others
    }
}

#[derive(Debug)]
struct Waiting {
    event: Event,
    /// Its reader does not know of the key yet.
    is_new: bool,
}

impl Waiting {
    /// The end of a key that the reader does not know.
    fn is_end_of_new(&self) -> bool {
        self.is_new && matches!(self.event, Event::Gone { .. })
    }
}

/// What the reader knows when a change of a key is posted.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Known {
    /// It never heard of the key, or last that it had gone.
    pub(crate) is_new: bool,
    /// No snapshot is under way whose end it waits for.
    pub(crate) is_synced: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Slot {
    Key(Key),
    Connection,
    Synced,
    Ended,
}

impl Slot {
    fn of(event: &Event) -> Self {
        match event {
            Event::Update { entry, .. } => Slot::Key(entry.key.clone()),
            Event::Gone { key, .. } => Slot::Key(key.clone()),
            Event::Reconnecting | Event::Connected { .. } => Slot::Connection,
            Event::Synced { .. } => Slot::Synced,
            // `Ended`: there are no others, and after one of a later version nothing could be relied on.
            _ => Slot::Ended,
        }
    }

    fn is_key(&self) -> bool {
        matches!(self, Slot::Key(_))
    }
}

impl State {
    fn insert(&mut self, slot: Slot, place: u64, waiting: Waiting) {
        self.len = self.len.saturating_add(len_of(&waiting.event));
        self.ends_of_new += usize::from(waiting.is_end_of_new());
        self.slots.insert(slot, place);
        self.events.insert(place, waiting);
    }

    /// Takes the event out of its place; its slot may be that of a newer one.
    fn take(&mut self, place: u64) -> Option<Waiting> {
        let waiting = self.events.remove(&place)?;
        self.len = self.len.saturating_sub(len_of(&waiting.event));
        self.ends_of_new = self.ends_of_new.saturating_sub(usize::from(waiting.is_end_of_new()));
        Some(waiting)
    }

    /// Leaves out what a reader that is synced up to `revision` need not hear: the ends, by then, of keys that it never knew.
    fn leave_out_ends_of_new(&mut self, revision: Revision, epoch: Epoch) {
        if self.ends_of_new == 0 {
            return;
        }
        let is_over = |waiting: &Waiting| match &waiting.event {
            Event::Gone { revision: end, .. } => {
                end.epoch().is_some_and(|of| of != epoch) || end.get() <= revision.get()
            }
            _ => false,
        };
        let over = self.events.iter().filter(|(_, waiting)| waiting.is_end_of_new() && is_over(waiting));
        let places: Vec<u64> = over.map(|(place, _)| *place).collect();
        for place in places {
            if let Some(waiting) = self.take(place) {
                self.slots.remove(&Slot::of(&waiting.event));
            }
        }
    }

    /// Whether an event of the connection stands behind this place.
    fn has_connection_since(&self, place: u64) -> bool {
        self.slots.get(&Slot::Connection).is_some_and(|newest| *newest > place)
    }

    /// Another event of the connection is to follow: the newest one so far stays if anything has come behind it, and so do
    /// those before it that still have something behind them.
    fn leave_connection(&mut self) {
        let Some(newest) = self.slots.get(&Slot::Connection).copied() else { return self.connections.clear() };
        if self.events.range(newest..).nth(1).is_none() {
            return; // it is replaced
        }
        self.slots.remove(&Slot::Connection);
        let mut places = std::mem::take(&mut self.connections);
        places.push(newest);
        let events = &mut self.events;
        let (mut kept, mut next) = (Vec::with_capacity(places.len()), u64::MAX);
        for place in places.into_iter().rev() {
            if !events.contains_key(&place) {
                continue; // it was read
            }
            if next == u64::MAX || events.range(place..next).nth(1).is_some() {
                kept.push(place);
                next = place;
            } else {
                events.remove(&place);
            }
        }
        kept.reverse();
        self.connections = kept;
    }
}

impl Queue {
    /// A queue that `count` local subscriptions feed.
    pub(crate) fn of_parts(count: usize) -> Self {
        let queue = Queue::default();
        queue.lock().parts.others = count.saturating_sub(1);
        queue
    }

    /// A part has had its snapshot: with the last of them, all are synced up to the lowest of their revisions.
    pub(crate) fn post_synced(&self, revision: Revision, epoch: Epoch) {
        let mut state = self.lock();
        state.parts.synced += 1;
        let lowest = state.parts.revision.filter(|known| *known <= revision).unwrap_or(revision);
        state.parts.revision = Some(lowest);
        let are_synced = state.parts.are_synced();
        drop(state);
        if are_synced {
            self.post(Event::synced(lowest, epoch));
        }
    }

    /// A part that was synced has to be synced again.
    pub(crate) fn unsync(&self) {
        let mut state = self.lock();
        state.parts.synced = state.parts.synced.saturating_sub(1);
        if state.parts.synced == 0 {
            state.parts.revision = None;
        }
    }

    /// The connection is lost, or there again; each part says so.
    pub(crate) fn post_connection(&self, event: Event) {
        let is_lost = event == Event::Reconnecting;
        if std::mem::replace(&mut self.lock().parts.is_lost, is_lost) != is_lost {
            self.post(event);
        }
    }

    /// A part takes `new` bytes, and no longer `old`. Returns how many all of them take.
    pub(crate) fn charge(&self, old: usize, new: usize) -> usize {
        let mut state = self.lock();
        state.parts.len = state.parts.len.saturating_sub(old).saturating_add(new);
        state.parts.len
    }

    /// Posts an event; after [`Event::Ended`] nothing more is taken. Returns how many bytes wait, about.
    pub(crate) fn post(&self, event: Event) -> usize {
        self.post_change(event, Known::default())
    }

    /// As [`post`](Self::post), for a change of a key. While a snapshot is under way nothing is left out: a synced
    /// reader is to know each key as it was then, or later.
    pub(crate) fn post_change(&self, mut event: Event, known: Known) -> usize {
        let mut state = self.lock();
        if state.closed {
            return state.len;
        }
        state.closed = matches!(event, Event::Ended(_));
        if let Event::Synced { revision, epoch, .. } = event {
            state.leave_out_ends_of_new(revision, epoch);
        }
        let slot = Slot::of(&event);
        if event == Event::Reconnecting
            && let Some(synced) = state.slots.remove(&Slot::Synced)
        {
            state.events.remove(&synced);
        }
        if slot == Slot::Connection {
            state.leave_connection();
        }
        let (old, synced) = (state.slots.get(&slot).copied(), state.slots.get(&Slot::Synced).copied());
        let is_before_synced = slot.is_key() && old.zip(synced).is_some_and(|(old, synced)| old < synced);
        // What has come since is of that connection: it stands behind its event, and `Synced` behind both.
        let is_of_before = is_before_synced && old.is_some_and(|old| state.has_connection_since(old));
        let mut is_new = known.is_new;
        if let Some(old) = old.and_then(|old| state.take(old)) {
            pass_over(&old.event, &mut event);
            is_new = old.is_new;
            let is_synced = known.is_synced && state.parts.are_synced();
            if is_new && is_synced && !is_before_synced && matches!(event, Event::Gone { .. }) {
                state.slots.remove(&slot);
                return state.len;
            }
        }
        let place = old.filter(|_| is_before_synced && !is_of_before).unwrap_or(state.next);
        state.next += 1;
        if is_of_before && let Some(waiting) = synced.and_then(|synced| state.events.remove(&synced)) {
            let behind = state.next;
            state.events.insert(behind, waiting);
            state.slots.insert(Slot::Synced, behind);
            state.next += 1;
        }
        state.insert(slot, place, Waiting { event, is_new });
        let len = state.len;
        let waker = state.waker.take();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        len
    }

    /// Takes the next event, or has `cx` woken when there is one; `None` after the end.
    pub(crate) fn poll_take(&self, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        let mut state = self.lock();
        let first = state.events.first_key_value().map(|(place, _)| *place);
        if let Some((place, Waiting { event, .. })) = first.and_then(|place| Some((place, state.take(place)?))) {
            let slot = Slot::of(&event);
            if state.slots.get(&slot) == Some(&place) {
                state.slots.remove(&slot);
            }
            if state.events.is_empty() {
                state.slots = HashMap::new();
            }
            return Poll::Ready(Some(event));
        }
        if state.closed {
            return Poll::Ready(None);
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Whether more ends of keys wait that the reader does not know than may.
    pub(crate) fn is_over(&self) -> bool {
        self.lock().ends_of_new > DELETES_MAX
    }

    /// Drops all changes that wait of what `is_covered`, and a pending `Synced`: a snapshot is to follow. Returns the keys of
    /// those changes, and whether the reader knows something of the key.
    pub(crate) fn drop_backlog(&self, is_covered: impl Fn(&Key) -> bool) -> HashMap<Key, bool> {
        let mut state = self.lock();
        let is_dropped = |slot: &Slot| match slot {
            Slot::Key(key) => is_covered(key),
            Slot::Synced => true,
            Slot::Connection | Slot::Ended => false,
        };
        let dropped: Vec<_> = state.slots.extract_if(|slot, _| is_dropped(slot)).collect();
        let mut keys = HashMap::new();
        for (slot, place) in dropped {
            if let (Slot::Key(key), Some(waiting)) = (slot, state.take(place)) {
                keys.insert(key, !waiting.is_new);
            }
        }
        state.slots.shrink_to_fit();
        keys
    }

    /// How many events wait.
    pub(crate) fn len(&self) -> usize {
        self.lock().events.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in this module panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a key costs besides its own bytes and those of its value, about.
pub(crate) const KEY_COST: usize = 200;

fn len_of(event: &Event) -> usize {
    match event {
        Event::Update { entry, .. } => entry.key.as_str().len() + entry.value.len() + KEY_COST,
        Event::Gone { key, .. } => key.as_str().len() + KEY_COST,
        _ => 0,
    }
}

/// Counts what the reader will not see of a key.
fn pass_over(old: &Event, new: &mut Event) {
    let (Event::Update { skipped: passed, .. } | Event::Gone { skipped: passed, .. }) = old else { return };
    if let Event::Update { skipped, .. } | Event::Gone { skipped, .. } = new {
        *skipped = skipped.saturating_add(*passed).saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use nkv_types::{EndReason, Entry, GoneReason};

    fn update(key: &str, revision: u64) -> Event {
        let entry = Entry::new(Key::new(key).unwrap(), Bytes::new(), Revision::new(revision));
        Event::update(entry, 0)
    }

    fn drain(queue: &Queue) -> Vec<Event> {
        let mut cx = Context::from_waker(Waker::noop());
        let mut taken = Vec::new();
        while let Poll::Ready(Some(event)) = queue.poll_take(&mut cx) {
            taken.push(event);
        }
        taken
    }

    #[test]
    fn a_slow_reader_gets_the_newest_state_of_each_key_and_the_count_of_what_it_missed() {
        let queue = Queue::default();
        for revision in 1..=1_000 {
            queue.post(update(if revision % 2 == 0 { "even" } else { "odd" }, revision));
        }
        assert_eq!(queue.len(), 2);
        let gone = Event::gone(Key::new("odd").unwrap(), Revision::new(1_001), GoneReason::Deleted, 3);
        queue.post(gone);
        let [Event::Update { entry, skipped: 499, .. }, Event::Gone { skipped: 503, .. }] = &drain(&queue)[..] else {
            panic!("two events were expected")
        };
        assert_eq!(entry.revision, Revision::new(1_000));
    }

    #[test]
    fn a_synced_reader_knows_some_state_of_every_key() {
        let queue = Queue::default();
        let synced = Event::synced(Revision::new(2), Epoch::default());
        for event in [update("a", 1), update("b", 2), synced.clone(), update("a", 3), update("c", 4), update("c", 5)] {
            queue.post(event);
        }
        let [Event::Update { entry, skipped: 1, .. }, b, end, Event::Update { .. }] = &drain(&queue)[..] else {
            panic!("four events were expected")
        };
        assert_eq!((entry.revision, b, end), (Revision::new(3), &update("b", 2), &synced));
    }

    #[test]
    fn a_connection_that_comes_and_goes_costs_no_memory() {
        let queue = Queue::default();
        for revision in 0..1_000 {
            queue.post(Event::Reconnecting);
            queue.post(Event::connected(Epoch::default()));
            queue.post(Event::synced(Revision::new(revision), Epoch::default()));
        }
        assert_eq!(drain(&queue).len(), 2);
    }

    #[test]
    fn a_connection_that_each_part_reports_comes_once() {
        let queue = Queue::of_parts(2);
        for event in [Event::Reconnecting, Event::connected(Epoch::default())] {
            queue.post_connection(event.clone());
            let first = drain(&queue);
            queue.post_connection(event.clone());
            assert_eq!((first, drain(&queue)), (vec![event], vec![]));
        }
    }

    #[test]
    fn what_comes_in_a_new_epoch_stands_behind_the_event_that_names_it() {
        let queue = Queue::default();
        let connected = |epoch| Event::connected(Epoch::new(epoch));
        let synced = |epoch| Event::synced(Revision::new(9), Epoch::new(epoch));
        for event in [update("a", 5), update("b", 6), synced(1), Event::Reconnecting, connected(2), update("a", 1)] {
            queue.post(event);
        }
        assert!(!queue.lock().slots.contains_key(&Slot::Synced), "what was synced was of the epoch before");
        // The second loss is into a third epoch, while all of that is unread.
        for event in [Event::Reconnecting, connected(3), update("c", 1), synced(3)] {
            queue.post(event);
        }
        let received: Vec<String> = drain(&queue)
            .iter()
            .map(|event| match event {
                Event::Update { entry, .. } => format!("{}@{}", entry.key, entry.revision),
                Event::Connected { epoch, .. } => format!("epoch {}", epoch.get()),
                Event::Synced { .. } => "synced".into(),
                other => format!("{other:?}"),
            })
            .collect();
        assert_eq!(received, ["b@6", "epoch 2", "a@1", "epoch 3", "c@1", "synced"]);
    }

    #[test]
    fn a_key_that_comes_back_in_a_new_epoch_does_not_take_the_place_of_its_end_in_the_old_one() {
        let (queue, known) = (Queue::default(), Known { is_new: false, is_synced: true });
        let (gone_revision, reason) = (Revision::new(2), GoneReason::Deleted);
        let gone = Event::gone(Key::new("a").unwrap(), gone_revision, reason, 0);
        queue.post_change(gone, known);
        queue.post(Event::Reconnecting);
        queue.post(Event::connected(Epoch::new(2)));
        queue.post(Event::synced(Revision::new(2), Epoch::new(2)));
        queue.post_change(update("a", 3), Known { is_new: true, ..known });
        queue.post_change(update("b", 4), Known { is_new: true, ..known });
        let [Event::Connected { .. }, Event::Update { entry, .. }, Event::Synced { .. }, Event::Update { .. }] =
            &drain(&queue)[..]
        else {
            panic!("four events were expected")
        };
        assert_eq!(entry.key.as_str(), "a");
    }

    #[test]
    fn epochs_that_are_not_read_cost_no_memory() {
        let queue = Queue::default();
        for epoch in 0..1_000 {
            queue.post(Event::Reconnecting);
            queue.post(Event::connected(Epoch::new(epoch)));
            queue.post(update("a", 1));
            queue.post(update(if epoch % 2 == 0 { "b" } else { "c" }, 1));
            queue.post(Event::synced(Revision::new(1), Epoch::new(epoch)));
        }
        let (len, kept) = (queue.len(), queue.lock().connections.len());
        assert!(len <= 8 && kept <= 4, "{len} events, {kept} of connections");
    }

    #[test]
    fn a_key_that_comes_and_goes_unread_takes_no_place_and_of_one_that_was_read_the_end_is_notified() {
        let (queue, known) = (Queue::default(), Known { is_new: false, is_synced: true });
        let new = Known { is_new: true, ..known };
        let gone = |key: &str| {
            let (key, reason) = (Key::new(key).unwrap(), GoneReason::Deleted);
            Event::gone(key, Revision::new(9), reason, 0)
        };
        queue.post_change(update("known", 1), new);
        drain(&queue);
        for n in 0..10_000 {
            let key = format!("k.{n}");
            queue.post_change(update(&key, 2), new);
            queue.post_change(update(&key, 3), known);
            assert_eq!(queue.post_change(gone(&key), known), 0);
        }
        assert_eq!((queue.len(), queue.lock().slots.len()), (0, 0));
        queue.post_change(update("known", 4), known);
        queue.post_change(gone("known"), known);
        queue.post_change(update("known", 5), new);
        queue.post_change(gone("known"), known);
        let [Event::Gone { skipped: 3, .. }] = &drain(&queue)[..] else { panic!("one event was expected") };
    }

    #[test]
    fn of_what_was_put_before_a_snapshot_ended_nothing_is_left_out() {
        let synced = Event::synced(Revision::new(6), Epoch::default());
        let new = Known { is_new: true, is_synced: false };
        let gone = || {
            let (key, reason) = (Key::new("a").unwrap(), GoneReason::Deleted);
            Event::gone(key, Revision::new(7), reason, 0)
        };
        let queue = Queue::default();
        queue.post_change(update("a", 6), new);
        queue.post(synced.clone());
        queue.post_change(gone(), Known { is_new: false, is_synced: true });
        let [Event::Gone { .. }, Event::Synced { .. }] = &drain(&queue)[..] else { panic!("two events were expected") };
        queue.post_change(update("a", 8), Known { is_new: true, is_synced: true });
        queue.post_change(gone(), Known { is_new: false, is_synced: false });
        queue.post(synced);
        let [Event::Gone { .. }, Event::Synced { .. }] = &drain(&queue)[..] else { panic!("two events were expected") };
    }

    #[test]
    fn the_end_of_a_key_that_the_reader_does_not_know_is_left_out_with_the_state_that_lacks_it() {
        let (epoch, unsynced) = (Epoch::default(), Known::default());
        let synced = |revision| Event::synced(Revision::new(revision), epoch);
        let gone = |key: &str, revision| {
            let (key, revision) = (Key::new(key).unwrap(), Revision::in_epoch(epoch, revision));
            Event::gone(key, revision, GoneReason::Missed, 0)
        };
        let queue = Queue::default();
        queue.post_change(update("read", 1), Known { is_new: true, ..unsynced });
        drain(&queue);
        for key in ["unread", "late"] {
            queue.post_change(update(key, 2), Known { is_new: true, ..unsynced });
        }
        queue.post(synced(2));
        queue.post(Event::Reconnecting);
        queue.post(Event::connected(epoch));
        for (key, revision) in [("read", 9), ("unread", 9), ("late", 10)] {
            queue.post_change(gone(key, revision), unsynced);
        }
        queue.post(synced(9));
        let [Event::Connected { .. }, read, late, Event::Synced { .. }] = &drain(&queue)[..] else {
            panic!("four events were expected")
        };
        let Event::Gone { key, skipped: 1, .. } = late else { panic!("{late:?}") };
        assert_eq!((read, key.as_str(), queue.lock().ends_of_new), (&gone("read", 9), "late", 0));
    }

    #[test]
    fn nothing_follows_the_end() {
        let queue = Queue::default();
        queue.post(update("a", 1));
        queue.post(Event::Ended(EndReason::Closed));
        queue.post(update("a", 2));
        assert_eq!(drain(&queue), [update("a", 1), Event::Ended(EndReason::Closed)]);
        assert_eq!(queue.poll_take(&mut Context::from_waker(Waker::noop())), Poll::Ready(None));
    }
}
