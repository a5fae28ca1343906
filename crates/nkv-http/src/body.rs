//! Bodies: of answers, which count in the budget until their peer has taken them, and end where it takes nothing for too long;
//! and of requests, for which there is room before they are read.

use std::fmt;
use std::future::poll_fn;
use std::io::Write as _;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use flate2::Compression;
use flate2::write::GzEncoder;
use http::header::{CONTENT_ENCODING, CONTENT_RANGE, TRANSFER_ENCODING};
use http::{HeaderMap, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use nkv_node::Handle;

use crate::connection::{Busy, Conn, Load};
use crate::problem::Problem;
use crate::timed::poll_until;

/// What is given to a connection at a time.
pub(crate) const CHUNK_LEN: usize = 64 << 10;

/// What is given to a stream of HTTP/2 at a time: there may be many on a connection.
pub(crate) const STREAM_PIECE_LEN: usize = 16 << 10;

/// An answer.
pub(crate) type Answer = Response<Body>;

/// Of an answer.
#[derive(Debug)]
pub(crate) struct Body {
    kind: Kind,
    /// Its connection is not idle before this is gone.
    pub(crate) busy: Option<Busy>,
}

#[derive(Debug)]
enum Kind {
    Whole(Bytes),
    Long(Arc<Long>, Option<u64>),
    /// Made elsewhere, with trailers.
    Calls(CallsBody),
}

/// Why a body broke off.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The body of an answer that another protocol on this port makes.
pub type CallsBody = UnsyncBoxBody<Bytes, BoxError>;

/// Makes a body, piece by piece.
pub(crate) trait Source: Send {
    /// The next piece; `None` at the end. After an error the peer sees that the body broke off.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BoxError>>>;
}

/// A body that is made in pieces, and dropped where its peer takes none of them for too long.
pub(crate) struct Long {
    source: Mutex<Option<Box<dyn Source>>>,
    began: Instant,
    /// When a piece was given that the peer has not taken, in milliseconds after the beginning, plus one; else 0.
    given: AtomicU64,
}

/// The peer took nothing for too long.
#[derive(Debug)]
pub(crate) struct Stalled;

impl fmt::Display for Stalled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the peer took nothing for too long")
    }
}

impl std::error::Error for Stalled {}

/// The body of another protocol's answer.
pub(crate) fn of_calls(body: CallsBody) -> Body {
    Body { kind: Kind::Calls(body), busy: None }
}

/// A short body.
pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Body { kind: Kind::Whole(bytes.into()), busy: None }
}

impl Body {
    /// A body of any length that is there already.
    pub(crate) fn counted(bytes: Bytes, conn: &Conn) -> Body {
        if bytes.len() <= CHUNK_LEN {
            return full(bytes);
        }
        let len = bytes.len() as u64;
        Body::long(Box::new(Chunks::new(bytes, conn)), Some(len), conn)
    }

    /// A body that is made in pieces.
    pub(crate) fn long(source: Box<dyn Source>, len: Option<u64>, conn: &Conn) -> Body {
        // From the beginning: a stream that is never read is never asked for a piece.
        let long = Long { source: Mutex::new(Some(source)), began: Instant::now(), given: AtomicU64::new(1) };
        let long = Arc::new(long);
        conn.load.watch(&long);
        Body { kind: Kind::Long(long, len), busy: None }
    }

    /// The same, counted, and ended where its peer takes none of it for too long.
    pub(crate) fn watched(self, conn: &Conn) -> Body {
        let Body { kind, busy } = self;
        match kind {
            Kind::Whole(bytes) if !bytes.is_empty() => {
                let len = bytes.len() as u64;
                let chunks = Chunks { left: conn.load.hold(bytes.len()), bytes, given: 0, piece_max: STREAM_PIECE_LEN };
                Body { busy, ..Body::long(Box::new(chunks), Some(len), conn) }
            }
            kind => Body { kind, busy },
        }
    }

