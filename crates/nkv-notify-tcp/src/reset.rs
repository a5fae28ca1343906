//! Ending a TCP connection with a reset, once the peer has what was written.
//!
//! A reset discards what is still on its way. Linux says how much that is in answer to a query of its socket monitoring
//! interface (sock_diag(7)), which needs no right and, unlike the ioctl for the same, no unsafe code.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::sleep;

/// So often the system is asked, at first and at last.
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(64);

/// Has the connection end with a reset when its socket is closed, however that comes about.
///
/// # Errors
///
/// What the system says.
pub fn reset_when_closed(socket: &impl AsFd) -> io::Result<()> {
    socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO))
}

/// Has the connection end in order when its socket is closed, as if [`reset_when_closed`] had not been called.
///
/// # Errors
///
/// What the system says.
pub fn end_when_closed(socket: &impl AsFd) -> io::Result<()> {
    socket2::SockRef::from(socket).set_linger(None)
}

/// Waits until the peer has acknowledged all that was written, or is gone. For ever where the system does not say: the
/// caller sets the limit.
///
/// # Cancel safety
///
/// Dropping the future changes nothing.
pub async fn acknowledged(socket: &TcpStream) {
    let mut pause = PAUSE_MIN;
    while let (Ok(local), Ok(peer)) = (socket.local_addr(), socket.peer_addr()) {
        if send_queue_len(local, peer).is_ok_and(|len| len == 0) {
            return;
        }
        sleep(pause).await;
        pause = pause.saturating_mul(2).min(PAUSE_MAX);
    }
}

/// How many bytes of a connection are not sent or not acknowledged.
#[cfg(target_os = "linux")]
fn send_queue_len(local: SocketAddr, peer: SocketAddr) -> io::Result<u32> {
    use socket2::{Domain, Protocol, Socket, Type};

    const AF_NETLINK: i32 = 16;
    const NETLINK_SOCK_DIAG: i32 = 4;
    /// A header, then the fixed part of a connection's description: in it, the queue behind 60 bytes.
    const QUEUE_AT: usize = 16 + 60;

    let socket = Socket::new(Domain::from(AF_NETLINK), Type::DGRAM, Some(Protocol::from(NETLINK_SOCK_DIAG)))?;
    socket.set_nonblocking(true)?; // the answer is there when the question has been sent
    socket.send(&query(local, peer))?;
    let mut answer = [0; 512];
    let len = io::Read::read(&mut &socket, &mut answer)?;
    let (kind, queue) = (answer.get(4..6), answer.get(..len).and_then(|answer| answer.get(QUEUE_AT..)));
    match (kind, queue.and_then(<[u8]>::first_chunk)) {
        (Some(kind), Some(queue)) if kind == SOCK_DIAG_BY_FAMILY.to_ne_bytes() => Ok(u32::from_ne_bytes(*queue)),
        _ => Err(io::ErrorKind::NotFound.into()),
    }
}

#[cfg(not(target_os = "linux"))]
fn send_queue_len(_local: SocketAddr, _peer: SocketAddr) -> io::Result<u32> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(target_os = "linux")]
const SOCK_DIAG_BY_FAMILY: u16 = 20;

/// Asks for one TCP connection by its addresses: a netlink header and an `inet_diag_req_v2`.
#[cfg(target_os = "linux")]
fn query(local: SocketAddr, peer: SocketAddr) -> Vec<u8> {
    const LEN: u32 = 16 + 56;
    const NLM_F_REQUEST: u16 = 1;
    const AF_INET: u8 = 2;
    const AF_INET6: u8 = 10;
    const IPPROTO_TCP: u8 = 6;
    const NO_COOKIE: u32 = u32::MAX;

    let address = |address: SocketAddr| match address {
        SocketAddr::V4(address) => (u128::from(address.ip().to_bits()) << 96).to_be_bytes(),
        SocketAddr::V6(address) => address.ip().octets(),
    };
    let (family, interface) = match local {
        SocketAddr::V4(_) => (AF_INET, 0),
        SocketAddr::V6(local) => (AF_INET6, local.scope_id()),
    };
    let mut query = Vec::with_capacity(LEN as usize);
    query.extend(LEN.to_ne_bytes());
    query.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    query.extend(NLM_F_REQUEST.to_ne_bytes());
    query.extend([0; 8]); // its number, and the id of the asking process
    query.extend([family, IPPROTO_TCP, 0, 0]);
    query.extend(u32::MAX.to_ne_bytes()); // in whatever state
    query.extend(local.port().to_be_bytes());
    query.extend(peer.port().to_be_bytes());
    query.extend(address(local));
    query.extend(address(peer));
    query.extend(interface.to_ne_bytes());
    query.extend([NO_COOKIE.to_ne_bytes(), NO_COOKIE.to_ne_bytes()].concat());
    query
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use std::io::Read;

    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;
    use tokio::time::timeout;

    use super::*;

    /// A connection over this address: our side, and a peer that reads only when asked to.
    async fn connection(address: &str) -> (TcpStream, std::net::TcpStream) {
        let listener = TcpListener::bind((address, 0)).await.unwrap();
        let theirs = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (ours, _) = listener.accept().await.unwrap();
        let theirs = theirs.into_std().unwrap();
        theirs.set_nonblocking(false).unwrap();
        (ours, theirs)
    }

    #[tokio::test]
    async fn what_was_written_is_waited_for_until_the_peer_has_it() {
        for address in ["127.0.0.1", "::1"] {
            if address == "::1" && TcpListener::bind((address, 0)).await.is_err() {
                continue; // a host without IPv6
            }
            let (mut ours, mut theirs) = connection(address).await;
            timeout(Duration::from_secs(10), acknowledged(&ours)).await.unwrap();
            // More than both sides' buffers take.
            let mut len = 0;
            while let Ok(Ok(part)) = timeout(Duration::from_millis(300), ours.write(&[0; 65_536])).await {
                len += part;
            }
            assert!(timeout(Duration::from_millis(300), acknowledged(&ours)).await.is_err(), "{address}");
            let reader = std::thread::spawn(move || {
                theirs.read_exact(&mut vec![0; len]).unwrap();
                theirs.read(&mut [0]).unwrap_err().kind()
            });
            timeout(Duration::from_secs(10), acknowledged(&ours)).await.unwrap();
            reset_when_closed(&ours).unwrap();
            drop(ours);
            assert_eq!(reader.join().unwrap(), io::ErrorKind::ConnectionReset);
        }
    }

    #[tokio::test]
    async fn a_peer_that_is_gone_is_not_waited_for() {
        let (mut ours, theirs) = connection("127.0.0.1").await;
        while timeout(Duration::from_millis(300), ours.write(&[0; 65_536])).await.is_ok() {}
        drop(theirs); // with bytes that it has not read: a reset
        timeout(Duration::from_secs(10), acknowledged(&ours)).await.unwrap();
    }
}
