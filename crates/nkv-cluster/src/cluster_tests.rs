//! Nodes with clocks and bounds of the test's own, over TCP.

use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicI64};
use std::task::{Context, Poll};
use std::time::Instant;

use nkv_core::{Action, Loaded, MemoryPersist, PersistError, PersistErrorKind, PersistValue};
use nkv_node::{ErrorKind, Node, Pattern, PutOptions};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::*;
use crate::MemberState;
use crate::clock::SystemClock;
use crate::link::{Line, Stream};
use crate::membership::{MembershipError, StaticPeers};
use crate::register::{Content, Head, Register};
use crate::replica::Want;
use crate::stamp::Hlc;
use crate::tree::{Half, Prefix};
use crate::wire::{Hello, Message, PREFIXES_MAX, State};

const PATIENCE: Duration = Duration::from_secs(30);

/// A clock that is off by a number of milliseconds.
#[derive(Debug)]
struct Skewed(SystemClock, AtomicI64);

impl Clock for Skewed {
    fn wall(&self) -> Millis {
        self.0.wall().saturating_add_signed(self.1.load(Relaxed))
    }

    fn steady(&self) -> Millis {
        self.0.steady()
    }
}

#[derive(Debug, Default)]
struct Memory(AtomicU64);

#[async_trait]
impl Bound for Memory {
    async fn load(&self) -> io::Result<Hlc> {
        Ok(Hlc(self.0.load(Relaxed)))
    }

    async fn store(&self, bound: Hlc) -> io::Result<()> {
        self.0.store(bound.0, Relaxed);
        Ok(())
    }
}

struct One {
    cluster: Cluster,
    node: Node,
    clock: Arc<Skewed>,
    bytes: Arc<AtomicU64>,
}

/// Storage that is full, for as long as that is said, and that never takes that the value of [`STUCK`] is gone.
#[derive(Debug)]
struct Full {
    disk: MemoryPersist,
    is_full: Arc<AtomicBool>,
    /// How often it did not take that.
    stuck: Arc<AtomicU64>,
    /// Changes in one batch, at most so far.
    batch_max: Arc<AtomicU64>,
}

const STUCK: &str = "stuck";

impl Full {
    fn new(disk: MemoryPersist) -> Self {
        Full { disk, is_full: Arc::default(), stuck: Arc::default(), batch_max: Arc::default() }
    }
}

impl PersistValue for Full {
    fn load(&mut self, visit: &mut dyn FnMut(StoredRef<'_>)) -> Result<Loaded, PersistError> {
        self.disk.load(visit)
    }

    fn persist(&mut self, batch: &[Change]) -> Result<(), PersistError> {
        let is_stuck = |change: &Change| change.key.as_str() == STUCK && matches!(change.action, Action::Delete { .. });
        let is_stuck = batch.iter().any(is_stuck);
        self.batch_max.fetch_max(batch.len() as u64, Relaxed);
        self.stuck.fetch_add(u64::from(is_stuck), Relaxed);
        match is_stuck || self.is_full.load(Relaxed) {
            true => Err(PersistError::new(PersistErrorKind::NoSpace, "the disk is full")),
            false => self.disk.persist(batch),
        }
    }

    fn keeps_meta(&self) -> bool {
        true
    }

    fn begin_epoch(&mut self, epoch: Epoch) -> Result<(), PersistError> {
        self.disk.begin_epoch(epoch)
    }
}

/// TCP that counts what is read and written, without the headers of packets.
#[derive(Debug)]
struct Counting(Tcp, Arc<AtomicU64>);

struct Counted(Box<dyn Stream>, Arc<AtomicU64>);

#[async_trait]
impl Network for Counting {
    async fn connect(&self, to: SocketAddr) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(Counted(self.0.connect(to).await?, Arc::clone(&self.1))))
    }

    async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(Counted(self.0.accept().await?, Arc::clone(&self.1))))
    }
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.0).poll_read(cx, buf);
        self.1.fetch_add((buf.filled().len() - before) as u64, Relaxed);
        read
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.0).poll_write(cx, bytes);
        if let Poll::Ready(Ok(len)) = &written {
            self.1.fetch_add(*len as u64, Relaxed);
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

/// Each test has a cluster of its own, named after its thread.
fn options() -> Options {
    Options::new(std::thread::current().name().unwrap_or("test"))
}

fn no_bound() -> Arc<dyn Bound> {
    Arc::new(Memory::default())
}

async fn start(skew: i64, bound: Arc<dyn Bound>, peers: &[SocketAddr]) -> One {
    start_with(skew, bound, peers, None, 100).await
}

async fn start_with(
    skew: i64,
    bound: Arc<dyn Bound>,
    peers: &[SocketAddr],
    disk: Option<Full>,
    interval_ms: u64,
) -> One {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    start_at(listener, skew, bound, peers, disk, interval_ms).await
}

async fn start_at(
    listener: TcpListener,
    skew: i64,
    bound: Arc<dyn Bound>,
    peers: &[SocketAddr],
    disk: Option<Full>,
    interval_ms: u64,
) -> One {
    let address = listener.local_addr().unwrap();
    let clock = Arc::new(Skewed(SystemClock, AtomicI64::new(skew)));
    let bytes = Arc::new(AtomicU64::new(0));
    let parts = Parts {
        clock: Arc::clone(&clock) as Arc<dyn Clock>,
        random: Arc::new(SystemRandom),
        bound,
        network: Arc::new(Counting(Tcp(listener), Arc::clone(&bytes))),
        membership: Arc::new(StaticPeers(peers.to_vec())),
    };
    let mut options = options();
    options.sync_interval = Duration::from_millis(interval_ms);
    options.advertise = Some(address);
    let cluster = Cluster::with(options, parts, address).unwrap();
    let builder = Node::builder().engine(cluster.clone());
    let builder = match disk {
        Some(disk) => builder.persist("sync", move || Ok(disk)),
        None => builder,
    };
    let node = builder.start().await.unwrap();
    eventually("it has a state", async || node.handle().health().await.is_ok()).await;
    One { cluster, node, clock, bytes }
}

async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(timeout(PATIENCE, wait).await.is_ok(), "not in {PATIENCE:?}: {what}");
}

