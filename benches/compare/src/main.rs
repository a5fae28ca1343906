//! Sets nkv beside redis-server, nats-server and etcd, on this machine; see README.md.

mod drivers;
mod fanout;
mod footprint;
mod goals;
mod grpc_echo;
mod hist;
mod load;
mod peers;
mod plot;
mod pool;
mod reference;
mod report;
mod session;
mod stalls;
mod sys;
mod versions;
mod watches;
mod wire;

use std::path::Path;
use std::process::ExitCode;

use crate::goals::Cell;
use crate::peers::Peer;
use crate::report::{Raw, Sample};
use crate::session::{Options, Session, in_short, root};
use crate::sys::WorkDir;
use crate::versions::{Side, Worse};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const HELP: &str = "\
compare run     [OPTIONS]    measure the goals and print the table
compare run --nkv-old PATH [OPTIONS]
                             measure two builds of nkv in turns and judge each line; ends with 2 if any is worse
compare stalls  [OPTIONS]    measure other clients' gets while one client does something large
compare growth  [OPTIONS]    measure how cost grows with keys, subscriptions, segments, bytes, subscribers
compare show    FILE         print the table of a run again
compare plot    FILE [DIR]   draw performance.svg from a run, or performance-growth.svg from a growth, into DIR (docs/),
                             and write the table of a run into its performance.md
compare disk                 syncs a second that the disk can do

Options:
  --goals 1,2,5     only these goals; 17 (engines) is measured only if it is among them
  --peers TEXT,...  only measurements of servers whose names contain one of these
  --only TEXT,...   only work, or stalls, whose names contain one of these
  --rounds N        rounds, in each of which every server has its turn (5; of two builds 6, of stalls 3)
  --seconds S       length of a measurement (2)
  --quick           2 rounds of half a second; stalls: fewer keys
  --nkv PATH        a server that is built; otherwise it is built now
  --nkv-old PATH    run: another build of nkv, which the first is judged by; it alone is measured beside it
  --out FILE        where the raw figures go (target/compare/run.jsonl, versions.jsonl, stalls.jsonl, growth.jsonl)";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compare: {error}");
            if error.is::<Worse>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

fn run(arguments: &[String]) -> Result<()> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["run", ref options @ ..] => {
            let options = Options::read(options)?;
            if options.old.is_some() { measure_versions(&options) } else { measure_goals(&options) }
        }
        ["stalls", ref options @ ..] => measure_stalls(&Options::read(options)?),
        ["growth", ref options @ ..] => measure_growth(&Options::read(options)?),
        ["show", file] => {
            print!("{}", table(&Raw::read(Path::new(file))?));
            Ok(())
        }
        ["plot", file] => plot::draw(&Raw::read(Path::new(file))?, &root()?.join("docs")),
        ["plot", file, dir] => plot::draw(&Raw::read(Path::new(file))?, Path::new(dir)),
        ["disk"] => measure_disk(),
        // What runs as one of the servers.
        ["echo-server", addr] => reference::echo(addr.parse()?),
        ["http-echo-server", addr] => reference::http_echo(addr.parse()?),
        ["grpc-echo-server", addr] => grpc_echo::serve(addr.parse()?),
        _ => Err(HELP.into()),
    }
}

/// The table for the kind of run that the figures are from.
fn table(raw: &Raw) -> String {
    if raw.has_sides() {
        versions::table(raw)
    } else if raw.samples(stalls::GOAL).next().is_some() {
        stalls::table(raw)
    } else {
        raw.table(&goals::lines())
    }
}

fn measure_goals(options: &Options) -> Result<()> {
    let lines = goals::lines();
    let cells = lines.iter().flat_map(|line| {
        let cells = [line.ours].into_iter().chain(line.theirs.iter().copied());
        cells.map(|cell| (line.goal, cell)).collect::<Vec<_>>()
    });
    finish(measure(options, cells, "run.jsonl")?)?.check()
}

