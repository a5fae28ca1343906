//! Writes: each is a transaction, which is done only within the generation of nkv's data that the node knows.

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::try_join_all;
use nkv_core::{Epoch, Key, Op, Outcome, Pattern, PutOptions, Revision};
use nkv_node::{Decided, EngineError};
use tonic::Status;

use crate::engine::Inner;
use crate::fault;
use crate::fetch::{number, revision};
use crate::names::{Name, Range, behind};
use crate::rpc::compare::{CompareResult, CompareTarget, TargetUnion};
use crate::rpc::request_op::Request;
use crate::rpc::response_op::Response;
use crate::rpc::{
    Compare, DeleteRangeRequest, KeyValue, PutRequest, RangeRequest, RangeResponse, RequestOp, ResponseOp, TxnRequest,
};
use crate::session::{Session, revoke};

/// At most this number of plain writes go in one transaction.
pub(crate) const JOINED_MAX: usize = 64;
pub(crate) const JOINED_LEN_MAX: usize = 256 << 10;
/// etcd's default limit of operations in a transaction.
const OPS_MAX: usize = 128;
/// How often a wildcard delete in one step is tried, where keys are written meanwhile.
const STEP_TRIES: usize = 3;
const SCAN_KEYS: i64 = 10_000;

impl Inner {
    pub(crate) async fn decide(&self, epoch: Epoch, ops: &[Op], together: bool) -> Result<Decided, EngineError> {
        let session = self.session().ok_or_else(|| EngineError::Unavailable("etcd is not followed".into()))?;
        let results = if together {
            self.step(&session, epoch, ops).await?.into_iter().map(Ok).collect()
        } else {
            self.in_order(&session, epoch, ops).await
        };
        Ok(Decided { epoch: session.epoch, results })
    }

    /// Each for itself, in order. Plain ones that follow each other share a transaction.
    async fn in_order(&self, session: &Arc<Session>, epoch: Epoch, ops: &[Op]) -> Vec<Result<Outcome, EngineError>> {
        let (mut results, mut rest) = (Vec::with_capacity(ops.len()), ops);
        // Operations of a transaction that was refused: each goes by itself.
        let mut alone = 0_usize;
        while !rest.is_empty() {
            if matches!(results.last(), Some(Err(EngineError::OutcomeUnknown(_)))) {
                // What comes after it could be done before it.
                let error = EngineError::Unavailable("a write before it has an unknown outcome".into());
                results.extend(rest.iter().map(|_| Err(error.clone())));
                break;
            }
            let count = if alone > 0 { 1 } else { joined(rest) };
            let (some, others) = rest.split_at_checked(count).unwrap_or((rest, &[]));
            match (self.step(session, epoch, some).await, some) {
                (Ok(outcomes), _) => results.extend(outcomes.into_iter().map(Ok)),
                // One of them is refused: which?
                (Err(EngineError::Refused { .. }), [_, _, ..]) => {
                    alone = some.len();
                    continue;
                }
                // It takes more ranges than a transaction has, or keys come and go too often.
                (
                    Err(EngineError::Refused { status: 413 | 409, .. }),
                    [Op::Delete { pattern: pattern @ (Pattern::Below(_) | Pattern::All), if_revision: None }],
                ) => {
                    results.push(self.delete_key_by_key(session, pattern).await);
                }
                (Err(error), some) => results.extend(some.iter().map(|_| Err(error.clone()))),
            }
            alone = alone.saturating_sub(some.len());
            rest = others;
        }
        results
    }

