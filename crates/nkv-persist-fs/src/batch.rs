//! A batch on its way into the log: whether it follows from what is stored, and the frame around it.

use std::collections::HashMap;

use nkv_core::{Action, Change, META_LEN_MAX, PersistError, PersistErrorKind, Revision};

use crate::format::{FrameBuf, Id};
use crate::index::Index;

/// The room that is kept for the records of a batch; what a longer one took is given back.
const KEPT: usize = 1 << 12;

/// Room for one batch after another.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) frame: FrameBuf,
    /// One for each change.
    pub(crate) steps: Vec<Step>,
    /// The revisions of what the batch replaces.
    replaced: Vec<Revision>,
}

/// How a change stands in the log.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    /// The revision by which the put is known whose place it takes. What is known by its key needs no naming.
    pub(crate) replaces: Revision,
    /// How long its record is.
    pub(crate) len: u32,
    is_keyed: bool,
}

impl Step {
    /// What the record is known by, if it leaves one that counts.
    pub(crate) fn id<'a>(&self, change: &'a Change) -> Option<Id<'a>> {
        match self.is_keyed {
            true => Some(Id::Key(change.key.as_str(), change.revision)),
            false => is_put(change).then_some(Id::Revision(change.revision)),
        }
    }
}

impl Batch {
    pub(crate) fn new() -> Self {
        Batch { frame: FrameBuf::new(), steps: Vec::new(), replaced: Vec::new() }
    }

    /// Finds out how each change is to stand in the log. Refuses changes that do not follow from what the index knows, and
    /// from the `newest` revision: the index knows most records by their revisions.
    pub(crate) fn plan(&mut self, changes: &[Change], mut newest: Revision, index: &Index) -> Result<(), PersistError> {
        self.steps.clear();
        self.steps.shrink_to(KEPT);
        self.replaced.clear();
        self.replaced.shrink_to(KEPT);
        // What the batch itself leaves that is known by its key, or takes away.
        let mut keyed: HashMap<&str, Option<Revision>> = HashMap::new();
        for change in changes {
            let (key, revision) = (change.key.as_str(), change.revision);
            if revision < newest || revision == Revision::ZERO {
                return Err(rejected("the revisions of a batch do not increase"));
            }
            if change.meta.as_bytes().is_some_and(|meta| meta.len() > META_LEN_MAX) {
                return Err(rejected("the meta of a change is too long"));
            }
            let known = keyed.get(key).copied().unwrap_or_else(|| index.keyed_revision(key));
            if known.is_some_and(|known| known >= revision) {
                return Err(rejected("the revisions of a key do not increase"));
            }
            let replaces = if known == Some(change.replaces) { Revision::ZERO } else { change.replaces };
            if replaces != Revision::ZERO {
                let in_index = || !keyed.contains_key(key) && index.contains(replaces);
                let is_there = || self.leaves(changes, replaces, key) || in_index();
                if replaces >= revision || known.is_some() || !is_there() {
                    return Err(rejected("a change replaces a value that is not there"));
                }
                self.replaced.push(replaces);
            }
            // The first change of a revision may be known by it.
            let is_keyed = if is_put(change) { revision == newest } else { !change.meta.is_none() };
            if is_keyed || known.is_some() {
                keyed.insert(key, is_keyed.then_some(revision));
            }
            self.steps.push(Step { replaces, len: 0, is_keyed });
            newest = revision;
        }
        self.replaced.sort_unstable();
        let is_once = self.replaced.is_sorted_by(|one, next| one < next);
        if is_once { Ok(()) } else { Err(rejected("two changes replace one value")) }
    }

    /// Whether a change that was planned before leaves a put of this key that is known by this revision.
    fn leaves(&self, changes: &[Change], revision: Revision, key: &str) -> bool {
        let first = changes.partition_point(|change| change.revision < revision);
        let planned = changes.get(first).zip(self.steps.get(first));
        planned
            .is_some_and(|(before, step)| before.key.as_str() == key && step.id(before) == Some(Id::Revision(revision)))
    }

    /// Makes the frame of the changes that were planned.
    pub(crate) fn encode(&mut self, changes: &[Change]) -> Result<(), PersistError> {
        if !FrameBuf::would_fit(changes) {
            return Err(rejected("the batch has more than 256 MiB"));
        }
        self.frame.clear();
        for (change, step) in changes.iter().zip(&mut self.steps) {
            step.len = self.frame.push_change(change, step.replaces, step.is_keyed);
        }
        self.frame.finish();
        Ok(())
    }
}

fn is_put(change: &Change) -> bool {
    matches!(change.action, Action::Put { .. })
}

pub(crate) fn has_puts(changes: &[Change]) -> bool {
    changes.iter().any(is_put)
}

fn rejected(why: &str) -> PersistError {
    PersistError::new(PersistErrorKind::Rejected, why)
}
