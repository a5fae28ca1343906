//! The later wires of the first nkv: a line of text, or the same in a frame. Each connection has one request, and a
//! subscription keeps its own. The first bytes show which of them it is.
//!
//! A request is `WORD ID CLIENT KEY[ BASE64]`. On TCP, and for the clients in Go, lines are answered in their old form, `ID OK`;
//! else, and in frames, in the newer one, `base ID OK`.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Buf, BytesMut};
use nkv_core::mailbox::Backlog;
use nkv_core::{Key, Pattern, RecordRef};
use nkv_node::{AttachOptions, Event, Handle, Held, Holder, Peer, Place};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;
use tokio::time::timeout;
use tracing::debug;

use crate::inner::Inner;
use crate::socket::Socket;

/// The words that a request may begin with.
const WORDS: [&str; 8] = ["PUT", "GET", "DEL", "SUB", "UNSUB", "TRACE", "HEALTH", "VERSION"];

/// What the Rust client of the time takes for its own version.
const VERSION: &str = "0.1.1";

/// The ids of clients that know the old form of an answer alone.
const OLD_FORM: &str = "golang-nkv-client-";

/// The longest text of a frame, and of a line.
const TEXT_LEN_MAX: usize = 8 << 20;

/// The length before the text of a frame: four bytes, the lowest first.
const HEAD_LEN: usize = 4;

/// A subscription's line may lack its end: after this time without another byte it is taken for whole.
const SILENCE: Duration = Duration::from_millis(100);

/// How long what is under way may take once the node stops.
const STOP_LIMIT: Duration = Duration::from_millis(500);

/// The number of bytes that show the word of a text: the word, and a space.
const WORD_LEN: usize = 4;

/// Past this a request needs room to arrive, and an answer its turn.
const LONG_LEN: usize = 16 << 10;

/// An answer is no longer than this.
const ANSWER_LEN_MAX: usize = 64 << 20;

/// How a request is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    Line,
    Frame,
}

/// What the first bytes of a connection say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Speaks {
    This(Framing),
    /// More has to come.
    Unknown,
    Other,
}

/// Whether the first bytes of a connection are of these wires. Nothing that is plainly of another protocol is.
pub(crate) fn recognise(input: &[u8]) -> Speaks {
    // The length of a frame may have any byte in front, also a brace.
    let (head, text) = input.split_at_checked(HEAD_LEN).unwrap_or((input, &[]));
    if head.get(3).is_none_or(|byte| *byte == 0) {
        let word_len = text.len().min(WORD_LEN);
        let begins = |word: &&str| {
            let begin = [word.as_bytes(), b" "].concat();
            let len = begin.len().min(word_len);
            text.get(..len) == begin.get(..len)
        };
        // A short record of TLS has a zero in the fourth place too, and no word behind it.
        match WORDS.iter().any(begins) {
            true if text.len() >= WORD_LEN => return Speaks::This(Framing::Frame),
            true if head.len() == HEAD_LEN => return Speaks::Unknown,
            // A line of two or three bytes is whole with its end.
            true if head.first().is_some_and(|byte| *byte == b'{' || *byte < b' ') => return Speaks::Unknown,
            _ => {}
        }
    }
    if !input.first().is_some_and(u8::is_ascii_uppercase) {
        return Speaks::Other;
    }
    let line = match memchr::memchr(b'\n', input) {
        Some(end) => input.get(..end).unwrap_or_default(),
        // The word is no other protocol's, and its end may never come.
        None if input.starts_with(b"SUB ") => return Speaks::This(Framing::Line),
        None => return Speaks::Other,
    };
    let Ok(line) = std::str::from_utf8(line) else { return Speaks::Other };
    let line = line.trim_end();
    let is_http = line.ends_with(" HTTP/1.0") || line.ends_with(" HTTP/1.1");
    match !is_http && Text::parse(line).is_some() {
        true => Speaks::This(Framing::Line),
        false => Speaks::Other,
    }
}

/// A request.
#[derive(Debug, PartialEq, Eq)]
struct Text<'a> {
    word: &'a str,
    id: &'a str,
    client: &'a str,
    key: &'a str,
    value: Option<&'a str>,
}

impl<'a> Text<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut words = line.split(' ');
        let (word, id, client, key) = (words.next()?, words.next()?, words.next()?, words.next()?);
        let value = words.next();
        let is_whole = words.next().is_none() && ![id, client, key].contains(&"");
        (is_whole && WORDS.contains(&word)).then_some(Text { word, id, client, key, value })
    }
}

/// What is written of an answer in one turn.
const PART_LEN: usize = 256 << 10;

/// Bytes of an answer that its peer has not taken, as the node counts them.
struct Unsent<'a>(&'a AtomicUsize, usize);

