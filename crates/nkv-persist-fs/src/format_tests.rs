use nkv_core::{Action, Change, Epoch, Expiry, Key, Meta, Reason, Revision};
use proptest::prelude::*;

use super::*;

const SALT: u32 = 0xfeed_beef;

fn put(key: &str, revision: u64, value: &[u8], expiry: Option<Expiry>) -> Change {
    let action = Action::Put { value: value.to_vec().into(), expiry };
    Change {
        key: Key::new(key).unwrap(),
        revision: Revision::new(revision),
        replaces: Revision::ZERO,
        action,
        meta: Meta::NONE,
    }
}

fn delete(key: &str, revision: u64, replaces: u64) -> Change {
    let (revision, replaces) = (Revision::new(revision), Revision::new(replaces));
    Change {
        key: Key::new(key).unwrap(),
        revision,
        replaces,
        action: Action::Delete { reason: Reason::Expired },
        meta: Meta::NONE,
    }
}

/// Adds a change that is known by its revision, or leaves a tombstone.
fn push(frame: &mut FrameBuf, change: &Change) -> u32 {
    let is_keyed = matches!(change.action, Action::Delete { .. }) && !change.meta.is_none();
    frame.push_change(change, change.replaces, is_keyed)
}

/// The header and the body of a frame, if the checksums say so.
fn read(bytes: &[u8]) -> Option<(FrameHeader, &[u8])> {
    let header = FrameHeader::decode(bytes, SALT)?;
    let rest = bytes.get(FRAME_HEADER_LEN..header.frame_len() as usize)?;
    header.fits(rest).then(|| (header, &rest[..header.body_len as usize]))
}

#[test]
fn a_segment_header_reads_back_and_every_flipped_bit_is_seen() {
    let (epoch, revision) = (Epoch::new(u128::MAX / 3), Revision::new(77));
    let header = SegmentHeader { version: VERSION, number: 9, head: 4, base: 1 << 40, revision, epoch, salt: SALT };
    let bytes = header.encode();
    assert_eq!(SegmentHeader::decode(&bytes), Ok(header));
    for bit in 0..bytes.len() * 8 {
        let mut bytes = bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(SegmentHeader::decode(&bytes).is_err(), "bit {bit}");
    }
    for len in 0..bytes.len() {
        assert!(SegmentHeader::decode(&bytes[..len]).is_err(), "{len} bytes");
    }
}

#[test]
fn a_header_of_another_version_is_distinguished_from_a_damaged_one() {
    let epoch = Epoch::new(1);
    let header =
        SegmentHeader { version: VERSION, number: 1, head: 1, base: 0, revision: Revision::ZERO, epoch, salt: SALT };
    for version in [2, 3] {
        let header = SegmentHeader { version, ..header };
        assert_eq!(SegmentHeader::other_version(&header.encode()), None);
        assert_eq!(SegmentHeader::decode(&header.encode()), Ok(header));
    }
    for version in [0, 1, 4, u32::MAX] {
        let mut bytes = header.encode();
        bytes[8..12].copy_from_slice(&u32::to_le_bytes(version));
        assert_eq!(SegmentHeader::other_version(&bytes), None, "its checksum does not match");
        let crc = crc32c::crc32c(&bytes[..64]);
        bytes[64..68].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(SegmentHeader::other_version(&bytes), Some(version));
        assert!(SegmentHeader::decode(&bytes).is_err());
    }
}

#[test]
fn every_flipped_bit_of_a_frame_is_seen_and_so_is_another_segment() {
    let mut frame = FrameBuf::of(|frame| {
        let expiry = Some(Expiry { at: nkv_core::Timestamp::from_millis(5), ttl_ms: 6 });
        push(frame, &put("a.b", 3, b"value", expiry));
    });
    let bytes = frame.stamp(64, 8, RELAXED, SALT).to_vec();
    assert!(read(&bytes).is_some() && bytes.len().is_multiple_of(8));
    for bit in 0..bytes.len() * 8 {
        let mut bytes = bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(read(&bytes).is_none(), "bit {bit}");
    }
    assert!(FrameHeader::decode(&bytes, SALT + 1).is_none());
}

#[test]
fn the_frame_that_ends_a_segment_has_the_length_that_recovery_counts_on() {
    let mut frame = FrameBuf::of(FrameBuf::push_seal);
    assert_eq!(frame.stamp(0, 0, 0, 0).len() as u64, SEAL_FRAME_LEN);
}

/// A record by hand: its type, and fields that this version may not know.
fn raw(kind: u8, fields: &[u8]) -> Vec<u8> {
    let mut frame = FrameBuf::of(|frame| {
        frame.push((kind, 0), (Revision::new(1), Revision::ZERO), "key", b"v", fields);
    });
    let body_len = frame.body_len;
    frame.stamp(0, 0, 0, 0)[FRAME_HEADER_LEN..][..body_len].to_vec()
}

