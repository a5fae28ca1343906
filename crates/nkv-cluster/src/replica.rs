//! What one node has: the registers, their digests, and how far each peer has them. It decides what a write or a record of a
//! peer changes; no clock, disk or socket is here, so that a simulation runs the same code.
//!
//! A change takes two steps. It is planned, against what is there and what was planned before; the plan is stored; then it is
//! committed. One task does all of them, so nothing comes in between.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use nkv_core::{Action, Change, Epoch, Key, KeyRef, Meta, Op, Outcome, Pattern, Reason, Revision, StoredRef};
use nkv_node::EngineError;

use crate::bytes::{Reader, Writer};
use crate::clock::{Now, SET_FROM};
use crate::register::{Content, Head, Record, Register, key_hash};
use crate::stamp::{Hlc, HybridClock, Millis, NodeId, Stamp};
use crate::tree::{Children, Half, Prefix, Tree};

/// Under which reserved key a node's own id is.
const IDENTITY: &str = "cluster.node";

/// Under which reserved keys the contacts are.
const CONTACT: &str = "cluster.contact.";

/// Keys that the patterns of a batch delete, at most: a batch is planned and stored whole.
const BATCH_DELETES_MAX: usize = 16_384;

/// A contact at which nothing was new is written down again after this part of `gc_grace`.
const CONTACT_PART: Millis = 64;

/// Peers whose contacts are kept, at most: of more, those of the oldest are forgotten. What a node lacks proves nothing to them.
const CONTACTS_MAX: usize = 1_024;

/// How long things last.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    /// How long tombstones are given to peers.
    pub(crate) gc_grace: Millis,
    /// What is stamped further ahead is not taken.
    pub(crate) offset_max: Millis,
}

impl Terms {
    /// Tombstones are kept a little longer than they are given: one node has forgotten what another still lists, and is not
    /// given it again.
    fn kept(&self) -> Millis {
        self.gc_grace.saturating_add(self.offset_max.saturating_mul(2))
    }
}

/// Who a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) id: NodeId,
    pub(crate) cluster: String,
}

/// The last time that two nodes had the same: a session that ended whole in both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Contact {
    pub(crate) at: Millis,
    /// Of the node whose contact it is: what it had up to this revision, both had.
    pub(crate) own: Place,
    /// Of the peer, in the same way.
    pub(crate) peer: Place,
}

/// How far a node's data were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) epoch: Epoch,
    pub(crate) revision: u64,
}

impl Place {
    /// Whether data that are at `now` are whole since this.
    fn leads_to(self, now: Place) -> bool {
        self.epoch == now.epoch && self.revision <= now.revision
    }

    pub(crate) fn write(self, to: &mut Writer) {
        to.u128(self.epoch.get());
        to.u64(self.revision);
    }

    pub(crate) fn read(from: &mut Reader) -> Option<Self> {
        Some(Place { epoch: Epoch::new(from.u128()?), revision: from.u64()? })
    }
}

impl Contact {
    /// The same as the peer has it.
    fn mirrored(self) -> Self {
        Contact { own: self.peer, peer: self.own, ..self }
    }

    pub(crate) fn write(self, to: &mut Writer) {
        to.u64(self.at);
        self.own.write(to);
        self.peer.write(to);
    }

    pub(crate) fn read(from: &mut Reader) -> Option<Self> {
        Some(Contact { at: from.u64()?, own: Place::read(from)?, peer: Place::read(from)? })
    }
}

/// A key, behind its hash: in the order of the digests.
pub(crate) type Slot = (u64, Key);

/// What there is of a key. The node's store has the value, at the same revision.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub(crate) register: Head,
    /// The node's own revision at which it came.
    pub(crate) revision: u64,
}

/// Gives the value that came to the node's store with a revision, unless that has something else of the key now.
pub(crate) type Values<'a> = &'a dyn Fn(&Key, u64) -> Option<Bytes>;

/// A write of this node of which no peer is known to have taken it, nor any that it took the place of since one was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Untaken {
    /// When it was written, by the steady clock.
    written: Millis,
    /// What its stamp had to be above: that of what peers may have of the key.
    above: Hlc,
    /// The revision of the first of these writes.
    first: u64,
}

/// What one node has.
#[derive(Debug)]
pub(crate) struct Replica {
    terms: Terms,
    identity: Option<Identity>,
    epoch: Epoch,
    revision: u64,
    /// The last revision of a register: those of what a node notes for itself do not count.
    data_revision: u64,
    held: BTreeMap<Slot, Held>,
    tree: Tree,
    /// When values end.
    ends: BTreeSet<(Millis, Slot)>,
    /// When tombstones may be forgotten.
    purges: BTreeSet<(Millis, Slot)>,
    clock: HybridClock,
    contacts: BTreeMap<NodeId, (Contact, Millis)>,
    /// What was written here and that no session has given to a peer since.
    untaken: BTreeMap<Key, Untaken>,
    /// What storage had without a stamp, from before the node was in a cluster.
    unstamped: VecDeque<(Key, Bytes, Option<Millis>)>,
    /// What storage has and cannot be understood.
    broken: Option<String>,
    /// What was stamped anew, for tests that know what was answered.
    #[cfg(test)]
    pub(crate) restamped: Vec<((Key, Stamp), Stamp)>,
}

