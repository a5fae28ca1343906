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

mod engine;
mod fault;
mod fetch;
mod follow;
mod gather;
mod login;
mod names;
mod options;
mod session;
mod write;

pub use engine::EtcdEngine;
pub use options::{Options, OptionsError};

/// What nkv uses of etcd's API: see `proto/etcd.proto`.
mod rpc {
    #![allow(
        clippy::all,
        clippy::arithmetic_side_effects,
        missing_docs,
        rustdoc::all,
        unreachable_pub,
        dead_code,
        reason = "generated"
    )]
    include!("generated/etcdserverpb.rs");
}
