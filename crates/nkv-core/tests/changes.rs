//! The stream of every change: what it gives, what bounds it, and when it ends.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code too")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::Duration;

use nkv_core::mailbox::Mailbox;
use nkv_core::{
    Action, CHANGES_LEN_MAX, Change, Changes, Epoch, Expiry, Gap, Key, MemoryPersist, Meta, NotifyKeyValue, Op,
    Pattern, PutOptions, Reason, Revision, Timestamp, Write,
};

type Store = NotifyKeyValue<MemoryPersist, Mailbox>;

const HERE: Epoch = Epoch::new(1);

/// More than anything here takes; only a hang waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

fn store() -> Store {
    NotifyKeyValue::open(MemoryPersist::new(HERE)).unwrap()
}

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

fn r(number: u64) -> Revision {
    Revision::new(number)
}

fn put(at: &str) -> Op {
    Op::Put { key: key(at), value: "x".into(), options: PutOptions::default() }
}

fn change(at: &str, revision: u64) -> Change {
    let action = Action::Put { value: "x".into(), expiry: None };
    Change { key: key(at), revision: r(revision), replaces: Revision::ZERO, action, meta: Meta::NONE }
}

fn follow(store: &Store) -> Changes {
    store.changes(None, CHANGES_LEN_MAX).unwrap()
}

/// The groups that wait, as `key@revision`, with the revision to resume from behind each.
fn groups(changes: &mut Changes) -> Vec<String> {
    let next = || changes.try_next().unwrap();
    std::iter::from_fn(next)
        .map(|group| {
            let all: Vec<String> = group.changes.iter().map(|c| format!("{}@{}", c.key, c.revision)).collect();
            format!("{} /{}", all.join(" "), group.resume.map(|r| r.to_string()).unwrap_or_default())
        })
        .collect()
}

#[test]
fn what_one_caller_gave_as_one_is_one_group_whatever_shared_its_batch() {
    let store = store();
    let mut changes = follow(&store);
    let delete = |what: &str| Op::Delete { pattern: Pattern::new(what).unwrap(), if_revision: None };
    let mut writes = [
        Write::together(vec![put("a.x"), put("a.y")]),
        Write::apart(vec![put("b"), delete("none"), put("c")]),
        Write::together(vec![delete("a.*"), put("d")]),
        Write::apart(vec![delete("b")]),
    ];
    while !writes.iter().all(Write::is_done) {
        store.commit(&mut writes);
    }
    assert_eq!(store.stats().batches, 1);
    let expected = ["a.x@1 a.y@2 /2", "b@3 /3", "c@4 /4", "a.x@5 a.y@6 d@7 /7", "b@8 /8"];
    assert_eq!(groups(&mut changes), expected);
    store.apply(vec![change("e", 9), change("f", 9), change("g", 10)]).unwrap();
    assert_eq!(groups(&mut changes), ["e@9 f@9 g@10 /10"]);
}

#[test]
fn a_change_is_given_as_it_was_committed() {
    let store = store();
    let mut changes = follow(&store);
    let t = Timestamp::from_millis;
    let expiry = Some(Expiry { at: t(5), ttl_ms: 5 });
    store.put(&key("a"), vec![7; 5_000], PutOptions { expiry, if_revision: None }).unwrap();
    store.expire(t(9)).unwrap();
    let meta = Meta::new(b"stamp");
    store.apply(vec![Change { meta: meta.clone(), ..change("b", 7) }]).unwrap();
    let [put, expired, applied] = [(); 3].map(|()| changes.try_next().unwrap().unwrap().changes[0].clone());
    let value = store.get(&key("b")).map(|record| record.value);
    assert_eq!(put.action, Action::Put { value: vec![7; 5_000].into(), expiry });
    assert_eq!((expired.replaces, expired.action), (r(1), Action::Delete { reason: Reason::Expired }));
    assert_eq!((applied.revision, applied.meta, value), (r(7), meta, Some("x".into())));
    // Tombstones and what drops them are changes too; what an engine keeps for itself is its own.
    let delete = |at: Key, revision, meta| Change {
        key: at,
        action: Action::Delete { reason: Reason::Deleted },
        meta,
        ..change("x", revision)
    };
    let seen = Key::reserved("seen").unwrap();
    store.apply(vec![delete(key("c"), 8, Meta::new(b"")), delete(seen, 9, Meta::new(b"9"))]).unwrap();
    assert_eq!(groups(&mut changes), ["c@8 /9"]);
}

