//! What each request does, and how its answer reads.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use nkv_core::{
    Epoch, Failed, Key, KeyError, Op, Outcome, Pattern, PersistErrorKind, PutOptions, Revision, SubscriberId, ValueRef,
};
use nkv_node::{
    Admitted, AttachOptions, Attached, Cursor, Error, ErrorKind, Handle, Leave, NotDone, Peer, PeerInfo, Results, Room,
    Seen, Stopping, Written,
};
use nkv_notify_tcp::{Outbox, TcpNotifier, spare};
use nkv_protocol::{
    Answer, BaseFields, Chunks, ClientFields, Features, GetEntry, Id, Kind, Refusal, Request, ServerFields,
    SubscriberFields, ValueForm, status,
};

use crate::holder::Connected;
use crate::inner::Inner;
use crate::options::millis;
use crate::reading::{ANSWER_LEN_MAX, Reading, Unread};

/// The version of this server.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What this server offers beyond the first version of the protocol.
const FEATURES: Features =
    Features::RESET.with(Features::AHEAD).with(Features::EXACT).with(Features::NAMES).with(Features::ALIVE);

/// Keys in a `List` when it does not say, and at most.
const LIST_LIMIT: u64 = 1_000;
const LIST_LIMIT_MAX: u64 = 10_000;

