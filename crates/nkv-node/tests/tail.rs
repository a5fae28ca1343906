//! Subscriptions that are resumed: nothing is missed, nothing is given twice, and what says nothing any more is forgotten.

use std::collections::BTreeMap;
use std::time::Duration;

use nkv_node::{Cursor, GoneReason, Handle, Limits, Node, Tail, TailEvent, TailOptions};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(30);

async fn node(deletes: usize) -> (Node, Handle) {
    let node = Node::builder().start().await.expect("a node");
    let handle = node.handle();
    handle.remember_deletes(deletes);
    (node, handle)
}

async fn next(tail: &mut Tail) -> (TailEvent, Option<Cursor>) {
    timeout(PATIENCE, tail.next()).await.expect("an event").expect("the tail goes on")
}

/// What comes up to `Synced`, in short, and the cursor there.
async fn until_synced(tail: &mut Tail) -> (Vec<String>, Cursor) {
    let mut said = Vec::new();
    loop {
        let (event, cursor) = next(tail).await;
        match event {
            TailEvent::Synced { .. } => return (said, cursor.expect("a point to resume from")),
            TailEvent::Reset => {
                assert_eq!(cursor.map(|cursor| cursor.revision.get()), Some(0));
                said.push("reset".into());
            }
            event => {
                assert_eq!(cursor, None, "no point to resume from inside a snapshot or a resume");
                said.push(short(&event));
            }
        }
    }
}

fn short(event: &TailEvent) -> String {
    match event {
        TailEvent::Put { entry, .. } => format!("{}={}", entry.key, String::from_utf8_lossy(&entry.value)),
        TailEvent::Delete { key, reason, .. } => format!("{key} {}", reason.as_str()),
        TailEvent::Reset => "reset".into(),
        other => format!("{other:?}"),
    }
}

fn after(cursor: Cursor) -> TailOptions<'static> {
    TailOptions::default().with_after(cursor)
}

#[tokio::test]
async fn a_resumed_reader_is_given_what_it_missed_and_nothing_else() {
    let (_node, nkv) = node(100).await;
    for key in ["a.kept", "a.changed", "a.deleted", "a.again", "b.other"] {
        nkv.put(key, "1").await.unwrap();
    }
    let mut tail = nkv.tail("a", TailOptions::default()).unwrap();
    let (said, cursor) = until_synced(&mut tail).await;
    assert_eq!(said, ["a.again=1", "a.changed=1", "a.deleted=1", "a.kept=1"]);
    nkv.put("a.changed", "2").await.unwrap();
    let (event, live) = next(&mut tail).await;
    assert_eq!((short(&event), live.map(|live| live.revision.get())), ("a.changed=2".into(), Some(6)));
    drop(tail);

    let mut nothing = nkv.tail("a", after(live.unwrap())).unwrap();
    assert_eq!(until_synced(&mut nothing).await.0, [""; 0]);
    nkv.delete("a.deleted").await.unwrap();
    nkv.delete("a.again").await.unwrap();
    nkv.put("a.again", "3").await.unwrap();
    nkv.put("b.other", "2").await.unwrap();
    nkv.delete("b.other").await.unwrap();
    // From before the change, and over the wire.
    let cursor: Cursor = cursor.to_string().parse().unwrap();
    let (said, _) = until_synced(&mut nkv.tail("a", after(cursor)).unwrap()).await;
    assert_eq!(said, ["a.again=3", "a.changed=2", "a.deleted missed"]);
}

