//! NATS: the real server, other nodes, and peers that send what they should not.

#![allow(clippy::unwrap_used, reason = "a helper of a test fails like a test")]

mod support;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use futures_util::StreamExt;
use nkv_discovery::{ADDRESSES_MAX, Discovery, DiscoveryErrorKind, Found, Nats, NatsSpec, Spec};
use support::{PATIENCE, free_port, own, program};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

const SUBJECT: &str = "nkv.test";

struct Server {
    program: PathBuf,
    process: Child,
    port: u16,
    options: Vec<String>,
}

impl Server {
    async fn start(options: &[&str]) -> Option<Self> {
        let program = program("NKV_NATS_SERVER", "nats-server")?;
        let port = free_port();
        let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        let process = run(&program, port, &options).await;
        Some(Server { program, process, port, options })
    }

    async fn stop(&mut self) {
        self.process.kill().await.unwrap();
    }

    async fn start_again(&mut self) {
        self.process = run(&self.program, self.port, &self.options).await;
    }

    fn spec(&self) -> NatsSpec {
        let text = format!("nats://127.0.0.1:{}/{SUBJECT}?timeout=700ms&reconnect_wait=50ms", self.port);
        match text.parse::<Spec>().unwrap() {
            Spec::Nats(spec) => spec,
            other => panic!("{other}"),
        }
    }

    async fn node(&self, own: &str) -> (Nats, SocketAddr) {
        Server::node_of(self.spec(), own).await
    }

    /// One that waits longer for answers: they come from the test, which may be slow.
    async fn patient_node(&self, own: &str) -> (Nats, SocketAddr) {
        let mut spec = self.spec();
        spec.timeout = Duration::from_secs(3);
        Server::node_of(spec, own).await
    }

    async fn node_of(spec: NatsSpec, own: &str) -> (Nats, SocketAddr) {
        let (nats, own) = (Nats::new(spec).unwrap(), own.parse().unwrap());
        timeout(PATIENCE, nats.register(own)).await.expect("an end").unwrap();
        (nats, own)
    }

    async fn client(&self) -> async_nats::Client {
        async_nats::connect(format!("127.0.0.1:{}", self.port)).await.unwrap()
    }
}