#[test]
fn fields_and_types_of_later_versions_are_skipped_or_refused_as_they_ask() {
    let entry = |bytes: &[u8]| {
        let record = Records::new(bytes).next().unwrap();
        record.and_then(|record| record.entry()).map(|entry| format!("{entry:?}"))
    };
    let field = |tag: u16| [&tag.to_le_bytes()[..], &3_u16.to_le_bytes(), b"xyz"].concat();
    assert_eq!(entry(&raw(PUT, &field(3))), entry(&raw(PUT, &[])));
    assert!(entry(&raw(PUT, &field(0x8002))).is_err());
    assert_eq!(entry(&raw(0x80, &[])), Ok("Unknown".to_owned()));
    assert!(entry(&raw(7, &[])).is_err());
    assert!(entry(&raw(TOMBSTONE, &[])).is_err(), "a tombstone has meta, be it empty");
    assert!(entry(&raw(PUT, &[1, 0, 99, 0])).is_err(), "a field longer than its record");
}

/// The bytes in the hex dump of the worked example.
fn example() -> Vec<u8> {
    let doc = include_str!("../../../docs/storage-format.md");
    let dump = doc.split("```hex\n").nth(1).unwrap().split("```").next().unwrap();
    let columns = dump.lines().flat_map(|line| line[6..].split("  ").next().unwrap().split(' '));
    columns.map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

#[test]
fn the_worked_example_of_the_documentation_is_what_is_written() {
    let epoch = Epoch::new(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);
    let header = SegmentHeader {
        version: VERSION,
        number: 1,
        head: 1,
        base: 0,
        revision: Revision::ZERO,
        epoch,
        salt: 0x1234_5678,
    };
    let mut frame = FrameBuf::of(|frame| {
        let expiry = Some(Expiry { at: nkv_core::Timestamp::from_millis(1_700_000_000_000), ttl_ms: 60_000 });
        push(frame, &put("host.db1", 1, b"up", expiry));
        push(frame, &Change { meta: Meta::new(b"seen"), ..delete("host.db1", 2, 1) });
    });
    let mut bytes = header.encode();
    bytes.extend_from_slice(frame.stamp(0, 0, 0, header.salt));
    if std::env::var_os("NKV_PRINT_EXAMPLE").is_some() {
        for (line, row) in bytes.chunks(16).enumerate() {
            let hex: Vec<String> = row.iter().map(|byte| format!("{byte:02x}")).collect();
            println!("{:04x}  {}", line * 16, hex.join(" "));
        }
    }
    assert_eq!(example(), bytes);
}

proptest! {
    #[test]
    fn whatever_stands_in_a_body_it_is_read_or_refused(body: Vec<u8>, offset in 0_usize..40) {
        Records::new(body.get(offset..).unwrap_or_default()).flatten().for_each(|record| drop(record.entry()));
        let _ = (SegmentHeader::decode(&body), FrameHeader::decode(&body, SALT));
    }

    #[test]
    fn a_record_with_any_byte_changed_is_read_or_refused(at in 0_usize..60, byte: u8) {
        let mut body = raw(PUT, &[1, 0, 16, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);
        let len = body.len();
        body[at % len] = byte;
        Records::new(&body).flatten().for_each(|record| drop(record.entry()));
    }

    #[test]
    fn changes_read_back(
        value: Vec<u8>,
        meta: Option<Vec<u8>>,
        numbers: (u64, u64, u64, u64),
        expires: bool,
        is_new: bool,
        is_keyed: bool,
    ) {
        let (revision, old, at, ttl_ms) = numbers;
        let expiry = expires.then_some(Expiry { at: nkv_core::Timestamp::from_millis(at), ttl_ms });
        let old = Revision::new(if is_new { 0 } else { old });
        let kept = Meta::from(meta.as_deref());
        let batch = [
            Change { replaces: old, meta: kept.clone(), ..put("a", revision, &value, expiry) },
            Change { meta: kept, ..delete("b", revision, old.get()) },
        ];
        prop_assert!(FrameBuf::would_fit(&batch));
        let mut frame = FrameBuf::new();
        let lens: Vec<_> = batch.iter().map(|change| frame.push_change(change, old, is_keyed)).collect();
        prop_assert_eq!(frame.version(), if is_keyed || meta.is_some() { 3 } else { 2 });
        frame.finish();
        let bytes = frame.stamp(0, 0, 0, SALT).to_vec();
        let (_, body) = read(&bytes).unwrap();
        let records: Vec<_> = Records::new(body).map(Result::unwrap).collect();
        prop_assert_eq!(records.len(), 2);
        prop_assert_eq!(records.iter().map(|record| record.bytes.len() as u32).collect::<Vec<_>>(), lens);
        let (revision, meta) = (Revision::new(revision), meta.as_deref());
        let put = Entry::Put { key: "a", value: &value[..], revision, replaces: old, expiry, meta, is_keyed };
        prop_assert_eq!(records[0].entry().unwrap(), put);
        let is_known = if is_keyed { Id::Key("a", revision) } else { Id::Revision(revision) };
        prop_assert_eq!(records[0].id(), Some(is_known));
        let deleted = match meta {
            Some(meta) => Entry::Tombstone { key: "b", revision, replaces: old, meta },
            None => Entry::Delete { key: "b", revision, replaces: old },
        };
        prop_assert_eq!(records[1].id(), deleted.id());
        prop_assert_eq!(records[1].entry().unwrap(), deleted);
    }
}
