//! The feed: the state or what changed since, then each change as the watch brings it.

use std::collections::HashSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use nkv_core::{Change, Key, PersistErrorKind, Reason, Revision};
use nkv_node::{EngineError, Feed, Seen};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::engine::{At, Inner, Known, Published};
use crate::fault;
use crate::fetch::{State, delete, number, own, put, revision};
use crate::names::Name;
use crate::rpc::event::EventType;
use crate::rpc::watch_request::RequestUnion;
use crate::rpc::{
    Event, KeyValue, RangeRequest, TxnRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse,
};
use crate::session::{Session, revoke};
use crate::write;

/// How often etcd is asked how far it is: a sign of life.
const TICK: Duration = Duration::from_millis(500);
/// Without a sign of life for so long, etcd is away.
const SILENCE: Duration = Duration::from_secs(2);
/// Before the watch has caught up it may have nothing to say for longer.
const SILENCE_AT_START: Duration = Duration::from_secs(60);
/// A node that is so long behind the revision of an etcd that says it without order asks for it in order.
const BEHIND: Duration = Duration::from_secs(60);
const FENCE_PAUSE: Duration = Duration::from_millis(100);
/// At most this number of answers, or of bytes of values and one more answer, are applied as one batch.
const JOINED_MAX: usize = 256;
const JOINED_LEN_MAX: usize = 4 << 20;
/// From this revision on a history of which nothing was compacted is worth a warning.
const HISTORY_MAX: i64 = 10_000;
const HISTORY_PAUSE: Duration = Duration::from_secs(3_600);

/// Follows, for as long as it goes well.
pub(crate) async fn follow(etcd: &Inner, seen: Option<Seen>, feed: &Feed) -> Result<Infallible, EngineError> {
    let session = Arc::new(etcd.open().await?);
    let resumed = match seen {
        Some(seen) => resume(etcd, &session, seen).await?,
        None => None,
    };
    let at = match resumed {
        Some(at) => at,
        None => fetch(etcd, &session, seen, feed).await?,
    };
    let mut following = Following::new(etcd, session, feed, at, resumed.is_some());
    let mut watch = following.watch().await?;
    following.run(&mut watch).await
}

/// The revision from which the watch may go on; `None` where the whole state is needed.
async fn resume(etcd: &Inner, session: &Session, seen: Seen) -> Result<Option<i64>, EngineError> {
    let at = etcd.known().at.clone().filter(|at| at.seen == seen);
    let Some(at) = at.filter(|_| session.epoch == seen.epoch) else { return Ok(None) };
    let start = number(seen.revision);
    let mut is_other =
        session.revision < start || session.raft_term < at.raft_term || session.raft_index < at.raft_index;
    if !is_other {
        match session.read_at(at.last.0.clone(), start).await {
            Ok(found) => is_other = found != at.last.1,
            Err(status) if fault::is_compacted(&status) => return Ok(None),
            Err(status) if fault::is_future(&status) => is_other = true,
            Err(status) => return Err(fault::of_request(&status)),
        }
    }
    if is_other { Err(begin_anew(etcd, session).await) } else { Ok(Some(start)) }
}

/// Gives the node the whole state.
async fn fetch(etcd: &Inner, session: &Session, seen: Option<Seen>, feed: &Feed) -> Result<i64, EngineError> {
    let state = etcd.fetch(session).await?;
    let before = seen.filter(|seen| seen.epoch == session.epoch);
    if before.is_some_and(|before| state.revision < number(before.revision)) {
        return Err(begin_anew(etcd, session).await);
    }
    let State { revision: at, changes, leases, large, foreign, last } = state;
    {
        let mut known = etcd.known();
        known.replace_leases(leases);
        (known.large, known.at) = (large, None);
    }
    match feed.replace(changes, revision(at), session.epoch).await {
        Ok(_) => {}
        Err(EngineError::Feed(error)) if error.kind() == PersistErrorKind::Rejected && before.is_some() => {
            return Err(begin_anew(etcd, session).await);
        }
        Err(error) => return Err(error),
    }
    etcd.note_foreign(foreign);
    let last = (last.key.clone(), Some(last));
    etcd.known().at = Some(at_of(session, Seen { epoch: session.epoch, revision: revision(at) }, last));
    Ok(at)
}

