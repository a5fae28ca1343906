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

mod bell;
mod budget;
mod clients;
mod clock;
mod complaints;
mod connection;
mod core;
mod dispatch;
mod failure;
mod handle;
mod listener;
mod oldest;
mod reading;
mod server;
mod slots;
mod writer;

pub use handle::{Handle, HandleError, Notice, Subscription, WriteOptions};
pub use nkv_types::Address;
pub use server::{Builder, Options, Server, ServerError};
