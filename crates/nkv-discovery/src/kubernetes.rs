//! Kubernetes: pods of a namespace, by their labels, asked of the API with the account of the pod that this runs in.
//!
//! One request is all that is needed, so it is made here: a client library for the whole API would be most of the program.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::header::{ACCEPT, AUTHORIZATION, HOST, HeaderValue, USER_AGENT};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::discovery::Discovery;
use crate::error::{ConfigError, DiscoveryError, DiscoveryErrorKind};
use crate::found::Found;
use crate::spec::KubernetesSpec;

/// Where a pod finds its account.
const ACCOUNT_DIR: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// For how long to ask in all.
const TIME_LIMIT: Duration = Duration::from_secs(10);

/// Pods of a page, pages of an answer, and bytes of a page.
const PAGE_PODS: usize = 100;
const PAGES_MAX: usize = 50;
const PAGE_LEN_MAX: usize = 16 << 20;

/// Files of the account are no longer.
const FILE_LEN_MAX: u64 = 1 << 20;

/// The API of a cluster, and who asks it.
#[derive(Clone)]
pub struct Account {
    host: String,
    port: u16,
    token_file: PathBuf,
    ca_file: PathBuf,
}

impl Account {
    /// The account of the pod that this program runs in.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] if it runs in none: `KUBERNETES_SERVICE_HOST` or `KUBERNETES_SERVICE_PORT` is not set.
    pub fn of_pod() -> Result<Self, ConfigError> {
        let read = |name: &str| {
            std::env::var(name).map_err(|_| ConfigError(format!("kubernetes: this is no pod: {name} is not set")))
        };
        let port = read("KUBERNETES_SERVICE_PORT")?;
        let port = port.parse().map_err(|_| ConfigError(format!("KUBERNETES_SERVICE_PORT: '{port}' is no port")))?;
        let dir = Path::new(ACCOUNT_DIR);
        Ok(Account::new(&read("KUBERNETES_SERVICE_HOST")?, port, dir.join("token"), dir.join("ca.crt")))
    }

    /// An account elsewhere: the API's host and port, a file with a bearer token, and one with the certificates (PEM) that the
    /// API's must be signed by. Files are read anew for each request, as tokens change.
    #[must_use]
    pub fn new(host: &str, port: u16, token_file: impl Into<PathBuf>, ca_file: impl Into<PathBuf>) -> Self {
        Account { host: host.to_owned(), port, token_file: token_file.into(), ca_file: ca_file.into() }
    }

    fn authority(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }

    /// The header that says who asks.
    async fn authorization(&self) -> Result<HeaderValue, String> {
        let token = read_file(&self.token_file).await?;
        let token = String::from_utf8(token).map_err(|_| format!("{}: no token", self.token_file.display()))?;
        let mut value = HeaderValue::from_str(&format!("Bearer {}", token.trim()))
            .map_err(|_| format!("{}: no token", self.token_file.display()))?;
        value.set_sensitive(true);
        Ok(value)
    }

    async fn tls(&self) -> Result<TlsConnector, String> {
        let pem = read_file(&self.ca_file).await?;
        let wrong = |error: String| format!("{}: {error}", self.ca_file.display());
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&pem) {
            let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
            roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
        }
        if roots.is_empty() {
            return Err(wrong("no certificate".into()));
        }
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| wrong(error.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(TlsConnector::from(Arc::new(config)))
    }
}

/// Without what the files hold.
impl fmt::Debug for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Account({})", self.authority())
    }
}

async fn read_file(path: &Path) -> Result<Vec<u8>, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", path.display());
    let len = tokio::fs::metadata(path).await.map_err(failed)?.len();
    if len > FILE_LEN_MAX {
        return Err(format!("{} has {len} bytes, and {FILE_LEN_MAX} is the limit", path.display()));
    }
    tokio::fs::read(path).await.map_err(failed)
}

/// Lists pods by label: those that run, and are ready, as far as they say. A pod's address is its IP with the port that its
/// container gives the name.
///
/// The pod's account needs `list` of `pods` in the namespace, see `packaging/kubernetes-discovery-rbac.yaml` in the repository. A
/// headless service with [DNS](crate::Spec::Dns) needs no account, and is mostly the simpler way.
///
/// # Examples
///
/// ```
/// use nkv_discovery::{Account, Discovery, Kubernetes, KubernetesSpec};
///
/// let pods = KubernetesSpec { namespace: "default".into(), labels: "app=nkv".into(), port_name: "gossip".into() };
/// let kubernetes = Kubernetes::new(pods, Account::new("10.96.0.1", 443, "/run/token", "/run/ca.crt"));
/// assert_eq!(kubernetes.name(), "kubernetes");
/// ```
#[derive(Clone, Debug)]
pub struct Kubernetes {
    spec: KubernetesSpec,
    account: Account,
}

impl Kubernetes {
    /// These pods, asked for by this account.
    #[must_use]
    pub fn new(spec: KubernetesSpec, account: Account) -> Self {
        Kubernetes { spec, account }
    }

    async fn list(&self) -> Result<Found, DiscoveryError> {
        let (mut found, mut next) = (Found::new(), String::new());
        for _ in 0..PAGES_MAX {
            let page = self.page(&next).await?;
            page.items.iter().filter(|pod| pod.is_ready()).for_each(|pod| pod.add_to(&mut found, &self.spec.port_name));
            next = page.metadata.next;
            if next.is_empty() {
                return found.checked();
            }
        }
        found.add_unusable(format!("there are more than {} pods", PAGES_MAX.saturating_mul(PAGE_PODS)));
        found.checked()
    }

