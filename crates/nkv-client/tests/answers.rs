//! That no answer is lost, none comes out of order, and what is given up is taken back: against a server that follows a
//! script.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::time::Duration;

use common::{Dice, Peer, Proxy, Scripted, eager, next, server, short, shorts, until_synced, within};
use nkv_client::{Client, ConnectionState, ErrorKind, Event, PutOptions, Revision, SubscribeOptions, Subscription};
use nkv_protocol::Kind;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[test]
fn what_a_program_holds_may_go_from_thread_to_thread() {
    fn is_free<T: Send + Sync>() {}
    is_free::<Client>();
    is_free::<nkv_client::Subscription>();
    is_free::<nkv_client::Watch<String>>();
    is_free::<nkv_client::blocking::Client>();
    is_free::<nkv_client::Error>();
}

// The answers that had come were dropped with the first write that failed: 374 puts that were done were said to be
// unknown at one end of a server.
#[tokio::test]
async fn answers_that_came_before_the_end_are_given() {
    let server = Scripted::new().await;
    let (client, mut peer) = tokio::join!(eager(&server.addr).connect(), server.accept());
    let client = client.unwrap();
    let put = |n: usize| {
        let client = client.clone();
        tokio::spawn(async move { client.put(&format!("k{n}"), vec![b'x'; 1_000]).await })
    };
    let mut puts: Vec<_> = (0..50).map(put).collect();
    let mut ids = Vec::new();
    for _ in 0..50 {
        ids.push(peer.request().await.unwrap().1);
    }
    for (revision, id) in (1..).zip(&ids) {
        peer.ok(id, Some(revision)).await;
    }
    // What is dropped with something unread is reset: the client's writes fail, and the answers lie in its buffer.
    puts.extend((50..150).map(put));
    tokio::time::sleep(Duration::from_millis(50)).await;
    drop(peer);
    for put in puts.drain(..50) {
        within(put).await.unwrap().unwrap();
    }
    let mut next = server.accept().await;
    tokio::spawn(async move {
        while let Some((_, id, _)) = next.request().await {
            next.ok(&id, Some(1_000)).await;
        }
    });
    for put in puts {
        let error = within(put).await.unwrap().err();
        assert!(error.is_none_or(|error| *error.kind() == ErrorKind::OutcomeUnknown));
    }
}

#[tokio::test]
async fn a_value_over_the_servers_limit_is_refused_without_it() {
    let server = Scripted::new().await;
    let (client, mut peer) = tokio::join!(Client::connect(&server.addr), async {
        let mut peer = server.accept_silent().await;
        let (_, id, _) = peer.request().await.unwrap();
        peer.send(&format!("{{\"Base\":{{\"id\":{id},\"status\":200,\"message\":\"\",\"max_value\":10}}}}\n")).await;
        peer
    });
    let client = client.unwrap();
    let error = client.put("a", vec![b'x'; 11]).await.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Refused { status: 413 });
    assert!(error.to_string().contains("11 bytes") && error.to_string().contains("10 at most"), "{error}");
    let (put, ()) = tokio::join!(client.put("b", "short"), async {
        let (kind, id, key) = peer.request().await.unwrap();
        assert_eq!((kind, key.as_str()), (Kind::Put, "b"));
        peer.ok(&id, Some(1)).await;
    });
    put.unwrap();
}

