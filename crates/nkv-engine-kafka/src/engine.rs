//! The engine: follows the log of the topic, and writes to it.

use std::collections::{BTreeSet, HashMap};
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use kafka_protocol::records::Record;
use nkv_core::{Action, Change, Epoch, Key, Meta, Op, Pattern, PersistErrorKind, Reason, Revision};
use nkv_node::{Abilities, Decided, Engine, EngineError, Feed, RateLimitedLog, Seen};
use tokio::sync::{mpsc, watch};
use tokio::task::spawn_blocking;
use tokio::time::sleep;
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::options::Options;
use crate::reader::{Fetched, Reader, now};
use crate::records::NewRecord;
use crate::session::{Deletes, Session, revision};
use crate::topic::{Kind, Topic, clusters, find, settings};
use crate::wire::{AWAY, Connection};
use crate::writer::{Writer, end};

/// The record that begins a generation, behind which revisions are of another epoch. No key of a client begins like this.
const GENERATION: &str = "..nkv.generation";

/// How many changes are applied as one step, unless one batch has more.
const STEP: usize = 1_024;

/// How many writes wait for their turn.
const JOBS_MAX: usize = 1_024;

/// How often the settings of the topic are checked: they may be changed at any time.
const CHECKING: Duration = Duration::from_secs(5);

/// How often the state is read anew because the log contradicts what the node has.
const ROUNDS: usize = 4;

/// A topic of Kafka as the truth of one node. Clones stand for the same, so that a program can ask it for figures while the node
/// has it.
///
/// # Examples
///
/// ```no_run
/// use nkv_engine_kafka::{KafkaEngine, Options};
/// use nkv_node::Node;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let engine = KafkaEngine::new(Options::from_url("kafka://localhost:9092/lamps")?);
/// engine.check().await?; // says what is wrong with the topic; without it, the node starts and waits
/// let node = Node::builder().engine(engine).start().await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct KafkaEngine(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    options: Options,
    state: Mutex<State>,
    value_len_max: AtomicUsize,
    unreadable: AtomicU64,
    log: RateLimitedLog,
}

#[derive(Debug, Default)]
struct State {
    session: Option<Arc<Session>>,
    level: Option<Level>,
    cluster: Option<String>,
}

/// Up to where the node was level with the log, and when.
#[derive(Clone, Debug)]
struct Level {
    topic: Uuid,
    epoch: Epoch,
    /// The highest revision that was fed.
    revision: Revision,
    place: Place,
    /// All tombstones from here on were written later than this.
    at: Duration,
}

/// A place in the log.
#[derive(Clone, Debug, Default)]
struct Place {
    /// The first record that is there.
    start: i64,
    /// What is read next.
    next: i64,
    /// The last record before it, if there was one.
    last: Option<Mark>,
}

/// What a record is known by.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mark {
    offset: i64,
    timestamp: i64,
    key: Option<Bytes>,
    /// The length and the checksum of the value.
    value: Option<(usize, u32)>,
}

impl Mark {
    fn of(record: &Record) -> Self {
        let key = record.key.as_deref().map(Bytes::copy_from_slice);
        Mark { offset: record.offset, timestamp: record.timestamp, key, value: record.value.as_deref().map(summary) }
    }
}

/// The length and the checksum of a value.
fn summary(value: &[u8]) -> (usize, u32) {
    (value.len(), crc32c::crc32c(value))
}

/// The whole state that the log has.
struct Whole {
    records: HashMap<Key, (i64, Bytes)>,
    /// Behind the record that began the generation; 0 in the first.
    generation: i64,
    place: Place,
    began: Duration,
    /// It has another record where the node has one.
    is_other: bool,
}

/// What a node shows: of each revision the key, and the length and checksum of the value.
type Shown = HashMap<Revision, (Key, (usize, u32))>;

/// Whether the log is the one that was read before.
#[derive(Debug, PartialEq, Eq)]
enum Proof {
    Same,
    Other,
    /// It cannot be said.
    None,
}

/// What a record is to nkv.
enum Meaning {
    Put(Key, Bytes),
    Delete(Key),
    Generation,
    Nothing,
}

impl KafkaEngine {
    /// An engine on the topic of these options. Nothing is contacted yet.
    #[must_use]
    pub fn new(options: Options) -> Self {
        let value_len_max = AtomicUsize::new(options.value_len_max);
        KafkaEngine(Arc::new(Shared {
            options,
            state: Mutex::default(),
            value_len_max,
            unreadable: AtomicU64::new(0),
            log: RateLimitedLog::default(),
        }))
    }

