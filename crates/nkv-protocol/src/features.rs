//! Features: additions to version 1 of the protocol, each known by a name that the two sides of a connection exchange.

use std::fmt;
use std::ops::BitOr;

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::json::Text;

/// The longest list of names in a request, in bytes as written.
pub(crate) const LIST_LEN_MAX: usize = 4_096;

/// All names. The place of a name is its bit in [`Features`] and never changes.
const NAMES: [&str; 6] = ["reset", "ahead", "exact", "names", "alive", "stale"];

/// A set of features: what a client understands, or what a server offers.
///
/// ```
/// use nkv_protocol::Features;
///
/// let ours = Features::RESET;
/// assert!(ours.contains(Features::RESET) && !Features::NONE.contains(ours));
/// assert_eq!(ours.names().collect::<Vec<_>>(), ["reset"]);
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Features(u32);

impl Features {
    /// No feature: the protocol as the oldest clients know it.
    pub const NONE: Features = Features(0);
    /// The message that begins a snapshot for which the client did not ask.
    pub const RESET: Features = Features(1);
    /// Reads and subscriptions that may be served before earlier writes of their connection.
    pub const AHEAD: Features = Features(1 << 1);
    /// Subscriptions to one key, without its branch.
    pub const EXACT: Features = Features(1 << 2);
    /// Clients have a name for people, which `Trace` shows, and `Trace` lists them.
    pub const NAMES: Features = Features(1 << 3);
    /// Signs of life while the server keeps requests waiting, and for how long it may.
    pub const ALIVE: Features = Features(1 << 4);
    /// A server says when what it shows may be old: it does not see its engine, or not in time.
    pub const STALE: Features = Features(1 << 5);

    /// Returns whether every feature of `others` is in this set.
    #[must_use]
    pub fn contains(self, others: Features) -> bool {
        self.0 & others.0 == others.0
    }

    /// Returns this set with every feature of `others`.
    #[must_use]
    pub const fn with(self, others: Features) -> Self {
        Features(self.0 | others.0)
    }

    /// Returns the names of the features, in the order in which they were added to the protocol.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        NAMES.into_iter().filter(move |name| self.contains(Features::named(name)))
    }

    /// Returns the set as a number, for keeping it in an atomic.
    #[must_use]
    pub fn bits(self) -> u32 {
        self.0
    }

    /// Returns the set whose [`bits`](Self::bits) these are.
    #[must_use]
    pub fn from_bits(bits: u32) -> Self {
        Features(bits)
    }

    /// The feature of this name; none if the name is unknown.
    fn named(name: &str) -> Self {
        let bits = (0..).map(|place| 1_u32.checked_shl(place).unwrap_or(0));
        NAMES.iter().zip(bits).find(|(known, _)| **known == name).map_or(Features::NONE, |(_, bit)| Features(bit))
    }
}

impl BitOr for Features {
    type Output = Features;

    fn bitor(self, others: Features) -> Features {
        self.with(others)
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.names()).finish()
    }
}

/// A list of names as read from a message; unknown ones are passed over.
#[derive(Clone, Copy, Default)]
pub(crate) struct NameList(pub(crate) Features);

impl<'de> Deserialize<'de> for NameList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListVisitor;
        impl<'de> Visitor<'de> for ListVisitor {
            type Value = NameList;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of names")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut names: A) -> Result<NameList, A::Error> {
                let mut features = Features::NONE;
                while let Some(name) = names.next_element::<Text<'de>>()? {
                    features = features | Features::named(&name.0);
                }
                Ok(NameList(features))
            }
        }
        deserializer.deserialize_seq(ListVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_has_a_bit_of_its_own() {
        let mut seen = Features::NONE;
        for name in NAMES {
            let feature = Features::named(name);
            assert_eq!(feature.bits().count_ones(), 1);
            assert!(!seen.contains(feature), "{name} twice");
            assert_eq!(feature.names().collect::<Vec<_>>(), [name]);
            seen = seen | feature;
        }
        assert_eq!(Features::named("other"), Features::NONE);
        let all =
            [Features::RESET, Features::AHEAD, Features::EXACT, Features::NAMES, Features::ALIVE, Features::STALE];
        assert_eq!(NAMES.map(Features::named), all);
    }
}
