//! What nodes send, counted in a simulated network: while nothing changes, after a push was lost, to one that was away, and how all
//! of that grows. It is the same in each run.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use nkv_core::{Change, Epoch, Key, Revision};
use nkv_node::{EngineError, Seen};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use turmoil::net::{TcpListener, TcpStream};

use crate::clock::{Clock, NoBound, Now, SET_FROM};
use crate::cluster::{Cluster, Options, Parts, Random, Sink};
use crate::link::{Network, Stream};
use crate::membership::StaticPeers;
use crate::register::{Content, Record, Register};
use crate::stamp::{Hlc, Millis, NodeId, Stamp};

const START: Millis = SET_FROM + 200_000_000_000;
const PORT: u16 = 4_000;

/// The headers of a packet: Ethernet, IPv4, and TCP with timestamps.
const HEADERS: u64 = 14 + 20 + 32;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

static VALUE: LazyLock<Bytes> = LazyLock::new(|| vec![b'x'; 100].into());

/// What a record cannot be without, beside its key and its value: a stamp.
const STAMP_LEN: u64 = 16;

/// What went over a node's connections.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    sent: u64,
    received: u64,
    frames_sent: u64,
    frames_received: u64,
    /// Connections that it opened.
    opened: u64,
}

/// A node, as the test sees it.
#[derive(Debug, Default)]
struct Seat {
    cluster: Mutex<Option<Cluster>>,
    counts: Mutex<Counts>,
    /// To be stored and not to be pushed.
    silent: Mutex<Vec<Record>>,
    random: AtomicU64,
    /// How far its clock is off, in milliseconds.
    skew: AtomicI64,
}

impl Seat {
    fn counts(&self) -> Counts {
        *self.counts.lock().unwrap()
    }

    /// With the headers of packets: one for each frame, and one that acknowledges each that came, though most of these are not sent.
    fn sent(&self) -> u64 {
        let counts = self.counts();
        counts.sent + HEADERS * (counts.frames_sent + counts.frames_received)
    }
}

impl Random for Seat {
    fn next(&self) -> io::Result<u64> {
        let state = self.random.fetch_add(0x9e37_79b9_7f4a_7c15, Relaxed);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Ok(mixed ^ (mixed >> 31))
    }
}

#[derive(Debug)]
struct SimClock(Arc<Seat>);

impl Clock for SimClock {
    fn wall(&self) -> Millis {
        (START + self.steady()).saturating_add_signed(self.0.skew.load(Relaxed))
    }

    fn steady(&self) -> Millis {
        // Connections that end with the simulation are outside of it.
        turmoil::sim_elapsed().unwrap_or_default().as_millis() as u64
    }
}

struct Counted(TcpStream, Arc<Seat>);

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.0).poll_read(cx, buf);
        let len = (buf.filled().len() - before) as u64;
        let mut counts = self.1.counts.lock().unwrap();
        counts.received += len;
        counts.frames_received += u64::from(len > 0);
        drop(counts);
        read
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.0).poll_write(cx, bytes);
        if let Poll::Ready(Ok(len)) = &written {
            let mut counts = self.1.counts.lock().unwrap();
            counts.sent += *len as u64;
            counts.frames_sent += 1;
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

struct SimNetwork(TcpListener, Arc<Seat>);

impl std::fmt::Debug for SimNetwork {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SimNetwork")
    }
}

#[async_trait]
impl Network for SimNetwork {
    async fn connect(&self, to: SocketAddr) -> io::Result<Box<dyn Stream>> {
        self.1.counts.lock().unwrap().opened += 1;
        Ok(Box::new(Counted(TcpStream::connect(to).await?, Arc::clone(&self.1))))
    }

    async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(Counted(self.0.accept().await?.0, Arc::clone(&self.1))))
    }
}

/// Storage that takes everything and keeps nothing, as all values are the same: what counts here is what nodes say.
#[derive(Debug)]
struct Nowhere;

#[async_trait]
impl Sink for Nowhere {
    async fn apply(&self, _changes: Vec<Change>) -> Result<(), EngineError> {
        Ok(())
    }

    fn value(&self, _key: &Key, _revision: u64) -> Option<Bytes> {
        Some(VALUE.clone())
    }

    async fn begin(&self, _epoch: Epoch) -> Result<(), EngineError> {
        Ok(())
    }

    fn reached(&self) {}
}

fn key(number: usize) -> Key {
    format!("m.k{number}").parse().unwrap()
}

/// A record of some other node, written so long before the start.
fn record(number: usize, before: Millis) -> Record {
    let stamp = Stamp { time: Hlc::at(START - before), node: NodeId(1) };
    let value = VALUE.clone();
    Record { key: key(number), register: Register::new(stamp, Content::Put { value, ttl: None }) }
}

/// Has a node begin with records.
fn preload(cluster: &Cluster, records: &[Record]) {
    let mut replica = cluster.inner().replica();
    let now = Now { wall: START, latest: START, is_agreed: false, steady: 0 };
    for part in records.chunks(4_096) {
        let mut plan = replica.plan();
        for record in part {
            replica.merge(&mut plan, record, now);
        }
        replica.commit(&mut plan);
    }
}

