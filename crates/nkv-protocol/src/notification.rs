//! Notifications to subscribers, each encoded once for any number of connections.

use bytes::{BufMut, Bytes};

use crate::ValueForm;
use crate::answer::GetEntry;
use crate::chunks::{Chunks, SHARE_LEN_MIN};
use crate::json::{self, Object};

/// A change of a key, encoded as it is sent to a subscriber that skipped none; for others the number is replaced.
#[derive(Clone, Debug)]
pub struct ChangeNotice {
    /// The line, and a short payload behind it.
    text: Bytes,
    /// Where in the text the number of skipped changes stands, as `0`.
    skipped_at: usize,
    /// A payload that is long enough to be shared.
    payload: Option<Bytes>,
}

impl ChangeNotice {
    /// An `Update`: the key has this value now.
    #[must_use]
    pub fn update(key: &str, value: &Bytes, revision: u64, form: ValueForm) -> Self {
        let mut text = with_room(key, value.len());
        let skipped_at = update_line(&mut text, (key, value, revision), form);
        let payload = (form == ValueForm::Payload).then_some(value);
        if let Some(short) = payload.filter(|value| value.len() < SHARE_LEN_MIN) {
            text.put_slice(short);
            text.put_u8(b'\n');
        }
        let payload = payload.filter(|value| value.len() >= SHARE_LEN_MIN).cloned();
        ChangeNotice { text: text.into(), skipped_at, payload }
    }

    /// A `Close`: the key is gone, deleted or expired.
    #[must_use]
    pub fn close(key: &str, revision: u64, expired: bool) -> Self {
        let mut text = with_room(key, 0);
        text.put_slice(b"{\"Close\":{\"key\":");
        json::string(&mut text, key);
        text.put_slice(b",\"revision\":");
        json::number(&mut text, revision);
        let end = if expired { b",\"reason\":\"expired\"}}\n" } else { b",\"reason\":\"deleted\"}}\n" };
        let skipped_at = skipped(&mut text, end);
        ChangeNotice { text: text.into(), skipped_at, payload: None }
    }

    /// How many bytes it takes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.text.len().saturating_add(self.payload.as_ref().map_or(0, Bytes::len))
    }

    /// Writes it for a subscriber that missed `skipped` changes of the key.
    pub fn write(&self, skipped: u64, out: &mut Chunks) {
        if skipped == 0 {
            out.push(&self.text);
        } else {
            out.push(&self.text.slice(..self.skipped_at));
            json::number(out.tail(), skipped);
            out.push(&self.text.slice(self.skipped_at.saturating_add(1)..));
        }
        if let Some(payload) = &self.payload {
            out.push(payload);
            out.tail().put_u8(b'\n');
        }
    }
}

fn with_room(key: &str, value_len: usize) -> Vec<u8> {
    Vec::with_capacity(key.len().saturating_add(value_len.min(SHARE_LEN_MIN)).saturating_add(96))
}

/// An `Update` for one subscriber alone, which skipped no change: a record of its snapshot.
pub fn update(entry: GetEntry<'_>, form: ValueForm, out: &mut Chunks) {
    update_line(out.tail(), (entry.key, entry.value, entry.revision), form);
    if form == ValueForm::Payload {
        entry.push_value(out);
        out.tail().put_u8(b'\n');
    }
}

/// Writes the line of an `Update` that skipped no change; returns where that number stands.
fn update_line(text: &mut Vec<u8>, (key, value, revision): (&str, &[u8], u64), form: ValueForm) -> usize {
    text.put_slice(b"{\"Update\":{\"key\":");
    json::string(text, key);
    if form == ValueForm::Payload {
        text.put_slice(b",\"revision\":");
        json::number(text, revision);
        text.put_slice(b",\"len\":");
        json::number(text, value.len() as u64);
    } else {
        text.put_slice(b",\"value\":");
        json::value(text, value, form);
        text.put_slice(b",\"revision\":");
        json::number(text, revision);
    }
    skipped(text, b"}}\n")
}

/// Writes that no change was skipped, and the end of the line; returns where the number stands.
fn skipped(text: &mut Vec<u8>, end: &[u8]) -> usize {
    text.put_slice(b",\"skipped\":");
    let skipped_at = text.len();
    text.put_u8(b'0');
    text.put_slice(end);
    skipped_at
}

/// The longest that [`without_revision`] can leave out: two names and two numbers.
const REVISION_LEN_MAX: usize = 64;

