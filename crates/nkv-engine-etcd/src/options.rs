//! Options of the engine: where etcd is.

use std::path::{Path, PathBuf};

use percent_encoding::percent_decode_str;
use thiserror::Error;

const PORT: &str = "2379";
/// etcd's default limit of a request, less what is around the value.
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
    pub(crate) user: Option<(String, PathBuf)>,
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
    /// There is a user, or a password.
    #[error("a URL has no user and no password, which others could see: use --engine-user and --engine-password-file")]
    Password,
}

impl Options {
    /// These servers, each as `HOST:PORT`, and the keys below `prefix` and a slash.
    ///
    /// # Errors
    ///
    /// [`OptionsError`] where there is no server or no prefix, or a user or password before a server. Slashes at the end of the
    /// prefix are none of it.
    pub fn new(servers: impl IntoIterator<Item = String>, prefix: &str) -> Result<Self, OptionsError> {
        let servers: Vec<String> = servers.into_iter().map(|server| with_port(&server)).collect();
        // Before anything of it is shown.
        if servers.iter().any(|server| server.contains('@')) {
            return Err(OptionsError::Password);
        }
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
            create: true,
            value_len_max: VALUE_LEN_MAX,
        })
    }

    /// From `etcd://HOST[:PORT][,HOST[:PORT]...]/PREFIX`. The prefix is what stands behind the first slash, with `%XX` for
    /// what a URL does not take: `etcd://db1/app` has the keys `app/KEY`, `etcd://db1//app` the keys `/app/KEY`. With `etcds` the
    /// connection is TLS, checked by the certificates that the system trusts unless [`with_ca`](Self::with_ca) names others.
    ///
    /// # Errors
    ///
    /// [`OptionsError`]: another form, no prefix, or a user or password.
    pub fn from_url(url: &str) -> Result<Self, OptionsError> {
        let form = || OptionsError::Form(without_password(url));
        let (scheme, rest) = url.split_once("://").ok_or_else(form)?;
        let is_tls = match scheme {
            "etcd" => false,
            "etcds" => true,
            _ => return Err(form()),
        };
        let (servers, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if prefix.contains(['?', '#']) {
            return Err(form());
        }
        let prefix = percent_decode_str(prefix).decode_utf8().map_err(|_| form())?;
        let options = Options::new(servers.split(',').map(String::from), &prefix)?;
        Ok(Options { is_tls, ..options })
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
        Options { user: Some((name.into(), password_file.as_ref().to_owned())), ..self }
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
        for url in ["etcd://me:secret@a/p", "etcd://me@a/p", "etcd://a,me:secret@b/p"] {
            let refused = Options::from_url(url).unwrap_err();
            assert_eq!(refused, OptionsError::Password, "{url}");
            assert!(refused.to_string().contains("--engine-password-file"));
        }
        let refused = Options::new(["me:secret@a:1".to_owned()], "p").unwrap_err();
        assert_eq!(refused, OptionsError::Password);
        let refused = Options::from_url("etcdx://me:secret@a/p").unwrap_err();
        assert!(!refused.to_string().contains("secret"), "{refused}");
        assert_eq!(of("etcd://a/p@q"), Ok(("a:2379".into(), "p@q".into())));
        let named = Options::from_url("etcds://a/p").unwrap().with_user("m@e", "password");
        assert_eq!((named.user, named.is_tls), (Some(("m@e".into(), "password".into())), true));
    }
}
