//! The writer task: gathers what the mailbox holds and writes it, as few system calls as it takes.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use nkv_core::mailbox::{Inbox, Item};
use nkv_protocol::Chunks;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use crate::encode::{self, SnapshotWriter};
use crate::notifier::{Shared, waiting_len};

/// So many bytes are gathered for one write. What is still in the mailbox can be conflated, what is gathered cannot.
const GATHER_LEN: usize = 64 << 10;

/// So many chunks go into one vectored write.
const SLICES_MAX: usize = 64;

/// How a writer task ended.
#[derive(Debug)]
pub enum WriterEnd {
    /// All that was to be sent is written.
    Finished,
    /// The peer took no byte for the stall limit.
    Stalled,
    /// Writing failed.
    Failed(io::Error),
}

pub(crate) struct Writer<W> {
    inbox: Inbox<Vec<Bytes>>,
    writer: W,
    shared: Arc<Shared>,
    /// The snapshot that is being written, and what [`waiting_len`] said of it.
    snapshot: Option<(SnapshotWriter, usize)>,
    /// Gathered for the next write.
    out: Chunks,
    /// Bytes that [`Shared::written`] is to be told of when the next write is done.
    counted: usize,
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    pub(crate) fn new(inbox: Inbox<Vec<Bytes>>, writer: W, shared: Arc<Shared>) -> Self {
        Writer { inbox, writer, shared, snapshot: None, out: Chunks::default(), counted: 0 }
    }

    pub(crate) async fn run(mut self) -> WriterEnd {
        self.write_all().await
    }

    async fn write_all(&mut self) -> WriterEnd {
        loop {
            self.gather();
            if self.out.is_empty() {
                match self.inbox.take().await {
                    Some(item) => self.encode(item),
                    None => break,
                }
                continue;
            }
            if let Err(end) = self.flush().await {
                return end;
            }
            self.shared.flushed();
            self.shared.written(std::mem::take(&mut self.counted));
        }
        match timeout(self.shared.options.stall_limit, self.writer.shutdown()).await {
            Ok(Ok(())) => WriterEnd::Finished,
            Ok(Err(error)) => WriterEnd::Failed(error),
            Err(_) => WriterEnd::Stalled,
        }
    }

    fn gather(&mut self) {
        while self.out.len() < GATHER_LEN {
            if let Some((snapshot, waiting)) = &mut self.snapshot {
                if snapshot.write(self.shared.form(), GATHER_LEN, &mut self.out) {
                    self.counted = self.counted.saturating_add(*waiting);
                    self.snapshot = None;
                }
                continue;
            }
            match self.inbox.try_take() {
                Some(item) => self.encode(item),
                None => return,
            }
        }
    }

    fn encode(&mut self, item: Item<Vec<Bytes>>) {
        match item {
            Item::Own(chunks) => {
                self.counted = chunks.iter().map(Bytes::len).fold(self.counted, usize::saturating_add);
                chunks.iter().for_each(|chunk| self.out.push(chunk));
            }
            Item::Event { event, skipped } => {
                let waiting = waiting_len(&event);
                match encode::event(event, skipped, self.shared.form(), &mut self.out) {
                    Some(snapshot) => self.snapshot = Some((snapshot, waiting)),
                    None => self.counted = self.counted.saturating_add(waiting),
                }
            }
        }
    }

    async fn flush(&mut self) -> Result<(), WriterEnd> {
        let len = self.out.len().saturating_sub(self.counted);
        let mut chunks = VecDeque::from(self.out.take());
        let longest = chunks.iter().max_by_key(|chunk| chunk.len());
        self.shared.gather(longest.map_or(0, |chunk| chunk.as_ptr().addr()), len);
        while let Some(first) = chunks.front() {
            let write = poll_fn(|cx| {
                let writer = Pin::new(&mut self.writer);
                if chunks.len() == 1 {
                    return writer.poll_write(cx, first);
                }
                let slices: Vec<_> = chunks.iter().take(SLICES_MAX).map(|chunk| IoSlice::new(chunk)).collect();
                writer.poll_write_vectored(cx, &slices)
            });
            match timeout(self.shared.options.stall_limit, write).await {
                Ok(Ok(0)) => return Err(WriterEnd::Failed(io::ErrorKind::WriteZero.into())),
                Ok(Ok(written)) => advance(&mut chunks, written),
                Ok(Err(error)) => return Err(WriterEnd::Failed(error)),
                Err(_) => return Err(WriterEnd::Stalled),
            }
        }
        Ok(())
    }
}

impl<W> Drop for Writer<W> {
    fn drop(&mut self) {
        self.shared.end();
    }
}

fn advance(chunks: &mut VecDeque<Bytes>, mut written: usize) {
    while let Some(first) = chunks.front_mut() {
        match written.checked_sub(first.len()) {
            Some(left) => written = left,
            None => return first.advance(written),
        }
        chunks.pop_front();
    }
}

/// Has the kernel find out within a minute or so that a peer's host has vanished, whether the connection is idle or
/// something is on its way to it.
///
/// # Errors
///
/// What the system says.
pub fn keep_alive(socket: &impl AsFd) -> io::Result<()> {
    let socket = socket2::SockRef::from(socket);
    let (idle, interval) = (Duration::from_secs(30), Duration::from_secs(10));
    socket.set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(3))?;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    socket.set_tcp_user_timeout(Some(Duration::from_secs(60)))?;
    Ok(())
}

/// Bounds what the kernel holds for a peer that does not read: several megabytes a connection otherwise.
///
/// # Errors
///
/// What the system says.
pub fn limit_send_buffer(socket: &impl AsFd, bytes: usize) -> io::Result<()> {
    socket2::SockRef::from(socket).set_send_buffer_size(bytes)
}
