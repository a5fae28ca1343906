//! nkv: a JSON object a line, values as payloads behind their line. Requests are those that `nkv-client` writes.

use memchr::memchr;
use memchr::memmem::Finder;

use super::*;

#[derive(Debug)]
pub(super) struct Nkv {
    connection: usize,
    values: Arc<Values>,
    len: Finder<'static>,
    id: Finder<'static>,
    status: Finder<'static>,
}

impl Nkv {
    pub(super) fn new(connection: usize, values: Arc<Values>) -> Self {
        let [len, id, status] = ["\"len\":", "\"id\":", "\"status\":"].map(Finder::new);
        Nkv { connection, values, len, id, status }
    }
}

/// A request up to its key; without the brace that ends it.
fn request(kind: &str, slot: u32, key: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"type\":\"");
    out.extend_from_slice(kind.as_bytes());
    out.extend_from_slice(b"\",\"id\":");
    decimal(slot.into(), out);
    out.extend_from_slice(b",\"key\":\"");
    out.extend_from_slice(key.as_bytes());
    out.push(b'"');
}

/// The number behind a name, which is given with its quotes and the colon.
fn field(line: &[u8], name: &Finder<'_>) -> Option<u64> {
    let rest = &line[name.find(line)? + name.needle().len()..];
    let end = rest.iter().position(|byte| !byte.is_ascii_digit())?;
    number(&rest[..end])
}

impl Driver for Nkv {
    fn hello(&mut self, out: &mut Vec<u8>) -> bool {
        let hello = r#"{"type":"Connect","id":"hello","values":"payload","client_uuid":"c"#;
        out.extend_from_slice(hello.as_bytes());
        decimal(self.connection as u64, out);
        out.extend_from_slice(b"\"}\n");
        true
    }

    fn put(&mut self, slot: u32, key: &str, at: u64, seq: u64, out: &mut Vec<u8>) {
        request("Put", slot, key, out);
        out.extend_from_slice(b",\"len\":");
        decimal(self.values.len as u64, out);
        out.extend_from_slice(b"}\n");
        self.values.write(at, seq, out);
        out.push(b'\n');
    }

    fn get(&mut self, slot: u32, key: &str, out: &mut Vec<u8>) {
        request("Get", slot, key, out);
        out.extend_from_slice(b"}\n");
    }

    fn subscribe(&mut self, key: &str, out: &mut Vec<u8>) {
        request("Subscribe", 0, key, out);
        out.extend_from_slice(b"}\n");
    }

    fn parse(&mut self, buf: &[u8], _out: &mut Vec<u8>, events: &mut Vec<Event>) -> usize {
        let mut at = 0;
        while let Some(end) = memchr(b'\n', &buf[at..]) {
            let line = &buf[at..at + end];
            let mut next = at + end + 1;
            let payload = field(line, &self.len).map(|len| next..next + len as usize);
            if let Some(payload) = &payload {
                if buf.len() <= payload.end {
                    break;
                }
                next = payload.end + 1;
            }
            at = next;
            let payload = payload.map(|payload| &buf[payload]);
            if line.starts_with(b"{\"Update\"") {
                events.push(update(payload.unwrap_or_default()));
            } else if line.starts_with(b"\"Hello\"") {
                events.push(Event::Ready);
            } else if let Some(slot) = field(line, &self.id) {
                let whole =
                    !line.starts_with(b"{\"Get\"") || payload.is_some_and(|value| value.len() == self.values.len);
                let good = whole && field(line, &self.status) == Some(200);
                events.push(Event::Reply { slot: Some(slot as u32), good });
            } else {
                events.push(Event::Ready);
            }
        }
        at
    }
}
