//! Requests: one flat type for all of them, borrowed from the line that contained them.

use std::borrow::Cow;
use std::fmt;

use bytes::{BufMut, BytesMut};
use serde::Deserializer;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::features::{self, NameList};
use crate::json::{self, Object, Scalar, ScalarType, Text, ValueVisitor, unexpected_text};
use crate::{Features, ValueForm};

mod scan;

/// Longest `id` and `client_uuid`, in bytes as written.
pub(crate) const NAME_LEN_MAX: usize = 1_024;

/// Longest `name`, in bytes.
const LABEL_LEN_MAX: usize = 256;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What a request asks for.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Kind {
            $($(#[$doc])* $name,)*
        }

        impl Kind {
            /// All of them.
            pub const ALL: &[Kind] = &[$(Kind::$name),*];

            /// The word for it in `type`.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Kind::$name => stringify!($name),)*
                }
            }

            /// The kind whose word, in quotation marks, is what a text starts with, and the rest of the text.
            fn split_from(text: &[u8]) -> Option<(Self, &[u8])> {
                $(if let Some(rest) = text.strip_prefix(concat!('"', stringify!($name), '"').as_bytes()) {
                    return Some((Kind::$name, rest));
                })*
                None
            }
        }
    };
}

kinds! {
    /// Writes a value.
    Put,
    /// Reads values.
    Get,
    /// Removes keys.
    Delete,
    /// Asks to be notified of changes.
    Subscribe,
    /// Asks not to be notified any more.
    Unsubscribe,
    /// Reads keys.
    List,
    /// Asks whether there is a key.
    Exists,
    /// Asks which subscriptions cover a key, or, without a key, which clients are connected.
    Trace,
    /// Asks whether the server works.
    Health,
    /// Asks what the server is.
    Version,
    /// Asks for figures.
    Stats,
    /// Says how the connection is to be used.
    Connect,
}

impl Kind {
    fn from_word(word: &str) -> Option<Self> {
        Kind::ALL.iter().copied().find(|kind| kind.as_str() == word)
    }

    fn takes_key(self) -> bool {
        !matches!(self, Kind::Health | Kind::Version | Kind::Stats | Kind::Connect)
    }

    /// A `Trace` without a key is another request.
    fn needs_key(self) -> bool {
        self.takes_key() && self != Kind::Trace
    }
}

/// A request's `id`, as written: a JSON string or number, echoed in the answer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Id<'a>(&'a str);

impl<'a> Id<'a> {
    fn new(raw: &'a RawValue) -> Option<Self> {
        match raw.get().as_bytes().first() {
            Some(b'"' | b'-' | b'0'..=b'9') if raw.get().len() <= NAME_LEN_MAX => Some(Id(raw.get())),
            Some(b'n') => Some(Id::default()),
            _ => None,
        }
    }

    /// The id whose [`as_json`](Self::as_json) this is.
    #[must_use]
    pub fn from_json(json: &'a str) -> Self {
        Id(json)
    }

    /// The JSON text.
    #[must_use]
    pub fn as_json(self) -> &'a str {
        self.0
    }
}

impl Default for Id<'_> {
    fn default() -> Self {
        Id("\"\"")
    }
}

impl fmt::Debug for Id<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// A request; which fields count depends on its kind.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Request<'a> {
    /// What it asks for.
    pub kind: Kind,
    /// Echoed in the answer.
    pub id: Id<'a>,
    /// The key or pattern; empty for kinds without one, and for a `Trace` of all clients.
    pub key: Cow<'a, str>,
    /// Names the client across connections.
    pub client_uuid: Option<Cow<'a, str>>,
    /// The value, from the line or from the payload.
    pub value: Option<Cow<'a, [u8]>>,
    /// Only if the key is at this revision; 0 for absent.
    pub if_revision: Option<u64>,
    /// How long the value lives, in milliseconds.
    pub ttl_ms: Option<u64>,
    /// How many keys at most.
    pub limit: Option<u64>,
    /// Only keys after this one.
    pub after: Option<Cow<'a, str>>,
    /// Whether a subscription starts with the present state.
    pub snapshot: bool,
    /// Whether it may be served before earlier writes of its connection ([`Features::AHEAD`]).
    pub ahead: bool,
    /// Whether a subscription is to its key alone, without the branch ([`Features::EXACT`]).
    pub exact: bool,
    /// The client's name for people ([`Features::NAMES`]).
    pub name: Option<Cow<'a, str>>,
    /// How values are to travel to this client.
    pub values: Option<ValueForm>,
    /// What the client has seen of the data, as `EPOCH-REVISION`, perhaps at another node of the same engine.
    pub seen: Option<Cow<'a, str>>,
    /// The client's credential.
    pub token: Option<Cow<'a, str>>,
    /// What the client understands beyond the first version of the protocol.
    pub features: Features,
}

