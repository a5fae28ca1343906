//! From a path to what answers it, with what every answer has.

use std::sync::Arc;
use std::time::Instant;

use http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, VARY, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use http::{HeaderName, HeaderValue, Method, Request, StatusCode, Version};
use hyper::body::Incoming;

use crate::body::{Answer, full, of_calls};
use crate::connection::Conn;
use crate::door::Inner;
use crate::guard::{Passed, allow, allow_preflight};
use crate::problem::Problem;
use crate::query::Query;
use crate::{batch, figures, go_kv, kv, list, look, page, seed, watch, ws};

pub(crate) const REVISION: HeaderName = HeaderName::from_static("nkv-revision");
pub(crate) const TTL_MS: HeaderName = HeaderName::from_static("nkv-ttl-ms");
const RESOURCE_POLICY: HeaderName = HeaderName::from_static("cross-origin-resource-policy");

/// The headers of an answer: room for all of them is made at once.
pub(crate) const HEADERS: usize = 12;

/// What the handlers of a request are given.
#[derive(Clone, Copy)]
pub(crate) struct Ctx<'a> {
    pub(crate) door: &'a Arc<Inner>,
    pub(crate) conn: &'a Arc<Conn>,
}

/// Answers a request, also one that may not be served.
pub(crate) async fn answer(door: &Arc<Inner>, conn: &Arc<Conn>, request: Request<Incoming>) -> Answer {
    let is_http2 = request.version() == Version::HTTP_2;
    if is_http2 {
        conn.load.note_http2();
    }
    let (mut answer, origin) = match door.guard.check(&request) {
        Err(problem) if is_grpc(&request) && is_http2 => (refused_call(&problem), None),
        Err(problem) => (problem.into_answer(), None),
        Ok(Passed::Ours) => (served(Ctx { door, conn }, request).await, None),
        Ok(Passed::Allowed(origin)) if is_preflight(&request) => {
            let mut answer = Answer::new(full(""));
            *answer.status_mut() = StatusCode::NO_CONTENT;
            allow_preflight(answer.headers_mut());
            (answer, Some(origin))
        }
        Ok(Passed::Allowed(origin)) => (served(Ctx { door, conn }, request).await, Some(origin)),
    };
    if is_http2 {
        // A connection lives on while one of its streams stands still.
        answer = answer.map(|body| body.watched(conn));
    }
    let headers = answer.headers_mut();
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    let closed = HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'; sandbox");
    headers.entry(CONTENT_SECURITY_POLICY).or_insert(closed);
    if !door.guard.origins.is_empty() {
        headers.append(VARY, HeaderValue::from_static("Origin"));
    }
    let resource_policy = if origin.is_some() { "cross-origin" } else { "same-origin" };
    headers.insert(RESOURCE_POLICY, HeaderValue::from_static(resource_policy));
    if let Some(origin) = origin {
        allow(headers, origin);
    }
    answer
}

/// Also what only begins like it: it is nothing for REST.
fn is_grpc<B>(request: &Request<B>) -> bool {
    let kind = request.headers().get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    kind.starts_with(b"application/grpc")
}

/// A refusal as gRPC says it: an answer of trailers alone, with PERMISSION_DENIED.
fn refused_call(problem: &Problem) -> Answer {
    let mut answer = Answer::new(full(""));
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-status", HeaderValue::from_static("7"));
    let message = problem.detail().replace('%', "%25");
    headers
        .extend(HeaderValue::from_str(&message).ok().map(|message| (HeaderName::from_static("grpc-message"), message)));
    answer
}

fn is_preflight<B>(request: &Request<B>) -> bool {
    *request.method() == Method::OPTIONS && request.headers().contains_key("access-control-request-method")
}

async fn served(ctx: Ctx<'_>, request: Request<Incoming>) -> Answer {
    if is_grpc(&request) {
        let calls = if request.version() == Version::HTTP_2 { ctx.conn.calls(ctx.door) } else { None };
        return match calls {
            Some(calls) => calls.call(request).await.map(of_calls),
            None => Problem::new("coded-content", "no gRPC is served here, or not by HTTP/1.1").into_answer(),
        };
    }
    let (start, uri) = (Instant::now(), request.uri().clone());
    let answer = route(ctx, uri.path(), request).await.unwrap_or_else(Problem::into_answer);
    ctx.door.counted.answered(uri.path(), start.elapsed(), answer.status());
    answer
}

