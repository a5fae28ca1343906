//! The client against a server that follows a script: what a real one does seldom or never.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::time::{Duration, Instant};

use common::{Scripted, eager, next, short, shorts, until_synced, within};
use nkv_client::{Client, ConnectionState, EndReason, ErrorKind, Event};
use nkv_protocol::Kind;

#[tokio::test]
async fn without_a_listener_connecting_fails_at_once() {
    let addr = Scripted::new().await.addr;
    let started = Instant::now();
    let error = Client::connect(&addr).await.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::CannotConnect);
    assert!(error.to_string().contains(&addr) && error.to_string().contains("refused"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(2));
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up_in_time() {
    let server = Scripted::new().await;
    let error = Client::builder(&server.addr).connect_timeout(Duration::from_millis(50)).connect().await.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::CannotConnect);
    assert!(error.to_string().contains("no answer within 50ms"), "{error}");
}

#[tokio::test]
async fn a_nats_server_is_named() {
    let nats = Scripted::new().await;
    let addr = nats.addr.clone();
    let (error, _peer) = tokio::join!(Client::connect(&addr), async {
        let mut peer = nats.accept_silent().await;
        peer.send("INFO {\"server_id\":\"x\",\"version\":\"2.10\"}\r\n").await;
        peer
    });
    let error = error.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::CannotConnect);
    assert!(error.to_string().contains("NATS"), "{error}");
}

