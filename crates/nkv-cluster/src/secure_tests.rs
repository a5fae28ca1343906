//! Sessions over streams in memory, with someone between who may do anything to the bytes; and handshakes over TCP.

use tokio::io::{DuplexStream, duplex, split};
use tokio::net::{TcpListener, TcpStream};

use super::*;

const PATIENCE: Duration = Duration::from_secs(30);

/// What the one that opened a connection sends until its first content: a message of the handshake and an empty record.
const OPENING: usize = HEAD + HANDSHAKE_LEN + HEAD + TAG;

fn keys(of: &[u8]) -> Keys {
    Keys::new(&of.iter().map(|byte| [*byte; 32]).collect::<Vec<_>>()).unwrap()
}

fn secret(of: &[u8]) -> Secret {
    Secret::new("home", keys(of))
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(PATIENCE, what).await.expect("it takes too long")
}

async fn accepted(secret: &Secret, stream: impl Stream) -> io::Result<Secure> {
    secret.accept(Box::new(stream)).await?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

async fn read(from: &mut DuplexStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    soon(from.read_exact(&mut bytes)).await.unwrap();
    bytes
}

/// All that comes until the end, which is an error.
async fn read_all(from: &mut (impl AsyncRead + Unpin)) -> (Vec<u8>, io::Error) {
    let mut bytes = Vec::new();
    loop {
        match soon(from.read_buf(&mut bytes)).await {
            Ok(0) => panic!("an end without an error, after {bytes:?}"),
            Ok(_) => {}
            Err(error) => return (bytes, error),
        }
    }
}

/// A session, and what stands between its ends.
struct Between {
    /// Opened the connection.
    a: Secure,
    b: Secure,
    to_a: DuplexStream,
    to_b: DuplexStream,
    /// What each sent for the handshake.
    of_a: Vec<u8>,
    of_b: Vec<u8>,
}

async fn between(secret: &Secret) -> Between {
    let ((a, mut to_a), (b, mut to_b)) = (duplex(1 << 20), duplex(1 << 20));
    let carried = async {
        let first = read(&mut to_a, HEAD + HANDSHAKE_LEN).await;
        to_b.write_all(&first).await.unwrap();
        let answer = read(&mut to_b, HEAD + HANDSHAKE_LEN).await;
        to_a.write_all(&answer).await.unwrap();
        let last = read(&mut to_a, HEAD + TAG).await;
        to_b.write_all(&last).await.unwrap();
        ([first, last].concat(), answer)
    };
    let (a, b, (of_a, of_b)) =
        soon(async { tokio::join!(secret.open(Box::new(a)), accepted(secret, b), carried) }).await;
    Between { a: a.unwrap(), b: b.unwrap(), to_a, to_b, of_a, of_b }
}

/// One record of it, as it is sent.
async fn record(from: &mut Secure, raw: &mut DuplexStream, content: &[u8]) -> Vec<u8> {
    from.write_all(content).await.unwrap();
    from.flush().await.unwrap();
    read(raw, HEAD + content.len() + TAG).await
}

/// What is answered to a peer that says these bytes, and why it is refused.
async fn answer_to(secret: &Secret, said: &[u8]) -> (Vec<u8>, io::Error) {
    let (mut peer, own) = duplex(1 << 20);
    peer.write_all(said).await.unwrap();
    let error = soon(async {
        tokio::select! {
            accepted = accepted(secret, own) => accepted.unwrap_err(),
            () = tokio::time::sleep(PATIENCE / 2) => panic!("it waits for more"),
        }
    })
    .await;
    let mut told = Vec::new();
    soon(peer.read_to_end(&mut told)).await.unwrap();
    (told, error)
}

#[tokio::test]
async fn what_is_said_arrives_in_both_directions_and_cannot_be_read_on_the_way() {
    let Between { a, b, to_a, to_b, .. } = between(&secret(&[1])).await;
    // One that keeps all that it carries.
    async fn carry(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let had = all.len();
            if from.read_buf(&mut all).await.unwrap() == 0 {
                return all;
            }
            if to.write_all(&all[had..]).await.is_err() {
                return all;
            }
        }
    }
    let content: Vec<u8> = b"a secret of the cluster ".iter().copied().cycle().take(300_000).collect();
    let ((mut a_from, mut a_to), (mut b_from, mut b_to)) = (split(a), split(b));
    let ((ma_from, ma_to), (mb_from, mb_to)) = (split(to_a), split(to_b));
    let there = tokio::spawn(carry(ma_from, mb_to));
    drop(tokio::spawn(carry(mb_from, ma_to)));
    let said = content.clone();
    // Both halves of a stream are in one task, as in a line.
    let b = tokio::spawn(async move {
        let mut heard = vec![0; said.len()];
        let (read, written) = tokio::join!(b_from.read_exact(&mut heard), async {
            for part in said.chunks(1_000) {
                b_to.write_all(part).await?;
            }
            b_to.flush().await
        });
        read.and(written.map(|()| 0)).unwrap();
        (heard, b_from, b_to)
    });
    let mut heard = vec![0; content.len()];
    let (read, written) = soon(async {
        tokio::join!(a_from.read_exact(&mut heard), async {
            a_to.write_all(&content).await?;
            a_to.flush().await
        })
    })
    .await;
    read.and(written.map(|()| 0)).unwrap();
    assert!(heard == content && soon(b).await.unwrap().0 == content);
    drop((a_from, a_to));
    let carried = soon(there).await.unwrap();
    assert!(carried.len() > content.len() && !carried.windows(8).any(|window| window == b"a secret"));
}

