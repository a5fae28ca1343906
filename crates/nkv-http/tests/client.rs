//! The client over the door's WebSocket: what it does over TCP, through a server that comes and goes.

mod support;

use std::time::Duration;

use nkv_client::{Client, Event};
use nkv_http::Door;
use nkv_node::Node;
use support::{PATIENCE, TestDoor};
use tokio::net::TcpListener;
use tokio::time::timeout;

#[tokio::test]
async fn a_client_reads_writes_and_watches_over_a_websocket() {
    let door = TestDoor::start().await;
    let client = Client::connect(&format!("ws://{}", door.address)).await.unwrap();
    let value = vec![0xfe; 900_000];
    client.put("big", value.clone()).await.unwrap();
    assert_eq!(client.get("big").await.unwrap().unwrap().value, value);
    let mut events = client.subscribe("*").await.unwrap();
    let mut seen = 0;
    for n in 0..300 {
        client.put(format!("k.{n}"), format!("{n}")).await.unwrap();
    }
    while seen < 301 {
        if let Event::Update { .. } = timeout(PATIENCE, events.next()).await.unwrap().unwrap() {
            seen += 1;
        }
    }
    assert_eq!(client.get_all("k.*").await.unwrap().len(), 300);
    assert!(client.delete("k.*").await.unwrap().count == 300);
}

/// The same port, another life of the data: the client comes back by itself, and knows what is gone.
#[tokio::test]
async fn a_client_comes_back_by_itself() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serve = async |listener: TcpListener| {
        let node = Node::builder().start().await.expect("a node");
        let lines = nkv_server::Door::new(node.handle(), nkv_server::Options::default());
        let door = Door::new(node.handle(), nkv_http::Options::default()).expect("good options");
        let door = door.with_messages(move |stream, peer| {
            let lines = lines.clone();
            async move { lines.serve(stream, peer).await }
        });
        let handle = node.handle();
        let accepting = tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = handle.stopping() => break,
                    Ok((stream, peer)) = listener.accept() => {
                        let door = door.clone();
                        tokio::spawn(async move { door.serve(stream, peer).await });
                    }
                }
            }
        });
        (node, accepting)
    };
    let (node, accepting) = serve(listener).await;
    node.handle().put("old", "1").await.unwrap();
    let client = Client::connect(&format!("ws://{address}/v1/ws")).await.unwrap();
    let watched = client.watch_branch("*").await.unwrap();
    node.shutdown().await.unwrap();
    accepting.await.unwrap();
    let bound = timeout(PATIENCE, async {
        loop {
            match TcpListener::bind(address).await {
                Ok(listener) => break listener,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    });
    let listener = bound.await.unwrap();
    let (node, _accepting) = serve(listener).await;
    node.handle().put("new", "2").await.unwrap();
    timeout(PATIENCE, async {
        loop {
            let now = watched.borrow().entries.keys().map(ToString::to_string).collect::<Vec<_>>();
            if now == ["new"] {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("it holds what there is now");
    assert_eq!(client.get("old").await.unwrap(), None);
}
