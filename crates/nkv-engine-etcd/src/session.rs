//! A connection to one member of etcd, of which is known what it is: which etcd, which generation of nkv's data in it, and up to
//! where.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use nkv_core::Epoch;
use nkv_node::EngineError;
use sha2::{Digest, Sha256};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Response, Status};

use crate::fault;
use crate::login::Login;
use crate::names::Names;
use crate::options::Options;
use crate::rpc::kv_client::KvClient;
use crate::rpc::lease_client::LeaseClient;
use crate::rpc::maintenance_client::MaintenanceClient;
use crate::rpc::watch_client::WatchClient;
use crate::rpc::{
    KeyValue, LeaseGrantRequest, LeaseRevokeRequest, RangeRequest, RangeResponse, StatusRequest, StatusResponse,
    TxnRequest, TxnResponse,
};
use crate::write::{mod_is, put, value_is};

/// How long a member may take until it counts as silent.
const PROBE_LIMIT: Duration = Duration::from_millis(1_500);
/// How long the others are waited for when one has answered.
const GRACE: Duration = Duration::from_millis(200);
/// How long a request may take: more than etcd itself takes to say that it was too long.
const CALL_LIMIT: Duration = Duration::from_secs(10);
/// The longest answer that is taken.
const ANSWER_LEN_MAX: usize = 64 << 20;
const WINDOW_LEN: u32 = 4 << 20;
const CONNECTION_WINDOW_LEN: u32 = 16 << 20;

type Via = InterceptedService<Channel, Login>;

pub(crate) struct Session {
    server: String,
    channel: Channel,
    login: Login,
    pub(crate) cluster_id: u64,
    /// Of a moment at which it was known to be up to date.
    pub(crate) revision: i64,
    pub(crate) raft_term: u64,
    pub(crate) raft_index: u64,
    /// Whether an answer to a progress request comes behind all events up to its revision.
    pub(crate) tells_progress: bool,
    pub(crate) epoch: Epoch,
    /// What the record of the generation has: random, so no other etcd has the same.
    pub(crate) generation: Bytes,
    ended: watch::Sender<bool>,
    pub(crate) kicked: Notify,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("server", &self.server).field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

/// The ids of etcd that servers had when they answered last.
pub(crate) type Ids = HashMap<String, u64>;

impl Session {
    /// Connects with the first server that is good, and has the record of the generation be there.
    pub(crate) async fn open(
        options: &Options,
        names: &Names,
        login: &Login,
        ids: &std::sync::Mutex<Ids>,
    ) -> Result<Self, EngineError> {
        let members = members(options, login).await?;
        check_ids(&members, ids)?;
        let mut last = EngineError::Unavailable("no member of etcd answers".into());
        for member in members {
            let (server, opening) = (member.server.clone(), Session::of(member, options, names, login));
            match timeout(PROBE_LIMIT, opening).await {
                Ok(Ok(session)) => return Ok(session),
                Ok(Err(error @ EngineError::Refused { .. })) => return Err(error),
                Ok(Err(error)) => last = error,
                Err(_) => last = EngineError::Unavailable(format!("{server} did not answer in time")),
            }
        }
        Err(last)
    }

    async fn of(member: Member, options: &Options, names: &Names, login: &Login) -> Result<Self, EngineError> {
        let Member { server, channel, status } = member;
        let mut session = Session {
            server,
            channel,
            login: login.clone(),
            cluster_id: cluster_id(&status),
            revision: 0,
            raft_term: 0,
            raft_index: 0,
            tells_progress: tells_progress(&status.version),
            epoch: Epoch::default(),
            generation: Bytes::new(),
            ended: watch::Sender::new(false),
            kicked: Notify::new(),
        };
        let record = session.generation_record(options, names).await?;
        (session.epoch, session.generation) = (epoch(session.cluster_id, names.prefix(), &record.value), record.value);
        // After a read that is up to date, so that what it says is not behind what was seen by another member.
        let status = session.call(|| async { session.maintenance().status(StatusRequest {}).await }).await;
        session.raft_index = status.map_err(|status| fault::of_request(&status))?.raft_index;
        Ok(session)
    }

