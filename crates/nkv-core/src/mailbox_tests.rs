#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code too")]

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::task::Wake;
use std::thread;

use super::*;
use crate::event::{BeginCause, EndReason};
use crate::key::Pattern;
use crate::meta::Meta;
use crate::record::Reason;
use crate::records::Records;
use crate::revision::Epoch;

/// More than anything here takes; only a hang waits for it.
const PATIENCE: Duration = Duration::from_secs(if cfg!(miri) { 100 } else { 10 });

/// A great number of changes; Miri takes a thousand times as long for each.
const MANY: u64 = if cfg!(miri) { 100 } else { 20_000 };

/// What came out, as short as it can be written.
#[derive(Debug, PartialEq, Eq)]
enum Out {
    /// Key, revision, skipped.
    Change(String, u64, u64),
    Began,
    Reset,
    /// Its revision.
    Snapshot(u64),
    Ended,
    Own(u32),
}

fn out(item: Item<u32>) -> Out {
    let (event, skipped) = match item {
        Item::Own(own) => return Out::Own(own),
        Item::Event { event, skipped } => (event, skipped),
    };
    match event.kind() {
        EventKind::Change(change) => Out::Change(change.key.to_string(), change.revision.get(), skipped),
        EventKind::Began(began) if began.cause == BeginCause::Reset => Out::Reset,
        EventKind::Began(_) => Out::Began,
        EventKind::Snapshot(snapshot) => Out::Snapshot(snapshot.revision.get()),
        EventKind::Ended { .. } => Out::Ended,
    }
}

fn change(key: &str, revision: u64, skipped: u64) -> Out {
    Out::Change(key.into(), revision, skipped)
}

fn drain(inbox: &Inbox<u32>) -> Vec<Out> {
    std::iter::from_fn(|| inbox.try_take()).map(out).collect()
}

/// Each key had a value before, unless it is said that it is new.
const REPLACED: Revision = Revision::new(1);

fn event(key: &str, revision: u64, replaces: Revision, action: Action) -> Arc<Event> {
    let (key, revision) = (Key::new(key).unwrap(), Revision::new(revision));
    Event::new(EventKind::Change(Change { key, revision, replaces, action, meta: Meta::NONE }))
}

fn delete(key: &str, revision: u64) -> Arc<Event> {
    event(key, revision, REPLACED, Action::Delete { reason: Reason::Deleted })
}

fn put(key: &str, revision: u64) -> Arc<Event> {
    event(key, revision, REPLACED, Action::Put { value: revision.to_string().into(), expiry: None })
}

/// The key was absent before.
fn put_new(key: &str, revision: u64) -> Arc<Event> {
    event(key, revision, Revision::ZERO, Action::Put { value: revision.to_string().into(), expiry: None })
}

fn part(revision: u64, is_last: bool) -> Snapshot {
    let (pattern, records, epoch) = (Pattern::All, Records::default(), Epoch::new(1));
    Snapshot { pattern, records, revision: Revision::new(revision), epoch, is_last }
}

/// A subscription to all begins, with a snapshot of one part for each of these revisions.
fn snapshot_of(revisions: &[u64]) -> Arc<Event> {
    let parts = revisions.iter().enumerate().map(|(at, revision)| part(*revision, at + 1 == revisions.len()));
    let began = Began::new(Pattern::All, REPLACED, Epoch::new(1), SnapshotReader::of(parts));
    Event::new(EventKind::Began(began.with_snapshot()))
}

fn snapshot(revision: u64) -> Arc<Event> {
    snapshot_of(&[revision])
}

fn ended() -> Arc<Event> {
    Event::new(EventKind::Ended { pattern: Pattern::All, reason: EndReason::Unsubscribed })
}

fn post_all(post: &Mailbox<u32>, events: impl IntoIterator<Item = Arc<Event>>) -> Vec<Delivery> {
    events.into_iter().map(|event| post.notify(&event)).collect()
}

#[derive(Default)]
struct CountingWaker(AtomicU64);

impl Wake for CountingWaker {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, SeqCst);
    }
}

