//! No foreign web page may reach the store: which host a request is for (`Host`), and where it says it comes from (`Origin`,
//! `Sec-Fetch-Site`), before anything else is looked at.
//!
//! A browser sends a page's requests wherever the page wants. What the page cannot forge is `Origin`, `Sec-Fetch-*`, and the name in
//! `Host`, which is foreign where a name of the attacker's was made to point to this host (DNS rebinding). Programs that are no browsers
//! send neither, and are not held up.

use std::net::{Ipv4Addr, Ipv6Addr};

use http::header::{HOST, ORIGIN};
use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Version};

use crate::problem::Problem;

/// The port where none is named.
const HTTP_PORT: u16 = 80;

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Whose requests are served.
#[derive(Clone, Debug, Default)]
pub(crate) struct Guard {
    /// Names of this server besides `localhost`, in lower case.
    pub(crate) hosts: Vec<String>,
    /// Origins whose pages may use the store.
    pub(crate) origins: Vec<Origin>,
    /// Any host: for a door that shows figures and nothing else.
    pub(crate) any_host: bool,
}

/// Where a page comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Origin {
    scheme: String,
    host: Host,
    port: u16,
}

/// A host as a URL names it, in one form.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Host {
    V4(Ipv4Addr),
    V6(Ipv6Addr),
    Name(String),
}

/// What a request that may be served gets in its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Passed {
    /// No page of another origin sent it.
    Ours,
    /// A page of this origin did, which is allowed.
    Allowed(HeaderValue),
}

impl Guard {
    /// Whether to serve it.
    pub(crate) fn check<B>(&self, request: &Request<B>) -> Result<Passed, Problem> {
        let headers = request.headers();
        let target = named(request)?;
        let Some((host, port)) = target else {
            // Such as a load balancer's HTTP/1.0: no browser sends that.
            let is_browser =
                headers.contains_key(ORIGIN) || headers.keys().any(|name| name.as_str().starts_with("sec-"));
            return match request.version() {
                Version::HTTP_10 | Version::HTTP_09 if !is_browser => Ok(Passed::Ours),
                _ => Err(Problem::bad("the request names no host")),
            };
        };
        if !self.any_host && !self.is_ours(&host) {
            let detail = "Host is an IP address, 'localhost', or a name that the server was given by --http-host";
            return Err(Problem::new("foreign-host", detail));
        }
        let mut origins = headers.get_all(ORIGIN).iter();
        match (origins.next(), origins.next()) {
            (None, _) => self.without_origin(request),
            (Some(_), Some(_)) => Err(Problem::bad("more than one Origin")),
            (Some(text), None) => {
                let origin = text.to_str().ok().and_then(Origin::read);
                match origin {
                    Some(origin) if origin.is_of(&host, port) => Ok(Passed::Ours),
                    Some(origin) if self.origins.contains(&origin) => Ok(Passed::Allowed(text.clone())),
                    _ => Err(foreign_origin()),
                }
            }
        }
    }

    /// Browsers leave `Origin` out of reads that a page cannot see, and of links.
    fn without_origin<B>(&self, request: &Request<B>) -> Result<Passed, Problem> {
        let site = request.headers().get(SEC_FETCH_SITE);
        if site.is_none_or(|site| site != "cross-site" && site != "same-site") {
            return Ok(Passed::Ours);
        }
        let is = |name: &str, value: &str| request.headers().get(name).is_some_and(|given| given == value);
        let is_link = is("sec-fetch-mode", "navigate")
            && is("sec-fetch-dest", "document")
            && matches!(*request.method(), Method::GET | Method::HEAD)
            && request.uri().path() == "/";
        if is_link { Ok(Passed::Ours) } else { Err(foreign_origin()) }
    }

    /// An address cannot be forged by a name that points somewhere else.
    fn is_ours(&self, host: &Host) -> bool {
        match host {
            Host::V4(_) | Host::V6(_) => true,
            Host::Name(name) => name == "localhost" || self.hosts.contains(name),
        }
    }
}

fn foreign_origin() -> Problem {
    let detail = "a web page of another origin may not reach the store; the server allows one by --http-allow-origin";
    Problem::new("foreign-origin", detail)
}

