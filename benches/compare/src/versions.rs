//! Two builds of nkv in one run: is the new one worse than the old one? In each round every work is measured three
//! times, of the new build once and of the old one twice, so that the run itself says what noise there is.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::{self, Write as _};

use crate::goals::{self, Cell, UNPINNED};
use crate::report::{Raw, Spread, more_is_better, title, with_unit};

/// The smallest ratio that is never called worse.
const RATIO_MIN: f64 = 0.97;

/// MB that the new build may take more at rest.
const REST_MB: f64 = 0.2;

/// The builds that take turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Old,
    New,
    OldAgain,
}

impl Side {
    const ALL: [Side; 3] = [Side::Old, Side::New, Side::OldAgain];

    /// Their order in a round: each has each place equally often.
    pub(crate) fn turns(round: usize) -> [Side; 3] {
        let mut sides = Side::ALL;
        sides.rotate_left(round % Side::ALL.len());
        sides
    }

    /// Stands in the raw figures: stable.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Side::Old => "old",
            Side::New => "new",
            Side::OldAgain => "old again",
        }
    }
}

/// How a line is judged.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Rule {
    /// By the ratio.
    Ratio,
    /// By the difference, in the figure's unit.
    AtMostMore(f64),
    /// Not at all.
    Reported,
    /// Not at all, and a ratio would say nothing: it is about 0, or a handful.
    Shown,
}

impl Rule {
    fn of(figure: &str) -> Rule {
        match figure {
            "rss_mb" => Rule::AtMostMore(REST_MB),
            "rss_growth_mb" | "latest_share" | "threads" | "idle_cpu_percent" => Rule::Shown,
            // The memory at rest is part of it.
            "rss_begin_mb" | "program_mb" => Rule::Reported,
            _ if figure.starts_with("p99") || figure.ends_with("cpu_s") => Rule::Reported,
            _ => Rule::Ratio,
        }
    }
}

/// A line of the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Line {
    pub(crate) goal: u32,
    pub(crate) cell: Cell,
    figure: &'static str,
    rule: Rule,
}

/// What the goals measure of nkv, each thing once.
pub(crate) fn lines() -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for line in goals::lines() {
        for cell in [line.ours].into_iter().chain(line.theirs) {
            let same = |other: &Line| {
                let what = |goal, cell: &Cell, figure| (goal == UNPINNED, cell.work.name(), cell.peer, figure);
                what(other.goal, &other.cell, other.figure) == what(line.goal, &cell, line.figure)
            };
            if cell.peer.is_nkv() && !lines.iter().any(same) {
                lines.push(Line { goal: line.goal, cell, figure: line.figure, rule: Rule::of(line.figure) });
            }
        }
    }
    lines
}

/// What was found for a line. Ratios are above 1 where the new build is better.
#[derive(Clone, Copy, Debug)]
struct Found {
    old: Spread,
    new: Spread,
    /// The new build against the old one, round by round; none where the old one's figure is 0.
    ratio: Option<Spread>,
    /// The old build against itself.
    noise: Option<Spread>,
    /// New less old, round by round.
    more: Spread,
}

impl Found {
    fn of(raw: &Raw, line: &Line) -> Option<Found> {
        let [old, new, again] = Side::ALL.map(|side| {
            let rounds = raw.rounds_of(Some(side.name()), line.goal, line.cell, line.figure);
            rounds.into_iter().collect::<BTreeMap<_, _>>()
        });
        let pairs = |side: &BTreeMap<u64, f64>| -> Vec<(f64, f64)> {
            side.iter().filter_map(|(round, figure)| Some((*old.get(round)?, *figure))).collect()
        };
        let ratio = |(old, figure): (f64, f64)| if more_is_better(line.figure) { figure / old } else { old / figure };
        let ratios = |side| {
            let usable = pairs(side).into_iter().filter(|(old, figure)| *old > 0.0 && *figure > 0.0);
            Spread::of(usable.map(ratio).collect())
        };
        Some(Found {
            old: Spread::of(old.values().copied().collect())?,
            new: Spread::of(new.values().copied().collect())?,
            ratio: ratios(&new),
            noise: ratios(&again),
            more: Spread::of(pairs(&new).into_iter().map(|(old, new)| new - old).collect())?,
        })
    }

