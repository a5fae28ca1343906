//! Answers, written where a connection sends them from.

use bytes::{BufMut, Bytes};

use crate::chunks::Chunks;
use crate::json::{self, Object};
use crate::request::Id;
use crate::{Features, ValueForm, status};

/// What a `Base` may say besides its status.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct BaseFields<'a> {
    /// The revision given, or the present one in a conflict.
    pub revision: Option<u64>,
    /// How many keys were deleted.
    pub count: Option<u64>,
    /// What a server says of itself in answer to `Connect`.
    pub server: Option<ServerFields<'a>>,
}

impl<'a> BaseFields<'a> {
    /// A revision, and nothing else.
    #[must_use]
    pub fn revision(revision: u64) -> Self {
        BaseFields { revision: Some(revision), ..BaseFields::default() }
    }

    /// What a server says of itself, and nothing else.
    #[must_use]
    pub fn server(server: ServerFields<'a>) -> Self {
        BaseFields { server: Some(server), ..BaseFields::default() }
    }

    /// Adds how many keys were deleted.
    #[must_use]
    pub fn with_count(self, count: u64) -> Self {
        BaseFields { count: Some(count), ..self }
    }
}

/// What a server says of itself.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ServerFields<'a> {
    /// Its version.
    pub version: &'a str,
    /// The epoch of its data.
    pub epoch: &'a str,
    /// The longest value it takes, in bytes.
    pub value_len_max: u64,
    /// What it offers beyond the first version of the protocol.
    pub features: Features,
    /// For how many milliseconds it may keep a request waiting, for clients with [`Features::ALIVE`].
    pub patience_ms: Option<u64>,
    /// The data have not what the client has [seen](crate::Request::seen): what it holds says nothing any more.
    pub begins_anew: bool,
}

impl<'a> ServerFields<'a> {
    /// A server that offers no features.
    #[must_use]
    pub fn new(version: &'a str, epoch: &'a str, value_len_max: u64) -> Self {
        ServerFields { version, epoch, value_len_max, features: Features::NONE, patience_ms: None, begins_anew: false }
    }
}

/// What was found of a key.
#[derive(Clone, Copy, Debug)]
pub struct GetEntry<'a> {
    /// The key.
    pub key: &'a str,
    /// Its value.
    pub value: &'a [u8],
    /// The value once more, if it can be sent without a copy.
    pub shared: Option<&'a Bytes>,
    /// The revision of the put that stored it.
    pub revision: u64,
}

impl GetEntry<'_> {
    pub(crate) fn push_value(&self, out: &mut Chunks) {
        match self.shared {
            Some(shared) => out.push(shared),
            None => out.tail().put_slice(self.value),
        }
    }
}

impl<'a> From<(&'a str, &'a Bytes, u64)> for GetEntry<'a> {
    fn from((key, value, revision): (&'a str, &'a Bytes, u64)) -> Self {
        GetEntry { key, value, shared: Some(value), revision }
    }
}

/// A subscriber that would be notified of a change.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct SubscriberFields<'a> {
    /// The client's name.
    pub client_uuid: &'a str,
    /// What it subscribed to.
    pub pattern: &'a str,
    /// Whether that is a key without its branch, for clients with [`Features::EXACT`].
    pub exact: bool,
    /// Since when, in milliseconds before now.
    pub since_ms: u64,
    /// Messages waiting for it.
    pub queued: u64,
    /// Changes passed over on its connection.
    pub skipped: u64,
    /// The name of its client for people, for clients with [`Features::NAMES`].
    pub name: Option<&'a str>,
    /// The address of its peer, for clients with [`Features::NAMES`].
    pub peer: Option<&'a str>,
}

/// A connected client, as [`Answer::clients`] lists it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ClientFields<'a> {
    /// The address of its peer.
    pub peer: &'a str,
    /// Its `client_uuid`, if it gave one.
    pub client_uuid: Option<&'a str>,
    /// Its name for people.
    pub name: Option<&'a str>,
    /// For how long it has been connected, in milliseconds.
    pub since_ms: u64,
    /// How many subscriptions it has.
    pub subscriptions: u64,
    /// Messages waiting for it.
    pub queued: u64,
    /// Changes passed over on its connection.
    pub skipped: u64,
}

impl<'a> ClientFields<'a> {
    /// A client that has just connected and has said nothing of itself.
    #[must_use]
    pub fn new(peer: &'a str) -> Self {
        ClientFields { peer, client_uuid: None, name: None, since_ms: 0, subscriptions: 0, queued: 0, skipped: 0 }
    }
}

