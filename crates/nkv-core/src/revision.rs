//! Revisions order every change of a store; an epoch says within which life of the data they may be compared.

use std::fmt;
use std::str::FromStr;

/// Store-wide number of a change: strictly increasing, persisted, never reused within an [`Epoch`].
///
/// [`Revision::ZERO`] stands for "no such key" and is never given to a change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(u64);

impl Revision {
    /// Before the first change.
    pub const ZERO: Revision = Revision(0);

    /// The revision with this number.
    #[must_use]
    pub const fn new(number: u64) -> Self {
        Revision(number)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The revision after this one. At one change a nanosecond, 64 bits last for 584 years.
    #[must_use]
    pub const fn next(self) -> Self {
        Revision(self.0.wrapping_add(1))
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Random identity of one life of a store's data.
///
/// It changes when recovery had to drop anything that may have been acknowledged: revisions of two epochs must
/// not be compared. Written as 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Epoch(u128);

impl Epoch {
    /// The epoch with this number; randomness is the caller's.
    #[must_use]
    pub const fn new(number: u128) -> Self {
        Epoch(number)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u128 {
        self.0
    }

    /// Its hexadecimal digits, as `Display` writes them, for answers that have no time for formats.
    #[must_use]
    pub fn digits(self) -> [u8; 32] {
        let mut digits = [0; 32];
        let nibbles = self.0.to_be_bytes().into_iter().flat_map(|byte| [byte >> 4, byte & 0xf]);
        for (digit, nibble) in digits.iter_mut().zip(nibbles) {
            *digit = nibble.wrapping_add(if nibble < 10 { b'0' } else { b'a' - 10 });
        }
        digits
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(str::from_utf8(&self.digits()).unwrap_or_default())
    }
}

impl FromStr for Epoch {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        u128::from_str_radix(text, 16).map(Epoch)
    }
}
