//! Has keys expire when their time has come: also while storage does not answer.

use std::sync::Arc;
use std::time::Duration;

use nkv_core::Write;
use tokio::time::timeout;

use crate::shared::{Shared, stopped};

/// The clock is looked at so often while there are values with a TTL: a machine that was suspended counts on, and its timers
/// do not.
const CLOCK_TICK: Duration = Duration::from_secs(1);

/// The time between a failed expiry and the next try.
const EXPIRY_PAUSE: Duration = Duration::from_secs(1);

/// While storage has not done an expiry, the time goes on so often for other values whose TTL ends.
const EXPIRY_TICK: Duration = Duration::from_millis(10);

/// Until the node stops.
pub(crate) async fn expire(shared: Arc<Shared>) {
    let mut stop = shared.stop.subscribe();
    let expire = async {
        match shared.truth() {
            Some(_) => hide_in_time(&shared).await,
            None => expire_in_time(&shared).await,
        }
    };
    tokio::select! {
        biased;
        () = stopped(&mut stop) => {}
        () = expire => {}
    }
}

/// Where the truth lies in an engine, it decides when a value ends, perhaps by a coarser clock. A value whose end this node knows is
/// hidden from its readers from then on.
async fn hide_in_time(shared: &Shared) {
    loop {
        let now = shared.clock.now();
        shared.store.advance(now);
        let due = async {
            // One that was due before is hidden, and may wait for its engine as long as it likes.
            match shared.store.next_expiry_after(now) {
                Some(at) => tokio::time::sleep(CLOCK_TICK.min(shared.clock.until(at))).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = shared.expiry_changed.notified() => {}
            () = due => {}
        }
    }
}

async fn expire_in_time(shared: &Shared) {
    loop {
        if shared.store.next_expiry().is_some() && shared.clock.is_due() {
            let clock = shared.clock.clone();
            // One that could not be kept is tried again.
            advancing(shared, async { _ = tokio::task::spawn_blocking(move || clock.keep()).await }).await;
        }
        let due = async {
            match shared.store.next_expiry() {
                Some(at) => tokio::time::sleep(shared.clock.until(at).min(CLOCK_TICK)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = shared.expiry_changed.notified() => continue,
            () = due => {}
        }
        let now = shared.clock.now();
        if shared.store.next_expiry().is_none_or(|at| at > now) {
            continue;
        }
        // From here on what is due is absent for all, however long storage takes.
        shared.store.advance(now);
        advancing(shared, async {
            let expired = shared.write_in_turn(Write::expiry(), false).await;
            if !matches!(expired.as_deref(), Ok([Ok(_)])) {
                tokio::time::sleep(EXPIRY_PAUSE).await;
            }
        })
        .await;
    }
}

/// Waits for storage, while the time goes on for all values that become due meanwhile.
async fn advancing(shared: &Shared, work: impl Future<Output = ()>) {
    let mut work = std::pin::pin!(work);
    while timeout(EXPIRY_TICK, work.as_mut()).await.is_err() {
        shared.store.advance(shared.clock.now());
    }
}