/// The entries of a long `Get` or `List`, encoded as they are read from the store, some at a time.
#[derive(Debug)]
pub struct Entries {
    /// In which form values are; none for a `List`.
    form: Option<ValueForm>,
    /// The elements of each list. Of values as a payload these are their lengths.
    data: Chunks,
    keys: Vec<u8>,
    revisions: Vec<u8>,
    payload: Chunks,
}

impl Entries {
    /// Those of a `Get`, with values in this form.
    #[must_use]
    pub fn of_get(form: ValueForm) -> Self {
        Entries { form: Some(form), ..Entries::of_list() }
    }

    /// Those of a `List`.
    #[must_use]
    pub fn of_list() -> Self {
        let (data, keys, revisions, payload) = Default::default();
        Entries { form: None, data, keys, revisions, payload }
    }

    /// Adds an entry.
    pub fn push(&mut self, entry: GetEntry<'_>) {
        if !self.is_empty() {
            let lists = [self.data.tail(), &mut self.keys, &mut self.revisions];
            lists.into_iter().for_each(|list| list.put_u8(b','));
        }
        match self.form {
            None => {}
            Some(ValueForm::Payload) => {
                json::number(self.data.tail(), entry.value.len() as u64);
                entry.push_value(&mut self.payload);
            }
            Some(form) => json::value(self.data.tail(), entry.value, form),
        }
        json::string(&mut self.keys, entry.key);
        json::number(&mut self.revisions, entry.revision);
    }

