//! The order of the keys: the numbers of their slots, sorted, in chunks.
//!
//! Four bytes a key and some slack, where a tree of keys would take fifty. It knows nothing of keys: the caller says
//! of a slot whether it stands before the place that is meant. Finding that place takes a binary search among the chunks
//! and one within a chunk; putting a slot there moves at most one chunk's worth of numbers.

use crate::broken::broken;

/// The most that a chunk holds.
const CHUNK_LEN_MAX: usize = 512;

/// Two neighbours that hold no more than this together become one.
const MERGE_LEN_MAX: usize = CHUNK_LEN_MAX / 2;

/// What is wrong where a key is looked for in vain.
const NOT_THERE: &str = "a key is not in the order";

#[derive(Debug, Default)]
pub(crate) struct Order {
    /// None of them is empty.
    chunks: Vec<Vec<u32>>,
}

impl Order {
    /// Of slots that are sorted already.
    pub(crate) fn of(mut sorted: impl ExactSizeIterator<Item = u32>) -> Self {
        let mut chunks = Vec::new();
        while sorted.len() > 0 {
            // Not full, so that not each of the next ones splits a chunk.
            chunks.push(sorted.by_ref().take(CHUNK_LEN_MAX / 4 * 3).collect());
        }
        Order { chunks }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Puts a slot behind those of which `is_before` is true.
    pub(crate) fn insert(&mut self, slot: u32, is_before: impl Fn(u32) -> bool) {
        let at = self.chunk_at(&is_before);
        let is_last = at + 1 >= self.chunks.len();
        let Some(chunk) = self.chunks.get_mut(at) else {
            self.chunks.push(vec![slot]);
            return;
        };
        let within = chunk.partition_point(|known| is_before(*known));
        if chunk.len() < CHUNK_LEN_MAX {
            chunk.insert(within, slot);
        } else if is_last && within == chunk.len() {
            // Keys that come in their order fill one chunk after the other.
            self.chunks.push(vec![slot]);
        } else {
            let mut upper = chunk.split_off(CHUNK_LEN_MAX / 2);
            let (half, within) = match within.checked_sub(chunk.len()) {
                Some(within) => (&mut upper, within),
                None => (&mut *chunk, within),
            };
            half.insert(within, slot);
            chunk.shrink_to(CHUNK_LEN_MAX / 2 + 1);
            self.chunks.insert(at + 1, upper);
        }
    }

    /// Removes the slot behind those of which `is_before` is true.
    pub(crate) fn remove(&mut self, is_before: impl Fn(u32) -> bool) {
        let (at, within) = self.place_behind(is_before);
        let chunk = self.chunks.get_mut(at).filter(|chunk| within < chunk.len());
        chunk.unwrap_or_else(|| broken(NOT_THERE)).remove(within);
        // The chunk joins the one before it, or the one behind it joins this one.
        self.merge(at);
        self.merge(at.saturating_sub(1));
    }

    /// Puts a slot in the place of the one behind those of which `is_before` is true.
    pub(crate) fn replace(&mut self, slot: u32, is_before: impl Fn(u32) -> bool) {
        let (at, within) = self.place_behind(is_before);
        let known = self.chunks.get_mut(at).and_then(|chunk| chunk.get_mut(within));
        *known.unwrap_or_else(|| broken(NOT_THERE)) = slot;
    }

    /// In which chunk, and where there, the first slot is of which `is_before` is not true.
    fn place_behind(&self, is_before: impl Fn(u32) -> bool) -> (usize, usize) {
        let at = self.chunk_at(&is_before);
        let Some(chunk) = self.chunks.get(at) else { return (at, 0) };
        match chunk.partition_point(|known| is_before(*known)) {
            within if within < chunk.len() => (at, within),
            _ => (at + 1, 0),
        }
    }

    /// Joins a chunk with the next if both are small; one that is empty just goes.
    fn merge(&mut self, at: usize) {
        let Some([chunk, next]) = self.chunks.get_mut(at..).and_then(<[_]>::first_chunk_mut) else {
            self.chunks.pop_if(|last| last.is_empty());
            if self.chunks.is_empty() {
                self.chunks = Vec::new();
            }
            return;
        };
        if chunk.is_empty() || chunk.len() + next.len() <= MERGE_LEN_MAX {
            chunk.append(next);
            self.chunks.remove(at + 1);
        }
    }

    /// The slots in order, without those of which `is_before` is true.
    pub(crate) fn iter_from<'a>(&'a self, is_before: &dyn Fn(u32) -> bool) -> impl Iterator<Item = u32> + use<'a> {
        let at = self.chunk_at(is_before);
        let (first, rest) = self.chunks.get(at..).and_then(<[_]>::split_first).unzip();
        let first = first.map(Vec::as_slice).unwrap_or_default();
        let within = first.partition_point(|known| is_before(*known));
        let first = first.get(within..).unwrap_or_default();
        first.iter().chain(rest.into_iter().flatten().flatten()).copied()
    }

    /// The last chunk that begins before the place that is meant, or the first.
    fn chunk_at(&self, is_before: impl Fn(u32) -> bool) -> usize {
        let begins_before = |chunk: &Vec<u32>| chunk.first().is_some_and(|slot| is_before(*slot));
        self.chunks.partition_point(begins_before).saturating_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Slots that are their own keys.
    fn insert(order: &mut Order, slot: u32) {
        order.insert(slot, |known| known < slot);
    }

    fn all(order: &Order) -> Vec<u32> {
        order.iter_from(&|_| false).collect()
    }

    /// The same numbers on every machine, each of them once.
    fn shuffled(len: u32) -> Vec<u32> {
        let mut all: Vec<u32> = (0..len).collect();
        all.sort_by_key(|n| n.wrapping_mul(0x9e37_79b9).rotate_left(7) ^ 0x5bd1);
        all
    }

    #[test]
    fn slots_come_in_order_however_they_came_and_went() {
        let len = if cfg!(miri) { 1_500 } else { 20_000 };
        let mut order = Order::default();
        shuffled(len).into_iter().for_each(|slot| insert(&mut order, slot));
        assert_eq!(all(&order), (0..len).collect::<Vec<_>>());
        for slot in 0..len {
            // Another number, and back again.
            order.replace(len, |known| known < slot);
            assert_eq!(order.iter_from(&|known| known < slot).next(), Some(len));
            order.replace(slot, |known| known < slot);
        }
        assert_eq!(all(&order), (0..len).collect::<Vec<_>>());
        for from in (0..len).step_by(97) {
            assert_eq!(order.iter_from(&|known| known < from).next(), Some(from));
        }
        assert_eq!(order.iter_from(&|_| true).next(), None);

        let shuffled = shuffled(len);
        let (gone, left) = shuffled.split_at(len as usize - 1_000);
        gone.iter().for_each(|slot| order.remove(|known| known < *slot));
        let mut left = left.to_vec();
        left.sort_unstable();
        assert_eq!(all(&order), left);
        assert!(order.chunks.len() <= 2 * left.len().div_ceil(MERGE_LEN_MAX / 2), "{} chunks", order.chunks.len());
        left.iter().for_each(|slot| order.remove(|known| known < *slot));
        assert_eq!((all(&order), order.chunks.capacity()), (vec![], 0));
    }

    #[test]
    fn slots_that_come_in_order_fill_their_chunks() {
        let mut order = Order::default();
        (0..10 * CHUNK_LEN_MAX as u32).for_each(|slot| insert(&mut order, slot));
        assert_eq!(order.chunks.len(), 10);
        let sorted = all(&order);
        assert_eq!(all(&Order::of(sorted.iter().copied())), sorted);
    }
}
