//! Connections between nodes that share a secret: each is a session of Noise, authenticated by one of the cluster's keys.
//!
//! The one that opened a connection begins. Both send one message of the handshake, which has an ephemeral key, and the first one
//! then an empty record: what was recorded from another connection fails there at the latest, before anything is said or taken.
//! All else are records, which are encrypted, authenticated, and numbered in each direction by themselves. Nothing is sent to a peer
//! before it has proven that it has a key.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use async_trait::async_trait;
use nkv_node::RateLimitedLog;
use snow::{Builder, HandshakeState, TransportState};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, ReadBuf};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::keys::{Keys, SharedKey};
use crate::link::{NEWCOMERS_MAX, Network, Newcomers, Stream, Tcp};
use crate::wire::{self, invalid};

/// Ephemeral keys alone, and the shared key from the first message on.
const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_SHA256";

/// The length that comes before each message of Noise.
const HEAD: usize = 2;

/// What shows that a message is whole and of the peer.
const TAG: usize = 16;

/// A message of the handshake: an ephemeral key and a tag.
const HANDSHAKE_LEN: usize = 32 + TAG;

/// What one record holds, at most. A message of Noise may have 64 KiB; this is what a connection holds a few times.
const CONTENT_LEN_MAX: usize = 16 << 10;

/// What the nodes of a cluster share. Clones are of the same.
#[derive(Clone, Debug)]
pub(crate) struct Secret {
    keys: Arc<watch::Sender<Keys>>,
    /// What both must have in common beside a key: the version of what is said, and the cluster's name.
    prologue: Arc<[u8]>,
}

impl Secret {
    pub(crate) fn new(cluster: &str, keys: Keys) -> Self {
        let prologue = [b"nkv-cluster".as_slice(), &wire::VERSION.to_be_bytes(), cluster.as_bytes()].concat();
        Secret { keys: Arc::new(watch::Sender::new(keys)), prologue: prologue.into() }
    }

    /// From here on other keys count. Connections that were made by one which is not among them end.
    pub(crate) fn set(&self, keys: Keys) {
        self.keys.send_replace(keys);
    }

    fn noise(&self, key: &SharedKey, opens: bool) -> Result<HandshakeState, snow::Error> {
        let builder = Builder::new(PATTERN.parse()?).prologue(&self.prologue)?.psk(0, key.bytes())?;
        if opens { builder.build_initiator() } else { builder.build_responder() }
    }

    /// Begins a session on a connection that this node has opened.
    async fn open(&self, mut stream: Box<dyn Stream>) -> io::Result<Secure> {
        let key = self.keys.borrow().first().clone();
        let mut noise = self.noise(&key, true).map_err(failed)?;
        say(&mut noise, &mut stream).await?;
        let answer = hear(&mut stream).await.map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => refused("it ended the connection"),
            _ => error,
        })?;
        noise
            .read_message(&answer, &mut [])
            .map_err(|_| refused("its answer is not that of a node that has the key"))?;
        let noise = noise.into_transport_mode().map_err(failed)?;
        let mut secure = Secure::new(stream, noise, key, self);
        secure.put_record(&[])?;
        secure.flush().await?;
        Ok(secure)
    }

    /// Begins a session on a connection that a peer has opened; none where it goes without a word, as a probe of the port does.
    async fn accept(&self, mut stream: Box<dyn Stream>) -> io::Result<Option<Secure>> {
        // Plain text begins with the length of a hello, in four bytes.
        let first = match stream.read_u8().await {
            Ok(first) => first,
            Err(error) if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let len = usize::from(u16::from_be_bytes([first, stream.read_u8().await?]));
        if len == 0 {
            return Err(refused("it speaks in plain text"));
        }
        if len != HANDSHAKE_LEN {
            return Err(refused("it speaks another protocol"));
        }
        let mut message = [0; HANDSHAKE_LEN];
        stream.read_exact(&mut message).await?;
        let (key, mut noise) =
            self.recognise(&message)?.ok_or_else(|| refused("it has none of the keys, or another cluster's name"))?;
        say(&mut noise, &mut stream).await?;
        let noise = noise.into_transport_mode().map_err(failed)?;
        let mut secure = Secure::new(stream, noise, key, self);
        // A peer that has a recording alone fails here.
        std::future::poll_fn(|cx| secure.poll_record(cx)).await?;
        if !secure.content.is_empty() {
            return Err(refused("it does not end the handshake"));
        }
        Ok(Some(secure))
    }

    /// The key that the first message of a handshake was made by.
    fn recognise(&self, message: &[u8]) -> io::Result<Option<(SharedKey, HandshakeState)>> {
        for key in self.keys.borrow().iter() {
            let mut noise = self.noise(key, false).map_err(failed)?;
            if noise.read_message(message, &mut []).is_ok() {
                return Ok(Some((key.clone(), noise)));
            }
        }
        Ok(None)
    }
}

