//! The engine: one task that commits, one that accepts, one that finds peers, and one for each connection.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use nkv_core::{Change, Epoch, Key, Op, Pattern, Revision, StoredRef};
use nkv_node::{Abilities, Decided, Engine, EngineError, EngineNumber, Feed, RateLimitedLog, Seen};
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::clock::{Bound, BoundFile, Clock, NoBound, Now, PeerClocks, SystemClock, signed};
use crate::commit::{Committer, Job};
use crate::keys::Keys;
use crate::link::{Network, PushQueue, Tcp};
use crate::meeting;
use crate::members::{self, Events, Member, Members};
use crate::membership::Membership;
use crate::register::{Content, Record, Register};
use crate::replica::{Contact, Held, Place, Replica, Slot, Terms};
use crate::secure::{Secret, SecureTcp};
use crate::session::push_frames;
use crate::stamp::{Millis, NodeId, Stamp};
use crate::wire::Message;

/// Jobs that wait to be committed. A peer's waits in its connection then.
const JOBS_MAX: usize = 64;

/// How often a value is looked up that is just being replaced.
const LOOKS: usize = 64;

/// How long a node that was refused as a second one of its id takes no writes.
const REFUSED_FOR: Duration = Duration::from_secs(10);

/// How long a node that stops waits until its peers know that.
const LEAVE_LIMIT: Duration = Duration::from_secs(1);
const LEAVE_PAUSE: Duration = Duration::from_millis(10);

/// What a node of a cluster is to be. Times have the defaults that they say.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// The cluster's name: nodes of another one are refused.
    pub cluster: String,
    /// Where peers can reach this node: the bound address, unless it is unspecified (0.0.0.0).
    pub advertise: Option<SocketAddr>,
    /// How long deletes are remembered: 24 h. A node that is away for longer is levelled by what both had at their last contact.
    pub gc_grace: Duration,
    /// How often nodes compare what they have: 1 s, with four peers or less; with more, so much longer. What was pushed and did not
    /// arrive comes then.
    pub sync_interval: Duration,
    /// How far a clock may be off: 1 s.
    pub max_clock_offset: Duration,
    /// How long an empty node waits for the state of a peer, or for more of it: 5 s.
    pub join_timeout: Duration,
    /// How long a peer may take to answer, before the connection is made anew: 5 s.
    pub peer_timeout: Duration,
    /// Takes conditional writes, whose conditions hold on this node alone. Off by default.
    pub local_conditions: bool,
    /// The longest value, in bytes: 1 MiB.
    pub value_len_max: usize,
    /// Connects to addresses that the membership names, as long as it does, and to no others: what peers say of themselves and of
    /// each other is not tried. Off by default.
    pub named_only: bool,
    /// What all nodes share, to authenticate each other and encrypt what they say. Without it, which is the default, all that reach
    /// the port may be peers, and the port belongs into a trusted network. Nodes with and without keys refuse each other.
    pub keys: Option<Keys>,
    /// Where the upper bound of the clock is kept, for a node whose data outlive it: beside them.
    pub clock_file: Option<PathBuf>,
}

impl Options {
    /// The defaults, for a cluster of this name.
    #[must_use]
    pub fn new(cluster: impl Into<String>) -> Self {
        Options {
            cluster: cluster.into(),
            advertise: None,
            gc_grace: Duration::from_secs(24 * 60 * 60),
            sync_interval: Duration::from_secs(1),
            max_clock_offset: Duration::from_secs(1),
            join_timeout: Duration::from_secs(5),
            peer_timeout: Duration::from_secs(5),
            local_conditions: false,
            named_only: false,
            value_len_max: 1 << 20,
            keys: None,
            clock_file: None,
        }
    }
}

/// A node's part of a cluster: the engine that a [`Node`](nkv_node::Node) follows. Clones are of the same node.
#[derive(Clone, Debug)]
pub struct Cluster {
    inner: Arc<Inner>,
    secret: Option<Secret>,
}

