//! A mesh of servers of the replicated gRPC store: each sends every put to all others, once, and takes what they have when it
//! joins.
//!
//! What is to be sent is a subscription of each peer: one that is slow or away costs a caller nothing, and gets the newest value
//! of each key when it is there. There are no deletes and no order in this protocol, so two sets of one key at once on two
//! servers may stay different.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nkv_node::{Chain, Cursor, Handle, Key, Revision, TailEvent, TailOptions};
use tokio::net::lookup_host;
use tokio::sync::{Mutex as AsyncMutex, Notify};
use tokio::task::{JoinError, JoinSet};
use tokio::time::error::Elapsed;
use tokio::time::{sleep, timeout};
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::kv::client_client::ClientClient;
use crate::kv::{Ip, SetKey, Void};
use crate::node_kv::ANSWER_LEN_MAX;

/// Peers at most: those that were named, and those that registered.
const PEERS_MAX: usize = 64;

/// A peer that was not named is forgotten when it could not be reached for this long.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(24 * 60 * 60);

const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(30);

const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// How long a peer may take to answer.
const CALL_LIMIT: Duration = Duration::from_secs(10);

/// After how long without a packet TCP asks whether a peer is there.
const KEEP_ALIVE: Duration = Duration::from_secs(30);

/// Of how many of the latest revisions it is known that they are of peers. A value that a slow peer did not get by then is sent to
/// it as if it were of this server.
const FOREIGN_MAX: usize = 65_536;

/// Values of a peer that are put at a time.
const TAKEN_AT_ONCE: usize = 256;

/// The longest address of a registration, in bytes.
const ADDRESS_LEN_MAX: usize = 256;

/// The other servers of a mesh.
pub(crate) struct Mesh {
    handle: Handle,
    /// Where peers reach this server; without it this server registers nowhere, and others may join it.
    own: Option<String>,
    named: Vec<String>,
    state: Mutex<State>,
    /// All that a peer has is held by one joining at a time.
    joining: AsyncMutex<()>,
    /// A set of a peer is done.
    applied: Notify,
    registered: Notify,
}

#[derive(Default)]
struct State {
    peers: Vec<String>,
    /// Those that have no task yet.
    new: Vec<String>,
    /// Keys that sets of peers are about to change, and how many those are.
    under_way: HashMap<Key, usize>,
    /// Revisions that are of peers.
    foreign: BTreeSet<u64>,
}

impl fmt::Debug for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mesh").field("own", &self.own).field("named", &self.named).finish_non_exhaustive()
    }
}

impl Mesh {
    pub(crate) fn new(handle: Handle, own: Option<String>, named: Vec<String>) -> Arc<Self> {
        let mut named: Vec<String> = named.into_iter().filter(|peer| own.as_ref() != Some(peer)).collect();
        named.sort_unstable();
        named.dedup();
        let state = Mutex::new(State { peers: named.clone(), new: named.clone(), ..State::default() });
        let (applied, registered) = (Notify::new(), Notify::new());
        Arc::new(Mesh { handle, own, named, state, joining: AsyncMutex::default(), applied, registered })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends peers what is put here, until the node stops.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut sending = JoinSet::new();
        let mut stopping = std::pin::pin!(self.handle.stopping());
        loop {
            for address in std::mem::take(&mut self.state().new) {
                sending.spawn(Arc::clone(&self).serve(address));
            }
            tokio::select! {
                biased;
                () = &mut stopping => return,
                Some(_) = sending.join_next() => {}
                () = self.registered.notified() => {}
            }
        }
    }

    /// Puts what a peer has, by the handle of its connection: it is not sent on.
    pub(crate) async fn apply(&self, handle: &Handle, key: &Key, value: String) -> nkv_node::Result<Revision> {
        {
            let mut state = self.state();
            let count = state.under_way.entry(key.clone()).or_default();
            *count = count.saturating_add(1);
        }
        let _done = Done { mesh: self, key };
        let revision = handle.put(key, value).await?;
        let mut state = self.state();
        state.foreign.insert(revision.get());
        if state.foreign.len() > FOREIGN_MAX {
            state.foreign.pop_first();
        }
        drop(state);
        Ok(revision)
    }

    /// The value of a key at a revision, if it is the newest, a text, and not of a peer. What replaced it comes later.
    async fn own_text(&self, key: &Key, revision: u64) -> nkv_node::Result<Option<String>> {
        loop {
            let applied = self.applied.notified();
            let mut applied = std::pin::pin!(applied);
            applied.as_mut().enable();
            let newest = self.handle.look_up(key.as_str(), |record| {
                (record.revision.get() == revision).then(|| String::from_utf8(record.value.to_bytes().into()).ok())
            })?;
            let Some(text) = newest.flatten().flatten() else { return Ok(None) };
            {
                let state = self.state();
                if state.foreign.contains(&revision) {
                    return Ok(None);
                }
                if !state.under_way.contains_key(key) {
                    return Ok(Some(text));
                }
            }
            applied.await;
        }
    }

