//! The examples of the README, compiled and run as tests of this package's documentation.

#![doc = include_str!("../README.md")]

/// The examples of `docs/write-your-own-backend.md`.
#[doc = include_str!("../docs/write-your-own-backend.md")]
pub mod write_your_own_backend {}
