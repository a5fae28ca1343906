//! What can go wrong, by what a caller can do about it.

use std::error::Error as StdError;
use std::{fmt, io};

use nkv_core::{Epoch, KeyError};
use nkv_protocol::{Body, MessageError, status};

use crate::revision::Revision;

/// Short for a result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong with a request or a connection. Its message carries that of its cause; there is no
/// [`source`](StdError::source) that would say it again.
#[derive(Clone, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
    message: String,
}

/// What a caller can tell apart.
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
    /// There is no such key. Nothing was changed.
    NotFound,
    /// The condition names a revision of another epoch than that of the server's data, about which it says nothing. Nothing
    /// was changed; what the key holds now is to be read anew.
    OtherEpoch,
    /// The server refused the request or failed to serve it. Nothing was changed, unless the status is 500: then the
    /// server does not know what its disk holds, or a delete of many keys stopped half-way. A value that is too large for
    /// the server is refused without it, with 413.
    Server {
        /// As in HTTP: 400, 401, 403, 413, 429, 500, 503, 507.
        status: u16,
    },
    /// A put or delete was sent, and no answer says what became of it: it may or may not have taken effect, or may do so
    /// yet.
    OutcomeUnknown,
    /// The client was closed, its runtime has shut down, or this process was forked from the one that made it.
    Closed,
    /// The peer does not speak the protocol, or exceeds a limit.
    Protocol,
    /// A value is not the JSON that was asked for, or cannot be made JSON. Nothing was changed.
    Json,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into() }
    }

    pub(crate) fn because(mut self, cause: impl fmt::Display) -> Self {
        self.message = format!("{}: {cause:#}", self.message);
        self
    }

    pub(crate) fn closed() -> Self {
        Error::new(ErrorKind::Closed, "the client is closed")
    }

    pub(crate) fn protocol(what: impl Into<String>) -> Self {
        Error::new(ErrorKind::Protocol, what)
    }

    pub(crate) fn lost(error: io::Error) -> Self {
        Error::new(ErrorKind::CannotConnect, "connection lost").because(error)
    }

    pub(crate) fn json(what: impl Into<String>, error: serde_json::Error) -> Self {
        Error::new(ErrorKind::Json, what).because(error)
    }

    pub(crate) fn too_large(len: usize, len_max: u64) -> Self {
        let message = format!("the value has {len} bytes, and the server takes {len_max} at most");
        Error::new(ErrorKind::Server { status: status::TOO_LARGE }, message)
    }

    /// The error that an answer stands for, from a server whose data are of this epoch.
    pub(crate) fn from_answer(body: &Body, epoch: Epoch) -> Self {
        match body.status {
            status::NOT_FOUND => Error::new(ErrorKind::NotFound, "not found"),
            status::CONFLICT => {
                let revision = Revision::of(epoch, body.revision.unwrap_or(0));
                let message = match revision.get() {
                    0 => "conflict: the key does not exist".to_owned(),
                    number => format!("conflict: the key is at revision {number}"),
                };
                Error::new(ErrorKind::Conflict { revision }, message)
            }
            status => Error::refused(status, &body.message),
        }
    }

    pub(crate) fn refused(status: u16, message: &str) -> Self {
        Error::new(ErrorKind::Server { status }, format!("the server says {status}: {message}"))
    }

    /// The same for a put or delete: one that the server gave up as it stopped may have been done.
    pub(crate) fn from_answer_to_write(body: &Body, epoch: Epoch) -> Self {
        let mut error = Error::from_answer(body, epoch);
        if body.status == status::UNAVAILABLE {
            error.kind = ErrorKind::OutcomeUnknown;
        }
        error
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
            ErrorKind::Server { status } => matches!(status, status::TOO_MANY | status::UNAVAILABLE),
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

impl From<MessageError> for Error {
    fn from(error: MessageError) -> Self {
        Error::protocol(error.to_string())
    }
}
