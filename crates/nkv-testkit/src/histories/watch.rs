//! Is what subscribers were sent true, in order, and complete? One function for each question; each returns what is
//! wrong. The questions are those that the etcd project asks of its watches.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::history::{Facts, History, Notice, Time, Watch};

/// Whether a subscription to a pattern covers a key. Not the server's code, on purpose.
pub fn covers(pattern: &str, key: &str) -> bool {
    let below = |branch: &str| key.strip_prefix(branch).is_some_and(|rest| rest.starts_with('.'));
    match pattern.strip_suffix('*') {
        Some("") => true,
        Some(branch) => below(branch.trim_end_matches('.')),
        None => key == pattern || below(pattern),
    }
}

/// The key and revision of a change.
fn change(notice: &Notice) -> Option<(&str, u64)> {
    match notice {
        Notice::Update { key, revision, .. } | Notice::Gone { key, revision, .. } => Some((key, *revision)),
        _ => None,
    }
}

/// What is wrong, with the name of its subscriber.
fn wrong(watch: &Watch, why: impl std::fmt::Display, notice: &Notice) -> String {
    format!("{} ({}): {why}: {notice:?}", watch.name, watch.pattern)
}

/// Filter: only of keys that the pattern covers.
pub fn filter(watch: &Watch) -> Vec<String> {
    let others =
        watch.notices.iter().filter(|(_, notice)| change(notice).is_some_and(|(key, _)| !covers(&watch.pattern, key)));
    others.map(|(_, notice)| wrong(watch, "not covered", notice)).collect()
}

/// Ordered: the revisions of a key rise within an epoch. On one connection the revisions of all keys do, but within a
/// snapshot, which is in key order, of nothing later than its end, and of no deletes.
pub fn ordered(watch: &Watch) -> Vec<String> {
    let mut found = Vec::new();
    let mut keys = HashMap::<&str, u64>::new();
    let (mut snapshot, mut last, mut highest) = (None::<Vec<&str>>, 0, 0);
    for (_, notice) in &watch.notices {
        if *notice == Notice::Connected && !watch.library {
            keys.clear();
            (snapshot, last, highest) = (None, 0, 0);
        }
        if *notice == Notice::Hello && !watch.library {
            snapshot = Some(Vec::new());
        }
        if let Notice::Synced { revision, .. } = notice
            && !watch.library
        {
            if snapshot.take().is_none() || *revision < highest {
                found.push(wrong(watch, format!("nothing was begun, or {highest} was sent before"), notice));
            }
            last = *revision;
        }
        let Some((key, revision)) = change(notice) else { continue };
        if keys.insert(key, revision).is_some_and(|before| before >= revision) {
            found.push(wrong(watch, "its key was further already", notice));
        }
        if watch.library {
            continue;
        }
        highest = highest.max(revision);
        match &mut snapshot {
            Some(before) => {
                let segments: Vec<&str> = key.split('.').collect();
                if *before >= segments || matches!(notice, Notice::Gone { .. }) {
                    found.push(wrong(watch, "out of order within a snapshot", notice));
                }
                *before = segments;
            }
            // What an engine decided in one step has one revision.
            None if revision < last || (revision == last && !watch.behind_engine) => {
                found.push(wrong(watch, format!("after {last}"), notice));
            }
            None => last = revision,
        }
    }
    found
}

/// Unique: no change is sent twice; to a subscription of the library in an epoch, to others on a connection.
pub fn unique(watch: &Watch) -> Vec<String> {
    let (mut found, mut seen) = (Vec::new(), HashSet::new());
    for (_, notice) in &watch.notices {
        if *notice == Notice::Connected && !watch.library {
            seen.clear();
        }
        if change(notice).is_some_and(|change| !seen.insert(change)) {
            found.push(wrong(watch, "notified twice", notice));
        }
    }
    found
}

