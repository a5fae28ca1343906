//! A mesh of servers of the replicated gRPC store: each sends every put to all others, once, and takes what they have when it
//! joins.
//!
//! What is to be sent is a subscription of each peer: one that is slow or away costs a caller nothing, and gets the newest value
//! of each key when it is there. There are no deletes and no order in this protocol, so two sets of one key at once on two
//! servers may stay different. Servers of nkv find out by their registrations that they are: those are kept alike by a
//! [`MeshSync`], and send each other nothing by this protocol.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use nkv_node::{Chain, Cursor, EndReason, ErrorKind, Handle, Key, PutOptions, Revision, Tail, TailEvent, TailOptions};
use tokio::net::lookup_host;
use tokio::sync::{Mutex as AsyncMutex, Notify};
use tokio::task::{JoinError, JoinSet};
use tokio::time::error::Elapsed;
use tokio::time::{Instant, sleep, timeout};
use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use tonic::{Code, Request, Status, Streaming};

use crate::kv::{GetKey, Ip, SetKey, StoreReply, Void};
use crate::node_kv::ANSWER_LEN_MAX;
use crate::options::Options;
use crate::peer::Peer;

/// Peers at most: those that were named, and those that registered.
const PEERS_MAX: usize = 64;

/// A peer that was not named is forgotten when it could not be reached for this long.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(24 * 60 * 60);

const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// A connection that lasted this long is no failure: pauses begin anew after it.
const LASTED: Duration = Duration::from_secs(1);

pub(crate) const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// How long a peer may take to answer.
const CALL_LIMIT: Duration = Duration::from_secs(10);

/// Of how many of the latest revisions it is known that they are of peers. A value that a slow peer did not get by then is sent to
/// it as if it were of this server.
const FOREIGN_MAX: usize = 65_536;

/// Values of a peer that are put at a time.
const TAKEN_AT_ONCE: usize = 256;

/// The longest address of a registration, in bytes.
const ADDRESS_LEN_MAX: usize = 256;

/// What servers of nkv add to a registration and to its answer, in this version: the port and the number of a [`MeshSync`]. Other
/// servers leave it unread.
pub(crate) const SYNC: &str = "nkv-sync-1";

/// How often it is looked whether this server has begun.
const BEGIN_PAUSE: Duration = Duration::from_millis(10);

/// How often a server of nkv registers again with another one, which may have been started anew.
const REGISTER_AGAIN: Duration = Duration::from_secs(5);

/// The longest answer of a server of nkv to a registration, which has no values.
const EMPTY_LEN_MAX: usize = 4 << 10;

/// After how long a server of the original is sent what came from another server of nkv, if it has not got it by then: most often
/// it has it from there, or has sent it itself.
const LATER: Duration = Duration::from_secs(1);

/// What may wait for that, for one peer. What is over it waits in the subscription.
const LATER_MAX: usize = 4_096;

/// Keys, and the revisions of those that have values.
type Changed = HashMap<Key, Option<u64>>;

/// Up to where changes are known, as a revision and as a cursor.
type Synced = (u64, Option<Cursor>);

/// What keeps the servers of nkv in a mesh alike, deletes and TTLs included, beside the protocol of the replicated gRPC store. A server
/// that speaks that protocol alone is an *original* below.
#[tonic::async_trait]
pub trait MeshSync: fmt::Debug + Send + Sync + 'static {
    /// The port of this server where others of nkv reach it for that, and the number that it is known by; nothing, as long as it
    /// has none.
    fn own(&self) -> Option<(u16, u64)>;

    /// The servers of nkv in the mesh are these from now on: the number of each, and where it is reached. One that is reached nowhere
    /// may reach this one. May not block.
    fn set_found(&self, found: BTreeMap<u64, BTreeSet<SocketAddr>>);

    /// Whether what there is of a key was written here, and did not come from another server of nkv.
    fn wrote(&self, key: &Key) -> bool;

    /// Takes values of an original that this server has no values for: they are older than all that any server of nkv has, or knows
    /// to be deleted.
    ///
    /// # Errors
    ///
    /// If they were not stored.
    async fn take_older(&self, values: Vec<(Key, Bytes)>) -> io::Result<()>;
}

