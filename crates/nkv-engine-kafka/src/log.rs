//! The log of the first kv-store beside the topic of the state: nkv's puts are written to it, and the sets of others are done.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use kafka_protocol::records::Record;
use nkv_core::{Action, Change, Key, Op, Outcome, PutOptions};
use nkv_node::{ChangesError, Handle, RateLimitedLog, Revision};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::{MissedTickBehavior, interval, sleep};
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::group::{BEAT, Member};
use crate::options::Options;
use crate::reader::Reader;
use crate::records::{HEADER, NewRecord};
use crate::topic::{Kind, Topic, find};
use crate::wire::Connection;
use crate::writer::Writer;

/// What stands between key and value.
const BETWEEN: &[u8] = b": ";

/// How long it waits before it tries again.
const PAUSE: Duration = Duration::from_secs(1);

/// At most this many sets, and about this many bytes, are done in one step.
const STEP: usize = 256;
const STEP_LEN: usize = 256 << 10;

/// What the position takes beside a set in one step, at most.
const POSITION_LEN: usize = 4_096;

/// The position is kept once this many records were read behind it, at the latest.
const KEEPING: i64 = 10_000;

/// A topic with the records of the first kv-store (`Client address=…`, and `KEY: VALUE`), beside the topic of the state.
///
/// One node at a time has it, by a consumer group: it writes what is put to nkv into it, by whatever node, and does the sets of
/// others that it reads there. A log that is new to nkv is read from its end. Else it goes on behind the last set that was done:
/// that position is kept in nkv as the key `kafka-log.TOPIC`, in one step with the sets. nkv's own records have the header
/// `nkv` and are passed over.
///
/// Deletes and TTLs have no form there: a deleted key stays what it was for those who read the log. Values that were put while
/// no node had the log are written later, the latest of each key at least.
///
/// # Examples
///
/// ```no_run
/// use nkv_engine_kafka::{KafkaEngine, KafkaLog, Options};
/// use nkv_node::Node;
///
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let options = Options::from_url("kafka://localhost:9092/lamps")?;
/// let log = KafkaLog::new(&options, "command-log")?;
/// let node = Node::builder().engine(KafkaEngine::new(options)).start().await?;
/// let nkv = node.handle();
/// tokio::spawn(async move { log.run(nkv).await });
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct KafkaLog {
    options: Options,
    group: String,
    position: Key,
    /// Deleted without being there: when that is seen, so is all before.
    barrier: Key,
    client: Bytes,
    passed_over: AtomicU64,
    log: RateLimitedLog,
}

/// Up to where the log was read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position {
    /// The identity of the log.
    log: Uuid,
    /// What is read next.
    offset: i64,
    /// How many sets of the log were done in the same step: they have the revisions behind it.
    sets: u64,
    /// Up to which revision puts were written to the log.
    written: Revision,
}

impl Position {
    fn parse(text: &[u8]) -> Option<Self> {
        let mut words = str::from_utf8(text).ok()?.splitn(4, ' ');
        let log = Uuid::try_parse(words.next()?).ok()?;
        let (offset, sets) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some(Position { log, offset, sets, written: parse_revision(words.next()?)? })
    }

    /// Puts up to this revision are in the log.
    fn note(&mut self, written: Option<Revision>) {
        let is_more =
            |written: &Revision| written.epoch() == self.written.epoch() && written.get() > self.written.get();
        self.written = written.filter(is_more).unwrap_or(self.written);
    }

    fn text(self) -> String {
        format!("{} {} {} {}", self.log, self.offset, self.sets, revision_text(self.written))
    }
}

fn revision_text(revision: Revision) -> String {
    format!("{} {}", revision.epoch().unwrap_or_default(), revision.get())
}

fn parse_revision(text: &str) -> Option<Revision> {
    let (epoch, number) = text.split_once(' ')?;
    Some(Revision::in_epoch(epoch.parse().ok()?, number.parse().ok()?))
}