/// Real: everything that was sent was done, or may have been, before that; and no revision is two things.
pub fn real<'a>(history: &'a History, facts: &mut Facts<'a>) -> Vec<String> {
    let mut found = Vec::new();
    for watch in &history.watches {
        let mut known = HashMap::<&str, u64>::new();
        for (time, notice) in &watch.notices {
            let before = change(notice).and_then(|(key, revision)| known.insert(key, revision));
            let why = match notice {
                Notice::Update { key, revision, value, .. } => {
                    facts.is_real(key, *revision, *value, *time).or_else(|| facts.learn(*revision, key, Some(*value)))
                }
                // Where a node has the whole state anew, a delete has the revision of the first other difference.
                Notice::Gone { key, .. } if watch.behind_engine => {
                    let is_right = facts.may_be_gone(key, before.unwrap_or(0), *time);
                    (!is_right).then(|| "no client deleted it since".into())
                }
                Notice::Gone { key, revision, missed: false, .. } => {
                    let known = facts.changes.get(&(*revision, key.as_str())) == Some(&None);
                    if known || facts.may_be_deleted(key, *time, *revision..=*revision) {
                        facts.learn(*revision, key, None)
                    } else {
                        Some("no client deleted it".into())
                    }
                }
                _ => None,
            };
            found.extend(why.map(|why| wrong(watch, why, notice)));
        }
    }
    for watch in history.watches.iter().filter(|watch| !watch.behind_engine) {
        for (time, notice) in &watch.notices {
            if let Notice::Gone { key, revision, missed: true, .. } = notice
                && let Some((at, Some(_))) = facts.last(key, *revision)
                && !facts.may_be_deleted(key, *time, at..=*revision)
            {
                found.push(wrong(watch, format!("it was there since {at}"), notice));
            }
        }
    }
    found
}

/// Durable: what was sent, read or acknowledged in a life of the server is recovered in the next, in the same epoch.
pub fn durable(history: &History) -> Vec<String> {
    let (mut found, mut before) = (Vec::new(), 0);
    for restart in &history.restarts {
        if restart.epoch != history.epoch || restart.recovered < before {
            found.push(format!("not {} any more, or below {before}: {restart:?}", history.epoch));
        }
        before = restart.recovered;
    }
    // By the next life; those after it recover no less.
    let by_time = |time: Time| history.restarts.partition_point(|restart| restart.at <= time);
    let lost = |life: usize, revision: Option<u64>| {
        let recovered = history.restarts.get(life)?.recovered;
        (revision? > recovered).then(|| format!("only {recovered} was recovered"))
    };
    for op in &history.ops {
        found.extend(lost(by_time(op.returned), op.revision()).map(|why| format!("{why}: {op:?}")));
    }
    for watch in &history.watches {
        // What comes over a connection is of the life that greeted it, however late it is read.
        let mut greeted_in = usize::MAX;
        for (time, notice) in &watch.notices {
            match notice {
                Notice::Hello => greeted_in = history.restarts.partition_point(|restart| restart.killed <= *time),
                Notice::Connected | Notice::Lost => greeted_in = usize::MAX,
                _ => {}
            }
            let revision = match notice {
                Notice::Synced { revision, .. } => Some(*revision),
                _ => change(notice).map(|(_, revision)| revision),
            };
            found.extend(lost(by_time(*time).min(greeted_in), revision).map(|why| wrong(watch, why, notice)));
        }
    }
    found
}

