//! Which subscriber within this client is notified of what: the local subscriptions, what each was sent, and their names
//! on the wire.
//!
//! Local subscriptions of one pattern share one wire subscription, because a server knows a subscription by client and
//! pattern. What the server sent for it is known once; a local subscription that comes later gets a snapshot of its own,
//! and from its end on what all get. A server sends a change once per connection; it is handed here to every wire
//! subscription that covers it. The messages from `Hello` to `Synced` belong to one wire subscription alone.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use nkv_core::{Epoch, Key, Pattern};
use nkv_protocol::{Reason, status};
use nkv_types::{EndReason, Entry, Error, Event, GoneReason, Result, Revision};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::error::WireError as _;
use crate::queue::{KEY_COST, Known, Queue};
use crate::watcher::Watcher;

/// A refusal that time may cure is followed by another try after this time, and then after twice that.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(10);
/// The number of keys that a server deletes in one step.
const STEP_KEYS: u64 = 1_024;

/// Where a local subscription's events go.
pub(crate) enum Sink {
    /// To a reader, one by one.
    Queue(Arc<Queue>),
    /// To a value that is looked at.
    Watch(Box<dyn Watcher>),
}

/// One subscription of the program.
pub(crate) struct Local {
    pub(crate) id: u64,
    pub(crate) pattern: Pattern,
    /// Whether it is sent the present state first.
    pub(crate) has_snapshot: bool,
    pub(crate) sink: Sink,
    /// Notified once the server has accepted the subscription; of a watch, once the value is known.
    pub(crate) ready: Option<oneshot::Sender<Result<()>>>,
    /// How many bytes may be kept for it: the keys that it was notified of, and its backlog or branch.
    pub(crate) len_max: usize,
    pub(crate) standing: Standing,
    /// Whether it was sent `Synced` on this connection.
    pub(crate) synced: bool,
    /// How many bytes its queue counts for it, if it is one of several that feed the queue.
    pub(crate) charged: Option<usize>,
}

/// What a local subscription knows, beside what its wire subscription was sent.
#[derive(Debug)]
pub(crate) enum Standing {
    /// It waits for a snapshot; of an earlier one that broke off it was sent these keys, at these revisions.
    Waiting(HashMap<Key, u64>),
    /// The snapshot under way is sent to it too.
    Filling(HashMap<Key, u64>),
    /// It knows what the wire subscription was sent.
    Joined,
}

impl Default for Standing {
    fn default() -> Self {
        Standing::Waiting(HashMap::new())
    }
}

/// The end of a key.
#[derive(Clone, Copy, Debug)]
struct Gone<'a> {
    key: &'a Key,
    revision: Revision,
    reason: GoneReason,
    skipped: u64,
}

impl<'a> Gone<'a> {
    fn missed(key: &'a Key, revision: Revision) -> Self {
        Gone { key, revision, reason: GoneReason::Missed, skipped: 0 }
    }
}

#[derive(Clone, Copy, Debug)]
struct LastSent {
    revision: u64,
    /// The number of the snapshot that it was last seen in, or that was the last when it changed.
    snapshot: u64,
}

impl Local {
    pub(crate) fn new(id: u64, pattern: Pattern, sink: Sink, len_max: usize) -> Self {
        let (has_snapshot, ready, standing) = (true, None, Standing::default());
        Local { id, pattern, has_snapshot, sink, ready, len_max, standing, synced: false, charged: None }
    }

    /// Whether a key alone counts, without those below it.
    fn is_exact(&self) -> bool {
        matches!(self.pattern, Pattern::Exact(_))
    }

    fn is_watch(&self) -> bool {
        matches!(self.sink, Sink::Watch(_))
    }

    /// Whether it watches all that its pattern covers.
    fn is_branch(&self) -> bool {
        self.is_watch() && !self.is_exact()
    }

    fn accepted(&mut self) {
        // If no caller waits any more, the end of the subscription is on its way.
        self.ready.take().into_iter().for_each(|ready| drop(ready.send(Ok(()))));
    }

    fn begin_snapshot(&mut self, is_new_epoch: bool) {
        if let Standing::Waiting(partial) = &mut self.standing {
            let mut partial = std::mem::take(partial);
            if is_new_epoch {
                partial.values_mut().for_each(|revision| *revision = 0);
            }
            self.standing = Standing::Filling(partial);
        }
        // Without a snapshot all that comes until its end is passed over: only then may its reader rely on being notified.
        if !self.is_watch() && self.has_snapshot {
            self.accepted();
        }
    }

    /// An update that the wire subscription was sent, `is_newer` than what it was sent before of the key, if it
    /// `was_known`.
    fn update(&mut self, entry: &Entry, skipped: u64, is_newer: bool, was_known: bool, len: usize) -> bool {
        let is_new = match &self.standing {
            Standing::Waiting(_) => return false,
            Standing::Joined if !is_newer => return false,
            Standing::Joined => !was_known,
            Standing::Filling(partial) => match partial.get(&entry.key) {
                Some(sent) if *sent >= entry.revision.get() => return false,
                Some(_) => false,
                None if !self.has_snapshot => return false,
                None => true,
            },
        };
        if !self.pattern.covers(&entry.key) {
            return false;
        }
        match &mut self.sink {
            Sink::Watch(watch) => {
                let kept = watch.set(entry);
                self.is_branch() && kept.saturating_add(len) > self.len_max
            }
            Sink::Queue(_) => self.post(Event::update(entry.clone(), skipped), is_new, len),
        }
    }

    /// A key is gone, which its reader need not hear of if it `was_unknown` to all.
    fn gone(&mut self, gone: &Gone<'_>, len: usize, was_unknown: bool) -> bool {
        let Gone { key, revision, reason, skipped } = *gone;
        if matches!(self.standing, Standing::Waiting(_))
            || !self.pattern.covers(key)
            || (was_unknown && !self.is_watch())
        {
            return false;
        }
        match &mut self.sink {
            Sink::Watch(watch) if reason == GoneReason::Missed => watch.missed(key, revision),
            Sink::Watch(watch) => watch.gone(key, revision),
            Sink::Queue(_) => {
                return self.post(Event::gone(key.clone(), revision, reason, skipped), false, len);
            }
        }
        false
    }

    /// Whether there is more than it may hold, with `len` bytes that the wire subscription takes.
    fn post(&mut self, event: Event, is_new: bool, len: usize) -> bool {
        let Sink::Queue(queue) = &self.sink else { return false };
        let waiting = queue.post_change(event, Known { is_new, is_synced: self.synced });
        waiting.saturating_add(self.held(len)) > self.len_max
    }

    /// How many bytes the wire subscriptions take that feed its queue, of which its own takes `len`.
    fn held(&mut self, len: usize) -> usize {
        match (&self.sink, &mut self.charged) {
            (Sink::Queue(queue), Some(charged)) => queue.charge(std::mem::replace(charged, len), len),
            _ => len,
        }
    }

    fn end_snapshot(&mut self, revision: Revision, epoch: Epoch) {
        self.standing = Standing::Joined;
        let is_first = !std::mem::replace(&mut self.synced, true);
        match &mut self.sink {
            Sink::Queue(queue) if is_first => queue.post_synced(revision, epoch),
            Sink::Queue(_) => {}
            Sink::Watch(watch) => watch.set_live(Some(revision)),
        }
        self.accepted();
    }

    fn detach(&mut self) {
        let was_synced = std::mem::take(&mut self.synced);
        match &mut self.sink {
            Sink::Queue(queue) => {
                if was_synced {
                    queue.unsync();
                }
                if self.ready.is_none() {
                    queue.post_connection(Event::Reconnecting);
                }
            }
            Sink::Watch(watch) => watch.set_live(None),
        }
    }

    /// Whether it has a backlog that may be given up for another snapshot: one under way is finished first.
    fn may_restart(&self) -> bool {
        self.synced && matches!(self.standing, Standing::Joined)
    }

    /// Its queue, if more waits there than may.
    fn over(&self) -> Option<Arc<Queue>> {
        match &self.sink {
            Sink::Queue(queue) if self.may_restart() && queue.is_over() => Some(Arc::clone(queue)),
            _ => None,
        }
    }

