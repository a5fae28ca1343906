//! Connections: how one is made and greeted, and what goes over it.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader, ReadHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::wire::{self, Message};

/// Bytes that wait to be pushed to one peer, at most. What is over it comes with the next session.
const PUSH_LEN_MAX: usize = 4 << 20;

/// Peers that have opened a connection and not shown yet who they are, at most: with more, the oldest connection is closed.
pub(crate) const NEWCOMERS_MAX: usize = 64;

/// Their connections, the oldest first: the task of each, and what that holds until its peer has shown who it is.
#[derive(Debug, Default)]
pub(crate) struct Newcomers(VecDeque<(AbortHandle, Weak<()>)>);

impl Newcomers {
    /// Adds a connection, and aborts the oldest over the limit; returns whether there was one.
    pub(crate) fn note(&mut self, task: AbortHandle, newcomer: Weak<()>) -> bool {
        self.0.retain(|(_, newcomer)| newcomer.strong_count() > 0);
        self.0.push_back((task, newcomer));
        let oldest = if self.0.len() > NEWCOMERS_MAX { self.0.pop_front() } else { None };
        oldest.iter().for_each(|(oldest, _)| oldest.abort());
        oldest.is_some()
    }
}

/// A connection.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for S {}

/// How connections are made.
#[async_trait]
pub(crate) trait Network: fmt::Debug + Send + Sync + 'static {
    async fn connect(&self, to: SocketAddr) -> io::Result<Box<dyn Stream>>;

    /// The next one that a peer has opened.
    async fn accept(&self) -> io::Result<Box<dyn Stream>>;
}

/// TCP.
#[derive(Debug)]
pub(crate) struct Tcp(pub(crate) TcpListener);

#[async_trait]
impl Network for Tcp {
    async fn connect(&self, to: SocketAddr) -> io::Result<Box<dyn Stream>> {
        let stream = TcpStream::connect(to).await?;
        stream.set_nodelay(true)?;
        Ok(Box::new(stream))
    }

    async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        let (stream, _) = self.0.accept().await?;
        stream.set_nodelay(true)?;
        Ok(Box::new(stream))
    }
}

/// A connection to a peer, on which one says something and hears something.
#[derive(Debug)]
pub(crate) struct Line {
    from: BufReader<ReadHalf<Box<dyn Stream>>>,
    to: mpsc::Sender<Bytes>,
    frame_len_max: usize,
    /// How long one frame may take on its way, or an answer until it has come.
    patience: Duration,
    sent_at: Instant,
}

impl fmt::Debug for dyn Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stream")
    }
}

impl Line {
    /// A line over a stream, and what writes to it, which is to be run beside.
    pub(crate) fn new(
        stream: Box<dyn Stream>,
        pushes: &PushQueue,
        patience: Duration,
    ) -> (Line, impl Future<Output = io::Error> + Send + use<'_>) {
        let (from, mut stream) = tokio::io::split(stream);
        let (to, mut frames) = mpsc::channel::<Bytes>(4);
        let writer = async move {
            loop {
                let frame = tokio::select! {
                    biased;
                    frame = frames.recv() => match frame {
                        Some(frame) => frame,
                        None => return io::ErrorKind::ConnectionAborted.into(),
                    },
                    frame = pushes.next() => frame,
                };
                let written = timeout(patience, async {
                    stream.write_all(&frame).await?;
                    stream.flush().await
                });
                match written.await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => return error,
                    Err(_) => return io::ErrorKind::TimedOut.into(),
                }
            }
        };
        let from = BufReader::new(from);
        (Line { from, to, frame_len_max: wire::HELLO_LEN_MAX, patience, sent_at: Instant::now() }, writer)
    }

    /// From here on frames may be this long.
    pub(crate) fn allow(&mut self, frame_len_max: usize) {
        self.frame_len_max = frame_len_max;
    }

    pub(crate) async fn send(&mut self, frame: Bytes) -> io::Result<()> {
        self.sent_at = Instant::now();
        self.to.send(frame).await.map_err(|_| io::ErrorKind::ConnectionAborted.into())
    }

    pub(crate) async fn receive(&mut self) -> io::Result<Message> {
        self.receive_within(self.patience).await
    }

    pub(crate) async fn receive_within(&mut self, patience: Duration) -> io::Result<Message> {
        timeout(patience, wire::read(&mut self.from, self.frame_len_max)).await?
    }

    /// Waits, but at most until nothing was sent for as long as `quiet`: then sends a frame without content.
    pub(crate) async fn wait(&mut self, pause: Duration, quiet: Duration) -> io::Result<()> {
        let left = quiet.saturating_sub(self.sent_at.elapsed());
        sleep(pause.min(left)).await;
        match pause > left {
            true => self.send(Message::Push(Vec::new()).encode()).await,
            false => Ok(()),
        }
    }

    pub(crate) async fn ask(&mut self, message: &Message) -> io::Result<Message> {
        self.send(message.encode()).await?;
        self.receive().await
    }
}

/// What waits to be pushed to one peer.
#[derive(Debug, Default)]
pub(crate) struct PushQueue {
    waiting: Mutex<Waiting>,
    more: Notify,
    idle: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    frames: VecDeque<Bytes>,
    len: usize,
    /// All that there was is written.
    is_idle: bool,
}

impl PushQueue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves the frame out where there is no room for it.
    pub(crate) fn push(&self, frame: &Bytes) {
        let mut waiting = self.lock();
        if waiting.len + frame.len() > PUSH_LEN_MAX {
            return;
        }
        waiting.len += frame.len();
        waiting.frames.push_back(frame.clone());
        waiting.is_idle = false;
        drop(waiting);
        self.more.notify_one();
    }

    /// Waits until all that there is is written.
    pub(crate) async fn written(&self) {
        loop {
            let idle = self.idle.notified();
            if self.lock().is_idle {
                return;
            }
            idle.await;
        }
    }

    /// The next one to be written, once the one before it is.
    async fn next(&self) -> Bytes {
        loop {
            {
                let mut waiting = self.lock();
                if let Some(frame) = waiting.frames.pop_front() {
                    waiting.len -= frame.len();
                    return frame;
                }
                waiting.is_idle = true;
            }
            self.idle.notify_waiters();
            self.more.notified().await;
        }
    }
}