#[test]
fn a_slice_of_a_large_delete_is_a_group() {
    let store = store();
    store.write(&(0..2_000).map(|n| put(&format!("k.{n:04}"))).collect::<Vec<_>>()).unwrap();
    let mut changes = follow(&store);
    store.delete(&Pattern::All, None).unwrap();
    let lens: Vec<usize> =
        std::iter::from_fn(|| changes.try_next().unwrap()).map(|group| group.changes.len()).collect();
    assert_eq!(lens, [1_024, 976]);
}

#[test]
fn a_point_to_resume_from_is_behind_the_last_change_of_a_revision() {
    let store = store();
    store.apply((0..2_000).map(|n| change(&format!("k.{n:04}"), 1)).collect()).unwrap();
    let mut changes = follow(&store);
    store.replace(vec![change("a", 2)], r(2), HERE).unwrap();
    let resume: Vec<_> = std::iter::from_fn(|| changes.try_next().unwrap())
        .map(|group| (group.changes.len(), group.resume.map(Revision::get)))
        .collect();
    assert_eq!(resume, [(1_024, None), (977, Some(2))]);
}

#[test]
fn a_reader_goes_on_at_a_revision_that_another_still_holds() {
    let store = store();
    let write = |ops: &[&str]| _ = store.write(&ops.iter().map(|at| put(at)).collect::<Vec<_>>()).unwrap();
    write(&["a"]);
    let mut slow = follow(&store);
    let mut fast = follow(&store);
    write(&["b"]);
    write(&["c", "d"]);
    assert_eq!(groups(&mut fast), ["b@2 /2", "c@3 d@4 /4"]);
    drop(fast);
    let after = |revision| store.changes(Some((HERE, r(revision))), CHANGES_LEN_MAX);
    for (revision, expected) in [(1, 2), (2, 1), (4, 0)] {
        let mut changes = after(revision).unwrap();
        assert_eq!(changes.since(), r(revision));
        assert_eq!(groups(&mut changes).len(), expected, "after {revision}");
    }
    // Before what is held; within a group; not yet.
    for revision in [0, 3, 5] {
        assert_eq!(after(revision).unwrap_err(), Gap { revision: r(4), epoch: HERE }, "after {revision}");
    }
    assert!(store.changes(Some((Epoch::new(9), r(4))), CHANGES_LEN_MAX).is_err());
    assert_eq!(groups(&mut slow).len(), 2);
    assert!(after(1).is_err() && after(2).is_err() && after(4).is_ok(), "what all have read is not held");
    drop(slow);
    write(&["e"]);
    assert!(after(4).is_err() && after(5).is_ok());
}

#[test]
fn a_reader_that_falls_behind_has_a_gap_and_the_others_go_on() {
    let store = store();
    let mut changes = follow(&store);
    store.put(&key("k"), "x", PutOptions::default()).unwrap();
    let one = size_of::<Change>() + 2;
    drop(changes.try_next());
    let mut slow = store.changes(None, 3 * one).unwrap();
    for number in 2..=4 {
        store.put(&key("k"), "x", PutOptions::default()).unwrap();
        assert_eq!(store.stats().revision, r(number));
    }
    let mut other = store.changes(Some((HERE, r(2))), 2 * one).unwrap();
    assert!(store.changes(Some((HERE, r(1))), 2 * one).is_err(), "it would begin with too much");
    assert!(slow.try_next().unwrap().is_some(), "three fit");
    for _ in 0..2 {
        store.put(&key("k"), "x", PutOptions::default()).unwrap();
    }
    let gap = Gap { revision: r(6), epoch: HERE };
    assert_eq!((slow.try_next(), slow.try_next()), (Err(gap), Err(gap)));
    assert_eq!(other.try_next(), Err(gap));
    assert_eq!(groups(&mut changes).len(), 5);
    store.put(&key("k"), "x", PutOptions::default()).unwrap();
    assert_eq!((groups(&mut changes).len(), slow.try_next().unwrap_err().revision), (1, r(7)));
}

