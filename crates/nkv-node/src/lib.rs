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

mod blocking;
mod budget;
mod clock;
mod connection_limit;
mod deletes;
mod engine;
mod expiry;
mod failure;
mod figures;
mod follow;
mod handle;
mod job;
mod limits;
mod node;
mod peer;
mod rate_log;
mod rights;
mod shared;
mod subscriber;
mod subscription;
mod tail;
mod wakeups;
mod writer;

pub use nkv_core;

pub use blocking::BlockingHandle;
pub use budget::{Budget, Held, Holder, Leave, Said};
pub use clock::{SinceBoot, Time, replace_file};
pub use connection_limit::{ConnectionLimit, Full, Place};
pub use engine::{Abilities, Decided, Engine, EngineError, EngineNumber, Feed, Seen};
pub use failure::Chain;
pub use figures::{Ended, Figures, Operation};
pub use handle::{Admitted, ChangesError, Handle};
pub use job::Room;
pub use limits::Limits;
pub use nkv_core::{ChangeGroup, Changes, Gap, Notifier, Op, Outcome};
pub use nkv_types::{
    AsKey, AsPattern, AsPatterns, Branch, BranchWatch, Current, Deleted, Edit, EndReason, Entry, Epoch, Error,
    ErrorKind, Event, GoneReason, IntoEdit, IntoValue, Key, Page, PageOptions, Pattern, PutOptions, Result, Revision,
    Stats, Store, SubscribeOptions, Unreadable, Watch, Watched,
};
pub use node::{Builder, Node, NodeError};
pub use peer::{Peer, PeerInfo};
pub use rate_log::RateLimitedLog;
pub use rights::{Right, Rights};
pub use shared::{NotDone, Results, Stopping, Traced, Written};
pub use subscription::{AttachOptions, Attached, Subscription};
pub use tail::{Cursor, Tail, TailEvent, TailOptions};
pub use wakeups::SharedWaker;

nkv_types::store_by_methods!(Handle, Subscription);