impl CountingWaker {
    fn count(&self) -> u64 {
        self.0.load(SeqCst)
    }
}

fn poll(inbox: &Inbox<u32>, waker: &Arc<CountingWaker>) -> Poll<Option<Out>> {
    let waker = Waker::from(Arc::clone(waker));
    inbox.poll_take(&mut Context::from_waker(&waker)).map(|item| item.map(out))
}

#[test]
fn the_newest_change_of_a_key_takes_the_place_of_the_older_and_counts_it() {
    let (post, inbox) = mailbox();
    let deliveries = post_all(&post, [put("a", 1), put("a", 2), delete("a", 3)]);
    assert_eq!(deliveries, [Delivery::Queued, Delivery::Conflated, Delivery::Conflated]);
    let Some(Item::Event { event, skipped: 2 }) = inbox.try_take() else { panic!("one change, two skipped") };
    assert_eq!(event.kind(), delete("a", 3).kind());
    assert_eq!(drain(&inbox), []);
}

#[test]
fn a_conflated_change_moves_to_the_end_so_that_revisions_increase() {
    let (post, inbox) = mailbox();
    let _ = post_all(&post, [put("a", 1), put("b", 2), put("c", 3), put("a", 4), put("b", 5)]);
    assert_eq!(drain(&inbox), [change("c", 3, 0), change("a", 4, 1), change("b", 5, 1)]);
}

#[test]
fn a_key_and_the_keys_below_it_do_not_conflate() {
    let (post, inbox) = mailbox();
    let _ = post_all(&post, [put("a", 1), put("a.b", 2), put("a.b.c", 3), put("A", 4)]);
    assert_eq!(drain(&inbox), [change("a", 1, 0), change("a.b", 2, 0), change("a.b.c", 3, 0), change("A", 4, 0)]);
}

#[test]
fn skipped_counts_from_the_last_change_taken() {
    let (post, inbox) = mailbox();
    let _ = post_all(&post, [put("a", 1), put("a", 2)]);
    assert_eq!(drain(&inbox), [change("a", 2, 1)]);
    let _ = post_all(&post, [put("a", 3)]);
    assert_eq!(drain(&inbox), [change("a", 3, 0)]);
    let _ = post_all(&post, (4..=9).map(|revision| put("a", revision)));
    assert_eq!(drain(&inbox), [change("a", 9, 5)]);
    assert_eq!((post.backlog().queued, post.backlog().skipped), (0, 6));
}

#[test]
fn a_change_that_two_subscriptions_cover_is_received_once_and_not_counted_as_skipped() {
    let (post, inbox) = mailbox();
    let (first, second) = (put("a", 1), put("a", 2));
    let deliveries = post_all(&post, [&first, &first, &second, &second].map(Arc::clone));
    assert_eq!(deliveries, [Delivery::Queued, Delivery::Queued, Delivery::Conflated, Delivery::Queued]);
    assert_eq!(drain(&inbox), [change("a", 2, 1)]);
    assert_eq!(post.notify(&second), Delivery::Queued);
    assert_eq!(drain(&inbox), [], "not even after it was taken");
}

#[test]
fn snapshots_and_ends_are_never_conflated_and_keep_their_place() {
    let (post, inbox) = mailbox();
    let events = [put("a", 1), snapshot_of(&[1, 1]), snapshot(2), put("b", 2), ended(), put("c", 3), ended()];
    assert!(post_all(&post, events).iter().all(|delivery| *delivery != Delivery::Closed));
    let before = [change("a", 1, 0), Out::Began, Out::Snapshot(1), Out::Snapshot(1), Out::Began, Out::Snapshot(2)];
    let after = [change("b", 2, 0), Out::Ended, change("c", 3, 0), Out::Ended];
    assert_eq!(drain(&inbox), before.into_iter().chain(after).collect::<Vec<_>>());
}

