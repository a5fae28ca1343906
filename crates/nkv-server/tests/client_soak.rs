//! One client of the library with a hundred tasks and a hundred subscriptions, behind a proxy that cuts, while its server
//! is killed, frozen and stopped. Everything that the client says is compared with what was written: no value that was
//! not, none that is older than one seen or acknowledged, no answer that is lost or claims too much; in the end every
//! subscription knows what the store holds, and memory has not grown.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, dead_code, unreachable_pub, missing_docs)]

#[path = "client_soak/ledger.rs"]
mod ledger;
#[path = "../../nkv-client/tests/common/proxy.rs"]
mod proxy;
mod support;
#[path = "client_soak/tasks.rs"]
mod tasks;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use ledger::Ledger;
use nkv_client::{Client, Pattern};
use proxy::{Dice, Proxy};
use support::PATIENCE;
use support::process::{Process, command};
use tasks::{LIMIT, OTHERS, TASKS, Task, View, World};
use tokio::runtime::Runtime;

/// From this length on it is judged whether memory grows, and by how much it may.
const JUDGED_SECONDS: u64 = 60;
const GROWTH_KIB: u64 = 16 << 10;

/// `NKV_SEED` chooses what is done and which fault follows which; what happens at the same time varies all the same.
/// `NKV_SOAK_SECONDS` makes it longer.
#[test]
fn whatever_becomes_of_server_and_connection_the_client_says_what_is_true() {
    let seed = proxy::seed();
    println!("NKV_SEED={seed}");
    let seconds: u64 = std::env::var("NKV_SOAK_SECONDS").map_or(5, |seconds| seconds.parse().unwrap());
    let mut dice = Dice::of(seed);
    let dir = tempfile::tempdir().unwrap();
    // Nothing connects from this address, so no client can take the port while the server is away.
    let mut server = start(dir.path(), "127.0.0.2:0");
    let addr = server.addr.clone();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let world = Arc::new(World {
        ledger: Ledger::new(tasks::keys()),
        proxy: runtime.block_on(Proxy::to(&addr, dice.split())),
        epoch: epoch(&server),
        stop: false.into(),
        lives: 0.into(),
        faults: 0.into(),
        frozen: false.into(),
        counts: Mutex::default(),
        wrong: Mutex::default(),
    });
    let client = runtime.block_on(connect(&world.proxy.addr));
    let views = subscribe(&runtime, &world, &client, &mut dice);
    let other = runtime.block_on(connect(&addr));
    let clients = std::iter::repeat_n(&client, TASKS).chain(std::iter::repeat_n(&other, OTHERS));
    let tasks = clients.enumerate().map(|(n, client)| runtime.spawn(Task::new(&world, client, n, dice.split()).run()));
    let tasks: Vec<_> = tasks.collect();

    let (began, mut memory) = (Instant::now(), Vec::new());
    let mut faults = Faults { dir: dir.path(), world: &world, addr: &addr, seconds, done: BTreeMap::new() };
    let mut turn = 0;
    while began.elapsed() < Duration::from_secs(seconds) {
        faults.make(turn, &mut server, &mut dice);
        turn += 1;
        thread::sleep(Duration::from_millis(100 + dice.below(if seconds < JUDGED_SECONDS { 200 } else { 1_500 })));
        memory.push((began.elapsed(), rss_kib()));
    }
    world.stop.store(true, SeqCst);
    for task in tasks {
        let done = runtime.block_on(async { tokio::time::timeout(LIMIT * 6, task).await });
        done.unwrap_or_else(|_| panic!("a task does not end (seed {seed})")).unwrap();
    }
    let converged = converge(&runtime, &world, (&addr, &other), &views);

    let kinds = faults.done.iter().map(|(kind, count)| format!("{kind}={count}")).collect::<Vec<_>>().join(" ");
    let counts = world.counts.lock().unwrap().clone();
    let words = counts.iter().map(|(what, count)| format!("{what}={count}")).collect::<Vec<_>>().join(" ");
    let events: u64 = views.iter().map(|view| view.lock().unwrap().events).sum();
    let (warm, end) = (mean(&memory, 0.2..0.4), mean(&memory, 0.8..1.0));
    let wrong = world.wrong.lock().unwrap().clone();
    println!(
        "TEST client_soak seconds={seconds} {kinds} connections={} {words} events={events} wrong={} converged_ms={} \
         rss_kib_warm={warm} rss_kib_end={end} seed={seed}",
        world.proxy.accepted.load(SeqCst),
        wrong.len(),
        converged.as_millis(),
    );
    assert!(wrong.is_empty(), "seed {seed}, {} wrong at least: {wrong:#?}", wrong.len());
    if seconds >= JUDGED_SECONDS {
        assert!(end < warm + warm / 5 + GROWTH_KIB, "memory grows from {warm} to {end} KiB (seed {seed})");
    }
    assert!(faults.done.len() == KINDS.len() && events > 500 && counts["put"] > 200, "hardly anything happened");
    runtime.shutdown_timeout(PATIENCE);
}

