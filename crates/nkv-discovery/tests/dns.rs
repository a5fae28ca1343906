//! DNS, asked of dnsmasq; and of a socket that answers as no good server does.

#![allow(clippy::unwrap_used, reason = "a helper of a test fails like a test")]

mod support;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use nkv_discovery::{ADDRESSES_MAX, Discovery, DiscoveryErrorKind, Dns, Found};
use support::{PATIENCE, free_port, own, program};
use tempfile::TempDir;
use tokio::net::UdpSocket;
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

/// Has the zone `test`, from a file like `/etc/hosts` and from options; refuses all other names.
struct Dnsmasq {
    process: Child,
    hosts: PathBuf,
    address: SocketAddr,
    _dir: TempDir,
}

impl Dnsmasq {
    async fn start(hosts: &str, options: &[&str]) -> Option<Self> {
        let program = program("NKV_DNSMASQ", "dnsmasq")?;
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("hosts");
        std::fs::write(&file, hosts).unwrap();
        let port = free_port();
        let process = Command::new(program)
            .args(["--keep-in-foreground", "--no-resolv", "--no-hosts", "--conf-file=/dev/null", "--bind-interfaces"])
            .args(["--listen-address=127.0.0.1", "--local=/test/", "--user=", "--group=", "--pid-file="])
            .args([format!("--port={port}"), format!("--addn-hosts={}", file.display())])
            .args(options)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("dnsmasq starts");
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let dnsmasq = Dnsmasq { process, hosts: file, address, _dir: dir };
        timeout(PATIENCE, async {
            while dnsmasq.addresses("up.test").find(own()).await.is_err() {
                sleep(Duration::from_millis(20)).await;
            }
        })
        .await
        .expect("dnsmasq answers");
        Some(dnsmasq)
    }

    fn addresses(&self, name: &str) -> Dns {
        Dns::addresses(name, None, false).with_servers(vec![self.address])
    }

    fn services(&self, name: &str) -> Dns {
        Dns::services(name).with_servers(vec![self.address])
    }

    /// Gives it other hosts.
    async fn change(&self, hosts: &str) {
        std::fs::write(&self.hosts, hosts).unwrap();
        let id = self.process.id().expect("it runs").to_string();
        assert!(Command::new("kill").args(["-HUP", &id]).status().await.unwrap().success());
    }
}

fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
    let mut addresses: Vec<SocketAddr> = texts.iter().map(|text| text.parse().unwrap()).collect();
    addresses.sort();
    addresses
}

fn sorted(found: &Found) -> Vec<SocketAddr> {
    let mut addresses = found.addresses().to_vec();
    addresses.sort();
    addresses
}

#[tokio::test]
async fn addresses_of_both_kinds_have_the_port_that_was_named_or_ones_own() {
    let hosts = "10.0.0.1 both.test\n10.0.0.2 both.test\nfd00::1 both.test\n10.0.0.3 four.test\n";
    let Some(dns) = Dnsmasq::start(hosts, &[]).await else { return };
    let found = dns.addresses("both.test").find(own()).await.unwrap();
    assert_eq!(sorted(&found), addresses(&["10.0.0.1:7000", "10.0.0.2:7000", "[fd00::1]:7000"]));
    assert!(found.unusable().is_empty(), "{found:?}");
    let port = Dns::addresses("both.test", Some(9), true).with_servers(vec![dns.address]);
    assert_eq!(sorted(&port.find(own()).await.unwrap()), addresses(&["[fd00::1]:9"]), "AAAA alone");
    let four = dns.addresses("four.test").find(own()).await.unwrap();
    assert_eq!((sorted(&four), four.unusable().len()), (addresses(&["10.0.0.3:7000"]), 0));
    let none = Dns::addresses("four.test", None, true).with_servers(vec![dns.address]);
    assert_eq!(none.find(own()).await, Ok(Found::new()), "no AAAA is an answer");
}

#[tokio::test]
async fn a_service_has_targets_with_ports() {
    let hosts = "10.0.0.1 n1.test\n10.0.0.2 n2.test\nfd00::2 n2.test\n";
    let options = [
        "--srv-host=_gossip._tcp.test,n1.test,7001",
        "--srv-host=_gossip._tcp.test,n2.test,7002",
        "--srv-host=_half._tcp.test,n1.test,7001",
        "--srv-host=_half._tcp.test,gone.test,7002",
        "--srv-host=_rubbish._tcp.test,gone.test,7002",
        "--srv-host=_not._tcp.test",
    ];
    let Some(dns) = Dnsmasq::start(hosts, &options).await else { return };
    let found = dns.services("_gossip._tcp.test").find(own()).await.unwrap();
    assert_eq!(sorted(&found), addresses(&["10.0.0.1:7001", "10.0.0.2:7002", "[fd00::2]:7002"]));
    let half = dns.services("_half._tcp.test").find(own()).await.unwrap();
    assert_eq!((sorted(&half), half.unusable().len()), (addresses(&["10.0.0.1:7001"]), 1));
    assert!(half.unusable()[0].starts_with("gone.test. has no address"), "{half:?}");
    let error = dns.services("_rubbish._tcp.test").find(own()).await.unwrap_err();
    assert_eq!(error.kind(), DiscoveryErrorKind::Unusable, "{error}");
    for none in ["_not._tcp.test", "_absent._tcp.test"] {
        assert_eq!(dns.services(none).find(own()).await, Ok(Found::new()), "{none}");
    }
}

