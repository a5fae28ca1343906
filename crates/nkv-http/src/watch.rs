//! Watching: server-sent events that can be resumed, and a long poll for clients that have only single requests.

use std::cell::RefCell;
use std::io::Write as _;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderValue, Request};
use nkv_core::Pattern;
use nkv_node::{Cursor, EndReason, Handle, Seen, SharedWaker, Tail, TailEvent, TailOptions};
use tokio::time::{Instant, Sleep, sleep};

use crate::body::{Answer, Body, BoxError, Source, Unsent, full};
use crate::entry::{write_entry, write_number, write_text};
use crate::making::Making;
use crate::problem::Problem;
use crate::query::{Query, number};
use crate::route::{Ctx, json, only_get, query, takes_gzip};
use crate::woken::Woken;

/// How long a long poll waits when nothing is said, and at most: what stands before many a server gives up after 60 s.
const WAIT: Duration = Duration::from_secs(30);
const WAIT_MAX: Duration = Duration::from_secs(60);
/// The time before its end at which it is answered.
const WAIT_MARGIN: Duration = Duration::from_secs(2);

/// An answer to a long poll has no more bytes than this.
const POLL_LEN_MAX: usize = 64 << 20;

/// What is gathered before it is given to the connection.
const PIECE_LEN: usize = 16 << 10;

/// What a thread keeps of the texts of events, in bytes: a change goes to hundreds, one behind the other.
const RECENT_LEN_MAX: usize = 32 << 10;

/// The longest value of an event whose text is kept.
const RECENT_VALUE_LEN_MAX: usize = 8 << 10;

/// How many events are taken in one turn.
const TURN_EVENTS: usize = 256;

/// The longest label of a watch, in bytes.
const NAME_LEN_MAX: usize = 256;

/// How long a client is to wait before it comes back.
const RETRY: &str = "retry: 1000\n\n";

/// `GET /v1/watch`.
pub(crate) async fn watch<B>(ctx: Ctx<'_>, request: Request<B>) -> Result<Answer, Problem> {
    only_get(&request)?;
    let query = query(&request, &["pattern*", "exact", "snapshot", "name", "after", "wait"])?;
    let patterns = query.all("pattern").map(Pattern::new).collect::<Result<Vec<_>, _>>();
    let patterns = patterns.map_err(|error| Problem::new("invalid-key", error.to_string()))?;
    if patterns.is_empty() {
        return Err(Problem::bad("'pattern' says what is watched; '*' is everything"));
    }
    if let Some(name) = query.get("name").filter(|name| !name.is_empty()) {
        if name.len() > NAME_LEN_MAX || name.chars().any(char::is_control) {
            return Err(Problem::bad(format!("'name' has at most {NAME_LEN_MAX} bytes, and no control characters")));
        }
        ctx.conn.peer().says(|said| said.name = Some(name.into()));
    }
    let (snapshot, exact) = (query.flag("snapshot", true)?, query.flag("exact", false)?);
    if let Some(wildcard) = patterns.iter().find(|pattern| exact && !matches!(pattern, Pattern::Key(_))) {
        let detail = format!("'exact' is about keys, and '{wildcard}' is a wildcard");
        return Err(Problem::new("invalid-key", detail));
    }
    let mut options = TailOptions::default().with_snapshot(snapshot).with_exact(exact).with_peer(ctx.conn.peer());
    // What the client heard last is newer than what its address says.
    let handle = &ctx.door.handle;
    let resumed = request.headers().get("last-event-id").filter(|id| !id.is_empty());
    let after = match resumed {
        Some(id) => Some(id.to_str().ok().map(str::to_owned).unwrap_or_default()),
        None => query.get("after").filter(|after| !after.is_empty()).map(str::to_owned),
    };
    let mut behind = None;
    if let Some(after) = after {
        let after = cursor(handle, &after);
        match level(handle, after).await {
            Ok(after) => options = options.with_after(after),
            Err(error) => behind = Some(error),
        }
    }
    let (wait, gzip) = (wait(&query)?, takes_gzip(&request));
    // What was asked may be long, and is not kept for as long as it takes.
    drop((query, request));
    match (wait, behind) {
        // A status that is no success would end a browser's source for good.
        (None, Some(error)) => Ok(event_stream(full(format!(": {error}\n{RETRY}")))),
        (Some(_), Some(error)) => Err(error.into()),
        (None, None) => stream(ctx, patterns, options),
        (Some(wait), None) => poll(ctx, gzip, patterns, options, wait).await,
    }
}

