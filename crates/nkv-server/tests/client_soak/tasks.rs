//! The users of the client: tasks that write and read and know what must be true, and readers of subscriptions.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nkv_client::Subscription;
use nkv_client::{Client, ConnectionState, Entry, Error, ErrorKind, Event, GoneReason, Pattern, PutOptions, Revision};
use tokio::time::{Instant, sleep, timeout};

use crate::ledger::Ledger;
use crate::proxy::{Dice, Proxy};

/// Tasks of the client, and of another one that no proxy cuts: it writes while the first is away.
pub const TASKS: usize = 100;
pub const OTHERS: usize = 4;
/// Keys that one task alone writes.
const OWN: usize = 3;
/// Keys that all write, and none deletes.
const SHARED: u64 = 8;
/// What each call of the client is given, and what a slow machine is given besides.
pub const LIMIT: Duration = Duration::from_secs(10);
const SLACK: Duration = Duration::from_secs(20);
/// How many failures are kept.
const WRONG_MAX: usize = 30;

/// What all share.
pub struct World {
    pub ledger: Ledger,
    pub proxy: Proxy,
    /// The epoch of the server's data: it keeps them.
    pub epoch: String,
    pub stop: AtomicBool,
    /// How many lives of the server have ended: what was sent to it before takes no effect any more.
    pub lives: AtomicU64,
    /// How many faults have begun or ended, and whether the server stands still now.
    pub faults: AtomicU64,
    pub frozen: AtomicBool,
    pub counts: Mutex<BTreeMap<String, u64>>,
    pub wrong: Mutex<Vec<String>>,
}

/// An error of a call.
struct Failure {
    kind: ErrorKind,
    text: String,
}

/// A moment, to say whether anything was done to the connection since.
#[derive(Clone, Copy)]
struct Mark {
    faults: u64,
    ended: u64,
    frozen: bool,
}

pub fn keys() -> impl Iterator<Item = String> {
    let own = (0..TASKS + OTHERS).flat_map(|task| (0..OWN).map(move |n| format!("t{task}.k{n}")));
    own.chain((0..SHARED).map(|n| format!("shared.s{n}")))
}

/// The patterns of a hundred subscriptions: some alike, some that overlap.
pub fn patterns() -> impl Iterator<Item = String> {
    (0..100).map(|n| match n % 10 {
        0 => "*".into(),
        1 => "shared".into(),
        2 => format!("t{}", TASKS + n / 10 % OTHERS),
        3..=5 => format!("t{n}"),
        6 | 7 => format!("t{n}.*"),
        8 => format!("t{n}.k1"),
        _ => format!("shared.s{}", n / 10 % SHARED as usize),
    })
}

impl World {
    pub fn wrong(&self, what: String) {
        eprintln!("WRONG: {what}");
        let mut wrong = self.wrong.lock().unwrap();
        if wrong.len() < WRONG_MAX {
            wrong.push(what);
        }
    }

    fn check(&self, who: &str, result: Result<(), String>) {
        if let Err(wrong) = result {
            self.wrong(format!("{who}: {wrong}"));
        }
    }

    fn count(&self, what: &str) {
        let mut counts = self.counts.lock().unwrap();
        match counts.get_mut(what) {
            Some(count) => *count += 1,
            None => _ = counts.insert(what.to_owned(), 1),
        }
    }

    fn mark(&self) -> Mark {
        let (faults, ended) = (self.faults.load(SeqCst), self.proxy.ended.load(SeqCst));
        Mark { faults, ended, frozen: self.frozen.load(SeqCst) }
    }

    fn was_disturbed(&self, since: Mark) -> bool {
        let now = self.mark();
        since.frozen || now.faults > since.faults || now.ended > since.ended
    }

    /// Makes a call, which must return in time, and with an error only where one can be.
    async fn call<T>(&self, what: &str, call: impl Future<Output = Result<T, Error>>) -> Result<T, Failure> {
        let (mark, started) = (self.mark(), Instant::now());
        let Ok(result) = timeout(LIMIT + SLACK, call).await else {
            self.wrong(format!("{what}: no answer within {:?}, expected one within {LIMIT:?}", LIMIT + SLACK));
            return Err(Failure { kind: ErrorKind::OutcomeUnknown, text: "no answer".into() });
        };
        self.count(what.split(' ').next().unwrap_or(what));
        let error = match result {
            Ok(result) => return Ok(result),
            Err(error) => error,
        };
        let failure = Failure { kind: error.kind().clone(), text: format!("{error:#}") };
        self.count(&format!("{:?}", error.kind()).split(' ').next().unwrap_or_default().to_lowercase());
        let is_write = what.starts_with("put") || what.starts_with("delete");
        let excusable = match error.kind() {
            ErrorKind::Conflict { .. } => return Err(failure),
            ErrorKind::OutcomeUnknown => is_write,
            ErrorKind::Timeout | ErrorKind::Refused { status: 503 } => true,
            _ => false,
        };
        // The client may have given up a connection of which the proxy does not know yet.
        while excusable && !self.was_disturbed(mark) && started.elapsed() < LIMIT + SLACK {
            sleep(Duration::from_millis(10)).await;
        }
        if !excusable || !self.was_disturbed(mark) {
            self.wrong(format!("{what}: {error:#} ({:?}), and no connection was lost", error.kind()));
        }
        Err(failure)
    }

