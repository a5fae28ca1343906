//! Commands from a pipe or a file, one in each line.
//!
//! Puts and deletes are given to the server one behind another without waiting for answers; the server does them in
//! that order. Any other command waits until it is known what became of them. Results come in the order of the lines.
//! All commands are run, also after one that failed; the end is that of the first that did.

use std::collections::VecDeque;
use std::future::{pending, poll_fn, ready};
use std::io::Read;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use nkv_client::Client;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::task::coop::unconstrained;

use crate::args::Command;
use crate::end_when_interrupted;
use crate::failure::{Exit, Failure};
use crate::output::{Line, Output, Place, complain, help};
use crate::run::{VALUE_LEN_MAX, Written, check, value_of, write, written};
use crate::session::{Given, LINES_MAX, Parsed, Session, Settings};
use crate::stdio::{Stdin, reader_has_gone};

/// How many writes may be under way, to begin with and at most, and how many bytes of values, unless it is one alone.
const WRITES_MIN: usize = 32;
const WRITES_MAX: usize = 512;
const WRITES_LEN_MAX: usize = 16 << 20;
/// Longest line: the longest value and what stands before it.
const LINE_LEN_MAX: usize = VALUE_LEN_MAX as usize + (64 << 10);
/// How long a write may take if nothing else is said.
const PATIENCE: Duration = Duration::from_secs(5);
/// How much of stdin is read at once.
const READ_LEN: usize = 64 << 10;
/// How many parts of stdin wait to be run.
const PARTS_MAX: usize = 1;

/// Runs all commands; the end is that of the first that failed.
pub(crate) fn serve(runtime: &Runtime, client: &Client, settings: Settings) -> Result<Exit, Failure> {
    let (lines, mut written) = mpsc::channel::<Line>(LINES_MAX);
    let out = settings.out;
    let writer = runtime.spawn_blocking(move || {
        while let Some(line) = written.blocking_recv() {
            match line {
                Line::Result(line) => {
                    if out.line(&line).is_err() {
                        return;
                    }
                }
                Line::Note(what) | Line::Error(what) => complain(&what),
            }
        }
    });
    runtime.block_on(async {
        // Before the first command is read: nothing else could end a program that waits for its stdin.
        end_when_interrupted().await;
        let session = Session::new(client, settings, lines);
        let mut script = Script { session, writes: VecDeque::new(), window: WRITES_MIN };
        let done = script.run(&mut lines_of_stdin()?).await;
        let failures = script.session.failures.clone();
        script.session.end(writer).await;
        match done {
            Ok(()) | Err(Failure::BrokenPipe) => Ok(failures.first()),
            Err(failure) => Err(failure),
        }
    })
}

/// What stdin holds, in order.
enum Part {
    /// Lines, with their ends.
    Lines(Vec<Vec<u8>>),
    /// A line that is too long; the rest of it is passed over.
    TooLong,
    Failed(std::io::Error),
}

/// Reads stdin in a thread of its own: a runtime cannot wait for all that it may be.
fn lines_of_stdin() -> Result<mpsc::Receiver<Part>, Failure> {
    let (parts, received) = mpsc::channel(PARTS_MAX);
    let started = std::thread::Builder::new().name("stdin".into()).spawn(move || {
        // Closed means that the session has ended.
        _ = read_lines(Stdin, LINE_LEN_MAX, |part| parts.blocking_send(part));
    });
    match started {
        Ok(_) => Ok(received),
        Err(error) => Err(Failure::System(format!("cannot start a thread: {error}"))),
    }
}

