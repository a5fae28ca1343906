//! The raw figures, one JSON object a line, and the table made of them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};

use crate::Result;
use crate::goals::{Bound, Cell, Line};
use crate::peers::Peer;

/// What one measurement found, by name. The end of a name is the unit.
pub(crate) type Figures = BTreeMap<&'static str, f64>;

/// Where raw figures are written to, as they come.
#[derive(Debug)]
pub(crate) struct Log(File);

impl Log {
    /// Begins a file with what the figures depend on.
    pub(crate) fn begin(path: &Path, settings: &Value) -> Result<Log> {
        let mut log = Log(File::create(path)?);
        log.line(&json!({ "settings": settings }))?;
        Ok(log)
    }

    pub(crate) fn note(&mut self, sample: &Sample, measured: &Result<Figures>) -> Result<()> {
        let Sample { goal, work, peer, side, round } = sample;
        let mut line = json!({ "goal": goal, "work": work, "peer": peer.name(), "round": round });
        if let Some(side) = side {
            line["side"] = json!(side);
        }
        match measured {
            Ok(figures) => line["figures"] = json!(figures),
            Err(error) => line["failure"] = json!(error.to_string()),
        }
        self.line(&line)
    }

    fn line(&mut self, line: &Value) -> Result<()> {
        Ok(writeln!(self.0, "{line}")?)
    }
}

/// What one measurement was of.
#[derive(Clone, Debug)]
pub(crate) struct Sample {
    pub(crate) goal: u32,
    pub(crate) work: String,
    pub(crate) peer: Peer,
    /// Which of two builds of nkv, where a run has two.
    pub(crate) side: Option<&'static str>,
    pub(crate) round: usize,
}

impl Sample {
    pub(crate) fn of(goal: u32, cell: Cell, side: Option<&'static str>, round: usize) -> Sample {
        Sample { goal, work: cell.work.name(), peer: cell.peer, side, round }
    }
}

/// Raw figures that were read again.
#[derive(Debug)]
pub(crate) struct Raw {
    settings: Value,
    samples: Vec<Value>,
}

/// The middle, and the ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// A ratio as two cells of a table: the middle, and the ends.
    pub(crate) fn as_ratio(self) -> (String, String) {
        (format!("**{:.2}**", self.median), format!("{:.2}-{:.2}", self.min, self.max))
    }

    pub(crate) fn of(mut values: Vec<f64>) -> Option<Spread> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median =
            if values.len().is_multiple_of(2) { (values[middle - 1] + values[middle]) / 2.0 } else { values[middle] };
        Some(Spread { median, min, max })
    }
}

