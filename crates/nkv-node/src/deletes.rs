//! The memory of recent deletes: for subscribers that come back and say up to where they know the state.

use std::collections::VecDeque;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use nkv_core::mailbox::Backlog;
use nkv_core::{Action, CHANGES_LEN_MAX, ChangeGroup, Changes, Epoch, Key, Revision};

use crate::budget::{Held, Holder};
use crate::shared::Shared;

/// They take no more than this part of what peers and subscriptions may hold.
const BUDGET_PART: usize = 16;

/// What a delete takes besides its key.
const DELETE_LEN: usize = 64;

/// How many groups of changes are taken in one turn.
const TURN_GROUPS: usize = 256;

/// The most recent deletes of a store, of whatever key. It is filled by a task, and by each that asks.
#[derive(Debug)]
pub(crate) struct RecentDeletes {
    max: usize,
    len_max: usize,
    state: Mutex<State>,
    bytes: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct State {
    /// `None` once the store is gone.
    changes: Option<Changes>,
    /// Every delete after this revision is here.
    floor: Revision,
    epoch: Epoch,
    deletes: VecDeque<(Key, Revision)>,
}

/// What is held of them, for the budget.
#[derive(Debug)]
struct Bytes(Arc<AtomicUsize>);

/// What a reader of deletes has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// All up to this revision, and maybe more.
    UpTo(Revision),
    /// All that there are.
    NoMore,
    /// They are not known any more.
    Forgotten,
}

impl State {
    fn reaches(&self, epoch: Epoch, since: Revision) -> bool {
        self.changes.is_some() && self.epoch == epoch && self.floor <= since
    }
}

impl RecentDeletes {
    /// Remembers `max` deletes, from now on; fewer, if their keys are long.
    pub(crate) fn begin(shared: &Arc<Shared>, max: usize) -> Arc<Self> {
        let state =
            State { changes: None, floor: Revision::ZERO, epoch: shared.store.epoch(), deletes: VecDeque::new() };
        let len_max = shared.limits.queued_max / BUDGET_PART;
        let deletes = Arc::new(RecentDeletes { max, len_max, state: Mutex::new(state), bytes: Arc::default() });
        deletes.begin_anew(&mut deletes.lock(), shared);
        let share = shared.budget.share(None, Box::new(Bytes(Arc::clone(&deletes.bytes))));
        let (task, shared_later) = (Arc::clone(&deletes), Arc::downgrade(shared));
        shared.runtime.spawn(async move {
            while std::future::poll_fn(|cx| task.poll_fill(&shared_later, cx)).await {
                tokio::task::yield_now().await;
            }
            drop(share);
        });
        deletes
    }

    /// Whether every delete after this revision is known.
    pub(crate) fn reaches(&self, shared: &Shared, epoch: Epoch, since: Revision) -> bool {
        self.filled(shared).reaches(epoch, since)
    }

    /// Gives the next deletes after `at`, in order, to `take`, at most `limit`, for a reader that needs all after `since`.
    pub(crate) fn next(
        &self,
        shared: &Shared,
        (epoch, since, at): (Epoch, Revision, Revision),
        limit: usize,
        mut take: impl FnMut(&Key, Revision),
    ) -> Next {
        let state = self.filled(shared);
        if !state.reaches(epoch, since) {
            return Next::Forgotten;
        }
        let first = state.deletes.partition_point(|(_, revision)| *revision <= at);
        let mut last = None;
        for (key, revision) in state.deletes.iter().skip(first).take(limit) {
            take(key, *revision);
            last = Some(*revision);
        }
        // Of one revision all are taken, or a reader that goes on behind it would miss some.
        let rest = state.deletes.iter().skip(first.saturating_add(limit));
        for (key, revision) in rest.take_while(|(_, revision)| Some(*revision) == last) {
            take(key, *revision);
        }
        last.map_or(Next::NoMore, Next::UpTo)
    }

    /// With all that was published by now.
    fn filled(&self, shared: &Shared) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        loop {
            match state.changes.as_mut().map(Changes::try_next) {
                Some(Ok(Some(group))) => self.take(&mut state, &group),
                Some(Err(_)) => self.begin_anew(&mut state, shared),
                Some(Ok(None)) | None => return state,
            }
        }
    }

    /// Takes what has come; false once the store is gone.
    fn poll_fill(&self, shared: &Weak<Shared>, cx: &mut Context<'_>) -> Poll<bool> {
        let mut state = self.lock();
        for _ in 0..TURN_GROUPS {
            let Some(changes) = &mut state.changes else { return Poll::Ready(false) };
            match changes.poll_next(cx) {
                Poll::Ready(Ok(Some(group))) => self.take(&mut state, &group),
                Poll::Ready(Ok(None)) => state.changes = None,
                Poll::Ready(Err(_)) => match shared.upgrade() {
                    Some(shared) => self.begin_anew(&mut state, &shared),
                    None => state.changes = None,
                },
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(true)
    }

    /// What was missed, or is of another epoch, is not known.
    fn begin_anew(&self, state: &mut State, shared: &Shared) {
        let len_max = CHANGES_LEN_MAX.min(shared.limits.queued_max);
        state.deletes.clear();
        self.bytes.store(0, Relaxed);
        state.changes = shared.store.changes(None, len_max).ok();
        if let Some(changes) = &state.changes {
            (state.floor, state.epoch) = (changes.since(), changes.epoch());
        }
    }

    fn take(&self, state: &mut State, group: &ChangeGroup) {
        for change in group.changes.iter() {
            if !matches!(change.action, Action::Delete { .. }) || change.replaces == Revision::ZERO {
                continue;
            }
            self.bytes.fetch_add(len(&change.key), Relaxed);
            state.deletes.push_back((change.key.clone(), change.revision));
            while (state.deletes.len() > self.max || self.bytes.load(Relaxed) > self.len_max)
                && let Some((key, revision)) = state.deletes.pop_front()
            {
                self.bytes.fetch_sub(len(&key), Relaxed);
                state.floor = revision;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn len(key: &Key) -> usize {
    key.as_str().len().saturating_add(DELETE_LEN)
}

impl Holder for Bytes {
    fn held(&self) -> Held {
        Held { own: self.0.load(Relaxed), ..Held::default() }
    }

    fn backlog(&self) -> Backlog {
        Backlog::default()
    }

    fn busy_for(&self) -> Duration {
        Duration::ZERO
    }

    fn give_up(&self) {}

    fn wake(&self) {}

    fn can_leave(&self) -> bool {
        false
    }
}
