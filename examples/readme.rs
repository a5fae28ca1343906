//! The examples of the README, compiled and run as tests of this package's documentation.

#![doc = include_str!("../README.md")]
