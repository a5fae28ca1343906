//! The client protocol of Go-KV, the cluster that nkv takes the place of: five calls in Connect's unary form, with messages as
//! protobuf or JSON. They do what was meant there: an expiry ends an entry then and not before, a delete works on any node, an absent
//! key is `not_found` at once, and a key has one entry.
//!
//! The messages are five fields in all, so they are read and written here rather than by a library.

use std::borrow::Cow;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use http::header::{CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode};
use hyper::body::Incoming;
use nkv_core::{Key, RecordRef};
use nkv_node::{Error, PutOptions};
use serde::Deserialize;

use crate::body::{Answer, Body, Received, full, receive};
use crate::entry::{from_base64, write_text};
use crate::list::{PART_LEN, Walk};
use crate::making::{FIRST_LEN, Making};
use crate::problem::Problem;
use crate::route::Ctx;

/// What the path of each call begins with.
pub(crate) const SERVICE: &str = "/internalpb.KVService/";

/// An answer to `List` is no longer than this.
const LEN_MAX: usize = 64 << 20;

/// How many bytes a request may have beyond a value.
const FORM_LEN: usize = 32 << 10;

/// The longest duration of protobuf, in seconds: 10,000 years.
const SECONDS_MAX: u64 = 315_576_000_000;

const NANOS: u32 = 1_000_000_000;

/// How messages are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Proto,
    Json,
}

/// A request of any of the calls; absent fields are empty.
#[derive(Debug, Default, PartialEq, Eq)]
struct Message<'a> {
    key: Cow<'a, str>,
    value: Cow<'a, [u8]>,
    /// How long the entry is to live; forever if that is not said, or no time at all.
    expiry: Option<Duration>,
}

/// Why a call was not done, as Connect says it.
#[derive(Debug)]
struct Failure {
    code: &'static str,
    message: String,
}

/// `POST /internalpb.KVService/METHOD`.
pub(crate) async fn call(ctx: Ctx<'_>, method: &str, request: Request<Incoming>) -> Result<Answer, Problem> {
    if *request.method() != Method::POST {
        return Err(Problem::method("POST"));
    }
    let Some(form) = Form::of(request.headers()) else {
        let problem = Problem::new("coded-content", "the content type is application/proto or application/json");
        let types = HeaderValue::from_static("application/json, application/proto");
        return Err(problem.header(HeaderName::from_static("accept-post"), types));
    };
    let time_limit = match time_limit(request.headers()) {
        Ok(time_limit) => time_limit,
        Err(failure) => return Ok(failure.into_answer()),
    };
    let doing = answered(ctx, form, method, request);
    let answered = match time_limit {
        None => doing.await,
        Some(limit) => tokio::time::timeout(limit, doing).await.unwrap_or_else(|_| {
            Err(Failure::new("deadline_exceeded", format!("not done within {limit:?}; a write may be done yet")))
        }),
    };
    Ok(answered.unwrap_or_else(Failure::into_answer))
}

async fn answered(ctx: Ctx<'_>, form: Form, method: &str, request: Request<Incoming>) -> Result<Answer, Failure> {
    if !matches!(method, "Put" | "Get" | "Delete" | "KeyExists" | "List") {
        return Err(Failure::new("unimplemented", format!("{SERVICE}{method} is not a call of this service")));
    }
    let received = read(ctx, form, request).await?;
    let message = match form {
        Form::Proto => Message::from_proto(&received.bytes),
        Form::Json => Message::from_json(&received.bytes),
    };
    let message = message.map_err(|error| Failure::new("invalid_argument", error))?;
    if method == "List" {
        return list(ctx, form).await;
    }
    let key = Key::new(&message.key).map_err(|error| Failure::new("invalid_argument", error.to_string()))?;
    let handle = &ctx.door.handle;
    let out = match method {
        "Put" => {
            let mut options = PutOptions::default();
            options.ttl = message.expiry;
            // A copy: what is kept is no part of a longer body.
            handle.put_with(&key, message.value.into_owned(), options).await?;
            form.nothing()
        }
        "Delete" => {
            handle.delete(&key).await?;
            form.nothing()
        }
        "KeyExists" => form.exists(handle.look_up(key.as_str(), |_| ())?.is_some()),
        _ => {
            if handle.budget().is_over() {
                handle.budget().relief().await;
            }
            let found = handle.look_up(key.as_str(), |record| {
                let mut out = Vec::new();
                form.write_entry(&mut out, record, record.expiry.map(|expiry| handle.time_left(expiry)));
                out
            })?;
            let entry = found.ok_or_else(|| Failure::new("not_found", format!("there is no key '{key}'")))?;
            form.wrapped(b"{\"entry\":", entry, b"}")
        }
    };
    drop(received);
    Ok(form.answer(ctx, out))
}

