//! One trait for a store in the process and over the network.

use std::fmt;

use futures_core::Stream;
use nkv_core::Key;

use crate::entry::{Deleted, Entry};
use crate::error::Result;
use crate::event::Event;
use crate::names::{AsKey, AsPattern, AsPatterns};
use crate::options::{PageOptions, PutOptions, SubscribeOptions};
use crate::page::Page;
use crate::revision::Revision;
use crate::stats::Stats;
use crate::update::IntoEdit;
use crate::value::IntoValue;

/// A store: the handle of a node in this process, or a client of a server. Clones are cheap and stand for the same store.
///
/// The methods are those of the same names that both types have; a program that knows which it has does not need the trait.
/// Each future may be dropped: a read has no effect, a write may or may not be done then.
///
/// # Examples
///
/// ```
/// use nkv_types::{Event, Result, Store};
///
/// /// Keeps a counter beside a branch, in this process or far away.
/// async fn count_changes(store: impl Store, branch: &str) -> Result<()> {
///     let mut changes = store.subscribe(branch).await?;
///     while let Some(event) = next(&mut changes).await {
///         if let Event::Update { entry, .. } = event {
///             store.put(format!("seen.{}", entry.key), entry.value).await?;
///         }
///     }
///     Ok(())
/// }
/// # async fn next<S: futures_core::Stream + Unpin>(stream: &mut S) -> Option<S::Item> {
/// #     std::future::poll_fn(|cx| std::pin::Pin::new(&mut *stream).poll_next(cx)).await
/// # }
/// ```
pub trait Store: Clone + fmt::Debug + Send + Sync + 'static {
    /// What a subscription gives. Dropping it ends the subscription.
    type Subscription: Stream<Item = Event> + fmt::Debug + Send + Unpin + 'static;

    /// Reads a value; `None` if there is no such key.
    fn get(&self, key: impl AsKey) -> impl Future<Output = Result<Option<Entry>>> + Send;

    /// Reads all values that a pattern selects, in key order.
    fn get_all(&self, pattern: impl AsPattern) -> impl Future<Output = Result<Vec<Entry>>> + Send;

    /// Reads some of the values that a pattern selects, in key order.
    fn get_page(
        &self,
        pattern: impl AsPattern,
        options: PageOptions,
    ) -> impl Future<Output = Result<Page<Entry>>> + Send;

    /// Reads all keys that a pattern selects, with their revisions, in key order.
    fn list(&self, pattern: impl AsPattern) -> impl Future<Output = Result<Vec<(Key, Revision)>>> + Send;

    /// Reads some of the keys that a pattern selects, with their revisions, in key order.
    fn list_page(
        &self,
        pattern: impl AsPattern,
        options: PageOptions,
    ) -> impl Future<Output = Result<Page<(Key, Revision)>>> + Send;

    /// Whether a pattern selects any key.
    fn exists(&self, pattern: impl AsPattern) -> impl Future<Output = Result<bool>> + Send;

    /// Writes a value.
    fn put(&self, key: impl AsKey, value: impl IntoValue) -> impl Future<Output = Result<Revision>> + Send;

    /// Writes a value, with options.
    fn put_with(
        &self,
        key: impl AsKey,
        value: impl IntoValue,
        options: PutOptions,
    ) -> impl Future<Output = Result<Revision>> + Send;

    /// Changes a value that others may change too, if it is still as it was read; see [`update`](crate::update).
    fn update<E: IntoEdit>(
        &self,
        key: impl AsKey,
        edit: impl FnMut(Option<&Entry>) -> E + Send,
    ) -> impl Future<Output = Result<Option<Entry>>> + Send;

    /// Removes all keys that a pattern selects.
    fn delete(&self, pattern: impl AsPattern) -> impl Future<Output = Result<Deleted>> + Send;

    /// Removes a key if it is at this revision.
    fn delete_if(&self, key: impl AsKey, if_revision: Revision) -> impl Future<Output = Result<Deleted>> + Send;

    /// Subscribes to what a pattern, or several, cover; the present state comes first.
    fn subscribe(&self, patterns: impl AsPatterns) -> impl Future<Output = Result<Self::Subscription>> + Send;

    /// Subscribes, with options.
    fn subscribe_with(
        &self,
        patterns: impl AsPatterns,
        options: SubscribeOptions,
    ) -> impl Future<Output = Result<Self::Subscription>> + Send;

    /// Whether the store works: an error if not.
    fn health(&self) -> impl Future<Output = Result<()>> + Send;

    /// The figures of the store.
    fn stats(&self) -> impl Future<Output = Result<Stats>> + Send;
}

