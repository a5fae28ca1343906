//! One value, as it is known now.

use crate::entry::Entry;
use crate::error::{Error, Result};
use crate::event::{EndReason, Event};
use crate::revision::Revision;

/// What is known of a watched key.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Watched<T> {
    /// The value; `None` if there is no such key. Beside an error the last one that could be read.
    pub value: Option<T>,
    /// The revision of the key's newest state; [`Revision::ZERO`] if there is no such key.
    pub revision: Revision,
    /// Why the newest value could not be read, if it could not.
    pub error: Option<Error>,
    /// Whether this is the present state: false before it is known, while the connection is lost, and from the end on.
    pub is_live: bool,
    /// Why no change is followed any more.
    pub ended: Option<EndReason>,
}

/// Nothing is known yet.
impl<T> Default for Watched<T> {
    fn default() -> Self {
        Watched { value: None, revision: Revision::ZERO, error: None, is_live: false, ended: None }
    }
}

impl<T> Watched<T> {
    /// Takes in what a subscription to the key alone delivers.
    pub fn apply(&mut self, event: &Event, read: impl FnOnce(&Entry) -> Result<T>) {
        match event {
            Event::Update { entry, .. } => {
                self.revision = entry.revision;
                match read(entry) {
                    Ok(value) => (self.value, self.error) = (Some(value), None),
                    Err(error) => self.error = Some(error),
                }
            }
            Event::Gone { .. } => (self.value, self.revision, self.error) = (None, Revision::ZERO, None),
            Event::Synced { .. } => self.is_live = true,
            Event::Reconnecting | Event::Connected { .. } => self.is_live = false,
            Event::Ended(reason) => (self.is_live, self.ended) = (false, Some(reason.clone())),
        }
    }
}