/// The entries of a `Get` that finds none.
const NOTHING: &[GetEntry<'_>] = &[];

/// What a row of `Trace` takes beside its texts, at most.
const ROW_LEN: usize = 256;

/// The number of bytes for the ids of writes that are kept from one batch to the next.
const IDS_LEN_KEPT: usize = 512;

/// The number of writes, and of bytes of their keys and ids, that are gathered at most while others of the connection are
/// under way: the next one is read when these are done.
const GATHERED_MAX: usize = 1_024;
const GATHERED_LEN_MAX: usize = 64 << 10;

/// What a connection is about: its names, what it subscribed to, what is under way.
pub(crate) struct Session {
    door: Arc<Inner>,
    notifier: TcpNotifier,
    pub(crate) peer: Peer,
    /// What the client knows as the epoch of the data, if that may change.
    epoch: Option<Epoch>,
    /// Whether the node has what the client has seen, once it is known.
    level: Option<Arc<OnceLock<nkv_node::Result<bool>>>>,
    subscriptions: HashMap<(SubscriberId, Pattern), Attached>,
    /// Writes that were read and are not under way yet, the room that was had for their values, and how much of it these
    /// take.
    writes: Vec<Admitted>,
    room: Option<Room>,
    room_taken: usize,
    write_ids: WriteIds,
    /// Writes that are under way.
    written: Option<Written>,
    written_ids: WriteIds,
    /// A read that takes several turns.
    reading: Option<Box<Reading>>,
}

/// The ids of some writes.
#[derive(Default)]
struct WriteIds {
    /// As JSON, one behind the other.
    json: String,
    /// Where each ends.
    ends: Vec<usize>,
    /// How many bytes the keys of these writes have.
    keys_len: usize,
}

impl WriteIds {
    fn push(&mut self, request: &Request<'_>) {
        self.json.push_str(request.id.as_json());
        self.ends.push(self.json.len());
        self.keys_len = self.keys_len.saturating_add(request.key.len());
    }

    fn is_full(&self) -> bool {
        self.ends.len() >= GATHERED_MAX || self.json.len().saturating_add(self.keys_len) > GATHERED_LEN_MAX
    }

    /// Gives each id in turn and forgets all.
    fn drain(&mut self, mut each: impl FnMut(Id<'_>)) {
        let mut start = 0;
        for end in self.ends.drain(..) {
            each(Id::from_json(self.json.get(std::mem::replace(&mut start, end)..end).unwrap_or_default()));
        }
        self.keys_len = 0;
        self.json.clear();
        self.json.shrink_to(IDS_LEN_KEPT);
        self.ends.shrink_to(IDS_LEN_KEPT / 8);
    }
}

/// What a request has to wait for.
pub(crate) enum Hold {
    /// The writes that are under way. Once they are answered it is looked at again: others may have been gathered.
    Writes,
    /// Room for a value, to be stored.
    Room(Pin<Box<dyn Future<Output = Result<Room, Stopping>> + Send>>),
    /// Room for a long request, to be read.
    Arrival(Pin<Box<dyn Future<Output = Result<Room, Stopping>> + Send>>),
    /// The read before it, whose answer comes first.
    Reading(Box<Reading>),
    /// The same, which waits until it may go on.
    Leave(Box<Reading>, Pin<Box<dyn Future<Output = Option<Leave>> + Send>>),
    /// The turns of others, and room.
    Turns(Pin<Box<dyn Future<Output = ()> + Send>>),
}

impl Session {
    pub(crate) fn new(door: Arc<Inner>, notifier: TcpNotifier, peer: &str) -> Self {
        Session {
            peer: door.handle.peer(peer, Box::new(Connected(notifier.clone()))),
            epoch: None,
            level: None,
            door,
            notifier,
            subscriptions: HashMap::new(),
            writes: Vec::new(),
            room: None,
            room_taken: 0,
            reading: None,
            write_ids: WriteIds::default(),
            written: None,
            written_ids: WriteIds::default(),
        }
    }

    /// Serves a request, or answers what cannot be served; a write is noted, to be done with others that come right behind
    /// it. `Err` if it has to wait: nothing was done, and it is to be served again, `is_admitted` if others had their turn.
    pub(crate) fn serve(
        &mut self,
        item: Result<Request<'_>, Refusal<'_>>,
        is_admitted: bool,
        outbox: &mut Outbox,
        out: &mut Chunks,
    ) -> Result<(), Hold> {
        let room_taken = self.room_taken;
        let served = match item {
            Ok(request) if matches!(request.kind, Kind::Put | Kind::Delete) => {
                // Before the value is copied.
                self.admit(request.value.as_deref().map_or(0, <[u8]>::len))?;
                self.write_op(&request).map(|op| {
                    self.writes.push(op);
                    self.write_ids.push(&request);
                    None
                })
            }
            item => item.map(Some),
        };
        let is_ahead = match &served {
            Ok(None) => return Ok(()),
            Ok(Some(request)) => self.is_ahead(request),
            Err(_) => false,
        };
        if !is_ahead && self.has_writes() {
            // A write that is refused has taken some.
            self.room_taken = room_taken;
            self.give_room_back();
            return Err(Hold::Writes);
        }
        let served = match served {
            Ok(Some(request)) if is_long(&request) && !is_admitted => return Err(self.turns()),
            Ok(Some(Request { kind: Kind::Connect, seen: Some(seen), .. }))
                if !is_admitted && self.door.handle.follows_engine() =>
            {
                return Err(self.catch_up(&seen));
            }
            Ok(Some(_)) if self.door.handle.budget().is_over() && !is_admitted => return Err(self.relief()),
            Ok(Some(request)) => self.read(&request, outbox, out),
            Ok(None) => Ok(()),
            Err(refusal) => Err(refusal),
        };
        if let Err(refusal) = served {
            refuse(out, refusal);
        }
        Ok(())
    }

    /// Whether the data are of another epoch than the client knows: what it asks for says nothing about them.
    pub(crate) fn is_of_another_epoch(&self) -> bool {
        self.epoch.is_some_and(|epoch| epoch != self.door.handle.epoch())
    }

    /// Whether a request is served before the writes that came before it on its connection: it asks for that, and is
    /// neither a write nor about the connection itself. An `Unsubscribe` may, too: or all behind it would wait.
    pub(crate) fn is_ahead(&self, request: &Request<'_>) -> bool {
        let has_its_turn = matches!(request.kind, Kind::Put | Kind::Delete | Kind::Connect);
        request.ahead && self.goes_ahead() && !has_its_turn
    }

    /// Whether the client understands that answers come out of order: requests are read while writes are under way.
    pub(crate) fn goes_ahead(&self) -> bool {
        self.notifier.features().contains(Features::AHEAD)
    }

    /// Whether the client is to get a sign of life while its requests are kept waiting.
    pub(crate) fn wants_signs(&self) -> bool {
        self.notifier.features().contains(Features::ALIVE)
    }

    /// Whether the client is to be notified when the node is stale, and when it is so no more.
    pub(crate) fn wants_stale(&self) -> bool {
        self.notifier.features().contains(Features::STALE) && self.door.handle.follows_engine()
    }

    /// Takes room for the value of another write, or says what it has to wait for.
    fn admit(&mut self, len: usize) -> Result<(), Hold> {
        if self.written.is_some() && self.write_ids.is_full() {
            return Err(Hold::Writes);
        }
        let taken = self.room_taken.saturating_add(len);
        let has = self.room.as_ref().map_or(0, Room::size);
        if self.room.is_none() || taken > has.max(Handle::ROOM_LEN_MIN) {
            let missing = taken.saturating_sub(has).max(if has == 0 { Handle::ROOM_LEN_MIN } else { 0 });
            match self.door.handle.try_room(missing) {
                Some(room) => self.add_room(room),
                // Those before it give back what they have when they are done.
                None if !self.writes.is_empty() => return Err(Hold::Writes),
                None => return Err(self.wait_for_room(missing)),
            }
        }
        self.room_taken = taken;
        Ok(())
    }

    pub(crate) fn wait_for_room(&self, len: usize) -> Hold {
        Hold::Room(Box::pin(self.door.handle.room(len)))
    }

    /// Takes room that was waited for, for the writes to come.
    pub(crate) fn add_room(&mut self, room: Room) {
        match &mut self.room {
            Some(known) => known.merge(room),
            none => *none = Some(room),
        }
    }

    /// Gives room back that no write needs.
    pub(crate) fn give_room_back(&mut self) {
        if self.writes.is_empty() {
            (self.room, self.room_taken) = (None, 0);
        }
    }

    /// Has the writes done that were gathered, if there are any, unless others are under way. Says whether some are.
    pub(crate) fn start_writes(&mut self) -> bool {
        if self.written.is_none()
            && !self.writes.is_empty()
            && let Some(room) = self.room.take()
        {
            let writes = std::mem::take(&mut self.writes);
            self.room_taken = 0;
            self.written_ids = std::mem::take(&mut self.write_ids);
            self.written = Some(self.door.handle.submit(writes, room));
        }
        self.written.is_some()
    }

    /// Whether writes are under way or gathered.
    pub(crate) fn has_writes(&self) -> bool {
        self.written.is_some() || !self.writes.is_empty()
    }

    /// Answers the writes that are under way once they are done; those that were gathered meanwhile are next.
    pub(crate) fn poll_writes(&mut self, cx: &mut Context<'_>) -> Poll<Chunks> {
        let Some(written) = &mut self.written else { return Poll::Pending };
        let results = ready!(Pin::new(written).poll(cx));
        self.written = None;
        let mut out = spare();
        self.answer_writes(results, &mut out);
        self.start_writes();
        Poll::Ready(out)
    }

    /// The read under way, if one takes several turns.
    pub(crate) fn start_reading(&mut self) -> Option<Hold> {
        self.reading.take().map(Hold::Reading)
    }

    /// Has a read wait until it may go on.
    pub(crate) fn wait_for_leave(&self, reading: Box<Reading>) -> Hold {
        let door = Arc::clone(&self.door);
        Hold::Leave(reading, Box::pin(async move { door.handle.budget().leave(door.options.stall_limit).await }))
    }

    /// Reads on for a turn; gives the read back unless its answer is written.
    pub(crate) fn read_on(&self, mut reading: Box<Reading>, out: &mut Chunks) -> Option<Box<Reading>> {
        match reading.read(&self.door.handle) {
            Ok(false) => return Some(reading),
            Ok(true) => reading.finish(out),
            Err(unread) => refuse(out, not_read(reading.id(), unread)),
        }
        None
    }

    /// Answers the writes that were under way.
    fn answer_writes(&mut self, mut results: Result<Results, Error>, out: &mut Chunks) {
        let mut ids = std::mem::take(&mut self.written_ids);
        ids.drain(|id| match results.as_mut().map(Iterator::next) {
            Ok(Some(result)) => answer_write(Answer::to(id, out), result),
            Ok(None) => {
                Answer::to(id, out).base(status::STORAGE_FAILED, "the write has no result", &BaseFields::default())
            }
            Err(error) => refuse(out, refusal(id, error)),
        });
        // The room of the ids is for the next, unless these have some of their own.
        if self.write_ids.ends.is_empty() {
            self.write_ids = ids;
        }
    }

    /// What a request that may take its time waits for: others have their turn, and there must be room for the answer.
    fn turns(&self) -> Hold {
        let door = Arc::clone(&self.door);
        Hold::Turns(Box::pin(async move {
            tokio::task::yield_now().await;
            door.handle.budget().room(door.options.stall_limit).await;
            door.handle.budget().relief().await;
        }))
    }

    /// What a client that comes from another node waits for: this one is to have what it has seen.
    fn catch_up(&mut self, seen: &str) -> Hold {
        let (door, level) = (Arc::clone(&self.door), Arc::new(OnceLock::new()));
        self.level = Some(Arc::clone(&level));
        let seen = seen.parse::<Cursor>().ok();
        Hold::Turns(Box::pin(async move {
            let has_it = match seen {
                Some(Cursor { epoch, revision, .. }) => door.handle.catch_up(Seen { epoch, revision }).await,
                None => Ok(false),
            };
            // It is asked once.
            drop(level.set(has_it));
        }))
    }

    /// Some turns for connections that were asked to give up what they hold.
    pub(crate) fn relief(&self) -> Hold {
        let door = Arc::clone(&self.door);
        Hold::Turns(Box::pin(async move { door.handle.budget().relief().await }))
    }

    /// Whether more waited for it than it may lag behind, and it does not understand that a subscription begins anew.
    pub(crate) fn has_overflowed(&self) -> bool {
        self.notifier.has_overflowed()
    }

    /// Whether notifications may follow.
    pub(crate) fn is_subscribed(&self) -> bool {
        self.subscriptions.values().any(|subscription| !subscription.has_ended())
    }

    /// Forgets the connection's subscriptions, and leaves the writes that are under way as they are, done or not.
    pub(crate) fn end(&mut self) {
        (self.written, self.writes, self.room) = (None, Vec::new(), None);
        Attached::end_all(std::mem::take(&mut self.subscriptions).into_values());
    }

    /// Ends the sending side once all that was sent is written.
    pub(crate) fn close(&self) {
        self.notifier.close();
    }

    fn write_op<'r>(&self, request: &Request<'r>) -> Result<Admitted, Refusal<'r>> {
        let if_revision = request.if_revision.map(Revision::new);
        if request.kind == Kind::Delete {
            let pattern = pattern(request)?;
            if if_revision.is_some() && !matches!(pattern, Pattern::Key(_)) {
                return Err(bad_request(request.id, "'if_revision' goes with one key, not with a wildcard".into()));
            }
            return self.admit_op(request.id, Op::Delete { pattern, if_revision });
        }
        let expiry = request.ttl_ms.map(|ttl| self.door.handle.expiry(Duration::from_millis(ttl)));
        let (key, options) = (key(request)?, PutOptions { if_revision, expiry });
        let value = Bytes::copy_from_slice(request.value.as_deref().unwrap_or_default());
        self.admit_op(request.id, Op::Put { key, value, options })
    }

    fn admit_op<'r>(&self, id: Id<'r>, op: Op) -> Result<Admitted, Refusal<'r>> {
        self.door.handle.admit(op).map_err(|error| refusal(id, &error))
    }

    fn read<'r>(&mut self, request: &Request<'r>, outbox: &mut Outbox, out: &mut Chunks) -> Result<(), Refusal<'r>> {
        let id = request.id;
        match request.kind {
            Kind::Get => self.get(request, out),
            Kind::List => self.list(request, out),
            Kind::Exists => {
                let exists = self.door.handle.has(&pattern(request)?).map_err(|error| refusal(id, &error))?;
                found(id, exists, out);
                Ok(())
            }
            Kind::Trace => self.trace(request, out),
            Kind::Subscribe => self.subscribe(request, outbox, out),
            Kind::Unsubscribe => {
                let (client, pattern) = (self.client_of(request), pattern(request)?);
                let was_there = self.door.handle.unsubscribe(&pattern, &client).map_err(|error| refusal(id, &error))?;
                self.subscriptions.remove(&(client, pattern));
                found(id, was_there, out);
                Ok(())
            }
            Kind::Connect => {
                self.connect(request, out)?;
                outbox.end_pace();
                Ok(())
            }
            Kind::Version => {
                Answer::to(id, out).version(VERSION);
                Ok(())
            }
            Kind::Stats => self.stats(id, out),
            // Writes are done elsewhere.
            Kind::Health | Kind::Put | Kind::Delete => {
                self.door.handle.check_healthy().map_err(|error| refusal(id, &error))?;
                found(id, true, out);
                Ok(())
            }
            _ => Err(bad_request(id, format!("this server knows no '{}'", request.kind.as_str()))),
        }
    }

    fn get<'r>(&mut self, request: &Request<'r>, out: &mut Chunks) -> Result<(), Refusal<'r>> {
        let id = request.id;
        let after = after(request)?;
        let form = self.notifier.form();
        if after.is_none() && Key::check(&request.key).is_ok() {
            return self.get_one(request, form, out);
        }
        let limit = request.limit.map_or(u64::MAX, |limit| limit.min(LIST_LIMIT_MAX));
        self.read_many(Reading::new(id, pattern(request)?, after, limit_of(limit), Some(form)), request, out)
    }

    /// Answers at once what is read in one turn, and notes what takes more.
    fn read_many<'r>(
        &mut self,
        mut reading: Reading,
        request: &Request<'r>,
        out: &mut Chunks,
    ) -> Result<(), Refusal<'r>> {
        match reading.read(&self.door.handle) {
            Ok(true) => reading.finish(out),
            Ok(false) => {
                reading.is_ahead = self.is_ahead(request);
                self.reading = Some(Box::new(reading));
            }
            Err(unread) => return Err(not_read(request.id, unread)),
        }
        Ok(())
    }

    /// One key, as a rule: a short value is written where it is sent from, while the store lends it. A long one is kept
    /// by counting, and written when others can have the store again.
    fn get_one<'r>(&self, request: &Request<'r>, form: ValueForm, out: &mut Chunks) -> Result<(), Refusal<'r>> {
        let id = request.id;
        let long = self.door.handle.look_up(&request.key, |record| match record.value {
            ValueRef::Lent(value) => {
                let entry = GetEntry { key: record.key.as_str(), value, shared: None, revision: record.revision.get() };
                Answer::to(id, out).get(form, &[entry], false);
                None
            }
            ValueRef::Shared(value) => Some((value.clone(), record.revision.get())),
        });
        match long.map_err(|error| refusal(id, &error))? {
            Some(None) => {}
            Some(Some((value, revision))) => {
                Answer::to(id, out).get(form, &[(&*request.key, &value, revision)], false);
            }
            None => Answer::to(id, out).get(form, NOTHING, false),
        }
        Ok(())
    }

    fn list<'r>(&mut self, request: &Request<'r>, out: &mut Chunks) -> Result<(), Refusal<'r>> {
        let limit = limit_of(request.limit.unwrap_or(LIST_LIMIT).min(LIST_LIMIT_MAX));
        self.read_many(Reading::new(request.id, pattern(request)?, after(request)?, limit, None), request, out)
    }

    fn trace<'r>(&self, request: &Request<'r>, out: &mut Chunks) -> Result<(), Refusal<'r>> {
        let features = self.notifier.features();
        let shows_names = features.contains(Features::NAMES);
        if request.key.is_empty() {
            return if shows_names {
                self.list_clients(request.id, out)
            } else {
                Err(bad_request(request.id, "missing field 'key'".into()))
            };
        }
        let traced = self.door.handle.trace(&key(request)?).map_err(|error| refusal(request.id, &error))?;
        let traced: Vec<_> = traced.into_iter().map(|traced| (traced.pattern.to_string(), traced)).collect();
        let name = |peer: &PeerInfo| peer.said.name.as_ref().map_or(0, |name| name.len());
        let lens = traced.iter().map(|(pattern, traced)| {
            let name_len = traced.peer.as_ref().filter(|_| shows_names).map_or(0, name);
            traced.client_uuid.as_str().len().saturating_add(pattern.len()).saturating_add(name_len)
        });
        fits(request.id, lens)?;
        let subscribers: Vec<_> = traced
            .iter()
            .map(|(pattern, traced)| {
                let mut fields = SubscriberFields::new(traced.client_uuid.as_str(), pattern);
                fields.since_ms = millis(traced.age);
                fields.exact = matches!(traced.pattern, Pattern::Exact(_)) && features.contains(Features::EXACT);
                (fields.queued, fields.skipped) = (traced.backlog.queued as u64, traced.backlog.skipped);
                if let Some(peer) = traced.peer.as_ref().filter(|_| shows_names) {
                    (fields.name, fields.peer) = (peer.said.name.as_deref(), Some(peer.address.as_str()));
                }
                fields
            })
            .collect();
        Answer::to(request.id, out).trace(&subscribers);
        Ok(())
    }

    /// All connected clients.
    fn list_clients<'r>(&self, id: Id<'r>, out: &mut Chunks) -> Result<(), Refusal<'r>> {
        let clients = self.door.handle.peers().map_err(|error| refusal(id, &error))?;
        let lens = clients.iter().map(|PeerInfo { said, .. }| {
            let uuid_len = said.client_uuid.as_ref().map_or(0, |uuid| uuid.as_str().len());
            said.name.as_ref().map_or(0, |name| name.len()).saturating_add(uuid_len)
        });
        fits(id, lens)?;
        let shown: Vec<_> = clients
            .iter()
            .map(|client| {
                let mut fields = ClientFields::new(&client.address);
                fields.client_uuid = client.said.client_uuid.as_ref().map(SubscriberId::as_str);
                fields.name = client.said.name.as_deref();
                (fields.since_ms, fields.subscriptions) = (millis(client.age), client.subscriptions);
                (fields.queued, fields.skipped) = (client.backlog.queued as u64, client.backlog.skipped);
                fields
            })
            .collect();
        Answer::to(id, out).clients(&shown);
        Ok(())
    }

    fn subscribe<'r>(
        &mut self,
        request: &Request<'r>,
        outbox: &mut Outbox,
        out: &mut Chunks,
    ) -> Result<(), Refusal<'r>> {
        let pattern = pattern(request)?;
        let is_exact = request.exact && self.notifier.features().contains(Features::EXACT);
        if is_exact && !matches!(pattern, Pattern::Key(_)) {
            return Err(bad_request(request.id, "'exact' goes with one key, not with a wildcard".into()));
        }
        // Exact or not, it is the same subscription.
        let name = (self.client_of(request), pattern);
        if self.subscriptions.len() >= self.door.options.subscriptions_max {
            self.subscriptions.retain(|_, subscription| !subscription.has_ended());
        }
        // What the node gives the notifier from here on, `Hello` first, comes after the answers so far.
        outbox.send(std::mem::take(out));
        let (client, pattern) = match name.clone() {
            (client, Pattern::Key(key)) if is_exact => (client, Pattern::Exact(key)),
            name => name,
        };
        let options = AttachOptions::default().with_client_uuid(client).with_snapshot(request.snapshot);
        let attached =
            self.door.handle.attach(pattern, Box::new(self.notifier.clone()), &options.with_peer(&self.peer));
        self.subscriptions.insert(name, attached.map_err(|error| refusal(request.id, &error))?);
        Ok(())
    }

    fn connect<'r>(&mut self, request: &Request<'r>, out: &mut Chunks) -> Result<(), Refusal<'r>> {
        let level = self.level.take().and_then(|level| level.get().cloned()).transpose();
        let has_it = level.map_err(|error| refusal(request.id, &error))?;
        let client = self.client_of(request);
        self.notifier.set_form(request.values.unwrap_or_default());
        self.notifier.set_features(request.features);
        let name = request.name.as_deref().filter(|_| request.features.contains(Features::NAMES)).map(Arc::from);
        self.peer.says(|said| {
            said.client_uuid = Some(client);
            said.name = name.or(said.name.take());
        });
        let (epoch, limits) = (self.door.handle.epoch(), self.door.handle.limits());
        self.epoch = self.door.handle.follows_engine().then_some(epoch);
        let epoch = epoch.to_string();
        let mut server = ServerFields::new(VERSION, &epoch, limits.value_len_max as u64);
        server.features = match self.door.handle.follows_engine() {
            true => FEATURES.with(Features::STALE),
            false => FEATURES,
        };
        server.patience_ms = self.wants_signs().then(|| millis(self.door.options.stall_limit));
        server.begins_anew = has_it == Some(false);
        Answer::to(request.id, out).ok(&BaseFields::server(server));
        Ok(())
    }

    fn stats<'r>(&self, id: Id<'r>, out: &mut Chunks) -> Result<(), Refusal<'r>> {
        let refused = |error| refusal(id, &error);
        let (words, numbers) =
            (self.door.handle.words().map_err(refused)?, self.door.handle.numbers().map_err(refused)?);
        let words: Vec<(&str, &str)> = words.iter().map(|(name, word)| (name.as_ref(), word.as_str())).collect();
        Answer::to(id, out).stats(&words, &numbers);
        Ok(())
    }

    fn client_of(&self, request: &Request<'_>) -> SubscriberId {
        match request.client_uuid.as_deref() {
            Some(name) => SubscriberId::from(name),
            None => self.peer.says(|said| said.client_uuid.get_or_insert_with(random_name).clone()),
        }
    }
}

