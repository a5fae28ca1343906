//! The pace of the oldest clients, which take each read of their socket for one message and lose what shares a read with
//! it: one message for each write, and a pause before the next. What waits meanwhile waits in the mailbox, where a newer
//! change of a key takes the place of an older one.

use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::BufMut;
use nkv_protocol::Chunks;
use tokio::io::AsyncWrite;
use tokio::time::{Instant, Sleep, sleep};

use super::{Outbox, WriterEnd};

/// The least time between two writes: by then the reader of the first has returned, as a rule.
const PAUSE: Duration = Duration::from_millis(2);

/// How much these clients read at a time.
const READ_LEN: usize = 1_024;

/// The longest that [`without_revision`] can leave out: two names and two numbers.
const REVISION_LEN_MAX: usize = 64;

/// The state of a paced outbox.
#[derive(Debug)]
pub(super) struct Pace {
    /// Messages that were taken out of the mailbox as one item, and wait for their turns.
    rest: Chunks,
    /// How many bytes [`Shared::flushed`](crate::notifier::Shared::flushed) is to be told of when the last of them is written.
    counted: usize,
    pause: Pin<Box<Sleep>>,
    /// The client has shown that it is none of the oldest.
    ends: bool,
    /// How much slack the mailbox had before.
    slack: usize,
}

/// What is to be done next.
enum Next {
    /// A message was put into the outbox's buffer.
    Write,
    /// All is written, and the mailbox is closed.
    Close,
    /// The pace has ended.
    GoOn,
}

impl Outbox {
    /// Writes each message on its own from now on, at least 2 ms after the one before, and conflates what waits meanwhile.
    /// A change's line leaves out `revision` and `skipped` where that makes it fit into 1,024 bytes.
    ///
    /// A paced outbox does not shut its writer down when it has ended: how the connection ends is left to the caller.
    pub fn pace(&mut self) {
        if self.pace.is_none() {
            let slack = self.inbox.set_slack(0);
            let pause = Box::pin(sleep(Duration::ZERO));
            self.pace = Some(Box::new(Pace { rest: Chunks::default(), counted: 0, pause, ends: false, slack }));
        }
    }

    /// Ends what [`pace`](Self::pace) began, once what it has in hand is written.
    pub fn end_pace(&mut self) {
        if let Some(pace) = &mut self.pace {
            pace.ends = true;
            self.inbox.set_slack(pace.slack);
        }
    }

    /// Returns whether messages are written one at a time.
    #[must_use]
    pub fn is_paced(&self) -> bool {
        self.pace.as_ref().is_some_and(|pace| !pace.ends)
    }

    /// As [`poll`](Self::poll), while there is a pace; ready with `None` when there is none any more.
    pub(super) fn poll_paced<W>(
        &mut self,
        cx: &mut Context<'_>,
        told: &Waker,
        writer: &mut W,
    ) -> Poll<Option<WriterEnd>>
    where
        W: AsyncWrite + Unpin,
    {
        loop {
            if self.out.is_empty() {
                match self.poll_line(cx, told) {
                    Poll::Ready(Next::Write) => {}
                    Poll::Ready(Next::Close) => return Poll::Ready(Some(WriterEnd::Finished)),
                    Poll::Ready(Next::GoOn) => {
                        // What the mailbox was last asked with is not known to the usual way.
                        (self.pace, self.told) = (None, None);
                        return Poll::Ready(None);
                    }
                    Poll::Pending => return Poll::Pending,
                }
            }
            match self.poll_write(cx, writer) {
                Poll::Ready(Ok(())) => {
                    if let (Some(pace), Some(next)) = (&mut self.pace, Instant::now().checked_add(PAUSE)) {
                        pace.pause.as_mut().reset(next);
                    }
                }
                Poll::Ready(Err(end)) => return Poll::Ready(Some(end)),
                Poll::Pending => {
                    self.inbox.poll_called(&mut Context::from_waker(told));
                    return Poll::Pending;
                }
            }
        }
    }

    /// Waits for the end of the pause, then takes the next message, and no more than it must.
    fn poll_line(&mut self, cx: &mut Context<'_>, told: &Waker) -> Poll<Next> {
        let Some(pace) = &mut self.pace else { return Poll::Ready(Next::GoOn) };
        if pace.ends && pace.rest.is_empty() {
            return Poll::Ready(Next::GoOn);
        }
        if !pace.ends && pace.pause.as_mut().poll(cx).is_pending() {
            self.inbox.poll_called(&mut Context::from_waker(told));
            return Poll::Pending;
        }
        if pace.rest.is_empty() && !ready!(self.poll_item(told)) {
            return Poll::Ready(Next::Close);
        }
        if let Some(pace) = &mut self.pace {
            move_line(&mut pace.rest, &mut self.out);
            if pace.rest.is_empty() {
                self.counted = std::mem::take(&mut pace.counted);
            }
        }
        if let Some(line) = fitting(&self.out) {
            self.out = line;
        }
        Poll::Ready(Next::Write)
    }

