//! Every change as it was committed, in order, with the boundaries of what one caller gave as one: for code that copies the
//! store elsewhere.
//!
//! All readers share one buffer. What the slowest of them has not taken stays in it, up to the bytes that this reader
//! allows; past them the reader has a definite [`Gap`], and the others go on. Nothing is kept while there is no reader.
//!
//! No runtime: a reader polls with a waker, or blocks its thread.

use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::plan::Hashed;
use crate::record::Change;
use crate::revision::{Epoch, Revision};
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::wake::wake;

/// How many bytes of changes wait for a reader at most, unless it says otherwise.
pub const CHANGES_LEN_MAX: usize = 8 << 20;

/// Changes that one caller gave as one: a batch, an operation of its own, or a slice of a large delete, of an expiry or of
/// a state that was replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangeGroup {
    /// In their order, at least one. A delete that [replaces](Change::replaces) nothing left a tombstone, or dropped one.
    pub changes: Arc<[Change]>,
    /// Behind this group every change up to this revision was given: a point to resume from. `None` where others of the
    /// same revision follow: a follower that [applies](crate::NotifyKeyValue::apply) what it reads gathers those first, as
    /// all of a revision belongs into one batch.
    pub resume: Option<Revision>,
}

/// The reader missed changes, and must read the whole state anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("changes are missing: the store is at revision {revision} of epoch {epoch} now")]
pub struct Gap {
    /// The store's present revision.
    pub revision: Revision,
    /// Its present epoch.
    pub epoch: Epoch,
}

/// Reads changes: see [`NotifyKeyValue::changes`](crate::NotifyKeyValue::changes).
pub struct Changes {
    log: Arc<Log>,
    id: u64,
    since: Revision,
    epoch: Epoch,
}

impl Changes {
    /// The revision behind which it began.
    #[must_use]
    pub fn since(&self) -> Revision {
        self.since
    }

    /// The epoch of all its revisions.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Takes the next group if there is one.
    ///
    /// # Errors
    ///
    /// [`Gap`]: too much waited, or the data began another epoch. There will be no more.
    pub fn try_next(&mut self) -> Result<Option<ChangeGroup>, Gap> {
        self.log.lock().take(self.id)
    }

    /// Takes the next group, or has `cx` woken when there is one; `Ok(None)` once the store is gone and all is taken.
    ///
    /// # Errors
    ///
    /// As [`try_next`](Self::try_next).
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<ChangeGroup>, Gap>> {
        let mut state = self.log.lock();
        match state.take(self.id) {
            Ok(None) if !state.is_closed => {}
            result => return Poll::Ready(result),
        }
        let old = state.reader(self.id).and_then(|reader| reader.waker.replace(cx.waker().clone()));
        // What a waker owns is not to be dropped under the lock.
        drop(state);
        drop(old);
        Poll::Pending
    }

    /// Takes the next group; `None` once the store is gone and all is taken.
    ///
    /// # Errors
    ///
    /// As [`try_next`](Self::try_next).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub async fn next(&mut self) -> Result<Option<ChangeGroup>, Gap> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// Takes the next group, blocking the thread until there is one; `None` once the store is gone and all is taken.
    ///
    /// # Errors
    ///
    /// As [`try_next`](Self::try_next).
    pub fn next_blocking(&mut self) -> Result<Option<ChangeGroup>, Gap> {
        let mut state = self.log.lock();
        loop {
            match state.take(self.id) {
                Ok(None) if !state.is_closed => {}
                result => return result,
            }
            state.blocked += 1;
            state = self.log.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.blocked -= 1;
        }
    }

    /// Like [`next_blocking`](Self::next_blocking), for at most `patience`; `None` also when that has passed.
    ///
    /// # Errors
    ///
    /// As [`try_next`](Self::try_next).
    pub fn next_timeout(&mut self, patience: Duration) -> Result<Option<ChangeGroup>, Gap> {
        let deadline = Instant::now().checked_add(patience);
        let mut state = self.log.lock();
        loop {
            let left = deadline.map_or(patience, |deadline| deadline.saturating_duration_since(Instant::now()));
            match state.take(self.id) {
                Ok(None) if !state.is_closed && !left.is_zero() => {}
                result => return result,
            }
            state.blocked += 1;
            let waited = self.log.arrived.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.blocked -= 1;
        }
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        let mut state = self.log.lock();
        let at = state.readers.iter().position(|reader| reader.id == self.id);
        let gone = at.map(|at| state.readers.swap_remove(at));
        self.log.readers.store(state.readers.len(), Relaxed);
        let unread = state.trim();
        drop(state);
        drop((gone, unread));
    }
}

