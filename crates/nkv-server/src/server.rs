//! A running server: made by a builder, stopped on request or on drop.

use std::path::PathBuf;

use nkv_core::{PersistError, PersistValue};
use nkv_node::{Handle, Node};
use nkv_notify_tcp::forget_encodings;
use nkv_types::Address;
use tokio::sync::oneshot;
use tokio::task::{JoinError, JoinHandle, JoinSet};

use crate::door::Door;
use crate::error::ServerError;
#[cfg(feature = "grpc")]
use crate::grpc::Grpc;
#[cfg(feature = "http")]
use crate::http::Http;
use crate::listener::{Listener, accept};
use crate::options::Options;

/// What a server is to be.
#[derive(Debug)]
pub struct Builder {
    addresses: Vec<Address>,
    node: nkv_node::Builder,
    options: Options,
    #[cfg(feature = "http")]
    http: Http,
    #[cfg(feature = "grpc")]
    grpc: Grpc,
}

impl Builder {
    /// Listens at `address` too. Without any, only [`Handle`]s reach the store.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use nkv_server::Server;
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let socket = dir.path().join("nkv.sock");
    /// let unix = format!("unix:{}", socket.display());
    /// let server = Server::builder().listen("127.0.0.1:0".parse()?).listen(unix.parse()?).bind().await?;
    /// assert_eq!(server.addresses().len(), 2);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn listen(mut self, address: Address) -> Self {
        self.addresses.push(address);
        self
    }

    /// Keeps values with what `open` returns, and calls that `durability` in `Stats`. Without it, values live in memory.
    ///
    /// `open` runs on a thread that may block, after the addresses were bound: nothing is opened in vain.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use nkv_persist_fs::{FsOptions, FsPersist};
    /// use nkv_server::Server;
    ///
    /// # let temp = tempfile::tempdir()?;
    /// # let dir = temp.path().join("data");
    /// let server = Server::builder().persist("sync", || FsPersist::open(dir, FsOptions::default())).bind().await?;
    /// server.handle().put("lamp.hall", "on").await?; // on the disk
    /// server.shutdown().await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn persist<P: PersistValue>(
        mut self,
        durability: impl Into<String>,
        open: impl FnOnce() -> Result<P, PersistError> + Send + 'static,
    ) -> Self {
        self.node = self.node.persist(durability, open);
        self
    }

    /// Keeps in this file how far the clock has come that TTLs are counted on, while there are values with one. What is left of
    /// a TTL after a restart does then not depend on two runs having the same wall clock: what passed between them counts only
    /// if both had a clock that was set. Without it the wall clock is believed. `FsPersist` leaves a file `clock` in its
    /// directory alone.
    #[must_use]
    pub fn clock_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.node = self.node.clock_file(path);
        self
    }

    /// Describes the node itself: an [engine](nkv_node::Builder::engine) that decides writes, or
    /// [rights](nkv_node::Builder::rights). Limits are those of the [options](Self::options).
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use nkv_node::{Pattern, Right, Rights};
    /// use nkv_server::Server;
    ///
    /// #[derive(Debug)]
    /// struct ReadOnly;
    ///
    /// impl Rights for ReadOnly {
    ///     fn allows(&self, _principal: &str, right: Right, _pattern: &Pattern) -> bool {
    ///         right == Right::Get
    ///     }
    /// }
    ///
    /// let server = Server::builder().node(|node| node.rights(ReadOnly)).bind().await?;
    /// assert!(server.handle().as_principal("guest").put("lamp.hall", "on").await.is_err());
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn node(mut self, describe: impl FnOnce(nkv_node::Builder) -> nkv_node::Builder) -> Self {
        self.node = describe(self.node);
        self
    }

    /// Sets the limits.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use nkv_server::{Options, Server};
    ///
    /// let mut options = Options::default();
    /// options.value_len_max = 4_096;
    /// let server = Server::builder().options(options).bind().await?;
    /// assert!(server.handle().put("lamp.hall", vec![0; 5_000]).await.is_err());
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn options(mut self, options: Options) -> Self {
        self.options = options;
        self
    }

    /// Serves HTTP at `address` too: the [`HTTP door`](nkv_http::Door), with WebSockets that speak the JSON-lines protocol. The
    /// doors share the connection limit.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use nkv_server::Server;
    ///
    /// let server = Server::builder().http("127.0.0.1:0".parse()?).bind().await?;
    /// println!("http://{}", server.http_addresses()[0]);
    /// # Ok(()) }
    /// ```
    #[cfg(feature = "http")]
    #[must_use]
    pub fn http(mut self, address: Address) -> Self {
        self.http.addresses.push(address);
        self
    }

    /// Serves health and figures alone at `address`, by HTTP, under any host name and whatever the connection limit is.
    #[cfg(feature = "http")]
    #[must_use]
    pub fn metrics(mut self, address: Address) -> Self {
        self.http.metrics.push(address);
        self
    }

    /// Sets how the HTTP door is to be. Its connection limit is that of the [options](Self::options).
    #[cfg(feature = "http")]
    #[must_use]
    pub fn http_options(mut self, options: nkv_http::Options) -> Self {
        self.http.options = options;
        self
    }

    /// Serves gRPC at `address` too: the [gRPC door](nkv_grpc::Door). At an address that [`http`](Self::http) was given as well, both
    /// are served at one port.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use nkv_server::Server;
    ///
    /// let server = Server::builder().grpc("127.0.0.1:0".parse()?).bind().await?;
    /// println!("gRPC at {}", server.grpc_addresses()[0]);
    /// # Ok(()) }
    /// ```
    #[cfg(feature = "grpc")]
    #[must_use]
    pub fn grpc(mut self, address: Address) -> Self {
        self.grpc.addresses.push(address);
        self
    }

    /// Sets how the gRPC door is to be, and which mesh of the replicated gRPC store it joins. Its limits of connections and time are
    /// those of the [options](Self::options).
    #[cfg(feature = "grpc")]
    #[must_use]
    pub fn grpc_options(mut self, options: nkv_grpc::Options) -> Self {
        self.grpc.options = options;
        self
    }

    /// Loads what was stored and starts to listen, on the current Tokio runtime (I/O and time enabled).
    ///
    /// # Errors
    ///
    /// [`ServerError`]; nothing runs then.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use nkv_server::{Server, ServerError};
    ///
    /// let first = Server::builder().listen("127.0.0.1:0".parse()?).bind().await?;
    /// let taken = first.addresses()[0].clone();
    /// let second: Result<Server, ServerError> = Server::builder().listen(taken).bind().await;
    /// println!("{}", second.unwrap_err()); // there is one at this address
    /// # Ok(()) }
    /// ```
    pub async fn bind(self) -> Result<Server, ServerError> {
        let (addresses, listeners) = listen_all(&self.addresses, &self.options).await?;
        #[cfg(feature = "grpc")]
        let shared: Vec<Address> = shared(&self);
        #[cfg(feature = "http")]
        let http = self.http.listen(&self.options).await?;
        #[cfg(feature = "grpc")]
        let grpc = self.grpc.listen(&self.options, &shared).await?;
        let node = self.node.limits(self.options.node_limits()).after_wake_ups(forget_encodings).start().await?;
        let handle = node.handle();
        let door = Door::new(handle.clone(), self.options);
        let mut acceptors = JoinSet::new();
        for listener in listeners {
            acceptors.spawn(accept(door.clone(), listener));
        }
        #[cfg(feature = "grpc")]
        let calls = grpc.door(&door, &shared);
        #[cfg(feature = "http")]
        let (http_addresses, metrics_addresses) = {
            let with_calls = |asked: &Address, http: nkv_http::Door| {
                #[cfg(feature = "grpc")]
                if let Some(calls) = calls.clone().filter(|_| shared.contains(asked)) {
                    return http.with_calls(move |peer| crate::grpc::shared::calls(&calls, peer));
                }
                let _ = asked;
                http
            };
            http.serve(&door, with_calls, &mut acceptors)?
        };
        #[cfg(feature = "grpc")]
        let grpc_addresses = grpc.serve(calls, &door, &mut acceptors);
        let (stop, stop_asked) = oneshot::channel();
        let running = tokio::spawn(run(node, acceptors, stop_asked));
        Ok(Server {
            addresses,
            #[cfg(feature = "http")]
            http_addresses,
            #[cfg(feature = "http")]
            metrics_addresses,
            #[cfg(feature = "grpc")]
            grpc_addresses,
            handle,
            stop,
            running,
        })
    }
}

