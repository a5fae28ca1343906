//! The contract of [`PersistValue`], line by line: one function for each, which panics when the line is broken.
//!
//! [`persist_conformance!`](crate::persist_conformance) makes a test of each. A harness opens the same storage again
//! and again; dropping a backend and opening it anew is the restart that every promise has to outlive.

use std::collections::BTreeMap;
use std::time::Duration;
use std::{fmt, thread};

use bytes::Bytes;
use nkv_core::{
    Action, Change, Epoch, Expiry, KEY_LEN_MAX, Key, Loaded, META_LEN_MAX, Meta, PersistValue, Reason, Record,
    Revision, Timestamp,
};

/// Opens one storage, as often as it is asked to.
///
/// The storage is empty at first and belongs to this harness alone. The suite never holds two backends at once.
/// A closure that returns a backend is a harness.
pub trait PersistHarness {
    /// What is tested.
    type Backend: PersistValue;

    /// Opens the storage, with what earlier backends stored in it.
    fn open(&self) -> Self::Backend;
}

impl<P: PersistValue, F: Fn() -> P> PersistHarness for F {
    type Backend = P;

    fn open(&self) -> P {
        self()
    }
}

/// Makes a test of each line of the contract of [`PersistValue`].
///
/// The expression is a [`PersistHarness`], evaluated anew for each test: over a storage that is empty and its own.
///
/// # Examples
///
/// ```
/// mod conformance {
///     use nkv_core::{Epoch, MemoryPersist};
///
///     nkv_testkit::persist_conformance!({
///         let disk = MemoryPersist::new(Epoch::new(7));
///         move || disk.clone()
///     });
/// }
/// ```
#[macro_export]
macro_rules! persist_conformance {
    (@ $what:ident $argument:tt) => {
        $crate::__conformance! { $what persist $argument;
            new_storage_is_empty
            what_was_stored_survives_a_restart
            a_batch_survives_together
            an_overwrite_leaves_only_the_newest
            a_delete_removes_its_key_and_no_other
            a_deleted_key_can_be_put_again
            a_batch_is_applied_in_its_order
            the_highest_revision_survives_even_when_its_key_was_deleted
            revisions_may_have_gaps
            the_epoch_stays_the_same_over_restarts
            load_visits_each_key_once
            loading_changes_nothing
            expiry_survives
            an_overwrite_replaces_the_expiry
            values_are_any_bytes
            an_empty_value_is_a_value
            keys_are_any_keys
            a_key_is_independent_of_the_keys_below_it
            keys_that_differ_in_case_are_different
            the_longest_keys_survive
            a_large_value_survives
            a_large_batch_survives
            many_batches_survive
            restarts_between_batches_change_nothing
            preparing_a_batch_stores_nothing
            a_batch_may_be_prepared_and_another_stored
            closing_loses_nothing
            several_keys_may_have_one_revision
            a_delete_of_nothing_counts
            meta_survives_byte_for_byte
            a_tombstone_stays_until_a_change_takes_its_place
            reserved_records_survive_beside_keys_of_the_same_name
            an_epoch_begins_with_nothing
            a_backend_may_move_to_another_thread
        }
    };
    ($harness:expr) => {
        $crate::persist_conformance! { @ tests $harness }
    };
}

/// A line of the contract: its name, and the function that checks it.
pub type Line<H> = (&'static str, fn(&H));

/// All lines with their names, for suites that run them in another way than [`persist_conformance!`] does.
///
/// [`persist_conformance!`]: crate::persist_conformance
#[must_use]
pub fn lines<H: PersistHarness>() -> Vec<Line<H>> {
    crate::persist_conformance! { @ table H }
}

/// Storage that was never written to holds no record and no revision.
pub fn new_storage_is_empty<H: PersistHarness>(harness: &H) {
    for _ in 0..2 {
        let (records, loaded) = load(&mut harness.open());
        assert_eq!(records, [], "new storage holds records");
        assert_eq!(loaded.revision, Revision::ZERO, "new storage has a revision");
    }
}

/// *Durable*: what was given before `persist` returned is there after a restart, with value and revision.
pub fn what_was_stored_survives_a_restart<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    run.persist(vec![put("host.db1.load", 1, "0.7")]);
    run.persist(vec![put("host.db2.load", 2, "0.9")]);
    run.restart("after two batches");
    run.persist(vec![put("host.db3.load", 3, "0.1")]);
    run.restart("after a third");
}

