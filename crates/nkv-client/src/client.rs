//! The client: what a program calls.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use nkv_core::{Epoch, Key};
use nkv_protocol::{Body, ConnectedClient, Kind, Request, Subscriber, status};
use nkv_types::{
    AsKey, AsPattern, Deleted, Entry, Error, ErrorKind, IntoValue, Page, PageOptions, PutOptions, Result, Revision,
    Stats, to_json,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use crate::error::WireError as _;
use crate::options::ClientBuilder;
use crate::task::{Answer, Ask, Control, Shared, Slot, is_write};
use crate::types::{ConnectionState, ServerVersion};

mod subscribe;
mod update;

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
/// Every future of this type may be dropped at any time. A request of which the socket has taken nothing by then is taken
/// back, with its value, and never sent; one that was sent may take effect, unseen.
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
    shared: Arc<Shared>,
    client_uuid: String,
    next_local: AtomicU64,
    /// The process that it was made in.
    process: u32,
}

impl Handle {
    pub(crate) fn new(
        asks: mpsc::Sender<Ask>,
        control: mpsc::UnboundedSender<Control>,
        state: watch::Receiver<ConnectionState>,
        shared: Arc<Shared>,
        client_uuid: String,
    ) -> Self {
        let (next_local, process) = (AtomicU64::new(0), std::process::id());
        Handle { asks, control, state, shared, client_uuid, next_local, process }
    }

    pub(crate) fn control(&self, control: Control) -> Result<()> {
        self.check()?;
        self.control.send(control).map_err(|_| self.closed())
    }

    /// After a fork nothing of the connection works in the child, and what it did there would harm the parent's.
    pub(crate) fn check(&self) -> Result<()> {
        if self.process == std::process::id() {
            return Ok(());
        }
        let what = "the client belongs to the process that this one was forked from: make one here";
        Err(Error::new(ErrorKind::Closed, what))
    }

    fn closed(&self) -> Error {
        self.with_trouble(Error::closed())
    }

    /// An error with the reason why the connection is not there, if it is not.
    fn with_trouble(&self, error: Error) -> Error {
        match self.shared.trouble() {
            Some(trouble) => error.because(trouble),
            None => error,
        }
    }
}

impl Client {
    pub(crate) fn new(handle: Handle, request_timeout: Duration, subscription_len_max: usize) -> Self {
        Client { handle: Arc::new(handle), request_timeout, subscription_len_max }
    }