/// Synced: each snapshot is followed by its end, in the one epoch, and what is known then is the state at that revision.
pub fn synced(watch: &Watch, history: &History, facts: &Facts<'_>) -> Vec<String> {
    let mut found = Vec::new();
    // Of each key, the revision of what is known, deletes included.
    let mut known = HashMap::<&str, (u64, bool)>::new();
    let (mut connected, mut filling) = (0, false);
    for (time, notice) in &watch.notices {
        match notice {
            Notice::Connected => {
                if filling && !watch.library {
                    found.push(wrong(watch, "a snapshot did not end, and neither did its connection", notice));
                }
                (connected, filling) = (*time, false);
            }
            Notice::Hello => {
                filling = true;
                known.clear();
            }
            Notice::Lost => filling = false,
            Notice::Update { key, revision, .. } => _ = known.insert(key, (*revision, true)),
            Notice::Gone { key, revision, .. } => _ = known.insert(key, (*revision, false)),
            Notice::Synced { revision, epoch } => {
                filling = false;
                if *epoch != history.epoch {
                    found.push(wrong(watch, "another epoch", notice));
                }
                let proved = facts.proved(connected);
                if proved > *revision && !watch.library && !watch.behind_engine {
                    found.push(wrong(watch, format!("{proved} was proved before it was asked for"), notice));
                }
                for key in facts.by_key.keys().filter(|key| covers(&watch.pattern, key)) {
                    let (known, last) = (known.get(key).copied(), facts.last(key, *revision));
                    let ok = match (known, last) {
                        // What is gone is not sent again, though it may have come and gone meanwhile.
                        (Some((_, false)), Some((_, None))) if watch.library => true,
                        (Some((at, false)), Some((last, Some(_)))) if watch.library && at < last => {
                            facts.may_be_deleted(key, *time, last..=*revision)
                        }
                        // The library may know more than the snapshot, and pass it on before it says so.
                        (Some((at, _)), Some((last, _))) => at >= last && (watch.library || at <= *revision),
                        (Some((at, _)), None) => watch.library || at <= *revision,
                        (None, Some((last, Some(_)))) => facts.may_be_deleted(key, *time, last..=*revision),
                        (None, _) => true,
                    };
                    if !ok {
                        found.push(wrong(watch, format!("{key} is known as {known:?} and was {last:?}"), notice));
                    }
                }
            }
        }
    }
    found
}

/// What a subscriber knows, if it forgets all when it is sent a new snapshot, or what it missed.
pub fn knows(watch: &Watch) -> BTreeMap<String, (u64, u64)> {
    let mut known = BTreeMap::new();
    for (_, notice) in &watch.notices {
        learn(&mut known, notice);
    }
    known
}

/// Has what is known follow what was sent.
pub fn learn(known: &mut BTreeMap<String, (u64, u64)>, notice: &Notice) {
    match notice {
        Notice::Hello => known.clear(),
        Notice::Update { key, revision, value, .. } => _ = known.insert(key.clone(), (*revision, *value)),
        Notice::Gone { key, .. } => _ = known.remove(key),
        _ => {}
    }
}

/// What the store holds of what a pattern covers.
pub fn covered(store: &BTreeMap<String, (u64, u64)>, pattern: &str) -> BTreeMap<String, (u64, u64)> {
    store.iter().filter(|(key, _)| covers(pattern, key)).map(|(key, entry)| (key.clone(), *entry)).collect()
}

