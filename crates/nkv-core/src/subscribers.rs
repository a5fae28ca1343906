//! The subscribers to notify of a change: a tree of segments, walked from the root along the key.
//!
//! The walk ends where no subscription lies further down, so a put in a store without subscribers looks at one map.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::{Arc, PoisonError};

use crate::event::SnapshotReader;
use crate::key::{Key, Pattern};
use crate::revision::Revision;
use crate::sync::{AtomicBool, Mutex, MutexGuard};

/// The name of a subscriber, chosen by the client, so that one that comes back takes its own place again.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SubscriberId(Arc<str>);

impl SubscriberId {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for SubscriberId {
    fn from(name: &str) -> Self {
        SubscriberId(Arc::from(name))
    }
}

impl fmt::Debug for SubscriberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl fmt::Display for SubscriberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One subscription: known by its subscriber and pattern.
#[derive(Debug)]
pub struct Subscription<N> {
    id: SubscriberId,
    pattern: Pattern,
    notifier: N,
    pub(crate) progress: Arc<Progress>,
    /// Of its snapshots.
    pub(crate) reader: SnapshotReader,
}

impl<N> Subscription<N> {
    pub(crate) fn new(
        id: SubscriberId,
        pattern: Pattern,
        notifier: N,
        progress: Arc<Progress>,
        reader: SnapshotReader,
    ) -> Self {
        Subscription { id, pattern, notifier, progress, reader }
    }

    /// Whose it is.
    pub fn id(&self) -> &SubscriberId {
        &self.id
    }

    /// What it covers.
    pub fn pattern(&self) -> &Pattern {
        &self.pattern
    }

    /// How its subscriber is reached.
    pub fn notifier(&self) -> &N {
        &self.notifier
    }

    /// Whether it has ended: unsubscribed, replaced, forgotten, or its notifier has closed.
    pub fn has_ended(&self) -> bool {
        self.progress.has_ended()
    }
}

/// How far a subscription is: which changes are for its notifier. Changes are known by their sequence numbers here, since
/// several may have one revision.
///
/// Decided under the lock of the subscribers, but for a [reset](Progress::reset).
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Every change is for it: no need to look further.
    takes_all: AtomicBool,
    ended: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    phase: Phase,
    /// How many snapshots are to be read behind the one that is waited for, or being read.
    more: usize,
    /// The snapshot that was being read is not read to its end, as the data began another epoch.
    is_broken_off: bool,
    /// That of the snapshot that is being read.
    revision: Revision,
    /// Up to which key (all keys if `None`) the state behind which change was read before all subscribers were notified of
    /// that.
    seen: Vec<(Option<Key>, u64)>,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum Phase {
    /// A snapshot will be read that contains all.
    #[default]
    Waiting,
    /// All keys up to this one are read.
    Reading(Key),
    Live,
}

impl Progress {
    /// Has every change from now on notified: after `present`, if others have not been notified of all up to there.
    pub(crate) fn go_live(&self, notified_up_to: u64, present: u64) {
        let mut state = self.lock();
        state.phase = Phase::Live;
        state.see(None, notified_up_to, present);
        self.takes_all.store(state.seen.is_empty(), Relaxed);
    }

    /// Whether a change is for the notifier.
    pub(crate) fn wants(&self, key: &Key, sequence: u64) -> bool {
        self.takes_all.load(Relaxed) || self.looks_whether_it_wants(key, sequence)
    }

    #[cold]
    fn looks_whether_it_wants(&self, key: &Key, sequence: u64) -> bool {
        let mut state = self.lock();
        if state.more > 0 || state.phase == Phase::Waiting {
            return false;
        }
        let mut seen = state.seen.iter().filter(|(up_to, _)| up_to.as_ref().is_none_or(|up_to| key <= up_to));
        if let Some((_, seen)) = seen.next()
            && sequence <= *seen
        {
            return false;
        }
        if state.seen.last().is_some_and(|(_, seen)| sequence > *seen) {
            state.seen = Vec::new();
        }
        match &state.phase {
            Phase::Waiting => false,
            Phase::Reading(up_to) => key <= up_to,
            Phase::Live => {
                self.takes_all.store(state.seen.is_empty(), Relaxed);
                true
            }
        }
    }