    /// Remembers a peer that registers: one that was named, or whose host is where its call comes from.
    pub(crate) async fn register(&self, address: &str, caller: &str) -> Result<(), Status> {
        let is_named = self.named.iter().any(|named| named == address);
        let (host, port) = address.rsplit_once(':').unwrap_or((address, ""));
        if address.len() > ADDRESS_LEN_MAX || host.is_empty() || !port.parse().is_ok_and(|port: u16| port > 0) {
            return Err(Status::invalid_argument("a server registers as HOST:PORT"));
        }
        if !is_named {
            let caller =
                ip_of(caller).ok_or_else(|| Status::invalid_argument("it is not known where the call comes from"))?;
            let found = timeout(CONNECT_LIMIT, lookup_host(address)).await;
            let is_there = found
                .is_ok_and(|found| found.is_ok_and(|mut found| found.any(|found| found.ip().to_canonical() == caller)));
            if !is_there {
                let message = format!("'{address}' is not where the call comes from, and is no --peer of this server");
                return Err(Status::invalid_argument(message));
            }
        }
        let mut state = self.state();
        if state.peers.iter().any(|known| known == address) {
            return Ok(());
        }
        if state.peers.len() >= PEERS_MAX {
            return Err(Status::resource_exhausted(format!("this server has {PEERS_MAX} peers already")));
        }
        state.peers.push(address.to_owned());
        state.new.push(address.to_owned());
        drop(state);
        tracing::info!(peer = address, "a server joins");
        self.registered.notify_one();
        Ok(())
    }

    /// Sends one peer what is put here, for as long as it is known.
    async fn serve(self: Arc<Self>, address: String) {
        let (mut sent, mut failures, mut last_reached) = (None, 0_u32, Instant::now());
        loop {
            let mut is_reached = false;
            let error = match self.send(&address, &mut sent, &mut is_reached).await {
                Ok(()) => return,
                Err(error) => error,
            };
            if is_reached {
                (failures, last_reached) = (0, Instant::now());
            }
            failures = failures.saturating_add(1);
            self.handle.log().warn("peer", format_args!("the peer {address} is not in reach: {error}"));
            if last_reached.elapsed() > FORGOTTEN_AFTER && !self.named.contains(&address) {
                self.state().peers.retain(|known| *known != address);
                tracing::info!(peer = address, "a server is forgotten");
                return;
            }
            let span = PAUSE_MIN.saturating_mul(1 << failures.min(16)).min(PAUSE_MAX);
            // Without random numbers all pauses are of one length.
            let part = f64::from(getrandom::u32().unwrap_or_default()) / f64::from(u32::MAX);
            sleep(span.mul_f64(0.5 + part / 2.0)).await;
        }
    }

    /// Joins a peer, and sends it what changes; up to where it has all is in `sent`. Ends well when the node stops.
    async fn send(
        self: &Arc<Self>,
        address: &str,
        sent: &mut Option<Cursor>,
        is_reached: &mut bool,
    ) -> Result<(), Failed> {
        // A name is looked up each time. No pings of HTTP/2: servers of the original close connections that send them.
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?.tcp_keepalive(Some(KEEP_ALIVE));
        let channel = endpoint.connect_timeout(CONNECT_LIMIT).connect().await?;
        let mut peer = ClientClient::new(channel).max_decoding_message_size(ANSWER_LEN_MAX);
        let mut options = TailOptions::default();
        if let Some(known) = *sent {
            options = options.with_after(known);
        }
        let mut tail = self.handle.tail("*", options)?;
        // What was written or deleted here since; at first all that is here.
        let (mut changed, mut synced) = (HashMap::new(), None);
        while synced.is_none() {
            match tail.next().await {
                Some((TailEvent::Put { entry, .. }, _)) => {
                    changed.insert(entry.key, Some(entry.revision.get()));
                }
                Some((TailEvent::Delete { key, .. }, _)) => drop(changed.insert(key, None)),
                Some((TailEvent::Synced { .. }, cursor)) => synced = cursor,
                Some((TailEvent::Ended(_), _)) | None => return Ok(()),
                Some(_) => {}
            }
        }
        {
            let _one = self.joining.lock().await;
            let asked = async {
                match &self.own {
                    Some(own) => peer.register_with_peer(Ip { ip: own.clone() }).await,
                    None => peer.list(Void {}).await,
                }
            };
            let store = timeout(CALL_LIMIT, asked).await??;
            *is_reached = true;
            self.take(store.into_inner().store, &mut changed).await;
        }
        for (key, revision) in changed {
            if let Some(revision) = revision {
                self.send_one(&mut peer, &key, revision).await?;
            }
        }
        *sent = synced.or(*sent);
        loop {
            match tail.next().await {
                Some((TailEvent::Put { entry, .. }, cursor)) => {
                    self.send_one(&mut peer, &entry.key, entry.revision.get()).await?;
                    *sent = cursor.or(*sent);
                }
                Some((TailEvent::Ended(_), _)) | None => return Ok(()),
                // A delete has no form.
                Some((_, cursor)) => *sent = cursor.or(*sent),
            }
        }
    }

