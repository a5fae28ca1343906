//! Who within this client is told of what: the local subscriptions, what each was told, and their names on the wire.
//!
//! Local subscriptions of one pattern share one wire subscription, because a server knows a subscription by client and
//! pattern. A server tells a change once per connection; it is handed here to every local subscription that covers it.
//! The messages from `Hello` to `Synced` belong to one wire subscription alone.

use std::collections::HashMap;
use std::sync::Arc;

use nkv_core::{Key, Pattern, Revision};
use nkv_protocol::Reason;
use tokio::sync::oneshot;

use crate::error::{Error, Result};
use crate::queue::{KEY_COST, Known, Queue};
use crate::types::{EndReason, Entry, Event, GoneReason};

/// One subscription of the program.
#[derive(Debug)]
pub(crate) struct Local {
    pub(crate) id: u64,
    pub(crate) pattern: Pattern,
    /// Whether only the pattern's own key counts, not those below it.
    pub(crate) exact: bool,
    pub(crate) queue: Arc<Queue>,
    /// Told once the server has accepted the subscription.
    pub(crate) ready: Option<oneshot::Sender<Result<()>>>,
    pub(crate) told: Told,
    /// So many bytes may be kept for it: what it was told of, and what waits for its reader.
    pub(crate) len_max: usize,
}

/// What a local subscription was told.
#[derive(Debug, Default)]
pub(crate) struct Told {
    keys: HashMap<Key, LastTold>,
    /// What the keys cost.
    len: usize,
    /// Whether there is more than the subscription may hold.
    too_much: bool,
    /// Number of the snapshot in hand or last seen.
    snapshot: u64,
    epoch: String,
    /// Whether a snapshot has begun on this connection: before that, changes are none of its business.
    live: bool,
    synced: bool,
}

#[derive(Debug)]
struct LastTold {
    revision: u64,
    snapshot: u64,
}

impl Local {
    fn begin_snapshot(&mut self, epoch: &str) {
        if let Some(ready) = self.ready.take() {
            // Nobody waits any more: the end of the subscription is on its way.
            _ = ready.send(Ok(()));
        }
        self.told.snapshot += 1;
        self.told.live = true;
        if self.told.epoch != epoch {
            // Revisions of another epoch say nothing: everything is told again.
            self.told.keys.values_mut().for_each(|last| last.revision = 0);
            epoch.clone_into(&mut self.told.epoch);
        }
    }

    fn accepts(&self, key: &Key) -> bool {
        self.told.live && if self.exact { self.pattern.selects(key) } else { self.pattern.covers(key) }
    }

    fn update(&mut self, entry: &Entry, skipped: u64) {
        if !self.accepts(&entry.key) {
            return;
        }
        let now = LastTold { revision: entry.revision.get(), snapshot: self.told.snapshot };
        match self.told.keys.get_mut(&entry.key) {
            Some(last) if last.revision >= now.revision => last.snapshot = now.snapshot,
            Some(last) => {
                *last = now;
                self.post(Event::Update { entry: entry.clone(), skipped }, false);
            }
            None => {
                self.told.keys.insert(entry.key.clone(), now);
                self.told.len += cost(&entry.key);
                self.post(Event::Update { entry: entry.clone(), skipped }, true);
            }
        }
    }

    fn post(&mut self, event: Event, is_new: bool) {
        let waiting = self.queue.post_change(event, Known { is_new, is_synced: self.told.synced });
        self.told.too_much |= waiting.saturating_add(self.told.len) > self.len_max;
    }

    fn gone(&mut self, key: &Key, revision: Revision, reason: GoneReason, skipped: u64) {
        let newer_told = self.told.keys.get(key).is_some_and(|last| last.revision > revision.get());
        if self.accepts(key) && !newer_told {
            if self.told.keys.remove(key).is_some() {
                self.told.len = self.told.len.saturating_sub(cost(key));
            }
            self.post(Event::Gone { key: key.clone(), revision, reason, skipped }, false);
        }
    }