    /// Its backlog was `dropped`: it waits for a snapshot of which its reader is notified of what it does not know. That is
    /// something of the keys dropped that are `true`, and all of others.
    fn restart(&mut self, keys: &HashMap<Key, LastSent>, dropped: &HashMap<Key, bool>) {
        let Local { pattern, sink, .. } = self;
        let read = keys.iter().filter(|(key, _)| !dropped.contains_key(*key)).map(|(key, last)| (key, last.revision));
        let known = dropped.iter().filter(|(_, is_known)| **is_known).map(|(key, _)| (key, 0));
        let known = read.chain(known).filter(|(key, _)| pattern.covers(key));
        self.standing = Standing::Waiting(known.map(|(key, revision)| (key.clone(), revision)).collect());
        if let Sink::Queue(queue) = sink {
            queue.unsync();
        }
        // Without a snapshot it would miss what was dropped.
        (self.synced, self.has_snapshot) = (false, true);
    }

    fn begin_anew(&mut self) {
        if let Sink::Watch(watch) = &mut self.sink {
            watch.begin_anew();
        }
    }

    fn attach(&self, epoch: Epoch) {
        if let Sink::Queue(queue) = &self.sink
            && self.ready.is_none()
        {
            queue.post_connection(Event::connected(epoch));
        }
    }

    fn end(self, reason: EndReason) {
        if let Some(ready) = self.ready {
            let error = match &reason {
                EndReason::Refused { status, message } => Error::refused(*status, message),
                EndReason::TooMuch { len_max } => {
                    Error::protocol(format!("the keys and values take more than {len_max} bytes"))
                }
                _ => Error::closed(),
            };
            // The caller may have gone.
            _ = ready.send(Err(error));
        }
        match self.sink {
            Sink::Queue(queue) => drop(queue.post(Event::Ended(reason))),
            Sink::Watch(mut watch) => watch.end(reason),
        }
    }
}

fn cost(key: &Key) -> usize {
    key.as_str().len() + KEY_COST
}

/// A subscription as the server knows it, and what the server sent for it.
struct Wire {
    id: u64,
    pattern: Pattern,
    /// Whether it is of one key alone, and whether it was last asked to be.
    exact: bool,
    exact_asked: bool,
    /// How many `Subscribe`s are under way without a `Hello`.
    asked: u32,
    keys: HashMap<Key, LastSent>,
    /// What the keys cost.
    len: usize,
    /// Keys that watches know by the client's own puts, and of which the server has sent nothing yet; the revisions of the puts.
    own: HashMap<Key, Revision>,
    /// Number of the snapshot in hand or last seen.
    snapshot: u64,
    /// The number of the revision up to which the last snapshot has all changes: what is sent for another subscription that
    /// covers the key may be older.
    has: u64,
    /// Of which the revisions are; `None` where they say nothing of those to come.
    epoch: Option<Epoch>,
    /// Whether a snapshot has begun on this connection: before that, changes are none of its business.
    live: bool,
    /// When it is to be asked for again, and how long was waited for that.
    retry: Option<(Instant, Duration)>,
    locals: Vec<Local>,
}

impl Wire {
    fn is_exact(&self) -> bool {
        self.locals.iter().all(Local::is_exact)
    }

    /// `Hello` or `Reset`, of the key alone or of its branch too.
    fn begin_snapshot(&mut self, epoch: Epoch, exact: bool) {
        (self.exact, self.has) = (exact, 0);
        self.snapshot += 1;
        self.live = true;
        self.retry = None;
        let is_new_epoch = self.epoch.replace(epoch) != Some(epoch);
        if is_new_epoch {
            // Revisions of another epoch say nothing: everything is sent again.
            self.keys.values_mut().for_each(|last| last.revision = 0);
        }
        let served = self.locals.iter_mut().filter(|local| local.is_exact() || !exact);
        served.for_each(|local| local.begin_snapshot(is_new_epoch));
    }

    /// Asks for a snapshot, unless one is on its way that `fits`.
    fn ask(&mut self, text: &str, fits: bool) -> Option<Send> {
        if self.asked > 0 && fits {
            return None;
        }
        self.asked += 1;
        self.exact_asked = self.is_exact();
        Some(Send::Subscribe { pattern: text.to_owned(), wire: self.id, exact: self.exact_asked })
    }

    /// The backlog of a queue that it feeds was `dropped`: asks for another snapshot.
    fn restart(&mut self, text: &str, queue: &Arc<Queue>, dropped: &HashMap<Key, bool>) -> Option<Send> {
        let is_fed = |local: &&mut Local| matches!(&local.sink, Sink::Queue(fed) if Arc::ptr_eq(fed, queue));
        let mut restarted = self.locals.iter_mut().filter(is_fed).filter(|local| local.may_restart());
        let local = restarted.next()?;
        local.restart(&self.keys, dropped);
        let fits = local.is_exact() || !self.exact_asked;
        self.ask(text, fits)
    }

    /// Asks for the key alone if its branch is not wanted any more.
    fn narrowed(&mut self, text: &str) -> Option<Send> {
        if self.exact_asked || !self.live || !self.is_exact() {
            return None;
        }
        let (own, id) = (&self.pattern, self.id);
        self.keys.retain(|key, _| own.selects(key));
        self.len = self.keys.keys().map(cost).sum();
        self.exact_asked = true;
        self.asked += 1;
        Some(Send::Subscribe { pattern: text.to_owned(), wire: id, exact: true })
    }

    /// Gives those back that hold too much.
    fn update(&mut self, entry: &Entry, skipped: u64) -> Vec<Local> {
        if (self.exact || self.exact_asked) && !self.pattern.selects(&entry.key) {
            return Vec::new();
        }
        let now = LastSent { revision: entry.revision.get(), snapshot: self.snapshot };
        let (mut is_newer, mut was_known) = (true, true);
        match self.keys.get_mut(&entry.key) {
            Some(last) if last.revision >= now.revision => (last.snapshot, is_newer) = (now.snapshot, false),
            Some(last) => *last = now,
            None => {
                self.own.remove(&entry.key);
                self.keys.insert(entry.key.clone(), now);
                self.len += cost(&entry.key);
                was_known = false;
            }
        }
        let len = self.len;
        let holds_too_much = |local: &mut Local| {
            !was_known && (local.is_branch() || !local.is_watch()) && local.held(len) > local.len_max
        };
        let over = |local: &mut Local| local.update(entry, skipped, is_newer, was_known, len) || holds_too_much(local);
        self.locals.extract_if(.., over).collect()
    }

    fn gone(&mut self, gone: &Gone<'_>) -> Vec<Local> {
        if self.keys.get(gone.key).is_some_and(|last| last.revision > gone.revision.get()) {
            return Vec::new();
        }
        self.own.remove(gone.key);
        let was_unknown = self.keys.remove(gone.key).is_none();
        if !was_unknown {
            self.len = self.len.saturating_sub(cost(gone.key));
        }
        let len = self.len;
        self.locals.extract_if(.., |local| local.gone(gone, len, was_unknown)).collect()
    }

    /// Ends a snapshot: what it did not hold is gone.
    fn end_snapshot(&mut self, revision: Revision) {
        self.has = revision.get();
        let Wire { keys, own, snapshot, len, locals, epoch, .. } = self;
        let epoch = epoch.unwrap_or_default();
        for local in locals.iter_mut() {
            let Standing::Filling(partial) = &mut local.standing else { continue };
            let partial = std::mem::take(partial);
            let is_missed = |key: &Key| keys.get(key).is_none_or(|last| last.snapshot != *snapshot);
            for key in partial.into_keys().filter(is_missed) {
                local.gone(&Gone::missed(&key, revision), 0, false);
            }
        }
        // Notifications of the client's own puts may have been lost with a connection.
        let is_in = |own: &Revision| own.epoch() != Some(epoch) || own.get() <= revision.get();
        for (key, _) in own.extract_if(|_, own| is_in(own)) {
            for local in locals.iter_mut().filter(|local| local.is_watch()) {
                local.gone(&Gone::missed(&key, revision), 0, true);
            }
        }
        for (key, _) in keys.extract_if(|_, last| last.snapshot != *snapshot) {
            *len = len.saturating_sub(cost(&key));
            for local in locals.iter_mut().filter(|local| matches!(local.standing, Standing::Joined)) {
                local.gone(&Gone::missed(&key, revision), 0, false);
            }
        }
        let served = locals.iter_mut().filter(|local| !matches!(local.standing, Standing::Waiting(_)));
        served.for_each(|local| local.end_snapshot(revision, epoch));
    }

