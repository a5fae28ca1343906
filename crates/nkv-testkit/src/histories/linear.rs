//! Are the answers those of a store that does one thing at a time, each between its invocation and its return?
//!
//! [`by_revision`] believes the revisions, which makes it fast and the message exact. [`by_search`] believes nothing but
//! values: it looks for an order, as in J. Wing and C. Gong, "Testing and verifying concurrent objects" (1993), with the
//! memory of what was tried and the choice at the last moment of G. Lowe, "Testing for linearizability" (2017).

use std::collections::{HashMap, HashSet};

use super::history::{Ask, Facts, Op, Outcome, Time, Value};

/// Checks the order of all operations by their revisions, for an engine that [gathers](Facts::gather) or one that does not. O(n log n).
pub fn by_revision(ops: &[Op], gathers: bool) -> Vec<String> {
    let (facts, mut wrong) = Facts::gather(ops, gathers);
    let floors = real_time(ops, &facts, &mut wrong);
    for op in ops {
        // A put without an answer that some client read.
        if let Outcome::Found(revision, value) = op.outcome
            && let Some(put) = facts.puts.get(&value)
            && put.is_unknown()
            && floors.get(&value).is_some_and(|floor| *floor >= revision)
        {
            wrong.push(format!("at {revision}, below what was proved before it was asked for: {put:?}"));
        }
        wrong.extend(condition(op, &facts).map(|why| format!("{why}: {op:?}")));
    }
    wrong.extend(sessions(ops));
    wrong
}

/// When operations began and returned, in order: whether it is a return, and which one.
fn moments<'a>(ops: impl Iterator<Item = &'a Op>) -> Vec<(Time, bool, usize)> {
    let mut moments = Vec::new();
    for (n, op) in ops.enumerate() {
        moments.push((op.invoked, false, n));
        if !op.is_unknown() {
            moments.push((op.returned, true, n));
        }
    }
    moments.sort_unstable();
    moments
}

/// What returned before another began comes before it. Returns the revision that was proved when each put began.
fn real_time(ops: &[Op], facts: &Facts<'_>, wrong: &mut Vec<String>) -> HashMap<Value, u64> {
    let (mut floor, mut key_floors) = (0, HashMap::<&str, u64>::new());
    let (mut began, mut floors) = (vec![(0, 0); ops.len()], HashMap::new());
    for (_, is_return, n) in moments(ops.iter()) {
        let op = &ops[n];
        let key_floor = key_floors.entry(&op.key).or_default();
        if !is_return {
            began[n] = (floor, *key_floor);
            floors.extend(op.put().map(|value| (value, floor)));
            continue;
        }
        let (floor_then, key_floor_then) = began[n];
        let ok = match op.outcome {
            Outcome::Written(revision) => revision > floor_then,
            Outcome::Found(revision, _) => revision >= key_floor_then,
            Outcome::Conflict(revision) if revision > 0 => {
                revision >= key_floor_then && op.expect.flatten().is_none_or(|(asked, _)| asked != revision)
            }
            Outcome::Refused => true,
            _ => may_be_absent(op, key_floor_then, facts),
        };
        if !ok {
            wrong.push(format!("{floor_then} ({key_floor_then} of the key) was proved before it began: {op:?}"));
        }
        let proved = op.revision().unwrap_or(0);
        floor = floor.max(proved);
        *key_floor = proved.max(*key_floor);
    }
    floors
}

/// Whether a key that was seen at this revision may have been absent when the operation returned.
fn may_be_absent(op: &Op, seen: u64, facts: &Facts<'_>) -> bool {
    let is_there =
        facts.by_key.get(op.key.as_str()).and_then(|changes| changes.get(&seen)).is_some_and(Option::is_some);
    !is_there || facts.may_be_gone(&op.key, seen, op.returned)
}

/// Nothing known stands between a conditional write and what it asked for.
fn condition(op: &Op, facts: &Facts<'_>) -> Option<String> {
    let (Some(expect), Outcome::Written(revision)) = (op.expect, op.outcome) else { return None };
    let before = facts.last(&op.key, revision - 1);
    let ok = match (expect, before) {
        (Some((asked, _)), Some((found, Some(_)))) => asked == found,
        (Some(_), _) => false,
        (None, Some((found, Some(_)))) => facts.may_be_deleted(&op.key, op.returned, found..=revision),
        (None, _) => true,
    };
    (!ok).then(|| format!("its condition did not hold after {before:?}"))
}

