//! Writes: each is one message whose acknowledgement is waited for, and is never sent again.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::task::Poll;

use async_nats::HeaderMap;
use bytes::Bytes;
use futures_util::stream::{self, FuturesOrdered, StreamExt};
use nkv_core::{Epoch, Expiry, Key, Op, Outcome, Pattern, Revision};
use nkv_node::{Decided, EngineError};

use crate::bucket::BATCH_OPS_MAX;
use crate::census::Last;
use crate::engine::{Link, Shared, lock};
use crate::subject::{decode, encode};
use crate::wire::{NotDone, PubAck};

/// How often a write that others get in the way of is tried with what they left: each of them succeeded.
const ATTEMPTS: usize = 64;
/// Reads, or deletes, of one wildcard that are under way at once.
const KEYS_AT_ONCE: usize = 64;

type Result<T> = std::result::Result<T, EngineError>;

/// Has operations done: each for itself in order, or all in one step.
pub(crate) async fn write(shared: &Shared, link: &Link, epoch: Epoch, ops: Vec<Op>, together: bool) -> Result<Decided> {
    let writer = Writer { shared, link, epoch };
    let results = if together && ops.len() > 1 { writer.together(ops).await? } else { writer.apart(ops).await };
    Ok(Decided { epoch: link.epoch, results })
}

/// What nkv sees of a key.
enum Present {
    /// A value, put at this sequence.
    Value(u64),
    /// Nothing; the last message of the subject, if there is one, has this sequence.
    Absent(u64),
}

impl Present {
    fn sequence(&self) -> u64 {
        match self {
            Present::Value(sequence) | Present::Absent(sequence) => *sequence,
        }
    }

    fn revision(&self) -> Revision {
        match self {
            Present::Value(sequence) => Revision::new(*sequence),
            Present::Absent(_) => Revision::ZERO,
        }
    }
}

/// What a message does.
enum What {
    Put { value: Bytes, expiry: Option<Expiry> },
    Delete,
}

struct Writer<'a> {
    shared: &'a Shared,
    link: &'a Link,
    /// That of the revisions in conditions.
    epoch: Epoch,
}

