//! Connections on one thread: what is there is read, what fits is written, and as many requests as may be are under way.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::epoll::EventFlags;

use crate::Result;
use crate::drivers::{Driver, Event, Protocol, Values};
use crate::sys::{self, Epoll, Io, SECOND};

/// Nothing that is waited for takes so long.
const PATIENCE: u64 = 10 * SECOND;

/// What is read at once.
const READ_LEN: usize = 256 << 10;

/// A server that is spoken to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    pub(crate) protocol: Protocol,
    pub(crate) addr: SocketAddr,
    pub(crate) pid: u32,
    /// The process of the engine behind it.
    pub(crate) engine: Option<u32>,
}

impl Target {
    /// Resident memory of all processes that serve, in MB.
    pub(crate) fn rss_mb(self) -> f64 {
        self.pids().map(sys::rss_mb).sum()
    }

    /// Their processor seconds.
    pub(crate) fn cpu_s(self) -> f64 {
        self.pids().map(|pid| sys::cpu_s(pid, None)).sum()
    }

    fn pids(self) -> impl Iterator<Item = u32> {
        [Some(self.pid), self.engine].into_iter().flatten()
    }
}

/// Keys from 0 on, written when they are needed: a list of a million would be measured as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Keys {
    pub(crate) count: usize,
    pub(crate) depth: Depth,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Depth {
    /// `bench.k00000042`
    Plain,
    /// So many segments, 16 at most; as long a key whatever their number.
    Segments(usize),
}

impl Keys {
    pub(crate) fn plain(count: usize) -> Keys {
        Keys { count, depth: Depth::Plain }
    }

    fn prefix(self) -> String {
        match self.depth {
            Depth::Plain => "bench.k".to_owned(),
            Depth::Segments(depth) => {
                let parts = (1..16).map(|n| if n < depth { "b." } else { "b_" });
                parts.chain(["k"]).collect()
            }
        }
    }

    pub(crate) fn key(self, number: usize) -> String {
        format!("{}{number:08}", self.prefix())
    }
}

/// A connection, and the requests under way on it.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: OwnedFd,
    pub(crate) driver: Box<dyn Driver>,
    input: Vec<u8>,
    out: Vec<u8>,
    written: usize,
    waits_for_room: bool,
    /// When the request of each slot was written.
    pub(crate) started: Vec<u64>,
    pub(crate) free: Vec<u32>,
    /// Slots in the order of their requests.
    order: VecDeque<u32>,
    pub(crate) ready: bool,
    pub(crate) dead: bool,
}

impl Connection {
    fn open(epoll: &Epoll, id: usize, addr: SocketAddr, driver: Box<dyn Driver>, pipeline: usize) -> Result<Self> {
        let socket = sys::connect(addr)?;
        epoll.add(&socket, id)?;
        let mut connection = Connection {
            socket,
            driver,
            input: Vec::new(),
            out: Vec::new(),
            written: 0,
            waits_for_room: false,
            started: vec![0; pipeline],
            free: (0..pipeline as u32).rev().collect(),
            order: VecDeque::new(),
            ready: false,
            dead: false,
        };
        connection.ready = !connection.driver.hello(&mut connection.out);
        connection.flush(epoll, id);
        Ok(connection)
    }

    pub(crate) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    pub(crate) fn is_busy(&self) -> bool {
        !self.dead && self.free.len() < self.started.len()
    }

    /// Lets the driver write a request; false if as many are under way as may be.
    pub(crate) fn request(&mut self, now: u64, write: impl FnOnce(&mut dyn Driver, u32, &mut Vec<u8>)) -> bool {
        let Some(slot) = self.free.pop() else { return false };
        self.started[slot as usize] = now;
        self.order.push_back(slot);
        write(&mut *self.driver, slot, &mut self.out);
        true
    }

    /// Ends a request; returns when it was written.
    pub(crate) fn replied(&mut self, slot: Option<u32>) -> Result<u64> {
        let slot = match slot {
            // Answers that name their request need no order.
            Some(slot) => {
                self.order.clear();
                slot
            }
            None => self.order.pop_front().ok_or("an answer without a request")?,
        };
        self.free.push(slot);
        self.started.get(slot as usize).copied().ok_or_else(|| "an answer to what was not asked".into())
    }