impl fmt::Debug for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Changes").field("since", &self.since).finish_non_exhaustive()
    }
}

/// The side of the store. Its readers end when it is dropped.
#[derive(Default)]
pub(crate) struct Feed {
    log: Arc<Log>,
}

#[derive(Default)]
struct Log {
    /// How many readers there are, for the asking with each batch. Written under the lock of the subscribers, where it grows.
    readers: AtomicUsize,
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Default)]
struct State {
    /// What some reader has not taken.
    held: VecDeque<Held>,
    /// The number of the first of them.
    front: u64,
    /// That which a reader of all of them resumes from; `None` in the middle of a revision.
    base: Option<Revision>,
    /// The bytes of all groups that were ever held.
    pushed: u64,
    readers: Vec<Reader>,
    next_id: u64,
    /// The store's.
    revision: Revision,
    epoch: Epoch,
    is_closed: bool,
    /// How many threads block until something comes.
    blocked: usize,
}

struct Held {
    group: ChangeGroup,
    /// Of `pushed`, where it begins and ends.
    start: u64,
    end: u64,
}

struct Reader {
    id: u64,
    /// The number of the group that it takes next; `None` once it has missed one.
    next: Option<u64>,
    /// Of `pushed`, up to where it has read.
    read: u64,
    len_max: u64,
    waker: Option<Waker>,
}

impl Feed {
    /// Whether there is a reader.
    pub(crate) fn is_read(&self) -> bool {
        self.log.readers.load(Relaxed) > 0
    }

    /// See [`Shared::follow`](crate::shared::Shared::follow).
    pub(crate) fn follow(
        &self,
        since: Option<(Epoch, Revision)>,
        present: (Epoch, Revision),
        len_max: usize,
    ) -> Result<Changes, Gap> {
        let mut state = self.log.lock();
        (state.epoch, state.revision) = present;
        if state.readers.is_empty() {
            state.base = Some(state.revision);
        }
        let since = since.unwrap_or(present);
        let (end, pushed) = (state.front + state.held.len() as u64, state.pushed);
        let found = if since == present { Some((end, pushed)) } else { state.find(since) };
        let len_max = len_max as u64;
        let Some((next, read)) = found.filter(|(_, read)| pushed - read <= len_max) else { return Err(state.gap()) };
        let id = state.next_id;
        state.next_id += 1;
        state.readers.push(Reader { id, next: Some(next), read, len_max, waker: None });
        self.log.readers.store(state.readers.len(), Relaxed);
        Ok(Changes { log: Arc::clone(&self.log), id, since: since.1, epoch: since.0 })
    }

    /// Has the readers take changes that have just become visible; every change up to `complete` is by now.
    pub(crate) fn push(&self, changes: &[Change], hashes: &[Hashed], complete: Revision) {
        let mut groups = Vec::new();
        let mut group = Vec::new();
        for (at, (change, hashed)) in changes.iter().zip(hashes).enumerate() {
            // What an owner of the store keeps for itself is its own.
            if !change.key.is_reserved() {
                group.push(change.clone());
            }
            let next = changes.get(at + 1);
            if (hashed.ends_group || next.is_none()) && !group.is_empty() {
                let is_end = next.is_some_and(|next| next.revision != change.revision);
                let changes: Arc<[Change]> = std::mem::take(&mut group).into();
                groups.push(ChangeGroup { changes, resume: is_end.then_some(change.revision) });
            }
        }
        if let (Some(last), Some(change)) = (groups.last_mut(), changes.last()) {
            last.resume = (complete >= change.revision).then_some(complete);
        }
        let mut state = self.log.lock();
        state.revision = complete;
        let (first, before) = (state.front + state.held.len() as u64, state.pushed);
        for group in groups {
            let start = state.pushed;
            state.pushed += group.changes.iter().map(change_len).sum::<u64>();
            let end = state.pushed;
            state.held.push_back(Held { group, start, end });
        }
        let pushed = state.pushed;
        // One that had taken all is not behind, however much this is.
        let is_behind = |reader: &&mut Reader| {
            pushed - reader.read > reader.len_max && !(reader.next == Some(first) && reader.read == before)
        };
        for reader in state.readers.iter_mut().filter(is_behind) {
            reader.next = None;
        }
        let unread = state.trim();
        self.log.wake_all(state);
        drop(unread);
    }

