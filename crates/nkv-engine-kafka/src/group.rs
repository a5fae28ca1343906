//! A consumer group of which one member at a time has the log.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use kafka_protocol::ResponseError;
use kafka_protocol::messages::consumer_protocol_assignment::{ConsumerProtocolAssignment, TopicPartition};
use kafka_protocol::messages::consumer_protocol_subscription::ConsumerProtocolSubscription;
use kafka_protocol::messages::join_group_request::JoinGroupRequestProtocol;
use kafka_protocol::messages::leave_group_request::MemberIdentity;
use kafka_protocol::messages::sync_group_request::SyncGroupRequestAssignment;
use kafka_protocol::messages::{
    FindCoordinatorRequest, HeartbeatRequest, JoinGroupRequest, JoinGroupResponse, LeaveGroupRequest, SyncGroupRequest,
    TopicName,
};
use kafka_protocol::protocol::{Decodable, Encodable, StrBytes};

use crate::error::{Error, Result};
use crate::options::Options;
use crate::reader::now;
use crate::topic::{Kind, find};
use crate::wire::{Connection, address, check};

/// A member that is not heard of for this long has left the group.
const SESSION: Duration = Duration::from_secs(10);

/// How often a member says that it lives.
pub(crate) const BEAT: Duration = Duration::from_secs(1);

/// For this long after it was heard of, a member may begin to write: what it began has ended before another has the log.
const LEASE: Duration = Duration::from_secs(5);

/// How long members are waited for when they have to join anew.
const REBALANCE: Duration = Duration::from_secs(10);

/// How long an answer may take: a broker answers once all members have joined.
const PATIENCE: Duration = Duration::from_secs(15);

const PROTOCOL_TYPE: StrBytes = StrBytes::from_static_str("consumer");
const PROTOCOL: StrBytes = StrBytes::from_static_str("nkv");

/// The version of what consumers send each other.
const VERSION: i16 = 0;

/// A member of the group.
#[derive(Debug)]
pub(crate) struct Member {
    connection: Connection,
    group: StrBytes,
    id: StrBytes,
    generation: i32,
    /// Whether it has the log.
    pub(crate) has_log: bool,
    heard_at: Duration,
}

impl Member {
    /// Joins the group, and waits until it is decided who has the log.
    pub(crate) async fn join(options: &Options, group: &str) -> Result<Self> {
        let group = StrBytes::from_string(group.to_owned());
        let (_, mut connection) = find(options, Kind::Log).await?;
        let asked = FindCoordinatorRequest::default().with_coordinator_keys(vec![group.clone()]);
        let answer = connection.call(&asked).await?;
        let coordinator = answer.coordinators.first();
        let coordinator = coordinator.ok_or_else(|| Error::unavailable("the group has no coordinator"))?;
        check(coordinator.error_code, "find the coordinator of the group")?;
        let address = address(&coordinator.host, coordinator.port);
        let mut connection = Connection::open(&address, &options.security).await?;
        connection.be_patient(PATIENCE);
        let heard_at = now();
        let id = StrBytes::from_static_str("");
        let mut member = Member { connection, group, id, generation: -1, has_log: false, heard_at };
        member.enter(&options.topic).await?;
        Ok(member)
    }

    /// Joins, again if it was a member before.
    pub(crate) async fn enter(&mut self, topic: &str) -> Result<()> {
        let mut joined = self.ask_to_join(topic).await?;
        // A new member is asked to come again, with the name that it was given.
        if ResponseError::try_from_code(joined.error_code) == Some(ResponseError::MemberIdRequired) {
            joined = self.ask_to_join(topic).await?;
        }
        check(joined.error_code, "join the group")?;
        self.generation = joined.generation_id;
        // The leader of the group has the log.
        let of = |member: &StrBytes| {
            let has_log = *member == joined.leader;
            Ok(SyncGroupRequestAssignment::default()
                .with_member_id(member.clone())
                .with_assignment(assignment(topic, has_log)?))
        };
        let assignments = joined.members.iter().map(|member| of(&member.member_id)).collect::<Result<Vec<_>>>()?;
        let asked_at = now();
        let request = SyncGroupRequest::default()
            .with_group_id(self.group.clone().into())
            .with_generation_id(self.generation)
            .with_member_id(self.id.clone())
            .with_protocol_type(Some(PROTOCOL_TYPE))
            .with_protocol_name(Some(PROTOCOL))
            .with_assignments(assignments);
        let synced = self.connection.call(&request).await?;
        check(synced.error_code, "be assigned the log")?;
        self.has_log = has_log(synced.assignment)?;
        self.heard_at = asked_at;
        Ok(())
    }