fn read_lines<E>(mut from: impl Read, len_max: usize, mut give: impl FnMut(Part) -> Result<(), E>) -> Result<(), E> {
    let (mut buffer, mut rest, mut too_long) = (vec![0; READ_LEN], Vec::new(), false);
    loop {
        let read = match from.read(&mut buffer) {
            Ok(read) => &buffer[..read],
            Err(error) => return give(Part::Failed(error)),
        };
        if read.is_empty() {
            return if rest.is_empty() { Ok(()) } else { give(Part::Lines(vec![rest])) };
        }
        let mut lines = Vec::new();
        for piece in read.split_inclusive(|byte| *byte == b'\n') {
            let is_whole = piece.ends_with(b"\n");
            if too_long {
                too_long = !is_whole;
            } else if rest.len() + piece.len() > len_max {
                give(Part::Lines(std::mem::take(&mut lines)))?;
                give(Part::TooLong)?;
                (rest, too_long) = (Vec::new(), !is_whole);
            } else {
                rest.extend_from_slice(piece);
                if is_whole {
                    lines.push(std::mem::take(&mut rest));
                }
            }
        }
        if !lines.is_empty() {
            give(Part::Lines(lines))?;
        }
    }
}

struct Script<'a> {
    session: Session<'a>,
    /// Puts and deletes whose results are still to be shown.
    writes: VecDeque<Write>,
    /// How many these may be. It grows while answers come soon, and shrinks when they take a good part of the time that
    /// each has: those behind have no more.
    window: usize,
}

/// A put or a delete under way.
struct Write {
    given: Arc<Given>,
    value_len: usize,
    since: Instant,
    task: JoinHandle<Result<Written, Failure>>,
}

impl Script<'_> {
    async fn run(&mut self, parts: &mut mpsc::Receiver<Part>) -> Result<(), Failure> {
        let mut reader = pin!(reader_has_gone());
        let mut number = 0;
        loop {
            let part = tokio::select! {
                biased;
                done = first_done(&mut self.writes) => {
                    self.show(done)?;
                    continue;
                }
                part = parts.recv() => part,
                // Only subscriptions wait for something that they can print; writes are done without a reader too.
                () = &mut reader, if self.session.is_subscribed() => return Err(Failure::BrokenPipe),
            };
            match part {
                None => return self.show_all().await,
                Some(Part::Failed(error)) => {
                    self.show_all().await?;
                    return Err(Failure::System(format!("cannot read stdin: {error}")));
                }
                Some(Part::TooLong) => {
                    number += 1;
                    let what = format!("a line of more than {LINE_LEN_MAX} bytes");
                    self.refuse(self.session.output(Place::Line(number)), Failure::Usage(what)).await?;
                }
                Some(Part::Lines(lines)) => {
                    for line in lines {
                        number += 1;
                        if !self.line(&line, number).await? {
                            return self.show_all().await;
                        }
                    }
                }
            }
        }
    }

    /// Runs a line, or starts it; false if it is the last.
    async fn line(&mut self, line: &[u8], number: u64) -> Result<bool, Failure> {
        let place = Place::Line(number);
        if number == 1 && (line.starts_with(b"\xff\xfe") || line.starts_with(b"\xfe\xff")) {
            let what = "UTF-16: commands are read as UTF-8, so nothing of this is run";
            self.refuse(self.session.output(place), Failure::Usage(what.into())).await?;
            return Ok(false);
        }
        let given = match self.session.parse(line, place) {
            Ok(Parsed::Given(given)) => given,
            Ok(Parsed::Nothing) => return Ok(true),
            Ok(Parsed::Help(text)) => {
                self.show_all().await?;
                help(&text)?;
                return Ok(true);
            }
            Err((out, failure)) => {
                self.refuse(out, failure).await?;
                return Ok(true);
            }
        };
        match given.command {
            Command::Quit => return Ok(false),
            Command::Put { .. } | Command::Delete { .. } => self.start(given).await?,
            _ => {
                self.show_all().await?;
                let done = self.session.run(&given).await;
                self.done(&given, done)?;
            }
        }
        Ok(true)
    }

    /// Asks for a put or a delete, when there are not too many under way.
    async fn start(&mut self, given: Box<Given>) -> Result<(), Failure> {
        let value = match check(&given.command) {
            Ok(()) => value_of(&given.command, given.out.place).await,
            Err(failure) => Err(failure),
        };
        let value = match value {
            Ok(value) => value,
            Err(failure) => {
                self.show_all().await?;
                return self.done(&given, Err(failure));
            }
        };
        let (given, value_len) = (Arc::new(*given), value.len());
        while self.writes.len() >= self.window
            || (!self.writes.is_empty() && self.value_len() + value_len > WRITES_LEN_MAX)
        {
            let done = first_done(&mut self.writes).await;
            self.show(done)?;
        }
        let asked = Arc::clone(&given);
        // Polled here first, so that requests leave in the order of the lines, and then whenever it can go on. With the
        // budget of this task it might not get so far.
        let mut work = Box::pin(unconstrained(async move { write(&asked.client, &asked.command, value).await }));
        let task = match poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx))).await {
            Poll::Ready(done) => tokio::spawn(ready(done)),
            Poll::Pending => tokio::spawn(work),
        };
        self.writes.push_back(Write { given, value_len, since: Instant::now(), task });
        Ok(())
    }

    fn value_len(&self) -> usize {
        self.writes.iter().map(|write| write.value_len).sum()
    }

    async fn show_all(&mut self) -> Result<(), Failure> {
        while !self.writes.is_empty() {
            let done = first_done(&mut self.writes).await;
            self.show(done)?;
        }
        Ok(())
    }

    fn show(&mut self, (write, done): (Write, Result<Written, Failure>)) -> Result<(), Failure> {
        let Write { given, since, .. } = write;
        let patience = given.timeout.unwrap_or(PATIENCE);
        if since.elapsed() < patience / 16 {
            self.window = (self.window + 1).min(WRITES_MAX);
        } else if since.elapsed() > patience / 4 {
            self.window = (self.window / 2).max(1);
        }
        let done = done.and_then(|done| written(&given.command, done, given.out));
        self.done(&given, done)
    }

    fn done(&mut self, given: &Given, done: Result<Exit, Failure>) -> Result<(), Failure> {
        let exit = match done {
            Ok(exit) => exit,
            Err(Failure::BrokenPipe) => return Err(Failure::BrokenPipe),
            Err(failure) => failure.report(given.out, Some(&given.command)),
        };
        self.session.failures.add(given.out.place, exit);
        Ok(())
    }

    /// Refuses a line that makes no command.
    async fn refuse(&mut self, out: Output, failure: Failure) -> Result<(), Failure> {
        self.show_all().await?;
        self.session.failures.add(out.place, failure.report(out, None));
        Ok(())
    }
}

