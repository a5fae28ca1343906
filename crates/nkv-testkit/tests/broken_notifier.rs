//! Negative controls: notifiers that break one line of their contract, which the suite has to see.
#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code too")]

use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use nkv_core::{Change, Delivery, Event, EventKind, Key, Notifier, Reason};
use nkv_testkit::notifier::{self, NotifierHarness, Reader, Received};

/// What is wrong with a [`Broken`]. None conflates but those that do it wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    None,
    WaitsForTheReader,
    Reorders,
    ConflatesWithinTheBranch,
    ConflatesInPlace,
    DropsTheNewestWhenFull,
    DropsTheLast,
    DropsDeletes,
    TakesExpiredForDeleted,
    DoesNotCountSkipped,
    CutsSnapshots,
    DropsEmptySnapshots,
    PutsSnapshotsFirst,
    ConflatesSnapshots,
    DropsTheEnd,
    DeliversTheEndFirst,
    TrimsValues,
    CutsLargeValues,
    NeverCloses,
    ComesBack,
    ClaimsConflation,
    DeliversOneOfARevision,
}

#[derive(Debug, Default)]
struct Queue {
    received: Vec<Received>,
    taken: usize,
    gone: u64,
    dropped: bool,
}

#[derive(Debug)]
struct Broken {
    flaw: Flaw,
    queue: Arc<(Mutex<Queue>, Condvar)>,
}

struct BrokenReader(Arc<(Mutex<Queue>, Condvar)>);

fn broken(flaw: Flaw) -> impl NotifierHarness {
    move || {
        let queue = Arc::new((Mutex::new(Queue::default()), Condvar::new()));
        (Broken { flaw, queue: Arc::clone(&queue) }, BrokenReader(queue))
    }
}

impl Broken {
    /// Makes room as conflation would, wrongly or not, and says how many states went.
    fn conflate(&self, queue: &mut Queue, key: &Key) -> u64 {
        let same = |received: &Received| match self.flaw {
            Flaw::ConflatesWithinTheBranch => received.key().is_some_and(|other| other == key || key.is_below(other)),
            Flaw::DoesNotCountSkipped => received.key() == Some(key),
            _ => false,
        };
        let taken = queue.taken;
        let before = queue.received.len();
        let mut at = 0;
        queue.received.retain(|received| {
            at += 1;
            at <= taken || !same(received)
        });
        (before - queue.received.len()) as u64
    }

    fn change(&self, queue: &mut Queue, change: &Change) -> Delivery {
        let event = Event::new(EventKind::Change(change.clone()));
        let mut received = Received::all(&event, Some(0)).remove(0);
        let (taken, len) = (queue.taken, queue.received.len());
        match (self.flaw, &mut received) {
            (Flaw::DropsTheLast, _) if change.revision.get().is_multiple_of(2) => return Delivery::Queued,
            (Flaw::DropsTheNewestWhenFull, _) if len - taken >= 1_000 => return Delivery::Queued,
            (Flaw::DeliversOneOfARevision, _)
                if queue.received.last().and_then(Received::revision) == Some(change.revision) =>
            {
                return Delivery::Queued;
            }
            (Flaw::DropsDeletes, Received::Delete { .. }) => return Delivery::Queued,
            (Flaw::TakesExpiredForDeleted, Received::Delete { reason, .. }) => *reason = Reason::Deleted,
            (Flaw::TrimsValues, Received::Put { value, .. }) => *value = value.trim_ascii().to_vec().into(),
            (Flaw::CutsLargeValues, Received::Put { value, .. }) => value.truncate(65_535),
            (Flaw::Reorders, _) if len - taken >= 2 && change.revision.get().is_multiple_of(2) => {
                queue.received.insert(len - 1, received);
                return Delivery::Queued;
            }
            (Flaw::ConflatesInPlace, _) => {
                let same = queue.received[taken..].iter_mut().find(|old| old.key() == Some(&change.key));
                if let Some(same) = same {
                    *same = received;
                    return Delivery::Conflated;
                }
            }
            _ => {}
        }
        let conflated = self.conflate(queue, &change.key);
        queue.received.push(received);
        match self.flaw {
            Flaw::ClaimsConflation => Delivery::Conflated,
            _ if conflated > 0 => Delivery::Conflated,
            _ => Delivery::Queued,
        }
    }

    fn snapshot(&self, queue: &mut Queue, mut received: Vec<Received>) {
        let taken = queue.taken;
        match self.flaw {
            Flaw::CutsSnapshots if received.len() > 100 => drop(received.drain(100..200)),
            Flaw::DropsEmptySnapshots if received.len() == 1 => return,
            Flaw::ConflatesSnapshots => queue.received.retain(|received| !matches!(received, Received::Synced { .. })),
            Flaw::PutsSnapshotsFirst => {
                queue.received.splice(taken..taken, received);
                return;
            }
            _ => {}
        }
        queue.received.extend(received);
    }
}

