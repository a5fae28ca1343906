#![doc = include_str!("../README.md")]

mod compression;
mod engine;
mod error;
mod group;
mod log;
mod options;
mod properties;
mod reader;
mod records;
mod security;
mod session;
mod topic;
mod wire;
mod writer;

pub use engine::KafkaEngine;
pub use error::{Error, ErrorKind, Result};
pub use log::KafkaLog;
pub use options::Options;
