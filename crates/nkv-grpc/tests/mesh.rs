//! A mesh with servers of the replicated gRPC store, as those are: they send each put on once, repeat nothing, and know no deletes.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Server, timely};
use nkv_grpc::kv::client_client::ClientClient;
use nkv_grpc::kv::client_server::{Client, ClientServer};
use nkv_grpc::kv::{GetKey, GetReply, Ip, SetKey, SetReply, StoreReply, Void};
use nkv_grpc::{MeshSync, Options};
use nkv_node::{Key, Node};
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};
use tower_service::Service as _;

/// One of the original servers.
#[derive(Clone, Default)]
struct Original(Arc<Mutex<Held>>);

#[derive(Default)]
struct Held {
    store: BTreeMap<String, String>,
    peers: Vec<String>,
    registrations: usize,
    /// Sets that peers sent it.
    sent: Vec<(String, String)>,
    /// A key that it takes no value of.
    refused: Option<String>,
}

impl Original {
    fn held(&self) -> std::sync::MutexGuard<'_, Held> {
        self.0.lock().unwrap()
    }

    fn store(&self) -> StoreReply {
        StoreReply { store: self.held().store.clone() }
    }

    fn has(&self, key: &str, value: &str) -> bool {
        self.held().store.get(key).is_some_and(|has| has == value)
    }

    /// As a client's set there: sent on to each peer once.
    async fn set(&self, key: &str, value: &str) {
        let peers = self.held().peers.clone();
        self.held().store.insert(key.into(), value.into());
        for peer in peers {
            if let Ok(mut peer) = connect(&peer).await {
                drop(peer.set(SetKey { key: key.into(), value: value.into(), broadcast: false }).await);
            }
        }
    }

    /// Serves until the guard is dropped.
    async fn serve(&self, at: &str) -> (SocketAddr, tokio::task::JoinSet<()>) {
        let listener = timely(async {
            loop {
                match tokio::net::TcpListener::bind(at).await {
                    Ok(listener) => return listener,
                    Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                }
            }
        })
        .await;
        let address = listener.local_addr().unwrap();
        let (service, mut serving) = (ClientServer::new(self.clone()), tokio::task::JoinSet::new());
        serving.spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let service = service.clone();
                let service = hyper::service::service_fn(move |request| service.clone().call(request));
                connections.spawn(async move {
                    let executor = hyper_util::rt::TokioExecutor::new();
                    let http2 = hyper::server::conn::http2::Builder::new(executor);
                    drop(http2.serve_connection(hyper_util::rt::TokioIo::new(stream), service).await);
                });
            }
        });
        (address, serving)
    }
}

#[tonic::async_trait]
impl Client for Original {
    async fn get(&self, request: Request<GetKey>) -> Result<Response<GetReply>, Status> {
        let found = self.held().store.get(&request.into_inner().key).cloned();
        Ok(Response::new(GetReply { defined: found.is_some(), value: found.unwrap_or_default() }))
    }

    async fn set(&self, request: Request<SetKey>) -> Result<Response<SetReply>, Status> {
        let SetKey { key, value, broadcast } = request.into_inner();
        match broadcast {
            true => Original::set(self, &key, &value).await,
            false => {
                let mut held = self.held();
                if held.refused.as_ref() == Some(&key) {
                    return Err(Status::resource_exhausted("it is too long"));
                }
                held.sent.push((key.clone(), value.clone()));
                held.store.insert(key, value.clone());
            }
        }
        Ok(Response::new(SetReply { value }))
    }

    async fn list(&self, _: Request<Void>) -> Result<Response<StoreReply>, Status> {
        Ok(Response::new(self.store()))
    }

    async fn register_with_peer(&self, request: Request<Ip>) -> Result<Response<StoreReply>, Status> {
        let ip = request.into_inner().ip;
        let mut held = self.held();
        held.registrations += 1;
        if !held.peers.contains(&ip) {
            held.peers.push(ip);
        }
        drop(held);
        Ok(Response::new(self.store()))
    }
}

async fn connect(address: &str) -> Result<ClientClient<Channel>, tonic::transport::Error> {
    Channel::from_shared(format!("http://{address}")).unwrap().connect().await.map(ClientClient::new)
}

