//! A running server: made by a builder, stopped on request or on drop.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nkv_core::{NoPersist, NotifyKeyValue, PersistError, PersistErrorKind, PersistValue, Write};
use nkv_notify_tcp::forget_encodings;
use nkv_protocol::Limits;
use nkv_types::Address;
use thiserror::Error;
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;
use tracing::{error, info};

use crate::bell::Bell;
use crate::budget::Budget;
use crate::clock::Clock;
use crate::complaints::Complaints;
use crate::core::Core;
use crate::failure::Failure;
use crate::handle::Handle;
use crate::listener::{Acceptor, Listener};
use crate::writer::{CloseOnDrop, Queue, Writer};

/// The version of this server.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// How long connections may take to end when the server stops.
const DRAIN_LIMIT: Duration = Duration::from_secs(4);

/// How long a server takes to stop, whatever storage does; a process takes a moment more to end, and 5 s are promised.
const STOP_LIMIT: Duration = Duration::from_millis(4_900);

/// The clock is looked at so often while there are values with a TTL: a machine that was suspended counts on, and its timers
/// do not.
const CLOCK_TICK: Duration = Duration::from_secs(1);

/// After a failed expiry, so long passes before the next try.
const EXPIRY_PAUSE: Duration = Duration::from_secs(1);

/// While storage has not done an expiry, the time goes on so often for other values whose TTL ends.
const EXPIRY_TICK: Duration = Duration::from_millis(10);

/// The longest time between two signs of life.
const ALIVE_INTERVAL_MAX: Duration = Duration::from_secs(5);

/// Limits of a server.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Options {
    /// Connections at a time; others are refused. 1,024 by default.
    pub connections_max: usize,
    /// Connections at a time from one address, which is an IPv4 address or an IPv6 network /64. 1,024 by default: behind
    /// one address there may be many programs.
    pub connections_per_address_max: usize,
    /// Subscriptions of one connection. 1,024 by default.
    pub subscriptions_max: usize,
    /// Subscriptions of all connections. 65,536 by default.
    pub subscriptions_total_max: usize,
    /// Longest value, in bytes. 1 MiB by default; 8 MiB at most, so that it fits a message in every form.
    pub value_len_max: usize,
    /// Bytes that all connections may hold together: of requests that have not arrived whole, of answers that were not
    /// taken, and of changes that wait. Past that, if most of it is changes, those are dropped in favour of fresh snapshots (a
    /// client that does not know `Reset` is closed); else the connection that holds most for longest is closed, unless the
    /// others hold less than half. Subscriptions to deep keys may take a quarter as much. 256 MiB by default.
    pub queued_max: usize,
    /// A connection that begins no request within this time is closed. 30 s by default.
    pub first_byte_limit: Duration,
    /// A request that is not whole this long after its first byte, and as long again for each MiB of it, ends its
    /// connection. 30 s by default.
    pub request_limit: Duration,
    /// A peer is cut if for this long it takes nothing, or so little that the system makes no room in its send buffer
    /// (some 80 KiB). 30 s by default.
    pub stall_limit: Duration,
    /// A connection without subscriptions that asks nothing for this long is closed. Never by default.
    pub idle_limit: Option<Duration>,
    /// Whether an address other than loopback may be listened at: nothing here asks who is there. No by default.
    pub insecure: bool,
    /// The mode of a Unix socket; who may write to it may connect. 0600 by default: its owner alone.
    pub socket_mode: u32,
    /// The group of a Unix socket. That of the process, or of the directory, by default.
    pub socket_group: Option<u32>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            connections_max: 1_024,
            connections_per_address_max: 1_024,
            subscriptions_max: 1_024,
            subscriptions_total_max: 65_536,
            value_len_max: 1 << 20,
            queued_max: 256 << 20,
            first_byte_limit: Duration::from_secs(30),
            request_limit: Duration::from_secs(30),
            stall_limit: Duration::from_secs(30),
            idle_limit: None,
            insecure: false,
            socket_mode: 0o600,
            socket_group: None,
        }
    }
}