    /// How many bytes they take so far.
    #[must_use]
    pub fn len(&self) -> usize {
        let lens = [self.data.len(), self.keys.len(), self.revisions.len(), self.payload.len()];
        lens.into_iter().fold(0, usize::saturating_add)
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

impl<'a> SubscriberFields<'a> {
    /// A subscriber that has just subscribed and has nothing waiting.
    #[must_use]
    pub fn new(client_uuid: &'a str, pattern: &'a str) -> Self {
        SubscriberFields {
            client_uuid,
            pattern,
            exact: false,
            since_ms: 0,
            queued: 0,
            skipped: 0,
            name: None,
            peer: None,
        }
    }
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
        let out = self.start("{\"Base\":{\"id\":", status, message).tail();
        if let Some(revision) = fields.revision {
            out.put_slice(b",\"revision\":");
            json::number(out, revision);
        }
        if let Some(count) = fields.count {
            out.put_slice(b",\"count\":");
            json::number(out, count);
        }
        if let Some(ServerFields { version, epoch, value_len_max, features, patience_ms, begins_anew }) = fields.server
        {
            let mut object = Object::resume(out);
            object.text("server", SERVER).text("version", version).number("protocol", crate::PROTOCOL);
            object.text("epoch", epoch).number("max_value", value_len_max);
            json::array(object.name("features"), b"[", features.names(), json::string);
            if let Some(patience_ms) = patience_ms {
                object.number("patience_ms", patience_ms);
            }
            if begins_anew {
                object.flag("begins_anew", true);
            }
        }
        out.put_slice(END);
    }

    /// A `Base` 200.
    pub fn ok(self, fields: &BaseFields<'_>) {
        self.base(status::OK, NO_ERROR, fields);
    }

    /// A `Get` with the entries found, or 404 if there is none: keys, values and revisions.
    pub fn get<'e>(self, form: ValueForm, entries: &[impl Copy + Into<GetEntry<'e>>], more: bool) {
        let (status, message) =
            if entries.is_empty() { (status::NOT_FOUND, NOT_FOUND) } else { (status::OK, NO_ERROR) };
        let payload = form == ValueForm::Payload && !entries.is_empty();
        let chunks = self.start("{\"Get\":{\"id\":", status, message);
        let out = chunks.tail();
        let entries = || entries.iter().map(|entry| (*entry).into());
        if payload {
            json::array(out, b",\"lens\":[", entries(), |out, entry| json::number(out, entry.value.len() as u64));
            out.put_slice(b",\"len\":");
            json::number(out, entries().map(|entry| entry.value.len() as u64).sum());
        } else {
            json::array(out, b",\"data\":[", entries(), |out, entry| json::value(out, entry.value, form));
        }
        json::array(out, b",\"keys\":[", entries(), |out, entry| json::string(out, entry.key));
        json::array(out, b",\"revisions\":[", entries(), |out, entry| json::number(out, entry.revision));
        if more {
            out.put_slice(b",\"more\":true");
        }
        out.put_slice(END);
        if payload {
            entries().for_each(|entry| entry.push_value(chunks));
            chunks.tail().put_u8(b'\n');
        }
    }

    /// A `Get` or a `List` with these entries; a `Get` that has none is a 404.
    pub fn entries(self, entries: Entries, more: bool) {
        let is_empty = entries.is_empty();
        let Entries { form, mut data, keys, revisions, mut payload } = entries;
        let start = if form.is_some() { "{\"Get\":{\"id\":" } else { "{\"List\":{\"id\":" };
        let is_missing = form.is_some() && is_empty;
        let (status, message) = if is_missing { (status::NOT_FOUND, NOT_FOUND) } else { (status::OK, NO_ERROR) };
        let is_payload = form == Some(ValueForm::Payload) && !is_empty;
        let chunks = self.start(start, status, message);
        if form.is_some() {
            chunks.tail().put_slice(if is_payload { b",\"lens\":[" } else { b",\"data\":[" });
            data.take().iter().for_each(|bytes| chunks.push(bytes));
            chunks.tail().put_u8(b']');
        }
        if is_payload {
            chunks.tail().put_slice(b",\"len\":");
            json::number(chunks.tail(), payload.len() as u64);
        }
        for (name, list) in [(&b",\"keys\":["[..], keys), (b",\"revisions\":[", revisions)] {
            chunks.tail().put_slice(name);
            chunks.push(&list.into());
            chunks.tail().put_u8(b']');
        }
        let out = chunks.tail();
        if form.is_none() {
            Object::resume(out).flag("more", more);
        } else if more {
            out.put_slice(b",\"more\":true");
        }
        out.put_slice(END);
        if is_payload {
            payload.take().iter().for_each(|bytes| chunks.push(bytes));
            chunks.tail().put_u8(b'\n');
        }
    }

    /// A `Trace`: the subscribers.
    pub fn trace(self, subscribers: &[SubscriberFields<'_>]) {
        let out = self.start("{\"Trace\":{\"id\":", status::OK, NO_ERROR).tail();
        json::array(out, b",\"subscribers\":[", subscribers, |out, subscriber| {
            let mut fields = Object::start(out);
            fields.text("client_uuid", subscriber.client_uuid).text("pattern", subscriber.pattern);
            if subscriber.exact {
                fields.flag("exact", true);
            }
            fields.number("since_ms", subscriber.since_ms);
            fields.number("queued", subscriber.queued).number("skipped", subscriber.skipped);
            fields.texts([("name", subscriber.name), ("peer", subscriber.peer)]).end();
        });
        out.put_slice(END);
    }

    /// A `Trace` without a key: the connected clients.
    pub fn clients(self, clients: &[ClientFields<'_>]) {
        let out = self.start("{\"Trace\":{\"id\":", status::OK, NO_ERROR).tail();
        json::array(out, b",\"clients\":[", clients, |out, client| {
            let mut fields = Object::start(out);
            fields.text("peer", client.peer).texts([("client_uuid", client.client_uuid), ("name", client.name)]);
            fields.number("since_ms", client.since_ms).number("subscriptions", client.subscriptions);
            fields.number("queued", client.queued).number("skipped", client.skipped);
            fields.end();
        });
        out.put_slice(END);
    }

    /// A `Version`.
    pub fn version(self, version: &str) {
        let out = self.start("{\"Version\":{\"id\":", status::OK, NO_ERROR).tail();
        Object::resume(out).text("server", SERVER).text("version", version).number("protocol", crate::PROTOCOL);
        out.put_slice(END);
    }

    /// A `Stats`: texts and numbers by name.
    pub fn stats(self, texts: &[(&str, &str)], numbers: &[(&str, u64)]) {
        let out = self.start("{\"Stats\":{\"id\":", status::OK, NO_ERROR).tail();
        let mut object = Object::resume(out);
        for (name, text) in texts {
            object.text(name, text);
        }
        for (name, number) in numbers {
            object.number(name, *number);
        }
        out.put_slice(END);
    }

    /// Writes what all answers begin with, up to the message.
    #[inline]
    fn start(self, start: &str, status: u16, message: &str) -> &'a mut Chunks {
        let Answer { id, out } = self;
        let line = out.tail();
        line.reserve(LINE_LEN);
        line.put_slice(start.as_bytes());
        line.put_slice(id.as_json().as_bytes());
        if status == status::OK && message == NO_ERROR {
            line.put_slice(b",\"status\":200,\"message\":\"No Error\"");
        } else {
            line.put_slice(b",\"status\":");
            json::number(line, status.into());
            line.put_slice(b",\"message\":");
            json::string(line, message);
        }
        out
    }
}

/// What most lines fit into.
const LINE_LEN: usize = 256;
const END: &[u8] = b"}}\n";
const NO_ERROR: &str = "No Error";
const NOT_FOUND: &str = "Not Found";

impl Answer<'_> {
    /// A `Base` 404.
    pub fn not_found(self) {
        self.base(status::NOT_FOUND, NOT_FOUND, &BaseFields::default());
    }
}