/// Converged: in the end everybody knows what the store holds, and nothing else.
pub fn converged(history: &History) -> Vec<String> {
    let mut found = Vec::new();
    for watch in &history.watches {
        let (known, holds) = (knows(watch), covered(&history.store, &watch.pattern));
        if known != holds {
            found.push(format!("{} ({}): knows {known:?}, the store holds {holds:?}", watch.name, watch.pattern));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::histories::history::{Ask, Op, Outcome, Restart};

    fn update(key: &str, revision: u64, value: u64) -> Notice {
        Notice::Update { key: key.into(), revision, value, skipped: 0 }
    }

    fn gone(key: &str, revision: u64, missed: bool) -> Notice {
        Notice::Gone { key: key.into(), revision, missed, skipped: 0 }
    }

    fn end(revision: u64) -> Notice {
        Notice::Synced { revision, epoch: "e".into() }
    }

    fn watch(library: bool, notice: &[(Time, Notice)]) -> Watch {
        Watch { name: "w".into(), pattern: "a.*".into(), library, behind_engine: false, notices: notice.to_vec() }
    }

    /// `a.x` = 7 at 1, `a.y` = 8 at 2, `b` = 9 at 3, `a.x` deleted at 4, `a.x` = 10 at 5 without an answer; killed at
    /// 100 and there again at 110.
    fn history(library: bool, notice: &[(Time, Notice)]) -> History {
        let op = |time: Time, key: &str, ask, outcome| {
            let returned = if outcome == Outcome::Unknown { Time::MAX } else { time + 5 };
            Op { session: time, key: key.into(), ask, expect: None, invoked: time, returned, outcome }
        };
        let ops = vec![
            op(10, "a.x", Ask::Put(7), Outcome::Written(1)),
            op(20, "a.y", Ask::Put(8), Outcome::Written(2)),
            op(30, "b", Ask::Put(9), Outcome::Written(3)),
            op(40, "a.x", Ask::Delete, Outcome::Written(4)),
            op(50, "a.x", Ask::Put(10), Outcome::Unknown),
        ];
        let restarts = vec![Restart { killed: 100, at: 110, recovered: 5, epoch: "e".into() }];
        let store = [("a.x", (5, 10)), ("a.y", (2, 8)), ("b", (3, 9))].map(|(key, entry)| (key.into(), entry)).into();
        History { epoch: "e".into(), ops, watches: vec![watch(library, notice)], restarts, store }
    }

    /// How many wrongs each validator finds: filter, ordered, unique, real, durable, synced, converged.
    fn judge(history: &History) -> [usize; 7] {
        let (mut facts, wrong) = Facts::gather(&history.ops, false);
        assert_eq!(wrong, Vec::<String>::new());
        let watch = &history.watches[0];
        let real = real(history, &mut facts).len();
        let synced = synced(watch, history, &facts).len();
        let (durable, converged) = (durable(history).len(), converged(history).len());
        [filter(watch).len(), ordered(watch).len(), unique(watch).len(), real, durable, synced, converged]
    }

    fn good() -> Vec<(Time, Notice)> {
        vec![
            (22, Notice::Connected),
            (23, Notice::Hello),
            (24, update("a.x", 1, 7)),
            (26, update("a.y", 2, 8)),
            (27, end(2)),
            (44, gone("a.x", 4, false)),
            (55, update("a.x", 5, 10)),
            (101, Notice::Lost),
            (120, Notice::Connected),
            (121, Notice::Hello),
            (122, update("a.x", 5, 10)),
            (123, update("a.y", 2, 8)),
            (124, end(5)),
        ]
    }

    /// The library tells nothing twice.
    fn good_library() -> Vec<(Time, Notice)> {
        vec![
            (24, update("a.x", 1, 7)),
            (26, update("a.y", 2, 8)),
            (27, end(2)),
            (32, Notice::Lost),
            (45, Notice::Connected),
            (46, gone("a.x", 4, true)),
            (47, end(4)),
            (55, update("a.x", 5, 10)),
        ]
    }

    #[test]
    fn what_is_true_in_order_and_complete_passes_all_validators() {
        assert_eq!(judge(&history(false, &good())), [0; 7]);
        assert_eq!(judge(&history(true, &good_library())), [0; 7]);
    }

    /// What a mistake does to the good one.
    fn judge_with(library: bool, mistake: impl FnOnce(&mut Vec<(Time, Notice)>)) -> [usize; 7] {
        let mut notice = if library { good_library() } else { good() };
        mistake(&mut notice);
        judge(&history(library, &notice))
    }

    #[test]
    fn each_validator_finds_its_own() {
        let [filter, ..] = judge_with(false, |notice| notice.insert(5, (43, update("b", 3, 9))));
        assert_eq!(filter, 1);
        for pattern in ["a.x", "a", "a.x.y"] {
            assert_eq!(covers(pattern, "a.x"), pattern != "a.x.y", "{pattern}");
        }
        assert!(!covers("a.x", "a.xy") && !covers("a.*", "a") && covers("*", "a"));

        // A live change after a newer one, a snapshot out of order, one with something newer than its end.
        assert_eq!(judge_with(false, |notice| notice.insert(6, (50, update("a.y", 2, 8))))[1], 2);
        assert_eq!(judge_with(false, |notice| notice.swap(2, 3))[1], 1);
        assert_eq!(judge_with(false, |notice| notice[4].1 = end(1))[1], 1);
        // The library goes back after a reconnect.
        assert_eq!(judge_with(true, |notice| notice.insert(8, (56, update("a.x", 1, 7))))[1], 1);

        assert_eq!(judge_with(false, |notice| notice.insert(7, (56, update("a.x", 5, 10))))[2], 1);
        assert_eq!(judge_with(true, |notice| notice.insert(6, (47, update("a.y", 2, 8))))[2], 1);

        // A value that no client put, of another revision, before its put; a delete of no client; missed, and there.
        assert_eq!(judge_with(false, |notice| notice[6].1 = update("a.x", 5, 11))[3], 1);
        assert_eq!(judge_with(false, |notice| notice[3].1 = update("a.y", 1, 8))[3], 1);
        assert_eq!(judge_with(false, |notice| notice[6].0 = 49)[3], 1);
        assert_eq!(judge_with(false, |notice| notice.insert(6, (54, gone("a.y", 6, false))))[3], 1);
        assert_eq!(judge_with(true, |notice| notice[5].1 = gone("a.y", 4, true))[3], 1);
    }

    /// What differs in a state that a node has anew may have one revision, that of a delete may be too low, and a node may be
    /// behind; but nothing is deleted that no client deleted.
    #[test]
    fn behind_an_engine_only_a_delete_that_was_is_told() {
        fn judge_behind(mistake: impl FnOnce(&mut Vec<(Time, Notice)>)) -> [usize; 7] {
            let mut notice = good();
            mistake(&mut notice);
            let mut history = history(false, &notice);
            history.watches[0].behind_engine = true;
            judge(&history)
        }
        assert_eq!(judge_behind(|_| {}), [0; 7]);
        assert_eq!(judge_behind(|notice| notice[5].1 = gone("a.x", 3, false)), [0; 7]);
        assert_eq!(judge_behind(|notice| notice[0].0 = 46), [0; 7]);
        // Of a key that no client deleted; before the delete; and of what was put behind it.
        assert_eq!(judge_behind(|notice| notice[5].1 = gone("a.y", 4, false))[3], 1);
        assert_eq!(judge_behind(|notice| notice[5].0 = 39)[3], 1);
        assert_eq!(judge_behind(|notice| notice.insert(7, (60, gone("a.x", 6, false))))[3], 1);
        // Back to an older one.
        assert_eq!(judge_behind(|notice| notice.insert(7, (60, update("a.y", 2, 8))))[1], 2);
    }

    #[test]
    fn what_was_told_and_is_lost_is_not_durable() {
        for (library, notice) in [(false, good()), (true, good_library())] {
            let mut history = history(library, &notice);
            history.restarts[0].recovered = 4;
            assert!(judge(&history)[4] >= 1, "{library}");
        }
        // Read late, from a connection of the life before.
        let mut late = history(false, &good());
        late.restarts[0].recovered = 4;
        late.watches[0].notices[6].0 = 111;
        late.watches[0].notices[7].0 = 112;
        assert_eq!(judge(&late)[4], 1);
        let mut read = history(false, &[]);
        read.restarts[0].recovered = 3;
        assert_eq!(durable(&read), durable(&read).into_iter().filter(|why| why.contains("Delete")).collect::<Vec<_>>());
        assert_eq!(durable(&read).len(), 1);
        read.restarts[0].epoch = "f".into();
        assert_eq!(durable(&read).len(), 2);
    }

    #[test]
    fn a_snapshot_that_is_no_state_is_not_synced() {
        // A key that is missing, one that is stale, one that was deleted, one snapshot without an end.
        assert_eq!(judge_with(false, |notice| drop(notice.remove(3)))[5], 1);
        assert_eq!(judge_with(false, |notice| notice[10].1 = update("a.x", 1, 7))[5], 1);
        assert_eq!(judge_with(false, |notice| notice[4].1 = end(4))[5], 1);
        assert_eq!(judge_with(false, |notice| drop(notice.drain(4..8)))[5], 1);
        // Older than what was acknowledged before it was asked for.
        assert_eq!(judge_with(false, |notice| notice[0].0 = 46)[5], 1);
        assert_eq!(judge_with(true, |notice| drop(notice.remove(5)))[5], 1, "a delete that was not reported");
        assert_eq!(judge_with(true, |notice| notice[6].1 = Notice::Synced { revision: 4, epoch: "f".into() })[5], 1);
    }

    #[test]
    fn whoever_knows_less_or_more_than_the_store_has_not_converged() {
        assert_eq!(judge_with(true, |notice| drop(notice.pop()))[6], 1);
        assert_eq!(judge_with(false, |notice| drop(notice.remove(11)))[6], 1);
        assert_eq!(judge_with(true, |notice| notice.push((60, gone("a.y", 6, false))))[6], 1);
    }
}
