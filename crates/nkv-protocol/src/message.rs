//! The messages of a server, as a client reads them.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::sync::LazyLock;

use bytes::Bytes;
use memchr::memmem::Finder;
use serde::de::value::{BorrowedStrDeserializer, Error as WordError};
use serde::de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use thiserror::Error;

use crate::Features;
use crate::decoder::split_line;
use crate::features::NameList;
use crate::json::{NoText, Scalar, Text, Value, read_scalar, unexpected_text};
use crate::lists::{Numbers, Texts, Values, objects};

/// Longest message a client takes, in bytes: the largest `Get` with values in their longest form is to be
/// asked for in pages.
const MESSAGE_LEN_MAX: u64 = 512 << 20;

/// A message from a server.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Message {
    /// A subscription was accepted.
    Hello,
    /// The answer to any other request.
    Answer(Box<Body>),
    /// A key has a new value.
    #[non_exhaustive]
    Update {
        /// The key.
        key: String,
        /// The value.
        value: Bytes,
        /// The revision of the change.
        revision: u64,
        /// Changes of the key that were passed over.
        skipped: u64,
    },
    /// A key is gone, or a subscription has ended.
    #[non_exhaustive]
    Close {
        /// The key, or the subscription's pattern.
        key: String,
        /// Which of the two, and why.
        reason: Reason,
        /// The revision of the change; 0 for the end of a subscription.
        revision: u64,
        /// Changes of the key that were passed over.
        skipped: u64,
    },
    /// A fresh snapshot begins that was not asked for, because too much waited: a key that is not in it is gone.
    #[non_exhaustive]
    Reset {
        /// The subscription's pattern.
        key: String,
    },
    /// A snapshot is complete.
    #[non_exhaustive]
    Synced {
        /// The subscription's pattern.
        key: String,
        /// The snapshot's revision.
        revision: u64,
        /// The epoch of the data.
        epoch: String,
    },
    /// The server keeps a request waiting; sent only to clients that named [`Features::ALIVE`].
    Alive,
    /// What the server answers may be old, or is not any more; sent only to clients that named [`Features::STALE`].
    #[non_exhaustive]
    Stale {
        /// For how many milliseconds what it shows may be old; none if it is not any more.
        since_ms: Option<u64>,
    },
    /// A message of a later version of the protocol, or a `Close` with a reason that this one does not know: to be
    /// passed over.
    Unknown,
}

/// Why a key or a subscription was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Reason {
    /// The key was deleted.
    Deleted,
    /// The key's TTL ended.
    Expired,
    /// The subscription was ended by an `Unsubscribe`.
    Unsubscribed,
    /// The subscription was replaced by another of the same name.
    Replaced,
}

impl Reason {
    fn from_word(word: &str) -> Option<Self> {
        Reason::deserialize(BorrowedStrDeserializer::<WordError>::new(word)).ok()
    }
}

/// The fields of an answer; which are filled depends on what was asked.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Body {
    /// The request's id, as JSON text.
    pub id: String,
    /// As in HTTP.
    pub status: u16,
    /// In words.
    pub message: String,
    /// The revision given, or the present one in a conflict.
    pub revision: Option<u64>,
    /// How many keys were deleted.
    pub count: Option<u64>,
    /// Keys found.
    pub keys: Texts,
    /// Their revisions.
    pub revisions: Vec<u64>,
    /// Their values.
    pub values: Values,
    /// Whether there are others.
    pub more: bool,
    /// The subscribers that would be notified.
    pub subscribers: Vec<Subscriber>,
    /// The connected clients, in the answer to a `Trace` without a key.
    pub clients: Vec<ConnectedClient>,
    /// The server's version.
    pub version: Option<String>,
    /// The protocol's version.
    pub protocol: Option<u64>,
    /// The epoch of the data.
    pub epoch: Option<String>,
    /// The longest value the server takes, in bytes.
    pub max_value: Option<u64>,
    /// What the server offers beyond the first version of the protocol.
    pub features: Features,
    /// For how many milliseconds the server may keep a request waiting before it answers or closes the connection.
    pub patience_ms: Option<u64>,
    /// The server's data have not what the client said that it has seen.
    pub begins_anew: bool,
    /// Figures.
    pub stats: Stats,
}

