//! NATS: a key-value bucket of JetStream in files, as its clients make and use it.

use memchr::{memchr, memmem};

use super::*;

#[derive(Debug)]
pub(super) struct Nats {
    connection: usize,
    values: Arc<Values>,
}

/// The slot of the answer to a subscription.
const SUBSCRIBED: u32 = 999_999_999;

impl Nats {
    pub(super) fn new(connection: usize, values: Arc<Values>) -> Self {
        Nats { connection, values }
    }

    /// The line of a publication whose answer comes to the inbox of `slot`.
    fn publication(&self, subject: &[&str], slot: u32, len: usize, out: &mut Vec<u8>) {
        out.extend_from_slice(b"PUB ");
        subject.iter().for_each(|part| out.extend_from_slice(part.as_bytes()));
        out.extend_from_slice(b" _INBOX.c");
        decimal(self.connection as u64, out);
        out.push(b'.');
        decimal(slot.into(), out);
        out.push(b' ');
        decimal(len as u64, out);
        out.extend_from_slice(b"\r\n");
    }

    fn ask(&self, subject: &str, slot: u32, body: &str, out: &mut Vec<u8>) {
        self.publication(&[subject], slot, body.len(), out);
        out.extend_from_slice(body.as_bytes());
        out.extend_from_slice(b"\r\n");
    }

    /// The event of a message, if it is one; flow control is answered.
    fn message(&self, words: &[&[u8]], head: &[u8], data: &[u8], out: &mut Vec<u8>) -> Option<Event> {
        if words[2] != b"2" {
            let slot = words[1].rsplit(|byte| *byte == b'.').next().and_then(number).unwrap_or(0) as u32;
            let whole = head.is_empty() || data.len() == self.values.len;
            let good = whole && (!head.is_empty() || memmem::find(data, b"\"error\"").is_none());
            return Some(if slot == SUBSCRIBED { Event::Ready } else { Event::Reply { slot: Some(slot), good } });
        }
        if !data.is_empty() || !head.starts_with(b"NATS/1.0 100") {
            return Some(update(data));
        }
        if words.len() == 6 && memmem::find(head, b"FlowControl").is_some() {
            out.extend_from_slice(b"PUB ");
            out.extend_from_slice(words[3]);
            out.extend_from_slice(b" 0\r\n\r\n");
        }
        None
    }
}

impl Driver for Nats {
    fn hello(&mut self, out: &mut Vec<u8>) -> bool {
        let connect = r#"CONNECT {"verbose":false,"pedantic":false,"headers":true,"no_responders":true,"protocol":1}"#;
        out.extend_from_slice(format!("{connect}\r\nSUB _INBOX.c{}.* 1\r\nPING\r\n", self.connection).as_bytes());
        true
    }

    fn set_up(&mut self, out: &mut Vec<u8>) -> bool {
        // What the clients of NATS make for a bucket with a history of 1.
        let stream = r#"{"name":"KV_b","subjects":["$KV.b.>"],"retention":"limits","max_consumers":-1,"max_msgs":-1,
            "max_bytes":-1,"max_age":0,"max_msgs_per_subject":1,"max_msg_size":-1,"discard":"new","storage":"file",
            "num_replicas":1,"duplicate_window":120000000000,"deny_delete":true,"allow_rollup_hdrs":true,
            "allow_direct":true}"#;
        self.ask("$JS.API.STREAM.CREATE.KV_b", 0, stream, out);
        true
    }

    fn put(&mut self, slot: u32, key: &str, at: u64, seq: u64, out: &mut Vec<u8>) {
        self.publication(&["$KV.b.", key], slot, self.values.len, out);
        self.values.write(at, seq, out);
        out.extend_from_slice(b"\r\n");
    }

    fn get(&mut self, slot: u32, key: &str, out: &mut Vec<u8>) {
        self.publication(&["$JS.API.DIRECT.GET.KV_b.$KV.b.", key], slot, 0, out);
        out.extend_from_slice(b"\r\n");
    }

    fn subscribe(&mut self, key: &str, out: &mut Vec<u8>) {
        // As a client watches a key: an ordered consumer that pushes. Its subject is this process's alone, since a
        // consumer of an earlier run lives on for a while.
        let subject = format!("_DLV.p{}.c{}", std::process::id(), self.connection);
        out.extend_from_slice(format!("SUB {subject} 2\r\n").as_bytes());
        let consumer = format!(
            r#"{{"stream_name":"KV_b","config":{{"deliver_subject":"{subject}","deliver_policy":"last_per_subject",
            "ack_policy":"none","max_deliver":1,"filter_subject":"$KV.b.{key}","replay_policy":"instant",
            "ack_wait":79200000000000,"flow_control":true,"idle_heartbeat":5000000000,"num_replicas":1,
            "mem_storage":true}}}}"#
        );
        self.ask("$JS.API.CONSUMER.CREATE.KV_b", SUBSCRIBED, &consumer, out);
    }

    fn parse(&mut self, buf: &[u8], out: &mut Vec<u8>, events: &mut Vec<Event>) -> usize {
        let mut at = 0;
        while let Some(end) = memchr(b'\n', &buf[at..]) {
            let line = &buf[at..at + end.saturating_sub(1)];
            let body = at + end + 1;
            let with_head = line.starts_with(b"HMSG ");
            if with_head || line.starts_with(b"MSG ") {
                let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
                let count = |from_end: usize| number(words[words.len() - from_end]).unwrap_or(0) as usize;
                let (len, head_len) = (count(1), if with_head { count(2) } else { 0 });
                if buf.len() < body + len + 2 {
                    return at;
                }
                let (head, data) = buf[body..body + len].split_at(head_len);
                at = body + len + 2;
                events.extend(self.message(&words, head, data, out));
                continue;
            }
            at = body;
            if line.starts_with(b"PING") {
                out.extend_from_slice(b"PONG\r\n");
            } else if line.starts_with(b"PONG") {
                events.push(Event::Ready);
            } else if line.starts_with(b"-ERR") {
                eprintln!("nats: {}", String::from_utf8_lossy(line));
            }
        }
        at
    }
}
