//! Kubernetes. There is no API server to be had here: these tests emulate the one request that is made of it, over real TLS.

#![allow(clippy::unwrap_used, reason = "a helper of a test fails like a test")]

mod support;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nkv_discovery::{ADDRESSES_MAX, Account, Discovery, DiscoveryErrorKind, Found, Kubernetes, KubernetesSpec};
use rcgen::{CertificateParams, CertifiedIssuer, KeyPair};
use serde_json::{Value, json};
use support::{PATIENCE, own};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;

/// Keeps pods, lists them by label in pages to who has the token, and fails on demand.
struct EmulatedApi {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    dir: TempDir,
}

#[derive(Default)]
struct State {
    token: String,
    pods: Vec<Value>,
    /// Instead of answers, the next times: status and body. Status 0 never answers.
    instead: VecDeque<(u16, String)>,
    requests: Vec<String>,
}

impl EmulatedApi {
    async fn start() -> Self {
        let issuer_key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, issuer_key).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec!["127.0.0.1".into()]).unwrap().signed_by(&key, &issuer).unwrap();
        let key = tokio_rustls::rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        let dir = TempDir::new().unwrap();
        std::fs::write(dir.path().join("ca.crt"), issuer.pem()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State::default()));
        let api = EmulatedApi { address, state: Arc::clone(&state), dir };
        api.set_token("secret-1\n");
        let acceptor = TlsAcceptor::from(Arc::new(config));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, state) = (acceptor.clone(), Arc::clone(&state));
                tokio::spawn(async move {
                    let Ok(mut stream) = acceptor.accept(stream).await else { return };
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        head.push(stream.read_u8().await.unwrap());
                    }
                    let (status, body) = answer(&mut state.lock().unwrap(), &String::from_utf8(head).unwrap());
                    if status == 0 {
                        return sleep(PATIENCE).await;
                    }
                    let head = format!(
                        "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
                        body.len()
                    );
                    // The client may be gone, or have enough.
                    let _ = stream.write_all(head.as_bytes()).await;
                    let _ = stream.write_all(body.as_bytes()).await;
                    let _ = stream.shutdown().await;
                });
            }
        });
        api
    }

    fn set_token(&self, token: &str) {
        self.state.lock().unwrap().token = token.trim().to_owned();
        std::fs::write(self.file("token"), token).unwrap();
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn set_pods(&self, pods: Vec<Value>) {
        self.state.lock().unwrap().pods = pods;
    }

    fn answer_instead(&self, status: u16, body: impl Into<String>) {
        self.state.lock().unwrap().instead.push_back((status, body.into()));
    }

    fn account(&self) -> Account {
        Account::new("127.0.0.1", self.address.port(), self.file("token"), self.file("ca.crt"))
    }

    fn pods(&self, labels: &str) -> Kubernetes {
        let (namespace, port_name) = ("shop".into(), "gossip".into());
        Kubernetes::new(KubernetesSpec { namespace, labels: labels.into(), port_name }, self.account())
    }
}

fn answer(state: &mut State, head: &str) -> (u16, String) {
    let target = head.split(' ').nth(1).unwrap();
    state.requests.push(target.to_owned());
    if !head.to_ascii_lowercase().contains(&format!("authorization: bearer {}\r\n", state.token)) {
        return (401, json!({"kind": "Status", "message": "Unauthorized"}).to_string());
    }
    if let Some(instead) = state.instead.pop_front() {
        return instead;
    }
    let (path, query) = target.split_once('?').unwrap();
    if path != "/api/v1/namespaces/shop/pods" {
        let message = "pods is forbidden: User \"nkv\" cannot list resource \"pods\"";
        return (403, json!({"kind": "Status", "message": message}).to_string());
    }
    let parameter = |name: &str| {
        let found = query.split('&').find_map(|part| part.strip_prefix(&format!("{name}="))).unwrap_or_default();
        percent_encoding::percent_decode_str(found).decode_utf8().unwrap().into_owned()
    };
    let labels = parameter("labelSelector");
    let has_labels = |pod: &&Value| {
        labels.split(',').all(|label| {
            let (name, value) = label.split_once('=').unwrap();
            pod["metadata"]["labels"][name] == value
        })
    };
    let (limit, begin) = (parameter("limit").parse().unwrap(), parameter("continue").parse().unwrap_or(0));
    let matching: Vec<_> = state.pods.iter().filter(has_labels).cloned().collect();
    let items: Vec<_> = matching.iter().skip(begin).take(limit).cloned().collect();
    let mut metadata = json!({"resourceVersion": "7"});
    if begin + items.len() < matching.len() {
        metadata["continue"] = json!((begin + items.len()).to_string());
    }
    (200, json!({"kind": "PodList", "apiVersion": "v1", "metadata": metadata, "items": items}).to_string())
}

