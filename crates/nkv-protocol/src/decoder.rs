//! From bytes to requests, incrementally: the framing of the server's side.

use crate::foreign::Foreign;
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
    /// Longest line, newline included: the largest value in its longest form (a string of `\u00xx` escapes), with
    /// room for the rest.
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
#[non_exhaustive]
pub struct Decoded<'a> {
    /// How many bytes of the input are done with.
    pub consumed: usize,
    /// What they were; `None` when more bytes are needed.
    pub item: Option<Result<Request<'a>, Refusal<'a>>>,
}

/// Decodes requests from a stream of bytes.
///
/// The input of a call starts where the last call's `consumed` ended. What is returned borrows from the input.
#[derive(Clone, Debug)]
pub struct Decoder {
    limits: Limits,
    state: State,
}

#[derive(Clone, Debug)]
enum State {
    /// Within a line, of which `scanned` bytes hold no newline.
    Line { scanned: usize },
    /// A line with a payload is there, `whole_len` bytes in all, newlines included.
    Payload { line_len: usize, whole_len: usize },
    /// `left` bytes of a refused payload are still to be read past.
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
        // It is filled by one line at most: whatever becomes of that, this call ends with it.
        let mut head = Head::default();
        let mut rest = input;
        let item = loop {
            let step = match self.state {
                State::Line { scanned } => self.line(&mut head, rest, scanned),
                State::Payload { line_len, whole_len } => self.payload(&mut head, rest, line_len, whole_len),
                State::Skip { left } => self.skip(rest, left),
            };
            rest = rest.get(step.consumed..).unwrap_or_default();
            if step.item.is_some() || step.consumed == 0 {
                break step.item;
            }
        };
        let consumed = input.len().saturating_sub(rest.len());
        Decoded { consumed, item: item.map(|item| item.map(|()| head.into_request())) }
    }

    fn line<'a>(&mut self, head: &mut Head<'a>, input: &'a [u8], scanned: usize) -> Step<'a> {
        let line_len_max = self.limits.line_len_max();
        let found = split_line(input, scanned);
        if let Some(foreign) = Foreign::recognise(input, found.map(|(line, _)| line)) {
            self.state = START;
            return Step::refused(input.len(), not_nkv(foreign));
        }
        let Some((line, rest)) = found else {
            self.state = State::Line { scanned: input.len() };
            if input.len() <= line_len_max {
                return Step { consumed: 0, item: None };
            }
            return Step::refused(input.len(), over("line", line_len_max, Id::default(), true));
        };
        self.state = START;
        let line_len = line.len();
        if line_len > line_len_max {
            // Whether a payload follows is not known.
            return Step::refused(line_len, over("line", line_len_max, Id::default(), true));
        }
        let line = line.trim_ascii();
        if line.is_empty() {
            return Step { consumed: line_len, item: None };
        }
        let read = head.read(line, self.limits.value_len_max);
        let Some(payload_len) = head.len else {
            return Step { consumed: line_len, item: Some(finish(head, read, None)) };
        };
        if payload_len > self.limits.skip_len_max {
            let what = if payload_len > self.limits.value_len_max as u64 { "value" } else { "payload" };
            return Step::refused(line_len, over(what, self.limits.value_len_max, head.id(), true));
        }
        if payload_len > self.limits.value_len_max as u64 || read.is_err() {
            self.state = State::Skip { left: payload_len.saturating_add(1) };
            let refusal = match finish(head, read, None) {
                Err(refusal)
                    if refusal.status == status::TOO_LARGE || payload_len <= self.limits.value_len_max as u64 =>
                {
                    refusal
                }
                Ok(()) | Err(_) => over("value", self.limits.value_len_max, head.id(), false),
            };
            return Step::refused(line_len, refusal);
        }
        // Fits a usize: it is at most `value_len_max`.
        let ended_len = (payload_len as usize).saturating_add(1);
        let whole_len = line_len.saturating_add(ended_len);
        let Some(ended) = rest.get(..ended_len) else {
            self.state = State::Payload { line_len, whole_len };
            return Step { consumed: 0, item: None };
        };
        with_payload(head, read, ended, whole_len)
    }

    /// More bytes of a message with a payload; its line is read again once all are there.
    fn payload<'a>(&mut self, head: &mut Head<'a>, input: &'a [u8], line_len: usize, whole_len: usize) -> Step<'a> {
        let Some((line, ended)) = input.get(..whole_len).and_then(|whole| whole.split_at_checked(line_len)) else {
            return Step { consumed: 0, item: None };
        };
        self.state = START;
        let read = head.read(line.trim_ascii(), self.limits.value_len_max);
        with_payload(head, read, ended, whole_len)
    }

    fn skip<'a>(&mut self, input: &'a [u8], left: u64) -> Step<'a> {
        let Some(skipped) = usize::try_from(left).ok().and_then(|left| input.get(..left)) else {
            self.state = State::Skip { left: left.saturating_sub(input.len() as u64) };
            return Step { consumed: input.len(), item: None };
        };
        self.state = START;
        match skipped.last() {
            Some(b'\n') => Step { consumed: skipped.len(), item: None },
            _ => Step::refused(skipped.len(), unterminated(Id::default())),
        }
    }
}

/// What became of some input; the request itself is in the head.
struct Step<'a> {
    consumed: usize,
    item: Option<Result<(), Refusal<'a>>>,
}

impl<'a> Step<'a> {
    fn refused(consumed: usize, refusal: Refusal<'a>) -> Self {
        Step { consumed, item: Some(Err(refusal)) }
    }
}

/// A message of `whole_len` bytes, with its payload and the newline that must end it.
fn with_payload<'a>(head: &mut Head<'a>, read: Result<(), String>, ended: &'a [u8], whole_len: usize) -> Step<'a> {
    match ended.split_last() {
        Some((b'\n', payload)) => Step { consumed: whole_len, item: Some(finish(head, read, Some(payload))) },
        _ => Step::refused(whole_len, unterminated(head.id())),
    }
}

fn finish<'a>(head: &mut Head<'a>, read: Result<(), String>, payload: Option<&'a [u8]>) -> Result<(), Refusal<'a>> {
    if let Some((what, len_max)) = head.over {
        return Err(over(what, len_max, head.id(), false));
    }
    let complete = read.and_then(|()| head.complete(payload));
    complete.map_err(|message| Refusal { id: head.id(), status: status::BAD_REQUEST, message, close: false })
}

fn over<'a>(what: &str, len_max: usize, id: Id<'a>, close: bool) -> Refusal<'a> {
    let message = format!("{what} over the limit of {len_max} bytes");
    Refusal { id, status: status::TOO_LARGE, message, close }
}

fn not_nkv(foreign: Foreign) -> Refusal<'static> {
    let message = format!("this is {foreign}, and nkv speaks another protocol: JSON objects, one on a line");
    Refusal { id: Id::default(), status: status::BAD_REQUEST, message, close: true }
}

fn unterminated(id: Id<'_>) -> Refusal<'_> {
    let message = "no newline after the payload: 'len' must be its length in bytes".into();
    Refusal { id, status: status::BAD_REQUEST, message, close: true }
}

/// Splits off the first line, newline included, if its end is there. The first `scanned` bytes hold no newline.
pub(crate) fn split_line(input: &[u8], scanned: usize) -> Option<(&[u8], &[u8])> {
    let found = memchr::memchr(b'\n', input.get(scanned..)?)?;
    input.split_at_checked(scanned.checked_add(found)?.checked_add(1)?)
}
