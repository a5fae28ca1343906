//! How nodes meet: they accept connections, and open one to each address that they know, again and again.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nkv_node::EngineError;
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};

use crate::cluster::{Inner, Level, Peers, Run, Tried, can_be_reached, millis};
use crate::link::{Line, NEWCOMERS_MAX, Newcomers, PushQueue, Stream};
use crate::membership::MembershipError;
use crate::session::{Levelling, Session};
use crate::stamp::{Millis, NodeId};
use crate::wire::{Hello, Message, frame_len_max, invalid};

/// Connections that peers have opened, at most.
const ACCEPTED_MAX: usize = 512;

/// Addresses that are tried, at most.
const ADDRESSES_MAX: usize = 1_024;

/// The first pause between attempts to connect. Each is twice the one before, and at most [`PAUSE_INTERVALS_MAX`] sync intervals.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_INTERVALS_MAX: u32 = 5;

/// The sync intervals after which it is asked again where peers are.
const ASK_INTERVALS: u64 = 10;

/// Sessions that a node leads with a peer until it asks it again where others are: it leads one in two intervals.
const ASK_SESSIONS: u64 = ASK_INTERVALS / 2;

/// How long it may take to find out where peers are, in times of the time-out of a peer: names are looked up at several servers.
const LOOKUP_TIMEOUTS: u32 = 4;

/// Peers that are synced with in each interval, at most: with more, each waits longer.
const PEERS_AN_INTERVAL: usize = 4;

/// What is said to a node that the membership does not admit.
const NOT_ADMITTED: &str = "it is none of those that may be peers";

/// Why a connection is not used.
#[derive(Debug)]
enum NotMet {
    Myself,
    /// There is one already.
    Known,
    Failed(io::Error),
}

impl From<io::Error> for NotMet {
    fn from(error: io::Error) -> Self {
        NotMet::Failed(error)
    }
}

/// Counts a connection while it lasts.
#[derive(Debug)]
struct Connected<'a> {
    inner: &'a Inner,
    hello: Hello,
}

impl<'a> Connected<'a> {
    /// Unless another run of the node is connected. If that is heard of, two living nodes have one id. If not, it was restarted, and
    /// a connection that was cut off has not ended yet. Says which, and what is wrong.
    fn new(inner: &'a Inner, hello: Hello) -> Result<Self, (bool, String)> {
        let now = inner.steady();
        let mut peers = inner.peers();
        let begun = || Run { number: hello.run, connections: 0, heard_at: now, rival: None, level: None };
        let run = peers.connected.entry(hello.id).or_insert_with(begun);
        if run.number != hello.run {
            let since = match run.rival {
                Some((rival, since)) if rival == hello.run => since,
                _ => now,
            };
            run.rival = Some((hello.run, since));
            // What it sent before it ended may be read a little later.
            let lives = run.heard_at > since.saturating_add(millis(inner.options.sync_interval));
            let reason = match lives {
                true => format!("another node of the id {} lives and is connected to this one", hello.id),
                false => format!("a connection of the last run of {} has not ended yet", hello.id),
            };
            return Err((lives, reason));
        }
        run.connections += 1;
        inner.members.note_connected(hello.id);
        if let Some(address) = hello.address {
            note_address(&mut peers, hello.id, address);
        }
        drop(peers);
        Ok(Connected { inner, hello })
    }

    fn note_heard(&self) {
        let now = self.inner.steady();
        if let Some(run) = self.inner.peers().connected.get_mut(&self.hello.id) {
            run.heard_at = now;
        }
    }
}

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        let mut peers = self.inner.peers();
        let Some(run) = peers.connected.get_mut(&self.hello.id) else { return };
        run.connections = run.connections.saturating_sub(1);
        if run.connections == 0 {
            peers.connected.remove(&self.hello.id);
            self.inner.members.note_lost(self.hello.id, self.inner.steady());
            drop(peers);
            self.inner.log.info("lost", format_args!("the peer {} is no longer connected", self.hello.id));
        }
    }
}

/// Pushes to a peer while it lasts.
#[derive(Debug)]
struct Linked<'a> {
    inner: &'a Inner,
    id: NodeId,
}

impl Drop for Linked<'_> {
    fn drop(&mut self) {
        let mut peers = self.inner.peers();
        peers.links.remove(&self.id);
        peers.leading.remove(&self.id);
    }
}

