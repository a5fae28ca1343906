//! The testkit's contract of a notifier, through a real socket and the wire's words.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use nkv_core::{EndReason, Key, Notifier, Pattern, Reason, Revision};
use nkv_notify_tcp::{NotifierOptions, TcpNotifier, limit_send_buffer};
use nkv_protocol::{Message, MessageDecoder, Reason as WireReason};
use nkv_testkit::notifier::{Reader, Received};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio::time::timeout;

/// The other end of the connection. The runtime is its own: dropping it ends the connection.
struct Peer {
    runtime: Runtime,
    stream: UnixStream,
    decoder: MessageDecoder,
    buffer: Vec<u8>,
}

impl Peer {
    async fn message(&mut self) -> Option<Message> {
        loop {
            let (consumed, message) = self.decoder.decode(&self.buffer).unwrap();
            self.buffer.drain(..consumed);
            if message.is_some() {
                return message;
            }
            if self.stream.read_buf(&mut self.buffer).await.unwrap() == 0 {
                return None;
            }
        }
    }
}

/// The peer with its runtime apart, so that the one can wait within the other.
struct PeerReader(Option<Peer>);

impl Reader for PeerReader {
    fn read(&mut self, patience: Duration) -> Option<Received> {
        let mut peer = self.0.take()?;
        let handle = peer.runtime.handle().clone();
        let received = handle.block_on(async {
            loop {
                match received(timeout(patience, peer.message()).await.ok()??) {
                    Some(received) => return Some(received),
                    None => continue, // the answer to the subscribe
                }
            }
        });
        self.0 = Some(peer);
        received
    }
}

fn received(message: Message) -> Option<Received> {
    let key = |key: &str| Key::new(key).unwrap();
    let pattern = |pattern: &str| Pattern::new(pattern).unwrap();
    Some(match message {
        Message::Update { key: k, value, revision, skipped, .. } => {
            Received::Put { key: key(&k), value, revision: Revision::new(revision), skipped: Some(skipped) }
        }
        Message::Close { key: k, reason, revision, skipped, .. } => {
            let (revision, skipped) = (Revision::new(revision), Some(skipped));
            match reason {
                WireReason::Deleted => Received::Delete { key: key(&k), reason: Reason::Deleted, revision, skipped },
                WireReason::Expired => Received::Delete { key: key(&k), reason: Reason::Expired, revision, skipped },
                WireReason::Unsubscribed => Received::Ended { pattern: pattern(&k), reason: EndReason::Unsubscribed },
                WireReason::Replaced => Received::Ended { pattern: pattern(&k), reason: EndReason::Replaced },
                other => panic!("{other:?}"),
            }
        }
        Message::Reset { key, .. } => Received::Reset { pattern: pattern(&key) },
        Message::Synced { key, revision, epoch, .. } => Received::Synced {
            pattern: pattern(&key),
            revision: Revision::new(revision),
            epoch: epoch.parse().unwrap(),
        },
        Message::Hello | Message::Answer(_) => return None,
        other => panic!("{other:?}"),
    })
}

fn connection() -> (TcpNotifier, PeerReader) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (notifier, stream) = {
        let _within = runtime.enter();
        let (ours, theirs) = UnixStream::pair().unwrap();
        // The smallest buffer there is, so that what waits waits in the mailbox.
        limit_send_buffer(&ours, 1).unwrap();
        (TcpNotifier::spawn(ours, NotifierOptions::default()).0, theirs)
    };
    (notifier, PeerReader(Some(Peer { runtime, stream, decoder: MessageDecoder::new(), buffer: Vec::new() })))
}

mod plain {
    nkv_testkit::notifier_conformance!(super::connection);
}

mod boxed {
    nkv_testkit::notifier_conformance!(|| {
        let (notifier, peer) = super::connection();
        (Box::new(notifier) as Box<dyn super::Notifier>, peer)
    });
}
