//! What a server says, as a client reads it.

use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;
use serde::de::value::{BorrowedStrDeserializer, Error as WordError};
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use thiserror::Error;

use crate::Features;
use crate::decoder::split_line;
use crate::features::NameList;
use crate::json::{Text, Value};

/// Longest message a client takes, in bytes: the largest `Get` with values in their longest form is left to whoever
/// asks for it in pages.
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
    pub keys: Vec<String>,
    /// Their revisions.
    pub revisions: Vec<u64>,
    /// Their values.
    pub values: Vec<Bytes>,
    /// Whether there are others.
    pub more: bool,
    /// Who would be told.
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
    #[serde(default)]
    pub exact: bool,
    /// For how long it has been subscribed, in milliseconds.
    pub since_ms: u64,
    /// Messages waiting for it.
    pub queued: u64,
    /// Changes passed over on its connection.
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
    pub since_ms: u64,
    /// How many subscriptions it has.
    pub subscriptions: u64,
    /// Messages waiting for it.
    pub queued: u64,
    /// Changes passed over on its connection.
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

#[derive(Deserialize)]
enum Wire<'a> {
    Hello,
    Alive,
    #[serde(borrow)]
    Base(WireBody<'a>),
    #[serde(borrow)]
    Get(WireBody<'a>),
    #[serde(borrow)]
    List(WireBody<'a>),
    #[serde(borrow)]
    Trace(WireBody<'a>),
    #[serde(borrow)]
    Version(WireBody<'a>),
    Stats(BTreeMap<String, serde_json::Value>),
    #[serde(borrow)]
    Update(WireUpdate<'a>),
    #[serde(borrow)]
    Close(WireClose<'a>),
    Reset {
        key: String,
    },
    Synced {
        key: String,
        revision: u64,
        epoch: String,
    },
}

#[derive(Deserialize)]
struct WireBody<'a> {
    #[serde(borrow)]
    id: &'a RawValue,
    status: u16,
    message: String,
    revision: Option<u64>,
    count: Option<u64>,
    #[serde(default)]
    keys: Vec<String>,
    #[serde(default)]
    revisions: Vec<u64>,
    #[serde(borrow, default)]
    data: Vec<Value<'a>>,
    #[serde(default)]
    lens: Vec<u64>,
    #[serde(default)]
    more: bool,
    #[serde(default)]
    subscribers: Vec<Subscriber>,
    #[serde(default)]
    clients: Vec<ConnectedClient>,
    version: Option<String>,
    protocol: Option<u64>,
    epoch: Option<String>,
    max_value: Option<u64>,
    features: Option<NameList>,
    patience_ms: Option<u64>,
}

#[derive(Deserialize)]
struct WireUpdate<'a> {
    #[serde(borrow)]
    key: Text<'a>,
    #[serde(borrow, default)]
    value: Value<'a>,
    revision: u64,
    #[serde(default)]
    skipped: u64,
}

#[derive(Deserialize)]
struct WireClose<'a> {
    key: String,
    #[serde(borrow)]
    reason: Text<'a>,
    #[serde(default)]
    revision: u64,
    #[serde(default)]
    skipped: u64,
}

/// Decodes a server's messages from a stream of bytes.
///
/// The input of a call starts where the last call's consumed bytes ended.
#[derive(Debug, Default)]
pub struct MessageDecoder {
    /// So many bytes of the line hold no newline.
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
    len: Option<u64>,
}

/// The length of the payload that belongs to a line, if one does.
fn payload_len(line: &[u8]) -> Result<Option<usize>, MessageError> {
    #[derive(Deserialize)]
    enum Framed {
        Update(Len),
        Get(Len),
    }
    let len = if line.starts_with(b"{\"Update\"") || line.starts_with(b"{\"Get\"") {
        let (Framed::Update(Len { len }) | Framed::Get(Len { len })) =
            serde_json::from_slice(line).map_err(|error| malformed(line, &error))?;
        len
    } else if is_without_payload(line) {
        None
    } else {
        unknown(line).and_then(|body| serde_json::from_str::<Len>(body?.get()).ok()?.len)
    };
    match len {
        Some(len) if len > MESSAGE_LEN_MAX => Err(MessageError::TooLarge { len_max: MESSAGE_LEN_MAX }),
        len => Ok(len.map(|len| len as usize)),
    }
}

/// The words that messages without a payload begin with.
const WITHOUT_PAYLOAD: [&str; 10] =
    ["Base", "Close", "Hello", "Alive", "Synced", "Reset", "List", "Trace", "Version", "Stats"];

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

        fn visit_str<E: serde::de::Error>(self, word: &str) -> Result<Unknown<'de>, E> {
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
    let wire: Wire<'_> = match serde_json::from_slice(line) {
        Ok(wire) => wire,
        Err(_) if unknown(line).is_some() => return Ok(Message::Unknown),
        Err(error) => return Err(malformed(line, &error)),
    };
    Ok(match wire {
        Wire::Hello => Message::Hello,
        Wire::Alive => Message::Alive,
        Wire::Base(body) | Wire::Get(body) | Wire::List(body) | Wire::Trace(body) | Wire::Version(body) => {
            Message::Answer(Box::new(answer(body, payload)?))
        }
        Wire::Stats(fields) => Message::Answer(Box::new(stats(fields))),
        Wire::Update(WireUpdate { key, value, revision, skipped }) => {
            let value = Bytes::copy_from_slice(payload.unwrap_or(&value.0));
            Message::Update { key: key.0.into_owned(), value, revision, skipped }
        }
        Wire::Close(WireClose { key, reason, revision, skipped }) => match Reason::from_word(&reason.0) {
            Some(reason) => Message::Close { key, reason, revision, skipped },
            None => Message::Unknown,
        },
        Wire::Reset { key } => Message::Reset { key },
        Wire::Synced { key, revision, epoch } => Message::Synced { key, revision, epoch },
    })
}

fn answer(body: WireBody<'_>, payload: Option<&[u8]>) -> Result<Body, MessageError> {
    let values = match payload {
        Some(payload) => split(payload, &body.lens)?,
        None => body.data.into_iter().map(|value| Bytes::from(value.0.into_owned())).collect(),
    };
    Ok(Body {
        id: body.id.get().to_owned(),
        status: body.status,
        message: body.message,
        revision: body.revision,
        count: body.count,
        keys: body.keys,
        revisions: body.revisions,
        values,
        more: body.more,
        subscribers: body.subscribers,
        clients: body.clients,
        version: body.version,
        protocol: body.protocol,
        epoch: body.epoch,
        max_value: body.max_value,
        features: body.features.unwrap_or_default().0,
        patience_ms: body.patience_ms,
        stats: Stats::default(),
    })
}

fn split(mut payload: &[u8], lens: &[u64]) -> Result<Vec<Bytes>, MessageError> {
    let mut values = Vec::with_capacity(lens.len());
    for len in lens {
        let len = usize::try_from(*len).unwrap_or(usize::MAX);
        let Some((value, rest)) = payload.split_at_checked(len) else { break };
        values.push(Bytes::copy_from_slice(value));
        payload = rest;
    }
    if values.len() == lens.len() && payload.is_empty() {
        return Ok(values);
    }
    Err(MessageError::Malformed { reason: "'lens' and 'len' do not agree".into() })
}

fn stats(fields: BTreeMap<String, serde_json::Value>) -> Body {
    let mut body = Body::default();
    for (name, value) in fields {
        match (name.as_str(), value) {
            ("id", id) => body.id = id.to_string(),
            ("message", serde_json::Value::String(message)) => body.message = message,
            ("status", status) => body.status = status.as_u64().and_then(|n| u16::try_from(n).ok()).unwrap_or(0),
            (_, serde_json::Value::String(word)) => _ = body.stats.words.insert(name, word),
            (_, value) => {
                if let Some(number) = value.as_u64() {
                    body.stats.numbers.insert(name, number);
                }
            }
        }
    }
    body
}

fn unterminated() -> MessageError {
    MessageError::Malformed { reason: "no newline after a payload".into() }
}

/// How many characters of the reason are kept that a message is none.
const REASON_CHARS_MAX: usize = 256;

fn malformed(line: &[u8], error: &serde_json::Error) -> MessageError {
    if line.starts_with(b"INFO {") {
        return MessageError::Nats;
    }
    // It may quote all that the peer sent.
    let whole = error.to_string();
    let mut reason: String = whole.chars().take(REASON_CHARS_MAX).collect();
    if reason.len() < whole.len() {
        reason.push_str("...");
    }
    MessageError::Malformed { reason }
}
