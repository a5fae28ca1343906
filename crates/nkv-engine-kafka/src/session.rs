//! What writes need while the engine is followed.

use std::collections::{BTreeMap, HashMap};
use std::iter::Peekable;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use nkv_core::{Epoch, Key, Op, Outcome, Pattern, Revision};
use nkv_node::{EngineError, Feed};
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::error::Result;
use crate::records::NewRecord;
use crate::topic::Settings;
use crate::writer::{Handed, Job, end, hand_over};

/// How long a write waits until the node has seen what was written.
const FEED_LIMIT: Duration = Duration::from_secs(1);

/// How many keys of a wildcard delete go into one batch, at most.
const PART_KEYS: usize = 1_000;

/// One time of following: it ends with the connections.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) epoch: Epoch,
    pub(crate) settings: Settings,
    pub(crate) jobs: mpsc::Sender<Job>,
    /// Up to which offset the node has what the log has.
    pub(crate) progress: watch::Receiver<i64>,
    pub(crate) feed: Feed,
    pub(crate) deletes: Deletes,
}

/// A write that was begun.
enum Begun<'a> {
    Put(Handed),
    Delete(Handed, Awaited<'a>),
    Ended(Result<Outcome, EngineError>),
}

impl Session {
    /// Does operations in order, each for itself.
    pub(crate) async fn write_apart(&self, ops: Vec<Op>) -> Vec<Result<Outcome, EngineError>> {
        let (mut results, mut begun) = (Vec::with_capacity(ops.len()), Vec::new());
        for op in ops {
            if matches!(op, Op::Delete { pattern: Pattern::Below(_) | Pattern::All, .. }) {
                // It deletes what those before it have put.
                self.end_all(&mut begun, &mut results).await;
            }
            begun.push(self.begin(op).await.unwrap_or_else(|error| Begun::Ended(Err(error))));
        }
        self.end_all(&mut begun, &mut results).await;
        results
    }

    async fn end_all(&self, begun: &mut Vec<Begun<'_>>, results: &mut Vec<Result<Outcome, EngineError>>) {
        for one in begun.drain(..) {
            results.push(self.end_one(one).await);
        }
    }

