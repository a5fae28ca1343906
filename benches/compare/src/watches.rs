//! Many subscriptions over many connections, on two servers in front of one engine: that each change arrives at all of them, and how
//! many watches the engine has.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use memchr::memmem;

use crate::Result;
use crate::drivers::{self, Event, Protocol};
use crate::hist::Hist;
use crate::pool::{Keys, Pool, Target};
use crate::report::Figures;
use crate::sys::{self, SECOND};

/// Subscriptions of a connection, each of another key.
const EACH: usize = 10;
/// Puts of each key.
const PUTS: u64 = 10;
/// A change must have arrived everywhere by then.
const PATIENCE: u64 = 8 * SECOND;

pub(crate) fn run(nodes: [Target; 2], engine: Target, value: usize, subscriptions: usize) -> Result<Figures> {
    let keys: Vec<String> = (0..EACH).map(|number| Keys::plain(EACH).key(number)).collect();
    let subscribers = subscriptions / EACH;
    let mut pool = Pool::open(nodes[0], value, 1, 1)?;
    pool.add(subscribers / 2, 1)?;
    pool.target = nodes[1];
    pool.add(subscribers - subscribers / 2, 1)?;
    for key in &keys {
        pool.subscribe_others(key)?;
    }
    let (mut latencies, mut seq, mut bad) = (Hist::new(), 0, 0);
    for key in (0..PUTS).flat_map(|_| &keys) {
        seq += 1;
        let begin = sys::now();
        let writer = &mut pool.connections[0];
        writer.request(begin, |driver, slot, out| driver.publish(slot, key, begin, seq, out));
        writer.flush(&pool.epoll, 0);
        let (mut left, mut reply) = (subscribers, None);
        while (left > 0 || reply.is_none()) && sys::now() < begin + PATIENCE {
            pool.turn(10, &mut |_, event| match event {
                Event::Update { seq: of, at } if *of == seq => {
                    left = left.saturating_sub(1);
                    latencies.add(sys::now() - at);
                }
                Event::Reply { slot, good: true } => reply = Some(*slot),
                Event::Reply { .. } | Event::BadUpdate => bad += 1,
                _ => {}
            })?;
        }
        pool.connections[0].replied(reply.ok_or("a put was not answered")?)?;
    }
    if bad > 0 {
        return Err(format!("{bad} answers or changes were not what they should be").into());
    }
    Ok(Figures::from([
        ("watches", watches(engine)?),
        ("delivered_share", latencies.count as f64 / (seq * subscribers as u64) as f64),
        ("p50_us", latencies.us(0.5)),
        ("p99_us", latencies.us(0.99)),
        ("nodes_mb", nodes.map(|node| sys::rss_mb(node.pid)).iter().sum()),
        ("engine_mb", sys::rss_mb(engine.pid)),
    ]))
}

/// How many watches an engine has: what it says itself.
fn watches(engine: Target) -> Result<f64> {
    let (request, name) = match engine.protocol {
        Protocol::Etcd => ("GET /metrics HTTP/1.0\r\n\r\n", "\netcd_debugging_mvcc_watcher_total "),
        _ => ("CONNECT {}\r\nSUB info 1\r\nPUB $JS.API.STREAM.INFO.KV_nkv info 0\r\n\r\n", "\"consumer_count\":"),
    };
    let mut socket = TcpStream::connect(engine.addr)?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    socket.write_all(request.as_bytes())?;
    let (mut answer, mut buf) = (Vec::new(), [0; 4096]);
    loop {
        let len = socket.read(&mut buf)?;
        if len == 0 {
            return Err("the engine does not say how many watches it has".into());
        }
        answer.extend_from_slice(&buf[..len]);
        let rest = memmem::find(&answer, name.as_bytes()).map(|at| &answer[at + name.len()..]);
        let digits = rest.and_then(|rest| rest.split_at_checked(rest.iter().position(|byte| !byte.is_ascii_digit())?));
        if let Some((digits, _)) = digits {
            return Ok(drivers::number(digits).ok_or("the engine says no number of watches")? as f64);
        }
    }
}
