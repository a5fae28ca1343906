//! Listening sockets: bound safely, and an accept loop that survives every error.

use std::fs::{File, Permissions, remove_file, set_permissions, symlink_metadata};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nkv_node::Handle;
use nkv_types::Address;
use tokio::net::{TcpListener, UnixListener, UnixSocket, lookup_host};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use crate::door::Door;
use crate::error::ServerError;
use crate::options::Options;
use crate::socket::Socket;

/// The time between a failed accept (no file descriptors, most often) and the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

/// The name of a Unix socket, removed when the server ends.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Device and inode: another server may have put a socket of its own in the place of ours.
    id: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(SocketFile { path: path.to_owned(), id: id_of(path)? })
    }
}

fn id_of(path: &Path) -> io::Result<(u64, u64)> {
    let found = symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_ours = id_of(&self.path).is_ok_and(|id| id == self.id);
        if !is_ours {
            return debug!(path = %self.path.display(), "the socket's name is gone already");
        }
        if let Err(error) = remove_file(&self.path) {
            debug!(%error, path = %self.path.display(), "the socket's name stays");
        }
    }
}

impl Listener {
    /// Listens at `address`: at all addresses that a name has, or at none.
    pub(crate) async fn bind(address: &Address, options: &Options) -> Result<Vec<Self>, ServerError> {
        let failed = |source| ServerError::Bind { address: address.to_string(), source };
        match address {
            Address::Tcp { host, port } => {
                let mut found: Vec<SocketAddr> = Vec::new();
                for address in lookup_host((host.as_str(), *port)).await.map_err(failed)? {
                    if !found.contains(&address) {
                        found.push(address);
                    }
                }
                if !options.insecure && found.iter().any(|found| !is_loopback(*found)) {
                    return Err(ServerError::Insecure { address: address.to_string() });
                }
                bind_all(&address.to_string(), &found).await.map_err(failed)
            }
            Address::Unix { path } => bind_unix(path, options).map(|listener| vec![listener]).map_err(failed),
            Address::Ws { .. } => {
                let what = "ws:// is where a client connects; a server listens at host:port or unix:PATH";
                Err(failed(io::Error::new(io::ErrorKind::Unsupported, what)))
            }
            _ => Err(failed(io::ErrorKind::Unsupported.into())),
        }
    }

    pub(crate) fn address(&self) -> io::Result<Address> {
        Ok(match self {
            Listener::Tcp(listener) => Address::from(listener.local_addr()?),
            Listener::Unix(_, file) => Address::Unix { path: file.path.clone() },
        })
    }

    /// A connection, and the address of its peer if that has one.
    async fn accept(&self) -> io::Result<(Socket, Option<SocketAddr>)> {
        Ok(match self {
            Listener::Tcp(listener) => {
                let (stream, from) = listener.accept().await?;
                (Socket::Tcp(stream), Some(from))
            }
            Listener::Unix(listener, _) => (Socket::Unix(listener.accept().await?.0), None),
        })
    }
}

/// Whether only this host reaches an address.
fn is_loopback(address: SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

/// How often a port is chosen that turns out to be in use at another address of the same name.
const PORT_TRIES: usize = 16;

/// Listens at the same port of all addresses, or at none: were one left out, its clients would find no server, or the
/// next that starts. The exception is an address of loopback that this host does not have, as `::1` without IPv6.
async fn bind_all(name: &str, found: &[SocketAddr]) -> io::Result<Vec<Listener>> {
    let any_port = found.len() > 1 && found.iter().all(|address| address.port() == 0);
    for _ in 1..PORT_TRIES {
        match bind_each(name, found).await {
            Err(error) if any_port && error.kind() == io::ErrorKind::AddrInUse => {}
            bound => return bound,
        }
    }
    bind_each(name, found).await
}

async fn bind_each(name: &str, found: &[SocketAddr]) -> io::Result<Vec<Listener>> {
    let mut listeners = Vec::new();
    let mut port = None;
    let mut absent = None;
    for address in found {
        let mut address = *address;
        address.set_port(port.unwrap_or(address.port()));
        match TcpListener::bind(address).await {
            Ok(listener) => {
                port = Some(listener.local_addr()?.port());
                listeners.push(Listener::Tcp(listener));
            }
            Err(error) if is_loopback(address) && is_absent(&error) => absent = Some((address, error)),
            Err(error) if found.len() == 1 => return Err(error),
            Err(error) => return Err(io::Error::new(error.kind(), format!("{address}: {error}"))),
        }
    }
    match absent {
        Some((_, error)) if listeners.is_empty() => return Err(error),
        Some((address, error)) => warn!("{name} is also {}, which this host does not have: {error}", address.ip()),
        None if listeners.is_empty() => return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address")),
        None => {}
    }
    Ok(listeners)
}

/// `EAFNOSUPPORT`, for which there is no kind.
const NO_SUCH_FAMILY: i32 = if cfg!(target_os = "linux") { 97 } else { 47 };

fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable || error.raw_os_error() == Some(NO_SUCH_FAMILY)
}

/// The longest path of a socket that a client can name, in bytes.
const PATH_LEN_MAX: usize = 107;

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 1_024;