    /// Behind which key the next part of the snapshot begins, and the revision of the whole; `present` is that of the
    /// keyspace. `None`, once, where the snapshot ends before its end.
    pub(crate) fn resume(&self, present: Revision) -> Option<(Option<Key>, Revision)> {
        let mut state = self.lock();
        if std::mem::take(&mut state.is_broken_off) {
            return None;
        }
        Some(match &state.phase {
            Phase::Reading(up_to) => (Some(up_to.clone()), state.revision),
            Phase::Waiting | Phase::Live => {
                (state.revision, state.seen) = (present, Vec::new());
                (None, present)
            }
        })
    }

    /// Notes that the snapshot was read up to a key, or to its end, behind the change `present`.
    pub(crate) fn has_read(&self, up_to: Option<Key>, notified_up_to: u64, present: u64) {
        let mut state = self.lock();
        if notified_up_to < present
            && let Phase::Reading(before) = &state.phase
        {
            // What was read before this part was read as of an earlier moment.
            let before = Some(before.clone());
            if state.seen.last().is_none_or(|(up_to, _)| *up_to != before) {
                state.seen.push((before, notified_up_to));
            }
        }
        state.see(up_to.clone(), notified_up_to, present);
        state.phase = match up_to {
            Some(up_to) => Phase::Reading(up_to),
            None => match state.more.checked_sub(1) {
                Some(more) => {
                    state.more = more;
                    Phase::Waiting
                }
                None => Phase::Live,
            },
        };
        let takes_all = state.phase == Phase::Live && state.seen.is_empty();
        self.takes_all.store(takes_all, Relaxed);
    }

    /// See [`SnapshotReader::reset`](crate::SnapshotReader::reset).
    pub(crate) fn reset(&self) -> bool {
        let mut state = self.lock();
        self.takes_all.store(false, Relaxed);
        match state.phase {
            Phase::Waiting => false,
            Phase::Reading(_) => {
                let is_first = state.more == 0;
                state.more = state.more.max(1);
                is_first && !self.has_ended()
            }
            Phase::Live => {
                state.phase = Phase::Waiting;
                !self.has_ended()
            }
        }
    }

    /// The data began another epoch: a snapshot that is being read ends where it is, and another is to be read, behind
    /// those that wait already.
    pub(crate) fn begin_anew(&self) {
        let mut state = self.lock();
        self.takes_all.store(false, Relaxed);
        match state.phase {
            Phase::Waiting => state.more += 1,
            Phase::Reading(_) => state.is_broken_off = true,
            Phase::Live => {}
        }
        state.phase = Phase::Waiting;
    }

    pub(crate) fn end(&self) {
        self.ended.store(true, Release);
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Acquire)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What was read behind the change `present` contains changes that others are still being notified of: they are no news
    /// here.
    fn see(&mut self, up_to: Option<Key>, notified_up_to: u64, present: u64) {
        if notified_up_to < present {
            self.seen.push((up_to, present));
        }
    }
}

#[derive(Debug)]
pub(crate) struct Subscribers<N> {
    root: Node<N>,
    len: usize,
    /// All are notified of every change up to this one.
    pub(crate) notified_up_to: u64,
}

type Entries<N> = Vec<Arc<Subscription<N>>>;

#[derive(Debug)]
struct Node<N> {
    /// Notified of this key alone.
    exact: Entries<N>,
    /// Notified of this key and everything below it.
    branch: Entries<N>,
    /// Notified of everything below this key.
    below: Entries<N>,
    children: HashMap<Box<str>, Node<N>>,
}

impl<N> Node<N> {
    fn new() -> Self {
        Node { exact: Vec::new(), branch: Vec::new(), below: Vec::new(), children: HashMap::new() }
    }

    fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.branch.is_empty() && self.below.is_empty() && self.children.is_empty()
    }

    /// Among the subscriptions that one to `pattern` takes the place of, if they have the same subscriber.
    fn find(&self, pattern: &Pattern, is_it: impl Fn(&Arc<Subscription<N>>) -> bool) -> Option<&Arc<Subscription<N>>> {
        match pattern {
            Pattern::Key(_) | Pattern::Exact(_) => self.branch.iter().chain(&self.exact).find(|known| is_it(known)),
            Pattern::Below(_) | Pattern::All => self.below.iter().find(|known| is_it(known)),
        }
    }

