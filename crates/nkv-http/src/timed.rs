//! The limits of time of a connection: until a request's head is whole, for which it may be idle, and for which its peer may take
//! nothing.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

/// How the connections of a door are limited in time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TimeLimits {
    pub(crate) head: Duration,
    pub(crate) idle: Duration,
    pub(crate) request_limit: Duration,
    pub(crate) stall: Duration,
}

/// What a connection's requests report to its stream.
#[derive(Debug, Default)]
pub(crate) struct Times {
    /// Requests whose head has come.
    pub(crate) begun: AtomicU64,
    /// Those that are not answered whole.
    pub(crate) busy: AtomicUsize,
}

/// A stream that fails when its peer takes too long.
#[derive(Debug)]
pub(crate) struct Timed<S> {
    stream: S,
    times: Arc<Times>,
    limits: TimeLimits,
    begun_seen: u64,
    was_busy: bool,
    /// Since when the connection does nothing.
    idle_since: Instant,
    /// Since when a head is coming.
    head_since: Option<Instant>,
    /// On HTTP/2 there are other frames than heads, and the library bounds those.
    is_http2: bool,
    /// The first bytes: HTTP/2 begins with `PRI`.
    first: [u8; 3],
    first_len: usize,
    reading: Timer,
    writing: Timer,
}

impl<S> Timed<S> {
    pub(crate) fn new(stream: S, times: Arc<Times>, limits: TimeLimits) -> Self {
        Timed {
            stream,
            times,
            limits,
            begun_seen: 0,
            was_busy: false,
            idle_since: Instant::now(),
            head_since: None,
            is_http2: false,
            first: [0; 3],
            first_len: 0,
            reading: None,
            writing: None,
        }
    }

    fn is_busy(&self) -> bool {
        self.times.busy.load(Relaxed) > 0
    }

    /// Some bytes came.
    fn came(&mut self, bytes: &[u8]) {
        for (place, byte) in self.first.iter_mut().skip(self.first_len).zip(bytes) {
            (*place, self.first_len) = (*byte, self.first_len.saturating_add(1));
        }
        self.is_http2 = self.first == *b"PRI";
        self.look();
        if !self.is_busy() && self.head_since.is_none() {
            self.head_since = Some(Instant::now());
        }
    }

    /// Whether requests have begun since.
    fn look(&mut self) {
        let (begun, is_busy) = (self.times.begun.load(Relaxed), self.is_busy());
        let was_busy = std::mem::replace(&mut self.was_busy, is_busy);
        if std::mem::replace(&mut self.begun_seen, begun) != begun || was_busy || is_busy {
            (self.head_since, self.idle_since) = (None, Instant::now());
        }
    }

    fn deadline(&mut self) -> Option<Instant> {
        self.look();
        if self.is_busy() {
            return None;
        }
        match self.head_since {
            Some(since) if !self.is_http2 => since.checked_add(self.limits.head),
            _ => self.idle_since.checked_add(self.limits.idle),
        }
    }

    /// The peer took nothing, or something.
    fn wrote<T>(&mut self, result: Poll<io::Result<T>>, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.writing = None;
            return result;
        }
        if self.writing.is_none() {
            self.writing = Instant::now().checked_add(self.limits.stall).map(|at| Box::pin(sleep_until(at)));
        }
        let limit = self.writing.as_mut().map(|timer| timer.as_mut().poll(cx));
        limit.map_or(Poll::Pending, |passed| passed.map(|()| Err(io::ErrorKind::TimedOut.into())))
    }
}

/// A timer that is used again and again.
pub(crate) type Timer = Option<Pin<Box<Sleep>>>;

/// Waits until a time. The timer may be set to an earlier one, and is set anew when that has come: a time that moves on with
/// each request costs none of them anything.
pub(crate) fn poll_until(timer: &mut Timer, at: Instant, cx: &mut Context<'_>) -> Poll<()> {
    let timer = timer.get_or_insert_with(|| Box::pin(sleep_until(at)));
    if timer.deadline() > at {
        timer.as_mut().reset(at);
    }
    while timer.as_mut().poll(cx).is_ready() {
        if timer.deadline() >= at {
            return Poll::Ready(());
        }
        timer.as_mut().reset(at);
    }
    Poll::Pending
}

impl<S: AsyncRead + Unpin> AsyncRead for Timed<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let result = Pin::new(&mut this.stream).poll_read(cx, buf);
        if result.is_ready() {
            let bytes = buf.filled().get(before..).unwrap_or_default();
            if !bytes.is_empty() {
                this.came(bytes);
            }
            return result;
        }
        match this.deadline() {
            None => Poll::Pending,
            Some(at) => poll_until(&mut this.reading, at, cx).map(|()| Err(io::ErrorKind::TimedOut.into())),
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Timed<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_write(cx, buf);
        this.wrote(result, cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_write_vectored(cx, bufs);
        this.wrote(result, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_flush(cx);
        this.wrote(result, cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.stream).poll_shutdown(cx);
        this.wrote(result, cx)
    }
}
