//! A notifier of your own: a subscriber receives one JSON object a line, over anything that takes bytes.
//!
//! ```text
//! cargo run -p nkv-examples --example custom_notifier
//! ```
//!
//! The backlog of a slow subscriber is in a mailbox of nkv-core, which never makes the store wait, keeps the order and
//! conflates. A thread empties it. When writing fails, the subscriber is gone: the thread drops its end of the mailbox, and
//! the store gets `Closed` with the next event.
//!
//! Here the other end of a Unix socket reads the lines; the standard input of another process would do as well.
//! `tests/custom_notifier.rs` has nkv-testkit check the contract.

use std::error::Error;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nkv_core::mailbox::{Inbox, Item, Mailbox, mailbox};
use nkv_core::{
    Action, BeginCause, Delivery, Event, EventKind, Key, NoPersist, Notifier, NotifyKeyValue, Pattern, PutOptions,
    RecordRef,
};
use serde::{Deserialize, Serialize};

/// Notifies one subscriber, in lines of JSON.
#[derive(Debug)]
pub(crate) struct LineNotifier {
    post: Mailbox,
}

/// A line. `reason` is why a key or the subscription is gone.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Line {
    /// A key has a value.
    Put { key: String, value: Vec<u8>, revision: u64, skipped: u64 },
    /// A key is gone.
    Delete { key: String, reason: String, revision: u64, skipped: u64 },
    /// The backlog was dropped: the present state follows, and a key that is not in it is gone.
    Reset { pattern: String },
    /// The puts before this were the present state.
    Synced { pattern: String, revision: u64, epoch: String },
    /// Nothing follows.
    Ended { pattern: String, reason: String },
}

impl LineNotifier {
    /// Writes to `subscriber`, from a thread that ends with its subscriber or with the notifier.
    pub(crate) fn spawn(subscriber: impl Write + Send + 'static) -> Self {
        let (post, inbox) = mailbox();
        thread::spawn(move || write_out(&inbox, &mut BufWriter::new(subscriber)));
        LineNotifier { post }
    }
}

impl Notifier for LineNotifier {
    fn notify(&self, event: &Arc<Event>) -> Delivery {
        self.post.notify(event)
    }
}

/// Until the subscriber is gone: waits for an item, writes it and all that wait behind it, and hands them over.
fn write_out(inbox: &Inbox, subscriber: &mut impl Write) -> io::Result<()> {
    while let Some(mut item) = inbox.take_blocking() {
        loop {
            let Item::Event { event, skipped } = item;
            for line in lines(&event, skipped) {
                serde_json::to_writer(&mut *subscriber, &line)?;
                subscriber.write_all(b"\n")?;
            }
            match inbox.try_take() {
                Some(next) => item = next,
                None => break,
            }
        }
        subscriber.flush()?;
    }
    Ok(())
}

fn lines(event: &Event, skipped: u64) -> Vec<Line> {
    match event.kind() {
        EventKind::Change(change) => {
            let (key, revision) = (change.key.to_string(), change.revision.get());
            vec![match &change.action {
                Action::Put { value, .. } => Line::Put { key, value: value.to_vec(), revision, skipped },
                Action::Delete { reason } => Line::Delete { key, reason: reason.as_str().into(), revision, skipped },
            }]
        }
        EventKind::Snapshot(snapshot) => {
            let (pattern, revision) = (snapshot.pattern.to_string(), snapshot.revision.get());
            let synced = || Line::Synced { pattern, revision, epoch: snapshot.epoch.to_string() };
            snapshot.records.iter().map(present).chain(snapshot.is_last.then(synced)).collect()
        }
        EventKind::Began(began) if began.cause == BeginCause::Reset => {
            vec![Line::Reset { pattern: began.pattern.to_string() }]
        }
        EventKind::Ended { pattern, reason } => {
            vec![Line::Ended { pattern: pattern.to_string(), reason: reason.as_str().into() }]
        }
        // A kind of event that a later nkv-core may add: better to say nothing than something wrong.
        _ => Vec::new(),
    }
}

fn present(record: RecordRef<'_>) -> Line {
    Line::Put { key: record.key.to_string(), value: record.value.to_vec(), revision: record.revision.get(), skipped: 0 }
}

fn main() -> Result<(), Box<dyn Error>> {
    let store: NotifyKeyValue<NoPersist, LineNotifier> = NotifyKeyValue::open(NoPersist::default())?;
    let lamp = Key::new("lamp.hall")?;
    store.put(&lamp, "on", PutOptions::default())?;

    let (ours, theirs) = UnixStream::pair()?;
    theirs.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut subscriber = BufReader::new(theirs).lines();
    let mut next = move || -> Result<Line, Box<dyn Error>> {
        Ok(serde_json::from_str(&subscriber.next().ok_or("the notifier has hung up")??)?)
    };

    store.subscribe(Pattern::new("lamp")?, "panel".into(), LineNotifier::spawn(ours), true);
    let (present, synced) = (next()?, next()?);
    println!("{present:?}\n{synced:?}");
    assert_eq!(present, Line::Put { key: "lamp.hall".into(), value: b"on".into(), revision: 1, skipped: 0 });
    assert!(matches!(synced, Line::Synced { revision: 1, .. }));

    // Many changes, while the subscriber is slow: it misses some, but never the last.
    for n in 2..=10_000_u64 {
        store.put(&lamp, n.to_string(), PutOptions::default())?;
    }
    let (mut received, mut missed) = (0, 0);
    loop {
        let Line::Put { value, revision, skipped, .. } = next()? else { return Err("no put".into()) };
        assert_eq!(value, revision.to_string().into_bytes());
        (received, missed) = (received + 1, missed + skipped);
        if revision == 10_000 {
            break;
        }
    }
    println!("{received} changes were received, {missed} were conflated");
    assert_eq!(received + missed, 9_999);

    store.delete(&Pattern::from(&lamp), None)?;
    let gone = next()?;
    println!("{gone:?}");
    assert!(matches!(gone, Line::Delete { revision: 10_001, .. }));

    // The subscriber hangs up; the store notices, and forgets it.
    drop(next);
    while store.stats().subscriptions > 0 {
        store.put(&lamp, "is there a subscriber?", PutOptions::default())?;
        thread::sleep(Duration::from_millis(1));
    }
    println!("the subscription has ended");
    Ok(())
}
