//! A server whose truth lies in an engine.

#![allow(clippy::unwrap_used)]

mod support;

use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nkv_client::blocking::Client;
use nkv_client::{ConnectionState, Event};
use nkv_testkit::engine::ScriptedEngine;
use support::{TestServer, eventually, status};

fn ask(server: &TestServer, request: &str) -> u64 {
    status(&server.connect().ask(request))
}

const HEALTH: &str = r#"{"type":"Health"}"#;
const GET: &str = r#"{"type":"Get","key":"a"}"#;

fn put(value: &str) -> String {
    format!(r#"{{"type":"Put","key":"a","value":"{value}"}}"#)
}

#[test]
fn clients_of_two_servers_see_one_keyspace_and_are_notified_when_its_engine_is_out_of_reach() {
    let engine = ScriptedEngine::default();
    engine.cut(true);
    let servers = [engine.clone(), engine.clone()]
        .map(|engine| TestServer::with(|builder| builder.node(|node| node.engine(engine))));
    let [first, second] = &servers;
    // Not: that there is no such key.
    assert_eq!((ask(first, GET), ask(first, HEALTH), ask(first, &put("0"))), (503, 503, 503));
    engine.cut(false);
    eventually("both follow", || servers.iter().all(|server| ask(server, HEALTH) == 200));

    let mut subscriber = second.connect();
    assert_eq!(subscriber.ask(r#"{"type":"Subscribe","key":"a"}"#), "\"Hello\"");
    let mut writer = first.connect();
    for value in ["1", "2", "3"] {
        writer.send(put(value));
    }
    (0..3).for_each(|_| assert_eq!(status(&writer.line()), 200));
    assert!(writer.ask(GET).contains("\"revisions\":[3]"), "a client does not see its own write");
    eventually("the other server has it", || second.connect().ask(GET).contains("\"revisions\":[3]"));
    assert!(subscriber.line().contains("Update"));

    engine.cut(true);
    eventually("it is noticed", || ask(first, HEALTH) == 503);
    assert_eq!(ask(first, &put("4")), 503);
    assert!(first.connect().ask(GET).contains("\"revisions\":[3]"), "reads do not go on");
}

#[test]
fn clients_are_told_that_their_server_is_stale_and_since_when() {
    let engine = ScriptedEngine::default();
    let server = TestServer::with(|builder| builder.node(|node| node.engine(engine.clone())));
    eventually("it follows", || ask(&server, HEALTH) == 200);
    let client = Client::connect(&server.addr).unwrap();
    client.put("a", "1").unwrap();
    assert_eq!(client.state(), ConnectionState::Connected);
    let mut plain = server.connect();
    let named = r#"{"type":"Connect","features":["stale"]}"#;
    assert!(server.connect().ask(named).contains("\"stale\""), "it is not offered");
    assert_eq!(status(&plain.ask(r#"{"type":"Connect"}"#)), 200);

    engine.cut(true);
    let since = || match client.state() {
        ConnectionState::Stale { since, .. } => Some(since),
        _ => None,
    };
    eventually("the client knows", || since().is_some());
    let known = since().unwrap();
    assert_eq!(client.get("a").unwrap().unwrap().value, "1");
    // One that comes later learns since when.
    std::thread::sleep(Duration::from_millis(60));
    let mut late = server.connect();
    assert_eq!(status(&late.ask(named)), 200);
    let told = late.line();
    let since_ms = told.strip_prefix(r#"{"Stale":{"since_ms":"#).and_then(|rest| rest.strip_suffix("}}"));
    assert!(since_ms.unwrap_or_else(|| panic!("{told}")).parse::<u64>().unwrap() >= 50, "{told}");

    engine.cut(false);
    assert_eq!(late.line(), r#"{"Stale":{}}"#);
    eventually("the client knows that it is over", || client.state() == ConnectionState::Connected);
    assert_eq!((since(), known.elapsed() < support::PATIENCE), (None, true));
    // One that did not ask is sent nothing of it: what comes next is an answer.
    assert_eq!(status(&plain.ask(HEALTH)), 200);
    // A write that the server has answered and not seen makes it stale too.
    engine.hold(true);
    client.put("a", "2").unwrap();
    eventually("the client knows again", || since().is_some());
    engine.hold(false);
    eventually("and that it is over", || since().is_none());
    assert_eq!(client.get("a").unwrap().unwrap().value, "2");
}

#[test]
fn a_client_that_knows_another_epoch_is_to_connect_again() {
    let engine = ScriptedEngine::default();
    let server = TestServer::with(|builder| builder.node(|node| node.engine(engine.clone())));
    eventually("it follows", || ask(&server, HEALTH) == 200);
    let mut writer = server.connect();
    assert_eq!(status(&writer.ask(r#"{"type":"Connect","client_uuid":"me"}"#)), 200);
    assert_eq!(status(&writer.ask(&put("1"))), 200);
    engine.begin_anew(nkv_core::Epoch::new(2));
    eventually("the server has nothing", || server.connect().ask(GET).contains("\"revisions\":[]"));
    // Its condition is on a revision of the epoch before.
    assert_eq!(status(&writer.ask(r#"{"type":"Put","key":"a","value":"2","if_revision":1}"#)), 503);
    assert!(server.connect().ask(GET).contains("\"revisions\":[]"), "it was done");
}

/// A name in front of several servers, which gives each connection to the one that is chosen by then.
fn balancer(chosen: Arc<Mutex<String>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for near in listener.incoming() {
            let near = near.unwrap();
            let target = chosen.lock().unwrap().clone();
            let Ok(far) = TcpStream::connect(target) else { continue };
            let copy = |mut from: TcpStream, mut to: TcpStream| {
                std::thread::spawn(move || {
                    drop(std::io::copy(&mut from, &mut to));
                    drop(to.shutdown(std::net::Shutdown::Both));
                })
            };
            copy(near.try_clone().unwrap(), far.try_clone().unwrap());
            copy(far, near);
        }
    });
    address.to_string()
}

/// A node that lags answers a client that comes from another one once it has what that has seen, and says so where no node has.
#[test]
fn a_client_that_moves_to_a_server_that_lags_sees_nothing_older_and_no_false_delete() {
    let engine = ScriptedEngine::default();
    let start = || TestServer::with(|builder| builder.node(|node| node.engine(engine.clone())));
    let (first, second) = (start(), start());
    eventually("both follow", || ask(&first, HEALTH) == 200 && ask(&second, HEALTH) == 200);
    let chosen = Arc::new(Mutex::new(first.addr.clone()));
    let client = Client::connect(&balancer(Arc::clone(&chosen))).unwrap();
    client.put("a", "1").unwrap();
    eventually("the other server has it", || second.connect().ask(GET).contains("\"revisions\":[1]"));
    let mut events = client.subscribe("*").unwrap();
    let mut next = || events.next_timeout(support::PATIENCE).unwrap().unwrap();
    while !matches!(next(), Event::Synced { .. }) {}

    // What is written from now on no server sees: it is answered all the same.
    engine.hold(true);
    client.put("b", "2").unwrap();
    *chosen.lock().unwrap() = second.addr.clone();
    drop(first);
    assert!(matches!(next(), Event::Reconnecting));
    std::thread::sleep(Duration::from_millis(300));
    assert!(matches!(client.state(), ConnectionState::Reconnecting), "a server that lags has taken it");
    engine.hold(false);
    let mut keys = Vec::new();
    loop {
        match next() {
            Event::Update { entry, .. } => keys.push(entry.key.to_string()),
            Event::Synced { .. } => break,
            Event::Gone { key, .. } => panic!("{key} was not deleted"),
            _ => {}
        }
    }
    assert_eq!(keys, ["b"]);

    let epoch = second.handle.epoch();
    let connect = |seen: &str| second.connect().ask(&format!(r#"{{"type":"Connect","seen":"{seen}"}}"#));
    assert!(!connect(&format!("{epoch}-2")).contains("begins_anew"));
    for unknown in [format!("{epoch}-3"), format!("{}-1", nkv_core::Epoch::new(7)), "2".into()] {
        assert!(connect(&unknown).contains(r#""begins_anew":true"#), "{unknown}");
    }
    engine.cut(true);
    eventually("it is noticed", || ask(&second, HEALTH) == 503);
    assert_eq!(status(&connect(&format!("{epoch}-3"))), 503);
    assert_eq!(status(&connect(&format!("{epoch}-2"))), 200);
}

/// A stream that keeps what is written until it is flushed, as one of TLS may.
#[test]
fn a_stream_that_keeps_what_it_is_given_is_flushed() {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, BufStream};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let node = nkv_node::Node::builder().start().await.unwrap();
        let (ours, theirs) = tokio::io::duplex(4_096);
        tokio::spawn(nkv_server::serve(BufStream::new(theirs), "a test", node.handle()));
        let (mut ours, mut line) = (BufReader::new(ours), String::new());
        ours.write_all(b"{\"type\":\"Health\"}\n").await.unwrap();
        let answered = tokio::time::timeout(support::PATIENCE, ours.read_line(&mut line)).await;
        answered.expect("the answer stays in the buffer").unwrap();
        assert_eq!(status(&line), 200);
    });
}
