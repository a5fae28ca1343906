//! An answer.

use std::net::SocketAddr;

use crate::error::{DiscoveryError, DiscoveryErrorKind};

/// An answer has at most this many addresses, and as many remarks on what cannot be used.
pub const ADDRESSES_MAX: usize = 1_024;

/// Of a remark are kept at most this many bytes.
const REMARK_LEN_MAX: usize = 200;

/// What a source answered: addresses, each once, in its order, and what could not be used.
///
/// # Examples
///
/// ```
/// use nkv_discovery::Found;
///
/// let found: Found = ["10.0.0.1:7000", "10.0.0.2:7000", "10.0.0.1:7000"].iter().filter_map(|a| a.parse().ok()).collect();
/// assert_eq!(found.addresses().len(), 2);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    addresses: Vec<SocketAddr>,
    unusable: Vec<String>,
    left_out: usize,
}

impl Found {
    /// An answer without addresses.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The addresses: at most [`ADDRESSES_MAX`].
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// What could not be used, for people. Where there is something, there may be nodes that are not among the addresses.
    #[must_use]
    pub fn unusable(&self) -> &[String] {
        &self.unusable
    }

    /// How many addresses or remarks found no place.
    #[must_use]
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    /// Adds an address. One that no peer can have (port 0, `0.0.0.0`, multicast) is unusable.
    pub fn add(&mut self, address: SocketAddr) {
        let ip = address.ip().to_canonical();
        let address = SocketAddr::new(ip, address.port());
        if address.port() == 0 || ip.is_unspecified() || ip.is_multicast() {
            self.add_unusable(format!("{address} is no address of a node"));
        } else if !self.addresses.contains(&address) {
            self.push(|found| &mut found.addresses, address);
        }
    }

    /// Notes what cannot be used, and why.
    pub fn add_unusable(&mut self, what: impl Into<String>) {
        let mut what = what.into();
        if what.len() > REMARK_LEN_MAX {
            let end = (0..=REMARK_LEN_MAX).rev().find(|at| what.is_char_boundary(*at));
            what.truncate(end.unwrap_or_default());
            what.push_str("...");
        }
        self.push(|found| &mut found.unusable, what);
    }

    /// Adds what another answer has.
    pub fn merge(&mut self, other: Found) {
        other.addresses.into_iter().for_each(|address| self.add(address));
        other.unusable.into_iter().for_each(|what| self.add_unusable(what));
        self.left_out = self.left_out.saturating_add(other.left_out);
    }

    /// The answer, if any of it can be used or there was nothing in it.
    ///
    /// # Errors
    ///
    /// [`DiscoveryErrorKind::Unusable`] if there was something, and nothing of it can be used.
    pub fn checked(self) -> Result<Self, DiscoveryError> {
        match self.unusable.first() {
            Some(first) if self.addresses.is_empty() => {
                let others = match self.unusable.len().saturating_sub(1) {
                    0 => String::new(),
                    others => format!(" (and {others} more)"),
                };
                Err(DiscoveryError::new(DiscoveryErrorKind::Unusable, format!("{first}{others}")))
            }
            _ => Ok(self),
        }
    }

    fn push<T>(&mut self, of: impl FnOnce(&mut Self) -> &mut Vec<T>, new: T) {
        let list = of(self);
        if list.len() < ADDRESSES_MAX {
            list.push(new);
        } else {
            self.left_out = self.left_out.saturating_add(1);
        }
    }
}

impl Extend<SocketAddr> for Found {
    fn extend<I: IntoIterator<Item = SocketAddr>>(&mut self, addresses: I) {
        addresses.into_iter().for_each(|address| self.add(address));
    }
}

impl FromIterator<SocketAddr> for Found {
    fn from_iter<I: IntoIterator<Item = SocketAddr>>(addresses: I) -> Self {
        let mut found = Found::new();
        found.extend(addresses);
        found
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn an_answer_is_bounded_and_says_what_it_left_out() {
        let all = (0..5_000_u16).map(|n| SocketAddr::from((Ipv4Addr::LOCALHOST, n + 1)));
        let mut found: Found = all.clone().chain(all.take(10)).collect();
        assert_eq!((found.addresses().len(), found.left_out()), (ADDRESSES_MAX, 5_000 - ADDRESSES_MAX));
        assert_eq!(found.addresses()[1], "127.0.0.1:2".parse().unwrap(), "the order is that of the source");
        for _ in 0..2_000 {
            found.add_unusable("ü".repeat(1_000));
        }
        assert_eq!(found.unusable().len(), ADDRESSES_MAX);
        assert!(found.unusable().iter().all(|what| what.len() <= REMARK_LEN_MAX + 3));
        let mut merged = Found::new();
        merged.merge(found.clone());
        assert_eq!(merged, found);
    }

    #[test]
    fn what_is_no_address_of_a_node_is_named() {
        let addresses = ["0.0.0.0:1", "[::]:1", "10.0.0.1:0", "224.0.0.1:1", "[ff02::1]:1"];
        let found: Found = addresses.iter().map(|address| address.parse::<SocketAddr>().unwrap()).collect();
        assert_eq!((found.addresses().len(), found.unusable().len()), (0, 5));
        let error = found.checked().unwrap_err();
        assert_eq!(error.kind(), DiscoveryErrorKind::Unusable);
        assert_eq!(error.to_string(), "0.0.0.0:1 is no address of a node (and 4 more)");
        assert_eq!(Found::new().checked(), Ok(Found::new()), "none is an answer");
        let one: Found = ["[::ffff:10.0.0.1]:7", "10.0.0.1:7"].iter().filter_map(|text| text.parse().ok()).collect();
        assert_eq!(one.addresses(), ["10.0.0.1:7".parse().unwrap()], "one node in two forms");
    }
}
