//! The bytes of a segment: its header, frames, records. `docs/storage-format.md` is the text that this file obeys.
//!
//! All numbers are little-endian. Nothing here touches a file, and nothing here trusts a length it has read.

use nkv_core::{Action, Change, Epoch, Expiry, Key, Reason, Revision, Timestamp};

/// The version of new segments.
pub(crate) const VERSION: u32 = 3;
/// The oldest version that is read, and gone on with: it has no meta, no tombstones, and a revision for each change.
pub(crate) const VERSION_MIN: u32 = 2;
pub(crate) const SEGMENT_HEADER_LEN: u64 = 72;
pub(crate) const FRAME_HEADER_LEN: usize = 40;
pub(crate) const RECORD_HEADER_LEN: usize = 20;
/// The length of the frame that ends a segment: one record without key and value, padded.
pub(crate) const SEAL_FRAME_LEN: u64 = 64;
/// The longest body of a batch; the limit of the numbers that hold it is well above.
pub(crate) const BODY_LEN_MAX: usize = 1 << 28;

/// Frames acknowledged after this one may be lost without a trace.
pub(crate) const RELAXED: u16 = 1;
/// A reader that does not know one of these flags must not go on.
const FLAGS_TO_UNDERSTAND: u16 = 0xff00;

/// No segment has a greater number, and none starts further back in the log.
pub(crate) const NUMBER_MAX: u64 = u64::MAX / 2;

const SEGMENT_MAGIC: &[u8; 8] = b"nkv-log\0";
const FRAME_MAGIC: &[u8; 4] = b"nkvF";

const PUT: u8 = 1;
const DELETE: u8 = 2;
const EPOCH: u8 = 3;
const HEAD: u8 = 4;
const SEAL: u8 = 5;
const TOMBSTONE: u8 = 6;
/// Records of these types may be skipped by a reader that does not know them.
const SKIPPABLE: u8 = 0x80;

/// The bit of the detail that says that the record names the revision of the one whose place it takes, before the key.
const REPLACES: u8 = 0x80;
const REPLACES_LEN: usize = 8;
/// The bit of the detail of a put that says that it is known by its key, as its revision is that of another change too.
const KEYED: u8 = 0x40;

const FIELD_EXPIRY: u16 = 1;
/// Its tag, its length, and two numbers.
const EXPIRY_FIELD_LEN: usize = 20;
const FIELD_META: u16 = 2;
/// The tag of a field and its length.
const FIELD_HEADER_LEN: usize = 4;
/// Fields with this bit may not be skipped by a reader that does not know them.
const FIELD_TO_UNDERSTAND: u16 = 0x8000;

/// What a segment says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentHeader {
    /// The format version of the segment.
    pub(crate) version: u32,
    pub(crate) number: u64,
    /// The oldest segment that was needed when this one was made.
    pub(crate) head: u64,
    /// The log position of the first frame.
    pub(crate) base: u64,
    /// The highest revision stored before.
    pub(crate) revision: Revision,
    pub(crate) epoch: Epoch,
    /// Seed of the checksums of frame headers, so that frames of other segments or made up in values never fit.
    pub(crate) salt: u32,
}

impl SegmentHeader {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(SEGMENT_HEADER_LEN as usize);
        bytes.extend_from_slice(SEGMENT_MAGIC);
        bytes.extend_from_slice(&self.version.to_le_bytes());
        bytes.extend_from_slice(&self.salt.to_le_bytes());
        for number in [self.number, self.head, self.base, self.revision.get()] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&self.epoch.get().to_le_bytes());
        let crc = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes.resize(SEGMENT_HEADER_LEN as usize, 0);
        bytes
    }

    /// The format version of a header that is whole, if it is one that this program does not read.
    pub(crate) fn other_version(bytes: &[u8]) -> Option<u32> {
        let is_whole = bytes.starts_with(SEGMENT_MAGIC) && Some(crc32c::crc32c(bytes.get(..64)?)) == u32_at(bytes, 64);
        u32_at(bytes, 8).filter(|version| is_whole && !is_read(*version))
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let cut = "the segment header is cut";
        if bytes.get(..8).ok_or(cut)? != SEGMENT_MAGIC {
            return Err("this is no segment");
        }
        if crc32c::crc32c(bytes.get(..64).ok_or(cut)?) != u32_at(bytes, 64).ok_or(cut)? {
            return Err("the checksum of the segment header does not match");
        }
        let version = u32_at(bytes, 8).ok_or(cut)?;
        if !is_read(version) {
            return Err("the segment has another format version");
        }
        if u32_at(bytes, 68).ok_or(cut)? != 0 {
            return Err("the segment header does not end in zeros");
        }
        let header = SegmentHeader {
            version,
            salt: u32_at(bytes, 12).ok_or(cut)?,
            number: u64_at(bytes, 16).ok_or(cut)?,
            head: u64_at(bytes, 24).ok_or(cut)?,
            base: u64_at(bytes, 32).ok_or(cut)?,
            revision: Revision::new(u64_at(bytes, 40).ok_or(cut)?),
            epoch: Epoch::new(u128_at(bytes, 48).ok_or(cut)?),
        };
        // Nothing that is added to these numbers later can overflow.
        let is_sane = header.number.max(header.base) <= NUMBER_MAX;
        if is_sane { Ok(header) } else { Err("the segment header has a number that cannot be") }
    }
}

