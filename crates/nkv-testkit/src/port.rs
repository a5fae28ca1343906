//! Ports for servers that a test starts.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use socket2::{Domain, Protocol, Socket, Type};

/// Below those that systems give to connections.
const FIRST: u32 = 10_000;
const COUNT: u32 = 20_000;

/// Returns a TCP port of 127.0.0.1 that no other program or caller gets for as long as this process lives: it is bound, and
/// not listened at. A listener may use it, also again and again, if it sets `SO_REUSEADDR`, as those of Rust, Go and Java do on
/// Unix; elsewhere the port is only free at this moment. A connection to it is refused until then.
///
/// # Panics
///
/// If no port is free, or none can be bound.
#[must_use]
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    static HELD: Mutex<Vec<Socket>> = Mutex::new(Vec::new());
    // Processes that begin together begin at different ports.
    let first = std::process::id().wrapping_mul(100);
    for _ in 0..COUNT {
        let number = first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % COUNT;
        let port = u16::try_from(FIRST + number).expect("the last one is 29,999");
        if let Some(held) = hold(port) {
            HELD.lock().unwrap_or_else(PoisonError::into_inner).extend(cfg!(unix).then_some(held));
            return port;
        }
    }
    panic!("no port from {FIRST} to {} is free", FIRST + COUNT - 1);
}

/// The port, unless anything has it.
fn hold(port: u16) -> Option<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).expect("a socket can be made");
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into()).ok()?;
    // From here on, not before: else two that hold could share it.
    socket.set_reuse_address(true).expect("the option is known");
    Some(socket)
}

#[cfg(all(test, unix))]
mod tests {
    use std::io::ErrorKind;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_port_is_for_its_caller_alone_who_may_listen_at_it_again_and_again() {
        let (port, other) = (free_port(), free_port());
        let address = (Ipv4Addr::LOCALHOST, port);
        assert!(port != other && hold(port).is_none(), "no other gets it");
        for _ in 0..2 {
            assert_eq!(TcpStream::connect(address).unwrap_err().kind(), ErrorKind::ConnectionRefused);
            let listener = TcpListener::bind(address).unwrap();
            TcpStream::connect(address).unwrap();
            drop(listener);
            assert!(hold(port).is_none(), "it is held on");
        }
    }
}