#[tokio::test]
async fn what_is_not_known_any_more_begins_with_a_reset_and_the_whole_state() {
    let (_node, nkv) = node(2).await;
    nkv.put("a.kept", "1").await.unwrap();
    let (_, cursor) = until_synced(&mut nkv.tail("a", TailOptions::default()).unwrap()).await;
    let whole = ["reset", "a.kept=1"];

    let other_selection = nkv.tail(["a", "b"], after(cursor));
    assert_eq!(until_synced(&mut other_selection.unwrap()).await.0, whole);
    let other_epoch = Cursor { epoch: nkv_core::Epoch::new(1), ..cursor };
    assert_eq!(until_synced(&mut nkv.tail("a", after(other_epoch)).unwrap()).await.0, whole);
    let of_the_future = Cursor { revision: nkv_core::Revision::new(99), ..cursor };
    assert_eq!(until_synced(&mut nkv.tail("a", after(of_the_future)).unwrap()).await.0, whole);
    // As a person types it: of whatever selection.
    let typed = Cursor { selection: None, ..cursor };
    assert_eq!(until_synced(&mut nkv.tail(["a", "b"], after(typed)).unwrap()).await.0, [""; 0]);

    // More deletes than are remembered: the oldest may be one that is missed.
    for round in 0..3 {
        nkv.put(format!("x.{round}"), "").await.unwrap();
        nkv.delete(format!("x.{round}")).await.unwrap();
    }
    assert_eq!(until_synced(&mut nkv.tail("a", after(cursor)).unwrap()).await.0, whole);
}

#[tokio::test]
async fn a_node_that_remembers_nothing_resets() {
    let node = Node::builder().start().await.unwrap();
    let nkv = node.handle();
    nkv.put("a", "1").await.unwrap();
    let (_, cursor) = until_synced(&mut nkv.tail("a", TailOptions::default()).unwrap()).await;
    assert_eq!(until_synced(&mut nkv.tail("a", after(cursor)).unwrap()).await.0, ["reset", "a=1"]);
}

#[tokio::test]
async fn without_a_snapshot_it_is_synced_at_once_and_gives_what_comes() {
    let (_node, nkv) = node(10).await;
    nkv.put("a", "1").await.unwrap();
    let mut tail = nkv.tail(["a", "b"], TailOptions::default().with_snapshot(false)).unwrap();
    let (said, cursor) = until_synced(&mut tail).await;
    assert_eq!((said, cursor.revision.get()), (vec![], 1));
    assert_eq!(tail.position().map(|position| position.revision.get()), Some(1));
    nkv.put("other", "1").await.unwrap();
    // It moves on with changes of others.
    assert_eq!(tail.position().map(|position| position.revision.get()), Some(2));
    nkv.put("b", "1").await.unwrap();
    assert_eq!(tail.position(), None, "something waits");
    assert_eq!(short(&next(&mut tail).await.0), "b=1");
}

/// What a reader that follows the rules holds.
async fn hold(tail: &mut Tail, held: &mut BTreeMap<String, u64>, cursor: &mut Option<Cursor>, events: usize) {
    for _ in 0..events {
        let Ok(next) = timeout(Duration::from_millis(50), tail.next()).await else { return };
        let (event, at) = next.expect("the tail goes on");
        match event {
            TailEvent::Put { entry, .. } => _ = held.insert(entry.key.to_string(), entry.revision.get()),
            TailEvent::Delete { key, .. } => _ = held.remove(key.as_str()),
            TailEvent::Reset => held.clear(),
            _ => {}
        }
        *cursor = at.or(*cursor);
    }
}