impl One {
    fn register(&self, key: &str) -> Option<Head> {
        self.cluster.inner().replica().registers().get(&key.parse().unwrap()).cloned()
    }
}

#[tokio::test]
async fn a_node_whose_clock_is_ahead_refuses_writes_and_stamps_anew_what_it_wrote_alone() {
    let ahead = start(3_600_000, no_bound(), &[]).await;
    let nkv = ahead.node.handle();
    nkv.put("alone", "1").await.unwrap();
    let first = ahead.register("alone").unwrap().stamp.time;
    let other = start(0, no_bound(), &[ahead.cluster.address()]).await;
    eventually("the other has it", async || other.node.handle().exists("alone").await.unwrap()).await;
    let anew = other.register("alone").unwrap().stamp.time;
    let error = first.millis() - anew.millis();
    assert!((3_599_000..3_601_000).contains(&error), "stamped anew by {error} ms");
    assert_eq!(ahead.register("alone").unwrap().stamp.time, anew);

    let refused = nkv.put("k", "1").await.unwrap_err();
    assert_eq!(refused.kind(), &ErrorKind::Refused { status: 503 });
    let offset = ahead.cluster.clock_offset().unwrap();
    assert!(offset > 3_500_000 && refused.to_string().contains("ms ahead of its peers'"), "{offset}: {refused}");
    // The other one goes on; and so does this one when its clock is right, at once.
    other.node.handle().put("k", "2").await.unwrap();
    ahead.clock.1.store(0, Relaxed);
    eventually("it has that", async || nkv.exists("k").await.unwrap()).await;
    nkv.put("k", "3").await.unwrap();
    eventually("the last wins", async || {
        let all = other.node.handle().get_all(Pattern::All).await.unwrap();
        all.iter().any(|entry| entry.value == "3")
    })
    .await;
    // A clock that is set while a peer is there is noticed before a write is stamped with it.
    ahead.clock.1.store(7_200_000, Relaxed);
    assert!(nkv.put("k", "4").await.is_err());
}

#[tokio::test]
async fn a_node_that_cannot_store_new_stamps_says_so() {
    let disk = Full::new(MemoryPersist::new(Epoch::new(7)));
    let is_full = Arc::clone(&disk.is_full);
    let one = start_with(3_600_000, no_bound(), &[], Some(disk), 100).await;
    one.node.handle().put("k", "1").await.unwrap();
    one.clock.1.store(0, Relaxed);
    is_full.store(true, Relaxed);
    let error = one.cluster.inner().mend().await.unwrap_err();
    assert!(error.to_string().contains("cannot be stored"), "{error}");
    is_full.store(false, Relaxed);
    assert!(one.cluster.inner().mend().await.unwrap());
}

#[tokio::test]
async fn a_restart_with_a_clock_set_back_gives_no_old_stamps() {
    let bound = Arc::new(Memory::default());
    let before = start(0, Arc::clone(&bound) as Arc<dyn Bound>, &[]).await;
    before.node.handle().put("k", "1").await.unwrap();
    let first = before.register("k").unwrap().stamp.time;
    assert!(Hlc(bound.0.load(Relaxed)) >= first, "the bound is kept ahead of use");
    before.node.shutdown().await.unwrap();
    // Its data are lost, as far as a durability allows that.
    let after = start(-365 * 24 * 3_600_000, bound, &[]).await;
    after.node.handle().put("k", "2").await.unwrap();
    assert!(after.register("k").unwrap().stamp.time > first);
}

/// Stores a bound only when it is let.
#[derive(Debug)]
struct Slow {
    stored: AtomicU64,
    asked: AtomicU64,
    permits: tokio::sync::Semaphore,
}