    async fn begin(&self, op: Op) -> Result<Begun<'_>, EngineError> {
        check(&op)?;
        match op {
            Op::Put { key, value, .. } => Ok(Begun::Put(self.hand_over(vec![record(&key, Some(value))]).await?)),
            Op::Delete { pattern: Pattern::Key(key) | Pattern::Exact(key), .. } => {
                let awaited = self.expect(vec![key.clone()]);
                Ok(Begun::Delete(self.hand_over(vec![record(&key, None)]).await?, awaited))
            }
            Op::Delete { pattern, .. } => Ok(Begun::Ended(self.delete_all(&pattern).await)),
        }
    }

    async fn end_one(&self, begun: Begun<'_>) -> Result<Outcome, EngineError> {
        match begun {
            Begun::Ended(outcome) => outcome,
            Begun::Put(handed) => Ok(Outcome::Put { revision: revision(handed.done().await?) }),
            Begun::Delete(handed, awaited) => {
                let first = handed.done().await?;
                self.deleted(awaited, first).await
            }
        }
    }

    /// Does operations in one step: one batch of records, which Kafka appends whole or not at all.
    pub(crate) async fn write_together(&self, ops: Vec<Op>) -> Result<Vec<Outcome>, EngineError> {
        ops.iter().try_for_each(check)?;
        let (mut records, mut deletes) = (Vec::new(), Vec::new());
        for op in ops {
            match op {
                Op::Put { key, value, .. } => {
                    records.push(record(&key, Some(value)));
                    deletes.push(None);
                }
                Op::Delete { pattern, .. } => {
                    let keys = match pattern {
                        Pattern::Key(key) | Pattern::Exact(key) => vec![key],
                        pattern => self.shown(&pattern, &records).await?,
                    };
                    records.extend(keys.iter().map(|key| record(key, None)));
                    deletes.push(Some(keys));
                }
            }
        }
        if records.is_empty() {
            return Ok(deletes.iter().map(|_| Outcome::NotFound).collect());
        }
        let awaited: Vec<_> = deletes.into_iter().map(|keys| keys.map(|keys| self.expect(keys))).collect();
        let mut next = self.hand_over(records).await?.done().await?;
        let mut outcomes = Vec::with_capacity(awaited.len());
        for awaited in awaited {
            let count = awaited.as_ref().map_or(1, |awaited| awaited.keys.len());
            outcomes.push(match awaited {
                None => Outcome::Put { revision: revision(next) },
                Some(awaited) => self.deleted(awaited, next).await?,
            });
            next = next.saturating_add(i64::try_from(count).unwrap_or(i64::MAX));
        }
        Ok(outcomes)
    }

    /// Deletes what the node shows, in batches: another may write in between.
    async fn delete_all(&self, pattern: &Pattern) -> Result<Outcome, EngineError> {
        let mut keys = self.shown(pattern, &[]).await?.into_iter().peekable();
        let (mut count, mut last) = (0_u64, Revision::ZERO);
        while keys.peek().is_some() {
            let part = self.part(&mut keys);
            let records = part.iter().map(|key| record(key, None)).collect();
            let awaited = self.expect(part);
            let deleted = async {
                let first = self.hand_over(records).await?.done().await?;
                self.deleted(awaited, first).await
            };
            match deleted.await {
                Ok(Outcome::Deleted { count: more, revision }) => {
                    (count, last) = (count.saturating_add(more), revision)
                }
                Ok(_) => {}
                Err(error) if last == Revision::ZERO => return Err(error),
                Err(error) => {
                    return Err(EngineError::OutcomeUnknown(format!("{count} keys are gone, then: {error}")));
                }
            }
        }
        if count == 0 { Ok(Outcome::NotFound) } else { Ok(Outcome::Deleted { count, revision: last }) }
    }

    /// The next of the keys whose tombstones fit into one batch: one at least.
    fn part(&self, keys: &mut Peekable<impl Iterator<Item = Key>>) -> Vec<Key> {
        let (mut part, mut len) = (Vec::new(), 0_usize);
        while let Some(key) = keys.next_if(|key| {
            len = len.saturating_add(record(key, None).len_max());
            part.is_empty() || part.len() < PART_KEYS && len <= self.settings.room()
        }) {
            part.push(key);
        }
        part
    }

    /// The keys that a pattern selects of what was acknowledged to any client up to now, and of what stands before.
    async fn shown(&self, pattern: &Pattern, before: &[NewRecord]) -> Result<Vec<Key>, EngineError> {
        self.seen(end(&self.jobs).await?).await?;
        let put = before.iter().filter(|record| record.value.is_some());
        let put = put.filter_map(|record| str::from_utf8(&record.key).ok().and_then(|text| Key::new(text).ok()));
        let mut keys: Vec<Key> = put.filter(|key| pattern.selects(key)).collect();
        let (feed, pattern) = (self.feed.clone(), pattern.clone());
        // There may be a great many.
        let shown = spawn_blocking(move || {
            feed.walk(&pattern, |record| keys.push(record.key.to_key()));
            keys.sort_unstable();
            keys.dedup();
            keys
        });
        shown.await.map_err(|error| EngineError::Unavailable(format!("look at what the node shows: {error}")))
    }

    /// What became of deletes whose tombstones are in the log from `first` on: how many of them found something.
    async fn deleted(&self, awaited: Awaited<'_>, first: i64) -> Result<Outcome, EngineError> {
        let offsets: Vec<i64> = (0..).zip(&awaited.keys).map(|(at, _)| first.saturating_add(at)).collect();
        let last = offsets.last().copied().unwrap_or_default();
        if self.seen(last.saturating_add(1)).await.is_err() {
            let message = "it is deleted, but the node has not seen yet whether there was anything";
            return Err(EngineError::OutcomeUnknown(message.into()));
        }
        let found = awaited.found(&offsets);
        match found.last() {
            None => Ok(Outcome::NotFound),
            Some(last) => Ok(Outcome::Deleted { count: found.len() as u64, revision: revision(*last) }),
        }
    }

    /// Waits until the node has all before this offset.
    async fn seen(&self, end: i64) -> Result<(), EngineError> {
        let mut progress = self.progress.clone();
        let seen = timeout(FEED_LIMIT, progress.wait_for(|progress| *progress >= end)).await;
        match seen {
            Ok(Ok(_)) => Ok(()),
            _ => Err(EngineError::Unavailable("the node is behind the log".into())),
        }
    }

    fn expect(&self, keys: Vec<Key>) -> Awaited<'_> {
        self.deletes.expect(keys, self.floor())
    }

    /// Where what is written next is from on.
    fn floor(&self) -> i64 {
        *self.progress.borrow()
    }

    async fn hand_over(&self, records: Vec<NewRecord>) -> Result<Handed, EngineError> {
        let (len, room) = (records.iter().map(NewRecord::len_max).sum::<usize>(), self.settings.room());
        if len > room {
            let message = format!(
                "Kafka takes {room} bytes in one step (max.message.bytes), and this has {len}; nothing was changed"
            );
            return Err(EngineError::Refused { status: 413, message });
        }
        hand_over(&self.jobs, records, self.floor()).await
    }
}

