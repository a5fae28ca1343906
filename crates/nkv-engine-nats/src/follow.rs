//! Follows a bucket: one consumer of its stream brings the state and then each change.
//!
//! The numbers of the consumer's messages have no hole, or the follower begins again. Every 0.4 s the leader of the stream
//! is asked what the stream is and has: that is the sign of life, and it shows a stream that was created anew or went back,
//! settings that changed, and names that vanished without a message.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use async_nats::{Message, Subscriber};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use nkv_core::{Action, Change, Epoch, Key, Meta, PersistError, PersistErrorKind, Reason, Revision};
use nkv_node::{EngineError, Feed, Seen};
use serde::Deserialize;
use serde_json::json;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};
use tracing::{info, warn};

use crate::bucket::{self, BATCH_OPS_MAX, Purge};
use crate::census::Last;
use crate::engine::{Anchor, Link, Shared, lock};
use crate::subject::decode;
use crate::wire::{ApiError, Info, LIFE, NotDone, Wire, header, marker};
use crate::write::WRITER;

/// How often the stream is asked.
const PROBE: Duration = Duration::from_millis(400);
/// How often a consumer that has nothing to say says so.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// A consumer that is silent for longer is gone.
const SILENCE: Duration = Duration::from_secs(2);
/// How often a node that resumes looks whether it has all that there is by now, before it fetches the state.
const RESUME_TRIES: usize = 8;
/// How often it is waited for names that were overwritten before they were sent.
const FETCH_TRIES: usize = 100;
/// A state is fetched anew because of vanished names this seldom.
const FETCH_PAUSE: Duration = Duration::from_secs(2);
/// About this number of messages, or of bytes of values, is given to the node at once.
const CHANGES_AT_ONCE: usize = 1_024;
const LEN_AT_ONCE: usize = 4 << 20;
/// At most this number of markers is purged in one go.
const PURGES_AT_ONCE: usize = 256;
/// The pause after a purge that failed.
const PURGE_RETRY: Duration = Duration::from_secs(60);
/// By how much the clocks of servers and this one's idea of them may differ.
const CLOCK_DRIFT_MS: u64 = 2_000;
/// Where the generation of the data is kept. No client's key: it has a byte that no key has, spelled in a way that no key is.
const GENERATION: &str = "=00nkv.generation";
/// What is put there only takes a sequence.
const STEP: &str = "=00nkv.step";

type Result<T> = std::result::Result<T, EngineError>;

/// Follows the bucket for as long as it goes well.
pub(crate) async fn follow(shared: &Shared, seen: Option<Seen>, feed: &Feed) -> Result<Infallible> {
    let wire = Wire::connect(&shared.options).await?;
    let (info, settings) = bucket::ensure(&wire, &shared.options).await?;
    *lock(&shared.settings) = Some(settings);
    if seen.is_none_or(|seen| created_of(seen.epoch) != info.created()) {
        bucket::check_others(&wire, &shared.options, &info, seen.is_some()).await?;
    }
    let epoch = epoch(&wire, &info, seen).await?;
    let link = Arc::new(Link {
        created: info.created(),
        epoch,
        settings,
        seen: AtomicU64::new(0),
        lost: watch::Sender::new(false),
        wire,
    });
    let _followed = Followed { shared, link: &link };
    let mut follower = Follower { shared, link: &link, feed, consumer: None, last: 0 };
    if !follower.resume(seen, &info).await? {
        follower.fetch(&info, seen).await?;
    }
    *lock(&shared.link) = Some(Arc::clone(&link));
    feed.reached();
    loop {
        follower.live().await?;
        let info = link.wire.info().await?;
        let seen = Seen { epoch, revision: Revision::new(follower.last) };
        follower.fetch(&info, Some(seen)).await?;
    }
}

/// When it is dropped, the bucket is followed no more: writes that are under way get no answer.
struct Followed<'a> {
    shared: &'a Shared,
    link: &'a Link,
}

impl Drop for Followed<'_> {
    fn drop(&mut self) {
        *lock(&self.shared.link) = None;
        self.link.lost.send_replace(true);
    }
}

// Epochs: when the stream was created, and a generation, which is raised where the data went back.