    fn detach(&mut self) {
        (self.live, self.asked, self.retry) = (false, 0, None);
        for local in &mut self.locals {
            if let Standing::Filling(partial) = &mut local.standing {
                // The snapshot broke off: what it got is not to come again.
                let mut partial = std::mem::take(partial);
                if local.has_snapshot {
                    let seen = self.keys.iter().filter(|(_, last)| last.snapshot == self.snapshot);
                    partial.extend(seen.map(|(key, last)| (key.clone(), last.revision)));
                }
                local.standing = Standing::Waiting(partial);
            }
            local.detach();
        }
    }
}

/// What is to be sent to the server.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Send {
    /// A `Subscribe`, and which wire subscription it is for.
    Subscribe { pattern: String, wire: u64, exact: bool },
    /// An `Unsubscribe`.
    Unsubscribe(String),
}

/// All subscriptions of a client.
#[derive(Default)]
pub(crate) struct Hub {
    /// By pattern, as written.
    wires: HashMap<String, Wire>,
    next_id: u64,
    /// The pattern and wire subscription whose snapshot is under way.
    filling: Option<(String, u64)>,
    epoch: Epoch,
    attached: bool,
    /// How many watches there are, and what those cover that watch more than a key.
    watches: usize,
    branches: Vec<(u64, Pattern)>,
    /// What is to be sent because of what was received.
    sends: Vec<Send>,
    /// When something refused is to be asked for again.
    next_retry: Option<Instant>,
    scratch: String,
}

impl Hub {
    /// Adds a local subscription.
    pub(crate) fn add(&mut self, local: Local) -> Option<Send> {
        let text = local.pattern.to_string();
        self.next_id += 1;
        self.watches += usize::from(local.is_watch());
        if local.is_branch() {
            self.branches.push((local.id, local.pattern.clone()));
        }
        let fresh = Wire {
            id: self.next_id,
            pattern: local.pattern.clone(),
            exact: local.is_exact(),
            exact_asked: local.is_exact(),
            asked: 0,
            keys: HashMap::new(),
            len: 0,
            own: HashMap::new(),
            snapshot: 0,
            has: 0,
            epoch: Some(self.epoch),
            live: false,
            retry: None,
            locals: Vec::new(),
        };
        let wire = self.wires.entry(text.clone()).or_insert(fresh);
        let fits = local.is_exact() || !wire.exact_asked;
        wire.locals.push(local);
        // A snapshot that has not begun is for the new one too. One that has is not: it takes another, of which those
        // that know it all already are sent nothing.
        if !self.attached {
            return None;
        }
        wire.ask(&text, fits)
    }

    /// Removes a local subscription.
    pub(crate) fn remove(&mut self, pattern: &Pattern, id: u64) -> Option<Send> {
        let text = pattern.to_string();
        let wire = self.wires.get_mut(&text)?;
        for local in wire.locals.extract_if(.., |local| local.id == id) {
            forget_watch(&mut self.watches, &mut self.branches, &local);
        }
        if !wire.locals.is_empty() {
            return wire.narrowed(&text);
        }
        self.wires.remove(&text);
        self.attached.then_some(Send::Unsubscribe(text))
    }

    /// The data begin anew: revisions so far say nothing of those to come, as in another epoch.
    pub(crate) fn begin_anew(&mut self) {
        for wire in self.wires.values_mut() {
            wire.epoch = None;
            wire.own.values_mut().for_each(|own| *own = Revision::ZERO);
            wire.locals.iter_mut().for_each(Local::begin_anew);
        }
    }

    /// Subscribes everything again on a new connection.
    pub(crate) fn attach(&mut self, epoch: Epoch) -> Vec<Send> {
        (self.attached, self.epoch) = (true, epoch);
        let mut sends = Vec::with_capacity(self.wires.len());
        for (text, wire) in &mut self.wires {
            wire.asked = 1;
            wire.exact_asked = wire.is_exact();
            sends.push(Send::Subscribe { pattern: text.clone(), wire: wire.id, exact: wire.exact_asked });
            wire.locals.iter().for_each(|local| local.attach(epoch));
        }
        sends
    }

    /// The connection is lost.
    pub(crate) fn detach(&mut self) {
        self.attached = false;
        (self.filling, self.next_retry) = (None, None);
        self.sends.clear();
        self.wires.values_mut().for_each(Wire::detach);
    }

    /// `Reset`: a fresh snapshot begins, because too much waited. What it lacks was missed.
    pub(crate) fn reset(&mut self, text: String) -> Result<()> {
        let known = self.wires.get(&text).map(|wire| (wire.id, wire.asked, wire.exact));
        let (id, asked, exact) = known.unwrap_or_default();
        self.hello(text.clone(), id, exact)?;
        if let Some(wire) = wire(&mut self.wires, &text, id) {
            wire.asked = asked; // it answers no `Subscribe`
        }
        Ok(())
    }

    /// `Hello`: the snapshot of a wire subscription begins, of its key alone or of the branch too.
    pub(crate) fn hello(&mut self, text: String, id: u64, exact: bool) -> Result<()> {
        if self.filling.is_some() {
            return Err(Error::protocol("a snapshot begins within another"));
        }
        if let Some(wire) = wire(&mut self.wires, &text, id) {
            wire.asked = wire.asked.saturating_sub(1);
            wire.begin_snapshot(self.epoch, exact);
        }
        self.filling = Some((text, id));
        Ok(())
    }

    /// A `Subscribe` was refused. Callers that asked just now get the error. Subscribers that have it go on: the server has kept it, if it
    /// had it; if not, because the connection is new, it is asked for again where time may cure the refusal.
    pub(crate) fn refused(&mut self, text: &str, id: u64, status: u16, message: &str) {
        let reason = EndReason::Refused { status, message: message.to_owned() };
        let Some(wire) = wire(&mut self.wires, text, id) else { return };
        wire.asked = wire.asked.saturating_sub(1);
        if wire.asked > 0 {
            return; // another is under way, which may be accepted
        }
        let can_wait = matches!(status, status::TOO_MANY | status::UNAVAILABLE);
        let is_served = |local: &Local| wire.live && matches!(local.standing, Standing::Joined);
        let is_over = |local: &Local| local.ready.is_some() || !(can_wait || is_served(local));
        let mut locals = std::mem::take(&mut wire.locals);
        let over: Vec<Local> = locals.extract_if(.., |local| is_over(local)).collect();
        if locals.iter().any(|local| !is_served(local)) {
            let pause = wire.retry.map_or(RETRY_MIN, |(_, pause)| pause.saturating_mul(2).min(RETRY_MAX));
            let at = Instant::now() + pause;
            wire.retry = Some((at, pause));
            self.next_retry = Some(self.next_retry.map_or(at, |next| next.min(at)));
        }
        wire.locals = locals;
        if wire.locals.is_empty() {
            self.wires.remove(text);
        }
        self.end_all(over, &reason);
    }

    /// When something refused is to be asked for again.
    pub(crate) fn next_retry(&self) -> Option<Instant> {
        self.next_retry
    }

    /// What is to be asked for again by now.
    pub(crate) fn retries(&mut self, now: Instant) -> Vec<Send> {
        let is_due = |wire: &Wire| wire.asked == 0 && wire.retry.is_some_and(|(at, _)| at <= now);
        let due = self.wires.iter_mut().filter(|(_, wire)| is_due(wire));
        let again = due.map(|(text, wire)| {
            wire.asked = 1;
            Send::Subscribe { pattern: text.clone(), wire: wire.id, exact: wire.exact_asked }
        });
        let again = again.collect();
        let waiting = self.wires.values().filter(|wire| wire.asked == 0);
        self.next_retry = waiting.filter_map(|wire| Some(wire.retry?.0)).min();
        again
    }

    /// What is to be sent because of what was received.
    pub(crate) fn take_sends(&mut self) -> Vec<Send> {
        std::mem::take(&mut self.sends)
    }

    /// `Update`.
    pub(crate) fn update(&mut self, entry: &Entry, skipped: u64) {
        match self.filling.take() {
            Some((text, id)) => {
                let over = wire(&mut self.wires, &text, id).map(|wire| wire.update(entry, skipped));
                self.end_too_much(&text, over.unwrap_or_default());
                self.filling = Some((text, id));
            }
            None => self.each_covering(&entry.key, entry.revision, |wire| wire.update(entry, skipped)),
        }
    }

