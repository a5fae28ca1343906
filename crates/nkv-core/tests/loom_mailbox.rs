//! Every interleaving of the mailbox, of an event's memo, and of a store that is written to and subscribed to, up to a
//! bound, explored with loom. A lost wake-up shows as a deadlock.
//!
//! `RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom LOOM_MAX_PREEMPTIONS=3 \
//!     cargo test -p nkv-core --release --test loom_mailbox`
#![cfg(loom)]
#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code too")]

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use loom::future::block_on;
use loom::thread;
use nkv_core::mailbox::{Inbox, Item, Mailbox, mailbox};
use nkv_core::{
    Action, Change, Delivery, Event, EventKind, Key, Meta, NoPersist, Notifier, NotifyKeyValue, Pattern, PutOptions,
    Revision,
};

fn put(key: &str, revision: u64) -> Arc<Event> {
    let action = Action::Put { value: Default::default(), expiry: None };
    let key = Key::new(key).unwrap();
    Event::new(EventKind::Change(Change {
        key,
        revision: Revision::new(revision),
        replaces: Revision::ZERO,
        action,
        meta: Meta::NONE,
    }))
}

/// What a reader believes, and how many changes it received or was said to have missed.
#[derive(Debug, Default)]
struct View {
    newest: BTreeMap<String, u64>,
    last: u64,
    accounted: u64,
    own: Vec<u32>,
}

impl View {
    fn apply(&mut self, item: Item<u32>) {
        match item {
            Item::Own(own) => self.own.push(own),
            Item::Event { event, skipped } => {
                let EventKind::Change(change) = event.kind() else { panic!("only changes are posted") };
                let revision = change.revision.get();
                assert!(revision > self.last, "{revision} was received after {}", self.last);
                self.last = revision;
                self.accounted += 1 + skipped;
                self.newest.insert(change.key.to_string(), revision);
            }
        }
    }
}

fn read_blocking(inbox: &Inbox<u32>) -> View {
    let mut view = View::default();
    while let Some(item) = inbox.take_blocking() {
        view.apply(item);
    }
    view
}

fn read_polling(inbox: &Inbox<u32>) -> View {
    block_on(async {
        let mut view = View::default();
        while let Some(item) = inbox.take().await {
            view.apply(item);
        }
        view
    })
}

/// Two threads that give changes in the order of their revisions, as a store does: under a lock of theirs.
/// As an outbox reads: many at a time, and not again while it is waited for.
fn read_many(inbox: &Inbox<u32>) -> View {
    let (mut view, mut items) = (View::default(), Vec::new());
    block_on(poll_fn(|cx| {
        loop {
            if inbox.is_waited_for() {
                return Poll::Pending;
            }
            if inbox.poll_take_many(cx, 1_000, &mut items) == Poll::Ready(false) {
                return Poll::Ready(());
            }
            items.drain(..).for_each(|item| view.apply(item));
        }
    }));
    view
}

fn two_posters(post: Mailbox<u32>, keys: [&'static str; 2]) -> Vec<thread::JoinHandle<()>> {
    let revisions = Arc::new(loom::sync::Mutex::new(0));
    let spawn = |key: &'static str| {
        let (post, revisions) = (post.clone(), Arc::clone(&revisions));
        thread::spawn(move || {
            let mut revision = revisions.lock().unwrap();
            *revision += 1;
            assert_ne!(post.notify(&put(key, *revision)), Delivery::Closed);
        })
    };
    keys.map(spawn).into()
}