    async fn page(&self, next: &str) -> Result<PodList, DiscoveryError> {
        let encode = |text| utf8_percent_encode(text, NON_ALPHANUMERIC);
        let KubernetesSpec { namespace, labels, .. } = &self.spec;
        let path = format!(
            "/api/v1/namespaces/{}/pods?labelSelector={}&limit={PAGE_PODS}&continue={}",
            encode(namespace),
            encode(labels),
            encode(next)
        );
        let (status, body) =
            self.get(&path).await.map_err(|error| self.failed(DiscoveryErrorKind::Unreachable, &error))?;
        if status.is_success() {
            let wrong = |error: serde_json::Error| self.failed(DiscoveryErrorKind::Unusable, &error.to_string());
            return serde_json::from_slice(&body).map_err(wrong);
        }
        let kind = match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => DiscoveryErrorKind::Refused,
            _ => DiscoveryErrorKind::Unreachable,
        };
        let said = serde_json::from_slice::<Status>(&body).map(|said| said.message).unwrap_or_default();
        let said: String = said.chars().filter(|char| !char.is_control()).take(500).collect();
        Err(self.failed(kind, &format!("{status}: {said}")))
    }

    fn failed(&self, kind: DiscoveryErrorKind, error: &str) -> DiscoveryError {
        DiscoveryError::new(kind, format!("kubernetes: {}: {error}", self.account.authority()))
    }

    async fn get(&self, path: &str) -> Result<(StatusCode, Bytes), String> {
        let account = &self.account;
        let (authorization, tls) = (account.authorization().await?, account.tls().await?);
        let stream = TcpStream::connect((account.host.as_str(), account.port)).await.map_err(text)?;
        let name = ServerName::try_from(account.host.clone()).map_err(text)?;
        let stream = tls.connect(name, stream).await.map_err(text)?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(text)?;
        // It ends with the request.
        let mut connections = JoinSet::new();
        connections.spawn(connection);
        let request = Request::get(path)
            .header(HOST, account.authority())
            .header(AUTHORIZATION, authorization)
            .header(ACCEPT, "application/json")
            .header(USER_AGENT, concat!("nkv-discovery/", env!("CARGO_PKG_VERSION")))
            .body(Empty::<Bytes>::new())
            .map_err(text)?;
        let answer = sender.send_request(request).await.map_err(text)?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), PAGE_LEN_MAX).collect().await.map_err(text)?;
        Ok((status, body.to_bytes()))
    }
}

fn text(error: impl fmt::Display) -> String {
    error.to_string()
}

#[async_trait]
impl Discovery for Kubernetes {
    fn name(&self) -> &str {
        "kubernetes"
    }

    async fn find(&self, _own: SocketAddr) -> Result<Found, DiscoveryError> {
        let late = |_| self.failed(DiscoveryErrorKind::Unreachable, &format!("no answer within {TIME_LIMIT:?}"));
        timeout(TIME_LIMIT, self.list()).await.map_err(late)?
    }
}

/// Of a list of pods what is needed here.
#[derive(Debug, Deserialize)]
struct PodList {
    metadata: ListMeta,
    items: Vec<Pod>,
}

#[derive(Debug, Deserialize)]
struct ListMeta {
    /// Where the next page begins.
    #[serde(rename = "continue", default)]
    next: String,
}

#[derive(Debug, Deserialize)]
struct Pod {
    metadata: PodMeta,
    #[serde(default)]
    spec: PodSpec,
    #[serde(default)]
    status: PodStatus,
}

#[derive(Debug, Deserialize)]
struct PodMeta {
    name: String,
}

#[derive(Debug, Default, Deserialize)]
struct PodSpec {
    #[serde(default)]
    containers: Vec<Container>,
}

#[derive(Debug, Deserialize)]
struct Container {
    #[serde(default)]
    ports: Vec<Port>,
}

#[derive(Debug, Deserialize)]
struct Port {
    #[serde(default)]
    name: String,
    #[serde(rename = "containerPort")]
    number: u16,
}

#[derive(Debug, Default, Deserialize)]
struct PodStatus {
    #[serde(default)]
    phase: String,
    #[serde(rename = "podIP", default)]
    ip: String,
    #[serde(default)]
    conditions: Vec<Condition>,
}

#[derive(Debug, Deserialize)]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

/// What the API says with an error.
#[derive(Debug, Deserialize)]
struct Status {
    message: String,
}

impl Pod {
    fn is_ready(&self) -> bool {
        let mut ready = self.status.conditions.iter().filter(|condition| condition.kind == "Ready");
        self.status.phase == "Running" && ready.all(|condition| condition.status == "True")
    }

    fn add_to(&self, found: &mut Found, port_name: &str) {
        let name = &self.metadata.name;
        let mut ports = self.spec.containers.iter().flat_map(|container| &container.ports);
        match (self.status.ip.parse::<IpAddr>(), ports.find(|port| port.name == port_name)) {
            (Ok(ip), Some(port)) => found.add(SocketAddr::new(ip, port.number)),
            (Err(_), _) => found.add_unusable(format!("pod {name} has no address: '{}'", self.status.ip)),
            (_, None) => found.add_unusable(format!("pod {name} has no port named '{port_name}'")),
        }
    }
}