    /// The data begins another epoch: no reader can go on.
    pub(crate) fn begin(&self, revision: Revision, epoch: Epoch) {
        let mut state = self.log.lock();
        (state.revision, state.epoch, state.base) = (revision, epoch, Some(revision));
        state.readers.iter_mut().for_each(|reader| reader.next = None);
        let unread = state.trim();
        self.log.wake_all(state);
        drop(unread);
    }
}

impl Feed {
    /// Has the readers end once they have taken all.
    pub(crate) fn close(&self) {
        let mut state = self.log.lock();
        state.is_closed = true;
        self.log.wake_all(state);
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.close();
    }
}

impl fmt::Debug for Feed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Feed").finish_non_exhaustive()
    }
}

impl Log {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in this module panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_all(&self, mut state: MutexGuard<'_, State>) {
        let wakers: Vec<Waker> = state.readers.iter_mut().filter_map(|reader| reader.waker.take()).collect();
        let is_waited_for = state.blocked > 0;
        drop(state);
        if is_waited_for {
            self.arrived.notify_all();
        }
        wakers.into_iter().for_each(wake);
    }
}

impl State {
    fn reader(&mut self, id: u64) -> Option<&mut Reader> {
        self.readers.iter_mut().find(|reader| reader.id == id)
    }

    fn gap(&self) -> Gap {
        Gap { revision: self.revision, epoch: self.epoch }
    }

    /// The number of the group behind this revision, and where it begins.
    fn find(&self, (epoch, since): (Epoch, Revision)) -> Option<(u64, u64)> {
        if epoch != self.epoch {
            return None;
        }
        if self.base == Some(since) {
            return Some((self.front, self.held.front().map_or(self.pushed, |held| held.start)));
        }
        let at = self.held.iter().rposition(|held| held.group.resume == Some(since))?;
        Some((self.front + at as u64 + 1, self.held.get(at)?.end))
    }

    fn take(&mut self, id: u64) -> Result<Option<ChangeGroup>, Gap> {
        let gap = self.gap();
        let front = self.front;
        let Some(reader) = self.readers.iter_mut().find(|reader| reader.id == id) else { return Err(gap) };
        let next = reader.next.ok_or(gap)?;
        let Some(held) = self.held.get((next - front) as usize) else { return Ok(None) };
        (reader.next, reader.read) = (Some(next + 1), held.end);
        let group = held.group.clone();
        // At most this one: the reader has it.
        drop(self.trim());
        Ok(Some(group))
    }

    /// Removes what no reader takes any more. To be dropped without the lock.
    fn trim(&mut self) -> Vec<Held> {
        let end = self.front + self.held.len() as u64;
        let needed = self.readers.iter().filter_map(|reader| reader.next).min().unwrap_or(end);
        let count = (needed - self.front) as usize;
        let unread: Vec<Held> = self.held.drain(..count).collect();
        self.front = needed;
        if let Some(last) = unread.last() {
            self.base = last.group.resume;
        }
        if self.held.is_empty() {
            self.held.shrink_to(KEEP_MAX);
        }
        unread
    }
}

/// The number of places that are kept: a reader that keeps up needs a little room again and again.
const KEEP_MAX: usize = 64;

/// Roughly what a change takes, with a value that the store may hold too.
fn change_len(change: &Change) -> u64 {
    let meta_len = change.meta.as_bytes().map_or(0, <[u8]>::len);
    (size_of::<Change>() + change.key.as_str().len() + change.action.value_len() + meta_len) as u64
}
