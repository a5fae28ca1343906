//! A running node: made by a builder, stopped on request or on drop.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use nkv_core::{Epoch, NoPersist, NotifyKeyValue, PersistError, PersistErrorKind, PersistValue, Timestamp};
use thiserror::Error;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tracing::{error, info};

use crate::budget::Budget;
use crate::clock::{Clock, SinceBoot, Time};
use crate::engine::{Engine, Seen, Truth};
use crate::expiry;
use crate::failure::Failure;
use crate::follow::follow;
use crate::handle::Handle;
use crate::limits::Limits;
use crate::rate_log::RateLimitedLog;
use crate::rights::Rights;
use crate::shared::{Parts, Shared, stopped};
use crate::wakeups::WakeUps;
use crate::writer::{CloseOnDrop, Queue, Writer};

/// How long peers may take to end when the node stops.
const DRAIN_LIMIT: Duration = Duration::from_secs(4);

/// How long a node takes to stop, whatever storage does; a process takes a moment more to end, and 5 s are promised.
const STOP_LIMIT: Duration = Duration::from_millis(4_900);

/// Why a node does not run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum NodeError {
    /// Storage cannot be opened, or has failed. The message is that of the error.
    #[error(transparent)]
    Persist(Arc<PersistError>),
    /// A thread cannot be started, or a task broke.
    #[error("the node cannot run: {0}")]
    System(std::io::Error),
}

impl From<PersistError> for NodeError {
    fn from(error: PersistError) -> Self {
        NodeError::Persist(Arc::new(error))
    }
}

/// Opens storage.
type Open = Box<dyn FnOnce() -> Result<Box<dyn PersistValue>, PersistError> + Send>;

/// Starts to follow an engine.
type Follow = fn(Arc<Shared>) -> JoinHandle<()>;

/// What a node is to be.
pub struct Builder {
    persist: Option<Open>,
    durability: String,
    clock_file: Option<PathBuf>,
    time: Arc<dyn Time>,
    limits: Limits,
    rights: Option<Arc<dyn Rights>>,
    /// The engine, and what follows it: a program without one has no code for it.
    engine: Option<(Arc<dyn Engine>, Follow)>,
    after_wake_ups: Vec<fn()>,
}

