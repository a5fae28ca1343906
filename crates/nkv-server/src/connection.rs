//! One connection: reads what is there, has every whole request in it served, in order, and reads on.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use nkv_notify_tcp::{NotifierOptions, TcpNotifier, WriterEnd, keep_alive, limit_send_buffer};
use nkv_protocol::{Answer, BaseFields, Chunks, Decoder, status};
use tokio::net::{TcpStream, UnixStream, tcp, unix};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle};
use tokio::time::Instant;
use tracing::debug;

use crate::budget::Share;
use crate::core::Core;
use crate::dispatch::Session;
use crate::server::{Options, stopped};
use crate::slots::Slot;

/// So much is asked of the system at a time.
const READ_LEN: usize = 16 << 10;

/// What the kernel keeps for a peer that does not read.
const SEND_BUFFER_LEN: usize = 128 << 10;

/// So long a deadline that has passed is not held against the peer.
const GRACE: Duration = Duration::from_millis(500);

/// How long a refused peer has to take the answer that says so.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(2);

/// An accepted socket.
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

enum ReadHalf {
    Tcp(tcp::OwnedReadHalf),
    Unix(unix::OwnedReadHalf),
}

impl ReadHalf {
    async fn readable(&self) -> io::Result<()> {
        match self {
            ReadHalf::Tcp(half) => half.readable().await,
            ReadHalf::Unix(half) => half.readable().await,
        }
    }

    fn try_read_buf(&self, buffer: &mut BytesMut) -> io::Result<usize> {
        match self {
            ReadHalf::Tcp(half) => half.try_read_buf(buffer),
            ReadHalf::Unix(half) => half.try_read_buf(buffer),
        }
    }
}

impl Socket {
    /// Says why there is no place for it, if the peer's buffer takes that, and closes.
    pub(crate) fn refuse(self, message: &str) {
        let mut out = Chunks::default();
        Answer::to(Default::default(), &mut out).base(status::UNAVAILABLE, message, &BaseFields::default());
        let line = out.take().concat();
        let written = match &self {
            Socket::Tcp(stream) => stream.try_write(&line),
            Socket::Unix(stream) => stream.try_write(&line),
        };
        if let Err(error) = written {
            debug!(%error, "a refused connection was not told so");
        }
    }

    fn split(self, options: NotifierOptions) -> io::Result<(ReadHalf, TcpNotifier, JoinHandle<WriterEnd>)> {
        Ok(match self {
            Socket::Tcp(stream) => {
                stream.set_nodelay(true)?;
                keep_alive(&stream)?;
                limit_send_buffer(&stream, SEND_BUFFER_LEN)?;
                let (read, write) = stream.into_split();
                let (notifier, writer) = TcpNotifier::spawn(write, options);
                (ReadHalf::Tcp(read), notifier, writer)
            }
            Socket::Unix(stream) => {
                limit_send_buffer(&stream, SEND_BUFFER_LEN)?;
                let (read, write) = stream.into_split();
                let (notifier, writer) = TcpNotifier::spawn(write, options);
                (ReadHalf::Unix(read), notifier, writer)
            }
        })
    }
}

/// A connection's writer; it does not outlive what it belongs to.
struct WriterTask(JoinHandle<WriterEnd>);