impl Cluster {
    /// Listens for peers at an address, port 0 for any, and is ready to be followed by a node. `membership` says where peers are.
    ///
    /// # Errors
    ///
    /// Those of binding the address; [`InvalidInput`](io::ErrorKind::InvalidInput) for options that cannot be.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use nkv_cluster::{Cluster, Options, StaticPeers};
    /// use nkv_node::Node;
    ///
    /// let cluster = Cluster::bind("127.0.0.1:0".parse()?, Options::new("home"), StaticPeers::default()).await?;
    /// let node = Node::builder().engine(cluster).start().await?;
    /// # node.shutdown().await?;
    /// # Ok(()) }
    /// ```
    pub async fn bind(address: SocketAddr, mut options: Options, membership: impl Membership) -> io::Result<Cluster> {
        let listener = TcpListener::bind(address).await?;
        let bound = listener.local_addr()?;
        options.advertise = options.advertise.or((!bound.ip().is_unspecified()).then_some(bound));
        let secret = options.keys.clone().map(|keys| Secret::new(&options.cluster, keys));
        let network: Arc<dyn Network> = match &secret {
            // A connection has to be made and to be secured within the time-out of a peer.
            Some(secret) => Arc::new(SecureTcp::new(Tcp(listener), secret.clone(), options.peer_timeout / 2)),
            None => Arc::new(Tcp(listener)),
        };
        let parts = Parts {
            clock: Arc::new(SystemClock),
            random: Arc::new(SystemRandom),
            bound: match options.clock_file.clone() {
                Some(path) => Arc::new(BoundFile(path)),
                None => Arc::new(NoBound),
            },
            network,
            membership: Arc::new(membership),
        };
        Ok(Cluster { secret, ..Self::with(options, parts, bound)? })
    }

    pub(crate) fn with(options: Options, parts: Parts, bound: SocketAddr) -> io::Result<Cluster> {
        let wrong = |text: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        if options.cluster.is_empty() || options.cluster.len() > 255 {
            return wrong("the name of a cluster has 1 to 255 bytes");
        }
        if options.sync_interval.is_zero()
            || options.peer_timeout.is_zero()
            || options.max_clock_offset < Duration::from_millis(10)
        {
            return wrong("the sync interval and the peer timeout are above 0, and the clock offset is 10 ms at least");
        }
        if options.value_len_max > (u32::MAX / 2) as usize {
            return wrong("values are shorter than 2 GiB");
        }
        if options.advertise.is_some_and(|address| !can_be_reached(address)) {
            return wrong("the advertised address has an IP and a port that peers can reach");
        }
        let terms = Terms { gc_grace: millis(options.gc_grace), offset_max: millis(options.max_clock_offset) };
        let inner = Inner {
            run: parts.random.next()?,
            started: parts.clock.steady(),
            replica: Mutex::new(Replica::new(terms)),
            peer_clocks: Mutex::default(),
            run_by: Mutex::default(),
            peers: Mutex::default(),
            members: Members::default(),
            hurry: Notify::new(),
            ask: Notify::new(),
            joined: watch::Sender::new(false),
            given_at: AtomicU64::new(0),
            refused: Mutex::default(),
            figures: Figures::default(),
            log: RateLimitedLog::default(),
            bound,
            options,
            parts,
        };
        Ok(Cluster { inner: Arc::new(inner), secret: None })
    }

