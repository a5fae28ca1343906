//! The paths of kv-store, the HTTP store that nkv takes the place of: `/get`, `/getall`, `/set` and `/subscribe`, as its curl lines and
//! its command line need them. What it did wrong is mended: an absent key is a 404, every subscriber hears every change, and no queue
//! is needed.

use std::borrow::Cow;
use std::fmt;
use std::ops::ControlFlow;

use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderValue, Request, StatusCode};
use hyper::body::Incoming;
use nkv_core::{Key, Pattern, RecordRef};
use nkv_node::{TailEvent, TailOptions};
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::body::{Answer, Body, Received, full, receive};
use crate::connection::Upgrade;
use crate::list::PART_LEN;
use crate::making::{FIRST_LEN, Making};
use crate::problem::Problem;
use crate::route::Ctx;
use crate::ws;

/// An answer to `/getall` is no longer than this.
const LEN_MAX: usize = 64 << 20;

/// What a pair takes besides its texts.
const PAIR_LEN: usize = 64;

/// How many bytes a request may have beyond a value, which JSON makes up to six times as long.
const FORM_LEN: usize = 32 << 10;

/// What a request names; names in any letter case, others passed over, absent ones empty.
#[derive(Debug, Default, PartialEq, Eq)]
struct Pair {
    key: String,
    value: String,
}

pub(crate) async fn get(ctx: Ctx<'_>, request: Request<Incoming>) -> Result<Answer, Problem> {
    let (_received, pair) = match read(ctx, request).await? {
        Ok(read) => read,
        Err(refusal) => return Ok(refusal),
    };
    let key = match Key::new(&pair.key) {
        Ok(key) => key,
        Err(error) => return Ok(text(StatusCode::BAD_REQUEST, &error.to_string())),
    };
    let Some(entry) = ctx.door.handle.get(&key).await? else {
        return Ok(text(StatusCode::NOT_FOUND, "The given key is not present in the data store."));
    };
    let Ok(value) = std::str::from_utf8(&entry.value) else {
        return Ok(text(StatusCode::UNPROCESSABLE_ENTITY, "the value is not UTF-8: read it at /v1/kv/"));
    };
    let mut out = b"{\"Key\":".to_vec();
    write_go(&mut out, key.as_str());
    out.extend_from_slice(b",\"Value\":");
    write_go(&mut out, value);
    out.extend_from_slice(b"}\n");
    Ok(json(ctx, out))
}

pub(crate) async fn get_all(ctx: Ctx<'_>) -> Result<Answer, Problem> {
    let handle = &ctx.door.handle;
    let (mut making, mut after, mut has_turn) = (Making::new(ctx), None, false);
    let mut pairs: Vec<(String, String)> = Vec::new();
    let mut len = 0_usize;
    loop {
        let (begin, mut count, mut last) = (len, 0_usize, None);
        let ended = handle.walk(&Pattern::All, after.as_ref(), |record: RecordRef<'_>| {
            let part_len = if after.is_none() { FIRST_LEN } else { PART_LEN };
            let is_full = len.saturating_sub(begin).saturating_add(record.value.len()) > part_len;
            if count >= 1_024 || is_full && (count > 0 || after.is_none() && !has_turn) {
                return ControlFlow::Break(());
            }
            count = count.saturating_add(1);
            last = Some(record.key.to_key());
            // A value that is no text has no form there.
            if let Ok(value) = std::str::from_utf8(&record.value) {
                len =
                    len.saturating_add(record.key.as_str().len()).saturating_add(value.len()).saturating_add(PAIR_LEN);
                pairs.push((record.key.as_str().to_owned(), value.to_owned()));
            }
            ControlFlow::Continue(())
        })?;
        if len > LEN_MAX {
            return Ok(too_much());
        }
        if ended.is_continue() {
            break;
        }
        making.turn().await;
        has_turn = true;
        making.grow(len).await;
        after = last.or(after);
        tokio::task::yield_now().await;
    }
    // What takes long is done elsewhere: others are served meanwhile.
    let written = tokio::task::spawn_blocking(move || write_pairs(pairs)).await;
    let out = written.map_err(|error| Problem::new("internal", error.to_string()))?;
    Ok(out.map_or_else(too_much, |out| json(ctx, out)))
}

fn too_much() -> Answer {
    let detail = "all pairs together have more than 64 MiB: read them in pages at /v1/kv";
    text(StatusCode::PAYLOAD_TOO_LARGE, detail)
}

/// Writes pairs as one object; `None` if that is too long. The original sorts them by bytes, and nkv by segments.
fn write_pairs(mut pairs: Vec<(String, String)>) -> Option<Vec<u8>> {
    pairs.sort_unstable();
    let mut out = b"{".to_vec();
    for (key, value) in pairs {
        if out.len() > 1 {
            out.push(b',');
        }
        write_go(&mut out, &key);
        out.push(b':');
        write_go(&mut out, &value);
        if out.len() > LEN_MAX {
            return None;
        }
    }
    out.extend_from_slice(b"}\n");
    Some(out)
}

pub(crate) async fn set(ctx: Ctx<'_>, request: Request<Incoming>) -> Result<Answer, Problem> {
    let (received, pair) = match read(ctx, request).await? {
        Ok(read) => read,
        Err(refusal) => return Ok(refusal),
    };
    match ctx.door.handle.put(pair.key.as_str(), pair.value).await {
        Ok(_) => {
            drop(received);
            Ok(json(ctx, b"\"SUCCESS\"\n".to_vec()))
        }
        Err(error) => {
            let problem = Problem::from(error);
            Ok(text(problem.status(), problem.detail()))
        }
    }
}