/// What one answer of the broker had.
struct Read {
    /// With their offsets.
    sets: Vec<(i64, Key, Bytes)>,
    /// Where something else is.
    refused: Vec<i64>,
    written: Option<Revision>,
    next: i64,
    /// Behind it is nothing more for now.
    is_level: bool,
}

impl KafkaLog {
    /// The log `topic`, at the brokers of the engine's options and with their security.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Refused`](crate::ErrorKind::Refused) for a topic that cannot be, and for the topic of the state.
    pub fn new(engine: &Options, topic: &str) -> Result<Self> {
        let options = engine.for_log(topic)?;
        // A topic may have dots where a key has none.
        let name = topic.replace('.', "/");
        let key =
            |text: String| Key::new(&text).map_err(|error| Error::refused(format!("the topic '{topic}': {error}")));
        Ok(KafkaLog {
            group: format!("nkv.{}.{topic}", engine.topic()),
            position: key(format!("kafka-log.{name}"))?,
            barrier: key(format!("kafka-log.{name}.barrier"))?,
            options,
            client: Bytes::from_static(b"Client address=0.0.0.0:0"),
            passed_over: AtomicU64::new(0),
            log: RateLimitedLog::default(),
        })
    }

    /// Looks whether the topic is there, and creates it if it is absent and that is wanted.
    ///
    /// # Errors
    ///
    /// Those of [`KafkaEngine::check`](crate::KafkaEngine::check); several partitions are refused.
    pub async fn check(&self) -> Result<()> {
        find(&self.options, Kind::Log).await.map(drop)
    }

    /// How many records of the log were no set that nkv can do, and passed over.
    #[must_use]
    pub fn passed_over(&self) -> u64 {
        self.passed_over.load(Ordering::Relaxed)
    }

    /// Takes part, until the node stops. What fails is logged and begun again.
    ///
    /// # Cancel safety
    ///
    /// It may be dropped at any time; another node has the log some 10 s later.
    pub async fn run(&self, nkv: Handle) {
        loop {
            if let Err(error) = self.take_part(&nkv).await {
                let topic = &self.options.topic;
                self.log.warn("kafka-log", format_args!("the log '{topic}' is not followed: {error}"));
            }
            tokio::select! {
                () = nkv.stopping() => return,
                () = sleep(PAUSE) => {}
            }
        }
    }

    async fn take_part(&self, nkv: &Handle) -> Result<()> {
        let mut member = tokio::select! {
            () = nkv.stopping() => return Ok(()),
            member = Member::join(&self.options, &self.group) => member?,
        };
        let ended = tokio::select! {
            () = nkv.stopping() => Ok(()),
            ended = self.stay(nkv, &mut member) => ended,
        };
        member.leave().await;
        ended
    }

    async fn stay(&self, nkv: &Handle, member: &mut Member) -> Result<()> {
        loop {
            if member.has_log {
                self.have_log(nkv, member).await?;
            } else {
                sleep(BEAT).await;
                if member.beat().await? {
                    continue;
                }
            }
            member.enter(&self.options.topic).await?;
        }
    }

