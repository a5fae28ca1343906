//! The same client for programs without a runtime: every call blocks its thread.
//!
//! A thread of its own keeps the connection alive between calls.
//!
//! # Panics
//!
//! Every call panics within a tokio runtime: there, use [`crate::Client`].

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use nkv_core::Key;
use nkv_protocol::{ConnectedClient, Subscriber};
use nkv_types::{
    AsKey, AsPattern, AsPatterns, Branch, Deleted, Edit, EndReason, Entry, Error, ErrorKind, Event, IntoEdit,
    IntoValue, Page, PageOptions, PutOptions, Result, Revision, Stats, SubscribeOptions, Watched,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;

use crate::options::ClientBuilder;
use crate::types::{ConnectionState, ServerVersion};

/// A connection to a server that is made again whenever it is lost; see [`crate::Client`].
///
/// # Examples
///
/// ```no_run
/// let client = nkv_client::blocking::Client::connect("127.0.0.1:4222")?;
/// client.put("lamp.kitchen", "on")?;
/// for event in client.subscribe("lamp")? {
///     println!("{event:?}");
/// }
/// # Ok::<(), nkv_client::Error>(())
/// ```
#[derive(Clone)]
pub struct Client {
    client: crate::Client,
    runtime: Arc<Background>,
}

/// Runs the connection's task; shut down without waiting, so that it may be dropped anywhere.
struct Background(Option<Runtime>);

impl Background {
    fn start() -> Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("nkv-client").enable_all().build();
        let runtime = runtime
            .map_err(|error| Error::new(ErrorKind::CannotConnect, "no thread for the connection").because(error))?;
        Ok(Background(Some(runtime)))
    }

    #[expect(clippy::expect_used, reason = "no peer has a say in it")]
    fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.0.as_ref().expect("it is taken only when this is dropped").block_on(work)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// The calls that are those of [`crate::Client`], waited for.
macro_rules! blocking {
    ($($(#[$doc:meta])* fn $name:ident $(<$T:ident: $bound:path>)? ($($arg:ident: $of:ty),*) -> $out:ty;)*) => {
        impl Client {
            $(
                $(#[$doc])*
                ///
                /// # Errors
                ///
                /// Those of the method of the same name of [`crate::Client`].
                pub fn $name $(<$T: $bound>)? (&self, $($arg: $of),*) -> Result<$out> {
                    self.client.check()?;
                    self.runtime.block_on(self.client.$name($($arg),*))
                }
            )*
        }
    };
}

blocking! {
    /// Writes a value.
    fn put(key: impl AsKey, value: impl IntoValue) -> Revision;
    /// Writes a value, with options.
    fn put_with(key: impl AsKey, value: impl IntoValue, options: PutOptions) -> Revision;
    /// Writes a value as JSON.
    fn put_as<T: Serialize>(key: impl AsKey, value: &T) -> Revision;
    /// Writes a value as JSON, with options.
    fn put_as_with<T: Serialize>(key: impl AsKey, value: &T, options: PutOptions) -> Revision;
    /// Reads a value; `None` if there is no such key.
    fn get(key: impl AsKey) -> Option<Entry>;
    /// Reads a value that is JSON; `None` if there is no such key.
    fn get_as<T: DeserializeOwned>(key: impl AsKey) -> Option<T>;
    /// Reads all values that a pattern selects.
    fn get_all(pattern: impl AsPattern) -> Vec<Entry>;
    /// Reads some of the values that a pattern selects.
    fn get_page(pattern: impl AsPattern, options: PageOptions) -> Page<Entry>;
    /// Reads all keys that a pattern selects, with their revisions.
    fn list(pattern: impl AsPattern) -> Vec<(Key, Revision)>;
    /// Reads some of the keys that a pattern selects, with their revisions.
    fn list_page(pattern: impl AsPattern, options: PageOptions) -> Page<(Key, Revision)>;
    /// Removes all keys that a pattern selects.
    fn delete(pattern: impl AsPattern) -> Deleted;
    /// Removes a key if it is at this revision.
    fn delete_if(key: impl AsKey, if_revision: Revision) -> Deleted;
    /// Whether a pattern selects any key.
    fn exists(pattern: impl AsPattern) -> bool;
    /// The subscribers that would be notified of a change of a key.
    fn trace(key: impl AsKey) -> Vec<Subscriber>;
    /// Lists all clients that are connected to the server.
    fn clients() -> Vec<ConnectedClient>;
    /// Whether the server works: an error if not.
    fn health() -> ();
    /// What the server is.
    fn version() -> ServerVersion;
    /// The server's figures.
    fn stats() -> Stats;
}

impl Client {
    /// Connects to a server with the default options.
    ///
    /// # Errors
    ///
    /// Those of [`crate::Client::connect`].
    pub fn connect(addr: &str) -> Result<Self> {
        Client::connect_with(crate::Client::builder(addr))
    }

    /// Connects to a server.
    ///
    /// # Errors
    ///
    /// Those of [`ClientBuilder::connect`].
    pub fn connect_with(builder: ClientBuilder) -> Result<Self> {
        let runtime = Background::start()?;
        let client = runtime.block_on(builder.connect())?;
        Ok(Client { client, runtime: Arc::new(runtime) })
    }

    /// The same connection, with another limit for how long a request may take.
    #[must_use]
    pub fn with_request_timeout(&self, request_timeout: Duration) -> Self {
        Client { client: self.client.with_request_timeout(request_timeout), runtime: Arc::clone(&self.runtime) }
    }

    /// What identifies the client.
    #[must_use]
    pub fn client_uuid(&self) -> &str {
        self.client.client_uuid()
    }

    /// What becomes of the connection; in a process that was forked from the client's own, it is closed.
    #[must_use]
    pub fn state(&self) -> ConnectionState {
        self.client.check().map_or(ConnectionState::Closed, |()| *self.client.state().borrow())
    }

    /// Connects again now instead of waiting for the next attempt; see [`crate::Client::reconnect_now`].
    pub fn reconnect_now(&self) {
        self.client.reconnect_now();
    }

    /// Closes the connection for all clones; subscriptions end.
    pub fn close(&self) {
        self.client.close();
    }

    /// Changes a value that others may change too; see [`crate::Client::update`].
    ///
    /// # Errors
    ///
    /// Those of [`crate::Client::update`].
    pub fn update<E: IntoEdit>(&self, key: impl AsKey, edit: impl FnMut(Option<&Entry>) -> E) -> Result<Option<Entry>> {
        self.client.check()?;
        self.runtime.block_on(self.client.update(key, edit))
    }

    /// The same with values that are JSON; see [`crate::Client::update_as`].
    ///
    /// # Errors
    ///
    /// Those of [`crate::Client::update_as`].
    pub fn update_as<T: Serialize + DeserializeOwned, E: Into<Edit<T>>>(
        &self,
        key: impl AsKey,
        edit: impl FnMut(Option<T>) -> E,
    ) -> Result<Option<T>> {
        self.client.check()?;
        self.runtime.block_on(self.client.update_as(key, edit))
    }

    /// Subscribes to what a pattern, or several, cover; see [`crate::Subscription`] for what it delivers.
    ///
    /// # Errors
    ///
    /// Those of [`crate::Client::subscribe`].
    pub fn subscribe(&self, patterns: impl AsPatterns) -> Result<Subscription> {
        self.subscribe_with(patterns, SubscribeOptions::default())
    }

    /// Subscribes, with options.
    ///
    /// # Errors
    ///
    /// Those of [`crate::Client::subscribe_with`].
    pub fn subscribe_with(&self, patterns: impl AsPatterns, options: SubscribeOptions) -> Result<Subscription> {
        self.client.check()?;
        let subscription = self.runtime.block_on(self.client.subscribe_with(patterns, options))?;
        Ok(Subscription { subscription, client: self.clone(), has_ended: false })
    }

    /// The value of a key, as it changes; see [`crate::Client::watch`].
    ///
    /// # Errors
    ///
    /// Those of [`crate::Client::watch`].
    pub fn watch(&self, key: impl AsKey) -> Result<Watch<Entry>> {
        self.client.check()?;
        Ok(Watch { watch: self.runtime.block_on(self.client.watch(key))?, client: self.clone() })
    }

    /// The value of a key as JSON, as it changes; see [`crate::Client::watch_as`].
    ///
    /// # Errors
    ///
    /// Those of [`crate::Client::watch_as`].
    pub fn watch_as<T: DeserializeOwned + Send + Sync + 'static>(&self, key: impl AsKey) -> Result<Watch<T>> {
        self.client.check()?;
        Ok(Watch { watch: self.runtime.block_on(self.client.watch_as(key))?, client: self.clone() })
    }

    /// All keys that a pattern covers, with their values, as they change; see [`crate::Client::watch_branch`].
    ///
    /// # Errors
    ///
    /// Those of [`crate::Client::watch_branch`].
    pub fn watch_branch(&self, pattern: impl AsPattern) -> Result<BranchWatch<Entry>> {
        self.client.check()?;
        Ok(BranchWatch { watch: self.runtime.block_on(self.client.watch_branch(pattern))?, client: self.clone() })
    }

    /// The same with values as JSON; see [`crate::Client::watch_branch_as`].
    ///
    /// # Errors
    ///
    /// Those of [`crate::Client::watch_branch_as`].
    pub fn watch_branch_as<T>(&self, pattern: impl AsPattern) -> Result<BranchWatch<T>>
    where
        T: DeserializeOwned + Send + Sync + 'static,
    {
        self.client.check()?;
        Ok(BranchWatch { watch: self.runtime.block_on(self.client.watch_branch_as(pattern))?, client: self.clone() })
    }

    /// Waits for `work`, for at most `patience`.
    fn wait<T>(&self, patience: Duration, work: impl Future<Output = T>) -> Result<T> {
        self.client.check()?;
        let waited = self.runtime.block_on(async { tokio::time::timeout(patience, work).await });
        waited.map_err(|_| Error::new(ErrorKind::Timeout, format!("nothing within {patience:?}")))
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.client, f)
    }
}

/// An iterator of what happens to the keys that a pattern covers; `next` blocks until something does.
pub struct Subscription {
    subscription: crate::Subscription,
    client: Client,
    has_ended: bool,
}

impl Subscription {
    /// The next event; `None` after [`Event::Ended`].
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Timeout`] if there is none within `patience`; [`ErrorKind::Closed`] in a process that was forked from the
    /// client's own.
    pub fn next_timeout(&mut self, patience: Duration) -> Result<Option<Event>> {
        self.client.wait(patience, self.subscription.next())
    }
}

impl Iterator for Subscription {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        if self.client.client.check().is_ok() {
            return self.client.runtime.block_on(self.subscription.next());
        }
        let ended = Event::Ended(EndReason::Closed);
        (!std::mem::replace(&mut self.has_ended, true)).then_some(ended)
    }
}

/// The value of a key as it changes.
#[derive(Clone)]
pub struct Watch<T> {
    watch: crate::Watch<T>,
    client: Client,
}

impl<T: Clone> Watch<T> {
    /// What is known now; in a process that was forked from the client's own, nothing is live.
    #[must_use]
    pub fn get(&self) -> Watched<T> {
        let mut watched = self.watch.borrow().clone();
        watched.is_live &= self.client.client.check().is_ok();
        watched
    }

    /// Waits for a change that was not seen yet, and gives what is known then.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Timeout`] if there is none within `patience`; [`ErrorKind::Closed`] once the subscription has ended.
    pub fn changed(&mut self, patience: Duration) -> Result<Watched<T>> {
        let Watch { watch, client } = self;
        client.wait(patience, watch.changed())??;
        Ok(watch.borrow_and_update().clone())
    }
}

/// The keys that a pattern covers, with their values, as they change.
#[derive(Clone)]
pub struct BranchWatch<T> {
    watch: crate::BranchWatch<T>,
    client: Client,
}

impl<T> BranchWatch<T> {
    /// What is known now; nothing is copied. What is borrowed must not be held for long: the connection waits for it. In a process
    /// that was forked from the client's own, it is what was known at the fork.
    #[must_use]
    pub fn borrow(&self) -> watch::Ref<'_, Branch<T>> {
        self.watch.borrow()
    }

    /// Waits for a change that was not seen yet, and gives what is known then.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Timeout`] if there is none within `patience`; [`ErrorKind::Closed`] once the subscription has ended, and in
    /// a process that was forked from the client's own.
    pub fn changed(&mut self, patience: Duration) -> Result<watch::Ref<'_, Branch<T>>> {
        let BranchWatch { watch, client } = self;
        client.wait(patience, watch.changed())??;
        Ok(watch.borrow_and_update())
    }

    /// Waits until what is known is as wanted, and gives it.
    ///
    /// # Errors
    ///
    /// Those of [`changed`](Self::changed).
    pub fn wait_for(
        &mut self,
        patience: Duration,
        is_wanted: impl FnMut(&Branch<T>) -> bool,
    ) -> Result<watch::Ref<'_, Branch<T>>> {
        self.client.wait(patience, self.watch.wait_for(is_wanted))?
    }
}

impl<T: fmt::Debug> fmt::Debug for BranchWatch<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.watch, f)
    }
}

impl<T: fmt::Debug> fmt::Debug for Watch<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.watch, f)
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.subscription, f)
    }
}
