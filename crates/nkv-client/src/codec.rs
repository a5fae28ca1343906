//! Values of a program's own types: a [`Codec`] makes bytes of them, and [`Typed`] is a store that speaks in them.

use std::borrow::Borrow;
use std::error::Error as StdError;
use std::fmt;
use std::marker::PhantomData;

use bytes::Bytes;
use nkv_types::{AsKey, AsPattern, Deleted, Entry, Error, Key, PutOptions, Revision, Store};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why a value could not be made bytes, or bytes no value.
pub type CodecError = Box<dyn StdError + Send + Sync>;

/// Makes bytes of values, and values of bytes.
///
/// # Contract
///
/// What [`encode`](Self::encode) makes of a value, [`decode`](Self::decode) turns back into an equal one, in any program that has
/// the codec. Bytes may come from anywhere: `decode` answers those that it cannot read with an error.
///
/// # Examples
///
/// ```
/// use bytes::Bytes;
/// use nkv_client::codec::{Codec, CodecError};
///
/// /// A temperature as text, such as `20.5 C`.
/// #[derive(Debug)]
/// struct Celsius;
///
/// impl Codec for Celsius {
///     type Value = f64;
///
///     fn encode(&self, value: &f64) -> Result<Bytes, CodecError> {
///         Ok(format!("{value} C").into())
///     }
///
///     fn decode(&self, bytes: Bytes) -> Result<f64, CodecError> {
///         let text = std::str::from_utf8(&bytes)?;
///         Ok(text.strip_suffix(" C").ok_or("no unit")?.parse()?)
///     }
/// }
///
/// assert_eq!(Celsius.decode(Celsius.encode(&20.5)?)?, 20.5);
/// # Ok::<(), CodecError>(())
/// ```
pub trait Codec: fmt::Debug + Send + Sync + 'static {
    /// What values are.
    type Value: Send + Sync;

    /// Makes bytes of a value.
    ///
    /// # Errors
    ///
    /// Any, if the value has no such form.
    fn encode(&self, value: &Self::Value) -> Result<Bytes, CodecError>;

    /// Makes a value of bytes.
    ///
    /// # Errors
    ///
    /// Any, if they are not such a value.
    fn decode(&self, bytes: Bytes) -> Result<Self::Value, CodecError>;
}

/// Bytes as they are.
#[derive(Clone, Copy, Debug, Default)]
pub struct BytesCodec;

impl Codec for BytesCodec {
    type Value = Bytes;

    fn encode(&self, value: &Bytes) -> Result<Bytes, CodecError> {
        Ok(value.clone())
    }

    fn decode(&self, bytes: Bytes) -> Result<Bytes, CodecError> {
        Ok(bytes)
    }
}

/// Text in UTF-8.
#[derive(Clone, Copy, Debug, Default)]
pub struct StringCodec;

impl Codec for StringCodec {
    type Value = String;

    fn encode(&self, value: &String) -> Result<Bytes, CodecError> {
        Ok(Bytes::copy_from_slice(value.as_bytes()))
    }

    fn decode(&self, bytes: Bytes) -> Result<String, CodecError> {
        Ok(String::from_utf8(bytes.into())?)
    }
}

/// JSON, as `put_as` and `get_as` have it.
pub struct JsonCodec<T>(PhantomData<fn() -> T>);

impl<T> JsonCodec<T> {
    /// The codec of a type.
    #[must_use]
    pub fn new() -> Self {
        JsonCodec(PhantomData)
    }
}

impl<T: Serialize + DeserializeOwned + Send + Sync + 'static> Codec for JsonCodec<T> {
    type Value = T;

    fn encode(&self, value: &T) -> Result<Bytes, CodecError> {
        Ok(serde_json::to_vec(value)?.into())
    }

    fn decode(&self, bytes: Bytes) -> Result<T, CodecError> {
        Ok(serde_json::from_slice(&bytes)?)
    }
}

/// Protobuf, in its binary form.
#[cfg(feature = "protobuf")]
pub struct ProtobufCodec<M>(PhantomData<fn() -> M>);

#[cfg(feature = "protobuf")]
impl<M> ProtobufCodec<M> {
    /// The codec of a message.
    #[must_use]
    pub fn new() -> Self {
        ProtobufCodec(PhantomData)
    }
}

#[cfg(feature = "protobuf")]
impl<M: prost::Message + Default + 'static> Codec for ProtobufCodec<M> {
    type Value = M;

    fn encode(&self, value: &M) -> Result<Bytes, CodecError> {
        Ok(value.encode_to_vec().into())
    }

    fn decode(&self, bytes: Bytes) -> Result<M, CodecError> {
        Ok(M::decode(bytes)?)
    }
}

