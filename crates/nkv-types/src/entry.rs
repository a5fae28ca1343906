//! A key with its value, and what a delete removed.

use bytes::Bytes;
use nkv_core::Key;
use serde::de::DeserializeOwned;

use crate::error::{Error, ErrorKind, Result};
use crate::revision::Revision;

/// A key with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Entry {
    /// The key.
    pub key: Key,
    /// Its value: opaque bytes.
    pub value: Bytes,
    /// The revision of the put that stored it.
    pub revision: Revision,
}

impl Entry {
    /// Makes an entry.
    #[must_use]
    pub fn new(key: Key, value: impl Into<Bytes>, revision: Revision) -> Self {
        Entry { key, value: value.into(), revision }
    }

    /// Reads the value as JSON.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Json`] when it is not the JSON of a `T`.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.value).map_err(|error| {
            Error::new(ErrorKind::Json, format!("the value of '{}' is not as expected", self.key)).because(error)
        })
    }
}

/// What a delete did. That there was nothing to delete is no error: then `count` is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Deleted {
    /// How many keys were deleted.
    pub count: u64,
    /// The highest revision given to them; `None` if there were none.
    pub revision: Option<Revision>,
}

impl Deleted {
    /// `count` keys were deleted, the last of them at `revision`; nothing was if `count` is 0.
    #[must_use]
    pub fn new(count: u64, revision: Revision) -> Self {
        Deleted { count, revision: (count > 0).then_some(revision) }
    }
}
