//! What is read back from a log: bytes of a segment, taken apart.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nkv_persist_fs::fuzzing::log_records(data));