fn found(id: Id<'_>, found: bool, out: &mut Chunks) {
    let answer = Answer::to(id, out);
    if found { answer.ok(&BaseFields::default()) } else { answer.not_found() }
}

fn limit_of(limit: u64) -> usize {
    usize::try_from(limit).unwrap_or(usize::MAX)
}

/// Whether a request may read or make a lot.
fn is_long(request: &Request<'_>) -> bool {
    match request.kind {
        Kind::Get | Kind::List => request.key.ends_with('*'),
        kind => kind == Kind::Trace,
    }
}

/// A name for a client that gave none.
fn random_name() -> SubscriberId {
    // Without randomness the name need only differ from that of others here, and an address does.
    let fallback = Box::new(0_u8);
    let number = getrandom::u64().unwrap_or(std::ptr::from_ref(&*fallback).addr() as u64);
    SubscriberId::from(format!("anonymous-{number:016x}").as_str())
}

fn answer_write(answer: Answer<'_>, result: Result<Outcome, NotDone>) {
    match result {
        Ok(Outcome::Put { revision: given }) => {
            answer.ok(&BaseFields::revision(given.get()));
        }
        Ok(Outcome::Deleted { count, revision: given }) => {
            answer.ok(&BaseFields::revision(given.get()).with_count(count));
        }
        Ok(Outcome::NotFound) => answer.not_found(),
        Ok(Outcome::Conflict { revision: present }) => {
            let message = format!("Conflict: the key is at revision {present}");
            answer.base(status::CONFLICT, &message, &BaseFields::revision(present.get()));
        }
        Err(NotDone::Storage(Failed { deleted: deleted @ 1.., .. })) => {
            let message = format!("storage failed: only {deleted} keys are gone, the others were not deleted");
            answer.base(status::STORAGE_FAILED, &message, &BaseFields::default().with_count(deleted));
        }
        Err(NotDone::Storage(Failed { error, .. })) => {
            let (status, message) = match error.kind() {
                PersistErrorKind::NoSpace => (status::DISK_FULL, "the disk is full; nothing was changed"),
                PersistErrorKind::Rejected => {
                    (status::TOO_LARGE, "storage cannot take so much at once; nothing was changed")
                }
                PersistErrorKind::Poisoned => {
                    (status::STORAGE_FAILED, "storage failed; whether the change was stored shows after a restart")
                }
                _ => (status::STORAGE_FAILED, "storage failed; nothing was changed"),
            };
            answer.base(status, message, &BaseFields::default());
        }
        Err(NotDone::Engine(error)) => {
            let (status, message) = (status_of(&error), error.to_string());
            answer.base(status, &message, &BaseFields::default());
        }
        Err(_) => answer.base(status::STORAGE_FAILED, "the write was not done", &BaseFields::default()),
    }
}