/// A running server. Dropping it stops it too, without waiting.
#[derive(Debug)]
pub struct Server {
    addresses: Vec<Address>,
    #[cfg(feature = "http")]
    http_addresses: Vec<Address>,
    #[cfg(feature = "http")]
    metrics_addresses: Vec<Address>,
    #[cfg(feature = "grpc")]
    grpc_addresses: Vec<Address>,
    handle: Handle,
    /// Dropped to stop.
    stop: oneshot::Sender<()>,
    running: JoinHandle<Result<(), ServerError>>,
}

impl Server {
    /// A server to be described: at no address, in memory, with the default limits.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use nkv_server::Server;
    ///
    /// let server = Server::builder().listen("127.0.0.1:0".parse()?).bind().await?;
    /// println!("listening at {}", server.addresses()[0]);
    /// server.shutdown().await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn builder() -> Builder {
        Builder {
            addresses: Vec::new(),
            node: Node::builder(),
            options: Options::default(),
            #[cfg(feature = "http")]
            http: Http::default(),
            #[cfg(feature = "grpc")]
            grpc: Grpc::default(),
        }
    }

    /// Where it listens, in the order asked for, with the ports that it was given. A name has one for each of its
    /// addresses, all with the same port.
    #[must_use]
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// Where it serves HTTP, as [`addresses`](Self::addresses).
    #[cfg(feature = "http")]
    #[must_use]
    pub fn http_addresses(&self) -> &[Address] {
        &self.http_addresses
    }

    /// Where it serves health and figures alone, as [`addresses`](Self::addresses).
    #[cfg(feature = "http")]
    #[must_use]
    pub fn metrics_addresses(&self) -> &[Address] {
        &self.metrics_addresses
    }

    /// Where it serves gRPC alone, as [`addresses`](Self::addresses).
    #[cfg(feature = "grpc")]
    #[must_use]
    pub fn grpc_addresses(&self) -> &[Address] {
        &self.grpc_addresses
    }

    /// The store, from within the process.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let server = nkv_server::Server::builder().listen("127.0.0.1:0".parse()?).bind().await?;
    /// let nkv = server.handle();
    /// nkv.put("lamp.hall", "on").await?; // clients that subscribed to it hear of it
    /// assert!(nkv.get("lamp.hall").await?.is_some());
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Stops: accepts no more, finishes what was accepted, ends the connections, closes the storage.
    ///
    /// # Errors
    ///
    /// [`ServerError`] if the server had failed before; [`ServerError::Persist`] if the last sync of storage failed, or if
    /// storage did not answer within 5 s. In that case the thread that waits for it goes on, and keeps the storage.
    ///
    /// # Examples
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let server = nkv_server::Server::builder().bind().await?;
    /// let nkv = server.handle();
    /// server.shutdown().await?;
    /// assert!(nkv.put("lamp.hall", "on").await.is_err()); // no more writes are taken
    /// # Ok(()) }
    /// ```
    pub async fn shutdown(self) -> Result<(), ServerError> {
        let Server { stop, running, .. } = self;
        drop(stop);
        ended(running.await)
    }

    /// Waits until the server ends by itself, which it does only when storage fails.
    ///
    /// # Errors
    ///
    /// [`ServerError::Persist`] then.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub async fn wait(mut self) -> Result<(), ServerError> {
        self.failed().await
    }

    /// As [`wait`](Self::wait), for callers that want to stop the server themselves afterwards.
    ///
    /// # Errors
    ///
    /// [`ServerError::Persist`] when storage has failed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub async fn failed(&mut self) -> Result<(), ServerError> {
        ended((&mut self.running).await)
    }
}