fn epoch_of(created: u64, generation: u64) -> Epoch {
    Epoch::new((u128::from(created) << 64) | u128::from(generation))
}

fn created_of(epoch: Epoch) -> u64 {
    u64::try_from(epoch.get() >> 64).unwrap_or_default()
}

fn generation_of(epoch: Epoch) -> u64 {
    u64::try_from(epoch.get() & u128::from(u64::MAX)).unwrap_or_default()
}

/// The epoch of the data, after raising the generation if what was seen shows that they went back.
async fn epoch(wire: &Wire, info: &Info, seen: Option<Seen>) -> Result<Epoch> {
    let created = info.created();
    let (generation, _) = generation(wire).await?;
    if let Some(Seen { epoch, revision }) = seen {
        let (of_seen, generation_seen) = (created_of(epoch), generation_of(epoch));
        if of_seen == created && generation_seen > generation {
            return raise(wire, created, generation_seen).await;
        }
        if of_seen == created && generation_seen == generation && went_back(wire, info, revision.get()).await? {
            return raise(wire, created, generation).await;
        }
    }
    Ok(epoch_of(created, generation))
}

/// Whether the stream ends before a sequence that was seen, also at a second look.
async fn went_back(wire: &Wire, info: &Info, seen: u64) -> Result<bool> {
    if info.state.last_seq >= seen {
        return Ok(false);
    }
    sleep(PROBE).await;
    let again = wire.info().await?;
    Ok(again.created() == info.created() && again.state.last_seq < seen)
}

/// The generation, and the sequence of its message.
async fn generation(wire: &Wire) -> Result<(u64, u64)> {
    match wire.last_of(&format!("{}{GENERATION}", wire.prefix)).await? {
        None => Ok((0, 0)),
        Some(kept) => Ok((number_in(&kept.value), kept.sequence)),
    }
}

/// The generation that a message has. A marker, or what no node has written, is as good as none: it is only ever raised.
fn number_in(value: &[u8]) -> u64 {
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).unwrap_or_default()
}

/// Raises the generation above `from`, unless another node has done so. Returns the epoch that it begins.
async fn raise(wire: &Wire, created: u64, from: u64) -> Result<Epoch> {
    let (present, sequence) = generation(wire).await?;
    if present > from {
        return Ok(epoch_of(created, present));
    }
    let next = from.saturating_add(1);
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Nats-Expected-Last-Subject-Sequence", sequence.to_string());
    match wire.publish(format!("{}{GENERATION}", wire.prefix), Some(headers), next.to_string().into()).await {
        Ok(_) => {
            warn!(generation = next, "the bucket went back behind what was seen of it: a new epoch begins");
            Ok(epoch_of(created, next))
        }
        Err(NotDone::Failed(error)) => Err(error),
        Err(NotDone::Conflict) => Err(EngineError::Unavailable("another node begins an epoch".to_owned())),
    }
}

/// A consumer, and the number of its last message.
struct Consumer {
    messages: Subscriber,
    number: u64,
    /// The server's clock when it was made, in milliseconds.
    made_ms: u64,
    made: Instant,
}

/// From where on a consumer begins.
enum From {
    /// The last message of each name.
    State,
    /// What comes behind a sequence.
    Behind(u64),
}

struct Follower<'a> {
    shared: &'a Shared,
    link: &'a Arc<Link>,
    feed: &'a Feed,
    consumer: Option<Consumer>,
    /// Every message up to here has come.
    last: u64,
}

/// What a consumer brings.
enum Brought {
    Item(Item),
    /// There is nothing more for now: where the consumer runs, the stream goes up to this sequence, if it says so.
    Idle(Option<u64>),
    /// Something about the flow of messages.
    Nothing,
}

/// A message of the bucket.
struct Item {
    sequence: u64,
    time_ns: i128,
    /// What it changes, unless it is of no key.
    change: Option<Change>,
    /// More of the same step is to come.
    is_part: bool,
}

/// How many messages of a step have come whose last one has not.
#[derive(Debug, Default)]
struct Step(usize);

impl Step {
    fn note(&mut self, item: &Item) {
        self.0 = if item.is_part { self.0.saturating_add(1) } else { 0 };
    }

