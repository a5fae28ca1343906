//! Watching: streams that are resumed, long polls, readers that stand still.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use nkv_http::Options;
use nkv_node::Limits;
use support::{PATIENCE, TestDoor};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

/// A stream of events, as a browser reads it.
struct Events {
    stream: TcpStream,
    bytes: Vec<u8>,
    head: String,
    /// The last `id` that came.
    id: String,
}

#[derive(Debug)]
struct Event {
    name: String,
    id: Option<String>,
    data: serde_json::Value,
}

impl Events {
    async fn open(door: &TestDoor, path: &str, headers: &[(&str, &str)]) -> Events {
        let mut stream = door.connect().await;
        let mut head = format!("GET {path} HTTP/1.1\r\nHost: {}\r\n", door.address);
        headers.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
        stream.write_all(format!("{head}\r\n").as_bytes()).await.expect("as documented");
        let mut events = Events { stream, bytes: Vec::new(), head: String::new(), id: String::new() };
        events.head = events.take_to("\r\n\r\n").await.expect("a head");
        events
    }

    async fn take_to(&mut self, end: &str) -> Option<String> {
        loop {
            if let Some(at) = self.bytes.windows(end.len()).position(|part| part == end.as_bytes()) {
                let taken: Vec<u8> = self.bytes.drain(..at + end.len()).collect();
                return Some(String::from_utf8_lossy(&taken).into_owned());
            }
            let mut part = [0; 4_096];
            match timeout(PATIENCE, self.stream.read(&mut part)).await.expect("it goes on") {
                Ok(len @ 1..) => self.bytes.extend_from_slice(&part[..len]),
                _ => return None,
            }
        }
    }

    /// The next block of lines: chunks' lengths are left out.
    async fn block(&mut self) -> Option<Vec<String>> {
        let mut lines = Vec::new();
        loop {
            let line = self.take_to("\n").await?;
            // A chunk's length, or the end of a chunk.
            if let Some(line) = line.strip_suffix("\r\n") {
                if line == "0" {
                    return None;
                }
                continue;
            }
            match line.trim_end_matches('\n') {
                "" if lines.is_empty() => {}
                "" => return Some(lines),
                line => lines.push(line.to_owned()),
            }
        }
    }

    async fn next_block(&mut self) -> Option<Event> {
        let lines = self.block().await?;
        let field = |name: &str| {
            lines
                .iter()
                .find_map(|line| line.strip_prefix(name).and_then(|rest| rest.strip_prefix(": ")))
                .map(str::to_owned)
        };
        let id = field("id");
        if let Some(id) = &id {
            self.id.clone_from(id);
        }
        let data =
            field("data").map_or(serde_json::Value::Null, |data| serde_json::from_str(&data).expect("as documented"));
        Some(Event { name: field("event").unwrap_or_default(), id, data })
    }

    /// The next block that is an event.
    async fn next(&mut self) -> Event {
        loop {
            let event = self.next_block().await.expect("the stream goes on");
            if !event.name.is_empty() {
                return event;
            }
        }
    }

    /// In short, up to `synced`.
    async fn until_synced(&mut self) -> Vec<String> {
        let mut said = Vec::new();
        loop {
            let event = self.next().await;
            match event.name.as_str() {
                "synced" => {
                    assert!(event.id.is_some(), "a point to resume from");
                    return said;
                }
                "reset" => said.push("reset".into()),
                name => {
                    assert_eq!(event.id, None, "inside a snapshot or a resume");
                    said.push(format!("{name} {}", event.data["key"].as_str().expect("as documented")));
                }
            }
        }
    }
}

