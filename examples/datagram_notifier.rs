//! A notifier of your own, served by the default server: it sends each event as one datagram, a text header and then the value.
//! Any language reads it with one system call.
//!
//! ```text
//! cargo run -p nkv-examples --example datagram_notifier
//! ```
//!
//! A mailbox stands between the store and the socket. The store never waits for it, and it conflates: while the receiver's queue
//! is full, the thread below waits in `send`, and a newer value of a key takes the place of an older one. A Unix datagram socket
//! keeps order and loses nothing, so the receiver ends with the latest value of each key. UDP does neither: compare revisions
//! there, and subscribe again with a snapshot from time to time.

use std::error::Error;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nkv_client::Client;
use nkv_core::mailbox::{Inbox, Item, Mailbox, mailbox};
use nkv_core::{Action, BeginCause, Delivery, Event, EventKind, Notifier, Pattern};
use nkv_node::AttachOptions;
use nkv_server::Server;

/// The largest value that is sent. A receiver gets a larger one by its key.
const VALUE_LEN_MAX: usize = 16 * 1024;

/// Values that the example puts.
const READINGS: u32 = 2_000;

/// Sends the events of one subscriber to a connected socket.
#[derive(Debug)]
struct DatagramNotifier {
    post: Mailbox,
}

impl DatagramNotifier {
    fn spawn(socket: UnixDatagram) -> Self {
        let (post, inbox) = mailbox();
        // When the receiver is gone, `send` fails, the inbox is dropped, and the store gets `Closed` with its next event.
        thread::spawn(move || send_all(&inbox, &socket));
        DatagramNotifier { post }
    }
}

impl Notifier for DatagramNotifier {
    fn notify(&self, event: &Arc<Event>) -> Delivery {
        self.post.notify(event)
    }
}

fn send_all(inbox: &Inbox, socket: &UnixDatagram) -> io::Result<()> {
    while let Some(Item::Event { event, skipped }) = inbox.take_blocking() {
        match event.kind() {
            EventKind::Change(change) => {
                let (key, revision) = (&change.key, change.revision);
                match &change.action {
                    Action::Put { value, .. } => send_put(socket, key.as_str(), revision.get(), skipped, value)?,
                    Action::Delete { reason } => {
                        let text = format!("{} {key} {revision} {skipped}\n", reason.as_str());
                        socket.send(text.as_bytes())?;
                    }
                }
            }
            EventKind::Snapshot(part) => {
                for record in part.records.iter() {
                    send_put(socket, record.key.as_str(), record.revision.get(), 0, &record.value)?;
                }
                if part.is_last {
                    socket.send(format!("synced {} {}\n", part.pattern, part.revision).as_bytes())?;
                }
            }
            // The backlog was dropped: the present state follows, and a key that is not in it is gone.
            EventKind::Began(began) if began.cause == BeginCause::Reset => {
                socket.send(format!("reset {}\n", began.pattern).as_bytes())?;
            }
            EventKind::Ended { pattern, reason } => {
                socket.send(format!("ended {pattern} {}\n", reason.as_str()).as_bytes())?;
            }
            _ => {}
        }
    }
    Ok(())
}

fn send_put(socket: &UnixDatagram, key: &str, revision: u64, skipped: u64, value: &[u8]) -> io::Result<()> {
    let fits = value.len() <= VALUE_LEN_MAX;
    let mut datagram = format!("{} {key} {revision} {skipped}\n", if fits { "put" } else { "large" }).into_bytes();
    datagram.extend_from_slice(if fits { value } else { &[] });
    socket.send(&datagram).map(drop)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let server = Server::builder().listen("127.0.0.1:0".parse()?).bind().await?;
    let (ours, theirs) = UnixDatagram::pair()?;
    theirs.set_read_timeout(Some(Duration::from_secs(10)))?;
    let notifier = Box::new(DatagramNotifier::spawn(ours));
    let display = server.handle().attach(Pattern::new("sensor")?, notifier, &AttachOptions::default())?;

    let mut buffer = vec![0; VALUE_LEN_MAX + 4_096];
    let mut receive = || -> Result<String, Box<dyn Error>> {
        let len = theirs.recv(&mut buffer)?;
        Ok(String::from_utf8(buffer[..len].to_vec())?)
    };
    assert_eq!(receive()?, "synced sensor 0\n");

    // Another process puts, and the receiver is slow: it misses some values, and never the last.
    let client = Client::connect(&server.addresses()[0].to_string()).await?;
    for reading in 1..=READINGS {
        client.put("sensor.north", reading.to_string()).await?;
    }
    let (mut received, mut conflated) = (0, 0);
    let mut value = String::new();
    while value != READINGS.to_string() {
        let datagram = receive()?;
        let (header, last) = datagram.split_once('\n').ok_or("no header")?;
        let ["put", "sensor.north", _revision, skipped] = header.split(' ').collect::<Vec<_>>()[..] else {
            return Err(datagram.into());
        };
        (received, conflated, value) = (received + 1, conflated + skipped.parse::<u32>()?, last.to_owned());
    }
    println!("{received} datagrams, {conflated} values conflated");
    assert_eq!(received + conflated, READINGS);

    client.put("sensor.north", vec![b'x'; VALUE_LEN_MAX + 1]).await?;
    assert_eq!(receive()?, format!("large sensor.north {} 0\n", READINGS + 1));
    client.delete("sensor.north").await?;
    assert_eq!(receive()?, format!("deleted sensor.north {} 0\n", READINGS + 2));

    drop(display); // the subscription lives as long as this
    server.shutdown().await?;
    Ok(())
}
