//! One record in one piece of memory: what a cell of the keyspace holds.
//!
//! First eight bytes, a number: three flags, the length of the key, that of the value, and the revision. If a revision has
//! more bits than are left, it follows; if there is an expiry, its two numbers do. Then come the key and the value, unless
//! that is a long one, which lies elsewhere. So a record knows its length, it is as long after the next put of a value
//! as long, and what lies behind it does not matter.

use crate::broken::broken;
use crate::key::KEY_LEN_MAX;
use crate::record::{Expiry, Timestamp, VALUE_LEN_LONG};
use crate::revision::Revision;

const IS_LONG: u64 = 1;
const HAS_EXPIRY: u64 = 2;
const HAS_REVISION: u64 = 4;
const KEY_LEN_AT: u32 = 3;
const VALUE_LEN_AT: u32 = KEY_LEN_AT + 11;
const REVISION_AT: u32 = VALUE_LEN_AT + 12;
const _: () = assert!(KEY_LEN_MAX < 1 << (VALUE_LEN_AT - KEY_LEN_AT));
const _: () = assert!(VALUE_LEN_LONG <= 1 << (REVISION_AT - VALUE_LEN_AT));

/// A record as it was packed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unpacked<'a> {
    pub(crate) key: &'a [u8],
    /// Nothing where `is_long` says that it lies elsewhere.
    pub(crate) value: &'a [u8],
    pub(crate) is_long: bool,
    pub(crate) revision: Revision,
    pub(crate) expiry: Option<Expiry>,
}

impl<'a> Unpacked<'a> {
    /// The key of a backend is not checked again, but one that is too long would end in the value's length.
    pub(crate) fn pack(&self, out: &mut Vec<u8>) {
        assert!(self.key.len() <= KEY_LEN_MAX && self.value.len() < VALUE_LEN_LONG, "what is packed is short");
        let flag = |flag, is_set| if is_set { flag } else { 0 };
        let revision = self.revision.get();
        let fits = revision < 1 << (u64::BITS - REVISION_AT);
        let head = flag(IS_LONG, self.is_long)
            | flag(HAS_EXPIRY, self.expiry.is_some())
            | flag(HAS_REVISION, !fits)
            | (self.key.len() as u64) << KEY_LEN_AT
            | (self.value.len() as u64) << VALUE_LEN_AT
            | flag(revision << REVISION_AT, fits);
        out.extend_from_slice(&head.to_le_bytes());
        if !fits {
            out.extend_from_slice(&revision.to_le_bytes());
        }
        if let Some(Expiry { at, ttl_ms }) = self.expiry {
            out.extend_from_slice(&at.as_millis().to_le_bytes());
            out.extend_from_slice(&ttl_ms.to_le_bytes());
        }
        out.extend_from_slice(self.key);
        out.extend_from_slice(self.value);
    }

    /// What was packed, and what may lie behind it.
    pub(crate) fn of(packed: &'a [u8]) -> Self {
        Self::read(packed).unwrap_or_else(|| broken("a record is longer than its place"))
    }

    fn read(mut rest: &'a [u8]) -> Option<Self> {
        let head = take_number(&mut rest)?;
        let bits = |from, to| (head >> from & ((1_u64 << (to - from)) - 1)) as usize;
        let mut revision = head >> REVISION_AT;
        let mut expiry = None;
        if head & (HAS_REVISION | HAS_EXPIRY) != 0 {
            if head & HAS_REVISION != 0 {
                revision = take_number(&mut rest)?;
            }
            if head & HAS_EXPIRY != 0 {
                expiry = Some(Expiry {
                    at: Timestamp::from_millis(take_number(&mut rest)?),
                    ttl_ms: take_number(&mut rest)?,
                });
            }
        }
        let key = rest.split_off(..bits(KEY_LEN_AT, VALUE_LEN_AT))?;
        let value = rest.get(..bits(VALUE_LEN_AT, REVISION_AT))?;
        Some(Unpacked { key, value, is_long: head & IS_LONG != 0, revision: Revision::new(revision), expiry })
    }
}

fn take_number(bytes: &mut &[u8]) -> Option<u64> {
    let (number, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(u64::from_le_bytes(*number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_comes_out_again() {
        let numbers = [1, 255, (1 << 38) - 1, 1 << 38, (1 << 53) + 1, u64::MAX];
        for (revision, key_len) in
            numbers.into_iter().flat_map(|number| [1, 15, 31, 32, 1_024].map(|len| (number, len)))
        {
            for expiry in [None, Some(Expiry { at: Timestamp::from_millis(revision), ttl_ms: u64::MAX })] {
                for (value, is_long) in [(&b""[..], false), (&[0xff; VALUE_LEN_LONG - 1], false), (b"", true)] {
                    let (key, revision) = ("k".repeat(key_len), Revision::new(revision));
                    let record = Unpacked { key: key.as_bytes(), value, is_long, revision, expiry };
                    let mut packed = Vec::new();
                    record.pack(&mut packed);
                    packed.push(b'x');
                    assert_eq!(format!("{:?}", Unpacked::of(&packed)), format!("{record:?}"));
                }
            }
        }
    }

    #[test]
    fn a_usual_record_takes_eight_bytes_more_than_its_key_and_value_at_each_revision() {
        let (key, value) = (b"bench.k00000001", &[b'v'; 100]);
        for revision in [1, 1_000_000, 100_000_000_000].map(Revision::new) {
            let mut packed = Vec::new();
            Unpacked { key, value, is_long: false, revision, expiry: None }.pack(&mut packed);
            assert_eq!(packed.len(), key.len() + value.len() + 8);
        }
    }
}