    /// All in one transaction, or none of it.
    pub(crate) async fn step(
        &self,
        session: &Arc<Session>,
        epoch: Epoch,
        ops: &[Op],
    ) -> Result<Vec<Outcome>, EngineError> {
        if ops.iter().any(has_condition) && epoch != session.epoch {
            return Err(EngineError::OtherEpoch);
        }
        let mut tries = 0_usize;
        loop {
            tries = tries.saturating_add(1);
            let mut leases = try_join_all(ops.iter().map(|op| Lease::grant(self, session, op))).await?;
            let (mut guards, mut parts) = (Vec::new(), Vec::new());
            for (op, lease) in ops.iter().zip(&leases) {
                match op {
                    Op::Delete { pattern: pattern @ (Pattern::Below(_) | Pattern::All), if_revision: None } => {
                        let scan = self.scan(session, pattern, drop).await?;
                        guards.extend(self.guards(pattern, scan.revision));
                        parts.push(Part { requests: scan.ranges.into_iter().map(delete).collect(), of: Of::Delete });
                    }
                    op => parts.push(self.part(op, lease.as_ref().map_or(0, |lease| lease.id))),
                }
            }
            // From here on the transaction may be done, even if the caller gives up.
            leases.iter_mut().flatten().for_each(|lease| lease.is_put = true);
            match self.commit(session, parts, guards).await {
                Ok(Some(outcomes)) => {
                    for (lease, outcome) in leases.into_iter().zip(&outcomes) {
                        lease.into_iter().for_each(|lease| lease.end(outcome));
                    }
                    return Ok(outcomes);
                }
                Ok(None) if tries >= STEP_TRIES => {
                    let message = "keys are written too often for a wildcard delete in one step".into();
                    return Err(EngineError::Refused { status: 409, message });
                }
                Ok(None) => leases.iter_mut().flatten().for_each(|lease| lease.is_put = false),
                // It had no time to be put.
                Err(Fault::NoLease) if tries < STEP_TRIES => {
                    leases.iter_mut().flatten().for_each(|lease| lease.is_put = false)
                }
                Err(Fault::NoLease) => {
                    return Err(EngineError::Unavailable("the lease of the value ended at once".into()));
                }
                Err(Fault::Other(error)) => {
                    let is_unknown = matches!(error, EngineError::OutcomeUnknown(_));
                    leases.iter_mut().flatten().for_each(|lease| lease.is_put = is_unknown);
                    return Err(error);
                }
            }
        }
    }

    /// What a transaction does for an operation that is no wildcard.
    fn part(&self, op: &Op, lease: i64) -> Part {
        match op {
            Op::Put { key, value, options } => {
                let name = Bytes::from(self.names.value(key));
                let mut requests = vec![put(name.clone(), value.clone(), lease)];
                if lease != 0 {
                    // It ends with the value, in one revision: so a value that ended is distinguished from one that was deleted.
                    requests.push(put(self.names.lease(key).into(), Bytes::new(), lease));
                }
                Part { requests, of: Of::Put }.under(name, options.if_revision)
            }
            Op::Delete { pattern: Pattern::Key(key) | Pattern::Exact(key), if_revision } => {
                let name = self.names.value(key);
                let one = Range { from: name.clone(), to: Vec::new() };
                Part { requests: vec![delete(one)], of: Of::Delete }.under(name.into(), *if_revision)
            }
            Op::Delete { .. } => Part { requests: Vec::new(), of: Of::Nothing },
        }
    }

    /// The outcomes; `None` where a guard does not hold.
    async fn commit(
        &self,
        session: &Session,
        parts: Vec<Part>,
        guards: Vec<Compare>,
    ) -> Result<Option<Vec<Outcome>>, Fault> {
        let before = self.known().at.as_ref().map_or(session.revision, |at| number(at.seen.revision));
        let generation = Bytes::from(self.names.generation());
        let mut compare = guards;
        compare.push(value_is(generation.clone(), session.generation.clone()));
        let shapes: Vec<(usize, Of)> = parts.iter().map(|part| (part.requests.len(), part.of)).collect();
        let request = TxnRequest {
            compare,
            success: parts.into_iter().flat_map(|part| part.requests).collect(),
            failure: vec![look_at(generation, false)],
        };
        let answer = match session.txn(&request).await {
            Ok(answer) => answer,
            Err(status) if fault::has_no_lease(&status) => return Err(Fault::NoLease),
            Err(status) if fault::is_full(&status) => {
                return Err(Fault::Other(self.when_full(session, &request, before, &status).await));
            }
            Err(status) => return Err(Fault::Other(fault::of_write(&status))),
        };
        if !answer.succeeded {
            let found = answer.responses.first().and_then(found);
            if found.is_some_and(|found| found.value == session.generation) {
                return Ok(None);
            }
            session.kicked.notify_one();
            let has_condition = shapes.iter().any(|(_, of)| matches!(of, Of::PutIf | Of::DeleteIf));
            let gone = || EngineError::Unavailable("the data of this prefix begin anew".into());
            return Err(Fault::Other(if has_condition { EngineError::OtherEpoch } else { gone() }));
        }
        let header = answer.header.unwrap_or_default();
        if header.cluster_id != session.cluster_id {
            return Err(Fault::Other(EngineError::OutcomeUnknown("another etcd answered".into())));
        }
        let (revision, mut rest) = (revision(header.revision), answer.responses.as_slice());
        let mut outcomes = Vec::with_capacity(shapes.len());
        for (len, of) in shapes {
            let (own, others) = rest.split_at_checked(len).ok_or_else(|| Fault::Other(unheard()))?;
            outcomes.push(of.outcome(own, revision));
            rest = others;
        }
        Ok(Some(outcomes))
    }

