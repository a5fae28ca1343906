//! What this machine can do at best: a server that answers and does nothing else, and a disk that only syncs.

use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use memchr::memchr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};

use crate::hist::Hist;
use crate::report::Figures;
use crate::{Result, sys};

/// A subscriber is written so much at once, at most.
const WRITE_LEN: usize = 256 << 10;

/// The bytes of the file that is synced.
const FILE_LEN: u64 = 64 << 20;

type Subscribers = Arc<Mutex<Vec<UnboundedSender<Arc<[u8]>>>>>;

/// Serves the lines of `drivers/echo.rs` for ever: the least that a server on tokio does for a request.
pub(crate) fn echo(addr: SocketAddr) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(addr).await?;
        let subscribers = Subscribers::default();
        loop {
            let (socket, _) = listener.accept().await?;
            socket.set_nodelay(true)?;
            tokio::spawn(serve(socket, Arc::clone(&subscribers)));
        }
    })
}

/// Serves the requests of `drivers/http.rs` for ever, with axum: what a put sent is thrown away, and a get is answered with a value
/// of the usual length.
pub(crate) fn http_echo(addr: SocketAddr) -> Result<()> {
    use axum::routing::get;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = axum::serve::ListenerExt::tap_io(TcpListener::bind(addr).await?, |socket| {
            _ = socket.set_nodelay(true);
        });
        let value = axum::body::Bytes::from(vec![b'x'; 100]);
        let put = async |_body: axum::body::Bytes| "{\"key\":\"k\",\"revision\":1}\n";
        let route = get(async move || value).put(put);
        Ok(axum::serve(listener, axum::Router::new().route("/v1/kv/{key}", route)).await?)
    })
}

/// Ends without a word when the peer does.
async fn serve(mut socket: TcpStream, subscribers: Subscribers) -> Option<()> {
    let mut input = Vec::with_capacity(64 << 10);
    let mut out = Vec::new();
    loop {
        if socket.read_buf(&mut input).await.ok()? == 0 {
            return None;
        }
        let mut at = 0;
        let mut changes = None;
        while let Some(len) = memchr(b'\n', &input[at..]) {
            let line = &input[at..=at + len];
            at += line.len();
            match line[0] {
                b'G' => {
                    let wanted = std::str::from_utf8(&line[1..len]).ok()?.parse::<usize>().ok()?;
                    out.resize(out.len() + wanted, b'x');
                    out.push(b'\n');
                    continue;
                }
                b'S' => {
                    let (tx, rx) = mpsc::unbounded_channel();
                    subscribers.lock().unwrap_or_else(PoisonError::into_inner).push(tx);
                    changes = Some(rx);
                }
                _ => tell(&subscribers, line),
            }
            out.extend_from_slice(b"OK\n");
        }
        input.drain(..at);
        socket.write_all(&out).await.ok()?;
        out.clear();
        if let Some(changes) = changes {
            return follow(socket, changes).await;
        }
    }
}

fn tell(subscribers: &Subscribers, line: &[u8]) {
    let mut subscribers = subscribers.lock().unwrap_or_else(PoisonError::into_inner);
    if !subscribers.is_empty() {
        let line: Arc<[u8]> = line.into();
        subscribers.retain(|subscriber| subscriber.send(Arc::clone(&line)).is_ok());
    }
}

async fn follow(mut socket: TcpStream, mut changes: UnboundedReceiver<Arc<[u8]>>) -> Option<()> {
    let mut out = Vec::new();
    loop {
        out.extend_from_slice(&changes.recv().await?);
        while out.len() < WRITE_LEN
            && let Ok(change) = changes.try_recv()
        {
            out.extend_from_slice(&change);
        }
        socket.write_all(&out).await.ok()?;
        out.clear();
    }
}

/// Writes `len` bytes and syncs them, over and over. The file grows, or was written before (`zeroed`).
pub(crate) fn fdatasync(dir: &Path, zeroed: bool, len: usize, seconds: f64) -> Result<Figures> {
    let path = dir.join("fdatasync");
    let file = std::fs::File::create_new(&path)?;
    if zeroed {
        let zeros = vec![0; 1 << 20];
        for at in (0..FILE_LEN).step_by(zeros.len()) {
            file.write_all_at(&zeros, at)?;
        }
        file.sync_all()?;
    }
    let data = vec![b'r'; len];
    let (begin, cpu) = (sys::now(), sys::own_cpu_s());
    let end = begin + (seconds * 1e9) as u64;
    let (mut hist, mut at) = (Hist::new(), 0);
    while sys::now() < end {
        if zeroed && at + len as u64 > FILE_LEN {
            at = 0;
        }
        let start = sys::now();
        file.write_all_at(&data, at)?;
        file.sync_data()?;
        hist.add(sys::now() - start);
        at += len as u64;
    }
    std::fs::remove_file(&path)?;
    let taken = (sys::now() - begin) as f64 / 1e9;
    Ok(Figures::from([
        ("syncs_per_s", hist.count as f64 / taken),
        ("p50_us", hist.us(0.5)),
        ("p99_us", hist.us(0.99)),
        ("own_cpu_s", sys::own_cpu_s() - cpu),
    ]))
}