/// Where HTTP and gRPC are served at one port.
#[cfg(feature = "grpc")]
fn shared(builder: &Builder) -> Vec<Address> {
    #[cfg(feature = "http")]
    let http = &builder.http.addresses[..];
    #[cfg(not(feature = "http"))]
    let http: &[Address] = &[];
    builder.grpc.addresses.iter().filter(|address| http.contains(address)).cloned().collect()
}

/// Listens at all of `addresses`, or at none: where that is, and the listeners.
pub(crate) async fn listen_all(
    addresses: &[Address],
    options: &Options,
) -> Result<(Vec<Address>, Vec<Listener>), ServerError> {
    let mut listeners = Vec::new();
    for address in addresses {
        listeners.extend(Listener::bind(address, options).await?);
    }
    let addresses = listeners.iter().map(Listener::address).collect::<Result<_, _>>().map_err(ServerError::System)?;
    Ok((addresses, listeners))
}

fn ended(ended: Result<Result<(), ServerError>, JoinError>) -> Result<(), ServerError> {
    ended.unwrap_or_else(|error| Err(ServerError::System(error.into())))
}

/// Runs until the node has ended; connections that have not ended by then are cut.
async fn run(mut node: Node, mut acceptors: JoinSet<()>, stop: oneshot::Receiver<()>) -> Result<(), ServerError> {
    let result = tokio::select! {
        result = node.failed() => result,
        _ = stop => node.shutdown().await,
    };
    acceptors.shutdown().await;
    Ok(result?)
}