#[async_trait]
impl Bound for Arc<Slow> {
    async fn load(&self) -> io::Result<Hlc> {
        Ok(Hlc(self.stored.load(Relaxed)))
    }

    async fn store(&self, bound: Hlc) -> io::Result<()> {
        self.asked.fetch_add(1, Relaxed);
        self.permits.acquire().await.unwrap().forget();
        self.stored.store(bound.0, Relaxed);
        Ok(())
    }
}

/// A clock that stands still until it is moved.
#[derive(Debug)]
struct Standing(AtomicU64);

impl Clock for Standing {
    fn wall(&self) -> Millis {
        self.0.load(Relaxed)
    }

    fn steady(&self) -> Millis {
        self.0.load(Relaxed)
    }
}

#[tokio::test]
async fn no_write_waits_for_the_bound_of_the_clock_while_there_is_room_below_it() {
    let (stored, asked) = (AtomicU64::new(0), AtomicU64::new(0));
    let slow = Arc::new(Slow { stored, asked, permits: tokio::sync::Semaphore::new(1) });
    let clock = Arc::new(Standing(AtomicU64::new(SystemClock.wall())));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let parts = Parts {
        clock: Arc::clone(&clock) as Arc<dyn Clock>,
        random: Arc::new(SystemRandom),
        bound: Arc::new(Arc::clone(&slow)),
        network: Arc::new(Tcp(listener)),
        membership: Arc::new(StaticPeers::default()),
    };
    let cluster = Cluster::with(options(), parts, address).unwrap();
    let node = Node::builder().engine(cluster.clone()).start().await.unwrap();
    let nkv = node.handle();
    eventually("it has a state", async || nkv.health().await.is_ok()).await;
    nkv.put("k", "1").await.unwrap();
    let bound = Hlc(slow.stored.load(Relaxed));
    assert_eq!(slow.asked.load(Relaxed), 1);
    // A little below it.
    clock.0.store(bound.millis() - 100, Relaxed);
    timeout(PATIENCE, nkv.put("k", "2")).await.expect("it waits for the bound").unwrap();
    eventually("the next one is stored", async || slow.asked.load(Relaxed) == 2).await;
    // And above it.
    clock.0.store(bound.millis() + 1, Relaxed);
    let writing = tokio::spawn({
        let nkv = node.handle();
        async move { nkv.put("k", "3").await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!writing.is_finished(), "the bound is kept ahead of use");
    slow.permits.add_permits(10);
    timeout(PATIENCE, writing).await.unwrap().unwrap().unwrap();
    let last = cluster.inner().replica().last_time();
    assert!(last > bound && Hlc(slow.stored.load(Relaxed)) >= last);
}

#[tokio::test]
async fn a_clock_that_was_never_set_harms_no_one() {
    let unset = -signed(SystemClock.wall()) + 5_000;
    let one = start(0, no_bound(), &[]).await;
    one.node.handle().put("k", "1").await.unwrap();
    let other = start(unset, no_bound(), &[one.cluster.address()]).await;
    other.node.handle().put("k", "2").await.unwrap();
    eventually("the later write wins", async || {
        let value = one.node.handle().get("k").await.unwrap().unwrap().value;
        value == "2"
    })
    .await;
    one.node.handle().put("l", "1").await.unwrap();
    eventually("it takes what others write", async || other.node.handle().exists("l").await.unwrap()).await;
    assert_eq!(one.cluster.clock_offset(), None);
}

#[tokio::test]
async fn a_node_whose_disk_was_full_is_level_once_there_is_room() {
    let one = start(0, no_bound(), &[]).await;
    let disk = Full::new(MemoryPersist::new(Epoch::new(7)));
    let is_full = Arc::clone(&disk.is_full);
    let other = start_with(0, no_bound(), &[one.cluster.address()], Some(disk), 100).await;
    let (a, b) = (one.node.handle(), other.node.handle());
    a.put("before", "1").await.unwrap();
    eventually("it comes", async || b.exists("before").await.unwrap()).await;
    is_full.store(true, Relaxed);
    for number in 0..20 {
        a.put(format!("k.{number}"), "1").await.unwrap();
    }
    a.delete("before").await.unwrap();
    assert!(b.put("mine", "1").await.is_err());
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(b.exists("before").await.unwrap() && !b.exists("k.*").await.unwrap() && !b.exists("mine").await.unwrap());
    is_full.store(false, Relaxed);
    eventually("it is level", async || !b.exists("before").await.unwrap() && b.list("k.*").await.unwrap().len() == 20)
        .await;
    b.put("mine", "2").await.unwrap();
    eventually("its writes reach the other", async || a.exists("mine").await.unwrap()).await;
}

/// The store has a write for a moment before the replica does: no record has the stamp of one write and the value of another.
#[tokio::test]
async fn what_is_given_while_a_key_is_written_is_a_write_as_it_was_done() {
    const PUTS: usize = 2_000;
    let one = start(0, no_bound(), &[]).await;
    let nkv = one.node.handle();
    nkv.put("k", "0").await.unwrap();
    let is_over = Arc::new(AtomicBool::new(false));
    let over = Arc::clone(&is_over);
    let writer = tokio::spawn(async move {
        for number in 1..=PUTS {
            nkv.put("k", number.to_string()).await.unwrap();
        }
        over.store(true, Relaxed);
    });
    let (inner, key) = (one.cluster.inner(), "k".parse::<Key>().unwrap());
    let slot = (crate::register::key_hash(&key), key);
    let mut seen = BTreeMap::new();
    while !is_over.load(Relaxed) {
        let record = inner.record(&*inner.store().unwrap(), &slot, inner.now()).await.unwrap().unwrap();
        let Register { stamp, content, hash } = record.register;
        assert_eq!(Register::new(stamp, content.clone()).hash, hash, "{stamp:?} has another value: {content:?}");
        seen.insert(stamp, hash);
        tokio::task::yield_now().await;
    }
    writer.await.unwrap();
    assert!(seen.len() > PUTS / 100, "{} of {PUTS} writes were looked at", seen.len());
}

fn with_ttl(millis: u64) -> PutOptions {
    PutOptions::default().with_ttl(Duration::from_millis(millis))
}

#[tokio::test]
async fn a_value_ends_also_while_jobs_keep_coming() {
    let one = start(0, no_bound(), &[]).await;
    let nkv = one.node.handle();
    nkv.put_with("k", "1", with_ttl(200)).await.unwrap();
    let inner = Arc::clone(one.cluster.inner());
    // More at any time than are taken at once.
    let busy = tokio::spawn(async move {
        for number in 0.. {
            let stamp = Stamp { time: Hlc::at(inner.wall()), node: NodeId(number) };
            let register = Register::new(stamp, Content::Put { value: "v".into(), ttl: None });
            inner.merge_later(vec![Record { key: "busy".parse().unwrap(), register }]).await.unwrap();
        }
    });
    eventually("it ends", async || !nkv.exists("k").await.unwrap()).await;
    busy.abort();
}

#[tokio::test]
async fn an_end_that_cannot_be_stored_holds_up_no_write() {
    const PUTS: u64 = 20;
    let disk = Full::new(MemoryPersist::new(Epoch::new(7)));
    let stuck = Arc::clone(&disk.stuck);
    let one = start_with(0, no_bound(), &[], Some(disk), 100).await;
    let nkv = one.node.handle();
    nkv.put_with(STUCK, "1", with_ttl(1)).await.unwrap();
    eventually("its end is tried", async || stuck.load(Relaxed) > 0).await;
    for number in 0..PUTS {
        nkv.put("k", number.to_string()).await.unwrap();
    }
    // It is tried again after a while, not after each write.
    let tried = stuck.load(Relaxed);
    assert!(tried < PUTS / 2, "{tried} times for {PUTS} writes");
    eventually("it is tried again", async || stuck.load(Relaxed) > tried).await;
}

#[tokio::test]
async fn a_delete_of_many_keys_is_stored_in_parts_and_what_became_of_it_is_said() {
    const KEYS: usize = 2_500;
    let disk = Full::new(MemoryPersist::new(Epoch::new(7)));
    let (is_full, batch_max) = (Arc::clone(&disk.is_full), Arc::clone(&disk.batch_max));
    let one = start_with(0, no_bound(), &[], Some(disk), 100).await;
    let nkv = one.node.handle();
    let put_all = async || {
        for number in 0..KEYS {
            nkv.put(format!("a.{number}"), "1").await.unwrap();
        }
    };
    put_all().await;
    assert_eq!(nkv.delete("a.*").await.unwrap().count, KEYS as u64);
    assert!(nkv.list("a.*").await.unwrap().is_empty());
    let batch_max = batch_max.load(Relaxed);
    assert!(batch_max < KEYS as u64 / 2, "{batch_max} keys at once");
    assert!(nkv.delete("a.*").await.unwrap().count == 0);

    // The last part cannot be stored, then none.
    put_all().await;
    nkv.put(STUCK, "1").await.unwrap();
    let failed = nkv.delete("*").await.unwrap_err();
    assert_eq!(failed.kind(), &ErrorKind::OutcomeUnknown, "{failed}");
    let left = nkv.list("*").await.unwrap().len();
    assert!((1..KEYS).contains(&left), "{left} are left");
    is_full.store(true, Relaxed);
    let failed = nkv.delete("*").await.unwrap_err();
    assert_eq!(failed.kind(), &ErrorKind::Refused { status: 503 }, "{failed}");
    assert_eq!(nkv.list("*").await.unwrap().len(), left);
}

/// A node in memory, of a membership and options of the test's own.
async fn start_in(options: Options, membership: impl Membership) -> (Cluster, Node) {
    let cluster = Cluster::bind("127.0.0.1:0".parse().unwrap(), options, membership).await.unwrap();
    let node = Node::builder().engine(cluster.clone()).start().await.unwrap();
    (cluster, node)
}

#[tokio::test]
async fn a_living_peer_that_has_a_second_address_keeps_both() {
    let one = start(0, no_bound(), &[]).await;
    let address = one.cluster.address();
    let forwarder = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let second_address = forwarder.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut from, _)) = forwarder.accept().await {
            let mut to = TcpStream::connect(address).await.unwrap();
            tokio::spawn(async move { copy_bidirectional(&mut from, &mut to).await });
        }
    });
    let mut options = options();
    (options.sync_interval, options.gc_grace) = (Duration::from_millis(20), Duration::from_millis(100));
    let (other, _node) = start_in(options, StaticPeers(vec![second_address])).await;
    let is_known = || other.inner().peers().addresses.values().any(|there| *there == address);
    eventually("it learns the first", async || is_known()).await;
    for _ in 0..30 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(is_known(), "it forgot the first");
    }
}

