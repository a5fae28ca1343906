//! How long other clients' gets wait while one client does something large: a million keys, a hundred subscribers of
//! all of them that read, and no process pinned to a processor.

mod actor;
mod gets;
mod readers;

use std::cmp;
use std::fmt::Write as _;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::thread;

use serde_json::Value;

use self::actor::Actor;
use self::gets::Shared;
use crate::goals::Bench;
use crate::load;
use crate::peers::{Peer, Running, Site};
use crate::pool::Target;
use crate::report::{Figures, Raw, Sample, with_unit};
use crate::session::{Options, Session};
use crate::{Result, sys};

/// What stands for it in the raw figures.
pub(crate) const GOAL: u32 = 14;

/// 99.9 % of the gets are answered by then.
const TARGET_US: f64 = 20_000.0;
const ROUNDS: usize = 3;
const VALUE: usize = 100;

/// How much there is of everything.
#[derive(Clone, Copy, Debug)]
struct Size {
    /// Keys of the three branches. The first can be got by one request.
    branches: [usize; 3],
    expiring: usize,
    /// Gets that are measured, at least.
    gets: u64,
}

impl Size {
    const FULL: Size = Size { branches: [300_000, 100_000, 600_000], expiring: 100_000, gets: 10_000 };
    const QUICK: Size = Size { branches: [20_000, 5_000, 5_000], expiring: 2_000, gets: 1_000 };

    fn keys(&self) -> usize {
        self.branches.iter().sum()
    }

    /// The numbers of a branch's keys.
    fn branch(&self, branch: usize) -> Range<usize> {
        let begin = self.branches[..branch].iter().sum();
        begin..begin + self.branches[branch]
    }

    /// The key of a number; in key order.
    fn key(&self, number: usize) -> String {
        let branch = (0..3).find(|branch| self.branch(*branch).contains(&number)).unwrap_or(2);
        format!("bench.{}.k{number:08}", ["a", "b", "c"][branch])
    }

    /// What the get of everything is answered: too large, unless this is a small run.
    fn status_of_all(&self) -> u64 {
        if self.keys() == Size::FULL.keys() { 413 } else { 200 }
    }
}

/// What one client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Large {
    DeleteAll,
    DeleteBesideStats,
    GetBranch,
    GetAll,
    List,
    Snapshot,
    Trace,
    Batch,
    GroupBatch,
    Expiry,
    Subscriptions,
}

impl Large {
    const ALL: [Large; 11] = [
        Large::DeleteAll,
        Large::DeleteBesideStats,
        Large::GetBranch,
        Large::GetAll,
        Large::List,
        Large::Snapshot,
        Large::Trace,
        Large::Batch,
        Large::GroupBatch,
        Large::Expiry,
        Large::Subscriptions,
    ];

    /// Stands in the raw figures: stable.
    fn name(self) -> &'static str {
        match self {
            Large::DeleteAll => "delete of all keys",
            Large::DeleteBesideStats => "delete of 100,000 keys, Stats polled",
            Large::GetBranch => "get of a branch that fits",
            Large::GetAll => "get of all keys, too large",
            Large::List => "list of all keys, in pages",
            Large::Snapshot => "snapshot of all keys",
            Large::Trace => "trace",
            Large::Batch => "4,096 puts of one connection",
            Large::GroupBatch => "4,096 puts of 64 connections",
            Large::Expiry => "expiry of 100,000 keys",
            Large::Subscriptions => "1,024 subscriptions begin and end",
        }
    }

    /// True if it uses up what it works on: then the keys are put again, without subscribers, before the next time.
    fn uses_up(self) -> bool {
        matches!(self, Large::DeleteAll | Large::DeleteBesideStats | Large::Expiry)
    }
}

/// Measures each of them in each round, and writes the raw figures.
pub(crate) fn measure(options: &Options, session: &mut Session) -> Result<()> {
    let size = if options.quick { Size::QUICK } else { Size::FULL };
    let wanted = |large: &Large| {
        options.only.as_ref().is_none_or(|only| only.iter().any(|part| large.name().contains(part.as_str())))
    };
    for round in 0..options.rounds(ROUNDS) {
        for large in Large::ALL.into_iter().filter(wanted) {
            let measured = run(large, size, &session.bench);
            let sample = Sample { goal: GOAL, work: large.name().to_owned(), peer: Peer::NkvSync, side: None, round };
            session.note(&sample, &measured)?;
        }
    }
    Ok(())
}

/// Measures on a server of its own.
fn run(large: Large, size: Size, bench: &Bench) -> Result<Figures> {
    let all = &bench.cpus[0];
    sys::pin(all)?;
    let site = Site { nkv: &bench.nkv, dir: &bench.dir, cpus: all };
    let running = Running::start(Peer::NkvSync, site)?;
    let target = running.target;
    let measured = at(target, large, size);
    let rss_peak_mb = sys::status(target.pid, "VmHWM") * 1024.0 / 1e6;
    running.stop()?;
    let mut figures = measured?;
    // A server that was killed has none of its own any more.
    let peak = figures.entry("rss_peak_mb").or_default();
    *peak = peak.max(rss_peak_mb);
    Ok(figures)
}

