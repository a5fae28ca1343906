//! The handle for plain threads.

use nkv_types::{
    AsKey, AsPattern, AsPatterns, Deleted, Entry, IntoEdit, IntoValue, Key, Page, PageOptions, PutOptions, Result,
    Revision, Stats, SubscribeOptions,
};

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
    /// Whether the node serves requests.
    health() -> ();
    /// Figures of the store.
    stats() -> Stats;
}

impl BlockingHandle {
    /// Changes a value that others may change too.
    ///
    /// # Errors
    ///
    /// Those of [`Handle::update`].
    pub fn update<E: IntoEdit>(&self, key: impl AsKey, edit: impl FnMut(Option<&Entry>) -> E) -> Result<Option<Entry>> {
        self.handle.shared().runtime.block_on(self.handle.update(key, edit))
    }
}