/// A write that was stamped with a clock that was off.
#[derive(Debug)]
struct Misstamped {
    slot: Slot,
    held: Held,
    untaken: Untaken,
    least: Hlc,
}

/// What is to be changed.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    revision: u64,
    data_revision: u64,
    staged: BTreeMap<Slot, Option<Held>>,
    /// Of what is staged.
    untaken: BTreeMap<Key, Untaken>,
    contacts: Vec<(NodeId, Option<(Contact, Millis)>)>,
    identity: Option<Identity>,
    /// For storage.
    pub(crate) changes: Vec<Change>,
    /// For the peers: what this node has decided.
    pub(crate) fresh: Vec<Record>,
    /// How many values from before the cluster it stamps.
    stamped_old: usize,
}

impl Plan {
    fn next_revision(&mut self) -> u64 {
        self.revision = self.revision.saturating_add(1);
        self.revision
    }

    fn stage(&mut self, slot: Slot, revision: u64, register: Option<Register>) {
        let earlier = self.staged.get(&slot).and_then(Option::as_ref);
        if earlier.is_some_and(|earlier| earlier.revision == revision) {
            // A batch of one revision has each key once.
            self.changes.retain(|change| change.revision.get() != revision || change.key != slot.1);
        }
        self.changes.push(match &register {
            Some(register) => register.change(&slot.1, Revision::new(revision)),
            None => note(slot.1.clone(), revision, Meta::NONE),
        });
        self.data_revision = revision;
        self.untaken.remove(&slot.1);
        self.staged.insert(slot, register.map(|register| Held { register: register.head(), revision }));
    }

    /// The value that is staged with a revision.
    fn value(&self, slot: &Slot, revision: u64) -> Option<Bytes> {
        self.staged.get(slot)?;
        let change = self.changes.iter().rfind(|change| change.revision.get() == revision && change.key == slot.1)?;
        match &change.action {
            Action::Put { value, .. } => Some(value.clone()),
            Action::Delete { .. } => None,
        }
    }

    fn forget_contact(&mut self, peer: NodeId) {
        let revision = self.next_revision();
        self.changes.extend(contact_key(peer).map(|key| note(key, revision, Meta::NONE)));
        self.contacts.push((peer, None));
    }

    /// Stages what this node decided: for the peers too.
    fn decide(&mut self, slot: Slot, revision: u64, register: Register) {
        self.fresh.push(Record { key: slot.1.clone(), register: register.clone() });
        self.stage(slot, revision, Some(register));
    }
}

/// What a node has storage keep, or forget, without a value.
fn note(key: Key, revision: u64, meta: Meta) -> Change {
    let action = Action::Delete { reason: Reason::Deleted };
    Change { key, revision: Revision::new(revision), replaces: Revision::ZERO, action, meta }
}

/// What became of a peer's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Merged {
    Applied,
    /// What is there is above it, or it is forgotten already.
    PassedOver,
    /// It is not of this time: stamped ahead, or ended before its end.
    Refused,
}

/// A register as it is listed for a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Entry {
    pub(crate) key_hash: u64,
    pub(crate) time: Hlc,
    pub(crate) rest: u64,
}

/// A key that a node wants to be given, by its hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Want {
    pub(crate) key_hash: u64,
    /// It has nothing of it, neither a value nor a tombstone.
    pub(crate) lacks: bool,
}

/// How what a node has differs from what a peer listed.
#[derive(Debug, Default)]
pub(crate) struct Compared {
    /// To be given to the peer; and whether it has nothing of it.
    pub(crate) give: Vec<(Slot, bool)>,
    /// The peer has it newer.
    pub(crate) want: Vec<Want>,
    /// Both had it, the peer has nothing of it now: it was deleted.
    pub(crate) gone: Vec<(Key, Stamp)>,
    /// The hash to go on from.
    pub(crate) next: Option<u64>,
}

impl Replica {
    pub(crate) fn new(terms: Terms) -> Self {
        Replica {
            terms,
            identity: None,
            epoch: Epoch::default(),
            revision: 0,
            data_revision: 0,
            held: BTreeMap::new(),
            tree: Tree::default(),
            ends: BTreeSet::new(),
            purges: BTreeSet::new(),
            clock: HybridClock::default(),
            contacts: BTreeMap::new(),
            untaken: BTreeMap::new(),
            unstamped: VecDeque::new(),
            broken: None,
            #[cfg(test)]
            restamped: Vec::new(),
        }
    }

    // At the start.

