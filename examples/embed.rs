//! nkv inside a program: threads and tasks that share state, with no socket anywhere.
//!
//! ```text
//! cargo run -p nkv-examples --example embed
//! ```
//!
//! Two ways. `NotifyKeyValue` alone, for programs of plain threads: no runtime, nothing runs by itself. And a `Node`, for
//! programs with a Tokio runtime: its writes share a sync, its keys expire by themselves, and a door can be added the day
//! another process wants to take part.

use std::error::Error;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use nkv_core::mailbox::{Item, Mailbox, mailbox};
use nkv_core::{Action, EventKind, NoPersist, NotifyKeyValue};
use nkv_node::{ErrorKind, Event, GoneReason, Handle, Key, Node, Pattern, PutOptions, Revision};
use nkv_persist_fs::{FsOptions, FsPersist};

/// Readings of each sensor.
const READINGS: u32 = 1_000;

type AnyError = Box<dyn Error + Send + Sync>;

fn main() -> Result<(), AnyError> {
    plain_threads()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(tasks_and_threads())
}

/// Four sensors, each a thread, and a display that sees the newest reading of each, however slow it is.
fn plain_threads() -> Result<(), AnyError> {
    let store: NotifyKeyValue<NoPersist, Mailbox> = NotifyKeyValue::open(NoPersist::default())?;
    let sensors = ["north", "east", "south", "west"];
    let (post, inbox) = mailbox();
    store.subscribe(Pattern::new("sensor")?, "display".into(), post, false);

    thread::scope(|scope| {
        for name in sensors {
            let store = &store;
            scope.spawn(move || measure(store, name));
        }
        let display = scope.spawn(move || {
            let (mut shown, mut finished) = (0, 0);
            while finished < sensors.len() {
                let Some(Item::Event { event, .. }) = inbox.take_timeout(Duration::from_secs(10)) else { break };
                shown += 1;
                finished += usize::from(put_value(&event) == Some(READINGS.to_string().as_bytes()));
            }
            (shown, finished)
        });
        let (shown, finished) = display.join().map_err(|_| "the display broke")?;
        println!("threads: {shown} of {} events were shown, {finished} last readings", sensors.len() as u32 * READINGS);
        assert_eq!(finished, sensors.len());
        Ok(())
    })
}

fn measure(store: &NotifyKeyValue<NoPersist, Mailbox>, name: &str) {
    let key = Key::new(&format!("sensor.{name}")).expect("the names above are segments");
    for reading in 1..=READINGS {
        store.put(&key, reading.to_string(), nkv_core::PutOptions::default()).expect("nothing can fail in memory");
    }
}

/// Tasks count together with conditional writes, an OS thread watches them, and what they made survives.
async fn tasks_and_threads() -> Result<(), AnyError> {
    let dir = tempfile::tempdir()?;
    let data = dir.path().join("data");
    let node = start(data.clone()).await?;
    let nkv = node.handle();

    let mut watched = nkv.subscribe(&Pattern::new("total")?).await?;
    let watcher = thread::spawn(move || {
        let mut events = 0;
        while let Some(event) = watched.next_blocking() {
            events += 1;
            if matches!(event, Event::Update { entry, .. } if entry.value == "40") {
                return events;
            }
        }
        0
    });

    let counters: Vec<_> = (0..4).map(|_| tokio::spawn(add(nkv.clone(), 10))).collect();
    for counter in counters {
        counter.await??;
    }
    let events = watcher.join().map_err(|_| "the watcher broke")?;
    println!("tasks: four times ten is 40, seen by the watcher in {events} events");
    assert!(events > 0);

    expires_by_itself(&nkv).await?;
    node.shutdown().await?;
    let closed = nkv.get(&Key::new("total")?).await;
    assert!(matches!(closed, Err(error) if error.kind() == &ErrorKind::Closed));

    let node = start(data).await?;
    let total = node.handle().get(&Key::new("total")?).await?.ok_or("the total was forgotten")?;
    println!("after a restart the total is {:?}, revision {}", total.value, total.revision);
    assert_eq!(total.value, "40");
    Ok(node.shutdown().await?)
}

async fn start(data: PathBuf) -> Result<Node, AnyError> {
    let open = || FsPersist::open(data, FsOptions::default());
    Ok(Node::builder().persist("sync", open).start().await?)
}

/// Adds one, `times` times: reads, writes only if the key is unchanged, and otherwise reads again.
async fn add(nkv: Handle, times: u32) -> Result<(), AnyError> {
    let key = Key::new("total")?;
    let mut done = 0;
    while done < times {
        let (total, revision) = match nkv.get(&key).await? {
            Some(record) => (std::str::from_utf8(&record.value)?.parse::<u32>()?, record.revision),
            None => (0, Revision::ZERO),
        };
        let options = PutOptions::default().with_if_revision(revision);
        match nkv.put_with(&key, (total + 1).to_string(), options).await {
            Ok(_) => done += 1,
            Err(error) if matches!(error.kind(), ErrorKind::Conflict { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// A value with a TTL ends by itself, and its subscribers get the reason.
async fn expires_by_itself(nkv: &Handle) -> Result<(), AnyError> {
    let key = Key::new("session.1")?;
    nkv.put_with(&key, "alive", PutOptions::default().with_ttl(Duration::from_millis(50))).await?;
    let mut session = nkv.subscribe(&Pattern::from(&key)).await?;
    loop {
        let next = tokio::time::timeout(Duration::from_secs(10), session.next());
        match next.await?.ok_or("the node has stopped")? {
            Event::Gone { key, reason: GoneReason::Expired, .. } => {
                println!("{key} has expired");
                return Ok(());
            }
            Event::Synced { .. } if nkv.get(&key).await?.is_none() => return Ok(()),
            _ => {}
        }
    }
}

/// The value in an event.
fn put_value(event: &nkv_core::Event) -> Option<&[u8]> {
    match event.kind() {
        EventKind::Change(change) => match &change.action {
            Action::Put { value, .. } => Some(value),
            Action::Delete { .. } => None,
        },
        _ => None,
    }
}
