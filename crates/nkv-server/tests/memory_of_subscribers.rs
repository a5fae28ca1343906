//! What waits for a subscriber that does not read, counted in the allocator: its values, and nothing encoded.

#![allow(clippy::unwrap_used)]

mod support;

use std::net::TcpStream;
use std::thread;

use nkv_server::Options;
use peak_alloc::PeakAlloc;
use support::{Conn, TestServer, eventually, status};

#[global_allocator]
static ALLOCATED: PeakAlloc = PeakAlloc;

const KEYS: usize = 4_000;
const VALUE_LEN: usize = 4_000;
const MIB: usize = 1 << 20;

/// What a change takes beyond its value: the event, its key, its places in the mailbox.
const CHANGE_LEN: usize = 300;

/// What is on its way to a subscriber, and a buffer.
const WRITTEN_LEN: usize = 256 << 10;

fn subscribe(mut conn: Conn, name: &str, form: &str) -> Conn {
    let connect = format!(r#"{{"type":"Connect","client_uuid":"{name}","values":"{form}","features":["reset"]}}"#);
    assert_eq!(status(&conn.ask(&connect)), 200);
    assert_eq!(conn.ask(r#"{"type":"Subscribe","key":"*"}"#), "\"Hello\"");
    conn
}

/// A subscriber of which the kernel keeps little.
fn narrow(server: &TestServer) -> Conn {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(8 << 10).unwrap();
    socket.connect(&server.addr.parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    Conn::over(TcpStream::from(socket))
}

/// Replaces all values.
fn write_all(server: &TestServer, letter: char) {
    let mut writer = server.connect();
    let value = letter.to_string().repeat(VALUE_LEN);
    for some in (0..KEYS).collect::<Vec<_>>().chunks(50) {
        let put = |n: &usize| format!(r#"{{"type":"Put","key":"k.{n:05}","value":"{value}"}}"#);
        writer.send(some.iter().map(put).collect::<Vec<_>>().join("\n"));
        some.iter().for_each(|_| assert_eq!(status(&writer.line()), 200));
    }
}

/// What the server takes the subscriber to have waiting.
fn queued(server: &TestServer, name: &str) -> usize {
    let mut conn = server.connect();
    conn.send(r#"{"type":"Trace","key":"k"}"#);
    let traced = conn.json();
    let all = traced["Trace"]["subscribers"].as_array().unwrap_or_else(|| panic!("{traced}")).clone();
    let one = all.iter().find(|one| one["client_uuid"] == name).unwrap_or_else(|| panic!("{name} is closed"));
    usize::try_from(one["queued"].as_u64().unwrap()).unwrap()
}

/// Live bytes once nothing is under way any more.
fn live() -> usize {
    let mut last = ALLOCATED.current_usage();
    eventually("nothing is under way", || {
        thread::sleep(std::time::Duration::from_millis(200));
        let now = ALLOCATED.current_usage();
        std::mem::replace(&mut last, now).abs_diff(now) < 64 << 10
    });
    last
}

fn held_by_one_that_does_not_read(queued_max: usize, forms: &[&str]) -> (usize, usize) {
    let mut options = Options::default();
    options.queued_max = queued_max;
    let server = TestServer::with(|builder| builder.options(options));
    write_all(&server, 'a');
    let readers: Vec<_> = forms
        .iter()
        .map(|form| {
            let conn = subscribe(server.connect(), form, form);
            let mut stream = conn.stream().try_clone().unwrap();
            thread::spawn(move || {
                let mut piece = vec![0; 64 << 10];
                // Until the server ends.
                while std::io::Read::read(&mut stream, &mut piece).is_ok_and(|len| len > 0) {}
                drop(conn);
            })
        })
        .collect();
    let before = live();
    let stuck = subscribe(narrow(&server), "stuck", "text");
    // The values that it has waiting are those that the store has, until they are replaced.
    write_all(&server, 'b');
    // No connection is closed, whatever is given up; on many threads a reader may be the last to be served, and what is encoded for
    // it is there until then.
    for form in forms {
        eventually("the readers have read all", || self::queued(&server, form) == 0);
    }
    let with = live().saturating_sub(before);
    let queued = queued(&server, "stuck");
    drop(stuck);
    server.shutdown().unwrap();
    readers.into_iter().for_each(|reader| reader.join().unwrap());
    (with, queued)
}

#[test]
fn what_waits_takes_what_is_counted_and_is_given_up_past_the_limit() {
    let (alone, queued) = held_by_one_that_does_not_read(256 * MIB, &[]);
    println!("TEST memory_of_subscribers alone_kib={} queued={queued}", alone >> 10);
    let counted = queued * (VALUE_LEN + CHANGE_LEN) + WRITTEN_LEN;
    assert!(queued > KEYS / 2 && alone <= counted + counted / 10, "{alone} bytes for {queued} changes");

    let (beside, queued) = held_by_one_that_does_not_read(256 * MIB, &["bytes", "payload", "text"]);
    println!("TEST memory_of_subscribers beside_kib={} queued={queued}", beside >> 10);
    assert!(beside <= counted + counted / 10, "{beside} bytes beside readers, {alone} alone");

    let (given_up, queued) = held_by_one_that_does_not_read(4 * MIB, &["bytes", "payload", "text"]);
    println!("TEST memory_of_subscribers given_up_kib={} queued={queued}", given_up >> 10);
    assert!(given_up <= 5 * MIB, "{given_up} bytes are held past the limit");
}