impl Builder {
    /// Keeps values with what `open` returns, and calls that `durability` in `Stats`. Without it, values live in memory.
    ///
    /// `open` runs on a thread that may block.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use nkv_node::Node;
    /// use nkv_persist_fs::{FsOptions, FsPersist};
    ///
    /// # let temp = tempfile::tempdir()?;
    /// # let dir = temp.path().join("data");
    /// let node = Node::builder().persist("sync", || FsPersist::open(dir, FsOptions::default())).start().await?;
    /// node.handle().put("lamp.hall", "on").await?; // on the disk
    /// node.shutdown().await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn persist<P: PersistValue>(
        mut self,
        durability: impl Into<String>,
        open: impl FnOnce() -> Result<P, PersistError> + Send + 'static,
    ) -> Self {
        self.persist = Some(Box::new(|| Ok(Box::new(open()?))));
        self.durability = durability.into();
        self
    }

    /// Keeps in this file how far the clock has come that TTLs are counted on, while there are values with one. What is left of
    /// a TTL after a restart does then not depend on two runs having the same wall clock: what passed between them counts only
    /// if both had a clock that was set. Without it the wall clock is believed. `FsPersist` leaves a file `clock` in its
    /// directory alone.
    #[must_use]
    pub fn clock_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.clock_file = Some(path.into());
        self
    }

    /// Counts TTLs on this instead of the machine's time since boot: for tests, which let hours pass at once. It is looked at once
    /// a second at least while there are values with a TTL.
    #[must_use]
    pub fn time(mut self, time: impl Time) -> Self {
        self.time = Arc::new(time);
        self
    }

    /// Sets the limits.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use nkv_node::{Limits, Node};
    ///
    /// let mut limits = Limits::default();
    /// limits.value_len_max = 4_096;
    /// let node = Node::builder().limits(limits).start().await?;
    /// assert!(node.handle().put("lamp.hall", vec![0; 5_000]).await.is_err());
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Asks `rights` what [principals](Handle::as_principal) may do.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use nkv_node::{Node, Pattern, Right, Rights};
    ///
    /// # #[derive(Debug)]
    /// # struct ReadOnly;
    /// # impl Rights for ReadOnly {
    /// #     fn allows(&self, _principal: &str, right: Right, _pattern: &Pattern) -> bool {
    /// #         right == Right::Get
    /// #     }
    /// # }
    /// let node = Node::builder().rights(ReadOnly).start().await?; // see `Rights` for how one is made
    /// let guest = node.handle().as_principal("guest");
    /// assert!(guest.get("lamp.hall").await.is_ok());
    /// assert!(guest.put("lamp.hall", "on").await.is_err());
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn rights(mut self, rights: impl Rights) -> Self {
        self.rights = Some(Arc::new(rights));
        self
    }

    /// Has `engine` decide all writes, and follows it. With [storage](Self::persist), what was seen of it survives: reads go
    /// on from there after a restart, and the engine feeds what was missed.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use nkv_node::Node;
    /// use nkv_testkit::engine::ScriptedEngine;
    ///
    /// let engine = ScriptedEngine::default(); // one in memory, for tests
    /// let node = Node::builder().engine(engine).start().await?;
    /// # node.shutdown().await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn engine(mut self, engine: impl Engine) -> Self {
        self.engine = Some((Arc::new(engine), |shared| tokio::spawn(follow(shared))));
        self
    }

    /// Has `call` called on the runtime each time the tasks that a batch has woken have had their turn: a door lets go there
    /// of what it keeps for the time of a batch.
    #[must_use]
    pub fn after_wake_ups(mut self, call: fn()) -> Self {
        self.after_wake_ups.push(call);
        self
    }

    /// Loads what was stored and starts to work, on the current Tokio runtime (time enabled).
    ///
    /// # Errors
    ///
    /// [`NodeError`]; nothing runs then.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use nkv_node::Node;
    ///
    /// let node = Node::builder().start().await?;
    /// node.handle().put("lamp.hall", "on").await?;
    /// node.shutdown().await?;
    /// # Ok(()) }
    /// ```
    pub async fn start(self) -> Result<Node, NodeError> {
        let Builder { persist, durability, clock_file, time, limits, rights, engine, after_wake_ups } = self;
        let persist = match persist {
            Some(open) => open,
            None => {
                let persist = NoPersist::new(Epoch::new(random()?));
                Box::new(|| Ok(Box::new(persist) as Box<dyn PersistValue>))
            }
        };
        let failure = Failure::new();
        let handler = failure.handler();
        let restored = engine.as_ref().map(|(engine, _)| Arc::clone(engine));
        let open = tokio::task::spawn_blocking(move || {
            let mut persist = persist()?;
            if restored.as_ref().is_some_and(|engine| engine.abilities().meta) && !persist.keeps_meta() {
                let context = "this storage keeps no meta, and the engine needs it";
                return Err(PersistError::new(PersistErrorKind::Rejected, context));
            }
            persist.on_failure(handler);
            let (figures, waits) = (persist.figures(), persist.waits());
            // Only now: until storage is open, the file may be another server's.
            let clock = Clock::start(clock_file, time);
            let store = match &restored {
                // It decides when a value ends.
                Some(engine) => {
                    NotifyKeyValue::open_visiting(persist, Timestamp::MIN, |stored| engine.restore(stored))?
                }
                None => NotifyKeyValue::open_at(persist, clock.now())?,
            };
            if store.next_expiry().is_some() {
                clock.keep();
            }
            Ok::<_, PersistError>((store, clock, figures, waits))
        });
        let (store, clock, storage, storage_waits) = open.await.map_err(|error| NodeError::System(error.into()))??;
        let store = Arc::new(store);

        let (wake_ups, queue) = (Arc::new(WakeUps::default()), Arc::new(Queue::default()));
        let expiry_changed = Arc::new(Notify::new());
        let counters = Arc::<OnceLock<_>>::default();
        let budget = Budget::new(limits.queued_max, Arc::clone(store.event_bytes()));
        let writer = Arc::new(Writer {
            store: Arc::clone(&store),
            queue: Arc::clone(&queue),
            wake_ups: Arc::clone(&wake_ups),
            expiry_changed: Arc::clone(&expiry_changed),
            failure: failure.clone(),
            log: RateLimitedLog::default(),
            budget: Arc::clone(&budget),
            clock: clock.clone(),
            counters: Arc::clone(&counters),
            storage_waits,
            since_check: Mutex::default(),
        });
        let written = writer.spawn().map_err(NodeError::System)?;
        let pump = tokio::spawn({
            // Also if the runtime is dropped before the node has stopped, the writer must not sleep for ever.
            let (wake_ups, queue) = (Arc::clone(&wake_ups), CloseOnDrop(Arc::clone(&queue)));
            async move {
                wake_ups
                    .pump(|| {
                        after_wake_ups.iter().for_each(|call| call());
                        queue.0.wake();
                    })
                    .await;
            }
        });
        let stats = store.stats();
        let seen = Seen { epoch: stats.epoch, revision: stats.revision };
        let follow = engine.as_ref().map(|(_, follow)| *follow);
        let truth = engine.map(|(engine, _)| Truth::new(engine, seen));
        let parts = Parts {
            store,
            clock,
            durability,
            limits,
            rights,
            failure,
            truth,
            budget,
            wake_ups,
            queue,
            writer,
            expiry_changed,
            name: random()? as u64,
            counters,
            storage,
        };
        let shared = Arc::new(Shared::new(parts));
        let expiry = tokio::spawn(expiry::expire(Arc::clone(&shared)));
        let follow = follow.map(|follow| follow(Arc::clone(&shared)));
        let tasks = Tasks { expiry, follow, pump, writer: written };
        let running = tokio::spawn(run(Arc::clone(&shared), tasks));
        Ok(Node { handle: Handle::new(shared), running })
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Builder { durability, clock_file, limits, rights, engine, .. } = self;
        let mut builder = f.debug_struct("Builder");
        builder.field("durability", durability).field("clock_file", clock_file);
        builder.field("limits", limits).field("rights", rights);
        builder.field("engine", &engine.as_ref().map(|(engine, _)| engine)).finish_non_exhaustive()
    }
}

