//! A door on a port of its own, and a client that says exactly what a test wants said.

#![allow(dead_code, reason = "each test uses some of it")]

use std::net::SocketAddr;
use std::time::Duration;

use nkv_http::{Door, Options};
use nkv_node::{Handle, Limits, Node};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

pub(crate) struct TestDoor {
    pub(crate) node: Option<Node>,
    pub(crate) nkv: Handle,
    pub(crate) address: SocketAddr,
}

impl TestDoor {
    pub(crate) async fn start() -> Self {
        Self::with(Options::default(), Limits::default()).await
    }

    pub(crate) async fn with(options: Options, limits: Limits) -> Self {
        Self::of(Node::builder().limits(limits).start().await.expect("a node"), options).await
    }

    pub(crate) async fn of(node: Node, options: Options) -> Self {
        let nkv = node.handle();
        let lines = nkv_server::Door::new(nkv.clone(), nkv_server::Options::default());
        let door = Door::new(nkv.clone(), options).expect("good options").with_messages(move |stream, peer| {
            let lines = lines.clone();
            async move { lines.serve(stream, peer).await }
        });
        let listener = TcpSocket::new_v4().expect("a socket");
        // As the server's: what the system holds for a peer is no more than this.
        listener.set_send_buffer_size(128 << 10).expect("a socket");
        listener.bind("127.0.0.1:0".parse().expect("an address")).expect("a port");
        let listener = listener.listen(1_024).expect("a port");
        let address = listener.local_addr().expect("an address");
        let handle = nkv.clone();
        tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    () = handle.stopping() => break,
                    accepted = listener.accept() => {
                        let (stream, peer) = accepted.expect("a connection");
                        stream.set_nodelay(true).expect("a socket");
                        let door = door.clone();
                        connections.spawn(async move { door.serve(stream, peer).await });
                    }
                }
            }
            while connections.join_next().await.is_some() {}
        });
        TestDoor { node: Some(node), nkv, address }
    }

    pub(crate) async fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).await.expect("a connection");
        stream.set_nodelay(true).expect("a socket");
        stream
    }

    /// Sends a request by a connection of its own.
    pub(crate) async fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        let mut stream = self.connect().await;
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n", self.address);
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if !body.is_empty() || method == "PUT" || method == "POST" {
            head.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        head.push_str("\r\n");
        stream.write_all(&[head.as_bytes(), body].concat()).await.expect("sent");
        Reply::read_to_end(&mut stream).await
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.send("GET", path, &[], b"").await
    }

    pub(crate) async fn put(&self, key: &str, value: &str) -> Reply {
        let reply = self.send("PUT", &format!("/v1/kv/{key}"), &[], value.as_bytes()).await;
        assert_eq!(reply.status, 200, "{reply:?}");
        reply
    }

    /// Says these bytes, and reads to the end what is answered.
    pub(crate) async fn say(&self, bytes: &[u8]) -> Reply {
        let mut stream = self.connect().await;
        stream.write_all(bytes).await.expect("sent");
        Reply::read_to_end(&mut stream).await
    }

    /// Waits until no peer holds anything.
    pub(crate) async fn nothing_is_held(&self) {
        self.nkv.keep_figures();
        let is_empty = || self.nkv.figures().expect("figures").is_some_and(|figures| figures.queued_bytes == 0);
        timeout(PATIENCE, async {
            while !is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .expect("what peers held is given back");
    }
}

#[derive(Debug, Default)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
    /// Whether all that was announced has come.
    pub(crate) is_whole: bool,
}

impl Reply {
    pub(crate) async fn read_to_end(stream: &mut TcpStream) -> Reply {
        let mut bytes = Vec::new();
        let read = timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("an end");
        // A reset ends it too.
        drop(read);
        Reply::parse(&bytes)
    }

    pub(crate) fn parse(bytes: &[u8]) -> Reply {
        let Some(at) = bytes.windows(4).position(|part| part == b"\r\n\r\n") else { return Reply::default() };
        let head = String::from_utf8_lossy(&bytes[..at]).into_owned();
        let rest = &bytes[at + 4..];
        let status = head.split_whitespace().nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        let mut reply = Reply { status, head, body: rest.to_vec(), is_whole: true };
        if reply.header("transfer-encoding").as_deref() == Some("chunked") {
            (reply.body, reply.is_whole) = unchunked(rest);
        } else if let Some(len) = reply.header("content-length") {
            reply.is_whole = rest.len() == len.parse::<usize>().unwrap_or(usize::MAX);
        }
        reply
    }

    pub(crate) fn header(&self, name: &str) -> Option<String> {
        self.head.lines().skip(1).find_map(|line| {
            let (found, value) = line.split_once(':')?;
            found.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
        })
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    pub(crate) fn problem(&self) -> String {
        assert_eq!(self.header("content-type").as_deref(), Some("application/problem+json"), "{self:?}");
        let problem = self.json();
        assert_eq!(problem["status"], self.status, "{self:?}");
        problem["type"].as_str().and_then(|kind| kind.strip_prefix("urn:nkv:problem:")).unwrap_or_default().to_owned()
    }
}

fn unchunked(mut rest: &[u8]) -> (Vec<u8>, bool) {
    let mut body = Vec::new();
    loop {
        let Some(at) = rest.windows(2).position(|part| part == b"\r\n") else { return (body, false) };
        let len = usize::from_str_radix(&String::from_utf8_lossy(&rest[..at]), 16).expect("a chunk's length");
        rest = &rest[at + 2..];
        if len == 0 {
            return (body, true);
        }
        if rest.len() < len + 2 {
            return (body, false);
        }
        body.extend_from_slice(&rest[..len]);
        rest = &rest[len + 2..];
    }
}