// A request counted as sent once it was encoded: one that the socket had not taken was done after its caller had the
// answer that it never would be, or was said to be unknown.
#[tokio::test]
async fn what_the_socket_has_not_taken_is_taken_back() {
    let server = Scripted::new().await;
    let (client, mut peer) = tokio::join!(Client::connect(&server.addr), server.accept());
    let client = client.unwrap().with_request_timeout(Duration::from_millis(300));
    let long = client.put("long", vec![b'x'; 8 << 20]);
    let behind = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let dropped = tokio::time::timeout(Duration::from_millis(20), client.put("dropped", "1")).await;
        assert!(dropped.is_err());
        client.put("late", "1").await
    };
    let (long, late) = tokio::join!(long, behind);
    assert_eq!(long.unwrap_err().kind(), &ErrorKind::OutcomeUnknown, "a part of it is on its way");
    let late = late.unwrap_err();
    assert_eq!(late.kind(), &ErrorKind::Timeout, "nothing of it is");
    assert!(late.is_retryable());
    let after = tokio::spawn({
        let client = client.with_request_timeout(Duration::from_secs(20));
        async move { client.get("after").await }
    });
    let mut sent = Vec::new();
    while !sent.ends_with(b"\"after\",\"ahead\":true}\n") && !sent.ends_with(b"\"after\"}\n") {
        within(peer.stream.read_buf(&mut sent)).await.unwrap();
    }
    let ends = sent.rsplitn(4, |byte| *byte == b'\n').map(String::from_utf8_lossy);
    let ends: Vec<_> = ends.map(|line| line.chars().take(100).collect::<String>()).collect();
    assert!(ends[1].contains("after") && ends[2].starts_with("xxx"), "{ends:?}");
    after.abort();
}

// The request in front was dropped unanswered.
#[tokio::test]
async fn a_hello_that_was_not_asked_for_takes_no_answer_away() {
    let server = Scripted::new().await;
    let (client, mut peer) = tokio::join!(eager(&server.addr).connect(), server.accept());
    let client = client.unwrap();
    let asking = client.clone();
    let getting = tokio::spawn(async move { asking.exists("a").await });
    peer.request().await.unwrap();
    peer.send("\"Hello\"\n").await;
    let error = within(getting).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Protocol);
    assert!(error.to_string().contains("Hello"), "{error}");
    server.accept().await;
    drop(client);
}

/// A subscription whose snapshot has these entries and is of this revision.
async fn subscribed(
    client: &Client,
    peer: &mut Peer,
    pattern: &str,
    entries: &[(&str, &str, u64)],
    revision: u64,
) -> Subscription {
    let (subscription, ()) = tokio::join!(client.subscribe(pattern), async {
        assert_eq!(peer.request().await.unwrap().2, pattern);
        peer.snapshot(pattern, entries, revision).await;
    });
    subscription.unwrap()
}

/// Refuses a request.
fn refusal(id: &str, status: u16) -> String {
    format!("{{\"Base\":{{\"id\":{id},\"status\":{status},\"message\":\"not now\"}}}}\n")
}

#[tokio::test]
async fn a_refused_second_subscription_leaves_the_first_as_it_is() {
    let server = Scripted::new().await;
    let (client, mut peer) = tokio::join!(Client::connect(&server.addr), server.accept());
    let client = client.unwrap();
    let mut first = subscribed(&client, &mut peer, "a", &[("a", "1", 1)], 1).await;
    assert_eq!(shorts(&until_synced(&mut first).await), ["a=1"]);
    let (second, ()) = tokio::join!(client.subscribe("a"), async {
        let (_, id, _) = peer.request().await.unwrap();
        peer.send(&refusal(&id, 429)).await;
    });
    let error = second.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Refused { status: 429 });
    assert!(error.is_retryable());
    peer.update("a", "2", 2).await;
    assert_eq!(short(&next(&mut first).await), "a=2");
}

// A limit that was reached for a moment ended subscriptions for good.
#[tokio::test]
async fn a_refusal_that_time_can_cure_is_tried_again_after_a_reconnect() {
    let server = Scripted::new().await;
    let (client, mut peer) = tokio::join!(eager(&server.addr).connect(), server.accept());
    let client = client.unwrap();
    let mut subscription = subscribed(&client, &mut peer, "a", &[("a", "1", 1)], 1).await;
    until_synced(&mut subscription).await;
    drop(peer);
    let mut peer = server.accept().await;
    for status in [429, 503] {
        let (kind, id, _) = peer.request().await.unwrap();
        assert_eq!(kind, Kind::Subscribe);
        peer.send(&refusal(&id, status)).await;
    }
    peer.request().await.unwrap();
    peer.snapshot("a", &[("a", "2", 2)], 2).await;
    let received = shorts(&until_synced(&mut subscription).await);
    assert!(received.ends_with(&["Connected".into(), "a=2".into()]), "{received:?}");
}

