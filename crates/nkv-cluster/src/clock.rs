//! What time it is: this machine's clock, and what those of the peers say about it.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::SystemTime;

use async_trait::async_trait;
use nkv_node::{SinceBoot, Time, replace_file};

use crate::cluster::millis;
use crate::stamp::{Hlc, Millis, NodeId};

/// A wall clock that shows less was never set: 2020-01-01.
pub(crate) const SET_FROM: Millis = 1_577_836_800_000;

/// How long what a peer's clock showed is believed.
const SAMPLE_LIFE: Millis = 60_000;

/// A clock that moves by no more between two samples was not set.
const SAME: i64 = 100;

/// The clocks of a machine.
pub(crate) trait Clock: fmt::Debug + Send + Sync + 'static {
    /// Milliseconds since the Unix epoch, as far as the machine knows.
    fn wall(&self) -> Millis;

    /// Milliseconds since some moment; it is never set, and goes on while the machine is suspended.
    fn steady(&self) -> Millis;
}

/// Those of this machine.
#[derive(Debug)]
pub(crate) struct SystemClock;

impl Clock for SystemClock {
    fn wall(&self) -> Millis {
        millis(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default())
    }

    fn steady(&self) -> Millis {
        millis(SinceBoot.elapsed())
    }
}

/// A moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Now {
    /// The time that is believed: the own clock's, or the peers' where that is off.
    pub(crate) wall: Millis,
    /// The latest time that it may be, by what is known: what is stamped ahead of it by more than the offset is not taken.
    pub(crate) latest: Millis,
    /// Whether peers bear out the time that is believed.
    pub(crate) is_agreed: bool,
    /// See [`Clock::steady`].
    pub(crate) steady: Millis,
}

/// How the clocks of the peers stand against the own steady clock, which no one sets.
#[derive(Debug, Default)]
pub(crate) struct PeerClocks {
    samples: BTreeMap<NodeId, Sample>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    /// What the peer's wall clock is ahead of the own steady one.
    base: i64,
    /// Half of the time that it took to ask: it may be off by so much.
    error: i64,
    /// When it was asked for, and when it was there.
    asked: Millis,
    at: Millis,
    /// From when on all samples of the peer said about the same.
    since: Millis,
}

impl Sample {
    fn is_fresh(&self, steady: Millis) -> bool {
        steady.saturating_sub(self.at) <= SAMPLE_LIFE
    }

    /// How far the own wall clock is ahead of the peer's.
    fn offset(&self, wall: Millis, steady: Millis) -> i64 {
        let offset = signed(wall).saturating_sub(signed(steady)).saturating_sub(self.base);
        offset.signum() * offset.saturating_abs().saturating_sub(self.error).max(0)
    }
}

impl PeerClocks {
    /// Notes what a peer's clock showed, between two readings of the steady clock. One that was never set says nothing.
    pub(crate) fn note(&mut self, peer: NodeId, wall: Millis, asked: Millis, answered: Millis) {
        self.samples.retain(|other, sample| *other == peer || answered.saturating_sub(sample.at) <= SAMPLE_LIFE);
        if wall < SET_FROM {
            self.samples.remove(&peer);
            return;
        }
        let error = signed(answered.saturating_sub(asked)) / 2;
        let base = signed(wall).saturating_sub(signed(asked).saturating_add(error));
        let is_same = |before: &&Sample| {
            before.base.saturating_sub(base).saturating_abs() <= before.error.saturating_add(error).saturating_add(SAME)
        };
        let since = self.samples.get(&peer).filter(is_same).map_or(answered, |before| before.since);
        self.samples.insert(peer, Sample { base, error, asked, at: answered, since });
    }

    /// How far the own wall clock is ahead of the median of the peers'; of an even number of them, of the one nearer to it. What
    /// may be an error of measurement does not count. Says also of how many peers that is.
    pub(crate) fn offset(&self, wall: Millis, steady: Millis) -> Option<(i64, usize)> {
        let mut offsets: Vec<i64> = self.fresh(wall, steady).map(|(_, offset)| offset).collect();
        offsets.sort_unstable();
        let count = offsets.len();
        let middle = [count.checked_sub(1)? / 2, count / 2];
        let median = middle.iter().filter_map(|at| offsets.get(*at)).min_by_key(|offset| offset.saturating_abs());
        median.map(|median| (*median, count))
    }

    /// How far the clock of each peer is ahead of the own one; what may be an error of measurement does not count.
    pub(crate) fn offsets(&self, wall: Millis, steady: Millis) -> BTreeMap<NodeId, i64> {
        let fresh = self.samples.iter().filter(|(_, sample)| sample.is_fresh(steady));
        fresh.map(|(id, sample)| (*id, sample.offset(wall, steady).saturating_neg())).collect()
    }

    /// The samples that count, and how far the own wall clock is ahead of each.
    fn fresh(&self, wall: Millis, steady: Millis) -> impl Iterator<Item = (&Sample, i64)> {
        let fresh = self.samples.values().filter(move |sample| sample.is_fresh(steady));
        fresh.map(move |sample| (sample, sample.offset(wall, steady)))
    }

