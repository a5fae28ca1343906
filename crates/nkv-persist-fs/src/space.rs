//! Decides from sums alone when compaction is needed, and whether the disk has room for it.

use nkv_core::{PersistError, PersistErrorKind};

use crate::format::{SEAL_FRAME_LEN, SEGMENT_HEADER_LEN};
use crate::index::Index;
use crate::options::FsOptions;

/// The length of the frame that names a new head.
const HEAD_FRAME_LEN: u64 = 72;
/// No record of a value is longer, as the limits of a server have it.
const VALUE_ROOM: u64 = (8 << 20) + (4 << 10);

/// How much has to be done before `extra` more bytes are appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Need {
    /// Nothing.
    None,
    /// The background thread should compact.
    Soon,
    /// Writers must wait, or the bound breaks: two times the live data and one segment.
    Now,
}

/// What the log and the reserve take of the disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Space<'a> {
    pub(crate) index: &'a Index,
    pub(crate) options: &'a FsOptions,
    pub(crate) head: u64,
    /// A full disk asks for every segment below this number to be compacted.
    pub(crate) urgent_below: u64,
    pub(crate) reserve_held: bool,
    pub(crate) reserve_left: u64,
}

#[allow(clippy::arithmetic_side_effects, reason = "sums of the sizes of files; options and lengths are bounded")]
impl Space<'_> {
    pub(crate) fn need(&self, extra: u64) -> Need {
        let (live, slack) = (self.index.live_bytes(), self.options.segment_bytes);
        let total = self.index.total_bytes() + extra;
        if total + self.copies_len(self.head) > 2 * live + slack || self.is_tight(extra) {
            Need::Now
        } else if total > live + live / 2 + slack / 4 * 3 || self.is_pressed() {
            Need::Soon
        } else {
            Need::None
        }
    }

    /// Whether a full disk makes worth the while what would not be otherwise.
    fn is_pressed(&self) -> bool {
        let is_much = self.garbage() > self.index.live_bytes() / 8 + self.options.segment_bytes / 64;
        let is_urgent = self.head < self.urgent_below;
        is_urgent && is_much || self.is_eaten() && (is_urgent || self.is_near(0))
    }

    /// Whether `extra` more bytes may take the room that is needed to compact on a full disk.
    fn is_tight(&self, extra: u64) -> bool {
        self.is_eaten() && self.is_near(extra) && self.reserve_takes(self.head, 0)
    }

    /// Whether deletes eat the reserve, and compaction would give more back than it makes garbage anew.
    fn is_eaten(&self) -> bool {
        let reserve = self.options.reserve_bytes;
        reserve > 0 && !self.reserve_held && self.garbage() > reserve / 8 + self.pass_cost()
    }

    /// The most that compaction makes garbage anew while it copies all that is live, once.
    fn pass_cost(&self) -> u64 {
        let live = self.index.live_bytes();
        live / self.options.chunk_bytes() * 96 + live / self.options.segment_bytes * 256
    }

    /// Whether the segment that holds most could not be copied any more, after all others have been: one that holds less
    /// may come before it.
    fn is_near(&self, extra: u64) -> bool {
        let spare = self.options.reserve_bytes / 16 + self.pass_cost() + extra;
        !self.reserve_takes(self.index.fullest_segment(), spare)
    }

    fn garbage(&self) -> u64 {
        self.index.total_bytes().saturating_sub(self.index.live_bytes())
    }

    /// The most that is appended until a segment is emptied and gone.
    fn copies_len(&self, segment: u64) -> u64 {
        // Copying comes with frames of its own, with a new segment or two, and with the record of the new head.
        let live = self.index.live_in(segment);
        let frames = 2 + 2 * live / self.options.chunk_bytes();
        live + frames * 48 + 2 * (SEGMENT_HEADER_LEN + SEAL_FRAME_LEN) + HEAD_FRAME_LEN
    }

    /// Whether copies of what is needed of this segment can be made, as far as is known.
    pub(crate) fn check_room_to_copy(&self, segment: u64) -> Result<(), PersistError> {
        if self.reserve_held || self.options.reserve_bytes == 0 || self.reserve_takes(segment, 0) {
            return Ok(());
        }
        Err(PersistError::new(PersistErrorKind::NoSpace, "the disk is full: no room to compact"))
    }

    /// Whether what is left of the reserve takes what is needed of this segment, some deletes, and `spare` bytes more.
    pub(crate) fn reserve_takes(&self, segment: u64, spare: u64) -> bool {
        let deletes = self.options.reserve_bytes / 8;
        self.copies_len(segment).saturating_add(spare).saturating_add(deletes) <= self.reserve_left
    }

    /// How large the reserve is to be: as asked for, and larger by what it may cost to compact the whole log, and by what
    /// the longest value takes beyond a segment. A longer batch than that is cut when it is copied first.
    pub(crate) fn reserve_wanted(&self) -> u64 {
        let fullest = self.index.live_in(self.index.fullest_segment()).min(VALUE_ROOM);
        self.options.reserve_bytes + 2 * self.pass_cost() + fullest.saturating_sub(self.options.segment_bytes)
    }
}