// It was subscribed again with each connection, snapshot and all, for as long as the program held it.
#[tokio::test]
async fn a_subscription_that_has_ended_is_not_subscribed_again() {
    let server = Scripted::new().await;
    let (client, mut peer) = tokio::join!(eager(&server.addr).subscription_len_max(1_000).connect(), server.accept());
    let client = client.unwrap();
    let mut subscription = subscribed(&client, &mut peer, "a", &[("a", &"x".repeat(2_000), 1)], 1).await;
    while !matches!(next(&mut subscription).await, Event::Ended(_)) {}
    assert_eq!(peer.request().await.unwrap().0, Kind::Unsubscribe, "at once");
    drop(peer);
    let mut peer = server.accept().await;
    let (health, ()) = tokio::join!(client.health(), async {
        let (kind, id, _) = peer.request().await.unwrap();
        assert_eq!(kind, Kind::Health);
        peer.ok(&id, None).await;
    });
    health.unwrap();
    drop(subscription);
}

#[tokio::test]
async fn a_write_that_a_stopping_server_refuses_may_have_been_done() {
    let server = Scripted::new().await;
    let (client, mut peer) = tokio::join!(Client::connect(&server.addr), server.accept());
    let client = client.unwrap();
    let (put, ()) = tokio::join!(client.put("a", "1"), async {
        let (_, id, _) = peer.request().await.unwrap();
        peer.send(&refusal(&id, 503)).await;
    });
    let error = put.unwrap_err();
    assert_eq!((error.kind(), error.is_retryable()), (&ErrorKind::OutcomeUnknown, false));
    let (get, ()) = tokio::join!(client.exists("a"), async {
        let (_, id, _) = peer.request().await.unwrap();
        peer.send(&refusal(&id, 503)).await;
    });
    assert!(get.unwrap_err().is_retryable());
}

// A lock's `if_revision` from before the server lost its data could hold by chance.
#[tokio::test]
async fn a_condition_of_another_epoch_is_refused() {
    let (first, addr) = server().await;
    let client = eager(&addr).connect().await.unwrap();
    let revision = client.put("a", "1").await.unwrap();
    let listen = first.addresses()[0].clone();
    first.shutdown().await.unwrap();
    let _second = nkv_server::Server::builder().listen(listen).bind().await.unwrap();
    assert_eq!(client.get("a").await.unwrap(), None, "the new server's");
    assert_eq!(client.put("a", "other").await.unwrap().get(), revision.get());
    let stale = PutOptions::default().with_if_revision(revision);
    assert_eq!(client.put_with("a", "2", stale).await.unwrap_err().kind(), &ErrorKind::OtherEpoch);
    assert_eq!(client.delete_if("a", revision).await.unwrap_err().kind(), &ErrorKind::OtherEpoch);
    let by_number = PutOptions::default().with_if_revision(Revision::new(revision.get()));
    client.put_with("a", "3", by_number).await.unwrap();
}

// The value went from the queue to the watch on a task of its own: half of the puts that were done were not seen.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_watch_is_never_older_than_the_clients_own_write() {
    let (_server, addr) = server().await;
    let client = Client::connect(&addr).await.unwrap();
    let watch = client.watch("a").await.unwrap();
    for n in 0..2_000 {
        let revision = client.put("a", n.to_string()).await.unwrap();
        let seen = watch.borrow().clone();
        assert!(seen.revision >= revision, "{} after {revision}", seen.revision);
        assert_eq!(seen.value.unwrap().value, n.to_string());
        if n % 10 == 0 {
            client.delete("a").await.unwrap();
            assert_eq!(watch.borrow().value, None);
        }
    }
}

