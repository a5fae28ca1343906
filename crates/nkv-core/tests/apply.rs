//! Changes and states that were decided elsewhere, one promise a test.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code too")]

use std::sync::{Arc, Mutex};

use nkv_core::mailbox::{Inbox, Item, Mailbox, Overflow, mailbox};
use nkv_core::{
    Action, Applied, BeginCause, Change, Epoch, Event, EventKind, Key, Loaded, META_LEN_MAX, MemoryPersist, Meta,
    NotifyKeyValue, Op, Pattern, PersistError, PersistErrorKind, PersistValue, PutOptions, Reason, Revision, StoredRef,
    Timestamp, Write,
};
use nkv_testkit::script::{PersistScript, ScriptedPersist};

type Store<P = ScriptedPersist<Arc<Mutex<MemoryPersist>>>> = NotifyKeyValue<P, Mailbox>;

const HERE: Epoch = Epoch::new(1);
const NEXT: Epoch = Epoch::new(2);

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

fn r(number: u64) -> Revision {
    Revision::new(number)
}

fn put(at: &str, revision: u64) -> Change {
    value(at, revision, &format!("{at}@{revision}"))
}

fn value(at: &str, revision: u64, value: &str) -> Change {
    let action = Action::Put { value: value.to_owned().into(), expiry: None };
    Change { key: key(at), revision: r(revision), replaces: Revision::ZERO, action, meta: Meta::NONE }
}

fn delete(at: &str, revision: u64) -> Change {
    Change { action: Action::Delete { reason: Reason::Deleted }, ..put(at, revision) }
}

fn with_meta(change: Change, meta: &str) -> Change {
    Change { meta: Meta::new(meta.as_bytes()), ..change }
}

fn reserved(name: &str, revision: u64, meta: &str) -> Change {
    Change { key: Key::reserved(name).unwrap(), ..with_meta(delete("x", revision), meta) }
}

/// A disk that may be looked at while a store owns it.
type Disk = Arc<Mutex<MemoryPersist>>;

fn store() -> (Store, PersistScript, Disk) {
    let disk = Arc::new(Mutex::new(MemoryPersist::new(HERE)));
    let (persist, script) = ScriptedPersist::new(Arc::clone(&disk));
    (NotifyKeyValue::open(persist).unwrap(), script, disk)
}

fn subscribe<P: PersistValue>(store: &Store<P>, to: &[&str]) -> Inbox {
    let (post, inbox) = mailbox();
    for pattern in to {
        store.subscribe(Pattern::new(pattern).unwrap(), "me".into(), post.clone(), false);
        assert!(matches!(take(&inbox).unwrap().kind(), EventKind::Began(_)));
    }
    inbox
}

fn take(inbox: &Inbox) -> Option<Arc<Event>> {
    match inbox.try_take()? {
        Item::Event { event, .. } => Some(event),
        Item::Own(never) => match never {},
    }
}

/// Changes as `key@revision`, with `-` before a delete, `!` before one that takes the place of nothing, and `.` behind the
/// last of a revision; other events by name.
fn received(inbox: &Inbox) -> Vec<String> {
    std::iter::from_fn(|| take(inbox)).map(|event| text_of(&event)).collect()
}

fn text_of(event: &Event) -> String {
    match event.kind() {
        EventKind::Change(change) => {
            let end = if event.ends_revision() { "." } else { "" };
            let sign = match (&change.action, change.replaces) {
                (Action::Delete { .. }, _) => "-",
                (_, Revision::ZERO) => "!",
                _ => "",
            };
            format!("{sign}{}@{}{end}", change.key, change.revision)
        }
        EventKind::Began(began) => {
            let cause = if began.cause == BeginCause::Reset { "reset" } else { "began" };
            format!("{cause} {} of {}", began.revision, began.epoch.get())
        }
        EventKind::Snapshot(part) => {
            let records: Vec<String> = part.records.iter().map(|r| format!("{}@{}", r.key, r.revision)).collect();
            let end = if part.is_last { "." } else { "" };
            format!("{} at {} of {}{end}", records.join(" "), part.revision, part.epoch.get())
        }
        other => format!("{other:?}"),
    }
}