impl<'a> Unsent<'a> {
    fn of(waiting: &'a AtomicUsize, len: usize) -> Self {
        waiting.fetch_add(len, Relaxed);
        Unsent(waiting, len)
    }
}

impl Drop for Unsent<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Relaxed);
    }
}

/// What is held for such a connection.
#[derive(Debug, Default)]
struct Line {
    unsent: AtomicUsize,
    look_anew: Notify,
}

#[derive(Debug)]
struct Connected(Arc<Line>);

impl Holder for Connected {
    fn held(&self) -> Held {
        Held { own: self.0.unsent.load(Relaxed), ..Held::default() }
    }

    fn backlog(&self) -> Backlog {
        Backlog::default()
    }

    fn busy_for(&self) -> Duration {
        Duration::ZERO
    }

    fn give_up(&self) {}

    fn wake(&self) {
        self.0.look_anew.notify_one();
    }
}

/// Serves the one request of a connection; `input` are the bytes that were read of it.
pub(crate) async fn serve(socket: Socket, input: BytesMut, framing: Framing, door: Arc<Inner>, place: Place) {
    let line = Arc::<Line>::default();
    let peer = door.handle.peer(place.peer(), Box::new(Connected(Arc::clone(&line))));
    let is_old_form = framing == Framing::Line && socket.tcp().is_some();
    let looked_at = Arc::clone(&line);
    let stall_limit = door.options.stall_limit;
    let mut wire = Wire { socket, input, searched: 0, framing, is_old_form, stall_limit, line };
    let served = async {
        let read = timeout(door.options.request_limit, wire.read(&door.handle, &peer)).await;
        let Ok(Some(text)) = read.unwrap_or(Ok(None)) else {
            return Ok(());
        };
        match Text::parse(text.trim_end()) {
            Some(request) => wire.answer(&door.handle, &peer, &request).await,
            // As the first nkv did.
            None => Ok(()),
        }
    };
    let left = async {
        while !peer.is_evicted() {
            looked_at.look_anew.notified().await;
        }
    };
    tokio::select! {
        served = served => {
            if let Err(error) = served {
                debug!(peer = %place, %error, "connection lost");
            }
        }
        // What it holds is needed, or what it was to send did not come before the node stopped.
        () = left => debug!(peer = %place, "connection closed"),
        () = async { door.handle.stopping().await; tokio::time::sleep(STOP_LIMIT).await } => {}
    }
}

struct Wire {
    socket: Socket,
    input: BytesMut,
    /// The number of its bytes that were searched and have no end of a line.
    searched: usize,
    framing: Framing,
    is_old_form: bool,
    stall_limit: Duration,
    line: Arc<Line>,
}

impl Wire {
    /// The text of the request; `None` if it does not come whole.
    async fn read(&mut self, handle: &Handle, peer: &Peer) -> io::Result<Option<String>> {
        let mut room = None;
        loop {
            peer.hold(self.input.len(), false);
            if let Some(text) = self.whole() {
                return Ok(String::from_utf8(text).ok());
            }
            if self.input.len() > TEXT_LEN_MAX.saturating_add(HEAD_LEN) || self.is_too_long() {
                return Ok(None);
            }
            if room.is_none() && self.input.len() > LONG_LEN {
                room = handle.arrival(TEXT_LEN_MAX).await.ok();
            }
            let is_subscription = self.framing == Framing::Line && self.input.starts_with(b"SUB ");
            let read = self.socket.read_buf(&mut self.input);
            let len = if is_subscription { timeout(SILENCE, read).await.unwrap_or(Ok(0))? } else { read.await? };
            if len == 0 {
                // The end, or silence.
                let is_line = self.framing == Framing::Line;
                return Ok(String::from_utf8(self.input.to_vec()).ok().filter(|_| is_line));
            }
        }
    }

    fn is_too_long(&self) -> bool {
        let head = self.input.get(..HEAD_LEN).and_then(|head| head.try_into().ok()).map(u32::from_le_bytes);
        self.framing == Framing::Frame && head.is_some_and(|len| len as usize > TEXT_LEN_MAX)
    }

    fn whole(&mut self) -> Option<Vec<u8>> {
        let (begin, end) = match self.framing {
            Framing::Line => {
                let new = self.input.get(self.searched..)?;
                let Some(end) = memchr::memchr(b'\n', new) else {
                    self.searched = self.input.len();
                    return None;
                };
                (0, self.searched.saturating_add(end))
            }
            Framing::Frame => {
                let head: [u8; HEAD_LEN] = self.input.get(..HEAD_LEN)?.try_into().ok()?;
                let len = usize::try_from(u32::from_le_bytes(head)).ok().filter(|len| *len <= TEXT_LEN_MAX)?;
                (HEAD_LEN, Some(HEAD_LEN.saturating_add(len)).filter(|end| *end <= self.input.len())?)
            }
        };
        // There is one request on a connection: what comes behind it says nothing.
        let mut text = std::mem::take(&mut self.input);
        text.truncate(end);
        text.advance(begin);
        Some(text.into())
    }

