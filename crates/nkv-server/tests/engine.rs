//! A server whose truth lies in an engine.

#![allow(clippy::unwrap_used)]

mod support;

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
fn clients_of_two_servers_see_one_keyspace_and_are_told_when_its_engine_is_out_of_reach() {
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