/// No client can connect before the socket listens, and by then it has its group and mode.
fn bind_unix(path: &Path, options: &Options) -> io::Result<Listener> {
    let len = path.as_os_str().len();
    if len > PATH_LEN_MAX {
        let message = format!("a path of {len} bytes; the path of a socket may have {PATH_LEN_MAX}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    remove_stale(path)?;
    let socket = UnixSocket::new_stream()?;
    // Linux gives the name the mode of the socket, less the umask. Elsewhere it is any mode until the one below is set.
    let private = File::from(socket.as_fd().try_clone_to_owned()?).set_permissions(Permissions::from_mode(0o600));
    if let Err(error) = private {
        debug!(%error, "the socket's name gets its mode later");
    }
    socket.bind(path)?;
    let file = SocketFile::of(path)?;
    if let Some(group) = options.socket_group {
        let failed = |error: io::Error| {
            io::Error::new(error.kind(), format!("the socket cannot be given to the group {group}: {error}"))
        };
        lchown(path, None, Some(group)).map_err(failed)?;
    }
    set_permissions(path, Permissions::from_mode(options.socket_mode))?;
    Ok(Listener::Unix(socket.listen(BACKLOG)?, file))
}

/// Removes a socket without a listener, left over from a crash.
fn remove_stale(path: &Path) -> io::Result<()> {
    match symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            Err(io::Error::new(io::ErrorKind::AlreadyExists, "a file of this name is there, and no socket"))
        }
        Ok(_) => match UnixStream::connect(path) {
            Ok(_) => Err(io::ErrorKind::AddrInUse.into()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => remove_file(path),
            // It may be another user's, and in use.
            Err(error) => Err(error),
        },
        Err(_) => Ok(()),
    }
}

/// A door, as the tasks see it that accept its connections.
pub(crate) trait Serve: Send + Sync + 'static {
    /// The store behind it.
    fn handle(&self) -> &Handle;

    /// Serves a connection; `None` where it was refused at once.
    fn serve_socket(&self, socket: Socket, peer: &str) -> Option<impl Future<Output = ()> + Send + 'static>;
}

/// A door that lives in another crate: how it serves a socket and its peer's address, and the store behind it.
#[cfg(any(feature = "http", feature = "grpc"))]
pub(crate) struct Outside<F>(pub(crate) F, pub(crate) Handle);

#[cfg(any(feature = "http", feature = "grpc"))]
impl<F, Served> Serve for Outside<F>
where
    F: Fn(Socket, String) -> Served + Send + Sync + 'static,
    Served: Future<Output = ()> + Send + 'static,
{
    fn handle(&self) -> &Handle {
        &self.1
    }

    fn serve_socket(&self, socket: Socket, peer: &str) -> Option<impl Future<Output = ()> + Send + 'static> {
        if let Err(error) = socket.prepare() {
            debug!(%error, peer, "a socket could not be prepared");
        }
        Some((self.0)(socket, peer.to_owned()))
    }
}

/// Accepts and serves the connections of a door until the node stops, then waits for them to end.
pub(crate) async fn accept(door: impl Serve, listener: Listener) {
    let (mut connections, handle) = (JoinSet::new(), door.handle());
    let mut stopping = std::pin::pin!(handle.stopping());
    loop {
        tokio::select! {
            biased;
            () = &mut stopping => break,
            Some(ended) = connections.join_next() => log_panic(&ended),
            accepted = listener.accept() => match accepted {
                Ok((socket, from)) => {
                    let peer = from.map_or_else(|| "unix".into(), |from| from.to_string());
                    if let Some(served) = door.serve_socket(socket, &peer) {
                        connections.spawn(served);
                    }
                }
                Err(error) => {
                    handle.log().warn("accept", format_args!("cannot accept a connection: {error}"));
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    while let Some(ended) = connections.join_next().await {
        log_panic(&ended);
    }
}

impl Serve for Door {
    fn handle(&self) -> &Handle {
        &self.0.handle
    }

    fn serve_socket(&self, socket: Socket, peer: &str) -> Option<impl Future<Output = ()> + Send + 'static> {
        Door::serve_socket(self, socket, peer)
    }
}

fn log_panic(ended: &Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection's task broke");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(hosts: &[&str], port: u16) -> Vec<SocketAddr> {
        hosts.iter().map(|host| SocketAddr::new(host.parse().unwrap(), port)).collect()
    }

    fn ports(listeners: &[Listener]) -> Vec<u16> {
        let port = |listener: &Listener| match listener {
            Listener::Tcp(listener) => listener.local_addr().unwrap().port(),
            Listener::Unix(..) => panic!("a Unix socket"),
        };
        listeners.iter().map(port).collect()
    }

    // Only the first was listened at: clients of the second found no server, or another one.
    #[tokio::test(flavor = "current_thread")]
    async fn all_addresses_of_a_name_are_listened_at_or_none() {
        let listeners = bind_all("a", &addresses(&["127.0.0.1", "127.0.0.2", "127.0.0.3"], 0)).await.unwrap();
        let [port, second, third] = ports(&listeners)[..] else { panic!("not three: {listeners:?}") };
        assert!(port != 0 && port == second && port == third);

        // One of them is in use.
        let refused = bind_all("a", &addresses(&["127.0.0.4", "127.0.0.2"], port)).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AddrInUse);
        assert!(refused.to_string().contains("127.0.0.2"), "{refused}");
        assert!(std::net::TcpListener::bind(("127.0.0.4", port)).is_ok(), "one is listened at all the same");

        // One of them is another host's.
        let refused = bind_all("a", &addresses(&["127.0.0.1", "192.0.2.1"], 0)).await.unwrap_err();
        assert!(refused.to_string().contains("192.0.2.1"), "{refused}");
    }

    #[test]
    fn loopback_is_known_in_every_notation() {
        for (host, expected) in [("127.0.0.9", true), ("::1", true), ("::ffff:127.0.0.1", true), ("::", false)] {
            assert_eq!(is_loopback(SocketAddr::new(host.parse().unwrap(), 1)), expected, "{host}");
        }
    }
}