    /// Whether its end is worth waiting for. No batch has more messages, whatever their headers say.
    fn is_open(&self) -> bool {
        (1..BATCH_OPS_MAX).contains(&self.0)
    }
}

/// Messages that are given to the node at once. What was done in one step is given in one.
#[derive(Default)]
struct Portion {
    items: Vec<Item>,
    /// Bytes of the values in it.
    len: usize,
    step: Step,
}

impl Portion {
    fn push(&mut self, item: Item) {
        if let Some(Change { action: Action::Put { value, .. }, .. }) = &item.change {
            self.len = self.len.saturating_add(value.len());
        }
        self.step.note(&item);
        self.items.push(item);
    }

    fn is_full(&self) -> bool {
        !self.step.is_open() && (self.items.len() >= CHANGES_AT_ONCE || self.len >= LEN_AT_ONCE)
    }
}

impl Follower<'_> {
    /// Goes on behind what was seen, if the bucket shows that it is what it was, and that nothing vanished meanwhile: the last
    /// message that was seen is still there, and behind it come as many names as there are. Returns whether it did.
    async fn resume(&mut self, seen: Option<Seen>, info: &Info) -> Result<bool> {
        let Some(seen) = seen else { return Ok(false) };
        let anchor = lock(&self.shared.place).last;
        let Some(anchor) = anchor.filter(|anchor| {
            let is_seen = anchor.sequence == seen.revision.get() && anchor.epoch == seen.epoch;
            is_seen && anchor.epoch == self.link.epoch && self.link.settings.has_no_history
        }) else {
            return Ok(false);
        };
        match self.link.wire.at(anchor.sequence).await {
            Ok(Some(kept)) if kept.time_ns == anchor.time_ns => {}
            Ok(_) | Err(ApiError::Refused { .. }) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        self.consume(From::Behind(anchor.sequence)).await?;
        lock(&self.shared.place).last = None;
        let (mut items, mut until) = (Vec::new(), info.state.last_seq);
        let mut names = info.state.num_subjects;
        for _ in 0..RESUME_TRIES {
            self.gather(until, |item| items.push(item)).await?;
            if self.last <= until {
                // Nothing has come that was not counted.
                if lock(&self.shared.place).census.len() != names {
                    return Ok(false);
                }
                self.last = self.last.max(until);
                let mut portion = Portion::default();
                for item in items {
                    portion.push(item);
                    if portion.is_full() {
                        self.give(std::mem::take(&mut portion).items).await?;
                    }
                }
                self.give(portion.items).await?;
                info!(revision = self.last, "the bucket is followed again from where it was left");
                return Ok(true);
            }
            let info = self.link.wire.info().await?;
            (until, names) = (info.state.last_seq, info.state.num_subjects);
        }
        Ok(false)
    }

    /// Fetches the whole state.
    async fn fetch(&mut self, info: &Info, seen: Option<Seen>) -> Result<()> {
        let is_same = seen.is_some_and(|seen| seen.epoch == self.link.epoch);
        let is_contradiction = |error: &PersistError| is_same && error.kind() == PersistErrorKind::Rejected;
        match self.fetch_once(info).await {
            Err(EngineError::Feed(error)) if is_contradiction(&error) => {}
            done => return done,
        }
        // Where names vanished without a message, the node was at this revision with them: that they are gone takes another.
        let Link { wire, epoch, created, .. } = &**self.link;
        match wire.publish(format!("{}{STEP}", wire.prefix), None, Bytes::new()).await {
            Ok(_) | Err(NotDone::Conflict) => {}
            Err(NotDone::Failed(error)) => return Err(error),
        }
        let info = wire.info().await?;
        match self.fetch_once(&info).await {
            // The bucket says something else of revisions that the node has: it went back, and has overtaken the node since.
            Err(EngineError::Feed(error)) if is_contradiction(&error) => {
                raise(wire, *created, generation_of(*epoch)).await?;
                Err(EngineError::Unavailable(format!("a new epoch begins: {error}")))
            }
            done => done,
        }
    }

    async fn fetch_once(&mut self, info: &Info) -> Result<()> {
        {
            let mut place = lock(&self.shared.place);
            (place.census, place.last) = Default::default();
        }
        self.consume(From::State).await?;
        let (mut state, mut last_time) = (HashMap::<Key, Change>::new(), 0);
        let (mut until, mut counted) = (info.state.last_seq, info.state.num_subjects);
        for tries in 1.. {
            self.gather(until, |item| {
                last_time = item.time_ns;
                match item.change {
                    Some(change) if matches!(change.action, Action::Put { .. }) => {
                        state.insert(change.key.clone(), change);
                    }
                    Some(change) => drop(state.remove(&change.key)),
                    None => {}
                }
            })
            .await?;
            let names = lock(&self.shared.place).census.len();
            if names >= counted {
                break;
            }
            if self.last <= until || tries == FETCH_TRIES {
                let message = format!("the state is not whole: {names} of {counted} names have come");
                return Err(EngineError::Unavailable(message));
            }
            // What was overwritten before it was sent is among what was written since.
            let info = self.link.wire.info().await?;
            (until, counted) = (info.state.last_seq, info.state.num_subjects);
        }
        let came = self.last;
        self.last = came.max(until);
        self.link.seen.fetch_max(self.last, Relaxed);
        let count = state.len();
        let state = state.into_values().collect();
        self.feed.replace(state, Revision::new(self.last), self.link.epoch).await?;
        if came == self.last && came > 0 {
            self.note_last(came, last_time);
        }
        info!(keys = count, revision = self.last, "the whole state of the bucket was fetched");
        Ok(())
    }

    /// Takes what comes until the stream's sequence is reached, or nothing more comes.
    async fn gather(&mut self, until: u64, mut take: impl FnMut(Item)) -> Result<()> {
        if self.last >= until {
            return Ok(());
        }
        let (mut step, began) = (Step::default(), Instant::now());
        loop {
            match self.receive().await? {
                Brought::Item(item) => {
                    self.last = item.sequence;
                    step.note(&item);
                    take(item);
                    if self.last >= until && !step.is_open() {
                        return Ok(());
                    }
                }
                // What is missing was removed; or this server of several is behind the leader, and it is yet to come.
                Brought::Idle(end) if end.is_none_or(|end| end >= until) => return Ok(()),
                Brought::Idle(_) if began.elapsed() >= SILENCE => {
                    let message = format!("the consumer is behind the leader of the bucket for {SILENCE:?}");
                    return Err(EngineError::Unavailable(message));
                }
                Brought::Idle(_) => {}
                Brought::Nothing => {}
            }
        }
    }

    /// Gives what comes to the node. Returns when the state is to be fetched anew.
    async fn live(&mut self) -> Result<()> {
        let (link, fetched) = (self.link, Instant::now());
        let mut probes = interval(PROBE);
        probes.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut alive, mut heard) = (fetched, fetched);
        // What had come when the stream was asked, and whether it went back behind that.
        let (mut asked_at, mut went_back, mut purge_at) = (self.last, false, fetched);
        let mut probe: Option<BoxFuture<'static, std::result::Result<Info, ApiError>>> = None;
        let mut purge: Option<BoxFuture<'_, Result<Vec<u64>>>> = None;
        loop {
            tokio::select! {
                message = next_message(&mut self.consumer) => {
                    let message = message.ok_or_else(disconnected)?;
                    heard = Instant::now();
                    self.take(message).await?;
                }
                answer = ready(&mut probe) => {
                    probe = None;
                    match answer {
                        Ok(info) => {
                            alive = Instant::now();
                            let is_behind = info.state.last_seq < asked_at;
                            if is_behind && went_back {
                                return Err(EngineError::Unavailable("the bucket went back".to_owned()));
                            }
                            went_back = is_behind;
                            if !self.check(&info)? && fetched.elapsed() >= FETCH_PAUSE {
                                return Ok(());
                            }
                        }
                        // Until it is away, it is asked again.
                        Err(ApiError::Away(_)) => {}
                        Err(error) => return Err(error.into()),
                    }
                    if purge.is_none() && link.settings.purge != Purge::Never && purge_at <= Instant::now() {
                        let old = lock(&self.shared.place).census.old(self.now_ms(), PURGES_AT_ONCE);
                        purge = (!old.is_empty()).then(|| purged(link, old).boxed());
                    }
                }
                done = ready(&mut purge) => {
                    purge = None;
                    match done {
                        Ok(gone) => {
                            let mut place = lock(&self.shared.place);
                            gone.into_iter().for_each(|sequence| place.census.forget(sequence));
                        }
                        Err(error) => {
                            warn!(%error, "markers of deletes could not be purged");
                            purge_at = Instant::now().checked_add(PURGE_RETRY).unwrap_or(purge_at);
                        }
                    }
                }
                _ = probes.tick(), if probe.is_none() => {
                    let link = Arc::clone(link);
                    asked_at = self.last;
                    probe = Some(async move { link.wire.info().await }.boxed());
                }
                () = sleep_until(alive.checked_add(LIFE).unwrap_or(alive)) => {
                    return Err(EngineError::Unavailable(format!("no answer for {LIFE:?}")));
                }
                () = sleep_until(heard.checked_add(SILENCE).unwrap_or(heard)) => {
                    return Err(EngineError::Unavailable(format!("no message of the consumer for {SILENCE:?}")));
                }
            }
        }
    }

    /// Whether the stream has just what has come of it; an error where it is not what it was.
    fn check(&self, info: &Info) -> Result<bool> {
        let link = self.link;
        if info.created() != link.created {
            return Err(EngineError::Unavailable("the bucket was created anew".to_owned()));
        }
        if bucket::settings(&link.wire, &info.config).ok() != Some(link.settings) {
            return Err(EngineError::Unavailable("the settings of the bucket were changed".to_owned()));
        }
        let names = info.state.num_subjects;
        let census = &lock(&self.shared.place).census;
        if info.state.last_seq != self.last || names == census.len() {
            return Ok(true);
        }
        // This looks at all markers.
        let least = census.len_min(self.now_ms().saturating_add(CLOCK_DRIFT_MS));
        if (least..=census.len()).contains(&names) {
            return Ok(true);
        }
        info!(names, least, most = census.len(), "names vanished without a message: the state is fetched anew");
        Ok(false)
    }

    /// Takes a message, and all that have come behind it.
    async fn take(&mut self, message: Message) -> Result<()> {
        let (mut portion, mut next) = (Portion::default(), Some(message));
        while let Some(message) = next.take() {
            match self.read(message).await? {
                Brought::Item(item) => {
                    self.last = item.sequence;
                    portion.push(item);
                }
                // The end of the batch was overwritten, or was no message.
                Brought::Idle(_) => portion.step = Step::default(),
                Brought::Nothing => {}
            }
            next = if portion.step.is_open() {
                let next = timeout(SILENCE, next_message(&mut self.consumer)).await;
                Some(
                    next.map_err(|_| EngineError::Unavailable("a batch does not end".to_owned()))?
                        .ok_or_else(disconnected)?,
                )
            } else if portion.is_full() {
                None
            } else {
                match next_message(&mut self.consumer).now_or_never() {
                    Some(next) => Some(next.ok_or_else(disconnected)?),
                    None => None,
                }
            };
        }
        self.give(portion.items).await
    }

    /// Has the node apply messages.
    async fn give(&mut self, items: Vec<Item>) -> Result<()> {
        let last = items.last().map(|item| (item.sequence, item.time_ns));
        let Some((sequence, time_ns)) = last else { return Ok(()) };
        // Until the node has them, the census is ahead of it.
        lock(&self.shared.place).last = None;
        let changes: Vec<Change> = items.into_iter().filter_map(|item| item.change).collect();
        let (revision, last_change) = (Revision::new(sequence), changes.last().map(|change| change.revision));
        if !changes.is_empty() {
            self.feed.apply(changes).await?;
        }
        if last_change.is_none_or(|at| at < revision) {
            // The node's revision is to come as far as the stream, also where nothing changed for it.
            self.feed.pass(revision).await?;
        }
        self.note_last(sequence, time_ns);
        Ok(())
    }

    fn note_last(&self, sequence: u64, time_ns: i128) {
        lock(&self.shared.place).last = Some(Anchor { epoch: self.link.epoch, sequence, time_ns });
    }

    /// The server's clock, in milliseconds.
    fn now_ms(&self) -> u64 {
        let now = |consumer: &Consumer| {
            consumer.made_ms.saturating_add(u64::try_from(consumer.made.elapsed().as_millis()).unwrap_or(u64::MAX))
        };
        self.consumer.as_ref().map_or(0, now)
    }

    /// Makes a consumer.
    async fn consume(&mut self, from: From) -> Result<()> {
        #[derive(Deserialize)]
        struct Created {
            #[serde(with = "time::serde::rfc3339")]
            created: OffsetDateTime,
        }
        let wire = &self.link.wire;
        // The one before, if there is one, ends with its subscription.
        self.consumer = None;
        let inbox = wire.client.new_inbox();
        let failed = |error: &dyn std::fmt::Display| EngineError::Unavailable(error.to_string());
        let messages = wire.client.subscribe(inbox.clone()).await.map_err(|error| failed(&error))?;
        let mut config = json!({
            "deliver_subject": inbox,
            "ack_policy": "none",
            "replay_policy": "instant",
            "flow_control": true,
            "idle_heartbeat": u64::try_from(HEARTBEAT.as_nanos()).unwrap_or(u64::MAX),
            "mem_storage": true,
            "num_replicas": 1,
            "description": "nkv",
        });
        if let Some(config) = config.as_object_mut() {
            match from {
                // Without a history all there is is the last of each name.
                From::State if self.link.settings.has_no_history => {
                    drop(config.insert("deliver_policy".into(), json!("all")))
                }
                From::State => {
                    config.insert("deliver_policy".into(), json!("last_per_subject"));
                    // It wants one.
                    config.insert("filter_subject".into(), json!(">"));
                }
                From::Behind(sequence) => {
                    config.insert("deliver_policy".into(), json!("by_start_sequence"));
                    config.insert("opt_start_seq".into(), json!(sequence.saturating_add(1)));
                }
            }
        }
        self.last = if let From::Behind(sequence) = from { sequence } else { 0 };
        let body = json!({ "stream_name": wire.stream, "config": config });
        let created: Created = wire.api(&format!("CONSUMER.CREATE.{}", wire.stream), &body).await?;
        let made_ms = u64::try_from(created.created.unix_timestamp_nanos() / 1_000_000).unwrap_or_default();
        self.consumer = Some(Consumer { messages, number: 0, made_ms, made: Instant::now() });
        Ok(())
    }

    async fn receive(&mut self) -> Result<Brought> {
        let message = timeout(SILENCE, next_message(&mut self.consumer)).await;
        let silent = |_| EngineError::Unavailable(format!("no message of the consumer for {SILENCE:?}"));
        self.read(message.map_err(silent)?.ok_or_else(disconnected)?).await
    }

    /// Reads what the consumer has sent.
    async fn read(&mut self, message: Message) -> Result<Brought> {
        let Some(consumer) = &mut self.consumer else { return Err(disconnected()) };
        let lost = || EngineError::Unavailable("messages of the consumer are missing".to_owned());
        if let Some(status) = message.status.filter(|status| status.as_u16() != 200) {
            let headers = message.headers.as_ref();
            if status.as_u16() != 100 {
                let description = message.description.unwrap_or_default();
                return Err(EngineError::Unavailable(format!("the consumer ended: {status} {description}")));
            }
            // What was asked to be answered, so that more is sent.
            let stalled = header(headers, "Nats-Consumer-Stalled").map(ToOwned::to_owned);
            if let Some(reply) = message.reply.map(|reply| reply.to_string()).or(stalled) {
                let sent = self.link.wire.client.publish(reply, Bytes::new()).await;
                sent.map_err(|error| EngineError::Unavailable(error.to_string()))?;
                return Ok(Brought::Nothing);
            }
            let number = |name| header(headers, name).and_then(|number| number.parse::<u64>().ok());
            return match number("Nats-Last-Consumer") {
                Some(last) if last == consumer.number => Ok(Brought::Idle(number("Nats-Last-Stream"))),
                _ => Err(lost()),
            };
        }
        let place = message
            .reply
            .as_deref()
            .and_then(Delivered::read)
            .ok_or_else(|| EngineError::Unavailable("a message of the consumer has no place".to_owned()))?;
        if place.number != consumer.number.saturating_add(1) {
            return Err(lost());
        }
        consumer.number = place.number;
        self.link.seen.fetch_max(place.sequence, Relaxed);
        self.item(message, &place).map(Brought::Item)
    }

    /// What a message of the bucket changes.
    fn item(&self, message: Message, place: &Delivered) -> Result<Item> {
        let headers = message.headers.as_ref();
        let name = message.subject.strip_prefix(self.link.wire.prefix.as_str()).unwrap_or_default();
        if name == GENERATION && number_in(&message.payload) != generation_of(self.link.epoch) {
            return Err(EngineError::Unavailable("another node has begun an epoch".to_owned()));
        }
        let marker = marker(|name| header(headers, name));
        let key = decode(name);
        let is_held = message.payload.len() <= self.shared.options.value_len_max;
        let last = match marker {
            Some(_) => Last::Marker(place.sequence),
            None if key.is_some() && is_held => Last::Value(place.sequence),
            None => Last::Foreign,
        };
        if last == Last::Foreign && ![GENERATION, STEP].contains(&name) {
            let subject = &message.subject;
            self.shared
                .log
                .warn("foreign", format_args!("NATS: nkv cannot hold '{subject}': it is absent for readers"));
        }
        let until_ms = place.time_ms().saturating_add(self.age_ms(header(headers, "Nats-TTL")));
        lock(&self.shared.place).census.note(&message.subject, last, until_ms);
        let action = match marker {
            Some(reason) => Action::Delete { reason },
            None if is_held => {
                Action::Put { expiry: self.expiry(header(headers, WRITER)), value: message.payload.clone() }
            }
            // If an older value was shown, its key is gone.
            None => Action::Delete { reason: Reason::Deleted },
        };
        // A bucket without batches takes the headers from any client, and they mean nothing.
        let is_batch = self.link.settings.abilities.batches && header(headers, "Nats-Batch-Id").is_some();
        Ok(Item {
            sequence: place.sequence,
            time_ns: place.time_ns,
            change: key.map(|key| change(key, Revision::new(place.sequence), action)),
            is_part: is_batch && header(headers, "Nats-Batch-Commit").is_none(),
        })
    }

    /// How long a marker stays.
    fn age_ms(&self, ttl: Option<&str>) -> u64 {
        let age = u64::try_from(self.shared.options.marker_age.as_millis()).unwrap_or(u64::MAX);
        ttl.and_then(seconds).map_or(age, |seconds| seconds.saturating_mul(1_000))
    }

    /// When a value ends that this engine has put.
    fn expiry(&self, writer: Option<&str>) -> Option<nkv_core::Expiry> {
        let (writer, number) = writer?.split_once('-')?;
        let is_own = u64::from_str_radix(writer, 16) == Ok(self.shared.writer);
        is_own.then(|| lock(&self.shared.ends).take(number.parse().ok()?)).flatten()
    }
}

