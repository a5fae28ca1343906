//! Programs that speak another protocol, recognised by how their line begins. This is the one place where a server
//! recognises them; a client knows the greeting of NATS (`message.rs`).
//!
//! A browser can be made to send any bytes to a local port, behind a request line of HTTP. So a stream that is plainly of
//! another protocol ends there, and nothing that follows is read as requests. A line is of nkv if it begins with `{`. A
//! merely wrong line, such as the slip of a person who types, is not foreign.

use std::fmt;

/// A protocol that is not nkv's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Foreign {
    Binary,
    Http,
    Mail,
    Markup,
    Mqtt,
    Nats,
    Proxy,
    Redis,
    Ssh,
    Tls,
}

/// How many bytes are looked at of what is no text.
const HEAD_LEN: usize = 6;

impl Foreign {
    /// What the peer speaks, if that is plainly not nkv. `input` is where a line begins, `line` that line once its end is
    /// there. What is recognised does not depend on how much more of the input is there.
    pub(crate) fn recognise(input: &[u8], line: Option<&[u8]>) -> Option<Self> {
        if input.starts_with(b"{") {
            return None;
        }
        let head = line.unwrap_or(input);
        let head = head.get(..HEAD_LEN).or_else(|| line.is_some().then_some(head))?;
        Foreign::of_bytes(head).or_else(|| Foreign::of_line(line?.trim_ascii()))
    }

    /// No text holds a zero byte, and none that is typed begins with several control characters. (A length of four bytes,
    /// the lowest first, and a text would have a zero in the fourth place and a letter behind it.)
    fn of_bytes(head: &[u8]) -> Option<Self> {
        match head {
            // A record of a handshake, its version and length, and the message that a client begins with.
            [0x16, 3, 0..=4, _, _, 1] | [0x16, 3, .., b'\n'] => Some(Foreign::Tls),
            [0x10, _, 0, 4 | 6, b'M', b'Q'] => Some(Foreign::Mqtt),
            head if head.contains(&0) => Some(Foreign::Binary),
            head => (head.iter().filter(|byte| is_control(**byte)).count() > 1).then_some(Foreign::Binary),
        }
    }

    fn of_line(line: &[u8]) -> Option<Self> {
        let line = std::str::from_utf8(line).ok()?;
        if is_http(line) {
            return Some(Foreign::Http);
        }
        let starts = [
            ("CONNECT {", Foreign::Nats),
            ("INFO {", Foreign::Nats),
            ("PROXY TCP", Foreign::Proxy),
            ("PROXY UNKNOWN", Foreign::Proxy),
            ("SSH-", Foreign::Ssh),
            ("EHLO ", Foreign::Mail),
            ("HELO ", Foreign::Mail),
            ("<", Foreign::Markup),
        ];
        let known = starts.iter().find(|(start, _)| line.starts_with(start)).map(|(_, foreign)| *foreign);
        known.or_else(|| is_redis(line).then_some(Foreign::Redis))
    }
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Foreign::Binary => "a binary protocol",
            Foreign::Http => "HTTP",
            Foreign::Mail => "SMTP",
            Foreign::Markup => "XML or HTML",
            Foreign::Mqtt => "MQTT",
            Foreign::Nats => "the protocol of NATS",
            Foreign::Proxy => "the PROXY protocol",
            Foreign::Redis => "the protocol of Redis",
            Foreign::Ssh => "SSH",
            Foreign::Tls => "TLS",
        })
    }
}

/// Neither white space nor what an arrow key sends.
fn is_control(byte: u8) -> bool {
    byte < b' ' && !byte.is_ascii_whitespace() && byte != b'\x1b'
}

/// A request line, a status line, or a usual header. A request line has two fields or three, or ends with a
/// version: `GET ID CLIENT KEY` is none.
fn is_http(line: &str) -> bool {
    let ends_so = line.rsplit_once(' ').is_some_and(|(_, version)| is_version(version));
    if ends_so && METHODS.iter().any(|method| line.strip_prefix(method).is_some_and(|rest| rest.starts_with(' '))) {
        return true;
    }
    let mut fields = line.split(' ');
    match (fields.next(), fields.next(), fields.next(), fields.next()) {
        (Some(version), Some(_), ..) if is_version(version) => true,
        (Some(_), Some(_), Some(version), None) if is_version(version) => true,
        (Some(method), Some(target), None, None) if target.starts_with('/') => METHODS.contains(&method),
        _ => is_header(line),
    }
}