impl Drop for WriterTask {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn writer_end(ended: Result<WriterEnd, JoinError>) -> WriterEnd {
    ended.unwrap_or_else(|error| WriterEnd::Failed(error.into()))
}

/// Why a connection reads no more.
enum End {
    /// The peer's sending half ended, or the server stops.
    Quiet,
    /// The message in hand is not to be had.
    Refused,
    /// What was awaited of the peer did not come in time.
    Overdue,
    /// All connections hold too much, and this one the most.
    Evicted,
    /// The writer has ended.
    Writer(WriterEnd),
}

/// Serves a connection until either side ends it.
pub(crate) async fn serve(socket: Socket, core: Arc<Core>, options: Options, slot: Slot, stop: watch::Receiver<bool>) {
    let notifier_options = NotifierOptions {
        stall_limit: options.stall_limit,
        waiting_total: core.budget.waiting(),
        ..NotifierOptions::default()
    };
    let (read, notifier, writer) = match socket.split(notifier_options) {
        Ok(parts) => parts,
        Err(error) => return debug!(%error, "a connection ended before it began"),
    };
    let share = core.budget.share(notifier.clone());
    let (evicted, evicted_later) = (share.evicted(), share.evicted());
    let mut connection = Connection {
        read,
        decoder: Decoder::new(options.limits()),
        buffer: BytesMut::new(),
        session: Session::new(Arc::clone(&core), notifier.clone(), options),
        options,
        since: Since { opened: Instant::now(), served: None, begun: None, unserved_len: 0, grace: None },
        share,
        stop,
        writer: WriterTask(writer),
    };
    let end = tokio::select! {
        biased;
        () = evicted => {
            log_eviction(&core, &slot, &connection.share);
            Ok(connection.evict())
        }
        end = connection.run() => end,
    };
    // What was read and not served is let go before the answers are waited for.
    let Connection { read, buffer, share, session, mut writer, .. } = connection;
    drop((read, buffer));
    session.end();
    share.hold(0, true);
    notifier.close();
    if matches!(end, Ok(End::Evicted)) && share.held() > NotifierOptions::default().waiting_max {
        return; // of one that has read nothing of what it holds, no reading is to be expected
    }
    // At a quiet end the peer may take its time, as long as it takes something.
    let patience = if matches!(end, Ok(End::Quiet)) { Duration::MAX } else { LAST_WORDS_LIMIT };
    let end = match end {
        Ok(End::Writer(end)) => end,
        Ok(_) => tokio::select! {
            ended = tokio::time::timeout(patience, &mut writer.0) => match ended {
                Ok(ended) => writer_end(ended),
                Err(_) => return debug!(peer = %slot, "connection closed; its last answer was not taken"),
            },
            () = evicted_later => return log_eviction(&core, &slot, &share),
        },
        Err(error) => WriterEnd::Failed(error),
    };
    match end {
        WriterEnd::Finished => debug!(peer = %slot, "connection closed"),
        WriterEnd::Stalled => {
            let what = format_args!("connection cut: {slot} took nothing for {:?}", options.stall_limit);
            core.complaints.warn("stalled", what);
        }
        WriterEnd::Failed(error) => debug!(peer = %slot, %error, "connection lost"),
    }
}

fn log_eviction(core: &Core, slot: &Slot, share: &Share) {
    let what = format_args!("connection closed: all hold too much, and {slot} the most, {} bytes", share.held());
    core.complaints.warn("evicted", what);
}

/// What deadlines count from.
struct Since {
    opened: Instant,
    /// When a request was served last.
    served: Option<Instant>,
    /// When the request that is on its way began to come.
    begun: Option<Instant>,
    /// Bytes that have come since a request was served.
    unserved_len: usize,
    /// The end of the grace after a deadline that has passed.
    grace: Option<Instant>,
}

struct Connection {
    read: ReadHalf,
    decoder: Decoder,
    buffer: BytesMut,
    session: Session,
    options: Options,
    since: Since,
    share: Share,
    stop: watch::Receiver<bool>,
    writer: WriterTask,
}

impl Connection {
    async fn run(&mut self) -> io::Result<End> {
        loop {
            let deadline = self.deadline();
            tokio::select! {
                biased;
                end = &mut self.writer.0 => return Ok(End::Writer(writer_end(end))),
                () = stopped(&mut self.stop) => return Ok(End::Quiet),
                readable = self.read.readable() => readable?,
                () = until(deadline) => match self.is_overdue(deadline) {
                    true => return Ok(self.overdue()),
                    false => continue,
                },
            }
            self.share.relief().await;
            // Room for what is known to come, but never for much more than has come: an announcement costs nothing.
            let missing = self.decoder.expected_len().unwrap_or(0).saturating_sub(self.buffer.len());
            // What does not fit one reading gets much more at once: buffers that grow in many steps leave many holes.
            let least = if self.buffer.len() < READ_LEN { READ_LEN } else { READ_LEN * 7 };
            self.buffer.reserve(missing.clamp(least, self.buffer.len().max(least)));
            let len = match self.read.try_read_buf(&mut self.buffer) {
                Ok(0) => return self.last_words().await,
                Ok(len) => len,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error),
            };
            self.since.unserved_len = self.since.unserved_len.saturating_add(len);
            let before = self.buffer.len();
            if self.serve_buffer().await {
                return Ok(End::Refused);
            }
            if before.saturating_sub(self.buffer.len()) >= READ_LEN {
                tokio::task::yield_now().await; // whoever sends so much at a time gives others their turn
            }
            if self.buffer.is_empty() {
                self.buffer = BytesMut::new(); // an idle connection keeps no buffer
            }
            let served = self.since.begun.is_none();
            self.share.hold(self.buffer.capacity(), served);
            // Bytes that come and come and make no request hold no deadline off.
            if self.is_overdue(deadline) {
                return Ok(self.overdue());
            }
        }
    }

