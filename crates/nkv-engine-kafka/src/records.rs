//! The records of the log: out of what a broker sends, and into what it is sent.

use std::cell::Cell;
use std::collections::{BTreeSet, VecDeque};

use bytes::{Bytes, BytesMut};
use kafka_protocol::messages::fetch_response::AbortedTransaction;
use kafka_protocol::protocol::StrBytes;
use kafka_protocol::records::{
    Compression, NO_PARTITION_LEADER_EPOCH, NO_PRODUCER_EPOCH, NO_PRODUCER_ID, Record, RecordBatchDecoder,
    RecordBatchEncoder, RecordEncodeOptions, TimestampType,
};

use crate::compression::decompress;
use crate::error::{Error, Result};

/// Where things stand in the head of a batch.
const LENGTH_AT: usize = 8;
const LENGTH_END: usize = 12;
const LAST_DELTA_AT: usize = 23;
const COUNT_AT: usize = 57;
const HEAD_LEN: usize = 61;

/// Fewest bytes that a record takes.
const RECORD_LEN_MIN: usize = 7;

/// Most records of a batch: each takes room of its own, beside its bytes.
const COUNT_MAX: usize = 1_000_000;

/// The bytes of records, unpacked, behind which an answer ends: what follows is fetched again.
const UNPACKED_LEN: usize = 32 << 20;

/// What a record takes beside its key, its value and its headers, at most; and what a batch takes beside its records.
pub(crate) const RECORD_OVERHEAD: usize = 32;
pub(crate) const BATCH_OVERHEAD: usize = HEAD_LEN;

/// The records of one batch that readers may see, and where the next batch may begin.
#[derive(Debug)]
pub(crate) struct Batch {
    pub(crate) records: Vec<Record>,
    pub(crate) next: i64,
}

/// Which transactions were aborted, of those that an answer has records of.
#[derive(Debug, Default)]
pub(crate) struct Aborted {
    /// By where they begin.
    to_come: VecDeque<(i64, i64)>,
    /// Those that have begun and not ended at this place, by producer.
    open: BTreeSet<i64>,
}

impl Aborted {
    pub(crate) fn new(transactions: &[AbortedTransaction]) -> Self {
        let mut to_come: Vec<(i64, i64)> =
            transactions.iter().map(|aborted| (aborted.first_offset, aborted.producer_id.0)).collect();
        to_come.sort_unstable();
        Aborted { to_come: to_come.into(), open: BTreeSet::new() }
    }

    /// Whether a record is one that no reader may see.
    fn hides(&mut self, record: &Record) -> bool {
        while self.to_come.front().is_some_and(|(first, _)| *first <= record.offset) {
            self.open.extend(self.to_come.pop_front().map(|(_, producer)| producer));
        }
        if record.control {
            // Its key has a version and a type: 0 ends a transaction that was aborted.
            if record.key.as_deref().and_then(|key| key.get(2..4)) == Some(&[0, 0]) {
                self.open.remove(&record.producer_id);
            }
            return true;
        }
        record.transactional && self.open.contains(&record.producer_id)
    }
}

/// The batches that `bytes` has whole, from the offset `from` on: a broker begins with the batch that has it. The last one may be cut
/// off, which is no error. Once [`UNPACKED_LEN`] is reached, the rest is as if it was cut off.
pub(crate) fn batches(mut bytes: Bytes, aborted: &[AbortedTransaction], from: i64) -> Result<Vec<Batch>> {
    let (mut batches, mut aborted, total) = (Vec::new(), Aborted::new(aborted), Cell::new(0_usize));
    while let Some((next, len)) = head(&bytes)?.filter(|_| total.get() < UNPACKED_LEN) {
        let mut batch = bytes.split_to(len);
        let count = usize::try_from(number(&batch, COUNT_AT)).unwrap_or(usize::MAX);
        let unpacked = |bytes: &mut Bytes, compression: Compression| {
            let bytes = decompress(bytes, compression)?;
            // So that room for records is made only if they can be there.
            if count > bytes.len() / RECORD_LEN_MIN {
                return Err(std::io::Error::other("a batch has fewer records than it says").into());
            }
            if count > COUNT_MAX {
                return Err(std::io::Error::other(format!("a batch has {count} records; {COUNT_MAX} are read")).into());
            }
            total.set(total.get().saturating_add(bytes.len()));
            Ok(bytes)
        };
        let decoded = RecordBatchDecoder::decode_with_custom_compression(&mut batch, Some(unpacked));
        let mut records = decoded.map_err(|error| Error::unavailable(format!("a batch of records: {error}")))?.records;
        records.retain(|record| !aborted.hides(record) && record.offset >= from);
        batches.push(Batch { records, next });
    }
    Ok(batches)
}

