//! The client that `docs/talk-nkv-from-any-language.md` shows, run against a server. Without python3 these tests say that
//! they are skipped, and fail where `NKV_PYTHON=1` says that they must run.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use support::TestServer;

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs")
}

/// Runs a script where it finds the client, and expects `ok` of it.
fn run_python(script: &str) {
    // Whatever it waits for, it ends.
    let script = format!("import signal; signal.alarm(60)\n{script}");
    let mut command = Command::new("python3");
    command.args(["-c", &script]).env("PYTHONPATH", docs().join("clients")).env("PYTHONDONTWRITEBYTECODE", "1");
    match command.output() {
        Ok(run) => {
            assert!(run.status.success(), "{} {}", run.status, String::from_utf8_lossy(&run.stderr));
            assert_eq!(String::from_utf8_lossy(&run.stdout), "ok\n");
        }
        Err(error) => {
            assert!(std::env::var_os("NKV_PYTHON").is_none(), "NKV_PYTHON is set, and python3 cannot run: {error}");
            println!("SKIPPED: no python3: {error}");
        }
    }
}

#[test]
fn a_client_in_python_does_what_the_guide_says() {
    let client = docs().join("clients/nkv.py");
    let guide = std::fs::read_to_string(docs().join("talk-nkv-from-any-language.md")).unwrap();
    assert!(guide.contains(&std::fs::read_to_string(&client).unwrap()), "the guide shows another client");

    let server = TestServer::start();
    let (host, port) = server.addr.rsplit_once(':').unwrap();
    run_python(&format!(
        "import runpy, sys\nsys.argv = {:?}\nrunpy.run_path({client:?}, run_name='__main__')",
        ["", host, port]
    ));
}

/// Runs a script with two clients of a server, `nkv` and `other`.
fn run(script: &str) {
    let server = TestServer::start();
    let (host, port) = server.addr.rsplit_once(':').unwrap();
    let clients = format!("import nkv as client\nnkv, other = (client.Nkv('{host}', {port}) for _ in range(2))");
    run_python(&format!("{clients}\n{script}"));
}

/// A client took the revision of a notification for that of its put, and then the answer to the put for that to a get.
#[test]
fn a_notification_is_never_taken_for_an_answer() {
    run(r#"
nkv.put("a.x", b"1")
events = nkv.subscribe("a")
for n in range(100):
    value = b"%d" % n
    there = other.put("a.x", value)
    here = nkv.put("b.x", value)
    assert here == there + 1, (here, there)
    assert nkv.get("b.x") == value and nkv.get("a.x") == value and nkv.get("c") is None
last = 0
for kind, body, value in events:
    if kind == "Update":
        assert body["key"] == "a.x" and body["revision"] > last, body
        last = body["revision"]
    if value == b"99":
        break
print("ok")
"#);
}

#[test]
fn a_wildcard_gives_pairs_and_a_key_gives_its_value() {
    run(r#"
assert nkv.get("a.*") == [] and nkv.get("a") is None
for key, value in ("a", b"0"), ("a.x", b"one"), ("a.y", b""), ("a.z", b"\n{}\n"):
    nkv.put(key, value)
assert nkv.get("a.*") == [("a.x", b"one"), ("a.y", b""), ("a.z", b"\n{}\n")]
assert nkv.get("*") == [("a", b"0")] + nkv.get("a.*")
assert nkv.get("a") == b"0" and nkv.get("a.y") == b""
print("ok")
"#);
}

#[test]
fn each_subscription_of_an_object_gets_its_own_and_overlapping_ones_are_refused() {
    run(r#"
for key in "a", "a.x", "b.x":
    other.put(key, key.encode())
a, b = nkv.subscribe("a"), nkv.subscribe("b.*")
for pattern in "*", "a.*", "a.x", "b", "b.x.*":
    try:
        nkv.subscribe(pattern)
    except ValueError:
        continue
    raise AssertionError(pattern)
nkv.subscribe("ab")
other.put("b.y", b"new")
other.delete("a.x")
def keys(events, count):
    return [(kind, body["key"]) for _, (kind, body, _) in zip(range(count), events)]
assert keys(b, 3) == [("Update", "b.x"), ("Synced", "b.*"), ("Update", "b.y")]
assert keys(a, 4) == [("Update", "a"), ("Update", "a.x"), ("Synced", "a"), ("Close", "a.x")]

# The same pattern again takes the place of the first, whose iterator ends.
again = nkv.subscribe("a")
assert [(kind, body.get("reason")) for kind, body, _ in a] == [("Close", "replaced")]
assert keys(again, 2) == [("Update", "a"), ("Synced", "a")]
nkv.unsubscribe("a")
assert [body["reason"] for _, body, _ in again] == ["unsubscribed"]
nkv.unsubscribe("b.*")
nkv.unsubscribe("ab")
nkv.subscribe("*")
print("ok")
"#);
}

#[test]
fn an_error_is_raised_and_the_next_request_has_its_own_answer() {
    run(r#"
def refused(status, ask, *arguments, **options):
    try:
        ask(*arguments, **options)
    except RuntimeError as error:
        assert str(error).startswith(status), error
    else:
        raise AssertionError(status)
refused("400", nkv.put, "a..b", b"x")
refused("413", nkv.put, "a", b"x" * (2 << 20))
revision = nkv.put("a", b"1", if_revision=0)
refused("409", nkv.put, "a", b"2", if_revision=revision + 1)
assert nkv.get("a") == b"1" and nkv.delete("a") == 1
print("ok")
"#);
}

/// Answers each request by what it was given for it, and then closes the connection.
fn scripted(answers: &'static [&'static str]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut requests = BufReader::new(stream.try_clone().unwrap()).lines();
        for (n, answer) in answers.iter().enumerate() {
            // Lines between are payloads.
            let request = requests.by_ref().map(Result::unwrap).find(|line| line.starts_with('{')).unwrap();
            let id = format!("\"id\": {}", n + 1);
            assert!(request.contains(&id), "{request}");
            (&stream).write_all(answer.replace("ID", &(n + 1).to_string()).as_bytes()).unwrap();
        }
    });
    port.to_string()
}

const GREETING: &str = "{\"Base\":{\"id\":ID,\"status\":200,\"message\":\"No Error\"}}\n";

fn run_scripted(answers: &'static [&'static str], script: &str) {
    let port = scripted(answers);
    run_python(&format!("import nkv as client\nnkv = client.Nkv('127.0.0.1', {port})\n{script}"));
}

