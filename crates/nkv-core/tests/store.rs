//! `NotifyKeyValue` by theme, one promise a test.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code too")]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use nkv_core::mailbox::{Inbox, Item, Mailbox, mailbox};
use nkv_core::{
    Action, Epoch, Event, EventKind, Expiry, Key, MemoryPersist, NoPersist, NotifyKeyValue, Op, Outcome, Pattern,
    PersistError, PersistErrorKind, PersistValue, PutOptions, Record, Revision, RoutePersist, Timestamp, Write,
    WriteError,
};
use nkv_testkit::script::{Crash, PersistScript, ScriptedNotifier, ScriptedPersist};

type Store<P = MemoryPersist> = NotifyKeyValue<P, ScriptedNotifier>;
type Scripted = Store<ScriptedPersist<MemoryPersist>>;

/// More than anything here takes; only a hang waits for it.
const PATIENCE: Duration = Duration::from_secs(10);

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

fn pattern(text: &str) -> Pattern {
    Pattern::new(text).unwrap()
}

fn t(millis: u64) -> Timestamp {
    Timestamp::from_millis(millis)
}

fn r(number: u64) -> Revision {
    Revision::new(number)
}

fn store() -> Store {
    NotifyKeyValue::open(MemoryPersist::default()).unwrap()
}

fn scripted() -> (Scripted, PersistScript, MemoryPersist) {
    let disk = MemoryPersist::default();
    let (persist, script) = ScriptedPersist::new(disk.clone());
    (NotifyKeyValue::open(persist).unwrap(), script, disk)
}

/// A store that holds these keys, each with its own name for a value, at revisions 1, 2, 3 and so on.
fn store_of(keys: &[&str]) -> Store {
    let store = store();
    keys.iter().for_each(|key| _ = put(&store, key, key).unwrap());
    store
}

fn put<P: PersistValue>(store: &Store<P>, at: &str, value: &str) -> Result<Revision, WriteError> {
    store.put(&key(at), value.to_owned(), PutOptions::default())
}

fn put_until<P: PersistValue>(store: &Store<P>, at: &str, now: u64, ttl_ms: u64) {
    let expiry = Some(Expiry::after(t(now), Duration::from_millis(ttl_ms)));
    store.put(&key(at), "x", PutOptions { expiry, if_revision: None }).unwrap();
}

fn if_revision(number: u64) -> PutOptions {
    PutOptions { if_revision: Some(r(number)), expiry: None }
}

fn delete<P: PersistValue>(store: &Store<P>, what: &str) -> Result<(u64, Revision), WriteError> {
    store.delete(&pattern(what), None)
}

fn subscribe<P: PersistValue>(store: &Store<P>, to: &str, id: &str) -> ScriptedNotifier {
    let notifier = ScriptedNotifier::new();
    store.subscribe(pattern(to), id.into(), notifier.clone(), false);
    notifier
}

/// An event, as short as it can be written: `a=x @1`, `a deleted @2`, `* has a=x @1 (up to 2)`, `a unsubscribed`.
/// Of the beginning of a subscription nothing.
fn brief(event: &Arc<Event>) -> Option<String> {
    Some(match event.kind() {
        EventKind::Began(_) => return None,
        EventKind::Change(change) => match &change.action {
            Action::Put { value, .. } => {
                format!("{}={} @{}", change.key, String::from_utf8_lossy(value), change.revision)
            }
            Action::Delete { reason } => format!("{} {} @{}", change.key, reason.as_str(), change.revision),
        },
        EventKind::Snapshot(snapshot) => {
            let has: Vec<String> = snapshot.records.iter().map(|record| brief_record(&record.to_record())).collect();
            format!("{} has {} (up to {})", snapshot.pattern, has.join(", "), snapshot.revision)
        }
        EventKind::Ended { pattern, reason } => format!("{pattern} {}", reason.as_str()),
        other => panic!("{other:?}"),
    })
}

fn brief_record(record: &Record) -> String {
    format!("{}={} @{}", record.key, String::from_utf8_lossy(&record.value), record.revision)
}

fn received(notifier: &ScriptedNotifier) -> Vec<String> {
    notifier.take().iter().filter_map(brief).collect()
}

/// All that a store holds, and its revision.
fn state<P: PersistValue>(store: &Store<P>) -> (Vec<Record>, Revision) {
    (store.get_all(&Pattern::All), store.stats().revision)
}

fn keys<P: PersistValue>(store: &Store<P>, what: &str) -> Vec<String> {
    store.get_all(&pattern(what)).iter().map(|record| record.key.to_string()).collect()
}

fn op_put(at: &str, value: &'static str, options: PutOptions) -> Op {
    Op::Put { key: key(at), value: value.into(), options }
}

fn op_delete(what: &str) -> Op {
    Op::Delete { pattern: pattern(what), if_revision: None }
}

mod order_of_a_write {
    use super::*;

