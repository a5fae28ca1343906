#![doc = include_str!("../README.md")]
// What stands on a disk can be anything: none of it may end the process.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::unwrap_used
    )
)]

#[cfg(any(fuzzing, test))]
#[doc(hidden)]
pub mod fuzzing;
pub mod sim;

mod batch;
mod check;
mod compact;
mod disk;
mod error;
mod format;
mod index;
mod log;
mod mutex;
mod open;
mod options;
mod reader;
mod salvage;
mod scan;
mod space;
mod store;
mod vfs;

pub use check::{Report, check, check_with, repair, repair_with, restore, restore_with};
pub use options::{Durability, DurabilityError, FsOptions};
pub use salvage::Lost;
pub use scan::Damage;
pub use store::{FsMonitor, FsPersist, FsStats};
pub use vfs::{Open, RealFs, Vfs, VfsFile};
