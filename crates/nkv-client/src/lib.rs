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
mod subscription;
mod task;
mod types;

pub use addr::Addr;
pub use client::Client;
pub use error::{Error, ErrorKind, Result};
pub use nkv_core::{Key, Pattern, Revision};
pub use nkv_protocol::{Stats, Subscriber};
pub use options::ClientBuilder;
pub use subscription::Subscription;
pub use types::{
    ConnectionState, Deleted, EndReason, Entry, Event, GoneReason, Page, PageOptions, PutOptions, ServerVersion,
};
