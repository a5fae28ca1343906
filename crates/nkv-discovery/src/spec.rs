//! Providers as text: what a command line or a variable holds.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use crate::discovery::Discovery;
use crate::error::ConfigError;
use crate::host::{HostPort, is_name, read_port};
use crate::list::StaticList;

/// The longest description.
const LEN_MAX: usize = 64 << 10;

/// A provider as text.
///
/// | text | provider |
/// |---|---|
/// | `static:HOST:PORT,HOST:PORT` | a list |
/// | `dns:NAME[:PORT][?ipv6]` | the addresses of a name; without a port, the port of this node |
/// | `srv:NAME` | the targets of a service, with their ports |
/// | `nats://HOST:PORT/SUBJECT[?timeout=1s&max_join_attempts=5&reconnect_wait=2s]` | nodes that ask each other |
/// | `kubernetes:NAMESPACE/LABEL=VALUE,.../PORT-NAME` | pods that are ready |
///
/// # Examples
///
/// ```
/// use nkv_discovery::Spec;
///
/// let spec: Spec = "static:node-1:7000,node-2:7000".parse()?;
/// let provider = spec.provider()?;
/// assert_eq!(provider.name(), "static");
/// assert_eq!("dns:".parse::<Spec>().unwrap_err().to_string(), "dns: '' is not a name of DNS; the form is dns:NAME[:PORT][?ipv6]");
/// # Ok::<(), nkv_discovery::ConfigError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Spec {
    /// A list of hosts.
    Static(Vec<HostPort>),
    /// The addresses of a name.
    Dns {
        /// The name.
        name: String,
        /// The port of every node; that of the node that asks, if not given.
        port: Option<u16>,
        /// Addresses of IPv6 alone (AAAA); else of both kinds.
        only_ipv6: bool,
    },
    /// The targets of a service.
    Srv {
        /// The name, such as `_gossip._tcp.nkv.example`.
        name: String,
    },
    /// Nodes that ask each other on a subject.
    Nats(NatsSpec),
    /// Pods that are ready.
    Kubernetes(KubernetesSpec),
}

/// Where nodes ask each other by NATS.
#[derive(Clone, PartialEq, Eq)]
pub struct NatsSpec {
    /// The server: `HOST:PORT`, or `USER:PASSWORD@HOST:PORT`, or `TOKEN@HOST:PORT`.
    pub server: String,
    /// The subject.
    pub subject: String,
    /// For how long answers are collected, and for how long a connection may take to be made. 1 s by default.
    pub timeout: Duration,
    /// How often it is tried to connect, the first time. 5 by default.
    pub max_join_attempts: u32,
    /// How long to wait between attempts. 2 s by default.
    pub reconnect_wait: Duration,
}

/// Which pods are nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubernetesSpec {
    /// Their namespace.
    pub namespace: String,
    /// Labels that they have: `app=nkv,tier=data`.
    pub labels: String,
    /// The name of the container's port for the cluster.
    pub port_name: String,
}

impl Spec {
    /// Makes the provider.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] if this build has it not (features `dns`, `nats`, `kubernetes`), or not here: of Kubernetes, outside a pod.
    pub fn provider(&self) -> Result<Box<dyn Discovery>, ConfigError> {
        Ok(match self {
            Spec::Static(hosts) => Box::new(StaticList::new(hosts.clone())?),
            #[cfg(feature = "dns")]
            Spec::Dns { name, port, only_ipv6 } => Box::new(crate::Dns::addresses(name, *port, *only_ipv6)),
            #[cfg(feature = "dns")]
            Spec::Srv { name } => Box::new(crate::Dns::services(name)),
            #[cfg(feature = "nats")]
            Spec::Nats(spec) => Box::new(crate::Nats::new(spec.clone())?),
            #[cfg(feature = "kubernetes")]
            Spec::Kubernetes(spec) => Box::new(crate::Kubernetes::new(spec.clone(), crate::Account::of_pod()?)),
            #[cfg(not(all(feature = "dns", feature = "nats", feature = "kubernetes")))]
            other => {
                let kind = other.to_string().split(':').next().unwrap_or_default().to_owned();
                return Err(ConfigError(format!("this program was built without discovery by '{kind}'")));
            }
        })
    }
}