/// *Together*: every change of a batch is there after a restart.
pub fn a_batch_survives_together<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    run.persist(vec![put("a", 1, "old"), put("b", 2, "old"), put("c", 3, "old")]);
    run.persist(vec![put("a", 4, "new"), delete("b", 5), put("d.e", 6, "new"), put("c", 7, "new")]);
    run.restart("after a batch of four changes");
}

/// *Whole*: of the values a key had, the last one is loaded, complete.
pub fn an_overwrite_leaves_only_the_newest<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    for (revision, value) in (1..).zip(["short", "a much longer value than before", "", "mid-sized", "x"]) {
        run.persist(vec![put("key", revision, value)]);
    }
    run.restart("after five values of one key");
    run.persist(vec![put("key", 6, "sixth")]);
    run.restart("after one more");
}

/// A deleted key is not loaded; its neighbours are.
pub fn a_delete_removes_its_key_and_no_other<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    run.persist(vec![put("a", 1, "1"), put("b", 2, "2"), put("c", 3, "3")]);
    run.persist(vec![delete("b", 4)]);
    run.restart("after a delete");
    run.persist(vec![expire("a", 5)]);
    run.restart("after an expiry");
    run.persist(vec![delete("c", 6)]);
    run.restart("after deleting everything");
}

/// A put after a delete counts, within a run and after a restart.
pub fn a_deleted_key_can_be_put_again<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    run.persist(vec![put("a", 1, "first")]);
    run.persist(vec![delete("a", 2)]);
    run.persist(vec![put("a", 3, "second")]);
    run.restart("after put, delete, put");
    run.persist(vec![delete("a", 4)]);
    run.restart("after deleting it again");
    run.persist(vec![put("a", 5, "third")]);
    run.restart("after putting it again");
}

/// Several changes of one key in one batch count in the order given.
pub fn a_batch_is_applied_in_its_order<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    run.persist(vec![put("was", 1, "here")]);
    run.persist(vec![
        put("put-put", 2, "first"),
        put("put-delete", 3, "gone"),
        delete("was", 4),
        put("put-put", 5, "second"),
        delete("put-delete", 6),
        put("was", 7, "again"),
    ]);
    run.restart("after a batch that changes keys twice");
    run.persist(vec![delete("was", 8), put("was", 9, "x"), delete("was", 10)]);
    run.restart("after a batch that ends in a delete");
}

/// *Revisions*: the highest one survives, even when no key carries it.
pub fn the_highest_revision_survives_even_when_its_key_was_deleted<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    run.persist(vec![put("a", 1, "1"), put("b", 2, "2")]);
    run.persist(vec![delete("b", 3)]);
    run.restart("after the newest change was a delete");
    run.restart("again, with nothing written");
    run.persist(vec![delete("a", 4)]);
    run.restart("after the last key was deleted");
    run.restart("again, with nothing stored at all");
}

/// *Revisions*: they increase, but need not be consecutive, start at one, or fit in 32 bits.
pub fn revisions_may_have_gaps<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    run.persist(vec![put("a", 7, "7"), put("b", 1_000, "1000")]);
    run.persist(vec![put("c", 1 << 33, "large")]);
    run.restart("after revisions with gaps");
    run.persist(vec![delete("c", (1 << 53) + 1)]);
    run.restart("after a revision beyond 53 bits");
}

/// *Epoch*: where nothing was lost, it stays the same.
pub fn the_epoch_stays_the_same_over_restarts<H: PersistHarness>(harness: &H) {
    let (_, first) = load(&mut harness.open());
    for revision in 1..5 {
        let mut backend = harness.open();
        let (_, loaded) = load(&mut backend);
        assert_eq!(loaded.epoch, first.epoch, "the epoch changed over a restart that lost nothing");
        let replaces = Revision::new(revision - 1);
        persist(&mut backend, &[Change { replaces, ..put("a", revision, "x") }]);
    }
}

/// However often a key was written, in however many runs, `load` visits it once.
pub fn load_visits_each_key_once<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    for revision in 1..=60 {
        run.persist(vec![put(["a", "b", "a.b"][revision as usize % 3], revision, &revision.to_string())]);
        if revision % 20 == 0 {
            run.restart("after more values of three keys"); // `load` below checks it
        }
    }
}