fn records<P: PersistValue>(store: &Store<P>) -> Vec<String> {
    let all = store.get_all(&Pattern::All);
    all.iter().map(|record| format!("{}@{}", record.key, record.revision)).collect()
}

/// What a disk has, as `key@revision` with the meta, and a `-` before tombstones.
fn stored(disk: &Disk) -> (Vec<String>, Loaded) {
    let mut all = Vec::new();
    let loaded = disk.lock().unwrap().load(&mut |stored| {
        let sign = if stored.record().is_some() { "" } else { "-" };
        let meta = stored.meta().map(|meta| format!("+{}", str::from_utf8(meta).unwrap())).unwrap_or_default();
        all.push(format!("{sign}{}@{}{meta}", stored.key(), stored.revision()));
    });
    all.sort();
    (all, loaded.unwrap())
}

#[test]
fn changes_keep_their_revisions_and_are_one_batch_and_notified_in_order() {
    let (store, script, _) = store();
    store.put(&key("a"), "old", PutOptions::default()).unwrap();
    let inbox = subscribe(&store, &["*"]);
    let changes = vec![put("a", 5), put("b", 5), delete("b", 7), put("c", 9), put("b", 9)];
    assert_eq!(store.apply(changes).unwrap(), Applied { stored: 5, passed_over: 0 });
    assert_eq!((script.batches().len(), store.stats().revision), (2, r(9)));
    let replaced: Vec<u64> = script.batches()[1].iter().map(|change| change.replaces.get()).collect();
    assert_eq!(replaced, [1, 0, 5, 0, 0], "whatever the caller says, storage learns what was there");
    assert_eq!(received(&inbox), ["a@5", "!c@9", "!b@9."], "the newest of each key, in order");
    assert_eq!(records(&store), ["a@5", "b@9", "c@9"]);
    assert_eq!(store.put(&key("d"), "x", PutOptions::default()).unwrap(), r(10), "local writes go on above");
}

// The mailbox took "not above the newest revision" for "notified already".
#[test]
fn changes_of_one_revision_are_notified_once_each_to_a_reader_of_several_subscriptions() {
    let (store, ..) = store();
    let inbox = subscribe(&store, &["*", "a.*", "a"]);
    store.apply(vec![put("a.x", 3), put("a", 3), put("b", 3)]).unwrap();
    assert_eq!(received(&inbox), ["!a.x@3", "!a@3", "!b@3."]);
    store.apply(vec![put("a", 4), delete("b", 4)]).unwrap();
    assert_eq!(received(&inbox), ["a@4", "-b@4."]);
}

#[test]
fn what_was_applied_before_is_passed_over() {
    let (store, script, _) = store();
    let inbox = subscribe(&store, &["*"]);
    store.apply(vec![put("a", 3), put("b", 3)]).unwrap();
    for (again, expected) in [
        (vec![put("a", 3), put("b", 3)], Applied { stored: 0, passed_over: 2 }),
        (vec![put("a", 1)], Applied { stored: 0, passed_over: 1 }),
        (vec![put("c", 2), put("b", 3), put("c", 4)], Applied { stored: 1, passed_over: 2 }),
        (vec![], Applied::default()),
    ] {
        assert_eq!(store.apply(again).unwrap(), expected);
    }
    assert_eq!((received(&inbox).join(" "), script.calls()), ("!a@3 !b@3. !c@4.".to_owned(), 2));
}

#[test]
fn a_revision_at_which_nothing_changed_is_kept_and_no_subscriber_is_notified() {
    let (store, script, disk) = store();
    let inbox = subscribe(&store, &["*"]);
    store.apply(vec![put("a", 3)]).unwrap();
    store.pass(r(7)).unwrap();
    assert_eq!((store.stats().revision, stored(&disk).1.revision), (r(7), r(7)));
    for passed in [r(7), r(5)] {
        store.pass(passed).unwrap();
    }
    assert_eq!((script.calls(), store.stats().revision), (2, r(7)), "what it is at already is passed over");
    assert_eq!(store.apply(vec![put("b", 6), put("b", 8)]).unwrap(), Applied { stored: 1, passed_over: 1 });
    assert_eq!((received(&inbox).join(" "), records(&store)), ("!a@3. !b@8.".into(), vec!["a@3".into(), "b@8".into()]));
    assert_eq!(store.pass(r(u64::MAX)).unwrap_err().kind(), PersistErrorKind::Rejected);
}

