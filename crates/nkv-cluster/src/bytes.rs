//! Numbers and texts as bytes: what comes from a peer or from a disk is read with checks, and refused as a whole.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// The length of a frame and its kind.
const FRAME_HEAD: usize = 5;

/// Puts bytes together.
#[derive(Debug, Default)]
pub(crate) struct Writer(BytesMut);

impl Writer {
    pub(crate) fn u8(&mut self, number: u8) {
        self.0.put_u8(number);
    }

    pub(crate) fn u32(&mut self, number: u32) {
        self.0.put_u32(number);
    }

    pub(crate) fn u64(&mut self, number: u64) {
        self.0.put_u64(number);
    }

    pub(crate) fn u128(&mut self, number: u128) {
        self.0.put_u128(number);
    }

    /// With their length before them; longer ones than 4 GiB are cut, and never come here.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.0.put_u32(len);
        self.0.put_slice(bytes.get(..len as usize).unwrap_or_default());
    }

    pub(crate) fn list<T>(&mut self, items: &[T], mut write: impl FnMut(&mut Self, &T)) {
        self.u32(u32::try_from(items.len()).unwrap_or(u32::MAX));
        items.iter().for_each(|item| write(self, item));
    }

    /// For the content of a frame: the length and the kind come before it at the end.
    pub(crate) fn framed() -> Self {
        Writer(BytesMut::from([0; FRAME_HEAD].as_slice()))
    }

    /// The frame of what was written to a [framed](Self::framed) one.
    pub(crate) fn into_frame(mut self, kind: u8) -> Bytes {
        let len = self.0.len().saturating_sub(FRAME_HEAD).saturating_add(1);
        let [a, b, c, d] = u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes();
        if let Some(head) = self.0.first_chunk_mut() {
            *head = [a, b, c, d, kind];
        }
        self.into_bytes()
    }

    pub(crate) fn into_bytes(self) -> Bytes {
        self.0.freeze()
    }
}

/// Takes bytes apart; each method says `None` where there are too few.
#[derive(Debug)]
pub(crate) struct Reader(Bytes);

impl Reader {
    pub(crate) fn new(bytes: Bytes) -> Self {
        Reader(bytes)
    }

    pub(crate) fn u8(&mut self) -> Option<u8> {
        self.0.try_get_u8().ok()
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.0.try_get_u32().ok()
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.0.try_get_u64().ok()
    }

    pub(crate) fn u128(&mut self) -> Option<u128> {
        self.0.try_get_u128().ok()
    }

    /// Zero or one.
    pub(crate) fn flag(&mut self) -> Option<bool> {
        match self.u8()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    pub(crate) fn bytes(&mut self) -> Option<Bytes> {
        let len = self.u32()? as usize;
        (len <= self.0.len()).then(|| self.0.split_to(len))
    }

    pub(crate) fn text(&mut self) -> Option<String> {
        String::from_utf8(self.bytes()?.to_vec()).ok()
    }

    /// A list whose items take so many bytes at least: no memory is taken for items that are not there.
    pub(crate) fn list<T>(&mut self, len_min: usize, mut read: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let count = self.u32()? as usize;
        if count.saturating_mul(len_min) > self.0.len() {
            return None;
        }
        (0..count).map(|_| read(self)).collect()
    }

    pub(crate) fn is_at_end(&self) -> bool {
        self.0.is_empty()
    }
}
