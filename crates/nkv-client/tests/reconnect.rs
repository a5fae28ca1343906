//! Connections that break at any byte, and servers that come back as others.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::HashMap;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Dice, Proxy, eager, next, server, short, shorts, until_synced, within};
use nkv_client::{Client, ConnectionState, Epoch, ErrorKind, Event, GoneReason, Key, Subscription};
use nkv_persist_fs::{Durability, FsOptions, FsPersist};
use nkv_server::Server;
use tokio::net::TcpListener;

/// What a reader knows, from events alone.
#[derive(Default)]
struct Known {
    values: HashMap<String, String>,
    /// The highest revision ever received of a key: nothing at or below it may follow.
    received: HashMap<String, u64>,
    epoch: Option<Epoch>,
    events: usize,
}

impl Known {
    fn learn(&mut self, event: &Event) {
        self.events += 1;
        match event {
            Event::Update { entry, .. } => {
                let revision = entry.revision.get();
                let before = self.received.insert(entry.key.to_string(), revision);
                assert!(before < Some(revision), "{}: {revision} after {before:?}", entry.key);
                self.values.insert(entry.key.to_string(), String::from_utf8_lossy(&entry.value).into_owned());
            }
            Event::Gone { key, revision, .. } => {
                let before = self.received.insert(key.to_string(), revision.get());
                assert!(before < Some(revision.get()), "{key}: gone at {revision} after {before:?}");
                self.values.remove(key.as_str());
            }
            Event::Synced { epoch, .. } => assert_eq!(self.epoch.get_or_insert(*epoch), epoch),
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
    assert!(
        writer.trace("a.k1").await.unwrap().iter().all(|subscriber| subscriber.client_uuid == client.client_uuid())
    );
}

#[tokio::test]
async fn what_was_missed_is_notified_as_if_it_had_just_happened() {
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

    proxy.lead_to("127.0.0.1:1"); // where there is no listener
    proxy.cut_now();
    assert_eq!(next(&mut subscription).await, Event::Reconnecting);
    assert_eq!(*client.state().borrow(), ConnectionState::Reconnecting);
    writer.put("a", "2").await.unwrap();
    writer.delete("b").await.unwrap();
    writer.put("d", "1").await.unwrap();
    proxy.lead_to(&addr);

    assert_eq!(short(&next(&mut subscription).await), "Connected");
    let mut received = shorts(&until_synced(&mut subscription).await);
    received.sort();
    assert_eq!(received, ["a=2", "b missed", "d=1"], "and nothing of c, which did not change");
    within(watched.wait_for(|seen| seen.value.is_none())).await.unwrap();
    writer.put("b", "3").await.unwrap();
    assert_eq!(short(&next(&mut subscription).await), "b=3");
}

#[tokio::test]
async fn a_server_that_lost_its_data_has_everything_notified_again() {
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
    let mut received: Vec<_> = shorts(&events).into_iter().filter(|word| !word.starts_with(['R', 'C'])).collect();
    received.sort();
    assert_eq!(received, ["a=0", "b missed", "c=same"], "lower revisions count: it is another epoch");
}

#[tokio::test]
async fn a_program_that_knows_better_does_not_wait_for_the_next_attempt() {
    let (_server, addr) = server().await;
    let proxy = Proxy::to(&addr, Dice::new()).await;
    let hour = Duration::from_secs(3_600);
    let client = Client::builder(&proxy.addr).backoff(hour, hour).connect().await.unwrap();
    client.reconnect_now(); // it is there: nothing happens
    client.put("a", "1").await.unwrap();
    assert_eq!(proxy.accepted.load(SeqCst), 1);
    let mut state = client.state();
    for _ in 0..3 {
        proxy.cut_now();
        within(state.wait_for(|state| *state == ConnectionState::Reconnecting)).await.unwrap();
        client.reconnect_now();
        within(state.wait_for(|state| *state == ConnectionState::Connected)).await.unwrap();
    }
    client.put("a", "2").await.unwrap();
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

/// What a reader of one subscription knows while servers come and go.
#[derive(Default)]
struct Wary {
    values: HashMap<String, String>,
    /// Of the epoch: the highest revision received of a key.
    received: HashMap<String, u64>,
    epoch: Option<Epoch>,
    missed: usize,
}

impl Wary {
    fn learn(&mut self, event: &Event) {
        let (key, revision) = match event {
            Event::Update { entry, .. } => {
                self.values.insert(entry.key.to_string(), String::from_utf8_lossy(&entry.value).into_owned());
                (&entry.key, entry.revision)
            }
            Event::Gone { key, revision, reason, .. } => {
                self.values.remove(key.as_str());
                self.missed += usize::from(*reason == GoneReason::Missed);
                (key, *revision)
            }
            Event::Synced { epoch, .. } => return assert_eq!(self.epoch.get_or_insert(*epoch), epoch),
            Event::Connected { epoch, .. } => {
                if self.epoch.replace(*epoch) != Some(*epoch) {
                    self.received.clear();
                }
                return;
            }
            Event::Reconnecting => return,
            other => panic!("{other:?}"),
        };
        // What a server without any data lacks was gone by revision 0, which is of every epoch.
        if let Some(epoch) = revision.epoch() {
            assert_eq!(*self.epoch.get_or_insert(epoch), epoch, "{key}: of an epoch that was not reported");
        }
        let before = self.received.insert(key.to_string(), revision.get());
        assert!(before < Some(revision.get()), "{key}: {revision} after {before:?}");
    }
}

/// A server whose data outlives it.
async fn kept(dir: &std::path::Path) -> (Server, String) {
    let dir = dir.to_owned();
    let open = move || FsPersist::open(dir, FsOptions::default().with_durability(Durability::Os));
    let server = Server::builder().listen("127.0.0.1:0".parse().unwrap()).persist("os", open).bind().await.unwrap();
    let addr = common::front(&server.addresses()[0].to_string()).await;
    (server, addr)
}

/// Accepts connections, and then says nothing for ever, or resets them.
async fn useless(resets: bool) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            // What is dropped with something unread is reset.
            if !resets {
                held.push(stream);
            }
        }
    });
    addr
}

