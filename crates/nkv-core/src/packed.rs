//! One record in one piece of memory: what a slot of the keyspace holds.
//!
//! First the length of the key, times four, and two flags; the revision; if there is an expiry, its two numbers; the key;
//! and the value, unless that is a long one, which lies elsewhere. The first two numbers take seven bits a byte, so that
//! a usual key with a value of 100 bytes fits the same 128 bytes that the allocator would give to the two alone.

use crate::record::Expiry;
use crate::revision::Revision;

const IS_LONG: u64 = 1;
const HAS_EXPIRY: u64 = 2;
const FLAG_BITS: u32 = 2;

/// A record as it was packed. All default, it is what an empty slot holds: the key of no record.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Unpacked<'a> {
    pub(crate) key: &'a [u8],
    /// Nothing where `is_long` says that it lies elsewhere.
    pub(crate) value: &'a [u8],
    pub(crate) is_long: bool,
    pub(crate) revision: Revision,
    pub(crate) expiry: Option<Expiry>,
}

impl<'a> Unpacked<'a> {
    pub(crate) fn pack(&self, out: &mut Vec<u8>) {
        let is_long = if self.is_long { IS_LONG } else { 0 };
        let has_expiry = if self.expiry.is_some() { HAS_EXPIRY } else { 0 };
        push_number(out, (self.key.len() as u64) << FLAG_BITS | is_long | has_expiry);
        push_number(out, self.revision.get());
        if let Some(Expiry { at, ttl_ms }) = self.expiry {
            out.extend_from_slice(&at.to_le_bytes());
            out.extend_from_slice(&ttl_ms.to_le_bytes());
        }
        out.extend_from_slice(self.key);
        out.extend_from_slice(self.value);
    }

    /// Of an empty slot, the default.
    pub(crate) fn of(packed: &'a [u8]) -> Self {
        Self::read(packed).unwrap_or_default()
    }

    fn read(mut rest: &'a [u8]) -> Option<Self> {
        let head = take_number(&mut rest)?;
        let revision = Revision::new(take_number(&mut rest)?);
        let mut expiry = None;
        if head & HAS_EXPIRY != 0 {
            let (at, ttl_ms) = (rest.split_off(..8)?, rest.split_off(..8)?);
            let number = |bytes: &[u8]| bytes.first_chunk().map(|chunk| u64::from_le_bytes(*chunk));
            expiry = Some(Expiry { at: number(at)?, ttl_ms: number(ttl_ms)? });
        }
        let (key, value) = rest.split_at_checked((head >> FLAG_BITS) as usize)?;
        Some(Unpacked { key, value, is_long: head & IS_LONG != 0, revision, expiry })
    }
}

/// Seven bits a byte, the lowest first; the highest bit says that more follow.
fn push_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn take_number(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..u64::BITS).step_by(7) {
        let byte = *bytes.split_off_first()?;
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            break;
        }
    }
    Some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_comes_out_again() {
        let numbers = [1, 127, 128, 1 << 21, (1 << 53) + 1, u64::MAX];
        for (revision, key_len) in
            numbers.into_iter().flat_map(|number| [1, 15, 31, 32, 1_024].map(|len| (number, len)))
        {
            for expiry in [None, Some(Expiry { at: revision, ttl_ms: u64::MAX })] {
                for (value, is_long) in [(&b""[..], false), (&[0xff; 100], false), (b"", true)] {
                    let (key, revision) = ("k".repeat(key_len), Revision::new(revision));
                    let record = Unpacked { key: key.as_bytes(), value, is_long, revision, expiry };
                    let mut packed = Vec::new();
                    record.pack(&mut packed);
                    assert_eq!(format!("{:?}", Unpacked::of(&packed)), format!("{record:?}"));
                }
            }
        }
    }

    #[test]
    fn a_usual_record_takes_four_bytes_more_than_its_key_and_value() {
        let (key, value, revision) = (b"bench.k00000001", &[b'v'; 100], Revision::new(1_000_000));
        let mut packed = Vec::new();
        Unpacked { key, value, is_long: false, revision, expiry: None }.pack(&mut packed);
        assert_eq!(packed.len(), key.len() + value.len() + 4);
    }
}
