//! The client against a real server.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use common::{next, server, short, shorts, until_synced, within};
use futures_util::future::join_all;
use nkv_client::{
    Client, ConnectionState, Deleted, Edit, EndReason, ErrorKind, Event, GoneReason, Key, PageOptions, Pattern,
    PutOptions, Revision, SubscribeOptions, blocking,
};
use nkv_core::mailbox::DELETES_MAX;
use serde::{Deserialize, Serialize};
use tokio_stream::Stream;

#[tokio::test]
async fn every_request_is_answered() {
    let (_server, addr) = server().await;
    let client = Client::connect(&addr).await.unwrap();
    client.health().await.unwrap();
    assert_eq!(client.version().await.unwrap().protocol, 1);
    assert_eq!(client.get("a").await.unwrap(), None);
    assert!(!client.exists("*").await.unwrap());

    let binary = [0, 255, b'\n', b'"'];
    let first = client.put("a.b", binary).await.unwrap();
    let second = client.put("a.c", "").await.unwrap();
    assert!(second > first);
    let entry = client.get("a.b").await.unwrap().unwrap();
    assert_eq!((entry.key.as_str(), &entry.value[..], entry.revision), ("a.b", &binary[..], first));
    assert!(client.exists("a.*").await.unwrap());
    assert_eq!(client.list("*").await.unwrap().len(), 2);
    assert_eq!(client.get_all("a.*").await.unwrap().len(), 2);
    assert_eq!(client.get_all("b.*").await.unwrap(), []);
    assert_eq!(client.stats().await.unwrap().numbers["keys"], 2);

    let _subscription = client.subscribe("a").await.unwrap();
    let traced = client.trace("a.b").await.unwrap();
    assert_eq!((traced[0].client_uuid.as_str(), traced[0].pattern.as_str()), (client.client_uuid(), "a"));

    let deleted = client.delete("a.*").await.unwrap();
    assert_eq!((deleted.count, deleted.revision > Some(second)), (2, true));
    assert_eq!(client.delete("a.*").await.unwrap(), Deleted::default());
}

#[tokio::test]
async fn what_cannot_be_a_key_is_refused_before_anything_is_sent() {
    let (_server, addr) = server().await;
    let client = Client::connect(&addr).await.unwrap();
    for error in [
        client.put("a b", "1").await.map(drop).unwrap_err(),
        client.get("a.*").await.map(drop).unwrap_err(),
        client.subscribe("a*").await.map(drop).unwrap_err(),
        client.watch("*").await.map(drop).unwrap_err(),
        client.list("").await.map(drop).unwrap_err(),
    ] {
        assert_eq!(error.kind(), &ErrorKind::InvalidKey);
    }
}

#[tokio::test]
async fn a_conditional_write_reports_the_present_revision_of_a_conflict() {
    let (_server, addr) = server().await;
    let client = Client::connect(&addr).await.unwrap();
    let if_absent = PutOptions::default().with_if_revision(Revision::ZERO);
    let revision = client.put_with("a", "1", if_absent).await.unwrap();
    let error = client.put_with("a", "2", if_absent).await.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Conflict { revision });
    let error = client.delete_if("a", Revision::new(revision.get() + 1)).await.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Conflict { revision });
    assert_eq!(client.delete_if("a", revision).await.unwrap().count, 1);
    assert_eq!(client.delete_if("a", revision).await.unwrap().count, 0);
}

#[tokio::test]
async fn what_is_too_large_for_one_answer_comes_in_pages() {
    let (_server, addr) = server().await;
    let client = Client::connect(&addr).await.unwrap().with_request_timeout(Duration::from_secs(30));
    let value = vec![7; 1 << 20];
    let puts: Vec<_> = (0..70)
        .map(|n| {
            let (client, value) = (client.clone(), value.clone());
            tokio::spawn(async move { client.put(&format!("big.{n}"), value).await })
        })
        .collect();
    for put in puts {
        within(put).await.unwrap().unwrap();
    }
    let all = within(client.get_all("*")).await.unwrap();
    assert_eq!(all.len(), 70);
    assert!(all.is_sorted_by(|a, b| a.key < b.key) && all.iter().all(|entry| entry.value.len() == 1 << 20));
    let page = client
        .list_page("big.*", PageOptions::default().with_limit(3).with_after(Key::new("big.10").unwrap()))
        .await
        .unwrap();
    let keys: Vec<_> = page.items.iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!((keys, page.more), (vec!["big.11", "big.12", "big.13"], true));
    let error = client.put("big.x", vec![7; (1 << 20) + 1]).await.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Refused { status: 413 });
}

