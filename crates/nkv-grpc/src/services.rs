//! The services by their names.

use std::convert::Infallible;
use std::sync::Arc;

use http::{Request, Response};
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;
use tower_service::Service;

use crate::arriving::Arriving;
use crate::connection::ConnectionFuture;

type Answer = dyn Fn(Request<Arriving>) -> ConnectionFuture + Send + Sync;

/// A service and its name.
pub(crate) type Named = (&'static str, Box<Answer>);

/// What a door serves. Clones are the same services.
#[derive(Clone)]
pub(crate) struct Services {
    by_name: Arc<[Named]>,
}

/// Makes a service one of a door.
pub(crate) fn service<S>(service: S) -> Named
where
    S: Service<Request<Arriving>, Response = Response<Body>, Error = Infallible>,
    S: NamedService + Clone + Send + Sync + 'static,
    S::Future: Send + 'static,
{
    (S::NAME, Box::new(move |request| Box::pin(service.clone().call(request))))
}

impl FromIterator<Named> for Services {
    fn from_iter<I: IntoIterator<Item = Named>>(services: I) -> Self {
        Services { by_name: services.into_iter().collect() }
    }
}

impl Services {
    /// Has the service of the request's path answer it.
    pub(crate) fn call(&self, request: Request<Arriving>) -> ConnectionFuture {
        let name = request.uri().path().strip_prefix('/').and_then(|path| path.split_once('/')).map(|(name, _)| name);
        match self.by_name.iter().find(|(known, _)| Some(*known) == name) {
            Some((_, answer)) => answer(request),
            None => {
                let message = format!("there is no service '{}'", name.unwrap_or_default());
                Box::pin(std::future::ready(Ok(Status::unimplemented(message).into_http())))
            }
        }
    }
}
