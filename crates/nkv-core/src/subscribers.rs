//! Who is told of a change: a tree of segments, walked from the root along the key.
//!
//! The walk ends where no subscription lies further down, so a put in a store without subscribers looks at one map.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use crate::key::{Key, Pattern};

/// Who subscribes: named by the client, so that one that comes back takes its own place again.
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
    pub(crate) id: SubscriberId,
    pub(crate) pattern: Pattern,
    pub(crate) notifier: N,
}

impl<N> Subscription<N> {
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
}

#[derive(Debug)]
pub(crate) struct Subscribers<N> {
    root: Node<N>,
    len: usize,
}

type Entries<N> = Vec<Arc<Subscription<N>>>;

#[derive(Debug)]
struct Node<N> {
    /// Told of this key and everything below it.
    branch: Entries<N>,
    /// Told of everything below this key.
    below: Entries<N>,
    children: HashMap<Box<str>, Node<N>>,
}

impl<N> Node<N> {
    fn new() -> Self {
        Node { branch: Vec::new(), below: Vec::new(), children: HashMap::new() }
    }

    fn is_empty(&self) -> bool {
        self.branch.is_empty() && self.below.is_empty() && self.children.is_empty()
    }

    fn has(&self, pattern: &Pattern, is_it: impl Fn(&Arc<Subscription<N>>) -> bool) -> bool {
        let entries = match pattern {
            Pattern::Key(_) => &self.branch,
            Pattern::Below(_) | Pattern::All => &self.below,
        };
        entries.iter().any(is_it)
    }

    fn entries(&mut self, pattern: &Pattern) -> &mut Entries<N> {
        match pattern {
            Pattern::Key(_) => &mut self.branch,
            Pattern::Below(_) | Pattern::All => &mut self.below,
        }
    }
}

impl<N> Subscribers<N> {
    pub(crate) fn new() -> Self {
        Subscribers { root: Node::new(), len: 0 }
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

    /// Whether there is a subscription of `pattern` that `is_it` finds.
    pub(crate) fn has(&self, pattern: &Pattern, is_it: impl Fn(&Arc<Subscription<N>>) -> bool) -> bool {
        let node = segments(pattern).try_fold(&self.root, |node, segment| node.children.get(segment));
        node.is_some_and(|node| node.has(pattern, is_it))
    }

    /// Removes the subscription of `pattern` that `is_it` finds, and the nodes that it leaves empty.
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

    /// Calls `tell` for each subscription that covers `key`.
    pub(crate) fn for_each<'a>(&'a self, key: &Key, mut tell: impl FnMut(&'a Arc<Subscription<N>>)) {
        let mut node = &self.root;
        for segment in key.segments() {
            // Whatever the segment is, `key` lies below the node that it starts from, and in the branch above that.
            node.branch.iter().chain(&node.below).for_each(&mut tell);
            match node.children.get(segment) {
                Some(child) => node = child,
                None => return,
            }
        }
        node.branch.iter().for_each(tell);
    }
}

fn segments(pattern: &Pattern) -> impl Iterator<Item = &str> {
    let branch = match pattern {
        Pattern::Key(key) | Pattern::Below(key) => Some(key),
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
        let entries = node.entries(pattern);
        let at = entries.iter().position(is_it)?;
        return Some(entries.swap_remove(at));
    };
    let child = node.children.get_mut(*segment)?;
    let removed = remove_below(child, rest, pattern, is_it);
    if child.is_empty() {
        node.children.remove(*segment);
    }
    removed
}
