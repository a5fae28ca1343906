//! The engine, and what its parts share.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use nkv_core::{Epoch, Expiry, Op, Revision};
use nkv_node::{Abilities, Decided, Engine, EngineError, Feed, RateLimitedLog, Seen};
use tokio::sync::watch;

use crate::bucket::{self, Settings};
use crate::census::Census;
use crate::follow;
use crate::options::Options;
use crate::wire::{ApiError, Wire};
use crate::write;

/// A bucket of NATS JetStream as the truth behind nodes: see the [crate].
#[derive(Debug)]
pub struct NatsEngine {
    shared: Shared,
}

impl NatsEngine {
    /// An engine that connects once it is followed: the servers may be away.
    #[must_use]
    pub fn new(options: Options) -> Self {
        let shared = Shared {
            options,
            writer: getrandom::u64().unwrap_or_else(|_| u64::from(std::process::id())),
            link: Mutex::default(),
            settings: Mutex::default(),
            place: Mutex::default(),
            ends: Mutex::default(),
            batches: AtomicU64::new(0),
            log: RateLimitedLog::default(),
        };
        NatsEngine { shared }
    }

    /// Connects, creates the bucket where that is to be done, and checks its settings: so a program can say at its start what
    /// is wrong. Following does the same.
    ///
    /// # Errors
    ///
    /// [`EngineError::Refused`] names what cannot be used; [`EngineError::Unavailable`] if no server answers.
    pub async fn check(&self) -> Result<(), EngineError> {
        let wire = Wire::connect(&self.shared.options).await?;
        let (info, settings) = bucket::ensure(&wire, &self.shared.options).await?;
        bucket::check_others(&wire, &self.shared.options, &info, false).await?;
        *lock(&self.shared.settings) = Some(settings);
        Ok(())
    }
}

#[async_trait]
impl Engine for NatsEngine {
    fn abilities(&self) -> Abilities {
        let known = *lock(&self.shared.settings);
        known.map_or_else(bucket::abilities, |settings| settings.abilities)
    }

    fn value_len_max(&self) -> usize {
        lock(&self.shared.settings).map_or(usize::MAX, |settings| settings.value_len_max)
    }

    async fn write(&self, epoch: Epoch, ops: Vec<Op>, together: bool) -> Result<Decided, EngineError> {
        let link = self.shared.link()?;
        write::write(&self.shared, &link, epoch, ops, together).await
    }

    async fn follow(&self, seen: Option<Seen>, feed: Feed) -> EngineError {
        match follow::follow(&self.shared, seen, &feed).await {
            Err(error) => error,
            Ok(never) => match never {},
        }
    }

    async fn last(&self) -> Result<Seen, EngineError> {
        let link = self.shared.link()?;
        let info = link.read(link.wire.info()).await?;
        if info.created() != link.created {
            return Err(EngineError::Unavailable("the bucket was created anew".to_owned()));
        }
        Ok(Seen { epoch: link.epoch, revision: Revision::new(info.state.last_seq) })
    }
}

/// What the parts of an engine share. No lock is held across an await.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) options: Options,
    /// Names this engine in the headers of values with a TTL.
    pub(crate) writer: u64,
    /// While it is followed.
    pub(crate) link: Mutex<Option<Arc<Link>>>,
    pub(crate) settings: Mutex<Option<Settings>>,
    pub(crate) place: Mutex<Place>,
    pub(crate) ends: Mutex<Ends>,
    pub(crate) batches: AtomicU64,
    pub(crate) log: RateLimitedLog,
}

impl Shared {
    fn link(&self) -> Result<Arc<Link>, EngineError> {
        let link = lock(&self.link).clone();
        link.ok_or_else(|| EngineError::Unavailable("NATS is out of reach".to_owned()))
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How far the bucket was followed.
#[derive(Debug, Default)]
pub(crate) struct Place {
    pub(crate) census: Census,
    /// The last message that the node has, if the census is of that moment.
    pub(crate) last: Option<Anchor>,
}

/// A message by which one sees whether a bucket is what it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Anchor {
    pub(crate) epoch: Epoch,
    pub(crate) sequence: u64,
    pub(crate) time_ns: i128,
}

/// When the values end that this engine has put with a TTL: its own node hides them at that time.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    next: u64,
    under_way: BTreeMap<u64, Expiry>,
}

impl Ends {
    /// Those that are never seen, as they were overwritten at once, are forgotten past this.
    const LIMIT: usize = 4_096;

    pub(crate) fn note(&mut self, expiry: Expiry) -> u64 {
        self.next = self.next.wrapping_add(1);
        self.under_way.insert(self.next, expiry);
        if self.under_way.len() > Self::LIMIT {
            self.under_way.pop_first();
        }
        self.next
    }

    pub(crate) fn take(&mut self, number: u64) -> Option<Expiry> {
        self.under_way.remove(&number)
    }
}

/// A connection to a bucket that is followed.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) wire: Wire,
    pub(crate) epoch: Epoch,
    pub(crate) created: u64,
    pub(crate) settings: Settings,
    /// The highest sequence that has come: an answer has a higher one, or the stream began anew.
    pub(crate) seen: AtomicU64,
    pub(crate) lost: watch::Sender<bool>,
}

impl Link {
    /// Makes a request that changes nothing.
    pub(crate) async fn read<T>(&self, work: impl Future<Output = Result<T, ApiError>>) -> Result<T, EngineError> {
        match self.unless_lost(work).await {
            Ok(done) => Ok(done?),
            Err(error) => Err(EngineError::Unavailable(error.to_string())),
        }
    }

    /// Does work, unless the connection is lost before or meanwhile.
    pub(crate) async fn unless_lost<T>(&self, work: impl Future<Output = T>) -> Result<T, EngineError> {
        let mut lost = self.lost.subscribe();
        if *lost.borrow() {
            return Err(EngineError::Unavailable("the connection to NATS is lost".to_owned()));
        }
        tokio::select! {
            biased;
            done = work => Ok(done),
            _ = lost.wait_for(|is_lost| *is_lost) => {
                Err(EngineError::OutcomeUnknown("the connection to NATS was lost before its answer".to_owned()))
            }
        }
    }
}
