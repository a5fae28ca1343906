#![cfg_attr(all(feature = "server", feature = "client", feature = "fs"), doc = include_str!("../README.md"))]
#![cfg_attr(
    not(all(feature = "server", feature = "client", feature = "fs")),
    doc = "nkv, a notify key-value store: its libraries under one name, by the features `server`, `client` and `fs`."
)]

#[cfg(feature = "client")]
#[doc(inline)]
pub use nkv_client::{Client, Subscription};
#[cfg(feature = "fs")]
#[doc(inline)]
pub use nkv_persist_fs::{Durability, FsOptions, FsPersist};
#[cfg(feature = "server")]
#[doc(inline)]
pub use nkv_server::{Handle, Server};
#[doc(inline)]
pub use nkv_types::{
    Address, Deleted, EndReason, Entry, Epoch, Error, ErrorKind, Event, GoneReason, Key, Page, PageOptions, Pattern,
    PutOptions, Result, Revision, Stats, SubscribeOptions, Watched,
};

#[cfg(feature = "client")]
pub use nkv_client as client;
pub use nkv_core as core;
#[cfg(feature = "fs")]
pub use nkv_persist_fs as fs;
#[cfg(feature = "server")]
pub use nkv_server as server;

/// The types are those of the crates, so that a value from one can be given to another.
#[cfg(all(test, feature = "client"))]
mod tests {
    #[test]
    fn the_vocabulary_is_that_of_the_client() {
        fn same<T>(_: fn(T), _: fn(T)) {}
        same(drop::<crate::Event>, drop::<nkv_client::Event>);
        same(drop::<crate::Entry>, drop::<nkv_client::Entry>);
        same(drop::<crate::Error>, drop::<nkv_client::Error>);
    }
}
