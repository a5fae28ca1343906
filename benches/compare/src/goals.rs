//! The goals: what is measured, and what is compared with what. The list of lines is the only place that says so.

use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use rustix::thread::CpuSet;

use crate::footprint::Settle;
use crate::load::{self, Shape, Span};
use crate::peers::{Peer, Running, Site};
use crate::pool::{Depth, Keys};
use crate::report::Figures;
use crate::{Result, fanout, footprint, watches};

/// Bytes of a value, unless said otherwise.
const VALUE: usize = 100;
/// Keys, unless said otherwise.
const KEYS: usize = 1_000;

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Work {
    Load {
        shape: Shape,
        around: Around,
    },
    /// One writer; `rate` puts a second, or as many as go.
    FanOut {
        subscribers: usize,
        rate: Option<u64>,
    },
    Footprint,
    /// From the start to the first answer, with `keys` stored, each overwritten `overwritten` times before.
    Start {
        keys: usize,
        overwritten: usize,
    },
    /// Subscriptions on two servers in front of one engine.
    Watches {
        subscriptions: usize,
    },
}

/// What goes on beside a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Around {
    Nothing,
    /// Subscriptions to other keys.
    Unrelated(usize),
    /// A subscriber that never reads.
    Stalled,
    /// So many overwritings before, so that the log is as long as it gets, and is compacted.
    Churned(usize),
}

/// How one figure is had: a measurement of one server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cell {
    pub(crate) work: Work,
    pub(crate) peer: Peer,
}

/// What must hold.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bound {
    /// The ratio of our figure to the (best) rival's.
    AtLeast(f64),
    AtMost(f64),
    /// Our figure less the (best) rival's.
    AddsAtMost(f64),
    /// Our figure itself.
    Below(f64),
    Above(f64),
    /// For the reader.
    None,
}

/// A line of the table.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) goal: u32,
    pub(crate) figure: &'static str,
    pub(crate) ours: Cell,
    pub(crate) theirs: Vec<Cell>,
    pub(crate) bound: Bound,
}

impl Work {
    /// Stands in the raw figures: stable, and another one for other work.
    pub(crate) fn name(&self) -> String {
        match self {
            Work::Load { shape, around } => {
                let kind = if shape.put { "put" } else { "get" };
                let mut name = format!("{kind} {}x{}", shape.connections, shape.pipeline);
                if shape.value != VALUE {
                    name += &format!(", {} B", shape.value);
                }
                if shape.keys.count == 1 {
                    name += ", one key";
                } else if shape.keys.count != KEYS {
                    name += &format!(", {} keys", shape.keys.count);
                }
                if let Depth::Segments(depth) = shape.keys.depth {
                    name += &format!(", depth {depth}");
                }
                name + &match around {
                    Around::Nothing => String::new(),
                    Around::Unrelated(count) => format!(", {count} other subscriptions"),
                    Around::Stalled => ", a stalled subscriber".to_owned(),
                    Around::Churned(_) => ", compaction".to_owned(),
                }
            }
            Work::FanOut { subscribers, rate: Some(rate) } => format!("fan-out to {subscribers}, {rate} puts/s"),
            Work::FanOut { subscribers, rate: None } => format!("flood to {subscribers}"),
            Work::Footprint => "footprint".to_owned(),
            Work::Start { keys, overwritten: 0 } => format!("start, {keys} keys"),
            Work::Start { keys, overwritten } => format!("start, {keys} keys, overwritten {overwritten} times"),
            Work::Watches { subscriptions } => format!("{subscriptions} subscriptions on two nodes"),
        }
    }
}

/// Connections, and requests under way on each.
fn load(put: bool, connections: usize, pipeline: usize) -> Work {
    let shape = Shape { put, connections, pipeline, value: VALUE, keys: Keys::plain(KEYS) };
    Work::Load { shape, around: Around::Nothing }
}

fn get(connections: usize, pipeline: usize) -> Work {
    load(false, connections, pipeline)
}

fn put(connections: usize, pipeline: usize) -> Work {
    load(true, connections, pipeline)
}

impl Work {
    pub(crate) fn of(self, value: usize) -> Work {
        self.with(|shape, _| shape.value = value)
    }

    pub(crate) fn keys(self, count: usize) -> Work {
        self.with(|shape, _| shape.keys.count = count)
    }

    pub(crate) fn depth(self, depth: usize) -> Work {
        self.with(|shape, _| shape.keys.depth = Depth::Segments(depth))
    }

