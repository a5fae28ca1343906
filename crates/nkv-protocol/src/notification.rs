//! Notifications: what a subscriber is told, encoded once however many connections it goes to.

use bytes::{BufMut, Bytes};

use crate::ValueForm;
use crate::chunks::{Chunks, SHARE_LEN_MIN};
use crate::json::{self, Object};

/// A change of a key, encoded as it is told to a subscriber who skipped none; for others the number is replaced.
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
        let mut text = start(b"{\"Update\":{\"key\":", key, value.len());
        if form == ValueForm::Payload {
            text.put_slice(b",\"revision\":");
            json::number(&mut text, revision);
            text.put_slice(b",\"len\":");
            json::number(&mut text, value.len() as u64);
        } else {
            text.put_slice(b",\"value\":");
            json::value(&mut text, value, form);
            text.put_slice(b",\"revision\":");
            json::number(&mut text, revision);
        }
        let skipped_at = skipped(&mut text, b"}}\n");
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
        let mut text = start(b"{\"Close\":{\"key\":", key, 0);
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

    /// Writes it for a subscriber who missed `skipped` changes of the key.
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

fn start(start: &[u8], key: &str, value_len: usize) -> Vec<u8> {
    let mut text = Vec::with_capacity(key.len().saturating_add(value_len.min(SHARE_LEN_MIN)).saturating_add(96));
    text.put_slice(start);
    json::string(&mut text, key);
    text
}

/// Writes that no change was skipped, and the end of the line; returns where the number stands.
fn skipped(text: &mut Vec<u8>, end: &[u8]) -> usize {
    text.put_slice(b",\"skipped\":");
    let skipped_at = text.len();
    text.put_u8(b'0');
    text.put_slice(end);
    skipped_at
}

/// The answer to a `Subscribe`.
pub fn hello(out: &mut Chunks) {
    out.tail().put_slice(b"\"Hello\"\n");
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