impl FromStr for Spec {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        if text.len() > LEN_MAX {
            return Err(ConfigError(format!("a description of {} bytes: {LEN_MAX} is the limit", text.len())));
        }
        let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
        match kind {
            "static" => list(rest),
            "dns" => dns(rest),
            "srv" => match is_name(rest) {
                true => Ok(Spec::Srv { name: rest.to_owned() }),
                false => Err(ConfigError(format!("srv: '{rest}' is not a name of DNS; the form is srv:NAME"))),
            },
            "nats" => nats(rest).map(Spec::Nats),
            "kubernetes" => kubernetes(rest).map(Spec::Kubernetes),
            _ => Err(ConfigError(format!(
                "'{kind}' is no kind of discovery; there are static, dns, srv, nats, kubernetes"
            ))),
        }
    }
}

fn list(text: &str) -> Result<Spec, ConfigError> {
    let wrong = |error: ConfigError| ConfigError(format!("static: {error}; the form is static:HOST:PORT,HOST:PORT"));
    let hosts: Vec<HostPort> = text.split(',').map(str::parse).collect::<Result<_, _>>().map_err(wrong)?;
    StaticList::new(hosts.clone()).map_err(wrong)?;
    Ok(Spec::Static(hosts))
}

fn dns(text: &str) -> Result<Spec, ConfigError> {
    const FORM: &str = "the form is dns:NAME[:PORT][?ipv6]";
    let (place, option) = text.split_once('?').map_or((text, None), |(place, option)| (place, Some(option)));
    let only_ipv6 = match option {
        None => false,
        Some("ipv6") => true,
        Some(other) => return Err(ConfigError(format!("dns: there is no option '{other}'; {FORM}"))),
    };
    if place.parse::<IpAddr>().is_ok() || place.parse::<SocketAddr>().is_ok() {
        return Err(ConfigError(format!("dns: '{place}' is an address, not a name; for addresses there is static:")));
    }
    let (name, port) = match place.rsplit_once(':') {
        None => (place, None),
        Some((name, port)) => {
            let wrong = || ConfigError(format!("dns: '{port}' is not a port; {FORM}"));
            (name, Some(read_port(port).ok_or_else(wrong)?))
        }
    };
    match is_name(name) {
        true if name.parse::<IpAddr>().is_err() => Ok(Spec::Dns { name: name.to_owned(), port, only_ipv6 }),
        _ => Err(ConfigError(format!("dns: '{name}' is not a name of DNS; {FORM}"))),
    }
}

fn nats(text: &str) -> Result<NatsSpec, ConfigError> {
    // The text may hold a password, so it is not repeated.
    let wrong = |what: &str| {
        let form = "nats://HOST:PORT/SUBJECT[?timeout=1s&max_join_attempts=5&reconnect_wait=2s]";
        ConfigError(format!("nats: {what}; the form is {form}"))
    };
    let rest = text.strip_prefix("//").ok_or_else(|| wrong("'//' is missing"))?;
    let (server, rest) = rest.split_once('/').ok_or_else(|| wrong("the subject is missing"))?;
    let (subject, options) = rest.split_once('?').unwrap_or((rest, ""));
    let host = server.rsplit_once('@').map_or(server, |(_, host)| host);
    host.parse::<HostPort>().map_err(|error| wrong(&error.to_string()))?;
    let is_token = |token: &str| !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
    // Only one subject is one that all nodes publish to.
    if !subject.split('.').all(is_token) || subject.contains(['*', '>']) {
        return Err(wrong(&format!("'{subject}' is not a subject without wildcards")));
    }
    let mut spec = NatsSpec::new(server, subject);
    for option in options.split('&').filter(|option| !option.is_empty()) {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let time =
            || read_time(value).ok_or_else(|| wrong(&format!("{name}: '{value}' is not a time such as 500ms or 2s")));
        match name {
            "timeout" => spec.timeout = time()?,
            "reconnect_wait" => spec.reconnect_wait = time()?,
            "max_join_attempts" => {
                let count = value.parse().ok().filter(|count| (1..=1_000).contains(count));
                spec.max_join_attempts =
                    count.ok_or_else(|| wrong(&format!("{name}: '{value}' is not from 1 to 1000")))?;
            }
            _ => return Err(wrong(&format!("there is no option '{name}'"))),
        }
    }
    Ok(spec)
}

