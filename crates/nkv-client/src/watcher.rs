//! The connection's side of a watch: what keeps a value, or a branch, up to date.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use nkv_core::{Key, Pattern};
use nkv_types::{Branch, EndReason, Entry, Result, Revision, Watched};
use tokio::sync::watch;

use crate::client::Handle;
use crate::queue::KEY_COST;
use crate::task::Control;

/// How many deletes by wildcard are remembered whose notifications may be on their way.
const DELETES_MAX: usize = 16;

/// Ends the subscription.
pub(crate) struct EndOnDrop {
    pub(crate) handle: Arc<Handle>,
    pub(crate) pattern: Pattern,
    pub(crate) id: u64,
}

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        // If it fails, the connection is closed, and the subscription with it.
        drop(self.handle.control(Control::Unsubscribe(self.pattern.clone(), self.id)));
    }
}

/// The side of the connection's task.
pub(crate) trait Watcher: Send {
    /// A key has this value now; nothing happens if something newer is known of it. Returns how many bytes are kept.
    fn set(&mut self, entry: &Entry) -> usize;

    /// A key is gone by this revision; nothing happens if something newer is known of it.
    fn gone(&mut self, key: &Key, revision: Revision);

    /// The snapshot that ends now does not have this key: it is gone together with all others of which this is said.
    fn missed(&mut self, key: &Key, revision: Revision);

    /// The client's own delete of all that a pattern selects, at this revision or a later one, is done. What is older than that
    /// and still to come is passed over.
    fn deleted(&mut self, pattern: &Pattern, first: Revision);

    /// The data begin anew: revisions so far say nothing of those to come.
    fn begin_anew(&mut self);

    /// What is known is what the server says, up to this revision; `None`: not any more.
    fn set_live(&mut self, synced: Option<Revision>);

    /// Nothing follows.
    fn end(&mut self, reason: EndReason);
}

/// Gives the value to a channel, as `read` reads it.
pub(crate) struct ChannelWatcher<T, F> {
    sender: watch::Sender<Watched<T>>,
    read: F,
    /// The newest change that was heard of, the end of a key too.
    newest: Revision,
}

impl<T, F: Fn(&Entry) -> Result<T>> ChannelWatcher<T, F> {
    /// The watcher, and where its values come.
    pub(crate) fn new(read: F) -> (Self, watch::Receiver<Watched<T>>) {
        let (sender, receiver) = watch::channel(Watched::default());
        (ChannelWatcher { sender, read, newest: Revision::ZERO }, receiver)
    }

    fn know(&mut self, entry: Option<&Entry>, revision: Revision) {
        // By revision 0 everything is gone, in a store that has nothing yet.
        if revision.get() > 0 && revision <= self.newest {
            return;
        }
        self.newest = revision;
        let read = entry.map(&self.read).transpose();
        let revision = entry.map_or(Revision::ZERO, |entry| entry.revision);
        self.sender.send_modify(|watched| {
            watched.revision = revision;
            match read {
                Ok(value) => (watched.value, watched.error) = (value, None),
                Err(error) => watched.error = Some(error),
            }
        });
    }
}

impl<T: Send + Sync, F: Fn(&Entry) -> Result<T> + Send> Watcher for ChannelWatcher<T, F> {
    fn set(&mut self, entry: &Entry) -> usize {
        self.know(Some(entry), entry.revision);
        0
    }

    fn gone(&mut self, _: &Key, revision: Revision) {
        self.know(None, revision);
    }

    fn missed(&mut self, _: &Key, revision: Revision) {
        self.know(None, revision);
    }

    fn deleted(&mut self, _: &Pattern, first: Revision) {
        self.know(None, first);
    }

    fn begin_anew(&mut self) {
        self.newest = Revision::ZERO;
    }

    fn set_live(&mut self, synced: Option<Revision>) {
        let is_live = synced.is_some();
        self.sender.send_if_modified(|watched| std::mem::replace(&mut watched.is_live, is_live) != is_live);
    }

    fn end(&mut self, reason: EndReason) {
        self.sender.send_modify(|watched| (watched.is_live, watched.ended) = (false, Some(reason)));
    }
}

/// Keeps a branch up to date in a channel, its values as `read` reads them.
pub(crate) struct BranchWatcher<T, F> {
    sender: watch::Sender<Branch<T>>,
    read: F,
    /// The keys that are in the branch.
    known: BTreeMap<Key, KnownKey>,
    /// What all keys and values take, in bytes.
    len: usize,
    /// Own deletes of keys whose notifications may still come, behind some of a change before them.
    deleted: HashMap<Key, Revision>,
    /// The same of wildcards.
    deletes: Vec<(Pattern, Revision)>,
    /// What the snapshot that is ending does not have.
    missed: Vec<(Key, Revision)>,
}