/// A session that a peer leads, while it lasts.
#[derive(Debug)]
struct Led<'a> {
    inner: &'a Inner,
    id: NodeId,
    session: Session,
    _levelling: Levelling<'a>,
}

impl Drop for Led<'_> {
    fn drop(&mut self) {
        self.inner.peers().led_by.remove(&self.id);
    }
}

fn hello(inner: &Inner) -> Hello {
    Hello {
        cluster: inner.options.cluster.clone(),
        id: inner.id().unwrap_or_default(),
        run: inner.run,
        uptime: inner.uptime(),
        wall: inner.wall(),
        address: inner.options.advertise,
        has_joined: inner.has_joined(),
        value_len_max: inner.options.value_len_max as u64,
    }
}

/// What is wrong with a peer, and whether it is a second node of an id.
fn check(inner: &Inner, theirs: &Hello) -> Result<(), (bool, String)> {
    let own = &inner.options.cluster;
    if theirs.cluster != *own {
        return Err((false, format!("this is a node of the cluster {own:?}, not of {:?}", theirs.cluster)));
    }
    if Some(theirs.id) == inner.id() && theirs.run != inner.run {
        let reason = format!("two living nodes have the id {}: one has a copy of the other's directory", theirs.id);
        // The one that came later is to go.
        let is_later = (theirs.uptime, theirs.run) <= (inner.uptime(), inner.run);
        if !is_later {
            inner.note_refused(reason.clone());
        }
        return Err((is_later, reason));
    }
    Ok(())
}

/// Accepts connections, and answers what comes over them.
pub(crate) async fn accept(inner: &Arc<Inner>) -> EngineError {
    let places = Arc::new(Semaphore::new(ACCEPTED_MAX));
    let mut tasks = JoinSet::new();
    let mut newcomers = Newcomers::default();
    loop {
        while tasks.try_join_next().is_some() {}
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return EngineError::Unavailable("it accepts no more".into());
        };
        match inner.parts.network.accept().await {
            Ok(stream) => {
                let (node, newcomer) = (Arc::clone(inner), Arc::new(()));
                let noted = Arc::downgrade(&newcomer);
                let task = tasks.spawn(async move {
                    if let Err(error) = answer(&node, stream, newcomer).await {
                        tracing::debug!(%error, "a connection of a peer ended");
                    }
                    drop(place);
                });
                if newcomers.note(task, noted) {
                    let what = format_args!(
                        "more than {NEWCOMERS_MAX} peers have not said who they are: the oldest connection is closed"
                    );
                    inner.log.warn("newcomers", what);
                }
                // It is looked at before it can be the oldest.
                tokio::task::yield_now().await;
            }
            Err(error) => {
                inner.log.warn("accept", format_args!("a connection of a peer was not accepted: {error}"));
                sleep(PAUSE_MIN).await;
            }
        }
    }
}

/// Answers one who opened a connection: a newcomer, until it has said who it is.
async fn answer(inner: &Inner, stream: Box<dyn Stream>, newcomer: Arc<()>) -> io::Result<()> {
    let pushes = PushQueue::default();
    let (line, writer) = Line::new(stream, &pushes, inner.options.peer_timeout);
    tokio::select! {
        biased;
        ended = serve(inner, line, newcomer) => ended,
        error = writer => Err(error),
    }
}