// 400 of one pattern took 34 s: each received the snapshots of all that came after it.
#[tokio::test]
async fn many_subscriptions_of_one_pattern_cost_what_they_receive() {
    let (_server, addr) = server().await;
    let client = Client::connect(&addr).await.unwrap();
    for n in 0..500 {
        client.put(&format!("a.k{n}"), "1").await.unwrap();
    }
    let mut subscriptions = Vec::new();
    for _ in 0..300 {
        subscriptions.push(within(client.subscribe("a")).await.unwrap());
    }
    for subscription in &mut subscriptions {
        assert_eq!(until_synced(subscription).await.len(), 500);
    }
    client.put("a.k7", "2").await.unwrap();
    for subscription in &mut subscriptions {
        assert_eq!(short(&next(subscription).await), "a.k7=2");
    }
}

#[tokio::test]
async fn a_page_is_made_larger_again_behind_large_values() {
    let server = Scripted::new().await;
    let (client, mut peer) = tokio::join!(Client::connect(&server.addr), server.accept());
    let client = client.unwrap();
    let asked = tokio::spawn(async move {
        let mut limits = Vec::new();
        let mut line = Vec::new();
        while limits.len() < 7 {
            line.clear();
            while !line.ends_with(b"\n") {
                line.push(peer.stream.read_u8().await.unwrap());
            }
            let request: serde_json::Value = serde_json::from_slice(&line).unwrap();
            let limit = request["limit"].as_u64().unwrap();
            limits.push(limit);
            let (id, n) = (&request["id"], limits.len());
            let answer = if limit > 500 && n == 1 || n == 2 {
                format!("{{\"Base\":{{\"id\":{id},\"status\":413,\"message\":\"large\"}}}}\n")
            } else {
                let more = n < 7;
                let rest = format!("\"keys\":[\"k{n}\"],\"revisions\":[{n}],\"data\":[[1]],\"more\":{more}");
                format!("{{\"Get\":{{\"id\":{id},\"status\":200,\"message\":\"\",{rest}}}}}\n")
            };
            peer.stream.write_all(answer.as_bytes()).await.unwrap();
        }
        limits
    });
    assert_eq!(within(client.get_all("*")).await.unwrap().len(), 5);
    assert_eq!(within(asked).await.unwrap(), [1_000, 250, 62, 124, 248, 496, 992]);
}

#[tokio::test]
async fn a_client_may_begin_before_its_server() {
    let (first, addr) = server().await;
    let listen = first.addresses()[0].clone();
    first.shutdown().await.unwrap();
    let (waiting, started) = (eager(&addr).wait_for_server(Duration::from_secs(20)), eager(&addr).start().unwrap());
    assert_eq!(*started.state().borrow(), ConnectionState::Reconnecting);
    let early = tokio::spawn(async move {
        let client = waiting.connect().await?;
        started.with_request_timeout(Duration::from_secs(20)).put("a", "1").await?;
        client.get("a").await
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let _second = nkv_server::Server::builder().listen(listen).bind().await.unwrap();
    assert_eq!(within(early).await.unwrap().unwrap().unwrap().value, "1");
    let unused = Scripted::new().await.addr;
    let error = Client::builder(&unused).wait_for_server(Duration::from_millis(50)).connect().await.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::CannotConnect);
}

// It said `Connected` for ever.
#[test]
fn a_client_whose_runtime_has_gone_says_so() {
    let serving = tokio::runtime::Runtime::new().unwrap();
    let (_server, addr) = serving.block_on(server());
    let gone = tokio::runtime::Runtime::new().unwrap();
    let client = gone.block_on(async { Client::connect(&addr).await.unwrap() });
    drop(gone);
    assert_eq!(*client.state().borrow(), ConnectionState::Closed);
    let error = serving.block_on(client.get("a")).unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Closed);
    assert!(error.to_string().contains("runtime"), "{error}");
}