fn refuse(out: &mut Chunks, refusal: Refusal<'_>) {
    Answer::to(refusal.id, out).base(refusal.status, &refusal.message, &BaseFields::default());
}

/// Whether an answer fits that holds texts of these lengths, each with some fields around it.
fn fits<'r>(id: Id<'r>, mut lens: impl Iterator<Item = usize>) -> Result<(), Refusal<'r>> {
    // A control character takes six bytes.
    let most = lens.try_fold(0_usize, |sum, len| {
        let sum = sum.saturating_add(len.saturating_mul(6)).saturating_add(ROW_LEN);
        (sum <= ANSWER_LEN_MAX).then_some(sum)
    });
    most.map(drop).ok_or_else(|| too_large(id))
}

/// What the node refuses.
fn refusal<'r>(id: Id<'r>, error: &Error) -> Refusal<'r> {
    Refusal { id, status: status_of(error), message: error.to_string(), close: false }
}

fn status_of(error: &Error) -> u16 {
    match error.kind() {
        ErrorKind::Refused { status } => *status,
        _ => status::UNAVAILABLE,
    }
}

fn not_read(id: Id<'_>, unread: Unread) -> Refusal<'_> {
    match unread {
        Unread::TooLong => too_large(id),
        Unread::Refused(error) => refusal(id, &error),
    }
}

fn bad_request(id: Id<'_>, message: String) -> Refusal<'_> {
    Refusal { id, status: status::BAD_REQUEST, message, close: false }
}

fn too_large(id: Id<'_>) -> Refusal<'_> {
    let message = format!("the answer would pass {ANSWER_LEN_MAX} bytes: ask in pages, with 'limit' and 'after'");
    Refusal { id, status: status::TOO_LARGE, message, close: false }
}

fn key<'r>(request: &Request<'r>) -> Result<Key, Refusal<'r>> {
    Key::new(&request.key).map_err(|error| key_refusal(request.id, error))
}

fn pattern<'r>(request: &Request<'r>) -> Result<Pattern, Refusal<'r>> {
    Pattern::new(&request.key).map_err(|error| key_refusal(request.id, error))
}

fn after<'r>(request: &Request<'r>) -> Result<Option<Key>, Refusal<'r>> {
    let after = request.after.as_deref().filter(|after| !after.is_empty()).map(Key::new);
    after.transpose().map_err(|error| bad_request(request.id, format!("invalid 'after': {error}")))
}

/// A key over its limit is a 413, like anything else over a limit; any other fault of a key is a 400.
fn key_refusal(id: Id<'_>, error: KeyError) -> Refusal<'_> {
    let status = if matches!(error, KeyError::TooLong { .. }) { status::TOO_LARGE } else { status::BAD_REQUEST };
    Refusal { id, status, message: format!("invalid key: {error}"), close: false }
}