/// Says where nodes are, and at first where some were that are gone.
#[derive(Debug)]
struct Stale(Mutex<Vec<SocketAddr>>);

#[async_trait]
impl Membership for Stale {
    async fn addresses(&self) -> Result<Vec<SocketAddr>, MembershipError> {
        Ok(self.0.lock().unwrap().clone())
    }
}

#[tokio::test]
async fn nodes_that_each_began_alone_become_one_cluster_and_nothing_is_taken_for_deleted() {
    // Bound, so that no one else is given the port; no one listens there.
    let gone = tokio::net::TcpSocket::new_v4().unwrap();
    gone.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let membership = Arc::new(Stale(Mutex::new(vec![gone.local_addr().unwrap()])));
    let mut all = Vec::new();
    for number in 0..3 {
        let mut options = options();
        options.sync_interval = Duration::from_millis(20);
        let (cluster, node) = start_in(options, Arc::clone(&membership)).await;
        let nkv = node.handle();
        eventually("it begins", async || nkv.health().await.is_ok()).await;
        nkv.put(format!("own.{number}"), "1").await.unwrap();
        nkv.put("shared", number.to_string()).await.unwrap();
        all.push((cluster, node));
    }
    assert!(all.iter().all(|(cluster, _)| cluster.peers().is_empty()));
    *membership.0.lock().unwrap() = all.iter().map(|(cluster, _)| cluster.address()).collect();
    for (cluster, node) in &all {
        let nkv = node.handle();
        eventually("it has all", async || {
            let shared = nkv.get("shared").await.unwrap().unwrap().value;
            cluster.peers().len() == 2 && nkv.list("own.*").await.unwrap().len() == 3 && shared == "2"
        })
        .await;
        assert_eq!(cluster.brought_back(), 0);
    }
}