    /// The same, coded.
    pub(crate) fn gzip(self, conn: &Conn) -> Body {
        let source: Box<dyn Source> = match self.kind {
            Kind::Whole(bytes) => Box::new(Chunks::new(bytes, conn)),
            Kind::Long(long, _) => match long.take() {
                Some(source) => source,
                None => return full(Bytes::new()),
            },
            Kind::Calls(_) => return self,
        };
        let encoder = Some(GzEncoder::new(Vec::new(), Compression::fast()));
        Body::long(Box::new(Gzip { source, encoder }), None, conn)
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let next = match &mut self.kind {
            Kind::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Kind::Whole(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Kind::Long(long, _) => long.poll_frame(cx),
            Kind::Calls(body) => Pin::new(body).poll_frame(cx),
        };
        if matches!(next, Poll::Ready(None | Some(Err(_)))) {
            self.busy = None;
        }
        next
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            Kind::Whole(bytes) => bytes.is_empty(),
            Kind::Long(..) => false,
            Kind::Calls(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            Kind::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Kind::Long(_, Some(len)) => SizeHint::with_exact(*len),
            Kind::Long(_, None) => SizeHint::default(),
            Kind::Calls(body) => body.size_hint(),
        }
    }
}

impl Long {
    fn poll_frame(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.given.store(0, Relaxed);
        let mut source = self.lock();
        let Some(making) = source.as_mut() else { return Poll::Ready(Some(Err(Stalled.into()))) };
        let next = making.poll_next(cx);
        if let Poll::Ready(Some(Ok(_))) = &next {
            let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.given.store(now.saturating_add(1), Relaxed);
        }
        next.map_ok(Frame::data)
    }

    /// For how long the peer has not taken a piece.
    pub(crate) fn stalled_for(&self) -> Duration {
        match self.given.load(Relaxed) {
            0 => Duration::ZERO,
            given => self.began.elapsed().saturating_sub(Duration::from_millis(given.saturating_sub(1))),
        }
    }

    /// Ends it, and gives back what it holds; whether there was anything.
    pub(crate) fn end(&self) -> bool {
        self.take().is_some()
    }

    fn take(&self) -> Option<Box<dyn Source>> {
        self.lock().take()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Box<dyn Source>>> {
        self.source.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Long {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Long").field("given", &self.given).finish_non_exhaustive()
    }
}

/// Bytes that are there, in pieces.
struct Chunks {
    bytes: Bytes,
    left: Unsent,
    /// The length of the piece that was given last: what is asked for more has taken it.
    given: usize,
    piece_max: usize,
}

impl Chunks {
    fn new(bytes: Bytes, conn: &Conn) -> Self {
        let piece_max = if conn.load.is_http2() { STREAM_PIECE_LEN } else { CHUNK_LEN };
        Chunks { left: conn.load.hold(bytes.len()), bytes, given: 0, piece_max }
    }
}

impl Source for Chunks {
    fn poll_next(&mut self, _: &mut Context<'_>) -> Poll<Option<Result<Bytes, BoxError>>> {
        self.left.less(self.given);
        let piece = self.bytes.split_to(self.bytes.len().min(self.piece_max));
        self.given = piece.len();
        Poll::Ready((!piece.is_empty()).then_some(Ok(piece)))
    }
}

struct Gzip {
    source: Box<dyn Source>,
    encoder: Option<GzEncoder<Vec<u8>>>,
}

impl Source for Gzip {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BoxError>>> {
        loop {
            let Some(encoder) = &mut self.encoder else { return Poll::Ready(None) };
            let Poll::Ready(piece) = self.source.poll_next(cx)? else { return Poll::Pending };
            let coded = match piece {
                Some(piece) => encoder.write_all(&piece).map(|()| std::mem::take(encoder.get_mut())),
                None => self.encoder.take().map_or_else(|| Ok(Vec::new()), GzEncoder::finish),
            };
            match coded {
                Ok(coded) if coded.is_empty() && self.encoder.is_some() => {}
                Ok(coded) => return Poll::Ready((!coded.is_empty()).then(|| Ok(coded.into()))),
                Err(error) => return Poll::Ready(Some(Err(error.into()))),
            }
        }
    }
}

/// Bytes that a peer has not taken, as the budget counts them.
#[derive(Debug)]
pub(crate) struct Unsent {
    load: Arc<Load>,
    len: usize,
}

impl Unsent {
    pub(crate) fn new(load: Arc<Load>, len: usize) -> Self {
        load.add_unsent(len);
        Unsent { load, len }
    }

    /// Sets the number of bytes to what it is now.
    pub(crate) fn set(&mut self, len: usize) {
        if len != self.len {
            self.load.take_unsent(self.len);
            self.load.add_unsent(len);
            self.len = len;
        }
    }

    fn less(&mut self, len: usize) {
        let len = len.min(self.len);
        self.load.take_unsent(len);
        self.len = self.len.saturating_sub(len);
    }
}

impl Drop for Unsent {
    fn drop(&mut self) {
        self.load.take_unsent(self.len);
    }
}

/// The body of a request, and that it is held for its peer.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) bytes: Bytes,
    pub(crate) held: Reading,
}

/// Bytes of a request that has not been served.
#[derive(Debug)]
pub(crate) struct Reading {
    conn: Arc<Conn>,
    len: usize,
}

impl Reading {
    fn new(conn: &Arc<Conn>) -> Self {
        Reading { conn: Arc::clone(conn), len: 0 }
    }

