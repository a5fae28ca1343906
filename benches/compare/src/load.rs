//! Puts and gets of keys at random, and what goes before them and on beside them.

use std::io;
use std::thread;
use std::time::Duration;

use crate::hist::Hist;
use crate::pool::{Keys, Pool, Target};
use crate::report::Figures;
use crate::sys;
use crate::{Result, drivers};

/// How requests are made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) put: bool,
    pub(crate) connections: usize,
    /// Requests under way on each.
    pub(crate) pipeline: usize,
    pub(crate) value: usize,
    pub(crate) keys: Keys,
}

/// For how long, in seconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) warm_up: f64,
    pub(crate) measured: f64,
}

/// Opens a connection, sets the server up if need be, and asks for one key.
///
/// # Errors
///
/// If the server is not there yet.
pub(crate) fn ask(target: Target, value: usize, set_up: bool, key: usize) -> Result<bool> {
    let mut pool = Pool::open(target, value, 1, 1)?;
    if set_up {
        pool.set_up()?;
    }
    let mut asked = false;
    let mut found = None;
    let next = &mut |_| (!std::mem::replace(&mut asked, true)).then_some((false, key));
    pool.drive(Keys::plain(key + 1), next, &mut |_, _, good| found = Some(good))?;
    found.ok_or_else(|| io::Error::from(io::ErrorKind::TimedOut).into())
}

/// Puts each key once; returns how many a second.
pub(crate) fn fill(target: Target, value: usize, keys: Keys) -> Result<f64> {
    let mut pool = Pool::open(target, value, 20, 16)?;
    let begin = sys::now();
    let mut numbers = 0..keys.count;
    let tally = pool.drive(keys, &mut |_| Some((true, numbers.next()?)), &mut |_, _, _| {})?;
    if tally.errors > 0 || tally.operations < keys.count as u64 {
        return Err(format!("{} of {} keys answered, {} errors", tally.operations, keys.count, tally.errors).into());
    }
    Ok(tally.operations as f64 / (sys::now() - begin) as f64 * 1e9)
}

/// Waits until a server is done with what filling left it to do, such as compaction; some seconds at most.
pub(crate) fn settle(target: Target) {
    const LOOK: Duration = Duration::from_millis(50);
    for _ in 0..100 {
        let before = target.cpu_s();
        thread::sleep(LOOK);
        if target.cpu_s() - before < LOOK.as_secs_f64() / 20.0 {
            return;
        }
    }
}

/// Overwrites keys at random, so many times.
pub(crate) fn churn(target: Target, value: usize, keys: Keys, times: usize) -> Result<()> {
    let mut pool = Pool::open(target, value, 20, 16)?;
    let mut random = Random::new();
    let mut left = 0..times;
    pool.drive(keys, &mut |_| left.next().map(|_| (true, random.below(keys.count))), &mut |_, _, _| {})?;
    Ok(())
}

/// Puts or gets keys at random.
pub(crate) fn run(target: Target, shape: Shape, span: Span) -> Result<Figures> {
    let mut pool = Pool::open(target, shape.value, shape.connections, shape.pipeline)?;
    let begin = sys::now() + (span.warm_up * 1e9) as u64;
    let end = begin + (span.measured * 1e9) as u64;
    let mut random = Random::new();
    let mut hist = Hist::new();
    let times = || [target.cpu_s(), sys::own_cpu_s(), sys::cpu_s(target.pid, Some("nkv-compact"))];
    let (mut at_begin, mut at_end) = (None, None);
    let tally = pool.drive(
        shape.keys,
        &mut |now| {
            if now >= begin && at_begin.is_none() {
                at_begin = Some(times());
            }
            if now >= end {
                at_end.get_or_insert_with(times);
                return None;
            }
            Some((shape.put, random.below(shape.keys.count)))
        },
        &mut |start, answered, _| {
            if answered >= begin && answered < end {
                hist.add(answered - start);
            }
        },
    )?;
    if tally.errors > 0 {
        return Err(format!("{} of {} requests failed", tally.errors, tally.operations).into());
    }
    let (from, to) = (at_begin.unwrap_or_default(), at_end.unwrap_or_default());
    Ok(Figures::from([
        ("per_s", hist.count as f64 / span.measured),
        ("p50_us", hist.us(0.5)),
        ("p99_us", hist.us(0.99)),
        ("p999_us", hist.us(0.999)),
        ("rss_mb", target.rss_mb()),
        ("server_cpu_s", to[0] - from[0]),
        ("own_cpu_s", to[1] - from[1]),
        ("compaction_cpu_s", to[2] - from[2]),
    ]))
}

/// Numbers that differ from run to run. (Marsaglia's xorshift.)
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new() -> Random {
        Random(sys::now() << 1 | 1)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit
    }
}

/// Holds subscriptions that have nothing to do with the load, `count` in all, a thousand to a connection.
pub(crate) fn subscribe_unrelated(target: Target, count: usize) -> Result<Pool> {
    const EACH: usize = 1_000;
    let mut pool = Pool::open(target, drivers::HEAD, count.div_ceil(EACH), 1)?;
    for id in 0..pool.connections.len() {
        for n in 0..EACH.min(count - id * EACH) {
            // One at a time: `ready` does not count.
            pool.subscribe(id, &format!("elsewhere.c{id}.k{n}"))?;
        }
    }
    Ok(pool)
}

/// Subscribes to the first key of `keys`, and never reads what comes.
pub(crate) fn subscribe_and_stall(target: Target, keys: Keys) -> Result<Pool> {
    let mut pool = Pool::open(target, drivers::HEAD, 1, 1)?;
    rustix::net::sockopt::set_socket_recv_buffer_size(pool.connections[0].socket(), 4096)?;
    pool.subscribe(0, &keys.key(0))?;
    Ok(pool)
}