/// For whom a request is: the host and the port that were named, by the target, `:authority` or `Host`.
fn named<B>(request: &Request<B>) -> Result<Option<(Host, Option<u16>)>, Problem> {
    let wrong = || Problem::new("foreign-host", "Host is no host, or no host and port");
    let read = |text: &str| authority(text).ok_or_else(wrong);
    let target = request.uri().authority().map(Authority::as_str).map(read).transpose()?;
    let mut hosts = request.headers().get_all(HOST).iter();
    let host = hosts.next().map(|text| text.to_str().map_err(|_| wrong()).and_then(read)).transpose()?;
    if hosts.next().is_some() {
        return Err(Problem::bad("more than one Host"));
    }
    match (target, host) {
        (Some((target, port)), Some((host, other)))
            if target != host || port.unwrap_or(HTTP_PORT) != other.unwrap_or(HTTP_PORT) =>
        {
            Err(Problem::bad("the target and Host name different hosts"))
        }
        (target, host) => Ok(target.or(host)),
    }
}

/// Reads `HOST` or `HOST:PORT`, the whole of it.
fn authority(text: &str) -> Option<(Host, Option<u16>)> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (address, behind) = rest.split_once(']')?;
            let port = if behind.is_empty() { None } else { Some(behind.strip_prefix(':')?) };
            (Host::V6(address.parse().ok()?), port)
        }
        None => {
            let (host, port) = text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port)));
            (Host::named(host)?, port)
        }
    };
    let port = match port {
        // `host:` is the same as `host`.
        None | Some("") => None,
        Some(digits) if digits.bytes().all(|byte| byte.is_ascii_digit()) => Some(digits.parse().ok()?),
        Some(_) => return None,
    };
    Some((host, port))
}

impl Host {
    fn named(text: &str) -> Option<Host> {
        if let Ok(address) = text.parse() {
            return Some(Host::V4(address));
        }
        let is_name = !text.is_empty()
            && text.len() <= 253
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'));
        is_name.then(|| Host::Name(text.to_ascii_lowercase()))
    }
}

impl Origin {
    /// Reads `SCHEME://HOST` or `SCHEME://HOST:PORT`, the whole of it.
    pub(crate) fn read(text: &str) -> Option<Origin> {
        let (scheme, rest) = text.split_once("://")?;
        let scheme = scheme.to_ascii_lowercase();
        let default = match scheme.as_str() {
            "http" => 80,
            "https" => 443,
            _ => return None,
        };
        let (host, port) = authority(rest)?;
        Some(Origin { scheme, host, port: port.unwrap_or(default) })
    }

    /// Whether a page of it is one of this host and port; where no port was named, that of its scheme is meant.
    fn is_of(&self, host: &Host, port: Option<u16>) -> bool {
        let default = if self.scheme == "https" { 443 } else { 80 };
        self.host == *host && self.port == port.unwrap_or(default)
    }
}

/// A name for `--http-host`, as it is compared.
pub(crate) fn host_name(text: &str) -> Option<String> {
    match Host::named(text)? {
        Host::Name(name) => Some(name),
        Host::V4(_) | Host::V6(_) => None,
    }
}

/// The headers that go with an answer, so that a page of an allowed origin can read it.
pub(crate) fn allow(headers: &mut HeaderMap, origin: HeaderValue) {
    headers.insert("access-control-allow-origin", origin);
    headers.insert("access-control-expose-headers", HeaderValue::from_static("etag, nkv-revision, nkv-ttl-ms"));
}

