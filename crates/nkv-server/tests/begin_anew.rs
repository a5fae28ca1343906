//! Subscribers for which too much waits: their subscriptions begin anew, or they are closed, and memory stays bounded.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::net::TcpStream;

use nkv_core::mailbox::DELETES_MAX;
use serde_json::Value;
use support::{Conn, TestServer, status};

/// A connection of which the kernel keeps little: what waits for it waits in the server.
fn narrow(server: &TestServer) -> Conn {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(8 << 10).unwrap();
    socket.connect(&server.addr.parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    Conn::over(TcpStream::from(socket))
}

fn connect(conn: &mut Conn, name: &str, features: &str) {
    let connect = format!(r#"{{"type":"Connect","client_uuid":"{name}","values":"text"{features}}}"#);
    assert_eq!(status(&conn.ask(&connect)), 200);
}

const RESET: &str = r#","features":["reset"]"#;

/// Writes many pieces at once; all are done.
fn write(conn: &mut Conn, requests: impl Iterator<Item = String>) {
    let requests: Vec<String> = requests.collect();
    for some in requests.chunks(512) {
        conn.send(some.join("\n"));
        some.iter().for_each(|_| assert_eq!(status(&conn.line()), 200));
    }
}

fn put(key: impl std::fmt::Display, value: &str) -> String {
    format!(r#"{{"type":"Put","key":"{key}","value":"{value}"}}"#)
}

fn delete(key: impl std::fmt::Display) -> String {
    format!(r#"{{"type":"Delete","key":"{key}"}}"#)
}

/// What waits for the subscriber of this name.
fn queued(conn: &mut Conn, name: &str) -> Option<u64> {
    conn.send(r#"{"type":"Trace","key":"k"}"#);
    let traced = conn.json();
    let all = traced["Trace"]["subscribers"].as_array().unwrap_or_else(|| panic!("{traced}")).clone();
    all.iter().find(|one| one["client_uuid"] == name).map(|one| one["queued"].as_u64().unwrap())
}

/// What a subscriber knows.
#[derive(Default)]
struct View {
    values: BTreeMap<String, String>,
    /// Of a snapshot that was not asked for, and is not whole yet.
    fresh: Option<BTreeMap<String, String>>,
    resets: usize,
    synced: usize,
}

impl View {
    /// Takes notifications until that of `last`.
    fn follow(&mut self, conn: &mut Conn, last: &str) {
        loop {
            let message = conn.json();
            let (kind, fields) = message.as_object().unwrap().iter().next().unwrap();
            let field = |name: &str| fields[name].as_str().unwrap_or_default().to_owned();
            match kind.as_str() {
                "Update" => {
                    self.fresh.as_mut().unwrap_or(&mut self.values).insert(field("key"), field("value"));
                    if fields["key"] == last && self.fresh.is_none() {
                        return;
                    }
                }
                "Close" => drop(self.values.remove(&field("key"))),
                "Reset" => {
                    (self.fresh, self.resets) = (Some(BTreeMap::new()), self.resets + 1);
                }
                "Synced" => {
                    self.values = self.fresh.take().unwrap_or_default();
                    self.synced += 1;
                    if self.values.contains_key(last) {
                        return;
                    }
                }
                other => panic!("{other}: {message}"),
            }
        }
    }
}

fn stored(conn: &mut Conn) -> BTreeMap<String, String> {
    conn.send(r#"{"type":"Get","key":"*"}"#);
    let got = conn.json();
    let texts = |name: &str| got["Get"][name].as_array().unwrap().clone();
    let text = |value: Value| value.as_str().unwrap().to_owned();
    texts("keys").into_iter().map(text).zip(texts("data").into_iter().map(text)).collect()
}

/// More than the kernel and the slack take.
fn fill_up(writer: &mut Conn) {
    let value = "f".repeat(1_000);
    write(writer, (0..1_000).map(|n| put(format!("fill.{n}"), &value)));
}

/// Keys of which a subscriber that does not read was notified go, and others come and go.
fn come_and_go(writer: &mut Conn, rounds: usize) {
    for round in 0..rounds {
        let key = |n: usize| format!("k.{round}.{n}");
        write(writer, (0..1_000).map(|n| put(key(n), "x")));
        write(writer, (0..1_000).map(|n| delete(key(n))));
    }
}

#[test]
fn a_subscription_begins_anew_for_one_that_understands_it() {
    let server = TestServer::start();
    let mut writer = server.connect();
    writer.hello("writer", "text");
    let known = 2 * DELETES_MAX;
    write(&mut writer, (0..known).map(|n| put(format!("k.{n}"), "x")));
    let mut readers = [narrow(&server), narrow(&server)];
    for (reader, (name, snapshot)) in readers.iter_mut().zip([("plain", ""), ("snapshot", r#","snapshot":true"#)]) {
        connect(reader, name, RESET);
        reader.send(format!(r#"{{"type":"Subscribe","key":"*"{snapshot}}}"#));
        assert_eq!(reader.line(), "\"Hello\"");
        // All of the snapshot, if there is one.
        while !snapshot.is_empty() && !reader.line().starts_with(r#"{"Synced""#) {}
    }
    fill_up(&mut writer);
    write(&mut writer, (0..known).map(|n| delete(format!("k.{n}"))));
    let mut most = 0;
    for _ in 0..8 {
        come_and_go(&mut writer, 1);
        most = ["plain", "snapshot"].iter().filter_map(|name| queued(&mut writer, name)).fold(most, u64::max);
    }
    // The keys that there are, the deletes, and some as they came.
    assert!(most <= (1_000 + DELETES_MAX + 2_000) as u64, "{most} waited");
    write(&mut writer, (0..100).map(|n| put(format!("k.stays.{n}"), "y")));
    write(&mut writer, std::iter::once(put("k.end", "first")));
    for reader in &mut readers {
        let mut view = View::default();
        view.follow(reader, "k.end");
        assert!(view.resets >= 1 && view.synced == view.resets, "{} of {}", view.synced, view.resets);
        assert_eq!(view.values, stored(&mut writer));
        // It goes on, also with answers.
        let before = view.resets;
        write(&mut writer, [delete("k.stays.1"), put("k.end", "second")].into_iter());
        view.follow(reader, "k.end");
        assert_eq!((&view.values, view.resets), (&stored(&mut writer), before));
        assert_eq!(status(&reader.ask(r#"{"type":"Health"}"#)), 200);
        write(&mut writer, [put("k.stays.1", "y"), put("k.end", "first")].into_iter());
        view.follow(reader, "k.end");
    }
}

#[test]
fn one_that_does_not_understand_it_is_closed_and_has_everything_after_it_came_back() {
    let server = TestServer::start();
    let (mut writer, mut reader) = (server.connect(), narrow(&server));
    writer.hello("writer", "text");
    connect(&mut reader, "old", "");
    assert_eq!(reader.ask(r#"{"type":"Subscribe","key":"*"}"#), "\"Hello\"");
    let known = 2 * DELETES_MAX;
    write(&mut writer, (0..known).map(|n| put(format!("k.{n}"), "x")));
    fill_up(&mut writer);
    write(&mut writer, (0..known).map(|n| delete(format!("k.{n}"))));
    // Its subscription goes at once, the connection when it reads what is on its way.
    assert_eq!(queued(&mut writer, "old"), None);
    loop {
        match reader.line() {
            line if line == "(closed)" => break,
            line => assert!(!line.contains("Reset"), "{line}"),
        }
    }
    let mut again = server.connect();
    connect(&mut again, "old", "");
    again.send(r#"{"type":"Subscribe","key":"*","snapshot":true}"#);
    assert_eq!(again.line(), "\"Hello\"");
    let mut view = View { fresh: Some(BTreeMap::new()), ..View::default() };
    write(&mut writer, std::iter::once(put("k.end", "x")));
    view.follow(&mut again, "k.end");
    assert_eq!((view.values, view.resets), (stored(&mut writer), 0));
}

#[test]
fn one_that_names_no_feature_and_keeps_up_notices_nothing() {
    let server = TestServer::start();
    let (mut writer, mut reader) = (server.connect(), server.connect());
    writer.hello("writer", "text").put("k.before", "x");
    connect(&mut reader, "old", "");
    reader.send(r#"{"type":"Subscribe","key":"*","snapshot":true}"#);
    assert_eq!(reader.line(), "\"Hello\"");
    let reading = std::thread::spawn(move || {
        let mut view = View { fresh: Some(BTreeMap::new()), ..View::default() };
        view.follow(&mut reader, "k.end");
        view
    });
    come_and_go(&mut writer, 10);
    write(&mut writer, std::iter::once(put("k.end", "x")));
    let view = reading.join().unwrap();
    assert_eq!((view.values, view.resets, view.synced), (stored(&mut writer), 0, 1));
}