    /// Looks whether the topic is there and keeps what nkv promises. Creates it if it is absent and
    /// [that is wanted](Options::with_create). Each new connection of a node does the same.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Refused`](crate::ErrorKind::Refused) names the setting that breaks a promise;
    /// [`ErrorKind::Unavailable`](crate::ErrorKind::Unavailable) where no broker answers.
    pub async fn check(&self) -> Result<()> {
        self.0.find().await.map(drop)
    }

    /// How many records were read that are no key and value of nkv, and passed over.
    #[must_use]
    pub fn unreadable(&self) -> u64 {
        self.0.unreadable.load(Ordering::Relaxed)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn find(&self) -> Result<(Topic, Connection)> {
        let known = self.lock().cluster.clone();
        let mut clusters = match &known {
            Some(known) => BTreeSet::from([known.clone()]),
            // Before anything is created.
            None => clusters(&self.options).await,
        };
        let check = |clusters: &BTreeSet<String>| match clusters.len() {
            0 | 1 => Ok(()),
            _ => {
                let all: Vec<&str> = clusters.iter().map(String::as_str).collect();
                Err(Error::refused(format!("the named brokers belong to different clusters: {}", all.join(", "))))
            }
        };
        check(&clusters)?;
        let (topic, connection) = find(&self.options, Kind::State).await?;
        clusters.insert(topic.cluster.clone());
        check(&clusters)?;
        self.lock().cluster = Some(topic.cluster.clone());
        let value_len_max = self.options.value_len_max.min(topic.settings.value_len_max());
        self.value_len_max.store(value_len_max, Ordering::Relaxed);
        Ok((topic, connection))
    }

    fn session(&self) -> Result<Arc<Session>, EngineError> {
        self.lock().session.clone().ok_or_else(|| EngineError::Unavailable("it is not followed".into()))
    }

    /// What a record is to nkv; what is nothing to it is counted.
    fn meaning(&self, record: &Record) -> Meaning {
        let text = record.key.as_deref().and_then(|key| str::from_utf8(key).ok());
        if text == Some(GENERATION) {
            return Meaning::Generation;
        }
        let Some(key) = text.and_then(|text| Key::new(text).ok()) else {
            self.note_unreadable(record.offset, "its key is no key of nkv");
            return Meaning::Nothing;
        };
        match &record.value {
            None => Meaning::Delete(key),
            Some(value) if value.len() > self.options.value_len_max => {
                self.note_unreadable(record.offset, "its value is too long");
                Meaning::Delete(key)
            }
            // Of its own: it would keep all that was read with it.
            Some(value) => Meaning::Put(key, Bytes::copy_from_slice(value)),
        }
    }

    fn note_unreadable(&self, offset: i64, why: &str) {
        self.unreadable.fetch_add(1, Ordering::Relaxed);
        let topic = &self.options.topic;
        self.log.warn("unreadable", format_args!("the record at offset {offset} of '{topic}' is passed over: {why}"));
    }

    async fn follow(&self, seen: Option<Seen>, feed: &Feed) -> Result<Infallible, EngineError> {
        let (topic, mut checker) = self.find().await?;
        let mut reader = Reader::open(&topic, &self.options).await?;
        let connection = Connection::open(&topic.leader, &self.options.security).await?;
        let mut writer = Writer::new(connection, &topic, &self.options.topic);
        let level = self.begin(&topic, &mut reader, &mut writer, seen, feed).await?;
        let (jobs, to_do) = mpsc::channel(JOBS_MAX);
        let (progress, seen) = watch::channel(level.place.next);
        let (epoch, settings, feed, deletes) = (level.epoch, topic.settings, feed.clone(), Deletes::default());
        let session = Arc::new(Session { epoch, settings, jobs, progress: seen, feed, deletes });
        let followed = Followed { shared: self, session };
        let error = tokio::select! {
            error = followed.feed(&mut reader, &topic, level, &progress) => error,
            error = writer.run(to_do) => error.into(),
            error = self.keep_checking(&mut checker, &topic) => error.into(),
        };
        Err(error)
    }

    /// Has the node be at some place of the log: where it was, if that can be proven to be enough; else at a state that is read
    /// anew.
    async fn begin(
        &self,
        topic: &Topic,
        reader: &mut Reader,
        writer: &mut Writer,
        seen: Option<Seen>,
        feed: &Feed,
    ) -> Result<Level, EngineError> {
        let known = self.lock().level.clone().filter(|known| known.topic == topic.id);
        let mut is_other = false;
        if let (Some(level), Some(seen)) = (known, seen)
            && level.epoch == seen.epoch
            && level.revision <= seen.revision
        {
            match prove(reader, &level).await? {
                Proof::Same if !is_over(level.at, topic) => {
                    reader.next = level.place.next;
                    return Ok(level);
                }
                proof => is_other = proof == Proof::Other,
            }
        }
        let shown = if seen.is_some() { shown(feed).await? } else { Shown::new() };
        for _ in 0..ROUNDS {
            let whole = self.read(topic, reader, &shown).await?;
            let (epoch, revision) = (epoch(topic.id, whole.generation), before(whole.place.next));
            let known = seen.filter(|seen| seen.epoch == epoch);
            if !known.is_some_and(|seen| is_other || whole.is_other || seen.revision > revision) {
                let level = Level { topic: topic.id, epoch, revision, place: whole.place.clone(), at: whole.began };
                match feed.replace(whole.into_changes(), revision, epoch).await {
                    Ok(_) => return Ok(level),
                    Err(EngineError::Feed(error)) if error.kind() == PersistErrorKind::Rejected && known.is_some() => {}
                    Err(error) => return Err(error),
                }
            }
            // The log is not the one that this node has seen, and has the same name: from here on it has another.
            self.log.warn("generation", format_args!("the topic went back or was changed: a new epoch begins"));
            let key = Bytes::from_static(GENERATION.as_bytes());
            let value = Some(Bytes::from(format!("after epoch {epoch}")));
            writer.write(&[NewRecord { key, value, header: None }]).await?;
            is_other = false;
        }
        Err(EngineError::Unavailable("the topic goes back again and again".into()))
    }

    /// Reads the whole log, and compares it with what the node shows.
    async fn read(&self, topic: &Topic, reader: &mut Reader, shown: &Shown) -> Result<Whole> {
        let began = now();
        let end = reader.end().await?;
        let start = reader.rewind().await?;
        let place = Place { start, next: start, last: None };
        let mut whole = Whole { records: HashMap::new(), generation: 0, place, began, is_other: false };
        while whole.place.next < end {
            let fetched = reader.fetch(true).await?;
            if fetched.is_out_of_range || fetched.start != start {
                return Err(Error::unavailable("the log was cut while it was read"));
            }
            if fetched.batches.is_empty() && fetched.stable < end {
                let open = fetched.stable;
                self.log.warn("open", format_args!("{} waits: {}", self.options.topic, open_transaction(open)));
            }
            for record in fetched.batches.iter().flat_map(|batch| &batch.records) {
                whole.is_other |= shown.get(&revision(record.offset)).is_some_and(|(key, value)| {
                    record.key.as_deref() != Some(key.as_str().as_bytes())
                        || record.value.as_deref().map(summary) != Some(*value)
                });
                match self.meaning(record) {
                    Meaning::Put(key, value) => drop(whole.records.insert(key, (record.offset, value))),
                    Meaning::Delete(key) => drop(whole.records.remove(&key)),
                    Meaning::Generation => whole.generation = record.offset.saturating_add(1),
                    Meaning::Nothing => {}
                }
            }
            whole.place.pass(&fetched, reader.next);
            if is_over(began, topic) {
                return Err(Error::unavailable(too_slow()));
            }
        }
        Ok(whole)
    }

    async fn keep_checking(&self, connection: &mut Connection, topic: &Topic) -> Error {
        loop {
            sleep(CHECKING).await;
            match settings(connection, &self.options.topic, Kind::State).await {
                Ok(settings) if settings == topic.settings => {}
                Ok(_) => return Error::unavailable("the settings of the topic were changed"),
                Err(error) => return error,
            }
        }
    }
}

impl Place {
    fn pass(&mut self, fetched: &Fetched, next: i64) {
        if let Some(record) = fetched.batches.iter().rev().find_map(|batch| batch.records.last()) {
            self.last = Some(Mark::of(record));
        }
        self.next = next;
    }
}

impl Whole {
    fn into_changes(self) -> Vec<Change> {
        self.records.into_iter().map(|(key, (offset, value))| put(key, value, offset)).collect()
    }
}

/// Changes that are applied together.
#[derive(Default)]
struct Step {
    changes: Vec<Change>,
    /// Whether the last of the changes to a key puts it, as far as they are covered.
    known: HashMap<Key, bool>,
    covered: usize,
}

impl Step {
    /// Whether the last of the changes to `key` puts it; `None` if there is none.
    fn puts(&mut self, key: &Key) -> Option<bool> {
        let new = self.changes.iter().skip(self.covered);
        self.known.extend(new.map(|change| (change.key.clone(), matches!(change.action, Action::Put { .. }))));
        self.covered = self.changes.len();
        self.known.get(key).copied()
    }
}

/// The time during which the engine is followed; writes are taken from when the node is level first.
struct Followed<'a> {
    shared: &'a Shared,
    session: Arc<Session>,
}

