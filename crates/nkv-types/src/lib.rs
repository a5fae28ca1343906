#![doc = include_str!("../README.md")]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod address;
mod branch;
mod entry;
mod error;
mod event;
mod names;
mod options;
mod page;
mod revision;
mod stats;
mod update;
mod value;
mod watched;

pub use address::Address;
pub use branch::{Branch, Unreadable};
pub use entry::{Deleted, Entry};
pub use error::{Error, ErrorKind, Result};
pub use event::{EndReason, Event, GoneReason};
pub use names::{AsKey, AsPattern, AsPatterns, disjoint};
pub use nkv_core::{Epoch, Key, Pattern};
pub use options::{PageOptions, PutOptions, SubscribeOptions};
pub use page::Page;
pub use revision::Revision;
pub use stats::Stats;
pub use update::{Edit, IntoEdit, UpdateStore, update};
pub use value::IntoValue;
pub use watched::Watched;

/// Leaves out each pattern that another one covers: what is left has no key in common, since patterns nest or are disjoint.
///
/// # Examples
///
/// ```
/// use nkv_types::{Pattern, disjoint};
///
/// let patterns = ["lamp", "lamp.hall", "door"].map(|text| Pattern::new(text));
/// let left = disjoint(patterns.into_iter().flatten());
/// assert_eq!(left, [Pattern::new("lamp")?, Pattern::new("door")?]);
/// # Ok::<(), nkv_types::Error>(())
/// ```
#[must_use]
pub fn disjoint(patterns: impl IntoIterator<Item = Pattern>) -> Vec<Pattern> {
    let mut left: Vec<Pattern> = Vec::new();
    for pattern in patterns {
        if !left.iter().any(|known| known.covers_all(&pattern)) {
            left.retain(|known| !pattern.covers_all(known));
            left.push(pattern);
        }
    }
    left
}
