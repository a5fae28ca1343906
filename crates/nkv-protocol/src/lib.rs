#![doc = include_str!("../README.md")]
// Bytes from anywhere must not end the process. Tests may.
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

mod answer;
mod chunks;
mod decoder;
mod features;
mod foreign;
mod json;
mod lists;
mod message;
mod notification;
mod request;

pub use answer::{Answer, BaseFields, ClientFields, Entries, GetEntry, ServerFields, SubscriberFields};
pub use chunks::Chunks;
pub use decoder::{Decoded, Decoder, Limits, Refusal};
pub use features::Features;
pub use lists::{Texts, Values, ValuesIter};
pub use message::{Body, ConnectedClient, Message, MessageDecoder, MessageError, Reason, Stats, Subscriber};
pub use notification::{ChangeNotice, alive, hello, leave_out_revision, reset, stale, synced, unsubscribed, update};
pub use request::{Id, Kind, Request};

/// The version of the protocol that this crate speaks.
pub const PROTOCOL: u64 = 1;

/// Status numbers, as in HTTP.
pub mod status {
    /// Done.
    pub const OK: u16 = 200;
    /// The request cannot be understood.
    pub const BAD_REQUEST: u16 = 400;
    /// There is no such key or subscription.
    pub const NOT_FOUND: u16 = 404;
    /// A request was not sent in time; the connection is closed.
    pub const TIMEOUT: u16 = 408;
    /// The key is at another revision.
    pub const CONFLICT: u16 = 409;
    /// Something is larger than its limit.
    pub const TOO_LARGE: u16 = 413;
    /// Too many of something; fewer, or later.
    pub const TOO_MANY: u16 = 429;
    /// Storage failed.
    pub const STORAGE_FAILED: u16 = 500;
    /// Overloaded or draining; later.
    pub const UNAVAILABLE: u16 = 503;
    /// The disk is full.
    pub const DISK_FULL: u16 = 507;
}

/// How values travel to a client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ValueForm {
    /// As arrays of byte numbers.
    #[default]
    Bytes,
    /// As strings where they are UTF-8, else as arrays.
    Text,
    /// Raw, behind the line.
    Payload,
}

impl ValueForm {
    /// The word for it in `Connect`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            ValueForm::Bytes => "bytes",
            ValueForm::Text => "text",
            ValueForm::Payload => "payload",
        }
    }

    /// How many bytes a value takes in this form.
    #[must_use]
    pub fn len_of(self, value: &[u8]) -> usize {
        match self {
            ValueForm::Payload => value.len(),
            ValueForm::Bytes | ValueForm::Text => json::value_len(value, self),
        }
    }

    pub(crate) fn from_word(word: &str) -> Option<Self> {
        [ValueForm::Bytes, ValueForm::Text, ValueForm::Payload].into_iter().find(|form| form.as_str() == word)
    }
}
