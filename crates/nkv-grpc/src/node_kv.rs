//! The service `nkv.v1.Kv`, by calls of the node's handle.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nkv_core::{RecordRef, ValueRef};
use nkv_node::{Epoch, Error, Handle, Key, Op, Outcome, Pattern, PutOptions, Revision};
use tonic::{Request, Response, Status};

use crate::departing::Answer;
use crate::line::{Counted, Line};
use crate::status::status;
use crate::v1::kv_server::Kv;
use crate::v1::{
    Conflict, DeleteRequest, DeleteResponse, Entry, ExistsRequest, ExistsResponse, GetRequest, GetResponse,
    ListRequest, ListResponse, Operation, PutRequest, PutResponse, StatsRequest, StatsResponse, Subscriber,
    TraceRequest, TraceResponse, WatchRequest, WriteRequest, WriteResponse, operation, outcome,
};
use crate::watch::Watch;

/// Keys of a page when its request does not say, and at most.
const PAGE_LIMIT: u32 = 1_000;
const PAGE_LIMIT_MAX: u32 = 10_000;

/// A page ends where its keys and values pass this number of bytes: clients take messages of 4 MiB unless configured otherwise.
const PAGE_LEN_MAX: usize = 2 << 20;

/// What an entry takes beside key and value.
const ENTRY_LEN: usize = 32;

/// Longest answer, in bytes.
pub(crate) const ANSWER_LEN_MAX: usize = 64 << 20;

/// The service of a connection.
#[derive(Clone, Debug)]
pub(crate) struct KvService(pub(crate) Arc<Line>);

impl Line {
    /// The status of an error of the node.
    pub(crate) fn status(&self, error: &Error) -> Status {
        status(error, self.handle.epoch())
    }
}

/// An answer that was counted.
pub(crate) fn counted<T>(message: T, counted: Counted) -> Response<T> {
    let mut response = Response::new(message);
    response.extensions_mut().insert::<Answer>(Arc::new(counted));
    response
}

fn invalid(error: impl std::fmt::Display) -> Status {
    Status::invalid_argument(error.to_string())
}

/// The revision of a condition, if there is one.
fn condition(if_revision: Option<u64>, if_epoch: Option<&str>) -> Result<Option<Revision>, Status> {
    match (if_revision, if_epoch) {
        (None, None) => Ok(None),
        (None, Some(_)) => Err(invalid("'if_epoch' goes with 'if_revision'")),
        (Some(number), None) => Ok(Some(Revision::new(number))),
        (Some(number), Some(epoch)) => {
            let epoch: Epoch = epoch.parse().map_err(|_| invalid("'if_epoch' is 32 hexadecimal digits"))?;
            Ok(Some(Revision::in_epoch(epoch, number)))
        }
    }
}