/// Every change from now on, in the form of a record of the queue.
pub(crate) fn subscribe(ctx: Ctx<'_>, mut request: Request<Incoming>) -> Result<Answer, Problem> {
    let Some(answer) = ws::accept(&request) else {
        let mut answer = text(StatusCode::BAD_REQUEST, "Bad Request");
        answer.headers_mut().insert("sec-websocket-version", HeaderValue::from_static("13"));
        return Ok(answer);
    };
    let options = TailOptions::default().with_snapshot(false).with_peer(ctx.conn.peer());
    let changes = ctx.door.handle.tail(Pattern::All, options)?;
    ctx.conn.load.observe(&changes.observer());
    ctx.conn.upgrade_to(Upgrade::Records(hyper::upgrade::on(&mut request), Box::new(changes)));
    Ok(answer)
}

/// The record of a change, if it has one: deletes have none, and values that are no text.
pub(crate) fn record(event: &TailEvent) -> Option<String> {
    let TailEvent::Put { entry, .. } = event else { return None };
    let value = std::str::from_utf8(&entry.value).ok()?;
    let mut out = format!("{{\"Topic\":\"command-log\",\"Partition\":0,\"Offset\":{},", entry.revision).into_bytes();
    // The setter is not known of a change that may stand for several.
    out.extend_from_slice(b"\"Key\":\"Client address=unknown\",\"Value\":");
    write_go(&mut out, &format!("{}: {value}", entry.key));
    out.extend_from_slice(b"}\n");
    String::from_utf8(out).ok()
}

/// The pair of a request, or what it is answered instead.
async fn read(ctx: Ctx<'_>, request: Request<Incoming>) -> Result<Result<(Received, Pair), Answer>, Problem> {
    let handle = &ctx.door.handle;
    let len_max = handle.limits().value_len_max.saturating_mul(6).saturating_add(FORM_LEN);
    let received = receive(handle, ctx.conn, request, len_max).await?;
    Ok(match pair(&received.bytes) {
        Ok(pair) => Ok((received, pair)),
        Err(message) => Err(text(StatusCode::BAD_REQUEST, &message)),
    })
}

/// Of the body the first JSON value counts.
fn pair(body: &[u8]) -> Result<Pair, String> {
    let mut values = serde_json::Deserializer::from_slice(body).into_iter::<Option<Pair>>();
    match values.next() {
        None => Err("EOF".into()),
        Some(Err(error)) if error.is_eof() => Err("unexpected EOF".into()),
        Some(Err(error)) => Err(error.to_string()),
        Some(Ok(pair)) => Ok(pair.unwrap_or_default()),
    }
}

impl<'de> Deserialize<'de> for Pair {
    /// Of a name that is given twice the last counts.
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Fields;

        impl<'de> Visitor<'de> for Fields {
            type Value = Pair;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with Key and Value")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pair, A::Error> {
                let mut pair = Pair::default();
                while let Some(name) = map.next_key::<Cow<'_, str>>()? {
                    let field = match name.to_ascii_lowercase().as_str() {
                        "key" => &mut pair.key,
                        "value" => &mut pair.value,
                        _ => {
                            map.next_value::<IgnoredAny>()?;
                            continue;
                        }
                    };
                    // What is null leaves it as it is.
                    if let Some(text) = map.next_value::<Option<String>>()? {
                        *field = text;
                    }
                }
                Ok(pair)
            }
        }

        from.deserialize_map(Fields)
    }
}

fn json(ctx: Ctx<'_>, bytes: Vec<u8>) -> Answer {
    let mut answer = Answer::new(Body::counted(bytes.into(), ctx.conn));
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    answer
}

fn text(status: StatusCode, line: &str) -> Answer {
    let mut answer = Answer::new(full(format!("{line}\n")));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

/// A JSON string as Go writes it: what HTML would understand is escaped.
fn write_go(out: &mut Vec<u8>, text: &str) {
    let begin = out.len();
    crate::entry::write_text(out, text);
    let is_plain =
        memchr::memchr3(b'<', b'>', b'&', text.as_bytes()).is_none() && !text.contains(['\u{2028}', '\u{2029}']);
    if is_plain {
        return;
    }
    let written = out.split_off(begin);
    for char in String::from_utf8_lossy(&written).chars() {
        match char {
            '<' => out.extend_from_slice(b"\\u003c"),
            '>' => out.extend_from_slice(b"\\u003e"),
            '&' => out.extend_from_slice(b"\\u0026"),
            '\u{2028}' => out.extend_from_slice(b"\\u2028"),
            '\u{2029}' => out.extend_from_slice(b"\\u2029"),
            char => out.extend_from_slice(char.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_as_the_original_did() {
        let of = |key: &str, value: &str| Ok(Pair { key: key.into(), value: value.into() });
        assert_eq!(pair(br#"{"Key":"k","Value":"v"}"#), of("k", "v"));
        assert_eq!(pair(br#" {"kEY":"k","other":[1]} {"Key":"x"}"#), of("k", ""));
        assert_eq!(pair(b"{}"), of("", ""));
        assert_eq!(pair(b""), Err("EOF".into()));
        assert_eq!(pair(br#"{"Key":"#), Err("unexpected EOF".into()));
        assert!(pair(br#"{"Key":1}"#).is_err());
        assert!(pair(b"[]").is_err());
        let mut out = Vec::new();
        write_go(&mut out, "<a&b>\"\u{2028}ü");
        assert_eq!(out, "\"\\u003ca\\u0026b\\u003e\\\"\\u2028ü\"".as_bytes());
    }
}