fn is_read(version: u32) -> bool {
    (VERSION_MIN..=VERSION).contains(&version)
}

/// What stands before a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrameHeader {
    pub(crate) body_len: u32,
    pub(crate) body_crc: u32,
    /// Where in the log the frame starts.
    pub(crate) position: u64,
    /// All of the log before this position was durable when the frame was written.
    pub(crate) synced_to: u64,
    pub(crate) flags: u16,
}

impl FrameHeader {
    fn encode(&self, salt: u32) -> [u8; FRAME_HEADER_LEN] {
        let mut header = [0; FRAME_HEADER_LEN];
        header[..4].copy_from_slice(FRAME_MAGIC);
        header[8..12].copy_from_slice(&self.body_len.to_le_bytes());
        header[12..16].copy_from_slice(&self.body_crc.to_le_bytes());
        header[16..24].copy_from_slice(&self.position.to_le_bytes());
        header[24..32].copy_from_slice(&self.synced_to.to_le_bytes());
        header[32..34].copy_from_slice(&self.flags.to_le_bytes());
        let crc = crc32c::crc32c_append(salt, &header[8..]);
        header[4..8].copy_from_slice(&crc.to_le_bytes());
        header
    }

    /// The header at the start of `bytes`, if its checksum says that it is one.
    pub(crate) fn decode(bytes: &[u8], salt: u32) -> Option<Self> {
        let bytes: &[u8; FRAME_HEADER_LEN] = bytes.first_chunk()?;
        if &bytes[..4] != FRAME_MAGIC || u32_at(bytes, 4)? != crc32c::crc32c_append(salt, &bytes[8..]) {
            return None;
        }
        Some(FrameHeader {
            body_len: u32_at(bytes, 8)?,
            body_crc: u32_at(bytes, 12)?,
            position: u64_at(bytes, 16)?,
            synced_to: u64_at(bytes, 24)?,
            flags: u16_at(bytes, 32)?,
        })
    }

    /// Length of header, body and padding.
    pub(crate) fn frame_len(&self) -> u64 {
        (FRAME_HEADER_LEN as u64).saturating_add(u64::from(self.body_len)).next_multiple_of(8)
    }

    pub(crate) fn is_relaxed(&self) -> bool {
        self.flags & RELAXED != 0
    }

    pub(crate) fn is_understood(&self) -> bool {
        self.flags & FLAGS_TO_UNDERSTAND == 0
    }

    /// Whether these are the body and the padding that the header speaks of.
    pub(crate) fn fits(&self, rest: &[u8]) -> bool {
        rest.split_at_checked(self.body_len as usize)
            .is_some_and(|(body, padding)| crc32c::crc32c(body) == self.body_crc && padding.iter().all(|b| *b == 0))
    }
}

/// A frame under construction, in a buffer that is used again and again.
#[derive(Debug)]
pub(crate) struct FrameBuf {
    bytes: Vec<u8>,
    body_len: usize,
    body_crc: u32,
    version: u32,
}

impl FrameBuf {
    pub(crate) fn new() -> Self {
        FrameBuf { bytes: vec![0; FRAME_HEADER_LEN], body_len: 0, body_crc: 0, version: VERSION_MIN }
    }

    /// The oldest version that has what the changes in it say. Copies need none that is newer than the segment that they are
    /// copied from, nor than the newest segment.
    pub(crate) fn version(&self) -> u32 {
        self.version
    }

    /// A finished frame around what `fill` adds.
    pub(crate) fn of(fill: impl FnOnce(&mut Self)) -> Self {
        let mut frame = FrameBuf::new();
        fill(&mut frame);
        frame.finish();
        frame
    }