    #[test]
    fn until_it_is_stored_a_change_is_neither_visible_nor_notified_nor_acknowledged() {
        let (store, script, _) = scripted();
        put(&store, "a", "old").unwrap();
        let notifier = subscribe(&store, "a", "me");
        let acknowledged = AtomicBool::new(false);
        script.block();
        thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let revision = put(&store, "a", "new").unwrap();
                acknowledged.store(true, SeqCst);
                revision
            });
            assert!(script.wait_until_blocked(PATIENCE));
            // Storage hangs; reads do not.
            assert_eq!(store.get(&key("a")).unwrap().value, "old");
            assert_eq!(state(&store).1, r(1));
            assert_eq!(store.list(&Pattern::All, None, 9).entries, [(key("a"), r(1))]);
            let late = subscribe(&store, "*", "late");
            assert_eq!((received(&notifier), acknowledged.load(SeqCst)), (vec![], false));
            script.release();
            assert_eq!(writer.join().unwrap(), r(2));
            assert_eq!((received(&notifier), received(&late)), (vec!["a=new @2".into()], vec!["a=new @2".into()]));
        });
        assert_eq!(store.get(&key("a")).unwrap().value, "new");
    }

    #[test]
    fn a_batch_reaches_storage_as_one_and_only_if_it_changes_something() {
        let (store, script, _) = scripted();
        store.write(&[op_put("a", "1", PutOptions::default()), op_put("b", "2", PutOptions::default())]).unwrap();
        store.write(&[]).unwrap();
        store.write(&[op_delete("nothing"), op_put("a", "x", if_revision(7))]).unwrap();
        assert_eq!(script.batches().iter().map(Vec::len).collect::<Vec<_>>(), [2]);
        assert_eq!(script.calls(), 1);
    }

    #[test]
    fn each_change_names_the_revision_that_it_replaces() {
        let (store, script, disk) = scripted();
        let replaces = |script: &PersistScript| {
            let batch = script.batches().pop().unwrap();
            batch.iter().map(|change| change.replaces.get()).collect::<Vec<_>>()
        };
        let put = |at| op_put(at, "x", PutOptions::default());
        store.write(&[put("a"), put("b"), put("a")]).unwrap();
        assert_eq!(replaces(&script), [0, 0, 1]);
        store.write(&[put("b"), op_delete("*"), put("a"), op_delete("a")]).unwrap();
        assert_eq!(replaces(&script), [2, 3, 4, 0, 7]);
        // What was not stored was not there to be replaced.
        script.fail_next(PersistErrorKind::NoSpace);
        store.write(&[put("b")]).unwrap_err();
        put_until(&store, "b", 0, 5);
        assert_eq!(replaces(&script), [0]);
        drop(store);
        let (persist, script) = ScriptedPersist::new(disk);
        let store = Store::open(persist).unwrap();
        store.expire(t(5)).unwrap();
        assert_eq!(replaces(&script), [9]);
    }

    #[test]
    fn each_change_gets_the_next_revision() {
        let store = store();
        assert_eq!(put(&store, "a", "1").unwrap(), r(1));
        assert_eq!(put(&store, "a", "1").unwrap(), r(2), "the same value again is a change too");
        assert_eq!(delete(&store, "a").unwrap(), (1, r(3)));
        assert_eq!(put(&store, "b", "1").unwrap(), r(4));
        assert_eq!(state(&store).1, r(4));
    }
}

mod failing_storage {
    use super::*;

    #[test]
    fn a_batch_that_was_not_stored_changes_nothing_for_anyone() {
        for kind in [PersistErrorKind::NoSpace, PersistErrorKind::Rejected, PersistErrorKind::Io] {
            let (store, script, disk) = scripted();
            put(&store, "a", "1").unwrap();
            put_until(&store, "b", 0, 10);
            let (before, notifier) = (state(&store), subscribe(&store, "*", "me"));
            script.fail_always(kind);
            let failed = |result: Result<_, WriteError>| match result {
                Err(WriteError::Persist(error)) => error.kind(),
                other => panic!("{other:?}"),
            };
            assert_eq!(failed(put(&store, "a", "2")), kind);
            assert_eq!(failed(put(&store, "new", "2")), kind);
            assert_eq!(failed(delete(&store, "a").map(|deleted| deleted.1)), kind);
            assert_eq!(failed(delete(&store, "*").map(|deleted| deleted.1)), kind);
            assert_eq!(store.expire(t(100)).unwrap_err().kind(), kind);
            let left = (before.0.into_iter().filter(|record| record.expiry.is_none()).collect(), before.1);
            assert_eq!((state(&store), received(&notifier), store.next_expiry()), (left, vec![], Some(t(10))));
            assert_eq!(store.stats().failed_batches, 5);
            script.work();
            assert_eq!(put(&store, "a", "3").unwrap(), r(3), "no revision was used up");
            assert_eq!(received(&notifier), ["a=3 @3"]);
            let again: Store = NotifyKeyValue::open_at(disk, t(100)).unwrap();
            assert_eq!(state(&again), state(&store));
        }
    }

    #[test]
    fn after_poison_the_store_takes_no_writes_and_does_not_ask_storage_again() {
        for crash in [Crash::BeforeStoring, Crash::AfterStoring] {
            let (store, script, disk) = scripted();
            put(&store, "a", "1").unwrap();
            let notifier = subscribe(&store, "*", "me");
            let before = state(&store);
            script.crash_next(crash);
            let poisoned = |error: PersistError| assert_eq!(error.kind(), PersistErrorKind::Poisoned);
            poisoned(store.write(&[op_put("a", "2", PutOptions::default())]).unwrap_err());
            poisoned(store.write(&[op_put("b", "2", PutOptions::default())]).unwrap_err());
            poisoned(store.write(&[op_delete("a")]).unwrap_err());
            poisoned(store.expire(t(9)).unwrap_err());
            assert_eq!(script.calls(), 2);
            assert_eq!((state(&store), received(&notifier)), (before, vec![]));
            let again: Store = NotifyKeyValue::open(disk).unwrap();
            let survived = if crash == Crash::AfterStoring { "a=2 @2" } else { "a=1 @1" };
            assert_eq!(again.get_all(&Pattern::All).iter().map(brief_record).collect::<Vec<_>>(), [survived]);
        }
    }

    #[test]
    fn a_store_that_cannot_load_does_not_open() {
        let (persist, script) = ScriptedPersist::new(MemoryPersist::default());
        script.fail_load(PersistErrorKind::Damaged);
        let error = NotifyKeyValue::<_, ScriptedNotifier>::open(persist).unwrap_err();
        assert_eq!((error.kind(), error.is_retryable()), (PersistErrorKind::Damaged, false));
    }
}