    /// As [`find`](Self::find).
    fn remove(
        &mut self,
        pattern: &Pattern,
        is_it: impl Fn(&Arc<Subscription<N>>) -> bool,
    ) -> Option<Arc<Subscription<N>>> {
        let remove = |entries: &mut Entries<N>| Some(entries.swap_remove(entries.iter().position(&is_it)?));
        match pattern {
            Pattern::Key(_) | Pattern::Exact(_) => remove(&mut self.branch).or_else(|| remove(&mut self.exact)),
            Pattern::Below(_) | Pattern::All => remove(&mut self.below),
        }
    }

    fn entries(&mut self, pattern: &Pattern) -> &mut Entries<N> {
        match pattern {
            Pattern::Exact(_) => &mut self.exact,
            Pattern::Key(_) => &mut self.branch,
            Pattern::Below(_) | Pattern::All => &mut self.below,
        }
    }
}

impl<N> Subscribers<N> {
    pub(crate) fn new() -> Self {
        Subscribers { root: Node::new(), len: 0, notified_up_to: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Adds a subscription, after the one it replaces was removed.
    pub(crate) fn insert(&mut self, subscription: Arc<Subscription<N>>) {
        let mut node = &mut self.root;
        for segment in segments(&subscription.pattern) {
            node = node.children.entry(segment.into()).or_insert_with(Node::new);
        }
        node.entries(&subscription.pattern).push(Arc::clone(&subscription));
        self.len += 1;
    }

    /// The subscription that one to `pattern` takes the place of, and that `is_it` finds.
    pub(crate) fn find(
        &self,
        pattern: &Pattern,
        is_it: impl Fn(&Arc<Subscription<N>>) -> bool,
    ) -> Option<&Arc<Subscription<N>>> {
        let node = segments(pattern).try_fold(&self.root, |node, segment| node.children.get(segment));
        node.and_then(|node| node.find(pattern, is_it))
    }

    /// Removes the subscription that one to `pattern` takes the place of and that `is_it` finds, and the nodes that it
    /// leaves empty.
    pub(crate) fn remove(
        &mut self,
        pattern: &Pattern,
        is_it: impl Fn(&Arc<Subscription<N>>) -> bool,
    ) -> Option<Arc<Subscription<N>>> {
        let path: Vec<&str> = segments(pattern).collect();
        let removed = remove_below(&mut self.root, &path, pattern, &is_it);
        self.len -= usize::from(removed.is_some());
        removed
    }

    /// Removes all; what this returns is to be dropped without the lock.
    pub(crate) fn take_all(&mut self) -> Vec<Arc<Subscription<N>>> {
        let all = self.all();
        (self.root, self.len) = (Node::new(), 0);
        all
    }

    /// All of them, in no particular order.
    pub(crate) fn all(&self) -> Vec<Arc<Subscription<N>>> {
        let (mut all, mut nodes) = (Vec::with_capacity(self.len), vec![&self.root]);
        while let Some(node) = nodes.pop() {
            all.extend(node.exact.iter().chain(&node.branch).chain(&node.below).cloned());
            nodes.extend(node.children.values());
        }
        all
    }

    /// Calls `visit` for each subscription that covers `key`.
    pub(crate) fn for_each<'a>(&'a self, key: &Key, mut visit: impl FnMut(&'a Arc<Subscription<N>>)) {
        let mut node = &self.root;
        for segment in key.segments() {
            // Whatever the segment is, `key` lies below the node that it starts from, and in the branch above that.
            node.branch.iter().chain(&node.below).for_each(&mut visit);
            match node.children.get(segment) {
                Some(child) => node = child,
                None => return,
            }
        }
        node.branch.iter().chain(&node.exact).for_each(visit);
    }
}

fn segments(pattern: &Pattern) -> impl Iterator<Item = &str> {
    let branch = match pattern {
        Pattern::Key(key) | Pattern::Exact(key) | Pattern::Below(key) => Some(key),
        Pattern::All => None,
    };
    branch.into_iter().flat_map(Key::segments)
}

/// As deep as a key has segments: at most half of `KEY_LEN_MAX`.
fn remove_below<N>(
    node: &mut Node<N>,
    path: &[&str],
    pattern: &Pattern,
    is_it: &impl Fn(&Arc<Subscription<N>>) -> bool,
) -> Option<Arc<Subscription<N>>> {
    let Some((segment, rest)) = path.split_first() else {
        return node.remove(pattern, is_it);
    };
    let child = node.children.get_mut(*segment)?;
    let removed = remove_below(child, rest, pattern, is_it);
    if child.is_empty() {
        node.children.remove(*segment);
    }
    removed
}