    /// Forgets what is in it, and gives memory back if that was a lot.
    pub(crate) fn clear(&mut self) {
        self.bytes.truncate(FRAME_HEADER_LEN);
        self.bytes.shrink_to(1 << 20);
        self.version = VERSION_MIN;
    }

    /// Adds a change, which takes the place of a put that is known by the revision `replaces`; gives the length of its
    /// record.
    pub(crate) fn push_change(&mut self, change: &Change, replaces: Revision, is_keyed: bool) -> u32 {
        let (revisions, key, meta) = ((change.revision, replaces), change.key.as_str(), change.meta.as_bytes());
        if is_keyed || meta.is_some() || change.key.is_reserved() {
            self.version = VERSION;
        }
        let mut fields = Vec::new();
        if let Some(meta) = meta {
            fields.extend_from_slice(&FIELD_META.to_le_bytes());
            fields.extend_from_slice(&(meta.len() as u16).to_le_bytes());
            fields.extend_from_slice(meta);
        }
        match &change.action {
            Action::Put { value, expiry } => {
                if let Some(Expiry { at, ttl_ms }) = expiry {
                    fields.extend_from_slice(&FIELD_EXPIRY.to_le_bytes());
                    fields.extend_from_slice(&16_u16.to_le_bytes());
                    fields.extend_from_slice(&at.as_millis().to_le_bytes());
                    fields.extend_from_slice(&ttl_ms.to_le_bytes());
                }
                self.push((PUT, if is_keyed { KEYED } else { 0 }), revisions, key, value, &fields)
            }
            Action::Delete { reason } => {
                let detail = u8::from(*reason == Reason::Expired);
                let kind = if meta.is_some() { TOMBSTONE } else { DELETE };
                self.push((kind, detail), revisions, key, &[], &fields)
            }
        }
    }

    pub(crate) fn push_epoch(&mut self, epoch: Epoch) {
        self.push_note(EPOCH, &epoch.get().to_le_bytes());
    }

    pub(crate) fn push_head(&mut self, number: u64) {
        self.push_note(HEAD, &number.to_le_bytes());
    }

    pub(crate) fn push_seal(&mut self) {
        self.push_note(SEAL, &[]);
    }

    /// Adds a record that is about the log itself.
    fn push_note(&mut self, kind: u8, value: &[u8]) {
        self.push((kind, 0), (Revision::ZERO, Revision::ZERO), "", value, &[]);
    }

    /// Adds a record as it stands elsewhere in the log.
    pub(crate) fn push_copy(&mut self, record: &[u8]) {
        self.bytes.extend_from_slice(record);
    }

    // The casts cannot cut: keys are short, and `would_fit` is asked before.
    fn push(
        &mut self,
        (kind, detail): (u8, u8),
        (revision, replaces): (Revision, Revision),
        key: &str,
        value: &[u8],
        fields: &[u8],
    ) -> u32 {
        let number = replaces.get().to_le_bytes();
        // Most records replace none, and need no room to say so.
        let (flag, number) = if replaces == Revision::ZERO { (0, &[][..]) } else { (REPLACES, &number[..]) };
        let parts = [number, key.as_bytes(), value, fields];
        let len = parts.iter().fold(RECORD_HEADER_LEN, |sum, part| sum.saturating_add(part.len()));
        let mut header = [0; RECORD_HEADER_LEN];
        header[..4].copy_from_slice(&(len as u32).to_le_bytes());
        (header[4], header[5]) = (kind, detail | flag);
        header[6..8].copy_from_slice(&(key.len() as u16).to_le_bytes());
        header[8..16].copy_from_slice(&revision.get().to_le_bytes());
        header[16..].copy_from_slice(&(value.len() as u32).to_le_bytes());
        self.bytes.reserve(len);
        self.bytes.extend_from_slice(&header);
        parts.iter().for_each(|part| self.bytes.extend_from_slice(part));
        len as u32
    }

    /// Whether the batch is one that a frame can hold.
    pub(crate) fn would_fit(batch: &[Change]) -> bool {
        let value_len = |action: &Action| match action {
            Action::Put { value, .. } => value.len().saturating_add(EXPIRY_FIELD_LEN),
            Action::Delete { .. } => 0,
        };
        let meta_len =
            |change: &Change| change.meta.as_bytes().map_or(0, |meta| FIELD_HEADER_LEN.saturating_add(meta.len()));
        let lens = batch
            .iter()
            .flat_map(|c| [RECORD_HEADER_LEN + REPLACES_LEN, c.key.as_str().len(), value_len(&c.action), meta_len(c)]);
        lens.fold(0_usize, usize::saturating_add) <= BODY_LEN_MAX
    }