mod batches {
    use super::*;

    fn outcomes(store: &Store, ops: &[Op]) -> Vec<Outcome> {
        store.write(ops).unwrap()
    }

    fn put_at(number: u64) -> Outcome {
        Outcome::Put { revision: r(number) }
    }

    fn deleted(count: u64, number: u64) -> Outcome {
        Outcome::Deleted { count, revision: r(number) }
    }

    fn conflict(number: u64) -> Outcome {
        Outcome::Conflict { revision: r(number) }
    }

    #[test]
    fn a_condition_sees_the_put_before_it() {
        let store = store();
        let ops = [
            op_put("a", "1", PutOptions::default()),
            op_put("a", "2", if_revision(1)),
            op_put("a", "3", if_revision(1)),
            op_put("a", "4", if_revision(0)),
            op_put("b", "5", if_revision(0)),
        ];
        assert_eq!(outcomes(&store, &ops), [put_at(1), put_at(2), conflict(2), conflict(2), put_at(3)]);
        assert_eq!(store.get(&key("a")).unwrap().value, "2");
    }

    #[test]
    fn a_condition_sees_the_delete_before_it() {
        let store = store_of(&["a"]);
        let ops = [op_delete("a"), op_put("a", "x", if_revision(1)), op_put("a", "y", if_revision(0)), op_delete("a")];
        assert_eq!(outcomes(&store, &ops), [deleted(1, 2), conflict(0), put_at(3), deleted(1, 4)]);
        assert_eq!(state(&store), (vec![], r(4)));
    }

    #[test]
    fn a_second_delete_of_a_key_finds_nothing() {
        let store = store_of(&["a"]);
        assert_eq!(outcomes(&store, &[op_delete("a"), op_delete("a")]), [deleted(1, 2), Outcome::NotFound]);
        assert_eq!(outcomes(&store, &[op_delete("a"), op_delete("*")]), [Outcome::NotFound, Outcome::NotFound]);
    }

    #[test]
    fn a_wildcard_delete_sees_what_was_put_and_deleted_before_it() {
        let store = store_of(&["a.old", "a.gone", "b"]);
        let notifier = subscribe(&store, "*", "me");
        let ops =
            [op_delete("a.gone"), op_put("a.new", "x", PutOptions::default()), op_delete("a.*"), op_delete("a.*")];
        assert_eq!(outcomes(&store, &ops), [deleted(1, 4), put_at(5), deleted(2, 7), Outcome::NotFound]);
        assert_eq!(keys(&store, "*"), ["b"]);
        let expected = ["a.gone deleted @4", "a.new=x @5", "a.new deleted @6", "a.old deleted @7"];
        assert_eq!(received(&notifier), expected);
    }

    #[test]
    fn a_value_put_in_the_same_batch_does_not_expire_in_place_of_the_old_one() {
        let store = store();
        put_until(&store, "a", 0, 10);
        put_until(&store, "b", 0, 10);
        put_until(&store, "c", 0, 10);
        let ops = vec![op_put("a", "fresh", PutOptions::default()), op_delete("b")];
        let mut writes = [Write::apart(ops), Write::expiry()];
        store.advance(t(50));
        store.commit(&mut writes);
        let [ops, expiry] =
            writes.map(|write| write.into_results().into_iter().map(Result::unwrap).collect::<Vec<_>>());
        assert_eq!((ops, expiry), (vec![put_at(4), Outcome::NotFound], vec![deleted(2, 6)]));
        assert_eq!(keys(&store, "*"), ["a"]);
    }

    #[test]
    fn an_operation_that_fails_does_not_keep_the_others_from_being_done() {
        let store = store_of(&["a"]);
        let ops = [op_delete("nothing"), op_put("a", "x", if_revision(9)), op_put("b", "1", PutOptions::default())];
        assert_eq!(outcomes(&store, &ops), [Outcome::NotFound, conflict(1), put_at(2)]);
    }
}

mod conditions {
    use super::*;

    #[test]
    fn a_put_with_a_condition_is_done_only_at_that_revision() {
        let store = store();
        let conflict = |result: Result<Revision, WriteError>| match result {
            Err(WriteError::Conflict { revision }) => revision,
            other => panic!("{other:?}"),
        };
        assert_eq!(conflict(store.put(&key("a"), "x", if_revision(1))), r(0));
        assert_eq!(store.put(&key("a"), "1", if_revision(0)).unwrap(), r(1));
        assert_eq!(conflict(store.put(&key("a"), "x", if_revision(0))), r(1));
        put(&store, "b", "moves the store's revision, not a's").unwrap();
        assert_eq!(conflict(store.put(&key("a"), "x", if_revision(2))), r(1));
        assert_eq!(store.put(&key("a"), "2", if_revision(1)).unwrap(), r(3));
        delete(&store, "a").unwrap();
        assert_eq!(conflict(store.put(&key("a"), "x", if_revision(3))), r(0));
    }

    #[test]
    fn a_delete_with_a_condition_is_done_only_at_that_revision() {
        let store = store_of(&["a"]);
        let delete_if = |number| store.delete(&pattern("a"), Some(r(number)));
        assert!(matches!(delete_if(2), Err(WriteError::Conflict { revision }) if revision == r(1)));
        assert!(matches!(delete_if(0), Err(WriteError::Conflict { revision }) if revision == r(1)));
        assert_eq!(delete_if(1).unwrap(), (1, r(2)));
        assert!(matches!(delete_if(1), Err(WriteError::NotFound)));
        assert!(matches!(delete_if(0), Err(WriteError::NotFound)));
    }