/// A subscriber, in the answer to `Trace`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct Subscriber {
    /// The client's name.
    pub client_uuid: String,
    /// What it subscribed to.
    pub pattern: String,
    /// Whether that is a key without its branch, if the server says so.
    #[serde(deserialize_with = "read_scalar", default)]
    pub exact: bool,
    /// For how long it has been subscribed, in milliseconds.
    #[serde(deserialize_with = "read_scalar")]
    pub since_ms: u64,
    /// Messages waiting for it.
    #[serde(deserialize_with = "read_scalar")]
    pub queued: u64,
    /// Changes passed over on its connection.
    #[serde(deserialize_with = "read_scalar")]
    pub skipped: u64,
    /// The name of its client for people, if that has one and the server says so.
    pub name: Option<String>,
    /// The address of its peer, if the server says so.
    pub peer: Option<String>,
}

/// A connected client, in the answer to a `Trace` without a key.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct ConnectedClient {
    /// The address of its peer.
    pub peer: String,
    /// Its `client_uuid`, if it gave one.
    pub client_uuid: Option<String>,
    /// Its name for people, if it has one.
    pub name: Option<String>,
    /// For how long it has been connected, in milliseconds.
    #[serde(deserialize_with = "read_scalar")]
    pub since_ms: u64,
    /// How many subscriptions it has.
    #[serde(deserialize_with = "read_scalar")]
    pub subscriptions: u64,
    /// Messages waiting for it.
    #[serde(deserialize_with = "read_scalar")]
    pub queued: u64,
    /// Changes passed over on its connection.
    #[serde(deserialize_with = "read_scalar")]
    pub skipped: u64,
}

/// A server's figures, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Those that are numbers.
    pub numbers: BTreeMap<String, u64>,
    /// Those that are words, such as `epoch` and `durability`.
    pub words: BTreeMap<String, String>,
}

/// What a server sent is no message.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MessageError {
    /// The peer is a NATS server.
    #[error("this is a NATS server, not nkv; both use port 4222 by default")]
    Nats,
    /// The peer is an HTTP server.
    #[error("this is an HTTP server; the HTTP port of an nkv server is written ws://host:port")]
    Http,
    /// The peer is a server of HTTP/2 alone, such as one of gRPC.
    #[error(
        "this is an HTTP/2 server, such as one of gRPC; use the port of nkv's own protocol, or ws://host:port for that of HTTP"
    )]
    Http2,
    /// A message is longer than this client takes.
    #[error("message over the limit of {len_max} bytes")]
    TooLarge {
        /// The limit.
        len_max: u64,
    },
    /// The peer does not speak this protocol.
    #[error("not an nkv message: {reason}")]
    Malformed {
        /// What is wrong.
        reason: String,
    },
}

/// A message that is written as a word alone: in an object, an error would quote what stands behind the word.
#[derive(Deserialize)]
enum Word {
    Hello,
    Alive,
}