#[tokio::test]
async fn many_keys_are_listed_in_pages() {
    let (server, addr) = server().await;
    let nkv = server.handle();
    for n in 0..2_500 {
        let key = nkv_client::Key::new(&format!("k{n:05}")).unwrap();
        nkv.put(&key, "1").await.unwrap();
    }
    let client = Client::connect(&addr).await.unwrap();
    assert_eq!(client.get_all("*").await.unwrap().len(), 2_500);
    assert_eq!(client.list("*").await.unwrap().len(), 2_500);
}

#[tokio::test]
async fn a_subscription_delivers_the_present_then_synced_then_changes() {
    let (_server, addr) = server().await;
    let client = Client::connect(&addr).await.unwrap();
    client.put("lamp.hall", "on").await.unwrap();
    client.put("door", "shut").await.unwrap();
    let mut lamps = client.subscribe("lamp").await.unwrap();
    assert_eq!(shorts(&until_synced(&mut lamps).await), ["lamp.hall=on"]);
    client.put("door", "open").await.unwrap();
    client.put("lamp", "1").await.unwrap();
    assert_eq!(short(&next(&mut lamps).await), "lamp=1");
    client.delete("lamp.hall").await.unwrap();
    assert_eq!(short(&next(&mut lamps).await), "lamp.hall deleted");
    let ttl = PutOptions::default().with_ttl(Duration::from_millis(20));
    client.put_with("lamp.hall", "on", ttl).await.unwrap();
    assert_eq!(short(&next(&mut lamps).await), "lamp.hall=on");
    let expired = next(&mut lamps).await;
    assert!(matches!(expired, Event::Gone { reason: GoneReason::Expired, .. }), "{expired:?}");
}

#[tokio::test]
async fn subscriptions_that_overlap_or_are_the_same_are_each_notified_once() {
    let (_server, addr) = server().await;
    let client = Client::connect(&addr).await.unwrap();
    client.put("a.b", "1").await.unwrap();
    let mut subscriptions = Vec::new();
    for pattern in ["a", "a.*", "*", "a", "a.b", "a"] {
        let mut subscription = client.subscribe(pattern).await.unwrap();
        assert_eq!(shorts(&until_synced(&mut subscription).await), ["a.b=1"], "{pattern}");
        subscriptions.push(subscription);
    }
    assert_eq!(client.stats().await.unwrap().numbers["subscriptions"], 4);
    for value in ["2", "3"] {
        client.put("a.b", value).await.unwrap();
        for subscription in &mut subscriptions {
            assert_eq!(short(&next(subscription).await), format!("a.b={value}"));
        }
    }
    subscriptions.truncate(1); // its pattern goes on, for it alone
    client.put("a.b", "4").await.unwrap();
    assert_eq!(short(&next(&mut subscriptions[0]).await), "a.b=4");
    assert_eq!(client.stats().await.unwrap().numbers["subscriptions"], 1);
    subscriptions.clear();
    client.health().await.unwrap();
    let mut again = client.subscribe("a").await.unwrap();
    assert_eq!(shorts(&until_synced(&mut again).await), ["a.b=4"]);
}

#[tokio::test]
async fn a_slow_reader_gets_the_latest_state_of_each_key() {
    let (_server, addr) = server().await;
    let client = Client::connect(&addr).await.unwrap();
    let mut slow = client.subscribe("*").await.unwrap();
    until_synced(&mut slow).await;
    for n in 0..500 {
        client.put(&format!("k{}", n % 5), n.to_string()).await.unwrap();
    }
    client.put("end", "").await.unwrap();
    client.health().await.unwrap();
    let (mut events, mut changes) = (Vec::new(), 0);
    while events.last().is_none_or(|event: &Event| short(event) != "end=") {
        let event = next(&mut slow).await;
        if let Event::Update { skipped, .. } = &event {
            changes += 1 + skipped;
        }
        events.push(event);
    }
    assert!(events.len() < 100, "{} events for 5 keys", events.len());
    assert_eq!(changes, 501, "none is lost without being counted");
    for n in 495..500 {
        let last = events.iter().rfind(|event| short(event).starts_with(&format!("k{}=", n % 5)));
        assert_eq!(last.map(short), Some(format!("k{}={n}", n % 5)));
    }
}

