//! Group commit among threads: those that write at the same time share what storage does for one batch.
//!
//! The first to come does its own write at once: one batch of it. What comes meanwhile waits, with what is left of that, and
//! one of those that wait does it for all.

use std::collections::HashMap;
use std::sync::PoisonError;

use crate::sync::{Condvar, Mutex, MutexGuard, yield_now};
use crate::wake::Later;
use crate::write::Write;

#[derive(Debug, Default)]
pub(crate) struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Some thread commits.
    is_busy: bool,
    next: u64,
    /// Each with the number by which its caller knows it; those that have begun come first.
    writes: Vec<(u64, Write)>,
    done: HashMap<u64, Write>,
    /// How many were done together last: the same number may come again.
    last: usize,
}

/// Those that were just answered may bring their next write: the turns of others that a batch waits for, at most.
const TURNS: usize = 16;

impl Queue {
    /// Does `write` with `commit`, which does part of what it is given, together with others.
    pub(crate) fn run(&self, mut write: Write, commit: impl Fn(&mut [Write])) -> Write {
        let mut waiting = self.lock();
        if !waiting.is_busy && waiting.writes.is_empty() {
            waiting.is_busy = true;
            drop(waiting);
            // What is woken may write, and is not to wait for this thread.
            let later = Later::begin();
            let leader = Leader { queue: self, numbers: Vec::new(), writes: Vec::new() };
            commit(std::slice::from_mut(&mut write));
            drop(leader);
            drop(later);
            if write.is_done() {
                return write;
            }
            // What is left of it is done with what others want meanwhile.
            waiting = self.lock();
        }
        let number = waiting.next;
        waiting.next += 1;
        waiting.writes.push((number, write));
        loop {
            if let Some(write) = waiting.done.remove(&number) {
                return write;
            }
            if waiting.is_busy {
                waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            waiting.is_busy = true;
            for _ in 0..TURNS {
                if waiting.writes.len() >= waiting.last {
                    break;
                }
                drop(waiting);
                yield_now();
                waiting = self.lock();
            }
            let (numbers, writes): (Vec<u64>, Vec<Write>) = std::mem::take(&mut waiting.writes).into_iter().unzip();
            waiting.last = writes.len();
            drop(waiting);
            let later = Later::begin();
            let mut leader = Leader { queue: self, numbers, writes };
            commit(&mut leader.writes);
            drop(leader);
            drop(later);
            waiting = self.lock();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Those that one thread does. When it is dropped, also by a panic of storage, what is not done goes back to the front,
/// and another thread may commit.
struct Leader<'a> {
    queue: &'a Queue,
    numbers: Vec<u64>,
    writes: Vec<Write>,
}

impl Drop for Leader<'_> {
    fn drop(&mut self) {
        // Only after a panic is something planned and neither stored nor refused.
        self.writes.iter_mut().for_each(|write| _ = write.undo());
        let writes = self.numbers.drain(..).zip(self.writes.drain(..));
        let (done, rest): (Vec<_>, Vec<_>) = writes.partition(|(_, write)| write.is_done());
        let mut waiting = self.queue.lock();
        waiting.done.extend(done);
        waiting.writes.splice(..0, rest);
        waiting.is_busy = false;
        drop(waiting);
        self.queue.changed.notify_all();
    }
}
