//! A batch on its way into the log: the frame around it, and whether it follows from what is stored.

use nkv_core::{Action, Change, PersistError, PersistErrorKind, Revision};

use crate::format::FrameBuf;
use crate::index::Index;

/// So much is kept for the records of a batch; the room that a longer one took is given back.
const KEPT: usize = 1 << 12;

/// Room for one batch after another.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) frame: FrameBuf,
    /// How long the record of each change is.
    pub(crate) lens: Vec<u32>,
    /// What the batch replaces.
    replaced: Vec<Revision>,
}

impl Batch {
    pub(crate) fn new() -> Self {
        Batch { frame: FrameBuf::new(), lens: Vec::new(), replaced: Vec::new() }
    }

    /// Makes the frame of these changes.
    pub(crate) fn encode(&mut self, changes: &[Change]) -> Result<(), PersistError> {
        if !FrameBuf::would_fit(changes) {
            return Err(rejected("the batch has more than 256 MiB"));
        }
        self.frame.clear();
        self.lens.clear();
        self.lens.shrink_to(KEPT);
        self.lens.extend(changes.iter().map(|change| self.frame.push_change(change)));
        self.frame.finish();
        Ok(())
    }

    /// Refuses changes that do not go on behind the `newest` revision: the index knows records by their revisions.
    pub(crate) fn check(
        &mut self,
        changes: &[Change],
        mut newest: Revision,
        index: &Index,
    ) -> Result<(), PersistError> {
        self.replaced.clear();
        self.replaced.shrink_to(KEPT);
        for change in changes {
            if change.revision <= newest {
                return Err(rejected("the revisions of a batch do not increase"));
            }
            newest = change.revision;
            if change.replaces != Revision::ZERO {
                let before = changes.binary_search_by_key(&change.replaces, |change| change.revision);
                let before = before.ok().and_then(|at| changes.get(at));
                let before = before.filter(|before| before.revision < change.revision);
                if !before.is_some_and(is_put) && !index.contains(change.replaces) {
                    return Err(rejected("a change replaces a value that is not there"));
                }
                self.replaced.push(change.replaces);
            }
        }
        self.replaced.sort_unstable();
        let is_once = self.replaced.is_sorted_by(|one, next| one < next);
        if is_once { Ok(()) } else { Err(rejected("two changes replace one value")) }
    }
}

pub(crate) fn is_put(change: &Change) -> bool {
    matches!(change.action, Action::Put { .. })
}

pub(crate) fn has_puts(changes: &[Change]) -> bool {
    changes.iter().any(is_put)
}

fn rejected(why: &str) -> PersistError {
    PersistError::new(PersistErrorKind::Rejected, why)
}