#[tokio::test]
async fn requests_are_pipelined_and_written_together() {
    let server = Scripted::new().await;
    let (client, mut peer) = tokio::join!(Client::connect(&server.addr), server.accept());
    let client = client.unwrap();
    let puts: Vec<_> = (0..100)
        .map(|n| {
            let client = client.clone();
            tokio::spawn(async move { client.put(&format!("k{n}"), n.to_string()).await })
        })
        .collect();
    let reads_before = peer.reads;
    let mut ids = Vec::new();
    for _ in 0..100 {
        ids.push(peer.request().await.unwrap().1);
    }
    assert!(peer.reads - reads_before < 20, "{} reads for 100 requests", peer.reads - reads_before);
    for (revision, id) in (1..).zip(&ids) {
        peer.ok(id, Some(revision)).await;
    }
    for put in puts {
        within(put).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_put_is_never_sent_twice_and_a_get_is_asked_again() {
    let server = Scripted::new().await;
    let (client, mut peer) = tokio::join!(eager(&server.addr).connect(), server.accept());
    let client = client.unwrap();
    let (putting, getting) = (client.clone(), client.clone());
    let put = tokio::spawn(async move { putting.put("a", "1").await });
    assert_eq!(peer.request().await.unwrap().0, Kind::Put);
    let get = tokio::spawn(async move { getting.exists("a").await });
    assert_eq!(peer.request().await.unwrap().0, Kind::Exists);
    drop(peer);

    let error = within(put).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::OutcomeUnknown);
    assert!(!error.is_retryable());
    let mut peer = server.accept().await;
    let (kind, id, _) = peer.request().await.unwrap();
    assert_eq!(kind, Kind::Exists);
    peer.ok(&id, None).await;
    assert!(within(get).await.unwrap().unwrap());
}

#[tokio::test]
async fn a_request_waits_for_the_connection_until_its_time_is_up() {
    let server = Scripted::new().await;
    let (client, peer) = tokio::join!(eager(&server.addr).connect(), server.accept());
    let client = client.unwrap().with_request_timeout(Duration::from_millis(100));
    let mut state = client.state();
    drop((peer, server));
    within(state.wait_for(|state| *state == ConnectionState::Reconnecting)).await.unwrap();
    for error in [client.put("a", "1").await.unwrap_err(), client.subscribe("a").await.map(drop).unwrap_err()] {
        assert_eq!(error.kind(), &ErrorKind::Timeout, "nothing was sent");
        assert!(error.is_retryable());
        assert!(format!("{error:#}").contains("refused"), "{error:#}");
    }
}

#[tokio::test]
async fn a_put_that_was_given_up_before_it_was_sent_is_never_sent() {
    let server = Scripted::new().await;
    let (client, peer) = tokio::join!(eager(&server.addr).connect(), server.accept());
    let client = client.unwrap();
    drop(peer);
    within(client.state().wait_for(|state| *state == ConnectionState::Reconnecting)).await.unwrap();
    let mut silent = server.accept_silent().await; // it is not greeted, so nothing else is sent
    let error = client.with_request_timeout(Duration::from_millis(50)).put("a", "1").await.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Timeout);
    let (kind, id, _) = silent.request().await.unwrap();
    assert_eq!(kind, Kind::Connect);
    silent.ok(&id, None).await;
    let asking = tokio::spawn(async move { client.health().await });
    let (kind, id, _) = silent.request().await.unwrap();
    assert_eq!(kind, Kind::Health, "the put must not come");
    silent.ok(&id, None).await;
    within(asking).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_put_without_an_answer_in_time_has_an_unknown_outcome() {
    let server = Scripted::new().await;
    let (client, mut peer) = tokio::join!(Client::connect(&server.addr), server.accept());
    let client = client.unwrap().with_request_timeout(Duration::from_millis(50));
    let (put, request) = tokio::join!(client.put("a", "1"), peer.request());
    assert_eq!(put.unwrap_err().kind(), &ErrorKind::OutcomeUnknown);
    // A late answer is not taken for that of the next request.
    peer.ok(&request.unwrap().1, Some(7)).await;
    let (exists, _peer) = tokio::join!(client.exists("a"), async {
        let (_, id, _) = peer.request().await.unwrap();
        peer.send(&format!("{{\"Base\":{{\"id\":{id},\"status\":404,\"message\":\"Not Found\"}}}}\n")).await;
        peer
    });
    assert!(!exists.unwrap());
}

#[tokio::test]
async fn an_answer_to_another_request_ends_the_connection() {
    let server = Scripted::new().await;
    let (client, mut peer) = tokio::join!(eager(&server.addr).connect(), server.accept());
    let client = client.unwrap();
    let (put, _) = tokio::join!(client.put("a", "1"), async {
        peer.request().await.unwrap();
        peer.ok("99", Some(1)).await;
    });
    assert_eq!(put.unwrap_err().kind(), &ErrorKind::OutcomeUnknown);
    server.accept().await;
}

#[tokio::test]
async fn a_server_cannot_make_the_client_hold_more_than_the_limit() {
    let server = Scripted::new().await;
    let builder = eager(&server.addr).message_len_max(100_000);
    let (client, mut peer) = tokio::join!(builder.connect(), server.accept());
    let client = client.unwrap();
    let (got, sent) = tokio::join!(client.get("a"), async {
        let (_, id, _) = peer.request().await.unwrap();
        peer.send(&format!("{{\"Get\":{{\"id\":{id},\"data\":[")).await;
        let mut sent = 0;
        while sent < 50_000_000 && tokio::io::AsyncWriteExt::write_all(&mut peer.stream, &[b'['; 50_000]).await.is_ok()
        {
            sent += 50_000;
        }
        sent
    });
    let error = got.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Protocol);
    assert!(error.to_string().contains("limit of 100000 bytes"), "{error}");
    assert!(sent < 50_000_000);
}

// Keys without end were all kept, and so were their values while they were not read.
#[tokio::test]
async fn a_server_cannot_make_a_subscription_hold_more_than_its_limit() {
    let server = Scripted::new().await;
    let builder = eager(&server.addr).subscription_len_max(1_000_000);
    let (client, mut peer) = tokio::join!(builder.connect(), server.accept());
    let client = client.unwrap();
    let (subscriptions, ()) =
        tokio::join!(async { tokio::join!(client.subscribe("*"), client.subscribe("a")) }, async {
            for _ in 0..2 {
                let (_, _, pattern) = peer.request().await.unwrap();
                peer.snapshot(&pattern, &[("a", "1", 1)], 1).await;
            }
        });
    let (mut all, mut one) = (subscriptions.0.unwrap(), subscriptions.1.unwrap());
    let value = "x".repeat(10_000);
    for n in 0..200 {
        peer.update(&format!("k{n}"), &value, n + 2).await;
    }
    peer.update("a", "2", 1_000).await;
    assert_eq!(shorts(&until_synced(&mut one).await), ["a=1"]);
    assert_eq!(short(&next(&mut one).await), "a=2", "others go on");
    let mut events = Vec::new();
    while let Some(event) = within(all.next()).await {
        events.push(event);
    }
    assert_eq!(events.last(), Some(&Event::Ended(EndReason::TooMuch { len_max: 1_000_000 })));
    assert!((90..110).contains(&events.len()), "{} events", events.len());
}