    /// Connects to a server with the default options; see [`Address`](crate::Address) for how to write an address.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidAddress`]; [`ErrorKind::CannotConnect`] when no nkv server answers in time.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime; see [`blocking`](crate::blocking) for programs without one.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example() -> nkv_client::Result<()> {
    /// let client = nkv_client::Client::connect("127.0.0.1:4222").await?;
    /// client.put("lamp.kitchen", "on").await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// The same over HTTP, through proxies and ingresses (with the feature `ws`, which is on by default):
    ///
    /// ```no_run
    /// # async fn example() -> nkv_client::Result<()> {
    /// let client = nkv_client::Client::connect("ws://nkv.example:8080").await?; // its path is /v1/ws
    /// client.put("lamp.kitchen", "on").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn connect(addr: &str) -> Result<Self> {
        Client::builder(addr).connect().await
    }

    /// A client with options.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// # async fn example() -> nkv_client::Result<()> {
    /// let client = nkv_client::Client::builder("unix:/run/nkv.sock")
    ///     .name("thermostat")
    ///     .wait_for_server(Duration::from_secs(30))
    ///     .connect()
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn builder(addr: &str) -> ClientBuilder {
        ClientBuilder::new(addr)
    }

    /// The same connection, with another limit for how long a request may take.
    #[must_use]
    pub fn with_request_timeout(&self, request_timeout: Duration) -> Self {
        Client { request_timeout, ..self.clone() }
    }

    /// What identifies the client.
    #[must_use]
    pub fn client_uuid(&self) -> &str {
        &self.handle.client_uuid
    }

    /// What becomes of the connection.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// use nkv_client::ConnectionState;
    ///
    /// let mut state = client.state();
    /// // Ends with an error once the client is closed.
    /// while state.changed().await.is_ok() {
    ///     if *state.borrow_and_update() == ConnectionState::Reconnecting {
    ///         println!("the server is away");
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn state(&self) -> watch::Receiver<ConnectionState> {
        self.handle.state.clone()
    }

    /// Whether it can be used: an error in a process that was forked from its own.
    pub(crate) fn check(&self) -> Result<()> {
        self.handle.check()
    }

    /// Connects again now, if the connection is lost, instead of waiting for the next attempt: for programs that know that the
    /// network is there again. Later attempts are delayed as after a first failure.
    ///
    /// A connection that is there is asked for a sign of life. If none comes within twice the
    /// [`connect_timeout`](ClientBuilder::connect_timeout), it counts as lost.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn network_is_up() {}
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// network_is_up().await; // as the program learns of it
    /// client.reconnect_now();
    /// client.get("lamp.kitchen").await?; // waits for the connection, not for the next attempt
    /// # Ok(())
    /// # }
    /// ```
    pub fn reconnect_now(&self) {
        // Closed, if it fails.
        drop(self.handle.control(Control::Nudge));
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
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// let revision = client.put("lamp.kitchen", "on").await?;
    /// println!("written at {revision}");
    /// # Ok(())
    /// # }
    /// ```
    pub async fn put(&self, key: impl AsKey, value: impl IntoValue) -> Result<Revision> {
        self.put_with(key, value, PutOptions::default()).await
    }

    /// Writes a value, with options.
    ///
    /// # Errors
    ///
    /// Those of [`put`](Self::put), and [`ErrorKind::Conflict`] with the key's present revision, or
    /// [`ErrorKind::OtherEpoch`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// use nkv_client::{ErrorKind, PutOptions, Revision};
    ///
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// // Only if there is no leader, and for half a minute at most.
    /// let options = PutOptions::default().with_if_revision(Revision::ZERO).with_ttl(Duration::from_secs(30));
    /// match client.put_with("leader", "me", options).await {
    ///     Ok(revision) => println!("leader since {revision}"),
    ///     Err(error) if matches!(error.kind(), ErrorKind::Conflict { .. }) => println!("another one leads"),
    ///     Err(error) => return Err(error),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn put_with(&self, key: impl AsKey, value: impl IntoValue, options: PutOptions) -> Result<Revision> {
        let mut request = Request::new(Kind::Put, key.key_text()?.to_owned());
        let (value, len_max) = (value.into_value(), self.handle.shared.value_len_max());
        if value.len() as u64 > len_max {
            return Err(Error::too_large(value.len(), len_max));
        }
        request.value = Some(Vec::from(value).into());
        request.if_revision = options.if_revision.map(Revision::get);
        request.ttl_ms = options.ttl.map(|ttl| u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1));
        let (body, epoch) = self.ask_in(request, options.if_revision.and_then(Revision::epoch)).await?;
        let revision = body.revision.ok_or_else(|| Error::protocol("the server gave no revision"))?;
        Ok(Revision::in_epoch(epoch, revision))
    }

    /// Reads a value; `None` if there is no such key.
    ///
    /// # Errors
    ///
    /// See [`ErrorKind`]; it is asked again when the connection is lost meanwhile.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// if let Some(entry) = client.get("lamp.kitchen").await? {
    ///     println!("{:?} since {}", entry.value, entry.revision);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn get(&self, key: impl AsKey) -> Result<Option<Entry>> {
        let request = Request::new(Kind::Get, key.key_text()?.to_owned());
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
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// for entry in client.get_all("lamp.*").await? {
    ///     println!("{} is {:?}", entry.key, entry.value);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn get_all(&self, pattern: impl AsPattern) -> Result<Vec<Entry>> {
        let (mut found, mut limit) = (Vec::<Entry>::new(), GET_PAGE);
        loop {
            match self.get_page(&pattern, page_after(limit, found.last().map(|entry| &entry.key))).await {
                Ok(page) => {
                    let done = !page.more || page.items.is_empty();
                    found.extend(page.items);
                    if done {
                        return Ok(found);
                    }
                    limit = limit.saturating_mul(2).min(GET_PAGE);
                }
                // The values are larger than expected: fewer at a time.
                Err(error) if *error.kind() == (ErrorKind::Refused { status: status::TOO_LARGE }) && limit > 1 => {
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
    /// Those of [`get`](Self::get), and [`ErrorKind::Refused`] with status 413 when the page would be too large.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use nkv_client::PageOptions;
    ///
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// let mut options = PageOptions::default().with_limit(100);
    /// loop {
    ///     let page = client.get_page("lamp.*", options.clone()).await?;
    ///     let Some(last) = page.items.last() else { break };
    ///     options = options.with_after(last.key.clone());
    ///     println!("{} more", page.items.len());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn get_page(&self, pattern: impl AsPattern, options: PageOptions) -> Result<Page<Entry>> {
        let after = options.after.as_ref();
        let page = self.entries(page_request(Kind::Get, pattern, options.limit, after)?).await?;
        check_order(after, page.items.iter().map(|entry| &entry.key))?;
        Ok(page)
    }

    /// Reads all keys that a pattern selects, with their revisions, in key order.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// for (key, revision) in client.list("*").await? {
    ///     println!("{key} at {revision}");
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn list(&self, pattern: impl AsPattern) -> Result<Vec<(Key, Revision)>> {
        let mut found = Vec::<(Key, Revision)>::new();
        loop {
            let page = self.list_page(&pattern, page_after(LIST_PAGE, found.last().map(|(key, _)| key))).await?;
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
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use nkv_client::PageOptions;
    ///
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// let mut options = PageOptions::default().with_limit(100);
    /// loop {
    ///     let page = client.list_page("lamp.*", options.clone()).await?;
    ///     page.items.iter().for_each(|(key, revision)| println!("{key} at {revision}"));
    ///     let Some((last, _)) = page.items.last() else { break };
    ///     options = options.with_after(last.clone());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn list_page(&self, pattern: impl AsPattern, options: PageOptions) -> Result<Page<(Key, Revision)>> {
        let after = options.after.as_ref();
        let (body, epoch) = self.ask(page_request(Kind::List, pattern, options.limit, after)?).await?;
        check_count(&body, options.limit.unwrap_or(LIST_PAGE))?;
        let items = keys(&body, epoch)?.collect::<Result<Vec<_>>>()?;
        check_order(after, items.iter().map(|(key, _)| key))?;
        Ok(Page::new(items, body.more))
    }

    /// Removes all keys that a pattern selects.
    ///
    /// # Errors
    ///
    /// Those of [`put`](Self::put); that there is nothing to remove is no error.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// let deleted = client.delete("lamp.*").await?;
    /// println!("{} lamps are gone", deleted.count);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn delete(&self, pattern: impl AsPattern) -> Result<Deleted> {
        self.deleted(Request::new(Kind::Delete, pattern.pattern_text()?.into_owned()), None).await
    }

    /// Removes a key if it is at this revision.
    ///
    /// # Errors
    ///
    /// Those of [`put_with`](Self::put_with); that there is no such key is no error.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// if let Some(entry) = client.get("job.7").await? {
    ///     // An error if it has changed since it was read.
    ///     client.delete_if(&entry.key, entry.revision).await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn delete_if(&self, key: impl AsKey, if_revision: Revision) -> Result<Deleted> {
        let mut request = Request::new(Kind::Delete, key.key_text()?.to_owned());
        request.if_revision = Some(if_revision.get());
        self.deleted(request, if_revision.epoch()).await
    }

    /// Whether a pattern selects any key.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// if !client.exists("lamp.*").await? {
    ///     println!("it is dark");
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn exists(&self, pattern: impl AsPattern) -> Result<bool> {
        Ok(self.find(Request::new(Kind::Exists, pattern.pattern_text()?.into_owned()), None).await?.is_some())
    }

    /// The subscribers that would be notified of a change of a key.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// for subscriber in client.trace("lamp.kitchen").await? {
    ///     println!("{} hears of it by {}", subscriber.client_uuid, subscriber.pattern);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn trace(&self, key: impl AsKey) -> Result<Vec<Subscriber>> {
        let request = Request::new(Kind::Trace, key.key_text()?.to_owned());
        Ok(self.ask(request).await?.0.subscribers)
    }

    /// Lists all clients that are connected to the server, with their names, addresses and backlogs.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get), and [`ErrorKind::Refused`] with status 400 from a server that does not know.
    pub async fn clients(&self) -> Result<Vec<ConnectedClient>> {
        Ok(self.ask(Request::new(Kind::Trace, "")).await?.0.clients)
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
        let (body, _) = self.ask(Request::new(Kind::Version, "")).await?;
        Ok(ServerVersion { version: body.version.unwrap_or_default(), protocol: body.protocol.unwrap_or(0) })
    }

    /// The server's figures.
    ///
    /// # Errors
    ///
    /// See [`ErrorKind`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// let stats = client.stats().await?;
    /// println!("{} keys, {} connections, up for {:?}", stats.keys, stats.connections, stats.uptime);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn stats(&self) -> Result<Stats> {
        let stats = self.ask(Request::new(Kind::Stats, "")).await?.0.stats;
        Ok(Stats::new(stats.numbers, stats.words))
    }

    /// Reads a value that is JSON; `None` if there is no such key.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get), and [`ErrorKind::Json`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// let level = client.get_as::<u8>("lamp.kitchen.level").await?.unwrap_or(0);
    /// println!("{level} %");
    /// # Ok(())
    /// # }
    /// ```
    pub async fn get_as<T: DeserializeOwned>(&self, key: impl AsKey) -> Result<Option<T>> {
        self.get(key).await?.map(|entry| entry.json()).transpose()
    }

    /// Writes a value as JSON.
    ///
    /// # Errors
    ///
    /// Those of [`put`](Self::put), and [`ErrorKind::Json`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// client.put_as("lamp.kitchen", &("on", 80)).await?; // anything that is `Serialize`
    /// # Ok(())
    /// # }
    /// ```
    pub async fn put_as<T: Serialize + ?Sized>(&self, key: impl AsKey, value: &T) -> Result<Revision> {
        let value = to_json(key.key_text()?, value)?;
        self.put(key, value).await
    }

    /// Writes a value as JSON, with options.
    ///
    /// # Errors
    ///
    /// Those of [`put_with`](Self::put_with), and [`ErrorKind::Json`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use std::time::Duration;
    ///
    /// use nkv_client::PutOptions;
    ///
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// let options = PutOptions::default().with_ttl(Duration::from_secs(60));
    /// client.put_as_with("sensor.hall", &[20.5, 21.0], options).await?; // gone in a minute
    /// # Ok(())
    /// # }
    /// ```
    pub async fn put_as_with<T>(&self, key: impl AsKey, value: &T, options: PutOptions) -> Result<Revision>
    where
        T: Serialize + ?Sized,
    {
        let value = to_json(key.key_text()?, value)?;
        self.put_with(key, value, options).await
    }

    async fn entries(&self, request: Request<'static>) -> Result<Page<Entry>> {
        let is_one = Key::check(&request.key).is_ok() && request.after.is_none();
        let most = request.limit.unwrap_or(if is_one { 1 } else { u64::MAX });
        let Some((body, epoch)) = self.find(request, None).await? else { return Ok(Page::new(Vec::new(), false)) };
        check_count(&body, most)?;
        if body.values.len() != body.keys.len() {
            return Err(Error::protocol("the server's answer has more keys than values, or fewer"));
        }
        let entries = keys(&body, epoch)?.zip(&body.values);
        let entries = entries.map(|(key, value)| key.map(|(key, revision)| Entry::new(key, value, revision)));
        Ok(Page::new(entries.collect::<Result<_>>()?, body.more))
    }

    async fn deleted(&self, request: Request<'static>, epoch: Option<Epoch>) -> Result<Deleted> {
        let Some((body, epoch)) = self.find(request, epoch).await? else { return Ok(Deleted::default()) };
        let mut deleted = Deleted::default();
        deleted.count = body.count.unwrap_or(0);
        deleted.revision = body.revision.map(|revision| Revision::in_epoch(epoch, revision));
        Ok(deleted)
    }

    /// Asks for what may not be there: `None` if it is not.
    async fn find(&self, request: Request<'static>, epoch: Option<Epoch>) -> Result<Option<Answer>> {
        let is_write = is_write(&request);
        let answer = self.exchange(request, epoch).await?;
        if answer.0.status == status::NOT_FOUND { Ok(None) } else { read(answer, is_write).map(Some) }
    }

    async fn ask(&self, request: Request<'static>) -> Result<Answer> {
        self.ask_in(request, None).await
    }

    /// Asks, with a condition of this epoch.
    async fn ask_in(&self, request: Request<'static>, epoch: Option<Epoch>) -> Result<Answer> {
        let is_write = is_write(&request);
        read(self.exchange(request, epoch).await?, is_write)
    }

    /// Sends a request, with a condition of this epoch, and gives the answer, whatever it says.
    async fn exchange(&self, request: Request<'static>, epoch: Option<Epoch>) -> Result<Answer> {
        let is_write = is_write(&request);
        let (reply, mut answer) = oneshot::channel();
        let taken_back = TakeBack(Arc::new(Slot::new(request)));
        let ask = Ask { slot: Arc::clone(&taken_back.0), epoch, reply };
        let answered = timeout(self.request_timeout, async {
            self.handle.asks.send(ask).await.map_err(|_| self.handle.closed())?;
            (&mut answer).await.map_err(|_| self.handle.closed())?
        });
        let failure = match answered.await {
            Ok(Err(error)) if *error.kind() == ErrorKind::Closed => error,
            Ok(answer) => return answer,
            // Asking the system each time would cost as much as the rest; in a forked process there is no answer.
            Err(_) => self.handle.check().err().unwrap_or_else(|| self.timed_out()),
        };
        let was_sent = taken_back.0.give_up();
        answer.close();
        if let Ok(answer) = answer.try_recv() {
            return answer; // it came at the last moment
        }
        if was_sent && is_write {
            let message = "it was sent, but no answer came: it may or may not have been done, or may be yet";
            return Err(Error::new(ErrorKind::OutcomeUnknown, message).because(failure));
        }
        Err(failure)
    }

    fn timed_out(&self) -> Error {
        let message = format!("no answer within {:?}", self.request_timeout);
        self.handle.with_trouble(Error::new(ErrorKind::Timeout, message))
    }
}