    /// etcd refuses what does not fit; but of the very first that does not, it says so and does it all the same.
    async fn when_full(&self, session: &Session, request: &TxnRequest, before: i64, status: &Status) -> EngineError {
        let mut keys = Vec::new();
        puts(&request.success, &mut keys);
        // By plain reads: etcd before 3.5.2 takes no transaction at all now.
        let look = |key| session.range(RangeRequest { key, keys_only: true, ..RangeRequest::default() });
        let is_untouched = |found: &RangeResponse| found.kvs.iter().all(|kv| kv.mod_revision <= before);
        match try_join_all(keys.into_iter().map(look)).await {
            Ok(found) if found.iter().all(is_untouched) => fault::of_write(status),
            _ => EngineError::OutcomeUnknown(format!("{}; it may be done all the same", status.message())),
        }
    }

    /// Where a pattern selects keys of nkv, and none else. Each of them is visited.
    async fn scan(
        &self,
        session: &Session,
        pattern: &Pattern,
        mut visit: impl FnMut(Key),
    ) -> Result<Scan, EngineError> {
        let Range { from, to } = self.names.selected(pattern);
        let mut scan = Scan { ranges: Vec::new(), revision: 0 };
        let (mut start, mut at, mut has_keys) = (from.clone(), from, false);
        loop {
            let request = RangeRequest {
                key: at.into(),
                range_end: to.clone().into(),
                limit: SCAN_KEYS,
                revision: scan.revision,
                keys_only: true,
                serializable: scan.revision > 0,
            };
            let page = session.range(request).await.map_err(|status| fault::of_request(&status))?;
            if scan.revision == 0 {
                scan.revision = page.header.unwrap_or_default().revision;
            }
            let known = self.known();
            for kv in &page.kvs {
                match self.names.parse(&kv.key) {
                    Name::Value(key) if !known.large.contains(&key) => {
                        has_keys = true;
                        visit(key);
                    }
                    _ => {
                        if has_keys {
                            scan.ranges.push(Range { from: start, to: kv.key.to_vec() });
                        }
                        (start, has_keys) = (behind(&kv.key), false);
                    }
                }
            }
            drop(known);
            match page.kvs.last() {
                Some(last) if page.more => at = behind(&last.key),
                _ => break,
            }
        }
        if has_keys {
            scan.ranges.push(Range { from: start, to });
        }
        Ok(scan)
    }

    /// That nothing was written since where a pattern selects: what nkv does not show could be among it.
    fn guards(&self, pattern: &Pattern, revision: i64) -> Vec<Compare> {
        let range = self.names.selected(pattern);
        let own = self.names.own();
        let parts = match pattern {
            Pattern::All => vec![Range { from: range.from, to: own.from }, Range { from: own.to, to: range.to }],
            _ => vec![range],
        };
        let guard = |range: Range| Compare {
            result: CompareResult::Less.into(),
            target: CompareTarget::Mod.into(),
            key: range.from.into(),
            range_end: range.to.into(),
            target_union: Some(TargetUnion::ModRevision(revision.saturating_add(1))),
        };
        parts.into_iter().map(guard).collect()
    }