#[tokio::test]
async fn two_nodes_that_swap_their_addresses_stay_the_same_two() {
    let third = start(0, no_bound(), &[]).await;
    let known = [third.cluster.address()];
    let disks = [7, 8].map(|epoch| MemoryPersist::new(Epoch::new(epoch)));
    let disk = |number: usize| Some(Full::new(disks[number].clone()));
    let before =
        [start_with(0, no_bound(), &known, disk(0), 100).await, start_with(0, no_bound(), &known, disk(1), 100).await];
    let ids = before.each_ref().map(|one| one.cluster.id().unwrap());
    let addresses = before.each_ref().map(|one| one.cluster.address());
    for (number, one) in before.iter().enumerate() {
        one.node.handle().put(format!("before.{number}"), "1").await.unwrap();
    }
    for one in before {
        one.node.shutdown().await.unwrap();
    }
    let mut after = Vec::new();
    for number in 0..2 {
        let mut listener = None;
        eventually("the address is free", async || {
            listener = TcpListener::bind(addresses[1 - number]).await.ok();
            listener.is_some()
        })
        .await;
        after.push(start_at(listener.unwrap(), 0, no_bound(), &known, disk(number), 100).await);
    }
    for (number, one) in after.iter().enumerate() {
        assert_eq!(one.cluster.id(), Some(ids[number]));
        eventually("it takes writes", async || one.node.handle().put(format!("after.{number}"), "1").await.is_ok())
            .await;
    }
    eventually("all meet, and have all", async || {
        let members = third.cluster.members();
        let is_there = |number: usize| {
            members.iter().any(|member| {
                let is_joined = member.state == MemberState::Joined;
                member.id == ids[number] && member.address == Some(addresses[1 - number]) && is_joined
            })
        };
        let keys = third.node.handle().stats().await.unwrap().keys;
        members.len() == 2 && is_there(0) && is_there(1) && keys == 4
    })
    .await;
}

/// Answers some of the times that it is asked, and never the others.
#[derive(Debug)]
struct Hanging {
    peers: Vec<SocketAddr>,
    answers: u64,
    asked: AtomicU64,
}

