//! A register: what a cluster knows of one key. Of two, the larger one is kept, on every node.

use std::hash::Hasher;

use bytes::Bytes;
use nkv_core::{Action, Change, Key, Meta, Reason, Revision};
use siphasher::sip::SipHasher13;

use crate::bytes::{Reader, Writer};
use crate::stamp::{Hlc, Millis, NodeId, Stamp};

/// What a write left of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content<V = Bytes> {
    /// A value, which ends so long after its stamp.
    Put { value: V, ttl: Option<Millis> },
    /// A value whose time has ended: the same write as the `Put`, without its value.
    Ended { ttl: Millis, hash: u64 },
    /// A tombstone. Its age counts from here, not from the stamp: a delete that was inferred has the stamp of what it deletes.
    Deleted { at: Millis },
}

/// What a cluster knows of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Register<V = Bytes> {
    pub(crate) stamp: Stamp,
    pub(crate) content: Content<V>,
    /// Of the content as it was written: a value that has ended has that of the value.
    pub(crate) hash: u64,
}

/// A register without its value, which the node's store has.
pub(crate) type Head = Register<()>;

/// Orders registers: by stamp; of one stamp a tombstone is above a value, and the rest is by content and by its hash, so that
/// all nodes keep the same one.
type Rank = (Stamp, Option<Millis>, u64);

impl Register {
    pub(crate) fn new(stamp: Stamp, content: Content) -> Self {
        let hash = match &content {
            Content::Put { value, ttl } => {
                let mut hasher = SipHasher13::new();
                hasher.write_u64(ttl.unwrap_or(0));
                hasher.write(value);
                hasher.finish()
            }
            Content::Ended { hash, .. } => *hash,
            Content::Deleted { at } => *at,
        };
        Register { stamp, content, hash }
    }

    /// What is kept of it beside the store.
    pub(crate) fn head(&self) -> Head {
        let content = match self.content {
            Content::Put { ttl, .. } => Content::Put { value: (), ttl },
            Content::Ended { ttl, hash } => Content::Ended { ttl, hash },
            Content::Deleted { at } => Content::Deleted { at },
        };
        Head { stamp: self.stamp, content, hash: self.hash }
    }
}

impl Head {
    /// The whole register, with the value that is asked for where there is one; `None` if that is not there.
    pub(crate) fn with(&self, value: impl FnOnce() -> Option<Bytes>) -> Option<Register> {
        let content = match self.content {
            Content::Put { ttl, .. } => Content::Put { value: value()?, ttl },
            Content::Ended { ttl, hash } => Content::Ended { ttl, hash },
            Content::Deleted { at } => Content::Deleted { at },
        };
        Some(Register { stamp: self.stamp, content, hash: self.hash })
    }

    /// The same content at another stamp, which it was to have had.
    pub(crate) fn restamped(&self, stamp: Stamp) -> Head {
        match self.content {
            Content::Deleted { .. } => {
                let at = stamp.time.millis();
                Head { stamp, content: Content::Deleted { at }, hash: at }
            }
            _ => Head { stamp, ..self.clone() },
        }
    }
}

impl<V> Register<V> {
    fn rank(&self) -> Rank {
        let deleted = match self.content {
            Content::Deleted { at } => Some(at),
            Content::Put { .. } | Content::Ended { .. } => None,
        };
        (self.stamp, deleted, self.hash)
    }

    /// Whether it is of a later write than another, or wins among equal stamps.
    pub(crate) fn is_above<W>(&self, other: &Register<W>) -> bool {
        self.rank() > other.rank()
    }

    /// Whether readers see a value.
    pub(crate) fn is_live(&self) -> bool {
        matches!(self.content, Content::Put { .. })
    }

    /// When its value ends or has ended, if it does by itself.
    pub(crate) fn end(&self) -> Option<Millis> {
        match &self.content {
            Content::Put { ttl, .. } => ttl.map(|ttl| self.stamp.time.millis().saturating_add(ttl)),
            Content::Ended { ttl, .. } => Some(self.stamp.time.millis().saturating_add(*ttl)),
            Content::Deleted { .. } => None,
        }
    }

    /// From when on its age as a tombstone counts.
    pub(crate) fn gone_at(&self) -> Option<Millis> {
        match &self.content {
            Content::Put { .. } => None,
            Content::Ended { .. } => self.end(),
            Content::Deleted { at } => Some(*at),
        }
    }

