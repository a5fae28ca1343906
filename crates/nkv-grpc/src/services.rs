//! The services by their names: those of the store, which know their connection, and those of the door.

use std::convert::Infallible;
use std::sync::Arc;

use http::{Request, Response};
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;
use tower_service::Service;

use crate::arriving::Arriving;
use crate::connection::ConnectionFuture;
use crate::kv::client_server::ClientServer;
use crate::kv_client::KvClientService;
use crate::line::Line;
use crate::node_kv::KvService;
use crate::v1::kv_server::KvServer;

/// The most that one message of an answer may have: the limit of what is kept for it is the budget of the node.
const ENCODED_LEN_MAX: usize = 128 << 20;

type Answer = dyn Fn(Request<Arriving>) -> ConnectionFuture + Send + Sync;

/// A service of a door, and its name.
pub(crate) type Named = (&'static str, Box<Answer>);

/// What is served on a connection. Clones are the same services.
#[derive(Clone)]
pub(crate) struct Services {
    kv: KvServer<KvService>,
    client: ClientServer<KvClientService>,
    of_door: Arc<[Named]>,
}

/// Makes a service one of a door.
pub(crate) fn service<S>(service: S) -> Named
where
    S: Service<Request<Arriving>, Response = Response<Body>, Error = Infallible, Future = ConnectionFuture>,
    S: NamedService + Clone + Send + Sync + 'static,
{
    (S::NAME, Box::new(move |request| service.clone().call(request)))
}

impl Services {
    pub(crate) fn new(line: &Arc<Line>) -> Self {
        // The length of a request is checked where it arrives.
        let kv = KvServer::new(KvService(Arc::clone(line))).max_decoding_message_size(usize::MAX);
        let client = ClientServer::new(KvClientService(Arc::clone(line))).max_decoding_message_size(usize::MAX);
        Services {
            kv: kv.max_encoding_message_size(ENCODED_LEN_MAX),
            client: client.max_encoding_message_size(ENCODED_LEN_MAX),
            of_door: Arc::clone(&line.door.services),
        }
    }

    /// Has the service of the request's path answer it.
    pub(crate) fn call(&self, request: Request<Arriving>) -> ConnectionFuture {
        let name = request.uri().path().strip_prefix('/').and_then(|path| path.split_once('/')).map(|(name, _)| name);
        match name {
            Some(<KvServer<KvService> as NamedService>::NAME) => return self.kv.clone().call(request),
            Some(<ClientServer<KvClientService> as NamedService>::NAME) => return self.client.clone().call(request),
            _ => {}
        }
        match self.of_door.iter().find(|(known, _)| Some(*known) == name) {
            Some((_, answer)) => answer(request),
            None => {
                let message = format!("there is no service '{}'", name.unwrap_or_default());
                Box::pin(std::future::ready(Ok(Status::unimplemented(message).into_http())))
            }
        }
    }
}