#[tokio::test]
async fn a_stream_is_resumed_without_a_gap_and_without_repeats() {
    let door = TestDoor::start().await;
    for key in ["a.1", "a.2", "a.3", "b"] {
        door.put(key, "x").await;
    }
    let mut events = Events::open(&door, "/v1/watch?pattern=a&name=page", &[]).await;
    let head = events.head.to_lowercase();
    assert!(head.contains("content-type: text/event-stream") && head.contains("x-accel-buffering: no"), "{head}");
    assert!(head.contains("cache-control: no-cache, no-transform"), "{head}");
    assert_eq!(events.until_synced().await, ["put a.1", "put a.2", "put a.3"]);
    door.put("a.2", "y").await;
    let event = events.next().await;
    assert_eq!((event.name.as_str(), &event.data["value"], &event.data["skipped"]), ("put", &"y".into(), &0.into()));
    assert!(event.id.is_some_and(|id| id.contains("-5-")), "its revision");
    let trace = door.get("/v1/trace/a.9").await.json();
    assert_eq!((&trace["subscribers"][0]["name"], &trace["subscribers"][0]["pattern"]), (&"page".into(), &"a".into()));
    let id = events.id.clone();
    drop(events);
    door.send("DELETE", "/v1/kv/a.1", &[], b"").await;
    door.send("DELETE", "/v1/kv/b", &[], b"").await;
    door.put("a.3", "z").await;

    let mut resumed = Events::open(&door, "/v1/watch?pattern=a", &[("Last-Event-ID", &id)]).await;
    assert_eq!(resumed.until_synced().await, ["put a.3", "delete a.1"]);
    // The header wins over an older one in the address.
    let path = format!("/v1/watch?pattern=a&after={id}");
    let mut newer = Events::open(&door, &path, &[("Last-Event-ID", &resumed.id)]).await;
    assert_eq!(newer.until_synced().await, [""; 0]);
    let mut older = Events::open(&door, &path, &[]).await;
    assert_eq!(older.until_synced().await.len(), 2);
    // What says nothing here begins anew.
    for (path, id) in [
        ("/v1/watch?pattern=a&pattern=b", id.as_str()),
        ("/v1/watch?pattern=a", "rubbish"),
        ("/v1/watch?pattern=a", "999"),
        ("/v1/watch?pattern=a", "000000000000000000000000000000ab-1"),
    ] {
        let mut events = Events::open(&door, path, &[("Last-Event-ID", id)]).await;
        assert_eq!(events.until_synced().await, ["reset", "put a.2", "put a.3"], "{path} {id}");
    }
    let mut bare = Events::open(&door, "/v1/watch?pattern=a&after=7", &[]).await;
    assert_eq!(bare.until_synced().await, ["put a.3"]);
}

/// They come also behind a change, and one behind the other.
#[tokio::test]
async fn heartbeats_go_on_without_a_change_and_between_changes() {
    let mut options = Options::default();
    options.heartbeat = Duration::from_millis(50);
    let door = TestDoor::with(options, Limits::default()).await;
    let mut events = Events::open(&door, "/v1/watch?pattern=a", &[]).await;
    events.until_synced().await;
    for n in 0..3 {
        for _ in 0..3 {
            assert_eq!(timeout(Duration::from_secs(30), events.next_block()).await.unwrap().unwrap().name, "");
        }
        door.put("a", &n.to_string()).await;
        let change = async { while events.next_block().await.unwrap().name != "put" {} };
        timeout(PATIENCE, change).await.unwrap();
    }
}

/// A browser comes back with the address that it had, whose cursor is old by then, and with what it heard last.
#[tokio::test]
async fn what_was_heard_last_counts_and_not_an_older_cursor_in_the_address() {
    let door = TestDoor::start().await;
    door.put("a.old", "1").await;
    let mut events = Events::open(&door, "/v1/watch?pattern=a.*", &[]).await;
    events.until_synced().await;
    let old = events.id.clone();
    door.put("a.known", "2").await;
    assert_eq!(events.next().await.data["key"], "a.known");
    let newer = events.id.clone();
    assert_ne!(old, newer);
    let path = format!("/v1/watch?pattern=a.*&after={old}");
    let mut events = Events::open(&door, &path, &[("Last-Event-ID", &newer)]).await;
    assert_eq!(events.next().await.name, "synced", "what the newer one knows is not sent again");
    let mut events = Events::open(&door, &path, &[]).await;
    assert_eq!(events.next().await.data["key"], "a.known");
}

