//! Digests of a store, as a tree over the hashes of its keys: two stores that are equal have equal roots, and where they
//! differ, the way down leads to the few keys that do.

/// Bits of a key's hash for each level.
const BITS: u32 = 4;

/// Levels below the root.
pub(crate) const DEPTH: u8 = 4;

/// Children of a node.
pub(crate) const CHILDREN: usize = 1 << BITS;

/// The keys whose hashes begin alike: a node of the tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Prefix {
    /// 0 is the root.
    pub(crate) level: u8,
    /// The first bits of the hashes.
    pub(crate) index: u32,
}

impl Prefix {
    pub(crate) const ROOT: Prefix = Prefix { level: 0, index: 0 };

    /// That of a hash at a level.
    fn of(hash: u64, level: u8) -> Self {
        let index = match u32::from(level) * BITS {
            0 => 0,
            bits => hash >> (u64::BITS - bits),
        };
        Prefix { level, index: index as u32 }
    }

    /// Whether there is such a node.
    pub(crate) fn is_valid(self) -> bool {
        self.level <= DEPTH && u64::from(self.index) < 1 << (u32::from(self.level) * BITS)
    }

    pub(crate) fn child(self, number: u32) -> Self {
        Prefix { level: self.level.saturating_add(1), index: (self.index << BITS) | number }
    }

    /// The first hash and the last.
    pub(crate) fn hashes(self) -> (u64, u64) {
        match u32::from(self.level) * BITS {
            0 => (0, u64::MAX),
            bits => {
                let first = u64::from(self.index) << (u64::BITS - bits);
                (first, first | (u64::MAX >> bits))
            }
        }
    }
}

/// Half of each digest is said in a session: of two that differ, one half may be the same by chance, and the other is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    Low,
    High,
}

impl Half {
    pub(crate) fn of(self, digest: u64) -> u32 {
        match self {
            Half::Low => digest as u32,
            Half::High => (digest >> 32) as u32,
        }
    }
}

/// What is said of the children of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Children {
    /// A bit for each that has keys: of that no half digest is to decide.
    pub(crate) used: u16,
    pub(crate) digests: [u32; CHILDREN],
}

impl Children {
    /// Each in turn, and whether it has keys.
    pub(crate) fn each(self) -> impl Iterator<Item = (bool, u32)> {
        (0..).zip(self.digests).map(move |(number, digest)| (self.used >> number & 1 == 1, digest))
    }
}

/// The digests of all nodes; zero for one that has no keys.
#[derive(Debug)]
pub(crate) struct Tree {
    levels: Vec<Vec<u64>>,
}

impl Default for Tree {
    fn default() -> Self {
        Tree { levels: (0..=u32::from(DEPTH)).map(|level| vec![0; 1 << (level * BITS)]).collect() }
    }
}

impl Tree {
    /// Adds the digest of a register, or takes it away again.
    pub(crate) fn flip(&mut self, key_hash: u64, digest: u64) {
        for (level, digests) in (0..).zip(&mut self.levels) {
            let index = Prefix::of(key_hash, level).index as usize;
            digests.get_mut(index).into_iter().for_each(|node| *node ^= digest);
        }
    }

    pub(crate) fn digest(&self, Prefix { level, index }: Prefix) -> u64 {
        let digests = self.levels.get(usize::from(level));
        digests.and_then(|digests| digests.get(index as usize)).copied().unwrap_or_default()
    }

    pub(crate) fn children(&self, prefix: Prefix, half: Half) -> Children {
        let digests: [u64; CHILDREN] = std::array::from_fn(|number| self.digest(prefix.child(number as u32)));
        let used = (0..).zip(digests).fold(0, |used, (number, digest)| used | (u16::from(digest != 0) << number));
        Children { used, digests: digests.map(|digest| half.of(digest)) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_register_is_in_each_digest_on_its_way_and_in_no_other(hash: u64, digest in 1_u64..) {
            let mut tree = Tree::default();
            tree.flip(hash, digest);
            let mut at = Prefix::ROOT;
            prop_assert_eq!(tree.digest(at), digest);
            while at.level < DEPTH {
                let [low, high] = [Half::Low, Half::High].map(|half| tree.children(at, half));
                let with: Vec<usize> = (0..CHILDREN)
                    .filter(|child| {
                        u64::from(high.digests[*child]) << 32 | u64::from(low.digests[*child]) == digest
                    })
                    .collect();
                prop_assert_eq!(with.len(), 1);
                prop_assert_eq!((low.used, high.used), (1 << with[0], 1 << with[0]));
                at = at.child(with[0] as u32);
                let (first, last) = at.hashes();
                prop_assert!((first..=last).contains(&hash) && at.is_valid());
            }
            tree.flip(hash, digest);
            prop_assert!(tree.levels.iter().flatten().all(|digest| *digest == 0));
        }
    }
}
