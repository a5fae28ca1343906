//! The client: what a program calls.

use std::fmt;
use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use nkv_core::{Key, Pattern, Revision};
use nkv_protocol::{Body, Kind, Request, Stats, Subscriber, status};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use crate::error::{Error, ErrorKind, Result};
use crate::hub::{Local, Told};
use crate::options::ClientBuilder;
use crate::subscription::{self, Subscription};
use crate::task::{Ask, Control, Trouble};
use crate::types::{ConnectionState, Deleted, Entry, Page, PageOptions, PutOptions, ServerVersion};

/// How many keys with their values are asked for at a time, to begin with.
const GET_PAGE: u64 = 1_000;
/// How many keys are asked for at a time: the most that a server gives.
const LIST_PAGE: u64 = 10_000;

/// A connection to a server that is made again whenever it is lost.
///
/// Clones share it. It is closed when the last clone and the last subscription are dropped.
///
/// # Cancel safety
///
/// Every future of this type may be dropped at any time. A request that was not sent by then will not be; one that was
/// may take effect, and nobody will tell.
#[derive(Clone)]
pub struct Client {
    handle: Arc<Handle>,
    request_timeout: Duration,
    subscription_len_max: usize,
}

/// The way to the connection's task, which ends when no handle is left.
#[derive(Debug)]
pub(crate) struct Handle {
    asks: mpsc::Sender<Ask>,
    control: mpsc::UnboundedSender<Control>,
    state: watch::Receiver<ConnectionState>,
    trouble: Trouble,
    client_uuid: String,
    next_local: AtomicU64,
}

impl Handle {
    pub(crate) fn new(
        asks: mpsc::Sender<Ask>,
        control: mpsc::UnboundedSender<Control>,
        state: watch::Receiver<ConnectionState>,
        trouble: Trouble,
        client_uuid: String,
    ) -> Self {
        Handle { asks, control, state, trouble, client_uuid, next_local: AtomicU64::new(0) }
    }

    pub(crate) fn control(&self, control: Control) -> Result<()> {
        self.control.send(control).map_err(|_| Error::closed())
    }
}

impl Client {
    pub(crate) fn new(handle: Handle, request_timeout: Duration, subscription_len_max: usize) -> Self {
        Client { handle: Arc::new(handle), request_timeout, subscription_len_max }
    }

    /// Connects to a server with the default options; see [`Addr`](crate::Addr) for how to write an address.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidAddress`]; [`ErrorKind::CannotConnect`] when no nkv server answers in time.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime; see [`blocking`](crate::blocking) for programs without one.
    pub async fn connect(addr: &str) -> Result<Self> {
        Client::builder(addr).connect().await
    }

    /// A client with options.
    pub fn builder(addr: &str) -> ClientBuilder {
        ClientBuilder::new(addr)
    }

    /// The same connection, with another limit for how long a request may take.
    #[must_use]
    pub fn with_request_timeout(&self, request_timeout: Duration) -> Self {
        Client { request_timeout, ..self.clone() }
    }

    /// The client's name.
    #[must_use]
    pub fn client_uuid(&self) -> &str {
        &self.handle.client_uuid
    }