#[tokio::test]
async fn a_silent_connection_is_asked_for_a_word_and_then_given_up() {
    let server = Scripted::new().await;
    let builder = eager(&server.addr).heartbeat(Duration::from_millis(30));
    let (client, mut peer) = tokio::join!(builder.connect(), server.accept());
    let client = client.unwrap();
    for _ in 0..3 {
        let (kind, id, _) = peer.request().await.unwrap();
        assert_eq!(kind, Kind::Health);
        assert_eq!(*client.state().borrow(), ConnectionState::Connected);
        peer.ok(&id, None).await;
    }
    let _next = server.accept().await; // the fourth got no answer
}

#[tokio::test]
async fn a_snapshot_belongs_to_its_subscription_alone_and_a_change_to_all_that_cover_it() {
    let server = Scripted::new().await;
    let (client, mut peer) = tokio::join!(Client::connect(&server.addr), server.accept());
    let client = client.unwrap();
    let (all, ()) = tokio::join!(client.subscribe("*"), async {
        assert_eq!(peer.request().await.unwrap().2, "*");
        peer.snapshot("*", &[("a", "1", 1), ("b", "2", 2)], 2).await;
    });
    let mut all = all.unwrap();
    assert_eq!(shorts(&until_synced(&mut all).await), ["a=1", "b=2"]);
    let (one, ()) = tokio::join!(client.subscribe("a"), async {
        assert_eq!(peer.request().await.unwrap().2, "a");
        peer.update("b", "3", 3).await;
        peer.snapshot("a", &[("a", "1", 1)], 3).await;
        peer.update("a", "4", 4).await;
    });
    // Newer already, and still notified before `Synced`.
    assert_eq!(shorts(&until_synced(&mut one.unwrap()).await), ["a=4"]);
    assert_eq!(short(&next(&mut all).await), "b=3");
    assert_eq!(short(&next(&mut all).await), "a=4");
}

#[tokio::test]
async fn a_connection_lost_within_a_snapshot_loses_nothing_and_reports_nothing_missed() {
    let server = Scripted::new().await;
    let (client, mut peer) = tokio::join!(eager(&server.addr).connect(), server.accept());
    let client = client.unwrap();
    let (subscription, ()) = tokio::join!(client.subscribe("*"), async {
        peer.request().await.unwrap();
        peer.snapshot("*", &[("a", "1", 1), ("b", "2", 2), ("c", "3", 3)], 3).await;
    });
    let mut subscription = subscription.unwrap();
    until_synced(&mut subscription).await;
    drop(peer);
    let mut peer = server.accept().await;
    peer.request().await.unwrap();
    peer.send("\"Hello\"\n").await;
    peer.update("a", "1", 1).await;
    peer.send("{\"Update\":{\"key\":\"b\"").await;
    drop(peer);
    let mut peer = server.accept().await;
    peer.request().await.unwrap();
    peer.snapshot("*", &[("a", "1", 1), ("b", "5", 5)], 5).await;
    let mut events = Vec::new();
    while !matches!(events.last(), Some(Event::Synced { .. })) {
        events.push(next(&mut subscription).await);
    }
    let of_keys = |word: &String| word.contains(['=', ' ']);
    let received: Vec<_> = shorts(&events).into_iter().filter(of_keys).collect();
    assert_eq!(received, ["b=5", "c missed"]);
}

#[tokio::test]
async fn a_subscription_that_is_refused_says_so_at_once_or_at_its_end() {
    let server = Scripted::new().await;
    let (client, mut peer) = tokio::join!(eager(&server.addr).connect(), server.accept());
    let client = client.unwrap();
    let refuse = |id: &str| format!("{{\"Base\":{{\"id\":{id},\"status\":403,\"message\":\"not yours\"}}}}\n");
    let (refused, ()) = tokio::join!(client.subscribe("a"), async {
        let id = peer.request().await.unwrap().1;
        peer.send(&refuse(&id)).await;
    });
    let error = refused.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Refused { status: 403 });
    assert!(error.to_string().contains("not yours"));

    let (subscription, ()) = tokio::join!(client.subscribe("b"), async {
        peer.request().await.unwrap();
        peer.snapshot("b", &[], 0).await;
    });
    let mut subscription = subscription.unwrap();
    until_synced(&mut subscription).await;
    drop(peer);
    let mut peer = server.accept().await;
    let id = peer.request().await.unwrap().1;
    peer.send(&refuse(&id)).await;
    loop {
        if let Event::Ended(reason) = next(&mut subscription).await {
            assert_eq!(reason, EndReason::Refused { status: 403, message: "not yours".into() });
            break;
        }
    }
    assert_eq!(within(subscription.next()).await, None);
}

