//! Encoded output, where it was encoded: a connection writes from here and reports how far it got.

use std::collections::VecDeque;
use std::mem;

use bytes::{Buf, BufMut, Bytes};

/// A value of at least this length is shared with the store; a shorter one is copied.
pub(crate) const SHARE_LEN_MIN: usize = 4_096;

/// The room for short pieces that is kept when all of them are gone: what one turn of a busy connection writes.
const KEEP_LEN: usize = 128 << 10;

/// The least that is worth moving short pieces for.
const CLOSE_UP_LEN: usize = 16 << 10;

/// Bytes to send, in order. Short pieces are gathered in one buffer, long values between them are shared.
///
/// ```
/// use nkv_protocol::{Chunks, hello};
///
/// let mut out = Chunks::default();
/// hello(&mut out);
/// out.push(&vec![b'x'; 10_000].into());
/// assert_eq!(out.slices().map(<[u8]>::len).collect::<Vec<_>>(), [8, 10_000]);
///
/// out.advance(5); // 5 bytes were written
/// assert_eq!((out.slices().next(), out.len()), (Some(&b"o\"\n"[..]), 10_003));
/// ```
#[derive(Debug, Default)]
pub struct Chunks {
    /// The short pieces, one behind the other.
    buffer: Vec<u8>,
    /// Where in the buffer begins what is still to be sent.
    start: usize,
    /// The long pieces, each with the position in the buffer that it comes before.
    shared: VecDeque<(usize, Bytes)>,
    shared_len: usize,
}

impl Chunks {
    /// Where the next short piece goes: it is to be appended.
    pub fn tail(&mut self) -> &mut Vec<u8> {
        &mut self.buffer
    }

    /// Appends bytes, sharing them if they are long.
    pub fn push(&mut self, bytes: &Bytes) {
        if bytes.len() < SHARE_LEN_MIN {
            self.buffer.put_slice(bytes);
        } else {
            self.share(bytes.clone());
        }
    }

    fn share(&mut self, bytes: Bytes) {
        self.shared_len = self.shared_len.saturating_add(bytes.len());
        self.shared.push_back((self.buffer.len(), bytes));
    }

    /// Appends all that `other` holds, and empties it.
    pub fn append(&mut self, other: &mut Chunks) {
        if self.is_empty() {
            return mem::swap(self, other);
        }
        let mut from = other.start;
        for (at, bytes) in other.shared.drain(..) {
            self.buffer.put_slice(other.buffer.get(from..at).unwrap_or_default());
            self.shared_len = self.shared_len.saturating_add(bytes.len());
            self.shared.push_back((self.buffer.len(), bytes));
            from = at;
        }
        self.buffer.put_slice(other.buffer.get(from..).unwrap_or_default());
        other.clear();
    }

    /// How many bytes there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.buffer.len().saturating_sub(self.start).saturating_add(self.shared_len)
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes, in order, as slices that are not empty.
    pub fn slices(&self) -> impl Iterator<Item = &[u8]> {
        let mut from = self.start;
        let pieces = self.shared.iter().flat_map(move |(at, bytes)| {
            let short = self.buffer.get(mem::replace(&mut from, *at)..*at);
            [short.unwrap_or_default(), bytes]
        });
        let last = self.shared.back().map_or(self.start, |(at, _)| *at);
        pieces.chain([self.buffer.get(last..).unwrap_or_default()]).filter(|slice| !slice.is_empty())
    }

    /// Drops the first `count` bytes: they were sent.
    #[inline(always)]
    pub fn advance(&mut self, mut count: usize) {
        while let Some((at, bytes)) = self.shared.front_mut() {
            let short_len = at.saturating_sub(self.start);
            if count < short_len {
                break;
            }
            self.start = *at;
            count = count.saturating_sub(short_len);
            let gone = count.min(bytes.len());
            bytes.advance(gone);
            count = count.saturating_sub(gone);
            self.shared_len = self.shared_len.saturating_sub(gone);
            if !bytes.is_empty() {
                break;
            }
            self.shared.pop_front();
        }
        self.start = self.start.saturating_add(count).min(self.buffer.len());
        if self.is_empty() {
            self.clear();
        } else if self.start >= CLOSE_UP_LEN.max(self.buffer.len() / 2) {
            // A peer that takes a little at a time while more is appended must not make the buffer grow for ever.
            self.close_up();
        }
    }

    /// Moves the first line, or all that is left behind the last one, to the end of `to`.
    pub fn move_line(&mut self, to: &mut Chunks) {
        let mut len = 0_usize;
        for slice in self.slices() {
            let end = memchr::memchr(b'\n', slice);
            len = len.saturating_add(end.map_or(slice.len(), |at| at.saturating_add(1)));
            if end.is_some() {
                break;
            }
        }
        if len == self.len() {
            return to.append(self);
        }
        let mut left = len;
        for slice in self.slices() {
            let part = slice.get(..left).unwrap_or(slice);
            to.tail().put_slice(part);
            left = left.saturating_sub(part.len());
        }
        self.advance(len);
    }

    /// How much memory is held for short pieces.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.buffer.capacity()
    }

    /// Gives all memory back that holds nothing.
    pub fn shrink(&mut self) {
        self.close_up();
        self.buffer.shrink_to_fit();
        self.shared.shrink_to_fit();
    }

    /// Takes all bytes out, as chunks.
    pub fn take(&mut self) -> Vec<Bytes> {
        let Chunks { buffer, mut start, shared, .. } = mem::take(self);
        let mut short = Bytes::from(buffer);
        short.advance(start.min(short.len()));
        let mut chunks = Vec::with_capacity(shared.len().saturating_mul(2).saturating_add(1));
        for (at, bytes) in shared {
            let len = at.saturating_sub(mem::replace(&mut start, at));
            chunks.extend([short.split_to(len.min(short.len())), bytes]);
        }
        chunks.push(short);
        chunks.retain(|chunk| !chunk.is_empty());
        chunks
    }

    /// Moves what is still to be sent to the front of the buffer.
    fn close_up(&mut self) {
        self.buffer.drain(..self.start.min(self.buffer.len()));
        for (at, _) in &mut self.shared {
            *at = at.saturating_sub(self.start);
        }
        self.start = 0;
    }

    fn clear(&mut self) {
        self.buffer.clear();
        self.buffer.shrink_to(KEEP_LEN);
        self.shared.clear();
        (self.start, self.shared_len) = (0, 0);
    }
}