/// A running node. Dropping it stops it too, without waiting.
#[derive(Debug)]
pub struct Node {
    handle: Handle,
    running: JoinHandle<Result<(), NodeError>>,
}

impl Node {
    /// A node to be described: in memory, with the default limits.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use nkv_node::Node;
    ///
    /// let node = Node::builder().start().await?;
    /// assert_eq!(node.handle().stats().await?.durability, "memory");
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn builder() -> Builder {
        Builder {
            persist: None,
            durability: "memory".into(),
            clock_file: None,
            time: Arc::new(SinceBoot),
            limits: Limits::default(),
            rights: None,
            engine: None,
            after_wake_ups: Vec::new(),
        }
    }

    /// The way in, with everything allowed.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Has the node stop, without waiting: see [`shutdown`](Self::shutdown).
    pub fn stop(&self) {
        self.handle.stop();
    }

    /// Stops: has doors accept no more and answer what they have accepted, takes no more writes once their peers have ended,
    /// closes the storage.
    ///
    /// # Errors
    ///
    /// [`NodeError`] if the node had failed before; [`NodeError::Persist`] if the last sync of storage failed, or if
    /// storage did not answer within 5 s. In that case the thread that waits for it goes on, and keeps the storage.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let node = nkv_node::Node::builder().start().await?;
    /// let nkv = node.handle();
    /// node.shutdown().await?;
    /// assert!(nkv.put("lamp.hall", "on").await.is_err()); // no more writes are taken
    /// # Ok(()) }
    /// ```
    pub async fn shutdown(mut self) -> Result<(), NodeError> {
        self.stop();
        self.failed().await
    }

