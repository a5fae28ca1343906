//! Nodes of one process that talk over TCP.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nkv_cluster::{Cluster, Keys, MemberEvent, MemberState, Membership, MembershipError, NodeId, Options, StaticPeers};
use nkv_node::nkv_core::{self, Action, Change, Epoch, MemoryPersist, Meta, PersistValue, Reason, StoredRef};
use nkv_node::{ErrorKind, Event, GoneReason, Handle, Node, Op, PutOptions, Revision};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);

const LOCAL: &str = "127.0.0.1:0";

/// Each test has a cluster of its own, named after its thread: nodes of two that meet by a port that one gave back refuse each other.
fn options() -> Options {
    let mut options = Options::new(std::thread::current().name().unwrap_or("test"));
    options.sync_interval = Duration::from_millis(200);
    options
}

async fn bind(options: Options, peers: &[SocketAddr]) -> Cluster {
    Cluster::bind(LOCAL.parse().unwrap(), options, StaticPeers(peers.to_vec())).await.unwrap()
}

async fn start(cluster: &Cluster) -> Node {
    Node::builder().engine(cluster.clone()).start().await.unwrap()
}

async fn start_with(cluster: &Cluster, disk: &MemoryPersist) -> Node {
    let disk = disk.clone();
    Node::builder().persist("sync", move || Ok(disk)).engine(cluster.clone()).start().await.unwrap()
}

/// What a copy of a directory is.
fn copy_of(disk: &MemoryPersist) -> MemoryPersist {
    let (mut changes, mut original) = (Vec::new(), disk.clone());
    let take = &mut |stored: StoredRef<'_>| {
        let action = match stored.record() {
            Some(record) => Action::Put { value: record.value.to_bytes(), expiry: None },
            None => Action::Delete { reason: Reason::Deleted },
        };
        let (key, revision, meta) = (stored.key().to_key(), stored.revision(), Meta::from(stored.meta()));
        changes.push(Change { key, revision, replaces: nkv_core::Revision::ZERO, action, meta });
    };
    let loaded = original.load(take).unwrap();
    changes.sort_by_key(|change| change.revision);
    let mut copy = MemoryPersist::new(loaded.epoch);
    copy.load(&mut |_| ()).unwrap();
    copy.persist(&changes).unwrap();
    copy
}

async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(timeout(PATIENCE, wait).await.is_ok(), "not in {PATIENCE:?}: {what}");
}

async fn ready(node: &Node) -> Handle {
    let handle = node.handle();
    eventually("the node has a state", async || handle.health().await.is_ok()).await;
    handle
}

async fn value(nkv: &Handle, key: &str) -> Option<String> {
    let entry = nkv.get(key).await.unwrap();
    entry.map(|entry| String::from_utf8(entry.value.to_vec()).unwrap())
}

async fn is_at(nkv: &Handle, key: &str, expected: Option<&str>) {
    eventually(&format!("{key} is {expected:?}"), async || value(nkv, key).await.as_deref() == expected).await;
}

async fn two() -> ([Cluster; 2], [Node; 2], [Handle; 2]) {
    let first = bind(options(), &[]).await;
    let second = bind(options(), &[first.address()]).await;
    let nodes = [start(&first).await, start(&second).await];
    let handles = [ready(&nodes[0]).await, ready(&nodes[1]).await];
    ([first, second], nodes, handles)
}

async fn stop(nodes: impl IntoIterator<Item = Node>) {
    for node in nodes {
        timeout(PATIENCE, node.shutdown()).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn two_nodes_converge_and_each_reads_its_own_writes() {
    let (clusters, nodes, [a, b]) = two().await;
    for number in 0..20 {
        let text = number.to_string();
        a.put("seen", text.as_str()).await.unwrap();
        assert_eq!(value(&a, "seen").await, Some(text), "a client does not see its own write");
    }
    is_at(&b, "seen", Some("19")).await;
    assert_eq!(b.delete("seen").await.unwrap().count, 1);
    assert_eq!(value(&b, "seen").await, None);
    is_at(&a, "seen", None).await;
    assert_eq!(a.delete("seen").await.unwrap().count, 0);

    for name in ["branch", "branch.a", "branch.b.c", "branches"] {
        a.put(name, "1").await.unwrap();
    }
    is_at(&b, "branches", Some("1")).await;
    assert_eq!(b.delete("branch.*").await.unwrap().count, 2);
    is_at(&a, "branch.b.c", None).await;
    assert!(a.exists("branch").await.unwrap() && !a.exists("branch.*").await.unwrap());
    eventually("digests are equal", async || clusters[0].digest() == clusters[1].digest()).await;
    assert_ne!(clusters[0].digest(), 0);
    assert_eq!(
        (clusters[0].peers(), clusters[1].peers()),
        (clusters[1].id().into_iter().collect(), clusters[0].id().into_iter().collect())
    );
    stop(nodes).await;
}

#[tokio::test]
async fn nodes_that_have_ipv6_alone_are_one_member_each() {
    let bind = async |peers: &[SocketAddr]| {
        let address = "[::1]:0".parse().unwrap();
        Cluster::bind(address, options(), StaticPeers(peers.to_vec())).await
    };
    let Ok(first) = bind(&[]).await else {
        println!("SKIPPED: there is no IPv6 here");
        assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "there is no IPv6");
        return;
    };
    let second = bind(&[first.address()]).await.unwrap();
    let nodes = [start(&first).await, start(&second).await];
    let [a, b] = [ready(&nodes[0]).await, ready(&nodes[1]).await];
    a.put("k", "1").await.unwrap();
    is_at(&b, "k", Some("1")).await;
    eventually("each knows the other by its address", async || {
        let address = |cluster: &Cluster| cluster.members().iter().map(|member| member.address).collect::<Vec<_>>();
        address(&first) == [Some(second.address())] && address(&second) == [Some(first.address())]
    })
    .await;
    stop(nodes).await;
}

/// A node has an address of each family, and others find it by both.
#[tokio::test]
async fn a_node_that_is_found_by_addresses_of_both_families_is_one_member() {
    let Ok(first) = Cluster::bind("[::]:0".parse().unwrap(), options(), StaticPeers::default()).await else {
        println!("SKIPPED: there is no IPv6 here");
        assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "there is no IPv6");
        return;
    };
    let port = first.address().port();
    let both = [SocketAddr::from(([127, 0, 0, 1], port)), SocketAddr::new(std::net::Ipv6Addr::LOCALHOST.into(), port)];
    let mut of_second = options();
    of_second.peer_timeout = Duration::from_millis(500);
    let second = bind(of_second, &both).await;
    let nodes = [start(&first).await, start(&second).await];
    let [a, b] = [ready(&nodes[0]).await, ready(&nodes[1]).await];
    a.put("k", "1").await.unwrap();
    is_at(&b, "k", Some("1")).await;
    let mut events = second.events();
    assert_eq!(timeout(PATIENCE, events.next()).await.unwrap(), Some(MemberEvent::NodeJoined(first.id().unwrap())));
    // Some attempts later it is so still.
    assert!(timeout(Duration::from_secs(2), events.next()).await.is_err());
    for (cluster, other) in [(&first, &second), (&second, &first)] {
        assert_eq!(cluster.members().iter().map(|member| Some(member.id)).collect::<Vec<_>>(), [other.id()]);
        assert_eq!(cluster.peers().len(), 1);
    }
    // A node that is reached at every address of its host does not say that it is at none.
    assert_eq!(second.members()[0].address, None);
    stop(nodes).await;
}

