//! The writer task: order, stalls, room, one encoding for all.

#![allow(clippy::unwrap_used)]

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use bytes::{BufMut, Bytes};
use nkv_core::mailbox::ITEM_LEN;
use nkv_core::{
    Action, Began, Change, Delivery, Epoch, Event, EventKind, Key, Meta, Notifier, Pattern, Record, Revision, Snapshot,
    SnapshotReader,
};
use nkv_notify_tcp::{NotifierOptions, Outbox, TcpNotifier, WriterEnd};
use nkv_protocol::{Chunks, Features, Message, MessageDecoder, ValueForm};
use tokio::io::{AsyncReadExt, AsyncWrite, DuplexStream, duplex};
use tokio::time::{Instant, timeout};

fn put(key: &str, value: impl Into<Bytes>, revision: u64) -> Arc<Event> {
    let action = Action::Put { value: value.into(), expiry: None };
    let change = Change {
        key: Key::new(key).unwrap(),
        revision: Revision::new(revision),
        replaces: Revision::ZERO,
        action,
        meta: Meta::NONE,
    };
    Event::new(EventKind::Change(change))
}

fn text(text: &str) -> Chunks {
    let mut chunks = Chunks::default();
    chunks.tail().put_slice(text.as_bytes());
    chunks
}

async fn all(mut stream: DuplexStream) -> String {
    let mut all = String::new();
    timeout(Duration::from_secs(10), stream.read_to_string(&mut all)).await.unwrap().unwrap();
    all
}

#[tokio::test]
async fn answers_and_events_come_in_the_order_they_were_given_and_never_mixed() {
    let (ours, theirs) = duplex(7);
    let (notifier, writer) = TcpNotifier::spawn(ours, NotifierOptions::default());
    notifier.set_form(ValueForm::Text);
    notifier.send(&mut text("answer 1\n"));
    assert_eq!(notifier.notify(&put("a", "x", 1)), Delivery::Queued);
    notifier.send(&mut text("answer 2\n"));
    assert_eq!(notifier.notify(&put("a", "y", 2)), Delivery::Conflated);
    notifier.close();
    let expected = "answer 1\nanswer 2\n{\"Update\":{\"key\":\"a\",\"value\":\"y\",\"revision\":2,\"skipped\":1}}\n";
    assert_eq!(all(theirs).await, expected);
    assert!(matches!(writer.await.unwrap(), WriterEnd::Finished));
    assert_eq!(notifier.notify(&put("a", "z", 3)), Delivery::Closed);
}

#[tokio::test]
async fn a_connection_ends_when_the_data_begins_another_epoch() {
    let (ours, theirs) = duplex(1_000);
    let (notifier, writer) = TcpNotifier::spawn(ours, NotifierOptions::default());
    notifier.set_features(Features::RESET);
    let store = nkv_core::NotifyKeyValue::open(nkv_core::NoPersist::default()).unwrap();
    store.subscribe(nkv_core::Pattern::All, "me".into(), notifier.clone(), false);
    store.replace(Vec::new(), Revision::new(5), Epoch::new(9)).unwrap();
    assert!(matches!(timeout(Duration::from_secs(60), writer).await.unwrap().unwrap(), WriterEnd::Finished));
    let sent = all(theirs).await;
    assert_eq!((sent.as_str(), notifier.has_overflowed(), store.subscriptions()), ("\"Hello\"\n", false, 0));
}

