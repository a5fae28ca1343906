//! Where a server is, or listens: parsed once, at the edge.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::{Error, ErrorKind};

/// The port of a server that was given none.
const PORT: u16 = 4222;
/// The port of a WebSocket address that has none: that of HTTP.
const WS_PORT: u16 = 80;
/// The path of a WebSocket address that has none.
const WS_PATH: &str = "/v1/ws";

/// Where a server is, or where it listens.
///
/// | written | meaning |
/// |---|---|
/// | `host:port`, `nkv://host:port`, `[::1]:port` | TCP; without a port, 4222 |
/// | `unix:PATH`, `unix:///path`, `/path` | a Unix socket |
/// | `ws://host:port`, `ws://host:port/path` | a WebSocket, for clients; without a port 80, without a path `/v1/ws` |
///
/// # Examples
///
/// ```
/// use nkv_types::Address;
///
/// let addr: Address = "nkv://db1".parse()?;
/// assert_eq!(addr.to_string(), "db1:4222");
/// assert_eq!("unix:///run/nkv.sock".parse::<Address>()?, "/run/nkv.sock".parse()?);
/// assert_eq!("ws://db1:8080".parse::<Address>()?.to_string(), "ws://db1:8080/v1/ws");
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
    /// A WebSocket of an HTTP server. A client connects to it; a server does not listen at it.
    Ws {
        /// A name or an IP address, without brackets.
        host: String,
        /// The port.
        port: u16,
        /// The path of the WebSocket, from the first `/` on, with the query if there is one.
        path: String,
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
        Some(("ws", rest)) => return ws(rest),
        Some(("wss", _)) => {
            return Err("wss:// needs TLS, and TLS is not there yet; write ws://host:port, through a tunnel where \
                        others could listen"
                .into());
        }
        Some((scheme, _)) => {
            let known = "host:port, nkv://host:port, ws://host:port or unix:PATH";
            return Err(format!("unknown scheme '{scheme}'; write {known}"));
        }
        None => text,
    };
    let (host, port) = split_host_port(host_port)?;
    Ok(Address::Tcp { host: host.to_owned(), port: port.unwrap_or(PORT) })
}

fn ws(rest: &str) -> Result<Address, String> {
    let start = rest.find(['/', '?']).unwrap_or(rest.len());
    let (host_port, path) = rest.split_at(start);
    // An address that ends with a slash has no path, as for a browser.
    let path = match path {
        "" | "/" => WS_PATH.to_owned(),
        path if path.starts_with('/') => path.to_owned(),
        query => format!("{WS_PATH}{query}"),
    };
    let (host, port) = split_host_port(host_port)?;
    // All of it is sent in the head of an HTTP request.
    if !host.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("the host of a WebSocket is written in ASCII".into());
    }
    let is_path = |byte: u8| byte.is_ascii_graphic() && !b"\"#<>\\^`{|}".contains(&byte);
    if !path.bytes().all(is_path) {
        return Err("a path has no fragment, and is written in ASCII; other characters as %XX".into());
    }
    Ok(Address::Ws { host: host.to_owned(), port: port.unwrap_or(WS_PORT), path })
}

/// A host, and its port if one is given.
fn split_host_port(host_port: &str) -> Result<(&str, Option<u16>), String> {
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
    if port.is_empty() {
        return Ok((host, None));
    }
    let port = port.parse().map_err(|_| "the port must be a number from 0 to 65535".to_owned())?;
    Ok((host, Some(port)))
}

fn unix(path: &str) -> Address {
    Address::Unix { path: PathBuf::from(path) }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Ws { host, port, path } if host.contains(':') => write!(f, "ws://[{host}]:{port}{path}"),
            Address::Ws { host, port, path } => write!(f, "ws://{host}:{port}{path}"),
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
            ("ws://db1:8080", "ws://db1:8080/v1/ws"),
            ("ws://db1:8080/", "ws://db1:8080/v1/ws"),
            ("ws://db1", "ws://db1:80/v1/ws"),
            ("ws://[::1]:8080/a/b?c=d/e", "ws://[::1]:8080/a/b?c=d/e"),
            ("ws://db1:8080?c=d", "ws://db1:8080/v1/ws?c=d"),
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
            ("wss://db1:8080", "TLS is not there yet"),
            ("ws://", "host is missing"),
            ("ws://db1:", "port is missing"),
            ("ws://me@db1:8080", "only host:port"),
            ("ws://db1:8080/a b", "%XX"),
            ("ws://db1:8080/a#b", "fragment"),
            ("ws://db1:8080/a\r\nb: c", "%XX"),
            ("ws://db1\r\nb:8080", "ASCII"),
        ];
        for (text, part) in cases {
            let error = text.parse::<Address>().unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::InvalidAddress, "{text}");
            assert!(error.to_string().contains(part), "{text}: {error}");
        }
    }
}