    /// Puts other keys in the place of those of [`Options::keys`], while the node runs. Connections that were made by a key which is
    /// among them go on; others end, and are made anew by the first key.
    ///
    /// # Errors
    ///
    /// [`InvalidInput`](io::ErrorKind::InvalidInput) on a node that was started without keys: it talks in plain text.
    pub fn set_keys(&self, keys: Keys) -> io::Result<()> {
        let Some(secret) = &self.secret else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "this node was started without keys"));
        };
        secret.set(keys);
        Ok(())
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.inner.bound
    }

    /// The id of this node, once it runs; it is kept with its data.
    #[must_use]
    pub fn id(&self) -> Option<NodeId> {
        self.inner.id()
    }

    /// The peers that this node is connected to, in either direction.
    #[must_use]
    pub fn peers(&self) -> Vec<NodeId> {
        self.inner.peers().connected.keys().copied().collect()
    }

    /// The other nodes that this one knows of, also those that are away, in the order of their ids.
    #[must_use]
    pub fn members(&self) -> Vec<Member> {
        members::members(&self.inner)
    }

    /// What changes about [`members`](Self::members): first those that are there join.
    ///
    /// # Examples
    ///
    /// ```
    /// # async fn log(cluster: nkv_cluster::Cluster) {
    /// let mut events = cluster.events();
    /// while let Some(event) = events.next().await {
    ///     println!("{event:?}");
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn events(&self) -> Events {
        Events::new(Arc::clone(&self.inner))
    }

    /// Says to the peers that this node is about to stop, and waits until that is on its way, or for a second: for them it has left
    /// then, and is not dead. To be called before the node that follows it is shut down.
    ///
    /// # Cancel safety
    ///
    /// Where the future is dropped, some peers may take this node for dead.
    pub async fn leave(&self) {
        let inner = &self.inner;
        // It is said over connections that this node has opened; one that waits for its next attempt does not wait any longer.
        inner.hurry.notify_waiters();
        let is_linked = || {
            let peers = inner.peers();
            peers.connected.keys().all(|id| peers.links.contains_key(id))
        };
        let linked = async {
            while !is_linked() {
                tokio::time::sleep(LEAVE_PAUSE).await;
            }
        };
        drop(tokio::time::timeout(LEAVE_LIMIT / 2, linked).await);
        let frame = Message::Leaving.encode();
        let queues: Vec<_> = inner.peers().links.values().map(|(queue, _)| Arc::clone(queue)).collect();
        queues.iter().for_each(|queue| queue.push(&frame));
        let sent = async {
            for queue in &queues {
                queue.written().await;
            }
        };
        drop(tokio::time::timeout(LEAVE_LIMIT / 2, sent).await);
    }

    /// Asks the membership now where peers are, and not only when it is time to.
    pub fn ask_again(&self) {
        self.inner.ask.notify_one();
    }

    /// Takes values that come from outside of the cluster, and are older than all that any node has or had of their keys: they stay
    /// where no node has a value or knows of a delete. One that is too long is left out.
    ///
    /// # Errors
    ///
    /// If they were not stored, or no node follows this.
    ///
    /// # Cancel safety
    ///
    /// Where the future is dropped, they are stored or not.
    pub async fn take_older(&self, values: impl IntoIterator<Item = (Key, Bytes)>) -> io::Result<()> {
        let fits = |(_, value): &(Key, Bytes)| value.len() <= self.inner.options.value_len_max;
        let record = |(key, value)| {
            let content = Content::Put { value, ttl: None };
            Record { key, register: Register::new(Stamp::default(), content) }
        };
        let records = values.into_iter().filter(fits).map(record).collect();
        let stored = self.inner.ask(|answer| Job::Merge { records, answer: Some(answer) }).await?;
        stored.map(drop).ok_or_else(|| io::Error::other("they were not stored"))
    }

    /// Whether what this node has of a key was written here, and not at another node.
    #[must_use]
    pub fn wrote(&self, key: &Key) -> bool {
        self.id().is_some_and(|own| self.inner.replica().writer(key) == Some(own))
    }

    /// How far the clock of this node is ahead of the median of its peers', in milliseconds; `None` where no peer has said.
    #[must_use]
    pub fn clock_offset(&self) -> Option<i64> {
        self.inner.clock_offset()
    }

    /// A number for all that this node has: nodes of equal digests have the same.
    #[must_use]
    pub fn digest(&self) -> u64 {
        self.inner.replica().digest(crate::tree::Prefix::ROOT)
    }

    /// How often a record was given to a peer that may bring back a key which was deleted meanwhile, after an absence longer than
    /// `gc_grace`.
    #[must_use]
    pub fn brought_back(&self) -> u64 {
        self.inner.figures.brought_back.load(Relaxed)
    }

    #[cfg(test)]
    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }
}