/// etcd does not go on from where this node saw it: other nodes must not take the one for the other either.
async fn begin_anew(etcd: &Inner, session: &Session) -> EngineError {
    tracing::warn!(target: "nkv::engine", "etcd went back behind what this node has seen: a new epoch begins");
    match session.write_generation(&etcd.names, Some(session.generation.clone())).await {
        Ok(()) => EngineError::Unavailable("etcd went back behind what this node has seen: a new epoch begins".into()),
        Err(error) => error,
    }
}

fn at_of(session: &Session, seen: Seen, last: (Bytes, Option<KeyValue>)) -> At {
    At { seen, raft_term: session.raft_term, raft_index: session.raft_index, last }
}

/// A history that grows for ever fills etcd in the end: warns of one that is whole, once.
async fn warn_of_history(session: Arc<Session>, key: Bytes, revision: i64, is_warned: Arc<AtomicBool>) {
    if session.read_at(key, 1).await.is_ok() && !is_warned.swap(true, Relaxed) {
        tracing::warn!(
            target: "nkv::engine",
            "etcd has kept all of its {revision} revisions: unless it compacts them it will be full (--auto-compaction-retention)"
        );
    }
}

/// What else is under way.
enum Job {
    /// A plain request was answered, or not.
    Pong(bool),
    /// A fence was written, or not.
    Fence(Result<(), EngineError>),
    /// Whether anything was compacted was looked at.
    History,
}

/// What events come to.
#[derive(Default)]
struct Translated {
    changes: Vec<Change>,
    /// Leases of this node that no value has any more.
    replaced: Vec<i64>,
    /// How many keys nkv cannot show.
    foreign: u64,
    /// Another generation of nkv's data begins.
    is_other: bool,
}

struct Watch {
    requests: mpsc::Sender<WatchRequest>,
    answers: Streaming<WatchResponse>,
}

struct Following<'a> {
    etcd: &'a Inner,
    session: Arc<Session>,
    feed: &'a Feed,
    /// Up to where the node has seen changes.
    at: i64,
    /// Where it has to be to have seen all that there was at the beginning.
    target: i64,
    /// Where it began, if without the whole state.
    resumed_at: Option<i64>,
    published: Option<Published<'a>>,
    /// What was heard, and the node does not have yet.
    ready: Vec<Event>,
    /// Bytes of the values in it.
    ready_len: usize,
    /// A revision up to which there is no other event than those in `ready`.
    complete: i64,
    /// The highest revision that etcd has reported, in any order.
    reported: i64,
    behind_since: Option<Instant>,
    fenced: Option<Instant>,
    history_seen: Option<Instant>,
    heard: Instant,
    heard_watch: Instant,
    jobs: JoinSet<Job>,
}

impl<'a> Following<'a> {
    fn new(etcd: &'a Inner, session: Arc<Session>, feed: &'a Feed, at: i64, is_resumed: bool) -> Self {
        let now = Instant::now();
        Following {
            etcd,
            feed,
            at,
            target: session.revision,
            resumed_at: is_resumed.then_some(at),
            session,
            published: None,
            ready: Vec::new(),
            ready_len: 0,
            complete: at,
            reported: at,
            behind_since: None,
            fenced: None,
            history_seen: None,
            heard: now,
            heard_watch: now,
            jobs: JoinSet::new(),
        }
    }

    async fn watch(&self) -> Result<Watch, EngineError> {
        let (requests, stream) = mpsc::channel(4);
        let range = self.etcd.names.all();
        // Not in fragments: etcd cuts many small events in quadratic time. What is too long for one message is fetched.
        let request = WatchCreateRequest {
            key: range.from.into(),
            range_end: range.to.into(),
            start_revision: self.at.saturating_add(1),
            progress_notify: true,
        };
        let opening = async {
            let request = WatchRequest { request_union: Some(RequestUnion::CreateRequest(request)) };
            requests.send(request).await.map_err(|_| unavailable("the watch ended"))?;
            let mut client = self.session.watch();
            let opened = client.watch(ReceiverStream::new(stream)).await;
            opened.map_err(|status| fault::of_request(&status)).map(tonic::Response::into_inner)
        };
        let opened = timeout(SILENCE, opening).await;
        let answers = opened.map_err(|_| unavailable("the watch was not opened in time"))??;
        Ok(Watch { requests, answers })
    }

