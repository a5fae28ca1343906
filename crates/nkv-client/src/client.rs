//! The client: what a program calls.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use nkv_core::{Epoch, Key, Pattern};
use nkv_protocol::{Body, ConnectedClient, Kind, Request, Subscriber, status};
use nkv_types::{
    AsKey, AsPattern, AsPatterns, Deleted, Edit, Entry, Error, ErrorKind, IntoEdit, IntoValue, Page, PageOptions,
    PutOptions, Result, Revision, Stats, SubscribeOptions, UpdateStore, disjoint, update,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};

use crate::error::WireError as _;
use crate::hub::{Local, Sink};
use crate::options::ClientBuilder;
use crate::subscription::Subscription;
use crate::task::{Answer, Ask, Control, Shared, Slot, is_write};
use crate::types::{ConnectionState, ServerVersion};
use crate::watch::{BranchWatch, BranchWatcher, ChannelWatcher, Current, EndOnDrop, Watch, Watcher};

/// How many keys with their values are asked for at a time, to begin with.
const GET_PAGE: u64 = 1_000;
/// How many keys are asked for at a time: the most that a server gives.
const LIST_PAGE: u64 = 10_000;
/// How long an update may take where the limit of a request is no limit.
const UPDATE_MAX: Duration = Duration::from_secs(86_400);

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

    /// What identifies the client.
    #[must_use]
    pub fn client_uuid(&self) -> &str {
        &self.handle.client_uuid
    }

    /// What becomes of the connection.
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
    pub async fn put(&self, key: impl AsKey, value: impl IntoValue) -> Result<Revision> {
        self.put_with(key, value, PutOptions::default()).await
    }

    /// Writes a value, with options.
    ///
    /// # Errors
    ///
    /// Those of [`put`](Self::put), and [`ErrorKind::Conflict`] with the key's present revision, or
    /// [`ErrorKind::OtherEpoch`].
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
    pub async fn delete(&self, pattern: impl AsPattern) -> Result<Deleted> {
        self.deleted(Request::new(Kind::Delete, pattern.pattern_text()?.into_owned()), None).await
    }

    /// Removes a key if it is at this revision.
    ///
    /// # Errors
    ///
    /// Those of [`put_with`](Self::put_with); that there is no such key is no error.
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
    pub async fn exists(&self, pattern: impl AsPattern) -> Result<bool> {
        Ok(self.find(Request::new(Kind::Exists, pattern.pattern_text()?.into_owned()), None).await?.is_some())
    }

    /// Who would be told of a change of a key.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub async fn trace(&self, key: impl AsKey) -> Result<Vec<Subscriber>> {
        let request = Request::new(Kind::Trace, key.key_text()?.to_owned());
        Ok(self.ask(request).await?.0.subscribers)
    }

    /// Who is connected to the server: all clients, with their names, addresses and what waits for them.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get), and [`ErrorKind::Refused`] with status 400 from a server that cannot tell.
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
    pub async fn stats(&self) -> Result<Stats> {
        let stats = self.ask(Request::new(Kind::Stats, "")).await?.0.stats;
        Ok(Stats::new(stats.numbers, stats.words))
    }

    /// Reads a value that is JSON; `None` if there is no such key.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get), and [`ErrorKind::Json`].
    pub async fn get_as<T: DeserializeOwned>(&self, key: impl AsKey) -> Result<Option<T>> {
        self.get(key).await?.map(|entry| entry.json()).transpose()
    }

    /// Writes a value as JSON.
    ///
    /// # Errors
    ///
    /// Those of [`put`](Self::put), and [`ErrorKind::Json`].
    pub async fn put_as<T: Serialize + ?Sized>(&self, key: impl AsKey, value: &T) -> Result<Revision> {
        let value = to_json(key.key_text()?, value)?;
        self.put(key, value).await
    }

    /// Writes a value as JSON, with options.
    ///
    /// # Errors
    ///
    /// Those of [`put_with`](Self::put_with), and [`ErrorKind::Json`].
    pub async fn put_as_with<T>(&self, key: impl AsKey, value: &T, options: PutOptions) -> Result<Revision>
    where
        T: Serialize + ?Sized,
    {
        let value = to_json(key.key_text()?, value)?;
        self.put_with(key, value, options).await
    }

    /// Changes a value that others may change too: reads the key, writes what `edit` makes of it if it is still as it was
    /// read, and else begins again, after a random pause of at most 128 ms. Gives what the key holds then.
    ///
    /// `edit` gives the new value, or an [`Edit`](crate::Edit): [`Keep`](crate::Edit::Keep) writes nothing,
    /// [`Delete`](crate::Edit::Delete) deletes the key. It may be called more than once. A value that it gives has no TTL
    /// unless it gives one.
    ///
    /// # Errors
    ///
    /// Those of [`put`](Self::put), after which it is not tried again; [`ErrorKind::Conflict`] if others were faster until the
    /// time of one request was over. Each attempt is a read and a write.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// let names = client.update("names", |old| match old {
    ///     Some(names) => [&names.value[..], b",kitchen"].concat(),
    ///     None => b"kitchen".to_vec(),
    /// });
    /// println!("{:?}", names.await?);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn update<E: IntoEdit>(
        &self,
        key: impl AsKey,
        mut edit: impl FnMut(Option<&Entry>) -> E,
    ) -> Result<Option<Entry>> {
        update(&Bounded::new(self), &*key.as_key()?, |old| Ok(edit(old).into_edit())).await
    }

    /// The same with values that are JSON.
    ///
    /// # Errors
    ///
    /// Those of [`update`](Self::update), and [`ErrorKind::Json`] if the value is not the JSON of a `T`.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use nkv_client::Edit;
    ///
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// let visits = client.update_as("visits", |old: Option<u64>| old.unwrap_or(0) + 1).await?;
    /// println!("{visits:?}");
    ///
    /// let left = client.update_as("tickets", |left: Option<u32>| match left {
    ///     None | Some(0) => Edit::Keep,
    ///     Some(left) => Edit::put(left - 1),
    /// });
    /// println!("{:?}", left.await?);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn update_as<T: Serialize + DeserializeOwned, E: Into<Edit<T>>>(
        &self,
        key: impl AsKey,
        mut edit: impl FnMut(Option<T>) -> E,
    ) -> Result<Option<T>> {
        let key = key.as_key()?;
        let edit = |old: Option<&Entry>| {
            let edit: Edit<T> = edit(old.map(Entry::json).transpose()?).into();
            edit.try_map(|value| Ok(to_json(key.as_str(), &value)?.into_value()))
        };
        update(&Bounded::new(self), &key, edit).await?.map(|entry| entry.json()).transpose()
    }

    /// Subscribes to a key and all below it, to all below it (`a.*`), or to everything (`*`), and waits until the server
    /// has accepted it. The present state is told first; see [`Subscription`].
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub async fn subscribe(&self, patterns: impl AsPatterns) -> Result<Subscription> {
        self.subscribe_with(patterns, SubscribeOptions::default()).await
    }

    /// Subscribes, with options.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get), and [`ErrorKind::InvalidKey`] for a wildcard that is to stand for itself alone.
    pub async fn subscribe_with(&self, patterns: impl AsPatterns, options: SubscribeOptions) -> Result<Subscription> {
        let patterns = disjoint(patterns, options.exact)?;
        let parts = patterns.into_iter().map(|pattern| (pattern, self.next_local())).collect();
        let subscription = Subscription::new(Arc::clone(&self.handle), parts);
        let parts = subscription.parts();
        let locals = parts.iter().map(|(pattern, id)| {
            let sink = Sink::Queue(Arc::clone(subscription.queue()));
            let mut local = Local::new(*id, pattern.clone(), sink, self.subscription_len_max);
            local.has_snapshot = options.snapshot;
            local.charged = (parts.len() > 1).then_some(0);
            local
        });
        self.subscribed(locals).await?;
        Ok(subscription)
    }

    /// The value of a key, as it changes; waits until the present value is known. While the connection is lost, the last
    /// value stays, and [`is_live`](crate::Watched::is_live) is false.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub async fn watch(&self, key: impl AsKey) -> Result<Watch<Entry>> {
        self.watch_with(key, |entry| Ok(entry.clone())).await
    }

    /// The value of a key as JSON, as it changes. Where a value is not the JSON of a `T`, the last one that was stays beside
    /// the [`error`](crate::Watched::error). Otherwise like [`watch`](Self::watch).
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    pub async fn watch_as<T>(&self, key: impl AsKey) -> Result<Watch<T>>
    where
        T: DeserializeOwned + Send + Sync + 'static,
    {
        self.watch_with(key, Entry::json).await
    }

    async fn watch_with<T: Send + Sync + 'static>(
        &self,
        key: impl AsKey,
        read: impl Fn(&Entry) -> Result<T> + Send + 'static,
    ) -> Result<Watch<T>> {
        let (watcher, receiver) = ChannelWatcher::new(read);
        self.current(Pattern::Exact(key.as_key()?.into_owned()), Box::new(watcher), receiver).await
    }

    /// All keys that a pattern covers, with their values, as they change; waits until the present state is known. A change costs
    /// what it costs a map, and readers borrow the map. While the connection is lost, the last state stays, and
    /// [`is_live`](crate::Branch::is_live) is false until what was missed is in it: keys that have gone meanwhile go in one step.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get), and [`ErrorKind::Protocol`] when it would take more than
    /// [`ClientBuilder::subscription_len_max`].
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// let mut lamps = client.watch_branch("lamp.*").await?;
    /// loop {
    ///     let state = lamps.borrow_and_update();
    ///     println!("{} lamps at revision {}, live: {}", state.entries.len(), state.revision, state.is_live);
    ///     drop(state);
    ///     lamps.changed().await?;
    /// }
    /// # }
    /// ```
    pub async fn watch_branch(&self, pattern: impl AsPattern) -> Result<BranchWatch<Entry>> {
        self.watch_branch_with(pattern, |entry| Ok(entry.clone())).await
    }

    /// The same with values as JSON. One that is not the JSON of a `T` is among those that are
    /// [`unreadable`](crate::Branch::unreadable), and its key not among the entries.
    ///
    /// # Errors
    ///
    /// Those of [`watch_branch`](Self::watch_branch).
    pub async fn watch_branch_as<T>(&self, pattern: impl AsPattern) -> Result<BranchWatch<T>>
    where
        T: DeserializeOwned + Send + Sync + 'static,
    {
        self.watch_branch_with(pattern, Entry::json).await
    }

    async fn watch_branch_with<T: Send + Sync + 'static>(
        &self,
        pattern: impl AsPattern,
        read: impl Fn(&Entry) -> Result<T> + Send + 'static,
    ) -> Result<BranchWatch<T>> {
        let (watcher, receiver) = BranchWatcher::new(read);
        self.current(pattern.as_pattern()?.into_owned(), Box::new(watcher), receiver).await
    }

    async fn current<S>(
        &self,
        pattern: Pattern,
        watcher: Box<dyn Watcher>,
        receiver: watch::Receiver<S>,
    ) -> Result<Current<S>> {
        let id = self.next_local();
        let end = EndOnDrop { handle: Arc::clone(&self.handle), pattern: pattern.clone(), id };
        let mut current = Current::new(receiver, end);
        self.subscribed([Local::new(id, pattern, Sink::Watch(watcher), self.subscription_len_max)]).await?;
        drop(current.borrow_and_update());
        Ok(current)
    }

    fn next_local(&self) -> u64 {
        self.handle.next_local.fetch_add(1, Relaxed)
    }

    /// Waits until all are accepted.
    async fn subscribed(&self, locals: impl IntoIterator<Item = Local>) -> Result<()> {
        let mut all = Vec::new();
        for mut local in locals {
            let (ready, accepted) = oneshot::channel();
            local.ready = Some(ready);
            all.push(accepted);
            self.handle.control(Control::Subscribe(local))?;
        }
        let all_accepted = async {
            for accepted in all {
                accepted.await.map_err(|_| self.handle.closed())??;
            }
            Ok(())
        };
        timeout(self.request_timeout, all_accepted).await.unwrap_or_else(|_| Err(self.timed_out()))
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

/// A client that has the time of one request for all that an update takes.
struct Bounded<'a> {
    client: &'a Client,
    deadline: Instant,
}

impl<'a> Bounded<'a> {
    fn new(client: &'a Client) -> Self {
        let now = Instant::now();
        // A request may be given more time than there is.
        let deadline = now.checked_add(client.request_timeout).unwrap_or_else(|| now + UPDATE_MAX);
        Bounded { client, deadline }
    }

    fn rest(&self) -> Client {
        self.client.with_request_timeout(self.deadline.saturating_duration_since(Instant::now()))
    }
}

impl UpdateStore for Bounded<'_> {
    async fn read(&self, key: &Key) -> Result<Option<Entry>> {
        self.rest().get(key).await
    }

    async fn write(&self, key: &Key, value: Bytes, options: PutOptions) -> Result<Revision> {
        self.rest().put_with(key, value, options).await
    }

    async fn delete(&self, key: &Key, if_revision: Revision) -> Result<Deleted> {
        self.rest().delete_if(key, if_revision).await
    }

    async fn pause(&self, pause: Duration) -> bool {
        let end = Instant::now() + pause;
        if end >= self.deadline {
            return false;
        }
        sleep_until(end).await;
        true
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

fn to_json<T: Serialize + ?Sized>(key: &str, value: &T) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| Error::json(format!("the value for '{key}' cannot be made JSON"), error))
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
