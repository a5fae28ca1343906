//! What becomes of a batch that is for several backends, and of the last sync of each.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code too")]

use std::sync::{Arc, Mutex};

use nkv_core::{
    Change, Key, Loaded, MemoryPersist, NotifyKeyValue, Op, PersistError, PersistErrorKind, PersistValue, Prepared,
    PutOptions, RoutePersist, StoredRef,
};
use nkv_testkit::script::{PersistScript, ScriptedNotifier, ScriptedPersist};

type Store<P> = NotifyKeyValue<P, ScriptedNotifier>;

fn put(at: &str) -> Op {
    Op::Put { key: Key::new(at).unwrap(), value: "x".into(), options: PutOptions::default() }
}

fn keys<P: PersistValue>(store: &Store<P>) -> Vec<String> {
    store.get_all(&nkv_core::Pattern::All).iter().map(|record| record.key.to_string()).collect()
}

fn scripted() -> (ScriptedPersist<MemoryPersist>, PersistScript) {
    ScriptedPersist::new(MemoryPersist::default())
}

/// A backend that has two methods only, as most have: it cannot say whether there is room.
#[derive(Debug)]
struct Silent<P>(P);

impl<P: PersistValue> PersistValue for Silent<P> {
    fn load(&mut self, visit: &mut dyn FnMut(StoredRef<'_>)) -> Result<Loaded, PersistError> {
        self.0.load(visit)
    }

    fn persist(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        self.0.persist(batch)
    }
}

// The route that had stored its part could not take it back: one full disk ended the store for all routes.
#[test]
fn a_full_route_refuses_a_batch_that_spans_routes_before_any_part_is_stored() {
    let ((main, main_script), (side, side_script)) = (scripted(), scripted());
    let store = Store::open(RoutePersist::new(main).route(Key::new("a").unwrap(), side)).unwrap();
    side_script.fail_prepare(PersistErrorKind::NoSpace);
    let error = store.write(&[put("b"), put("a")]).unwrap_err();
    assert_eq!(error.kind(), PersistErrorKind::NoSpace);
    assert_eq!((main_script.calls(), side_script.calls(), keys(&store).len()), (0, 0, 0));

    store.write(&[put("b"), put("c")]).unwrap();
    side_script.work();
    store.write(&[put("b"), put("a")]).unwrap();
    assert_eq!(keys(&store), ["a", "b", "c"]);
}

#[test]
fn a_backend_that_cannot_say_whether_it_has_room_stores_its_part_first() {
    let ((main, main_script), (side, side_script)) = (scripted(), scripted());
    let store = Store::open(RoutePersist::new(main).route(Key::new("a").unwrap(), Silent(side))).unwrap();
    side_script.fail_next(PersistErrorKind::NoSpace);
    let error = store.write(&[put("b"), put("a")]).unwrap_err();
    assert_eq!(error.kind(), PersistErrorKind::NoSpace);
    assert_eq!((main_script.calls(), side_script.calls()), (0, 1));
    store.write(&[put("b"), put("a")]).unwrap();
    assert_eq!(keys(&store), ["a", "b"]);
}

#[test]
fn routes_within_a_route_are_prepared_too_and_what_one_does_not_know_none_knows() {
    let ((main, _), (side, side_script), (inner, _)) = (scripted(), scripted(), scripted());
    let within = RoutePersist::new(Silent(inner)).route(Key::new("a.b").unwrap(), side);
    let mut routes = RoutePersist::new(main).route(Key::new("a").unwrap(), within);
    let change = |at: &str, revision| Change {
        key: Key::new(at).unwrap(),
        revision: nkv_core::Revision::new(revision),
        replaces: nkv_core::Revision::ZERO,
        action: nkv_core::Action::Put { value: "x".into(), expiry: None },
        meta: nkv_core::Meta::NONE,
    };
    let batch = [change("c", 1), change("a", 2), change("a.b", 3)];
    assert_eq!(routes.prepare(&batch).unwrap(), Prepared::Unknown);
    assert_eq!(routes.prepare(&[change("c", 1), change("a.b", 3)]).unwrap(), Prepared::Room);
    side_script.fail_prepare(PersistErrorKind::Rejected);
    assert_eq!(routes.prepare(&batch).unwrap_err().kind(), PersistErrorKind::Rejected);
    assert_eq!(routes.prepare(&batch[..2]).unwrap(), Prepared::Unknown, "the full one has no part in it");
}

#[test]
fn closing_a_store_closes_every_route_once_and_the_first_failure_is_the_result() {
    let ((main, main_script), (side, side_script), (other, other_script)) = (scripted(), scripted(), scripted());
    let boxed: Box<dyn PersistValue> = Box::new(Arc::new(Mutex::new(side)));
    let routes = RoutePersist::new(main).route(Key::new("a").unwrap(), boxed).route(Key::new("b").unwrap(), other);
    let store = Store::open(routes).unwrap();
    store.write(&[put("a"), put("b"), put("c")]).unwrap();
    side_script.fail_close(PersistErrorKind::Poisoned);
    other_script.fail_close(PersistErrorKind::Io);
    assert_eq!(store.close().unwrap_err().kind(), PersistErrorKind::Poisoned);
    assert!(store.close().is_ok(), "the failure is reported once");
    assert_eq!([main_script, side_script, other_script].map(|script| script.closes()), [1, 1, 1]);
}

#[test]
fn a_closed_store_takes_no_writes_and_is_read_as_before() {
    let (persist, script) = scripted();
    let store = Store::open(persist).unwrap();
    store.write(&[put("a")]).unwrap();
    store.close().unwrap();
    let error = store.write(&[put("b")]).unwrap_err();
    assert_eq!((error.kind(), error.to_string().contains("closed")), (PersistErrorKind::Rejected, true), "{error}");
    assert_eq!((keys(&store), script.calls()), (vec!["a".to_owned()], 1));
}

#[test]
fn boxed_and_shared_backends_pass_on_what_they_are_asked() {
    let (persist, script) = scripted();
    let mut shared: Box<dyn PersistValue> = Box::new(Arc::new(Mutex::new(Silent(MemoryPersist::default()))));
    assert_eq!(shared.prepare(&[]).unwrap(), Prepared::Unknown);
    let mut shared: Box<dyn PersistValue> = Box::new(Arc::new(Mutex::new(persist)));
    assert_eq!(shared.prepare(&[]).unwrap(), Prepared::Room);
    script.fail_prepare(PersistErrorKind::NoSpace);
    assert_eq!(shared.prepare(&[]).unwrap_err().kind(), PersistErrorKind::NoSpace);
    script.fail_close(PersistErrorKind::Io);
    assert_eq!(shared.close().unwrap_err().kind(), PersistErrorKind::Io);
}