    pub(crate) fn beside(self, beside: Around) -> Work {
        self.with(|_, around| *around = beside)
    }

    fn with(mut self, change: impl FnOnce(&mut Shape, &mut Around)) -> Work {
        if let Work::Load { shape, around } = &mut self {
            change(shape, around);
        }
        self
    }
}

/// A line that compares servers at the same work.
fn rivals(goal: u32, figure: &'static str, work: Work, ours: Peer, theirs: &[Peer], bound: Bound) -> Line {
    let theirs = theirs.iter().map(|peer| Cell { work, peer: *peer }).collect();
    Line { goal, figure, ours: Cell { work, peer: ours }, theirs, bound }
}

/// A line that compares nkv with itself at other work.
fn itself(goal: u32, figure: &'static str, work: Work, other: Work, bound: Bound) -> Line {
    let cell = |work| Cell { work, peer: Peer::NkvSync };
    Line { goal, figure, ours: cell(work), theirs: vec![cell(other)], bound }
}

const PACED: Work = Work::FanOut { subscribers: 500, rate: Some(100) };
const FLOOD: Work = Work::FanOut { subscribers: 500, rate: None };
const START: Work = Work::Start { keys: 100_000, overwritten: 0 };

/// Every line of the table, by goal.
pub(crate) fn lines() -> Vec<Line> {
    [requests(), subscriptions(), growth_goals(), footprints(), tails(), unpinned(), http(), grpc(), engines()].concat()
}

fn requests() -> Vec<Line> {
    use Bound::*;
    use Peer::*;
    let big = 16 << 10;
    vec![
        rivals(1, "per_s", get(50, 1), NkvSync, &[RedisNone], AtLeast(1.0)),
        rivals(1, "per_s", get(50, 1), NkvSync, &[Echo], AtLeast(0.85)),
        rivals(2, "per_s", put(50, 1), NkvSync, &[RedisAlways], AtLeast(1.3)),
        rivals(2, "per_s", put(50, 1), NkvSync, &[Etcd], AtLeast(8.0)),
        rivals(3, "p50_us", put(1, 1), NkvSync, &[RedisAlways], AtMost(0.95)),
        rivals(3, "p99_us", put(1, 1), NkvSync, &[RedisAlways], AtMost(1.0)),
        rivals(4, "per_s", put(50, 1), NkvOs, &[RedisEverysec], AtLeast(1.0)),
        rivals(5, "per_s", get(50, 16), NkvSync, &[RedisNone], AtLeast(1.0)),
        rivals(5, "per_s", put(50, 16), NkvSync, &[RedisAlways], AtLeast(1.5)),
        rivals(6, "per_s", get(50, 1).of(big), NkvSync, &[RedisNone], AtLeast(1.0)),
        rivals(6, "per_s", put(50, 1).of(big), NkvOs, &[RedisEverysec], AtLeast(1.0)),
    ]
}

fn subscriptions() -> Vec<Line> {
    use Bound::*;
    use Peer::*;
    let mut lines = Vec::new();
    for figure in ["p50_us", "p99_us"] {
        lines.push(rivals(7, figure, PACED, NkvMemory, &[RedisNone], AtMost(1.0)));
        lines.push(rivals(7, figure, PACED, NkvMemory, &[Echo], AtMost(1.15)));
        lines.push(rivals(7, figure, PACED, NkvSync, &[RedisAlways], None));
    }
    for subscribers in [100, 500] {
        let flood = Work::FanOut { subscribers, rate: Option::None };
        lines.push(rivals(8, "delivered_per_s", flood, NkvMemory, &[RedisNone], AtLeast(1.2)));
        lines.push(rivals(8, "puts_per_s", flood, NkvMemory, &[RedisNone], None));
        lines.push(rivals(8, "latest_share", flood, NkvMemory, &[RedisNone], Above(1.0)));
        lines.push(rivals(8, "rss_begin_mb", flood, NkvMemory, &[RedisNone], None));
        lines.push(rivals(8, "rss_growth_mb", flood, NkvMemory, &[RedisNone], Below(2.0)));
    }
    lines
}

fn growth_goals() -> Vec<Line> {
    use Bound::AtLeast;
    let mut lines = Vec::new();
    for work in [get(50, 1), put(50, 1)] {
        let others = work.beside(Around::Unrelated(10_000));
        lines.push(itself(9, "per_s", work.keys(1_000_000), work, AtLeast(0.85)));
        lines.push(itself(9, "per_s", others, work, AtLeast(0.95)));
        lines.push(itself(9, "per_s", work.depth(8), work.depth(1), AtLeast(0.85)));
    }
    lines
}