impl<'a> Request<'a> {
    /// A request with nothing but its kind and key.
    pub fn new(kind: Kind, key: impl Into<Cow<'a, str>>) -> Self {
        Request {
            kind,
            id: Id::default(),
            key: key.into(),
            client_uuid: None,
            value: None,
            if_revision: None,
            ttl_ms: None,
            limit: None,
            after: None,
            snapshot: false,
            ahead: false,
            exact: false,
            name: None,
            values: None,
            seen: None,
            token: None,
            features: Features::NONE,
        }
    }

    /// Writes the request with a number as its id; a value goes as payload.
    pub fn encode(&self, id: u64, out: &mut BytesMut) {
        let mut object = Object::start(out);
        object.text("type", self.kind.as_str()).number("id", id);
        if self.kind.needs_key() || self.kind.takes_key() && !self.key.is_empty() {
            object.text("key", &self.key);
        }
        let texts = [
            ("client_uuid", &self.client_uuid),
            ("after", &self.after),
            ("seen", &self.seen),
            ("token", &self.token),
            ("name", &self.name),
        ];
        for (name, text) in texts {
            if let Some(text) = text {
                object.text(name, text);
            }
        }
        for (name, number) in [("if_revision", self.if_revision), ("ttl_ms", self.ttl_ms), ("limit", self.limit)] {
            if let Some(number) = number {
                object.number(name, number);
            }
        }
        for (name, flag) in [("snapshot", self.snapshot), ("ahead", self.ahead), ("exact", self.exact)] {
            if flag {
                object.flag(name, true);
            }
        }
        if let Some(values) = self.values {
            object.text("values", values.as_str());
        }
        if self.features != Features::NONE {
            json::array(object.name("features"), b"[", self.features.names(), json::string);
        }
        if let Some(value) = &self.value {
            object.number("len", value.len() as u64);
        }
        object.end();
        out.put_u8(b'\n');
        if let Some(value) = &self.value {
            out.put_slice(value);
            out.put_u8(b'\n');
        }
    }
}

/// What was read of a line: all of it, or the part before an error.
#[cfg_attr(test, derive(Debug, PartialEq))]
pub(crate) struct Head<'a> {
    seen: u32,
    /// Its kind and key count if they were given.
    request: Request<'a>,
    has_kind: bool,
    has_key: bool,
    pub(crate) len: Option<u64>,
    /// What is over which limit, if that is why reading stopped.
    pub(crate) over: Option<(&'static str, usize)>,
}

impl Default for Head<'_> {
    fn default() -> Self {
        let request = Request::new(Kind::Health, "");
        Head { seen: 0, request, has_kind: false, has_key: false, len: None, over: None }
    }
}

const FIELDS: [&str; 18] = [
    "type",
    "id",
    "key",
    "client_uuid",
    "value",
    "len",
    "if_revision",
    "ttl_ms",
    "limit",
    "after",
    "snapshot",
    "values",
    "token",
    "features",
    "ahead",
    "exact",
    "name",
    "seen",
];

impl<'a> Head<'a> {
    /// Reads a line. After an error, what was read before it stays, and `id` and `len` are there if the line is JSON.
    pub(crate) fn read(&mut self, line: &'a [u8], value_len_max: usize) -> Result<(), String> {
        if self.scan(line, value_len_max) {
            return Ok(());
        }
        *self = Head::default();
        self.parse(line, value_len_max)
    }