    /// Whether two peers were both ahead of the own clock by more than `offset_max` at one moment. Of two that were at different
    /// moments, each may have been off and not know it, as a clock that is off is set again.
    fn are_two_ahead(&self, wall: Millis, steady: Millis, offset_max: Millis) -> bool {
        let ahead = self.fresh(wall, steady).filter(|(_, offset)| *offset < -signed(offset_max));
        let mut spans: Vec<(Millis, Millis)> = ahead.map(|(sample, _)| (sample.since, sample.asked)).collect();
        spans.retain(|(since, until)| since <= until);
        spans.sort_unstable();
        let mut latest = None;
        spans.into_iter().any(|(since, until)| {
            let meets = latest.is_some_and(|latest| since <= latest);
            latest = latest.max(Some(until));
            meets
        })
    }

    /// The time to believe: the own clock's; the peers' if that is ahead of them by more than `offset_max`, or behind and it was
    /// never set or two peers say so.
    pub(crate) fn now(&self, wall: Millis, steady: Millis, offset_max: Millis) -> Now {
        let Some((offset, peers)) = self.offset(wall, steady) else {
            return Now { wall, latest: wall, is_agreed: false, steady };
        };
        let of_peers = wall.saturating_add_signed(offset.saturating_neg());
        let max = signed(offset_max);
        let is_behind = || wall < SET_FROM || self.are_two_ahead(wall, steady, offset_max);
        match offset {
            // Of two clocks, the other may be the one that is off.
            _ if offset > max && peers == 1 => Now { wall: of_peers, latest: wall, is_agreed: false, steady },
            _ if offset > max => Now { wall: of_peers, latest: of_peers, is_agreed: true, steady },
            _ if offset >= -max => Now { wall, latest: wall.max(of_peers), is_agreed: true, steady },
            _ if is_behind() => Now { wall: of_peers, latest: of_peers, is_agreed: true, steady },
            _ => Now { wall, latest: wall, is_agreed: false, steady },
        }
    }
}

pub(crate) fn signed(millis: Millis) -> i64 {
    i64::try_from(millis).unwrap_or(i64::MAX)
}

/// Keeps the upper bound of a hybrid clock, ahead of its use: a restart gives no stamp that was given before, whatever
/// the wall clock shows then and whatever of the data was lost.
#[async_trait]
pub(crate) trait Bound: fmt::Debug + Send + Sync + 'static {
    /// What was kept last; zero if nothing was.
    async fn load(&self) -> io::Result<Hlc>;

    /// Keeps it durably.
    async fn store(&self, bound: Hlc) -> io::Result<()>;
}

/// For a node in memory, which has another id after a restart.
#[derive(Debug)]
pub(crate) struct NoBound;

#[async_trait]
impl Bound for NoBound {
    async fn load(&self) -> io::Result<Hlc> {
        Ok(Hlc::default())
    }

    async fn store(&self, _bound: Hlc) -> io::Result<()> {
        Ok(())
    }
}

/// Keeps it in a file of one line.
#[derive(Debug)]
pub(crate) struct BoundFile(pub(crate) PathBuf);

#[async_trait]
impl Bound for BoundFile {
    async fn load(&self) -> io::Result<Hlc> {
        let path = self.0.clone();
        blocking(move || match std::fs::read_to_string(&path) {
            Ok(text) => text
                .trim_end()
                .parse()
                .map(Hlc)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", path.display()))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Hlc::default()),
            Err(error) => Err(error),
        })
        .await
    }

    async fn store(&self, bound: Hlc) -> io::Result<()> {
        let path = self.0.clone();
        blocking(move || replace_file(&path, format!("{}\n", bound.0).as_bytes())).await
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::from)?
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const TODAY: Millis = SET_FROM + 1_000_000_000;

    fn clocks(offsets: &[i64]) -> PeerClocks {
        let mut clocks = PeerClocks::default();
        for (id, offset) in (0..).zip(offsets) {
            clocks.note(NodeId(id), TODAY.saturating_add_signed(*offset), 500, 500);
        }
        clocks
    }

    #[test]
    fn a_clock_is_compared_with_the_median_of_the_peers() {
        let offset = |offsets: &[i64]| clocks(offsets).offset(TODAY, 500);
        assert_eq!(offset(&[]), None);
        assert_eq!(offset(&[-3_000]), Some((3_000, 1)));
        assert_eq!(offset(&[-3_000, 10]), Some((-10, 2)), "of two, the nearer one");
        assert_eq!(offset(&[-3_000, -2_000, 10]), Some((2_000, 3)));
        // A clock that is set stands against the steady one at once; a peer that was never set says nothing.
        assert_eq!(clocks(&[0]).offset(TODAY + 5_000, 600), Some((4_900, 1)));
        assert_eq!(offset(&[-signed(TODAY)]), None);
        assert_eq!(clocks(&[0]).offset(TODAY, 500 + SAMPLE_LIFE + 1), None, "too long ago");
    }