/// A node that joins `peers` once its door is there.
async fn joined(node: Node, peers: &[SocketAddr]) -> Server {
    joined_with(node, peers, None).await
}

async fn joined_with(node: Node, peers: &[SocketAddr], sync: Option<&Arc<Sync>>) -> Server {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let peers: Vec<String> = peers.iter().map(ToString::to_string).collect();
    let own = listener.local_addr().unwrap().to_string();
    joined_at(node, listener, &own, &peers, sync)
}

fn joined_at(
    node: Node,
    listener: tokio::net::TcpListener,
    own: &str,
    peers: &[String],
    sync: Option<&Arc<Sync>>,
) -> Server {
    let address = listener.local_addr().unwrap();
    let mut options = Options::default();
    options.mesh_sync = sync.map(|sync| Arc::clone(sync) as Arc<dyn MeshSync>);
    options.peers = peers.to_vec();
    options.own_address = Some(own.to_owned());
    let door = tokio::spawn(nkv_grpc::Door::new(node.handle(), options).listen(listener));
    Server { node, address, door }
}

/// A server of nkv. What is below `synced` came from others.
#[derive(Debug)]
struct Sync {
    own: (u16, u64),
    has_begun: AtomicBool,
    found: Mutex<BTreeMap<u64, BTreeSet<SocketAddr>>>,
    /// How often that was set.
    changes: AtomicUsize,
    older: Mutex<Vec<String>>,
}

impl Sync {
    fn new(port: u16, number: u64) -> Arc<Self> {
        let (found, older, changes) = Default::default();
        Arc::new(Sync { own: (port, number), has_begun: true.into(), found, changes, older })
    }

    /// Where a server of nkv is reached; nothing if it is none.
    fn found(&self, number: u64) -> Option<Vec<String>> {
        let found = self.found.lock().unwrap();
        found.get(&number).map(|at| at.iter().map(ToString::to_string).collect())
    }

    fn has_found(&self, number: u64, at: &[&str]) -> bool {
        self.found(number).is_some_and(|found| found == at)
    }
}

#[tonic::async_trait]
impl MeshSync for Sync {
    fn own(&self) -> Option<(u16, u64)> {
        self.has_begun.load(Relaxed).then_some(self.own)
    }

    fn set_found(&self, found: BTreeMap<u64, BTreeSet<SocketAddr>>) {
        self.changes.fetch_add(1, Relaxed);
        *self.found.lock().unwrap() = found;
    }

    fn wrote(&self, key: &Key) -> bool {
        !key.as_str().starts_with("synced")
    }

    async fn take_older(&self, values: Vec<(Key, bytes::Bytes)>) -> std::io::Result<()> {
        self.older.lock().unwrap().extend(values.into_iter().map(|(key, _)| key.as_str().to_owned()));
        Ok(())
    }
}

async fn new() -> Node {
    Node::builder().start().await.unwrap()
}

async fn value(server: &Server, key: &str) -> Option<String> {
    server.handle().get(key).await.unwrap().map(|entry| String::from_utf8(entry.value.to_vec()).unwrap())
}

async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(common::PATIENCE, wait).await.is_ok(), "not in time: {what}");
}

/// Puts keys that an original is sent, and of which the server knows that.
async fn sent(server: &Server, original: &Original, keys: &[&str]) {
    // What was sent before the last has been answered.
    for key in ["begun"].iter().chain(keys).chain(&["last"]) {
        server.handle().put(*key, "1").await.unwrap();
        until("it has that", async || original.has(key, "1")).await;
    }
}

