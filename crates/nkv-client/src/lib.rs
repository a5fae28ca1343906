#![doc = include_str!("../README.md")]
// Whatever a server sends, it must not end the program that reads it.
#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::panic, clippy::unreachable)
)]

pub mod blocking;

mod addr;
mod client;
mod error;
mod hub;
mod link;
mod options;
mod queue;
mod revision;
mod subscription;
mod task;
mod types;
mod watch;

pub use addr::Addr;
pub use client::Client;
pub use error::{Error, ErrorKind, Result};
pub use nkv_core::{Epoch, Key, Pattern};
pub use nkv_protocol::{ConnectedClient, Subscriber};
pub use options::ClientBuilder;
pub use revision::Revision;
pub use subscription::Subscription;
pub use types::{
    ConnectionState, Deleted, EndReason, Entry, Event, GoneReason, Page, PageOptions, PutOptions, ServerVersion, Stats,
    SubscribeOptions,
};
pub use watch::{Watch, Watched};