fn start(dir: &Path, addr: &str) -> Process {
    let mut command = command();
    command.arg(addr).arg("--data-dir").arg(dir).args(["--durability", "sync", "--log-level", "info"]);
    Process::spawn(command)
}

fn epoch(server: &Process) -> String {
    let mut conn = server.connect();
    conn.send(r#"{"type":"Connect"}"#).json()["Base"]["epoch"].as_str().unwrap().into()
}

async fn connect(addr: &str) -> Client {
    let builder = Client::builder(addr).backoff(Duration::from_millis(5), Duration::from_millis(100));
    let builder = builder.heartbeat(Duration::from_millis(500)).connect_timeout(Duration::from_secs(1));
    let builder = builder.request_timeout(LIMIT);
    let started = Instant::now();
    loop {
        match builder.clone().connect().await {
            Ok(client) => return client,
            Err(error) => assert!(started.elapsed() < PATIENCE, "{error:#}"),
        }
    }
}

fn subscribe(runtime: &Runtime, world: &Arc<World>, client: &Client, dice: &mut Dice) -> Vec<Arc<Mutex<View>>> {
    let follow = |(n, pattern): (usize, String)| {
        let subscription = runtime.block_on(client.subscribe(&pattern)).unwrap();
        let view = Arc::new(Mutex::new(View::new(&pattern)));
        let slow = (n % 7 == 0).then(|| dice.split());
        drop(runtime.spawn(tasks::follow(Arc::clone(world), subscription, Arc::clone(&view), slow)));
        view
    };
    tasks::patterns().enumerate().map(follow).collect()
}

const KINDS: [&str; 6] = ["kills", "freezes", "stops", "cuts", "cuts_after_bytes", "away"];

/// What is done to the server and the connection.
struct Faults<'a> {
    dir: &'a Path,
    world: &'a World,
    addr: &'a str,
    seconds: u64,
    done: BTreeMap<&'static str, u64>,
}

impl Faults<'_> {
    /// One fault: each once, and then by chance.
    fn make(&mut self, turn: usize, server: &mut Process, dice: &mut Dice) {
        let kind = if turn < KINDS.len() { turn } else { dice.below(KINDS.len() as u64) as usize };
        let pause = |dice: &mut Dice, most| thread::sleep(Duration::from_millis(dice.below(most)));
        let proxy = &self.world.proxy;
        self.world.faults.fetch_add(1, SeqCst);
        match KINDS[kind] {
            "kills" => {
                server.child.kill().unwrap();
                server.wait();
                self.next_life(server, || pause(dice, 300));
            }
            "stops" => {
                server.signal("-TERM");
                let status = server.wait();
                if !status.success() {
                    self.world.wrong(format!("the server stopped with {status}, expected 0"));
                }
                self.next_life(server, || pause(dice, 300));
            }
            "freezes" => {
                self.world.frozen.store(true, SeqCst);
                server.signal("-STOP");
                let most = if self.seconds < JUDGED_SECONDS { 1_000 } else { 3_000 };
                thread::sleep(Duration::from_millis(most / 4 + dice.below(most)));
                server.signal("-CONT");
                self.world.frozen.store(false, SeqCst);
            }
            "cuts" => {
                for _ in 0..=dice.below(5) {
                    proxy.cut_now();
                    pause(dice, 60);
                }
            }
            "cuts_after_bytes" => {
                proxy.cut_after(1_000 + dice.below(60_000));
                proxy.cut_now();
                pause(dice, 600);
                proxy.cut_after(0);
            }
            _ => {
                proxy.lead_to("127.0.0.1:1"); // where there is no listener
                proxy.cut_now();
                pause(dice, 500);
                proxy.lead_to(self.addr);
            }
        }
        self.world.faults.fetch_add(1, SeqCst);
        *self.done.entry(KINDS[kind]).or_default() += 1;
    }

    fn next_life(&self, server: &mut Process, pause: impl FnOnce()) {
        self.world.lives.fetch_add(1, SeqCst);
        pause();
        *server = start(self.dir, self.addr);
    }
}

