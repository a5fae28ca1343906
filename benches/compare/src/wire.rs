//! One nkv connection that waits for its answers: for requests that are few and large.

use std::io::{BufRead, BufReader, Read, Write, copy, sink};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use memchr::memmem::Finder;

use crate::Result;

/// No answer takes longer.
const PATIENCE: Duration = Duration::from_secs(300);

/// Bytes written before answers are read, at most: both sides' buffers hold them.
const WRITE_LEN: usize = 16 << 10;

#[derive(Debug)]
pub(crate) struct Wire {
    input: BufReader<TcpStream>,
    line: Vec<u8>,
    len: Finder<'static>,
    status: Finder<'static>,
}

impl Wire {
    /// Connects, and asks for values as payloads.
    pub(crate) fn connect(addr: SocketAddr) -> Result<Wire> {
        let stream = TcpStream::connect(addr)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let [len, status] = ["\"len\":", "\"status\":"].map(Finder::new);
        let mut wire = Wire { input: BufReader::with_capacity(256 << 10, stream), line: Vec::new(), len, status };
        wire.expect(200, r#"{"type":"Connect","values":"payload"}"#)?;
        Ok(wire)
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.input.get_mut().write_all(bytes)?)
    }

    /// Reads a message, and past its payload.
    pub(crate) fn message(&mut self) -> Result<&[u8]> {
        self.line.clear();
        self.input.read_until(b'\n', &mut self.line)?;
        if self.line.pop() != Some(b'\n') {
            return Err("the connection was closed".into());
        }
        if let Some(len) = number(&self.line, &self.len) {
            copy(&mut self.input.by_ref().take(len + 1), &mut sink())?;
        }
        Ok(&self.line)
    }

    /// Reads an answer; returns its status.
    pub(crate) fn status(&mut self) -> Result<u64> {
        self.message()?;
        number(&self.line, &self.status).ok_or_else(|| "an answer without a status".into())
    }

    pub(crate) fn ask(&mut self, request: &str) -> Result<u64> {
        self.send(format!("{request}\n").as_bytes())?;
        self.status()
    }

    /// # Errors
    ///
    /// If the answer has another status.
    pub(crate) fn expect(&mut self, status: u64, request: &str) -> Result<()> {
        match self.ask(request)? {
            found if found == status => Ok(()),
            found => Err(format!("{request} was answered {found}, not {status}").into()),
        }
    }

    /// Sends encoded requests all at once, and reads `answers` answers, which must be good.
    pub(crate) fn batch(&mut self, requests: &[u8], answers: usize) -> Result<()> {
        let mut writer = self.input.get_ref().try_clone()?;
        thread::scope(|scope| {
            let writing = (requests.len() > WRITE_LEN).then(|| scope.spawn(move || writer.write_all(requests)));
            if writing.is_none() {
                self.send(requests)?;
            }
            self.answers(answers)?;
            match writing.map(|writing| writing.join()) {
                Some(Ok(written)) => Ok(written?),
                Some(Err(_)) => Err("the writer panicked".into()),
                None => Ok(()),
            }
        })
    }

    /// Reads `count` answers, which must be good.
    pub(crate) fn answers(&mut self, count: usize) -> Result<()> {
        for _ in 0..count {
            let status = self.status()?;
            if status != 200 {
                return Err(format!("answered {status}: {}", String::from_utf8_lossy(&self.line)).into());
            }
        }
        Ok(())
    }

    pub(crate) fn last(&self) -> &[u8] {
        &self.line
    }
}

/// The number behind a name.
fn number(line: &[u8], name: &Finder<'_>) -> Option<u64> {
    let rest = &line[name.find(line)? + name.needle().len()..];
    let end = rest.iter().position(|byte| !byte.is_ascii_digit())?;
    crate::drivers::number(&rest[..end])
}
