//! A list that was given.

use std::net::SocketAddr;
use std::time::Duration;

use async_trait::async_trait;

use crate::discovery::Discovery;
use crate::error::{ConfigError, DiscoveryError};
use crate::found::{ADDRESSES_MAX, Found};
use crate::host::{HostPort, resolve};

/// For how long a name is looked up.
const TIME_LIMIT: Duration = Duration::from_secs(10);

/// Hosts that are named once and for all. Names are looked up by the system, at each call.
///
/// A host without an address is [unusable](Found::unusable), and the others are found nevertheless.
///
/// # Examples
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use nkv_discovery::{Discovery, StaticList};
///
/// let list = StaticList::new(vec!["10.0.0.1:7000".parse()?, "10.0.0.2:7000".parse()?])?;
/// let found = list.find("10.0.0.1:7000".parse()?).await?;
/// assert_eq!(found.addresses(), ["10.0.0.1:7000".parse()?, "10.0.0.2:7000".parse()?]);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct StaticList {
    hosts: Vec<HostPort>,
}

impl StaticList {
    /// A list of these hosts.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] if there is none, or more than [`ADDRESSES_MAX`].
    pub fn new(hosts: Vec<HostPort>) -> Result<Self, ConfigError> {
        match hosts.len() {
            0 => Err(ConfigError("a list names at least one HOST:PORT".into())),
            len if len > ADDRESSES_MAX => {
                Err(ConfigError(format!("a list names at most {ADDRESSES_MAX} hosts, and this one {len}")))
            }
            _ => Ok(StaticList { hosts }),
        }
    }
}

#[async_trait]
impl Discovery for StaticList {
    fn name(&self) -> &str {
        "static"
    }

    async fn find(&self, _own: SocketAddr) -> Result<Found, DiscoveryError> {
        resolve(&self.hosts, TIME_LIMIT).await.checked()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::DiscoveryErrorKind;

    fn list(hosts: &[&str]) -> StaticList {
        StaticList::new(hosts.iter().map(|host| host.parse().unwrap()).collect()).unwrap()
    }

    #[tokio::test]
    async fn names_that_have_no_address_do_not_hide_the_others() {
        let own = "127.0.0.1:7".parse().unwrap();
        let found = list(&["[::1]:7", "none.invalid:7", "127.0.0.1:7"]).find(own).await.unwrap();
        assert_eq!(found.addresses(), ["[::1]:7".parse().unwrap(), own], "this node among them");
        assert_eq!(found.unusable().len(), 1);
        assert!(found.unusable()[0].starts_with("none.invalid:7 has no address"), "{found:?}");
        let found = list(&["localhost:7"]).find(own).await.unwrap();
        assert!(found.addresses().contains(&own), "{found:?}");
        let error = list(&["none.invalid:7", "0.0.0.0:7"]).find(own).await.unwrap_err();
        assert_eq!(error.kind(), DiscoveryErrorKind::Unusable, "no peers is something else");
    }

    #[test]
    fn a_list_is_neither_empty_nor_endless() {
        assert!(StaticList::new(Vec::new()).is_err());
        let host: HostPort = "h:1".parse().unwrap();
        assert!(StaticList::new(vec![host.clone(); ADDRESSES_MAX]).is_ok());
        assert!(StaticList::new(vec![host; ADDRESSES_MAX + 1]).is_err());
    }
}
