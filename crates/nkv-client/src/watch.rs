//! One value, always current.

use std::fmt;
use std::sync::Arc;

use nkv_core::Pattern;
use nkv_types::{Entry, Error, Result, Revision, Watched};
use tokio::sync::watch;

use crate::client::Handle;
use crate::error::WireError as _;
use crate::task::Control;

/// The value of a key as it changes. Clones follow it independently; when the last one is dropped, the subscription ends.
#[derive(Clone)]
pub struct Watch<T> {
    receiver: watch::Receiver<Watched<T>>,
    _end: Arc<EndOnDrop>,
}

/// Ends the subscription.
pub(crate) struct EndOnDrop {
    pub(crate) handle: Arc<Handle>,
    pub(crate) pattern: Pattern,
    pub(crate) id: u64,
}

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        // If it fails, the connection is closed, and the subscription with it.
        drop(self.handle.control(Control::Unsubscribe(self.pattern.clone(), self.id)));
    }
}

impl<T> Watch<T> {
    pub(crate) fn new(receiver: watch::Receiver<Watched<T>>, end: EndOnDrop) -> Self {
        Watch { receiver, _end: Arc::new(end) }
    }

    /// What is known now. It is never older than what a put of the same client that is done has made of the key, or a delete
    /// of up to 1,024 keys.
    ///
    /// What is borrowed is not to be held for long: the connection waits for it.
    pub fn borrow(&self) -> watch::Ref<'_, Watched<T>> {
        self.receiver.borrow()
    }

    /// What is known now, marked as seen.
    pub fn borrow_and_update(&mut self) -> watch::Ref<'_, Watched<T>> {
        self.receiver.borrow_and_update()
    }

    /// Waits for a change of the value, or of whether it is live, that was not seen yet.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Closed`](crate::ErrorKind::Closed): the subscription has ended, and the value stays as it is.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing.
    pub async fn changed(&mut self) -> Result<()> {
        self.receiver.changed().await.map_err(|_| Error::closed())
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
    pub async fn wait_for(&mut self, is_wanted: impl FnMut(&Watched<T>) -> bool) -> Result<watch::Ref<'_, Watched<T>>> {
        self.receiver.wait_for(is_wanted).await.map_err(|_| Error::closed())
    }
}

impl<T: fmt::Debug> fmt::Debug for Watch<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watch").field(&*self.receiver.borrow()).finish()
    }
}

/// The side of the connection's task.
pub(crate) trait Watcher: Send {
    /// The key has this value now, or none; nothing happens if something newer is known.
    fn set(&mut self, entry: Option<&Entry>, revision: Revision);

    /// Whether what is known is what the server says.
    fn set_live(&mut self, is_live: bool);
}

/// Gives the value to a channel, as `read` reads it.
pub(crate) struct ChannelWatcher<T, F> {
    pub(crate) sender: watch::Sender<Watched<T>>,
    pub(crate) read: F,
    /// The newest change that was heard of, the end of a key too.
    newest: Revision,
}

impl<T, F: Fn(&Entry) -> Result<T>> ChannelWatcher<T, F> {
    /// The watcher, and where its values come.
    pub(crate) fn new(read: F) -> (Self, watch::Receiver<Watched<T>>) {
        let (sender, receiver) = watch::channel(Watched::default());
        (ChannelWatcher { sender, read, newest: Revision::ZERO }, receiver)
    }
}

impl<T: Send + Sync, F: Fn(&Entry) -> Result<T> + Send> Watcher for ChannelWatcher<T, F> {
    fn set(&mut self, entry: Option<&Entry>, revision: Revision) {
        // By revision 0 everything is gone, in a store that has nothing yet.
        if revision.get() > 0 && revision <= self.newest {
            return;
        }
        self.newest = revision;
        let read = entry.map(&self.read).transpose();
        let revision = entry.map_or(Revision::ZERO, |entry| entry.revision);
        self.sender.send_modify(|watched| {
            watched.revision = revision;
            match read {
                Ok(value) => (watched.value, watched.error) = (value, None),
                Err(error) => watched.error = Some(error),
            }
        });
    }

    fn set_live(&mut self, is_live: bool) {
        self.sender.send_if_modified(|watched| std::mem::replace(&mut watched.is_live, is_live) != is_live);
    }
}
