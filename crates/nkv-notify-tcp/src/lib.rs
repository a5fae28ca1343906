#![doc = include_str!("../README.md")]

mod encode;
mod notifier;
mod writer;

pub use notifier::{NotifierOptions, TcpNotifier};
pub use writer::{WriterEnd, keep_alive, limit_send_buffer};
