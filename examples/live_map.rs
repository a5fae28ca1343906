//! An embedded server, and a branch of it as a map that is always current.
//!
//! ```text
//! cargo run -p nkv-examples --example live_map
//! ```
//!
//! The program serves other processes at an address, and holds what they publish as one map, without a loop over events.
//! `is_live` says whether the map is the present state. `Client` has the same call: there the map also survives a lost
//! connection.

use std::error::Error;
use std::time::Duration;

use nkv::{Client, FsOptions, FsPersist, Key, PutOptions, Server};

/// What each worker publishes under `worker.NAME`.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
struct Worker {
    jobs: u32,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let temporary = tempfile::tempdir()?;
    let dir = temporary.path().join("data");
    let open = || FsPersist::open(dir, FsOptions::default());
    let server = Server::builder().listen("127.0.0.1:0".parse()?).persist("sync", open).bind().await?;
    let address = server.addresses()[0].to_string();

    let nkv = server.handle();
    let mut workers = nkv.watch_branch_as::<Worker>("worker.*").await?;
    assert!(workers.borrow().is_live && workers.borrow().entries.is_empty());

    // Three workers, each a client of its own. One of them stops to renew its entry, which ends by its TTL.
    for (name, jobs) in [("a", 1), ("b", 2), ("c", 3)] {
        let worker = Client::connect(&address).await?;
        let ttl = if name == "c" { Duration::from_millis(300) } else { Duration::from_secs(3_600) };
        worker.put_as_with(&format!("worker.{name}"), &Worker { jobs }, PutOptions::default().with_ttl(ttl)).await?;
    }
    nkv.put("worker.d", "not JSON").await?;

    let settled = workers.wait_for(|workers| workers.entries.len() == 2 && workers.unreadable.len() == 1);
    let state = tokio::time::timeout(Duration::from_secs(10), settled).await??.clone();
    let jobs: Vec<_> = state.entries.iter().map(|(key, worker)| (key.as_str(), worker.jobs)).collect();
    println!("revision {}: {jobs:?}, unreadable: {:?}", state.revision, state.unreadable.keys());
    assert_eq!(jobs, [("worker.a", 1), ("worker.b", 2)]);
    assert!(state.unreadable.contains_key(&Key::new("worker.d")?));

    server.shutdown().await?;
    let lost = tokio::time::timeout(Duration::from_secs(10), workers.wait_for(|workers| !workers.is_live)).await??;
    assert_eq!(lost.entries.len(), 2); // the last state stays, and says that it is not live
    println!("the server has stopped: {} workers in the last state", lost.entries.len());
    Ok(())
}