#[tokio::test]
async fn a_long_value_travels_whole_between_short_ones() {
    let (ours, theirs) = duplex(1_000);
    let (notifier, _writer) = TcpNotifier::spawn(ours, NotifierOptions::default());
    notifier.set_form(ValueForm::Payload);
    let long = Bytes::from(vec![b'v'; 300_000]);
    for (revision, value) in (1..).zip([Bytes::from("short"), long.clone(), Bytes::new(), long]) {
        assert_eq!(notifier.notify(&put(&format!("k{revision}"), value, revision)), Delivery::Queued);
    }
    notifier.close();
    let all = all(theirs).await;
    let (mut start, mut lens) = (0, Vec::new());
    let mut decoder = MessageDecoder::new();
    while let (consumed, Some(message)) = decoder.decode(&all.as_bytes()[start..]).unwrap() {
        start += consumed;
        let Message::Update { value, .. } = message else { panic!("{message:?}") };
        lens.push(value.len());
    }
    assert_eq!((start, lens), (all.len(), vec![5, 300_000, 0, 300_000]));
}

/// The beginning of a subscription to `s` with a snapshot of 3,000 keys, in three parts.
fn long_snapshot(epoch: Epoch) -> Arc<Event> {
    let record = |n| Record {
        key: Key::new(&format!("s.{n:04}")).unwrap(),
        value: Bytes::from(vec![1; 100]),
        revision: Revision::new(n + 1),
        expiry: None,
    };
    let (pattern, revision) = (Pattern::new("s").unwrap(), Revision::new(3_000));
    let part = |at: u64| {
        let records = (1_000 * at..1_000 * (at + 1)).map(record).collect();
        Snapshot { pattern: pattern.clone(), records, revision, epoch, is_last: at == 2 }
    };
    let began = Began::new(pattern.clone(), revision, epoch, SnapshotReader::of((0..3).map(part))).with_snapshot();
    Event::new(EventKind::Began(began))
}

#[tokio::test]
async fn nothing_comes_between_hello_and_synced_however_long_the_snapshot() {
    let (ours, theirs) = duplex(512);
    let (notifier, _writer) = TcpNotifier::spawn(ours, NotifierOptions::default());
    let epoch = Epoch::new(5);
    assert_eq!(notifier.notify(&put("other", "before", 2_999)), Delivery::Queued);
    assert_eq!(notifier.notify(&long_snapshot(epoch)), Delivery::Queued);
    assert_eq!(notifier.notify(&put("s.0001", "after", 3_001)), Delivery::Queued);
    notifier.send(&mut text("answer\n"));
    notifier.close();
    let all = all(theirs).await;
    let lines: Vec<&str> = all.lines().collect();
    assert_eq!(lines.len(), 3_005);
    assert!(lines[0].contains("\"other\"") && lines[1] == "\"Hello\"");
    for (n, line) in lines[2..3_002].iter().enumerate() {
        assert!(line.contains(&format!("\"s.{n:04}\"")), "{n}: {line}");
    }
    assert_eq!(lines[3_002], format!("{{\"Synced\":{{\"key\":\"s\",\"revision\":3000,\"epoch\":\"{epoch}\"}}}}"));
    assert!(lines[3_003].contains("\"revision\":3001") && lines[3_004] == "answer");
}

