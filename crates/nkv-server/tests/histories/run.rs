//! Who makes a history: clients and subscribers on raw connections, and subscriptions of the client library.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nkv_client::{Client, Event, GoneReason};
use serde_json::Value as Json;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};

use crate::history::{Ask, Notice, Op, Outcome, State, Time, Value, Watch};
use crate::proxy::Dice;
use crate::support::PATIENCE;
use crate::watch;

const HOT: [&str; 4] = ["a.h0", "a.h1", "b.h0", "b.h1"];
const COLD: [&str; 10] = ["a", "a.c0", "a.c1", "a.c2", "a.h0.below", "b.c0", "b.c1", "b.c2", "b.h1.below.it", "alone"];
/// Before somebody who could not connect tries again.
const PAUSE: Duration = Duration::from_millis(3);

/// What all share.
pub struct World {
    pub addr: String,
    clock: Instant,
    /// No more operations.
    pub stop: AtomicBool,
    /// Slow subscribers are slow no more.
    pub hurry: AtomicBool,
    /// A write was refused, because the disk takes nothing.
    pub refused: AtomicBool,
    values: AtomicU64,
    sessions: AtomicU64,
    /// What some client saw last of each key, for conditions.
    latest: Mutex<HashMap<&'static str, State>>,
}

impl World {
    pub fn new(addr: &str) -> Arc<Self> {
        Arc::new(World {
            addr: addr.into(),
            clock: Instant::now(),
            stop: AtomicBool::new(false),
            hurry: AtomicBool::new(false),
            refused: AtomicBool::new(false),
            values: AtomicU64::new(1),
            sessions: AtomicU64::new(0),
            latest: Mutex::default(),
        })
    }

    pub fn now(&self) -> Time {
        u64::try_from(self.clock.elapsed().as_nanos()).unwrap()
    }

    /// Something to do on a connection; some writes with a condition that often holds.
    fn plan(&self, session: u64, dice: &mut Dice) -> (&'static str, Op) {
        let key = if dice.below(5) > 0 { HOT[dice.below(4) as usize] } else { COLD[dice.below(10) as usize] };
        let ask = match dice.below(100) {
            0..40 => Ask::Get,
            40..85 => Ask::Put(self.values.fetch_add(1, SeqCst)),
            _ => Ask::Delete,
        };
        let latest = self.latest.lock().unwrap().get(key).copied();
        // A delete asks for a revision that there is.
        let latest = latest.filter(|latest| ask != Ask::Delete || latest.is_some());
        let expect = if ask != Ask::Get && dice.below(4) == 0 { latest } else { None };
        let (invoked, returned) = (0, Time::MAX);
        (key, Op { session, key: key.into(), ask, expect, invoked, returned, outcome: Outcome::Unknown })
    }

    fn note(&self, key: &'static str, op: &Op) {
        if op.outcome == Outcome::Refused {
            self.refused.store(true, SeqCst);
        } else if let Some(state) = op.leaves() {
            self.latest.lock().unwrap().insert(key, state);
        }
    }
}

/// A value as it is stored: of many lengths, and recognisable when torn.
fn text(value: Value) -> String {
    format!("{value} {}", "x".repeat(padding(value)))
}

fn padding(value: Value) -> usize {
    if value.is_multiple_of(97) { 20_000 } else { [0, 20, 300][value as usize % 3] }
}

pub fn value_of(text: &str) -> Value {
    let (number, rest) = text.split_once(' ').unwrap_or_else(|| panic!("torn: {text}"));
    let value = number.parse().unwrap();
    assert!(rest.len() == padding(value) && rest.bytes().all(|byte| byte == b'x'), "torn: {text}");
    value
}

/// A connection that speaks lines.
struct Wire {
    lines: BufReader<OwnedReadHalf>,
    out: OwnedWriteHalf,
}