#[test]
fn what_a_later_server_may_send_is_skipped() {
    run_scripted(
        &[
            GREETING,
            "\"Hello\"\n{\"Update\":{\"key\":\"a\",\"revision\":1,\"len\":1,\"later\":{}}}\n1\n\"Later\"\n\
             {\"Later\":{\"key\":\"a\",\"len\":3}}\n{\"\n\n{\"Later\":7}\n{}\n[]\n\
             {\"Close\":{\"key\":\"a\",\"reason\":\"later\",\"revision\":2}}\n\
             {\"Synced\":{\"key\":\"a\",\"revision\":2,\"epoch\":\"e\"}}\n",
            "{\"Later\":{}}\n{\"Base\":{\"id\":ID,\"status\":200,\"message\":\"No Error\",\"revision\":3}}\n",
            "{\"Close\":{\"key\":\"a\",\"reason\":\"unsubscribed\"}}\n\
             {\"Base\":{\"id\":ID,\"status\":200,\"message\":\"No Error\"}}\n",
        ],
        r#"
events = nkv.subscribe("a")
assert nkv.put("b", b"") == 3
nkv.unsubscribe("a")
assert [(kind, value) for kind, _, value in events] == [("Update", b"1"), ("Synced", b""), ("Close", b"")]
print("ok")
"#,
    );
}

#[test]
fn a_message_that_is_cut_short_is_an_error_and_closes_the_client() {
    for end in ["", "{\"Get\"", "{\"Get\":{\"id\":ID,\"status\":200,\"lens\":[9],\"len\":9,\"keys\":[\"a\"]}}\nfour\n"]
    {
        let answers: &'static [&'static str] = Box::leak(vec![GREETING, end].into_boxed_slice());
        run_scripted(
            answers,
            r#"
for error in ConnectionError, ValueError:
    try:
        value = nkv.get("a")
    except error:
        continue
    raise AssertionError(value)
print("ok")
"#,
        );
    }
    // An answer to nothing says why the server closes the connection.
    run_scripted(
        &[GREETING, "{\"Base\":{\"id\":\"\",\"status\":503,\"message\":\"too much\"}}\n"],
        r#"
try:
    nkv.put("a", b"")
except ConnectionError as error:
    assert "too much" in str(error)
    print("ok")
"#,
    );
}