/// What answers a path. The futures of those that are not called all the time are boxed: a request takes no more room than they need.
async fn route(ctx: Ctx<'_>, path: &str, request: Request<Incoming>) -> Result<Answer, Problem> {
    if let Some(figures) = figures::route(ctx, path, &request).await {
        return figures;
    }
    if ctx.door.options.only_figures {
        return Err(no_such_path());
    }
    if let Some(key) = path.strip_prefix("/v1/kv/") {
        return kv::one(ctx, key, request).await;
    }
    if let Some(key) = path.strip_prefix("/v1/trace/") {
        return look::trace(ctx, key, &request);
    }
    if let Some(method) = path.strip_prefix(go_kv::SERVICE) {
        return Box::pin(go_kv::call(ctx, method, request)).await;
    }
    match path {
        "/v1/kv" => match *request.method() {
            Method::GET | Method::HEAD => Box::pin(list::list(ctx, request)).await,
            Method::DELETE => Box::pin(kv::delete_all(ctx, &request)).await,
            _ => Err(Problem::method("GET, HEAD, DELETE")),
        },
        "/v1/batch" => Box::pin(batch::batch(ctx, request)).await,
        "/v1/watch" => Box::pin(watch::watch(ctx, request)).await,
        "/v1/ws" => ws::upgrade(ctx, request),
        "/v1/stats" => Box::pin(look::stats(ctx, &request)).await,
        "/v1/openapi.json" => look::openapi(ctx, &request),
        "/get" => Box::pin(seed::get(ctx, request)).await,
        "/getall" => Box::pin(seed::get_all(ctx)).await,
        "/set" => Box::pin(seed::set(ctx, request)).await,
        "/subscribe" => seed::subscribe(ctx, request),
        _ => page::file(ctx, path, &request).unwrap_or_else(|| Err(no_such_path())),
    }
}

fn no_such_path() -> Problem {
    Problem::new("no-such-path", "see /v1/openapi.json for what there is; a key is under /v1/kv/")
}

/// Refuses all but reads.
pub(crate) fn only_get<B>(request: &Request<B>) -> Result<(), Problem> {
    match *request.method() {
        Method::GET | Method::HEAD => Ok(()),
        _ => Err(Problem::method("GET, HEAD")),
    }
}

/// The parameters of a request; see [`Query::read`].
pub(crate) fn query<B>(request: &Request<B>, known: &[&str]) -> Result<Query, Problem> {
    Query::read(request.uri().query(), known)
}

/// Whether the peer takes gzip.
pub(crate) fn takes_gzip<B>(request: &Request<B>) -> bool {
    let lines = request.headers().get_all("accept-encoding").iter();
    lines.filter_map(|line| line.to_str().ok()).flat_map(|line| line.split(',')).any(|coding| {
        let (name, weight) = coding.split_once(';').unwrap_or((coding, ""));
        let is_refused = weight.trim().strip_prefix("q=").is_some_and(|q| q.trim_end_matches(['0', '.']).is_empty());
        name.trim().eq_ignore_ascii_case("gzip") && !is_refused
    })
}

/// A JSON answer, coded where that is asked for. It is no page, and not to be kept without asking again.
pub(crate) fn json(ctx: Ctx<'_>, gzip: bool, bytes: Vec<u8>) -> Answer {
    let body = crate::body::Body::counted(bytes.into(), ctx.conn);
    let mut answer = if gzip {
        let mut answer = Answer::new(body.gzip(ctx.conn));
        answer.headers_mut().insert("content-encoding", HeaderValue::from_static("gzip"));
        answer
    } else {
        Answer::new(body)
    };
    let headers = answer.headers_mut();
    headers.insert("content-type", HeaderValue::from_static("application/json"));
    headers.insert("cache-control", HeaderValue::from_static("no-cache"));
    headers.insert(VARY, HeaderValue::from_static("Accept-Encoding"));
    answer
}

/// The short JSON answer to a write.
pub(crate) fn done(bytes: Vec<u8>, tag: Option<HeaderValue>, revision: Option<u64>) -> Answer {
    let mut answer = Answer::new(full(bytes));
    let headers = answer.headers_mut();
    headers.reserve(HEADERS);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.extend(tag.map(|tag| (ETAG, tag)));
    headers.extend(revision.map(|revision| (REVISION, revision.into())));
    answer
}