    /// Checks what was read of a key.
    fn read(&self, who: &str, key: &str, entry: &Entry, floor: u64) {
        let revision = entry.revision.get();
        self.check(&format!("{who}: {key}"), self.ledger.seen(key, revision, &entry.value));
        if revision < floor {
            self.wrong(format!("{who}: {key} is at revision {revision}, expected {floor} at least"));
        }
        self.ledger.raise(key, revision);
    }
}

/// A key of a task, as it knows it.
struct Own {
    key: String,
    /// The revision at which it was left, if that is known.
    revision: u64,
    /// Whether it is there, if that is known.
    is_there: Option<bool>,
    /// The life of the server in which a write had an unknown outcome: it may take effect until that life has ended.
    unknown: Option<u64>,
}

impl Own {
    /// A write was answered that was begun in this life of the server.
    fn answered(&mut self, life: u64, is_there: bool, revision: u64) {
        self.unknown = self.unknown.filter(|unknown| *unknown >= life);
        self.revision = revision;
        self.is_there = self.unknown.is_none().then_some(is_there);
    }

    fn left_open(&mut self, life: u64) {
        self.unknown = Some(life);
        self.is_there = None;
    }
}

/// The revision that a watch shows; 0 for none.
type Shown = Box<dyn Fn() -> u64 + Send + Sync>;

/// Writes and reads until it is to stop.
pub struct Task {
    world: Arc<World>,
    client: Client,
    number: usize,
    dice: Dice,
    own: Vec<Own>,
    watched: Option<Shown>,
}

impl Task {
    pub fn new(world: &Arc<World>, client: &Client, number: usize, dice: Dice) -> Self {
        let own = |n| Own { key: format!("t{number}.k{n}"), revision: 0, is_there: Some(false), unknown: None };
        let (world, client, own) = (Arc::clone(world), client.clone(), (0..OWN).map(own).collect());
        Task { world, client, number, dice, own, watched: None }
    }

    pub async fn run(mut self) {
        if self.number.is_multiple_of(5) {
            let key = self.own[0].key.clone();
            let watched = self.world.call("watch", self.client.watch(&key)).await.ok();
            self.watched = watched.map(|watched| Box::new(move || watched.borrow().revision.get()) as Shown);
        }
        while !self.world.stop.load(SeqCst) {
            let own = self.dice.below(OWN as u64) as usize;
            match self.dice.below(100) {
                0..35 => self.put(own, false).await,
                35..45 => self.put(own, true).await,
                45..52 => self.delete(own).await,
                52..70 => self.get(own).await,
                70..78 => self.put_shared().await,
                78..88 => self.get_shared().await,
                88..93 => self.get_all().await,
                93..96 => self.list().await,
                96..98 => self.subscribe().await,
                98 => _ = self.world.call("health", self.client.health()).await,
                _ => _ = self.world.call("stats", self.client.stats()).await,
            }
            sleep(Duration::from_millis(self.dice.below(40))).await;
        }
        // What it was promised is there.
        for own in 0..OWN {
            self.get(own).await;
        }
    }

    async fn put(&mut self, own: usize, with_condition: bool) {
        let (world, own) = (&self.world, &mut self.own[own]);
        let (life, floor) = (world.lives.load(SeqCst), world.ledger.floor(&own.key));
        let condition = own.is_there.filter(|_| with_condition).map(|there| if there { own.revision } else { 0 });
        let mut options = PutOptions::default();
        options.if_revision = condition.map(Revision::new);
        let (number, value) = world.ledger.begin(&own.key);
        let what = format!("put {} number {number} if at {condition:?}", own.key);
        match world.call(&what, self.client.put_with(&own.key, value, options)).await {
            Ok(revision) => {
                let revision = revision.get();
                world.check(&what, world.ledger.written(&own.key, number, revision));
                if revision <= floor {
                    world.wrong(format!("{what}: answered with revision {revision}, expected more than {floor}"));
                }
                own.answered(life, true, revision);
                if own.key.ends_with("k0") && own.is_there.is_some() {
                    self.look_at_watch(revision);
                }
            }
            Err(error) => match error.kind {
                ErrorKind::OutcomeUnknown => own.left_open(life.max(world.lives.load(SeqCst))),
                ErrorKind::Conflict { revision } => {
                    world.check(&what, world.ledger.nothing(&own.key, number, error.text));
                    // No one else writes it, so nothing can have come between.
                    world.wrong(format!("{what}: a conflict with revision {revision}"));
                }
                _ => world.check(&what, world.ledger.nothing(&own.key, number, error.text)),
            },
        }
    }

