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

mod encode;
mod notifier;
mod outbox;
mod reset;

pub use encode::forget_encodings;
pub use notifier::{NotifierOptions, TcpNotifier};
pub use outbox::{Outbox, WriterEnd, keep_alive, limit_send_buffer, spare};
pub use reset::{acknowledged, end_when_closed, reset_when_closed};
