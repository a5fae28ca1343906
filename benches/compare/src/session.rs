//! What the command line asks for, and a run under way: its directory, its processors, its raw figures.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::footprint::Settle;
use crate::goals::{Bench, Cell, ENGINES};
use crate::load::Span;
use crate::report::{self, Figures, Log, Sample, with_unit};
use crate::sys::{self, WorkDir};
use crate::{HELP, Result};

/// What the command line asks for.
#[derive(Debug)]
pub(crate) struct Options {
    goals: Option<Vec<u32>>,
    peers: Option<Vec<String>>,
    pub(crate) only: Option<Vec<String>>,
    rounds: Option<usize>,
    seconds: f64,
    settle: Settle,
    pub(crate) quick: bool,
    nkv: Option<PathBuf>,
    pub(crate) old: Option<PathBuf>,
    out: Option<PathBuf>,
}

impl Options {
    pub(crate) fn read(words: &[&str]) -> Result<Options> {
        let mut options = Options {
            goals: None,
            peers: None,
            only: None,
            rounds: None,
            seconds: 2.0,
            settle: Settle::ms(1_500),
            quick: false,
            nkv: None,
            old: None,
            out: None,
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            if *word == "--quick" {
                options.rounds.get_or_insert(2);
                (options.quick, options.seconds, options.settle) = (true, 0.5, Settle::ms(500));
                continue;
            }
            let value = words.next().ok_or_else(|| format!("{word}: no such option, or it needs a value\n{HELP}"))?;
            let list = || value.split(',').map(str::to_owned).collect::<Vec<_>>();
            match *word {
                "--goals" => {
                    options.goals = Some(list().iter().map(|goal| goal.parse()).collect::<std::result::Result<_, _>>()?)
                }
                "--peers" => options.peers = Some(list()),
                "--only" => options.only = Some(list()),
                "--rounds" => options.rounds = Some(value.parse()?),
                "--seconds" => options.seconds = value.parse()?,
                "--nkv" => options.nkv = Some(value.into()),
                "--nkv-old" => options.old = Some(value.into()),
                "--out" => options.out = Some(value.into()),
                _ => return Err(format!("{word}: no such option\n{HELP}").into()),
            }
        }
        Ok(options)
    }

    pub(crate) fn rounds(&self, unless_said: usize) -> usize {
        self.rounds.unwrap_or(unless_said)
    }

    pub(crate) fn wants(&self, goal: u32, cell: Cell) -> bool {
        let name = cell.peer.name().to_lowercase();
        self.goals.as_ref().map_or(goal != ENGINES, |goals| goals.contains(&goal))
            && self.only.as_ref().is_none_or(|only| only.iter().any(|text| cell.work.name().contains(text.as_str())))
            && self.peers.as_ref().is_none_or(|peers| peers.iter().any(|peer| name.contains(&peer.to_lowercase())))
    }
}

/// A run under way. Its data goes when it does.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) bench: Bench,
    pub(crate) out: PathBuf,
    log: Log,
    _dir: WorkDir,
}

impl Session {
    /// Begins a run whose raw figures go to `file`, unless the options name another one.
    pub(crate) fn begin(options: &Options, file: &str) -> Result<Session> {
        let nkv = options.nkv.clone().map_or_else(build, Ok)?;
        for program in [Some(&nkv), options.old.as_ref()].into_iter().flatten() {
            if !program.is_file() {
                return Err(format!("{} is no program", program.display()).into());
            }
        }
        sys::raise_file_limit();
        sys::clean_up_on_signal()?;
        let dir = WorkDir::make()?;
        let out = options.out.clone().unwrap_or_else(|| target().join("compare").join(file));
        if let Some(parent) = out.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let command = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
        let settings = report::settings(&sys::machine(dir.path()), &nkv, options.old.as_deref(), &command);
        let log = Log::begin(&out, &settings)?;
        let all = sys::affinity()?;
        let (server, load) =
            sys::first_two(&all).ok_or("two processors are needed: one for the server, one for the load")?;
        let bench = Bench {
            nkv,
            dir: dir.path().to_owned(),
            cpus: [all, sys::only(server), sys::only(load)],
            span: Span { warm_up: (options.seconds / 5.0).min(0.3), measured: options.seconds },
            settle: options.settle,
        };
        Ok(Session { bench, out, log, _dir: dir })
    }

    /// Shows what was measured, and keeps it.
    pub(crate) fn note(&mut self, sample: &Sample, measured: &Result<Figures>) -> Result<()> {
        let Sample { goal, work, peer, side, round } = sample;
        let side = side.map_or(String::new(), |side| format!("{side:<9} "));
        println!("{round} {goal:>2} {work:<40} {:<15} {side}{}", peer.name(), in_short(measured));
        self.log.note(sample, measured)
    }

    /// Ends the run, and gives this thread all processors again.
    pub(crate) fn end(self) -> Result<PathBuf> {
        sys::pin(&self.bench.cpus[0])?;
        Ok(self.out)
    }
}

pub(crate) fn in_short(measured: &Result<Figures>) -> String {
    match measured {
        Ok(figures) => {
            let shown = figures.iter().filter(|(name, _)| !name.ends_with("cpu_s"));
            shown.map(|(name, value)| format!("{name}={} ", with_unit(*value, name))).collect()
        }
        Err(error) => format!("FAILED: {error}"),
    }
}

/// The root of the workspace that nkv-server is in.
pub(crate) fn root() -> Result<PathBuf> {
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
