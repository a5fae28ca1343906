//! All doors of one server, two of them at one port: what one writes the others read.
#![cfg(all(feature = "http", feature = "grpc"))]

use std::time::Duration;

use nkv_grpc::v1::kv_client::KvClient;
use nkv_grpc::v1::{GetRequest, PutRequest};
use nkv_server::{Address, Options, Server, nkv_grpc};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::Code;
use tonic::transport::Channel;

async fn start() -> (Server, String, String) {
    // The same address for both.
    let address: Address = "127.0.0.1:0".parse().expect("an address");
    let builder = Server::builder().listen(address.clone()).http(address.clone()).grpc(address);
    let server = builder.bind().await.expect("a server");
    assert!(server.grpc_addresses().is_empty(), "no port of its own");
    let (lines, http) = (server.addresses()[0].to_string(), server.http_addresses()[0].to_string());
    (server, lines, http)
}

async fn say(address: &str, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.expect("a connection");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    answer
}

#[tokio::test]
async fn http_and_grpc_share_a_port() {
    let (server, lines, http) = start().await;
    let channel = Channel::from_shared(format!("http://{http}")).unwrap().connect().await.unwrap();
    let mut grpc = KvClient::new(channel);
    let put = PutRequest { key: "a".into(), value: "by gRPC".into(), ..Default::default() };
    grpc.put(put).await.unwrap();
    let get = format!("GET /v1/kv/a HTTP/1.1\r\nHost: {http}\r\nConnection: close\r\n\r\n");
    assert!(say(&http, &get).await.ends_with("by gRPC"));
    let put = format!("PUT /v1/kv/b HTTP/1.1\r\nHost: {http}\r\nConnection: close\r\nContent-Length: 7\r\n\r\nby HTTP");
    assert!(say(&http, &put).await.starts_with("HTTP/1.1 200"));
    let got = grpc.get(GetRequest { key: "b".into() }).await.unwrap().into_inner();
    assert_eq!(got.value, "by HTTP");
    let client = nkv_client::Client::connect(&lines).await.unwrap();
    assert_eq!(client.get("b").await.unwrap().unwrap().value, "by HTTP");

    // What only looks like gRPC is nothing for REST, and gRPC is not spoken by HTTP/1.1.
    for kind in ["application/grpc", "application/grpc-web", "application/grpcx"] {
        let request = format!(
            "POST /set HTTP/1.1\r\nHost: {http}\r\nConnection: close\r\nContent-Type: {kind}\r\nContent-Length: 2\r\n\r\n{{}}"
        );
        assert!(say(&http, &request).await.starts_with("HTTP/1.1 415"), "{kind}");
    }
    server.shutdown().await.unwrap();
    let gone = grpc.get(GetRequest { key: "b".into() }).await.unwrap_err();
    assert_eq!(gone.code(), Code::Unavailable);
}

#[tokio::test]
async fn a_foreign_host_reaches_nothing_by_grpc_either() {
    let (server, _, http) = start().await;
    let channel = Channel::from_shared(format!("http://{http}")).unwrap();
    let channel = channel.origin("http://evil.example".parse().unwrap()).connect().await.unwrap();
    let put = PutRequest { key: "a".into(), value: "x".into(), ..Default::default() };
    let refused = KvClient::new(channel).put(put).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");
    assert_eq!(server.handle().get("a").await.unwrap(), None);
}

#[tokio::test]
async fn figures_are_answered_although_no_connection_is_left_and_under_any_host() {
    let address: Address = "127.0.0.1:0".parse().expect("an address");
    let mut options = Options::default();
    options.connections_max = 1;
    let builder = Server::builder().options(options).listen(address.clone()).http(address.clone()).metrics(address);
    let server = builder.bind().await.expect("a server");
    let (http, metrics) = (server.http_addresses()[0].to_string(), server.metrics_addresses()[0].to_string());
    let ask = |host: &str, path: &str| format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    let _held = TcpStream::connect(&http).await.expect("the one connection");
    let refused = async { while !say(&http, "").await.starts_with("HTTP/1.1 503") {} };
    timeout(Duration::from_secs(10), refused).await.expect("there is no other place");
    for path in ["/livez", "/readyz", "/metrics"] {
        let answer = say(&metrics, &ask("balancer.example", path)).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{path}: {answer}");
    }
    assert!(say(&metrics, &ask(&metrics, "/v1/kv")).await.starts_with("HTTP/1.1 404"), "and nothing else");
    server.shutdown().await.unwrap();
}
