//! The pace of the oldest clients, which take each read of their socket for one message and lose what shares a read with
//! it: one message for each write, and a pause before the next. The backlog stays in the mailbox meanwhile, where a newer
//! change of a key takes the place of an older one.

use std::pin::Pin;
use std::task::{Context, Waker};
use std::time::Duration;

use nkv_protocol::{Chunks, leave_out_revision};
use tokio::time::{Instant, Sleep, sleep};

use super::Outbox;

/// The least time between two writes: by then the reader of the first has returned, as a rule.
const PAUSE: Duration = Duration::from_millis(2);

/// How much these clients read at a time.
const READ_LEN: usize = 1_024;

/// The state of a paced outbox.
#[derive(Debug)]
pub(super) struct Pace {
    /// Messages that were taken out of the mailbox as one item, and wait for their turns.
    rest: Chunks,
    /// The bytes to pass to [`Shared::flushed`](crate::notifier::Shared::flushed) when the last of them is written.
    counted: usize,
    pause: Pin<Box<Sleep>>,
    /// What was taken last is written when the next is to be taken: the pause begins then.
    has_written: bool,
    /// The client has shown that it is none of the oldest.
    ends: bool,
    /// How much slack the mailbox had before.
    slack: usize,
}

/// What a paced outbox does next.
pub(super) enum Next {
    /// It writes what is in the buffer, or waits if nothing is.
    Wait,
    /// It takes one item out of the mailbox.
    Item,
    /// It does as all do: the pace has ended.
    GoOn,
}

impl Outbox {
    /// Writes each message on its own from now on, at least 2 ms after the one before, and conflates the backlog meanwhile.
    /// A change's line leaves out `revision` and `skipped` where that makes it fit into 1,024 bytes.
    ///
    /// A paced outbox does not shut its writer down when it has ended: how the connection ends is left to the caller.
    pub fn pace(&mut self) {
        if self.pace.is_none() {
            let slack = self.inbox.set_slack(0);
            let pause = Box::pin(sleep(Duration::ZERO));
            let (rest, counted, has_written, ends) = Default::default();
            self.pace = Some(Box::new(Pace { rest, counted, pause, has_written, ends, slack }));
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

    /// Says what is next while there is a pace, and puts a message into the buffer if one is at hand.
    #[cold]
    #[inline(never)]
    pub(super) fn next_line(&mut self, cx: &mut Context<'_>, change_waker: &Waker) -> Next {
        let Some(pace) = &mut self.pace else { return Next::GoOn };
        if let Some(next) = std::mem::take(&mut pace.has_written).then(|| Instant::now().checked_add(PAUSE)).flatten() {
            pace.pause.as_mut().reset(next);
        }
        if pace.ends && pace.rest.is_empty() {
            self.pace = None;
            return Next::GoOn;
        }
        if !pace.ends && pace.pause.as_mut().poll(cx).is_pending() {
            self.inbox.poll_called(&mut Context::from_waker(change_waker));
            return Next::Wait;
        }
        if pace.rest.is_empty() {
            return Next::Item;
        }
        self.first_line();
        Next::Wait
    }

    /// Keeps all but the first message of an item that was just taken for later.
    #[cold]
    #[inline(never)]
    pub(super) fn keep_rest(&mut self) {
        if let Some(pace) = &mut self.pace {
            std::mem::swap(&mut pace.rest, &mut self.out);
            pace.counted = std::mem::take(&mut self.counted);
            self.first_line();
        }
    }

    fn first_line(&mut self) {
        if let Some(pace) = &mut self.pace {
            pace.rest.move_line(&mut self.out);
            if pace.rest.is_empty() {
                self.counted = std::mem::take(&mut pace.counted);
            }
            pace.has_written = !self.out.is_empty();
            leave_out_revision(&mut self.out, READ_LEN);
        }
    }
}