    fn body(&self) -> &[u8] {
        self.bytes.get(FRAME_HEADER_LEN..).unwrap_or_default()
    }

    /// Bytes so far, without the padding.
    pub(crate) fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Pads the frame and computes the checksum of its body: what can be done before its position is known.
    pub(crate) fn finish(&mut self) {
        (self.body_len, self.body_crc) = (self.body().len(), crc32c::crc32c(self.body()));
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
    }

    /// The finished frame as it is written at `position`.
    pub(crate) fn stamp(&mut self, position: u64, synced_to: u64, flags: u16, salt: u32) -> &[u8] {
        let (body_len, body_crc) = (self.body_len as u32, self.body_crc);
        let header = FrameHeader { body_len, body_crc, position, synced_to, flags };
        if let Some(start) = self.bytes.first_chunk_mut() {
            *start = header.encode(salt);
        }
        &self.bytes
    }
}

/// A record as it is read.
#[derive(Debug)]
pub(crate) struct RawRecord<'a> {
    /// All of its bytes.
    pub(crate) bytes: &'a [u8],
}

const CUT: &str = "a record runs past the end of its frame";

/// What a record that counts is known by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Id<'a> {
    /// Its revision, which no other record has that is known by that.
    Revision(Revision),
    /// Its key: a tombstone, whose revision the store does not name, or a put that was not the first change of its revision.
    Key(&'a str, Revision),
}

/// What a record says.
#[derive(Debug, PartialEq)]
pub(crate) enum Entry<'a> {
    Put {
        key: &'a str,
        value: &'a [u8],
        revision: Revision,
        replaces: Revision,
        expiry: Option<Expiry>,
        meta: Option<&'a [u8]>,
        is_keyed: bool,
    },
    Delete {
        key: &'a str,
        revision: Revision,
        replaces: Revision,
    },
    /// A delete that counts like a put until another change of its key.
    Tombstone {
        key: &'a str,
        revision: Revision,
        replaces: Revision,
        meta: &'a [u8],
    },
    Epoch(Epoch),
    Head(u64),
    Seal,
    Unknown,
}

/// The records of a body, from `offset` on.
#[derive(Debug)]
pub(crate) struct Records<'a> {
    body: &'a [u8],
    offset: usize,
}

impl<'a> Records<'a> {
    pub(crate) fn new(body: &'a [u8]) -> Self {
        Records { body, offset: 0 }
    }

    fn read(&self) -> Result<RawRecord<'a>, &'static str> {
        let rest = self.body.get(self.offset..).ok_or(CUT)?;
        let bytes = rest.get(..u32_at(rest, 0).ok_or(CUT)? as usize).ok_or(CUT)?;
        if bytes.len() < RECORD_HEADER_LEN {
            return Err(CUT);
        }
        Ok(RawRecord { bytes })
    }
}

impl<'a> Entry<'a> {
    /// What it is known by, if it is a put or a tombstone.
    pub(crate) fn id(&self) -> Option<Id<'a>> {
        match *self {
            Entry::Put { revision, is_keyed: false, .. } => Some(Id::Revision(revision)),
            Entry::Put { key, revision, .. } | Entry::Tombstone { key, revision, .. } => Some(Id::Key(key, revision)),
            _ => None,
        }
    }

    /// Whether its key is one. That is asked when the log is read first, and need not be asked again.
    pub(crate) fn check_key(&self) -> Result<(), &'static str> {
        let checked = match self {
            Entry::Put { key, .. } => Key::check(key),
            Entry::Delete { key, .. } | Entry::Tombstone { key, .. } => Key::check_stored(key),
            _ => Ok(()),
        };
        checked.map_err(|_| "a key is not valid")
    }
}

