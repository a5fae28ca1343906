//! Connections that break at any byte, and servers that come back as others.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::HashMap;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Dice, Proxy, eager, next, server, short, shorts, until_synced, within};
use nkv_client::{Client, ConnectionState, Event, Subscription};

/// What a reader knows, from events alone.
#[derive(Default)]
struct Known {
    values: HashMap<String, String>,
    /// The highest revision ever told of a key: nothing at or below it may follow.
    told: HashMap<String, u64>,
    epoch: String,
    events: usize,
}

impl Known {
    fn learn(&mut self, event: &Event) {
        self.events += 1;
        match event {
            Event::Update { entry, .. } => {
                let revision = entry.revision.get();
                let before = self.told.insert(entry.key.to_string(), revision);
                assert!(before < Some(revision), "{}: {revision} after {before:?}", entry.key);
                self.values.insert(entry.key.to_string(), String::from_utf8_lossy(&entry.value).into_owned());
            }
            Event::Gone { key, revision, .. } => {
                let before = self.told.insert(key.to_string(), revision.get());
                assert!(before < Some(revision.get()), "{key}: gone at {revision} after {before:?}");
                self.values.remove(key.as_str());
            }
            Event::Synced { epoch, .. } if self.epoch.is_empty() => self.epoch.clone_from(epoch),
            Event::Synced { epoch, .. } => assert_eq!(&self.epoch, epoch),
            _ => {}
        }
    }
}

