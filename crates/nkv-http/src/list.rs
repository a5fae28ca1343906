//! Many entries: as one JSON object, in pages, or as a stream of lines.

use std::ops::ControlFlow;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderValue, Request};
use nkv_core::{Key, KeyRef, Pattern, RecordRef};
use nkv_node::Handle;

use crate::body::{Answer, Body, BoxError, CHUNK_LEN, Source};
use crate::entry::{write_number, write_record};
use crate::making::{FIRST_LEN, Making};
use crate::problem::Problem;
use crate::route::{Ctx, json, query, takes_gzip};

/// Entries of a page when nothing is said, and at most.
const LIMIT: u64 = 1_000;
const LIMIT_MAX: u64 = 10_000;

/// A page has no more bytes of keys and values than this, and one entry at least.
const LEN_MAX: usize = 64 << 20;

/// What is written in one turn.
pub(crate) const PART_LEN: usize = 256 << 10;

/// Entries that are of one moment, at most.
const PART_KEYS: u64 = 1_024;

const LINES: &str = "application/x-ndjson";

/// `GET /v1/kv`.
pub(crate) async fn list<B>(ctx: Ctx<'_>, request: Request<B>) -> Result<Answer, Problem> {
    let query = query(&request, &["pattern", "limit", "after", "values", "format"])?;
    let pattern = query.get("pattern").unwrap_or("*");
    let pattern = Pattern::new(pattern).map_err(|error| Problem::new("invalid-key", error.to_string()))?;
    let after = query.get("after").filter(|after| !after.is_empty()).map(Key::new).transpose();
    let after = after.map_err(|error| Problem::new("invalid-key", format!("'after': {error}")))?;
    let walk = Walk {
        handle: ctx.door.handle.clone(),
        pattern,
        after,
        limit: query.number("limit")?,
        with_values: query.flag("values", true)?,
    };
    let is_lines = match query.get("format") {
        None => request.headers().get(ACCEPT).is_some_and(|accept| accept == LINES),
        Some("json") => false,
        Some("ndjson") => true,
        Some(_) => return Err(Problem::bad("'format' is json or ndjson")),
    };
    let gzip = takes_gzip(&request);
    drop((query, request));
    if is_lines { Ok(lines(ctx, gzip, walk)) } else { page(ctx, gzip, walk).await }
}

async fn page(ctx: Ctx<'_>, gzip: bool, mut walk: Walk) -> Result<Answer, Problem> {
    let limit = walk.limit.unwrap_or(LIMIT);
    if limit == 0 || limit > LIMIT_MAX {
        return Err(Problem::bad(format!("'limit' is from 1 to {LIMIT_MAX}; for more, go on with 'after'")));
    }
    walk.limit = Some(limit);
    let handle = &ctx.door.handle;
    let mut making = Making::new(ctx);
    let (epoch, revision) = (handle.epoch(), handle.revision());
    let mut out = b"{\"entries\":[".to_vec();
    // What is short needs no turn.
    let mut is_first = true;
    let more = loop {
        let len = out.len();
        let at_least = if std::mem::take(&mut is_first) { FIRST_LEN } else { PART_LEN };
        // A little at a time, so that it is counted before there is much of it.
        let part_max = LEN_MAX.min(len.saturating_add(at_least));
        if !walk.part(&mut out, b',', part_max, at_least == PART_LEN)? {
            break false;
        }
        if walk.limit == Some(0) || out.len() >= LEN_MAX || part_max == LEN_MAX && out.len() == len {
            break true;
        }
        making.turn().await;
        making.grow(out.len()).await;
        tokio::task::yield_now().await;
    };
    if out.ends_with(b",") {
        out.pop();
    }
    out.extend_from_slice(if more { b"],\"more\":true" } else { b"],\"more\":false" });
    out.extend_from_slice(format!(",\"epoch\":\"{epoch}\",\"revision\":").as_bytes());
    write_number(&mut out, revision.get());
    out.extend_from_slice(b"}\n");
    let answer = json(ctx, gzip, out);
    drop(making);
    Ok(answer)
}

