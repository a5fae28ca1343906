//! Log lines that a peer can provoke at will: one of a kind a second at most, so that no peer fills the log.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::{error, info, warn};

const PAUSE: Duration = Duration::from_secs(1);

/// A log of lines of which one of a kind a second is written, at most.
#[derive(Debug, Default)]
pub struct RateLimitedLog(Mutex<HashMap<&'static str, Said>>);

#[derive(Debug, Default)]
struct Said {
    last: Option<Instant>,
    unsaid: u64,
}

impl RateLimitedLog {
    /// Logs `what`, with how many of its kind were passed over since the last; or passes it over.
    pub fn warn(&self, kind: &'static str, what: fmt::Arguments<'_>) {
        if let Some(more) = self.due(kind) {
            warn!("{what}{more}");
        }
    }

    /// The same, for what is as it should be.
    pub fn info(&self, kind: &'static str, what: fmt::Arguments<'_>) {
        if let Some(more) = self.due(kind) {
            info!("{what}{more}");
        }
    }

    /// The same, for what an operator has to see to.
    pub fn error(&self, kind: &'static str, what: fmt::Arguments<'_>) {
        if let Some(more) = self.due(kind) {
            error!("{what}{more}");
        }
    }

    /// How many were passed over, in words, if this one is to be logged.
    fn due(&self, kind: &'static str) -> Option<String> {
        let mut kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let said = kinds.entry(kind).or_default();
        if said.last.is_some_and(|last| last.elapsed() < PAUSE) {
            said.unsaid = said.unsaid.saturating_add(1);
            return None;
        }
        said.last = Some(Instant::now());
        Some(match std::mem::take(&mut said.unsaid) {
            0 => String::new(),
            unsaid => format!(" ({unsaid} more like this since the last)"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_of_a_kind_one_a_second_is_logged_and_says_how_many_were_not() {
        let (log, began) = (RateLimitedLog::default(), Instant::now());
        let logged = (0..1_000).filter_map(|_| log.due("full")).count() as u64;
        assert!(logged <= 1 + began.elapsed().as_secs(), "{logged}");
        assert_eq!(log.due("another").as_deref(), Some(""));
        std::thread::sleep(PAUSE);
        let more = log.due("full").unwrap();
        assert!(logged > 1 || more == " (999 more like this since the last)", "{more}");
    }
}