impl Followed<'_> {
    /// Feeds what comes, until that is not possible any more.
    async fn feed(
        &self,
        reader: &mut Reader,
        topic: &Topic,
        mut level: Level,
        progress: &watch::Sender<i64>,
    ) -> EngineError {
        match self.feed_on(reader, topic, &mut level, progress).await {
            Err(error) => error,
            Ok(why) => {
                // From here on it takes a whole state.
                self.shared.lock().level = None;
                EngineError::Unavailable(why.into())
            }
        }
    }

    async fn feed_on(
        &self,
        reader: &mut Reader,
        topic: &Topic,
        level: &mut Level,
        progress: &watch::Sender<i64>,
    ) -> Result<&'static str, EngineError> {
        let (mut is_reached, mut behind_since) = (false, None);
        loop {
            let fetched = reader.fetch(true).await?;
            if fetched.is_out_of_range || fetched.start != level.place.start {
                return Ok("the log was cut");
            }
            let mut step = Step::default();
            for batch in &fetched.batches {
                for record in &batch.records {
                    if !self.take(record, &mut step) {
                        return Ok("a new epoch begins");
                    }
                }
                if step.changes.len() >= STEP {
                    self.apply(&mut step, level).await?;
                }
            }
            self.apply(&mut step, level).await?;
            level.place.pass(&fetched, reader.next);
            if reader.next >= fetched.high {
                // Where the last records are no change, all nodes are behind them all the same.
                let revision = before(reader.next);
                if level.revision < revision {
                    self.session.feed.pass(revision).await?;
                    level.revision = revision;
                }
                (level.at, behind_since) = (fetched.asked_at, None);
                self.shared.lock().level = Some(level.clone());
            } else if fetched.batches.is_empty() {
                let since = *behind_since.get_or_insert(fetched.asked_at);
                let what = open_transaction(fetched.stable);
                if !is_reached {
                    self.shared.log.warn("open", format_args!("{} waits: {what}", self.shared.options.topic));
                } else if now().saturating_sub(since) > AWAY {
                    return Err(EngineError::Unavailable(what));
                }
            }
            progress.send_replace(reader.next);
            if !is_reached && reader.next >= fetched.high {
                is_reached = true;
                self.shared.lock().session = Some(Arc::clone(&self.session));
                self.session.feed.reached();
            }
            if is_over(level.at, topic) {
                return Ok("the node is too far behind the log: tombstones may be gone");
            }
        }
    }

    /// Adds what a record changes; `false` if a new generation begins.
    fn take(&self, record: &Record, step: &mut Step) -> bool {
        match self.shared.meaning(record) {
            Meaning::Put(key, value) => step.changes.push(put(key, value, record.offset)),
            Meaning::Delete(key) => {
                self.session.deletes.note(&key, record.offset, || {
                    step.puts(&key).unwrap_or_else(|| {
                        let mut is_shown = false;
                        self.session.feed.walk(&Pattern::Exact(key.clone()), |_| is_shown = true);
                        is_shown
                    })
                });
                step.changes.push(change(key, Action::Delete { reason: Reason::Deleted }, record.offset));
            }
            Meaning::Generation => return false,
            Meaning::Nothing => {}
        }
        true
    }

    async fn apply(&self, step: &mut Step, level: &mut Level) -> Result<(), EngineError> {
        let Step { changes, .. } = std::mem::take(step);
        let Some(last) = changes.last().map(|change| change.revision) else { return Ok(()) };
        self.session.feed.apply(changes).await?;
        level.revision = level.revision.max(last);
        Ok(())
    }
}