/// Without a limit, if none is given.
fn lines(ctx: Ctx<'_>, gzip: bool, walk: Walk) -> Answer {
    let body = Body::long(Box::new(Lines { walk: Some(walk) }), None, ctx.conn);
    let mut answer = if gzip {
        let mut answer = Answer::new(body.gzip(ctx.conn));
        answer.headers_mut().insert("content-encoding", HeaderValue::from_static("gzip"));
        answer
    } else {
        Answer::new(body)
    };
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(LINES));
    headers.insert("cache-control", HeaderValue::from_static("no-cache"));
    headers.insert("vary", HeaderValue::from_static("Accept, Accept-Encoding"));
    answer
}

/// Goes through the entries, part by part.
pub(crate) struct Walk {
    handle: Handle,
    pattern: Pattern,
    after: Option<Key>,
    /// How many are left.
    limit: Option<u64>,
    with_values: bool,
}

impl Walk {
    /// Through all entries.
    pub(crate) fn all(handle: Handle) -> Self {
        Walk { handle, pattern: Pattern::All, after: None, limit: None, with_values: true }
    }

    /// Writes the next entries, each with `end` behind it, as [`part_by`](Self::part_by).
    fn part(&mut self, out: &mut Vec<u8>, end: u8, len_max: usize, at_least_one: bool) -> Result<bool, Problem> {
        let with_values = self.with_values;
        self.part_by(out, len_max, at_least_one, |out, record, left| {
            write_record(out, record, with_values, left);
            out.push(end);
        })
    }

    /// Writes the next entries, each with the time that is left to it, until there are `len_max` bytes in all; whether there is more.
    /// One may be longer than that, if it is to be one at least.
    pub(crate) fn part_by(
        &mut self,
        out: &mut Vec<u8>,
        len_max: usize,
        at_least_one: bool,
        mut write: impl FnMut(&mut Vec<u8>, RecordRef<'_>, Option<Duration>),
    ) -> Result<bool, Problem> {
        let (mut count, max) = (0_u64, self.limit.unwrap_or(u64::MAX).min(PART_KEYS));
        let (begin, mut last) = (out.len(), None);
        let handle = self.handle.clone();
        let ended = self.handle.walk(&self.pattern, self.after.as_ref(), |record: RecordRef<'_>| {
            let is_full =
                out.len().saturating_add(record.value.len()) > len_max && (out.len() > begin || !at_least_one);
            if count >= max || is_full {
                return ControlFlow::Break(());
            }
            write(out, record, record.expiry.map(|expiry| handle.time_left(expiry)));
            count = count.saturating_add(1);
            last = Some(KeyRef::to_key(record.key));
            ControlFlow::Continue(())
        })?;
        self.after = last.or(self.after.take());
        self.limit = self.limit.map(|limit| limit.saturating_sub(count));
        Ok(ended.is_break())
    }
}

struct Lines {
    walk: Option<Walk>,
}

impl Source for Lines {
    fn poll_next(&mut self, _: &mut Context<'_>) -> Poll<Option<Result<Bytes, BoxError>>> {
        let Some(walk) = &mut self.walk else { return Poll::Ready(None) };
        let mut out = Vec::new();
        // An end that is none must not look like one.
        let more = match walk.part(&mut out, b'\n', CHUNK_LEN, true) {
            Ok(more) => more,
            Err(problem) => return Poll::Ready(Some(Err(problem.detail().into()))),
        };
        if !more || walk.limit == Some(0) {
            self.walk = None;
        }
        Poll::Ready((!out.is_empty()).then(|| Ok(out.into())))
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use nkv_node::Node;

    use super::*;

    #[tokio::test]
    async fn lines_that_break_off_do_not_look_complete() {
        let node = Node::builder().start().await.unwrap();
        let handle = node.handle();
        for key in ["a", "b"] {
            handle.put(key, vec![b'x'; CHUNK_LEN]).await.unwrap();
        }
        let mut lines = Lines { walk: Some(Walk::all(handle)) };
        let mut cx = Context::from_waker(Waker::noop());
        assert!(matches!(lines.poll_next(&mut cx), Poll::Ready(Some(Ok(_)))));
        node.shutdown().await.unwrap();
        let Poll::Ready(Some(Err(error))) = lines.poll_next(&mut cx) else { panic!("it looks complete") };
        assert!(error.to_string().contains("stopped"), "{error}");
    }
}
