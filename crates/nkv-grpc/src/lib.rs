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

mod arriving;
mod connection;
mod departing;
mod door;
mod first_turn;
mod kv_client;
mod line;
mod mesh;
mod node_kv;
mod options;
mod peer;
mod services;
mod socket;
mod status;
mod timeout;
mod watch;

pub use connection::{Connection, ConnectionFuture};
pub use door::Door;
pub use mesh::MeshSync;
pub use options::Options;
pub use status::{conflict_of, status};

/// The messages, client and server of `nkv.v1.Kv`: see `proto/nkv/v1/kv.proto`.
pub mod v1 {
    #![allow(clippy::all, clippy::arithmetic_side_effects, missing_docs, rustdoc::all, unreachable_pub)]
    include!("generated/nkv.v1.rs");
}

/// The messages, client and server of `kv.Client`, the service of the replicated gRPC store: see `proto/kv.proto`.
pub mod kv {
    #![allow(clippy::all, clippy::arithmetic_side_effects, missing_docs, rustdoc::all, unreachable_pub)]
    include!("generated/kv.rs");
}

/// The descriptors of both services, as reflection serves them: an encoded `google.protobuf.FileDescriptorSet`.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("generated/descriptors.bin");
