//! Listening sockets: bound safely, and an accept loop that survives every error.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener, lookup_host};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{debug, warn};

use crate::address::Address;
use crate::budget::Budget;
use crate::connection::{self, Socket};
use crate::core::Core;
use crate::server::{Options, ServerError, stopped};

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

    async fn accept(&self) -> io::Result<Socket> {
        Ok(match self {
            Listener::Tcp(listener) => Socket::Tcp(listener.accept().await?.0),
            Listener::Unix(listener, _) => Socket::Unix(listener.accept().await?.0),
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
    pub(crate) options: Options,
    pub(crate) budget: Arc<Budget>,
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
                Some(ended) = connections.join_next() => self.ended(&ended),
                accepted = listener.accept() => match accepted {
                    Ok(socket) => self.serve(socket, &mut connections),
                    Err(error) => {
                        warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
        drop(listener);
        while let Some(ended) = connections.join_next().await {
            self.ended(&ended);
        }
    }

    fn serve(&self, socket: Socket, connections: &mut JoinSet<()>) {
        if self.core.connections.fetch_add(1, Relaxed) >= self.options.connections_max {
            self.core.connections.fetch_sub(1, Relaxed);
            warn!(limit = self.options.connections_max, "a connection was refused: too many");
            return socket.refuse();
        }
        let serve =
            connection::serve(socket, Arc::clone(&self.core), self.options, self.budget.share(), self.stop.clone());
        connections.spawn(serve);
    }

    fn ended(&self, ended: &Result<(), tokio::task::JoinError>) {
        self.core.connections.fetch_sub(1, Relaxed);
        if let Err(error) = ended
            && error.is_panic()
        {
            tracing::error!(%error, "a connection's task broke");
        }
    }
}