    async fn answer(&mut self, handle: &Handle, peer: &Peer, request: &Text<'_>) -> io::Result<()> {
        let Text { word, id, client, key, value } = *request;
        let is_old = self.is_old_form || id.starts_with(OLD_FORM);
        let base = |is_done: bool| {
            let word = if is_done { "OK" } else { "FAILED" };
            if is_old { format!("{id} {word}") } else { format!("base {id} {word}") }
        };
        let text = match word {
            "PUT" => {
                // An empty value has no form.
                let value = value.filter(|value| !value.is_empty()).and_then(|value| STANDARD.decode(value).ok());
                let is_done = match value {
                    Some(value) => handle.put(key, value).await.is_ok(),
                    None => false,
                };
                base(is_done)
            }
            "GET" => {
                let budget = handle.budget();
                // Long answers are made one after another.
                let is_long = key.ends_with('*');
                let leave = if is_long { budget.leave(self.stall_limit).await } else { None };
                let text = found(handle, id, key, is_old).await;
                let waiting = budget.waiting();
                let held = Unsent::of(&waiting, text.len());
                budget.check_if_over();
                drop(leave);
                self.send(&text).await?;
                drop(held);
                return within(self.stall_limit, self.socket.shutdown()).await;
            }
            "DEL" => {
                let deleted = delete(handle, key).await;
                // The newer wire has a delete of an absent key done.
                base(deleted.is_some_and(|count| count > 0 || !is_old))
            }
            "SUB" => return self.subscribe(handle, peer, client, key).await,
            "UNSUB" => {
                let pattern = Pattern::new(key).ok();
                let ended = pattern.as_ref().and_then(|pattern| handle.unsubscribe(pattern, &client.into()).ok());
                // The newer wire has that done also if it is another client's.
                let traced = || Key::new(key).ok().and_then(|key| handle.trace(&key).ok()).unwrap_or_default();
                let is_known = || traced().iter().any(|traced| Some(&traced.pattern) == pattern.as_ref());
                base(ended.unwrap_or(false) || !is_old && is_known())
            }
            "TRACE" => {
                let traced = Key::new(key).ok().and_then(|key| handle.trace(&key).ok()).unwrap_or_default();
                let names: Vec<_> = traced.iter().map(|traced| traced.client_uuid.to_string()).collect();
                match names.is_empty() {
                    true => format!("trace {id} FAILED"),
                    false => format!("trace {id} OK {}", names.join(" ")),
                }
            }
            "HEALTH" => format!("base {id} {}", if handle.check_healthy().is_ok() { "OK" } else { "FAILED" }),
            _ => format!("version {id} OK {VERSION}"),
        };
        self.send(&text).await?;
        within(self.stall_limit, self.socket.shutdown()).await
    }

    /// Sends changes for as long as both sides want that.
    async fn subscribe(&mut self, handle: &Handle, peer: &Peer, client: &str, key: &str) -> io::Result<()> {
        let options = AttachOptions::default().with_client_uuid(client).with_peer(peer);
        let Ok(pattern) = Pattern::new(key) else { return Ok(()) };
        let Ok(mut events) = handle.subscribe_attached(pattern, options).await else { return Ok(()) };
        self.send("HELLO").await?;
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = handle.stopping() => return Ok(()),
                // It says no more on this connection; its end is the end of the subscription.
                len = self.socket.read_buf(&mut self.input) => {
                    if len? == 0 {
                        return Ok(());
                    }
                    self.input.clear();
                    continue;
                }
            };
            match event {
                Some(Event::Update { entry, .. }) => {
                    self.send(&format!("UPDATE {} {}", entry.key, STANDARD.encode(&entry.value))).await?;
                }
                Some(Event::Gone { key, .. }) => self.send(&format!("CLOSE {key}")).await?,
                Some(Event::Ended(_)) | None => return Ok(()),
                Some(_) => {}
            }
        }
    }

    async fn send(&mut self, text: &str) -> io::Result<()> {
        let len = u32::try_from(text.len().saturating_add(1)).unwrap_or(u32::MAX).to_le_bytes();
        let head: &[u8] = if self.framing == Framing::Frame { &len } else { &[] };
        if text.len() <= LONG_LEN {
            // In one piece.
            self.write(&[head, text.as_bytes(), b"\n"].concat()).await?;
        } else {
            self.write(head).await?;
            self.write(text.as_bytes()).await?;
            self.write(b"\n").await?;
        }
        within(self.stall_limit, self.socket.flush()).await
    }

    async fn write(&mut self, mut rest: &[u8]) -> io::Result<()> {
        while !rest.is_empty() {
            self.line.unsent.store(rest.len(), Relaxed);
            let written = within(self.stall_limit, self.socket.write(rest)).await?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            rest = rest.get(written..).unwrap_or_default();
        }
        self.line.unsent.store(0, Relaxed);
        Ok(())
    }
}

