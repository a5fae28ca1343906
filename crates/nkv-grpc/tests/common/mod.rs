//! A node with its door at port 0, and clients of it.
#![allow(dead_code, unreachable_pub, missing_docs, missing_debug_implementations)]

use std::net::SocketAddr;
use std::time::Duration;

use nkv_grpc::v1::kv_client::KvClient;
use nkv_grpc::v1::watch_response::Event;
use nkv_grpc::v1::{PutRequest, WatchRequest, WatchResponse};
use nkv_grpc::{Door, Options};
use nkv_node::{Handle, Limits, Node};
use nkv_testkit::engine::ScriptedEngine;
use tokio::task::JoinHandle;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

/// Generous: two busy cores are no failure.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub struct Server {
    pub node: Node,
    pub address: SocketAddr,
    pub door: JoinHandle<()>,
}

impl Server {
    pub async fn start() -> Self {
        Server::of(Node::builder().start().await.unwrap(), Options::default()).await
    }

    pub async fn with(options: Options) -> Self {
        Server::of(Node::builder().start().await.unwrap(), options).await
    }

    pub async fn with_limits(limit: impl FnOnce(&mut Limits)) -> Self {
        let mut limits = Limits::default();
        limit(&mut limits);
        Server::of(Node::builder().limits(limits).start().await.unwrap(), Options::default()).await
    }

    pub async fn of(node: Node, options: Options) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let door = tokio::spawn(Door::new(node.handle(), options).listen(listener));
        Server { node, address, door }
    }

    /// In front of an engine that it follows.
    pub async fn scripted() -> (Self, ScriptedEngine) {
        let engine = ScriptedEngine::default();
        let node = Node::builder().engine(engine.clone()).start().await.unwrap();
        let handle = node.handle();
        timely(async {
            while handle.health().await.is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        (Server::of(node, Options::default()).await, engine)
    }

    pub fn handle(&self) -> Handle {
        self.node.handle()
    }

    pub fn endpoint(&self) -> Endpoint {
        Channel::from_shared(format!("http://{}", self.address)).unwrap().connect_timeout(PATIENCE)
    }

    pub async fn channel(&self) -> Channel {
        self.endpoint().connect().await.unwrap()
    }

    /// A client that takes little ahead of its reader.
    pub async fn slow_client(&self) -> KvClient<Channel> {
        let endpoint = self.endpoint().initial_stream_window_size(65_535).initial_connection_window_size(1 << 20);
        KvClient::new(endpoint.connect().await.unwrap())
    }

    pub async fn client(&self) -> KvClient<Channel> {
        KvClient::new(self.channel().await).max_decoding_message_size(128 << 20)
    }
}

pub fn put(key: &str, value: impl Into<Vec<u8>>) -> PutRequest {
    PutRequest { key: key.into(), value: value.into().into(), ..PutRequest::default() }
}

pub fn watch(patterns: &[&str]) -> WatchRequest {
    let patterns = patterns.iter().map(ToString::to_string).collect();
    WatchRequest { patterns, ..WatchRequest::default() }
}

pub fn code<T: std::fmt::Debug>(result: Result<T, Status>) -> Code {
    result.unwrap_err().code()
}

pub async fn timely<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("in time")
}

/// The next event of a watch; an error is how it ended.
pub async fn try_next(stream: &mut Streaming<WatchResponse>) -> Result<Event, Status> {
    Ok(timely(stream.message()).await?.expect("not at its end").event.unwrap())
}

pub async fn next(stream: &mut Streaming<WatchResponse>) -> Event {
    try_next(stream).await.unwrap()
}

/// Events as short texts, up to and with the first `synced`.
pub async fn up_to_synced(stream: &mut Streaming<WatchResponse>) -> Vec<String> {
    let mut texts = Vec::new();
    loop {
        let event = next(stream).await;
        texts.push(text(&event));
        if matches!(event, Event::Synced(_)) {
            return texts;
        }
    }
}

pub fn text(event: &Event) -> String {
    match event {
        Event::Began(_) => "began".into(),
        Event::Put(put) => {
            let value =
                if put.value.len() > 40 { put.value.len().to_string() } else { put.value.escape_ascii().to_string() };
            format!("put {} {value} {} {}", put.key, put.revision, put.skipped)
        }
        Event::Delete(gone) => format!("delete {} {} {:?} {}", gone.key, gone.revision, gone.reason(), gone.skipped),
        Event::Synced(synced) => format!("synced {}", synced.revision),
        Event::Reset(_) => "reset".into(),
    }
}

/// Waits until `is_so`.
pub async fn until(mut is_so: impl FnMut() -> bool) {
    timely(async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// A message as its bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Raw;

impl tonic::codec::Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl tonic::codec::Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, into: &mut tonic::codec::EncodeBuf<'_>) -> Result<(), Status> {
        bytes::BufMut::put_slice(into, &item);
        Ok(())
    }
}

impl tonic::codec::Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut tonic::codec::DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let len = bytes::Buf::remaining(from);
        Ok(Some(bytes::Buf::copy_to_bytes(from, len).to_vec()))
    }
}

/// Calls a method with the bytes of a message, and gives those of the answer.
pub async fn raw_call(channel: &Channel, path: &'static str, message: &[u8]) -> Result<Vec<u8>, Status> {
    let mut grpc = tonic::client::Grpc::new(channel.clone()).max_decoding_message_size(128 << 20);
    grpc.ready().await.unwrap();
    let path = http::uri::PathAndQuery::from_static(path);
    let answer = timely(grpc.unary(tonic::Request::new(message.to_vec()), path, Raw)).await?;
    Ok(answer.into_inner())
}
