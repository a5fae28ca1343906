//! Warnings that a peer can provoke at will: one of a kind a second at most, so that nobody fills the log.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::warn;

const PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(crate) struct Complaints(Mutex<HashMap<&'static str, Said>>);

#[derive(Debug, Default)]
struct Said {
    last: Option<Instant>,
    unsaid: u64,
}

impl Complaints {
    /// Logs `what`, with how many of its kind were passed over since the last; or passes it over.
    pub(crate) fn warn(&self, kind: &'static str, what: fmt::Arguments<'_>) {
        let mut kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let said = kinds.entry(kind).or_default();
        if said.last.is_some_and(|last| last.elapsed() < PAUSE) {
            said.unsaid = said.unsaid.saturating_add(1);
            return;
        }
        let unsaid = std::mem::take(&mut said.unsaid);
        said.last = Some(Instant::now());
        drop(kinds);
        if unsaid == 0 { warn!("{what}") } else { warn!("{what} ({unsaid} more like this since the last)") }
    }
}
