//! What is refused, and why; users and TLS.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use common::{PATIENCE, Server, next, node};
use nkv_core::{Epoch, Op};
use nkv_engine_etcd::{EtcdEngine, Options};
use nkv_node::{Abilities, Decided, Engine, EngineError, Feed, Seen};
use tokio::sync::mpsc;
use tokio::time::timeout;

async fn refused(options: Options) -> String {
    match EtcdEngine::new(options).check().await {
        Err(error @ EngineError::Refused { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

/// Sends why it is not followed any more, each time.
#[derive(Debug)]
struct Observed(EtcdEngine, mpsc::UnboundedSender<EngineError>);

#[async_trait]
impl Engine for Observed {
    fn abilities(&self) -> Abilities {
        self.0.abilities()
    }

    async fn write(&self, epoch: Epoch, ops: Vec<Op>, together: bool) -> Result<Decided, EngineError> {
        self.0.write(epoch, ops, together).await
    }

    async fn follow(&self, seen: Option<Seen>, feed: Feed) -> EngineError {
        let error = self.0.follow(seen, feed).await;
        drop(self.1.send(error.clone()));
        error
    }

    async fn last(&self) -> Result<Seen, EngineError> {
        self.0.last().await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefix_within_another_is_refused() {
    let Some(server) = Server::start().await else { return };
    assert!(refused(server.options("app").with_create(false)).await.contains("'app'"), "nothing is made");
    assert_eq!(server.must(&["get", "", "--from-key"]), "");
    server.engine("app").check().await.unwrap();
    server.engine("app2").check().await.unwrap();
    EtcdEngine::new(server.options("app/").with_create(false)).check().await.unwrap();
    let message = refused(server.options("app/inner/deep")).await;
    assert!(message.contains("'app/inner/deep'") && message.contains("'app'"), "{message}");
    // The other way round it is seen when the state is read.
    server.engine("x/y").check().await.unwrap();
    let (sender, mut errors) = mpsc::unbounded_channel();
    let node = nkv_node::Node::builder().engine(Observed(server.engine("x"), sender)).start().await.unwrap();
    match timeout(PATIENCE, errors.recv()).await.expect("the engine is followed") {
        Some(EngineError::Refused { message, .. }) => assert!(message.contains("'x/y'"), "{message}"),
        other => panic!("{other:?}"),
    }
    assert!(node.handle().get("k").await.is_err(), "a node has a state that a nested prefix is part of");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_of_two_etcds_are_refused() {
    let Some(one) = Server::start().await else { return };
    let Some(other) = Server::start_with(&["--initial-cluster-token", "other"]).await else { return };
    let message = refused(Options::new([one.server(), other.server()], "app").unwrap()).await;
    assert!(message.contains(&one.server()) && message.contains(&other.server()), "{message}");
    assert_eq!(
        one.must(&["get", "", "--from-key"]) + &other.must(&["get", "", "--from-key"]),
        "",
        "nothing is written"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_has_its_own_prefix() {
    let Some(server) = Server::start_with(&["--auth-token-ttl", "2"]).await else { return };
    for args in [
        &["user", "add", "root:r"][..],
        &["user", "grant-role", "root", "root"],
        &["user", "add", "nkv:secret"],
        &["role", "add", "app"],
        &["role", "grant-permission", "app", "readwrite", "app/", "--prefix"],
        &["role", "grant-permission", "app", "readwrite", "outer/own/", "--prefix"],
        &["user", "grant-role", "nkv", "app"],
        &["auth", "enable"],
    ] {
        server.must(args);
    }
    let file = server.dir.path().join("password");
    std::fs::write(&file, "wrong\n").unwrap();
    let options = |prefix: &str| server.options(prefix).with_user("nkv", &file);
    let message = refused(options("app")).await;
    assert!(!message.contains("wrong"), "{message}");
    assert!(EtcdEngine::new(server.options("app")).check().await.is_err(), "without a user");
    std::fs::write(&file, "secret\n").unwrap();
    let message = refused(options("other")).await;
    assert!(message.contains("permission denied"), "{message}");
    // Whether another nkv uses the prefix around it is not for this user to see.
    EtcdEngine::new(options("outer/own")).check().await.unwrap();
    let (_node, nkv) = node(EtcdEngine::new(options("app"))).await;
    let mut stream = nkv.subscribe("*").await.unwrap();
    let root = |args: &[&str]| server.must(&[&["--user", "root:r"], args].concat());
    for n in 0..3 {
        nkv.put("k", n.to_string()).await.unwrap();
        assert_eq!(next(&mut stream).await, format!("k={n}"));
        // The rights change, and the token ends.
        root(&["user", "add", &format!("user{n}:x")]);
        nkv.put("k", "changed").await.unwrap();
        assert_eq!(next(&mut stream).await, "k=changed");
        tokio::time::sleep(Duration::from_millis(3_500)).await;
    }
    assert_eq!(nkv.delete("*").await.unwrap().count, 1);
    assert_eq!(next(&mut stream).await, "k Deleted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_is_tried_once_a_second_at_most() {
    const TRIES: &str =
        r#"grpc_server_started_total{grpc_method="Authenticate",grpc_service="etcdserverpb.Auth",grpc_type="unary"}"#;
    const SECONDS: u64 = 4;
    let Some(server) = Server::start().await else { return };
    for args in [&["user", "add", "root:r"][..], &["user", "grant-role", "root", "root"], &["auth", "enable"]] {
        server.must(args);
    }
    let file = server.dir.path().join("password");
    std::fs::write(&file, "wrong\n").unwrap();
    let before = server.metric(TRIES).await;
    let engine = EtcdEngine::new(server.options("app").with_user("root", &file));
    let node = nkv_node::Node::builder().engine(engine).start().await.unwrap();
    let nkv = node.handle();
    let until = tokio::time::Instant::now() + Duration::from_secs(SECONDS);
    while tokio::time::Instant::now() < until {
        // A question does not make it try.
        assert!(nkv.put("k", "1").await.is_err());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let tries = server.metric(TRIES).await - before;
    assert!((1..=SECONDS + 1).contains(&tries), "{tries} in {SECONDS} s");
}

/// An authority with a server and a client, as PEM files.
fn certificates(dir: &Path) {
    use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    std::fs::write(dir.join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
    let authority = Issuer::new(params, key);
    for name in ["server", "client"] {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["127.0.0.1".into()]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        std::fs::write(dir.join(format!("{name}.pem")), params.signed_by(&key, &authority).unwrap().pem()).unwrap();
        std::fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_is_checked_on_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    certificates(dir.path());
    let file = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let Some(mut server) = Server::new(&[]) else { return };
    let url = format!("https://{}", server.server());
    server.add_args(&["--listen-client-urls", &url, "--advertise-client-urls", &url, "--client-cert-auth"]);
    server.add_args(&["--cert-file", &file("server.pem"), "--key-file", &file("server.key")]);
    server.add_args(&["--trusted-ca-file", &file("ca.pem")]);
    server.run();
    let trusted = server.options("app").with_ca(file("ca.pem"));
    let known = trusted.clone().with_identity(file("client.pem"), file("client.key"));
    let (_node, nkv) = node(EtcdEngine::new(known)).await;
    nkv.put("k", "1").await.unwrap();
    // One who shows nothing, one who trusts nothing of it, and one without TLS.
    let of_system = Options::from_url(&format!("etcds://{}/app", server.server())).unwrap();
    let of_system = of_system.with_identity(file("client.pem"), file("client.key"));
    for options in [trusted, of_system, server.options("app")] {
        assert!(matches!(EtcdEngine::new(options).check().await, Err(EngineError::Unavailable(_))));
    }
    let message = refused(server.options("app").with_ca(file("none.pem"))).await;
    assert!(message.contains("none.pem"), "{message}");
}
