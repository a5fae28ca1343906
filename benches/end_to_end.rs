//! Latencies of one client of a server in memory, over loopback. Resource: processor and the kernel's sockets; no disk.
//!
//! The client speaks the protocol itself, over blocking sockets, so that the server is measured and not a client
//! library. Both share the machine's processors: the figures are latencies of one client, not the server's limit.

mod support;

use std::hint::black_box;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use bytes::BytesMut;
use criterion::{BenchmarkId, Criterion, Throughput};
use nkv_protocol::{Body, Kind, Message, MessageDecoder, Request, ValueForm};
use nkv_server::Server;

use crate::support::{criterion, keys};

/// Keys in the server, asked for in turn.
const KEYS: usize = 1_000;
/// Gets that are sent before the first answer is read.
const PIPELINED: usize = 100;
/// Connections that are told of each put.
const SUBSCRIBERS: usize = 100;
const VALUE: &[u8] = &[b'v'; 100];
/// No answer takes so long.
const PATIENCE: Duration = Duration::from_secs(10);

fn main() {
    let mut criterion = criterion();
    let addr = serve();
    one_client(&mut criterion, &addr);
    fan_out(&mut criterion, &addr);
    criterion.final_summary();
}

fn one_client(criterion: &mut Criterion, addr: &str) {
    let keys: Vec<String> = keys(KEYS).iter().map(ToString::to_string).collect();
    let mut client = Connection::open(addr);
    for key in &keys {
        client.put(key);
    }
    let mut keys = keys.iter().cycle();
    let mut key = || keys.next().expect("it goes round").as_str();
    let mut group = criterion.benchmark_group("end_to_end");
    group.bench_function("put", |bencher| bencher.iter(|| client.put(key())));
    group.bench_function("get", |bencher| {
        bencher.iter(|| {
            client.ask(&Request::new(Kind::Get, key()));
            client.flush();
            black_box(client.answer())
        });
    });
    group.throughput(Throughput::Elements(PIPELINED as u64));
    group.bench_function(BenchmarkId::new("pipelined_gets", PIPELINED), |bencher| {
        bencher.iter(|| {
            (0..PIPELINED).for_each(|_| client.ask(&Request::new(Kind::Get, key())));
            client.flush();
            (0..PIPELINED).for_each(|_| _ = black_box(client.answer()));
        });
    });
    group.finish();
}

/// From the put to the last subscriber's having read it.
fn fan_out(criterion: &mut Criterion, addr: &str) {
    let mut subscribers: Vec<_> = (0..SUBSCRIBERS).map(|_| Connection::subscribed(addr, "fan.out")).collect();
    let mut client = Connection::open(addr);
    let mut group = criterion.benchmark_group("end_to_end");
    group.throughput(Throughput::Elements(SUBSCRIBERS as u64));
    group.bench_function(BenchmarkId::new("fan_out", SUBSCRIBERS), |bencher| {
        bencher.iter(|| {
            let revision = client.put("fan.out");
            for subscriber in &mut subscribers {
                let Message::Update { revision: told, skipped: 0, .. } = subscriber.message() else {
                    panic!("a subscriber was told something else");
                };
                assert_eq!(told, revision);
            }
        });
    });
    group.finish();
}

/// Starts a server on a thread of its own, which ends with the process.
fn serve() -> String {
    let (started, addr) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime can be made");
        runtime.block_on(async {
            let loopback = "127.0.0.1:0".parse().expect("it is an address");
            let server = Server::builder().listen(loopback).bind().await.expect("a port is free");
            let addr = server.addresses()[0].to_string();
            started.send(addr).expect("somebody waits for it");
            server.wait().await
        })
    });
    addr.recv_timeout(PATIENCE).expect("the server starts")
}

/// A connection on which values travel as payload.
struct Connection {
    stream: TcpStream,
    requests: BytesMut,
    input: BytesMut,
    decoder: MessageDecoder,
    next_id: u64,
}

impl Connection {
    fn open(addr: &str) -> Self {
        let stream = TcpStream::connect(addr).expect("the server listens");
        stream.set_nodelay(true).expect("it is a TCP socket");
        stream.set_read_timeout(Some(PATIENCE)).expect("it is not zero");
        let (requests, input, decoder) = (BytesMut::new(), BytesMut::new(), MessageDecoder::new());
        let mut connection = Connection { stream, requests, input, decoder, next_id: 0 };
        let mut connect = Request::new(Kind::Connect, "");
        connect.values = Some(ValueForm::Payload);
        connection.ask(&connect);
        connection.flush();
        connection.answer();
        connection
    }

    fn subscribed(addr: &str, key: &str) -> Self {
        let mut connection = Connection::open(addr);
        connection.ask(&Request::new(Kind::Subscribe, key));
        connection.flush();
        assert_eq!(connection.message(), Message::Hello);
        connection
    }

    /// Puts and returns the revision.
    fn put(&mut self, key: &str) -> u64 {
        let mut put = Request::new(Kind::Put, key);
        put.value = Some(VALUE.into());
        self.ask(&put);
        self.flush();
        self.answer().revision.expect("a put has a revision")
    }

    fn ask(&mut self, request: &Request<'_>) {
        self.next_id += 1;
        request.encode(self.next_id, &mut self.requests);
    }

    fn flush(&mut self) {
        self.stream.write_all(&self.requests).expect("the server reads");
        self.requests.clear();
    }

    fn answer(&mut self) -> Box<Body> {
        match self.message() {
            Message::Answer(body) if body.status == 200 => body,
            other => panic!("not the answer hoped for: {other:?}"),
        }
    }

    fn message(&mut self) -> Message {
        loop {
            let (consumed, message) = self.decoder.decode(&self.input).expect("the server keeps to the protocol");
            drop(self.input.split_to(consumed));
            if let Some(message) = message {
                return message;
            }
            let mut chunk = [0; 16 << 10];
            let len = self.stream.read(&mut chunk).expect("the server answers");
            assert_ne!(len, 0, "the server has hung up");
            self.input.extend_from_slice(&chunk[..len]);
        }
    }
}
