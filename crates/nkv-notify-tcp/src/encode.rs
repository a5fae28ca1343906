//! Events as bytes: each change once for each form of values, snapshots piece by piece.

use std::sync::{Arc, OnceLock};

use nkv_core::{Action, Change, Event, EventKind, Reason, Snapshot};
use nkv_protocol::{ChangeNotice, Chunks, ValueForm, hello, synced, unsubscribed};

/// The encoded forms of one change, kept with the event and shared by all connections.
#[derive(Default)]
struct Encoded {
    bytes: OnceLock<ChangeNotice>,
    text: OnceLock<ChangeNotice>,
    payload: OnceLock<ChangeNotice>,
}

/// A snapshot that is being written.
#[derive(Debug)]
pub(crate) struct SnapshotWriter {
    event: Arc<Event>,
    next: usize,
}

/// Writes an event; a snapshot only begins here and is returned to be continued.
pub(crate) fn event(event: Arc<Event>, skipped: u64, form: ValueForm, out: &mut Chunks) -> Option<SnapshotWriter> {
    match event.kind() {
        EventKind::Change(change) => {
            let encoded = event.memo(|_| Encoded::default());
            let slot = match form {
                ValueForm::Bytes => &encoded.bytes,
                ValueForm::Text => &encoded.text,
                ValueForm::Payload => &encoded.payload,
            };
            slot.get_or_init(|| notice(change, form)).write(skipped, out);
        }
        EventKind::Snapshot(_) => {
            hello(out);
            return Some(SnapshotWriter { event, next: 0 });
        }
        EventKind::Ended { pattern, reason } => unsubscribed(&pattern.to_string(), reason.as_str(), out),
        // An event that this crate is too old to know has no words on the wire.
        _ => {}
    }
    None
}

fn notice(change: &Change, form: ValueForm) -> ChangeNotice {
    let (key, revision) = (change.key.as_str(), change.revision.get());
    match &change.action {
        Action::Put { value, .. } => ChangeNotice::update(key, value, revision, form),
        Action::Delete { reason } => ChangeNotice::close(key, revision, *reason == Reason::Expired),
    }
}

impl SnapshotWriter {
    /// Writes on until `out` holds `len` bytes; true when the snapshot is complete.
    pub(crate) fn write(&mut self, form: ValueForm, len: usize, out: &mut Chunks) -> bool {
        let EventKind::Snapshot(Snapshot { pattern, records, revision, epoch }) = self.event.kind() else {
            return true;
        };
        while let Some(record) = records.get(self.next) {
            if out.len() >= len {
                return false;
            }
            ChangeNotice::update(record.key, &record.value.to_bytes(), record.revision.get(), form).write(0, out);
            self.next = self.next.saturating_add(1);
        }
        synced(&pattern.to_string(), revision.get(), &epoch.to_string(), out);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nkv_core::{Key, Revision};

    #[test]
    fn an_event_is_encoded_once_for_each_form() {
        let action = Action::Put { value: vec![b'"'; 10_000].into(), expiry: None };
        let change =
            Change { key: Key::new("a").unwrap(), revision: Revision::new(1), replaces: Revision::ZERO, action };
        let change = Event::new(EventKind::Change(change));
        let mut addresses = Vec::new();
        for form in [ValueForm::Bytes, ValueForm::Text, ValueForm::Bytes, ValueForm::Text] {
            let mut out = Chunks::default();
            assert!(event(Arc::clone(&change), 0, form, &mut out).is_none());
            // What is long is not copied, so its address tells which encoding it is.
            addresses.push(out.take()[0].as_ptr());
        }
        assert_eq!(addresses[..2], addresses[2..]);
        assert_ne!(addresses[0], addresses[1]);
    }
}