struct KnownKey {
    revision: Revision,
    len: usize,
}

impl<T, F: Fn(&Entry) -> Result<T>> BranchWatcher<T, F> {
    /// The watcher, and where the branch is.
    pub(crate) fn new(read: F) -> (Self, watch::Receiver<Branch<T>>) {
        let (sender, receiver) = watch::channel(Branch::default());
        let (known, deleted) = (BTreeMap::new(), HashMap::new());
        let watcher = BranchWatcher { sender, read, known, len: 0, deleted, deletes: Vec::new(), missed: Vec::new() };
        (watcher, receiver)
    }

    /// Whether a change of this revision is no news.
    fn is_old(&self, key: &Key, revision: Revision) -> bool {
        self.known.get(key).is_some_and(|known| revision <= known.revision)
            || self.deleted.get(key).is_some_and(|deleted| revision <= *deleted)
            || self.deletes.iter().any(|(pattern, deleted)| revision < *deleted && pattern.selects(key))
    }

    /// Forgets a key, unless something newer than this revision is known of it.
    fn forget(&mut self, key: &Key, revision: Revision) {
        // By revision 0 everything is gone, in a store that has nothing yet.
        let is_newer = |known: &KnownKey| known.revision > revision && revision.get() > 0;
        if self.known.get(key).is_some_and(|known| !is_newer(known))
            && let Some(known) = self.known.remove(key)
        {
            self.len = self.len.saturating_sub(known.len);
        }
    }

    /// The keys of the branch that a pattern selects.
    fn selected(&self, pattern: &Pattern) -> Vec<Key> {
        let keys: Box<dyn Iterator<Item = &Key>> = match pattern {
            Pattern::Key(key) | Pattern::Exact(key) => {
                Box::new(self.known.get_key_value(key).into_iter().map(|(key, _)| key))
            }
            Pattern::Below(branch) => {
                let from = self.known.range(branch..).map(|(key, _)| key).skip_while(move |key| *key == branch);
                Box::new(from.take_while(move |key| key.is_below(branch)))
            }
            Pattern::All => Box::new(self.known.keys()),
        };
        keys.cloned().collect()
    }
}

impl<T: Send + Sync, F: Fn(&Entry) -> Result<T> + Send> Watcher for BranchWatcher<T, F> {
    fn set(&mut self, entry: &Entry) -> usize {
        let Entry { key, value, revision, .. } = entry;
        if self.is_old(key, *revision) {
            return self.len;
        }
        self.deleted.remove(key);
        let len = key.as_str().len() + value.len() + KEY_COST;
        let before = self.known.insert(key.clone(), KnownKey { revision: *revision, len });
        self.len = self.len.saturating_sub(before.map_or(0, |known| known.len)).saturating_add(len);
        self.sender.send_modify(|branch| branch.set(entry, &self.read));
        self.len
    }

    fn gone(&mut self, key: &Key, revision: Revision) {
        if self.deleted.get(key).is_some_and(|deleted| *deleted <= revision) {
            self.deleted.remove(key);
        }
        self.forget(key, revision);
        if !self.known.contains_key(key) {
            self.sender.send_if_modified(|branch| branch.remove(key, revision));
        }
    }

    fn missed(&mut self, key: &Key, revision: Revision) {
        self.missed.push((key.clone(), revision));
    }

    fn deleted(&mut self, pattern: &Pattern, first: Revision) {
        match pattern {
            Pattern::Key(key) | Pattern::Exact(key) => {
                self.gone(key, first);
                self.deleted.insert(key.clone(), first);
            }
            Pattern::Below(_) | Pattern::All => {
                let mut keys = self.selected(pattern);
                keys.iter().for_each(|key| self.forget(key, first));
                keys.retain(|key| !self.known.contains_key(key));
                self.sender.send_if_modified(|branch| {
                    keys.iter().map(|key| branch.remove(key, first)).filter(|was_there| *was_there).count() > 0
                });
                if self.deletes.len() == DELETES_MAX {
                    self.deletes.remove(0);
                }
                self.deletes.push((pattern.clone(), first));
            }
        }
    }

    fn begin_anew(&mut self) {
        self.known.values_mut().for_each(|known| known.revision = Revision::ZERO);
        self.deleted.clear();
        self.deletes.clear();
        self.sender.send_if_modified(|branch| {
            branch.revision = Revision::ZERO;
            false
        });
    }