fn footprints() -> Vec<Line> {
    use Bound::*;
    use Peer::*;
    let cores = thread::available_parallelism().map_or(1, usize::from) as f64;
    let figures = [
        ("rss_mb", 4.0),
        ("idle_connections_mb", 2.0),
        ("keys_mb", 18.0),
        ("program_mb", 4.0),
        ("threads", cores + 3.0),
        ("idle_cpu_percent", 0.1),
    ];
    let line = |(figure, bound)| rivals(10, figure, Work::Footprint, NkvSync, &[RedisAlways, Nats, Etcd], Below(bound));
    figures.into_iter().map(line).collect()
}

fn tails() -> Vec<Line> {
    use Bound::*;
    use Peer::*;
    let (stalled, one) = (put(50, 1).keys(1).beside(Around::Stalled), put(50, 1).keys(1));
    let compacted = put(50, 1).keys(100_000).beside(Around::Churned(500_000));
    vec![
        rivals(11, "first_answer_s", START, NkvSync, &[RedisAlways], AtMost(0.5)),
        rivals(11, "first_answer_s", Work::Start { keys: 1_000_000, overwritten: 0 }, NkvSync, &[], Below(1.0)),
        itself(12, "p99_us", compacted, put(50, 1), AtMost(1.5)),
        itself(12, "compaction_cpu_s", compacted, put(50, 1), None),
        itself(12, "p99_us", stalled, one, AtMost(1.1)),
    ]
}

fn unpinned() -> Vec<Line> {
    use Bound::AtLeast;
    use Peer::*;
    vec![
        rivals(UNPINNED, "per_s", get(50, 1), NkvSync, &[RedisNone, Nats, Etcd], AtLeast(1.0)),
        rivals(UNPINNED, "per_s", put(50, 1), NkvSync, &[RedisAlways, Etcd], AtLeast(1.0)),
        rivals(UNPINNED, "per_s", put(50, 1), NkvOs, &[RedisEverysec, Nats], AtLeast(1.0)),
    ]
}

/// The HTTP door beside a server that only answers, and beside the door for JSON lines.
fn http() -> Vec<Line> {
    use Bound::{AtLeast, AtMost};
    use Peer::*;
    let mut lines = vec![
        rivals(16, "per_s", get(50, 1), NkvHttp, &[HttpEcho], AtLeast(0.8)),
        rivals(16, "per_s", put(50, 1), NkvHttp, &[HttpEcho], AtLeast(0.8)),
        rivals(16, "per_s", put(50, 1), NkvHttpSync, &[NkvSync], Bound::None),
        rivals(16, "per_s", get(50, 1), NkvHttpSync, &[EtcdGateway], Bound::None),
        rivals(16, "per_s", put(50, 1), NkvHttpSync, &[EtcdGateway], Bound::None),
    ];
    for peer in [NkvHttp, NkvWs] {
        lines.push(rivals(16, "p50_us", PACED, peer, &[NkvMemory], AtMost(1.3)));
        lines.push(rivals(16, "p99_us", PACED, peer, &[NkvMemory], Bound::None));
        lines.push(rivals(16, "rss_begin_mb", PACED, peer, &[NkvMemory], Bound::None));
    }
    lines
}

/// The gRPC door beside a server that only answers, and beside etcd. It needs a build with `--features full`.
fn grpc() -> Vec<Line> {
    use Bound::AtLeast;
    use Peer::*;
    vec![
        rivals(15, "per_s", get(50, 1), NkvGrpc, &[GrpcEcho], AtLeast(0.85)),
        rivals(15, "per_s", put(50, 1), NkvGrpc, &[GrpcEcho], AtLeast(0.85)),
        rivals(15, "per_s", put(50, 1), NkvGrpcSync, &[Etcd], AtLeast(3.0)),
        rivals(15, "p50_us", PACED, NkvGrpc, &[Etcd], Bound::None),
        rivals(15, "p99_us", PACED, NkvGrpc, &[Etcd], Bound::None),
        rivals(15, "rss_begin_mb", PACED, NkvGrpc, &[Etcd], Bound::None),
    ]
}

