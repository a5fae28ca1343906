//! A session: two nodes find out what differs between them, and give it to each other. One begins it and leads; the other
//! answers, and keeps nothing for it but where it began.

use std::collections::VecDeque;
use std::io;
use std::sync::MutexGuard;
use std::time::Duration;

use bytes::Bytes;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep};

use crate::cluster::{Inner, Level, NamedKeys, millis};
use crate::link::Line;
use crate::register::Record;
use crate::replica::{Compared, Contact, Entry, Replica, Slot, Want};
use crate::stamp::{Millis, NodeId};
use crate::tree::{DEPTH, Half, Prefix};
use crate::wire::{ENTRIES_MAX, Message, PREFIXES_MAX, RECORDS_LEN, State, invalid, parts};

/// Below a prefix with at most `LIST_MAX` keys the keys are listed, rather than digests of parts of them asked for.
const LIST_MAX: usize = 8;

/// Keys that are compared in one go.
const PAGE: usize = 1_024;

/// Records that are looked up before what else waits for this thread has its turn: a put has several, one after the other.
const TURN: usize = 32;

/// Where something was stored since the frame before, giving rests this many times as long as the frame took to be put together, at
/// most `REST_MAX`: writes of this node go first.
const REST: u32 = 8;
const REST_MAX: Duration = Duration::from_millis(25);

/// One side of a session.
#[derive(Debug)]
pub(crate) struct Session {
    peer: NodeId,
    /// The longest frame that the peer takes.
    frame_len_max: usize,
    own: State,
    theirs: State,
    /// See [`Replica::long_ago`](crate::replica::Replica::long_ago).
    both_had: Option<u64>,
    /// All that was needed was given and taken.
    is_whole: bool,
    /// All that was given to this node was stored, but for what is stamped ahead.
    has_state: bool,
    /// Records that were given and taken.
    differed: u64,
}

/// The right to level what differs, while it lasts.
#[derive(Debug)]
pub(crate) struct Levelling<'a> {
    inner: &'a Inner,
    held: Option<(NodeId, Millis)>,
}

impl<'a> Levelling<'a> {
    /// Unless this node levels with another peer, which would give or get the same. One that takes long does not hold up others, and
    /// an empty node is given what there is at any time.
    pub(crate) fn begin(inner: &'a Inner, session: &Session) -> Option<Self> {
        if session.own.root == session.theirs.root || !session.theirs.has_joined {
            return Some(Levelling { inner, held: None });
        }
        let now = inner.steady();
        let mut peers = inner.peers();
        let is_late = |since| now.saturating_sub(since) > millis(inner.options.peer_timeout);
        if peers.levelling.is_some_and(|(_, since)| !is_late(since)) {
            return None;
        }
        peers.levelling = Some((session.peer, now));
        Some(Levelling { inner, held: peers.levelling })
    }
}

impl Drop for Levelling<'_> {
    fn drop(&mut self) {
        let mut peers = self.inner.peers();
        if self.held.is_some() && peers.levelling == self.held {
            peers.levelling = None;
        }
    }
}

impl Session {
    /// The state of this node, as a session with this peer begins or answers it.
    fn state(inner: &Inner, peer: NodeId) -> State {
        let wall = inner.wall();
        let replica = inner.replica();
        State {
            wall,
            place: replica.place(),
            root: replica.digest(Prefix::ROOT),
            contact: replica.contact(peer),
            has_joined: inner.has_joined(),
        }
    }

    fn new(inner: &Inner, peer: NodeId, frame_len_max: usize, own: State, theirs: State) -> Self {
        let both_had = inner.replica().long_ago(peer, theirs.place, theirs.contact, inner.now());
        Session { peer, frame_len_max, own, theirs, both_had, is_whole: true, has_state: true, differed: 0 }
    }