/// A message that is written as an object. Reading it takes a few times the memory of its line at most, whatever the peer wrote: lists
/// are packed, and no error quotes a text. So numbers and flags are a [`Scalar`], objects a [`NoText`].
#[derive(Deserialize)]
enum Wire<'a> {
    #[serde(borrow)]
    Base(NoText<WireBody<'a>>),
    #[serde(borrow)]
    Get(NoText<WireBody<'a>>),
    #[serde(borrow)]
    List(NoText<WireBody<'a>>),
    #[serde(borrow)]
    Trace(NoText<WireBody<'a>>),
    #[serde(borrow)]
    Version(NoText<WireBody<'a>>),
    Stats(WireStats),
    #[serde(borrow)]
    Update(NoText<WireUpdate<'a>>),
    #[serde(borrow)]
    Close(NoText<WireClose<'a>>),
    Reset(NoText<WireReset>),
    Synced(NoText<WireSynced>),
    Stale(NoText<WireStale>),
}

#[derive(Deserialize)]
struct WireBody<'a> {
    #[serde(borrow)]
    id: &'a RawValue,
    status: Scalar<u16>,
    message: String,
    revision: Option<Scalar<u64>>,
    count: Option<Scalar<u64>>,
    #[serde(default)]
    keys: Texts,
    #[serde(borrow)]
    revisions: Option<&'a RawValue>,
    data: Option<Values>,
    #[serde(borrow)]
    lens: Option<&'a RawValue>,
    more: Option<Scalar<bool>>,
    #[serde(deserialize_with = "objects", default)]
    subscribers: Vec<Subscriber>,
    #[serde(deserialize_with = "objects", default)]
    clients: Vec<ConnectedClient>,
    version: Option<String>,
    protocol: Option<Scalar<u64>>,
    epoch: Option<String>,
    max_value: Option<Scalar<u64>>,
    features: Option<NoText<NameList>>,
    patience_ms: Option<Scalar<u64>>,
    begins_anew: Option<Scalar<bool>>,
}

#[derive(Deserialize)]
struct WireUpdate<'a> {
    #[serde(borrow)]
    key: Text<'a>,
    #[serde(borrow, default)]
    value: Value<'a>,
    revision: Scalar<u64>,
    skipped: Option<Scalar<u64>>,
}

#[derive(Deserialize)]
struct WireClose<'a> {
    key: String,
    #[serde(borrow)]
    reason: Text<'a>,
    revision: Option<Scalar<u64>>,
    skipped: Option<Scalar<u64>>,
}

#[derive(Deserialize)]
struct WireReset {
    key: String,
}

#[derive(Deserialize)]
struct WireStale {
    since_ms: Option<Scalar<u64>>,
}

#[derive(Deserialize)]
struct WireSynced {
    key: String,
    revision: Scalar<u64>,
    epoch: String,
}

/// How many figures are taken; others are passed over.
const FIGURES_MAX: usize = 1_024;

/// The answer to `Stats`: its fields are not known by name.
struct WireStats(Body);

enum Figure {
    Number(u64),
    Word(String),
    Other,
}

/// Decodes a server's messages from a stream of bytes.
///
/// The input of a call starts where the last call's consumed bytes ended.
#[derive(Debug, Default)]
pub struct MessageDecoder {
    /// The number of bytes of the line that were searched and hold no newline.
    scanned: usize,
    /// The length of the payload behind the line in hand, once that line is there.
    payload_len: Option<usize>,
}

impl MessageDecoder {
    /// A decoder at the start of a stream.
    #[must_use]
    pub fn new() -> Self {
        MessageDecoder::default()
    }

    /// Decodes the next message: how many bytes of the input are done with, and the message, if a whole one is there.
    ///
    /// # Errors
    ///
    /// [`MessageError`]: the stream is of no further use.
    pub fn decode(&mut self, input: &[u8]) -> Result<(usize, Option<Message>), MessageError> {
        let used = |rest: &[u8]| input.len().saturating_sub(rest.len());
        let mut rest = input;
        loop {
            let Some((whole_line, behind)) = split_line(rest, std::mem::take(&mut self.scanned)) else {
                if is_http2(rest) {
                    return Err(MessageError::Http2);
                }
                if rest.len() as u64 > MESSAGE_LEN_MAX {
                    return Err(MessageError::TooLarge { len_max: MESSAGE_LEN_MAX });
                }
                self.scanned = rest.len();
                return Ok((used(rest), None));
            };
            let line = whole_line.trim_ascii();
            if line.is_empty() {
                rest = behind;
                continue;
            }
            let payload_len = match self.payload_len.take() {
                None => payload_len(line)?,
                known => known,
            };
            let Some(len) = payload_len else { return Ok((used(behind), Some(parse(line, None)?))) };
            match behind.split_at_checked(len) {
                Some((payload, [b'\n', after @ ..])) => return Ok((used(after), Some(parse(line, Some(payload))?))),
                Some((_, [_, ..])) => return Err(unterminated()),
                _ => {
                    // The line's newline is found at once the next time.
                    self.scanned = whole_line.len().saturating_sub(1);
                    self.payload_len = Some(len);
                    return Ok((used(rest), None));
                }
            }
        }
    }
}

#[derive(Deserialize)]
struct Len {
    len: Option<Scalar<u64>>,
}

/// The length of the payload that belongs to a line, if one does.
fn payload_len(line: &[u8]) -> Result<Option<usize>, MessageError> {
    #[derive(Deserialize)]
    enum Framed {
        Update(NoText<Len>),
        Get(NoText<Len>),
    }
    let len = if line.starts_with(b"{\"Update\"") || line.starts_with(b"{\"Get\"") {
        if let Some(len) = plain_len(line) {
            return within_limit(len);
        }
        let (Framed::Update(NoText(Len { len })) | Framed::Get(NoText(Len { len }))) =
            serde_json::from_slice(line).map_err(|error| malformed(line, &error))?;
        len
    } else if is_without_payload(line) {
        None
    } else {
        unknown(line).and_then(|body| serde_json::from_str::<NoText<Len>>(body?.get()).ok()?.0.len)
    };
    within_limit(plain(len))
}

fn within_limit(len: Option<u64>) -> Result<Option<usize>, MessageError> {
    match len {
        Some(len) if len > MESSAGE_LEN_MAX => Err(MessageError::TooLarge { len_max: MESSAGE_LEN_MAX }),
        len => Ok(len.map(|len| len as usize)),
    }
}

/// The field `len` of the inner object, or that there is none, if that is plain without reading the line as JSON: there is
/// no escape in it, and the name at most once, right within the second brace.
fn plain_len(line: &[u8]) -> Option<Option<u64>> {
    static NAME: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new(b"\"len\""));
    if memchr::memchr(b'\\', line).is_some() {
        return None;
    }
    let Some(at) = NAME.find(line) else { return Some(None) };
    let (before, name) = line.split_at_checked(at)?;
    let behind = name.strip_prefix(NAME.needle())?;
    let is_within = before.iter().filter(|byte| **byte == b'{').count() == 2 && !before.contains(&b'}');
    if NAME.find(behind).is_some() || !is_within {
        return None;
    }
    let number = behind.strip_prefix(b":")?;
    let digits = number.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (number, behind) = number.split_at_checked(digits)?;
    let is_whole = matches!(behind.first(), Some(b',' | b'}')) && (number.len() == 1 || !number.starts_with(b"0"));
    std::str::from_utf8(number).ok()?.parse().ok().filter(|_| is_whole).map(Some)
}

/// The words that messages without a payload begin with.
const WITHOUT_PAYLOAD: [&str; 11] =
    ["Base", "Close", "Hello", "Alive", "Synced", "Reset", "Stale", "List", "Trace", "Version", "Stats"];

/// Whether a line is plainly one of the messages that never have a payload, as most are.
fn is_without_payload(line: &[u8]) -> bool {
    let word = line.strip_prefix(b"{").unwrap_or(line).strip_prefix(b"\"").unwrap_or_default();
    WITHOUT_PAYLOAD.iter().any(|known| word.strip_prefix(known.as_bytes()).is_some_and(|rest| rest.starts_with(b"\"")))
}

/// What a message has beside its name, if it is one that only a later version of the protocol knows.
fn unknown(line: &[u8]) -> Option<Option<&RawValue>> {
    struct Unknown<'a>(Option<&'a RawValue>);
    struct UnknownVisitor;
    impl<'de> Visitor<'de> for UnknownVisitor {
        type Value = Unknown<'de>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a message")
        }

        fn visit_str<E: Error>(self, word: &str) -> Result<Unknown<'de>, E> {
            if is_known(word) { Err(E::custom("a known one")) } else { Ok(Unknown(None)) }
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Unknown<'de>, A::Error> {
            match map.next_key::<Text<'de>>()?.filter(|name| !is_known(&name.0)) {
                // What follows but the end of the object is an error of its own.
                Some(_) => Ok(Unknown(Some(map.next_value()?))),
                None => Err(A::Error::custom("a known one, or none")),
            }
        }
    }
    impl<'de: 'a, 'a> Deserialize<'de> for Unknown<'a> {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_any(UnknownVisitor)
        }
    }
    serde_json::from_slice::<Unknown<'_>>(line).ok().map(|unknown| unknown.0)
}

