//! The list of clients: which are connected, by which name, from where, and with what.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use serde_json::Value;
use support::{Conn, TestServer, eventually};

fn connect(server: &TestServer, fields: &str) -> Conn {
    let mut conn = server.connect();
    let answer = conn.ask(&format!(r#"{{"type":"Connect","features":["names"],{fields}}}"#));
    assert!(answer.contains("\"status\":200"), "{answer}");
    conn
}

fn clients(conn: &mut Conn) -> Vec<Value> {
    conn.send(r#"{"type":"Trace"}"#);
    let answer = conn.json();
    answer["Trace"]["clients"].as_array().unwrap_or_else(|| panic!("{answer}")).clone()
}

fn names(clients: &[Value]) -> Vec<Option<&str>> {
    clients.iter().map(|client| client["name"].as_str()).collect()
}

// It was not visible which of many clients a subscription was of: programs made up a `client_uuid` for people to read.
#[test]
fn clients_are_listed_with_their_names_and_addresses_until_they_go() {
    let server = TestServer::start();
    let mut looks = connect(&server, r#""client_uuid":"c0""#);
    let lamps: Vec<Conn> =
        (1..3).map(|n| connect(&server, &format!(r#""client_uuid":"c{n}","name":"lamp""#))).collect();
    let mut silent = server.connect();
    silent.put("k", "x");
    let listed = clients(&mut looks);
    assert_eq!(names(&listed), [None, Some("lamp"), Some("lamp"), None]);
    let uuids: Vec<_> = listed.iter().map(|client| client["client_uuid"].as_str()).collect();
    assert_eq!(uuids, [Some("c0"), Some("c1"), Some("c2"), None]);
    for (client, conn) in listed.iter().zip([&looks, &lamps[0], &lamps[1], &silent]) {
        assert_eq!(client["peer"], conn.stream().local_addr().unwrap().to_string());
        assert!(client["since_ms"].is_u64(), "{client}");
    }
    drop((lamps, silent));
    eventually("they are gone", || clients(&mut looks).len() == 1);
}

#[test]
fn what_a_client_has_is_counted() {
    let server = TestServer::start();
    let (mut looks, mut conn) = (connect(&server, r#""name":"first""#), connect(&server, r#""client_uuid":"c1""#));
    let mut counts = |expected: u64| {
        eventually("the subscriptions are counted", || clients(&mut looks)[1]["subscriptions"] == expected);
    };
    for key in ["a", "b", "a.*"] {
        assert_eq!(conn.ask(&format!(r#"{{"type":"Subscribe","key":"{key}"}}"#)), "\"Hello\"");
    }
    counts(3);
    conn.send(r#"{"type":"Subscribe","key":"a"}"#).send(r#"{"type":"Unsubscribe","key":"b"}"#);
    counts(2);
    let mut other = connect(&server, r#""client_uuid":"c1""#);
    assert_eq!(other.ask(r#"{"type":"Subscribe","key":"a.*"}"#), "\"Hello\"");
    counts(1);
}

#[test]
fn a_trace_shows_names_to_those_who_asked_for_them_alone() {
    let server = TestServer::start();
    let mut named = connect(&server, r#""client_uuid":"c1","name":"lamp é""#);
    assert_eq!(named.ask(r#"{"type":"Subscribe","key":"a"}"#), "\"Hello\"");
    // A later Connect without a name leaves it as it was.
    assert!(named.ask(r#"{"type":"Connect","features":["names"]}"#).contains("200"));
    let trace = r#"{"type":"Trace","key":"a.b"}"#;
    let mut plain = server.connect();
    let shown: Value = serde_json::from_str(&plain.ask(trace)).unwrap();
    let fields: Vec<_> = shown["Trace"]["subscribers"][0].as_object().unwrap().keys().cloned().collect();
    assert_eq!(fields, ["client_uuid", "pattern", "queued", "since_ms", "skipped"]);
    assert!(plain.ask(r#"{"type":"Trace"}"#).contains("missing field 'key'"));

    named.send(trace);
    let shown = named.json();
    let subscriber = &shown["Trace"]["subscribers"][0];
    assert_eq!((subscriber["name"].as_str(), subscriber["client_uuid"].as_str()), (Some("lamp é"), Some("c1")));
    assert_eq!(subscriber["peer"], named.stream().local_addr().unwrap().to_string());

    // One that did not name the feature has no name.
    plain.ask(r#"{"type":"Connect","name":"ignored"}"#);
    assert_eq!(names(&clients(&mut named)), [Some("lamp é"), None]);
}

#[test]
fn a_client_on_a_unix_socket_is_listed_as_such() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let address = format!("unix:{}", path.display()).parse().unwrap();
    let server = TestServer::with(|builder| builder.listen(address));
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"{\"type\":\"Connect\",\"features\":[\"names\"]}\n{\"type\":\"Trace\"}\n").unwrap();
    let lines: Vec<String> = BufReader::new(stream).lines().take(2).map(Result::unwrap).collect();
    assert!(lines[1].contains(r#""clients":[{"peer":"unix","client_uuid":"anonymous-"#), "{}", lines[1]);
    drop(server);
}