impl Wire {
    async fn open(addr: &str, name: &str, slow: bool) -> io::Result<Self> {
        let stream = if slow {
            let socket = TcpSocket::new_v4()?;
            socket.set_recv_buffer_size(4_096)?;
            socket.connect(addr.parse().unwrap()).await?
        } else {
            TcpStream::connect(addr).await?
        };
        stream.set_nodelay(true)?;
        let (lines, out) = stream.into_split();
        let mut wire = Wire { lines: BufReader::new(lines), out };
        wire.send(&format!("{{\"type\":\"Connect\",\"client_uuid\":\"{name}\",\"values\":\"text\"}}\n")).await?;
        let answer = timeout(PATIENCE, wire.message()).await.expect("no answer")?;
        if answer["Base"]["status"] == 200 { Ok(wire) } else { Err(io::Error::other(answer.to_string())) }
    }

    async fn send(&mut self, text: &str) -> io::Result<()> {
        self.out.write_all(text.as_bytes()).await
    }

    async fn message(&mut self) -> io::Result<Json> {
        let mut line = Vec::new();
        self.lines.read_until(b'\n', &mut line).await?;
        if line.last() != Some(&b'\n') {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_slice(&line).unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&line))))
    }
}

fn request(id: usize, op: &Op) -> String {
    let (kind, value) = match op.ask {
        Ask::Get => ("Get", String::new()),
        Ask::Put(value) => ("Put", format!(",\"value\":\"{}\"", text(value))),
        Ask::Delete => ("Delete", String::new()),
    };
    let condition = op.expect.map(|expect| format!(",\"if_revision\":{}", expect.map_or(0, |(revision, _)| revision)));
    let condition = condition.unwrap_or_default();
    format!("{{\"type\":\"{kind}\",\"id\":{id},\"key\":\"{}\"{value}{condition}}}\n", op.key)
}

fn outcome(id: usize, answer: &Json) -> Outcome {
    let (base, get) = (&answer["Base"], &answer["Get"]);
    assert!(base["id"] == id || get["id"] == id, "not the answer to {id}: {answer}");
    match (base["status"].as_u64(), get["status"].as_u64()) {
        (Some(200), _) => Outcome::Written(base["revision"].as_u64().unwrap()),
        (Some(409), _) => Outcome::Conflict(base["revision"].as_u64().unwrap()),
        (Some(404), _) | (_, Some(404)) => Outcome::Absent,
        (Some(507), _) => Outcome::Refused,
        (_, Some(200)) => {
            Outcome::Found(get["revisions"][0].as_u64().unwrap(), value_of(get["data"][0].as_str().unwrap()))
        }
        _ => panic!("an answer that was not expected: {answer}"),
    }
}

/// A client that keeps asking, up to so many requests at a time, and connects again until it is told to stop.
pub async fn ask(world: Arc<World>, name: String, depth: u64, mut dice: Dice) -> Vec<Op> {
    let mut ops = Vec::new();
    while !world.stop.load(SeqCst) {
        let Ok(mut wire) = Wire::open(&world.addr, &name, false).await else {
            sleep(PAUSE).await;
            continue;
        };
        let session = world.sessions.fetch_add(1, SeqCst);
        while !world.stop.load(SeqCst) {
            let plans: Vec<_> = (0..=dice.below(depth)).map(|_| world.plan(session, &mut dice)).collect();
            let begun = ops.len();
            let requests: String = plans.iter().enumerate().map(|(id, (_, op))| request(id, op)).collect();
            let invoked = world.now();
            ops.extend(plans.iter().map(|(_, op)| Op { invoked, ..op.clone() }));
            let mut cut = wire.send(&requests).await.is_err();
            for (id, (op, (key, _))) in ops[begun..].iter_mut().zip(plans).enumerate() {
                if cut {
                    break;
                }
                match timeout(PATIENCE, wire.message()).await.expect("no answer") {
                    Ok(answer) => {
                        op.returned = world.now();
                        op.outcome = outcome(id, &answer);
                        world.note(key, op);
                    }
                    Err(_) => cut = true,
                }
            }
            if cut {
                break;
            }
        }
    }
    ops
}

/// What a subscriber was sent, and so knows.
pub struct Log {
    pub watch: Watch,
    pub known: BTreeMap<String, (u64, Value)>,
    /// Since when it is connected, and whether it has had all of the snapshot.
    pub connected: Time,
    pub synced: bool,
}

impl Log {
    pub fn new(name: String, pattern: &str, library: bool) -> Arc<Mutex<Self>> {
        let watch = Watch { name, pattern: pattern.into(), library, behind_engine: false, notices: Vec::new() };
        Arc::new(Mutex::new(Log { watch, known: BTreeMap::new(), connected: 0, synced: false }))
    }
}

