//! gRPC over HTTP/2 by hand, one stream a request: etcd, nkv's gRPC door and the reference. Headers of answers are skipped, not
//! decoded.

use std::collections::{HashMap, VecDeque};

use super::*;

/// What one service has of its own. Requests to get and to put a key are encoded alike by both.
#[derive(Debug)]
pub(super) struct Service {
    get: &'static str,
    put: &'static str,
    watch: &'static str,
    /// Asks for the changes of a key.
    create: fn(&str) -> Vec<u8>,
    /// Reads a message of a watch.
    read: fn(&[u8], &mut Vec<Event>),
}

pub(super) static ETCD: Service = Service {
    get: "/etcdserverpb.KV/Range",
    put: "/etcdserverpb.KV/Put",
    watch: "/etcdserverpb.Watch/Watch",
    create: |key| {
        let (mut create, mut message) = (Vec::new(), Vec::new());
        text(1, key.as_bytes(), &mut create);
        text(1, &create, &mut message);
        message
    },
    read: |message, events| {
        // WatchResponse.events.kv.value; one without events says that the watch was created.
        let before = events.len();
        fields(message, 11, &mut |event| {
            fields(event, 2, &mut |entry| fields(entry, 5, &mut |value| events.push(update(value))));
        });
        if events.len() == before {
            events.push(Event::Ready);
        }
    },
};

pub(super) static NKV: Service = Service {
    get: "/nkv.v1.Kv/Get",
    put: "/nkv.v1.Kv/Put",
    watch: "/nkv.v1.Kv/Watch",
    create: |key| {
        let mut message = Vec::new();
        text(1, key.as_bytes(), &mut message);
        message
    },
    read: |message, events| {
        // WatchResponse.put.value, and WatchResponse.synced.
        fields(message, 2, &mut |put| fields(put, 2, &mut |value| events.push(update(value))));
        fields(message, 4, &mut |_| events.push(Event::Ready));
    },
};

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GO_AWAY: u8 = 7;
const WINDOW: u8 = 8;

#[derive(Debug)]
pub(super) struct Grpc {
    service: &'static Service,
    values: Arc<Values>,
    next: u32,
    /// Streams that are open: the slot, and how much data was seen.
    open: HashMap<u32, (u32, usize)>,
    watch: u32,
    watch_data: Vec<u8>,
    /// What was received since the last time that the server was given room, for the watch and in all.
    watch_received: usize,
    received: usize,
    /// What the server has room for.
    window: i64,
    frame_len_max: usize,
    /// Requests that wait for room.
    held: VecDeque<(Vec<u8>, i64)>,
    ready: bool,
}

impl Grpc {
    pub(super) fn new(service: &'static Service, values: Arc<Values>) -> Self {
        Grpc {
            service,
            values,
            next: 1,
            open: HashMap::new(),
            watch: 0,
            watch_data: Vec::new(),
            watch_received: 0,
            received: 0,
            window: 65_535,
            frame_len_max: 16_384,
            held: VecDeque::new(),
            ready: false,
        }
    }

    /// Opens a stream with one message and returns its number.
    fn call(&mut self, path: &str, message: &[u8], ends: bool, out: &mut Vec<u8>) -> u32 {
        let stream = self.next;
        self.next += 2;
        let mut data = Vec::with_capacity(message.len() + 5);
        data.push(0);
        data.extend_from_slice(&(message.len() as u32).to_be_bytes());
        data.extend_from_slice(message);
        let mut request = Vec::with_capacity(data.len() + 128);
        frame(HEADERS, 4, stream, &headers(path), &mut request);
        let count = data.chunks(self.frame_len_max).count();
        for (n, chunk) in data.chunks(self.frame_len_max).enumerate() {
            frame(DATA, u8::from(ends && n + 1 == count), stream, chunk, &mut request);
        }
        self.held.push_back((request, data.len() as i64));
        self.send_held(out);
        stream
    }

    fn send_held(&mut self, out: &mut Vec<u8>) {
        while let Some((request, len)) = self.held.pop_front_if(|(_, len)| *len <= self.window) {
            self.window -= len;
            out.extend_from_slice(&request);
        }
    }

    fn on_data(&mut self, stream: u32, data: &[u8], out: &mut Vec<u8>, events: &mut Vec<Event>) {
        self.received += data.len();
        if self.received > 1 << 24 {
            frame(WINDOW, 0, 0, &(self.received as u32).to_be_bytes(), out);
            self.received = 0;
        }
        if stream == self.watch {
            self.watch_received += data.len();
            if self.watch_received > 1 << 20 {
                frame(WINDOW, 0, stream, &(self.watch_received as u32).to_be_bytes(), out);
                self.watch_received = 0;
            }
            self.watch_data.extend_from_slice(data);
            self.read_watch(events);
        } else if let Some((_, seen)) = self.open.get_mut(&stream) {
            *seen += data.len();
        }
    }

    fn read_watch(&mut self, events: &mut Vec<Event>) {
        let data = std::mem::take(&mut self.watch_data);
        let mut rest = data.as_slice();
        while let Some((head, body)) = rest.split_first_chunk::<5>() {
            let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
            let Some(message) = body.get(..len) else { break };
            (self.service.read)(message, events);
            rest = &body[len..];
        }
        self.watch_data = rest.to_vec();
    }

