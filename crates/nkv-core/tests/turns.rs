//! How much is done under one hold of a lock, what runs there, and what a large delete and a large snapshot promise.
//! Work is counted; no test looks at a clock.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code too")]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Barrier, Mutex, OnceLock, mpsc};
use std::task::{Context, Wake, Waker};
use std::thread;
use std::time::Duration;

use nkv_core::mailbox::{DELETES_MAX, Inbox, Item, Mailbox, mailbox};
use nkv_core::{
    Action, BeginCause, Change, Delivery, Event, EventKind, Key, MemoryPersist, Meta, NoPersist, Notifier,
    NotifyKeyValue, Op, Outcome, Pattern, PersistErrorKind, PutOptions, Reason, Revision, SnapshotReader, Write,
    WriteError,
};
use nkv_testkit::script::{PersistScript, ScriptedNotifier, ScriptedPersist};

type Store<N = ScriptedNotifier> = NotifyKeyValue<ScriptedPersist<MemoryPersist>, N>;

/// More than anything here takes; only a hang waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

/// What one hold of a lock, one batch of a large delete and one part of a snapshot do at most.
const PART: usize = 1_024;

fn t(millis: u64) -> nkv_core::Timestamp {
    nkv_core::Timestamp::from_millis(millis)
}

fn key(number: usize) -> Key {
    Key::new(&format!("k.{number:06}")).unwrap()
}

fn put(number: usize) -> Op {
    Op::Put { key: key(number), value: "x".into(), options: PutOptions::default() }
}

fn store_of<N: Notifier>(count: usize) -> (Store<N>, PersistScript) {
    let (persist, script) = ScriptedPersist::new(MemoryPersist::default());
    let store = NotifyKeyValue::open(persist).unwrap();
    for first in (0..count).step_by(4_096) {
        store.write(&(first..count.min(first + 4_096)).map(put).collect::<Vec<_>>()).unwrap();
    }
    (store, script)
}

fn below() -> Pattern {
    Pattern::new("k.*").unwrap()
}

#[test]
fn a_large_wildcard_delete_goes_in_slices_and_its_answer_has_the_whole_count() {
    let (store, script) = store_of::<ScriptedNotifier>(5_000);
    let before = script.batches().len();
    let subscriber = ScriptedNotifier::new();
    store.subscribe(below(), "me".into(), subscriber.clone(), false);
    let (count, revision) = store.delete(&below(), None).unwrap();
    assert_eq!((count, revision.get()), (5_000, 10_000));
    let slices: Vec<usize> = script.batches()[before..].iter().map(Vec::len).collect();
    assert_eq!((slices.iter().sum::<usize>(), slices.iter().max()), (5_000, Some(&PART)));
    // In key order, each key once.
    let keys: Vec<Key> = subscriber.take().iter().filter_map(deleted).collect();
    assert!(keys.iter().eq((0..5_000).map(key).collect::<Vec<_>>().iter()));
    assert!(matches!(store.delete(&below(), None), Err(WriteError::NotFound)));
}

fn deleted(event: &Arc<Event>) -> Option<Key> {
    match event.kind() {
        EventKind::Change(change) if change.action == Action::Delete { reason: Reason::Deleted } => {
            Some(change.key.clone())
        }
        _ => None,
    }
}

#[test]
fn a_part_of_a_snapshot_ends_with_the_value_that_brings_it_to_64_kib() {
    let (store, _) = store_of::<Mailbox>(0);
    let (len, count) = (10_000, 20);
    for number in 0..count {
        store.put(&key(number), vec![0; len], PutOptions::default()).unwrap();
    }
    let (post, inbox) = mailbox();
    store.subscribe(below(), "me".into(), post, true);
    take(&inbox);
    let parts: Vec<usize> = std::iter::from_fn(|| match take(&inbox)?.kind() {
        EventKind::Snapshot(part) => Some(part.records.len()),
        other => panic!("{other:?}"),
    })
    .collect();
    assert_eq!(parts, [7, 7, 6]);
}