    /// Reads a line of whatever shape.
    fn parse(&mut self, line: &'a [u8], value_len_max: usize) -> Result<(), String> {
        let mut json = serde_json::Deserializer::from_slice(line);
        let whole = HeadSeed { head: self, value_len_max }.deserialize(&mut json).and_then(|()| json.end());
        whole.map_err(|error| {
            let mut framing = Framing::default();
            // It gets as far as the line is JSON; that the line is wrong is known already.
            drop(FramingSeed(&mut framing).deserialize(&mut serde_json::Deserializer::from_slice(line)));
            self.len = self.len.or(framing.len);
            self.request.id = framing.id.unwrap_or(self.request.id);
            format!("malformed request: {error}")
        })
    }

    pub(crate) fn id(&self) -> Id<'a> {
        self.request.id
    }

    /// Gives the request its payload, if it had one, and says what keeps it from being one.
    pub(crate) fn complete(&mut self, payload: Option<&'a [u8]>) -> Result<(), String> {
        let request = &mut self.request;
        if !self.has_kind {
            return Err("missing field 'type'".into());
        }
        if request.value.is_some() && payload.is_some() {
            return Err("both 'value' and 'len': send a value in one form".into());
        }
        // A payload belongs to the framing: on a request that takes no value it is read past.
        if request.kind != Kind::Put {
            request.value = None;
        } else if let Some(payload) = payload {
            request.value = Some(payload.into());
        } else if request.value.is_none() {
            return Err("missing field 'value' (or 'len' and a payload)".into());
        }
        if request.kind.needs_key() && !self.has_key {
            return Err("missing field 'key'".into());
        }
        for (name, number) in [("ttl_ms", request.ttl_ms), ("limit", request.limit)] {
            if number == Some(0) {
                return Err(format!("'{name}' must be at least 1"));
            }
        }
        Ok(())
    }

    /// The request, once it is complete.
    pub(crate) fn into_request(self) -> Request<'a> {
        self.request
    }

    fn read_field<A: MapAccess<'a>>(&mut self, name: &str, map: &mut A, value_len_max: usize) -> Result<(), A::Error> {
        let Some(index) = FIELDS.iter().position(|field| *field == name) else {
            return map.next_value::<IgnoredAny>().map(drop);
        };
        if self.seen & (1 << index) != 0 {
            return Err(A::Error::custom(format_args!("field '{name}' given twice")));
        }
        self.seen |= 1 << index;
        let request = &mut self.request;
        match name {
            "type" => {
                request.kind = read_kind(&map.next_value::<Text<'a>>()?.0)?;
                self.has_kind = true;
            }
            "id" => self.request.id = self.read_id(map.next_value()?)?,
            "key" => {
                let key = text(map)?;
                self.has_key = key.is_some();
                request.key = key.unwrap_or_default();
            }
            "client_uuid" => {
                request.client_uuid = text(map)?;
                let len = request.client_uuid.as_ref().map_or(0, |name| name.len());
                self.within("client_uuid", len, NAME_LEN_MAX)?;
            }
            "value" => {
                let value = map.next_value_seed(ValueVisitor { len_max: value_len_max });
                if value.as_ref().is_err_and(|error| error.to_string().starts_with("value over the limit")) {
                    self.over = Some(("value", value_len_max));
                }
                let value = value?;
                self.within("value", value.len(), value_len_max)?;
                self.request.value = Some(value);
            }
            "len" => self.len = scalar(map)?,
            "if_revision" => request.if_revision = scalar(map)?,
            "ttl_ms" => request.ttl_ms = scalar(map)?,
            "limit" => request.limit = scalar(map)?,
            "after" => request.after = text(map)?,
            "snapshot" => request.snapshot = scalar(map)?.unwrap_or(false),
            "values" => {
                let form = text(map)?.map(|word| {
                    let unknown = || A::Error::custom("'values' is \"bytes\", \"text\" or \"payload\"");
                    ValueForm::from_word(&word).ok_or_else(unknown)
                });
                request.values = form.transpose()?;
            }
            "seen" => request.seen = text(map)?,
            "token" => request.token = text(map)?,
            "ahead" => request.ahead = scalar(map)?.unwrap_or(false),
            "exact" => request.exact = scalar(map)?.unwrap_or(false),
            "name" => {
                let label = text(map)?;
                self.within("name", label.as_ref().map_or(0, |label| label.len()), LABEL_LEN_MAX)?;
                if label.as_ref().is_some_and(|label| label.contains(char::is_control)) {
                    return Err(A::Error::custom("'name' must not hold control characters"));
                }
                self.request.name = label.filter(|label| !label.is_empty());
            }
            _ => self.request.features = self.read_features(map.next_value()?)?,
        }
        Ok(())
    }

    fn read_id<E: Error>(&mut self, raw: &'a RawValue) -> Result<Id<'a>, E> {
        self.within("id", raw.get().len(), NAME_LEN_MAX)?;
        Id::new(raw).ok_or_else(|| E::custom("'id' must be a string or a number"))
    }

    fn read_features<E: Error>(&mut self, raw: Option<&'a RawValue>) -> Result<Features, E> {
        let Some(raw) = raw else { return Ok(Features::NONE) };
        self.within("features", raw.get().len(), features::LIST_LEN_MAX)?;
        let list = serde_json::from_str::<NameList>(raw.get());
        list.map(|list| list.0).map_err(|_| E::custom("'features' is a list of names"))
    }

    fn within<E: Error>(&mut self, what: &'static str, len: usize, len_max: usize) -> Result<(), E> {
        if len <= len_max {
            return Ok(());
        }
        self.over = Some((what, len_max));
        Err(E::custom(format_args!("'{what}' over the limit")))
    }
}

