//! The gRPC door beside the one for JSON lines: at a port of its own, or at one with HTTP.

use nkv_grpc::{Door, Options as GrpcOptions};
use nkv_types::Address;
use tokio::task::JoinSet;

use crate::door::Door as LinesDoor;
use crate::error::ServerError;
use crate::listener::{Listener, Outside, accept};
use crate::options::Options;
use crate::server::listen_all;

/// Where gRPC is to be served.
#[derive(Debug, Default)]
pub(crate) struct Grpc {
    pub(crate) addresses: Vec<Address>,
    pub(crate) options: GrpcOptions,
}

/// With its listeners.
#[derive(Debug)]
pub(crate) struct Listening {
    addresses: Vec<Address>,
    listeners: Vec<Listener>,
    options: GrpcOptions,
}

impl Grpc {
    /// Listens at all addresses but those that HTTP has too.
    pub(crate) async fn listen(self, options: &Options, shared: &[Address]) -> Result<Listening, ServerError> {
        let own: Vec<_> = self.addresses.into_iter().filter(|address| !shared.contains(address)).collect();
        let (addresses, listeners) = listen_all(&own, options).await?;
        Ok(Listening { addresses, listeners, options: self.options })
    }
}

impl Listening {
    /// The door of a node, if there is anything to serve, here or at a port of HTTP.
    pub(crate) fn door(&self, lines: &LinesDoor, shared: &[Address]) -> Option<Door> {
        if self.listeners.is_empty() && shared.is_empty() {
            return None;
        }
        let mut options = self.options.clone();
        options.connections = lines.connection_limit();
        options.stall_limit = lines.0.options.stall_limit;
        options.request_limit = lines.0.options.request_limit;
        options.first_byte_limit = lines.0.options.first_byte_limit;
        options.idle_limit = lines.0.options.idle_limit;
        Some(Door::new(lines.0.handle.clone(), options))
    }

    /// Accepts from now on; gives the addresses.
    pub(crate) fn serve(self, door: Option<Door>, lines: &LinesDoor, acceptors: &mut JoinSet<()>) -> Vec<Address> {
        let Some(door) = door else { return self.addresses };
        for listener in self.listeners {
            let door = door.clone();
            let serve = move |socket, peer| {
                let door = door.clone();
                async move { door.serve(socket, peer).await }
            };
            acceptors.spawn(accept(Outside(serve, lines.0.handle.clone()), listener));
        }
        self.addresses
    }
}

#[cfg(feature = "http")]
pub(crate) mod shared {
    //! gRPC at a port of HTTP.

    use std::fmt;
    use std::pin::Pin;

    use http::Request;
    use http_body_util::BodyExt;
    use hyper::body::Incoming;
    use nkv_grpc::{Connection, Door};
    use nkv_http::{Calls, CallsFuture};
    use tower_service::Service;

    struct Shared(Connection);

    /// What answers the calls of one connection.
    pub(crate) fn calls(door: &Door, peer: &str) -> Box<dyn Calls> {
        Box::new(Shared(door.connection(peer)))
    }

    impl Calls for Shared {
        fn call(&self, request: Request<Incoming>) -> CallsFuture {
            let answered = self.0.clone().call(request);
            Box::pin(async move {
                let Ok(response) = answered.await;
                response.map(|body| body.map_err(Into::into).boxed_unsync())
            })
        }

        fn evicted(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
            Box::pin(self.0.evicted())
        }
    }

    impl fmt::Debug for Shared {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Shared")
        }
    }
}
