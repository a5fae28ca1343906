//! What can go wrong, by what a caller can do about it.

use std::error::Error as StdError;
use std::{fmt, io};

use nkv_core::{KeyError, Revision};
use nkv_protocol::{Body, MessageError, status};

/// Short for a result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong with a request or a connection; formatted with `{:#}`, the message is followed by those of its sources.
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
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
    /// The server refused the request or failed to serve it. Nothing was changed, unless the status is 500: then the
    /// server does not know what its disk holds.
    Server {
        /// As in HTTP: 400, 401, 403, 413, 429, 500, 503, 507.
        status: u16,
    },
    /// A put or delete was sent and the answer did not come: it may or may not have taken effect, or may do so yet.
    OutcomeUnknown,
    /// The client was closed.
    Closed,
    /// The peer does not speak the protocol, or exceeds a limit.
    Protocol,
    /// A value is not the JSON that was asked for, or cannot be made JSON. Nothing was changed.
    Json,
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into(), source: None }
    }

    pub(crate) fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
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

    /// The error that an answer stands for.
    pub(crate) fn from_answer(body: &Body) -> Self {
        let kind = match body.status {
            status::NOT_FOUND => ErrorKind::NotFound,
            status::CONFLICT => {
                let revision = Revision::new(body.revision.unwrap_or(0));
                let message = format!("conflict: the key is at revision {revision}");
                return Error::new(ErrorKind::Conflict { revision }, message);
            }
            status => ErrorKind::Server { status },
        };
        if kind == ErrorKind::NotFound {
            return Error::new(kind, "not found");
        }
        Error::new(kind, format!("the server says {}: {}", body.status, body.message))
    }

    /// What went wrong, to be matched on.
    #[must_use]
    pub fn kind(&self) -> &ErrorKind {
        &self.kind
    }

    /// Whether the same request may succeed later and asking again does no harm.
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
        f.write_str(&self.message)?;
        let mut source = self.source().filter(|_| f.alternate());
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error").field("kind", &self.kind).field("message", &format_args!("{self:#}")).finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

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