    pub(crate) fn flush(&mut self, epoll: &Epoll, id: usize) {
        while self.written < self.out.len() {
            match sys::write(&self.socket, &self.out[self.written..]) {
                Io::Done(len) => self.written += len,
                Io::Again => break,
                Io::Closed => return self.dead = true,
            }
        }
        let waits = self.written < self.out.len();
        if !waits {
            self.out.clear();
            self.written = 0;
        }
        if waits != self.waits_for_room {
            self.waits_for_room = waits;
            epoll.watch_room(&self.socket, id, waits);
        }
    }

    /// Reads what is there.
    fn read(&mut self, scratch: &mut [u8], events: &mut Vec<Event>) {
        loop {
            let len = match sys::read(&self.socket, scratch) {
                Io::Done(len) => len,
                Io::Again => return,
                Io::Closed => return self.dead = true,
            };
            if self.input.is_empty() {
                let used = self.driver.parse(&scratch[..len], &mut self.out, events);
                self.input.extend_from_slice(&scratch[used..len]);
            } else {
                self.input.extend_from_slice(&scratch[..len]);
                let used = self.driver.parse(&self.input, &mut self.out, events);
                self.input.drain(..used);
            }
            if len < scratch.len() {
                return;
            }
        }
    }
}

/// Connections that are waited for together.
pub(crate) struct Pool {
    /// Where connections that are added go to.
    pub(crate) target: Target,
    values: Arc<Values>,
    pub(crate) epoll: Epoll,
    pub(crate) connections: Vec<Connection>,
    scratch: Vec<u8>,
    events: Vec<Event>,
}

/// What came of a closed loop.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) operations: u64,
    pub(crate) errors: u64,
}

impl Pool {
    pub(crate) fn open(target: Target, value: usize, connections: usize, pipeline: usize) -> Result<Pool> {
        let mut pool = Pool {
            target,
            values: Values::new(value),
            epoll: Epoll::new()?,
            connections: Vec::new(),
            scratch: vec![0; READ_LEN],
            events: Vec::new(),
        };
        pool.add(connections, pipeline)?;
        Ok(pool)
    }

    /// Opens more connections, and waits for them.
    pub(crate) fn add(&mut self, connections: usize, pipeline: usize) -> Result<()> {
        for id in self.connections.len()..self.connections.len() + connections {
            let driver = self.target.protocol.driver(id, &self.values);
            self.connections.push(Connection::open(&self.epoll, id, self.target.addr, driver, pipeline)?);
        }
        self.wait_until_ready()
    }

    pub(crate) fn wait_until_ready(&mut self) -> Result<()> {
        let limit = sys::now() + PATIENCE;
        while self.connections.iter().any(|connection| !connection.ready) {
            if sys::now() > limit || self.connections.iter().any(|connection| connection.dead) {
                return Err("not every connection was greeted".into());
            }
            self.turn(10, &mut |_, _| {})?;
        }
        Ok(())
    }

    /// Reads and writes once wherever that is possible; `on` gets each event but `Ready`, with its connection.
    pub(crate) fn turn(&mut self, ms: u64, on: &mut dyn FnMut(usize, &Event)) -> Result<()> {
        self.turn_ns(ms * 1_000_000, on)
    }

    /// The same; waits at most `ns` nanoseconds.
    pub(crate) fn turn_ns(&mut self, ns: u64, on: &mut dyn FnMut(usize, &Event)) -> Result<()> {
        self.epoll.wait_ns(ns)?;
        for ready in &self.epoll.events {
            let id = ready.data.u64() as usize;
            let connection = &mut self.connections[id];
            if connection.dead {
                continue;
            }
            if !(ready.flags & !EventFlags::OUT).is_empty() {
                self.events.clear();
                connection.read(&mut self.scratch, &mut self.events);
                for event in &self.events {
                    match event {
                        Event::Ready => connection.ready = true,
                        event => on(id, event),
                    }
                }
            }
            connection.flush(&self.epoll, id);
            if connection.dead {
                self.epoll.remove(&connection.socket);
            }
        }
        Ok(())
    }

    /// Subscribes on one connection, and waits until it is.
    pub(crate) fn subscribe(&mut self, id: usize, key: &str) -> Result<()> {
        self.begin_to_subscribe(id, key);
        self.wait_until_ready()
    }

    fn begin_to_subscribe(&mut self, id: usize, key: &str) {
        let connection = &mut self.connections[id];
        connection.ready = false;
        connection.driver.subscribe(key, &mut connection.out);
        connection.flush(&self.epoll, id);
    }

