//! The one clock: where the wall clock stood at the start, and monotonic from there on.
//!
//! Nothing in a running server follows the wall clock when it is set; only a restart looks at it again, because
//! a TTL goes on over a restart.

use std::time::{Duration, Instant, SystemTime};

use nkv_core::Millis;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    start: Instant,
    origin: Millis,
}

impl Clock {
    pub(crate) fn start() -> Self {
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Clock { start: Instant::now(), origin: millis(since_1970) }
    }

    pub(crate) fn now(&self) -> Millis {
        self.origin.saturating_add(self.uptime_ms())
    }

    pub(crate) fn uptime_ms(&self) -> u64 {
        millis(self.start.elapsed())
    }

    /// How long it is until `at`.
    pub(crate) fn until(&self, at: Millis) -> Duration {
        Duration::from_millis(at.saturating_sub(self.now()))
    }
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
