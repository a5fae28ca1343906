//! Stdin, stdout and stderr as they are given to a program: perhaps not blocking, perhaps with the other end closed.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::termios::{self, OptionalActions, SpecialCodeIndex};

/// Writes all of it. A pipe that another program set so that it does not block is waited for.
pub(crate) fn write_all(to: impl AsFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(&to, bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait(to.as_fd(), PollFlags::OUT)?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Stdin, read without a buffer in between. One that does not block is waited for.
#[derive(Debug)]
pub(crate) struct Stdin;

impl Read for Stdin {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let stdin = io::stdin();
        loop {
            match rustix::io::read(&stdin, &mut *buffer) {
                Ok(read) => return Ok(read),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => wait(stdin.as_fd(), PollFlags::IN)?,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn wait(fd: BorrowedFd<'_>, flags: PollFlags) -> io::Result<()> {
    match poll(&mut [PollFd::from_borrowed_fd(fd, flags)], None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Waits until the reader of stdout has gone, although nothing is written; for ever if stdout has no reader that could
/// go, such as a file.
pub(crate) async fn reader_has_gone() {
    // A thread, because a runtime cannot wait for all that stdout may be.
    let (gone, reader_has_gone) = tokio::sync::oneshot::channel();
    let started = std::thread::Builder::new().name("stdout".into()).spawn(move || {
        let stdout = io::stdout();
        loop {
            // What is asked for is nothing: errors and a hang-up are reported anyway.
            let mut fds = [PollFd::new(&stdout, PollFlags::empty())];
            match poll(&mut fds, None) {
                Ok(_) if fds[0].revents().intersects(PollFlags::ERR | PollFlags::HUP) => break,
                Err(Errno::INTR) => {}
                Ok(_) | Err(_) => return,
            }
        }
        // It is not waited for any more if the command has ended.
        _ = gone.send(());
    });
    if started.is_err() || reader_has_gone.await.is_err() {
        std::future::pending().await
    }
}

/// Drops what a person has typed or pasted, until nothing more comes.
pub(crate) fn drop_typed() -> io::Result<()> {
    let stdin = io::stdin();
    let before = termios::tcgetattr(&stdin)?;
    let mut raw = before.clone();
    // Single bytes, unseen, and an end when none has come for a tenth of a second.
    raw.make_raw();
    raw.special_codes[SpecialCodeIndex::VMIN] = 0;
    raw.special_codes[SpecialCodeIndex::VTIME] = 1;
    termios::tcsetattr(&stdin, OptionalActions::Now, &raw)?;
    let dropped = loop {
        match rustix::io::read(&stdin, &mut [0; 4_096]) {
            Ok(0) | Err(Errno::AGAIN) => break Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => break Err(error.into()),
        }
    };
    termios::tcsetattr(&stdin, OptionalActions::Now, &before)?;
    dropped
}