#[test]
fn another_epoch_is_a_gap() {
    let store = store();
    store.apply(vec![change("a", 8)]).unwrap();
    let mut changes = follow(&store);
    store.apply(vec![change("a", 9)]).unwrap();
    store.replace(vec![change("a", 9)], r(9), Epoch::new(2)).unwrap();
    let gap = Gap { revision: r(9), epoch: Epoch::new(2) };
    assert_eq!(changes.try_next(), Err(gap));
    assert_eq!(store.changes(Some((HERE, r(9))), CHANGES_LEN_MAX).unwrap_err(), gap);
    let mut next = store.changes(Some((Epoch::new(2), r(9))), CHANGES_LEN_MAX).unwrap();
    store.apply(vec![change("a", 10)]).unwrap();
    assert_eq!((groups(&mut next), next.epoch()), (vec!["a@10 /10".to_owned()], Epoch::new(2)));
}

#[derive(Default)]
struct Counted(AtomicUsize);

impl Wake for Counted {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, SeqCst);
    }
}

#[test]
fn a_polling_reader_is_woken_by_a_change_a_gap_and_the_end_of_the_store() {
    let store = store();
    let mut changes = store.changes(None, 1_000).unwrap();
    let wakes = Arc::new(Counted::default());
    let waker = Waker::from(Arc::clone(&wakes));
    let mut cx = Context::from_waker(&waker);
    assert!(changes.poll_next(&mut cx).is_pending());
    store.put(&key("a"), "x", PutOptions::default()).unwrap();
    assert_eq!(wakes.0.load(SeqCst), 1);
    assert!(matches!(changes.poll_next(&mut cx), Poll::Ready(Ok(Some(_)))));
    assert!(changes.poll_next(&mut cx).is_pending());
    let mut other = store.changes(None, 1_000).unwrap();
    assert!(other.poll_next(&mut cx).is_pending());
    // However long it is, a reader that had taken all takes it.
    store.put(&key("a"), vec![0; 2_000], PutOptions::default()).unwrap();
    assert_eq!(wakes.0.load(SeqCst), 3);
    assert!(matches!(other.poll_next(&mut cx), Poll::Ready(Ok(Some(_)))));
    store.put(&key("a"), "x", PutOptions::default()).unwrap();
    assert!(matches!(changes.poll_next(&mut cx), Poll::Ready(Err(_))));
    let mut last = store.changes(None, 1_000).unwrap();
    store.put(&key("b"), "x", PutOptions::default()).unwrap();
    assert!(last.try_next().unwrap().is_some());
    assert!(last.poll_next(&mut cx).is_pending());
    drop(store);
    assert_eq!(wakes.0.load(SeqCst), 4);
    assert!(matches!(last.poll_next(&mut cx), Poll::Ready(Ok(None))));
}

#[test]
fn a_thread_waits_for_changes_and_for_the_end() {
    let store = store();
    let mut changes = follow(&store);
    assert_eq!(changes.next_timeout(Duration::from_millis(1)), Ok(None));
    let reader = thread::spawn(move || {
        let first = changes.next_blocking().unwrap().map(|group| group.resume);
        let second = changes.next_timeout(PATIENCE).unwrap().map(|group| group.resume);
        (first, second, changes.next_blocking().unwrap().is_none())
    });
    for _ in 0..2 {
        store.put(&key("a"), "x", PutOptions::default()).unwrap();
    }
    drop(store);
    assert_eq!(reader.join().unwrap(), (Some(Some(r(1))), Some(Some(r(2))), true));
}
