//! The later wires of the first nkv: lines of text, and the same in frames, as its clients in Rust and Go send and read them.

#![cfg(feature = "text-wire")]

mod support;

use std::time::Duration;

use nkv_server::{Address, Server};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(20);

struct Ports {
    server: Server,
    tcp: String,
    unix: std::path::PathBuf,
    _dir: tempfile::TempDir,
}

async fn start() -> Ports {
    let dir = tempfile::tempdir().expect("a directory");
    let unix = dir.path().join("nkv.sock");
    let address = Address::Unix { path: unix.clone() };
    let builder = Server::builder().listen("127.0.0.1:0".parse().expect("an address")).listen(address);
    let server = builder.bind().await.expect("a server");
    Ports { tcp: server.addresses()[0].to_string(), server, unix, _dir: dir }
}

impl Ports {
    /// A request by a connection of its own, read to its end.
    async fn tcp(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(&self.tcp).await.expect("a connection");
        to_end(&mut stream, request.as_bytes()).await
    }

    async fn unix(&self, request: &str) -> String {
        let mut stream = UnixStream::connect(&self.unix).await.expect("a connection");
        to_end(&mut stream, request.as_bytes()).await
    }

    /// The same in frames, which are given without their lengths.
    async fn framed(&self, request: &str) -> String {
        let mut stream = UnixStream::connect(&self.unix).await.expect("a connection");
        stream.write_all(&frame(request)).await.expect("sent");
        read_frame(&mut stream).await
    }
}

async fn to_end(stream: &mut (impl AsyncRead + AsyncWrite + Unpin), request: &[u8]) -> String {
    stream.write_all(request).await.expect("sent");
    let mut answer = String::new();
    drop(timeout(PATIENCE, stream.read_to_string(&mut answer)).await.expect("an end"));
    answer
}

fn frame(text: &str) -> Vec<u8> {
    [&u32::try_from(text.len()).expect("short").to_le_bytes(), text.as_bytes()].concat()
}

async fn read_frame(stream: &mut UnixStream) -> String {
    let read = async {
        let len = stream.read_u32_le().await.expect("a length");
        let mut text = vec![0; len as usize];
        stream.read_exact(&mut text).await.expect("a text");
        String::from_utf8(text).expect("text")
    };
    timeout(PATIENCE, read).await.expect("a frame")
}

async fn line(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut line = Vec::new();
    let read = async {
        while !line.ends_with(b"\n") {
            line.push(stream.read_u8().await.expect("a byte"));
        }
    };
    timeout(PATIENCE, read).await.expect("a line");
    String::from_utf8(line).expect("text")
}

#[tokio::test]
async fn lines_are_answered_in_the_form_that_each_client_knows() {
    let ports = start().await;
    // The published client in Go, on TCP.
    assert_eq!(ports.tcp("PUT 1 me a.b aGk=\n").await, "1 OK\n");
    assert_eq!(ports.tcp("PUT 2 me a eW8=\n").await, "2 OK\n");
    assert_eq!(ports.tcp("GET 3 me a.b\n").await, "3 OK aGk=\n");
    assert_eq!(ports.tcp("GET 4 me a.*\n").await, "4 OK eW8= aGk=\n", "the branch itself is among them");
    assert_eq!(ports.tcp("GET 5 me none\n").await, "5 FAILED\n");
    assert_eq!(ports.tcp("DEL 6 me none\n").await, "6 FAILED\n");
    assert_eq!(ports.tcp("PUT 7 me a..b aGk=\n").await, "7 FAILED\n");
    assert_eq!(ports.tcp("PUT 8 me a\n").await, "8 FAILED\n", "an empty value");
    // The client in Rust, on a Unix socket; and one in Go there.
    assert_eq!(ports.unix("GET 1 me a.*\n").await, "data 1 OK a eW8= a.b aGk=\n");
    assert_eq!(ports.unix("GET golang-nkv-client-7 me a.b\n").await, "golang-nkv-client-7 OK aGk=\n");
    assert_eq!(ports.unix("DEL 2 me none\n").await, "base 2 OK\n");
    assert_eq!(ports.unix("HEALTH 3 me HK\n").await, "base 3 OK\n");
    assert_eq!(ports.unix("VERSION 4 me DISCARDME\n").await, "version 4 OK 0.1.1\n");
    assert_eq!(ports.unix("TRACE 5 me a.b\n").await, "trace 5 FAILED\n");
    assert_eq!(ports.unix("DEL 6 me a.*\n").await, "base 6 OK\n");
    assert_eq!(ports.server.handle().stats().await.unwrap().keys, 0);
}