    fn set_live(&mut self, synced: Option<Revision>) {
        let Some(revision) = synced else {
            self.sender.send_if_modified(|branch| std::mem::replace(&mut branch.is_live, false));
            return;
        };
        self.deleted.retain(|_, deleted| *deleted > revision);
        self.deletes.retain(|(_, deleted)| *deleted > revision);
        let mut missed = std::mem::take(&mut self.missed);
        missed.iter().for_each(|(key, revision)| self.forget(key, *revision));
        missed.retain(|(key, _)| !self.known.contains_key(key));
        self.sender.send_modify(|branch| {
            for (key, revision) in &missed {
                branch.remove(key, *revision);
            }
            branch.sync(revision);
        });
    }

    fn end(&mut self, reason: EndReason) {
        self.sender.send_modify(|branch| branch.end(reason));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, revision: u64) -> Entry {
        Entry::new(Key::new(key).unwrap(), "1", Revision::new(revision))
    }

    #[test]
    fn keys_that_a_branch_missed_go_in_one_step_with_its_becoming_live() {
        let (mut watcher, branch) = BranchWatcher::new(|entry: &Entry| Ok(entry.clone()));
        let keys = ["a", "b", "c"].map(|key| Key::new(key).unwrap());
        keys.iter().for_each(|key| _ = watcher.set(&entry(key.as_str(), 1)));
        watcher.set_live(Some(Revision::new(1)));
        watcher.set_live(None);
        keys.iter().for_each(|key| watcher.missed(key, Revision::new(5)));
        watcher.set(&entry("b", 6));
        assert_eq!((branch.borrow().entries.len(), branch.borrow().is_live), (3, false));
        watcher.set_live(Some(Revision::new(5)));
        let branch = branch.borrow();
        assert_eq!((branch.entries.keys().cloned().collect::<Vec<_>>(), branch.is_live), (vec![keys[1].clone()], true));
    }

    // A server of an engine that went back: its epoch is the same, and its revisions are lower.
    #[test]
    fn where_the_data_begin_anew_lower_revisions_are_known_of_and_what_is_missing_goes() {
        let (mut watcher, branch) = BranchWatcher::new(|entry: &Entry| Ok(entry.clone()));
        let (mut one, value) = ChannelWatcher::new(|entry: &Entry| Ok(entry.revision));
        let keys = ["a", "b"].map(|key| Key::new(key).unwrap());
        for key in &keys {
            watcher.set(&entry(key.as_str(), 9));
        }
        one.set(&entry("a", 9));
        watcher.deleted(&Pattern::new("c.*").unwrap(), Revision::new(10));
        watcher.begin_anew();
        one.begin_anew();
        watcher.set(&entry("a", 3));
        watcher.set(&entry("c.d", 2));
        one.set(&entry("a", 3));
        watcher.missed(&keys[1], Revision::new(3));
        watcher.set_live(Some(Revision::new(3)));
        let known: Vec<_> =
            branch.borrow().entries.iter().map(|(key, entry)| (key.to_string(), entry.revision.get())).collect();
        assert_eq!(known, [("a".to_owned(), 3), ("c.d".to_owned(), 2)]);
        assert_eq!(branch.borrow().revision.get(), 3);
        assert_eq!(value.borrow().value, Some(Revision::new(3)));
    }

    #[test]
    fn readers_of_a_branch_are_woken_by_changes_alone() {
        let (mut watcher, mut branch) = BranchWatcher::new(|entry: &Entry| Ok(entry.clone()));
        let mut is_woken = || {
            let woken = branch.has_changed().unwrap();
            drop(branch.borrow_and_update());
            woken
        };
        watcher.set(&entry("a", 5));
        assert!(is_woken());
        watcher.set(&entry("a", 5));
        watcher.gone(&Key::new("b").unwrap(), Revision::new(6));
        watcher.deleted(&Pattern::new("b.*").unwrap(), Revision::new(7));
        assert!(!is_woken());
        watcher.deleted(&Pattern::All, Revision::new(8));
        assert!(is_woken());
        // However many deletes there are, the last ones are remembered.
        for n in 0..100 {
            watcher.deleted(&Pattern::new(&format!("k{n}.*")).unwrap(), Revision::new(10 + n));
        }
        watcher.set(&entry("k99.x", 9));
        assert_eq!((is_woken(), watcher.deletes.len()), (false, DELETES_MAX));
        watcher.set_live(Some(Revision::new(200)));
        assert_eq!(watcher.deletes.len(), 0);
    }
}
