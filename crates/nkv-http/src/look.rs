//! Looking at the node: the watchers of a key, figures, and what this door is.

use http::Request;
use nkv_node::Traced;
use serde_json::{Map, Value, json};

use crate::body::Answer;
use crate::entry::millis;
use crate::kv::key_of;
use crate::problem::Problem;
use crate::route::{self, Ctx, only_get, query, takes_gzip};

/// What this door serves, for programs.
pub(crate) const OPENAPI: &str = include_str!("openapi.json");

/// `GET /v1/trace/KEY`.
pub(crate) fn trace<B>(ctx: Ctx<'_>, key: &str, request: &Request<B>) -> Result<Answer, Problem> {
    only_get(request)?;
    query(request, &[])?;
    let key = key_of(key)?;
    let subscribers: Vec<Value> = ctx.door.handle.trace(&key)?.iter().map(subscriber).collect();
    let object = json!({"key": key.as_str(), "subscribers": subscribers});
    Ok(route::json(ctx, takes_gzip(request), line(&object)))
}

fn subscriber(traced: &Traced) -> Value {
    let mut object = Map::new();
    let mut set = |name: &str, value: Value| _ = object.insert(name.into(), value);
    set("pattern", traced.pattern.to_string().into());
    set("age_ms", millis(traced.age).into());
    set("queued", traced.backlog.queued.into());
    set("skipped", traced.backlog.skipped.into());
    set("client_uuid", traced.client_uuid.to_string().into());
    if let Some(peer) = &traced.peer {
        set("peer", peer.address.clone().into());
        if let Some(name) = &peer.said.name {
            set("name", name.to_string().into());
        }
    }
    Value::Object(object)
}

/// `GET /v1/stats`.
pub(crate) async fn stats<B>(ctx: Ctx<'_>, request: &Request<B>) -> Result<Answer, Problem> {
    only_get(request)?;
    query(request, &[])?;
    let stats = ctx.door.handle.stats().await?;
    let mut object: Map<String, Value> =
        stats.words.into_iter().map(|(name, word)| (name, Value::from(word))).collect();
    object.extend(stats.numbers.into_iter().map(|(name, number)| (name, Value::from(number))));
    object.insert("version".into(), env!("CARGO_PKG_VERSION").into());
    Ok(route::json(ctx, takes_gzip(request), line(&Value::Object(object))))
}

/// `GET /v1/openapi.json`.
pub(crate) fn openapi<B>(ctx: Ctx<'_>, request: &Request<B>) -> Result<Answer, Problem> {
    only_get(request)?;
    query(request, &[])?;
    Ok(route::json(ctx, takes_gzip(request), OPENAPI.into()))
}

fn line(value: &Value) -> Vec<u8> {
    let mut text = value.to_string();
    text.push('\n');
    text.into_bytes()
}