fn wait(query: &Query) -> Result<Option<Duration>, Problem> {
    match query.get("wait") {
        None => Ok(None),
        Some("") => Ok(Some(WAIT)),
        Some(_) => query.duration("wait").map(|wait| wait.map(|wait| wait.min(WAIT_MAX.saturating_sub(WAIT_MARGIN)))),
    }
}

/// What a client has seen, once this node has it; one that knows nothing, where the data have it not.
async fn level(handle: &Handle, after: Cursor) -> nkv_node::Result<Cursor> {
    if !handle.follows_engine() || after.revision.get() == u64::MAX {
        return Ok(after);
    }
    let has_it = handle.catch_up(Seen { epoch: after.epoch, revision: after.revision }).await?;
    Ok(if has_it { after } else { unknown(handle) })
}

fn unknown(handle: &Handle) -> Cursor {
    Cursor { epoch: handle.epoch(), revision: nkv_core::Revision::new(u64::MAX), selection: None }
}

/// Up to where a client says that it knows the state. A bare revision is one of the present epoch; what cannot be read is not known.
fn cursor(handle: &Handle, text: &str) -> Cursor {
    let bare = || {
        let revision = number(text).map(nkv_core::Revision::new)?;
        Some(Cursor { epoch: handle.epoch(), revision, selection: None })
    };
    text.parse().ok().or_else(bare).unwrap_or_else(|| unknown(handle))
}

fn stream(ctx: Ctx<'_>, patterns: Vec<Pattern>, options: TailOptions<'_>) -> Result<Answer, Problem> {
    let tail = ctx.door.handle.tail(patterns, options)?;
    ctx.conn.load.observe(&tail.observer());
    let mut out = Vec::new();
    if options.after.is_none() && options.snapshot {
        // One that is cut off inside the snapshot comes back as one that knows nothing.
        out.extend_from_slice(format!("id: {}\n\n", tail.start()).as_bytes());
    }
    let (handle, every) = (ctx.door.handle.clone(), ctx.door.options.heartbeat);
    let stopping = Box::pin(async move { handle.stopping().await });
    let source = Events {
        tail,
        handle: ctx.door.handle.clone(),
        waker: SharedWaker::default(),
        out,
        whole: None,
        heartbeat: Box::pin(sleep(every)),
        sent: Instant::now(),
        every,
        stopping,
        has_ended: false,
        changed: Woken::default(),
        limits: Woken::default(),
        unsent: ctx.conn.load.hold(0),
    };
    Ok(event_stream(Body::long(Box::new(source), None, ctx.conn)))
}

fn event_stream(body: Body) -> Answer {
    let mut answer = Answer::new(body);
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, no-transform"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    answer
}

/// Server-sent events.
struct Events {
    tail: Tail,
    handle: Handle,
    /// Wakes this task with all others that a batch notifies.
    waker: SharedWaker,
    out: Vec<u8>,
    /// The text of the only event of a piece, which is that of other readers too.
    whole: Option<Bytes>,
    /// Wakes this task when a heartbeat may be due.
    heartbeat: Pin<Box<Sleep>>,
    /// When the last piece was given.
    sent: Instant,
    every: Duration,
    stopping: Pin<Box<dyn Future<Output = ()> + Send>>,
    has_ended: bool,
    /// There may be changes.
    changed: Woken,
    /// A heartbeat may be due, or the server ends.
    limits: Woken,
    /// The piece that the peer has not taken.
    unsent: Unsent,
}

impl Source for Events {
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BoxError>>> {
        self.unsent.set(0);
        // Also without anything new this is called several times for a change.
        if self.changed.take(cx.waker()) {
            self.take_changes();
        }
        let is_quiet = self.whole.is_none() && self.out.is_empty() && !self.has_ended;
        if is_quiet && self.limits.take(cx.waker()) {
            let limits = std::mem::take(&mut self.limits);
            self.look_at_limits(&mut Context::from_waker(limits.waker()));
            if !self.out.is_empty() {
                limits.note();
            }
            self.limits = limits;
        }
        let Some(piece) = self.whole.take().or_else(|| piece(&mut self.out)) else {
            return if self.has_ended { Poll::Ready(None) } else { Poll::Pending };
        };
        self.sent = Instant::now();
        self.unsent.set(piece.len());
        Poll::Ready(Some(Ok(piece)))
    }
}

