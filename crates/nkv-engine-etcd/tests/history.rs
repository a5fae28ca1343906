//! The warning about an etcd that is never compacted. By itself: a log is of the whole process.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::io;
use std::sync::Mutex;
use std::time::Duration;

use common::{Server, eventually, node, raw_put};

static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct Log;

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        LOG.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn warnings() -> usize {
    String::from_utf8_lossy(&LOG.lock().unwrap()).matches("has kept all of its").count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_history_that_is_never_compacted_is_warned_of_once() {
    tracing_subscriber::fmt().with_writer(|| Log).init();
    let Some(server) = Server::start().await else { return };
    let client = server.client().await;
    let writing = (0..50).map(|n| {
        let mut client = client.clone();
        tokio::spawn(async move {
            for _ in 0..201 {
                client.txn(raw_put(&format!("other/{n}"), vec![b'x'])).await.unwrap();
            }
        })
    });
    for one in writing.collect::<Vec<_>>() {
        one.await.unwrap();
    }
    let engine = server.engine("app");
    let (first, nkv) = node(engine.clone()).await;
    eventually("it is warned of", async || warnings() == 1).await;
    nkv.put("k", "1").await.unwrap();
    first.shutdown().await.unwrap();
    let (second, _) = node(engine).await;
    second.shutdown().await.unwrap();
    server.must(&["compact", &server.revision().to_string()]);
    let (_third, _) = node(server.engine("app")).await;
    // It looks at once.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(warnings(), 1);
}
