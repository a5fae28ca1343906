//! One connection: bytes in both directions, the greeting, and nothing about what they mean.

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use nkv_protocol::{Body, Features, Kind, Message, MessageDecoder, Request, ValueForm, status};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::addr::Addr;
use crate::error::{Error, ErrorKind, Result};

/// What this client understands beyond the first version of the protocol.
const FEATURES: Features = Features::RESET;
/// How many bytes one read asks for at least.
const READ_LEN: usize = 64 << 10;
/// An empty buffer that grew beyond this is given back.
const KEEP_LEN_MAX: usize = 1 << 20;
/// While so many bytes wait to be sent, no more requests are taken.
const OUT_LEN_MAX: usize = 1 << 20;
/// Longest answer to the greeting: until then nobody knows who is there.
const GREETING_LEN_MAX: usize = 64 << 10;

pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// What a connection needs to know to be made.
#[derive(Clone, Debug)]
pub(crate) struct LinkOptions {
    pub(crate) addr: Addr,
    pub(crate) client_uuid: String,
    pub(crate) token: Option<String>,
    pub(crate) connect_timeout: Duration,
    pub(crate) message_len_max: usize,
}

pub(crate) struct Link {
    io: Box<dyn Io>,
    input: BytesMut,
    decoder: MessageDecoder,
    out: BytesMut,
    /// Bytes ever given to be sent, and bytes ever sent.
    encoded: u64,
    written: u64,
    next_id: u64,
    message_len_max: usize,
    /// Whether the peer must take some bytes before more can be sent.
    blocked: bool,
    /// When the peer last gave a sign of life: sent something, or took something that had to wait for it.
    pub(crate) heard: Instant,
    /// The epoch of the server's data.
    pub(crate) epoch: String,
    /// What the server offers beyond the first version of the protocol.
    pub(crate) features: Features,
}

impl Link {
    /// Connects and greets.
    pub(crate) async fn open(options: &LinkOptions) -> Result<Self> {
        let LinkOptions { addr, connect_timeout, .. } = options;
        let cannot = |why: String| Error::new(ErrorKind::CannotConnect, format!("cannot connect to {addr}: {why}"));
        match tokio::time::timeout(*connect_timeout, Link::greeted(options)).await {
            Ok(Ok(link)) => Ok(link),
            Ok(Err(error)) => Err(cannot(format!("{error:#}"))),
            Err(_) => Err(cannot(format!("no answer within {connect_timeout:?}"))),
        }
    }

    async fn greeted(options: &LinkOptions) -> Result<Self> {
        let io = connect(&options.addr).await;
        let io = io.map_err(|error| Error::new(ErrorKind::CannotConnect, error.to_string()))?;
        let mut link = Link::over(io, GREETING_LEN_MAX.min(options.message_len_max));
        let mut greeting = Request::new(Kind::Connect, "");
        greeting.client_uuid = Some(options.client_uuid.as_str().into());
        greeting.values = Some(ValueForm::Payload);
        greeting.features = FEATURES;
        greeting.token = options.token.as_deref().map(Into::into);
        link.push(&greeting);
        let body = link.answer().await?;
        if body.status != status::OK {
            return Err(Error::from_answer(&body));
        }
        link.features = body.features;
        link.epoch = body.epoch.unwrap_or_default();
        link.message_len_max = options.message_len_max;
        Ok(link)
    }

    /// A connection that has not been greeted.
    pub(crate) fn over(io: Box<dyn Io>, message_len_max: usize) -> Self {
        Link {
            io,
            input: BytesMut::new(),
            decoder: MessageDecoder::new(),
            out: BytesMut::new(),
            encoded: 0,
            written: 0,
            next_id: 0,
            message_len_max,
            blocked: false,
            heard: Instant::now(),
            epoch: String::new(),
            features: Features::NONE,
        }
    }

    /// Waits for the first message, which must be an answer.
    async fn answer(&mut self) -> Result<Box<Body>> {
        loop {
            match self.next_message()? {
                Some(Message::Answer(body)) => return Ok(body),
                Some(_) => return Err(Error::protocol("not an nkv server: a notification came before any answer")),
                None => std::future::poll_fn(|cx| self.poll_io(cx)).await.map_err(Error::lost)?,
            }
        }
    }

    /// Encodes a request to be sent; returns its id and the number of its first byte.
    pub(crate) fn push(&mut self, request: &Request<'_>) -> (u64, u64) {
        let (id, start, len) = (self.next_id, self.encoded, self.out.len());
        self.next_id += 1;
        request.encode(id, &mut self.out);
        self.encoded += (self.out.len() - len) as u64;
        (id, start)
    }

    /// Whether any byte from this one on was sent.
    pub(crate) fn has_sent(&self, start: u64) -> bool {
        start < self.written
    }

    /// Whether more requests may be pushed.
    pub(crate) fn has_room(&self) -> bool {
        self.out.len() < OUT_LEN_MAX
    }

    /// Takes the next whole message of what was read.
    pub(crate) fn next_message(&mut self) -> Result<Option<Message>> {
        let (consumed, message) = self.decoder.decode(&self.input)?;
        self.input.advance(consumed);
        if message.is_none() && self.input.len() > self.message_len_max {
            let limit = self.message_len_max;
            return Err(Error::protocol(format!("the server's message is over the limit of {limit} bytes")));
        }
        if self.input.is_empty() && self.input.capacity() > KEEP_LEN_MAX {
            self.input = BytesMut::new();
        }
        Ok(message)
    }

    /// Sends what can be sent, and reads: ready when something was read, or when the connection is lost.
    pub(crate) fn poll_io(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Poll::Ready(Err(error)) = self.poll_write(cx) {
            return Poll::Ready(Err(error));
        }
        self.input.reserve(READ_LEN);
        // Reading keeps no state between two polls, so the future may be made anew each time.
        match ready!(pin!(self.io.read_buf(&mut self.input)).poll(cx))? {
            0 => Poll::Ready(Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed by the server"))),
            _ => {
                self.heard = Instant::now();
                Poll::Ready(Ok(()))
            }
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.out.is_empty() {
            let Poll::Ready(sent) = Pin::new(&mut self.io).poll_write(cx, &self.out)? else {
                self.blocked = true;
                return Poll::Pending;
            };
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            // What this side's buffer takes at once says nothing about the other.
            if std::mem::take(&mut self.blocked) {
                self.heard = Instant::now();
            }
            self.out.advance(sent);
            self.written += sent as u64;
        }
        if self.out.capacity() > KEEP_LEN_MAX {
            self.out = BytesMut::new();
        }
        Pin::new(&mut self.io).poll_flush(cx)
    }
}

async fn connect(addr: &Addr) -> io::Result<Box<dyn Io>> {
    match addr {
        Addr::Tcp { host, port } => {
            let stream = TcpStream::connect((host.as_str(), *port)).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream))
        }
        #[cfg(unix)]
        Addr::Unix { path } => Ok(Box::new(tokio::net::UnixStream::connect(path).await?)),
        #[cfg(not(unix))]
        Addr::Unix { .. } => Err(io::Error::new(io::ErrorKind::Unsupported, "no Unix sockets on this system")),
    }
}