#[tokio::test]
async fn a_key_alone_and_without_the_present_state() {
    let (_server, addr) = server().await;
    let client = Client::connect(&addr).await.unwrap();
    client.put("a", "1").await.unwrap();
    client.put("a.b", "below").await.unwrap();
    let exact = SubscribeOptions::default().with_exact(true);
    let mut alone = client.subscribe_with("a", exact).await.unwrap();
    let mut silent = client.subscribe_with("a", SubscribeOptions::default().with_snapshot(false)).await.unwrap();
    assert_eq!(shorts(&until_synced(&mut alone).await), ["a=1"]);
    assert_eq!(shorts(&until_synced(&mut silent).await), Vec::<String>::new());
    client.put("a.b", "still below").await.unwrap();
    client.put("a", "2").await.unwrap();
    assert_eq!(short(&next(&mut alone).await), "a=2");
    assert_eq!(short(&next(&mut silent).await), "a.b=still below");
    assert_eq!(short(&next(&mut silent).await), "a=2");
    let wildcard = client.subscribe_with("a.*", exact).await.unwrap_err();
    assert_eq!(wildcard.kind(), &ErrorKind::InvalidKey);
}

// What a later version of the protocol says made the client connect for ever.
#[tokio::test]
async fn what_the_client_does_not_know_is_passed_over() {
    let server = Scripted::new().await;
    let (client, mut peer) = tokio::join!(Client::connect(&server.addr), server.accept());
    let client = client.unwrap();
    let mut subscription = subscribed(&client, &mut peer, "a", &[("a", "1", 1)], 1).await;
    until_synced(&mut subscription).await;
    peer.send("{\"Weather\":{\"key\":\"a\",\"sunny\":true}}\n\"Alive\"\n").await;
    peer.send("{\"Close\":{\"key\":\"a\",\"revision\":2,\"skipped\":0,\"reason\":\"tired\"}}\n").await;
    peer.update("a", "3", 3).await;
    assert_eq!(short(&next(&mut subscription).await), "a=3");
}

// It went on showing the value as live: the empty store's revision 0 counted as older than what had been seen.
#[tokio::test]
async fn a_watch_knows_that_its_key_is_not_in_an_empty_store() {
    let (first, addr) = server().await;
    let proxy = Proxy::to(&addr, Dice::new()).await;
    let client = eager(&proxy.addr).connect().await.unwrap();
    client.put("a", "1").await.unwrap();
    let mut watch = client.watch("a").await.unwrap();
    first.shutdown().await.unwrap();
    let (_second, addr) = server().await;
    proxy.lead_to(&addr);
    proxy.cut_now();
    within(watch.wait_for(|seen| !seen.is_live)).await.unwrap();
    assert_eq!(within(watch.wait_for(|seen| seen.is_live)).await.unwrap().value, None);
}

// The snapshot of the key alone, which came first, counted as that of the branch.
#[tokio::test]
async fn a_branch_that_is_subscribed_beside_a_watch_of_its_key_is_delivered_before_synced() {
    let (_server, addr) = server().await;
    let client = Client::connect(&addr).await.unwrap();
    client.put("a", "1").await.unwrap();
    client.put("a.b", "2").await.unwrap();
    let (watch, subscription) = tokio::join!(client.watch("a"), client.subscribe("a"));
    let (watch, mut subscription) = (watch.unwrap(), subscription.unwrap());
    assert_eq!(shorts(&until_synced(&mut subscription).await), ["a=1", "a.b=2"]);
    drop(subscription);
    client.put("a", "3").await.unwrap();
    assert_eq!(watch.borrow().value.as_ref().unwrap().value, "3");
}

// The snapshot was not delivered, and neither was what was put while it came: 20 of 20 changes were missing.
#[tokio::test]
async fn without_the_present_state_all_that_comes_after_it_began_is_notified() {
    let (_server, addr) = server().await;
    let writer = Client::connect(&addr).await.unwrap();
    let puts: Vec<_> = (0..8_000)
        .map(|n| {
            let writer = writer.clone();
            tokio::spawn(async move { writer.put(&format!("k.{n}"), vec![b'x'; 200]).await })
        })
        .collect();
    for put in puts {
        within(put).await.unwrap().unwrap();
    }
    for n in 0..5 {
        let client = Client::connect(&addr).await.unwrap();
        let silent = SubscribeOptions::default().with_snapshot(false);
        let mut subscription = within(client.subscribe_with("*", silent)).await.unwrap();
        writer.put("z", n.to_string()).await.unwrap();
        let update = loop {
            let event = next(&mut subscription).await;
            if matches!(event, Event::Update { .. }) {
                break event;
            }
        };
        assert_eq!(short(&update), format!("z={n}"));
    }
}