fn is_known(word: &str) -> bool {
    WITHOUT_PAYLOAD.contains(&word) || matches!(word, "Update" | "Get")
}

fn parse(line: &[u8], payload: Option<&[u8]>) -> Result<Message, MessageError> {
    if line.starts_with(b"\"") {
        return match serde_json::from_slice(line) {
            Ok(Word::Hello) => Ok(Message::Hello),
            Ok(Word::Alive) => Ok(Message::Alive),
            Err(error) => passed_over(line, &error),
        };
    }
    let wire: Wire<'_> = match serde_json::from_slice(line) {
        Ok(wire) => wire,
        Err(error) => return passed_over(line, &error),
    };
    Ok(match wire {
        Wire::Base(body) | Wire::Get(body) | Wire::List(body) | Wire::Trace(body) | Wire::Version(body) => {
            Message::Answer(Box::new(answer(body.0, payload)?))
        }
        Wire::Stats(WireStats(body)) => Message::Answer(Box::new(body)),
        Wire::Update(NoText(WireUpdate { key, value, revision: Scalar(revision), skipped })) => {
            let value = Bytes::copy_from_slice(payload.unwrap_or(&value.0));
            Message::Update { key: key.0.into_owned(), value, revision, skipped: plain(skipped).unwrap_or(0) }
        }
        Wire::Close(NoText(WireClose { key, reason, revision, skipped })) => {
            let [revision, skipped] = [revision, skipped].map(|number| plain(number).unwrap_or(0));
            match Reason::from_word(&reason.0) {
                Some(reason) => Message::Close { key, reason, revision, skipped },
                None => Message::Unknown,
            }
        }
        Wire::Reset(NoText(WireReset { key })) => Message::Reset { key },
        Wire::Synced(NoText(WireSynced { key, revision: Scalar(revision), epoch })) => {
            Message::Synced { key, revision, epoch }
        }
        Wire::Stale(NoText(WireStale { since_ms })) => Message::Stale { since_ms: plain(since_ms) },
    })
}

