//! The interactive mode of a terminal: the real binary at a pseudo-terminal.
#![cfg(all(target_os = "linux", feature = "cli"))]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::process::Child;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use common::cli::{Nkv, command, nkv};
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

const PATIENCE: Duration = Duration::from_secs(20);

/// `nkv-client` at a terminal.
struct Terminal {
    child: Child,
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    /// What was shown and not yet looked at.
    shown: String,
    _home: tempfile::TempDir,
}

impl Terminal {
    fn new(nkv: &Nkv) -> Self {
        let keyboard = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&keyboard).unwrap();
        unlockpt(&keyboard).unwrap();
        let name = ptsname(&keyboard, Vec::new()).unwrap();
        let terminal = || open(&name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
        let home = tempfile::tempdir().unwrap();
        let mut command = command(&[&nkv.addr]);
        command.env("HOME", home.path()).env_remove("XDG_STATE_HOME").env("TERM", "xterm");
        let child = command.stdin(terminal()).stdout(terminal()).stderr(terminal()).spawn().unwrap();
        drop(command);
        let keyboard = File::from(keyboard);
        let (mut screen, (shown, looks)) = (keyboard.try_clone().unwrap(), channel());
        std::thread::spawn(move || {
            let mut buffer = [0; 4_096];
            // It fails when the program has ended.
            while let Ok(read @ 1..) = screen.read(&mut buffer) {
                if shown.send(buffer[..read].to_vec()).is_err() {
                    return;
                }
            }
        });
        let mut terminal = Terminal { child, keyboard, screen: looks, shown: String::new(), _home: home };
        terminal.expect("nkv> ");
        terminal
    }

    fn types(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    /// Waits until this is shown, and looks at nothing before it again.
    fn expect(&mut self, text: &str) {
        let started = Instant::now();
        loop {
            if let Some(at) = self.shown.find(text) {
                self.shown.drain(..at + text.len());
                return;
            }
            match self.screen.recv_timeout(PATIENCE.saturating_sub(started.elapsed())) {
                Ok(shown) => self.shown += &String::from_utf8_lossy(&shown),
                Err(_) => panic!("not shown: {text}, but {:?}", self.shown),
            }
        }
    }

    fn quit(mut self) {
        self.types(b"quit\r");
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(started.elapsed() < PATIENCE, "it does not end");
            std::thread::sleep(Duration::from_millis(5));
        };
        assert_eq!(status.code(), Some(0));
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It has ended, if the test went well.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

// Several lines that were pasted were one command, which was wrong.
#[test]
fn lines_that_are_pasted_are_commands_of_their_own() {
    let nkv = nkv();
    let mut terminal = Terminal::new(&nkv);
    terminal.types(b"\x1b[200~put a one\rput b two\nget nope\r\nget b\x1b[201~\r");
    for shown in ["OK revision 1", "OK revision 2", "not found", "two", "nkv> "] {
        terminal.expect(shown);
    }
    // Without the marks of a paste, each line is typed.
    terminal.types(b"put c 3\rget c\r");
    terminal.expect("OK revision 3");
    terminal.expect("3\r\n");
    terminal.quit();
    assert_eq!(nkv.stdout(&["get", "a"]), "one");
}

// One byte of Latin-1 ended the session, and what was pasted behind it reached the shell.
#[test]
fn a_byte_that_is_not_utf_8_costs_its_line_and_not_the_session() {
    let nkv = nkv();
    let mut terminal = Terminal::new(&nkv);
    // More than the editor reads at once.
    let long = [&b"put a caf\xe9 "[..], &[b'x'; 1_500], b"\rput b 2\r"].concat();
    for line in [&b"put a caf\xe9 now\rdelete *\r"[..], b"\x1b[200~put a caf\xe9\rput b 2\x1b[201~\r", b"\xff", &long] {
        terminal.types(line);
        terminal.expect("not UTF-8");
        terminal.expect("nkv> ");
        terminal.types(b"list\r");
        terminal.expect("list");
        terminal.expect("nkv> ");
    }
    terminal.types(b"put c 3\r");
    terminal.expect("OK revision 1");
    terminal.quit();
    assert_eq!(nkv.stdout(&["list"]), "c\n", "no part of those lines was done");
}

// Of more than a hundred keys, what the first hundred have in common was put into the line.
#[test]
fn a_completion_puts_no_more_into_the_line_than_all_keys_have_in_common() {
    let nkv = nkv();
    let script: String = (0..150).map(|n| format!("put lamp.a.{n:03} {n}\n")).collect();
    assert_eq!(nkv.feed(&["-q"], (script + "put lamp.b bee\nput l\\'x 1").as_bytes()).0, 0);
    let mut terminal = Terminal::new(&nkv);
    terminal.types(b"get la\tb\r");
    terminal.expect("bee\r\n");
    terminal.types(b"get l\\'\t\r");
    terminal.expect("1\r\n");
    terminal.quit();
}