    /// `Close` of a key.
    pub(crate) fn gone(&mut self, key: &Key, revision: Revision, reason: GoneReason, skipped: u64) {
        let gone = Gone { key, revision, reason, skipped };
        let mut over = Vec::new();
        self.each_covering(key, revision, |wire| {
            let too_much = wire.gone(&gone);
            over.extend(wire.locals.iter().filter_map(Local::over));
            too_much
        });
        self.restart(over);
    }

    /// Too many deletes wait in these queues: what waits is given up for a snapshot, as a server does with `Reset`.
    fn restart(&mut self, over: Vec<Arc<Queue>>) {
        for queue in over {
            let locals = self.wires.values().flat_map(|wire| &wire.locals).filter(|local| local.may_restart());
            let fed = locals.filter(|local| matches!(&local.sink, Sink::Queue(fed) if Arc::ptr_eq(fed, &queue)));
            let patterns: Vec<&Pattern> = fed.map(|local| &local.pattern).collect();
            if patterns.is_empty() {
                continue;
            }
            let dropped = queue.drop_backlog(|key| patterns.iter().any(|pattern| pattern.covers(key)));
            let sends = self.wires.iter_mut().filter_map(|(text, wire)| wire.restart(text, &queue, &dropped));
            self.sends.extend(sends);
        }
    }

    /// The wire subscriptions that cover a key, of which none has a change of this revision yet: of the key itself, of each
    /// that it is below, and of everything.
    fn each_covering(&mut self, key: &Key, revision: Revision, mut notify: impl FnMut(&mut Wire) -> Vec<Local>) {
        self.each_text(key, |hub, text| {
            let Some(wire) = hub.wires.get_mut(text).filter(|wire| wire.live && wire.has < revision.get()) else {
                return;
            };
            let over = notify(wire);
            hub.end_too_much(text, over);
        });
    }

    /// The patterns that cover a key, as written.
    fn each_text(&mut self, key: &Key, mut visit: impl FnMut(&mut Hub, &str)) {
        let mut text = std::mem::take(&mut self.scratch);
        text.clear();
        visit(self, "*");
        let segments = key.as_str().split('.');
        for segment in segments {
            if !text.is_empty() {
                let len = text.len();
                text.push_str(".*");
                visit(self, &text);
                text.truncate(len);
                text.push('.');
            }
            text.push_str(segment);
            visit(self, &text);
        }
        self.scratch = text;
    }

    /// A watch is not to know less of a key than the answer to the client's own put or delete, though the server may pass
    /// over the notification in favour of a newer one, which comes later.
    pub(crate) fn own_write(&mut self, key: &Key, entry: Option<&Entry>, revision: Revision) {
        let write = |hub: &mut Hub, text: &str| {
            let Some(wire) = hub.wires.get_mut(text) else { return };
            let mut is_known = false;
            for local in wire.locals.iter_mut().filter(|local| local.pattern.covers(key)) {
                let Sink::Watch(watch) = &mut local.sink else { continue };
                match entry {
                    Some(entry) => _ = watch.set(entry),
                    None => watch.deleted(&Pattern::Exact(key.clone()), revision),
                }
                is_known = entry.is_some();
            }
            if is_known && !wire.keys.contains_key(key) {
                wire.own.insert(key.clone(), revision);
            }
        };
        match self.branches.iter().any(|(_, pattern)| pattern.covers(key)) {
            true => self.each_text(key, write),
            false => write(self, key.as_str()),
        }
    }

    /// The same for a delete of `count` keys, up to this revision. Up to 1,024 keys go in one step, with one revision after
    /// the other; of more it is not known which.
    pub(crate) fn own_delete(&mut self, pattern: &Pattern, last: Revision, count: u64) {
        if self.watches == 0 || !(1..=STEP_KEYS).contains(&count) {
            return;
        }
        let first = last.back(count - 1);
        for local in self.wires.values_mut().flat_map(|wire| &mut wire.locals) {
            let is_selected = match &local.pattern {
                Pattern::Exact(key) => pattern.selects(key),
                _ => true,
            };
            if let (true, Sink::Watch(watch)) = (is_selected, &mut local.sink) {
                watch.deleted(pattern, first);
            }
        }
    }

    /// Whether this key is watched.
    pub(crate) fn is_watched(&self, key: &str) -> bool {
        let is_watched = |wire: &Wire| wire.locals.iter().any(Local::is_watch);
        self.watches > 0
            && (self.wires.get(key).is_some_and(is_watched)
                || (!self.branches.is_empty()
                    && Key::new(key).is_ok_and(|key| self.branches.iter().any(|(_, pattern)| pattern.covers(&key)))))
    }

    fn end_too_much(&mut self, text: &str, over: Vec<Local>) {
        if over.is_empty() {
            return;
        }
        for local in over {
            forget_watch(&mut self.watches, &mut self.branches, &local);
            let len_max = local.len_max;
            local.end(EndReason::TooMuch { len_max });
        }
        if self.wires.get(text).is_some_and(|wire| wire.locals.is_empty()) {
            self.wires.remove(text);
            self.sends.push(Send::Unsubscribe(text.to_owned()));
        } else if let Some(wire) = self.wires.get_mut(text) {
            self.sends.extend(wire.narrowed(text));
        }
    }

    /// `Close` of a subscription. Those that our own `Subscribe`s and `Unsubscribe`s replaced or ended are expected:
    /// the server sends their end before it answers.
    pub(crate) fn ended(&mut self, text: &str, reason: Reason) {
        if self.wires.get(text).is_some_and(|wire| wire.asked == 0) {
            let replaced = reason == Reason::Replaced;
            let reason = if replaced { EndReason::Replaced } else { EndReason::Unsubscribed };
            let ended = self.wires.remove(text).map(|wire| wire.locals).unwrap_or_default();
            self.end_all(ended, &reason);
        }
    }

    fn end_all(&mut self, locals: Vec<Local>, reason: &EndReason) {
        for local in locals {
            forget_watch(&mut self.watches, &mut self.branches, &local);
            local.end(reason.clone());
        }
    }

    /// `Synced`.
    pub(crate) fn synced(&mut self, revision: Revision) -> Result<()> {
        let (text, id) = self.filling.take().ok_or_else(|| Error::protocol("a snapshot ends that did not begin"))?;
        if let Some(wire) = wire(&mut self.wires, &text, id).filter(|wire| wire.live) {
            wire.end_snapshot(revision);
            let over = wire.locals.iter().filter_map(Local::over).collect();
            self.restart(over);
        }
        Ok(())
    }
}

