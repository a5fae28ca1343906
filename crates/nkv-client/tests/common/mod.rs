//! What tests need: a real server, a proxy that cuts, a server that follows a script, and limits to every wait.
#![allow(dead_code, reason = "each test file uses a part of it")]

#[cfg(feature = "ws")]
pub(crate) mod bridge;
#[cfg(feature = "cli")]
pub(crate) mod cli;
pub(crate) mod proxy;

use std::time::Duration;

use bytes::BytesMut;
use nkv_client::{Client, ClientBuilder, Event, Subscription};
use nkv_protocol::{Decoder, Kind, Limits};
use nkv_server::Server;
#[allow(unused_imports, reason = "each test file uses a part of it")]
pub(crate) use proxy::{Dice, Proxy};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

pub(crate) async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), work).await.expect("it took too long")
}

/// A server and its address: behind a bridge of WebSockets in `ws_suites.rs`, and with `NKV_TEST_WS=1`.
pub(crate) async fn server() -> (Server, String) {
    let server = Server::builder().listen("127.0.0.1:0".parse().unwrap()).bind().await.unwrap();
    let addr = front(&server.addresses()[0].to_string()).await;
    (server, addr)
}

/// The address by which the tests reach a server.
pub(crate) async fn front(addr: &str) -> String {
    #[cfg(feature = "ws")]
    if env!("CARGO_CRATE_NAME") == "ws_suites" || std::env::var_os("NKV_TEST_WS").is_some() {
        return bridge::to(addr).await;
    }
    addr.to_owned()
}

/// A client that comes back quickly.
pub(crate) fn eager(addr: &str) -> ClientBuilder {
    Client::builder(addr).backoff(Duration::from_millis(5), Duration::from_millis(50))
}

pub(crate) async fn next(subscription: &mut Subscription) -> Event {
    within(subscription.next()).await.expect("the subscription has ended")
}

/// Events until the next `Synced`, without it.
pub(crate) async fn until_synced(subscription: &mut Subscription) -> Vec<Event> {
    let mut events = Vec::new();
    loop {
        match next(subscription).await {
            Event::Synced { .. } => return events,
            event => events.push(event),
        }
    }
}

/// Events as short words: `a=1`, `a deleted`, `synced`.
pub(crate) fn short(event: &Event) -> String {
    match event {
        Event::Update { entry, .. } => format!("{}={}", entry.key, String::from_utf8_lossy(&entry.value)),
        Event::Gone { key, reason, .. } => format!("{key} {}", reason.as_str()),
        Event::Synced { .. } => "synced".into(),
        Event::Connected { .. } => "Connected".into(),
        other => format!("{other:?}"),
    }
}

pub(crate) fn shorts(events: &[Event]) -> Vec<String> {
    events.iter().map(short).collect()
}

/// A server that does what a test says.
pub(crate) struct Scripted {
    listener: TcpListener,
    pub(crate) addr: String,
}

impl Scripted {
    pub(crate) async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        Scripted { listener, addr }
    }

    /// The next connection, greeted.
    pub(crate) async fn accept(&self) -> Peer {
        let mut peer = self.accept_silent().await;
        let (kind, id, _) = peer.request().await.expect("no greeting");
        assert_eq!(kind, Kind::Connect);
        peer.ok(&id, None).await;
        peer
    }

    pub(crate) async fn accept_silent(&self) -> Peer {
        let (stream, _) = within(self.listener.accept()).await.unwrap();
        Peer { stream, input: BytesMut::new(), decoder: Decoder::new(Limits::default()), reads: 0 }
    }
}

/// A client, seen from the server.
pub(crate) struct Peer {
    pub(crate) stream: TcpStream,
    input: BytesMut,
    decoder: Decoder,
    /// How many reads have brought something.
    pub(crate) reads: usize,
}

impl Peer {
    /// The next request: its kind, id and key; `None` at the end.
    pub(crate) async fn request(&mut self) -> Option<(Kind, String, String)> {
        loop {
            let decoded = self.decoder.decode(&self.input);
            let consumed = decoded.consumed;
            let item = decoded.item.map(|item| {
                let request = item.expect("a good request");
                (request.kind, request.id.as_json().to_owned(), request.key.into_owned())
            });
            bytes::Buf::advance(&mut self.input, consumed);
            if item.is_some() {
                return item;
            }
            self.input.reserve(64 << 10);
            match within(self.stream.read_buf(&mut self.input)).await {
                Ok(1..) => self.reads += 1,
                _ => return None,
            }
        }
    }

    pub(crate) async fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).await.unwrap();
    }

    pub(crate) async fn ok(&mut self, id: &str, revision: Option<u64>) {
        let revision = revision.map_or(String::new(), |revision| format!(r#","revision":{revision}"#));
        let line = format!(r#"{{"Base":{{"id":{id},"status":200,"message":"No Error","epoch":"e1"{revision}}}}}"#);
        self.send(&(line + "\n")).await;
    }

    /// `Hello`, entries and `Synced` for a subscription.
    pub(crate) async fn snapshot(&mut self, pattern: &str, entries: &[(&str, &str, u64)], revision: u64) {
        self.send("\"Hello\"\n").await;
        for (key, value, revision) in entries {
            self.update(key, value, *revision).await;
        }
        self.send(&format!(r#"{{"Synced":{{"key":"{pattern}","revision":{revision},"epoch":"e1"}}}}"#)).await;
        self.send("\n").await;
    }

    pub(crate) async fn update(&mut self, key: &str, value: &str, revision: u64) {
        let len = value.len();
        let update = format!(r#"{{"Update":{{"key":"{key}","revision":{revision},"skipped":0,"len":{len}}}}}"#);
        self.send(&format!("{update}\n{value}\n")).await;
    }
}