    /// Serves every whole request in the buffer; true if the connection is to be closed.
    async fn serve_buffer(&mut self) -> bool {
        let (mut start, mut served, mut close) = (0, false, false);
        while !close {
            let decoded = self.decoder.decode(self.buffer.get(start..).unwrap_or_default());
            start = start.saturating_add(decoded.consumed);
            let Some(item) = decoded.item else { break };
            served = true;
            match item {
                Ok(request) => self.session.request(request).await,
                Err(refusal) => {
                    close = refusal.close;
                    self.session.refuse(refusal).await;
                }
            }
        }
        self.session.flush().await;
        if start < READ_LEN {
            drop(self.buffer.split_to(start));
        } else {
            // What is left may be little, and would keep all the room that the rest took.
            self.buffer = BytesMut::from(self.buffer.get(start..).unwrap_or_default());
        }
        if served {
            let now = self.options.idle_limit.map(|_| Instant::now());
            let opened = self.since.opened;
            let unserved_len = self.buffer.len();
            self.since = Since { opened, served: now.or(Some(opened)), begun: None, unserved_len, grace: None };
        }
        close
    }

    /// When something must have come: the whole of a request that has begun, the first request, or any.
    fn deadline(&mut self) -> Option<Instant> {
        let Options { request_limit, first_byte_limit, idle_limit, .. } = self.options;
        let deadline = if self.decoder.is_within_message() {
            let begun = *self.since.begun.get_or_insert_with(Instant::now);
            let parts = u32::try_from(self.since.unserved_len >> 20).unwrap_or(u32::MAX).saturating_add(1);
            begun.checked_add(request_limit.saturating_mul(parts))
        } else if let Some(served) = self.since.served {
            served.checked_add(idle_limit.filter(|_| !self.session.is_subscribed())?)
        } else {
            self.since.opened.checked_add(first_byte_limit)
        };
        deadline.max(self.since.grace)
    }

    /// Whether this deadline has passed, and some grace: if this process stood still, what came in time may wait yet.
    fn is_overdue(&mut self, deadline: Option<Instant>) -> bool {
        let now = Instant::now();
        if deadline.is_none_or(|deadline| deadline > now) || self.deadline() != deadline {
            return false;
        }
        if self.since.grace.is_none() {
            self.since.grace = now.checked_add(GRACE);
            return false;
        }
        true
    }

    fn overdue(&mut self) -> End {
        let message = if self.decoder.is_within_message() {
            format!("a request must be whole within {:?} for each MiB of it", self.options.request_limit)
        } else if self.since.served.is_none() {
            format!("no request came within {:?}", self.options.first_byte_limit)
        } else {
            format!("no request came for {:?}", self.options.idle_limit.unwrap_or_default())
        };
        self.tell(status::TIMEOUT, &message);
        End::Overdue
    }

    /// The peer sends no more. A last line without a newline is a line all the same: whoever typed it meant it.
    async fn last_words(&mut self) -> io::Result<End> {
        self.buffer.extend_from_slice(b"\n");
        self.serve_buffer().await;
        Ok(End::Quiet)
    }

    fn evict(&mut self) -> End {
        let message = "connections hold too much, and this one the most: send requests whole, read answers sooner";
        self.tell(status::UNAVAILABLE, message);
        End::Evicted
    }

    fn tell(&mut self, status: u16, message: &str) {
        Answer::to(Default::default(), self.session.out()).base(status, message, &BaseFields::default());
        self.session.send();
    }
}

/// Waits until `deadline`; for ever without one.
async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
