//! What it costs to read requests and to write answers. Resource: processor; bytes in, bytes out, no socket.
//!
//! A value travels in three forms: as an array of numbers, as a string, or raw behind the line. The throughput counts
//! the bytes of the values, so that the forms can be compared.

mod support;

use std::fmt::Write;
use std::hint::black_box;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput};
use nkv_protocol::{Answer, BaseFields, ChangeNotice, Chunks, Decoder, Id, Limits, ValueForm};

use crate::support::criterion;

/// Bytes of a value: printable, as most are.
const VALUE_LENS: [usize; 2] = [100, 16 << 10];
/// So many requests lie in one buffer when a client does not wait for answers.
const DEPTH: usize = 16;
const KEY: &str = "bench.k00000417";
const FORMS: [ValueForm; 3] = [ValueForm::Payload, ValueForm::Text, ValueForm::Bytes];

fn main() {
    let mut criterion = criterion();
    decode_get(&mut criterion);
    decode_put(&mut criterion);
    encode_ok(&mut criterion);
    encode_get(&mut criterion);
    encode_update(&mut criterion);
    criterion.final_summary();
}

fn decode_get(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec/decode_get");
    let line = format!("{{\"type\":\"Get\",\"id\":\"3\",\"client_uuid\":\"c12\",\"key\":\"{KEY}\"}}\n");
    for depth in [1, DEPTH] {
        let input = line.repeat(depth).into_bytes();
        group.throughput(Throughput::Elements(depth as u64));
        group.bench_function(BenchmarkId::from_parameter(depth), |bencher| bencher.iter(|| decode(&input, depth)));
    }
    group.finish();
}

fn decode_put(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec/decode_put");
    for len in VALUE_LENS {
        for form in FORMS {
            let input = put_line(&value(len), form);
            group.throughput(Throughput::Bytes(len as u64));
            group.bench_function(BenchmarkId::new(form.as_str(), len), |bencher| bencher.iter(|| decode(&input, 1)));
        }
    }
    let input = put_line(&value(VALUE_LENS[0]), ValueForm::Payload).repeat(DEPTH);
    group.throughput(Throughput::Elements(DEPTH as u64));
    group.bench_function(BenchmarkId::new("pipelined", DEPTH), |bencher| bencher.iter(|| decode(&input, DEPTH)));
    group.finish();
}

/// Decodes the `count` requests that the input holds.
fn decode(input: &[u8], count: usize) {
    let (mut decoder, mut start) = (Decoder::new(Limits::default()), 0);
    for _ in 0..count {
        let decoded = decoder.decode(&black_box(input)[start..]);
        black_box(decoded.item.expect("it is whole").expect("it is good"));
        start += decoded.consumed;
    }
    assert_eq!(start, input.len());
}

/// The answer to a put.
fn encode_ok(criterion: &mut Criterion) {
    let mut out = Chunks::default();
    criterion.bench_function("codec/encode_ok", |bencher| {
        bencher.iter(|| {
            let fields = BaseFields::revision(black_box(12_345));
            Answer::to(Id::from_json("\"3\""), &mut out).ok(&fields);
            send(&mut out);
        });
    });
}

/// What a connection does with what was encoded, but for the system call.
fn send(out: &mut Chunks) {
    out.slices().for_each(|slice| _ = black_box(slice));
    out.advance(out.len());
}

fn encode_get(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec/encode_get");
    for len in VALUE_LENS {
        let value = value(len);
        for form in FORMS {
            let mut out = Chunks::default();
            group.throughput(Throughput::Bytes(len as u64));
            group.bench_function(BenchmarkId::new(form.as_str(), len), |bencher| {
                bencher.iter(|| {
                    Answer::to(Id::from_json("\"3\""), &mut out).get(form, &[(KEY, &value, black_box(12_345))], false);
                    send(&mut out);
                });
            });
        }
    }
    group.finish();
}

/// A change for the first subscriber, and what each further one adds.
fn encode_update(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec/encode_update");
    for len in VALUE_LENS {
        let value = value(len);
        for form in FORMS {
            let mut out = Chunks::default();
            group.throughput(Throughput::Bytes(len as u64));
            group.bench_function(BenchmarkId::new(form.as_str(), len), |bencher| {
                bencher.iter(|| {
                    ChangeNotice::update(KEY, &value, black_box(12_345), form).write(0, &mut out);
                    send(&mut out);
                });
            });
            let notice = ChangeNotice::update(KEY, &value, 12_345, form);
            group.bench_function(BenchmarkId::new(format!("{}_again", form.as_str()), len), |bencher| {
                bencher.iter(|| {
                    notice.write(black_box(0), &mut out);
                    send(&mut out);
                });
            });
        }
    }
    group.finish();
}

fn value(len: usize) -> Bytes {
    (0..len).map(|n| b'a' + (n % 26) as u8).collect()
}

fn put_line(value: &Bytes, form: ValueForm) -> Vec<u8> {
    let mut line = format!("{{\"type\":\"Put\",\"id\":\"3\",\"client_uuid\":\"c12\",\"key\":\"{KEY}\",");
    let written = match form {
        ValueForm::Payload => write!(line, "\"len\":{}}}\n{}\n", value.len(), value.escape_ascii()),
        ValueForm::Text => writeln!(line, "\"value\":\"{}\"}}", value.escape_ascii()),
        ValueForm::Bytes => writeln!(line, "\"value\":{}}}", format!("{:?}", value.as_ref()).replace(", ", ",")),
    };
    written.expect("a string takes everything");
    line.into_bytes()
}
