//! Answers, written where a connection sends them from.

use bytes::{BufMut, Bytes};

use crate::chunks::Chunks;
use crate::json::{self, Object};
use crate::request::Id;
use crate::{ValueForm, status};

/// What a `Base` may say besides its status.
#[derive(Clone, Copy, Debug, Default)]
pub struct BaseFields<'a> {
    /// The revision given, or the present one in a conflict.
    pub revision: Option<u64>,
    /// How many keys were deleted.
    pub count: Option<u64>,
    /// What a server says of itself in answer to `Connect`.
    pub server: Option<ServerFields<'a>>,
}

/// What a server says of itself.
#[derive(Clone, Copy, Debug)]
pub struct ServerFields<'a> {
    /// Its version.
    pub version: &'a str,
    /// The epoch of its data.
    pub epoch: &'a str,
    /// The longest value it takes, in bytes.
    pub value_len_max: u64,
}

/// Who would be told of a change.
#[derive(Clone, Copy, Debug)]
pub struct SubscriberFields<'a> {
    /// The client's name.
    pub client_uuid: &'a str,
    /// What it subscribed to.
    pub pattern: &'a str,
    /// Since when, in milliseconds before now.
    pub since_ms: u64,
    /// Messages waiting for it.
    pub queued: u64,
    /// Changes passed over on its connection.
    pub skipped: u64,
}

/// The name of this server in `Version` and `Connect`.
const SERVER: &str = "nkv";

/// Writes the answers to one request.
#[derive(Debug)]
pub struct Answer<'a> {
    id: Id<'a>,
    out: &'a mut Chunks,
}

impl<'a> Answer<'a> {
    /// The answer to the request with this id.
    pub fn to(id: Id<'a>, out: &'a mut Chunks) -> Self {
        Answer { id, out }
    }

    /// A `Base` with this status.
    pub fn base(self, status: u16, message: &str, fields: &BaseFields<'_>) {
        self.envelope("Base", status, message, |object| {
            for (name, number) in [("revision", fields.revision), ("count", fields.count)] {
                if let Some(number) = number {
                    object.number(name, number);
                }
            }
            if let Some(ServerFields { version, epoch, value_len_max }) = fields.server {
                object.text("server", SERVER).text("version", version).number("protocol", crate::PROTOCOL);
                object.text("epoch", epoch).number("max_value", value_len_max);
            }
        });
    }

    /// A `Base` 200.
    pub fn ok(self, fields: &BaseFields<'_>) {
        self.base(status::OK, NO_ERROR, fields);
    }

    /// A `Get` with the entries found, or 404 if there is none: keys, values and revisions.
    pub fn get(self, form: ValueForm, entries: &[(&str, &Bytes, u64)], more: bool) {
        let (status, message) =
            if entries.is_empty() { (status::NOT_FOUND, NOT_FOUND) } else { (status::OK, NO_ERROR) };
        let payload_len: usize = entries.iter().map(|(_, value, _)| value.len()).sum();
        let payload = form == ValueForm::Payload && !entries.is_empty();
        let out = self.envelope("Get", status, message, |object| {
            if payload {
                object.array("lens", entries, |out, (_, value, _)| json::number(out, value.len() as u64));
                object.number("len", payload_len as u64);
            } else {
                object.array("data", entries, |out, (_, value, _)| json::value(out, value, form));
            }
            object.array("keys", entries, |out, (key, ..)| json::string(out, key));
            object.array("revisions", entries, |out, (.., revision)| json::number(out, *revision));
            if more {
                object.flag("more", true);
            }
        });
        if payload {
            entries.iter().for_each(|(_, value, _)| out.push(value));
            out.tail().put_u8(b'\n');
        }
    }

    /// A `Get` with one entry, given piece by piece: its value is the bytes in `shared`, where those are.
    pub fn get_one(self, form: ValueForm, key: &str, value: &[u8], shared: Option<&Bytes>, revision: u64) {
        let payload = form == ValueForm::Payload;
        let out = self.envelope("Get", status::OK, NO_ERROR, |object| {
            if payload {
                object.array("lens", [value.len()], |out, len| json::number(out, len as u64));
                object.number("len", value.len() as u64);
            } else {
                object.array("data", [value], |out, value| json::value(out, value, form));
            }
            object.array("keys", [key], json::string);
            object.array("revisions", [revision], json::number);
        });
        if payload {
            match shared {
                Some(shared) => out.push(shared),
                None => out.tail().put_slice(value),
            }
            out.tail().put_u8(b'\n');
        }
    }

    /// A `List`: keys and revisions, and whether there are more.
    pub fn list(self, entries: &[(&str, u64)], more: bool) {
        self.envelope("List", status::OK, NO_ERROR, |object| {
            object.array("keys", entries, |out, (key, _)| json::string(out, key));
            object.array("revisions", entries, |out, (_, revision)| json::number(out, *revision));
            object.flag("more", more);
        });
    }

    /// A `Trace`: the subscribers.
    pub fn trace(self, subscribers: &[SubscriberFields<'_>]) {
        self.envelope("Trace", status::OK, NO_ERROR, |object| {
            object.array("subscribers", subscribers, |out, subscriber| {
                let mut fields = Object::start(out);
                fields.text("client_uuid", subscriber.client_uuid).text("pattern", subscriber.pattern);
                fields.number("since_ms", subscriber.since_ms);
                fields.number("queued", subscriber.queued).number("skipped", subscriber.skipped);
                fields.end();
            });
        });
    }

    /// A `Version`.
    pub fn version(self, version: &str) {
        self.envelope("Version", status::OK, NO_ERROR, |object| {
            object.text("server", SERVER).text("version", version).number("protocol", crate::PROTOCOL);
        });
    }

    /// A `Stats`: texts and numbers by name.
    pub fn stats(self, texts: &[(&str, &str)], numbers: &[(&str, u64)]) {
        self.envelope("Stats", status::OK, NO_ERROR, |object| {
            for (name, text) in texts {
                object.text(name, text);
            }
            for (name, number) in numbers {
                object.number(name, *number);
            }
        });
    }

    fn envelope(
        self,
        kind: &str,
        status: u16,
        message: &str,
        fields: impl FnOnce(&mut Object<'_, Vec<u8>>),
    ) -> &'a mut Chunks {
        let Answer { id, out } = self;
        let mut outer = Object::start(out.tail());
        let mut object = Object::start(outer.name(kind));
        object.name("id").put_slice(id.as_json().as_bytes());
        object.number("status", u64::from(status)).text("message", message);
        fields(&mut object);
        object.end();
        outer.end();
        out.tail().put_u8(b'\n');
        out
    }
}

const NO_ERROR: &str = "No Error";
const NOT_FOUND: &str = "Not Found";

impl Answer<'_> {
    /// A `Base` 404.
    pub fn not_found(self) {
        self.base(status::NOT_FOUND, NOT_FOUND, &BaseFields::default());
    }
}