/// Implements [`Store`] by a type's own methods, which have the same names.
///
/// ```text
/// nkv_types::store_by_methods!(Client, Subscription);
/// ```
#[macro_export]
macro_rules! store_by_methods {
    ($store:ty, $subscription:ty) => {
        impl $crate::Store for $store {
            type Subscription = $subscription;

            async fn get(&self, key: impl $crate::AsKey) -> $crate::Result<Option<$crate::Entry>> {
                self.get(key).await
            }

            async fn get_all(&self, pattern: impl $crate::AsPattern) -> $crate::Result<Vec<$crate::Entry>> {
                self.get_all(pattern).await
            }

            async fn get_page(
                &self,
                pattern: impl $crate::AsPattern,
                options: $crate::PageOptions,
            ) -> $crate::Result<$crate::Page<$crate::Entry>> {
                self.get_page(pattern, options).await
            }

            async fn list(
                &self,
                pattern: impl $crate::AsPattern,
            ) -> $crate::Result<Vec<($crate::Key, $crate::Revision)>> {
                self.list(pattern).await
            }

            async fn list_page(
                &self,
                pattern: impl $crate::AsPattern,
                options: $crate::PageOptions,
            ) -> $crate::Result<$crate::Page<($crate::Key, $crate::Revision)>> {
                self.list_page(pattern, options).await
            }

            async fn exists(&self, pattern: impl $crate::AsPattern) -> $crate::Result<bool> {
                self.exists(pattern).await
            }

            async fn put(
                &self,
                key: impl $crate::AsKey,
                value: impl $crate::IntoValue,
            ) -> $crate::Result<$crate::Revision> {
                self.put(key, value).await
            }

            async fn put_with(
                &self,
                key: impl $crate::AsKey,
                value: impl $crate::IntoValue,
                options: $crate::PutOptions,
            ) -> $crate::Result<$crate::Revision> {
                self.put_with(key, value, options).await
            }

            async fn update<E: $crate::IntoEdit>(
                &self,
                key: impl $crate::AsKey,
                edit: impl FnMut(Option<&$crate::Entry>) -> E + Send,
            ) -> $crate::Result<Option<$crate::Entry>> {
                self.update(key, edit).await
            }

            async fn delete(&self, pattern: impl $crate::AsPattern) -> $crate::Result<$crate::Deleted> {
                self.delete(pattern).await
            }

            async fn delete_if(
                &self,
                key: impl $crate::AsKey,
                if_revision: $crate::Revision,
            ) -> $crate::Result<$crate::Deleted> {
                self.delete_if(key, if_revision).await
            }

            async fn subscribe(&self, patterns: impl $crate::AsPatterns) -> $crate::Result<$subscription> {
                self.subscribe(patterns).await
            }

            async fn subscribe_with(
                &self,
                patterns: impl $crate::AsPatterns,
                options: $crate::SubscribeOptions,
            ) -> $crate::Result<$subscription> {
                self.subscribe_with(patterns, options).await
            }

            async fn health(&self) -> $crate::Result<()> {
                self.health().await
            }

            async fn stats(&self) -> $crate::Result<$crate::Stats> {
                self.stats().await
            }
        }
    };
}