#[tokio::test]
async fn a_reader_that_takes_nothing_while_all_keys_go_is_given_the_present_state() {
    let (_server, addr) = server().await;
    let client = Client::builder(&addr).request_timeout(Duration::from_secs(60)).connect().await.unwrap();
    let keys = 2 * DELETES_MAX;
    let put = async |n| client.put(&format!("k.{n}"), "1").await.unwrap();
    join_all((0..keys).map(put)).await;
    let mut slow = client.subscribe("*").await.unwrap();
    let mut reader = client.subscribe("*").await.unwrap();
    until_synced(&mut reader).await; // the snapshot of the first has ended before
    assert_eq!(slow.size_hint().0, keys + 1);
    client.delete("k.*").await.unwrap();
    client.put("end", "2").await.unwrap();
    while !matches!(next(&mut reader).await, Event::Update { entry, .. } if entry.key.as_str() == "end") {}
    let mut after = client.subscribe("end").await.unwrap();
    until_synced(&mut after).await; // behind what was asked for again
    let waiting = slow.size_hint().0;
    assert!(waiting <= DELETES_MAX + 2, "{waiting} wait");
    let mut known = BTreeSet::new();
    while !(known.len() == 1 && known.contains("end")) {
        match next(&mut slow).await {
            Event::Update { entry, .. } => _ = known.insert(entry.key.to_string()),
            Event::Gone { key, .. } => _ = known.remove(key.as_str()),
            _ => {}
        }
    }
    client.put("k.1", "3").await.unwrap();
    let news = async |slow: &mut _| short(&next(slow).await);
    let first = news(&mut slow).await;
    assert_eq!(if first == "synced" { news(&mut slow).await } else { first }, "k.1=3");
}