/// Opening and loading again and again finds the same.
pub fn loading_changes_nothing<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    run.persist(vec![put("a", 1, "1"), put("b", 2, "2"), delete("a", 3)]);
    for _ in 0..5 {
        run.restart("with nothing written");
    }
}

/// When a value ends, and how long it was to live, survive.
pub fn expiry_survives<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    let expiries = [(1, 1), (1_700_000_000_000, 60_000), (u64::MAX, u64::MAX), ((1 << 53) + 1, (1 << 53) + 3)];
    let batch = (1..).zip(expiries).map(|(revision, (at, ttl_ms))| {
        put_expiring(&format!("k{revision}"), revision, "x", Expiry { at: Timestamp::from_millis(at), ttl_ms })
    });
    run.persist(batch.collect());
    run.persist(vec![put("forever", 5, "x")]);
    run.restart("after values with and without expiry");
}

/// An overwrite gives the key the new expiry, or none.
pub fn an_overwrite_replaces_the_expiry<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    let expiry = |at| Expiry { at: Timestamp::from_millis(at), ttl_ms: 1_000 };
    run.persist(vec![put_expiring("ends", 1, "x", expiry(5_000)), put("starts", 2, "x")]);
    run.persist(vec![put("ends", 3, "x"), put_expiring("starts", 4, "x", expiry(6_000))]);
    run.restart("after one expiry was ended and one was given");
    run.persist(vec![put_expiring("starts", 5, "x", expiry(9_000))]);
    run.restart("after one was prolonged");
}

/// *Whole*: values are opaque bytes.
pub fn values_are_any_bytes<H: PersistHarness>(harness: &H) {
    let all: Vec<u8> = (0..=255).collect();
    let values: [&[u8]; 8] =
        [&all, b"\n", b"\r\n\r\n", b"\0", b"\xff\xfe", b"{\"a\":1}", b" leading and trailing ", b"--\n--"];
    let mut run = Run::start(harness);
    let batch = (1..).zip(values).map(|(revision, value)| put_bytes(&format!("k{revision}"), revision, value.to_vec()));
    run.persist(batch.collect());
    run.restart("after values of all kinds of bytes");
}

/// A key with no bytes for a value is there; it is not a deleted one.
pub fn an_empty_value_is_a_value<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    run.persist(vec![put("empty", 1, ""), put("full", 2, "x")]);
    run.restart("after an empty value");
    run.persist(vec![put("full", 3, "")]);
    run.restart("after a value became empty");
}

/// Keys are not file names, patterns or commands, whatever they look like.
pub fn keys_are_any_keys<H: PersistHarness>(harness: &H) {
    let keys = [
        "/etc/x",
        "/",
        "a/b",
        "a/b.c",
        "a\\b",
        "~",
        "-rf",
        "$(x)",
        "`x`",
        "a'b\"c",
        "CON",
        "nul",
        "a:b",
        "k.json",
        "k.tmp",
        "k.json.tmp",
        "k",
        "%",
        "%2e",
        "%2F",
        "a%00",
        "é.ü",
        "e\u{301}.u\u{308}",
        "\u{202e}x",
        "日本.語",
        "🔑",
        "{a}",
        "a,b",
        "a=b",
        "a;b",
        "#a",
        "?",
        "[a]",
        "<a>",
        "a|b",
        "&",
        "!",
        "0",
        "00",
        "0x0",
        "null",
        "true",
        "_",
        "__proto__",
    ];
    let mut run = Run::start(harness);
    run.persist((1..).zip(keys).map(|(revision, key)| put(key, revision, key)).collect());
    run.restart("after keys that look like something else");
    let next = keys.len() as u64 + 1;
    run.persist((next..).zip(&keys[..keys.len() / 2]).map(|(revision, key)| delete(key, revision)).collect());
    run.restart("after half of them were deleted");
}

/// `a`, `a.b` and `a.b.c` are three keys; deleting one leaves the others.
pub fn a_key_is_independent_of_the_keys_below_it<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    run.persist(vec![put("a.b.c", 1, "3")]);
    run.persist(vec![put("a", 2, "1")]);
    run.persist(vec![put("a.b", 3, "2"), put("a-b", 4, "other"), put("ab", 5, "other")]);
    run.restart("after a key, one below it and one below that");
    run.persist(vec![delete("a", 6)]);
    run.restart("after the uppermost was deleted");
    run.persist(vec![put("a", 7, "again"), delete("a.b.c", 8)]);
    run.restart("after the lowest was deleted");
    run.persist(vec![delete("a.b", 9)]);
    run.restart("after the one between was deleted");
}

