//! Where results go and what they look like.

use std::fmt::Write as _;
use std::io::{self, IsTerminal};

use nkv_client::{ConnectionState, EndReason, Entry, Event};
use serde_json::{Value, json};

use crate::stdio;

/// Where a command was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// With the program's name: its result is all that stdout gets.
    CommandLine,
    /// On a terminal, at the prompt: each answer is a line, and stays with it.
    Prompt,
    /// In a line of a script, which has this number.
    Line(u64),
}

/// How results are shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    /// As JSON, one object per line.
    pub(crate) json: bool,
    /// Whether only results and errors are written.
    pub(crate) quiet: bool,
    pub(crate) place: Place,
    /// Whether stdout is a terminal: then control characters are not written as they are.
    pub(crate) terminal: bool,
}

impl Output {
    pub(crate) fn new(json: bool, quiet: bool, place: Place) -> Self {
        Output { json, quiet, place, terminal: io::stdout().is_terminal() }
    }

    /// A value and nothing else; in a script, where others follow, as a line.
    pub(crate) fn value(self, value: &[u8]) -> io::Result<()> {
        match self.place {
            Place::Line(_) => self.line(self.readable(value).as_bytes()),
            _ if self.terminal => to_stdout((shown(value, Form::Terminal) + "\n").as_bytes()),
            _ => to_stdout(value),
        }
    }

    /// A line of a result.
    pub(crate) fn line(self, line: &[u8]) -> io::Result<()> {
        to_stdout(&[line, b"\n"].concat())
    }

    /// A JSON object of a result.
    pub(crate) fn object(self, object: &Value) -> io::Result<()> {
        self.line(object.to_string().as_bytes())
    }

    /// What a person wants to know besides the result.
    pub(crate) fn note(self, note: &str) -> io::Result<()> {
        match self.place {
            _ if self.quiet => {}
            Place::Prompt => return self.line(note.as_bytes()),
            place => complain(&at(place, note)),
        }
        Ok(())
    }

    /// That only a part was shown, and after which key the rest comes.
    pub(crate) fn more(self, op: &str, key: &str, after: &str) {
        match self.json {
            _ if self.quiet => {}
            true => {
                let mut object = json!({"note": "there are more", "op": op, "key": key, "after": after});
                self.add_line(&mut object);
                complain(&object.to_string());
            }
            false => complain(&at(self.place, &format!("there are more: --after {after}"))),
        }
    }

    /// That the server answers from an old state, if it does: see [`ConnectionState::Stale`].
    pub(crate) fn stale(self, state: ConnectionState) {
        let ConnectionState::Stale { since, .. } = state else { return };
        let since = since.elapsed();
        match self.json {
            _ if self.quiet => {}
            true => {
                let since_ms = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
                let mut object = json!({"note": "stale", "since_ms": since_ms});
                self.add_line(&mut object);
                complain(&object.to_string());
            }
            false => {
                complain(&at(self.place, &format!("stale for {} s: what the server shows may be old", since.as_secs())))
            }
        }
    }

    /// Adds the number of the line that an object on stderr is about.
    pub(crate) fn add_line(self, object: &mut Value) {
        if let Place::Line(number) = self.place {
            object["line"] = number.into();
        }
    }

    /// An event of a subscription, as a line. With no place for it, it is a note.
    pub(crate) fn event(self, pattern: &str, event: &Event) -> Line {
        if self.json {
            return Line::Result(event_json(pattern, event).to_string().into_bytes());
        }
        let line = match event {
            Event::Update { entry, .. } => return Line::Result(self.key_value(entry).into_bytes()),
            Event::Gone { key, reason, .. } => {
                return Line::Result(format!("{} {}", self.key(key.as_str()), reason.as_str()).into_bytes());
            }
            Event::Synced { revision, .. } => format!("{pattern}: synced at revision {revision}"),
            Event::Reconnecting => format!("{pattern}: connection lost, reconnecting"),
            Event::Connected { .. } => format!("{pattern}: connected again"),
            Event::Ended(reason) => format!("{pattern}: ended, {}", ended(reason)),
            other => format!("{pattern}: {other:?}"),
        };
        Line::Note(shown(line.as_bytes(), Form::TerminalLine))
    }

