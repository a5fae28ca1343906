//! The wire protocols, one small driver each, which writes requests into a buffer and reads answers from one.

mod echo;
mod gateway;
mod grpc;
mod http;
mod nats;
mod nkv;
mod resp;
mod ws;

use std::fmt;
use std::sync::Arc;

/// Digits that every value begins with: 15 of a time stamp (ns), 9 of a sequence number.
pub(crate) const HEAD: usize = 24;

/// What a driver reads.
#[derive(Debug)]
pub(crate) enum Event {
    /// An answer; `slot` is none where answers come in the order of the requests.
    Reply { slot: Option<u32>, good: bool },
    /// The connection (after `hello`) or the subscription (after `subscribe`) is there.
    Ready,
    /// A change, with the time stamp and the sequence number of its value.
    Update { at: u64, seq: u64 },
    /// A change without the value that was put.
    BadUpdate,
}

/// How a server is spoken to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Echo,
    Redis,
    Nats,
    Etcd,
    /// The JSON gateway of etcd.
    Gateway,
    /// nkv's gRPC door, and the reference of gRPC.
    Grpc,
    Nkv,
    /// nkv's HTTP door, and the reference of HTTP.
    Http,
    /// nkv's messages over a WebSocket.
    Ws,
}

impl Protocol {
    /// The driver of one connection; `number` tells it from others.
    pub(crate) fn driver(self, number: usize, values: &Arc<Values>) -> Box<dyn Driver> {
        let values = Arc::clone(values);
        match self {
            Protocol::Echo => Box::new(echo::Echo::new(values)),
            Protocol::Redis => Box::new(resp::Resp::new(values)),
            Protocol::Nats => Box::new(nats::Nats::new(number, values)),
            Protocol::Etcd => Box::new(grpc::Grpc::new(&grpc::ETCD, values)),
            Protocol::Gateway => Box::new(gateway::Gateway::new(values)),
            Protocol::Grpc => Box::new(grpc::Grpc::new(&grpc::NKV, values)),
            Protocol::Nkv => Box::new(nkv::Nkv::new(number, values)),
            Protocol::Http => Box::new(http::Http::new(values)),
            Protocol::Ws => Box::new(ws::Ws::new(number, values)),
        }
    }
}

/// Values of one length: 24 digits, and a tail that is made once.
#[derive(Debug)]
pub(crate) struct Values {
    pub(crate) len: usize,
    tail: Vec<u8>,
}

impl Values {
    pub(crate) fn new(len: usize) -> Arc<Values> {
        assert!(len >= HEAD, "a value has {HEAD} bytes at least");
        const LETTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789 ,:-";
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut letter = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            LETTERS[(random % LETTERS.len() as u64) as usize]
        };
        Arc::new(Values { len, tail: (HEAD..len).map(|_| letter()).collect() })
    }

    fn write(&self, mut at: u64, mut seq: u64, out: &mut Vec<u8>) {
        let mut head = [0; HEAD];
        for digit in head[..15].iter_mut().rev() {
            *digit = b'0' + (at % 10) as u8;
            at /= 10;
        }
        for digit in head[15..].iter_mut().rev() {
            *digit = b'0' + (seq % 10) as u8;
            seq /= 10;
        }
        out.extend_from_slice(&head);
        out.extend_from_slice(&self.tail);
    }
}

/// The event of a change that carries this value.
fn update(value: &[u8]) -> Event {
    let number = |digits: &[u8]| digits.iter().fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0'));
    match value.get(..HEAD) {
        Some(head) if head.iter().all(u8::is_ascii_digit) => {
            Event::Update { at: number(&head[..15]), seq: number(&head[15..]) }
        }
        _ => Event::BadUpdate,
    }
}

/// One connection's side of a protocol. A `slot` names a request until it is answered.
pub(crate) trait Driver: fmt::Debug {
    /// What is sent first; true if `Event::Ready` must come before requests may be sent.
    fn hello(&mut self, _out: &mut Vec<u8>) -> bool {
        false
    }
    /// What is sent once to a fresh server, and answered once; true if there is such a thing.
    fn set_up(&mut self, _out: &mut Vec<u8>) -> bool {
        false
    }
    fn put(&mut self, slot: u32, key: &str, at: u64, seq: u64, out: &mut Vec<u8>);
    fn get(&mut self, slot: u32, key: &str, out: &mut Vec<u8>);
    /// Asks for the changes of a key; `Event::Ready` tells that they will come.
    fn subscribe(&mut self, key: &str, out: &mut Vec<u8>);
    /// A put that subscribers are told of.
    fn publish(&mut self, slot: u32, key: &str, at: u64, seq: u64, out: &mut Vec<u8>) {
        self.put(slot, key, at, seq, out);
    }
    /// Reads the whole messages at the start of `buf` and returns their length. May have something to send.
    fn parse(&mut self, buf: &[u8], out: &mut Vec<u8>, events: &mut Vec<Event>) -> usize;
}

/// Appends the decimal digits of a number.
fn decimal(mut number: u64, out: &mut Vec<u8>) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return out.extend_from_slice(&digits[at..]);
        }
    }
}

/// The number that is written here.
pub(crate) fn number(text: &[u8]) -> Option<u64> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    digits.then(|| text.iter().fold(0, |sum: u64, digit| sum.wrapping_mul(10) + u64::from(digit - b'0')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_protocol_reads_back_a_change() {
        let values = Values::new(100);
        let mut value = Vec::new();
        values.write(123_456_789, 42, &mut value);
        let text = String::from_utf8(value).expect("it is text");
        let told = [
            (
                Protocol::Nkv,
                format!("{{\"Update\":{{\"key\":\"k\",\"revision\":3,\"len\":100,\"skipped\":0}}}}\n{text}\n"),
            ),
            (Protocol::Redis, format!("*3\r\n$7\r\nmessage\r\n$1\r\nk\r\n$100\r\n{text}\r\n")),
            (Protocol::Nats, format!("MSG $KV.b.k 2 100\r\n{text}\r\n")),
        ];
        for (protocol, bytes) in told {
            let mut driver = protocol.driver(1, &values);
            let mut events = Vec::new();
            let whole = bytes.len();
            assert_eq!(driver.parse(&bytes.as_bytes()[..whole - 1], &mut Vec::new(), &mut events), 0);
            assert_eq!(driver.parse(bytes.as_bytes(), &mut Vec::new(), &mut events), whole);
            assert!(matches!(events[..], [Event::Update { at: 123_456_789, seq: 42 }]), "{protocol:?}: {events:?}");
        }
    }
}