// What says so was taken off what waits, to which it had not been added: the connection was full for good.
#[tokio::test]
async fn a_subscription_that_begins_anew_takes_nothing_off_what_waits() {
    let total = Arc::<AtomicUsize>::default();
    let options = NotifierOptions { waiting_total: Arc::clone(&total), ..NotifierOptions::default() };
    let (ours, theirs) = duplex(1_000);
    let (notifier, _writer) = TcpNotifier::spawn(ours, options);
    notifier.set_features(Features::RESET);
    let (pattern, revision, epoch) = (Pattern::new("s").unwrap(), Revision::new(1), Epoch::new(5));
    let records = std::iter::empty::<Record>().collect();
    let part = Snapshot { pattern: pattern.clone(), records, revision, epoch, is_last: true };
    let began = Began::new(pattern, revision, epoch, SnapshotReader::of([part]));
    assert_eq!(notifier.notify(&Event::new(EventKind::Began(began))), Delivery::Queued);
    notifier.give_up();
    notifier.close();
    let all = all(theirs).await;
    let words: Vec<&str> = all.lines().filter_map(|line| line.split('"').nth(1)).collect();
    assert_eq!(words, ["Hello", "Reset", "Synced"]);
    assert_eq!((notifier.waiting(), total.load(SeqCst)), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_takes_nothing_is_cut_after_the_stall_limit() {
    let (ours, mut theirs) = duplex(10);
    let options = NotifierOptions { stall_limit: Duration::from_secs(30), ..NotifierOptions::default() };
    let (notifier, mut writer) = TcpNotifier::spawn(ours, options);
    let start = Instant::now();
    notifier.send(&mut text("more than ten bytes, twice and more"));
    // A byte taken now and then is enough to stay.
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_secs(29)).await;
        assert!(!writer.is_finished());
        theirs.read_u8().await.unwrap();
    }
    let end = (&mut writer).await.unwrap();
    assert!(matches!(end, WriterEnd::Stalled), "{end:?}");
    assert_eq!(start.elapsed().as_secs(), 3 * 29 + 30);
    assert_eq!(notifier.notify(&put("a", "x", 1)), Delivery::Closed);
    notifier.room().await; // does not wait for what never comes
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_answers_too_much_waits_for_room() {
    let (ours, mut theirs) = duplex(10);
    let options = NotifierOptions { waiting_max: 100, ..NotifierOptions::default() };
    let (notifier, _writer) = TcpNotifier::spawn(ours, options);
    notifier.send(&mut text(&"x".repeat(100)));
    timeout(Duration::from_secs(1), notifier.room()).await.unwrap();
    notifier.send(&mut text("y"));
    assert!(timeout(Duration::from_secs(1), notifier.room()).await.is_err(), "there is no room");
    let mut all = vec![0; 101];
    theirs.read_exact(&mut all).await.unwrap();
    timeout(Duration::from_secs(1), notifier.room()).await.unwrap();
}

#[derive(Default)]
struct CountingWaker(AtomicUsize);

impl Wake for CountingWaker {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, SeqCst);
    }
}

/// Polls by hand an outbox whose peer is too slow for what it is sent.
fn is_held_up(outbox: &mut Outbox, change_waker: &Waker, ours: &mut DuplexStream) -> bool {
    match outbox.poll(&mut Context::from_waker(Waker::noop()), change_waker, ours) {
        Poll::Pending => true,
        Poll::Ready(end) => panic!("{end:?}"),
    }
}

#[tokio::test]
async fn answers_that_the_peer_does_not_take_are_counted_until_it_does() {
    let (mut ours, mut theirs) = duplex(10);
    let (notifier, mut outbox) = TcpNotifier::new(NotifierOptions::default());
    for (sent, waiting) in [(30, 30), (1, 31)] {
        outbox.send(text(&"x".repeat(sent)));
        assert!(is_held_up(&mut outbox, Waker::noop(), &mut ours));
        assert_eq!(notifier.waiting(), waiting);
    }
    for waiting in [31, 1, 0] {
        theirs.read_exact(&mut [0; 10]).await.unwrap();
        assert!(is_held_up(&mut outbox, Waker::noop(), &mut ours));
        assert_eq!(notifier.waiting(), waiting);
    }
}

// An answer waited for the whole snapshot before it.
#[tokio::test]
async fn answers_that_go_ahead_pass_what_waits_and_nothing_that_is_being_written() {
    let (mut ours, theirs) = duplex(512);
    let (notifier, mut outbox) = TcpNotifier::new(NotifierOptions::default());
    assert_eq!(notifier.notify(&long_snapshot(Epoch::new(5))), Delivery::Queued);
    assert!(is_held_up(&mut outbox, Waker::noop(), &mut ours));
    let before = notifier.waiting();
    outbox.send(text("in its turn\n"));
    outbox.send_ahead(text("first\n"));
    outbox.send_ahead(text("second\n"));
    assert_eq!(notifier.waiting() - before, 25);
    notifier.close();
    tokio::spawn(async move { poll_fn(|cx| outbox.poll(cx, cx.waker(), &mut ours)).await });
    let all = all(theirs).await;
    let lines: Vec<&str> = all.lines().collect();
    let at = |line| lines.iter().position(|found| *found == line).unwrap();
    assert_eq!((lines.len(), at("in its turn"), at("second") - at("first")), (3_005, 3_004, 1));
    assert!(at("first") < 1_500, "behind {} lines", at("first"));
    assert!(lines.iter().all(|line| line.starts_with("{\"") || line.len() < 15), "within a message");
    assert_eq!(notifier.waiting(), 0);
}