fn at(target: Target, large: Large, size: Size) -> Result<Figures> {
    let mut actor = Actor::new(target, large, size)?;
    load::settle(target);
    let shared = Shared::default();
    let (seen, acted) = thread::scope(|scope| {
        let gets = scope.spawn(|| {
            // What is measured is how long the server lets a get wait, not how long this thread waits for a processor.
            let _ = rustix::process::setpriority_process(None, -10);
            let seen = gets::gets(target, size, &shared);
            // From here on no gets are counted.
            shared.broken.store(true, Ordering::SeqCst);
            seen
        });
        let acted = actor.act(&shared);
        shared.done.store(true, Ordering::SeqCst);
        (gets.join().unwrap_or_else(|_| Err("the gets panicked".into())), acted)
    });
    let seen = seen?;
    let acted = if seen.killed { acted.unwrap_or_default() } else { acted? };
    let mut figures = Figures::from([
        ("gets", seen.during.count as f64),
        ("p50_us", seen.during.us(0.5)),
        ("p99_us", seen.during.us(0.99)),
        ("p999_us", seen.during.us(0.999)),
        ("max_us", seen.during.us(1.0)),
        ("after_gets", seen.after.count as f64),
        ("after_p999_us", seen.after.us(0.999)),
        ("after_max_us", seen.after.us(1.0)),
        ("own_late_p999_us", seen.late.us(0.999)),
        ("rss_peak_mb", seen.rss_mb),
        ("killed", f64::from(u8::from(seen.killed))),
    ]);
    if acted.times > 0 {
        figures.insert("times", acted.times as f64);
        figures.insert("each_us", acted.ns as f64 / 1e3 / acted.times as f64);
        figures.insert("subscribers_closed", acted.closed as f64);
    }
    Ok(figures)
}

/// The table, in Markdown: of each the round with the best p99.9. Then what failed, and what it was measured with.
pub(crate) fn table(raw: &Raw) -> String {
    let mut out = format!(
        "| one client: | gets of others | p50 | p99 | p99.9 | of each round | max | afterwards: p99.9 | max | it takes | \
         subscribers closed | peak memory | tool late: p99.9 | p99.9 ≤ {} |\n|-|-|-|-|-|-|-|-|-|-|-|-|-|-|\n",
        with_unit(TARGET_US, "us"),
    );
    for large in Large::ALL {
        let mut rounds: Vec<&Value> = raw.samples(GOAL).filter(|sample| sample["work"] == large.name()).collect();
        rounds.retain(|sample| sample.get("figures").is_some());
        let figure = |sample: &Value, name: &str| sample["figures"][name].as_f64().unwrap_or(0.0);
        let p999 = |sample: &Value| figure(sample, "p999_us");
        let order = |sample: &Value| [figure(sample, "killed"), p999(sample)];
        rounds.sort_by(|one, other| order(one).partial_cmp(&order(other)).unwrap_or(cmp::Ordering::Equal));
        let Some(best) = rounds.first() else { continue };
        let unit = |name: &str| with_unit(figure(best, name), name);
        let after = |name: &str| if figure(best, "after_gets") > 0.0 { unit(name) } else { String::new() };
        let killed = figure(best, "killed") > 0.0;
        let whole = |name: &str| if killed { "killed".to_owned() } else { unit(name) };
        let each = rounds.iter().map(|sample| with_unit(p999(sample), "us")).collect::<Vec<_>>().join(", ");
        let met = if p999(best) <= TARGET_US && !killed { "yes" } else { "**no**" };
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | **{}** | {each} | {} | {} | {} | {} | {} | {} | {} | {met} |",
            large.name(),
            unit("gets"),
            unit("p50_us"),
            unit("p99_us"),
            unit("p999_us"),
            unit("max_us"),
            after("after_p999_us"),
            after("after_max_us"),
            whole("each_us"),
            whole("subscribers_closed"),
            unit("rss_peak_mb"),
            unit("own_late_p999_us"),
        );
    }
    out + &raw.failures() + &raw.settings()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn keys_are_in_key_order_and_in_their_branches() {
        let size = Size { branches: [2, 1, 2], ..Size::QUICK };
        let keys: Vec<_> = (0..size.keys()).map(|number| size.key(number)).collect();
        assert!(keys.is_sorted(), "{keys:?}");
        assert_eq!(size.branch(1), 2..3);
        assert_eq!(keys[2], "bench.b.k00000002");
    }

    #[test]
    fn the_table_has_the_best_round_and_says_whether_the_target_is_met() {
        let sample = |work: Large, round: u32, p999: f64| {
            json!({
                "goal": GOAL, "work": work.name(), "peer": "nkv sync", "round": round,
                "figures": { "gets": 10_000.0, "p999_us": p999, "max_us": 2.0 * p999 },
            })
        };
        let raw = Raw::of(vec![
            sample(Large::List, 0, 30_000.0),
            sample(Large::List, 1, 19_000.0),
            sample(Large::Trace, 0, 21_000.0),
        ]);
        let table = table(&raw);
        let line = |name: &str| table.lines().find(|line| line.contains(name)).expect("it is there");
        assert!(line("list of all").contains("**19.00 ms** | 19.00 ms, 30.00 ms | 38.00 ms |"), "{table}");
        assert!(line("list of all").ends_with("| yes |"), "{table}");
        assert!(line("trace").ends_with("| **no** |"), "{table}");
    }
}
