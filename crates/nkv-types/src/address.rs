//! Where a server is, or listens: parsed once, at the edge.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::{Error, ErrorKind};

/// The port of a server that was given none.
const PORT: u16 = 4222;

/// Where a server is, or where it listens.
///
/// | written | meaning |
/// |---|---|
/// | `host:port`, `nkv://host:port`, `[::1]:port` | TCP; without a port, 4222 |
/// | `unix:PATH`, `unix:///path`, `/path` | a Unix socket |
///
/// # Examples
///
/// ```
/// use nkv_types::Address;
///
/// let addr: Address = "nkv://db1".parse()?;
/// assert_eq!(addr.to_string(), "db1:4222");
/// assert_eq!("unix:///run/nkv.sock".parse::<Address>()?, "/run/nkv.sock".parse()?);
/// # Ok::<(), nkv_types::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Address {
    /// A host and a port.
    Tcp {
        /// A name or an IP address, without brackets.
        host: String,
        /// The port; 0, where one listens: any free one.
        port: u16,
    },
    /// A socket in the file system.
    Unix {
        /// Its path.
        path: PathBuf,
    },
}

impl Default for Address {
    fn default() -> Self {
        Address::Tcp { host: "127.0.0.1".into(), port: PORT }
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Address::Tcp { host: address.ip().to_string(), port: address.port() }
    }
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text).map_err(|what| Error::new(ErrorKind::InvalidAddress, format!("address '{text}': {what}")))
    }
}

fn parse(text: &str) -> Result<Address, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        return match path.strip_prefix("//") {
            Some(path) if !path.starts_with('/') => Err(format!("write unix:{path} for a relative path")),
            Some(path) => Ok(unix(path)),
            None if path.is_empty() => Err("a path must follow 'unix:'".into()),
            None => Ok(unix(path)),
        };
    }
    if text.starts_with(['/', '.']) {
        return Ok(unix(text));
    }
    let host_port = match text.split_once("://") {
        Some(("nkv", rest)) => rest.strip_suffix('/').unwrap_or(rest),
        Some((scheme, _)) => {
            return Err(format!("unknown scheme '{scheme}'; write host:port, nkv://host:port or unix:PATH"));
        }
        None => text,
    };
    if host_port.contains(['/', '@', '?', '#', ' ']) {
        return Err("only host:port is expected here".into());
    }
    let (host, port) = match host_port.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or("no ']' after the IPv6 address")?;
            (host, rest.strip_prefix(':').or(rest.is_empty().then_some("")).ok_or("':port' must follow ']'")?)
        }
        None if host_port.matches(':').count() > 1 => {
            return Err("write an IPv6 address in brackets: [::1]:4222".into());
        }
        None => match host_port.split_once(':') {
            Some((_, "")) => return Err("the port is missing after ':'".into()),
            Some(parts) => parts,
            None => (host_port, ""),
        },
    };
    if host.is_empty() {
        return Err("the host is missing; write host:port, such as 127.0.0.1:4222".into());
    }
    if port.is_empty() && host.parse::<u16>().is_ok() {
        return Err(format!("the host is missing; write host:port, such as 127.0.0.1:{host}"));
    }
    let port = if port.is_empty() { Ok(PORT) } else { port.parse() };
    let port = port.map_err(|_| "the port must be a number from 0 to 65535".to_owned())?;
    Ok(Address::Tcp { host: host.to_owned(), port })
}

fn unix(path: &str) -> Address {
    Address::Unix { path: PathBuf::from(path) }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "{host}:{port}"),
            Address::Unix { path } => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_to_write_an_address_is_understood() {
        let cases = [
            ("127.0.0.1:5000", "127.0.0.1:5000"),
            ("nkv://db1:5000", "db1:5000"),
            ("nkv://db1/", "db1:4222"),
            ("localhost", "localhost:4222"),
            ("[::1]:5000", "[::1]:5000"),
            ("nkv://[::1]", "[::1]:4222"),
            ("unix:nkv.sock", "unix:nkv.sock"),
            ("unix:///run/nkv.sock", "unix:/run/nkv.sock"),
            ("/run/nkv.sock", "unix:/run/nkv.sock"),
            ("./nkv.sock", "unix:./nkv.sock"),
        ];
        for (text, shown) in cases {
            let addr: Address = text.parse().unwrap();
            assert_eq!(addr.to_string(), shown, "{text}");
            assert_eq!(shown.parse::<Address>().unwrap(), addr, "{shown}");
        }
    }

    #[test]
    fn the_address_of_a_socket_is_one() {
        for text in ["127.0.0.1:5000", "[::1]:5000"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(Address::from(address).to_string(), text);
        }
    }

    #[test]
    fn what_is_wrong_with_an_address_is_named() {
        let cases = [
            ("", "host is missing"),
            (":4222", "host is missing"),
            ("4222", "127.0.0.1:4222"),
            ("db1:", "port is missing"),
            ("db1:70000", "port must be a number"),
            ("::1", "in brackets"),
            ("[::1", "no ']'"),
            ("http://db1", "unknown scheme 'http'"),
            ("nkv://me@db1", "only host:port"),
            ("unix:", "path must follow"),
            ("unix://nkv.sock", "unix:nkv.sock"),
        ];
        for (text, part) in cases {
            let error = text.parse::<Address>().unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::InvalidAddress, "{text}");
            assert!(error.to_string().contains(part), "{text}: {error}");
        }
    }
}