/// Digits and `ms`, `s` or `m`: from a millisecond to an hour.
fn read_time(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at(text.find(|char: char| !char.is_ascii_digit())?);
    let number = number.parse::<u64>().ok()?;
    let time = match unit {
        "ms" => Duration::from_millis(number),
        "s" => Duration::from_secs(number),
        "m" => Duration::from_secs(number.checked_mul(60)?),
        _ => return None,
    };
    (Duration::from_millis(1)..=Duration::from_secs(3_600)).contains(&time).then_some(time)
}

fn kubernetes(text: &str) -> Result<KubernetesSpec, ConfigError> {
    let wrong = |what: String| {
        ConfigError(format!("kubernetes: {what}; the form is kubernetes:NAMESPACE/LABEL=VALUE,.../PORT-NAME"))
    };
    // The name of a label may have a slash too.
    let parts = text.split_once('/').and_then(|(namespace, rest)| Some((namespace, rest.rsplit_once('/')?)));
    let (namespace, (labels, port_name)) = parts.ok_or_else(|| wrong("a part is missing".into()))?;
    let is_part = |text: &str| {
        !text.is_empty() && text.len() <= 63 && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    if !is_part(namespace) {
        return Err(wrong(format!("'{namespace}' is not a namespace")));
    }
    if !is_part(port_name) {
        return Err(wrong(format!("'{port_name}' is not the name of a port")));
    }
    let is_text = |text: &str| text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte));
    let is_label = |label: &str| {
        label.split_once('=').is_some_and(|(name, value)| !name.is_empty() && is_text(name) && is_text(value))
    };
    match labels.split(',').find(|label| !is_label(label)) {
        Some(label) => Err(wrong(format!("'{label}' is not LABEL=VALUE"))),
        None => Ok(KubernetesSpec {
            namespace: namespace.to_owned(),
            labels: labels.to_owned(),
            port_name: port_name.to_owned(),
        }),
    }
}

impl NatsSpec {
    /// With the options as they are by default.
    #[must_use]
    pub fn new(server: &str, subject: &str) -> Self {
        NatsSpec {
            server: server.to_owned(),
            subject: subject.to_owned(),
            timeout: Duration::from_secs(1),
            max_join_attempts: 5,
            reconnect_wait: Duration::from_secs(2),
        }
    }

    /// The server, without who logs in.
    pub(crate) fn place(&self) -> &str {
        self.server.rsplit_once('@').map_or(&self.server, |(_, place)| place)
    }
}

/// Without who logs in.
impl fmt::Debug for NatsSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let NatsSpec { subject, timeout, max_join_attempts, reconnect_wait, .. } = self;
        f.debug_struct("NatsSpec")
            .field("server", &self.place())
            .field("subject", subject)
            .field("timeout", timeout)
            .field("max_join_attempts", max_join_attempts)
            .field("reconnect_wait", reconnect_wait)
            .finish()
    }
}