#[tokio::test]
async fn without_a_snapshot_a_stream_is_synced_at_once() {
    let door = TestDoor::start().await;
    door.put("a", "x").await;
    let mut events = Events::open(&door, "/v1/watch?pattern=a&exact=true&snapshot=false", &[]).await;
    assert_eq!(events.until_synced().await, [""; 0]);
    door.put("a.b", "y").await;
    door.send("DELETE", "/v1/kv/a", &[], b"").await;
    let event = events.next().await;
    assert_eq!((event.name.as_str(), &event.data["reason"]), ("delete", &"deleted".into()));
}

/// A reader that is cut off inside its snapshot knows nothing, and comes back as one.
#[tokio::test]
async fn one_that_is_cut_inside_a_snapshot_misses_no_delete() {
    let door = TestDoor::start().await;
    for n in 0..3_000 {
        door.nkv.put(format!("k.{n:04}"), "x").await.unwrap();
    }
    let mut events = Events::open(&door, "/v1/watch?pattern=k", &[]).await;
    let mut held = BTreeMap::new();
    for _ in 0..10 {
        let event = events.next().await;
        held.insert(event.data["key"].as_str().unwrap().to_owned(), ());
    }
    let id = events.id.clone();
    assert!(id.contains("-0-"), "{id}");
    drop(events);
    door.nkv.delete("k.0003").await.unwrap();
    let mut events = Events::open(&door, "/v1/watch?pattern=k", &[("Last-Event-ID", &id)]).await;
    loop {
        let event = events.next().await;
        match event.name.as_str() {
            "reset" => held.clear(),
            "put" => _ = held.insert(event.data["key"].as_str().unwrap().to_owned(), ()),
            "delete" => _ = held.remove(event.data["key"].as_str().unwrap()),
            _ => break,
        }
    }
    assert_eq!((held.len(), held.contains_key("k.0003")), (2_999, false));
}

#[tokio::test]
async fn a_heartbeat_moves_on_while_others_change() {
    let mut options = Options::default();
    options.heartbeat = Duration::from_millis(100);
    options.deletes_max = 10;
    let door = TestDoor::with(options, Limits::default()).await;
    door.put("quiet", "x").await;
    let mut events = Events::open(&door, "/v1/watch?pattern=quiet", &[]).await;
    events.until_synced().await;
    for n in 0..50 {
        door.nkv.put(format!("loud.{n}"), "").await.unwrap();
        door.nkv.delete(format!("loud.{n}")).await.unwrap();
    }
    let until = |id: &str| id.contains("-101-");
    timeout(PATIENCE, async {
        while !until(&events.id) {
            let block = events.next_block().await.unwrap();
            assert_eq!((block.name.as_str(), &block.data), ("", &serde_json::Value::Null), "{block:?}");
        }
    })
    .await
    .expect("the id moves on");
    // It never ages out.
    let id = events.id.clone();
    let mut resumed = Events::open(&door, "/v1/watch?pattern=quiet", &[("Last-Event-ID", &id)]).await;
    assert_eq!(resumed.until_synced().await, [""; 0]);
}

#[tokio::test]
async fn a_long_poll_waits_as_long_as_asked_and_its_cursor_moves_on() {
    let door = TestDoor::start().await;
    door.put("a.1", "x").await;
    let first = door.get("/v1/watch?pattern=a&wait=30s").await.json();
    assert_eq!((&first["events"][0]["event"], &first["events"][0]["key"]), (&"put".into(), &"a.1".into()));
    assert_eq!(first["reset"], false);
    let next = first["next"].as_str().unwrap().to_owned();

    let loud = {
        let nkv = door.nkv.clone();
        tokio::spawn(async move {
            for n in 0.. {
                nkv.put(format!("loud.{}", n % 10), "").await.unwrap();
                sleep(Duration::from_millis(5)).await;
            }
        })
    };
    let start = Instant::now();
    let quiet = door.get(&format!("/v1/watch?pattern=a&wait=400ms&after={next}")).await.json();
    assert!(start.elapsed() >= Duration::from_millis(390), "held for its whole wait");
    loud.abort();
    assert_eq!((quiet["events"].as_array().unwrap().len(), &quiet["reset"]), (0, &false.into()));
    let moved = quiet["next"].as_str().unwrap().to_owned();
    let revision = |cursor: &str| cursor.split('-').nth(1).unwrap().parse::<u64>().unwrap();
    assert!(revision(&moved) > revision(&next), "{next} {moved}");

    let path = format!("/v1/watch?pattern=a&wait=30s&after={moved}");
    let waiting = door.get(&path);
    let change = async {
        sleep(Duration::from_millis(100)).await;
        door.nkv.delete("a.1").await.unwrap();
    };
    let (reply, ()) = tokio::join!(waiting, change);
    let reply = reply.json();
    assert_eq!((&reply["events"][0]["event"], &reply["events"][0]["reason"]), (&"delete".into(), &"deleted".into()));
    // At once where something is newer, or nothing is known.
    let again = door.get(&format!("/v1/watch?pattern=a&wait=30s&after={moved}")).await.json();
    assert_eq!(again["events"][0]["reason"], "missed");
    let lost = door.get("/v1/watch?pattern=a&wait=30s&after=rubbish").await.json();
    assert_eq!((&lost["reset"], lost["events"].as_array().unwrap().len()), (&true.into(), 0));
}

