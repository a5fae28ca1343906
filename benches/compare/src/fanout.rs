//! One writer and many subscribers of one key: how long a change takes, how many arrive, and whether the last one does.

use crate::Result;
use crate::drivers::Event;
use crate::hist::Hist;
use crate::load::Span;
use crate::pool::{Pool, Target};
use crate::report::Figures;
use crate::sys::{self, SECOND};

const KEY: &str = "bench.fan";
/// Puts under way, at most.
const PIPELINE: usize = 16;
/// What comes behind the last value is looked at for so long.
const QUIET: u64 = SECOND / 5;
/// The last value must have come by then.
const PATIENCE: u64 = 8 * SECOND;

/// What the subscribers saw.
#[derive(Debug)]
struct Seen {
    latencies: Hist,
    /// By connection: the highest sequence number, and the one seen last.
    highest: Vec<u64>,
    current: Vec<u64>,
    unreadable: u64,
    out_of_order: u64,
    last_at: u64,
}

impl Seen {
    fn new(connections: usize) -> Seen {
        Seen {
            latencies: Hist::new(),
            highest: vec![0; connections],
            current: vec![0; connections],
            unreadable: 0,
            out_of_order: 0,
            last_at: 0,
        }
    }

    fn note(&mut self, id: usize, event: &Event, now: u64) {
        match *event {
            // A value from before the run has no sequence number.
            Event::Update { at, seq } if seq > 0 => {
                self.latencies.add(now.saturating_sub(at));
                self.out_of_order += u64::from(seq <= self.highest[id]);
                self.highest[id] = self.highest[id].max(seq);
                self.current[id] = seq;
                self.last_at = now;
            }
            Event::BadUpdate => self.unreadable += 1,
            _ => {}
        }
    }
}

/// `rate`: puts a second; without one, as many as go.
pub(crate) fn run(target: Target, value: usize, subscribers: usize, rate: Option<u64>, span: Span) -> Result<Figures> {
    let mut pool = subscribed(target, value, subscribers)?;
    let mut seen = Seen::new(subscribers + 1);
    let mut acknowledged = Hist::new();
    let (mut seq, mut errors) = (0, 0);
    let begin = sys::now();
    let end = begin + (span.measured * 1e9) as u64;
    let warm = begin + (span.warm_up * 1e9) as u64;
    let step = rate.map(|rate| SECOND / rate);
    let cpu = [target.cpu_s(), sys::own_cpu_s()];
    let (mut rss_begin, mut at_end, mut quiet_since) = (None, None, end);
    loop {
        let now = sys::now();
        if now >= warm && rss_begin.is_none() {
            rss_begin = Some(target.rss_mb());
        }
        if now < end {
            let due = step.map_or(u64::MAX, |step| (now - begin) / step + 1);
            write(&mut pool, due, &mut seq);
        } else {
            at_end.get_or_insert_with(|| (target.rss_mb(), target.cpu_s() - cpu[0], sys::own_cpu_s() - cpu[1]));
            if pool.connections[0].is_busy() || seen.highest[1..].iter().any(|highest| *highest < seq) {
                quiet_since = now;
            }
            if now > quiet_since + QUIET || now > end + PATIENCE {
                break;
            }
        }
        let ms = match step {
            Some(step) if now < end => (begin + seq * step).saturating_sub(now) / 1_000_000,
            _ => 10,
        };
        let mut replies = Vec::new();
        pool.turn(ms.min(10), &mut |id, event| match event {
            Event::Reply { slot, good } if id == 0 => replies.push((*slot, *good)),
            event if id > 0 => seen.note(id, event, sys::now()),
            _ => {}
        })?;
        let now = sys::now();
        for (slot, good) in replies {
            acknowledged.add(now - pool.connections[0].replied(slot)?);
            errors += u64::from(!good);
        }
    }
    let dead = pool.connections.iter().filter(|connection| connection.dead).count();
    if errors + seen.unreadable > 0 || dead > 0 {
        return Err(format!("{errors} errors, {} unreadable, {dead} connections closed", seen.unreadable).into());
    }
    let (rss, server_cpu, own_cpu) = at_end.unwrap_or_default();
    let latest = seen.current[1..].iter().filter(|current| **current == seq).count();
    let delivered = seen.latencies.count as f64;
    let taken = (seen.last_at.max(end) - begin) as f64 / 1e9;
    Ok(Figures::from([
        ("puts_per_s", acknowledged.count as f64 / span.measured),
        ("delivered_per_s", delivered / taken),
        ("delivered_share", delivered / (seq * subscribers as u64).max(1) as f64),
        ("p50_us", seen.latencies.us(0.5)),
        ("p99_us", seen.latencies.us(0.99)),
        ("p999_us", seen.latencies.us(0.999)),
        ("put_p50_us", acknowledged.us(0.5)),
        ("put_p99_us", acknowledged.us(0.99)),
        ("latest_share", latest as f64 / subscribers as f64),
        ("out_of_order", seen.out_of_order as f64),
        ("rss_begin_mb", rss_begin.unwrap_or(rss)),
        ("rss_end_mb", rss),
        ("rss_growth_mb", rss - rss_begin.unwrap_or(rss)),
        ("server_cpu_s", server_cpu),
        ("own_cpu_s", own_cpu),
    ]))
}

/// A writer, and behind it the subscribers of a key that exists.
fn subscribed(target: Target, value: usize, subscribers: usize) -> Result<Pool> {
    let mut pool = Pool::open(target, value, 1, PIPELINE)?;
    let writer = &mut pool.connections[0];
    writer.request(0, |driver, slot, out| driver.publish(slot, KEY, 0, 0, out));
    writer.flush(&pool.epoll, 0);
    let mut reply = None;
    let limit = sys::now() + PATIENCE;
    while reply.is_none() && sys::now() < limit {
        pool.turn(10, &mut |_, event| {
            if let Event::Reply { slot, .. } = event {
                reply = Some(*slot);
            }
        })?;
    }
    pool.connections[0].replied(reply.ok_or("the first put was not answered")?)?;
    pool.add(subscribers, 1)?;
    pool.subscribe_others(KEY)?;
    // Some servers send the present value first: it comes now.
    let settled = sys::now() + SECOND / 4;
    while sys::now() < settled {
        pool.turn(10, &mut |_, _| {})?;
    }
    Ok(pool)
}

/// Writes puts until `due` were written or as many are under way as may be.
fn write(pool: &mut Pool, due: u64, seq: &mut u64) {
    let writer = &mut pool.connections[0];
    while *seq < due && !writer.free.is_empty() {
        *seq += 1;
        let now = sys::now();
        writer.request(now, |driver, slot, out| driver.publish(slot, KEY, now, *seq, out));
    }
    writer.flush(&pool.epoll, 0);
}
