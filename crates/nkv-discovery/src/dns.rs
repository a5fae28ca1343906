//! DNS: addresses of a name, or targets of a service.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{StreamExt, stream};
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::ResponseCode;
use hickory_resolver::proto::rr::{RData, RecordType};
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

    /// A new resolver: what it remembers goes with it.
    fn resolver(&self) -> Result<TokioResolver, NetError> {
        let mut builder = if self.servers.is_empty() {
            TokioResolver::builder_tokio()?
        } else {
            let server = |address: &SocketAddr| {
                let mut connections = vec![ConnectionConfig::udp(), ConnectionConfig::tcp()];
                connections.iter_mut().for_each(|connection| connection.port = address.port());
                NameServerConfig::new(address.ip(), true, connections)
            };
            let config = ResolverConfig::from_name_servers(self.servers.iter().map(server).collect());
            Resolver::builder_with_config(config, TokioRuntimeProvider::default())
        };
        let options = builder.options_mut();
        options.timeout = SERVER_LIMIT;
        options.attempts = 1;
        builder.build()
    }

    async fn ask(&self, own: SocketAddr) -> Result<Found, DiscoveryError> {
        let resolver = self.resolver().map_err(|error| DiscoveryError::unreachable(format!("dns: {error}")))?;
        let failed = |error: String| DiscoveryError::unreachable(format!("dns: {}: {error}", self.name));
        match self.asks {
            Asks::Addresses { port, only_ipv6 } => {
                let mut found = Found::new();
                let (ips, failures) = addresses(&resolver, &self.name, only_ipv6).await;
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
                let targets = targets(&resolver, &self.name).await.map_err(failed)?;
                let look_up = |(host, port): (String, u16)| {
                    let resolver = &resolver;
                    async move {
                        let (ips, failures) = addresses(resolver, &host, false).await;
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

/// The addresses of a name, and what failed.
async fn addresses(resolver: &TokioResolver, name: &str, only_ipv6: bool) -> (Vec<IpAddr>, Vec<String>) {
    let kinds: &[RecordType] = if only_ipv6 { &[RecordType::AAAA] } else { &[RecordType::A, RecordType::AAAA] };
    let (mut ips, mut failures) = (Vec::new(), Vec::new());
    let asked = futures_util::future::join_all(kinds.iter().map(|kind| look_up(resolver, name, *kind)));
    for (kind, answer) in kinds.iter().zip(asked.await) {
        match answer {
            Ok(answer) => ips.extend(answer.iter().filter_map(RData::ip_addr)),
            Err(error) => failures.push(format!("{kind}: {error}")),
        }
    }
    (ips, failures)
}

/// The hosts and ports of a service.
async fn targets(resolver: &TokioResolver, name: &str) -> Result<Vec<(String, u16)>, String> {
    let answer = look_up(resolver, name, RecordType::SRV).await.map_err(|error| format!("SRV: {error}"))?;
    let target = |data: &RData| match data {
        // The root as a target says that the service is not there.
        RData::SRV(srv) if !srv.target.is_root() => Some((srv.target.to_utf8(), srv.port)),
        _ => None,
    };
    Ok(answer.iter().filter_map(target).collect())
}

/// The records of a kind; none, if that is what the server says.
async fn look_up(resolver: &TokioResolver, name: &str, kind: RecordType) -> Result<Vec<RData>, NetError> {
    match resolver.lookup(name, kind).await {
        Ok(answer) => Ok(answer.answers().iter().map(|record| record.data.clone()).collect()),
        Err(NetError::Dns(DnsError::NoRecordsFound(none)))
            if matches!(none.response_code, ResponseCode::NoError | ResponseCode::NXDomain) =>
        {
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}
