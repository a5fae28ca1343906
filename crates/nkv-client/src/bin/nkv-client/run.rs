//! What each command does.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use nkv_client::{Client, ConnectedClient, Deleted, Key, Pattern, Revision, Subscriber};
use serde_json::json;

use crate::args::{Command, PageArgs, put_options};
use crate::failure::{Exit, Failure};
use crate::output::{Output, Place, complain, entry_json, tree};
use crate::stdio::Stdin;

/// What is read of stdin or a file at most: no server takes more.
pub(crate) const VALUE_LEN_MAX: u64 = 64 << 20;

/// Runs a command that is the same in all modes, after [`check`].
pub(crate) async fn run(client: &Client, command: &Command, out: Output) -> Result<Exit, Failure> {
    let exit = run_one(client, command, out).await;
    if matches!(command, Command::Get { .. } | Command::List { .. } | Command::Tree { .. } | Command::Exists { .. }) {
        out.stale(*client.state().borrow());
    }
    exit
}

async fn run_one(client: &Client, command: &Command, out: Output) -> Result<Exit, Failure> {
    match command {
        Command::Get { key, more, page } if more.is_empty() => get(client, key, page, out).await,
        Command::Get { key, more, .. } => get_many(client, key, more, out).await,
        Command::PutPairs { pairs } => put_pairs(client, pairs, out).await,
        Command::Put { .. } | Command::Delete { .. } => {
            let value = value_of(command, out.place).await?;
            written(command, write(client, command, value).await?, out)
        }
        Command::List { key, page, values: true } => match get(client, key, page, out).await {
            Err(Failure::NotFound) => Ok(Exit::Ok),
            shown => shown,
        },
        Command::List { key, page, .. } => list(client, key, page, out).await,
        Command::Tree { key } if out.json => list(client, key, &PageArgs::default(), out).await,
        Command::Tree { key } => {
            let keys = client.list(key).await?;
            for line in tree(keys.iter().map(|(key, _)| key.as_str())) {
                out.line(out.key(&line).as_bytes())?;
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
        Command::Trace { key: Some(key) } => trace(client, key, out).await,
        Command::Trace { key: None } => clients(client, out).await,
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
        Command::Cluster => cluster(client, out).await,
        // These are done elsewhere.
        Command::Subscribe { .. } | Command::Unsubscribe { .. } | Command::Quit => Ok(Exit::Ok),
    }
}

/// Refuses a wildcard where only a key makes sense.
pub(crate) fn check(command: &Command) -> Result<(), Failure> {
    let key = match command {
        Command::Put { key, .. } | Command::Delete { key, if_revision: Some(_) } => Some(key),
        Command::Subscribe { key, exact: true, .. } | Command::Trace { key: Some(key) } => Some(key),
        Command::Get { page, .. } | Command::List { page, .. } => page.after.as_ref(),
        _ => None,
    };
    match key {
        Some(key) if Key::new(key).is_err() && Pattern::new(key).is_ok() => {
            Err(Failure::Usage(format!("a key is needed here: '{key}' is a wildcard")))
        }
        _ => Ok(()),
    }
}

/// What a put or a delete did.
pub(crate) enum Written {
    Put(Revision),
    Deleted(Deleted),
}

/// The value of a put.
pub(crate) async fn value_of(command: &Command, place: Place) -> Result<Vec<u8>, Failure> {
    match command {
        Command::Put { value, raw: true, .. } => Ok(value.as_bytes().to_vec()),
        Command::Put { value, .. } => read_value(value, place).await,
        _ => Ok(Vec::new()),
    }
}

/// Does a put or a delete. The request is on its way to the server when this was first polled.
pub(crate) async fn write(client: &Client, command: &Command, value: Vec<u8>) -> Result<Written, Failure> {
    match command {
        Command::Put { key, if_revision, ttl, .. } => {
            Ok(Written::Put(client.put_with(key, value, put_options(*if_revision, *ttl)).await?))
        }
        Command::Delete { key, if_revision: Some(revision) } => {
            Ok(Written::Deleted(client.delete_if(key, Revision::new(*revision)).await?))
        }
        Command::Delete { key, .. } => Ok(Written::Deleted(client.delete(key).await?)),
        _ => Err(Failure::Usage("no write".into())),
    }
}

/// Shows what a put or a delete did.
pub(crate) fn written(command: &Command, written: Written, out: Output) -> Result<Exit, Failure> {
    let (op, key) = (command.op(), command.key());
    match written {
        Written::Deleted(Deleted { count: 0, .. }) => return Err(Failure::NotFound),
        Written::Put(revision) if out.json => {
            out.object(&json!({"op": op, "key": key, "revision": revision.get()}))?;
        }
        Written::Put(revision) => out.note(&format!("OK revision {revision}"))?,
        Written::Deleted(Deleted { count, revision, .. }) => {
            let revision = revision.map_or(0, Revision::get);
            match out.json {
                true => out.object(&json!({"op": op, "key": key, "count": count, "revision": revision}))?,
                false => out.note(&format!("OK deleted {count}, revision {revision}"))?,
            }
        }
    }
    Ok(Exit::Ok)
}

async fn get(client: &Client, key: &str, page: &PageArgs, out: Output) -> Result<Exit, Failure> {
    let single = key != "*" && !key.ends_with(".*");
    let (entries, more) = if single {
        (client.get(key).await?.into_iter().collect(), false)
    } else if page.is_given() {
        let page = client.get_page(key, page.options()?).await?;
        (page.items, page.more)
    } else {
        (client.get_all(key).await?, false)
    };
    for entry in &entries {
        match (out.json, single) {
            (true, _) => out.object(&entry_json("get", entry))?,
            (false, true) => out.value(&entry.value)?,
            (false, false) => out.line(out.key_value(entry).as_bytes())?,
        }
    }
    if more && let Some(last) = entries.last() {
        out.more("get", key, last.key.as_str());
    }
    if entries.is_empty() { Err(Failure::NotFound) } else { Ok(Exit::Ok) }
}

/// Several keys or patterns, each a line; what is missing is said of each.
async fn get_many(client: &Client, key: &str, more: &[String], out: Output) -> Result<Exit, Failure> {
    let mut exit = Exit::Ok;
    for key in std::iter::once(key).chain(more.iter().map(String::as_str)) {
        let entries = client.get_all(key).await?;
        if entries.is_empty() {
            out.note(&format!("{}: not found", out.key(key)))?;
            exit = Exit::NotFound;
        }
        for entry in &entries {
            match out.json {
                true => out.object(&entry_json("get", entry))?,
                false => out.line(out.key_value(entry).as_bytes())?,
            }
        }
    }
    Ok(exit)
}

/// All are on their way at once; the first that fails says how to end.
async fn put_pairs(client: &Client, pairs: &[String], out: Output) -> Result<Exit, Failure> {
    let mut puts = Vec::new();
    for pair in pairs {
        let wrong = || Failure::Usage(format!("'{pair}' is not KEY=VALUE; nothing was written"));
        let (key, value) = pair.split_once('=').ok_or_else(wrong)?;
        puts.push((key.to_owned(), value.to_owned()));
    }
    let started: Vec<_> = puts
        .into_iter()
        .map(|(key, value)| {
            let client = client.clone();
            (key.clone(), tokio::spawn(async move { client.put(key, value).await }))
        })
        .collect();
    let mut failed = None;
    for (key, put) in started {
        match put.await.map_err(|error| Failure::System(error.to_string()))? {
            Ok(revision) if out.json => {
                out.object(&json!({"op": "put", "key": key, "revision": revision.get()}))?;
            }
            Ok(revision) => out.note(&format!("{} OK revision {revision}", out.key(&key)))?,
            Err(error) => {
                let (_, what) = Failure::Client(error.clone()).in_words(out, None);
                what.iter().for_each(|what| complain(what));
                failed.get_or_insert(error);
            }
        }
    }
    failed.map_or(Ok(Exit::Ok), |error| Ok(Failure::Client(error).in_words(out, None).0))
}

async fn list(client: &Client, key: &str, page: &PageArgs, out: Output) -> Result<Exit, Failure> {
    let (keys, more) = if page.is_given() {
        let page = client.list_page(key, page.options()?).await?;
        (page.items, page.more)
    } else {
        (client.list(key).await?, false)
    };
    for (key, revision) in &keys {
        match out.json {
            true => out.object(&json!({"op": "list", "key": key.as_str(), "revision": revision.get()}))?,
            false => out.line(out.key(key.as_str()).as_bytes())?,
        }
    }
    if more && let Some((last, _)) = keys.last() {
        out.more("list", key, last.as_str());
    }
    Ok(Exit::Ok)
}

async fn trace(client: &Client, key: &str, out: Output) -> Result<Exit, Failure> {
    for subscriber in client.trace(key).await? {
        let Subscriber { client_uuid, pattern, exact, since_ms, queued, skipped, name, peer, .. } = subscriber;
        if out.json {
            out.object(&json!({"op": "trace", "key": key, "client_uuid": client_uuid, "pattern": pattern,
                "exact": exact, "since_ms": since_ms, "queued": queued, "skipped": skipped, "name": name,
                "peer": peer}))?;
            continue;
        }
        let (client, pattern) = (out.readable(client_uuid.as_bytes()), out.key(&pattern));
        let (exact, since) = (if exact { " exact" } else { "" }, Duration::from_millis(since_ms));
        let who = who(name.as_deref(), peer.as_deref(), out);
        let line = format!("{client} {pattern}{exact} since {since:?} queued {queued} skipped {skipped}{who}");
        out.line(line.as_bytes())?;
    }
    Ok(Exit::Ok)
}

async fn clients(client: &Client, out: Output) -> Result<Exit, Failure> {
    for client in client.clients().await? {
        let ConnectedClient { peer, client_uuid, name, since_ms, subscriptions, queued, skipped, .. } = client;
        if out.json {
            out.object(&json!({"op": "trace", "client_uuid": client_uuid, "since_ms": since_ms,
                "subscriptions": subscriptions, "queued": queued, "skipped": skipped, "name": name, "peer": peer}))?;
            continue;
        }
        let client = client_uuid.map_or("-".into(), |client| out.readable(client.as_bytes()));
        let (since, who) = (Duration::from_millis(since_ms), who(name.as_deref(), Some(&peer), out));
        let line =
            format!("{client} since {since:?} subscriptions {subscriptions} queued {queued} skipped {skipped}{who}");
        out.line(line.as_bytes())?;
    }
    Ok(Exit::Ok)
}

/// From where a client comes and what it is called; the name stands last, since it may hold spaces.
fn who(name: Option<&str>, peer: Option<&str>, out: Output) -> String {
    let part = |title: &str, text: Option<&str>| text.map(|text| format!(" {title} {}", out.readable(text.as_bytes())));
    [part("peer", peer), part("name", name)].into_iter().flatten().collect()
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
            let version = out.readable(server.version.as_bytes());
            out.line(format!("server {version} protocol {}", server.protocol).as_bytes())?;
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
    let words = stats.words.iter().map(|(name, word)| format!("{name} {word}"));
    let numbers = stats.numbers.iter().map(|(name, number)| format!("{name} {number}"));
    for line in words.chain(numbers) {
        out.line(out.readable(line.as_bytes()).as_bytes())?;
    }
    Ok(Exit::Ok)
}

/// The node first, then a line for each other node that it knows.
async fn cluster(client: &Client, out: Output) -> Result<Exit, Failure> {
    let words = client.stats().await?.words;
    if !words.contains_key("cluster") {
        return Err(Failure::Usage("the server is no node of a cluster: it was started without --cluster".into()));
    }
    let own = ["cluster", "node", "engine", "clock_offset_ms", "digest"].into_iter();
    let own = own.filter_map(|name| Some((name, words.get(name)?.as_str()))).collect();
    let members = words.iter().filter_map(|(name, word)| Some((name.strip_prefix("member.")?, word)));
    let members = members.map(|(id, word)| {
        let fields = word.split('|').filter_map(|field| field.split_once('='));
        std::iter::once(("member", id)).chain(fields).collect()
    });
    let lines: Vec<Vec<(&str, &str)>> = std::iter::once(own).chain(members).collect();
    for line in lines {
        if !out.json {
            let words: Vec<_> = line.iter().map(|(name, word)| format!("{name} {word}")).collect();
            out.line(out.readable(words.join(" ").as_bytes()).as_bytes())?;
            continue;
        }
        let mut object = json!({"op": "cluster"});
        for (name, word) in line {
            object[name] = match (word, word.parse::<i64>()) {
                // An id may look like a number.
                _ if matches!(name, "cluster" | "node" | "member" | "digest") => word.into(),
                ("true" | "false", _) => (word == "true").into(),
                (_, Ok(number)) => number.into(),
                _ => word.into(),
            };
        }
        out.object(&object)?;
    }
    Ok(Exit::Ok)
}

/// The value itself, or what `-` or `@FILE` stand for.
async fn read_value(value: &OsStr, place: Place) -> Result<Vec<u8>, Failure> {
    let (name, path) = match value.as_bytes() {
        b"-" if place != Place::CommandLine => {
            return Err(Failure::Usage("stdin holds the commands: give the value, or @FILE".into()));
        }
        b"-" => ("stdin".to_owned(), None),
        [b'@', name @ ..] => {
            let path = PathBuf::from(OsStr::from_bytes(name));
            (path.display().to_string(), Some(path))
        }
        value => return Ok(value.to_vec()),
    };
    let read = tokio::task::spawn_blocking(move || match path {
        Some(path) => read_limited(std::fs::File::open(path)?),
        None => read_limited(Stdin),
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
