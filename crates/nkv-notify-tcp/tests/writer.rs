//! The writer task: order, stalls, room, one encoding for all.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use bytes::{BufMut, Bytes};
use nkv_core::mailbox::ITEM_LEN;
use nkv_core::{
    Action, Began, Change, Delivery, Epoch, Event, EventKind, Key, Notifier, Pattern, Record, Revision, Snapshot,
    SnapshotReader,
};
use nkv_notify_tcp::{NotifierOptions, Outbox, TcpNotifier, WriterEnd};
use nkv_protocol::{Chunks, Message, MessageDecoder, ValueForm};
use tokio::io::{AsyncReadExt, DuplexStream, duplex};
use tokio::time::{Instant, timeout};

fn put(key: &str, value: impl Into<Bytes>, revision: u64) -> Arc<Event> {
    let action = Action::Put { value: value.into(), expiry: None };
    let change =
        Change { key: Key::new(key).unwrap(), revision: Revision::new(revision), replaces: Revision::ZERO, action };
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

#[tokio::test]
async fn nothing_comes_between_hello_and_synced_however_long_the_snapshot() {
    let (ours, theirs) = duplex(512);
    let (notifier, _writer) = TcpNotifier::spawn(ours, NotifierOptions::default());
    let record = |n| Record {
        key: Key::new(&format!("s.{n:04}")).unwrap(),
        value: Bytes::from(vec![1; 100]),
        revision: Revision::new(n + 1),
        expiry: None,
    };
    let (pattern, revision, epoch) = (Pattern::new("s").unwrap(), Revision::new(3_000), Epoch::new(5));
    let part = |at: u64| {
        let records = (1_000 * at..1_000 * (at + 1)).map(record).collect();
        Snapshot { pattern: pattern.clone(), records, revision, epoch, is_last: at == 2 }
    };
    let began = Began::new(pattern.clone(), revision, epoch, SnapshotReader::of((0..3).map(part))).with_snapshot();
    assert_eq!(notifier.notify(&put("other", "before", 2_999)), Delivery::Queued);
    assert_eq!(notifier.notify(&Event::new(EventKind::Began(began))), Delivery::Queued);
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
async fn whoever_answers_too_much_waits_for_room() {
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
fn is_held_up(outbox: &mut Outbox, told: &Waker, ours: &mut DuplexStream) -> bool {
    match outbox.poll(&mut Context::from_waker(Waker::noop()), told, ours) {
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
    let told = Waker::from(Arc::clone(&woken));
    outbox.send(text("more than ten bytes"));
    for (revision, delivery) in (1..).zip([Delivery::Queued, Delivery::Conflated, Delivery::Conflated]) {
        assert!(is_held_up(&mut outbox, &told, &mut ours));
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
    let long = "v".repeat((64 << 10) - ITEM_LEN - "a".len());
    assert_eq!(notifier.notify(&put("a", long.clone(), 1)), Delivery::Queued);
    assert_eq!(notifier.notify(&put("b", "short", 2)), Delivery::Queued);
    notifier.close();
    let all = all(theirs).await;
    assert!(all.contains(&long) && all.contains("short"), "{} bytes", all.len());
}