/// `A` and `a` are two keys, also where a file system thinks otherwise.
pub fn keys_that_differ_in_case_are_different<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    run.persist(vec![put("a", 1, "lower"), put("A", 2, "upper"), put("host.Db", 3, "Db"), put("host.db", 4, "db")]);
    run.restart("after keys that differ in case");
    run.persist(vec![delete("A", 5), put("host.db", 6, "new")]);
    run.restart("after one of each pair changed");
}

/// Keys of [`KEY_LEN_MAX`] bytes survive, in one segment or in as many as there can be, and stay apart.
pub fn the_longest_keys_survive<H: PersistHarness>(harness: &H) {
    let one_segment = "k".repeat(KEY_LEN_MAX);
    let other_end = format!("{}l", "k".repeat(KEY_LEN_MAX - 1));
    let segments = vec!["s"; KEY_LEN_MAX / 2].join(".");
    let wide = "é".repeat(KEY_LEN_MAX / 2);
    let mut run = Run::start(harness);
    run.persist(vec![put(&one_segment, 1, "1"), put(&other_end, 2, "2")]);
    run.persist(vec![put(&segments, 3, "3"), put(&wide, 4, "4")]);
    run.restart("after keys of the greatest length");
    run.persist(vec![delete(&one_segment, 5)]);
    run.restart("after one was deleted");
}

/// A value of a mebibyte survives, and so does what was stored around it.
pub fn a_large_value_survives<H: PersistHarness>(harness: &H) {
    let mut random = Random(7);
    let large: Vec<u8> = (0..1 << 20).map(|_| random.next() as u8).collect();
    let mut run = Run::start(harness);
    run.persist(vec![put("before", 1, "x"), put_bytes("large", 2, large.clone()), put("after", 3, "y")]);
    run.restart("after a value of 1 MiB");
    run.persist(vec![put_bytes("large", 4, large[1..].to_vec())]);
    run.restart("after it was overwritten by another");
    run.persist(vec![put("large", 5, "small now")]);
    run.restart("after it was overwritten by a small one");
}

/// A batch of 5,000 changes survives together.
pub fn a_large_batch_survives<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    run.persist((1..=5_000).map(|revision| put(&format!("host.h{revision}.load"), revision, "value")).collect());
    run.restart("after a batch of 5,000 puts");
    run.persist((1..=5_000).map(|n| delete(&format!("host.h{n}.load"), 5_000 + n)).collect());
    run.restart("after a batch of 5,000 deletes");
}

/// What 300 random batches leave is what a map of them holds.
pub fn many_batches_survive<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    let mut random = Random(11);
    for _ in 0..300 {
        let batch = random.batch(run.loaded.revision);
        run.persist(batch);
    }
    run.restart("after 300 batches");
}

/// Restarting now and then makes no difference.
pub fn restarts_between_batches_change_nothing<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    let mut random = Random(13);
    for _ in 0..40 {
        for _ in 0..random.below(4) {
            let batch = random.batch(run.loaded.revision);
            run.persist(batch);
        }
        run.restart("among random batches");
    }
}

/// *Prepared*: a batch that was prepared and not stored is not there, neither within the run nor after a restart.
pub fn preparing_a_batch_stores_nothing<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    run.prepare(vec![put("a", 1, "prepared")]);
    run.restart("after a batch was prepared in empty storage");
    run.persist(vec![put("a", 1, "1"), put("b", 2, "2")]);
    run.prepare(vec![put("a", 3, "prepared"), delete("b", 4), put("c", 5, "prepared")]);
    run.restart("after a batch was prepared");
}

/// *Prepared*: what is stored after a batch was prepared is stored as it is given, be it that batch or another.
pub fn a_batch_may_be_prepared_and_another_stored<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    run.prepare(vec![put("a", 1, "1")]);
    run.persist(vec![put("a", 1, "1")]);
    let prepared = vec![put("a", 2, "2"), delete("a", 3)];
    run.prepare(prepared.clone());
    run.prepare(vec![put("b", 2, "prepared and dropped")]);
    run.prepare(prepared);
    run.persist(vec![put("c", 2, "another, and longer than what was prepared"), put("d", 3, "x")]);
    run.persist(vec![put("c", 4, "again, unprepared")]);
    run.restart("after batches that were prepared and others that were not");
}

