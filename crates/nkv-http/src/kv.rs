//! One key: its value as the body, its revision as the tag. And the delete of many.

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode};
use hyper::body::Incoming;
use nkv_core::{Epoch, Key, Pattern};
use nkv_node::{ErrorKind, PutOptions, Result as NodeResult, Revision};

use crate::body::{Answer, Body, Received, full, receive};
use crate::entry::{millis, write_entry, write_number};
use crate::problem::Problem;
use crate::query::decode_path;
use crate::route::{Ctx, HEADERS, REVISION, TTL_MS, done, query};
use crate::tag::{Conditions, Unmet, tag};

/// A value is never a page or a script of this origin.
const SANDBOX: HeaderValue = HeaderValue::from_static("default-src 'none'; sandbox");

/// What an entry without its key takes, about.
const ENTRY_LEN: usize = 64;

/// How often a write with a condition that is not about one revision is tried again, where others write the key meanwhile.
const TRIES: usize = 64;

/// `/v1/kv/KEY`.
pub(crate) async fn one(ctx: Ctx<'_>, key: &str, request: Request<Incoming>) -> Result<Answer, Problem> {
    let key = key_of(key)?;
    match *request.method() {
        Method::GET | Method::HEAD => get(ctx, &key, &request).await,
        Method::PUT => put(ctx, &key, request).await,
        Method::DELETE => delete(ctx, &key, &request).await,
        _ => Err(Problem::method("GET, HEAD, PUT, DELETE")),
    }
}

/// The key that a path names.
pub(crate) fn key_of(path: &str) -> Result<Key, Problem> {
    Key::new(&decode_path(path)?).map_err(|error| Problem::new("invalid-key", error.to_string()))
}

async fn get(ctx: Ctx<'_>, key: &Key, request: &Request<Incoming>) -> Result<Answer, Problem> {
    query(request, &[])?;
    let conditions = Conditions::read(request.headers(), false)?;
    let handle = &ctx.door.handle;
    if handle.budget().is_over() {
        handle.budget().relief().await;
    }
    let epoch = handle.epoch();
    let found = handle.look_up(key.as_str(), |record| (record.value.to_bytes(), record.revision, record.expiry))?;
    let Some((value, revision, expiry)) = found else { return Err(not_found(key)) };
    let present = (epoch, Revision::in_epoch(epoch, revision.get()));
    let mut answer = match conditions.check(Some(present)) {
        Ok(()) => Answer::new(Body::counted(value, ctx.conn)),
        Err(Unmet::NoneMatch) => {
            let mut answer = Answer::new(full(""));
            *answer.status_mut() = StatusCode::NOT_MODIFIED;
            answer
        }
        Err(unmet) => return Err(unmet_problem(unmet, Some(present))),
    };
    let headers = answer.headers_mut();
    headers.reserve(HEADERS);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(CONTENT_SECURITY_POLICY, SANDBOX);
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(ETAG, tag(epoch, revision.get()));
    headers.insert(REVISION, revision.get().into());
    if let Some(expiry) = expiry {
        headers.insert(TTL_MS, millis(handle.time_left(expiry)).into());
    }
    Ok(answer)
}

async fn put(ctx: Ctx<'_>, key: &Key, request: Request<Incoming>) -> Result<Answer, Problem> {
    let ttl = query(&request, &["ttl"])?.duration("ttl")?;
    if ttl.is_some_and(|ttl| ttl.is_zero()) {
        return Err(Problem::bad("'ttl' is at least 1ms"));
    }
    let conditions = Conditions::read(request.headers(), true)?;
    let handle = &ctx.door.handle;
    let received = receive(handle, ctx.conn, request, handle.limits().value_len_max).await?;
    let Received { bytes: value, held } = received;
    let mut options = PutOptions::default();
    options.ttl = ttl;
    let revision = if conditions.are_empty() {
        handle.put_with(key, value, options).await?
    } else {
        let put = conditional(ctx, key, &conditions, |if_revision| {
            let (mut options, value): (_, Bytes) = (options, value.clone());
            options.if_revision = if_revision;
            async move { handle.put_with(key, value, options).await }
        });
        Box::pin(put).await?
    };
    drop(held);
    let mut out = Vec::with_capacity(ENTRY_LEN.saturating_add(key.as_str().len()));
    out.push(b'{');
    write_entry(&mut out, key.as_str(), None, revision.get(), ttl);
    out.extend_from_slice(b"}\n");
    Ok(done(out, revision.epoch().map(|epoch| tag(epoch, revision.get())), Some(revision.get())))
}