#[async_trait]
impl Membership for Hanging {
    async fn addresses(&self) -> Result<Vec<SocketAddr>, MembershipError> {
        match self.asked.fetch_add(1, Relaxed) == self.answers {
            true => Ok(self.peers.clone()),
            false => std::future::pending().await,
        }
    }
}

#[tokio::test]
async fn where_peers_are_is_asked_again_if_there_is_no_answer() {
    let one = start(0, no_bound(), &[]).await;
    one.node.handle().put("k", "1").await.unwrap();
    let mut options = options();
    options.peer_timeout = Duration::from_millis(200);
    let membership = Hanging { peers: vec![one.cluster.address()], answers: 1, asked: AtomicU64::new(0) };
    let (_, node) = start_in(options, membership).await;
    eventually("it joins", async || node.handle().exists("k").await.unwrap_or(false)).await;
}

#[tokio::test]
async fn peers_are_met_while_it_is_asked_where_they_are() {
    let mut options = options();
    (options.sync_interval, options.peer_timeout) = (Duration::from_millis(20), PATIENCE);
    let membership = Arc::new(Hanging { peers: Vec::new(), answers: 0, asked: AtomicU64::new(0) });
    let (first, _node) = start_in(options, Arc::clone(&membership)).await;
    eventually("it is asked again", async || membership.asked.load(Relaxed) > 1).await;
    let other = start(0, no_bound(), &[first.address()]).await;
    let id = other.cluster.id().unwrap();
    eventually("it connects to the other too", async || first.inner().peers().links.contains_key(&id)).await;
}

/// A connection of a peer that says what a test has it say; what is answered to its hello.
async fn say_hello(one: &One, id: u64, run: u64) -> (Line, Message) {
    let stream = TcpStream::connect(one.cluster.address()).await.unwrap();
    let (mut line, writer) = Line::new(Box::new(stream), Box::leak(Box::default()), PATIENCE);
    tokio::spawn(writer);
    let hello = Hello {
        cluster: one.cluster.inner().options.cluster.clone(),
        id: NodeId(id),
        run,
        uptime: 0,
        wall: one.clock.wall(),
        address: None,
        has_joined: true,
        value_len_max: 1 << 20,
    };
    let answer = line.ask(&Message::Hello(hello)).await.unwrap();
    (line, answer)
}

async fn greet(one: &One) -> Line {
    greet_as(one, 77).await
}

async fn greet_as(one: &One, id: u64) -> Line {
    let (mut line, answer) = say_hello(one, id, 1).await;
    assert!(matches!(answer, Message::Hello(_)));
    line.allow(1 << 20);
    line.send(Message::Ready { wall: one.clock.wall() }.encode()).await.unwrap();
    line
}

async fn begin_session(one: &One, line: &mut Line) {
    let state = State { wall: one.clock.wall(), place: Place::default(), root: 0, contact: None, has_joined: true };
    assert!(matches!(line.ask(&Message::Sync(state)).await.unwrap(), Message::SyncAnswer(_)));
}

/// A node that was cut off and killed was taken for a second living one when it came again, and took no writes for 10 s and more:
/// the end of its connection had been lost.
#[tokio::test]
async fn a_node_that_was_restarted_while_it_was_cut_off_is_no_second_living_one() {
    let one = start(0, no_bound(), &[]).await;
    let mut old = greet(&one).await;
    let interval = one.cluster.inner().options.sync_interval;
    let refused = async || match say_hello(&one, 77, 2).await.1 {
        Message::Refused { is_duplicate, .. } => Some(is_duplicate),
        _ => None,
    };
    for _ in 0..3 {
        assert_eq!(refused().await, Some(false));
        tokio::time::sleep(interval).await;
    }
    // Once it is heard of, it lives.
    eventually("two live", async || {
        assert!(matches!(old.ask(&Message::WhoElse).await.unwrap(), Message::Known(_)));
        refused().await == Some(true)
    })
    .await;
    drop(old);
    eventually("the old one has ended", async || refused().await.is_none()).await;
}

#[tokio::test]
async fn a_peer_that_begins_a_session_anew_leads_that_one() {
    let one = start(0, no_bound(), &[]).await;
    let mut line = greet(&one).await;
    for _ in 0..2 {
        begin_session(&one, &mut line).await;
        assert!(one.cluster.inner().peers().led_by.contains(&NodeId(77)));
    }
    line.ask(&Message::End { at: 0, is_whole: false }).await.unwrap();
    eventually("it ends", async || one.cluster.inner().peers().led_by.is_empty()).await;
}