#[tokio::test]
async fn notifications_keep_their_share_beside_answers_that_go_ahead() {
    let (mut ours, theirs) = duplex(1_000);
    let (notifier, mut outbox) = TcpNotifier::new(NotifierOptions::default());
    outbox.send_ahead(text(&"x".repeat(100_000)));
    assert_eq!(notifier.notify(&put("a", "1", 1)), Delivery::Queued);
    assert!(is_held_up(&mut outbox, Waker::noop(), &mut ours));
    // More than a write takes waits all the time.
    outbox.send_ahead(text(&"y".repeat(100_000)));
    notifier.close();
    tokio::spawn(async move { poll_fn(|cx| outbox.poll(cx, cx.waker(), &mut ours)).await });
    let all = all(theirs).await;
    assert!(all[100_000..].starts_with("{\"Update\"") && all.ends_with('y'), "{}", &all[100_000..100_050]);
}

#[tokio::test]
async fn what_the_peer_does_not_take_of_a_change_is_known_and_who_shares_it() {
    let event = put("a", vec![b'v'; 10_000], 1);
    let mut connections = [(); 2].map(|()| (TcpNotifier::new(NotifierOptions::default()), duplex(10)));
    for ((notifier, outbox), (ours, _)) in &mut connections {
        notifier.set_form(ValueForm::Text);
        assert_eq!(notifier.notify(&event), Delivery::Queued);
        assert!(is_held_up(outbox, Waker::noop(), ours));
    }
    let [((one, _), _), ((other, outbox), (ours, theirs))] = &mut connections;
    assert_eq!(one.gathered(), other.gathered());
    assert!(one.gathered().1 > 10_000 && one.waiting() == 0, "{one:?}");
    for left in (0..other.gathered().1).rev() {
        theirs.read_u8().await.unwrap();
        assert!(is_held_up(outbox, Waker::noop(), ours));
        assert!(left >= 10 || other.gathered().1 == 0, "{left} of it are on their way");
    }
}

#[tokio::test]
async fn what_comes_while_the_peer_takes_nothing_is_conflated_and_a_call_is_heard() {
    let (mut ours, _theirs) = duplex(10);
    let (notifier, mut outbox) = TcpNotifier::new(NotifierOptions::default());
    let woken = Arc::new(CountingWaker::default());
    let change_waker = Waker::from(Arc::clone(&woken));
    outbox.send(text("more than ten bytes"));
    for (revision, delivery) in (1..).zip([Delivery::Queued, Delivery::Conflated, Delivery::Conflated]) {
        assert!(is_held_up(&mut outbox, &change_waker, &mut ours));
        assert_eq!(notifier.notify(&put("a", "x", revision)), delivery);
    }
    let before = woken.0.load(SeqCst);
    notifier.wake();
    assert_eq!((notifier.backlog().queued, woken.0.load(SeqCst)), (1, before + 1));
}

// A value that was so long that it was all that was taken at a time, and a little less than that when it was encoded,
// was replaced by an empty buffer when more was taken.
#[tokio::test]
async fn a_long_value_alone_is_added_to() {
    let (ours, theirs) = duplex(10);
    let (notifier, _writer) = TcpNotifier::spawn(ours, NotifierOptions::default());
    notifier.set_form(ValueForm::Text);
    let long = "v".repeat((16 << 10) - ITEM_LEN - "a".len());
    assert_eq!(notifier.notify(&put("a", long.clone(), 1)), Delivery::Queued);
    assert_eq!(notifier.notify(&put("b", "short", 2)), Delivery::Queued);
    notifier.close();
    let all = all(theirs).await;
    assert!(all.contains(&long) && all.contains("short"), "{} bytes", all.len());
}