#[tokio::test]
async fn a_peer_without_the_key_is_refused_and_nothing_is_said_to_it() {
    let own = secret(&[1, 2]);
    let mut another_version = secret(&[1]);
    another_version.prologue = [b"nkv-cluster".as_slice(), &(wire::VERSION + 1).to_be_bytes(), b"home"].concat().into();
    for stranger in [secret(&[3]), Secret::new("away", keys(&[1])), another_version] {
        let (a, b) = duplex(1 << 10);
        let (opened, accepted) = soon(async { tokio::join!(stranger.open(Box::new(a)), accepted(&own, b)) }).await;
        assert_eq!(opened.unwrap_err().to_string(), "it ended the connection");
        assert_eq!(accepted.unwrap_err().to_string(), "it has none of the keys, or another cluster's name");
    }
    for (said, why) in [
        (b"\0\0\0\x30\x01nkvc, and so on, as a node without keys says".as_slice(), "it speaks in plain text"),
        (b"GET / HTTP/1.1\r\n\r\n", "it speaks another protocol"),
        (&[[0, 48].as_slice(), &[0; 48]].concat(), "it has none of the keys, or another cluster's name"),
    ] {
        let (told, error) = answer_to(&own, said).await;
        assert_eq!((told, error.to_string()), (vec![], why.to_owned()));
    }
}

#[tokio::test]
async fn a_peer_that_cannot_answer_is_given_no_more_than_an_ephemeral_key() {
    let own = secret(&[1]);
    for answer in [b"\0\x30".iter().copied().chain(1..=48).collect::<Vec<u8>>(), b"\0\0\0\x10 in plain text".to_vec()] {
        let (a, mut peer) = duplex(1 << 10);
        peer.write_all(&answer).await.unwrap();
        soon(own.open(Box::new(a))).await.unwrap_err();
        let mut told = Vec::new();
        soon(peer.read_to_end(&mut told)).await.unwrap();
        assert_eq!(told.len(), HEAD + HANDSHAKE_LEN);
    }
}

#[tokio::test]
async fn a_recorded_connection_is_refused() {
    let own = secret(&[1]);
    let mut before = between(&own).await;
    let said = record(&mut before.a, &mut before.to_a, b"put").await;
    // To the one that accepted it: its answer has an ephemeral key of its own, and what was recorded does not go with that.
    let (told, error) = answer_to(&own, &[before.of_a, said].concat()).await;
    assert_eq!(error.to_string(), "a record is not what the peer sent next");
    assert_eq!(told.len(), HEAD + HANDSHAKE_LEN);
    // To one that opens a connection.
    let heard = record(&mut before.b, &mut before.to_b, b"value").await;
    let (a, mut peer) = duplex(1 << 10);
    peer.write_all(&[before.of_b, heard].concat()).await.unwrap();
    let error = soon(own.open(Box::new(a))).await.unwrap_err();
    assert_eq!(error.to_string(), "its answer is not that of a node that has the key");
}