impl<'a> RawRecord<'a> {
    /// What it is known by, if it is a put or a tombstone. Of most puts no more than the header is looked at.
    pub(crate) fn id(&self) -> Option<Id<'a>> {
        let is_keyed = self.bytes.get(5)? & KEYED != 0;
        match *self.bytes.get(4)? {
            PUT if !is_keyed => u64_at(self.bytes, 8).map(|revision| Id::Revision(Revision::new(revision))),
            PUT | TOMBSTONE => self.entry().ok()?.id(),
            _ => None,
        }
    }

    /// The segment that it names as the oldest one needed, if it does: of other records nothing is looked at.
    pub(crate) fn head(&self) -> Option<u64> {
        let is_head = self.bytes.get(4) == Some(&HEAD);
        match is_head.then(|| self.entry()) {
            Some(Ok(Entry::Head(number))) => Some(number),
            _ => None,
        }
    }

    /// All that it says, if it is a record that this program understands.
    pub(crate) fn entry(&self) -> Result<Entry<'a>, &'static str> {
        let bytes = self.bytes;
        let (kind, key_len) = (*bytes.get(4).ok_or(CUT)?, usize::from(u16_at(bytes, 6).ok_or(CUT)?));
        let revision = Revision::new(u64_at(bytes, 8).ok_or(CUT)?);
        let value_len = u32_at(bytes, 16).ok_or(CUT)? as usize;
        let mut rest = bytes.get(RECORD_HEADER_LEN..).ok_or(CUT)?;
        let mut replaces = Revision::ZERO;
        if bytes.get(5).is_some_and(|detail| detail & REPLACES != 0) {
            replaces = Revision::new(u64_at(rest, 0).ok_or(CUT)?);
            rest = rest.get(REPLACES_LEN..).ok_or(CUT)?;
        }
        let (key, rest) = rest.split_at_checked(key_len).ok_or(CUT)?;
        let (value, fields) = rest.split_at_checked(value_len).ok_or(CUT)?;
        let (expiry, meta) = read_fields(fields)?;
        Ok(match kind {
            PUT => {
                let is_keyed = bytes.get(5).is_some_and(|detail| detail & KEYED != 0);
                Entry::Put { key: read_key(key)?, value, revision, replaces, expiry, meta, is_keyed }
            }
            DELETE => Entry::Delete { key: read_key(key)?, revision, replaces },
            TOMBSTONE => {
                let meta = meta.ok_or("a tombstone has no meta")?;
                Entry::Tombstone { key: read_key(key)?, revision, replaces, meta }
            }
            EPOCH => Entry::Epoch(Epoch::new(u128_at(value, 0).ok_or("an epoch is cut")?)),
            HEAD => Entry::Head(u64_at(value, 0).ok_or("a head is cut")?),
            SEAL => Entry::Seal,
            _ if kind & SKIPPABLE != 0 => Entry::Unknown,
            _ => return Err("a record has a type that this program does not know"),
        })
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<RawRecord<'a>, &'static str>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.offset >= self.body.len() {
            return None;
        }
        let record = self.read();
        self.offset = record.as_ref().map_or(self.body.len(), |read| self.offset.saturating_add(read.bytes.len()));
        Some(record)
    }
}

fn read_key(bytes: &[u8]) -> Result<&str, &'static str> {
    str::from_utf8(bytes).map_err(|_| "a key is not UTF-8")
}

/// Looks through the optional fields.
fn read_fields(mut fields: &[u8]) -> Result<(Option<Expiry>, Option<&[u8]>), &'static str> {
    let cut = "a field runs past the end of its record";
    let (mut expiry, mut meta) = (None, None);
    while !fields.is_empty() {
        let tag = u16_at(fields, 0).ok_or(cut)?;
        let len = usize::from(u16_at(fields, 2).ok_or(cut)?);
        let (data, rest) = fields.get(4..).ok_or(cut)?.split_at_checked(len).ok_or(cut)?;
        match tag {
            FIELD_EXPIRY => {
                let (at, ttl_ms) = (u64_at(data, 0).ok_or(cut)?, u64_at(data, 8).ok_or(cut)?);
                expiry = Some(Expiry { at: Timestamp::from_millis(at), ttl_ms });
            }
            FIELD_META => meta = Some(data),
            _ if tag & FIELD_TO_UNDERSTAND != 0 => return Err("a record has a field that this program must know"),
            _ => {}
        }
        fields = rest;
    }
    Ok((expiry, meta))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|chunk| u16::from_le_bytes(*chunk))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|chunk| u32::from_le_bytes(*chunk))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|chunk| u64::from_le_bytes(*chunk))
}

fn u128_at(bytes: &[u8], at: usize) -> Option<u128> {
    bytes.get(at..)?.first_chunk().map(|chunk| u128::from_le_bytes(*chunk))
}

#[cfg(test)]
#[path = "format_tests.rs"]
mod tests;
