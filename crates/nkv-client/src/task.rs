//! The task that owns the connection: it makes it again when it is lost, matches answers with requests and decides
//! what may be asked again.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicU8, Ordering::AcqRel};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use nkv_core::{Key, Pattern, Revision};
use nkv_protocol::{Body, Kind, Message, Reason, Request, status};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep};

use crate::error::{Error, ErrorKind, Result};
use crate::hub::{Hub, Local, Send};
use crate::link::{Link, LinkOptions};
use crate::types::{ConnectionState, Entry, GoneReason};

/// So many requests may be under way; more wait with their callers.
const PENDING_MAX: usize = 4_096;
/// So many requests are taken at a time.
const BATCH: usize = 256;
/// A connection that lasted this long ends a row of failures.
const HEALTHY: Duration = Duration::from_secs(10);

/// Why the connection is not there, for those whose patience ends meanwhile.
pub(crate) type Trouble = Arc<Mutex<Option<String>>>;

/// A request and who waits for its answer.
#[derive(Debug)]
pub(crate) struct Ask {
    pub(crate) request: Request<'static>,
    pub(crate) stage: Arc<Stage>,
    pub(crate) reply: oneshot::Sender<Result<Box<Body>>>,
}

/// Whether a request was given to be sent or given up, agreed between its caller and the task.
#[derive(Debug, Default)]
pub(crate) struct Stage(AtomicU8);

const QUEUED: u8 = 0;
const SENT: u8 = 1;
const GIVEN_UP: u8 = 2;

impl Stage {
    /// The caller waits no longer. True if it was sent: what becomes of it is not known.
    pub(crate) fn give_up(&self) -> bool {
        self.0.swap(GIVEN_UP, AcqRel) == SENT
    }

    fn change(&self, from: u8, to: u8) -> bool {
        self.0.compare_exchange(from, to, AcqRel, std::sync::atomic::Ordering::Acquire).is_ok()
    }
}

/// What is asked of the task besides requests.
#[derive(Debug)]
pub(crate) enum Control {
    Subscribe(Local),
    Unsubscribe(Pattern, u64),
    Close,
}

#[derive(Debug)]
struct Pending {
    id: u64,
    /// The number of its first byte on the connection.
    start: u64,
    what: What,
}

#[derive(Debug)]
enum What {
    Ask(Ask),
    Subscribe(String, u64),
    /// Its answer is of interest to nobody.
    Other,
}

/// Times of a connection's life.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    pub(crate) heartbeat: Duration,
    pub(crate) backoff_min: Duration,
    pub(crate) backoff_max: Duration,
}

pub(crate) struct Task {
    pub(crate) link_options: LinkOptions,
    pub(crate) pace: Pace,
    pub(crate) asks: mpsc::Receiver<Ask>,
    pub(crate) control: mpsc::UnboundedReceiver<Control>,
    pub(crate) state: watch::Sender<ConnectionState>,
    pub(crate) trouble: Trouble,
    pub(crate) hub: Hub,
    pending: VecDeque<Pending>,
    /// To be asked again, or for the first time, on the next connection.
    again: VecDeque<Ask>,
}

/// Why the task stops serving a connection.
enum Stop {
    /// Nobody needs it any more.
    Done,
    Lost(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Lost(error)
    }
}

impl Task {
    pub(crate) fn new(
        (link_options, pace): (LinkOptions, Pace),
        asks: mpsc::Receiver<Ask>,
        control: mpsc::UnboundedReceiver<Control>,
        state: watch::Sender<ConnectionState>,
        trouble: Trouble,
    ) -> Self {
        let (pending, again) = (VecDeque::new(), VecDeque::new());
        Task { link_options, pace, asks, control, state, trouble, hub: Hub::default(), pending, again }
    }

    pub(crate) async fn run(mut self, mut link: Link) {
        let mut failures = 0;
        loop {
            let since = Instant::now();
            self.attach(&mut link);
            match self.serve(&mut link).await {
                Stop::Done => break,
                Stop::Lost(error) => self.detach(&link, &error),
            }
            drop(link);
            if since.elapsed() >= HEALTHY {
                failures = 0;
            }
            match self.reconnect(&mut failures).await {
                Some(next) => link = next,
                None => break,
            }
        }
        self.state.send_replace(ConnectionState::Closed);
    }

    fn attach(&mut self, link: &mut Link) {
        self.set_trouble(None);
        tracing::debug!(addr = %self.link_options.addr, features = ?link.features, "connected");
        for send in self.hub.attach(&link.epoch) {
            self.send(link, send);
        }
        for ask in std::mem::take(&mut self.again) {
            self.ask(link, ask);
        }
        self.state.send_replace(ConnectionState::Connected);
    }

