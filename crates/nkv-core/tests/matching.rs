//! Which keys a pattern means: the trie of subscribers and the walk over the keys against a filter over everything.
#![cfg(not(loom))]
#![allow(clippy::unwrap_used, reason = "the helpers of a test are test code too")]

mod checks;

use std::fs;
use std::path::Path;

use nkv_core::mailbox::{Inbox, Item, mailbox};
use nkv_core::{EventKind, Key, NoPersist, NotifyKeyValue, Pattern, PutOptions};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestRunner};

use checks::selects_and_covers;

/// Few segments, among them prefixes of each other, so that branches and their likenesses meet.
fn key() -> impl Strategy<Value = String> {
    vec(prop::sample::select(vec!["a", "b", "ab", "a-", "é"]), 1..5).prop_map(|segments| segments.join("."))
}

fn pattern() -> impl Strategy<Value = String> {
    let exact = key().prop_map(|key| key + EXACT);
    prop_oneof![1 => Just("*".to_owned()), 4 => key(), 3 => exact, 4 => key().prop_map(|key| key + ".*")]
}

/// Stands behind a key that is meant alone; no key holds it.
const EXACT: &str = " alone";

fn parse(pattern: &str) -> Pattern {
    match pattern.strip_suffix(EXACT) {
        Some(key) => Pattern::Exact(Key::new(key).unwrap()),
        None => Pattern::new(pattern).unwrap(),
    }
}

fn matches(pattern: &str, key: &str) -> (bool, bool) {
    match pattern.strip_suffix(EXACT) {
        Some(own) => (own == key, own == key),
        None => selects_and_covers(pattern, key),
    }
}

/// What a mailbox received: of a snapshot each key, of a change its key.
fn received(inbox: &Inbox<()>) -> Vec<String> {
    let mut keys = Vec::new();
    while let Some(Item::Event { event, .. }) = inbox.try_take() {
        match event.kind() {
            EventKind::Snapshot(snapshot) => keys.extend(snapshot.records.iter().map(|record| record.key.to_string())),
            EventKind::Change(change) => keys.push(change.key.to_string()),
            _ => {}
        }
    }
    keys
}

fn check(mut keys: Vec<String>, patterns: &[String], after: &str, limit: usize, ended: usize) -> u64 {
    let store = NotifyKeyValue::open(NoPersist::default()).unwrap();
    let put = |key: &String| _ = store.put(&Key::new(key).unwrap(), key.clone(), PutOptions::default()).unwrap();
    let order = |key: &str| key.split('.').map(str::to_owned).collect::<Vec<_>>();
    keys.iter().for_each(put);
    keys.sort_by_key(|key| order(key));
    keys.dedup();
    let mut count = 0;

    let mut inboxes = Vec::new();
    for (at, text) in patterns.iter().enumerate() {
        let pattern = parse(text);
        let selected: Vec<_> = keys.iter().filter(|key| matches(text, key).0).cloned().collect();
        let covered: Vec<_> = keys.iter().filter(|key| matches(text, key).1).cloned().collect();
        count += covered.len() as u64;

        let (post, inbox) = mailbox();
        store.subscribe(pattern.clone(), at.to_string().as_str().into(), post, true);
        assert_eq!(received(&inbox), covered, "the snapshot of {text}");
        inboxes.push(inbox);

        let all: Vec<_> = store.get_all(&pattern).into_iter().map(|record| record.key.to_string()).collect();
        assert_eq!(all, selected, "get {text}");
        assert_eq!(store.exists(&pattern), !selected.is_empty(), "exists {text}");
        let later: Vec<_> = selected.iter().filter(|key| order(key) > order(after)).collect();
        let page = store.list(&pattern, Some(&Key::new(after).unwrap()), limit);
        let listed: Vec<_> = page.entries.iter().map(|(key, _)| key.to_string()).collect();
        assert!(listed.iter().eq(later.iter().copied().take(limit)), "list {text} after {after}: {listed:?}");
        assert_eq!(page.more, later.len() > limit, "more of {text} after {after}");
    }

    // Some end, so that the trie is pruned.
    for (at, text) in patterns.iter().enumerate().take(ended) {
        assert!(store.unsubscribe(&parse(text), &at.to_string().as_str().into()));
        received(&inboxes[at]);
    }
    for key in keys.iter().chain([&after.to_owned()]) {
        put(key);
        for (at, text) in patterns.iter().enumerate() {
            let expected = at >= ended && matches(text, key).1;
            assert_eq!(received(&inboxes[at]).contains(key), expected, "{text} is notified of {key}");
        }
    }

    if !keys.iter().any(|key| key == after) {
        keys.push(after.to_owned());
    }
    for text in patterns {
        let before = keys.len();
        keys.retain(|key| !matches(text, key).0);
        let gone = store.delete(&parse(text), None).map_or(0, |(count, _)| count);
        assert_eq!(gone as usize, before - keys.len(), "delete {text}");
    }
    count
}

#[test]
fn the_trie_and_the_walk_agree_with_a_filter_over_all_keys() {
    let count = if cfg!(debug_assertions) { 2_000 } else { 20_000 };
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(count);
    let seed = std::env::var("NKV_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand_seed);
    println!("NKV_SEED={seed}");
    let config = ProptestConfig {
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        ..ProptestConfig::with_cases(cases)
    };
    let matches = std::cell::Cell::new(0);
    let case = (vec(key(), 0..16), vec(pattern(), 0..12), key(), 0..6_usize, 0..12_usize);
    let outcome = TestRunner::new(config).run(&case, |(keys, patterns, after, limit, ended)| {
        matches.set(matches.get() + check(keys, &patterns, &after, limit, ended));
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("NKV_SEED={seed}: {error}"));
    println!("TEST trie_vs_naive cases={cases} matches={} divergences=0 seed={seed}", matches.get());
    assert!(cases < 100 || matches.get() > 0, "nothing matched");
}

fn rand_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(())
}

#[test]
fn keys_of_the_corpus_hold() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/keys");
    let files = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
    // Under Miri all of them would take minutes.
    let files: Vec<_> = files.take(if cfg!(miri) { 10 } else { usize::MAX }).collect();
    for file in &files {
        println!("{}", file.display()); // shown if the check panics
        checks::keys(&fs::read(file).unwrap());
    }
    assert!(files.len() >= 10, "{} holds no corpus", dir.display());
    println!("TEST corpus_keys files={}", files.len());
}