/// Leaves `revision` and `skipped` out of the line of a change, if it is longer than `len_max` with them and not without.
/// For clients that read no more at a time; others need both.
pub fn leave_out_revision(line: &mut Chunks, len_max: usize) {
    let excess = line.len().saturating_sub(len_max);
    if excess == 0 || excess > REVISION_LEN_MAX {
        return;
    }
    let short = line.slices().next().and_then(without_revision).filter(|short| short.len() <= len_max);
    if let Some(short) = short {
        *line = short;
    }
}

/// The line of a change without its `revision` and `skipped`, which stand next to each other; `None` for any other line.
/// A quotation mark within a string is escaped, so the name is found nowhere but where it is one.
fn without_revision(line: &[u8]) -> Option<Chunks> {
    const REVISION: &[u8] = b",\"revision\":";
    let digits = |text: &[u8]| text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let at = line.windows(REVISION.len()).rposition(|window| window == REVISION)?;
    let (before, fields) = line.split_at_checked(at)?;
    let behind = fields.strip_prefix(REVISION)?;
    let behind = behind.get(digits(behind)..)?.strip_prefix(b",\"skipped\":")?;
    let mut short = Chunks::default();
    short.tail().put_slice(before);
    short.tail().put_slice(behind.get(digits(behind)..)?);
    Some(short)
}

/// The answer to a `Subscribe`.
pub fn hello(out: &mut Chunks) {
    out.tail().put_slice(b"\"Hello\"\n");
}

/// The server is there, and keeps requests waiting: for clients with [`Features::ALIVE`](crate::Features::ALIVE).
pub fn alive(out: &mut Chunks) {
    out.tail().put_slice(b"\"Alive\"\n");
}

/// For how many milliseconds what the server shows may be old, or none if it is not any more: for clients with
/// [`Features::STALE`](crate::Features::STALE).
pub fn stale(since_ms: Option<u64>, out: &mut Chunks) {
    let mut outer = Object::start(out.tail());
    let mut object = Object::start(outer.name("Stale"));
    if let Some(since_ms) = since_ms {
        object.number("since_ms", since_ms);
    }
    object.end();
    outer.end();
    out.tail().put_u8(b'\n');
}

/// A fresh snapshot of the subscription to `pattern` begins: a key that is not in it is gone.
pub fn reset(pattern: &str, out: &mut Chunks) {
    let mut outer = Object::start(out.tail());
    let mut object = Object::start(outer.name("Reset"));
    object.text("key", pattern);
    object.end();
    outer.end();
    out.tail().put_u8(b'\n');
}

/// The end of a snapshot of `pattern`.
pub fn synced(pattern: &str, revision: u64, epoch: &str, out: &mut Chunks) {
    let mut outer = Object::start(out.tail());
    let mut object = Object::start(outer.name("Synced"));
    object.text("key", pattern).number("revision", revision).text("epoch", epoch);
    object.end();
    outer.end();
    out.tail().put_u8(b'\n');
}

/// The end of a subscription to `pattern`, unsubscribed or replaced.
pub fn unsubscribed(pattern: &str, reason: &str, out: &mut Chunks) {
    let mut outer = Object::start(out.tail());
    let mut object = Object::start(outer.name("Close"));
    object.text("key", pattern).text("reason", reason);
    object.end();
    outer.end();
    out.tail().put_u8(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_change_is_written_without_its_revision() {
        let short = |line: &str| without_revision(line.as_bytes()).map(|mut line| line.take().concat());
        let key = r#"a,\"revision\":1,\"skipped\":2"#;
        for (line, expected) in [
            (
                r#"{"Update":{"key":"KEY","value":[1],"revision":12,"skipped":0}}"#,
                r#"{"Update":{"key":"KEY","value":[1]}}"#,
            ),
            (
                r#"{"Close":{"key":"KEY","revision":9,"skipped":34,"reason":"deleted"}}"#,
                r#"{"Close":{"key":"KEY","reason":"deleted"}}"#,
            ),
        ] {
            assert_eq!(short(&line.replace("KEY", key)).unwrap(), expected.replace("KEY", key).as_bytes());
        }
        for line in [
            r#"{"Base":{"id":"1","status":200,"message":"No Error","revision":3}}"#,
            r#"{"Synced":{"key":"a","revision":3,"epoch":"e"}}"#,
            r#"{"Close":{"key":"KEY","reason":"replaced"}}"#,
            "\"Hello\"",
        ] {
            assert_eq!(short(&line.replace("KEY", key)), None, "{line}");
        }
    }
}
