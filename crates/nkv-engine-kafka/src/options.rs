//! Where the topic is, and how its engine behaves.

use std::path::Path;

use crate::error::{Error, Result};
use crate::properties::{apply, parse};
use crate::security::{Security, read};

/// The topic of the first kv-store, whose records have a form of their own.
const SEED_TOPIC: &str = "command-log";

/// The port of a broker whose address names none.
const PORT: u16 = 9092;

/// Longest name of a topic that Kafka takes.
const TOPIC_LEN_MAX: usize = 249;

/// Where the topic is, and how it is used.
///
/// # Examples
///
/// ```
/// use nkv_engine_kafka::Options;
///
/// let options = Options::from_url("kafka://h1:9092,h2:9092/lamps")?.with_create(false);
/// assert_eq!((options.servers(), options.topic()), (&["h1:9092".to_owned(), "h2:9092".to_owned()][..], "lamps"));
/// assert!(Options::from_url("kafka://me:secret@h1/lamps").is_err());
/// # Ok::<(), nkv_engine_kafka::Error>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    pub(crate) servers: Vec<String>,
    pub(crate) topic: String,
    pub(crate) create: bool,
    pub(crate) replicas: Option<i16>,
    pub(crate) value_len_max: usize,
    pub(crate) security: Security,
}

impl Options {
    /// The topic `topic` of the cluster that these brokers, each `host:port`, belong to.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Refused`](crate::ErrorKind::Refused) for no or unusable addresses, a topic that cannot be, and for
    /// `command-log`.
    pub fn new<S: AsRef<str>>(servers: impl IntoIterator<Item = S>, topic: &str) -> Result<Self> {
        let servers = servers.into_iter().map(|server| address(server.as_ref())).collect::<Result<Vec<_>>>()?;
        if servers.is_empty() {
            return Err(Error::refused("no Kafka broker is named"));
        }
        check_topic(topic)?;
        if topic == SEED_TOPIC {
            let message = "the topic 'command-log' has the records of the first kv-store, which are no state; name it with \
                           --kafka-log, beside a topic of its own for the engine";
            return Err(Error::refused(message));
        }
        let (topic, security) = (topic.to_owned(), Security::default());
        Ok(Options { servers, topic, create: true, replicas: None, value_len_max: 1 << 20, security })
    }

    /// The same brokers, for the log `topic` of the first kv-store.
    pub(crate) fn for_log(&self, topic: &str) -> Result<Self> {
        check_topic(topic)?;
        if topic == self.topic {
            return Err(Error::refused(format!("'{topic}' is the topic of the state; the log is another one")));
        }
        Ok(Options { topic: topic.to_owned(), ..self.clone() })
    }

    /// What a URL such as `kafka://h1:9092,h2:9092/topic` says.
    ///
    /// # Errors
    ///
    /// Those of [`new`](Self::new); also for a URL of another form, and one with a user or a password, as others can read it.
    pub fn from_url(url: &str) -> Result<Self> {
        let rest =
            url.strip_prefix("kafka://").ok_or_else(|| Error::refused("an address of Kafka begins with kafka://"))?;
        if rest.contains('@') {
            let message =
                "a user or a password in the URL is seen by others; use --engine-user and --engine-password-file";
            return Err(Error::refused(message));
        }
        if rest.contains(['?', '#']) {
            return Err(Error::refused("an address of Kafka has no parameters; use --engine-config"));
        }
        let (servers, topic) = rest.split_once('/').unwrap_or((rest, ""));
        Options::new(servers.split(','), topic)
    }

    /// Whether a topic that is not there is created: `true` by default.
    #[must_use]
    pub fn with_create(self, create: bool) -> Self {
        Options { create, ..self }
    }

    /// On how many brokers a topic that is created is kept; what the brokers have as default, by default.
    #[must_use]
    pub fn with_replicas(self, replicas: i16) -> Self {
        Options { replicas: Some(replicas), ..self }
    }

    /// Longest value, in bytes: 1 MiB by default. A topic that is created takes it; a longer one that another producer wrote
    /// is as if it was not there. The same for all nodes of a topic.
    #[must_use]
    pub fn with_value_len_max(self, value_len_max: usize) -> Self {
        Options { value_len_max, ..self }
    }

    /// The user to be, and its password. `SCRAM-SHA-512` unless [properties](Self::with_properties) name another mechanism.
    #[must_use]
    pub fn with_user(mut self, user: impl Into<String>, password: impl Into<String>) -> Self {
        self.security.user = Some((user.into(), password.into()));
        self
    }

    /// Encrypts connections, and trusts the certificates in this file (PEM).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Refused`](crate::ErrorKind::Refused) for a file that cannot be read or has no certificates, and without the
    /// feature `tls`.
    pub fn with_ca_file(mut self, path: impl AsRef<Path>) -> Result<Self> {
        self.security.trusted = Some(read("the trusted certificates", path.as_ref())?);
        self.encrypted()
    }