fn change(key: Key, revision: Revision, action: Action) -> Change {
    Change { key, revision, replaces: Revision::ZERO, action, meta: Meta::NONE }
}

fn disconnected() -> EngineError {
    EngineError::Unavailable("the connection to NATS is lost".to_owned())
}

async fn next_message(consumer: &mut Option<Consumer>) -> Option<Message> {
    match consumer {
        Some(consumer) => consumer.messages.next().await,
        None => None,
    }
}

/// The whole seconds of a duration as servers write it: `90`, `90s`, `1m30s`, `1h0m0s`.
fn seconds(text: &str) -> Option<u64> {
    let (mut total, mut rest) = (0_u64, text);
    while !rest.is_empty() {
        let (number, after) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len()));
        let unit = after.split_at_checked(1).map_or("s", |(unit, _)| unit);
        let seconds = match unit {
            "h" => 3_600,
            "m" => 60,
            "s" => 1,
            _ => return None,
        };
        total = total.saturating_add(number.parse::<u64>().ok()?.saturating_mul(seconds));
        rest = after.get(1..).unwrap_or_default();
    }
    Some(total)
}

/// What a future that there may be comes to.
async fn ready<F: Future + Unpin>(future: &mut Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => pending().await,
    }
}

/// Purges markers, each up to its own sequence: a value that was put behind it stays. Returns those that are gone.
async fn purged(link: &Link, old: Vec<u64>) -> Result<Vec<u64>> {
    #[derive(Deserialize)]
    struct Purged {}
    let wire = &link.wire;
    let mut gone = Vec::with_capacity(old.len());
    for sequence in old {
        if let Some(kept) = wire.at(sequence).await?.filter(|kept| kept.marker.is_some()) {
            let (verb, body) = match link.settings.purge {
                Purge::BySequence => ("STREAM.MSG.DELETE", json!({ "seq": sequence, "no_erase": true })),
                _ => ("STREAM.PURGE", json!({ "filter": kept.subject, "seq": sequence.saturating_add(1) })),
            };
            let done: std::result::Result<Purged, ApiError> = wire.api(&format!("{verb}.{}", wire.stream), &body).await;
            // It may be gone by now.
            if let Err(error) = done
                && wire.at(sequence).await?.is_some()
            {
                return Err(error.into());
            }
        }
        gone.push(sequence);
    }
    Ok(gone)
}

