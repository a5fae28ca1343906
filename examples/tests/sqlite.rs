//! The backend of `sqlite.rs` keeps the contract of `PersistValue`, also when two instances have one file.

#![allow(clippy::unwrap_used, reason = "a test may panic, also in its helpers")]

#[path = "../sqlite.rs"]
#[expect(dead_code, reason = "the example's main")]
mod sqlite;

use nkv_core::PersistValue;
use sqlite::Sqlite;

nkv_testkit::persist_conformance!({
    let dir = tempfile::tempdir().unwrap();
    move || Sqlite::open(&dir.path().join("nkv.sqlite")).unwrap()
});

mod fencing {
    use super::Sqlite;

    nkv_testkit::fencing_conformance!({
        let dir = tempfile::tempdir().unwrap();
        move || Sqlite::open(&dir.path().join("nkv.sqlite")).unwrap()
    });
}

#[test]
fn a_file_that_is_no_database_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nkv.sqlite");
    std::fs::write(&path, "no database, and long enough not to be taken for an empty one ".repeat(100)).unwrap();
    assert!(Sqlite::open(&path).is_err());
}

#[test]
fn two_servers_on_one_file_do_not_diverge() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nkv.sqlite");
    let mut instances = [(); 2].map(|()| Sqlite::open(&path).unwrap());
    instances.iter_mut().for_each(|instance| _ = instance.load(&mut |_| {}).unwrap());
    let put = nkv_core::Change {
        key: nkv_core::Key::new("a").unwrap(),
        revision: nkv_core::Revision::new(1),
        replaces: nkv_core::Revision::ZERO,
        action: nkv_core::Action::Put { value: "x".into(), expiry: None },
        meta: nkv_core::Meta::NONE,
    };
    let stored = instances.map(|mut instance| instance.persist(std::slice::from_ref(&put)).is_ok());
    assert_eq!(stored, [false, true]);
}
