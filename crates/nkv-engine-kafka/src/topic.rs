//! The topic: where it is, that it is there, and that its settings keep the promises.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::future::join_all;
use futures_util::stream::{FuturesUnordered, StreamExt};
use kafka_protocol::ResponseError;
use kafka_protocol::messages::create_topics_request::{CreatableTopic, CreatableTopicConfig};
use kafka_protocol::messages::describe_configs_request::DescribeConfigsResource;
use kafka_protocol::messages::metadata_request::MetadataRequestTopic;
use kafka_protocol::messages::metadata_response::{MetadataResponse, MetadataResponseTopic};
use kafka_protocol::messages::{CreateTopicsRequest, DescribeConfigsRequest, MetadataRequest, TopicName};
use kafka_protocol::protocol::StrBytes;
use nkv_core::KEY_LEN_MAX;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::options::Options;
use crate::records::{BATCH_OVERHEAD, RECORD_OVERHEAD};
use crate::wire::{AWAY, Connection, address, check};

/// How long the next broker waits for the one before it to answer.
const TURN: Duration = Duration::from_millis(200);

/// How long a topic that was just created, or whose leader is being chosen, is waited for.
const SETTLING: Duration = Duration::from_millis(100);

/// How long creating a topic may take.
const CREATING: Duration = Duration::from_secs(10);

/// Tombstones have to be there for longer than it takes to see that a broker is away.
const RETENTION_MIN: Duration = AWAY.saturating_mul(2);

/// What a topic is created with, beside the longest message.
const SETTINGS: [(&str, &str); 5] = [
    ("cleanup.policy", "compact"),
    // What was overwritten is read at each start until it is compacted, and the newest segment never is.
    ("segment.bytes", "16777216"),
    ("max.compaction.lag.ms", "3600000"),
    ("min.cleanable.dirty.ratio", "0.1"),
    // How long a node may be away and go on where it was.
    ("delete.retention.ms", "86400000"),
];

/// Which settings of a topic are read.
const READ: [&str; 4] =
    ["cleanup.policy", "delete.retention.ms", "max.message.bytes", "unclean.leader.election.enable"];

/// What a topic is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It is the state.
    State,
    /// The log of the first kv-store.
    Log,
}

/// A topic as it is now.
#[derive(Clone, Debug)]
pub(crate) struct Topic {
    pub(crate) id: Uuid,
    /// The broker that takes writes.
    pub(crate) leader: String,
    pub(crate) leader_epoch: i32,
    pub(crate) cluster: String,
    pub(crate) settings: Settings,
}

/// What of a topic's settings matters at run time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Settings {
    /// Longest batch of records, in bytes.
    pub(crate) batch_len_max: usize,
    /// How long tombstones are kept at least.
    pub(crate) retention: Duration,
}

impl Settings {
    /// What the records of one batch may take.
    pub(crate) fn room(&self) -> usize {
        self.batch_len_max.saturating_sub(BATCH_OVERHEAD)
    }

    /// Longest value that fits into a batch with any key.
    pub(crate) fn value_len_max(&self) -> usize {
        self.batch_len_max.saturating_sub(overhead())
    }
}

fn overhead() -> usize {
    BATCH_OVERHEAD + RECORD_OVERHEAD + KEY_LEN_MAX
}

