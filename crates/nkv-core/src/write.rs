//! What callers want written, and what becomes of it.

use bytes::Bytes;
use thiserror::Error;

use crate::key::{Key, Pattern};
use crate::persist::PersistError;
use crate::record::Expiry;
use crate::revision::{Epoch, Revision};

/// One operation of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Writes a value.
    Put {
        /// The key.
        key: Key,
        /// The value.
        value: Bytes,
        /// On what condition, and for how long.
        options: PutOptions,
    },
    /// Removes the keys that a pattern selects.
    Delete {
        /// Which keys.
        pattern: Pattern,
        /// Only if the key is at this revision. A pattern that is no key has no revision: the condition does not hold.
        if_revision: Option<Revision>,
    },
}

/// Condition and lifetime of a put.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PutOptions {
    /// Write only if the key is at this revision; [`Revision::ZERO`]: only if it is absent.
    pub if_revision: Option<Revision>,
    /// When the value ends by itself. A later put without expiry ends that.
    pub expiry: Option<Expiry>,
}

/// What became of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The value is stored.
    Put {
        /// Its revision.
        revision: Revision,
    },
    /// Keys are gone.
    Deleted {
        /// How many.
        count: u64,
        /// The highest revision given, one to each key; zero if none was.
        revision: Revision,
    },
    /// There was nothing to delete.
    NotFound,
    /// The condition did not hold; nothing was changed.
    Conflict {
        /// The key's present revision; zero if it is absent.
        revision: Revision,
    },
}

/// Why a single write was not done.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The condition did not hold; nothing was changed.
    #[error("the key is at revision {revision}")]
    Conflict {
        /// The key's present revision; zero if it is absent.
        revision: Revision,
    },
    /// There was nothing to delete.
    #[error("no such key")]
    NotFound,
    /// Storage failed; see [`PersistError::kind`] for what that means.
    #[error("the write was not stored")]
    Persist(#[source] PersistError),
    /// Storage failed in the middle of a large wildcard delete.
    #[error("only {deleted} keys are gone, the others were not deleted")]
    Partial {
        /// How many keys are gone.
        deleted: u64,
        /// What failed then; see [`PersistError::kind`].
        source: PersistError,
    },
}

/// What one caller wants done, in order; [`NotifyKeyValue::commit`](crate::NotifyKeyValue::commit) does it.
///
/// # Examples
///
/// ```
/// use nkv_core::{Key, NoPersist, NotifyKeyValue, Op, Outcome, PutOptions, Revision, Write, mailbox::Mailbox};
///
/// let store: NotifyKeyValue<_, Mailbox> = NotifyKeyValue::open(NoPersist::default())?;
/// let put = |key| Op::Put { key, value: "on".into(), options: PutOptions::default() };
/// let [a, b, c] = [Key::new("a")?, Key::new("b")?, Key::new("c")?];
/// let mut writes = [Write::together(vec![put(a), put(b)]), Write::apart(vec![put(c)])];
/// while !writes.iter().all(Write::is_done) {
///     store.commit(&mut writes);
/// }
/// let [_, last] = writes.map(Write::into_results);
/// assert!(matches!(last[..], [Ok(Outcome::Put { revision })] if revision == Revision::new(3)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Write {
    pub(crate) ops: Vec<Op>,
    /// They are stored together or not at all.
    pub(crate) is_together: bool,
    /// It removes what is due, and has no operations.
    pub(crate) is_expiry: bool,
    /// Of the operations that are done, or planned.
    pub(crate) results: Vec<WriteResult>,
    /// How far the operation is that is done in slices.
    pub(crate) sweep: Option<Sweep>,
    /// What of it is planned, and how it was before.
    undo: Option<(usize, Option<Sweep>)>,
}

/// What became of one operation.
pub type WriteResult = Result<Outcome, Failed>;

/// Storage did not keep an operation.
#[derive(Clone, Debug, Error)]
#[error("the write was not stored")]
pub struct Failed {
    /// Why; see [`PersistError::kind`].
    #[source]
    pub error: PersistError,
    /// How many keys a wildcard delete had deleted before.
    pub deleted: u64,
}

/// How far a wildcard delete or an expiry is.
#[derive(Clone, Debug)]
pub(crate) struct Sweep {
    /// The last key that was looked at.
    pub(crate) after: Option<Key>,
    /// What is newer stays.
    pub(crate) until: Revision,
    /// In which that revision is.
    pub(crate) epoch: Epoch,
    pub(crate) count: u64,
    /// The highest given.
    pub(crate) revision: Revision,
    /// Keys that storage refused to delete, and why it did the first time.
    pub(crate) refused: usize,
    pub(crate) refusal: Option<PersistError>,
}

impl Sweep {
    pub(crate) fn new(until: Revision, epoch: Epoch) -> Self {
        Sweep { after: None, until, epoch, count: 0, revision: Revision::ZERO, refused: 0, refusal: None }
    }

    /// What becomes of the operation when all that it selects has been looked at.
    pub(crate) fn result(&self) -> WriteResult {
        match &self.refusal {
            Some(error) => Err(Failed { error: error.clone(), deleted: self.count }),
            None => Ok(Outcome::Deleted { count: self.count, revision: self.revision }),
        }
    }
}

impl Write {
    /// Operations that are stored together or not at all, and become visible at once. They change at most 16,384 keys.
    #[must_use]
    pub fn together(ops: Vec<Op>) -> Self {
        Write { is_together: true, ..Write::apart(ops) }
    }

