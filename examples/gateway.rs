//! A gateway in sixty lines: a door of your own, for a protocol that nkv does not speak.
//!
//! ```text
//! cargo run -p nkv-examples --example gateway -- 127.0.0.1:4223     # then: nc 127.0.0.1 4223
//! cargo run -p nkv-examples --example gateway                       # a check
//! ```
//!
//! A request is a line of words: `get KEY`, `put KEY VALUE`, `delete KEY`, `watch KEY`. All of it goes through the `Handle` of a
//! node, so the limits of values and subscriptions, rights and figures hold here as in every door. The same handle can serve
//! nkv's own protocol at another address.
//!
//! A door for strangers also needs a limit for a line, deadlines, and a `Peer` by which the node counts what it holds:
//! nkv-server has them.

use std::error::Error;
use std::time::Duration;

use nkv_node::{Event, Handle, Node};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;

type AnyError = Box<dyn Error + Send + Sync>;

/// Accepts connections until the node stops.
async fn listen(listener: TcpListener, nkv: Handle) -> Result<(), AnyError> {
    loop {
        tokio::select! {
            accepted = listener.accept() => drop(tokio::spawn(serve(accepted?.0, nkv.clone()))),
            () = nkv.stopping() => return Ok(()),
        }
    }
}

/// Serves one connection, of any kind.
async fn serve(stream: impl AsyncRead + AsyncWrite + Send + 'static, nkv: Handle) -> Result<(), AnyError> {
    let (read, mut write) = tokio::io::split(stream);
    let mut lines = BufReader::new(read).lines();
    while let Some(line) = lines.next_line().await? {
        if let Some(key) = line.strip_prefix("watch ") {
            return watch(&nkv, key, &mut write).await;
        }
        let answer = answer(&nkv, &line).await.unwrap_or_else(|error| format!("error: {error}"));
        write.write_all(format!("{answer}\n").as_bytes()).await?;
    }
    Ok(())
}

async fn answer(nkv: &Handle, line: &str) -> Result<String, AnyError> {
    let words: Vec<_> = line.splitn(3, ' ').collect();
    Ok(match words[..] {
        ["get", key] => match nkv.get(key).await? {
            Some(entry) => format!("{} {}", entry.revision, entry.value.escape_ascii()),
            None => "not found".into(),
        },
        ["put", key, value] => nkv.put(key, value).await?.to_string(),
        ["delete", key] => nkv.delete(key).await?.count.to_string(),
        _ => return Err("the requests are: get KEY, put KEY VALUE, delete KEY, watch KEY".into()),
    })
}

/// The present state of a branch, then each change: until the peer has gone, which a write shows, or the node stops.
async fn watch(nkv: &Handle, key: &str, write: &mut (impl AsyncWrite + Unpin)) -> Result<(), AnyError> {
    let mut events = nkv.subscribe(key).await?;
    while let Some(event) = events.next().await {
        let line = match event {
            Event::Update { entry, .. } => format!("put {} {}\n", entry.key, entry.value.escape_ascii()),
            Event::Gone { key, .. } => format!("gone {key}\n"),
            Event::Synced { revision, .. } => format!("synced {revision}\n"),
            _ => continue,
        };
        write.write_all(line.as_bytes()).await?;
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), AnyError> {
    let node = Node::builder().start().await?;
    if let Some(address) = std::env::args().nth(1) {
        return listen(TcpListener::bind(address).await?, node.handle()).await;
    }

    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let gateway = tokio::spawn(listen(listener, node.handle()));
    let mut client = BufReader::new(tokio::net::TcpStream::connect(address).await?);
    for (request, answer) in [
        ("put lamp.hall on", "1"),
        ("get lamp.hall", "1 on"),
        ("get lamp.cellar", "not found"),
        ("get lamp..hall", "error: empty segment at byte 5: a key is segments joined by single dots, such as a.b.c"),
        ("watch lamp", "put lamp.hall on"),
    ] {
        client.write_all(format!("{request}\n").as_bytes()).await?;
        assert_eq!(line(&mut client).await?, answer);
    }
    assert_eq!(line(&mut client).await?, "synced 1");
    node.handle().put("lamp.hall", "off").await?; // from within the process
    assert_eq!(line(&mut client).await?, "put lamp.hall off");

    node.shutdown().await?;
    assert_eq!(line(&mut client).await?, ""); // the connection has ended
    gateway.await??;
    println!("put, got, watched and stopped");
    Ok(())
}

async fn line(client: &mut (impl AsyncBufReadExt + Unpin)) -> Result<String, AnyError> {
    let mut line = String::new();
    tokio::time::timeout(Duration::from_secs(10), client.read_line(&mut line)).await??;
    Ok(line.trim_end().to_owned())
}
