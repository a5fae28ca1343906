//! The reference server of this tool (`reference.rs`): a line that begins with `P` is acknowledged, `G` and a number
//! asks for that number of bytes, `S` for every later line with a `P`.

use memchr::memchr;

use super::*;

#[derive(Debug)]
pub(super) struct Echo {
    values: Arc<Values>,
    subscribed: bool,
}

impl Echo {
    pub(super) fn new(values: Arc<Values>) -> Self {
        Echo { values, subscribed: false }
    }
}

impl Driver for Echo {
    fn put(&mut self, _slot: u32, key: &str, at: u64, seq: u64, out: &mut Vec<u8>) {
        out.push(b'P');
        out.extend_from_slice(key.as_bytes());
        out.push(b' ');
        self.values.write(at, seq, out);
        out.push(b'\n');
    }

    fn get(&mut self, _slot: u32, _key: &str, out: &mut Vec<u8>) {
        out.push(b'G');
        decimal(self.values.len as u64, out);
        out.push(b'\n');
    }

    fn subscribe(&mut self, _key: &str, out: &mut Vec<u8>) {
        self.subscribed = true;
        out.extend_from_slice(b"S\n");
    }

    fn parse(&mut self, buf: &[u8], _out: &mut Vec<u8>, events: &mut Vec<Event>) -> usize {
        let mut at = 0;
        while let Some(end) = memchr(b'\n', &buf[at..]) {
            let line = &buf[at..at + end];
            at += end + 1;
            events.push(match line.first() {
                Some(b'P') => update(memchr(b' ', line).map_or(&[], |space| &line[space + 1..])),
                _ if self.subscribed => Event::Ready,
                _ => Event::Reply { slot: None, good: true },
            });
        }
        at
    }
}
