//! How a command fails, and what is said of it.

use std::io;

use nkv_client::{Error, ErrorKind};
use serde_json::json;

use crate::args::Command;
use crate::output::{Output, Place, at, complain};

/// How a program ends; the numbers are a promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    Ok = 0,
    NotFound = 1,
    Usage = 2,
    CannotConnect = 3,
    Conflict = 5,
    Timeout = 6,
    Failed = 7,
    Interrupted = 130,
}

/// Why a command did not do what it was asked.
pub(crate) enum Failure {
    Usage(String),
    NotFound,
    Client(Error),
    /// What was waited for did not come in time.
    Timeout(String),
    /// A subscription has ended although it was not asked to.
    Ended(String),
    /// What this machine does not do, such as to take what is written to stdout.
    System(String),
    /// The reader of stdout has gone.
    BrokenPipe,
    /// Ctrl-C.
    Interrupted,
}

impl Failure {
    /// Reports it, and returns how to end.
    pub(crate) fn report(&self, out: Output, command: Option<&Command>) -> Exit {
        let (exit, what) = self.in_words(out, command);
        match what {
            // It stays with the command, like any other answer.
            Some(what) if matches!(self, Failure::NotFound) && out.place == Place::Prompt && !out.json => {
                // An stdout that is broken is noticed with the next result.
                _ = out.line(what.as_bytes());
            }
            Some(what) => complain(&what),
            None => {}
        }
        exit
    }

    /// How to end, and what to say.
    pub(crate) fn in_words(&self, out: Output, command: Option<&Command>) -> (Exit, Option<String>) {
        let (exit, what) = match self {
            Failure::BrokenPipe => return (Exit::Ok, None),
            Failure::Interrupted => return (Exit::Interrupted, None),
            Failure::Usage(what) => (Exit::Usage, what.clone()),
            Failure::NotFound => (Exit::NotFound, "not found".to_owned()),
            Failure::Timeout(what) => (Exit::Timeout, what.clone()),
            Failure::Ended(what) => (Exit::Failed, format!("the subscription ended: {what}")),
            Failure::System(what) => (Exit::Failed, what.clone()),
            Failure::Client(error) => (exit_of(error.kind()), error.to_string()),
        };
        if !out.json {
            let what = at(out.place, &what);
            return (exit, Some(if exit == Exit::NotFound { what } else { format!("nkv-client: {what}") }));
        }
        let mut object = json!({"error": what, "code": exit as u8});
        if let Some(command) = command {
            object["op"] = command.op().into();
            if let Some(key) = command.key() {
                object["key"] = key.into();
            }
        }
        if let Failure::Client(error) = self {
            match error.kind() {
                ErrorKind::Conflict { revision } => object["revision"] = revision.get().into(),
                ErrorKind::Refused { status } => object["status"] = (*status).into(),
                _ => {}
            }
        }
        out.add_line(&mut object);
        (exit, Some(object.to_string()))
    }
}

fn exit_of(kind: &ErrorKind) -> Exit {
    match kind {
        ErrorKind::InvalidAddress | ErrorKind::InvalidKey => Exit::Usage,
        ErrorKind::CannotConnect => Exit::CannotConnect,
        ErrorKind::Conflict { .. } => Exit::Conflict,
        ErrorKind::Timeout | ErrorKind::OutcomeUnknown => Exit::Timeout,
        _ => Exit::Failed,
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Client(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Failure::BrokenPipe,
            _ => Failure::System(format!("cannot write to stdout: {error}")),
        }
    }
}
