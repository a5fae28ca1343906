//! Notifications: what a subscriber is told, encoded once however many connections it goes to.

use bytes::{BufMut, Bytes};

use crate::ValueForm;
use crate::chunks::Chunks;
use crate::json::{self, Object};

/// A change of a key, encoded but for how many changes were skipped, which differs from subscriber to subscriber.
#[derive(Clone, Debug)]
pub struct ChangeNotice {
    /// Up to the number of skipped changes.
    head: Bytes,
    /// What follows it.
    tail: &'static str,
    /// The value, if it travels behind the line.
    payload: Option<Bytes>,
}

impl ChangeNotice {
    /// An `Update`: the key has this value now.
    #[must_use]
    pub fn update(key: &str, value: &Bytes, revision: u64, form: ValueForm) -> Self {
        let payload = form == ValueForm::Payload;
        let head = start("Update", key, |object| {
            if payload {
                object.number("revision", revision).number("len", value.len() as u64);
            } else {
                json::value(object.name("value"), value, form);
                object.number("revision", revision);
            }
        });
        ChangeNotice { head, tail: "}}\n", payload: payload.then(|| value.clone()) }
    }

    /// A `Close`: the key is gone, deleted or expired.
    #[must_use]
    pub fn close(key: &str, revision: u64, expired: bool) -> Self {
        let tail = if expired { ",\"reason\":\"expired\"}}\n" } else { ",\"reason\":\"deleted\"}}\n" };
        let head = start("Close", key, |object| _ = object.number("revision", revision));
        ChangeNotice { head, tail, payload: None }
    }

    /// Writes it for a subscriber who missed `skipped` changes of the key.
    pub fn write(&self, skipped: u64, out: &mut Chunks) {
        out.push(&self.head);
        json::number(out.tail(), skipped);
        out.tail().put_slice(self.tail.as_bytes());
        if let Some(payload) = &self.payload {
            out.push(payload);
            out.tail().put_u8(b'\n');
        }
    }
}

fn start(kind: &str, key: &str, fields: impl FnOnce(&mut Object<'_, Vec<u8>>)) -> Bytes {
    let mut out = Vec::with_capacity(key.len().saturating_add(96));
    let mut outer = Object::start(&mut out);
    let mut object = Object::start(outer.name(kind));
    object.text("key", key);
    fields(&mut object);
    object.name("skipped");
    out.into()
}

/// The answer to a `Subscribe`.
pub fn hello(out: &mut Chunks) {
    out.tail().put_slice(b"\"Hello\"\n");
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
