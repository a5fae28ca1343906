//! What a fuzzer calls: any bytes as frames and records, and any bytes as a data directory.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used,
    reason = "it shall fail when something is wrong"
)]

use std::path::Path;
use std::sync::{Arc, LazyLock};

use nkv_core::{Action, Change, Expiry, Key, Meta, PersistErrorKind, PersistValue, Reason, Revision, StoredRef};

use crate::disk::segment_name;
use crate::format::{Entry, FRAME_HEADER_LEN, FrameBuf, FrameHeader, Records, SEGMENT_HEADER_LEN, SegmentHeader};
use crate::options::FsOptions;
use crate::sim::SimFs;
use crate::store::FsPersist;
use crate::vfs::Vfs;
use crate::{check_with, repair_with};

const DIR: &str = "/data";
/// How many changes are made to a directory at most.
const STEPS_MAX: usize = 24;

/// Reads the bytes as all that stands in a segment. What can be read is the same when it is written and read again.
///
/// # Panics
///
/// If it is not.
pub fn log_records(data: &[u8]) {
    if let Ok(header) = SegmentHeader::decode(data) {
        assert_eq!(SegmentHeader::decode(&header.encode()), Ok(header));
    }
    if let Some((salt, bytes)) = data.split_first_chunk() {
        let salt = u32::from_le_bytes(*salt);
        let frame = FrameHeader::decode(bytes, salt).map(|header| (header, &bytes[FRAME_HEADER_LEN..]));
        if let Some((header, rest)) = frame.filter(|(header, rest)| header.fits(rest)) {
            records(&rest[..header.body_len as usize]);
        }
    }
    records(data);
    framed(data);
}

fn records(body: &[u8]) {
    for record in Records::new(body) {
        let Ok(record) = record else { return };
        let Ok(entry) = record.entry() else { return };
        if entry.check_key().is_err() {
            return;
        }
        let mut frame = FrameBuf::new();
        match &entry {
            Entry::Put { key, value, revision, replaces, expiry, meta, is_keyed } => {
                let put = put(stored_key(key), *revision, *replaces, value, *expiry);
                frame.push_change(&Change { meta: Meta::from(*meta), ..put }, *replaces, *is_keyed);
            }
            Entry::Delete { key, revision, replaces } => {
                frame.push_change(&delete(stored_key(key), *revision, *replaces, Meta::NONE), *replaces, false);
            }
            Entry::Tombstone { key, revision, replaces, meta } => {
                frame.push_change(&delete(stored_key(key), *revision, *replaces, Meta::new(meta)), *replaces, true);
            }
            Entry::Epoch(epoch) => frame.push_epoch(*epoch),
            Entry::Head(number) => frame.push_head(*number),
            Entry::Seal => frame.push_seal(),
            Entry::Unknown => {
                frame.push_copy(record.bytes);
            }
        }
        frame.finish();
        let bytes = frame.stamp(8, 0, 0, 7);
        let header = FrameHeader::decode(bytes, 7).expect("a frame that was just written");
        assert!(header.fits(&bytes[FRAME_HEADER_LEN..]));
        let mut again = Records::new(&bytes[FRAME_HEADER_LEN..][..header.body_len as usize]);
        assert_eq!(again.next().unwrap().unwrap().entry().unwrap(), entry);
        assert!(again.next().is_none());
    }
}

/// Any body comes back from its frame as it was.
fn framed(body: &[u8]) {
    let mut frame = frame_of(body);
    let bytes = frame.stamp(16, 8, 1, 9);
    let header = FrameHeader::decode(bytes, 9).expect("a frame that was just written");
    let rest = &bytes[FRAME_HEADER_LEN..];
    assert!(header.fits(rest) && header.frame_len() == bytes.len() as u64);
    assert_eq!(&rest[..header.body_len as usize], body);
}

fn frame_of(body: &[u8]) -> FrameBuf {
    FrameBuf::of(|frame| {
        frame.push_copy(body);
    })
}

/// Makes a directory of the bytes, opens it, repairs it if that is refused, and writes to it.
///
/// # Panics
///
/// If any of it fails in a way that it must not.
pub fn recover(data: &[u8]) {
    let mut input = Input(data);
    let fs = match input.byte() % 4 {
        0 => SimFs::new(),
        2 => VERSION_2.fork(),
        _ => VALID.fork(),
    };
    for _ in 0..STEPS_MAX {
        if input.0.is_empty() {
            break;
        }
        step(&fs, &mut input);
    }
    let checked = check_with(Arc::new(fs.clone()), DIR);
    match open(&fs) {
        Ok(persist) => {
            assert!(checked.is_err() || checked.is_ok_and(|report| report.damage.is_none()), "check has seen damage");
            use_it(&fs, persist);
        }
        Err(error) if error.kind() == PersistErrorKind::OtherVersion => {
            assert!(repair_with(Arc::new(fs.clone()), DIR).is_err_and(|e| e.kind() == PersistErrorKind::OtherVersion));
        }
        Err(error) => {
            assert_eq!(error.kind(), PersistErrorKind::Damaged, "{error}");
            assert!(checked.is_err() || checked.is_ok_and(|report| report.damage.is_some()), "check has seen nothing");
            match repair_with(Arc::new(fs.clone()), DIR) {
                Err(other) if other.kind() == PersistErrorKind::OtherVersion => return,
                repaired => drop(repaired.unwrap_or_else(|e| panic!("{error}; the repair: {e}"))),
            }
            use_it(&fs, open(&fs).unwrap_or_else(|e| panic!("{error}; after the repair: {e}")));
        }
    }
}

