//! What it costs to read requests and to write answers. Resource: processor; bytes in, bytes out, no socket.
//!
//! A value travels in three forms: as an array of numbers, as a string, or raw behind the line. The throughput counts
//! the bytes of the values, so that the forms can be compared.

mod support;

use std::fmt::Write;
use std::hint::black_box;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput};
use nkv_protocol::{Answer, ChangeNotice, Chunks, Decoder, Id, Limits, ValueForm};

use crate::support::{criterion, key};

/// Bytes of a value: printable, as most are.
const VALUE_LENS: [usize; 2] = [100, 10_000];
const KEY: &str = "host.db1.load";
const FORMS: [ValueForm; 3] = [ValueForm::Payload, ValueForm::Text, ValueForm::Bytes];

fn main() {
    let mut criterion = criterion();
    decode_put(&mut criterion);
    encode_get(&mut criterion);
    encode_update(&mut criterion);
    criterion.final_summary();
}

fn decode_put(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec/decode_put");
    for len in VALUE_LENS {
        let value = value(len);
        for form in FORMS {
            let input = put_line(&value, form);
            let mut decoder = Decoder::new(Limits::default());
            group.throughput(Throughput::Bytes(len as u64));
            group.bench_function(BenchmarkId::new(form.as_str(), len), |bencher| {
                bencher.iter(|| {
                    let decoded = decoder.decode(black_box(&input));
                    let request = decoded.item.expect("it is whole").expect("it is good");
                    assert_eq!(request.value.as_ref().map(|value| value.len()), Some(len));
                });
            });
        }
    }
    group.finish();
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
                    Answer::to(Id::from_json("7"), &mut out).get(form, &[(KEY, &value, 12_345)], false);
                    black_box(out.take())
                });
            });
        }
    }
    group.finish();
}

fn encode_update(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec/encode_update");
    for len in VALUE_LENS {
        let value = value(len);
        for form in FORMS {
            let mut out = Chunks::default();
            group.throughput(Throughput::Bytes(len as u64));
            group.bench_function(BenchmarkId::new(form.as_str(), len), |bencher| {
                bencher.iter(|| {
                    ChangeNotice::update(KEY, &value, 12_345, form).write(0, &mut out);
                    black_box(out.take())
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
    let mut line = format!("{{\"type\":\"Put\",\"id\":7,\"key\":\"{}\",", key(KEY));
    let written = match form {
        ValueForm::Payload => write!(line, "\"len\":{}}}\n{}\n", value.len(), value.escape_ascii()),
        ValueForm::Text => writeln!(line, "\"value\":\"{}\"}}", value.escape_ascii()),
        ValueForm::Bytes => writeln!(line, "\"value\":{:?}}}", value.as_ref()),
    };
    written.expect("a string takes everything");
    line.into_bytes()
}