    /// Encodes the next item of the mailbox, or the next piece of a snapshot; false once all is done and the mailbox closed.
    fn poll_item(&mut self, told: &Waker) -> Poll<bool> {
        while self.out.is_empty() {
            match ready!(self.inbox.poll_take(&mut Context::from_waker(told))) {
                Some(item) => self.encode(item),
                None => return Poll::Ready(false),
            }
        }
        if let Some(pace) = &mut self.pace {
            std::mem::swap(&mut pace.rest, &mut self.out);
            pace.counted = std::mem::take(&mut self.counted);
        }
        Poll::Ready(true)
    }
}

/// Moves the first line to `out`, which is empty.
fn move_line(rest: &mut Chunks, out: &mut Chunks) {
    let mut len = 0_usize;
    for slice in rest.slices() {
        let end = slice.iter().position(|byte| *byte == b'\n');
        len = len.saturating_add(end.map_or(slice.len(), |at| at.saturating_add(1)));
        if end.is_some() {
            break;
        }
    }
    if len == rest.len() {
        return out.append(rest);
    }
    let mut left = len;
    for slice in rest.slices() {
        let part = slice.get(..left).unwrap_or(slice);
        out.tail().put_slice(part);
        left = left.saturating_sub(part.len());
    }
    rest.advance(len);
}

/// What to write in place of a line that is too long for one read, and is not without its revision.
fn fitting(line: &Chunks) -> Option<Chunks> {
    let excess = line.len().saturating_sub(READ_LEN);
    if excess == 0 || excess > REVISION_LEN_MAX {
        return None;
    }
    line.slices().next().and_then(without_revision).filter(|short| short.len() <= READ_LEN)
}

/// The line of a change without its `revision` and `skipped`, which stand next to each other; `None` for any other line.
/// A quotation mark within a string is escaped, so the name is found nowhere but where it is one.
fn without_revision(line: &[u8]) -> Option<Chunks> {
    const REVISION: &[u8] = b",\"revision\":";
    let digits = |text: &[u8]| text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let at = line.windows(REVISION.len()).rposition(|window| window == REVISION)?;
    let (before, fields) = line.split_at_checked(at)?;
    let behind = fields.strip_prefix(REVISION)?;
    let behind = behind.get(digits(behind)..)?.strip_prefix(b",\"skipped\":")?;
    let mut short = Chunks::default();
    short.tail().put_slice(before);
    short.tail().put_slice(behind.get(digits(behind)..)?);
    Some(short)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunks(pieces: &[&[u8]]) -> Chunks {
        let mut chunks = Chunks::default();
        for piece in pieces {
            chunks.push(&bytes::Bytes::copy_from_slice(piece));
        }
        chunks
    }

    #[test]
    fn lines_come_one_by_one_wherever_the_pieces_end() {
        let long = [&[b'x'; 9_000][..], b"\n"].concat();
        let mut rest = chunks(&[b"one\ntw", b"o\n", &long, b"th", &long, b"end"]);
        let expected: [&[u8]; 5] = [b"one\n", b"two\n", &long, &[b"th", &long[..]].concat(), b"end"];
        for line in expected {
            let mut out = Chunks::default();
            move_line(&mut rest, &mut out);
            assert!(out.take().concat() == line, "{}", line.len());
        }
        assert!(rest.is_empty());
    }

    #[test]
    fn only_a_change_is_written_without_its_revision() {
        let short = |line: &str| without_revision(line.as_bytes()).map(|mut line| line.take().concat());
        let key = r#"a,\"revision\":1,\"skipped\":2"#;
        for (line, expected) in [
            (
                r#"{"Update":{"key":"KEY","value":[1],"revision":12,"skipped":0}}"#,
                r#"{"Update":{"key":"KEY","value":[1]}}"#,
            ),
            (
                r#"{"Close":{"key":"KEY","revision":9,"skipped":34,"reason":"deleted"}}"#,
                r#"{"Close":{"key":"KEY","reason":"deleted"}}"#,
            ),
        ] {
            assert_eq!(short(&line.replace("KEY", key)).unwrap(), expected.replace("KEY", key).as_bytes());
        }
        for line in [
            r#"{"Base":{"id":"1","status":200,"message":"No Error","revision":3}}"#,
            r#"{"Synced":{"key":"a","revision":3,"epoch":"e"}}"#,
            r#"{"Close":{"key":"KEY","reason":"replaced"}}"#,
            "\"Hello\"",
        ] {
            assert_eq!(short(&line.replace("KEY", key)), None, "{line}");
        }
    }
}
