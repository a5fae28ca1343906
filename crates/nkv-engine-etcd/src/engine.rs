//! The engine: what its writes and its feed know together.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use nkv_core::{Epoch, Expiry, Key, Op};
use nkv_node::{Abilities, Decided, Engine, EngineError, Feed, RateLimitedLog, Seen};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use crate::fault;
use crate::fetch::revision;
use crate::gather::Gathering;
use crate::login::Login;
use crate::names::Names;
use crate::options::Options;
use crate::rpc::{KeyValue, RangeRequest};
use crate::session::{Ids, Session};
use crate::write;

/// How long [`Engine::last`] waits for etcd.
const LAST_LIMIT: Duration = Duration::from_secs(1);

/// etcd as the engine of a node. It connects when the node follows it, so it can be made while etcd is away. Clones are one
/// engine.
#[derive(Clone, Debug)]
pub struct EtcdEngine(Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) options: Options,
    pub(crate) names: Names,
    login: Login,
    ids: Mutex<Ids>,
    session: Mutex<Option<Arc<Session>>>,
    known: Mutex<Known>,
    pub(crate) gathering: Mutex<Gathering>,
    /// A client waits for a revision that the feed has not reached.
    pub(crate) wanted: Notify,
    pub(crate) warned_of_history: Arc<AtomicBool>,
    pub(crate) log: RateLimitedLog,
}

/// What is known of the data.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// The leases of values with a TTL that nkv has put.
    pub(crate) leases: HashMap<Key, i64>,
    /// When those end that this node has put: earlier than the lease, which has whole seconds.
    own: HashMap<i64, (Expiry, Option<Instant>)>,
    /// Keys whose values are too long to be shown.
    pub(crate) large: HashSet<Key>,
    /// Up to where the node has seen changes.
    pub(crate) at: Option<At>,
}

/// A point in the life of etcd's data, and how it is recognised.
#[derive(Clone, Debug)]
pub(crate) struct At {
    pub(crate) seen: Seen,
    pub(crate) raft_term: u64,
    pub(crate) raft_index: u64,
    /// The key that changed last, and how it was then.
    pub(crate) last: (Bytes, Option<KeyValue>),
}

impl EtcdEngine {
    /// An engine with these options. Nothing is done yet.
    #[must_use]
    pub fn new(options: Options) -> Self {
        EtcdEngine(Arc::new(Inner {
            names: Names::new(options.prefix()),
            login: Login::new(options.user.clone()),
            options,
            ids: Mutex::default(),
            session: Mutex::default(),
            known: Mutex::default(),
            gathering: Mutex::default(),
            wanted: Notify::new(),
            warned_of_history: Arc::default(),
            log: RateLimitedLog::default(),
        }))
    }

    /// Whether etcd is in reach and fit: what a program asks at its start, to end with a clear message where it is not. Makes
    /// what is missing, if that is allowed. A node that follows the engine asks by itself each time that it connects.
    ///
    /// # Errors
    ///
    /// [`EngineError::Unavailable`] if etcd is out of reach; [`EngineError::Refused`] for a setting that breaks a promise, such as
    /// a prefix within that of another nkv, servers of two etcds, or a login that is not accepted.
    pub async fn check(&self) -> Result<(), EngineError> {
        self.0.open().await.map(drop)
    }
}

impl Inner {
    pub(crate) async fn open(&self) -> Result<Session, EngineError> {
        Session::open(&self.options, &self.names, &self.login, &self.ids).await
    }

    pub(crate) fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn session(&self) -> Option<Arc<Session>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Has writes go by this session, until what it returns is dropped.
    pub(crate) fn publish(&self, session: Arc<Session>) -> Published<'_> {
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&session));
        Published { etcd: self, session }
    }

    /// Logs how many keys nkv cannot show, if there are any.
    pub(crate) fn note_foreign(&self, count: u64) {
        if count > 0 {
            let prefix = self.names.prefix();
            self.log.warn("foreign", format_args!("etcd: {count} keys below '{prefix}' that nkv cannot show"));
        }
    }

    /// This node is about to put a value that ends then, by this lease.
    pub(crate) fn note_own(&self, lease: i64, expiry: Expiry) {
        let until = Instant::now().checked_add(Duration::from_millis(expiry.ttl_ms));
        let mut known = self.known();
        known.own.insert(lease, (expiry, until));
        let count = known.own.len();
        if count >= 1_024 && count.is_power_of_two() {
            // Of puts that were never done.
            let now = Instant::now();
            known.own.retain(|_, (_, until)| until.is_none_or(|until| until > now));
        }
    }

    pub(crate) fn forget_own(&self, lease: i64) {
        self.known().own.remove(&lease);
    }
}