impl Options {
    /// How often a connection whose requests are kept waiting gets a sign of life: while it gets none, and nothing else, for
    /// the stall limit, the server is not there.
    pub(crate) fn alive_interval(&self) -> Duration {
        let third = self.stall_limit.checked_div(3).unwrap_or_default();
        third.clamp(Duration::from_millis(1), ALIVE_INTERVAL_MAX)
    }

    pub(crate) fn limits(&self) -> Limits {
        Limits { value_len_max: self.value_len_max.min(8 << 20), ..Limits::default() }
    }
}

/// Why a server does not run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServerError {
    /// An address cannot be listened at.
    #[error("cannot listen at {address}{}", in_use_hint(address, source))]
    Bind {
        /// The address.
        address: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// An address is open to other hosts, and that was not asked for.
    #[error(
        "{address} is open to other hosts, and nkv does not ask who they are: listen at a loopback address, or say --insecure"
    )]
    Insecure {
        /// The address.
        address: String,
    },
    /// Storage cannot be opened, or has failed. The message is that of the error.
    #[error(transparent)]
    Persist(Arc<PersistError>),
    /// A thread cannot be started, or a task broke.
    #[error("the server cannot run: {0}")]
    System(std::io::Error),
}

fn in_use_hint(address: &str, source: &std::io::Error) -> String {
    let port = address.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
    match (source.kind(), port) {
        (std::io::ErrorKind::AddrInUse, Some(port)) => {
            format!(" (another nkv-server, or a NATS server, may have port {port})")
        }
        (std::io::ErrorKind::AddrInUse, None) => " (another nkv-server listens there)".into(),
        _ => String::new(),
    }
}

impl From<PersistError> for ServerError {
    fn from(error: PersistError) -> Self {
        ServerError::Persist(Arc::new(error))
    }
}

/// Opens storage; called once the addresses are known to be free.
type Open = Box<dyn FnOnce() -> Result<Box<dyn PersistValue>, PersistError> + Send>;

/// What a server is to be.
pub struct Builder {
    addresses: Vec<Address>,
    persist: Option<Open>,
    durability: String,
    clock_file: Option<PathBuf>,
    options: Options,
}

impl Builder {
    /// Listens at `address` too. Without any, only [`Handle`]s reach the store.
    #[must_use]
    pub fn listen(mut self, address: Address) -> Self {
        self.addresses.push(address);
        self
    }

    /// Keeps values with what `open` returns, and calls that `durability` in `Stats`. Without it, values live in memory.
    ///
    /// `open` runs on a thread that may block, after the addresses were bound: nothing is opened in vain.
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

    /// Sets the limits.
    #[must_use]
    pub fn options(mut self, options: Options) -> Self {
        self.options = options;
        self
    }