#[tokio::test]
async fn a_server_that_joins_takes_what_there_is_loses_nothing_and_sends_each_put_once() {
    let (first, second) = (Original::default(), Original::default());
    let ((first_at, _serving), (second_at, _serving_too)) =
        (first.serve("127.0.0.1:0").await, second.serve("127.0.0.1:0").await);
    for (key, value) in [("theirs", "1"), ("both", "theirs"), ("same", "1")] {
        first.held().store.insert(key.into(), value.into());
    }
    let node = new().await;
    node.handle().put("ours", "2").await.unwrap();
    node.handle().put("both", "ours").await.unwrap();
    node.handle().put("same", "1").await.unwrap();
    node.handle().put("bytes", vec![0xff]).await.unwrap();
    let server = joined(node, &[first_at, second_at]).await;
    until("it has theirs", async || value(&server, "theirs").await.as_deref() == Some("1")).await;
    until("they have ours", async || first.has("ours", "2") && second.has("ours", "2")).await;
    until("a key of both is ours", async || first.has("both", "ours")).await;
    assert_eq!(value(&server, "both").await.as_deref(), Some("ours"));

    // Through whatever door.
    server.handle().put("new", "3").await.unwrap();
    until("they have it", async || first.has("new", "3") && second.has("new", "3")).await;
    // What one of them sends is applied, and not sent on.
    first.set("from.first", "4").await;
    assert_eq!(value(&server, "from.first").await.as_deref(), Some("4"));
    // A client's set is sent to all.
    let mut client = connect(&server.address.to_string()).await.unwrap();
    client.set(SetKey { key: "client".into(), value: "5".into(), broadcast: true }).await.unwrap();
    until("they have it", async || first.has("client", "5") && second.has("client", "5")).await;
    assert!(second.held().sent.iter().all(|(key, _)| key != "from.first" && key != "theirs"));
    assert!(first.held().sent.iter().all(|(key, _)| key != "same"), "it has that");
    let sent: Vec<_> = first.held().sent.iter().filter(|(key, _)| key == "new" || key == "client").cloned().collect();
    assert_eq!(sent.len(), 2, "{sent:?}");
}

#[tokio::test]
async fn a_peer_that_is_dead_costs_no_caller_anything_and_is_brought_up_to_date() {
    let original = Original::default();
    let (at, serving) = original.serve("127.0.0.1:0").await;
    let server = joined(new().await, &[at]).await;
    let nkv = server.handle();
    sent(&server, &original, &["changed", "gone", "kept"]).await;
    drop(serving);
    nkv.put("changed", "2").await.unwrap();
    nkv.delete("gone").await.unwrap();
    nkv.put("while.away", "3").await.unwrap();
    // A client of the other one sets what this one does not hear of.
    original.held().store.insert("theirs".into(), "4".into());
    original.held().store.insert("kept".into(), "theirs".into());
    let (_, _serving) = original.serve(&at.to_string()).await;
    until("it is sent", async || original.has("changed", "2") && original.has("while.away", "3")).await;
    until("theirs are taken", async || {
        value(&server, "theirs").await.as_deref() == Some("4")
            && value(&server, "kept").await.as_deref() == Some("theirs")
    })
    .await;
    assert_eq!(value(&server, "gone").await, None, "what was deleted here is not taken back");
}

#[tokio::test]
async fn a_server_is_made_to_dial_no_stranger() {
    let server = Server::start().await;
    server.handle().put("a", "1").await.unwrap();
    let mut client = connect(&server.address.to_string()).await.unwrap();
    for foreign in ["192.0.2.1:4000", "", "127.0.0.1", "127.0.0.1:0", ":4000", "127.0.0.1:x", &"a".repeat(300)] {
        let refused = client.register_with_peer(Ip { ip: foreign.into() }).await;
        assert_eq!(common::code(refused), Code::InvalidArgument, "{foreign}");
    }
    // One that is where it says is remembered, and has what is there.
    let original = Original::default();
    let (at, _serving) = original.serve("127.0.0.1:0").await;
    let reply = client.register_with_peer(Ip { ip: at.to_string() }).await.unwrap().into_inner();
    assert_eq!(reply.store, BTreeMap::from([("a".to_owned(), "1".to_owned())]));
    server.handle().put("b", "2").await.unwrap();
    until("it is sent", async || original.has("b", "2")).await;
    // No more than 64.
    let mut refused = 0;
    let silent: Vec<_> = (0..70).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    for one in &silent {
        let peer = Ip { ip: one.local_addr().unwrap().to_string() };
        refused += usize::from(client.register_with_peer(peer).await.is_err());
    }
    assert_eq!(refused, 7);
}

