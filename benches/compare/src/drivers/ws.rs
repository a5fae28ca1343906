//! nkv over a WebSocket: one frame is one message. What is sent is masked with zeros.

use super::nkv::Nkv;
use super::*;

#[derive(Debug)]
pub(super) struct Ws {
    inner: Nkv,
    is_open: bool,
}

impl Ws {
    pub(super) fn new(connection: usize, values: Arc<Values>) -> Self {
        Ws { inner: Nkv::new(connection, values), is_open: false }
    }

    fn frame(&mut self, is_text: bool, out: &mut Vec<u8>, write: impl FnOnce(&mut Nkv, &mut Vec<u8>)) {
        let mut message = Vec::new();
        write(&mut self.inner, &mut message);
        out.push(if is_text { 0x81 } else { 0x82 });
        match message.len() {
            len @ ..126 => out.push(0x80 | len as u8),
            len => {
                out.push(0x80 | 126);
                out.extend_from_slice(&(len as u16).to_be_bytes());
            }
        }
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&message);
    }
}

impl Driver for Ws {
    fn hello(&mut self, out: &mut Vec<u8>) -> bool {
        out.extend_from_slice(
            b"GET /v1/ws HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
              Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n",
        );
        true
    }

    fn put(&mut self, slot: u32, key: &str, at: u64, seq: u64, out: &mut Vec<u8>) {
        self.frame(false, out, |inner, out| inner.put(slot, key, at, seq, out));
    }

    fn get(&mut self, slot: u32, key: &str, out: &mut Vec<u8>) {
        self.frame(true, out, |inner, out| inner.get(slot, key, out));
    }

    fn subscribe(&mut self, key: &str, out: &mut Vec<u8>) {
        self.frame(true, out, |inner, out| inner.subscribe(key, out));
    }

    fn parse(&mut self, buf: &[u8], out: &mut Vec<u8>, events: &mut Vec<Event>) -> usize {
        let mut at = 0;
        if !self.is_open {
            let Some(end) = memchr::memmem::find(buf, b"\r\n\r\n") else { return 0 };
            (at, self.is_open) = (end + 4, true);
            // The answer to it is what opens the connection.
            self.frame(true, out, |inner, out| _ = inner.hello(out));
        }
        while let Some(head) = buf.get(at..at + 2) {
            let (head_len, len) = match head[1] & 0x7f {
                126 => match buf.get(at + 2..at + 4) {
                    Some(len) => (4, usize::from(u16::from_be_bytes([len[0], len[1]]))),
                    None => break,
                },
                len => (2, usize::from(len)),
            };
            let Some(message) = buf.get(at + head_len..at + head_len + len) else { break };
            match head[0] & 0x0f {
                1 => {
                    let line = [message, b"\n"].concat();
                    self.inner.parse(&line, out, events);
                }
                2 => _ = self.inner.parse(message, out, events),
                9 => out.extend_from_slice(&[0x8a, 0x80, 0, 0, 0, 0]),
                _ => {}
            }
            at += head_len + len;
        }
        at
    }
}