    /// What this node has; not where it gave up something since the session began: what it lacks proves no delete then.
    fn whole<'a>(&self, inner: &'a Inner) -> io::Result<MutexGuard<'a, Replica>> {
        let replica = inner.replica();
        match self.own.contact.is_some() && replica.contact(self.peer).is_none() {
            true => Err(invalid("the session ends: the clock was set")),
            false => Ok(replica),
        }
    }

    /// The answer to one who begins a session.
    pub(crate) fn answer(inner: &Inner, peer: NodeId, frame_len_max: usize, theirs: State) -> (Self, Message) {
        let own = Self::state(inner, peer);
        (Session::new(inner, peer, frame_len_max, own, theirs), Message::SyncAnswer(own))
    }

    /// Takes in records that the peer gives.
    async fn take(&mut self, inner: &Inner, records: Vec<Record>) -> io::Result<u32> {
        self.differed += records.len() as u64;
        let refused = inner.merge(records).await?;
        self.is_whole &= refused == Some(0);
        self.has_state &= refused.is_some();
        Ok(refused.unwrap_or(1))
    }

    /// Deletes what the peer was seen to have deleted, and gives it what it has not, frame by frame.
    async fn act(&mut self, inner: &Inner, line: &mut Line, compared: Compared) -> io::Result<()> {
        if !compared.gone.is_empty() && !inner.delete_gone(compared.gone).await? {
            self.is_whole = false;
        }
        let mut slots = VecDeque::from(compared.give);
        let mut revision = inner.replica().revision();
        while !slots.is_empty() {
            let began = Instant::now();
            let records = self.some(inner, &mut slots).await?;
            let took = began.elapsed();
            if records.is_empty() {
                continue;
            }
            self.differed += records.len() as u64;
            line.send(Message::Records(records).encode()).await?;
            let before = std::mem::replace(&mut revision, inner.replica().revision());
            if revision != before {
                sleep(rest(took, inner.options.peer_timeout)).await;
            }
        }
        Ok(())
    }

    /// The records of the next of these keys, a frame of them.
    async fn some(&mut self, inner: &Inner, slots: &mut VecDeque<(Slot, bool)>) -> io::Result<Vec<Record>> {
        let (now, store) = (inner.now(), inner.store()?);
        let contact_at = self.own.contact.into_iter().chain(self.theirs.contact).map(|contact| contact.at).min();
        let (mut records, mut len) = (Vec::new(), 0);
        let (mut too_long, mut brought_back) = (Vec::new(), Vec::new());
        while let Some((slot, is_lacking)) = slots.pop_front() {
            let Some(record) = inner.record(&*store, &slot, now).await? else { continue };
            if !records.is_empty() && len + record.len() > RECORDS_LEN {
                slots.push_front((slot, is_lacking));
                break;
            }
            if record.len() > self.frame_len_max.saturating_sub(64) {
                self.is_whole = false;
                too_long.push(slot.1);
                continue;
            }
            if contact_at.is_some_and(|contact_at| is_lacking && inner.may_bring_back(&record, contact_at, now)) {
                brought_back.push(slot.1);
            }
            len += record.len();
            records.push(record);
            if records.len() % TURN == 0 {
                yield_now().await;
            }
        }
        inner.note_brought_back(&brought_back);
        if !too_long.is_empty() {
            let (keys, peer) = (NamedKeys(&too_long), self.peer);
            inner.log.warn("long", format_args!("values are longer than the peer {peer} takes: {keys}"));
        }
        Ok(records)
    }

    /// Does what follows from all that a peer has below a prefix; gives what it wants of this node in turn.
    async fn compare(
        &mut self,
        inner: &Inner,
        line: &mut Line,
        prefix: Prefix,
        theirs: &[Entry],
    ) -> io::Result<Vec<Want>> {
        let ((first, last), mut wants) = (prefix.hashes(), Vec::new());
        let mut next = Some(first);
        while let Some(from) = next {
            let mut compared = self.whole(inner)?.compare((from, last), theirs, self.both_had, PAGE);
            next = compared.next;
            wants.append(&mut compared.want);
            self.act(inner, line, compared).await?;
        }
        Ok(wants)
    }

    /// Answers what the one that leads says next; `true` once the session has ended.
    pub(crate) async fn serve(&mut self, inner: &Inner, line: &mut Line, message: Message) -> io::Result<bool> {
        match message {
            Message::Digests(_, prefixes) if prefixes.len() > PREFIXES_MAX => return Err(too_many(prefixes.len())),
            Message::List(lists) if lists.len() > PREFIXES_MAX => return Err(too_many(lists.len())),
            Message::Digests(half, prefixes) => {
                let children = {
                    let replica = inner.replica();
                    prefixes.iter().map(|prefix| replica.children(*prefix, half)).collect()
                };
                line.send(Message::Children(children).encode()).await?;
            }
            Message::List(lists) => {
                let mut wants = Vec::new();
                for (prefix, entries) in lists {
                    wants.append(&mut self.compare(inner, line, prefix, &entries).await?);
                }
                line.send(Message::Wants(wants).encode()).await?;
            }
            Message::Records(records) => {
                let mut refused = self.take(inner, records).await?;
                loop {
                    match line.receive().await? {
                        Message::Records(records) => {
                            refused = refused.saturating_add(self.take(inner, records).await?);
                        }
                        Message::Given => break line.send(Message::Taken { refused }.encode()).await?,
                        Message::Push(records) => inner.merge_later(records).await?,
                        other => return Err(unexpected(&other)),
                    }
                }
            }
            Message::Given => line.send(Message::Taken { refused: 0 }.encode()).await?,
            Message::End { at, is_whole } => {
                line.send(Message::Ended { is_whole: self.is_whole }.encode()).await?;
                self.is_whole &= is_whole;
                self.has_state &= is_whole;
                self.end(inner, at, false).await?;
                return Ok(true);
            }
            other => return Err(unexpected(&other)),
        }
        Ok(false)
    }

    /// Notes the contact, if all went well. An empty node has a state also where it did not take what is stamped ahead.
    async fn end(&self, inner: &Inner, at: u64, was_led_here: bool) -> io::Result<()> {
        inner.members.note_session(self.peer, self.differed);
        if self.is_whole {
            if let Some(run) = inner.peers().connected.get_mut(&self.peer) {
                run.level = Some(Level { at: inner.steady(), was_led_here });
            }
            let contact = Contact { at, own: self.own.place, peer: self.theirs.place };
            inner.note_contact(self.peer, contact, self.theirs.has_joined).await?;
        } else if self.has_state && self.theirs.has_joined {
            inner.join();
        }
        Ok(())
    }

    /// Leads a session; says whether it ended whole.
    pub(crate) async fn lead(inner: &Inner, line: &mut Line, peer: NodeId, frame_len_max: usize) -> io::Result<bool> {
        let own = Self::state(inner, peer);
        let asked = inner.steady();
        let theirs = match line.ask(&Message::Sync(own)).await? {
            Message::SyncAnswer(theirs) => theirs,
            Message::Busy => return Ok(false),
            other => return Err(unexpected(&other)),
        };
        inner.note_clock(peer, theirs.wall, asked);
        if inner.mend().await? {
            // What was said of this node's data is not so any more.
            line.ask(&Message::End { at: 0, is_whole: false }).await?;
            return Ok(false);
        }
        let mut session = Session::new(inner, peer, frame_len_max, own, theirs);
        let Some(_levelling) = Levelling::begin(inner, &session) else {
            line.ask(&Message::End { at: 0, is_whole: false }).await?;
            return Ok(false);
        };
        if own.root != theirs.root {
            session.level(inner, line).await?;
        }
        let at = inner.now().wall;
        match line.ask(&Message::End { at, is_whole: session.is_whole }).await? {
            Message::Ended { is_whole } => {
                session.is_whole &= is_whole;
                session.has_state &= is_whole;
            }
            other => return Err(unexpected(&other)),
        }
        session.end(inner, at, true).await?;
        Ok(session.is_whole)
    }

    /// Goes down to what differs, and levels it.
    async fn level(&mut self, inner: &Inner, line: &mut Line) -> io::Result<()> {
        let mut ways = Ways::default();
        let half = if inner.random() >> 63 == 0 { Half::Low } else { Half::High };
        ways.add(inner, Prefix::ROOT, half, (self.theirs.root != 0, half.of(self.theirs.root)));
        loop {
            if let Some(prefix) = ways.lacking.pop() {
                self.compare(inner, line, prefix, &[]).await?;
                self.end_giving(line).await?;
            } else if !ways.list.is_empty() && (ways.list.len() >= PREFIXES_MAX || ways.descend.is_empty()) {
                self.list(inner, line, &mut ways.list).await?;
            } else if !ways.descend.is_empty() {
                let count = ways.descend.len().min(PREFIXES_MAX);
                let prefixes: Vec<Prefix> = ways.descend.drain(..count).collect();
                let children = match line.ask(&Message::Digests(half, prefixes.clone())).await? {
                    Message::Children(children) if children.len() == prefixes.len() => children,
                    other => return Err(unexpected(&other)),
                };
                for (prefix, children) in prefixes.into_iter().zip(children) {
                    for (number, child) in (0..).zip(children.each()) {
                        ways.add(inner, prefix.child(number), half, child);
                    }
                }
            } else {
                return Ok(());
            }
        }
    }

    /// Lists all keys below some prefixes, takes what the peer gives for it, and gives what it wants.
    async fn list(&mut self, inner: &Inner, line: &mut Line, prefixes: &mut Vec<Prefix>) -> io::Result<()> {
        let (mut lists, mut listed) = (Vec::new(), 0);
        while lists.len() < PREFIXES_MAX
            && listed < ENTRIES_MAX
            && let Some(prefix) = prefixes.pop()
        {
            // All of one moment: what is missing from it was not there.
            let entries = self.whole(inner)?.entries(prefix);
            listed += entries.len();
            lists.push((prefix, entries));
        }
        let mut answer = line.ask(&Message::List(lists)).await?;
        let wants = loop {
            match answer {
                Message::Records(records) => _ = self.take(inner, records).await?,
                // What it wants is looked up at once, and waits to be given.
                Message::Wants(wants) if wants.len() > listed => return Err(wants_too_much(wants.len(), listed)),
                Message::Wants(wants) => break wants,
                other => return Err(unexpected(&other)),
            }
            answer = line.receive().await?;
        };
        let wanted = self.whole(inner)?.wanted(&wants, self.both_had);
        self.act(inner, line, wanted).await?;
        self.end_giving(line).await
    }

    async fn end_giving(&mut self, line: &mut Line) -> io::Result<()> {
        match line.ask(&Message::Given).await? {
            Message::Taken { refused } => self.is_whole &= refused == 0,
            other => return Err(unexpected(&other)),
        }
        Ok(())
    }
}