    #[test]
    fn a_wildcard_delete_counts_its_keys_and_gives_each_a_revision_in_key_order() {
        let store = store_of(&["a", "a-b", "a.b", "a.b.c", "ab", "b"]);
        let notifier = subscribe(&store, "*", "me");
        assert_eq!(delete(&store, "a.*").unwrap(), (2, r(8)));
        assert_eq!(received(&notifier), ["a.b deleted @7", "a.b.c deleted @8"]);
        assert!(matches!(delete(&store, "a.*"), Err(WriteError::NotFound)));
        assert_eq!(delete(&store, "*").unwrap(), (4, r(12)));
        assert!(matches!(delete(&store, "*"), Err(WriteError::NotFound)));
    }

    #[test]
    fn a_delete_of_a_key_leaves_the_keys_below_it() {
        let store = store_of(&["a", "a.b"]);
        delete(&store, "a").unwrap();
        assert_eq!(keys(&store, "*"), ["a.b"]);
        assert!(matches!(delete(&store, "a"), Err(WriteError::NotFound)));
    }
}

mod subscriptions {
    use super::*;

    #[test]
    fn a_subscription_is_notified_of_its_branch_what_is_below_it_or_everything() {
        let store = store();
        let subscribers = ["a", "a.b", "a.*", "a.b.*", "*", "b"].map(|to| (to, subscribe(&store, to, "me")));
        for (at, expected) in [
            ("a", &["a", "*"][..]),
            ("a.b", &["a", "a.b", "a.*", "*"]),
            ("a.b.c", &["a", "a.b", "a.*", "a.b.*", "*"]),
            ("ab", &["*"]),
            ("a-b.c", &["*"]),
            ("b", &["*", "b"]),
        ] {
            put(&store, at, "x").unwrap();
            let notified: Vec<&str> =
                subscribers.iter().filter(|(_, s)| received(s).len() == 1).map(|(to, _)| *to).collect();
            assert_eq!(notified, expected, "of a put of {at}");
            let mut named: Vec<String> =
                store.subscribers_of(&key(at)).iter().map(|s| s.pattern().to_string()).collect();
            named.sort();
            let mut expected = expected.to_vec();
            expected.sort_unstable();
            assert_eq!(named, expected, "subscribers of {at}");
        }
    }

    #[test]
    fn a_delete_notifies_the_keys_own_subscribers_and_those_above_and_ends_no_subscription() {
        let store = store_of(&["a.b"]);
        let [own, above, beside] = ["a.b", "a", "a.c"].map(|to| subscribe(&store, to, "me"));
        delete(&store, "a.b").unwrap();
        assert_eq!((received(&own), received(&above)), (vec!["a.b deleted @2".into()], vec!["a.b deleted @2".into()]));
        put(&store, "a.b", "again").unwrap();
        assert_eq!((received(&own), received(&above)), (vec!["a.b=again @3".into()], vec!["a.b=again @3".into()]));
        assert_eq!(received(&beside), Vec::<String>::new());
    }

    #[test]
    fn a_delete_of_nothing_and_a_conflict_notify_no_subscriber() {
        let store = store_of(&["a"]);
        let notifier = subscribe(&store, "*", "me");
        let _ = delete(&store, "b").unwrap_err();
        let _ = store.put(&key("a"), "x", if_revision(7)).unwrap_err();
        assert_eq!((received(&notifier), state(&store).1), (vec![], r(1)));
    }

    #[test]
    fn a_subscriber_that_subscribes_again_takes_its_own_place() {
        let store = store();
        let (old, other) = (subscribe(&store, "a", "me"), subscribe(&store, "a", "someone else"));
        let below = subscribe(&store, "a.*", "me");
        let new = subscribe(&store, "a", "me");
        assert_eq!(received(&old), ["a replaced"]);
        put(&store, "a.b", "x").unwrap();
        let expected = vec!["a.b=x @1".to_owned()];
        assert_eq!(
            (received(&new), received(&other), received(&below)),
            (expected.clone(), expected.clone(), expected)
        );
        assert_eq!(received(&old), Vec::<String>::new());
        assert_eq!(store.stats().subscriptions, 3);
    }

    // A subscription to a key came with its branch, of any size.
    #[test]
    fn a_subscription_to_a_key_alone_and_that_to_its_branch_take_each_others_place() {
        let store = store();
        let alone = || Pattern::Exact(key("a"));
        let notifiers: Vec<_> = (0..4).map(|_| ScriptedNotifier::new()).collect();
        for (notifier, pattern) in notifiers.iter().zip([alone(), alone(), pattern("a"), alone()]) {
            store.subscribe(pattern, "me".into(), notifier.clone(), false);
            put(&store, "a", "x").unwrap();
            put(&store, "a.b", "x").unwrap();
        }
        let heard: Vec<Vec<String>> = notifiers.iter().map(received).collect();
        assert_eq!(heard[0], ["a=x @1", "a replaced"]);
        assert_eq!(heard[1], ["a=x @3", "a replaced"]);
        assert_eq!(heard[2], ["a=x @5", "a.b=x @6", "a replaced"]);
        assert_eq!((&heard[3][..], store.stats().subscriptions), (&["a=x @7".to_owned()][..], 1));
        assert!(
            store.subscription(&pattern("a"), &"me".into()).is_some()
                && store.subscription(&alone(), &"me".into()).is_some()
        );
        assert!(store.unsubscribe(&pattern("a"), &"me".into()) && !store.unsubscribe(&alone(), &"me".into()));
    }