/// A node that had been away was given the same by each of its four peers, and twice: by the session that it led, and by theirs.
#[tokio::test]
async fn what_differs_is_levelled_with_one_peer_after_another() {
    let one = start(0, no_bound(), &[]).await;
    one.node.handle().put("k", "1").await.unwrap();
    let (mut first, mut second, mut empty) = (greet(&one).await, greet_as(&one, 78).await, greet_as(&one, 79).await);
    let root = one.cluster.digest();
    let sync = async |line: &mut Line, root, has_joined| {
        let state = State { wall: one.clock.wall(), place: Place::default(), root, contact: None, has_joined };
        match line.ask(&Message::Sync(state)).await.unwrap() {
            Message::SyncAnswer(_) => true,
            Message::Busy => false,
            other => panic!("{other:?}"),
        }
    };
    assert!(sync(&mut first, 0, true).await);
    assert!(!sync(&mut second, 0, true).await);
    // Neither one that is level waits for that, nor one that has nothing.
    assert!(sync(&mut second, root, true).await);
    assert!(sync(&mut empty, 0, false).await);
    // The next one's turn is when it ends, however it does.
    first.ask(&Message::End { at: 0, is_whole: false }).await.unwrap();
    assert!(sync(&mut second, 0, true).await);
    assert!(!sync(&mut first, 0, true).await);
    drop(second);
    eventually("the lost one holds up no other", async || sync(&mut first, 0, true).await).await;
}

/// The puts of a node waited for up to 0.3 s while it gave its state to a new one: each frame was one turn of their thread, and a put
/// needs several turns.
#[tokio::test]
async fn giving_a_state_leaves_turns_to_what_else_there_is_to_do() {
    const KEYS: usize = 4_000;
    let one = start(0, no_bound(), &[]).await;
    let put = |number| nkv_node::Op::Put {
        key: format!("k.{number}").parse().unwrap(),
        value: "1".into(),
        options: nkv_core::PutOptions::default(),
    };
    one.node.handle().write((0..KEYS).map(put).collect()).await.unwrap();
    let mut line = greet(&one).await;
    begin_session(&one, &mut line).await;
    let turns = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&turns);
    let other = tokio::spawn(async move {
        loop {
            counted.fetch_add(1, Relaxed);
            tokio::task::yield_now().await;
        }
    });
    line.send(Message::List(vec![(Prefix::ROOT, Vec::new())]).encode()).await.unwrap();
    let (mut given, before) = (0, turns.load(Relaxed));
    while let Message::Records(records) = line.receive().await.unwrap() {
        given += records.len();
    }
    let turns = turns.load(Relaxed) - before;
    other.abort();
    assert_eq!(given, KEYS);
    assert!(turns >= KEYS as u64 / 64, "{turns} turns");
}

#[tokio::test]
async fn a_peer_that_asks_for_too_much_at_once_is_refused() {
    let one = start(0, no_bound(), &[]).await;
    let prefixes = |count| vec![Prefix::ROOT.child(3); count];
    let digests = |count| Message::Digests(Half::Low, prefixes(count));
    let list = |count| Message::List(prefixes(count).into_iter().map(|prefix| (prefix, Vec::new())).collect());
    for what in [&digests as &dyn Fn(usize) -> Message, &list] {
        let mut line = greet(&one).await;
        begin_session(&one, &mut line).await;
        assert!(matches!(line.ask(&what(PREFIXES_MAX)).await.unwrap(), Message::Children(_) | Message::Wants(_)));
        let answer = line.ask(&what(PREFIXES_MAX + 1)).await;
        assert!(answer.is_err(), "{answer:?}");
    }
}

#[tokio::test]
async fn a_peer_that_wants_more_than_was_listed_is_refused() {
    for (count, is_given) in [(1, true), (2, false)] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let cluster = options().cluster;
        let peer = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let (mut line, writer) = Line::new(Box::new(stream), Box::leak(Box::default()), PATIENCE);
            tokio::spawn(writer);
            let Message::Hello(theirs) = line.receive().await.unwrap() else { panic!() };
            let hello = Hello { cluster, id: NodeId(77), run: 1, address: None, has_joined: true, ..theirs };
            assert!(matches!(line.ask(&Message::Hello(hello)).await.unwrap(), Message::Ready { .. }));
            line.allow(1 << 20);
            while let Ok(message) = line.receive().await {
                let answer = match message {
                    Message::WhoElse => Message::Known(Vec::new()),
                    Message::Sync(theirs) => {
                        let root = theirs.root.min(1);
                        Message::SyncAnswer(State { root, contact: None, has_joined: true, ..theirs })
                    }
                    Message::List(lists) => {
                        let key_hash = lists[0].1[0].key_hash;
                        Message::Wants(vec![Want { key_hash, lacks: false }; count])
                    }
                    Message::End { .. } => Message::Ended { is_whole: true },
                    Message::Records(_) => return true,
                    _ => continue,
                };
                line.send(answer.encode()).await.unwrap();
            }
            false
        });
        let one = start(0, no_bound(), &[address]).await;
        one.node.handle().put("k", "1").await.unwrap();
        assert_eq!(timeout(PATIENCE, peer).await.unwrap().unwrap(), is_given, "{count} keys");
    }
}