    /// Takes what storage has kept.
    pub(crate) fn restore(&mut self, stored: StoredRef<'_>) {
        let (key, revision) = (stored.key().to_key(), stored.revision().get());
        self.revision = self.revision.max(revision);
        let meta = stored.meta().map(|meta| Reader::new(Bytes::copy_from_slice(meta)));
        if key.is_reserved() {
            let known = meta.is_none_or(|meta| self.restore_note(&key, meta).is_some());
            if !known {
                self.broken = Some(format!("{key:?} is not understood"));
            }
            return;
        }
        self.data_revision = self.data_revision.max(revision);
        let value = stored.record().map(|record| record.value.to_bytes());
        let register = match (meta, value) {
            (None, Some(value)) => {
                let ttl = stored.record().and_then(|record| record.expiry).map(|expiry| expiry.ttl_ms);
                self.unstamped.push_back((key, value, ttl));
                return;
            }
            (None, None) => return,
            (Some(mut meta), Some(value)) => Register::read(&mut meta, |_| Some(value)),
            (Some(mut meta), None) => Register::read(&mut meta, |_| None),
        };
        let Some(register) = register else {
            self.broken = Some(format!("the stamp of {key:?} is not understood"));
            return;
        };
        self.clock.see(register.stamp.time);
        self.set((key_hash(&key), key), Some(Held { register: register.head(), revision }));
    }

    fn restore_note(&mut self, key: &Key, mut meta: Reader) -> Option<()> {
        let name = key.as_str().trim_start_matches('.');
        if name == IDENTITY {
            self.identity = Some(Identity { id: NodeId(meta.u64()?), cluster: meta.text()? });
        } else if let Some(peer) = name.strip_prefix(CONTACT) {
            let (peer, contact) = (NodeId(u64::from_str_radix(peer, 16).ok()?), Contact::read(&mut meta)?);
            self.contacts.insert(peer, (contact, contact.at));
        }
        // Others may keep notes of their own.
        Some(())
    }

    /// Begins to run at this place, with readings of the clock above `bound`. Says why it cannot.
    pub(crate) fn begin(&mut self, place: Place, bound: Hlc, steady: Millis) -> Result<(), String> {
        if let Some(broken) = &self.broken {
            return Err(format!("storage is not that of a node of a cluster: {broken}"));
        }
        (self.epoch, self.revision) = (place.epoch, place.revision);
        self.clock.see(bound);
        // What came after the last contact, no peer may have taken. When it was written is not known any more.
        let contacts = self.contacts.values().map(|(contact, _)| contact);
        let contacts = contacts.filter(|contact| contact.own.epoch == self.epoch);
        let taken = contacts.clone().map(|contact| contact.own.revision).max().unwrap_or(0);
        let taken_at = contacts.map(|contact| contact.at).max().unwrap_or(0);
        // A forgotten tombstone leaves no revision behind.
        self.data_revision = self.data_revision.max(taken).min(self.revision);
        let own = self.identity.as_ref().map(|identity| identity.id);
        let is_untaken = |Held { register, revision }: &Held| {
            let stamped = register.stamp.time.millis();
            // A value that has ended may have been taken before its end.
            let is_ended = matches!(register.content, Content::Ended { .. });
            let is_new = !is_ended || stamped > taken_at || stamped < SET_FROM;
            *revision > taken && Some(register.stamp.node) == own && is_new
        };
        let untaken = self.held.iter().filter(|(_, held)| is_untaken(held)).map(|((_, key), held)| {
            (key.clone(), Untaken { written: steady, above: Hlc::default(), first: held.revision })
        });
        for (key, untaken) in untaken.collect::<Vec<_>>() {
            self.untaken.entry(key).or_insert(untaken);
        }
        Ok(())
    }