    #[test]
    fn the_end_of_a_subscription_is_the_last_that_its_subscriber_receives() {
        let store = store();
        let (mine, other) = (subscribe(&store, "a", "me"), subscribe(&store, "a", "other"));
        assert!(!store.unsubscribe(&pattern("a.*"), &"me".into()), "another pattern");
        assert!(!store.unsubscribe(&pattern("a"), &"unknown".into()));
        let known = |text: &str, id: &str| store.subscription(&pattern(text), &id.into()).is_some();
        assert!(known("a", "me") && !known("a.*", "me") && !known("a", "unknown") && !known("a.b", "me"));
        assert!(store.unsubscribe(&pattern("a"), &"me".into()));
        assert!(!store.unsubscribe(&pattern("a"), &"me".into()), "a second time");
        assert!(!known("a", "me"));
        put(&store, "a", "x").unwrap();
        assert_eq!((received(&mine), received(&other)), (vec!["a unsubscribed".into()], vec!["a=x @1".into()]));
    }

    #[test]
    fn forgetting_a_subscription_leaves_the_one_that_replaced_it() {
        let store = store();
        let new = ScriptedNotifier::new();
        let first = store.subscribe(pattern("a"), "me".into(), ScriptedNotifier::new(), false);
        let second = store.subscribe(pattern("a"), "me".into(), new.clone(), false);
        store.forget(&[first]);
        put(&store, "a", "x").unwrap();
        assert_eq!(received(&new), ["a=x @1"]);
        store.forget(&[Arc::clone(&second), second]);
        put(&store, "a", "y").unwrap();
        assert_eq!(
            received(&new),
            Vec::<String>::new(),
            "a forgotten subscriber is not notified of that, nor of what follows"
        );
        assert_eq!(store.stats().subscriptions, 0);
    }

    #[test]
    fn a_notifier_that_says_closed_is_forgotten_and_the_others_are_notified() {
        let store = store();
        let notifiers = ["1", "2", "3"].map(|id| subscribe(&store, "a", id));
        notifiers[0].close();
        put(&store, "a", "x").unwrap();
        assert_eq!(store.subscribers_of(&key("a")).len(), 2);
        put(&store, "a", "y").unwrap();
        assert_eq!(notifiers[0].calls(), 2, "that it began, and one change");
        assert_eq!((received(&notifiers[1]).len(), received(&notifiers[2]).len()), (2, 2));
    }

    #[test]
    fn a_subscriber_gone_before_its_snapshot_is_not_kept() {
        let store = store();
        let notifier = ScriptedNotifier::new();
        notifier.close();
        store.subscribe(pattern("a"), "me".into(), notifier, true);
        assert_eq!(store.stats().subscriptions, 0);
    }

    #[test]
    fn a_snapshot_holds_what_the_subscription_covers_in_key_order() {
        let store = store_of(&["a.b", "b", "a", "a.b.c", "a-b"]);
        for (to, expected) in [
            ("a", "a has a=a @3, a.b=a.b @1, a.b.c=a.b.c @4 (up to 5)"),
            ("a.*", "a.* has a.b=a.b @1, a.b.c=a.b.c @4 (up to 5)"),
            ("a.b", "a.b has a.b=a.b @1, a.b.c=a.b.c @4 (up to 5)"),
            ("nothing", "nothing has  (up to 5)"),
        ] {
            let notifier = ScriptedNotifier::new();
            store.subscribe(pattern(to), "me".into(), notifier.clone(), true);
            assert_eq!(received(&notifier), [expected]);
        }
        let notifier = ScriptedNotifier::new();
        store.subscribe(Pattern::All, "me".into(), notifier.clone(), true);
        let event = notifier.take().remove(1);
        let EventKind::Snapshot(snapshot) = event.kind() else { panic!("{event:?}") };
        assert_eq!(snapshot.records, store.get_all(&Pattern::All).into_iter().collect());
        assert_eq!(snapshot.epoch, store.epoch());
    }

    #[test]
    fn no_change_falls_between_a_snapshot_and_what_follows_it_and_none_comes_twice() {
        let store: NotifyKeyValue<NoPersist, Mailbox> = NotifyKeyValue::open(NoPersist::default()).unwrap();
        let (stop, acknowledged) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(SeqCst) {
                    let revision = store.put(&key("k"), "x", PutOptions::default()).unwrap();
                    acknowledged.store(revision.get(), SeqCst);
                }
            });
            let _stop = StopOnDrop(&stop); // also when an assertion fails, or the scope would wait for the writer
            let mut previous: Option<(Inbox, u64)> = None;
            for _ in 0..if cfg!(miri) { 20 } else { 5_000 } {
                let before = acknowledged.load(SeqCst);
                let (post, inbox) = mailbox();
                store.subscribe(pattern("k"), "me".into(), post, true);
                let at = snapshot_revision(&inbox);
                assert!(at >= before, "the snapshot lacks a change that was acknowledged before: {at} < {before}");
                if let Some((inbox, from)) = previous.replace((inbox, at)) {
                    assert!(received_up_to(&inbox, from) <= at, "where one ends, the one that replaces it goes on");
                }
            }
        });
    }

    struct StopOnDrop<'a>(&'a AtomicBool);

    impl Drop for StopOnDrop<'_> {
        fn drop(&mut self) {
            self.0.store(true, SeqCst);
        }
    }

    /// Follows the changes of the one key from `at` on until the subscription was replaced.
    fn received_up_to(inbox: &Inbox, mut at: u64) -> u64 {
        loop {
            let Some(Item::Event { event, skipped }) = inbox.try_take() else { panic!("the end was not received") };
            let EventKind::Change(change) = event.kind() else { return at };
            // All changes are of this key, so what was not received was skipped, and counted.
            assert_eq!(change.revision.get(), at + 1 + skipped, "a gap, or a step back, after {at}");
            at = change.revision.get();
        }
    }

    fn snapshot_revision(inbox: &Inbox) -> u64 {
        let Some(Item::Event { event, .. }) = inbox.try_take() else { panic!("the beginning comes at once") };
        assert!(matches!(event.kind(), EventKind::Began(_)), "{event:?}");
        let Some(Item::Event { event, .. }) = inbox.try_take() else { panic!("the snapshot comes next") };
        let EventKind::Snapshot(snapshot) = event.kind() else { panic!("{event:?} came before the snapshot") };
        snapshot.revision.get()
    }
}