    /// The same write without its value, where it has a TTL.
    pub(crate) fn ended(&self) -> Option<Register> {
        let Content::Put { ttl: Some(ttl), .. } = self.content else { return None };
        let content = Content::Ended { ttl, hash: self.hash };
        Some(Register { stamp: self.stamp, content, hash: self.hash })
    }

    /// What tells it from any other register of the key, beside the time of its stamp.
    pub(crate) fn rest(&self) -> u64 {
        let mut hasher = SipHasher13::new();
        let (stamp, deleted, hash) = self.rank();
        hasher.write_u64(stamp.node.0);
        hasher.write_u64(deleted.map_or(0, |at| at.saturating_add(1)));
        hasher.write_u64(hash);
        hasher.finish()
    }

    /// Its part in the digests of a store.
    pub(crate) fn digest(&self, key_hash: u64) -> u64 {
        let mut hasher = SipHasher13::new();
        hasher.write_u64(key_hash);
        hasher.write_u64(self.stamp.time.0);
        hasher.write_u64(self.rest());
        hasher.finish()
    }

    /// All of it but the value, for storage to keep.
    pub(crate) fn meta(&self) -> Meta {
        let mut meta = Writer::default();
        self.write_head(&mut meta);
        Meta::new(&meta.into_bytes())
    }

    pub(crate) fn write_head(&self, to: &mut Writer) {
        let kind = match &self.content {
            Content::Put { ttl: None, .. } => PUT,
            Content::Put { ttl: Some(_), .. } => PUT_WITH_TTL,
            Content::Ended { .. } => ENDED,
            Content::Deleted { .. } => DELETED,
        };
        to.u8(kind);
        to.u64(self.stamp.time.0);
        to.u64(self.stamp.node.0);
        match &self.content {
            Content::Put { ttl, .. } => ttl.iter().for_each(|ttl| to.u64(*ttl)),
            Content::Ended { ttl, hash } => {
                to.u64(*ttl);
                to.u64(*hash);
            }
            Content::Deleted { at } => to.u64(*at),
        }
    }
}

impl Register {
    /// Reads what [`write_head`](Self::write_head) wrote; the value is asked for where there is one. `None` for anything else.
    pub(crate) fn read(from: &mut Reader, value: impl FnOnce(&mut Reader) -> Option<Bytes>) -> Option<Register> {
        let kind = from.u8()?;
        let stamp = Stamp { time: Hlc(from.u64()?), node: NodeId(from.u64()?) };
        let content = match kind {
            PUT => Content::Put { ttl: None, value: value(from)? },
            PUT_WITH_TTL => Content::Put { ttl: Some(from.u64()?), value: value(from)? },
            ENDED => Content::Ended { ttl: from.u64()?, hash: from.u64()? },
            DELETED => Content::Deleted { at: from.u64()? },
            _ => return None,
        };
        Some(Register::new(stamp, content))
    }

    /// The change that has a node's store be like this.
    pub(crate) fn change(&self, key: &Key, revision: Revision) -> Change {
        let action = match &self.content {
            // The cluster says when it ends: the store's own clock does not.
            Content::Put { value, .. } => Action::Put { value: value.clone(), expiry: None },
            Content::Ended { .. } => Action::Delete { reason: Reason::Expired },
            Content::Deleted { .. } => Action::Delete { reason: Reason::Deleted },
        };
        Change { key: key.clone(), revision, replaces: Revision::ZERO, action, meta: self.meta() }
    }
}

const PUT: u8 = 0;
const PUT_WITH_TTL: u8 = 1;
const ENDED: u8 = 2;
const DELETED: u8 = 3;

/// A register with its key, as nodes give them to each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) key: Key,
    pub(crate) register: Register,
}

impl Record {
    pub(crate) fn write(&self, to: &mut Writer) {
        self.register.write_head(to);
        if let Content::Put { value, .. } = &self.register.content {
            to.bytes(value);
        }
        to.bytes(self.key.as_str().as_bytes());
    }

