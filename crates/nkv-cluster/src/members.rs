//! Who else is in the cluster, as this node sees it, and what changes about that.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::cluster::Inner;
use crate::stamp::{Millis, NodeId};

/// Members that are remembered, at most; of those that are away, the one that went first is forgotten.
const MEMBERS_MAX: usize = 1_024;

/// How it is with another node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemberState {
    /// It is connected.
    Joined,
    /// It said that it stops.
    Left,
    /// It said nothing, and has no connection any more.
    Silent,
}

impl fmt::Display for MemberState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MemberState::Joined => "joined",
            MemberState::Left => "left",
            MemberState::Silent => "silent",
        })
    }
}

/// Another node of the cluster, as this one sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Member {
    /// Its id.
    pub id: NodeId,
    /// Where it can be reached, if it said so.
    pub address: Option<SocketAddr>,
    /// How it is with it.
    pub state: MemberState,
    /// How long ago both had the same, at the end of a session; `None` if that was not yet, or if this node had to be mended since.
    pub contact: Option<Duration>,
    /// How many records the last session gave and took.
    pub differed: u64,
    /// How far its clock is ahead of this node's, in milliseconds, if that is known.
    pub clock_offset: Option<i64>,
}

impl Member {
    /// As the figures of the node show it: `NAME=WORD|…`.
    pub(crate) fn in_words(&self) -> String {
        let mut fields = format!("state={}|differed={}", self.state, self.differed);
        let mut add = |name, field: Option<String>| {
            if let Some(field) = field {
                fields.push_str(&format!("|{name}={field}"));
            }
        };
        add("address", self.address.map(|address| address.to_string()));
        add("contact_ms", self.contact.map(|contact| contact.as_millis().to_string()));
        add("clock_offset_ms", self.clock_offset.map(|offset| offset.to_string()));
        fields
    }
}

/// What changed about a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemberEvent {
    /// It is connected, for the first time or again.
    NodeJoined(NodeId),
    /// It said that it stops.
    NodeLeft(NodeId),
    /// It fell silent: for the peer timeout it had no connection.
    NodeDead(NodeId),
}

#[derive(Clone, Copy, Debug)]
struct Known {
    /// Joined also while it is not connected, for a while.
    state: MemberState,
    /// Since when it is not connected, by the steady clock.
    away_since: Option<Millis>,
    differed: u64,
}

/// The members that are known.
#[derive(Debug)]
pub(crate) struct Members {
    known: Mutex<BTreeMap<NodeId, Known>>,
    changed: watch::Sender<()>,
}

impl Default for Members {
    fn default() -> Self {
        Members { known: Mutex::default(), changed: watch::Sender::new(()) }
    }
}

impl Members {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn note_connected(&self, id: NodeId) {
        let mut known = self.lock();
        if known.len() >= MEMBERS_MAX && !known.contains_key(&id) {
            let oldest = known.iter().filter_map(|(id, known)| Some((known.away_since?, *id))).min();
            let Some((_, oldest)) = oldest else { return };
            known.remove(&oldest);
        }
        let member = known.entry(id).or_insert(Known { state: MemberState::Silent, away_since: None, differed: 0 });
        member.away_since = None;
        let was = std::mem::replace(&mut member.state, MemberState::Joined);
        drop(known);
        if was != MemberState::Joined {
            self.changed.send_replace(());
        }
    }

    /// The last connection with it has ended. It has a while to come again.
    pub(crate) fn note_lost(&self, id: NodeId, now: Millis) {
        if let Some(member) = self.lock().get_mut(&id) {
            member.away_since = Some(now);
        }
    }

    pub(crate) fn note_left(&self, id: NodeId) {
        if let Some(member) = self.lock().get_mut(&id) {
            member.state = MemberState::Left;
        }
        self.changed.send_replace(());
    }

    pub(crate) fn note_session(&self, id: NodeId, differed: u64) {
        if let Some(member) = self.lock().get_mut(&id) {
            member.differed = differed;
        }
    }

    /// Those that are away for `patience` are silent; what is away for `memory` is forgotten.
    pub(crate) fn look(&self, now: Millis, patience: Millis, memory: Millis) {
        let mut is_changed = false;
        self.lock().retain(|_, member| {
            let Some(away) = member.away_since.map(|since| now.saturating_sub(since)) else { return true };
            if member.state == MemberState::Joined && away >= patience {
                member.state = MemberState::Silent;
                is_changed = true;
            }
            away < memory.max(patience)
        });
        if is_changed {
            self.changed.send_replace(());
        }
    }

