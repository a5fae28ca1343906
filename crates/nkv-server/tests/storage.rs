//! What clients see when storage fails, and when the server stops.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use nkv_core::{
    Action, Change, Epoch, Expiry, Key, Loaded, MemoryPersist, Meta, NoPersist, Op, PersistError, PersistErrorKind,
    PersistValue, PutOptions, Revision, RoutePersist, StoredRef,
};
use nkv_server::ServerError;
use nkv_testkit::script::{Crash, ScriptedPersist};
use nkv_types::ErrorKind;
use support::{PATIENCE, TestServer, eventually, status};

#[test]
fn a_failed_write_is_an_error_and_changes_nothing() {
    let (persist, script) = ScriptedPersist::new(NoPersist::default());
    let server = TestServer::with(|builder| builder.persist("scripted", || Ok(persist)));
    let mut conn = server.connect();
    conn.hello("c", "text");
    conn.put("a", "old");
    for (kind, expected) in [(PersistErrorKind::NoSpace, 507), (PersistErrorKind::Io, 500)] {
        script.fail_next(kind);
        assert_eq!(status(&conn.ask(r#"{"type":"Put","key":"a","value":"new"}"#)), expected);
        assert!(conn.ask(r#"{"type":"Get","key":"a"}"#).contains("\"old\""));
    }
    assert_eq!(conn.put("a", "new"), 2);
}

/// A disk with room for short values only.
#[derive(Debug)]
struct Full;

impl PersistValue for Full {
    fn load(&mut self, _visit: &mut dyn FnMut(StoredRef<'_>)) -> Result<Loaded, PersistError> {
        Ok(Loaded::default())
    }

    fn persist(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        let fits = |change: &Change| !matches!(&change.action, Action::Put { value, .. } if value.len() > 5);
        if batch.iter().all(fits) { Ok(()) } else { Err(PersistError::new(PersistErrorKind::NoSpace, "full")) }
    }
}

#[test]
fn on_a_full_disk_what_makes_space_is_done_although_it_waited_with_what_does_not_fit() {
    let (persist, script) = ScriptedPersist::new(Full);
    let server = TestServer::with(|builder| builder.persist("scripted", || Ok(persist)));
    let mut conn = server.connect();
    conn.put("a", "x");
    // What arrives together is stored as one batch.
    let put = r#"{"type":"Put","key":"c","value":"does not fit"}"#;
    conn.send(format!("{put}\n{}", r#"{"type":"Delete","key":"a"}"#));
    assert_eq!(status(&conn.line()), 507);
    assert_eq!(status(&conn.line()), 200);
    assert_eq!(script.calls(), 4, "a alone, both together, each alone");
}

// The route that had stored its part could not take it back, and the server ended.
#[test]
fn a_full_route_refuses_its_own_writes_and_nothing_else() {
    let (disk, full_disk) = (MemoryPersist::default(), MemoryPersist::default());
    let (full, script) = ScriptedPersist::new(full_disk.clone());
    let routes = RoutePersist::new(disk.clone()).route(Key::new("full").unwrap(), full);
    let server = TestServer::with(|builder| builder.persist("routes", || Ok(routes)));
    let mut conn = server.connect();
    script.fail_prepare(PersistErrorKind::NoSpace);
    script.fail_always(PersistErrorKind::NoSpace);
    // What arrives together is stored as one batch.
    let keys = ["a", "full.a", "b", "full.b", "full.a", "c"];
    conn.send(keys.map(|key| format!(r#"{{"type":"Put","key":"{key}","value":"x"}}"#)).join("\n"));
    for key in keys {
        assert_eq!(status(&conn.line()), if key.starts_with("full") { 507 } else { 200 }, "{key}");
    }
    // What one caller gives as one batch is refused whole.
    let put = |key: &str| Op::Put { key: Key::new(key).unwrap(), value: "x".into(), options: PutOptions::default() };
    let written = server.runtime.block_on(server.handle.write(vec![put("d"), put("full.d")]));
    assert!(matches!(written, Err(error) if error.kind() == &ErrorKind::Refused { status: 507 }));
    let listed = conn.ask(r#"{"type":"List","key":"*"}"#);
    assert!(listed.contains(r#""keys":["a","b","c"]"#), "{listed}");

    script.work();
    server.runtime.block_on(server.handle.write(vec![put("d"), put("full.d")])).unwrap();
    server.shutdown().unwrap();
    let loaded = |mut disk: MemoryPersist| disk.load(&mut |_| {}).unwrap().revision.get();
    assert_eq!((loaded(disk), loaded(full_disk)), (4, 5));
}

#[test]
fn when_it_is_not_known_what_is_stored_the_server_ends_and_a_restart_shows_it() {
    let disk = MemoryPersist::new(Epoch::new(1));
    let (persist, script) = ScriptedPersist::new(disk.clone());
    let mut server = TestServer::with(|builder| builder.persist("scripted", || Ok(persist)));
    let mut conn = server.connect();
    conn.put("a", "acknowledged");
    script.crash_next(Crash::AfterStoring);
    let answer = conn.ask(r#"{"type":"Put","key":"b","value":"unknown"}"#);
    assert_eq!(status(&answer), 500, "{answer}");
    assert_eq!(conn.line(), "(closed)");
    assert_poisoned(server.ended());

    let server = TestServer::with(|builder| builder.persist("memory", || Ok(disk)));
    let answer = server.connect().ask(r#"{"type":"List","key":"*"}"#);
    assert!(answer.contains(r#""keys":["a","b"],"revisions":[1,2]"#), "{answer}");
}

fn assert_poisoned(ended: Result<(), ServerError>) {
    assert!(
        matches!(&ended, Err(ServerError::Persist(error)) if error.kind() == PersistErrorKind::Poisoned),
        "{ended:?}"
    );
}

// Their connections were cut before the answers were written: 95 of 96 saw the end of the stream.
#[test]
fn every_writer_that_waited_for_a_failed_sync_is_answered_500() {
    let (persist, script) = ScriptedPersist::new(NoPersist::default());
    let mut server = TestServer::with(|builder| builder.persist("scripted", || Ok(persist)));
    script.block();
    script.crash_call(2, Crash::BeforeStoring);
    let first_server = server.handle.clone();
    let first =
        server.runtime.spawn(async move { first_server.put(&Key::new("first").unwrap(), "x").await.map(|_| ()) });
    assert!(script.wait_until_blocked(PATIENCE));
    let mut conns: Vec<_> = (0..96).map(|_| server.connect()).collect();
    for conn in &mut conns {
        // The put came with the get that is answered, so it waits for storage by then.
        conn.send("{\"type\":\"Health\"}\n{\"type\":\"Put\",\"key\":\"a\",\"value\":\"x\"}");
    }
    conns.iter_mut().for_each(|conn| assert_eq!(status(&conn.line()), 200));
    script.release();
    for conn in &mut conns {
        let answer = conn.line();
        assert!(status(&answer) == 500, "{answer}");
        assert_eq!(conn.line(), "(closed)");
    }
    assert!(server.runtime.block_on(first).unwrap().is_ok(), "it was stored before");
    assert_poisoned(server.ended());
    assert_eq!(script.calls(), 2, "storage was asked again");
}

// Only the first failure of a group was looked at, and the server went on until the next write.
#[test]
fn storage_that_fails_over_one_of_several_writes_ends_the_server() {
    let (persist, script) = ScriptedPersist::new(NoPersist::default());
    let mut server = TestServer::with(|builder| builder.persist("scripted", || Ok(persist)));
    let mut conn = server.connect();
    // Both together, the first alone, the second alone.
    script.fail_call(1, PersistErrorKind::NoSpace);
    script.fail_call(2, PersistErrorKind::NoSpace);
    script.crash_call(3, Crash::BeforeStoring);
    let put = r#"{"type":"Put","key":"a","value":"x"}"#;
    conn.send(format!("{put}\n{put}"));
    assert_eq!((status(&conn.line()), status(&conn.line())), (507, 500));
    assert_poisoned(server.ended());
}

// It went on to serve values that were acknowledged and not durable, until the next write came.
#[test]
fn a_sync_that_fails_in_the_background_ends_the_server_although_nothing_is_written() {
    let (persist, script) = ScriptedPersist::new(NoPersist::default());
    let (first, other_script) = ScriptedPersist::new(NoPersist::default());
    let routes = RoutePersist::new(first).route(Key::new("a").unwrap(), persist);
    let mut server = TestServer::with(|builder| builder.persist("routes", || Ok(routes)));
    let mut conn = server.connect();
    conn.put("a", "acknowledged");
    assert!(script.report_failure(PersistErrorKind::Poisoned), "the server does not want to know");
    assert_eq!(conn.line(), "(closed)");
    assert_poisoned(server.ended());
    assert_eq!((script.calls(), other_script.calls()), (1, 0));
}

#[test]
fn a_server_that_stops_finishes_what_it_accepted() {
    let disk = MemoryPersist::new(Epoch::new(1));
    let (persist, script) = ScriptedPersist::new(disk.clone());
    let server = TestServer::with(|builder| builder.persist("scripted", || Ok(persist)));
    let mut conn = server.connect();
    script.block();
    conn.send(r#"{"type":"Put","key":"a","value":"x"}"#);
    assert!(script.wait_until_blocked(PATIENCE));
    let addr = server.addr.clone();
    let stopper = std::thread::spawn(move || server.shutdown());
    eventually("it accepts no more", || std::net::TcpStream::connect(&addr).is_err());
    script.release();
    assert_eq!(status(&conn.line()), 200);
    assert_eq!(conn.line(), "(closed)");
    stopper.join().unwrap().unwrap();
    let server = TestServer::with(|builder| builder.persist("memory", || Ok(disk)));
    assert_eq!(status(&server.connect().ask(r#"{"type":"Get","key":"a"}"#)), 200);
}

// The failure was logged, and the program ended with 0.
#[test]
fn a_last_sync_that_fails_is_what_a_shutdown_returns() {
    let (persist, script) = ScriptedPersist::new(NoPersist::default());
    let server = TestServer::with(|builder| builder.persist("scripted", || Ok(persist)));
    server.connect().put("a", "x");
    script.fail_close(PersistErrorKind::Io);
    assert!(matches!(server.shutdown(), Err(ServerError::Persist(error)) if error.kind() == PersistErrorKind::Io));
    assert_eq!(script.closes(), 1);
}

#[test]
fn a_server_that_stops_waits_for_no_idle_connection() {
    let server = TestServer::start();
    let mut conn = server.connect();
    conn.put("a", "x");
    let start = Instant::now();
    server.shutdown().unwrap();
    assert_eq!(conn.line(), "(closed)");
    assert!(start.elapsed() < Duration::from_secs(3), "it was cut in the end");
}

#[test]
fn a_ttl_goes_on_over_a_restart_and_its_end_is_notified() {
    let disk = MemoryPersist::new(Epoch::new(1));
    let start = || {
        let disk = disk.clone();
        TestServer::with(|builder| builder.persist("memory", || Ok(disk)))
    };
    let server = start();
    let answer = server.connect().ask(r#"{"type":"Put","key":"a","value":"x","ttl_ms":400}"#);
    assert_eq!(status(&answer), 200);
    server.shutdown().unwrap();
    let server = start();
    let mut conn = server.connect();
    conn.send(r#"{"type":"Subscribe","key":"a"}"#);
    assert_eq!(conn.line(), "\"Hello\"");
    assert_eq!(conn.line(), r#"{"Close":{"key":"a","revision":2,"skipped":0,"reason":"expired"}}"#);
}

const HOUR_MS: u64 = 3_600_000;

/// A server that finds one value, which was put when the store had come to `put_at`, with a TTL of two hours, and a clock
/// that was kept then, `ago` before now or at a time that no clock shows which was set.
fn server_after(put_at: u64, kept_wall: Option<u64>, dir: &std::path::Path) -> TestServer {
    let mut disk = MemoryPersist::new(Epoch::new(1));
    let expiry = Some(Expiry { at: nkv_core::Timestamp::from_millis(put_at + 2 * HOUR_MS), ttl_ms: 2 * HOUR_MS });
    let action = Action::Put { value: "x".into(), expiry };
    let change = Change {
        key: Key::new("a").unwrap(),
        revision: Revision::new(1),
        replaces: Revision::ZERO,
        action,
        meta: Meta::NONE,
    };
    disk.persist(&[change]).unwrap();
    let file = dir.join("clock");
    if let Some(wall) = kept_wall {
        std::fs::write(&file, format!("store_ms {put_at}\nwall_ms {wall}\n")).unwrap();
    }
    TestServer::with(|builder| builder.persist("memory", || Ok(disk)).clock_file(file))
}

// A board booted in 1970, its clock was set, and the next start ended each TTL at once.
#[test]
fn what_is_left_of_a_ttl_after_a_restart_does_not_depend_on_a_wall_clock_that_was_not_set() {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64;
    let dir = tempfile::tempdir().unwrap();
    let is_there = |put_at, kept_wall| {
        let server = server_after(put_at, kept_wall, dir.path());
        let mut conn = server.connect();
        assert_eq!(status(&conn.ask(r#"{"type":"Put","key":"short","value":"x","ttl_ms":1}"#)), 200);
        // What is due goes in the order in which it is.
        eventually("it expires", || status(&conn.ask(r#"{"type":"Get","key":"short"}"#)) == 404);
        status(&conn.ask(r#"{"type":"Get","key":"a"}"#)) == 200
    };
    assert!(is_there(9_000, Some(9_000)), "how long nothing ran is not known");
    assert!(is_there(9_000, Some(now - HOUR_MS)));
    assert!(!is_there(9_000, Some(now - 3 * HOUR_MS)), "time while nothing ran counts");
    assert!(is_there(now - 5 * HOUR_MS, Some(now - HOUR_MS)), "the wall clock was set forward meanwhile");
    assert!(is_there(now, Some(now + 5 * HOUR_MS)), "it was set back");
    std::fs::remove_file(dir.path().join("clock")).unwrap();
    assert!(!is_there(now - 3 * HOUR_MS, None), "what was stored before there was such a file");
}

#[test]
fn how_far_the_clock_has_come_is_kept_before_the_first_ttl_is_stored_and_not_without_one() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("clock");
    let disk = MemoryPersist::new(Epoch::new(1));
    let start = || {
        let (disk, file) = (disk.clone(), file.clone());
        TestServer::with(|builder| builder.persist("memory", || Ok(disk)).clock_file(file))
    };
    let server = start();
    let mut conn = server.connect();
    conn.put("a", "x");
    assert!(!file.exists());
    assert_eq!(status(&conn.ask(r#"{"type":"Put","key":"a","value":"x","ttl_ms":3600000}"#)), 200);
    let kept = std::fs::read_to_string(&file).unwrap();
    eventually("it is kept now and then", || std::fs::read_to_string(&file).unwrap() != kept);
    server.shutdown().unwrap();
    // And when a server starts that has such a value.
    std::fs::remove_file(&file).unwrap();
    let server = start();
    assert!(file.exists());
    server.shutdown().unwrap();
}

/// Storage with a mistake in it.
#[derive(Debug)]
struct Panics;

impl PersistValue for Panics {
    fn load(&mut self, _visit: &mut dyn FnMut(StoredRef<'_>)) -> Result<Loaded, PersistError> {
        Ok(Loaded::default())
    }

    fn persist(&mut self, _batch: &[Change]) -> Result<(), PersistError> {
        panic!("on purpose")
    }
}

#[test]
fn storage_that_panics_ends_the_server_with_an_error() {
    let mut server = TestServer::with(|builder| builder.persist("panics", || Ok(Panics)));
    let mut conn = server.connect();
    // It may have been stored: no other status says so.
    assert_eq!(status(&conn.ask(r#"{"type":"Put","key":"a","value":"x"}"#)), 500);
    assert_poisoned(server.ended());
}

// A write of a handle that was handed over while the writer was at another waited for ever for a writer that was gone.
#[test]
fn no_client_waits_for_storage_that_panicked() {
    let (persist, script) = ScriptedPersist::new(Panics);
    let mut server = TestServer::with(|builder| builder.persist("panics", || Ok(persist)));
    script.block();
    let writes = [(); 2].map(|()| {
        let nkv = server.handle.clone();
        let put = server.runtime.spawn(async move {
            let key = Key::new("a").unwrap();
            tokio::time::timeout(PATIENCE, nkv.put(&key, "x")).await
        });
        assert!(script.wait_until_blocked(PATIENCE));
        put
    });
    // The second was handed over before this is answered, as a rule.
    assert_eq!(status(&server.connect().ask(r#"{"type":"Health"}"#)), 200);
    script.release();
    for write in writes {
        let written = server.runtime.block_on(write).unwrap().unwrap();
        assert!(
            matches!(
                written.as_ref().map_err(nkv_types::Error::kind),
                Err(ErrorKind::Refused { status: 500 } | ErrorKind::OutcomeUnknown | ErrorKind::Closed)
            ),
            "{written:?}"
        );
    }
    assert_poisoned(server.ended());
}

// It waited for storage, however long that took.
#[test]
fn a_server_whose_storage_stalls_stops_all_the_same_and_says_so() {
    let (persist, script) = ScriptedPersist::new(NoPersist::default());
    let server = TestServer::with(|builder| builder.persist("scripted", || Ok(persist)));
    let mut conn = server.connect();
    script.block();
    conn.send(r#"{"type":"Put","key":"a","value":"x"}"#);
    assert!(script.wait_until_blocked(PATIENCE));
    let stopped = server.shutdown();
    assert!(
        matches!(&stopped, Err(ServerError::Persist(error)) if error.to_string().contains("did not answer")),
        "{stopped:?}"
    );
    assert_eq!(conn.line(), "(closed)");
    assert_eq!(script.closes(), 0, "the writer is still at it");
    script.release();
    eventually("storage is closed in the end", || script.closes() == 1);
}

#[test]
fn a_directory_may_be_opened_again_as_soon_as_the_server_has_stopped() {
    let dir = tempfile::tempdir().unwrap();
    for n in 0..3 {
        let path = dir.path().to_owned();
        let server = TestServer::with(|builder| {
            builder.persist("sync", || nkv_persist_fs::FsPersist::open(path, nkv_persist_fs::FsOptions::default()))
        });
        // A connection that is in the middle of something.
        let mut conn = server.connect();
        conn.put("a", &n.to_string());
        conn.send(r#"{"type":"Subscribe","key":"*","snapshot":true}"#);
        server.shutdown().unwrap();
    }
}
