//! Several backends behind one: which branch is kept where.

use std::iter::repeat;
use std::sync::Arc;

use crate::figures::{StorageFigures, StorageReading};
use crate::key::Key;
use crate::persist::{FailureHandler, Loaded, PersistError, PersistErrorKind, PersistValue, Prepared, StoredRef};
use crate::record::Change;
use crate::revision::{Epoch, Revision};

/// Keeps each branch with a backend of its own: the route whose branch has the most segments wins, and a key that no
/// route covers goes to the default.
///
/// A batch for one route goes to its backend as it is. One that spans routes is [prepared](PersistValue::prepare) by each of
/// their backends before any stores its part: when one refuses, as a full disk does, no part is stored, and the error is that
/// one's. Then the parts are stored one after another, each atomic in itself; first those of backends that cannot say
/// beforehand whether they have [room](Prepared), then the others, in the order in which they were added, the default
/// first.
///
/// When a backend refuses its part after another has stored one, the batch is stored in part, and the error is
/// [`PersistErrorKind::Poisoned`]. This takes two backends in one batch that cannot say whether they have room, or a device
/// that fails in between. A crash in between leaves the parts that were stored by then.
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
    /// Which branch goes to which of the backends.
    branches: Vec<(Key, usize)>,
    /// The default comes first.
    backends: Vec<Box<dyn PersistValue>>,
}

impl RoutePersist {
    /// All keys go to `default`, until routes are added.
    pub fn new(default: impl PersistValue) -> Self {
        RoutePersist { branches: Vec::new(), backends: vec![Box::new(default)] }
    }

    /// Sends `branch` and every key below it to `backend`. A branch routed twice goes to the later backend.
    #[must_use]
    pub fn route(self, branch: Key, backend: impl PersistValue) -> Self {
        self.route_all([branch], backend)
    }

    /// Sends several branches, each with every key below it, to one `backend`.
    #[must_use]
    pub fn route_all(mut self, branches: impl IntoIterator<Item = Key>, backend: impl PersistValue) -> Self {
        let at = self.backends.len();
        self.backends.push(Box::new(backend));
        branches.into_iter().for_each(|branch| self.send(branch, at));
        self.without_unused()
    }

    /// Leaves `branch`, and every key below it, to the default: within a branch that goes elsewhere.
    ///
    /// # Examples
    ///
    /// ```
    /// use nkv_core::{Key, MemoryPersist, NoPersist, RoutePersist};
    ///
    /// // All below `runtime` is forgotten at a restart, but for what is below `runtime.kept`.
    /// let persist = RoutePersist::new(MemoryPersist::default())
    ///     .route(Key::new("runtime")?, NoPersist::default())
    ///     .keep(Key::new("runtime.kept")?);
    /// # Ok::<(), nkv_core::KeyError>(())
    /// ```
    #[must_use]
    pub fn keep(mut self, branch: Key) -> Self {
        self.send(branch, 0);
        self.without_unused()
    }

    fn send(&mut self, branch: Key, to: usize) {
        match self.branches.iter_mut().find(|(known, _)| *known == branch) {
            Some((_, known)) => *known = to,
            None => self.branches.push((branch, to)),
        }
    }

    /// Lets go of backends for which no branch is left.
    fn without_unused(mut self) -> Self {
        for at in (1..self.backends.len()).rev() {
            if self.branches.iter().all(|(_, known)| *known != at) {
                self.backends.remove(at);
                self.branches.iter_mut().filter(|(_, known)| *known > at).for_each(|(_, known)| *known -= 1);
            }
        }
        self
    }

    #[expect(clippy::indexing_slicing, reason = "`pick` gives the index of a branch, and each has a backend")]
    fn split(&mut self, batch: &[Change]) -> Split<'_> {
        let picked: Vec<usize> = batch.iter().map(|change| pick(&self.branches, change.key.as_str())).collect();
        let first = picked.first().copied().unwrap_or_default();
        if picked.iter().all(|at| *at == first) {
            return Split::One(&mut *self.backends[first]);
        }
        let part = |backend| Part { backend, batch: Vec::new(), positions: Vec::new(), prepared: Prepared::Unknown };
        let mut parts: Vec<_> = self.backends.iter_mut().map(|backend| part(&mut **backend)).collect();
        for (position, (change, at)) in batch.iter().zip(picked).enumerate() {
            parts[at].batch.push(change.clone());
            parts[at].positions.push(position);
        }
        parts.retain(|part| !part.batch.is_empty());
        Split::Many(parts)
    }
}

/// Which backends a batch is for.
enum Split<'a> {
    One(&'a mut dyn PersistValue),
    Many(Vec<Part<'a>>),
}

/// The changes of a batch that are for one backend.
struct Part<'a> {
    backend: &'a mut dyn PersistValue,
    batch: Vec<Change>,
    /// Where they stand in the whole batch.
    positions: Vec<usize>,
    prepared: Prepared,
}

/// The backend of the branch that covers `key` with the most segments. The branches that cover one key are prefixes of each
/// other, so the longest text is the one with the most segments.
fn pick(branches: &[(Key, usize)], key: &str) -> usize {
    let covering = branches.iter().filter(|(branch, _)| branch.as_str() == key || branch.is_above(key));
    covering.max_by_key(|(branch, _)| branch.as_str().len()).map_or(0, |(_, at)| *at)
}

