//! Events as bytes: each change once for each form of values.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};

use nkv_core::{Action, BeginCause, Change, Event, EventKind, Reason, Snapshot, ValueRef};
use nkv_protocol::{ChangeNotice, Chunks, GetEntry, ValueForm, hello, reset, synced, unsubscribed, update};

/// The encoded forms of one change, shared by the connections that are written to at the same time.
#[derive(Default)]
struct Encoded {
    bytes: OnceLock<ChangeNotice>,
    text: OnceLock<ChangeNotice>,
    payload: OnceLock<ChangeNotice>,
}

impl Encoded {
    fn form(&self, form: ValueForm) -> &OnceLock<ChangeNotice> {
        match form {
            ValueForm::Bytes => &self.bytes,
            ValueForm::Text => &self.text,
            ValueForm::Payload => &self.payload,
        }
    }
}

/// An event whose encodings are kept for the next connection that is written to, and what these take, about.
struct Recent {
    event: Arc<Event>,
    encoded: Arc<Encoded>,
    len: usize,
}

/// How many bytes of encodings a thread keeps, or those of one event.
const RECENT_LEN_MAX: usize = 256 << 10;

#[derive(Default)]
struct AllRecent {
    events: VecDeque<Recent>,
    len: usize,
    /// Where the next event is looked for: connections are written the same events, one behind the other.
    next: usize,
}

thread_local! {
    static RECENT: RefCell<AllRecent> = RefCell::default();
}

/// Forgets the encodings that this thread keeps: all connections that are to be written to have been. An event that
/// waits for others then holds its value alone, and is encoded again when their turn comes.
pub fn forget_encodings() {
    let recent = RECENT.take();
    recent.events.iter().for_each(|recent| recent.event.forget_memos());
}

impl AllRecent {
    /// The encodings of an event, if they are kept where they are most likely to be: no lock and no counting, as
    /// [`Event::memo`] would take.
    fn find(&mut self, event: &Arc<Event>) -> Option<&Encoded> {
        let is_it = |place: &usize| self.events.get(*place).is_some_and(|recent| Arc::ptr_eq(&recent.event, event));
        let place = [self.next, 0].into_iter().find(is_it)?;
        self.next = place.saturating_add(1);
        self.events.get(place).map(|recent| &*recent.encoded)
    }

    fn keep(&mut self, event: &Arc<Event>, encoded: Arc<Encoded>, len: usize) {
        match self.events.back_mut().filter(|last| Arc::ptr_eq(&last.event, event)) {
            Some(last) => last.len = last.len.saturating_add(len),
            None => self.events.push_back(Recent { event: Arc::clone(event), encoded, len }),
        }
        self.len = self.len.saturating_add(len);
        while self.len > RECENT_LEN_MAX && self.events.len() > 1 {
            let Some(oldest) = self.events.pop_front() else { break };
            self.len = self.len.saturating_sub(oldest.len);
            oldest.event.forget_memos();
        }
    }
}

/// Writes an event.
pub(crate) fn event(event: &Arc<Event>, skipped: u64, form: ValueForm, out: &mut Chunks) {
    match event.kind() {
        EventKind::Change(change) => RECENT.with_borrow_mut(|recent| {
            if let Some(known) = recent.find(event).and_then(|encoded| encoded.form(form).get()) {
                return known.write(skipped, out);
            }
            let encoded = event.memo(|_| Encoded::default());
            let mut is_made = false;
            let notice = encoded.form(form).get_or_init(|| {
                is_made = true;
                notice(change, form)
            });
            notice.write(skipped, out);
            let len = notice.size();
            if is_made {
                recent.keep(event, encoded, len);
            }
        }),
        EventKind::Began(began) if began.cause == BeginCause::Reset => reset(&began.pattern.to_string(), out),
        EventKind::Began(_) => hello(out),
        EventKind::Snapshot(snapshot) => part(snapshot, form, out),
        EventKind::Ended { pattern, reason } => unsubscribed(&pattern.to_string(), reason.as_str(), out),
        // An event that this crate is too old to know has no words on the wire.
        _ => {}
    }
}

fn notice(change: &Change, form: ValueForm) -> ChangeNotice {
    let (key, revision) = (change.key.as_str(), change.revision.get());
    match &change.action {
        Action::Put { value, .. } => ChangeNotice::update(key, value, revision, form),
        Action::Delete { reason } => ChangeNotice::close(key, revision, *reason == Reason::Expired),
    }
}

fn part(snapshot: &Snapshot, form: ValueForm, out: &mut Chunks) {
    let Snapshot { pattern, records, revision, epoch, is_last } = snapshot;
    for record in records.iter() {
        let (value, shared) = match record.value {
            ValueRef::Lent(value) => (value, None),
            ValueRef::Shared(value) => (&value[..], Some(value)),
        };
        update(GetEntry { key: record.key.as_str(), value, shared, revision: record.revision.get() }, form, out);
    }
    if *is_last {
        synced(&pattern.to_string(), revision.get(), &epoch.to_string(), out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nkv_core::{Key, Meta, Revision};

    #[test]
    fn an_event_is_encoded_once_for_each_form() {
        let action = Action::Put { value: vec![b'"'; 10_000].into(), expiry: None };
        let change = Change {
            key: Key::new("a").unwrap(),
            revision: Revision::new(1),
            replaces: Revision::ZERO,
            action,
            meta: Meta::NONE,
        };
        let change = Event::new(EventKind::Change(change));
        let mut addresses = Vec::new();
        let mut kept = Vec::new();
        for form in [ValueForm::Bytes, ValueForm::Text, ValueForm::Bytes, ValueForm::Text] {
            let mut out = Chunks::default();
            event(&change, 0, form, &mut out);
            // What is long is not copied, so its address shows which encoding it is.
            let chunks = out.take();
            addresses.push(chunks[0].as_ptr());
            kept.push(chunks);
        }
        assert_eq!(addresses[..2], addresses[2..]);
        assert_ne!(addresses[0], addresses[1]);
    }

    fn has_encodings(event: &Event) -> bool {
        let mut is_made = false;
        let made = event.memo(|_| {
            is_made = true;
            Encoded::default()
        });
        drop(made);
        !is_made
    }

    #[test]
    fn encodings_are_kept_for_others_that_are_written_to_but_not_for_all_that_wait() {
        let change = |revision: u64| {
            let action = Action::Put { value: vec![b'x'; 10_000].into(), expiry: None };
            let (key, replaces) = (Key::new("a").unwrap(), Revision::ZERO);
            Event::new(EventKind::Change(Change {
                key,
                revision: Revision::new(revision),
                replaces,
                action,
                meta: Meta::NONE,
            }))
        };
        let events: Vec<_> = (1..=100).map(change).collect();
        events.iter().for_each(|waiting| event(waiting, 0, ValueForm::Text, &mut Chunks::default()));
        let kept: Vec<bool> = events.iter().map(|event| has_encodings(event)).collect();
        assert!(kept[90..].iter().all(|kept| *kept) && kept[..50].iter().all(|kept| !kept), "{kept:?}");
        forget_encodings();
        // Those that were looked at have empty ones now.
        let newest = change(101);
        event(&newest, 0, ValueForm::Text, &mut Chunks::default());
        forget_encodings();
        assert!(!has_encodings(&newest));
    }
}
