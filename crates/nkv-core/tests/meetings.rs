//! What a write, a reader, a waker or a notifier of one thread may meet of another: each of these once went wrong.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code too")]

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Wake, Waker};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use nkv_core::mailbox::{Item, Mailbox, mailbox};
use nkv_core::{
    Action, Change, Delivery, Event, EventKind, Key, NoPersist, Notifier, NotifyKeyValue, Op, Pattern, PutOptions,
    Write,
};

fn key(number: usize) -> Key {
    Key::new(&format!("k.{number:06}")).unwrap()
}

fn put_of(number: usize, value: &'static str) -> Op {
    Op::Put { key: key(number), value: value.into(), options: PutOptions::default() }
}

fn below() -> Pattern {
    Pattern::new("k.*").unwrap()
}

/// More than anything here takes; only a hang waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

type Store = NotifyKeyValue<NoPersist, Box<dyn Notifier>>;

fn fill(store: &Store, count: usize) {
    for first in (0..count).step_by(4_000) {
        store.write(&(first..first + 4_000).map(|n| put_of(n, "x")).collect::<Vec<_>>()).unwrap();
    }
}

/// At the first change, lets another thread read, and gives it the time to come to the lock.
#[derive(Debug)]
struct LetsRead {
    has: AtomicBool,
    go: Mutex<mpsc::Sender<()>>,
}

impl Notifier for LetsRead {
    fn notify(&self, event: &Arc<Event>) -> Delivery {
        if matches!(event.kind(), EventKind::Change(_)) && !self.has.swap(true, SeqCst) {
            self.go.lock().unwrap().send(()).unwrap();
            thread::sleep(Duration::from_millis(300));
        }
        Delivery::Queued
    }
}

#[test]
fn a_change_of_a_key_that_was_read_before_the_batch_is_not_missed() {
    let store: Arc<Store> = Arc::new(NotifyKeyValue::open(NoPersist::default()).unwrap());
    store.write(&(0..1_500).map(|n| put_of(n, "old")).collect::<Vec<_>>()).unwrap();
    let (post, inbox) = mailbox::<()>();
    store.subscribe(below(), "me".into(), Box::new(post), true);
    assert!(matches!(inbox.try_take(), Some(Item::Event { .. }))); // began
    let Some(Item::Event { event, .. }) = inbox.try_take() else { panic!() };
    let EventKind::Snapshot(part) = event.kind() else { panic!() };
    assert!(!part.is_last); // keys 0..1024 at "old"
    let (go, gone) = mpsc::channel();
    store.subscribe(
        below(),
        "gate".into(),
        Box::new(LetsRead { has: AtomicBool::new(false), go: Mutex::new(go) }),
        false,
    );
    let reader = thread::spawn(move || {
        gone.recv().unwrap();
        let Some(Item::Event { event, .. }) = inbox.try_take() else { panic!() };
        let EventKind::Snapshot(part) = event.kind() else { panic!() };
        assert!(part.is_last);
        inbox
    });
    // 1,200 changes of other keys; the last change is of key 0, which was read.
    let mut ops: Vec<Op> = (0..1_200).map(|n| put_of(1_024 + n % 476, "other")).collect();
    ops.push(put_of(0, "new"));
    store.write(&ops).unwrap();
    let inbox = reader.join().unwrap();
    let mut seen = None;
    while let Some(Item::Event { event, .. }) = inbox.try_take() {
        if let EventKind::Change(Change { key: changed, action: Action::Put { value, .. }, .. }) = event.kind()
            && *changed == key(0)
        {
            seen = Some(value.clone());
        }
    }
    assert_eq!(seen, Some(Bytes::from("new")), "the change of key 0 is missing");
}

/// At the first change: has another thread do something, and waits until it is done.
#[derive(Debug)]
struct Meanwhile {
    done: AtomicBool,
    go: Mutex<mpsc::Sender<()>>,
    back: Mutex<mpsc::Receiver<()>>,
}
impl Notifier for Meanwhile {
    fn notify(&self, event: &Arc<Event>) -> Delivery {
        if matches!(event.kind(), EventKind::Change(_)) && !self.done.swap(true, SeqCst) {
            self.go.lock().unwrap().send(()).unwrap();
            self.back.lock().unwrap().recv().unwrap();
        }
        Delivery::Queued
    }
}

