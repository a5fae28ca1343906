//! What went wrong, as gRPC says it.

use bytes::Bytes;
use nkv_node::{Epoch, Error, ErrorKind};
use prost::Message;
use tonic::{Code, Status};

use crate::v1::Conflict;

/// How the details name their message.
const CONFLICT_URL: &str = "type.googleapis.com/nkv.v1.Conflict";

/// `google.rpc.Status`, which `grpc-status-details-bin` holds.
#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<Any>,
}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

/// The status of an error, where `epoch` is that of the data now.
///
/// A condition that does not hold has the present revision in its details: see [`conflict_of`].
///
/// # Examples
///
/// ```
/// use nkv_node::{Epoch, Error, ErrorKind};
///
/// let full = Error::new(ErrorKind::Refused { status: 507 }, "the disk is full");
/// assert_eq!(nkv_grpc::status(&full, Epoch::new(1)).code(), tonic::Code::ResourceExhausted);
/// ```
#[must_use]
pub fn status(error: &Error, epoch: Epoch) -> Status {
    let (code, message) = (code_of(error.kind()), error.to_string());
    let conflict = match error.kind() {
        ErrorKind::Conflict { revision } => {
            // An absent key is at revision 0 in every epoch.
            Conflict { revision: Some(revision.get()), epoch: revision.epoch().unwrap_or(epoch).to_string() }
        }
        ErrorKind::OtherEpoch => Conflict { revision: None, epoch: epoch.to_string() },
        _ => return Status::new(code, message),
    };
    let any = Any { type_url: CONFLICT_URL.to_owned(), value: conflict.encode_to_vec().into() };
    let details = RpcStatus { code: code as i32, message: message.clone(), details: vec![any] };
    Status::with_details(code, message, details.encode_to_vec().into())
}

fn code_of(kind: &ErrorKind) -> Code {
    match kind {
        ErrorKind::InvalidAddress | ErrorKind::InvalidKey | ErrorKind::Protocol | ErrorKind::Json => {
            Code::InvalidArgument
        }
        ErrorKind::CannotConnect | ErrorKind::Closed => Code::Unavailable,
        ErrorKind::Timeout => Code::DeadlineExceeded,
        ErrorKind::Conflict { .. } | ErrorKind::OtherEpoch => Code::FailedPrecondition,
        ErrorKind::Refused { status } => code_of_refusal(*status),
        ErrorKind::OutcomeUnknown => Code::Unknown,
        _ => Code::Unknown,
    }
}

fn code_of_refusal(status: u16) -> Code {
    match status {
        400 => Code::InvalidArgument,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::NotFound,
        409 | 412 => Code::FailedPrecondition,
        413 | 429 | 507 => Code::ResourceExhausted,
        500 => Code::Internal,
        501 => Code::Unimplemented,
        503 => Code::Unavailable,
        _ => Code::Unknown,
    }
}

/// The condition that did not hold, if that is what a status says: for clients in Rust.
///
/// # Examples
///
/// ```
/// use nkv_node::{Epoch, Error, ErrorKind, Revision};
///
/// let epoch = Epoch::new(1);
/// let error = Error::new(ErrorKind::Conflict { revision: Revision::in_epoch(epoch, 7) }, "conflict");
/// let conflict = nkv_grpc::conflict_of(&nkv_grpc::status(&error, epoch)).ok_or("no conflict")?;
/// assert_eq!(conflict.revision, Some(7));
/// # Ok::<(), &str>(())
/// ```
#[must_use]
pub fn conflict_of(status: &Status) -> Option<Conflict> {
    let details = RpcStatus::decode(status.details()).ok()?.details;
    let found = details.into_iter().find(|any| any.type_url == CONFLICT_URL)?;
    Conflict::decode(found.value).ok()
}

#[cfg(test)]
mod tests {
    use nkv_node::Revision;

    use super::*;

    #[test]
    fn every_error_has_the_status_that_grpc_means_by_it() {
        let epoch = Epoch::new(7);
        let refused = |status| ErrorKind::Refused { status };
        let expected = [
            (ErrorKind::InvalidAddress, Code::InvalidArgument),
            (ErrorKind::InvalidKey, Code::InvalidArgument),
            (ErrorKind::CannotConnect, Code::Unavailable),
            (ErrorKind::Timeout, Code::DeadlineExceeded),
            (ErrorKind::Conflict { revision: Revision::in_epoch(epoch, 3) }, Code::FailedPrecondition),
            (ErrorKind::Conflict { revision: Revision::ZERO }, Code::FailedPrecondition),
            (ErrorKind::OtherEpoch, Code::FailedPrecondition),
            (ErrorKind::OutcomeUnknown, Code::Unknown),
            (ErrorKind::Closed, Code::Unavailable),
            (ErrorKind::Protocol, Code::InvalidArgument),
            (ErrorKind::Json, Code::InvalidArgument),
            (refused(400), Code::InvalidArgument),
            (refused(401), Code::Unauthenticated),
            (refused(403), Code::PermissionDenied),
            (refused(404), Code::NotFound),
            (refused(409), Code::FailedPrecondition),
            (refused(412), Code::FailedPrecondition),
            (refused(413), Code::ResourceExhausted),
            (refused(429), Code::ResourceExhausted),
            (refused(500), Code::Internal),
            (refused(501), Code::Unimplemented),
            (refused(503), Code::Unavailable),
            (refused(507), Code::ResourceExhausted),
            (refused(418), Code::Unknown),
        ];
        for (kind, code) in expected {
            let error = Error::new(kind.clone(), "why");
            let status = status(&error, epoch);
            assert_eq!((status.code(), status.message()), (code, "why"), "{kind:?}");
            // What a client may repeat by itself was not done.
            assert!(code != Code::Unavailable || error.is_retryable() || kind == ErrorKind::Closed, "{kind:?}");
            let conflict = conflict_of(&status);
            match kind {
                ErrorKind::Conflict { revision } => {
                    let expected = Conflict { revision: Some(revision.get()), epoch: epoch.to_string() };
                    assert_eq!(conflict, Some(expected));
                }
                ErrorKind::OtherEpoch => {
                    assert_eq!(conflict, Some(Conflict { revision: None, epoch: epoch.to_string() }));
                }
                _ => assert_eq!((conflict, status.details()), (None, &[][..])),
            }
        }
    }
}
