//! Many writes as one: stored by one batch, each under its own condition.

use bytes::Bytes;
use http::{Method, Request};
use hyper::body::Incoming;
use nkv_core::{Key, Op, Outcome, Pattern, PutOptions, Revision};
use nkv_node::Handle;
use serde::de::{IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::fmt;
use std::time::Duration;

use crate::body::{Answer, receive};
use crate::entry::{from_base64, write_number};
use crate::kv::without_conditions;
use crate::problem::Problem;
use crate::route::{Ctx, done, query};

/// Writes of a batch, at most.
const OPS_MAX: usize = 10_000;

/// One of `put` and `delete`. A field that is not known, and one that is given twice or as `null`, is an error: a condition is
/// never left out.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Item {
    #[serde(default, deserialize_with = "given")]
    put: Option<Put>,
    #[serde(default, deserialize_with = "given")]
    delete: Option<Delete>,
}

/// As many as a batch may have, and one more if there are more: the rest is not made into anything.
pub(crate) struct Items(Vec<Item>);

impl<'de> Deserialize<'de> for Items {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Some;

        impl<'de> Visitor<'de> for Some {
            type Value = Items;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array of writes")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Items, A::Error> {
                let mut items = Vec::new();
                while items.len() <= OPS_MAX
                    && let Option::Some(item) = seq.next_element()?
                {
                    items.push(item);
                }
                if items.len() > OPS_MAX {
                    while seq.next_element::<IgnoredAny>()?.is_some() {}
                }
                Ok(Items(items))
            }
        }

        from.deserialize_seq(Some)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Put {
    key: String,
    #[serde(default, deserialize_with = "given")]
    value: Option<String>,
    #[serde(default, deserialize_with = "given")]
    value_base64: Option<String>,
    #[serde(default, deserialize_with = "given")]
    if_revision: Option<u64>,
    #[serde(default, deserialize_with = "given")]
    ttl_ms: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Delete {
    key: String,
    #[serde(default, deserialize_with = "given")]
    if_revision: Option<u64>,
}

fn given<'de, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<Option<T>, D::Error> {
    T::deserialize(from).map(Some)
}

/// `POST /v1/batch`.
pub(crate) async fn batch(ctx: Ctx<'_>, request: Request<Incoming>) -> Result<Answer, Problem> {
    if *request.method() != Method::POST {
        return Err(Problem::method("POST"));
    }
    query(&request, &[])?;
    without_conditions(request.headers())?;
    let handle = &ctx.door.handle;
    let received = receive(handle, ctx.conn, request, handle.limits().request_len_max).await?;
    let Items(items) = serde_json::from_slice(&received.bytes).map_err(|error| {
        Problem::bad(format!("the body is not an array of {{\"put\":…}} and {{\"delete\":…}}: {error}"))
    })?;
    if items.len() > OPS_MAX {
        return Err(Problem::new("too-large", format!("more than {OPS_MAX} writes, which is the limit of a batch")));
    }
    let ops = items.into_iter().enumerate().map(|(at, item)| op(handle, item).map_err(|wrong| of_item(at, &wrong)));
    let ops: Vec<Op> = ops.collect::<Result<_, _>>()?;
    let outcomes = handle.write(ops).await?;
    drop(received);
    let mut out = b"{\"outcomes\":[".to_vec();
    for (at, outcome) in outcomes.iter().enumerate() {
        if at > 0 {
            out.push(b',');
        }
        write_outcome(&mut out, outcome);
    }
    out.extend_from_slice(b"]}\n");
    Ok(done(out, None, None))
}

fn of_item(at: usize, wrong: &Problem) -> Problem {
    Problem::bad(format!("write {at} of the batch: {}", wrong.detail()))
}

fn op(handle: &Handle, item: Item) -> Result<Op, Problem> {
    let invalid = |error: nkv_core::KeyError| Problem::new("invalid-key", error.to_string());
    match item {
        Item { put: Some(put), delete: None } => {
            let value = match (put.value, put.value_base64) {
                (Some(text), None) => Bytes::from(text),
                (None, Some(coded)) => {
                    from_base64(&coded).ok_or_else(|| Problem::bad("'value_base64' is not base64"))?.into()
                }
                _ => return Err(Problem::bad("a put has one of 'value' and 'value_base64'")),
            };
            if put.ttl_ms == Some(0) {
                return Err(Problem::bad("'ttl_ms' is at least 1"));
            }
            let options = PutOptions {
                if_revision: put.if_revision.map(Revision::new),
                expiry: put.ttl_ms.map(|ttl| handle.expiry(Duration::from_millis(ttl))),
            };
            Ok(Op::Put { key: Key::new(&put.key).map_err(invalid)?, value, options })
        }
        Item { put: None, delete: Some(delete) } => {
            let pattern = Pattern::new(&delete.key).map_err(invalid)?;
            if delete.if_revision.is_some() && !matches!(pattern, Pattern::Key(_)) {
                return Err(Problem::bad("'if_revision' is about one key, and not for a wildcard"));
            }
            Ok(Op::Delete { pattern, if_revision: delete.if_revision.map(Revision::new) })
        }
        _ => Err(Problem::bad("it is one of 'put' and 'delete'")),
    }
}

fn write_outcome(out: &mut Vec<u8>, outcome: &Outcome) {
    let (status, count, revision) = match outcome {
        Outcome::Put { revision } => (200, None, Some(revision)),
        Outcome::Deleted { count, revision } => (200, Some(*count), Some(revision)),
        Outcome::NotFound => (404, None, None),
        Outcome::Conflict { revision } => (412, None, Some(revision)),
    };
    out.extend_from_slice(b"{\"status\":");
    write_number(out, status);
    if let Some(count) = count {
        out.extend_from_slice(b",\"count\":");
        write_number(out, count);
    }
    if let Some(revision) = revision {
        out.extend_from_slice(b",\"revision\":");
        write_number(out, revision.get());
    }
    out.push(b'}');
}