    /// A watch is not older than its own client's put.
    fn look_at_watch(&self, revision: u64) {
        let Some(watched) = &self.watched else { return };
        self.world.count("watched");
        let seen = watched();
        if seen < revision {
            self.world.wrong(format!("a watch is at revision {seen} behind its own client's put of {revision}"));
        }
    }

    async fn delete(&mut self, own: usize) {
        let (world, own) = (&self.world, &mut self.own[own]);
        let life = world.lives.load(SeqCst);
        let what = format!("delete {}", own.key);
        match world.call(&what, self.client.delete(&own.key)).await {
            Ok(deleted) => {
                if own.is_there.is_some_and(|there| there != (deleted.count == 1)) {
                    let is_there = own.is_there;
                    world.wrong(format!(
                        "{what}: {} keys were deleted, while its presence was {is_there:?}",
                        deleted.count
                    ));
                }
                let revision = deleted.revision.map_or(own.revision, Revision::get);
                world.ledger.raise(&own.key, if deleted.count == 1 { revision } else { 0 });
                own.answered(life, false, revision);
            }
            Err(error) if error.kind == ErrorKind::OutcomeUnknown => {
                own.left_open(life.max(world.lives.load(SeqCst)));
            }
            // Nothing was changed: the next read shows it.
            Err(_) => {}
        }
    }

    fn check_own(&self, what: &str, own: &Own, found: Option<&Entry>, floor: u64) {
        if let Some(entry) = found {
            self.world.read(what, &own.key, entry, floor);
        }
        if own.is_there.is_some_and(|there| there != found.is_some()) {
            let revision = found.map(|entry| entry.revision);
            let expected = if own.is_there == Some(true) { "there" } else { "gone" };
            let known = own.revision;
            self.world
                .wrong(format!("{what}: {} is {revision:?}, expected it to be {expected} since {known}", own.key));
        }
        if let Some(entry) = found.filter(|entry| own.is_there == Some(true) && entry.revision.get() != own.revision) {
            let (found, known) = (entry.revision, own.revision);
            self.world.wrong(format!("{what}: {} is at {found}, expected the last write, at {known}", own.key));
        }
    }

    async fn get(&mut self, own: usize) {
        let own = &self.own[own];
        let (what, floor) = (format!("get {}", own.key), self.world.ledger.floor(&own.key));
        if let Ok(found) = self.world.call(&what, self.client.get(&own.key)).await {
            self.check_own(&what, own, found.as_ref(), floor);
        }
    }

    async fn get_all(&mut self) {
        let what = format!("get_all t{}.*", self.number);
        let floors: Vec<_> = self.own.iter().map(|own| self.world.ledger.floor(&own.key)).collect();
        let Ok(found) = self.world.call(&what, self.client.get_all(&format!("t{}.*", self.number))).await else {
            return;
        };
        for (own, floor) in self.own.iter().zip(floors) {
            self.check_own(&what, own, found.iter().find(|entry| entry.key.as_str() == own.key), floor);
        }
    }

    async fn list(&mut self) {
        let what = format!("list t{}", self.number);
        let Ok(found) = self.world.call(&what, self.client.list(&format!("t{}.*", self.number))).await else { return };
        for own in &self.own {
            let found = found.iter().find(|(key, _)| key.as_str() == own.key).map(|(_, revision)| revision.get());
            let is_right = match own.is_there {
                Some(there) => found == there.then_some(own.revision),
                None => true,
            };
            if !is_right {
                let (there, revision) = (own.is_there, own.revision);
                self.world.wrong(format!("{what}: {} is {found:?}, expected {there:?} at {revision}", own.key));
            }
        }
    }

    async fn put_shared(&mut self) {
        let (world, key) = (&self.world, self.shared());
        let floor = world.ledger.floor(&key);
        let (number, value) = world.ledger.begin(&key);
        let what = format!("put {key} number {number}");
        match world.call(&what, self.client.put(&key, value)).await {
            Ok(revision) => {
                world.check(&what, world.ledger.written(&key, number, revision.get()));
                if revision.get() <= floor {
                    world.wrong(format!("{what}: answered with revision {revision}, expected more than {floor}"));
                }
            }
            Err(error) if error.kind == ErrorKind::OutcomeUnknown => {}
            Err(error) => world.check(&what, world.ledger.nothing(&key, number, error.text)),
        }
    }

