//! Several backends behind one: which branch is kept where.

use crate::key::Key;
use crate::persist::{Loaded, PersistError, PersistErrorKind, PersistValue};
use crate::record::{Change, RecordRef};
use crate::revision::{Epoch, Revision};

/// Keeps each branch with a backend of its own: the route whose branch has the most segments wins, and a key that no
/// route covers goes to the default.
///
/// A batch is given to the backends one after another: the default first, then the routes in the order in which they
/// were added. It is atomic within each. When one refuses after another has stored its part, the error is
/// [`PersistErrorKind::Poisoned`]; so add the backends that cannot fail, such as
/// [`NoPersist`](crate::NoPersist), last.
///
/// # Examples
///
/// ```
/// use nkv_core::{Epoch, Key, MemoryPersist, NoPersist, RoutePersist};
///
/// // `runtime` and all below it is forgotten at a restart, `runtimes` is not. What is forgotten begins a new epoch.
/// # fn random() -> u128 { 7 }
/// let persist = RoutePersist::new(MemoryPersist::default())
///     .route(Key::new("runtime")?, NoPersist::new(Epoch::new(random())));
/// # Ok::<(), nkv_core::KeyError>(())
/// ```
#[derive(Debug)]
pub struct RoutePersist {
    /// Which branch goes to the backend of the same index; the default has none and comes first.
    branches: Vec<Option<Key>>,
    backends: Vec<Box<dyn PersistValue>>,
}

impl RoutePersist {
    /// All keys go to `default`, until routes are added.
    pub fn new(default: impl PersistValue) -> Self {
        RoutePersist { branches: vec![None], backends: vec![Box::new(default)] }
    }

    /// Sends `branch` and every key below it to `backend`. A branch routed twice goes to the later backend.
    #[must_use]
    pub fn route(mut self, branch: Key, backend: impl PersistValue) -> Self {
        if let Some(at) = self.branches.iter().position(|known| known.as_ref() == Some(&branch)) {
            self.branches.remove(at);
            self.backends.remove(at);
        }
        self.branches.push(Some(branch));
        self.backends.push(Box::new(backend));
        self
    }
}

/// Index of the route that covers `key` with the most segments. The branches that cover one key are prefixes of each
/// other, so the longest text is the one with the most segments.
fn pick(branches: &[Option<Key>], key: &str) -> usize {
    let covering = branches.iter().enumerate().filter_map(|(at, branch)| match branch {
        Some(branch) if branch.as_str() == key || branch.is_above(key) => Some((branch.as_str().len(), at)),
        _ => None,
    });
    covering.max().map_or(0, |(_, at)| at)
}

impl PersistValue for RoutePersist {
    fn load(&mut self, visit: &mut dyn FnMut(RecordRef<'_>)) -> Result<Loaded, PersistError> {
        let mut all = Loaded::default();
        for (at, backend) in self.backends.iter_mut().enumerate() {
            let mut stray = None;
            let loaded = backend.load(&mut |record| {
                if pick(&self.branches, record.key) == at {
                    visit(record);
                } else {
                    stray = Some(record.key.to_owned());
                }
            })?;
            if let Some(key) = stray {
                let context = format!(
                    "key {key:?} is stored where the routes do not look for it; route its branch as before, or move it"
                );
                return Err(PersistError::new(PersistErrorKind::Damaged, context));
            }
            // Whichever part loses something, the whole has. Rotating keeps equal epochs from cancelling out.
            all.epoch = Epoch::new(all.epoch.get().rotate_left(1) ^ loaded.epoch.get());
            all.revision = Revision::max(all.revision, loaded.revision);
        }
        Ok(all)
    }

    #[expect(clippy::indexing_slicing, reason = "`pick` gives the index of a branch, and each has a backend")]
    fn persist(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        let mut parts = vec![Vec::new(); self.backends.len()];
        for change in batch {
            parts[pick(&self.branches, change.key.as_str())].push(change.clone());
        }
        let mut stored = false;
        for (backend, part) in self.backends.iter_mut().zip(&parts).filter(|(_, part)| !part.is_empty()) {
            match backend.persist(part) {
                Ok(()) => stored = true,
                Err(error) if stored => {
                    let context = "a batch was stored in part: one backend has it, another refused it";
                    return Err(PersistError::new(PersistErrorKind::Poisoned, context).with_source(error));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