fn measure_growth(options: &Options) -> Result<()> {
    let panels = goals::panels();
    let series = panels.iter().flat_map(|panel| &panel.series);
    let cells = series.flat_map(|series| series.points.iter().map(|(_, cell)| (0, *cell)));
    let out = measure(options, cells, "growth.jsonl")?.end()?;
    println!("raw figures: {}", out.display());
    Raw::read(&out)?.check()
}

fn measure_versions(options: &Options) -> Result<()> {
    let old = options.old.clone().ok_or("no old build was named")?;
    let mut session = Session::begin(options, "versions.jsonl")?;
    let new = session.bench.nkv.clone();
    let lines = versions::lines();
    let wanted = wanted(options, lines.iter().map(|line| (line.goal, line.cell)), &session);
    let bench =
        |side| goals::Bench { nkv: if side == Side::New { &new } else { &old }.clone(), ..session.bench.clone() };
    let benches = [Side::Old, Side::New, Side::OldAgain].map(|side| (side, bench(side)));
    let measure = |side: Side, goal, cell| {
        let (_, bench) = benches.iter().find(|(other, _)| *other == side).ok_or("no such side")?;
        bench.measure(goal, cell)
    };
    // As in `measure`: both programs, and the machine, are cold at first.
    if let Some((goal, cell)) = wanted.first() {
        let _ = measure(Side::Old, *goal, *cell).and(measure(Side::New, *goal, *cell));
    }
    for round in 0..options.rounds(6) {
        for (goal, cell) in &wanted {
            for side in Side::turns(round) {
                let measured = measure(side, *goal, *cell);
                session.note(&Sample::of(*goal, *cell, Some(side.name()), round), &measured)?;
            }
        }
    }
    let raw = finish(session)?;
    raw.check()?;
    Ok(versions::check(&raw)?)
}

fn measure_stalls(options: &Options) -> Result<()> {
    let mut session = Session::begin(options, "stalls.jsonl")?;
    stalls::measure(options, &mut session)?;
    finish(session)?.check()
}

/// Measures each of the cells once in each round, in their order.
fn measure(options: &Options, cells: impl Iterator<Item = (u32, Cell)>, file: &str) -> Result<Session> {
    let mut session = Session::begin(options, file)?;
    let wanted = wanted(options, cells, &session);
    // The first measurement of all finds caches and processors cold; it is made twice, and does not count at first.
    let _ = wanted.first().map(|(goal, cell)| session.bench.measure(*goal, *cell));
    for round in 0..options.rounds(5) {
        for (goal, cell) in &wanted {
            let measured = session.bench.measure(*goal, *cell);
            session.note(&Sample::of(*goal, *cell, None, round), &measured)?;
        }
    }
    Ok(session)
}

/// Those of the cells that are asked for and can be measured here, each once.
fn wanted(options: &Options, cells: impl Iterator<Item = (u32, Cell)>, session: &Session) -> Vec<(u32, Cell)> {
    let missing: Vec<Peer> = Peer::ALL.into_iter().filter(|peer| peer.settings(&session.bench.nkv).is_none()).collect();
    let mut wanted: Vec<(u32, Cell)> = Vec::new();
    for (goal, cell) in cells {
        let known = |(other_goal, other): &(u32, Cell)| {
            *other_goal == goal && other.peer == cell.peer && other.work.name() == cell.work.name()
        };
        if options.wants(goal, cell) && !missing.contains(&cell.peer) && !wanted.iter().any(known) {
            wanted.push((goal, cell));
        }
    }
    if options.old.is_none() {
        missing.iter().for_each(|peer| println!("not installed, left out: {}", peer.name()));
    }
    wanted
}

/// Ends a run and prints its table.
fn finish(session: Session) -> Result<Raw> {
    let out = session.end()?;
    let raw = Raw::read(&out)?;
    println!("\n{}\nraw figures: {}", table(&raw), out.display());
    Ok(raw)
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
