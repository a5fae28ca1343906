//! How an engine is told where etcd is.

use std::path::{Path, PathBuf};

use percent_encoding::percent_decode_str;
use thiserror::Error;

const PORT: &str = "2379";
/// What etcd takes in a request unless it was told otherwise, less what is around the value.
const VALUE_LEN_MAX: usize = 1_536 * 1_024 - 16 * 1_024;

/// Where etcd is, and as whom nkv uses it.
///
/// # Examples
///
/// ```
/// use nkv_engine_etcd::Options;
///
/// let options = Options::from_url("etcd://db1,db2:2379/app")?.with_create(false);
/// assert_eq!((options.servers(), options.prefix()), (&["db1:2379".into(), "db2:2379".into()][..], "app"));
/// assert!(Options::from_url("etcd://db1/").is_err(), "a prefix is needed");
/// # Ok::<(), nkv_engine_etcd::OptionsError>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    pub(crate) servers: Vec<String>,
    pub(crate) prefix: String,
    pub(crate) is_tls: bool,
    pub(crate) ca_file: Option<PathBuf>,
    pub(crate) identity_files: Option<(PathBuf, PathBuf)>,
    pub(crate) user: Option<String>,
    pub(crate) password_file: Option<PathBuf>,
    pub(crate) create: bool,
    pub(crate) value_len_max: usize,
}

/// Why options are refused.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// Not of the form `etcd://HOST[:PORT][,HOST[:PORT]...]/PREFIX`.
    #[error("'{0}' is not of the form etcd://HOST[:PORT][,HOST[:PORT]...]/PREFIX")]
    Form(String),
    /// There is no prefix.
    #[error("an empty prefix would share all of etcd; name one behind the servers, such as etcd://HOST/nkv")]
    NoPrefix,
    /// There is a password.
    #[error("a password does not belong into a URL, where others see it: use --engine-password-file")]
    Password,
}

impl Options {
    /// These servers, each as `HOST:PORT`, and the keys below `prefix` and a slash.
    ///
    /// # Errors
    ///
    /// [`OptionsError`] where there is no server or no prefix. Slashes at the end of the prefix are none of it.
    pub fn new(servers: impl IntoIterator<Item = String>, prefix: &str) -> Result<Self, OptionsError> {
        let servers: Vec<String> = servers.into_iter().map(|server| with_port(&server)).collect();
        let is_server = |server: &String| server.parse::<tonic::codegen::http::uri::Authority>().is_ok();
        if servers.is_empty() || !servers.iter().all(is_server) {
            return Err(OptionsError::Form(servers.join(",")));
        }
        let prefix = prefix.trim_end_matches('/').to_owned();
        if prefix.is_empty() {
            return Err(OptionsError::NoPrefix);
        }
        Ok(Options {
            servers,
            prefix,
            is_tls: false,
            ca_file: None,
            identity_files: None,
            user: None,
            password_file: None,
            create: true,
            value_len_max: VALUE_LEN_MAX,
        })
    }