async fn run(program: &PathBuf, port: u16, options: &[String]) -> Child {
    let process = Command::new(program)
        .args(["--addr", "127.0.0.1", "--port", &port.to_string()])
        .args(options)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("nats-server starts");
    timeout(PATIENCE, async {
        while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("nats-server listens");
    process
}

async fn find(nats: &Nats, own: SocketAddr) -> Result<Found, nkv_discovery::DiscoveryError> {
    timeout(PATIENCE, nats.find(own)).await.expect("an end")
}

fn sorted(found: &Found) -> Vec<String> {
    let mut addresses: Vec<String> = found.addresses().iter().map(ToString::to_string).collect();
    addresses.sort();
    addresses
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_find_each_other_and_not_themselves() {
    let Some(server) = Server::start(&[]).await else { return };
    let (first, own_first) = server.node("127.0.0.1:7001").await;
    assert_eq!(find(&first, own_first).await, Ok(Found::new()), "none but this one");
    let (second, own_second) = server.node("127.0.0.1:7002").await;
    let (third, own_third) = server.node("[::1]:7003").await;
    assert_eq!(sorted(&find(&first, own_first).await.unwrap()), ["127.0.0.1:7002", "[::1]:7003"]);
    assert_eq!(sorted(&find(&third, own_third).await.unwrap()), ["127.0.0.1:7001", "127.0.0.1:7002"]);
    // One leaves, one is gone without a word.
    second.deregister(own_second).await.unwrap();
    drop(third);
    timeout(PATIENCE, async { while find(&first, own_first).await != Ok(Found::new()) {} })
        .await
        .expect("all are gone");
}

/// As another program of the exchange sees it, byte for byte.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_exchange_is_that_of_go_kv() {
    let Some(server) = Server::start(&[]).await else { return };
    let client = server.client().await;
    let mut subject = client.subscribe(SUBJECT).await.unwrap();
    client.flush().await.unwrap();
    let (nats, own) = server.patient_node("10.0.0.1:3322").await;
    let me = b"\x0a\x0810.0.0.1\x10\xfa\x19\x1a\x0d10.0.0.1:3322".as_slice();

    // Asked, it answers to the inbox. What has no inbox, or is no request, is answered by none.
    client.publish(SUBJECT, b"\x20\x02".as_slice().into()).await.unwrap();
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(inbox.clone()).await.unwrap();
    for message in [b"\x20\x03".as_slice(), b"", b"\xff", b"\x0a\x01h\x10\x07\x1a\x03h:7\x20\x02"] {
        client.publish_with_reply(SUBJECT, inbox.clone(), message.into()).await.unwrap();
    }
    let answer = timeout(PATIENCE, answers.next()).await.expect("an answer").unwrap();
    assert_eq!(answer.payload, [me, b"\x20\x03"].concat());
    assert!(timeout(Duration::from_millis(300), answers.next()).await.is_err(), "one answer to one request");
    for _ in 0..5 {
        timeout(PATIENCE, subject.next()).await.expect("a message").unwrap();
    }

    // It asks with a request whose reply is an inbox; a peer of Go-KV answers, twice, and with what else it sends.
    let asks = tokio::spawn(async move {
        let found = find(&nats, own).await;
        (nats, found)
    });
    let request = timeout(PATIENCE, subject.next()).await.expect("a request").unwrap();
    assert_eq!(request.payload, [me, b"\x20\x02"].concat());
    let reply = request.reply.expect("an inbox");
    let peer = b"\x0a\x0810.0.0.2\x10\xfa\x19\x1a\x0d10.0.0.2:3322\x20\x03".as_slice();
    let request = b"\x0a\x0810.0.0.9\x10\x07\x20\x02".as_slice();
    let rubbish =
        [b"\xff\xff".as_slice(), b"", &[0; 4_096], b"\x0a\x01 \x10\x07\x20\x03", b"\x0a\x01h\x20\x03", request];
    for message in rubbish.into_iter().chain([peer, peer]) {
        client.publish(reply.clone(), message.to_vec().into()).await.unwrap();
    }
    let (nats, found) = asks.await.unwrap();
    let found = found.unwrap();
    assert_eq!(sorted(&found), ["10.0.0.2:3322"]);
    assert_eq!(found.unusable().len(), rubbish.len(), "{found:?}");

    // It says that it leaves, and answers no more.
    nats.deregister(own).await.unwrap();
    let leaves = timeout(PATIENCE, subject.next()).await.expect("a word").unwrap();
    assert_eq!((leaves.payload, leaves.reply), ([me, b"\x20\x01"].concat().into(), None));
    client.publish_with_reply(SUBJECT, inbox, b"\x20\x02".as_slice().into()).await.unwrap();
    assert!(timeout(Duration::from_millis(300), answers.next()).await.is_err(), "no answer after that");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rubbish_alone_and_too_many_answers_are_neither_none_nor_without_bound() {
    let Some(server) = Server::start(&[]).await else { return };
    let (client, (nats, own)) = (server.client().await, server.patient_node("127.0.0.1:7001").await);
    let mut subject = client.subscribe(SUBJECT).await.unwrap();
    client.flush().await.unwrap();
    for many in [false, true] {
        let asks = async { find(&nats, own).await };
        let answers = async {
            let request = timeout(PATIENCE, subject.next()).await.expect("a request").unwrap();
            let reply = request.reply.expect("an inbox");
            for n in 0..if many { 3_000_u32 } else { 1 } {
                // A host that is none, or one of many.
                let host = if many { format!("10.9.{}.{}", n / 200, n % 200 + 1) } else { "no host".into() };
                let host = host.as_bytes();
                let message = [&[0x0a, u8::try_from(host.len()).unwrap()], host, b"\x10\x07\x20\x03"].concat();
                client.publish(reply.clone(), message.into()).await.unwrap();
            }
            client.flush().await.unwrap();
        };
        let (found, ()) = tokio::join!(asks, answers);
        if many {
            let found = found.unwrap();
            let (kept, remarks) = (found.addresses().len(), found.unusable().len());
            assert!(kept > 0 && kept <= ADDRESSES_MAX && remarks <= ADDRESSES_MAX, "{kept} {remarks}");
            assert!(remarks > 0, "that some are left out is said");
        } else {
            assert_eq!(found.unwrap_err().kind(), DiscoveryErrorKind::Unusable);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_goes_is_an_error_until_it_is_back() {
    let Some(mut server) = Server::start(&[]).await else { return };
    let (first, own_first) = server.node("127.0.0.1:7001").await;
    let (_second, _) = server.node("127.0.0.1:7002").await;
    assert_eq!(sorted(&find(&first, own_first).await.unwrap()), ["127.0.0.1:7002"]);
    server.stop().await;
    let error = find(&first, own_first).await.unwrap_err();
    assert_eq!(error.kind(), DiscoveryErrorKind::Unreachable, "{error}");
    server.start_again().await;
    // Both connect again by themselves, and are subscribed as before.
    timeout(PATIENCE, async {
        loop {
            match find(&first, own_first).await {
                Ok(found) if sorted(&found) == ["127.0.0.1:7002"] => break,
                _ => sleep(Duration::from_millis(50)).await,
            }
        }
    })
    .await
    .expect("they find each other again");
}

#[tokio::test]
async fn it_is_tried_as_often_as_was_said_and_then_an_error() {
    // Nothing listens there.
    let text = format!("nats://127.0.0.1:{}/s?timeout=200ms&max_join_attempts=3&reconnect_wait=100ms", free_port());
    let provider = text.parse::<Spec>().unwrap().provider().unwrap();
    let start = Instant::now();
    let error = timeout(PATIENCE, provider.find(own())).await.expect("an end").unwrap_err();
    assert_eq!(error.kind(), DiscoveryErrorKind::Unreachable, "{error}");
    assert!(start.elapsed() >= Duration::from_millis(200), "it waits twice between three attempts");

    // What listens there says nothing, or is no NATS; each connection is an attempt.
    for says in [None, Some("HTTP/1.1 400 Bad Request\r\n\r\n")] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let counting = tokio::spawn(async move {
            let mut open = Vec::new();
            while let Ok(Ok((mut stream, _))) = timeout(Duration::from_secs(2), listener.accept()).await {
                if let Some(says) = says {
                    stream.write_all(says.as_bytes()).await.unwrap();
                }
                open.push(stream);
            }
            open.len()
        });
        let text = format!("nats://127.0.0.1:{port}/s?timeout=200ms&max_join_attempts=3&reconnect_wait=10ms");
        let provider = text.parse::<Spec>().unwrap().provider().unwrap();
        let error = timeout(PATIENCE, provider.find(own())).await.expect("an end").unwrap_err();
        assert_eq!(error.kind(), DiscoveryErrorKind::Unreachable, "{error}");
        assert_eq!(counting.await.unwrap(), 3, "{says:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_not_is_refused_and_with_a_password_may() {
    let Some(server) = Server::start(&["--user", "nkv", "--pass", "s3c:ret"]).await else { return };
    let error =
        timeout(PATIENCE, Nats::new(server.spec()).unwrap().register(own())).await.expect("an end").unwrap_err();
    assert_eq!(error.kind(), DiscoveryErrorKind::Refused, "{error}");
    let mut spec = server.spec();
    spec.server = format!("nkv:s3c%3Aret@{}", spec.server);
    let nats = Nats::new(spec).unwrap();
    assert_eq!(find(&nats, own()).await, Ok(Found::new()));
    assert!(!format!("{nats:?}").contains("s3c"));
}

/// Not even one's own answer arrives: the account may not publish on the subject.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exchange_that_is_silent_is_an_error_and_not_none() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("nats.conf");
    let rights = format!("permissions: {{publish: {{deny: [\"{SUBJECT}\"]}}}}");
    std::fs::write(&config, format!("authorization {{users: [{{user: nkv, password: pass, {rights}}}]}}")).unwrap();
    let Some(server) = Server::start(&["--config", config.to_str().unwrap()]).await else { return };
    let mut spec = server.spec();
    spec.server = format!("nkv:pass@{}", spec.server);
    let nats = Nats::new(spec).unwrap();
    timeout(PATIENCE, nats.register(own())).await.expect("an end").unwrap();
    let error = find(&nats, own()).await.unwrap_err();
    assert_eq!(error.kind(), DiscoveryErrorKind::Unreachable);
    assert!(error.to_string().contains("not even the own one"), "{error}");
}
