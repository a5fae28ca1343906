//! Follows an engine: keeps what it feeds, and begins again when it does not any more.

use std::sync::Arc;
use std::time::Duration;

use nkv_core::{Applied, Change, Epoch, PersistError, Revision};
use tracing::info;

use crate::engine::{Feed, Follower, Truth};
use crate::shared::{Shared, stopped};

/// The first pause before an engine is followed again is a random part of this, the next of twice as much, and so on.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

impl Shared {
    /// Does what an engine feeds.
    fn take<T>(&self, work: impl FnOnce(&Self) -> Result<T, PersistError>) -> Result<T, PersistError> {
        // Those that are notified share a wake-up.
        let done = self.wake_ups.gathered(|| work(self));
        self.expiry_changed.notify_one();
        self.budget.check();
        let seen = self.seen();
        self.truth().into_iter().for_each(|truth| truth.note(|status| status.seen = seen));
        done
    }
}

impl Follower for Shared {
    fn apply(&self, changes: Vec<Change>) -> Result<Applied, PersistError> {
        self.take(|shared| shared.store.apply(changes))
    }

    fn replace(&self, state: Vec<Change>, revision: Revision, epoch: Epoch) -> Result<u64, PersistError> {
        self.take(|shared| shared.store.replace(state, revision, epoch))
    }

    fn reached(&self) {
        let reached = |truth: &Truth| truth.note(|status| (status.has_state, status.is_in_reach) = (true, true));
        self.truth().into_iter().for_each(reached);
    }
}

/// Follows the engine until the node stops, again and again.
pub(crate) async fn follow(shared: Arc<Shared>) {
    let Some(truth) = shared.truth() else { return };
    let mut stop = shared.stop.subscribe();
    let mut failures = 0_u32;
    let following = async {
        loop {
            let seen = truth.status().has_state.then(|| shared.seen());
            let error = truth.engine.follow(seen, Feed::new(shared.clone())).await;
            let was_in_reach = truth.status().is_in_reach;
            truth.note(|status| status.is_in_reach = false);
            failures = if was_in_reach { 1 } else { failures.saturating_add(1) };
            shared.log.warn("engine", format_args!("the engine is not followed: {error}"));
            tokio::time::sleep(pause(failures)).await;
        }
    };
    tokio::select! {
        biased;
        () = stopped(&mut stop) => info!("the engine is followed no more"),
        () = following => {}
    }
}

/// A random part of a span that doubles with each failure.
fn pause(failures: u32) -> Duration {
    let span = PAUSE_MIN.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(PAUSE_MAX);
    let part = getrandom::u32().unwrap_or(u32::MAX / 2);
    span.mul_f64(f64::from(part) / f64::from(u32::MAX))
}
