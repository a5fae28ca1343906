//! What must hold for any input, of the fuzz targets (`fuzz/`) and of the corpus that `corpus.rs` reads again.

use std::fmt;

use nkv_protocol::{Decoder, Limits, MessageDecoder};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

/// What is said of a request that is refused, in bytes: it quotes nothing that may be long.
const REFUSAL_LEN_MAX: usize = 512;

/// The first byte of an input chooses the limits, the second how it is cut; what follows is the stream.
pub(crate) fn requests(data: &[u8]) {
    let [size, cut, stream @ ..] = data else { return };
    let value_len_max = [4, 64, 1 << 20][usize::from(size % 3)];
    let limits = Limits { value_len_max, skip_len_max: [0, 200, 64 << 20][usize::from(size / 3 % 3)] };
    let whole = decode(limits, stream, usize::MAX);
    assert_eq!(decode(limits, stream, 1 + usize::from(*cut)), whole, "in pieces of {}", 1 + cut);
    // In step: messages end where the framing says, whether they are served or refused.
    for (at, (line_end, end)) in framing(limits, stream).into_iter().enumerate() {
        let Some(seen) = whole.get(at) else { panic!("message {at}, up to {end}, is passed over") };
        assert!(seen.end == end || seen.end == line_end && seen.refused, "{seen:?} ends at {line_end} or {end}");
    }
    for line in stream.split(|byte| *byte == b'\n') {
        the_same_with_an_unknown_field(limits, line);
    }
}

/// An unknown field is ignored, but it keeps a line from being of the usual shape: both ways of reading a request
/// must make the same of it.
fn the_same_with_an_unknown_field(limits: Limits, line: &[u8]) {
    let [b'{', fields @ ..] = line.trim_ascii() else { return };
    let unknown = b"{\"\\u003f\":[],";
    if fields.trim_ascii_start().starts_with(b"}") || line.len() + unknown.len() >= limits.line_len_max() {
        return;
    }
    let read = |start: &[u8]| {
        // The newlines are the end of the line and of its payload, if it has a short one.
        let input = [start, fields, &[b'\n'; 70]].concat();
        match Decoder::new(limits).decode(&input).item {
            Some(Ok(request)) => format!("{request:?}"),
            // What is wrong is reported by its place in the line.
            Some(Err(refusal)) => format!("{:?} {} {}", refusal.id, refusal.status, refusal.close),
            None => "incomplete".into(),
        }
    };
    assert_eq!(read(b"{"), read(unknown), "{}", String::from_utf8_lossy(line));
}

#[derive(Debug, PartialEq)]
struct Seen {
    what: String,
    refused: bool,
    close: bool,
    /// Where the decoder stands after it; of no meaning once the connection closes.
    end: usize,
}

/// What a decoder makes of a stream that comes in pieces.
fn decode(limits: Limits, stream: &[u8], piece_len: usize) -> Vec<Seen> {
    let message_len_max = limits.line_len_max() + limits.value_len_max + 1;
    let (mut decoder, mut seen) = (Decoder::new(limits), Vec::new());
    let (mut start, mut there) = (0, 0);
    while there < stream.len() {
        there = there.saturating_add(piece_len).min(stream.len());
        loop {
            let input = &stream[start..there];
            let decoded = decoder.decode(input);
            assert!(decoded.consumed <= input.len(), "{} of {}", decoded.consumed, input.len());
            start += decoded.consumed;
            let Some(item) = decoded.item else { break };
            assert!(decoded.consumed > 0, "an item of nothing");
            let said_len = item.as_ref().map_or_else(|refusal| refusal.message.len(), |_| 0);
            assert!(said_len <= REFUSAL_LEN_MAX, "a refusal of {said_len} bytes");
            let (refused, close) = (item.is_err(), item.as_ref().is_err_and(|refusal| refusal.close));
            let end = if close { usize::MAX } else { start };
            seen.push(Seen { what: format!("{item:?}"), refused, close, end });
            if close {
                return seen;
            }
        }
        assert!(there - start <= message_len_max, "{} bytes are kept", there - start);
        assert!(decoder.expected_len().is_none_or(|len| len <= message_len_max));
    }
    seen
}

/// Where the line and the whole of each message end, found by another parser: up to the first line that is no JSON
/// object or too long, or payload that is too long or not ended.
fn framing(limits: Limits, stream: &[u8]) -> Vec<(usize, usize)> {
    let (mut ends, mut at) = (Vec::new(), 0);
    while let Some(len) = stream[at..].iter().position(|byte| *byte == b'\n') {
        let (line, line_end) = (stream[at..at + len].trim_ascii(), at + len + 1);
        if len >= limits.line_len_max() {
            break;
        }
        at = line_end;
        if line.is_empty() {
            continue;
        }
        let Ok(Fields(fields)) = serde_json::from_slice(line) else { break };
        let payload_len = fields.iter().filter(|(name, _)| name == "len").find_map(|(_, value)| value.as_u64());
        if let Some(payload_len) = payload_len {
            if payload_len > limits.skip_len_max {
                break;
            }
            at += payload_len as usize + 1;
        }
        if stream.get(at - 1) != Some(&b'\n') {
            break;
        }
        ends.push((line_end, at));
    }
    ends
}

/// A JSON object's fields in order, those given twice included.
struct Fields(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FieldsVisitor;
        impl<'de> Visitor<'de> for FieldsVisitor {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(FieldsVisitor)
    }
}

/// The first byte of an input chooses how it is cut; what follows is the stream.
pub(crate) fn messages(data: &[u8]) {
    let [cut, stream @ ..] = data else { return };
    assert_eq!(read(stream, 1 + usize::from(*cut)), read(stream, usize::MAX), "in pieces of {}", 1 + cut);
}

/// What a client makes of a stream that comes in pieces, and where it stands after each message.
fn read(stream: &[u8], piece_len: usize) -> Vec<(String, usize)> {
    let (mut decoder, mut seen) = (MessageDecoder::new(), Vec::new());
    let (mut start, mut there) = (0, 0);
    while there < stream.len() {
        there = there.saturating_add(piece_len).min(stream.len());
        loop {
            let (consumed, message) = match decoder.decode(&stream[start..there]) {
                Ok(decoded) => decoded,
                Err(error) => {
                    seen.push((error.to_string(), usize::MAX));
                    return seen;
                }
            };
            assert!(consumed <= there - start, "{consumed} of {}", there - start);
            start += consumed;
            let Some(message) = message else { break };
            assert!(consumed > 0, "a message of nothing");
            seen.push((format!("{message:?}"), start));
        }
    }
    seen
}