/// *Closed*: storage that was closed holds what it held, in the same epoch, and may be opened again.
pub fn closing_loses_nothing<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    run.close();
    run.restart("after empty storage was closed");
    run.persist(vec![put("a", 1, "1"), put("b", 2, "2")]);
    run.persist(vec![delete("a", 3), put("c", 4, "4")]);
    run.close();
    run.restart("after a close");
    run.close();
    run.restart("after a close with nothing written");
}

/// *Alone*: the one caller may be another thread than the one that opened the backend.
pub fn a_backend_may_move_to_another_thread<H: PersistHarness>(harness: &H) {
    let mut backend = harness.open();
    load(&mut backend);
    let writer = thread::spawn(move || {
        persist(&mut backend, &[put("a", 1, "from another thread")]);
        backend
    });
    let mut backend = writer.join().expect("persisting from another thread panicked");
    persist(&mut backend, &[put("b", 2, "from this one")]);
    drop(backend);
    let (records, loaded) = load(&mut harness.open());
    assert_eq!(records.len(), 2, "both threads' changes are there");
    assert_eq!(loaded.revision, Revision::new(2));
}

/// *Revisions*: several keys of a batch may have the same one.
pub fn several_keys_may_have_one_revision<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    run.persist(vec![put("a", 1, "1"), put("b", 2, "2"), put("a.c", 2, "2"), put("d", 2, "2")]);
    run.restart("after three keys of one revision");
    run.persist(vec![put("a", 5, "5"), delete("b", 5), delete("d", 5)]);
    run.restart("after changes and deletes of one revision");
    run.persist(vec![delete("a", 6), delete("a.c", 6)]);
    run.restart("after all was deleted at one revision");
}

/// *Replaces*: a delete that replaces nothing leaves nothing, and its revision is kept.
pub fn a_delete_of_nothing_counts<H: PersistHarness>(harness: &H) {
    let mut run = Run::start(harness);
    run.persist(vec![delete("never", 3)]);
    run.restart("after a delete in empty storage");
    run.persist(vec![put("a", 4, "x"), delete("never", 5)]);
    run.restart("after a delete of a key that never was");
    run.persist(vec![delete("a", 6)]);
    run.persist(vec![delete("a", 7)]);
    run.restart("after a key was deleted twice");
}

/// *Meta*: what comes with a put is given back with its record, byte for byte, and goes with it.
pub fn meta_survives_byte_for_byte<H: PersistHarness>(harness: &H) {
    let Some(mut kept) = Kept::start(harness) else { return };
    let all: Vec<u8> = (0..=255).collect();
    kept.persist(vec![
        with_meta(put("all", 1, "x"), &all),
        with_meta(put("empty", 2, "x"), b""),
        with_meta(put("empty.value", 3, ""), b"{\"a\":1}\n"),
        with_meta(put("long", 4, "x"), &vec![0xff; META_LEN_MAX]),
        put("none", 5, "x"),
        with_meta(put_expiring("ends", 6, "x", Expiry { at: Timestamp::from_millis(9), ttl_ms: 9 }), b"e"),
    ]);
    kept.restart("after puts with meta");
    let batch = ["all", "empty", "none"].iter().zip(7..);
    kept.persist(batch.map(|(at, revision)| put(at, revision, "y")).collect());
    kept.persist(vec![with_meta(put("none", 10, "z"), b"some"), with_meta(put("long", 11, "x"), b"short")]);
    kept.restart("after an overwrite took the meta away, and one brought some");
    kept.persist(vec![delete("long", 12)]);
    kept.restart("after a delete without meta");
}

/// *Meta*: a delete with meta leaves a tombstone, which a put, another delete with meta, or one without takes the place of.
pub fn a_tombstone_stays_until_a_change_takes_its_place<H: PersistHarness>(harness: &H) {
    let Some(mut kept) = Kept::start(harness) else { return };
    kept.persist(vec![put("a", 1, "x"), put("b", 2, "x"), with_meta(put("c", 3, "x"), b"c")]);
    let gone = ["a", "b", "c", "never"].iter().zip(4..);
    kept.persist(gone.map(|(at, revision)| with_meta(delete(at, revision), at.as_bytes())).collect());
    kept.restart("after deletes with meta");
    kept.restart("again, with nothing written");
    kept.persist(vec![put("a", 8, "again"), with_meta(delete("b", 9), b"another"), delete("c", 10)]);
    kept.restart("after a put, another tombstone and a delete without meta");
    kept.persist(vec![delete("b", 11), delete("never", 12), with_meta(delete("a", 13), b"")]);
    kept.restart("after all but one were dropped");
    kept.persist(vec![
        with_meta(delete("x", 14), b"1"),
        put("x", 15, "1"),
        put("y", 16, "1"),
        with_meta(delete("y", 17), b"2"),
    ]);
    kept.restart("after two changes of a key in one batch");
}