/// What a cluster needs of the world.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) random: Arc<dyn Random>,
    pub(crate) bound: Arc<dyn Bound>,
    pub(crate) network: Arc<dyn Network>,
    pub(crate) membership: Arc<dyn Membership>,
}

/// Random numbers.
pub(crate) trait Random: fmt::Debug + Send + Sync + 'static {
    fn next(&self) -> io::Result<u64>;
}

#[derive(Debug)]
struct SystemRandom;

impl Random for SystemRandom {
    fn next(&self) -> io::Result<u64> {
        getrandom::u64().map_err(|error| io::Error::other(error.to_string()))
    }
}

/// Where changes go: a node's feed.
#[async_trait]
pub(crate) trait Sink: fmt::Debug + Send + Sync + 'static {
    async fn apply(&self, changes: Vec<Change>) -> Result<(), EngineError>;

    /// The value that it has of a key, if it came at this revision.
    fn value(&self, key: &Key, revision: u64) -> Option<Bytes>;

    /// Begins an epoch, with nothing.
    async fn begin(&self, epoch: Epoch) -> Result<(), EngineError>;

    fn reached(&self);
}

#[async_trait]
impl Sink for Feed {
    async fn apply(&self, changes: Vec<Change>) -> Result<(), EngineError> {
        Feed::apply(self, changes).await.map(drop)
    }

    fn value(&self, key: &Key, revision: u64) -> Option<Bytes> {
        let mut value = None;
        self.walk(&Pattern::Exact(key.clone()), |record| {
            value = (record.revision.get() == revision).then(|| record.value.to_bytes());
        });
        value
    }

    async fn begin(&self, epoch: Epoch) -> Result<(), EngineError> {
        self.replace(Vec::new(), Revision::ZERO, epoch).await.map(drop)
    }

    fn reached(&self) {
        Feed::reached(self);
    }
}

type RunBy = (mpsc::Sender<Job>, Weak<dyn Sink>);

/// The node, for all its tasks.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) options: Options,
    pub(crate) parts: Parts,
    bound: SocketAddr,
    /// Random, of this run.
    pub(crate) run: u64,
    /// By the steady clock.
    started: Millis,
    replica: Mutex<Replica>,
    peer_clocks: Mutex<PeerClocks>,
    /// While it is followed: what is to be done, and the store of the node that follows, which has this in turn.
    run_by: Mutex<Option<RunBy>>,
    peers: Mutex<Peers>,
    pub(crate) members: Members,
    /// Attempts to connect are to be made now.
    pub(crate) hurry: Notify,
    /// The membership is to be asked now.
    pub(crate) ask: Notify,
    joined: watch::Sender<bool>,
    /// When a peer last gave something, by the steady clock.
    given_at: AtomicU64,
    /// Why it takes no writes, and until when by the steady clock.
    refused: Mutex<Option<(String, Millis)>>,
    pub(crate) figures: Figures,
    /// For what a peer can provoke.
    pub(crate) log: RateLimitedLog,
}

/// Who is connected.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    pub(crate) connected: BTreeMap<NodeId, Run>,
    /// What is to be pushed to those that this node has opened a connection to, and the longest frame that they take.
    pub(crate) links: BTreeMap<NodeId, (Arc<PushQueue>, usize)>,
    /// With whom this node leads a session.
    pub(crate) leading: BTreeSet<NodeId>,
    /// Who leads a session with this node.
    pub(crate) led_by: BTreeSet<NodeId>,
    /// With whom this node levels what differs, and since when.
    pub(crate) levelling: Option<(NodeId, Millis)>,
    /// Where those that said so can be reached, also when they are gone.
    pub(crate) addresses: BTreeMap<NodeId, SocketAddr>,
    /// What became of the addresses that were tried.
    pub(crate) tried: BTreeMap<SocketAddr, Tried>,
}