#[test]
fn what_is_written_while_a_large_delete_is_under_way_stays_and_is_done_between_its_slices() {
    let (store, _) = store_of::<ScriptedNotifier>(3_000);
    let mut writes = vec![Write::apart(vec![Op::Delete { pattern: below(), if_revision: None }])];
    store.commit(&mut writes);
    assert!(!writes[0].is_done());
    // Behind the place where it is, and before it; overwritten and new.
    writes.push(Write::apart(vec![put(5), put(2_999), put(2_998), put(7_000)]));
    let mut rounds = 0;
    while !writes.iter().all(Write::is_done) {
        store.commit(&mut writes);
        rounds += 1;
        assert!(rounds > 1 || writes[1].is_done(), "a put does not wait for the end of the delete");
    }
    let [delete, puts] = <[Write; 2]>::try_from(writes).unwrap().map(Write::into_results);
    assert!(matches!(delete[..], [Ok(Outcome::Deleted { count: 2_998, .. })]), "{delete:?}");
    assert_eq!(puts.iter().filter(|put| put.is_ok()).count(), 4);
    let left: Vec<Key> = store.list(&below(), None, 9).entries.into_iter().map(|(key, _)| key).collect();
    assert_eq!(left, [5, 2_998, 2_999, 7_000].map(key));
}

#[test]
fn a_large_delete_goes_on_where_it_was_however_much_was_put_before_that_place() {
    let (store, _) = store_of::<ScriptedNotifier>(0);
    store.write(&(20_000..23_000).map(put).collect::<Vec<_>>()).unwrap();
    let mut writes = [Write::apart(vec![Op::Delete { pattern: below(), if_revision: None }])];
    store.commit(&mut writes);
    store.write(&(0..9_000).map(put).collect::<Vec<_>>()).unwrap();
    for _ in 0..10 {
        store.commit(&mut writes);
    }
    assert!(writes[0].is_done());
    assert_eq!(store.get_all(&below()).len(), 9_000);
}

#[test]
fn a_large_delete_sees_what_its_caller_put_before_it_and_what_comes_behind_it_finds_nothing() {
    let (store, _) = store_of::<ScriptedNotifier>(2_000);
    let delete = || Op::Delete { pattern: below(), if_revision: None };
    let mut writes = [Write::apart(vec![put(9_000), delete(), put(1), delete()])];
    while !writes[0].is_done() {
        store.commit(&mut writes);
    }
    let [results] = writes.map(Write::into_results);
    let counts: Vec<Option<u64>> = results
        .into_iter()
        .map(|result| match result.unwrap() {
            Outcome::Deleted { count, .. } => Some(count),
            _ => None,
        })
        .collect();
    assert_eq!(counts, [None, Some(2_001), None, Some(1)]);
    assert!(!store.exists(&Pattern::All));
}

#[test]
fn a_large_delete_that_stops_half_way_says_how_much_is_gone() {
    for kind in [PersistErrorKind::NoSpace, PersistErrorKind::Io, PersistErrorKind::Poisoned] {
        let (store, script) = store_of::<ScriptedNotifier>(3_000);
        let mut writes = [Write::apart(vec![Op::Delete { pattern: below(), if_revision: None }])];
        store.commit(&mut writes);
        script.fail_always(kind);
        store.commit(&mut writes);
        assert!(writes[0].is_done());
        let [results] = writes.map(Write::into_results);
        let Err(failed) = &results[0] else { panic!("{results:?}") };
        assert_eq!((failed.error.kind(), failed.deleted), (kind, PART as u64));
        assert_eq!(store.get_all(&below()).len(), 3_000 - PART);
    }
}

#[test]
fn what_is_stored_together_is_refused_whole_if_it_is_too_large() {
    let (store, script) = store_of::<ScriptedNotifier>(16_385);
    let (before, revision) = (script.calls(), store.stats().revision);
    let puts: Vec<Op> = (0..16_385).map(put).collect();
    let delete = |pattern| Op::Delete { pattern, if_revision: None };
    let one_and_all = [delete(Pattern::from(&key(0))), delete(below())];
    for ops in [&puts[..], &[put(1), delete(below())], &one_and_all] {
        assert_eq!(store.write(ops).unwrap_err().kind(), PersistErrorKind::Rejected);
    }
    assert_eq!((script.calls(), store.stats().revision), (before, revision), "nothing of it was done");
    // Others that are done with it are.
    let mut writes = [Write::together(puts), Write::together(vec![put(1)]), Write::apart(vec![put(2)])];
    while !writes.iter().all(Write::is_done) {
        store.commit(&mut writes);
    }
    let [refused, together, apart] = writes.map(Write::into_results);
    assert!(refused.iter().all(Result::is_err) && together[0].is_ok() && apart[0].is_ok());
    assert_eq!(store.write(&(0..16_384).map(put).collect::<Vec<_>>()).unwrap().len(), 16_384);
}

fn take(inbox: &Inbox) -> Option<Arc<Event>> {
    match inbox.try_take()? {
        Item::Event { event, .. } => Some(event),
        Item::Own(never) => match never {},
    }
}