/// *Meta*: tombstones of reserved keys are apart from all keys, whatever their names.
pub fn reserved_records_survive_beside_keys_of_the_same_name<H: PersistHarness>(harness: &H) {
    let Some(mut kept) = Kept::start(harness) else { return };
    let names = ["head", "a", "a.b", "epoch", "revision", "owner", "k.json", "/etc/x"];
    kept.persist((1..).zip(names).map(|(revision, name)| put(name, revision, name)).collect());
    kept.persist((10..).zip(names).map(|(revision, name)| reserved(name, revision, Some(name.as_bytes()))).collect());
    kept.restart("after reserved records");
    let some = names.iter().step_by(2);
    kept.persist(
        (20..).zip(some).map(|(revision, name)| reserved(name, revision, (revision > 21).then_some(b"new"))).collect(),
    );
    kept.restart("after some were replaced or dropped");
}

/// *Epoch*: where a backend can begin one, nothing of the one before is left, and revisions begin again.
pub fn an_epoch_begins_with_nothing<H: PersistHarness>(harness: &H) {
    let Some(mut kept) = Kept::start(harness) else { return };
    kept.persist(vec![
        put("a", 1, "x"),
        put("a.b", 2, "x"),
        put("host", 3, "x"),
        with_meta(put("c", 1_000, "x"), b"c"),
    ]);
    kept.persist(vec![with_meta(delete("a", 1_001), b"gone"), reserved("seen", 1_001, Some(b"1"))]);
    let epoch = Epoch::new(0x1234_5678_9abc_def0_1122_3344_5566_7788);
    let begun = kept.backend().begin_epoch(epoch);
    begun.unwrap_or_else(|error| panic!("begin_epoch failed: {error} ({:?})", error.kind()));
    (kept.model, kept.loaded) = (BTreeMap::new(), Loaded { epoch, revision: Revision::ZERO });
    kept.restart("after an epoch began");
    let begun = kept.backend().begin_epoch(Epoch::new(7));
    begun.unwrap_or_else(|error| panic!("begin_epoch failed: {error} ({:?})", error.kind()));
    kept.loaded.epoch = Epoch::new(7);
    kept.persist(vec![put("a", 1, "new"), with_meta(delete("c", 2), b"c"), put("host", 2, "new")]);
    kept.restart("after an epoch began and a batch followed");
}

/// What storage has of a key: revision, value with expiry (none in a tombstone), and meta.
type Entry = (Revision, Option<(Bytes, Option<Expiry>)>, Meta);

/// A run with a backend that keeps meta, and what it should have.
struct Kept<'a, H: PersistHarness> {
    harness: &'a H,
    backend: Option<H::Backend>,
    model: BTreeMap<String, Entry>,
    loaded: Loaded,
}

impl<'a, H: PersistHarness> Kept<'a, H> {
    /// `None`, and a word about it, if the backend keeps none.
    fn start(harness: &'a H) -> Option<Self> {
        let mut backend = harness.open();
        if !backend.keeps_meta() {
            eprintln!("skipped: the backend says that it keeps no meta");
            return None;
        }
        let (model, loaded) = load_all(&mut backend);
        Some(Kept { harness, backend: Some(backend), model, loaded })
    }

    fn backend(&mut self) -> &mut H::Backend {
        self.backend.as_mut().expect("a run has a backend between two restarts")
    }

    fn persist(&mut self, mut batch: Vec<Change>) {
        for change in &mut batch {
            let name = change.key.to_string();
            let is_record = |entry: &&Entry| entry.1.is_some();
            change.replaces = self.model.get(&name).filter(is_record).map_or(Revision::ZERO, |entry| entry.0);
            let value = match &change.action {
                Action::Put { value, expiry } => Some((value.clone(), *expiry)),
                Action::Delete { .. } => None,
            };
            if value.is_none() && change.meta.is_none() {
                self.model.remove(&name);
            } else {
                self.model.insert(name, (change.revision, value, change.meta.clone()));
            }
            self.loaded.revision = change.revision;
        }
        persist(self.backend(), &batch);
    }