/// The offset behind the batch that `bytes` begins with, and its length; `None` if it is not there whole.
fn head(bytes: &[u8]) -> Result<Option<(i64, usize)>> {
    if bytes.len() < HEAD_LEN {
        return Ok(None);
    }
    let first = bytes.first_chunk::<LENGTH_AT>().map_or(0, |bytes| i64::from_be_bytes(*bytes));
    let broken = || Error::unavailable(format!("the batch at offset {first} is no batch"));
    let len = usize::try_from(number(bytes, LENGTH_AT)).map_err(|_| broken())?.saturating_add(LENGTH_END);
    if len < HEAD_LEN || first < 0 {
        return Err(broken());
    }
    if bytes.len() < len {
        return Ok(None);
    }
    let next = i64::from(number(bytes, LAST_DELTA_AT)).checked_add(first).and_then(|last| last.checked_add(1));
    Ok(Some((next.filter(|next| *next > first).ok_or_else(broken)?, len)))
}

fn number(bytes: &[u8], at: usize) -> i32 {
    bytes.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |bytes| i32::from_be_bytes(*bytes))
}

/// A record to be written: a value, or a tombstone.
#[derive(Clone, Debug)]
pub(crate) struct NewRecord {
    pub(crate) key: Bytes,
    pub(crate) value: Option<Bytes>,
    /// What the header [`HEADER`] says, if there is to be one.
    pub(crate) header: Option<Bytes>,
}

/// The header of nkv's own records in a log that others write to.
pub(crate) const HEADER: &str = "nkv";

impl NewRecord {
    /// How long it is in a batch, at most.
    pub(crate) fn len_max(&self) -> usize {
        self.key.len()
            + self.value.as_ref().map_or(0, Bytes::len)
            + self.header.as_ref().map_or(0, |header| HEADER.len() + header.len())
            + RECORD_OVERHEAD
    }
}

