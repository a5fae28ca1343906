//! A history of clients and subscribers of three nodes in front of one engine, while nodes are cut off, stopped and started
//! anew, and the engine stands still, ends and comes back.
//!
//! [`record`] makes one: a test brings the engine and what disturbs it, as [`Site`]. [`Recorded::judge`] checks it. Writes and
//! conditions, if the engine has these, are linearizable over all nodes, and what has no answer may be done or not. Reads are per
//! node: never backwards, its own writes among them unless it says that it is stale, and nothing older than a client has [seen elsewhere](nkv_node::Handle::catch_up). Subscribers
//! are sent nothing old after something new, no delete that was none, and the last state in the end.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nkv_core::Pattern;
use nkv_node::{Deleted, Engine, Entry, ErrorKind, Event, GoneReason, Handle, Node, PutOptions, Revision, Seen};
use tokio::sync::watch::{Receiver, Sender};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::history::{Ask, Facts, History, Notice, Op, Outcome, State, Time, Value, Watch};
use super::{linear, watch};

/// How many nodes there are. An engine of this number is for one that is never disturbed, and reads the state in the end.
pub const NODES: usize = 3;
/// How many clients a node has at the beginning.
const CLIENTS: usize = 3;
const KEYS: [&str; 5] = ["a.h", "a.h.below", "b.h", "b.i", "alone"];
const PATTERNS: [&str; 3] = ["*", "a.h", "b.*"];
/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Before what could not be done is tried again.
const PAUSE: Duration = Duration::from_millis(5);

/// What goes wrong between the nodes and their engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disturbance {
    /// The connections of a node end, and it gets no others.
    Cut(usize),
    /// A node hears nothing from the engine; the other way round all passes.
    Deafen(usize),
    /// No node is cut off or deaf any more, nor any member.
    Heal,
    /// The engine, or one of its members, stands still.
    Stop,
    /// It goes on.
    Continue,
    /// The engine, or one of its members, is killed, and is there again with its data.
    Restart,
    /// A member of the engine and the others do not reach each other, until [`Heal`](Self::Heal): see [`Site::parts`].
    Part,
    /// The engine forgets how it came to its present state, where it can.
    Forget,
}

/// An engine, and what disturbs it.
#[expect(async_fn_in_trait, reason = "for tests, which wait for it where they are")]
pub trait Site {
    /// The engine.
    type Engine: Engine;

    /// An engine for the node of this number, which is disturbed as that one, or for another one, which is not.
    fn engine(&self, node: usize) -> Self::Engine;

    /// Whether there are members that can be parted.
    fn parts(&self) -> bool {
        false
    }

    /// Whether the engine decides writes of several callers in one step: they have one revision then.
    fn gathers(&self) -> bool {
        false
    }

    /// Does it.
    async fn disturb(&mut self, what: Disturbance);
}

/// Random numbers that can be had again. (Marsaglia's xorshift.)
struct Dice(u64);

impl Dice {
    fn of(seed: u64) -> Self {
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::try_from(self.below(of.len() as u64)).unwrap_or(0)]
    }

    fn ms(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }

    fn split(&mut self) -> Self {
        Dice::of(self.below(u64::MAX))
    }
}