#[tokio::test]
async fn an_answer_that_changes_is_seen_at_once_and_all_gone_is_none() {
    let Some(dns) = Dnsmasq::start("10.0.0.1 nkv.test\n", &["--local-ttl=3600"]).await else { return };
    let discovery = dns.addresses("nkv.test");
    assert_eq!(sorted(&discovery.find(own()).await.unwrap()), addresses(&["10.0.0.1:7000"]));
    for (hosts, expected) in
        [("10.0.0.2 nkv.test\n10.0.0.3 nkv.test\n", &["10.0.0.2:7000", "10.0.0.3:7000"][..]), ("", &[])]
    {
        dns.change(hosts).await;
        // The signal takes its time; a time to live of an hour does not count.
        timeout(PATIENCE, async {
            while sorted(&discovery.find(own()).await.unwrap()) != addresses(expected) {
                sleep(Duration::from_millis(20)).await;
            }
        })
        .await
        .unwrap_or_else(|_| panic!("the new answer is {expected:?}"));
    }
    // And it may come back.
    dns.change("10.0.0.4 nkv.test\n").await;
    timeout(PATIENCE, async {
        while sorted(&discovery.find(own()).await.unwrap()).is_empty() {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("a node is back");
}

#[tokio::test]
async fn too_many_addresses_come_by_tcp_and_are_bounded() {
    let hosts: String = (0..1_100).map(|n| format!("10.1.{}.{} many.test\n", n / 200, n % 200 + 1)).collect();
    let Some(dns) = Dnsmasq::start(&hosts, &[]).await else { return };
    let found = dns.addresses("many.test").find(own()).await.unwrap();
    assert_eq!((found.addresses().len(), found.left_out()), (ADDRESSES_MAX, 1_100 - ADDRESSES_MAX));
}

#[tokio::test]
async fn a_name_that_does_not_exist_is_an_answer_and_a_refusal_is_none() {
    let Some(dns) = Dnsmasq::start("", &[]).await else { return };
    assert_eq!(dns.addresses("absent.test").find(own()).await, Ok(Found::new()));
    // No zone of this server.
    for refused in [dns.addresses("nkv.example"), dns.services("_a._tcp.nkv.example")] {
        let error = refused.find(own()).await.unwrap_err();
        assert_eq!(error.kind(), DiscoveryErrorKind::Unreachable, "{error}");
        assert!(error.to_string().contains("nkv.example"), "{error}");
    }
}

/// Answers each question with what `answer` makes of it.
async fn odd_server(answer: impl Fn(&[u8]) -> Option<Vec<u8>> + Send + 'static) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut bytes = [0; 4_096];
        while let Ok((len, peer)) = socket.recv_from(&mut bytes).await {
            if let Some(answer) = answer(&bytes[..len]) {
                socket.send_to(&answer, peer).await.unwrap();
            }
        }
    });
    address
}

/// The question as an answer with this code.
fn with_code(question: &[u8], code: u8) -> Vec<u8> {
    let mut answer = question.to_vec();
    answer[2] |= 0x80;
    answer[3] = 0x80 | code;
    answer
}

/// The type of a question: what is behind the name.
fn asks_for(question: &[u8]) -> u8 {
    let end = 12 + question[12..].iter().position(|byte| *byte == 0).unwrap();
    question[end + 2]
}

#[tokio::test]
async fn a_server_that_fails_or_is_silent_or_talks_rubbish_is_an_error_and_never_none() {
    let fails = odd_server(|question| Some(with_code(question, 2))).await;
    let is_silent = odd_server(|_| None).await;
    let rubbish = odd_server(|question| Some([&question[..2], &[0xff; 40]].concat())).await;
    let tasks = [("fails", fails), ("is silent", is_silent), ("talks rubbish", rubbish)].map(|(what, address)| {
        tokio::spawn(async move {
            for dns in [Dns::addresses("nkv.test", None, false), Dns::services("_a._tcp.nkv.test")] {
                let found = timeout(PATIENCE, dns.with_servers(vec![address]).find(own())).await.expect("an end");
                let error = found.expect_err(what);
                assert_eq!(error.kind(), DiscoveryErrorKind::Unreachable, "{what}: {error}");
            }
        })
    });
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test]
async fn a_failure_of_one_kind_does_not_hide_the_other() {
    // One A record; AAAA fails.
    let address = odd_server(|question| {
        if asks_for(question) != 1 {
            return Some(with_code(question, 2));
        }
        let end = 12 + question[12..].iter().position(|byte| *byte == 0).unwrap() + 5;
        let mut answer = with_code(&question[..end], 0);
        answer[6..12].copy_from_slice(&[0, 1, 0, 0, 0, 0]);
        answer.extend_from_slice(b"\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04\x0a\0\0\x01");
        Some(answer)
    })
    .await;
    let found = Dns::addresses("nkv.test", None, false).with_servers(vec![address]).find(own()).await.unwrap();
    assert_eq!(found.addresses(), addresses(&["10.0.0.1:7000"]));
    assert!(found.unusable().len() == 1 && found.unusable()[0].starts_with("AAAA"), "{found:?}");
}
