//! What happened, as plain data on one clock: what clients asked and were answered, what subscribers received, and
//! when the server died. The checkers read this and nothing else.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::RangeInclusive;

/// Nanoseconds on the one monotonic clock of a history.
pub type Time = u64;
/// A value stands for the put that wrote it: no two puts write the same.
pub type Value = u64;

#[derive(Clone, Debug)]
pub struct Op {
    /// Operations of one connection take effect in the order in which they were sent, also when they are pipelined.
    pub session: u64,
    pub key: String,
    pub ask: Ask,
    /// The state that a conditional write asks for.
    pub expect: Option<State>,
    pub invoked: Time,
    /// `Time::MAX` if no answer came.
    pub returned: Time,
    pub outcome: Outcome,
}

/// A key's revision and value, if it is there.
pub type State = Option<(u64, Value)>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    Get,
    Put(Value),
    Delete,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// No answer came: it may take effect at any time after its invocation, or never.
    Unknown,
    Written(u64),
    Found(u64, Value),
    /// There was no such key.
    Absent,
    /// The condition did not hold: the key's present revision, 0 if it is absent.
    Conflict(u64),
    /// The disk took nothing: it was not done, and will not be.
    Refused,
}

/// What a subscriber received, or saw of its connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A connection was there, and nothing had been sent on it.
    Connected,
    /// The snapshot begins.
    Hello,
    Update {
        key: String,
        revision: u64,
        value: Value,
        skipped: u64,
    },
    Gone {
        key: String,
        revision: u64,
        /// Known from a snapshot that did not have the key.
        missed: bool,
        skipped: u64,
    },
    Synced {
        revision: u64,
        epoch: String,
    },
    Lost,
}

#[derive(Clone, Debug)]
pub struct Watch {
    pub name: String,
    pub pattern: String,
    /// A subscription of the client library, which connects again by itself; otherwise each connection as it is.
    pub library: bool,
    pub notices: Vec<(Time, Notice)>,
}

/// A death of the server, and what the next life began with.
#[derive(Clone, Debug)]
pub struct Restart {
    /// Before the death.
    pub killed: Time,
    /// After the death, and before the next life.
    pub at: Time,
    pub recovered: u64,
    pub epoch: String,
}

#[derive(Clone, Debug, Default)]
pub struct History {
    pub epoch: String,
    pub ops: Vec<Op>,
    pub watches: Vec<Watch>,
    pub restarts: Vec<Restart>,
    /// What the store held in the end.
    pub store: BTreeMap<String, (u64, Value)>,
}

impl Op {
    pub fn is_unknown(&self) -> bool {
        self.outcome == Outcome::Unknown
    }

    pub fn put(&self) -> Option<Value> {
        if let Ask::Put(value) = self.ask { Some(value) } else { None }
    }

    /// The revision that its answer proves to have been reached.
    pub fn revision(&self) -> Option<u64> {
        match self.outcome {
            Outcome::Written(revision) | Outcome::Found(revision, _) => Some(revision),
            Outcome::Conflict(revision) if revision > 0 => Some(revision),
            _ => None,
        }
    }
}

/// A change: of which key, to which value; none for a delete.
pub type Change<'a> = (&'a str, Option<Value>);

/// What the answers to operations say of the store.
#[derive(Debug, Default)]
pub struct Facts<'a> {
    pub puts: HashMap<Value, &'a Op>,
    /// By revision: the writes that were answered, and the puts that some client read.
    pub changes: BTreeMap<u64, Change<'a>>,
    /// The writes that were answered, by revision.
    pub written: HashMap<u64, &'a Op>,
    pub by_key: HashMap<&'a str, BTreeMap<u64, Option<Value>>>,
    /// For each key, when deletes were asked for that were never answered.
    unknown_deletes: HashMap<&'a str, Vec<Time>>,
    /// Revisions below the highest known one of which nothing is known: they were given to what was never answered.
    gaps: BTreeSet<u64>,
    /// In the order of time: the highest revision that an answer had proved by then.
    proved: Vec<(Time, u64)>,
}