    /// Serves a connection until it is lost or nobody needs it.
    async fn serve(&mut self, link: &mut Link) -> Stop {
        let mut timer = pin!(sleep(self.pace.heartbeat));
        let mut asks = Vec::with_capacity(BATCH);
        loop {
            if let Err(error) = self.receive_all(link) {
                return Stop::Lost(error);
            }
            let (mut read, mut ticked) = (false, false);
            let woken = poll_fn(|cx| {
                while let Poll::Ready(control) = self.control.poll_recv(cx) {
                    match control {
                        None | Some(Control::Close) => return Poll::Ready(Err(Stop::Done)),
                        // At once: what is only remembered here is forgotten if the connection is found lost below.
                        Some(control) => {
                            if let Some(send) = self.control(control) {
                                self.send(link, send);
                            }
                        }
                    }
                }
                match link.poll_io(cx) {
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(Stop::Lost(Error::lost(error)))),
                    Poll::Ready(Ok(())) => read = true,
                    Poll::Pending => {}
                }
                if link.has_room() && self.pending.len() < PENDING_MAX {
                    // Closed means that no handle is left, which the other channel tells too.
                    _ = self.asks.poll_recv_many(cx, &mut asks, BATCH);
                }
                ticked = timer.as_mut().poll(cx).is_ready();
                if read || ticked || !asks.is_empty() { Poll::Ready(Ok(())) } else { Poll::Pending }
            });
            if let Err(stop) = woken.await {
                return stop;
            }
            for ask in asks.drain(..) {
                self.ask(link, ask);
            }
            if ticked {
                match self.beat(link) {
                    Ok(next) => timer.as_mut().reset(next),
                    Err(error) => return Stop::Lost(Error::lost(error)),
                }
            }
        }
    }

    /// Judges the silence of the server; says when to do so again.
    fn beat(&mut self, link: &mut Link) -> io::Result<Instant> {
        let (now, heartbeat) = (Instant::now(), self.pace.heartbeat);
        let silence = now - link.heard;
        if silence < heartbeat {
            return Ok(link.heard + heartbeat);
        }
        // Answers come in order, so it is the first that is due. Its caller may have more patience than we; that of the
        // next one does not count, or a program that keeps asking would never learn that nobody is there.
        let patient =
            matches!(self.pending.front(), Some(Pending { what: What::Ask(ask), .. }) if !ask.reply.is_closed());
        if self.pending.is_empty() {
            let (id, start) = link.push(&Request::new(Kind::Health, ""));
            self.pending.push_back(Pending { id, start, what: What::Other });
        } else if silence >= 2 * heartbeat && !patient {
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("nothing heard for {silence:?}")));
        }
        Ok(now + heartbeat)
    }

    /// Handles what is not a request; what is to be sent for it is returned.
    fn control(&mut self, control: Control) -> Option<Send> {
        match control {
            Control::Subscribe(local) => self.hub.add(local),
            Control::Unsubscribe(pattern, id) => self.hub.remove(&pattern, id),
            Control::Close => None,
        }
    }

    fn send(&mut self, link: &mut Link, send: Send) {
        let (request, what) = match send {
            Send::Subscribe(pattern, wire) => {
                let mut request = Request::new(Kind::Subscribe, pattern.clone());
                request.snapshot = true;
                (request, What::Subscribe(pattern, wire))
            }
            Send::Unsubscribe(pattern) => (Request::new(Kind::Unsubscribe, pattern), What::Other),
        };
        let (id, start) = link.push(&request);
        self.pending.push_back(Pending { id, start, what });
    }

    fn ask(&mut self, link: &mut Link, ask: Ask) {
        // A caller that dropped its future must not find its put done later.
        if ask.reply.is_closed() || !ask.stage.change(QUEUED, SENT) {
            return;
        }
        let (id, start) = link.push(&ask.request);
        self.pending.push_back(Pending { id, start, what: What::Ask(ask) });
    }

    fn receive_all(&mut self, link: &mut Link) -> Result<()> {
        while let Some(message) = link.next_message()? {
            self.receive(message)?;
        }
        Ok(())
    }

    fn receive(&mut self, message: Message) -> Result<()> {
        match message {
            Message::Hello => match self.pending.pop_front() {
                Some(Pending { what: What::Subscribe(pattern, wire), .. }) => self.hub.hello(pattern, wire)?,
                _ => return Err(Error::protocol("a 'Hello' that no subscription asked for")),
            },
            Message::Answer(body) => self.answer(body)?,
            Message::Update { key, value, revision, skipped, .. } => {
                let entry = Entry { key: peer_key(&key)?, value, revision: Revision::new(revision) };
                self.hub.update(&entry, skipped);
            }
            Message::Close { key, reason: reason @ (Reason::Deleted | Reason::Expired), revision, skipped, .. } => {
                let reason = if reason == Reason::Deleted { GoneReason::Deleted } else { GoneReason::Expired };
                self.hub.gone(&peer_key(&key)?, Revision::new(revision), reason, skipped);
            }
            Message::Close { key, reason, .. } => self.hub.ended(&key, reason),
            Message::Reset { key, .. } => self.hub.reset(key)?,
            Message::Synced { revision, .. } => self.hub.synced(Revision::new(revision))?,
            _ => return Err(Error::protocol("a message that this client does not know")),
        }
        Ok(())
    }

    fn answer(&mut self, body: Box<Body>) -> Result<()> {
        if self.pending.front().is_none_or(|pending| body.id.parse() != Ok(pending.id)) {
            // What a server says before it closes a connection that it is tired of.
            return Err(match body.status {
                status::OK => Error::protocol("an answer that nobody asked for"),
                _ => Error::from_answer(&body),
            });
        }
        match self.pending.pop_front().map_or(What::Other, |pending| pending.what) {
            // The caller may have gone; then the answer is of interest to nobody.
            What::Ask(ask) => drop(ask.reply.send(Ok(body))),
            What::Subscribe(pattern, wire) => match body.status {
                status::OK => return Err(Error::protocol("an answer other than 'Hello' to a subscription")),
                // It is going away: another connection may have more luck.
                status::UNAVAILABLE => return Err(Error::from_answer(&body)),
                status => self.hub.refused(&pattern, wire, status, &body.message),
            },
            What::Other => {}
        }
        Ok(())
    }

    /// Decides what becomes of requests under way on a connection that is lost.
    fn detach(&mut self, link: &Link, error: &Error) {
        let why = format!("{error:#}");
        tracing::info!(addr = %self.link_options.addr, error = why, "connection lost");
        for Pending { start, what, .. } in std::mem::take(&mut self.pending) {
            let What::Ask(ask) = what else { continue };
            let sent = link.has_sent(start);
            let failure = if sent && ask.is_write() {
                let message = "the connection was lost before the answer came: it may or may not have been done";
                Error::new(ErrorKind::OutcomeUnknown, message).because(why.clone())
            } else if sent && *error.kind() == ErrorKind::Protocol {
                // Asked again, it would end the next connection too.
                Error::protocol(why.clone())
            } else {
                if ask.stage.change(SENT, QUEUED) {
                    self.again.push_back(ask);
                }
                continue;
            };
            // The caller may have gone; then there is nobody to tell.
            drop(ask.reply.send(Err(failure)));
        }
        self.set_trouble(Some(why));
        self.hub.detach();
        self.state.send_replace(ConnectionState::Reconnecting);
    }

    /// Tries until a connection is there; `None` when nobody needs it any more.
    async fn reconnect(&mut self, failures: &mut u32) -> Option<Link> {
        loop {
            let pause = self.pause(*failures);
            *failures = failures.saturating_add(1);
            self.meanwhile(sleep(pause)).await?;
            let options = self.link_options.clone();
            match self.meanwhile(Link::open(&options)).await? {
                Ok(link) => return Some(link),
                Err(error) => {
                    tracing::debug!(error = format!("{error:#}"), "reconnect failed");
                    self.set_trouble(Some(format!("{error:#}")));
                }
            }
            self.again.retain(|ask| !ask.reply.is_closed());
        }
    }

    /// Awaits while subscriptions come and go; `None` when nobody needs the connection any more.
    async fn meanwhile<T>(&mut self, work: impl Future<Output = T>) -> Option<T> {
        let mut work = pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Some(done),
                control = self.control.recv() => match control {
                    None | Some(Control::Close) => return None,
                    Some(control) => drop(self.control(control)),
                },
            }
        }
    }

    /// How long to wait before the next attempt: a random part of a span that doubles, so that the clients of a server
    /// that comes back do not come all at once.
    fn pause(&self, failures: u32) -> Duration {
        let span = self.pace.backoff_min.saturating_mul(1 << failures.min(16)).min(self.pace.backoff_max);
        // Without randomness they do come at once, which is no reason not to come.
        let part = getrandom::u32().unwrap_or(u32::MAX);
        span.mul_f64(f64::from(part) / f64::from(u32::MAX))
    }

    fn set_trouble(&self, trouble: Option<String>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }
}