fn piece(out: &mut Vec<u8>) -> Option<Bytes> {
    (!out.is_empty()).then(|| std::mem::take(out).into())
}

impl Events {
    /// Takes the changes of one turn.
    fn take_changes(&mut self) {
        let (changed, mut shared) = (std::mem::take(&mut self.changed), std::mem::take(&mut self.waker));
        let mut cx = Context::from_waker(self.handle.waker(&mut shared, changed.waker()));
        let mut is_all = false;
        for _ in 0..TURN_EVENTS {
            if self.has_ended || self.out.len() >= PIECE_LEN {
                break;
            }
            match self.tail.poll_next(&mut cx) {
                Poll::Ready(Some((event, cursor))) => self.say(&event, cursor),
                Poll::Ready(None) => self.has_ended = true,
                Poll::Pending => {
                    is_all = true;
                    break;
                }
            }
        }
        if !is_all {
            changed.note();
        }
        (self.changed, self.waker) = (changed, shared);
    }

    /// Says that the server ends, or that it is there.
    fn look_at_limits(&mut self, cx: &mut Context<'_>) {
        if self.stopping.as_mut().poll(cx).is_ready() {
            self.out.extend_from_slice(RETRY.as_bytes());
            self.has_ended = true;
        } else if self.poll_heartbeat(cx).is_ready() {
            self.out.extend_from_slice(b": \n");
            if let Some(position) = self.tail.position() {
                self.out.extend_from_slice(format!("id: {position}\n").as_bytes());
            }
            self.out.push(b'\n');
        }
    }

    /// Until nothing was sent for as long as there may be silence. The timer is not set anew for each piece.
    fn poll_heartbeat(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.heartbeat.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            let is_due = now.saturating_duration_since(self.sent) >= self.every;
            let since = if is_due { now } else { self.sent };
            // One that can never be due waits no more.
            let Some(at) = since.checked_add(self.every) else { return Poll::Pending };
            self.heartbeat.as_mut().reset(at);
            if is_due {
                return Poll::Ready(());
            }
        }
        Poll::Pending
    }

    fn say(&mut self, event: &TailEvent, cursor: Option<Cursor>) {
        if let Some(whole) = self.whole.take() {
            self.out.extend_from_slice(&whole);
        }
        match event {
            TailEvent::Ended(reason) => {
                self.has_ended = true;
                self.out.extend_from_slice(ended(reason).as_bytes());
            }
            _ if cursor.is_some() && is_for_all(event) => {
                RECENT.with_borrow_mut(|recent| match recent.text(event, cursor) {
                    text if self.out.is_empty() => self.whole = Some(text),
                    text => self.out.extend_from_slice(&text),
                });
            }
            _ => write_text_of(&mut self.out, event, cursor),
        }
    }
}

/// Whether other readers are likely to be given an event with the same text: what a TTL has left is another time for each.
fn is_for_all(event: &TailEvent) -> bool {
    match event {
        TailEvent::Put { entry, ttl, .. } => ttl.is_none() && entry.value.len() <= RECENT_VALUE_LEN_MAX,
        _ => matches!(event, TailEvent::Delete { .. }),
    }
}

/// The text of an event.
fn write_text_of(out: &mut Vec<u8>, event: &TailEvent, cursor: Option<Cursor>) {
    let name = match event {
        TailEvent::Put { .. } => "put",
        TailEvent::Delete { .. } => "delete",
        TailEvent::Synced { .. } => "synced",
        TailEvent::Reset => "reset",
        _ => return,
    };
    // A vector takes all that is written to it.
    drop(match cursor {
        Some(cursor) => write!(out, "event: {name}\nid: {cursor}\n"),
        None => writeln!(out, "event: {name}"),
    });
    out.extend_from_slice(b"data: {");
    write_event(out, event);
    out.extend_from_slice(b"}\n\n");
}