    /// From `etcd://[USER@]HOST[:PORT][,HOST[:PORT]...]/PREFIX`. The prefix is what stands behind the first slash, with `%XX` for
    /// what a URL does not take: `etcd://db1/app` has the keys `app/KEY`, `etcd://db1//app` the keys `/app/KEY`. With `etcds` the
    /// connection is TLS, checked by the certificates that the system trusts unless [`with_ca`](Self::with_ca) names others.
    ///
    /// # Errors
    ///
    /// [`OptionsError`]: another form, no prefix, or a password.
    pub fn from_url(url: &str) -> Result<Self, OptionsError> {
        let form = || OptionsError::Form(without_password(url));
        let (scheme, rest) = url.split_once("://").ok_or_else(form)?;
        let is_tls = match scheme {
            "etcd" => false,
            "etcds" => true,
            _ => return Err(form()),
        };
        let (servers, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let (user, servers) = servers.rsplit_once('@').map_or((None, servers), |(user, servers)| (Some(user), servers));
        if user.is_some_and(|user| user.contains(':')) {
            return Err(OptionsError::Password);
        }
        if prefix.contains(['?', '#']) {
            return Err(form());
        }
        let decoded = |text: &str| percent_decode_str(text).decode_utf8().map(String::from).map_err(|_| form());
        let mut options = Options::new(servers.split(',').map(String::from), &decoded(prefix)?)?;
        options.is_tls = is_tls;
        options.user = user.map(decoded).transpose()?;
        Ok(options)
    }

    /// Uses TLS, and trusts the certificates of this PEM file alone.
    #[must_use]
    pub fn with_ca(self, file: impl AsRef<Path>) -> Self {
        Options { is_tls: true, ca_file: Some(file.as_ref().to_owned()), ..self }
    }

    /// Uses TLS, and shows this certificate, with its private key: PEM files.
    #[must_use]
    pub fn with_identity(self, certificate: impl AsRef<Path>, key: impl AsRef<Path>) -> Self {
        let files = (certificate.as_ref().to_owned(), key.as_ref().to_owned());
        Options { is_tls: true, identity_files: Some(files), ..self }
    }

    /// Uses etcd as this user, whose password is the first line of the file. It is read anew for each login.
    #[must_use]
    pub fn with_user(self, name: impl Into<String>, password_file: impl AsRef<Path>) -> Self {
        Options { user: Some(name.into()), ..self }.with_password_file(password_file)
    }

    /// The file with the password of the user that the URL names.
    #[must_use]
    pub fn with_password_file(self, file: impl AsRef<Path>) -> Self {
        Options { password_file: Some(file.as_ref().to_owned()), ..self }
    }

    /// Whether a prefix that no nkv has used yet is taken, which is so by default, or refused.
    #[must_use]
    pub fn with_create(self, create: bool) -> Self {
        Options { create, ..self }
    }

    /// Longest value in bytes, about 1.5 MiB by default, as etcd has it. Longer ones that others write are not shown. Give the node's
    /// own limit if that is lower, or a higher one where etcd has a higher `--max-request-bytes`.
    #[must_use]
    pub fn with_value_len_max(self, value_len_max: usize) -> Self {
        Options { value_len_max, ..self }
    }

    /// The servers, each as `HOST:PORT`.
    #[must_use]
    pub fn servers(&self) -> &[String] {
        &self.servers
    }

    /// The prefix, without a slash at its end.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }
}

fn with_port(server: &str) -> String {
    let is_bare = server.rsplit_once(':').is_none_or(|(_, port)| port.parse::<u16>().is_err()) || server.ends_with(']');
    if is_bare && !server.is_empty() { format!("{server}:{PORT}") } else { server.to_owned() }
}

/// A message must not show what its text refuses.
fn without_password(url: &str) -> String {
    match url.rsplit_once('@') {
        Some((_, rest)) => format!("...@{rest}"),
        None => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_understood_or_refused_by_name() {
        let of = |url| Options::from_url(url).map(|options| (options.servers.join(" "), options.prefix));
        assert_eq!(of("etcd://a,b:1,[::1],[::1]:2/p"), Ok(("a:2379 b:1 [::1]:2379 [::1]:2".into(), "p".into())));
        assert_eq!(of("etcd://a//app/x/"), Ok(("a:2379".into(), "/app/x".into())));
        assert_eq!(of("etcd://a/p%20q"), Ok(("a:2379".into(), "p q".into())));
        for url in ["etcd://a", "etcd://a/", "etcd://a//", "etcd://a/%2f"] {
            assert_eq!(of(url), Err(OptionsError::NoPrefix), "{url}");
        }
        for url in ["", "a/p", "http://a/p", "etcd:///p", "etcd://a,,b/p", "etcd://a/p?x=1", "etcd://a b/p"] {
            assert!(matches!(of(url), Err(OptionsError::Form(_))), "{url}: {:?}", of(url));
        }
        let refused = Options::from_url("etcd://me:secret@a/p").unwrap_err();
        assert_eq!(refused, OptionsError::Password);
        assert!(refused.to_string().contains("--engine-password-file"));
        let refused = Options::from_url("etcdx://me:secret@a/p").unwrap_err();
        assert!(!refused.to_string().contains("secret"), "{refused}");
        let named = Options::from_url("etcds://m%40e@a/p").unwrap();
        assert_eq!((named.user.as_deref(), named.is_tls), (Some("m@e"), true));
    }
}