/// What a preflight of an allowed origin is answered.
pub(crate) fn allow_preflight(headers: &mut HeaderMap) {
    headers.insert("access-control-allow-methods", HeaderValue::from_static("GET, HEAD, PUT, DELETE, POST"));
    let names = HeaderValue::from_static("content-type, if-match, if-none-match, last-event-id, cache-control");
    headers.insert("access-control-allow-headers", names);
    headers.insert("access-control-max-age", HeaderValue::from_static("600"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard() -> Guard {
        Guard {
            hosts: vec!["nkv.example".into()],
            origins: vec![Origin::read("http://app.example:8080").unwrap()],
            any_host: false,
        }
    }

    fn check(lines: &[(&str, &str)]) -> Result<Passed, Problem> {
        let mut request = Request::get("/v1/kv/a");
        for (name, value) in lines {
            request = request.header(*name, *value);
        }
        guard().check(&request.body(()).unwrap())
    }

    #[test]
    fn only_hosts_that_no_rebinding_can_forge_are_ours() {
        for ours in [
            "127.0.0.1:4000",
            "127.0.0.1",
            "127.0.0.1:",
            "0.0.0.0:23333",
            "[::1]:4000",
            "[::1]",
            "localhost",
            "LOCALHOST:1",
            "192.0.2.1",
            "nkv.example:80",
            "NKV.example",
        ] {
            assert_eq!(check(&[("host", ours)]).unwrap(), Passed::Ours, "{ours}");
        }
        for foreign in [
            "evil.com",
            "127.0.0.1.evil.com",
            "[::1].evil.com",
            "127.0.0.1:1.evil.com",
            "evil.com@127.0.0.1",
            "localhost.",
            "localhost.evil.com",
            "",
            ":80",
            "127.0.0.1:65536",
            "127.0.0.1:+1",
            "[::1",
            "[fe80::1%eth0]",
            "127.1",
            "0x7f000001",
            "127.0.0.1 ",
            "a b",
            "evil.com/127.0.0.1",
            "127.0.0.1#",
            "::1",
        ] {
            assert!(check(&[("host", foreign)]).is_err(), "{foreign}");
        }
        assert!(check(&[("host", "127.0.0.1"), ("host", "127.0.0.1")]).is_err(), "two of them");
        assert!(check(&[]).is_err(), "none");
    }

    #[test]
    fn the_target_counts_as_the_host_does() {
        let of = |uri: &str, host: Option<&str>| {
            let mut request = Request::get(uri);
            if let Some(host) = host {
                request = request.header("host", host);
            }
            guard().check(&request.body(()).unwrap())
        };
        assert!(of("http://127.0.0.1:1/a", None).is_ok());
        assert!(of("http://127.0.0.1:1/a", Some("127.0.0.1:1")).is_ok());
        assert!(of("http://127.0.0.1/a", Some("127.0.0.1:80")).is_ok());
        assert!(of("http://evil.com/a", Some("127.0.0.1")).is_err());
        assert!(of("http://127.0.0.1/a", Some("localhost")).is_err());
        let old = Request::get("/readyz").version(Version::HTTP_10).body(()).unwrap();
        assert!(guard().check(&old).is_ok(), "a load balancer");
    }

    #[test]
    fn only_pages_of_this_server_and_allowed_ones_pass() {
        let from = |origin: &str| check(&[("host", "localhost:4000"), ("origin", origin)]);
        assert_eq!(from("http://localhost:4000").unwrap(), Passed::Ours);
        assert_eq!(from("http://LOCALHOST:4000").unwrap(), Passed::Ours);
        assert!(matches!(from("http://app.example:8080").unwrap(), Passed::Allowed(_)));
        for foreign in [
            "null",
            "",
            "http://localhost",
            "http://localhost:4001",
            "http://localhost:4000.evil.com",
            "http://evil.com",
            "http://127.0.0.1:4000",
            "file://",
            "http://app.example",
            "https://app.example:8080",
            "http://localhost:4000/",
        ] {
            assert!(from(foreign).is_err(), "{foreign}");
        }
        let page = ("origin", "https://nkv.example");
        assert_eq!(check(&[("host", "nkv.example"), page]).unwrap(), Passed::Ours, "behind a proxy with TLS");
        assert_eq!(check(&[("host", "nkv.example:443"), page]).unwrap(), Passed::Ours);
        assert!(check(&[("host", "nkv.example:80"), page]).is_err());
    }

    #[test]
    fn what_a_foreign_page_loads_is_refused_and_a_link_to_the_page_is_not() {
        let host = ("host", "localhost");
        for site in ["cross-site", "same-site"] {
            assert!(check(&[host, ("sec-fetch-site", site)]).is_err());
            assert!(check(&[host, ("sec-fetch-site", site), ("sec-fetch-mode", "navigate")]).is_err(), "a value");
            let link = Request::get("/")
                .header("host", "localhost")
                .header("sec-fetch-site", site)
                .header("sec-fetch-mode", "navigate")
                .header("sec-fetch-dest", "document");
            assert!(guard().check(&link.body(()).unwrap()).is_ok());
        }
        for site in ["none", "same-origin"] {
            assert!(check(&[host, ("sec-fetch-site", site)]).is_ok());
        }
        let allowed = ("origin", "http://app.example:8080");
        assert!(check(&[host, ("sec-fetch-site", "cross-site"), allowed]).is_ok());
    }
}