#[test]
fn a_batch_that_cannot_be_is_refused_before_anything_is_stored() {
    let (store, script, _) = store();
    store.apply(vec![put("a", 3)]).unwrap();
    let long = Change { meta: Meta::new(&vec![0; META_LEN_MAX + 1]), ..put("a", 9) };
    let value = Change { key: Key::reserved("x").unwrap(), ..put("a", 9) };
    for bad in [vec![put("a", 5), put("b", 4)], vec![put("a", 5), put("b", 5), delete("a", 5)], vec![long], vec![value]]
    {
        assert_eq!(store.apply(bad).unwrap_err().kind(), PersistErrorKind::Rejected);
    }
    let longest = Change { meta: Meta::new(&vec![0; META_LEN_MAX]), ..put("a", 4) };
    assert_eq!((script.calls(), records(&store)), (1, vec!["a@3".to_owned()]));
    store.apply(vec![longest]).unwrap();
}

#[test]
fn a_failed_batch_changes_nothing_and_can_be_applied_again() {
    let (store, script, _) = store();
    let inbox = subscribe(&store, &["*"]);
    script.fail_next(PersistErrorKind::NoSpace);
    let batch = || vec![put("a", 3), put("b", 3)];
    assert_eq!(store.apply(batch()).unwrap_err().kind(), PersistErrorKind::NoSpace);
    assert_eq!((records(&store).len(), received(&inbox).len(), store.stats().revision), (0, 0, r(0)));
    assert_eq!(store.apply(batch()).unwrap().stored, 2);
    script.fail_next(PersistErrorKind::Poisoned);
    assert_eq!(store.apply(vec![put("c", 4)]).unwrap_err().kind(), PersistErrorKind::Poisoned);
    assert_eq!(store.apply(vec![put("c", 4)]).unwrap_err().kind(), PersistErrorKind::Poisoned);
    assert_eq!(script.calls(), 3, "storage that is poisoned is not asked");
}

#[test]
fn a_delete_with_meta_leaves_a_tombstone_that_no_reader_sees() {
    let (store, _, disk) = store();
    let inbox = subscribe(&store, &["*"]);
    store.apply(vec![with_meta(put("a", 1), "A"), put("b", 2), with_meta(put("c", 2), "C")]).unwrap();
    store.apply(vec![with_meta(delete("a", 3), "gone"), with_meta(delete("never", 3), "N")]).unwrap();
    assert_eq!(received(&inbox), ["!b@2", "!c@2."], "a came and went, and what never was there notifies no subscriber");
    assert_eq!(stored(&disk).0, ["-a@3+gone", "-never@3+N", "b@2", "c@2+C"]);
    assert_eq!((records(&store).join(" "), store.stats().keys, store.stats().deletes), ("b@2 c@2".to_owned(), 2, 1));
    assert!(store.get(&key("a")).is_none() && !store.exists(&Pattern::new("never").unwrap()));
    // A put, another tombstone, a delete without meta: each takes its place.
    let batch = vec![put("a", 4), with_meta(delete("never", 5), "again"), delete("c", 6)];
    store.apply(batch).unwrap();
    assert_eq!(stored(&disk).0, ["-never@5+again", "a@4", "b@2"]);
    store.apply(vec![delete("never", 7)]).unwrap();
    assert_eq!(stored(&disk).0, ["a@4", "b@2"]);
    assert_eq!(received(&inbox), ["!a@4.", "-c@6."]);
    assert_eq!(store.stats().revision, r(7), "a change that no reader sees counts too");
}

#[test]
fn reserved_records_are_for_their_owner_alone() {
    let (store, _, disk) = store();
    let inbox = subscribe(&store, &["*"]);
    store.apply(vec![reserved("seen", 1, "5"), put("a", 1), reserved("seen", 2, "6")]).unwrap();
    assert_eq!((received(&inbox), records(&store)), (vec!["!a@1.".to_owned()], vec!["a@1".to_owned()]));
    assert_eq!(stored(&disk).0, ["-..seen@2+6", "a@1"]);
    // A write cannot give it a value, and one beside it is done.
    let put = |key| Op::Put { key, value: "x".into(), options: PutOptions::default() };
    let seen = || Key::reserved("seen").unwrap();
    let mut writes =
        [Write::apart(vec![put(seen()), put(key("b"))]), Write::together(vec![put(key("c")), put(seen())])];
    while !writes.iter().all(Write::is_done) {
        store.commit(&mut writes);
    }
    let refused =
        writes.map(|write| write.into_results().into_iter().map(|result| result.is_err()).collect::<Vec<_>>());
    assert_eq!(refused, [vec![true, false], vec![true, true]]);
    assert!(store.delete(&seen().into(), None).is_err());
    assert_eq!(stored(&disk).0, ["-..seen@2+6", "a@1", "b@3"]);
}

