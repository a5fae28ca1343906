//! A running server: made by a builder, stopped on request or on drop.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nkv_core::{NoPersist, NotifyKeyValue, Op, PersistError, PersistValue};
use nkv_protocol::Limits;
use thiserror::Error;
use tokio::sync::{Notify, watch};
use tokio::task::{JoinHandle, JoinSet};
use tracing::{error, info};

use crate::address::Address;
use crate::bell::Bell;
use crate::budget::Budget;
use crate::clock::Clock;
use crate::core::Core;
use crate::handle::Handle;
use crate::listener::{Acceptor, Listener};
use crate::writer::{CloseOnDrop, Queue, Writer};

/// The version of this server.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// How long connections may take to end when the server stops.
const DRAIN_LIMIT: Duration = Duration::from_secs(4);

/// How long whoever was cut may take to let go of the store.
const RELEASE_LIMIT: Duration = Duration::from_secs(1);

/// The clock is looked at so often while there are values with a TTL: a machine that was suspended counts on, and its timers
/// do not.
const CLOCK_TICK: Duration = Duration::from_secs(1);

/// After a failed expiry, so long passes before the next try.
const EXPIRY_PAUSE: Duration = Duration::from_secs(1);

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
    /// Bytes that all connections may hold together: of requests that have not arrived whole, of answers and snapshots
    /// that were not taken, and of changes that wait to be told. Past that, the connection that holds most for longest is
    /// closed, unless it alone is the reason. Subscriptions to deep keys may take a quarter as much. 256 MiB by default.
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
        }
    }
}

impl Options {
    pub(crate) fn limits(&self) -> Limits {
        Limits { value_len_max: self.value_len_max.min(8 << 20), ..Limits::default() }
    }
}

/// Why a server does not run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServerError {
    /// An address cannot be listened at.
    #[error("cannot listen at {address}{}", in_use_hint(source))]
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
    /// Storage cannot be opened, or has failed.
    #[error("storage")]
    Persist(#[source] Arc<PersistError>),
    /// A thread cannot be started, or a task broke.
    #[error("the server cannot run")]
    System(#[source] std::io::Error),
}

fn in_use_hint(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::AddrInUse => " (another nkv-server, or a NATS server: both use port 4222)",
        _ => "",
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
            listeners.push(Listener::bind(address, options.insecure).await?);
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
        let open = tokio::task::spawn_blocking(move || {
            let persist = persist()?;
            // Only now: until storage is open, the file may be another server's.
            let clock = Clock::start(clock_file);
            let store = NotifyKeyValue::open(persist, clock.now())?;
            if store.next_expiry().is_some() {
                clock.keep();
            }
            Ok::<_, PersistError>((store, clock))
        });
        let (store, clock) = open.await.map_err(|error| ServerError::System(error.into()))??;
        let store = Arc::new(store);

        let (bell, queue) = (Arc::new(Bell::default()), Arc::new(Queue::default()));
        let (failure, failed) = watch::channel(None);
        let (stop, stopped) = watch::channel(false);
        let expiry_changed = Arc::new(Notify::new());
        let budget = Budget::new(options.queued_max);
        let writer = Writer {
            store: Arc::clone(&store),
            queue: Arc::clone(&queue),
            bell: Arc::clone(&bell),
            expiry_changed: Arc::clone(&expiry_changed),
            failure,
            budget: Arc::clone(&budget),
            clock: clock.clone(),
        };
        let writer = writer.spawn().map_err(ServerError::System)?;
        let pump = tokio::spawn({
            // Also if the runtime is dropped before the server has stopped, the writer must not sleep for ever.
            let (bell, queue) = (Arc::clone(&bell), CloseOnDrop(Arc::clone(&queue)));
            async move { bell.pump(|| queue.0.wake()).await }
        });
        let core = Arc::new(Core::new(store, clock, durability, options, budget, bell, queue));

        let mut tasks = JoinSet::new();
        let acceptor = Acceptor { core: Arc::clone(&core), stop: stopped.clone() };
        for listener in listeners {
            tasks.spawn(acceptor.clone().run(listener));
        }
        drop(acceptor);
        tasks.spawn(expire(Arc::clone(&core), expiry_changed, stopped));
        let handle = Handle::new(&core);
        let running = tokio::spawn(run(core, tasks, pump, writer, failed, stop.subscribe()));
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

    /// Where it listens, in the order asked for, with the ports that it was given.
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
    /// [`ServerError`] if the server had failed before.
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
    writer: thread::JoinHandle<()>,
    mut failed: watch::Receiver<Option<Arc<PersistError>>>,
    mut stop: watch::Receiver<bool>,
) -> Result<(), ServerError> {
    let mut result = tokio::select! {
        () = stopped(&mut stop) => Ok(()),
        failure = failed.wait_for(Option::is_some) => Err(match failure.as_deref() {
            Ok(Some(failure)) => ServerError::Persist(Arc::clone(failure)),
            _ => broken("the writer"), // it is gone, without a word
        }),
        Some(_) = tasks.join_next() => match *stop.borrow() {
            true => Ok(()), // it was the first to hear of it
            false => Err(broken("a task that ends with the server alone")),
        },
    };
    if result.is_err() {
        // Fail-stop: nobody knows what the disk holds, so nothing more is served from memory.
        tasks.abort_all();
    }
    let ended = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(DRAIN_LIMIT, ended).await.is_err() {
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
    if tokio::time::timeout(RELEASE_LIMIT, released).await.is_err() {
        error!("something still holds the store");
    }
    drop(core);
    let joined = tokio::task::spawn_blocking(move || writer.join()).await;
    pump.abort();
    if !matches!(joined, Ok(Ok(()))) && result.is_ok() {
        result = Err(broken("the writer"));
    }
    result
}

fn broken(what: &str) -> ServerError {
    ServerError::System(std::io::Error::other(format!("{what} broke")))
}

/// Has keys expire when their time has come.
async fn expire(core: Arc<Core>, changed: Arc<Notify>, mut stop: watch::Receiver<bool>) {
    loop {
        if core.store.next_expiry().is_some() && core.clock.is_due() {
            let clock = core.clock.clone();
            tokio::select! {
                () = stopped(&mut stop) => return,
                _ = tokio::task::spawn_blocking(move || clock.keep()) => {}
            }
        }
        let due = async {
            match core.store.next_expiry() {
                Some(at) => tokio::time::sleep(core.clock.until(at).min(CLOCK_TICK)).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = stopped(&mut stop) => return,
            () = changed.notified() => continue,
            () = due => {}
        }
        if core.store.next_expiry().is_none_or(|at| at > core.clock.now()) {
            continue;
        }
        let expired = core.write(vec![Op::Expire { now: core.clock.now() }], true, false).await;
        if !matches!(expired.as_deref(), Ok([Ok(_)])) {
            tokio::time::sleep(EXPIRY_PAUSE).await;
        }
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