#[tokio::test]
async fn servers_of_nkv_find_out_that_they_are_and_send_each_other_nothing() {
    let (one, other) = (Sync::new(1, 0xa1), Sync::new(2, 0xb2));
    let original = Original::default();
    let (original_at, _serving) = original.serve("127.0.0.1:0").await;
    let first = joined_with(new().await, &[original_at], Some(&one)).await;
    first.handle().put("first", "1").await.unwrap();
    let node = new().await;
    node.handle().put("second", "1").await.unwrap();
    let second = joined_with(node, &[first.address, original_at], Some(&other)).await;
    until("they find each other", async || {
        one.has_found(0xb2, &["127.0.0.1:2"]) && other.has_found(0xa1, &["127.0.0.1:1"])
    })
    .await;
    // An original is sent what each has, and each of them what it has not.
    until("an original has all", async || original.has("first", "1") && original.has("second", "1")).await;
    first.handle().put("k", "1").await.unwrap();
    second.handle().put("j", "1").await.unwrap();
    until("an original has it", async || original.has("k", "1") && original.has("j", "1")).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!((value(&first, "j").await, value(&second, "k").await), (None, None));
    assert_eq!((one.found.lock().unwrap().len(), other.found.lock().unwrap().len()), (1, 1), "an original is none");
    // Where another of nkv was, there may be an original.
    let turned = Original::default();
    let (turned_at, _serving_too) = turned.serve("127.0.0.1:0").await;
    let mut client = connect(&first.address.to_string()).await.unwrap();
    let mut request = Request::new(Ip { ip: turned_at.to_string() });
    request.metadata_mut().insert("nkv-sync-1", "3 00000000000000c3".parse().unwrap());
    let answer = client.register_with_peer(request).await.unwrap();
    assert_eq!(answer.metadata().get("nkv-sync-1").unwrap(), "1 00000000000000a1");
    assert_eq!(answer.into_inner().store, BTreeMap::new());
    until("it is sent", async || turned.has("first", "1") && one.found(0xc3).is_none()).await;
}

#[tokio::test]
async fn what_came_from_another_server_of_nkv_is_sent_to_an_original_that_has_it_not() {
    let original = Original::default();
    let (at, _serving) = original.serve("127.0.0.1:0").await;
    let server = joined_with(new().await, &[at], Some(&Sync::new(1, 0xa1))).await;
    server.handle().put("begun", "1").await.unwrap();
    until("it has joined", async || original.has("begun", "1")).await;
    // The original has one of them by the time that it is sent, of another server.
    for key in ["synced.had", "synced.changed", "synced.new", "own"] {
        server.handle().put(key, "1").await.unwrap();
    }
    server.handle().put("synced.changed", "2").await.unwrap();
    original.held().store.insert("synced.had".into(), "1".into());
    until("it is sent", async || original.has("synced.new", "1") && original.has("synced.changed", "2")).await;
    let mut sent: Vec<_> = original.held().sent.iter().map(|(key, value)| format!("{key}={value}")).collect();
    sent[2..].sort_unstable();
    assert_eq!(sent, ["begun=1", "own=1", "synced.changed=2", "synced.new=1"]);
}

#[tokio::test]
async fn what_an_original_has_and_this_server_has_not_is_taken_as_older_than_all() {
    let (original, sync) = (Original::default(), Sync::new(1, 0xa1));
    let (at, serving) = original.serve("127.0.0.1:0").await;
    let server = joined_with(new().await, &[at], Some(&sync)).await;
    sent(&server, &original, &["k"]).await;
    drop(serving);
    for key in ["k", "unknown"] {
        original.held().store.insert(key.into(), "2".into());
    }
    let (_, _serving) = original.serve(&at.to_string()).await;
    until("what is here is set anew", async || value(&server, "k").await.as_deref() == Some("2")).await;
    until("the rest is taken", async || *sync.older.lock().unwrap() == ["unknown"]).await;
    assert_eq!(value(&server, "unknown").await, None);
}