fn record(key: &Key, value: Option<Bytes>) -> NewRecord {
    NewRecord { key: Bytes::copy_from_slice(key.as_str().as_bytes()), value, header: None }
}

/// The revision of the record at an offset: there is none at 0.
pub(crate) fn revision(offset: i64) -> Revision {
    Revision::new(u64::try_from(offset).unwrap_or(0).saturating_add(1))
}

/// Refuses what a log cannot do.
fn check(op: &Op) -> Result<(), EngineError> {
    match op {
        Op::Put { options, .. } if options.if_revision.is_some() || options.expiry.is_some() => {
            Err(cannot("conditions and no values with a TTL"))
        }
        Op::Delete { if_revision: Some(_), .. } => Err(cannot("conditions")),
        Op::Put { .. } | Op::Delete { .. } => Ok(()),
    }
}

fn cannot(what: &str) -> EngineError {
    EngineError::Refused { status: 501, message: format!("Kafka has no {what}") }
}

/// Which tombstones found a value, of the keys that any client deletes here.
#[derive(Debug, Default)]
pub(crate) struct Deletes(Mutex<HashMap<Key, Watched>>);

#[derive(Debug, Default)]
struct Watched {
    /// Where the tombstones of those that wait may be from on, and how many wait there.
    waiting: BTreeMap<i64, usize>,
    found: Vec<i64>,
}

/// Keys whose tombstones are noted for as long as this is held.
pub(crate) struct Awaited<'a> {
    deletes: &'a Deletes,
    keys: Vec<Key>,
    floor: i64,
}

impl Deletes {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Watched>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes from now on which tombstones of these keys find a value, of those from the offset `floor` on.
    fn expect(&self, keys: Vec<Key>, floor: i64) -> Awaited<'_> {
        let mut watched = self.lock();
        for key in &keys {
            *watched.entry(key.clone()).or_default().waiting.entry(floor).or_default() += 1;
        }
        Awaited { deletes: self, keys, floor }
    }

    /// Notes that a tombstone of the log found a value, if any client waits for it.
    pub(crate) fn note(&self, key: &Key, offset: i64, found: impl FnOnce() -> bool) {
        if self.lock().contains_key(key) && found() {
            self.lock().entry(key.clone()).and_modify(|watched| watched.found.push(offset));
        }
    }
}

impl Awaited<'_> {
    /// Which of its tombstones, at these offsets, found a value.
    fn found(&self, offsets: &[i64]) -> Vec<i64> {
        let watched = self.deletes.lock();
        let is_found = |(key, offset): &(&Key, &i64)| watched.get(*key).is_some_and(|one| one.found.contains(offset));
        self.keys.iter().zip(offsets).filter(is_found).map(|(_, offset)| *offset).collect()
    }
}

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        let mut watched = self.deletes.lock();
        for key in &self.keys {
            let Some(one) = watched.get_mut(key) else { continue };
            if let Some(count) = one.waiting.get_mut(&self.floor).filter(|count| **count > 1) {
                *count -= 1;
                continue;
            }
            one.waiting.remove(&self.floor);
            match one.waiting.first_key_value() {
                Some((&floor, _)) => one.found.retain(|offset| *offset >= floor),
                None => drop(watched.remove(key)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_delete_waits_for_any_more_is_forgotten_while_others_wait() {
        let (deletes, key) = (Deletes::default(), Key::new("a").unwrap());
        let expect = |floor| deletes.expect(vec![key.clone()], floor);
        let mut last = expect(0);
        for offset in 0..100 {
            let _twice = expect(offset);
            deletes.note(&key, offset, || true);
            let next = expect(offset + 1);
            assert_eq!(last.found(&[offset]), [offset]);
            last = next;
        }
        assert_eq!(deletes.lock()[&key].found, Vec::<i64>::new());
        deletes.note(&key, 100, || true);
        drop(expect(101));
        assert_eq!(last.found(&[100]), [100], "one that ends takes what another waits for");
        drop(last);
        assert!(deletes.lock().is_empty());
    }
}