/// Takes a request back when its caller gives up, however that is.
struct TakeBack(Arc<Slot>);

impl Drop for TakeBack {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

fn read((body, epoch): Answer, is_write: bool) -> Result<Answer> {
    match body.status {
        status::OK => Ok((body, epoch)),
        _ if is_write => Err(Error::from_answer_to_write(&body, epoch)),
        _ => Err(Error::from_answer(&body, epoch)),
    }
}

fn page_after(limit: u64, after: Option<&Key>) -> PageOptions {
    let mut options = PageOptions::default().with_limit(limit);
    options.after = after.cloned();
    options
}

fn page_request(
    kind: Kind,
    pattern: impl AsPattern,
    limit: Option<u64>,
    after: Option<&Key>,
) -> Result<Request<'static>> {
    let mut request = Request::new(kind, pattern.pattern_text()?.into_owned());
    request.limit = limit;
    request.after = after.map(|after| after.as_str().to_owned().into());
    Ok(request)
}

/// Checks that there are not more keys than were asked for, before they are read: each takes much more than its place in the
/// answer.
fn check_count(body: &Body, most: u64) -> Result<()> {
    let count = body.keys.len() as u64;
    let message = || format!("the server gave {count} keys, of which at most {most} were asked for");
    if count > most { Err(Error::protocol(message())) } else { Ok(()) }
}