impl Notifier for Broken {
    fn notify(&self, event: &Arc<Event>) -> Delivery {
        let mut queue = self.queue.0.lock().unwrap();
        if queue.dropped && self.flaw != Flaw::NeverCloses {
            queue.gone += 1;
            let back = self.flaw == Flaw::ComesBack && queue.gone > 1;
            return if back { Delivery::Queued } else { Delivery::Closed };
        }
        if self.flaw == Flaw::WaitsForTheReader {
            // Gives up in the end, so that the threads that this test leaves behind are not left for long.
            let full = |queue: &mut Queue| queue.received.len() - queue.taken > 100 && !queue.dropped;
            queue = self.queue.1.wait_timeout_while(queue, Duration::from_secs(30), full).unwrap().0;
        }
        let received = Received::all(event, Some(0));
        let taken = queue.taken;
        let delivery = match event.kind() {
            EventKind::Change(change) => self.change(&mut queue, change),
            // The suite's snapshots have no store behind them, so they can be read here.
            EventKind::Began(began) if began.has_snapshot => {
                let parts = std::iter::from_fn(|| began.reader.next_part());
                let parts = parts.map(|part| Event::new(EventKind::Snapshot(part)));
                self.snapshot(&mut queue, parts.flat_map(|part| Received::all(&part, Some(0))).collect());
                Delivery::Queued
            }
            _ if self.flaw == Flaw::DropsTheEnd => Delivery::Queued,
            _ if self.flaw == Flaw::DeliversTheEndFirst => {
                queue.received.splice(taken..taken, received);
                Delivery::Queued
            }
            _ => {
                queue.received.extend(received);
                Delivery::Queued
            }
        };
        self.queue.1.notify_all();
        delivery
    }
}

impl Reader for BrokenReader {
    fn read(&mut self, patience: Duration) -> Option<Received> {
        // Nothing here takes a quarter of a second but waiting for what never comes.
        let patience = patience.min(Duration::from_millis(250));
        let nothing = |queue: &mut Queue| queue.received.len() == queue.taken;
        let mut queue = self.0.1.wait_timeout_while(self.0.0.lock().unwrap(), patience, nothing).unwrap().0;
        let received = queue.received.get(queue.taken)?.clone();
        queue.taken += 1;
        self.0.1.notify_all();
        Some(received)
    }
}

impl Drop for BrokenReader {
    fn drop(&mut self) {
        self.0.0.lock().unwrap().dropped = true;
        self.0.1.notify_all();
    }
}

/// Whether `flaw` fails the line called `name`.
fn fails(flaw: Flaw, name: &str) -> bool {
    fn check<H: NotifierHarness>(open: impl Fn() -> H, name: &str) -> bool {
        let line = notifier::lines::<H>().into_iter().find(|line| line.0 == name).expect("a line of that name");
        panic::catch_unwind(AssertUnwindSafe(|| line.1(&open()))).is_err()
    }
    check(|| broken(flaw), name)
}

#[test]
fn a_notifier_that_conflates_nothing_passes_every_line() {
    fn names<H: NotifierHarness>(_: &H) -> Vec<&'static str> {
        notifier::lines::<H>().into_iter().map(|line| line.0).collect()
    }
    let failing: Vec<_> = names(&broken(Flaw::None)).into_iter().filter(|name| fails(Flaw::None, name)).collect();
    assert_eq!(failing, Vec::<&str>::new());
}

macro_rules! each_flaw_is_caught_by_its_line {
    ($($test:ident: $flaw:ident, $line:ident;)*) => {$(
        #[test]
        fn $test() {
            assert!(fails(Flaw::$flaw, stringify!($line)));
        }
    )*};
}

each_flaw_is_caught_by_its_line! {
    waiting_for_the_reader_is_caught: WaitsForTheReader, nobody_is_waited_for_when_many_keys_change;
    reordering_is_caught: Reorders, what_is_received_is_in_order_of_revision;
    conflation_in_place_is_caught: ConflatesInPlace, what_is_received_is_in_order_of_revision;
    one_change_of_a_revision_is_caught: DeliversOneOfARevision, changes_of_one_revision_are_all_received;
    conflation_across_keys_is_caught: ConflatesWithinTheBranch, a_change_never_takes_the_place_of_another_keys;
    claimed_conflation_is_caught: ClaimsConflation, a_change_never_takes_the_place_of_another_keys;
    a_queue_that_drops_the_newest_is_caught: DropsTheNewestWhenFull, nobody_is_waited_for_when_one_key_changes_often;
    a_dropped_last_state_is_caught: DropsTheLast, the_latest_state_of_each_key_reaches_a_slow_subscriber;
    a_dropped_last_state_is_caught_in_a_race: DropsTheLast, the_latest_state_of_each_key_reaches_a_busy_subscriber;
    dropped_deletes_are_caught: DropsDeletes, a_delete_is_a_state_like_any_other;
    a_wrong_reason_is_caught: TakesExpiredForDeleted, a_change_is_received_as_it_was_made;
    uncounted_conflation_is_caught: DoesNotCountSkipped, what_was_passed_over_is_counted;
    a_cut_snapshot_is_caught: CutsSnapshots, a_snapshot_is_received_whole;
    a_dropped_empty_snapshot_is_caught: DropsEmptySnapshots, an_empty_snapshot_is_received;
    a_snapshot_out_of_place_is_caught: PutsSnapshotsFirst, a_snapshot_keeps_its_place;
    a_conflated_snapshot_is_caught: ConflatesSnapshots, every_snapshot_is_received;
    a_dropped_end_is_caught: DropsTheEnd, the_end_is_received_and_keeps_its_place;
    an_end_out_of_place_is_caught: DeliversTheEndFirst, the_end_is_received_and_keeps_its_place;
    trimmed_values_are_caught: TrimsValues, values_and_keys_arrive_as_they_are;
    cut_values_are_caught: CutsLargeValues, a_large_value_is_received_whole;
    a_notifier_that_comes_back_is_caught: ComesBack, after_the_subscriber_is_gone_notify_says_closed;
    a_notifier_that_never_closes_is_caught: NeverCloses, after_the_subscriber_is_gone_notify_says_closed;
}