    /// A wildcard delete that one transaction does not take.
    async fn delete_key_by_key(&self, session: &Arc<Session>, pattern: &Pattern) -> Result<Outcome, EngineError> {
        let mut keys = Vec::new();
        self.scan(session, pattern, |key| keys.push(key)).await?;
        let (mut count, mut last) = (0_u64, Revision::ZERO);
        for some in keys.chunks(OPS_MAX) {
            let part =
                |key: &Key| self.part(&Op::Delete { pattern: Pattern::Exact(key.clone()), if_revision: None }, 0);
            let done = self.commit(session, some.iter().map(part).collect(), Vec::new()).await;
            let outcomes = match done {
                Ok(outcomes) => outcomes.unwrap_or_default(),
                Err(Fault::Other(error)) if count == 0 => return Err(error),
                Err(Fault::Other(error)) => {
                    return Err(EngineError::OutcomeUnknown(format!("{count} keys are gone, then: {error}")));
                }
                Err(Fault::NoLease) => return Err(unheard()),
            };
            for outcome in outcomes {
                if let Outcome::Deleted { count: some, revision } = outcome {
                    (count, last) = (count.saturating_add(some), last.max(revision));
                }
            }
        }
        Ok(if count == 0 { Outcome::NotFound } else { Outcome::Deleted { count, revision: last } })
    }
}

/// How many operations from the first on are done in one transaction.
fn joined(ops: &[Op]) -> usize {
    let (mut keys, mut len) = (HashSet::new(), 0_usize);
    let mut joins = |op| {
        let Some(key) = plain_key(op) else { return false };
        len = value_len(op).saturating_add(len);
        keys.insert(key) && len <= JOINED_LEN_MAX
    };
    let first = ops.iter().take(JOINED_MAX).position(|op| !joins(op));
    first.unwrap_or(ops.len().min(JOINED_MAX)).max(1)
}

fn one_key(op: &Op) -> Option<&Key> {
    match op {
        Op::Put { key, .. } | Op::Delete { pattern: Pattern::Key(key) | Pattern::Exact(key), .. } => Some(key),
        Op::Delete { .. } => None,
    }
}

/// The key of an operation that may share a transaction.
pub(crate) fn plain_key(op: &Op) -> Option<&Key> {
    one_key(op).filter(|_| !has_condition(op) && !has_ttl(op))
}

pub(crate) fn value_len(op: &Op) -> usize {
    if let Op::Put { value, .. } = op { value.len() } else { 0 }
}

fn has_condition(op: &Op) -> bool {
    match op {
        Op::Put { options, .. } => options.if_revision.is_some(),
        Op::Delete { if_revision, .. } => if_revision.is_some(),
    }
}

pub(crate) fn has_ttl(op: &Op) -> bool {
    matches!(op, Op::Put { options: PutOptions { expiry: Some(_), .. }, .. })
}

/// Not what etcd answers to what it was asked.
fn unheard() -> EngineError {
    EngineError::OutcomeUnknown("etcd answered something else".into())
}

enum Fault {
    /// The put was not done, as its lease had ended.
    NoLease,
    Other(EngineError),
}

/// What a pattern selects.
struct Scan {
    /// Around everything that nkv does not show.
    ranges: Vec<Range>,
    revision: i64,
}

/// What a transaction has for one operation.
struct Part {
    requests: Vec<RequestOp>,
    of: Of,
}

/// How the answers to it are to be read.
#[derive(Clone, Copy, Debug)]
enum Of {
    Put,
    Delete,
    PutIf,
    DeleteIf,
    /// A condition on a wildcard, which has no revision.
    Nothing,
}

impl Part {
    /// Only if the key has this revision.
    fn under(self, name: Bytes, if_revision: Option<Revision>) -> Part {
        let Some(expected) = if_revision else { return self };
        let request = TxnRequest {
            compare: vec![mod_is(name.clone(), number(expected))],
            success: self.requests,
            failure: vec![look(name)],
        };
        let of = if matches!(self.of, Of::Put) { Of::PutIf } else { Of::DeleteIf };
        Part { requests: vec![RequestOp { request: Some(Request::RequestTxn(request)) }], of }
    }
}