    /// Operations each for itself. A wildcard delete of more than 1,024 keys is done in slices, in key order: it deletes
    /// what was there when it began and was not written since.
    #[must_use]
    pub fn apart(ops: Vec<Op>) -> Self {
        Write { ops, is_together: false, is_expiry: false, results: Vec::new(), sweep: None, undo: None }
    }

    /// The removal of all values whose TTL has ended as of [`NotifyKeyValue::advance`](crate::NotifyKeyValue::advance),
    /// in slices. Its one outcome says how many they were.
    #[must_use]
    pub fn expiry() -> Self {
        Write { is_expiry: true, ..Write::apart(Vec::new()) }
    }

    /// Whether all of it is done, or failed.
    #[must_use]
    pub fn is_done(&self) -> bool {
        if self.is_expiry { !self.results.is_empty() } else { self.results.len() == self.ops.len() }
    }

    /// Bytes of the values that it still has to write.
    #[must_use]
    pub fn value_len(&self) -> usize {
        self.rest().iter().map(Op::value_len).sum()
    }

    /// Whether it still has to write a value with a TTL.
    #[must_use]
    pub fn has_ttl(&self) -> bool {
        self.rest().iter().any(|op| matches!(op, Op::Put { options, .. } if options.expiry.is_some()))
    }

    /// How many keys it changes at most; `None` where it has a wildcard, or is an expiry.
    #[must_use]
    pub fn keys_max(&self) -> Option<usize> {
        let is_wide = |op: &Op| matches!(op, Op::Delete { pattern, .. } if pattern.one_key().is_none());
        (!self.is_expiry && !self.ops.iter().any(is_wide)).then_some(self.ops.len())
    }

    /// Its operations, done or not.
    #[must_use]
    pub fn into_ops(self) -> Vec<Op> {
        self.ops
    }

    /// Its operations that are done, each with what became of it.
    pub fn outcomes(&self) -> impl Iterator<Item = (&Op, &WriteResult)> {
        self.ops.iter().zip(&self.results)
    }

    /// What became of its operations, one result each.
    #[must_use]
    pub fn into_results(self) -> Vec<WriteResult> {
        self.results
    }

    /// The operations that are not done.
    pub(crate) fn rest(&self) -> &[Op] {
        self.ops.get(self.results.len()..).unwrap_or_default()
    }

    /// Before more of it is planned.
    pub(crate) fn note(&mut self) {
        self.undo = Some((self.results.len(), self.sweep.clone()));
    }

    /// What was planned is stored.
    pub(crate) fn keep(&mut self) {
        self.undo = None;
    }

    /// Whether something is planned.
    pub(crate) fn is_planned(&self) -> bool {
        self.undo.is_some()
    }

    /// Whether a slice of a wildcard delete or an expiry is what is planned, and all that is.
    pub(crate) fn is_slice(&self) -> bool {
        let Some((at, _)) = &self.undo else { return false };
        let is_wildcard =
            |op: &Op| matches!(op, Op::Delete { pattern, if_revision: None } if pattern.one_key().is_none());
        let is_sweep = self.is_expiry || !self.is_together && self.ops.get(*at).is_some_and(is_wildcard);
        is_sweep && self.results.len() + usize::from(self.sweep.is_some()) == at + 1
    }

    /// How many keys of the slice that is planned are left out, as storage refused them.
    pub(crate) fn leave_out(&mut self, count: usize, error: &PersistError) {
        if let Some(sweep) = &mut self.sweep {
            sweep.count = sweep.count.saturating_sub(count as u64);
            sweep.refused = sweep.refused.saturating_add(count);
            sweep.refusal.get_or_insert_with(|| error.clone());
        } else if let Some(result) = self.results.last_mut() {
            let failed = match std::mem::replace(result, Ok(Outcome::NotFound)) {
                Ok(Outcome::Deleted { count: all, .. }) => Failed { error: error.clone(), deleted: all },
                Ok(_) => Failed { error: error.clone(), deleted: 0 },
                Err(failed) => failed,
            };
            *result = Err(Failed { deleted: failed.deleted.saturating_sub(count as u64), ..failed });
        }
    }

    /// What was planned is not stored. Says up to which operation that was, and whether it had anything planned.
    pub(crate) fn undo(&mut self) -> Option<usize> {
        let (count, sweep) = self.undo.take()?;
        let planned = self.results.len() + usize::from(self.sweep.is_some());
        self.results.truncate(count);
        self.sweep = sweep;
        Some(planned)
    }

    /// Gives up the next operation, or all of them if they belong together.
    pub(crate) fn fail(&mut self, error: &PersistError) {
        self.undo = None;
        let deleted = self.sweep.take().map_or(0, |sweep| sweep.count);
        let count = if self.is_together { self.rest().len() } else { 1 };
        let failed = Failed { error: error.clone(), deleted };
        self.results.extend(std::iter::repeat_n(Err(failed), count));
    }
}

impl AsMut<Write> for Write {
    fn as_mut(&mut self) -> &mut Write {
        self
    }
}

impl Op {
    fn value_len(&self) -> usize {
        match self {
            Op::Put { value, .. } => value.len(),
            Op::Delete { .. } => 0,
        }
    }
}

impl From<Outcome> for WriteError {
    /// An outcome that is not the one hoped for.
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Conflict { revision } => WriteError::Conflict { revision },
            _ => WriteError::NotFound,
        }
    }
}

impl From<Failed> for WriteError {
    fn from(Failed { error, deleted }: Failed) -> Self {
        if deleted == 0 { WriteError::Persist(error) } else { WriteError::Partial { deleted, source: error } }
    }
}