#[tokio::test]
async fn a_server_of_nkv_is_reached_where_its_registration_came_from_and_nowhere_else() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let named = silent.local_addr().unwrap();
    let sync = Sync::new(1, 0xa1);
    let server = joined_with(new().await, &[named], Some(&sync)).await;
    let register = async |from: [u8; 4], text: &'static str| {
        let endpoint =
            Channel::from_shared(format!("http://{}", server.address)).unwrap().local_address(Some(from.into()));
        let mut request = Request::new(Ip { ip: named.to_string() });
        request.metadata_mut().insert("nkv-sync-1", text.parse().unwrap());
        let mut client = ClientClient::new(endpoint.connect().await.unwrap());
        client.register_with_peer(request).await.unwrap().metadata().contains_key("nkv-sync-1")
    };
    for rubbish in ["", "7", "0 07", "65536 07", "7 xyz", "-7 07"] {
        assert!(!register([127, 0, 0, 1], rubbish).await, "{rubbish}");
    }
    assert_eq!(sync.found(7), None);
    // The peer is named, so that another host may register it, which may be a second address of the same server. It is known by its
    // number, and not connected to.
    assert!(register([127, 0, 0, 2], "7 0000000000000007").await);
    assert!(sync.has_found(7, &[]), "{:?}", sync.found(7));
    assert!(register([127, 0, 0, 1], "7 0000000000000007").await);
    assert!(sync.has_found(7, &["127.0.0.1:7"]), "{:?}", sync.found(7));
}

/// Of a pair that had each other as peers by other addresses than their calls came from, one took the other for an original, and sent
/// it each value a second time, without its TTL.
#[tokio::test]
async fn servers_of_nkv_know_each_other_by_their_numbers_whatever_their_addresses() {
    // What it names reaches it, but its calls come from elsewhere.
    let bind = async |at| tokio::net::TcpListener::bind(at).await.unwrap();
    let (inside, outside) = (bind("127.0.0.1:0").await, bind("127.0.0.3:0").await);
    let (first_at, own) = (inside.local_addr().unwrap().to_string(), outside.local_addr().unwrap().to_string());
    let (one, other) = (Sync::new(1, 0xa1), Sync::new(2, 0xb2));
    let first = joined_at(new().await, inside, &first_at, std::slice::from_ref(&own), Some(&one));
    let node = new().await;
    node.handle().put("second", "1").await.unwrap();
    let _second = joined_at(node, outside, &own, &[first_at], Some(&other));
    until("they find each other", async || {
        one.has_found(0xb2, &["127.0.0.3:2"]) && other.has_found(0xa1, &["127.0.0.1:1"])
    })
    .await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(value(&first, "second").await, None, "it was sent as to an original");
}

#[tokio::test]
async fn a_server_of_nkv_that_begins_is_not_taken_for_an_original() {
    let (one, other) = (Sync::new(1, 0xa1), Sync::new(2, 0xb2));
    one.has_begun.store(false, Relaxed);
    let first = joined_with(new().await, &[], Some(&one)).await;
    let node = new().await;
    node.handle().put("k", "1").await.unwrap();
    let _second = joined_with(node, &[first.address], Some(&other)).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(value(&first, "k").await, None, "it was sent as to an original");
    one.has_begun.store(true, Relaxed);
    until("they find each other", async || one.found(0xb2).is_some() && other.found(0xa1).is_some()).await;
    assert_eq!(value(&first, "k").await, None);
}

#[tokio::test]
async fn a_server_of_nkv_that_registers_by_its_own_number_is_no_peer() {
    let sync = Sync::new(1, 0xa1);
    let server = joined_with(new().await, &[], Some(&sync)).await;
    let register = async |text: &'static str| {
        let mut request = Request::new(Ip { ip: "127.0.0.1:9".into() });
        request.metadata_mut().insert("nkv-sync-1", text.parse().unwrap());
        let mut client = connect(&server.address.to_string()).await.unwrap();
        client.register_with_peer(request).await.unwrap().metadata().contains_key("nkv-sync-1")
    };
    assert!(register("1 00000000000000a1").await);
    assert_eq!(sync.changes.load(Relaxed), 0, "it is this server itself, by another address");
    for _ in 0..3 {
        assert!(register("7 0000000000000007").await);
    }
    assert_eq!(sync.changes.load(Relaxed), 1);
}

