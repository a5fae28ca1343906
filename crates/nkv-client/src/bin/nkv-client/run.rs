//! What each command does.

use std::io::{self, Read};
use std::path::Path;
use std::pin::pin;
use std::time::Duration;

use nkv_client::{Client, Error, ErrorKind, Event, Revision};
use serde_json::json;

use crate::args::{Command, PageArgs, put_options};
use crate::output::{Line, Output, complain, ended, entry_json, key_value, reader_has_gone, tree};

/// What is read of stdin or a file at most: no server takes more.
const VALUE_LEN_MAX: u64 = 64 << 20;

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
    Client(Error),
    /// What this machine does not do, such as to take what is written to stdout.
    System(String),
    /// Nobody reads what is written any more.
    BrokenPipe,
    /// Ctrl-C.
    Interrupted,
}

impl Failure {
    /// Tells it, and says how to end.
    pub(crate) fn report(&self, json: bool) -> Exit {
        let (exit, what) = match self {
            Failure::BrokenPipe => return Exit::Ok,
            Failure::Interrupted => return Exit::Interrupted,
            Failure::Usage(what) => (Exit::Usage, what.clone()),
            Failure::System(what) => (Exit::Failed, what.clone()),
            Failure::Client(error) => (exit_of(error.kind()), format!("{error:#}")),
        };
        if !json {
            complain(&format!("nkv-client: {what}"));
            return exit;
        }
        let mut object = json!({"error": what, "code": exit as u8});
        if let Failure::Client(error) = self
            && let ErrorKind::Conflict { revision } = error.kind()
        {
            object["revision"] = revision.get().into();
        }
        complain(&object.to_string());
        exit
    }
}

