//! The contract of [`Notifier`], line by line: one function for each, which panics when the line is broken.
//!
//! [`notifier_conformance!`](crate::notifier_conformance) makes a test of each. The suite plays the store; what
//! reaches the subscriber comes back as [`Received`], whatever the notifier does in between.

use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use nkv_core::mailbox::{Inbox, Item};
use nkv_core::{
    Action, Began, BeginCause, Change, Delivery, EndReason, Epoch, Event, EventKind, Key, Meta, Notifier, Pattern,
    Reason, Record, RecordRef, Revision, Snapshot, SnapshotReader,
};

/// How long the suite waits for what must happen. Only a broken notifier makes it wait so long.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Makes notifiers, each with the subscriber that it reaches. A closure that returns such a pair is a harness.
pub trait NotifierHarness {
    /// What is tested.
    type Notifier: Notifier;
    /// The subscriber.
    type Reader: Reader;

    /// A notifier and its subscriber, which has received nothing yet.
    fn open(&self) -> (Self::Notifier, Self::Reader);
}

impl<N: Notifier, R: Reader, F: Fn() -> (N, R)> NotifierHarness for F {
    type Notifier = N;
    type Reader = R;

    fn open(&self) -> (N, R) {
        self()
    }
}

/// A subscriber. It takes nothing off its connection but in [`read`](Self::read); dropping it is its end.
pub trait Reader {
    /// The next thing received, waiting for at most `patience`; `None` if that has passed or nothing can follow.
    fn read(&mut self, patience: Duration) -> Option<Received>;
}

/// One thing that a subscriber received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    /// A key has this value, by a change or within a snapshot.
    Put {
        /// The key.
        key: Key,
        /// Its value.
        value: Bytes,
        /// The revision of that value.
        revision: Revision,
        /// How many changes of the key were passed over; `None` if the notifier does not say.
        skipped: Option<u64>,
    },
    /// A key is gone.
    Delete {
        /// The key.
        key: Key,
        /// Why.
        reason: Reason,
        /// The revision of the delete.
        revision: Revision,
        /// How many changes of the key were passed over; `None` if the notifier does not say.
        skipped: Option<u64>,
    },
    /// Too much waited: the puts that follow, up to the next [`Synced`](Self::Synced), are a fresh snapshot of the
    /// subscription, and a key that is not among them is gone.
    Reset {
        /// The subscription's pattern.
        pattern: Pattern,
    },
    /// The puts received just before this, one for each key present, are a snapshot, which is complete now.
    Synced {
        /// The subscription's pattern.
        pattern: Pattern,
        /// The snapshot's revision.
        revision: Revision,
        /// The snapshot's epoch.
        epoch: Epoch,
    },
    /// The subscription has ended.
    Ended {
        /// The subscription's pattern.
        pattern: Pattern,
        /// Why.
        reason: EndReason,
    },
}

impl Received {
    /// What an event says, for readers that are handed events whole: one thing, the puts of a snapshot's part and the
    /// snapshot's end, or nothing, as where a subscription begins that was asked for.
    #[must_use]
    pub fn all(event: &Event, skipped: Option<u64>) -> Vec<Received> {
        match event.kind() {
            EventKind::Began(began) if began.cause == BeginCause::Reset => {
                vec![Received::Reset { pattern: began.pattern.clone() }]
            }
            EventKind::Began(_) => vec![],
            EventKind::Change(change) => vec![Received::change(change, skipped)],
            EventKind::Snapshot(snapshot) => Received::snapshot(snapshot),
            EventKind::Ended { pattern, reason } => vec![Received::Ended { pattern: pattern.clone(), reason: *reason }],
            other => panic!("nkv-testkit does not know this event yet: {other:?}"),
        }
    }

    fn change(change: &Change, skipped: Option<u64>) -> Received {
        let (key, revision) = (change.key.clone(), change.revision);
        match &change.action {
            Action::Put { value, .. } => Received::Put { key, value: value.clone(), revision, skipped },
            Action::Delete { reason } => Received::Delete { key, reason: *reason, revision, skipped },
        }
    }