/// Fails where the peer does not let `work` end within `limit`.
async fn within<T>(limit: Duration, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(limit, work).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// The values that `key` selects. `a.*` has `a` too, as always on these wires.
async fn found(handle: &Handle, id: &str, key: &str, is_old: bool) -> String {
    let failed = || if is_old { format!("{id} FAILED") } else { format!("data {id} FAILED") };
    let Ok(pattern) = Pattern::new(key) else { return failed() };
    let mut text = if is_old { format!("{id} OK") } else { format!("data {id} OK") };
    let add = |text: &mut String, record: RecordRef<'_>| {
        // An empty value would be taken for the next key.
        if !record.value.is_empty() {
            if !is_old {
                text.push(' ');
                text.push_str(record.key.as_str());
            }
            text.push(' ');
            STANDARD.encode_string(&*record.value, text);
        }
    };
    let mut count = 0_u64;
    if let Pattern::Below(branch) = &pattern {
        let found = handle.look_up(branch.as_str(), |record| add(&mut text, record));
        count = count.saturating_add(u64::from(matches!(found, Ok(Some(())))));
    }
    let mut after: Option<Key> = None;
    loop {
        let (begin, mut last) = (text.len(), None);
        let walked = handle.walk(&pattern, after.as_ref(), |record| {
            if text.len().saturating_sub(begin) > PART_LEN {
                return ControlFlow::Break(());
            }
            add(&mut text, record);
            count = count.saturating_add(1);
            last = Some(record.key.to_key());
            ControlFlow::Continue(())
        });
        match walked {
            Ok(ControlFlow::Continue(())) => break,
            Ok(ControlFlow::Break(())) if text.len() <= ANSWER_LEN_MAX => after = last.or(after),
            _ => return failed(),
        }
        tokio::task::yield_now().await;
    }
    // Of a wildcard there may be nothing; a key is there or not.
    if count > 0 || !matches!(pattern, Pattern::Key(_)) { text } else { failed() }
}

/// How many keys are gone; `a.*` takes `a` with it, as always on these wires.
async fn delete(handle: &Handle, key: &str) -> Option<u64> {
    let pattern = Pattern::new(key).ok()?;
    let mut count = handle.delete(&pattern).await.ok()?.count;
    if let Pattern::Below(branch) = &pattern {
        count = count.saturating_add(handle.delete(branch).await.ok()?.count);
    }
    Some(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_bytes_show_which_wire_it_is() {
        use Speaks::{Other, This, Unknown};
        let (line, frame) = (This(Framing::Line), This(Framing::Frame));
        for (input, expected) in [
            (&b"PUT 1 me a.b aGk=\n"[..], line),
            (b"GET 1 me a.b\r\n", line),
            (b"GET 1 me a", Other), // more may come
            (b"SUB 1 me a", line),
            (b"TRACE 1 me a\n", line),
            (b"GET / HTTP/1.1\r\n", Other),
            (b"GET /a b HTTP/1.0\n", Other),
            (b"GET a b c HTTP/1.1\n", Other),
            (b"PUT a\n", Other),
            (b"get 1 me a\n", Other),
            (b"GET 1  a\n", Other),
            (b"PUT 1 me a b c\n", Other),
            (b"{\"type\":\"Get\"}\n", Other),
            (b"{\"ty", Other),
            (b"{", Unknown),
            (&[0x0f, 0, 0, 0, b'G', b'E', b'T', b' '], frame),
            (&[0x7b, 0, 0, 0, b'U', b'N', b'S', b'U'], frame),
            (&[0x0a, 0, 0, 0], Unknown),
            (&[0x0a, 0, 0, 0, b'G'], Unknown),
            (&[0x0a], Unknown),
            (&[0x16, 3, 1, 0], Unknown),
            (&[0x16, 3, 1, 0, 0x5a, 1], Other), // TLS
            (&[0x16, 3, 1, 0, b'P', 1, 0, 0], Other),
        ] {
            assert_eq!(recognise(input), expected, "{:?}", String::from_utf8_lossy(input));
        }
    }
}