    /// Puts what a peer has, but for what was written or deleted here since. What is the same there is taken out of `changed`.
    async fn take(self: &Arc<Self>, store: BTreeMap<String, String>, changed: &mut HashMap<Key, Option<u64>>) {
        let (mut taken, mut under_way) = (0_u64, JoinSet::new());
        let mut note = |put: Result<nkv_node::Result<Revision>, JoinError>| match put {
            Ok(Ok(_)) => taken = taken.saturating_add(1),
            Ok(Err(error)) => self.handle.log().warn("peer", format_args!("a value of a peer is not taken: {error}")),
            Err(error) => self.handle.log().warn("peer", format_args!("a value of a peer is not taken: {error}")),
        };
        for (key, value) in store {
            let Ok(key) = Key::new(&key) else { continue };
            let is_same = |text: &[u8]| text == value.as_bytes();
            if self.handle.look_up(key.as_str(), |record| is_same(&record.value)).ok().flatten() == Some(true) {
                changed.remove(&key);
                continue;
            }
            if changed.contains_key(&key) {
                continue;
            }
            if under_way.len() >= TAKEN_AT_ONCE
                && let Some(put) = under_way.join_next().await
            {
                note(put);
            }
            let mesh = Arc::clone(self);
            under_way.spawn(async move { mesh.apply(&mesh.handle, &key, value).await });
        }
        while let Some(put) = under_way.join_next().await {
            note(put);
        }
        tracing::info!(taken, "joined a server");
    }

    /// Sends the value that a key has at a revision, if that is for peers.
    async fn send_one(&self, peer: &mut ClientClient<Channel>, key: &Key, revision: u64) -> Result<(), Failed> {
        if let Some(value) = self.own_text(key, revision).await? {
            let set = SetKey { key: key.as_str().to_owned(), value, broadcast: false };
            timeout(CALL_LIMIT, peer.set(set)).await??;
        }
        Ok(())
    }
}

/// Why a peer was not reached.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("{0}")]
    Transport(String),
    #[error("{0}")]
    Status(#[from] Status),
    #[error("{0}")]
    Node(#[from] nkv_node::Error),
    #[error("no answer in {CALL_LIMIT:?}")]
    Late(#[from] Elapsed),
}

impl From<tonic::transport::Error> for Failed {
    fn from(error: tonic::transport::Error) -> Self {
        Failed::Transport(Chain(&error).to_string())
    }
}

/// A set of a peer that is under way.
struct Done<'a> {
    mesh: &'a Mesh,
    key: &'a Key,
}

impl Drop for Done<'_> {
    fn drop(&mut self) {
        let mut state = self.mesh.state();
        if let Some(count) = state.under_way.get_mut(self.key) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                state.under_way.remove(self.key);
            }
        }
        drop(state);
        self.mesh.applied.notify_waiters();
    }
}

/// The host of `IP:PORT`.
fn ip_of(address: &str) -> Option<IpAddr> {
    address.parse().ok().map(|address: std::net::SocketAddr| address.ip().to_canonical())
}

#[cfg(test)]
mod tests {
    use nkv_node::Node;

    use super::*;

    #[tokio::test]
    async fn a_value_that_was_replaced_waits_for_no_peer() {
        let node = Node::builder().start().await.unwrap();
        let mesh = Mesh::new(node.handle(), None, Vec::new());
        let key: Key = "k".parse().unwrap();
        let (first, second) =
            (node.handle().put(&key, "1").await.unwrap(), node.handle().put(&key, "2").await.unwrap());
        // A peer sets the key, one time after the other.
        mesh.state().under_way.insert(key.clone(), 1);
        let first = timeout(CALL_LIMIT, mesh.own_text(&key, first.get())).await;
        assert_eq!(first.unwrap().unwrap(), None);
        mesh.state().under_way.clear();
        assert_eq!(mesh.own_text(&key, second.get()).await.unwrap().as_deref(), Some("2"));
    }
}
