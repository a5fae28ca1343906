//! Negative controls: notifiers that break one line of their contract, which the suite has to see.
#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code too")]

use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use nkv_core::{Change, Delivery, Event, EventKind, Key, Notifier, Reason};
use nkv_testkit::notifier::{self, NotifierHarness, Reader, Told};

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
    TellsExpiredAsDeleted,
    DoesNotCountSkipped,
    CutsSnapshots,
    DropsEmptySnapshots,
    PutsSnapshotsFirst,
    ConflatesSnapshots,
    DropsTheEnd,
    TellsTheEndFirst,
    TrimsValues,
    CutsLargeValues,
    NeverCloses,
    ComesBack,
    ClaimsConflation,
    TellsOneOfARevision,
}

#[derive(Debug, Default)]
struct Queue {
    told: Vec<Told>,
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
        let same = |told: &Told| match self.flaw {
            Flaw::ConflatesWithinTheBranch => told.key().is_some_and(|other| other == key || key.is_below(other)),
            Flaw::DoesNotCountSkipped => told.key() == Some(key),
            _ => false,
        };
        let taken = queue.taken;
        let before = queue.told.len();
        let mut at = 0;
        queue.told.retain(|told| {
            at += 1;
            at <= taken || !same(told)
        });
        (before - queue.told.len()) as u64
    }

    fn change(&self, queue: &mut Queue, change: &Change) -> Delivery {
        let event = Event::new(EventKind::Change(change.clone()));
        let mut told = Told::all(&event, Some(0)).remove(0);
        let (taken, len) = (queue.taken, queue.told.len());
        match (self.flaw, &mut told) {
            (Flaw::DropsTheLast, _) if change.revision.get().is_multiple_of(2) => return Delivery::Queued,
            (Flaw::DropsTheNewestWhenFull, _) if len - taken >= 1_000 => return Delivery::Queued,
            (Flaw::TellsOneOfARevision, _) if queue.told.last().and_then(Told::revision) == Some(change.revision) => {
                return Delivery::Queued;
            }
            (Flaw::DropsDeletes, Told::Delete { .. }) => return Delivery::Queued,
            (Flaw::TellsExpiredAsDeleted, Told::Delete { reason, .. }) => *reason = Reason::Deleted,
            (Flaw::TrimsValues, Told::Put { value, .. }) => *value = value.trim_ascii().to_vec().into(),
            (Flaw::CutsLargeValues, Told::Put { value, .. }) => value.truncate(65_535),
            (Flaw::Reorders, _) if len - taken >= 2 && change.revision.get().is_multiple_of(2) => {
                queue.told.insert(len - 1, told);
                return Delivery::Queued;
            }
            (Flaw::ConflatesInPlace, _) => {
                let same = queue.told[taken..].iter_mut().find(|old| old.key() == Some(&change.key));
                if let Some(same) = same {
                    *same = told;
                    return Delivery::Conflated;
                }
            }
            _ => {}
        }
        let conflated = self.conflate(queue, &change.key);
        queue.told.push(told);
        match self.flaw {
            Flaw::ClaimsConflation => Delivery::Conflated,
            _ if conflated > 0 => Delivery::Conflated,
            _ => Delivery::Queued,
        }
    }

    fn snapshot(&self, queue: &mut Queue, mut told: Vec<Told>) {
        let taken = queue.taken;
        match self.flaw {
            Flaw::CutsSnapshots if told.len() > 100 => drop(told.drain(100..200)),
            Flaw::DropsEmptySnapshots if told.len() == 1 => return,
            Flaw::ConflatesSnapshots => queue.told.retain(|told| !matches!(told, Told::Synced { .. })),
            Flaw::PutsSnapshotsFirst => {
                queue.told.splice(taken..taken, told);
                return;
            }
            _ => {}
        }
        queue.told.extend(told);
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
            let full = |queue: &mut Queue| queue.told.len() - queue.taken > 100 && !queue.dropped;
            queue = self.queue.1.wait_timeout_while(queue, Duration::from_secs(30), full).unwrap().0;
        }
        let told = Told::all(event, Some(0));
        let taken = queue.taken;
        let delivery = match event.kind() {
            EventKind::Change(change) => self.change(&mut queue, change),
            // The suite's snapshots have no store behind them, so they can be read here.
            EventKind::Began(began) if began.has_snapshot => {
                let parts = std::iter::from_fn(|| began.reader.next_part());
                let parts = parts.map(|part| Event::new(EventKind::Snapshot(part)));
                self.snapshot(&mut queue, parts.flat_map(|part| Told::all(&part, Some(0))).collect());
                Delivery::Queued
            }
            _ if self.flaw == Flaw::DropsTheEnd => Delivery::Queued,
            _ if self.flaw == Flaw::TellsTheEndFirst => {
                queue.told.splice(taken..taken, told);
                Delivery::Queued
            }
            _ => {
                queue.told.extend(told);
                Delivery::Queued
            }
        };
        self.queue.1.notify_all();
        delivery
    }
}