/// Takes all that is written, and notes each write with its time.
#[derive(Default)]
struct Writes(Vec<(Instant, String)>);

impl AsyncWrite for Writes {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.0.push((Instant::now(), String::from_utf8(bytes.to_vec()).unwrap()));
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Err(io::ErrorKind::Unsupported.into()))
    }
}

impl Writes {
    /// What was written since the last time. Each write was one line, and at least `pause` after the one before.
    fn lines(&mut self, pause: Duration) -> Vec<String> {
        for pair in self.0.windows(2) {
            assert!(pair[1].0 - pair[0].0 >= pause, "{pair:?}");
        }
        let lines: Vec<_> = self.0.drain(..).map(|(_, line)| line).collect();
        for line in &lines {
            assert_eq!(line.find('\n'), Some(line.len() - 1), "one line: {line}");
        }
        lines
    }
}

const PAUSE: Duration = Duration::from_millis(2);

fn paced(slack: usize) -> (TcpNotifier, Outbox) {
    let (notifier, mut outbox) = TcpNotifier::new(NotifierOptions { slack, ..NotifierOptions::default() });
    outbox.pace();
    (notifier, outbox)
}

fn notify(notifier: &TcpNotifier, event: &Arc<Event>) {
    assert_ne!(notifier.notify(event), Delivery::Closed);
}

/// Polls for this time.
async fn poll_for(time: Duration, outbox: &mut Outbox, writes: &mut Writes) {
    let end = poll_fn(|cx| outbox.poll(cx, cx.waker(), writes));
    assert!(timeout(time, end).await.is_err(), "it has ended");
}