    /// Reads the record of the generation, and makes it if there is none.
    async fn generation_record(&mut self, options: &Options, names: &Names) -> Result<KeyValue, EngineError> {
        loop {
            let read = self.range(RangeRequest { key: names.generation().into(), ..RangeRequest::default() }).await;
            let RangeResponse { header, mut kvs, .. } = read.map_err(|status| fault::of_request(&status))?;
            let header = header.unwrap_or_default();
            (self.revision, self.raft_term) = (header.revision, header.raft_term);
            if let Some(record) = kvs.pop() {
                return Ok(record);
            }
            self.check_outer(names).await?;
            let prefix = names.prefix();
            if !options.create {
                let message =
                    format!("no nkv has used the prefix '{prefix}' of etcd yet, and nothing is to be created");
                return Err(EngineError::Refused { status: 503, message });
            }
            self.write_generation(names, None).await?;
            tracing::info!(target: "nkv::engine", "etcd: the prefix '{prefix}' is used by nkv from now on");
        }
    }

    /// A prefix within another nkv's would be deleted by its wildcards.
    async fn check_outer(&self, names: &Names) -> Result<(), EngineError> {
        for (prefix, record) in names.outer() {
            match self.range(RangeRequest { key: record.into(), ..RangeRequest::default() }).await {
                Ok(read) if read.kvs.is_empty() => {}
                Ok(_) => return Err(nested(names.prefix(), prefix)),
                // What nkv's user may not read counts as absent.
                Err(status) if status.code() == Code::PermissionDenied => {}
                Err(status) => return Err(fault::of_request(&status)),
            }
        }
        Ok(())
    }

    /// Has another generation begin where it is still the one before, or there is none.
    pub(crate) async fn write_generation(&self, names: &Names, before: Option<Bytes>) -> Result<(), EngineError> {
        let key = Bytes::from(names.generation());
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(|error| EngineError::Unavailable(error.to_string()))?;
        let value = random.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let request = TxnRequest {
            compare: vec![before.map_or_else(|| mod_is(key.clone(), 0), |before| value_is(key.clone(), before))],
            success: vec![put(key, value.into(), 0)],
            failure: Vec::new(),
        };
        // Where another node was faster, its generation is as good.
        self.txn(&request).await.map(drop).map_err(|status| fault::of_request(&status))
    }

    /// A key as it was at a revision.
    pub(crate) async fn read_at(&self, key: Bytes, revision: i64) -> Result<Option<KeyValue>, Status> {
        let read = self.range(RangeRequest { key, revision, ..RangeRequest::default() }).await?;
        Ok(read.kvs.into_iter().next())
    }

    pub(crate) async fn range(&self, request: RangeRequest) -> Result<RangeResponse, Status> {
        self.call(|| async { self.kv().range(request.clone()).await }).await
    }

    pub(crate) async fn txn(&self, request: &TxnRequest) -> Result<TxnResponse, Status> {
        self.call(|| async { self.kv().txn(request.clone()).await }).await
    }

    pub(crate) async fn grant(&self, ttl: i64) -> Result<i64, Status> {
        let granted = self.call(|| async { self.lease().lease_grant(LeaseGrantRequest { ttl }).await }).await?;
        Ok(granted.id)
    }

    async fn revoke(&self, id: i64) {
        let revoked = self.call(|| async { self.lease().lease_revoke(LeaseRevokeRequest { id }).await }).await;
        if let Err(status) = revoked {
            tracing::debug!(target: "nkv::engine", "etcd: a lease was not revoked: {status}");
        }
    }

    /// Asks, for as long as the session lasts, once more after a new login where that is why it was refused.
    async fn call<T, F>(&self, ask: impl Fn() -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let asked = async {
            let before = self.login.token();
            match ask().await {
                Err(status) if before.is_some() && fault::wants_login(&status) => {
                    let login = self.login.renew(&self.channel, before).await;
                    login.map_err(|error| Status::unauthenticated(error.to_string()))?;
                    ask().await
                }
                asked => asked,
            }
        };
        let mut ended = self.ended.subscribe();
        tokio::select! {
            biased;
            answer = asked => answer.map(Response::into_inner),
            _ = ended.wait_for(|ended| *ended) => Err(Status::cancelled("etcd gave no sign of life")),
            () = sleep(CALL_LIMIT) => Err(Status::deadline_exceeded("etcd did not answer in time")),
        }
    }

    /// Nothing more is waited for.
    pub(crate) fn end(&self) {
        self.ended.send_replace(true);
    }

    pub(crate) fn watch(&self) -> WatchClient<Via> {
        WatchClient::with_interceptor(self.channel.clone(), self.login.clone())
            .max_decoding_message_size(ANSWER_LEN_MAX)
    }

    fn kv(&self) -> KvClient<Via> {
        KvClient::with_interceptor(self.channel.clone(), self.login.clone()).max_decoding_message_size(ANSWER_LEN_MAX)
    }

    fn lease(&self) -> LeaseClient<Via> {
        LeaseClient::with_interceptor(self.channel.clone(), self.login.clone())
    }