    pub(crate) fn read(from: &mut Reader) -> Option<Record> {
        // It is kept: a part of its frame would keep all of that.
        let value = |from: &mut Reader| Some(Bytes::copy_from_slice(&from.bytes()?));
        let register = Register::read(from, value)?;
        let key = from.bytes()?;
        let key = Key::new(std::str::from_utf8(&key).ok()?).ok()?;
        Some(Record { key, register })
    }

    /// How many bytes it takes, about.
    pub(crate) fn len(&self) -> usize {
        let value = match &self.register.content {
            Content::Put { value, .. } => value.len(),
            _ => 0,
        };
        self.key.as_str().len() + value + 40
    }
}

/// Where a key is in the digests.
pub(crate) fn key_hash(key: &Key) -> u64 {
    let mut hasher = SipHasher13::new();
    hasher.write(key.as_str().as_bytes());
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn register() -> impl Strategy<Value = Register> {
        // Few of each, so that stamps meet.
        let content = prop_oneof![
            (0_u8..3, prop::option::of(1_u64..3))
                .prop_map(|(value, ttl)| Content::Put { value: vec![value].into(), ttl }),
            (1_u64..3, 0_u64..3).prop_map(|(ttl, hash)| Content::Ended { ttl, hash }),
            (0_u64..3).prop_map(|at| Content::Deleted { at }),
        ];
        (0_u64..3, 0_u64..3, content)
            .prop_map(|(time, node, content)| Register::new(Stamp { time: Hlc(time), node: NodeId(node) }, content))
    }

    fn merge(a: &Register, b: &Register) -> Rank {
        if b.is_above(a) { b.rank() } else { a.rank() }
    }

    fn merged(a: &Register, b: &Register) -> Register {
        if b.is_above(a) { b.clone() } else { a.clone() }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        #[test]
        fn merging_is_commutative_associative_and_idempotent(a in register(), b in register(), c in register()) {
            prop_assert_eq!(merge(&a, &b), merge(&b, &a));
            prop_assert_eq!(merge(&merged(&a, &b), &c), merge(&a, &merged(&b, &c)));
            prop_assert_eq!(merge(&a, &a), a.rank());
            // What is kept is the same for digests exactly if it is the same for the order.
            prop_assert_eq!(a.rank() == b.rank(), a.digest(7) == b.digest(7));
        }

        #[test]
        fn what_is_written_is_read_again(register in register()) {
            let record = Record { key: Key::new("a.b").unwrap(), register };
            let mut writer = Writer::default();
            record.write(&mut writer);
            let bytes = writer.into_bytes();
            prop_assert_eq!(Record::read(&mut Reader::new(bytes.clone())), Some(record));
            for len in 0..bytes.len() {
                prop_assert_eq!(Record::read(&mut Reader::new(bytes.slice(..len))), None, "{} bytes of it", len);
            }
        }
    }

    #[test]
    fn a_record_keeps_nothing_of_its_frame() {
        let stamp = Stamp { time: Hlc(1), node: NodeId(1) };
        let register = Register::new(stamp, Content::Put { value: vec![b'v'; 5_000].into(), ttl: None });
        let mut writer = Writer::default();
        Record { key: Key::new("a.b").unwrap(), register }.write(&mut writer);
        let frame = writer.into_bytes();
        let record = Record::read(&mut Reader::new(frame.clone()));
        assert!(record.is_some() && frame.is_unique(), "a value keeps its frame");
    }

    #[test]
    fn what_is_stamped_anew_is_what_would_have_been_written_then() {
        let stamp = |time| Stamp { time: Hlc::at(time), node: NodeId(1) };
        let value = Bytes::from_static(b"v");
        for content in [
            |_| Content::Put { value: Bytes::from_static(b"v"), ttl: Some(5) },
            |_| Content::Ended { ttl: 5, hash: 7 },
            |at| Content::Deleted { at },
        ] as [fn(Millis) -> Content; 3]
        {
            let anew = Register::new(stamp(10), content(10)).head().restamped(stamp(20));
            assert_eq!(anew.with(|| Some(value.clone())), Some(Register::new(stamp(20), content(20))));
        }
    }

    #[test]
    fn of_one_stamp_a_tombstone_is_above_a_value() {
        let stamp = Stamp { time: Hlc::at(5), node: NodeId(1) };
        let value = Register::new(stamp, Content::Put { value: "v".into(), ttl: None });
        assert!(Register::new(stamp, Content::Deleted { at: 0 }).is_above(&value));
    }
}