/// What the reply subject of a message says of its place.
struct Delivered {
    sequence: u64,
    number: u64,
    time_ns: i128,
}

impl Delivered {
    fn time_ms(&self) -> u64 {
        u64::try_from(self.time_ns / 1_000_000).unwrap_or_default()
    }

    fn read(reply: &str) -> Option<Self> {
        let tokens: Vec<&str> = reply.split('.').collect();
        // `$JS.ACK.STREAM.CONSUMER.…`, or with domain and account before the stream.
        let place = tokens.strip_prefix(&["$JS", "ACK"])?;
        let [_, sequence, number, time, ..] = (if place.len() > 7 { place.get(4..) } else { place.get(2..) })? else {
            return None;
        };
        Some(Delivered { sequence: sequence.parse().ok()?, number: number.parse().ok()?, time_ns: time.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_servers_write_them() {
        for (text, expected) in
            [("90", 90), ("90s", 90), ("1m30s", 90), ("1h0m0s", 3_600), ("30m0s", 1_800), ("1m", 60)]
        {
            assert_eq!(seconds(text), Some(expected), "{text}");
        }
        for text in ["never", "1.5s", "s", "1d"] {
            assert_eq!(seconds(text), None, "{text}");
        }
    }

    #[test]
    fn a_step_is_given_in_one_unless_it_does_not_end() {
        let item = |is_part, len: usize| {
            let put = Action::Put { value: vec![7; len].into(), expiry: None };
            let change = Some(change(Key::new("a").unwrap(), Revision::new(1), put));
            Item { sequence: 1, time_ns: 1, change, is_part }
        };
        let full = |is_part: fn(usize) -> bool, len| {
            let mut portion = Portion::default();
            (0..3_000).find(|number| {
                portion.push(item(is_part(*number), len));
                portion.is_full()
            })
        };
        assert_eq!(full(|_| false, 1), Some(CHANGES_AT_ONCE - 1));
        assert_eq!(full(|_| false, LEN_AT_ONCE / 10 + 1), Some(9));
        // Steps of 700: the second one ends behind the limit.
        assert_eq!(full(|number| number % 700 != 699, 1), Some(1_399));
        assert_eq!(full(|number| number != 99, LEN_AT_ONCE / 10 + 1), Some(99));
        assert_eq!(full(|_| true, 1), Some(CHANGES_AT_ONCE - 1), "it never ends");
    }

    #[test]
    fn the_place_of_a_message_is_read_in_both_forms() {
        let old = Delivered::read("$JS.ACK.KV_b.c.1.17.5.1700000000000000000.3").unwrap();
        assert_eq!((old.sequence, old.number, old.time_ms()), (17, 5, 1_700_000_000_000));
        let new = Delivered::read("$JS.ACK.d.h.KV_b.c.1.17.5.1700000000000000000.3.t").unwrap();
        assert_eq!((new.sequence, new.number, new.time_ms()), (17, 5, 1_700_000_000_000));
        assert!(Delivered::read("_INBOX.x").is_none() && Delivered::read("$JS.ACK.KV_b.c.1").is_none());
    }
}