#[tokio::test]
async fn frames_carry_the_same() {
    let ports = start().await;
    assert_eq!(ports.framed("PUT 1 me a.b aGk=\n").await, "base 1 OK\n");
    // The client in Go ends a request with two newlines, and one without any is understood too.
    assert_eq!(ports.framed("GET golang-nkv-client-1 me a.b\n\n").await, "golang-nkv-client-1 OK aGk=\n");
    assert_eq!(ports.framed("GET 2 me a.b").await, "data 2 OK a.b aGk=\n");
    assert_eq!(ports.framed("VERSION 3 me DISCARDME\n").await, "version 3 OK 0.1.1\n");
    // Whatever the length has in its first byte, and however the frame comes.
    for len in [10, 13, 32, 123, 123 + 256] {
        let text = format!("GET 1 c {}\n", "k".repeat(len - 9));
        assert_eq!(ports.framed(&text).await, "data 1 FAILED\n", "{len}");
        let mut stream = UnixStream::connect(&ports.unix).await.unwrap();
        for part in frame(&text).chunks(3) {
            stream.write_all(part).await.unwrap();
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        assert_eq!(read_frame(&mut stream).await, "data 1 FAILED\n", "{len}, in parts");
    }
    // An empty value would shift all that follow.
    ports.server.handle().put("a.empty", "").await.unwrap();
    assert_eq!(ports.framed("GET 4 me a.*\n").await, "data 4 OK a.b aGk=\n");
    // What cannot be understood is closed without an answer, as is a frame that is too long.
    for bytes in [frame("PUT 1 me\n"), frame("GET 1 me a b c\n"), [&[0xff, 0xff, 0xff, 0][..], b"PUT 1 me a"].concat()]
    {
        let mut stream = UnixStream::connect(&ports.unix).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        drop(timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("an end"));
        assert!(answer.is_empty(), "{}", String::from_utf8_lossy(&answer));
    }
}

#[tokio::test]
async fn a_subscription_is_sent_the_present_values_and_each_change() {
    let ports = start().await;
    let nkv = ports.server.handle();
    nkv.put("lamp.hall", "on").await.unwrap();
    let mut stream = UnixStream::connect(&ports.unix).await.unwrap();
    stream.write_all(&frame("SUB 1 me lamp\n")).await.unwrap();
    assert_eq!(read_frame(&mut stream).await, "HELLO\n");
    assert_eq!(read_frame(&mut stream).await, "UPDATE lamp.hall b24=\n");
    nkv.put("lamp", "x").await.unwrap();
    assert_eq!(read_frame(&mut stream).await, "UPDATE lamp eA==\n");
    nkv.delete("lamp.hall").await.unwrap();
    assert_eq!(read_frame(&mut stream).await, "CLOSE lamp.hall\n");
    assert_eq!(ports.framed("TRACE 2 other lamp.hall\n").await, "trace 2 OK me\n");
    assert_eq!(ports.framed("UNSUB 3 other lamp\n").await, "base 3 OK\n", "another client's");
    assert_eq!(ports.framed("UNSUB 3 other none\n").await, "base 3 FAILED\n");
    assert_eq!(ports.framed("UNSUB 4 me lamp\n").await, "base 4 OK\n");
    let mut rest = Vec::new();
    drop(timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("it ends"));
    assert!(rest.is_empty());

    // The published client in Go sends its line without an end.
    let mut stream = TcpStream::connect(&ports.tcp).await.unwrap();
    stream.write_all(b"SUB golang-nkv-client-1 me lamp").await.unwrap();
    assert_eq!(line(&mut stream).await, "HELLO\n");
    assert_eq!(line(&mut stream).await, "UPDATE lamp eA==\n");
    drop(stream);
    timeout(PATIENCE, async {
        while nkv.stats().await.unwrap().subscriptions > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("its subscription ends with it");
    timeout(Duration::from_secs(10), ports.server.shutdown()).await.expect("it stops").unwrap();
}

/// What only looks like it is refused as before.
#[tokio::test]
async fn http_is_still_refused_by_name() {
    let ports = start().await;
    for request in ["GET / HTTP/1.1\r\nHost: a\r\n\r\n", "PUT /a b HTTP/1.0\r\n\r\n", "TRACE a b HTTP/1.1\r\n"] {
        let answer = ports.tcp(request).await;
        assert!(answer.contains("\"status\":400") && !answer.contains("OK\n"), "{answer}");
    }
}
