//! Writes records: what waits goes out as one batch, a few batches are under way at once, and nothing is sent twice.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use kafka_protocol::ResponseError;
use kafka_protocol::messages::produce_request::{PartitionProduceData, TopicProduceData};
use kafka_protocol::messages::produce_response::PartitionProduceResponse;
use kafka_protocol::messages::{ListOffsetsRequest, ProduceRequest, ProduceResponse, TopicName};
use kafka_protocol::protocol::{Request, StrBytes};
use nkv_node::EngineError;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::error::{Error, Result};
use crate::reader::{end_request, offset};
use crate::records::{BATCH_OVERHEAD, NewRecord, encode};
use crate::topic::Topic;
use crate::wire::{AWAY, Connection};

/// How many batches are under way at once: what comes meanwhile is the next batch, so that a crowd of writers shares few.
const FLIGHTS_MAX: usize = 2;

/// How long the broker waits for its replicas: less than the silence that is taken for death.
const REPLICAS: Duration = Duration::from_millis(1_500);

/// A connection that nothing was sent on for this long is used, so that the broker does not close it.
const IDLE: Duration = Duration::from_secs(60);

/// From which version on a write names the topic by its identity, so that none goes to one that was created anew.
const BY_ID: i16 = 13;

/// What becomes of a job between its caller and the writer.
const WAITS: u8 = 0;
const SENT: u8 = 1;
const GIVEN_UP: u8 = 2;

/// Something to be done at the broker that leads the topic.
#[derive(Debug)]
pub(crate) enum Job {
    /// Records that are written together.
    Write(Records),
    /// Where the log ends.
    End(oneshot::Sender<Result<i64>>),
}

/// Records that wait to be written, and who waits for it.
#[derive(Debug)]
pub(crate) struct Records {
    records: Vec<NewRecord>,
    len: usize,
    stage: Arc<AtomicU8>,
    answer: oneshot::Sender<Result<i64, EngineError>>,
}