    async fn get_shared(&mut self) {
        let (world, key) = (&self.world, self.shared());
        let (what, floor) = (format!("get {key}"), world.ledger.floor(&key));
        match world.call(&what, self.client.get(&key)).await {
            Ok(Some(entry)) => world.read(&what, &key, &entry, floor),
            Ok(None) if floor > 0 => world.wrong(format!("{what}: not there, expected revision {floor} at least")),
            _ => {}
        }
    }

    fn shared(&self) -> String {
        format!("shared.s{}", self.dice.clone().below(SHARED))
    }

    /// A subscription for a moment: what was acknowledged before it is in its snapshot.
    async fn subscribe(&mut self) {
        let (world, pattern) = (&self.world, format!("t{}", self.number));
        let what = format!("subscribe {pattern}");
        let floors: Vec<_> = self.own.iter().map(|own| world.ledger.floor(&own.key)).collect();
        let Ok(mut subscription) = world.call(&what, self.client.subscribe(&pattern)).await else { return };
        let mut view = View::new(&pattern);
        while !view.is_synced {
            let Ok(event) = timeout(LIMIT + SLACK, subscription.next()).await else {
                return world.wrong(format!("{what}: not synced within {:?}", LIMIT + SLACK));
            };
            let Some(event) = event else { return world.wrong(format!("{what}: ended")) };
            view.learn(world, &what, &event);
        }
        for (own, floor) in self.own.iter().zip(floors) {
            let known = view.known.get(&own.key).copied();
            let is_right = match own.is_there {
                Some(true) => known == Some(own.revision),
                Some(false) => known.is_none(),
                None => known.is_none_or(|known| known >= floor),
            };
            if !is_right {
                let (there, revision) = (own.is_there, own.revision);
                world.wrong(format!("{what}: {} is known at {known:?}, expected {there:?} at {revision}", own.key));
            }
        }
    }
}

/// What a reader of a subscription knows, from its events alone.
pub struct View {
    pub pattern: String,
    covers: Pattern,
    /// The keys that are there, and their revisions.
    pub known: BTreeMap<String, u64>,
    /// The highest revision of each key so far, and what happened then: nothing at or below it may follow.
    last: HashMap<String, (u64, &'static str)>,
    pub is_synced: bool,
    pub events: u64,
}

impl View {
    pub fn new(pattern: &str) -> Self {
        let covers = Pattern::new(pattern).unwrap();
        let (known, last) = (BTreeMap::new(), HashMap::new());
        View { pattern: pattern.into(), covers, known, last, is_synced: false, events: 0 }
    }

    pub fn learn(&mut self, world: &World, who: &str, event: &Event) {
        self.events += 1;
        match event {
            Event::Update { entry, .. } => {
                self.rises(world, who, &entry.key, entry.revision, "updated");
                world.read(who, entry.key.as_str(), entry, 0);
                self.known.insert(entry.key.to_string(), entry.revision.get());
            }
            Event::Gone { key, revision, reason, .. } => {
                self.rises(world, who, key, *revision, reason.as_str());
                self.known.remove(key.as_str());
                if key.as_str().starts_with("shared") || *reason == GoneReason::Expired {
                    world.wrong(format!("{who}: {key} is gone ({}), and no task deletes it", reason.as_str()));
                }
            }
            Event::Synced { epoch, .. } => {
                self.is_synced = true;
                if epoch.to_string() != world.epoch {
                    world.wrong(format!("{who}: synced in the epoch {epoch}, expected {}", world.epoch));
                }
            }
            Event::Reconnecting | Event::Connected { .. } => self.is_synced = false,
            other => world.wrong(format!("{who}: {other:?}")),
        }
    }

    fn rises(&mut self, world: &World, who: &str, key: &nkv_client::Key, revision: Revision, how: &'static str) {
        let (before, how_before) = self.last.insert(key.to_string(), (revision.get(), how)).unwrap_or((0, "absent"));
        if before >= revision.get() || !self.covers.covers(key) {
            let expected = format!("expected a key that it covers at more than {before} ({how_before})");
            world.wrong(format!("{who}: {key} at revision {revision} ({how}), {expected}"));
        }
    }
}

/// Reads a subscription to its end; some readers are slow.
pub async fn follow(world: Arc<World>, mut subscription: Subscription, view: Arc<Mutex<View>>, slow: Option<Dice>) {
    let who = format!("subscription of {}", view.lock().unwrap().pattern);
    let mut slow = slow;
    while let Some(event) = subscription.next().await {
        view.lock().unwrap().learn(&world, &who, &event);
        if let Some(dice) = slow.as_mut().filter(|_| !world.stop.load(SeqCst)) {
            sleep(Duration::from_millis(dice.below(10))).await;
        }
    }
    if !world.stop.load(SeqCst) {
        world.wrong(format!("{who}: ended"));
    }
}

/// Whether a client is connected.
pub fn is_connected(client: &Client) -> bool {
    *client.state().borrow() == ConnectionState::Connected
}
