//! Follows an engine: keeps what it feeds, and begins again when it does not any more.

use std::ops::ControlFlow;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use nkv_core::{Applied, Change, Epoch, Pattern, PersistError, PersistErrorKind, RecordRef, Revision};

use crate::engine::{Feed, Follower, Truth};
use crate::shared::Shared;

/// The first pause before an engine is followed again is a random part of this, the next of twice as much, and so on.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

impl Shared {
    /// Does what an engine feeds.
    fn take<T>(&self, feed: u64, work: impl FnOnce(&Self) -> Result<T, PersistError>) -> Result<T, PersistError> {
        // One at a time: what was given up and is under way ends before the next feed begins.
        let newest = self.feeds.lock().unwrap_or_else(PoisonError::into_inner);
        if *newest != feed {
            return Err(PersistError::new(PersistErrorKind::Rejected, "the engine is followed anew by now"));
        }
        // Those that are notified share a wake-up.
        let done = self.wake_ups.gathered(|| work(self));
        self.expiry_changed.notify_one();
        self.budget.check();
        self.truth().into_iter().for_each(|truth| truth.note(|status| status.seen = self.seen()));
        if let Err(error) = &done
            && error.kind() == PersistErrorKind::Poisoned
        {
            self.failure.report(Arc::new(error.clone()));
        }
        done
    }
}

impl Follower for Shared {
    fn apply(&self, feed: u64, changes: Vec<Change>) -> Result<Applied, PersistError> {
        self.take(feed, |shared| shared.store.apply(changes))
    }

    fn replace(&self, feed: u64, state: Vec<Change>, revision: Revision, epoch: Epoch) -> Result<u64, PersistError> {
        self.take(feed, |shared| shared.store.replace(state, revision, epoch))
    }

    fn pass(&self, feed: u64, revision: Revision) -> Result<(), PersistError> {
        self.take(feed, |shared| shared.store.pass(revision))
    }

    fn walk(&self, pattern: &Pattern, visit: &mut dyn FnMut(RecordRef<'_>)) {
        let _: ControlFlow<()> = self.store.walk(pattern, None, |record| {
            visit(record);
            ControlFlow::Continue(())
        });
    }

    fn reached(&self, feed: u64) {
        let newest = self.feeds.lock().unwrap_or_else(PoisonError::into_inner);
        if *newest != feed {
            return;
        }
        let reached = |truth: &Truth| {
            truth.note(|status| (status.has_state, status.away_since, status.lag) = (true, None, None));
        };
        self.truth().into_iter().for_each(reached);
    }
}

/// When it is dropped, the engine is followed no more, for whatever reason.
struct Unfollowed<'a>(&'a Truth);

impl Drop for Unfollowed<'_> {
    fn drop(&mut self) {
        self.0.note(|status| _ = status.away_since.get_or_insert_with(Instant::now));
    }
}

/// Follows the engine, again and again, until it is aborted.
pub(crate) async fn follow(shared: Arc<Shared>) {
    let Some(truth) = shared.truth() else { return };
    let mut failures = 0_u32;
    loop {
        let unfollowed = Unfollowed(truth);
        let began = Arc::clone(&shared);
        // What an earlier feed has under way may take its time.
        let feed = tokio::task::spawn_blocking(move || {
            let mut newest = began.feeds.lock().unwrap_or_else(PoisonError::into_inner);
            *newest = newest.saturating_add(1);
            *newest
        });
        let Ok(feed) = feed.await else { return };
        let seen = truth.status().has_state.then(|| shared.seen());
        let error = truth.engine.follow(seen, Feed::new(shared.clone(), feed)).await;
        failures = if truth.status().is_in_reach() { 1 } else { failures.saturating_add(1) };
        drop(unfollowed);
        shared.log.warn("engine", format_args!("the engine is not followed: {error}"));
        tokio::time::sleep(pause(failures)).await;
    }
}

/// A random part of a span that doubles with each failure.
fn pause(failures: u32) -> Duration {
    let span = PAUSE_MIN.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(PAUSE_MAX);
    let part = getrandom::u32().unwrap_or(u32::MAX / 2);
    span.mul_f64(f64::from(part) / f64::from(u32::MAX))
}