/// Two hosts have a bridge of the same address, and their nodes say that they are there.
#[tokio::test]
async fn nodes_that_say_the_same_wrong_address_are_two_members_and_have_the_same() {
    // Nothing listens there.
    let bridge = tokio::net::TcpSocket::new_v4().unwrap();
    bridge.bind(LOCAL.parse().unwrap()).unwrap();
    let first = bind(options(), &[]).await;
    let mut wrong = options();
    wrong.advertise = bridge.local_addr().ok();
    let [second, third] = [bind(wrong.clone(), &[first.address()]).await, bind(wrong, &[first.address()]).await];
    let nodes = [start(&first).await, start(&second).await, start(&third).await];
    let handles = [ready(&nodes[0]).await, ready(&nodes[1]).await, ready(&nodes[2]).await];
    handles[1].put("k.1", "1").await.unwrap();
    handles[2].put("k.2", "2").await.unwrap();
    for nkv in &handles {
        is_at(nkv, "k.1", Some("1")).await;
        is_at(nkv, "k.2", Some("2")).await;
    }
    let ids: BTreeSet<_> = [&second, &third].iter().filter_map(|cluster| cluster.id()).collect();
    assert_eq!(first.members().iter().map(|member| member.id).collect::<BTreeSet<_>>(), ids);
    assert!(first.members().iter().all(|member| member.state == MemberState::Joined));
    let mut events = first.events();
    for _ in 0..2 {
        assert!(matches!(timeout(PATIENCE, events.next()).await.unwrap(), Some(MemberEvent::NodeJoined(_))));
    }
    assert!(timeout(Duration::from_secs(1), events.next()).await.is_err(), "members come and go");
    stop(nodes).await;
}