    async fn run(&mut self, watch: &mut Watch) -> Result<Infallible, EngineError> {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut is_created = false;
        loop {
            if is_created && self.published.is_none() {
                self.reach().await?;
            }
            let silent_at = self.silent_at();
            tokio::select! {
                biased;
                () = self.session.kicked.notified() => return Err(unavailable("the data of this prefix begin anew")),
                answer = watch.answers.message() => {
                    is_created |= self.hear(answer, watch).await?;
                    (self.heard, self.heard_watch) = (Instant::now(), Instant::now());
                }
                Some(job) = self.jobs.join_next(), if !self.jobs.is_empty() => self.end(job.ok())?,
                () = self.etcd.wanted.notified() => self.ask(watch, true),
                () = sleep_until(silent_at) => return Err(self.silent()),
                _ = ticks.tick() => self.tick(watch),
            }
        }
    }

    /// Takes an answer, and those that have come behind it. Whether one says that the watch was created.
    async fn hear(
        &mut self,
        first: Result<Option<WatchResponse>, Status>,
        watch: &mut Watch,
    ) -> Result<bool, EngineError> {
        let (mut answer, mut is_created) = (first, false);
        let mut count = 0_usize;
        let ended = loop {
            match answer {
                Ok(Some(answer)) => match self.take(answer) {
                    Ok(creates) => is_created |= creates,
                    Err(error) => break Some(error),
                },
                Ok(None) => break Some(unavailable("the watch ended")),
                Err(status) => {
                    if fault::is_too_long(&status) {
                        // It would come again.
                        self.etcd.known().at = None;
                    }
                    break Some(fault::of_request(&status));
                }
            }
            count = count.saturating_add(1);
            if count >= JOINED_MAX || self.ready_len >= JOINED_LEN_MAX {
                break None;
            }
            match watch.answers.message().now_or_never() {
                Some(next) => answer = next,
                None => break None,
            }
        };
        self.apply().await?;
        ended.map_or(Ok(is_created), Err)
    }

    /// Whether it says that the watch was created.
    fn take(&mut self, answer: WatchResponse) -> Result<bool, EngineError> {
        let header = answer.header.unwrap_or_default();
        if header.cluster_id != self.session.cluster_id {
            return Err(unavailable("another etcd answers"));
        }
        if answer.canceled {
            if answer.compact_revision > 0 {
                self.etcd.known().at = None;
                return Err(unavailable("etcd has compacted what was missed: the whole state is needed"));
            }
            return Err(EngineError::Unavailable(format!("etcd has ended the watch: {}", answer.cancel_reason)));
        }
        self.reported = self.reported.max(header.revision);
        if answer.created {
            return Ok(true);
        }
        if answer.events.is_empty() {
            // Of itself it says so in order.
            if answer.watch_id >= 0 || self.session.tells_progress {
                self.complete = self.complete.max(header.revision);
            }
        }
        let len = answer.events.iter().filter_map(|event| event.kv.as_ref()).map(|kv| kv.value.len()).sum();
        self.ready_len = self.ready_len.saturating_add(len);
        self.ready.extend(answer.events);
        Ok(false)
    }