/// A run of a peer that is connected.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) number: u64,
    pub(crate) connections: usize,
    /// When something was last heard of it, by the steady clock.
    pub(crate) heard_at: Millis,
    /// Another run of the same id that wants to connect, and since when.
    pub(crate) rival: Option<(u64, Millis)>,
    pub(crate) level: Option<Level>,
}

/// The last session with a peer that ended whole.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Level {
    /// When it ended, by the steady clock.
    pub(crate) at: Millis,
    pub(crate) was_led_here: bool,
}

/// What became of an attempt to connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tried {
    /// Nothing listens there.
    Refused,
    Failed,
    /// It is this node itself.
    Myself,
    Met {
        id: NodeId,
        has_joined: bool,
    },
}

/// Keys in a line of the log: the first ones, quoted, escaped and cut, and how many more there are.
#[derive(Debug)]
pub(crate) struct NamedKeys<'a>(pub(crate) &'a [Key]);

impl NamedKeys<'_> {
    const KEYS_MAX: usize = 16;
    const CHARS_MAX: usize = 64;
}

impl fmt::Display for NamedKeys<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, key) in self.0.iter().take(Self::KEYS_MAX).enumerate() {
            f.write_str(if number > 0 { ", " } else { "" })?;
            match key.as_str().char_indices().nth(Self::CHARS_MAX) {
                Some((end, _)) => write!(f, "{:?}…", key.as_str().get(..end).unwrap_or_default())?,
                None => write!(f, "{key:?}")?,
            }
        }
        match self.0.len().saturating_sub(Self::KEYS_MAX) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Figures {
    brought_back: AtomicU64,
}