#[test]
fn a_wildcard_delete_is_seen_by_who_watches_with_its_answer() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let (_server, addr) = server().await;
        let client = Client::connect(&addr).await.unwrap();
        let watch = client.watch("a.b").await.unwrap();
        for n in 0..500 {
            client.put("a.b", n.to_string()).await.unwrap();
            assert!(watch.borrow().value.is_some());
            client.delete("a.*").await.unwrap();
            assert_eq!(watch.borrow().value, None);
        }
    });
}

// What waited for another subscription comes behind the snapshot that has it already: a key that had gone came back with an
// old value, or went twice.
#[tokio::test]
async fn a_change_that_a_snapshot_has_is_not_notified_after_it() {
    /// What is received before a change of this key.
    async fn received_before(subscription: &mut Subscription, key: &str) -> Vec<String> {
        let mut received = Vec::new();
        loop {
            let word = short(&next(subscription).await);
            if word.starts_with(key) {
                received.retain(|word: &String| word.starts_with('a'));
                return received;
            }
            received.push(word);
        }
    }
    let close = |revision| {
        format!("{{\"Close\":{{\"key\":\"a\",\"revision\":{revision},\"skipped\":0,\"reason\":\"deleted\"}}}}\n")
    };
    let server = Scripted::new().await;
    let (client, mut peer) = tokio::join!(eager(&server.addr).connect(), server.accept());
    let client = client.unwrap();
    let _all = subscribed(&client, &mut peer, "*", &[("a", "1", 1)], 1).await;
    let mut one = subscribed(&client, &mut peer, "a", &[], 5).await;
    assert_eq!(shorts(&until_synced(&mut one).await), [""; 0]);
    peer.update("a", "3", 3).await;
    peer.update("a.m", "6", 6).await;
    assert_eq!(received_before(&mut one, "a.m").await, [""; 0]);
    peer.send(&close(4)).await;
    peer.update("a.n", "7", 7).await;
    assert_eq!(received_before(&mut one, "a.n").await, [""; 0]);
    peer.update("a", "8", 8).await;
    peer.update("a.o", "9", 9).await;
    assert_eq!(received_before(&mut one, "a.o").await, ["a=8"]);

    // After a reconnect, what was missed is not notified once more as a delete.
    drop(peer);
    let mut peer = server.accept().await;
    for _ in 0..2 {
        let pattern = peer.request().await.unwrap().2;
        let kept = [("a", "8", 8), ("a.m", "6", 6), ("a.n", "7", 7), ("a.o", "9", 9)];
        match pattern.as_str() {
            "*" => peer.snapshot("*", &kept, 9).await,
            _ => peer.snapshot("a", &kept[1..], 11).await,
        }
    }
    peer.update("a.p", "12", 12).await;
    assert_eq!(received_before(&mut one, "a.p").await, ["a missed"]);
    peer.send(&close(10)).await;
    peer.update("a.q", "13", 13).await;
    assert_eq!(received_before(&mut one, "a.q").await, [""; 0]);
}

#[tokio::test]
async fn more_than_was_asked_for_is_refused() {
    let server = Scripted::new().await;
    let (client, mut peer) = tokio::join!(Client::connect(&server.addr), server.accept());
    let client = client.unwrap();
    let (get, ()) = tokio::join!(client.get("a"), async {
        let (_, id, _) = peer.request().await.unwrap();
        let lists = r#""keys":["a","b"],"revisions":[1,2],"data":[[],[]]"#;
        peer.send(&format!("{{\"Get\":{{\"id\":{id},\"status\":200,\"message\":\"\",{lists}}}}}\n")).await;
    });
    let error = get.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Protocol);
    assert!(error.to_string().contains("2 keys"), "{error}");
}
