//! One value, as it is known now.

use crate::error::Error;
use crate::event::EndReason;
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
