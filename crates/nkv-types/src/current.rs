//! A state that is always current.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use tokio::sync::watch;

use crate::branch::Branch;
use crate::error::{Error, ErrorKind, Result};
use crate::watched::Watched;

/// The value of a key as it changes.
pub type Watch<T> = Current<Watched<T>>;

/// The keys that a pattern covers, with their values, as they change.
pub type BranchWatch<T> = Current<Branch<T>>;

/// A state as it changes. Clones follow it independently; when the last one is dropped, the subscription ends.
pub struct Current<S> {
    receiver: watch::Receiver<S>,
    _end: Arc<dyn Any + Send + Sync>,
}

impl<S> Current<S> {
    /// Makes one, for code that keeps a state up to date. `end` is dropped with the last clone.
    pub fn new(receiver: watch::Receiver<S>, end: impl Any + Send + Sync) -> Self {
        Current { receiver, _end: Arc::new(end) }
    }

    /// What is known now. It is never older than what a put of the same client that is done has made of a key, or a delete
    /// of up to 1,024 keys; that of a handle is brought up to date by a task, a moment later.
    ///
    /// Nothing is copied. What is borrowed must not be held for long, and not across an `await`: what keeps it up to date waits for it.
    pub fn borrow(&self) -> watch::Ref<'_, S> {
        self.receiver.borrow()
    }

    /// What is known now, marked as seen.
    pub fn borrow_and_update(&mut self) -> watch::Ref<'_, S> {
        self.receiver.borrow_and_update()
    }

    /// Waits for a change of the state, or of whether it is live, that was not seen yet.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Closed`]: the subscription has ended, and the state stays as it is; it
    /// says why.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub async fn changed(&mut self) -> Result<()> {
        self.receiver.changed().await.map_err(|_| closed())
    }

    /// Waits until what is known is as wanted, and gives it.
    ///
    /// # Errors
    ///
    /// Those of [`changed`](Self::changed).
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub async fn wait_for(&mut self, is_wanted: impl FnMut(&S) -> bool) -> Result<watch::Ref<'_, S>> {
        self.receiver.wait_for(is_wanted).await.map_err(|_| closed())
    }
}

impl<S> Clone for Current<S> {
    fn clone(&self) -> Self {
        Current { receiver: self.receiver.clone(), _end: Arc::clone(&self._end) }
    }
}

impl<S: fmt::Debug> fmt::Debug for Current<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Current").field(&*self.receiver.borrow()).finish()
    }
}

fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the subscription has ended")
}