    /// What becomes of the connection.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<ConnectionState> {
        self.handle.state.clone()
    }

    /// Closes the connection for all clones; subscriptions end with [`EndReason::Closed`](crate::EndReason::Closed).
    pub fn close(&self) {
        // Closed already, if it fails.
        drop(self.handle.control(Control::Close));
    }

    /// Writes a value.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::OutcomeUnknown`] when the connection was lost or time ran out after it was sent: it is never sent
    /// twice, because that might bring an old value back over a newer one. Others say that nothing was written.
    pub async fn put(&self, key: &str, value: impl Into<Vec<u8>>) -> Result<Revision> {
        self.put_with(key, value, PutOptions::default()).await
    }

    /// Writes a value, with options.
    ///
    /// # Errors
    ///
    /// Those of [`put`](Self::put), and [`ErrorKind::Conflict`] with the key's present revision.
    pub async fn put_with(&self, key: &str, value: impl Into<Vec<u8>>, options: PutOptions) -> Result<Revision> {
        let mut request = Request::new(Kind::Put, Key::new(key)?.as_str().to_owned());
        request.value = Some(value.into().into());
        request.if_revision = options.if_revision.map(Revision::get);
        request.ttl_ms = options.ttl.map(|ttl| u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1));
        let body = self.ask(request).await?;
        body.revision.map(Revision::new).ok_or_else(|| Error::protocol("the server gave no revision"))
    }

    /// Reads a value; `None` if there is no such key.
    ///
    /// # Errors
    ///
    /// See [`ErrorKind`]; it is asked again when the connection is lost meanwhile.
    pub async fn get(&self, key: &str) -> Result<Option<Entry>> {
        let request = Request::new(Kind::Get, Key::new(key)?.as_str().to_owned());
        Ok(self.entries(request).await?.items.pop())
    }

    /// Reads all values that a pattern selects, in key order, in as many pages as it takes; `a` selects itself, `a.*`
    /// all below it, `*` everything.
    ///
    /// What changes meanwhile may be found as it was or as it is.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub async fn get_all(&self, pattern: &str) -> Result<Vec<Entry>> {
        let (mut found, mut limit) = (Vec::<Entry>::new(), GET_PAGE);
        loop {
            let after = found.last().map(|entry| entry.key.to_string());
            match self.get_page(pattern, PageOptions { limit: Some(limit), after }).await {
                Ok(page) => {
                    let done = !page.more || page.items.is_empty();
                    found.extend(page.items);
                    if done {
                        return Ok(found);
                    }
                }
                // The values are larger than expected: fewer at a time.
                Err(error) if *error.kind() == (ErrorKind::Server { status: status::TOO_LARGE }) && limit > 1 => {
                    limit /= 4
                }
                Err(error) => return Err(error),
            }
            limit = limit.max(1);
        }
    }

    /// Reads some of the values that a pattern selects, in key order.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get), and [`ErrorKind::Server`] with status 413 when the page would be too large.
    pub async fn get_page(&self, pattern: &str, options: PageOptions) -> Result<Page<Entry>> {
        let after = options.after.as_deref().map(Key::new).transpose()?;
        let page = self.entries(page_request(Kind::Get, pattern, options.limit, after.as_ref())?).await?;
        check_order(after.as_ref(), page.items.iter().map(|entry| &entry.key))?;
        Ok(page)
    }

    /// Reads all keys that a pattern selects, with their revisions, in key order.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub async fn list(&self, pattern: &str) -> Result<Vec<(Key, Revision)>> {
        let mut found = Vec::<(Key, Revision)>::new();
        loop {
            let after = found.last().map(|(key, _)| key.to_string());
            let page = self.list_page(pattern, PageOptions { limit: Some(LIST_PAGE), after }).await?;
            let done = !page.more || page.items.is_empty();
            found.extend(page.items);
            if done {
                return Ok(found);
            }
        }
    }

    /// Reads some of the keys that a pattern selects, with their revisions, in key order.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub async fn list_page(&self, pattern: &str, options: PageOptions) -> Result<Page<(Key, Revision)>> {
        let after = options.after.as_deref().map(Key::new).transpose()?;
        let body = self.ask(page_request(Kind::List, pattern, options.limit, after.as_ref())?).await?;
        let items = keys(&body)?.collect::<Result<Vec<_>>>()?;
        check_order(after.as_ref(), items.iter().map(|(key, _)| key))?;
        Ok(Page { items, more: body.more })
    }

    /// Removes all keys that a pattern selects.
    ///
    /// # Errors
    ///
    /// Those of [`put`](Self::put); that there is nothing to remove is no error.
    pub async fn delete(&self, pattern: &str) -> Result<Deleted> {
        Pattern::new(pattern)?;
        self.deleted(Request::new(Kind::Delete, pattern.to_owned())).await
    }

    /// Removes a key if it is at this revision.
    ///
    /// # Errors
    ///
    /// Those of [`put_with`](Self::put_with); that there is no such key is no error.
    pub async fn delete_if(&self, key: &str, if_revision: Revision) -> Result<Deleted> {
        let mut request = Request::new(Kind::Delete, Key::new(key)?.as_str().to_owned());
        request.if_revision = Some(if_revision.get());
        self.deleted(request).await
    }

    /// Whether a pattern selects any key.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub async fn exists(&self, pattern: &str) -> Result<bool> {
        Pattern::new(pattern)?;
        match self.ask(Request::new(Kind::Exists, pattern.to_owned())).await {
            Ok(_) => Ok(true),
            Err(error) if *error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Who would be told of a change of a key.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub async fn trace(&self, key: &str) -> Result<Vec<Subscriber>> {
        let request = Request::new(Kind::Trace, Key::new(key)?.as_str().to_owned());
        Ok(self.ask(request).await?.subscribers)
    }

    /// Whether the server works: an error if not.
    ///
    /// # Errors
    ///
    /// See [`ErrorKind`].
    pub async fn health(&self) -> Result<()> {
        self.ask(Request::new(Kind::Health, "")).await.map(drop)
    }

    /// What the server is.
    ///
    /// # Errors
    ///
    /// See [`ErrorKind`].
    pub async fn version(&self) -> Result<ServerVersion> {
        let body = self.ask(Request::new(Kind::Version, "")).await?;
        Ok(ServerVersion { version: body.version.unwrap_or_default(), protocol: body.protocol.unwrap_or(0) })
    }

    /// The server's figures.
    ///
    /// # Errors
    ///
    /// See [`ErrorKind`].
    pub async fn stats(&self) -> Result<Stats> {
        Ok(self.ask(Request::new(Kind::Stats, "")).await?.stats)
    }

    /// Reads a value that is JSON; `None` if there is no such key.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get), and [`ErrorKind::Json`].
    pub async fn get_as<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        self.get(key).await?.map(|entry| entry.json()).transpose()
    }

    /// Writes a value as JSON.
    ///
    /// # Errors
    ///
    /// Those of [`put`](Self::put), and [`ErrorKind::Json`].
    pub async fn put_as<T: Serialize + ?Sized>(&self, key: &str, value: &T) -> Result<Revision> {
        self.put(key, to_json(key, value)?).await
    }

    /// Writes a value as JSON, with options.
    ///
    /// # Errors
    ///
    /// Those of [`put_with`](Self::put_with), and [`ErrorKind::Json`].
    pub async fn put_as_with<T>(&self, key: &str, value: &T, options: PutOptions) -> Result<Revision>
    where
        T: Serialize + ?Sized,
    {
        self.put_with(key, to_json(key, value)?, options).await
    }

    /// Subscribes to a key and all below it, to all below it (`a.*`), or to everything (`*`), and waits until the server
    /// has accepted it. The present state is told first; see [`Subscription`].
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub async fn subscribe(&self, pattern: &str) -> Result<Subscription> {
        self.subscribe_to(Pattern::new(pattern)?, false).await
    }

    /// The value of a key, as it changes; waits until the present value is known. While the connection is lost, the last
    /// value stays. `changed()` fails when the client is closed; dropping the receiver ends the subscription.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub async fn watch(&self, key: &str) -> Result<watch::Receiver<Option<Entry>>> {
        self.watch_with(key, |entry| entry).await
    }

    /// The value of a key as JSON, as it changes; an error when a value is not the JSON of a `T`. Otherwise like
    /// [`watch`](Self::watch).
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub async fn watch_as<T>(&self, key: &str) -> Result<watch::Receiver<Result<Option<T>>>>
    where
        T: DeserializeOwned + Send + Sync + 'static,
    {
        self.watch_with(key, |entry| entry.map(|entry| entry.json()).transpose()).await
    }

    async fn watch_with<T: Send + Sync + 'static>(
        &self,
        key: &str,
        read: impl Fn(Option<Entry>) -> T + Send + 'static,
    ) -> Result<watch::Receiver<T>> {
        let pattern = Pattern::Key(Key::new(key)?);
        let watched = timeout(self.request_timeout, async {
            subscription::watch(self.subscribe_to(pattern, true).await?, read).await
        });
        watched.await.unwrap_or_else(|_| Err(self.timed_out()))
    }

    async fn subscribe_to(&self, pattern: Pattern, exact: bool) -> Result<Subscription> {
        let id = self.handle.next_local.fetch_add(1, Relaxed);
        let subscription = Subscription::new(Arc::clone(&self.handle), pattern.clone(), id);
        let (ready, accepted) = oneshot::channel();
        let (queue, len_max) = (Arc::clone(subscription.queue()), self.subscription_len_max);
        let local = Local { id, pattern, exact, queue, ready: Some(ready), told: Told::default(), len_max };
        self.handle.control(Control::Subscribe(local))?;
        match timeout(self.request_timeout, accepted).await {
            Ok(accepted) => accepted.map_err(|_| Error::closed())??,
            Err(_) => return Err(self.timed_out()),
        }
        Ok(subscription)
    }

    async fn entries(&self, request: Request<'static>) -> Result<Page<Entry>> {
        let body = match self.ask(request).await {
            Err(error) if *error.kind() == ErrorKind::NotFound => return Ok(Page { items: Vec::new(), more: false }),
            body => body?,
        };
        if body.values.len() != body.keys.len() {
            return Err(Error::protocol("the server's answer has more keys than values, or fewer"));
        }
        let entries = keys(&body)?.zip(&body.values);
        let entries =
            entries.map(|(key, value)| key.map(|(key, revision)| Entry { key, value: value.clone(), revision }));
        Ok(Page { items: entries.collect::<Result<_>>()?, more: body.more })
    }

    async fn deleted(&self, request: Request<'static>) -> Result<Deleted> {
        match self.ask(request).await {
            Ok(body) => Ok(Deleted { count: body.count.unwrap_or(0), revision: body.revision.map(Revision::new) }),
            Err(error) if *error.kind() == ErrorKind::NotFound => Ok(Deleted::default()),
            Err(error) => Err(error),
        }
    }

    async fn ask(&self, request: Request<'static>) -> Result<Box<Body>> {
        let is_write = matches!(request.kind, Kind::Put | Kind::Delete);
        let (reply, mut answer) = oneshot::channel();
        let stage = Arc::default();
        let ask = Ask { request, stage: Arc::clone(&stage), reply };
        let answered = timeout(self.request_timeout, async {
            self.handle.asks.send(ask).await.map_err(|_| Error::closed())?;
            (&mut answer).await.map_err(|_| Error::closed())?
        });
        let failure = match answered.await {
            Ok(Ok(body)) if body.status == status::OK => return Ok(body),
            Ok(Ok(body)) => return Err(Error::from_answer(&body)),
            Ok(Err(error)) if *error.kind() != ErrorKind::Closed => return Err(error),
            Ok(Err(closed)) => closed,
            Err(_) => {
                answer.close();
                self.timed_out()
            }
        };
        if stage.give_up() && is_write {
            let message = "it was sent, but no answer came: it may or may not have been done, or may be yet";
            return Err(Error::new(ErrorKind::OutcomeUnknown, message).because(failure));
        }
        Err(failure)
    }

    fn timed_out(&self) -> Error {
        let error = Error::new(ErrorKind::Timeout, format!("no answer within {:?}", self.request_timeout));
        let trouble = self.handle.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match trouble {
            Some(trouble) => error.because(trouble),
            None => error,
        }
    }
}

