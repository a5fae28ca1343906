//! While storage stalls, long values take the memory that there is for them, counted in the allocator, and their senders
//! wait: no deadline of theirs passes.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nkv_core::NoPersist;
use nkv_server::Options;
use nkv_testkit::script::ScriptedPersist;
use peak_alloc::PeakAlloc;
use support::{PATIENCE, TestServer, status};

#[global_allocator]
static ALLOCATED: PeakAlloc = PeakAlloc;

const WRITERS: usize = 300;
const VALUE_LEN: usize = 1 << 20;
const MIB: usize = 1 << 20;

/// The senders wait for longer than they would be given to send a request, and than one waits for another to send his.
const STALL: Duration = Duration::from_secs(8);
const REQUEST_LIMIT: Duration = Duration::from_secs(2);

#[test]
fn values_that_wait_for_storage_and_those_on_their_way_are_bounded_and_no_sender_is_closed() {
    let (persist, script) = ScriptedPersist::new(NoPersist::default());
    let mut options = Options::default();
    (options.queued_max, options.request_limit) = (64 * MIB, REQUEST_LIMIT);
    let server = TestServer::with(|builder| builder.options(options).persist("scripted", || Ok(persist)));
    script.block();
    server.connect().send(r#"{"type":"Put","key":"first","value":"x"}"#);
    assert!(script.wait_until_blocked(PATIENCE));

    // Shared by all senders: only the server's memory is to be counted.
    let value = Arc::new(vec![b'x'; VALUE_LEN]);
    let streams: Vec<TcpStream> = (0..WRITERS).map(|_| TcpStream::connect(&server.addr).unwrap()).collect();
    let before = ALLOCATED.current_usage();
    ALLOCATED.reset_peak_usage();
    let writers: Vec<_> = streams
        .into_iter()
        .enumerate()
        .map(|(n, mut stream)| {
            let value = Arc::clone(&value);
            let work = move || {
                // How long a line will be is not known before it has come.
                let (start, end) = match n % 10 {
                    0 => (format!(r#"{{"type":"Put","key":"k.{n}","value":""#), "\"}\n"),
                    _ => (format!("{{\"type\":\"Put\",\"key\":\"k.{n}\",\"len\":{VALUE_LEN}}}\n"), "\n"),
                };
                stream.write_all(start.as_bytes())?;
                stream.write_all(&value)?;
                stream.write_all(end.as_bytes())?;
                let mut answer = String::new();
                BufReader::with_capacity(256, stream).read_line(&mut answer)?;
                Ok::<_, std::io::Error>(answer)
            };
            thread::Builder::new().stack_size(128 << 10).spawn(work).unwrap()
        })
        .collect();
    thread::sleep(STALL);
    let held = ALLOCATED.peak_usage().saturating_sub(before);
    println!("TEST memory_of_arrivals writers={WRITERS} held_mib={}", held / MIB);
    assert!(held >= 60 * MIB, "{held} bytes: they are not there yet");
    // Values that wait, those on their way, and a piece of each of the others: the longest are the lines.
    let bound = (64 + 16) * MIB + WRITERS * (16 << 10) + WRITERS / 10 * (128 << 10);
    assert!(held <= bound + bound / 8, "{held} bytes are held");
    script.release();
    for writer in writers {
        assert_eq!(status(&writer.join().unwrap().unwrap()), 200);
    }
}
