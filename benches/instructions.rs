//! How many instructions the hot paths take. Resource: processor, counted and not timed, so that a noisy machine gives
//! the same figure twice and a change of a percent can be seen.
//!
//! Each scenario is run by a process of its own under `valgrind --tool=callgrind`, once for some iterations and once for
//! twice as many; the difference is what the iterations took, without the preparation, which is the same. System calls
//! count with the instructions around them only. What uses a hash map may differ by one or two percent, since the map draws a
//! seed; everything else is the same to the instruction. Without valgrind nothing is measured, and it says so.
//!
//! The arguments filter scenarios by what is in their names. `--test` runs each of them once, without valgrind.

mod support;

use std::hint::black_box;
use std::process::{Command, ExitCode, Stdio};
use std::task::{Context, Waker};

use bytes::Bytes;
use nkv_core::mailbox::{Mailbox, mailbox};
use nkv_core::{Change, EventKind, NoPersist, Notifier, NotifyKeyValue, Op, PersistValue, PutOptions};
use nkv_notify_tcp::{NotifierOptions, Outbox, TcpNotifier, spare};
use nkv_persist_fs::{Durability, FsOptions, FsPersist};
use nkv_protocol::{Answer, BaseFields, ChangeNotice, Chunks, Decoder, Id, Limits, ValueForm};

use crate::support::{events, keys, put};

/// Iterations of the shorter run.
const COUNT: usize = 500;
/// Keys in a store, taken in turn.
const KEYS: usize = 1_000;
/// Writes in a batch.
const BATCH: usize = 16;
const VALUE: &[u8] = &[b'v'; 100];
const KEY: &str = "host.db1.load";

/// Prepares `2 * COUNT` iterations, and does one at each call.
type Prepare = fn() -> Box<dyn FnMut()>;

