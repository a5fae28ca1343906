//! The opening of a data directory that holds anything at all.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nkv_persist_fs::fuzzing::recover(data));
