//! The other client: it sends gets at fixed times, also while earlier ones are unanswered.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use super::{Size, VALUE};
use crate::Result;
use crate::drivers::Event;
use crate::hist::Hist;
use crate::load::Random;
use crate::pool::{Pool, Target};
use crate::sys::{self, SECOND};

/// The time between two gets: 5,000 a second, over all connections in turn. They do not wait for earlier answers, so a
/// stall is seen by every get that is due during it.
const STEP: u64 = SECOND / 5_000;
const CONNECTIONS: usize = 16;
/// Gets of one connection that wait for their answers, at most.
const UNDER_WAY: usize = 4_096;

/// A server that takes more is killed: the machine would be next.
const RSS_LIMIT_MB: f64 = 8_000.0;

/// When a get was due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Phase {
    /// Keys are put again, and the like: not measured.
    Between,
    /// From the request to its answer.
    During,
    /// From the answer until the subscribers have received everything.
    After,
}

/// State shared by the thread of the gets and that of the large request.
#[derive(Debug, Default)]
pub(super) struct Shared {
    phase: AtomicU8,
    /// Gets that were due during the large request.
    pub(super) gets: AtomicU64,
    pub(super) done: AtomicBool,
    /// The thread of the gets has ended.
    pub(super) broken: AtomicBool,
}

impl Shared {
    pub(super) fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::SeqCst);
    }

    fn phase(&self) -> Phase {
        match self.phase.load(Ordering::SeqCst) {
            1 => Phase::During,
            2 => Phase::After,
            _ => Phase::Between,
        }
    }
}

#[derive(Debug)]
pub(super) struct Seen {
    pub(super) during: Hist,
    pub(super) after: Hist,
    /// How long after its time a get was written.
    pub(super) late: Hist,
    /// Resident memory of the server, at its largest.
    pub(super) rss_mb: f64,
    /// That was too much.
    pub(super) killed: bool,
}

impl Seen {
    fn add(&mut self, phase: Phase, ns: u64) {
        match phase {
            Phase::During => self.during.add(ns),
            Phase::After => self.after.add(ns),
            Phase::Between => {}
        }
    }

    /// What was not answered has waited until now.
    fn add_unanswered(&mut self, pool: &Pool, phases: &[[Phase; UNDER_WAY]]) {
        let now = sys::now();
        for (connection, phases) in pool.connections.iter().zip(phases) {
            let mut busy = [true; UNDER_WAY];
            connection.free.iter().for_each(|slot| busy[*slot as usize] = false);
            for slot in (0..UNDER_WAY).filter(|slot| busy[*slot]) {
                self.add(phases[slot], now - connection.started[slot]);
            }
        }
    }
}

/// Gets keys at random, each at its time, until the other thread is done. The latency is from that time.
pub(super) fn gets(target: Target, size: Size, shared: &Shared) -> Result<Seen> {
    let mut pool = Pool::open(target, VALUE, CONNECTIONS, UNDER_WAY)?;
    let mut phases = vec![[Phase::Between; UNDER_WAY]; CONNECTIONS];
    let mut seen = Seen { during: Hist::new(), after: Hist::new(), late: Hist::new(), rss_mb: 0.0, killed: false };
    let mut random = Random::new();
    let mut due = sys::now();
    let (mut turn, mut looked, mut end, mut replies) = (0, due, None, Vec::new());
    loop {
        let now = sys::now();
        if now > looked + SECOND / 10 {
            looked = now;
            seen.rss_mb = seen.rss_mb.max(sys::rss_mb(target.pid));
            if seen.rss_mb > RSS_LIMIT_MB {
                seen.add_unanswered(&pool, &phases);
                seen.killed = true;
                sys::kill(target.pid);
                return Ok(seen);
            }
        }
        if shared.done.load(Ordering::SeqCst) {
            end.get_or_insert(now);
        }
        if end.is_some_and(|end| now > end + 10 * SECOND || !pool.connections.iter().any(|one| one.is_busy())) {
            seen.add_unanswered(&pool, &phases);
            return Ok(seen);
        }
        while due <= now && end.is_none() {
            let id = turn % CONNECTIONS;
            let (phase, key) = (shared.phase(), size.key(random.below(size.keys())));
            let asked = pool.connections[id].request(due, |driver, slot, out| {
                phases[id][slot as usize] = phase;
                driver.get(slot, &key, out);
            });
            if !asked {
                break;
            }
            if phase == Phase::During {
                seen.late.add(now - due);
                shared.gets.fetch_add(1, Ordering::SeqCst);
            }
            (turn, due) = (turn + 1, due + STEP);
        }
        for (id, connection) in pool.connections.iter_mut().enumerate() {
            connection.flush(&pool.epoll, id);
        }
        pool.turn_ns(due.saturating_sub(sys::now()).min(STEP), &mut |id, event| {
            if let Event::Reply { slot, .. } = event {
                replies.push((id, *slot));
            }
        })?;
        let now = sys::now();
        for (id, slot) in replies.drain(..) {
            let asked = pool.connections[id].replied(slot)?;
            if let Some(slot) = slot {
                seen.add(phases[id][slot as usize], now - asked);
            }
        }
        if pool.connections.iter().any(|connection| connection.dead) {
            return Err("a connection that gets was closed".into());
        }
    }
}