    /// Ends a snapshot: what it did not hold is gone.
    fn end_snapshot(&mut self, revision: Revision) {
        let Told { keys, snapshot, len, synced, .. } = &mut self.told;
        let known = Known { is_new: false, is_synced: *synced };
        let missed = keys.extract_if(|_, last| last.snapshot != *snapshot);
        for (key, _) in missed {
            *len = len.saturating_sub(cost(&key));
            self.queue.post_change(Event::Gone { key, revision, reason: GoneReason::Missed, skipped: 0 }, known);
        }
        if !std::mem::replace(&mut self.told.synced, true) {
            self.queue.post(Event::Synced { revision, epoch: self.told.epoch.clone() });
        }
    }

    fn detach(&mut self) {
        self.told.live = false;
        self.told.synced = false;
        if self.ready.is_none() {
            self.queue.post(Event::Reconnecting);
        }
    }

    fn end(mut self, reason: EndReason) {
        if let Some(ready) = self.ready.take() {
            let error = match &reason {
                EndReason::Refused { status, message } => {
                    let mut body = nkv_protocol::Body::default();
                    (body.status, body.message) = (*status, message.clone());
                    Error::from_answer(&body)
                }
                _ => Error::closed(),
            };
            // Nobody waits any more: there is nobody to tell.
            _ = ready.send(Err(error));
        }
        self.queue.post(Event::Ended(reason));
    }
}

fn cost(key: &Key) -> usize {
    key.as_str().len() + KEY_COST
}

/// A subscription as the server knows it.
#[derive(Debug)]
struct Wire {
    id: u64,
    /// How many `Subscribe`s are under way without a `Hello`.
    asked: u32,
    locals: Vec<Local>,
}

/// What is to be sent to the server.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Send {
    /// A `Subscribe`, and which wire subscription it is for.
    Subscribe(String, u64),
    /// An `Unsubscribe`.
    Unsubscribe(String),
}

/// All subscriptions of a client.
#[derive(Debug, Default)]
pub(crate) struct Hub {
    /// By pattern, as written.
    wires: HashMap<String, Wire>,
    next_id: u64,
    /// The pattern and wire subscription whose snapshot is under way.
    filling: Option<(String, u64)>,
    epoch: String,
    attached: bool,
}

impl Hub {
    /// Adds a local subscription.
    pub(crate) fn add(&mut self, local: Local) -> Option<Send> {
        let text = local.pattern.to_string();
        self.next_id += 1;
        let fresh = Wire { id: self.next_id, asked: 0, locals: Vec::new() };
        let wire = self.wires.entry(text.clone()).or_insert(fresh);
        wire.locals.push(local);
        // A snapshot that has not begun is for the new one too. One that has is not: it takes another, of which those
        // that know it all already are told nothing.
        if !self.attached || wire.asked > 0 {
            return None;
        }
        wire.asked += 1;
        Some(Send::Subscribe(text, wire.id))
    }

    /// Removes a local subscription.
    pub(crate) fn remove(&mut self, pattern: &Pattern, id: u64) -> Option<Send> {
        let text = pattern.to_string();
        let wire = self.wires.get_mut(&text)?;
        wire.locals.retain(|local| local.id != id);
        if !wire.locals.is_empty() {
            return None;
        }
        self.wires.remove(&text);
        self.attached.then_some(Send::Unsubscribe(text))
    }

    /// A connection is there: everything is subscribed again.
    pub(crate) fn attach(&mut self, epoch: &str) -> Vec<Send> {
        self.attached = true;
        epoch.clone_into(&mut self.epoch);
        let mut sends = Vec::with_capacity(self.wires.len());
        for (text, wire) in &mut self.wires {
            wire.asked = 1;
            sends.push(Send::Subscribe(text.clone(), wire.id));
            for local in wire.locals.iter().filter(|local| local.ready.is_none()) {
                local.queue.post(Event::Connected);
            }
        }
        sends
    }

    /// The connection is lost.
    pub(crate) fn detach(&mut self) {
        self.attached = false;
        self.filling = None;
        self.wires.values_mut().flat_map(|wire| &mut wire.locals).for_each(Local::detach);
    }

    /// `Reset`: a fresh snapshot begins, because too much waited. What it lacks was missed.
    pub(crate) fn reset(&mut self, text: String) -> Result<()> {
        let (id, asked) = self.wires.get(&text).map_or((0, 0), |wire| (wire.id, wire.asked));
        self.hello(text.clone(), id)?;
        if let Some(wire) = wire(&mut self.wires, &text, id) {
            wire.asked = asked; // it answers no `Subscribe`
        }
        Ok(())
    }

