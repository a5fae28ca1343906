#![doc = include_str!("../README.md")]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod address;
mod branch;
#[cfg(feature = "watch")]
mod current;
mod entry;
mod error;
mod event;
mod names;
mod options;
mod page;
mod revision;
mod stats;
mod store;
mod update;
mod value;
mod watched;

pub use address::Address;
pub use branch::{Branch, Unreadable};
#[cfg(feature = "watch")]
pub use current::{BranchWatch, Current, Watch};
pub use entry::{Deleted, Entry};
pub use error::{Error, ErrorKind, Result};
pub use event::{EndReason, Event, GoneReason};
pub use names::{AsKey, AsPattern, AsPatterns, disjoint};
pub use nkv_core::{Epoch, Key, Pattern};
pub use options::{PageOptions, PutOptions, SubscribeOptions};
pub use page::Page;
pub use revision::Revision;
pub use stats::Stats;
pub use store::Store;
pub use update::{Edit, IntoEdit, UpdateStore, update, update_as};
pub use value::{IntoValue, to_json};
pub use watched::Watched;