impl Writer<'_> {
    /// Plain puts are sent one behind the other, and the server does them in this order; what needs a look first waits until
    /// those before it are done.
    async fn apart(&self, ops: Vec<Op>) -> Vec<Result<Outcome>> {
        let mut results = Vec::with_capacity(ops.len());
        let mut under_way = FuturesOrdered::new();
        for op in ops {
            match op {
                Op::Put { key, value, options } if options.if_revision.is_none() => {
                    let what = What::Put { value, expiry: options.expiry };
                    // Sent with the first poll, before the next one is made: also where the runtime wants this task to pause.
                    let mut put = Box::pin(tokio::task::unconstrained(self.put(self.subject(&key), what)));
                    match std::future::poll_fn(|cx| Poll::Ready(put.as_mut().poll(cx))).await {
                        Poll::Ready(done) => {
                            results.extend(under_way.by_ref().collect::<Vec<_>>().await);
                            results.push(done);
                        }
                        Poll::Pending => under_way.push_back(put),
                    }
                }
                op => {
                    results.extend(under_way.by_ref().collect::<Vec<_>>().await);
                    results.push(self.one(op).await);
                }
            }
        }
        results.extend(under_way.collect::<Vec<_>>().await);
        results
    }

    async fn put(&self, subject: String, what: What) -> Result<Outcome> {
        match self.send(subject, what, None, None).await {
            Ok(ack) => Ok(Outcome::Put { revision: Revision::new(ack.seq) }),
            Err(NotDone::Failed(error)) => Err(error),
            Err(NotDone::Conflict) => Err(EngineError::Unavailable("NATS refused a plain put".to_owned())),
        }
    }

    async fn one(&self, op: Op) -> Result<Outcome> {
        match op {
            Op::Put { key, value, options } => {
                let expected = options.if_revision.unwrap_or_default();
                self.put_if(&key, value, options.expiry, expected).await
            }
            Op::Delete { pattern: Pattern::Key(key) | Pattern::Exact(key), if_revision } => {
                self.delete(&self.subject(&key), if_revision).await
            }
            Op::Delete { if_revision: Some(_), .. } => Ok(Outcome::Conflict { revision: Revision::ZERO }),
            Op::Delete { pattern, if_revision: None } => self.delete_all(&pattern).await,
        }
    }

    async fn put_if(&self, key: &Key, value: Bytes, expiry: Option<Expiry>, expected: Revision) -> Result<Outcome> {
        self.check_epoch()?;
        let subject = self.subject(key);
        let mut last = match expected {
            // Most likely: there was nothing, or the marker that has come last.
            Revision::ZERO => match self.known(&subject) {
                Some(Last::Marker(sequence)) => sequence,
                _ => 0,
            },
            expected => expected.get(),
        };
        if expected != Revision::ZERO && self.may_be_marker(last) {
            let present = self.present(&subject).await?;
            if present.revision() != expected {
                return Ok(Outcome::Conflict { revision: present.revision() });
            }
        }
        for _ in 0..ATTEMPTS {
            let what = What::Put { value: value.clone(), expiry };
            match self.send(subject.clone(), what, Some(last), None).await {
                Ok(ack) => return Ok(Outcome::Put { revision: Revision::new(ack.seq) }),
                Err(NotDone::Failed(error)) => return Err(error),
                Err(NotDone::Conflict) => {}
            }
            let present = self.present(&subject).await?;
            if present.revision() != expected {
                return Ok(Outcome::Conflict { revision: present.revision() });
            }
            last = present.sequence();
        }
        Err(crowded())
    }

    async fn delete(&self, subject: &str, if_revision: Option<Revision>) -> Result<Outcome> {
        if if_revision.is_some() {
            self.check_epoch()?;
        }
        // Most likely that is what is there. Where it is not, the server says so.
        let mut known = match self.known(subject) {
            Some(Last::Value(sequence)) => Some(Present::Value(sequence)),
            _ => None,
        };
        for _ in 0..ATTEMPTS {
            let is_known = known.is_some();
            let present = match known.take() {
                Some(present) => present,
                None => self.present(subject).await?,
            };
            if let Present::Absent(_) = present {
                return Ok(Outcome::NotFound);
            }
            if if_revision.is_some_and(|expected| expected != present.revision()) {
                if is_known {
                    continue;
                }
                return Ok(Outcome::Conflict { revision: present.revision() });
            }
            match self.send(subject.to_owned(), What::Delete, Some(present.sequence()), None).await {
                Ok(ack) => return Ok(Outcome::Deleted { count: 1, revision: Revision::new(ack.seq) }),
                Err(NotDone::Failed(error)) => return Err(error),
                Err(NotDone::Conflict) => {}
            }
        }
        Err(crowded())
    }

    /// Key by key.
    async fn delete_all(&self, pattern: &Pattern) -> Result<Outcome> {
        let subjects = self.selected(pattern).await?;
        let has_failed = AtomicBool::new(false);
        let delete = async |subject: &String| match has_failed.load(Relaxed) {
            // No other is begun; those that are under way have their answers.
            true => Ok(Outcome::NotFound),
            false => self.delete(subject, None).await.inspect_err(|_| has_failed.store(true, Relaxed)),
        };
        let mut deletes = stream::iter(subjects.iter().map(delete)).buffer_unordered(KEYS_AT_ONCE);
        let (mut count, mut last, mut failed) = (0_u64, Revision::ZERO, None);
        while let Some(delete) = deletes.next().await {
            match delete {
                Ok(Outcome::Deleted { revision, .. }) => (count, last) = (count.saturating_add(1), last.max(revision)),
                Ok(_) => {}
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            None if count == 0 => Ok(Outcome::NotFound),
            None => Ok(Outcome::Deleted { count, revision: last }),
            Some(error) if count == 0 => Err(error),
            Some(error) => {
                Err(EngineError::OutcomeUnknown(format!("{count} keys are gone, and not all of the others: {error}")))
            }
        }
    }

    /// The subjects of the keys that a pattern selects.
    async fn selected(&self, pattern: &Pattern) -> Result<Vec<String>> {
        let prefix = &self.link.wire.prefix;
        let filter = match pattern {
            Pattern::All => format!("{prefix}>"),
            Pattern::Below(branch) => format!("{prefix}{}.>", encode(branch.as_str())),
            Pattern::Key(key) | Pattern::Exact(key) => self.subject(key),
        };
        let mut names = self.link.read(self.link.wire.names(&filter)).await?;
        let key = |subject: &str| decode(subject.strip_prefix(prefix)?);
        names.retain(|subject| key(subject).is_some_and(|key| pattern.selects(&key)));
        Ok(names)
    }

    /// All in one step. What a condition keeps from being done does not keep the others.
    async fn together(&self, ops: Vec<Op>) -> Result<Vec<Result<Outcome>>> {
        if !self.link.settings.abilities.batches {
            return Err(refused(501, "the bucket has no atomic batches"));
        }
        for _ in 0..ATTEMPTS {
            match self.try_together(&ops).await {
                Ok(outcomes) => return Ok(outcomes.into_iter().map(Ok).collect()),
                Err(NotDone::Failed(error)) => return Err(error),
                Err(NotDone::Conflict) => {}
            }
        }
        Err(crowded())
    }

    async fn try_together(&self, ops: &[Op]) -> std::result::Result<Vec<Outcome>, NotDone> {
        let failed = |error| NotDone::Failed(error);
        // What is to be done, and for each operation its outcome, with the place of its last message instead of a revision.
        let (mut messages, mut outcomes) = (Vec::new(), Vec::with_capacity(ops.len()));
        for op in ops {
            let (subjects, if_revision) = match op {
                Op::Put { key, value, options } => {
                    let subject = self.subject(key);
                    let last = match options.if_revision {
                        None => None,
                        Some(expected) => {
                            self.check_epoch().map_err(failed)?;
                            let present = self.present(&subject).await.map_err(failed)?;
                            if present.revision() != expected {
                                outcomes.push(Outcome::Conflict { revision: present.revision() });
                                continue;
                            }
                            Some(present.sequence())
                        }
                    };
                    messages.push((subject, What::Put { value: value.clone(), expiry: options.expiry }, last));
                    outcomes.push(Outcome::Put { revision: Revision::new(messages.len() as u64) });
                    continue;
                }
                Op::Delete { pattern: Pattern::Key(key) | Pattern::Exact(key), if_revision } => {
                    (vec![self.subject(key)], *if_revision)
                }
                Op::Delete { if_revision: Some(_), .. } => {
                    outcomes.push(Outcome::Conflict { revision: Revision::ZERO });
                    continue;
                }
                Op::Delete { pattern, if_revision: None } => (self.selected(pattern).await.map_err(failed)?, None),
            };
            if if_revision.is_some() {
                self.check_epoch().map_err(failed)?;
            }
            let mut count = 0_u64;
            let mut conflict = None;
            let look = async |subject: String| (self.present(&subject).await, subject);
            let mut looks = stream::iter(subjects.into_iter().map(look)).buffered(KEYS_AT_ONCE);
            while let Some((present, subject)) = looks.next().await {
                let present = present.map_err(failed)?;
                match present {
                    Present::Absent(_) => {}
                    Present::Value(_) if if_revision.is_some_and(|expected| expected != present.revision()) => {
                        conflict = Some(present.revision());
                    }
                    Present::Value(sequence) => {
                        count = count.saturating_add(1);
                        messages.push((subject, What::Delete, Some(sequence)));
                        // Without a look at all the others.
                        check_count(&messages)?;
                    }
                }
            }
            outcomes.push(match conflict {
                Some(revision) => Outcome::Conflict { revision },
                None if count == 0 => Outcome::NotFound,
                None => Outcome::Deleted { count, revision: Revision::new(messages.len() as u64) },
            });
        }
        let mut subjects = HashSet::new();
        if messages.iter().any(|(subject, ..)| !subjects.insert(subject.as_str())) {
            return Err(failed(refused(413, "a batch of NATS has each key once; nothing was changed")));
        }
        check_count(&messages)?;
        let count = messages.len() as u64;
        let last = self.send_all(messages).await?;
        let revision = |place: Revision| Revision::new(last.saturating_sub(count.saturating_sub(place.get())));
        for outcome in &mut outcomes {
            match outcome {
                Outcome::Put { revision: place } | Outcome::Deleted { revision: place, .. } => {
                    *place = revision(*place)
                }
                _ => {}
            }
        }
        Ok(outcomes)
    }

    /// Sends messages that are kept in one step, and returns the sequence of the last.
    async fn send_all(&self, messages: Vec<(String, What, Option<u64>)>) -> std::result::Result<u64, NotDone> {
        let count = messages.len() as u64;
        let id = format!("{:016x}-{}", self.shared.writer, self.shared.batches.fetch_add(1, Relaxed));
        for ((subject, what, last), number) in messages.into_iter().zip(1..) {
            let batch = (count > 1).then(|| Batch { id: &id, number, is_last: number == count });
            if number < count {
                let (headers, value) = self.message(what, last, batch).map_err(NotDone::Failed)?;
                let publish = self.link.wire.client.publish_with_headers(subject, headers.unwrap_or_default(), value);
                let sent = self.link.unless_lost(publish).await.map_err(NotDone::Failed)?;
                // Without the last message nothing of it is done.
                let unsent = |error: async_nats::PublishError| EngineError::Unavailable(error.to_string());
                sent.map_err(|error| NotDone::Failed(unsent(error)))?;
                continue;
            }
            let ack = self.send(subject, what, last, batch).await?;
            if count > 1 && ack.count != count {
                let message = format!("a batch of {count} was acknowledged as one of {}", ack.count);
                return Err(NotDone::Failed(EngineError::OutcomeUnknown(message)));
            }
            return Ok(ack.seq);
        }
        Ok(0)
    }

    fn subject(&self, key: &Key) -> String {
        format!("{}{}", self.link.wire.prefix, encode(key.as_str()))
    }

    /// What nkv sees of a key: neither a marker nor a value that is too long.
    async fn present(&self, subject: &str) -> Result<Present> {
        let last = self.link.read(self.link.wire.last_of(subject)).await?;
        Ok(match last {
            None => Present::Absent(0),
            Some(kept) if kept.marker.is_some() || kept.value.len() > self.shared.options.value_len_max => {
                Present::Absent(kept.sequence)
            }
            Some(kept) => Present::Value(kept.sequence),
        })
    }

    /// What has come last of a key; there may be something newer.
    fn known(&self, subject: &str) -> Option<Last> {
        lock(&self.shared.place).census.last_of(subject)
    }

    /// Whether a sequence may be that of a marker: nkv has a revision for a delete too, and no value is at that.
    fn may_be_marker(&self, sequence: u64) -> bool {
        let place = lock(&self.shared.place);
        let is_known = place.last.is_some() && sequence <= self.link.seen.load(Relaxed);
        !is_known || place.census.is_marker(sequence)
    }

    fn check_epoch(&self) -> Result<()> {
        if self.epoch == self.link.epoch { Ok(()) } else { Err(EngineError::OtherEpoch) }
    }

    fn message(&self, what: What, last: Option<u64>, batch: Option<Batch<'_>>) -> Result<(Option<HeaderMap>, Bytes)> {
        if let What::Put { value, .. } = &what
            && value.len() > self.link.settings.value_len_max
        {
            let (len, len_max) = (value.len(), self.link.settings.value_len_max);
            let message = format!("the value has {len} bytes, and NATS takes {len_max} here; nothing was changed");
            return Err(refused(413, message));
        }
        let mut headers = HeaderMap::new();
        if let Some(last) = last {
            headers.insert("Nats-Expected-Last-Subject-Sequence", last.to_string());
        }
        if let Some(Batch { id, number, is_last }) = batch {
            headers.insert("Nats-Batch-Id", id);
            headers.insert("Nats-Batch-Sequence", number.to_string());
            if is_last {
                headers.insert("Nats-Batch-Commit", "1");
            }
        }
        let value = match what {
            What::Delete => {
                headers.insert("KV-Operation", "DEL");
                Bytes::new()
            }
            What::Put { value, expiry } => {
                if let Some(expiry) = expiry {
                    // NATS counts in whole seconds.
                    headers.insert("Nats-TTL", format!("{}s", expiry.ttl_ms.div_ceil(1_000).max(1)));
                    let number = lock(&self.shared.ends).note(expiry);
                    headers.insert(WRITER, format!("{:016x}-{number}", self.shared.writer));
                }
                value
            }
        };
        Ok(((!headers.is_empty()).then_some(headers), value))
    }

    async fn send(
        &self,
        subject: String,
        what: What,
        last: Option<u64>,
        batch: Option<Batch<'_>>,
    ) -> std::result::Result<PubAck, NotDone> {
        let Link { wire, seen, .. } = self.link;
        let before = seen.load(Relaxed);
        let (headers, value) = self.message(what, last, batch).map_err(NotDone::Failed)?;
        let ack = self.link.unless_lost(wire.publish(subject, headers, value)).await.map_err(NotDone::Failed)??;
        if ack.seq <= before {
            let message = "the stream began anew: it is not known what it was when it took the write";
            return Err(NotDone::Failed(EngineError::OutcomeUnknown(message.to_owned())));
        }
        Ok(ack)
    }
}

/// The header by which a node knows a value with a TTL that it has put itself.
pub(crate) const WRITER: &str = "Nkv-Writer";

struct Batch<'a> {
    id: &'a str,
    number: u64,
    is_last: bool,
}

fn check_count<T>(messages: &[T]) -> std::result::Result<(), NotDone> {
    if messages.len() <= BATCH_OPS_MAX {
        return Ok(());
    }
    let message = format!("a batch of NATS has {BATCH_OPS_MAX} changes at most; nothing was changed");
    Err(NotDone::Failed(refused(413, message)))
}

fn refused(status: u16, message: impl Into<String>) -> EngineError {
    EngineError::Refused { status, message: message.into() }
}

fn crowded() -> EngineError {
    refused(503, format!("others wrote the key each time it was tried, {ATTEMPTS} times; nothing was changed"))
}
