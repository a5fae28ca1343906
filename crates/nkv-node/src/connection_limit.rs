//! The connection limit: in all, and for each address.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;

/// How many connections there may be, for all doors that share it. Clones share the places.
///
/// # Examples
///
/// ```
/// let places = nkv_node::ConnectionLimit::new(1_024, 1);
/// let place = places.take("192.0.2.1:5000")?;
/// assert!(places.take("192.0.2.1:5001").is_err());
/// drop(place);
/// assert!(places.take("192.0.2.1:5001").is_ok());
/// # Ok::<(), nkv_node::Full>(())
/// ```
#[derive(Clone, Debug)]
pub struct ConnectionLimit {
    max: usize,
    per_address_max: usize,
    taken: Arc<Mutex<Taken>>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_address: HashMap<IpAddr, usize>,
}

/// A place, free again when dropped. Displays its peer.
#[derive(Debug)]
pub struct Place {
    places: ConnectionLimit,
    peer: Box<str>,
    from: Option<IpAddr>,
}

/// There is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Full {
    /// All are taken.
    #[error("too many connections: {0} is the limit")]
    All(usize),
    /// Those for one address are taken.
    #[error("too many connections from {1}: {0} is the limit for one address")]
    Address(usize, IpAddr),
}

impl ConnectionLimit {
    /// At most `max` connections, and `per_address_max` from one address: an IPv4 address or an IPv6 network /64.
    #[must_use]
    pub fn new(max: usize, per_address_max: usize) -> Self {
        ConnectionLimit { max, per_address_max, taken: Arc::default() }
    }

    /// A place for a connection of this peer; one of a Unix socket comes from no address.
    ///
    /// # Errors
    ///
    /// [`Full`] where there is none.
    pub fn take(&self, peer: &str) -> Result<Place, Full> {
        let from = peer.parse().ok().map(address);
        let mut taken = self.lock();
        if taken.all >= self.max {
            return Err(Full::All(self.max));
        }
        if let Some(address) = from {
            let of_address = taken.by_address.get(&address).copied().unwrap_or_default();
            if of_address >= self.per_address_max {
                return Err(Full::Address(self.per_address_max, address));
            }
            taken.by_address.insert(address, of_address.saturating_add(1));
        }
        taken.all = taken.all.saturating_add(1);
        Ok(Place { places: self.clone(), peer: peer.into(), from })
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Its peer, as people are shown it.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.peer
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        taken.all = taken.all.saturating_sub(1);
        if let Some(address) = self.from
            && let Some(of_address) = taken.by_address.get_mut(&address)
        {
            *of_address = of_address.saturating_sub(1);
            if *of_address == 0 {
                taken.by_address.remove(&address);
            }
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.peer)
    }
}

/// What counts as one address: an IPv4 address in either of its notations, or the /64 of an IPv6 address, which is the
/// least that one host is given.
fn address(from: SocketAddr) -> IpAddr {
    match from.ip().to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_counted_in_all_and_for_each_address_and_come_back() {
        let places = ConnectionLimit::new(4, 2);
        let first = places.take("10.0.0.1:1").unwrap();
        let _second = places.take("[::ffff:10.0.0.1]:2").unwrap();
        let full = Full::Address(2, "10.0.0.1".parse().unwrap());
        assert_eq!(places.take("10.0.0.1:3").unwrap_err(), full);
        let network = places.take("[2001:db8::1]:1").unwrap();
        assert_eq!(network.places.lock().by_address.get(&"2001:db8::".parse().unwrap()), Some(&1));
        drop(network);
        let _other = places.take("10.0.0.2:1").unwrap();
        let _unix = places.take("unix").unwrap();
        assert_eq!(places.take("unix").unwrap_err(), Full::All(4));
        drop(first);
        assert_eq!(places.lock().all, 3);
        drop(places.take("10.0.0.1:4").unwrap());
        drop((_second, _other, _unix));
        let taken = places.lock();
        assert_eq!((taken.all, taken.by_address.len()), (0, 0));
    }
}