struct Lab<'a> {
    sim: turmoil::Sim<'a>,
    seats: Vec<Arc<Seat>>,
}

impl Lab<'_> {
    /// Nodes that all begin with these records, and have each other as peers.
    fn start(nodes: usize, gc_grace: Duration, records: &Arc<Vec<Record>>) -> Self {
        Self::start_where(nodes, gc_grace, records, |_, _| true)
    }

    /// The same; which number of a node is named to which says `names`, and no node learns of others.
    fn start_where(
        nodes: usize,
        gc_grace: Duration,
        records: &Arc<Vec<Record>>,
        names: fn(usize, usize) -> bool,
    ) -> Self {
        let mut sim = turmoil::Builder::new()
            .rng_seed(1)
            .tick_duration(Duration::from_millis(if nodes > 16 { 50 } else { 5 }))
            .simulation_duration(Duration::from_secs(100_000))
            .min_message_latency(Duration::from_millis(1))
            .max_message_latency(Duration::from_millis(2))
            .tcp_capacity(4_096)
            .build();
        let seats: Vec<Arc<Seat>> = (0..nodes).map(|_| Arc::default()).collect();
        for (number, seat) in seats.iter().enumerate() {
            seat.random.store(number as u64 * 1_000_003, Relaxed);
            let seat = Arc::clone(seat);
            let records = Arc::clone(records);
            let named: Vec<usize> = (0..nodes).filter(|other| names(number, *other)).collect();
            sim.host(format!("n{number}"), move || {
                host(Arc::clone(&seat), named.clone(), number, gc_grace, Arc::clone(&records))
            });
        }
        Lab { sim, seats }
    }

    fn steps(&mut self, millis: Millis) {
        let until = self.sim.elapsed() + Duration::from_millis(millis);
        while self.sim.elapsed() < until {
            self.sim.step().unwrap();
        }
    }

    /// Those that have begun.
    fn clusters(&self) -> Vec<Cluster> {
        self.seats.iter().filter_map(|seat| seat.cluster.lock().unwrap().clone()).collect()
    }

    /// How long it takes until all have the same, in milliseconds, and how many peers there are.
    fn until_level(&mut self, peers: usize) -> Millis {
        let begun = self.sim.elapsed();
        loop {
            let clusters = self.clusters();
            let is_level = clusters.len() == self.seats.len()
                && clusters
                    .iter()
                    .all(|cluster| cluster.peers().len() >= peers && cluster.digest() == clusters[0].digest());
            let took = (self.sim.elapsed() - begun).as_millis() as Millis;
            if is_level {
                return took;
            }
            assert!(took < 300_000, "they do not get level");
            self.sim.step().unwrap();
        }
    }

    /// Makes this number of changes at one node, which pushes none of them. Says what all nodes send until they are level, with headers.
    fn level(&mut self, keys: usize, changes: usize) -> u64 {
        let changed = (0..changes).map(|number| record(number * (keys / changes), 1_000 - changes as u64));
        let before: u64 = self.seats.iter().map(|seat| seat.sent()).sum();
        self.seats[0].silent.lock().unwrap().extend(changed);
        self.steps(20);
        self.until_level(0);
        self.seats.iter().map(|seat| seat.sent()).sum::<u64>() - before
    }

    /// What the node that sends most sends each second while nothing changes, with headers.
    fn idle(&mut self, seconds: u64) -> u64 {
        let sent = |lab: &Self| lab.seats.iter().map(|seat| seat.sent()).collect::<Vec<_>>();
        let before = sent(self);
        self.steps(seconds * 1_000);
        let most = sent(self).into_iter().zip(before).map(|(after, before)| after - before).max();
        most.unwrap() / seconds
    }
}