async fn delete(ctx: Ctx<'_>, key: &Key, request: &Request<Incoming>) -> Result<Answer, Problem> {
    query(request, &[])?;
    let conditions = Conditions::read(request.headers(), true)?;
    let handle = &ctx.door.handle;
    let deleted = conditional(ctx, key, &conditions, |if_revision| async move {
        match if_revision {
            None => handle.delete(key).await,
            Some(revision) => handle.delete_if(key, revision).await,
        }
    })
    .await?;
    match deleted.revision {
        Some(revision) => Ok(done(deleted_object(deleted.count, Some(revision.get())), None, Some(revision.get()))),
        None => Err(not_found(key)),
    }
}

/// `DELETE /v1/kv?pattern=PATTERN`.
pub(crate) async fn delete_all(ctx: Ctx<'_>, request: &Request<Incoming>) -> Result<Answer, Problem> {
    let query = query(request, &["pattern"])?;
    let Some(pattern) = query.get("pattern") else {
        return Err(Problem::bad("'pattern' says what is deleted; '*' is everything"));
    };
    if !Conditions::read(request.headers(), true)?.are_empty() {
        return Err(Problem::bad("a condition is about one key: delete it at /v1/kv/KEY"));
    }
    let pattern = Pattern::new(pattern).map_err(|error| Problem::new("invalid-key", error.to_string()))?;
    let deleted = ctx.door.handle.delete(&pattern).await?;
    let revision = deleted.revision.map(Revision::get);
    Ok(done(deleted_object(deleted.count, revision), None, revision))
}

fn deleted_object(count: u64, revision: Option<u64>) -> Vec<u8> {
    let mut out = b"{\"count\":".to_vec();
    write_number(&mut out, count);
    if let Some(revision) = revision {
        out.extend_from_slice(b",\"revision\":");
        write_number(&mut out, revision);
    }
    out.extend_from_slice(b"}\n");
    out
}

/// Does a write if the conditions hold for what the key holds at that moment.
async fn conditional<T, F: Future<Output = NodeResult<T>>>(
    ctx: Ctx<'_>,
    key: &Key,
    conditions: &Conditions,
    write: impl Fn(Option<Revision>) -> F,
) -> Result<T, Problem> {
    if conditions.are_empty() {
        return Ok(write(None).await?);
    }
    let handle = &ctx.door.handle;
    for _ in 0..TRIES {
        let epoch = handle.epoch();
        let present = handle.look_up(key.as_str(), |record| record.revision)?;
        let present = present.map(|revision| (epoch, Revision::in_epoch(epoch, revision.get())));
        if let Err(unmet) = conditions.check(present) {
            return Err(unmet_problem(unmet, present));
        }
        match write(Some(present.map_or(Revision::ZERO, |(_, revision)| revision))).await {
            Err(error) if matches!(error.kind(), ErrorKind::Conflict { .. } | ErrorKind::OtherEpoch) => {}
            result => return Ok(result?),
        }
    }
    Err(Problem::new("unavailable", format!("others write '{key}' all the time; nothing was changed")))
}

fn unmet_problem(unmet: Unmet, present: Option<(Epoch, Revision)>) -> Problem {
    let detail = match (unmet, present) {
        (Unmet::Match(true), _) => "If-Match: a weak tag (W/) never matches; send the tag as ETag gave it",
        (Unmet::Match(_), Some(_)) => "If-Match: the key is at another revision; ETag has its tag",
        (Unmet::Match(_), None) => "If-Match: there is no such key",
        (Unmet::NoneMatch, _) => "If-None-Match: the key is there; ETag has its tag",
    };
    let revision = present.map_or(0, |(_, revision)| revision.get());
    let problem = Problem::new("conflict", detail).with("revision", revision);
    match present {
        Some((epoch, revision)) => problem.header(ETAG, tag(epoch, revision.get())),
        None => problem,
    }
}

fn not_found(key: &Key) -> Problem {
    Problem::new("not-found", format!("there is no key '{key}'"))
}

/// The headers of a write that are no conditions, for those that take none.
pub(crate) fn without_conditions(headers: &HeaderMap) -> Result<(), Problem> {
    match Conditions::read(headers, true)?.are_empty() {
        true => Ok(()),
        false => Err(Problem::bad("a condition is a field of each write here: 'if_revision'")),
    }
}