/// A reader of two patterns that is cut at any moment, resumes, stands still and is given too much, ends with the state.
#[tokio::test]
async fn a_reader_that_comes_and_goes_ends_with_the_present_state() {
    let mut limits = Limits::default();
    limits.queued_max = 1 << 20;
    let node = Node::builder().limits(limits).start().await.unwrap();
    let nkv = node.handle();
    nkv.remember_deletes(20);
    let (mut held, mut cursor, mut seed) = (BTreeMap::new(), None, 1_u64);
    for round in 0..300_u64 {
        let mut random = |n: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % n
        };
        let options = cursor.map_or(TailOptions::default(), after);
        if cursor.is_none() {
            held.clear();
        }
        let mut tail = nkv.tail(["a", "b"], options).unwrap();
        for _ in 0..random(12) {
            let key = format!("{}.{}", ["a", "b", "c"][random(3) as usize], random(6));
            if random(3) == 0 {
                nkv.delete(key).await.unwrap();
            } else {
                nkv.put(key, "v").await.unwrap();
            }
            if random(3) == 0 {
                hold(&mut tail, &mut held, &mut cursor, random(4) as usize).await;
            }
        }
        if round % 50 == 0 {
            // Far more than may wait.
            for n in 0..5_000 {
                nkv.put(format!("a.flood.{n}"), "").await.unwrap();
            }
            nkv.delete("a.flood.*").await.unwrap();
        }
        if random(4) == 0 {
            hold(&mut tail, &mut held, &mut cursor, usize::MAX).await;
        }
        if random(8) == 0 {
            // It forgot up to where it knew the state.
            cursor = None;
        }
    }
    let mut tail = nkv.tail(["a", "b"], cursor.map_or(TailOptions::default(), after)).unwrap();
    if cursor.is_none() {
        held.clear();
    }
    hold(&mut tail, &mut held, &mut cursor, usize::MAX).await;
    let mut expected = BTreeMap::new();
    for pattern in ["a.*", "b.*"] {
        let listed = nkv.list(pattern).await.unwrap().into_iter();
        expected.extend(listed.map(|(key, revision)| (key.to_string(), revision.get())));
    }
    assert_eq!(held, expected);
}

#[tokio::test]
async fn a_key_that_ends_by_itself_says_when() {
    let (_node, nkv) = node(10).await;
    let ttl = Duration::from_secs(600);
    nkv.put_with("a", "1", nkv_node::PutOptions::default().with_ttl(ttl)).await.unwrap();
    let (event, _) = next(&mut nkv.tail("a", TailOptions::default()).unwrap()).await;
    let TailEvent::Put { ttl: Some(left), .. } = event else { panic!("no put with a TTL: {event:?}") };
    assert!(left <= ttl && left > ttl / 2, "{left:?}");
    assert_eq!(GoneReason::Missed.as_str(), "missed");
}

/// What the mailbox takes for a key that the reader never knew: one that came and went unread. A resumed reader may know it.
#[tokio::test]
async fn a_key_that_comes_back_and_goes_while_its_reader_resumes_is_gone_for_it() {
    let (_node, nkv) = node(100).await;
    nkv.put("k", "1").await.unwrap();
    let (_, cursor) = until_synced(&mut nkv.tail("*", TailOptions::default()).unwrap()).await;
    nkv.delete("k").await.unwrap();
    nkv.put("z", "1").await.unwrap();
    let mut tail = nkv.tail("*", after(cursor)).unwrap();
    assert_eq!(short(&next(&mut tail).await.0), "z=1");
    nkv.put("k", "2").await.unwrap();
    let mut said = Vec::new();
    loop {
        let (event, _) = next(&mut tail).await;
        if matches!(event, TailEvent::Synced { .. }) {
            break;
        }
        said.push(short(&event));
    }
    nkv.delete("k").await.unwrap();
    if said.is_empty() {
        said.push(short(&next(&mut tail).await.0));
    }
    assert!(said.last().is_some_and(|last| last.starts_with("k ")), "{said:?}");
}

/// Several subscriptions do not begin at once: what changes in between is given to each that resumes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_missed_between_the_beginnings_of_several_patterns() {
    let (_node, nkv) = node(1_000).await;
    let patterns: Vec<String> = (0..200).map(|n| format!("p.{n}")).collect();
    let last = "p.199";
    let mut cursor = until_synced(&mut nkv.tail(&patterns, TailOptions::default()).unwrap()).await.1;
    for round in 0..100_u64 {
        let writer = nkv.clone();
        let writing = tokio::spawn(async move { writer.put(last, format!("{round}")).await.unwrap() });
        let mut tail = nkv.tail(&patterns, after(cursor)).unwrap();
        let revision = writing.await.unwrap().get();
        let (mut is_given, mut known) = (false, 0);
        while known < revision {
            let (event, at) = next(&mut tail).await;
            is_given |= matches!(&event, TailEvent::Put { entry, .. } if entry.revision.get() == revision);
            if let Some(at) = at {
                (cursor, known) = (at, at.revision.get());
            }
        }
        assert!(is_given, "round {round}: {revision} was never given, and {known} is said to be known");
    }
}