    fn snapshot(snapshot: &Snapshot) -> Vec<Received> {
        let Snapshot { pattern, records, revision, epoch, is_last } = snapshot;
        let puts = records.iter().map(RecordRef::to_record).map(|Record { key, value, revision, .. }| Received::Put {
            key,
            value,
            revision,
            skipped: Some(0),
        });
        let synced = is_last.then(|| Received::Synced { pattern: pattern.clone(), revision: *revision, epoch: *epoch });
        puts.chain(synced).collect()
    }

    /// The key, if this is about one.
    #[must_use]
    pub fn key(&self) -> Option<&Key> {
        match self {
            Received::Put { key, .. } | Received::Delete { key, .. } => Some(key),
            Received::Reset { .. } | Received::Synced { .. } | Received::Ended { .. } => None,
        }
    }

    /// The revision, if this has one.
    #[must_use]
    pub fn revision(&self) -> Option<Revision> {
        match self {
            Received::Put { revision, .. } | Received::Delete { revision, .. } | Received::Synced { revision, .. } => {
                Some(*revision)
            }
            Received::Reset { .. } | Received::Ended { .. } => None,
        }
    }

    /// How many changes were passed over, if this is about a key and says so.
    #[must_use]
    pub fn skipped(&self) -> Option<u64> {
        match self {
            Received::Put { skipped, .. } | Received::Delete { skipped, .. } => *skipped,
            Received::Reset { .. } | Received::Synced { .. } | Received::Ended { .. } => None,
        }
    }

    /// The same, with nothing said about what was passed over.
    #[must_use]
    pub fn without_skipped(mut self) -> Received {
        if let Received::Put { skipped, .. } | Received::Delete { skipped, .. } = &mut self {
            *skipped = None;
        }
        self
    }
}

/// Reads an [`Inbox`]: the harness of everything that is, or wraps, a mailbox. Items of the owner's own are passed over.
#[derive(Debug)]
pub struct InboxReader<T> {
    inbox: Inbox<T>,
    ready: VecDeque<Received>,
}

impl<T> InboxReader<T> {
    /// The reader of `inbox`.
    #[must_use]
    pub fn new(inbox: Inbox<T>) -> Self {
        InboxReader { inbox, ready: VecDeque::new() }
    }
}

impl<T> Reader for InboxReader<T> {
    fn read(&mut self, patience: Duration) -> Option<Received> {
        while self.ready.is_empty() {
            if let Item::Event { event, skipped } = self.inbox.take_timeout(patience)? {
                self.ready.extend(Received::all(&event, Some(skipped)));
            }
        }
        self.ready.pop_front()
    }
}

/// Makes a test of each line of the contract of [`Notifier`].
///
/// The expression is a [`NotifierHarness`], evaluated anew for each test.
///
/// # Examples
///
/// ```
/// mod conformance {
///     use nkv_core::mailbox::mailbox;
///     use nkv_testkit::notifier::InboxReader;
///
///     nkv_testkit::notifier_conformance!(|| {
///         let (post, inbox) = mailbox::<()>();
///         (post, InboxReader::new(inbox))
///     });
/// }
/// ```
#[macro_export]
macro_rules! notifier_conformance {
    (@ $what:ident $argument:tt) => {
        $crate::__conformance! { $what notifier $argument;
            a_change_is_received_as_it_was_made
            nobody_is_waited_for_when_many_keys_change
            nobody_is_waited_for_when_one_key_changes_often
            what_is_received_is_in_order_of_revision
            changes_of_one_revision_are_all_received
            a_change_never_takes_the_place_of_another_keys
            the_latest_state_of_each_key_reaches_a_slow_subscriber
            the_latest_state_of_each_key_reaches_a_busy_subscriber
            a_delete_is_a_state_like_any_other
            what_was_passed_over_is_counted
            a_snapshot_is_received_whole
            an_empty_snapshot_is_received
            a_snapshot_keeps_its_place
            every_snapshot_is_received
            the_end_is_received_and_keeps_its_place
            values_and_keys_arrive_as_they_are
            a_large_value_is_received_whole
            after_the_subscriber_is_gone_notify_says_closed
        }
    };
    ($harness:expr) => {
        $crate::notifier_conformance! { @ tests $harness }
    };
}

