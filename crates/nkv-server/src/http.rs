//! The HTTP door beside the one for JSON lines.

use std::time::Duration;

use nkv_http::{Door, OptionError, Options as HttpOptions};
use nkv_node::{ConnectionLimit, Handle};
use nkv_types::Address;
use tokio::task::JoinSet;

use crate::door::Door as LinesDoor;
use crate::error::ServerError;
use crate::listener::{Listener, Outside, Serve, accept};
use crate::options::Options;
use crate::server::listen_all;

/// Connections that may ask for figures at a time.
const FIGURES_MAX: usize = 256;

/// For how long they may do nothing.
const FIGURES_LIMIT: Duration = Duration::from_secs(5);

/// Where and how HTTP is to be served.
#[derive(Debug, Default)]
pub(crate) struct Http {
    pub(crate) addresses: Vec<Address>,
    pub(crate) metrics: Vec<Address>,
    pub(crate) options: HttpOptions,
}

/// With its listeners.
#[derive(Debug)]
pub(crate) struct Listening {
    http: Vec<Port>,
    metrics: (Vec<Address>, Vec<Listener>),
    options: HttpOptions,
}

/// The listeners of one address.
#[derive(Debug)]
struct Port {
    /// As it was asked for.
    asked: Address,
    addresses: Vec<Address>,
    listeners: Vec<Listener>,
}

impl Http {
    pub(crate) async fn listen(self, options: &Options) -> Result<Listening, ServerError> {
        self.options.check().map_err(wrong)?;
        let mut http = Vec::new();
        for asked in self.addresses {
            let (addresses, listeners) = listen_all(std::slice::from_ref(&asked), options).await?;
            http.push(Port { asked, addresses, listeners });
        }
        let metrics = listen_all(&self.metrics, options).await?;
        Ok(Listening { http, metrics, options: self.options })
    }
}

impl Listening {
    /// Accepts from now on, beside the door for JSON lines; `with_calls` is given each address as it was asked for, and may add gRPC
    /// to its door. Gives the addresses of HTTP, and of figures alone.
    pub(crate) fn serve(
        self,
        lines: &LinesDoor,
        with_calls: impl Fn(&Address, Door) -> Door,
        acceptors: &mut JoinSet<()>,
    ) -> Result<(Vec<Address>, Vec<Address>), ServerError> {
        let handle = &lines.0.handle;
        let mut addresses = Vec::new();
        if !self.http.is_empty() {
            let mut options = self.options.clone();
            options.connections = lines.connection_limit();
            options.stall_limit = lines.0.options.stall_limit;
            options.request_limit = lines.0.options.request_limit;
            let lines = lines.clone();
            let messages = move |stream, peer: Box<str>| {
                let lines = lines.clone();
                async move { lines.serve(stream, peer).await }
            };
            let door = Door::new(handle.clone(), options).map_err(wrong)?.with_messages(messages);
            for port in self.http {
                let door = with_calls(&port.asked, door.clone());
                addresses.extend(port.addresses);
                for listener in port.listeners {
                    acceptors.spawn(accept(served(&door, handle), listener));
                }
            }
        }
        if !self.metrics.1.is_empty() {
            let mut options = self.options;
            options.connections = ConnectionLimit::new(FIGURES_MAX, FIGURES_MAX);
            options.only_figures = true;
            // A connection that does not ask keeps no place.
            (options.head_limit, options.idle_limit) = (FIGURES_LIMIT, FIGURES_LIMIT);
            let door = Door::new(handle.clone(), options).map_err(wrong)?;
            for listener in self.metrics.1 {
                acceptors.spawn(accept(served(&door, handle), listener));
            }
        }
        Ok((addresses, self.metrics.0))
    }
}

fn wrong(error: OptionError) -> ServerError {
    ServerError::System(std::io::Error::new(std::io::ErrorKind::InvalidInput, error))
}

fn served(door: &Door, handle: &Handle) -> impl Serve + use<> {
    let door = door.clone();
    let serve = move |socket, peer| {
        let door = door.clone();
        async move { door.serve(socket, peer).await }
    };
    Outside(serve, handle.clone())
}