    fn more(&mut self, len: usize) {
        self.len = self.len.saturating_add(len);
        self.conn.hold_more(len);
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.conn.hold_less(self.len);
    }
}

/// Past this, a body waits until there is room for it to arrive.
const LONG_LEN: usize = 64 << 10;

/// Reads the body of a request, of at most `len_max` bytes.
pub(crate) fn receive<'a>(
    handle: &'a Handle,
    conn: &'a Arc<Conn>,
    request: Request<Incoming>,
    len_max: usize,
) -> impl Future<Output = Result<Received, Problem>> + Send + use<'a> {
    let form = check_form(request.headers());
    let body = request.into_body();
    async move {
        form?;
        receive_body(handle, conn, body, len_max).await
    }
}

async fn receive_body(
    handle: &Handle,
    conn: &Arc<Conn>,
    mut body: Incoming,
    len_max: usize,
) -> Result<Received, Problem> {
    let too_large =
        |len: u64| Problem::new("too-large", format!("the body has {len} bytes or more, and {len_max} is the limit"));
    let hint = body.size_hint();
    if hint.lower() > len_max as u64 {
        return Err(too_large(hint.lower()));
    }
    let known = hint.exact().and_then(|len| usize::try_from(len).ok());
    let (mut held, mut timer) = (Reading::new(conn), conn.take_body_timer());
    let mut arrival = None;
    let mut bytes = BytesMut::new();
    let limit = conn.limits().request_limit;
    let deadline = limit.saturating_mul(1_u32.saturating_add(u32::try_from(len_max >> 20).unwrap_or(u32::MAX)));
    let deadline = tokio::time::Instant::now().checked_add(deadline);
    loop {
        // What is announced takes no room before some of it has come; from then on its peer counts as one that sends.
        if arrival.is_none() && bytes.len() > LONG_LEN {
            arrival = Some(conn.waiting(handle.arrival(known.unwrap_or(len_max))).await);
            bytes.reserve(known.unwrap_or(0).saturating_sub(bytes.len()));
        }
        let frame = poll_fn(|cx| match (Pin::new(&mut body).poll_frame(cx), deadline) {
            (Poll::Pending, Some(at)) => poll_until(&mut timer, at, cx).map(Err),
            (frame, _) => frame.map(Ok),
        });
        let frame = frame.await.map_err(|()| Problem::new("too-slow", "the body did not arrive in time"))?;
        let Some(frame) = frame else { break };
        let frame = frame.map_err(|error| Problem::bad(format!("the body did not arrive whole: {error}")))?;
        if let Ok(data) = frame.into_data() {
            let len = bytes.len().saturating_add(data.len());
            if len > len_max {
                return Err(too_large(len as u64));
            }
            if bytes.is_empty() {
                bytes.reserve(known.unwrap_or(0).min(LONG_LEN));
            }
            bytes.extend_from_slice(&data);
            held.more(data.len());
        }
    }
    drop(arrival);
    if timer.is_some() {
        conn.leave_body_timer(timer);
    }
    // What is kept is to be no longer than it is.
    let bytes = if bytes.capacity() > bytes.len() { Bytes::copy_from_slice(&bytes) } else { bytes.freeze() };
    Ok(Received { bytes, held })
}

/// A part of a value, or a coded form of it, is not to be stored as the whole.
fn check_form(headers: &HeaderMap) -> Result<(), Problem> {
    if headers.contains_key(CONTENT_ENCODING) {
        return Err(Problem::new("coded-content", "a body with Content-Encoding is not taken: send it as it is"));
    }
    if headers.contains_key(CONTENT_RANGE) {
        return Err(Problem::bad("a part of a value (Content-Range) cannot be written: send all of it"));
    }
    let codings = headers.get_all(TRANSFER_ENCODING).iter();
    if codings.into_iter().any(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"chunked")) {
        return Err(Problem::new("coded-content", "of transfer codings there is 'chunked' alone"));
    }
    Ok(())
}