/// By names, which are stable: figures are compared by them.
const SCENARIOS: [(&str, Prepare); 14] = [
    ("decode_get", decode_get),
    ("decode_put", decode_put),
    ("encode_ok", encode_ok),
    ("encode_get", encode_get),
    ("encode_update", encode_update),
    ("store_look_up", store_look_up),
    ("store_get", store_get),
    ("store_put", store_put),
    ("store_put_subscribed", store_put_subscribed),
    ("store_write_16", store_write_16),
    ("mailbox_post_and_take", mailbox_post_and_take),
    ("outbox_answer", outbox_answer),
    ("outbox_updates_16", outbox_updates_16),
    ("persist_16", persist_16),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if let ["--run", name, count] = words[..] {
        let (_, prepare) = SCENARIOS.iter().find(|(known, _)| *known == name).expect("the parent knows the names");
        run(*prepare, count.parse().expect("a number"));
        return ExitCode::SUCCESS;
    }
    // cargo passes `--bench`.
    let filters: Vec<_> = words.iter().filter(|word| !word.starts_with("--")).collect();
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(**filter));
    let scenarios = SCENARIOS.iter().filter(|(name, _)| wanted(name));
    if words.contains(&"--test") {
        scenarios.for_each(|(name, prepare)| {
            run(*prepare, 1);
            println!("Testing instructions/{name}\nSuccess");
        });
        return ExitCode::SUCCESS;
    }
    if Command::new("valgrind").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("instructions: skipped, valgrind is not installed");
        return ExitCode::SUCCESS;
    }
    for (name, _) in scenarios {
        match (counted(name, COUNT), counted(name, 2 * COUNT)) {
            (Ok(once), Ok(twice)) => {
                let each = twice.saturating_sub(once) as f64 / COUNT as f64;
                println!("{:<40} {each:>10.0} instructions", format!("instructions/{name}"));
            }
            (Err(error), _) | (_, Err(error)) => {
                eprintln!("instructions/{name}: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

fn run(prepare: Prepare, count: usize) {
    let mut iteration = prepare();
    (0..count).for_each(|_| iteration());
}

/// The instructions of a process that runs a scenario.
fn counted(name: &str, count: usize) -> Result<u64, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .args(["--run", name, &count.to_string()])
        // The environment lies on the stack, and moves what lies there.
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("TMPDIR", std::env::temp_dir())
        .output()
        .map_err(|error| error.to_string())?;
    let told = String::from_utf8_lossy(&output.stderr);
    let collected = told.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok());
    collected.filter(|_| output.status.success()).ok_or_else(|| format!("valgrind: {told}"))
}

fn decode_get() -> Box<dyn FnMut()> {
    decode(format!("{{\"type\":\"Get\",\"id\":7,\"key\":\"{KEY}\"}}\n").into_bytes())
}

fn decode_put() -> Box<dyn FnMut()> {
    let line = format!("{{\"type\":\"Put\",\"id\":7,\"key\":\"{KEY}\",\"len\":{}}}\n", VALUE.len());
    decode([line.as_bytes(), VALUE, b"\n"].concat())
}

fn decode(input: Vec<u8>) -> Box<dyn FnMut()> {
    let mut decoder = Decoder::new(Limits::default());
    Box::new(move || {
        let decoded = decoder.decode(black_box(&input));
        black_box(decoded.item.expect("it is whole").expect("it is good"));
    })
}

fn encode_ok() -> Box<dyn FnMut()> {
    encode(|out| {
        let fields = BaseFields::revision(12_345);
        Answer::to(Id::from_json("7"), out).base(nkv_protocol::status::OK, "No Error", &fields);
    })
}

fn encode_get() -> Box<dyn FnMut()> {
    let value = Bytes::from_static(VALUE);
    encode(move |out| Answer::to(Id::from_json("7"), out).get(ValueForm::Payload, &[(KEY, &value, 12_345)], false))
}

fn encode_update() -> Box<dyn FnMut()> {
    let value = Bytes::from_static(VALUE);
    encode(move |out| ChangeNotice::update(KEY, &value, 12_345, ValueForm::Payload).write(0, out))
}

fn encode(mut write: impl FnMut(&mut Chunks) + 'static) -> Box<dyn FnMut()> {
    let mut out = Chunks::default();
    Box::new(move || {
        write(&mut out);
        black_box(out.take());
    })
}

/// As the server reads a key: nothing is copied out of the store.
fn store_look_up() -> Box<dyn FnMut()> {
    let (store, keys) = store();
    let mut turn = (0..KEYS).cycle();
    Box::new(move || {
        let key = &keys[turn.next().expect("it goes round")];
        let len = store.look_up(key.as_str(), |record| black_box(&record.value[..]).len());
        assert_eq!(len, Some(VALUE.len()));
    })
}

fn store_get() -> Box<dyn FnMut()> {
    let (store, keys) = store();
    let mut turn = (0..KEYS).cycle();
    Box::new(move || _ = black_box(store.get(&keys[turn.next().expect("it goes round")])))
}

fn store_put() -> Box<dyn FnMut()> {
    let (store, keys) = store();
    let mut turn = (0..KEYS).cycle();
    Box::new(move || {
        let key = &keys[turn.next().expect("it goes round")];
        store.put(key, Bytes::from_static(VALUE), PutOptions::default()).expect("nothing is stored");
    })
}

fn store_put_subscribed() -> Box<dyn FnMut()> {
    let (store, keys) = store();
    let mut turn = (0..KEYS).cycle();
    let (post, inbox) = mailbox();
    store.subscribe(nkv_core::Pattern::All, "bench".into(), post, false);
    Box::new(move || {
        let key = &keys[turn.next().expect("it goes round")];
        store.put(key, Bytes::from_static(VALUE), PutOptions::default()).expect("nothing is stored");
        black_box(inbox.try_take().expect("it is told"));
    })
}

fn store_write_16() -> Box<dyn FnMut()> {
    let (store, keys) = store();
    let value = Bytes::from_static(VALUE);
    let batches: Vec<Vec<Op>> =
        keys.chunks_exact(BATCH).map(|keys| keys.iter().map(|key| put(key, &value)).collect()).collect();
    let mut turn = (0..batches.len()).cycle();
    Box::new(move || _ = black_box(store.write(&batches[turn.next().expect("it goes round")])))
}

fn mailbox_post_and_take() -> Box<dyn FnMut()> {
    let changes = events(&keys(KEYS), 1, &Bytes::from_static(VALUE));
    let (post, inbox): (Mailbox, _) = mailbox();
    let mut turn = (0..KEYS).cycle();
    Box::new(move || {
        let _ = post.notify(&changes[turn.next().expect("it goes round")]);
        black_box(inbox.try_take());
    })
}

/// An answer that the peer takes at once, without the system call.
fn outbox_answer() -> Box<dyn FnMut()> {
    let (_notifier, mut outbox) = outbox();
    Box::new(move || {
        let _keep = &_notifier;
        let mut out = spare();
        Answer::to(Id::from_json("7"), &mut out).ok(&BaseFields::default());
        outbox.send(out);
        write_all(&mut outbox);
    })
}

/// Changes that the peer takes at once, encoded for it alone.
fn outbox_updates_16() -> Box<dyn FnMut()> {
    let (notifier, mut outbox) = outbox();
    let changes = events(&keys(KEYS), (2 * COUNT * BATCH).div_ceil(KEYS), &Bytes::from_static(VALUE));
    let mut turn = changes.into_iter();
    Box::new(move || {
        for change in turn.by_ref().take(BATCH) {
            let _ = notifier.notify(&change);
        }
        write_all(&mut outbox);
    })
}

/// What a connection of the server has.
fn outbox() -> (TcpNotifier, Outbox) {
    let (notifier, mut outbox) = TcpNotifier::new(NotifierOptions { slack: 64 << 10, ..NotifierOptions::default() });
    notifier.set_form(ValueForm::Payload);
    write_all(&mut outbox);
    (notifier, outbox)
}

fn write_all(outbox: &mut Outbox) {
    let mut cx = Context::from_waker(Waker::noop());
    assert!(outbox.poll(&mut cx, Waker::noop(), &mut tokio::io::sink()).is_pending(), "it has ended");
}

/// One frame, written to a file and not synced: the kernel's work does not count.
fn persist_16() -> Box<dyn FnMut()> {
    let change = |event: &std::sync::Arc<nkv_core::Event>| match event.kind() {
        EventKind::Change(change) => Change::clone(change),
        _ => panic!("puts are changes"),
    };
    let rounds = (2 * COUNT * BATCH).div_ceil(KEYS);
    let changes: Vec<Change> = events(&keys(KEYS), rounds, &Bytes::from_static(VALUE)).iter().map(change).collect();
    let dir = tempfile::tempdir().expect("a directory can be made");
    let options = FsOptions::default().with_durability(Durability::Os).with_background(false);
    let mut store = FsPersist::open(dir.path(), options.with_segment_bytes(64 << 20)).expect("the directory is new");
    let mut at = 0;
    Box::new(move || {
        let _keep = &dir;
        store.persist(&changes[at..at + BATCH]).expect("it is stored");
        at += BATCH;
    })
}

type Store = NotifyKeyValue<NoPersist, Mailbox>;

fn store() -> (Store, Vec<nkv_core::Key>) {
    let store = NotifyKeyValue::open(NoPersist::default()).expect("nothing is loaded");
    let keys = keys(KEYS);
    let value = Bytes::from_static(VALUE);
    let ops: Vec<Op> = keys.iter().map(|key| put(key, &value)).collect();
    store.write(&ops).expect("nothing is stored");
    (store, keys)
}