/// A store of some segments, the oldest of which was compacted away, as a killed process leaves it.
static VALID: LazyLock<SimFs> = LazyLock::new(|| {
    let fs = SimFs::new();
    let mut persist = open(&fs).unwrap();
    for revision in 1..=24 {
        let key = Key::new(&format!("k.{}", revision % 5)).unwrap();
        let replaces = Revision::new(u64::saturating_sub(revision, 5));
        let revision = Revision::new(revision);
        let (value, meta) = (&[revision.get() as u8; 500], Meta::new(b"meta"));
        let beside = match revision.get() % 4 {
            0 => delete(Key::reserved("seen").unwrap(), revision, Revision::ZERO, meta.clone()),
            1 => delete(Key::new("gone").unwrap(), revision, Revision::ZERO, meta.clone()),
            // It takes the place of the tombstone, and is known by its key.
            2 => {
                Change { meta: meta.clone(), ..put(Key::new("gone").unwrap(), revision, Revision::ZERO, b"back", None) }
            }
            _ => delete(Key::new("gone").unwrap(), revision, Revision::new(revision.get() - 1), Meta::NONE),
        };
        persist.persist(&[put(key, revision, replaces, value, None), beside]).unwrap();
    }
    let left = fs.fork();
    drop(persist);
    left
});

/// What a program of version 2 has left.
static VERSION_2: LazyLock<SimFs> = LazyLock::new(|| {
    let fs = VALID.fork();
    let place = |name: &str, bytes: Option<&[u8]>| fs.place(&Path::new(DIR).join(name), bytes.map(<[u8]>::to_vec));
    fs.list(Path::new(DIR)).unwrap().iter().for_each(|name| place(name, None));
    place(&segment_name(4), Some(include_bytes!("../tests/data/format-2-killed/0000000000000004.log")));
    place(&segment_name(5), Some(include_bytes!("../tests/data/format-2-killed/0000000000000005.log")));
    place(&segment_name(6), Some(include_bytes!("../tests/data/format-2-killed/0000000000000006.log")));
    place("LOCK", Some(include_bytes!("../tests/data/format-2-killed/LOCK")));
    fs
});

fn open(fs: &SimFs) -> Result<FsPersist, nkv_core::PersistError> {
    let options = FsOptions::default().with_background(false).with_segment_bytes(4096).with_reserve_bytes(64);
    FsPersist::open_with(Arc::new(fs.clone()), DIR, options)
}

fn put(key: Key, revision: Revision, replaces: Revision, value: &[u8], expiry: Option<Expiry>) -> Change {
    Change { key, revision, replaces, action: Action::Put { value: value.to_vec().into(), expiry }, meta: Meta::NONE }
}

fn delete(key: Key, revision: Revision, replaces: Revision, meta: Meta) -> Change {
    Change { key, revision, replaces, action: Action::Delete { reason: Reason::Deleted }, meta }
}

/// A key of a client, or a reserved one.
fn stored_key(text: &str) -> Key {
    text.strip_prefix("..").map_or_else(|| Key::new(text), Key::reserved).unwrap()
}

/// Whatever was opened takes a put, and has it afterwards beside what it had.
fn use_it(fs: &SimFs, mut persist: FsPersist) {
    let load = |persist: &mut FsPersist| {
        let mut all = std::collections::BTreeMap::new();
        let visit = &mut |stored: StoredRef<'_>| {
            let value = stored.record().map(|record| record.value.to_bytes());
            let kept = (value, stored.meta().map(<[u8]>::to_vec), stored.revision());
            all.insert(stored.key().to_string(), kept);
        };
        let loaded = persist.load(visit).unwrap();
        (all, loaded)
    };
    let (mut all, loaded) = load(&mut persist);
    let Some(revision) = loaded.revision.get().checked_add(1).map(Revision::new) else {
        // No revision is left.
        return;
    };
    // A tombstone is named by no change.
    let replaces =
        all.get("fuzz").map_or(Revision::ZERO, |(value, _, at)| value.as_ref().map_or(Revision::ZERO, |_| *at));
    let fuzz = put(Key::new("fuzz").unwrap(), revision, replaces, b"here", None);
    let beside = delete(Key::reserved("fuzz").unwrap(), revision, Revision::ZERO, Meta::new(b"seen"));
    persist.persist(&[Change { meta: Meta::new(b"m"), ..fuzz }, beside]).unwrap();
    all.insert("fuzz".to_owned(), (Some(b"here".to_vec().into()), Some(b"m".to_vec()), revision));
    all.insert("..fuzz".to_owned(), (None, Some(b"seen".to_vec()), revision));
    drop(persist);
    let (after, loaded) = load(&mut open(fs).unwrap());
    assert_eq!((after, loaded.revision), (all, revision));
}

