//! Health and figures.

use http::Request;

use crate::body::{Answer, full};
use crate::problem::Problem;
use crate::route::{Ctx, only_get};

/// Answers what asks for health or figures.
pub(crate) fn route<B>(ctx: Ctx<'_>, path: &str, request: &Request<B>) -> Option<Result<Answer, Problem>> {
    let answer = match path {
        "/livez" => Ok(text("ok\n".into())),
        "/readyz" | "/healthz" => ready(ctx, request.uri().query()),
        _ => return None,
    };
    Some(only_get(request).and(answer))
}

fn ready(ctx: Ctx<'_>, query: Option<&str>) -> Result<Answer, Problem> {
    let is_verbose = query.is_some_and(|query| query.split('&').any(|part| part.starts_with("verbose")));
    ctx.door.handle.check_healthy().map_err(|error| Problem::new("unavailable", error.to_string()))?;
    let verbose = "[+]storage ok\n[+]node ok\nok\n";
    Ok(text(if is_verbose { verbose.into() } else { "ok\n".into() }))
}

fn text(text: String) -> Answer {
    let mut answer = Answer::new(full(text));
    let headers = answer.headers_mut();
    headers.insert("content-type", http::HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert("cache-control", http::HeaderValue::from_static("no-store"));
    answer
}