    /// Reads and writes, until another may have the log.
    async fn have_log(&self, nkv: &Handle, member: &mut Member) -> Result<()> {
        // What the one before has done is seen once this is.
        nkv.delete(&self.barrier).await.map_err(refused)?;
        let (topic, _) = find(&self.options, Kind::Log).await?;
        let mut reader = Reader::open(&topic, &self.options).await?;
        let connection = Connection::open(&topic.leader, &self.options.security).await?;
        let mut writer = Writer::new(connection, &topic, &self.options.topic);
        let mut position = self.position(nkv, &topic, &mut reader).await?;
        let begin = reader.next;
        // The last records of the log say what was written to it.
        loop {
            let read = self.read(&mut reader, nkv).await?;
            position.note(read.written);
            if read.is_level {
                break;
            }
            if !member.beat().await? {
                return Ok(());
            }
        }
        reader.next = begin;
        let mut changes = match nkv.changes(Some(position.written)) {
            Ok(changes) => changes,
            Err(ChangesError::Gap(_)) => {
                let changes = nkv.changes(None).map_err(|error| Error::unavailable(error.to_string()))?;
                if !self.write_latest(nkv, member, &mut writer, &topic, &mut position).await? {
                    return Ok(());
                }
                changes
            }
            Err(error) => return Err(Error::unavailable(error.to_string())),
        };
        let (found, mut to_do) = mpsc::channel(1);
        let reading = async {
            loop {
                let read = self.read(&mut reader, nkv).await?;
                read.refused.iter().for_each(|offset| self.pass_over(*offset));
                if found.send(read).await.is_err() {
                    return Err(Error::unavailable("nothing reads the log any more"));
                }
            }
        };
        let working = async {
            let (mut beats, mut passed_until, mut done_until) = (interval(BEAT), 0, 0);
            let (mut sets, mut next) = (VecDeque::new(), begin);
            beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                if Some(nkv.epoch()) != position.written.epoch() {
                    return Err(Error::unavailable("the data are of another epoch"));
                }
                // Only when all before is in the log: what is behind the position's last step is not of the log then.
                if position.written.get() >= done_until && (!sets.is_empty() || next - position.offset >= KEEPING) {
                    done_until = self.step(nkv, member, &mut position, &mut sets, next).await?;
                }
                tokio::select! {
                    _ = beats.tick() => if !member.beat().await? {
                        return Ok(());
                    },
                    Some(read) = to_do.recv(), if sets.is_empty() => {
                        let Read { sets: new, next: behind, .. } = read;
                        (sets, next) = (new.into(), behind);
                    }
                    group = changes.next() => {
                        let gap = |_| Error::unavailable("more was put than is written to the log");
                        let Some(group) = group.map_err(gap)? else { return Ok(()) };
                        let records = self.records(&group.changes, nkv.epoch(), &mut passed_until);
                        if !self.write(member, &mut writer, &topic, records.into_iter().map(Ok)).await? {
                            return Ok(());
                        }
                        let last = group.changes.last().map_or(0, |change| change.revision.get());
                        position.note(Some(Revision::in_epoch(nkv.epoch(), last)));
                    }
                }
            }
        };
        tokio::select! {
            ended = reading => ended,
            ended = working => ended,
        }
    }

    /// Where to go on; at the end of a log that is new, or not the one that was read.
    async fn position(&self, nkv: &Handle, topic: &Topic, reader: &mut Reader) -> Result<Position> {
        let end = reader.end().await?;
        let start = reader.rewind().await?;
        let kept = nkv.get(&self.position).await.map_err(refused)?.and_then(|entry| Position::parse(&entry.value));
        if let Some(kept) = kept.filter(|kept| kept.log == topic.id && kept.offset <= end) {
            reader.next = kept.offset.max(start);
            let is_of_epoch = kept.written.epoch() == Some(nkv.epoch());
            return Ok(if is_of_epoch { kept } else { Position { written: nkv.revision(), ..kept } });
        }
        reader.next = end;
        let new = Position { log: topic.id, offset: end, sets: 0, written: nkv.revision() };
        nkv.put(&self.position, new.text()).await.map_err(refused)?;
        Ok(new)
    }

    async fn read(&self, reader: &mut Reader, nkv: &Handle) -> Result<Read> {
        let fetched = reader.fetch(true).await?;
        if fetched.is_out_of_range {
            return Err(Error::unavailable("the log was cut"));
        }
        let (next, is_level) = (reader.next, reader.next >= fetched.high);
        let mut read = Read { sets: Vec::new(), refused: Vec::new(), written: None, next, is_level };
        let value_len_max = nkv.limits().value_len_max.saturating_sub(POSITION_LEN);
        for record in fetched.batches.iter().flat_map(|batch| &batch.records) {
            let own = record.headers.iter().find(|(name, _)| name.as_str() == HEADER);
            if let Some((_, said)) = own {
                let said = said.as_deref().and_then(|said| str::from_utf8(said).ok()).and_then(parse_revision);
                read.written = said.or(read.written);
            } else if let Some((key, value)) = set(record, value_len_max) {
                read.sets.push((record.offset, key, value));
            } else {
                read.refused.push(record.offset);
            }
        }
        Ok(read)
    }

    fn pass_over(&self, offset: i64) {
        self.passed_over.fetch_add(1, Ordering::Relaxed);
        let topic = &self.options.topic;
        self.log.warn("kafka-log passes over", format_args!("{topic}: the record at offset {offset} is no set of nkv"));
    }

    /// Does some of the sets that were read, and keeps how far that was, in one step. Returns the revision of the last one.
    async fn step(
        &self,
        nkv: &Handle,
        member: &Member,
        position: &mut Position,
        sets: &mut VecDeque<(i64, Key, Bytes)>,
        next: i64,
    ) -> Result<u64> {
        let mut len = 0;
        let count = sets.iter().take(STEP).take_while(|(_, key, value)| {
            let fits = len == 0 || len + key.as_str().len() + value.len() <= STEP_LEN;
            len += key.as_str().len() + value.len();
            fits
        });
        let step: Vec<_> = sets.drain(..count.count()).collect();
        let offset = sets.front().map_or(next, |(offset, ..)| *offset);
        let kept = Position { offset, sets: step.len() as u64, ..*position };
        let put = |key: &Key, value: Bytes| Op::Put { key: key.clone(), value, options: PutOptions::default() };
        let mut ops = vec![put(&self.position, kept.text().into())];
        ops.extend(step.into_iter().map(|(_, key, value)| put(&key, value)));
        if !member.is_sure() {
            return Err(Error::unavailable("another may have the log by now"));
        }
        let outcomes = nkv.write(ops).await.map_err(refused)?;
        *position = kept;
        match outcomes.last() {
            Some(Outcome::Put { revision }) => Ok(revision.get()),
            other => Err(Error::unavailable(format!("a set was not done: {other:?}"))),
        }
    }

    /// The records of changes, but for those that came from the log.
    fn records(&self, changes: &[Change], epoch: nkv_core::Epoch, passed_until: &mut u64) -> Vec<NewRecord> {
        let mut records = Vec::new();
        for change in changes {
            let Action::Put { value, .. } = &change.action else { continue };
            let revision = change.revision.get();
            if change.key == self.position {
                let sets = Position::parse(value).map_or(0, |position| position.sets);
                *passed_until = revision.saturating_add(sets);
            } else if revision > *passed_until {
                records.push(self.record(&change.key, value, Revision::in_epoch(epoch, revision)));
            }
        }
        records
    }

    fn record(&self, key: &Key, value: &[u8], revision: Revision) -> NewRecord {
        let mut text = BytesMut::with_capacity(key.as_str().len() + BETWEEN.len() + value.len());
        [key.as_str().as_bytes(), BETWEEN, value].into_iter().for_each(|part| text.extend_from_slice(part));
        let header = Some(Bytes::from(revision_text(revision)));
        NewRecord { key: self.client.clone(), value: Some(text.freeze()), header }
    }

    /// Writes records in their order, in batches, for as long as no other node can have the log; `false` if the group has to be
    /// entered again. Each record is made when it is its turn.
    async fn write(
        &self,
        member: &mut Member,
        writer: &mut Writer,
        topic: &Topic,
        mut records: impl Iterator<Item = Result<NewRecord>> + Send,
    ) -> Result<bool> {
        let (room, mut held) = (topic.settings.room(), None);
        loop {
            let (mut batch, mut len) = (Vec::new(), 0);
            while let Some(record) = held.take().map(Ok).or_else(|| records.next()).transpose()? {
                let own = record.len_max();
                if own > room {
                    let what = "a value that was put is not written: it is longer than max.message.bytes";
                    self.log.warn("kafka-log is too short", format_args!("{}: {what}", self.options.topic));
                } else if len + own > room {
                    held = Some(record);
                    break;
                } else {
                    len += own;
                    batch.push(record);
                }
            }
            if batch.is_empty() {
                return Ok(true);
            }
            // Many batches take longer than the group waits for a word.
            if !member.secure().await? {
                return Ok(false);
            }
            writer.write(&batch).await.map_err(|error| Error::unavailable(error.to_string()))?;
        }
    }

    /// Writes the latest of what was put since, where the changes are not there any more; but for what came from the log with
    /// the position. `false` as of [`write`](Self::write).
    async fn write_latest(
        &self,
        nkv: &Handle,
        member: &mut Member,
        writer: &mut Writer,
        topic: &Topic,
        position: &mut Position,
    ) -> Result<bool> {
        let (now, written) = (nkv.revision(), position.written.get());
        let mut listed = nkv.list("*").await.map_err(refused)?;
        let at = listed.iter().find(|(key, _)| *key == self.position).map_or(0, |(_, revision)| revision.get());
        let of_log = at..=at.saturating_add(position.sets);
        let sorted = spawn_blocking(move || {
            listed.retain(|(_, revision)| revision.get() > written && !of_log.contains(&revision.get()));
            listed.sort_unstable_by_key(|(_, revision)| revision.get());
            listed
        });
        let sorted = sorted.await.map_err(|error| Error::unavailable(error.to_string()))?;
        let latest = |(key, revision): (Key, Revision)| {
            match nkv.look_up(key.as_str(), |record| (record.revision.get(), record.value.to_bytes())) {
                Ok(Some((now, value))) if now == revision.get() => Some(Ok(self.record(&key, &value, revision))),
                // It was put again or deleted since it was listed: that is among the changes.
                Ok(_) => None,
                Err(error) => Some(Err(refused(error))),
            }
        };
        if !self.write(member, writer, topic, sorted.into_iter().filter_map(latest)).await? {
            return Ok(false);
        }
        position.note(Some(now));
        Ok(true)
    }
}