#[test]
fn the_opener_of_a_store_is_lent_all_with_its_meta() {
    let (store, _, disk) = store();
    store.apply(vec![with_meta(put("a", 1), "A"), reserved("seen", 1, "5"), with_meta(delete("b", 1), "B")]).unwrap();
    drop(store);
    let mut lent = Vec::new();
    let visit = |stored: StoredRef<'_>| {
        lent.push((stored.key().to_string(), stored.meta().map(<[u8]>::to_vec), stored.record().is_some()));
    };
    let store: Store<_> = NotifyKeyValue::open_visiting(disk, Timestamp::MIN, visit).unwrap();
    lent.sort();
    let expected = [("..seen", "5", false), ("a", "A", true), ("b", "B", false)];
    let expected = expected.map(|(key, meta, is_record)| (key.to_owned(), Some(meta.as_bytes().to_vec()), is_record));
    assert_eq!((lent, records(&store)), (expected.to_vec(), vec!["a@1".to_owned()]));
}

/// Storage with two methods, as most has: it keeps no meta, and no epoch begins.
#[derive(Debug)]
struct Plain(Disk);

impl PersistValue for Plain {
    fn load(&mut self, visit: &mut dyn FnMut(StoredRef<'_>)) -> Result<Loaded, PersistError> {
        self.0.load(visit)
    }

    fn persist(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        assert!(batch.iter().all(|change| change.meta.is_none() && !change.key.is_reserved()));
        self.0.persist(batch)
    }
}

#[test]
fn storage_that_keeps_no_meta_is_given_none() {
    let disk = Arc::new(Mutex::new(MemoryPersist::new(HERE)));
    let store: Store<_> = NotifyKeyValue::open(Plain(disk.clone())).unwrap();
    for refused in [with_meta(put("a", 1), "A"), with_meta(delete("a", 1), ""), reserved("seen", 1, "5")] {
        let error = store.apply(vec![put("b", 1), refused.clone()]).unwrap_err();
        assert_eq!(error.kind(), PersistErrorKind::Rejected);
        assert_eq!(store.replace(vec![refused], r(9), HERE).unwrap_err().kind(), PersistErrorKind::Rejected);
    }
    assert_eq!(store.replace(vec![], r(9), NEXT).unwrap_err().kind(), PersistErrorKind::Rejected);
    store.apply(vec![put("a", 1)]).unwrap();
    // The revision of a state survives, although nothing changed at it.
    store.replace(vec![put("a", 1), put("revision.0", 2)], r(8), HERE).unwrap();
    assert_eq!(
        stored(&disk),
        (vec!["a@1".to_owned(), "revision.0@2".to_owned()], Loaded { epoch: HERE, revision: r(8) })
    );
}

#[test]
fn of_a_state_what_differs_is_done_and_notified_in_order() {
    let (store, script, disk) = store();
    store.apply(vec![put("same", 1), put("older", 2), put("gone", 3), put("back", 3)]).unwrap();
    let inbox = subscribe(&store, &["*"]);
    let state = vec![put("new", 7), put("older", 5), put("same", 1), put("back", 6), with_meta(delete("lost", 6), "L")];
    assert_eq!(store.replace(state.clone(), r(9), HERE).unwrap(), 5);
    assert_eq!(received(&inbox), ["-gone@5", "older@5.", "back@6.", "!new@7."]);
    assert_eq!(records(&store), ["back@6", "new@7", "older@5", "same@1"]);
    let calls = script.calls();
    assert_eq!(store.replace(state.clone(), r(9), HERE).unwrap(), 0);
    assert_eq!((received(&inbox).len(), script.calls()), (0, calls), "the same once more is nothing new");
    // At a later revision, with nothing changed since, storage learns that revision.
    assert_eq!(store.replace(state, r(12), HERE).unwrap(), 0);
    assert_eq!((received(&inbox).len(), store.stats().revision, stored(&disk).1.revision), (0, r(12), r(12)));
    assert_eq!(stored(&disk).0, ["-lost@6+L", "back@6", "new@7", "older@5", "same@1"]);
}

#[test]
fn a_state_that_contradicts_the_store_is_refused() {
    let (store, script, _) = store();
    store.apply(vec![put("a", 3), put("b", 5)]).unwrap();
    let calls = script.calls();
    for (state, revision) in [
        (vec![put("a", 3)], 5),                           // b is gone, at a revision where it was there
        (vec![value("a", 3, "other"), put("b", 5)], 7),   // another value at the same revision
        (vec![put("a", 2), put("b", 5)], 7),              // an older one
        (vec![put("a", 3), put("b", 5), put("c", 4)], 7), // one that came before, and was not there
        (vec![put("a", 3), put("b", 5)], 4),              // older than the store
        (vec![put("a", 3), put("b", 8)], 7),              // newer than itself
        (vec![put("a", 3), put("a", 6)], 7),              // twice the same key
        (vec![put("a", 0)], 7),                           // no revision
    ] {
        let error = store.replace(state.clone(), r(revision), HERE).unwrap_err();
        assert_eq!(error.kind(), PersistErrorKind::Rejected, "{state:?}");
    }
    assert_eq!((records(&store).join(" "), script.calls()), ("a@3 b@5".to_owned(), calls));
}

fn many(revisions: impl Iterator<Item = u64>) -> Vec<Change> {
    revisions.map(|revision| put(&format!("k.{revision:05}"), revision)).collect()
}

#[test]
fn a_large_state_is_taken_in_slices_of_whole_revisions() {
    let (store, script, _) = store();
    store.apply((0..3_000).map(|n| put(&format!("gone.{n:05}"), 1)).collect()).unwrap();
    let mut state = many(2..1_501);
    // A thousand of one revision are not torn apart.
    state.extend((0..1_000).map(|n| put(&format!("one.{n:05}"), 1_501)));
    assert_eq!(store.replace(state, r(1_600), HERE).unwrap(), 5_499);
    let batches = &script.batches()[1..];
    assert_eq!(batches.iter().map(Vec::len).collect::<Vec<_>>(), [3_001, 1_024, 1_474, 1]);
    assert!(
        batches[0][..3_000].iter().all(|change| change.revision == r(2) && change.key.as_str().starts_with("gone"))
    );
    for pair in batches.windows(2) {
        assert!(pair[0].last().unwrap().revision < pair[1].first().unwrap().revision);
    }
    assert_eq!(store.stats().keys, 2_499);
}

/// Notes, as often as it is notified, what the store says of itself.
#[derive(Debug, Default)]
struct Looks {
    store: std::sync::OnceLock<std::sync::Weak<NotifyKeyValue<MemoryPersist, Arc<Looks>>>>,
    seen: Mutex<Vec<(u64, u64)>>,
}

impl nkv_core::Notifier for Looks {
    fn notify(&self, event: &Arc<Event>) -> nkv_core::Delivery {
        // A test may look: figures take the lock of the keyspace, which is free while subscribers are notified.
        if let (EventKind::Change(change), Some(store)) =
            (event.kind(), self.store.get().and_then(std::sync::Weak::upgrade))
        {
            let stats = store.stats();
            assert!(stats.revision < change.revision || event.ends_revision() || stats.keys == 0);
            self.seen.lock().unwrap().push((stats.keys, stats.revision.get()));
        }
        nkv_core::Delivery::Queued
    }
}

#[test]
fn while_the_deletes_of_a_state_go_in_slices_the_store_is_not_at_their_revision() {
    let store = Arc::new(NotifyKeyValue::open(MemoryPersist::new(HERE)).unwrap());
    store.apply((0..2_500).map(|n| put(&format!("gone.{n:05}"), 1)).collect()).unwrap();
    let looks = Arc::new(Looks::default());
    looks.store.set(Arc::downgrade(&store)).unwrap();
    store.subscribe(Pattern::All, "me".into(), Arc::clone(&looks), false);
    store.replace(vec![], r(9), HERE).unwrap();
    let mut seen = looks.seen.lock().unwrap().clone();
    seen.dedup();
    assert_eq!(seen, [(1_476, 1), (452, 1), (0, 9)]);
}

#[test]
fn another_epoch_is_there_at_once_and_each_subscription_begins_anew() {
    let (store, script, disk) = store();
    store.apply(vec![put("a", 30), put("b", 30), with_meta(delete("c", 31), "C"), reserved("seen", 31, "31")]).unwrap();
    let inbox = subscribe(&store, &["a", "x.*"]);
    store.apply(vec![put("a", 40)]).unwrap();
    let state = vec![with_meta(put("x.y", 2), "XY"), put("a", 1), with_meta(delete("c", 2), "C2")];
    assert_eq!(store.replace(state, r(5), NEXT).unwrap(), 3);
    assert_eq!(
        (store.epoch(), store.stats().revision, records(&store).join(" ")),
        (NEXT, r(5), "a@1 x.y@2".to_owned())
    );
    let mut all = received(&inbox);
    all.sort();
    let expected = ["a@1 at 5 of 2.", "reset 5 of 2", "reset 5 of 2", "x.y@2 at 5 of 2."].map(str::to_owned).to_vec();
    assert_eq!(all, expected, "nothing of the epoch before, and the new state");
    assert_eq!(
        stored(&disk),
        (["-c@2+C2", "a@1", "x.y@2+XY"].map(str::to_owned).to_vec(), Loaded { epoch: NEXT, revision: r(5) })
    );
    // A lower revision than those of the epoch before is news.
    store.apply(vec![put("a", 6), put("x.y", 6)]).unwrap();
    assert_eq!(received(&inbox), ["a@6", "x.y@6."]);
    assert_eq!(store.put(&key("x.z"), "x", PutOptions::default()).unwrap(), r(7));
    assert_eq!((received(&inbox), script.batches().len()), (vec!["!x.z@7.".to_owned()], 5));
}

#[test]
fn a_reader_that_cannot_begin_anew_is_closed_when_an_epoch_begins() {
    let (store, ..) = store();
    store.apply(vec![put("a", 1)]).unwrap();
    let [(old, inbox), (one, of_one)] = [mailbox(), mailbox()];
    old.set_overflow(Overflow::Close);
    one.close_with_epoch();
    let subscriptions = [("old", old), ("one", one)];
    let subscriptions = subscriptions.map(|(id, post)| store.subscribe(Pattern::All, id.into(), post, false));
    let other = subscribe(&store, &["*"]);
    store.apply(vec![put("a", 2)]).unwrap();
    store.replace(vec![put("a", 1)], r(1), NEXT).unwrap();
    for (inbox, subscription) in [inbox, of_one].iter().zip(subscriptions) {
        assert_eq!(received(inbox), ["began 1 of 1"], "nothing of an epoch that it does not hear the end of");
        assert!(inbox.take_blocking().is_none() && subscription.has_ended());
        assert!(!subscription.notifier().has_overflowed());
    }
    assert_eq!((received(&other).len(), store.subscriptions()), (2, 1));
}

#[test]
fn a_snapshot_that_is_being_read_when_an_epoch_begins_ends_where_it_is() {
    let (store, ..) = store();
    store.apply(many(1..2_001)).unwrap();
    let (post, inbox) = mailbox();
    store.subscribe(Pattern::All, "me".into(), post, true);
    let began = received_some(&inbox, 2);
    assert!(began[0] == "began 2000 of 1" && began[1].ends_with("at 2000 of 1"), "{began:?}");
    store.replace(vec![put("a", 1)], r(2), NEXT).unwrap();
    store.apply(vec![put("b", 3)]).unwrap();
    assert_eq!(received(&inbox), ["reset 2 of 2", "a@1 b@3 at 3 of 2."]);
    store.apply(vec![put("b", 4)]).unwrap();
    assert_eq!(received(&inbox), ["b@4."]);
}

fn received_some(inbox: &Inbox, count: usize) -> Vec<String> {
    std::iter::from_fn(|| take(inbox)).take(count).map(|event| text_of(&event)).collect()
}

// With each epoch another beginning waits. What comes after one of their snapshots is in those behind it.
#[test]
fn epochs_that_begin_before_a_reader_comes_notify_it_of_nothing_twice() {
    let (store, ..) = store();
    store.apply(vec![put("a", 5)]).unwrap();
    let (post, inbox) = mailbox();
    store.subscribe(Pattern::All, "me".into(), post, true);
    for epoch in 2..5 {
        store.replace(vec![put("a", 1)], r(1), Epoch::new(epoch)).unwrap();
    }
    let mut all = Vec::new();
    while let Some(event) = take(&inbox) {
        all.push(text_of(&event));
        if all.len() < 8 {
            store.apply(vec![put("b", 1 + all.len() as u64)]).unwrap();
        }
    }
    // A beginning and its snapshot for each epoch, and no change that one of the snapshots has.
    let kinds: Vec<&str> = all.iter().map(|text| text.split(' ').next().unwrap()).collect();
    assert_eq!(kinds, ["began", "a@1", "reset", "a@1", "reset", "a@1", "reset", "a@1"], "{all:?}");
    store.apply(vec![put("b", 9)]).unwrap();
    assert_eq!(received(&inbox), ["b@9."]);
}

#[test]
fn an_epoch_whose_first_state_is_not_stored_whole_is_begun_again() {
    let (store, script, disk) = store();
    store.apply(vec![put("a", 30)]).unwrap();
    let inbox = subscribe(&store, &["*"]);
    let state = || many(1..3_001);
    script.fail_call(script.calls() + 2, PersistErrorKind::NoSpace);
    assert_eq!(store.replace(state(), r(3_000), NEXT).unwrap_err().kind(), PersistErrorKind::NoSpace);
    // Readers have what they had; writes would go to another epoch's storage.
    assert_eq!((records(&store).join(" "), store.epoch(), received(&inbox).len()), ("a@30".to_owned(), HERE, 0));
    assert_eq!(store.apply(vec![put("a", 31)]).unwrap_err().kind(), PersistErrorKind::Io);
    assert!(store.put(&key("b"), "x", PutOptions::default()).is_err());
    // After a crash now, all is there up to the revision that storage names.
    let (stored_now, loaded) = stored(&disk);
    assert_eq!((stored_now.len() as u64, loaded.epoch), (loaded.revision.get(), NEXT));
    let reopened: Store<_> = NotifyKeyValue::open(disk).unwrap();
    assert_eq!(reopened.apply(state()).unwrap().passed_over as u64, loaded.revision.get());
    assert_eq!(reopened.stats().keys, 3_000);
}

#[test]
fn an_epoch_that_failed_half_way_can_be_tried_again_or_the_one_before_taken_up() {
    for epoch in [NEXT, HERE] {
        let (store, script, _) = store();
        store.apply(vec![put("a", 30)]).unwrap();
        let inbox = subscribe(&store, &["*"]);
        script.fail_call(script.calls() + 2, PersistErrorKind::NoSpace);
        store.replace(many(1..3_001), r(3_000), NEXT).unwrap_err();
        store.replace(vec![put("a", 30)], r(31), epoch).unwrap();
        let expected = [format!("reset 31 of {}", epoch.get()), format!("a@30 at 31 of {}.", epoch.get())];
        assert_eq!((received(&inbox), store.epoch()), (expected.to_vec(), epoch));
        assert_eq!(store.put(&key("b"), "x", PutOptions::default()).unwrap(), r(32));
    }
}

#[test]
fn a_large_delete_does_not_go_on_in_another_epoch() {
    let (store, ..) = store();
    store.apply(many(1..3_001)).unwrap();
    let pattern = Pattern::new("k.*").unwrap();
    let mut writes = [Write::apart(vec![Op::Delete { pattern, if_revision: None }])];
    store.commit(&mut writes);
    assert!(!writes[0].is_done());
    store.replace(many(1..3_001), r(3_000), NEXT).unwrap();
    store.commit(&mut writes);
    assert!(writes[0].is_done());
    let [results] = writes.map(Write::into_results);
    assert!(matches!(results[..], [Ok(nkv_core::Outcome::Deleted { count: 1_024, .. })]), "{results:?}");
    assert_eq!(store.stats().keys, 3_000, "what it was to delete was of the epoch before");
}
