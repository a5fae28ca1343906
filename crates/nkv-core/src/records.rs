//! Many records in one piece of memory: what a snapshot holds.

use std::fmt;

use bytes::Bytes;

use crate::broken::{broken, text};
use crate::key::KeyRef;
use crate::packed::Unpacked;
use crate::record::{Record, RecordRef, ValueRef};

/// Records, in the order in which they were added. Keys and short values lie packed one behind the other; long values
/// are shared with the store.
///
/// # Examples
///
/// ```
/// use nkv_core::{Key, Record, Records, Revision};
///
/// let record = Record { key: Key::new("lamp")?, value: "on".into(), revision: Revision::new(3), expiry: None };
/// let records: Records = [record].into_iter().collect();
/// assert_eq!(records.get(0).map(|record| (record.key.as_str(), record.revision)), Some(("lamp", Revision::new(3))));
/// # Ok::<(), nkv_core::KeyError>(())
/// ```
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Records {
    /// In the place of a long value is its number.
    packed: Vec<u8>,
    /// Where each record ends.
    ends: Vec<usize>,
    long: Vec<Bytes>,
}

impl Records {
    /// How many they are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The record of that number; the first is number 0.
    #[must_use]
    pub fn get(&self, at: usize) -> Option<RecordRef<'_>> {
        let start = at.checked_sub(1).map_or(Some(0), |before| self.ends.get(before).copied())?;
        let Unpacked { key, value, is_long, revision, expiry } =
            Unpacked::of(self.packed.get(start..*self.ends.get(at)?)?);
        let number = |bytes: &[u8]| bytes.first_chunk().map(|chunk| u32::from_le_bytes(*chunk));
        let long = || self.long.get(number(value)? as usize);
        let value = if is_long {
            ValueRef::Shared(long().unwrap_or_else(|| broken("a long value is missing")))
        } else {
            ValueRef::Lent(value)
        };
        Some(RecordRef { key: KeyRef::in_memory(text(key)), value, revision, expiry })
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = RecordRef<'_>> {
        (0..self.len()).filter_map(|at| self.get(at))
    }

    /// How many bytes they take, with the long values, which others may share.
    #[must_use]
    pub fn size(&self) -> usize {
        self.packed.len() + self.ends.len() * size_of::<usize>() + self.long.iter().map(Bytes::len).sum::<usize>()
    }

    pub(crate) fn push(&mut self, record: RecordRef<'_>) {
        let RecordRef { key, value, revision, expiry } = record;
        let number = (self.long.len() as u32).to_le_bytes();
        let long = value.long();
        let (value, is_long) = if long.is_some() { (&number[..], true) } else { (&*value, false) };
        Unpacked { key: key.as_bytes(), value, is_long, revision, expiry }.pack(&mut self.packed);
        self.long.extend(long);
        self.ends.push(self.packed.len());
    }

    /// Gives back what it grew by too much: nothing is added any more, and its size is counted where memory is bounded.
    fn fit(mut self) -> Self {
        self.packed.shrink_to_fit();
        self.ends.shrink_to_fit();
        self.long.shrink_to_fit();
        self
    }
}

impl<'a> FromIterator<RecordRef<'a>> for Records {
    fn from_iter<I: IntoIterator<Item = RecordRef<'a>>>(records: I) -> Self {
        let mut all = Records::default();
        records.into_iter().for_each(|record| all.push(record));
        all.fit()
    }
}

impl FromIterator<Record> for Records {
    fn from_iter<I: IntoIterator<Item = Record>>(records: I) -> Self {
        let mut all = Records::default();
        records.into_iter().for_each(|record| all.push(record.lend()));
        all.fit()
    }
}

impl fmt::Debug for Records {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Expiry, VALUE_LEN_LONG};
    use crate::{Key, Revision};

    #[test]
    fn records_come_out_as_they_were_put_in_and_long_values_are_shared() {
        let lens = [0, 1, VALUE_LEN_LONG, 100, VALUE_LEN_LONG - 1, 2 * VALUE_LEN_LONG];
        let record = |(at, len): (usize, usize)| Record {
            key: Key::new(&format!("k{at}")).unwrap(),
            value: vec![at as u8; len].into(),
            revision: Revision::new(1 << (9 * at)),
            expiry: (at % 2 == 0).then_some(Expiry { at: crate::Timestamp::from_millis(5), ttl_ms: at as u64 }),
        };
        let all: Vec<Record> = lens.into_iter().enumerate().map(record).collect();
        let records: Records = all.iter().cloned().collect();
        assert_eq!(records.iter().map(RecordRef::to_record).collect::<Vec<_>>(), all);
        assert_eq!(records.iter().collect::<Records>(), records);
        // As storage lends them.
        let lent = all.iter().map(|record| RecordRef { value: ValueRef::Lent(&record.value), ..record.lend() });
        assert_eq!(lent.collect::<Records>(), records);
        for (record, original) in records.iter().zip(&all) {
            let is_shared = record.value.as_ptr() == original.value.as_ptr();
            assert_eq!(is_shared, original.value.len() >= VALUE_LEN_LONG, "{}", record.key);
        }
        assert_eq!((records.len(), records.is_empty(), records.get(lens.len()).is_none()), (lens.len(), false, true));
        assert!(records.size() > lens.into_iter().sum());
        let room = records.packed.capacity() + records.ends.capacity() * size_of::<usize>();
        assert_eq!(records.size(), room + records.long.iter().map(Bytes::len).sum::<usize>());
    }
}
