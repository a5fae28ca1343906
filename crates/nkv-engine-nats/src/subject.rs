//! Keys as names of a NATS bucket: plain ones as they are, the others escaped, each in exactly one way.

use std::fmt::Write;

use nkv_core::Key;

/// What a name of a bucket may consist of.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'/' | b'_' | b'=' | b'.')
}

/// Whether an `=` that these bytes follow would be read as the beginning of an escaped byte.
fn is_code(after: &[u8]) -> bool {
    matches!(after, [a, b, ..] if is_digit(*a) && is_digit(*b))
}

fn is_digit(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'A'..=b'F')
}

/// The name of a key. A byte that no name may have is written `=XX`, in hexadecimal; so is an `=` before two such digits.
pub(crate) fn encode(key: &str) -> String {
    let bytes = key.as_bytes();
    let mut name = String::with_capacity(bytes.len());
    for (at, &byte) in bytes.iter().enumerate() {
        let is_mistaken = byte == b'=' && is_code(bytes.get(at.saturating_add(1)..).unwrap_or_default());
        if is_plain(byte) && !is_mistaken {
            name.push(char::from(byte));
        } else {
            // Into a string, which cannot fail.
            let _ = write!(name, "={byte:02X}");
        }
    }
    name
}

/// The key of a name, if it is the name of one: a second spelling of a key is not.
pub(crate) fn decode(name: &str) -> Option<Key> {
    if !name.contains('=') {
        return Key::new(name).ok().filter(|_| name.bytes().all(is_plain));
    }
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        match after {
            [a, b, others @ ..] if byte == b'=' && is_code(after) => {
                let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
                bytes.push((digit(*a)? << 4) | digit(*b)?);
                rest = others;
            }
            _ => bytes.push(byte),
        }
    }
    let text = String::from_utf8(bytes).ok()?;
    Key::new(&text).ok().filter(|key| encode(key.as_str()) == name)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn plain_keys_stay_plain_and_others_are_escaped() {
        for (key, name) in [
            ("host.db1.load", "host.db1.load"),
            ("a/b_c-d=e", "a/b_c-d=e"),
            ("a=b=", "a=b="),
            ("a=4", "a=4"),
            ("a=41", "a=3D41"),
            ("a=4a", "a=4a"),
            ("ä", "=C3=A4"),
            ("=ä", "==C3=A4"),
            ("$x.>", "=24x.=3E"),
        ] {
            assert_eq!(encode(key), name);
            assert_eq!(decode(name).map(|key| key.as_str().to_owned()).as_deref(), Some(key));
        }
    }

    #[test]
    fn a_second_spelling_is_no_key() {
        for name in ["=41", "a=2E", "=C3=a4", "a=3Db", "=00nkv", "=FF", "a..b", "", "$x", "a*", ".a"] {
            assert_eq!(decode(name), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn each_key_has_one_name_and_each_name_one_key(text in "[a-c=0-9A-F.ä>$]{1,12}|\\PC{1,20}", other in "[a=0-9A-F]{1,8}") {
            if let Ok(key) = Key::new(&text) {
                let name = encode(&text);
                prop_assert!(name.bytes().all(is_plain));
                prop_assert_eq!(decode(&name), Some(key));
            }
            if let Some(key) = decode(&other) {
                prop_assert_eq!(encode(key.as_str()), other);
            }
        }
    }
}