/// Of many changes a reader that stands still is given the last, and no other waits for it.
#[tokio::test]
async fn a_reader_that_stands_still_costs_other_clients_nothing() {
    let door = TestDoor::start().await;
    let mut stalled = Events::open(&door, "/v1/watch?pattern=k", &[]).await;
    stalled.until_synced().await;
    let mut live = Events::open(&door, "/v1/watch?pattern=end", &[]).await;
    live.until_synced().await;
    for n in 0..30_000_u32 {
        door.nkv.put(format!("k.{}", n % 10), format!("{n:0>400}")).await.unwrap();
    }
    door.nkv.put("end", "x").await.unwrap();
    assert_eq!(live.next().await.data["key"], "end");
    let backlog: u64 = door.nkv.peers().unwrap().iter().map(|peer| peer.backlog.queued as u64).sum();
    assert!(backlog <= 10, "{backlog}");
    let (mut last, mut accounted) = (BTreeMap::new(), 0);
    while last.len() < 10 || last.values().any(|value| *value < 29_990) {
        let event = stalled.next().await;
        let value: u64 = event.data["value"].as_str().unwrap().trim_start_matches('0').parse().unwrap_or(0);
        last.insert(event.data["key"].as_str().unwrap().to_owned(), value);
        accounted += 1 + event.data["skipped"].as_u64().unwrap();
    }
    assert_eq!(accounted, 30_000, "each change was received or skipped");
}

#[tokio::test]
async fn a_stop_ends_streams_and_polls_in_order() {
    let mut door = TestDoor::start().await;
    door.put("a", "x").await;
    let mut events = Events::open(&door, "/v1/watch?pattern=a", &[]).await;
    events.until_synced().await;
    let id = events.id.clone();
    let node = door.node.take().unwrap();
    let path = format!("/v1/watch?pattern=a&wait=30s&after={id}");
    let poll = async { timeout(Duration::from_secs(10), door.get(&path)).await.expect("an answer") };
    let stop = async {
        sleep(Duration::from_millis(200)).await;
        timeout(Duration::from_secs(10), node.shutdown()).await.expect("it stops").unwrap();
    };
    let (poll, ()) = tokio::join!(poll, stop);
    assert!(poll.status == 200 || poll.status == 503, "{poll:?}");
    let block = events.block().await.expect("a last block");
    assert_eq!(block, ["retry: 1000"]);
    assert!(events.block().await.is_none());
}

#[tokio::test]
async fn what_a_watch_may_not_is_said() {
    let mut limits = Limits::default();
    limits.subscriptions_total_max = 1;
    let door = TestDoor::with(Options::default(), limits).await;
    let mut one = Events::open(&door, "/v1/watch?pattern=a", &[]).await;
    one.until_synced().await;
    let reply = door.get("/v1/watch?pattern=b").await;
    assert_eq!((reply.status, reply.problem()), (429, "too-many".into()));
    for path in ["/v1/watch?pattern=a..b", "/v1/watch?pattern=*&exact=true", "/v1/watch?pattern=a&name=%00"] {
        assert_eq!(door.get(path).await.status, 400, "{path}");
    }
    let reply = door.get("/v1/watch?pattern=a.*&exact=true").await;
    assert!(reply.text().contains("'exact' is about keys"), "{}", reply.text());
}