/// Sends the next message of a handshake.
async fn say(noise: &mut HandshakeState, stream: &mut Box<dyn Stream>) -> io::Result<()> {
    let mut message = [0; HANDSHAKE_LEN];
    noise.write_message(&[], &mut message).map_err(failed)?;
    let mut framed = head(HANDSHAKE_LEN).to_vec();
    framed.extend_from_slice(&message);
    stream.write_all(&framed).await?;
    stream.flush().await
}

/// Receives the next message of a handshake.
async fn hear(stream: &mut Box<dyn Stream>) -> io::Result<[u8; HANDSHAKE_LEN]> {
    if usize::from(stream.read_u16().await?) != HANDSHAKE_LEN {
        return Err(refused("it speaks another protocol"));
    }
    let mut message = [0; HANDSHAKE_LEN];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

fn head(len: usize) -> [u8; HEAD] {
    u16::try_from(len).unwrap_or(u16::MAX).to_be_bytes()
}

fn refused(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, what)
}

fn failed(error: snow::Error) -> io::Error {
    io::Error::other(error.to_string())
}

/// A connection whose two ends have proven to each other that they have a key.
///
/// Its end is always an error: what is whole, messages say. After an error it stays failed. Both halves belong into one task.
pub(crate) struct Secure {
    stream: BufReader<Box<dyn Stream>>,
    noise: TransportState,
    secret: Secret,
    key: SharedKey,
    /// Ends once the key is not one of the cluster's any more.
    dropped: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// A record that is being received, with its head.
    record: Vec<u8>,
    filled: usize,
    /// Of the last record, what was not read yet.
    content: Vec<u8>,
    read: usize,
    /// A record on its way, with its head.
    sending: Vec<u8>,
    sent: usize,
    has_failed: bool,
}

impl fmt::Debug for Secure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secure")
    }
}

impl Secure {
    fn new(stream: Box<dyn Stream>, noise: TransportState, key: SharedKey, secret: &Secret) -> Self {
        let (mut keys, own) = (secret.keys.subscribe(), key.clone());
        Secure {
            stream: BufReader::with_capacity(HEAD + CONTENT_LEN_MAX + TAG, stream),
            noise,
            secret: secret.clone(),
            key,
            dropped: Box::pin(async move { drop(keys.wait_for(|keys| !keys.contains(&own)).await) }),
            record: vec![0; HEAD],
            filled: 0,
            content: Vec::new(),
            read: 0,
            sending: Vec::new(),
            sent: 0,
            has_failed: false,
        }
    }

    /// Receives the next record into `content`.
    fn poll_record(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            while self.filled < self.record.len() {
                let mut rest = ReadBuf::new(self.record.get_mut(self.filled..).unwrap_or_default());
                ready!(Pin::new(&mut self.stream).poll_read(cx, &mut rest))?;
                if rest.filled().is_empty() {
                    return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                }
                self.filled = self.filled.saturating_add(rest.filled().len());
            }
            let Some((head, message)) = self.record.split_first_chunk::<HEAD>() else {
                return Poll::Ready(Err(invalid("a record without a head")));
            };
            if message.is_empty() {
                let len = usize::from(u16::from_be_bytes(*head));
                if !(TAG..=CONTENT_LEN_MAX + TAG).contains(&len) {
                    return Poll::Ready(Err(invalid(format!("a record of {len} bytes"))));
                }
                self.record.resize(HEAD.saturating_add(len), 0);
                continue;
            }
            self.content.resize(message.len().saturating_sub(TAG), 0);
            self.noise.read_message(message, &mut self.content).map_err(|_| {
                self.content.clear();
                invalid("a record is not what the peer sent next")
            })?;
            (self.filled, self.read) = (0, 0);
            self.record.truncate(HEAD);
            return Poll::Ready(Ok(()));
        }
    }

    fn poll_content(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.dropped.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(gone()));
        }
        while self.read >= self.content.len() {
            ready!(self.poll_record(cx))?;
            if self.content.is_empty() {
                return Poll::Ready(Err(invalid("an empty record")));
            }
        }
        let rest = self.content.get(self.read..).unwrap_or_default();
        let part = rest.get(..buf.remaining()).unwrap_or(rest);
        buf.put_slice(part);
        self.read = self.read.saturating_add(part.len());
        Poll::Ready(Ok(()))
    }

    /// Makes a record of it, to be sent; the one before must have been.
    fn put_record(&mut self, content: &[u8]) -> io::Result<()> {
        let len = content.len().saturating_add(TAG);
        self.sending.clear();
        self.sending.extend_from_slice(&head(len));
        self.sending.resize(HEAD.saturating_add(len), 0);
        let message = self.sending.get_mut(HEAD..).unwrap_or_default();
        self.noise.write_message(content, message).map_err(failed)?;
        self.sent = 0;
        Ok(())
    }

    /// Sends what is to be sent.
    fn poll_sent(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(rest) = self.sending.get(self.sent..).filter(|rest| !rest.is_empty()) {
            let len = ready!(Pin::new(&mut self.stream).poll_write(cx, rest))?;
            if len == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.sent = self.sent.saturating_add(len);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_put(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if !self.secret.keys.borrow().contains(&self.key) {
            return Poll::Ready(Err(gone()));
        }
        ready!(self.poll_sent(cx))?;
        let content = bytes.get(..CONTENT_LEN_MAX).unwrap_or(bytes);
        if content.is_empty() {
            return Poll::Ready(Ok(0));
        }
        self.put_record(content)?;
        // It is taken in any case; what does not go out now does with the next call.
        match self.poll_sent(cx) {
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(content.len())),
        }
    }

    /// Does it, unless something failed before.
    fn unless_failed<T>(&mut self, poll: impl FnOnce(&mut Self) -> Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if self.has_failed {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let done = poll(self);
        self.has_failed = matches!(done, Poll::Ready(Err(_)));
        done
    }
}

fn gone() -> io::Error {
    refused("it was made by a key that is not one of the cluster's any more")
}

impl AsyncRead for Secure {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.unless_failed(|secure| secure.poll_content(cx, buf))
    }
}