fn ttl(ttl_ms: Option<u64>) -> Result<Option<Duration>, Status> {
    match ttl_ms {
        Some(0) => Err(invalid("'ttl_ms' must be at least 1")),
        ttl_ms => Ok(ttl_ms.map(Duration::from_millis)),
    }
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A value by itself: what came lies in the buffer of its whole message.
fn value(value: &Bytes) -> Bytes {
    Bytes::copy_from_slice(value)
}

#[tonic::async_trait]
impl Kv for KvService {
    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let (line, GetRequest { key }) = (&self.0, request.into_inner());
        Key::check(&key).map_err(invalid)?;
        line.room_for_answer().await;
        let epoch = line.handle.epoch();
        let look = |record: RecordRef<'_>| (record.value.to_bytes(), record.revision.get(), record.expiry);
        let found = line.handle.look_up(&key, look);
        let Some((value, revision, expiry)) = found.map_err(|error| line.status(&error))? else {
            return Err(Status::not_found(format!("there is no key '{key}'")));
        };
        let answer = line.answer(value.len());
        let ttl_ms = expiry.map(|expiry| millis(line.handle.time_left(expiry)));
        Ok(counted(GetResponse { value, revision, epoch: epoch.to_string(), ttl_ms }, answer))
    }

    async fn put(&self, request: Request<PutRequest>) -> Result<Response<PutResponse>, Status> {
        let (line, put) = (&self.0, request.into_inner());
        let mut options = PutOptions::default();
        options.if_revision = condition(put.if_revision, put.if_epoch.as_deref())?;
        options.ttl = ttl(put.ttl_ms)?;
        let done = line.handle.put_with(put.key, value(&put.value), options).await;
        let revision = done.map_err(|error| line.status(&error))?;
        Ok(Response::new(PutResponse { revision: revision.get(), epoch: epoch_of(&line.handle, revision) }))
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<DeleteResponse>, Status> {
        let (line, delete) = (&self.0, request.into_inner());
        let done = match condition(delete.if_revision, delete.if_epoch.as_deref())? {
            Some(if_revision) => line.handle.delete_if(delete.pattern, if_revision).await,
            None => line.handle.delete(delete.pattern).await,
        };
        let deleted = done.map_err(|error| line.status(&error))?;
        let revision = deleted.revision.unwrap_or(Revision::ZERO);
        let epoch = epoch_of(&line.handle, revision);
        Ok(Response::new(DeleteResponse { count: deleted.count, revision: revision.get(), epoch }))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let (line, list) = (&self.0, request.into_inner());
        let pattern = Pattern::new(&list.pattern).map_err(invalid)?;
        let after = list.after.as_deref().map(Key::new).transpose();
        let after = after.map_err(|error| invalid(format_args!("invalid 'after': {error}")))?;
        let limit = list.limit.unwrap_or(PAGE_LIMIT).min(PAGE_LIMIT_MAX) as usize;
        line.room_for_answer().await;
        let (epoch, mut entries, mut len) = (line.handle.epoch(), Vec::new(), 0_usize);
        let ended = line.handle.walk(&pattern, after.as_ref(), |record| {
            if entries.len() >= limit || len >= PAGE_LEN_MAX {
                return ControlFlow::Break(());
            }
            let value = if list.keys_only { ValueRef::Lent(&[]) } else { record.value };
            len = len.saturating_add(record.key.len()).saturating_add(value.len()).saturating_add(ENTRY_LEN);
            let (key, revision) = (record.key.as_str().to_owned(), record.revision.get());
            let ttl_ms = record.expiry.map(|expiry| millis(line.handle.time_left(expiry)));
            entries.push(Entry { key, value: value.to_bytes(), revision, ttl_ms });
            ControlFlow::Continue(())
        });
        let more = ended.map_err(|error| line.status(&error))?.is_break();
        let answer = line.answer(len);
        Ok(counted(ListResponse { entries, more, epoch: epoch.to_string() }, answer))
    }

    async fn exists(&self, request: Request<ExistsRequest>) -> Result<Response<ExistsResponse>, Status> {
        let (line, request) = (&self.0, request.into_inner());
        let pattern = Pattern::new(&request.pattern).map_err(invalid)?;
        let exists = line.handle.has(&pattern).map_err(|error| line.status(&error))?;
        Ok(Response::new(ExistsResponse { exists }))
    }

    async fn write(&self, request: Request<WriteRequest>) -> Result<Response<WriteResponse>, Status> {
        let (line, request) = (&self.0, request.into_inner());
        let epoch = line.handle.epoch();
        let ops = request.operations.into_iter().map(|operation| op(line, epoch, operation));
        let ops = ops.collect::<Result<Vec<_>, _>>()?;
        let outcomes = line.handle.write(ops).await.map_err(|error| line.status(&error))?;
        let epoch = epoch.to_string();
        let outcomes = outcomes.into_iter().map(|outcome| outcome_of(outcome, &epoch)).collect();
        Ok(Response::new(WriteResponse { outcomes }))
    }

    type WatchStream = Watch;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Watch>, Status> {
        let (line, request) = (&self.0, request.into_inner());
        Ok(Response::new(Watch::begin(line, request).await?))
    }

    async fn trace(&self, request: Request<TraceRequest>) -> Result<Response<TraceResponse>, Status> {
        let (line, request) = (&self.0, request.into_inner());
        let key = Key::new(&request.key).map_err(invalid)?;
        line.room_for_answer().await;
        let traced = line.handle.trace(&key).map_err(|error| line.status(&error))?;
        let mut len = 0_usize;
        let mut subscribers = Vec::new();
        for traced in traced {
            let subscriber = subscriber(traced);
            len = len.saturating_add(prost::Message::encoded_len(&subscriber)).saturating_add(ENTRY_LEN);
            if len > ANSWER_LEN_MAX {
                return Err(Status::resource_exhausted(format!("the answer would pass {ANSWER_LEN_MAX} bytes")));
            }
            subscribers.push(subscriber);
        }
        let answer = line.answer(len);
        Ok(counted(TraceResponse { subscribers }, answer))
    }

    async fn stats(&self, _: Request<StatsRequest>) -> Result<Response<StatsResponse>, Status> {
        let line = &self.0;
        let numbers = line.handle.numbers().map_err(|error| line.status(&error))?;
        let words = line.handle.words().map_err(|error| line.status(&error))?;
        Ok(Response::new(StatsResponse {
            numbers: numbers.into_iter().map(|(name, number)| (name.to_owned(), number)).collect(),
            words: words.into_iter().map(|(name, word)| (name.into_owned(), word)).collect(),
        }))
    }
}

fn epoch_of(handle: &Handle, revision: Revision) -> String {
    revision.epoch().unwrap_or_else(|| handle.epoch()).to_string()
}

/// An operation of a batch as the store takes it. A condition of another epoch refuses the whole batch: it says nothing about
/// the data that there are.
fn op(line: &Line, epoch: Epoch, operation: Operation) -> Result<Op, Status> {
    let revision = |if_revision: Option<u64>, if_epoch: Option<&str>| {
        let condition = condition(if_revision, if_epoch)?;
        if condition.and_then(Revision::epoch).is_some_and(|of| of != epoch) {
            let message = "a condition of the batch names another epoch than that of the data; nothing was done";
            return Err(line.status(&Error::new(nkv_node::ErrorKind::OtherEpoch, message)));
        }
        Ok(condition.map(|revision| nkv_core::Revision::new(revision.get())))
    };
    match operation.operation {
        Some(operation::Operation::Put(put)) => {
            let if_revision = revision(put.if_revision, put.if_epoch.as_deref())?;
            let expiry = ttl(put.ttl_ms)?.map(|ttl| line.handle.expiry(ttl));
            let options = nkv_core::PutOptions { if_revision, expiry };
            Ok(Op::Put { key: Key::new(&put.key).map_err(invalid)?, value: value(&put.value), options })
        }
        Some(operation::Operation::Delete(delete)) => {
            let if_revision = revision(delete.if_revision, delete.if_epoch.as_deref())?;
            let pattern = Pattern::new(&delete.pattern).map_err(invalid)?;
            if if_revision.is_some() && !matches!(pattern, Pattern::Key(_)) {
                return Err(invalid("a condition goes with one key, not with a wildcard"));
            }
            Ok(Op::Delete { pattern, if_revision })
        }
        None => Err(invalid("an operation of the batch is neither 'put' nor 'delete'")),
    }
}

fn outcome_of(outcome: Outcome, epoch: &str) -> crate::v1::Outcome {
    let epoch = epoch.to_owned();
    let outcome = match outcome {
        Outcome::Put { revision } => outcome::Outcome::Put(PutResponse { revision: revision.get(), epoch }),
        Outcome::Deleted { count, revision } => {
            outcome::Outcome::Delete(DeleteResponse { count, revision: revision.get(), epoch })
        }
        Outcome::NotFound => outcome::Outcome::Delete(DeleteResponse { count: 0, revision: 0, epoch }),
        Outcome::Conflict { revision } => {
            outcome::Outcome::Conflict(Conflict { revision: Some(revision.get()), epoch })
        }
    };
    crate::v1::Outcome { outcome: Some(outcome) }
}

fn subscriber(traced: nkv_node::Traced) -> Subscriber {
    let (peer, name) = traced.peer.map_or_else(Default::default, |peer| {
        (peer.address, peer.said.name.map_or_else(String::new, |name| name.as_ref().to_owned()))
    });
    Subscriber {
        client_uuid: traced.client_uuid.as_str().to_owned(),
        pattern: traced.pattern.to_string(),
        exact: matches!(traced.pattern, Pattern::Exact(_)),
        age_ms: millis(traced.age),
        peer,
        name,
        queued: traced.backlog.queued as u64,
        skipped: traced.backlog.skipped,
    }
}
