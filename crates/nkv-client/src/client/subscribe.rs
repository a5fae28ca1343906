//! The client's calls that follow keys as they change.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use nkv_core::Pattern;
use nkv_types::{AsKey, AsPattern, AsPatterns, BranchWatch, Current, Entry, Result, SubscribeOptions, Watch, disjoint};
use serde::de::DeserializeOwned;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

use super::Client;
use crate::hub::{Local, Sink};
use crate::subscription::Subscription;
use crate::task::Control;
use crate::watcher::{BranchWatcher, ChannelWatcher, EndOnDrop, Watcher};

impl Client {
    /// Subscribes to a key and all below it, to all below it (`a.*`), or to everything (`*`), or to several of these at once
    /// (`["a", "b.*"]`), and waits until the server has accepted it. The present state comes first; see [`Subscription`].
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use nkv_client::Event;
    ///
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// let mut changes = client.subscribe(["lamp", "door.*"]).await?;
    /// while let Some(event) = changes.next().await {
    ///     match event {
    ///         Event::Update { entry, .. } => println!("{} is {:?}", entry.key, entry.value),
    ///         Event::Gone { key, .. } => println!("{key} is gone"),
    ///         Event::Synced { .. } => println!("this is the present state"),
    ///         other => println!("{other:?}"),
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn subscribe(&self, patterns: impl AsPatterns) -> Result<Subscription> {
        self.subscribe_with(patterns, SubscribeOptions::default()).await
    }

    /// Subscribes, with options.
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get), and [`ErrorKind::InvalidKey`](crate::ErrorKind::InvalidKey) for a wildcard that is to stand for itself alone.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use nkv_client::SubscribeOptions;
    ///
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// // This key alone, and only what happens from now on.
    /// let options = SubscribeOptions::default().with_exact(true).with_snapshot(false);
    /// let mut changes = client.subscribe_with("lamp", options).await?;
    /// println!("{:?}", changes.next().await);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn subscribe_with(&self, patterns: impl AsPatterns, options: SubscribeOptions) -> Result<Subscription> {
        let patterns = disjoint(patterns, options.exact)?;
        let subscription = Subscription::new(patterns.into_iter().map(|pattern| self.part(pattern)).collect());
        let parts = subscription.parts();
        let locals = parts.iter().map(|part| {
            let sink = Sink::Queue(Arc::clone(subscription.queue()));
            let mut local = Local::new(part.id, part.pattern.clone(), sink, self.subscription_len_max);
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
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// let mut lamp = client.watch("lamp.kitchen").await?;
    /// loop {
    ///     println!("{:?}", lamp.borrow_and_update().value);
    ///     lamp.changed().await?;
    /// }
    /// # }
    /// ```
    pub async fn watch(&self, key: impl AsKey) -> Result<Watch<Entry>> {
        self.watch_with(key, |entry| Ok(entry.clone())).await
    }

    /// The value of a key as JSON, as it changes. Where a value is not the JSON of a `T`, the last one that was stays beside
    /// the [`error`](crate::Watched::error). Otherwise like [`watch`](Self::watch).
    ///
    /// # Errors
    ///
    /// Those of [`get`](Self::get).
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// let mut level = client.watch_as::<u8>("lamp.kitchen.level").await?;
    /// // Until the lamp is bright and this is what the server says now.
    /// level.wait_for(|level| level.is_live && level.value > Some(80)).await?;
    /// # Ok(())
    /// # }
    /// ```
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
    /// Those of [`get`](Self::get), and [`ErrorKind::Protocol`](crate::ErrorKind::Protocol) when it would take more than
    /// [`ClientBuilder::subscription_len_max`](crate::ClientBuilder::subscription_len_max).
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
    ///
    /// # Examples
    ///
    /// ```no_run
    /// # async fn example(client: nkv_client::Client) -> nkv_client::Result<()> {
    /// let levels = client.watch_branch_as::<u8>("level.*").await?;
    /// for (key, level) in &levels.borrow().entries {
    ///     println!("{key}: {level:?}");
    /// }
    /// # Ok(())
    /// # }
    /// ```
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
        let part = self.part(pattern.clone());
        let local = Local::new(part.id, pattern, Sink::Watch(watcher), self.subscription_len_max);
        let mut current = Current::new(receiver, part);
        self.subscribed([local]).await?;
        drop(current.borrow_and_update());
        Ok(current)
    }

    fn part(&self, pattern: Pattern) -> EndOnDrop {
        let id = self.handle.next_local.fetch_add(1, Relaxed);
        EndOnDrop { handle: Arc::clone(&self.handle), pattern, id }
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
}