#[tokio::test]
async fn a_peer_that_does_not_answer_holds_up_no_other_one() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = joined(new().await, &[silent.local_addr().unwrap()]).await;
    let _taken = timely(silent.accept()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let began = std::time::Instant::now();
    let original = Original::default();
    let (at, _serving) = original.serve("127.0.0.1:0").await;
    let mut client = connect(&server.address.to_string()).await.unwrap();
    client.register_with_peer(Ip { ip: at.to_string() }).await.unwrap();
    server.handle().put("k", "1").await.unwrap();
    until("it is sent", async || original.has("k", "1")).await;
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

/// The connection was given up at a value that the peer does not take, and made anew, and given up at it again, for ever.
#[tokio::test]
async fn a_value_that_a_peer_refuses_keeps_no_other_from_it() {
    let original = Original::default();
    original.held().refused = Some("long".into());
    let (at, serving) = original.serve("127.0.0.1:0").await;
    let node = new().await;
    node.handle().put("long", "1").await.unwrap();
    let server = joined(node, &[at]).await;
    server.handle().put("k", "1").await.unwrap();
    until("it is sent", async || original.has("k", "1")).await;
    server.handle().put("long", "2").await.unwrap();
    server.handle().put("k", "2").await.unwrap();
    until("it is sent", async || original.has("k", "2")).await;
    assert_eq!(original.held().registrations, 1);
    // It is sent again to one that is back.
    drop(serving);
    original.held().refused = None;
    let (_, _serving) = original.serve(&at.to_string()).await;
    until("it is sent", async || original.has("long", "2")).await;
}

/// What a peer sent while its values were taken was replaced by the older ones of its answer.
#[tokio::test]
async fn what_is_newer_than_the_values_of_a_peer_is_not_replaced_by_them() {
    const KEYS: usize = 20_000;
    let original = Original::default();
    original.held().store = (0..KEYS).map(|number| (format!("k{number:05}"), "old".to_owned())).collect();
    let (at, _serving) = original.serve("127.0.0.1:0").await;
    let server = joined(new().await, &[at]).await;
    let last = format!("k{:05}", KEYS - 1);
    timely(async {
        while server.handle().look_up("k00000", |_| ()).unwrap().is_none() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(value(&server, &last).await, None, "the test is too slow");
    let mut client = connect(&server.address.to_string()).await.unwrap();
    client.set(SetKey { key: last.clone(), value: "new".into(), broadcast: false }).await.unwrap();
    until("all are taken", async || server.handle().stats().await.unwrap().keys == KEYS as u64).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(value(&server, &last).await.as_deref(), Some("new"));
}

/// A peer that answers and ends the connection was reached ten times a second.
#[tokio::test]
async fn a_peer_that_ends_each_connection_is_reached_with_longer_and_longer_pauses() {
    let original = Original::default();
    let proxy = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let _server = joined(new().await, &[proxy.local_addr().unwrap()]).await;
    let began = tokio::time::Instant::now();
    let mut reached = 0;
    while let Ok(accepted) = tokio::time::timeout_at(began + Duration::from_secs(4), proxy.accept()).await {
        let (stream, _) = accepted.unwrap();
        reached += 1;
        let service = ClientServer::new(original.clone());
        let service = hyper::service::service_fn(move |request| service.clone().call(request));
        let http2 = hyper::server::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new());
        let serving = http2.serve_connection(hyper_util::rt::TokioIo::new(stream), service);
        // Long enough for the registration to be answered.
        drop(tokio::time::timeout(Duration::from_millis(50), serving).await);
    }
    assert!((2..=8).contains(&reached), "{reached} times");
}

/// Each client may end each subscription that it knows of: no peer was sent anything after that, until a restart.
#[tokio::test]
async fn a_client_that_ends_the_subscription_for_a_peer_does_not_part_it() {
    let original = Original::default();
    let (at, _serving) = original.serve("127.0.0.1:0").await;
    let server = joined(new().await, &[at]).await;
    sent(&server, &original, &[]).await;
    let subscriptions = server.handle().trace(&"k".parse().unwrap()).unwrap();
    assert!(!subscriptions.is_empty());
    for one in subscriptions {
        assert!(server.handle().unsubscribe(&one.pattern, &one.client_uuid).unwrap());
    }
    server.handle().put("k", "1").await.unwrap();
    until("it is sent", async || original.has("k", "1")).await;
}
