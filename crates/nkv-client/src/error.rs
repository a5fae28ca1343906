//! Errors of the wire.

use std::io;

use nkv_core::Epoch;
use nkv_protocol::{Body, MessageError, status};
use nkv_types::{Error, ErrorKind, Revision};

/// What makes an error of something that a connection brings.
pub(crate) trait WireError {
    fn closed() -> Self;
    fn protocol(what: impl Into<String>) -> Self;
    fn message(error: MessageError) -> Self;
    fn lost(error: io::Error) -> Self;
    fn too_large(len: usize, len_max: u64) -> Self;
    fn refused(status: u16, message: &str) -> Self;

    /// The error that an answer stands for, from a server whose data are of this epoch.
    fn from_answer(body: &Body, epoch: Epoch) -> Self;

    /// The same for a put or delete: one that the server gave up as it stopped may have been done.
    fn from_answer_to_write(body: &Body, epoch: Epoch) -> Self;
}

impl WireError for Error {
    fn closed() -> Self {
        Error::new(ErrorKind::Closed, "the client is closed")
    }

    fn protocol(what: impl Into<String>) -> Self {
        Error::new(ErrorKind::Protocol, what)
    }

    fn message(error: MessageError) -> Self {
        Error::protocol(error.to_string())
    }

    fn lost(error: io::Error) -> Self {
        // A stream of bytes holds none; a WebSocket may.
        #[cfg(feature = "ws")]
        if error.kind() == io::ErrorKind::InvalidData {
            return Error::protocol(error.to_string());
        }
        Error::new(ErrorKind::CannotConnect, "connection lost").because(error)
    }

    fn too_large(len: usize, len_max: u64) -> Self {
        let message = format!("the value has {len} bytes, and the server takes {len_max} at most");
        Error::new(ErrorKind::Refused { status: status::TOO_LARGE }, message)
    }

    fn refused(status: u16, message: &str) -> Self {
        Error::new(ErrorKind::Refused { status }, format!("the server says {status}: {message}"))
    }

    fn from_answer(body: &Body, epoch: Epoch) -> Self {
        match body.status {
            status::CONFLICT => {
                let revision = Revision::in_epoch(epoch, body.revision.unwrap_or(0));
                let message = match revision.get() {
                    0 => "conflict: the key does not exist".to_owned(),
                    number => format!("conflict: the key is at revision {number}"),
                };
                Error::new(ErrorKind::Conflict { revision }, message)
            }
            status => Error::refused(status, &body.message),
        }
    }

    fn from_answer_to_write(body: &Body, epoch: Epoch) -> Self {
        let error = Error::from_answer(body, epoch);
        match body.status {
            status::UNAVAILABLE => Error::new(ErrorKind::OutcomeUnknown, error.to_string()),
            _ => error,
        }
    }
}