#[test]
fn a_snapshot_is_read_in_parts_when_its_reader_is_ready_and_changes_of_what_was_read_follow_it() {
    let (store, _) = store_of::<Mailbox>(3_000);
    let (post, inbox) = mailbox();
    store.subscribe(below(), "me".into(), post.clone(), true);
    assert!(matches!(take(&inbox).unwrap().kind(), EventKind::Began(began) if began.has_snapshot));
    // Nothing was copied, and nothing waits for what was not read.
    store.write(&[put(5), Op::Delete { pattern: Pattern::from(&key(6)), if_revision: None }]).unwrap();
    assert_eq!((post.backlog().queued, store.event_bytes().load(SeqCst)), (0, 0));
    let part = |inbox: &Inbox| {
        let event = take(inbox).unwrap();
        let EventKind::Snapshot(part) = event.kind() else { panic!("{event:?}") };
        (part.records.len(), part.records.get(0).unwrap().key.to_string(), part.revision.get(), part.is_last)
    };
    assert_eq!(part(&inbox), (PART, "k.000000".into(), 3_002, false));
    // Before the place where the reader is, and behind it.
    store
        .write(&[put(7), put(2_000), put(9_000), Op::Delete { pattern: Pattern::from(&key(8)), if_revision: None }])
        .unwrap();
    assert_eq!(post.backlog().queued, 2);
    let second = part(&inbox);
    assert_eq!((second.0, second.2, second.3), (PART, 3_002, false));
    let third = part(&inbox);
    assert_eq!((third.0, third.3), (3_000 - 2 * PART, true), "without 6, with 9,000");
    let rest: Vec<u64> = std::iter::from_fn(|| take(&inbox)).map(revision).collect();
    assert_eq!(rest, [3_003, 3_006], "the put of 7 and the delete of 8, which were read before");
}

fn revision(event: Arc<Event>) -> u64 {
    let EventKind::Change(change) = event.kind() else { panic!("{event:?}") };
    change.revision.get()
}

