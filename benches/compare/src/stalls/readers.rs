//! Subscribers of everything that read all notifications and drop them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::pool::{Pool, Target};
use crate::sys::{self, Io, SECOND};
use crate::{Result, drivers};

const SUBSCRIBERS: usize = 100;

/// Nanoseconds without a notification after which subscribers have received everything.
const QUIET: u64 = SECOND / 4;
const QUIET_LIMIT: u64 = 60 * SECOND;

/// The subscribers, on a thread of their own.
#[derive(Debug)]
pub(super) struct Readers {
    state: Arc<Reading>,
    thread: Option<JoinHandle<Result<()>>>,
}

#[derive(Debug, Default)]
struct Reading {
    stop: AtomicBool,
    closed: AtomicUsize,
    /// When something came last.
    last: AtomicU64,
}

impl Readers {
    /// Returns once all of them are subscribed.
    pub(super) fn start(target: Target) -> Result<Readers> {
        let state = Arc::new(Reading::default());
        let (ready, when_ready) = mpsc::channel();
        let thread = thread::spawn({
            let state = Arc::clone(&state);
            move || Readers::read(target, &state, &ready)
        });
        let mut readers = Readers { state, thread: Some(thread) };
        if when_ready.recv().is_err() {
            return Err(readers.join().err().unwrap_or_else(|| "the subscribers ended".into()));
        }
        Ok(readers)
    }

    fn read(target: Target, state: &Reading, ready: &mpsc::Sender<()>) -> Result<()> {
        let mut pool = Pool::open(target, drivers::HEAD, SUBSCRIBERS, 1)?;
        for id in 0..SUBSCRIBERS {
            pool.subscribe(id, "*")?;
        }
        state.last.store(sys::now(), Ordering::SeqCst);
        let _ = ready.send(());
        let mut scratch = vec![0; 1 << 20];
        while !state.stop.load(Ordering::SeqCst) {
            pool.epoll.wait(50)?;
            for event in &pool.epoll.events {
                let socket = pool.connections[event.data.u64() as usize].socket();
                match sys::discard(socket, &mut scratch) {
                    Io::Done(_) => state.last.store(sys::now(), Ordering::SeqCst),
                    Io::Again => {}
                    Io::Closed => {
                        state.closed.fetch_add(1, Ordering::SeqCst);
                        pool.epoll.remove(socket);
                    }
                }
            }
        }
        Ok(())
    }

    pub(super) fn wait_until_quiet(&self) {
        let limit = sys::now() + QUIET_LIMIT;
        while sys::now() < limit.min(self.state.last.load(Ordering::SeqCst) + QUIET) {
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends them; returns how many the server had closed.
    pub(super) fn stop(mut self) -> Result<usize> {
        self.join()?;
        Ok(self.state.closed.load(Ordering::SeqCst))
    }

    fn join(&mut self) -> Result<()> {
        self.state.stop.store(true, Ordering::SeqCst);
        let ended = self.thread.take().map(JoinHandle::join);
        ended.unwrap_or(Ok(Ok(()))).unwrap_or_else(|_| Err("the subscribers panicked".into()))
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
    }
}