    /// One key of several, with its value: nothing that the value holds can pass for another key.
    pub(crate) fn key_value(self, entry: &Entry) -> String {
        format!("{} = {}", self.key(entry.key.as_str()), self.readable(&entry.value))
    }

    /// A key. It holds no white space and no control characters.
    pub(crate) fn key(self, key: &str) -> String {
        if self.terminal { shown(key.as_bytes(), Form::TerminalLine) } else { key.to_owned() }
    }

    /// Anything, in one line.
    pub(crate) fn readable(self, value: &[u8]) -> String {
        shown(value, if self.terminal { Form::TerminalLine } else { Form::Line })
    }
}

/// What an event is shown as.
pub(crate) enum Line {
    /// Something of a key.
    Result(Vec<u8>),
    /// Something of the subscription itself.
    Note(String),
    /// Why it ended.
    Error(String),
}

fn to_stdout(bytes: &[u8]) -> io::Result<()> {
    // The lock keeps lines of several threads apart.
    stdio::write_all(io::stdout().lock(), bytes)
}

/// Writes to stderr; when that is not possible, no reader is left.
pub(crate) fn complain(what: &str) {
    let what = if io::stderr().is_terminal() { shown(what.as_bytes(), Form::Terminal) } else { what.to_owned() };
    drop(stdio::write_all(io::stderr().lock(), (what + "\n").as_bytes()));
}

/// What is said, with the number of the line that it is about.
pub(crate) fn at(place: Place, what: &str) -> String {
    match place {
        Place::Line(number) => format!("line {number}: {what}"),
        Place::CommandLine | Place::Prompt => what.to_owned(),
    }
}

/// Writes the help that was asked for.
pub(crate) fn help(help: &clap::Error) -> io::Result<()> {
    let text = help.render();
    let text = if io::stdout().is_terminal() { text.ansi().to_string() } else { text.to_string() };
    to_stdout(text.as_bytes())
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

/// How bytes become text.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// For a terminal, with line ends and tabs as they are.
    Terminal,
    /// For a terminal, in one line that stands for these bytes and no others.
    TerminalLine,
    /// In one line that stands for these bytes and no others.
    Line,
}

/// Bytes as text: control characters are escaped, and so are bytes that are not UTF-8. For a terminal, characters that
/// change the direction or cannot be seen are escaped too.
fn shown(bytes: &[u8], form: Form) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            let is_escaped = match c {
                '\n' | '\t' => form != Form::Terminal,
                '\\' => form != Form::Terminal,
                // Some programs take these for the ends of lines.
                '\u{2028}' | '\u{2029}' => true,
                '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' => {
                    form != Form::Line
                }
                c => c.is_control(),
            };
            if is_escaped {
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
        assert_eq!(shown(b"a\x1b[2J\xff\tb\\\n", Form::Terminal), "a\\u{1b}[2J\\xff\tb\\\n");
        assert_eq!(shown("x\u{202e}y\u{9b}\n".as_bytes(), Form::TerminalLine), "x\\u{202e}y\\u{9b}\\n");
    }

    // A value with a line end looked like two keys.
    #[test]
    fn a_line_of_text_stands_for_one_value_and_no_other() {
        for (value, text) in [
            (&b"1\nb = 2"[..], r"1\nb = 2"),
            (br"1\nb = 2", r"1\\nb = 2"),
            (b"\xff\r\t", r"\xff\r\t"),
            (br"\xff", r"\\xff"),
            ("\u{2028}\u{85}\u{e9}\u{200d}".as_bytes(), "\\u{2028}\\u{85}\u{e9}\u{200d}"),
        ] {
            assert_eq!(shown(value, Form::Line), text);
        }
    }

    #[test]
    fn a_tree_shows_each_branch_once() {
        assert_eq!(tree(["a", "a.b.c", "a.b.d", "a-b", "e.f"]), ["a", "  b", "    c", "    d", "a-b", "e", "  f"]);
    }
}
