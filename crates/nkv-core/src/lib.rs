#![doc = include_str!("../README.md")]
// No input may end the process. Sums are of what is in memory: they overflow when memory does.
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

pub mod mailbox;
pub mod rows;

mod apply;
mod broken;
mod changes;
mod event;
mod figures;
mod key;
mod keyspace;
mod meta;
mod notifier;
mod order;
mod packed;
mod persist;
mod plan;
mod queue;
mod record;
mod records;
mod revision;
mod route;
mod shared;
mod slots;
mod store;
mod subscribers;
mod sync;
mod table;
mod wake;
mod write;

pub use apply::Applied;
pub use changes::{CHANGES_LEN_MAX, ChangeGroup, Changes, Gap};
pub use event::{Began, BeginCause, EndReason, Event, EventKind, Snapshot, SnapshotReader};
pub use figures::{Histogram, HistogramReading, StorageFigures, StorageReading};
pub use key::{KEY_LEN_MAX, Key, KeyError, KeyRef, Pattern};
pub use meta::{META_LEN_MAX, Meta};
pub use notifier::{Delivery, Notifier};
pub use persist::{
    FailureHandler, Loaded, MemoryPersist, NoPersist, PersistError, PersistErrorKind, PersistValue, Prepared, StoredRef,
};
pub use record::{Action, Change, Expiry, Reason, Record, RecordRef, Timestamp, ValueRef};
pub use records::Records;
pub use revision::{Epoch, Revision};
pub use route::RoutePersist;
pub use store::{NotifyKeyValue, Page, PageTooLarge, Stats};
pub use subscribers::{SubscriberId, Subscription};
pub use write::{Failed, Op, Outcome, PutOptions, Write, WriteError, WriteResult};