fn all_is_received(keys: [&'static str; 2], read: fn(&Inbox<u32>) -> View) {
    loom::model(move || {
        let (post, inbox) = mailbox();
        let posters = two_posters(post, keys);
        let view = read(&inbox);
        posters.into_iter().for_each(|poster| poster.join().unwrap());
        assert_eq!((view.last, view.accounted), (2, 2), "the last change is received, and none is unaccounted for");
        let keys = if keys[0] == keys[1] { 1 } else { 2 };
        assert_eq!(view.newest.len(), keys, "each key is received");
    });
}

#[test]
fn a_polling_reader_receives_the_latest_of_one_key() {
    all_is_received(["a", "a"], read_polling);
}

#[test]
fn a_polling_reader_receives_the_latest_of_two_keys() {
    all_is_received(["a", "b"], read_polling);
}

#[test]
fn a_reader_of_many_at_a_time_receives_the_latest_of_two_keys() {
    all_is_received(["a", "b"], read_many);
}

#[test]
fn a_blocking_reader_receives_the_latest_of_one_key() {
    all_is_received(["a", "a"], read_blocking);
}

#[test]
fn a_blocking_reader_receives_the_latest_of_two_keys() {
    all_is_received(["a", "b"], read_blocking);
}

/// The mailbox stays open: only the posts themselves can wake the reader.
fn the_last_change_arrives(take: fn(&Inbox<u32>) -> Option<Item<u32>>) {
    loom::model(move || {
        let (post, inbox) = mailbox();
        let posters = two_posters(post.clone(), ["a", "a"]);
        let mut view = View::default();
        while view.last < 2 {
            view.apply(take(&inbox).unwrap());
        }
        assert_eq!(view.accounted, 2);
        posters.into_iter().for_each(|poster| poster.join().unwrap());
        assert!(!post.is_closed());
    });
}

#[test]
fn a_polling_reader_of_an_open_mailbox_is_woken_for_the_last_change() {
    the_last_change_arrives(|inbox| block_on(inbox.take()));
}

#[test]
fn a_blocking_reader_of_an_open_mailbox_is_woken_for_the_last_change() {
    the_last_change_arrives(Inbox::take_blocking);
}

/// As an outbox reads: while the mailbox says that it will wake the reader, the reader does not even look.
#[test]
fn a_reader_that_does_not_look_while_it_is_waited_for_is_woken_for_the_last_change() {
    the_last_change_arrives(|inbox| {
        let take = poll_fn(|cx| if inbox.is_waited_for() { Poll::Pending } else { inbox.poll_take(cx) });
        block_on(take)
    });
}

/// One posts while another closes: the reader ends, and has got all that was accepted.
fn closing_loses_nothing_that_was_accepted(read: fn(&Inbox<u32>) -> View) {
    loom::model(move || {
        let (post, inbox) = mailbox();
        let closer = post.clone();
        let poster = thread::spawn(move || {
            let own = u64::from(post.post(7).is_ok());
            let change = u64::from(post.notify(&put("a", 1)) != Delivery::Closed);
            (own, change)
        });
        let closer = thread::spawn(move || closer.close());
        let view = read(&inbox);
        let (own, change) = poster.join().unwrap();
        closer.join().unwrap();
        assert_eq!((view.own.len() as u64, view.accounted), (own, change));
    });
}

#[test]
fn a_polling_reader_ends_when_a_poster_closes_and_misses_nothing() {
    closing_loses_nothing_that_was_accepted(read_polling);
}

#[test]
fn a_reader_of_many_at_a_time_ends_when_a_poster_closes_and_misses_nothing() {
    closing_loses_nothing_that_was_accepted(read_many);
}

#[test]
fn a_blocking_reader_ends_when_a_poster_closes_and_misses_nothing() {
    closing_loses_nothing_that_was_accepted(read_blocking);
}

#[test]
fn a_reader_that_leaves_while_two_post_is_noticed_by_later_posters() {
    loom::model(|| {
        let (post, inbox) = mailbox::<u32>();
        let _ = post.notify(&put("a", 1));
        let other = post.clone();
        let poster = thread::spawn(move || other.notify(&put("a", 2)));
        let leaver = thread::spawn(move || drop(inbox));
        let _ = poster.join().unwrap();
        leaver.join().unwrap();
        assert_eq!(post.notify(&put("a", 3)), Delivery::Closed);
        assert_eq!(post.backlog().queued, 0);
    });
}

#[test]
fn what_two_derive_from_an_event_is_made_once() {
    loom::model(|| {
        let (event, made) = (put("a", 1), Arc::new(loom::sync::atomic::AtomicU64::new(0)));
        let derive = |event: &Event, made: &loom::sync::atomic::AtomicU64| {
            event.memo(|_| made.fetch_add(1, loom::sync::atomic::Ordering::Relaxed))
        };
        let other = {
            let (event, made) = (Arc::clone(&event), Arc::clone(&made));
            thread::spawn(move || derive(&event, &made))
        };
        let own = derive(&event, &made);
        // What another family derives lies beside it.
        assert_eq!(*event.memo(|_| "other"), "other");
        assert!(Arc::ptr_eq(&own, &other.join().unwrap()), "both have the same");
        assert_eq!((*own, *event.memo(|_| "again")), (0, "other"));
    });
}

/// What a subscriber received of the one key there is, oldest first: revisions, those of the snapshot included.
fn revisions(inbox: &Inbox<u32>) -> Vec<u64> {
    let mut revisions = Vec::new();
    while let Some(Item::Event { event, .. }) = inbox.try_take() {
        match event.kind() {
            EventKind::Snapshot(snapshot) => {
                revisions.extend(snapshot.records.iter().map(|record| record.revision.get()))
            }
            EventKind::Change(change) => revisions.push(change.revision.get()),
            EventKind::Began(_) => {}
            other => panic!("{other:?} was not expected"),
        }
    }
    revisions
}

#[test]
fn a_subscriber_that_begins_during_a_write_is_notified_once_and_readers_see_what_was_acknowledged() {
    loom::model(|| {
        let store: Arc<NotifyKeyValue<_, Mailbox<u32>>> = Arc::new(NotifyKeyValue::open(NoPersist::default()).unwrap());
        let writer = {
            let store = Arc::clone(&store);
            thread::spawn(move || {
                let key = Key::new("a").unwrap();
                let revision = store.put(&key, "x", PutOptions::default()).unwrap();
                assert_eq!(store.get(&key).unwrap().revision, revision, "a writer sees its own write");
            })
        };
        let (post, inbox) = mailbox();
        store.subscribe(Pattern::All, "me".into(), post, true);
        writer.join().unwrap();
        assert_eq!(revisions(&inbox), [1], "in the snapshot or after it, not in neither, not in both");
    });
}

#[test]
fn a_subscriber_without_a_snapshot_is_notified_of_what_comes_after_its_beginning() {
    loom::model(|| {
        let store: Arc<NotifyKeyValue<_, Mailbox<u32>>> = Arc::new(NotifyKeyValue::open(NoPersist::default()).unwrap());
        let writer = {
            let store = Arc::clone(&store);
            thread::spawn(move || store.put(&Key::new("a").unwrap(), "x", PutOptions::default()).unwrap())
        };
        let (post, inbox) = mailbox();
        store.subscribe(Pattern::All, "me".into(), post, false);
        writer.join().unwrap();
        let Some(Item::Event { event, .. }) = inbox.try_take() else { panic!("the beginning comes at once") };
        let EventKind::Began(began) = event.kind() else { panic!("{event:?} came before the beginning") };
        let after: Vec<u64> = (began.revision.get() + 1..=1).collect();
        assert_eq!(revisions(&inbox), after);
    });
}