#[test]
fn what_another_thread_has_given_up_meanwhile_is_not_followed_by_older_changes() {
    let store: Arc<Store> = Arc::new(NotifyKeyValue::open(NoPersist::default()).unwrap());
    let (go, gone) = mpsc::channel();
    let (ready, back) = mpsc::channel();
    let (post, inbox) = mailbox::<()>();
    let observer = post.observer();
    let meanwhile = Meanwhile { done: AtomicBool::new(false), go: Mutex::new(go), back: Mutex::new(back) };
    store.subscribe(below(), "a".into(), Box::new(meanwhile), false);
    store.subscribe(below(), "b".into(), Box::new(post), false);
    let other = thread::spawn(move || {
        gone.recv().unwrap();
        observer.give_up(); // as a budget does that has no room left
        ready.send(()).unwrap();
    });
    store.put(&key(1), "older", PutOptions::default()).unwrap();
    store.put(&key(1), "newer", PutOptions::default()).unwrap();
    other.join().unwrap();
    let mut seen = Vec::new();
    while let Some(Item::Event { event, .. }) = inbox.try_take() {
        match event.kind() {
            EventKind::Snapshot(part) => {
                part.records.iter().for_each(|record| seen.push((record.revision, record.value.to_bytes())))
            }
            EventKind::Change(Change { revision, action: Action::Put { value, .. }, .. }) => {
                seen.push((*revision, value.clone()))
            }
            _ => {}
        }
    }
    assert!(seen.is_sorted(), "{seen:?}");
    assert_eq!(seen.last().unwrap().1, "newer");
}

#[test]
fn a_wildcard_delete_of_a_together_write_leaves_nothing_behind() {
    let store: Store = NotifyKeyValue::open(NoPersist::default()).unwrap();
    fill(&store, 20_000);
    let delete = |pattern| Op::Delete { pattern, if_revision: None };
    let result = store.write(&[delete(Pattern::Key(key(0))), delete(below())]);
    assert!(result.is_err() || !store.exists(&below()), "{result:?}: {} keys are left", store.get_all(&below()).len());
}

#[test]
fn a_put_does_not_wait_for_the_end_of_four_large_deletes() {
    let store: Store = NotifyKeyValue::open(NoPersist::default()).unwrap();
    for branch in 0..4 {
        let put = |n| Op::Put {
            key: Key::new(&format!("b{branch}.k{n}")).unwrap(),
            value: "x".into(),
            options: PutOptions::default(),
        };
        store.write(&(0..16_000).map(put).collect::<Vec<_>>()).unwrap();
    }
    let delete = |b: usize| {
        Write::apart(vec![Op::Delete { pattern: Pattern::new(&format!("b{b}.*")).unwrap(), if_revision: None }])
    };
    let mut writes: Vec<Write> = (0..4).map(delete).collect();
    writes.push(Write::apart(vec![put_of(1, "x")]));
    let mut rounds = 0;
    while !writes[4].is_done() {
        store.commit(&mut writes);
        rounds += 1;
    }
    assert!(rounds <= 2, "the put waited for {rounds} batches");
}

#[test]
fn a_put_does_not_wait_for_the_end_of_a_delete_because_a_batch_of_4096_is_before_it() {
    let store: Store = NotifyKeyValue::open(NoPersist::default()).unwrap();
    fill(&store, 20_000);
    let mut writes = vec![
        Write::apart(vec![Op::Delete { pattern: below(), if_revision: None }]),
        Write::together(
            (0..4_096)
                .map(|n| Op::Put {
                    key: Key::new(&format!("o.{n}")).unwrap(),
                    value: "x".into(),
                    options: PutOptions::default(),
                })
                .collect(),
        ),
        Write::apart(vec![put_of(1, "x")]),
    ];
    let mut rounds = 0;
    while !writes[2].is_done() {
        store.commit(&mut writes);
        rounds += 1;
    }
    assert!(rounds <= 3, "the put waited for {rounds} batches");
}