#[tokio::test]
async fn what_a_node_said_itself_is_refused() {
    let own = secret(&[1]);
    let (a, mut peer) = duplex(1 << 10);
    let reflect = async {
        let said = read(&mut peer, HEAD + HANDSHAKE_LEN).await;
        peer.write_all(&said).await.unwrap();
    };
    let (opened, ()) = soon(async { tokio::join!(own.open(Box::new(a)), reflect) }).await;
    assert_eq!(opened.unwrap_err().to_string(), "its answer is not that of a node that has the key");
    // The first record, which is the first one in the other direction too.
    let mut session = between(&own).await;
    let said = record(&mut session.b, &mut session.to_b, b"value").await;
    session.to_b.write_all(&said).await.unwrap();
    assert_eq!(read_all(&mut session.b).await.0, b"");
    session.to_a.write_all(&session.of_a[HEAD + HANDSHAKE_LEN..]).await.unwrap();
    assert_eq!(read_all(&mut session.a).await.0, b"");
}

#[tokio::test]
async fn records_that_come_twice_in_another_order_or_not_at_all_are_refused() {
    for (order, arrives) in [(&[0, 0][..], "one"), (&[1, 0], ""), (&[0, 2], "one"), (&[0, 1, 0], "onetwo")] {
        let mut session = between(&secret(&[1])).await;
        let mut records = Vec::new();
        for content in ["one", "two", "three"] {
            records.push(record(&mut session.a, &mut session.to_a, content.as_bytes()).await);
        }
        for number in order {
            session.to_b.write_all(&records[*number]).await.unwrap();
        }
        let (heard, error) = read_all(&mut session.b).await;
        assert_eq!((heard, error.to_string()), (arrives.into(), "a record is not what the peer sent next".into()));
        // It stays failed, whatever comes then.
        session.to_b.write_all(&records[1]).await.unwrap();
        assert_eq!(read_all(&mut session.b).await.0, b"");
        assert!(session.b.write_all(b"x").await.is_err());
    }
}

/// What arrives of `one` and `two` through someone who changes the bytes of the one that opened the connection, and ends then.
async fn arrives(
    own: &Secret,
    mut change: impl FnMut(usize, u8) -> Option<u8> + Send + 'static,
) -> io::Result<Vec<u8>> {
    let ((a, to_a), (b, to_b)) = (duplex(1 << 10), duplex(1 << 10));
    let ((mut a_said, mut a_hears), (mut b_said, mut b_hears)) = (split(to_a), split(to_b));
    drop(tokio::spawn(async move {
        let mut at = 0;
        while let Ok(byte) = a_said.read_u8().await {
            let Some(changed) = change(at, byte) else { break };
            at += 1;
            if b_hears.write_all(&[changed]).await.is_err() {
                break;
            }
        }
        b_hears.shutdown().await
    }));
    drop(tokio::spawn(async move {
        // What does not arrive any more is of no interest.
        drop(tokio::io::copy(&mut b_said, &mut a_hears).await);
        a_hears.shutdown().await
    }));
    let says = async {
        let mut a = own.open(Box::new(a)).await?;
        for content in [b"one", b"two"] {
            a.write_all(content).await?;
            a.flush().await?;
        }
        a.shutdown().await
    };
    let hears = async { Ok(read_all(&mut accepted(own, b).await?).await.0) };
    soon(async { tokio::join!(says, hears) }).await.1
}

