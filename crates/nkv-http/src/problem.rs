//! Errors as HTTP has them: a status, and problem details (RFC 9457) with a type that programs can rely on.

use std::borrow::Cow;

use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderName, HeaderValue, StatusCode};
use nkv_node::{Error, ErrorKind};
use serde_json::{Map, Value};

use crate::body::{Answer, full};

/// What every type begins with.
const TYPE: &str = "urn:nkv:problem:";

/// Why a request was not done.
#[derive(Debug)]
pub(crate) struct Problem {
    status: StatusCode,
    /// Stable: programs match on it.
    kind: &'static str,
    title: &'static str,
    detail: Cow<'static, str>,
    more: Map<String, Value>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

/// All types, with their status and title: the reference and the OpenAPI document have them from here.
pub(crate) const KINDS: [(&str, u16, &str); 23] = [
    ("bad-request", 400, "the request cannot be understood"),
    ("invalid-key", 400, "not a key or pattern"),
    ("forbidden", 403, "not allowed"),
    ("foreign-host", 403, "the request names a host that is not this server's"),
    ("foreign-origin", 403, "a web page of another origin may not reach the store"),
    ("not-found", 404, "there is no such key"),
    ("no-such-path", 404, "there is no such path"),
    ("wrong-method", 405, "this method is not for this path"),
    ("too-slow", 408, "the request did not arrive in time"),
    ("conflict", 412, "the condition does not hold"),
    ("other-epoch", 412, "the condition is of another epoch than that of the data"),
    ("too-large", 413, "more than the limit"),
    ("coded-content", 415, "a coded body is not taken"),
    ("upgrade", 426, "a WebSocket is to be asked for"),
    ("too-many", 429, "too many subscriptions"),
    ("storage-failed", 500, "storage failed"),
    ("outcome-unknown", 500, "what became of the write is not known"),
    ("internal", 500, "an error of the server"),
    ("not-supported", 501, "not supported here"),
    ("unavailable", 503, "not available now"),
    ("stopping", 503, "the server is stopping"),
    ("no-websocket", 501, "no WebSocket is served here"),
    ("disk-full", 507, "the disk is full"),
];

impl Problem {
    /// A problem of one of the [`KINDS`].
    pub(crate) fn new(kind: &'static str, detail: impl Into<Cow<'static, str>>) -> Self {
        let known = KINDS.iter().find(|(known, ..)| *known == kind);
        let (status, title) = known.map_or((500, "an error of the server"), |(_, status, title)| (*status, *title));
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut problem = Problem { status, kind, title, detail: detail.into(), more: Map::new(), headers: Vec::new() };
        if status == StatusCode::SERVICE_UNAVAILABLE {
            problem.headers.push((RETRY_AFTER, HeaderValue::from_static("1")));
        }
        problem
    }

    pub(crate) fn bad(detail: impl Into<Cow<'static, str>>) -> Self {
        Problem::new("bad-request", detail)
    }

    /// There is the path, for these methods.
    pub(crate) fn method(allowed: &'static str) -> Self {
        let problem = Problem::new("wrong-method", format!("here are {allowed}"));
        problem.header(ALLOW, HeaderValue::from_static(allowed))
    }

    pub(crate) fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.more.insert(name.to_owned(), value.into());
        self
    }

    pub(crate) fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    pub(crate) fn kind(&self) -> &'static str {
        self.kind
    }

    pub(crate) fn detail(&self) -> &str {
        &self.detail
    }

    pub(crate) fn status(&self) -> StatusCode {
        self.status
    }

    pub(crate) fn into_answer(self) -> Answer {
        let mut object = self.more;
        object.insert("type".into(), format!("{TYPE}{}", self.kind).into());
        object.insert("title".into(), self.title.into());
        object.insert("status".into(), self.status.as_u16().into());
        object.insert("detail".into(), self.detail.into_owned().into());
        let mut answer = Answer::new(full(Value::Object(object).to_string() + "\n"));
        *answer.status_mut() = self.status;
        let headers = answer.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.extend(self.headers);
        answer
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let kind = match error.kind() {
            ErrorKind::InvalidKey => "invalid-key",
            ErrorKind::Conflict { revision } => {
                return Problem::new("conflict", error.to_string()).with("revision", revision.get());
            }
            ErrorKind::OtherEpoch => "other-epoch",
            ErrorKind::OutcomeUnknown => "outcome-unknown",
            ErrorKind::Closed => "stopping",
            ErrorKind::Refused { status } => match status {
                400 => "bad-request",
                401 | 403 => "forbidden",
                413 => "too-large",
                429 => "too-many",
                500 => "storage-failed",
                501 => "not-supported",
                507 => "disk-full",
                _ => "unavailable",
            },
            _ => "internal",
        };
        Problem::new(kind, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_documents_have_every_type_with_its_status() {
        let document: Value = serde_json::from_str(crate::look::OPENAPI).unwrap();
        let types = document.pointer("/components/schemas/Problem/properties/type/enum").unwrap();
        let types: Vec<_> = types.as_array().unwrap().iter().map(|kind| kind.as_str().unwrap()).collect();
        let all: Vec<_> = KINDS.iter().map(|(kind, ..)| format!("{TYPE}{kind}")).collect();
        assert_eq!(types, all);
        let rows: Vec<_> = include_str!("../../../docs/http.md")
            .lines()
            .skip_while(|line| !line.starts_with("| `type`"))
            .skip(2)
            .map_while(|line| line.strip_prefix("| `").and_then(|row| row.split_once(" | ")))
            .map(|(kind, row)| (kind.trim_end_matches('`'), row.split(' ').next().unwrap().parse().unwrap()))
            .collect();
        assert_eq!(rows, KINDS.map(|(kind, status, _)| (kind, status)));
    }

    #[test]
    fn each_kind_is_there_once_and_every_error_of_a_node_has_one() {
        for (at, (kind, status, _)) in KINDS.iter().enumerate() {
            assert!(KINDS.iter().skip(at + 1).all(|(other, ..)| other != kind), "{kind} twice");
            assert_eq!(Problem::new(kind, "").status().as_u16(), *status);
        }
        let refused = |status| ErrorKind::Refused { status };
        let revision = nkv_node::Revision::new(7);
        for (error, status) in [
            (ErrorKind::InvalidKey, 400),
            (ErrorKind::Conflict { revision }, 412),
            (ErrorKind::OtherEpoch, 412),
            (ErrorKind::OutcomeUnknown, 500),
            (ErrorKind::Closed, 503),
            (refused(403), 403),
            (refused(413), 413),
            (refused(429), 429),
            (refused(500), 500),
            (refused(501), 501),
            (refused(503), 503),
            (refused(507), 507),
        ] {
            let problem = Problem::from(Error::new(error, "x"));
            assert_eq!(problem.status().as_u16(), status, "{problem:?}");
            assert!(KINDS.iter().any(|(kind, ..)| *kind == problem.kind()));
        }
    }
}
