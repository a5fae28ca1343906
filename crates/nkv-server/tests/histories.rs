//! One history of many clients and subscribers around a real server that is killed again and again, and the checks that
//! it must pass.

#![cfg(feature = "cli")]
#![allow(clippy::unwrap_used, dead_code, unreachable_pub, missing_docs)]

#[path = "../../nkv-client/tests/common/proxy.rs"]
mod proxy;
#[path = "histories/run.rs"]
mod run;
mod support;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use history::{Facts, History, Notice, Outcome, Restart};
use nkv_core::mailbox::{Inbox, Item, mailbox};
use nkv_core::{EventKind, Key, Pattern};
use nkv_node::{AttachOptions, Attached};
use nkv_testkit::histories::{history, linear, watch};
use proxy::{Dice, Proxy};
use run::{Log, Subscriber, World};
use support::process::{Process, command};
use support::{PATIENCE, TestServer, eventually};
use tokio::runtime::Runtime;

/// How many requests each client sends at a time.
const DEPTHS: [u64; 8] = [1, 1, 1, 1, 2, 3, 4, 6];
const PATTERNS: [&str; 5] = ["a.h0", "b.h1", "a.*", "b.*", "*"];
/// How long subscribers behind a proxy stay connected, at most.
const CUT_WITHIN: Duration = Duration::from_millis(500);

/// `NKV_SEED` chooses what is asked and when connections are cut; in which order threads and system calls come to run
/// varies all the same, so that a seed finds the same kind of history and not the same history.
/// `NKV_HISTORY_SECONDS` makes it longer.
#[test]
fn clients_and_subscribers_of_a_server_that_is_killed_agree_on_one_history() {
    let seed = proxy::seed();
    println!("NKV_SEED={seed}");
    let seconds: u64 = std::env::var("NKV_HISTORY_SECONDS").map_or(6, |seconds| seconds.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let (history, convergence) = record(dir.path(), seed, seconds);

    let (mut facts, mut violations) = Facts::gather(&history.ops, false);
    let real = watch::real(&history, &mut facts);
    violations.extend(facts.apart());
    violations.extend(linear::by_revision(&history.ops, false));
    let search = linear::by_search(&history.ops);
    violations.extend(search.wrong);
    let each = |check: &dyn Fn(&history::Watch) -> Vec<String>| history.watches.iter().flat_map(check).collect();
    let validators: [(&str, Vec<String>); 7] = [
        ("filter", each(&watch::filter)),
        ("ordered", each(&watch::ordered)),
        ("unique", each(&watch::unique)),
        ("real", real),
        ("durable", watch::durable(&history)),
        ("synced", each(&|watch| watch::synced(watch, &history, &facts))),
        ("converged", watch::converged(&history)),
    ];
    let figures: Vec<String> = validators.iter().map(|(name, wrong)| format!("{name}={}", wrong.len())).collect();
    violations.extend(
        validators.into_iter().flat_map(|(name, wrong)| wrong.into_iter().map(move |w| format!("{name}: {w}"))),
    );

    let notices = history.watches.iter().flat_map(|watch| &watch.notices);
    let (mut events, mut conflated) = (0, 0);
    for (_, notice) in notices {
        if let Notice::Update { skipped, .. } | Notice::Gone { skipped, .. } = notice {
            (events, conflated) = (events + 1, conflated + skipped);
        }
    }
    let percentile = |part: usize| convergence[(convergence.len() - 1) * part / 100].as_millis();
    let count = |outcome| history.ops.iter().filter(|op| op.outcome == outcome).count();
    println!(
        "TEST histories operations={} unknown={} refused={} kills={} events={events} conflated={conflated} windows={} given_up={} \
         violations={} convergence_ms_p50={} p99={} max={} seed={seed}",
        history.ops.len(),
        count(Outcome::Unknown),
        count(Outcome::Refused),
        history.restarts.len(),
        search.windows,
        search.given_up,
        violations.len(),
        percentile(50),
        percentile(99),
        percentile(100),
    );
    println!("TEST watch_validators {} watches={}", figures.join(" "), history.watches.len());
    violations.truncate(20);
    assert!(violations.is_empty(), "{violations:#?}");
    assert_eq!(search.given_up, 0, "too many possibilities");
    assert!(history.ops.iter().filter(|op| op.revision().is_some()).count() > 500, "hardly anything happened");
    let synced = history
        .watches
        .iter()
        .all(|watch| watch.notices.iter().any(|(_, notice)| matches!(notice, Notice::Synced { .. })));
    assert!(synced && events > 1_000, "hardly anything was notified");
}

/// Makes a history, and says how long each subscriber took to know what the store held in the end.
fn record(dir: &Path, seed: u64, seconds: u64) -> (History, Vec<Duration>) {
    let mut dice = Dice::of(seed);
    // Nothing connects from this address, so no client can take the port while the server is away.
    let mut server = start(dir, "127.0.0.2:0");
    let world = World::new(&server.addr);
    let mut history = History { epoch: epoch(&server), ..History::default() };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let proxy = runtime.block_on(Proxy::to(&world.addr, dice.split()));
    proxy.cut_within(CUT_WITHIN);
    let logs = subscribe(&runtime, &world, &proxy.addr, &mut dice);
    let clients: Vec<_> = DEPTHS
        .iter()
        .enumerate()
        .map(|(n, depth)| runtime.spawn(run::ask(Arc::clone(&world), format!("client-{n}"), *depth, dice.split())))
        .collect();

    let kills = seconds + 1;
    for _ in 0..kills {
        thread::sleep(Duration::from_millis(seconds * 1_000 / (kills + 1) - 250 + dice.below(300)));
        history.restarts.push(restart(&mut server, dir, &world, dice.below(3) > 0));
    }
    thread::sleep(Duration::from_millis(700));
    world.stop.store(true, SeqCst);
    for client in clients {
        let done = runtime.block_on(async { tokio::time::timeout(PATIENCE, client).await });
        history.ops.extend(done.expect("a client does not stop").unwrap());
    }
    world.hurry.store(true, SeqCst);
    proxy.cut_within(Duration::ZERO);
    let (ended, last_cut) = (Instant::now(), world.now());
    proxy.cut_now();
    history.store = stored(&server);
    let cut = |log: &Log| log.watch.name.contains(&proxy.addr);
    let is_new = |log: &Log| !cut(log) || log.connected > last_cut;
    let convergence = converge(&logs, ended, |log| {
        log.synced && is_new(log) && log.known == watch::covered(&history.store, &log.watch.pattern)
    });
    runtime.shutdown_timeout(PATIENCE);
    history.watches = logs.iter().map(|log| log.lock().unwrap().watch.clone()).collect();
    (history, convergence)
}

fn start(dir: &Path, addr: &str) -> Process {
    let mut shell = std::process::Command::new("sh");
    // A file that may not grow is to be an error, not a signal.
    shell.args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_nkv-server")]);
    shell.arg(addr).arg("--data-dir").arg(dir).args(["--durability", "sync", "--log-level", "info"]);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("NKV_")) {
        shell.env_remove(name);
    }
    shell.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    Process::spawn(shell)
}