    /// Loads what was stored and starts to listen, on the current Tokio runtime (I/O and time enabled).
    ///
    /// # Errors
    ///
    /// [`ServerError`]; nothing runs then.
    pub async fn bind(self) -> Result<Server, ServerError> {
        let Builder { addresses, persist, durability, clock_file, options } = self;
        let mut listeners = Vec::new();
        for address in &addresses {
            listeners.extend(Listener::bind(address, &options).await?);
        }
        let addresses =
            listeners.iter().map(Listener::address).collect::<Result<_, _>>().map_err(ServerError::System)?;
        let persist = match persist {
            Some(open) => open,
            None => {
                let persist = NoPersist::new(random_epoch()?);
                Box::new(|| Ok(Box::new(persist) as Box<dyn PersistValue>))
            }
        };
        let failure = Failure::new();
        let handler = failure.handler();
        let open = tokio::task::spawn_blocking(move || {
            let mut persist = persist()?;
            persist.on_failure(handler);
            // Only now: until storage is open, the file may be another server's.
            let clock = Clock::start(clock_file);
            let store = NotifyKeyValue::open_at(persist, clock.now())?;
            if store.next_expiry().is_some() {
                clock.keep();
            }
            Ok::<_, PersistError>((store, clock))
        });
        let (store, clock) = open.await.map_err(|error| ServerError::System(error.into()))??;
        let store = Arc::new(store);

        let (bell, queue) = (Arc::new(Bell::default()), Arc::new(Queue::default()));
        let (stop, stop_asked) = watch::channel(false);
        let expiry_changed = Arc::new(Notify::new());
        let budget = Budget::new(options.queued_max, Arc::clone(store.event_bytes()));
        let writer = Writer {
            store: Arc::clone(&store),
            queue: Arc::clone(&queue),
            bell: Arc::clone(&bell),
            expiry_changed: Arc::clone(&expiry_changed),
            failure: failure.clone(),
            complaints: Complaints::default(),
            budget: Arc::clone(&budget),
            clock: clock.clone(),
        };
        let writer = writer.spawn().map_err(ServerError::System)?;
        let pump = tokio::spawn({
            // Also if the runtime is dropped before the server has stopped, the writer must not sleep for ever.
            let (bell, queue) = (Arc::clone(&bell), CloseOnDrop(Arc::clone(&queue)));
            async move {
                bell.pump(|| {
                    forget_encodings();
                    queue.0.wake();
                })
                .await;
            }
        });
        let core = Arc::new(Core::new(store, clock, durability, options, budget, bell, queue));

        let mut tasks = JoinSet::new();
        let acceptor = Acceptor { core: Arc::clone(&core), stop: stop_asked.clone() };
        for listener in listeners {
            tasks.spawn(acceptor.clone().run(listener));
        }
        drop(acceptor);
        tasks.spawn(expire(Arc::clone(&core), expiry_changed, stop_asked));
        let handle = Handle::new(&core);
        let running = tokio::spawn(run(core, tasks, pump, writer, failure, stop.clone()));
        Ok(Server { addresses, handle, stop, running })
    }
}

impl fmt::Debug for Builder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Builder { addresses, durability, clock_file, options, .. } = self;
        let mut builder = f.debug_struct("Builder");
        builder.field("addresses", addresses).field("durability", durability);
        builder.field("clock_file", clock_file).field("options", options).finish()
    }
}

/// A running server. Dropping it stops it too, without waiting.
#[derive(Debug)]
pub struct Server {
    addresses: Vec<Address>,
    handle: Handle,
    stop: watch::Sender<bool>,
    running: JoinHandle<Result<(), ServerError>>,
}

impl Server {
    /// A server to be described: at no address, in memory, with the default limits.
    #[must_use]
    pub fn builder() -> Builder {
        let (durability, options) = ("memory".into(), Options::default());
        Builder { addresses: Vec::new(), persist: None, durability, clock_file: None, options }
    }

    /// Where it listens, in the order asked for, with the ports that it was given. A name has one for each of its
    /// addresses, all with the same port.
    #[must_use]
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// The store, from within the process.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Stops: accepts no more, finishes what was accepted, ends the connections, closes the storage.
    ///
    /// # Errors
    ///
    /// [`ServerError`] if the server had failed before; [`ServerError::Persist`] if the last sync of storage failed, or if
    /// storage did not answer within 5 s. In that case the thread that waits for it goes on, and keeps the storage.
    pub async fn shutdown(self) -> Result<(), ServerError> {
        self.stop.send_replace(true);
        self.wait().await
    }

    /// Waits until the server ends by itself, which it does only when storage fails.
    ///
    /// # Errors
    ///
    /// [`ServerError::Persist`] then.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub async fn wait(mut self) -> Result<(), ServerError> {
        self.failed().await
    }

    /// As [`wait`](Self::wait), for callers who want to stop the server themselves afterwards.
    ///
    /// # Errors
    ///
    /// [`ServerError::Persist`] when storage has failed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub async fn failed(&mut self) -> Result<(), ServerError> {
        (&mut self.running).await.unwrap_or_else(|error| Err(ServerError::System(error.into())))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

