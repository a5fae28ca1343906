//! Where results go and what they look like.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;

use nkv_client::{EndReason, Entry, Event};
use serde_json::{Value, json};
use tokio::io::Interest;
use tokio::net::unix::pipe::Sender;

/// How results are shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    /// As JSON, one object per line.
    pub(crate) json: bool,
    /// In the interactive mode each answer is a line, and none goes to stderr.
    pub(crate) interactive: bool,
    /// Whether stdout is a terminal: then control characters are not written as they are.
    pub(crate) terminal: bool,
}

impl Output {
    pub(crate) fn new(json: bool, interactive: bool) -> Self {
        Output { json, interactive, terminal: io::stdout().is_terminal() }
    }

    /// A value and nothing else.
    pub(crate) fn value(self, value: &[u8]) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        if self.terminal {
            stdout.write_all(shown(value, Lines::Keep).as_bytes())?;
        } else {
            stdout.write_all(value)?;
        }
        if self.terminal || self.interactive {
            stdout.write_all(b"\n")?;
        }
        stdout.flush()
    }

    /// A line of a result.
    pub(crate) fn line(self, line: &[u8]) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(&self.readable(line))?;
        stdout.write_all(b"\n")?;
        stdout.flush()
    }

    /// A JSON object of a result.
    pub(crate) fn object(self, object: &Value) -> io::Result<()> {
        self.line(object.to_string().as_bytes())
    }

    /// What a person wants to know besides the result.
    pub(crate) fn note(self, note: &str) -> io::Result<()> {
        if self.interactive {
            return self.line(note.as_bytes());
        }
        complain(note);
        Ok(())
    }

    /// What a subscription tells, as a line. With no place for it, it is a note.
    pub(crate) fn event(self, pattern: &str, event: &Event) -> Line {
        if self.json {
            return Line::Result(event_json(pattern, event).to_string().into_bytes());
        }
        let line = match event {
            Event::Update { entry, .. } => return Line::Result(self.readable(&key_value(entry)).into_owned()),
            Event::Gone { key, reason, .. } => {
                return Line::Result(self.readable(format!("{key} {}", reason.as_str()).as_bytes()).into_owned());
            }
            Event::Synced { revision, .. } => format!("{pattern}: synced at revision {revision}"),
            Event::Reconnecting => format!("{pattern}: connection lost, reconnecting"),
            Event::Connected { .. } => format!("{pattern}: connected again"),
            Event::Ended(reason) => format!("{pattern}: ended, {}", ended(reason)),
            other => format!("{pattern}: {other:?}"),
        };
        Line::Note(shown(line.as_bytes(), Lines::Escape))
    }

    fn readable(self, line: &[u8]) -> std::borrow::Cow<'_, [u8]> {
        if self.terminal { shown(line, Lines::Escape).into_bytes().into() } else { line.into() }
    }
}

/// What an event is shown as.
pub(crate) enum Line {
    /// Something of a key.
    Result(Vec<u8>),
    /// Something of the subscription itself.
    Note(String),
}

/// Writes to stderr; when that is not possible, there is nobody left to tell.
pub(crate) fn complain(what: &str) {
    let what = if io::stderr().is_terminal() { shown(what.as_bytes(), Lines::Keep) } else { what.to_owned() };
    drop(writeln!(io::stderr().lock(), "{what}"));
}

/// Waits until the reader of stdout has gone; for ever where that cannot be known, such as for a file.
pub(crate) async fn reader_has_gone() {
    let stdout = io::stdout().as_fd().try_clone_to_owned();
    // Nothing is written through it, so it need not be a pipe, nor be set so that writing does not block.
    if let Ok(stdout) = stdout.and_then(Sender::from_owned_fd_unchecked)
        && stdout.ready(Interest::ERROR).await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

pub(crate) fn key_value(entry: &Entry) -> Vec<u8> {
    [entry.key.as_str().as_bytes(), b" = ", &entry.value].concat()
}

pub(crate) fn entry_json(op: &str, entry: &Entry) -> Value {
    json!({"op": op, "key": entry.key.as_str(), "value": value_json(&entry.value), "revision": entry.revision.get()})
}

/// As on the wire: a string, or an array of bytes where it is not UTF-8.
fn value_json(value: &[u8]) -> Value {
    std::str::from_utf8(value).map_or_else(|_| Value::from(value), Value::from)
}

fn event_json(pattern: &str, event: &Event) -> Value {
    match event {
        Event::Update { entry, skipped, .. } => {
            let mut object = entry_json("update", entry);
            object["skipped"] = (*skipped).into();
            object
        }
        Event::Gone { key, revision, reason, skipped, .. } => {
            json!({"op": reason.as_str(), "key": key.as_str(), "revision": revision.get(), "skipped": skipped})
        }
        Event::Synced { revision, epoch, .. } => {
            json!({"op": "synced", "key": pattern, "revision": revision.get(), "epoch": epoch.to_string()})
        }
        Event::Reconnecting => json!({"op": "reconnecting", "key": pattern}),
        Event::Connected { .. } => json!({"op": "connected", "key": pattern}),
        Event::Ended(reason) => json!({"op": "ended", "key": pattern, "reason": ended(reason)}),
        other => json!({"op": format!("{other:?}"), "key": pattern}),
    }
}

pub(crate) fn ended(reason: &EndReason) -> String {
    match reason {
        EndReason::Unsubscribed => "unsubscribed".into(),
        EndReason::Replaced => "replaced by another client of the same name".into(),
        EndReason::Refused { status, message } => format!("refused by the server: {status} {message}"),
        EndReason::TooMuch { len_max } => format!("more than {len_max} bytes of keys and values wait"),
        EndReason::Closed => "closed".into(),
        other => format!("{other:?}"),
    }
}

/// Whether line ends and tabs are shown as they are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lines {
    Keep,
    Escape,
}

/// Bytes as text that cannot take hold of a terminal: control and direction characters are escaped, and so are bytes
/// that are not UTF-8.
fn shown(bytes: &[u8], lines: Lines) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            let kept = lines == Lines::Keep && matches!(c, '\n' | '\t');
            let odd = c.is_control()
                || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
            if odd && !kept {
                text.extend(c.escape_default());
            } else {
                text.push(c);
            }
        }
        for byte in chunk.invalid() {
            write!(text, "\\x{byte:02x}").expect("writing to a string cannot fail");
        }
    }
    text
}

/// Keys, in key order, as an indented tree: one line per segment.
pub(crate) fn tree<'a>(keys: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let mut lines = Vec::new();
    let mut path: Vec<&str> = Vec::new();
    for key in keys {
        let segments: Vec<_> = key.split('.').collect();
        let shared = path.iter().zip(&segments).take_while(|(a, b)| a == b).count();
        lines.extend((shared..segments.len()).map(|depth| format!("{}{}", "  ".repeat(depth), segments[depth])));
        path = segments;
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_is_shown_as_it_is() {
        assert_eq!(shown(b"a\x1b[2J\xff\tb\n", Lines::Keep), "a\\u{1b}[2J\\xff\tb\n");
        assert_eq!(shown("x\u{202e}y\u{9b}\n".as_bytes(), Lines::Escape), "x\\u{202e}y\\u{9b}\\n");
    }

    #[test]
    fn a_tree_shows_each_branch_once() {
        assert_eq!(tree(["a", "a.b.c", "a.b.d", "a-b", "e.f"]), ["a", "  b", "    c", "    d", "a-b", "e", "  f"]);
    }
}