async fn host(
    seat: Arc<Seat>,
    named: Vec<usize>,
    number: usize,
    gc_grace: Duration,
    records: Arc<Vec<Record>>,
) -> turmoil::Result {
    let listener = TcpListener::bind(("0.0.0.0", PORT)).await?;
    let address = |number: usize| SocketAddr::new(turmoil::lookup(format!("n{number}")), PORT);
    let mut options = Options::new("traffic");
    options.advertise = Some(address(number));
    options.gc_grace = gc_grace;
    options.named_only = true;
    let parts = Parts {
        clock: Arc::new(SimClock(Arc::clone(&seat))),
        random: Arc::clone(&seat) as Arc<dyn Random>,
        bound: Arc::new(NoBound),
        network: Arc::new(SimNetwork(listener, Arc::clone(&seat))),
        membership: Arc::new(StaticPeers(named.into_iter().map(address).collect())),
    };
    let cluster = Cluster::with(options, parts, address(number)).unwrap();
    preload(&cluster, &records);
    *seat.cluster.lock().unwrap() = Some(cluster.clone());
    let seen = Seen { epoch: Epoch::new(number as u128 + 1), revision: Revision::new(records.len() as u64) };
    let client = async {
        loop {
            let silent = std::mem::take(&mut *seat.silent.lock().unwrap());
            if !silent.is_empty() {
                cluster.inner().merge(silent).await.unwrap();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        error = cluster.inner().run(Some(seen), Arc::new(Nowhere)) => panic!("node {number} ends: {error}"),
        never = client => never,
    }
}

fn records(count: usize) -> Arc<Vec<Record>> {
    Arc::new((0..count).map(|number| record(number, 3_600_000)).collect())
}

/// What a node sends each second while nothing changes, once that is so for a while.
fn idle(nodes: usize, keys: usize) -> u64 {
    let records = records(keys);
    let mut lab = Lab::start(nodes, DAY, &records);
    lab.until_level(nodes - 1);
    // Sessions of a pair are this far apart, in seconds.
    let interval = (nodes as u64 - 1).div_ceil(4);
    lab.steps(4_000 * interval);
    lab.idle(8 * interval)
}

#[test]
fn an_idle_node_of_five_sends_at_most_2_kb_a_second_whatever_it_has() {
    let (few, many) = (idle(5, 1), idle(5, 2_000));
    println!("TEST idle_bytes_per_s few={few} many={many}");
    assert!(few > 0 && few <= 2_000 && many <= 2_000, "{few} and {many} bytes each second");
    assert!(few.abs_diff(many) < 100, "{few} and {many} bytes each second");
}

#[test]
fn what_was_not_pushed_is_everywhere_within_two_intervals() {
    let mut lab = Lab::start(5, DAY, &records(100));
    lab.until_level(4);
    let mut longest = 0;
    for round in 0..20 {
        // At each moment of an interval.
        lab.steps(3_000 + 170 * round);
        let silent = record(1_000 + round as usize, 1_000);
        lab.seats[round as usize % 5].silent.lock().unwrap().push(silent);
        lab.steps(20);
        longest = longest.max(lab.until_level(4));
    }
    println!("TEST not_pushed_level_ms {longest}");
    assert!(longest <= 2_000, "{longest} ms");
}

/// A hub of 13 peers that knew only the hub was taken for dead by each again and again: it had a session with each less often than they,
/// with one peer, waited for a word of it.
#[test]
fn connections_of_a_hub_to_64_idle_nodes_that_know_it_alone_stay_up() {
    let mut lab = Lab::start_where(65, DAY, &records(100), |one, other| (one == 0) != (other == 0));
    lab.until_level(1);
    lab.steps(5_000);
    let opened = |lab: &Lab<'_>| lab.seats.iter().map(|seat| seat.counts().opened).sum::<u64>();
    let before = opened(&lab);
    lab.steps(60_000);
    assert_eq!((before, opened(&lab)), (128, 128));
}

/// Nodes whose clocks are apart forget tombstones at different times: none is given to one that has forgotten it.
#[test]
fn tombstones_that_nodes_forget_at_different_times_are_not_given_again() {
    let deleted = |number| {
        let Record { key, register } = record(number, 1_000);
        Record { key, register: Register::new(register.stamp, Content::Deleted { at: START }) }
    };
    let tombstones = Arc::new((0..200).map(deleted).collect());
    let mut lab = Lab::start(3, Duration::from_secs(5), &tombstones);
    for (seat, skew) in lab.seats.iter().zip([-400, 0, 400]) {
        seat.skew.store(skew, Relaxed);
    }
    lab.until_level(2);
    let clusters = lab.clusters();
    let left = || clusters.iter().map(|cluster| cluster.inner().replica().registers().len()).collect::<Vec<_>>();
    let mut were_apart = false;
    while left() != [0, 0, 0] {
        assert!(lab.sim.elapsed() < Duration::from_secs(60), "{:?} are not forgotten", left());
        lab.sim.step().unwrap();
        were_apart |= left().contains(&0) && left().contains(&200);
        let given = clusters.iter().flat_map(Cluster::members).map(|member| member.differed).max();
        assert_eq!(given, Some(0), "{:?} after {:?}", left(), lab.sim.elapsed());
    }
    assert!(were_apart);
}

/// These two print what `scripts/cluster-growth.py` draws.
#[test]
#[ignore = "takes minutes: scripts/cluster-growth.py runs it"]
fn growth_with_keys() {
    for keys in [100, 1_000, 10_000, 100_000, 1_000_000] {
        let records = records(keys);
        let mut lab = Lab::start(2, DAY, &records);
        lab.until_level(1);
        lab.steps(4_000);
        let idle = lab.idle(8);
        let (one, hundred) = (lab.level(keys, 1), lab.level(keys, 100));
        let state: usize = records.iter().map(|record| record.key.as_str().len() + VALUE.len()).sum();
        let state = state as u64 + STAMP_LEN * keys as u64;
        println!("TEST growth_keys keys={keys} idle_bytes_per_s={idle} one={one} hundred={hundred} state={state}");
    }
}

#[test]
#[ignore = "takes minutes: scripts/cluster-growth.py runs it"]
fn growth_with_nodes() {
    for nodes in [2, 4, 8, 16, 32, 64, 100] {
        println!("TEST growth_nodes nodes={nodes} idle_bytes_per_s={}", idle(nodes, 100));
    }
}
