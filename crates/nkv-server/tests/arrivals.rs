//! Long requests for which there is no room: they wait in their sockets, and other requests do not.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::Write;
use std::time::Duration;

use nkv_server::Options;
use support::{Conn, TestServer, status};

const VALUE_LEN: usize = 1 << 20;

fn announce(conn: &mut Conn, key: &str) {
    conn.send(format!(r#"{{"type":"Put","key":"{key}","len":{VALUE_LEN}}}"#));
}

#[test]
fn small_writes_go_on_while_slow_senders_hold_all_the_room_and_one_makes_way_for_another() {
    let mut options = Options::default();
    options.queued_max = 64 << 20; // room for 16 MiB that are on their way
    let server = TestServer::with(|builder| builder.options(options));
    let mut slow: Vec<Conn> = (0..15).map(|_| server.connect()).collect();
    for (n, conn) in slow.iter_mut().enumerate() {
        announce(conn, &format!("slow.{n}"));
        conn.send(vec![b'x'; 200_000]);
    }
    let mut small = server.connect();
    small.put("small", "x");
    let mut honest = server.connect();
    honest.stream().set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    honest.stream().set_write_timeout(Some(Duration::from_secs(60))).unwrap();
    announce(&mut honest, "honest");
    let waiting = std::thread::spawn(move || {
        honest.send(vec![b'x'; VALUE_LEN]);
        status(&honest.line())
    });
    let mut puts = 0;
    while !waiting.is_finished() {
        small.put("small", &"x".repeat(1_000));
        puts += 1;
    }
    assert_eq!(waiting.join().unwrap(), 200);
    assert!(puts >= 100, "{puts} small ones were done meanwhile");
    let closed = slow.iter_mut().map(is_closed).filter(|is_closed| *is_closed).count();
    assert_eq!(closed, 1);
}

#[test]
fn the_time_that_a_sender_waits_for_room_is_not_its_own() {
    let mut options = Options::default();
    // One that waits has another closed after 5 s; a sender has little more.
    (options.queued_max, options.request_limit) = (64 << 20, Duration::from_secs(6));
    let server = TestServer::with(|builder| builder.options(options));
    let slow: Vec<Conn> = (0..15)
        .map(|n| {
            let mut conn = server.connect();
            announce(&mut conn, &format!("slow.{n}"));
            conn.send(vec![b'x'; 200_000]);
            conn.stream().set_nonblocking(true).unwrap();
            conn
        })
        .collect();
    // They have all the room by then: one more waits.
    std::thread::sleep(Duration::from_secs(1));
    let mut honest = server.connect();
    // How long the line will be is not known: it waits once much of it has come.
    honest.stream().write_all(br#"{"type":"Put","key":"honest","value":""#).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    honest.stream().write_all(&vec![b'x'; 200_000]).unwrap();
    while !slow.iter().any(|conn| conn.stream().peek(&mut [0]).is_ok()) {
        std::thread::sleep(Duration::from_millis(50));
    }
    // There is room. It has begun more than 6 s ago, and has had two or three of them.
    std::thread::sleep(Duration::from_millis(2_500));
    honest.send("x\"}");
    assert_eq!(status(&honest.line()), 200);
}

/// Whether the server has closed it, and said why.
fn is_closed(conn: &mut Conn) -> bool {
    conn.stream().set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    match conn.stream().peek(&mut [0]) {
        Ok(_) => {
            let said = conn.line();
            assert_eq!(status(&said), 503, "{said}");
            true
        }
        Err(_) => false,
    }
}
