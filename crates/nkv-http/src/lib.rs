#![doc = include_str!("../README.md")]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

mod batch;
mod body;
mod connection;
mod door;
mod entry;
mod figures;
#[cfg(any(fuzzing, test))]
#[doc(hidden)]
pub mod fuzzing;
mod go_kv;
mod guard;
mod kv;
mod list;
mod look;
mod making;
mod page;
mod problem;
mod query;
mod route;
mod seed;
mod tag;
mod timed;
mod watch;
mod woken;
mod ws;

pub use body::CallsBody;
pub use door::{Calls, CallsFuture, Door, OptionError, Options, Stream};