#[test]
fn a_key_that_comes_and_goes_unread_takes_no_place_and_is_counted() {
    let (post, inbox) = mailbox();
    for n in 0..MANY {
        let key = format!("k{n}");
        let _ = post_all(&post, [put_new(&key, 3 * n + 1), put(&key, 3 * n + 2), delete(&key, 3 * n + 3)]);
    }
    let backlog = post.backlog();
    assert_eq!((backlog.queued, backlog.skipped, backlog.event_bytes), (0, 3 * MANY, 0));
    assert!(inbox.shared.lock().queue.capacity() <= 8 * TIDY_MIN, "{}", inbox.shared.lock().queue.capacity());
    // The delete of a key that was read is kept, also if it comes and goes again meanwhile.
    let last = 3 * MANY;
    let _ = post_all(&post, [put_new("a", last + 1)]);
    assert_eq!(drain(&inbox), [change("a", last + 1, 0)]);
    let _ = post_all(&post, [delete("a", last + 2), put_new("a", last + 3), delete("a", last + 4)]);
    assert_eq!(drain(&inbox), [change("a", last + 4, 2)]);
}

#[test]
fn a_key_that_a_snapshot_may_have_is_not_forgotten_when_it_goes() {
    let (post, inbox) = mailbox();
    // It came before the snapshot began, or while it waited or was read: the snapshot may have read it.
    let _ = post_all(&post, [put_new("a", 1), snapshot_of(&[2, 2]), put_new("b", 2)]);
    let _ = post_all(&post, [delete("a", 3), delete("b", 4)]);
    let next = || inbox.try_take().map(out).unwrap();
    assert_eq!([next(), next()], [Out::Began, Out::Snapshot(2)]);
    let _ = post_all(&post, [put_new("c", 5), delete("c", 6)]);
    assert_eq!(drain(&inbox), [Out::Snapshot(2), change("a", 3, 1), change("b", 4, 1), change("c", 6, 1)]);
    let _ = post_all(&post, [put_new("c", 7), delete("c", 8)]);
    assert_eq!(drain(&inbox), []);
}

#[test]
fn past_the_bound_what_waits_is_dropped_and_each_subscription_begins_anew() {
    let (post, inbox) = mailbox_with_slack(CHANGE_LEN);
    let (a, b) = (snapshot_of(&[1]), snapshot_of(&[1]));
    let _ = post_all(&post, [a, b]);
    assert_eq!(drain(&inbox).len(), 4);
    post.post(7).unwrap();
    let _ = post_all(&post, [put("x", 10), put("y", 11)]);
    let count = DELETES_MAX as u64;
    let _ = post_all(&post, (0..count).map(|n| delete(&format!("k{n}"), 100 + n)));
    let full = post.backlog();
    assert_eq!((full.queued as u64, full.skipped), (count + 3, 0));
    assert_eq!(post.notify(&delete("one.more", 100 + count)), Delivery::Conflated);
    let backlog = post.backlog();
    assert_eq!((backlog.queued, backlog.skipped, backlog.event_bytes, backlog.slack), (3, count + 3, 0, 0));
    assert!(backlog.own_bytes < full.own_bytes / 10, "{backlog:?}");
    let _ = post.notify(&put("z", 200 + count));
    // The readers of this test have no parts any more.
    assert_eq!(drain(&inbox), [Out::Own(7), Out::Reset, Out::Reset, change("z", 200 + count, 0)]);
}

#[test]
fn a_reader_that_cannot_begin_anew_is_closed_past_the_bound() {
    let (post, inbox) = mailbox();
    post.set_overflow(Overflow::Close);
    let _ = post_all(&post, [snapshot(1)]);
    post.post(7).unwrap();
    let deliveries = post_all(&post, (0..=DELETES_MAX as u64).map(|n| delete(&format!("k{n}"), 2 + n)));
    assert_eq!(deliveries.last(), Some(&Delivery::Closed));
    assert!(post.has_overflowed() && post.is_closed());
    assert_eq!(drain(&inbox), [Out::Began, Out::Snapshot(1), Out::Own(7)]);
    assert_eq!(inbox.take_blocking().map(out), None);
}

