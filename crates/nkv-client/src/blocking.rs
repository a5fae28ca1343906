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

use nkv_core::{Key, Revision};
use nkv_protocol::{Stats, Subscriber};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::{Builder, Runtime};

use crate::error::{Error, ErrorKind, Result};
use crate::options::ClientBuilder;
use crate::types::{ConnectionState, Deleted, Entry, Event, Page, PageOptions, PutOptions, ServerVersion};

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
                    self.runtime.block_on(self.client.$name($($arg),*))
                }
            )*
        }
    };
}

blocking! {
    /// Writes a value.
    fn put(key: &str, value: impl Into<Vec<u8>>) -> Revision;
    /// Writes a value, with options.
    fn put_with(key: &str, value: impl Into<Vec<u8>>, options: PutOptions) -> Revision;
    /// Writes a value as JSON.
    fn put_as<T: Serialize>(key: &str, value: &T) -> Revision;
    /// Writes a value as JSON, with options.
    fn put_as_with<T: Serialize>(key: &str, value: &T, options: PutOptions) -> Revision;
    /// Reads a value; `None` if there is no such key.
    fn get(key: &str) -> Option<Entry>;
    /// Reads a value that is JSON; `None` if there is no such key.
    fn get_as<T: DeserializeOwned>(key: &str) -> Option<T>;
    /// Reads all values that a pattern selects.
    fn get_all(pattern: &str) -> Vec<Entry>;
    /// Reads some of the values that a pattern selects.
    fn get_page(pattern: &str, options: PageOptions) -> Page<Entry>;
    /// Reads all keys that a pattern selects, with their revisions.
    fn list(pattern: &str) -> Vec<(Key, Revision)>;
    /// Reads some of the keys that a pattern selects, with their revisions.
    fn list_page(pattern: &str, options: PageOptions) -> Page<(Key, Revision)>;
    /// Removes all keys that a pattern selects.
    fn delete(pattern: &str) -> Deleted;
    /// Removes a key if it is at this revision.
    fn delete_if(key: &str, if_revision: Revision) -> Deleted;
    /// Whether a pattern selects any key.
    fn exists(pattern: &str) -> bool;
    /// Who would be told of a change of a key.
    fn trace(key: &str) -> Vec<Subscriber>;
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

    /// What becomes of the connection.
    #[must_use]
    pub fn state(&self) -> ConnectionState {
        *self.client.state().borrow()
    }

    /// Closes the connection for all clones; subscriptions end.
    pub fn close(&self) {
        self.client.close();
    }

    /// Subscribes to what a pattern covers; see [`crate::Subscription`] for what is told.
    ///
    /// # Errors
    ///
    /// Those of [`crate::Client::subscribe`].
    pub fn subscribe(&self, pattern: &str) -> Result<Subscription> {
        let subscription = self.runtime.block_on(self.client.subscribe(pattern))?;
        Ok(Subscription { subscription, runtime: Arc::clone(&self.runtime) })
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
    runtime: Arc<Background>,
}

impl Subscription {
    /// The next event if there is one within `patience`; `None` if there is not, and after [`Event::Ended`].
    pub fn next_timeout(&mut self, patience: Duration) -> Option<Event> {
        let next = self.subscription.next();
        self.runtime.block_on(async { tokio::time::timeout(patience, next).await.ok().flatten() })
    }
}

impl Iterator for Subscription {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        self.runtime.block_on(self.subscription.next())
    }
}

impl fmt::Debug for Subscription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.subscription, f)
    }
}
