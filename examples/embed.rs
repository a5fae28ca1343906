//! nkv inside a program: threads and tasks that share state, with no socket anywhere.
//!
//! ```text
//! cargo run -p nkv-examples --example embed
//! ```
//!
//! Two ways. `NotifyKeyValue` alone, for programs of plain threads: no runtime, nothing runs by itself. And a `Server`
//! without an address, for programs with a Tokio runtime: its writes share flushes, its keys expire by themselves, and
//! an address can be added the day another process wants to take part.

use std::error::Error;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use nkv_core::mailbox::{Item, Mailbox, mailbox};
use nkv_core::{
    Action, Event, EventKind, Key, NoPersist, NotifyKeyValue, Pattern, PutOptions, Reason, Revision, WriteError,
};
use nkv_persist_fs::{FsOptions, FsPersist};
use nkv_server::{Handle, HandleError, Server, WriteOptions};

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
        store.put(&key, reading.to_string(), PutOptions::default()).expect("nothing can fail in memory");
    }
}

/// Tasks count together with conditional writes, an OS thread watches them, and what they made survives.
async fn tasks_and_threads() -> Result<(), AnyError> {
    let dir = tempfile::tempdir()?;
    let data = dir.path().join("data");
    let server = start(data.clone()).await?;
    let nkv = server.handle();

    let mut watched = nkv.subscribe(Pattern::new("total")?, "watcher", true).await?;
    let watcher = thread::spawn(move || {
        let mut events = 0;
        while let Some(notice) = watched.next_blocking() {
            events += 1;
            if put_value(&notice.event) == Some(b"40") {
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
    server.shutdown().await?;
    assert!(matches!(nkv.get(&Key::new("total")?).await, Err(HandleError::Stopped)));

    let server = start(data).await?;
    let total = server.handle().get(&Key::new("total")?).await?.ok_or("the total was forgotten")?;
    println!("after a restart the total is {:?}, revision {}", total.value, total.revision);
    assert_eq!(total.value, "40");
    Ok(server.shutdown().await?)
}

async fn start(data: PathBuf) -> Result<Server, AnyError> {
    let open = || FsPersist::open(data, FsOptions::default());
    Ok(Server::builder().persist("sync", open).bind().await?)
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
        let options = WriteOptions::default().with_if_revision(revision);
        match nkv.put(&key, (total + 1).to_string(), options).await {
            Ok(_) => done += 1,
            Err(HandleError::Write(WriteError::Conflict { .. })) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// A value with a TTL ends by itself, and its subscribers get the reason.
async fn expires_by_itself(nkv: &Handle) -> Result<(), AnyError> {
    let key = Key::new("session.1")?;
    let mut session = nkv.subscribe(Pattern::from(&key), "watcher", false).await?;
    nkv.put(&key, "alive", WriteOptions::default().with_ttl(Duration::from_millis(50))).await?;
    loop {
        let next = tokio::time::timeout(Duration::from_secs(10), session.next());
        let notice = next.await?.ok_or("the server has stopped")?;
        if let EventKind::Change(change) = notice.event.kind()
            && change.action == (Action::Delete { reason: Reason::Expired })
        {
            println!("{} has expired", change.key);
            return Ok(());
        }
    }
}

/// The value in an event.
fn put_value(event: &Event) -> Option<&[u8]> {
    match event.kind() {
        EventKind::Change(change) => match &change.action {
            Action::Put { value, .. } => Some(value),
            Action::Delete { .. } => None,
        },
        _ => None,
    }
}