#[test]
fn what_a_mailbox_takes_is_known_whatever_comes_goes_and_is_passed_over() {
    let (post, inbox) = mailbox_with_slack(10 * CHANGE_LEN);
    let size = |event: Arc<Event>| event.size();
    let _ = post_all(&post, (1..=30).map(|revision| put(["a", "b", "c"][revision as usize % 3], revision)));
    assert_eq!(post.backlog().event_bytes, 9 * size(put("a", 1)) + 3 * size(put("a", 30)));
    inbox.try_take().unwrap();
    assert_eq!(post.backlog().event_bytes, 8 * size(put("a", 1)) + 3 * size(put("a", 30)));
    drain(&inbox);
    assert_eq!(post.backlog().event_bytes, 0);
}

#[test]
fn own_items_keep_their_place_among_the_events() {
    let (post, inbox) = mailbox();
    post.post(1).unwrap();
    let _ = post_all(&post, [put("a", 1)]);
    post.post(2).unwrap();
    post.post(2).unwrap();
    let _ = post_all(&post, [put("a", 2)]);
    post.post(3).unwrap();
    let expected = [Out::Own(1), Out::Own(2), Out::Own(2), change("a", 2, 1), Out::Own(3)];
    assert_eq!(drain(&inbox), expected);
}

#[test]
fn what_was_posted_before_closing_is_taken_and_nothing_after() {
    let (post, inbox) = mailbox();
    let _ = post_all(&post, [put("a", 1)]);
    post.close();
    assert!(post.is_closed());
    assert_eq!(post.notify(&put("a", 2)), Delivery::Closed);
    assert_eq!(post.post(7), Err(7));
    assert_eq!(inbox.take_blocking().map(out), Some(change("a", 1, 0)));
    assert_eq!(inbox.take_blocking().map(out), None);
    assert_eq!(inbox.take_timeout(PATIENCE).map(out), None);
    assert_eq!(poll(&inbox, &Arc::default()), Poll::Ready(None));
}

#[test]
fn the_mailbox_closes_when_the_last_poster_is_gone_not_before() {
    let (post, inbox) = mailbox();
    let other = post.clone();
    assert!(post.is_same(&other));
    drop(post);
    assert_eq!(poll(&inbox, &Arc::default()), Poll::Pending);
    other.post(1).unwrap();
    drop(other);
    assert_eq!(inbox.take_blocking().map(out), Some(Out::Own(1)));
    assert_eq!(inbox.take_blocking().map(out), None);
}

#[test]
fn the_poster_learns_that_the_reader_is_gone() {
    let (post, inbox) = mailbox();
    drop(inbox);
    assert!(post.is_closed());
    assert_eq!(post.notify(&put("a", 1)), Delivery::Closed);
    assert_eq!(post.post(1), Err(1));
}

// Dropping the inbox emptied the queue and kept the count of its vacant places, so that looking at the backlog
// (printing the mailbox, too) subtracted one from nothing.
#[test]
fn a_mailbox_whose_reader_left_in_mid_conflation_has_no_backlog() {
    let (post, inbox) = mailbox::<u32>();
    let _ = post_all(&post, [put("a", 1), put("b", 2), put("a", 3)]);
    drop(inbox);
    assert_eq!(post.backlog().queued, 0);
    assert_eq!(format!("{post:?}"), "Mailbox { queued: 0, skipped: 1 }");
}

#[test]
fn what_was_not_taken_is_freed_when_the_reader_goes() {
    let (post, inbox) = mailbox();
    let own = Arc::new(());
    post.post(Arc::clone(&own)).unwrap();
    drop(inbox);
    assert_eq!(Arc::strong_count(&own), 1);
}

#[test]
fn a_polling_reader_is_woken_by_whatever_is_posted() {
    let (post, inbox) = mailbox();
    let waker = Arc::new(CountingWaker::default());
    assert_eq!(poll(&inbox, &waker), Poll::Pending);
    let _ = post.notify(&put("a", 1));
    assert_eq!(waker.count(), 1);
    assert_eq!(poll(&inbox, &waker), Poll::Ready(Some(change("a", 1, 0))));
    assert_eq!(poll(&inbox, &waker), Poll::Pending);
    post.post(1).unwrap();
    assert_eq!(waker.count(), 2);
    assert_eq!(poll(&inbox, &waker), Poll::Ready(Some(Out::Own(1))));
    assert_eq!(poll(&inbox, &waker), Poll::Pending);
    drop(post);
    assert_eq!(waker.count(), 3);
    assert_eq!(poll(&inbox, &waker), Poll::Ready(None));
}