    fn states(&self) -> BTreeMap<NodeId, MemberState> {
        self.lock().iter().map(|(id, member)| (*id, member.state)).collect()
    }

    pub(crate) fn counts(&self) -> (usize, usize) {
        let known = self.lock();
        (known.len(), known.values().filter(|member| member.state == MemberState::Joined).count())
    }
}

/// All members that this node knows of.
pub(crate) fn members(inner: &Inner) -> Vec<Member> {
    let known: Vec<(NodeId, Known)> = inner.members.lock().iter().map(|(id, known)| (*id, *known)).collect();
    let addresses = inner.peers().addresses.clone();
    let clocks = inner.clock_offsets();
    let now = inner.now().wall;
    let replica = inner.replica();
    let member = |(id, known): (NodeId, Known)| Member {
        id,
        address: addresses.get(&id).copied(),
        state: known.state,
        contact: replica.contact(id).map(|contact| Duration::from_millis(now.saturating_sub(contact.at))),
        differed: known.differed,
        clock_offset: clocks.get(&id).copied(),
    };
    known.into_iter().map(member).collect()
}

/// What changes about members, from [`Cluster::events`](crate::Cluster::events).
///
/// A reader that is slow is brought to the state of each member, and may not hear of what came and went meanwhile: nothing is
/// queued for it.
#[derive(Debug)]
pub struct Events {
    inner: Arc<Inner>,
    changed: watch::Receiver<()>,
    known: BTreeMap<NodeId, MemberState>,
    next: VecDeque<MemberEvent>,
}

impl Events {
    pub(crate) fn new(inner: Arc<Inner>) -> Self {
        let mut changed = inner.members.changed.subscribe();
        changed.mark_changed();
        Events { inner, changed, known: BTreeMap::new(), next: VecDeque::new() }
    }

    /// The next event; first of all those members that are there. `None` once the cluster's last handle is gone.
    ///
    /// # Cancel safety
    ///
    /// No event is lost when the future is dropped.
    pub async fn next(&mut self) -> Option<MemberEvent> {
        while self.next.is_empty() {
            self.changed.changed().await.ok()?;
            let now = self.inner.members.states();
            for (id, state) in &now {
                let was = self.known.get(id).copied();
                self.next.extend(match (was, state) {
                    (Some(was), now) if was == *now => None,
                    (_, MemberState::Joined) => Some(MemberEvent::NodeJoined(*id)),
                    // One that was never seen here has not gone.
                    (None, _) => None,
                    (Some(_), MemberState::Left) => Some(MemberEvent::NodeLeft(*id)),
                    (Some(_), MemberState::Silent) => Some(MemberEvent::NodeDead(*id)),
                });
            }
            self.known = now;
        }
        self.next.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_comes_again_soon_was_never_away_and_what_is_remembered_has_a_limit() {
        let members = Members::default();
        let state = |id: u64| members.states().get(&NodeId(id)).copied();
        members.note_connected(NodeId(1));
        members.note_lost(NodeId(1), 10);
        members.look(14, 5, 100);
        assert_eq!(state(1), Some(MemberState::Joined));
        members.note_connected(NodeId(1));
        members.look(1_000, 5, 100);
        assert_eq!(state(1), Some(MemberState::Joined));
        members.note_lost(NodeId(1), 1_000);
        members.look(1_005, 5, 100);
        assert_eq!(state(1), Some(MemberState::Silent));
        members.look(1_100, 5, 100);
        assert_eq!(state(1), None);
        // One that said so left, however long it is away.
        members.note_connected(NodeId(2));
        members.note_left(NodeId(2));
        members.note_lost(NodeId(2), 2_000);
        members.look(2_050, 5, 100);
        assert_eq!(state(2), Some(MemberState::Left));
        for id in 3..MEMBERS_MAX as u64 + 10 {
            members.note_connected(NodeId(id));
        }
        assert_eq!((members.counts(), state(2)), ((MEMBERS_MAX, MEMBERS_MAX), None));
    }
}
