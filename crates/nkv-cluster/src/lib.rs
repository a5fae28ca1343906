#![doc = include_str!("../README.md")]
// No peer, disk or user may end the process.
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod bytes;
mod clock;
mod cluster;
mod commit;
mod keys;
mod link;
mod meeting;
mod members;
mod membership;
mod register;
mod replica;
mod secure;
mod session;
#[cfg(test)]
mod sim;
mod stamp;
#[cfg(test)]
mod traffic;
mod tree;
mod wire;

pub use cluster::{Cluster, Options};
pub use keys::{Keys, KeysError};
pub use members::{Events, Member, MemberEvent, MemberState};
pub use membership::{Membership, MembershipError, StaticPeers};
pub use stamp::NodeId;
