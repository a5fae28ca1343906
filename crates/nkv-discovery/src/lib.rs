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

mod discovery;
#[cfg(feature = "dns")]
mod dns;
mod error;
mod found;
mod host;
#[cfg(feature = "kubernetes")]
mod kubernetes;
mod list;
#[cfg(feature = "nats")]
mod nats;
mod spec;

pub use discovery::Discovery;
#[cfg(feature = "dns")]
pub use dns::Dns;
pub use error::{ConfigError, DiscoveryError, DiscoveryErrorKind};
pub use found::{ADDRESSES_MAX, Found};
pub use host::HostPort;
#[cfg(feature = "kubernetes")]
pub use kubernetes::{Account, Kubernetes};
pub use list::StaticList;
#[cfg(feature = "nats")]
pub use nats::Nats;
pub use spec::{KubernetesSpec, NatsSpec, Spec};