    /// `Hello`: the snapshot of a wire subscription begins.
    pub(crate) fn hello(&mut self, text: String, id: u64) -> Result<()> {
        if self.filling.is_some() {
            return Err(Error::protocol("a snapshot begins within another"));
        }
        if let Some(wire) = wire(&mut self.wires, &text, id) {
            wire.asked = wire.asked.saturating_sub(1);
            wire.locals.iter_mut().for_each(|local| local.begin_snapshot(&self.epoch));
        }
        self.filling = Some((text, id));
        Ok(())
    }

    /// A `Subscribe` was refused.
    pub(crate) fn refused(&mut self, text: &str, id: u64, status: u16, message: &str) {
        if wire(&mut self.wires, text, id).is_some() {
            self.end(text, &EndReason::Refused { status, message: message.to_owned() });
        }
    }

    /// `Update`.
    pub(crate) fn update(&mut self, entry: &Entry, skipped: u64) {
        match &self.filling {
            Some((text, id)) => {
                let locals = wire(&mut self.wires, text, *id).into_iter().flat_map(|wire| &mut wire.locals);
                locals.for_each(|local| local.update(entry, skipped));
            }
            None => self.locals().for_each(|local| local.update(entry, skipped)),
        }
        self.end_what_holds_too_much();
    }

    /// `Close` of a key.
    pub(crate) fn gone(&mut self, key: &Key, revision: Revision, reason: GoneReason, skipped: u64) {
        self.locals().for_each(|local| local.gone(key, revision, reason, skipped));
        self.end_what_holds_too_much();
    }

    /// The server is told when the reader drops the subscription; what it sends until then is read past.
    fn end_what_holds_too_much(&mut self) {
        for wire in self.wires.values_mut() {
            for local in wire.locals.extract_if(.., |local| local.told.too_much) {
                let len_max = local.len_max;
                local.end(EndReason::TooMuch { len_max });
            }
        }
    }

    /// `Close` of a subscription. Those that our own `Subscribe`s and `Unsubscribe`s replaced or ended are expected:
    /// the server tells their end before it answers.
    pub(crate) fn ended(&mut self, text: &str, reason: Reason) {
        if self.wires.get(text).is_some_and(|wire| wire.asked == 0) {
            let replaced = reason == Reason::Replaced;
            self.end(text, &if replaced { EndReason::Replaced } else { EndReason::Unsubscribed });
        }
    }

    /// `Synced`.
    pub(crate) fn synced(&mut self, revision: Revision) -> Result<()> {
        let (text, id) = self.filling.take().ok_or_else(|| Error::protocol("a snapshot ends that did not begin"))?;
        if let Some(wire) = wire(&mut self.wires, &text, id) {
            wire.locals.iter_mut().filter(|local| local.told.live).for_each(|local| local.end_snapshot(revision));
        }
        Ok(())
    }

    fn end(&mut self, text: &str, reason: &EndReason) {
        let ended = self.wires.remove(text).into_iter().flat_map(|wire| wire.locals);
        ended.for_each(|local| local.end(reason.clone()));
    }

    fn locals(&mut self) -> impl Iterator<Item = &mut Local> {
        self.wires.values_mut().flat_map(|wire| &mut wire.locals)
    }
}

