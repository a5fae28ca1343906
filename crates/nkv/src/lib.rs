#![cfg_attr(all(feature = "server", feature = "client", feature = "fs"), doc = include_str!("../README.md"))]
#![cfg_attr(
    not(all(feature = "server", feature = "client", feature = "fs")),
    doc = "nkv, a notify key-value store: its libraries under one name, by the features `server`, `client` and `fs`."
)]

#[cfg(feature = "client")]
#[doc(inline)]
pub use nkv_client::Client;
#[cfg(feature = "server")]
#[doc(inline)]
pub use nkv_node::{Handle, Node};
#[cfg(feature = "fs")]
#[doc(inline)]
pub use nkv_persist_fs::{Durability, FsOptions, FsPersist};
#[cfg(feature = "server")]
#[doc(inline)]
pub use nkv_server::Server;
#[doc(inline)]
pub use nkv_types::{
    Address, AsKey, AsPattern, AsPatterns, Branch, Deleted, Edit, EndReason, Entry, Epoch, Error, ErrorKind, Event,
    GoneReason, IntoEdit, IntoValue, Key, Page, PageOptions, Pattern, PutOptions, Result, Revision, Stats, Store,
    SubscribeOptions, Unreadable, Watched,
};

#[cfg(any(feature = "client", feature = "server"))]
#[doc(inline)]
pub use nkv_types::{BranchWatch, Current, Watch};

#[cfg(feature = "client")]
pub use nkv_client as client;
pub use nkv_core as core;
#[cfg(feature = "server")]
pub use nkv_node as node;
#[cfg(feature = "fs")]
pub use nkv_persist_fs as fs;
#[cfg(feature = "server")]
pub use nkv_server as server;

/// The types are those of the crates, so that a value from one can be given to another.
#[cfg(all(test, feature = "client", feature = "server"))]
mod tests {
    #[test]
    fn client_and_handle_have_one_vocabulary() {
        fn same<T>(_: fn(T), _: fn(T), _: fn(T)) {}
        same(drop::<crate::Event>, drop::<nkv_client::Event>, drop::<nkv_node::Event>);
        same(drop::<crate::Entry>, drop::<nkv_client::Entry>, drop::<nkv_node::Entry>);
        same(drop::<crate::Error>, drop::<nkv_client::Error>, drop::<nkv_node::Error>);
        same(drop::<crate::Watch<()>>, drop::<nkv_client::Watch<()>>, drop::<nkv_node::Watch<()>>);
    }
}