#[tokio::test]
async fn of_updates_that_meet_none_is_lost() {
    let (_server, addr) = server().await;
    let client = Client::builder(&addr).request_timeout(Duration::from_secs(60)).connect().await.unwrap();
    let tasks = (0..8).map(|_| {
        let client = client.clone();
        tokio::spawn(async move {
            for _ in 0..25 {
                client.update_as("n", |n: Option<u64>| n.unwrap_or(0) + 1).await.unwrap();
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        within(task).await.unwrap();
    }
    assert_eq!(client.get_as::<u64>("n").await.unwrap(), Some(200));
    let key = Key::new("n").unwrap();
    let kept = client.update(&key, |old| if old.is_some() { Edit::Keep } else { Edit::put("1") }).await.unwrap();
    assert_eq!(kept.unwrap().value, "200");
    let none = client.update_as(&key, |n: Option<u64>| if n == Some(200) { Edit::Delete } else { Edit::Keep });
    assert_eq!((none.await.unwrap(), client.exists("n").await.unwrap()), (None, false));
    let short = client.update_as("n", |_: Option<u64>| Edit::put(1).with_ttl(Duration::from_millis(1))).await.unwrap();
    assert_eq!(short, Some(1));
    let mut watch = client.watch("n").await.unwrap();
    within(watch.wait_for(|seen| seen.value.is_none())).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_update_that_others_are_always_faster_than_ends_with_the_conflict() {
    let (_server, addr) = server().await;
    let client = Client::builder(&addr).request_timeout(Duration::from_millis(300)).connect().await.unwrap();
    let other = Client::connect(&addr).await.unwrap();
    let mut n = 0;
    let mut edit = |_: Option<&nkv_client::Entry>| {
        n += 1;
        // In between the read and the write.
        let put = other.put("a", n.to_string());
        tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(put)).unwrap();
        "mine"
    };
    let mut error = within(client.update("a", &mut edit)).await.unwrap_err();
    for _ in 0..50 {
        // A request may be under way when the time is over, mostly so on a busy machine.
        if !matches!(error.kind(), ErrorKind::Timeout | ErrorKind::OutcomeUnknown) {
            break;
        }
        error = within(client.update("a", &mut edit)).await.unwrap_err();
    }
    assert!(matches!(error.kind(), ErrorKind::Conflict { revision } if revision.get() == n), "{error:?}");
    assert_eq!(client.get("a").await.unwrap().unwrap().value, n.to_string());
}

#[tokio::test]
async fn several_patterns_are_one_subscription() {
    let (_server, addr) = server().await;
    let client = Client::connect(&addr).await.unwrap();
    for key in ["a.x", "b", "b.x", "c", "d"] {
        client.put(key, "1").await.unwrap();
    }
    let mut subscription = client.subscribe(["b.x", "a", "a.x", "b.*", "c"]).await.unwrap();
    let patterns: Vec<_> = subscription.patterns().map(ToString::to_string).collect();
    assert_eq!(patterns, ["a", "b.*", "c"]);
    let mut present = shorts(&until_synced(&mut subscription).await);
    present.sort();
    assert_eq!(present, ["a.x=1", "b.x=1", "c=1"]);
    for (key, value) in [("b", "not covered"), ("a.x", "2"), ("d", "2"), ("c", "2")] {
        client.put(key, value).await.unwrap();
    }
    client.delete("b.x").await.unwrap();
    for event in ["a.x=2", "c=2", "b.x deleted"] {
        assert_eq!(short(&next(&mut subscription).await), event);
    }
    drop(subscription);

    let key = Key::new("a").unwrap();
    let exact = SubscribeOptions::default().with_exact(true);
    let mut alone = client.subscribe_with(&[Pattern::from(&key), Pattern::from(key)], exact).await.unwrap();
    assert_eq!(alone.patterns().count(), 1);
    assert_eq!(until_synced(&mut alone).await, []);
    assert_eq!(client.subscribe([] as [&str; 0]).await.unwrap_err().kind(), &ErrorKind::InvalidKey);
    assert_eq!(client.subscribe_with(["a", "b.*"], exact).await.unwrap_err().kind(), &ErrorKind::InvalidKey);
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Lamp {
    on: bool,
    level: u8,
}

#[tokio::test]
async fn values_may_be_json_of_a_type() {
    let (_server, addr) = server().await;
    let client = Client::connect(&addr).await.unwrap();
    let lamp = |level| Lamp { on: true, level };
    assert_eq!(client.get_as::<Lamp>("lamp").await.unwrap(), None);
    client.put_as("lamp", &lamp(1)).await.unwrap();
    assert_eq!(client.get_as("lamp").await.unwrap(), Some(lamp(1)));

    let mut watched = client.watch_as::<Lamp>("lamp").await.unwrap();
    assert_eq!(watched.borrow_and_update().value, Some(lamp(1)));
    client.put_as_with("lamp", &lamp(2), PutOptions::default()).await.unwrap();
    assert_eq!(watched.borrow().value, Some(lamp(2)));
    let broken = client.put("lamp", "broken").await.unwrap();
    let seen = watched.borrow().clone();
    assert_eq!((seen.value, seen.revision, seen.error.unwrap().kind()), (Some(lamp(2)), broken, &ErrorKind::Json));
    assert_eq!(client.get_as::<Lamp>("lamp").await.unwrap_err().kind(), &ErrorKind::Json);
    client.delete("lamp").await.unwrap();
    within(watched.wait_for(|seen| seen.value.is_none() && seen.error.is_none())).await.unwrap();
}

#[tokio::test]
async fn a_watch_knows_the_present_value_at_once_and_follows_it() {
    let (_server, addr) = server().await;
    let client = Client::connect(&addr).await.unwrap();
    client.put("a", "1").await.unwrap();
    client.put("a.b", "below").await.unwrap();
    let mut watched = client.watch("a").await.unwrap();
    assert_eq!(watched.borrow_and_update().value.as_ref().unwrap().value, "1");
    client.put("a.b", "still below").await.unwrap();
    client.put("a", "2").await.unwrap();
    within(watched.changed()).await.unwrap();
    assert_eq!(watched.borrow_and_update().value.as_ref().unwrap().value, "2");
    client.delete("a").await.unwrap();
    within(watched.changed()).await.unwrap();
    assert_eq!(watched.borrow_and_update().value, None);
    assert!(watched.borrow().is_live);
    client.close();
    within(watched.changed()).await.unwrap();
    assert!(!watched.borrow_and_update().is_live);
    assert_eq!(within(watched.changed()).await.unwrap_err().kind(), &ErrorKind::Closed);
}

#[tokio::test]
async fn a_branch_is_a_map_that_is_always_current() {
    let (_server, addr) = server().await;
    let client = Client::connect(&addr).await.unwrap();
    let lamp = |level| Lamp { on: true, level };
    client.put_as("lamp.a", &lamp(1)).await.unwrap();
    client.put("lamp.b", "broken").await.unwrap();
    client.put("door", "not covered").await.unwrap();
    let raw = client.watch_branch("lamp").await.unwrap();
    let mut lamps = client.watch_branch_as::<Lamp>("lamp.*").await.unwrap();
    let (a, b) = (Key::new("lamp.a").unwrap(), Key::new("lamp.b").unwrap());
    {
        let (raw, lamps) = (raw.borrow(), lamps.borrow_and_update());
        assert!(raw.is_live && lamps.is_live && raw.revision.get() >= 2);
        assert_eq!(raw.entries.keys().collect::<Vec<_>>(), [&a, &b]);
        assert_eq!(lamps.entries.iter().collect::<Vec<_>>(), [(&a, &lamp(1))]);
        let unreadable = &lamps.unreadable[&b];
        assert_eq!((&unreadable.entry.value[..], unreadable.error.kind()), (&b"broken"[..], &ErrorKind::Json));
    }
    // The client's own writes are in it when they are done.
    client.put_as(&b, &lamp(2)).await.unwrap();
    assert_eq!(lamps.borrow().entries.values().collect::<Vec<_>>(), [&lamp(1), &lamp(2)]);
    assert_eq!(client.delete("lamp.*").await.unwrap().count, 2);
    assert!(lamps.borrow().entries.is_empty() && raw.borrow().entries.is_empty());
    let other = Client::connect(&addr).await.unwrap();
    let revision = other.put_as("lamp.c", &lamp(3)).await.unwrap();
    let seen = within(lamps.wait_for(|lamps| lamps.entries.len() == 1)).await.unwrap().revision;
    assert_eq!(seen, revision);
    client.close();
    within(lamps.wait_for(|lamps| lamps.ended.is_some())).await.unwrap();
    let state = lamps.borrow();
    assert_eq!((state.is_live, state.ended.as_ref(), state.entries.len()), (false, Some(&EndReason::Closed), 1));
}

#[tokio::test]
async fn a_branch_too_large_to_begin_is_refused_with_the_reason() {
    let (_server, addr) = server().await;
    let client = Client::builder(&addr).subscription_len_max(1_000).connect().await.unwrap();
    for n in 0..10 {
        client.put(format!("k{n}"), "1").await.unwrap();
    }
    let error = client.watch_branch("*").await.unwrap_err();
    assert!(*error.kind() == ErrorKind::Protocol && error.to_string().contains("1000 bytes"), "{error:?}");
    assert_eq!(client.watch_branch("k1").await.unwrap().borrow().entries.len(), 1);
}

/// Does what a gateway does, against any store.
async fn mirror<S: nkv_client::Store>(store: S, from: &'static str, to: &'static str) -> nkv_client::Result<usize> {
    let tasks = store.get_all(from).await?.into_iter().map(|entry| {
        let store = store.clone();
        tokio::spawn(async move {
            let key = format!("{to}.{}", entry.key);
            store.put_with(&key, &entry.value, PutOptions::default().with_if_revision(Revision::ZERO)).await?;
            store.update(&key, |old| [&old.unwrap().value[..], b"!"].concat()).await
        })
    });
    let mut count = 0;
    for task in tasks.collect::<Vec<_>>() {
        count += usize::from(task.await.unwrap()?.is_some());
    }
    let mut copies = store.subscribe([to, from]).await?;
    let mut events = 0;
    loop {
        match within(tokio_stream::StreamExt::next(&mut copies)).await {
            Some(Event::Synced { .. }) | None => break,
            Some(_) => events += 1,
        }
    }
    assert_eq!(events, 2 * count);
    store.delete(Pattern::new(from)?).await?;
    assert!(store.exists(to).await? || store.exists(format!("{to}.*")).await?);
    store.health().await?;
    Ok(count)
}

#[tokio::test]
async fn a_gateway_runs_against_any_store() {
    let (_server, addr) = server().await;
    let client = Client::connect(&addr).await.unwrap();
    for key in ["lamp.a", "lamp.b"] {
        client.put(key, "on").await.unwrap();
    }
    assert_eq!(mirror(client.clone(), "lamp.*", "copy").await.unwrap(), 2);
    let copies = client.get_all("*").await.unwrap();
    assert!(copies.len() == 2 && copies.iter().all(|copy| copy.value == "on!"), "{copies:?}");
}

#[tokio::test]
async fn a_closed_client_says_so_everywhere() {
    let (_server, addr) = server().await;
    let client = Client::connect(&addr).await.unwrap();
    let mut subscription = client.subscribe("*").await.unwrap();
    until_synced(&mut subscription).await;
    client.close();
    assert_eq!(next(&mut subscription).await, Event::Ended(EndReason::Closed));
    assert_eq!(within(subscription.next()).await, None);
    within(client.state().wait_for(|state| *state == ConnectionState::Closed)).await.unwrap();
    assert_eq!(client.put("a", "1").await.unwrap_err().kind(), &ErrorKind::Closed);
    assert_eq!(client.subscribe("a").await.unwrap_err().kind(), &ErrorKind::Closed);
}

#[tokio::test]
async fn of_two_clients_of_one_name_the_later_takes_the_subscription() {
    let (_server, addr) = server().await;
    let first = Client::builder(&addr).client_uuid("me").connect().await.unwrap();
    let mut theirs = first.subscribe("a").await.unwrap();
    until_synced(&mut theirs).await;
    let second = Client::builder(&addr).client_uuid("me").connect().await.unwrap();
    let mut mine = second.subscribe("a").await.unwrap();
    assert_eq!(next(&mut theirs).await, Event::Ended(EndReason::Replaced));
    until_synced(&mut mine).await;
    first.put("a", "1").await.unwrap();
    assert_eq!(short(&next(&mut mine).await), "a=1");
}

#[tokio::test]
async fn a_unix_socket_serves_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let addr = format!("unix:{}", dir.path().join("nkv.sock").display());
    let _server = nkv_server::Server::builder().listen(addr.parse().unwrap()).bind().await.unwrap();
    let client = Client::connect(&addr).await.unwrap();
    client.put("a", "1").await.unwrap();
    assert!(client.exists("a").await.unwrap());
}

#[test]
fn a_program_without_a_runtime_has_the_same_client() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (_server, addr) = runtime.block_on(server());
    let client = blocking::Client::connect(&addr).unwrap();
    client.put("a.b", "1").unwrap();
    assert_eq!(client.get("a.b").unwrap().unwrap().value, "1");
    assert_eq!(client.get("nope").unwrap(), None);
    client.put_as("n", &5).unwrap();
    assert_eq!(client.get_as::<u8>("n").unwrap(), Some(5));
    assert_eq!(client.update_as("n", |n: Option<u8>| n.unwrap_or(0) + 1).unwrap(), Some(6));
    assert_eq!(client.update("n", |n| n.unwrap().value.clone()).unwrap().unwrap().value, "6");
    let mut subscription = client.subscribe("a").unwrap();
    assert_eq!(short(&subscription.next().unwrap()), "a.b=1");
    assert_eq!(short(&subscription.next().unwrap()), "synced");
    let nothing = subscription.next_timeout(Duration::from_millis(10)).unwrap_err();
    assert_eq!(nothing.kind(), &ErrorKind::Timeout);
    client.put("a", "2").unwrap();
    assert_eq!(short(&subscription.next_timeout(Duration::from_secs(10)).unwrap().unwrap()), "a=2");
    let mut watch = client.with_request_timeout(Duration::from_secs(20)).watch("a").unwrap();
    assert_eq!(watch.get().value.unwrap().value, "2");
    client.put("a", "3").unwrap();
    assert_eq!(watch.changed(Duration::from_secs(10)).unwrap().value.unwrap().value, "3");
    assert_eq!(watch.changed(Duration::from_millis(10)).unwrap_err().kind(), &ErrorKind::Timeout);
    let mut branch = client.watch_branch("*").unwrap();
    assert_eq!((branch.borrow().entries.len(), branch.borrow().is_live), (3, true));
    let numbers = client.watch_branch_as::<u8>("n").unwrap();
    assert_eq!(numbers.borrow().entries.values().collect::<Vec<_>>(), [&6]);
    assert_eq!(client.delete("*").unwrap().count, 3);
    assert!(branch.borrow().entries.is_empty());
    assert!(branch.changed(Duration::from_secs(10)).unwrap().entries.is_empty());
    assert_eq!(branch.changed(Duration::from_millis(10)).map(drop).unwrap_err().kind(), &ErrorKind::Timeout);
    client.close();
    assert!(branch.wait_for(Duration::from_secs(10), |branch| branch.ended.is_some()).is_ok());
    assert_eq!(subscription.by_ref().last(), Some(Event::Ended(EndReason::Closed)));
    assert_eq!(
        subscription.next_timeout(Duration::from_secs(10)),
        Ok(None),
        "the end is distinguished from a time-out"
    );
    assert_eq!(client.health().unwrap_err().kind(), &ErrorKind::Closed);
    // Dropped within a runtime, it must not panic.
    runtime.block_on(async { drop(client) });
}