/// For people and logs: of NATS without who logs in.
impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Spec::Static(hosts) => {
                f.write_str("static:")?;
                let mut between = "";
                hosts.iter().try_for_each(|host| write!(f, "{}{host}", std::mem::replace(&mut between, ",")))
            }
            Spec::Dns { name, port, only_ipv6 } => {
                write!(f, "dns:{name}")?;
                port.map_or(Ok(()), |port| write!(f, ":{port}"))?;
                f.write_str(if *only_ipv6 { "?ipv6" } else { "" })
            }
            Spec::Srv { name } => write!(f, "srv:{name}"),
            Spec::Nats(spec) => {
                let NatsSpec { subject, timeout, max_join_attempts, reconnect_wait, .. } = spec;
                write!(f, "nats://{}/{subject}?timeout={}ms", spec.place(), timeout.as_millis())?;
                let wait = reconnect_wait.as_millis();
                write!(f, "&max_join_attempts={max_join_attempts}&reconnect_wait={wait}ms")
            }
            Spec::Kubernetes(KubernetesSpec { namespace, labels, port_name }) => {
                write!(f, "kubernetes:{namespace}/{labels}/{port_name}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_read_and_shown() {
        for text in [
            "static:h1:7000,[fd00::1]:7000",
            "dns:nkv.example",
            "dns:nkv.example:7000?ipv6",
            "srv:_gossip._tcp.nkv.example.",
            "nats://127.0.0.1:4222/nkv.cluster?timeout=500ms&max_join_attempts=3&reconnect_wait=100ms",
            "kubernetes:default/app.kubernetes.io/name=nkv,tier=/gossip",
        ] {
            let spec: Spec = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(spec.to_string(), text);
            assert_eq!(spec.to_string().parse::<Spec>().unwrap(), spec);
        }
    }

    #[test]
    fn options_of_nats_have_the_defaults_of_go_kv() {
        let spec: Spec = "nats://h:4222/s?".parse().unwrap();
        let Spec::Nats(spec) = spec else { panic!("{spec}") };
        let times = (spec.timeout, spec.max_join_attempts, spec.reconnect_wait);
        assert_eq!(times, (Duration::from_secs(1), 5, Duration::from_secs(2)));
    }

    #[test]
    fn who_logs_in_is_shown_nowhere() {
        let spec: Spec = "nats://user:s3cret@h:4222/s".parse().unwrap();
        assert!(!format!("{spec} {spec:?}").contains("s3cret"));
        let error = "nats://user:s3cret@h/s".parse::<Spec>().unwrap_err();
        assert!(!format!("{error} {error:?}").contains("s3cret"), "{error}");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let long = format!("srv:{}", "a".repeat(LEN_MAX));
        for (text, named) in [
            ("", "'' is no kind of discovery; there are static"),
            ("consul:x", "'consul' is no kind"),
            ("static:", "'' is not HOST:PORT"),
            ("static:h1:7,", "'' is not HOST:PORT"),
            ("static:h1:7,h2", "'h2' is not HOST:PORT"),
            ("static:h1:0", "'h1:0' is not HOST:PORT"),
            ("dns:", "'' is not a name of DNS"),
            ("dns:10.0.0.1", "for addresses there is static:"),
            ("dns:10.0.0.1:7000", "for addresses there is static:"),
            ("dns:::1", "for addresses there is static:"),
            ("dns:name:x", "'x' is not a port"),
            ("dns:name:70000", "'70000' is not a port"),
            ("dns:name?ipv4", "no option 'ipv4'"),
            ("dns:na me", "'na me' is not a name of DNS"),
            ("srv:", "'' is not a name of DNS"),
            ("srv:a:1", "'a:1' is not a name of DNS"),
            (&long, "the limit"),
            ("nats:h:4222/s", "'//' is missing"),
            ("nats://h:4222", "the subject is missing"),
            ("nats://h:4222/", "'' is not a subject"),
            ("nats://h/s", "'h' is not HOST:PORT"),
            ("nats://h:4222/a..b", "'a..b' is not a subject"),
            ("nats://h:4222/a.>", "'a.>' is not a subject"),
            ("nats://h:4222/a b", "'a b' is not a subject"),
            ("nats://h:4222/s?timeout=1", "timeout: '1' is not a time"),
            ("nats://h:4222/s?timeout=0s", "timeout: '0s' is not a time"),
            ("nats://h:4222/s?reconnect_wait=2h", "reconnect_wait: '2h' is not a time"),
            ("nats://h:4222/s?max_join_attempts=0", "'0' is not from 1 to 1000"),
            ("nats://h:4222/s?tiemout=1s", "no option 'tiemout'"),
            ("kubernetes:default", "a part is missing"),
            ("kubernetes:default/app=nkv", "a part is missing"),
            ("kubernetes:/app=nkv/gossip", "'' is not a namespace"),
            ("kubernetes:default/app/gossip", "'app' is not LABEL=VALUE"),
            ("kubernetes:default/app=nkv,/gossip", "'' is not LABEL=VALUE"),
            ("kubernetes:default/app=nkv&limit=1/gossip", "is not LABEL=VALUE"),
            ("kubernetes:default/app=nkv/", "'' is not the name of a port"),
        ] {
            let error = text.parse::<Spec>().expect_err(text).to_string();
            assert!(error.contains(named), "{text}: {error}");
        }
    }

    #[cfg(not(feature = "dns"))]
    #[test]
    fn a_provider_that_was_not_built_is_named() {
        let error = "dns:a.example".parse::<Spec>().unwrap().provider().unwrap_err();
        assert_eq!(error.to_string(), "this program was built without discovery by 'dns'");
    }
}
