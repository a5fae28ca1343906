//! Sets nkv beside redis-server, nats-server and etcd, on this machine; see README.md.

mod drivers;
mod fanout;
mod footprint;
mod goals;
mod hist;
mod load;
mod peers;
mod plot;
mod pool;
mod reference;
mod report;
mod sys;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::footprint::Settle;
use crate::goals::{Bench, Cell};
use crate::load::Span;
use crate::peers::Peer;
use crate::report::{Figures, Log, Raw};
use crate::sys::WorkDir;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const HELP: &str = "\
compare run     [OPTIONS]    measure the goals and print the table
compare growth  [OPTIONS]    measure how cost grows with keys, subscriptions, segments, bytes, subscribers
compare show    FILE         print the table of a run again
compare plot    FILE [DIR]   draw performance.svg from a run, or performance-growth.svg from a growth, into DIR (docs/),
                             and write the table of a run into its performance.md
compare disk                 syncs a second that the disk can do

Options:
  --goals 1,2,5     only these goals
  --peers TEXT,...  only measurements of servers whose names contain one of these
  --rounds N        rounds, in each of which every server has its turn (5)
  --seconds S       length of a measurement (2)
  --quick           2 rounds of half a second
  --nkv PATH        a server that is built; otherwise it is built now
  --out FILE        where the raw figures go (target/compare/run.jsonl, growth.jsonl)";

/// What the command line asks for.
#[derive(Debug)]
struct Options {
    goals: Option<Vec<u32>>,
    peers: Option<Vec<String>>,
    rounds: usize,
    seconds: f64,
    settle: Settle,
    nkv: Option<PathBuf>,
    out: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compare: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<()> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["run", ref options @ ..] => measure_goals(&Options::read(options)?),
        ["growth", ref options @ ..] => measure_growth(&Options::read(options)?),
        ["show", file] => {
            print!("{}", Raw::read(Path::new(file))?.table(&goals::lines()));
            Ok(())
        }
        ["plot", file] => plot::draw(&Raw::read(Path::new(file))?, &root()?.join("docs")),
        ["plot", file, dir] => plot::draw(&Raw::read(Path::new(file))?, Path::new(dir)),
        ["disk"] => measure_disk(),
        // What runs as one of the servers.
        ["echo-server", addr] => reference::echo(addr.parse()?),
        _ => Err(HELP.into()),
    }
}

impl Options {
    fn read(words: &[&str]) -> Result<Options> {
        let mut options = Options {
            goals: None,
            peers: None,
            rounds: 5,
            seconds: 2.0,
            settle: Settle::ms(1_500),
            nkv: None,
            out: None,
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            if *word == "--quick" {
                (options.rounds, options.seconds, options.settle) = (2, 0.5, Settle::ms(500));
                continue;
            }
            let value = words.next().ok_or_else(|| format!("{word}: no such option, or it needs a value\n{HELP}"))?;
            let list = || value.split(',').map(str::to_owned).collect::<Vec<_>>();
            match *word {
                "--goals" => {
                    options.goals = Some(list().iter().map(|goal| goal.parse()).collect::<std::result::Result<_, _>>()?)
                }
                "--peers" => options.peers = Some(list()),
                "--rounds" => options.rounds = value.parse()?,
                "--seconds" => options.seconds = value.parse()?,
                "--nkv" => options.nkv = Some(value.into()),
                "--out" => options.out = Some(value.into()),
                _ => return Err(format!("{word}: no such option\n{HELP}").into()),
            }
        }
        Ok(options)
    }

    fn wants(&self, goal: u32, cell: Cell) -> bool {
        let name = cell.peer.name().to_lowercase();
        self.goals.as_ref().is_none_or(|goals| goals.contains(&goal))
            && self.peers.as_ref().is_none_or(|peers| peers.iter().any(|peer| name.contains(&peer.to_lowercase())))
    }
}

fn measure_goals(options: &Options) -> Result<()> {
    let lines = goals::lines();
    let cells = lines.iter().flat_map(|line| {
        let cells = [line.ours].into_iter().chain(line.theirs.iter().copied());
        cells.map(|cell| (line.goal, cell)).collect::<Vec<_>>()
    });
    let out = measure(options, cells, "run.jsonl")?;
    let raw = Raw::read(&out)?;
    println!("\n{}\nraw figures: {}", raw.table(&lines), out.display());
    raw.check()
}