/// `NKV_SEED`, or the one given; printed.
#[must_use]
pub fn seed(fixed: u64) -> u64 {
    let seed = std::env::var("NKV_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(fixed);
    println!("NKV_SEED={seed}");
    seed
}

/// `NKV_HISTORY_SECONDS`, or the seconds given.
#[must_use]
pub fn length(seconds: u64) -> Duration {
    let chosen = std::env::var("NKV_HISTORY_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(chosen.unwrap_or(seconds))
}

/// What a client asked, and of which node.
#[derive(Clone, Debug)]
struct Asked {
    op: Op,
    /// The life of the node.
    life: u64,
    /// The node said that it was behind, when it was asked.
    is_stale: bool,
    /// What the node had seen just before, or was to have seen.
    seen: u64,
}

/// A node from its start to its end.
#[derive(Clone, Debug)]
struct Life {
    number: u64,
    nkv: Handle,
}

/// What all share.
struct World {
    clock: Instant,
    stop: AtomicBool,
    values: AtomicU64,
    nodes: Vec<Sender<Option<Life>>>,
    /// What some client saw last of each key, for conditions.
    latest: Mutex<HashMap<&'static str, State>>,
    /// Whether the engine has conditions.
    has_conditions: AtomicBool,
    counts: Mutex<Counts>,
    wrong: Mutex<Vec<String>>,
}

/// What was answered.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    written: usize,
    read: usize,
    /// Conditions that held, and those that did not.
    met: usize,
    not_met: usize,
}

impl Counts {
    fn add(&mut self, op: &Op) {
        let is_written = matches!(op.outcome, Outcome::Written(_));
        self.written += usize::from(is_written);
        self.read += usize::from(matches!(op.outcome, Outcome::Found(..)));
        self.met += usize::from(op.expect.is_some() && is_written);
        self.not_met += usize::from(op.expect.is_some() && matches!(op.outcome, Outcome::Conflict(_)));
    }

    /// Whether there is something to judge.
    fn are_enough(&self, has_conditions: bool) -> bool {
        self.written > 200 && self.read > 200 && (!has_conditions || self.met > 20 && self.not_met > 20)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    fn now(&self) -> Time {
        u64::try_from(self.clock.elapsed().as_nanos()).unwrap_or(Time::MAX)
    }

    fn plan(&self, session: u64, dice: &mut Dice) -> (&'static str, Op) {
        let key = dice.one(&KEYS);
        let ask = match dice.below(100) {
            0..35 => Ask::Get,
            35..80 => Ask::Put(self.values.fetch_add(1, SeqCst)),
            _ => Ask::Delete,
        };
        let latest = lock(&self.latest).get(key).copied();
        // A delete asks for a revision that there is.
        let latest = latest.filter(|latest| ask != Ask::Delete || latest.is_some());
        let is_conditional = ask != Ask::Get && dice.below(2) == 0 && self.has_conditions.load(SeqCst);
        let expect = if is_conditional { latest } else { None };
        let (invoked, returned) = (self.now(), Time::MAX);
        (key, Op { session, key: key.into(), ask, expect, invoked, returned, outcome: Outcome::Unknown })
    }

    fn note(&self, key: &'static str, op: &Op) {
        if let Some(state) = op.leaves() {
            lock(&self.latest).insert(key, state);
        }
    }
}

fn value_of(entry: &Entry) -> Value {
    let text = String::from_utf8_lossy(&entry.value);
    text.parse().unwrap_or_else(|_| panic!("not a value that was put: {text}"))
}

async fn answer(nkv: &Handle, op: &Op) -> Outcome {
    let condition = |expect: State| expect.map_or(Revision::ZERO, |(at, _)| Revision::in_epoch(nkv.epoch(), at));
    let answer = match (op.ask, op.expect) {
        (Ask::Get, _) => nkv.get(&*op.key).await.map(|found| match found {
            Some(entry) => Outcome::Found(entry.revision.get(), value_of(&entry)),
            None => Outcome::Absent,
        }),
        (Ask::Put(value), expect) => {
            let mut options = PutOptions::default();
            options.if_revision = expect.map(condition);
            nkv.put_with(&*op.key, value.to_string(), options).await.map(|at| Outcome::Written(at.get()))
        }
        (Ask::Delete, expect) => {
            let deleted = match expect {
                Some(expect) => nkv.delete_if(&*op.key, condition(expect)).await,
                None => nkv.delete(&*op.key).await,
            };
            deleted.map(|Deleted { revision, .. }| revision.map_or(Outcome::Absent, |at| Outcome::Written(at.get())))
        }
    };
    answer.unwrap_or_else(|error| match error.kind() {
        ErrorKind::Conflict { revision } => Outcome::Conflict(revision.get()),
        ErrorKind::OutcomeUnknown => Outcome::Unknown,
        ErrorKind::Refused { status: 503 } | ErrorKind::Closed => Outcome::Refused,
        _ => panic!("an answer that was not expected to {op:?}: {error:?}"),
    })
}

/// A client, which asks for one thing after another, and moves to another node now and then.
async fn ask(world: Arc<World>, session: u64, mut at: usize, mut dice: Dice) -> Vec<Asked> {
    let (mut all, mut seen) = (Vec::new(), None::<Seen>);
    // What it has to be shown after it moved: by the life of a node.
    let mut shown = (0, 0);
    while !world.stop.load(SeqCst) {
        sleep(dice.ms(0, 6)).await;
        if dice.below(40) == 0 {
            at = dice.one(&[0, 1, 2]);
        }
        let Some(Life { number, nkv }) = world.nodes[at].borrow().clone() else {
            sleep(PAUSE).await;
            continue;
        };
        if let Some(wanted) = seen.filter(|_| shown.0 != number) {
            match timeout(PATIENCE, nkv.catch_up(wanted)).await {
                Ok(Ok(true)) => shown = (number, wanted.revision.get()),
                Ok(Ok(false)) => lock(&world.wrong).push(format!("the engine has not what a client saw: {wanted:?}")),
                Ok(Err(_)) => {
                    at = dice.one(&[0, 1, 2]);
                    continue;
                }
                Err(_) => panic!("a node does not say whether it has caught up"),
            }
        }
        let revision = nkv.revision().get();
        let (key, mut op) = world.plan(session, &mut dice);
        // Now: of what was answered before it is asked, the node has seen all, or says so.
        let is_stale = nkv.stale_for().is_some();
        op.outcome = timeout(PATIENCE, answer(&nkv, &op)).await.unwrap_or_else(|_| panic!("no answer to {op:?}"));
        let floor = if shown.0 == number { shown.1 } else { 0 };
        if op.outcome != Outcome::Unknown {
            op.returned = world.now();
        }
        world.note(key, &op);
        lock(&world.counts).add(&op);
        if let Some(revision) = op.revision()
            && seen.is_none_or(|seen| seen.revision.get() < revision)
        {
            seen = Some(Seen { epoch: nkv.epoch(), revision: nkv_core::Revision::new(revision) });
        }
        let is_refused = op.outcome == Outcome::Refused;
        all.push(Asked { op, life: number, is_stale, seen: revision.max(floor) });
        if is_refused {
            sleep(PAUSE).await;
        }
    }
    all
}

#[derive(Debug)]
struct Log {
    watch: Watch,
    known: BTreeMap<String, (u64, Value)>,
}

impl Log {
    fn note(&mut self, now: Time, notice: Notice) {
        watch::learn(&mut self.known, &notice);
        self.watch.notices.push((now, notice));
    }
}

/// A subscriber of a node, which subscribes again when the node is there again.
async fn follow(world: Arc<World>, mut node: Receiver<Option<Life>>, log: Arc<Mutex<Log>>, mut slow: Option<Dice>) {
    let pattern = lock(&log).watch.pattern.clone();
    let note = |notice| lock(&log).note(world.now(), notice);
    loop {
        let Ok(life) = node.wait_for(Option::is_some).await.map(|life| life.clone()) else { return };
        let Some(Life { nkv, .. }) = life else { continue };
        note(Notice::Connected);
        let Ok(mut events) = nkv.subscribe(&*pattern).await else {
            sleep(PAUSE).await;
            continue;
        };
        note(Notice::Hello);
        while let Some(event) = events.next().await {
            note(match event {
                Event::Update { entry, skipped, .. } => Notice::Update {
                    key: entry.key.to_string(),
                    revision: entry.revision.get(),
                    value: value_of(&entry),
                    skipped,
                },
                Event::Gone { key, revision, reason, skipped, .. } => {
                    let missed = reason == GoneReason::Missed;
                    Notice::Gone { key: key.to_string(), revision: revision.get(), missed, skipped }
                }
                Event::Synced { revision, epoch, .. } => {
                    Notice::Synced { revision: revision.get(), epoch: epoch.to_string() }
                }
                // Which epoch began is said by what follows.
                _ => continue,
            });
            if let Some(dice) = &mut slow {
                sleep(dice.ms(0, 30)).await;
            }
        }
        note(Notice::Lost);
        sleep(PAUSE).await;
    }
}

/// A history, ready to be judged.
#[derive(Debug)]
pub struct Recorded {
    history: History,
    asked: Vec<Asked>,
    wrong: Vec<String>,
    disturbances: BTreeMap<&'static str, usize>,
    has_conditions: bool,
    gathers: bool,
}

/// Records a history: disturbs the site for this long, heals it, and waits until all subscribers know the last state.
///
/// # Panics
///
/// Where something takes longer than half a minute, or is answered as nothing should be.
pub async fn record(mut site: impl Site, seed: u64, length: Duration) -> Recorded {
    let mut dice = Dice::of(seed);
    let world = Arc::new(World {
        clock: Instant::now(),
        stop: AtomicBool::new(false),
        values: AtomicU64::new(1),
        nodes: (0..NODES).map(|_| Sender::new(None)).collect(),
        latest: Mutex::default(),
        has_conditions: AtomicBool::new(false),
        counts: Mutex::default(),
        wrong: Mutex::default(),
    });
    let mut nodes = Nodes { running: Vec::new(), world: Arc::clone(&world), lives: 0 };
    for number in 0..NODES {
        let node = nodes.start(&site, number).await;
        nodes.running.push(Some(node));
    }
    // The first to come makes the engine's data; those who come meanwhile find them.
    for (number, node) in world.nodes.iter().enumerate() {
        let handle = node.borrow().clone().map(|life| life.nkv);
        let handle = handle.unwrap_or_else(|| panic!("node {number} is gone"));
        ready(&handle).await;
        world.has_conditions.store(handle.abilities().conditions, SeqCst);
    }
    let (logs, subscribers) = subscribe(&world, &mut dice);
    let clients: Vec<_> = (0..NODES * CLIENTS)
        .map(|n| tokio::spawn(ask(Arc::clone(&world), n as u64, n % NODES, dice.split())))
        .collect();
    let disturbances = disturb(&mut site, &mut nodes, &mut dice, length).await;
    // What is done once all is well; on a busy machine that is most of it.
    sleep(Duration::from_millis(500)).await;
    let until = Instant::now() + PATIENCE;
    while !lock(&world.counts).are_enough(world.has_conditions.load(SeqCst)) && Instant::now() < until {
        sleep(Duration::from_millis(50)).await;
    }
    world.stop.store(true, SeqCst);
    let mut asked = Vec::new();
    for client in clients {
        let done = timeout(PATIENCE, client).await.unwrap_or_else(|_| panic!("a client does not stop"));
        asked.extend(done.unwrap_or_else(|error| panic!("a client: {error}")));
    }
    let last = Node::builder().engine(site.engine(NODES)).start().await.unwrap_or_else(|error| panic!("{error}"));
    let reader = last.handle();
    ready(&reader).await;
    let (store, reads) = converge(&world, &reader, &logs).await;
    let mut history = History { epoch: reader.epoch().to_string(), store, ..History::default() };
    subscribers.iter().for_each(JoinHandle::abort);
    history.watches = logs.iter().map(|log| lock(log).watch.clone()).collect();
    history.ops = asked.iter().map(|asked| asked.op.clone()).chain(reads).collect();
    for node in nodes.running.into_iter().flatten().chain([last]) {
        timeout(PATIENCE, node.shutdown()).await.unwrap_or_else(|_| panic!("a node does not stop")).unwrap_or_default();
    }
    let wrong = std::mem::take(&mut *lock(&world.wrong));
    let has_conditions = world.has_conditions.load(SeqCst);
    Recorded { history, asked, wrong, disturbances, has_conditions, gathers: site.gathers() }
}

async fn ready(nkv: &Handle) {
    let is_ready = async {
        while nkv.health().await.is_err() {
            sleep(PAUSE).await;
        }
    };
    timeout(PATIENCE, is_ready).await.unwrap_or_else(|_| panic!("the engine is not in reach of a node"));
}

struct Nodes {
    running: Vec<Option<Node>>,
    world: Arc<World>,
    lives: u64,
}

impl Nodes {
    async fn start(&mut self, site: &impl Site, number: usize) -> Node {
        let node = Node::builder().engine(site.engine(number)).start().await;
        let node = node.unwrap_or_else(|error| panic!("a node does not start: {error}"));
        self.lives += 1;
        self.world.nodes[number].send_replace(Some(Life { number: self.lives, nkv: node.handle() }));
        node
    }

    async fn stop(&mut self, number: usize, is_sudden: bool) {
        self.world.nodes[number].send_replace(None);
        match self.running[number].take() {
            Some(node) if is_sudden => drop(node),
            Some(node) => {
                let done = timeout(PATIENCE, node.shutdown()).await;
                done.unwrap_or_else(|_| panic!("a node does not stop")).unwrap_or_else(|error| panic!("{error}"));
            }
            None => {}
        }
    }
}

type Logs = Vec<Arc<Mutex<Log>>>;

/// On each node one for each pattern, and a slow one for all keys.
fn subscribe(world: &Arc<World>, dice: &mut Dice) -> (Logs, Vec<JoinHandle<()>>) {
    let (mut logs, mut tasks) = (Vec::new(), Vec::new());
    for (number, node) in world.nodes.iter().enumerate() {
        for (pattern, is_slow) in PATTERNS.iter().map(|pattern| (pattern, false)).chain([(&"*", true)]) {
            let name = format!("{}subscriber of node {number}", if is_slow { "slow " } else { "" });
            let pattern = (*pattern).to_owned();
            let watch = Watch { name, pattern, library: false, behind_engine: true, notices: Vec::new() };
            let log = Arc::new(Mutex::new(Log { watch, known: BTreeMap::new() }));
            logs.push(Arc::clone(&log));
            let slow = is_slow.then(|| dice.split());
            tasks.push(tokio::spawn(follow(Arc::clone(world), node.subscribe(), log, slow)));
        }
    }
    (logs, tasks)
}

/// Disturbs for this long, and counts what it did.
async fn disturb(
    site: &mut impl Site,
    nodes: &mut Nodes,
    dice: &mut Dice,
    length: Duration,
) -> BTreeMap<&'static str, usize> {
    let (began, mut counts) = (Instant::now(), BTreeMap::new());
    // Each at least once: in an order that the dice give.
    let mut bag = Vec::new();
    while began.elapsed() < length {
        if bag.is_empty() {
            bag.extend(["cut", "deaf", "still", "restart", "node", "node", "forget"]);
            bag.extend(site.parts().then_some("part"));
        }
        let what = bag.swap_remove(usize::try_from(dice.below(bag.len() as u64)).unwrap_or(0));
        *counts.entry(what).or_default() += 1;
        let node = dice.one(&[0, 1, 2]);
        match what {
            "cut" => {
                site.disturb(Disturbance::Cut(node)).await;
                sleep(dice.ms(20, 800)).await;
            }
            "deaf" => {
                site.disturb(Disturbance::Deafen(node)).await;
                sleep(dice.ms(20, 2_500)).await;
            }
            "still" => {
                site.disturb(Disturbance::Stop).await;
                sleep(dice.ms(20, 2_500)).await;
                site.disturb(Disturbance::Continue).await;
            }
            "restart" => site.disturb(Disturbance::Restart).await,
            "part" => {
                site.disturb(Disturbance::Part).await;
                sleep(dice.ms(500, 4_000)).await;
            }
            "forget" => {
                site.disturb(Disturbance::Cut(node)).await;
                sleep(dice.ms(100, 300)).await;
                site.disturb(Disturbance::Forget).await;
            }
            _ => {
                nodes.stop(node, dice.below(2) == 0).await;
                sleep(dice.ms(0, 200)).await;
                nodes.running[node] = Some(nodes.start(site, node).await);
            }
        }
        // Else the next one comes on top of it.
        if dice.below(3) > 0 {
            site.disturb(Disturbance::Heal).await;
            sleep(dice.ms(200, 1_000)).await;
        }
    }
    site.disturb(Disturbance::Heal).await;
    for node in &nodes.world.nodes {
        let life = node.borrow().clone();
        ready(&life.unwrap_or_else(|| panic!("a node is gone")).nkv).await;
    }
    counts
}

/// Waits until all subscribers know what there is in the end; who does not is left to the check. Also that state as reads.
async fn converge(world: &World, reader: &Handle, logs: &Logs) -> (BTreeMap<String, (u64, Value)>, Vec<Op>) {
    let until = Instant::now() + PATIENCE;
    loop {
        let invoked = world.now();
        let entries = reader.get_all(Pattern::All).await.unwrap_or_else(|error| panic!("the last read: {error}"));
        let returned = world.now();
        let store: BTreeMap<_, _> =
            entries.iter().map(|entry| (entry.key.to_string(), (entry.revision.get(), value_of(entry)))).collect();
        let knows = |log: &Arc<Mutex<Log>>| {
            let log = lock(log);
            log.known == watch::covered(&store, &log.watch.pattern)
        };
        if !logs.iter().all(knows) && Instant::now() < until {
            sleep(Duration::from_millis(50)).await;
            continue;
        }
        let read = |key: &&str| {
            let found = store.get(*key).map_or(Outcome::Absent, |(revision, value)| Outcome::Found(*revision, *value));
            let (session, key) = (u64::MAX, (*key).to_owned());
            Op { session, key, ask: Ask::Get, expect: None, invoked, returned, outcome: found }
        };
        let reads = KEYS.iter().map(read).collect();
        return (store, reads);
    }
}

impl Recorded {
    /// Checks all of it, prints the figures, and panics with what is wrong.
    ///
    /// # Panics
    ///
    /// Where the history is one that the promises do not allow, or where hardly anything happened.
    pub fn judge(self, name: &str) {
        let wrong = self.wrong(name);
        assert!(wrong.is_empty(), "{} are wrong, the first: {:#?}", wrong.len(), &wrong[..wrong.len().min(20)]);
        let mut counts = Counts::default();
        self.history.ops.iter().for_each(|op| counts.add(op));
        assert!(counts.are_enough(self.has_conditions), "hardly anything happened: {counts:?}");
    }

    fn wrong(&self, name: &str) -> Vec<String> {
        let history = &self.history;
        let (mut facts, mut wrong) = Facts::gather(&history.ops, self.gathers);
        wrong.extend(self.wrong.iter().cloned());
        let real = watch::real(history, &mut facts);
        wrong.extend(facts.apart());
        wrong.extend(apart_but_for_gathered(&self.asked));
        let decided = decided(history, &facts);
        let search = linear::by_search(&decided);
        assert_eq!(search.given_up, 0, "too many possibilities");
        let each = |check: &dyn Fn(&Watch) -> Vec<String>| history.watches.iter().flat_map(check).collect();
        let checks: [(&str, Vec<String>); 9] = [
            ("linearizable by revision", linear::by_revision(&decided, self.gathers)),
            ("linearizable by search", search.wrong),
            ("reads", reads(&self.asked, &facts)),
            ("filter", each(&watch::filter)),
            ("ordered", each(&watch::ordered)),
            ("unique", each(&watch::unique)),
            ("real", real),
            ("synced", each(&|watch| watch::synced(watch, history, &facts))),
            ("converged", watch::converged(history)),
        ];
        for (check, found) in checks {
            wrong.extend(found.into_iter().map(|found| format!("{check}: {found}")));
        }
        let count = |is: fn(&Op) -> bool| history.ops.iter().filter(|op| is(op)).count();
        let notice = || history.watches.iter().flat_map(|watch| &watch.notices).map(|(_, notice)| notice);
        println!(
            "TEST history {name} operations={} written={} conflicts={} reads={} unknown={} refused={} events={} windows={} \
             disturbances={:?} violations={}",
            history.ops.len(),
            count(|op| matches!(op.outcome, Outcome::Written(_))),
            count(|op| matches!(op.outcome, Outcome::Conflict(_))),
            count(|op| op.ask == Ask::Get),
            count(|op| op.outcome == Outcome::Unknown),
            count(|op| op.outcome == Outcome::Refused),
            notice().filter(|notice| matches!(notice, Notice::Update { .. } | Notice::Gone { .. })).count(),
            search.windows,
            self.disturbances,
            wrong.len(),
        );
        wrong
    }
}

/// Of writes that have one revision, each is plain, and all are of one node: that has gathered them.
fn apart_but_for_gathered(asked: &[Asked]) -> Vec<String> {
    let (mut wrong, mut first) = (Vec::new(), HashMap::<u64, &Asked>::new());
    for asked in asked {
        let Outcome::Written(revision) = asked.op.outcome else { continue };
        let other = *first.entry(revision).or_insert(asked);
        let is_gathered = other.life == asked.life && other.op.expect.is_none() && asked.op.expect.is_none();
        if !std::ptr::eq(other, asked) && !is_gathered {
            wrong.push(format!("revision {revision} was given twice: to {:?} and {:?}", other.op, asked.op));
        }
    }
    wrong
}

/// What the engine decides, and the reads in the end. A put without an answer that some client saw was done by then.
fn decided(history: &History, facts: &Facts<'_>) -> Vec<Op> {
    let mut seen = HashMap::<Value, Time>::new();
    let notice = history.watches.iter().flat_map(|watch| &watch.notices).filter_map(|(time, notice)| match notice {
        Notice::Update { value, .. } => Some((*value, *time)),
        _ => None,
    });
    let read = history.ops.iter().filter_map(|op| match op.outcome {
        Outcome::Found(_, value) => Some((value, op.returned)),
        _ => None,
    });
    for (value, time) in notice.chain(read) {
        let first = seen.entry(value).or_insert(time);
        *first = time.min(*first);
    }
    let at: HashMap<Value, u64> =
        facts.changes.iter().filter_map(|((revision, _), value)| Some(((*value)?, *revision))).collect();
    let mut decided: Vec<Op> =
        history.ops.iter().filter(|op| op.ask != Ask::Get || op.session == u64::MAX).cloned().collect();
    for op in decided.iter_mut().filter(|op| op.is_unknown()) {
        if let Some(value) = op.put()
            && let (Some(time), Some(revision)) = (seen.get(&value), at.get(&value))
        {
            (op.returned, op.outcome) = (*time, Outcome::Written(*revision));
            // It may have been done after what its client asked for next.
            op.session = u64::MAX - value;
        }
    }
    decided
}

/// Reads of a node: not below what it has read, has answered itself, says that it has seen, or was asked to catch up with.
fn reads(asked: &[Asked], facts: &Facts<'_>) -> Vec<String> {
    #[derive(Clone, Copy, Default)]
    struct Floor {
        read: u64,
        own: u64,
    }
    let mut moments = Vec::new();
    for (n, asked) in asked.iter().enumerate().filter(|(_, asked)| !asked.op.is_unknown()) {
        moments.extend([(asked.op.invoked, false, n), (asked.op.returned, true, n)]);
    }
    moments.sort_unstable();
    let (mut wrong, mut began) = (Vec::new(), vec![0; asked.len()]);
    let mut floors = HashMap::<(u64, &str), Floor>::new();
    for (_, is_return, n) in moments {
        let Asked { op, life, is_stale, seen } = &asked[n];
        let floor = floors.entry((*life, &op.key)).or_default();
        if !is_return {
            let own = if *is_stale { 0 } else { floor.own };
            let was = facts.last(&op.key, *seen).map_or(0, |(revision, _)| revision);
            began[n] = floor.read.max(own).max(was);
            continue;
        }
        match (op.ask, op.outcome) {
            (Ask::Get, Outcome::Found(revision, _)) => {
                if revision < began[n] {
                    wrong.push(format!("node {life} had {} before: {op:?}", began[n]));
                }
                floor.read = floor.read.max(revision);
            }
            (Ask::Get, Outcome::Absent) => {
                let at = began[n];
                let was = facts.by_key.get(op.key.as_str()).and_then(|changes| changes.get(&at)).copied().flatten();
                if was.is_none() {
                    floor.read = floor.read.max(at);
                } else if facts.may_be_gone(&op.key, at, op.returned) {
                    // Whatever comes next is above it.
                    floor.read = floor.read.max(at + 1);
                } else {
                    wrong.push(format!("node {life} had {at} before, which no client deleted: {op:?}"));
                }
            }
            (_, Outcome::Written(_) | Outcome::Conflict(_)) => {
                floor.own = op.revision().unwrap_or(0).max(floor.own);
            }
            _ => {}
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(life: u64, (invoked, returned): (Time, Time), ask: Ask, outcome: Outcome) -> Asked {
        let op = Op { session: 1, key: "k".into(), ask, expect: None, invoked, returned, outcome };
        Asked { op, life, is_stale: false, seen: 0 }
    }

    fn judge(asked: &[Asked]) -> usize {
        let ops: Vec<Op> = asked.iter().map(|asked| asked.op.clone()).collect();
        let (facts, wrong) = Facts::gather(&ops, false);
        assert!(wrong.is_empty(), "{wrong:?}");
        reads(asked, &facts).len()
    }

    #[test]
    fn reads_of_a_node_see_its_own_writes_and_never_go_back_and_those_of_another_may_be_behind() {
        let history = || {
            vec![
                asked(1, (1, 2), Ask::Put(7), Outcome::Written(1)),
                asked(1, (3, 4), Ask::Put(8), Outcome::Written(2)),
                asked(1, (5, 6), Ask::Get, Outcome::Found(2, 8)),
                asked(2, (5, 6), Ask::Get, Outcome::Absent),
                asked(2, (7, 8), Ask::Get, Outcome::Found(1, 7)),
                asked(1, (9, 12), Ask::Delete, Outcome::Written(3)),
                asked(2, (10, 11), Ask::Get, Outcome::Absent),
                asked(1, (13, 14), Ask::Get, Outcome::Absent),
                asked(1, (15, 16), Ask::Put(9), Outcome::Conflict(3)),
            ]
        };
        let with = |mistake: &dyn Fn(&mut Vec<Asked>)| {
            let mut history = history();
            mistake(&mut history);
            judge(&history)
        };
        assert_eq!(with(&|_| {}), 0);
        // Not its own write, as a value and as a delete; but a node that says it is behind may be.
        assert_eq!(with(&|asked| asked[2].op.outcome = Outcome::Found(1, 7)), 1);
        assert_eq!(with(&|asked| asked[2].op.outcome = Outcome::Absent), 1);
        assert_eq!(with(&|asked| asked[7].op.outcome = Outcome::Found(2, 8)), 1);
        assert_eq!(
            with(&|asked| {
                asked[2].op.outcome = Outcome::Found(1, 7);
                asked[2].is_stale = true;
            }),
            0
        );
        // Back, also behind an absence; and less than it has said that it has, or was asked for.
        let again = |time: Time, value| asked(2, (time, time + 1), Ask::Get, Outcome::Found(value - 6, value));
        assert_eq!(with(&|asked| asked.push(again(20, 7))), 1);
        assert_eq!(with(&|asked| asked.push(again(20, 8))), 0);
        assert_eq!(with(&|asked| asked[4].seen = 2), 1);
        // Gone, and no client deleted it.
        assert_eq!(with(&|asked| drop(asked.remove(5))), 2);
    }

    #[test]
    fn writes_of_one_revision_are_plain_and_of_one_node() {
        let put = |life, value| asked(life, (1, 2), Ask::Put(value), Outcome::Written(1));
        assert_eq!(apart_but_for_gathered(&[put(1, 7), put(1, 8)]).len(), 0);
        assert_eq!(apart_but_for_gathered(&[put(1, 7), put(2, 8)]).len(), 1);
        let mut conditional = put(1, 8);
        conditional.op.expect = Some(None);
        assert_eq!(apart_but_for_gathered(&[put(1, 7), conditional]).len(), 1);
    }
}