    fn restart(&mut self, when: &str) {
        drop(self.backend.take());
        let mut backend = self.harness.open();
        let (found, loaded) = load_all(&mut backend);
        for name in self.model.keys().chain(found.keys()) {
            let (found, expected) = (found.get(name), self.model.get(name));
            let brief = |entry: Option<&Entry>| {
                let text = format!("{entry:?}");
                text.chars().take(200).collect::<String>()
            };
            assert!(found == expected, "{when}, of {name:?} there is {} in place of {}", brief(found), brief(expected));
        }
        assert_eq!(loaded, self.loaded, "{when}");
        self.backend = Some(backend);
    }
}

fn load_all<P: PersistValue>(backend: &mut P) -> (BTreeMap<String, Entry>, Loaded) {
    let mut all = BTreeMap::new();
    let loaded = backend.load(&mut |stored| {
        let key = stored.key().as_str();
        let check = if stored.record().is_some() { Key::check(key) } else { Key::check_stored(key) };
        assert_eq!(check, Ok(()), "load visited {key:?}");
        let value = stored.record().map(|record| (record.value.to_bytes(), record.expiry));
        let entry = (stored.revision(), value, Meta::from(stored.meta()));
        assert!(all.insert(key.to_owned(), entry).is_none(), "load visited {key} twice");
    });
    (all, loaded.unwrap_or_else(|error| panic!("load failed: {error} ({:?})", error.kind())))
}

fn with_meta(change: Change, meta: &[u8]) -> Change {
    Change { meta: Meta::new(meta), ..change }
}

fn reserved(name: &str, revision: u64, meta: Option<&[u8]>) -> Change {
    let key = Key::reserved(name).unwrap_or_else(|error| panic!("{name:?}: {error}"));
    Change { key, meta: Meta::from(meta), ..delete("x", revision) }
}

/// A backend, and what it must hold.
struct Run<'a, H: PersistHarness> {
    harness: &'a H,
    backend: Option<H::Backend>,
    model: BTreeMap<Key, Record>,
    loaded: Loaded,
}

impl<'a, H: PersistHarness> Run<'a, H> {
    fn start(harness: &'a H) -> Self {
        let mut backend = harness.open();
        let (records, loaded) = load(&mut backend);
        assert_eq!(
            (records, loaded.revision),
            (vec![], Revision::ZERO),
            "the harness gave storage that was used before"
        );
        Run { harness, backend: Some(backend), model: BTreeMap::new(), loaded }
    }

    fn persist(&mut self, mut batch: Vec<Change>) {
        self.model = self.apply(&mut batch);
        self.loaded.revision = batch.last().expect("a batch is never empty").revision;
        persist(self.backend(), &batch);
    }

    /// Prepares a batch, which is not stored.
    fn prepare(&mut self, mut batch: Vec<Change>) {
        self.apply(&mut batch);
        let prepared = self.backend().prepare(&batch);
        prepared.unwrap_or_else(|error| panic!("prepare failed: {error} ({:?})", error.kind()));
    }

    /// What a batch makes of the model. Gives each change the revision that it replaces, as a store does.
    fn apply(&self, batch: &mut [Change]) -> BTreeMap<Key, Record> {
        let mut model = self.model.clone();
        for change in batch {
            change.replaces = model.get(&change.key).map_or(Revision::ZERO, |record| record.revision);
            let Change { key, revision, action, .. } = change.clone();
            match action {
                Action::Put { value, expiry } => {
                    model.insert(key.clone(), Record { key, value, revision, expiry });
                }
                Action::Delete { .. } => {
                    model.remove(&key);
                }
            }
        }
        model
    }

    fn close(&mut self) {
        let closed = self.backend().close();
        closed.unwrap_or_else(|error| panic!("close failed: {error} ({:?})", error.kind()));
    }

    fn backend(&mut self) -> &mut H::Backend {
        self.backend.as_mut().expect("a run has a backend between two restarts")
    }

    fn restart(&mut self, when: &str) {
        drop(self.backend.take());
        let mut backend = self.harness.open();
        let (records, loaded) = load(&mut backend);
        self.compare(records, when);
        assert_eq!(loaded.revision, self.loaded.revision, "the highest revision, {when}");
        assert_eq!(loaded.epoch, self.loaded.epoch, "the epoch, {when}");
        self.backend = Some(backend);
    }

