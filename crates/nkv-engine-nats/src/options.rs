//! Which servers, which bucket, and how.

use std::path::PathBuf;
use std::time::Duration;

use nkv_node::EngineError;

/// How an engine reaches its bucket.
///
/// # Examples
///
/// ```
/// use nkv_engine_nats::Options;
///
/// let options = Options::from_url("nats://n1,n2:4333/lamps")?.with_user("nkv", "/etc/nkv/password");
/// assert_eq!((options.bucket(), options.servers().len()), ("lamps", 2));
/// assert!(Options::from_url("nats://nkv:secret@n1/lamps").is_err(), "a password in a URL is seen by others");
/// # Ok::<(), nkv_node::EngineError>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    servers: Vec<String>,
    bucket: String,
    pub(crate) create: bool,
    pub(crate) replicas: usize,
    pub(crate) is_tls: bool,
    pub(crate) ca: Option<PathBuf>,
    pub(crate) identity: Option<(PathBuf, PathBuf)>,
    pub(crate) user: Option<(String, PathBuf)>,
    pub(crate) credentials: Option<PathBuf>,
    pub(crate) marker_age: Duration,
    pub(crate) value_len_max: usize,
}

impl Options {
    /// A bucket at servers, each `HOST`, `HOST:PORT` or such a URL with `nats://` or `tls://`; 4222 is the port if none is
    /// given. One that answers is enough.
    ///
    /// # Errors
    ///
    /// [`EngineError::Refused`] with 400: no server, or no name of a bucket (letters, digits, `_` and `-`, 255 at most), or
    /// a user or password in a URL.
    pub fn new(
        servers: impl IntoIterator<Item = impl Into<String>>,
        bucket: impl Into<String>,
    ) -> Result<Self, EngineError> {
        let (mut urls, mut is_tls) = (Vec::new(), false);
        for server in servers {
            let server = server.into();
            is_tls |= server.starts_with("tls://");
            urls.push(url_of(&server)?);
        }
        let bucket = bucket.into();
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
        if urls.is_empty() {
            return Err(refused("no NATS server is named"));
        }
        if bucket.is_empty() || bucket.len() > 255 || !bucket.bytes().all(is_name) {
            let what = "is no name of a bucket: that has letters, digits, '_' and '-', 1 to 255 of them";
            return Err(refused(format!("'{bucket}' {what}")));
        }
        Ok(Options {
            servers: urls,
            bucket,
            create: true,
            replicas: 1,
            is_tls,
            ca: None,
            identity: None,
            user: None,
            credentials: None,
            marker_age: Duration::from_secs(30 * 60),
            value_len_max: 1 << 20,
        })
    }

    /// As [`new`](Self::new), from `nats://HOST[:PORT][,HOST[:PORT]…]/BUCKET`, or `tls://…`.
    ///
    /// # Errors
    ///
    /// Those of [`new`](Self::new).
    pub fn from_url(url: &str) -> Result<Self, EngineError> {
        let form = "the form is nats://HOST[:PORT][,HOST[:PORT]…]/BUCKET";
        let (scheme, rest) = url.split_once("://").ok_or_else(|| refused(form))?;
        if !matches!(scheme, "nats" | "tls") {
            return Err(refused(format!("'{scheme}' is no scheme of NATS: {form}")));
        }
        // Before anything of it is shown.
        if rest.contains('@') {
            return Err(no_secret());
        }
        let (servers, bucket) = rest.split_once('/').ok_or_else(|| refused(form))?;
        Self::new(servers.split(',').map(|server| format!("{scheme}://{server}")), bucket)
    }

    /// Whether a bucket that does not exist is created. It is, by default.
    #[must_use]
    pub fn with_create(self, create: bool) -> Self {
        Options { create, ..self }
    }

    /// On how many servers a bucket is kept that is created: 1 (the default), 3 or 5.
    #[must_use]
    pub fn with_replicas(self, replicas: usize) -> Self {
        Options { replicas, ..self }
    }

    /// Uses TLS, and trusts the certificates of this file alone.
    #[must_use]
    pub fn with_ca(self, ca: impl Into<PathBuf>) -> Self {
        Options { is_tls: true, ca: Some(ca.into()), ..self }
    }