#[tokio::test]
async fn when_client_and_subscriptions_are_dropped_the_connection_closes() {
    let server = Scripted::new().await;
    let (client, mut peer) = tokio::join!(Client::connect(&server.addr), server.accept());
    let client = client.unwrap();
    let (watched, ()) = tokio::join!(client.watch("a"), async {
        peer.request().await.unwrap();
        peer.snapshot("a", &[("a", "1", 1), ("a.b", "2", 2)], 2).await;
    });
    let mut watched = watched.unwrap();
    drop(client);
    peer.update("a.b", "x", 3).await;
    peer.update("a", "3", 4).await;
    within(watched.changed()).await.unwrap();
    assert_eq!(
        watched.borrow_and_update().value.as_ref().unwrap().value,
        "3",
        "what is below the key is none of its business"
    );
    drop(watched);
    assert_eq!(peer.request().await.map(|request| request.0).filter(|kind| *kind != Kind::Unsubscribe), None);
    assert_eq!(peer.request().await, None);
}

// It could be 80 MiB, before it was known what answered.
#[tokio::test]
async fn a_greeting_may_not_be_long() {
    let server = Scripted::new().await;
    let (error, sent) = tokio::join!(Client::connect(&server.addr), async {
        let mut peer = server.accept_silent().await;
        let mut sent = 0;
        while sent < 50_000_000 && tokio::io::AsyncWriteExt::write_all(&mut peer.stream, &[b'{'; 50_000]).await.is_ok()
        {
            sent += 50_000;
        }
        sent
    });
    let error = error.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::CannotConnect);
    assert!(error.to_string().contains("limit of 65536 bytes"), "{error}");
    assert!(sent < 50_000_000);
}

// A server that always had more, and that the same, kept the client busy until its memory was full.
#[tokio::test]
async fn a_page_that_goes_back_is_an_error() {
    let server = Scripted::new().await;
    let (client, mut peer) = tokio::join!(Client::connect(&server.addr), server.accept());
    let client = client.unwrap();
    tokio::spawn(async move {
        while let Some((kind, id, _)) = peer.request().await {
            let common =
                format!(r#""id":{id},"status":200,"message":"","keys":["b","a"],"revisions":[2,1],"more":true"#);
            match kind {
                Kind::List => {
                    peer.send(&format!("{{\"List\":{{{}}}}}\n", common.replace(r#""b","a""#, r#""a","b""#))).await
                }
                _ => peer.send(&format!("{{\"Get\":{{{common},\"data\":[[],[]]}}}}\n")).await,
            }
        }
    });
    for error in [within(client.list("*")).await.unwrap_err(), within(client.get_all("*")).await.unwrap_err()] {
        assert_eq!(error.kind(), &ErrorKind::Protocol);
        assert!(error.to_string().contains("goes back to the key 'a'"), "{error}");
    }
}

// Adding the longest time to now panicked.
#[tokio::test]
async fn no_time_is_too_long() {
    let server = Scripted::new().await;
    let builder = Client::builder(&server.addr).request_timeout(Duration::MAX).connect_timeout(Duration::MAX);
    let builder = builder.heartbeat(Duration::MAX).backoff(Duration::ZERO, Duration::MAX);
    let (client, mut peer) = tokio::join!(builder.connect(), server.accept());
    let client = client.unwrap();
    let (watched, ()) = tokio::join!(client.watch("a"), async {
        peer.request().await.unwrap();
        peer.snapshot("a", &[("a", "1", 1)], 1).await;
    });
    assert_eq!(watched.unwrap().borrow().value.as_ref().unwrap().value, "1");
    drop(peer);
    server.accept().await;
}