    /// Encrypts connections, and shows this certificate, with its chain and its key (PEM).
    ///
    /// # Errors
    ///
    /// Those of [`with_ca_file`](Self::with_ca_file).
    pub fn with_certificate_files(mut self, chain: impl AsRef<Path>, key: impl AsRef<Path>) -> Result<Self> {
        self.security.identity = Some((read("the certificate", chain.as_ref())?, read("the key", key.as_ref())?));
        self.encrypted()
    }

    fn encrypted(mut self) -> Result<Self> {
        self.security.is_encrypted = true;
        self.security.check()?;
        Ok(self)
    }

    /// Does what a text in the form of a properties file says, with the names that Kafka's clients have: `security.protocol`,
    /// `sasl.mechanism`, `sasl.username` and `sasl.password` or `sasl.jaas.config`, `ssl.ca.location`,
    /// `ssl.certificate.location`, `ssl.key.location`, and `ssl.truststore.location` and `ssl.keystore.location` of type PEM.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Refused`](crate::ErrorKind::Refused) names the first property that is not one of these: nkv sets
    /// every other property itself. Also for files that cannot be used.
    pub fn with_properties(mut self, text: &str) -> Result<Self> {
        apply(&mut self.security, parse(text)?)?;
        self.security.check()?;
        Ok(self)
    }

    /// The brokers to begin with.
    #[must_use]
    pub fn servers(&self) -> &[String] {
        &self.servers
    }

    /// The topic.
    #[must_use]
    pub fn topic(&self) -> &str {
        &self.topic
    }
}

/// An address with its port.
fn address(text: &str) -> Result<String> {
    let refuse = |what: &str| Err(Error::refused(format!("'{text}' is no address of a broker: {what}")));
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if host.ends_with(']') || !host.contains(':') => (host, Some(port)),
        // An IPv6 address without brackets, and so without a port.
        Some(_) if !text.starts_with('[') => return refuse("an IPv6 address stands in brackets"),
        _ => (text, None),
    };
    let is_bracketed = host.starts_with('[') && host.ends_with(']');
    if host.is_empty()
        || host.contains(|c: char| c.is_whitespace() || c == '/')
        || (host.contains(':') && !is_bracketed)
    {
        return refuse("it names no host");
    }
    match port.map(str::parse::<u16>) {
        None => Ok(format!("{host}:{PORT}")),
        Some(Ok(port)) if port > 0 => Ok(format!("{host}:{port}")),
        Some(_) => refuse("its port is no number from 1 to 65535"),
    }
}

fn check_topic(topic: &str) -> Result<()> {
    let is_good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let problem = if topic.is_empty() {
        "no topic is named: kafka://HOST:PORT/TOPIC"
    } else if !topic.chars().all(is_good) {
        "a topic has letters, digits, '.', '_' and '-' alone"
    } else if topic.len() > TOPIC_LEN_MAX || topic == "." || topic == ".." {
        "Kafka has no topics of such a name"
    } else {
        return Ok(());
    };
    Err(Error::refused(problem))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_say_where_the_topic_is_or_what_is_wrong_with_them() {
        for (url, servers, topic) in [
            ("kafka://h1:1,h2:65535/t", vec!["h1:1", "h2:65535"], "t"),
            ("kafka://h1/a.B_c-9", vec!["h1:9092"], "a.B_c-9"),
            ("kafka://[::1]:9,[fe80::2],10.0.0.1/t", vec!["[::1]:9", "[fe80::2]:9092", "10.0.0.1:9092"], "t"),
        ] {
            let options = Options::from_url(url).unwrap_or_else(|error| panic!("{url}: {error}"));
            assert_eq!(
                (options.servers(), options.topic()),
                (&servers.iter().map(ToString::to_string).collect::<Vec<_>>()[..], topic)
            );
        }
        for (url, says) in [
            ("etcd://h1/t", "begins with kafka://"),
            ("kafka://h1", "no topic is named"),
            ("kafka://h1/", "no topic is named"),
            ("kafka:///t", "names no host"),
            ("kafka://h1,/t", "names no host"),
            ("kafka://h1/a/b", "letters, digits"),
            ("kafka://h1/..", "no topics of such a name"),
            ("kafka://h1:0/t", "port"),
            ("kafka://h1:70000/t", "port"),
            ("kafka://::1/t", "brackets"),
            ("kafka://h1/t?acks=0", "no parameters"),
            ("kafka://me:secret@h1/t", "--engine-password-file"),
            ("kafka://h1/command-log", "--kafka-log"),
        ] {
            let error = Options::from_url(url).expect_err(url);
            assert!(error.to_string().contains(says) && !error.to_string().contains("secret"), "{url}: {error}");
        }
        assert!(Options::new(["h1"], &"t".repeat(249)).is_ok() && Options::new(["h1"], &"t".repeat(250)).is_err());
    }
}