    /// Uses TLS, and shows this certificate, whose key is in the second file.
    #[must_use]
    pub fn with_identity(self, certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        Options { is_tls: true, identity: Some((certificate.into(), key.into())), ..self }
    }

    /// Logs in as a user, with the password that a file has; it is read at each login.
    #[must_use]
    pub fn with_user(self, user: impl Into<String>, password_file: impl Into<PathBuf>) -> Self {
        Options { user: Some((user.into(), password_file.into())), ..self }
    }

    /// Logs in with a `.creds` file; it is read at each login.
    #[must_use]
    pub fn with_credentials(self, file: impl Into<PathBuf>) -> Self {
        Options { credentials: Some(file.into()), ..self }
    }

    /// How old the marker of a delete gets before it is purged, so that deletes do not grow the bucket for ever. 30 minutes by
    /// default. It is to be the same for all nodes of a bucket.
    #[must_use]
    pub fn with_marker_age(self, marker_age: Duration) -> Self {
        Options { marker_age, ..self }
    }

    /// The longest value that is shown, in bytes: a longer one, which another program has put, is absent for readers. 1 MiB by
    /// default, as the node's own limit.
    #[must_use]
    pub fn with_value_len_max(self, value_len_max: usize) -> Self {
        Options { value_len_max, ..self }
    }

    /// The name of the bucket.
    #[must_use]
    pub fn bucket(&self) -> &str {
        &self.bucket
    }

    /// The URLs of the servers.
    #[must_use]
    pub fn servers(&self) -> &[String] {
        &self.servers
    }
}

fn url_of(server: &str) -> Result<String, EngineError> {
    let (scheme, host) = server.split_once("://").unwrap_or(("nats", server));
    if host.contains('@') {
        return Err(no_secret());
    }
    if !matches!(scheme, "nats" | "tls") || host.is_empty() || host.contains(['/', ' ', '?', '#']) {
        return Err(refused(format!("'{server}' is no address of a NATS server: that is HOST or HOST:PORT")));
    }
    let url = format!("{scheme}://{host}");
    match url.parse::<async_nats::ServerAddr>() {
        Ok(_) => Ok(url),
        Err(error) => Err(refused(format!("'{server}' is no address of a NATS server: {error}"))),
    }
}

fn no_secret() -> EngineError {
    refused("a URL has no user and no password, which others could see: use --engine-user and --engine-password-file")
}

fn refused(message: impl Into<String>) -> EngineError {
    EngineError::Refused { status: 400, message: message.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(url: &str) -> String {
        Options::from_url(url).unwrap_err().to_string()
    }

    #[test]
    fn a_url_names_servers_and_a_bucket() {
        let options = Options::from_url("nats://h1,h2:4333,[::1]:4444/b_1-x").unwrap();
        assert_eq!(options.servers(), ["nats://h1", "nats://h2:4333", "nats://[::1]:4444"]);
        assert_eq!((options.bucket(), options.is_tls), ("b_1-x", false));
        assert!(Options::from_url("tls://h1/b").unwrap().is_tls);
        assert_eq!(Options::new(["h1"], "b").unwrap().servers(), ["nats://h1"]);
    }

    #[test]
    fn what_is_no_url_is_refused_by_name() {
        for url in [
            "h1/b",
            "nats://h1",
            "nats://h1/",
            "nats:///b",
            "nats://h1,/b",
            "http://h1/b",
            "nats://h1/a.b",
            "nats://h1/a/b",
        ] {
            let message = refusal(url);
            assert!(
                message.contains("form") || message.contains("name of a bucket") || message.contains("address"),
                "{message}"
            );
        }
    }

    #[test]
    fn a_password_in_a_url_is_refused_and_not_repeated() {
        for url in ["nats://me:geheim@h1/b", "nats://geheim@h1/b", "nats://h1,me:geheim@h2/b"] {
            let message = refusal(url);
            assert!(message.contains("--engine-password-file") && !message.contains("geheim"), "{message}");
        }
        let message = Options::new(["me:geheim@h1"], "b").unwrap_err().to_string();
        assert!(message.contains("--engine-password-file") && !message.contains("geheim"), "{message}");
    }
}