    fn maintenance(&self) -> MaintenanceClient<Via> {
        MaintenanceClient::with_interceptor(self.channel.clone(), self.login.clone())
    }
}

/// Frees the leases of values that are gone. What is not revoked ends by itself, but not soon.
pub(crate) fn revoke(session: &Arc<Session>, ids: Vec<i64>) {
    if ids.is_empty() {
        return;
    }
    let session = Arc::clone(session);
    tokio::spawn(async move {
        for id in ids {
            session.revoke(id).await;
        }
    });
}

/// One prefix lies within the other.
pub(crate) fn nested(inner: &str, outer: &str) -> EngineError {
    let message = format!(
        "the prefix '{inner}' of etcd lies within '{outer}', which another nkv uses: its wildcard deletes would \
                           delete both"
    );
    EngineError::Refused { status: 409, message }
}

/// A server that answered.
struct Member {
    server: String,
    channel: Channel,
    status: StatusResponse,
}

fn cluster_id(status: &StatusResponse) -> u64 {
    status.header.unwrap_or_default().cluster_id
}

/// The servers that answer, soonest first.
async fn members(options: &Options, login: &Login) -> Result<Vec<Member>, EngineError> {
    let tls = tls(options).await?;
    let probe = async |server: &String| {
        let probed = timeout(PROBE_LIMIT, probe(server, tls.clone(), login)).await;
        probed.unwrap_or_else(|_| Err(EngineError::Unavailable(format!("{server}: no answer"))))
    };
    let mut probes: FuturesUnordered<_> = options.servers.iter().map(probe).collect();
    let (mut members, mut errors, mut until) = (Vec::new(), Vec::new(), None::<Instant>);
    loop {
        let next = match until {
            None => probes.next().await,
            Some(until) => timeout_at(until, probes.next()).await.unwrap_or(None),
        };
        match next {
            None => break,
            Some(Err(error)) => errors.push(error),
            Some(Ok(member)) => {
                check_version(&member)?;
                until = until.or_else(|| Instant::now().checked_add(GRACE));
                members.push(member);
            }
        }
    }
    if !members.is_empty() {
        return Ok(members);
    }
    let messages: Vec<String> = errors.iter().map(ToString::to_string).collect();
    let refused = errors.into_iter().find(|error| matches!(error, EngineError::Refused { .. }));
    Err(refused.unwrap_or_else(|| EngineError::Unavailable(messages.join("; "))))
}

async fn probe(server: &str, tls: Option<ClientTlsConfig>, login: &Login) -> Result<Member, EngineError> {
    let away = |error: &dyn std::error::Error| EngineError::Unavailable(format!("{server}: {}", said(error)));
    let scheme = if tls.is_some() { "https" } else { "http" };
    let endpoint = Endpoint::from_shared(format!("{scheme}://{server}")).map_err(|error| away(&error))?;
    let endpoint = match tls {
        Some(tls) => endpoint.tls_config(tls).map_err(|error| away(&error))?,
        None => endpoint,
    };
    let endpoint = endpoint
        .connect_timeout(PROBE_LIMIT)
        .tcp_nodelay(true)
        .initial_stream_window_size(WINDOW_LEN)
        .initial_connection_window_size(CONNECTION_WINDOW_LEN);
    let channel = endpoint.connect().await.map_err(|error| away(&error))?;
    login.renew(&channel, None).await?;
    let before = login.token();
    let mut client = MaintenanceClient::with_interceptor(channel.clone(), login.clone());
    let mut asked = client.status(StatusRequest {}).await;
    if asked.as_ref().is_err_and(fault::wants_login) {
        login.renew(&channel, before).await?;
        asked = client.status(StatusRequest {}).await;
    }
    let status = asked.map_err(|status| fault::of_request(&status))?.into_inner();
    Ok(Member { server: server.to_owned(), channel, status })
}

/// An error with its causes, as far as they say more.
fn said(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

async fn tls(options: &Options) -> Result<Option<ClientTlsConfig>, EngineError> {
    if !options.is_tls {
        return Ok(None);
    }
    let read = async |file: &std::path::Path| {
        let refused = |error| EngineError::Refused { status: 503, message: format!("{}: {error}", file.display()) };
        tokio::fs::read(file).await.map_err(refused)
    };
    let mut tls = match &options.ca_file {
        Some(file) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(file).await?)),
        None => ClientTlsConfig::new().with_native_roots(),
    };
    if let Some((certificate, key)) = &options.identity_files {
        tls = tls.identity(Identity::from_pem(read(certificate).await?, read(key).await?));
    }
    Ok(Some(tls))
}

