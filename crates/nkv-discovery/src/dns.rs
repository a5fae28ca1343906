//! DNS: addresses of a name, or targets of a service.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{StreamExt, stream};
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use hickory_resolver::system_conf::read_system_conf;
use hickory_resolver::{Resolver, TokioResolver};
use tokio::time::timeout;

use crate::discovery::Discovery;
use crate::error::DiscoveryError;
use crate::found::{ADDRESSES_MAX, Found};

/// How long a server may take to answer, before it is asked once more.
const SERVER_LIMIT: Duration = Duration::from_secs(2);

/// For how long to ask in all.
const TIME_LIMIT: Duration = Duration::from_secs(10);

/// How many targets are looked up at once.
const AT_ONCE: usize = 8;

/// Asks DNS, by `/etc/resolv.conf` and anew each time.
///
/// A name that does not exist, or has no such records, is an answer: there are none. A server that fails, refuses or is silent is
/// an error.
///
/// # Examples
///
/// ```
/// use nkv_discovery::{Discovery, Dns};
///
/// let headless_service = Dns::addresses("nkv.default.svc.cluster.local", Some(7_000), false);
/// assert_eq!(headless_service.name(), "dns");
/// ```
#[derive(Clone, Debug)]
pub struct Dns {
    name: String,
    asks: Asks,
    servers: Vec<SocketAddr>,
}

#[derive(Clone, Copy, Debug)]
enum Asks {
    Addresses { port: Option<u16>, only_ipv6: bool },
    Services,
}

impl Dns {
    /// The addresses of a name: A and AAAA, or AAAA alone. Every node has the port; without one, that of the node that asks.
    #[must_use]
    pub fn addresses(name: &str, port: Option<u16>, only_ipv6: bool) -> Self {
        Dns { name: name.to_owned(), asks: Asks::Addresses { port, only_ipv6 }, servers: Vec::new() }
    }

    /// The targets of a service (SRV), with their ports.
    #[must_use]
    pub fn services(name: &str) -> Self {
        Dns { name: name.to_owned(), asks: Asks::Services, servers: Vec::new() }
    }

    /// The same, asking these servers instead of those of `/etc/resolv.conf`.
    #[must_use]
    pub fn with_servers(self, servers: Vec<SocketAddr>) -> Self {
        Dns { servers, ..self }
    }

    /// The servers to ask, and where a name that is not whole may belong.
    fn config(&self) -> Result<(ResolverConfig, ResolverOpts), NetError> {
        if self.servers.is_empty() {
            return read_system_conf();
        }
        let server = |address: &SocketAddr| {
            let mut connections = vec![ConnectionConfig::udp(), ConnectionConfig::tcp()];
            connections.iter_mut().for_each(|connection| connection.port = address.port());
            NameServerConfig::new(address.ip(), true, connections)
        };
        let servers = self.servers.iter().map(server).collect();
        Ok((ResolverConfig::from_name_servers(servers), ResolverOpts::default()))
    }

    async fn ask(&self, own: SocketAddr) -> Result<Found, DiscoveryError> {
        let asking = self.config().and_then(|(config, options)| Asking::new(config, options));
        let asking = asking.map_err(|error| DiscoveryError::unreachable(format!("dns: {error}")))?;
        let failed = |error: String| DiscoveryError::unreachable(format!("dns: {}: {error}", self.name));
        match self.asks {
            Asks::Addresses { port, only_ipv6 } => {
                let mut found = Found::new();
                let (ips, failures) = asking.addresses(&self.name, only_ipv6).await;
                found.extend(ips.into_iter().map(|ip| SocketAddr::new(ip, port.unwrap_or(own.port()))));
                match failures.first() {
                    Some(failure) if found == Found::new() => Err(failed(failure.clone())),
                    _ => {
                        failures.into_iter().for_each(|failure| found.add_unusable(failure));
                        found.checked()
                    }
                }
            }
            Asks::Services => {
                let targets = asking.targets(&self.name).await.map_err(failed)?;
                let look_up = |(host, port): (String, u16)| {
                    let asking = &asking;
                    async move {
                        let (ips, failures) = asking.addresses(&host, false).await;
                        let mut found: Found = ips.iter().map(|ip| SocketAddr::new(*ip, port)).collect();
                        if ips.is_empty() && failures.is_empty() {
                            found.add_unusable(format!("{host} has no address"));
                        }
                        failures.into_iter().for_each(|failure| found.add_unusable(format!("{host}: {failure}")));
                        found
                    }
                };
                let (mut found, left_out) = (Found::new(), targets.len().saturating_sub(ADDRESSES_MAX));
                let asked = targets.into_iter().take(ADDRESSES_MAX);
                let mut answers = stream::iter(asked).map(look_up).buffered(AT_ONCE);
                while let Some(answer) = answers.next().await {
                    found.merge(answer);
                }
                if left_out > 0 {
                    found.add_unusable(format!("{left_out} more targets were not looked up"));
                }
                found.checked()
            }
        }
    }
}

#[async_trait]
impl Discovery for Dns {
    fn name(&self) -> &str {
        match self.asks {
            Asks::Addresses { .. } => "dns",
            Asks::Services => "srv",
        }
    }

    async fn find(&self, own: SocketAddr) -> Result<Found, DiscoveryError> {
        let late = |_| DiscoveryError::unreachable(format!("dns: {}: no answer within {TIME_LIMIT:?}", self.name));
        timeout(TIME_LIMIT, self.ask(own)).await.map_err(late)?
    }
}