fn forget_watch(watches: &mut usize, branches: &mut Vec<(u64, Pattern)>, local: &Local) {
    *watches = watches.saturating_sub(usize::from(local.is_watch()));
    branches.retain(|(id, _)| *id != local.id);
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

    use nkv_core::mailbox::DELETES_MAX;

    use super::*;
    use crate::watcher::BranchWatcher;

    fn add(hub: &mut Hub, id: u64, pattern: &str) -> (Arc<Queue>, Option<Send>) {
        let (queue, pattern) = (Arc::<Queue>::default(), Pattern::new(pattern).unwrap());
        let local = Local::new(id, pattern, Sink::Queue(Arc::clone(&queue)), 2_000);
        (queue, hub.add(local))
    }

    fn revision(number: u64) -> Revision {
        Revision::in_epoch(Epoch::default(), number)
    }

    fn entry(key: &str, number: u64) -> Entry {
        let value = bytes::Bytes::from(number.to_string());
        Entry::new(Key::new(key).unwrap(), value, revision(number))
    }

    /// Revisions and ends, as received.
    fn received(queue: &Queue) -> Vec<String> {
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
        let Send::Subscribe { pattern, wire: id, exact } = send else { panic!("{send:?}") };
        hub.hello(pattern.clone(), *id, *exact).unwrap();
        entries.iter().for_each(|entry| hub.update(entry, 0));
        let newest = entries.iter().map(|entry| entry.revision.get()).max();
        hub.synced(revision(newest.unwrap_or(0))).unwrap();
    }

    #[test]
    fn a_change_that_comes_before_its_snapshot_on_a_new_connection_is_notified_once() {
        let mut hub = Hub::default();
        assert_eq!(hub.attach(Epoch::new(1)), []);
        let (all, send) = add(&mut hub, 1, "*");
        fill(&mut hub, &send.unwrap(), &[entry("a", 1)]);
        let (one, send) = add(&mut hub, 2, "a");
        fill(&mut hub, &send.unwrap(), &[entry("a", 1)]);
        assert_eq!(
            (received(&all), received(&one)),
            (vec!["a@1".into(), "Synced".into()], vec!["a@1".into(), "Synced".into()])
        );

        hub.detach();
        let mut sends = hub.attach(Epoch::new(2));
        sends.sort_by_key(|send| matches!(send, Send::Subscribe { pattern, .. } if pattern == "a"));
        fill(&mut hub, &sends[0], &[entry("a", 1)]);
        hub.update(&entry("a", 2), 0);
        assert_eq!(received(&one), ["Connected"], "its own snapshot has not begun");
        fill(&mut hub, &sends[1], &[entry("a", 2)]);
        assert_eq!(received(&one), ["a@2", "Synced"]);
        assert_eq!(received(&all), ["Connected", "a@2", "Synced"]);
    }

    #[test]
    fn an_end_is_expected_after_our_own_request_and_else_it_is_the_end() {
        let mut hub = Hub::default();
        hub.attach(Epoch::new(1));
        let (first, send) = add(&mut hub, 1, "a");
        hub.ended("a", Reason::Replaced); // by the `Subscribe` that is under way
        fill(&mut hub, &send.unwrap(), &[]);
        assert_eq!(hub.remove(&Pattern::new("a").unwrap(), 1), Some(Send::Unsubscribe("a".into())));
        let (second, send) = add(&mut hub, 2, "a");
        hub.ended("a", Reason::Unsubscribed); // of the first
        fill(&mut hub, &send.unwrap(), &[]);
        assert_eq!((received(&first), received(&second)), (vec!["Synced".into()], vec!["Synced".into()]));
        hub.ended("a", Reason::Unsubscribed);
        assert_eq!(received(&second), ["Ended(Unsubscribed)"]);
    }

    #[test]
    fn a_snapshot_that_no_subscriber_waits_for_any_more_is_read_past() {
        let mut hub = Hub::default();
        hub.attach(Epoch::new(1));
        let (_, early) = add(&mut hub, 1, "a");
        hub.remove(&Pattern::new("a").unwrap(), 1);
        let (queue, late) = add(&mut hub, 2, "a");
        fill(&mut hub, &early.unwrap(), &[entry("a", 1)]);
        hub.ended("a", Reason::Unsubscribed);
        assert_eq!(received(&queue), Vec::<String>::new());
        fill(&mut hub, &late.unwrap(), &[entry("a", 1)]);
        assert_eq!(received(&queue), ["a@1", "Synced"]);
    }

    #[test]
    fn what_is_not_in_a_snapshot_that_was_not_asked_for_was_missed_and_what_is_known_comes_not_again() {
        let mut hub = Hub::default();
        hub.attach(Epoch::new(1));
        let (queue, send) = add(&mut hub, 1, "*");
        fill(&mut hub, &send.unwrap(), &[entry("a", 1), entry("b", 2)]);
        assert_eq!(received(&queue), ["a@1", "b@2", "Synced"]);
        hub.reset("*".into()).unwrap();
        [entry("a", 1), entry("c", 12)].iter().for_each(|entry| hub.update(entry, 0));
        assert_eq!(received(&queue), ["c@12"]);
        hub.synced(revision(10)).unwrap();
        assert_eq!(received(&queue), ["b missed"]);
        hub.update(&entry("c", 13), 0);
        assert_eq!(received(&queue), ["c@13"]);
        // One that has just been unsubscribed is read past.
        hub.remove(&Pattern::All, 1);
        hub.reset("*".into()).unwrap();
        hub.update(&entry("f", 14), 0);
        hub.synced(revision(14)).unwrap();
        assert_eq!(received(&queue), Vec::<String>::new());
    }

    #[test]
    fn a_snapshot_that_was_not_asked_for_answers_no_subscribe() {
        let mut hub = Hub::default();
        hub.attach(Epoch::new(1));
        let (first, send) = add(&mut hub, 1, "a");
        fill(&mut hub, &send.unwrap(), &[]);
        let (second, send) = add(&mut hub, 2, "a");
        hub.reset("a".into()).unwrap();
        hub.synced(revision(9)).unwrap();
        hub.ended("a", Reason::Replaced); // by the `Subscribe` that is under way
        fill(&mut hub, &send.unwrap(), &[entry("a", 10)]);
        assert_eq!(
            (received(&first), received(&second)),
            (vec!["Synced".into(), "a@10".into()], vec!["Synced".into(), "a@10".into()])
        );
    }

    // As of another epoch: what an engine lost is gone, and lower revisions are news.
    #[test]
    fn where_the_data_begin_anew_lower_revisions_are_delivered_and_what_is_missing_is_missed() {
        let mut hub = Hub::default();
        hub.attach(Epoch::new(1));
        let (queue, send) = add(&mut hub, 1, "*");
        fill(&mut hub, &send.unwrap(), &[entry("a", 5), entry("b", 9)]);
        received(&queue);
        hub.detach();
        hub.begin_anew();
        let sends = hub.attach(Epoch::new(1));
        fill(&mut hub, &sends[0], &[entry("a", 2)]);
        assert_eq!(received(&queue), ["Connected", "a@2", "b missed", "Synced"]);
    }

    #[test]
    fn where_the_data_begin_anew_a_key_known_by_an_own_put_alone_is_missed() {
        let (mut hub, notes) = (Hub::default(), Notes::default());
        hub.attach(Epoch::new(1));
        let pattern = Pattern::Exact(Key::new("a").unwrap());
        let send = hub.add(Local::new(1, pattern, Sink::Watch(Box::new(notes.clone())), 1_000));
        fill(&mut hub, &send.unwrap(), &[]);
        let put = Entry::new(Key::new("a").unwrap(), "1", Revision::in_epoch(Epoch::new(1), 7));
        hub.own_write(&put.key, Some(&put), put.revision);
        notes.take();
        hub.detach();
        hub.begin_anew();
        let sends = hub.attach(Epoch::new(1));
        fill(&mut hub, &sends[0], &[]);
        assert_eq!(notes.take(), ["lost", "anew", "missed@0", "live"]);
    }

    #[test]
    fn within_an_epoch_a_server_that_goes_back_is_not_followed() {
        let mut hub = Hub::default();
        hub.attach(Epoch::new(1));
        let (queue, send) = add(&mut hub, 1, "a");
        fill(&mut hub, &send.unwrap(), &[entry("a", 5)]);
        received(&queue);
        hub.detach();
        let sends = hub.attach(Epoch::new(1));
        fill(&mut hub, &sends[0], &[entry("a", 3)]);
        hub.update(&entry("a", 4), 0);
        assert_eq!(received(&queue), ["Connected", "Synced"]);
        hub.detach();
        let sends = hub.attach(Epoch::new(2));
        fill(&mut hub, &sends[0], &[entry("a", 3)]);
        assert_eq!(received(&queue), ["Connected", "a@3", "Synced"]);
    }

    #[test]
    fn a_subscription_that_would_hold_too_much_is_ended_and_others_go_on() {
        let mut hub = Hub::default();
        hub.attach(Epoch::new(1));
        let (all, send) = add(&mut hub, 1, "*");
        fill(&mut hub, &send.unwrap(), &[]);
        let (one, send) = add(&mut hub, 2, "a");
        fill(&mut hub, &send.unwrap(), &[]);
        // Two keys, sent and not read; one that comes and goes, and is read, costs nothing.
        for n in 1..100 {
            hub.update(&entry("a", 2 * n), 0);
            hub.gone(&Key::new("a").unwrap(), revision(2 * n + 1), GoneReason::Deleted, 0);
            received(&all);
        }
        hub.update(&entry("b", 200), 0);
        hub.update(&entry("c", 201), 0);
        assert_eq!(received(&all), ["b@200", "c@201"]);
        for n in 0..10 {
            hub.update(&entry(&format!("k{n}"), 300 + n), 0);
        }
        assert_eq!(received(&all).last().unwrap(), "Ended(TooMuch");
        assert_eq!(received(&one), ["Synced"], "it came and went unread");
        hub.update(&entry("a", 400), 0);
        assert_eq!(received(&one), ["a@400"]);
        assert_eq!(hub.take_sends(), [Send::Unsubscribe("*".into())]);
        assert_eq!(hub.remove(&Pattern::new("*").unwrap(), 1), None);
    }

    /// A subscription whose reader has taken `read`, and does not read the keys that there are since a reconnect.
    fn add_slow(hub: &mut Hub, has_snapshot: bool, read: &[Entry], unread: &[Entry]) -> Arc<Queue> {
        let queue = Arc::<Queue>::default();
        let mut local = Local::new(1, Pattern::All, Sink::Queue(Arc::clone(&queue)), usize::MAX);
        local.has_snapshot = has_snapshot;
        hub.attach(Epoch::default());
        let send = hub.add(local).unwrap();
        fill(hub, &send, if has_snapshot { read } else { &[] });
        received(&queue);
        if !has_snapshot {
            read.iter().for_each(|entry| hub.update(entry, 0));
            received(&queue);
        }
        hub.detach();
        let sends = hub.attach(Epoch::default());
        fill(hub, &sends[0], &[read, unread].concat());
        queue
    }

    fn keys(count: usize, revision: u64) -> Vec<Entry> {
        (0..count).map(|n| entry(&format!("k{n}"), revision)).collect()
    }

    fn delete(hub: &mut Hub, entries: &[Entry], number: u64) {
        entries.iter().for_each(|entry| hub.gone(&entry.key, revision(number), GoneReason::Deleted, 0));
    }

    // What waited was bounded by the keys that there had been, and with each reconnect by more.
    #[test]
    fn past_its_bound_a_backlog_is_dropped_and_the_present_state_is_asked_for() {
        for has_snapshot in [true, false] {
            let mut hub = Hub::default();
            let (read, unread) = ([entry("read", 1), entry("stays", 2)], keys(DELETES_MAX + 10, 5));
            let queue = add_slow(&mut hub, has_snapshot, &read, &unread);
            hub.update(&entry("read", 6), 0);
            delete(&mut hub, &unread[..DELETES_MAX], 7);
            assert_eq!((hub.take_sends().len(), queue.len()), (0, DELETES_MAX + 13));
            delete(&mut hub, &unread[DELETES_MAX..], 7);
            let sends = hub.take_sends();
            assert_eq!((sends.len(), queue.len()), (1, 1), "only that the connection is there again");
            hub.ended("*", Reason::Replaced);
            hub.gone(&Key::new("read").unwrap(), revision(8), GoneReason::Deleted, 0);
            hub.update(&entry("new", 9), 0);
            assert_eq!(queue.len(), 1);
            fill(&mut hub, &sends[0], &[entry("stays", 2), entry("new", 9)]);
            assert_eq!(received(&queue), ["Connected", "new@9", "read missed", "Synced"], "{has_snapshot}");
            hub.gone(&Key::new("stays").unwrap(), revision(10), GoneReason::Deleted, 0);
            assert_eq!((received(&queue), hub.take_sends()), (vec!["stays deleted".to_owned()], vec![]));
        }
    }

    #[test]
    fn keys_that_others_take_the_place_of_while_a_reader_is_away_and_does_not_read_take_no_memory() {
        let mut hub = Hub::default();
        let queue = add_slow(&mut hub, true, &[], &keys(100, 5));
        for round in 0..50 {
            hub.detach();
            let sends = hub.attach(Epoch::default());
            let entries: Vec<_> = (0..100).map(|n| entry(&format!("r{round}.{n}"), 10 + round)).collect();
            fill(&mut hub, &sends[0], &entries);
            assert!(queue.len() <= 103, "{} wait after {round} rounds", queue.len());
        }
        let received = received(&queue);
        assert!(received[..received.len() - 1].iter().all(|event| event.starts_with("r49") || event == "Connected"));
        assert_eq!(received.last().unwrap(), "Synced");
    }

    // Its reader has them; it would have to be given each by name all the same.
    #[test]
    fn the_ends_of_keys_that_the_reader_has_are_each_notified() {
        let mut hub = Hub::default();
        let read = keys(DELETES_MAX + 10, 5);
        let queue = add_slow(&mut hub, true, &read, &[]);
        received(&queue);
        delete(&mut hub, &read, 7);
        assert_eq!((hub.take_sends(), received(&queue).len()), (vec![], read.len()));
    }

    #[test]
    fn a_backlog_of_several_patterns_is_dropped_as_one_and_synced_once_all_are() {
        let mut hub = Hub::default();
        hub.attach(Epoch::default());
        let queue = Arc::new(Queue::of_parts(2));
        let mut add = |pattern: &str, id| {
            let mut local = Local::new(id, Pattern::new(pattern).unwrap(), Sink::Queue(Arc::clone(&queue)), usize::MAX);
            local.charged = Some(0);
            hub.add(local).unwrap()
        };
        let sends = [add("a", 1), add("b", 2)];
        let entries: Vec<_> = (0..=DELETES_MAX).map(|n| entry(&format!("a.k{n}"), 5)).collect();
        fill(&mut hub, &sends[0], &entries);
        fill(&mut hub, &sends[1], &[entry("b", 4)]);
        delete(&mut hub, &entries, 7);
        let mut sends = hub.take_sends();
        assert_eq!((sends.len(), queue.len()), (2, 0));
        sends.sort_by_key(|send| format!("{send:?}"));
        fill(&mut hub, &sends[0], &[]);
        assert_eq!(received(&queue), Vec::<String>::new());
        fill(&mut hub, &sends[1], &[entry("b", 4)]);
        assert_eq!(received(&queue), ["b@4", "Synced"]);
    }

    #[test]
    fn a_snapshot_within_another_or_an_end_without_a_beginning_is_an_error() {
        let mut hub = Hub::default();
        hub.attach(Epoch::new(1));
        assert!(hub.synced(Revision::ZERO).is_err());
        hub.hello("a".into(), 1, false).unwrap();
        assert!(hub.hello("b".into(), 2, false).is_err());
    }

    #[test]
    fn a_snapshot_that_broke_off_is_continued_and_nothing_comes_twice() {
        let mut hub = Hub::default();
        hub.attach(Epoch::new(1));
        let (first, send) = add(&mut hub, 1, "*");
        fill(&mut hub, &send.unwrap(), &[entry("a", 1), entry("b", 2)]);
        assert_eq!(received(&first), ["a@1", "b@2", "Synced"]);
        let (second, send) = add(&mut hub, 2, "*");
        let Some(Send::Subscribe { pattern, wire, .. }) = send else { panic!("{send:?}") };
        hub.hello(pattern, wire, false).unwrap();
        [entry("a", 1), entry("b", 2)].iter().for_each(|entry| hub.update(entry, 0));
        assert_eq!(received(&second), ["a@1", "b@2"]);
        hub.detach();
        let sends = hub.attach(Epoch::new(1));
        fill(&mut hub, &sends[0], &[entry("b", 2), entry("d", 4)]);
        assert_eq!(received(&first), ["Connected", "d@4", "a missed", "Synced"]);
        assert_eq!(received(&second), ["Connected", "d@4", "a missed", "Synced"]);
    }

    #[test]
    fn a_snapshot_costs_subscriptions_that_know_it_nothing() {
        let mut hub = Hub::default();
        hub.attach(Epoch::new(1));
        let (first, send) = add(&mut hub, 1, "a");
        fill(&mut hub, &send.unwrap(), &[entry("a", 1)]);
        received(&first);
        let wakes = (0..100).map(|id| {
            let (_, send) = add(&mut hub, 2 + id, "a");
            fill(&mut hub, &send.unwrap(), &[entry("a", 1)]);
            first.len()
        });
        assert_eq!(wakes.sum::<usize>(), 0);
    }

    /// A subscription to several patterns that have no key in common.
    fn add_parts(hub: &mut Hub, patterns: &[&str]) -> (Arc<Queue>, Vec<Send>) {
        let queue = Arc::new(Queue::of_parts(patterns.len()));
        let sends = patterns.iter().zip(1..).filter_map(|(pattern, id)| {
            let sink = Sink::Queue(Arc::clone(&queue));
            let mut local = Local::new(id, Pattern::new(pattern).unwrap(), sink, 2_000);
            local.charged = Some(0);
            hub.add(local)
        });
        let sends = sends.collect();
        (queue, sends)
    }

    #[test]
    fn several_patterns_are_synced_once_all_are_and_up_to_the_lowest_revision() {
        let mut hub = Hub::default();
        hub.attach(Epoch::default());
        let (queue, sends) = add_parts(&mut hub, &["a", "b", "c"]);
        fill(&mut hub, &sends[0], &[entry("a", 7)]);
        fill(&mut hub, &sends[1], &[entry("b", 5)]);
        hub.gone(&Key::new("a").unwrap(), revision(9), GoneReason::Deleted, 0);
        fill(&mut hub, &sends[2], &[entry("c", 8)]);
        let mut cx = Context::from_waker(Waker::noop());
        let mut events = std::iter::from_fn(|| match queue.poll_take(&mut cx) {
            Poll::Ready(event) => event,
            Poll::Pending => None,
        });
        let synced = events.by_ref().find(|event| matches!(event, Event::Synced { .. }));
        assert_eq!((synced, events.count()), (Some(Event::synced(revision(5), Epoch::default())), 0));

        hub.detach();
        assert_eq!(received(&queue), ["Reconnecting"]);
        let mut sends = hub.attach(Epoch::default());
        sends.sort_by_key(|send| format!("{send:?}"));
        assert_eq!(received(&queue), ["Connected"]);
        fill(&mut hub, &sends[0], &[]);
        fill(&mut hub, &sends[1], &[entry("b", 5)]);
        assert_eq!(received(&queue), Vec::<String>::new(), "the last part may lack anything");
        fill(&mut hub, &sends[2], &[entry("c", 10)]);
        assert_eq!(received(&queue), ["c@10", "Synced"]);
    }

    #[test]
    fn while_a_part_is_not_synced_nothing_is_left_out_of_the_others() {
        let mut hub = Hub::default();
        hub.attach(Epoch::default());
        let (queue, sends) = add_parts(&mut hub, &["a", "b"]);
        fill(&mut hub, &sends[0], &[entry("a", 7)]);
        hub.gone(&Key::new("a").unwrap(), revision(9), GoneReason::Deleted, 0);
        fill(&mut hub, &sends[1], &[]);
        assert_eq!(received(&queue), ["a deleted", "Synced"]);
    }

    #[test]
    fn with_one_of_several_patterns_the_subscription_ends() {
        let mut hub = Hub::default();
        hub.attach(Epoch::default());
        let (queue, sends) = add_parts(&mut hub, &["a", "b"]);
        sends.iter().for_each(|send| fill(&mut hub, send, &[]));
        hub.ended("a", Reason::Replaced);
        hub.update(&entry("b", 3), 0);
        assert_eq!(received(&queue), ["Synced", "Ended(Replaced)"]);
        assert_eq!(hub.remove(&Pattern::new("a").unwrap(), 1), None);
        assert_eq!(hub.remove(&Pattern::new("b").unwrap(), 2), Some(Send::Unsubscribe("b".into())));
    }

    #[test]
    fn several_patterns_share_one_limit() {
        let mut hub = Hub::default();
        hub.attach(Epoch::default());
        let (queue, sends) = add_parts(&mut hub, &["a", "b"]);
        fill(&mut hub, &sends[0], &[]);
        fill(&mut hub, &sends[1], &[]);
        received(&queue);
        for n in 0..3 {
            hub.update(&entry(&format!("a.{n}"), 10 * n + 1), 0);
            hub.update(&entry(&format!("b.{n}"), 10 * n + 2), 0);
            assert_eq!(received(&queue).len(), 2);
        }
        hub.update(&entry("b.x", 100), 0);
        hub.update(&entry("a.x", 101), 0);
        assert_eq!(received(&queue).last().unwrap(), "Ended(TooMuch", "8 keys of 203 bytes, of which 2 wait");
    }

    /// Notes what it is given.
    #[derive(Clone, Default)]
    struct Notes(Arc<std::sync::Mutex<Vec<String>>>);

    impl Notes {
        fn note(&self, word: String) {
            self.0.lock().unwrap().push(word);
        }

        fn take(&self) -> Vec<String> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    impl Watcher for Notes {
        fn set(&mut self, entry: &Entry) -> usize {
            self.note(format!("is@{}", entry.revision));
            0
        }

        fn gone(&mut self, _: &Key, revision: Revision) {
            self.note(format!("gone@{revision}"));
        }

        fn missed(&mut self, _: &Key, revision: Revision) {
            self.note(format!("missed@{revision}"));
        }

        fn deleted(&mut self, _: &Pattern, first: Revision) {
            self.note(format!("deleted@{first}"));
        }

        fn begin_anew(&mut self) {
            self.note("anew".into());
        }

        fn set_live(&mut self, synced: Option<Revision>) {
            self.note(if synced.is_some() { "live".into() } else { "lost".into() });
        }

        fn end(&mut self, _: EndReason) {
            self.note("ended".into());
        }
    }

    // A notification may be passed over in favour of one that comes behind the answer.
    #[test]
    fn a_watch_knows_of_the_clients_own_write_with_its_answer() {
        let (mut hub, notes) = (Hub::default(), Notes::default());
        hub.attach(Epoch::new(1));
        let pattern = Pattern::Exact(Key::new("a").unwrap());
        let send = hub.add(Local::new(1, pattern.clone(), Sink::Watch(Box::new(notes.clone())), 1_000));
        fill(&mut hub, &send.unwrap(), &[entry("a", 1)]);
        assert!(hub.is_watched("a") && !hub.is_watched("b"));
        let (key, own) = (Key::new("a").unwrap(), entry("a", 2));
        hub.own_write(&key, Some(&own), revision(2));
        hub.own_write(&key, None, revision(3));
        hub.update(&entry("a", 4), 0);
        hub.detach();
        hub.own_write(&key, None, revision(5));
        hub.own_delete(&Pattern::All, revision(9), 3);
        hub.own_delete(&Pattern::new("b").unwrap(), revision(12), 1);
        let noted = ["is@1", "live", "is@2", "deleted@3", "is@4", "lost", "deleted@5", "deleted@7"];
        assert_eq!(notes.take(), noted);
        assert_eq!(hub.remove(&pattern, 1), None);
        assert!(!hub.is_watched("a"));
    }

    // It had never been notified of: what was missed was looked for among the keys of notifications alone, and the watch kept
    // the value for ever, live.
    #[test]
    fn a_key_known_by_the_clients_own_put_alone_is_missed_too() {
        let (mut hub, notes) = (Hub::default(), Notes::default());
        hub.attach(Epoch::default());
        let key = Key::new("a").unwrap();
        let sink = Sink::Watch(Box::new(notes.clone()));
        let send = hub.add(Local::new(1, Pattern::Exact(key.clone()), sink, 1_000));
        fill(&mut hub, &send.unwrap(), &[]);
        hub.own_write(&key, Some(&entry("a", 2)), revision(2));
        hub.detach();
        let sends = hub.attach(Epoch::default());
        fill(&mut hub, &sends[0], &[entry("a.b", 3)]);
        assert_eq!(notes.take(), ["live", "is@2", "lost", "missed@3", "live"]);
        hub.own_write(&key, Some(&entry("a", 9)), revision(9));
        hub.reset("a".into()).unwrap();
        hub.synced(revision(8)).unwrap();
        assert_eq!(notes.take(), ["is@9", "live"], "the snapshot is of a moment before it");

        hub.detach();
        let sends = hub.attach(Epoch::new(2));
        let put = Revision::in_epoch(Epoch::new(2), 1);
        hub.own_write(&key, Some(&entry("a", 1)), put); // answered ahead of the snapshot, which does not have it
        fill(&mut hub, &sends[0], &[]);
        assert_eq!(notes.take(), ["lost", "is@1", "live"]);
        hub.detach();
        let sends = hub.attach(Epoch::new(3));
        fill(&mut hub, &sends[0], &[]);
        assert_eq!(notes.take(), ["lost", "missed@0", "live"], "the store is another, and empty");
    }

    type Entries = tokio::sync::watch::Receiver<nkv_types::Branch>;

    fn add_branch(hub: &mut Hub, id: u64, pattern: &str) -> (Entries, Option<Send>) {
        let (watcher, receiver) = BranchWatcher::new(|entry: &Entry| Ok(entry.clone()));
        let pattern = Pattern::new(pattern).unwrap();
        (receiver, hub.add(Local::new(id, pattern, Sink::Watch(Box::new(watcher)), 2_000)))
    }

    fn state(branch: &Entries) -> String {
        let branch = branch.borrow();
        let entries = branch.entries.values().map(|entry| format!("{}@{}", entry.key, entry.revision));
        entries.chain(branch.is_live.then(|| "live".to_owned())).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_branch_is_never_older_than_the_clients_own_writes() {
        let mut hub = Hub::default();
        hub.attach(Epoch::new(1));
        let (branch, send) = add_branch(&mut hub, 1, "a");
        fill(&mut hub, &send.unwrap(), &[entry("a", 1), entry("a.x", 2)]);
        assert!(hub.is_watched("a.y") && !hub.is_watched("b"));
        let y = Key::new("a.y").unwrap();
        hub.own_write(&y, Some(&entry("a.y", 4)), revision(4));
        assert_eq!(state(&branch), "a@1 a.x@2 a.y@4 live");
        hub.update(&entry("a.y", 3), 0);
        hub.update(&entry("a.y", 4), 0);
        assert_eq!(state(&branch), "a@1 a.x@2 a.y@4 live");
        hub.own_write(&y, None, revision(6));
        hub.update(&entry("a.y", 5), 0);
        assert_eq!(state(&branch), "a@1 a.x@2 live");
        hub.gone(&y, revision(6), GoneReason::Deleted, 0);
        hub.update(&entry("a.y", 7), 0);
        // Below `a` two keys were deleted, at the revisions 9 and 10; that of `a.z` was not heard of yet.
        hub.own_delete(&Pattern::new("a.*").unwrap(), revision(10), 2);
        hub.update(&entry("a.z", 8), 0);
        assert_eq!(state(&branch), "a@1 live");
        hub.update(&entry("a.z", 11), 0);
        hub.own_delete(&Pattern::new("b").unwrap(), revision(12), 1);
        assert_eq!(state(&branch), "a@1 a.z@11 live");
        hub.own_delete(&Pattern::All, revision(20), 2);
        assert_eq!(state(&branch), "live");
        assert_eq!(hub.remove(&Pattern::new("a").unwrap(), 1), Some(Send::Unsubscribe("a".into())));
        assert!(!hub.is_watched("a.y"));
    }

    #[test]
    fn a_branch_loses_what_it_missed_when_it_is_live_again() {
        let mut hub = Hub::default();
        hub.attach(Epoch::new(1));
        let (branch, send) = add_branch(&mut hub, 1, "*");
        fill(&mut hub, &send.unwrap(), &[entry("a", 1), entry("b", 2)]);
        hub.own_write(&Key::new("c").unwrap(), Some(&entry("c", 3)), revision(3));
        hub.detach();
        assert_eq!(state(&branch), "a@1 b@2 c@3");
        let sends = hub.attach(Epoch::new(1));
        fill(&mut hub, &sends[0], &[entry("a", 1), entry("d", 4)]);
        assert_eq!(state(&branch), "a@1 d@4 live");
        hub.detach();
        // Nothing is in the store of another epoch.
        let sends = hub.attach(Epoch::new(2));
        fill(&mut hub, &sends[0], &[]);
        assert_eq!((state(&branch).as_str(), branch.borrow().revision), ("live", Revision::ZERO));
    }

    #[test]
    fn a_branch_that_would_hold_too_much_is_ended_and_says_why() {
        let mut hub = Hub::default();
        hub.attach(Epoch::new(1));
        let (branch, send) = add_branch(&mut hub, 1, "*");
        fill(&mut hub, &send.unwrap(), &[entry("a", 1)]);
        // The same key again costs nothing, a key that has gone neither.
        for n in 0..100 {
            hub.update(&entry("b", 10 + 2 * n), 0);
            hub.gone(&Key::new("b").unwrap(), revision(11 + 2 * n), GoneReason::Deleted, 0);
            hub.update(&entry("a", 1_000 + n), 0);
        }
        assert!(branch.borrow().is_live);
        (0..10).for_each(|n| hub.update(&entry(&format!("k{n}"), 2_000 + n), 0));
        let branch = branch.borrow();
        assert_eq!((branch.is_live, branch.ended.as_ref()), (false, Some(&EndReason::TooMuch { len_max: 2_000 })));
        assert!(branch.entries.len() < 9, "{}", branch.entries.len());
        assert_eq!(hub.take_sends(), [Send::Unsubscribe("*".into())]);
        assert!(!hub.is_watched("a"));
    }

    fn add_watch(hub: &mut Hub, id: u64) -> Option<Send> {
        let sink = Sink::Watch(Box::new(Notes::default()));
        hub.add(Local::new(id, Pattern::Exact(Key::new("a").unwrap()), sink, 2_000))
    }

    #[test]
    fn the_snapshot_of_a_key_alone_is_not_that_of_its_branch() {
        let mut hub = Hub::default();
        hub.attach(Epoch::new(1));
        let exact = add_watch(&mut hub, 1);
        let (queue, branch) = add(&mut hub, 2, "a");
        fill(&mut hub, &exact.unwrap(), &[entry("a", 1)]);
        hub.ended("a", Reason::Replaced);
        fill(&mut hub, &branch.unwrap(), &[entry("a", 1), entry("a.b", 2)]);
        assert_eq!(received(&queue), ["a@1", "a.b@2", "Synced"]);
    }

    // The server went on sending the whole branch, and the client remembered it without a bound.
    #[test]
    fn when_only_those_of_the_key_alone_are_left_its_branch_is_given_up() {
        let mut hub = Hub::default();
        hub.attach(Epoch::new(1));
        let (queue, send) = add(&mut hub, 1, "a");
        fill(&mut hub, &send.unwrap(), &[]);
        let send = add_watch(&mut hub, 2);
        hub.ended("a", Reason::Replaced);
        fill(&mut hub, &send.unwrap(), &[]);
        (0..1_000).for_each(|n| hub.update(&entry(&format!("a.k{n}"), n + 10), 0));
        assert!(received(&queue).last().unwrap().starts_with("Ended(TooMuch"));
        assert_eq!(hub.take_sends(), [Send::Subscribe { pattern: "a".into(), wire: 1, exact: true }]);
        assert!(hub.wires["a"].len <= 3_000, "{} bytes for a watch of one key", hub.wires["a"].len);
    }

    #[test]
    fn a_snapshot_that_is_not_delivered_is_bounded_too() {
        let mut hub = Hub::default();
        hub.attach(Epoch::new(1));
        let queue = Arc::<Queue>::default();
        let mut local = Local::new(1, Pattern::All, Sink::Queue(Arc::clone(&queue)), 2_000);
        local.has_snapshot = false;
        let Some(Send::Subscribe { pattern, wire, exact }) = hub.add(local) else { panic!("it is subscribed") };
        hub.hello(pattern, wire, exact).unwrap();
        (0..100).for_each(|n| hub.update(&entry(&format!("k{n}"), n + 1), 0));
        assert_eq!(hub.take_sends(), [Send::Unsubscribe("*".into())]);
        assert_eq!(received(&queue), ["Ended(TooMuch"]);
    }

    // The end of a key went to a subscription that had never heard of it, because another one of the connection had.
    #[test]
    fn a_subscriber_that_never_heard_of_a_key_does_not_hear_of_its_end() {
        let mut hub = Hub::default();
        hub.attach(Epoch::new(1));
        let (_all, send) = add(&mut hub, 1, "*");
        fill(&mut hub, &send.unwrap(), &[entry("a.k", 1)]);
        let (one, send) = add(&mut hub, 2, "a");
        fill(&mut hub, &send.unwrap(), &[]);
        hub.gone(&Key::new("a.k").unwrap(), revision(8), GoneReason::Deleted, 0);
        assert_eq!(received(&one), ["Synced"]);
    }

    #[test]
    fn a_refusal_ends_no_subscription_while_another_request_is_under_way() {
        let mut hub = Hub::default();
        hub.attach(Epoch::new(1));
        let Some(Send::Subscribe { pattern, wire, .. }) = add_watch(&mut hub, 1) else { panic!("it is subscribed") };
        let (queue, branch) = add(&mut hub, 2, "a");
        hub.refused(&pattern, wire, 429, "not now");
        fill(&mut hub, &branch.unwrap(), &[entry("a", 1)]);
        assert_eq!(received(&queue), ["a@1", "Synced"]);
    }
}