impl Records {
    /// Takes them for the batch that is about to be sent, unless its caller has given up.
    fn begin(&self) -> bool {
        !self.answer.is_closed()
            && self.stage.compare_exchange(WAITS, SENT, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

/// A write that was handed over.
#[derive(Debug)]
pub(crate) struct Handed {
    stage: Arc<AtomicU8>,
    answer: oneshot::Receiver<Result<i64, EngineError>>,
    deadline: Instant,
    /// Where the log was when it was handed over, at least.
    floor: i64,
}

impl Handed {
    /// The offset of its first record, once all replicas have it. What was not sent until then never is.
    pub(crate) async fn done(self) -> Result<i64, EngineError> {
        let answer = timeout_at(self.deadline, self.answer).await;
        if let Ok(Ok(answer)) = answer {
            return match answer {
                Ok(offset) if offset < self.floor => {
                    Err(EngineError::OutcomeUnknown("the topic is another one by now".into()))
                }
                answer => answer,
            };
        }
        match self.stage.compare_exchange(WAITS, GIVEN_UP, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Err(EngineError::Unavailable("it did not take the write in time; it was not sent".into())),
            Err(_) => Err(EngineError::OutcomeUnknown("no answer came to what was sent".into())),
        }
    }
}

/// Hands records over to be written together, to a log that ends at `floor` or behind it.
pub(crate) async fn hand_over(
    jobs: &mpsc::Sender<Job>,
    records: Vec<NewRecord>,
    floor: i64,
) -> Result<Handed, EngineError> {
    let (deadline, stage) = (Instant::now() + AWAY, Arc::new(AtomicU8::new(WAITS)));
    let (answer, answered) = oneshot::channel();
    let len = records.iter().map(NewRecord::len_max).sum();
    let job = Job::Write(Records { records, len, stage: Arc::clone(&stage), answer });
    let unavailable = |why: &str| EngineError::Unavailable(why.into());
    match timeout_at(deadline, jobs.send(job)).await {
        Ok(Ok(())) => Ok(Handed { stage, answer: answered, deadline, floor }),
        Ok(Err(_)) => Err(unavailable("it was lost; the write was not sent")),
        Err(_) => Err(unavailable("too many writes wait for it; this one was not sent")),
    }
}

/// Where the log ends, as its leader says now.
pub(crate) async fn end(jobs: &mpsc::Sender<Job>) -> Result<i64> {
    let deadline = Instant::now() + AWAY;
    let (answer, answered) = oneshot::channel();
    let asked = timeout_at(deadline, async {
        jobs.send(Job::End(answer)).await.ok()?;
        answered.await.ok()
    });
    asked.await.ok().flatten().unwrap_or_else(|| Err(Error::unavailable("it does not say where the log ends")))
}

/// What is under way.
enum Flight {
    Write(Vec<(usize, oneshot::Sender<Result<i64, EngineError>>)>),
    End(Option<oneshot::Sender<Result<i64>>>),
}

/// Writes to one topic over one connection.
pub(crate) struct Writer {
    connection: Connection,
    topic: Topic,
    name: String,
    flights: VecDeque<(i32, Flight)>,
}

impl Writer {
    pub(crate) fn new(connection: Connection, topic: &Topic, name: &str) -> Self {
        Writer { connection, topic: topic.clone(), name: name.to_owned(), flights: VecDeque::new() }
    }

    /// Writes one batch alone, and gives its offset.
    pub(crate) async fn write(&mut self, records: &[NewRecord]) -> Result<i64, EngineError> {
        let request = self.request(encode(records, timestamp())?)?;
        let answer = self.connection.call(&request).await?;
        decided(partition(answer))
    }

    /// Does what comes, until the connection fails.
    pub(crate) async fn run(&mut self, mut jobs: mpsc::Receiver<Job>) -> Error {
        match self.serve(&mut jobs).await {
            Ok(()) => Error::unavailable("nothing writes any more"),
            Err(error) => error,
        }
    }

    async fn serve(&mut self, jobs: &mut mpsc::Receiver<Job>) -> Result<()> {
        let mut held = None;
        let mut idle_at = Instant::now() + IDLE;
        loop {
            let (is_owed, may_send) = (!self.flights.is_empty(), self.flights.len() < FLIGHTS_MAX);
            tokio::select! {
                frame = self.connection.receive(is_owed) => self.land(frame?)?,
                job = next(&mut held, jobs), if may_send => {
                    let Some(job) = job else { return Ok(()) };
                    held = self.launch(job, jobs).await?;
                    idle_at = Instant::now() + IDLE;
                }
                () = sleep_until(idle_at), if may_send => {
                    self.ask_end(None).await?;
                    idle_at = Instant::now() + IDLE;
                }
            }
        }
    }

    /// Sends a job, with all that waits and fits into its batch; gives back what comes behind.
    async fn launch(&mut self, job: Job, jobs: &mut mpsc::Receiver<Job>) -> Result<Option<Job>> {
        let first = match job {
            Job::Write(records) => records,
            Job::End(answer) => {
                self.ask_end(Some(answer)).await?;
                return Ok(None);
            }
        };
        let (mut batch, mut answers, mut len, mut held) = (Vec::new(), Vec::new(), BATCH_OVERHEAD, None);
        let mut waiting = Some(Job::Write(first));
        while let Some(job) = waiting.take() {
            match job {
                Job::Write(records) if batch.is_empty() || len + records.len <= self.topic.settings.batch_len_max => {
                    if records.begin() {
                        len += records.len;
                        answers.push((records.records.len(), records.answer));
                        batch.extend(records.records);
                    }
                    waiting = jobs.try_recv().ok();
                }
                other => held = Some(other),
            }
        }
        if !batch.is_empty() {
            let request = self.request(encode(&batch, timestamp())?)?;
            let id = self.connection.send(&request).await?;
            self.flights.push_back((id, Flight::Write(answers)));
        }
        Ok(held)
    }

    async fn ask_end(&mut self, answer: Option<oneshot::Sender<Result<i64>>>) -> Result<()> {
        let id = self.connection.send(&end_request(&self.topic, &self.name)).await?;
        self.flights.push_back((id, Flight::End(answer)));
        Ok(())
    }

    /// Gives an answer to those that wait for it. Answers come in the order of requests.
    fn land(&mut self, frame: Bytes) -> Result<()> {
        let Some((id, flight)) = self.flights.pop_front() else {
            return Err(Error::unavailable(format!("{}: an answer to nothing", self.connection.address())));
        };
        match flight {
            Flight::End(answer) => {
                let version = self.connection.version(ListOffsetsRequest::KEY)?;
                let end = offset(&self.connection.answer::<ListOffsetsRequest>(frame, id, version)?);
                answer.into_iter().for_each(|answer| drop(answer.send(end.clone())));
                end.map(drop)
            }
            Flight::Write(answers) => {
                let version = self.connection.version(ProduceRequest::KEY)?;
                let said = self.connection.answer::<ProduceRequest>(frame, id, version)?;
                let partition = partition(said);
                let code = partition.as_ref().map_or(0, |partition| partition.error_code);
                let decided = decided(partition);
                let mut offset = 0;
                for (count, answer) in answers {
                    drop(answer.send(decided.clone().map(|first| first.saturating_add(offset))));
                    offset = offset.saturating_add(i64::try_from(count).unwrap_or(i64::MAX));
                }
                match ResponseError::try_from_code(code) {
                    Some(error) if is_elsewhere(&error) => {
                        Err(Error::unavailable(format!("the topic is led elsewhere by now: {error:?}")))
                    }
                    _ => Ok(()),
                }
            }
        }
    }

    fn request(&self, records: Bytes) -> Result<ProduceRequest> {
        let partition = PartitionProduceData::default().with_records(Some(records));
        let topic = TopicProduceData::default().with_partition_data(vec![partition]);
        let topic = match self.connection.version(ProduceRequest::KEY)? {
            BY_ID.. => topic.with_topic_id(self.topic.id),
            _ => topic.with_name(TopicName(StrBytes::from_string(self.name.clone()))),
        };
        let replicas = i32::try_from(REPLICAS.as_millis()).unwrap_or(i32::MAX);
        // All replicas that are level have it before it is answered.
        Ok(ProduceRequest::default().with_acks(-1).with_timeout_ms(replicas).with_topic_data(vec![topic]))
    }
}

async fn next(held: &mut Option<Job>, jobs: &mut mpsc::Receiver<Job>) -> Option<Job> {
    match held.take() {
        Some(job) => Some(job),
        None => jobs.recv().await,
    }
}

/// Whether the topic, or its leader, has to be looked for anew.
fn is_elsewhere(error: &ResponseError) -> bool {
    use ResponseError::{
        FencedLeaderEpoch, LeaderNotAvailable, NotLeaderOrFollower, UnknownLeaderEpoch, UnknownTopicId,
        UnknownTopicOrPartition,
    };
    matches!(
        error,
        FencedLeaderEpoch
            | LeaderNotAvailable
            | NotLeaderOrFollower
            | UnknownLeaderEpoch
            | UnknownTopicId
            | UnknownTopicOrPartition
    )
}

/// What an answer says of the only partition.
fn partition(answer: ProduceResponse) -> Option<PartitionProduceResponse> {
    answer.responses.into_iter().next().and_then(|topic| topic.partition_responses.into_iter().next())
}

/// What the broker says of a batch: the offset of its first record.
fn decided(partition: Option<PartitionProduceResponse>) -> Result<i64, EngineError> {
    use ResponseError::{
        ClusterAuthorizationFailed, InvalidRecord, InvalidRequiredAcks, MessageTooLarge, NotEnoughReplicas,
        PolicyViolation, RecordListTooLarge, TopicAuthorizationFailed, UnsupportedVersion,
    };
    let partition =
        partition.ok_or_else(|| EngineError::OutcomeUnknown("its answer says nothing of the write".into()))?;
    let Some(error) = ResponseError::try_from_code(partition.error_code) else { return Ok(partition.base_offset) };
    let message = match partition.error_message.as_deref() {
        Some(more) => format!("Kafka refuses the write: {error:?}: {more}"),
        None => format!("Kafka refuses the write: {error:?}"),
    };
    Err(match error {
        MessageTooLarge | RecordListTooLarge => EngineError::Refused { status: 413, message },
        ClusterAuthorizationFailed | TopicAuthorizationFailed => EngineError::Refused { status: 403, message },
        InvalidRecord | InvalidRequiredAcks | PolicyViolation | UnsupportedVersion => {
            EngineError::Refused { status: 500, message }
        }
        NotEnoughReplicas => EngineError::Unavailable(message),
        error if is_elsewhere(&error) => EngineError::Unavailable(message),
        // It may have been appended.
        _ => EngineError::OutcomeUnknown(message),
    })
}

fn timestamp() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_millis()).unwrap_or(i64::MAX)
}