// One slow subscriber took 1.6 GiB while keys came and went, of which none was there.
#[test]
fn what_waits_for_a_subscriber_is_bounded_whatever_comes_and_goes() {
    let store: NotifyKeyValue<_, Mailbox> = NotifyKeyValue::open(NoPersist::default()).unwrap();
    let (post, inbox) = mailbox();
    store.subscribe(Pattern::All, "me".into(), post.clone(), true);
    for first in (0..50_000).step_by(1_000) {
        store.write(&(first..first + 1_000).map(put).collect::<Vec<_>>()).unwrap();
        // Some are read before they go.
        while post.backlog().queued > 500 {
            take(&inbox);
        }
        store.delete(&Pattern::All, None).unwrap();
        assert!(post.backlog().queued <= DELETES_MAX + 1_000, "{:?}", post.backlog());
    }
    // A reader of all ends with what is there, which is what came last.
    store.write(&[put(1), put(2)]).unwrap();
    let mut view = std::collections::BTreeSet::new();
    let mut read = std::collections::BTreeSet::new();
    while let Some(event) = take(&inbox) {
        match event.kind() {
            EventKind::Began(began) => {
                assert!(began.has_snapshot);
                read.clear();
            }
            EventKind::Snapshot(part) => {
                read.extend(part.records.iter().map(|record| record.key.to_string()));
                if part.is_last {
                    view = std::mem::take(&mut read);
                }
            }
            EventKind::Change(change) => match change.action {
                Action::Put { .. } => _ = view.insert(change.key.to_string()),
                Action::Delete { .. } => _ = view.remove(change.key.as_str()),
            },
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(view.into_iter().collect::<Vec<_>>(), ["k.000001", "k.000002"]);
    assert_eq!(store.event_bytes().load(SeqCst), 0);
}

#[test]
fn a_snapshot_under_way_is_finished_before_the_one_that_becomes_necessary_begins() {
    let (store, _) = store_of::<Mailbox>(6_000);
    let (post, inbox) = mailbox();
    store.subscribe(below(), "me".into(), post.clone(), true);
    let mut parts = vec![];
    let mut began = vec![];
    let read = |parts: &mut Vec<usize>, began: &mut Vec<BeginCause>| match take(&inbox).unwrap().kind() {
        EventKind::Began(new) => began.push(new.cause),
        EventKind::Snapshot(part) => parts.push(part.records.len()),
        other => panic!("{other:?}"),
    };
    // All keys but the last part's are read, then they go: too many deletes wait.
    (0..6).for_each(|_| read(&mut parts, &mut began));
    assert_eq!(parts, [PART; 5]);
    for number in 0..5 * PART {
        store.delete(&Pattern::from(&key(number)), None).unwrap();
    }
    let before = post.backlog().skipped;
    assert!(before > DELETES_MAX as u64, "what was dropped is counted");
    store.write(&[put(1)]).unwrap();
    assert_eq!(post.backlog().queued, 1, "what the next snapshot will have does not wait");
    while post.backlog().queued > 0 || parts.len() < 7 {
        read(&mut parts, &mut began);
    }
    assert_eq!(began, [BeginCause::Subscribed, BeginCause::Reset]);
    assert_eq!(parts[5..], [6_000 - 5 * PART, 6_000 - 5 * PART + 1]);
}

/// Says after how many calls others had the lock.
#[derive(Debug, Default)]
struct Counted {
    calls: AtomicU64,
    others_wait: OnceLock<(Arc<Barrier>, mpsc::Sender<u64>)>,
}

impl Notifier for Counted {
    fn notify(&self, event: &Arc<Event>) -> Delivery {
        if matches!(event.kind(), EventKind::Change(_)) && self.calls.fetch_add(1, SeqCst) == 0 {
            // From here on another thread wants the lock.
            if let Some((barrier, _)) = self.others_wait.get() {
                barrier.wait();
                thread::sleep(Duration::from_millis(100));
            }
        }
        Delivery::Queued
    }
}

#[derive(Debug)]
enum Either {
    Counted(Arc<Counted>),
    Mailbox(Mailbox),
}

impl Notifier for Either {
    fn notify(&self, event: &Arc<Event>) -> Delivery {
        match self {
            Either::Counted(counted) => counted.notify(event),
            Either::Mailbox(mailbox) => mailbox.notify(event),
        }
    }
}

#[test]
fn a_subscriber_that_begins_while_many_are_notified_waits_for_some_and_receives_each_change_once() {
    subscribe_while_many_are_notified(|store, count| {
        _ = store.write(&(0..count).map(put).collect::<Vec<_>>()).unwrap()
    });
}

#[test]
fn many_changes_of_one_revision_are_received_once_too_by_a_subscriber_that_begins_meanwhile() {
    let action = Action::Put { value: "x".into(), expiry: None };
    let change = |number| Change {
        key: key(number),
        revision: Revision::new(9),
        replaces: Revision::ZERO,
        action: action.clone(),
        meta: Meta::NONE,
    };
    subscribe_while_many_are_notified(|store, count| _ = store.apply((0..count).map(change).collect()).unwrap());
}

fn subscribe_while_many_are_notified(write: impl Fn(&Store<Either>, usize)) {
    let (store, _) = store_of::<Either>(1);
    let store = Arc::new(store);
    let counted = Arc::new(Counted::default());
    let (barrier, (sent, begun)) = (Arc::new(Barrier::new(2)), mpsc::channel());
    counted.others_wait.set((Arc::clone(&barrier), sent.clone())).unwrap();
    for id in ["1", "2", "3", "4"] {
        store.subscribe(Pattern::All, id.into(), Either::Counted(Arc::clone(&counted)), false);
    }
    let count = 4_000;
    let subscriber = thread::spawn({
        let (store, counted) = (Arc::clone(&store), Arc::clone(&counted));
        move || {
            barrier.wait();
            [true, false].map(|has_snapshot| {
                let (post, inbox) = mailbox();
                store.subscribe(Pattern::All, "other".into(), Either::Mailbox(post), has_snapshot);
                sent.send(counted.calls.load(SeqCst)).unwrap();
                let first = take(&inbox);
                assert!(matches!(first.unwrap().kind(), EventKind::Began(_)));
                let parts: Vec<usize> = std::iter::from_fn(|| match take(&inbox)?.kind() {
                    EventKind::Snapshot(part) => Some(part.records.len()),
                    _ => None,
                })
                .collect();
                (inbox, parts)
            })
        }
    });
    write(&store, count);
    let all = 4 * count as u64;
    let calls = [begun.recv_timeout(PATIENCE).unwrap(), begun.recv_timeout(PATIENCE).unwrap()];
    assert!(calls[0] < all / 2 && calls[1] < all, "it had to wait for {calls:?} of {all} notifications");
    let [(first, parts), (second, none)] = subscriber.join().unwrap();
    // All the changes were visible then, so they are in the snapshot, and none comes behind it.
    assert_eq!((parts.iter().sum::<usize>(), none.len()), (count, 0));
    assert!(matches!(take(&first).unwrap().kind(), EventKind::Ended { .. }));
    assert!(take(&first).is_none() && take(&second).is_none(), "what was there when it began comes not again");
    store.write(&[put(1)]).unwrap();
    assert!(take(&second).is_some());
}

// A part that was read while others were being notified hid the changes of the parts before it.
#[test]
fn a_part_that_is_read_while_many_are_notified_hides_no_change_of_the_parts_before_it() {
    let (store, _) = store_of::<Either>(3_000);
    let store = Arc::new(store);
    let (post, inbox) = mailbox();
    store.subscribe(below(), "me".into(), Either::Mailbox(post), true);
    let part_len = |event: Option<Arc<Event>>| match event?.kind() {
        EventKind::Snapshot(part) => Some(part.records.len()),
        _ => None,
    };
    assert_eq!((part_len(take(&inbox)), part_len(take(&inbox))), (None, Some(PART)));
    let counted = Arc::new(Counted::default());
    let barrier = Arc::new(Barrier::new(2));
    counted.others_wait.set((Arc::clone(&barrier), mpsc::channel().0)).unwrap();
    for id in ["1", "2", "3", "4"] {
        store.subscribe(Pattern::All, id.into(), Either::Counted(Arc::clone(&counted)), false);
    }
    let reader = thread::spawn(move || {
        barrier.wait();
        let second = part_len(take(&inbox));
        (inbox, second)
    });
    // The last of many is one that was read with the first part.
    store.write(&(1_024..3_000).chain([5]).map(put).collect::<Vec<_>>()).unwrap();
    let (inbox, second) = reader.join().unwrap();
    assert_eq!((second, part_len(take(&inbox))), (Some(PART), Some(3_000 - 2 * PART)));
    let rest: Vec<u64> = std::iter::from_fn(|| take(&inbox)).map(revision).collect();
    assert_eq!(rest, [4_977], "the put of 5, and nothing that the second part had");
}

/// What a reader of a mailbox knows: the revision of each key.
#[derive(Default)]
struct View {
    known: BTreeMap<String, u64>,
    /// What the parts of a snapshot have that is not whole yet.
    fresh: Option<BTreeMap<String, u64>>,
    snapshots: usize,
}

impl View {
    fn apply(&mut self, event: &Event) {
        match event.kind() {
            EventKind::Began(began) if began.has_snapshot => assert!(self.fresh.replace(BTreeMap::new()).is_none()),
            EventKind::Snapshot(part) => {
                let fresh = self.fresh.as_mut().unwrap();
                fresh.extend(part.records.iter().map(|record| (record.key.to_string(), record.revision.get())));
                if part.is_last {
                    (self.known, self.snapshots) = (self.fresh.take().unwrap(), self.snapshots + 1);
                }
            }
            EventKind::Change(change) => {
                assert!(self.fresh.is_none(), "a change within a snapshot");
                let (key, revision) = (change.key.as_str(), change.revision.get());
                let before = self.known.get(key).copied().unwrap_or_default();
                assert!(revision > before, "{key} went from {before} to {revision}");
                match change.action {
                    Action::Put { .. } => _ = self.known.insert(key.to_owned(), revision),
                    Action::Delete { .. } => _ = self.known.remove(key),
                }
            }
            _ => {}
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "it is too much for Miri")]
fn whatever_is_written_while_a_reader_reads_as_it_likes_it_ends_with_what_is_there() {
    const KEYS: usize = 6_000;
    let (store, _) = store_of::<Either>(KEYS);
    // There are turns to give in each batch.
    for id in 0..20 {
        store.subscribe(Pattern::All, id.to_string().as_str().into(), Either::Counted(Arc::default()), false);
    }
    let subscribe = |n: usize, post: &Mailbox, has_snapshot| {
        store.subscribe(below(), format!("reader {n}").as_str().into(), Either::Mailbox(post.clone()), has_snapshot);
    };
    let boxes: Vec<(Mailbox, Inbox)> = [true, false, true, true]
        .into_iter()
        .enumerate()
        .map(|(n, has_snapshot)| {
            let (post, inbox) = mailbox();
            subscribe(n, &post, has_snapshot);
            (post, inbox)
        })
        .collect();
    let before: BTreeMap<String, u64> = state(&store);
    let is_over = AtomicBool::new(false);
    let views = thread::scope(|scope| {
        let readers: Vec<_> = boxes
            .into_iter()
            .enumerate()
            .map(|(n, (post, inbox))| {
                let (is_over, before, subscribe) = (&is_over, before.clone(), &subscribe);
                scope.spawn(move || {
                    let mut view = View { known: if n == 1 { before } else { BTreeMap::new() }, ..View::default() };
                    let mut random = Random(n as u64 + 1);
                    loop {
                        let was_over = is_over.load(SeqCst);
                        // Some subscribe again and again.
                        if n >= 2 && random.below(4) == 0 {
                            subscribe(n, &post, true);
                        }
                        for _ in 0..random.below(400) {
                            take(&inbox).into_iter().for_each(|event| view.apply(&event));
                        }
                        // Some read slowly.
                        thread::sleep(Duration::from_micros(200 * n as u64));
                        if was_over {
                            std::iter::from_fn(|| take(&inbox)).for_each(|event| view.apply(&event));
                            return view;
                        }
                    }
                })
            })
            .collect();
        let mut random = Random(99);
        for _ in 0..60 {
            let first = random.below(KEYS);
            let ops: Vec<Op> = (0..random.below(2_000))
                .map(|n| {
                    let number = (first + n * 7) % KEYS;
                    let delete = || Op::Delete { pattern: Pattern::from(&key(number)), if_revision: None };
                    if random.below(3) == 0 { delete() } else { put(number) }
                })
                .collect();
            store.write(&ops).unwrap();
            if random.below(20) == 0 {
                let _ = store.delete(&below(), None);
            }
        }
        is_over.store(true, SeqCst);
        readers.into_iter().map(|reader| reader.join().unwrap()).collect::<Vec<View>>()
    });
    let after = state(&store);
    for (n, view) in views.into_iter().enumerate() {
        assert!(view.known == after, "reader {n}, after {} snapshots", view.snapshots);
    }
}

/// The revision of each key.
fn state(store: &Store<Either>) -> BTreeMap<String, u64> {
    let all = store.get_all(&Pattern::All).into_iter();
    all.map(|record| (record.key.to_string(), record.revision.get())).collect()
}

/// Numbers that look random, the same in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }
}

/// Looks at the store when it is dropped, and when it is woken.
struct Looks(Mutex<Option<Arc<NotifyKeyValue<NoPersist, Either3>>>>, AtomicBool);

impl std::fmt::Debug for Looks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Looks")
    }
}