/// Deletes and puts while the client is away, waits until all its subscriptions know what the store holds, and compares
/// that with what was acknowledged.
fn converge(runtime: &Runtime, world: &World, (addr, other): (&str, &Client), views: &[Arc<Mutex<View>>]) -> Duration {
    world.proxy.cut_after(0);
    world.proxy.lead_to("127.0.0.1:1"); // where there is no listener
    world.proxy.cut_now();
    for number in (0..TASKS + OTHERS).step_by(2) {
        let deleted = runtime.block_on(other.delete(&format!("t{number}.*"))).unwrap();
        let keys: Vec<_> = world.ledger.keys().filter(|key| key.starts_with(&format!("t{number}."))).collect();
        assert!(deleted.count <= keys.len() as u64);
        let (number, value) = world.ledger.begin(keys[0]);
        let revision = runtime.block_on(other.put(keys[0], value)).unwrap().get();
        if let Err(wrong) = world.ledger.written(keys[0], number, revision) {
            world.wrong(format!("in the end, {}: {wrong}", keys[0]));
        }
    }
    world.proxy.lead_to(addr);
    let began = Instant::now();
    let store = runtime.block_on(other.get_all("*")).unwrap();
    for entry in &store {
        let (key, revision) = (entry.key.as_str(), entry.revision.get());
        if let Err(wrong) = world.ledger.seen(key, revision, &entry.value) {
            world.wrong(format!("in the end, {key}: {wrong}"));
        }
        if revision < world.ledger.floor(key) {
            let floor = world.ledger.floor(key);
            world.wrong(format!("in the end, {key} is at revision {revision}, expected {floor} at least"));
        }
    }
    for view in views {
        let pattern = view.lock().unwrap().pattern.clone();
        let covers = Pattern::new(&pattern).unwrap();
        let covered = store.iter().filter(|entry| covers.covers(&entry.key));
        let expected: BTreeMap<_, _> = covered.map(|entry| (entry.key.to_string(), entry.revision.get())).collect();
        let knows = |known: &BTreeMap<String, u64>| *known == expected;
        while began.elapsed() < 3 * PATIENCE && !knows(&view.lock().unwrap().known) {
            thread::sleep(Duration::from_millis(1));
        }
        let known = &view.lock().unwrap().known;
        if !knows(known) {
            let keys: Vec<_> = expected.keys().chain(known.keys()).collect();
            let differ = keys.iter().find(|key| expected.get(**key) != known.get(**key)).unwrap();
            let (known, expected) = (known.get(*differ), expected.get(*differ));
            world.wrong(format!("in the end, {pattern} knows {differ} at {known:?}, expected {expected:?}"));
        }
    }
    began.elapsed()
}

/// What this process, the client and its tasks, holds in memory.
fn rss_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// The mean of a part of the time.
fn mean(samples: &[(Duration, u64)], part: std::ops::Range<f64>) -> u64 {
    let end = samples.last().map_or(0.0, |(time, _)| time.as_secs_f64());
    let chosen: Vec<_> = samples
        .iter()
        .filter(|(time, _)| part.contains(&(time.as_secs_f64() / end * 0.999)))
        .map(|(_, kib)| kib)
        .collect();
    chosen.iter().copied().sum::<u64>() / (chosen.len() as u64).max(1)
}