fn measure_growth(options: &Options) -> Result<()> {
    let panels = goals::panels();
    let series = panels.iter().flat_map(|panel| &panel.series);
    let cells = series.flat_map(|series| series.points.iter().map(|(_, cell)| (0, *cell)));
    let out = measure(options, cells, "growth.jsonl")?;
    println!("raw figures: {}", out.display());
    Raw::read(&out)?.check()
}

/// Measures each of the cells once in each round, in their order.
fn measure(options: &Options, cells: impl Iterator<Item = (u32, Cell)>, file: &str) -> Result<PathBuf> {
    let nkv = options.nkv.clone().map_or_else(build, Ok)?;
    sys::raise_file_limit();
    sys::clean_up_on_signal()?;
    let dir = WorkDir::make()?;
    let out = options.out.clone().unwrap_or_else(|| target().join("compare").join(file));
    if let Some(parent) = out.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let command = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
    let mut log = Log::begin(&out, &report::settings(&sys::machine(dir.path()), &nkv, &command))?;
    let all = sys::affinity()?;
    let (server, load) =
        sys::first_two(&all).ok_or("two processors are needed: one for the server, one for the load")?;
    let bench = Bench {
        nkv: &nkv,
        dir: dir.path(),
        cpus: [all, sys::only(server), sys::only(load)],
        span: Span { warm_up: (options.seconds / 5.0).min(0.3), measured: options.seconds },
        settle: options.settle,
    };
    let missing: Vec<Peer> = Peer::ALL.into_iter().filter(|peer| peer.settings(&nkv).is_none()).collect();
    missing.iter().for_each(|peer| println!("not installed, left out: {}", peer.name()));
    let mut wanted: Vec<(u32, Cell)> = Vec::new();
    for (goal, cell) in cells {
        let known = |(other_goal, other): &(u32, Cell)| {
            *other_goal == goal && other.peer == cell.peer && other.work.name() == cell.work.name()
        };
        if options.wants(goal, cell) && !missing.contains(&cell.peer) && !wanted.iter().any(known) {
            wanted.push((goal, cell));
        }
    }
    // The first measurement of all finds caches and processors cold; it is made twice, and does not count at first.
    let _ = wanted.first().map(|(goal, cell)| bench.measure(*goal, *cell));
    for round in 0..options.rounds {
        for (goal, cell) in &wanted {
            let measured = bench.measure(*goal, *cell);
            println!("{round} {goal:>2} {:<40} {:<15} {}", cell.work.name(), cell.peer.name(), in_short(&measured));
            log.note(*goal, *cell, round, &measured)?;
        }
    }
    sys::pin(&bench.cpus[0])?;
    Ok(out)
}

fn in_short(measured: &Result<Figures>) -> String {
    match measured {
        Ok(figures) => {
            let shown = figures.iter().filter(|(name, _)| !name.ends_with("cpu_s") && !name.starts_with("p999"));
            shown.map(|(name, value)| format!("{name}={} ", report::with_unit(*value, name))).collect()
        }
        Err(error) => format!("FAILED: {error}"),
    }
}

fn measure_disk() -> Result<()> {
    sys::clean_up_on_signal()?;
    let dir = WorkDir::make()?;
    for (name, zeroed) in [("a file that grows", false), ("a file written before", true)] {
        for len in [200, 10_000, 40_000] {
            let figures = reference::fdatasync(dir.path(), zeroed, len, 1.0)?;
            println!("{name}, {len} bytes and fdatasync: {}", in_short(&Ok(figures)));
        }
    }
    Ok(())
}

/// The root of the workspace that nkv-server is in.
fn root() -> Result<PathBuf> {
    Ok(Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize()?)
}

/// Where cargo builds nkv.
fn target() -> PathBuf {
    let set = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    set.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"))
}

/// Builds the server as it is released.
fn build() -> Result<PathBuf> {
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--release", "--locked", "-p", "nkv-server", "--bin", "nkv-server"])
        .current_dir(root()?)
        .env("CARGO_TARGET_DIR", target())
        .status()?;
    if !status.success() {
        return Err("nkv-server could not be built".into());
    }
    Ok(target().join("release/nkv-server"))
}