impl Looks {
    fn look(&self) {
        if let Some(store) = &*self.0.lock().unwrap() {
            // Each takes a lock that the store holds while it notifies.
            let _ = (store.stats(), store.subscribers_of(&key(1)), store.get(&key(1)));
            store.unsubscribe(&Pattern::All, &"unknown".into());
            self.1.store(true, SeqCst);
        }
    }
}

impl Wake for Looks {
    fn wake(self: Arc<Self>) {
        self.look();
    }
}

#[derive(Debug)]
enum Either3 {
    Closed(#[allow(dead_code, reason = "it is dropped")] DropsIt),
    Open(#[allow(dead_code, reason = "it is dropped")] DropsIt),
    Mailbox(Mailbox),
}

#[derive(Debug)]
struct DropsIt(Arc<Looks>);

impl Drop for DropsIt {
    fn drop(&mut self) {
        self.0.look();
    }
}

impl Notifier for Either3 {
    fn notify(&self, event: &Arc<Event>) -> Delivery {
        match (self, event.kind()) {
            (Either3::Mailbox(mailbox), _) => mailbox.notify(event),
            (Either3::Closed(_), EventKind::Change(_)) => Delivery::Closed,
            _ => Delivery::Queued,
        }
    }
}

// A put hung for good when a notifier that looked at the store was dropped under the store's locks.
#[test]
fn no_notifier_is_dropped_and_no_waker_called_under_a_lock() {
    type Step = fn(&NotifyKeyValue<NoPersist, Either3>, &dyn Fn() -> DropsIt);
    let all: [Step; 6] = [
        // Replaced, unsubscribed, forgotten, gone with a change.
        |store, looks| {
            store.subscribe(Pattern::All, "me".into(), Either3::Open(looks()), false);
            let (post, _inbox) = mailbox();
            store.subscribe(Pattern::All, "me".into(), Either3::Mailbox(post), false);
        },
        |store, looks| {
            store.subscribe(Pattern::All, "me".into(), Either3::Open(looks()), false);
            store.unsubscribe(&Pattern::All, &"me".into());
        },
        |store, looks| {
            let gone = store.subscribe(Pattern::All, "me".into(), Either3::Open(looks()), false);
            store.forget(&[gone]);
        },
        |store, looks| {
            store.subscribe(Pattern::All, "me".into(), Either3::Closed(looks()), false);
            store.put(&key(1), "x", PutOptions::default()).unwrap();
        },
        // Woken by a change, and by the beginning.
        |store, looks| {
            let (post, inbox) = mailbox();
            let waker = Waker::from(Arc::clone(&looks().0));
            assert!(inbox.poll_take(&mut Context::from_waker(&waker)).is_pending());
            store.subscribe(Pattern::All, "me".into(), Either3::Mailbox(post), false);
        },
        |store, looks| {
            let (post, inbox) = mailbox();
            store.subscribe(Pattern::All, "me".into(), Either3::Mailbox(post), false);
            take(&inbox);
            let waker = Waker::from(Arc::clone(&looks().0));
            assert!(inbox.poll_take(&mut Context::from_waker(&waker)).is_pending());
            store.put(&key(1), "x", PutOptions::default()).unwrap();
        },
    ];
    for (number, step) in all.into_iter().enumerate() {
        let (done, waits) = mpsc::channel();
        thread::spawn(move || {
            let store = Arc::new(NotifyKeyValue::open(NoPersist::default()).unwrap());
            let looks = Arc::new(Looks(Mutex::new(Some(Arc::clone(&store))), AtomicBool::new(false)));
            step(&store, &|| DropsIt(Arc::clone(&looks)));
            done.send(looks.1.load(SeqCst)).unwrap();
            looks.0.lock().unwrap().take();
        });
        assert_eq!(waits.recv_timeout(PATIENCE), Ok(true), "step {number} hangs, or nothing looked");
    }
}

// The end was given after the lock, so that of two that subscribed at once one took a live subscription for dead.
#[test]
fn an_end_is_the_last_that_a_subscription_brings_however_many_subscribe_at_once() {
    let store: Arc<NotifyKeyValue<NoPersist, Mailbox>> = Arc::new(NotifyKeyValue::open(NoPersist::default()).unwrap());
    let inboxes: Mutex<Vec<Inbox>> = Mutex::default();
    thread::scope(|scope| {
        for thread in 0..4 {
            let (store, inboxes) = (&store, &inboxes);
            scope.spawn(move || {
                for round in 0..if cfg!(miri) { 5 } else { 500 } {
                    if thread == 3 {
                        store.put(&key(1), "x", PutOptions::default()).unwrap();
                    } else if round % 5 == 4 {
                        store.unsubscribe(&Pattern::All, &"me".into());
                    } else {
                        let (post, inbox) = mailbox();
                        store.subscribe(Pattern::All, "me".into(), post, round % 2 == 0);
                        inboxes.lock().unwrap().push(inbox);
                    }
                }
            });
        }
    });
    let mut ended = 0;
    let inboxes = inboxes.into_inner().unwrap();
    for inbox in &inboxes {
        let events: Vec<_> = std::iter::from_fn(|| take(inbox)).collect();
        assert!(matches!(events[0].kind(), EventKind::Began(_)), "{events:?}");
        let ends = events.iter().filter(|event| matches!(event.kind(), EventKind::Ended { .. })).count();
        let is_last = matches!(events.last().unwrap().kind(), EventKind::Ended { .. });
        assert!(ends == 0 || ends == 1 && is_last, "{events:?}");
        ended += ends;
    }
    assert_eq!(inboxes.len() - ended, store.stats().subscriptions as usize, "those that live have heard of no end");
}

// One mailbox may have a subscription that ends and its next that begins.
#[test]
fn an_end_comes_before_the_next_beginning_of_the_same_subscription() {
    let store: NotifyKeyValue<NoPersist, Mailbox> = NotifyKeyValue::open(NoPersist::default()).unwrap();
    let (post, inbox) = mailbox();
    thread::scope(|scope| {
        for thread in 0..3 {
            let (store, post) = (&store, &post);
            scope.spawn(move || {
                for _ in 0..if cfg!(miri) { 10 } else { 1_000 } {
                    if thread == 0 {
                        store.unsubscribe(&Pattern::All, &"me".into());
                    } else {
                        store.subscribe(Pattern::All, "me".into(), post.clone(), false);
                    }
                }
            });
        }
    });
    let events: Vec<_> = std::iter::from_fn(|| take(&inbox)).collect();
    for (at, event) in events.iter().enumerate() {
        let is_beginning = matches!(event.kind(), EventKind::Began(_));
        assert_eq!(is_beginning, at % 2 == 0, "{at}: {event:?}");
    }
}

#[test]
fn from_its_time_on_a_value_is_absent_for_all_although_storage_still_has_it() {
    let (persist, script) = ScriptedPersist::new(MemoryPersist::default());
    let store: Store = NotifyKeyValue::open(persist).unwrap();
    let until = |at| PutOptions { expiry: Some(nkv_core::Expiry { at: t(at), ttl_ms: 10 }), ..PutOptions::default() };
    for number in 1..=4 {
        store.put(&key(number), "x", until(10)).unwrap();
    }
    store.put(&key(5), "x", until(11)).unwrap();
    let subscriber = ScriptedNotifier::new();
    store.subscribe(Pattern::All, "me".into(), subscriber.clone(), false);
    script.fail_always(PersistErrorKind::Io);
    assert!(store.expire(t(10)).is_err());
    script.work();
    assert_eq!((store.get(&key(1)), store.exists(&Pattern::from(&key(1)))), (None, false));
    assert_eq!((store.get_all(&below()).len(), store.list(&below(), None, 9).entries.len()), (1, 1));
    let snapshot = ScriptedNotifier::new();
    store.subscribe(Pattern::All, "other".into(), snapshot.clone(), true);
    let events = snapshot.take();
    assert!(matches!(events[1].kind(), EventKind::Snapshot(part) if part.records.len() == 1), "{events:?}");
    assert_eq!(subscriber.take().len(), 1, "that it began: subscribers are notified when it is stored");
    // Conditions and deletes see what readers see.
    assert!(matches!(store.delete(&Pattern::from(&key(1)), None), Err(WriteError::NotFound)));
    let at = |number| PutOptions { if_revision: Some(Revision::new(number)), ..PutOptions::default() };
    assert!(matches!(store.put(&key(2), "y", at(2)), Err(WriteError::Conflict { revision: Revision::ZERO })));
    assert_eq!(store.put(&key(2), "y", at(0)).unwrap(), Revision::new(6));
    let replaced: Vec<u64> = script.batches().pop().unwrap().iter().map(|change| change.replaces.get()).collect();
    assert_eq!(replaced, [2], "storage is asked to replace what it has");
    assert_eq!(store.delete(&below(), None).unwrap().0, 2, "the two that are there");
    assert_eq!((store.expire(t(10)).unwrap(), store.expire(t(100)).unwrap()), (3, 0));
    // The time does not go back.
    store.put(&key(6), "x", until(50)).unwrap();
    store.advance(t(5));
    assert_eq!(store.get(&key(6)), None);
}

// Eight threads that put made a sync each, and took eleven times as long as the handle of a server.
#[test]
fn threads_that_write_at_the_same_time_share_a_batch() {
    let (store, script) = store_of::<ScriptedNotifier>(0);
    script.block();
    thread::scope(|scope| {
        for number in 0..8 {
            let store = &store;
            scope.spawn(move || store.put(&key(number), "x", PutOptions::default()).unwrap());
        }
        assert!(script.wait_until_blocked(PATIENCE));
        // The others are there by then; if one is late, it makes a batch more.
        thread::sleep(Duration::from_millis(300));
        script.release();
    });
    let sizes: Vec<usize> = script.batches().iter().map(Vec::len).collect();
    assert!(sizes[0] == 1 && sizes.len() <= 4 && sizes.iter().sum::<usize>() == 8, "{sizes:?}");
    // One that does not fit fails alone, and each learns what became of its own.
    script.fail_always(PersistErrorKind::NoSpace);
    assert!(store.put(&key(9), "x", PutOptions::default()).is_err());
    script.work();
    assert_eq!(store.put(&key(9), "x", PutOptions::default()).unwrap().get(), 9);
}

// The first to write did all of it at once, and a put of another thread waited for a whole delete.
#[test]
fn a_thread_that_puts_waits_for_a_slice_of_a_large_delete_and_not_for_all_of_it() {
    let (store, script) = store_of::<ScriptedNotifier>(20_000);
    let before = script.batches().len();
    script.block();
    thread::scope(|scope| {
        let deletes = scope.spawn(|| store.delete(&below(), None).unwrap().0);
        assert!(script.wait_until_blocked(PATIENCE));
        scope.spawn(|| store.put(&Key::new("other").unwrap(), "x", PutOptions::default()).unwrap());
        // The other is there by then; on a machine that is very busy it may come between two later slices.
        thread::sleep(Duration::from_millis(300));
        script.release();
        assert_eq!(deletes.join().unwrap(), 20_000);
    });
    let batches = script.batches().split_off(before);
    let at = batches.iter().position(|batch| batch.iter().any(|change| change.key.as_str() == "other"));
    assert!(at.is_some_and(|at| at + 1 < batches.len()), "{at:?} of {}", batches.len());
}

#[test]
fn a_reader_of_a_scripted_snapshot_reads_each_part_once() {
    let reader = SnapshotReader::of([]);
    assert!(reader.next_part().is_none() && reader.reset() && !reader.has_ended());
}
