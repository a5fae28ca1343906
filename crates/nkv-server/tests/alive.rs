//! Signs of life: a client can distinguish a server that keeps it waiting from one that is not there.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::Duration;

use nkv_core::NoPersist;
use nkv_server::Options;
use nkv_testkit::script::ScriptedPersist;
use support::{Conn, PATIENCE, TestServer, eventually, status};

const STALL_LIMIT: Duration = Duration::from_secs(3);

fn options() -> Options {
    let mut options = Options::default();
    options.stall_limit = STALL_LIMIT;
    options
}

/// A connection whose client understands signs of life.
fn connect(server: &TestServer) -> Conn {
    let mut conn = server.connect();
    let answer = conn.ask(r#"{"type":"Connect","values":"text","features":["alive"]}"#);
    assert!(answer.contains(&format!("\"patience_ms\":{}", STALL_LIMIT.as_millis())), "{answer}");
    conn
}

/// The next line that is no sign of life, and how many of these came before it.
fn answer(conn: &mut Conn) -> (String, usize) {
    for signs in 0.. {
        match conn.line() {
            line if line == "\"Alive\"" => {}
            line => return (line, signs),
        }
    }
    unreachable!()
}

// Nothing came from a server whose storage took long: its client took it for dead, and did not know what became of the put.
#[test]
fn a_client_that_waits_for_storage_gets_signs_of_life_if_it_understands_them() {
    let (persist, script) = ScriptedPersist::new(NoPersist::default());
    let server = TestServer::with(|builder| builder.options(options()).persist("scripted", || Ok(persist)));
    let (mut conn, mut behind, mut idle, mut plain) =
        (connect(&server), connect(&server), connect(&server), server.connect());
    let connected = plain.ask(r#"{"type":"Connect","features":["reset"]}"#);
    assert!(!connected.contains("patience_ms"), "{connected}");
    script.block();
    plain.send(r#"{"type":"Put","id":1,"key":"k","value":"x"}"#);
    assert!(script.wait_until_blocked(PATIENCE));
    conn.send(r#"{"type":"Put","id":1,"key":"k","value":"x"}"#);
    behind.send(r#"{"type":"Put","id":1,"key":"k","value":"x"}"#).send(r#"{"type":"Get","id":2,"key":"k"}"#);
    for conn in [&mut conn, &mut behind] {
        (0..3).for_each(|_| assert_eq!(conn.line(), "\"Alive\""));
    }
    script.release();
    for conn in [&mut conn, &mut behind] {
        assert_eq!(status(&answer(conn).0), 200);
    }
    assert_eq!(status(&answer(&mut behind).0), 200);
    // These two got none: the next line is an answer.
    assert_eq!(status(&plain.line()), 200);
    assert_eq!(status(&idle.ask(r#"{"type":"Health"}"#)), 200);
}

#[test]
fn a_client_that_waits_for_room_gets_signs_of_life() {
    let mut options = options();
    options.queued_max = 4 << 20;
    let server = TestServer::with(|builder| builder.options(options));
    let (mut greedy, mut conn) = (server.connect(), connect(&server));
    for n in 0..8 {
        conn.put(&format!("k.{n}"), &"v".repeat(800_000));
    }
    // Its answer is too large for the sockets, and it reads nothing of it.
    greedy.send(r#"{"type":"Get","key":"k.*"}"#);
    eventually("a list waits until the other connection has made room", || {
        conn.send(r#"{"type":"List","id":3,"key":"*"}"#);
        let (listed, signs) = answer(&mut conn);
        assert_eq!(status(&listed), 200);
        signs > 0
    });
}