impl<'a> Facts<'a> {
    /// The facts, and what contradicts itself among them.
    pub fn gather(ops: &'a [Op]) -> (Self, Vec<String>) {
        let (mut facts, mut wrong) = (Facts::default(), Vec::new());
        for op in ops {
            if let Some(value) = op.put()
                && facts.puts.insert(value, op).is_some()
            {
                wrong.push(format!("the test itself is wrong: {value} is put twice"));
            }
            if op.ask == Ask::Delete && op.is_unknown() {
                facts.unknown_deletes.entry(&op.key).or_default().push(op.invoked);
            }
            if let Outcome::Written(revision) = op.outcome {
                facts.changes.insert(revision, (&op.key, op.put()));
                if let Some(other) = facts.written.insert(revision, op) {
                    wrong.push(format!("revision {revision} was given twice: to {other:?} and {op:?}"));
                }
            }
            facts.proved.extend(op.revision().map(|revision| (op.returned, revision)));
        }
        for op in ops {
            if let Outcome::Found(revision, value) = op.outcome {
                wrong.extend(facts.learn(revision, &op.key, Some(value)).map(|why| format!("{why}: {op:?}")));
                wrong.extend(facts.is_real(&op.key, revision, value, op.returned).map(|why| format!("{why}: {op:?}")));
            }
        }
        facts.proved.sort_unstable();
        let mut highest = 0;
        for (_, revision) in &mut facts.proved {
            highest = highest.max(*revision);
            *revision = highest;
        }
        let mut next = 1;
        for (revision, (key, value)) in &facts.changes {
            facts.by_key.entry(key).or_default().insert(*revision, *value);
            facts.gaps.extend(next..*revision);
            next = revision + 1;
        }
        (facts, wrong)
    }

    /// Notes a change that some client saw; says what is wrong if another is known at that revision.
    pub fn learn(&mut self, revision: u64, key: &'a str, value: Option<Value>) -> Option<String> {
        let known = self.changes.entry(revision).or_insert((key, value));
        if *known != (key, value) {
            return Some(format!("revision {revision} is both {known:?} and {:?}", (key, value)));
        }
        self.by_key.entry(key).or_default().insert(revision, value);
        self.gaps.remove(&revision);
        None
    }

    /// Whether this may have been seen at this time; what is wrong if not.
    pub fn is_real(&self, key: &str, revision: u64, value: Value, seen: Time) -> Option<String> {
        let Some(put) = self.puts.get(&value) else { return Some(format!("{value} was never put")) };
        let right = match put.outcome {
            Outcome::Unknown => true,
            Outcome::Written(written) => written == revision,
            _ => false,
        };
        let ok = right && put.key == key && put.invoked < seen;
        (!ok).then(|| format!("{key} = {value} at {revision} is not what was put: {put:?}"))
    }

    /// Whether a delete that was never answered may have taken effect by then, at one of these revisions.
    pub fn may_be_deleted(&self, key: &str, by: Time, revisions: RangeInclusive<u64>) -> bool {
        let fits = |asked: Time| {
            let from = (self.proved(asked) + 1).max(*revisions.start());
            let unheard_of = self.changes.keys().next_back().is_none_or(|highest| highest < revisions.end());
            unheard_of || (from <= *revisions.end() && self.gaps.range(from..=*revisions.end()).next().is_some())
        };
        self.unknown_deletes.get(key).is_some_and(|asked| asked.iter().any(|asked| *asked < by && fits(*asked)))
    }

    /// The highest revision that had been proved to some client by then.
    pub fn proved(&self, by: Time) -> u64 {
        let before = self.proved.partition_point(|(time, _)| *time < by);
        before.checked_sub(1).map_or(0, |last| self.proved[last].1)
    }

    /// The last known change of a key up to a revision.
    pub fn last(&self, key: &str, up_to: u64) -> Option<(u64, Option<Value>)> {
        let (revision, value) = self.by_key.get(key)?.range(..=up_to).next_back()?;
        Some((*revision, *value))
    }
}
