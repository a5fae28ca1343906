#![doc = include_str!("../README.md")]
// Whatever a server sends, it must not end the program that reads it.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unreachable)
)]

pub mod blocking;
pub mod codec;

mod client;
mod error;
mod hub;
mod link;
mod options;
mod queue;
mod subscription;
mod task;
mod types;
mod watcher;
#[cfg(feature = "ws")]
mod ws;

pub use client::Client;
pub use nkv_protocol::{ConnectedClient, Subscriber};
pub use nkv_types::{
    Address, AsKey, AsPattern, AsPatterns, Branch, BranchWatch, Current, Deleted, Edit, EndReason, Entry, Epoch, Error,
    ErrorKind, Event, GoneReason, IntoEdit, IntoValue, Key, Page, PageOptions, Pattern, PutOptions, Result, Revision,
    Stats, Store, SubscribeOptions, Unreadable, Watch, Watched,
};
pub use options::ClientBuilder;
pub use subscription::Subscription;
pub use types::{ConnectionState, ServerVersion};

nkv_types::store_by_methods!(Client, Subscription);