/// nkv in front of an engine beside the engine by itself. It needs a build with `--features full`.
fn engines() -> Vec<Line> {
    use Bound::*;
    use Peer::*;
    let mut lines = Vec::new();
    for (ours, engine) in [(NkvEtcd, Etcd), (NkvNats, Nats)] {
        let beside = |figure, work, bound| rivals(ENGINES, figure, work, ours, &[engine], bound);
        let alone = |figure, work, bound| rivals(ENGINES, figure, work, ours, &[], bound);
        lines.extend([
            beside("p50_us", put(1, 1), AddsAtMost(300.0)),
            beside("per_s", put(50, 1), AtLeast(0.7)),
            alone("first_answer_s", START, Below(2.0)),
            alone("first_answer_s", Work::Start { keys: 100_000, overwritten: 50 }, Below(2.0)),
            rivals(ENGINES, "rss_mb", START, ours, &[NkvSync], None),
            rivals(ENGINES, "keys_mb", Work::Footprint, ours, &[NkvSync], AtMost(1.1)),
        ]);
        for figure in ["p50_us", "p99_us", "rss_end_mb", "server_cpu_s"] {
            lines.push(beside(figure, PACED, None));
        }
        for figure in ["delivered_per_s", "puts_per_s", "p50_us", "p99_us", "latest_share", "rss_end_mb"] {
            lines.push(beside(figure, FLOOD, if figure == "delivered_per_s" { AtLeast(2.0) } else { None }));
        }
        let many = Work::Watches { subscriptions: 10_000 };
        lines.extend([
            alone("watches", many, Below(2.0)),
            alone("delivered_share", many, Above(1.0)),
            alone("p50_us", many, None),
            alone("p99_us", many, None),
            alone("nodes_mb", many, None),
            alone("engine_mb", many, None),
        ]);
    }
    lines
}

/// The goal whose servers and load have all processors.
pub(crate) const UNPINNED: u32 = 13;

/// The goal of engines, which is measured only where it is asked for. Its servers and load have all processors too.
pub(crate) const ENGINES: u32 = 17;

/// Servers side by side at one work, for the picture; nkv is the first.
#[derive(Clone, Debug)]
pub(crate) struct Picture {
    pub(crate) title: &'static str,
    pub(crate) goal: u32,
    pub(crate) figure: &'static str,
    pub(crate) cells: Vec<Cell>,
}

/// What the picture shows, all of it measured for a goal.
pub(crate) fn pictures() -> Vec<Picture> {
    use Peer::*;
    let picture = |title, goal, figure, work, peers: &[Peer]| Picture {
        title,
        goal,
        figure,
        cells: peers.iter().map(|peer| Cell { work, peer: *peer }).collect(),
    };
    let everybody = [NkvSync, RedisAlways, Nats, Etcd];
    vec![
        picture("Get, 50 connections", UNPINNED, "per_s", get(50, 1), &[NkvSync, RedisNone, Nats, Etcd]),
        picture("Put, on the disk when answered", UNPINNED, "per_s", put(50, 1), &[NkvSync, RedisAlways, Etcd]),
        picture("Put, the disk follows", UNPINNED, "per_s", put(50, 1), &[NkvOs, RedisEverysec, Nats]),
        picture("Put on the disk, 16 at a time", 5, "per_s", put(50, 16), &[NkvSync, RedisAlways]),
        picture("Change to 500 subscribers, median", 7, "p50_us", PACED, &[NkvMemory, RedisNone, Echo]),
        picture("Start to first answer, 100,000 keys", 11, "first_answer_s", START, &[NkvSync, RedisAlways]),
        picture("Memory at rest", 10, "rss_mb", Work::Footprint, &everybody),
        picture("Memory for 100,000 keys of 100 B", 10, "keys_mb", Work::Footprint, &everybody),
        picture("Memory for 500 idle connections", 10, "idle_connections_mb", Work::Footprint, &everybody),
        picture("Size of the program", 10, "program_mb", Work::Footprint, &everybody),
    ]
}

/// A panel of the growth: how one thing changes with another. Several lines, each of points.
#[derive(Clone, Debug)]
pub(crate) struct Panel {
    pub(crate) title: &'static str,
    pub(crate) x: &'static str,
    pub(crate) series: Vec<Series>,
}

#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) name: &'static str,
    pub(crate) figure: &'static str,
    pub(crate) points: Vec<(usize, Cell)>,
}