async fn serve(inner: &Inner, mut line: Line, newcomer: Arc<()>) -> io::Result<()> {
    let theirs = match line.receive().await? {
        Message::Hello(theirs) => theirs,
        _ => return Err(invalid("a connection begins with a hello")),
    };
    let refuse = async |line: &mut Line, is_duplicate, reason: String| {
        inner.log.warn("refused", format_args!("the peer {} is refused: {reason}", theirs.id));
        line.send(Message::Refused { is_duplicate, reason: reason.clone() }.encode()).await?;
        // Until it has been read.
        sleep(PAUSE_MIN).await;
        Err(invalid(reason))
    };
    // First: one that is not admitted does not make this node refuse writes by its id.
    if theirs.run != inner.run && !inner.parts.membership.admits(theirs.id).await {
        return refuse(&mut line, false, NOT_ADMITTED.to_owned()).await;
    }
    if let Err((is_duplicate, reason)) = check(inner, &theirs) {
        return refuse(&mut line, is_duplicate, reason).await;
    }
    let asked = inner.steady();
    if theirs.run == inner.run {
        line.send(Message::Hello(hello(inner)).encode()).await?;
        line.receive().await?;
        return Ok(());
    }
    let connected = match Connected::new(inner, theirs.clone()) {
        Ok(connected) => connected,
        Err((is_duplicate, reason)) => return refuse(&mut line, is_duplicate, reason).await,
    };
    let (id, of_peer) = (connected.hello.id, connected.hello.frame_len_max());
    match line.ask(&Message::Hello(hello(inner))).await? {
        Message::Ready { wall } => inner.note_clock(id, wall, asked),
        _ => return Err(invalid("a hello is answered with a ready")),
    }
    drop(newcomer);
    inner.mend().await?;
    line.allow(frame_len_max(inner.options.value_len_max));
    let mut led: Option<Led<'_>> = None;
    loop {
        let message = line.receive_within(patience(inner)).await?;
        connected.note_heard();
        match message {
            // A sign of life.
            Message::Push(records) if records.is_empty() => {}
            Message::Push(records) => inner.merge_later(records).await?,
            Message::Leaving => inner.members.note_left(id),
            Message::WhoElse => line.send(Message::Known(known(inner)).encode()).await?,
            // One of two is enough.
            Message::Sync(_) if inner.peers().leading.contains(&id) && inner.id() < Some(id) => {
                line.send(Message::Busy.encode()).await?;
            }
            Message::Sync(theirs) => {
                // One that was not ended says on its end that none is led.
                drop(led.take());
                let (session, answer) = Session::answer(inner, id, of_peer, theirs);
                let Some(levelling) = Levelling::begin(inner, &session) else {
                    line.send(Message::Busy.encode()).await?;
                    continue;
                };
                inner.peers().led_by.insert(id);
                led = Some(Led { inner, id, session, _levelling: levelling });
                line.send(answer.encode()).await?;
            }
            message => match &mut led {
                Some(Led { session, .. }) => {
                    if session.serve(inner, &mut line, message).await? {
                        led = None;
                    }
                }
                None => return Err(invalid("no session has begun")),
            },
        }
    }
}

/// Where the connected peers are.
fn known(inner: &Inner) -> Vec<(NodeId, SocketAddr)> {
    let peers = inner.peers();
    let connected = peers.connected.keys().filter_map(|id| Some((*id, *peers.addresses.get(id)?)));
    connected.take(ADDRESSES_MAX).collect()
}

/// Notes where a node says that it can be reached: no other one is there any more.
fn note_address(peers: &mut Peers, id: NodeId, address: SocketAddr) {
    peers.addresses.retain(|other, there| *other == id || *there != address);
    let has_room = peers.addresses.len() < ADDRESSES_MAX || peers.addresses.contains_key(&id);
    if has_room && can_be_reached(address) {
        peers.addresses.insert(id, address);
    }
}

/// Takes in what a peer knows; what a node said of itself counts more.
fn learn(inner: &Inner, known: Vec<(NodeId, SocketAddr)>) {
    let own = inner.id();
    let mut peers = inner.peers();
    let mut there: BTreeSet<SocketAddr> = peers.addresses.values().copied().collect();
    for (id, address) in known {
        let is_new = Some(id) != own && !peers.connected.contains_key(&id);
        let has_room = peers.addresses.len() < ADDRESSES_MAX && can_be_reached(address);
        if is_new && has_room && there.insert(address) {
            peers.addresses.insert(id, address);
        }
    }
}

/// How long a peer that opened a connection may say nothing.
fn patience(inner: &Inner) -> Duration {
    let (known, _) = inner.members.counts();
    quiet(inner, known).saturating_add(inner.options.peer_timeout)
}

/// How long this node is quiet to a peer that knows `known` nodes. It may know more itself, and lead less often than the peer waits.
fn quiet(inner: &Inner, known: usize) -> Duration {
    interval_with(inner, known).saturating_mul(3)
}

/// How often this node has a session with each of its peers.
fn interval(inner: &Inner) -> Duration {
    let connected = inner.peers().connected.len();
    interval_with(inner, connected)
}