/// Waits for what became of the first write; for ever if there is none.
async fn first_done(writes: &mut VecDeque<Write>) -> (Write, Result<Written, Failure>) {
    let Some(first) = writes.front_mut() else { return pending().await };
    let done = (&mut first.task).await;
    let done = done.unwrap_or_else(|error| Err(Failure::System(format!("a task broke: {error}"))));
    let Some(first) = writes.pop_front() else { return pending().await };
    (first, done)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &[u8]) -> Vec<String> {
        let mut found = Vec::new();
        let read = read_lines(text, 8, |part| {
            match part {
                Part::Lines(lines) => found.extend(lines.iter().map(|line| String::from_utf8_lossy(line).into_owned())),
                Part::TooLong => found.push("too long".into()),
                Part::Failed(error) => found.push(error.to_string()),
            }
            Ok::<(), ()>(())
        });
        assert_eq!(read, Ok(()));
        found
    }

    #[test]
    fn lines_are_distinguished_and_one_that_is_too_long_is_counted() {
        assert_eq!(lines(b"a\nb\r\n\nc"), ["a\n", "b\r\n", "\n", "c"]);
        assert_eq!(lines(b"1234567\n12345678\nx\n"), ["1234567\n", "too long", "x\n"]);
        assert_eq!(lines(b"a\n123456789 123456789"), ["a\n", "too long"]);
        assert_eq!(lines(b""), Vec::<String>::new());
    }
}
