//! All keys of a branch with their values, as they are known now.

use std::collections::BTreeMap;

use nkv_core::Key;

use crate::entry::Entry;
use crate::error::{Error, Result};
use crate::event::{EndReason, Event};
use crate::revision::Revision;

/// What is known of the keys that a pattern covers.
///
/// # Examples
///
/// ```
/// use nkv_types::{Branch, Entry, Epoch, Event, Key, Revision};
///
/// let key = Key::new("lamp.kitchen")?;
/// let mut lamps = Branch::<Entry>::default();
/// let kitchen = Entry::new(key.clone(), "on", Revision::new(7));
/// lamps.apply(&Event::update(kitchen, 0), |entry| Ok(entry.clone()));
/// lamps.apply(&Event::synced(Revision::new(9), Epoch::default()), |entry| Ok(entry.clone()));
/// assert!(lamps.is_live && lamps.revision == Revision::new(9));
/// assert_eq!(lamps.entries[&key].value, "on");
/// # Ok::<(), nkv_types::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Branch<T = Entry> {
    /// The keys that are there, with their values.
    pub entries: BTreeMap<Key, T>,
    /// The keys that are there whose values are not what was asked for, such as the JSON of a type.
    pub unreadable: BTreeMap<Key, Unreadable>,
    /// The highest revision of a change that is in it, or of the state that it was synced with.
    pub revision: Revision,
    /// Whether this is the present state: false until the first state is whole, while the connection is lost and until what was
    /// missed is in it, and from the end on.
    pub is_live: bool,
    /// Why it follows no change any more.
    pub ended: Option<EndReason>,
}

/// A value that could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Unreadable {
    /// The key with its value as it is.
    pub entry: Entry,
    /// What is wrong with it.
    pub error: Error,
}

/// Nothing is known yet.
impl<T> Default for Branch<T> {
    fn default() -> Self {
        let (entries, unreadable) = (BTreeMap::new(), BTreeMap::new());
        Branch { entries, unreadable, revision: Revision::ZERO, is_live: false, ended: None }
    }
}

/// For code that keeps one up to date.
impl<T> Branch<T> {
    /// A key has this value now.
    pub fn set(&mut self, entry: &Entry, read: impl FnOnce(&Entry) -> Result<T>) {
        self.reach(entry.revision);
        match read(entry) {
            Ok(value) => {
                self.unreadable.remove(&entry.key);
                self.entries.insert(entry.key.clone(), value);
            }
            Err(error) => {
                self.entries.remove(&entry.key);
                self.unreadable.insert(entry.key.clone(), Unreadable { entry: entry.clone(), error });
            }
        }
    }

    /// A key is gone. False if it was not there.
    pub fn remove(&mut self, key: &Key, revision: Revision) -> bool {
        self.reach(revision);
        let was_entry = self.entries.remove(key).is_some();
        self.unreadable.remove(key).is_some() || was_entry
    }

    /// It has everything up to this revision.
    pub fn sync(&mut self, revision: Revision) {
        self.reach(revision);
        if revision == Revision::ZERO {
            self.revision = revision; // the store has had no change in this epoch
        }
        self.is_live = true;
    }

    /// It follows no change any more.
    pub fn end(&mut self, reason: EndReason) {
        self.is_live = false;
        self.ended = Some(reason);
    }

    /// Takes in what a subscription delivers.
    pub fn apply(&mut self, event: &Event, read: impl FnOnce(&Entry) -> Result<T>) {
        match event {
            Event::Update { entry, .. } => self.set(entry, read),
            Event::Gone { key, revision, .. } => drop(self.remove(key, *revision)),
            Event::Synced { revision, .. } => self.sync(*revision),
            Event::Reconnecting | Event::Connected { .. } => self.is_live = false,
            Event::Ended(reason) => self.end(reason.clone()),
        }
    }

    fn reach(&mut self, revision: Revision) {
        // Of another epoch it is neither lower nor equal, and is the newer one.
        if revision > self.revision || revision.partial_cmp(&self.revision).is_none() {
            self.revision = revision;
        }
    }
}

#[cfg(test)]
mod tests {
    use nkv_core::Epoch;

    use super::*;
    use crate::event::GoneReason;

    fn update(key: &str, value: &'static str, revision: u64) -> Event {
        Event::update(Entry::new(Key::new(key).unwrap(), value, Revision::in_epoch(Epoch::new(1), revision)), 0)
    }

    #[test]
    fn a_key_is_among_the_entries_or_the_unreadable_or_not_there() {
        let mut branch = Branch::<u32>::default();
        let mut state = |event: &Event| {
            branch.apply(event, Entry::json);
            let unreadable = branch.unreadable.values().map(|unreadable| &unreadable.entry.value[..]);
            (branch.entries.values().copied().collect::<Vec<_>>(), unreadable.map(<[u8]>::to_vec).collect::<Vec<_>>())
        };
        assert_eq!(state(&update("a", "1", 1)), (vec![1], vec![]));
        assert_eq!(state(&update("a", "one", 2)), (vec![], vec![b"one".to_vec()]));
        assert_eq!(state(&update("a", "2", 3)), (vec![2], vec![]));
        state(&update("a", "two", 4));
        let gone = Event::gone(Key::new("a").unwrap(), Revision::new(5), GoneReason::Deleted, 0);
        assert_eq!(state(&gone), (vec![], vec![]));
    }

    #[test]
    fn it_is_live_from_synced_until_the_connection_is_lost_and_its_revision_is_the_highest_of_an_epoch() {
        let mut branch = Branch::<Entry>::default();
        let synced =
            |epoch, revision| Event::synced(Revision::in_epoch(Epoch::new(epoch), revision), Epoch::new(epoch));
        let ended = Event::Ended(EndReason::Closed);
        for (event, is_live, revision) in [
            (&update("a", "1", 5), false, 5),
            (&update("b", "1", 3), false, 5),
            (&synced(1, 7), true, 7),
            (&Event::Reconnecting, false, 7),
            (&Event::connected(Epoch::new(2)), false, 7),
            (&synced(2, 1), true, 1),
            (&synced(3, 0), true, 0),
            (&ended, false, 0),
        ] {
            branch.apply(event, |entry| Ok(entry.clone()));
            assert_eq!((branch.is_live, branch.revision.get()), (is_live, revision), "{event:?}");
        }
        assert_eq!(branch.ended, Some(EndReason::Closed));
    }
}