fn interval_with(inner: &Inner, peers: usize) -> Duration {
    let intervals = peers.div_ceil(PEERS_AN_INTERVAL).max(1);
    inner.options.sync_interval.saturating_mul(u32::try_from(intervals).unwrap_or(u32::MAX))
}

/// How long this node need not lead a session with a peer, as there was one that ended whole. The two take turns, since a session
/// levels both. Half an interval later it is the turn of either: the other one may not reach this one. Each connection has a session now
/// and then, which shows whether the other end still answers.
pub(crate) fn rest(inner: &Inner, peer: NodeId, led_at: Millis) -> Duration {
    let interval = millis(interval(inner));
    let level = inner.peers().connected.get(&peer).and_then(|run| run.level);
    let Some(Level { at, was_led_here }) = level else { return Duration::ZERO };
    let pause = if was_led_here { interval.saturating_add(interval / 2) } else { interval };
    let from = at.saturating_add(pause).min(led_at.saturating_add(interval.saturating_mul(5) / 2));
    Duration::from_millis(from.saturating_sub(inner.steady()))
}

/// Finds out where peers are, keeps a connection to each, and has an empty node join.
pub(crate) async fn find(inner: &Arc<Inner>) -> EngineError {
    let mut links: BTreeMap<SocketAddr, AbortHandle> = BTreeMap::new();
    let mut tasks = JoinSet::new();
    let mut named: Option<BTreeSet<SocketAddr>> = None;
    let mut asked_at = inner.steady();
    let (mut asking, mut ask_from, mut is_alone) = (None, 0, false);
    loop {
        if asking.is_none() && inner.steady() >= ask_from {
            asking = Some(Box::pin(named_addresses(inner)));
        }
        while tasks.try_join_next().is_some() {}
        inner.members.look(inner.steady(), millis(inner.options.peer_timeout), millis(inner.options.gc_grace));
        let (known, joined) = inner.members.counts();
        match (known > 0 && joined == 0, &mut is_alone) {
            (true, was @ false) => {
                *was = true;
                tracing::warn!("no other node is in reach: this one goes on alone");
            }
            (false, was @ true) => {
                *was = false;
                tracing::info!("other nodes are in reach again");
            }
            _ => {}
        }
        let learned: Vec<SocketAddr> = match inner.options.named_only {
            true => Vec::new(),
            false => inner.peers().addresses.values().copied().collect(),
        };
        links.retain(|address, link| {
            let is_named = named.as_ref().is_some_and(|named| named.contains(address));
            if inner.options.named_only && !is_named {
                link.abort();
                inner.peers().tried.remove(address);
            }
            !link.is_finished()
        });
        for address in named.iter().flatten().copied().chain(learned) {
            if links.len() < ADDRESSES_MAX && !links.contains_key(&address) {
                let inner = Arc::clone(inner);
                links.insert(address, tasks.spawn(async move { keep_link(&inner, address).await }));
            }
        }
        if let Some(named) = &named
            && !inner.has_joined()
            && begins_alone(inner, named, asked_at)
        {
            tracing::warn!("no peer gives its state: this node begins alone");
            inner.join();
        }
        let answer = async {
            match &mut asking {
                Some(asking) => asking.await,
                None => std::future::pending().await,
            }
        };
        let pause = if inner.has_joined() { inner.options.sync_interval } else { Duration::from_millis(50) };
        tokio::select! {
            biased;
            answer = answer => {
                asking = None;
                match answer {
                    Ok(addresses) => {
                        if named.is_none() {
                            asked_at = inner.steady();
                        }
                        named = Some(addresses.into_iter().collect());
                    }
                    Err(error) => tracing::warn!(%error, "it is not known where peers are"),
                }
                // Who has met its peers learns of others from them too.
                let intervals = if named.is_some() && inner.has_joined() { ASK_INTERVALS } else { 1 };
                let pause = millis(inner.options.sync_interval).saturating_mul(intervals);
                ask_from = inner.steady().saturating_add(pause);
            }
            () = inner.ask.notified() => (asking, ask_from) = (None, 0),
            () = sleep(pause) => {}
        }
    }
}

/// Where peers are, as the membership says; an error if it does not say so in time.
async fn named_addresses(inner: &Inner) -> Result<Vec<SocketAddr>, MembershipError> {
    let limit = inner.options.peer_timeout.saturating_mul(LOOKUP_TIMEOUTS);
    let answer = timeout(limit, inner.parts.membership.addresses()).await;
    answer.unwrap_or_else(|_| Err(MembershipError::new(format!("no answer within {limit:?}"))))
}