impl Inner {
    pub(crate) fn replica(&self) -> MutexGuard<'_, Replica> {
        self.replica.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn peers(&self) -> MutexGuard<'_, Peers> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn peer_clocks(&self) -> MutexGuard<'_, PeerClocks> {
        self.peer_clocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn id(&self) -> Option<NodeId> {
        self.replica().identity().map(|identity| identity.id)
    }

    pub(crate) fn random(&self) -> u64 {
        // Only spreads things in time: ids are taken elsewhere.
        self.parts.random.next().unwrap_or(self.run)
    }

    // Time.

    pub(crate) fn wall(&self) -> Millis {
        self.parts.clock.wall()
    }

    pub(crate) fn steady(&self) -> Millis {
        self.parts.clock.steady()
    }

    pub(crate) fn uptime(&self) -> Millis {
        self.steady().saturating_sub(self.started)
    }

    fn offset_max(&self) -> Millis {
        millis(self.options.max_clock_offset)
    }

    /// The time to believe.
    pub(crate) fn now(&self) -> Now {
        self.peer_clocks().now(self.wall(), self.steady(), self.offset_max())
    }

    pub(crate) fn clock_offset(&self) -> Option<i64> {
        self.peer_clocks().offset(self.wall(), self.steady()).map(|(offset, _)| offset)
    }

    /// How far the clocks of peers are ahead of this node's, by what is known.
    pub(crate) fn clock_offsets(&self) -> BTreeMap<NodeId, i64> {
        self.peer_clocks().offsets(self.wall(), self.steady())
    }

    /// Notes what a peer's clock showed, which was asked for then.
    pub(crate) fn note_clock(&self, peer: NodeId, wall: Millis, asked: Millis) {
        let answered = self.steady();
        self.peer_clocks().note(peer, wall, asked, answered);
    }

    /// Whether tombstones may be forgotten: peers agree with this node's clock, or there never was any.
    pub(crate) fn may_purge(&self) -> bool {
        match self.clock_offset() {
            Some(offset) => offset.unsigned_abs() <= self.offset_max(),
            None => {
                let is_alone = self.peers().tried.values().all(|tried| *tried == Tried::Myself);
                is_alone && !self.replica().has_contacts()
            }
        }
    }

    // States.

    pub(crate) fn has_joined(&self) -> bool {
        *self.joined.borrow()
    }

    pub(crate) fn join(&self) {
        self.joined.send_if_modified(|joined| !std::mem::replace(joined, true));
    }

    /// When a peer last gave something.
    pub(crate) fn given_at(&self) -> Millis {
        self.given_at.load(Relaxed)
    }

    pub(crate) async fn joined(&self) {
        let mut joined = self.joined.subscribe();
        drop(joined.wait_for(|joined| *joined).await);
    }

    /// This node is a second one of its id.
    pub(crate) fn note_refused(&self, reason: String) {
        self.log.error("second", format_args!("this node takes no writes: {reason}"));
        let until = self.steady().saturating_add(millis(REFUSED_FOR));
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = Some((reason, until));
    }

    /// Why this node takes no writes now.
    pub(crate) fn check_writes(&self) -> Result<(), EngineError> {
        let refused = |message: String| Err(EngineError::Refused { status: 503, message });
        let is_refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((reason, until)) = is_refused
            && self.steady() < until
        {
            return refused(format!("{reason}; nothing was changed"));
        }
        match self.clock_offset() {
            Some(offset) if offset > signed(self.offset_max()) => refused(format!(
                "the clock of this node is {offset} ms ahead of its peers', and {} ms is the limit; nothing was changed",
                self.offset_max()
            )),
            _ => Ok(()),
        }
    }

    // Jobs.

    fn run_by(&self) -> MutexGuard<'_, Option<RunBy>> {
        self.run_by.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn job(&self, job: Job) -> io::Result<()> {
        let jobs = self.run_by().as_ref().map(|(jobs, _)| jobs.clone());
        jobs.ok_or_else(stops)?.send(job).await.map_err(|_| stops())
    }

    async fn ask<T>(&self, job: impl FnOnce(oneshot::Sender<T>) -> Job) -> io::Result<T> {
        let (answer, answered) = oneshot::channel();
        self.job(job(answer)).await?;
        answered.await.map_err(|_| stops())
    }

    /// The store of the node that follows.
    pub(crate) fn store(&self) -> io::Result<Arc<dyn Sink>> {
        self.run_by().as_ref().and_then(|(_, store)| store.upgrade()).ok_or_else(stops)
    }

    /// The record of a key that is to be given, with its value in the store, unless it is too old for that.
    pub(crate) async fn record(&self, store: &dyn Sink, slot: &Slot, now: Now) -> io::Result<Option<Record>> {
        for _ in 0..LOOKS {
            let held = self.replica().given(slot, now);
            let Some(Held { register, revision }) = held else { return Ok(None) };
            if let Some(register) = register.with(|| store.value(&slot.1, revision)) {
                return Ok(Some(Record { key: slot.1.clone(), register }));
            }
            // The store has something newer, which the replica has in a moment: with the batch that is being stored.
            self.ask(|answer| Job::Merge { records: Vec::new(), answer: Some(answer) }).await?;
        }
        let key = NamedKeys(std::slice::from_ref(&slot.1));
        Err(io::Error::other(format!(
            "the value of {key} is not in the store: it was replaced each time it was looked up"
        )))
    }

    /// Merges a peer's records; says how many are stamped ahead, and nothing if they were not stored.
    pub(crate) async fn merge(&self, records: Vec<Record>) -> io::Result<Option<u32>> {
        self.given_at.store(self.steady(), Relaxed);
        self.ask(|answer| Job::Merge { records, answer: Some(answer) }).await
    }

    /// The same, with no answer.
    pub(crate) async fn merge_later(&self, records: Vec<Record>) -> io::Result<()> {
        self.job(Job::Merge { records, answer: None }).await
    }

    /// Deletes what a peer was seen to have deleted; says whether that was stored.
    pub(crate) async fn delete_gone(&self, gone: Vec<(Key, Stamp)>) -> io::Result<bool> {
        self.ask(|answer| Job::Gone { gone, answer }).await
    }

    /// Notes that a session ended whole. An empty node has a state then.
    pub(crate) async fn note_contact(&self, peer: NodeId, contact: Contact, peer_has_joined: bool) -> io::Result<()> {
        self.job(Job::Contact { peer, contact }).await?;
        if peer_has_joined {
            self.join();
        }
        Ok(())
    }

    /// Before anything is given to a peer or taken from it, and after its clock is known: what was stamped with a clock that was
    /// off is stamped anew, and what ended by it too early is given up. Says whether there was any.
    pub(crate) async fn mend(&self) -> io::Result<bool> {
        let now = self.now();
        let must_mend = self.replica().must_mend(now);
        if must_mend && !self.ask(|answer| Job::Mend { answer }).await? {
            return Err(io::Error::other("what was stamped with a clock that was off cannot be stored anew"));
        }
        Ok(must_mend)
    }

    /// Has peers have new records at once; says nothing of those that are slow: the next session levels them.
    pub(crate) fn push(&self, records: Vec<Record>) {
        if records.is_empty() {
            return;
        }
        let links: Vec<_> = self.peers().links.values().cloned().collect();
        if links.is_empty() {
            return;
        }
        for frame in push_frames(records) {
            for (queue, frame_len_max) in &links {
                if frame.len() <= *frame_len_max {
                    queue.push(&frame);
                }
            }
        }
    }

    /// Whether a record is given to a peer that has nothing of it after an absence so long that it may have been deleted there
    /// meanwhile, and forgotten.
    pub(crate) fn may_bring_back(&self, record: &Record, contact_at: Millis, now: Now) -> bool {
        let grace = millis(self.options.gc_grace);
        let age = now.wall.saturating_sub(record.register.stamp.time.millis());
        now.wall.saturating_sub(contact_at) > grace && age > grace && record.register.is_live()
    }

    /// Counts and logs those that were.
    pub(crate) fn note_brought_back(&self, keys: &[Key]) {
        if keys.is_empty() {
            return;
        }
        self.figures.brought_back.fetch_add(keys.len() as u64, Relaxed);
        let keys = NamedKeys(keys);
        self.log.warn(
            "back",
            format_args!("given to a peer after a long absence, may bring back what was deleted: {keys}"),
        );
    }

    // Running.

    pub(crate) async fn run(self: &Arc<Self>, seen: Option<Seen>, sink: Arc<dyn Sink>) -> EngineError {
        match self.begin(seen, &*sink).await {
            Ok(bound) => self.run_from(bound, sink).await,
            Err(error) => error,
        }
    }

    /// The epoch and the revision that this node is at, and its clock.
    async fn begin(&self, seen: Option<Seen>, sink: &dyn Sink) -> Result<crate::stamp::Hlc, EngineError> {
        let unavailable = |error: io::Error| EngineError::Unavailable(error.to_string());
        let bound = self.parts.bound.load().await.map_err(unavailable)?;
        let before = self.replica().place();
        let place = match seen {
            Some(Seen { epoch, revision }) => Place { epoch, revision: revision.get() },
            // It was followed before, and had not joined.
            None if before.epoch != Epoch::default() => {
                Place { epoch: before.epoch, revision: self.replica().revision() }
            }
            None => {
                let random = || self.parts.random.next().map_err(unavailable);
                let epoch = Epoch::new(u128::from(random()?) << 64 | u128::from(random()?));
                sink.begin(epoch).await?;
                Place { epoch, revision: 0 }
            }
        };
        let steady = self.steady();
        let mut replica = self.replica();
        let refused = |message| EngineError::Refused { status: 503, message };
        replica.begin(place, bound, steady).map_err(refused)?;
        if let Some(identity) = replica.identity()
            && identity.cluster != self.options.cluster
        {
            let (kept, own) = (&identity.cluster, &self.options.cluster);
            return Err(refused(format!("the data are of the cluster {kept:?}, not of {own:?}")));
        }
        if !replica.is_empty() {
            self.join();
        }
        Ok(bound)
    }

    async fn run_from(self: &Arc<Self>, bound: crate::stamp::Hlc, sink: Arc<dyn Sink>) -> EngineError {
        let (jobs, queue) = mpsc::channel(JOBS_MAX);
        *self.run_by() = Some((jobs, Arc::downgrade(&sink)));
        let sink = &*sink;
        let mut committer = Committer::new(Arc::clone(self), queue, bound);
        let named = committer.name(sink).await;
        let error = match named {
            Err(error) => error,
            Ok(()) => {
                let reach = async {
                    self.joined().await;
                    sink.reached();
                    std::future::pending::<Infallible>().await
                };
                tokio::select! {
                    biased;
                    error = committer.run(sink) => error,
                    error = meeting::accept(self) => error,
                    error = meeting::find(self) => error,
                    never = reach => match never {},
                }
            }
        };
        *self.run_by() = None;
        *self.peers() = Peers::default();
        error
    }
}

/// Whether it can be the address of another node.
pub(crate) fn can_be_reached(address: SocketAddr) -> bool {
    address.port() != 0 && !address.ip().is_unspecified()
}

fn stops() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "this node stops")
}