/// Puts a value when it is woken.
struct PutsWhenWoken(Arc<NotifyKeyValue<NoPersist, Mailbox>>);
impl Wake for PutsWhenWoken {
    fn wake(self: Arc<Self>) {
        self.0.put(&key(2), "y", PutOptions::default()).unwrap();
    }
}

#[test]
fn a_waker_that_writes_does_not_hang_a_put() {
    let (done, waits) = mpsc::channel();
    thread::spawn(move || {
        let store = Arc::new(NotifyKeyValue::open(NoPersist::default()).unwrap());
        let (post, inbox) = mailbox();
        store.subscribe(Pattern::Key(key(1)), "me".into(), post, false);
        inbox.try_take();
        let waker = Waker::from(Arc::new(PutsWhenWoken(Arc::clone(&store))));
        assert!(inbox.poll_take(&mut Context::from_waker(&waker)).is_pending());
        store.put(&key(1), "x", PutOptions::default()).unwrap();
        done.send(()).unwrap();
    });
    assert!(waits.recv_timeout(PATIENCE).is_ok(), "the put hangs");
}

/// Ends at the first change, and puts a value when it is dropped.
#[derive(Debug)]
struct PutsWhenDropped(Arc<NotifyKeyValue<NoPersist, PutsWhenDropped>>);

impl Notifier for PutsWhenDropped {
    fn notify(&self, event: &Arc<Event>) -> Delivery {
        if matches!(event.kind(), EventKind::Change(_)) { Delivery::Closed } else { Delivery::Queued }
    }
}

impl Drop for PutsWhenDropped {
    fn drop(&mut self) {
        self.0.put(&key(2), "gone", PutOptions::default()).unwrap();
    }
}

#[test]
fn a_notifier_that_writes_when_it_is_dropped_does_not_hang_a_put() {
    let (done, waits) = mpsc::channel();
    thread::spawn(move || {
        let store = Arc::new(NotifyKeyValue::open(NoPersist::default()).unwrap());
        store.subscribe(Pattern::Key(key(1)), "me".into(), PutsWhenDropped(Arc::clone(&store)), false);
        store.put(&key(1), "x", PutOptions::default()).unwrap();
        done.send(()).unwrap();
    });
    assert!(waits.recv_timeout(PATIENCE).is_ok(), "the put hangs");
}

#[test]
fn two_threads_take_from_one_inbox() {
    for round in 0..200 {
        let store: Arc<NotifyKeyValue<NoPersist, Mailbox>> =
            Arc::new(NotifyKeyValue::open(NoPersist::default()).unwrap());
        store.write(&(0..1_500).map(|n| put_of(n, "x")).collect::<Vec<_>>()).unwrap();
        let (post, inbox) = mailbox();
        store.subscribe(below(), "me".into(), post, true);
        let inbox = Arc::new(inbox);
        let takers: Vec<_> = (0..2)
            .map(|_| {
                let inbox = Arc::clone(&inbox);
                thread::spawn(move || {
                    let mut all = Vec::new();
                    while let Some(item) = inbox.try_take() {
                        all.push(item);
                    }
                    all
                })
            })
            .collect();
        let mut keys = 0;
        for taker in takers {
            for item in taker.join().unwrap() {
                if let Item::Event { event, .. } = item
                    && let EventKind::Snapshot(part) = event.kind()
                {
                    keys += part.records.len();
                }
            }
        }
        assert_eq!(keys, 1_500, "round {round}");
        store.put(&key(1), "y", PutOptions::default()).unwrap();
        assert!(inbox.try_take().is_some(), "round {round}: missed");
    }
}

#[test]
fn a_put_of_another_thread_does_not_wait_for_the_end_of_a_large_delete() {
    let store: Arc<Store> = Arc::new(NotifyKeyValue::open(NoPersist::default()).unwrap());
    fill(&store, 100_000);
    let other = Arc::clone(&store);
    let deletes = thread::spawn(move || other.delete(&below(), None).unwrap());
    while store.stats().deletes == 0 {
        thread::yield_now();
    }
    store.put(&Key::new("other").unwrap(), "x", PutOptions::default()).unwrap();
    let gone = store.stats().deletes;
    deletes.join().unwrap();
    assert!(gone < 50_000, "{gone} were gone");
}