    /// Has the node have what was heard.
    async fn apply(&mut self) -> Result<(), EngineError> {
        let events = std::mem::take(&mut self.ready);
        self.ready_len = 0;
        if events.iter().any(|event| at(event) <= self.at) {
            self.etcd.known().at = None;
            return Err(unavailable("etcd reported a change too late: the whole state is needed"));
        }
        let last = events.iter().rev().find_map(|event| event.kv.clone().map(|kv| (event.r#type, kv)));
        let Translated { changes, replaced, foreign, is_other } = self.translate(&events);
        revoke(&self.session, replaced);
        self.etcd.note_foreign(foreign);
        let end = last.as_ref().map_or(self.at, |(_, kv)| kv.mod_revision).max(self.complete);
        if end > self.at {
            let last_change = changes.last().map_or(Revision::ZERO, |change: &Change| change.revision);
            if !changes.is_empty() {
                self.feed.apply(changes).await?;
            }
            if last_change < revision(end) {
                self.feed.pass(revision(end)).await?;
            }
            self.note(end, last);
        }
        if self.at >= self.reported {
            self.behind_since = None;
        }
        if is_other {
            return Err(unavailable("the data of this prefix begin anew"));
        }
        Ok(())
    }

    /// The node is at this revision now.
    fn note(&mut self, end: i64, last: Option<(i32, KeyValue)>) {
        self.at = end;
        let mut known = self.etcd.known();
        let Some(point) = &mut known.at else { return };
        point.seen.revision = revision(end);
        if let Some((kind, kv)) = last {
            let kv = own(kv);
            point.last = (kv.key.clone(), (kind == i32::from(EventType::Put)).then_some(kv));
        }
    }

    /// What events change for the node.
    fn translate(&self, events: &[Event]) -> Translated {
        let mut translated = Translated { changes: Vec::with_capacity(events.len()), ..Translated::default() };
        let mut known = self.etcd.known();
        for of_one_revision in events.chunk_by(|a, b| at(a) == at(b)) {
            self.translate_one(of_one_revision, &mut known, &mut translated);
        }
        translated
    }

    /// What the events of one revision change.
    fn translate_one(&self, events: &[Event], known: &mut Known, translated: &mut Translated) {
        let Translated { changes, replaced, foreign, .. } = translated;
        let events = || events.iter().filter_map(|event| event.kv.as_ref().map(|kv| (event.r#type, kv)));
        let is_put = |kind: i32| kind == i32::from(EventType::Put);
        let mut ended = HashSet::<Key>::new();
        let names: Vec<(i32, &KeyValue, Name)> =
            events().map(|(kind, kv)| (kind, kv, self.etcd.names.parse(&kv.key))).collect();
        for (kind, kv, name) in &names {
            if let Name::Lease(key) = name {
                if is_put(*kind) {
                    replaced.extend(known.note_lease(key.clone(), kv.lease));
                } else {
                    known.end_lease(key);
                    ended.insert(key.clone());
                }
            }
        }
        let is_other =
            names.iter().any(|(_, kv, name)| *name == Name::Generation && kv.value != self.session.generation);
        for (kind, kv, name) in names {
            match name {
                Name::Value(key) if is_put(kind) && kv.value.len() > self.etcd.options.value_len_max => {
                    *foreign = foreign.saturating_add(1);
                    known.large.insert(key.clone());
                    replaced.extend(known.end_value(&key, kv.lease));
                    changes.push(delete(key, kv.mod_revision, Reason::Deleted));
                }
                Name::Value(key) => {
                    known.large.remove(&key);
                    replaced.extend(known.end_value(&key, kv.lease));
                    if is_put(kind) {
                        changes.push(put(key, kv, known));
                    } else {
                        // A delete of everything takes the records with it.
                        let is_end = !is_other && ended.contains(&key);
                        let reason = if is_end { Reason::Expired } else { Reason::Deleted };
                        changes.push(delete(key, kv.mod_revision, reason));
                    }
                }
                Name::Foreign => *foreign = foreign.saturating_add(1),
                Name::Lease(_) | Name::Generation | Name::Own => {}
            }
        }
        translated.is_other |= is_other;
    }

    /// Has the node take writes, if it has seen all that there was.
    async fn reach(&mut self) -> Result<(), EngineError> {
        if self.at < self.target {
            return Ok(());
        }
        if let Some(start) = self.resumed_at.take() {
            // A delete at the very revision up to which etcd compacts is not delivered: what was missed must still be there.
            let still = self.session.read_at(self.etcd.names.generation().into(), start).await;
            if let Err(status) = still {
                self.etcd.known().at = None;
                return Err(fault::of_request(&status));
            }
        }
        self.published = Some(self.etcd.publish(Arc::clone(&self.session)));
        self.feed.reached();
        Ok(())
    }

    /// When it counts as away unless something is heard.
    fn silent_at(&self) -> Instant {
        let after = |at: Instant, patience| at.checked_add(patience).unwrap_or(at);
        after(self.heard, SILENCE).min(after(self.heard_watch, self.patience()))
    }

    /// For how long the watch may have nothing to say.
    fn patience(&self) -> Duration {
        if self.published.is_some() { SILENCE } else { SILENCE_AT_START }
    }

    fn silent(&self) -> EngineError {
        let message = if self.heard.elapsed() >= SILENCE {
            format!("etcd gave no sign of life for {SILENCE:?}")
        } else {
            format!("the watch of etcd had nothing to say for {:?}", self.patience())
        };
        EngineError::Unavailable(message)
    }

    fn tick(&mut self, watch: &Watch) {
        if self.at < self.reported {
            self.behind_since.get_or_insert_with(Instant::now);
        }
        let is_long_behind = self.behind_since.is_some_and(|since| since.elapsed() > BEHIND);
        self.ask(watch, is_long_behind || self.at < self.target);
        let is_warned = &self.etcd.warned_of_history;
        let is_due = self.history_seen.is_none_or(|at| at.elapsed() > HISTORY_PAUSE);
        if self.reported > HISTORY_MAX && is_due && !is_warned.load(Relaxed) {
            self.history_seen = Some(Instant::now());
            let key = self.etcd.names.generation().into();
            let warned = warn_of_history(Arc::clone(&self.session), key, self.reported, Arc::clone(is_warned));
            self.jobs.spawn(warned.map(|()| Job::History));
        }
        if self.published.is_none() && self.jobs.is_empty() {
            let (session, key) = (Arc::clone(&self.session), Bytes::from(self.etcd.names.generation()));
            self.jobs.spawn(async move {
                let request = RangeRequest { key, serializable: true, keys_only: true, ..RangeRequest::default() };
                Job::Pong(timeout(SILENCE, session.range(request)).await.is_ok_and(|read| read.is_ok()))
            });
        }
    }

    /// Asks etcd how far it is. Where the answer says nothing about the events before it, a write of our own that comes by
    /// the watch does: if it is wanted at once.
    fn ask(&mut self, watch: &Watch, at_once: bool) {
        let request = WatchRequest { request_union: Some(RequestUnion::ProgressRequest(WatchProgressRequest {})) };
        // Those before it were not even taken.
        drop(watch.requests.try_send(request));
        let is_due = self.fenced.is_none_or(|at| at.elapsed() > FENCE_PAUSE);
        if !at_once || self.session.tells_progress || !is_due {
            return;
        }
        self.fenced = Some(Instant::now());
        let session = Arc::clone(&self.session);
        let names = &self.etcd.names;
        let compare = vec![write::value_is(names.generation().into(), session.generation.clone())];
        let success = vec![write::put(names.fence().into(), Bytes::new(), 0)];
        self.jobs.spawn(async move {
            let written = session.txn(&TxnRequest { compare, success, failure: Vec::new() }).await;
            Job::Fence(written.map(drop).map_err(|status| fault::of_write(&status)))
        });
    }

    fn end(&mut self, job: Option<Job>) -> Result<(), EngineError> {
        match job {
            Some(Job::Pong(true) | Job::Fence(Ok(()))) => self.heard = Instant::now(),
            Some(Job::Fence(Err(error))) if self.published.is_none() => {
                // The whole state needs none.
                self.etcd.known().at = None;
                return Err(error);
            }
            _ => {}
        }
        Ok(())
    }
}

fn at(event: &Event) -> i64 {
    event.kv.as_ref().map_or(0, |kv| kv.mod_revision)
}

fn unavailable(text: &str) -> EngineError {
    EngineError::Unavailable(text.into())
}