    fn verdict(&self, rule: Rule) -> Verdict {
        match (rule, self.ratio) {
            (Rule::Reported | Rule::Shown, _) | (Rule::Ratio, None) => Verdict::None,
            (Rule::AtMostMore(limit), _) if self.more.median > limit => Verdict::Worse,
            (Rule::Ratio, Some(ratio)) if ratio.median < RATIO_MIN => {
                // Which of the two is called the old one and which the same again is chance.
                let noise = self.noise.map_or(1.0, |noise| noise.median.min(1.0 / noise.median));
                if ratio.median < noise { Verdict::Worse } else { Verdict::Noise }
            }
            _ => Verdict::NoWorse,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    NoWorse,
    /// Below the bound, but no further than the old build is from itself.
    Noise,
    Worse,
    None,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verdict::NoWorse => "no worse",
            Verdict::Noise => "no worse than noise",
            Verdict::Worse => "**worse**",
            Verdict::None => "",
        })
    }
}

/// The new build is worse in some lines.
#[derive(Debug)]
pub(crate) struct Worse(usize);

impl fmt::Display for Worse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of the lines are worse than with the old build", self.0)
    }
}

impl Error for Worse {}

/// The table, in Markdown, with a verdict in each line; then what failed, and what it was measured with.
pub(crate) fn table(raw: &Raw) -> String {
    let mut out = "| goal | work | figure | old | new | new to old | spread | old to itself | spread | verdict |\n\
                   |-|-|-|-|-|-|-|-|-|-|\n"
        .to_owned();
    for (line, found) in found(raw) {
        let unit = |value| with_unit(value, line.figure);
        let times = |ratio: Option<Spread>| match ratio {
            Some(ratio) if line.rule != Rule::Shown => ratio.as_ratio(),
            _ => Default::default(),
        };
        let (noise, noise_spread) = times(found.noise);
        let (ratio, spread) = match line.rule {
            Rule::AtMostMore(_) => {
                let [median, min, max] =
                    [found.more.median, found.more.min, found.more.max].map(|more| format!("{more:+.2}"));
                (format!("**{median} MB**"), format!("{min} to {max}"))
            }
            _ => times(found.ratio),
        };
        let _ = writeln!(
            out,
            "| {} | {}: {} | {} | {} | {} | {ratio} | {spread} | {noise} | {noise_spread} | {} |",
            line.goal,
            line.cell.peer.name(),
            line.cell.work.name(),
            title(line.figure),
            unit(found.old.median),
            unit(found.new.median),
            found.verdict(line.rule),
        );
    }
    out + &raw.failures() + &raw.settings()
}

/// # Errors
///
/// [`Worse`], if the new build is worse in any line.
pub(crate) fn check(raw: &Raw) -> Result<(), Worse> {
    match found(raw).filter(|(line, found)| found.verdict(line.rule) == Verdict::Worse).count() {
        0 => Ok(()),
        worse => Err(Worse(worse)),
    }
}