fn page_request(kind: Kind, pattern: &str, limit: Option<u64>, after: Option<&Key>) -> Result<Request<'static>> {
    Pattern::new(pattern)?;
    let mut request = Request::new(kind, pattern.to_owned());
    request.limit = limit;
    request.after = after.map(|after| after.as_str().to_owned().into());
    Ok(request)
}

/// Checks that a page goes forward: whoever asks for the next one after its last key would else never end.
fn check_order<'a>(mut after: Option<&'a Key>, keys: impl Iterator<Item = &'a Key>) -> Result<()> {
    for key in keys {
        if after.is_some_and(|after| key <= after) {
            return Err(Error::protocol(format!("the server's page goes back to the key '{key}'")));
        }
        after = Some(key);
    }
    Ok(())
}

fn keys(body: &Body) -> Result<impl Iterator<Item = Result<(Key, Revision)>>> {
    if body.keys.len() != body.revisions.len() {
        return Err(Error::protocol("the server's answer has more keys than revisions, or fewer"));
    }
    Ok(body.keys.iter().zip(&body.revisions).map(|(key, revision)| {
        let key =
            Key::new(key).map_err(|error| Error::protocol(format!("the server names an impossible key: {error}")))?;
        Ok((key, Revision::new(*revision)))
    }))
}

fn to_json<T: Serialize + ?Sized>(key: &str, value: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| Error::json(format!("the value for '{key}' cannot be made JSON"), error))
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = *self.handle.state.borrow();
        f.debug_struct("Client").field("client_uuid", &self.client_uuid()).field("state", &state).finish()
    }
}