/// What this version cannot read, if a later one may have meant it.
fn passed_over(line: &[u8], error: &serde_json::Error) -> Result<Message, MessageError> {
    if unknown(line).is_some() { Ok(Message::Unknown) } else { Err(malformed(line, error)) }
}

fn plain<T>(scalar: Option<Scalar<T>>) -> Option<T> {
    scalar.map(|Scalar(value)| value)
}

fn answer(body: WireBody<'_>, payload: Option<&[u8]>) -> Result<Body, MessageError> {
    let values = match payload {
        Some(payload) => {
            let lens = parallel("lens", body.lens, body.keys.len())?;
            Values::split(payload, lens).ok_or_else(|| wrong("'lens' and 'len' do not agree"))?
        }
        None => body.data.unwrap_or_default(),
    };
    let revisions = parallel("revisions", body.revisions, body.keys.len())?.read();
    Ok(Body {
        id: body.id.get().to_owned(),
        status: body.status.0,
        message: body.message,
        revision: plain(body.revision),
        count: plain(body.count),
        keys: body.keys,
        revisions: revisions.ok_or_else(|| wrong("'revisions' are not numbers"))?,
        values,
        more: plain(body.more).unwrap_or(false),
        subscribers: body.subscribers,
        clients: body.clients,
        version: body.version,
        protocol: plain(body.protocol),
        epoch: body.epoch,
        max_value: plain(body.max_value),
        features: body.features.unwrap_or_default().0.0,
        patience_ms: plain(body.patience_ms),
        begins_anew: plain(body.begins_anew).unwrap_or(false),
        stats: Stats::default(),
    })
}

/// Numbers that belong to keys; an error if there are more of them, or fewer.
fn parallel<'a>(name: &str, list: Option<&'a RawValue>, keys: usize) -> Result<Numbers<'a>, MessageError> {
    let numbers = Numbers::of(list).ok_or_else(|| wrong(&format!("'{name}' is not an array")))?;
    numbers.exactly(keys).ok_or_else(|| wrong(&format!("'{name}' and 'keys' are not of one length")))
}

