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

mod bucket;
mod census;
mod engine;
mod follow;
mod options;
mod subject;
mod wire;
mod write;

pub use engine::NatsEngine;
pub use options::Options;