#[tokio::test]
async fn two_nodes_take_turns_and_one_that_does_not_is_not_waited_for() {
    const INTERVAL: u64 = 60_000;
    let one = start_with(0, no_bound(), &[], None, INTERVAL).await;
    let _line = greet(&one).await;
    let inner = one.cluster.inner();
    let now = inner.steady();
    let rest = |was_led_here, led_at| {
        let level = Some(Level { at: now, was_led_here });
        inner.peers().connected.get_mut(&NodeId(77)).unwrap().level = level;
        millis(meeting::rest(inner, NodeId(77), led_at))
    };
    eventually("it is connected", async || inner.peers().connected.contains_key(&NodeId(77))).await;
    assert!((INTERVAL / 2..=INTERVAL).contains(&rest(false, now)), "its turn is after an interval");
    assert!((INTERVAL + 1..=INTERVAL * 3 / 2).contains(&rest(true, now)), "the other's turn is before");
    assert_eq!(rest(true, now.saturating_sub(INTERVAL * 5 / 2)), 0, "its own connection has been silent");
}

/// 100,000 keys of 100 bytes, 1,000 of which change while a node is away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_was_away_is_level_for_few_bytes() {
    const KEYS: u64 = 100_000;
    const CHANGES: u64 = 1_000;
    let one = start_with(0, no_bound(), &[], None, 1_000).await;
    let records: Vec<Record> = (0..KEYS)
        .map(|number| {
            let stamp = Stamp { time: Hlc::at(one.clock.wall() - 1_000), node: NodeId(number) };
            let content = Content::Put { value: vec![b'v'; 100].into(), ttl: None };
            Record { key: format!("key.{number}").parse().unwrap(), register: Register::new(stamp, content) }
        })
        .collect();
    for part in records.chunks(1_000) {
        assert_eq!(one.cluster.inner().merge(part.to_vec()).await.unwrap(), Some(0));
    }
    let disk = MemoryPersist::new(Epoch::new(7));
    let full = || Full::new(disk.clone());
    let peers = [one.cluster.address()];
    let began = Instant::now();
    let other = start_with(0, no_bound(), &peers, Some(full()), 1_000).await;
    println!("TEST join_100000_keys_ms = {}", began.elapsed().as_millis());
    println!("TEST join_100000_keys_bytes = {}", other.bytes.load(Relaxed));
    // The first state that it has is whole.
    assert_eq!(other.node.handle().stats().await.unwrap().keys, KEYS);
    eventually("it is level", async || one.cluster.digest() == other.cluster.digest()).await;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let idle = other.bytes.load(Relaxed);
    tokio::time::sleep(Duration::from_secs(4)).await;
    let idle = other.bytes.load(Relaxed) - idle;
    println!("TEST idle_bytes_per_s_and_peer = {}", idle / 4);
    assert!(idle <= 1 << 16, "{idle} bytes where nothing differs");
    other.node.shutdown().await.unwrap();
    drop(other.cluster);

    for number in 0..CHANGES {
        one.node.handle().put(format!("key.{}", number * (KEYS / CHANGES)), vec![b'w'; 100]).await.unwrap();
    }
    let began = Instant::now();
    let other = start_with(0, no_bound(), &peers, Some(full()), 1_000).await;
    eventually("it is level", async || one.cluster.digest() == other.cluster.digest()).await;
    println!("TEST away_1000_changes_ms = {}", began.elapsed().as_millis());
    let bytes = other.bytes.load(Relaxed);
    println!("TEST away_1000_changes_bytes = {bytes}");
    let data = CHANGES * ("key.99999".len() as u64 + 100 + 16);
    assert!(bytes <= 3 * data, "{bytes} bytes for {data} bytes of data");
}

/// For a network namespace in which nothing else is: `unshare -n sh -c 'ip link set lo up; …'`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures the loopback interface, and takes half a minute"]
async fn five_idle_nodes_on_a_loopback_of_their_own() {
    let mut nodes: Vec<One> = Vec::new();
    for _ in 0..5 {
        let peers: Vec<SocketAddr> = nodes.iter().map(|one| one.cluster.address()).collect();
        nodes.push(start_with(0, no_bound(), &peers, None, 1_000).await);
    }
    for number in 0..1_000 {
        nodes[0].node.handle().put(format!("k.{number}"), vec![b'x'; 100]).await.unwrap();
    }
    eventually("all are level", async || {
        let digest = nodes[0].cluster.digest();
        nodes.iter().all(|one| one.cluster.peers().len() == 4 && one.cluster.digest() == digest)
    })
    .await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let sent = || -> u64 {
        // Of the namespace that the process is in: bytes sent are the tenth word.
        let text = std::fs::read_to_string("/proc/self/net/dev").unwrap();
        let line = text.lines().find(|line| line.trim_start().starts_with("lo:")).unwrap();
        line.split_whitespace().nth(9).unwrap().parse().unwrap()
    };
    let (before, began) = (sent(), Instant::now());
    tokio::time::sleep(Duration::from_secs(20)).await;
    let each_second = (sent() - before) as f64 / began.elapsed().as_secs_f64();
    println!("TEST idle_loopback_bytes_per_s_and_node = {:.0}", each_second / 5.0);
}