/// Changes one file: new content, a patch, a cut, something more at its end, a whole frame there, or no file.
fn step(fs: &SimFs, input: &mut Input<'_>) {
    let (file, what) = (input.byte(), input.byte());
    let name = match file % 10 {
        0 => "LOCK".to_owned(),
        1 => "reserve".to_owned(),
        2 => format!("{}.broken-0000000000000048", segment_name(u64::from(input.byte() % 8))),
        3 => segment_name([0, 1 << 62, u64::MAX][usize::from(input.byte() % 3)]),
        n => segment_name(u64::from(n)),
    };
    let path = Path::new(DIR).join(name);
    let mut bytes = fs.read(&path).unwrap_or_default();
    match what % 6 {
        0 => bytes = input.bytes().to_vec(),
        1 => {
            let at = bytes.len().min(input.number());
            let patch = input.bytes();
            let end = bytes.len().min(at + patch.len());
            bytes[at..end].copy_from_slice(&patch[..end - at]);
        }
        2 => bytes.truncate(input.number()),
        3 => bytes.extend_from_slice(input.bytes()),
        4 => {
            if let Ok(header) = SegmentHeader::decode(&bytes) {
                let position = header.base + (bytes.len() as u64).saturating_sub(SEGMENT_HEADER_LEN);
                let synced_to = position.saturating_sub(input.number() as u64);
                let flags = u16::from(input.byte());
                let mut frame = frame_of(input.bytes());
                bytes.extend_from_slice(frame.stamp(position, synced_to, flags, header.salt));
            }
        }
        _ => return fs.place(&path, None),
    }
    fs.place(&path, Some(bytes));
}

/// Takes what it needs from the front of some bytes, and zeros when they are used up.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    fn number(&mut self) -> usize {
        usize::from(self.byte()) | usize::from(self.byte()) << 8
    }

    fn bytes(&mut self) -> &'a [u8] {
        let len = self.number() % 2_048;
        self.take(len)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `NKV_IMAGES=100` for a night.
    fn cases() -> u32 {
        600 * std::env::var("NKV_IMAGES").map_or(1, |text| text.parse::<u32>().unwrap())
    }

    fn any_bytes() -> impl Strategy<Value = Vec<u8>> {
        // Most numbers are small, so that there are many steps.
        let byte = prop_oneof![Just(0), 0_u8..12, any::<u8>()];
        prop::collection::vec(byte, 0..300)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(cases()))]

        #[test]
        fn any_bytes_are_records_or_are_not(data in any_bytes()) {
            log_records(&data);
        }

        #[test]
        fn any_directory_opens_or_is_repaired(data in any_bytes()) {
            recover(&data);
        }
    }

    // A frame that names a place where no frame begins, as durable: what follows could not be read again from there.
    #[test]
    fn a_synced_mark_inside_a_frame_hinders_no_opening() {
        recover(&[1, 2, 4, 0, 0, 0, 0, 0, 204, 10, 1, 0, 0, 0]);
    }

    #[test]
    fn any_byte_of_a_valid_record_may_change() {
        let body = |frame: &mut FrameBuf| {
            let expiry = Some(Expiry { at: nkv_core::Timestamp::from_millis(5), ttl_ms: 6 });
            let put = put(Key::new("a.b").unwrap(), Revision::new(3), Revision::ZERO, b"value", expiry);
            frame.push_change(&put, Revision::ZERO, false);
            frame.push_change(&Change { meta: Meta::new(b"m"), ..put }, Revision::new(2), true);
            let tombstone = delete(Key::reserved("r").unwrap(), Revision::new(3), Revision::ZERO, Meta::new(b""));
            frame.push_change(&tombstone, Revision::ZERO, true);
            frame.push_head(4);
            frame.push_seal();
        };
        let bytes = FrameBuf::of(body).stamp(0, 0, 0, 0).to_vec();
        for at in FRAME_HEADER_LEN..bytes.len() {
            for mask in 1..=255 {
                let mut changed = bytes.clone();
                changed[at] ^= mask;
                log_records(&changed[FRAME_HEADER_LEN..]);
            }
        }
    }
}
