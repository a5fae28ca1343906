//! The client that `docs/talk-nkv-from-any-language.md` shows, run against a server.

#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::Command;

use support::TestServer;

#[test]
fn a_client_in_python_does_what_the_guide_says() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let client = docs.join("clients/nkv.py");
    let guide = std::fs::read_to_string(docs.join("talk-nkv-from-any-language.md")).unwrap();
    assert!(guide.contains(&std::fs::read_to_string(&client).unwrap()), "the guide shows another client");

    let server = TestServer::start();
    let (host, port) = server.addr.rsplit_once(':').unwrap();
    let run = Command::new("python3").arg(&client).args([host, port]).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    assert_eq!(run.stdout, b"ok\n");
}