fn epoch(server: &Process) -> String {
    let mut conn = server.connect();
    conn.send(r#"{"type":"Connect"}"#).json()["Base"]["epoch"].as_str().unwrap().into()
}

/// Twenty subscribers: half of them on raw connections, half of them through the library; half of either through the
/// proxy; some of them slow.
fn subscribe(runtime: &Runtime, world: &Arc<World>, proxy: &str, dice: &mut Dice) -> Vec<Arc<Mutex<Log>>> {
    let mut logs = Vec::new();
    for addr in [world.addr.as_str(), proxy] {
        for library in [false, true] {
            // Subscriptions of one client share its connection.
            let client = library.then(|| runtime.block_on(run::connect(addr.into())));
            for (n, pattern) in PATTERNS.iter().enumerate() {
                let kind = if library { "library" } else { "raw" };
                let log = Log::new(format!("{kind}-{n}-at-{addr}"), pattern, library);
                logs.push(Arc::clone(&log));
                let (world, addr, slow) = (Arc::clone(world), addr.to_owned(), n % 2 == 0);
                let subscriber = Subscriber { world, addr, slow, log, dice: dice.split() };
                match &client {
                    Some(client) => drop(runtime.spawn(subscriber.subscribe(client.clone()))),
                    None => drop(runtime.spawn(subscriber.follow())),
                }
            }
        }
    }
    logs
}

/// Kills the server, at once or after its disk has refused something, and starts it again at its address.
fn restart(server: &mut Process, dir: &Path, world: &World, refuse: bool) -> Restart {
    let killed = world.now();
    if refuse {
        // What was notified or answered before it was stored is never stored now.
        world.refused.store(false, SeqCst);
        let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
        let pid = rustix::process::Pid::from_child(&server.child);
        rustix::process::prlimit(Some(pid), rustix::process::Resource::Fsize, none).unwrap();
        eventually("a write is refused", || world.refused.load(SeqCst));
    }
    server.child.kill().unwrap();
    let status = server.wait();
    assert!(status.code().is_none(), "it was to be killed: {status}");
    let output = command().arg("check").arg("--data-dir").arg(dir).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let word = |name: &str| said.split([' ', ',', '\n']).skip_while(|word| *word != name).nth(1);
    let recovered = word("revision").and_then(|revision| revision.parse().ok());
    let (Some(recovered), Some(epoch)) = (recovered, word("epoch")) else { panic!("{said}") };
    let restart = Restart { killed, at: world.now(), recovered, epoch: epoch.into() };
    *server = start(dir, &world.addr);
    restart
}

fn stored(server: &Process) -> BTreeMap<String, (u64, u64)> {
    let mut conn = server.connect();
    conn.hello("reader", "text");
    let got = conn.send(r#"{"type":"Get","key":"*"}"#).json();
    let list = |name: &str| got["Get"][name].as_array().unwrap().clone();
    let entries = list("keys").into_iter().zip(list("revisions")).zip(list("data"));
    let entry = |((key, revision), value): ((serde_json::Value, serde_json::Value), serde_json::Value)| {
        (key.as_str().unwrap().to_owned(), (revision.as_u64().unwrap(), run::value_of(value.as_str().unwrap())))
    };
    entries.map(entry).collect()
}

/// Waits until all know what they are to know; one that never does is left to the validator. Sorted.
fn converge(logs: &[Arc<Mutex<Log>>], ended: Instant, knows: impl Fn(&Log) -> bool) -> Vec<Duration> {
    let mut took = vec![None; logs.len()];
    while took.contains(&None) && ended.elapsed() < PATIENCE {
        for (log, took) in logs.iter().zip(&mut took).filter(|(_, took)| took.is_none()) {
            if knows(&log.lock().unwrap()) {
                *took = Some(ended.elapsed());
            }
        }
        thread::sleep(Duration::from_millis(1));
    }
    let mut took: Vec<_> = took.into_iter().map(|took| took.unwrap_or(PATIENCE)).collect();
    took.sort_unstable();
    took
}

/// One writes as fast as it is answered; another subscribes and unsubscribes meanwhile, by the handle: sockets would
/// leave little of the time to what is tested. The keys below make the snapshot, and so the moment in question, longer.
#[test]
fn a_subscription_begins_with_what_was_acknowledged_before_it_and_misses_nothing_after_it() {
    const ROUNDS: u64 = 5_000;
    let server = TestServer::start();
    let (nkv, runtime) = (server.handle.clone(), &server.runtime);
    let put = |key: &Key| {
        let put = nkv.put(key, "x");
        let put = runtime.block_on(async { tokio::time::timeout(PATIENCE, put).await });
        put.expect("a put is not done").unwrap().get()
    };
    let raced = Key::new("race").unwrap();
    (0..100).for_each(|n| _ = put(&Key::new(&format!("race.{n}")).unwrap()));
    let (newest, stop) = (AtomicU64::new(put(&raced)), AtomicBool::new(false));
    let subscribe = || -> (Attached, Inbox) {
        let (post, inbox) = mailbox();
        let options = AttachOptions::default().with_client_uuid("racer");
        (nkv.attach(Pattern::Key(raced.clone()), Box::new(post), &options).unwrap(), inbox)
    };
    let next = |inbox: &Inbox| match inbox.take_timeout(PATIENCE).expect("no event comes") {
        Item::Event { event, skipped } => (event, skipped),
        Item::Own(never) => match never {},
    };
    let (mut stale, mut gaps, mut last) = (0, 0, 0);
    let mut race = |is_enough: &dyn Fn(u64, u64) -> bool| {
        let before = last.max(newest.load(SeqCst));
        let (_attached, inbox) = subscribe();
        let (began, _) = next(&inbox);
        assert!(matches!(began.kind(), EventKind::Began(_)), "{began:?}");
        let (first, _) = next(&inbox);
        let EventKind::Snapshot(snapshot) = first.kind() else { panic!("{first:?}") };
        let revision = snapshot.revision.get();
        stale += u64::from(revision < before || snapshot.records.get(0).unwrap().revision.get() != revision);
        last = revision;
        while !is_enough(revision, last) {
            let (event, skipped) = next(&inbox);
            let EventKind::Change(change) = event.kind() else { panic!("{event:?}") };
            gaps += u64::from(change.revision.get() != last + 1 + skipped);
            last = change.revision.get();
        }
    };
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            while !stop.load(SeqCst) {
                newest.store(put(&raced), SeqCst);
            }
        });
        // However this ends, the writer must, or the failure is never reported.
        let _stop = StopOnDrop(&stop);
        // A change at least, to see whether one is missing between it and the snapshot.
        (0..ROUNDS).for_each(|_| race(&|revision, last| last > revision));
        // And the last of all.
        race(&|_, last| {
            stop.store(true, SeqCst);
            eventually("the writer ends", || writer.is_finished());
            last == newest.load(SeqCst)
        });
    });
    println!("TEST subscribe_race rounds={ROUNDS} puts={last} stale={stale} gaps={gaps}");
    assert_eq!((stale, gaps), (0, 0));
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}