/// A wire subscription, if it is still the one that was asked for.
fn wire<'a>(wires: &'a mut HashMap<String, Wire>, text: &str, id: u64) -> Option<&'a mut Wire> {
    wires.get_mut(text).filter(|wire| wire.id == id)
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.wires.drain().flat_map(|(_, wire)| wire.locals).for_each(|local| local.end(EndReason::Closed));
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn add(hub: &mut Hub, id: u64, pattern: &str) -> (Arc<Queue>, Option<Send>) {
        let (queue, pattern) = (Arc::<Queue>::default(), Pattern::new(pattern).unwrap());
        let (ready, told, len_max) = (None, Told::default(), 1_000);
        let local = Local { id, pattern, exact: false, queue: Arc::clone(&queue), ready, told, len_max };
        (queue, hub.add(local))
    }

    fn entry(key: &str, revision: u64) -> Entry {
        let value = bytes::Bytes::from(revision.to_string());
        Entry { key: Key::new(key).unwrap(), value, revision: Revision::new(revision) }
    }

    /// Revisions and ends, as told.
    fn told(queue: &Queue) -> Vec<String> {
        let mut cx = Context::from_waker(Waker::noop());
        let mut words = Vec::new();
        while let Poll::Ready(Some(event)) = queue.poll_take(&mut cx) {
            words.push(match event {
                Event::Update { entry, .. } => format!("{}@{}", entry.key, entry.revision),
                Event::Gone { key, reason, .. } => format!("{key} {}", reason.as_str()),
                other => format!("{other:?}").split([' ', '{']).next().unwrap_or_default().to_owned(),
            });
        }
        words
    }

    /// The snapshot of each pattern, in the order of `sends`.
    fn fill(hub: &mut Hub, send: &Send, entries: &[Entry]) {
        let Send::Subscribe(pattern, id) = send else { panic!("{send:?}") };
        hub.hello(pattern.clone(), *id).unwrap();
        entries.iter().for_each(|entry| hub.update(entry, 0));
        hub.synced(Revision::new(9)).unwrap();
    }

    #[test]
    fn a_change_that_comes_before_its_snapshot_on_a_new_connection_is_told_once() {
        let mut hub = Hub::default();
        assert_eq!(hub.attach("e1"), []);
        let (all, send) = add(&mut hub, 1, "*");
        fill(&mut hub, &send.unwrap(), &[entry("a", 1)]);
        let (one, send) = add(&mut hub, 2, "a");
        fill(&mut hub, &send.unwrap(), &[entry("a", 1)]);
        assert_eq!(
            (told(&all), told(&one)),
            (vec!["a@1".into(), "Synced".into()], vec!["a@1".into(), "Synced".into()])
        );

        hub.detach();
        let mut sends = hub.attach("e2");
        sends.sort_by_key(|send| *send == Send::Subscribe("a".into(), 2));
        fill(&mut hub, &sends[0], &[entry("a", 1)]);
        hub.update(&entry("a", 2), 0);
        assert_eq!(told(&one), ["Connected"], "its own snapshot has not begun");
        fill(&mut hub, &sends[1], &[entry("a", 2)]);
        assert_eq!(told(&one), ["a@2", "Synced"]);
        assert_eq!(told(&all), ["Connected", "a@2", "Synced"]);
    }

    #[test]
    fn an_end_is_expected_after_our_own_request_and_else_it_is_the_end() {
        let mut hub = Hub::default();
        hub.attach("e1");
        let (first, send) = add(&mut hub, 1, "a");
        hub.ended("a", Reason::Replaced); // by the `Subscribe` that is under way
        fill(&mut hub, &send.unwrap(), &[]);
        assert_eq!(hub.remove(&Pattern::new("a").unwrap(), 1), Some(Send::Unsubscribe("a".into())));
        let (second, send) = add(&mut hub, 2, "a");
        hub.ended("a", Reason::Unsubscribed); // of the first
        fill(&mut hub, &send.unwrap(), &[]);
        assert_eq!((told(&first), told(&second)), (vec!["Synced".into()], vec!["Synced".into()]));
        hub.ended("a", Reason::Unsubscribed);
        assert_eq!(told(&second), ["Ended(Unsubscribed)"]);
    }

    #[test]
    fn a_snapshot_that_nobody_waits_for_any_more_is_read_past() {
        let mut hub = Hub::default();
        hub.attach("e1");
        let (_, early) = add(&mut hub, 1, "a");
        hub.remove(&Pattern::new("a").unwrap(), 1);
        let (queue, late) = add(&mut hub, 2, "a");
        fill(&mut hub, &early.unwrap(), &[entry("a", 1)]);
        hub.ended("a", Reason::Unsubscribed);
        assert_eq!(told(&queue), Vec::<String>::new());
        fill(&mut hub, &late.unwrap(), &[entry("a", 1)]);
        assert_eq!(told(&queue), ["a@1", "Synced"]);
    }

    #[test]
    fn what_is_not_in_a_snapshot_that_was_not_asked_for_was_missed_and_what_is_known_comes_not_again() {
        let mut hub = Hub::default();
        hub.attach("e1");
        let (queue, send) = add(&mut hub, 1, "*");
        fill(&mut hub, &send.unwrap(), &[entry("a", 1), entry("b", 2)]);
        assert_eq!(told(&queue), ["a@1", "b@2", "Synced"]);
        hub.reset("*".into()).unwrap();
        [entry("a", 1), entry("c", 12)].iter().for_each(|entry| hub.update(entry, 0));
        assert_eq!(told(&queue), ["c@12"]);
        hub.synced(Revision::new(10)).unwrap();
        assert_eq!(told(&queue), ["b missed"]);
        hub.update(&entry("c", 13), 0);
        assert_eq!(told(&queue), ["c@13"]);
        // One that has just been unsubscribed is read past.
        hub.remove(&Pattern::All, 1);
        hub.reset("*".into()).unwrap();
        hub.update(&entry("f", 14), 0);
        hub.synced(Revision::new(14)).unwrap();
        assert_eq!(told(&queue), Vec::<String>::new());
    }

    #[test]
    fn a_snapshot_that_was_not_asked_for_answers_no_subscribe() {
        let mut hub = Hub::default();
        hub.attach("e1");
        let (first, send) = add(&mut hub, 1, "a");
        fill(&mut hub, &send.unwrap(), &[]);
        let (second, send) = add(&mut hub, 2, "a");
        hub.reset("a".into()).unwrap();
        hub.synced(Revision::new(9)).unwrap();
        hub.ended("a", Reason::Replaced); // by the `Subscribe` that is under way
        fill(&mut hub, &send.unwrap(), &[entry("a", 10)]);
        assert_eq!(
            (told(&first), told(&second)),
            (vec!["Synced".into(), "a@10".into()], vec!["Synced".into(), "a@10".into()])
        );
    }

    #[test]
    fn within_an_epoch_a_server_that_goes_back_is_not_followed() {
        let mut hub = Hub::default();
        hub.attach("e1");
        let (queue, send) = add(&mut hub, 1, "a");
        fill(&mut hub, &send.unwrap(), &[entry("a", 5)]);
        told(&queue);
        hub.detach();
        let sends = hub.attach("e1");
        fill(&mut hub, &sends[0], &[entry("a", 3)]);
        hub.update(&entry("a", 4), 0);
        assert_eq!(told(&queue), ["Connected", "Synced"]);
        hub.detach();
        let sends = hub.attach("e2");
        fill(&mut hub, &sends[0], &[entry("a", 3)]);
        assert_eq!(told(&queue), ["Connected", "a@3", "Synced"]);
    }

    #[test]
    fn whoever_would_hold_too_much_is_ended_and_others_go_on() {
        let mut hub = Hub::default();
        hub.attach("e1");
        let (all, send) = add(&mut hub, 1, "*");
        fill(&mut hub, &send.unwrap(), &[]);
        let (one, send) = add(&mut hub, 2, "a");
        fill(&mut hub, &send.unwrap(), &[]);
        // Two keys, told of and not read; one that comes and goes, and is read, costs nothing.
        for revision in 1..100 {
            hub.update(&entry("a", 2 * revision), 0);
            hub.gone(&Key::new("a").unwrap(), Revision::new(2 * revision + 1), GoneReason::Deleted, 0);
            told(&all);
        }
        hub.update(&entry("b", 200), 0);
        hub.update(&entry("c", 201), 0);
        assert_eq!(told(&all), ["b@200", "c@201"]);
        for n in 0..10 {
            hub.update(&entry(&format!("k{n}"), 300 + n), 0);
        }
        assert_eq!(told(&all).last().unwrap(), "Ended(TooMuch");
        assert_eq!(told(&one), ["Synced"], "it came and went unread");
        hub.update(&entry("a", 400), 0);
        assert_eq!(told(&one), ["a@400"]);
        assert_eq!(hub.remove(&Pattern::new("*").unwrap(), 1), Some(Send::Unsubscribe("*".into())));
    }

    #[test]
    fn a_snapshot_within_another_or_an_end_without_a_beginning_is_an_error() {
        let mut hub = Hub::default();
        hub.attach("e1");
        assert!(hub.synced(Revision::ZERO).is_err());
        hub.hello("a".into(), 1).unwrap();
        assert!(hub.hello("b".into(), 2).is_err());
    }
}
