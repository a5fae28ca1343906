//! From bytes to requests, incrementally: the framing of the server's side.

use crate::request::{Head, Id, NAME_LEN_MAX, Request};
use crate::status;

/// What a message may measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest value, in bytes. 1 MiB by default.
    pub value_len_max: usize,
    /// Longest payload that is read past when it is refused, in bytes; after a longer one the connection is closed.
    /// 64 MiB by default.
    pub skip_len_max: u64,
}

impl Limits {
    /// Longest line: the largest value in its longest form (a string of `\u00xx` escapes), with room for the rest.
    #[must_use]
    pub fn line_len_max(&self) -> usize {
        self.value_len_max.saturating_mul(6).saturating_add(32 * NAME_LEN_MAX)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits { value_len_max: 1 << 20, skip_len_max: 64 << 20 }
    }
}

/// A request that is not served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal<'a> {
    /// The request's id, if it could be read.
    pub id: Id<'a>,
    /// Why, as a number.
    pub status: u16,
    /// Why, in words.
    pub message: String,
    /// Whether the connection ends after the answer, because the end of the message is not known or not near.
    pub close: bool,
}

/// What became of some input.
#[derive(Debug)]
pub struct Decoded<'a> {
    /// How many bytes of the input are done with.
    pub consumed: usize,
    /// What they were; `None` when more bytes are needed.
    pub item: Option<Result<Request<'a>, Refusal<'a>>>,
}

/// Decodes requests from a stream of bytes.
///
/// The input of a call starts where the last call's `consumed` ended. What is returned borrows from the input.
#[derive(Debug)]
pub struct Decoder {
    limits: Limits,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Within a line; so many of its bytes hold no newline.
    Line { scanned: usize },
    /// A line with a payload is there, so many bytes in all, newlines included.
    Payload { line_len: usize, whole_len: usize },
    /// So many bytes of a refused payload are still to be read past.
    Skip { left: u64 },
}

const START: State = State::Line { scanned: 0 };

