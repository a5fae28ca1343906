//! The later wires of the first nkv: a line of text, or the same in a frame. Each connection has one request, and a
//! subscription keeps its own. Which of them it is, the first bytes tell.
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

/// A subscription's line may lack its end: after so long without another byte it is taken for whole.
const SILENCE: Duration = Duration::from_millis(100);

/// An answer is no longer than this.
const ANSWER_LEN_MAX: usize = 64 << 20;

/// How a request is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    Line,
    Frame,
}

/// Whether the first bytes of a connection are of these wires. Nothing that is plainly of another protocol is.
pub(crate) fn recognise(input: &[u8]) -> Option<Framing> {
    // A short TLS record has a zero in the fourth place too, and no letter behind it.
    if let [_, _, _, 0, letter, ..] = input {
        return letter.is_ascii_uppercase().then_some(Framing::Frame);
    }
    let line = match memchr::memchr(b'\n', input) {
        Some(end) => input.get(..end)?,
        // The word is no other protocol's, and its end may never come.
        None if input.starts_with(b"SUB ") => return Some(Framing::Line),
        None => return None,
    };
    let line = std::str::from_utf8(line).ok()?.trim_end();
    let is_http = line.ends_with(" HTTP/1.0") || line.ends_with(" HTTP/1.1");
    (!is_http && Text::parse(line).is_some()).then_some(Framing::Line)
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
    let mut wire = Wire { socket, input, framing, is_old_form, stall_limit: door.options.stall_limit, line };
    let served = async {
        let Ok(Some(text)) = timeout(door.options.request_limit, wire.read()).await.unwrap_or(Ok(None)) else {
            return Ok(());
        };
        match Text::parse(text.trim_end()) {
            Some(request) => wire.answer(&door.handle, &peer, &request).await,
            // As the first nkv did.
            None => Ok(()),
        }
    };
    if let Err(error) = served.await {
        debug!(peer = %place, %error, "connection lost");
    }
}

struct Wire {
    socket: Socket,
    input: BytesMut,
    framing: Framing,
    is_old_form: bool,
    stall_limit: Duration,
    line: Arc<Line>,
}

impl Wire {
    /// The text of the request; `None` if it does not come whole.
    async fn read(&mut self) -> io::Result<Option<String>> {
        loop {
            if let Some(text) = self.whole() {
                return Ok(String::from_utf8(text).ok());
            }
            if self.input.len() > TEXT_LEN_MAX.saturating_add(HEAD_LEN) {
                return Ok(None);
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

    fn whole(&mut self) -> Option<Vec<u8>> {
        match self.framing {
            Framing::Line => memchr::memchr(b'\n', &self.input).map(|end| self.input.split_to(end).to_vec()),
            Framing::Frame => {
                let head: [u8; HEAD_LEN] = self.input.get(..HEAD_LEN)?.try_into().ok()?;
                let len = usize::try_from(u32::from_le_bytes(head)).ok().filter(|len| *len <= TEXT_LEN_MAX)?;
                let text = self.input.get(HEAD_LEN..HEAD_LEN.saturating_add(len))?.to_vec();
                self.input.advance(HEAD_LEN);
                Some(text)
            }
        }
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
            "GET" => self.found(handle, id, key, is_old),
            "DEL" => {
                let deleted = delete(handle, key).await;
                // The newer wire has a delete of an absent key done.
                base(deleted.is_some_and(|count| count > 0 || !is_old))
            }
            "SUB" => return self.subscribe(handle, peer, client, key).await,
            "UNSUB" => {
                let ended =
                    Pattern::new(key).ok().and_then(|pattern| handle.unsubscribe(&pattern, &client.into()).ok());
                base(ended.unwrap_or(false))
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
        self.socket.shutdown().await
    }

    /// The values that `key` selects. `a.*` has `a` too, as always on these wires.
    fn found(&self, handle: &Handle, id: &str, key: &str, is_old: bool) -> String {
        let failed = || if is_old { format!("{id} FAILED") } else { format!("data {id} FAILED") };
        let Ok(pattern) = Pattern::new(key) else { return failed() };
        let mut text = if is_old { format!("{id} OK") } else { format!("data {id} OK") };
        let (mut count, begin) = (0_u64, text.len());
        let mut add = |record: RecordRef<'_>| {
            // An empty value would be taken for the next key.
            if !record.value.is_empty() {
                if !is_old {
                    text.push(' ');
                    text.push_str(record.key.as_str());
                }
                text.push(' ');
                STANDARD.encode_string(&*record.value, &mut text);
            }
            count = count.saturating_add(1);
            if text.len() > ANSWER_LEN_MAX { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        if let Pattern::Below(branch) = &pattern {
            _ = handle.look_up(branch.as_str(), &mut add);
        }
        let walked = handle.walk(&pattern, None, add);
        let is_known = count > 0 && matches!(walked, Ok(ControlFlow::Continue(())));
        // Of a wildcard there may be nothing; a key is there or not.
        let is_wildcard = !matches!(pattern, Pattern::Key(_));
        if is_known || is_wildcard && walked.is_ok_and(|walked| walked.is_continue()) && text.len() == begin {
            return text;
        }
        failed()
    }

    /// Tells what changes for as long as both sides want that.
    async fn subscribe(&mut self, handle: &Handle, peer: &Peer, client: &str, key: &str) -> io::Result<()> {
        let options = AttachOptions::default().with_client_uuid(client).with_peer(peer);
        let Ok(pattern) = Pattern::new(key) else { return Ok(()) };
        let Ok(mut events) = handle.subscribe_attached(pattern, options).await else { return Ok(()) };
        self.send("HELLO").await?;
        let line = Arc::clone(&self.line);
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = line.look_anew.notified() => {
                    if peer.is_evicted() || peer.is_stopping() {
                        return Ok(());
                    }
                    continue;
                }
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
        let len = text.len().saturating_add(1);
        let mut out = Vec::with_capacity(len.saturating_add(HEAD_LEN));
        if self.framing == Framing::Frame {
            out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
        }
        out.extend_from_slice(text.as_bytes());
        out.push(b'\n');
        self.line.unsent.store(out.len(), Relaxed);
        let mut rest = &out[..];
        while !rest.is_empty() {
            let written = timeout(self.stall_limit, self.socket.write(rest)).await;
            let written = written.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            rest = rest.get(written..).unwrap_or_default();
            self.line.unsent.store(rest.len(), Relaxed);
        }
        self.socket.flush().await
    }
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
    fn the_first_bytes_tell_whose_they_are() {
        for (input, expected) in [
            (&b"PUT 1 me a.b aGk=\n"[..], Some(Framing::Line)),
            (b"GET 1 me a.b\r\n", Some(Framing::Line)),
            (b"GET 1 me a", None), // more may come
            (b"SUB 1 me a", Some(Framing::Line)),
            (b"TRACE 1 me a\n", Some(Framing::Line)),
            (b"GET / HTTP/1.1\r\n", None),
            (b"GET /a b HTTP/1.0\n", None),
            (b"GET a b c HTTP/1.1\n", None),
            (b"PUT a\n", None),
            (b"get 1 me a\n", None),
            (b"GET 1  a\n", None),
            (b"PUT 1 me a b c\n", None),
            (b"{\"type\":\"Get\"}\n", None),
            (&[0x0f, 0, 0, 0, b'G', b'E', b'T'], Some(Framing::Frame)),
            (&[0x16, 3, 1, 0, 0xa5, 1], None), // TLS
            (&[0x0f, 0, 0, 0], None),
        ] {
            assert_eq!(recognise(input), expected, "{:?}", String::from_utf8_lossy(input));
        }
    }
}