impl Reader for BrokenReader {
    fn read(&mut self, patience: Duration) -> Option<Told> {
        // Nothing here takes a quarter of a second but waiting for what never comes.
        let patience = patience.min(Duration::from_millis(250));
        let nothing = |queue: &mut Queue| queue.told.len() == queue.taken;
        let mut queue = self.0.1.wait_timeout_while(self.0.0.lock().unwrap(), patience, nothing).unwrap().0;
        let told = queue.told.get(queue.taken)?.clone();
        queue.taken += 1;
        self.0.1.notify_all();
        Some(told)
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
    reordering_is_caught: Reorders, what_is_told_is_in_order_of_revision;
    conflation_in_place_is_caught: ConflatesInPlace, what_is_told_is_in_order_of_revision;
    one_change_of_a_revision_is_caught: TellsOneOfARevision, changes_of_one_revision_are_all_told;
    conflation_across_keys_is_caught: ConflatesWithinTheBranch, a_change_never_takes_the_place_of_another_keys;
    claimed_conflation_is_caught: ClaimsConflation, a_change_never_takes_the_place_of_another_keys;
    a_queue_that_drops_the_newest_is_caught: DropsTheNewestWhenFull, nobody_is_waited_for_when_one_key_changes_often;
    a_dropped_last_state_is_caught: DropsTheLast, the_latest_state_of_each_key_is_told_to_a_slow_subscriber;
    a_dropped_last_state_is_caught_in_a_race: DropsTheLast, the_latest_state_of_each_key_is_told_to_a_busy_subscriber;
    dropped_deletes_are_caught: DropsDeletes, a_delete_is_a_state_like_any_other;
    a_wrong_reason_is_caught: TellsExpiredAsDeleted, a_change_is_told_as_it_was_made;
    uncounted_conflation_is_caught: DoesNotCountSkipped, what_was_passed_over_is_counted;
    a_cut_snapshot_is_caught: CutsSnapshots, a_snapshot_is_told_whole;
    a_dropped_empty_snapshot_is_caught: DropsEmptySnapshots, an_empty_snapshot_is_told;
    a_snapshot_out_of_place_is_caught: PutsSnapshotsFirst, a_snapshot_keeps_its_place;
    a_conflated_snapshot_is_caught: ConflatesSnapshots, every_snapshot_is_told;
    a_dropped_end_is_caught: DropsTheEnd, the_end_is_told_and_keeps_its_place;
    an_end_out_of_place_is_caught: TellsTheEndFirst, the_end_is_told_and_keeps_its_place;
    trimmed_values_are_caught: TrimsValues, values_and_keys_arrive_as_they_are;
    cut_values_are_caught: CutsLargeValues, a_large_value_is_told_whole;
    a_notifier_that_comes_back_is_caught: ComesBack, after_the_subscriber_is_gone_notify_says_closed;
    a_notifier_that_never_closes_is_caught: NeverCloses, after_the_subscriber_is_gone_notify_says_closed;
}
