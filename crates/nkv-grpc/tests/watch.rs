//! Watches: what comes in which order, and what a reader that lags is spared.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::time::Duration;

use common::{Server, code, next, put, text, timely, try_next, until, up_to_synced, watch};
use nkv_core::{Key, Pattern};
use nkv_grpc::Options;
use nkv_grpc::v1::watch_response::Event;
use nkv_grpc::v1::{GetRequest, WatchRequest};
use nkv_node::{Epoch, PutOptions};
use tonic::Code;

#[tokio::test]
async fn the_present_state_comes_first_then_each_change() {
    let server = Server::start().await;
    let (mut client, nkv) = (server.client().await, server.handle());
    nkv.put("a.b", "1").await.unwrap();
    nkv.put("a", "").await.unwrap();
    nkv.put("c", "3").await.unwrap();
    let mut watched = client.watch(watch(&["a"])).await.unwrap().into_inner();
    assert_eq!(up_to_synced(&mut watched).await, ["began", "put a  2 0", "put a.b 1 1 0", "synced 3"]);

    client.put(put("a.b", "2")).await.unwrap();
    assert_eq!(text(&next(&mut watched).await), "put a.b 2 4 0");
    nkv.delete("a.*").await.unwrap();
    assert_eq!(text(&next(&mut watched).await), "delete a.b 5 Deleted 0");
    nkv.put_with("a.t", "x", PutOptions::default().with_ttl(Duration::from_millis(1))).await.unwrap();
    let (mut texts, mut last) = (Vec::new(), String::new());
    while !last.starts_with("delete") {
        last = text(&next(&mut watched).await);
        texts.push(last.clone());
    }
    assert_eq!(texts, ["put a.t x 6 0", "delete a.t 7 Expired 0"]);
}

#[tokio::test]
async fn a_watch_has_several_patterns_and_one_synced() {
    let server = Server::start().await;
    let (mut client, nkv) = (server.client().await, server.handle());
    for key in ["a.x", "b.x", "c.x", "d"] {
        nkv.put(key, "1").await.unwrap();
    }
    // One that another includes is left out.
    let mut watched = client.watch(watch(&["a.*", "c", "a.x"])).await.unwrap().into_inner();
    assert_eq!(up_to_synced(&mut watched).await, ["began", "put a.x 1 1 0", "put c.x 1 3 0", "synced 4"]);
    nkv.put("b.x", "2").await.unwrap();
    nkv.put("c.y", "2").await.unwrap();
    assert_eq!(text(&next(&mut watched).await), "put c.y 2 6 0");
}

#[tokio::test]
async fn an_exact_watch_covers_its_key_alone() {
    let server = Server::start().await;
    let (mut client, nkv) = (server.client().await, server.handle());
    nkv.put("a.b", "1").await.unwrap();
    let mut watched = client.watch(WatchRequest { exact: true, ..watch(&["a", "z"]) }).await.unwrap().into_inner();
    assert_eq!(up_to_synced(&mut watched).await, ["began", "synced 1"]);
    nkv.put("a.b", "2").await.unwrap();
    nkv.put("z", "3").await.unwrap();
    assert_eq!(text(&next(&mut watched).await), "put z 3 3 0");
}

#[tokio::test]
async fn a_watch_for_changes_only_is_synced_at_once() {
    let server = Server::start().await;
    let (mut client, nkv) = (server.client().await, server.handle());
    nkv.put("a", "1").await.unwrap();
    let request = WatchRequest { changes_only: true, ..watch(&["a", "b"]) };
    let mut watched = client.watch(request).await.unwrap().into_inner();
    assert_eq!(up_to_synced(&mut watched).await, ["began", "synced 1"]);
    nkv.put("b", "2").await.unwrap();
    assert_eq!(text(&next(&mut watched).await), "put b 2 2 0");
}

