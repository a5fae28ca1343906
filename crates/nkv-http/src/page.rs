//! The page at `/`: files of this crate, without anything from elsewhere.

use http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use http::{HeaderValue, Request};

use crate::body::Answer;
use crate::problem::Problem;
use crate::route::{Ctx, json, only_get, takes_gzip};

/// What the page may load and run: its own files.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// By path: the type and the text.
const FILES: &[(&str, &str, &str)] = &[
    ("/", HTML, include_str!("../page/index.html")),
    ("/page/app.css", "text/css; charset=utf-8", include_str!("../page/app.css")),
    ("/page/app.js", SCRIPT, include_str!("../page/app.js")),
    ("/page/connection.js", SCRIPT, include_str!("../page/connection.js")),
    ("/page/editor.js", SCRIPT, include_str!("../page/editor.js")),
    ("/page/feed.js", SCRIPT, include_str!("../page/feed.js")),
    ("/page/figures.js", SCRIPT, include_str!("../page/figures.js")),
    ("/page/format.js", SCRIPT, include_str!("../page/format.js")),
    ("/page/store.js", SCRIPT, include_str!("../page/store.js")),
    ("/page/tree.js", SCRIPT, include_str!("../page/tree.js")),
    ("/page/value.js", SCRIPT, include_str!("../page/value.js")),
];

/// The file of the page at this path.
pub(crate) fn file<B>(ctx: Ctx<'_>, path: &str, request: &Request<B>) -> Option<Result<Answer, Problem>> {
    let (_, kind, text) = FILES.iter().find(|(name, ..)| *name == path)?;
    Some(only_get(request).map(|()| {
        let mut answer = json(ctx, takes_gzip(request), text.as_bytes().to_vec());
        let headers = answer.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        answer
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the page names is there, and nothing from elsewhere.
    #[test]
    fn the_page_loads_nothing_that_is_not_embedded() {
        for (path, _, text) in FILES {
            for line in text.lines() {
                let named = line.split(['"', '\'']).filter(|part| part.ends_with(".js") || part.ends_with(".css"));
                for name in named.filter(|_| line.contains("import") || line.contains("src=") || line.contains("href="))
                {
                    let name = name.rsplit('/').next().unwrap_or_default();
                    assert!(FILES.iter().any(|(known, ..)| *known == format!("/page/{name}")), "{path}: {name}");
                }
                assert!(!line.contains("innerHTML") && !line.contains("eval("), "{path}: {line}");
                let outside = line.contains("http://") || line.contains("https://");
                assert!(!outside || line.contains("www.w3.org"), "{path}: {line}");
            }
        }
    }
}