fn pod(name: &str, ip: &str, phase: &str, ready: Option<&str>) -> Value {
    let mut conditions = vec![json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null})];
    conditions.extend(ready.map(|status| json!({"type": "Ready", "status": status})));
    json!({
        "metadata": {"name": name, "labels": {"app": "nkv", "example.com/tier": "data"}},
        "spec": {"containers": [
            {"name": "sidecar"},
            {"name": "nkv", "ports": [
                {"containerPort": 4222, "protocol": "TCP"},
                {"name": "gossip", "containerPort": 7000, "protocol": "TCP"},
            ]},
        ]},
        "status": {"phase": phase, "podIP": ip, "podIPs": [{"ip": ip}], "conditions": conditions},
    })
}

fn running(name: &str, ip: &str) -> Value {
    pod(name, ip, "Running", Some("True"))
}

async fn find(kubernetes: &Kubernetes) -> Result<Found, nkv_discovery::DiscoveryError> {
    timeout(PATIENCE, kubernetes.find(own())).await.expect("an end")
}

fn texts(found: &Found) -> Vec<String> {
    found.addresses().iter().map(ToString::to_string).collect()
}

#[tokio::test]
async fn pods_that_run_and_are_ready_are_found_by_label_and_port() {
    let api = EmulatedApi::start().await;
    let mut other = running("other", "10.0.0.9");
    other["metadata"]["labels"]["app"] = json!("shop");
    let mut without_port = running("without-port", "10.0.0.8");
    without_port["spec"]["containers"] = json!([{"name": "nkv"}]);
    api.set_pods(vec![
        running("nkv-0", "10.0.0.1"),
        pod("nkv-1", "fd00::2", "Running", None),
        pod("nkv-2", "10.0.0.3", "Running", Some("False")),
        pod("nkv-3", "10.0.0.4", "Running", Some("Unknown")),
        pod("nkv-4", "10.0.0.5", "Succeeded", Some("True")),
        pod("nkv-5", "", "Pending", None),
        running("nkv-6", "rubbish"),
        other,
        without_port,
    ]);
    let found = find(&api.pods("app=nkv,example.com/tier=data")).await.unwrap();
    assert_eq!(texts(&found), ["10.0.0.1:7000", "[fd00::2]:7000"]);
    let named = ["pod nkv-6 has no address: 'rubbish'", "pod without-port has no port named 'gossip'"];
    assert_eq!(found.unusable(), named);
    assert_eq!(find(&api.pods("app=none")).await, Ok(Found::new()), "none is an answer");
}

#[tokio::test]
async fn an_answer_that_changes_is_seen_and_all_gone_is_none() {
    let api = EmulatedApi::start().await;
    let kubernetes = api.pods("app=nkv");
    for pods in [vec![running("nkv-0", "10.0.0.1")], vec![running("nkv-0", "10.0.0.2")], Vec::new()] {
        let addresses: Vec<_> =
            pods.iter().map(|pod| format!("{}:7000", pod["status"]["podIP"].as_str().unwrap())).collect();
        api.set_pods(pods);
        assert_eq!(texts(&find(&kubernetes).await.unwrap()), addresses);
    }
    // A token that changes, too.
    api.set_token("secret-2");
    assert_eq!(find(&kubernetes).await, Ok(Found::new()));
}

#[tokio::test]
async fn pods_come_in_pages_and_are_bounded() {
    let api = EmulatedApi::start().await;
    let pods =
        |count: usize| (0..count).map(|n| running(&format!("nkv-{n}"), &format!("10.1.{}.{}", n / 200, n % 200 + 1)));
    api.set_pods(pods(250).collect());
    assert_eq!(find(&api.pods("app=nkv")).await.unwrap().addresses().len(), 250);
    let requests = api.state.lock().unwrap().requests.clone();
    assert_eq!(requests.len(), 3, "{requests:?}");
    assert_eq!(requests[1], "/api/v1/namespaces/shop/pods?labelSelector=app%3Dnkv&limit=100&continue=100");
    api.set_pods(pods(1_100).collect());
    let found = find(&api.pods("app=nkv")).await.unwrap();
    assert_eq!((found.addresses().len(), found.left_out()), (ADDRESSES_MAX, 1_100 - ADDRESSES_MAX));
    // A list without end.
    let endless = json!({"metadata": {"continue": "x"}, "items": []}).to_string();
    for _ in 0..100 {
        api.answer_instead(200, endless.clone());
    }
    assert_eq!(find(&api.pods("app=nkv")).await.unwrap_err().kind(), DiscoveryErrorKind::Unusable);
    // An answer breaks off between two pages: a part proves nothing.
    api.state.lock().unwrap().instead.clear();
    api.answer_instead(
        200,
        json!({"metadata": {"continue": "1"}, "items": [running("nkv-0", "10.0.0.1")]}).to_string(),
    );
    api.answer_instead(410, json!({"message": "The provided continue parameter is too old"}).to_string());
    let error = find(&api.pods("app=nkv")).await.unwrap_err();
    assert!(error.to_string().contains("too old"), "{error}");
}

