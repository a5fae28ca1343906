//! The corpus of the fuzz targets, read again: what once was worth keeping stays mended.

#![allow(clippy::unwrap_used)]

mod checks;

use std::fs;
use std::path::Path;

fn replay(target: &str, check: fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let files = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
    // Under Miri all of them would take minutes.
    let files: Vec<_> = files.take(if cfg!(miri) { 10 } else { usize::MAX }).collect();
    for file in &files {
        println!("{}", file.display()); // shown if the check panics
        check(&fs::read(file).unwrap());
    }
    assert!(files.len() >= 10, "{} holds no corpus", dir.display());
    println!("TEST corpus_{target} files={}", files.len());
}

#[test]
fn requests_of_the_corpus_hold() {
    replay("requests", checks::requests);
}

#[test]
fn messages_of_the_corpus_hold() {
    replay("messages", checks::messages);
}