/// A change that is sent later, or was sent after one that is.
struct Waiting {
    since: Instant,
    put: Option<(Key, u64)>,
    /// Up to where the peer has all then.
    cursor: Option<Cursor>,
}

/// The other servers of a mesh.
pub(crate) struct Mesh {
    handle: Handle,
    /// Where peers reach this server; without it this server registers nowhere, and others may join it.
    own: Option<String>,
    named: Vec<String>,
    sync: Option<Arc<dyn MeshSync>>,
    state: Mutex<State>,
    /// All that a peer has is held by one joining at a time.
    joining: AsyncMutex<()>,
    /// A set of a peer is done.
    applied: Notify,
    registered: Notify,
}

/// What is known of a peer that is a server of nkv. Servers know each other by their numbers: two may see each other at several
/// addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Identity {
    /// Its number, and where it is reached.
    at: Option<(u64, SocketAddr)>,
    /// The number of one that registered by this address from a host that does not have it. That host is not connected to.
    elsewhere: Option<u64>,
}

impl Identity {
    /// Notes a registration from there, or from a host that does not have the address.
    fn note_registered(&mut self, number: u64, from: Option<SocketAddr>) {
        match (from, self.at) {
            (None, _) => self.elsewhere = Some(number),
            // It may have several addresses: one that is known stays, or connections would be made anew each time.
            (Some(from), Some((before, at))) if (before, at.port()) == (number, from.port()) => {}
            (Some(from), _) => self.at = Some((number, from)),
        }
    }
}