#[tokio::test]
async fn a_refusal_says_why() {
    let api = EmulatedApi::start().await;
    let spec = KubernetesSpec { namespace: "other".into(), labels: "app=nkv".into(), port_name: "gossip".into() };
    let error = find(&Kubernetes::new(spec, api.account())).await.unwrap_err();
    assert_eq!(error.kind(), DiscoveryErrorKind::Refused);
    assert!(error.to_string().contains("403") && error.to_string().contains("cannot list resource"), "{error}");
    std::fs::write(api.file("token"), "stale").unwrap();
    let error = find(&api.pods("app=nkv")).await.unwrap_err();
    assert_eq!(error.kind(), DiscoveryErrorKind::Refused);
    assert!(!format!("{error} {error:?}").contains("stale"), "{error}");
    std::fs::write(api.file("token"), b"\xff\n\xff").unwrap();
    assert!(find(&api.pods("app=nkv")).await.unwrap_err().to_string().contains("no token"));
    std::fs::remove_file(api.file("token")).unwrap();
    assert!(find(&api.pods("app=nkv")).await.unwrap_err().to_string().contains("token"));
}

#[tokio::test]
async fn an_answer_that_is_none_is_an_error_and_never_none() {
    let api = EmulatedApi::start().await;
    api.set_pods(vec![running("nkv-0", "10.0.0.1")]);
    let kubernetes = api.pods("app=nkv");
    for (status, body, kind) in [
        (500, "{}", DiscoveryErrorKind::Unreachable),
        (503, "<html>", DiscoveryErrorKind::Unreachable),
        (302, "", DiscoveryErrorKind::Unreachable),
        (200, "", DiscoveryErrorKind::Unusable),
        (200, "{}", DiscoveryErrorKind::Unusable),
        (200, "rubbish", DiscoveryErrorKind::Unusable),
        (
            200,
            r#"{"metadata":{},"items":[{"metadata":{"name":"x"},"status":{"phase":"Running"}}]}"#,
            DiscoveryErrorKind::Unusable,
        ),
        (200, r#"{"metadata":{},"items":[{}]}"#, DiscoveryErrorKind::Unusable),
    ] {
        api.answer_instead(status, body);
        let error = find(&kubernetes).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{status} {body}: {error}");
    }
    api.answer_instead(200, " ".repeat(17 << 20));
    assert_eq!(find(&kubernetes).await.unwrap_err().kind(), DiscoveryErrorKind::Unreachable, "longer than it may be");
    api.answer_instead(0, "");
    let error = find(&kubernetes).await.unwrap_err();
    assert!(error.to_string().contains("no answer within"), "{error}");
    assert_eq!(texts(&find(&kubernetes).await.unwrap()), ["10.0.0.1:7000"], "and then it is well again");
}

#[tokio::test]
async fn the_token_goes_to_the_api_alone() {
    let (api, other) = (EmulatedApi::start().await, EmulatedApi::start().await);
    // Another server with a certificate of its own, at the same address.
    let account = Account::new("127.0.0.1", other.address.port(), api.file("token"), api.file("ca.crt"));
    let spec = KubernetesSpec { namespace: "shop".into(), labels: "app=nkv".into(), port_name: "gossip".into() };
    let error = find(&Kubernetes::new(spec.clone(), account)).await.unwrap_err();
    assert_eq!(error.kind(), DiscoveryErrorKind::Unreachable, "{error}");
    // The certificate is for the address, not for a name.
    let account = Account::new("localhost", api.address.port(), api.file("token"), api.file("ca.crt"));
    assert!(find(&Kubernetes::new(spec, account)).await.is_err());
    sleep(Duration::from_millis(50)).await;
    assert!(other.state.lock().unwrap().requests.is_empty() && api.state.lock().unwrap().requests.is_empty());
    std::fs::write(api.file("ca.crt"), "rubbish").unwrap();
    let error = find(&api.pods("app=nkv")).await.unwrap_err();
    assert!(error.to_string().contains("no certificate"), "{error}");
}

#[test]
fn outside_a_pod_there_is_no_account() {
    if std::env::var_os("KUBERNETES_SERVICE_HOST").is_none() {
        let error = "kubernetes:shop/app=nkv/gossip".parse::<nkv_discovery::Spec>().unwrap().provider().unwrap_err();
        assert!(error.to_string().contains("this is no pod"), "{error}");
    }
}
