//! The failure that ends a server, from whatever thread finds it, and how an error reads with its causes.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use nkv_core::{FailureHandler, PersistError};
use tokio::sync::watch;

/// Takes the failure of storage that ends the server; the first one counts. Clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Failure(watch::Sender<Option<Arc<PersistError>>>);

impl Failure {
    pub(crate) fn new() -> Self {
        Failure(watch::Sender::new(None))
    }

    pub(crate) fn report(&self, error: Arc<PersistError>) {
        self.0.send_if_modified(|known| {
            let is_first = known.is_none();
            known.get_or_insert(error);
            is_first
        });
    }

    /// For storage that fails in the background.
    pub(crate) fn handler(&self) -> FailureHandler {
        let failure = self.clone();
        FailureHandler::new(move |error| failure.report(Arc::new(error)))
    }

    /// Waits for it.
    pub(crate) async fn reported(&self) -> Arc<PersistError> {
        let mut reports = self.0.subscribe();
        let reported = reports.wait_for(Option::is_some).await.ok().and_then(|error| error.clone());
        match reported {
            Some(error) => error,
            None => std::future::pending().await, // not while there is a sender, and this is one
        }
    }
}

/// Displays an error and its causes in one line, from the outermost to the innermost.
///
/// ```
/// let inner = std::io::Error::other("the disk is full");
/// let outer = nkv_node::nkv_core::PersistError::new(nkv_node::nkv_core::PersistErrorKind::Io, "cannot write").with_source(inner);
/// assert_eq!(nkv_node::Chain(&outer).to_string(), "cannot write: the disk is full");
/// ```
#[derive(Debug)]
pub struct Chain<'a>(pub &'a dyn Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(inner) = cause {
            write!(f, ": {inner}")?;
            cause = inner.source();
        }
        Ok(())
    }
}