/// Operations of a connection take effect in the order in which they were sent.
fn sessions(ops: &[Op]) -> Vec<String> {
    let (mut wrong, mut written, mut seen) = (Vec::new(), HashMap::new(), HashMap::new());
    for op in ops {
        let last = written.entry(op.session).or_insert(0);
        let key_last = seen.entry((op.session, op.key.as_str())).or_insert(0);
        let ok = match op.outcome {
            Outcome::Written(revision) => revision >= *last && revision > *key_last,
            _ => op.revision().is_none_or(|revision| revision >= *key_last),
        };
        if !ok {
            wrong.push(format!("{last} ({key_last} of the key) came before it on its connection: {op:?}"));
        }
        if let Outcome::Written(revision) = op.outcome {
            *last = revision;
        }
        *key_last = op.revision().unwrap_or(0).max(*key_last);
    }
    wrong
}

/// How many operations of a key make a window.
pub const WINDOW: usize = 200;
/// A step that leaves more possibilities than this is given up.
const POSSIBILITIES_MAX: usize = 100_000;

/// What a search found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Search {
    /// How many windows were searched.
    pub windows: usize,
    /// Keys that were given up, because there were too many possibilities.
    pub given_up: usize,
    /// What no order explains.
    pub wrong: Vec<String>,
}

/// Looks for an order, for each key alone, in windows of 200 operations. All that is possible at the end of a window is
/// what the next one begins with, so nothing is lost between them.
pub fn by_search(ops: &[Op]) -> Search {
    let mut by_key = HashMap::<&str, Vec<&Op>>::new();
    let is_evidence = |op: &&Op| op.outcome != Outcome::Refused && !(op.ask == Ask::Get && op.is_unknown());
    for op in ops.iter().filter(is_evidence) {
        by_key.entry(&op.key).or_default().push(op);
    }
    let mut found = Search::default();
    for ops in by_key.into_values() {
        found.windows += ops.len().div_ceil(WINDOW);
        // Puts without an answer that no client read matter seldom, and cost much.
        let observed: HashSet<Value> = ops.iter().filter_map(|op| observed(op)).collect();
        let (likely, rest): (Vec<&Op>, Vec<&Op>) =
            ops.into_iter().partition(|op| !op.is_unknown() || op.put().is_none_or(|value| observed.contains(&value)));
        if search(&likely) == Verdict::Fine {
            continue;
        }
        match search(&[likely, rest].concat()) {
            Verdict::Fine => {}
            Verdict::GivenUp => found.given_up += 1,
            Verdict::Wrong(why) => found.wrong.push(why),
        }
    }
    found
}