    async fn ask_to_join(&mut self, topic: &str) -> Result<JoinGroupResponse> {
        let subscription =
            ConsumerProtocolSubscription::default().with_topics(vec![StrBytes::from_string(topic.to_owned())]);
        let protocol = JoinGroupRequestProtocol::default().with_name(PROTOCOL).with_metadata(encoded(&subscription)?);
        let request = JoinGroupRequest::default()
            .with_group_id(self.group.clone().into())
            .with_session_timeout_ms(millis(SESSION))
            .with_rebalance_timeout_ms(millis(REBALANCE))
            .with_member_id(self.id.clone())
            .with_protocol_type(PROTOCOL_TYPE)
            .with_protocols(vec![protocol]);
        let joined = self.connection.call(&request).await?;
        self.id = joined.member_id.clone();
        Ok(joined)
    }

    /// Says that it lives; `false` if it has to [enter](Self::enter) again.
    pub(crate) async fn beat(&mut self) -> Result<bool> {
        let asked_at = now();
        let request = HeartbeatRequest::default()
            .with_group_id(self.group.clone().into())
            .with_generation_id(self.generation)
            .with_member_id(self.id.clone());
        let answer = self.connection.call(&request).await?;
        if ResponseError::try_from_code(answer.error_code) == Some(ResponseError::RebalanceInProgress) {
            return Ok(false);
        }
        check(answer.error_code, "stay in the group")?;
        self.heard_at = asked_at;
        Ok(true)
    }

    /// Looks, before a write, that it is [sure](Self::is_sure), and says that it lives if that is due; `false` if it has to
    /// [enter](Self::enter) again.
    ///
    /// # Errors
    ///
    /// Unavailable, if it is not sure.
    pub(crate) async fn secure(&mut self) -> Result<bool> {
        if now().saturating_sub(self.heard_at) >= BEAT && !self.beat().await? {
            return Ok(false);
        }
        match self.is_sure() {
            true => Ok(true),
            false => Err(Error::unavailable("another may have the log by now")),
        }
    }

    /// Whether no other member can have the log until what is begun now has ended.
    pub(crate) fn is_sure(&self) -> bool {
        self.has_log && now().saturating_sub(self.heard_at) < LEASE
    }

    /// Makes room for another at once.
    pub(crate) async fn leave(mut self) {
        let member = MemberIdentity::default().with_member_id(self.id.clone());
        let request = LeaveGroupRequest::default().with_group_id(self.group.clone().into()).with_members(vec![member]);
        // If it cannot be said, it shows when the session ends.
        drop(self.connection.call(&request).await);
    }
}

fn millis(time: Duration) -> i32 {
    i32::try_from(time.as_millis()).unwrap_or(i32::MAX)
}

fn encoded(message: &impl Encodable) -> Result<Bytes> {
    let mut bytes = BytesMut::new();
    bytes.put_i16(VERSION);
    message.encode(&mut bytes, VERSION).map_err(|error| Error::refused(format!("encode a request: {error}")))?;
    Ok(bytes.freeze())
}

fn assignment(topic: &str, has_log: bool) -> Result<Bytes> {
    let partition = TopicPartition::default()
        .with_topic(TopicName(StrBytes::from_string(topic.to_owned())))
        .with_partitions(vec![0]);
    let partitions = if has_log { vec![partition] } else { Vec::new() };
    encoded(&ConsumerProtocolAssignment::default().with_assigned_partitions(partitions))
}

fn has_log(assignment: Bytes) -> Result<bool> {
    let broken = |error: &dyn std::fmt::Display| Error::unavailable(format!("an assignment of the group: {error}"));
    let mut rest = assignment;
    let version = bytes::Buf::try_get_i16(&mut rest).map_err(|error| broken(&error))?;
    let assignment = ConsumerProtocolAssignment::decode(&mut rest, version).map_err(|error| broken(&error))?;
    Ok(!assignment.assigned_partitions.is_empty())
}
