//! The golden transcripts, read by both decoders: every line sent is a request or its payload, every line received is
//! a message or its payload. The server replays them too, and the document shows them.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use nkv_protocol::{Decoder, Limits, MessageDecoder};

fn transcripts() -> BTreeMap<String, String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files.map(|path| (path.file_name().unwrap().to_string_lossy().into(), fs::read_to_string(path).unwrap())).collect()
}

/// What went over each connection in one direction.
fn streams(transcript: &str, direction: char) -> BTreeMap<&str, String> {
    let mut streams = BTreeMap::<_, String>::new();
    for line in transcript.lines() {
        if let Some((connection, text)) = line.split_once([direction].as_slice())
            && connection.len() <= 1
            && text != " (closed)"
        {
            let stream = streams.entry(connection).or_default();
            stream.push_str(text.strip_prefix(' ').unwrap_or(text));
            stream.push('\n');
        }
    }
    streams
}

#[test]
fn what_was_sent_is_requests() {
    for (name, transcript) in transcripts() {
        for (connection, stream) in streams(&transcript, '>') {
            let mut decoder = Decoder::new(Limits::default());
            let (mut start, mut seen) = (0, 0);
            loop {
                let decoded = decoder.decode(&stream.as_bytes()[start..]);
                start += decoded.consumed;
                match decoded.item {
                    None => break,
                    Some(Err(refusal)) if name != "errors.txt" && name != "conditions.txt" => {
                        assert!(refusal.message.contains("both 'value' and 'len'"), "{name}: {refusal:?}");
                    }
                    Some(_) => seen += 1,
                }
            }
            assert!(seen > 0, "{name} {connection}");
            // All but the payload whose length was given wrong was understood.
            let rest = &stream[start..];
            assert!(rest.is_empty() || name == "errors.txt", "{name} {connection}: {rest:?}");
        }
    }
}

#[test]
fn what_was_received_is_messages() {
    for (name, transcript) in transcripts() {
        for (connection, stream) in streams(&transcript, '<') {
            let stream = stream.replace(":MS", ":0");
            let mut decoder = MessageDecoder::new();
            let mut start = 0;
            while start < stream.len() {
                let (consumed, message) = decoder.decode(&stream.as_bytes()[start..]).unwrap();
                assert!(message.is_some(), "{name} {connection}: {}", &stream[start..]);
                start += consumed;
            }
        }
    }
}

#[test]
fn the_document_shows_every_transcript() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/protocol.md");
    let document = fs::read_to_string(path).unwrap();
    for (name, transcript) in transcripts() {
        assert!(document.contains(&transcript), "docs/protocol.md must show {name} as it is");
    }
}