/// `NKV_SEEDS` says how many seeds are tried, from `NKV_SEED` on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_becomes_of_its_servers_a_client_goes_back_in_nothing_and_converges() {
    let count: u64 = std::env::var("NKV_SEEDS").map_or(4, |count| count.parse().unwrap());
    let first = common::proxy::seed();
    let (mut cuts, mut epochs, mut missed, mut slowest) = (0, 0, 0, Duration::ZERO);
    for seed in first..first + count {
        println!("NKV_SEED={seed}");
        let life = live_through(Dice::of(seed)).await;
        cuts += life.cuts;
        epochs += life.epochs;
        missed += life.missed;
        slowest = slowest.max(life.converged);
    }
    println!(
        "TEST reconnect seeds={count} cuts={cuts} epochs={epochs} missed_deletes={missed} back=0 duplicates=0 \
         converged_ms_max={} seed={first}",
        slowest.as_millis()
    );
    assert!(missed > 0 && cuts > 10 * count, "too little happened");
}

struct Life {
    cuts: u64,
    epochs: u64,
    missed: usize,
    converged: Duration,
}

async fn live_through(mut dice: Dice) -> Life {
    let mut dir = tempfile::tempdir().unwrap();
    let (mut server, mut addr) = kept(dir.path()).await;
    let proxy = Proxy::to(&addr, dice.split()).await;
    let builder = eager(&proxy.addr).connect_timeout(Duration::from_millis(100)).heartbeat(Duration::from_millis(100));
    // A slow machine may need longer for the first time.
    let client = loop {
        match builder.clone().connect().await {
            Ok(client) => break client,
            Err(error) => assert_eq!(*error.kind(), ErrorKind::CannotConnect),
        }
    };
    let mut writer = Client::connect(&addr).await.unwrap();
    let useless = [useless(false).await, useless(true).await, "127.0.0.1:1".to_owned()];
    let mut readers = Vec::new();
    for pattern in ["*", "a", "a.*", "b.k1", "*", "b"] {
        let mut subscription = client.subscribe(pattern).await.unwrap();
        let known = Arc::new(Mutex::new(Wary::default()));
        readers.push((pattern, Arc::clone(&known)));
        tokio::spawn(async move {
            while let Some(event) = subscription.next().await {
                known.lock().unwrap().learn(&event);
            }
        });
    }
    let mut several = client.subscribe(["a.*", "c", "a.k1"]).await.unwrap();
    let known_of_several = Arc::new(Mutex::new(Wary::default()));
    let known = Arc::clone(&known_of_several);
    tokio::spawn(async move {
        while let Some(event) = several.next().await {
            known.lock().unwrap().learn(&event);
        }
    });
    let mut branches = Vec::new();
    for pattern in ["*", "a", "a.*"] {
        branches.push((pattern, client.watch_branch(pattern).await.unwrap()));
    }
    let hasty = client.with_request_timeout(Duration::from_millis(5));
    let mut epochs = 1;
    for _ in 0..30 {
        for _ in 0..dice.below(12) {
            let key = format!("{}.k{}", ["a", "b", "c"][dice.below(3) as usize], dice.below(4));
            // Some writes are the client's own, and what became of them may not be known.
            match dice.below(6) {
                0 => _ = hasty.put(&key, format!("own {}", dice.below(1_000_000))).await,
                1 => _ = hasty.delete(&key).await,
                2 => _ = hasty.delete("a.*").await,
                _ => {}
            }
            if dice.below(3) == 0 {
                writer.delete(&key).await.unwrap();
            } else {
                writer.put(&key, format!("{}", dice.below(1_000_000))).await.unwrap();
            }
        }
        match dice.below(12) {
            0..3 => proxy.cut_after(1 + dice.below(3_000)),
            3..6 => proxy.cut_now(),
            6..8 => {
                proxy.lead_to(&useless[dice.below(3) as usize]);
                proxy.cut_now();
            }
            8..10 => proxy.lead_to(&addr),
            lost => {
                server.shutdown().await.unwrap();
                if lost == 11 {
                    (dir, epochs) = (tempfile::tempdir().unwrap(), epochs + 1);
                }
                (server, addr) = kept(dir.path()).await;
                writer = Client::connect(&addr).await.unwrap();
                proxy.lead_to(&addr);
            }
        }
        tokio::time::sleep(Duration::from_millis(dice.below(20))).await;
    }
    let cuts = proxy.accepted.load(SeqCst) - 1;
    proxy.cut_after(0);
    proxy.lead_to(&addr);
    proxy.cut_now();
    let last_cut = Instant::now();
    // Asked again each time: a write of a connection that was cut may be done yet.
    let present = async |is_covered: &dyn Fn(&Key) -> bool| -> HashMap<_, _> {
        let now = writer.get_all("*").await.unwrap();
        let covered = now.into_iter().filter(|entry| is_covered(&entry.key));
        covered.map(|entry| (entry.key.to_string(), String::from_utf8_lossy(&entry.value).into_owned())).collect()
    };
    for (pattern, known) in &readers {
        let covers = nkv_client::Pattern::new(pattern).unwrap();
        eventually(last_cut, &format!("{pattern} converges"), async || {
            let present = present(&|key| covers.covers(key)).await;
            known.lock().unwrap().values == present
        })
        .await;
    }
    eventually(last_cut, "several patterns converge", async || {
        let present = present(&|key| key.as_str().starts_with(['a', 'c'])).await;
        known_of_several.lock().unwrap().values == present
    })
    .await;
    for (pattern, branch) in &branches {
        let covers = nkv_client::Pattern::new(pattern).unwrap();
        eventually(last_cut, &format!("the branch {pattern} converges"), async || {
            let present = present(&|key| covers.covers(key)).await;
            let branch = branch.borrow();
            let texts = branch.entries.values();
            let texts = texts.map(|entry| (entry.key.to_string(), String::from_utf8_lossy(&entry.value).into_owned()));
            branch.is_live && texts.collect::<HashMap<_, _>>() == present
        })
        .await;
    }
    let converged = last_cut.elapsed();
    // Each pattern once, and none of the connections that were cut has left anything.
    eventually(last_cut, "nothing is left over", async || {
        writer.stats().await.unwrap().numbers["subscriptions"] == 6 && client.health().await.is_ok()
    })
    .await;
    let traced = writer.trace("a.k1").await.unwrap();
    let mut patterns: Vec<_> =
        traced.iter().map(|traced| (traced.client_uuid.as_str(), traced.pattern.as_str())).collect();
    patterns.sort_unstable();
    let name = client.client_uuid();
    assert_eq!(patterns, [(name, "*"), (name, "a"), (name, "a.*")]);
    let missed = readers.iter().map(|(_, known)| known.lock().unwrap().missed).sum();
    server.shutdown().await.unwrap();
    Life { cuts, epochs, missed, converged }
}

