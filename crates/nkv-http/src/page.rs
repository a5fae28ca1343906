//! The page at `/`: files of this crate, without anything from elsewhere.

use http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use http::{HeaderValue, Request};

use crate::body::Answer;
use crate::problem::Problem;
use crate::route::{Ctx, json, only_get};

/// What the page may load and run: its own files.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const HTML: &str = "text/html; charset=utf-8";

/// By path: the type and the text.
const FILES: &[(&str, &str, &str)] = &[("/", HTML, "<!doctype html><title>nkv</title>")];

/// The file of the page at this path.
pub(crate) fn file<B>(ctx: Ctx<'_>, path: &str, request: &Request<B>) -> Option<Result<Answer, Problem>> {
    let (_, kind, text) = FILES.iter().find(|(name, ..)| *name == path)?;
    Some(only_get(request).map(|()| {
        let mut answer = json(ctx, request, text.as_bytes().to_vec());
        let headers = answer.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        answer
    }))
}
