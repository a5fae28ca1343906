//! What happened, as plain data on one clock: what clients asked and were answered, what subscribers were sent, and
//! when the server died. The checkers read this and nothing else.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::RangeInclusive;

/// Nanoseconds on the one monotonic clock of a history.
pub type Time = u64;
/// A value stands for the put that wrote it: no two puts write the same.
pub type Value = u64;

/// What a client asked, and the answer.
#[derive(Clone, Debug)]
pub struct Op {
    /// Operations of one connection take effect in the order in which they were sent, also when they are pipelined.
    pub session: u64,
    /// Of which key.
    pub key: String,
    /// What for.
    pub ask: Ask,
    /// The state that a conditional write asks for.
    pub expect: Option<State>,
    /// When it was asked.
    pub invoked: Time,
    /// When it was answered; `Time::MAX` if no answer came.
    pub returned: Time,
    /// The answer.
    pub outcome: Outcome,
}

/// A key's revision and value, if it is there.
pub type State = Option<(u64, Value)>;

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// The value.
    Get,
    /// To write it.
    Put(Value),
    /// To remove the key.
    Delete,
}

/// What a client was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// No answer came: it may take effect at any time after its invocation, or never.
    Unknown,
    /// Done, at this revision.
    Written(u64),
    /// The revision and the value.
    Found(u64, Value),
    /// There was no such key.
    Absent,
    /// The condition did not hold: the key's present revision, 0 if it is absent.
    Conflict(u64),
    /// It was not done, and will not be: the disk takes nothing, or the engine is away.
    Refused,
}

/// What a subscriber was sent, or saw of its connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A connection was there, and nothing had been sent on it.
    Connected,
    /// The snapshot begins.
    Hello,
    /// A key has a value.
    Update {
        /// The key.
        key: String,
        /// Of the change.
        revision: u64,
        /// The value.
        value: Value,
        /// How many changes of the key were passed over.
        skipped: u64,
    },
    /// A key is gone.
    Gone {
        /// The key.
        key: String,
        /// By which it is gone.
        revision: u64,
        /// Known from a snapshot that did not have the key.
        missed: bool,
        /// How many changes of the key were passed over.
        skipped: u64,
    },
    /// The snapshot ends.
    Synced {
        /// That of the state.
        revision: u64,
        /// Of the data.
        epoch: String,
    },
    /// The connection ended.
    Lost,
}

/// A subscriber.
#[derive(Clone, Debug)]
pub struct Watch {
    /// Who it is.
    pub name: String,
    /// What it subscribed to.
    pub pattern: String,
    /// A subscription of the client library, which connects again by itself; otherwise each connection as it is.
    pub library: bool,
    /// Its server follows an engine, and may be behind others.
    pub behind_engine: bool,
    /// What it was sent, and when.
    pub notices: Vec<(Time, Notice)>,
}

/// A death of the server, and what the next life began with.
#[derive(Clone, Debug)]
pub struct Restart {
    /// Before the death.
    pub killed: Time,
    /// After the death, and before the next life.
    pub at: Time,
    /// The revision of the next life.
    pub recovered: u64,
    /// The epoch of the next life.
    pub epoch: String,
}

/// All that happened.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// That of all data.
    pub epoch: String,
    /// What clients asked and were answered.
    pub ops: Vec<Op>,
    /// What subscribers were sent.
    pub watches: Vec<Watch>,
    /// The deaths of the server.
    pub restarts: Vec<Restart>,
    /// What the store held in the end.
    pub store: BTreeMap<String, (u64, Value)>,
}

impl Op {
    /// Whether no answer came.
    pub fn is_unknown(&self) -> bool {
        self.outcome == Outcome::Unknown
    }

    /// The value that it puts.
    pub fn put(&self) -> Option<Value> {
        if let Ask::Put(value) = self.ask { Some(value) } else { None }
    }