/// Where a session has to go.
#[derive(Debug, Default)]
struct Ways {
    /// Whose children are to be asked for.
    descend: VecDeque<Prefix>,
    /// What is to be listed.
    list: Vec<Prefix>,
    /// Of which the peer has nothing.
    lacking: Vec<Prefix>,
}

impl Ways {
    fn add(&mut self, inner: &Inner, prefix: Prefix, half: Half, (is_used, theirs): (bool, u32)) {
        let replica = inner.replica();
        let own = replica.digest(prefix);
        if (own != 0, half.of(own)) == (is_used, theirs) {
            // The same.
        } else if !is_used {
            self.lacking.push(prefix);
        } else if prefix.level == DEPTH || replica.has_at_most(prefix, LIST_MAX) {
            self.list.push(prefix);
        } else {
            self.descend.push_back(prefix);
        }
    }
}

/// How long giving rests after a frame; far shorter than the peer waits for the next one.
fn rest(took: Duration, peer_timeout: Duration) -> Duration {
    took.saturating_mul(REST).min(REST_MAX).min(peer_timeout / 4)
}

fn unexpected(message: &Message) -> io::Error {
    let kind = match message {
        Message::Refused { reason, .. } => return invalid(reason.clone()),
        Message::Records(_) => "records",
        Message::Push(_) => "a push",
        _ => "this",
    };
    invalid(format!("the peer was not to say {kind} here"))
}

fn too_many(prefixes: usize) -> io::Error {
    invalid(format!("the peer asks for {prefixes} prefixes at once, and {PREFIXES_MAX} is the limit"))
}

fn wants_too_much(wants: usize, listed: usize) -> io::Error {
    invalid(format!("the peer wants {wants} keys, and {listed} were listed"))
}

/// A frame for peers.
pub(crate) fn push_frames(records: Vec<Record>) -> Vec<Bytes> {
    parts(records).into_iter().map(|part| Message::Push(part).encode()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn giving_rests_longer_than_it_works_and_far_shorter_than_a_peer_waits() {
        let ms = Duration::from_millis;
        assert_eq!(rest(ms(1), ms(5_000)), ms(8));
        assert_eq!(rest(ms(1_000), ms(5_000)), ms(25));
        assert_eq!(rest(ms(1_000), ms(40)), ms(10));
    }
}