impl Drop for Followed<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.session = state.session.take().filter(|session| !Arc::ptr_eq(session, &self.session));
    }
}

#[async_trait]
impl Engine for KafkaEngine {
    fn abilities(&self) -> Abilities {
        let mut abilities = Abilities::default();
        (abilities.batches, abilities.wildcards) = (true, true);
        abilities
    }

    fn value_len_max(&self) -> usize {
        self.0.value_len_max.load(Ordering::Relaxed)
    }

    async fn write(&self, _epoch: Epoch, ops: Vec<Op>, together: bool) -> Result<Decided, EngineError> {
        let session = self.0.session()?;
        let results = match together {
            true => session.write_together(ops).await?.into_iter().map(Ok).collect(),
            false => session.write_apart(ops).await,
        };
        Ok(Decided { epoch: session.epoch, results })
    }

    async fn follow(&self, seen: Option<Seen>, feed: Feed) -> EngineError {
        match self.0.follow(seen, &feed).await {
            Err(error) => error,
        }
    }

    async fn last(&self) -> Result<Seen, EngineError> {
        let session = self.0.session()?;
        Ok(Seen { epoch: session.epoch, revision: before(end(&session.jobs).await?) })
    }
}

/// What the node shows. Values are only shared while its lock is held, and worked through on a thread that serves no client.
async fn shown(feed: &Feed) -> Result<Shown> {
    let feed = feed.clone();
    let shown = spawn_blocking(move || {
        let mut all = Vec::new();
        feed.walk(&Pattern::All, |record| all.push((record.revision, record.key.to_key(), record.value.to_bytes())));
        let summed = |(revision, key, value): (Revision, Key, Bytes)| (revision, (key, summary(&value)));
        all.into_iter().map(summed).collect()
    });
    shown.await.map_err(|error| Error::unavailable(format!("look at what the node shows: {error}")))
}

