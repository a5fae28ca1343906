//! The suites of the client and of lost connections once more, over WebSockets.
#![cfg(feature = "ws")]
#![allow(clippy::duplicate_mod, reason = "each suite has the helpers that it shares with the others")]

#[path = "client.rs"]
mod client;
#[path = "reconnect.rs"]
mod reconnect;