mod expiry {
    use super::*;

    #[test]
    fn a_key_expires_at_its_time_not_before_and_its_subscribers_are_notified() {
        let store = store();
        let notifier = subscribe(&store, "*", "me");
        put_until(&store, "late", 0, 20);
        put_until(&store, "soon", 0, 10);
        put(&store, "never", "x").unwrap();
        let _ = received(&notifier);
        assert_eq!(store.next_expiry(), Some(t(10)));
        assert_eq!(store.expire(t(9)).unwrap(), 0);
        assert_eq!(store.expire(t(10)).unwrap(), 1);
        assert_eq!(received(&notifier), ["soon expired @4"]);
        assert_eq!((store.get(&key("soon")), store.next_expiry()), (None, Some(t(20))));
        assert_eq!(store.expire(t(1_000)).unwrap(), 1);
        assert_eq!((keys(&store, "*"), store.next_expiry()), (vec!["never".into()], None));
        assert_eq!(store.stats().expired, 2);
    }

    #[test]
    fn a_put_without_expiry_ends_the_one_before_and_a_new_one_replaces_it() {
        let store = store();
        put_until(&store, "a", 0, 10);
        put_until(&store, "b", 0, 10);
        put(&store, "a", "stays").unwrap();
        put_until(&store, "b", 0, 30);
        assert_eq!((store.next_expiry(), store.expire(t(29)).unwrap()), (Some(t(30)), 0));
        assert_eq!(store.expire(t(30)).unwrap(), 1);
        assert_eq!(keys(&store, "*"), ["a"]);
    }

    #[test]
    fn the_same_expiry_again_still_holds() {
        let store = store();
        put_until(&store, "a", 0, 10);
        put_until(&store, "a", 5, 5);
        assert_eq!((store.next_expiry(), store.expire(t(10)).unwrap()), (Some(t(10)), 1));
    }

    #[test]
    fn a_deleted_key_does_not_expire() {
        let store = store();
        put_until(&store, "a", 0, 10);
        delete(&store, "a").unwrap();
        assert_eq!((store.next_expiry(), store.expire(t(10)).unwrap()), (None, 0));
    }

    #[test]
    fn an_expiry_survives_a_restart() {
        let disk = MemoryPersist::default();
        let first: Store = NotifyKeyValue::open(disk.clone()).unwrap();
        put_until(&first, "a", 0, 10);
        let again: Store = NotifyKeyValue::open_at(disk, t(5)).unwrap();
        assert_eq!((again.next_expiry(), again.expire(t(10)).unwrap()), (Some(t(10)), 1));
    }

    #[test]
    fn a_clock_that_was_set_back_between_two_runs_keeps_no_value_longer_than_its_ttl() {
        let disk = MemoryPersist::default();
        let first: Store = NotifyKeyValue::open_at(disk.clone(), t(1_000_000)).unwrap();
        put_until(&first, "a", 1_000_000, 60);
        let again: Store = NotifyKeyValue::open_at(disk, t(500)).unwrap();
        assert_eq!(
            (again.next_expiry(), again.expire(t(559)).unwrap(), again.expire(t(560)).unwrap()),
            (Some(t(560)), 0, 1)
        );
    }

    #[test]
    fn a_time_to_live_is_at_least_a_millisecond_and_never_runs_over() {
        assert_eq!(Expiry::after(t(5), Duration::ZERO), Expiry { at: t(6), ttl_ms: 1 });
        assert_eq!(Expiry::after(t(5), Duration::MAX), Expiry { at: Timestamp::MAX, ttl_ms: u64::MAX });
    }
}

mod reading {
    use super::*;

    const KEYS: [&str; 7] = ["b", "a-b", "a", "a.b.c", "ab", "a.b", "a.c"];

    #[test]
    fn keys_come_in_the_order_of_their_segments() {
        let store = store_of(&KEYS);
        assert_eq!(keys(&store, "*"), ["a", "a.b", "a.b.c", "a.c", "a-b", "ab", "b"]);
        assert_eq!(keys(&store, "a.*"), ["a.b", "a.b.c", "a.c"]);
        assert_eq!(keys(&store, "a"), ["a"]);
        assert_eq!(keys(&store, "c.*"), Vec::<String>::new());
    }

    #[test]
    fn a_walk_goes_in_order_and_ends_where_it_is_broken_off() {
        let store = store_of(&["a-b", "a.c", "a", "a.b", "b"]);
        let walk = |what: &str, after: Option<&str>, end: &str| {
            let mut seen = Vec::new();
            let ended = store.walk(&pattern(what), after.map(key).as_ref(), |record| {
                seen.push(format!("{}={} @{}", record.key, record.value.escape_ascii(), record.revision));
                if record.key == end { ControlFlow::Break(end.len()) } else { ControlFlow::Continue(()) }
            });
            (seen.join(" "), ended.break_value())
        };
        assert_eq!(walk("*", None, "a.c"), ("a=a @3 a.b=a.b @4 a.c=a.c @2".into(), Some(3)));
        assert_eq!(walk("*", Some("a.c"), ""), ("a-b=a-b @1 b=b @5".into(), None));
        assert_eq!(walk("a", None, ""), ("a=a @3".into(), None));
        assert_eq!(walk("a-b", Some("a.c"), "a-b"), ("a-b=a-b @1".into(), Some(3)));
        assert_eq!(walk("a.c", Some("a.c"), ""), (String::new(), None));
        assert_eq!(walk("a.c", Some("a-b"), ""), (String::new(), None));
        assert_eq!(walk("x", None, ""), (String::new(), None));
        assert_eq!(walk("x.*", None, ""), (String::new(), None));
    }

