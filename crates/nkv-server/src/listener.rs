//! Listening sockets: bound safely, and an accept loop that survives every error.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener, lookup_host};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::debug;

use crate::address::Address;
use crate::connection::{self, Socket};
use crate::core::Core;
use crate::server::{ServerError, stopped};

/// After a failed accept (no file descriptors, most often), so long passes before the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, SocketFile),
}

/// The name of a Unix socket, removed when the server ends.
#[derive(Debug)]
pub(crate) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            debug!(%error, path = %self.0.display(), "the socket's name is gone already");
        }
    }
}

impl Listener {
    pub(crate) async fn bind(address: &Address, insecure: bool) -> Result<Self, ServerError> {
        let failed = |source| ServerError::Bind { address: address.to_string(), source };
        match address {
            Address::Tcp(text) => {
                let found: Vec<SocketAddr> = lookup_host(text).await.map_err(failed)?.collect();
                if !insecure && found.iter().any(|found| !found.ip().is_loopback()) {
                    return Err(ServerError::Insecure { address: text.clone() });
                }
                TcpListener::bind(&*found).await.map(Listener::Tcp).map_err(failed)
            }
            Address::Unix(path) => bind_unix(path).map_err(failed),
        }
    }

    pub(crate) fn address(&self) -> io::Result<Address> {
        Ok(match self {
            Listener::Tcp(listener) => Address::Tcp(listener.local_addr()?.to_string()),
            Listener::Unix(_, file) => Address::Unix(file.0.clone()),
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

/// Binds within a directory that only we may enter, then moves the socket to its place: at no time may others connect.
fn bind_unix(path: &Path) -> io::Result<Listener> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "a file of this name is there, and no socket"));
        }
        Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        Ok(_) | Err(_) => {} // a socket that nobody listens at, left over from a crash, is replaced
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let private = parent.join(format!(".nkv-{:08x}", getrandom::u32().map_err(io::Error::other)?));
    std::fs::DirBuilder::new().mode(0o700).create(&private)?;
    let hidden = private.join("s");
    let bound = UnixListener::bind(&hidden).and_then(|listener| {
        std::fs::set_permissions(&hidden, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&hidden, path)?;
        Ok(Listener::Unix(listener, SocketFile(path.to_owned())))
    });
    let removed = std::fs::remove_dir_all(&private);
    let listener = bound?;
    removed?;
    Ok(listener)
}

/// What every connection of a server needs.
#[derive(Clone, Debug)]
pub(crate) struct Acceptor {
    pub(crate) core: Arc<Core>,
    pub(crate) stop: watch::Receiver<bool>,
}

impl Acceptor {
    /// Accepts and serves until the server stops, then waits for the connections to end.
    pub(crate) async fn run(mut self, listener: Listener) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                biased;
                () = stopped(&mut self.stop) => break,
                Some(ended) = connections.join_next() => log_panic(&ended),
                accepted = listener.accept() => match accepted {
                    Ok((socket, from)) => self.serve(socket, from, &mut connections),
                    Err(error) => {
                        self.core.complaints.warn("accept", format_args!("cannot accept a connection: {error}"));
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
        drop(listener);
        self.core.budget.stop();
        while let Some(ended) = connections.join_next().await {
            log_panic(&ended);
        }
    }

    fn serve(&self, socket: Socket, from: Option<SocketAddr>, connections: &mut JoinSet<()>) {
        match self.core.slots.take(from) {
            Ok(slot) => {
                connections.spawn(connection::serve(socket, Arc::clone(&self.core), slot));
            }
            Err(full) => {
                self.core.complaints.warn("refused", format_args!("a connection was refused: {full}"));
                socket.refuse(&full.to_string());
            }
        }
    }
}

fn log_panic(ended: &Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection's task broke");
    }
}