    fn on_settings(&mut self, settings: &[u8], out: &mut Vec<u8>, events: &mut Vec<Event>) {
        for setting in settings.chunks_exact(6).filter(|setting| setting[1] == 5) {
            self.frame_len_max = u32::from_be_bytes([setting[2], setting[3], setting[4], setting[5]]) as usize;
        }
        frame(SETTINGS, 1, 0, &[], out);
        if !std::mem::replace(&mut self.ready, true) {
            events.push(Event::Ready);
        }
    }
}

fn varint(mut number: u64, out: &mut Vec<u8>) {
    while number >= 128 {
        out.push(number as u8 | 128);
        number >>= 7;
    }
    out.push(number as u8);
}

fn read_varint(bytes: &mut &[u8]) -> Option<u64> {
    let (mut number, mut shift) = (0, 0);
    loop {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        number |= u64::from(byte & 127) << shift;
        if *byte < 128 {
            return Some(number);
        }
        shift += 7;
    }
}

/// A field of a message that has a length.
fn text(field: u8, text: &[u8], out: &mut Vec<u8>) {
    out.push(field << 3 | 2);
    varint(text.len() as u64, out);
    out.extend_from_slice(text);
}

/// Calls `found` with the content of each field `wanted` that has a length.
fn fields<'a>(mut message: &'a [u8], wanted: u64, found: &mut dyn FnMut(&'a [u8])) {
    while let Some(tag) = read_varint(&mut message) {
        let len = match tag & 7 {
            0 if read_varint(&mut message).is_some() => continue,
            1 => 8,
            5 => 4,
            2 => read_varint(&mut message).unwrap_or(u64::MAX) as usize,
            _ => return,
        };
        let Some((content, rest)) = message.split_at_checked(len) else { return };
        message = rest;
        if tag == wanted << 3 | 2 {
            found(content);
        }
    }
}

fn frame(kind: u8, flags: u8, stream: u32, body: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&(body.len() as u32).to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(body);
}

fn headers(path: &str) -> Vec<u8> {
    // POST, http, :path, :authority, content-type, te.
    let mut headers = vec![0x83, 0x86, 0x04, path.len() as u8];
    headers.extend_from_slice(path.as_bytes());
    headers.extend_from_slice(b"\x01\x09localhost\x0f\x10\x10application/grpc\x00\x02te\x08trailers");
    headers
}

impl Driver for Grpc {
    fn hello(&mut self, out: &mut Vec<u8>) -> bool {
        out.extend_from_slice(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        // Room for 16 MiB on each stream, and for a GiB in all.
        frame(SETTINGS, 0, 0, &[0, 4, 1, 0, 0, 0], out);
        frame(WINDOW, 0, 0, &0x4000_0000_u32.to_be_bytes(), out);
        true
    }

    fn put(&mut self, slot: u32, key: &str, at: u64, seq: u64, out: &mut Vec<u8>) {
        let mut message = Vec::with_capacity(self.values.len + 64);
        text(1, key.as_bytes(), &mut message);
        message.push(0x12);
        varint(self.values.len as u64, &mut message);
        self.values.write(at, seq, &mut message);
        let stream = self.call(self.service.put, &message, true, out);
        // The answer to a put is small; count it as if it had the length that a get's must have.
        self.open.insert(stream, (slot, self.values.len));
    }

    fn get(&mut self, slot: u32, key: &str, out: &mut Vec<u8>) {
        let mut message = Vec::new();
        text(1, key.as_bytes(), &mut message);
        let stream = self.call(self.service.get, &message, true, out);
        self.open.insert(stream, (slot, 0));
    }

    fn subscribe(&mut self, key: &str, out: &mut Vec<u8>) {
        let message = (self.service.create)(key);
        // A stream of requests to etcd, and one request to nkv.
        let ends = std::ptr::eq(self.service, &NKV);
        self.watch = self.call(self.service.watch, &message, ends, out);
    }

    fn parse(&mut self, buf: &[u8], out: &mut Vec<u8>, events: &mut Vec<Event>) -> usize {
        let mut rest = buf;
        while let Some((head, after)) = rest.split_first_chunk::<9>() {
            let len = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let Some((body, after)) = after.split_at_checked(len) else { break };
            rest = after;
            let (kind, first_flag) = (head[3], head[4] & 1 != 0);
            let stream = u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]);
            match kind {
                DATA => self.on_data(stream, body, out, events),
                HEADERS if first_flag => {
                    if let Some((slot, seen)) = self.open.remove(&stream) {
                        events.push(Event::Reply { slot: Some(slot), good: seen > self.values.len });
                    }
                }
                RESET => {
                    if let Some((slot, _)) = self.open.remove(&stream) {
                        events.push(Event::Reply { slot: Some(slot), good: false });
                    }
                }
                SETTINGS if !first_flag => self.on_settings(body, out, events),
                PING if !first_flag => frame(PING, 1, 0, body, out),
                GO_AWAY => eprintln!("{}: {}", self.service.get, String::from_utf8_lossy(body)),
                WINDOW if stream == 0 => {
                    self.window += body.first_chunk::<4>().map_or(0, |room| u32::from_be_bytes(*room).into());
                    self.send_held(out);
                }
                _ => {}
            }
        }
        buf.len() - rest.len()
    }
}
