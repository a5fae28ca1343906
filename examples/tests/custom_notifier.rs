//! The notifier of `custom_notifier.rs` keeps the contract of `Notifier`.

#![allow(clippy::unwrap_used, reason = "a test may panic, also in its helpers")]

#[path = "../custom_notifier.rs"]
#[expect(dead_code, reason = "the example's main")]
mod custom_notifier;

use std::io::{BufRead, BufReader, ErrorKind};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use custom_notifier::{Line, LineNotifier};
use nkv_core::{EndReason, Key, Pattern, Reason, Revision};
use nkv_testkit::notifier::{Reader, Received};

nkv_testkit::notifier_conformance!(|| {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (LineNotifier::spawn(ours), LineReader { lines: BufReader::new(theirs), part: Vec::new() })
});

struct LineReader {
    lines: BufReader<UnixStream>,
    /// A line whose end has not come yet.
    part: Vec<u8>,
}

impl Reader for LineReader {
    fn read(&mut self, patience: Duration) -> Option<Received> {
        self.lines.get_ref().set_read_timeout(Some(patience)).unwrap();
        match self.lines.read_until(b'\n', &mut self.part) {
            Ok(0) => None,
            Ok(_) => Some(received(serde_json::from_slice(&std::mem::take(&mut self.part)).unwrap())),
            Err(error) if error.kind() == ErrorKind::WouldBlock => None,
            Err(error) => panic!("reading failed: {error}"),
        }
    }
}

fn received(line: Line) -> Received {
    match line {
        Line::Put { key, value, revision, skipped } => {
            let (key, revision) = (Key::new(&key).unwrap(), Revision::new(revision));
            Received::Put { key, value: value.into(), revision, skipped: Some(skipped) }
        }
        Line::Delete { key, reason, revision, skipped } => {
            let reason = [Reason::Deleted, Reason::Expired].into_iter().find(|known| known.as_str() == reason).unwrap();
            let (key, revision) = (Key::new(&key).unwrap(), Revision::new(revision));
            Received::Delete { key, reason, revision, skipped: Some(skipped) }
        }
        Line::Reset { pattern } => Received::Reset { pattern: Pattern::new(&pattern).unwrap() },
        Line::Synced { pattern, revision, epoch } => {
            let (pattern, revision) = (Pattern::new(&pattern).unwrap(), Revision::new(revision));
            Received::Synced { pattern, revision, epoch: epoch.parse().unwrap() }
        }
        Line::Ended { pattern, reason } => {
            let known = [EndReason::Unsubscribed, EndReason::Replaced];
            let reason = known.into_iter().find(|known| known.as_str() == reason).unwrap();
            Received::Ended { pattern: Pattern::new(&pattern).unwrap(), reason }
        }
    }
}
