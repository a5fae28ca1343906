//! One connection: a service that answers its calls, and the task that serves it over HTTP/2.

use std::convert::Infallible;
use std::fmt;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};
use tonic::Status;
use tonic::body::Body;
use tower_service::Service;
use tracing::debug;

use crate::arriving::Arriving;
use crate::departing::{Answer, Departing, PIECE_LEN};
use crate::door::Inner;
use crate::first_turn::{Arrivals, FirstTurns};
use crate::line::{Kind, Line};
use crate::services::Services;
use crate::socket::Socket;
use crate::timeout::timeout_of;

/// A message has a key and some fields beside its value.
const MESSAGE_ROOM: usize = 64 << 10;

/// HTTP/2's limit of streams lies so far above that of subscriptions: a call always finds one.
const SPARE_STREAMS: usize = 256;

/// What a peer may send of one request, and of all, before the door has taken it.
pub(crate) const STREAM_WINDOW: u32 = 64 << 10;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// Bytes of headers of a request, as HTTP/2 counts them.
const HEADERS_LEN_MAX: u32 = 16 << 10;

/// Streams that were reset before they were looked at; with one more the connection ends.
const RESETS_MAX: usize = 64;

/// How long calls may take when the node stops; streams that do not take their end are cut earlier.
const DRAIN_LIMIT: Duration = Duration::from_millis(3_500);
const DRAIN_LIMIT_OF_STREAMS: Duration = Duration::from_secs(1);
const DRAIN_TICK: Duration = Duration::from_millis(50);

/// The calls of one connection as a service, for programs that serve HTTP/2 themselves: see
/// [`Door::connection`](crate::Door::connection). Clones are the same connection.
#[derive(Clone)]
pub struct Connection {
    line: Arc<Line>,
    services: Services,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("peer", &self.line.peer).finish_non_exhaustive()
    }
}

/// The answer of a [`Connection`] to one request.
pub type ConnectionFuture = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

/// Whether a content type is gRPC's, and not one that only begins like it, such as that of gRPC-Web.
fn is_grpc(headers: &HeaderMap) -> bool {
    let rest = headers.get(header::CONTENT_TYPE).and_then(|name| name.as_bytes().strip_prefix(b"application/grpc"));
    rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';' | b' ')))
}

impl Connection {
    pub(crate) fn new(line: Arc<Line>) -> Self {
        let services = Services::new(&line);
        Connection { line, services }
    }

    /// Waits until the connection is to be cut: the node is short of memory, and its peer holds the most. Wait on it beside the
    /// serving, and drop that then.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future loses nothing, if one task waits at a time.
    pub async fn evicted(&self) {
        while !self.line.peer.is_evicted() {
            self.line.sending.look_anew().await;
        }
        let (peer, held) = (self.line.address(), self.line.peer.evicted_with());
        let what = format_args!("connection closed: all hold too much, and {peer} the most, {held} bytes");
        self.line.handle.log().warn("evicted", what);
    }

    /// Answers one request.
    fn answer<B>(&self, request: Request<B>) -> ConnectionFuture
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        // What follows a CONNECT that succeeds is no call.
        if !is_grpc(request.headers()) || request.method() == Method::CONNECT {
            return Box::pin(std::future::ready(Ok(not_grpc())));
        }
        let timeout = match timeout_of(request.headers()) {
            Ok(timeout) => timeout,
            Err(status) => return Box::pin(std::future::ready(Ok(status.into_http()))),
        };
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let line = Arc::clone(&self.line);
        let form = Form::of(request.uri().path(), &line);
        let call = line.begin_call(form.is_stream);
        let request = request
            .map(|body| Arriving::new(Body::new(body), Arc::clone(&line), form.request_len_max, form.sends_stream));
        let answered = self.services.call(request);
        Box::pin(async move {
            let answered = match deadline {
                Some(deadline) => timeout_at(deadline, answered).await,
                None => Ok(answered.await),
            };
            let mut response = match answered {
                Ok(answered) => answered?,
                Err(_) => Status::deadline_exceeded("the deadline of the call has passed").into_http(),
            };
            let answer = response.extensions_mut().remove::<Answer>();
            let deadline = deadline.filter(|_| form.is_stream);
            Ok(response.map(|body| Body::new(Departing::new(body, line, form.kind, answer, deadline, call))))
        })
    }

    /// Serves HTTP/2 on a stream of which the preface was read.
    pub(crate) async fn serve<S>(self, stream: S)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let line = Arc::clone(&self.line);
        let socket = TokioIo::new(Socket::new(stream, Arc::clone(&line.sending)));
        let calls = FirstTurns::default();
        let builder = builder(&line.door, calls.arrivals());
        let mut connection = pin!(builder.serve_connection(socket, Calls(self.clone())));
        let (mut going_away, mut draining) = (pin!(line.door.going_away()), None);
        let mut evicted = pin!(self.evicted());
        let mut ticks = ticks(line.door.options.stall_limit.div_f64(8.0));
        loop {
            tokio::select! {
                biased;
                () = &mut evicted => return,
                () = &mut going_away, if draining.is_none() => {
                    connection.as_mut().graceful_shutdown();
                    draining = Some(Instant::now());
                    ticks = self::ticks(DRAIN_TICK);
                }
                _ = ticks.tick() => {
                    if let Some(why) = is_over(&line, draining) {
                        let what = format_args!("connection cut: {} {why}", line.address());
                        return line.handle.log().warn("stalled", what);
                    }
                    if line.door.options.idle_limit.is_some_and(|limit| line.idle_for() > limit) {
                        connection.as_mut().graceful_shutdown();
                    }
                }
                ended = poll_fn(|cx| {
                    let ended = connection.as_mut().poll(cx);
                    calls.give(cx);
                    ended
                }) => {
                    return debug!(peer = line.address(), ended = ?ended.err(), "connection closed");
                }
            }
        }
    }
}

