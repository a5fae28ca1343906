//! The writer task: order, stalls, room, one encoding for all.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes};
use nkv_core::{Action, Change, Delivery, Epoch, Event, EventKind, Key, Notifier, Pattern, Record, Revision, Snapshot};
use nkv_notify_tcp::{NotifierOptions, TcpNotifier, WriterEnd};
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
    let records = (0..3_000)
        .map(|n| Record {
            key: Key::new(&format!("s.{n:04}")).unwrap(),
            value: Bytes::from(vec![1; 100]),
            revision: Revision::new(n + 1),
            expiry: None,
        })
        .collect();
    let (revision, epoch) = (Revision::new(3_000), Epoch::new(5));
    let snapshot = Snapshot { pattern: Pattern::new("s").unwrap(), records, revision, epoch };
    assert_eq!(notifier.notify(&put("other", "before", 2_999)), Delivery::Queued);
    assert_eq!(notifier.notify(&Event::new(EventKind::Snapshot(snapshot))), Delivery::Queued);
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