impl Raw {
    pub(crate) fn read(path: &Path) -> Result<Raw> {
        let text = fs::read_to_string(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
        let mut raw = Raw { settings: Value::Null, samples: Vec::new() };
        for line in text.lines() {
            let mut line: Value = serde_json::from_str(line)?;
            match line.get_mut("settings") {
                Some(settings) => raw.settings = settings.take(),
                None => raw.samples.push(line),
            }
        }
        Ok(raw)
    }

    #[cfg(test)]
    pub(crate) fn of(samples: Vec<Value>) -> Raw {
        Raw { settings: Value::Null, samples }
    }

    /// The samples of a goal, as they were written.
    pub(crate) fn samples(&self, goal: u32) -> impl Iterator<Item = &Value> {
        self.samples.iter().filter(move |sample| sample["goal"] == goal)
    }

    /// True if two builds of nkv were measured.
    pub(crate) fn has_sides(&self) -> bool {
        self.samples.iter().any(|sample| sample.get("side").is_some())
    }

    /// The figure of each round in which it was measured.
    fn rounds(&self, goal: u32, cell: Cell, figure: &str) -> BTreeMap<u64, f64> {
        self.rounds_of(None, goal, cell, figure)
    }

    /// The same, of one of two builds.
    pub(crate) fn rounds_of(&self, side: Option<&str>, goal: u32, cell: Cell, figure: &str) -> BTreeMap<u64, f64> {
        let (work, peer) = (cell.work.name(), cell.peer.name());
        let wanted = |sample: &&Value| {
            sample["goal"] == goal
                && sample["work"] == work
                && sample["peer"] == peer
                && sample["side"].as_str() == side
        };
        let found = |sample: &Value| Some((sample["round"].as_u64()?, sample["figures"][figure].as_f64()?));
        self.samples.iter().filter(wanted).filter_map(found).collect()
    }

    pub(crate) fn spread(&self, goal: u32, cell: Cell, figure: &str) -> Option<Spread> {
        Spread::of(self.rounds(goal, cell, figure).into_values().collect())
    }

    /// The ratio of our figure to the best rival's, round by round.
    fn ratio(&self, line: &Line) -> Option<Spread> {
        self.against(line, |ours, best| ours / best)
    }

    fn against(&self, line: &Line, with: fn(f64, f64) -> f64) -> Option<Spread> {
        let rounds = |cell: &Cell| self.rounds(line.goal, *cell, line.figure);
        let rivals: Vec<_> = line.theirs.iter().map(rounds).collect();
        let ratios = rounds(&line.ours).into_iter().filter_map(|(round, ours)| {
            let theirs = rivals.iter().filter_map(|rival| rival.get(&round)).copied();
            let best = if more_is_better(line.figure) { theirs.reduce(f64::max) } else { theirs.reduce(f64::min) };
            best.filter(|best| *best > 0.0).map(|best| with(ours, best))
        });
        Spread::of(ratios.collect())
    }

    /// The table, in Markdown; then what failed, and what it was measured with.
    pub(crate) fn table(&self, lines: &[Line]) -> String {
        let mut out =
            "| goal | work | figure | nkv | beside | ratio | spread | wanted | met |\n|-|-|-|-|-|-|-|-|-|\n".to_owned();
        for line in lines {
            let Some(ours) = self.spread(line.goal, line.ours, line.figure) else { continue };
            let rivals = line.theirs.iter().filter_map(|cell| {
                let itself = cell.peer == line.ours.peer;
                let name = if itself { cell.work.name() } else { cell.peer.name().to_owned() };
                let spread = self.spread(line.goal, *cell, line.figure)?;
                Some(format!("{name} {}", with_unit(spread.median, line.figure)))
            });
            let rivals = rivals.collect::<Vec<_>>().join("; ");
            let ratio = self.ratio(line);
            let added = self.against(line, |ours, best| ours - best);
            let (wanted, judged) = match line.bound {
                Bound::AtLeast(bound) => (format!("≥ {bound} x"), ratio.map(|ratio| ratio.median >= bound)),
                Bound::AtMost(bound) => (format!("≤ {bound} x"), ratio.map(|ratio| ratio.median <= bound)),
                Bound::AddsAtMost(bound) => {
                    let met = added.map(|added| added.median <= bound);
                    (format!("≤ {} more", with_unit(bound, line.figure)), met)
                }
                Bound::Below(bound) => (format!("≤ {}", with_unit(bound, line.figure)), Some(ours.median <= bound)),
                Bound::Above(bound) => (format!("≥ {}", with_unit(bound, line.figure)), Some(ours.median >= bound)),
                Bound::None => (String::new(), None),
            };
            let (ratio, spread) = match (ratio, line.bound) {
                (Some(ratio), Bound::AtLeast(_) | Bound::AtMost(_) | Bound::None) => ratio.as_ratio(),
                (None, Bound::AtLeast(_) | Bound::AtMost(_)) => Default::default(),
                (_, Bound::AddsAtMost(_)) => added.map_or_else(Default::default, |added| {
                    let [median, min, max] =
                        [added.median, added.min, added.max].map(|added| with_unit(added, line.figure));
                    (format!("**{median} more**"), format!("{min}-{max}"))
                }),
                _ => {
                    let ends = [ours.min, ours.max].map(|end| with_unit(end, line.figure));
                    (String::new(), ends.join("-"))
                }
            };
            let met = judged.map_or("", |met| if met { "yes" } else { "**no**" });
            let _ = writeln!(
                out,
                "| {} | {}: {} | {} | {} | {rivals} | {ratio} | {spread} | {wanted} | {met} |",
                line.goal,
                line.ours.peer.name(),
                line.ours.work.name(),
                title(line.figure),
                with_unit(ours.median, line.figure),
            );
        }
        out + &self.failures() + &self.settings()
    }

    /// Writes the table into a document, between its marks.
    ///
    /// # Errors
    ///
    /// If the document has no marks, or cannot be written.
    pub(crate) fn publish(&self, lines: &[Line], document: &Path) -> Result<()> {
        const MARKS: [&str; 2] = ["<!-- written by `compare plot` -->\n", "<!-- until here -->\n"];
        let text = fs::read_to_string(document)?;
        let parts = text.split_once(MARKS[0]).and_then(|(head, rest)| Some((head, rest.split_once(MARKS[1])?.1)));
        let (head, tail) = parts.ok_or_else(|| format!("{} has no place for the table", document.display()))?;
        fs::write(document, [head, MARKS[0], &self.table(lines), MARKS[1], tail].concat())?;
        println!("{}", document.display());
        Ok(())
    }

    /// # Errors
    ///
    /// If a measurement failed.
    pub(crate) fn check(&self) -> Result<()> {
        if self.failures().is_empty() { Ok(()) } else { Err("not all could be measured".into()) }
    }

    pub(crate) fn failures(&self) -> String {
        let failed = self.samples.iter().filter(|sample| sample.get("failure").is_some());
        failed.fold(String::new(), |text, sample| text + &format!("\nFAILED: {sample}\n"))
    }

    /// What the figures were measured with, in Markdown.
    pub(crate) fn settings(&self) -> String {
        let mut out = format!("\nMeasured by `compare {}` on:\n", self.settings["command"].as_str().unwrap_or("run"));
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        for (name, value) in self.settings["machine"].as_object().into_iter().flatten() {
            let _ = write!(out, "\n- {name}: {}", text(value));
        }
        for build in self.settings["builds"].as_array().into_iter().flatten() {
            let [side, version] = ["side", "version"].map(|name| text(&build[name]));
            let _ = write!(out, "\n- {side}: {version}, {} bytes", build["bytes"]);
        }
        out += "\n\n| server | program | arguments | an acknowledged put is |\n|-|-|-|-|\n";
        for (peer, settings) in self.settings["servers"].as_object().into_iter().flatten() {
            let settings: Vec<_> = settings.as_array().into_iter().flatten().map(text).collect();
            if let [program, arguments, durability] = &settings[..] {
                let _ = writeln!(out, "| {peer} | {program} | `{arguments}` | {durability} |");
            }
        }
        out
    }
}

/// What the figures depend on.
pub(crate) fn settings(machine: &[(&str, String)], nkv: &Path, old: Option<&Path>, command: &str) -> Value {
    let machine: serde_json::Map<_, _> =
        machine.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
    let servers = Peer::ALL.into_iter().filter_map(|peer| Some((peer.name().to_owned(), json!(peer.settings(nkv)?))));
    let servers: serde_json::Map<_, _> = servers.collect();
    let mut settings = json!({ "command": command, "machine": machine, "servers": servers });
    if let Some(old) = old {
        settings["builds"] = json!([build("new", nkv), build("old", old)]);
    }
    settings
}

/// Which build a side is: two of them may say the same version.
fn build(side: &str, program: &Path) -> Value {
    let len = fs::metadata(program).map_or(0, |data| data.len());
    let version = Peer::NkvSync.settings(program).map(|[version, ..]| version);
    json!({ "side": side, "version": version, "bytes": len })
}

/// True of rates; of times and sizes less is better.
pub(crate) fn more_is_better(figure: &str) -> bool {
    figure.ends_with("per_s")
}

/// What a figure is called in the table, where its unit stands behind the number.
pub(crate) fn title(figure: &str) -> String {
    match figure {
        "per_s" => "requests".to_owned(),
        "delivered_per_s" => "deliveries".to_owned(),
        "latest_share" => "end with the last value".to_owned(),
        "rss_mb" => "memory at rest".to_owned(),
        "rss_begin_mb" => "memory as it begins".to_owned(),
        "rss_end_mb" => "memory as it ends".to_owned(),
        "nodes_mb" => "memory of both nodes".to_owned(),
        "engine_mb" => "memory of the engine".to_owned(),
        "delivered_share" => "delivered".to_owned(),
        "server_cpu_s" => "processor time of the servers".to_owned(),
        "watches" => "watches in the engine".to_owned(),
        "rss_growth_mb" => "growth of memory".to_owned(),
        "idle_connections_mb" => "500 idle connections".to_owned(),
        "keys_mb" => "100,000 keys".to_owned(),
        "program_mb" => "size of the program".to_owned(),
        "idle_cpu_percent" => "processor time at rest".to_owned(),
        "compaction_cpu_s" => "processor time of compaction".to_owned(),
        _ => ["_per_s", "_us", "_s"].iter().fold(figure, |name, unit| name.trim_end_matches(unit)).replace('_', " "),
    }
}

/// A figure as people read it; the end of its name is its unit.
pub(crate) fn with_unit(value: f64, figure: &str) -> String {
    let unit = figure.rsplit('_').next().unwrap_or_default();
    match unit {
        "s" if figure.ends_with("per_s") => match value {
            1e6.. => format!("{:.2} M/s", value / 1e6),
            1e4.. => format!("{:.0} k/s", value / 1e3),
            1e3.. => format!("{:.1} k/s", value / 1e3),
            _ => format!("{value:.0}/s"),
        },
        "us" if value >= 1e6 => format!("{:.2} s", value / 1e6),
        "us" if value >= 1_000.0 => format!("{:.2} ms", value / 1e3),
        "us" => format!("{value:.0} us"),
        "s" if value < 1.0 => format!("{:.0} ms", value * 1e3),
        "s" => format!("{value:.2} s"),
        "mb" => format!("{value:.1} MB"),
        "percent" => format!("{value:.2} %"),
        _ if value.fract() == 0.0 => format!("{value}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_taken_within_each_round_and_to_the_best_rival() {
        let line = crate::goals::lines().into_iter().find(|line| line.goal == 13).expect("there is one");
        let mut raw = Raw { settings: Value::Null, samples: Vec::new() };
        for (round, figures) in [[100.0, 50.0, 80.0], [300.0, 100.0, 20.0], [100.0, 25.0, 1.0]].iter().enumerate() {
            let cells = [line.ours].into_iter().chain(line.theirs.iter().copied());
            for (cell, figure) in cells.zip(figures) {
                raw.samples.push(json!({
                    "goal": 13, "work": cell.work.name(), "peer": cell.peer.name(), "round": round,
                    "figures": { line.figure: figure },
                }));
            }
        }
        assert_eq!(raw.ratio(&line), Some(Spread { median: 3.0, min: 1.25, max: 4.0 }));
        let table = raw.table(&[line]);
        assert!(table.contains("**3.00** | 1.25-4.00 | ≥ 1 x | yes"), "{table}");
    }
}
