#![doc = include_str!("../README.md")]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod address;
mod entry;
mod error;
mod event;
mod options;
mod page;
mod revision;
mod stats;
mod watched;

pub use address::Address;
pub use entry::{Deleted, Entry};
pub use error::{Error, ErrorKind, Result};
pub use event::{EndReason, Event, GoneReason};
pub use nkv_core::{Epoch, Key, Pattern};
pub use options::{PageOptions, PutOptions, SubscribeOptions};
pub use page::Page;
pub use revision::Revision;
pub use stats::Stats;
pub use watched::Watched;
