//! The handle for plain threads.

use nkv_types::{
    AsKey, AsPattern, AsPatterns, BranchWatch, Deleted, Edit, Entry, IntoEdit, IntoValue, Key, Page, PageOptions,
    PutOptions, Result, Revision, Stats, SubscribeOptions, Watch,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::handle::Handle;
use crate::subscription::Subscription;
use crate::{Op, Outcome};

/// A [`Handle`] whose methods block the thread until they are done: for threads that run no task. Within a task they panic.
///
/// # Examples
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build()?;
/// let node = runtime.block_on(nkv_node::Node::builder().start())?;
/// let nkv = node.handle().blocking();
/// let watcher = std::thread::spawn(move || {
///     nkv.put("lamp.hall", "on")?;
///     nkv.get("lamp.hall")
/// });
/// assert_eq!(watcher.join().unwrap()?.unwrap().value, "on");
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct BlockingHandle {
    handle: Handle,
}

impl Handle {
    /// The same store for plain threads.
    #[must_use]
    pub fn blocking(&self) -> BlockingHandle {
        BlockingHandle { handle: self.clone() }
    }
}

/// Each method has the name and the meaning of that of [`Handle`].
macro_rules! blocking {
    ($($(#[$doc:meta])* $name:ident($($arg:ident: $of:ty),*) -> $out:ty;)*) => {
        impl BlockingHandle {$(
            $(#[$doc])*
            ///
            /// # Errors
            ///
            #[doc = concat!("Those of [`Handle::", stringify!($name), "`].")]
            pub fn $name(&self, $($arg: $of),*) -> Result<$out> {
                self.handle.shared().runtime.block_on(self.handle.$name($($arg),*))
            }
        )*}
    };
}

blocking! {
    /// The entry of a key; `None` if there is none.
    get(key: impl AsKey) -> Option<Entry>;
    /// The entries that a pattern selects, in key order.
    get_all(pattern: impl AsPattern) -> Vec<Entry>;
    /// Part of the entries that a pattern selects, in key order.
    get_page(pattern: impl AsPattern, options: PageOptions) -> Page<Entry>;
    /// The keys that a pattern selects, with their revisions, in key order.
    list(pattern: impl AsPattern) -> Vec<(Key, Revision)>;
    /// Part of the keys that a pattern selects, with their revisions, in key order.
    list_page(pattern: impl AsPattern, options: PageOptions) -> Page<(Key, Revision)>;
    /// Whether a pattern selects any key.
    exists(pattern: impl AsPattern) -> bool;
    /// Writes a value and returns its revision.
    put(key: impl AsKey, value: impl IntoValue) -> Revision;
    /// Writes a value, with options, and returns its revision.
    put_with(key: impl AsKey, value: impl IntoValue, options: PutOptions) -> Revision;
    /// Deletes the keys that a pattern selects.
    delete(pattern: impl AsPattern) -> Deleted;
    /// Deletes a key if it is at this revision.
    delete_if(key: impl AsKey, if_revision: Revision) -> Deleted;
    /// Does operations together or not at all.
    write(ops: Vec<Op>) -> Vec<Outcome>;
    /// Delivers the present state of all that a pattern covers, or several, then every change.
    subscribe(patterns: impl AsPatterns) -> Subscription;
    /// The same, with options.
    subscribe_with(patterns: impl AsPatterns, options: SubscribeOptions) -> Subscription;
    /// The value of a key, as it changes: [`borrow`](nkv_types::Current::borrow) it.
    watch(key: impl AsKey) -> Watch<Entry>;
    /// All keys that a pattern covers with their values, as they change.
    watch_branch(pattern: impl AsPattern) -> BranchWatch<Entry>;
    /// Whether the node serves requests.
    health() -> ();
    /// Figures of the store.
    stats() -> Stats;
}

impl BlockingHandle {
    /// The value of a key, as JSON.
    ///
    /// # Errors
    ///
    /// Those of [`Handle::get_as`].
    pub fn get_as<T: DeserializeOwned>(&self, key: impl AsKey) -> Result<Option<T>> {
        self.handle.shared().runtime.block_on(self.handle.get_as(key))
    }

    /// Writes a value as JSON.
    ///
    /// # Errors
    ///
    /// Those of [`Handle::put_as`].
    pub fn put_as<T: Serialize + ?Sized>(&self, key: impl AsKey, value: &T) -> Result<Revision> {
        self.handle.shared().runtime.block_on(self.handle.put_as(key, value))
    }

    /// The value of a key as JSON, as it changes: [`borrow`](nkv_types::Current::borrow) it.
    ///
    /// # Errors
    ///
    /// Those of [`Handle::watch_as`].
    pub fn watch_as<T: DeserializeOwned + Send + Sync + 'static>(&self, key: impl AsKey) -> Result<Watch<T>> {
        self.handle.shared().runtime.block_on(self.handle.watch_as(key))
    }

    /// All keys that a pattern covers with their values as JSON, as they change.
    ///
    /// # Errors
    ///
    /// Those of [`Handle::watch_branch_as`].
    pub fn watch_branch_as<T>(&self, pattern: impl AsPattern) -> Result<BranchWatch<T>>
    where
        T: DeserializeOwned + Send + Sync + 'static,
    {
        self.handle.shared().runtime.block_on(self.handle.watch_branch_as(pattern))
    }

    /// Changes a value, as JSON, that others may change too.
    ///
    /// # Errors
    ///
    /// Those of [`Handle::update_as`].
    pub fn update_as<T: Serialize + DeserializeOwned, E: Into<Edit<T>>>(
        &self,
        key: impl AsKey,
        edit: impl FnMut(Option<T>) -> E,
    ) -> Result<Option<T>> {
        self.handle.shared().runtime.block_on(self.handle.update_as(key, edit))
    }

    /// Changes a value that others may change too.
    ///
    /// # Errors
    ///
    /// Those of [`Handle::update`].
    pub fn update<E: IntoEdit>(&self, key: impl AsKey, edit: impl FnMut(Option<&Entry>) -> E) -> Result<Option<Entry>> {
        self.handle.shared().runtime.block_on(self.handle.update(key, edit))
    }
}