/// What stands for goal 0: how cost grows.
pub(crate) fn panels() -> Vec<Panel> {
    let series = |name, work: &dyn Fn(usize) -> Work, peer, points: &[usize]| Series {
        name,
        figure: "per_s",
        points: points.iter().map(|x| (*x, Cell { work: work(*x), peer })).collect(),
    };
    // Pipelined, and without a disk's sync: the processor's share is largest, and so is what would grow.
    let both = |title, x, points: &[usize], work: &dyn Fn(Work, usize) -> Work| Panel {
        title,
        x,
        series: vec![
            series("get", &|x| work(get(50, 16), x), Peer::NkvOs, points),
            series("put", &|x| work(put(50, 16), x), Peer::NkvOs, points),
        ],
    };
    let others = |work: Work, count: usize| if count == 0 { work } else { work.beside(Around::Unrelated(count)) };
    vec![
        both("Requests by keys in the store", "keys", &[1_000, 10_000, 100_000, 1_000_000], &Work::keys),
        both("Requests by subscriptions to other keys", "subscriptions", &[1, 100, 1_000, 10_000], &others),
        both("Requests by segments of the key", "segments", &[1, 2, 4, 8, 16], &Work::depth),
        both("Requests by bytes of the value", "bytes", &[24, 100, 1_000, 4_000, 16_000, 64_000], &Work::of),
        Panel {
            title: "Changes delivered by subscribers of the key",
            x: "subscribers",
            series: vec![Series {
                name: "flood",
                figure: "delivered_per_s",
                points: [1, 10, 100, 500]
                    .map(|subscribers| {
                        let work = Work::FanOut { subscribers, rate: None };
                        (subscribers, Cell { work, peer: Peer::NkvMemory })
                    })
                    .to_vec(),
            }],
        },
    ]
}

/// What a measurement needs.
#[derive(Clone, Debug)]
pub(crate) struct Bench {
    pub(crate) nkv: PathBuf,
    pub(crate) dir: PathBuf,
    /// All processors, the server's and the load's.
    pub(crate) cpus: [CpuSet; 3],
    pub(crate) span: Span,
    pub(crate) settle: Settle,
}

impl Bench {
    /// Starts the server of a cell, measures, and stops it.
    pub(crate) fn measure(&self, goal: u32, cell: Cell) -> Result<Figures> {
        let [all, server, load] = &self.cpus;
        let (server, own) = if matches!(goal, UNPINNED | ENGINES) { (all, all) } else { (server, load) };
        crate::sys::pin(own)?;
        let site = Site { nkv: &self.nkv, dir: &self.dir, cpus: server };
        let running = Running::start(cell.peer, site)?;
        let (running, figures) = match cell.work {
            Work::Start { keys, overwritten } => {
                for _ in 0..=overwritten {
                    load::fill(running.target, VALUE, Keys::plain(keys))?;
                }
                let running = running.restart(cell.peer, site, keys - 1)?;
                let rss_mb = crate::sys::rss_mb(running.target.pid);
                let figures = Figures::from([("first_answer_s", running.first_answer_s), ("rss_mb", rss_mb)]);
                (running, figures)
            }
            Work::Watches { subscriptions } => {
                let second = running.second(cell.peer, site, 0)?;
                let engine = running.engine.as_ref().ok_or("it has no engine")?.target;
                let figures = watches::run([running.target, second.target], engine, VALUE, subscriptions)?;
                second.stop()?;
                (running, figures)
            }
            work => {
                let figures = self.at(&running, work)?;
                (running, figures)
            }
        };
        running.stop()?;
        Ok(figures)
    }

    fn at(&self, running: &Running, work: Work) -> Result<Figures> {
        let target = running.target;
        match work {
            Work::Load { shape, around } => {
                load::fill(target, shape.value, shape.keys)?;
                load::settle(target);
                let _beside = match around {
                    Around::Nothing => None,
                    Around::Unrelated(count) => Some(load::subscribe_unrelated(target, count)?),
                    Around::Stalled => Some(load::subscribe_and_stall(target, shape.keys)?),
                    Around::Churned(times) => {
                        load::churn(target, shape.value, shape.keys, times)?;
                        None
                    }
                };
                load::run(target, shape, self.span)
            }
            Work::FanOut { subscribers, rate } => fanout::run(target, VALUE, subscribers, rate, self.span),
            Work::Footprint => footprint::run(running, VALUE, 100_000, 500, self.settle),
            Work::Start { .. } | Work::Watches { .. } => unreachable!("measured by starting"),
        }
    }
}

impl Settle {
    pub(crate) fn ms(ms: u64) -> Settle {
        Settle(Duration::from_millis(ms))
    }
}