/// Finds the topic, and creates it if it is not there and that is wanted. Also gives a connection to one of the brokers.
///
/// # Errors
///
/// Refused, if a setting breaks a promise.
pub(crate) async fn find(options: &Options, kind: Kind) -> Result<(Topic, Connection)> {
    let name = options.topic.as_str();
    let mut was_created = false;
    let found = async {
        loop {
            let (mut connection, metadata) = reach(options).await?;
            let topic =
                metadata.topics.first().ok_or_else(|| Error::unavailable("the broker says nothing of the topic"))?;
            match ResponseError::try_from_code(topic.error_code) {
                Some(ResponseError::UnknownTopicOrPartition) if was_created => sleep(SETTLING).await,
                Some(ResponseError::UnknownTopicOrPartition) if options.create => {
                    create(&mut connection, options, kind).await?;
                    was_created = true;
                }
                Some(ResponseError::UnknownTopicOrPartition) => {
                    let message = format!("there is no topic '{name}', and it is not to be created");
                    return Err(Error::refused(message));
                }
                Some(ResponseError::LeaderNotAvailable) => sleep(SETTLING).await,
                _ => {
                    check(topic.error_code, &format!("look for the topic '{name}'"))?;
                    let Some((leader, leader_epoch)) = leader(name, &metadata, topic)? else {
                        sleep(SETTLING).await;
                        continue;
                    };
                    let (id, cluster) = (topic.topic_id, metadata.cluster_id.as_deref().unwrap_or_default().to_owned());
                    let settings = settings(&mut connection, name, kind).await?;
                    return Ok((Topic { id, leader, leader_epoch, cluster, settings }, connection));
                }
            }
        }
    };
    timeout(CREATING, found).await.map_err(|_| Error::unavailable(format!("the topic '{name}' has no leader")))?
}

/// Which clusters the named brokers belong to, of those that answer.
pub(crate) async fn clusters(options: &Options) -> BTreeSet<String> {
    let asked = options.servers.iter().map(|server| timeout(AWAY, ask(options, server)));
    let answers = join_all(asked).await.into_iter().flatten().flatten();
    answers.filter_map(|(_, metadata)| metadata.cluster_id.map(|cluster| cluster.to_string())).collect()
}

/// The first broker that answers, and what it says of the topic. The next is asked when one has had its turn, so that one that
/// is silent delays no caller.
async fn reach(options: &Options) -> Result<(Connection, MetadataResponse)> {
    let in_turn = |server, turn: u32| async move {
        sleep(TURN.saturating_mul(turn)).await;
        ask(options, server).await
    };
    let asked = options.servers.iter().zip(0..).map(|(server, turn)| in_turn(server, turn));
    let mut asked: FuturesUnordered<_> = asked.collect();
    let mut failed: Option<Error> = None;
    while let Some(answer) = asked.next().await {
        match answer {
            Ok(found) => return Ok(found),
            // One that refuses says more than one that is silent.
            Err(error) if error.is_retryable() && failed.is_some() => {}
            Err(error) => failed = Some(error),
        }
    }
    Err(failed.unwrap_or_else(|| Error::unavailable("no broker is named")))
}

/// What a broker says of the topic.
async fn ask(options: &Options, server: &str) -> Result<(Connection, MetadataResponse)> {
    let mut connection = Connection::open(server, &options.security).await?;
    let name = TopicName(StrBytes::from_string(options.topic.clone()));
    let topic = MetadataRequestTopic::default().with_name(Some(name));
    // A broker would create it with settings of its own.
    let request = MetadataRequest::default().with_topics(Some(vec![topic])).with_allow_auto_topic_creation(false);
    let metadata = connection.call(&request).await?;
    check(metadata.error_code, "ask for the topic")?;
    Ok((connection, metadata))
}

/// The broker that leads the only partition, once there is one.
fn leader(name: &str, metadata: &MetadataResponse, topic: &MetadataResponseTopic) -> Result<Option<(String, i32)>> {
    let [partition] = &topic.partitions[..] else {
        let count = topic.partitions.len();
        return Err(Error::refused(format!(
            "the topic '{name}' has {count} partitions; the order of changes needs exactly 1"
        )));
    };
    if topic.topic_id.is_nil() {
        return Err(Error::refused("the brokers give topics no identity; Kafka 3.1 or later is needed"));
    }
    let leader = metadata.brokers.iter().find(|broker| broker.node_id == partition.leader_id);
    Ok(leader.map(|broker| (address(&broker.host, broker.port), partition.leader_epoch)))
}

