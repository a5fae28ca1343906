//! What the door parses by itself, on bytes that a fuzzer made. Each check holds for any input.

#![allow(clippy::panic, reason = "it shall fail when something is wrong")]

use http::header::{HOST, IF_MATCH, IF_NONE_MATCH, ORIGIN};
use http::{HeaderMap, HeaderValue, Request};
use percent_encoding::{NON_ALPHANUMERIC, percent_encode};

use crate::batch::Items;
use crate::guard::{Guard, Passed};
use crate::query::{Query, decode_path};
use crate::tag::Conditions;
use crate::ws::Framer;

/// One request: lines of what is in its head, then a body.
pub fn request(data: &[u8]) {
    let mut parts = data.splitn(7, |byte| *byte == b'\n');
    let mut next = || parts.next().unwrap_or_default();
    path(next());
    query(next());
    let [host, origin, if_match, if_none_match] = [next(), next(), next(), next()];
    guard(host, origin);
    conditions(if_match, if_none_match);
    body(next());
}

/// A key is the text that was encoded, and nothing else.
fn path(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let encoded = percent_encode(bytes, NON_ALPHANUMERIC).to_string();
    assert_eq!(decode_path(&encoded).ok().as_deref(), Some(text), "{encoded}");
    drop(decode_path(text));
}

fn query(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(query) = Query::read(Some(text), &["pattern*", "limit", "ttl", "values"]) else { return };
    for name in ["limit", "ttl", "values"] {
        assert!(query.all(name).count() <= 1, "{text}");
    }
    drop((query.number("limit"), query.duration("ttl"), query.flag("values", true)));
}

/// No other origin than one's own passes, and no name that is not known.
fn guard(host: &[u8], origin: &[u8]) {
    let (Ok(named), Ok(from)) = (HeaderValue::from_bytes(host), HeaderValue::from_bytes(origin)) else { return };
    let Ok(mut request) = Request::get("/v1/kv").body(()) else { return };
    request.headers_mut().insert(HOST, named);
    if !origin.is_empty() {
        request.headers_mut().insert(ORIGIN, from);
    }
    if let Ok(passed) = Guard::default().check(&request) {
        assert_eq!(passed, Passed::Ours);
        let is =
            |text: &[u8], name: &str| text.to_ascii_lowercase().windows(name.len()).any(|part| part == name.as_bytes());
        let is_name = !host.is_empty() && !host.iter().any(|byte| byte.is_ascii_digit() || *byte == b':');
        assert!(!is_name || is(host, "localhost"), "{}", host.escape_ascii());
        assert!(origin.is_empty() || origin.to_ascii_lowercase().starts_with(b"http"), "{}", origin.escape_ascii());
    }
}

/// A condition that cannot be read is an error; one that is read holds for the tag that it names.
fn conditions(if_match: &[u8], if_none_match: &[u8]) {
    let mut headers = HeaderMap::new();
    for (name, bytes) in [(IF_MATCH, if_match), (IF_NONE_MATCH, if_none_match)] {
        if let Ok(value) = HeaderValue::from_bytes(bytes)
            && !bytes.is_empty()
        {
            headers.insert(name, value);
        }
    }
    if let Ok(read) = Conditions::read(&headers, true) {
        assert_eq!(read.are_empty(), headers.is_empty());
        if !headers.is_empty() {
            let holds = read.check(None).is_ok();
            assert_eq!(holds, !headers.contains_key(IF_MATCH), "an absent key matches a tag, or fails without one");
        }
    }
}

/// A batch, and the messages of a WebSocket: cut anywhere, they are the same.
fn body(bytes: &[u8]) {
    if let Ok(items) = serde_json::from_slice::<Items>(bytes) {
        drop(items);
    }
    let frames = |piece_len: usize| {
        let (mut framer, mut frames) = (Framer::default(), Vec::new());
        bytes
            .chunks(piece_len)
            .for_each(|piece| framer.frame(piece, |kind, bytes| frames.push((kind, bytes.to_vec()))));
        frames
    };
    assert_eq!(frames(bytes.len().max(1)), frames(1), "{}", bytes.escape_ascii());
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    #[test]
    fn requests_of_the_corpus_hold() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/http");
        let files: Vec<_> = dir.read_dir().unwrap().map(|file| std::fs::read(file.unwrap().path()).unwrap()).collect();
        assert!(files.len() >= 3, "{} holds no corpus", dir.display());
        files.iter().for_each(|file| super::request(file));
    }
}