/// What is logged by all tests.
#[derive(Clone, Debug, Default)]
struct Logged(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Logged {
    fn write(&mut self, part: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(part);
        Ok(part.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A node was away for longer than deletes are remembered, and lacks what was written meanwhile: it may have been deleted there.
#[tokio::test]
async fn what_may_bring_back_a_deleted_key_is_counted_and_few_are_named_in_short_lines() {
    const KEYS: usize = 3_000;
    let logged = Logged::default();
    let writer = logged.clone();
    tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).init();
    let mut options = options();
    options.gc_grace = Duration::from_millis(300);
    let first = bind(options.clone(), &[]).await;
    let disk = MemoryPersist::new(Epoch::new(1));
    let second = bind(options.clone(), &[first.address()]).await;
    let (node, other) = (start(&first).await, start_with(&second, &disk).await);
    let [a, b] = [ready(&node).await, ready(&other).await];
    a.put("k", "1").await.unwrap();
    is_at(&b, "k", Some("1")).await;
    let id = second.id().unwrap();
    let has_contact = |cluster: &Cluster| cluster.members().iter().any(|member| member.contact.is_some());
    eventually("both had the same", async || has_contact(&first) && has_contact(&second)).await;
    stop([other]).await;
    // Each is longer than a line is to name, and has what would be a line of its own.
    let name = |number: usize| format!("long.\u{202e}{number:05}{}", "x".repeat(500));
    for numbers in (0..KEYS).collect::<Vec<_>>().chunks(500) {
        let put = |number: &usize| {
            let key = name(*number).parse().unwrap();
            Op::Put { key, value: "v".into(), options: nkv_core::PutOptions::default() }
        };
        a.write(numbers.iter().map(put).collect()).await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(first.brought_back(), 0);
    let began = Instant::now();
    let second = bind(options, &[first.address()]).await;
    let other = start_with(&second, &disk).await;
    let b = ready(&other).await;
    is_at(&b, &name(KEYS - 1), Some("v")).await;
    eventually("all came", async || first.digest() == second.digest()).await;
    assert_eq!((second.id(), first.brought_back()), (Some(id), KEYS as u64));
    assert_eq!(a.stats().await.unwrap().numbers["cluster_brought_back"], KEYS as u64);
    let logged = String::from_utf8(logged.0.lock().unwrap().clone()).unwrap();
    let lines: Vec<&str> = logged.lines().filter(|line| line.contains("may bring back")).collect();
    assert!((1..=1 + began.elapsed().as_secs() as usize).contains(&lines.len()), "{} lines", lines.len());
    for line in lines {
        assert!(line.contains(r#""long.\u{202e}0"#) && line.contains(" more"), "{line}");
        assert!(line.len() < 2_000 && !line.contains('\u{202e}'), "{} bytes: {line}", line.len());
    }
    stop([node, other]).await;
}

#[tokio::test]
async fn an_address_that_no_other_host_can_reach_is_not_advertised() {
    for wrong in ["0.0.0.0:7000", "[::]:7000", "127.0.0.1:0"] {
        let mut options = options();
        options.advertise = wrong.parse().ok();
        let refused = Cluster::bind(LOCAL.parse().unwrap(), options, StaticPeers::default()).await.unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::InvalidInput, "{wrong}");
    }
}

#[tokio::test]
async fn a_batch_is_whole_on_its_node_and_conditions_are_refused_unless_asked_for() {
    let (_, nodes, [a, b]) = two().await;
    let put = |name: &str| Op::Put { key: name.parse().unwrap(), value: "1".into(), options: Default::default() };
    let mut changes = a.changes(None).unwrap();
    a.write(vec![put("batch.a"), put("batch.b"), put("batch.a")]).await.unwrap();
    let group = timeout(PATIENCE, changes.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(group.changes.len(), 2);
    is_at(&b, "batch.b", Some("1")).await;
    let absent = PutOptions::default().with_if_revision(Revision::ZERO);
    let refused = a.put_with("lock", "a", absent).await.unwrap_err();
    assert_eq!(refused.kind(), &ErrorKind::Refused { status: 501 });
    stop(nodes).await;

    let mut local = options();
    local.local_conditions = true;
    let cluster = bind(local, &[]).await;
    let node = start(&cluster).await;
    let nkv = ready(&node).await;
    let revision = nkv.put_with("lock", "a", absent).await.unwrap();
    assert!(matches!(nkv.put_with("lock", "b", absent).await.unwrap_err().kind(), ErrorKind::Conflict { .. }));
    let at = PutOptions::default().with_if_revision(revision);
    nkv.put_with("lock", "c", at).await.unwrap();
    assert!(matches!(nkv.put_with("lock", "d", at).await.unwrap_err().kind(), ErrorKind::Conflict { .. }));
    assert_eq!(value(&nkv, "lock").await.as_deref(), Some("c"));
    stop([node]).await;
}

#[tokio::test]
async fn a_value_with_a_ttl_ends_everywhere() {
    let (_, nodes, [a, b]) = two().await;
    let mut events = b.subscribe("ttl").await.unwrap();
    a.put_with("ttl", "1", PutOptions::default().with_ttl(Duration::from_millis(700))).await.unwrap();
    loop {
        match timeout(PATIENCE, events.next()).await.unwrap() {
            Some(Event::Gone { reason: GoneReason::Expired, .. }) => break,
            Some(Event::Update { .. } | Event::Synced { .. }) => {}
            other => panic!("the value does not expire: {other:?}"),
        }
    }
    is_at(&a, "ttl", None).await;
    stop(nodes).await;
}

#[tokio::test]
async fn what_was_missed_comes_after_a_restart_and_the_id_is_kept() {
    let disk = MemoryPersist::new(Epoch::new(9));
    let other = bind(options(), &[]).await;
    let other_node = start(&other).await;
    let nkv = ready(&other_node).await;
    let first = bind(options(), &[other.address()]).await;
    let node = start_with(&first, &disk).await;
    let handle = ready(&node).await;
    for name in ["kept", "gone", "changed"] {
        handle.put(name, "1").await.unwrap();
        is_at(&nkv, name, Some("1")).await;
    }
    let (id, epoch) = (first.id(), handle.stats().await.unwrap().epoch);
    stop([node]).await;
    drop(first);
    nkv.delete("gone").await.unwrap();
    nkv.put("changed", "2").await.unwrap();

    let again = bind(options(), &[other.address()]).await;
    let node = start_with(&again, &disk).await;
    let handle = node.handle();
    // From storage, before a peer is asked.
    assert!(handle.exists("kept").await.unwrap());
    is_at(&handle, "changed", Some("2")).await;
    is_at(&handle, "gone", None).await;
    is_at(&handle, "kept", Some("1")).await;
    assert_eq!((again.id(), handle.stats().await.unwrap().epoch), (id, epoch));
    stop([node, other_node]).await;
}

#[tokio::test]
async fn another_cluster_and_a_second_living_node_of_an_id_are_refused_by_name() {
    let first = bind(options(), &[]).await;
    let node = start(&first).await;
    let nkv = ready(&node).await;
    nkv.put("a", "1").await.unwrap();
    let mut elsewhere = options();
    (elsewhere.cluster, elsewhere.join_timeout) = ("other".into(), Duration::from_millis(300));
    let foreign = bind(elsewhere, &[first.address()]).await;
    let foreign_node = start(&foreign).await;
    let foreign_nkv = ready(&foreign_node).await;
    foreign_nkv.put("b", "1").await.unwrap();
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert!(foreign.peers().is_empty() && first.peers().is_empty());
    assert!(!nkv.exists("b").await.unwrap() && !foreign_nkv.exists("a").await.unwrap());
    stop([foreign_node]).await;

    // Two nodes of one disk: the second one takes no writes, and says why.
    let disk = MemoryPersist::new(Epoch::new(9));
    let original = bind(options(), &[first.address()]).await;
    let original_node = start_with(&original, &disk).await;
    let original_nkv = ready(&original_node).await;
    original_nkv.put("c", "1").await.unwrap();
    is_at(&nkv, "c", Some("1")).await;
    // Copying takes the disk over: the original begins again after it.
    let id = original.id().unwrap();
    stop([original_node]).await;
    drop(original);
    let copied = copy_of(&disk);
    eventually("the original is gone", async || !first.peers().contains(&id)).await;
    let original = bind(options(), &[first.address()]).await;
    let original_node = start_with(&original, &disk).await;
    eventually("the original is back", async || first.peers().contains(&id)).await;
    let copy = bind(options(), &[first.address()]).await;
    let copy_node = start_with(&copy, &copied).await;
    let copy_nkv = ready(&copy_node).await;
    eventually("the copy is refused", async || match copy_nkv.put("d", "1").await {
        Ok(_) => false,
        Err(error) => {
            assert!(error.to_string().contains(&id.to_string()), "{error}");
            true
        }
    })
    .await;
    assert_eq!((copy.id(), original.id()), (Some(id), Some(id)));
    nkv.put("e", "1").await.unwrap();
    is_at(&nkv, "c", Some("1")).await;
    stop([node, copy_node]).await;
    drop(original_node);
}

/// Does not know for a while.
#[derive(Debug)]
struct Unknown(SocketAddr, std::sync::atomic::AtomicBool);

#[async_trait::async_trait]
impl Membership for Unknown {
    async fn addresses(&self) -> Result<Vec<SocketAddr>, MembershipError> {
        match self.1.load(std::sync::atomic::Ordering::Relaxed) {
            true => Ok(vec![self.0]),
            false => Err(MembershipError::new("the name server does not answer")),
        }
    }
}

#[tokio::test]
async fn an_empty_node_has_no_state_until_it_has_joined_and_an_error_is_no_empty_list() {
    let first = bind(options(), &[]).await;
    let node = start(&first).await;
    let nkv = ready(&node).await;
    for number in 0..5_000 {
        nkv.put(format!("key.{number}"), "v".repeat(100)).await.unwrap();
    }
    let membership = std::sync::Arc::new(Unknown(first.address(), false.into()));
    let mut short = options();
    short.join_timeout = Duration::from_millis(100);
    let second = Cluster::bind(LOCAL.parse().unwrap(), short, std::sync::Arc::clone(&membership)).await.unwrap();
    let joining = start(&second).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let refused = joining.handle().get("key.1").await.unwrap_err();
    assert_eq!(refused.kind(), &ErrorKind::Refused { status: 503 });
    assert!(joining.handle().put("a", "b").await.is_err());
    stop([joining]).await;

    let mut patient = options();
    patient.join_timeout = PATIENCE;
    membership.1.store(true, std::sync::atomic::Ordering::Relaxed);
    let third = Cluster::bind(LOCAL.parse().unwrap(), patient, membership).await.unwrap();
    let joining = start(&third).await;
    let joined = ready(&joining).await;
    // The first state that it shows is whole.
    assert_eq!(joined.list("key.*").await.unwrap().len(), 5_000);
    stop([joining, node]).await;
}

#[tokio::test]
async fn a_node_begins_alone_where_all_refuse_and_later_joins_without_loss() {
    // Bound, so that no one else is given the port; no one listens there.
    let free = tokio::net::TcpSocket::new_v4().unwrap();
    free.bind(LOCAL.parse().unwrap()).unwrap();
    let mut patient = options();
    patient.join_timeout = PATIENCE;
    let first = bind(patient.clone(), &[free.local_addr().unwrap()]).await;
    let node = start(&first).await;
    let nkv = ready(&node).await;
    nkv.put("a", "1").await.unwrap();
    // Three that are empty and know of each other: one of them begins.
    let lone = bind(patient.clone(), &[]).await;
    let x = bind(patient.clone(), &[lone.address()]).await;
    let y = bind(patient, &[x.address(), lone.address(), first.address()]).await;
    let nodes = [start(&lone).await, start(&x).await, start(&y).await];
    for node in &nodes {
        let nkv = ready(node).await;
        is_at(&nkv, "a", Some("1")).await;
    }
    stop(nodes).await;
    stop([node]).await;
}

#[tokio::test]
async fn a_directory_of_a_single_node_is_stamped_at_its_first_start() {
    let disk = MemoryPersist::new(Epoch::new(9));
    let alone = disk.clone();
    let node = Node::builder().persist("sync", move || Ok(alone)).start().await.unwrap();
    for number in 0..1_500 {
        node.handle().put(format!("old.{number}"), "1").await.unwrap();
    }
    stop([node]).await;
    let first = bind(options(), &[]).await;
    let node = start_with(&first, &disk).await;
    let nkv = ready(&node).await;
    assert_eq!(nkv.list("old.*").await.unwrap().len(), 1_500);
    let second = bind(options(), &[first.address()]).await;
    let other = start(&second).await;
    assert_eq!(ready(&other).await.list("old.*").await.unwrap().len(), 1_500);
    stop([node, other]).await;
}

#[tokio::test]
async fn values_at_the_limit_reach_all_and_longer_ones_are_refused() {
    let (_, nodes, [a, b]) = two().await;
    a.put("large", vec![b'v'; 1 << 20]).await.unwrap();
    eventually("the value has come", async || b.exists("large").await.unwrap()).await;
    let refused = a.put("larger", vec![b'v'; (1 << 20) + 1]).await.unwrap_err();
    assert_eq!(refused.kind(), &ErrorKind::Refused { status: 413 });
    stop(nodes).await;
}

/// Prints how long a write takes to all of five nodes, at 1,000 writes a second.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_nodes_have_each_write_once_and_soon() {
    const PUTS: usize = 3_000;
    let first = bind(options(), &[]).await;
    let mut clusters = vec![first.clone()];
    for _ in 1..5 {
        // One address that is known is enough.
        clusters.push(bind(options(), &[first.address()]).await);
    }
    let (mut nodes, mut handles) = (Vec::new(), Vec::new());
    for cluster in &clusters {
        let node = start(cluster).await;
        handles.push(ready(&node).await);
        nodes.push(node);
    }
    eventually("all are connected to all", async || clusters.iter().all(|cluster| cluster.peers().len() == 4)).await;
    let base = std::time::Instant::now();
    let mut receiving = Vec::new();
    for nkv in &handles[1..] {
        let mut events = nkv.subscribe("k").await.unwrap();
        receiving.push(tokio::spawn(async move {
            let (mut took, mut keys) = (Vec::new(), BTreeSet::new());
            while took.len() < PUTS {
                match timeout(PATIENCE, events.next()).await.unwrap() {
                    Some(Event::Update { entry, .. }) => {
                        let sent: u64 = std::str::from_utf8(&entry.value).unwrap().parse().unwrap();
                        assert!(keys.insert(entry.key.clone()), "{} comes twice", entry.key);
                        took.push((base.elapsed().as_micros() as u64).saturating_sub(sent));
                    }
                    Some(Event::Synced { .. }) => {}
                    other => panic!("{other:?}"),
                }
            }
            took
        }));
    }
    let mut pace = tokio::time::interval(Duration::from_millis(10));
    for tens in 0..PUTS / 10 {
        pace.tick().await;
        for number in tens * 10..tens * 10 + 10 {
            let sent = base.elapsed().as_micros().to_string();
            handles[0].put(format!("k.{number}"), sent).await.unwrap();
        }
    }
    let mut took = Vec::new();
    for one in receiving {
        took.extend(one.await.unwrap());
    }
    took.sort_unstable();
    println!("TEST convergence_p50_us = {}", took[took.len() / 2]);
    println!("TEST convergence_p99_us = {}", took[took.len() * 99 / 100]);
    eventually("digests are equal", async || clusters.iter().all(|cluster| cluster.digest() == first.digest())).await;
    stop(nodes).await;
}

#[tokio::test]
async fn a_node_knows_who_joined_who_left_and_who_fell_silent() {
    let of = |mut options: Options| {
        options.peer_timeout = Duration::from_millis(500);
        options
    };
    let first = bind(of(options()), &[]).await;
    let mut events = first.events();
    let mut next = async || timeout(PATIENCE, events.next()).await.unwrap().unwrap();
    let (second, third) =
        (bind(of(options()), &[first.address()]).await, bind(of(options()), &[first.address()]).await);
    let node = start(&first).await;
    let nkv = ready(&node).await;
    let leaver = start(&second).await;
    ready(&leaver).await;
    let id = second.id().unwrap();
    assert_eq!(next().await, MemberEvent::NodeJoined(id));
    nkv.put("k", "1").await.unwrap();
    eventually("a session ended", async || {
        first.members().iter().any(|member| member.id == id && member.contact.is_some() && member.address.is_some())
    })
    .await;
    assert_eq!(first.members().iter().map(|member| member.state).collect::<Vec<_>>(), [MemberState::Joined]);
    timeout(PATIENCE, second.leave()).await.unwrap();
    stop([leaver]).await;
    assert_eq!(next().await, MemberEvent::NodeLeft(id));

    // One that is cut says nothing.
    let cut = start(&third).await;
    ready(&cut).await;
    let silent = third.id().unwrap();
    assert_eq!(next().await, MemberEvent::NodeJoined(silent));
    let figures = nkv.stats().await.unwrap();
    assert_eq!((figures.numbers["cluster_members"], figures.numbers["cluster_members_joined"]), (2, 1));
    assert!(figures.words[&format!("member.{id}")].starts_with("state=left|"), "{figures:?}");
    stop([cut]).await;
    assert_eq!(next().await, MemberEvent::NodeDead(silent));
    // Who comes later is given what there is.
    let mut late = first.events();
    third.leave().await;
    let again = start(&third).await;
    let joined = timeout(PATIENCE, late.next()).await.unwrap();
    assert_eq!((joined, next().await), (Some(MemberEvent::NodeJoined(silent)), MemberEvent::NodeJoined(silent)));
    stop([again, node]).await;
}

fn with_keys(keys: &[u8]) -> Options {
    let mut options = options();
    options.keys = Some(keys_of(keys));
    options
}

fn keys_of(keys: &[u8]) -> Keys {
    Keys::new(&keys.iter().map(|byte| [*byte; 16]).collect::<Vec<_>>()).unwrap()
}

#[tokio::test]
async fn nodes_that_share_a_key_converge_and_others_stay_out() {
    let first = bind(with_keys(&[1]), &[]).await;
    let second = bind(with_keys(&[1]), &[first.address()]).await;
    let nodes = [start(&first).await, start(&second).await];
    let [a, b] = [ready(&nodes[0]).await, ready(&nodes[1]).await];
    // Longer than a record.
    let long = "x".repeat(100_000);
    a.put("long", long.as_str()).await.unwrap();
    is_at(&b, "long", Some(&long)).await;
    b.put("k", "1").await.unwrap();
    is_at(&a, "k", Some("1")).await;
    // One with another key and one without any begin alone, and neither takes or gives anything.
    for mut outside in [with_keys(&[2]), options()] {
        outside.join_timeout = Duration::from_millis(200);
        let cluster = bind(outside, &[first.address(), second.address()]).await;
        let node = start(&cluster).await;
        let nkv = ready(&node).await;
        nkv.put("outside", "1").await.unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!((value(&nkv, "k").await, value(&a, "outside").await), (None, None));
        assert!(cluster.peers().is_empty() && cluster.members().is_empty());
        assert_eq!((first.peers().len(), first.members().len()), (1, 1));
        stop([node]).await;
    }
    let plain = bind(options(), &[]).await;
    assert!(plain.set_keys(keys_of(&[1])).is_err());
    stop(nodes).await;
}

#[tokio::test]
async fn keys_are_rotated_while_all_nodes_run() {
    let first = bind(with_keys(&[1]), &[]).await;
    let second = bind(with_keys(&[1]), &[first.address()]).await;
    let nodes = [start(&first).await, start(&second).await];
    let [a, b] = [ready(&nodes[0]).await, ready(&nodes[1]).await];
    let mut events = first.events();
    let is_first = MemberEvent::NodeJoined(second.id().unwrap());
    assert_eq!(timeout(PATIENCE, events.next()).await.unwrap(), Some(is_first));
    let mut number = 0;
    for keys in [&[1, 2][..], &[2, 1], &[2]] {
        for cluster in [&first, &second] {
            cluster.set_keys(keys_of(keys)).unwrap();
            number += 1;
            let text = number.to_string();
            a.put("a", text.as_str()).await.unwrap();
            b.put("b", text.as_str()).await.unwrap();
            is_at(&b, "a", Some(&text)).await;
            is_at(&a, "b", Some(&text)).await;
        }
    }
    // Nobody left meanwhile, as far as others noticed.
    assert!(timeout(Duration::from_millis(100), events.next()).await.is_err());
    // One that has the old key alone stays out now.
    let mut outside = with_keys(&[1]);
    outside.join_timeout = Duration::from_millis(200);
    let cluster = bind(outside, &[first.address()]).await;
    let node = start(&cluster).await;
    assert_eq!(value(&ready(&node).await, "a").await, None);
    // And one that has the new one joins.
    let third = bind(with_keys(&[2]), &[first.address()]).await;
    let late = start(&third).await;
    is_at(&ready(&late).await, "a", Some(&number.to_string())).await;
    stop(nodes.into_iter().chain([node, late])).await;
}

/// One node keeps the old key, and the connections that it has: these end at once, on both sides, and it hears no more.
#[tokio::test]
async fn a_node_that_keeps_the_old_key_is_shut_out_at_once_and_no_put_of_the_others_is_lost() {
    let first = bind(with_keys(&[1]), &[]).await;
    let [second, third] =
        [bind(with_keys(&[1]), &[first.address()]).await, bind(with_keys(&[1]), &[first.address()]).await];
    let nodes = [start(&first).await, start(&second).await, start(&third).await];
    let [a, b, c] = [ready(&nodes[0]).await, ready(&nodes[1]).await, ready(&nodes[2]).await];
    let all = [&first, &second, &third];
    eventually("all are connected to all", async || all.iter().all(|cluster| cluster.peers().len() == 2)).await;
    let is_over = Arc::new(AtomicBool::new(false));
    let writer = |nkv: Handle, name: &'static str| {
        let is_over = Arc::clone(&is_over);
        tokio::spawn(async move {
            let mut number = 0;
            while !is_over.load(Relaxed) {
                nkv.put(format!("{name}.{number}"), "v").await.unwrap();
                number += 1;
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            number
        })
    };
    let writers = [writer(a.clone(), "a"), writer(b.clone(), "b")];
    for keys in [&[1, 2][..], &[2, 1], &[2]] {
        for cluster in [&first, &second] {
            tokio::time::sleep(Duration::from_millis(50)).await;
            cluster.set_keys(keys_of(keys)).unwrap();
        }
    }
    let rotated = Instant::now();
    let out = third.id().unwrap();
    eventually("the third is shut out", async || {
        third.peers().is_empty() && [&first, &second].iter().all(|cluster| !cluster.peers().contains(&out))
    })
    .await;
    println!("TEST shut_out_ms = {}", rotated.elapsed().as_millis());
    assert!(rotated.elapsed() < Duration::from_secs(1), "{:?}", rotated.elapsed());
    a.put("late", "1").await.unwrap();
    c.put("outside", "1").await.unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    is_over.store(true, Relaxed);
    for (written, name, other) in writers.into_iter().zip(["a", "b"]).zip([&b, &a]).map(|((w, n), o)| (w, n, o)) {
        for number in 0..written.await.unwrap() {
            is_at(other, &format!("{name}.{number}"), Some("v")).await;
        }
    }
    assert_eq!((value(&c, "late").await, value(&a, "outside").await), (None, None));
    stop(nodes).await;
}

/// Carries the bytes of connections to `to`, and keeps what the one that opened each has sent.
async fn record_on_the_way(to: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<Vec<u8>>>>) {
    let listener = TcpListener::bind(LOCAL).await.unwrap();
    let (address, said) = (listener.local_addr().unwrap(), Arc::<Mutex<Vec<Vec<u8>>>>::default());
    let kept = Arc::clone(&said);
    tokio::spawn(async move {
        while let Ok((from, _)) = listener.accept().await {
            let Ok(to) = TcpStream::connect(to).await else { continue };
            let ((mut from, mut back), (mut answers, mut to)) = (from.into_split(), to.into_split());
            let (kept, number) = (Arc::clone(&kept), kept.lock().unwrap().len());
            kept.lock().unwrap().push(Vec::new());
            tokio::spawn(async move { tokio::io::copy(&mut answers, &mut back).await });
            tokio::spawn(async move {
                let mut part = vec![0; 1 << 16];
                while let Ok(len @ 1..) = from.read(&mut part).await {
                    kept.lock().unwrap()[number].extend_from_slice(&part[..len]);
                    if to.write_all(&part[..len]).await.is_err() {
                        break;
                    }
                }
            });
        }
    });
    (address, said)
}

/// All that a node said is sent again, to the same node and to it after a restart: nothing is taken, and nothing is lost by it.
#[tokio::test]
async fn what_was_recorded_does_nothing_when_it_is_sent_again_also_after_a_restart() {
    let disk = MemoryPersist::new(Epoch::new(1));
    let first = bind(with_keys(&[1]), &[]).await;
    let node = start_with(&first, &disk).await;
    let nkv = ready(&node).await;
    let (way, said) = record_on_the_way(first.address()).await;
    let second = bind(with_keys(&[1]), &[way]).await;
    let other = start(&second).await;
    let b = ready(&other).await;
    for number in 0..20 {
        b.put("k", number.to_string()).await.unwrap();
        b.put("gone", "v").await.unwrap();
    }
    is_at(&nkv, "k", Some("19")).await;
    stop([other]).await;
    nkv.delete("gone").await.unwrap();
    nkv.put("k", "newer").await.unwrap();
    let recorded = said.lock().unwrap().clone();
    let heads: BTreeSet<&[u8]> = recorded.iter().filter_map(|said| said.get(2..34)).collect();
    assert!(!heads.is_empty() && heads.len() == recorded.iter().filter(|said| said.len() > 34).count(), "a key twice");

    let again = async |to: SocketAddr| {
        for said in &recorded {
            let mut stream = TcpStream::connect(to).await.unwrap();
            // It may have been ended before all is sent.
            drop(stream.write_all(said).await);
            let mut answer = Vec::new();
            drop(timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap());
            assert!(answer.len() <= 50, "{} bytes are said to a recording", answer.len());
        }
    };
    eventually("the other has gone", async || first.peers().is_empty()).await;
    let digest = first.digest();
    again(first.address()).await;
    assert_eq!((first.digest(), first.peers().len()), (digest, 0));
    stop([node]).await;

    let first = bind(with_keys(&[1]), &[]).await;
    let node = start_with(&first, &disk).await;
    let nkv = ready(&node).await;
    again(first.address()).await;
    assert_eq!((first.digest(), first.members().len()), (digest, 0));
    assert_eq!((value(&nkv, "k").await.as_deref(), value(&nkv, "gone").await), (Some("newer"), None));
    // One that has the key is taken still.
    let third = bind(with_keys(&[1]), &[first.address()]).await;
    let late = start(&third).await;
    is_at(&ready(&late).await, "k", Some("newer")).await;
    stop([node, late]).await;
}

/// Peers that say nothing, and such that say rubbish, come without end: those that are members stay, others join, and puts arrive.
#[tokio::test]
async fn strangers_without_end_cost_no_member_its_place_and_hold_up_no_put() {
    // More than a node has connections.
    const SILENT: usize = 600;
    for mut options in [options(), with_keys(&[1])] {
        // Longer than the test: only that they are strangers ends them.
        options.peer_timeout = PATIENCE * 2;
        let first = bind(options.clone(), &[]).await;
        let second = bind(options.clone(), &[first.address()]).await;
        let nodes = [start(&first).await, start(&second).await];
        let [a, b] = [ready(&nodes[0]).await, ready(&nodes[1]).await];
        eventually("they are connected", async || first.peers().len() == 1 && second.peers().len() == 1).await;
        let mut events = first.events();
        let is_second = MemberEvent::NodeJoined(second.id().unwrap());
        assert_eq!(timeout(PATIENCE, events.next()).await.unwrap(), Some(is_second));
        let puts = async |round: &str| {
            let (mut pace, mut took) = (tokio::time::interval(Duration::from_millis(5)), Vec::new());
            for number in 0..200 {
                pace.tick().await;
                let began = Instant::now();
                a.put(format!("k.{number}"), round).await.unwrap();
                took.push(began.elapsed().as_micros());
            }
            is_at(&b, "k.199", Some(round)).await;
            took.sort_unstable();
            took[took.len() * 99 / 100]
        };
        let quiet = puts("quiet").await;
        let (is_over, came) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let flood = {
            let (is_over, came, to) = (Arc::clone(&is_over), Arc::clone(&came), first.address());
            std::thread::spawn(move || {
                let connect = |said: &[u8]| {
                    let mut stream = std::net::TcpStream::connect(to).ok()?;
                    // It may have been ended.
                    drop(std::io::Write::write_all(&mut stream, said));
                    came.fetch_add(1, Relaxed);
                    Some(stream)
                };
                let mut silent: Vec<_> = (0..SILENT).map(|number| connect(&[0, 0][..number % 3])).collect();
                while !is_over.load(Relaxed) {
                    for rubbish in [&[0; 100][..], &[0xff; 100], b"GET / HTTP/1.1\r\n\r\n"] {
                        connect(rubbish);
                    }
                    silent.extend([connect(&[])]);
                    silent.remove(0);
                    // The other threads are to have their turn, also on one processor.
                    std::thread::sleep(Duration::from_millis(1));
                }
            })
        };
        eventually("strangers are there", async || came.load(Relaxed) > SILENT).await;
        let flooded = puts("flooded").await;
        // One that comes meanwhile is let in, and given what there is.
        let third = bind(options, &[first.address()]).await;
        let late = start(&third).await;
        is_at(&ready(&late).await, "k.199", Some("flooded")).await;
        eventually("2,000 have come", async || came.load(Relaxed) > 2_000).await;
        is_over.store(true, Relaxed);
        flood.join().unwrap();
        println!("TEST strangers came={} quiet_p99_us={quiet} flooded_p99_us={flooded}", came.load(Relaxed));
        let is_third = MemberEvent::NodeJoined(third.id().unwrap());
        assert_eq!(timeout(PATIENCE, events.next()).await.unwrap(), Some(is_third));
        assert!(timeout(Duration::from_millis(100), events.next()).await.is_err(), "a member was lost");
        stop(nodes.into_iter().chain([late])).await;
    }
}

#[tokio::test]
async fn a_node_that_waits_to_connect_to_a_peer_says_to_it_too_that_it_leaves() {
    let free = tokio::net::TcpSocket::new_v4().unwrap();
    free.bind(LOCAL.parse().unwrap()).unwrap();
    let there = free.local_addr().unwrap();
    let mut slow = options();
    slow.sync_interval = Duration::from_secs(30);
    let leaver = bind(slow.clone(), &[there]).await;
    let leaving = start(&leaver).await;
    ready(&leaving).await;
    // The pauses between its attempts have become long.
    tokio::time::sleep(Duration::from_secs(4)).await;
    drop(free);
    let first = Cluster::bind(there, slow, StaticPeers(vec![leaver.address()])).await.unwrap();
    let node = start(&first).await;
    let mut events = first.events();
    let mut next = async || timeout(PATIENCE, events.next()).await.unwrap().unwrap();
    let id = leaver.id().unwrap();
    assert_eq!(next().await, MemberEvent::NodeJoined(id));
    leaver.leave().await;
    assert_eq!(next().await, MemberEvent::NodeLeft(id));
    stop([leaving, node]).await;
}

/// Names and admits what a test has chosen.
#[derive(Debug, Default)]
struct Chosen {
    addresses: Mutex<Vec<SocketAddr>>,
    admitted: Mutex<Vec<NodeId>>,
}

#[async_trait::async_trait]
impl Membership for Chosen {
    async fn addresses(&self) -> Result<Vec<SocketAddr>, MembershipError> {
        Ok(self.addresses.lock().unwrap().clone())
    }

    async fn admits(&self, node: NodeId) -> bool {
        self.admitted.lock().unwrap().contains(&node)
    }
}

async fn chosen(advertise: Option<SocketAddr>) -> (Arc<Chosen>, Cluster, Node) {
    let (membership, mut options) = (Arc::<Chosen>::default(), options());
    options.advertise = advertise;
    // Where peers are is asked when the test says so, and not by itself.
    (options.sync_interval, options.named_only) = (Duration::from_secs(60), true);
    let cluster = Cluster::bind(LOCAL.parse().unwrap(), options, Arc::clone(&membership)).await.unwrap();
    let node = start(&cluster).await;
    ready(&node).await;
    (membership, cluster, node)
}

fn name(of: &(Arc<Chosen>, Cluster, Node), peers: &[&(Arc<Chosen>, Cluster, Node)]) {
    *of.0.addresses.lock().unwrap() = peers.iter().map(|peer| peer.1.address()).collect();
    of.1.ask_again();
}

fn admit(of: &(Arc<Chosen>, Cluster, Node), peer: &(Arc<Chosen>, Cluster, Node)) {
    of.0.admitted.lock().unwrap().extend(peer.1.id());
}

#[tokio::test]
async fn where_a_membership_chooses_no_other_node_is_a_peer_and_no_other_address_is_tried() {
    // The third says that it is where a stranger is. The second knows both, and says so; they do not know each other.
    let stranger = std::net::TcpListener::bind(LOCAL).unwrap();
    stranger.set_nonblocking(true).unwrap();
    let (one, two, three) = (chosen(None).await, chosen(None).await, chosen(stranger.local_addr().ok()).await);
    for (of, peer) in [(&one, &two), (&two, &one), (&two, &three), (&three, &two)] {
        admit(of, peer);
    }
    name(&one, &[&two]);
    name(&three, &[&two]);
    let ids = |clusters: &[&Cluster]| clusters.iter().filter_map(|cluster| cluster.id()).collect::<BTreeSet<_>>();
    let peers = |of: &Cluster| of.peers().into_iter().collect::<BTreeSet<_>>();
    eventually("they meet", async || peers(&two.1) == ids(&[&one.1, &three.1])).await;
    eventually("both ways", async || one.1.peers().len() == 1 && three.1.peers().len() == 1).await;
    // One that is named, and not admitted on the other side; and one that is not admitted on its own.
    name(&one, &[&two, &three]);
    admit(&three, &one);
    name(&three, &[&two, &one]);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!((peers(&one.1), peers(&three.1)), (ids(&[&two.1]), ids(&[&two.1])));
    // One that is named no more is left.
    name(&one, &[]);
    eventually("they part", async || one.1.peers().is_empty()).await;
    name(&two, &[&three]);
    let (nkv, key) = (two.2.handle(), "k".parse().unwrap());
    nkv.put("k", "1").await.unwrap();
    is_at(&three.2.handle(), "k", Some("1")).await;
    assert!(two.1.wrote(&key) && !three.1.wrote(&key));
    assert_eq!(stranger.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock, "a stranger was dialled");
    stop([one.2, two.2, three.2]).await;
}

#[tokio::test]
async fn what_is_older_than_all_undoes_nothing_on_any_node() {
    let (one, other) = (chosen(None).await, chosen(None).await);
    let [a, b] = [one.2.handle(), other.2.handle()];
    b.put("there", "newer").await.unwrap();
    b.put("gone", "newer").await.unwrap();
    b.delete("gone").await.unwrap();
    let values = ["there", "gone", "new"].map(|key| (key.parse().unwrap(), "older".into()));
    // Where it is taken, nothing else is known yet.
    one.1.take_older(values).await.unwrap();
    is_at(&a, "there", Some("older")).await;
    admit(&one, &other);
    admit(&other, &one);
    name(&one, &[&other]);
    name(&other, &[&one]);
    for nkv in [&a, &b] {
        is_at(nkv, "new", Some("older")).await;
        is_at(nkv, "there", Some("newer")).await;
        is_at(nkv, "gone", None).await;
    }
    eventually("digests are equal", async || one.1.digest() == other.1.digest()).await;
    a.put("new", "newer").await.unwrap();
    a.delete("there").await.unwrap();
    one.1.take_older(["there", "new"].map(|key| (key.parse().unwrap(), "older".into()))).await.unwrap();
    for nkv in [&a, &b] {
        is_at(nkv, "new", Some("newer")).await;
        is_at(nkv, "there", None).await;
    }
    stop([one.2, other.2]).await;
}