    /// Subscribes all connections but the first to a key.
    pub(crate) fn subscribe_others(&mut self, key: &str) -> Result<()> {
        (1..self.connections.len()).for_each(|id| self.begin_to_subscribe(id, key));
        self.wait_until_ready()
    }

    /// Sets up a fresh server, where the protocol has something to set up.
    pub(crate) fn set_up(&mut self) -> Result<()> {
        let connection = &mut self.connections[0];
        if !connection.driver.set_up(&mut connection.out) {
            return Ok(());
        }
        connection.flush(&self.epoll, 0);
        let limit = sys::now() + PATIENCE;
        let mut answer = None;
        while answer.is_none() && sys::now() < limit {
            self.turn(10, &mut |_, event| {
                if let Event::Reply { good, .. } = event {
                    answer = Some(*good);
                }
            })?;
        }
        if answer == Some(true) { Ok(()) } else { Err("the server could not be set up".into()) }
    }

    /// A closed loop: keeps as many requests under way as may be, while `next` has one.
    ///
    /// `next` is given the time, and returns whether to put, and the number of the key. `done` is given when a request
    /// was written, when its answer was read, and whether it was good.
    pub(crate) fn drive(
        &mut self,
        keys: Keys,
        next: &mut dyn FnMut(u64) -> Option<(bool, usize)>,
        done: &mut dyn FnMut(u64, u64, bool),
    ) -> Result<Tally> {
        use std::fmt::Write;
        let mut key = keys.prefix();
        let prefix_len = key.len();
        let mut tally = Tally::default();
        let mut seq = 0;
        let mut has_room: Vec<usize> = (0..self.connections.len()).collect();
        let mut end = None;
        // What was taken while no connection could send it.
        let mut held = None;
        loop {
            for id in has_room.drain(..) {
                let connection = &mut self.connections[id];
                let now = sys::now();
                while end.is_none() && !connection.dead && !connection.free.is_empty() {
                    let Some((put, number)) = held.take().or_else(|| next(now)) else {
                        end = Some(now);
                        break;
                    };
                    key.truncate(prefix_len);
                    write!(key, "{number:08}").expect("a string takes everything");
                    seq += 1;
                    connection.request(now, |driver, slot, out| match put {
                        true => driver.put(slot, &key, now, seq, out),
                        false => driver.get(slot, &key, out),
                    });
                }
                connection.flush(&self.epoll, id);
            }
            let limit = end.unwrap_or(u64::MAX).saturating_add(PATIENCE);
            if end.is_some() && (sys::now() > limit || !self.connections.iter().any(Connection::is_busy)) {
                break;
            }
            self.answers(&mut tally, &mut has_room, done)?;
            if has_room.is_empty() && end.is_none() {
                // A server that hangs does not hang us.
                held = held.or_else(|| next(sys::now()));
                end = held.is_none().then(sys::now);
            }
        }
        let dead = self.connections.iter().filter(|connection| connection.dead).count();
        let unanswered = self.connections.iter().filter(|connection| connection.is_busy()).count();
        if dead + unanswered > 0 {
            return Err(format!("{dead} connections were closed, {unanswered} were not answered").into());
        }
        Ok(tally)
    }

    /// Reads answers; connections that got one may be used again.
    fn answers(
        &mut self,
        tally: &mut Tally,
        has_room: &mut Vec<usize>,
        done: &mut dyn FnMut(u64, u64, bool),
    ) -> Result<()> {
        self.epoll.wait(100)?;
        for ready in &self.epoll.events {
            let id = ready.data.u64() as usize;
            let connection = &mut self.connections[id];
            if connection.dead {
                continue;
            }
            self.events.clear();
            if !(ready.flags & !EventFlags::OUT).is_empty() {
                connection.read(&mut self.scratch, &mut self.events);
            }
            let now = sys::now();
            let before = connection.free.len();
            for event in &self.events {
                let Event::Reply { slot, good } = event else { continue };
                tally.operations += 1;
                tally.errors += u64::from(!good);
                done(connection.replied(*slot)?, now, *good);
            }
            if connection.dead {
                self.epoll.remove(&connection.socket);
            } else if connection.free.len() > before {
                has_room.push(id);
            } else {
                connection.flush(&self.epoll, id);
            }
        }
        Ok(())
    }
}