#[tokio::test]
async fn a_large_state_comes_whole() {
    let server = Server::start().await;
    let (mut client, nkv) = (server.client().await, server.handle());
    for n in 0..3_000 {
        nkv.put(format!("k.{n:04}"), vec![b'x'; 1_000]).await.unwrap();
    }
    let mut watched = client.watch(watch(&["*"])).await.unwrap().into_inner();
    let texts = up_to_synced(&mut watched).await;
    assert_eq!(texts.len(), 3_002);
    assert!(texts[1..3_001].is_sorted() && texts.last().unwrap() == "synced 3000");
}

// A queue per watch grew by every change that its reader had not taken.
#[tokio::test]
async fn a_stalled_reader_gets_the_newest_of_each_key_and_how_many_were_left_out() {
    let server = Server::with(Options::default()).await;
    let (mut client, nkv) = (server.slow_client().await, server.handle());
    let mut watched = client.watch(watch(&["k"])).await.unwrap().into_inner();
    up_to_synced(&mut watched).await;
    const KEYS: u64 = 100;
    const ROUNDS: u64 = 60;
    for round in 0..ROUNDS {
        for key in 0..KEYS {
            nkv.put(format!("k.{key}"), format!("{round:04}{}", "x".repeat(2_000))).await.unwrap();
        }
    }
    let backlog = nkv.trace(&Key::new("k.1").unwrap()).unwrap()[0].backlog;
    assert!(backlog.queued as u64 <= KEYS, "{backlog:?}");
    // What lies on the way: windows of HTTP/2, and a piece or two of the server's.
    let held = nkv.peers().unwrap()[0].backlog;
    assert_eq!(held.queued, backlog.queued);
    assert!(client.get(GetRequest { key: "k.1".into() }).await.is_ok());

    let (mut seen, mut sent, mut last) = (0, 0, vec![0; KEYS as usize]);
    while last.iter().any(|revision| *revision <= (ROUNDS - 1) * KEYS) {
        let Event::Put(put) = next(&mut watched).await else { panic!("no put") };
        let key: usize = put.key[2..].parse().unwrap();
        (seen, sent) = (seen + 1 + put.skipped, sent + 1);
        assert!(put.revision > last[key]);
        last[key] = put.revision;
    }
    assert_eq!(seen, KEYS * ROUNDS);
    // One of each key, and what was on the way: a window, and two pieces of the server's, of 2 KiB each.
    assert!(sent < 2 * KEYS + 100, "{sent} of {seen} changes were sent");
}

// More deletes than a backlog may have: it is given up, and the state comes anew.
#[tokio::test]
async fn after_too_long_a_lag_the_stream_says_reset_and_gives_the_whole_state() {
    let server = Server::with(Options::default()).await;
    let (mut client, nkv) = (server.slow_client().await, server.handle());
    let keys: Vec<String> = (0..6_000).map(|n| format!("a.k{n}")).collect();
    for key in &keys {
        nkv.put(key, vec![b'x'; 100]).await.unwrap();
    }
    nkv.put("b.stays", "1").await.unwrap();
    let mut watched = client.watch(watch(&["a", "b"])).await.unwrap().into_inner();
    up_to_synced(&mut watched).await;
    // More than the stream takes before it stands still.
    for n in 0..100 {
        nkv.put(format!("b.{n}"), vec![b'x'; 20_000]).await.unwrap();
    }
    until(|| nkv.peers().unwrap()[0].backlog.queued > 10).await;
    for key in &keys[..5_999] {
        nkv.delete(key).await.unwrap();
    }
    let (mut resets, mut known) = (0, std::collections::BTreeSet::new());
    loop {
        match next(&mut watched).await {
            Event::Reset(_) => {
                resets += 1;
                known.clear();
            }
            Event::Put(put) => _ = known.insert(put.key),
            Event::Delete(gone) => _ = known.remove(&gone.key),
            Event::Synced(synced) => {
                assert_eq!(synced.revision, nkv.stats().await.unwrap().revision);
                break;
            }
            Event::Began(_) => panic!("it began again"),
        }
    }
    assert!(resets > 0);
    let expected: Vec<_> = nkv.get_all("*").await.unwrap().into_iter().map(|entry| entry.key.to_string()).collect();
    let mut known: Vec<_> = known.into_iter().collect();
    known.sort();
    let mut expected = expected;
    expected.sort();
    assert_eq!(known, expected);
    nkv.put("a.new", "1").await.unwrap();
    assert!(matches!(next(&mut watched).await, Event::Put(put) if put.key == "a.new"));
}

