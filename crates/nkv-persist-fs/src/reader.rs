//! Reads one segment, frame by frame, without trusting a byte of it.

use std::sync::Arc;

use nkv_core::PersistError;

use crate::disk::{Disk, segment_name};
use crate::error::{from_io, other_version};
use crate::format::{FRAME_HEADER_LEN, FrameHeader, SEGMENT_HEADER_LEN, SegmentHeader};
use crate::vfs::{Open, VfsFile, read_exact};

/// How much is read at once, at least.
const WINDOW: u64 = 64 << 10;

/// A segment whose header is good.
#[derive(Debug)]
pub(crate) struct SegmentReader {
    file: Arc<dyn VfsFile>,
    path: String,
    pub(crate) header: SegmentHeader,
    size: u64,
    offset: u64,
    window: Vec<u8>,
    window_at: u64,
}

/// What stands next in a segment.
#[derive(Debug)]
pub(crate) enum Next<'a> {
    /// A frame, where it starts, and its records.
    Frame(FrameHeader, u64, &'a [u8]),
    /// Nothing, or zeros as far as the file goes.
    End,
    /// Something that is no frame.
    Bad(&'static str),
}

/// A segment, or why it is none.
#[derive(Debug)]
pub(crate) enum Opened {
    Good(SegmentReader),
    Bad { reason: &'static str, size: u64 },
}

impl SegmentReader {
    pub(crate) fn open(disk: &Disk, number: u64) -> Result<Opened, PersistError> {
        let name = segment_name(number);
        let (file, path) = (disk.open(&name, Open::Read)?, disk.path(&name));
        let size = file.size().map_err(|e| from_io("read", &path, e))?;
        let mut bytes = vec![0; SEGMENT_HEADER_LEN.min(size) as usize];
        read_exact(&*file, &mut bytes, 0).map_err(|e| from_io("read", &path, e))?;
        if let Some(version) = SegmentHeader::other_version(&bytes) {
            // Not damage: a program that cannot read it is not to repair it either.
            return Err(other_version(&path, version));
        }
        Ok(match SegmentHeader::decode(&bytes) {
            Ok(header) if header.number != number => {
                Opened::Bad { reason: "its header has the number of another segment", size }
            }
            Ok(header) => {
                let (offset, window) = (SEGMENT_HEADER_LEN, Vec::new());
                Opened::Good(SegmentReader { file, path, header, size, offset, window, window_at: 0 })
            }
            Err(reason) => Opened::Bad { reason, size },
        })
    }

    /// Where the next frame starts.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Goes on at the frame that starts there, or at the first one behind the header.
    pub(crate) fn skip_to(&mut self, offset: u64) {
        self.offset = offset.max(SEGMENT_HEADER_LEN);
    }

    /// Goes on at the frame that starts there in the log.
    pub(crate) fn skip_to_position(&mut self, position: u64) {
        self.skip_to(position.saturating_sub(self.header.base).saturating_add(SEGMENT_HEADER_LEN));
    }

    /// Where the next frame starts, in the log.
    pub(crate) fn position(&self) -> u64 {
        self.position_at(self.offset)
    }

    // The base is below 2^63, and so is every offset in a file: positions do not overflow.
    fn position_at(&self, offset: u64) -> u64 {
        self.header.base.saturating_add(offset.saturating_sub(SEGMENT_HEADER_LEN))
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn next(&mut self) -> Result<Next<'_>, PersistError> {
        let at = self.offset;
        if at == self.size {
            return Ok(Next::End);
        }
        let Some(header) = self.header_at(at)? else {
            let is_end = self.is_zero_to_the_end()?;
            return Ok(if is_end { Next::End } else { Next::Bad("no frame starts here") });
        };
        if !self.body_at(at, &header)? {
            return Ok(Next::Bad("the frame that starts here is not whole"));
        }
        self.offset = at.saturating_add(header.frame_len());
        let body = self.view(body_of(at), u64::from(header.body_len))?.unwrap_or_default();
        Ok(Next::Frame(header, at, body))
    }

    /// Whether nothing but zeros comes from the next frame on. It looks no further than the first byte that is none, as
    /// a torn segment may have many holes.
    fn is_zero_to_the_end(&mut self) -> Result<bool, PersistError> {
        let mut at = self.offset;
        while at < self.size {
            let len = WINDOW.min(self.size.saturating_sub(at));
            if !self.view(at, len)?.is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0)) {
                return Ok(false);
            }
            at = at.saturating_add(len);
        }
        Ok(true)
    }

    /// Where the last byte ends that is not zero, from the next frame on.
    pub(crate) fn written_to(&mut self) -> Result<u64, PersistError> {
        let (mut at, mut written_to) = (self.offset, self.offset);
        while at < self.size {
            let len = WINDOW.min(self.size.saturating_sub(at));
            if let Some(last) = self.view(at, len)?.and_then(|bytes| bytes.iter().rposition(|byte| *byte != 0)) {
                written_to = at.saturating_add(last as u64).saturating_add(1);
            }
            at = at.saturating_add(len);
        }
        Ok(written_to)
    }

    /// Goes to the next whole frame behind a bad one, wherever it starts.
    pub(crate) fn skip_bad(&mut self) -> Result<bool, PersistError> {
        while self.size.saturating_sub(self.offset) > 8 {
            self.offset = self.offset.saturating_add(8);
            if let Some(header) = self.header_at(self.offset)?
                && self.body_at(self.offset, &header)?
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether some whole frame behind the bad one was written when the log was durable beyond it.
    pub(crate) fn later_frame_proves(&mut self) -> Result<bool, PersistError> {
        let position = self.position();
        while self.skip_bad()? {
            while let Next::Frame(header, ..) = self.next()? {
                if header.synced_to > position {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// The header of a frame that belongs at this offset.
    fn header_at(&mut self, at: u64) -> Result<Option<FrameHeader>, PersistError> {
        let (salt, position) = (self.header.salt, self.position_at(at));
        let header = self.view(at, FRAME_HEADER_LEN as u64)?.and_then(|bytes| FrameHeader::decode(bytes, salt));
        Ok(header.filter(|header| header.position == position))
    }

    fn body_at(&mut self, at: u64, header: &FrameHeader) -> Result<bool, PersistError> {
        let rest = self.view(body_of(at), header.frame_len().saturating_sub(FRAME_HEADER_LEN as u64))?;
        Ok(rest.is_some_and(|rest| header.fits(rest)))
    }

    /// These bytes of the file, or nothing if it ends before.
    fn view(&mut self, at: u64, len: u64) -> Result<Option<&[u8]>, PersistError> {
        let Some(end) = at.checked_add(len).filter(|end| *end <= self.size) else { return Ok(None) };
        if at < self.window_at || end > self.window_at.saturating_add(self.window.len() as u64) {
            let read = len.max(WINDOW).min(self.size.saturating_sub(at));
            self.window.resize(read as usize, 0);
            self.window_at = at;
            let result = read_exact(&*self.file, &mut self.window, at);
            result.map_err(|e| from_io("read", &self.path, e))?;
        }
        let start = at.saturating_sub(self.window_at) as usize;
        Ok(self.window.get(start..).and_then(|rest| rest.get(..len as usize)))
    }
}

/// Where the body of the frame at this offset, or this position, starts.
fn body_of(frame_at: u64) -> u64 {
    frame_at.saturating_add(FRAME_HEADER_LEN as u64)
}
