//! Figures of a store.

use std::collections::BTreeMap;
use std::time::Duration;

/// The figures of a store and its server; those that are not given are 0, or empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// The life of the data within which revisions may be compared.
    pub epoch: String,
    /// What an acknowledged write has reached: `sync`, `interval:50ms`, `os` or `memory`.
    pub durability: String,
    /// Keys.
    pub keys: u64,
    /// Bytes of all values.
    pub value_bytes: u64,
    /// Subscriptions.
    pub subscriptions: u64,
    /// Connections.
    pub connections: u64,
    /// The number of the newest change.
    pub revision: u64,
    /// For how long it has been running.
    pub uptime: Duration,
    /// Puts since it started, and so on with all that follow.
    pub puts: u64,
    /// Keys deleted.
    pub deletes: u64,
    /// Keys whose time to live ended.
    pub expired: u64,
    /// Batches stored.
    pub batches: u64,
    /// Batches that could not be stored.
    pub failed_batches: u64,
    /// Notifications given to subscribers.
    pub notified: u64,
    /// Changes passed over in favour of newer ones.
    pub conflated: u64,
    /// All that are numbers, by name: also those that have no field here.
    pub numbers: BTreeMap<String, u64>,
    /// All that are words, by name.
    pub words: BTreeMap<String, String>,
}

impl Stats {
    /// Makes them of figures by name.
    #[must_use]
    pub fn new(numbers: BTreeMap<String, u64>, words: BTreeMap<String, String>) -> Self {
        let word = |name: &str| words.get(name).cloned().unwrap_or_default();
        let number = |name: &str| numbers.get(name).copied().unwrap_or(0);
        Stats {
            epoch: word("epoch"),
            durability: word("durability"),
            keys: number("keys"),
            value_bytes: number("value_bytes"),
            subscriptions: number("subscriptions"),
            connections: number("connections"),
            revision: number("revision"),
            uptime: Duration::from_millis(number("uptime_ms")),
            puts: number("puts"),
            deletes: number("deletes"),
            expired: number("expired"),
            batches: number("batches"),
            failed_batches: number("failed_batches"),
            notified: number("notified"),
            conflated: number("conflated"),
            numbers,
            words,
        }
    }
}