/// The value that an answer shows to have been there.
fn observed(op: &Op) -> Option<Value> {
    match (op.outcome, op.expect) {
        (Outcome::Found(_, value), _) => Some(value),
        (Outcome::Written(_), Some(Some((_, value)))) => Some(value),
        _ => None,
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Fine,
    GivenUp,
    Wrong(String),
}

/// One way in which it may have been: the key's value, and which of the open operations have taken effect.
type Possibility = (Option<Value>, Vec<usize>);

fn search(ops: &[&Op]) -> Verdict {
    let mut open = Vec::<usize>::new();
    let mut possible: HashSet<Possibility> = HashSet::from([(None, Vec::new())]);
    for (_, is_return, n) in moments(ops.iter().copied()) {
        if !is_return {
            open.push(n);
            continue;
        }
        let Some(next) = step(ops, &open, &possible, n) else { return Verdict::GivenUp };
        if next.is_empty() {
            let states: HashSet<_> = possible.iter().map(|(value, _)| value).collect();
            return Verdict::Wrong(format!("no order explains it; possible before: {states:?}: {:?}", ops[n]));
        }
        possible = next;
        open.retain(|open| *open != n);
        // What has happened in any case is past.
        let past: Vec<usize> =
            open.iter().copied().filter(|open| possible.iter().all(|(_, done)| done.contains(open))).collect();
        if past.iter().any(|n| ops[*n].is_unknown()) {
            let unknown: Vec<usize> = past.into_iter().filter(|n| ops[*n].is_unknown()).collect();
            open.retain(|open| !unknown.contains(open));
            possible = possible
                .into_iter()
                .map(|(value, done)| (value, done.into_iter().filter(|n| !unknown.contains(n)).collect()))
                .collect();
        }
    }
    Verdict::Fine
}

/// What is possible once operation `n` has taken effect, after any of the open ones.
fn step(ops: &[&Op], open: &[usize], possible: &HashSet<Possibility>, n: usize) -> Option<HashSet<Possibility>> {
    let mut reached = Frugal::default();
    let mut seen = Frugal::default();
    let mut todo: Vec<Possibility> = possible.iter().cloned().map(|from| look_around(ops, open, from)).collect();
    while let Some((value, done)) = todo.pop() {
        if done.contains(&n) {
            let rest = done.into_iter().filter(|done| *done != n).collect();
            reached.insert(ops, (value, rest));
            continue;
        }
        let mut deleted = false;
        for next in open.iter().copied().filter(|next| !done.contains(next)) {
            let op = ops[next];
            // Deletes that were never answered are all alike: one of them stands for all.
            let alike = op.is_unknown() && op.ask == Ask::Delete && op.expect.is_none();
            if alike && std::mem::replace(&mut deleted, true) {
                continue;
            }
            let Some(after) = effect(op, value) else { continue };
            let mut done = done.clone();
            done.insert(done.partition_point(|other| *other < next), next);
            let to = look_around(ops, open, (after, done));
            if seen.insert(ops, to.clone()) {
                todo.push(to);
            }
        }
        if seen.len + reached.len > POSSIBILITIES_MAX {
            return None;
        }
    }
    Some(reached.into_set())
}

/// Answers that only look at the state are given as soon as they are right: to wait would gain nothing.
fn look_around(ops: &[&Op], open: &[usize], (value, mut done): Possibility) -> Possibility {
    for &next in open {
        let only_looks = matches!(ops[next].outcome, Outcome::Found(..) | Outcome::Absent | Outcome::Conflict(_));
        if only_looks && effect(ops[next], value).is_some() && !done.contains(&next) {
            done.insert(done.partition_point(|other| *other < next), next);
        }
    }
    (value, done)
}

/// The value after an operation with this outcome; `None` if it cannot have had it here.
fn effect(op: &Op, value: Option<Value>) -> Option<Option<Value>> {
    let holds = op.expect.is_none_or(|expect| expect.map(|(_, value)| value) == value);
    let ok = match (op.ask, op.outcome) {
        (Ask::Get, Outcome::Found(_, found)) => value == Some(found),
        (_, Outcome::Absent) => value.is_none(),
        (Ask::Put(_), Outcome::Conflict(_)) => !holds,
        (Ask::Delete, Outcome::Conflict(_)) => !holds && value.is_some(),
        (Ask::Put(_), _) => holds,
        (Ask::Delete, _) => holds && value.is_some(),
        (Ask::Get, _) => false,
    };
    let after = match (op.ask, op.outcome) {
        (Ask::Put(value), Outcome::Written(_) | Outcome::Unknown) => Some(value),
        (Ask::Delete, Outcome::Written(_) | Outcome::Unknown) => None,
        _ => value,
    };
    ok.then_some(after)
}

/// Possibilities, less those that only used up more of the operations that need not take effect.
#[derive(Default)]
struct Frugal {
    /// By the value and the operations that must take effect: the sets of others that did.
    sets: HashMap<Possibility, Vec<Vec<usize>>>,
    len: usize,
}

impl Frugal {
    fn insert(&mut self, ops: &[&Op], (value, done): Possibility) -> bool {
        let (unknown, must): (Vec<usize>, Vec<usize>) = done.into_iter().partition(|n| ops[*n].is_unknown());
        let sets = self.sets.entry((value, must)).or_default();
        if sets.iter().any(|set| set.iter().all(|n| unknown.contains(n))) {
            return false;
        }
        let before = sets.len();
        sets.retain(|set| !unknown.iter().all(|n| set.contains(n)));
        sets.push(unknown);
        self.len = self.len + sets.len() - before;
        true
    }

    fn into_set(self) -> HashSet<Possibility> {
        let mut all = HashSet::new();
        for ((value, must), sets) in self.sets {
            for unknown in sets {
                let mut done = [must.clone(), unknown].concat();
                done.sort_unstable();
                all.insert((value, done));
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_revision(ops: &[Op]) -> Vec<String> {
        super::by_revision(ops, false)
    }

    /// Operations of one key from words such as `1-4 put 7 @3`: from when to when, what, and the answer. `?` is the
    /// time of an answer that never came; `if` is followed by the revision and value of a condition, or `none`.
    fn ops(lines: &[&str]) -> Vec<Op> {
        lines.iter().enumerate().map(|(n, line)| op(n as u64, line)).collect()
    }

    fn op(session: u64, line: &str) -> Op {
        let words: Vec<&str> = line.split(' ').collect();
        let (from, to) = words[0].split_once('-').unwrap();
        let number = |word: &str| word.trim_start_matches(['@', '=', '!']).parse::<u64>().unwrap();
        let ask = match words[1] {
            "get" => Ask::Get,
            "delete" => Ask::Delete,
            _ => Ask::Put(number(words[2])),
        };
        let expect = words.iter().position(|word| *word == "if").map(|at| match words[at + 1] {
            "none" => None,
            entry => entry.split_once('=').map(|(revision, value)| (number(revision), number(value))),
        });
        let last = words.last().unwrap();
        let outcome = match (to, last.chars().next().unwrap()) {
            ("?", _) => Outcome::Unknown,
            (_, '!') => Outcome::Conflict(number(last)),
            (_, 'a') => Outcome::Absent,
            (_, 'r') => Outcome::Refused,
            (_, '@') => match words[words.len() - 2].strip_prefix('=') {
                Some(value) => Outcome::Found(number(last), number(value)),
                None => Outcome::Written(number(last)),
            },
            _ => panic!("{line}"),
        };
        let returned = if to == "?" { Time::MAX } else { number(to) };
        Op { session, key: "k".into(), ask, expect, invoked: number(from), returned, outcome }
    }

    const GOOD: &[&[&str]] = &[
        &["1-2 put 7 @1", "3-4 get =7 @1"],
        // At the same time: either order.
        &["1-9 put 7 @2", "2-8 put 8 @1", "3-4 get =8 @1", "10-11 get =7 @2"],
        &["1-2 put 7 @1", "3-? put 8", "4-5 get =7 @1", "6-7 get =8 @2", "8-9 get =8 @2"],
        &["1-2 put 7 @1", "3-? put 8", "4-5 get =7 @1", "6-7 put 9 @2", "8-9 get =9 @2"],
        // An unknown put long after.
        &["1-? put 8", "2-3 put 7 @1", "4-5 get =7 @1", "6-7 get =8 @2"],
        &["1-2 put 7 @1", "3-? delete", "4-5 get absent", "6-7 put 9 @3"],
        &["1-2 put 7 @1", "3-4 delete @2", "5-6 delete absent", "7-8 put 8 if none @3", "9-10 get =8 @3"],
        &["1-2 put 7 @1", "3-6 put 8 if 1=7 @2", "4-7 put 9 if 1=7 !2", "8-9 get =8 @2"],
        &["1-2 put 7 @1", "3-4 put 8 refused", "3-4 delete refused", "5-6 get =7 @1", "7-8 put 9 @2"],
        // Only a put that no client read explains it.
        &["1-? put 8", "2-3 delete @2", "4-5 get absent"],
        &["1-? put 8", "2-3 put 9 if none !1", "4-? delete", "5-6 put 7 if none @3"],
        &["1-? delete", "2-? delete", "3-4 put 7 @1", "5-6 get absent", "7-8 put 8 @3", "9-10 get absent"],
    ];

    #[test]
    fn histories_of_one_order_pass_both_checks() {
        for lines in GOOD {
            let ops = ops(lines);
            assert_eq!(by_revision(&ops), Vec::<String>::new(), "{lines:?}");
            assert_eq!(by_search(&ops), Search { windows: 1, ..Search::default() }, "{lines:?}");
        }
    }

    #[test]
    fn histories_of_no_order_fail_both_checks() {
        let bad: &[&[&str]] = &[
            // Stale, lost, back again, from the future, never put.
            &["1-2 put 7 @1", "3-4 put 8 @2", "5-6 get =7 @1"],
            &["1-2 put 7 @1", "3-4 get absent"],
            &["1-2 put 7 @1", "3-9 put 8 @2", "4-5 get =8 @2", "6-7 get =7 @1"],
            &["1-2 get =7 @1", "3-4 put 7 @1"],
            &["1-2 put 7 @1", "3-4 get =9 @1"],
            // Refused, and there all the same.
            &["1-2 put 7 @1", "3-4 put 8 if none !1", "5-6 get =8 @2"],
            &["1-2 put 7 @1", "3-4 put 8 refused", "5-6 get =8 @2"],
            &["1-2 put 7 @1", "3-4 delete refused", "5-6 get absent"],
            // Two that both found what they asked for.
            &["1-2 put 7 @1", "3-6 put 8 if 1=7 @2", "4-7 put 9 if 1=7 @3"],
            &["1-2 put 7 @1", "3-4 put 8 if none @2"],
            &["1-2 put 7 @1", "3-4 delete @2", "5-6 get =7 @1"],
            &["1-2 put 7 @1", "3-4 put 8 if 1=7 !1"],
            // Once seen, an unknown put has taken effect.
            &["1-2 put 7 @1", "3-? put 8", "4-5 get =8 @2", "6-7 get =7 @1"],
        ];
        for lines in bad {
            let ops = ops(lines);
            assert_ne!(by_revision(&ops), Vec::<String>::new(), "{lines:?}");
            assert_eq!(by_search(&ops).wrong.len(), 1, "{lines:?}");
        }
    }

    #[test]
    fn what_only_revisions_show_fails_the_check_by_revision() {
        let bad: &[&[&str]] = &[
            &["1-2 put 7 @1", "3-4 put 8 @1"],
            &["1-2 put 7 @2", "3-4 put 8 @1"],
            &["1-2 put 7 @1", "3-4 get =7 @2"],
            // Its revision is below one that was known when it was asked for.
            &["1-2 put 7 @5", "3-? put 8", "4-5 get =8 @2"],
        ];
        for lines in bad {
            assert_ne!(by_revision(&ops(lines)), Vec::<String>::new(), "{lines:?}");
        }
        // Pipelined: at the same time, but not in any order.
        let mut pipelined = ops(&["1-3 put 7 @2", "1-4 put 8 @1"]);
        pipelined[1].session = pipelined[0].session;
        assert_eq!(by_revision(&pipelined).len(), 1);
        let mut own = ops(&["1-3 put 7 @2", "2-5 put 8 @3", "2-6 get =7 @2"]);
        own[2].session = own[1].session;
        assert_eq!(by_revision(&own).len(), 1);
    }

    #[test]
    fn what_only_a_search_shows_fails_the_search() {
        // Deleted at last: nothing explains that it is there again but an unknown put of another value.
        let lines = ["1-2 put 7 @1", "3-? delete", "4-5 get absent", "6-7 delete @3"];
        assert_eq!(by_search(&ops(&lines)).wrong.len(), 1);
    }

    #[test]
    fn a_long_history_is_searched_window_by_window() {
        let mut ops = Vec::new();
        for n in 0..300 {
            ops.push(op(n, &format!("{}-{} put {} @{}", 10 * n + 1, 10 * n + 14, n + 1, n + 1)));
            ops.push(op(n, &format!("{}-{} get ={} @{}", 10 * n + 6, 10 * n + 9, n + 1, n + 1)));
            if n % 10 == 0 {
                ops.push(op(n, &format!("{}-? delete if 999999=999999 x", 10 * n + 2)));
                ops.push(op(n, &format!("{}-? put {} x", 10 * n + 2, 100_000 + n)));
            }
        }
        assert_eq!(by_search(&ops), Search { windows: 4, ..Search::default() });
        assert_eq!(by_revision(&ops), Vec::<String>::new());
        ops.push(op(0, "20001-20002 get =200 @200"));
        assert_eq!(by_search(&ops).wrong.len(), 1);
    }
}
