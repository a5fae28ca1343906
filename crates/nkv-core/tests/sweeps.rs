//! Wildcard deletes and expiries where storage refuses to delete some of the keys, as a full disk of one branch may.
#![cfg(not(any(loom, miri)))]
#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code too")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use nkv_core::{
    Change, Expiry, Key, Loaded, MemoryPersist, NotifyKeyValue, Op, Outcome, Pattern, PersistError, PersistErrorKind,
    PersistValue, PutOptions, RoutePersist, StoredRef, Timestamp, Write, WriteError,
};
use nkv_testkit::script::{ScriptedNotifier, ScriptedPersist};

type Store = NotifyKeyValue<Branches, ScriptedNotifier>;

/// Takes a batch whole or not at all, and none with a key of the branch `full` while that is so.
#[derive(Clone, Debug, Default)]
struct Branches {
    disk: MemoryPersist,
    is_full: Arc<AtomicBool>,
    refused: Arc<AtomicUsize>,
}

impl PersistValue for Branches {
    fn load(&mut self, visit: &mut dyn FnMut(StoredRef<'_>)) -> Result<Loaded, PersistError> {
        self.disk.load(visit)
    }

    fn persist(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        let is_full = self.is_full.load(SeqCst);
        let is_refused = |change: &Change| is_full && change.key.as_str().contains("full");
        let refused: Vec<usize> = (0..batch.len()).filter(|at| is_refused(&batch[*at])).collect();
        if !refused.is_empty() {
            self.refused.fetch_add(1, SeqCst);
            return Err(PersistError::new(PersistErrorKind::NoSpace, "the branch is full").with_refused(refused));
        }
        self.disk.persist(batch)
    }
}

/// A store with these keys, whose branch `full` is full.
fn store_of(keys: impl IntoIterator<Item = String>, expiry: Option<Expiry>) -> (Store, Branches) {
    let persist = Branches::default();
    let store = Store::open(persist.clone()).unwrap();
    let put = |key: String| Op::Put {
        key: Key::new(&key).unwrap(),
        value: "x".into(),
        options: PutOptions { expiry, ..PutOptions::default() },
    };
    let ops: Vec<Op> = keys.into_iter().map(put).collect();
    ops.chunks(1_000).for_each(|ops| drop(store.write(ops).unwrap()));
    persist.is_full.store(true, SeqCst);
    (store, persist)
}

fn keys(branch: &str, count: usize) -> impl Iterator<Item = String> + use<> {
    let branch = branch.to_owned();
    (0..count).map(move |n| format!("{branch}.{n:05}"))
}

fn left(store: &Store) -> Vec<String> {
    store.get_all(&Pattern::All).iter().map(|record| record.key.to_string()).collect()
}

#[test]
fn a_wildcard_delete_removes_what_it_can_and_says_how_much_that_was() {
    for (before, full, behind) in
        [(5, 3, 4), (0, 1, 0), (0, 5, 0), (0, 1, 1), (1, 1, 0), (2_000, 40, 3_000), (10, 5_000, 10), (0, 7, 1_500)]
    {
        let all_len = before + full + behind;
        let all = keys("a", before).chain(keys("full", full)).chain(keys("z", behind));
        let (store, persist) = store_of(all, None);
        let error = store.delete(&Pattern::All, None).unwrap_err();
        let deleted = (before + behind) as u64;
        match error {
            WriteError::Partial { deleted: said, source } if deleted > 0 => {
                assert_eq!((said, source.kind()), (deleted, PersistErrorKind::NoSpace));
            }
            WriteError::Persist(error) if deleted == 0 => assert_eq!(error.kind(), PersistErrorKind::NoSpace),
            other => panic!("{other}"),
        }
        assert_eq!(left(&store), keys("full", full).collect::<Vec<_>>());
        let refused = persist.refused.load(SeqCst);
        assert!(refused <= 2 + all_len / 500, "{refused} batches were refused for {full} keys");

        persist.is_full.store(false, SeqCst);
        assert_eq!(store.delete(&Pattern::All, None).unwrap().0, full as u64);
    }
}

#[test]
fn keys_that_are_refused_here_and_there_keep_no_others() {
    let all = (0..3_000).map(|n| if n % 100 == 7 { format!("k{n:04}.full") } else { format!("k{n:04}") });
    let (store, _) = store_of(all, None);
    assert!(matches!(store.delete(&Pattern::All, None), Err(WriteError::Partial { deleted: 2_970, .. })));
    assert_eq!(left(&store).len(), 30);
}

#[test]
fn values_expire_although_others_are_refused_and_those_go_when_there_is_space() {
    let all = keys("full", 30).chain(keys("z", 3_000));
    let (store, persist) = store_of(all, Some(Expiry { at: Timestamp::from_millis(10), ttl_ms: 1 }));
    assert_eq!(store.expire(Timestamp::from_millis(20)).unwrap_err().kind(), PersistErrorKind::NoSpace);
    assert_eq!((store.stats().expired, store.next_expiry()), (3_000, Some(Timestamp::from_millis(10))));
    persist.is_full.store(false, SeqCst);
    assert_eq!(store.expire(Timestamp::from_millis(20)).unwrap(), 30);
    assert_eq!(store.next_expiry(), None);
}

#[test]
fn the_writes_beside_a_wildcard_delete_that_is_refused_are_done() {
    let (store, _) = store_of(keys("a", 10).chain(keys("full", 10)), None);
    let put = |key| Op::Put { key: Key::new(key).unwrap(), value: "y".into(), options: PutOptions::default() };
    let delete = Op::Delete { pattern: Pattern::All, if_revision: None };
    let mut writes = [
        Write::apart(vec![put("new.1")]),
        Write::apart(vec![put("new.2"), delete, put("new.3")]),
        Write::together(vec![put("new.4"), put("full.new")]),
        Write::apart(vec![put("full.new"), put("new.5")]),
    ];
    while !writes.iter().all(Write::is_done) {
        store.commit(&mut writes);
    }
    let outcomes =
        writes.map(|write| write.into_results().into_iter().map(|r| r.map_err(|f| f.deleted)).collect::<Vec<_>>());
    assert!(matches!(outcomes[0][..], [Ok(Outcome::Put { .. })]));
    assert!(matches!(outcomes[1][..], [Ok(Outcome::Put { .. }), Err(13), Ok(Outcome::Put { .. })]), "{outcomes:?}");
    assert!(matches!(outcomes[2][..], [Err(0), Err(0)]));
    assert!(matches!(outcomes[3][..], [Err(0), Ok(Outcome::Put { .. })]));
    // The delete began when the others had been done once.
    assert_eq!(left(&store), keys("full", 10).chain(["new.3".to_owned()]).collect::<Vec<_>>());
}

#[test]
fn of_several_routes_those_with_room_do_their_part() {
    let ((full, script), other) = (ScriptedPersist::new(MemoryPersist::default()), MemoryPersist::default());
    let inner = RoutePersist::new(MemoryPersist::default()).route(Key::new("b.full").unwrap(), full);
    let routes = RoutePersist::new(other).route(Key::new("b").unwrap(), inner);
    let store: NotifyKeyValue<_, ScriptedNotifier> = NotifyKeyValue::open(routes).unwrap();
    for key in ["a", "b", "b.a", "b.full", "b.full.x", "b.z", "c"] {
        store.put(&Key::new(key).unwrap(), "x", PutOptions::default()).unwrap();
    }
    script.fail_prepare(PersistErrorKind::NoSpace);
    script.fail_always(PersistErrorKind::NoSpace);
    let deleted = store.delete(&Pattern::All, None);
    assert!(matches!(deleted, Err(WriteError::Partial { deleted: 5, .. })), "{deleted:?}");
    let left: Vec<String> = store.get_all(&Pattern::All).iter().map(|record| record.key.to_string()).collect();
    assert_eq!(left, ["b.full", "b.full.x"]);
    // A slice that is for one route alone, too.
    assert!(matches!(store.delete(&Pattern::All, None), Err(WriteError::Persist(_))));
    script.work();
    assert_eq!(store.delete(&Pattern::All, None).unwrap().0, 2);
}