/// What a record of the first kv-store sets.
fn set(record: &Record, value_len_max: usize) -> Option<(Key, Bytes)> {
    let text = record.value.as_ref()?;
    let at = text.windows(BETWEEN.len()).position(|part| part == BETWEEN)?;
    let key = Key::new(str::from_utf8(text.get(..at)?).ok()?).ok()?;
    let value = text.get(at.saturating_add(BETWEEN.len())..)?;
    (value.len() <= value_len_max).then(|| (key, Bytes::copy_from_slice(value)))
}

/// What the node did not do.
fn refused(error: nkv_node::Error) -> Error {
    Error::unavailable(format!("the node: {error}"))
}

#[cfg(test)]
mod tests {
    use nkv_core::Epoch;

    use super::*;

    #[test]
    fn a_position_is_what_was_kept_and_nothing_else_is_one() {
        let written = Revision::in_epoch(Epoch::new(7), 42);
        let position = Position { log: Uuid::from_u128(1 << 100), offset: 5, sets: 3, written };
        assert_eq!(Position::parse(position.text().as_bytes()), Some(position));
        for text in ["", "1 2 3 4 5", "x", &position.text()[1..], &position.text()[..position.text().len() - 3]] {
            assert_eq!(Position::parse(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn a_set_is_a_key_and_what_stands_behind_the_first_colon_and_space() {
        let set = |text: Option<&str>| {
            let batch = crate::records::encode(
                &[NewRecord { key: Bytes::new(), value: text.map(|text| text.to_owned().into()), header: None }],
                1,
            );
            let batches = crate::records::batches(batch.unwrap(), &[], 0).unwrap();
            super::set(&batches[0].records[0], 10).map(|(key, value)| (key.to_string(), value))
        };
        assert_eq!(set(Some("a.b: c: d")), Some(("a.b".into(), "c: d".into())));
        assert_eq!(set(Some("a: ")), Some(("a".into(), "".into())));
        for none in [None, Some(""), Some("a:b"), Some(": b"), Some("a b: c"), Some("..a: b"), Some("a: 12345678901")] {
            assert_eq!(set(none), None, "{none:?}");
        }
    }
}