#[test]
fn the_waker_of_the_latest_poll_is_the_one_that_is_woken() {
    let (post, inbox) = mailbox();
    let (old, new) = (Arc::new(CountingWaker::default()), Arc::new(CountingWaker::default()));
    assert_eq!(poll(&inbox, &old), Poll::Pending);
    assert_eq!(poll(&inbox, &new), Poll::Pending);
    post.post(1).unwrap();
    assert_eq!((old.count(), new.count()), (0, 1));
}

#[test]
fn a_future_that_is_dropped_loses_nothing() {
    let (post, inbox) = mailbox();
    let waker = Arc::new(CountingWaker::default());
    let task = Waker::from(Arc::clone(&waker));
    let mut cx = Context::from_waker(&task);
    {
        let mut take = std::pin::pin!(inbox.take());
        assert!(take.as_mut().poll(&mut cx).is_pending());
        post.post(1).unwrap();
    }
    let mut take = std::pin::pin!(inbox.take());
    assert!(matches!(take.as_mut().poll(&mut cx), Poll::Ready(Some(Item::Own(1)))));
}

#[test]
fn a_reader_that_polls_only_when_woken_sees_the_last_state_of_every_key() {
    let (post, inbox) = mailbox();
    let writer = thread::spawn(move || {
        (1..=MANY).for_each(|revision| {
            let _ = post.notify(&put(["a", "b", "c"][revision as usize % 3], revision));
        });
    });
    struct Unpark(thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut cx = Context::from_waker(&waker);
    let (mut last, mut accounted, deadline) = (0, 0, Instant::now() + PATIENCE);
    loop {
        match inbox.poll_take(&mut cx).map(|item: Option<Item<u32>>| item.map(out)) {
            Poll::Ready(Some(Out::Change(_, revision, skipped))) => {
                assert!(revision > last, "{revision} after {last}");
                (last, accounted) = (revision, accounted + 1 + skipped);
            }
            Poll::Ready(Some(other)) => panic!("{other:?} was never posted"),
            Poll::Ready(None) => break,
            Poll::Pending => thread::park_timeout(deadline.saturating_duration_since(Instant::now())),
        }
        assert!(Instant::now() < deadline, "a wake-up was lost");
    }
    writer.join().unwrap();
    assert_eq!((last, accounted), (MANY, MANY), "the last revision, and changes received or skipped");
}

#[test]
fn a_blocked_reader_gets_what_another_thread_posts_and_then_the_end() {
    let (post, inbox) = mailbox();
    let (tx, rx) = std::sync::mpsc::channel();
    let reader = thread::spawn(move || {
        while let Some(item) = inbox.take_blocking().map(out) {
            tx.send(item).unwrap();
        }
    });
    for own in 0..if cfg!(miri) { 10 } else { 100 } {
        post.post(own).unwrap();
        assert_eq!(rx.recv_timeout(PATIENCE), Ok(Out::Own(own)), "each before the next is posted");
    }
    drop(post);
    assert!(rx.recv_timeout(PATIENCE).is_err(), "the reader has ended");
    reader.join().unwrap();
}

#[test]
fn a_patient_reader_gets_nothing_when_its_time_is_up_and_all_of_it_later() {
    let (post, inbox) = mailbox();
    assert_eq!(inbox.take_timeout(Duration::ZERO).map(out), None);
    assert_eq!(inbox.take_timeout(Duration::from_millis(1)).map(out), None);
    post.post(1).unwrap();
    assert_eq!(inbox.take_timeout(Duration::ZERO).map(out), Some(Out::Own(1)));
    let reader = thread::spawn(move || inbox.take_timeout(PATIENCE).map(out));
    post.post(2).unwrap();
    assert_eq!(reader.join().unwrap(), Some(Out::Own(2)));
}

#[test]
fn one_key_that_changes_often_costs_the_memory_of_one_change() {
    let (post, inbox) = mailbox();
    let _ = post.notify(&put("waits.at.the.front", 1));
    let mut longest = 0;
    for revision in 2..=MANY {
        let _ = post.notify(&put("busy", revision));
        longest = longest.max(inbox.shared.lock().queue.len());
    }
    assert!(longest <= 4 * TIDY_MIN, "{longest} places for two changes");
    assert!(inbox.shared.lock().queue.capacity() <= 8 * TIDY_MIN);
    assert_eq!((post.backlog().queued, post.backlog().skipped), (2, MANY - 2));
    assert_eq!(drain(&inbox), [change("waits.at.the.front", 1, 0), change("busy", MANY, MANY - 2)]);
}

#[test]
fn tidying_keeps_order_places_and_counts_whatever_waits() {
    let (post, inbox) = mailbox();
    let mut revision = 0;
    let mut next = || {
        revision += 1;
        revision
    };
    // Some are taken first, so that places are not numbered from zero.
    for own in 0..10 {
        post.post(own).unwrap();
    }
    assert_eq!(drain(&inbox).len(), 10);
    for key in ["x", "y", "z"] {
        let _ = post.notify(&put(key, next()));
    }
    post.post(99).unwrap();
    let _ = post.notify(&snapshot(3));
    for _ in 0..TIDY_MIN * 3 {
        let _ = post.notify(&put("busy", next()));
    }
    let _ = post.notify(&put("y", next()));
    let last = next();
    let _ = post.notify(&put("busy", last));
    let busy = TIDY_MIN as u64 * 3;
    let expected = [
        change("x", 1, 0),
        change("z", 3, 0),
        Out::Own(99),
        Out::Began,
        Out::Snapshot(3),
        change("y", last - 1, 1),
        change("busy", last, busy),
    ];
    assert_eq!(drain(&inbox), expected);
}

#[test]
fn the_room_that_a_backlog_took_is_given_back_once_it_is_read() {
    let (post, inbox) = mailbox();
    let _ = post_all(&post, (1..=MANY).map(|revision| put(&format!("k{revision}"), revision)));
    assert_eq!(post.backlog().queued as u64, MANY);
    assert_eq!(drain(&inbox).len() as u64, MANY);
    let state = inbox.shared.lock();
    assert!(state.queue.capacity() <= TIDY_MIN && state.slots.capacity() <= TIDY_MIN);
}

/// What a change takes of the slack: its key, and a revision as its value, are one byte each.
const CHANGE_LEN: usize = ITEM_LEN + 2;

#[test]
fn what_fits_into_the_slack_is_received_as_it_came_and_what_is_on_top_of_it_is_conflated() {
    let (post, inbox) = mailbox_with_slack(2 * CHANGE_LEN);
    for last in [4, 8] {
        let deliveries = post_all(&post, (last - 3..=last).map(|revision| put("a", revision)));
        assert_eq!(deliveries, [Delivery::Queued, Delivery::Queued, Delivery::Queued, Delivery::Conflated]);
        assert_eq!(post.backlog().slack, 2 * CHANGE_LEN);
        assert_eq!(drain(&inbox), [change("a", last - 3, 0), change("a", last - 2, 0), change("a", last, 1)]);
        assert_eq!(post.backlog().slack, 0);
    }
}

#[test]
fn whatever_comes_behind_a_change_that_may_be_conflated_may_be_too() {
    let (post, inbox) = mailbox_with_slack(CHANGE_LEN);
    let _ = post_all(&post, [put("a", 1), put("a", 2)]);
    assert_eq!(inbox.try_take().map(out), Some(change("a", 1, 0)));
    assert_eq!(post.notify(&put("a", 3)), Delivery::Conflated, "there is slack, but 2 has not been read");
    assert_eq!(drain(&inbox), [change("a", 3, 1)]);
    assert_eq!(post_all(&post, [put("a", 4), put("a", 5)]), [Delivery::Queued, Delivery::Queued]);
}

#[test]
fn many_are_taken_at_once_up_to_a_number_of_bytes_a_part_of_a_snapshot_or_the_end() {
    let (post, inbox) = mailbox();
    let waker = Arc::new(CountingWaker::default());
    let task = Waker::from(Arc::clone(&waker));
    let take = |len| {
        let mut items = Vec::new();
        let taken = inbox.poll_take_many(&mut Context::from_waker(&task), len, &mut items);
        (taken, items.into_iter().map(out).collect::<Vec<_>>())
    };
    let _ = post_all(&post, [put("a", 1), put("b", 2), put("c", 3), snapshot(3), put("d", 4)]);
    assert_eq!(take(2 * CHANGE_LEN), (Poll::Ready(true), vec![change("a", 1, 0), change("b", 2, 0)]));
    assert_eq!(take(MANY as usize), (Poll::Ready(true), vec![change("c", 3, 0), Out::Began]));
    assert_eq!(take(MANY as usize), (Poll::Ready(true), vec![Out::Snapshot(3)]), "a part of a snapshot comes alone");
    assert_eq!(take(1), (Poll::Ready(true), vec![change("d", 4, 0)]));
    assert_eq!(take(1), (Poll::Pending, vec![]));
    post.post(1).unwrap();
    assert_eq!(waker.count(), 1);
    assert_eq!(take(MANY as usize), (Poll::Ready(true), vec![Out::Own(1)]));
    assert!(inbox.is_waited_for(), "nothing was left");
    post.post(2).unwrap();
    post.close();
    assert_eq!(waker.count(), 2);
    assert_eq!(take(MANY as usize), (Poll::Ready(true), vec![Out::Own(2)]));
    assert!(!inbox.is_waited_for());
    assert_eq!(take(1), (Poll::Ready(false), vec![]));
}

#[test]
fn a_mailbox_closes_with_its_last_poster() {
    let (post, inbox) = mailbox::<u32>();
    let other = post.clone();
    drop(post);
    assert_eq!(poll(&inbox, &Arc::default()), Poll::Pending);
    drop(other);
    assert_eq!(poll(&inbox, &Arc::default()), Poll::Ready(None));
}

#[test]
fn a_mailbox_that_is_waited_for_is_empty_until_something_comes_from_either_side() {
    let (post, inbox) = mailbox();
    assert!(inbox.is_empty() && !inbox.is_waited_for());
    for from_outside in [true, false] {
        assert_eq!(poll(&inbox, &Arc::default()), Poll::Pending);
        assert!(inbox.is_empty() && inbox.is_waited_for());
        if from_outside {
            post.post(1).unwrap();
        } else {
            inbox.post(1);
        }
        assert!(!inbox.is_empty() && !inbox.is_waited_for());
        assert_eq!(drain(&inbox), [Out::Own(1)]);
        assert!(inbox.is_empty());
    }
}

#[test]
fn a_call_reaches_a_reader_that_wants_no_items_and_one_that_waits_for_some() {
    let (post, inbox) = mailbox();
    let (busy, idle) = (Arc::new(CountingWaker::default()), Arc::new(CountingWaker::default()));
    inbox.poll_called(&mut Context::from_waker(&Waker::from(Arc::clone(&busy))));
    post.post(1).unwrap();
    assert_eq!(busy.count(), 0, "what comes is no call");
    post.wake();
    post.wake();
    assert_eq!(busy.count(), 1);
    assert_eq!(drain(&inbox), [Out::Own(1)]);
    assert_eq!(poll(&inbox, &idle), Poll::Pending);
    post.wake();
    assert_eq!((idle.count(), inbox.is_waited_for()), (1, false));
}

#[test]
fn slack_that_is_taken_away_leaves_what_waits_as_it_is() {
    let (post, inbox) = mailbox_with_slack(2 * CHANGE_LEN);
    post_all(&post, [put("a", 1)]);
    assert_eq!((inbox.set_slack(0), inbox.set_slack(0)), (2 * CHANGE_LEN, 0));
    assert_eq!(post_all(&post, [put("a", 2), put("a", 3)]), [Delivery::Queued, Delivery::Conflated]);
    assert_eq!(drain(&inbox), [change("a", 1, 0), change("a", 3, 1)]);
}
