//! The client that does something large, and what it needs for that.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::gets::{Phase, Shared};
use super::readers::Readers;
use super::{Large, Size, VALUE};
use crate::Result;
use crate::load::Random;
use crate::pool::Target;
use crate::sys::{self, SECOND};
use crate::wire::Wire;

/// Writes sent at once.
const BATCH: usize = 4_096;
/// Connections that a batch is shared by.
const GROUP: usize = 64;
const SUBSCRIPTIONS: usize = 1_024;
/// Keys of an answer to `List`, at most.
const PAGE: usize = 10_000;

/// One run is over then, with however many gets.
const LIMIT: u64 = 120 * SECOND;

/// What was done.
#[derive(Debug, Default)]
pub(super) struct Acted {
    pub(super) times: u64,
    /// All of them together.
    pub(super) ns: u64,
    /// Subscribers that the server closed meanwhile.
    pub(super) closed: usize,
}

/// The client that does something large.
#[derive(Debug)]
pub(super) struct Actor {
    target: Target,
    large: Large,
    size: Size,
    wire: Wire,
    /// How long it takes to put a key.
    key_ns: u64,
}

impl Actor {
    /// Puts all keys.
    pub(super) fn new(target: Target, large: Large, size: Size) -> Result<Actor> {
        let key_ns = fill(target, size, 0..size.keys())? / size.keys() as u64;
        Ok(Actor { target, large, size, wire: Wire::connect(target.addr)?, key_ns })
    }

    /// Does it until enough gets have fallen into it.
    pub(super) fn act(&mut self, shared: &Shared) -> Result<Acted> {
        let begin = sys::now();
        let mut acted = Acted::default();
        loop {
            let at = self.prepare(acted.times == 0)?;
            let mut stage = Stage::set(self.target, self.large, self.size)?;
            let readers = Readers::start(self.target)?;
            sleep_until(sys::now() + SECOND / 2);
            if let Some(at) = at {
                if sys::now() > at {
                    return Err("the keys expired before all of them were put".into());
                }
                sleep_until(at);
            }
            loop {
                shared.enter(Phase::During);
                let from = sys::now();
                self.once(&mut stage)?;
                acted.times += 1;
                acted.ns += sys::now() - from;
                let enough = shared.gets.load(Ordering::SeqCst) >= self.size.gets;
                if self.large.uses_up() || enough || self.is_over(begin, shared) {
                    break;
                }
            }
            shared.enter(Phase::After);
            readers.wait_until_quiet();
            shared.enter(Phase::Between);
            acted.closed += readers.stop()?;
            if shared.gets.load(Ordering::SeqCst) >= self.size.gets || self.is_over(begin, shared) {
                return Ok(acted);
            }
        }
    }

    fn is_over(&self, begin: u64, shared: &Shared) -> bool {
        sys::now() > begin + LIMIT || shared.broken.load(Ordering::SeqCst)
    }

    /// Puts what is needed; returns when it expires.
    fn prepare(&mut self, first: bool) -> Result<Option<u64>> {
        match self.large {
            Large::DeleteAll if !first => _ = fill(self.target, self.size, 0..self.size.keys())?,
            Large::DeleteBesideStats if !first => _ = fill(self.target, self.size, self.size.branch(1))?,
            Large::Expiry => {
                let keys = self.size.expiring as u64;
                let at = sys::now() + 3 * SECOND + 2 * keys * self.key_ns;
                let put = |number: usize, out: &mut Vec<u8>| {
                    let ttl_ms = at.saturating_sub(sys::now()) / 1_000_000;
                    write_put(&format!("soon.k{number:08}"), Some(ttl_ms), out);
                };
                put_all(&mut self.wire, 0..self.size.expiring, put)?;
                return Ok(Some(at));
            }
            _ => {}
        }
        Ok(None)
    }