/// Whether an empty node need not wait for a peer any longer.
fn begins_alone(inner: &Inner, named: &BTreeSet<SocketAddr>, asked_at: u64) -> bool {
    let peers = inner.peers();
    let others: Vec<Option<Tried>> = named
        .iter()
        .map(|address| peers.tried.get(address).copied())
        .filter(|tried| *tried != Some(Tried::Myself))
        .collect();
    drop(peers);
    if inner.options.advertise.is_some_and(|own| named.iter().all(|address| *address == own)) {
        return true;
    }
    // A state that is on its way is waited for.
    let since = asked_at.max(inner.given_at());
    let is_late = inner.steady().saturating_sub(since) >= millis(inner.options.join_timeout);
    // Of those that are all empty, the one of the lowest id begins.
    let own = inner.id().unwrap_or_default();
    let need_not = |tried: &Option<Tried>| match tried {
        Some(Tried::Refused) => true,
        Some(Tried::Met { id, has_joined }) => !has_joined && own < *id,
        _ => false,
    };
    is_late || others.iter().all(need_not)
}

/// Connects to an address, again and again, and uses the connection for as long as it lasts.
async fn keep_link(inner: &Inner, address: SocketAddr) {
    let pause_max = inner.options.sync_interval.saturating_mul(PAUSE_INTERVALS_MAX);
    let mut pause = PAUSE_MIN;
    let mut last_met = inner.steady();
    loop {
        let note = |tried| {
            inner.peers().tried.insert(address, tried);
        };
        match link(inner, address).await {
            NotMet::Myself => {
                note(Tried::Myself);
                (last_met, pause) = (inner.steady(), pause_max);
            }
            NotMet::Known => (last_met, pause) = (inner.steady(), pause_max),
            NotMet::Failed(error) => {
                let is_met = matches!(inner.peers().tried.get(&address), Some(Tried::Met { .. }));
                note(match error.kind() {
                    io::ErrorKind::ConnectionRefused => Tried::Refused,
                    _ => Tried::Failed,
                });
                tracing::debug!(%address, %error, "a connection to a peer ended");
                if is_met {
                    last_met = inner.steady();
                    pause = PAUSE_MIN;
                }
            }
        }
        let is_long_ago = inner.steady().saturating_sub(last_met) > millis(inner.options.gc_grace);
        if is_long_ago {
            // One that is named is tried again; one that was only learned is forgotten.
            inner.peers().addresses.retain(|_, learned| *learned != address);
            inner.peers().tried.remove(&address);
            return;
        }
        // Spread, so that many do not come at once.
        drop(timeout(spread(inner, pause), inner.hurry.notified()).await);
        pause = pause.saturating_mul(2).min(pause_max);
    }
}

/// A pause that is up to a half shorter.
fn spread(inner: &Inner, pause: Duration) -> Duration {
    let part = (inner.random() >> 32) as u32;
    pause.mul_f64(0.5 + f64::from(part) / f64::from(u32::MAX) / 2.0)
}

/// Opens a connection and uses it.
async fn link(inner: &Inner, address: SocketAddr) -> NotMet {
    let stream = match timeout(inner.options.peer_timeout, inner.parts.network.connect(address)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return error.into(),
        Err(_) => return io::Error::from(io::ErrorKind::TimedOut).into(),
    };
    let pushes = Arc::new(PushQueue::default());
    let (line, writer) = Line::new(stream, &pushes, inner.options.peer_timeout);
    tokio::select! {
        biased;
        ended = lead(inner, address, line, &pushes) => ended,
        error = writer => error.into(),
    }
}

async fn lead(inner: &Inner, address: SocketAddr, mut line: Line, pushes: &Arc<PushQueue>) -> NotMet {
    match try_lead(inner, address, &mut line, pushes).await {
        Ok(never) => match never {},
        Err(not_met) => not_met,
    }
}

