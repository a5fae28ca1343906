//! The golden transcripts of `nkv-protocol`, replayed against a server.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use support::{Conn, TestServer};

/// What differs from run to run is named instead of shown.
fn normalised(line: &str) -> String {
    let mut line = line.to_owned();
    for (field, name) in
        [("\"epoch\":\"", "EPOCH"), ("\"version\":\"", "VERSION"), ("\"peer\":\"", "PEER"), ("_ms\":", "MS")]
    {
        let mut from = 0;
        while let Some(found) = line[from..].find(field) {
            let start = from + found + field.len();
            let end = start + line[start..].find(['"', ',', '}']).unwrap();
            line.replace_range(start..end, name);
            from = start;
        }
    }
    line
}

#[test]
fn a_server_answers_as_the_transcripts_say() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../nkv-protocol/tests/golden");
    let mut lines = 0;
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let transcript = fs::read_to_string(&path).unwrap();
        let server = TestServer::start();
        let mut connections = HashMap::new();
        for (at, line) in transcript.lines().enumerate().filter(|(_, line)| !line.starts_with('#')) {
            let (name, text) = line.split_once(['>', '<']).unwrap();
            let text = text.strip_prefix(' ').unwrap_or(text);
            let connection: &mut Conn = connections.entry(name).or_insert_with(|| server.connect());
            if line.as_bytes()[name.len()] == b'>' {
                connection.send(text);
            } else {
                let received = normalised(&connection.line());
                assert_eq!(received, text, "{}:{}", path.display(), at + 1);
                lines += 1;
            }
        }
    }
    assert!(lines > 60, "only {lines} lines were compared");
}