async fn eventually(since: Instant, what: &str, is_so: impl AsyncFn() -> bool) {
    while !is_so().await {
        assert!(since.elapsed() < Duration::from_secs(6), "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// All clients of a server lose it at once; it comes back after a while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_lost_a_server_together_come_back_one_after_another() {
    const CLIENTS: usize = 300;
    // Nothing connects from this address, so no client can take the port meanwhile.
    let listen = |addr: &str| Server::builder().listen(addr.parse().unwrap()).bind();
    let server = listen("127.0.0.2:0").await.unwrap();
    let addr = server.addresses()[0].to_string();
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(Client::builder(&addr).request_timeout(Duration::from_secs(20)).connect().await.unwrap());
    }
    server.shutdown().await.unwrap();
    let gone = Instant::now();
    let attempts = Arc::new(Mutex::new(Vec::new()));
    let listener = TcpListener::bind(&addr).await.unwrap();
    let counting = tokio::spawn({
        let attempts = Arc::clone(&attempts);
        async move {
            while let Ok((stream, _)) = listener.accept().await {
                attempts.lock().unwrap().push(gone.elapsed());
                drop(stream);
            }
        }
    });
    // Until each has tried four times on average.
    eventually(gone, "they try again", async || attempts.lock().unwrap().len() >= 4 * CLIENTS).await;
    counting.abort();
    assert!(counting.await.is_err_and(|error| error.is_cancelled()));
    let server = listen(&addr).await.unwrap();
    let returned = Instant::now();
    let back: Vec<_> = clients
        .iter()
        .map(|client| {
            let mut state = client.state();
            tokio::spawn(async move {
                within(state.wait_for(|state| *state == ConnectionState::Connected)).await.unwrap();
                returned.elapsed()
            })
        })
        .collect();
    let mut times = Vec::new();
    for back in back {
        times.push(back.await.unwrap());
    }
    let attempts = attempts.lock().unwrap().clone();
    let (away, peak) = (peak_per_100ms(&attempts), peak_per_100ms(&times));
    let all_back = times.iter().max().unwrap().as_millis();
    println!(
        "TEST reconnect_storm clients={CLIENTS} peak_per_100ms={peak} all_back_ms={all_back} attempts_while_away={} \
         peak_while_away={away}",
        attempts.len(),
    );
    assert!(peak < CLIENTS / 2, "{peak} of {CLIENTS} came within 100 ms");
    server.shutdown().await.unwrap();
}

fn peak_per_100ms(times: &[Duration]) -> usize {
    let mut counts = HashMap::<u128, usize>::new();
    times.iter().for_each(|time| *counts.entry(time.as_millis() / 100).or_default() += 1);
    counts.into_values().max().unwrap_or(0)
}
