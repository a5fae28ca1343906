//! What it costs to post changes to subscribers and to take them. Resource: processor and cache; no socket, no thread
//! waits.
//!
//! `one_key`: the same key over and over, taken each time, or never, so that each post but the first takes the place of
//! another. `many_keys`: a mailbox fills with a change of each key, and is emptied. `subscribers`: one change to each
//! of many mailboxes, taken from each.

mod support;

use std::hint::black_box;
use std::sync::Arc;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput};
use nkv_core::mailbox::{Inbox, Mailbox, mailbox};
use nkv_core::{Event, Notifier};

use crate::support::{criterion, events, key, keys};

/// Keys that have a change in a mailbox at a time.
const MANY: [usize; 2] = [100, 10_000];
/// Mailboxes that one change goes to.
const SUBSCRIBERS: [usize; 2] = [1, 500];
/// Changes of one key that are posted in turn.
const CHANGES: usize = 1_000;
const VALUE: &[u8] = &[b'v'; 100];

fn main() {
    let mut criterion = criterion();
    one_key(&mut criterion);
    many_keys(&mut criterion);
    subscribers(&mut criterion);
    criterion.final_summary();
}

fn one_key(criterion: &mut Criterion) {
    let changes = changes_of_one_key();
    let mut changes = changes.iter().cycle();
    let mut change = || changes.next().expect("it goes round");
    let mut group = criterion.benchmark_group("mailbox/one_key");
    let (post, inbox): (Mailbox, Inbox) = mailbox();
    group.bench_function("post_and_take", |bencher| {
        bencher.iter(|| {
            let _ = post.notify(change());
            black_box(inbox.try_take())
        });
    });
    let (post, _inbox): (Mailbox, Inbox) = mailbox();
    group.bench_function("post", |bencher| bencher.iter(|| black_box(post.notify(change()))));
    group.finish();
}

fn many_keys(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("mailbox/many_keys");
    for count in MANY {
        let changes = events(&keys(count), 1, &Bytes::from_static(VALUE));
        let (post, inbox): (Mailbox, Inbox) = mailbox();
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(BenchmarkId::new("post_and_take", count), |bencher| {
            bencher.iter(|| {
                changes.iter().for_each(|change| _ = post.notify(change));
                while let Some(item) = inbox.try_take() {
                    black_box(item);
                }
            });
        });
    }
    group.finish();
}

fn subscribers(criterion: &mut Criterion) {
    let changes = changes_of_one_key();
    let mut changes = changes.iter().cycle();
    let mut group = criterion.benchmark_group("mailbox/subscribers");
    for count in SUBSCRIBERS {
        let mailboxes: Vec<(Mailbox, Inbox)> = (0..count).map(|_| mailbox()).collect();
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(BenchmarkId::new("post_and_take", count), |bencher| {
            bencher.iter(|| {
                let change = changes.next().expect("it goes round");
                mailboxes.iter().for_each(|(post, _)| _ = post.notify(change));
                mailboxes.iter().for_each(|(_, inbox)| _ = black_box(inbox.try_take()));
            });
        });
    }
    group.finish();
}

fn changes_of_one_key() -> Vec<Arc<Event>> {
    events(&[key("host.h1.figure1")], CHANGES, &Bytes::from_static(VALUE))
}