pub struct Subscriber {
    pub world: Arc<World>,
    /// Of the server, or of a proxy.
    pub addr: String,
    pub slow: bool,
    pub log: Arc<Mutex<Log>>,
    pub dice: Dice,
}

impl Subscriber {
    fn notice(&self, notice: Notice) {
        let mut log = self.log.lock().unwrap();
        watch::learn(&mut log.known, &notice);
        let now = self.world.now();
        match notice {
            Notice::Connected => (log.connected, log.synced) = (now, false),
            Notice::Hello | Notice::Lost => log.synced = false,
            Notice::Synced { .. } => log.synced = true,
            _ => {}
        }
        log.watch.notices.push((now, notice));
    }

    async fn pause(&mut self) {
        if self.slow && !self.world.hurry.load(SeqCst) {
            sleep(Duration::from_millis(self.dice.below(15))).await;
        }
    }

    /// On raw connections, one after another.
    pub async fn follow(mut self) {
        let (name, pattern) = {
            let log = self.log.lock().unwrap();
            (log.watch.name.clone(), log.watch.pattern.clone())
        };
        loop {
            let Ok(mut wire) = Wire::open(&self.addr, &name, self.slow).await else {
                sleep(PAUSE).await;
                continue;
            };
            self.notice(Notice::Connected);
            let request = format!("{{\"type\":\"Subscribe\",\"key\":\"{pattern}\",\"snapshot\":true}}\n");
            if wire.send(&request).await.is_ok() {
                while let Ok(message) = wire.message().await {
                    self.notice(notification(&message));
                    self.pause().await;
                }
            }
            self.notice(Notice::Lost);
        }
    }

    /// With a subscription of the library, which does the rest.
    pub async fn subscribe(mut self, client: Client) {
        let pattern = self.log.lock().unwrap().watch.pattern.clone();
        let mut subscription = loop {
            match client.subscribe(&pattern).await {
                Ok(subscription) => break subscription,
                Err(error) => eprintln!("once more: {error:#}"),
            }
        };
        while let Some(event) = subscription.next().await {
            let notice = match event {
                Event::Update { entry, skipped, .. } => Notice::Update {
                    key: entry.key.to_string(),
                    revision: entry.revision.get(),
                    value: value_of(std::str::from_utf8(&entry.value).unwrap()),
                    skipped,
                },
                Event::Gone { key, revision, reason, skipped, .. } => {
                    let missed = reason == GoneReason::Missed;
                    Notice::Gone { key: key.to_string(), revision: revision.get(), missed, skipped }
                }
                Event::Synced { revision, epoch, .. } => {
                    Notice::Synced { revision: revision.get(), epoch: epoch.to_string() }
                }
                Event::Connected { .. } => Notice::Connected,
                Event::Reconnecting => Notice::Lost,
                other => panic!("{pattern}: {other:?}"),
            };
            self.notice(notice);
            self.pause().await;
        }
    }
}

fn notification(message: &Json) -> Notice {
    if message == "Hello" {
        return Notice::Hello;
    }
    let (kind, fields) = message.as_object().unwrap().iter().next().unwrap();
    let number = |name: &str| fields[name].as_u64().unwrap_or_else(|| panic!("no {name}: {message}"));
    let key = || fields["key"].as_str().unwrap().to_owned();
    match kind.as_str() {
        "Update" => Notice::Update {
            key: key(),
            revision: number("revision"),
            value: value_of(fields["value"].as_str().unwrap()),
            skipped: number("skipped"),
        },
        "Close" => Notice::Gone { key: key(), revision: number("revision"), missed: false, skipped: number("skipped") },
        "Synced" => Notice::Synced { revision: number("revision"), epoch: fields["epoch"].as_str().unwrap().into() },
        _ => panic!("not a notification: {message}"),
    }
}

pub async fn connect(addr: String) -> Client {
    loop {
        let builder = Client::builder(&addr).backoff(Duration::from_millis(5), Duration::from_millis(100));
        match builder.connect_timeout(Duration::from_secs(1)).connect().await {
            Ok(client) => return client,
            Err(_) => sleep(PAUSE).await,
        }
    }
}
