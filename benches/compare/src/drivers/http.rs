//! HTTP/1.1 with connections that stay, and changes as server-sent events. The reference of `reference.rs` takes the same requests.

use memchr::{memchr, memmem};

use super::*;

#[derive(Debug)]
pub(super) struct Http {
    values: Arc<Values>,
    /// Events come from now on.
    is_stream: bool,
}

impl Http {
    pub(super) fn new(values: Arc<Values>) -> Self {
        Http { values, is_stream: false }
    }

    /// Lines of events, between the lengths of chunks.
    fn events(&self, buf: &[u8], events: &mut Vec<Event>) -> usize {
        let mut at = 0;
        while let Some(end) = memchr(b'\n', &buf[at..]) {
            let line = &buf[at..at + end];
            at += end + 1;
            if line == b"event: synced" {
                events.push(Event::Ready);
            } else if line.starts_with(b"data: {\"key\"") {
                let value = memmem::find(line, b"\"value\":\"").map(|at| &line[at + 9..]);
                events.push(update(value.unwrap_or_default()));
            }
        }
        at
    }
}

fn head(method: &str, path: &[&str], out: &mut Vec<u8>) {
    out.extend_from_slice(method.as_bytes());
    path.iter().for_each(|part| out.extend_from_slice(part.as_bytes()));
    out.extend_from_slice(b" HTTP/1.1\r\nHost: 127.0.0.1\r\n");
}

impl Driver for Http {
    fn put(&mut self, _slot: u32, key: &str, at: u64, seq: u64, out: &mut Vec<u8>) {
        head("PUT ", &["/v1/kv/", key], out);
        out.extend_from_slice(b"Content-Length: ");
        decimal(self.values.len as u64, out);
        out.extend_from_slice(b"\r\n\r\n");
        self.values.write(at, seq, out);
    }

    fn get(&mut self, _slot: u32, key: &str, out: &mut Vec<u8>) {
        head("GET ", &["/v1/kv/", key], out);
        out.extend_from_slice(b"\r\n");
    }

    fn subscribe(&mut self, key: &str, out: &mut Vec<u8>) {
        self.is_stream = true;
        head("GET ", &["/v1/watch?exact=true&snapshot=false&pattern=", key], out);
        out.extend_from_slice(b"\r\n");
    }

    fn parse(&mut self, buf: &[u8], _out: &mut Vec<u8>, events: &mut Vec<Event>) -> usize {
        if self.is_stream {
            return self.events(buf, events);
        }
        answers(buf, |is_ok, _| events.push(Event::Reply { slot: None, good: is_ok }))
    }
}

/// Calls `each` for every whole answer, with whether it is one of status 200 and its body; returns their length.
pub(super) fn answers(buf: &[u8], mut each: impl FnMut(bool, &[u8])) -> usize {
    let mut at = 0;
    while let Some(len) = memmem::find(&buf[at..], b"\r\n\r\n") {
        let head = &buf[at..at + len + 4];
        let length = memmem::find(head, b"ontent-length: ").or_else(|| memmem::find(head, b"ontent-Length: "));
        let digits = length.map(|at| &head[at + 15..]);
        let digits = digits.and_then(|rest| Some(&rest[..rest.iter().position(|byte| !byte.is_ascii_digit())?]));
        let body = at + head.len()..at + head.len() + digits.and_then(number).unwrap_or(0) as usize;
        let Some(text) = buf.get(body.clone()) else { break };
        each(head.starts_with(b"HTTP/1.1 200"), text);
        at = body.end;
    }
    at
}