#[tokio::test]
async fn where_an_epoch_begins_the_stream_says_reset_and_gives_the_whole_state() {
    let (server, engine) = Server::scripted().await;
    let (mut client, nkv) = (server.client().await, server.handle());
    nkv.put("a", "1").await.unwrap();
    let mut watched = client.watch(watch(&["a", "b"])).await.unwrap().into_inner();
    up_to_synced(&mut watched).await;
    engine.begin_anew(Epoch::new(77));
    let epoch = Epoch::new(77).to_string();
    let Event::Reset(reset) = next(&mut watched).await else { panic!("no reset") };
    assert_eq!(reset.epoch, epoch);
    // Twice, where the patterns are notified one after the other.
    loop {
        match next(&mut watched).await {
            Event::Reset(reset) => assert_eq!(reset.epoch, epoch),
            Event::Synced(synced) => break assert_eq!(synced.epoch, epoch),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_watch_that_another_client_ends_is_aborted() {
    let server = Server::start().await;
    let (mut client, nkv) = (server.client().await, server.handle());
    let mut watched = client.watch(watch(&["a"])).await.unwrap().into_inner();
    up_to_synced(&mut watched).await;
    let name = nkv.trace(&Key::new("a").unwrap()).unwrap().remove(0).client_uuid;
    assert!(nkv.unsubscribe(&Pattern::new("a").unwrap(), &name).unwrap());
    assert_eq!(try_next(&mut watched).await.unwrap_err().code(), Code::Aborted);
}

/// Reads up to the first `synced`: the events as texts, and the last cursor.
async fn with_cursor(stream: &mut tonic::Streaming<nkv_grpc::v1::WatchResponse>) -> (Vec<String>, String) {
    let (mut texts, mut cursor) = (Vec::new(), String::new());
    loop {
        let message = timely(stream.message()).await.unwrap().unwrap();
        let event = message.event.unwrap();
        texts.push(text(&event));
        if !message.cursor.is_empty() {
            cursor = message.cursor;
        }
        if matches!(event, Event::Synced(_)) {
            return (texts, cursor);
        }
    }
}

#[tokio::test]
async fn a_watch_that_is_resumed_gets_what_it_missed_and_nothing_else() {
    let server = Server::start().await;
    let (mut client, nkv) = (server.client().await, server.handle());
    for key in ["a.1", "a.2", "a.3", "b"] {
        nkv.put(key, "x").await.unwrap();
    }
    let mut watched = client.watch(watch(&["a"])).await.unwrap().into_inner();
    let (_, cursor) = with_cursor(&mut watched).await;
    drop(watched);
    assert_eq!(cursor.split('-').take(2).collect::<Vec<_>>(), [&*nkv.epoch().to_string(), "4"]);
    nkv.put("a.1", "y").await.unwrap();
    nkv.delete("a.2").await.unwrap();
    nkv.put("b", "y").await.unwrap();
    let resumed = |after: &str| WatchRequest { after: Some(after.into()), ..watch(&["a"]) };
    let mut again = client.watch(resumed(&cursor)).await.unwrap().into_inner();
    let (texts, later) = with_cursor(&mut again).await;
    assert_eq!(texts, ["began", "put a.1 y 5 0", "delete a.2 6 Missed 0", "synced 7"]);
    // A change has a cursor too; with it nothing was missed.
    nkv.put("a.4", "z").await.unwrap();
    let change = timely(again.message()).await.unwrap().unwrap();
    assert!(change.cursor > later && matches!(change.event, Some(Event::Put(put)) if put.key == "a.4"));
    let mut again = client.watch(resumed(&change.cursor)).await.unwrap().into_inner();
    assert_eq!(with_cursor(&mut again).await.0, ["began", "synced 8"]);
    // By epoch and revision alone.
    let mut again = client.watch(resumed(&format!("{}-7", nkv.epoch()))).await.unwrap().into_inner();
    assert_eq!(with_cursor(&mut again).await.0, ["began", "put a.4 z 8 0", "synced 8"]);
    // Of another epoch, of the future, or of other patterns: the whole state.
    let future = format!("{}-99", nkv.epoch());
    let other = WatchRequest { after: Some(change.cursor.clone()), ..watch(&["a.*"]) };
    for request in [resumed(&format!("{}-3", "1".repeat(32))), resumed(&future), other] {
        let mut again = client.watch(request).await.unwrap().into_inner();
        let texts = with_cursor(&mut again).await.0;
        assert_eq!((&*texts[1], texts.len(), &*texts[5]), ("reset", 6, "synced 8"), "{texts:?}");
    }
    assert_eq!(code(client.watch(resumed("yesterday")).await), Code::InvalidArgument);
}

// The revisions of a snapshot come in the order of keys: the highest of them says nothing about the others.
#[tokio::test]
async fn one_that_is_cut_off_inside_the_present_state_comes_back_as_one_that_knows_nothing() {
    let server = Server::start().await;
    let (mut client, nkv) = (server.client().await, server.handle());
    for key in ["z", "y", "a"] {
        nkv.put(key, "x").await.unwrap();
    }
    let mut watched = client.watch(watch(&["*"])).await.unwrap().into_inner();
    let mut cursor = String::new();
    for _ in 0..2 {
        let message = timely(watched.message()).await.unwrap().unwrap();
        if !message.cursor.is_empty() {
            cursor = message.cursor;
        }
    }
    drop(watched);
    nkv.delete("z").await.unwrap();
    let again = WatchRequest { after: Some(cursor), ..watch(&["*"]) };
    let mut again = client.watch(again).await.unwrap().into_inner();
    let texts = up_to_synced(&mut again).await;
    let puts: Vec<_> = texts.iter().filter(|text| text.starts_with("put")).map(String::as_str).collect();
    assert_eq!(puts, ["put a x 3 0", "put y x 2 0"]);
}

// Above HTTP/2's limit of streams, a call waited for ever behind watches that do not end.
#[tokio::test]
async fn a_call_finds_a_stream_beside_as_many_watches_as_there_may_be() {
    let server = Server::with_limits(|limits| limits.subscriptions_max = 250).await;
    let mut client = server.client().await;
    let mut watches = Vec::new();
    for n in 0..250 {
        watches.push(client.watch(watch(&[&format!("k.{n}")])).await.unwrap().into_inner());
    }
    assert_eq!(code(client.watch(watch(&["k.250"])).await), Code::ResourceExhausted);
    timely(client.put(put("k.7", "x"))).await.unwrap();
    up_to_synced(&mut watches[7]).await;
    assert_eq!(server.handle().peers().unwrap()[0].subscriptions, 250);
    drop(watches);
    until(|| server.handle().peers().unwrap()[0].subscriptions == 0).await;
}

// Stalled watches hold what is in their mailboxes and little more, in the budget of the node, which has them begin anew.
#[tokio::test]
async fn past_the_budget_of_the_node_a_stalled_watch_gives_up_its_backlog() {
    let server = Server::with_limits(|limits| limits.queued_max = 4 << 20).await;
    let (mut client, nkv) = (server.slow_client().await, server.handle());
    let mut watched = client.watch(watch(&["k"])).await.unwrap().into_inner();
    up_to_synced(&mut watched).await;
    let value = bytes::Bytes::from(vec![b'x'; 100_000]);
    for n in 0..200 {
        nkv.put(format!("k.{n}"), &value).await.unwrap();
    }
    let held = nkv.peers().unwrap()[0].backlog;
    assert!(held.event_bytes < 6 << 20, "{held:?}");
    let mut keys = std::collections::BTreeSet::new();
    let mut was_reset = false;
    while keys.len() < 200 {
        match next(&mut watched).await {
            Event::Put(put) => _ = keys.insert(put.key),
            Event::Reset(_) => was_reset = true,
            Event::Synced(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(was_reset);
}

/// What a reader makes of the events that it gets.
#[derive(Default)]
struct Reader {
    known: std::collections::BTreeMap<String, bytes::Bytes>,
    /// Since the last reset, until the state is whole.
    anew: Option<std::collections::BTreeSet<String>>,
    cursor: String,
    resets: usize,
}

impl Reader {
    fn take(&mut self, message: nkv_grpc::v1::WatchResponse) {
        match message.event.unwrap() {
            Event::Began(_) => {}
            Event::Put(put) => {
                self.anew.iter_mut().for_each(|anew| _ = anew.insert(put.key.clone()));
                self.known.insert(put.key, put.value);
            }
            Event::Delete(gone) => _ = self.known.remove(&gone.key),
            Event::Reset(_) => {
                self.resets += 1;
                self.anew = Some(std::collections::BTreeSet::new());
            }
            Event::Synced(_) => {
                if let Some(anew) = self.anew.take() {
                    self.known.retain(|key, _| anew.contains(key));
                }
            }
        }
        if !message.cursor.is_empty() {
            self.cursor = message.cursor;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_is_cut_off_again_and_again_ends_with_the_state() {
    let server = Server::start().await;
    let nkv = server.handle();
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..4_u32 {
        let mut client = server.client().await;
        writers.spawn(async move {
            for n in 0..500_u32 {
                let key = format!("k.{}", (n * 7 + writer * 13) % 60);
                if n % 3 == 0 {
                    client.delete(nkv_grpc::v1::DeleteRequest { pattern: key, ..Default::default() }).await.unwrap();
                } else {
                    client.put(put(&key, format!("{writer}.{n}"))).await.unwrap();
                }
            }
        });
    }
    let mut readers = tokio::task::JoinSet::new();
    for reader in 0..3_usize {
        let (mut client, nkv) = (server.client().await, nkv.clone());
        readers.spawn(async move {
            let (mut state, mut rounds) = (Reader::default(), 0);
            loop {
                let after = Some(state.cursor.clone()).filter(|cursor| !cursor.is_empty());
                let request = WatchRequest { after, ..watch(&["k"]) };
                let mut watched = client.watch(request).await.unwrap().into_inner();
                // Some are cut off within the first state, some later, and the last of each goes on to the end.
                rounds += 1;
                let cut_after = if rounds < 30 { rounds * (reader + 1) } else { usize::MAX };
                for _ in 0..cut_after {
                    let event = timely(watched.message()).await.unwrap().unwrap();
                    let is_end = matches!(&event.event, Some(Event::Put(put)) if put.key == "k.end");
                    state.take(event);
                    if is_end {
                        // In order: all came before.
                        let present = nkv.get_all("k.*").await.unwrap().into_iter();
                        let present: std::collections::BTreeMap<_, _> =
                            present.map(|entry| (entry.key.to_string(), entry.value)).collect();
                        while state.anew.is_some() || state.known.len() != present.len() {
                            state.take(timely(watched.message()).await.unwrap().unwrap());
                        }
                        assert_eq!(state.known, present);
                        return;
                    }
                }
            }
        });
    }
    while let Some(done) = timely(writers.join_next()).await {
        done.unwrap();
    }
    // Readers that are fast cut themselves off before it, others after.
    nkv.put("k.end", "").await.unwrap();
    while let Some(done) = timely(readers.join_next()).await {
        done.unwrap();
    }
}