async fn create(connection: &mut Connection, options: &Options, kind: Kind) -> Result<()> {
    let name = options.topic.as_str();
    let config = |name: &str, value: String| {
        let (name, value) = (StrBytes::from_string(name.to_owned()), StrBytes::from_string(value));
        CreatableTopicConfig::default().with_name(name).with_value(Some(value))
    };
    let longest = options.value_len_max.saturating_add(overhead()).to_string();
    let own: &[_] = if kind == Kind::State { &SETTINGS } else { &[] };
    let all: Vec<_> = own.iter().copied().chain([("max.message.bytes", &*longest)]).collect();
    let configs = all.iter().map(|(name, value)| config(name, (*value).to_owned())).collect();
    let topic = CreatableTopic::default()
        .with_name(TopicName(StrBytes::from_string(name.to_owned())))
        .with_num_partitions(1)
        .with_replication_factor(options.replicas.unwrap_or(-1))
        .with_configs(configs);
    let request = CreateTopicsRequest::default().with_topics(vec![topic]).with_timeout_ms(1_500);
    let answer = connection.call(&request).await?;
    let topic = answer.topics.first().ok_or_else(|| Error::unavailable("the broker says nothing of the new topic"))?;
    match ResponseError::try_from_code(topic.error_code) {
        None => {
            let settings: Vec<String> = all.iter().map(|(name, value)| format!("{name}={value}")).collect();
            tracing::info!("created the Kafka topic '{name}': one partition, {}", settings.join(" "));
            Ok(())
        }
        // Another node was first: that one's settings are checked as any.
        Some(ResponseError::TopicAlreadyExists) => Ok(()),
        Some(_) => {
            let reason = topic.error_message.as_deref().unwrap_or("no reason given");
            check(topic.error_code, &format!("create the topic '{name}' ({reason})"))
        }
    }
}

/// What of the settings matters; refused, if one of them breaks a promise.
pub(crate) async fn settings(connection: &mut Connection, name: &str, kind: Kind) -> Result<Settings> {
    let resource = DescribeConfigsResource::default()
        .with_resource_type(2)
        .with_resource_name(StrBytes::from_string(name.to_owned()));
    let asked = READ.map(StrBytes::from_static_str).to_vec();
    let request = DescribeConfigsRequest::default().with_resources(vec![resource.with_configuration_keys(Some(asked))]);
    let answer = connection.call(&request).await?;
    let result =
        answer.results.first().ok_or_else(|| Error::unavailable("the broker says nothing of the topic's settings"))?;
    check(result.error_code, &format!("read the settings of the topic '{name}'"))?;
    let value = |setting: &str| {
        let found = result.configs.iter().find(|config| &*config.name == setting);
        found.and_then(|config| config.value.as_deref()).unwrap_or_default().to_owned()
    };
    let policy = value("cleanup.policy");
    if kind == Kind::State && policy != "compact" {
        let message = format!(
            "the topic '{name}' has cleanup.policy={policy}: Kafka deletes values from it; it must be 'compact' (for a topic \
             with the records of the first kv-store, see --kafka-log)"
        );
        return Err(Error::refused(message));
    }
    if kind == Kind::State && value("unclean.leader.election.enable") == "true" {
        let message = format!(
            "the topic '{name}' has unclean.leader.election.enable=true: acknowledged writes may be lost; it must be 'false'"
        );
        return Err(Error::refused(message));
    }
    let whole = |setting: &str| {
        let text = value(setting);
        text.parse::<u64>()
            .map_err(|_| Error::refused(format!("the topic '{name}' has {setting}={text}, which is no number")))
    };
    let batch_len_max = usize::try_from(whole("max.message.bytes")?).unwrap_or(usize::MAX);
    if batch_len_max < overhead() {
        let message = format!(
            "the topic '{name}' has max.message.bytes={batch_len_max}: a key may be longer; {} is the least",
            overhead()
        );
        return Err(Error::refused(message));
    }
    let retention = Duration::from_millis(whole("delete.retention.ms")?);
    if kind == Kind::State && retention < RETENTION_MIN {
        let message = format!(
            "the topic '{name}' has delete.retention.ms={}: deletes are gone before a node that reads the log has seen them; {} \
             is the least",
            retention.as_millis(),
            RETENTION_MIN.as_millis()
        );
        return Err(Error::refused(message));
    }
    Ok(Settings { batch_len_max, retention })
}