    /// Waits until the node has ended: after [`stop`](Self::stop), or because storage failed.
    ///
    /// # Errors
    ///
    /// [`NodeError::Persist`] when storage has failed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub async fn failed(&mut self) -> Result<(), NodeError> {
        match (&mut self.running).await {
            Ok(ended) => ended,
            Err(error) => Err(NodeError::System(error.into())),
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What runs for a node.
struct Tasks {
    expiry: JoinHandle<()>,
    /// Follows the engine, if there is one.
    follow: Option<JoinHandle<()>>,
    pump: JoinHandle<()>,
    writer: oneshot::Receiver<Result<(), PersistError>>,
}

/// Runs until asked to stop or until storage fails, then ends everything in order.
async fn run(shared: Arc<Shared>, tasks: Tasks) -> Result<(), NodeError> {
    let Tasks { mut expiry, mut follow, pump, mut writer } = tasks;
    let mut stop_asked = shared.stop.subscribe();
    let mut writer_end = None;
    let result = tokio::select! {
        () = stopped(&mut stop_asked) => Ok(()),
        failure = shared.failure.reported() => Err(NodeError::Persist(failure)),
        end = &mut writer => {
            writer_end = Some(end);
            Err(broken("the writer"))
        }
        () = ended(&mut follow) => Err(broken("what follows the engine")),
        _ = &mut expiry => match *shared.stop.borrow() {
            true => Ok(()), // it was the first to hear of it
            false => Err(broken("a task that ends with the node alone")),
        },
    };
    let began = Instant::now();
    let left = || STOP_LIMIT.saturating_sub(began.elapsed());
    // After a failure, too: doors read no more, and write what they have to answer. What is in memory was stored.
    shared.stop.send_replace(true);
    shared.budget.stop();
    if timeout(DRAIN_LIMIT, shared.budget.peers_gone()).await.is_err() {
        info!("connections are cut that did not end within {DRAIN_LIMIT:?}");
    }
    expiry.abort();
    // Writes that the engine keeps and the node has not seen are answered now.
    follow.iter().for_each(JoinHandle::abort);
    shared.queue.close();
    let writer_end = match writer_end {
        None => timeout(left(), writer).await.ok(),
        end => end,
    };
    // Streams of this process end.
    shared.store.forget_all();
    shared.end();
    pump.abort();
    shared.wake_ups.close();
    result.and(match writer_end {
        Some(Ok(closed)) => closed.map_err(NodeError::from),
        Some(Err(_)) => Err(broken("the writer")),
        None => Err(stalled()),
    })
}

/// Waits for the end of a task that does not end by itself.
async fn ended(task: &mut Option<JoinHandle<()>>) {
    match task {
        Some(task) => drop(task.await),
        None => std::future::pending().await,
    }
}

/// What was acknowledged is as durable as it was promised to be; what was not answered may or may not be stored.
fn stalled() -> NodeError {
    let context = format!("storage did not answer within {STOP_LIMIT:?}; its last sync was not waited for");
    error!("stopping although {context}");
    PersistError::new(PersistErrorKind::Io, context).into()
}

fn broken(what: &str) -> NodeError {
    NodeError::System(std::io::Error::other(format!("{what} broke")))
}

fn random() -> Result<u128, NodeError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| NodeError::System(std::io::Error::other(error)))?;
    Ok(u128::from_le_bytes(bytes))
}
