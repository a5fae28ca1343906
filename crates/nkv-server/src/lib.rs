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

mod connection;
mod dispatch;
mod door;
mod error;
#[cfg(feature = "grpc")]
mod grpc;
mod holder;
#[cfg(feature = "http")]
mod http;
mod inner;
mod listener;
mod oldest;
mod options;
mod reading;
mod server;
mod socket;
#[cfg(feature = "text-wire")]
mod text_wire;

pub use door::{Door, serve};
pub use error::ServerError;
#[cfg(feature = "grpc")]
pub use nkv_grpc;
#[cfg(feature = "http")]
pub use nkv_http;
pub use nkv_node::{Handle, Subscription};
pub use nkv_types::Address;
pub use options::Options;
pub use server::{Builder, Server};