/// Whether the log is the one in which the node was level at a place.
async fn prove(reader: &mut Reader, level: &Level) -> Result<Proof> {
    if reader.end().await? < level.place.next {
        return Ok(Proof::Other);
    }
    if reader.rewind().await? != level.place.start {
        return Ok(Proof::None);
    }
    let Some(mark) = &level.place.last else {
        return Ok(if level.place.next == level.place.start { Proof::Same } else { Proof::None });
    };
    reader.next = mark.offset;
    let fetched = reader.fetch(false).await?;
    let first = fetched.batches.iter().flat_map(|batch| &batch.records).next();
    Ok(match first.map(Mark::of) {
        Some(first) if first == *mark => Proof::Same,
        Some(first) if first.offset == mark.offset => Proof::Other,
        _ => Proof::None,
    })
}

/// Whether tombstones that were written at that time may be gone by now. Half of the time that they are kept is for replicas
/// that were behind, and clocks that do not agree.
fn is_over(at: Duration, topic: &Topic) -> bool {
    now().saturating_sub(at) >= topic.settings.retention / 2
}

/// The same for all nodes that read the same log.
fn epoch(topic: Uuid, generation: i64) -> Epoch {
    Epoch::new(topic.as_u128().wrapping_add(u128::try_from(generation).unwrap_or(0)))
}

/// The revision of the last record before an offset.
fn before(offset: i64) -> Revision {
    Revision::new(u64::try_from(offset).unwrap_or(0))
}

fn put(key: Key, value: Bytes, offset: i64) -> Change {
    change(key, Action::Put { value, expiry: None }, offset)
}

fn change(key: Key, action: Action, offset: i64) -> Change {
    Change { key, revision: revision(offset), replaces: Revision::ZERO, action, meta: Meta::NONE }
}

fn open_transaction(offset: i64) -> String {
    format!("another producer's transaction is open from offset {offset} on")
}

fn too_slow() -> &'static str {
    "reading the log took longer than tombstones are kept (delete.retention.ms)"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_change_of_a_step_says_whether_a_key_is_put() {
        let (mut step, key) = (Step::default(), |name: &str| Key::new(name).unwrap());
        let gone = Action::Delete { reason: Reason::Deleted };
        step.changes.push(put(key("a"), Bytes::new(), 0));
        step.changes.push(change(key("b"), gone.clone(), 1));
        assert_eq!((step.puts(&key("a")), step.puts(&key("b")), step.puts(&key("c"))), (Some(true), Some(false), None));
        step.changes.push(change(key("a"), gone, 2));
        step.changes.push(put(key("b"), Bytes::new(), 3));
        assert_eq!((step.puts(&key("a")), step.puts(&key("b")), step.puts(&key("c"))), (Some(false), Some(true), None));
    }
}
