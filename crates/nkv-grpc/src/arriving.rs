//! The body of a request while it arrives: counted, limited, and in time.
//!
//! A message announces its length in its first five bytes. One over the limit is refused before any of it is kept, and a long
//! one waits until the node has room for it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use nkv_node::{Room, Stopping};
use tokio::time::{Sleep, sleep};
use tonic::Status;
use tonic::body::Body;

use crate::line::Line;

/// What a message begins with: a flag, and its length.
const PREFIX_LEN: usize = 5;

/// A message that is longer waits for room. Shorter ones are limited by the number of streams.
const LONG_LEN: usize = 16 << 10;

type Arrival = Pin<Box<dyn Future<Output = Result<Room, Stopping>> + Send>>;

/// The body of one request.
pub(crate) struct Arriving {
    inner: Body,
    line: Arc<Line>,
    len_max: usize,
    /// Whether messages may follow one another at any distance.
    is_stream: bool,
    /// Bytes that are counted.
    counted: usize,
    prefix: Vec<u8>,
    /// Bytes of the message that are still to come.
    left: usize,
    /// What waits for room, and the frame that is passed on when there is some.
    waiting: Option<(Arrival, Frame<Bytes>)>,
    room: Option<Room>,
    deadline: Option<Pin<Box<Sleep>>>,
}

impl Arriving {
    pub(crate) fn new(inner: Body, line: Arc<Line>, len_max: usize, is_stream: bool) -> Self {
        let (counted, left, waiting, room, deadline) = Default::default();
        let prefix = Vec::new();
        Arriving { inner, line, len_max, is_stream, counted, prefix, left, waiting, room, deadline }
    }

    /// Looks at what has come; gives the length of a long message that begins in it.
    fn look(&mut self, mut data: &[u8]) -> Result<Option<usize>, Status> {
        let mut long = None;
        while !data.is_empty() {
            let wanted = if self.left > 0 { self.left } else { PREFIX_LEN.saturating_sub(self.prefix.len()) };
            let (now, rest) = data.split_at(wanted.min(data.len()));
            data = rest;
            if self.left > 0 {
                self.left = self.left.saturating_sub(now.len());
                continue;
            }
            self.prefix.extend_from_slice(now);
            if let [_, a, b, c, d] = self.prefix[..] {
                self.prefix.clear();
                self.left = u32::from_be_bytes([a, b, c, d]) as usize;
                // It has as long as its length allows.
                self.deadline = None;
                if self.left > self.len_max {
                    let (len, len_max) = (self.left, self.len_max);
                    let message = format!("a message of {len} bytes, and {len_max} is the limit");
                    return Err(Status::resource_exhausted(message));
                }
                if self.left > LONG_LEN {
                    long = long.max(Some(self.left));
                }
            }
        }
        Ok(long)
    }

    /// Whether the peer owes more.
    fn is_due(&self) -> bool {
        !self.is_stream || self.left > 0 || !self.prefix.is_empty()
    }

    /// The request is to be whole in time; time in which it waits for room does not count.
    fn poll_deadline(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.is_due() {
            self.deadline = None;
            return Poll::Pending;
        }
        let limit = self.line.door.options.request_limit;
        let parts = u32::try_from(self.left.max(self.counted) >> 20).unwrap_or(u32::MAX).saturating_add(1);
        let patience = limit.saturating_mul(parts).min(Duration::from_secs(3_600));
        self.deadline.get_or_insert_with(|| Box::pin(sleep(patience))).as_mut().poll(cx)
    }

    fn set_room(&mut self, room: Option<Room>) {
        if room.is_some() != self.room.is_some() {
            self.line.note_room(room.is_some());
        }
        self.room = room;
    }

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Some((arrival, _)) = &mut self.waiting else { return Poll::Ready(None) };
        let room = ready!(arrival.as_mut().poll(cx));
        self.line.end_waiting();
        let frame = self.waiting.take().map(|(_, frame)| frame);
        self.deadline = None;
        match room {
            Ok(room) => self.set_room(Some(room)),
            Err(stopping) => return Poll::Ready(Some(Err(Status::unavailable(stopping.to_string())))),
        }
        Poll::Ready(frame.map(Ok))
    }

    /// Keeps a frame back until there is room for the message that begins in it; gives it back if there is some now.
    fn admit(&mut self, frame: Frame<Bytes>) -> Result<Option<Frame<Bytes>>, Status> {
        let Some(data) = frame.data_ref() else { return Ok(Some(frame)) };
        self.line.arrived(data.len());
        self.counted = self.counted.saturating_add(data.len());
        let Some(len) = self.look(data)? else { return Ok(Some(frame)) };
        // What the message before had is of no use to it.
        self.set_room(None);
        if let Some(room) = self.line.handle.try_arrival(len) {
            self.set_room(Some(room));
            return Ok(Some(frame));
        }
        if !self.line.begin_waiting() {
            return Err(Status::resource_exhausted("too many long requests wait on this connection: fewer, or later"));
        }
        self.waiting = Some((Box::pin(self.line.handle.arrival(len)), frame));
        Ok(None)
    }
}

impl http_body::Body for Arriving {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        loop {
            if this.waiting.is_some() {
                return this.poll_room(cx);
            }
            match http_body::Body::poll_frame(Pin::new(&mut this.inner), cx) {
                Poll::Ready(Some(Ok(frame))) => match this.admit(frame) {
                    Ok(Some(frame)) => return Poll::Ready(Some(Ok(frame))),
                    Ok(None) => {}
                    Err(status) => return Poll::Ready(Some(Err(status))),
                },
                Poll::Ready(end) => return Poll::Ready(end),
                Poll::Pending => {
                    ready!(this.poll_deadline(cx));
                    let limit = this.line.door.options.request_limit;
                    let message = format!("the request was not whole after {limit:?} and as long again for each MiB");
                    return Poll::Ready(Some(Err(Status::deadline_exceeded(message))));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.waiting.is_none() && http_body::Body::is_end_stream(&self.inner)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        if self.waiting.take().is_some() {
            self.line.end_waiting();
        }
        self.set_room(None);
        self.line.served(self.counted);
    }
}