    /// Names what differs rather than printing a mebibyte.
    fn compare(&self, records: Vec<Record>, when: &str) {
        let mut missing = self.model.clone();
        for record in records {
            let key = record.key.clone();
            let Some(expected) = missing.remove(&key) else {
                let brief = Brief(&record);
                panic!("{when}, load visited a key that should not be there: {brief:?}");
            };
            let (found, expected) = (Brief(&record), Brief(&expected));
            assert!(found.0 == expected.0, "{when}, load visited {found:?} where {expected:?} was stored");
        }
        assert!(missing.is_empty(), "{when}, load did not visit {:?}", missing.values().map(Brief).collect::<Vec<_>>());
    }
}

/// A record as a failed test prints it.
struct Brief<'a>(&'a Record);

impl fmt::Debug for Brief<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Record { key, value, revision, expiry } = self.0;
        let key: String = key.as_str().chars().take(80).collect();
        let start = value.slice(..value.len().min(40));
        write!(f, "{key} @{revision} = {start:?} ({} bytes, expiry {expiry:?})", value.len())
    }
}

pub(crate) fn load<P: PersistValue>(backend: &mut P) -> (Vec<Record>, Loaded) {
    let mut records: BTreeMap<Key, Record> = BTreeMap::new();
    let loaded = backend.load(&mut |stored| {
        let Some(record) = stored.record() else { panic!("load visited {stored:?}: no delete had meta") };
        assert_eq!(Key::check(&record.key), Ok(()), "load visited {:?}", record.key);
        let record = record.to_record();
        let key = record.key.clone();
        assert!(records.insert(key.clone(), record).is_none(), "load visited {key} twice");
    });
    let loaded = loaded.unwrap_or_else(|error| panic!("load failed: {error} ({:?})", error.kind()));
    (records.into_values().collect(), loaded)
}

pub(crate) fn persist<P: PersistValue>(backend: &mut P, batch: &[Change]) {
    backend.persist(batch).unwrap_or_else(|error| panic!("persist failed: {error} ({:?})", error.kind()));
}

fn key(text: &str) -> Key {
    Key::new(text).unwrap_or_else(|error| panic!("{text:?}: {error}"))
}

pub(crate) fn put(at: &str, revision: u64, value: &str) -> Change {
    put_bytes(at, revision, value.as_bytes().to_vec())
}

fn put_bytes(at: &str, revision: u64, value: Vec<u8>) -> Change {
    let action = Action::Put { value: Bytes::from(value), expiry: None };
    Change { key: key(at), revision: Revision::new(revision), replaces: Revision::ZERO, action, meta: Meta::NONE }
}

fn put_expiring(at: &str, revision: u64, value: &str, expiry: Expiry) -> Change {
    let action = Action::Put { value: Bytes::copy_from_slice(value.as_bytes()), expiry: Some(expiry) };
    Change { key: key(at), revision: Revision::new(revision), replaces: Revision::ZERO, action, meta: Meta::NONE }
}

pub(crate) fn delete(at: &str, revision: u64) -> Change {
    Change {
        key: key(at),
        revision: Revision::new(revision),
        replaces: Revision::ZERO,
        action: Action::Delete { reason: Reason::Deleted },
        meta: Meta::NONE,
    }
}

fn expire(at: &str, revision: u64) -> Change {
    Change {
        key: key(at),
        revision: Revision::new(revision),
        replaces: Revision::ZERO,
        action: Action::Delete { reason: Reason::Expired },
        meta: Meta::NONE,
    }
}

/// The same numbers on every machine: a failure is a failure again. (Marsaglia's xorshift.)
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// One to five changes of few keys, so that they meet.
    fn batch(&mut self, after: Revision) -> Vec<Change> {
        let count = 1 + self.below(5);
        (after.get() + 1..).take(count as usize).map(|revision| self.change(revision)).collect()
    }

    fn change(&mut self, revision: u64) -> Change {
        let at = ["a", "b", "a.a", "a.b", "b.a", "a.a.a", "a.a.b", "A"][self.below(8) as usize];
        let value = "v".repeat(self.below(100) as usize);
        match self.below(4) {
            0 => delete(at, revision),
            1 => put_expiring(
                at,
                revision,
                &value,
                Expiry::after(Timestamp::from_millis(self.below(1_000)), Duration::from_millis(revision)),
            ),
            _ => put(at, revision, &value),
        }
    }
}