async fn try_lead(
    inner: &Inner,
    address: SocketAddr,
    line: &mut Line,
    pushes: &Arc<PushQueue>,
) -> Result<std::convert::Infallible, NotMet> {
    let asked = inner.steady();
    line.send(Message::Hello(hello(inner)).encode()).await?;
    let theirs = match line.receive().await? {
        Message::Hello(theirs) => theirs,
        Message::Refused { is_duplicate, reason } => {
            inner.log.warn("refuses", format_args!("the peer at {address} refuses this node: {reason}"));
            if is_duplicate {
                inner.note_refused(reason.clone());
            }
            return Err(invalid(reason).into());
        }
        _ => return Err(invalid("a hello is answered with one").into()),
    };
    if theirs.run == inner.run {
        return Err(NotMet::Myself);
    }
    if let Err((_, reason)) = check(inner, &theirs) {
        inner.log.warn("refused", format_args!("the peer at {address} is not one: {reason}"));
        return Err(invalid(reason).into());
    }
    if !inner.parts.membership.admits(theirs.id).await {
        inner.log.warn("refused", format_args!("the peer at {address} is not one: {NOT_ADMITTED}"));
        return Err(invalid(NOT_ADMITTED).into());
    }
    inner.note_clock(theirs.id, theirs.wall, asked);
    let (id, of_peer) = (theirs.id, theirs.frame_len_max());
    let has_joined = theirs.has_joined;
    let connected = Connected::new(inner, theirs).map_err(|(_, reason)| invalid(reason))?;
    line.send(Message::Ready { wall: inner.wall() }.encode()).await?;
    inner.mend().await?;
    line.allow(frame_len_max(inner.options.value_len_max));
    {
        let mut peers = inner.peers();
        if peers.links.contains_key(&id) {
            return Err(NotMet::Known);
        }
        peers.links.insert(id, (Arc::clone(pushes), of_peer));
        peers.tried.insert(address, Tried::Met { id, has_joined });
    }
    let _linked = Linked { inner, id };
    inner.log.info("met", format_args!("connected to the peer {id} at {address}"));
    let (mut sessions, mut led_at, mut again_from) = (0_u64, inner.steady(), 0_u64);
    let mut quiet = quiet(inner, 0);
    loop {
        let until_again = Duration::from_millis(again_from.saturating_sub(inner.steady()));
        // A new connection begins with a session: what was written while there was none was not pushed.
        let rest = if sessions == 0 { Duration::ZERO } else { rest(inner, id, led_at).max(until_again) };
        if !rest.is_zero() {
            line.wait(rest, quiet).await?;
            continue;
        }
        if sessions.is_multiple_of(ASK_SESSIONS) {
            match line.ask(&Message::WhoElse).await? {
                Message::Known(known) => {
                    quiet = self::quiet(inner, known.len());
                    learn(inner, known);
                }
                _ => return Err(invalid("the peer was to say whom it knows").into()),
            }
        }
        sessions = sessions.wrapping_add(1);
        let is_led = {
            let mut peers = inner.peers();
            let is_led = peers.led_by.contains(&id);
            is_led || !peers.leading.insert(id)
        };
        let mut is_level = false;
        if !is_led {
            led_at = inner.steady();
            is_level = Session::lead(inner, line, id, of_peer).await?;
            connected.note_heard();
            inner.peers().leading.remove(&id);
        }
        if !is_level {
            // Spread, so that those that were in each other's way are not again.
            again_from = inner.steady().saturating_add(millis(spread(inner, interval(inner))));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_one_a_node_and_one_node_an_address_up_to_the_limit() {
        let at = |number: usize| SocketAddr::from(([10, 0, (number >> 8) as u8, number as u8], 1));
        let mut peers = Peers::default();
        for number in 0..ADDRESSES_MAX + 3 {
            note_address(&mut peers, NodeId(number as u64), at(number));
        }
        assert_eq!(peers.addresses.len(), ADDRESSES_MAX);
        // A node in memory has another id after each restart.
        for id in 5_000..5_010 {
            note_address(&mut peers, NodeId(id), at(7));
        }
        assert_eq!(peers.addresses.len(), ADDRESSES_MAX);
        let there = peers.addresses.iter().filter(|(_, address)| **address == at(7));
        assert_eq!(there.map(|(id, _)| *id).collect::<Vec<_>>(), [NodeId(5_009)]);
        // One that is known may move.
        note_address(&mut peers, NodeId(8), at(9_000));
        assert_eq!(peers.addresses.get(&NodeId(8)), Some(&at(9_000)));
    }
}