macro_rules! codec_of {
    ($name:ident) => {
        impl<T> Clone for $name<T> {
            fn clone(&self) -> Self {
                *self
            }
        }

        impl<T> Copy for $name<T> {}

        impl<T> Default for $name<T> {
            fn default() -> Self {
                Self::new()
            }
        }

        impl<T> fmt::Debug for $name<T> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(stringify!($name))
            }
        }
    };
}

codec_of!(JsonCodec);
#[cfg(feature = "protobuf")]
codec_of!(ProtobufCodec);

/// A store whose values are of one type: a client, by whatever address, or the handle of a node in this process.
///
/// The store itself has everything else: subscriptions, patterns, batches.
///
/// # Examples
///
/// ```no_run
/// use nkv_client::Client;
/// use nkv_client::codec::{JsonCodec, Typed};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let client = Client::connect("127.0.0.1:4222").await?;
/// let levels = Typed::new(client, JsonCodec::<u8>::new());
/// levels.put("lamp.hall", 80).await?;
/// assert_eq!(levels.get("lamp.hall").await?, Some(80));
/// for (key, level) in levels.list("lamp.*").await? {
///     println!("{key}: {level} %");
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Typed<S, C> {
    store: S,
    codec: C,
}

impl<S: Store, C: Codec> Typed<S, C> {
    /// A store of values of `codec`.
    #[must_use]
    pub fn new(store: S, codec: C) -> Self {
        Typed { store, codec }
    }

    /// The store.
    #[must_use]
    pub fn store(&self) -> &S {
        &self.store
    }

    /// Reads a value; `None` if there is no such key.
    ///
    /// # Errors
    ///
    /// [`TypedError::Store`], and [`TypedError::Decode`] for a value of another type.
    pub async fn get(&self, key: impl AsKey) -> Result<Option<C::Value>, TypedError> {
        let entry = self.store.get(key).await?;
        entry.map(|entry| self.decode(entry).map(|(_, value)| value)).transpose()
    }

    /// Reads all values that a pattern selects, in key order.
    ///
    /// # Errors
    ///
    /// [`TypedError::Store`], and [`TypedError::Decode`] for the first value of another type.
    pub async fn list(&self, pattern: impl AsPattern) -> Result<Vec<(Key, C::Value)>, TypedError> {
        let entries = self.store.get_all(pattern).await?;
        entries.into_iter().map(|entry| self.decode(entry)).collect()
    }

    /// Whether there is such a key, with a value of whatever type.
    ///
    /// # Errors
    ///
    /// [`TypedError::Store`].
    pub async fn exists(&self, key: impl AsKey) -> Result<bool, TypedError> {
        let key = key.as_key()?;
        Ok(self.store.exists(&*key).await?)
    }

    /// Writes a value.
    ///
    /// # Errors
    ///
    /// [`TypedError::Store`]; [`TypedError::Encode`] if the value has no such form, and then nothing was changed.
    pub async fn put(&self, key: impl AsKey, value: impl Borrow<C::Value> + Send) -> Result<Revision, TypedError> {
        self.put_with(key, value, PutOptions::default()).await
    }

    /// Writes a value, with options: for how long, and only if the key is as it was read.
    ///
    /// # Errors
    ///
    /// Those of [`put`](Self::put).
    pub async fn put_with(
        &self,
        key: impl AsKey,
        value: impl Borrow<C::Value> + Send,
        options: PutOptions,
    ) -> Result<Revision, TypedError> {
        let text = key.key_text()?;
        let encode = |cause| TypedError::Encode { key: text.to_owned(), cause };
        let bytes = self.codec.encode(value.borrow()).map_err(encode)?;
        drop(value);
        Ok(self.store.put_with(key, bytes, options).await?)
    }

    /// Removes a key; its count is 0 if there was none.
    ///
    /// # Errors
    ///
    /// [`TypedError::Store`].
    pub async fn delete(&self, key: impl AsKey) -> Result<Deleted, TypedError> {
        let key = key.as_key()?;
        Ok(self.store.delete(&*key).await?)
    }

    fn decode(&self, entry: Entry) -> Result<(Key, C::Value), TypedError> {
        match self.codec.decode(entry.value) {
            Ok(value) => Ok((entry.key, value)),
            Err(cause) => Err(TypedError::Decode { key: entry.key.as_str().to_owned(), cause }),
        }
    }
}

/// What can go wrong with a typed store.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TypedError {
    /// The store refused the request or failed to serve it.
    #[error(transparent)]
    Store(#[from] Error),
    /// The value cannot be made bytes. Nothing was changed.
    #[error("the value for '{key}' cannot be encoded")]
    Encode {
        /// The key that was to be written.
        key: String,
        /// What the codec says.
        #[source]
        cause: CodecError,
    },
    /// The bytes of a key are not a value of the codec.
    #[error("the value of '{key}' is not as expected")]
    Decode {
        /// The key that was read.
        key: String,
        /// What the codec says.
        #[source]
        cause: CodecError,
    },
}
