//! A value whose TTL has ended, while storage does not answer: absent for all, and subscribers hear of it once that is
//! stored.

#![allow(clippy::unwrap_used)]

mod support;

use nkv_core::{NoPersist, PersistErrorKind};
use nkv_testkit::script::{PersistScript, ScriptedPersist};
use support::{Conn, PATIENCE, TestServer, eventually, status};

fn scripted() -> (TestServer, PersistScript) {
    let (persist, script) = ScriptedPersist::new(NoPersist::default());
    (TestServer::with(|builder| builder.persist("scripted", || Ok(persist))), script)
}

fn put_with_ttl(conn: &mut Conn, key: &str, ttl_ms: u64) {
    let put = format!(r#"{{"type":"Put","key":"{key}","value":"old","ttl_ms":{ttl_ms}}}"#);
    assert_eq!(status(&conn.ask(&put)), 200);
}

fn is_gone(conn: &mut Conn, key: &str) -> bool {
    status(&conn.ask(&format!(r#"{{"type":"Get","key":"{key}"}}"#))) == 404
}

// The second value stayed for as long as storage did not do the expiry of the first.
#[test]
fn values_are_absent_from_their_time_on_although_storage_stalls() {
    let (server, script) = scripted();
    let (mut conn, mut watcher) = (server.connect(), server.connect());
    conn.hello("conn", "text").put("t.stays", "x");
    put_with_ttl(&mut conn, "t.first", 500);
    put_with_ttl(&mut conn, "t.second", 1_000);
    watcher.hello("watcher", "text");
    assert_eq!(watcher.ask(r#"{"type":"Subscribe","key":"t"}"#), "\"Hello\"");
    script.block();
    let mut writer = server.connect();
    writer.send(r#"{"type":"Put","key":"other","value":"x"}"#);
    assert!(script.wait_until_blocked(PATIENCE));

    for key in ["t.first", "t.second"] {
        eventually("a value is absent once its time has come", || is_gone(&mut conn, key));
        assert_eq!(status(&conn.ask(&format!(r#"{{"type":"Exists","key":"{key}"}}"#))), 404);
    }
    let all = conn.ask(r#"{"type":"Get","key":"t.*"}"#);
    assert!(all.contains(r#""keys":["t.stays"]"#), "{all}");
    let listed = conn.ask(r#"{"type":"List","key":"t.*"}"#);
    assert!(listed.contains(r#""keys":["t.stays"]"#), "{listed}");
    let mut late = server.connect();
    late.hello("late", "text").send(r#"{"type":"Subscribe","key":"t","snapshot":true}"#);
    assert_eq!(late.line(), "\"Hello\"");
    assert!(late.line().starts_with(r#"{"Update":{"key":"t.stays""#));
    assert!(late.line().starts_with(r#"{"Synced""#));
    // A lock that has ended can be taken.
    conn.send(r#"{"type":"Put","key":"t.first","value":"new","if_revision":0}"#);

    script.release();
    let answer = conn.json();
    assert_eq!(answer["Base"]["status"], 200, "{answer}");
    let revision = answer["Base"]["revision"].as_u64().unwrap();
    for subscriber in [&mut watcher, &mut late] {
        let (mut is_new, mut has_expired) = (false, false);
        while !is_new || !has_expired {
            let message = subscriber.json();
            match &message["Close"] {
                serde_json::Value::Null => {
                    let update = &message["Update"];
                    assert_eq!((update["key"].as_str(), update["value"].as_str()), (Some("t.first"), Some("new")));
                    assert_eq!(update["revision"], revision, "{message}");
                    is_new = true;
                }
                close => {
                    assert_eq!(close["reason"], "expired", "{message}");
                    has_expired |= close["key"] == "t.second";
                }
            }
        }
    }
    assert_eq!(status(&writer.line()), 200);
}

#[test]
fn values_are_absent_from_their_time_on_although_storage_fails() {
    let (server, script) = scripted();
    let (mut conn, mut watcher) = (server.connect(), server.connect());
    put_with_ttl(&mut conn, "first", 300);
    put_with_ttl(&mut conn, "second", 600);
    watcher.hello("watcher", "text");
    assert_eq!(watcher.ask(r#"{"type":"Subscribe","key":"*"}"#), "\"Hello\"");
    script.fail_always(PersistErrorKind::NoSpace);
    for key in ["first", "second"] {
        eventually("a value is absent once its time has come", || is_gone(&mut conn, key));
    }
    script.work();
    for _ in 0..2 {
        assert!(watcher.line().contains(r#""reason":"expired""#));
    }
}