    fn once(&mut self, stage: &mut Stage) -> Result<()> {
        let addr = self.target.addr;
        match self.large {
            Large::DeleteAll => self.wire.expect(200, r#"{"type":"Delete","key":"*"}"#),
            Large::DeleteBesideStats => self.delete_beside_stats(),
            Large::GetBranch => self.wire.expect(200, r#"{"type":"Get","key":"bench.a.*"}"#),
            Large::GetAll => self.wire.expect(self.size.status_of_all(), r#"{"type":"Get","key":"*"}"#),
            Large::List => self.list(),
            Large::Snapshot => {
                let mut wire = Wire::connect(addr)?;
                wire.send(b"{\"type\":\"Subscribe\",\"key\":\"*\",\"snapshot\":true}\n")?;
                while !wire.message()?.starts_with(b"{\"Synced\"") {}
                Ok(())
            }
            Large::Trace => self.wire.expect(200, &format!("{{\"type\":\"Trace\",\"key\":\"{}\"}}", self.size.key(0))),
            Large::Batch => self.wire.batch(stage.next(), BATCH),
            Large::GroupBatch => stage.group(),
            Large::Expiry => {
                let limit = sys::now() + LIMIT;
                while self.wire.ask(r#"{"type":"Exists","key":"soon.*"}"#)? == 200 {
                    if sys::now() > limit {
                        return Err("the keys do not expire".into());
                    }
                    thread::sleep(Duration::from_millis(5));
                }
                Ok(())
            }
            Large::Subscriptions => {
                let mut wire = Wire::connect(addr)?;
                wire.send(stage.next())?;
                (0..SUBSCRIPTIONS).try_for_each(|_| match wire.message()? {
                    b"\"Hello\"" => Ok(()),
                    _ => Err(String::from_utf8_lossy(wire.last()).into()),
                })
            }
        }
    }

    fn delete_beside_stats(&mut self) -> Result<()> {
        let done = AtomicBool::new(false);
        let mut polling = Wire::connect(self.target.addr)?;
        thread::scope(|scope| {
            let polls = scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    polling.expect(200, r#"{"type":"Stats"}"#)?;
                }
                Ok(())
            });
            let deleted = self.wire.expect(200, r#"{"type":"Delete","key":"bench.b.*"}"#);
            done.store(true, Ordering::SeqCst);
            deleted.and(polls.join().unwrap_or_else(|_| Err("the polls panicked".into())))
        })
    }

    fn list(&mut self) -> Result<()> {
        for page in 0..self.size.keys().div_ceil(PAGE) {
            let after = if page == 0 { String::new() } else { self.size.key(page * PAGE - 1) };
            let request = format!("{{\"type\":\"List\",\"key\":\"*\",\"limit\":{PAGE},\"after\":\"{after}\"}}");
            self.wire.expect(200, &request)?;
        }
        Ok(())
    }
}

/// Requests that are written before they are needed, and the connections that send them.
#[derive(Debug)]
struct Stage {
    requests: Vec<Vec<u8>>,
    turn: usize,
    group: Vec<Wire>,
}

impl Stage {
    /// Several different ones, taken in turn.
    const REQUESTS: usize = 8;

    fn set(target: Target, large: Large, size: Size) -> Result<Stage> {
        let mut random = Random::new();
        let mut requests = |count: usize, each: usize, write: &dyn Fn(usize, usize, &mut Vec<u8>)| {
            let mut request = |_| {
                let mut out = Vec::new();
                (0..each).for_each(|n| write(n, random.below(size.keys()), &mut out));
                out
            };
            (0..count).map(&mut request).collect::<Vec<_>>()
        };
        let put = |_: usize, number: usize, out: &mut Vec<u8>| write_put(&size.key(number), None, out);
        let (requests, group) = match large {
            Large::Batch => (requests(Stage::REQUESTS, BATCH, &put), 0),
            Large::GroupBatch => (requests(Stage::REQUESTS * GROUP, BATCH / GROUP, &put), GROUP),
            Large::Subscriptions => {
                let subscribe = |n: usize, _: usize, out: &mut Vec<u8>| {
                    let line = format!("{{\"type\":\"Subscribe\",\"key\":\"{}\"}}\n", size.key(n));
                    out.extend_from_slice(line.as_bytes());
                };
                (requests(1, SUBSCRIPTIONS, &subscribe), 0)
            }
            _ => (Vec::new(), 0),
        };
        let group = (0..group).map(|_| Wire::connect(target.addr)).collect::<Result<_>>()?;
        Ok(Stage { requests, turn: 0, group })
    }

    fn next(&mut self) -> &[u8] {
        self.turn += 1;
        &self.requests[self.turn % self.requests.len()]
    }

    /// All connections write before any of them waits for its answers.
    fn group(&mut self) -> Result<()> {
        for wire in &mut self.group {
            self.turn += 1;
            wire.send(&self.requests[self.turn % self.requests.len()])?;
        }
        self.group.iter_mut().try_for_each(|wire| wire.answers(BATCH / GROUP))
    }
}

/// Puts keys by their numbers; returns how long that took.
fn fill(target: Target, size: Size, numbers: Range<usize>) -> Result<u64> {
    let begin = sys::now();
    let mut wire = Wire::connect(target.addr)?;
    put_all(&mut wire, numbers, |number, out| write_put(&size.key(number), None, out))?;
    Ok(sys::now() - begin)
}

fn put_all(wire: &mut Wire, numbers: Range<usize>, write: impl Fn(usize, &mut Vec<u8>)) -> Result<()> {
    let mut requests = Vec::new();
    for from in numbers.clone().step_by(BATCH) {
        let part = from..numbers.end.min(from + BATCH);
        requests.clear();
        part.clone().for_each(|number| write(number, &mut requests));
        wire.batch(&requests, part.len())?;
    }
    Ok(())
}

fn write_put(key: &str, ttl_ms: Option<u64>, out: &mut Vec<u8>) {
    let ttl = ttl_ms.map_or(String::new(), |ms| format!(",\"ttl_ms\":{}", ms.max(1)));
    out.extend_from_slice(format!("{{\"type\":\"Put\",\"key\":\"{key}\",\"len\":{VALUE}{ttl}}}\n").as_bytes());
    out.extend_from_slice(&[b'v'; VALUE]);
    out.push(b'\n');
}

fn sleep_until(at: u64) {
    thread::sleep(Duration::from_nanos(at.saturating_sub(sys::now())));
}