    /// What its answer says that the key holds: nothing, or a value at a revision. `None` if it does not say.
    pub fn leaves(&self) -> Option<Option<(u64, Value)>> {
        match (self.ask, self.outcome) {
            (Ask::Put(value), Outcome::Written(revision)) => Some(Some((revision, value))),
            (_, Outcome::Found(revision, value)) => Some(Some((revision, value))),
            (Ask::Delete, Outcome::Written(_)) | (_, Outcome::Absent) => Some(None),
            _ => None,
        }
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

/// Of which key a change is, and at which revision: writes of several keys that an engine decides in one step have one.
pub type At<'a> = (u64, &'a str);

/// What the answers to operations say of the store.
#[derive(Debug, Default)]
pub struct Facts<'a> {
    /// By value.
    pub puts: HashMap<Value, &'a Op>,
    /// The writes that were answered, and the puts that some client read; no value for a delete.
    pub changes: BTreeMap<At<'a>, Option<Value>>,
    /// The writes that were answered.
    pub written: HashMap<At<'a>, &'a Op>,
    /// The known changes of each key; no value for a delete.
    pub by_key: HashMap<&'a str, BTreeMap<u64, Option<Value>>>,
    /// For each key, when deletes were asked for that were never answered.
    unknown_deletes: HashMap<&'a str, Vec<Time>>,
    /// Revisions below the highest known one of which nothing is known: they were given to what was never answered.
    gaps: BTreeSet<u64>,
    /// Writes of several callers may have one revision.
    gathers: bool,
    /// In the order of time: the highest revision that an answer had proved by then.
    proved: Vec<(Time, u64)>,
}

impl<'a> Facts<'a> {
    /// The facts, and what contradicts itself among them. Where the engine gathers, writes of several callers may have one revision.
    pub fn gather(ops: &'a [Op], gathers: bool) -> (Self, Vec<String>) {
        let (mut facts, mut wrong) = (Facts { gathers, ..Facts::default() }, Vec::new());
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
                let at = (revision, op.key.as_str());
                facts.changes.insert(at, op.put());
                if let Some(other) = facts.written.insert(at, op) {
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
        for ((revision, key), value) in &facts.changes {
            facts.by_key.entry(key).or_default().insert(*revision, *value);
            facts.gaps.extend(next..*revision);
            next = revision + 1;
        }
        (facts, wrong)
    }

    /// What is wrong where each write has a revision of its own, unless the engine gathers.
    pub fn apart(&self) -> Vec<String> {
        let pairs = self.changes.keys().zip(self.changes.keys().skip(1));
        let shared = pairs.filter(|((one, _), (other, _))| one == other && !self.gathers);
        shared.map(|((revision, one), (_, other))| format!("revision {revision} is of {one} and of {other}")).collect()
    }

    /// Notes a change that some client saw; says what is wrong if another is known at that revision.
    pub fn learn(&mut self, revision: u64, key: &'a str, value: Option<Value>) -> Option<String> {
        let known = self.changes.entry((revision, key)).or_insert(value);
        if *known != value {
            return Some(format!("revision {revision} of {key} is both {known:?} and {value:?}"));
        }
        self.by_key.entry(key).or_default().insert(revision, value);
        self.gaps.remove(&revision);
        None
    }

    /// Whether this may have been seen at this time; what is wrong if not.
    pub fn is_real(&self, key: &str, revision: u64, value: Value, seen: Time) -> Option<String> {
        let Some(put) = self.puts.get(&value) else { return Some(format!("no client put {value}")) };
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
            let unheard_of = self.changes.keys().next_back().is_none_or(|(highest, _)| highest < revisions.end());
            // Where writes are gathered, it may have that of a known one.
            let has_room = || self.gathers || self.gaps.range(from..=*revisions.end()).next().is_some();
            unheard_of || (from <= *revisions.end() && has_room())
        };
        self.unknown_deletes.get(key).is_some_and(|asked| asked.iter().any(|asked| *asked < by && fits(*asked)))
    }

    /// Whether a key that was there at a revision may be gone at this time.
    pub fn may_be_gone(&self, key: &str, seen: u64, time: Time) -> bool {
        let Some(changes) = self.by_key.get(key) else { return true };
        let mut deletes = changes.range(seen..).filter(|(_, value)| value.is_none());
        deletes.any(|(revision, _)| self.written.get(&(*revision, key)).is_none_or(|delete| delete.invoked < time))
            || self.may_be_deleted(key, time, seen..=u64::MAX)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revision_of_two_keys_is_wrong_unless_writes_are_gathered_and_two_of_one_key_always() {
        let put = |key: &str, value, revision| Op {
            session: value,
            key: key.into(),
            ask: Ask::Put(value),
            expect: None,
            invoked: 1,
            returned: 2,
            outcome: Outcome::Written(revision),
        };
        let wrong = |ops: &[Op]| {
            let of = |gathers| {
                let (facts, wrong) = Facts::gather(ops, gathers);
                (wrong.len(), facts.apart().len())
            };
            (of(false), of(true))
        };
        assert_eq!(wrong(&[put("a", 1, 1), put("b", 2, 2)]), ((0, 0), (0, 0)));
        assert_eq!(wrong(&[put("a", 1, 1), put("b", 2, 1)]), ((0, 1), (0, 0)));
        assert_eq!(wrong(&[put("a", 1, 1), put("a", 2, 1)]), ((1, 0), (1, 0)));
    }
}