fn follow(mut subscription: Subscription) -> Arc<Mutex<Known>> {
    let known = Arc::new(Mutex::new(Known::default()));
    let learner = Arc::clone(&known);
    tokio::spawn(async move {
        while let Some(event) = subscription.next().await {
            learner.lock().unwrap().learn(&event);
        }
    });
    known
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_cut_where_every_subscription_converges() {
    let mut dice = Dice::new();
    let (_server, addr) = server().await;
    let proxy = Proxy::to(&addr, dice.clone()).await;
    let client = eager(&proxy.addr).connect().await.unwrap();
    let writer = Client::connect(&addr).await.unwrap();
    let patterns = ["*", "a", "a.*", "b.k1", "*", "b"];
    let mut readers = Vec::new();
    for pattern in patterns {
        readers.push((pattern, follow(client.subscribe(pattern).await.unwrap())));
    }
    proxy.cut_after(6_000);
    proxy.cut_now();
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(3) {
        let key = format!("{}.k{}", ["a", "b", "c"][dice.below(3) as usize], dice.below(8));
        if dice.below(3) == 0 {
            writer.delete(&key).await.unwrap();
        } else {
            writer.put(&key, format!("{}", dice.below(1_000_000))).await.unwrap();
        }
        if dice.below(4) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let cuts = proxy.accepted.load(SeqCst) - 1;
    assert!(cuts >= 20, "only {cuts} cuts");
    proxy.cut_after(0);
    proxy.cut_now();
    let last_cut = Instant::now();
    let now: HashMap<_, _> =
        writer.get_all("*").await.unwrap().into_iter().map(|entry| (entry.key, entry.value)).collect();
    for (pattern, known) in &readers {
        let pattern = nkv_client::Pattern::new(pattern).unwrap();
        let covered = now.iter().filter(|(key, _)| pattern.covers(key));
        let expected: HashMap<_, _> =
            covered.map(|(key, value)| (key.to_string(), String::from_utf8_lossy(value).into_owned())).collect();
        while known.lock().unwrap().values != expected {
            assert!(last_cut.elapsed() < Duration::from_secs(6), "{pattern} has not converged");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    let events: usize = readers.iter().map(|(_, known)| known.lock().unwrap().events).sum();
    println!("{cuts} cuts, {events} events, converged in {:?}", last_cut.elapsed());
    // Each pattern once, and none of the connections that were cut has left anything.
    client.health().await.unwrap();
    while writer.stats().await.unwrap().numbers["subscriptions"] != 5 {
        assert!(last_cut.elapsed() < Duration::from_secs(6), "subscriptions are left over");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(writer.trace("a.k1").await.unwrap().iter().all(|told| told.client_uuid == client.client_uuid()));
}

#[tokio::test]
async fn what_was_missed_is_told_as_if_it_had_just_happened() {
    let (_server, addr) = server().await;
    let proxy = Proxy::to(&addr, Dice::new()).await;
    let client = eager(&proxy.addr).connect().await.unwrap();
    let writer = Client::connect(&addr).await.unwrap();
    for key in ["a", "b", "c"] {
        writer.put(key, "1").await.unwrap();
    }
    let mut subscription = client.subscribe("*").await.unwrap();
    let mut watched = client.watch("b").await.unwrap();
    assert_eq!(shorts(&until_synced(&mut subscription).await), ["a=1", "b=1", "c=1"]);

    proxy.lead_to("127.0.0.1:1"); // where nobody listens
    proxy.cut_now();
    assert_eq!(next(&mut subscription).await, Event::Reconnecting);
    assert_eq!(*client.state().borrow(), ConnectionState::Reconnecting);
    writer.put("a", "2").await.unwrap();
    writer.delete("b").await.unwrap();
    writer.put("d", "1").await.unwrap();
    proxy.lead_to(&addr);

    assert_eq!(next(&mut subscription).await, Event::Connected);
    let mut told = shorts(&until_synced(&mut subscription).await);
    told.sort();
    assert_eq!(told, ["a=2", "b missed", "d=1"], "and nothing of c, which did not change");
    within(watched.wait_for(Option::is_none)).await.unwrap();
    writer.put("b", "3").await.unwrap();
    assert_eq!(short(&next(&mut subscription).await), "b=3");
}

#[tokio::test]
async fn a_server_that_lost_its_data_has_everything_told_again() {
    let (first, addr) = server().await;
    let proxy = Proxy::to(&addr, Dice::new()).await;
    let client = eager(&proxy.addr).connect().await.unwrap();
    for (key, value) in [("a", "1"), ("a", "2"), ("b", "1"), ("c", "same")] {
        client.put(key, value).await.unwrap();
    }
    let mut subscription = client.subscribe("*").await.unwrap();
    until_synced(&mut subscription).await;
    first.shutdown().await.unwrap();

    let (_second, addr) = server().await;
    let writer = Client::connect(&addr).await.unwrap();
    writer.put("c", "same").await.unwrap();
    writer.put("a", "0").await.unwrap();
    proxy.lead_to(&addr);
    proxy.cut_now();
    let events = until_synced(&mut subscription).await;
    let mut told: Vec<_> = shorts(&events).into_iter().filter(|word| !word.starts_with(['R', 'C'])).collect();
    told.sort();
    assert_eq!(told, ["a=0", "b missed", "c=same"], "lower revisions count: it is another epoch");
}

#[tokio::test]
async fn a_subscription_made_while_the_connection_is_away_waits_for_it() {
    let (_server, addr) = server().await;
    let proxy = Proxy::to(&addr, Dice::new()).await;
    let client = eager(&proxy.addr).connect().await.unwrap();
    proxy.lead_to("127.0.0.1:1");
    proxy.cut_now();
    within(client.state().wait_for(|state| *state == ConnectionState::Reconnecting)).await.unwrap();
    let waiting = client.clone();
    let subscribing = tokio::spawn(async move {
        waiting.put("a", "1").await?;
        waiting.subscribe("a").await
    });
    tokio::time::sleep(Duration::from_millis(30)).await;
    proxy.lead_to(&addr);
    let mut subscription = within(subscribing).await.unwrap().unwrap();
    assert_eq!(short(&next(&mut subscription).await), "a=1");
    assert!(matches!(next(&mut subscription).await, Event::Synced { .. }));
}
