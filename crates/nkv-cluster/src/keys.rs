//! The keys that the nodes of a cluster share.

use std::fmt;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sha2::{Digest, Sha256};
use thiserror::Error;
use zeroize::Zeroizing;

/// Sets what is made of a key here apart from what another program makes of it.
const DOMAIN: &[u8] = b"nkv-cluster shared key 1";

/// The secret that the nodes of a cluster share, for [`Options::keys`](crate::Options::keys): with it, nodes prove to each other
/// that they have it, and all that they say is encrypted.
///
/// The first key is used for connections that this node opens; each is taken from a peer that opens one. So keys can be changed
/// while all nodes run, by [`Cluster::set_keys`](crate::Cluster::set_keys): the new one is added at the end on all nodes, then it
/// is put first on all, then the old one is left out.
///
/// Keys are not shown by `Debug`, and their memory is zeroed when it is given back.
///
/// # Examples
///
/// ```
/// use nkv_cluster::Keys;
///
/// let keys: Keys = "# of this year\nMDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=\n".parse()?;
/// assert_eq!(keys, Keys::new(&["0123456789abcdef0123456789abcdef"])?);
/// # Ok::<(), nkv_cluster::KeysError>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Keys {
    first: SharedKey,
    others: Vec<SharedKey>,
}

/// 32 bytes that were derived of a key.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct SharedKey(Zeroizing<[u8; 32]>);

/// Why there are no [`Keys`]. It says where, and shows nothing of a key.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct KeysError(String);

impl Keys {
    /// Keys, at most. A peer that has none of them costs the test of each.
    pub const MAX: usize = 16;

    /// Keys of 16, 24 or 32 random bytes.
    ///
    /// # Errors
    ///
    /// [`KeysError`] for another length, no key, or more than [`MAX`](Self::MAX).
    pub fn new(keys: &[impl AsRef<[u8]>]) -> Result<Self, KeysError> {
        let derived = (1..).zip(keys).map(|(number, key)| {
            SharedKey::derive(key.as_ref()).map_err(|what| KeysError(format!("key {number}: {what}")))
        });
        Self::of(derived)
    }

    fn of(keys: impl Iterator<Item = Result<SharedKey, KeysError>>) -> Result<Self, KeysError> {
        let mut others: Vec<SharedKey> = Vec::with_capacity(Self::MAX);
        for key in keys {
            if others.len() >= Self::MAX {
                return Err(KeysError(format!("more than {} keys", Self::MAX)));
            }
            others.push(key?);
        }
        if others.is_empty() {
            return Err(KeysError("no key".into()));
        }
        Ok(Keys { first: others.remove(0), others })
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.others.len().saturating_add(1)
    }

    pub(crate) fn first(&self) -> &SharedKey {
        &self.first
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &SharedKey> {
        std::iter::once(&self.first).chain(&self.others)
    }

    pub(crate) fn contains(&self, key: &SharedKey) -> bool {
        self.iter().any(|known| known == key)
    }
}

/// The text of a file: keys in base64, one a line. Blank lines and those that begin with `#` are left out.
impl std::str::FromStr for Keys {
    type Err = KeysError;

    fn from_str(text: &str) -> Result<Self, KeysError> {
        let lines = (1..).zip(text.lines().map(str::trim));
        let keys = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
        Self::of(keys.map(|(number, line)| {
            let wrong = |what: String| KeysError(format!("line {number}: {what}"));
            let key =
                BASE64_STANDARD.decode(line).map_err(|_| wrong("it is not base64 (RFC 4648, with padding)".into()))?;
            SharedKey::derive(&Zeroizing::new(key)).map_err(wrong)
        }))
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keys({})", self.count())
    }
}

impl SharedKey {
    fn derive(key: &[u8]) -> Result<Self, String> {
        if ![16, 24, 32].contains(&key.len()) {
            return Err(format!("a key has 16, 24 or 32 bytes, and this one has {}", key.len()));
        }
        let digest = Sha256::new().chain_update(DOMAIN).chain_update(key).finalize();
        let mut derived = Zeroizing::new([0; 32]);
        derived.copy_from_slice(&digest);
        Ok(SharedKey(derived))
    }

    pub(crate) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for SharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedKey")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text_of(keys: &[&[u8]]) -> String {
        keys.iter().map(|key| BASE64_STANDARD.encode(key) + "\n").collect()
    }

    #[test]
    fn a_file_has_keys_of_three_lengths_blank_lines_and_remarks() {
        let (a, b, c) = ([1; 16], [2; 24], [3; 32]);
        let text = text_of(&[&a, &b, &c]).replace('\n', "\r\n  \n# MDEy\n");
        let keys: Keys = text.parse().unwrap();
        assert_eq!(keys, Keys::new(&[&a[..], &b, &c]).unwrap());
        assert_eq!(keys.count(), 3);
        let derived: Vec<_> = keys.iter().map(|key| *key.bytes()).collect();
        assert_eq!(derived.len(), 3);
        assert!(derived[0] != derived[1] && derived[1] != derived[2] && derived[2] != c, "a key is used as it is");
        assert_eq!(keys.first().bytes(), &derived[0]);
    }

    #[test]
    fn what_is_no_file_of_keys_is_refused_by_its_line_and_without_its_content() {
        let good = text_of(&[&[7; 16]]);
        for (text, said) in [
            (String::new(), "no key"),
            ("# none\n\n".into(), "no key"),
            (format!("{good}\nsecret!\n"), "line 3: it is not base64 (RFC 4648, with padding)"),
            (format!("{good}c2VjcmV0\n"), "line 2: a key has 16, 24 or 32 bytes, and this one has 6"),
            (good.trim_end().trim_end_matches('=').into(), "line 1: it is not base64 (RFC 4648, with padding)"),
            (good.repeat(Keys::MAX + 1), "more than 16 keys"),
        ] {
            assert_eq!(text.parse::<Keys>(), Err(KeysError(said.into())), "{text}");
        }
        assert_eq!(good.repeat(Keys::MAX).parse::<Keys>().unwrap().count(), Keys::MAX);
        assert_eq!(
            Keys::new(&["short"]),
            Err(KeysError("key 1: a key has 16, 24 or 32 bytes, and this one has 5".into()))
        );
    }

    #[test]
    fn a_key_is_not_shown() {
        let keys = Keys::new(&[[7; 16], [8; 16]]).unwrap();
        assert_eq!(format!("{keys:?} {:?}", keys.first()), "Keys(2) SharedKey");
    }
}
