//! The JSON gateway of etcd, by HTTP/1.1 with connections that stay: keys and values are base64.

use std::collections::VecDeque;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use memchr::memmem;

use super::*;

#[derive(Debug)]
pub(super) struct Gateway {
    values: Arc<Values>,
    /// Whether each request under way gets a value.
    gets: VecDeque<bool>,
}

impl Gateway {
    pub(super) fn new(values: Arc<Values>) -> Self {
        Gateway { values, gets: VecDeque::new() }
    }

    fn post(&mut self, is_get: bool, path: &str, body: &str, out: &mut Vec<u8>) {
        self.gets.push_back(is_get);
        let head = format!("POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {}\r\n\r\n", body.len());
        out.extend_from_slice(head.as_bytes());
        out.extend_from_slice(body.as_bytes());
    }
}

impl Driver for Gateway {
    fn put(&mut self, _slot: u32, key: &str, at: u64, seq: u64, out: &mut Vec<u8>) {
        let mut value = Vec::new();
        self.values.write(at, seq, &mut value);
        let body = format!(r#"{{"key":"{}","value":"{}"}}"#, STANDARD.encode(key), STANDARD.encode(value));
        self.post(false, "/v3/kv/put", &body, out);
    }

    fn get(&mut self, _slot: u32, key: &str, out: &mut Vec<u8>) {
        let body = format!(r#"{{"key":"{}"}}"#, STANDARD.encode(key));
        self.post(true, "/v3/kv/range", &body, out);
    }

    /// No work of a goal asks for it.
    fn subscribe(&mut self, _key: &str, _out: &mut Vec<u8>) {}

    fn parse(&mut self, buf: &[u8], _out: &mut Vec<u8>, events: &mut Vec<Event>) -> usize {
        http::answers(buf, |is_ok, body| {
            // An absent key is no error there.
            let is_get = self.gets.pop_front().unwrap_or(false);
            let good = is_ok && (!is_get || memmem::find(body, b"\"value\":").is_some());
            events.push(Event::Reply { slot: None, good });
        })
    }
}