/// The figures of several backends, as one.
#[derive(Debug)]
struct Together(Vec<Arc<dyn StorageFigures>>);

impl StorageFigures for Together {
    fn read(&self) -> StorageReading {
        let mut all = StorageReading::default();
        self.0.iter().for_each(|one| all.add(one.read()));
        all
    }
}

#[deny(clippy::missing_trait_methods)]
impl PersistValue for RoutePersist {
    fn load(&mut self, visit: &mut dyn FnMut(StoredRef<'_>)) -> Result<Loaded, PersistError> {
        let mut all = Loaded::default();
        for (at, backend) in self.backends.iter_mut().enumerate() {
            let mut stray = None;
            let loaded = backend.load(&mut |stored| {
                if pick(&self.branches, &stored.key()) == at {
                    visit(stored);
                } else {
                    stray = Some(stored.key().to_string());
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

    fn persist(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        let mut parts = match self.split(batch) {
            Split::One(backend) => return backend.persist(batch).map_err(|error| refused_in(error, 0..batch.len())),
            Split::Many(parts) => parts,
        };
        prepare(&mut parts)?;
        parts.sort_by_key(|part| part.prepared == Prepared::Room);
        let mut stored = false;
        for Part { backend, batch, positions, .. } in parts {
            match backend.persist(&batch) {
                Ok(()) => stored = true,
                Err(error) if stored => {
                    let context = "a batch was stored in part: one backend has it, another refused it";
                    return Err(PersistError::new(PersistErrorKind::Poisoned, context).with_source(error));
                }
                Err(error) => return Err(refused_in(error, positions)),
            }
        }
        Ok(())
    }

    fn prepare(&mut self, batch: &[Change]) -> Result<Prepared, PersistError> {
        match self.split(batch) {
            Split::One(backend) => backend.prepare(batch).map_err(|error| refused_in(error, 0..batch.len())),
            Split::Many(mut parts) => prepare(&mut parts),
        }
    }

    /// If all its backends do.
    fn keeps_meta(&self) -> bool {
        self.backends.iter().all(|backend| backend.keeps_meta())
    }

    /// If one of its backends does.
    fn waits(&self) -> bool {
        self.backends.iter().any(|backend| backend.waits())
    }

    /// Has each backend begin an epoch of its own; together they are `epoch`. A crash in between leaves another one, which
    /// is neither that nor the one before. [`PersistErrorKind::Poisoned`] when a backend refuses after another has begun.
    fn begin_epoch(&mut self, epoch: Epoch) -> Result<(), PersistError> {
        let turns = self.backends.len().saturating_sub(1) as u32;
        let first = Epoch::new(epoch.get().rotate_right(turns % u128::BITS));
        let epochs = [first].into_iter().chain(repeat(Epoch::default()));
        for (at, (backend, epoch)) in self.backends.iter_mut().zip(epochs).enumerate() {
            match backend.begin_epoch(epoch) {
                Ok(()) => {}
                Err(error) if at > 0 => {
                    let context = "one backend has begun another epoch, another refused to";
                    return Err(PersistError::new(PersistErrorKind::Poisoned, context).with_source(error));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn on_failure(&mut self, handler: FailureHandler) {
        self.backends.iter_mut().for_each(|backend| backend.on_failure(handler.clone()));
    }

    /// Those of all its backends together.
    fn figures(&self) -> Option<Arc<dyn StorageFigures>> {
        let all: Vec<_> = self.backends.iter().filter_map(|backend| backend.figures()).collect();
        if all.is_empty() { None } else { Some(Arc::new(Together(all))) }
    }

    /// Closes every backend, also when one of them fails, and returns the first error.
    fn close(&mut self) -> Result<(), PersistError> {
        self.backends.iter_mut().map(|backend| backend.close()).fold(Ok(()), Result::and)
    }
}

/// Prepares each part; what is unknown of one is unknown of all. If some have no room, the error names all changes of theirs.
fn prepare(parts: &mut [Part<'_>]) -> Result<Prepared, PersistError> {
    let (mut all, mut refusal, mut refused) = (Prepared::Room, None, Vec::new());
    for part in parts {
        match part.backend.prepare(&part.batch).map_err(|error| refused_in(error, part.positions.iter().copied())) {
            Ok(prepared) => {
                part.prepared = prepared;
                if prepared == Prepared::Unknown {
                    all = Prepared::Unknown;
                }
            }
            Err(error) => match error.refused() {
                Some(changes) => {
                    refused.extend_from_slice(changes);
                    refusal.get_or_insert(error);
                }
                None => return Err(error),
            },
        }
    }
    refused.sort_unstable();
    refusal.map_or(Ok(all), |error| Err(error.with_refused(refused)))
}

/// That a backend has no room for its part, the changes at these positions of the whole, says nothing of other backends.
fn refused_in(error: PersistError, positions: impl IntoIterator<Item = usize>) -> PersistError {
    if !matches!(error.kind(), PersistErrorKind::NoSpace | PersistErrorKind::Rejected) {
        return error;
    }
    let positions: Vec<usize> = positions.into_iter().collect();
    let refused = match error.refused() {
        Some(changes) => changes.iter().filter_map(|at| positions.get(*at).copied()).collect(),
        None => positions,
    };
    error.with_refused(refused)
}