fn is_header(line: &str) -> bool {
    line.split_once(':').is_some_and(|(name, _)| HEADERS.iter().any(|header| name.eq_ignore_ascii_case(header)))
}

const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];

const HEADERS: [&str; 12] = [
    "accept",
    "authorization",
    "connection",
    "content-length",
    "content-type",
    "cookie",
    "host",
    "origin",
    "referer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
];

/// A version of HTTP, or of a protocol with its form.
fn is_version(field: &str) -> bool {
    field.split_once('/').is_some_and(|(protocol, number)| {
        ["HTTP", "RTSP", "SIP"].contains(&protocol) && number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
    })
}

/// The length of an array or a string, which each request begins with.
fn is_redis(line: &str) -> bool {
    line.strip_prefix(['*', '$']).is_some_and(|len| !len.is_empty() && len.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recognised(input: &[u8]) -> Option<Foreign> {
        let line = input.iter().position(|byte| *byte == b'\n').map(|end| &input[..=end]);
        Foreign::recognise(input, line)
    }

    #[test]
    fn a_peer_that_is_plainly_not_nkv_is_recognised() {
        for (input, foreign) in [
            (&b"GET / HTTP/1.1\r\n"[..], Foreign::Http),
            (b"POST /a?b HTTP/1.0\n", Foreign::Http),
            (b"BREW * HTTP/9\n", Foreign::Http),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0", Foreign::Http),
            (b"OPTIONS rtsp://a RTSP/1.0\r\n", Foreign::Http),
            (b"GET /\r\n", Foreign::Http),
            (b"HTTP/1.1 400 Bad Request\r\n", Foreign::Http),
            (b"hOST: 127.0.0.1:4222\r\n", Foreign::Http),
            (b"Content-Length:5\n", Foreign::Http),
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", Foreign::Tls),
            (b"\x16\x03\x01\x00\xa5\x01", Foreign::Tls),
            (b"\x16\x03\x01\x0a\x00\x01", Foreign::Tls),
            (b"\x16\x03\x01\n\x00\x01", Foreign::Tls),
            (b"\x10\x10\x00\x04MQTT\x04\x02\x00\x3c", Foreign::Mqtt),
            (b"*1\r\n$4\r\nPING\r\n", Foreign::Redis),
            (b"$4\r\n", Foreign::Redis),
            (b"CONNECT {\"verbose\":false}\r\nPING\r\n", Foreign::Nats),
            (b"SSH-2.0-OpenSSH_9.6\r\n", Foreign::Ssh),
            (b"EHLO a\r\n", Foreign::Mail),
            (b"PROXY TCP4 10.0.0.1 10.0.0.2 56324 4222\r\n", Foreign::Proxy),
            (b"<policy-file-request/>\n", Foreign::Markup),
            (b"\0\0\0\x08\x04\xd2\x16\x2f", Foreign::Binary),
            (b"\0\r\nQUIT\n", Foreign::Binary),
            (b"0\x0c\x02\x01\x01\x60\x07", Foreign::Binary),
        ] {
            assert_eq!(recognised(input), Some(foreign), "{:?}", String::from_utf8_lossy(input));
        }
    }

    #[test]
    fn what_is_merely_wrong_or_a_line_of_words_is_not_foreign() {
        for input in [
            &b"{\"type\":\"Get\",\"key\":\"GET / HTTP/1.1\"}\n"[..],
            b"not json\n",
            b"[1]\n",
            b"\"GET / HTTP/1.1\"\n",
            b"GET 7 client a.b\n",
            b"PUT 7 client a.b aGk=\n",
            b"DEL 7 client a\n",
            b"TRACE 7 client /a\n",
            b"HEALTH 7 client HK\n",
            b"GET a\n",
            b"get /a\n",
            b"key: value\n",
            b"*\n",
            b"$x\n",
            b"\x1b[A\n",
            b"\x1b[A\x1b[A\x1b[A\n",
            b"\x01{\"type\":\"Health\"}\n",
            b"\xef\xbb\xbf{\"type\":\"Health\"}\n",
            b"",
            b"\0\0\0",
            b"GET / HTTP/1.1",
            b"Hos",
        ] {
            assert_eq!(recognised(input), None, "{:?}", String::from_utf8_lossy(input));
        }
    }
}
