//! What can go wrong, by what a caller can do about it.

use std::error::Error as StdError;
use std::fmt;

use nkv_core::KeyError;

use crate::revision::Revision;

/// Too many of something; fewer, or later.
const TOO_MANY: u16 = 429;
/// Overloaded or draining; later.
const UNAVAILABLE: u16 = 503;

/// Short for a result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong with a request, a subscription or a connection. Its message carries that of its cause; there is no
/// [`source`](StdError::source) that would say it again.
#[derive(Clone, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    message: String,
}

/// The kinds of errors that a caller can distinguish.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The address cannot be understood. Nothing was sent.
    InvalidAddress,
    /// The key or pattern cannot be understood. Nothing was sent.
    InvalidKey,
    /// No server answers at the address, or what answers is not nkv, or it refuses us. Nothing was changed.
    CannotConnect,
    /// There was no answer in time. Nothing was changed: a put or delete that had been sent is
    /// [`OutcomeUnknown`](Self::OutcomeUnknown) instead.
    Timeout,
    /// The key is at another revision than the request expected. Nothing was changed.
    Conflict {
        /// The key's revision; [`Revision::ZERO`] if there is no such key.
        revision: Revision,
    },
    /// The condition names a revision of another epoch than that of the data, about which it says nothing. Nothing
    /// was changed; what the key holds now is to be read anew.
    OtherEpoch,
    /// The store refused the request or failed to serve it. Nothing was changed, unless the status is 500: then it is not
    /// known what the disk holds, or a delete of many keys stopped half-way. A value that is too large is refused with 413.
    Refused {
        /// As in HTTP: 400, 401, 403, 413, 429, 500, 501, 503, 507.
        status: u16,
    },
    /// A put or delete was sent or begun, and no answer says what became of it: it may or may not have taken effect, or may do so
    /// yet.
    OutcomeUnknown,
    /// The client was closed, its runtime has shut down, this process was forked from the one that made it, or the node has
    /// stopped. Nothing was changed.
    Closed,
    /// The peer does not speak the protocol, or exceeds a limit.
    Protocol,
    /// A value is not the JSON that was asked for, or cannot be made JSON. Nothing was changed.
    Json,
}

impl Error {
    /// An error of this kind. The message is lower case, without full stop.
    #[must_use]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into() }
    }

    /// Adds the cause to the message.
    #[must_use]
    pub fn because(mut self, cause: impl fmt::Display) -> Self {
        self.message = format!("{}: {cause:#}", self.message);
        self
    }

    /// What went wrong, to be matched on.
    #[must_use]
    pub fn kind(&self) -> &ErrorKind {
        &self.kind
    }

    /// Whether the same request may succeed later, and asking again does no harm: nothing was changed.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self.kind {
            ErrorKind::CannotConnect | ErrorKind::Timeout => true,
            ErrorKind::Refused { status } => matches!(status, TOO_MANY | UNAVAILABLE),
            _ => false,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error").field("kind", &self.kind).field("message", &self.message).finish()
    }
}

impl StdError for Error {}

impl From<KeyError> for Error {
    fn from(error: KeyError) -> Self {
        Error::new(ErrorKind::InvalidKey, error.to_string())
    }
}