/// Whether all servers are of one etcd, as far as they answer, or answered before.
fn check_ids(members: &[Member], ids: &std::sync::Mutex<Ids>) -> Result<(), EngineError> {
    let mut ids = ids.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let now: Ids = members.iter().map(|member| (member.server.clone(), cluster_id(&member.status))).collect();
    // One that changed its id was made anew, and then all others of its etcd were too.
    let is_anew = now.iter().any(|(server, id)| ids.get(server).is_some_and(|before| before != id));
    if !is_anew {
        let silent = ids.iter().filter(|(server, _)| !now.contains_key(*server));
        check_one(now.iter().chain(silent))?;
    } else {
        check_one(now.iter())?;
        ids.clear();
    }
    ids.extend(now);
    Ok(())
}

fn check_one<'a>(mut ids: impl Iterator<Item = (&'a String, &'a u64)>) -> Result<(), EngineError> {
    let Some((first, id)) = ids.next() else { return Ok(()) };
    match ids.find(|(_, other)| *other != id) {
        None => Ok(()),
        Some((second, other)) => {
            let message = format!("the servers are of two etcds: {first} of {id:x}, {second} of {other:x}");
            Err(EngineError::Refused { status: 503, message })
        }
    }
}

fn version(text: &str) -> Option<(u32, u32, u32)> {
    let mut parts = text.split(['.', '-', '+']).map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??, parts.next()??))
}

fn check_version(member: &Member) -> Result<(), EngineError> {
    let text = &member.status.version;
    if version(text).is_some_and(|version| version >= (3, 4, 0)) {
        return Ok(());
    }
    let message = format!("{} is etcd {text}, and nkv needs 3.4 or later", member.server);
    Err(EngineError::Refused { status: 503, message })
}

/// In earlier versions the answer to a progress request may overtake events.
fn tells_progress(text: &str) -> bool {
    match version(text) {
        Some((3, 4, patch)) => patch >= 25,
        Some((3, 5, patch)) => patch >= 8,
        Some(version) => version >= (3, 6, 0),
        None => false,
    }
}

fn epoch(cluster_id: u64, prefix: &str, generation: &[u8]) -> Epoch {
    let mut hash = Sha256::new();
    for part in [b"nkv-engine-etcd".as_slice(), &cluster_id.to_be_bytes(), prefix.as_bytes(), generation] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    Epoch::new(hash.finalize().iter().take(16).fold(0, |number, byte| number << 8 | u128::from(*byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_distinguished() {
        let known = ["3.4.23", "3.4.25", "3.5.1", "3.5.8", "3.6.0-rc.1", "3.7.2", "4.0.0", "x"].map(tells_progress);
        assert_eq!(known, [false, true, false, true, true, true, true, false]);
    }

    #[test]
    fn an_epoch_is_of_its_etcd_its_prefix_and_its_generation() {
        let epochs =
            [epoch(1, "a", b"x"), epoch(2, "a", b"x"), epoch(1, "b", b"x"), epoch(1, "a", b"y"), epoch(1, "ax", b"")];
        for (at, one) in epochs.iter().enumerate() {
            assert!(epochs.iter().skip(at + 1).all(|other| other != one));
        }
        assert_eq!(
            epoch(1, "a", b"x").to_string(),
            "4bfe3204a304a0fec1f64a28c4862f3b",
            "nodes of two releases have one epoch"
        );
    }

    #[test]
    fn two_etcds_in_one_list_are_refused_also_if_one_is_silent() {
        let ids = std::sync::Mutex::new(Ids::new());
        let member = |server: &str, id| {
            let header = crate::rpc::ResponseHeader { cluster_id: id, ..Default::default() };
            let channel = Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
            Member {
                server: server.into(),
                channel,
                status: StatusResponse { header: Some(header), ..Default::default() },
            }
        };
        let check = |members: &[(&str, u64)]| {
            let members: Vec<Member> = members.iter().map(|(server, id)| member(server, *id)).collect();
            check_ids(&members, &ids).map_err(|error| error.to_string())
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _entered = runtime.enter();
        assert!(check(&[("a", 0xa1), ("b", 0xb2)]).unwrap_err().contains("a1"));
        assert_eq!(check(&[("a", 1)]), Ok(()));
        assert!(check(&[("b", 2)]).unwrap_err().contains("b of 2"), "another etcd, where the first is silent");
        assert_eq!(check(&[("a", 1), ("b", 1)]), Ok(()));
        assert_eq!(check(&[("b", 3)]), Ok(()), "made anew");
        assert_eq!(check(&[("a", 3), ("b", 3)]), Ok(()));
    }
}
