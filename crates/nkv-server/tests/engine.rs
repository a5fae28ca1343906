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
