//! What an error of etcd says about a request.

use std::error::Error;

use nkv_node::EngineError;
use tonic::{Code, ConnectError, Status};

/// The login has ended, or the rights have changed since: the request was not done, and may be after a new login.
pub(crate) fn wants_login(status: &Status) -> bool {
    status.code() == Code::Unauthenticated
        || has(status, "invalid auth token")
        || has(status, "revision of auth store is old")
}

/// The lease that a put names has ended: the put was not done.
pub(crate) fn has_no_lease(status: &Status) -> bool {
    has(status, "requested lease not found")
}

/// The revision is not kept any more.
pub(crate) fn is_compacted(status: &Status) -> bool {
    has(status, "required revision has been compacted")
}

/// The revision does not exist yet.
pub(crate) fn is_future(status: &Status) -> bool {
    has(status, "required revision is a future revision")
}

/// There is no room.
pub(crate) fn is_full(status: &Status) -> bool {
    has(status, "database space exceeded")
}

/// An answer that is longer than what is taken.
pub(crate) fn is_too_long(status: &Status) -> bool {
    has(status, "message length too large")
}

fn has(status: &Status, text: &str) -> bool {
    status.message().contains(text)
}

/// What became of a write. What is not known to be refused before it was proposed may have been done.
pub(crate) fn of_write(status: &Status) -> EngineError {
    of_read(status).unwrap_or_else(|| EngineError::OutcomeUnknown(status.message().to_owned()))
}

/// What became of a request that changes nothing.
pub(crate) fn of_request(status: &Status) -> EngineError {
    of_read(status).unwrap_or_else(|| EngineError::Unavailable(status.message().to_owned()))
}

/// The error, if it says that nothing was done.
fn of_read(status: &Status) -> Option<EngineError> {
    let refused = |code, message: String| Some(EngineError::Refused { status: code, message });
    let said = status.message();
    if was_not_sent(status) || has(status, "etcdserver: no leader") || has(status, "etcdserver: too many requests") {
        return Some(EngineError::Unavailable(said.to_owned()));
    }
    if is_full(status) {
        return refused(
            507,
            format!("etcd is full: {said}; compact and defragment it, or raise its --quota-backend-bytes"),
        );
    }
    if has(status, "too many operations in txn request") {
        return refused(
            413,
            format!("etcd takes at most 128 operations in a batch unless its --max-txn-ops says otherwise: {said}"),
        );
    }
    if has(status, "duplicate key given in txn request") {
        return refused(413, format!("etcd takes each key once in a batch: {said}"));
    }
    if has(status, "request is too large") || has(status, "message larger than max") {
        return refused(413, format!("etcd takes requests of its --max-request-bytes, 1.5 MiB by default: {said}"));
    }
    match status.code() {
        Code::PermissionDenied => refused(403, format!("etcd does not allow it to nkv's user: {said}")),
        Code::Unauthenticated => refused(503, format!("etcd does not accept nkv's login: {said}")),
        Code::InvalidArgument | Code::FailedPrecondition | Code::Unimplemented | Code::NotFound => {
            refused(503, format!("etcd refuses: {said}"))
        }
        _ => None,
    }
}

/// Whether there was no connection to send it by.
fn was_not_sent(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<ConnectError>() {
            return true;
        }
        source = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_etcd_refused_before_it_began_is_definite() {
        let unknown = [
            Status::unavailable("etcdserver: request timed out"),
            Status::unavailable("etcdserver: request timed out, possibly due to previous leader failure"),
            Status::unavailable("etcdserver: leader changed"),
            Status::unavailable("etcdserver: server stopped"),
            Status::unknown("transport error"),
            Status::cancelled("operation was canceled"),
            Status::internal("h2 protocol error"),
            Status::deadline_exceeded("context deadline exceeded"),
        ];
        for status in unknown {
            assert!(matches!(of_write(&status), EngineError::OutcomeUnknown(_)), "{status}");
            assert!(matches!(of_request(&status), EngineError::Unavailable(_)), "{status}");
        }
        let of = |status: Status| match of_write(&status) {
            EngineError::Refused { status, .. } => status,
            EngineError::Unavailable(_) => 503,
            other => panic!("{other}"),
        };
        assert_eq!(of(Status::resource_exhausted("etcdserver: mvcc: database space exceeded")), 507);
        assert_eq!(of(Status::invalid_argument("etcdserver: too many operations in txn request")), 413);
        assert_eq!(of(Status::invalid_argument("etcdserver: duplicate key given in txn request")), 413);
        assert_eq!(of(Status::invalid_argument("etcdserver: request is too large")), 413);
        assert_eq!(of(Status::permission_denied("etcdserver: permission denied")), 403);
        assert_eq!(of(Status::unavailable("etcdserver: no leader")), 503);
    }
}
