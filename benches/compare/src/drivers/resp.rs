//! Redis: `SET` and `GET`; a change is `SET` and `PUBLISH` sent together, which count as one operation.

use std::ops::Range;

use memchr::memchr;

use super::*;

#[derive(Debug)]
pub(super) struct Resp {
    values: Arc<Values>,
    /// Replies come in pairs, of which the second counts.
    pairs: bool,
    half: bool,
}

impl Resp {
    pub(super) fn new(values: Arc<Values>) -> Self {
        Resp { values, pairs: false, half: false }
    }

    /// A command with a key, and a value if one is given.
    fn command(&self, name: &str, key: &str, value: Option<(u64, u64)>, out: &mut Vec<u8>) {
        out.extend_from_slice(if value.is_some() { b"*3\r\n" } else { b"*2\r\n" });
        let header = |len: usize, out: &mut Vec<u8>| {
            out.push(b'$');
            decimal(len as u64, out);
            out.extend_from_slice(b"\r\n");
        };
        for word in [name, key] {
            header(word.len(), out);
            out.extend_from_slice(word.as_bytes());
            out.extend_from_slice(b"\r\n");
        }
        if let Some((at, seq)) = value {
            header(self.values.len, out);
            self.values.write(at, seq, out);
            out.extend_from_slice(b"\r\n");
        }
    }
}

/// The length of the whole reply at the start of `buf`, and where its last string is.
fn reply(buf: &[u8]) -> Option<(usize, Range<usize>)> {
    let head = memchr(b'\n', buf)? + 1;
    let count = &buf[1..head.saturating_sub(2).max(1)];
    match buf[0] {
        b'$' if count.first() == Some(&b'-') => Some((head, 0..0)),
        b'$' => {
            let end = head + number(count)? as usize;
            (buf.len() >= end + 2).then_some((end + 2, head..end))
        }
        b'*' => {
            let (mut at, mut last) = (head, 0..0);
            for _ in 0..number(count)? {
                let (len, string) = reply(buf.get(at..).filter(|rest| !rest.is_empty())?)?;
                last = at + string.start..at + string.end;
                at += len;
            }
            Some((at, last))
        }
        _ => Some((head, 0..0)),
    }
}

impl Driver for Resp {
    fn put(&mut self, _slot: u32, key: &str, at: u64, seq: u64, out: &mut Vec<u8>) {
        self.command("SET", key, Some((at, seq)), out);
    }

    fn get(&mut self, _slot: u32, key: &str, out: &mut Vec<u8>) {
        self.command("GET", key, None, out);
    }

    fn subscribe(&mut self, key: &str, out: &mut Vec<u8>) {
        self.command("SUBSCRIBE", key, None, out);
    }

    fn publish(&mut self, _slot: u32, key: &str, at: u64, seq: u64, out: &mut Vec<u8>) {
        self.pairs = true;
        self.command("SET", key, Some((at, seq)), out);
        self.command("PUBLISH", key, Some((at, seq)), out);
    }

    fn parse(&mut self, buf: &[u8], _out: &mut Vec<u8>, events: &mut Vec<Event>) -> usize {
        let mut at = 0;
        while let Some((len, last)) = buf.get(at..).filter(|rest| !rest.is_empty()).and_then(reply) {
            let message = &buf[at..at + len];
            at += len;
            match message[0] {
                b'*' if message.starts_with(b"*3\r\n$7\r\nmessage") => events.push(update(&message[last])),
                b'*' => events.push(Event::Ready),
                kind => {
                    self.half = self.pairs && !self.half;
                    if !self.half {
                        let good = kind != b'-' && (kind != b'$' || last.len() == self.values.len);
                        events.push(Event::Reply { slot: None, good });
                    }
                }
            }
        }
        at
    }
}