impl<'de> Deserialize<'de> for WireStats {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StatsVisitor;
        impl<'de> Visitor<'de> for StatsVisitor {
            type Value = WireStats;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WireStats, A::Error> {
                let mut body = Body::default();
                while let Some(Text(name)) = map.next_key()? {
                    if name == "id" {
                        map.next_value::<&RawValue>()?.get().clone_into(&mut body.id);
                        continue;
                    }
                    let Stats { numbers, words } = &mut body.stats;
                    let has_room = numbers.len().saturating_add(words.len()) < FIGURES_MAX;
                    match (&*name, map.next_value()?) {
                        ("message", Figure::Word(message)) => body.message = message,
                        ("status", Figure::Number(status)) => body.status = u16::try_from(status).unwrap_or(0),
                        (_, Figure::Word(word)) if has_room => _ = words.insert(name.into_owned(), word),
                        (_, Figure::Number(number)) if has_room => _ = numbers.insert(name.into_owned(), number),
                        _ => {}
                    }
                }
                Ok(WireStats(body))
            }

            fn visit_str<E: Error>(self, _: &str) -> Result<WireStats, E> {
                Err(unexpected_text(&self))
            }
        }
        deserializer.deserialize_any(StatsVisitor)
    }
}

impl<'de> Deserialize<'de> for Figure {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FigureVisitor;
        impl<'de> Visitor<'de> for FigureVisitor {
            type Value = Figure;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a figure")
            }

            fn visit_u64<E>(self, number: u64) -> Result<Figure, E> {
                Ok(Figure::Number(number))
            }

            fn visit_str<E>(self, word: &str) -> Result<Figure, E> {
                Ok(Figure::Word(word.to_owned()))
            }

            fn visit_bool<E>(self, _: bool) -> Result<Figure, E> {
                Ok(Figure::Other)
            }

            fn visit_i64<E>(self, _: i64) -> Result<Figure, E> {
                Ok(Figure::Other)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Figure, E> {
                Ok(Figure::Other)
            }

            fn visit_unit<E>(self) -> Result<Figure, E> {
                Ok(Figure::Other)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Figure, A::Error> {
                IgnoredAny.visit_seq(seq).map(|_| Figure::Other)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Figure, A::Error> {
                IgnoredAny.visit_map(map).map(|_| Figure::Other)
            }
        }
        deserializer.deserialize_any(FigureVisitor)
    }
}

fn unterminated() -> MessageError {
    wrong("no newline after a payload")
}

fn wrong(reason: &str) -> MessageError {
    MessageError::Malformed { reason: reason.to_owned() }
}

/// The settings that a server of HTTP/2 begins with: a frame of a length of two bytes at most, type 4, no flags, stream 0.
fn is_http2(input: &[u8]) -> bool {
    matches!(input, [0, _, _, 4, 0, 0, 0, 0, 0, ..])
}

/// How many characters of the reason are kept that a message is none.
const REASON_CHARS_MAX: usize = 256;

fn malformed(line: &[u8], error: &serde_json::Error) -> MessageError {
    if line.starts_with(b"INFO {") {
        return MessageError::Nats;
    }
    if line.starts_with(b"HTTP/") {
        return MessageError::Http;
    }
    if is_http2(line) {
        return MessageError::Http2;
    }
    // It may quote a name of any length.
    let mut reason = Start::default();
    // The start of it is all there is to write, and that never fails.
    _ = write!(reason, "{error}");
    if reason.is_cut {
        reason.text.push_str("...");
    }
    MessageError::Malformed { reason: reason.text }
}

/// The first characters of what is written to it.
#[derive(Default)]
struct Start {
    text: String,
    chars: usize,
    is_cut: bool,
}

impl Write for Start {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = REASON_CHARS_MAX.saturating_sub(self.chars);
        for (at, char) in text.chars().take(room.saturating_add(1)).enumerate() {
            if at == room {
                self.is_cut = true;
                break;
            }
            self.text.push(char);
            self.chars = self.chars.saturating_add(1);
        }
        Ok(())
    }
}