/// A string, or null for none.
fn text<'a, A: MapAccess<'a>>(map: &mut A) -> Result<Option<Cow<'a, str>>, A::Error> {
    Ok(map.next_value::<Option<Text<'a>>>()?.map(|text| text.0))
}

/// A number or a flag, or null for none.
fn scalar<'a, T: ScalarType, A: MapAccess<'a>>(map: &mut A) -> Result<Option<T>, A::Error> {
    Ok(map.next_value::<Option<Scalar<T>>>()?.map(|scalar| scalar.0))
}

fn read_kind<E: Error>(word: &str) -> Result<Kind, E> {
    Kind::from_word(word).ok_or_else(|| {
        let words: Vec<_> = Kind::ALL.iter().map(|kind| kind.as_str()).collect();
        let shown: String = word.chars().take(32).collect();
        E::custom(format_args!("unknown type '{}'; the types are {}", shown.escape_debug(), words.join(", ")))
    })
}

struct HeadSeed<'h, 'a> {
    head: &'h mut Head<'a>,
    value_len_max: usize,
}

impl<'a> DeserializeSeed<'a> for HeadSeed<'_, 'a> {
    type Value = ();

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'a> Visitor<'a> for HeadSeed<'_, 'a> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object on one line, such as {\"type\":\"Get\",\"key\":\"a.b\"}")
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        Err(unexpected_text(&self))
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<Text<'a>>()? {
            self.head.read_field(&name.0, &mut map, self.value_len_max)?;
        }
        Ok(())
    }
}

/// What the framing needs of a line that is wrong: a second look at it, for nothing else.
#[derive(Default)]
struct Framing<'a> {
    id: Option<Id<'a>>,
    len: Option<u64>,
}

struct FramingSeed<'h, 'a>(&'h mut Framing<'a>);

impl<'a> DeserializeSeed<'a> for FramingSeed<'_, 'a> {
    type Value = ();

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'a> Visitor<'a> for FramingSeed<'_, 'a> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        Err(unexpected_text(&self))
    }

    fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<Text<'a>>()? {
            match &*name.0 {
                "id" => self.0.id = Id::new(map.next_value()?),
                "len" => {
                    // Of two, the first that is one counts, as in `Head`.
                    let len = map.next_value::<&RawValue>()?.get().parse().ok();
                    self.0.len = self.0.len.or(len);
                }
                _ => _ = map.next_value::<IgnoredAny>()?,
            }
        }
        Ok(())
    }
}
