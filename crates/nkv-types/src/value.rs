//! What is a value.

use std::borrow::Cow;

use bytes::Bytes;
use serde::Serialize;

use crate::error::{Error, ErrorKind, Result};

/// The JSON of the value for a key.
///
/// # Errors
///
/// [`ErrorKind::Json`] where there is none.
pub fn to_json<T: Serialize + ?Sized>(key: &str, value: &T) -> Result<Bytes> {
    let json = serde_json::to_vec(value).map_err(|error| {
        Error::new(ErrorKind::Json, format!("the value for '{key}' cannot be made JSON")).because(error)
    })?;
    Ok(json.into())
}

/// What is a value, or can be made one: texts, vectors and slices of bytes, [`Bytes`]. Owned ones are not copied.
pub trait IntoValue: Send {
    /// The value.
    fn into_value(self) -> Bytes;
}

/// Not copied.
macro_rules! owned {
    ($($of:ty),*) => {$(
        impl IntoValue for $of {
            fn into_value(self) -> Bytes {
                Bytes::from(self)
            }
        }
    )*};
}

owned!(Bytes, Vec<u8>, Box<[u8]>, String);

/// Copied.
macro_rules! borrowed {
    ($($of:ty),*) => {$(
        impl IntoValue for $of {
            fn into_value(self) -> Bytes {
                let bytes: &[u8] = self.as_ref();
                Bytes::copy_from_slice(bytes)
            }
        }
    )*};
}

borrowed!(&str, &[u8], &String, &Vec<u8>);

impl<const N: usize> IntoValue for &[u8; N] {
    fn into_value(self) -> Bytes {
        Bytes::copy_from_slice(self)
    }
}

impl<const N: usize> IntoValue for [u8; N] {
    fn into_value(self) -> Bytes {
        Bytes::copy_from_slice(&self)
    }
}

impl IntoValue for &Bytes {
    fn into_value(self) -> Bytes {
        self.clone()
    }
}

impl IntoValue for Cow<'_, [u8]> {
    fn into_value(self) -> Bytes {
        self.into_owned().into()
    }
}

impl IntoValue for Cow<'_, str> {
    fn into_value(self) -> Bytes {
        self.into_owned().into()
    }
}
