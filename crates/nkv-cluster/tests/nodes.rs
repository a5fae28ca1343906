//! Nodes of one process that talk over TCP.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nkv_cluster::{Cluster, Keys, MemberEvent, MemberState, Membership, MembershipError, NodeId, Options, StaticPeers};
use nkv_node::nkv_core::{self, Action, Change, Epoch, MemoryPersist, Meta, PersistValue, Reason, StoredRef};
use nkv_node::{ErrorKind, Event, GoneReason, Handle, Node, Op, PutOptions, Revision};
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
