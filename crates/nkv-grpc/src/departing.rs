//! The body of an answer while it is sent: in pieces that are counted until they are written.
//!
//! HTTP/2 asks for the next piece when the peer has room for it, so what an answer has beyond that stays here, and what a watch
//! has beyond that stays in its mailbox.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::Status;
use tonic::body::Body;

use crate::line::{Call, Counted, Kind, Line};

/// The most that is given to HTTP/2 at a time.
pub(crate) const PIECE_LEN: usize = 32 << 10;

/// The answer was counted before it was encoded.
pub(crate) type Answer = Arc<Counted>;

/// The body of one answer.
pub(crate) struct Departing {
    inner: Body,
    /// What was encoded and not asked for yet.
    rest: Bytes,
    counted: Counted,
    /// What was counted for it before.
    answer: Option<Answer>,
    is_at_end: bool,
    /// For a stream: when it ends at the latest.
    deadline: Option<Instant>,
    timer: Option<Pin<Box<Sleep>>>,
    going_away: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    line: Arc<Line>,
    _call: Call,
}

/// A piece that was given to HTTP/2, counted until that has written it.
struct Piece {
    bytes: Bytes,
    _counted: Counted,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Departing {
    pub(crate) fn new(
        inner: Body,
        line: Arc<Line>,
        kind: Kind,
        answer: Option<Answer>,
        deadline: Option<Instant>,
        call: Call,
    ) -> Self {
        let counted = Counted::new(&line.sending, kind, 0);
        let (rest, is_at_end, timer, going_away) = Default::default();
        Departing { inner, rest, counted, answer, is_at_end, deadline, timer, going_away, line, _call: call }
    }

    /// The next piece of what was encoded.
    fn piece(&mut self) -> Bytes {
        let bytes = self.rest.split_to(self.rest.len().min(PIECE_LEN));
        let counted = self.counted.split(bytes.len());
        if self.rest.is_empty() {
            self.rest = Bytes::new();
        }
        Bytes::from_owner(Piece { bytes, _counted: counted })
    }

    /// Why the stream ends although it has not.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<Status> {
        if let Some(deadline) = self.deadline {
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
            if timer.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Status::deadline_exceeded("the deadline of the call has passed"));
            }
        }
        let door = &self.line.door;
        let going_away = self.going_away.get_or_insert_with(|| Box::pin(door.going_away()));
        ready!(going_away.as_mut().poll(cx));
        Poll::Ready(Status::unavailable("the server is stopping"))
    }
}

impl http_body::Body for Departing {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        loop {
            if !this.rest.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(this.piece()))));
            }
            if this.is_at_end {
                return Poll::Ready(None);
            }
            match http_body::Body::poll_frame(Pin::new(&mut this.inner), cx) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => {
                        this.counted.grow(data.len());
                        this.answer = None;
                        this.rest = data;
                        this.line.handle.budget().check_if_over();
                    }
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                Poll::Ready(end) => {
                    this.is_at_end = true;
                    return Poll::Ready(end);
                }
                Poll::Pending => {
                    let status = ready!(this.poll_end(cx));
                    let mut trailers = HeaderMap::new();
                    let added = status.add_header(&mut trailers);
                    this.is_at_end = true;
                    // What the stream holds is given back now.
                    this.inner = Body::empty();
                    return Poll::Ready(Some(added.map(|()| Frame::trailers(trailers))));
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && (self.is_at_end || http_body::Body::is_end_stream(&self.inner))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}
