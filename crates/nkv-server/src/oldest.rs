//! The oldest clients: how their connections are recognised, and how they end.
//!
//! Such a client opens a connection for each request. That of a `Subscribe` it keeps, takes each read of it for one message,
//! and connects anew only after a reset: after an orderly end it reads on for ever. What is written to it is
//! [paced](Outbox::pace); `docs/protocol.md` says what else is different for it.

use nkv_notify_tcp::{Outbox, acknowledged, end_when_closed, reset_when_closed};
use nkv_protocol::{Decoder, Kind, Request};
use tokio::net::TcpStream;
use tracing::debug;

use crate::socket::Socket;

/// Whether the first request of a connection, if it is there as a whole, is one of theirs: no other client subscribes
/// without a `Connect` and without a snapshot, and those that do lose little by a pace.
pub(crate) fn is_one(decoder: &Decoder, input: &[u8]) -> bool {
    let first = decoder.clone().decode(input).item;
    matches!(first, Some(Ok(Request { kind: Kind::Subscribe, snapshot: false, .. })))
}

/// Writes to it at its pace from now on, and has its connection end with a reset whatever becomes of this process.
pub(crate) fn begin(socket: &Socket, outbox: &mut Outbox) {
    outbox.pace();
    note(match socket {
        Socket::Tcp(stream) => reset_when_closed(stream),
        Socket::Unix(_) | Socket::Other(_) => Ok(()),
    });
}

/// Has the connection end in order after all: the client ended it, or is none of the oldest.
pub(crate) fn end_in_order(socket: &Socket) {
    note(match socket {
        Socket::Tcp(stream) => end_when_closed(stream),
        Socket::Unix(_) | Socket::Other(_) => Ok(()),
    });
}

/// Waits until the client has what was written, which a reset would discard.
pub(crate) async fn arrived(stream: Option<&TcpStream>) {
    if let Some(stream) = stream {
        acknowledged(stream).await;
    }
}

fn note(set: std::io::Result<()>) {
    if let Err(error) = set {
        debug!(%error, "how a connection ends cannot be set");
    }
}