/// Checks that a page goes forward: reading page after page would never end else.
fn check_order<'a>(mut after: Option<&'a Key>, keys: impl Iterator<Item = &'a Key>) -> Result<()> {
    for key in keys {
        if after.is_some_and(|after| key <= after) {
            return Err(Error::protocol(format!("the server's page goes back to the key '{key}'")));
        }
        after = Some(key);
    }
    Ok(())
}

fn keys(body: &Body, epoch: Epoch) -> Result<impl Iterator<Item = Result<(Key, Revision)>>> {
    if body.keys.len() != body.revisions.len() {
        return Err(Error::protocol("the server's answer has more keys than revisions, or fewer"));
    }
    Ok(body.keys.iter().zip(&body.revisions).map(move |(key, revision)| {
        let key =
            Key::new(key).map_err(|error| Error::protocol(format!("the server names an impossible key: {error}")))?;
        Ok((key, Revision::in_epoch(epoch, *revision)))
    }))
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = *self.handle.state.borrow();
        f.debug_struct("Client").field("client_uuid", &self.client_uuid()).field("state", &state).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client as a process has it that was forked from its own: the connection's task is not there.
    fn forked(request_timeout: Duration) -> (Client, mpsc::Receiver<Ask>, mpsc::UnboundedReceiver<Control>) {
        let ((asks, asks_rx), (control, control_rx)) = (mpsc::channel(10), mpsc::unbounded_channel());
        let (_, state) = watch::channel(ConnectionState::Connected);
        let mut handle = Handle::new(asks, control, state, Arc::new(Shared::new(u64::MAX)), "me".into());
        handle.process = handle.process.wrapping_add(1);
        (Client::new(handle, request_timeout, 0), asks_rx, control_rx)
    }

    #[tokio::test(start_paused = true)]
    async fn in_a_forked_process_a_client_says_what_is_wrong() {
        let (client, _asks, mut control) = forked(Duration::from_secs(5));
        for error in [client.check(), client.get("a").await.map(drop), client.subscribe("a").await.map(drop)] {
            let error = error.unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Closed);
            assert!(error.to_string().contains("forked"), "{error}");
        }
        drop(client);
        assert!(control.recv().await.is_none(), "the connection of the other process is left alone");
    }
}
