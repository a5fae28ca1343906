//! What a user can choose: when a write counts as done, and how much space things may take.

use std::error::Error as StdError;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// When an acknowledged write is on the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// Before it is acknowledged: it survives a power cut.
    #[default]
    Sync,
    /// At most this much later: it survives the death of the process, and a power cut takes at most the last
    /// interval and the time of one sync.
    Interval(Duration),
    /// When the operating system likes: it survives the death of the process.
    Os,
}

impl fmt::Display for Durability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Durability::Sync => f.write_str("sync"),
            Durability::Interval(period) => write!(f, "interval:{}ms", period.as_millis()),
            Durability::Os => f.write_str("os"),
        }
    }
}

impl FromStr for Durability {
    type Err = DurabilityError;

    fn from_str(text: &str) -> Result<Self, DurabilityError> {
        match text {
            "sync" => Ok(Durability::Sync),
            "os" => Ok(Durability::Os),
            _ => {
                let period = text.strip_prefix("interval:").and_then(parse_period);
                period.map(Durability::Interval).ok_or_else(|| DurabilityError { text: text.to_owned() })
            }
        }
    }
}

/// `50ms`, `2s` or `1m`: a whole number above zero and its unit, a day at most.
fn parse_period(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let unit_ms = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        _ => return None,
    };
    let period_ms = number.parse::<u64>().ok()?.checked_mul(unit_ms)?;
    (1..=86_400_000).contains(&period_ms).then(|| Duration::from_millis(period_ms))
}

/// A text that names no durability.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DurabilityError {
    text: String,
}

impl fmt::Display for DurabilityError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "durability {:?} is none of sync, os, or interval:DURATION such as interval:50ms", self.text)
    }
}

impl StdError for DurabilityError {}

/// How a data directory is used. None of it is stored: each opening may choose anew.
///
/// # Examples
///
/// ```
/// use std::time::Duration;
///
/// use nkv_persist_fs::{Durability, FsOptions};
///
/// // Faster; a power cut may take the last 50 ms.
/// let options = FsOptions::default()
///     .with_durability(Durability::Interval(Duration::from_millis(50)))
///     .with_segment_bytes(1 << 20);
/// # drop(options);
/// ```
#[derive(Clone, Debug)]
pub struct FsOptions {
    pub(crate) durability: Durability,
    pub(crate) segment_bytes: u64,
    pub(crate) reserve_bytes: u64,
    pub(crate) background: bool,
    pub(crate) group_access: bool,
}

impl Default for FsOptions {
    fn default() -> Self {
        FsOptions {
            durability: Durability::Sync,
            segment_bytes: 4 << 20,
            reserve_bytes: 6 << 20,
            background: true,
            group_access: false,
        }
    }
}

impl FsOptions {
    /// Smallest size of a segment.
    pub const SEGMENT_BYTES_MIN: u64 = 4 << 10;
    /// Largest size of a segment.
    pub const SEGMENT_BYTES_MAX: u64 = 1 << 30;

    /// When an acknowledged write is on the disk; [`Durability::Sync`] by default.
    #[must_use]
    pub fn with_durability(self, durability: Durability) -> Self {
        FsOptions { durability, ..self }
    }

    /// Where the log is cut into files, and how much space compaction may leave unused besides the live data;
    /// 4 MiB by default, brought between [`Self::SEGMENT_BYTES_MIN`] and [`Self::SEGMENT_BYTES_MAX`].
    #[must_use]
    pub fn with_segment_bytes(self, bytes: u64) -> Self {
        FsOptions { segment_bytes: bytes.clamp(Self::SEGMENT_BYTES_MIN, Self::SEGMENT_BYTES_MAX), ..self }
    }

    /// Space that is kept aside so that deletes work on a full disk; 6 MiB by default, zero for none. It grows with the log
    /// by some 0.3 %. With less than one and a half segments, deletes on a full disk may come to an end before they have
    /// made room.
    #[must_use]
    pub fn with_reserve_bytes(self, bytes: u64) -> Self {
        FsOptions { reserve_bytes: bytes, ..self }
    }

    /// Whether a thread syncs and compacts; yes by default. Without it the owner must call
    /// [`FsPersist::maintain`](crate::FsPersist::maintain).
    #[must_use]
    pub fn with_background(self, background: bool) -> Self {
        FsOptions { background, ..self }
    }

    /// Whether the group of the directory may write to it; no by default. Files in such a directory are made with mode
    /// 0660, so that another user of the group can go on with them. For [`FsPersist::open`](crate::FsPersist::open) alone.
    #[must_use]
    pub fn with_group_access(self, group_access: bool) -> Self {
        FsOptions { group_access, ..self }
    }

    /// How many bytes one step of compaction copies.
    pub(crate) fn chunk_bytes(&self) -> u64 {
        (self.segment_bytes / 4).min(64 << 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_durability_reads_back_as_it_is_written() {
        for text in ["sync", "os", "interval:50ms", "interval:86400000ms"] {
            assert_eq!(text.parse::<Durability>().map(|d| d.to_string()), Ok(text.to_owned()));
        }
        assert_eq!("interval:2s".parse(), Ok(Durability::Interval(Duration::from_secs(2))));
        assert_eq!("interval:1m".parse(), Ok(Durability::Interval(Duration::from_secs(60))));
    }

    #[test]
    fn what_is_no_durability_is_refused_and_named() {
        for text in ["", "Sync", "interval", "interval:", "interval:0ms", "interval:5", "interval:ms", "interval:-1s"] {
            assert!(text.parse::<Durability>().is_err(), "{text}");
        }
        assert!("interval:99999999999999999999s".parse::<Durability>().is_err());
        let error = "fast".parse::<Durability>().unwrap_err().to_string();
        assert_eq!(error, "durability \"fast\" is none of sync, os, or interval:DURATION such as interval:50ms");
    }
}