/// All entries. Those of a part are of one moment.
async fn list(ctx: Ctx<'_>, form: Form) -> Result<Answer, Failure> {
    let (mut making, mut walk, mut has_turn) = (Making::new(ctx), Walk::all(ctx.door.handle.clone()), false);
    let mut out = Vec::new();
    loop {
        let part_max = out.len().saturating_add(if has_turn { PART_LEN } else { FIRST_LEN });
        let has_more = walk.part_by(&mut out, part_max, has_turn, |out, record, left| {
            if form == Form::Json && !out.is_empty() {
                out.push(b',');
            }
            form.write_entry(out, record, left);
        })?;
        if out.len() > LEN_MAX {
            let message = "all entries together have more than 64 MiB: read them in pages at /v1/kv";
            return Err(Failure::new("resource_exhausted", message));
        }
        if !has_more {
            break;
        }
        making.turn().await;
        has_turn = true;
        making.grow(out.len()).await;
        tokio::task::yield_now().await;
    }
    let answer = form.answer(ctx, form.wrapped(b"{\"entries\":[", out, b"]}"));
    drop(making);
    Ok(answer)
}

async fn read(ctx: Ctx<'_>, form: Form, mut request: Request<Incoming>) -> Result<Received, Failure> {
    let headers = request.headers_mut();
    if headers.get("connect-protocol-version").is_some_and(|version| version != "1") {
        return Err(Failure::new("invalid_argument", "connect-protocol-version is 1"));
    }
    if headers.get(CONTENT_ENCODING).is_some_and(|coding| coding == "identity") {
        headers.remove(CONTENT_ENCODING);
    }
    let handle = &ctx.door.handle;
    let value_len_max = handle.limits().value_len_max;
    let len_max = match form {
        Form::Proto => value_len_max,
        // Base64 takes a third more.
        Form::Json => value_len_max.saturating_add(value_len_max.div_ceil(3)),
    };
    Ok(receive(handle, ctx.conn, request, len_max.saturating_add(FORM_LEN)).await?)
}

/// How long the caller waits.
fn time_limit(headers: &HeaderMap) -> Result<Option<Duration>, Failure> {
    let Some(value) = headers.get("connect-timeout-ms") else { return Ok(None) };
    let digits = value.to_str().ok().filter(|text| text.len() <= 10 && text.bytes().all(|byte| byte.is_ascii_digit()));
    match digits.and_then(|digits| digits.parse().ok()) {
        Some(millis) => Ok(Some(Duration::from_millis(millis))),
        None => Err(Failure::new("invalid_argument", "connect-timeout-ms is a number of at most 10 digits")),
    }
}

impl Form {
    fn of(headers: &HeaderMap) -> Option<Self> {
        let text = headers.get(CONTENT_TYPE)?.to_str().ok()?;
        let kind = text.split(';').next().unwrap_or_default().trim();
        match kind.to_ascii_lowercase().as_str() {
            "application/proto" => Some(Form::Proto),
            "application/json" => Some(Form::Json),
            _ => None,
        }
    }

    /// Of protobuf, as field 1 of an answer.
    fn write_entry(self, out: &mut Vec<u8>, record: RecordRef<'_>, left: Option<Duration>) {
        let (key, value): (&str, &[u8]) = (record.key.as_str(), &record.value);
        // Nothing left is not the same as no end.
        let left = left.map(|left| left.max(Duration::from_millis(1)));
        match self {
            Form::Proto => {
                let mut duration = Vec::new();
                if let Some(left) = left {
                    let mut parts = Vec::new();
                    write_number(&mut parts, 1, left.as_secs());
                    write_number(&mut parts, 2, left.subsec_nanos().into());
                    write_bytes(&mut duration, 5, &parts);
                }
                let mut head = Vec::new();
                write_bytes(&mut head, 1, key.as_bytes());
                if !value.is_empty() {
                    write_head(&mut head, 2, value.len());
                }
                write_head(out, 1, head.len().saturating_add(value.len()).saturating_add(duration.len()));
                for part in [&head, value, &duration] {
                    out.extend_from_slice(part);
                }
            }
            Form::Json => {
                out.extend_from_slice(b"{\"key\":");
                write_text(out, key);
                if !value.is_empty() {
                    out.extend_from_slice(b",\"value\":\"");
                    out.extend_from_slice(STANDARD.encode(value).as_bytes());
                    out.push(b'"');
                }
                if let Some(left) = left {
                    let text = format!(",\"expiry\":\"{}.{:03}s\"", left.as_secs(), left.subsec_millis());
                    out.extend_from_slice(text.as_bytes());
                }
                out.push(b'}');
            }
        }
    }

