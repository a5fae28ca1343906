//! A mesh with servers of the replicated gRPC store, as those are: they send each put on once, repeat nothing, and know no deletes.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Server, timely};
use nkv_grpc::Options;
use nkv_grpc::kv::client_client::ClientClient;
use nkv_grpc::kv::client_server::{Client, ClientServer};
use nkv_grpc::kv::{GetKey, GetReply, Ip, SetKey, SetReply, StoreReply, Void};
use nkv_node::Node;
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
    /// Sets that peers sent it.
    sent: Vec<(String, String)>,
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
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut options = Options::default();
    options.peers = peers.iter().map(ToString::to_string).collect();
    options.own_address = Some(address.to_string());
    let door = tokio::spawn(nkv_grpc::Door::new(node.handle(), options).listen(listener));
    Server { node, address, door }
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
    for key in ["changed", "gone", "kept"] {
        nkv.put(key, "1").await.unwrap();
    }
    until("it has them", async || original.has("kept", "1") && original.has("changed", "1")).await;
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
