//! Revisions that know their epoch.

use std::cmp::Ordering;
use std::fmt;

use nkv_core::Epoch;

/// The number of a change, and the epoch of the data within which it says something.
///
/// Two revisions are ordered if they are of the same epoch, and else neither equal nor ordered, so that a comparison with
/// one from before the data were lost is never true. That there is no such key is [`Revision::ZERO`] in every epoch.
///
/// # Examples
///
/// ```
/// use nkv_types::Revision;
///
/// let given = Revision::new(7); // as a person types it: of no epoch
/// assert!(given > Revision::ZERO && given.get() == 7);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Revision {
    number: u64,
    epoch: Option<Epoch>,
}

impl Revision {
    /// That there is no such key.
    pub const ZERO: Revision = Revision { number: 0, epoch: None };

    /// A revision whose epoch is not known. As a condition it is compared by its number alone.
    #[must_use]
    pub const fn new(number: u64) -> Self {
        Revision { number, epoch: None }
    }

    /// The revision of this number in `epoch`, for code that knows the epoch of the data: a client's connection, a node. Of
    /// number 0 it is [`Revision::ZERO`].
    #[must_use]
    pub fn in_epoch(epoch: Epoch, number: u64) -> Self {
        Revision { number, epoch: (number > 0).then_some(epoch) }
    }

    /// The revision whose number is `count` lower, in the same epoch; 0 at the lowest.
    #[must_use]
    pub fn back(self, count: u64) -> Self {
        Revision { number: self.number.saturating_sub(count), ..self }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.number
    }

    /// The epoch, if it is known.
    #[must_use]
    pub const fn epoch(self) -> Option<Epoch> {
        self.epoch
    }
}

impl PartialOrd for Revision {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        let is_comparable = self.epoch == other.epoch || self.number == 0 || other.number == 0;
        is_comparable.then(|| self.number.cmp(&other.number))
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.number, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn revisions_of_two_epochs_are_not_compared() {
        let (old, new) = (Epoch::new(1), Epoch::new(2));
        assert!(Revision::in_epoch(old, 1) < Revision::in_epoch(old, 2));
        let (five, one) = (Revision::in_epoch(old, 5), Revision::in_epoch(new, 1));
        assert_eq!((five.partial_cmp(&one), five == Revision::in_epoch(new, 5)), (None, false));
        assert!(Revision::in_epoch(new, 0) == Revision::ZERO && one > Revision::ZERO);
    }
}