    #[test]
    fn a_clock_that_shows_nonsense_ends_nothing() {
        let mut clocks = PeerClocks::default();
        for _ in 0..2 {
            clocks.note(NodeId(1), u64::MAX, 0, 0);
            assert!(clocks.offset(0, 5_000).is_some_and(|(offset, _)| offset < 0));
            assert!(clocks.now(0, 5_000, 1_000).wall > 0);
            clocks.note(NodeId(1), u64::MAX, u64::MAX, u64::MAX);
        }
    }

    #[test]
    fn what_peers_said_too_long_ago_is_dropped() {
        let mut clocks = clocks(&[0, 0, 0]);
        clocks.note(NodeId(7), TODAY, 500 + SAMPLE_LIFE, 500 + SAMPLE_LIFE);
        assert_eq!(clocks.samples.len(), 4);
        clocks.note(NodeId(7), TODAY, 501 + SAMPLE_LIFE, 501 + SAMPLE_LIFE);
        assert_eq!(clocks.samples.len(), 1);
    }

    #[test]
    fn time_that_it_took_to_ask_is_no_offset() {
        let mut clocks = PeerClocks::default();
        clocks.note(NodeId(1), TODAY, 0, 2_000);
        assert_eq!(clocks.offset(TODAY + 2_000, 2_000), Some((0, 1)));
        assert_eq!(clocks.offset(TODAY + 5_000, 2_000), Some((3_000, 1)));
    }

    #[test]
    fn the_peers_are_believed_where_the_own_clock_is_off() {
        let now = |offsets: &[i64], wall| clocks(offsets).now(wall, 500, 1_000).wall;
        assert_eq!(now(&[-3_600_000], TODAY), TODAY - 3_600_000, "ahead of its only peer");
        assert_eq!(now(&[3_600_000], TODAY), TODAY, "one peer that is ahead may be wrong itself");
        assert_eq!(now(&[3_600_000, 3_600_001], TODAY), TODAY + 3_600_000);
        assert_eq!(now(&[0], 5_000), TODAY, "a clock that was never set");
        assert_eq!(now(&[900], TODAY), TODAY);
    }

    #[test]
    fn two_peers_that_were_ahead_at_different_moments_are_not_believed() {
        const AHEAD: Millis = 3_600_000;
        let mut clocks = PeerClocks::default();
        let note = |clocks: &mut PeerClocks, id, ahead, steady| {
            clocks.note(NodeId(id), TODAY + steady + ahead, steady, steady);
        };
        let now = |clocks: &PeerClocks, steady| clocks.now(TODAY + steady, steady, 1_000);
        note(&mut clocks, 1, AHEAD, 0);
        note(&mut clocks, 1, AHEAD, 1_000);
        // It is gone, and only then the other is set ahead.
        note(&mut clocks, 2, 0, 1_000);
        note(&mut clocks, 2, AHEAD, 2_000);
        note(&mut clocks, 2, AHEAD, 3_000);
        let unclear = now(&clocks, 3_000);
        assert_eq!((unclear.wall, unclear.latest, unclear.is_agreed), (TODAY + 3_000, TODAY + 3_000, false));
        // Now it says so too.
        note(&mut clocks, 1, AHEAD, 3_000);
        let agreed = now(&clocks, 3_000);
        assert_eq!((agreed.wall, agreed.latest, agreed.is_agreed), (TODAY + 3_000 + AHEAD, agreed.wall, true));
    }

    #[test]
    fn what_may_be_of_this_time_is_taken_by_the_peers_clocks_too() {
        let now = |offsets: &[i64]| clocks(offsets).now(TODAY, 500, 1_000);
        let latest = |offsets: &[i64]| (now(offsets).latest, now(offsets).is_agreed);
        assert_eq!(latest(&[]), (TODAY, false));
        assert_eq!(latest(&[-900]), (TODAY, true));
        assert_eq!(latest(&[900]), (TODAY + 900, true), "a little behind");
        assert_eq!(latest(&[-9_000]), (TODAY, false), "which of two clocks is off, is not known");
        assert_eq!(latest(&[9_000]), (TODAY, false));
        assert_eq!(latest(&[-9_000, -9_000]), (TODAY - 9_000, true));
        assert_eq!(latest(&[9_000, 9_000]), (TODAY + 9_000, true));
    }

    #[tokio::test]
    async fn a_bound_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let file = BoundFile(dir.path().join("bound"));
        assert_eq!(file.load().await.unwrap(), Hlc(0));
        file.store(Hlc(77)).await.unwrap();
        assert_eq!(file.load().await.unwrap(), Hlc(77));
        let mode = std::fs::metadata(dir.path().join("bound")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "others can read it");
        std::fs::write(dir.path().join("bound"), "7x").unwrap();
        assert!(file.load().await.is_err(), "what is damaged is no bound of zero");
    }
}
