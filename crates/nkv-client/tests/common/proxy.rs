//! A proxy that cuts connections at any byte, and the dice that say when. The tests of nkv-server use it too.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

/// Random numbers that can be had again.
#[derive(Clone)]
pub(crate) struct Dice(u64);

impl Dice {
    /// From `NKV_SEED`, or by chance.
    pub(crate) fn new() -> Self {
        let seed = seed();
        println!("NKV_SEED={seed}");
        Dice::of(seed)
    }

    pub(crate) fn of(seed: u64) -> Self {
        // Seeds that follow one another must not give numbers that are alike, and 0 gives none.
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }

    /// Other dice, for a task that throws at the same time.
    pub(crate) fn split(&mut self) -> Self {
        Dice::of(self.below(u64::MAX))
    }
}

/// `NKV_SEED`, or a random one.
pub(crate) fn seed() -> u64 {
    let seed = std::env::var("NKV_SEED").ok().and_then(|seed| seed.parse().ok());
    seed.unwrap_or_else(|| getrandom::u64().unwrap() >> 32)
}

/// Stands between a client and a server, and cuts connections when a test says so.
pub(crate) struct Proxy {
    pub(crate) addr: String,
    target: Arc<Mutex<String>>,
    /// The number of bytes after which connections are cut at the latest; 0 for never.
    cut_after: Arc<AtomicU64>,
    /// The milliseconds after which connections are cut at the latest, or a few bytes later; 0 for never.
    cut_within: Arc<AtomicU64>,
    generation: watch::Sender<u64>,
    pub(crate) accepted: Arc<AtomicU64>,
    /// How many connections have ended, on whatever side.
    pub(crate) ended: Arc<AtomicU64>,
}

impl Proxy {
    /// To a host and port, or to a WebSocket; the proxy's own address is of the same kind.
    pub(crate) async fn to(target: &str, dice: Dice) -> Self {
        let (scheme, target) = match target.strip_prefix("ws://") {
            Some(rest) => ("ws://", rest.split('/').next().unwrap_or(rest)),
            None => ("", target),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Proxy {
            addr: format!("{scheme}{}", listener.local_addr().unwrap()),
            target: Arc::new(Mutex::new(target.to_owned())),
            cut_after: Arc::default(),
            cut_within: Arc::default(),
            generation: watch::Sender::new(0),
            accepted: Arc::default(),
            ended: Arc::default(),
        };
        let (target, cut_after) = (Arc::clone(&proxy.target), Arc::clone(&proxy.cut_after));
        let cut_within = Arc::clone(&proxy.cut_within);
        let (accepted, generation) = (Arc::clone(&proxy.accepted), proxy.generation.subscribe());
        let ended = Arc::clone(&proxy.ended);
        tokio::spawn(async move {
            let mut dice = dice;
            while let Ok((near, _)) = listener.accept().await {
                accepted.fetch_add(1, SeqCst);
                let limit = match cut_after.load(SeqCst) {
                    0 => u64::MAX,
                    most => dice.below(most),
                };
                let time = match cut_within.load(SeqCst) {
                    0 => Duration::from_secs(86_400),
                    most => Duration::from_millis(most / 10 + dice.below(most - most / 10)),
                };
                let rest = dice.below(400);
                let (target, mut generation) = (target.lock().unwrap().clone(), generation.clone());
                generation.mark_unchanged();
                let ended = Arc::clone(&ended);
                tokio::spawn(async move {
                    let mut near = near;
                    if let Ok(far) = TcpStream::connect(target).await {
                        tokio::select! {
                            () = forward(&mut near, far, limit, (Instant::now() + time, rest)) => {}
                            _ = generation.changed() => {}
                        }
                    }
                    // Before the client can notice.
                    ended.fetch_add(1, SeqCst);
                    drop(near);
                });
            }
        });
        proxy
    }

    pub(crate) fn cut_after(&self, bytes: u64) {
        self.cut_after.store(bytes, SeqCst);
    }

    /// Between a tenth of it and all of it.
    pub(crate) fn cut_within(&self, time: Duration) {
        self.cut_within.store(time.as_millis().try_into().unwrap(), SeqCst);
    }

    pub(crate) fn cut_now(&self) {
        self.generation.send_modify(|generation| *generation += 1);
    }

    pub(crate) fn lead_to(&self, target: &str) {
        let target = target.strip_prefix("ws://").map_or(target, |rest| rest.split('/').next().unwrap_or(rest));
        target.clone_into(&mut self.target.lock().unwrap());
    }
}

/// Passes on at most `limit` bytes, of both directions together, and from the time `end` on at most `rest` more.
async fn forward(near: &mut TcpStream, mut far: TcpStream, mut limit: u64, (mut end, mut rest): (Instant, u64)) {
    let (mut out, mut back) = ([0; 1_024], [0; 1_024]);
    while limit > 0 {
        let (read, bytes, to) = tokio::select! {
            read = near.read(&mut out) => (read, &out, &mut far),
            read = far.read(&mut back) => (read, &back, &mut *near),
            () = sleep_until(end) => {
                limit = limit.min(std::mem::take(&mut rest));
                // The second time it is cut, should there be nothing to pass on.
                end += Duration::from_millis(20);
                continue;
            }
        };
        let Ok(len @ 1..) = read else { return };
        let len = len.min(usize::try_from(limit).unwrap_or(usize::MAX));
        limit -= len as u64;
        if to.write_all(&bytes[..len]).await.is_err() {
            return;
        }
    }
}
