//! A host and a port, and how names become addresses.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio::net::lookup_host;
use tokio::time::{Instant, timeout};

use crate::error::ConfigError;
use crate::found::Found;

/// How many names are looked up at once.
const AT_ONCE: usize = 8;

/// The longest name that DNS has.
const NAME_LEN_MAX: usize = 253;

/// A name or IP address, with a port: `node-1:7000`, `10.0.0.1:7000`, `[fd00::1]:7000`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostPort {
    host: String,
    port: u16,
}

impl HostPort {
    /// A host with a port.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] if it is neither a name nor an address.
    pub fn new(host: &str, port: u16) -> Result<Self, ConfigError> {
        if !is_host(host) {
            return Err(ConfigError(format!("'{host}' is neither the name of a host nor an IP address")));
        }
        if port == 0 {
            return Err(ConfigError(format!("the port of '{host}' is from 1 to 65535")));
        }
        Ok(HostPort { host: host.to_owned(), port })
    }

    /// The name or address, without brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl FromStr for HostPort {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let wrong = || ConfigError(format!("'{text}' is not HOST:PORT, such as node-1:7000 or [fd00::1]:7000"));
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let host = match host.strip_prefix('[') {
            Some(rest) => {
                let address = rest.strip_suffix(']').ok_or_else(wrong)?;
                address.parse::<Ipv6Addr>().map_err(|_| wrong())?;
                address
            }
            None if host.contains(':') => return Err(wrong()),
            None => host,
        };
        HostPort::new(host, read_port(port).ok_or_else(wrong)?)
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// Digits alone: a sign is no part of a port.
pub(crate) fn read_port(text: &str) -> Option<u16> {
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|port| is_number && *port > 0)
}

/// Whether it can be the name of a host.
pub(crate) fn is_name(text: &str) -> bool {
    let name = text.strip_suffix('.').unwrap_or(text);
    let is_label = |label: &str| {
        let is_part = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        !label.is_empty() && label.len() <= 63 && label.bytes().all(is_part)
    };
    name.len() <= NAME_LEN_MAX && name.split('.').all(is_label)
}

fn is_host(text: &str) -> bool {
    text.parse::<IpAddr>().is_ok() || is_name(text)
}

/// Asks the system for the addresses of hosts, for `limit` in all; those that have none are unusable.
pub(crate) async fn resolve(hosts: &[HostPort], limit: Duration) -> Found {
    let start = Instant::now();
    let look_up = |host: HostPort| async move {
        let left = limit.saturating_sub(start.elapsed());
        let mut found = Found::new();
        let late = || format!("{host} has no address: no answer within {limit:?}");
        // A name takes a thread as soon as it is asked for, even if nothing waits for the answer.
        if left.is_zero() && host.host.parse::<IpAddr>().is_err() {
            found.add_unusable(late());
            return found;
        }
        match timeout(left, lookup_host((host.host.as_str(), host.port))).await {
            Ok(Ok(addresses)) => found.extend(addresses),
            Ok(Err(error)) => found.add_unusable(format!("{host} has no address: {error}")),
            Err(_) => found.add_unusable(late()),
        }
        found
    };
    let mut answers = stream::iter(hosts.to_vec()).map(look_up).buffered(AT_ONCE);
    let mut found = Found::new();
    while let Some(answer) = answers.next().await {
        found.merge(answer);
    }
    found
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;

    #[test]
    fn behind_the_limit_no_name_is_looked_up_and_addresses_are_found_all_the_same() {
        let threads = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&threads);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .on_thread_start(move || _ = counted.fetch_add(1, Relaxed))
            .build()
            .unwrap();
        let look_up = |limit| {
            let hosts = ["localhost:7", "127.0.0.1:7", "localhost:8", "[::1]:7"].map(|text| text.parse().unwrap());
            runtime.block_on(resolve(&hosts, limit))
        };
        let found = look_up(Duration::ZERO);
        assert_eq!(found.addresses(), ["127.0.0.1:7", "[::1]:7"].map(|text| text.parse().unwrap()));
        assert_eq!(found.unusable()[0], "localhost:7 has no address: no answer within 0ns");
        assert_eq!((found.unusable().len(), threads.load(Relaxed)), (2, 0), "no thread asks");
        look_up(Duration::from_secs(60));
        assert!(threads.load(Relaxed) > 0, "threads ask for names");
    }

    #[test]
    fn a_host_has_a_port_and_comes_back_as_it_was() {
        for text in ["h:1", "node-1.example.:7000", "10.0.0.1:65535", "[fd00::1]:7000", "_a._tcp.b:1"] {
            assert_eq!(text.parse::<HostPort>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "h",
            "h:",
            ":1",
            "h:0",
            "h:65536",
            "h:+1",
            "h:x",
            "fd00::1:7",
            "[h]:1",
            "[fd00::1]",
            "a b:1",
            "a..b:1",
            "-:1:2",
        ] {
            let error = text.parse::<HostPort>().unwrap_err().to_string();
            assert!(!error.is_empty(), "{text}");
        }
    }
}
