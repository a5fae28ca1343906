//! What is to be sent stays the same bytes in the same order, whatever is appended and however little is taken at a time.

#![allow(clippy::unwrap_used)]

use bytes::{BufMut, Bytes};
use nkv_protocol::Chunks;
use proptest::prelude::*;

/// Long enough to be shared.
const LONG: usize = 4_096;

#[derive(Clone, Debug)]
enum Step {
    Put(usize),
    Push(usize),
    Append(Vec<usize>, usize),
    Advance(usize),
    Shrink,
    Take,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let len = || prop_oneof![0..9_usize, LONG - 2..LONG + 2, 10_000..20_000_usize];
    let step = prop_oneof![
        4 => (0..300_usize).prop_map(Step::Put),
        4 => len().prop_map(Step::Push),
        2 => (proptest::collection::vec(len(), 0..4), 0..9_000_usize).prop_map(|(lens, gone)| Step::Append(lens, gone)),
        6 => prop_oneof![0..20_usize, 0..9_000_usize, 0..60_000_usize].prop_map(Step::Advance),
        1 => Just(Step::Shrink),
        1 => Just(Step::Take),
    ];
    proptest::collection::vec(step, 0..if cfg!(miri) { 10 } else { 60 })
}

fn sliced(chunks: &Chunks) -> Vec<u8> {
    let slices: Vec<_> = chunks.slices().collect();
    assert!(slices.iter().all(|slice| !slice.is_empty()));
    slices.concat()
}

proptest! {
    #[test]
    fn bytes_come_out_as_they_went_in(steps in steps()) {
        let (mut out, mut model, mut next) = (Chunks::default(), Vec::new(), 0_u8);
        let mut fresh = |len: usize| -> Bytes {
            (0..len).map(|_| { next = next.wrapping_mul(5).wrapping_add(1); next }).collect()
        };
        for step in steps {
            match step {
                Step::Put(len) => {
                    let bytes = fresh(len);
                    out.tail().put_slice(&bytes);
                    model.extend_from_slice(&bytes);
                }
                Step::Push(len) => {
                    let bytes = fresh(len);
                    out.push(&bytes);
                    model.extend_from_slice(&bytes);
                }
                Step::Append(lens, gone) => {
                    let (mut other, mut others) = (Chunks::default(), Vec::new());
                    for len in lens {
                        let bytes = fresh(len);
                        other.push(&bytes);
                        others.extend_from_slice(&bytes);
                    }
                    other.advance(gone);
                    others.drain(..gone.min(others.len()));
                    out.append(&mut other);
                    model.append(&mut others);
                    prop_assert!(other.is_empty() && other.slices().next().is_none());
                }
                Step::Advance(count) => {
                    out.advance(count);
                    model.drain(..count.min(model.len()));
                }
                Step::Shrink => out.shrink(),
                Step::Take => {
                    let taken = out.take();
                    prop_assert!(taken.iter().all(|chunk| !chunk.is_empty()));
                    prop_assert_eq!(taken.concat(), std::mem::take(&mut model));
                }
            }
            prop_assert_eq!((out.len(), out.is_empty()), (model.len(), model.is_empty()));
            prop_assert_eq!(sliced(&out), model.clone());
        }
    }
}

#[test]
fn long_values_are_shared_and_short_ones_lie_together() {
    let (long, mut out) = (Bytes::from(vec![7; LONG]), Chunks::default());
    out.push(&Bytes::from_static(b"ab"));
    out.push(&long);
    out.push(&Bytes::from_static(b"c"));
    out.push(&Bytes::from_static(b"d"));
    let slices: Vec<_> = out.slices().collect();
    assert_eq!((slices.len(), slices[0], slices[2]), (3, &b"ab"[..], &b"cd"[..]));
    assert_eq!(slices[1].as_ptr(), long.as_ptr());
    assert_eq!(out.take()[1].as_ptr(), long.as_ptr());
}

#[test]
fn when_all_is_sent_some_room_is_kept_and_none_after_shrinking() {
    let mut out = Chunks::default();
    for len in [1_000, 100_000] {
        out.tail().put_slice(&vec![1; len]);
        let room = out.capacity();
        out.advance(len);
        assert_eq!(out.capacity(), room, "the next round needs no memory");
    }
    out.tail().put_slice(&[1; 1 << 20]);
    out.advance(1 << 20);
    assert!(out.capacity() <= 128 << 10, "{} bytes are kept", out.capacity());
    out.shrink();
    assert_eq!(out.capacity(), 0);
}

#[test]
fn a_peer_that_is_always_a_little_behind_does_not_make_the_buffer_grow() {
    let mut out = Chunks::default();
    out.tail().put_slice(&[1; 30_000]);
    for _ in 0..if cfg!(miri) { 100 } else { 10_000 } {
        out.tail().put_slice(&[1; 1_000]);
        out.advance(1_000);
    }
    assert_eq!(out.len(), 30_000);
    assert!(out.capacity() <= 256 << 10, "{} bytes for 30,000", out.capacity());
}

// Each round ended inside a long value, and what was sent before it was never dropped.
#[test]
fn a_peer_that_always_stops_inside_a_long_value_does_not_make_the_buffer_grow() {
    let (long, mut out) = (Bytes::from(vec![7; LONG]), Chunks::default());
    let add = |out: &mut Chunks| {
        out.tail().put_slice(&[1; 100]);
        out.push(&long);
    };
    add(&mut out);
    out.advance(200);
    for _ in 0..if cfg!(miri) { 100 } else { 10_000 } {
        add(&mut out);
        out.advance(100 + LONG);
    }
    assert_eq!(out.len(), LONG - 100);
    assert!(out.capacity() <= 256 << 10, "{} bytes for a few", out.capacity());
}

#[test]
fn lines_come_one_by_one_wherever_the_pieces_end() {
    let long = [&[b'x'; 9_000][..], b"\n"].concat();
    let mut rest = Chunks::default();
    let pieces: [&[u8]; 6] = [b"one\ntw", b"o\n", &long, b"th", &long, b"end"];
    pieces.iter().for_each(|piece| rest.push(&Bytes::copy_from_slice(piece)));
    let expected: [&[u8]; 5] = [b"one\n", b"two\n", &long, &[b"th", &long[..]].concat(), b"end"];
    for line in expected {
        let mut out = Chunks::default();
        rest.move_line(&mut out);
        assert!(out.take().concat() == line, "{}", line.len());
    }
    assert!(rest.is_empty());
}
