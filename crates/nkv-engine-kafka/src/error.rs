//! Why Kafka did not do something.

use std::io;

use nkv_node::EngineError;
use thiserror::Error as ThisError;

/// Why the engine cannot work with its topic.
#[derive(Clone, Debug, ThisError)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    message: String,
}

/// What a caller can do about an [`Error`]. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Kafka is out of reach, or does not answer: it may be better later.
    Unavailable,
    /// A setting of the topic, of the brokers or of this node breaks a promise, or they do not allow it: the message names it.
    Refused,
}

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// What a caller can do about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether the same may succeed later, with nothing changed.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        self.kind == ErrorKind::Unavailable
    }

    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Error { kind: ErrorKind::Unavailable, message: message.into() }
    }

    pub(crate) fn refused(message: impl Into<String>) -> Self {
        Error { kind: ErrorKind::Refused, message: message.into() }
    }

    /// The same, with what it happened to before it.
    pub(crate) fn at(self, place: &str) -> Self {
        Error { message: format!("{place}: {}", self.message), ..self }
    }

    pub(crate) fn io(doing: &str, error: &io::Error) -> Self {
        Error::unavailable(format!("{doing}: {error}"))
    }
}

impl From<Error> for EngineError {
    fn from(error: Error) -> Self {
        match error.kind {
            ErrorKind::Unavailable => EngineError::Unavailable(error.message),
            ErrorKind::Refused => EngineError::Refused { status: 503, message: error.message },
        }
    }
}