fn found(raw: &Raw) -> impl Iterator<Item = (Line, Found)> {
    lines().into_iter().filter_map(|line| Some((line, Found::of(raw, &line)?)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A run of one line; the figures of each round are those of `Side::ALL`.
    fn run(figure: &str, rounds: &[[f64; 3]]) -> (Raw, Line) {
        let line = lines().into_iter().find(|line| line.figure == figure).expect("there is one");
        let mut samples = Vec::new();
        for (round, figures) in rounds.iter().enumerate() {
            for (side, value) in Side::ALL.into_iter().zip(figures) {
                samples.push(json!({
                    "goal": line.goal, "work": line.cell.work.name(), "peer": line.cell.peer.name(), "round": round,
                    "side": side.name(), "figures": { figure: value },
                }));
            }
        }
        (Raw::of(samples), line)
    }

    fn verdict(figure: &str, rounds: &[[f64; 3]]) -> Verdict {
        let (raw, line) = run(figure, rounds);
        Found::of(&raw, &line).expect("it was measured").verdict(line.rule)
    }

    #[test]
    fn a_rate_is_worse_if_it_is_below_the_bound_and_below_what_the_old_build_shows_against_itself() {
        assert_eq!(verdict("per_s", &[[100.0, 97.0, 100.0]]), Verdict::NoWorse);
        assert_eq!(verdict("per_s", &[[100.0, 96.0, 100.0]]), Verdict::Worse);
        assert_eq!(verdict("per_s", &[[100.0, 96.0, 97.0]]), Verdict::Worse);
        assert_eq!(verdict("per_s", &[[100.0, 96.0, 95.0]]), Verdict::Noise);
        // The old build was as far from itself the other way round.
        assert_eq!(verdict("per_s", &[[100.0, 96.0, 106.0]]), Verdict::Noise);
        // One bad round of three is not the median.
        assert_eq!(verdict("per_s", &[[100.0, 50.0, 100.0], [90.0, 90.0, 90.0], [80.0, 80.0, 80.0]]), Verdict::NoWorse);
    }

    #[test]
    fn of_times_and_sizes_more_is_worse() {
        assert_eq!(verdict("first_answer_s", &[[0.96, 1.0, 0.96]]), Verdict::Worse);
        assert_eq!(verdict("first_answer_s", &[[1.0, 0.96, 1.0]]), Verdict::NoWorse);
        assert_eq!(verdict("keys_mb", &[[17.0, 18.0, 17.0]]), Verdict::Worse);
    }

    #[test]
    fn memory_at_rest_is_judged_by_its_difference() {
        assert_eq!(verdict("rss_mb", &[[1.0, 1.19, 1.0]]), Verdict::NoWorse);
        assert_eq!(verdict("rss_mb", &[[4.0, 4.21, 4.0]]), Verdict::Worse);
    }

    #[test]
    fn tails_are_reported_and_not_judged() {
        assert_eq!(verdict("p99_us", &[[100.0, 900.0, 100.0]]), Verdict::None);
    }

    #[test]
    fn the_table_has_both_ratios_and_the_verdict() {
        let (raw, _) = run("per_s", &[[100.0, 90.0, 101.0], [200.0, 160.0, 204.0], [50.0, 50.0, 50.0]]);
        let table = table(&raw);
        assert!(table.contains("| **0.90** | 0.80-1.00 | **1.01** | 1.00-1.02 | **worse** |"), "{table}");
        assert_eq!(check(&raw).expect_err("it is worse").0, 1);
    }

    #[test]
    fn what_the_issue_names_is_judged() {
        let judged = |part: &str, figure| {
            let mut lines = lines().into_iter().filter(|line| line.cell.work.name().starts_with(part));
            assert!(lines.any(|line| line.figure == figure && line.rule != Rule::Reported), "{part} {figure}");
        };
        for (part, figure) in [
            ("put", "per_s"),
            ("get", "per_s"),
            ("fan-out", "p50_us"),
            ("flood", "delivered_per_s"),
            ("start", "first_answer_s"),
            ("footprint", "rss_mb"),
            ("footprint", "keys_mb"),
        ] {
            judged(part, figure);
        }
    }

    #[test]
    fn each_build_has_each_place_in_three_rounds() {
        let rounds: Vec<_> = (0..3).map(Side::turns).collect();
        for place in 0..3 {
            let mut sides: Vec<_> = rounds.iter().map(|turns| turns[place].name()).collect();
            sides.sort_unstable();
            assert_eq!(sides, ["new", "old", "old again"]);
        }
    }
}