impl Ask {
    fn is_write(&self) -> bool {
        matches!(self.request.kind, Kind::Put | Kind::Delete)
    }
}

fn peer_key(text: &str) -> Result<Key> {
    Key::new(text).map_err(|error| Error::protocol(format!("the server names an impossible key: {error}")))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, DuplexStream, duplex};

    use super::*;
    use crate::addr::Addr;
    use crate::hub::Told;

    const HEARTBEAT: Duration = Duration::from_secs(10);

    struct Rig {
        task: Task,
        link: Link,
        far: DuplexStream,
        control: mpsc::UnboundedSender<Control>,
        _asks: mpsc::Sender<Ask>,
    }

    /// A task with a connection that holds so many bytes before the far end must take some.
    fn rig(buffer_len: usize) -> Rig {
        let (near, far) = duplex(buffer_len);
        let (asks, asks_rx) = mpsc::channel(1);
        let (control, control_rx) = mpsc::unbounded_channel();
        let state = watch::Sender::new(ConnectionState::Connected);
        let link_options = LinkOptions {
            addr: Addr::default(),
            client_uuid: "test".into(),
            token: None,
            connect_timeout: HEARTBEAT,
            message_len_max: 1 << 20,
        };
        let pace = Pace { heartbeat: HEARTBEAT, backoff_min: HEARTBEAT, backoff_max: HEARTBEAT };
        let task = Task::new((link_options, pace), asks_rx, control_rx, state, Trouble::default());
        Rig { task, link: Link::over(Box::new(near), 1 << 20), far, control, _asks: asks }
    }

    fn local(id: u64) -> Local {
        let (queue, told) = (Arc::default(), Told::default());
        let pattern = Pattern::new("a").unwrap();
        Local { id, pattern, exact: false, queue, ready: None, told, len_max: usize::MAX }
    }

    /// A put under way, and where its answer comes.
    fn put(rig: &mut Rig, len: usize) -> oneshot::Receiver<Result<Box<Body>>> {
        let mut request = Request::new(Kind::Put, "a");
        request.value = Some(vec![b'x'; len].into());
        let (reply, answer) = oneshot::channel();
        rig.task.ask(&mut rig.link, Ask { request, stage: Arc::default(), reply });
        answer
    }

    async fn lost(rig: &mut Rig) {
        assert!(matches!(rig.task.serve(&mut rig.link).await, Stop::Lost(_)));
    }

    // Commands that were received in the poll that found the connection lost were dropped: a subscribe failed as
    // 'closed', and what was unsubscribed came back with each connection.
    #[tokio::test]
    async fn what_is_subscribed_or_unsubscribed_as_the_connection_breaks_is_not_forgotten() {
        for (command, after) in [
            (Control::Subscribe(local(1)), vec![Send::Subscribe("a".into(), 1)]),
            (Control::Unsubscribe(Pattern::new("a").unwrap(), 0), vec![]),
        ] {
            let mut rig = rig(1 << 16);
            if matches!(command, Control::Unsubscribe(..)) {
                rig.task.hub.add(local(0));
            }
            rig.control.send(command).unwrap();
            drop(std::mem::replace(&mut rig.far, duplex(1).0));
            lost(&mut rig).await;
            assert_eq!(rig.task.hub.attach("e"), after);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_server_is_given_up_after_two_heartbeats() {
        let mut rig = rig(1 << 16);
        let started = Instant::now();
        lost(&mut rig).await;
        assert_eq!(started.elapsed(), 2 * HEARTBEAT);
    }

    // Only what was read counted as life: a request that took longer to send than two heartbeats was cut.
    #[tokio::test(start_paused = true)]
    async fn a_server_that_takes_a_long_request_bit_by_bit_is_alive() {
        let mut rig = rig(1_000);
        let answer = put(&mut rig, 10_000);
        drop(answer);
        let (mut far, started) = (std::mem::replace(&mut rig.far, duplex(1).0), Instant::now());
        let taken = async {
            for _ in 0..9 {
                sleep(HEARTBEAT).await;
                far.read_exact(&mut [0; 1_000]).await.unwrap();
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = lost(&mut rig) => assert_eq!(started.elapsed(), 11 * HEARTBEAT, "two after the last bytes were taken"),
            () = taken => {}
        }
    }

    // A flush that took longer than two heartbeats was cut, whatever the request's own limit.
    #[tokio::test(start_paused = true)]
    async fn the_caller_of_the_request_that_is_due_has_its_own_patience() {
        let mut rig = rig(1 << 16);
        let (first, _second) = (put(&mut rig, 1), put(&mut rig, 1));
        tokio::select! {
            () = lost(&mut rig) => panic!("given up while its caller waits"),
            () = sleep(5 * HEARTBEAT) => {}
        }
        drop(first);
        let started = Instant::now();
        lost(&mut rig).await;
        assert!(started.elapsed() <= HEARTBEAT, "the second is not due: it excuses nothing");
    }
}