    pub(crate) fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }

    fn id(&self) -> NodeId {
        self.identity.as_ref().map(|identity| identity.id).unwrap_or_default()
    }

    /// How many values wait to be stamped for the first time.
    pub(crate) fn unstamped_len(&self) -> usize {
        self.unstamped.len()
    }

    // Planning.

    pub(crate) fn plan(&self) -> Plan {
        Plan { revision: self.revision, data_revision: self.data_revision, ..Plan::default() }
    }

    fn held<'a>(&'a self, plan: &'a Plan, slot: &Slot) -> Option<&'a Held> {
        match plan.staged.get(slot) {
            Some(staged) => staged.as_ref(),
            None => self.held.get(slot),
        }
    }

    fn untaken(&self, plan: &Plan, slot: &Slot) -> Option<Untaken> {
        let untaken = if plan.staged.contains_key(slot) { &plan.untaken } else { &self.untaken };
        untaken.get(&slot.1).copied()
    }

    /// What is stamped later than this is not of this time.
    fn latest(&self, now: Now) -> Millis {
        now.latest.saturating_add(self.terms.offset_max)
    }

    /// A stamp for a key: above what is there, and above all readings of the clock but those that peers show to be of one that was
    /// off. What follows those, none of the peers would take.
    fn stamp(&mut self, plan: &Plan, slot: &Slot, now: Now) -> Stamp {
        if now.is_agreed && self.clock.last().millis() > self.latest(now) {
            self.clock.reset(Hlc::at(now.wall));
        }
        let above = self.held(plan, slot).map(|held| held.register.stamp.time.next()).unwrap_or_default();
        Stamp { time: self.clock.tick(now.wall).max(above), node: self.id() }
    }

    /// Plans what this node writes.
    fn write_register(&self, plan: &mut Plan, slot: Slot, revision: u64, register: Register, now: Now) {
        let above = self.held(plan, &slot).map(|held| held.register.stamp.time).unwrap_or_default();
        let before = self.untaken(plan, &slot);
        let (above, first) = before.map_or((above, revision), |before| (before.above, before.first));
        let key = slot.1.clone();
        plan.decide(slot, revision, register);
        plan.untaken.insert(key, Untaken { written: now.steady, above, first });
    }

    /// Names the node, for as long as its data live.
    pub(crate) fn name(&mut self, plan: &mut Plan, identity: Identity) {
        let Ok(key) = Key::reserved(IDENTITY) else { return };
        let mut meta = Writer::default();
        meta.u64(identity.id.0);
        meta.bytes(identity.cluster.as_bytes());
        let revision = plan.next_revision();
        plan.changes.push(note(key, revision, Meta::new(&meta.into_bytes())));
        plan.identity = Some(identity);
    }

    /// Stamps some of what was there before the node was in a cluster.
    pub(crate) fn stamp_old(&mut self, plan: &mut Plan, now: Now, count: usize) {
        let some: Vec<_> = self.unstamped.iter().take(count).cloned().collect();
        plan.stamped_old = some.len();
        for (key, value, ttl) in some {
            let slot = (key_hash(&key), key);
            let register = Register::new(self.stamp(plan, &slot, now), Content::Put { value, ttl });
            let revision = plan.next_revision();
            self.write_register(plan, slot, revision, register, now);
        }
    }

    /// Plans operations of this node; `together`, they have one revision.
    pub(crate) fn write(
        &mut self,
        plan: &mut Plan,
        epoch: Epoch,
        ops: &[Op],
        together: bool,
        now: Now,
    ) -> Vec<Result<Outcome, EngineError>> {
        if together && self.deletes_too_many(plan, ops) {
            let message =
                format!("the patterns of a batch delete at most {BATCH_DELETES_MAX} keys; nothing was changed");
            let refused = EngineError::Refused { status: 413, message };
            return ops.iter().map(|_| Err(refused.clone())).collect();
        }
        let mut shared = None;
        let mut revision = |plan: &mut Plan| match together {
            true => *shared.get_or_insert_with(|| plan.next_revision()),
            false => plan.next_revision(),
        };
        ops.iter().map(|op| self.write_one(plan, epoch, op, now, &mut revision)).collect()
    }

    /// Plans one operation of this node.
    pub(crate) fn write_alone(
        &mut self,
        plan: &mut Plan,
        epoch: Epoch,
        op: &Op,
        now: Now,
    ) -> Result<Outcome, EngineError> {
        self.write_one(plan, epoch, op, now, &mut Plan::next_revision)
    }

    fn write_one(
        &mut self,
        plan: &mut Plan,
        epoch: Epoch,
        op: &Op,
        now: Now,
        next: &mut impl FnMut(&mut Plan) -> u64,
    ) -> Result<Outcome, EngineError> {
        let (condition, key) = match op {
            Op::Put { key, options, .. } => (options.if_revision, Some(key)),
            Op::Delete { pattern: Pattern::Key(key) | Pattern::Exact(key), if_revision } => (*if_revision, Some(key)),
            Op::Delete { if_revision, .. } => (*if_revision, None),
        };
        if let Some(expected) = condition {
            // That a key is absent is the same in every epoch.
            if epoch != self.epoch && expected != Revision::ZERO {
                return Err(EngineError::OtherEpoch);
            }
            let present = key.and_then(|key| self.held(plan, &(key_hash(key), key.clone())));
            let present = present.filter(|held| held.register.is_live()).map_or(0, |held| held.revision);
            if key.is_none() || present != expected.get() {
                return Ok(Outcome::Conflict { revision: Revision::new(present) });
            }
        }
        match op {
            Op::Put { key, value, options } => {
                let ttl = options.expiry.map(|expiry| expiry.ttl_ms);
                let slot = (key_hash(key), key.clone());
                let content = Content::Put { value: value.clone(), ttl };
                let register = Register::new(self.stamp(plan, &slot, now), content);
                let revision = next(plan);
                self.write_register(plan, slot, revision, register, now);
                Ok(Outcome::Put { revision: Revision::new(revision) })
            }
            Op::Delete { pattern, .. } => {
                let slots = self.live(plan, pattern);
                let revision = self.delete_each(plan, &slots, now, next);
                match slots.len() as u64 {
                    0 => Ok(Outcome::NotFound),
                    count => Ok(Outcome::Deleted { count, revision: Revision::new(revision) }),
                }
            }
        }
    }

    /// Plans to delete keys that have values; says the last revision.
    pub(crate) fn delete(&mut self, plan: &mut Plan, slots: &[Slot], now: Now) -> u64 {
        self.delete_each(plan, slots, now, &mut Plan::next_revision)
    }

    fn delete_each(
        &mut self,
        plan: &mut Plan,
        slots: &[Slot],
        now: Now,
        next: &mut impl FnMut(&mut Plan) -> u64,
    ) -> u64 {
        let mut revision = 0;
        for slot in slots {
            let stamp = self.stamp(plan, slot, now);
            let deleted = Register::new(stamp, Content::Deleted { at: stamp.time.millis() });
            revision = next(plan);
            self.write_register(plan, slot.clone(), revision, deleted, now);
        }
        revision
    }

    fn deletes_too_many(&self, plan: &Plan, ops: &[Op]) -> bool {
        let patterns = ops.iter().filter_map(|op| match op {
            Op::Delete { pattern, if_revision: None } => Some(pattern),
            _ => None,
        });
        patterns.map(|pattern| self.live(plan, pattern).len()).sum::<usize>() > BATCH_DELETES_MAX
    }

    /// The values that a pattern selects.
    pub(crate) fn all_live(&self, pattern: &Pattern) -> Vec<Slot> {
        self.live(&self.plan(), pattern)
    }

    /// The values that a pattern selects, as planned.
    fn live(&self, plan: &Plan, pattern: &Pattern) -> Vec<Slot> {
        let is_live = |slot: &Slot| self.held(plan, slot).is_some_and(|held| held.register.is_live());
        if let Pattern::Key(key) | Pattern::Exact(key) = pattern {
            let slot = (key_hash(key), key.clone());
            return if is_live(&slot) { vec![slot] } else { Vec::new() };
        }
        let selects = |slot: &&Slot| pattern.selects(&slot.1) && is_live(slot);
        let new = plan.staged.keys().filter(|slot| !self.held.contains_key(*slot));
        let mut slots: Vec<Slot> = self.held.keys().chain(new).filter(selects).cloned().collect();
        slots.sort_by(|a, b| a.1.cmp(&b.1));
        slots
    }

    /// Plans to take a peer's record, if it is above what is there.
    pub(crate) fn merge(&mut self, plan: &mut Plan, record: &Record, now: Now) -> Merged {
        let Record { key, register } = record;
        let slot = (key_hash(key), key.clone());
        let latest = self.latest(now);
        // Where what is ahead was taken, as clocks were ahead together, what follows it is taken too; it is not later than it.
        let before = self.held(plan, &slot).map_or(0, |held| held.register.stamp.time.millis().saturating_add(1));
        let is_early = match &register.content {
            Content::Put { .. } => false,
            Content::Ended { .. } => register.end().is_some_and(|end| end > latest),
            Content::Deleted { at } => *at > latest.max(before),
        };
        if is_early || register.stamp.time.millis() > latest.max(before) {
            return Merged::Refused;
        }
        if register.stamp.time.millis() <= latest {
            self.clock.see(register.stamp.time);
        }
        let ended = register.ended().filter(|register| register.end().is_some_and(|end| end <= now.wall));
        let register = ended.as_ref().unwrap_or(register);
        let held = self.held(plan, &slot).map(|held| &held.register);
        if held.is_some_and(|held| !register.is_above(held)) {
            return Merged::PassedOver;
        }
        let is_past = register.gone_at().is_some_and(|at| at.saturating_add(self.terms.kept()) <= now.wall);
        if is_past && !held.is_some_and(Head::is_live) {
            return Merged::PassedOver;
        }
        let revision = plan.next_revision();
        plan.stage(slot, revision, Some(register.clone()));
        Merged::Applied
    }

    /// Plans to delete what a peer was seen to have deleted, if it is still there: see [`compare`](Self::compare). Its stamp is that
    /// of what it deletes, so that it undoes no other write. Says whether it was.
    pub(crate) fn infer_delete(&mut self, plan: &mut Plan, key: &Key, stamp: Stamp, now: Now) -> bool {
        let slot = (key_hash(key), key.clone());
        let is_there = |held: &Held| held.register.is_live() && held.register.stamp == stamp;
        if !self.held(plan, &slot).is_some_and(is_there) {
            return false;
        }
        let revision = plan.next_revision();
        plan.decide(slot, revision, Register::new(stamp, Content::Deleted { at: now.wall }));
        true
    }

    /// Plans to end values whose time has come, and to forget tombstones that are old enough, if that is allowed: this many.
    pub(crate) fn expire(&mut self, plan: &mut Plan, now: Now, may_purge: bool, count: usize) {
        let ends = self.ends.iter().take_while(|(at, _)| *at <= now.wall).take(count);
        for (_, slot) in ends {
            let held = self.held(plan, slot).map(|held| &held.register);
            let held = held.filter(|register| register.end().is_some_and(|end| end <= now.wall));
            if let Some(ended) = held.and_then(Head::ended) {
                // It is the same write.
                let untaken = self.untaken(plan, slot);
                let revision = plan.next_revision();
                plan.stage(slot.clone(), revision, Some(ended));
                plan.untaken.extend(untaken.map(|untaken| (slot.1.clone(), untaken)));
            }
        }
        let purges = self.purges.iter().take_while(|(at, _)| may_purge && *at <= now.wall).take(count);
        for (_, slot) in purges {
            let gone_at = self.held(plan, slot).and_then(|held| held.register.gone_at());
            if gone_at.is_some_and(|at| at.saturating_add(self.terms.kept()) <= now.wall) {
                let revision = plan.next_revision();
                plan.stage(slot.clone(), revision, None);
            }
        }
    }

    /// When [`expire`](Self::expire) has something to do.
    pub(crate) fn next_due(&self, may_purge: bool) -> Option<Millis> {
        let purge = self.purges.first().filter(|_| may_purge);
        self.ends.first().into_iter().chain(purge).map(|(at, _)| *at).min()
    }

    /// Plans to give up what has ended too early, as the clock was ahead then: peers give it again, if they have it. What this node
    /// lacks proves nothing to them from then on.
    pub(crate) fn give_up_ended_early(&mut self, plan: &mut Plan, now: Now) {
        let is_there = |slot: &&Slot| !plan.staged.contains_key(*slot);
        let early: Vec<Slot> = self.ended_early(now).filter(is_there).cloned().collect();
        if early.is_empty() {
            return;
        }
        for slot in early {
            let revision = plan.next_revision();
            plan.stage(slot, revision, None);
        }
        self.contacts.keys().for_each(|peer| plan.forget_contact(*peer));
    }

    /// What has ended although its time has not come.
    fn ended_early(&self, now: Now) -> impl Iterator<Item = &Slot> {
        let latest = self.latest(now);
        let from = now.wall.saturating_add(self.terms.offset_max).saturating_add(self.terms.kept());
        let later = self.purges.iter().rev().take_while(move |(at, _)| *at > from).map(|(_, slot)| slot);
        later.filter(move |slot| {
            let held = self.held.get(*slot);
            // One that is ahead, peers would not give again.
            held.is_some_and(|held| {
                matches!(held.register.content, Content::Ended { .. }) && held.register.stamp.time.millis() <= latest
            }) && !self.untaken.contains_key(&slot.1)
        })
    }

    /// Whether the clock, which is right now, was so far off that there is something to be [stamped anew](Self::restamp) or to be
    /// [given up](Self::give_up_ended_early).
    pub(crate) fn must_mend(&self, now: Now) -> bool {
        self.ended_early(now).next().is_some() || self.must_restamp(now)
    }

    fn must_restamp(&self, now: Now) -> bool {
        let plan = self.plan();
        self.untaken.keys().any(|key| self.misstamped(&plan, key, now).is_some())
    }

    /// What a key has that was stamped with a clock that was off, and the least stamp that is right for it.
    fn misstamped(&self, plan: &Plan, key: &Key, now: Now) -> Option<Misstamped> {
        let slot = (key_hash(key), key.clone());
        let untaken = self.untaken(plan, &slot)?;
        let held = self.held(plan, &slot)?;
        let register = &held.register;
        let stamped = register.stamp.time.millis();
        let written = now.wall.saturating_sub(now.steady.saturating_sub(untaken.written));
        let is_ahead = stamped > written.max(untaken.above.millis()).saturating_add(self.terms.offset_max);
        let was_never_set = stamped < SET_FROM && written >= SET_FROM;
        let least = Hlc::at(written).max(untaken.above.next());
        let is_off = register.stamp.node == self.id() && (is_ahead || was_never_set);
        is_off.then(|| Misstamped { held: held.clone(), slot, untaken, least })
    }

    /// Plans to stamp anew what was stamped with a clock that was off and that no peer has taken: when it was written, by the clock
    /// as it is known now. Says how many they are.
    pub(crate) fn restamp(&mut self, plan: &mut Plan, now: Now, values: Values<'_>) -> usize {
        let keys: BTreeSet<&Key> = self.untaken.keys().chain(plan.untaken.keys()).collect();
        let mut off: Vec<Misstamped> = keys.into_iter().filter_map(|key| self.misstamped(plan, key, now)).collect();
        if off.is_empty() {
            return 0;
        }
        off.sort_by_key(|off| off.held.register.stamp);
        // The clock goes on from what others may have seen.
        let slots: BTreeSet<&Slot> = off.iter().map(|off| &off.slot).collect();
        let others = self.held.iter().chain(plan.staged.iter().filter_map(|(slot, held)| Some((slot, held.as_ref()?))));
        let others = others.filter(|(slot, _)| !slots.contains(slot)).map(|(_, held)| held.register.stamp.time);
        let latest = self.latest(now);
        let last = others.filter(|time| time.millis() <= latest).max().unwrap_or_default();
        self.clock.reset(last);
        let (mut count, mut before) = (0_usize, Hlc::default());
        for Misstamped { slot, held, untaken, least } in off {
            let time = before.next().max(least);
            if time.millis() <= latest {
                before = time;
                self.clock.see(time);
            }
            let stamp = Stamp { time, node: self.id() };
            #[cfg(test)]
            self.restamped.push(((slot.1.clone(), held.register.stamp), stamp));
            let value = || plan.value(&slot, held.revision).or_else(|| values(&slot.1, held.revision));
            let Some(register) = held.register.restamped(stamp).with(value) else { continue };
            let revision = plan.next_revision();
            let key = slot.1.clone();
            plan.decide(slot, revision, register);
            plan.untaken.insert(key, untaken);
            count = count.saturating_add(1);
        }
        count
    }

    /// Plans to note that a session with a peer ended whole, in both directions.
    pub(crate) fn note_contact(&mut self, plan: &mut Plan, peer: NodeId, contact: Contact) {
        let kept = self.contacts.get(&peer).copied();
        let is_news = |(kept, kept_at): (Contact, Millis)| {
            let age = contact.at.saturating_sub(kept_at);
            (kept.own, kept.peer) != (contact.own, contact.peer) || age >= self.terms.gc_grace / CONTACT_PART
        };
        let Some(key) = contact_key(peer).filter(|_| kept.is_none_or(is_news)) else {
            // Nothing is new but the time.
            let kept_at = kept.map_or(contact.at, |(_, kept_at)| kept_at);
            plan.contacts.push((peer, Some((contact, kept_at))));
            return;
        };
        if kept.is_none() {
            self.make_room_for_contact(plan);
        }
        let mut meta = Writer::default();
        contact.write(&mut meta);
        let revision = plan.next_revision();
        plan.changes.push(note(key, revision, Meta::new(&meta.into_bytes())));
        plan.contacts.push((peer, Some((contact, contact.at))));
    }

    /// Plans to forget the oldest contacts, as far as there would be too many with one more.
    fn make_room_for_contact(&self, plan: &mut Plan) {
        if self.contacts.len() + plan.contacts.len() < CONTACTS_MAX {
            return;
        }
        let mut contacts: BTreeMap<NodeId, Millis> =
            self.contacts.iter().map(|(peer, (contact, _))| (*peer, contact.at)).collect();
        for (peer, planned) in &plan.contacts {
            match planned {
                Some((contact, _)) => contacts.insert(*peer, contact.at),
                None => contacts.remove(peer),
            };
        }
        let count = (contacts.len() + 1).saturating_sub(CONTACTS_MAX);
        let mut oldest: Vec<(Millis, NodeId)> = contacts.into_iter().map(|(peer, at)| (at, peer)).collect();
        oldest.sort_unstable();
        oldest.into_iter().take(count).for_each(|(_, peer)| plan.forget_contact(peer));
    }

    /// Does what is planned, after it was stored.
    pub(crate) fn commit(&mut self, plan: &mut Plan) {
        self.revision = plan.revision;
        self.data_revision = plan.data_revision;
        self.unstamped.drain(..plan.stamped_old.min(self.unstamped.len()));
        if let Some(identity) = plan.identity.take() {
            self.identity = Some(identity);
        }
        for (slot, held) in std::mem::take(&mut plan.staged) {
            self.untaken.remove(&slot.1);
            self.set(slot, held);
        }
        self.untaken.append(&mut plan.untaken);
        for (peer, contact) in std::mem::take(&mut plan.contacts) {
            match contact {
                Some(contact) => {
                    self.contacts.insert(peer, contact);
                    self.note_taken(contact.0.own.revision);
                }
                None => drop(self.contacts.remove(&peer)),
            }
        }
    }

    fn set(&mut self, slot: Slot, held: Option<Held>) {
        let before = match &held {
            Some(held) => self.held.insert(slot.clone(), held.clone()),
            None => self.held.remove(&slot),
        };
        let changes = [before.map(|held| (held.register, false)), held.map(|held| (held.register, true))];
        for (register, is_there) in changes.into_iter().flatten() {
            self.tree.flip(slot.0, register.digest(slot.0));
            let (times, at) = match register.gone_at() {
                Some(at) => (&mut self.purges, Some(at.saturating_add(self.terms.kept()))),
                None => (&mut self.ends, register.end()),
            };
            let Some(at) = at else { continue };
            if is_there {
                times.insert((at, slot.clone()));
            } else {
                times.remove(&(at, slot.clone()));
            }
        }
    }

    /// A peer has what came up to this revision.
    fn note_taken(&mut self, revision: u64) {
        self.untaken.retain(|_, untaken| untaken.first > revision);
    }

    // What it has.

    pub(crate) fn last_time(&self) -> Hlc {
        self.clock.last()
    }

    pub(crate) fn epoch(&self) -> Epoch {
        self.epoch
    }

    pub(crate) fn revision(&self) -> u64 {
        self.revision
    }

    /// Who wrote what there is of a key.
    pub(crate) fn writer(&self, key: &Key) -> Option<NodeId> {
        self.held.get(&(key_hash(key), key.clone())).map(|held| held.register.stamp.node)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.held.is_empty() && self.unstamped.is_empty()
    }

    /// Up to where its data are.
    pub(crate) fn place(&self) -> Place {
        Place { epoch: self.epoch, revision: self.data_revision }
    }

    pub(crate) fn has_contacts(&self) -> bool {
        !self.contacts.is_empty()
    }

    pub(crate) fn contact(&self, peer: NodeId) -> Option<Contact> {
        self.contacts.get(&peer).map(|(contact, _)| *contact)
    }

    pub(crate) fn digest(&self, prefix: Prefix) -> u64 {
        self.tree.digest(prefix)
    }

    pub(crate) fn children(&self, prefix: Prefix, half: Half) -> Children {
        self.tree.children(prefix, half)
    }

    /// Whether there are at most this many keys below a prefix.
    pub(crate) fn has_at_most(&self, prefix: Prefix, count: usize) -> bool {
        self.range(prefix.hashes()).take(count.saturating_add(1)).count() <= count
    }

    /// All that is below a prefix.
    pub(crate) fn entries(&self, prefix: Prefix) -> Vec<Entry> {
        self.range(prefix.hashes()).map(|(slot, held)| entry(slot, held)).collect()
    }

    fn range(&self, (first, last): (u64, u64)) -> impl Iterator<Item = (&Slot, &Held)> {
        // No key is below this one.
        let least = KeyRef::checked_before("!").to_key();
        self.held.range((first, least)..).take_while(move |(slot, _)| slot.0 <= last)
    }

    /// What there is of a key, unless it is too old to be given.
    pub(crate) fn given(&self, slot: &Slot, now: Now) -> Option<Held> {
        let held = self.held.get(slot)?;
        let is_past = held.register.gone_at().is_some_and(|at| at.saturating_add(self.terms.gc_grace) <= now.wall);
        (!is_past).then(|| held.clone())
    }

    /// How far what is there is known to have been the peer's too, where tombstones may have been forgotten since: the older of the
    /// contacts that both noted, if the data of both are whole since. `None` where tombstones are complete, or nothing is known.
    pub(crate) fn long_ago(
        &self,
        peer: NodeId,
        of_peer: Place,
        noted_by_peer: Option<Contact>,
        now: Now,
    ) -> Option<u64> {
        let (own, noted) = (self.contact(peer)?, noted_by_peer?.mirrored());
        let is_whole = |contact: &Contact| contact.own.leads_to(self.place()) && contact.peer.leads_to(of_peer);
        if !is_whole(&own) || !is_whole(&noted) {
            return None;
        }
        let older = if own.at <= noted.at { own } else { noted };
        (now.wall.saturating_sub(older.at) > self.terms.gc_grace)
            .then_some(older.own.revision.min(own.own.revision).min(noted.own.revision))
    }

    /// Compares what is there with all that a peer has of the same hashes, at most `count` keys. What both had up to the revision
    /// `both_had`, and the peer has nothing of any more, was deleted there.
    pub(crate) fn compare(
        &self,
        (first, last): (u64, u64),
        theirs: &[Entry],
        both_had: Option<u64>,
        count: usize,
    ) -> Compared {
        let mut compared = Compared::default();
        let mut groups: BTreeMap<u64, Group<'_>> = BTreeMap::new();
        for (number, (slot, held)) in self.range((first, last)).enumerate() {
            if number >= count && !groups.contains_key(&slot.0) {
                compared.next = Some(slot.0);
                break;
            }
            groups.entry(slot.0).or_default().0.push((slot, held));
        }
        let end = compared.next;
        let is_in =
            |entry: &&Entry| (first..=last).contains(&entry.key_hash) && end.is_none_or(|end| entry.key_hash < end);
        for entry in theirs.iter().filter(is_in) {
            groups.entry(entry.key_hash).or_default().1.push(entry);
        }
        for (key_hash, (own, theirs)) in groups {
            compared.group(key_hash, &own, &theirs, both_had);
        }
        compared
    }

    /// What to do about keys that a peer wants and this node listed.
    pub(crate) fn wanted(&self, wants: &[Want], both_had: Option<u64>) -> Compared {
        let mut compared = Compared::default();
        for want in wants {
            let own: Vec<_> = self.range((want.key_hash, want.key_hash)).collect();
            match want.lacks {
                true => compared.group(want.key_hash, &own, &[], both_had),
                false => compared.give.extend(own.into_iter().map(|(slot, _)| (slot.clone(), false))),
            }
        }
        compared
    }

    #[cfg(test)]
    pub(crate) fn registers(&self) -> BTreeMap<Key, Head> {
        self.held.iter().map(|((_, key), held)| (key.clone(), held.register.clone())).collect()
    }
}

