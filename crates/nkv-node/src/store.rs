//! The handle as a store that may as well be far away.

use nkv_core::Key;
use nkv_types::{
    AsKey, AsPattern, AsPatterns, Deleted, Entry, IntoEdit, IntoValue, Page, PageOptions, PutOptions, Result, Revision,
    Stats, Store, SubscribeOptions,
};

use crate::handle::Handle;
use crate::subscription::Subscription;

impl Store for Handle {
    type Subscription = Subscription;

    async fn get(&self, key: impl AsKey) -> Result<Option<Entry>> {
        self.get(key).await
    }

    async fn get_all(&self, pattern: impl AsPattern) -> Result<Vec<Entry>> {
        self.get_all(pattern).await
    }

    async fn get_page(&self, pattern: impl AsPattern, options: PageOptions) -> Result<Page<Entry>> {
        self.get_page(pattern, options).await
    }

    async fn list(&self, pattern: impl AsPattern) -> Result<Vec<(Key, Revision)>> {
        self.list(pattern).await
    }

    async fn list_page(&self, pattern: impl AsPattern, options: PageOptions) -> Result<Page<(Key, Revision)>> {
        self.list_page(pattern, options).await
    }

    async fn exists(&self, pattern: impl AsPattern) -> Result<bool> {
        self.exists(pattern).await
    }

    async fn put(&self, key: impl AsKey, value: impl IntoValue) -> Result<Revision> {
        self.put(key, value).await
    }

    async fn put_with(&self, key: impl AsKey, value: impl IntoValue, options: PutOptions) -> Result<Revision> {
        self.put_with(key, value, options).await
    }

    async fn update<E: IntoEdit>(
        &self,
        key: impl AsKey,
        edit: impl FnMut(Option<&Entry>) -> E + Send,
    ) -> Result<Option<Entry>> {
        self.update(key, edit).await
    }

    async fn delete(&self, pattern: impl AsPattern) -> Result<Deleted> {
        self.delete(pattern).await
    }

    async fn delete_if(&self, key: impl AsKey, if_revision: Revision) -> Result<Deleted> {
        self.delete_if(key, if_revision).await
    }

    async fn subscribe(&self, patterns: impl AsPatterns) -> Result<Subscription> {
        self.subscribe(patterns).await
    }

    async fn subscribe_with(&self, patterns: impl AsPatterns, options: SubscribeOptions) -> Result<Subscription> {
        self.subscribe_with(patterns, options).await
    }

    async fn health(&self) -> Result<()> {
        self.health().await
    }

    async fn stats(&self) -> Result<Stats> {
        self.stats().await
    }
}
