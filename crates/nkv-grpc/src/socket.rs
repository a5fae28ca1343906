//! A stream of bytes whose beginning was read already, and of which is known whether writing to it waits.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use crate::line::Sending;

/// How HTTP/2 begins.
pub(crate) const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// One connection's stream.
#[derive(Debug)]
pub(crate) struct Socket<S> {
    stream: S,
    begun: Bytes,
    sending: Arc<Sending>,
}

/// Reads what HTTP/2 begins with, no further than it differs; whether it was that.
pub(crate) async fn read_preface(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<bool> {
    let (mut buffer, mut len) = ([0; PREFACE.len()], 0_usize);
    while let Some(rest) = buffer.get_mut(len..).filter(|rest| !rest.is_empty()) {
        let more = stream.read(rest).await?;
        len = len.saturating_add(more);
        if more == 0 || buffer.get(..len) != PREFACE.get(..len) {
            return Ok(false);
        }
    }
    Ok(true)
}

impl<S> Socket<S> {
    /// One of which the preface was read.
    pub(crate) fn new(stream: S, sending: Arc<Sending>) -> Self {
        Socket { stream, begun: Bytes::from_static(PREFACE), sending }
    }

    fn note<T>(&self, written: Poll<T>) -> Poll<T> {
        self.sending.note_write(written.is_pending());
        written
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Socket<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.begun.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, into);
        }
        let len = self.begun.len().min(into.remaining());
        into.put_slice(self.begun.get(..len).unwrap_or_default());
        self.begun.advance(len);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Socket<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.note(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.note(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