fn ticks(every: Duration) -> tokio::time::Interval {
    let mut ticks = interval(every.clamp(Duration::from_millis(5), Duration::from_secs(5)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// Why a connection is cut, if it is.
fn is_over(line: &Line, draining: Option<Instant>) -> Option<&'static str> {
    let limit = line.door.options.stall_limit;
    if line.sending.answers.stalled_for().max(line.sending.blocked_for()) > limit {
        return Some("took nothing for too long");
    }
    let drained_for = draining?.elapsed();
    let only_streams = !line.has_unary_calls() && line.sending.answers.len() == 0;
    if drained_for > DRAIN_LIMIT || (only_streams && drained_for > DRAIN_LIMIT_OF_STREAMS) {
        return Some("did not end in time when the node stopped");
    }
    None
}

fn builder(door: &Inner, arrivals: Arrivals) -> http2::Builder<Arrivals> {
    let streams_max = door.handle.limits().subscriptions_max.saturating_add(SPARE_STREAMS);
    let mut builder = http2::Builder::new(arrivals);
    builder
        .timer(TokioTimer::new())
        .auto_date_header(false)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(u32::try_from(streams_max).unwrap_or(u32::MAX))
        .max_header_list_size(HEADERS_LEN_MAX)
        .max_pending_accept_reset_streams(RESETS_MAX)
        .max_local_error_reset_streams(RESETS_MAX)
        .max_send_buf_size(PIECE_LEN)
        .keep_alive_interval(door.options.keep_alive_interval)
        .keep_alive_timeout(door.options.stall_limit);
    builder
}

/// How a method is called.
#[derive(Clone, Copy, Debug)]
struct Form {
    request_len_max: usize,
    /// Its client sends several messages.
    sends_stream: bool,
    /// It answers with a stream that has no end of its own.
    is_stream: bool,
    kind: Kind,
}

impl Form {
    fn of(path: &str, line: &Line) -> Self {
        let limits = line.handle.limits();
        let with_value = limits.value_len_max.saturating_add(MESSAGE_ROOM);
        let sends_stream = path.starts_with("/grpc.reflection.");
        let is_watch = path == "/nkv.v1.Kv/Watch";
        let request_len_max = match path {
            "/nkv.v1.Kv/Write" => limits.request_len_max.max(with_value),
            _ => with_value,
        };
        let is_stream = sends_stream || is_watch || path == "/grpc.health.v1.Health/Watch";
        Form { request_len_max, sends_stream, is_stream, kind: if is_watch { Kind::Event } else { Kind::Answer } }
    }
}

/// A request of another kind is HTTP's matter.
fn not_grpc() -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::UNSUPPORTED_MEDIA_TYPE;
    response
}

impl<B> Service<Request<B>> for Connection
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = ConnectionFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> ConnectionFuture {
        self.answer(request)
    }
}

/// The same for hyper.
struct Calls(Connection);

impl hyper::service::Service<Request<Incoming>> for Calls {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = ConnectionFuture;

    fn call(&self, request: Request<Incoming>) -> ConnectionFuture {
        self.0.answer(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_types_of_grpc_are_distinguished_from_those_that_begin_like_it() {
        let is = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, text.parse().unwrap());
            is_grpc(&headers)
        };
        for grpc in ["application/grpc", "application/grpc+proto", "application/grpc;charset=utf-8"] {
            assert!(is(grpc), "{grpc}");
        }
        for other in ["application/grpc-web", "application/grpc-web+proto", "application/grpcx", "application/json", ""]
        {
            assert!(!is(other), "{other}");
        }
        assert!(!is_grpc(&HeaderMap::new()));
    }
}