    #[test]
    fn a_record_is_looked_up_by_a_text_and_what_is_no_key_is_not_there() {
        let store = store_of(&["a.b"]);
        assert_eq!(
            store.look_up("a.b", |record| (record.value.to_bytes(), record.revision)),
            Some(("a.b".into(), r(1)))
        );
        for text in ["a", "a.b.c", "", "*", "a.*", "a b", &"k".repeat(5_000)] {
            assert_eq!(store.look_up(text, |_| ()), None, "{text}");
        }
    }

    #[test]
    fn pages_joined_are_the_whole_and_only_the_last_says_that_nothing_follows() {
        let store = store_of(&KEYS);
        for what in ["*", "a.*", "a", "a.b", "a.b.*", "nothing"].map(pattern) {
            let whole = store.get_all(&what);
            for limit in 1..=8 {
                let (mut listed, mut got, mut after) = (vec![], vec![], None);
                loop {
                    let list = store.list(&what, after.as_ref(), limit);
                    let page = store.get_page(&what, after.as_ref(), limit, usize::MAX).unwrap();
                    assert_eq!((list.more, list.entries.len()), (page.more, page.entries.len()));
                    assert!(page.entries.len() == limit || !page.more);
                    listed.extend(list.entries);
                    got.extend(page.entries);
                    assert!(got.len() <= whole.len(), "pages without end");
                    if !page.more {
                        break;
                    }
                    after = got.last().map(|record: &Record| record.key.clone());
                }
                assert_eq!(got, whole);
                assert_eq!(listed, whole.iter().map(|r| (r.key.clone(), r.revision)).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn a_page_may_start_after_a_key_that_is_not_there() {
        let store = store_of(&KEYS);
        let after = |what: &str, after: &str| {
            let list = store.list(&pattern(what), Some(&key(after)), 99).entries;
            list.into_iter().map(|entry| entry.0.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(after("*", "a.b.zzz"), ["a.c", "a-b", "ab", "b"]);
        assert_eq!(after("a.*", "A"), ["a.b", "a.b.c", "a.c"]);
        assert_eq!(after("a.*", "a"), ["a.b", "a.b.c", "a.c"]);
        assert_eq!(after("a.*", "a.b"), ["a.b.c", "a.c"]);
        assert_eq!(after("a.*", "b"), Vec::<String>::new());
        assert_eq!(after("a", "A"), ["a"]);
        assert_eq!(after("a", "a"), Vec::<String>::new());
    }

    #[test]
    fn a_page_of_none_says_whether_there_are_any() {
        let store = store_of(&["a"]);
        let page = store.list(&Pattern::All, None, 0);
        assert_eq!((page.entries.len(), page.more), (0, true));
        let page = store.get_page(&pattern("b"), None, 0, 0).unwrap();
        assert_eq!((page.entries.len(), page.more), (0, false));
    }

    #[test]
    fn a_page_is_refused_one_byte_past_the_limit_and_not_at_it() {
        let store = store_of(&["a", "bb"]); // keys and values together: 2 and 4 bytes
        assert_eq!(store.get_page(&Pattern::All, None, 9, 6).unwrap().entries.len(), 2);
        assert_eq!(store.get_page(&Pattern::All, None, 9, 5).unwrap_err().bytes_max, 5);
        let one = store.get_page(&Pattern::All, None, 1, 2).unwrap();
        assert_eq!((one.entries.len(), one.more), (1, true), "what is not on the page does not count");
    }

    #[test]
    fn a_key_exists_or_a_branch_does() {
        let store = store_of(&["a.b"]);
        let exists = ["a", "a.b", "a.*", "a.b.*", "*"].map(|what| store.exists(&pattern(what)));
        assert_eq!(exists, [false, true, true, false, true]);
    }

    #[test]
    fn figures_follow_what_happens() {
        let store = store_of(&["a", "bb"]);
        let _notifier = subscribe(&store, "*", "me");
        put(&store, "a", "123").unwrap();
        delete(&store, "bb").unwrap();
        let stats = store.stats();
        assert_eq!((stats.keys, stats.value_bytes, stats.subscriptions, stats.revision), (1, 3, 1, r(4)));
        assert_eq!((stats.puts, stats.deletes, stats.batches, stats.notified, stats.conflated), (3, 1, 4, 2, 0));
    }
}

mod restarts {
    use super::*;

    #[test]
    fn the_revision_goes_on_where_it_was_even_if_the_last_change_was_a_delete() {
        let disk = MemoryPersist::new(Epoch::new(5));
        let first: Store = NotifyKeyValue::open(disk.clone()).unwrap();
        put(&first, "a", "1").unwrap();
        put(&first, "b", "1").unwrap();
        delete(&first, "b").unwrap();
        let again: Store = NotifyKeyValue::open(disk).unwrap();
        assert_eq!((state(&again), again.epoch()), (state(&first), Epoch::new(5)));
        assert_eq!(put(&again, "c", "1").unwrap(), r(4));
    }
}

mod routes {
    use super::*;

    fn loaded(disk: &MemoryPersist) -> BTreeMap<String, u64> {
        let mut found = BTreeMap::new();
        disk.clone().load(&mut |stored| _ = found.insert(stored.key().to_string(), stored.revision().get())).unwrap();
        found
    }

    #[test]
    fn the_longest_branch_by_segments_keeps_a_key() {
        let disks: [MemoryPersist; 4] = Default::default();
        // The longer branch comes first, so that the order of the routes cannot be what decides.
        let routes = RoutePersist::new(disks[0].clone())
            .route(key("runtime.hot"), disks[2].clone())
            .route(key("runtime"), disks[1].clone())
            .route(key("runtimes.x"), disks[3].clone());
        let store: Store<RoutePersist> = NotifyKeyValue::open(routes).unwrap();
        for at in ["runtime", "runtime.a", "runtime.hot", "runtime.hot.x", "runtime.hotter", "runtimes", "runtimes.x"] {
            put(&store, at, "x").unwrap();
        }
        let kept = disks.map(|disk| loaded(&disk).into_keys().collect::<Vec<_>>());
        assert_eq!(kept[0], ["runtimes"]);
        assert_eq!(kept[1], ["runtime", "runtime.a", "runtime.hotter"]);
        assert_eq!(kept[2], ["runtime.hot", "runtime.hot.x"]);
        assert_eq!(kept[3], ["runtimes.x"]);
    }

    #[test]
    fn a_branch_that_is_routed_twice_goes_to_the_later_backend() {
        let (first, second) = (MemoryPersist::default(), MemoryPersist::default());
        let routes = RoutePersist::new(MemoryPersist::default()).route(key("a"), first.clone());
        let store: Store<RoutePersist> = NotifyKeyValue::open(routes.route(key("a"), second.clone())).unwrap();
        put(&store, "a.b", "x").unwrap();
        assert_eq!((loaded(&first).len(), loaded(&second).len()), (0, 1));
    }

    #[test]
    fn a_key_stored_where_no_route_looks_for_it_is_refused() {
        let (main, side) = (MemoryPersist::default(), MemoryPersist::default());
        let routes = || RoutePersist::new(main.clone());
        let before: Store<RoutePersist> = NotifyKeyValue::open(routes()).unwrap();
        put(&before, "a.b", "x").unwrap();
        let error = Store::open(routes().route(key("a"), side)).unwrap_err();
        assert_eq!(error.kind(), PersistErrorKind::Damaged);
        assert!(error.to_string().contains("a.b"), "{error}");
    }

    #[test]
    fn what_no_route_keeps_is_forgotten_and_the_rest_survives() {
        let disk = MemoryPersist::default();
        let open = |epoch| {
            let routes = RoutePersist::new(disk.clone()).route(key("runtime"), NoPersist::new(Epoch::new(epoch)));
            Store::open(routes).unwrap()
        };
        let first = open(1);
        put(&first, "kept", "x").unwrap();
        put(&first, "runtime.a", "x").unwrap();
        put(&first, "runtimes", "x").unwrap();
        let again = open(2);
        assert_eq!(keys(&again, "*"), ["kept", "runtimes"]);
        assert_ne!(first.epoch(), again.epoch(), "one part has lost something, so the whole has");
        assert_eq!(open(2).epoch(), again.epoch());
    }

    #[test]
    fn a_batch_stored_in_part_poisons_the_store_and_one_not_stored_at_all_does_not() {
        let (main, main_script) = ScriptedPersist::new(MemoryPersist::default());
        let (side, side_script) = ScriptedPersist::new(MemoryPersist::default());
        let store: Store<RoutePersist> = Store::open(RoutePersist::new(main).route(key("a"), side)).unwrap();
        let both = [op_put("a", "1", PutOptions::default()), op_put("b", "1", PutOptions::default())];
        main_script.fail_next(PersistErrorKind::NoSpace);
        assert_eq!(store.write(&both).unwrap_err().kind(), PersistErrorKind::NoSpace);
        assert_eq!(side_script.calls(), 0);
        side_script.fail_next(PersistErrorKind::NoSpace);
        assert_eq!(store.write(&both[..1]).unwrap_err().kind(), PersistErrorKind::NoSpace, "only one was asked");
        side_script.fail_next(PersistErrorKind::NoSpace);
        let error = store.write(&both).unwrap_err();
        assert_eq!(error.kind(), PersistErrorKind::Poisoned);
        assert!(std::error::Error::source(&error).is_some(), "what the one backend said is kept");
        assert_eq!(put(&store, "c", "1").map_err(|error| error.to_string()), Err("the write was not stored".into()));
        assert_eq!(state(&store), (vec![], r(0)));
    }
}

#[test]
#[cfg_attr(miri, ignore = "15,000 keys are only slow")]
fn a_great_many_keys_expire_in_steps_the_earliest_first() {
    let store: NotifyKeyValue<_, Mailbox<()>> = NotifyKeyValue::open(NoPersist::default()).unwrap();
    let put = |n: u64| Op::Put {
        key: Key::new(&format!("k{n}")).unwrap(),
        value: "x".into(),
        options: PutOptions { if_revision: None, expiry: Some(Expiry { at: t(n), ttl_ms: 1 }) },
    };
    store.write(&(1..=15_000).map(put).collect::<Vec<_>>()).unwrap();
    assert_eq!((store.expire(t(10_000)).unwrap(), store.next_expiry()), (10_000, Some(t(10_001))));
    assert_eq!((store.expire(t(20_000)).unwrap(), store.next_expiry()), (5_000, None));
    assert_eq!(store.stats().batches, 1 + 10 + 5, "in slices");
}

#[test]
fn a_condition_on_a_wildcard_never_holds() {
    let store: NotifyKeyValue<_, Mailbox<()>> = NotifyKeyValue::open(NoPersist::default()).unwrap();
    store.put(&Key::new("a.b").unwrap(), "x", PutOptions::default()).unwrap();
    let deleted = store.delete(&Pattern::All, Some(Revision::new(1)));
    assert!(matches!(deleted, Err(WriteError::Conflict { revision: Revision::ZERO })));
    assert!(store.exists(&Pattern::All));
}