impl Known {
    /// When a value with this lease ends, as far as this node has decided it.
    pub(crate) fn expiry(&self, lease: i64) -> Option<Expiry> {
        if lease == 0 { None } else { self.own.get(&lease).map(|(expiry, _)| *expiry) }
    }

    /// The value of the key has this lease now. Returns the one before if it is this node's to revoke.
    pub(crate) fn note_lease(&mut self, key: Key, lease: i64) -> Option<i64> {
        let before = self.leases.insert(key, lease);
        before.filter(|before| *before != lease && self.own.remove(before).is_some())
    }

    /// The key has another value now, with this lease (0: none), or none. Returns the lease that it had if it is this node's to
    /// revoke: each node revokes those that it has made, so that each is revoked once, also where another node changes the value.
    pub(crate) fn end_value(&mut self, key: &Key, lease: i64) -> Option<i64> {
        let before = self.leases.get(key).copied();
        before.filter(|before| *before != lease && self.own.remove(before).is_some())
    }

    pub(crate) fn end_lease(&mut self, key: &Key) {
        self.leases.remove(key).map(|lease| self.own.remove(&lease));
    }

    /// Takes the leases of a state that was fetched anew. Those of puts that are under way are not among them yet.
    pub(crate) fn replace_leases(&mut self, leases: HashMap<Key, i64>) {
        let (living, now): (HashSet<i64>, _) = (leases.values().copied().collect(), Instant::now());
        self.own.retain(|lease, (_, until)| living.contains(lease) || until.is_none_or(|until| until > now));
        self.leases = leases;
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").field("options", &self.options).finish_non_exhaustive()
    }
}

/// While it lives, writes go by its session. Dropped, those under way have an unknown outcome.
pub(crate) struct Published<'a> {
    etcd: &'a Inner,
    session: Arc<Session>,
}

impl Drop for Published<'_> {
    fn drop(&mut self) {
        *self.etcd.session.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.session.end();
    }
}

#[async_trait]
impl Engine for EtcdEngine {
    fn abilities(&self) -> Abilities {
        let mut abilities = Abilities::ALL;
        abilities.meta = false;
        abilities
    }

    fn value_len_max(&self) -> usize {
        self.0.options.value_len_max
    }

    async fn write(&self, epoch: Epoch, ops: Vec<Op>, together: bool) -> Result<Decided, EngineError> {
        if !together && ops.iter().all(|op| write::plain_key(op).is_some()) {
            return self.0.gathered(ops).await;
        }
        if !ops.iter().any(write::has_ttl) {
            return self.0.decide(epoch, &ops, together).await;
        }
        // It is not given up half-way: its leases would stay.
        let inner = Arc::clone(&self.0);
        let done = tokio::spawn(async move { inner.decide(epoch, &ops, together).await });
        done.await.unwrap_or_else(|error| Err(EngineError::OutcomeUnknown(error.to_string())))
    }

    async fn follow(&self, seen: Option<Seen>, feed: Feed) -> EngineError {
        match crate::follow::follow(&self.0, seen, &feed).await {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    async fn last(&self) -> Result<Seen, EngineError> {
        let away = |text: &str| EngineError::Unavailable(text.into());
        let session = self.0.session().ok_or_else(|| away("etcd is not followed"))?;
        let request =
            RangeRequest { key: self.0.names.generation().into(), keys_only: true, ..RangeRequest::default() };
        let read =
            timeout(LAST_LIMIT, session.range(request)).await.map_err(|_| away("etcd did not answer in time"))?;
        let header = read.map_err(|status| fault::of_request(&status))?.header.unwrap_or_default();
        let revision = revision(header.revision);
        if self.0.known().at.as_ref().is_none_or(|at| at.seen.revision < revision) {
            self.0.wanted.notify_one();
        }
        Ok(Seen { epoch: session.epoch, revision })
    }
}