/// Runs until asked to stop or until storage fails, then ends everything in order.
async fn run(
    core: Arc<Core>,
    mut tasks: JoinSet<()>,
    pump: JoinHandle<()>,
    mut writer: oneshot::Receiver<Result<(), PersistError>>,
    failure: Failure,
    stop: watch::Sender<bool>,
) -> Result<(), ServerError> {
    let mut stop_asked = stop.subscribe();
    let mut writer_end = None;
    let result = tokio::select! {
        () = stopped(&mut stop_asked) => Ok(()),
        failure = failure.reported() => Err(ServerError::Persist(failure)),
        end = &mut writer => {
            writer_end = Some(end);
            Err(broken("the writer"))
        }
        Some(_) = tasks.join_next() => match *stop.borrow() {
            true => Ok(()), // it was the first to hear of it
            false => Err(broken("a task that ends with the server alone")),
        },
    };
    let began = Instant::now();
    let left = || STOP_LIMIT.saturating_sub(began.elapsed());
    // After a failure, too: connections read no more, and write what they have to answer. What is in memory was stored.
    stop.send_replace(true);
    let ended = async { while tasks.join_next().await.is_some() {} };
    if timeout(DRAIN_LIMIT, ended).await.is_err() {
        info!("connections were cut that did not end within {DRAIN_LIMIT:?}");
        tasks.shutdown().await;
    }
    core.queue.close();
    // Connections that were cut let go of the store as soon as they are polled once more.
    let released = async {
        while Arc::strong_count(&core) > 1 {
            tokio::task::yield_now().await;
        }
    };
    if timeout(left(), released).await.is_err() {
        error!("something still holds the store");
    }
    drop(core);
    let writer_end = match writer_end {
        None => timeout(left(), writer).await.ok(),
        end => end,
    };
    pump.abort();
    result.and(match writer_end {
        Some(Ok(closed)) => closed.map_err(ServerError::from),
        Some(Err(_)) => Err(broken("the writer")),
        None => Err(stalled()),
    })
}

/// What was acknowledged is as durable as it was promised to be; what was not answered may or may not be stored.
fn stalled() -> ServerError {
    let context = format!("storage did not answer within {STOP_LIMIT:?}; its last sync was not waited for");
    error!("stopping although {context}");
    PersistError::new(PersistErrorKind::Io, context).into()
}

fn broken(what: &str) -> ServerError {
    ServerError::System(std::io::Error::other(format!("{what} broke")))
}

/// Has keys expire when their time has come, until the server stops: also while storage does not answer.
async fn expire(core: Arc<Core>, changed: Arc<Notify>, mut stop: watch::Receiver<bool>) {
    tokio::select! {
        biased;
        () = stopped(&mut stop) => {}
        () = expire_in_time(&core, &changed) => {}
    }
}

async fn expire_in_time(core: &Core, changed: &Notify) {
    loop {
        if core.store.next_expiry().is_some() && core.clock.is_due() {
            let clock = core.clock.clone();
            // One that could not be kept is tried again.
            advancing(core, async { _ = tokio::task::spawn_blocking(move || clock.keep()).await }).await;
        }
        let due = async {
            match core.store.next_expiry() {
                Some(at) => tokio::time::sleep(core.clock.until(at).min(CLOCK_TICK)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = changed.notified() => continue,
            () = due => {}
        }
        let now = core.clock.now();
        if core.store.next_expiry().is_none_or(|at| at > now) {
            continue;
        }
        // From here on what is due is absent for all, however long storage takes.
        core.store.advance(now);
        advancing(core, async {
            let expired = core.write_urgently(Write::expiry()).await;
            if !matches!(expired.as_deref(), Ok([Ok(_)])) {
                tokio::time::sleep(EXPIRY_PAUSE).await;
            }
        })
        .await;
    }
}

/// Waits for storage, while the time goes on for all values that become due meanwhile.
async fn advancing(core: &Core, work: impl Future<Output = ()>) {
    let mut work = std::pin::pin!(work);
    while timeout(EXPIRY_TICK, work.as_mut()).await.is_err() {
        core.store.advance(core.clock.now());
    }
}

fn random_epoch() -> Result<nkv_core::Epoch, ServerError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| ServerError::System(std::io::Error::other(error)))?;
    Ok(nkv_core::Epoch::new(u128::from_le_bytes(bytes)))
}

/// Waits until the server is asked to stop, or is gone.
pub(crate) async fn stopped(stop: &mut watch::Receiver<bool>) {
    drop(stop.wait_for(|stop| *stop).await);
}