/// A resolver that is new, so that it remembers nothing.
struct Asking {
    resolver: TokioResolver,
    config: ResolverConfig,
}

impl Asking {
    fn new(config: ResolverConfig, mut options: ResolverOpts) -> Result<Self, NetError> {
        options.timeout = SERVER_LIMIT;
        options.attempts = 1;
        let builder = Resolver::builder_with_config(config.clone(), TokioRuntimeProvider::default());
        Ok(Asking { resolver: builder.with_options(options).build()?, config })
    }

    /// The addresses of a name, and what failed.
    async fn addresses(&self, name: &str, only_ipv6: bool) -> (Vec<IpAddr>, Vec<String>) {
        let kinds: &[RecordType] = if only_ipv6 { &[RecordType::AAAA] } else { &[RecordType::A, RecordType::AAAA] };
        let (mut ips, mut failures) = (Vec::new(), Vec::new());
        let asked = futures_util::future::join_all(kinds.iter().map(|kind| self.look_up(name, *kind)));
        for (kind, answer) in kinds.iter().zip(asked.await) {
            match answer {
                Ok(answer) => ips.extend(answer.iter().filter_map(RData::ip_addr)),
                Err(error) => failures.push(format!("{kind}: {error}")),
            }
        }
        (ips, failures)
    }

    /// The hosts and ports of a service.
    async fn targets(&self, name: &str) -> Result<Vec<(String, u16)>, String> {
        let answer = self.look_up(name, RecordType::SRV).await.map_err(|error| format!("SRV: {error}"))?;
        let target = |data: &RData| match data {
            // The root as a target says that the service is not there.
            RData::SRV(srv) if !srv.target.is_root() => Some((srv.target.to_utf8(), srv.port)),
            _ => None,
        };
        Ok(answer.iter().filter_map(target).collect())
    }

    /// The records of a kind; none, if that is what the servers say of each name that may be meant. The library's own search takes
    /// the answer to the last of them, and with it a failure for none.
    async fn look_up(&self, name: &str, kind: RecordType) -> Result<Vec<RData>, NetError> {
        let mut failure = None;
        for name in self.meant(name)? {
            match self.resolver.lookup(name, kind).await {
                Ok(answer) => return Ok(answer.answers().iter().map(|record| record.data.clone()).collect()),
                Err(NetError::Dns(DnsError::NoRecordsFound(none)))
                    if matches!(none.response_code, ResponseCode::NoError | ResponseCode::NXDomain) => {}
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        failure.map_or(Ok(Vec::new()), Err)
    }

    /// The names that may be meant, in order, as `search` and `ndots` of `/etc/resolv.conf` say.
    fn meant(&self, name: &str) -> Result<Vec<Name>, NetError> {
        let name = Name::from_ascii(name).map_err(|error| NetError::Msg(error.to_string()))?;
        if name.is_fqdn() {
            return Ok(vec![name]);
        }
        let domains = self.config.domain().into_iter().chain(self.config.search());
        let mut names: Vec<Name> = domains.filter_map(|domain| name.clone().append_domain(domain).ok()).collect();
        names.dedup();
        let is_first = usize::from(name.num_labels()) > self.resolver.options().ndots;
        let mut whole = name;
        whole.set_fqdn(true);
        names.insert(if is_first { 0 } else { names.len() }, whole);
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UdpSocket;

    use super::*;

    /// One that fails for names in `fails`, and of others says that they do not exist.
    async fn server() -> SocketAddr {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        tokio::spawn(async move {
            let mut bytes = [0; 4_096];
            while let Ok((len, peer)) = socket.recv_from(&mut bytes).await {
                let fails = bytes[..len].windows(6).any(|part| part.eq_ignore_ascii_case(b"\x05fails"));
                bytes[2] |= 0x80;
                bytes[3] = 0x80 | if fails { 2 } else { 3 };
                socket.send_to(&bytes[..len], peer).await.unwrap();
            }
        });
        address
    }

    async fn asking(search: &[&str], ndots: usize) -> Asking {
        let dns = Dns::addresses("nkv", None, false).with_servers(vec![server().await]);
        let (mut config, mut options) = dns.config().unwrap();
        search.iter().for_each(|domain| config.add_search(Name::from_ascii(domain).unwrap()));
        options.ndots = ndots;
        Asking::new(config, options).unwrap()
    }

    #[tokio::test]
    async fn names_are_searched_as_the_system_does() {
        let asking = asking(&["svc.test.", "test."], 2).await;
        let meant = |name: &str| asking.meant(name).unwrap().iter().map(Name::to_ascii).collect::<Vec<_>>();
        assert_eq!(meant("nkv"), ["nkv.svc.test.", "nkv.test.", "nkv."]);
        assert_eq!(meant("nkv.a.b"), ["nkv.a.b.", "nkv.a.b.svc.test.", "nkv.a.b.test."]);
        assert_eq!(meant("nkv."), ["nkv."]);
    }

    #[tokio::test]
    async fn a_failure_for_one_of_the_names_that_may_be_meant_is_not_none() {
        for search in [["fails.", "test."], ["test.", "fails."]] {
            let asking = asking(&search, 2).await;
            assert!(asking.look_up("nkv", RecordType::A).await.is_err(), "{search:?}");
            assert_eq!(asking.look_up("nkv.test.", RecordType::A).await.unwrap(), []);
        }
        assert_eq!(asking(&["test."], 2).await.look_up("nkv", RecordType::A).await.unwrap(), []);
    }
}