impl AsyncWrite for Secure {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.unless_failed(|secure| secure.poll_put(cx, bytes))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.unless_failed(|secure| {
            ready!(secure.poll_sent(cx))?;
            Pin::new(&mut secure.stream).poll_flush(cx)
        })
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.unless_failed(|secure| {
            ready!(secure.poll_sent(cx))?;
            Pin::new(&mut secure.stream).poll_shutdown(cx)
        })
    }
}

/// TCP among nodes that share a secret.
#[derive(Debug)]
pub(crate) struct SecureTcp {
    tcp: Tcp,
    secret: Secret,
    /// How long a handshake may take.
    patience: Duration,
    handshakes: Mutex<Handshakes>,
    log: Arc<RateLimitedLog>,
}

/// Those of peers that have opened a connection.
#[derive(Debug, Default)]
struct Handshakes {
    tasks: JoinSet<Option<Secure>>,
    begun: Newcomers,
}

impl SecureTcp {
    pub(crate) fn new(tcp: Tcp, secret: Secret, patience: Duration) -> Self {
        SecureTcp { tcp, secret, patience, handshakes: Mutex::default(), log: Arc::default() }
    }

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Box<dyn Stream>>> {
        let mut handshakes = self.handshakes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut has_begun = false;
        loop {
            while let Poll::Ready(Some(ended)) = handshakes.tasks.poll_join_next(cx) {
                if let Ok(Some(stream)) = ended {
                    return Poll::Ready(Ok(Box::new(stream)));
                }
            }
            if has_begun {
                // What was just accepted is looked at before it can be the oldest.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let (stream, address) = ready!(self.tcp.0.poll_accept(cx))?;
            has_begun = true;
            let newcomer = Arc::new(());
            let noted = Arc::downgrade(&newcomer);
            let (secret, log, patience) = (self.secret.clone(), Arc::clone(&self.log), self.patience);
            let begun = handshakes.tasks.spawn(async move {
                let _newcomer = newcomer;
                let accepted = async {
                    stream.set_nodelay(true)?;
                    secret.accept(Box::new(stream)).await
                };
                let accepted = timeout(patience, accepted).await;
                accepted.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).unwrap_or_else(|error| {
                    log.warn("refused", format_args!("the peer at {address} is refused: {error}; {WAY_OUT}"));
                    None
                })
            });
            if handshakes.begun.note(begun, noted) {
                self.log.warn(
                    "handshakes",
                    format_args!(
                        "more than {NEWCOMERS_MAX} peers have not shown a key yet: the oldest connection is closed"
                    ),
                );
            }
        }
    }

    async fn open(&self, to: SocketAddr) -> io::Result<Secure> {
        let stream = self.tcp.connect(to).await?;
        let opened = timeout(self.patience, self.secret.open(stream)).await;
        opened.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())).map_err(|error| {
            self.log.warn("refuses", format_args!("no session with the peer at {to}: {error}; {WAY_OUT}"));
            refused(&error.to_string())
        })
    }
}

const WAY_OUT: &str = "all nodes of a cluster need a key in common and the same cluster name";

#[async_trait]
impl Network for SecureTcp {
    async fn connect(&self, to: SocketAddr) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(self.open(to).await?))
    }

    async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        std::future::poll_fn(|cx| self.poll_accept(cx)).await
    }
}

#[cfg(test)]
#[path = "secure_tests.rs"]
mod tests;