impl Decoder {
    /// A decoder at the start of a stream.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Decoder { limits, state: START }
    }

    /// How many bytes the message in hand takes at least, if that is known already: what to make room for.
    #[must_use]
    pub fn expected_len(&self) -> Option<usize> {
        match self.state {
            State::Payload { whole_len, .. } => Some(whole_len),
            _ => None,
        }
    }

    /// Whether some of a message has come, and not all of it.
    #[must_use]
    pub fn is_within_message(&self) -> bool {
        !matches!(self.state, State::Line { scanned: 0 })
    }

    /// Decodes the next message.
    pub fn decode<'a>(&mut self, input: &'a [u8]) -> Decoded<'a> {
        let mut consumed = 0;
        loop {
            let rest = &input[consumed..];
            let step = match self.state {
                State::Line { scanned } => self.line(rest, scanned),
                State::Payload { line_len, whole_len } => self.payload(rest, line_len, whole_len),
                State::Skip { left } => self.skip(rest, left),
            };
            consumed += step.consumed;
            if step.item.is_some() || step.consumed == 0 {
                return Decoded { consumed, ..step };
            }
        }
    }

    fn line<'a>(&mut self, input: &'a [u8], scanned: usize) -> Decoded<'a> {
        let line_len_max = self.limits.line_len_max();
        let Some(found) = memchr::memchr(b'\n', input.get(scanned..).unwrap_or_default()) else {
            self.state = State::Line { scanned: input.len() };
            if input.len() <= line_len_max {
                return Decoded { consumed: 0, item: None };
            }
            return self.refuse(input.len(), over("line", line_len_max, Id::default(), true));
        };
        self.state = START;
        let line_len = scanned + found + 1;
        let line = trim(&input[..line_len]);
        if line.is_empty() {
            return Decoded { consumed: line_len, item: None };
        }
        if line.len() > line_len_max {
            // Whether a payload follows is not known.
            return self.refuse(line_len, over("line", line_len_max, Id::default(), true));
        }
        let mut head = Head::default();
        let read = head.read(line, self.limits.value_len_max);
        let Some(payload_len) = head.len else {
            return Decoded { consumed: line_len, item: Some(finish(head, read, None)) };
        };
        if payload_len > self.limits.skip_len_max {
            let what = if payload_len > self.limits.value_len_max as u64 { "value" } else { "payload" };
            return self.refuse(line_len, over(what, self.limits.value_len_max, head.id, true));
        }
        if payload_len > self.limits.value_len_max as u64 || read.is_err() {
            self.state = State::Skip { left: payload_len + 1 };
            let refusal = match finish(head, read, None) {
                Err(refusal)
                    if refusal.status == status::TOO_LARGE || payload_len <= self.limits.value_len_max as u64 =>
                {
                    refusal
                }
                Ok(Request { id, .. }) | Err(Refusal { id, .. }) => over("value", self.limits.value_len_max, id, false),
            };
            return Decoded { consumed: line_len, item: Some(Err(refusal)) };
        }
        // Fits a usize: it is at most `value_len_max`.
        let whole_len = line_len + payload_len as usize + 1;
        if input.len() < whole_len {
            self.state = State::Payload { line_len, whole_len };
            return Decoded { consumed: 0, item: None };
        }
        self.with_payload(head, read, input, line_len, whole_len)
    }

    /// More bytes of a message with a payload; its line is read again once all are there.
    fn payload<'a>(&mut self, input: &'a [u8], line_len: usize, whole_len: usize) -> Decoded<'a> {
        if input.len() < whole_len {
            return Decoded { consumed: 0, item: None };
        }
        self.state = START;
        let mut head = Head::default();
        let read = head.read(trim(&input[..line_len]), self.limits.value_len_max);
        self.with_payload(head, read, input, line_len, whole_len)
    }

    fn with_payload<'a>(
        &mut self,
        head: Head<'a>,
        read: Result<(), String>,
        input: &'a [u8],
        line_len: usize,
        whole_len: usize,
    ) -> Decoded<'a> {
        if input[whole_len - 1] != b'\n' {
            return self.refuse(whole_len, unterminated(head.id));
        }
        let payload = &input[line_len..whole_len - 1];
        Decoded { consumed: whole_len, item: Some(finish(head, read, Some(payload))) }
    }

    fn skip<'a>(&mut self, input: &'a [u8], left: u64) -> Decoded<'a> {
        let take = left.min(input.len() as u64);
        self.state = if take == left { START } else { State::Skip { left: left - take } };
        // At most `input.len()`, so it fits.
        let consumed = take as usize;
        if take == left && consumed > 0 && input[consumed - 1] != b'\n' {
            return self.refuse(consumed, unterminated(Id::default()));
        }
        Decoded { consumed, item: None }
    }

    fn refuse<'a>(&mut self, consumed: usize, refusal: Refusal<'a>) -> Decoded<'a> {
        Decoded { consumed, item: Some(Err(refusal)) }
    }
}

fn finish<'a>(head: Head<'a>, read: Result<(), String>, payload: Option<&'a [u8]>) -> Result<Request<'a>, Refusal<'a>> {
    let id = head.id;
    if let Some((what, len_max)) = head.over {
        return Err(over(what, len_max, id, false));
    }
    let request = read.and_then(|()| head.into_request(payload));
    request.map_err(|message| Refusal { id, status: status::BAD_REQUEST, message, close: false })
}

fn over<'a>(what: &str, len_max: usize, id: Id<'a>, close: bool) -> Refusal<'a> {
    let message = format!("{what} over the limit of {len_max} bytes");
    Refusal { id, status: status::TOO_LARGE, message, close }
}

fn unterminated(id: Id<'_>) -> Refusal<'_> {
    let message = "no newline after the payload: 'len' must be its length in bytes".into();
    Refusal { id, status: status::BAD_REQUEST, message, close: true }
}

fn trim(line: &[u8]) -> &[u8] {
    line.trim_ascii()
}