impl Of {
    fn outcome(self, answers: &[ResponseOp], revision: Revision) -> Outcome {
        let of_nested = || match answers.first().and_then(|answer| answer.response.as_ref()) {
            Some(Response::ResponseTxn(txn)) => (txn.succeeded, txn.responses.as_slice()),
            _ => (false, &[][..]),
        };
        match self {
            Of::Put => Outcome::Put { revision },
            Of::Delete => match answers.iter().map(deleted).sum::<u64>() {
                0 => Outcome::NotFound,
                count => Outcome::Deleted { count, revision },
            },
            Of::PutIf => match of_nested() {
                (true, _) => Outcome::Put { revision },
                (false, answers) => Outcome::Conflict { revision: present(answers) },
            },
            Of::DeleteIf => match of_nested() {
                (true, answers) => Of::Delete.outcome(answers, revision),
                (false, answers) => match present(answers) {
                    Revision::ZERO => Outcome::NotFound,
                    revision => Outcome::Conflict { revision },
                },
            },
            Of::Nothing => Outcome::Conflict { revision: Revision::ZERO },
        }
    }
}

fn deleted(answer: &ResponseOp) -> u64 {
    match &answer.response {
        Some(Response::ResponseDeleteRange(answer)) => u64::try_from(answer.deleted).unwrap_or_default(),
        _ => 0,
    }
}

/// The key that a look found.
fn found(answer: &ResponseOp) -> Option<&KeyValue> {
    match &answer.response {
        Some(Response::ResponseRange(answer)) => answer.kvs.first(),
        _ => None,
    }
}

fn present(answers: &[ResponseOp]) -> Revision {
    answers.first().and_then(found).map_or(Revision::ZERO, |kv| revision(kv.mod_revision))
}

pub(crate) fn mod_is(key: Bytes, revision: i64) -> Compare {
    Compare {
        result: CompareResult::Equal.into(),
        target: CompareTarget::Mod.into(),
        key,
        range_end: Bytes::new(),
        target_union: Some(TargetUnion::ModRevision(revision)),
    }
}

pub(crate) fn value_is(key: Bytes, value: Bytes) -> Compare {
    Compare { target: CompareTarget::Value.into(), target_union: Some(TargetUnion::Value(value)), ..mod_is(key, 0) }
}

pub(crate) fn put(key: Bytes, value: Bytes, lease: i64) -> RequestOp {
    RequestOp { request: Some(Request::RequestPut(PutRequest { key, value, lease })) }
}

fn delete(range: Range) -> RequestOp {
    let request = DeleteRangeRequest { key: range.from.into(), range_end: range.to.into() };
    RequestOp { request: Some(Request::RequestDeleteRange(request)) }
}

/// The keys that are put.
fn puts(requests: &[RequestOp], keys: &mut Vec<Bytes>) {
    for request in requests {
        match &request.request {
            Some(Request::RequestPut(put)) => keys.push(put.key.clone()),
            Some(Request::RequestTxn(txn)) => puts(&txn.success, keys),
            _ => {}
        }
    }
}

fn look(key: Bytes) -> RequestOp {
    look_at(key, true)
}

fn look_at(key: Bytes, keys_only: bool) -> RequestOp {
    RequestOp { request: Some(Request::RequestRange(RangeRequest { key, keys_only, ..RangeRequest::default() })) }
}

/// A lease for one value. Dropped before the value was put, it is revoked.
struct Lease<'a> {
    etcd: &'a Inner,
    session: Arc<Session>,
    id: i64,
    /// The value has it, or may have it.
    is_put: bool,
}

impl<'a> Lease<'a> {
    /// One for an operation that needs one: in whole seconds, and no shorter than etcd has it at all times.
    async fn grant(etcd: &'a Inner, session: &Arc<Session>, op: &Op) -> Result<Option<Self>, EngineError> {
        let Op::Put { options: PutOptions { expiry: Some(expiry), .. }, .. } = op else { return Ok(None) };
        let ttl = i64::try_from(expiry.ttl_ms.div_ceil(1_000).max(2)).unwrap_or(i64::MAX).min(TTL_MAX);
        let granted: Result<i64, Status> = session.grant(ttl).await;
        // A lease that may be there, without a value, changes nothing.
        let id = granted.map_err(|status| fault::of_request(&status))?;
        etcd.note_own(id, *expiry);
        Ok(Some(Lease { etcd, session: Arc::clone(session), id, is_put: false }))
    }

    fn end(mut self, outcome: &Outcome) {
        self.is_put = matches!(outcome, Outcome::Put { .. });
    }
}

/// The longest TTL of etcd, in seconds.
const TTL_MAX: i64 = 9_000_000_000;

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        if self.is_put {
            return;
        }
        self.etcd.forget_own(self.id);
        revoke(&self.session, vec![self.id]);
    }
}
