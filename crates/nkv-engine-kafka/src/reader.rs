//! Reads the log of the topic, from a place on.

use std::time::Duration;

use kafka_protocol::ResponseError;
use kafka_protocol::messages::fetch_request::{FetchPartition, FetchTopic};
use kafka_protocol::messages::list_offsets_request::{ListOffsetsPartition, ListOffsetsTopic};
use kafka_protocol::messages::{FetchRequest, ListOffsetsRequest, ListOffsetsResponse, TopicName};
use kafka_protocol::protocol::StrBytes;
use nkv_node::{SinceBoot, Time};

use crate::error::{Error, Result};
use crate::options::Options;
use crate::records::{Batch, batches};
use crate::topic::Topic;
use crate::wire::{Connection, check};

/// Which offset is asked for.
const EARLIEST: i64 = -2;
const LATEST: i64 = -1;

/// Values of open transactions are not read, and those of aborted ones are named.
const READ_COMMITTED: i8 = 1;
const READ_UNCOMMITTED: i8 = 0;

/// How long a broker holds back an answer while there is nothing new: a quarter of the silence that is taken for death.
const QUIET: Duration = Duration::from_millis(500);

/// How much an answer has: one batch may be longer.
const FETCH_LEN: i32 = 4 << 20;

/// A place in the log, and the connection to the broker that has it.
#[derive(Debug)]
pub(crate) struct Reader {
    connection: Connection,
    topic: Topic,
    name: String,
    /// What is read next.
    pub(crate) next: i64,
}

/// What came of one request.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub(crate) batches: Vec<Batch>,
    /// Behind the last record that all replicas have.
    pub(crate) high: i64,
    /// Behind the last record that is in no open transaction.
    pub(crate) stable: i64,
    /// The first record that is there.
    pub(crate) start: i64,
    /// When it was asked for.
    pub(crate) asked_at: Duration,
    /// There is no such place.
    pub(crate) is_out_of_range: bool,
}

impl Reader {
    pub(crate) async fn open(topic: &Topic, options: &Options) -> Result<Self> {
        let connection = Connection::open(&topic.leader, &options.security).await?;
        Ok(Reader { connection, topic: topic.clone(), name: options.topic.clone(), next: 0 })
    }

    /// Goes to the first record, and gives its offset.
    pub(crate) async fn rewind(&mut self) -> Result<i64> {
        self.next = self.offset(EARLIEST).await?;
        Ok(self.next)
    }

    /// Behind the last record.
    pub(crate) async fn end(&mut self) -> Result<i64> {
        self.offset(LATEST).await
    }

    async fn offset(&mut self, which: i64) -> Result<i64> {
        let answer = self.connection.call(&offset_request(&self.topic, &self.name, which)).await?;
        offset(&answer)
    }

    /// The records from `next` on, once there are some or it has been quiet for a while; `next` is behind them then.
    pub(crate) async fn fetch(&mut self, waits: bool) -> Result<Fetched> {
        let asked_at = now();
        let partition = FetchPartition::default()
            .with_current_leader_epoch(self.topic.leader_epoch)
            .with_fetch_offset(self.next)
            .with_partition_max_bytes(FETCH_LEN);
        let topic = FetchTopic::default().with_topic_id(self.topic.id).with_partitions(vec![partition]);
        let quiet = if waits { i32::try_from(QUIET.as_millis()).unwrap_or(0) } else { 0 };
        let request = FetchRequest::default()
            .with_max_wait_ms(quiet)
            .with_min_bytes(1)
            .with_max_bytes(FETCH_LEN)
            .with_isolation_level(READ_COMMITTED)
            // Of no session: each request says all.
            .with_session_epoch(-1)
            .with_topics(vec![topic]);
        let answer = self.connection.call(&request).await?;
        check(answer.error_code, "read the log")?;
        let partition = answer.responses.into_iter().next().and_then(|topic| topic.partitions.into_iter().next());
        let partition = partition.ok_or_else(|| Error::unavailable("the broker says nothing of the log"))?;
        let is_out_of_range =
            ResponseError::try_from_code(partition.error_code) == Some(ResponseError::OffsetOutOfRange);
        if !is_out_of_range {
            check(partition.error_code, "read the log")?;
        }
        let records = partition.records.unwrap_or_default();
        let had_some = !records.is_empty();
        let batches = batches(records, &partition.aborted_transactions.unwrap_or_default(), self.next)?;
        match batches.last() {
            Some(last) => self.next = last.next.max(self.next),
            None if had_some => return Err(Error::unavailable("the broker sent less than one batch")),
            None => {}
        }
        let (high, stable, start) =
            (partition.high_watermark, partition.last_stable_offset, partition.log_start_offset);
        Ok(Fetched { batches, high, stable, start, asked_at, is_out_of_range })
    }
}

/// Asks for the offset behind the last record.
pub(crate) fn end_request(topic: &Topic, name: &str) -> ListOffsetsRequest {
    offset_request(topic, name, LATEST)
}

fn offset_request(topic: &Topic, name: &str, which: i64) -> ListOffsetsRequest {
    let partition = ListOffsetsPartition::default().with_timestamp(which).with_current_leader_epoch(topic.leader_epoch);
    let of_topic = ListOffsetsTopic::default()
        .with_name(TopicName(StrBytes::from_string(name.to_owned())))
        .with_partitions(vec![partition]);
    ListOffsetsRequest::default()
        .with_replica_id((-1).into())
        .with_isolation_level(READ_UNCOMMITTED)
        .with_topics(vec![of_topic])
}

/// The offset of an answer.
pub(crate) fn offset(answer: &ListOffsetsResponse) -> Result<i64> {
    let partition = answer.topics.first().and_then(|topic| topic.partitions.first());
    let partition = partition.ok_or_else(|| Error::unavailable("the broker says nothing of the log"))?;
    check(partition.error_code, "ask for the end of the log")?;
    Ok(partition.offset)
}

/// A time that goes on while the machine is suspended.
pub(crate) fn now() -> Duration {
    SinceBoot.elapsed()
}