/// What is there of one hash, and what a peer listed of it.
type Group<'a> = (Vec<(&'a Slot, &'a Held)>, Vec<&'a Entry>);

fn entry(slot: &Slot, held: &Held) -> Entry {
    Entry { key_hash: slot.0, time: held.register.stamp.time, rest: held.register.rest() }
}

impl Compared {
    /// Compares what is there of one hash: of one key, but for two whose hashes meet.
    fn group(&mut self, key_hash: u64, own: &[(&Slot, &Held)], theirs: &[&Entry], both_had: Option<u64>) {
        let mut listed: Vec<Entry> = own.iter().map(|(slot, held)| entry(slot, held)).collect();
        listed.sort_unstable();
        let mut theirs: Vec<Entry> = theirs.iter().map(|entry| **entry).collect();
        theirs.sort_unstable();
        if listed == theirs {
            return;
        }
        if theirs.is_empty() {
            for (slot, held) in own {
                let was_theirs = both_had.is_some_and(|both_had| held.revision <= both_had);
                if was_theirs && held.register.is_live() {
                    self.gone.push((slot.1.clone(), held.register.stamp));
                } else {
                    self.give.push(((*slot).clone(), true));
                }
            }
            return;
        }
        let order = match (&listed[..], &theirs[..]) {
            ([own], [their]) => own.time.cmp(&their.time),
            _ => std::cmp::Ordering::Equal,
        };
        if order.is_ge() {
            self.give.extend(own.iter().map(|(slot, _)| ((*slot).clone(), false)));
        }
        if order.is_le() {
            self.want.push(Want { key_hash, lacks: own.is_empty() });
        }
    }
}

fn contact_key(peer: NodeId) -> Option<Key> {
    Key::reserved(&format!("{CONTACT}{peer}")).ok()
}

#[cfg(test)]
#[path = "replica_tests.rs"]
mod tests;
