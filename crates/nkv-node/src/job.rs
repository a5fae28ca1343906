//! Writes on their way to the writer, and the room that they take.

use std::time::Instant;

use nkv_core::{Write, WriteResult};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

/// Writes to be done, and where to say what became of them.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) write: Write,
    pub(crate) results: oneshot::Sender<Vec<WriteResult>>,
    /// When it was handed over, if that is counted.
    pub(crate) began: Option<Instant>,
    /// Its share of what may wait to be stored, given back when it is done.
    pub(crate) _room: Room,
}

impl AsMut<Write> for Job {
    fn as_mut(&mut self) -> &mut Write {
        &mut self.write
    }
}

/// A share of the bytes that may wait to be stored, or may be on their way, given back when it is dropped: to be had before
/// the bytes are.
#[derive(Debug)]
pub struct Room(pub(crate) OwnedSemaphorePermit);

impl Room {
    /// How many bytes it is for.
    #[must_use]
    pub fn size(&self) -> usize {
        self.0.num_permits()
    }

    /// Adds the bytes of another, which came by the same method of the same node.
    ///
    /// # Panics
    ///
    /// If it is for writes and the other for arrivals, or they are of two nodes.
    pub fn merge(&mut self, other: Room) {
        self.0.merge(other.0);
    }
}

#[cfg(test)]
impl Job {
    pub(crate) fn for_tests(ops: Vec<nkv_core::Op>) -> (Self, oneshot::Receiver<Vec<WriteResult>>) {
        let (results, done) = oneshot::channel();
        let room = std::sync::Arc::new(tokio::sync::Semaphore::new(1)).try_acquire_owned().unwrap();
        (Job { write: Write::together(ops), results, began: None, _room: Room(room) }, done)
    }
}