thread_local! {
    static RECENT: RefCell<Recent> = RefCell::default();
}

/// The texts of the events that were written last, for other readers of the same.
#[derive(Default)]
struct Recent {
    said: Vec<Said>,
    len: usize,
    /// Where the next event is looked for: readers are written the same events, one behind the other.
    next: usize,
}

struct Said {
    event: TailEvent,
    cursor: Option<Cursor>,
    text: Bytes,
}

impl Recent {
    fn text(&mut self, event: &TailEvent, cursor: Option<Cursor>) -> Bytes {
        // The cursor first: it tells most of them apart.
        let is_it = |said: &Said| said.cursor == cursor && said.event == *event;
        let is_next = self.said.get(self.next).is_some_and(is_it);
        let place = if is_next { Some(self.next) } else { self.said.iter().rposition(is_it) };
        if let Some((place, said)) = place.and_then(|place| Some((place, self.said.get(place)?))) {
            self.next = place.saturating_add(1);
            return said.text.clone();
        }
        if self.len >= RECENT_LEN_MAX {
            *self = Recent::default();
        }
        let mut text = Vec::new();
        write_text_of(&mut text, event, cursor);
        let text = Bytes::from(text);
        self.len = self.len.saturating_add(text.len());
        self.said.push(Said { event: event.clone(), cursor, text: text.clone() });
        self.next = self.said.len();
        text
    }
}

/// The reader comes back: by itself, after a while.
fn ended(reason: &EndReason) -> String {
    match reason {
        EndReason::Refused { message, .. } => format!(": {message}\n{RETRY}"),
        _ => RETRY.to_owned(),
    }
}

/// What stands between the braces of an event's object.
fn write_event(out: &mut Vec<u8>, event: &TailEvent) {
    match event {
        TailEvent::Put { entry, ttl, skipped, .. } => {
            write_entry(out, entry.key.as_str(), Some(&entry.value), entry.revision.get(), *ttl);
            write_skipped(out, *skipped);
        }
        TailEvent::Delete { key, revision, reason, skipped, .. } => {
            write_entry(out, key.as_str(), None, revision.get(), None);
            out.extend_from_slice(b",\"reason\":");
            write_text(out, reason.as_str());
            write_skipped(out, *skipped);
        }
        TailEvent::Synced { revision, .. } => {
            out.extend_from_slice(b"\"revision\":");
            write_number(out, revision.get());
        }
        _ => {}
    }
}

fn write_skipped(out: &mut Vec<u8>, skipped: u64) {
    out.extend_from_slice(b",\"skipped\":");
    write_number(out, skipped);
}

/// What a long poll is answered.
struct Gathered {
    events: Vec<u8>,
    reset: bool,
    next: Option<Cursor>,
}

impl Gathered {
    /// Adds an event to the answer, if it is one that its reader has to know of.
    fn take(&mut self, event: &TailEvent, cursor: Option<Cursor>) -> Result<(), Problem> {
        self.next = cursor.or(self.next);
        let name = match event {
            TailEvent::Put { .. } => "put",
            TailEvent::Delete { .. } => "delete",
            TailEvent::Reset => {
                (self.events, self.reset) = (Vec::new(), true);
                return Ok(());
            }
            TailEvent::Ended(EndReason::Refused { message, .. }) => {
                return Err(Problem::new("unavailable", message.clone()));
            }
            TailEvent::Ended(_) => return Err(Problem::new("stopping", "the server is stopping")),
            _ => return Ok(()),
        };
        if !self.events.is_empty() {
            self.events.push(b',');
        }
        self.events.extend_from_slice(format!("{{\"event\":\"{name}\",").as_bytes());
        write_event(&mut self.events, event);
        self.events.push(b'}');
        if self.events.len() > POLL_LEN_MAX {
            let detail = "more than 64 MiB have changed: read them as a stream, without 'wait'";
            return Err(Problem::new("too-large", detail));
        }
        Ok(())
    }

    fn has_something(&self) -> bool {
        self.reset || !self.events.is_empty()
    }
}