#[tokio::test(start_paused = true)]
async fn a_paced_outbox_writes_one_message_at_a_time_and_what_waits_is_conflated() {
    let (notifier, mut outbox) = paced(64 << 10);
    let mut writes = Writes::default();
    outbox.send(text("\"Hello\"\n"));
    outbox.send(text("answer 1\nanswer 2\n"));
    poll_for(PAUSE / 2, &mut outbox, &mut writes).await;
    assert_eq!(writes.lines(PAUSE), ["\"Hello\"\n"], "nothing comes with it, and nothing too soon");
    let mut revision = 0;
    for round in 0..20 {
        for key in ["a", "b", "c"] {
            revision += 1;
            notify(&notifier, &put(key, format!("{round}"), revision));
        }
    }
    assert_eq!(notifier.backlog().queued, 4, "an item of two answers, and a change of each key");
    poll_for(Duration::from_secs(1), &mut outbox, &mut writes).await;
    let lines = writes.lines(PAUSE);
    let values = |n: usize| format!("\"value\":[49,57],\"revision\":{n},\"skipped\":19}}}}\n");
    assert_eq!(lines[..2], ["answer 1\n", "answer 2\n"]);
    assert!((2..5).all(|at| lines[at].ends_with(&values(56 + at))) && lines.len() == 5, "{lines:?}");

    // What waits while others are written is conflated too: none of it was taken before its time.
    for key in ["a", "b", "c", "d"] {
        revision += 1;
        notify(&notifier, &put(key, "1", revision));
    }
    poll_for(PAUSE / 2, &mut outbox, &mut writes).await;
    for key in ["d", "c", "b"] {
        revision += 1;
        notify(&notifier, &put(key, "2", revision));
    }
    poll_for(Duration::from_secs(1), &mut outbox, &mut writes).await;
    let keys: Vec<_> = writes.lines(PAUSE).iter().map(|line| line[18..19].to_owned() + &line[31..32]).collect();
    assert_eq!(keys, ["a9", "d0", "c0", "b0"], "the second digit of the value in numbers");

    notify(&notifier, &put("a", "last", revision + 1));
    notifier.close();
    let end = poll_fn(|cx| outbox.poll(cx, cx.waker(), &mut writes));
    assert!(matches!(end.await, WriterEnd::Finished), "how the connection ends is left to its owner");
    assert_eq!(writes.lines(PAUSE).len(), 1);
    assert_eq!(notifier.waiting(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_paced_line_leaves_its_revision_out_only_to_fit_into_a_read() {
    let (notifier, mut outbox) = paced(0);
    let mut writes = Writes::default();
    let frame = "{\"Update\":{\"key\":\"k\",\"value\":[]}}\n".len();
    let fields = ",\"revision\":1,\"skipped\":0".len();
    // Each byte of 1 is two characters but the last one's comma; a byte of 10 has one more.
    let value = |len: usize| {
        let numbers = len - frame + 1;
        Bytes::from([vec![1; numbers / 2 - numbers % 2], vec![10; numbers % 2]].concat())
    };
    for (len, is_short, revision) in [
        (1_024 - fields - 1, false, 1),
        (1_024 - fields, false, 2),
        (1_024 - fields + 1, true, 3),
        (1_024, true, 4),
        (1_025, false, 5),
        (9_000, false, 6),
    ] {
        notify(&notifier, &put("k", value(len), revision));
        poll_for(Duration::from_secs(1), &mut outbox, &mut writes).await;
        let line = writes.lines(PAUSE).pop().unwrap();
        assert_eq!(line.len(), if is_short { len } else { len + fields }, "{line:.60}");
        assert_eq!(line.contains("revision"), !is_short);
    }
}

#[tokio::test(start_paused = true)]
async fn a_pace_ends_after_what_was_in_hand() {
    let (notifier, mut outbox) = paced(64 << 10);
    let mut writes = Writes::default();
    outbox.send(text("answer 1\nanswer 2\n"));
    poll_for(PAUSE / 2, &mut outbox, &mut writes).await;
    assert!(outbox.is_paced());
    outbox.end_pace();
    assert!(!outbox.is_paced());
    for revision in 1..=3 {
        notify(&notifier, &put("a", "x", revision));
    }
    outbox.send(text("answer 3\n"));
    poll_for(PAUSE / 2, &mut outbox, &mut writes).await;
    let all: Vec<_> = writes.0.iter().map(|(_, bytes)| bytes.lines().count()).collect();
    assert_eq!(all, [1, 1, 4], "the rest in one write, every change of it");
}

#[tokio::test(start_paused = true)]
async fn a_paced_snapshot_comes_message_by_message_too() {
    let (notifier, mut outbox) = paced(0);
    let mut writes = Writes::default();
    let records = ["a", "b", "c"].map(|key| Record {
        key: Key::new(key).unwrap(),
        value: Bytes::from("x"),
        revision: Revision::new(1),
        expiry: None,
    });
    let (revision, epoch) = (Revision::new(7), Epoch::new(1));
    let records = records.into_iter().collect();
    let part = Snapshot { pattern: Pattern::All, records, revision, epoch, is_last: true };
    let began = Began::new(Pattern::All, revision, epoch, SnapshotReader::of([part])).with_snapshot();
    notify(&notifier, &Event::new(EventKind::Began(began)));
    notify(&notifier, &put("a", "y", 8));
    poll_for(Duration::from_secs(1), &mut outbox, &mut writes).await;
    let starts: Vec<_> = writes.lines(PAUSE).iter().map(|line| line[..6].to_owned()).collect();
    assert_eq!(starts, ["\"Hello", "{\"Upda", "{\"Upda", "{\"Upda", "{\"Sync", "{\"Upda"]);
    assert_eq!(notifier.waiting(), 0);
}