    /// Entries as an answer: of protobuf they are one already.
    fn wrapped(self, begin: &[u8], entries: Vec<u8>, end: &[u8]) -> Vec<u8> {
        match self {
            Form::Proto => entries,
            Form::Json => [begin, &entries, end].concat(),
        }
    }

    fn exists(self, exists: bool) -> Vec<u8> {
        match (self, exists) {
            (_, false) => self.nothing(),
            (Form::Proto, true) => b"\x08\x01".to_vec(),
            (Form::Json, true) => b"{\"exists\":true}".to_vec(),
        }
    }

    /// A message without fields.
    fn nothing(self) -> Vec<u8> {
        match self {
            Form::Proto => Vec::new(),
            Form::Json => b"{}".to_vec(),
        }
    }

    fn answer(self, ctx: Ctx<'_>, bytes: Vec<u8>) -> Answer {
        let kind = match self {
            Form::Proto => "application/proto",
            Form::Json => "application/json",
        };
        let mut answer = Answer::new(Body::counted(bytes.into(), ctx.conn));
        let headers = answer.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        answer
    }
}

impl Failure {
    fn new(code: &'static str, message: impl Into<String>) -> Self {
        Failure { code, message: message.into() }
    }

    fn into_answer(self) -> Answer {
        let mut out = format!("{{\"code\":\"{}\",\"message\":", self.code).into_bytes();
        write_text(&mut out, &self.message);
        out.push(b'}');
        let mut answer = Answer::new(full(out));
        *answer.status_mut() = match self.code {
            "invalid_argument" | "failed_precondition" => StatusCode::BAD_REQUEST,
            "permission_denied" => StatusCode::FORBIDDEN,
            "not_found" => StatusCode::NOT_FOUND,
            "resource_exhausted" => StatusCode::TOO_MANY_REQUESTS,
            "unimplemented" => StatusCode::NOT_IMPLEMENTED,
            "unavailable" => StatusCode::SERVICE_UNAVAILABLE,
            "deadline_exceeded" => StatusCode::GATEWAY_TIMEOUT,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let headers = answer.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        answer
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        let code = match problem.kind() {
            "bad-request" | "invalid-key" => "invalid_argument",
            "forbidden" => "permission_denied",
            "too-slow" => "deadline_exceeded",
            "too-large" | "too-many" | "disk-full" => "resource_exhausted",
            "coded-content" | "not-supported" => "unimplemented",
            "unavailable" => "unavailable",
            // As it was, before and after a node runs.
            "stopping" => return Failure::new("failed_precondition", "cluster node not started"),
            "outcome-unknown" => "unknown",
            _ => "internal",
        };
        Failure::new(code, problem.detail())
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Problem::from(error).into()
    }
}

impl<'a> Message<'a> {
    fn from_proto(bytes: &'a [u8]) -> Result<Self, String> {
        let (mut message, mut duration) = (Message::default(), None::<(i64, i32)>);
        let mut fields = Fields(bytes);
        while let Some(field) = fields.next_field()? {
            match field {
                (1, Field::Bytes(text)) => {
                    let text = std::str::from_utf8(text).map_err(|_| "field 'key' is not UTF-8")?;
                    message.key = text.into();
                }
                (2, Field::Bytes(value)) => message.value = value.into(),
                (3, Field::Bytes(parts)) => {
                    // Given twice, a message is the two of them together.
                    let (seconds, nanos) = duration.get_or_insert_default();
                    let mut parts = Fields(parts);
                    while let Some(part) = parts.next_field()? {
                        match part {
                            (1, Field::Number(number)) => *seconds = number.cast_signed(),
                            // Of a longer number the low half counts.
                            (2, Field::Number(number)) => {
                                *nanos = u32::try_from(number & u64::from(u32::MAX)).unwrap_or_default().cast_signed();
                            }
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        let expiry = duration.map(|(seconds, nanos)| {
            let is_one = seconds == 0 || nanos == 0 || (seconds < 0) == (nanos < 0);
            let (whole, part) = (seconds.unsigned_abs(), nanos.unsigned_abs());
            let is_negative = seconds < 0 || nanos < 0;
            if is_one { expiry(is_negative, whole, part) } else { None }
        });
        message.expiry = expiry.map_or(Ok(None), |expiry| expiry.ok_or("field 'expiry' is not a duration"))?;
        Ok(message)
    }

    fn from_json(bytes: &[u8]) -> Result<Self, String> {
        /// As protobuf's JSON has it: `null` is absent, other fields are passed over.
        #[derive(Deserialize)]
        struct Object {
            key: Option<String>,
            value: Option<String>,
            expiry: Option<String>,
        }

        let object: Object = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        let value = object.value.unwrap_or_default();
        let value = any_base64(&value).ok_or("field 'value' is not base64")?;
        let wrong = "field 'expiry' is not a duration such as 1.5s";
        let expiry = object.expiry.map(|text| read_duration(&text).ok_or(wrong)).transpose()?;
        Ok(Message { key: object.key.unwrap_or_default().into(), value: value.into(), expiry: expiry.flatten() })
    }
}

/// Base64 of either alphabet, with or without padding.
fn any_base64(text: &str) -> Option<Vec<u8>> {
    const CONFIG: GeneralPurposeConfig =
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let alphabet = match text.contains(['-', '_']) {
        true => base64::alphabet::URL_SAFE,
        false if text.ends_with('=') => return from_base64(text),
        false => base64::alphabet::STANDARD,
    };
    GeneralPurpose::new(&alphabet, CONFIG).decode(text).ok()
}

/// `1.5s`: how long an entry lives, if it ends; `None` if it is no duration.
fn read_duration(text: &str) -> Option<Option<Duration>> {
    let number = text.strip_suffix('s')?;
    let (is_negative, number) = number.strip_prefix('-').map_or((false, number), |number| (true, number));
    let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
    let are_digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !are_digits(whole) || !are_digits(part) || part.len() > 9 {
        return None;
    }
    let nanos = format!("{part:0<9}").parse().ok()?;
    expiry(is_negative, whole.parse().ok()?, nanos)
}

/// The expiry that a duration means: none, unless it is more than nothing. `None` if it is longer than a duration may be.
fn expiry(is_negative: bool, seconds: u64, nanos: u32) -> Option<Option<Duration>> {
    if seconds > SECONDS_MAX || nanos >= NANOS {
        return None;
    }
    let duration = Duration::new(seconds, nanos);
    // Entries live for whole milliseconds, and at least one.
    Some((!is_negative && !duration.is_zero()).then(|| duration.max(Duration::from_millis(1))))
}

/// A field of protobuf's wire format.
#[derive(Debug)]
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    /// Of a fixed length: none of ours.
    Other,
}

/// The fields of a message.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn next_field(&mut self) -> Result<Option<(u64, Field<'a>)>, String> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let tag = self.number()?;
        let field = match tag & 7 {
            0 => Field::Number(self.number()?),
            1 => self.take(8).map(|_| Field::Other)?,
            2 => {
                let len = self.number()?;
                Field::Bytes(self.take(len)?)
            }
            5 => self.take(4).map(|_| Field::Other)?,
            kind => return Err(format!("the message has a field of type {kind}")),
        };
        match tag >> 3 {
            0 => Err("the message has a field 0".into()),
            number => Ok(Some((number, field))),
        }
    }

    fn number(&mut self) -> Result<u64, String> {
        let mut number = 0_u64;
        for shift in (0..64).step_by(7) {
            let [byte] = self.take(1)? else { break };
            let bits = u64::from(byte & 0x7f);
            // The tenth byte has room for one bit.
            if shift == 63 && bits > 1 {
                break;
            }
            number |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err("the message has a number that is too long".into())
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8], String> {
        let at = usize::try_from(len).unwrap_or(usize::MAX);
        let (taken, rest) = self.0.split_at_checked(at).ok_or("the message breaks off")?;
        self.0 = rest;
        Ok(taken)
    }
}

/// A field that is a number, unless it is 0.
fn write_number(out: &mut Vec<u8>, field: u8, number: u64) {
    if number > 0 {
        out.push(field << 3);
        write_varint(out, number);
    }
}

fn write_bytes(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    write_head(out, field, bytes.len());
    out.extend_from_slice(bytes);
}

/// What stands before the bytes of a field.
fn write_head(out: &mut Vec<u8>, field: u8, len: usize) {
    out.push(field << 3 | 2);
    write_varint(out, len as u64);
}

fn write_varint(out: &mut Vec<u8>, mut number: u64) {
    while number > 0x7f {
        out.push(u8::try_from(number & 0x7f).unwrap_or_default() | 0x80);
        number >>= 7;
    }
    out.push(u8::try_from(number).unwrap_or_default());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(key: &'static str, value: &'static [u8], expiry_ms: Option<u64>) -> Message<'static> {
        Message { key: key.into(), value: value.into(), expiry: expiry_ms.map(Duration::from_millis) }
    }

    #[test]
    fn a_message_is_read_as_protobuf_has_it() {
        let read = |bytes| Message::from_proto(bytes);
        assert_eq!(read(b""), Ok(Message::default()));
        let put = b"\x0a\x01k\x12\x02v\xff\x1a\x08\x08\x01\x10\x80\xca\xb5\xee\x01";
        assert_eq!(read(put), Ok(message("k", b"v\xff", Some(1_500))));
        // The last of a field counts, of a message all; unknown fields, and known ones of another type, are passed over.
        let twice = b"\x0a\x01j\x0a\x01k\x1a\x02\x08\x01\x1a\x02\x08\x02\x20\x05\x2d1234\x31abcdefgh\x3a\x01x\x10\x07";
        assert_eq!(read(twice), Ok(message("k", b"", Some(2_000))));
        // No time at all, or less, is no end; less than a millisecond is one.
        let minus_one = b"\x1a\x0b\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01";
        for (bytes, expiry_ms) in [
            (b"\x1a\x00".as_slice(), None),
            (minus_one, None),
            (b"\x1a\x02\x10\x01", Some(1)),
            (b"\x1a\x04\x08\x00\x10\x01", Some(1)),
        ] {
            let expiry = expiry_ms.map(|ms: u64| Duration::from_millis(ms));
            assert_eq!(read(bytes).map(|message| message.expiry), Ok(expiry), "{bytes:?}");
        }
        for wrong in [
            b"\x0a".as_slice(),
            b"\x0a\x05k",
            b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
            b"\x0a\x01\xff",
            b"\x0b\x0c",
            b"\x00\x01",
            b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02",
            b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
            b"\x1a\x06\x10\x80\x94\xeb\xdc\x03",
            b"\x1a\x0d\x08\x01\x10\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
            b"\x1a\x07\x08\xff\xff\xff\xff\xff\x7f",
        ] {
            assert!(read(wrong).is_err(), "{wrong:?}: {:?}", read(wrong));
        }
    }

    #[test]
    fn a_message_is_read_as_protobufs_json_has_it() {
        let read = |text: &str| Message::from_json(text.as_bytes());
        assert_eq!(read("{}"), Ok(Message::default()));
        assert_eq!(
            read(r#"{"key":"k","value":"dv8=","expiry":"1.5s","x":1}"#),
            Ok(message("k", b"v\xff", Some(1_500)))
        );
        assert_eq!(read(r#"{"key":null,"value":null,"expiry":null}"#), Ok(Message::default()));
        for value in ["+/8=", "-_8=", "+/8", "-_8"] {
            assert_eq!(read(&format!(r#"{{"value":"{value}"}}"#)), Ok(message("", b"\xfb\xff", None)), "{value}");
        }
        for (text, expiry_ms) in
            [("0s", None), ("-1s", None), ("-0.5s", None), ("0.000000001s", Some(1)), ("60s", Some(60_000))]
        {
            assert_eq!(read(&format!(r#"{{"expiry":"{text}"}}"#)), Ok(message("", b"", expiry_ms)), "{text}");
        }
        for text in ["", "1", "s", "1.s", ".5s", "1.0000000001s", "+1s", "1e3s", "315576000001s", "--1s"] {
            assert!(read(&format!(r#"{{"expiry":"{text}"}}"#)).is_err(), "{text}");
        }
        for wrong in ["", "[]", "{", r#"{"key":1}"#, r#"{"value":"*"}"#, r#"{"key":"a","key":"b"}"#] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_problem_has_a_code_with_the_status_of_connect() {
        for (kind, ..) in crate::problem::KINDS {
            let failure = Failure::from(Problem::new(kind, "x"));
            let is_ours = matches!(kind, "internal" | "storage-failed" | "outcome-unknown");
            let may_come = is_ours || !matches!(failure.code, "internal" | "unknown");
            // What no call can meet: conditions, paths, upgrades.
            let never = ["foreign-", "no-", "not-found", "wrong-method", "conflict", "other-epoch", "upgrade"];
            assert!(may_come || never.iter().any(|part| kind.starts_with(part)), "{kind}: {}", failure.code);
        }
        assert_eq!(Failure::new("not_found", "x").into_answer().status(), 404);
        let closed = Failure::from(Error::new(nkv_node::ErrorKind::Closed, "the node has stopped"));
        assert_eq!((closed.code, closed.message.as_str()), ("failed_precondition", "cluster node not started"));
    }
}