/// A line of the contract: its name, and the function that checks it.
pub type Line<H> = (&'static str, fn(&H));

/// All lines with their names, for suites that run them in another way than [`notifier_conformance!`] does.
///
/// [`notifier_conformance!`]: crate::notifier_conformance
#[must_use]
pub fn lines<H: NotifierHarness>() -> Vec<Line<H>> {
    crate::notifier_conformance! { @ table H }
}

/// A put and two kinds of delete, each read before the next, arrive complete and with nothing passed over.
pub fn a_change_is_received_as_it_was_made<H: NotifierHarness>(harness: &H) {
    let (notifier, mut reader) = harness.open();
    let changes = [put("a.b", 1, "on"), put("a.b", 2, "off"), delete("a.b", 5), put("c", 6, "x"), expire("c", 9)];
    for change in changes {
        assert_eq!(notify(&notifier, change.clone()), Delivery::Queued, "nothing was waiting that could be conflated");
        let received = read(&mut reader, "a change");
        assert!(received.skipped().is_none_or(|skipped| skipped == 0), "nothing was passed over before {received:?}");
        assert_eq!(received.without_skipped(), Received::change(&change, None));
    }
}

/// *At once*: 8 MiB for a subscriber who reads nothing do not hold up the store.
pub fn nobody_is_waited_for_when_many_keys_change<H: NotifierHarness>(harness: &H) {
    let (notifier, mut reader) = harness.open();
    let value = "v".repeat(4 << 10);
    let _notifier =
        at_once(notifier, (1..=2_000).map(|revision| put(&format!("k{revision}"), revision, &value)).collect());
    for expected in 1..=2_000 {
        assert_eq!(read(&mut reader, "each key's change").revision(), Some(Revision::new(expected)));
    }
}

/// *At once*: 20,000 changes of one key do not either.
pub fn nobody_is_waited_for_when_one_key_changes_often<H: NotifierHarness>(harness: &H) {
    let (notifier, mut reader) = harness.open();
    let value = "v".repeat(1 << 10);
    let _notifier = at_once(notifier, (1..=20_000).map(|revision| put("k", revision, &value)).collect());
    read_until(&mut reader, 20_000);
}

/// *In order*: several keys may have one revision, and are received in the order in which they were given.
pub fn changes_of_one_revision_are_all_received<H: NotifierHarness>(harness: &H) {
    let (notifier, mut reader) = harness.open();
    let changes = [put("b", 5, "1"), put("a", 5, "2"), delete("c", 5), put("b", 6, "3"), put("d", 6, "4")];
    for (sequence, change) in (1..).zip(&changes) {
        let ends_revision = matches!(sequence, 3 | 5);
        let event = Event::in_sequence(EventKind::Change(change.clone()), sequence, ends_revision);
        must_take(notifier.notify(&event));
        let received = read(&mut reader, "a change of a revision that another has too");
        assert_eq!(received.without_skipped(), Received::change(change, None));
    }
}

/// *In order*: whatever is passed over, revisions strictly increase.
pub fn what_is_received_is_in_order_of_revision<H: NotifierHarness>(harness: &H) {
    let (notifier, mut reader) = harness.open();
    let mut random = Random(5);
    let mut last = Revision::ZERO;
    for revision in 1..=3_000 {
        must_take(notify(&notifier, random.change(revision)));
        // Reads now and then, so that some changes are passed over and some are not.
        while random.below(4) == 0
            && let Some(received) = reader.read(Duration::from_micros(1))
        {
            last = increased(&received, last);
        }
    }
    must_take(notify(&notifier, put("end", 3_001, "")));
    while last < Revision::new(3_001) {
        last = increased(&read(&mut reader, "the last change"), last);
    }
}

/// *In order*: conflation is within one key. Changes of 1,000 keys are 1,000 states, however close they follow.
pub fn a_change_never_takes_the_place_of_another_keys<H: NotifierHarness>(harness: &H) {
    let (notifier, mut reader) = harness.open();
    // Neighbours that a careless comparison takes for one: a key and those below it, a prefix, another case.
    let keys = ["a", "a.b", "a.b.c", "ab", "A", "a-b", "b", "b.a"];
    let filler = (0..992).map(|n| format!("filler.n{n}"));
    let keys: Vec<String> = keys.map(String::from).into_iter().chain(filler).collect();
    for (revision, key) in (1..).zip(&keys) {
        let delivery = notify(&notifier, put(key, revision, key));
        assert_eq!(delivery, Delivery::Queued, "{key} had no earlier change that could be conflated");
    }
    for key in &keys {
        assert_eq!(read(&mut reader, key).key().map(Key::as_str), Some(key.as_str()));
    }
}

/// *Latest, always*: a subscriber who reads only after everything has happened ends with what is true.
pub fn the_latest_state_of_each_key_reaches_a_slow_subscriber<H: NotifierHarness>(harness: &H) {
    let (notifier, mut reader) = harness.open();
    let mut random = Random(3);
    let changes: Vec<Change> = (1..=5_000).map(|revision| random.change(revision)).collect();
    for change in &changes {
        must_take(notify(&notifier, change.clone()));
    }
    let received = read_until(&mut reader, 5_000);
    assert_eq!(view(received), view(changes.iter().map(|change| Received::change(change, None)).collect()));
}

/// *Latest, always*: and so does one who reads all the while.
pub fn the_latest_state_of_each_key_reaches_a_busy_subscriber<H: NotifierHarness>(harness: &H) {
    let (notifier, mut reader) = harness.open();
    let mut random = Random(9);
    let changes: Vec<Change> = (1..=20_000).map(|revision| random.change(revision)).collect();
    let given = changes.clone();
    let store = thread::spawn(move || {
        given.into_iter().for_each(|change| must_take(notify(&notifier, change)));
        notifier
    });
    let received = read_until(&mut reader, 20_000);
    drop(store.join().expect("notify panicked"));
    assert_eq!(view(received), view(changes.iter().map(|change| Received::change(change, None)).collect()));
}

/// A delete may take a put's place and a put a delete's; either is received when it is the last.
pub fn a_delete_is_a_state_like_any_other<H: NotifierHarness>(harness: &H) {
    let (notifier, mut reader) = harness.open();
    let changes =
        [put("a", 1, "x"), put("b", 2, "x"), delete("a", 3), delete("b", 4), put("b", 5, "y"), expire("c", 6)];
    for change in &changes {
        must_take(notify(&notifier, change.clone()));
    }
    let view = view(read_until(&mut reader, 6));
    let expected =
        [&changes[2], &changes[4], &changes[5]].map(|change| (change.key.clone(), Received::change(change, None)));
    assert_eq!(view, BTreeMap::from(expected));
}

/// What was received and what was passed over add up, for notifiers that say the latter.
pub fn what_was_passed_over_is_counted<H: NotifierHarness>(harness: &H) {
    let (notifier, mut reader) = harness.open();
    let mut random = Random(17);
    let mut given: BTreeMap<Key, u64> = BTreeMap::new();
    for revision in 1..=2_000 {
        let change = random.change(revision);
        *given.entry(change.key.clone()).or_default() += 1;
        must_take(notify(&notifier, change));
    }
    let mut accounted: BTreeMap<Key, u64> = BTreeMap::new();
    for received in read_until_with_skipped(&mut reader, 2_000) {
        let Some(skipped) = received.skipped() else { return };
        let key = received.key().expect("only changes were given");
        *accounted.entry(key.clone()).or_default() += 1 + skipped;
    }
    assert_eq!(accounted, given, "changes received or passed over, by key");
}

/// *Whole*: every key of a snapshot is received, in key order and with nothing else among them.
pub fn a_snapshot_is_received_whole<H: NotifierHarness>(harness: &H) {
    let (notifier, mut reader) = harness.open();
    let keys: Vec<String> = (100..400).map(|n| format!("a.k{n}")).collect();
    let records = (1..).zip(&keys).map(|(revision, key)| record(key, revision, key)).collect();
    let snapshot = snapshot("a", records, 500);
    must_take(begin(&notifier, &snapshot));
    must_take(notify(&notifier, put("a.k100", 501, "new")));
    must_take(notify(&notifier, put("a.k101", 502, "new")));
    must_take(notify(&notifier, put("a.k101", 503, "newer")));
    let received = read_until(&mut reader, 503);
    assert_eq!(received.get(..301), Some(&plain(Received::snapshot(&snapshot))[..]), "the snapshot");
    assert_eq!(
        view(received[301..].to_vec()).len(),
        2,
        "the two keys that changed after the snapshot are received again"
    );
}

/// *Whole*: that nothing is there is received too.
pub fn an_empty_snapshot_is_received<H: NotifierHarness>(harness: &H) {
    for pattern in ["a", "a.*", "*"] {
        let (notifier, mut reader) = harness.open();
        let snapshot = snapshot(pattern, vec![], 0);
        must_take(begin(&notifier, &snapshot));
        assert_eq!([read(&mut reader, "an empty snapshot")], Received::snapshot(&snapshot)[..]);
    }
}

/// *Whole*: changes given before a snapshot are received before it, or passed over; those given after it, after.
pub fn a_snapshot_keeps_its_place<H: NotifierHarness>(harness: &H) {
    let (notifier, mut reader) = harness.open();
    must_take(notify(&notifier, put("a", 1, "old")));
    must_take(notify(&notifier, put("b", 2, "old")));
    let snapshot = snapshot("*", vec![record("a", 1, "old"), record("b", 2, "old")], 2);
    must_take(begin(&notifier, &snapshot));
    must_take(notify(&notifier, put("a", 3, "new")));
    must_take(notify(&notifier, put("c", 4, "new")));
    let received = read_until(&mut reader, 4);
    let (before, after) = around(&received, &snapshot);
    assert!(
        before.iter().all(|received| received.revision() <= Some(Revision::new(2))),
        "received before the snapshot: {before:?}"
    );
    let expected = [put("a", 3, "new"), put("c", 4, "new")].map(|change| Received::change(&change, None));
    assert_eq!(after, expected, "received after the snapshot");
}

/// *Whole*: a second snapshot does not take the place of the first.
pub fn every_snapshot_is_received<H: NotifierHarness>(harness: &H) {
    let (notifier, mut reader) = harness.open();
    let snapshots = [
        snapshot("a", vec![record("a", 1, "1")], 4),
        snapshot("a", vec![record("a", 1, "1")], 4),
        snapshot("b.*", vec![record("b.c", 3, "3")], 4),
    ];
    for snapshot in &snapshots {
        must_take(begin(&notifier, snapshot));
    }
    must_take(notify(&notifier, put("end", 5, "")));
    let mut received = read_until(&mut reader, 5);
    received.pop();
    assert_eq!(received, plain(snapshots.iter().flat_map(Received::snapshot).collect()));
}

/// *Whole*: that a subscription has ended is received, between what was given before and what was given after.
pub fn the_end_is_received_and_keeps_its_place<H: NotifierHarness>(harness: &H) {
    let (notifier, mut reader) = harness.open();
    let ended = |text, reason| EventKind::Ended { pattern: pattern(text), reason };
    must_take(notify(&notifier, put("a", 1, "before")));
    must_take(notifier.notify(&Event::new(ended("a", EndReason::Unsubscribed))));
    must_take(notify(&notifier, put("b", 2, "between")));
    must_take(notifier.notify(&Event::new(ended("b.*", EndReason::Replaced))));
    must_take(notify(&notifier, put("c", 3, "after")));
    let expected = vec![
        Received::change(&put("a", 1, "before"), None),
        Received::Ended { pattern: pattern("a"), reason: EndReason::Unsubscribed },
        Received::change(&put("b", 2, "between"), None),
        Received::Ended { pattern: pattern("b.*"), reason: EndReason::Replaced },
        Received::change(&put("c", 3, "after"), None),
    ];
    assert_eq!(read_until(&mut reader, 3), expected);
}

/// Whatever bytes a value holds and whatever a key looks like, it arrives so.
pub fn values_and_keys_arrive_as_they_are<H: NotifierHarness>(harness: &H) {
    let (notifier, mut reader) = harness.open();
    let all: Vec<u8> = (0..=255).collect();
    let values: [&[u8]; 7] = [&all, b"", b"\n", b"\r\n\r\n", b"\0", b"\xff\xfe", b"{\"Update\":{}}\n"];
    let keys = ["/etc/x", "a'b\"c", "a\\b", "é.ü", "\u{202e}x", "日本.語", "{a}"];
    let changes: Vec<Change> =
        (1..).zip(keys.into_iter().zip(values)).map(|(r, (key, v))| put_bytes(key, r, v)).collect();
    for change in &changes {
        must_take(notify(&notifier, change.clone()));
    }
    let received = read_until(&mut reader, changes.len() as u64);
    assert_eq!(received, changes.iter().map(|change| Received::change(change, None)).collect::<Vec<_>>());
}

/// A value of a mebibyte is received whole, and what follows it is not lost.
pub fn a_large_value_is_received_whole<H: NotifierHarness>(harness: &H) {
    let (notifier, mut reader) = harness.open();
    let mut random = Random(23);
    let large: Vec<u8> = (0..1 << 20).map(|_| random.next() as u8).collect();
    must_take(notify(&notifier, put_bytes("large", 1, &large)));
    must_take(notify(&notifier, put("small", 2, "x")));
    let received = read_until(&mut reader, 2);
    let Some(Received::Put { value, .. }) = received.first() else { panic!("the large value was not received first") };
    assert!(value.as_ref() == large, "the large value arrived changed ({} bytes)", value.len());
}

/// *Honest*: the store learns that nobody listens any more, soon, and for good.
pub fn after_the_subscriber_is_gone_notify_says_closed<H: NotifierHarness>(harness: &H) {
    let (notifier, mut reader) = harness.open();
    must_take(notify(&notifier, put("a", 1, "x")));
    read(&mut reader, "the first change");
    must_take(notify(&notifier, put("a", 2, "x")));
    drop(reader);
    let deadline = Instant::now() + PATIENCE;
    let mut revisions = 3..;
    // A peer's end is seen by writing to it, and the news takes a moment: so this asks again.
    while notify(&notifier, put("a", revisions.next().expect("endless"), "x")) != Delivery::Closed {
        assert!(Instant::now() < deadline, "the subscriber is gone, yet notify does not say so");
        thread::sleep(Duration::from_millis(1));
    }
    let later = notify(&notifier, put("b", revisions.next().expect("endless"), "x"));
    assert_eq!(later, Delivery::Closed, "the subscriber came back from the dead");
}

/// Gives `changes` from another thread, and fails unless all are taken within [`PATIENCE`].
fn at_once<N: Notifier>(notifier: N, changes: Vec<Change>) -> N {
    let (done, waits) = mpsc::channel();
    let count = changes.len();
    thread::spawn(move || {
        changes.into_iter().for_each(|change| must_take(notify(&notifier, change)));
        let _ = done.send(notifier);
    });
    let taken = waits.recv_timeout(PATIENCE);
    taken.unwrap_or_else(|_| panic!("notify waits for the subscriber: {count} changes were not all taken"))
}

fn notify<N: Notifier>(notifier: &N, change: Change) -> Delivery {
    notifier.notify(&Event::new(EventKind::Change(change)))
}

/// A subscription begins, with a snapshot that is read in two parts.
fn begin<N: Notifier>(notifier: &N, snapshot: &Snapshot) -> Delivery {
    let records = || snapshot.records.iter().map(RecordRef::to_record);
    let (half, pattern) = (snapshot.records.len() / 2, snapshot.pattern.clone());
    let first = Snapshot { records: records().take(half).collect(), is_last: false, ..snapshot.clone() };
    let second = Snapshot { records: records().skip(half).collect(), ..snapshot.clone() };
    let began = Began::new(pattern, snapshot.revision, snapshot.epoch, SnapshotReader::of([first, second]));
    notifier.notify(&Event::new(EventKind::Began(began.with_snapshot())))
}

fn must_take(delivery: Delivery) {
    assert_ne!(delivery, Delivery::Closed, "notify says that a subscriber is gone who is there");
}

fn read<R: Reader>(reader: &mut R, what: &str) -> Received {
    reader.read(PATIENCE).unwrap_or_else(|| panic!("{what} was not received"))
}

/// Everything received up to the change of `revision`, without what was said about passed-over changes.
fn read_until<R: Reader>(reader: &mut R, revision: u64) -> Vec<Received> {
    plain(read_until_with_skipped(reader, revision))
}

fn read_until_with_skipped<R: Reader>(reader: &mut R, revision: u64) -> Vec<Received> {
    let mut received = Vec::new();
    loop {
        let next = read(reader, &format!("the last change, revision {revision},"));
        let at = if next.key().is_some() { next.revision() } else { None };
        assert!(at <= Some(Revision::new(revision)), "a revision was received that was never given: {next:?}");
        received.push(next);
        if at == Some(Revision::new(revision)) {
            return received;
        }
    }
}

fn increased(received: &Received, last: Revision) -> Revision {
    let revision =
        received.revision().unwrap_or_else(|| panic!("only changes were given, but {received:?} was received"));
    assert!(revision > last, "revision {revision} was received after {last}");
    revision
}

/// What a subscriber knows that received all this: the last thing about each key.
fn view(received: Vec<Received>) -> BTreeMap<Key, Received> {
    let keyed = received.into_iter().filter_map(|received| Some((received.key()?.clone(), received.without_skipped())));
    keyed.collect()
}

fn plain(received: Vec<Received>) -> Vec<Received> {
    received.into_iter().map(Received::without_skipped).collect()
}

/// Splits what was received at a snapshot, which must be there in one piece.
fn around(received: &[Received], snapshot: &Snapshot) -> (Vec<Received>, Vec<Received>) {
    let received = plain(received.to_vec());
    let whole = plain(Received::snapshot(snapshot));
    let at = received.windows(whole.len()).position(|window| window == whole);
    let at = at.unwrap_or_else(|| panic!("the snapshot {whole:?} was not received in one piece: {received:?}"));
    (received[..at].to_vec(), received[at + whole.len()..].to_vec())
}

fn key(text: &str) -> Key {
    Key::new(text).unwrap_or_else(|error| panic!("{text:?}: {error}"))
}

fn pattern(text: &str) -> Pattern {
    Pattern::new(text).unwrap_or_else(|error| panic!("{text:?}: {error}"))
}

/// Each key had a value before: none is one that came and went.
const REPLACED: Revision = Revision::new(1);

fn put(at: &str, revision: u64, value: &str) -> Change {
    put_bytes(at, revision, value.as_bytes())
}

fn put_bytes(at: &str, revision: u64, value: &[u8]) -> Change {
    let action = Action::Put { value: Bytes::copy_from_slice(value), expiry: None };
    Change { key: key(at), revision: Revision::new(revision), replaces: REPLACED, action, meta: Meta::NONE }
}

fn delete(at: &str, revision: u64) -> Change {
    Change {
        key: key(at),
        revision: Revision::new(revision),
        replaces: REPLACED,
        action: Action::Delete { reason: Reason::Deleted },
        meta: Meta::NONE,
    }
}

fn expire(at: &str, revision: u64) -> Change {
    Change {
        key: key(at),
        revision: Revision::new(revision),
        replaces: REPLACED,
        action: Action::Delete { reason: Reason::Expired },
        meta: Meta::NONE,
    }
}

fn record(at: &str, revision: u64, value: &str) -> Record {
    let value = Bytes::copy_from_slice(value.as_bytes());
    Record { key: key(at), value, revision: Revision::new(revision), expiry: None }
}

fn snapshot(of: &str, records: Vec<Record>, revision: u64) -> Snapshot {
    let records = records.into_iter().collect();
    let (pattern, revision, epoch) = (pattern(of), Revision::new(revision), Epoch::new(0xabc));
    Snapshot { pattern, records, revision, epoch, is_last: true }
}

/// The same numbers on every machine: a failure is a failure again. (Marsaglia's xorshift.)
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// A change of one of few keys, so that they meet.
    fn change(&mut self, revision: u64) -> Change {
        let at = ["a", "b", "a.a", "a.b", "b.a", "a.a.a", "a.a.b", "A"][self.below(8) as usize];
        match self.below(4) {
            0 => delete(at, revision),
            _ => put(at, revision, &format!("value {revision}")),
        }
    }
}