/// One batch of records, which the broker appends whole or not at all.
pub(crate) fn encode<'a>(records: impl IntoIterator<Item = &'a NewRecord>, timestamp: i64) -> Result<Bytes> {
    let record = |(offset, new): (i64, &NewRecord)| Record {
        transactional: false,
        control: false,
        delete_horizon: false,
        partition_leader_epoch: NO_PARTITION_LEADER_EPOCH,
        producer_id: NO_PRODUCER_ID,
        producer_epoch: NO_PRODUCER_EPOCH,
        timestamp_type: TimestampType::Creation,
        offset,
        // The encoder begins another batch where it does not rise with the offset.
        sequence: i32::try_from(offset).unwrap_or(i32::MAX).wrapping_sub(1),
        timestamp,
        key: Some(new.key.clone()),
        value: new.value.clone(),
        headers: new.header.iter().map(|header| (StrBytes::from_static_str(HEADER), Some(header.clone()))).collect(),
    };
    let records: Vec<Record> = (0..).zip(records).map(record).collect();
    let mut bytes = BytesMut::new();
    let options = RecordEncodeOptions { version: 2, compression: Compression::None };
    RecordBatchEncoder::encode(&mut bytes, &records, &options)
        .map_err(|error| Error::refused(format!("encode records: {error}")))?;
    Ok(bytes.freeze())
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::option;
    use proptest::prelude::*;

    use super::*;

    fn new(key: &str, value: Option<&str>) -> NewRecord {
        let value = value.map(|value| Bytes::copy_from_slice(value.as_bytes()));
        NewRecord { key: Bytes::copy_from_slice(key.as_bytes()), value, header: None }
    }

    /// A batch as the log has it from an offset on, with as many records gone behind it.
    fn stored(batch: &Bytes, offset: i64, gone: i32) -> Bytes {
        let mut bytes = BytesMut::from(&batch[..]);
        bytes[..8].copy_from_slice(&offset.to_be_bytes());
        let last = number(&bytes, LAST_DELTA_AT) + gone;
        bytes[LAST_DELTA_AT..LAST_DELTA_AT + 4].copy_from_slice(&last.to_be_bytes());
        let checksum = crc32c::crc32c(&bytes[21..]);
        bytes[17..21].copy_from_slice(&checksum.to_be_bytes());
        bytes.freeze()
    }

    fn read(records: &[Batch]) -> Vec<(i64, Bytes, Option<Bytes>)> {
        let all = records.iter().flat_map(|batch| &batch.records);
        all.map(|record| (record.offset, record.key.clone().unwrap(), record.value.clone())).collect()
    }

    proptest! {
        #[test]
        fn what_is_encoded_as_one_batch_is_read_whole_and_a_part_of_it_is_nothing(
            records in vec(("[a-z.]{1,9}", option::of("[ -~]{0,9}")), 1..20), cut in 0_usize..4_096, offset in 0_i64..1 << 40,
        ) {
            let records: Vec<_> = records.iter().map(|(key, value)| new(key, value.as_deref())).collect();
            let len: usize = records.iter().map(NewRecord::len_max).sum();
            let batch = stored(&encode(&records, 1).unwrap(), offset, 0);
            prop_assert!(batch.len() <= len + BATCH_OVERHEAD);
            let expected: Vec<_> =
                (offset..).zip(&records).map(|(at, one)| (at, one.key.clone(), one.value.clone())).collect();
            let whole = batches(batch.clone(), &[], 0).unwrap();
            prop_assert_eq!((whole.len(), whole[0].next), (1, offset + records.len() as i64));
            prop_assert_eq!(read(&whole), &expected[..]);
            // A broker sends batches whole, and may cut off the last one.
            let cut = cut % batch.len();
            let both = Bytes::from([&batch[..], &batch[..cut]].concat());
            prop_assert_eq!(batches(both, &[], 0).unwrap().len(), 1);
            prop_assert_eq!(read(&batches(batch, &[], offset + 1).unwrap()), &expected[1..]);
        }

        #[test]
        fn bytes_that_are_no_batch_are_an_error_or_nothing(bytes in vec(any::<u8>(), 0..300), at in 0_usize..300, to: u8) {
            let _ = batches(Bytes::from(bytes), &[], 0);
            let batch = stored(&encode(&[new("a", Some("value")), new("b", None)], 1).unwrap(), 7, 0);
            let mut broken = batch.to_vec();
            let at = at % broken.len();
            broken[at] = to;
            if let Ok(read) = batches(Bytes::from(broken), &[], 0) {
                // Offsets, the length and the epoch of the leader are not covered by the checksum.
                prop_assert!(read.is_empty() || at < 16 || to == batch[at]);
            }
        }
    }

    #[test]
    fn of_an_answer_that_unpacks_to_too_much_the_rest_is_fetched_later() {
        let value = "x".repeat(UNPACKED_LEN / 4);
        let batch = encode(&[new("a", Some(&value))], 1).unwrap();
        let log: Vec<u8> = (0..9).flat_map(|offset| stored(&batch, offset, 0)).collect();
        let offsets = |from: usize| -> Vec<i64> {
            let read = batches(Bytes::copy_from_slice(&log[from * batch.len()..]), &[], from as i64).unwrap();
            read.iter().map(|batch| batch.next - 1).collect()
        };
        assert_eq!((offsets(0), offsets(4), offsets(8)), (vec![0, 1, 2, 3], vec![4, 5, 6, 7], vec![8]));
    }

    #[test]
    fn a_batch_of_more_records_than_are_read_is_an_error() {
        let batch = encode(&[new("a", Some(&"x".repeat(8 * COUNT_MAX)))], 1).unwrap();
        let error = |count: usize| {
            let mut bytes = batch.to_vec();
            bytes[COUNT_AT..HEAD_LEN].copy_from_slice(&u32::try_from(count).unwrap().to_be_bytes());
            let bytes = stored(&bytes.into(), 0, 0);
            batches(bytes, &[], 0).unwrap_err().to_string()
        };
        let (most, more) = (error(COUNT_MAX), error(COUNT_MAX + 1));
        assert!(more.contains("has 1000001 records") && !most.contains("records;"), "{more}, {most}");
    }

    #[test]
    fn behind_a_batch_whose_last_records_were_removed_is_the_next_batch() {
        let batch = stored(&encode(&[new("a", Some("1"))], 1).unwrap(), 5, 3);
        let read = batches(batch, &[], 0).unwrap();
        assert_eq!((read[0].records.len(), read[0].next), (1, 9));
    }

    #[test]
    fn records_of_aborted_transactions_are_hidden_up_to_their_end() {
        let record = |offset, producer_id, control: Option<u8>| {
            let [batch] = &batches(encode(&[new("a", Some("1"))], 1).unwrap(), &[], 0).unwrap()[..] else { panic!() };
            let mut record = batch.records[0].clone();
            (record.offset, record.producer_id, record.transactional) = (offset, producer_id, true);
            if let Some(kind) = control {
                (record.control, record.key) = (true, Some(Bytes::from(vec![0, 0, 0, kind])));
            }
            record
        };
        let begun = |producer: i64, first| {
            AbortedTransaction::default().with_producer_id(producer.into()).with_first_offset(first)
        };
        let mut aborted = Aborted::new(&[begun(1, 7), begun(1, 2)]);
        let log = [
            record(1, 1, None),
            record(2, 1, None),
            record(3, 2, None),
            record(4, 1, Some(0)),
            record(5, 1, None),
            record(6, 1, Some(1)),
            record(7, 1, None),
        ];
        let hidden: Vec<bool> = log.iter().map(|record| aborted.hides(record)).collect();
        assert_eq!(hidden, [false, true, false, true, false, true, true]);
    }
}