async fn poll(
    ctx: Ctx<'_>,
    gzip: bool,
    patterns: Vec<Pattern>,
    options: TailOptions<'_>,
    wait: Duration,
) -> Result<Answer, Problem> {
    let handle = &ctx.door.handle;
    let mut tail = handle.tail(patterns, options)?;
    ctx.conn.load.observe(&tail.observer());
    let mut gathered = Gathered { events: Vec::new(), reset: false, next: None };
    let mut making = Making::new(ctx);
    loop {
        let Some((event, cursor)) = tail.next().await else { break };
        gathered.take(&event, cursor)?;
        making.grow(gathered.events.len()).await;
        if matches!(event, TailEvent::Synced { .. }) {
            break;
        }
        tokio::task::consume_budget().await;
    }
    if !gathered.has_something() && options.after.is_some() {
        let first = tokio::select! {
            first = tail.next() => first,
            () = sleep(wait) => None,
            () = handle.stopping() => None,
        };
        if let Some((event, cursor)) = first {
            gathered.take(&event, cursor)?;
            // And what came with it.
            let mut taken = 1_usize;
            while let Poll::Ready(Some((event, cursor))) = poll_once(&mut tail).await {
                gathered.take(&event, cursor)?;
                making.grow(gathered.events.len()).await;
                taken = taken.saturating_add(1);
                if taken >= TURN_EVENTS && cursor.is_some() {
                    break;
                }
            }
        } else if let Some(position) = tail.position() {
            gathered.next = Some(position);
        }
    }
    let mut out = b"{\"events\":[".to_vec();
    out.append(&mut gathered.events);
    out.extend_from_slice(b"],\"next\":");
    write_text(&mut out, &gathered.next.unwrap_or_else(|| tail.start()).to_string());
    out.extend_from_slice(if gathered.reset { b",\"reset\":true}\n" } else { b",\"reset\":false}\n" });
    let mut answer = json(ctx, gzip, out);
    answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(answer)
}

async fn poll_once(tail: &mut Tail) -> Poll<Option<(TailEvent, Option<Cursor>)>> {
    std::future::poll_fn(|cx| Poll::Ready(tail.poll_next(cx))).await
}

#[cfg(test)]
mod tests {
    use nkv_node::Node;

    use super::*;

    #[test]
    fn a_long_poll_is_answered_before_a_proxy_gives_up_and_never_later_than_asked() {
        let wait = |text| wait(&Query::read(Some(text), &["wait"]).unwrap()).unwrap();
        for (text, expected) in [("wait=60s", 58_000), ("wait=10m", 58_000), ("wait=", 30_000), ("wait=400ms", 400)] {
            assert_eq!(wait(text), Some(Duration::from_millis(expected)), "{text}");
        }
        assert_eq!(wait(""), None);
    }

    #[tokio::test]
    async fn the_text_of_an_event_is_shared_by_those_that_are_given_the_same() {
        let node = Node::builder().start().await.unwrap();
        let nkv = node.handle();
        let tail = || nkv.tail(vec![Pattern::new("*").unwrap()], TailOptions::default().with_snapshot(false)).unwrap();
        let (mut one, mut other, mut late) = (tail(), tail(), tail());
        let mut recent = Recent::default();
        for reader in [&mut one, &mut other, &mut late] {
            assert!(matches!(reader.next().await, Some((TailEvent::Synced { .. }, _))));
        }
        for value in ["1", "2"] {
            nkv.put("a", value).await.unwrap();
            nkv.put("b", value).await.unwrap();
            let mut texts = Vec::new();
            for reader in [&mut one, &mut other] {
                for _ in 0..2 {
                    let (event, cursor) = reader.next().await.unwrap();
                    texts.push(recent.text(&event, cursor));
                }
            }
            let [a, b, of_a, of_b] = &texts[..] else { panic!("{texts:?}") };
            assert_eq!((a.as_ptr(), b.as_ptr()), (of_a.as_ptr(), of_b.as_ptr()));
            assert!(a.ends_with(b"\"skipped\":0}\n\n") && a != b, "{texts:?}");
        }
        // The same change, and one that was skipped before it.
        let (event, cursor) = late.next().await.unwrap();
        let text = recent.text(&event, cursor);
        assert!(text.ends_with(b"\"skipped\":1}\n\n"), "{text:?}");
        node.shutdown().await.unwrap();
    }
}
