//! The engine against a real broker. Without one, each test says so and is skipped; with `CI=true` it fails instead.

#![allow(clippy::unwrap_used)]

mod away;
mod contract;
mod histories;
mod log;
mod measure;
#[cfg(feature = "tls")]
mod security;
mod settings;
mod support;