fn exit_of(kind: &ErrorKind) -> Exit {
    match kind {
        ErrorKind::InvalidAddress | ErrorKind::InvalidKey => Exit::Usage,
        ErrorKind::CannotConnect => Exit::CannotConnect,
        ErrorKind::NotFound => Exit::NotFound,
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

/// Runs a command that is the same in both modes.
pub(crate) async fn run(client: &Client, command: &Command, out: Output) -> Result<Exit, Failure> {
    match command {
        Command::Get { key, page } => get(client, key, page, out).await,
        Command::Put { key, value, raw, if_revision, ttl } => {
            let value = if *raw { value.as_encoded_bytes().to_vec() } else { read_value(value, out).await? };
            let revision = client.put_with(key, value, put_options(*if_revision, *ttl)).await?.get();
            match out.json {
                true => out.object(&json!({"op": "put", "key": key, "revision": revision}))?,
                false => out.note(&format!("OK revision {revision}"))?,
            }
            Ok(Exit::Ok)
        }
        Command::Delete { key, if_revision } => delete(client, key, *if_revision, out).await,
        Command::Subscribe { key, once, count } => follow(client, key, if *once { Some(1) } else { *count }, out).await,
        Command::List { key, page } => list(client, key, page, out).await,
        Command::Tree { key } if out.json => list(client, key, &PageArgs::default(), out).await,
        Command::Tree { key } => {
            let keys = client.list(key).await?;
            for line in tree(keys.iter().map(|(key, _)| key.as_str())) {
                out.line(line.as_bytes())?;
            }
            Ok(Exit::Ok)
        }
        Command::Exists { key } => {
            let exists = client.exists(key).await?;
            match out.json {
                true => out.object(&json!({"op": "exists", "key": key, "exists": exists}))?,
                false => out.line(if exists { b"true" } else { b"false" })?,
            }
            Ok(if exists { Exit::Ok } else { Exit::NotFound })
        }
        Command::Trace { key } => trace(client, key, out).await,
        Command::Health => {
            client.health().await?;
            match out.json {
                true => out.object(&json!({"op": "health", "healthy": true}))?,
                false => out.line(b"OK")?,
            }
            Ok(Exit::Ok)
        }
        Command::Version => version(client, out).await,
        Command::Stats => stats(client, out).await,
        // Both are the interactive mode's own.
        Command::Unsubscribe { .. } | Command::Quit => Ok(Exit::Ok),
    }
}

async fn get(client: &Client, key: &str, page: &PageArgs, out: Output) -> Result<Exit, Failure> {
    let single = key != "*" && !key.ends_with(".*");
    let (entries, more) = if single {
        (client.get(key).await?.into_iter().collect(), false)
    } else if page.is_given() {
        let page = client.get_page(key, page.options()).await?;
        (page.items, page.more)
    } else {
        (client.get_all(key).await?, false)
    };
    for entry in &entries {
        match (out.json, single) {
            (true, _) => out.object(&entry_json("get", entry))?,
            (false, true) => out.value(&entry.value)?,
            (false, false) => out.line(&key_value(entry))?,
        }
    }
    if more && let Some(last) = entries.last() {
        complain(&format!("there are more: --after {}", last.key));
    }
    if entries.is_empty() { not_found("get", key, out) } else { Ok(Exit::Ok) }
}

pub(crate) fn not_found(op: &str, key: &str, out: Output) -> Result<Exit, Failure> {
    match out.json && out.interactive {
        true => out.object(&json!({"op": op, "key": key, "error": "not found"}))?,
        false if out.json => complain(&json!({"error": "not found", "key": key, "code": 1}).to_string()),
        false => out.note("not found")?,
    }
    Ok(Exit::NotFound)
}

async fn delete(client: &Client, key: &str, if_revision: Option<u64>, out: Output) -> Result<Exit, Failure> {
    let deleted = match if_revision {
        Some(revision) => client.delete_if(key, Revision::new(revision)).await?,
        None => client.delete(key).await?,
    };
    if deleted.count == 0 {
        return not_found("delete", key, out);
    }
    let revision = deleted.revision.map_or(0, Revision::get);
    match out.json {
        true => out.object(&json!({"op": "delete", "key": key, "count": deleted.count, "revision": revision}))?,
        false => out.note(&format!("OK deleted {}, revision {revision}", deleted.count))?,
    }
    Ok(Exit::Ok)
}

async fn list(client: &Client, key: &str, page: &PageArgs, out: Output) -> Result<Exit, Failure> {
    let (keys, more) = if page.is_given() {
        let page = client.list_page(key, page.options()).await?;
        (page.items, page.more)
    } else {
        (client.list(key).await?, false)
    };
    for (key, revision) in &keys {
        match out.json {
            true => out.object(&json!({"op": "list", "key": key.as_str(), "revision": revision.get()}))?,
            false => out.line(key.as_str().as_bytes())?,
        }
    }
    if more && let Some((last, _)) = keys.last() {
        complain(&format!("there are more: --after {last}"));
    }
    Ok(Exit::Ok)
}

async fn trace(client: &Client, key: &str, out: Output) -> Result<Exit, Failure> {
    for subscriber in client.trace(key).await? {
        let nkv_client::Subscriber { client_uuid, pattern, since_ms, queued, skipped, .. } = subscriber;
        let since = Duration::from_millis(since_ms);
        match out.json {
            true => out.object(&json!({"op": "trace", "key": key, "client_uuid": client_uuid, "pattern": pattern,
                "since_ms": since_ms, "queued": queued, "skipped": skipped}))?,
            false => {
                let line = format!("{client_uuid} {pattern} since {since:?} queued {queued} skipped {skipped}");
                out.line(line.as_bytes())?;
            }
        }
    }
    Ok(Exit::Ok)
}

async fn version(client: &Client, out: Output) -> Result<Exit, Failure> {
    let own = env!("CARGO_PKG_VERSION");
    let server = client.version().await?;
    match out.json {
        true => {
            let (version, protocol) = (server.version, server.protocol);
            out.object(&json!({"op": "version", "client": own, "server": version, "protocol": protocol}))?;
        }
        false => {
            out.line(format!("client {own}").as_bytes())?;
            out.line(format!("server {} protocol {}", server.version, server.protocol).as_bytes())?;
        }
    }
    Ok(Exit::Ok)
}

async fn stats(client: &Client, out: Output) -> Result<Exit, Failure> {
    let stats = client.stats().await?;
    if out.json {
        let mut object = json!({"op": "stats"});
        for (name, number) in &stats.numbers {
            object[name] = (*number).into();
        }
        for (name, word) in &stats.words {
            object[name] = word.as_str().into();
        }
        out.object(&object)?;
        return Ok(Exit::Ok);
    }
    for (name, word) in &stats.words {
        out.line(format!("{name} {word}").as_bytes())?;
    }
    for (name, number) in &stats.numbers {
        out.line(format!("{name} {number}").as_bytes())?;
    }
    Ok(Exit::Ok)
}

/// Tells what a subscription tells, until it ends or has told enough.
async fn follow(client: &Client, pattern: &str, count: Option<u64>, out: Output) -> Result<Exit, Failure> {
    let mut subscription = client.subscribe(pattern).await?;
    let mut reader = pin!(reader_has_gone());
    let mut told = 0;
    while count.is_none_or(|count| told < count) {
        let event = tokio::select! {
            biased;
            event = subscription.next() => event,
            // With the next change it would be noticed too, but that may be long in coming.
            () = &mut reader => return Err(Failure::BrokenPipe),
        };
        let Some(event) = event else { break };
        told += u64::from(matches!(event, Event::Update { .. } | Event::Gone { .. }));
        match out.event(pattern, &event) {
            Line::Result(line) => out.line(&line)?,
            Line::Note(note) => complain(&note),
        }
        if let Event::Ended(reason) = event {
            complain(&format!("nkv-client: the subscription ended: {}", ended(&reason)));
            return Ok(Exit::Failed);
        }
    }
    Ok(Exit::Ok)
}

/// The value itself, or what `-` or `@FILE` stand for.
async fn read_value(value: &std::ffi::OsStr, out: Output) -> Result<Vec<u8>, Failure> {
    let bytes = value.as_encoded_bytes();
    let (name, path) = match bytes {
        b"-" if out.interactive => {
            return Err(Failure::Usage("stdin holds the commands: give the value, or @FILE".into()));
        }
        b"-" => ("stdin".to_owned(), None),
        [b'@', ..] => {
            let path = value.to_string_lossy()[1..].to_owned();
            (path.clone(), Some(path))
        }
        _ => return Ok(bytes.to_vec()),
    };
    let read = tokio::task::spawn_blocking(move || match path {
        Some(path) => read_limited(std::fs::File::open(Path::new(&path))?),
        None => read_limited(io::stdin().lock()),
    });
    match read.await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Failure::Usage(format!("cannot read {name}: {error}"))),
        Err(error) => Err(Failure::Usage(format!("cannot read {name}: {error}"))),
    }
}

fn read_limited(from: impl Read) -> io::Result<Vec<u8>> {
    let mut value = Vec::new();
    from.take(VALUE_LEN_MAX + 1).read_to_end(&mut value)?;
    if value.len() as u64 > VALUE_LEN_MAX {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {VALUE_LEN_MAX} bytes")));
    }
    Ok(value)
}