#[tokio::test]
async fn no_changed_bit_and_no_cut_goes_unnoticed() {
    const RECORD: usize = HEAD + 3 + TAG;
    let own = secret(&[1]);
    assert_eq!(arrives(&own, |_, byte| Some(byte)).await.unwrap(), b"onetwo");
    for place in 0..OPENING + 2 * RECORD {
        let expected = match place.checked_sub(OPENING) {
            None => None,
            Some(place) if place < RECORD => Some(b"".as_slice()),
            Some(_) => Some(b"one".as_slice()),
        };
        let flip = move |at, byte| Some(if at == place { byte ^ 1 << (place % 8) } else { byte });
        assert_eq!(arrives(&own, flip).await.ok().as_deref(), expected, "the byte {place} is changed");
        // In the heads, and in and behind some messages.
        if place % 4 == 0 || place >= OPENING {
            let cut = move |at, byte| (at < place).then_some(byte);
            assert_eq!(arrives(&own, cut).await.ok().as_deref(), expected, "it is cut at {place}");
        }
    }
}

#[tokio::test]
async fn a_session_goes_on_while_its_key_is_one_of_the_keys_and_ends_with_it() {
    let own = secret(&[1]);
    let mut session = between(&own).await;
    for (number, rotated) in [keys(&[1, 2]), keys(&[2, 1])].into_iter().enumerate() {
        own.set(rotated);
        let said = record(&mut session.a, &mut session.to_a, &[b'0' + number as u8]).await;
        session.to_b.write_all(&said).await.unwrap();
        assert_eq!(soon(session.b.read_u8()).await.unwrap(), b'0' + number as u8);
    }
    let waits = read_all(&mut session.b);
    let (ended, ()) = tokio::join!(waits, async {
        tokio::task::yield_now().await;
        own.set(keys(&[2]));
    });
    assert_eq!((ended.0, ended.1.to_string()), (vec![], gone().to_string()));
    assert_eq!(session.a.write_all(b"x").await.unwrap_err().to_string(), gone().to_string());
    // The first key is used, each is taken.
    let (a, b) = duplex(1 << 10);
    let (one, other) = (secret(&[2, 1]), secret(&[1, 2]));
    let (opened, accepted) = soon(async { tokio::join!(one.open(Box::new(a)), accepted(&other, b)) }).await;
    assert_eq!((opened.unwrap().key, accepted.unwrap().key), (keys(&[2]).first().clone(), keys(&[2]).first().clone()));
}

async fn listen(secret: &Secret, patience: Duration) -> (Arc<SecureTcp>, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (Arc::new(SecureTcp::new(Tcp(listener), secret.clone(), patience)), address)
}

#[tokio::test]
async fn peers_that_say_nothing_hold_up_no_other_and_only_so_many_are_kept() {
    let own = secret(&[1]);
    let (server, address) = listen(&own, PATIENCE * 10).await;
    let accepting = Arc::clone(&server);
    let accepting = tokio::spawn(async move { accepting.accept().await.map(drop) });
    let mut silent = Vec::new();
    for _ in 0..NEWCOMERS_MAX + 8 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(&[0]).await.unwrap();
        silent.push(stream);
    }
    let (client, _) = listen(&own, PATIENCE).await;
    let _stream = soon(client.connect(address)).await.unwrap();
    soon(accepting).await.unwrap().unwrap();
    assert!(server.handshakes.lock().unwrap().tasks.len() <= NEWCOMERS_MAX);
    // Those that came first.
    for stream in &mut silent[..8] {
        assert!(!matches!(soon(stream.read(&mut [0])).await, Ok(1..)));
    }
    let last = silent.last_mut().unwrap();
    assert!(timeout(Duration::from_millis(50), last.read(&mut [0])).await.is_err(), "one within the limit is left");
}

#[tokio::test]
async fn a_handshake_has_a_time_limit_on_both_sides() {
    let (server, address) = listen(&secret(&[1]), Duration::from_millis(100)).await;
    let accepting = Arc::clone(&server);
    drop(tokio::spawn(async move { accepting.accept().await.map(drop) }));
    let mut silent = TcpStream::connect(address).await.unwrap();
    assert_eq!(soon(silent.read(&mut [0])).await.unwrap(), 0);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let error = soon(server.connect(listener.local_addr().unwrap())).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
}