#[derive(Default)]
struct State {
    peers: BTreeMap<String, Identity>,
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
    pub(crate) fn new(handle: Handle, options: &Options) -> Arc<Self> {
        let (own, sync) = (options.own_address.clone(), options.mesh_sync.clone());
        let mut named: Vec<String> = options.peers.iter().filter(|peer| own.as_ref() != Some(peer)).cloned().collect();
        named.sort_unstable();
        named.dedup();
        let peers = named.iter().map(|peer| (peer.clone(), Identity::default())).collect();
        let state = Mutex::new(State { peers, new: named.clone(), ..State::default() });
        let (applied, registered) = (Notify::new(), Notify::new());
        Arc::new(Mesh { handle, own, named, sync, state, joining: AsyncMutex::default(), applied, registered })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends peers what is put here, until the node stops.
    pub(crate) async fn run(self: Arc<Self>) {
        let mut sending = JoinSet::new();
        let mut stopping = std::pin::pin!(self.handle.stopping());
        let has_begun =
            || self.sync.as_ref().is_none_or(|sync| sync.own().is_some()) && self.handle.check_healthy().is_ok();
        while !has_begun() {
            tokio::select! {
                biased;
                () = &mut stopping => return,
                () = sleep(BEGIN_PAUSE) => {}
            }
        }
        loop {
            let new = std::mem::take(&mut self.state().new);
            for address in new {
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
    pub(crate) async fn apply(
        &self,
        handle: &Handle,
        key: &Key,
        value: String,
        options: PutOptions,
    ) -> nkv_node::Result<Revision> {
        {
            let mut state = self.state();
            let count = state.under_way.entry(key.clone()).or_default();
            *count = count.saturating_add(1);
        }
        let _done = Done { mesh: self, key };
        let revision = handle.put_with(key, value, options).await?;
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

    /// Remembers a peer that registers: one that was named, or whose host is where its call comes from. Gives what is to be added
    /// to the answer if both are servers of nkv.
    pub(crate) async fn register(
        &self,
        address: &str,
        caller: &str,
        metadata: &MetadataMap,
    ) -> Result<Option<AsciiMetadataValue>, Status> {
        let is_named = self.named.iter().any(|named| named == address);
        let (host, port) = address.rsplit_once(':').unwrap_or((address, ""));
        if address.len() > ADDRESS_LEN_MAX || host.is_empty() || !port.parse().is_ok_and(|port: u16| port > 0) {
            return Err(Status::invalid_argument("a server registers as HOST:PORT"));
        }
        let theirs = self.sync.as_ref().and_then(|_| said(metadata));
        let own = self.sync_value();
        if theirs.is_some() && own.is_none() {
            return Err(Status::unavailable("this server begins: register again"));
        }
        if theirs.is_some_and(|(_, number)| self.is_own(number)) {
            return Ok(own);
        }
        // Also of one that was named: it may be reached for that where its call comes from, and nowhere else.
        let mut there = None;
        if !is_named || theirs.is_some() {
            let found = timeout(CONNECT_LIMIT, lookup_host(address)).await;
            let mut found = found.into_iter().flatten().flatten().map(|found| found.ip().to_canonical());
            there = ip_of(caller).filter(|caller| found.any(|found| found == *caller));
        }
        if !is_named && there.is_none() {
            let message = format!("'{address}' is not where the call comes from, and is no --peer of this server");
            return Err(Status::invalid_argument(message));
        }
        {
            let mut state = self.state();
            if !state.peers.contains_key(address) {
                if state.peers.len() >= PEERS_MAX {
                    return Err(Status::resource_exhausted(format!("this server has {PEERS_MAX} peers already")));
                }
                state.peers.insert(address.to_owned(), Identity::default());
                state.new.push(address.to_owned());
                tracing::info!(peer = address, "a server joins");
                self.registered.notify_one();
            }
        }
        let Some((port, number)) = theirs else { return Ok(None) };
        self.note(address, |known| known.note_registered(number, there.map(|ip| SocketAddr::new(ip, port))));
        Ok(own)
    }

    /// Notes what a peer is; lets the other side know what changed.
    fn note(&self, address: &str, change: impl FnOnce(&mut Identity)) {
        let Some(sync) = &self.sync else { return };
        let mut state = self.state();
        let Some(known) = state.peers.get_mut(address) else { return };
        let before = *known;
        change(known);
        if *known == before {
            return;
        }
        let now = *known;
        let mut found: BTreeMap<u64, BTreeSet<SocketAddr>> = BTreeMap::new();
        for known in state.peers.values() {
            known.elsewhere.iter().for_each(|number| _ = found.entry(*number).or_default());
            known.at.iter().for_each(|(number, at)| _ = found.entry(*number).or_default().insert(*at));
        }
        // With the lock: what is newer is said later.
        sync.set_found(found);
        drop(state);
        if let Some((number, at)) = now.at
            && now.at != before.at
        {
            let what = format_args!("the peer {address} is the server {number:016x} of nkv, reached at {at}");
            self.handle.log().info("found", what);
        }
    }

    fn is_own(&self, number: u64) -> bool {
        self.sync.as_ref().and_then(|sync| sync.own()).is_some_and(|(_, own)| own == number)
    }

    /// What this server adds to a registration, or to the answer.
    fn sync_value(&self) -> Option<AsciiMetadataValue> {
        let (port, number) = self.sync.as_ref()?.own()?;
        format!("{port} {number:016x}").parse().ok()
    }

    /// Sends one peer what is put here, for as long as it is known.
    async fn serve(self: Arc<Self>, address: String) {
        let (mut sent, mut failures, mut last_reached) = (None, 0_u32, Instant::now());
        loop {
            let mut reached = None;
            let error = match self.send(&address, &mut sent, &mut reached).await {
                Ok(()) => return,
                Err(error) => error,
            };
            if let Some(reached) = reached {
                last_reached = Instant::now();
                // One that answers and ends the connection is not reached at once again and again.
                if last_reached.duration_since(reached) >= LASTED {
                    failures = 0;
                }
            }
            failures = failures.saturating_add(1);
            self.handle.log().warn("peer", format_args!("the peer {address}: {error}"));
            if last_reached.elapsed() > FORGOTTEN_AFTER && !self.named.contains(&address) {
                self.note(&address, |known| *known = Identity::default());
                self.state().peers.remove(&address);
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
        reached: &mut Option<Instant>,
    ) -> Result<(), Failed> {
        let mut peer = Peer::connect(address).await?;
        let (theirs, mut answer) = self.register_with(&peer, ANSWER_LEN_MAX).await?;
        *reached = Some(Instant::now());
        if let Some(theirs) = theirs {
            *sent = None;
            return self.keep_found(address, &mut peer, theirs).await;
        }
        self.note(address, |known| *known = Identity::default());
        // Not earlier: a peer that does not answer holds up no other one.
        let one = self.joining.lock().await;
        let store = timeout(CALL_LIMIT, answer.message()).await??.unwrap_or_default().store;
        let Some((tail, synced, mut changed)) = self.changed_since(*sent).await? else { return Ok(()) };
        let taken = self.take(store, &mut changed, synced.0).await;
        drop(one);
        self.handle.log().info("joined", format_args!("joined the peer {address}, and took {taken} values"));
        let mut has_all = true;
        for (key, revision) in changed {
            if let Some(revision) = revision {
                has_all &= self.send_one(&mut peer, &key, revision, false).await?;
            }
        }
        if has_all {
            *sent = synced.1.or(*sent);
        }
        self.send_changes(&mut peer, tail, sent, has_all).await
    }

    /// What was written or deleted here since, or all that is here; up to where that is; and what follows. Nothing if the node stops.
    async fn changed_since(&self, sent: Option<Cursor>) -> Result<Option<(Tail, Synced, Changed)>, Failed> {
        let mut options = TailOptions::default();
        if let Some(known) = sent {
            options = options.with_after(known);
        }
        let mut tail = self.handle.tail("*", options)?;
        let mut changed = HashMap::new();
        loop {
            match tail.next().await {
                Some((TailEvent::Put { entry, .. }, _)) => {
                    changed.insert(entry.key, Some(entry.revision.get()));
                }
                Some((TailEvent::Delete { key, .. }, _)) => drop(changed.insert(key, None)),
                Some((TailEvent::Synced { revision, .. }, cursor)) => {
                    return Ok(Some((tail, (revision.get(), cursor), changed)));
                }
                Some((TailEvent::Ended(EndReason::Closed), _)) | None => return Ok(None),
                Some((TailEvent::Ended(_), _)) => return Err(Failed::Unsubscribed),
                Some(_) => {}
            }
        }
    }

    /// Sends a peer what changes: what was written here at once, and what came from others of nkv later. Where it has refused something,
    /// `sent` stays before that.
    async fn send_changes(
        &self,
        peer: &mut Peer,
        mut tail: Tail,
        sent: &mut Option<Cursor>,
        mut has_all: bool,
    ) -> Result<(), Failed> {
        let mut later: VecDeque<Waiting> = VecDeque::new();
        loop {
            let pause = later.front().map(|first| LATER.saturating_sub(first.since.elapsed()));
            let event = tokio::select! {
                biased;
                () = sleep(pause.unwrap_or_default()), if pause.is_some() => None,
                _ = &mut peer.ended => return Err(Failed::Ended),
                event = tail.next(), if later.len() < LATER_MAX => Some(event),
            };
            let (mut put, cursor) = match event {
                None => {
                    let Some(Waiting { put, cursor, .. }) = later.pop_front() else { continue };
                    if let Some((key, revision)) = put {
                        has_all &= self.send_one(peer, &key, revision, true).await?;
                    }
                    if has_all {
                        *sent = cursor.or(*sent);
                    }
                    continue;
                }
                Some(Some((TailEvent::Ended(EndReason::Closed), _)) | None) => return Ok(()),
                Some(Some((TailEvent::Ended(_), _))) => return Err(Failed::Unsubscribed),
                Some(Some((TailEvent::Put { entry, .. }, cursor))) => (Some((entry.key, entry.revision.get())), cursor),
                // A delete has no form.
                Some(Some((_, cursor))) => (None, cursor),
            };
            if let Some((key, revision)) = &put
                && self.sync.as_ref().is_none_or(|sync| sync.wrote(key))
            {
                has_all &= self.send_one(peer, key, *revision, false).await?;
                put = None;
            }
            match later.back_mut() {
                None if put.is_none() && !has_all => {}
                None if put.is_none() => *sent = cursor.or(*sent),
                Some(last) if put.is_none() => last.cursor = cursor.or(last.cursor),
                _ => later.push_back(Waiting { since: Instant::now(), put, cursor }),
            }
        }
    }

    /// Registers with a peer, which answers all that it has, unless both are servers of nkv: then it says its port and its number.
    async fn register_with(
        &self,
        peer: &Peer,
        len_max: usize,
    ) -> Result<(Option<(u16, u64)>, Streaming<StoreReply>), Failed> {
        let asked = async {
            let Some(own) = &self.own else {
                return peer.begin_store("/kv.Client/List", Request::new(Void {}), len_max).await;
            };
            let mut request = Request::new(Ip { ip: own.clone() });
            self.sync_value().and_then(|value| request.metadata_mut().insert(SYNC, value));
            peer.begin_store("/kv.Client/RegisterWithPeer", request, len_max).await
        };
        let (metadata, answer, _) = timeout(CALL_LIMIT, asked).await??.into_parts();
        Ok((self.sync.as_ref().and_then(|_| said(&metadata)), answer))
    }

    /// Registers again and again with a peer that is a server of nkv, for as long as it is.
    async fn keep_found(&self, address: &str, peer: &mut Peer, mut theirs: (u16, u64)) -> Result<(), Failed> {
        loop {
            let (port, number) = theirs;
            if self.is_own(number) {
                tracing::info!(peer = address, "this is the server itself");
                _ = (&mut peer.ended).await;
                return Err(Failed::Ended);
            }
            let at = SocketAddr::new(peer.ip, port);
            self.note(address, |known| known.at = Some((number, at)));
            tokio::select! {
                biased;
                _ = &mut peer.ended => return Err(Failed::Ended),
                () = sleep(REGISTER_AGAIN) => {}
            }
            // An answer of a server of nkv has no values.
            let (again, mut answer) = self.register_with(peer, EMPTY_LEN_MAX).await?;
            timeout(CALL_LIMIT, answer.message()).await??;
            theirs = again.ok_or(Failed::Turned)?;
        }
    }

    /// Puts what a peer has, but for what was written or deleted here since: as `changed` says up to a revision, and as keys say after
    /// it. What is the same there is taken out of `changed`. Says how many were put.
    async fn take(self: &Arc<Self>, store: BTreeMap<String, String>, changed: &mut Changed, synced: u64) -> u64 {
        let has_conditions = self.handle.abilities().conditions;
        let (mut taken, mut under_way) = (0_u64, JoinSet::new());
        let mut older = Vec::new();
        let note_older = |taken: io::Result<()>| {
            if let Err(error) = taken {
                self.handle.log().warn("peer", format_args!("values of a peer are not taken: {error}"));
            }
        };
        let mut note = |put: Result<nkv_node::Result<Revision>, JoinError>| match put {
            Ok(Ok(_)) => taken = taken.saturating_add(1),
            Ok(Err(error)) if matches!(error.kind(), ErrorKind::Conflict { .. }) => {}
            Ok(Err(error)) => self.handle.log().warn("peer", format_args!("a value of a peer is not taken: {error}")),
            Err(error) => self.handle.log().warn("peer", format_args!("a value of a peer is not taken: {error}")),
        };
        for (key, value) in store {
            let Ok(key) = Key::new(&key) else { continue };
            let is_same = |text: &[u8]| text == value.as_bytes();
            let here = self.handle.look_up(key.as_str(), |record| (is_same(&record.value), record.revision.get()));
            let here = here.ok().flatten();
            if here.is_some_and(|(is_same, _)| is_same) {
                changed.remove(&key);
                continue;
            }
            if changed.contains_key(&key) || here.is_some_and(|(_, revision)| revision > synced) {
                continue;
            }
            if let (None, Some(sync)) = (here, &self.sync) {
                older.push((key, Bytes::from(value)));
                if older.len() >= TAKEN_AT_ONCE {
                    note_older(sync.take_older(std::mem::take(&mut older)).await);
                }
                continue;
            }
            if under_way.len() >= TAKEN_AT_ONCE
                && let Some(put) = under_way.join_next().await
            {
                note(put);
            }
            let mut options = PutOptions::default();
            if has_conditions {
                options = options.with_if_revision(Revision::new(here.map_or(0, |(_, revision)| revision)));
            }
            let mesh = Arc::clone(self);
            under_way.spawn(async move { mesh.apply(&mesh.handle, &key, value, options).await });
        }
        if let Some(sync) = &self.sync {
            note_older(sync.take_older(older).await);
        }
        while let Some(put) = under_way.join_next().await {
            note(put);
        }
        taken
    }

    /// Sends the value that a key has at a revision, if that is for peers, and with `if_other` only if the peer has another one or none.
    /// Says whether the peer has it now: it may refuse one, which does not keep it from others.
    async fn send_one(&self, peer: &mut Peer, key: &Key, revision: u64, if_other: bool) -> Result<bool, Failed> {
        let Some(value) = self.own_text(key, revision).await? else { return Ok(true) };
        let asked = async {
            if if_other {
                let has = peer.client.get(GetKey { key: key.as_str().to_owned() }).await?.into_inner();
                if has.defined && has.value == value {
                    return Ok(());
                }
            }
            let set = SetKey { key: key.as_str().to_owned(), value, broadcast: false };
            peer.client.set(set).await.map(drop)
        };
        match timeout(CALL_LIMIT, asked).await? {
            Ok(()) => Ok(true),
            Err(status) if is_refusal(&status) => {
                self.handle.log().warn("refuses", format_args!("a peer does not take the value of '{key}': {status}"));
                Ok(false)
            }
            Err(status) => Err(status.into()),
        }
    }
}

/// Whether a peer does not take one value, as it is too long, most often.
fn is_refusal(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange | Code::ResourceExhausted
    )
}

/// What a server of nkv has added to a registration, or to the answer.
fn said(metadata: &MetadataMap) -> Option<(u16, u64)> {
    let (port, number) = metadata.get(SYNC)?.to_str().ok()?.split_once(' ')?;
    let port = port.parse().ok().filter(|port| *port > 0)?;
    Some((port, u64::from_str_radix(number, 16).ok()?))
}

/// Why a peer was not reached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failed {
    #[error("{0}")]
    Transport(String),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the connection has ended")]
    Ended,
    #[error("it is no server of nkv any more")]
    Turned,
    /// Each client may end each subscription.
    #[error("the subscription for it was ended")]
    Unsubscribed,
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

    /// Each registration from another address of a name had the connection of the cluster made anew, every five seconds.
    #[test]
    fn where_a_server_of_nkv_is_reached_does_not_change_with_each_registration() {
        let at = |text: &str| text.parse().ok();
        let mut known = Identity { at: Some((7, "10.0.0.1:7".parse().unwrap())), elsewhere: None };
        let before = known;
        known.note_registered(7, at("10.0.0.2:7"));
        assert_eq!(known, before);
        // It was started anew, with other ports, or is another one.
        known.note_registered(7, at("10.0.0.2:8"));
        assert_eq!(known.at, Some((7, "10.0.0.2:8".parse().unwrap())));
        known.note_registered(9, at("10.0.0.1:8"));
        assert_eq!(known.at, Some((9, "10.0.0.1:8".parse().unwrap())));
        // A stranger parts no one from a peer.
        known.note_registered(5, None);
        assert_eq!((known.at.unwrap().0, known.elsewhere), (9, Some(5)));
    }

    #[tokio::test]
    async fn a_value_that_was_replaced_waits_for_no_peer() {
        let node = Node::builder().start().await.unwrap();
        let mesh = Mesh::new(node.handle(), &Options::default());
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
