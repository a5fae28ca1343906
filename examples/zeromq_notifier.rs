//! A notifier for ZeroMQ: a PUB socket that publishes each change of a branch, for any number of SUB sockets.
//!
//! ```text
//! cargo run -p nkv-examples --features zeromq --example zeromq_notifier
//! ```
//!
//! A message has two or three frames: the key, which is the topic, the revision, and the value; without a value the key is gone.
//! ZeroMQ matches topics as prefixes of bytes: a subscriber to `lamp.` gets the branch.
//!
//! Between the store and the socket is a mailbox, so the store never waits. What nkv promises ends at the PUB socket: that drops
//! messages for a SUB that lags far behind, and for one that has just connected. A subscriber that must end with the latest value
//! of every key takes a PUSH socket of its own, which makes the mailbox wait instead, or nkv's own protocol.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use nkv_core::mailbox::{Item, Mailbox, mailbox};
use nkv_core::{
    Action, Delivery, Event, EventKind, Key, NoPersist, Notifier, NotifyKeyValue, Pattern, PutOptions, Revision,
};
use tokio::time::timeout;
use zeromq::{PubSocket, Socket, SocketRecv, SocketSend, SubSocket, ZmqMessage};

/// Publishes changes.
#[derive(Debug)]
struct ZeroMqNotifier {
    post: Mailbox,
}

impl ZeroMqNotifier {
    fn spawn(mut socket: PubSocket) -> Self {
        let (post, inbox) = mailbox();
        tokio::spawn(async move {
            while let Some(Item::Event { event, .. }) = inbox.take().await {
                for message in messages(&event) {
                    if socket.send(message).await.is_err() {
                        return; // the inbox is dropped, and the store gets `Closed`
                    }
                }
            }
        });
        ZeroMqNotifier { post }
    }
}

impl Notifier for ZeroMqNotifier {
    fn notify(&self, event: &Arc<Event>) -> Delivery {
        self.post.notify(event)
    }
}

fn messages(event: &Event) -> Vec<ZmqMessage> {
    match event.kind() {
        EventKind::Change(change) => match &change.action {
            Action::Put { value, .. } => vec![message(change.key.as_str(), change.revision, Some(value))],
            Action::Delete { .. } => vec![message(change.key.as_str(), change.revision, None)],
        },
        EventKind::Snapshot(part) => {
            part.records.iter().map(|record| message(&record.key, record.revision, Some(&record.value))).collect()
        }
        _ => Vec::new(),
    }
}

fn message(key: &str, revision: Revision, value: Option<&[u8]>) -> ZmqMessage {
    let mut message = ZmqMessage::from(key);
    message.push_back(revision.to_string().into_bytes().into());
    if let Some(value) = value {
        message.push_back(value.to_vec().into());
    }
    message
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut publisher = PubSocket::new();
    let endpoint = publisher.bind("tcp://127.0.0.1:0").await?;
    let store: NotifyKeyValue<NoPersist, ZeroMqNotifier> = NotifyKeyValue::open(NoPersist::default())?;
    store.subscribe(Pattern::new("lamp")?, "zeromq".into(), ZeroMqNotifier::spawn(publisher), true);

    let mut subscriber = SubSocket::new();
    subscriber.connect(&endpoint.to_string()).await?;
    subscriber.subscribe("lamp.").await?;

    // A PUB socket sends nothing to a subscriber that it does not know yet: change the key until the first change arrives.
    let hall = Key::new("lamp.hall")?;
    let mut first = None;
    for _ in 0..1_000 {
        store.put(&hall, "on", PutOptions::default())?;
        first = timeout(Duration::from_millis(20), subscriber.recv()).await.ok();
        if first.is_some() {
            break;
        }
    }
    let first = frames(&first.ok_or("no change arrived")??);
    println!("{first:?}");
    assert_eq!([first[0].as_str(), &first[2]], ["lamp.hall", "on"]);

    store.delete(&Pattern::from(&hall), None)?;
    let gone = loop {
        let next = frames(&timeout(Duration::from_secs(10), subscriber.recv()).await??);
        if next.len() == 2 {
            break next; // behind the puts that were under way
        }
    };
    println!("{gone:?}");
    assert_eq!(gone, ["lamp.hall".to_owned(), store.stats().revision.to_string()]);
    Ok(())
}

fn frames(message: &ZmqMessage) -> Vec<String> {
    message.iter().map(|frame| String::from_utf8_lossy(frame).into_owned()).collect()
}
