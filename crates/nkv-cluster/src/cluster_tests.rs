//! Nodes with clocks and bounds of the test's own, over TCP.

use std::sync::atomic::AtomicI64;

use nkv_node::{ErrorKind, Node, Pattern};
use tokio::time::timeout;

use super::*;
use crate::clock::SystemClock;
use crate::membership::StaticPeers;
use crate::register::Register;
use crate::stamp::Hlc;

const PATIENCE: Duration = Duration::from_secs(30);

/// A clock that is off by so many milliseconds.
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
}

async fn start(skew: i64, bound: Arc<Memory>, peers: &[SocketAddr]) -> One {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let clock = Arc::new(Skewed(SystemClock::new(), AtomicI64::new(skew)));
    let parts = Parts {
        clock: Arc::clone(&clock) as Arc<dyn Clock>,
        random: Arc::new(SystemRandom),
        bound,
        network: Arc::new(Tcp(listener)),
        membership: Arc::new(StaticPeers(peers.to_vec())),
    };
    let mut options = Options::new("test");
    options.sync_interval = Duration::from_millis(100);
    options.advertise = Some(address);
    let cluster = Cluster::with(options, parts, address).unwrap();
    let node = Node::builder().engine(cluster.clone()).start().await.unwrap();
    eventually("it has a state", async || node.handle().health().await.is_ok()).await;
    One { cluster, node, clock }
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
    fn register(&self, key: &str) -> Option<Register> {
        self.cluster.inner().replica().registers().get(&key.parse().unwrap()).cloned()
    }
}

#[tokio::test]
async fn a_node_whose_clock_is_ahead_refuses_writes_and_stamps_anew_what_it_wrote_alone() {
    let ahead = start(3_600_000, Arc::default(), &[]).await;
    let nkv = ahead.node.handle();
    nkv.put("alone", "1").await.unwrap();
    let first = ahead.register("alone").unwrap().stamp.time;
    let other = start(0, Arc::default(), &[ahead.cluster.address()]).await;
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
async fn a_restart_with_a_clock_set_back_gives_no_old_stamps() {
    let bound = Arc::new(Memory::default());
    let before = start(0, Arc::clone(&bound), &[]).await;
    before.node.handle().put("k", "1").await.unwrap();
    let first = before.register("k").unwrap().stamp.time;
    assert!(Hlc(bound.0.load(Relaxed)) >= first, "the bound is kept ahead of use");
    before.node.shutdown().await.unwrap();
    // Its data are lost, as far as a durability allows that.
    let after = start(-365 * 24 * 3_600_000, bound, &[]).await;
    after.node.handle().put("k", "2").await.unwrap();
    assert!(after.register("k").unwrap().stamp.time > first);
}

#[tokio::test]
async fn a_clock_that_was_never_set_harms_no_one() {
    let unset = -signed(SystemClock::new().wall()) + 5_000;
    let one = start(0, Arc::default(), &[]).await;
    one.node.handle().put("k", "1").await.unwrap();
    let other = start(unset, Arc::default(), &[one.cluster.address()]).await;
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