pub(crate) fn millis(duration: Duration) -> Millis {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[async_trait]
impl Engine for Cluster {
    fn abilities(&self) -> Abilities {
        let mut abilities = Abilities::ALL;
        abilities.conditions = self.inner.options.local_conditions;
        abilities
    }

    fn value_len_max(&self) -> usize {
        self.inner.options.value_len_max
    }

    fn restore(&self, stored: StoredRef<'_>) {
        self.inner.replica().restore(stored);
    }

    async fn write(&self, epoch: Epoch, ops: Vec<Op>, together: bool) -> Result<Decided, EngineError> {
        if !self.inner.has_joined() {
            return Err(EngineError::Unavailable("this node has no state yet".into()));
        }
        let (answer, answered) = oneshot::channel();
        let job = Job::Write { epoch, ops, together, answer };
        self.inner.job(job).await.map_err(|error| EngineError::Unavailable(error.to_string()))?;
        answered.await.unwrap_or_else(|_| Err(EngineError::OutcomeUnknown("this node stops".into())))
    }

    async fn follow(&self, seen: Option<Seen>, feed: Feed) -> EngineError {
        self.inner.run(seen, Arc::new(feed)).await
    }

    async fn last(&self) -> Result<Seen, EngineError> {
        let replica = self.inner.replica();
        Ok(Seen { epoch: replica.epoch(), revision: Revision::new(replica.revision()) })
    }

    fn numbers(&self) -> Vec<EngineNumber> {
        let number = |name, help, value| EngineNumber { name, help, value };
        let (known, joined) = self.inner.members.counts();
        let offset = self.clock_offset().unwrap_or(0);
        vec![
            number("cluster_members", "Other nodes of the cluster that this node knows of.", known as u64),
            number("cluster_members_joined", "Those of them that are connected.", joined as u64),
            number(
                "cluster_clock_offset_ms",
                "How far the clock of this node is off from the median of its peers', in milliseconds.",
                offset.unsigned_abs(),
            ),
            number(
                "cluster_brought_back",
                "Records that may have brought back a deleted key, after a long absence.",
                self.brought_back(),
            ),
        ]
    }

    fn words(&self) -> Vec<(String, String)> {
        let word = |name: &str, word: String| (name.to_owned(), word);
        let mut words = vec![
            word("cluster", self.inner.options.cluster.clone()),
            word("node", self.id().map_or_else(String::new, |id| id.to_string())),
            word("digest", format!("{:016x}", self.digest())),
        ];
        words.extend(self.clock_offset().map(|offset| word("clock_offset_ms", offset.to_string())));
        words.extend(self.members().iter().map(|member| word(&format!("member.{}", member.id), member.in_words())));
        words
    }
}

#[cfg(test)]
#[path = "cluster_tests.rs"]
mod tests;
